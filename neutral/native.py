"""What a reader yields and a writer takes: models of layers of tensors that have not been read yet.

>>> import numpy as np
>>> kernel = from_array(np.arange(6.0).reshape(2, 3))
>>> kernel.permute((1, 0)).read()
array([[0., 3.],
       [1., 4.],
       [2., 5.]])

A `Tensor` knows its shape and dtype and can give any rectangular block of itself. Views (`permute`, `split`, `merge`,
`take`, `stack`, `cast`) are tensors again and read nothing. `tiles` streams the elements in C order, a few MB at a
time, so a model larger than memory passes through.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from neutral.crc32 import crc32

if TYPE_CHECKING:
    from neutral.schema.graph import Graph

TILE = 2 << 20
"""Bytes that one tile has at the most."""

WHOLE = 64 << 20
"""Bytes that are read in one piece at the most where axes change places; tiles are cut from it."""

Array = npt.NDArray[Any]
Range = tuple[int, int]


class Storage(Protocol):
    """Bytes that can be read from any position: a section of a file, or memory."""

    @property
    def nbytes(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; raise `BadFile` if they are not there."""


class Tensor(ABC):
    """An array that has not been read yet. `shape` is in elements, `dtype` a numpy or ml_dtypes dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    streams: bool = False
    """True if blocks in C order are as cheap to get as the whole: the elements already lie in that order."""

    @abstractmethod
    def block(self, ranges: Sequence[Range]) -> Array:
        """The elements of a rectangle: one (start, stop) per axis. May be a view of a buffer made for this call."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> Array:
        """The whole array, C-contiguous. A 0-d tensor stays 0-d."""
        return _contiguous(self.block([(0, n) for n in self.shape])).reshape(self.shape)

    def tiles(self, limit: int = TILE) -> Iterator[Array]:
        """The elements in C order as 1-D contiguous pieces of at most `limit` bytes (one element at the least)."""
        if self.size == 0:
            return
        elements = max(1, limit // self.dtype.itemsize)
        if self.streams:
            for ranges in _c_order_blocks(self.shape, elements):
                yield _contiguous(self.block(ranges))
        else:
            yield from _ahead(self._rearranged(elements))

    def _rearranged(self, elements: int) -> Iterator[Array]:
        for ranges in _c_order_blocks(self.shape, max(elements, WHOLE // self.dtype.itemsize)):
            yield from _cut(self.block(ranges), elements)

    def permute(self, order: Sequence[int]) -> Tensor:
        """Axes in another order, as `numpy.transpose`."""
        order = tuple(order)
        return self if order == tuple(range(len(self.shape))) else _Permuted(self, order)

    def split(self, axis: int, sizes: Sequence[int]) -> Tensor:
        """One axis as several, row-major; `prod(sizes)` must be its size."""
        sizes = tuple(sizes)
        return self if len(sizes) == 1 else _Split(self, axis, sizes)

    def merge(self, axis: int, count: int) -> Tensor:
        """`count` neighbouring axes from `axis` on as one, row-major; `count=0` inserts an axis of size 1."""
        return self if count == 1 else _Merged(self, axis, count)

    def take(self, axis: int, indices: Sequence[int]) -> Tensor:
        """The named positions of an axis in the order given, as `numpy.take`."""
        indices = tuple(indices)
        return self if indices == tuple(range(self.shape[axis])) else _Taken(self, axis, indices)

    def cast(self, dtype: npt.DTypeLike) -> Tensor:
        """Elements converted, as `numpy.astype`."""
        wanted = np.dtype(dtype)
        return self if wanted == self.dtype else _Cast(self, wanted)


def _cut(block: Array, elements: int) -> Iterator[Array]:
    for ranges in _c_order_blocks(block.shape, elements):
        yield _contiguous(block[tuple(slice(a, b) for a, b in ranges)])


def _ahead(tiles: Iterator[Array]) -> Iterator[Array]:
    """The same tiles, the next one already in the making while one is used."""
    first = next(tiles)
    second = next(tiles, None)
    yield first
    if second is None:
        return
    with ThreadPoolExecutor(1) as pool:
        upcoming: Future[Array | None] = pool.submit(next, tiles, None)
        yield second
        while (tile := upcoming.result()) is not None:
            upcoming = pool.submit(next, tiles, None)
            yield tile


def _contiguous(piece: Array) -> Array:
    """The elements in C order as a 1-D array; not copied if they already lie so."""
    if piece.flags.c_contiguous:
        return piece.reshape(-1)
    out = np.empty(piece.shape, piece.dtype)
    _rearrange(piece, out)
    return out.reshape(-1)


_LINE = 64
"""Bytes of a line of the processor's cache."""


def _rearrange(piece: Array, out: Array) -> None:
    """`out[...] = piece`, a cache line at a time: three times as fast where axes change places."""
    if piece.ndim < 2 or piece.strides[-1] == piece.itemsize:
        out[...] = piece
        return
    width = max(_LINE // piece.itemsize, 4)
    if piece.shape[-1] < width:
        for i in range(piece.shape[-1]):
            _rearrange(piece[..., i], out[..., i])
    else:
        for i in range(0, piece.shape[-1], width):
            out[..., i : i + width] = piece[..., i : i + width]


def _c_order_blocks(shape: tuple[int, ...], limit: int) -> Iterator[list[Range]]:
    """Rectangles of at most `limit` elements that cover `shape` in C order."""
    axis, inner = len(shape), 1
    while axis > 0 and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield [(0, n) for n in shape]
        return
    axis -= 1
    step = max(1, limit // inner)
    tail: list[Range] = [(0, n) for n in shape[axis + 1 :]]
    for outer in np.ndindex(*shape[:axis]):
        head: list[Range] = [(i, i + 1) for i in outer]
        for start in range(0, shape[axis], step):
            yield [*head, (start, min(start + step, shape[axis])), *tail]


class Stored(Tensor):
    """Elements that lie in a `Storage`, at `offset` bytes, with `strides` in elements (C order if not given).

    The caller has checked that they lie inside it; reading checks again.
    """

    def __init__(
        self,
        storage: Storage,
        shape: Sequence[int],
        dtype: npt.DTypeLike,
        offset: int = 0,
        strides: Sequence[int] | None = None,
    ) -> None:
        self.storage = storage
        self.shape = tuple(int(n) for n in shape)
        self._stored_dtype = np.dtype(dtype)
        self.dtype = self._stored_dtype.newbyteorder("=")
        self.offset = offset
        self.strides = _c_strides(self.shape) if strides is None else tuple(int(s) for s in strides)
        self.streams = self.contiguous

    @property
    def contiguous(self) -> bool:
        """True if the elements lie in C order, in native byte order, without gaps."""
        return self._stored_dtype == self.dtype and all(
            s == c for s, c, n in zip(self.strides, _c_strides(self.shape), self.shape, strict=True) if n > 1
        )

    def block(self, ranges: Sequence[Range]) -> Array:
        shape = tuple(b - a for a, b in ranges)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        item = self._stored_dtype.itemsize
        start = sum(a * s for (a, _), s in zip(ranges, self.strides, strict=True))
        low = start + sum((n - 1) * s for n, s in zip(shape, self.strides, strict=True) if s < 0)
        span = 1 + sum((n - 1) * abs(s) for n, s in zip(shape, self.strides, strict=True))
        if span <= 2 * math.prod(shape) or span * item <= TILE:
            flat = self._read(low, span)
            byte_strides = tuple(s * item for s in self.strides)
            strided = np.ndarray(shape, self._stored_dtype, flat, (start - low) * item, byte_strides)
            return strided if self._stored_dtype == self.dtype else strided.astype(self.dtype)
        outer = max(range(len(shape)), key=lambda axis: abs(self.strides[axis]) if shape[axis] > 1 else -1)
        # Gaps between the wanted elements are read along with them unless they are most of it.
        dense = 8 * math.prod(shape) >= span
        step = max(1, TILE // (abs(self.strides[outer]) * item)) if dense else 1
        out = np.empty(shape, self.dtype)
        slot: list[slice | int] = [slice(None)] * len(shape)
        inner = list(ranges)
        for i in range(0, shape[outer], step):
            stop = min(i + step, shape[outer])
            slot[outer] = slice(i, stop)
            inner[outer] = (ranges[outer][0] + i, ranges[outer][0] + stop)
            out[tuple(slot)] = self.block(inner)
        return out

    def _read(self, first: int, count: int) -> Array:
        flat = np.empty(count, self._stored_dtype)
        buffer = flat.view(np.uint8).data
        self.storage.read_into(self.offset + first * self._stored_dtype.itemsize, buffer)
        return flat


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


class _InMemory(Tensor):
    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype.newbyteorder("=")
        self.streams = True

    def block(self, ranges: Sequence[Range]) -> Array:
        return self._array[tuple(slice(a, b) for a, b in ranges)].astype(self.dtype, copy=False)


def from_array(array: npt.ArrayLike) -> Tensor:
    """A tensor over an array in memory. The array is not copied."""
    return _InMemory(np.asarray(array))


class Computed(Tensor):
    """A tensor whose values a rule computes, whole, each time that a block is asked for; nothing of it is kept."""

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike, compute: Callable[[], Array]) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._compute = compute

    def block(self, ranges: Sequence[Range]) -> Array:
        whole = self._compute()
        assert whole.shape == self.shape and whole.dtype == self.dtype, (whole.shape, self.shape, whole.dtype)
        return whole[tuple(slice(a, b) for a, b in ranges)]


class Witnessed(Tensor):
    """A tensor that remembers the CRC-32 of its elements when they have been streamed once."""

    def __init__(self, base: Tensor) -> None:
        self._base = base
        self.shape = base.shape
        self.dtype = base.dtype
        self.streams = base.streams
        self._crc: int | None = None

    def block(self, ranges: Sequence[Range]) -> Array:
        return self._base.block(ranges)

    def tiles(self, limit: int = TILE) -> Iterator[Array]:
        crc = 0
        for tile in self._base.tiles(limit):
            crc = crc32(tile.view(np.uint8).data, crc)
            yield tile
        self._crc = crc

    def crc(self) -> int:
        """The CRC-32 of the elements, C order, in the machine's byte order."""
        if self._crc is None:
            for _ in self.tiles():
                pass
        assert self._crc is not None
        return self._crc


class _Permuted(Tensor):
    def __init__(self, base: Tensor, order: tuple[int, ...]) -> None:
        self._base, self._order = base, order
        self.shape = tuple(base.shape[i] for i in order)
        self.dtype = base.dtype

    def block(self, ranges: Sequence[Range]) -> Array:
        inner: list[Range] = [(0, 0)] * len(ranges)
        for position, axis in enumerate(self._order):
            inner[axis] = ranges[position]
        return self._base.block(inner).transpose(self._order)


class _Split(Tensor):
    def __init__(self, base: Tensor, axis: int, sizes: tuple[int, ...]) -> None:
        assert math.prod(sizes) == base.shape[axis], (base.shape, axis, sizes)
        self._base, self._axis, self._sizes = base, axis, sizes
        self.streams = base.streams
        self.shape = base.shape[:axis] + sizes + base.shape[axis + 1 :]
        self.dtype = base.dtype

    def block(self, ranges: Sequence[Range]) -> Array:
        axis, rank = self._axis, len(self._sizes)
        if any(a == b for a, b in ranges):
            return np.empty([b - a for a, b in ranges], self.dtype)
        split = list(ranges[axis : axis + rank])
        before, after = list(ranges[:axis]), list(ranges[axis + rank :])
        if rank == 0:
            return self._base.block([*before, (0, 1), *after]).reshape([b - a for a, b in ranges])
        fixed = 0
        while fixed < rank - 1 and split[fixed][1] - split[fixed][0] == 1:
            fixed += 1
        inner = math.prod(self._sizes[fixed + 1 :])
        base_start = 0
        for i in range(fixed):
            base_start += split[i][0] * math.prod(self._sizes[i + 1 :])
        first, last = split[fixed]
        fused = (base_start + first * inner, base_start + last * inner)
        block = self._base.block([*before, fused, *after])
        shape = [b - a for a, b in before] + [1] * fixed + [last - first, *self._sizes[fixed + 1 :]]
        block = block.reshape(shape + [b - a for a, b in after])
        rest = [slice(a, b) for a, b in split[fixed + 1 :]]
        return block[(slice(None),) * (axis + fixed + 1) + tuple(rest)]


class _Merged(Tensor):
    def __init__(self, base: Tensor, axis: int, count: int) -> None:
        self._base, self._axis, self._count = base, axis, count
        self.streams = base.streams
        self._sizes = base.shape[axis : axis + count]
        self.shape = (*base.shape[:axis], math.prod(self._sizes), *base.shape[axis + count :])
        self.dtype = base.dtype

    def block(self, ranges: Sequence[Range]) -> Array:
        axis, count = self._axis, self._count
        before, after = list(ranges[:axis]), list(ranges[axis + 1 :])
        start, stop = ranges[axis]
        inner = math.prod(self._sizes[1:]) if count else 1
        shape = [b - a for a, b in before] + [-1] + [b - a for a, b in after]
        if any(a == b for a, b in ranges):
            return np.empty([b - a for a, b in ranges], self.dtype)
        if count == 0:
            return self._base.block([*before, *after]).reshape([b - a for a, b in ranges])
        first, last = start // inner, -(-stop // inner)
        block = self._base.block([*before, (first, last), *((0, n) for n in self._sizes[1:]), *after])
        cut = slice(start - first * inner, stop - first * inner)
        return block.reshape(shape)[(slice(None),) * axis + (cut,)]


class _Taken(Tensor):
    def __init__(self, base: Tensor, axis: int, indices: tuple[int, ...]) -> None:
        self._base, self._axis, self._indices = base, axis, indices
        self.shape = (*base.shape[:axis], len(indices), *base.shape[axis + 1 :])
        self.dtype = base.dtype

    def block(self, ranges: Sequence[Range]) -> Array:
        start, stop = ranges[self._axis]
        wanted = self._indices[start:stop]
        if not wanted:
            return np.empty([b - a for a, b in ranges], self.dtype)
        low, high = min(wanted), max(wanted) + 1
        inner = list(ranges)
        if high - low <= 2 * len(wanted):
            inner[self._axis] = (low, high)
            return self._base.block(inner).take([i - low for i in wanted], axis=self._axis)
        pieces = []
        for i in wanted:
            inner[self._axis] = (i, i + 1)
            pieces.append(self._base.block(inner))
        return np.concatenate(pieces, axis=self._axis)


class _Stacked(Tensor):
    def __init__(self, parts: tuple[Tensor, ...], axis: int) -> None:
        self._parts, self._axis = parts, axis
        self.streams = axis == 0 and all(part.streams for part in parts)
        first = parts[0]
        assert all(p.shape == first.shape and p.dtype == first.dtype for p in parts)
        self.shape = (*first.shape[:axis], len(parts), *first.shape[axis:])
        self.dtype = first.dtype

    def block(self, ranges: Sequence[Range]) -> Array:
        start, stop = ranges[self._axis]
        inner = [*ranges[: self._axis], *ranges[self._axis + 1 :]]
        if start == stop:
            return np.empty([b - a for a, b in ranges], self.dtype)
        return np.stack([part.block(inner) for part in self._parts[start:stop]], axis=self._axis)


def stack(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape and dtype along a new axis, as `numpy.stack`."""
    return _Stacked(tuple(parts), axis)


class _Cast(Tensor):
    def __init__(self, base: Tensor, dtype: np.dtype[Any]) -> None:
        self._base = base
        self.shape = base.shape
        self.dtype = dtype
        self.streams = base.streams

    def block(self, ranges: Sequence[Range]) -> Array:
        return self._base.block(ranges).astype(self.dtype)


@dataclass(frozen=True)
class NativeTensor:
    """One tensor of a file: its full native name, its elements, and what else the file says of it.

    `identity` is equal for two tensors that share their elements in the file (tied weights), else unique or None.
    `state` marks what is no weight: counters, seeds, PRNG keys.
    """

    name: str
    data: Tensor
    identity: Hashable = None
    state: bool = False


@dataclass(frozen=True)
class NativeLayer:
    """One layer as its framework has it.

    `path` is its place in the model, dots between levels (`encoder.rnn`). `cls` is the framework's own class name
    without its module (`Conv2d`, `Bidirectional`), or None where the file does not say. `config` holds the class's
    own settings in the framework's own words. `tensors` maps the convention's local names (`weight`,
    `weight_ih_l0`, `kernel`, `forward_layer/recurrent_kernel`) to tensors. `evidence` says how `cls` is known:
    `class` (the file names it), `graph`, `name` (deduced from names), or `none`.
    """

    path: str
    cls: str | None
    tensors: Mapping[str, NativeTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    evidence: str = "none"


@dataclass(frozen=True)
class NativeModel:
    """A whole file or live object, as a reader sees it.

    `graph` is how the layers are wired, where the file says it. `splits` tells which axes of which layers cross a
    Flatten or Reshape, and with how many channels: {"fc1": {"in": 16}}; a dense layer or norm that is named there with
    nothing ({"fc2": {}}) is known to cross none, one that is not named is undecided. `unsettled` names layers of which
    the file says that their axis joins others, but not in which order; `orderless` those of which the graph says an order
    that is none of channels and positions.
    `layers` is in the file's own order; `ordered` is true when that order is the order of computation (a graph, a
    Sequential) and not merely of definition. `collections` holds weight sets beside the one read (optimizer, EMA):
    name -> tensors. `metadata` is what the writer of the same format needs to give the file back as it was.
    `notes` are one-line remarks for the user (unknown classes met, prefixes stripped).
    """

    framework: str
    format: str
    layers: tuple[NativeLayer, ...]
    graph: Graph | None = None
    splits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    ordered: bool = False
    collections: Mapping[str, tuple[NativeTensor, ...]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    close: Callable[[], None] = field(default=lambda: None, compare=False)
    unsettled: frozenset[str] = frozenset()
    orderless: frozenset[str] = frozenset()

    def tensors(self) -> Iterator[NativeTensor]:
        """Every tensor of every layer, in order."""
        for layer in self.layers:
            yield from layer.tensors.values()
