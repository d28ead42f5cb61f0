"""Zip files: members at known places, new files written in one pass, members replaced in a copy.

>>> import pathlib, tempfile
>>> from neutral.containers.files import SourceFile, new_file
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.zip"
>>> with new_file(path) as out:
...     write_zip(out, [NewMember("a/b", 3, [b"abc"], align=64)])
>>> with SourceFile(path) as file:
...     source = ZipSource(file)
...     list(source.members), source.members["a/b"].data_offset % 64, source.read("a/b", 100)
(['a/b'], 0, b'abc')

Reading is stricter than `zipfile`: every local header must agree with the central directory, nothing may overlap or
lie after the end record, names are unique. So no two readers can see two different contents in an accepted file.
The format is PKWARE's APPNOTE.TXT; the section numbers below are its own.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, NoReturn

from neutral.containers.files import Memory, Section, SourceFile
from neutral.errors import BadFile, Problem, Refused, WrongUsage
from neutral.native import Storage

STORED, DEFLATED = 0, 8

Chunk = bytes | bytearray | memoryview

_LOCAL = struct.Struct("<IHHHHHIIIHH")  # 4.3.7 local file header
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")  # 4.3.12 central directory header
_END = struct.Struct("<IHHHHIIH")  # 4.3.16 end of central directory record
_END64 = struct.Struct("<IQHHIIQQQQ")  # 4.3.14 zip64 end of central directory record
_LOCATOR = struct.Struct("<IIQI")  # 4.3.15 zip64 end of central directory locator
_LOCAL_SIGN, _CENTRAL_SIGN, _DESCRIPTOR_SIGN = 0x04034B50, 0x02014B50, 0x08074B50
_END_SIGN, _END64_SIGN, _LOCATOR_SIGN = 0x06054B50, 0x06064B50, 0x07064B50

_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_WITH_DESCRIPTOR = 0x0008
_UTF8 = 0x0800
_COMPARED_FLAGS = _ENCRYPTED | _WITH_DESCRIPTOR | _UTF8
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ZIP64_FIELD = 0x0001
_PADDING_FIELD = 0x4246  # "FB", the extra field that torch pads with; torch fills it with "Z"
_ALIGNMENT = 64
_DATE_1980 = 0x0021
_UNIX_FILE = 0o100644 << 16
_MADE_BY_UNIX = 3 << 8
_VERSION, _VERSION_ZIP64 = 20, 45

# 4.3.9 data descriptor: signature optional, sizes of 4 or 8 bytes. The longer forms come first, because a shorter one
# may be the beginning of a longer one.
_DESCRIPTORS = (
    (struct.Struct("<IIQQ"), True),
    (struct.Struct("<IIII"), True),
    (struct.Struct("<IQQ"), False),
    (struct.Struct("<III"), False),
)

_CHUNK = 4 << 20
_HEAD = 16 << 10
_IN_MEMORY = 8 << 20
_LARGEST_DIRECTORY = 64 << 20
_MOST_MEMBERS = 1 << 18
_LARGEST_RATIO = 1032  # DEFLATE's densest code: 258 bytes in two bits
_KEPT_INFLATED = 8


@dataclass(frozen=True, slots=True)
class Member:
    """One entry, as the central directory and its local header agree on it. Offsets count from the file's start."""

    name: str
    method: int
    flags: int
    size: int
    compressed_size: int
    crc: int
    header_offset: int
    data_offset: int
    end: int
    """Behind the data and the data descriptor."""
    descriptor: int
    """The data descriptor's length, 0 without one."""
    central_offset: int
    central_length: int


@dataclass(frozen=True)
class NewMember:
    """A member to write: its chunks are consumed once, and its data starts at a multiple of `align`."""

    name: str
    size: int
    chunks: Iterable[Chunk]
    align: int = 1


@dataclass(frozen=True)
class _End:
    """Where the central directory lies, and what follows it."""

    directory_offset: int
    directory_length: int
    count: int
    zip64: bytes
    """The zip64 end record with whatever it carries, or nothing."""
    comment: bytes


class ZipSource:
    """A zip file opened for reading; `members` is in the order of the central directory."""

    members: Mapping[str, Member]

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self._end = _find_end(file)
        self.members = _read_members(file, self._end)
        self._inflated: OrderedDict[str, Storage] = OrderedDict()
        self._progress: dict[str, _Progress] = {}

    @property
    def comment(self) -> bytes:
        """The archive's comment."""
        return self._end.comment

    def open(self, name: str) -> Storage:
        """A member's content. Reading it from start to end, or reading it out of order, checks its CRC."""
        member = self._member(name)
        if member.method == STORED:
            progress = self._progress.setdefault(name, _Progress())
            return _Checked(self.file, member.data_offset, member.size, self, member, progress)
        _check_ratio(self.file, member)
        return _Inflated(self, member)

    def section(self, name: str) -> Section:
        """A stored member's bytes in the file, with no check of the CRC."""
        member = self._member(name)
        if member.method != STORED:
            _refuse(self.file, f"compressed member {name!r}", "a stored one", "pack it without compression")
        return self.file.section(member.data_offset, member.size)

    def read(self, name: str, limit: int) -> bytes:
        """The whole content of a small member, its CRC checked; refused if it is larger than `limit`."""
        member = self._member(name)
        if member.size > limit:
            _refuse(self.file, f"member {name!r} of {member.size} bytes", f"at most {limit}")
        if member.method == STORED:
            data = self.file.read(member.data_offset, member.size)
            _check_crc(self.file, member, zlib.crc32(data))
            return data
        _check_ratio(self.file, member)
        return b"".join(_inflate(self.file, member))

    def verify(self, name: str) -> None:
        """Read the whole member and check its CRC."""
        member = self._member(name)
        if member.method == STORED:
            crc = 0
            for chunk in _copy(self.file, member.data_offset, member.data_offset + member.size):
                crc = zlib.crc32(chunk, crc)
            _check_crc(self.file, member, crc)
            return
        _check_ratio(self.file, member)
        for _ in _inflate(self.file, member):
            pass

    def _member(self, name: str) -> Member:
        if name not in self.members:
            _refuse(self.file, f"no member {name!r}", "one of that name")
        return self.members[name]

    def _has_content(self, member: Member) -> bool:
        return member.name in self._inflated

    def _content(self, member: Member) -> Storage:
        """A compressed member's content; the last few asked for are kept."""
        content = self._inflated.pop(member.name, None) or _keep(self.file, member)
        self._inflated[member.name] = content
        if len(self._inflated) > _KEPT_INFLATED:
            self._inflated.popitem(last=False)
        return content


@dataclass
class _Progress:
    next: int = 0
    crc: int = 0
    checked: bool = False


@dataclass(frozen=True)
class _Checked(Section):
    """A stored member whose CRC is checked on the way when it is read in order, and at once when it is not."""

    source: ZipSource
    member: Member
    progress: _Progress

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        progress = self.progress
        if progress.checked:
            return
        if offset != progress.next:
            self.source.verify(self.member.name)
            progress.checked = True
            return
        progress.crc = zlib.crc32(buffer, progress.crc)
        progress.next += buffer.nbytes
        if progress.next == self.nbytes:
            _check_crc(self.file, self.member, progress.crc)
            progress.checked = True


@dataclass(frozen=True)
class _Inflated:
    """A compressed member, inflated when more than its head is first read."""

    source: ZipSource
    member: Member

    @property
    def nbytes(self) -> int:
        return self.member.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if 0 <= offset <= offset + len(buffer) <= _HEAD < self.member.size and not self.source._has_content(
            self.member
        ):
            buffer[:] = _inflate_head(self.source.file, self.member, offset + len(buffer))[offset:]
        else:
            self.source._content(self.member).read_into(offset, buffer)


@dataclass(frozen=True)
class _Spooled:
    """Bytes in an unnamed temporary file."""

    file: IO[bytes]
    nbytes: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.nbytes:
            raise BadFile(Problem("member", f"{len(buffer)} bytes at byte {offset}", f"a part of {self.nbytes} bytes"))
        done = 0
        while done < len(buffer):
            got = os.preadv(self.file.fileno(), [buffer[done:]], offset + done)
            if got == 0:
                raise BadFile(Problem("temporary file", "its end", f"{self.nbytes} bytes"))
            done += got


def _keep(file: SourceFile, member: Member) -> Storage:
    if member.size <= _IN_MEMORY:
        return Memory(b"".join(_inflate(file, member)))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if member.size > free:
        _refuse(
            file,
            f"compressed member {member.name!r} of {member.size} bytes",
            f"at most the {free} that are free",
            "set TMPDIR to a larger disk",
        )
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the storage
    for chunk in _inflate(file, member):
        spool.write(chunk)
    spool.flush()
    return _Spooled(spool, member.size)


def _inflate(file: SourceFile, member: Member) -> Iterator[bytes]:
    """A compressed member's content, never more than its declared size, its CRC checked at the end."""
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    size, crc = 0, 0
    for chunk in _copy(file, member.data_offset, member.data_offset + member.compressed_size):
        for data in _inflate_chunk(file, member, machine, chunk):
            size += len(data)
            if size > member.size:
                _refuse(file, f"member {member.name!r} that inflates to more", f"{member.size} bytes exactly")
            crc = zlib.crc32(data, crc)
            yield data
    if size != member.size or not machine.eof or machine.unused_data:
        _refuse(
            file, f"member {member.name!r} that inflates to {size} bytes", f"{member.size}, and nothing behind them"
        )
    _check_crc(file, member, crc)


def _inflate_head(file: SourceFile, member: Member, length: int) -> bytes:
    head = b""
    for data in _inflate(file, member):
        head += data
        if len(head) >= length:
            break
    return head[:length]


def _inflate_chunk(file: SourceFile, member: Member, machine: Any, chunk: memoryview) -> Iterator[bytes]:
    waiting: bytes | memoryview = chunk
    while True:
        try:
            data = machine.decompress(waiting, _CHUNK)
        except zlib.error as error:
            _refuse(file, f"member {member.name!r} that does not inflate ({error})", "a DEFLATE stream")
        if data:
            yield data
        waiting = machine.unconsumed_tail
        if not waiting and len(data) < _CHUNK:
            return


def _check_ratio(file: SourceFile, member: Member) -> None:
    if member.size > member.compressed_size * _LARGEST_RATIO:
        _refuse(
            file,
            f"member {member.name!r} that claims {member.size} bytes in {member.compressed_size}",
            f"at most {_LARGEST_RATIO} times as many",
        )


def _check_crc(file: SourceFile, member: Member, crc: int) -> None:
    if crc != member.crc:
        _refuse(file, f"member {member.name!r} with CRC {crc:08x}", f"{member.crc:08x}", "the file is damaged")


def _refuse(file: SourceFile, found: str, expected: str, do: str = "") -> NoReturn:
    raise BadFile(Problem(str(file.path), found, expected, do))


def _copy(file: SourceFile, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a range, in pieces that are valid until the next one is taken."""
    buffer = memoryview(bytearray(min(_CHUNK, stop - start)))
    while start < stop:
        piece = buffer[: stop - start]
        file.read_into(start, piece)
        yield piece
        start += len(piece)


# Reading the directory


def _find_end(file: SourceFile) -> _End:
    reach = min(file.size, _END.size + _FULL16)
    tail = file.read(file.size - reach, reach)
    found = []
    position = tail.rfind(b"PK\x05\x06")
    while position >= 0:
        if position + _END.size <= reach:
            fields = _END.unpack_from(tail, position)
            if position + _END.size + fields[-1] == reach:
                found.append((file.size - reach + position, fields))
        position = tail.rfind(b"PK\x05\x06", 0, position)
    if len(found) != 1:
        _refuse(
            file,
            f"{len(found)} zip end records at its end" if found else "no zip end record at its end",
            "one, and nothing behind it",
        )
    ((place, (_, disk, start_disk, here, count, length, offset, comment_length)),) = found
    comment = tail[reach - comment_length :] if comment_length else b""
    zip64, directory_end = b"", place
    if place >= _LOCATOR.size and file.read(place - _LOCATOR.size, 4) == b"PK\x06\x07":
        narrow = (disk, start_disk, here, count, length, offset)
        zip64, directory_end, wide = _read_end64(file, place - _LOCATOR.size)
        limits = (_FULL16, _FULL16, _FULL16, _FULL16, _FULL32, _FULL32)
        if any(n not in (w, limit) for n, w, limit in zip(narrow, wide, limits, strict=True)):
            _refuse(file, "a zip64 end record unlike the end record", "the same numbers in both")
        disk, start_disk, here, count, length, offset = wide
    if disk or start_disk or here != count:
        _refuse(file, "a zip of several disks", "one in one piece")
    if offset + length != directory_end:
        _refuse(
            file, f"a central directory of {length} bytes at byte {offset}", f"one that ends at byte {directory_end}"
        )
    if count * _CENTRAL.size > length or count > _MOST_MEMBERS or length > _LARGEST_DIRECTORY:
        _refuse(
            file,
            f"{count} members in a central directory of {length} bytes",
            f"at most {_MOST_MEMBERS} members, {_LARGEST_DIRECTORY} bytes, and room for each",
        )
    return _End(offset, length, count, zip64, comment)


def _read_end64(file: SourceFile, locator: int) -> tuple[bytes, int, tuple[int, ...]]:
    _, disk, place, disks = _LOCATOR.unpack(file.read(locator, _LOCATOR.size))
    if disk or disks > 1:
        _refuse(file, "a zip of several disks", "one in one piece")
    if not locator - _FULL16 <= place <= locator - _END64.size:
        _refuse(file, f"a zip64 end record at byte {place}", f"one just before byte {locator}")
    record = file.read(place, locator - place)
    sign, size, _, _, *wide = _END64.unpack_from(record)
    if sign != _END64_SIGN or size + 12 != len(record):
        _refuse(file, "a broken zip64 end record", f"one of {len(record)} bytes")
    return record, place, tuple(wide)


def _read_members(file: SourceFile, end: _End) -> dict[str, Member]:
    directory = file.read(end.directory_offset, end.directory_length)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(end.count):
        member = _read_member(file, directory, position, end.directory_offset)
        if member.name in members:
            _refuse(file, f"two members {member.name!r}", "one of each name")
        members[member.name] = member
        position += member.central_length
    if position != len(directory):
        _refuse(file, f"{len(directory) - position} bytes behind the last central header", "none")
    last = 0
    for member in sorted(members.values(), key=lambda m: m.header_offset):
        if member.header_offset < last:
            _refuse(file, f"member {member.name!r} inside another", "members that do not overlap")
        last = member.end
    return members


def _read_member(file: SourceFile, directory: bytes, position: int, directory_offset: int) -> Member:
    if position + _CENTRAL.size > len(directory):
        _refuse(file, "a central directory that is cut short", "one header for each member")
    header = _CENTRAL.unpack_from(directory, position)
    sign, _, _, flags, method, _, _, crc, compressed, size, name_length, extra_length, comment_length = header[:13]
    disk, offset = header[13], header[16]
    length = _CENTRAL.size + name_length + extra_length + comment_length
    if sign != _CENTRAL_SIGN or position + length > len(directory):
        _refuse(file, f"no central header at byte {directory_offset + position}", "one for each member")
    raw_name = directory[position + _CENTRAL.size : position + _CENTRAL.size + name_length]
    name = _decode(file, raw_name, flags)
    extra = directory[position + _CENTRAL.size + name_length : position + length - comment_length]
    fields = _extra_fields(file, name, extra)
    size, compressed, offset, disk = _widen(file, name, fields, (size, compressed, offset), disk)
    if disk:
        _refuse(file, "a zip of several disks", "one in one piece")
    if flags & _ENCRYPTED:
        _refuse(file, f"encrypted member {name!r}", "a plain one")
    if method not in (STORED, DEFLATED):
        _refuse(
            file, f"member {name!r} with compression method {method}", "stored (0) or deflated (8)", "pack it again"
        )
    if method == STORED and size != compressed:
        _refuse(file, f"stored member {name!r} of {compressed} and of {size} bytes", "one size")
    if offset + _LOCAL.size + name_length + compressed > directory_offset:
        _refuse(
            file, f"member {name!r} at byte {offset} with {compressed} bytes", "one in front of the central directory"
        )
    told = (flags & _COMPARED_FLAGS, method, crc, size, compressed)
    data_offset = _check_local(file, offset, raw_name, name, told, directory_offset)
    data_end = data_offset + compressed
    if data_end > directory_offset:
        _refuse(file, f"member {name!r} that ends at byte {data_end}", "one in front of the central directory")
    descriptor = 0
    if flags & _WITH_DESCRIPTOR:
        after = file.read(data_end, min(_DESCRIPTORS[0][0].size, directory_offset - data_end))
        descriptor = _descriptor_length(after, crc, compressed, size)
        if not descriptor:
            _refuse(file, f"member {name!r} without its data descriptor", "the CRC and sizes of its central header")
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
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        _refuse(file, f"member name {raw!r}", "UTF-8")
    if not name or "\0" in name:
        _refuse(file, f"member name {name!r}", "one that is not empty and has no NUL")
    return name


def _extra_fields(file: SourceFile, name: str, extra: bytes) -> dict[int, bytes]:
    """Extra fields by their id. Fewer than four bytes at the end are padding (zipalign writes zeros there)."""
    fields: dict[int, bytes] = {}
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if position + length > len(extra) or (kind == _ZIP64_FIELD and kind in fields):
            _refuse(file, f"member {name!r} with broken extra fields", "fields that fill their room")
        fields[kind] = extra[position : position + length]
        position += length
    return fields


def _widen(
    file: SourceFile, name: str, fields: Mapping[int, bytes], narrow: tuple[int, int, int], disk: int = 0
) -> tuple[int, int, int, int]:
    """Size, compressed size, offset and disk, those that are all ones taken from the zip64 field (4.5.3)."""
    field, position, wide = fields.get(_ZIP64_FIELD, b""), 0, []
    for value in narrow:
        if value == _FULL32:
            if position + 8 > len(field):
                _refuse(file, f"member {name!r} without its zip64 sizes", "a zip64 extra field")
            (value,) = struct.unpack_from("<Q", field, position)
            position += 8
        wide.append(value)
    if disk == _FULL16 and position + 4 <= len(field):
        (disk,) = struct.unpack_from("<I", field, position)
    return wide[0], wide[1], wide[2], disk


def _check_local(
    file: SourceFile, offset: int, raw_name: bytes, name: str, told: tuple[int, ...], directory_offset: int
) -> int:
    """Compare a local header with its central one; return where the data starts.

    With a data descriptor the local CRC and sizes may be 0 (4.4.4); anything else must be what the central header says.
    """
    start = file.read(offset, _LOCAL.size + len(raw_name))
    extra_length: int
    sign, _, flags, method, _, _, crc, compressed, size, name_length, extra_length = _LOCAL.unpack_from(start)
    if sign != _LOCAL_SIGN:
        _refuse(file, f"no local header at byte {offset}", f"that of member {name!r}")
    data_offset = offset + len(start) + extra_length
    if name_length != len(raw_name) or start[_LOCAL.size :] != raw_name:
        _refuse(file, f"a local header at byte {offset} of another name", repr(name))
    if data_offset > directory_offset:
        _refuse(file, f"member {name!r} that starts at byte {data_offset}", "one in front of the central directory")
    fields = _extra_fields(file, name, file.read(offset + len(start), extra_length))
    size, compressed, _, _ = _widen(file, name, fields, (size, compressed, 0))
    here = (flags & _COMPARED_FLAGS, method, crc, size, compressed)
    open_until_descriptor = flags & _WITH_DESCRIPTOR
    for position, (local, central) in enumerate(zip(here, told, strict=True)):
        if local != central and not (open_until_descriptor and position >= 2 and local == 0):
            _refuse(file, f"member {name!r} whose local header disagrees", "what the central directory says")
    return data_offset


def _descriptor_length(after: bytes, crc: int, compressed: int, size: int) -> int:
    for layout, signed in _DESCRIPTORS:
        expected = (_DESCRIPTOR_SIGN, crc, compressed, size) if signed else (crc, compressed, size)
        if len(after) >= layout.size and layout.unpack_from(after) == expected:
            return layout.size
    return 0


# Writing


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
        if name in names or not 0 < len(name) <= _FULL16 or b"\0" in name:
            raise WrongUsage(Problem("zip member", repr(member.name), "a name of its own of at most 65535 bytes"))
        names.add(name)
        flags = 0 if name.isascii() else _UTF8
        offset = out.tell() - base
        large = member.size >= _FULL32
        version = _VERSION_ZIP64 if large or offset >= _FULL32 else _VERSION
        extra = struct.pack("<HHQQ", _ZIP64_FIELD, 16, member.size, member.size) if large else b""
        extra += _padding(offset + _LOCAL.size + len(name) + len(extra), member.align)
        size = _FULL32 if large else member.size
        out.write(
            _LOCAL.pack(_LOCAL_SIGN, version, flags, STORED, 0, _DATE_1980, 0, size, size, len(name), len(extra))
            + name
            + extra
        )
        crc = _write_chunks(out, member.name, member.size, member.chunks)
        _patch(out, base + offset + 14, struct.pack("<I", crc))
        wide = _pack_zip64((member.size, member.size, offset))
        directory += _CENTRAL.pack(
            _CENTRAL_SIGN,
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
            min(offset, _FULL32),
        )
        directory += name + wide
    start = out.tell() - base
    out.write(directory)
    out.write(_pack_end(start, len(directory), len(names), comment=comment))


def _padding(start: int, align: int) -> bytes:
    """The extra field that moves the data from `start` to a multiple of `align`; at least its own four bytes."""
    if align == 1:
        return b""
    fill = -(start + 4) % align
    return struct.pack("<HH", _PADDING_FIELD, fill) + b"Z" * fill


def _pack_zip64(values: Sequence[int], always: Sequence[bool] = ()) -> bytes:
    """The zip64 field of a central header: those values that do not fit in 32 bits, and those that were in it."""
    kept = always or (False,) * len(values)
    wide = [v for v, keep in zip(values, kept, strict=True) if v >= _FULL32 or keep]
    return struct.pack(f"<HH{len(wide)}Q", _ZIP64_FIELD, 8 * len(wide), *wide) if wide else b""


def _pack_end(offset: int, length: int, count: int, zip64: bytes = b"", comment: bytes = b"") -> bytes:
    """The end records. `zip64` is the record of the file copied: kept if there is one, its numbers renewed."""
    packed = b""
    if zip64 or offset >= _FULL32 or length >= _FULL32 or count >= _FULL16:
        record = zip64 or _END64.pack(
            _END64_SIGN, _END64.size - 12, _MADE_BY_UNIX | _VERSION_ZIP64, _VERSION_ZIP64, 0, 0, 0, 0, 0, 0
        )
        head = _END64.unpack_from(record)[:6]
        record = _END64.pack(*head, count, count, length, offset) + record[_END64.size :]
        packed = record + _LOCATOR.pack(_LOCATOR_SIGN, 0, offset + length, 1)
    few = min(count, _FULL16)
    return (
        packed
        + _END.pack(_END_SIGN, 0, 0, few, few, min(length, _FULL32), min(offset, _FULL32), len(comment))
        + comment
    )


def _write_chunks(out: BinaryIO, name: str, size: int, chunks: Iterable[Chunk]) -> int:
    crc = written = 0
    for chunk in chunks:
        data = memoryview(chunk).cast("B")
        written += data.nbytes
        if written > size:
            break
        crc = zlib.crc32(data, crc)
        out.write(data)
    if written != size:
        raise Refused(Problem(name, f"{written} bytes to write, or more", f"{size}, as announced"))
    return crc


def _patch(out: BinaryIO, place: int, data: bytes) -> None:
    here = out.tell()
    out.seek(place)
    out.write(data)
    out.seek(here)


# Replacing


def replace_members(source: ZipSource, out: BinaryIO, new: Mapping[str, tuple[int, Iterable[Chunk]]]) -> None:
    """Write a copy of the zip in which the members named have new content: name -> (size, chunks).

    Stored members of unchanged sizes leave every other byte and offset as it was, but for the CRCs. Otherwise members
    move: names, order, dates, attributes, methods, comments and extra fields stay, and torch's padding field is
    fitted so that data keeps its place modulo 64.
    """
    for name in new:
        source._member(name)
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
        _write_all(out, _copy(source.file, done, member.data_offset))
        size, chunks = new[member.name]
        crcs[member.name] = _write_chunks(out, member.name, size, chunks)
        done = member.data_offset + member.size
    _write_all(out, _copy(source.file, done, source.file.size))
    for name, crc in crcs.items():
        member, packed = source.members[name], struct.pack("<I", crc)
        (local,) = struct.unpack("<I", source.file.read(member.header_offset + 14, 4))
        if local or not member.descriptor:
            _patch(out, base + member.header_offset + 14, packed)
        if member.descriptor:
            signed = 4 if member.descriptor in (16, 24) else 0
            _patch(out, base + member.data_offset + member.size + signed, packed)
        _patch(out, base + member.central_offset + 16, packed)


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
        _write_all(out, _copy(source.file, done, member.header_offset))
        moved[member.name] = _rewrite_member(source.file, member, out, base, new.get(member.name))
        done = member.end
    _write_all(out, _copy(source.file, done, source._end.directory_offset))
    start = out.tell() - base
    for member in source.members.values():
        out.write(_rewrite_central(source.file, member, moved[member.name]))
    length = out.tell() - base - start
    out.write(_pack_end(start, length, len(moved), source._end.zip64, source._end.comment))


def _rewrite_member(
    file: SourceFile, member: Member, out: BinaryIO, base: int, new: tuple[int, Iterable[Chunk]] | None
) -> _Moved:
    offset = out.tell() - base
    head = bytearray(file.read(member.header_offset, member.data_offset - member.header_offset))
    (name_length,) = struct.unpack_from("<H", head, 26)
    extra_start = _LOCAL.size + name_length
    extra = bytes(head[extra_start:])
    size, compressed, crc = member.size, member.compressed_size, member.crc
    # DEFLATE's worst case is a little more than the data itself.
    large = new is not None and new[0] + (new[0] >> 10) + 1024 >= _FULL32
    narrow = struct.unpack_from("<II", head, 18)
    zip64 = any(value == _FULL32 for value in narrow)
    if large and not zip64 and not member.descriptor:
        extra = struct.pack("<HHQQ", _ZIP64_FIELD, 16, 0, 0) + _without(extra, _ZIP64_FIELD)
        struct.pack_into("<II", head, 18, _FULL32, _FULL32)
        narrow, zip64 = (_FULL32, _FULL32), True
    extra = _fit_padding(extra, offset + extra_start, member.data_offset)
    struct.pack_into("<H", head, 28, len(extra))
    out.write(bytes(head[:extra_start]) + extra)
    if new is None:
        _write_all(out, _copy(file, member.data_offset, member.end))
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
        crc = _write_chunks(out, member.name, size, chunks)
    compressed = out.tell() - data_start
    place = base + offset
    if not member.descriptor or any(struct.unpack_from("<III", head, 14)):
        _patch(out, place + 14, struct.pack("<I", crc))
        if zip64:
            field = place + extra_start + _field_start(extra, _ZIP64_FIELD)
            wide = [value for value, n in zip((size, compressed), (narrow[1], narrow[0]), strict=True) if n == _FULL32]
            _patch(out, field, struct.pack(f"<{len(wide)}Q", *wide))
        for at, value, n in ((18, compressed, narrow[0]), (22, size, narrow[1])):
            if n != _FULL32:
                _patch(out, place + at, struct.pack("<I", value))
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
            self.crc = zlib.crc32(data, self.crc)
            self.size += data.nbytes
            yield machine.compress(data)
        yield machine.flush()


def _pack_descriptor(length: int, crc: int, compressed: int, size: int, name: str) -> bytes:
    for layout, signed in _DESCRIPTORS:
        if layout.size == length:
            if length in (12, 16) and max(compressed, size) >= _FULL32:
                raise Refused(
                    Problem(name, f"{size} bytes", "fewer than 4 GiB", "its data descriptor has no room for more")
                )
            return layout.pack(*((_DESCRIPTOR_SIGN,) if signed else ()), crc, compressed, size)
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
    content = _field_start(extra, _PADDING_FIELD)
    if content < 0 or (start + len(extra) - was) % _ALIGNMENT == 0:
        return extra
    rest = _without(extra, _PADDING_FIELD)
    fill = (was - start - len(rest) - 4) % _ALIGNMENT
    return rest + struct.pack("<HH", _PADDING_FIELD, fill) + b"Z" * fill


def _rewrite_central(file: SourceFile, member: Member, moved: _Moved) -> bytes:
    old = file.read(member.central_offset, member.central_length)
    header = list(_CENTRAL.unpack_from(old))
    name_length, extra_length = header[10], header[11]
    name = old[_CENTRAL.size : _CENTRAL.size + name_length]
    extra = old[_CENTRAL.size + name_length : _CENTRAL.size + name_length + extra_length]
    comment = old[_CENTRAL.size + name_length + extra_length :]
    was_wide = [header[9] == _FULL32, header[8] == _FULL32, header[16] == _FULL32]
    wide = _pack_zip64((moved.size, moved.compressed, moved.offset), was_wide)
    extra = wide + _without(extra, _ZIP64_FIELD)
    if wide:
        header[2] = max(header[2], _VERSION_ZIP64)
    header[7] = moved.crc
    header[8] = _FULL32 if was_wide[1] else min(moved.compressed, _FULL32)
    header[9] = _FULL32 if was_wide[0] else min(moved.size, _FULL32)
    header[11] = len(extra)
    header[16] = _FULL32 if was_wide[2] else min(moved.offset, _FULL32)
    return _CENTRAL.pack(*header) + name + extra + comment
