"""What nodes of an ONNX model make of its tensors alone: the same elements in other places, and the way back.

Exporters store a weight in one way and use it in another: transposed, reshaped, or, as torch's LSTM, cut into gates and joined
anew. An `Expression` is such a value. `forward` gives its elements as a view; `backward` takes elements that it should have, and
gives for each stored tensor those that it then must have. Nothing here changes a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neutral.containers.onnx_tensors import TensorProto
from neutral.native import Array, Range, Tensor, from_array

Box = tuple[Range, ...]


@dataclass(frozen=True)
class Leaf:
    """A stored tensor."""

    name: str
    tensor: TensorProto

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape


@dataclass(frozen=True)
class Permuted:
    """The axes of a value in another order."""

    base: Expression
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape[i] for i in self.order)


@dataclass(frozen=True)
class Reshaped:
    """The elements of a value, in C order, in another shape."""

    base: Expression
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A range of one axis of a value."""

    base: Expression
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.base.shape[: self.axis], self.stop - self.start, *self.base.shape[self.axis + 1 :])


@dataclass(frozen=True)
class Joined:
    """Values one behind the other along an axis."""

    parts: tuple[Expression, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.axis], sum(p.shape[self.axis] for p in self.parts), *first[self.axis + 1 :])


Expression = Leaf | Permuted | Reshaped | Cut | Joined


class _Concatenated(Tensor):
    """Tensors of one dtype along an axis, as `numpy.concatenate`."""

    def __init__(self, parts: Sequence[Tensor], axis: int) -> None:
        self._parts, self._axis = tuple(parts), axis
        first = parts[0].shape
        self.shape = (*first[:axis], sum(part.shape[axis] for part in parts), *first[axis + 1 :])
        self.dtype = parts[0].dtype

    def block(self, ranges: Sequence[Range]) -> Array:
        start, stop = ranges[self._axis]
        found, first = [], 0
        for part in self._parts:
            size = part.shape[self._axis]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                inner = list(ranges)
                inner[self._axis] = (low, high)
                found.append(part.block(inner))
            first += size
        if not found:
            return np.empty([b - a for a, b in ranges], self.dtype)
        return found[0] if len(found) == 1 else np.concatenate(found, axis=self._axis)


def leaves(expression: Expression) -> Iterator[Leaf]:
    """The stored tensors of an expression, in its order."""
    match expression:
        case Leaf():
            yield expression
        case Joined():
            for part in expression.parts:
                yield from leaves(part)
        case _:
            yield from leaves(expression.base)


def forward(expression: Expression) -> Tensor:
    """The elements of an expression, unread."""
    match expression:
        case Leaf():
            assert expression.tensor.data is not None
            return expression.tensor.data
        case Permuted():
            return forward(expression.base).permute(expression.order)
        case Reshaped():
            return _reshaped(forward(expression.base), expression.shape)
        case Cut():
            return _cut(forward(expression.base), expression.axis, expression.start, expression.stop)
        case Joined():
            return _Concatenated([forward(part) for part in expression.parts], expression.axis)


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.merge(0, len(tensor.shape)).split(0, shape)


def _cut(tensor: Tensor, axis: int, start: int, stop: int) -> Tensor:
    return tensor.take(axis, range(start, stop))


@dataclass(frozen=True)
class _Part:
    name: str
    box: Box
    data: Tensor


def backward(expression: Expression, new: Tensor) -> dict[str, Tensor]:
    """The stored tensors of which the expression makes `new`. It must be `undoable`."""
    parts: dict[str, list[_Part]] = {}
    for part in _backward(expression, _whole(expression.shape), new):
        parts.setdefault(part.name, []).append(part)
    shapes = {leaf.name: leaf.shape for leaf in leaves(expression)}
    return {name: _assembled(found, shapes[name]) for name, found in parts.items()}


def undoable(expression: Expression) -> bool:
    """True if every element of every stored tensor is in the expression once."""
    blank = from_array(np.broadcast_to(np.zeros((), np.bool_), expression.shape))
    try:
        parts: dict[str, list[_Part]] = {}
        for part in _backward(expression, _whole(expression.shape), blank):
            parts.setdefault(part.name, []).append(part)
        for leaf in leaves(expression):
            _assembled(parts[leaf.name], leaf.shape)
    except _NotUndoable:
        return False
    return True


class _NotUndoable(Exception):
    pass


def _whole(shape: Sequence[int]) -> Box:
    return tuple((0, n) for n in shape)


def _backward(expression: Expression, box: Box, new: Tensor) -> Iterator[_Part]:
    """What the stored tensors must have so that `box` of the expression is `new`."""
    match expression:
        case Leaf():
            yield _Part(expression.name, box, new)
        case Permuted():
            order = expression.order
            inverse = sorted(range(len(order)), key=order.__getitem__)
            yield from _backward(expression.base, tuple(box[i] for i in inverse), new.permute(inverse))
        case Reshaped():
            if box != _whole(expression.shape):
                raise _NotUndoable
            inner = expression.base.shape
            yield from _backward(expression.base, _whole(inner), _reshaped(new, inner))
        case Cut():
            inside = list(box)
            low, high = box[expression.axis]
            inside[expression.axis] = (low + expression.start, high + expression.start)
            yield from _backward(expression.base, tuple(inside), new)
        case Joined():
            axis, first = expression.axis, 0
            low, high = box[axis]
            for part in expression.parts:
                size = part.shape[axis]
                start, stop = max(low, first), min(high, first + size)
                if start < stop:
                    inside = list(box)
                    inside[axis] = (start - first, stop - first)
                    yield from _backward(part, tuple(inside), _cut(new, axis, start - low, stop - low))
                first += size


def _assembled(parts: Sequence[_Part], shape: tuple[int, ...]) -> Tensor:
    """Parts that follow each other along one axis and fill a tensor of this shape."""
    if len(parts) == 1 and parts[0].box == _whole(shape):
        return parts[0].data
    axes = [axis for axis, n in enumerate(shape) if any(part.box[axis] != (0, n) for part in parts)]
    if len(axes) != 1:
        raise _NotUndoable
    (axis,) = axes
    ordered = sorted(parts, key=lambda part: part.box[axis])
    at = 0
    for part in ordered:
        if part.box[axis][0] != at:
            raise _NotUndoable
        at = part.box[axis][1]
    if at != shape[axis]:
        raise _NotUndoable
    return _Concatenated([part.data for part in ordered], axis)


def reshaped(base: Expression, sizes: Sequence[int | None], allow_zero: bool = False) -> Expression | None:
    """ONNX's Reshape of a value: 0 keeps a size, -1 is what is left; None if the sizes are not known or do not fit."""
    shape: list[int] = []
    for i, n in enumerate(sizes):
        if n is None or n < -1:
            return None
        shape.append(base.shape[i] if n == 0 and not allow_zero and i < len(base.shape) else n)
    if shape.count(-1) > 1:
        return None
    total = math.prod(base.shape)
    if -1 in shape:
        rest = -math.prod(shape)
        if not rest or total % rest:
            return None
        shape[shape.index(-1)] = total // rest
    if math.prod(shape) != total:
        return None
    return base if tuple(shape) == base.shape else Reshaped(base, tuple(shape))


def sliced(base: Expression, starts: Mapping[int, int], stops: Mapping[int, int]) -> Expression:
    """ONNX's Slice with steps of one: ends beyond an axis are its end, negative ones count from it."""
    found = base
    for axis, start in starts.items():
        size = base.shape[axis]
        low, high = (min(max(n + size if n < 0 else n, 0), size) for n in (start, stops[axis]))
        if (low, high) != (0, size):
            found = Cut(found, axis, low, max(low, high))
    return found
