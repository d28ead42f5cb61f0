"""Norms that exporters write as several operators, where the operator set has none for them, or the exporter does not know it.

x -> Reshape (0, groups, -1) -> InstanceNormalization of ones -> Reshape back -> Mul -> Add      a group norm
d = x - mean(x);  d / sqrt(mean(d * d) + eps) -> Mul -> Add                                      a layer norm
x / sqrt(mean(x * x) + eps) -> Mul                                                               an RMS norm

As TensorFlow has them, with m = scale / sqrt(v + eps):  x * m + (bias - mean(x) * m), v = mean((x - mean(x))^2);  x * m
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neutral.containers.onnx import NodeProto
from neutral.containers.onnx_constants import Expression, Reshaped, forward, undoable
from neutral.conventions.onnx_candidates import Call, Candidate, Use
from neutral.conventions.onnx_ranks import rank_of
from neutral.conventions.onnx_scope import Scope

_LONGEST = 1 << 16
_MEANS = ("ReduceMean", "GlobalAveragePool")
_SILENT = ("Cast", "CastLike", "Identity")


def idiom_of(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    """The norm of which a node is the one that tells it: the inner norm of a group norm, the Mul of the others."""
    if node.domain or not node.outputs:
        return None
    if node.op_type == "InstanceNormalization":
        return _group_norm(scope, node)
    if node.op_type == "Mul":
        return _last_axes_norm(scope, node) or _scaled_first(scope, node)
    return _moved_first(scope, node) if node.op_type == "Add" else None


def _made_by(scope: Scope, value: str, *ops: str) -> NodeProto | None:
    """The node that makes a value, if it is one of these."""
    node = scope.makers.get(value)
    return node if node is not None and not node.domain and node.op_type in ops and node.inputs else None


def _user(scope: Scope, value: str, op: str) -> NodeProto | None:
    node = scope.only_user(value)
    return node if node is not None and not node.domain and node.op_type == op else None


def _weighed(scope: Scope, node: NodeProto) -> tuple[str, str, Expression] | None:
    """The value and the weight that a node of two inputs joins."""
    if len(node.inputs) != 2:
        return None
    for value, weight in (node.inputs, node.inputs[::-1]):
        found = scope.floats(weight)
        if found is not None and scope.constant(value) is None and math.prod(found.shape) > 1 and undoable(found):
            return value, weight, found
    return None


def _scalar(scope: Scope, value: str) -> float | None:
    stored = scope.constant(value)
    if stored is None:
        maker = _made_by_constant(scope, value)
        given = maker.attributes.get("value_float") if maker is not None else None
        return float(given) if isinstance(given, float) else None
    if math.prod(stored.shape) != 1:
        return None
    return float(forward(stored).read().reshape(()).astype("float64"))


def _made_by_constant(scope: Scope, value: str) -> NodeProto | None:
    node = scope.makers.get(value)
    return node if node is not None and node.op_type == "Constant" else None


def _all_are(scope: Scope, value: str, number: float) -> bool:
    stored = scope.constant(value)
    if stored is None:
        return scope.ones(value) if number else scope.zero(value)
    return math.prod(stored.shape) <= _LONGEST and bool((forward(stored).read() == number).all())


# --- group norm ---


def _group_norm(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    before = _made_by(scope, node.inputs[0], "Reshape") if len(node.inputs) == 3 else None
    after = _user(scope, node.outputs[0], "Reshape")
    if before is None or after is None or len(before.inputs) < 2 or len(after.inputs) < 2:
        return None
    shape = scope.numbers(before.inputs[1])
    source = before.inputs[0]
    if shape is None or len(shape) != 3 or shape[1] is None or shape[1] < 1 or shape[2] != -1:
        return None
    if not _all_are(scope, node.inputs[1], 1) or not _all_are(scope, node.inputs[2], 0):
        return None
    scales = _user(scope, after.outputs[0], "Mul")
    adds = _user(scope, scales.outputs[0], "Add") if scales is not None else None
    rank = rank_of(scope, source)
    if scales is None or adds is None or rank is None or not _as_before(scope, after.inputs[1], source):
        return None
    scale, bias = _weighed(scope, scales), _weighed(scope, adds)
    if scale is None or bias is None or not _per_channel(scale[2], rank) or not _per_channel(bias[2], rank):
        return None
    channels = math.prod(scale[2].shape)
    if math.prod(bias[2].shape) != channels or channels % shape[1]:
        return None
    config = {"num_groups": shape[1], "epsilon": node.attributes.get("epsilon", 1e-5)}
    expressions = {"scale": _flat(scale[2]), "bias": _flat(bias[2])}
    nodes = [before, node, after, scales, adds]
    uses = [(scales, scale[1]), (adds, bias[1]), (node, node.inputs[1]), (node, node.inputs[2])]
    return _candidate("GroupNormalization", expressions, config, nodes, source, uses)


def _as_before(scope: Scope, target: str, source: str) -> bool:
    """True if a Reshape gives a value the shape that another one has."""
    shaped = _made_by(scope, target, "Shape")
    if shaped is not None:
        return shaped.inputs[0] == source and not {"start", "end"} & {k for k, v in shaped.attributes.items() if v}
    told, known = scope.numbers(target), scope.shape_of(source)
    return told is not None and known is not None and None not in known[1:] and told[1:] == known[1:]


def _per_channel(expression: Expression, rank: int) -> bool:
    full = (1,) * (rank - len(expression.shape)) + expression.shape
    return len(full) == rank and all(n == 1 for i, n in enumerate(full) if i != 1)


def _flat(expression: Expression) -> Expression:
    size = math.prod(expression.shape)
    return expression if expression.shape == (size,) else Reshaped(expression, (size,))


# --- layer norm and RMS norm ---


@dataclass(frozen=True)
class _Scaled:
    """A value divided by the root of the mean of its squares over its last axes."""

    source: str
    axes: tuple[int, ...]
    epsilon: float
    nodes: tuple[NodeProto, ...]


def _last_axes_norm(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    found = _weighed(scope, node)
    scaled = _scaled(scope, found[0]) if found is not None else None
    if found is None or scaled is None:
        return None
    _, weight, scale = found
    rank = rank_of(scope, scaled.source)
    axes = tuple(sorted(axis - rank if axis >= 0 and rank is not None else axis for axis in scaled.axes))
    if axes != tuple(range(-len(scale.shape), 0)):
        return None
    config: dict[str, Any] = {"axis": axes[0], "epsilon": scaled.epsilon}
    centred = _centred(scope, scaled)
    if centred is None:
        nodes = [*scaled.nodes, node]
        return _candidate("RMSNormalization", {"scale": scale}, config, nodes, scaled.source, [(node, weight)])
    source, first = centred
    expressions, uses, nodes = {"scale": scale}, [(node, weight)], [*first, *scaled.nodes, node]
    adds = _user(scope, node.outputs[0], "Add")
    bias = _weighed(scope, adds) if adds is not None else None
    if adds is not None and bias is not None and bias[2].shape == scale.shape:
        expressions["B"] = bias[2]
        uses.append((adds, bias[1]))
        nodes.append(adds)
    return _candidate("LayerNormalization", expressions, config, nodes, source, uses)


def _scaled(scope: Scope, value: str) -> _Scaled | None:
    """x / sqrt(v), x * (1 / sqrt(v)) or x * v ** -0.5, with v = mean(x * x) + eps."""
    nodes: list[NodeProto] = []
    while (silent := _made_by(scope, value, *_SILENT)) is not None:
        nodes.append(silent)
        value = silent.inputs[0]
        if len(nodes) > 2:
            return None
    product = _made_by(scope, value, "Mul", "Div")
    if product is None or len(product.inputs) != 2:
        return None
    nodes.append(product)
    ways = [tuple(product.inputs)] if product.op_type == "Div" else [tuple(product.inputs), tuple(product.inputs[::-1])]
    for x, other in ways:
        inner: list[NodeProto] = []
        mean = _root(scope, other, product.op_type == "Mul", inner)
        if mean is None:
            continue
        found = _mean_of_squares(scope, mean, x, inner)
        if found is not None:
            return _Scaled(x, found[0], found[1], (*reversed([*nodes, *inner]),))
    return None


def _root(scope: Scope, value: str, inverted: bool, nodes: list[NodeProto]) -> str | None:
    """v of sqrt(v), or, inverted, of 1 / sqrt(v)."""
    if inverted:
        power = _made_by(scope, value, "Pow")
        if power is not None and _scalar(scope, power.inputs[1]) == -0.5:
            nodes.append(power)
            return power.inputs[0]
        turned = _made_by(scope, value, "Reciprocal", "Div")
        if turned is None or (turned.op_type == "Div" and _scalar(scope, turned.inputs[0]) != 1):
            return None
        nodes.append(turned)
        value = turned.inputs[-1]
    root = _made_by(scope, value, "Sqrt")
    if root is None:
        return None
    nodes.append(root)
    return root.inputs[0]


def _mean_of_squares(scope: Scope, value: str, x: str, nodes: list[NodeProto]) -> tuple[tuple[int, ...], float] | None:
    """The axes and the eps of mean(x * x) + eps."""
    adds = _made_by(scope, value, "Add")
    if adds is None or len(adds.inputs) != 2:
        return None
    for mean, other in (adds.inputs, adds.inputs[::-1]):
        eps, reduced = _scalar(scope, other), _made_by(scope, mean, *_MEANS)
        axes = _mean_axes(scope, reduced)
        square = _made_by(scope, reduced.inputs[0], "Pow", "Mul") if reduced is not None else None
        if eps is None or reduced is None or axes is None or square is None or len(square.inputs) != 2:
            continue
        squared = square.inputs[0] == x and (
            square.inputs[1] == x if square.op_type == "Mul" else _scalar(scope, square.inputs[1]) == 2
        )
        if squared:
            nodes += [adds, reduced, square]
            return axes, eps
    return None


def _mean_axes(scope: Scope, reduced: NodeProto | None) -> tuple[int, ...] | None:
    """The axes of a mean that keeps them."""
    if reduced is None or reduced.attributes.get("keepdims", 1) != 1:
        return None
    if reduced.op_type == "GlobalAveragePool":
        rank = rank_of(scope, reduced.inputs[0])
        return None if rank is None else tuple(range(2, rank))
    if len(reduced.inputs) > 1 and reduced.inputs[1]:
        found: Any = scope.numbers(reduced.inputs[1])
    else:
        found = reduced.attributes.get("axes")
    known = isinstance(found, tuple) and bool(found) and all(type(axis) is int for axis in found)
    return found if known else None


def _centred(scope: Scope, scaled: _Scaled) -> tuple[str, tuple[NodeProto, ...]] | None:
    """z of x = z - mean(z), over the same axes."""
    minus = _made_by(scope, scaled.source, "Sub")
    mean = _made_by(scope, minus.inputs[1], "ReduceMean") if minus is not None and len(minus.inputs) == 2 else None
    if minus is None or mean is None or mean.inputs[0] != minus.inputs[0] or _mean_axes(scope, mean) != scaled.axes:
        return None
    return minus.inputs[0], (mean, minus)


# --- the same as TensorFlow computes them: the scale and the root first ---


@dataclass(frozen=True)
class _Factor:
    """scale / sqrt(mean(square of `squared`) + eps) over some last axes."""

    scale: Expression
    use: Use
    squared: str
    axes: tuple[int, ...]
    epsilon: float
    nodes: tuple[NodeProto, ...]


def _factor(scope: Scope, value: str) -> _Factor | None:
    product = _made_by(scope, value, "Mul")
    found = _weighed(scope, product) if product is not None else None
    if product is None or found is None:
        return None
    root, weight, scale = found
    nodes: list[NodeProto] = [product]
    inner = _root(scope, root, True, nodes)
    adds = _made_by(scope, inner, "Add") if inner is not None else None
    squares = [
        _made_by(scope, mean.inputs[0], "Pow", "Mul")
        for value in (adds.inputs if adds is not None else ())
        if (mean := _made_by(scope, value, *_MEANS)) is not None
    ]
    square = squares[0] if len(squares) == 1 else None
    told = _mean_of_squares(scope, inner, square.inputs[0], nodes) if inner and square is not None else None
    if told is None or square is None:
        return None
    rank = rank_of(scope, square.inputs[0])
    axes = tuple(sorted(axis - rank if axis >= 0 and rank is not None else axis for axis in told[0]))
    bare = _over(scale, axes)
    if bare is None:
        return None
    return _Factor(bare, (product, weight), square.inputs[0], axes, told[1], (*reversed(nodes),))


def _over(weight: Expression, axes: Sequence[int]) -> Expression | None:
    """A weight over just these last axes: axes of one element in front of them are left out."""
    rank = len(axes)
    front, shape = weight.shape[: len(weight.shape) - rank], weight.shape[len(weight.shape) - rank :]
    if not rank or tuple(axes) != tuple(range(-rank, 0)) or len(shape) != rank or any(n != 1 for n in front):
        return None
    return Reshaped(weight, shape) if front else weight


def _scaled_first(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    """An RMS norm: x times its factor."""
    if len(node.inputs) != 2:
        return None
    for x, other in (node.inputs, node.inputs[::-1]):
        factor = _factor(scope, other)
        if factor is not None and factor.squared == x:
            config: dict[str, Any] = {"axis": factor.axes[0], "epsilon": factor.epsilon}
            nodes = [*factor.nodes, node]
            return _candidate("RMSNormalization", {"scale": factor.scale}, config, nodes, x, [factor.use])
    return None


def _moved_first(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    """A layer norm: x times its factor, and what is left of the bias."""
    if len(node.inputs) != 2:
        return None
    for scaled, other in (node.inputs, node.inputs[::-1]):
        times, rest = _made_by(scope, scaled, "Mul"), _made_by(scope, other, "Add", "Sub")
        if times is None or rest is None or len(times.inputs) != 2:
            continue
        for x, multiplier in (times.inputs, times.inputs[::-1]):
            factor = _factor(scope, multiplier)
            left = _rest(scope, rest, x, multiplier, factor) if factor is not None else None
            if factor is None or left is None:
                continue
            bias, use, inner = left
            config: dict[str, Any] = {"axis": factor.axes[0], "epsilon": factor.epsilon}
            expressions = {"scale": factor.scale, "B": bias}
            nodes = [*factor.nodes, *inner, times, node]
            return _candidate("LayerNormalization", expressions, config, nodes, x, [factor.use, use])
    return None


def _rest(
    scope: Scope, node: NodeProto, x: str, multiplier: str, factor: _Factor
) -> tuple[Expression, Use, tuple[NodeProto, ...]] | None:
    """bias - mean(x) * factor, written as a difference or with a Neg; and that it is the same x whose variance is in it."""
    found = _weighed(scope, node)
    moved = _made_by(scope, found[0], "Mul") if found is not None else None
    if found is None or moved is None or len(moved.inputs) != 2 or multiplier not in moved.inputs:
        return None
    if node.op_type == "Sub" and node.inputs[1] != found[0]:
        return None
    mean = moved.inputs[1] if moved.inputs[0] == multiplier else moved.inputs[0]
    negated = _made_by(scope, mean, "Neg")
    if (negated is not None) != (node.op_type == "Add"):
        return None
    mean = mean if negated is None else negated.inputs[0]
    minus = _made_by(scope, factor.squared, "Sub")
    reduced = _made_by(scope, mean, *_MEANS)
    bias = _over(found[2], factor.axes)
    axes = _mean_axes(scope, reduced)
    rank = rank_of(scope, x)
    alike = axes is not None and factor.axes == tuple(
        sorted(axis - rank if axis >= 0 and rank is not None else axis for axis in axes)
    )
    if bias is None or minus is None or reduced is None or tuple(minus.inputs) != (x, mean) or not alike:
        return None
    if reduced.inputs[0] != x or bias.shape != factor.scale.shape:
        return None
    inner = [one for one in (reduced, minus, negated, moved, node) if one is not None]
    return bias, (node, found[1]), tuple(inner)


def _candidate(
    cls: str,
    expressions: dict[str, Expression],
    config: dict[str, Any],
    nodes: Sequence[NodeProto],
    source: str,
    uses: list[Use],
) -> tuple[Candidate, list[Use]]:
    candidate = Candidate(cls, expressions, config, list(nodes), values=[value for _, value in uses])
    candidate.calls = [Call(source, tuple(nodes))]
    return candidate, uses
