"""Files as bytes: reading from any position, and replacing a file in one step or not at all.

>>> import tempfile, pathlib
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.bin"
>>> with new_file(path) as out:
...     _ = out.write(b"abc")
>>> with SourceFile(path) as source:
...     source.read(1, 2)
b'bc'
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from neutral.errors import BadFile, Problem, Refused
from neutral.native import TILE, Storage


class SourceFile:
    """A regular file, opened for reading at any position. Never mapped: a file that shrinks is an error, not SIGBUS."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = -1
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise BadFile(
                Problem(str(path), f"a file that cannot be opened ({error.strerror})", "a readable file")
            ) from None
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            what = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or device"
            raise BadFile(Problem(str(path), what, "a regular file"))
        self._fd = fd
        self.size = info.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        done = 0
        while done < len(buffer):
            got = os.preadv(self._fd, [buffer[done:]], offset + done)
            if got == 0:
                raise BadFile(
                    Problem(
                        str(self.path),
                        f"the end of the file at byte {offset + done}",
                        f"{len(buffer)} bytes from byte {offset} on",
                        "the file is cut short, or changed while it was read",
                    )
                )
            done += got

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; checked against the file's size before anything is allocated."""
        self._check(offset, length)
        out = bytearray(length)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def section(self, offset: int, length: int) -> Section:
        """A part of the file as a `Storage`; must lie inside the file."""
        self._check(offset, length)
        return Section(self, offset, length)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise BadFile(
                Problem(
                    str(self.path),
                    f"a part of {length} bytes at byte {offset}",
                    f"one inside its {self.size} bytes",
                    "the file is cut short or forged",
                )
            )


@dataclass(frozen=True)
class Section:
    """A part of a file as a `Storage`."""

    file: SourceFile
    offset: int
    nbytes: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.nbytes:
            raise BadFile(
                Problem(str(self.file.path), f"{len(buffer)} bytes at byte {offset}", f"a part of {self.nbytes} bytes")
            )
        self.file.read_into(self.offset + offset, buffer)


@dataclass(frozen=True)
class Memory:
    """Bytes in memory as a `Storage`."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > len(self.data):
            raise BadFile(
                Problem("memory", f"{len(buffer)} bytes at byte {offset}", f"a part of {len(self.data)} bytes")
            )
        buffer[:] = memoryview(self.data)[offset : offset + len(buffer)]


def pieces(source: SourceFile | Storage, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a range, in pieces that are valid until the next one is taken.

    >>> [bytes(piece) for piece in pieces(Memory(b"abcd"), 1, 3)]
    [b'bc']
    """
    buffer = memoryview(bytearray(min(TILE, max(stop - start, 0))))
    while start < stop:
        piece = buffer[: stop - start]
        source.read_into(start, piece)
        yield piece
        start += len(piece)


_OUTWARD = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:[/\\]")


def leads_outside(name: str) -> bool:
    """Whether a name, taken for a path by whoever unpacks a file, would lead out of the folder.

    >>> leads_outside("encoder/../../x"), leads_outside("/x"), leads_outside("a..b/c")
    (True, True, False)
    """
    return _OUTWARD.search(name) is not None


def check_output(path: Path, force: bool) -> None:
    """Refuse an output that exists (unless `force`), is a link, or has no folder or no name (`.`, `..`, `/`)."""
    if path.name in ("", ".."):
        raise Refused(Problem(str(path), "a folder without a name", "the name of what to write", "name the output"))
    if path.is_symlink():
        raise Refused(Problem(str(path), "a link", "a plain file or nothing", "name the file itself"))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise Refused(Problem(str(path), "a pipe or device", "a plain file or nothing", "choose another name"))
    if path.exists() and not force:
        raise Refused(
            Problem(str(path), "an output that exists", "nothing there yet", "choose another name or pass --force")
        )
    if not path.parent.is_dir():
        raise Refused(
            Problem(str(path), "no such folder", "an existing folder to write into", f"make {path.parent} first")
        )


def refuse_same(output: Path, *inputs: Path) -> None:
    """Refuse to write over what is being read: a file, a file in a folder, the files of a checkpoint's prefix."""
    for source in inputs:
        pairs = [(o, i) for o in _with_index(output) for i in _with_index(source)]
        with contextlib.suppress(OSError):
            inside = source.is_dir() and output.exists() and source.resolve() in output.resolve().parents
            if inside or any(o.exists() and i.exists() and o.samefile(i) for o, i in pairs):
                raise Refused(
                    Problem(str(output), "the input itself as the output", "another file", "choose another name")
                )


def _with_index(path: Path) -> tuple[Path, ...]:
    """The path, and the index of a checkpoint that has it as its prefix; `.` and `/` have no name and are none."""
    return (path, path.with_name(f"{path.name}.index")) if path.name else (path,)


def refuse_inside(output: Path, folder: Path) -> None:
    """Refuse to write a copy of a folder into that folder, of which it would be a part."""
    if folder.resolve() in output.resolve().parents:
        raise Refused(
            Problem(str(output), f"an output inside {folder}, which is copied", "one outside", "choose another name")
        )


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], force: bool = False) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends without an error; else nothing is left.

    The bytes go to an unnamed file in the same folder (a hidden named one where the system has none), are synced,
    and replace `path` in one step. Readable and seekable.
    """
    target = Path(path)
    check_output(target, force)
    if target.is_dir():
        raise Refused(Problem(str(target), "a folder", "a file to write", "choose another name"))
    folder = target.parent
    hidden = folder / f".{target.name[:100]}.{os.urandom(6).hex()}.tmp"
    named = False
    try:
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except (OSError, AttributeError) as error:
            unsupported = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
            if isinstance(error, OSError) and error.errno not in unsupported:
                raise
            named = True
            fd = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            # The pool is closed before the file is, whose number another file may take.
            with os.fdopen(fd, "w+b", buffering=0) as out, ThreadPoolExecutor(1) as syncing:
                whole = _Whole(out, syncing)
                yield whole  # type: ignore[misc]
                whole.synced()
                os.fsync(fd)
                if not named:
                    _link_unnamed(fd, hidden)
                    named = True
            hidden.replace(target)
            named = False
        finally:
            if named:
                hidden.unlink(missing_ok=True)
        _sync_folder(folder)
    except OSError as error:
        raise Refused(
            Problem(str(target), f"{error.strerror or error}", "to write it", "nothing was left behind")
        ) from error


def _link_unnamed(fd: int, path: Path) -> None:
    # Python follows the /proc link (AT_SYMLINK_FOLLOW) only when a folder descriptor is given.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


_SYNCED = 64 << 20
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has fsync alone


class _Whole:
    """A raw file whose `write` writes all it is given.

    What was written is synced in pieces beside the writing, so that the disk does not idle until the last byte is there.
    """

    def __init__(self, raw: BinaryIO, pool: Executor) -> None:
        self._raw = raw
        self._pool = pool
        self._waiting = 0
        self._syncing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._raw.write(view[done:])
        self._waiting += done
        if self._waiting >= _SYNCED and (self._syncing is None or self._syncing.done()):
            self.synced()
            self._waiting = 0
            self._syncing = self._pool.submit(_sync_data, self._raw.fileno())
        return done

    def synced(self) -> None:
        """Wait for the syncing that has begun. The system tells an error of it once, so it must not get lost."""
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._raw, name)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its name only when the block ends without an error; else nothing is left."""
    target = Path(path)
    check_output(target, force)
    if target.exists() and not target.is_dir():
        raise Refused(Problem(str(target), "a file", "a folder to write", "choose another name"))
    hidden = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.parent))
    try:
        hidden.chmod(0o777 & ~_umask())
        yield hidden
        for file in sorted(p for p in hidden.rglob("*") if p.is_file()):
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".old", dir=target.parent))
            target.replace(old / "was")
            hidden.replace(target)
            shutil.rmtree(old)
        else:
            hidden.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise Refused(
            Problem(str(target), f"{error.strerror or error}", "to write it", "nothing was left behind")
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def new_files(folder: Path, names: Sequence[str], force: bool = False) -> Iterator[Path]:
    """A folder to write several files into, which move to `folder` in the order of `names` when the block ends well."""
    try:
        hidden = Path(tempfile.mkdtemp(prefix=".neutral.", suffix=".tmp", dir=folder))
    except OSError as error:
        raise Refused(
            Problem(str(folder), f"{error.strerror}", "to write into it", "nothing was left behind")
        ) from None
    try:
        yield hidden
        for name in names:
            check_output(folder / name, force)
            (hidden / name).replace(folder / name)
        _sync_folder(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
