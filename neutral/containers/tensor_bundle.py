"""TensorFlow's tensor bundle: an index of entries and the shards that hold their bytes.

>>> import tempfile, numpy
>>> from neutral.native import from_array
>>> prefix = Path(tempfile.mkdtemp()) / "model.ckpt"
>>> write_bundle(prefix, {"dense/kernel": from_array(numpy.ones((2, 3), "f4"))})
>>> with Bundle(prefix) as bundle:
...     bundle.entries["dense/kernel"].shape, float(bundle.tensor("dense/kernel").read().sum())
((2, 3), 6.0)

`<prefix>.index` is an SSTable as LevelDB has them (sorted keys, prefix compression, blocks with a CRC); its values are
protobuf messages. `<prefix>.data-0000N-of-0000M` are raw bytes. The layout is that of
tensorflow/core/util/tensor_bundle and tensorflow/core/lib/io/table.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import ml_dtypes
import numpy as np

from neutral.containers import protobuf
from neutral.containers.crc32c import Crc32c, crc32c, masked
from neutral.containers.files import Section, SourceFile, check_output
from neutral.errors import BadFile, Problem, Refused, Unsupported
from neutral.native import TILE, Array, Range, Stored, Tensor

DT_STRING = 7

_DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in {
        1: np.float32,
        2: np.float64,
        3: np.int32,
        4: np.uint8,
        5: np.int16,
        6: np.int8,
        8: np.complex64,
        9: np.int64,
        10: np.bool_,
        14: ml_dtypes.bfloat16,
        17: np.uint16,
        18: np.complex128,
        19: np.float16,
        22: np.uint32,
        23: np.uint64,
        24: ml_dtypes.float8_e5m2,
        25: ml_dtypes.float8_e4m3fn,
        26: ml_dtypes.float8_e4m3fnuz,
        27: ml_dtypes.float8_e4m3b11fnuz,
        28: ml_dtypes.float8_e5m2fnuz,
        29: ml_dtypes.int4,
        30: ml_dtypes.uint4,
    }.items()
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER = 48
_TRAILER = 5
_UNCOMPRESSED = 0
_BLOCK = 256 << 10
_RESTART_INTERVAL = 16
_VERSION = 1

# Bounds on what an index may ask of memory; the largest published checkpoints stay well below them.
_LARGEST_INDEX = 64 << 20
_MOST_ENTRIES = 100_000
_LONGEST_KEY = 1 << 16
_MOST_KEY_BYTES = 64 << 20
_MOST_SLICES = 4096
_MOST_SLICES_IN_ALL = 1 << 16
_LARGEST_STRINGS = 64 << 20
_MOST_STRINGS = 1_000_000
_MOST_AXES = 32
_MOST_ELEMENTS = 1 << 58
_MOST_SHARDS = 100_000

Extents = tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """A rectangle of a partitioned tensor; `lengths` as stored, None on an axis that the file calls whole."""

    box: Extents
    lengths: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the index. `crc` is the masked CRC-32C; `crc_at` its place in the index file, None if absent.

    A partitioned tensor has no bytes of its own: `slices` are the rectangles, each with an entry of its own.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    crc_at: int | None
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Strings:
    """A tensor of byte strings, in C order."""

    shape: tuple[int, ...]
    values: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    offset: int
    size: int


class Bundle:
    """An opened bundle: `entries` by key, each tensor checked against its CRC before its first element is given out."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._shards: list[SourceFile] = []
        try:
            with SourceFile(_index_path(prefix)) as index:
                self._where = str(index.path)
                self.index, self.blocks, raw = _read_table(index)
            self.entries: dict[str, Entry] = {}
            self._pieces: dict[bytes, Entry] = {}
            self._slices = 0
            self._read_header(raw)
            for key, (at, value) in raw.items():
                self._add(key, at, value)
            self._check_slices()
            self._check_overlaps()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards."""
        for shard in self._shards:
            shard.close()

    def tensor(self, key: str) -> Tensor:
        """The tensor of a key, unread."""
        entry = self.entries[key]
        dtype = self._dtype(key, entry)
        if not entry.slices:
            return self._stored(key, entry, dtype)
        parts = [(part.box, self._stored(key, self._pieces[piece_key(key, part)], dtype)) for part in entry.slices]
        return _Assembled(entry.shape, dtype.newbyteorder("="), parts)

    def readable(self, key: str) -> bool:
        """Whether the entry holds numbers of a dtype that numpy or ml_dtypes has."""
        return self.entries[key].dtype in _DTYPES

    def strings(self, key: str) -> Strings:
        """The values of a DT_STRING entry: varint lengths, their CRC, the bytes one after the other."""
        entry = self.entries[key]
        where = f"{self._where}: {key}"
        count = math.prod(entry.shape)
        if entry.dtype != DT_STRING:
            raise BadFile(Problem(where, f"dtype {entry.dtype}", f"DT_STRING ({DT_STRING})"))
        if entry.slices or entry.size > _LARGEST_STRINGS or count > min(entry.size, _MOST_STRINGS):
            raise BadFile(Problem(where, f"{count} strings in {entry.size} bytes", f"at most {_LARGEST_STRINGS} bytes"))
        data = memoryview(self._shards[entry.shard].read(entry.offset, entry.size))
        lengths, at = [], 0
        for _ in range(count):
            length, at = protobuf.read_varint(data, at, where)
            lengths.append(length)
        if at + 4 + sum(lengths) != len(data):
            raise BadFile(Problem(where, f"strings of {sum(lengths)} bytes", f"{len(data) - at - 4} bytes"))
        crc = Crc32c()
        crc.update(b"".join(map(_length_bytes, lengths)))
        stored = bytes(data[at : at + 4])
        _check_crc(where, crc.value(), int.from_bytes(stored, "little"))
        crc.update(stored)
        crc.update(data[at + 4 :])
        _check_crc(where, crc.value(), entry.crc)
        values, at = [], at + 4
        for length in lengths:
            values.append(bytes(data[at : at + length]))
            at += length
        return Strings(entry.shape, tuple(values))

    def stored_parts(self, key: str) -> list[tuple[Extents, Entry]]:
        """Where the bytes of a tensor lie: its rectangles and their entries; one rectangle if it is not partitioned."""
        entry = self.entries[key]
        if not entry.slices:
            return [(tuple((0, n) for n in entry.shape), entry)]
        return [(part.box, self._pieces[piece_key(key, part)]) for part in entry.slices]

    def shard(self, number: int) -> SourceFile:
        """An opened shard."""
        return self._shards[number]

    @property
    def index_path(self) -> Path:
        return _index_path(self.prefix)

    @property
    def shard_paths(self) -> list[Path]:
        return [shard.path for shard in self._shards]

    def stored_dtype(self, key: str) -> np.dtype[Any]:
        """The dtype of an entry in the byte order of the file."""
        return self._dtype(key, self.entries[key])

    def _dtype(self, key: str, entry: Entry) -> np.dtype[Any]:
        if entry.dtype not in _DTYPES:
            found = "strings" if entry.dtype == DT_STRING else f"TensorFlow dtype number {entry.dtype}"
            raise Unsupported(Problem(f"{self._where}: {key}", found, "numbers of a dtype that numpy or ml_dtypes has"))
        dtype = _DTYPES[entry.dtype]
        return dtype.newbyteorder(">") if self._big_endian else dtype

    def _stored(self, key: str, entry: Entry, dtype: np.dtype[Any]) -> Stored:
        section = self._shards[entry.shard].section(entry.offset, entry.size)
        return Stored(_Checked(section, entry.crc, f"{self._where}: {key}"), entry.shape, dtype)

    def _read_header(self, raw: dict[bytes, tuple[int, bytes]]) -> None:
        if b"" not in raw:
            raise BadFile(Problem(self._where, "no header entry", "a tensor bundle", "is it another kind of table?"))
        _, value = raw.pop(b"")
        shards, endian, needs = 0, 0, 0
        for field in protobuf.fields(value, self._where):
            if field.number == 1:
                shards = field.integer(self._where)
            elif field.number == 2:
                endian = field.integer(self._where)
            elif field.number == 3:
                for part in protobuf.fields(field.message(self._where), self._where):
                    if part.number == 2:
                        needs = part.integer(self._where)
        if not 0 < shards < _MOST_SHARDS:
            raise BadFile(Problem(self._where, f"{shards} shards", f"1 to {_MOST_SHARDS - 1}"))
        if endian not in (0, 1):
            raise BadFile(Problem(self._where, f"byte order {endian}", "0 (little) or 1 (big)"))
        if needs > _VERSION:
            raise Unsupported(Problem(self._where, f"a bundle for readers of version {needs}", f"version {_VERSION}"))
        self._big_endian = endian == 1
        for shard in range(shards):
            self._shards.append(SourceFile(shard_path(self.prefix, shard, shards)))

    def _add(self, key: bytes, at: int, value: bytes) -> None:
        name = f"{self._where}: {key.decode('utf-8', 'backslashreplace')}"
        entry = _read_entry(name, at, value)
        self._slices += len(entry.slices)
        if self._slices > _MOST_SLICES_IN_ALL:
            raise BadFile(Problem(self._where, f"over {_MOST_SLICES_IN_ALL} slices", "fewer"))
        if not entry.slices:
            if entry.shard >= len(self._shards):
                raise BadFile(Problem(name, f"shard {entry.shard}", f"one of {len(self._shards)}"))
            limit = self._shards[entry.shard].size
            if entry.offset + entry.size > limit:
                found = f"{entry.size} bytes at byte {entry.offset} of shard {entry.shard}"
                raise BadFile(Problem(name, found, f"a part of its {limit} bytes", "the file is cut short or forged"))
            if entry.dtype in _DTYPES:
                expected = math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize
                if entry.size != expected:
                    raise BadFile(
                        Problem(name, f"{entry.size} bytes for shape {list(entry.shape)}", f"{expected} bytes")
                    )
        # The key of a slice begins with an ordered-code zero, see EncodeTensorNameSlice in saved_tensor_slice_util.cc.
        if key.startswith(b"\0"):
            self._pieces[key] = entry
        else:
            self.entries[protobuf.decoded(key, self._where)] = entry

    def _check_slices(self) -> None:
        used: set[bytes] = set()
        for key, entry in self.entries.items():
            if not entry.slices:
                continue
            where = f"{self._where}: {key}"
            for part in entry.slices:
                box, piece = part.box, piece_key(key, part)
                found = self._pieces.get(piece)
                if found is None:
                    raise BadFile(Problem(where, "no entry for a slice", f"one for {list(box)}", "the file is damaged"))
                if found.slices or found.dtype != entry.dtype or found.shape != tuple(b - a for a, b in box):
                    raise BadFile(Problem(where, f"a slice of shape {list(found.shape)}", f"one that fits {list(box)}"))
                used.add(piece)
            if not _covers(entry.shape, [part.box for part in entry.slices]):
                raise BadFile(Problem(where, f"{len(entry.slices)} slices", f"slices that tile {list(entry.shape)}"))
        if orphans := self._pieces.keys() - used:
            raise BadFile(Problem(self._where, f"{len(orphans)} slices of no tensor", "slices of a listed tensor"))

    def _check_overlaps(self) -> None:
        last_end, last_shard = 0, -1
        stored = (e for e in (*self.entries.values(), *self._pieces.values()) if e.size and not e.slices)
        for entry in sorted(stored, key=lambda e: (e.shard, e.offset)):
            if entry.shard == last_shard and entry.offset < last_end:
                found = f"two tensors at byte {entry.offset} of shard {entry.shard}"
                raise BadFile(Problem(self._where, found, "tensors that lie apart", "the file is damaged or forged"))
            last_end, last_shard = entry.offset + entry.size, entry.shard


class _Checked:
    """A section of a shard whose CRC is compared before its bytes are believed."""

    def __init__(self, section: Section, crc: int, where: str) -> None:
        self._section, self._crc, self._where = section, crc, where
        self._good = False

    @property
    def nbytes(self) -> int:
        return self._section.nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self._good:
            self._section.read_into(offset, buffer)
            return
        crc = Crc32c()
        if offset == 0 and len(buffer) == self.nbytes:
            self._section.read_into(0, buffer)
            crc.update(buffer)
        else:
            for piece in _pieces(self._section, 0, self.nbytes):
                crc.update(piece)
        _check_crc(self._where, crc.value(), self._crc)
        self._good = True
        if offset != 0 or len(buffer) != self.nbytes:
            self._section.read_into(offset, buffer)


class _Assembled(Tensor):
    """A tensor that lies in several rectangles."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Sequence[tuple[Extents, Tensor]]) -> None:
        self.shape, self.dtype, self._parts = shape, dtype, parts

    def block(self, ranges: Sequence[Range]) -> Array:
        out = np.empty([b - a for a, b in ranges], self.dtype)
        for box, part in self._parts:
            common = [(max(a, low), min(b, high)) for (a, b), (low, high) in zip(ranges, box, strict=True)]
            if all(a < b for a, b in common):
                inner = [(a - low, b - low) for (a, b), (low, _) in zip(common, box, strict=True)]
                target = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, ranges, strict=True))
                out[target] = part.block(inner)
        return out


class _Window(Tensor):
    """A rectangle of a tensor."""

    def __init__(self, base: Tensor, box: Extents) -> None:
        self._base, self._box = base, box
        self.shape = tuple(b - a for a, b in box)
        self.dtype = base.dtype

    def block(self, ranges: Sequence[Range]) -> Array:
        return self._base.block([(low + a, low + b) for (a, b), (low, _) in zip(ranges, self._box, strict=True)])


def _index_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")


def shard_path(prefix: Path, shard: int, shards: int) -> Path:
    """The name of a shard's file."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")


def _pieces(section: Section | SourceFile, offset: int, length: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(TILE, length)))
    for start in range(offset, offset + length, TILE):
        piece = buffer[: min(TILE, offset + length - start)]
        section.read_into(start, piece)
        yield piece


def _length_bytes(length: int) -> bytes:
    # tensor_bundle.cc checksums a length as 32 bits where it fits, as 64 where not.
    return length.to_bytes(4 if length < 1 << 32 else 8, "little")


def _check_crc(where: str, computed: int, stored: int) -> None:
    if masked(computed) != stored:
        found = f"checksum {masked(computed):08x}"
        raise BadFile(Problem(where, found, f"{stored:08x} as stored", "the bytes are damaged; get the file again"))


def _read_table(index: SourceFile) -> tuple[bytes, list[_Block], dict[bytes, tuple[int, bytes]]]:
    """The whole index file, its data blocks, and its entries: key -> (place of the value in the file, value)."""
    where = str(index.path)
    if index.size > _LARGEST_INDEX:
        raise BadFile(Problem(where, f"an index of {index.size} bytes", f"at most {_LARGEST_INDEX}"))
    if index.size < _FOOTER:
        raise BadFile(Problem(where, f"{index.size} bytes", "a tensor bundle's index", "is it another kind of file?"))
    data = index.read(0, index.size)
    footer = memoryview(data)[-_FOOTER:]
    if footer[-len(_MAGIC) :] != _MAGIC:
        raise BadFile(Problem(where, "no table footer", "a tensor bundle's index", "is it another kind of file?"))
    meta, at = _read_handle(footer, 0, where)
    top, at = _read_handle(footer, at, where)
    if any(footer[at : -len(_MAGIC)]):
        raise BadFile(Problem(where, "bytes after the block handles", "zeros", "the file is damaged"))
    _block_entries(data, meta, where)
    blocks: list[_Block] = []
    entries: dict[bytes, tuple[int, bytes]] = {}
    last, key_bytes = None, 0
    for limit, (_, value) in _block_entries(data, top, where).items():
        block, _ = _read_handle(memoryview(value), 0, where)
        blocks.append(block)
        for key, found in _block_entries(data, block, where).items():
            if (last is not None and key <= last) or key > limit:
                raise BadFile(Problem(where, "keys out of order", "sorted keys, each once", "the file is damaged"))
            last = key
            key_bytes += len(key)
            entries[key] = found
            if len(entries) > _MOST_ENTRIES or key_bytes > _MOST_KEY_BYTES:
                raise BadFile(Problem(where, f"over {_MOST_ENTRIES} tensors or endless names", "fewer"))
    return data, blocks, entries


def _read_handle(view: memoryview, at: int, where: str) -> tuple[_Block, int]:
    offset, at = protobuf.read_varint(view, at, where)
    size, at = protobuf.read_varint(view, at, where)
    return _Block(offset, size), at


def _block_entries(data: bytes, block: _Block, where: str) -> dict[bytes, tuple[int, bytes]]:
    """The entries of one block, in order: key -> (place of the value in the file, value)."""
    stop = block.offset + block.size
    if block.size < 4 or stop + _TRAILER > len(data) - _FOOTER:
        raise BadFile(Problem(where, f"a block of {block.size} bytes at byte {block.offset}", "one inside the file"))
    view = memoryview(data)
    _check_crc(where, crc32c(view[block.offset : stop + 1]), int.from_bytes(data[stop + 1 : stop + _TRAILER], "little"))
    if data[stop] != _UNCOMPRESSED:
        found = f"a compressed block (type {data[stop]})"
        raise Unsupported(Problem(where, found, "uncompressed blocks, which TensorFlow writes", "save it again"))
    restarts = int.from_bytes(data[stop - 4 : stop], "little")
    end = stop - 4 - 4 * restarts
    if end < block.offset:
        raise BadFile(
            Problem(where, f"{restarts} restart points in {block.size} bytes", "fewer", "the file is damaged")
        )
    entries: dict[bytes, tuple[int, bytes]] = {}
    key, at, key_bytes = b"", block.offset, 0
    region = view[:end]
    while at < end:
        shared, at = protobuf.read_varint(region, at, where)
        fresh, at = protobuf.read_varint(region, at, where)
        length, at = protobuf.read_varint(region, at, where)
        if shared > len(key) or fresh + length > end - at or shared + fresh > _LONGEST_KEY:
            raise BadFile(Problem(where, "an entry that runs past its block", "one inside it", "the file is damaged"))
        key = key[:shared] + data[at : at + fresh]
        at += fresh
        key_bytes += len(key)
        if key in entries or len(entries) > _MOST_ENTRIES or key_bytes > _MOST_KEY_BYTES:
            raise BadFile(
                Problem(where, "a key that occurs twice, or endless keys", "each once", "the file is damaged")
            )
        entries[key] = (at, data[at : at + length])
        at += length
    return entries


def _read_entry(where: str, at: int, value: bytes) -> Entry:
    dtype = shard = offset = size = crc = 0
    shape: tuple[int, ...] = ()
    crc_at = None
    raw_slices: list[memoryview] = []
    for field in protobuf.fields(value, where):
        if field.number == 1:
            dtype = field.integer(where)
        elif field.number == 2:
            shape = _read_shape(field.message(where), where)
        elif field.number == 3:
            shard = field.integer(where)
        elif field.number == 4:
            offset = field.integer(where)
        elif field.number == 5:
            size = field.integer(where)
        elif field.number == 6:
            crc, crc_at = field.fixed32(where), at + field.at
        elif field.number == 7:
            raw_slices.append(field.message(where))
    if min(shard, offset, size) < 0:
        raise BadFile(Problem(where, f"shard {shard}, offset {offset}, size {size}", "no negative number"))
    if len(raw_slices) > _MOST_SLICES:
        raise BadFile(Problem(where, f"{len(raw_slices)} slices", f"at most {_MOST_SLICES}"))
    slices = tuple(_read_slice(part, shape, where) for part in raw_slices)
    return Entry(dtype, shape, shard, offset, size, crc, crc_at, slices)


def _read_shape(data: memoryview, where: str) -> tuple[int, ...]:
    sizes = []
    for field in protobuf.fields(data, where):
        if field.number == 2:
            size = 0
            for part in protobuf.fields(field.message(where), where):
                if part.number == 1:
                    size = part.integer(where)
            sizes.append(size)
        elif field.number == 3 and field.integer(where):
            raise BadFile(Problem(where, "a shape of unknown rank", "a known shape"))
    if any(n < 0 for n in sizes):
        raise BadFile(Problem(where, f"shape {sizes[:8]}", "no negative size"))
    # What numpy could not give out: a tensor of more axes, or an empty one whose other axes are beyond its counting.
    if len(sizes) > _MOST_AXES or math.prod(max(n, 1) for n in sizes) > _MOST_ELEMENTS:
        raise BadFile(Problem(where, f"shape {sizes[:8]}", f"at most {_MOST_AXES} axes and {_MOST_ELEMENTS} elements"))
    return tuple(sizes)


def _read_slice(data: memoryview, shape: tuple[int, ...], where: str) -> Slice:
    extents: list[Range] = []
    lengths: list[int | None] = []
    for field in protobuf.fields(data, where):
        if field.number != 1:
            continue
        start, length = 0, None
        for part in protobuf.fields(field.message(where), where):
            if part.number == 1:
                start = part.integer(where)
            elif part.number == 2:
                length = part.integer(where)
        axis = len(extents)
        full = shape[axis] if axis < len(shape) else -1
        stop = full if length is None else start + length
        if not (0 <= start <= stop <= full) or (length is None and start):
            raise BadFile(Problem(where, f"a slice {start}:{stop} of axis {axis}", f"one inside {list(shape)}"))
        extents.append((start, stop))
        lengths.append(length)
    if len(extents) != len(shape):
        raise BadFile(Problem(where, f"a slice of {len(extents)} axes", f"{len(shape)} axes"))
    return Slice(tuple(extents), tuple(lengths))


def _covers(shape: tuple[int, ...], slices: Sequence[Extents]) -> bool:
    """Whether the rectangles fill the shape and none overlaps another."""
    if sum(math.prod(b - a for a, b in box) for box in slices) != math.prod(shape):
        return False
    if not shape:
        return len(slices) == 1
    bounds = np.array(slices, np.int64)
    low, high = bounds[:, :, 0], bounds[:, :, 1]
    filled = [i for i, box in enumerate(slices) if all(a < b for a, b in box)]
    return not any(
        bool(np.any(np.all((low[i] < high[filled[n + 1 :]]) & (low[filled[n + 1 :]] < high[i]), axis=1)))
        for n, i in enumerate(filled)
    )


def piece_key(name: str, part: Slice) -> bytes:
    """The key of one slice of a partitioned tensor: EncodeTensorNameSlice, in the ordered code."""
    escaped = name.encode("utf-8").replace(b"\0", b"\0\xff")
    out = [b"\0", escaped, b"\0\1", _ordered_unsigned(len(part.box))]
    for (start, _), length in zip(part.box, part.lengths, strict=True):
        out += [_ordered_signed(start), _ordered_signed(-1 if length is None else length)]
    return b"".join(out)


def _ordered_unsigned(value: int) -> bytes:
    digits = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes([len(digits)]) + digits


def _ordered_signed(value: int) -> bytes:
    """OrderedCode::WriteSignedNumIncreasing: as many leading ones as bytes, sign included, then the number."""
    length = (~value if value < 0 else value).bit_length() // 7 + 1
    bits = value & ((1 << (8 * length)) - 1)
    header = ((1 << length) - 1) << (8 * length - length)
    return (bits ^ header).to_bytes(length, "big")


def write_bundle(
    prefix: Path, tensors: Mapping[str, Tensor], strings: Mapping[str, Strings] | None = None, *, force: bool = False
) -> None:
    """A new bundle of one shard, its tensors in the order of their sorted keys; the same input gives the same bytes."""
    entries: list[tuple[bytes, bytes]] = [
        (b"", protobuf.number(1, 1) + protobuf.message(3, protobuf.number(1, _VERSION)))
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
            entries.append((raw, _entry_bytes(dtype, shape, offset, size, masked(crc.value()))))
            offset += size
        _write_table(index, entries)


def _entry_bytes(dtype: int, shape: Sequence[int], offset: int, size: int, crc: int) -> bytes:
    dims = b"".join(protobuf.message(2, protobuf.number(1, n)) for n in shape)
    return (
        protobuf.number(1, dtype)
        + protobuf.message(2, dims)
        + protobuf.number(4, offset)
        + protobuf.number(5, size)
        + protobuf.fixed32(6, crc)
    )


def _write_tiles(out: BinaryIO, tensor: Tensor, dtype: np.dtype[Any], crc: Crc32c) -> None:
    for tile in tensor.tiles():
        data = tile.astype(dtype, copy=False).view(np.uint8).data
        crc.update(data)
        out.write(data)


def _write_strings(out: BinaryIO, strings: Strings, crc: Crc32c) -> int:
    crc.update(b"".join(_length_bytes(len(value)) for value in strings.values))
    checksum = masked(crc.value()).to_bytes(4, "little")
    crc.update(checksum)
    head = b"".join(protobuf.varint(len(value)) for value in strings.values) + checksum
    out.write(head)
    for value in strings.values:
        crc.update(value)
        out.write(value)
    return len(head) + sum(map(len, strings.values))


def _write_table(out: BinaryIO, entries: Sequence[tuple[bytes, bytes]]) -> None:
    """Sorted entries as an SSTable."""
    at = 0

    def put(block: bytes) -> bytes:
        nonlocal at
        typed = block + bytes([_UNCOMPRESSED])
        out.write(typed + masked(crc32c(typed)).to_bytes(4, "little"))
        handle = protobuf.varint(at) + protobuf.varint(len(block))
        at += len(block) + _TRAILER
        return handle

    top: list[tuple[bytes, bytes]] = []
    group: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in entries:
        group.append((key, value))
        size += len(key) + len(value)
        if size >= _BLOCK:
            top.append((key, put(_block_bytes(group))))
            group, size = [], 0
    if group:
        top.append((group[-1][0], put(_block_bytes(group))))
    handles = put(_block_bytes([])) + put(_block_bytes(top))
    out.write(handles.ljust(_FOOTER - len(_MAGIC), b"\0") + _MAGIC)


def _block_bytes(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    out, restarts, last = bytearray(), [0], b""
    for i, (key, value) in enumerate(entries):
        shared = _shared(last, key)
        if i % _RESTART_INTERVAL == 0:
            shared = 0
            if i:
                restarts.append(len(out))
        out += protobuf.varint(shared) + protobuf.varint(len(key) - shared) + protobuf.varint(len(value))
        out += key[shared:] + value
        last = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def _shared(a: bytes, b: bytes) -> int:
    """How many leading bytes two keys have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
                for piece in _pieces(source, at, entry.offset - at):
                    out.write(piece)
                crc = Crc32c()
                _write_tiles(out, tensor, dtype, crc)
                assert entry.crc_at is not None
                patched[entry.crc_at : entry.crc_at + 4] = masked(crc.value()).to_bytes(4, "little")
                at = entry.offset + entry.size
            for piece in _pieces(source, at, source.size - at):
                out.write(piece)
        for block in bundle.blocks:
            stop = block.offset + block.size + 1
            renewed = masked(crc32c(memoryview(patched)[block.offset : stop]))
            patched[stop : stop + 4] = renewed.to_bytes(4, "little")
        index.write(patched)


@contextlib.contextmanager
def _new_bundle(prefix: Path, shards: int, force: bool) -> Iterator[tuple[BinaryIO, list[BinaryIO]]]:
    """The files of a bundle, which take their names together when the block ends without an error, the index last.

    Without its index a bundle does not exist: a replaced one loses its old index first, so a crash in the middle
    leaves no checkpoint where a mixed one could be.
    """
    names = [_index_path(prefix), *(shard_path(prefix, i, shards) for i in range(shards))]
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
