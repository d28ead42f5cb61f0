"""Whole numbers that an ONNX graph computes of the shapes of its values: sizes for a Reshape, ends for a Slice.

A number is None where it depends on a size that is not known.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping

from neutral.containers.onnx import NodeProto
from neutral.conventions.onnx_scope import Numbers, Scope

ShapeOf = Callable[[str], Numbers | None]
_MOST_STEPS = 64
_LONGEST = 64

_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": lambda a, b: int(math.copysign(abs(a) // abs(b), a * b)) if a else 0,
}
_KEPT = ("Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that change how numbers lie, but not which they are and in which order."""


def numbers_of(scope: Scope, shape_of: ShapeOf, value: str, depth: int = 0) -> Numbers | None:
    """The numbers of a value in their order, or None if they are not a short list that can be told."""
    if not value or depth > _MOST_STEPS:
        return None
    told = scope.numbers(value)
    if told is not None and None not in told:
        return told
    node = scope.makers.get(value)
    if node is None or node.domain or len(node.inputs) > _LONGEST:
        return told

    def of(i: int) -> Numbers | None:
        return numbers_of(scope, shape_of, node.inputs[i], depth + 1) if len(node.inputs) > i else None

    match node.op_type:
        case "Shape":
            shape = shape_of(node.inputs[0])
            return None if shape is None else shape[_attribute(node, "start") : _attribute(node, "end")]
        case "Size":
            shape = shape_of(node.inputs[0])
            return (
                None
                if shape is None
                else (math.prod(n for n in shape if n is not None) if None not in shape else None,)
            )
        case "Concat":
            parts = [of(i) for i in range(len(node.inputs))]
            if any(part is None for part in parts):
                return None
            joined = tuple(n for part in parts if part is not None for n in part)
            return joined if len(joined) <= _LONGEST else None
        case "Gather":
            found, places = of(0), of(1)
            if found is None or places is None or None in places:
                return None
            return tuple(found[i] for i in places if i is not None and -len(found) <= i < len(found))
        case "Slice":
            return _sliced(of(0), [of(i) for i in range(1, len(node.inputs))])
        case "ReduceProd":
            found = of(0)
            return (
                None
                if found is None
                else (math.prod(n for n in found if n is not None) if None not in found else None,)
            )
        case op if op in _ARITHMETIC:
            return _computed(op, of(0), of(1))
        case op if op in _KEPT:
            return of(0)
    return told


def _attribute(node: NodeProto, name: str) -> int | None:
    value = node.attributes.get(name)
    return value if type(value) is int else None


def _sliced(found: Numbers | None, rest: list[Numbers | None]) -> Numbers | None:
    if found is None or len(rest) < 2 or any(part is None or len(part) != 1 or part[0] is None for part in rest):
        return None
    given = [part[0] for part in rest if part is not None]
    start, end = given[:2]
    axis = given[2] if len(given) > 2 else 0
    step = given[3] if len(given) > 3 else 1
    return found[start:end] if axis in (0, -1) and step == 1 else None


def _computed(op: str, one: Numbers | None, other: Numbers | None) -> Numbers | None:
    if one is None or other is None or (len(one) != len(other) and 1 not in (len(one), len(other))):
        return None
    count = max(len(one), len(other))
    pairs = zip(one * (count if len(one) == 1 else 1), other * (count if len(other) == 1 else 1), strict=True)
    return tuple(
        None if a is None or b is None or (op == "Div" and b == 0) else _ARITHMETIC[op](a, b) for a, b in pairs
    )
