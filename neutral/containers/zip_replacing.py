"""Members of a zip file replaced in a copy of it: in their places where they fit, else moved."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from neutral.containers.files import SourceFile, pieces
from neutral.containers.zip import ZipSource
from neutral.containers.zip_records import (
    CENTRAL,
    DEFLATED,
    DESCRIPTOR_SIGN,
    DESCRIPTORS,
    FULL32,
    LOCAL,
    PADDING_FIELD,
    STORED,
    VERSION_ZIP64,
    ZIP64_FIELD,
    Member,
)
from neutral.containers.zip_writing import Chunk, pack_end, pack_zip64, patch, write_chunks
from neutral.crc32 import crc32
from neutral.errors import Problem, Refused

_ALIGNMENT = 64


def replace_members(source: ZipSource, out: BinaryIO, new: Mapping[str, tuple[int, Iterable[Chunk]]]) -> None:
    """Write a copy of the zip in which the members named have new content: name -> (size, chunks).

    Stored members of unchanged sizes leave every other byte and offset as it was, but for the CRCs. Otherwise members
    move: names, order, dates, attributes, methods, comments and extra fields stay, and torch's padding field is
    fitted so that data keeps its place modulo 64.
    """
    for name in new:
        source.member(name)
    in_place = all(
        source.members[name].method == STORED and source.members[name].size == size for name, (size, _) in new.items()
    )
    if in_place:
        _splice(source, out, new)
    else:
        _rewrite(source, out, new)


def _splice(source: ZipSource, out: BinaryIO, new: Mapping[str, tuple[int, Iterable[Chunk]]]) -> None:
    base, done, crcs = out.tell(), 0, {}
    for member in sorted((source.members[name] for name in new), key=lambda m: m.header_offset):
        _write_all(out, pieces(source.file, done, member.data_offset))
        size, chunks = new[member.name]
        crcs[member.name] = write_chunks(out, member.name, size, chunks)
        done = member.data_offset + member.size
    _write_all(out, pieces(source.file, done, source.file.size))
    for name, crc in crcs.items():
        member, packed = source.members[name], struct.pack("<I", crc)
        (local,) = struct.unpack("<I", source.file.read(member.header_offset + 14, 4))
        if local or not member.descriptor:
            patch(out, base + member.header_offset + 14, packed)
        if member.descriptor:
            signed = 4 if member.descriptor in (16, 24) else 0
            patch(out, base + member.data_offset + member.size + signed, packed)
        patch(out, base + member.central_offset + 16, packed)


def _write_all(out: BinaryIO, chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        out.write(chunk)


@dataclass(frozen=True)
class _Moved:
    offset: int
    crc: int
    size: int
    compressed: int


def _rewrite(source: ZipSource, out: BinaryIO, new: Mapping[str, tuple[int, Iterable[Chunk]]]) -> None:
    base, done, moved = out.tell(), 0, {}
    for member in sorted(source.members.values(), key=lambda m: m.header_offset):
        _write_all(out, pieces(source.file, done, member.header_offset))
        moved[member.name] = _rewrite_member(source.file, member, out, base, new.get(member.name))
        done = member.end
    _write_all(out, pieces(source.file, done, source.end.directory_offset))
    start = out.tell() - base
    for member in source.members.values():
        out.write(_rewrite_central(source.file, member, moved[member.name]))
    length = out.tell() - base - start
    out.write(pack_end(start, length, len(moved), source.end.zip64, source.end.comment))


def _rewrite_member(
    file: SourceFile, member: Member, out: BinaryIO, base: int, new: tuple[int, Iterable[Chunk]] | None
) -> _Moved:
    offset = out.tell() - base
    head = bytearray(file.read(member.header_offset, member.data_offset - member.header_offset))
    (name_length,) = struct.unpack_from("<H", head, 26)
    extra_start = LOCAL.size + name_length
    extra = bytes(head[extra_start:])
    size, compressed, crc = member.size, member.compressed_size, member.crc
    # DEFLATE's worst case is a little more than the data itself.
    large = new is not None and new[0] + (new[0] >> 10) + 1024 >= FULL32
    narrow = struct.unpack_from("<II", head, 18)
    zip64 = any(value == FULL32 for value in narrow)
    if large and not zip64 and not member.descriptor:
        extra = struct.pack("<HHQQ", ZIP64_FIELD, 16, 0, 0) + _without(extra, ZIP64_FIELD)
        struct.pack_into("<II", head, 18, FULL32, FULL32)
        narrow, zip64 = (FULL32, FULL32), True
    extra = _fit_padding(extra, offset + extra_start, member.data_offset)
    struct.pack_into("<H", head, 28, len(extra))
    out.write(bytes(head[:extra_start]) + extra)
    if new is None:
        _write_all(out, pieces(file, member.data_offset, member.end))
        return _Moved(offset, crc, size, compressed)
    data_start = out.tell()
    size, chunks = new
    if member.method == DEFLATED:
        state = _Deflated()
        _write_all(out, state.stream(chunks))
        crc = state.crc
        if state.size != size:
            raise Refused(Problem(member.name, f"{state.size} bytes to write", f"{size}, as announced"))
    else:
        crc = write_chunks(out, member.name, size, chunks)
    compressed = out.tell() - data_start
    place = base + offset
    if not member.descriptor or any(struct.unpack_from("<III", head, 14)):
        patch(out, place + 14, struct.pack("<I", crc))
        if zip64:
            field = place + extra_start + _field_start(extra, ZIP64_FIELD)
            wide = [value for value, n in zip((size, compressed), (narrow[1], narrow[0]), strict=True) if n == FULL32]
            patch(out, field, struct.pack(f"<{len(wide)}Q", *wide))
        for at, value, n in ((18, compressed, narrow[0]), (22, size, narrow[1])):
            if n != FULL32:
                patch(out, place + at, struct.pack("<I", value))
    if member.descriptor:
        out.write(_pack_descriptor(member.descriptor, crc, compressed, size, member.name))
    return _Moved(offset, crc, size, compressed)


class _Deflated:
    """A stream through DEFLATE that keeps count of what went in."""

    def __init__(self) -> None:
        self.crc = self.size = 0

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[bytes]:
        machine = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS)
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            self.crc = crc32(data, self.crc)
            self.size += data.nbytes
            yield machine.compress(data)
        yield machine.flush()


def _pack_descriptor(length: int, crc: int, compressed: int, size: int, name: str) -> bytes:
    for layout, signed in DESCRIPTORS:
        if layout.size == length:
            if length in (12, 16) and max(compressed, size) >= FULL32:
                raise Refused(
                    Problem(name, f"{size} bytes", "fewer than 4 GiB", "its data descriptor has no room for more")
                )
            return layout.pack(*((DESCRIPTOR_SIGN,) if signed else ()), crc, compressed, size)
    raise AssertionError(length)


def _without(extra: bytes, kind: int) -> bytes:
    start = _field_start(extra, kind)
    if start < 0:
        return extra
    (length,) = struct.unpack_from("<H", extra, start - 2)
    return extra[: start - 4] + extra[start + length :]


def _field_start(extra: bytes, kind: int) -> int:
    """Where the content of an extra field begins, or -1."""
    position = 0
    while position + 4 <= len(extra):
        here, length = struct.unpack_from("<HH", extra, position)
        if here == kind:
            return position + 4
        position += 4 + length
    return -1


def _fit_padding(extra: bytes, start: int, was: int) -> bytes:
    """Local extra fields with torch's padding fitted: data that was at `was` stays at the same place modulo 64."""
    content = _field_start(extra, PADDING_FIELD)
    if content < 0 or (start + len(extra) - was) % _ALIGNMENT == 0:
        return extra
    rest = _without(extra, PADDING_FIELD)
    fill = (was - start - len(rest) - 4) % _ALIGNMENT
    return rest + struct.pack("<HH", PADDING_FIELD, fill) + b"Z" * fill


def _rewrite_central(file: SourceFile, member: Member, moved: _Moved) -> bytes:
    old = file.read(member.central_offset, member.central_length)
    header = list(CENTRAL.unpack_from(old))
    name_length, extra_length = header[10], header[11]
    name = old[CENTRAL.size : CENTRAL.size + name_length]
    extra = old[CENTRAL.size + name_length : CENTRAL.size + name_length + extra_length]
    comment = old[CENTRAL.size + name_length + extra_length :]
    was_wide = [header[9] == FULL32, header[8] == FULL32, header[16] == FULL32]
    wide = pack_zip64((moved.size, moved.compressed, moved.offset), was_wide)
    extra = wide + _without(extra, ZIP64_FIELD)
    if wide:
        header[2] = max(header[2], VERSION_ZIP64)
    header[7] = moved.crc
    header[8] = FULL32 if was_wide[1] else min(moved.compressed, FULL32)
    header[9] = FULL32 if was_wide[0] else min(moved.size, FULL32)
    header[11] = len(extra)
    header[16] = FULL32 if was_wide[2] else min(moved.offset, FULL32)
    return CENTRAL.pack(*header) + name + extra + comment
