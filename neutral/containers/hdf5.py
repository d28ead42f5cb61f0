"""HDF5 files: where each dataset lies, new files written in one pass, datasets replaced in a copy.

>>> import io, numpy as np
>>> from neutral.containers.files import Memory
>>> from neutral.native import from_array
>>> tree = Hdf5Tree(groups={"dense/vars": {"name": "dense"}}, datasets={"dense/vars/0": from_array(np.eye(2))})
>>> plan = plan_hdf5(tree)
>>> source = open_hdf5(Memory(b"".join(plan.chunks())), "x.h5")
>>> source.groups["dense/vars"], source.tensor("dense/vars/0").read().tolist()
({'name': 'dense'}, [[1.0, 0.0], [0.0, 1.0]])

libhdf5 reads the structure alone, in a child process (`hdf5_probe`). The elements are read here, from places that
were checked against the size of the file: contiguous datasets directly, chunks through zlib. Everything that reaches
outside the file, or that no weights file has (links, virtual and external datasets, strings, references, ...), is
refused.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, BinaryIO

import h5py
import ml_dtypes
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from neutral.containers.files import Memory
from neutral.containers.hdf5_probe import MEMORY, probe
from neutral.errors import BadFile, Problem, Refused, raise_all
from neutral.native import TILE, Array, Range, Storage, Stored, Tensor

Attribute = str | int | float | bool | None | list[Any]

SIGNATURE = b"\x89HDF\r\n\x1a\n"

_LARGEST_RATIO = 1032
"""DEFLATE's densest code: 258 bytes in two bits."""

_LARGEST_CHUNK = MEMORY // 3
_COPY = 4 << 20

_OPAQUE = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e4m3b11fnuz",
    )
}
"""Types that HDF5 has no name for: Keras stores them as opaque bytes and names them in the attribute `dtype`."""


@dataclass(frozen=True)
class Dataset:
    """One dataset: its elements, its attributes, and whether they lie in the file as they are."""

    tensor: Tensor
    attributes: Mapping[str, Attribute]
    address: int
    """Where its header lies: equal for two names of one dataset."""
    spans: tuple[tuple[int, int], ...]
    """(offset, length) of the parts of the file that hold its elements."""
    verbatim: bool
    """True if those bytes are the elements, in C order, in native byte order, so that they may be replaced in place."""


@dataclass(frozen=True)
class Hdf5Source:
    """The groups of an HDF5 file with their attributes, and its datasets. Paths have no leading slash; "" is the root."""

    storage: Storage
    where: str
    groups: Mapping[str, Mapping[str, Attribute]]
    datasets: Mapping[str, Dataset]

    def tensor(self, path: str) -> Tensor:
        return self.datasets[path].tensor


def open_hdf5(storage: Storage, where: str, elements: Storage | None = None) -> Hdf5Source:
    """The structure of the HDF5 file in `storage`; `where` names it in errors.

    Elements are read through `elements` where given: the same bytes behind a storage that checks them.
    """
    if storage.nbytes < len(SIGNATURE):
        raise _broken(where, f"a file of {storage.nbytes} bytes")
    head = bytearray(len(SIGNATURE))
    storage.read_into(0, memoryview(head))
    if head != SIGNATURE:
        raise _broken(where, "a file that does not begin as HDF5 does")
    found = probe(storage, where)
    storage = elements or storage
    datasets = {entry["path"]: _dataset(storage, where, entry) for entry in found["datasets"]}
    _refuse_overlap(where, datasets)
    return Hdf5Source(
        storage, where, found["groups"], dict(sorted(datasets.items(), key=lambda item: natural(item[0])))
    )


def natural(path: str) -> list[tuple[int, int | str]]:
    """A sort key that puts `dense_2` before `dense_10`; HDF5 itself lists names by their bytes."""
    key: list[tuple[int, int | str]] = []
    for part in path.split("/"):
        stem, _, number = part.rpartition("_")
        if number.isascii() and number.isdigit() and len(number) < 10:
            key += [(1, stem), (0, int(number))] if stem else [(0, int(number)), (0, -1)]
        else:
            key += [(1, part), (0, -1)]
    return key


def _dataset(storage: Storage, where: str, entry: Mapping[str, Any]) -> Dataset:
    place = f"{where}: {entry['path']}"
    shape = tuple(int(n) for n in entry["shape"])
    if any(n < 0 for n in shape):
        raise _broken(place, f"shape {shape}")
    stored = _named_dtype(place, np.dtype(entry["dtype"]), entry["attributes"])
    nbytes = math.prod(shape) * stored.itemsize
    spans: list[tuple[int, int]] = []
    tensor: Tensor
    verbatim = False
    if "bytes" in entry:
        data = bytes.fromhex(entry["bytes"])
        if len(data) != nbytes:
            raise _broken(place, f"{len(data)} bytes", f"{nbytes} bytes for shape {shape} of {stored}")
        tensor = Stored(Memory(data), shape, stored)
    elif "chunk" in entry:
        tensor, spans = _chunked(storage, place, shape, stored, entry)
    else:
        offset = entry["offset"]
        if offset is None and nbytes:
            raise _broken(place, f"elements of shape {shape} that were never written", "elements in the file")
        if offset is not None and nbytes:
            _check_span(storage, place, offset, nbytes)
            spans = [(offset, nbytes)]
        tensor = plain = Stored(storage, shape, stored, offset or 0)
        verbatim = plain.contiguous
    return Dataset(tensor, entry["attributes"], int(entry["address"]), tuple(spans), verbatim)


def _named_dtype(place: str, dtype: np.dtype[Any], attributes: Mapping[str, Attribute]) -> np.dtype[Any]:
    if dtype.kind != "V":
        return dtype
    name = attributes.get("dtype")
    named: np.dtype[Any] | None = _OPAQUE.get(name) if isinstance(name, str) else None
    if named is None or named.itemsize != dtype.itemsize:
        raise _broken(
            place, f"opaque elements of {dtype.itemsize} bytes with dtype {name!r}", f"one of {', '.join(_OPAQUE)}"
        )
    return named


def _check_span(storage: Storage, place: str, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > storage.nbytes:
        raise _broken(place, f"{length} bytes at byte {offset}", f"elements inside the file's {storage.nbytes} bytes")


def _refuse_overlap(where: str, datasets: Mapping[str, Dataset]) -> None:
    """Two datasets may be one (a hard link), but not share a part of their bytes."""
    one_each = {dataset.address: (path, dataset) for path, dataset in datasets.items()}
    spans = sorted((start, length, path) for path, dataset in one_each.values() for start, length in dataset.spans)
    end, last = 0, ""
    for start, length, path in spans:
        if start < end:
            raise _broken(f"{where}: {path}", f"elements that overlap those of {last}", "elements of its own")
        end, last = start + length, path


def _chunked(
    storage: Storage, place: str, shape: tuple[int, ...], dtype: np.dtype[Any], entry: Mapping[str, Any]
) -> tuple[Tensor, list[tuple[int, int]]]:
    chunk = tuple(int(n) for n in entry["chunk"])
    if len(chunk) != len(shape) or any(n < 1 for n in chunk):
        raise _broken(place, f"chunks of shape {chunk}", f"{len(shape)} axes")
    chunk_bytes = math.prod(chunk) * dtype.itemsize
    filters = tuple(entry["filters"])
    chunks: dict[tuple[int, ...], _Chunk] = {}
    spans = []
    for *start, offset, size, mask in entry["chunks"]:
        _check_span(storage, place, offset, size)
        index = tuple(s // c for s, c in zip(start, chunk, strict=True))
        used = tuple(name for bit, name in enumerate(filters) if not mask >> bit & 1)
        if chunk_bytes > (size * _LARGEST_RATIO if "deflate" in used else size):
            raise _broken(place, f"a chunk of {chunk_bytes} bytes in {size} bytes", "no more than deflate can pack")
        if used and chunk_bytes > _LARGEST_CHUNK:
            raise _broken(place, f"a packed chunk of {chunk_bytes} bytes", f"at most {_LARGEST_CHUNK}")
        chunks[index] = _Chunk(offset, size, used)
        spans.append((offset, size))
    grid = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
    if len(chunks) != len(entry["chunks"]) or any(i >= n for index in chunks for i, n in zip(index, grid, strict=True)):
        raise _broken(place, "a chunk twice, or outside the shape")
    if len(chunks) != math.prod(grid):
        raise _broken(
            place, f"{len(chunks)} of {math.prod(grid)} chunks of a dataset of shape {shape}", "elements in the file"
        )
    return Chunked(storage, place, shape, dtype, chunk, chunks), spans


@dataclass(frozen=True)
class _Chunk:
    offset: int
    size: int
    filters: tuple[str, ...]


class Chunked(Tensor):
    """Elements that lie in the file as boxes of one shape, packed or not."""

    def __init__(
        self,
        storage: Storage,
        place: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunk: tuple[int, ...],
        chunks: Mapping[tuple[int, ...], _Chunk],
    ) -> None:
        self.shape = shape
        self.dtype = dtype.newbyteorder("=")
        self._storage, self._place, self._stored_dtype, self._chunk, self._chunks = storage, place, dtype, chunk, chunks

    def block(self, ranges: Sequence[Range]) -> Array:
        out = np.empty([b - a for a, b in ranges], self.dtype)
        if out.size == 0:
            return out
        for index in product(*(range(a // c, -(-b // c)) for (a, b), c in zip(ranges, self._chunk, strict=True))):
            bounds = [
                (max(a, i * c), min(b, (i + 1) * c), i * c, a)
                for i, c, (a, b) in zip(index, self._chunk, ranges, strict=True)
            ]
            there = tuple(slice(low - a, high - a) for low, high, _, a in bounds)
            here: list[Range] = [(low - first, high - first) for low, high, first, _ in bounds]
            out[there] = self._unpack(index, here)
        return out

    def _unpack(self, index: tuple[int, ...], ranges: list[Range]) -> Array:
        chunk = self._chunks[index]
        if not chunk.filters:
            return Stored(self._storage, self._chunk, self._stored_dtype, chunk.offset).block(ranges)
        data = bytearray(chunk.size)
        self._storage.read_into(chunk.offset, memoryview(data))
        wanted = math.prod(self._chunk) * self._stored_dtype.itemsize
        plain: bytes | bytearray = data
        for name in reversed(chunk.filters):
            plain = _UNPACK[name](plain, self._stored_dtype.itemsize, wanted, self._place)
        if len(plain) != wanted:
            raise _broken(self._place, f"a chunk of {len(plain)} bytes", f"{wanted} bytes")
        whole = np.frombuffer(plain, self._stored_dtype).reshape(self._chunk)
        return whole[tuple(slice(a, b) for a, b in ranges)].astype(self.dtype, copy=False)


def _inflate(data: bytes | bytearray, itemsize: int, wanted: int, place: str) -> bytes:
    packed = zlib.decompressobj()
    try:
        # Four bytes more than the elements: a checksum may lie inside the packed stream.
        plain = packed.decompress(data, wanted + 4)
    except zlib.error as error:
        raise _broken(place, f"a chunk that does not unpack ({error})") from None
    if not packed.eof and packed.decompress(packed.unconsumed_tail, 1):
        raise _broken(place, f"a chunk that unpacks to more than {wanted} bytes")
    return plain


def _unshuffle(data: bytes | bytearray, itemsize: int, wanted: int, place: str) -> bytes:
    body = len(data) - len(data) % itemsize
    planes = np.frombuffer(data, np.uint8, body).reshape(itemsize, -1)
    return planes.T.tobytes() + bytes(data[body:])


def _unfletcher(data: bytes | bytearray, itemsize: int, wanted: int, place: str) -> bytes:
    if len(data) < 4 or _fletcher32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise _broken(place, "a chunk whose checksum is wrong")
    return bytes(data[:-4])


def _fletcher32(data: bytes | bytearray) -> int:
    """HDF5's checksum (H5_checksum_fletcher32): big-endian 16-bit words, an odd last byte is the high one."""
    words = np.frombuffer(bytes(data) + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    low = high = 0
    for start in range(0, len(words), 360):
        part = words[start : start + 360]
        count = len(part)
        high += low * count + int((part * np.arange(count, 0, -1, dtype=np.uint64)).sum())
        low += int(part.sum())
        low = (low & 0xFFFF) + (low >> 16)
        high = (high & 0xFFFF) + (high >> 16)
        while high >> 16:
            high = (high & 0xFFFF) + (high >> 16)
    low = (low & 0xFFFF) + (low >> 16)
    high = (high & 0xFFFF) + (high >> 16)
    return high << 16 | low


_UNPACK = {"deflate": _inflate, "shuffle": _unshuffle, "fletcher32": _unfletcher}


@dataclass(frozen=True)
class Hdf5Tree:
    """What a new file is to hold: groups with attributes (text, or lists of texts), and datasets."""

    groups: Mapping[str, Mapping[str, str | list[str]]] = field(default_factory=dict)
    datasets: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Hdf5Plan:
    """A new file of `size` bytes, known before any element is read."""

    size: int
    _structure: _Sparse
    _elements: tuple[tuple[int, Tensor], ...]

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes of the file from first to last, a few MB at a time."""
        position = 0
        for offset, tensor in self._elements:
            yield from self._structure.between(position, offset)
            yield from element_bytes(tensor)
            position = offset + tensor.nbytes
        yield from self._structure.between(position, self.size)

    def write(self, out: BinaryIO) -> None:
        for chunk in self.chunks():
            out.write(chunk)


def plan_hdf5(tree: Hdf5Tree) -> Hdf5Plan:
    """Lay out a new file. The same tree gives the same bytes; datasets are contiguous."""
    structure = _Sparse()
    placed: list[tuple[int, Tensor]] = []
    with h5py.File(structure, "w", track_order=False) as file:
        for path, attributes in tree.groups.items():
            group = file.require_group(path or "/")
            for name, value in attributes.items():
                group.attrs[name] = value if isinstance(value, str) else _texts(value)
        for path, tensor in tree.datasets.items():
            offset = _create(file, path, tensor)
            if offset is not None:
                placed.append((offset, tensor))
        file.flush()
    return Hdf5Plan(structure.size, structure, tuple(sorted(placed, key=lambda item: item[0])))


def _texts(values: list[str]) -> Array:
    """A list of texts as Keras stores it: fixed-length bytes. An empty one is an empty array of floats."""
    return np.array([value.encode() for value in values]) if values else np.array([], np.float64)


def _create(file: h5py.File, path: str, tensor: Tensor) -> int | None:
    """An empty contiguous dataset whose place is settled and to which nothing is written."""
    parent, _, name = path.rpartition("/")
    group = file.require_group(parent or "/")
    created = h5p.create(h5p.DATASET_CREATE)
    created.set_obj_track_times(False)
    opaque = next((key for key, dtype in _OPAQUE.items() if dtype == tensor.dtype), None)
    space = h5s.create_simple(tensor.shape) if tensor.shape else h5s.create(h5s.SCALAR)
    if tensor.nbytes:
        created.set_layout(h5d.CONTIGUOUS)
        created.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        created.set_fill_time(h5d.FILL_TIME_NEVER)
    kind = h5t.py_create(np.dtype(f"V{tensor.dtype.itemsize}") if opaque else tensor.dtype)
    dataset = h5d.create(group.id, name.encode(), kind, space, dcpl=created)
    if opaque:
        h5py.Dataset(dataset).attrs["dtype"] = opaque
    offset = dataset.get_offset()
    return None if offset is None or not tensor.nbytes else int(offset)


class _Sparse(io.RawIOBase):
    """The file h5py writes: only the pages that were written are kept."""

    _PAGE = 4096

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._pages: dict[int, bytearray] = {}
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            page, inside = divmod(self._position + done, self._PAGE)
            part = view[done : done + self._PAGE - inside]
            self._pages.setdefault(page, bytearray(self._PAGE))[inside : inside + len(part)] = part
            done += len(part)
        self._position += done
        self.size = max(self.size, self._position)
        return done

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = b"".join(self.between(self._position, min(self.size, self._position + len(view))))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def between(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop`; what was never written is zero."""
        while start < stop:
            page, inside = divmod(start, self._PAGE)
            count = min(self._PAGE - inside, stop - start)
            kept = self._pages.get(page)
            yield bytes(kept[inside : inside + count]) if kept is not None else bytes(count)
            start += count


def element_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """The elements in C order and native byte order, as bytes."""
    for tile in tensor.tiles():
        yield memoryview(tile.view(np.uint8).data).cast("B")


def in_place(source: Hdf5Source, paths: Iterable[str]) -> bool:
    """True if the elements of all these datasets lie in the file as they are, and can be replaced byte for byte."""
    return all(source.datasets[path].verbatim for path in paths if source.tensor(path).nbytes)


def spliced(source: Hdf5Source, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of `source` with the elements of datasets that are `in_place` replaced; all else as it was."""
    _check_same(source, tensors)
    spans = {source.datasets[path].spans[0]: tensor for path, tensor in tensors.items() if tensor.nbytes}
    position = 0
    for (offset, length), tensor in sorted(spans.items(), key=lambda item: item[0]):
        yield from _copied(source.storage, position, offset)
        yield from element_bytes(tensor)
        position = offset + length
    yield from _copied(source.storage, position, source.storage.nbytes)


def fill_hdf5(source: Hdf5Source, tensors: Mapping[str, Tensor], out: BinaryIO) -> None:
    """Write a copy of `source` with the elements of some datasets replaced.

    Elements that lie in the file as they are keep their place. Packed, compact or byte-swapped ones are written by
    libhdf5, which may move them inside the file; `out` must be readable and seekable.
    """
    direct = {path: tensor for path, tensor in tensors.items() if in_place(source, [path])}
    for chunk in spliced(source, direct):
        out.write(chunk)
    others = {path: tensor for path, tensor in tensors.items() if path not in direct}
    _check_same(source, others)
    if others:
        out.flush()
        with h5py.File(out, "r+") as file:
            for path, tensor in others.items():
                _overwrite(file[path].id, tensor)


def _overwrite(dataset: h5d.DatasetID, tensor: Tensor) -> None:
    kind = dataset.get_type() if dataset.get_type().get_class() == h5t.OPAQUE else h5t.py_create(tensor.dtype)
    for ranges, part in boxes(tensor):
        space = dataset.get_space()
        if ranges:
            space.select_hyperslab(tuple(a for a, _ in ranges), part.shape)
        dataset.write(h5s.create_simple(part.shape) if ranges else space, space, part, kind)


def boxes(tensor: Tensor) -> Iterator[tuple[list[Range], Array]]:
    """The tensor as boxes of whole rows, each of about a tile; no axes, no ranges."""
    if not tensor.shape:
        yield [], tensor.read()
        return
    rows = max(1, TILE // max(1, tensor.nbytes // max(1, tensor.shape[0])))
    tail: list[Range] = [(0, n) for n in tensor.shape[1:]]
    for start in range(0, tensor.shape[0], rows):
        ranges = [(start, min(start + rows, tensor.shape[0])), *tail]
        yield ranges, np.ascontiguousarray(tensor.block(ranges))


def _check_same(source: Hdf5Source, tensors: Mapping[str, Tensor]) -> None:
    problems = []
    for path, tensor in tensors.items():
        there = source.tensor(path)
        if (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
            found, expected = (f"{t.dtype} of shape {t.shape}" for t in (tensor, there))
            problems.append(Problem(f"{source.where}: {path}", found, expected, "nothing was written"))
    raise_all(Refused, problems)


def _copied(storage: Storage, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        buffer = bytearray(min(_COPY, stop - start))
        storage.read_into(start, memoryview(buffer))
        yield bytes(buffer)
        start += len(buffer)


def _broken(place: str, found: str, expected: str = "an HDF5 file as Keras writes it") -> BadFile:
    return BadFile(Problem(place, found, expected, "the file is damaged or forged"))
