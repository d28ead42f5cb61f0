"""OCDBT, TensorStore's database in a folder: a B+tree of keys whose values lie in its nodes or in data files.

    database = open_ocdbt(Folder(path))
    database.get("params.fc.kernel/.zarray")         a Storage, or None

The layout is that of TensorStore's documentation, kvstore/ocdbt: a manifest refers to the roots of versions, of which
the newest is read; a root to nodes, a leaf to values. Manifest and nodes have a checksum each; values have none. The
whole tree is read when the database is opened, no value is.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from neutral.containers import protobuf
from neutral.containers.codecs import decompress
from neutral.containers.crc32c import crc32c
from neutral.containers.files import Memory
from neutral.containers.folder import Folder
from neutral.errors import BadFile, Problem
from neutral.native import Storage

MANIFEST = "manifest.ocdbt"
_MANIFEST_MAGIC, _NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
_NUMBERED = re.compile(r"manifest\.[0-9a-f]{16}")
_LARGEST_MANIFEST = 16 << 20
_LARGEST_NODE = 100_000_000
"""Bytes of a decoded node: what Orbax allows its writer."""
_LARGEST_TREE = 256 << 20
_MOST_NODES = 1 << 16
_MOST_KEYS = 1 << 20
_LONGEST_PATH = 1 << 12
_MISSING = (1 << 64) - 1


@dataclass(frozen=True)
class Database:
    """Every key of the newest version, in order, with its value unread."""

    values: Mapping[bytes, Storage]

    def get(self, key: str) -> Storage | None:
        return self.values.get(key.encode("utf-8"))


@dataclass(frozen=True)
class _Place:
    """Where a node lies. `base` goes before the names of the files that the node itself refers to."""

    base: str
    name: str
    offset: int
    length: int


def open_ocdbt(folder: Folder) -> Database:
    """Read the newest version's tree."""
    root = _newest(folder)
    return Database({} if root is None else _Tree(folder).read(*root))


def _newest(folder: Folder) -> tuple[_Place, int] | None:
    """The newest root and its height; None if the newest version is empty."""
    body = _manifest(folder, MANIFEST)
    if _config_alone(body):
        names = sorted(path.name for path in folder.path.iterdir() if _NUMBERED.fullmatch(path.name))
        if not names:
            body.refuse("a manifest without versions", "numbered manifests beside it")
        body = _manifest(folder, names[-1])
        _config_alone(body)
    files = body.files("")
    count = body.number()
    if not 0 < count <= 1 << 16:
        body.refuse(f"{count} versions", "at least one")
    generations = [body.number() for _ in range(count)]
    heights = [body.byte() for _ in range(count)]
    places = body.places(files, count)
    if generations != sorted(set(generations)):
        body.refuse("versions in disorder", "ascending ones")
    last = places[-1]
    return None if last.offset == last.length == _MISSING else (last, heights[-1])


def _manifest(folder: Folder, name: str) -> _Body:
    return _Body(_opened(folder.read(name, _LARGEST_MANIFEST), _MANIFEST_MAGIC, f"{folder.path}: {name}"), folder, name)


def _config_alone(body: _Body) -> bool:
    """Whether the manifest says only how the database is written, its versions being in numbered manifests."""
    body.take(16)
    kind = body.byte()
    body.number()
    body.number()
    body.byte()
    if body.number():
        body.take(4)
    if kind > 1:
        body.refuse(f"a manifest of kind {kind}", "0 or 1")
    return kind == 1


def _opened(raw: bytes, magic: int, where: str) -> bytes:
    """What is inside a manifest or node, its length and checksum compared."""
    found, length = struct.unpack_from(">I", raw)[0] if len(raw) >= 18 else 0, len(raw)
    if found != magic or struct.unpack_from("<Q", raw, 4)[0] != length:
        raise BadFile(Problem(where, "bytes that are no OCDBT", f"those of {magic:08x}", "the file is damaged"))
    computed, stored = crc32c(memoryview(raw)[:-4]), struct.unpack_from("<I", raw, length - 4)[0]
    if computed != stored:
        found_crc = f"checksum {computed:08x}"
        raise BadFile(Problem(where, found_crc, f"{stored:08x} as stored", "the file is damaged; get it again"))
    version, compression = raw[12], raw[13]
    if version != 0 or compression > 1:
        raise BadFile(Problem(where, f"OCDBT of version {version}, compression {compression}", "version 0"))
    body = memoryview(raw)[14:-4]
    return decompress(body, "zstd", _LARGEST_NODE, where) if compression else bytes(body)


class _Body:
    """The fields of a manifest or node, from left to right."""

    def __init__(self, data: bytes, folder: Folder, name: str) -> None:
        self._data = memoryview(data)
        self._at = 0
        self.where = f"{folder.path}: {name}"

    def number(self) -> int:
        value, self._at = protobuf.read_varint(self._data, self._at, self.where)
        return value

    def numbers(self, count: int) -> list[int]:
        if count > len(self._data) - self._at:
            self.refuse(f"{count} numbers in {len(self._data) - self._at} bytes", "as many as there are")
        return [self.number() for _ in range(count)]

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            self.refuse(f"{len(self._data) - self._at} bytes", f"{length} more")
        self._at += length
        return bytes(self._data[self._at - length : self._at])

    def prefixed(self, count: int, longest: int, *columns: int) -> tuple[list[bytes], list[list[int]]]:
        """Strings that share their beginnings with the one before, and the columns of numbers that stand between."""
        prefixes = [0, *self.numbers(max(count - 1, 0))]
        suffixes = self.numbers(count)
        between = [self.numbers(count) for _ in columns]
        found: list[bytes] = []
        total = 0
        for prefix, suffix in zip(prefixes, suffixes, strict=False):
            before = found[-1] if found else b""
            total += prefix + suffix
            if prefix > len(before) or prefix + suffix > longest or total > _LARGEST_TREE:
                self.refuse(f"a name of {prefix} and {suffix} bytes", f"at most {longest}, and what the last one has")
            found.append(before[:prefix] + self.take(suffix))
        return found, between

    def files(self, above: str) -> list[tuple[str, str]]:
        """The table of data files: what goes before their own references, and their names."""
        count = self.number()
        names, (lengths,) = self.prefixed(count, _LONGEST_PATH, 0)
        found: list[tuple[str, str]] = []
        for raw, length in zip(names, lengths, strict=True):
            name = protobuf.decoded(raw, self.where)
            if length > len(raw) or len(above) + len(name) > _LONGEST_PATH:
                self.refuse(f"a data file's name of {len(above) + len(name)} characters", f"at most {_LONGEST_PATH}")
            base = protobuf.decoded(raw[:length], self.where)
            found.append((above + base, above + name))
        return found

    def places(self, files: list[tuple[str, str]], count: int) -> list[_Place]:
        """References to nodes, and their statistics, which are passed over."""
        which, offsets, lengths = (self.numbers(count) for _ in range(3))
        for _ in range(3):
            self.numbers(count)
        return [_Place(*self.file(files, i), o, n) for i, o, n in zip(which, offsets, lengths, strict=True)]

    def file(self, files: list[tuple[str, str]], index: int) -> tuple[str, str]:
        if index >= len(files):
            self.refuse(f"data file {index}", f"one of {len(files)}")
        return files[index]

    def end(self) -> None:
        if self._at != len(self._data):
            self.refuse(f"{len(self._data) - self._at} bytes behind the last entry", "nothing there")

    def refuse(self, found: str, expected: str) -> NoReturn:
        raise BadFile(Problem(self.where, found, expected, "the file is damaged or forged"))


class _Tree:
    """Collects the values of all leaves below a root, in the order of their keys."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._values: dict[bytes, Storage] = {}
        self._last: bytes | None = None
        self._nodes, self._bytes = 0, 0

    def read(self, root: _Place, height: int) -> dict[bytes, Storage]:
        waiting: list[tuple[_Place, int, bytes]] = [(root, height, b"")]
        while waiting:
            place, height, prefix = waiting.pop()
            body = self._node(place)
            if (found := body.byte()) != height:
                body.refuse(f"a node of height {found}", f"{height}")
            files = body.files(place.base)
            count = body.number()
            if not 0 < count <= _MOST_KEYS:
                body.refuse(f"a node of {count} entries", f"1 to {_MOST_KEYS}")
            if height:
                waiting.extend(reversed(self._children(body, files, count, height, prefix)))
            else:
                self._leaf(body, files, count, prefix)
            body.end()
        return self._values

    def _node(self, place: _Place) -> _Body:
        where = f"{self._folder.path}: {place.name}"
        self._nodes += 1
        if self._nodes > _MOST_NODES or place.length > _LARGEST_NODE:
            raise BadFile(Problem(where, "a tree of too many or too large nodes", f"at most {_MOST_NODES}"))
        part = self._folder.part(place.name, place.offset, place.length)
        raw = bytearray(part.nbytes)
        part.read_into(0, memoryview(raw))
        data = _opened(bytes(raw), _NODE_MAGIC, where)
        self._bytes += len(data)
        if self._bytes > _LARGEST_TREE:
            raise BadFile(Problem(where, f"a tree of over {_LARGEST_TREE} bytes", "a tree of the keys of arrays"))
        return _Body(data, self._folder, place.name)

    def _children(
        self, body: _Body, files: list[tuple[str, str]], count: int, height: int, prefix: bytes
    ) -> list[tuple[_Place, int, bytes]]:
        keys, (common,) = body.prefixed(count, 1 << 16, 0)
        places = body.places(files, count)
        if any(shared > len(key) for key, shared in zip(keys, common, strict=True)):
            body.refuse("a subtree that shares more than its key", "the beginning of its key")
        return [
            (place, height - 1, prefix + key[:shared]) for place, key, shared in zip(places, keys, common, strict=True)
        ]

    def _leaf(self, body: _Body, files: list[tuple[str, str]], count: int, prefix: bytes) -> None:
        keys, _ = body.prefixed(count, 1 << 16)
        lengths = body.numbers(count)
        kinds = list(body.take(count))
        if any(kind > 1 for kind in kinds):
            body.refuse(f"a value of kind {max(kinds)}", "0 or 1")
        which, offsets = iter(body.numbers(sum(kinds))), iter(body.numbers(sum(kinds)))
        if len(self._values) + count > _MOST_KEYS:
            body.refuse(f"over {_MOST_KEYS} keys", "fewer")
        for key, length, kind in zip(keys, lengths, kinds, strict=True):
            full = prefix + key
            if self._last is not None and full <= self._last:
                body.refuse("keys in disorder, or a node twice", "every key once, ascending")
            self._last = full
            if kind:
                _, name = body.file(files, next(which))
                self._values[full] = self._folder.part(name, next(offsets), length)
            else:
                self._values[full] = Memory(body.take(length))
