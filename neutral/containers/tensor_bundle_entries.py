"""The entries of a tensor bundle's index: the protobuf messages, and the keys of slices.

>>> read_entry("here", 0, entry_bytes(1, (2, 3), 0, 24, 7)).shape
(2, 3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from neutral.containers import protobuf
from neutral.errors import BadFile, Problem
from neutral.native import Range

DT_STRING = 7

DTYPES: dict[int, np.dtype[Any]] = {
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
_MOST_SLICES = 4096
_MOST_AXES = 32
_MOST_ELEMENTS = 1 << 58

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


def read_entry(where: str, at: int, value: bytes) -> Entry:
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


def entry_bytes(dtype: int, shape: Sequence[int], offset: int, size: int, crc: int) -> bytes:
    dims = b"".join(protobuf.message(2, protobuf.number(1, n)) for n in shape)
    return (
        protobuf.number(1, dtype)
        + protobuf.message(2, dims)
        + protobuf.number(4, offset)
        + protobuf.number(5, size)
        + protobuf.fixed32(6, crc)
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
