"""New zip files, written in one pass.

>>> import io
>>> out = io.BytesIO()
>>> write_zip(out, [NewMember("a", 3, [b"abc"])])
>>> import zipfile
>>> zipfile.ZipFile(out).read("a")
b'abc'
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from neutral.containers.zip_records import (
    CENTRAL,
    CENTRAL_SIGN,
    END,
    END64,
    END64_SIGN,
    END_SIGN,
    FULL16,
    FULL32,
    LOCAL,
    LOCAL_SIGN,
    LOCATOR,
    LOCATOR_SIGN,
    PADDING_FIELD,
    STORED,
    UTF8,
    VERSION,
    VERSION_ZIP64,
    ZIP64_FIELD,
)
from neutral.crc32 import crc32
from neutral.errors import Problem, Refused, WrongUsage

Chunk = bytes | bytearray | memoryview
_DATE_1980 = 0x0021
_UNIX_FILE = 0o100644 << 16
_MADE_BY_UNIX = 3 << 8


@dataclass(frozen=True)
class NewMember:
    """A member to write: its chunks are consumed once, and its data starts at a multiple of `align`."""

    name: str
    size: int
    chunks: Iterable[Chunk]
    align: int = 1


def write_zip(out: BinaryIO, members: Iterable[NewMember], comment: bytes = b"") -> None:
    """Write a zip of stored members, all dated 1980-01-01, zip64 only where needed. `out` must be seekable.

    `comment` is the archive's own, of at most 65535 bytes.

    CRCs are put into the local headers afterwards, so there are no data descriptors.
    """
    base = out.tell()
    names: set[bytes] = set()
    directory = bytearray()
    for member in members:
        name = member.name.encode("utf-8")
        if name in names or not 0 < len(name) <= FULL16 or b"\0" in name:
            raise WrongUsage(Problem("zip member", repr(member.name), "a name of its own of at most 65535 bytes"))
        names.add(name)
        flags = 0 if name.isascii() else UTF8
        offset = out.tell() - base
        large = member.size >= FULL32
        version = VERSION_ZIP64 if large or offset >= FULL32 else VERSION
        extra = struct.pack("<HHQQ", ZIP64_FIELD, 16, member.size, member.size) if large else b""
        extra += padding_field(offset + LOCAL.size + len(name) + len(extra), member.align)
        size = FULL32 if large else member.size
        out.write(
            LOCAL.pack(LOCAL_SIGN, version, flags, STORED, 0, _DATE_1980, 0, size, size, len(name), len(extra))
            + name
            + extra
        )
        crc = write_chunks(out, member.name, member.size, member.chunks)
        patch(out, base + offset + 14, struct.pack("<I", crc))
        wide = pack_zip64((member.size, member.size, offset))
        directory += CENTRAL.pack(
            CENTRAL_SIGN,
            _MADE_BY_UNIX | version,
            version,
            flags,
            STORED,
            0,
            _DATE_1980,
            crc,
            size,
            size,
            len(name),
            len(wide),
            0,
            0,
            0,
            _UNIX_FILE,
            min(offset, FULL32),
        )
        directory += name + wide
    start = out.tell() - base
    out.write(directory)
    out.write(pack_end(start, len(directory), len(names), comment=comment))


def padding_field(start: int, align: int) -> bytes:
    """The extra field that moves the data from `start` to a multiple of `align`; at least its own four bytes."""
    if align == 1:
        return b""
    fill = -(start + 4) % align
    return struct.pack("<HH", PADDING_FIELD, fill) + b"Z" * fill


def pack_zip64(values: Sequence[int], always: Sequence[bool] = ()) -> bytes:
    """The zip64 field of a central header: those values that do not fit in 32 bits, and those that were in it."""
    kept = always or (False,) * len(values)
    wide = [v for v, keep in zip(values, kept, strict=True) if v >= FULL32 or keep]
    return struct.pack(f"<HH{len(wide)}Q", ZIP64_FIELD, 8 * len(wide), *wide) if wide else b""


def pack_end(offset: int, length: int, count: int, zip64: bytes = b"", comment: bytes = b"") -> bytes:
    """The end records. `zip64` is the record of the file copied: kept if there is one, its numbers renewed."""
    packed = b""
    if zip64 or offset >= FULL32 or length >= FULL32 or count >= FULL16:
        record = zip64 or END64.pack(
            END64_SIGN, END64.size - 12, _MADE_BY_UNIX | VERSION_ZIP64, VERSION_ZIP64, 0, 0, 0, 0, 0, 0
        )
        head = END64.unpack_from(record)[:6]
        record = END64.pack(*head, count, count, length, offset) + record[END64.size :]
        packed = record + LOCATOR.pack(LOCATOR_SIGN, 0, offset + length, 1)
    few = min(count, FULL16)
    return packed + END.pack(END_SIGN, 0, 0, few, few, min(length, FULL32), min(offset, FULL32), len(comment)) + comment


def write_chunks(out: BinaryIO, name: str, size: int, chunks: Iterable[Chunk]) -> int:
    crc = written = 0
    for chunk in chunks:
        data = memoryview(chunk).cast("B")
        written += data.nbytes
        if written > size:
            break
        crc = crc32(data, crc)
        out.write(data)
    if written != size:
        raise Refused(Problem(name, f"{written} bytes to write, or more", f"{size}, as announced"))
    return crc


def patch(out: BinaryIO, place: int, data: bytes) -> None:
    here = out.tell()
    out.seek(place)
    out.write(data)
    out.seek(here)
