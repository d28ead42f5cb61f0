"""A copy of a torch.save file in which some tensors have new elements, and all else is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, Final

import numpy as np

from neutral.containers.files import pieces
from neutral.containers.torch_file import Elements, TorchFile
from neutral.containers.torch_refs import DTYPES, TensorRef
from neutral.errors import Problem, Refused, printable, raise_all
from neutral.native import Array, Tensor

_SCATTER_LIMIT: Final = 256 << 20


@dataclass(frozen=True)
class _Run:
    """Elements that lie without gaps at byte `start`, in the order of `data`."""

    name: str
    start: int
    data: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.data.nbytes


def fill(source: TorchFile, entries: Sequence[tuple[str, TensorRef, Tensor]], out: BinaryIO) -> None:
    """Write a copy of `source` in which the tensors named have new elements: (name for errors, reference, elements).

    All else stays byte for byte: the pickles, other storages, the bytes of a storage between its tensors. Tensors that
    share elements must agree on them.
    """
    problems = []
    by_storage: dict[str, list[tuple[str, TensorRef, Tensor]]] = {}
    for name, ref, data in entries:
        dtype = DTYPES.get(ref.dtype)
        if data.shape != ref.shape or data.dtype != dtype:
            problems.append(
                Problem(name, f"{data.dtype}{list(data.shape)}", f"{ref.dtype}{list(ref.shape)} as in the template")
            )
        elif ref.size:
            by_storage.setdefault(ref.storage.key, []).append((name, ref, data))
    raise_all(Refused, problems)
    source.copy_with(out, {key: _filled(source, key, members) for key, members in by_storage.items()})


def _filled(source: TorchFile, key: str, members: Sequence[tuple[str, TensorRef, Tensor]]) -> Iterator[memoryview]:
    runs: dict[object, _Run] = {}
    dense = True
    for name, ref, data in members:
        run, order = _run(name, ref, data)
        if run is None:
            dense = False
            break
        twin = runs.setdefault((run.start, run.data.shape, order, run.data.dtype), run)
        if twin.data is not run.data:
            _compare(twin, run)
    ordered = sorted(runs.values(), key=lambda run: run.start)
    apart = all(a.stop <= b.start for a, b in pairwise(ordered))
    return _streamed(source, key, ordered) if dense and apart else _scattered(source, key, members)


def _run(name: str, ref: TensorRef, data: Tensor) -> tuple[_Run | None, tuple[int, ...]]:
    """The tensor as a run of bytes if its elements lie without gaps, in whatever order of its axes."""
    order = tuple(sorted(range(len(ref.shape)), key=lambda axis: (-ref.strides[axis], axis)))
    step = 1
    for axis in reversed(order):
        if ref.shape[axis] > 1 and ref.strides[axis] != step:
            return None, order
        step *= ref.shape[axis]
    if ref.conj or ref.neg:
        data = Elements(data, data.dtype, ref.conj, ref.neg)
    return _Run(name, ref.storage.first + ref.offset * data.dtype.itemsize, data.permute(order)), order


def _compare(one: _Run, other: _Run) -> None:
    for a, b in zip(one.data.tiles(), other.data.tiles(), strict=True):
        if a.tobytes() != b.tobytes():
            raise _disagree(one.name, other.name)


def _disagree(one: str, other: str) -> Refused:
    return Refused(
        Problem(
            other,
            f"elements that differ from those of {printable(one, 80)}",
            "equal ones, for the template stores them once (tied weights)",
            "untie them in the template, or give both the same values",
        )
    )


def _streamed(source: TorchFile, key: str, runs: Sequence[_Run]) -> Iterator[memoryview]:
    size = source.size_of(key)
    at = 0
    for run in runs:
        yield from pieces(source.storage(key, whole=False), at, run.start)
        plain = source.plain(run.data.dtype)
        for tile in run.data.tiles():
            yield _bytes(_stored(tile, plain))
        at = run.stop
    yield from pieces(source.storage(key, whole=False), at, size)


def _stored(values: Array, plain: np.dtype[Any]) -> Array:
    if plain == values.dtype:
        return values
    return values.view(plain.newbyteorder("=")).astype(plain) if values.dtype.isbuiltin == 2 else values.astype(plain)


def _scattered(source: TorchFile, key: str, members: Sequence[tuple[str, TensorRef, Tensor]]) -> Iterator[memoryview]:
    size = source.size_of(key)
    if size > _SCATTER_LIMIT:
        raise Refused(
            Problem(
                members[0][0],
                f"views that overlap or have gaps, in a storage of {size >> 20} MB",
                f"at most {_SCATTER_LIMIT >> 20} MB",
                "save the template with contiguous tensors",
            )
        )
    buffer = bytearray(size)
    source.storage(key).read_into(0, memoryview(buffer))
    views = []
    for name, ref, data in members:
        plain = source.plain(data.dtype)
        start = ref.storage.first + ref.offset * plain.itemsize
        view: Array = np.ndarray(ref.shape, plain, buffer, start, tuple(s * plain.itemsize for s in ref.strides))
        values = _stored((Elements(data, data.dtype, ref.conj, ref.neg) if ref.conj or ref.neg else data).read(), plain)
        view[...] = values
        views.append((name, view, values))
    for name, view, values in views:
        if view.tobytes() != values.tobytes():
            raise _disagree("another view of the same storage", name)
    yield memoryview(buffer)


def _bytes(tile: Array) -> memoryview:
    return tile.view(np.uint8).data.cast("B")
