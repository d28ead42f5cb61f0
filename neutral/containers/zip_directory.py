"""The members of a zip file: its end records, its central directory and the local headers, which must all agree.

Nothing may overlap or lie after the end record, and names are unique. So no two readers can see two different contents
in an accepted file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NoReturn

from neutral.containers.files import SourceFile
from neutral.containers.zip_records import (
    CENTRAL,
    CENTRAL_SIGN,
    DEFLATED,
    DESCRIPTOR_SIGN,
    DESCRIPTORS,
    END,
    END64,
    END64_SIGN,
    FULL16,
    FULL32,
    LOCAL,
    LOCAL_SIGN,
    LOCATOR,
    STORED,
    UTF8,
    WITH_DESCRIPTOR,
    ZIP64_FIELD,
    End,
    Member,
)
from neutral.errors import BadFile, Problem

_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_COMPARED_FLAGS = _ENCRYPTED | WITH_DESCRIPTOR | UTF8
_LARGEST_DIRECTORY = 64 << 20
_MOST_MEMBERS = 1 << 18


def find_end(file: SourceFile) -> End:
    reach = min(file.size, END.size + FULL16)
    tail = file.read(file.size - reach, reach)
    found = []
    position = tail.rfind(b"PK\x05\x06")
    while position >= 0:
        if position + END.size <= reach:
            fields = END.unpack_from(tail, position)
            if position + END.size + fields[-1] == reach:
                found.append((file.size - reach + position, fields))
        position = tail.rfind(b"PK\x05\x06", 0, position)
    if len(found) != 1:
        refuse(
            file,
            f"{len(found)} zip end records at its end" if found else "no zip end record at its end",
            "one, and nothing behind it",
        )
    ((place, (_, disk, start_disk, here, count, length, offset, comment_length)),) = found
    comment = tail[reach - comment_length :] if comment_length else b""
    zip64, directory_end = b"", place
    if place >= LOCATOR.size and file.read(place - LOCATOR.size, 4) == b"PK\x06\x07":
        narrow = (disk, start_disk, here, count, length, offset)
        zip64, directory_end, wide = _read_end64(file, place - LOCATOR.size)
        limits = (FULL16, FULL16, FULL16, FULL16, FULL32, FULL32)
        if any(n not in (w, limit) for n, w, limit in zip(narrow, wide, limits, strict=True)):
            refuse(file, "a zip64 end record unlike the end record", "the same numbers in both")
        disk, start_disk, here, count, length, offset = wide
    if disk or start_disk or here != count:
        refuse(file, "a zip of several disks", "one in one piece")
    if offset + length != directory_end:
        refuse(
            file, f"a central directory of {length} bytes at byte {offset}", f"one that ends at byte {directory_end}"
        )
    if count * CENTRAL.size > length or count > _MOST_MEMBERS or length > _LARGEST_DIRECTORY:
        refuse(
            file,
            f"{count} members in a central directory of {length} bytes",
            f"at most {_MOST_MEMBERS} members, {_LARGEST_DIRECTORY} bytes, and room for each",
        )
    return End(offset, length, count, zip64, comment)


def _read_end64(file: SourceFile, locator: int) -> tuple[bytes, int, tuple[int, ...]]:
    _, disk, place, disks = LOCATOR.unpack(file.read(locator, LOCATOR.size))
    if disk or disks > 1:
        refuse(file, "a zip of several disks", "one in one piece")
    if not locator - FULL16 <= place <= locator - END64.size:
        refuse(file, f"a zip64 end record at byte {place}", f"one just before byte {locator}")
    record = file.read(place, locator - place)
    sign, size, _, _, *wide = END64.unpack_from(record)
    if sign != END64_SIGN or size + 12 != len(record):
        refuse(file, "a broken zip64 end record", f"one of {len(record)} bytes")
    return record, place, tuple(wide)


def read_members(file: SourceFile, end: End) -> dict[str, Member]:
    directory = file.read(end.directory_offset, end.directory_length)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(end.count):
        member = _read_member(file, directory, position, end.directory_offset)
        if member.name in members:
            refuse(file, f"two members {member.name!r}", "one of each name")
        members[member.name] = member
        position += member.central_length
    if position != len(directory):
        refuse(file, f"{len(directory) - position} bytes behind the last central header", "none")
    last = 0
    for member in sorted(members.values(), key=lambda m: m.header_offset):
        if member.header_offset < last:
            refuse(file, f"member {member.name!r} inside another", "members that do not overlap")
        last = member.end
    return members


def _read_member(file: SourceFile, directory: bytes, position: int, directory_offset: int) -> Member:
    if position + CENTRAL.size > len(directory):
        refuse(file, "a central directory that is cut short", "one header for each member")
    header = CENTRAL.unpack_from(directory, position)
    sign, _, _, flags, method, _, _, crc, compressed, size, name_length, extra_length, comment_length = header[:13]
    disk, offset = header[13], header[16]
    length = CENTRAL.size + name_length + extra_length + comment_length
    if sign != CENTRAL_SIGN or position + length > len(directory):
        refuse(file, f"no central header at byte {directory_offset + position}", "one for each member")
    raw_name = directory[position + CENTRAL.size : position + CENTRAL.size + name_length]
    name = _decode(file, raw_name, flags)
    extra = directory[position + CENTRAL.size + name_length : position + length - comment_length]
    fields = _extra_fields(file, name, extra)
    size, compressed, offset, disk = _widen(file, name, fields, (size, compressed, offset), disk)
    if disk:
        refuse(file, "a zip of several disks", "one in one piece")
    if flags & _ENCRYPTED:
        refuse(file, f"encrypted member {name!r}", "a plain one")
    if method not in (STORED, DEFLATED):
        refuse(file, f"member {name!r} with compression method {method}", "stored (0) or deflated (8)", "pack it again")
    if method == STORED and size != compressed:
        refuse(file, f"stored member {name!r} of {compressed} and of {size} bytes", "one size")
    if offset + LOCAL.size + name_length + compressed > directory_offset:
        refuse(
            file, f"member {name!r} at byte {offset} with {compressed} bytes", "one in front of the central directory"
        )
    told = (flags & _COMPARED_FLAGS, method, crc, size, compressed)
    data_offset = _check_local(file, offset, raw_name, name, told, directory_offset)
    data_end = data_offset + compressed
    if data_end > directory_offset:
        refuse(file, f"member {name!r} that ends at byte {data_end}", "one in front of the central directory")
    descriptor = 0
    if flags & WITH_DESCRIPTOR:
        after = file.read(data_end, min(DESCRIPTORS[0][0].size, directory_offset - data_end))
        descriptor = _descriptor_length(after, crc, compressed, size)
        if not descriptor:
            refuse(file, f"member {name!r} without its data descriptor", "the CRC and sizes of its central header")
    return Member(
        name,
        method,
        flags,
        size,
        compressed,
        crc,
        offset,
        data_offset,
        data_end + descriptor,
        descriptor,
        directory_offset + position,
        length,
    )


def _decode(file: SourceFile, raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & UTF8 else "cp437")
    except UnicodeDecodeError:
        refuse(file, f"member name {raw!r}", "UTF-8")
    if not name or "\0" in name:
        refuse(file, f"member name {name!r}", "one that is not empty and has no NUL")
    return name


def _extra_fields(file: SourceFile, name: str, extra: bytes) -> dict[int, bytes]:
    """Extra fields by their id. Fewer than four bytes at the end are padding (zipalign writes zeros there)."""
    fields: dict[int, bytes] = {}
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if position + length > len(extra) or (kind == ZIP64_FIELD and kind in fields):
            refuse(file, f"member {name!r} with broken extra fields", "fields that fill their room")
        fields[kind] = extra[position : position + length]
        position += length
    return fields


def _widen(
    file: SourceFile, name: str, fields: Mapping[int, bytes], narrow: tuple[int, int, int], disk: int = 0
) -> tuple[int, int, int, int]:
    """Size, compressed size, offset and disk, those that are all ones taken from the zip64 field (4.5.3)."""
    field, position, wide = fields.get(ZIP64_FIELD, b""), 0, []
    for value in narrow:
        if value == FULL32:
            if position + 8 > len(field):
                refuse(file, f"member {name!r} without its zip64 sizes", "a zip64 extra field")
            (value,) = struct.unpack_from("<Q", field, position)
            position += 8
        wide.append(value)
    if disk == FULL16 and position + 4 <= len(field):
        (disk,) = struct.unpack_from("<I", field, position)
    return wide[0], wide[1], wide[2], disk


def _check_local(
    file: SourceFile, offset: int, raw_name: bytes, name: str, told: tuple[int, ...], directory_offset: int
) -> int:
    """Compare a local header with its central one; return where the data starts.

    With a data descriptor the local CRC and sizes may be 0 (4.4.4); anything else must be what the central header says.
    """
    start = file.read(offset, LOCAL.size + len(raw_name))
    extra_length: int
    sign, _, flags, method, _, _, crc, compressed, size, name_length, extra_length = LOCAL.unpack_from(start)
    if sign != LOCAL_SIGN:
        refuse(file, f"no local header at byte {offset}", f"that of member {name!r}")
    data_offset = offset + len(start) + extra_length
    if name_length != len(raw_name) or start[LOCAL.size :] != raw_name:
        refuse(file, f"a local header at byte {offset} of another name", repr(name))
    if data_offset > directory_offset:
        refuse(file, f"member {name!r} that starts at byte {data_offset}", "one in front of the central directory")
    fields = _extra_fields(file, name, file.read(offset + len(start), extra_length))
    size, compressed, _, _ = _widen(file, name, fields, (size, compressed, 0))
    here = (flags & _COMPARED_FLAGS, method, crc, size, compressed)
    open_until_descriptor = flags & WITH_DESCRIPTOR
    for position, (local, central) in enumerate(zip(here, told, strict=True)):
        if local != central and not (open_until_descriptor and position >= 2 and local == 0):
            refuse(file, f"member {name!r} whose local header disagrees", "what the central directory says")
    return data_offset


def _descriptor_length(after: bytes, crc: int, compressed: int, size: int) -> int:
    for layout, signed in DESCRIPTORS:
        expected = (DESCRIPTOR_SIGN, crc, compressed, size) if signed else (crc, compressed, size)
        if len(after) >= layout.size and layout.unpack_from(after) == expected:
            return layout.size
    return 0


def refuse(file: SourceFile, found: str, expected: str, do: str = "") -> NoReturn:
    raise BadFile(Problem(str(file.path), found, expected, do))
