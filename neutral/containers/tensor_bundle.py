"""TensorFlow's tensor bundle: an index of entries and the shards that hold their bytes.

>>> import tempfile, numpy
>>> from neutral.containers.tensor_bundle_writing import write_bundle
>>> from neutral.native import from_array
>>> prefix = Path(tempfile.mkdtemp()) / "model.ckpt"
>>> write_bundle(prefix, {"dense/kernel": from_array(numpy.ones((2, 3), "f4"))})
>>> with Bundle(prefix) as bundle:
...     bundle.entries["dense/kernel"].shape, float(bundle.tensor("dense/kernel").read().sum())
((2, 3), 6.0)

`<prefix>.index` is an SSTable whose values are protobuf messages. `<prefix>.data-0000N-of-0000M` are raw bytes. The
layout is that of tensorflow/core/util/tensor_bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from neutral.containers import protobuf
from neutral.containers.crc32c import Crc32c, check_masked
from neutral.containers.files import Section, SourceFile, pieces
from neutral.containers.sstable import read_table
from neutral.containers.tensor_bundle_entries import DT_STRING, DTYPES, Entry, Extents, piece_key, read_entry
from neutral.errors import BadFile, Problem, Unsupported
from neutral.native import Array, Range, Stored, Tensor

VERSION = 1
_MOST_SLICES_IN_ALL = 1 << 16
_LARGEST_STRINGS = 64 << 20
_MOST_STRINGS = 1_000_000
_MOST_SHARDS = 100_000


@dataclass(frozen=True)
class Strings:
    """A tensor of byte strings, in C order."""

    shape: tuple[int, ...]
    values: tuple[bytes, ...]


class Bundle:
    """An opened bundle: `entries` by key, each tensor checked against its CRC before its first element is given out."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._shards: list[SourceFile] = []
        try:
            with SourceFile(index_path(prefix)) as index:
                self._where = str(index.path)
                self.index, self.blocks, raw = read_table(index)
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
        return self.entries[key].dtype in DTYPES

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
        crc.update(b"".join(map(length_bytes, lengths)))
        stored = bytes(data[at : at + 4])
        check_masked(where, crc.value(), int.from_bytes(stored, "little"))
        crc.update(stored)
        crc.update(data[at + 4 :])
        check_masked(where, crc.value(), entry.crc)
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
        return index_path(self.prefix)

    @property
    def shard_paths(self) -> list[Path]:
        return [shard.path for shard in self._shards]

    def stored_dtype(self, key: str) -> np.dtype[Any]:
        """The dtype of an entry in the byte order of the file."""
        return self._dtype(key, self.entries[key])

    def _dtype(self, key: str, entry: Entry) -> np.dtype[Any]:
        if entry.dtype not in DTYPES:
            found = "strings" if entry.dtype == DT_STRING else f"TensorFlow dtype number {entry.dtype}"
            raise Unsupported(Problem(f"{self._where}: {key}", found, "numbers of a dtype that numpy or ml_dtypes has"))
        dtype = DTYPES[entry.dtype]
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
        if needs > VERSION:
            raise Unsupported(Problem(self._where, f"a bundle for readers of version {needs}", f"version {VERSION}"))
        self._big_endian = endian == 1
        for shard in range(shards):
            self._shards.append(SourceFile(shard_path(self.prefix, shard, shards)))

    def _add(self, key: bytes, at: int, value: bytes) -> None:
        name = f"{self._where}: {key.decode('utf-8', 'backslashreplace')}"
        entry = read_entry(name, at, value)
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
            if entry.dtype in DTYPES:
                expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
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
            for piece in pieces(self._section, 0, self.nbytes):
                crc.update(piece)
        check_masked(self._where, crc.value(), self._crc)
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


def index_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")


def shard_path(prefix: Path, shard: int, shards: int) -> Path:
    """The name of a shard's file."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")


def length_bytes(length: int) -> bytes:
    # tensor_bundle.cc checksums a length as 32 bits where it fits, as 64 where not.
    return length.to_bytes(4 if length < 1 << 32 else 8, "little")
