"""The tensors of an ONNX model: where their elements lie, in which of the eight ways that TensorProto has.

Elements lie as they are in memory in `raw_data`, `float_data`, `double_data` or a file of external data, and are numbers
of protobuf, of varying length, in `int32_data`, `int64_data` and `uint64_data`. The number of elements is checked against
the bytes that are there before anything is allocated.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neutral.containers.files import Memory, SourceFile, leads_outside, pieces
from neutral.containers.protobuf import BYTES, FIXED32, FIXED64, VARINT, FileReader, Place
from neutral.errors import BadFile, Problem
from neutral.native import Array, Range, Stored, Tensor

STRING = 8

DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in {
        1: np.float32,
        2: np.uint8,
        3: np.int8,
        4: np.uint16,
        5: np.int16,
        6: np.int32,
        7: np.int64,
        9: np.bool_,
        10: np.float16,
        11: np.float64,
        12: np.uint32,
        13: np.uint64,
        14: np.complex64,
        15: np.complex128,
        16: ml_dtypes.bfloat16,
        17: ml_dtypes.float8_e4m3fn,
        18: ml_dtypes.float8_e4m3fnuz,
        19: ml_dtypes.float8_e5m2,
        20: ml_dtypes.float8_e5m2fnuz,
        24: ml_dtypes.float8_e8m0fnu,
    }.items()
}
"""The data types whose elements are whole bytes."""

CODES: dict[np.dtype[Any], int] = {dtype: code for code, dtype in DTYPES.items()}

_PACKED = {21: 4, 22: 4, 23: 4, 25: 2, 26: 2, 27: 6, 28: 6}
"""The data types whose elements are smaller, and their bits."""

_FLOAT_DATA, _INT32_DATA, _STRING_DATA, _INT64_DATA, _RAW_DATA, _DOUBLE_DATA, _UINT64_DATA = 4, 5, 6, 7, 9, 10, 11
_DATA = (_FLOAT_DATA, _INT32_DATA, _STRING_DATA, _INT64_DATA, _RAW_DATA, _DOUBLE_DATA, _UINT64_DATA)
_FIELD_OF = {
    1: _FLOAT_DATA,
    14: _FLOAT_DATA,
    7: _INT64_DATA,
    11: _DOUBLE_DATA,
    15: _DOUBLE_DATA,
    12: _UINT64_DATA,
    13: _UINT64_DATA,
}
"""The typed field of each data type; that of all others is int32_data."""

_EXTERNAL = 1
_MOST_AXES = 64
_MOST_ELEMENTS = 1 << 58
_LONGEST_NAME = 1 << 16
_LONGEST_PATH = 4096
_MOST_NUMBERS = 64 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """A message in the file: its payload from `at` to `stop`, its tag from `head` on, and the message around it."""

    head: int
    at: int
    stop: int
    parent: Span | None

    def inside(self, place: Place) -> Span:
        """The span of a nested message."""
        if place.wire != BYTES:
            raise BadFile(Problem("message", f"field {place.number} with wire type {place.wire}", "a message"))
        return Span(place.head, place.at, place.stop, self)


@dataclass(frozen=True, slots=True)
class External:
    """Where elements lie in a file of external data, and the entries of the tensor that say so."""

    data_file: DataFile
    offset: int
    length: int
    location: Span
    checksum: Span | None


@dataclass(frozen=True, slots=True)
class TensorProto:
    """One tensor. `data` is None where elements are texts or smaller than a byte; `code` is ONNX's data type.

    `span` is the message in the file. `inline` tells where in the file the elements lie as they are in memory, `external`
    where in another one; else they are the numbers in the fields `numbers`.
    """

    name: str
    code: int
    shape: tuple[int, ...]
    data: Tensor | None
    span: Span
    inline: int | None = None
    external: External | None = None
    numbers: tuple[Place, ...] = ()

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.nbytes


@dataclass(frozen=True)
class DataFile:
    """A file of external data: the location that the model names, and the file."""

    location: str
    file: SourceFile


class DataFiles:
    """The files of external data of a model in a folder, each opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, DataFile] = {}

    def __iter__(self) -> Iterator[DataFile]:
        return iter(self._opened.values())

    def open(self, location: str, where: str) -> DataFile:
        """The file at a location: a plain file below the model's folder, reached by no link."""
        if location not in self._opened:
            path = self._checked(location, where)
            file = SourceFile(path)
            if os.stat(path).st_nlink != 1:
                file.close()
                raise BadFile(_location(where, location, "a file of several names (hard links)", "a copy of its own"))
            self._opened[location] = DataFile(location, file)
        return self._opened[location]

    def _checked(self, location: str, where: str) -> Path:
        parts = location.split("/")
        if not location or "\0" in location or leads_outside(location):
            raise BadFile(_location(where, location, "a path that leads out of the model's folder", "one inside it"))
        path = self._folder
        for part in parts:
            path = path / part
            try:
                mode = os.lstat(path).st_mode
            except (OSError, ValueError) as error:
                said = getattr(error, "strerror", None) or "not a path"
                raise BadFile(
                    _location(where, location, f"no file there ({said})", "the file that was saved with it")
                ) from None
            if stat.S_ISLNK(mode):
                raise BadFile(_location(where, location, "a link", "the file itself"))
        return path

    def close(self) -> None:
        for opened in self._opened.values():
            opened.file.close()


def _location(where: str, location: str, found: str, expected: str) -> Problem:
    return Problem(f"{where}: external data {location!r}", found, expected, "put the model's files in one folder")


def read_tensor(reader: FileReader, span: Span, data_files: DataFiles) -> TensorProto:
    """The tensor of a message, its elements unread."""
    where = reader.where
    name, code, located = "", 0, 0
    sizes: list[int] = []
    data: dict[int, list[Place]] = {}
    entries: dict[str, tuple[str, Span]] = {}
    for place in reader.fields(span.at, span.stop):
        match place.number:
            case 1:
                sizes += reader.integers(place, 10 * _MOST_AXES)
            case 2:
                code = place.integer(where)
            case 3:
                raise BadFile(Problem(where, "a tensor in segments", "whole tensors", "save the model again"))
            case 8:
                name = reader.string(place, _LONGEST_NAME)
            case 13:
                key, value, at = _entry(reader, span.inside(place))
                entries[key] = (value, at)
            case 14:
                located = place.integer(where)
            case number if number in _DATA:
                data.setdefault(number, []).append(place)
    where = f"{where}: tensor {name!r}"
    shape = _shape(sizes, where)
    if code in DTYPES:
        if located == _EXTERNAL:
            return _external(name, code, shape, entries, span, data_files, where)
        return _inside(reader, name, code, shape, data, span, where)
    if code in _PACKED:
        _check_packed(math.prod(shape), _PACKED[code], data, where)
    elif code != STRING:
        raise BadFile(Problem(where, f"the data type {code}", "one that ONNX has", "the file is damaged, or too new"))
    return TensorProto(name, code, shape, None, span)


def _shape(sizes: Sequence[int], where: str) -> tuple[int, ...]:
    if len(sizes) > _MOST_AXES or any(n < 0 for n in sizes) or math.prod(n or 1 for n in sizes) >= _MOST_ELEMENTS:
        shown = ", ".join(map(str, sizes[:8]))
        raise BadFile(Problem(where, f"the shape [{shown}]", "sizes of what is there", "the file is damaged"))
    return tuple(sizes)


def _entry(reader: FileReader, span: Span) -> tuple[str, str, Span]:
    key, value, at = "", "", Span(span.at, span.at, span.at, span)
    for place in reader.fields(span.at, span.stop):
        if place.number == 1:
            key = reader.string(place, _LONGEST_PATH)
        elif place.number == 2:
            value, at = reader.string(place, _LONGEST_PATH), span.inside(place)
    return key, value, at


def _external(
    name: str,
    code: int,
    shape: tuple[int, ...],
    entries: dict[str, tuple[str, Span]],
    span: Span,
    data_files: DataFiles,
    where: str,
) -> TensorProto:
    dtype = DTYPES[code]
    wanted = math.prod(shape) * dtype.itemsize
    if "location" not in entries:
        raise BadFile(Problem(where, "external data without a location", "the name of a file", "the file is damaged"))
    location, place = entries["location"]
    data_file = data_files.open(location, where)
    size = data_file.file.size
    offset = _number(entries, "offset", 0, where)
    length = _number(entries, "length", size - offset, where)
    if offset < 0 or length < 0 or offset + length > size:
        raise BadFile(
            Problem(
                where,
                f"{length} bytes at byte {offset} of {location!r}",
                f"a part of its {size} bytes",
                "the file is cut short or forged",
            )
        )
    if length != wanted:
        raise BadFile(_miscounted(where, f"{length} bytes", dtype, shape))
    checksum = entries["checksum"][1] if "checksum" in entries else None
    external = External(data_file, offset, length, place, checksum)
    stored = Stored(data_file.file.section(offset, length), shape, dtype.newbyteorder("<"))
    return TensorProto(name, code, shape, stored, span, external=external)


def _number(entries: dict[str, tuple[str, Span]], key: str, usual: int, where: str) -> int:
    if key not in entries:
        return usual
    text = entries[key][0]
    # int() would also take spaces, underscores and digits of other scripts.
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20):
        raise BadFile(Problem(where, f"the {key} {text[:40]!r} of external data", "a number", "the file is damaged"))
    return int(text)


def _inside(
    reader: FileReader,
    name: str,
    code: int,
    shape: tuple[int, ...],
    data: dict[int, list[Place]],
    span: Span,
    where: str,
) -> TensorProto:
    dtype = DTYPES[code]
    wanted = math.prod(shape) * dtype.itemsize
    held = {number: places for number, places in data.items() if any(p.wire != BYTES or p.length for p in places)}
    if not held:
        if wanted:
            raise BadFile(_miscounted(where, "no elements", dtype, shape))
        return TensorProto(name, code, shape, Stored(Memory(b""), shape, dtype), span)
    number, places = next(iter(held.items()))
    if len(held) > 1 or number not in (_RAW_DATA, _FIELD_OF.get(code, _INT32_DATA)):
        raise BadFile(Problem(where, f"elements in field {', '.join(map(str, held))}", f"one that holds {dtype}"))
    if len(places) == 1 and places[0].wire == BYTES and number in (_RAW_DATA, _FLOAT_DATA, _DOUBLE_DATA):
        (place,) = places
        if place.length != wanted:
            raise BadFile(_miscounted(where, f"{place.length} bytes", dtype, shape))
        stored = Stored(reader.file.section(place.at, wanted), shape, dtype.newbyteorder("<"))
        return TensorProto(name, code, shape, stored, span, inline=place.at)
    if number == _RAW_DATA:
        raise BadFile(Problem(where, "raw_data twice", "once", "the file is damaged"))
    if number in (_FLOAT_DATA, _DOUBLE_DATA):
        gathered = _fixed(reader, places, 4 if number == _FLOAT_DATA else 8, where)
        if len(gathered) != wanted:
            raise BadFile(_miscounted(where, f"{len(gathered)} bytes", dtype, shape))
        stored = Stored(Memory(gathered), shape, dtype.newbyteorder("<"))
        return TensorProto(name, code, shape, stored, span, numbers=tuple(places))
    numbers = _Numbers(reader, places, dtype, where)
    if numbers.size != math.prod(shape):
        raise BadFile(_miscounted(where, f"{numbers.size} numbers", dtype, shape))
    return TensorProto(name, code, shape, numbers.split(0, shape), span, numbers=tuple(places))


def _miscounted(where: str, found: str, dtype: np.dtype[Any], shape: Sequence[int]) -> Problem:
    return Problem(
        where, found, f"{math.prod(shape)} elements of {dtype} for the shape {list(shape)}", "the file is damaged"
    )


def _check_packed(elements: int, bits: int, data: dict[int, list[Place]], where: str) -> None:
    """Elements smaller than a byte are not read, but no shape is believed that the bytes cannot hold."""
    there = sum(place.length for place in data.get(_RAW_DATA, ()))
    if _RAW_DATA in data and there != -(-elements * bits // 8):
        raise BadFile(Problem(where, f"{there} bytes", f"{elements} elements of {bits} bits", "the file is damaged"))


def _fixed(reader: FileReader, places: Sequence[Place], width: int, where: str) -> bytes:
    """Floats that are not in one piece: each in a field of its own, or in several packed ones."""
    wire = FIXED32 if width == 4 else FIXED64
    gathered = bytearray()
    for place in places:
        if place.wire == BYTES:
            gathered += reader.data(place, _MOST_NUMBERS)
        elif place.wire == wire:
            gathered += place.value.to_bytes(width, "little")
        else:
            raise BadFile(Problem(where, f"floats with wire type {place.wire}", f"wire type {wire}"))
        if len(gathered) > _MOST_NUMBERS:
            raise BadFile(Problem(where, "floats in many pieces", "in one piece", "save the model again"))
    return bytes(gathered)


class _Numbers(Tensor):
    """Elements that are varints, as one axis. `float16` and other small floats are the numbers of their bits."""

    def __init__(self, reader: FileReader, places: Sequence[Place], dtype: np.dtype[Any], where: str) -> None:
        self._file, self._places, self._where = reader.file, places, where
        self.dtype = dtype
        self.streams = True
        self._packed = all(place.wire == BYTES for place in places)
        if not self._packed and any(place.wire != VARINT for place in places):
            raise BadFile(Problem(where, "numbers of several wire types", "of one"))
        if sum(place.length for place in places) > _MOST_NUMBERS:
            raise BadFile(
                Problem(
                    where, "over 64 MB of numbers of varying length", "raw_data", "save the model again with onnx.save"
                )
            )
        self.shape = (self._count(),)

    def _count(self) -> int:
        if not self._packed:
            return len(self._places)
        count, last = 0, 0
        for place in self._places:
            for piece in pieces(self._file, place.at, place.stop):
                found = np.frombuffer(piece, np.uint8)
                count += int((found < 0x80).sum())
                last = int(found[-1])
            if last >= 0x80:
                raise BadFile(Problem(self._where, "a number that is cut off", "whole numbers", "the file is damaged"))
        return count

    def block(self, ranges: Sequence[Range]) -> Array:
        ((start, stop),) = ranges
        if not self._packed:
            found = np.array([place.value for place in self._places[start:stop]], np.uint64)
            return self._elements(found)
        parts: list[Array] = []
        first = 0
        for place in self._places:
            rest = b""
            for piece in pieces(self._file, place.at, place.stop):
                data = np.frombuffer(rest + bytes(piece), np.uint8)
                ends = np.flatnonzero(data < 0x80)
                rest = data[ends[-1] + 1 :].tobytes() if len(ends) else data.tobytes()
                low, high = max(start - first, 0), min(stop - first, len(ends))
                if low < high:
                    begin = int(ends[low - 1]) + 1 if low else 0
                    parts.append(self._elements(_varints(data[begin : ends[high - 1] + 1], self._where)))
                first += len(ends)
                if first >= stop:
                    break
            if first >= stop:
                break
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def _elements(self, numbers: Array) -> Array:
        """What 64 bits stand for: a number of the dtype, or its bits."""
        wide = numbers.astype(np.uint64).view(np.int64)
        if self.dtype.kind in "iu":
            values = numbers.view(np.uint64) if self.dtype.kind == "u" and self.dtype.itemsize == 8 else wide
            if self.dtype.itemsize < 8:
                limits = np.iinfo(self.dtype)
                if len(wide) and (wide.min() < limits.min or wide.max() > limits.max):
                    raise BadFile(
                        Problem(self._where, f"a number outside {self.dtype}", "one inside", "the file is damaged")
                    )
            return values.astype(self.dtype)
        bits = {1: np.uint8, 2: np.uint16}[self.dtype.itemsize]
        if len(wide) and (wide.min() < 0 or wide.max() > np.iinfo(bits).max):
            raise BadFile(Problem(self._where, f"a number outside {self.dtype}", "its bits", "the file is damaged"))
        if self.dtype.kind == "b":
            return wide != 0
        return wide.astype(bits).view(self.dtype)


def _varints(data: Array, where: str) -> Array:
    """Whole varints as unsigned numbers of 64 bits."""
    ends = np.flatnonzero(data < 0x80)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if int(lengths.max()) > 10 or np.any(data[ends[lengths == 10]] > 1):
        raise BadFile(Problem(where, "a number of more than 64 bits", "at most 64 bits", "the file is damaged"))
    numbers = np.zeros(len(ends), np.uint64)
    for i in range(int(lengths.max())):
        longer = lengths > i
        numbers[longer] |= (data[starts[longer] + i].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * i)
    return numbers


def check_overlaps(where: str, tensors: Iterable[TensorProto]) -> None:
    """Refuse external data that share some bytes and not all: so small files would hold tensors without end."""
    parts = {
        (t.external.data_file.location, t.external.offset, t.external.length)
        for t in tensors
        if t.external is not None and t.external.length
    }
    before = ("", 0, 0)
    for part in sorted(parts):
        if part[0] == before[0] and part[1] < before[1] + before[2]:
            raise BadFile(
                Problem(
                    f"{where}: external data {part[0]!r}", f"tensors that overlap at byte {part[1]}", "none that do"
                )
            )
        before = part
