"""What one node of an ONNX graph takes as weights: a layer without a name yet.

Whether the weights fit is for the operator to say: how many axes they have, where a bias may stand behind, which input is
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neutral import rules
from neutral.containers.onnx import NodeProto
from neutral.containers.onnx_constants import Expression, Permuted, Reshaped, leaves, undoable
from neutral.conventions.onnx import RECURRENT
from neutral.conventions.onnx_names import common_stem, folded
from neutral.conventions.onnx_ranks import rank_of
from neutral.conventions.onnx_scope import Scope
from neutral.errors import BadFile, Problem

_WEIGHTS: Mapping[str, Mapping[str, int]] = {
    "Gemm": {"W": 1, "B": 2},
    "MatMul": {"W": 1},
    "Conv": {"W": 1, "B": 2},
    "ConvTranspose": {"W": 1, "B": 2},
    "Gather": {"data": 0},
    "BatchNormalization": {"scale": 1, "B": 2, "mean": 3, "var": 4},
    "LayerNormalization": {"scale": 1, "B": 2},
    "GroupNormalization": {"scale": 1, "bias": 2},
    "InstanceNormalization": {"scale": 1, "B": 2},
    "RMSNormalization": {"scale": 1},
    "PRelu": {"slope": 1},
    "RNN": {"W": 1, "R": 2, "B": 3},
    "LSTM": {"W": 1, "R": 2, "B": 3, "P": 7},
    "GRU": {"W": 1, "R": 2, "B": 3},
}
"""The inputs of each operator that are weights; the first of them must be one."""

_MOST_STEPS = 64

Use = tuple[NodeProto, str]
"""A node and a value that it takes."""


@dataclass(frozen=True)
class Call:
    """Several nodes, the last of which makes what a layer makes of the value `source`, its axes in this `order`."""

    source: str
    nodes: tuple[NodeProto, ...]
    order: tuple[int, ...] = ()


@dataclass
class Candidate:
    """A layer that has no name yet. `calls`: where it is used, if each use is several nodes instead of its operator."""

    cls: str | None
    expressions: dict[str, Expression]
    config: dict[str, Any]
    nodes: list[NodeProto]
    factors: dict[str, float] = field(default_factory=dict)
    folded: str = ""
    values: list[str] = field(default_factory=list)
    """What the graph calls its tensors where they are used."""
    calls: list[Call] = field(default_factory=list)


def candidate_of(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    """The layer that a node computes with weights of its own, and the uses that are weights; None for any other node."""
    if node.domain or not node.outputs:
        return None
    if node.op_type == "Einsum":
        return _einsum(scope, node)
    places = _WEIGHTS.get(node.op_type)
    if places is None:
        return None
    found: dict[str, Expression] = {}
    used: list[Use] = []
    for i, (local, place) in enumerate(places.items()):
        value = node.inputs[place] if len(node.inputs) > place else ""
        if not value or (i and scope.zero(value)) or (local == "scale" and scope.ones(value)):
            continue
        expression = scope.floats(value)
        if expression is None or not expression.shape or not undoable(expression):
            return None
        found[local] = expression
        used.append((node, value))
    # A norm may have a bias and no scale but ones.
    needed = next(iter(places))
    if (
        not found
        or (needed not in found and needed != "scale")
        or any(scope.constant(node.inputs[i]) for i in _data_places(node))
    ):
        return None
    candidate = Candidate(node.op_type, found, _settings(node), [node])
    fits = _FITTING.get(node.op_type, _as_it_is)(scope, node, candidate)
    if not fits:
        return None
    if "B" not in found and node.op_type in _BIASED:
        used += bias_behind(scope, candidate, node)
    candidate.values = [value for _, value in used]
    candidate.folded = folded(node)
    return candidate, used


def _data_places(node: NodeProto) -> tuple[int, ...]:
    """The input that is data, which must not be constant."""
    place = 1 if node.op_type == "Gather" else 0
    return (place,) if len(node.inputs) > place else ()


_INTS = ("dilations", "kernel_shape", "output_padding", "output_shape", "pads", "strides")
_FLOATS = ("activation_alpha", "activation_beta")
_TYPES: Mapping[str, type] = {
    **dict.fromkeys(("alpha", "beta", "clip", "epsilon", "momentum"), float),
    **dict.fromkeys(("auto_pad", "direction", "equation"), str),
    **dict.fromkeys(
        (
            "axis",
            "group",
            "hidden_size",
            "input_forget",
            "layout",
            "linear_before_reset",
            "num_groups",
            "transA",
            "transB",
        ),
        int,
    ),
}
"""What the attributes of operators with weights hold."""


def _settings(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node, `BadFile` for one that holds what its operator does not take."""
    found = {name: value for name, value in node.attributes.items() if isinstance(value, int | float | str | tuple)}
    for name, value in found.items():
        listed: type | None = (
            int if name in _INTS else float if name in _FLOATS else str if name == "activations" else None
        )
        if listed is not None:
            right = isinstance(value, tuple) and all(type(each) is listed for each in value)
        else:
            right = type(value) is _TYPES.get(name, type(value))
        numbers = value if isinstance(value, tuple) else (value,)
        if not right or any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            where = node.name or node.op_type
            raise BadFile(Problem(where, f"the attribute {name} of {value!r}", "one that the operator takes"))
    return found


def _as_it_is(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    return True


def _gemm(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    weight = candidate.expressions["W"]
    if len(weight.shape) != 2:
        return False
    out = weight.shape[0 if candidate.config.get("transB", 0) else 1]
    bias = candidate.expressions.get("B")
    if bias is not None:
        if math.prod(bias.shape) != out or len(bias.shape) > 2 or (bias.shape or (1,))[-1] != out:
            return False
        candidate.expressions["B"] = _flat(bias)
    for local, name in (("W", "alpha"), ("B", "beta")):
        factor = candidate.config.get(name, 1.0)
        if factor == 1.0 or local not in candidate.expressions:
            continue
        if rules.is_power_of_two(factor):
            candidate.factors[local] = float(factor)
        else:
            candidate.config["odd"] = f"{candidate.config.get('odd', '')} {name} {factor:g}".strip()
    return True


def _matmul(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    return len(candidate.expressions["W"].shape) == 2


def _gather(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    return len(candidate.expressions["data"].shape) == 2 and candidate.config.get("axis", 0) in (0, -2)


def _vectors(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    return len({e.shape for e in candidate.expressions.values()}) == 1 and all(
        len(e.shape) == 1 for e in candidate.expressions.values()
    )


def _group_norm(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    groups = candidate.config.get("num_groups")
    if not _vectors(scope, node, candidate):
        return False
    if scope.opset < 21 and candidate.expressions["scale"].shape[0] == groups:
        candidate.config["odd"] = "one scale for each group, as before opset 21"
    return True


def _over_axes(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    """A norm over the last axes has a scale of just these; ONNX's may be stretched over some, or over more."""
    axis = candidate.config.get("axis", -1)
    rank = None if axis < 0 else rank_of(scope, node.inputs[0])
    count = -axis if axis < 0 else None if rank is None else rank - axis
    if count is None:
        candidate.config["odd"] = f"axis {axis} of a value whose number of axes the graph does not say"
    elif any(len(e.shape) != count for e in candidate.expressions.values()):
        candidate.config["odd"] = f"a scale or bias stretched over {count} axes"
    return True


def _prelu(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    slope = candidate.expressions["slope"]
    shape = slope.shape
    rank = rank_of(scope, node.inputs[0])
    if math.prod(shape) == 1:
        wanted: tuple[int, ...] = (1,)
    elif rank is None:
        # Axes of size one behind the channels are there to reach them from the last axis.
        bare = shape[1:] if shape[0] == 1 else shape
        if len(bare) < 2 or any(n != 1 for n in bare[1:]):
            return False
        wanted = bare[:1]
    else:
        full = (1,) * (rank - len(shape)) + shape
        if len(full) != rank or rank < 2 or full[0] != 1:
            return False
        if rank > 2 and full[1] == 1:
            return False
        wanted = full[1:2] if all(n == 1 for n in full[2:]) else full[1:]
    candidate.expressions["slope"] = slope if shape == wanted else Reshaped(slope, wanted)
    return True


def _window(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    return len(candidate.expressions["W"].shape) > 2


def _recurrent(scope: Scope, node: NodeProto, candidate: Candidate) -> bool:
    return "R" in candidate.expressions and all(len(candidate.expressions[local].shape) == 3 for local in "WR")


_FITTING: Mapping[str, Callable[[Scope, NodeProto, Candidate], bool]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Gather": _gather,
    **dict.fromkeys(("Conv", "ConvTranspose"), _window),
    "BatchNormalization": _vectors,
    "InstanceNormalization": _vectors,
    "GroupNormalization": _group_norm,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _over_axes),
    "PRelu": _prelu,
    **dict.fromkeys(RECURRENT, _recurrent),
}
_BIASED = ("Gemm", "MatMul", "Conv", "ConvTranspose")


def _flat(expression: Expression) -> Expression:
    size = math.prod(expression.shape)
    return expression if expression.shape == (size,) else Reshaped(expression, (size,))


def bias_behind(scope: Scope, candidate: Candidate, node: NodeProto) -> list[Use]:
    """The bias that an Add behind the operator (or behind `node`) adds, if it is one: then it is the layer's, and its uses
    are told."""
    added = _added(scope, node)
    if added is None:
        return []
    adds, value, bias = added
    weight = candidate.expressions["W"]
    out, behind = made_by(candidate, weight)
    if not bias.shape or len(bias.shape) <= behind:
        return []
    place = len(bias.shape) - 1 - behind
    if bias.shape[place] != out or any(n != 1 for i, n in enumerate(bias.shape) if i != place):
        return []
    if _belongs_elsewhere(weight, bias):
        return []
    candidate.expressions["B"] = _flat(bias)
    candidate.nodes += adds
    return [(adds[-1], value)]


def _added(scope: Scope, node: NodeProto) -> tuple[list[NodeProto], str, Expression] | None:
    """The one node behind another if it adds a constant: what is between them and the node, and the constant with its name."""
    made = node.outputs[0]
    adds = scope.only_user(made)
    between: list[NodeProto] = []
    for _ in range(_MOST_STEPS):
        if adds is None or not _changes_nothing(scope, node, adds):
            break
        between.append(adds)
        made = adds.outputs[0]
        adds = scope.only_user(made)
    if adds is None or adds.op_type != "Add" or adds.domain or len(adds.inputs) != 2:
        return None
    value = adds.inputs[1] if adds.inputs[0] == made else adds.inputs[0]
    bias = scope.floats(value)
    return None if bias is None or not undoable(bias) else ([*between, adds], value, bias)


def _changes_nothing(scope: Scope, node: NodeProto, behind: NodeProto) -> bool:
    """True for a node behind one with weights that gives its result on as it is."""
    if behind.domain or len(behind.outputs) != 1:
        return False
    weights = [found for value in node.inputs if (found := scope.floats(value)) is not None]
    same = weights and behind.attributes.get("to") == next(leaves(weights[0])).tensor.code
    return behind.op_type == "Identity" or (behind.op_type == "Cast" and bool(same))


def _belongs_elsewhere(weight: Expression, bias: Expression) -> bool:
    """True if names say that a bias is not of the layer whose weight this is."""
    stems = [common_stem(leaf.tensor.name for leaf in leaves(part)) for part in (weight, bias)]
    return all(stems) and stems[0] != stems[1]


def made_by(candidate: Candidate, weight: Expression) -> tuple[int, int]:
    """How many features an operator makes, and how many axes stand behind them."""
    match candidate.cls:
        case "Conv":
            return weight.shape[0], len(weight.shape) - 2
        case "ConvTranspose":
            return weight.shape[1] * int(candidate.config.get("group", 1)), len(weight.shape) - 2
        case "Gemm" if candidate.config.get("transB", 0):
            return weight.shape[0], 0
    return weight.shape[-1], 0


def turn(candidate: Candidate, axes: set[str], channels: Mapping[str, int]) -> None:
    """Give a layer whose axes hold (position channel) views in which they hold (channel position)."""
    for local, expression in candidate.expressions.items():
        if local == "W":
            outer = 0 if candidate.config.get("transB", 0) else 1
            places = {"out": outer, "in": 1 - outer}
        else:
            places = {"out": 0, "feature": 0}
        for axis in axes:
            if axis in places:
                expression = _channels_first(expression, places[axis], channels[axis])
        candidate.expressions[local] = expression


def _channels_first(expression: Expression, axis: int, channels: int) -> Expression:
    shape = expression.shape
    parted = (*shape[:axis], shape[axis] // channels, channels, *shape[axis + 1 :])
    order = list(range(len(parted)))
    order[axis], order[axis + 1] = axis + 1, axis
    return Reshaped(Permuted(Reshaped(expression, parted), tuple(order)), shape)


def _einsum(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    """An Einsum of a value or two and a kernel, in whichever order they are given: the kernel is put last."""
    equation = str(node.attributes.get("equation", "")).replace(" ", "")
    operands, arrow, result = equation.partition("->")
    terms = operands.split(",")
    constants = [scope.constant(value) for value in node.inputs]
    places = [i for i, constant in enumerate(constants) if constant is not None]
    if not arrow or len(terms) != len(node.inputs) or len(places) != 1 or len(terms) not in (2, 3):
        return None
    (place,) = places
    kernel = scope.floats(node.inputs[place])
    if kernel is None or not undoable(kernel) or len(terms[place]) != len(kernel.shape):
        return None
    others = [term for i, term in enumerate(terms) if i != place]
    config = {**_settings(node), "equation": f"{','.join(others)},{terms[place]}->{result}"}
    candidate = Candidate("Einsum", {"W": kernel}, config, [node])
    sizes = dict(zip(terms[place], kernel.shape, strict=True))
    return candidate, [(node, node.inputs[place]), *_einsum_bias(scope, node, candidate, others, result, sizes)]


def _einsum_bias(
    scope: Scope, node: NodeProto, candidate: Candidate, others: list[str], result: str, sizes: Mapping[str, int]
) -> list[Use]:
    """The bias behind an Einsum, over all the axes that it makes."""
    made = "".join(letter for letter in result if letter in sizes and not any(letter in term for term in others))
    added = _added(scope, node)
    if added is None or not made or not result.endswith(made):
        return []
    adds, value, bias = added
    if bias.shape != tuple(sizes[letter] for letter in made) or _belongs_elsewhere(candidate.expressions["W"], bias):
        return []
    candidate.expressions["B"] = bias
    candidate.config["bias_axes"] = made
    candidate.nodes += adds
    return [(adds[-1], value)]
