"""Changes of values that no layout can say: a closed list, each declared exact or lossy.

>>> import numpy as np
>>> from neutral.native import from_array
>>> both = add_zero_bias(from_array(np.array([1.0, 2.0])), axis=0)
>>> both.read()
array([[1., 2.],
       [0., 0.]])
>>> merged = merge_biases(both, axis=0)
>>> merged.tensor.read(), merged.exact
(array([1., 2.]), True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from neutral.errors import Problem, Refused
from neutral.native import Computed, Tensor, from_array, stack


@dataclass(frozen=True)
class Rule:
    """One change of values: its name, whether it can be undone to the bit, and how a report speaks of it."""

    name: str
    exact: bool
    says: str


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("one_bias", True, "one recurrent bias is read as an input bias, the recurrent one zero"),
        Rule("new_bias", True, "the recurrent biases of a GRU that are only added to others are read as zero"),
        Rule("input_bias", True, "the input biases of a GRU without others are read with recurrent ones of zero"),
        Rule("merge_biases", False, "input and recurrent bias are added to one"),
        Rule("default", True, "a parameter that the source does without is filled with its neutral value"),
        Rule("drop_default", True, "a parameter of neutral values is left out"),
        Rule("effective_kernel", False, "a reparametrized kernel is written as the kernel it stands for"),
        Rule("magnitude", False, "a kernel is split into magnitude and direction"),
        Rule("broadcast", True, "one shared slope is written once per channel"),
        Rule("widen", True, "elements are converted to a wider dtype"),
        Rule("narrow", False, "elements are converted to a narrower dtype"),
    )
}

DEFAULTS: Mapping[str, float] = {"bias": 0.0, "scale": 1.0, "mean": 0.0, "variance": 1.0}
"""The neutral value of a parameter that one side has and the other does without, by the end of its role."""


@dataclass(frozen=True)
class Applied:
    """What a rule made, whether it could be undone, and what of the values it has no place for."""

    tensor: Tensor
    exact: bool
    lost: str = ""


def add_zero_bias(bias: Tensor, axis: int) -> Tensor:
    """A single recurrent bias as two sides, the second zero."""
    return stack((bias, _zeros(bias)), axis)


def _zeros(like: Tensor) -> Tensor:
    return from_array(np.broadcast_to(np.zeros((), like.dtype), like.shape))


def merge_biases(bias: Tensor, axis: int) -> Applied:
    """Two sides of a recurrent bias as one: the first to the bit if the second is zero, else their sum."""
    first, second = (_piece(bias, axis, side) for side in (0, 1))
    if not second.read().any():
        return Applied(first, True)
    return Applied(_sum(first, second), False)


def spread_gru_bias(bias: Tensor, axis: int) -> Tensor:
    """The biases of a GRU that a framework keeps as two sides of three gates, all others zero.

    `bias` has those of the input (reset, update, new), and behind them that of the recurrent side for the new gate, if
    there is one: the reset gate scales it. The other two are only added to those of the input.

    >>> spread_gru_bias(from_array(np.array([[1.0], [2.0], [3.0], [4.0]])), axis=0).read().tolist()
    [[[1.0], [2.0], [3.0]], [[0.0], [0.0], [4.0]]]
    """
    gates = [_piece(bias, axis, i) for i in range(bias.shape[axis])]
    nothing = _zeros(gates[0])
    recurrent = (nothing, nothing, gates[3] if len(gates) == 4 else nothing)
    return stack((stack(gates[:3], axis), stack(recurrent, axis)), axis)


def gather_gru_bias(bias: Tensor, axis: int, new_gate: bool) -> Applied:
    """The reverse: two sides of three gates, the recurrent biases of reset and update added to those of the input.

    Without a place for the recurrent bias of the new gate (not `new_gate`) that must be zero.
    """
    first, second = ([_piece(_piece(bias, axis, side), axis, gate) for gate in range(3)] for side in (0, 1))
    exact = not any(second[gate].read().any() for gate in (0, 1))
    gates = first if exact else [*(_sum(first[gate], second[gate]) for gate in (0, 1)), first[2]]
    if new_gate:
        return Applied(stack((*gates, second[2]), axis), exact)
    lost = "a recurrent bias of the new gate that is not zero" if second[2].read().any() else ""
    return Applied(stack(gates, axis), exact, lost)


def _piece(tensor: Tensor, axis: int, index: int) -> Tensor:
    return tensor.take(axis, (index,)).split(axis, ())


def _sum(one: Tensor, other: Tensor) -> Tensor:
    return Computed(one.shape, one.dtype, lambda: (one.read() + other.read()).astype(one.dtype))


def two_sides(rule: str, bias: Tensor, axis: int) -> Tensor:
    """A recurrent bias as a rule has it stored, as canonical: both sides of it, `axis` telling them apart."""
    return add_zero_bias(bias, axis) if rule == "one_bias" else spread_gru_bias(bias, axis)


def as_stored(rule: str, bias: Tensor, axis: int) -> Applied:
    """Both sides of a recurrent bias as a rule has them stored."""
    return merge_biases(bias, axis) if rule == "one_bias" else gather_gru_bias(bias, axis, rule == "new_bias")


def stored_shape(rule: str, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of both sides of a recurrent bias as a rule has them stored."""
    if rule == "new_bias":
        return (*shape[:axis], 4, *shape[axis + 2 :])
    return shape[:axis] + shape[axis + 1 :]


BIAS_RULES = ("one_bias", "new_bias", "input_bias")
"""Rules of how the two sides of a recurrent bias are stored."""


def default_value(role: str) -> float | None:
    """The neutral value of a role (`query_bias` counts as a bias), or None if it has none."""
    return DEFAULTS.get(role.rpartition("_")[2])


def filled(value: float, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    """A tensor of one value."""
    return from_array(np.broadcast_to(np.asarray(value, dtype), shape))


def is_all(tensor: Tensor, value: float) -> bool:
    """True if every element is `value`."""
    return all(bool((tile == np.asarray(value, tile.dtype)).all()) for tile in tensor.tiles())


def weight_norm_kernel(magnitude: Tensor, direction: Tensor) -> Tensor:
    """magnitude · direction / |direction|, the norm over all axes on which the magnitude has one element."""

    def compute() -> Any:
        wide = np.promote_types(direction.dtype, np.float32)
        v = direction.read().astype(wide)
        g = magnitude.read().astype(wide)
        axes = tuple(i for i in range(v.ndim) if g.ndim == 0 or g.shape[i] == 1)
        norm = np.sqrt((v * v).sum(axis=axes, keepdims=True))
        return (v * (g / norm)).astype(direction.dtype)

    return Computed(direction.shape, direction.dtype, compute)


def weight_norm_magnitude(kernel: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The norm of a kernel over all axes on which `shape` (the magnitude's) has one element."""

    def compute() -> Any:
        wide = np.promote_types(kernel.dtype, np.float32)
        v = kernel.read().astype(wide)
        axes = tuple(i for i in range(v.ndim) if not shape or shape[i] == 1)
        return np.sqrt((v * v).sum(axis=axes, keepdims=True)).reshape(shape).astype(kernel.dtype)

    return Computed(shape, kernel.dtype, compute)


def spectral_norm_kernel(raw: Tensor, u: Tensor, v: Tensor, axis: int) -> Tensor:
    """raw / sigma with sigma = u · raw · v, raw as a matrix whose rows are `axis` (another one if that cannot be)."""

    def compute() -> Any:
        wide = np.promote_types(raw.dtype, np.float32)
        w = raw.read().astype(wide)
        rows, columns = u.shape[0], v.shape[0]
        order = [axis, *(i for i in range(w.ndim) if i != axis)]
        row_axis = next(i for i in order if w.shape[i] == rows and w.size // w.shape[i] == columns)
        matrix = np.moveaxis(w, row_axis, 0).reshape(rows, columns)
        sigma = u.read().astype(wide) @ (matrix @ v.read().astype(wide))
        return (w / sigma).astype(raw.dtype)

    return Computed(raw.shape, raw.dtype, compute)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Elements times a power of two, which is exact; `Refused` where one is too large or too small for it.

    >>> scaled(from_array(np.array([1.5, -3.0])), 0.5).read()
    array([ 0.75, -1.5 ])
    """
    dtype = tensor.dtype

    def compute() -> Any:
        whole = tensor.read()
        found = (whole * dtype.type(factor)).astype(dtype)
        if not np.array_equal((found * dtype.type(1 / factor)).astype(dtype), whole, equal_nan=True):
            raise Refused(
                Problem("scale", f"elements that {factor:g} times are no {dtype}", "elements inside its range")
            )
        return found

    return Computed(tensor.shape, dtype, compute)


def is_power_of_two(factor: float) -> bool:
    """True for a factor by which floats can be multiplied and divided without rounding."""
    return math.isfinite(factor) and factor > 0 and math.frexp(factor)[0] == 0.5


_WITH_INFINITIES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


_FINFO: Callable[[Any], Any] = ml_dtypes.finfo
_IINFO: Callable[[Any], Any] = ml_dtypes.iinfo


def widens(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """True if every value of one dtype is a value of the other.

    >>> widens(np.dtype("float16"), np.dtype("float32")), widens(np.dtype("int64"), np.dtype("float64"))
    (True, False)
    """
    if source == target:
        return True
    if target.kind in "biu":
        return source.kind in "biu" and bool(np.can_cast(source, target, "safe"))
    if target.name not in _WITH_INFINITIES or (source.kind == "c" and target.kind != "c"):
        return False
    goal = _FINFO(_component(target))
    if source.kind == "b":
        return True
    try:
        have = _FINFO(_component(source))
    except ValueError:  # integers, those of ml_dtypes too; numpy calls int64 -> float64 safe, which it is not
        return bool(_IINFO(source).max <= 2 ** (goal.nmant + 1))
    return bool(
        have.nmant <= goal.nmant
        and have.maxexp <= goal.maxexp
        and float(have.smallest_subnormal) >= float(goal.smallest_subnormal)
    )


def _component(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a complex number's parts; any other as it is."""
    return np.empty(0, dtype).real.dtype if dtype.kind == "c" else dtype
