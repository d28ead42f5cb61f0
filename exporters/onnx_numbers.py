"""Whole numbers that an ONNX graph computes of the shapes of its values: sizes for a Reshape, ends for a Slice.

A number is None where it depends on a size that is not known.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from neutral.containers.onnx import NodeProto
from neutral.containers.onnx_constants import forward
from neutral.conventions.onnx_scope import Numbers, Scope

ShapeOf = Callable[[str], Numbers | None]
Some = npt.NDArray[np.object_]
"""Numbers and None, in their shape."""

_MOST_STEPS = 64
_LONGEST = 64
_LARGEST = 1 << 64
_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "Mod": operator.mod,
    "Max": max,
    "Min": min,
}


class Computing:
    """The numbers of values, node by node from constants and shapes on; what was computed once is kept."""

    def __init__(self, scope: Scope, shape_of: ShapeOf) -> None:
        self.scope, self.shape_of = scope, shape_of
        self._found: dict[str, Some | None] = {}

    def numbers(self, value: str) -> Numbers | None:
        """The numbers of a value in their order, or None if they are not a short list that can be told."""
        found = self._value(value, 0)
        return None if found is None else tuple(None if n is None else int(n) for n in found.reshape(-1))

    def _value(self, name: str, depth: int) -> Some | None:
        if not name or depth > _MOST_STEPS:
            return None
        if name not in self._found:
            self._found[name] = self._computed(name, depth)
        return self._found[name]

    def _computed(self, name: str, depth: int) -> Some | None:
        stored = self.scope.constant(name)
        if stored is not None:
            tensor = forward(stored)
            return tensor.read().astype(object) if tensor.size <= _LONGEST and tensor.dtype.kind in "iu" else None
        node = self.scope.makers.get(name)
        if node is None or node.domain or len(node.inputs) > _LONGEST or not node.outputs or node.outputs[0] != name:
            return None
        if node.op_type in ("Shape", "Size"):
            return _of_shape(node, self.shape_of(node.inputs[0]))
        ins = [self._value(each, depth + 1) if each else None for each in node.inputs]
        if any(found is None for found, each in zip(ins, node.inputs, strict=True) if each):
            return None
        try:
            made = _made(node, ins)
        except (ArithmeticError, IndexError, TypeError, ValueError):
            return None
        small = (
            made is not None and made.size <= _LONGEST and all(n is None or abs(n) < _LARGEST for n in made.reshape(-1))
        )
        return made if small else None


def _of_shape(node: NodeProto, shape: Numbers | None) -> Some | None:
    if shape is None:
        return None
    if node.op_type == "Size":
        return _some(None if None in shape else reduce(operator.mul, (n for n in shape if n is not None), 1))
    start, end = (_number(node, name) for name in ("start", "end"))
    return _some(shape[start:end])


def _some(values: Any) -> Some:
    found: Some = np.asarray(values, object)
    return found


def _number(node: NodeProto, name: str) -> int | None:
    value = node.attributes.get(name)
    return value if type(value) is int else None


def _known(found: Some | None) -> list[int] | None:
    """Numbers that must all be known; None where there are none."""
    if found is None:
        return None
    return [operator.index(n) for n in found.reshape(-1)]


def _made(node: NodeProto, ins: Sequence[Any]) -> Any:
    """What an operator makes of numbers: a `Some`, or None for an operator that is not known."""
    attributes: Mapping[str, Any] = node.attributes
    match node.op_type:
        case "Constant":
            value = attributes.get("value_ints", attributes.get("value_int"))
            return _some(value) if isinstance(value, int | tuple) else None
        case "ConstantOfShape":
            held = getattr(attributes.get("value"), "data", None)
            shape = _known(ins[0]) or []
            if math.prod(max(n, 0) for n in shape) > _LONGEST:
                return None
            return np.full(shape, 0 if held is None else int(held.read().reshape(())), object)
        case "Cast" | "CastLike" | "Identity":
            found: Some = ins[0]
            return found
        case "Concat":
            return np.concatenate(ins, axis=_number(node, "axis") or 0)
        case "Gather":
            return np.take(ins[0], ins[1].astype(np.int64), axis=_number(node, "axis") or 0)
        case "Reshape":
            return _some(ins[0]).reshape(_known(ins[1]) or ())
        case "Squeeze":
            axes = _known(ins[1]) if len(ins) > 1 else attributes.get("axes")
            return np.squeeze(ins[0], None if axes is None else tuple(axes))
        case "Unsqueeze":
            axes = _known(ins[1]) if len(ins) > 1 else attributes.get("axes")
            return np.expand_dims(ins[0], tuple(axes or ()))
        case "Transpose":
            return np.transpose(ins[0], attributes.get("perm"))
        case "Slice":
            return _sliced(ins)
        case "ReduceProd":
            return _some([None if None in ins[0] else reduce(operator.mul, ins[0].reshape(-1), 1)])
        case op if op in _ARITHMETIC:
            compute = _ARITHMETIC[op]
            return reduce(np.frompyfunc(lambda a, b: None if a is None or b is None else compute(a, b), 2, 1), ins)
    return None


def _sliced(ins: Sequence[Some | None]) -> Some | None:
    data = ins[0]
    starts, ends, axes, steps = [*(_known(found) for found in ins[1:]), None, None, None][:4]
    if data is None or starts is None or ends is None:
        return None
    ranges = [slice(None)] * data.ndim
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        step = steps[i] if steps else 1
        # An end far in front of the first element is the way to take that one, too, when running backwards.
        end = None if step < 0 and ends[i] < -data.shape[axis] else ends[i]
        ranges[axis] = slice(starts[i], end, step)
    return data[tuple(ranges)]
