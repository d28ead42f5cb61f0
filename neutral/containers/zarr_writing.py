"""New zarr arrays of format 2 in plain files, and the chunks of one that is there written anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from neutral.containers.codecs import compressed
from neutral.containers.elements import element_bytes
from neutral.containers.zarr import PLAIN, Layout, overlaps
from neutral.native import Array, Range, Tensor


def write_array(folder: Path, name: str, tensor: Tensor) -> None:
    """A new array of one chunk without a compressor."""
    (folder / name).mkdir(parents=True)
    # Numpy has no letter for the dtypes of ml_dtypes; TensorStore writes their names.
    plain = tensor.dtype.newbyteorder("<").str
    fields = {
        "chunks": [max(n, 1) for n in tensor.shape],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": plain if PLAIN.fullmatch(plain) else tensor.dtype.name,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(tensor.shape),
        "zarr_format": 2,
    }
    text = json.dumps(fields, separators=(",", ":"))
    _write(folder / name / ".zarray", [memoryview(text.encode())])
    if tensor.size:
        _write(folder / name / (".".join("0" for _ in tensor.shape) or "0"), element_bytes(tensor))


def rewrite_chunks(folder: Path, name: str, layout: Layout, tensor: Tensor) -> set[str]:
    """All chunks of an array with other elements, compressed as they were; the names of the files."""
    written = set()
    for index, ranges in overlaps([(0, n) for n in layout.shape], layout.chunk):
        key = f"{name}/{layout.key(index)}"
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        pieces = _chunk_bytes(tensor, ranges, layout)
        _write(folder / key, compressed(layout.codec, layout.level, pieces, layout.chunk_bytes))
        written.add(key)
    return written


def _chunk_bytes(tensor: Tensor, ranges: Sequence[Range], layout: Layout) -> Iterator[memoryview]:
    padded: Tensor = _Padded(tensor, [a for a, _ in ranges], layout)
    stored = padded.permute(tuple(reversed(range(len(padded.shape))))) if layout.fortran else padded
    return element_bytes(stored, ">" if layout.dtype.str.startswith(">") else "<")


class _Padded(Tensor):
    """The part of a tensor that is a chunk; what of it lies outside the array is the fill value."""

    def __init__(self, base: Tensor, start: Sequence[int], layout: Layout) -> None:
        self._base, self._start, self._fill = base, start, 0 if layout.fill is None else layout.fill
        self.shape, self.dtype = layout.chunk, base.dtype
        self.streams = base.streams and layout.chunk == base.shape

    def block(self, ranges: Sequence[Range]) -> Array:
        wanted = [(s + a, s + b) for s, (a, b) in zip(self._start, ranges, strict=True)]
        inside = [(min(a, n), min(b, n)) for (a, b), n in zip(wanted, self._base.shape, strict=True)]
        if inside == wanted:
            return self._base.block(wanted)
        out = np.full([b - a for a, b in ranges], self._fill, self.dtype)
        out[tuple(slice(b - a) for a, b in inside)] = self._base.block(inside)
        return out


def _write(path: Path, data: Iterable[bytes | memoryview]) -> None:
    with path.open("xb") as file:
        for piece in data:
            file.write(piece)
