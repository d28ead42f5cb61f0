"""Arrays of numpy in a pickle, lazily: where their elements lie in it, and how to read and replace them there.

>>> import pickle
>>> from neutral.containers.files import Memory
>>> stored = Memory(pickle.dumps({"w": np.arange(6.0, dtype="f4").reshape(2, 3)}, 4))
>>> root = load_arrays(stored, "example")[0]
>>> array_tensor(stored, root["w"]).read()
array([[0., 1., 2.],
       [3., 4., 5.]], dtype=float32)

Protocols from 3 on keep elements as bytes, protocol 2 as UTF-8 of what latin-1 makes of them, Python 2 as a string.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, BinaryIO, Final

import numpy as np

from neutral.containers.elements import element_bytes
from neutral.containers.files import Memory, pieces
from neutral.containers.pickle_machine import Blob, Node, load
from neutral.errors import BadFile, Problem, Refused
from neutral.native import Storage, Stored, Tensor

_RANK_LIMIT: Final = 32
_PIECE: Final = 1 << 16
_CODES: Final = frozenset(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16"])
_RAW: Final = "TUBC\x8e\x96"


@dataclass(frozen=True)
class Piece:
    """Elements that lie in one blob: `nbytes` of them, which as UTF-8 take up to twice that."""

    blob: Blob
    nbytes: int

    @property
    def raw(self) -> bool:
        return self.blob.opcode in _RAW

    @property
    def fits(self) -> bool:
        return self.blob.nbytes == self.nbytes if self.raw else self.nbytes <= self.blob.nbytes <= 2 * self.nbytes


@dataclass(eq=False)
class ArrayRef:
    """One array of a pickle: dtype (with its byte order), shape, whether it lies in Fortran's order, and the pieces that
    hold its elements, one after another. `fault` says why it cannot be read."""

    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype("f4"))
    shape: tuple[int, ...] = ()
    fortran: bool = False
    pieces: tuple[Piece, ...] = ()
    fault: str = "an array without elements"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def load_arrays(storage: Storage, where: str) -> tuple[Any, dict[str, None]]:
    """(what was pickled, with `ArrayRef`s in it; the names that the pickle mentions)."""
    seen: dict[str, None] = {}

    def bad(found: str, expected: str) -> BadFile:
        return BadFile(Problem(where, found, expected, "the file is damaged or forged"))

    def state(target: object, given: object) -> None:
        if type(target) is not ArrayRef or type(given) is not tuple or len(given) != 5:
            raise bad("state set on what takes none", "an array's shape, dtype and elements")
        if target.pieces:
            raise bad("the elements of an array set twice", "once")
        _fill_in(target, given[1], given[2], given[3], given[4])

    def from_buffer(args: tuple[Any, ...]) -> object:
        made = ArrayRef()
        if len(args) == 4:
            _fill_in(made, args[2], args[1], _text(args[3]) == "F", args[0])
        return made

    made = {f"{package}.multiarray._reconstruct": lambda args: ArrayRef() for package in ("numpy.core", "numpy._core")}
    buffers = dict.fromkeys(("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"), from_buffer)
    rebuild = {**made, **buffers, "_codecs.encode": _encoded}
    root, end = load(storage, where=where, rebuild=rebuild, build=state, globals_seen=seen, lazy=True)
    if end != storage.nbytes:
        raise bad(f"{storage.nbytes - end} bytes behind the pickle", "its end")
    return root, seen


def _encoded(args: tuple[Any, ...]) -> object:
    # Bytes in protocol 2: _codecs.encode(text, "latin1").
    if len(args) == 2 and type(args[0]) is Blob and _text(args[1]) in ("latin1", "latin-1"):
        return args[0]
    return Node("_codecs.encode", args)


def _text(value: object) -> str | None:
    found = value.value if type(value) is Blob else value
    return found if type(found) is str else None


def text_of(value: object) -> str | None:
    """A short text of the pickle, or None for anything else."""
    return _text(value)


def _fill_in(target: ArrayRef, shape: object, dtype: object, fortran: object, elements: object) -> None:
    """What the pickle says of an array; a `fault` where that makes no array of numbers."""
    listed: tuple[object, ...] | None = tuple(shape) if isinstance(shape, tuple | list) else None
    if type(shape) is int:
        listed = (shape,)
    sizes = tuple(n for n in listed or () if type(n) is int and 0 <= n < 1 << 62)
    found = _dtype(dtype)
    if listed is None or len(sizes) < len(listed) or len(sizes) > _RANK_LIMIT:
        target.fault = "an array whose shape is none"
        return
    if found is None:
        target.fault = "an array of no plain numbers"
        return
    target.dtype, target.shape, target.fortran = found, sizes, bool(fortran)
    if type(elements) is Blob:
        target.pieces = (Piece(elements, target.nbytes),)
        target.fault = "" if target.pieces[0].fits else f"{elements.nbytes} bytes for the shape {sizes} of {found}"
    elif type(elements) is Node and elements.cls == "builtins.bytes" and not elements.args and not target.nbytes:
        target.fault = ""  # how protocol 2 says no bytes
    else:
        target.fault = "an array whose elements are no bytes"


def _dtype(value: object) -> np.dtype[Any] | None:
    if type(value) is not Node or value.cls != "numpy.dtype" or not value.args:
        return None
    code = _text(value.args[0])
    if code is None or code not in _CODES:
        return None
    order = _text(value.state[1]) if type(value.state) is tuple and len(value.state) > 1 else "="
    return np.dtype(code).newbyteorder(">" if order == ">" else "<")


def joined(parts: Sequence[ArrayRef], shape: tuple[int, ...]) -> ArrayRef:
    """Flat arrays one after another as one array of another shape, as `paddle.save` cuts those of more than 1 GB."""
    first = parts[0]
    whole = ArrayRef(first.dtype, shape, False, tuple(piece for part in parts for piece in part.pieces), "")
    if any(part.fault or part.dtype != first.dtype or len(part.shape) != 1 for part in parts):
        whole.fault = "parts that are no pieces of one array"
    elif sum(piece.nbytes for piece in whole.pieces) != whole.nbytes:
        whole.fault = f"parts that do not make the shape {shape}"
    return whole


def array_tensor(storage: Storage, ref: ArrayRef, dtype: np.dtype[Any] | None = None) -> Tensor:
    """The array's elements, lazily; as another dtype of the same width if one is given."""
    places: list[Storage] = [
        _Raw(storage, p.blob.offset, p.nbytes) if p.raw else _Latin1(storage, p) for p in ref.pieces
    ]
    strides = None
    if ref.fortran:
        strides = tuple(math.prod(max(n, 1) for n in ref.shape[:axis]) for axis in range(len(ref.shape)))
    whole: Storage = places[0] if len(places) == 1 else _Joined(places) if places else Memory(b"")
    return Stored(whole, ref.shape, dtype or ref.dtype, 0, strides)


@dataclass(frozen=True)
class _Raw:
    base: Storage
    offset: int
    nbytes: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.base.read_into(self.offset + offset, buffer)


class _Joined:
    """Storages one after another as one."""

    def __init__(self, parts: Sequence[Storage]) -> None:
        self._parts = parts
        self._starts = list(accumulate((part.nbytes for part in parts), initial=0))
        self.nbytes = self._starts.pop()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        i = bisect_right(self._starts, offset) - 1
        while len(buffer):
            part, within = self._parts[i], offset - self._starts[i]
            here = buffer[: part.nbytes - within]
            part.read_into(within, here)
            offset, buffer, i = offset + len(here), buffer[len(here) :], i + 1


class _Latin1:
    """Bytes that are stored as the UTF-8 of the text that latin-1 makes of them.

    A table of how many characters each part of the stored bytes has is made when the first are asked for.
    """

    def __init__(self, base: Storage, piece: Piece) -> None:
        self._base, self._blob = base, piece.blob
        self.nbytes = piece.nbytes
        self._starts: list[int] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not self._starts:
            self._count()
        i = bisect_right(self._starts, offset) - 1
        skip = offset - self._starts[i]
        while len(buffer):
            decoded = self._part(i)[skip:]
            here = buffer[: len(decoded)]
            here[:] = decoded[: len(here)]
            buffer, skip, i = buffer[len(here) :], 0, i + 1

    def _count(self) -> None:
        parts = -(-self._blob.nbytes // _PIECE)
        self._starts = list(accumulate((len(self._part(i)) for i in range(parts)), initial=0))
        if self._starts.pop() != self.nbytes:
            self._starts = []
            raise self._bad(f"a text of other than {self.nbytes} characters", "one for each byte of the elements")

    def _part(self, i: int) -> bytes:
        """The characters whose first byte lies in the i-th part of the stored bytes."""
        start = i * _PIECE
        stored = bytearray(min(_PIECE + 1, self._blob.nbytes - start))
        self._base.read_into(self._blob.offset + start, memoryview(stored))
        if len(stored) > _PIECE and stored[-1] & 0xC0 != 0x80:
            stored.pop()
        if i and stored and stored[0] & 0xC0 == 0x80:
            del stored[0]
        try:
            return stored.decode("utf-8").encode("latin-1")
        except UnicodeError:
            raise self._bad("a text that holds no bytes", "UTF-8 of characters up to 255") from None

    def _bad(self, found: str, expected: str) -> BadFile:
        return BadFile(Problem(f"pickle at byte {self._blob.offset}", found, expected, "the file is damaged or forged"))


def copy_with(storage: Storage, out: BinaryIO, new: Sequence[tuple[str, ArrayRef, Tensor]]) -> None:
    """Write a copy of the pickle in which these arrays have other elements of the same shape and dtype; all else stays
    byte for byte, but for the length of texts: (name for errors, reference, elements)."""
    done = 0
    for piece, data in sorted(_by_piece(new), key=lambda item: item[0].blob.offset):
        blob = piece.blob
        if blob.offset < done:
            raise Refused(Problem("template", "arrays that share their elements", "arrays of their own"))
        if piece.raw:
            _copy(storage, out, done, blob.offset)
            for tile in data:
                out.write(tile)
        else:
            width = {"X": 4, "\x8d": 8}.get(blob.opcode)
            if width is None:
                raise Refused(Problem("template", "a text of other than protocol 2", "bytes"))
            _copy(storage, out, done, blob.offset - width)
            place = out.tell()
            out.write(bytes(width))
            for tile in data:
                out.write(bytes(tile).decode("latin-1").encode("utf-8"))
            end = out.tell()
            _check_length(end - place - width, width)
            out.seek(place)
            out.write((end - place - width).to_bytes(width, "little"))
            out.seek(end)
        done = blob.offset + blob.nbytes
    _copy(storage, out, done, storage.nbytes)


def _check_length(nbytes: int, width: int) -> None:
    if nbytes >= 1 << (8 * width):
        raise Refused(
            Problem("template", f"{nbytes} bytes for one text", "less than 4 GB", "save the template in protocol 4")
        )


def _copy(storage: Storage, out: BinaryIO, start: int, stop: int) -> None:
    for piece in pieces(storage, start, stop):
        out.write(piece)


def _by_piece(new: Sequence[tuple[str, ArrayRef, Tensor]]) -> Iterator[tuple[Piece, Iterator[memoryview]]]:
    """Each piece with the bytes that go there."""
    for name, ref, data in new:
        if any(after.blob.offset < before.blob.offset for before, after in pairwise(ref.pieces)):
            raise Refused(Problem(name, "an array whose parts are out of order", "parts in their order"))
        order = ">" if ref.dtype.byteorder == ">" else "<"
        laid = data.permute(tuple(reversed(range(len(data.shape))))) if ref.fortran else data
        stream = _Stream(element_bytes(laid, order))  # type: ignore[arg-type]
        yield from ((piece, stream.take(piece.nbytes)) for piece in ref.pieces)


class _Stream:
    """Bytes that are taken a number at a time."""

    def __init__(self, chunks: Iterator[memoryview]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def take(self, count: int) -> Iterator[memoryview]:
        while count:
            if not len(self._rest):
                self._rest = next(self._chunks).cast("B")
            here = self._rest[:count]
            self._rest = self._rest[count:]
            count -= len(here)
            yield here
