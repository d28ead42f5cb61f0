"""A folder of files as one source: names inside it, read from any position, none of them leading outside.

>>> import pathlib, tempfile
>>> path = pathlib.Path(tempfile.mkdtemp())
>>> _ = (path / "a").write_bytes(b"abc")
>>> folder = Folder(path)
>>> folder.read("a", 10), folder.get("b")
(b'abc', None)
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NoReturn

from neutral.containers.files import SourceFile, leads_outside, pieces
from neutral.errors import BadFile, Problem
from neutral.native import Storage

_KEPT_OPEN = 64
_MOST_FILES = 1 << 20


class Folder:
    """Opens files when they are read, and keeps the last few open. Links, pipes and names that lead out are refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: OrderedDict[str, SourceFile] = OrderedDict()
        self._plain: set[str] = set()
        self._lock = Lock()

    def get(self, name: str) -> Storage | None:
        """A file's bytes, unread; None if there is no such file."""
        size = self.size(name)
        return None if size is None else FilePart(self, name, 0, size)

    def part(self, name: str, offset: int, length: int) -> Storage:
        """A part of a file, unread; refused if the file is not there or is shorter."""
        size = self.size(name)
        if size is None:
            self._refuse(name, "no such file", "it in its place")
        if offset + length > size:
            self._refuse(name, f"a part of {length} bytes at byte {offset}", f"one inside its {size} bytes")
        return FilePart(self, name, offset, length)

    def read(self, name: str, limit: int) -> bytes:
        """A whole small file."""
        size = self.size(name)
        if size is None or size > limit:
            self._refuse(name, "no such file" if size is None else f"{size} bytes", f"a file of at most {limit} bytes")
        return self.file(name).read(0, size)

    def size(self, name: str) -> int | None:
        """A file's size in bytes, None if there is no such file; links and what is no plain file are refused."""
        if leads_outside(name) or "\0" in name or not name:
            self._refuse(name, "a name that leads elsewhere", "the name of a file in the folder")
        above = name.rpartition("/")[0]
        if above and above not in self._plain:
            parts = above.split("/")
            for i in range(1, len(parts) + 1):
                mode = self._mode("/".join(parts[:i]))
                if mode is None:
                    return None
                if not stat.S_ISDIR(mode):
                    self._refuse("/".join(parts[:i]), _what(mode), "a folder")
            self._plain.add(above)
        info = self._stat(name)
        if info is None:
            return None
        if not stat.S_ISREG(info.st_mode):
            self._refuse(name, _what(info.st_mode), "a plain file")
        return info.st_size

    def file(self, name: str) -> SourceFile:
        """An opened file; whoever holds it keeps it open."""
        with self._lock:
            file = self._open.pop(name, None) or SourceFile(self.path / name)
            self._open[name] = file
            if len(self._open) > _KEPT_OPEN:
                self._open.popitem(last=False)
            return file

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _mode(self, name: str) -> int | None:
        info = self._stat(name)
        return None if info is None else info.st_mode

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            return os.lstat(self.path / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._refuse(name, f"a name that cannot be looked up ({error.strerror})", "a file")

    def _refuse(self, name: str, found: str, expected: str) -> NoReturn:
        raise BadFile(Problem(f"{self.path}: {name}", found, expected))


@dataclass(frozen=True)
class FilePart:
    """A part of a file of a folder, as a `Storage`."""

    folder: Folder
    name: str
    offset: int
    nbytes: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.nbytes:
            where = f"{self.folder.path}: {self.name}"
            raise BadFile(Problem(where, f"{len(buffer)} bytes at byte {offset}", f"a part of {self.nbytes} bytes"))
        self.folder.file(self.name).read_into(self.offset + offset, buffer)


def _what(mode: int) -> str:
    return (
        "a link"
        if stat.S_ISLNK(mode)
        else "a folder"
        if stat.S_ISDIR(mode)
        else "a file"
        if stat.S_ISREG(mode)
        else "a pipe or device"
    )


def walk(path: Path) -> Iterator[tuple[str, bool]]:
    """Everything below a folder, sorted: (name, whether it is a folder). Links, pipes and devices are refused."""
    waiting, count = [""], 0
    while waiting:
        above = waiting.pop()
        for entry in sorted(os.scandir(path / above), key=lambda entry: entry.name):
            name = f"{above}/{entry.name}" if above else entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            count += 1
            if count > _MOST_FILES or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                found = _what(mode) if count <= _MOST_FILES else f"over {_MOST_FILES} files"
                raise BadFile(Problem(f"{path}: {name}", found, "plain files and folders", "name the folder itself"))
            yield name, stat.S_ISDIR(mode)
            if stat.S_ISDIR(mode):
                waiting.append(name)


def copy_file(source: Path, target: Path) -> None:
    """A file's bytes under a name that is free."""
    with SourceFile(source) as file, target.open("xb") as out:
        for piece in pieces(file, 0, file.size):
            out.write(piece)
