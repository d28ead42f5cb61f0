"""The protobuf wire format: fields in, fields out, nothing generated.

>>> message = text(1, "ab") + number(2, 300)
>>> [(field.number, bytes(field.data) or field.value) for field in fields(message, "example")]
[(1, b'ab'), (2, 300)]

A field is one of four wire types. What a number means is for the caller to know. No length is believed before it is
compared with the bytes that are there, and nothing recurses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from neutral.containers.files import SourceFile
from neutral.errors import BadFile, Problem

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_EMPTY = memoryview(b"")
_WINDOW = 1 << 18


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `value` of a varint or fixed field (unsigned), `data` of a length-delimited one.

    `at` is where the payload begins, counted from the start of the message.
    """

    number: int
    wire: int
    at: int
    value: int = 0
    data: memoryview = _EMPTY

    def integer(self, where: str) -> int:
        """The value of a varint, as the int32, int64, bool or enum that protobuf writes (two's complement)."""
        self._expect(VARINT, where)
        return self.value - (1 << 64) if self.value >> 63 else self.value

    def fixed32(self, where: str) -> int:
        """The value of a fixed 32-bit field, unsigned."""
        self._expect(FIXED32, where)
        return self.value

    def message(self, where: str) -> memoryview:
        """The bytes of a nested message, or of a bytes field."""
        self._expect(BYTES, where)
        return self.data

    def string(self, where: str) -> str:
        """The text of a string field."""
        return decoded(self.message(where), where)

    def _expect(self, wire: int, where: str) -> None:
        if self.wire != wire:
            raise BadFile(Problem(where, f"field {self.number} with wire type {self.wire}", f"wire type {wire}"))


def decoded(data: memoryview | bytes, where: str) -> str:
    """UTF-8 text, or `BadFile`."""
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError:
        raise BadFile(Problem(where, "text that is not UTF-8", "UTF-8")) from None


def read_varint(data: memoryview, at: int, where: str) -> tuple[int, int]:
    """A varint of at most 64 bits at `at`, and the position after it."""
    value = 0
    for i in range(_LONGEST_VARINT):
        if at + i >= len(data):
            raise _short(where)
        byte = data[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + i + 1
    raise BadFile(Problem(where, "a number of more than 64 bits", "a varint of at most 64 bits", "the file is damaged"))


def fields(data: bytes | memoryview, where: str) -> Iterator[Field]:
    """The fields of a message in the order they are stored."""
    view = memoryview(data).cast("B")
    at = 0
    while at < len(view):
        number, wire, value, at = _head(view, at, where)
        if wire == BYTES:
            if value > len(view) - at:
                raise _short(where)
            yield Field(number, wire, at, 0, view[at : at + value])
            at += value
        elif wire == VARINT:
            yield Field(number, wire, at, value)
        else:
            size = _fixed_size(wire, where)
            if size > len(view) - at:
                raise _short(where)
            yield Field(number, wire, at, int.from_bytes(view[at : at + size], "little"))
            at += size


def file_fields(file: SourceFile, start: int, stop: int, where: str) -> Iterator[tuple[int, int, int]]:
    """The length-delimited fields of a message in a file, unread: (number, offset, length). Others are passed over."""
    at = start
    while at < stop:
        head = memoryview(file.read(at, min(2 * _LONGEST_VARINT, stop - at)))
        number, wire, value, used = _head(head, 0, where)
        at += used
        if wire == BYTES:
            if value > stop - at:
                raise _short(where)
            yield number, at, value
            at += value
        elif wire != VARINT:
            at += _fixed_size(wire, where)
    if at > stop:
        raise _short(where)


class Place(NamedTuple):
    """One field of a message in a file, unread: its payload (of a varint or fixed field: `value`) from `at` to `stop`,
    its tag from `head` on."""

    number: int
    wire: int
    head: int
    at: int
    stop: int
    value: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.at

    def integer(self, where: str) -> int:
        """The value of a varint, as the int32, int64, bool or enum that protobuf writes (two's complement)."""
        return Field(self.number, self.wire, self.at, self.value).integer(where)


class FileReader:
    """Messages in a file, walked field by field through a window; what is long is never read unless asked for.

    All that it walks is counted: a file of more than `most` fields is refused.
    """

    def __init__(self, file: SourceFile, where: str, most: int) -> None:
        self.file = file
        self.where = where
        self._most = most
        self._count = 0
        self._window = _EMPTY
        self._start = 0

    def fields(self, start: int, stop: int) -> Iterator[Place]:
        """The fields of the message between two positions in the file."""
        at = start
        while at < stop:
            self._count += 1
            if self._count > self._most:
                raise BadFile(Problem(self.where, f"over {self._most} fields", "fewer", "is this a file of weights?"))
            head = at
            i = at - self._start
            window = self._window
            # Nearly all fields are short: their tag and length are a byte each.
            if 0 <= i < len(window) - 1 and at + 1 < stop and window[i] < 0x80 and window[i] & 7 == BYTES:
                number, length = window[i] >> 3, window[i + 1]
                if number and length < 0x80 and length <= stop - at - 2:
                    at += 2 + length
                    yield Place(number, BYTES, head, at - length, at)
                    continue
            view = self._view(at, min(2 * _LONGEST_VARINT, stop - at))
            number, wire, value, used = _head(view, 0, self.where)
            at += used
            if wire == VARINT:
                yield Place(number, wire, head, at, at, value)
                continue
            size = value if wire == BYTES else _fixed_size(wire, self.where)
            if size > stop - at:
                raise _short(self.where)
            fixed = 0 if wire == BYTES else int.from_bytes(self._view(at, size), "little")
            yield Place(number, wire, head, at, at + size, fixed)
            at += size

    def message(self, place: Place) -> Iterator[Place]:
        """The fields of a nested message."""
        self._expect_bytes(place)
        return self.fields(place.at, place.stop)

    def data(self, place: Place, most: int) -> bytes:
        """The bytes of a length-delimited field of at most so many."""
        self._expect_bytes(place)
        if place.length > most:
            raise BadFile(Problem(self.where, f"field {place.number} of {place.length} bytes", f"at most {most}"))
        return bytes(self._view(place.at, place.length))

    def string(self, place: Place, most: int) -> str:
        """The text of a string field of at most so many bytes."""
        return decoded(self.data(place, most), self.where)

    def integers(self, place: Place, most: int) -> list[int]:
        """What one occurrence of a repeated integer field holds: one number, or several, packed."""
        if place.wire == VARINT:
            return [place.integer(self.where)]
        data = memoryview(self.data(place, most))
        found, at = [], 0
        while at < len(data):
            value, at = read_varint(data, at, self.where)
            found.append(value - (1 << 64) if value >> 63 else value)
        self._counted(len(found))
        return found

    def floats(self, place: Place, most: int) -> list[float]:
        """What one occurrence of a repeated float field holds: one number, or several, packed."""
        if place.wire == FIXED32:
            return [float(value) for value in struct.unpack("<f", place.value.to_bytes(4, "little"))]
        data = self.data(place, most)
        if len(data) % 4:
            raise BadFile(Problem(self.where, f"floats in {len(data)} bytes", "four bytes each", "the file is damaged"))
        self._counted(len(data) // 4)
        return list(struct.unpack(f"<{len(data) // 4}f", data))

    def _counted(self, numbers: int) -> None:
        self._count += numbers

    def _expect_bytes(self, place: Place) -> None:
        if place.wire != BYTES:
            raise BadFile(
                Problem(self.where, f"field {place.number} with wire type {place.wire}", f"wire type {BYTES}")
            )

    def _view(self, at: int, length: int) -> memoryview:
        if length > _WINDOW:
            return memoryview(self.file.read(at, length))
        if not self._start <= at <= at + length <= self._start + len(self._window):
            self._window = memoryview(self.file.read(at, min(_WINDOW, self.file.size - at)))
            self._start = at
        begin = at - self._start
        if begin + length > len(self._window):
            raise _short(self.where)
        return self._window[begin : begin + length]


def _head(view: memoryview, at: int, where: str) -> tuple[int, int, int, int]:
    """Field number, wire type, the varint that follows the tag (0 if none does), and the position after both."""
    tag, at = read_varint(view, at, where)
    field_number, wire = tag >> 3, tag & 7
    if not 0 < field_number < 1 << 29:
        raise BadFile(Problem(where, f"field number {field_number}", "1 to 536870911", "the file is damaged"))
    if wire in (VARINT, BYTES):
        value, at = read_varint(view, at, where)
        return field_number, wire, value, at
    return field_number, wire, 0, at


def _fixed_size(wire: int, where: str) -> int:
    if wire == FIXED64:
        return 8
    if wire == FIXED32:
        return 4
    raise BadFile(Problem(where, f"wire type {wire}", "0, 1, 2 or 5", "the file is damaged"))


def _short(where: str) -> BadFile:
    return BadFile(Problem(where, "a field that runs past the end", "one inside the message", "the file is damaged"))


def varint(value: int) -> bytes:
    """An int of 64 bits; negative ones as two's complement, ten bytes."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """A varint field; nothing for 0, which proto3 leaves out."""
    return varint(field << 3 | VARINT) + varint(value) if value else b""


def fixed32(field: int, value: int) -> bytes:
    """A fixed 32-bit field, written for 0 too."""
    return varint(field << 3 | FIXED32) + value.to_bytes(4, "little")


def message(field: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return varint(field << 3 | BYTES) + varint(len(data)) + data


def text(field: int, value: str) -> bytes:
    """A string field."""
    return message(field, value.encode("utf-8"))
