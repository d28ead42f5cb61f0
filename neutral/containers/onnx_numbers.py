"""Elements of ONNX tensors that do not lie in a file as they do in memory: varints, and floats in pieces.

>>> _varints(np.array([1, 0xAC, 0x02], np.uint8), "example").tolist()
[1, 300]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neutral.containers.files import pieces
from neutral.containers.protobuf import BYTES, FIXED32, FIXED64, VARINT, FileReader, Place
from neutral.errors import BadFile, Problem
from neutral.native import Array, Range, Tensor

_MOST_BYTES = 64 << 20


def gathered_floats(reader: FileReader, places: Sequence[Place], width: int, where: str) -> bytes:
    """Floats that are not in one piece: each in a field of its own, or in several packed ones."""
    wire = FIXED32 if width == 4 else FIXED64
    gathered = bytearray()
    for place in places:
        if place.wire == BYTES:
            gathered += reader.data(place, _MOST_BYTES)
        elif place.wire == wire:
            gathered += place.value.to_bytes(width, "little")
        else:
            raise BadFile(Problem(where, f"floats with wire type {place.wire}", f"wire type {wire}"))
        if len(gathered) > _MOST_BYTES:
            raise BadFile(Problem(where, "floats in many pieces", "in one piece", "save the model again"))
    return bytes(gathered)


class Numbers(Tensor):
    """Elements that are varints, as one axis. `float16` and other small floats are the numbers of their bits."""

    def __init__(self, reader: FileReader, places: Sequence[Place], dtype: np.dtype[Any], where: str) -> None:
        self._file, self._places, self._where = reader.file, places, where
        self.dtype = dtype
        self.streams = True
        self._packed = all(place.wire == BYTES for place in places)
        if not self._packed and any(place.wire != VARINT for place in places):
            raise BadFile(Problem(where, "numbers of several wire types", "of one"))
        if sum(place.length for place in places) > _MOST_BYTES:
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
                bits = 8 * self.dtype.itemsize - (self.dtype.kind == "i")
                low = -(1 << bits) if self.dtype.kind == "i" else 0
                if len(wide) and not low <= int(wide.min()) <= int(wide.max()) < 1 << bits:
                    raise BadFile(
                        Problem(self._where, f"a number outside {self.dtype}", "one inside", "the file is damaged")
                    )
            return values.astype(self.dtype)
        same = np.dtype(f"u{self.dtype.itemsize}")
        if len(wide) and not 0 <= int(wide.min()) <= int(wide.max()) < 1 << (8 * same.itemsize):
            raise BadFile(Problem(self._where, f"a number outside {self.dtype}", "its bits", "the file is damaged"))
        if self.dtype.kind == "b":
            true: Array = wide != 0
            return true
        bare: Array = wide.astype(same).view(self.dtype)
        return bare


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
