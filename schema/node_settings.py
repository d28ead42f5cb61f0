"""What the attributes of a node ask for: pads, slices, scales, sizes.

>>> node = Node(name="s", op="Slice", inputs=("x",), outputs=("y",), attributes={"starts": (1,), "ends": (3,), "axes": (1,)})
>>> slices(node, 2)
[slice(None, None, None), slice(1, 3, 1)]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from neutral.schema.graph import Node

Shape = tuple[int, ...]


class Misfit(Exception):
    """A shape that an operator cannot take."""


def ints(node: Node, name: str) -> Shape | None:
    """An attribute that is a list of integers, or None where it is absent."""
    value = node.attributes.get(name)
    if value is None:
        return None
    if isinstance(value, int):
        return (value,)
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return tuple(int(v) for v in value)  # type: ignore[arg-type]
    raise Misfit(f"{name}={value!r}")


def pads_of(node: Node, rank: int) -> tuple[tuple[int, int], ...]:
    """A Pad node's (before, after) for each of all `rank` axes."""
    flat = ints(node, "pads") or ()
    axes = ints(node, "axes") or tuple(range(rank))
    if len(flat) != 2 * len(axes):
        raise Misfit(f"{len(flat)} pads for {len(axes)} axes")
    pairs = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        pairs[axis] = (flat[i], flat[i + len(axes)])
    return tuple(pairs)


def pool_pads(node: Node, rank: int) -> tuple[tuple[int, int], ...] | str:
    """A pooling's explicit (before, after) per spatial axis, or its automatic rule."""
    auto = node.attributes.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return str(auto)
    flat = ints(node, "pads") or (0,) * (2 * rank)
    if len(flat) != 2 * rank:
        raise Misfit(f"{len(flat)} pads for {rank} spatial axes")
    return tuple((flat[i], flat[i + rank]) for i in range(rank))


def slices(node: Node, rank: int) -> list[slice]:
    """A Slice node's ranges, one for each of all `rank` axes."""
    starts, ends = ints(node, "starts") or (), ints(node, "ends") or ()
    axes = ints(node, "axes") or tuple(range(len(starts)))
    steps = ints(node, "steps") or (1,) * len(starts)
    out = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise Misfit(f"a step of {step}")
        out[axis] = slice(start, end, step)
    return out


def scales_of(node: Node, rank: int) -> tuple[float, ...] | None:
    """A Resize node's factor for each spatial axis, or None where it names sizes instead."""
    scales = node.attributes.get("scales")
    if scales is None:
        return None
    if not isinstance(scales, tuple) or len(scales) not in (rank, rank - 2):
        raise Misfit(f"scales={scales!r} for {rank} axes")
    return tuple(float(s) for s in scales[-(rank - 2) :])  # type: ignore[arg-type]


def resized(node: Node, spatial: Shape) -> Shape:
    """The spatial sizes that a Resize node makes."""
    rank = len(spatial) + 2
    scales = scales_of(node, rank)
    if scales is not None:
        return tuple(math.floor(n * s) for n, s in zip(spatial, scales, strict=True))
    sizes = ints(node, "sizes") or ()
    if len(sizes) not in (rank, rank - 2):
        raise Misfit(f"sizes={sizes!r} for {rank} axes")
    return sizes[-(rank - 2) :]


def reshaped(shape: Sequence[int], wanted: Sequence[int]) -> Shape:
    """ONNX's Reshape of what follows the batch axis: 0 keeps a size, -1 takes what is left."""
    out = [shape[i + 1] if n == 0 and i + 1 < len(shape) else n for i, n in enumerate(wanted)]
    total = math.prod(shape[1:])
    if -1 in out:
        rest = math.prod(n for n in out if n != -1)
        if out.count(-1) > 1 or rest < 1 or total % rest:
            raise Misfit(f"{tuple(shape)} reshaped to {tuple(wanted)}")
        out[out.index(-1)] = total // rest
    if math.prod(out) != total or any(n < 0 for n in out):
        raise Misfit(f"{tuple(shape)} reshaped to {tuple(wanted)}")
    return (shape[0], *out)


def merge_mode(node: Node, layer: Any) -> str:
    """How the two directions of a layer become one output: the node's word, the layer's, or concat."""
    mode = node.attributes.get("merge_mode", layer.merge_mode)
    return "concat" if mode is None and "merge_mode" not in node.attributes else str(mode or "none").lower()


def equation_terms(equation: str | None) -> tuple[str, str, str]:
    """Input, kernel and output of an einsum equation.

    >>> equation_terms("abc,cd->abd")
    ('abc', 'cd', 'abd')
    """
    try:
        left, out = (equation or "").replace(" ", "").split("->")
        data, weights = left.split(",")
    except ValueError:
        raise Misfit(f"the equation {equation!r}") from None
    return data, weights, out
