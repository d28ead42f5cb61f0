"""Compressed bytes that are read from any position, and bytes compressed piece by piece: zstd, gzip, zlib.

>>> from neutral.containers.files import Memory
>>> data = b"".join(compressed("gzip", 5, [memoryview(bytes(1000))], 1000))
>>> storage = Decompressed(Memory(data), "gzip", 1000, "example", Cursors())
>>> out = bytearray(4)
>>> storage.read_into(996, memoryview(out)); out
bytearray(b'\\x00\\x00\\x00\\x00')

Nothing is decompressed that is not asked for, apart from what lies before it, and never more than was promised.
zstd is Python's own from 3.14 on, else that of the package zstandard.
"""

from __future__ import annotations

import gzip
import importlib
import io
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from types import ModuleType
from typing import Any, NoReturn, Protocol

from neutral.errors import BadFile, NeutralError, Problem, Unsupported
from neutral.native import TILE, Storage

CODECS = ("zstd", "gzip", "zlib")

LARGEST_RATIO = {"zstd": 1 << 15, "gzip": 1032, "zlib": 1032}
"""How many bytes one compressed byte can give: zstd has blocks of 4 bytes for 128 KiB."""

_LARGEST_WINDOW = 27
"""log2 of the bytes that zstd must look back at the most: what its own tool decompresses unless told otherwise."""

_KEPT = 16


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Cursors:
    """The places where decompression of a few storages stopped, so that reading on does not begin anew."""

    def __init__(self) -> None:
        self.lock = Lock()
        self._kept: OrderedDict[str, tuple[_Reader, int]] = OrderedDict()

    def take(self, where: str) -> tuple[_Reader, int] | None:
        """A reader and its place, which is then whoever asked for it."""
        return self._kept.pop(where, None)

    def keep(self, where: str, reader: _Reader, at: int) -> None:
        """Give a reader back."""
        self._kept[where] = (reader, at)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        with self.lock:
            self._kept.clear()


@dataclass(frozen=True)
class Decompressed:
    """A compressed storage as the `nbytes` that it must have inside; `where` names it, and no other one."""

    source: Storage
    codec: str
    nbytes: int
    where: str
    cursors: Cursors

    def __post_init__(self) -> None:
        if self.nbytes > (self.source.nbytes + 1) * LARGEST_RATIO[self.codec]:
            self._refuse(f"{self.source.nbytes} bytes of {self.codec} for {self.nbytes}", "more")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.nbytes:
            self._refuse(f"{len(buffer)} bytes at byte {offset}", f"a part of {self.nbytes} bytes")
        with self.cursors.lock:
            kept = self.cursors.take(self.where)
            reader, at = kept if kept and kept[1] <= offset else (_reader(self.codec, self.source, self.where), 0)
            while at < offset:
                at += len(self._read(reader, min(TILE, offset - at)))
            done = 0
            while done < len(buffer):
                data = self._read(reader, min(TILE, len(buffer) - done))
                buffer[done : done + len(data)] = data
                done += len(data)
            if offset + done == self.nbytes:
                if self._attempt(reader, 1):
                    self._refuse(f"{self.codec} of over {self.nbytes} bytes", f"{self.nbytes} bytes exactly")
            else:
                self.cursors.keep(self.where, reader, offset + done)

    def _read(self, reader: _Reader, size: int) -> bytes:
        data = self._attempt(reader, size)
        if not data:
            self._refuse(f"{self.codec} that ends early", f"{self.nbytes} bytes")
        return data

    def _attempt(self, reader: _Reader, size: int) -> bytes:
        with _damage(self.where, self.codec):
            return reader.read(size)

    def _refuse(self, found: str, expected: str) -> NoReturn:
        raise BadFile(Problem(self.where, found, expected, "the file is damaged or forged"))


def decompress(data: bytes | memoryview, codec: str, limit: int, where: str) -> bytes:
    """All that is inside, at most `limit` bytes."""
    reader = _reader(codec, None, where, bytes(data))
    found: list[bytes] = []
    size = 0
    while True:
        with _damage(where, codec):
            piece = reader.read(TILE)
        if not piece:
            return b"".join(found)
        size += len(piece)
        if size > limit:
            raise BadFile(Problem(where, f"{codec} of over {limit} bytes", f"at most {limit}"))
        found.append(piece)


@contextmanager
def _damage(where: str, codec: str) -> Iterator[None]:
    """What a decompressor says of broken data, as `BadFile`."""
    try:
        yield
    except NeutralError:
        raise
    except Exception as error:
        if not isinstance(error, zlib.error | EOFError | OSError | MemoryError) and type(error).__name__ != "ZstdError":
            raise
        found = f"{codec} that does not decompress ({error})"
        raise BadFile(Problem(where, found, "whole data", "the file is damaged or forged")) from None


class _Bytes(io.RawIOBase):
    """A storage as a file, from its beginning to its end."""

    def __init__(self, source: Storage) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: self._source.nbytes - self._at]
        self._source.read_into(self._at, view)
        self._at += len(view)
        return len(view)


def _reader(codec: str, source: Storage | None, where: str, data: bytes = b"") -> _Reader:
    file = io.BytesIO(data) if source is None else io.BufferedReader(_Bytes(source), 1 << 17)
    if codec == "zstd":
        return _zstd_reader(file, where)
    return gzip.GzipFile(fileobj=file, mode="rb") if codec == "gzip" else _Inflating(file)


class _Inflating:
    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file, self._machine = file, zlib.decompressobj()

    def read(self, size: int) -> bytes:
        while not self._machine.eof:
            raw = self._machine.unconsumed_tail or self._file.read(1 << 17)
            data = self._machine.decompress(raw, size)
            if data:
                return data
            if not raw:
                raise EOFError("the stream is cut short")
        if self._machine.unused_data or self._file.read(1):
            raise EOFError("bytes behind the stream")
        return b""


def _zstd(where: str) -> tuple[str, ModuleType]:
    for name in ("compression.zstd", "zstandard"):
        try:
            return name, importlib.import_module(name)
        except ImportError:
            continue
    raise Unsupported(
        Problem(where, "zstd, which Python has from 3.14 on", "the package zstandard", "pip install zstandard")
    )


def _zstd_reader(file: Any, where: str) -> _Reader:
    name, zstd = _zstd(where)
    if name == "zstandard":
        machine = zstd.ZstdDecompressor(max_window_size=1 << _LARGEST_WINDOW)
        reader: _Reader = machine.stream_reader(file, read_across_frames=True)
        return reader
    found: _Reader = zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: _LARGEST_WINDOW})
    return found


def compressed(codec: str | None, level: int, source: Iterable[memoryview], size: int) -> Iterator[bytes | memoryview]:
    """The bytes of a source of `size` bytes, compressed; as they are without a codec."""
    if codec is None:
        yield from source
        return
    machine: Any
    if codec == "zstd":
        name, zstd = _zstd("output")
        if name == "zstandard":
            machine = zstd.ZstdCompressor(level=level).compressobj(size=size)
        else:
            machine = zstd.ZstdCompressor(level=level)
            machine.set_pledged_input_size(size)
    else:
        machine = zlib.compressobj(level, zlib.DEFLATED, 31 if codec == "gzip" else 15)
    for piece in source:
        yield machine.compress(piece)
    yield machine.flush()
