"""Zip files opened for reading: members at known places, their checksums checked on the way.

>>> import pathlib, tempfile
>>> from neutral.containers.files import SourceFile, new_file
>>> from neutral.containers.zip_writing import NewMember, write_zip
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.zip"
>>> with new_file(path) as out:
...     write_zip(out, [NewMember("a/b", 3, [b"abc"], align=64)])
>>> with SourceFile(path) as file:
...     source = ZipSource(file)
...     list(source.members), source.members["a/b"].data_offset % 64, source.read("a/b", 100)
(['a/b'], 0, b'abc')

Reading is stricter than `zipfile`: see `zip_directory`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from neutral.containers.files import Memory, Section, SourceFile, pieces
from neutral.containers.zip_directory import find_end, read_members, refuse
from neutral.containers.zip_records import STORED, Member
from neutral.crc32 import crc32
from neutral.errors import BadFile, Problem
from neutral.native import TILE, Storage

_HEAD = 16 << 10
_IN_MEMORY = 8 << 20
_LARGEST_RATIO = 1032  # DEFLATE's densest code: 258 bytes in two bits
_KEPT_INFLATED = 8


class ZipSource:
    """A zip file opened for reading; `members` is in the order of the central directory."""

    members: Mapping[str, Member]

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.end = find_end(file)
        self.members = read_members(file, self.end)
        self._inflated: OrderedDict[str, Storage] = OrderedDict()
        self._progress: dict[str, _Progress] = {}

    @property
    def comment(self) -> bytes:
        """The archive's comment."""
        return self.end.comment

    def open(self, name: str) -> Storage:
        """A member's content. Reading it from start to end, or reading it out of order, checks its CRC."""
        member = self.member(name)
        if member.method == STORED:
            progress = self._progress.setdefault(name, _Progress())
            return _Checked(self.file, member.data_offset, member.size, self, member, progress)
        _check_ratio(self.file, member)
        return _Inflated(self, member)

    def section(self, name: str) -> Section:
        """A stored member's bytes in the file, with no check of the CRC."""
        member = self.member(name)
        if member.method != STORED:
            refuse(self.file, f"compressed member {name!r}", "a stored one", "pack it without compression")
        return self.file.section(member.data_offset, member.size)

    def read(self, name: str, limit: int) -> bytes:
        """The whole content of a small member, its CRC checked; refused if it is larger than `limit`."""
        member = self.member(name)
        if member.size > limit:
            refuse(self.file, f"member {name!r} of {member.size} bytes", f"at most {limit}")
        if member.method == STORED:
            data = self.file.read(member.data_offset, member.size)
            _check_crc(self.file, member, crc32(data))
            return data
        _check_ratio(self.file, member)
        return b"".join(_inflate(self.file, member))

    def verify(self, name: str) -> None:
        """Read the whole member and check its CRC."""
        member = self.member(name)
        if member.method == STORED:
            crc = 0
            for chunk in pieces(self.file, member.data_offset, member.data_offset + member.size):
                crc = crc32(chunk, crc)
            _check_crc(self.file, member, crc)
            return
        _check_ratio(self.file, member)
        for _ in _inflate(self.file, member):
            pass

    def member(self, name: str) -> Member:
        """A member by its name; refused if there is none."""
        if name not in self.members:
            refuse(self.file, f"no member {name!r}", "one of that name")
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
        progress.crc = crc32(buffer, progress.crc)
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
        refuse(
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
    for chunk in pieces(file, member.data_offset, member.data_offset + member.compressed_size):
        for data in _inflate_chunk(file, member, machine, chunk):
            size += len(data)
            if size > member.size:
                refuse(file, f"member {member.name!r} that inflates to more", f"{member.size} bytes exactly")
            crc = crc32(data, crc)
            yield data
    if size != member.size or not machine.eof or machine.unused_data:
        refuse(file, f"member {member.name!r} that inflates to {size} bytes", f"{member.size}, and nothing behind them")
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
            data = machine.decompress(waiting, TILE)
        except zlib.error as error:
            refuse(file, f"member {member.name!r} that does not inflate ({error})", "a DEFLATE stream")
        if data:
            yield data
        waiting = machine.unconsumed_tail
        if not waiting and len(data) < TILE:
            return


def _check_ratio(file: SourceFile, member: Member) -> None:
    if member.size > member.compressed_size * _LARGEST_RATIO:
        refuse(
            file,
            f"member {member.name!r} that claims {member.size} bytes in {member.compressed_size}",
            f"at most {_LARGEST_RATIO} times as many",
        )


def _check_crc(file: SourceFile, member: Member, crc: int) -> None:
    if crc != member.crc:
        refuse(file, f"member {member.name!r} with CRC {crc:08x}", f"{member.crc:08x}", "the file is damaged")
