"""New tensor bundles, and copies of one with some tensors replaced; their files take their names together."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from neutral.containers import protobuf
from neutral.containers.crc32c import Crc32c, crc32c, masked
from neutral.containers.files import check_output, pieces
from neutral.containers.sstable import write_table
from neutral.containers.tensor_bundle import VERSION, Bundle, Strings, index_path, length_bytes, shard_path
from neutral.containers.tensor_bundle_entries import DT_STRING, DTYPES, Entry, Extents, entry_bytes
from neutral.errors import Problem, Refused, Unsupported
from neutral.native import Array, Range, Tensor

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_bundle(
    prefix: Path, tensors: Mapping[str, Tensor], strings: Mapping[str, Strings] | None = None, *, force: bool = False
) -> None:
    """A new bundle of one shard, its tensors in the order of their sorted keys; the same input gives the same bytes."""
    entries: list[tuple[bytes, bytes]] = [
        (b"", protobuf.number(1, 1) + protobuf.message(3, protobuf.number(1, VERSION)))
    ]
    named = {key.encode("utf-8"): key for key in (*tensors, *(strings or {}))}
    if len(named) != len(tensors) + len(strings or {}) or any(not key or key.startswith(b"\0") for key in named):
        raise Refused(Problem(str(prefix), "tensor names that are empty or occur twice", "names that differ"))
    with _new_bundle(prefix, 1, force) as (index, (data,)):
        offset = 0
        for raw in sorted(named):
            key = named[raw]
            crc = Crc32c()
            if key in tensors:
                tensor = tensors[key]
                if tensor.dtype not in _CODES:
                    raise Unsupported(Problem(key, f"dtype {tensor.dtype}", "a dtype that TensorFlow has"))
                dtype, shape, size = _CODES[tensor.dtype], tensor.shape, tensor.nbytes
                _write_tiles(data, tensor, tensor.dtype, crc)
            else:
                assert strings is not None
                dtype, shape = DT_STRING, strings[key].shape
                size = _write_strings(data, strings[key], crc)
            entries.append((raw, entry_bytes(dtype, shape, offset, size, masked(crc.value()))))
            offset += size
        write_table(index, entries)


def _write_tiles(out: BinaryIO, tensor: Tensor, dtype: np.dtype[Any], crc: Crc32c) -> None:
    for tile in tensor.tiles():
        data = tile.astype(dtype, copy=False).view(np.uint8).data
        crc.update(data)
        out.write(data)


def _write_strings(out: BinaryIO, strings: Strings, crc: Crc32c) -> int:
    crc.update(b"".join(length_bytes(len(value)) for value in strings.values))
    checksum = masked(crc.value()).to_bytes(4, "little")
    crc.update(checksum)
    head = b"".join(protobuf.varint(len(value)) for value in strings.values) + checksum
    out.write(head)
    for value in strings.values:
        crc.update(value)
        out.write(value)
    return len(head) + sum(map(len, strings.values))


def replace_tensors(bundle: Bundle, tensors: Mapping[str, Tensor], prefix: Path, *, force: bool = False) -> None:
    """A copy of a bundle with the bytes of some tensors replaced: same shards, same places, checksums renewed."""
    problems = []
    parts: list[tuple[Entry, Tensor, np.dtype[Any]]] = []
    for key, tensor in tensors.items():
        where = f"{bundle.prefix}: {key}"
        if key not in bundle.entries:
            problems.append(Problem(where, "no such tensor", "a tensor of this checkpoint"))
            continue
        entry, dtype = bundle.entries[key], bundle.stored_dtype(key)
        if tensor.shape != entry.shape or tensor.dtype != dtype.newbyteorder("="):
            found = f"{tensor.dtype} of shape {list(tensor.shape)}"
            problems.append(Problem(where, found, f"{dtype.newbyteorder('=')} of shape {list(entry.shape)}"))
            continue
        for box, part in bundle.stored_parts(key):
            if part.crc_at is None:
                problems.append(Problem(where, "no checksum", "an entry with one", "save the checkpoint again"))
            whole = box == tuple((0, n) for n in tensor.shape)
            parts.append((part, tensor if whole else _Window(tensor, box), dtype))
    if problems:
        raise Refused(*problems)
    patched = bytearray(bundle.index)
    with _new_bundle(prefix, len(bundle.shard_paths), force) as (index, shards):
        for number, out in enumerate(shards):
            source, at = bundle.shard(number), 0
            here = sorted((p for p in parts if p[0].shard == number), key=lambda p: (p[0].offset, p[0].size))
            for entry, tensor, dtype in here:
                for piece in pieces(source, at, entry.offset):
                    out.write(piece)
                crc = Crc32c()
                _write_tiles(out, tensor, dtype, crc)
                assert entry.crc_at is not None
                patched[entry.crc_at : entry.crc_at + 4] = masked(crc.value()).to_bytes(4, "little")
                at = entry.offset + entry.size
            for piece in pieces(source, at, source.size):
                out.write(piece)
        for block in bundle.blocks:
            stop = block.offset + block.size + 1
            renewed = masked(crc32c(memoryview(patched)[block.offset : stop]))
            patched[stop : stop + 4] = renewed.to_bytes(4, "little")
        index.write(patched)


class _Window(Tensor):
    """A rectangle of a tensor."""

    def __init__(self, base: Tensor, box: Extents) -> None:
        self._base, self._box = base, box
        self.shape = tuple(b - a for a, b in box)
        self.dtype = base.dtype

    def block(self, ranges: Sequence[Range]) -> Array:
        return self._base.block([(low + a, low + b) for (a, b), (low, _) in zip(ranges, self._box, strict=True)])


@contextlib.contextmanager
def _new_bundle(prefix: Path, shards: int, force: bool) -> Iterator[tuple[BinaryIO, list[BinaryIO]]]:
    """The files of a bundle, which take their names together when the block ends without an error, the index last.

    Without its index a bundle does not exist: a replaced one loses its old index first, so a crash in the middle
    leaves no checkpoint where a mixed one could be.
    """
    names = [index_path(prefix), *(shard_path(prefix, i, shards) for i in range(shards))]
    for name in names:
        check_output(name, force)
        if name.is_dir():
            raise Refused(Problem(str(name), "a folder", "a file to write", "choose another name"))
    try:
        hidden = Path(tempfile.mkdtemp(prefix=f".{prefix.name[:100]}.", suffix=".tmp", dir=prefix.parent))
        try:
            with contextlib.ExitStack() as opened:
                files: list[BinaryIO] = [
                    opened.enter_context(open(hidden / str(i), "wb", opener=_create)) for i in range(len(names))
                ]
                yield files[0], files[1:]
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
            _place([hidden / str(i) for i in range(len(names))], names)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        raise Refused(
            Problem(str(prefix), f"{error.strerror or error}", "to write it", "nothing was left behind")
        ) from error


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _place(ready: Sequence[Path], names: Sequence[Path]) -> None:
    """Rename files to their names, the first one last; what was placed is removed again if one cannot be."""
    names[0].unlink(missing_ok=True)
    undo: list[Callable[[], None]] = []
    try:
        for source, name in zip(reversed(ready), reversed(names), strict=True):
            source.replace(name)
            undo.append(name.unlink)
        folder = os.open(names[0].parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        for remove in undo:
            remove()
        raise
