"""Sizes that a layer's parameters tell: features, channels, windows, directions.

>>> from neutral.schema.kinds import Dense, Parameter
>>> weight = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> dense_sizes(Dense(path="fc", parameters={"kernel": weight}))
(3, 2)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from neutral.errors import Problem, Refused, an
from neutral.schema.kinds import Parameter
from neutral.schema.node_settings import Shape, equation_terms


def kernel(layer: Any) -> Parameter:
    """The kernel of a layer, in whatever form the layer has it."""
    for role in ("kernel", "kernel_direction", "kernel_raw", "embedding", "input_kernel"):
        if role in layer.parameters:
            found: Parameter = layer.parameters[role]
            return found
    raise Refused(Problem(layer.path, f"{an(layer.kind)} without a kernel", "its kernel"))


def size(parameter: Parameter, axis: str) -> int:
    """The size of a named axis."""
    return parameter.shape[parameter.axes.index(axis)]


def dense_sizes(layer: Any) -> tuple[int, int]:
    """Input and output features of a dense layer, whose axes may be recorded in finer ones.

    Where neither `in` nor `out` is whole, both are (channel position), made ones first.
    """
    weight = kernel(layer)
    if "out" in weight.axes:
        made = size(weight, "out")
    elif "in" in weight.axes:
        made = math.prod(weight.shape) // max(size(weight, "in"), 1)
    else:
        made = math.prod(weight.shape[: len(weight.shape) // 2])
    return math.prod(weight.shape) // max(made, 1), made


def window(layer: Any) -> Shape:
    """The spatial sizes of a convolution's kernel."""
    weight = kernel(layer)
    named = [weight.axes.index(axis) for axis in ("in", "out") if axis in weight.axes]
    return weight.shape[1 + max(named) if named else 2 :]


def conv_channels(layer: Any) -> tuple[int, int, int]:
    """Input channels, output channels and groups of a convolution of any kind."""
    weight = kernel(layer)
    spatial = len(window(layer))
    head = weight.shape[: len(weight.shape) - spatial]
    if layer.kind == "conv_transpose":
        groups = layer.groups or 1
        return head[0], math.prod(head[1:]) * groups, groups
    made = math.prod(head[:-1])
    if layer.kind == "depthwise":
        groups = layer.groups or (head[0] if len(head) > 2 else None)
        if groups is None:
            raise Refused(
                Problem(layer.path, f"{made} output channels", "to know how many input channels they belong to")
            )
        return groups * head[-1], made, groups
    groups = layer.groups or 1
    return head[-1] * groups, made, groups


def per_axis(value: Sequence[int] | int | None, rank: int, default: int) -> Shape:
    """A setting that may be absent, or one number for all spatial axes."""
    if value is None:
        return (default,) * rank
    if isinstance(value, int):
        return (value,) * rank
    return tuple(value) * rank if len(value) == 1 else tuple(value)


def same_total(length: Any, window: int, stride: int, dilation: int) -> Any:
    """How much padding makes ceil(length / stride) windows, before it is clipped at 0."""
    return (-(-length // stride) - 1) * stride + (window - 1) * dilation + 1 - length


def crops(layer: Any) -> tuple[tuple[tuple[int, int], ...], Shape]:
    """What a transposed convolution cuts off (before, after) and adds at the end, per spatial axis."""
    sizes = window(layer)
    rank = len(sizes)
    strides, dilation = per_axis(layer.strides, rank, 1), per_axis(layer.dilation, rank, 1)
    extra = per_axis(layer.output_padding, rank, 0)
    if layer.padding is None:
        return ((0, 0),) * rank, extra
    if not isinstance(layer.padding, str):
        return tuple(layer.padding), extra
    if layer.padding == "causal":
        raise Refused(Problem(layer.path, "a causal transposed convolution", "padding 'same' or explicit pairs"))
    pairs, tail = [], []
    for k, s, d in zip(sizes, strides, dilation, strict=True):
        total = (k - 1) * d + 1 - s
        small, large = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
        pairs.append((small, large) if layer.padding == "same" else (large, small))
        tail.append(max(-total, 0))
    return tuple(pairs), tuple(tail)


def directions(layer: Any) -> int:
    """2 for a layer that runs both ways."""
    return 2 if "direction" in kernel(layer).axes else 1


def state_size(layer: Any) -> int:
    """The size of a recurrent layer's output in one direction."""
    projection = layer.parameters.get("projection")
    return size(projection, "hidden") if projection else size(kernel(layer), "unit")


def kernel_letters(layer: Any) -> str:
    """The letters of an einsum kernel in its canonical order: those of both sides, made ones, then taken ones."""
    data, weights, out = equation_terms(layer.equation)
    axes = kernel(layer).axes
    if sorted(axes) == sorted(weights):
        return "".join(axes)
    made = [letter for letter in out.replace("...", "") if letter in weights and letter not in data]
    taken = [letter for letter in data.replace("...", "") if letter in weights and letter not in out]
    return "".join([*(letter for letter in weights if letter not in made + taken), *made, *taken])
