"""The tensors of an ONNX model: where their elements lie, in which of the eight ways that TensorProto has.

Elements lie as they are in memory in `raw_data`, `float_data`, `double_data` or a file of external data, and are numbers
of protobuf, of varying length, in `int32_data`, `int64_data` and `uint64_data`. The number of elements is checked against
the bytes that are there before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from neutral.containers.files import Memory
from neutral.containers.onnx_data_files import DataFile, DataFiles
from neutral.containers.onnx_numbers import Numbers, gathered_floats
from neutral.containers.protobuf import BYTES, FileReader, Place
from neutral.errors import BadFile, Problem
from neutral.native import Stored, Tensor

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
    if code not in DTYPES and code not in _PACKED and code != STRING:
        raise BadFile(Problem(where, f"the data type {code}", "one that ONNX has", "the file is damaged, or too new"))
    if located == _EXTERNAL and code != STRING:
        return _external(name, code, shape, entries, span, data_files, where)
    if code in DTYPES:
        return _inside(reader, name, code, shape, data, span, where)
    if code in _PACKED:
        _check_packed(math.prod(shape), _PACKED[code], data, where)
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
    bits = _PACKED[code] if code in _PACKED else 8 * DTYPES[code].itemsize
    wanted = -(-math.prod(shape) * bits // 8)
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
        raise BadFile(_miscounted(where, f"{length} bytes", f"{bits} bits", shape))
    checksum = entries["checksum"][1] if "checksum" in entries else None
    external = External(data_file, offset, length, place, checksum)
    section = data_file.file.section(offset, length)
    stored = Stored(section, shape, DTYPES[code].newbyteorder("<")) if code in DTYPES else None
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
        gathered = gathered_floats(reader, places, 4 if number == _FLOAT_DATA else 8, where)
        if len(gathered) != wanted:
            raise BadFile(_miscounted(where, f"{len(gathered)} bytes", dtype, shape))
        stored = Stored(Memory(gathered), shape, dtype.newbyteorder("<"))
        return TensorProto(name, code, shape, stored, span, numbers=tuple(places))
    numbers = Numbers(reader, places, dtype, where)
    if numbers.size != math.prod(shape):
        raise BadFile(_miscounted(where, f"{numbers.size} numbers", dtype, shape))
    return TensorProto(name, code, shape, numbers.split(0, shape), span, numbers=tuple(places))


def _miscounted(where: str, found: str, dtype: object, shape: Sequence[int]) -> Problem:
    return Problem(
        where, found, f"{math.prod(shape)} elements of {dtype} for the shape {list(shape)}", "the file is damaged"
    )


def _check_packed(elements: int, bits: int, data: dict[int, list[Place]], where: str) -> None:
    """Elements smaller than a byte are not read, but no shape is believed that the bytes cannot hold."""
    there = sum(place.length for place in data.get(_RAW_DATA, ()))
    if _RAW_DATA in data and there != -(-elements * bits // 8):
        raise BadFile(Problem(where, f"{there} bytes", f"{elements} elements of {bits} bits", "the file is damaged"))


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
