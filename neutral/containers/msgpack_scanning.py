"""The msgpack of a file, read from left to right without what is large: extensions and long bytes are passed over.

>>> import pathlib, tempfile
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.msgpack"
>>> _ = path.write_bytes(bytes.fromhex("82 a1 61 c0 a1 62 93 01 02 cb 3ff8000000000000"))
>>> Scanner(SourceFile(path)).tree()
{'a': None, 'b': [1, 2, 1.5]}

Nothing recurses, and no length is believed before it is compared with the bytes that are there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from neutral.containers.files import Section, SourceFile
from neutral.errors import BadFile, Problem

ARRAY, COMPLEX, SCALAR = 1, 2, 3
"""Flax's types of extensions."""

LARGEST_TEXT = 64 << 20
"""Bytes that the texts of a file have in all."""
_WINDOW = 1 << 16
_NAME, _RANK = 64, 64

_FIXED = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}

Node = Any
"""None, bool, int, float, str, bytes, `Extension`, or dict and list of nodes."""


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension's type, and where its bytes lie."""

    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Opened:
    """An array or a map of `count` nodes, keys included, whose nodes follow."""

    count: int
    is_map: bool


class Scanner:
    """Reads one node from `start` to `stop`."""

    MOST_NODES: ClassVar[int] = 1 << 19
    MOST_PARTS: ClassVar[int] = 1 << 23
    DEEPEST: ClassVar[int] = 256

    def __init__(self, file: SourceFile, start: int = 0, stop: int | None = None) -> None:
        self._file = file
        self._at = start
        self._stop = file.size if stop is None else stop
        self._window, self._window_at = b"", start
        self._texts = 0

    def tree(self) -> Node:
        """The node that fills the range."""
        root: list[Node] = []
        open_nodes: list[tuple[dict[str | int, Node] | list[Node], int]] = [(root, 1)]
        keys: list[str | int | None] = [None]
        nodes = 0
        while open_nodes:
            container, left = open_nodes[-1]
            if left == 0:
                open_nodes.pop()
                keys.pop()
                continue
            nodes += 1
            if nodes > self.MOST_NODES:
                self._fail(f"more than {self.MOST_NODES} nodes", "fewer")
            open_nodes[-1] = (container, left - 1)
            node = self._node()
            child: dict[str | int, Node] | list[Node] | None = None
            if isinstance(node, _Opened):
                child = {} if node.is_map else []
            if isinstance(container, list):
                container.append(node if child is None else child)
            elif left % 2 == 0:
                keys[-1] = self._key(container, node)
            else:
                key = keys[-1]
                assert key is not None
                container[key] = node if child is None else child
            if child is not None and isinstance(node, _Opened):
                if len(open_nodes) > self.DEEPEST:
                    self._fail(f"a tree of over {self.DEEPEST} levels", "fewer")
                open_nodes.append((child, node.count))
                keys.append(None)
        if self._at != self._stop:
            self._fail(f"{self._stop - self._at} bytes behind the end", "nothing there")
        return root[0]

    def array_parts(self, where: str) -> tuple[tuple[int, ...], str, Section]:
        """Shape, name of the dtype and elements of the array that fills the range."""
        head, shape = self._node(), self._node()
        if not isinstance(head, _Opened) or head != _Opened(3, False) or not isinstance(shape, _Opened) or shape.is_map:
            self._fail(f"{where} as an array without a shape", "shape, dtype and elements")
        if shape.count > _RANK:
            self._fail(f"{where} as an array of {shape.count} axes", f"at most {_RANK}")
        sizes = [self._node() for _ in range(shape.count)]
        if any(type(n) is not int or n < 0 for n in sizes):
            self._fail(f"{where} as an array of sizes that are none", "whole numbers")
        name = self._node()
        name = name.decode("latin-1") if isinstance(name, bytes) else name
        if not isinstance(name, str) or len(name) > _NAME:
            self._fail(f"{where} as an array of no dtype", "the name of a dtype")
        tag = self._byte()
        width = _BYTES.get(tag) or _TEXTS.get(tag)
        length = self._length(width) if width else (tag & 31 if 0xA0 <= tag <= 0xBF else -1)
        if length != self._stop - self._at:
            self._fail(f"{where} as an array of {length} bytes in {self._stop - self._at}", "as many as there are")
        return tuple(sizes), name, self._file.section(self._at, length)

    def _node(self) -> Node:
        tag = self._byte()
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _FIXED:
            return struct.unpack(_FIXED[tag], self._take(struct.calcsize(_FIXED[tag])))[0]
        if tag <= 0x9F or tag in _ARRAYS or tag in _MAPS:
            return self._opened(tag)
        if tag <= 0xBF or tag in _TEXTS:
            return self._text(tag & 31 if tag <= 0xBF else self._length(_TEXTS[tag]))
        if tag in _BYTES:
            return self._text_bytes(self._length(_BYTES[tag]))
        if tag in _FIXED_EXTENSIONS:
            return self._extension(_FIXED_EXTENSIONS[tag])
        if tag in _EXTENSIONS:
            return self._extension(self._length(_EXTENSIONS[tag]))
        raise self._bad(f"the byte {tag:#x}", "one that msgpack has")

    def _opened(self, tag: int) -> _Opened:
        is_map = tag <= 0x8F or tag in _MAPS
        width = (_MAPS if is_map else _ARRAYS).get(tag)
        count = self._length(width) if width else tag & 15
        # Every node has a byte at least.
        if count * (2 if is_map else 1) > self._stop - self._at:
            self._fail(f"{count} nodes in {self._stop - self._at} bytes", "as many as there are")
        return _Opened(count * 2 if is_map else count, is_map)

    def _key(self, container: dict[str | int, Node] | list[Node], key: Node) -> str | int:
        if type(key) is not str and type(key) is not int:
            self._fail("a key that is neither text nor a whole number", "names")
        if key in container:
            self._fail(f"the key {key!r} twice", "it once")
        return key

    def _extension(self, length: int) -> Extension:
        kind = self._take(1)[0]
        if length > self._stop - self._at:
            self._fail(f"{length} bytes in {self._stop - self._at}", "as many as there are")
        node = Extension(kind, self._at, length)
        self._at += length
        return node

    def _text(self, length: int) -> str:
        raw = self._text_bytes(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._fail("text that is not UTF-8", "UTF-8")

    def _text_bytes(self, length: int) -> bytes:
        self._texts += length
        if self._texts > LARGEST_TEXT:
            self._fail(f"texts of over {LARGEST_TEXT} bytes", "a file of arrays")
        return self._take(length)

    def _length(self, width: int) -> int:
        return int.from_bytes(self._take(width), "big")

    def _byte(self) -> int:
        at = self._at - self._window_at
        if 0 <= at < len(self._window):
            self._at += 1
            return self._window[at]
        return self._take(1)[0]

    def _take(self, length: int) -> bytes:
        if length > self._stop - self._at:
            self._fail(f"{self._stop - self._at} bytes", f"{length} more")
        start = self._at - self._window_at
        if not 0 <= start <= len(self._window) - length:
            self._window = self._file.read(self._at, min(max(length, _WINDOW), self._stop - self._at))
            self._window_at, start = self._at, 0
        self._at += length
        return self._window[start : start + length]

    def _fail(self, found: str, expected: str) -> NoReturn:
        raise self._bad(found, expected)

    def _bad(self, found: str, expected: str) -> BadFile:
        where = f"{self._file.path} at byte {self._at}"
        return BadFile(Problem(where, found, expected, "the file is damaged, cut short, or no msgpack of Flax"))
