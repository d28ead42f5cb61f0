"""Lazy tensors are numpy's arrays, read piece by piece."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neutral import native
from neutral.containers.files import Memory
from neutral.errors import BadFile
from neutral.native import Computed, Stored, Tensor, from_array, stack

DTYPES = [
    np.dtype(t) for t in ("<f4", ">f4", "<f8", ">i2", "u1", "?", "<c8", "<f2", ml_dtypes.bfloat16, ml_dtypes.int4)
]


class Counting:
    """A storage that knows how much was read from it, and the largest piece."""

    def __init__(self, data: bytes) -> None:
        self._data = Memory(data)
        self.total = self.largest = 0

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.total += len(buffer)
        self.largest = max(self.largest, len(buffer))
        self._data.read_into(offset, buffer)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal shape, dtype but for its byte order, and bits."""
    native_order = wanted.astype(wanted.dtype.newbyteorder("="))
    return (
        isinstance(found, np.ndarray)
        and found.shape == wanted.shape
        and found.dtype == native_order.dtype
        and found.tobytes() == native_order.tobytes()
    )


def filled(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return (np.arange(math.prod(shape)) % 7).reshape(shape).astype(dtype)


@st.composite
def bases(draw: st.DrawFn) -> tuple[Tensor, np.ndarray]:
    """A tensor and the array it should be: in memory, or stored with strides of any sign, gaps and an offset."""
    shape = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 3, 4, 6)), max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    match draw(st.sampled_from(("memory", "plain", "strided"))):
        case "memory":
            array = filled(shape, dtype)
            return from_array(array), array
        case "plain":
            array, gap = filled(shape, dtype), draw(st.integers(0, 9))
            return Stored(Memory(b"?" * gap + array.tobytes()), shape, dtype, gap), array
        case _:
            order = draw(st.permutations(range(len(shape))))
            padded = [n + draw(st.integers(0, 2)) for n in shape]
            whole = filled(tuple(padded[i] for i in order), dtype).transpose(np.argsort(order).tolist())
            signs = [draw(st.sampled_from((1, -1))) for _ in shape]
            cuts = [slice(n) if s > 0 else slice(-1, -n - 1, -1) for n, s in zip(shape, signs, strict=True)]
            array = whole[(..., *cuts)]
            memory = whole.transpose(list(order)).tobytes()
            start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
            strides = [s // dtype.itemsize for s in array.strides]
            return Stored(Memory(memory), shape, dtype, start if array.size else 0, strides), array


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, np.ndarray]:
    """A chain of views of a tensor, and the same chain of numpy's own operations."""
    tensor, array = draw(bases())
    for _ in range(draw(st.integers(0, 5))):
        axis = draw(st.integers(0, max(array.ndim - 1, 0)))
        size = array.shape[axis] if array.ndim else 0
        match draw(st.sampled_from(("permute", "split", "merge", "insert", "take", "stack", "cast", "drop"))):
            case "permute":
                order = draw(st.permutations(range(array.ndim)))
                tensor, array = tensor.permute(order), array.transpose(order)
            case "split" if array.ndim:
                first = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0] or [3]))
                sizes = (first, size // first)
                tensor = tensor.split(axis, sizes)
                array = array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])
            case "drop" if size == 1:
                tensor, array = tensor.split(axis, ()), array.squeeze(axis)
            case "merge" if array.ndim:
                count = draw(st.integers(1, array.ndim - axis))
                joined = math.prod(array.shape[axis : axis + count])
                tensor = tensor.merge(axis, count)
                array = array.reshape(*array.shape[:axis], joined, *array.shape[axis + count :])
            case "insert":
                tensor, array = tensor.merge(axis, 0), np.expand_dims(array, axis)
            case "take" if size:
                indices = draw(st.lists(st.integers(0, size - 1), max_size=5))
                tensor, array = tensor.take(axis, indices), array.take(np.array(indices, int), axis)
            case "stack":
                tensor, array = stack([tensor, tensor], axis), np.stack([array, array], axis)
            case "cast" if array.dtype.kind != "c":
                tensor, array = tensor.cast("float32"), array.astype("float32")
        assert tensor.shape == array.shape
    return tensor, array


@settings(max_examples=1000, deadline=None)
@given(views(), st.data())
def test_views_are_those_of_numpy(pair: tuple[Tensor, np.ndarray], data: st.DataObject) -> None:
    tensor, array = pair
    assert (tensor.shape, tensor.size, tensor.nbytes) == (array.shape, array.size, array.nbytes)
    assert same(tensor.read(), array) and tensor.read().flags.c_contiguous
    ranges = [tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in array.shape]
    assert same(np.asarray(tensor.block(ranges)), array[tuple(slice(a, b) for a, b in ranges)])


@settings(max_examples=800, deadline=None)
@given(views(), st.integers(1, 400), st.sampled_from((16, 64, 1 << 20)))
def test_tiles_are_the_elements_in_order(pair: tuple[Tensor, np.ndarray], limit: int, whole: int) -> None:
    tensor, array = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "WHOLE", whole)
        patch.setattr(native, "TILE", 32)
        tiles = [tile.copy() for tile in tensor.tiles(limit)]
    assert all(tile.ndim == 1 and tile.flags.c_contiguous for tile in tiles)
    assert all(tile.size and tile.nbytes <= max(limit, tile.itemsize) for tile in tiles)
    joined = np.concatenate(tiles) if tiles else np.empty(0, tensor.dtype)
    assert same(joined, array.reshape(-1))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 4])
def test_a_tile_is_not_wasted(dtype: np.dtype[Any]) -> None:
    """What fits in one tile is one tile; else tiles are as full as rows allow."""
    tensor = from_array(filled((4, 10), dtype))
    assert [tile.size for tile in tensor.tiles(160)] == [40]
    assert [tile.size for tile in tensor.tiles(100)] == [20, 20]
    assert [tile.size for tile in tensor.tiles(1)] == [1] * 40


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.permute((1, 0)),
        lambda t: t.split(1, (4, 16)).permute((1, 2, 0)),
        lambda t: t.split(0, (32, 16)).permute((2, 0, 1)).merge(0, 2),
        lambda t: t.take(0, range(511, -1, -1)).permute((1, 0)),
        lambda t: t.cast("float64").permute((1, 0)),
        lambda t: stack([t, t], 1),
    ],
)
def test_a_large_tensor_is_read_in_small_pieces(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No reading takes more than the limits allow, and views do not multiply what is read."""
    monkeypatch.setattr(native, "WHOLE", 4096)
    monkeypatch.setattr(native, "TILE", 2048)
    array = np.arange(512 * 64, dtype=np.float32).reshape(512, 64)
    storage = Counting(array.tobytes())
    tensor = view(Stored(storage, array.shape, array.dtype))
    wanted = view(from_array(array)).read()
    storage.total = storage.largest = 0
    pieces = list(tensor.tiles(2048))
    assert same(np.concatenate(pieces), wanted.reshape(-1))
    assert storage.largest <= 2 * 4096
    streamed = wanted.size * array.itemsize
    assert streamed <= storage.total <= 16 * streamed


def test_a_block_reads_what_was_asked_for() -> None:
    array = np.arange(6000, dtype=np.int16).reshape(60, 100)
    storage = Counting(array.tobytes())
    tensor = Stored(storage, array.shape, array.dtype)
    assert same(tensor.block([(7, 9), (0, 100)]), array[7:9])
    assert storage.total == 2 * 100 * 2
    tensor.permute((1, 0)).split(0, (10, 10)).merge(1, 2).take(0, [3])
    assert storage.total == 2 * 100 * 2, "a view reads nothing"
    tensor.block([(7, 7), (0, 100)])
    assert storage.total == 2 * 100 * 2, "nothing is read for nothing"


def test_elements_outside_of_the_storage_are_a_bad_file() -> None:
    for tensor in (
        Stored(Memory(bytes(15)), (4,), "f4"),
        Stored(Memory(bytes(16)), (4,), "f4", 1),
        Stored(Memory(bytes(16)), (4,), "f4", 0, (-1,)),
        Stored(Memory(bytes(16)), (2, 2), "f4", 0, (4, 1)),
    ):
        with pytest.raises(BadFile):
            tensor.read()
    assert Stored(Memory(b""), (0, 1 << 40), "f4", 1 << 50).read().shape == (0, 1 << 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scalar_stays_a_scalar(dtype: np.dtype[Any]) -> None:
    array = np.asarray(1).astype(dtype)
    for tensor in (from_array(array), Stored(Memory(array.tobytes()), (), dtype)):
        assert same(tensor.read(), array)
        assert [tile.shape for tile in tensor.tiles()] == [(1,)]
        assert same(tensor.merge(0, 0).read(), array.reshape(1))
        assert same(stack([tensor, tensor]).read(), np.stack([array, array]))
        assert same(tensor.merge(0, 0).split(0, ()).read(), array)


def test_byte_order_and_contiguity_are_told_truly() -> None:
    little, big = np.arange(6, dtype="<i4").reshape(2, 3), np.arange(6, dtype=">i4").reshape(2, 3)
    for array in (little, big):
        tensor = Stored(Memory(array.tobytes()), (2, 3), array.dtype)
        assert tensor.dtype == np.dtype("=i4") and tensor.contiguous == array.dtype.isnative
        assert same(tensor.read(), little.astype("=i4"))
    assert not Stored(Memory(bytes(24)), (2, 3), "=i4", 0, (1, 2)).contiguous
    assert Stored(Memory(bytes(12)), (1, 3), "=i4", 0, (77, 1)).contiguous, "the stride of one element is no stride"


def test_a_view_that_changes_nothing_is_the_tensor_itself() -> None:
    tensor = from_array(np.zeros((2, 3)))
    assert tensor.permute((0, 1)) is tensor
    assert tensor.split(0, (2,)) is tensor
    assert tensor.merge(1, 1) is tensor
    assert tensor.take(1, range(3)) is tensor
    assert tensor.cast("float64") is tensor


def test_what_cannot_be_is_an_error() -> None:
    tensor = from_array(np.zeros((2, 3)))
    with pytest.raises(AssertionError):
        tensor.split(1, (2, 2))
    with pytest.raises(AssertionError):
        stack([tensor, from_array(np.zeros((2, 4)))])
    with pytest.raises(AssertionError):
        stack([tensor, from_array(np.zeros((2, 3), "f4"))])
    with pytest.raises(AssertionError):
        Computed((2,), "f4", lambda: np.zeros(3, "f4")).read()


def test_a_rule_computes_when_it_is_asked_and_not_before() -> None:
    calls = []

    def compute() -> np.ndarray:
        calls.append(None)
        return np.arange(6.0).reshape(2, 3)

    tensor = Computed((2, 3), "f8", compute).permute((1, 0)).merge(0, 2)
    assert not calls
    assert tensor.read().tolist() == [0, 3, 1, 4, 2, 5] and len(calls) == 1
    assert np.concatenate(list(tensor.tiles(16))).tolist() == [0, 3, 1, 4, 2, 5] and len(calls) == 2
