"""The msgpack files of flax.serialization: nested maps whose leaves are arrays.

>>> import pathlib, tempfile
>>> import numpy as np
>>> from neutral.native import from_array
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.msgpack"
>>> write({("fc", "kernel"): from_array(np.arange(6.0).reshape(2, 3))}, {("step",): 1}, path)
>>> tree = read(path)
>>> tree.leaves[("fc", "kernel")].read()[1], tree.others
(array([3., 4., 5.]), {('step',): 1})

An array is an extension of type 1, whose bytes are msgpack again: (shape, name of the dtype, elements in C order).
Type 2 is a complex number, type 3 a NumPy scalar, which is written as an array is. An array of over 2^30 bytes is a
map of flat pieces. Only the structure is read; where the elements lie is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, BinaryIO

import numpy as np

from neutral.containers.elements import element_bytes
from neutral.containers.files import Section, SourceFile, new_file, pieces, refuse_same
from neutral.containers.msgpack_scanning import ARRAY, COMPLEX, SCALAR, Extension, Scanner
from neutral.containers.msgpack_writing import array_head, packed, packed_head
from neutral.containers.tree import DTYPES, Path, PyTree, dotted, grouped, in_order, misfits
from neutral.errors import BadFile, Problem, Refused, Unsupported, raise_all
from neutral.native import Array, Range, Stored, Tensor

CHUNKED = "__msgpack_chunked_array__"
LARGEST_CHUNK = 1 << 30
"""Bytes of an array's piece, Flax's own limit."""
LARGEST_RANK = 32


@dataclass(frozen=True)
class _Elements:
    """An array as it lies in the file: the byte ranges that hold its elements, in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sections: tuple[Section, ...]
    scalar: bool = False

    def tensor(self) -> Tensor:
        if len(self.sections) == 1:
            return Stored(self.sections[0], self.shape, self.dtype)
        return Stored(_Joined(self.sections), self.shape, self.dtype)


class _Joined:
    """Sections of a file, one behind the other, as a `Storage`."""

    def __init__(self, sections: tuple[Section, ...]) -> None:
        self._sections = sections
        self.nbytes = sum(section.nbytes for section in sections)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        start = 0
        for section in self._sections:
            low, high = max(offset, start), min(offset + len(buffer), start + section.nbytes)
            if low < high:
                section.read_into(low - start, buffer[low - offset : high - offset])
            start += section.nbytes


def read(path: FilePath) -> PyTree:
    """The tree of a file, its arrays unread."""
    file = SourceFile(path)
    try:
        found = _scan(file)
    except BaseException:
        file.close()
        raise
    leaves = {path: leaf.tensor() for path, leaf in found.items.items() if isinstance(leaf, _Elements)}
    others = {path: leaf for path, leaf in found.items.items() if not isinstance(leaf, _Elements)}
    metadata: dict[str, Any] = {}
    if list(found.items) != [*leaves, *others]:
        metadata["order"] = [list(path) for path in found.items]
    for name, paths in (("lists", found.lists), ("integers", found.integers)):
        if paths:
            metadata[name] = [list(path) for path in paths]
    if scalars := [list(p) for p, leaf in found.items.items() if isinstance(leaf, _Elements) and leaf.scalar]:
        metadata["scalars"] = scalars
    return PyTree(leaves, others, metadata, file.close)


@dataclass(frozen=True)
class _Found:
    """What a file holds: its leaves by path, the paths that are lists, and those whose last key is an int."""

    items: dict[Path, object]
    lists: list[Path]
    integers: list[Path]


def _scan(file: SourceFile) -> _Found:
    scanner = Scanner(file)
    found = _Found({}, [], [])
    root = scanner.tree()
    stack: list[tuple[Path, object]] = [((), root)]
    parts = 0
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict) and CHUNKED in node:
            found.items[path] = _joined(file, path, node)
        elif isinstance(node, dict | list) and node:
            named = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
            if isinstance(node, list):
                found.lists.append(path)
            else:
                found.integers.extend((*path, str(key)) for key in node if isinstance(key, int))
                if len({str(key) for key in node}) != len(node):
                    raise _bad(file, path, "a key as text and as a number", "each key once")
            parts += len(named) * (len(path) + 1)
            if parts > scanner.MOST_PARTS:
                raise _bad(file, path[:8], "a tree that is too deep and too wide", "a tree of layers")
            stack.extend(((*path, str(key)), child) for key, child in reversed(named))
        else:
            found.items[path] = _leaf(file, path, node)
    return found


def _leaf(file: SourceFile, path: Path, node: object) -> object:
    if not isinstance(node, Extension):
        return node
    if node.kind == COMPLEX:
        return _complex(file, path, node)
    return _elements(file, path, node)


def _elements(file: SourceFile, path: Path, node: Extension) -> _Elements:
    if node.kind not in (ARRAY, SCALAR):
        raise Unsupported(
            Problem(_where(file, path), f"an extension of type {node.kind}", "those of Flax: arrays, complex, scalars")
        )
    scanner = Scanner(file, node.offset, node.offset + node.nbytes)
    shape, name, elements = scanner.array_parts(dotted(path))
    dtype = DTYPES.get(name)
    if dtype is None:
        raise Unsupported(Problem(_where(file, path), f"elements of dtype {name}", f"one of {', '.join(DTYPES)}"))
    if len(shape) > LARGEST_RANK or math.prod(n or 1 for n in shape) >= 1 << 58:
        raise _bad(file, path, f"an array of shape {list(shape)}", f"at most {LARGEST_RANK} axes that fit in memory")
    if math.prod(shape) * dtype.itemsize != elements.nbytes:
        wanted = math.prod(shape) * dtype.itemsize
        raise _bad(file, path, f"{elements.nbytes} bytes for {name} {list(shape)}", f"{wanted} bytes")
    if node.kind == SCALAR and shape:
        raise _bad(file, path, f"a scalar of shape {list(shape)}", "no axes")
    return _Elements(shape, dtype, (elements,), node.kind == SCALAR)


def _complex(file: SourceFile, path: Path, node: Extension) -> complex:
    parts = Scanner(file, node.offset, node.offset + node.nbytes).tree()
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(x, float | int) for x in parts):
        raise _bad(file, path, "a complex number of other parts", "a real and an imaginary part")
    return complex(*parts)


def _joined(file: SourceFile, path: Path, node: dict[str | int, object]) -> _Elements:
    """A chunked array, of the pieces that its map holds."""
    shape, chunks = node.get("shape"), node.get("chunks")
    if node[CHUNKED] is not True or len(node) != 3 or not isinstance(shape, dict) or not isinstance(chunks, dict):
        raise _bad(file, path, "a chunked array of other parts", f"{CHUNKED}, shape and chunks")
    if len(shape) > LARGEST_RANK:
        raise _bad(file, path, f"a chunked array of {len(shape)} axes", f"at most {LARGEST_RANK}")
    sizes = [shape.get(str(i)) for i in range(len(shape))]
    parts = [chunks.get(str(i)) for i in range(len(chunks))]
    if not all(type(n) is int and n >= 0 for n in sizes) or not parts:
        raise _bad(file, path, "a chunked array without its sizes or pieces", 'sizes and pieces named "0", "1", ...')
    arrays = [_elements(file, (*path, str(i)), p) for i, p in enumerate(parts) if isinstance(p, Extension)]
    if len(arrays) != len(parts) or any(len(a.shape) != 1 or a.dtype != arrays[0].dtype for a in arrays):
        raise _bad(file, path, "pieces that are no flat arrays of one dtype", "such pieces")
    whole = tuple(int(n) for n in sizes if isinstance(n, int))
    if sum(a.shape[0] for a in arrays) != math.prod(whole) or math.prod(n or 1 for n in whole) >= 1 << 58:
        raise _bad(file, path, f"pieces of {sum(a.shape[0] for a in arrays)} elements", f"{math.prod(whole)}")
    return _Elements(whole, arrays[0].dtype, tuple(a.sections[0] for a in arrays))


def _where(file: SourceFile, path: Path) -> str:
    return f"{file.path}: {dotted(path)}"


def _bad(file: SourceFile, path: Path, found: str, expected: str) -> BadFile:
    return BadFile(Problem(_where(file, path), found, expected, "the file is damaged or forged"))


def replace(template: FilePath, tensors: Mapping[Path, Tensor], out: FilePath, *, force: bool = False) -> None:
    """A copy of a file in which the arrays named have other elements; all else stays byte for byte."""
    refuse_same(out, template)
    with SourceFile(template) as file:
        arrays = {path: leaf for path, leaf in _scan(file).items.items() if isinstance(leaf, _Elements)}
        raise_all(Refused, misfits(template, {path: array.tensor() for path, array in arrays.items()}, tensors))
        places = [
            (section.offset, section.nbytes, _Flat(tensor, start, start + section.nbytes // tensor.dtype.itemsize))
            for path, tensor in tensors.items()
            for section, start in _starts(arrays[path])
            if section.nbytes
        ]
        with new_file(out, force) as copy:
            at = 0
            for offset, nbytes, source in sorted(places, key=lambda place: place[0]):
                for piece in pieces(file, at, offset):
                    copy.write(piece)
                _write_elements(copy, source)
                at = offset + nbytes
            for piece in pieces(file, at, file.size):
                copy.write(piece)


def _starts(array: _Elements) -> Iterator[tuple[Section, int]]:
    """The sections of an array, each with the first element that it holds."""
    start = 0
    for section in array.sections:
        yield section, start
        start += section.nbytes // array.dtype.itemsize


class _Flat(Tensor):
    """Some elements of a tensor in C order, as one axis."""

    def __init__(self, base: Tensor, start: int, stop: int) -> None:
        self._base, self._start = base.merge(0, len(base.shape)), start
        self.shape = (stop - start,)
        self.dtype = base.dtype
        self.streams = base.streams

    def block(self, ranges: Sequence[Range]) -> Array:
        ((a, b),) = ranges
        return self._base.block([(self._start + a, self._start + b)])


def write(
    leaves: Mapping[Path, Tensor],
    others: Mapping[Path, object],
    out: FilePath,
    metadata: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """A new file, as flax.serialization.to_bytes writes it; `metadata` as `read` gives them."""
    remembered = metadata or {}
    told = {name: {tuple(path) for path in remembered.get(name, ())} for name in ("lists", "integers", "scalars")}
    flat: dict[Path, object] = {
        path: leaves[path] if path in leaves else others[path]
        for path in in_order([*leaves, *others], remembered.get("order"))
    }
    raise_all(Refused, _unwritable(leaves, others))
    tree = grouped(flat)
    with new_file(out, force) as file:
        stack: list[tuple[Path, object, bool]] = [((), tree, False)]
        while stack:
            path, node, in_list = stack.pop()
            if isinstance(node, Tensor):
                kind = SCALAR if path in told["scalars"] and not node.shape else ARRAY
                _write_array(file, node, kind, chunked=not in_list)
            elif isinstance(node, _Key):
                file.write(packed(int(node.text) if node.is_integer else node.text))
            elif isinstance(node, dict) and node:
                is_list = path in told["lists"] and list(node) == [str(i) for i in range(len(node))]
                file.write(packed_head("array" if is_list else "map", len(node)))
                below: list[tuple[Path, object, bool]] = []
                for key, child in node.items():
                    if not is_list:
                        below.append((path, _Key(key, (*path, key) in told["integers"]), False))
                    below.append(((*path, key), child, in_list or is_list))
                stack.extend(reversed(below))
            else:
                file.write(packed(node))


@dataclass(frozen=True)
class _Key:
    text: str
    is_integer: bool


def _unwritable(leaves: Mapping[Path, Tensor], others: Mapping[Path, object]) -> Iterator[Problem]:
    for path, tensor in leaves.items():
        if path in others:
            yield Problem(dotted(path), "an array and something else", "one of both")
        if tensor.dtype.name not in DTYPES:
            yield Problem(dotted(path), f"dtype {tensor.dtype}", f"one of {', '.join(DTYPES)}")
    for path in (*leaves, *others):
        if CHUNKED in path:
            yield Problem(dotted(path), f"the name {CHUNKED}", "another, this one is reserved")


def _write_array(file: BinaryIO, tensor: Tensor, kind: int, chunked: bool) -> None:
    # Flax cuts arrays in maps, at any depth, and looks for pieces there; what is in a list stays whole.
    if tensor.nbytes <= LARGEST_CHUNK or not chunked:
        file.write(array_head(kind, tensor.shape, tensor.dtype.name, tensor.nbytes))
        _write_elements(file, tensor)
        return
    step = max(1, LARGEST_CHUNK // tensor.dtype.itemsize)
    starts = range(0, tensor.size, step)
    sizes = {str(axis): n for axis, n in enumerate(tensor.shape)}
    file.write(packed_head("map", 3) + packed(CHUNKED) + packed(True) + packed("shape") + packed(sizes))
    file.write(packed("chunks") + packed_head("map", len(starts)))
    for i, start in enumerate(starts):
        piece = _Flat(tensor, start, min(start + step, tensor.size))
        file.write(packed(str(i)) + array_head(ARRAY, piece.shape, piece.dtype.name, piece.nbytes))
        _write_elements(file, piece)


def _write_elements(file: BinaryIO, tensor: Tensor) -> None:
    for piece in element_bytes(tensor):
        file.write(piece)
