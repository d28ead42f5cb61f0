"""Which layers the nodes of an ONNX model are: their class, settings and tensors, by what uses an initializer.

A tensor of a layer is a `View`: what the graph makes of stored tensors before an operator takes it as its weight. Reader and
writer share it, so that what one shows the other can take back. Nothing is recognised by its shape or name alone; tensors
that no operator with weights takes are layers without a class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neutral import rules
from neutral.containers.onnx import ModelProto, NodeProto, named_tensors
from neutral.containers.onnx_constants import Expression, Leaf, Permuted, Reshaped, backward, forward, leaves, undoable
from neutral.containers.onnx_tensors import DTYPES, STRING
from neutral.conventions.onnx import RECURRENT, refusal
from neutral.conventions.onnx_flatten import Crossings, Used, follow
from neutral.conventions.onnx_names import anonymous, common_stem, folded, module_of
from neutral.conventions.onnx_ranks import rank_of
from neutral.conventions.onnx_scope import Scope, subgraphs
from neutral.errors import BadFile, Problem, Unsupported, raise_all
from neutral.native import Tensor

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

_SETTINGS: Mapping[str, tuple[int, ...]] = {
    "Clip": (1, 2), "Expand": (1,), "OneHot": (1, 2), "Pad": (1, 2, 3), "Pow": (1,), "Range": (0, 1, 2),
    "Reshape": (1,), "Resize": (1, 2, 3), "Tile": (1,), "Upsample": (1,), "Dropout": (1, 2),
}  # fmt: skip
"""Inputs of operators that are settings, though they may be floats."""

_QUANTIZED = ("DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QuantizeLinear")
_SPREADING = ("Expand", "Identity", "Cast", "Slice", "Reshape", "Unsqueeze", "Squeeze", "Tile", "Concat")
_MOST_STEPS = 64
_FOLDED = {
    "folded": "a batch normalization was computed into its weights",
    "computed": "the exporter computed its weights, and does not say of what (a batch normalization may be in them)",
}
_INITIAL_STATES = (5, 6)
_LARGEST_STATE = 1 << 24


@dataclass(frozen=True)
class View:
    """A tensor as a layer has it: its unique `name`, and what it is made of, times a power of two."""

    name: str
    expression: Expression
    factor: float = 1.0

    def data(self) -> Tensor:
        """Its elements, unread."""
        found = forward(self.expression)
        return found if self.factor == 1.0 else rules.scaled(found, self.factor)

    def stored(self, new: Tensor) -> dict[str, Tensor]:
        """The stored tensors that make it `new`, by their names in the file."""
        return backward(self.expression, new if self.factor == 1.0 else rules.scaled(new, 1 / self.factor))


@dataclass(frozen=True)
class FoundLayer:
    """A layer: `cls` is its operator, None if no operator with weights uses its tensors. `nodes` compute it."""

    path: str
    cls: str | None
    tensors: Mapping[str, View]
    config: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[NodeProto, ...] = ()


@dataclass(frozen=True)
class FoundLayers:
    """All layers of a model in the order of computation, and what is to be said of them."""

    layers: tuple[FoundLayer, ...]
    notes: tuple[str, ...]
    splits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unsettled: frozenset[str] = frozenset()
    turned: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Layers that stand where the graph has an image with its channels last as one axis: these axes of them, and their
    channels. Their views have the channels first."""


def layers_of(model: ModelProto, where: str) -> FoundLayers:
    """The layers of a model; `Unsupported` for weights that numpy has no elements for."""
    names = {tensor.span.at: name for name, tensor in named_tensors(model).items()}
    finder = _Finder(model.opset, names)
    scope = Scope(model.graph, model.opset, names)
    finder.graph(scope)
    raise_all(Unsupported, _unreadable(model, where))
    crossings = finder.crossings(scope)
    for number, axes in crossings.turned.items():
        _turn(finder.candidates[number], axes, crossings.splits[number])
    layers = tuple(finder.named())
    paths = [layer.path for layer in layers]
    return FoundLayers(
        layers,
        tuple(finder.notes),
        {paths[number]: axes for number, axes in crossings.splits.items()},
        frozenset(paths[number] for number in crossings.unsettled),
        {
            paths[number]: {axis: crossings.splits[number][axis] for axis in sorted(axes)}
            for number, axes in crossings.turned.items()
        },
    )


def _unreadable(model: ModelProto, where: str) -> Iterator[Problem]:
    for name, tensor in named_tensors(model).items():
        if tensor.data is None and tensor.code != STRING:
            yield Problem(
                f"{where}: {name}",
                "elements smaller than a byte",
                "whole bytes",
                "use a model that is not quantized so",
            )
    for name in model.graph.sparse:
        yield Problem(f"{where}: {name}", "a sparse initializer", "a dense one", "save the model without it")


@dataclass
class _Candidate:
    """A layer that has no name yet."""

    cls: str | None
    expressions: dict[str, Expression]
    config: dict[str, Any]
    nodes: list[NodeProto]
    factors: dict[str, float] = field(default_factory=dict)
    folded: str = ""
    values: list[str] = field(default_factory=list)
    """What the graph calls its tensors where they are used."""


class _Finder:
    def __init__(self, opset: int, names: Mapping[int, str]) -> None:
        self.opset = opset
        self.names = names
        self.candidates: list[_Candidate] = []
        self.loose: list[tuple[Leaf, NodeProto | None]] = []
        self.notes: list[str] = []
        self._shared: dict[Any, _Candidate] = {}

    def graph(self, scope: Scope) -> None:
        claimed: set[tuple[int, str]] = set()
        for node in scope.graph.nodes:
            if (id(node), "") in claimed:
                continue
            found = self._layer(scope, node)
            if found is not None:
                candidate, used = found
                claimed |= {(id(user), value) for user, value in used}
                key = _same_as(candidate)
                if key in self._shared:
                    self._shared[key].nodes += candidate.nodes
                else:
                    self._shared[key] = candidate
                    self.candidates.append(candidate)
            for inner in subgraphs(node):
                self.graph(Scope(inner, scope.opset, scope.names, scope))
        self._loose(scope, claimed)

    def _layer(self, scope: Scope, node: NodeProto) -> tuple[_Candidate, list[tuple[NodeProto, str]]] | None:
        if node.domain or not node.outputs:
            return None
        if node.op_type == "Einsum":
            return _einsum(scope, node)
        places = _WEIGHTS.get(node.op_type)
        if places is None:
            return None
        found: dict[str, Expression] = {}
        used: list[tuple[NodeProto, str]] = []
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
        candidate = _Candidate(node.op_type, found, _settings(node), [node])
        fits = _FITTING.get(node.op_type, _as_it_is)(scope, node, candidate)
        if not fits:
            return None
        if "B" not in found and node.op_type in _BIASED:
            used += _bias_behind(scope, node, candidate)
        candidate.values = [value for _, value in used]
        candidate.folded = folded(node)
        return candidate, used

    def _loose(self, scope: Scope, claimed: set[tuple[int, str]]) -> None:
        """Uses of stored tensors in which they are no weights of a layer that is known, and tensors without a use."""
        used: set[str] = set()
        for node in scope.graph.nodes:
            if any(scope.constant(value) is not None for value in node.outputs[:1]):
                continue
            for place, value in enumerate(node.inputs):
                expression = scope.constant(value)
                if expression is None:
                    continue
                for leaf in leaves(expression):
                    used.add(leaf.name)
                    if (id(node), value) not in claimed and _is_weight(leaf, node, place, _starts_only(scope, node)):
                        self.loose.append((leaf, node))
        for name, tensor in scope.graph.initializers.items():
            leaf = Leaf(scope.name_of(tensor), tensor)
            if (
                tensor.data is not None
                and leaf.name not in used
                and name not in scope.users
                and _is_weight(leaf, None, 0, False)
            ):
                self.loose.append((leaf, None))

    def crossings(self, scope: Scope) -> Crossings:
        """Which layers cross a Flatten, by their numbers."""
        used: dict[int, Used] = {}
        adds: set[int] = set()
        for number, candidate in enumerate(self.candidates):
            first = next(iter(candidate.expressions.values()))
            made = _made(candidate, first)[0]
            for node in candidate.nodes:
                if node.op_type == candidate.cls:
                    used[id(node)] = Used(number, node.op_type, first.shape, made)
                else:
                    adds.add(id(node))
        return follow(scope, used, frozenset(adds))

    def named(self) -> Iterator[FoundLayer]:
        """The layers under paths that differ, their tensors under names that do."""
        paths = _paths(self.candidates)
        taken = set(paths)
        seen: set[str] = set()
        for candidate, path in zip(self.candidates, paths, strict=True):
            views = {}
            for local, expression in candidate.expressions.items():
                name = _unique(_tensor_name(expression, path, local, seen), seen)
                views[local] = View(name, expression, candidate.factors.get(local, 1.0))
            if candidate.folded:
                self.notes.append(f"{path}: {_FOLDED[candidate.folded]}; they are not the layer's own")
            why = refusal(str(candidate.cls), candidate.config) or candidate.config.get("odd", "")
            if "P" in views:
                why = "; ".join(part for part in (why, "peepholes") if part)
            if why:
                # Its tensors get names of their own, so that they fit into the same layer with the same settings alone.
                views = {f"{local} ({why})": view for local, view in views.items()}
                self.notes.append(f"{path}: a {candidate.cls} with {why}, which no other framework has; kept as it is")
            yield FoundLayer(path, candidate.cls, views, candidate.config, tuple(candidate.nodes))
        yield from self._unknown(taken, seen)

    def _unknown(self, taken: set[str], seen: set[str]) -> Iterator[FoundLayer]:
        groups: dict[str, dict[str, View]] = {}
        nodes: dict[str, list[NodeProto]] = {}
        done: set[tuple[str, int]] = set()
        claimed = set(seen)
        for leaf, node in self.loose:
            path, _, local = leaf.name.rpartition(".")
            name = leaf.name
            if name in claimed:
                # It is a layer's weight, too: both uses must get the same elements.
                path = (module_of(node) if node else "") or (node.name if node else "") or leaf.name
                name, local = f"{leaf.name}@{path}", "value"
                path = path if path not in taken else name
            elif not path or anonymous(leaf.name) or "/" in leaf.name or path in taken:
                path, local = leaf.name, "value"
            if (leaf.name, id(node) if name != leaf.name else 0) in done or name in groups.get(path, {}):
                continue
            done.add((leaf.name, id(node) if name != leaf.name else 0))
            name = _unique(name, seen)
            group = groups.setdefault(path, {})
            group[local if local not in group else name] = View(name, leaf)
            if node is not None:
                nodes.setdefault(path, []).append(node)
        for path, views in groups.items():
            yield FoundLayer(_unique(path, taken), None, views, {}, tuple(nodes.get(path, ())))


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


def _as_it_is(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
    return True


def _gemm(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
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


def _matmul(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
    return len(candidate.expressions["W"].shape) == 2


def _gather(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
    return len(candidate.expressions["data"].shape) == 2 and candidate.config.get("axis", 0) in (0, -2)


def _vectors(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
    return len({e.shape for e in candidate.expressions.values()}) == 1 and all(
        len(e.shape) == 1 for e in candidate.expressions.values()
    )


def _group_norm(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
    groups = candidate.config.get("num_groups")
    if not _vectors(scope, node, candidate):
        return False
    if scope.opset < 21 and candidate.expressions["scale"].shape[0] == groups:
        candidate.config["odd"] = "one scale for each group, as before opset 21"
    return True


def _prelu(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
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


def _window(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
    return len(candidate.expressions["W"].shape) > 2


def _recurrent(scope: Scope, node: NodeProto, candidate: _Candidate) -> bool:
    return "R" in candidate.expressions and all(len(candidate.expressions[local].shape) == 3 for local in "WR")


_FITTING = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Gather": _gather,
    **dict.fromkeys(("Conv", "ConvTranspose"), _window),
    "BatchNormalization": _vectors,
    "InstanceNormalization": _vectors,
    "GroupNormalization": _group_norm,
    "PRelu": _prelu,
    **dict.fromkeys(RECURRENT, _recurrent),
}
_BIASED = ("Gemm", "MatMul", "Conv", "ConvTranspose")


def _flat(expression: Expression) -> Expression:
    size = math.prod(expression.shape)
    return expression if expression.shape == (size,) else Reshaped(expression, (size,))


def _bias_behind(scope: Scope, node: NodeProto, candidate: _Candidate) -> list[tuple[NodeProto, str]]:
    """The bias that an Add behind the operator adds, if it is one: then it is the layer's, and its uses are told."""
    added = _added(scope, node)
    if added is None:
        return []
    adds, value, bias = added
    weight = candidate.expressions["W"]
    out, behind = _made(candidate, weight)
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


def _made(candidate: _Candidate, weight: Expression) -> tuple[int, int]:
    """How many features an operator makes, and how many axes stand behind them."""
    match candidate.cls:
        case "Conv":
            return weight.shape[0], len(weight.shape) - 2
        case "ConvTranspose":
            return weight.shape[1] * int(candidate.config.get("group", 1)), len(weight.shape) - 2
        case "Gemm" if candidate.config.get("transB", 0):
            return weight.shape[0], 0
    return weight.shape[-1], 0


def _turn(candidate: _Candidate, axes: set[str], channels: Mapping[str, int]) -> None:
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


def _einsum(scope: Scope, node: NodeProto) -> tuple[_Candidate, list[tuple[NodeProto, str]]] | None:
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
    candidate = _Candidate("Einsum", {"W": kernel}, config, [node])
    sizes = dict(zip(terms[place], kernel.shape, strict=True))
    return candidate, [(node, node.inputs[place]), *_einsum_bias(scope, node, candidate, others, result, sizes)]


def _einsum_bias(
    scope: Scope, node: NodeProto, candidate: _Candidate, others: list[str], result: str, sizes: Mapping[str, int]
) -> list[tuple[NodeProto, str]]:
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


def _same_as(candidate: _Candidate) -> Any:
    """Equal for two uses of one layer."""
    expressions = tuple(candidate.expressions.items())
    settings = tuple(sorted((name, repr(value)) for name, value in candidate.config.items()))
    return candidate.cls, tuple((local, _place(e)) for local, e in expressions), settings


def _place(expression: Expression) -> Any:
    return tuple((leaf.name, leaf.tensor.span.at) for leaf in leaves(expression)), expression.shape, _steps(expression)


def _steps(expression: Expression) -> str:
    """How an expression is made, in words; equal for expressions that are."""
    if isinstance(expression, Leaf):
        return expression.name
    parts = expression.parts if hasattr(expression, "parts") else (expression.base,)
    kept = {k: v for k, v in vars(expression).items() if k not in ("base", "parts")}
    return f"{type(expression).__name__}{sorted(kept.items())}({','.join(map(_steps, parts))})"


def _starts_only(scope: Scope, node: NodeProto, depth: int = 0) -> bool:
    """True for a node whose results are nothing but the initial states of recurrent layers."""
    if depth > _MOST_STEPS or node.op_type not in _SPREADING:
        return False
    users = [(user, value) for value in node.outputs for user in scope.users.get(value, [])]
    return bool(users) and all(
        (user.op_type in RECURRENT and user.inputs.index(value) in _INITIAL_STATES)
        or _starts_only(scope, user, depth + 1)
        for user, value in users
    )


def _is_weight(leaf: Leaf, node: NodeProto | None, place: int, starts: bool) -> bool:
    """True for what a model has learned, as far as that can be told; a setting of the graph is none."""
    op = node.op_type if node is not None else ""
    if op == "Shape" or (node is not None and not node.domain and place in _SETTINGS.get(op, ())):
        return False
    dtype, size = DTYPES[leaf.tensor.code], math.prod(leaf.shape)
    if dtype.kind == "b":
        return False
    if dtype.kind in "iu":
        return op in _QUANTIZED or (dtype.itemsize == 1 and size > 1)
    starts = starts or (op in RECURRENT and place in _INITIAL_STATES)
    if starts and leaf.tensor.nbytes <= _LARGEST_STATE:
        data = leaf.tensor.data
        return data is not None and bool(np.any(data.read()))
    if size == 1:
        return "." in leaf.name and not anonymous(leaf.name) and "/" not in leaf.name
    return size > 1


def _paths(candidates: list[_Candidate]) -> list[str]:
    """A path for each layer: after its module, its tensors or its node; layers of a stack are numbered."""
    wanted = [_wanted_path(candidate) for candidate in candidates]
    members: dict[str, list[_Candidate]] = {}
    for candidate, path in zip(candidates, wanted, strict=True):
        members.setdefault(path, []).append(candidate)
    stacks = {path for path, found in members.items() if _is_stack(found)}
    taken: set[str] = set()
    counts: dict[str, int] = {}
    paths = []
    for path in wanted:
        name = path
        if path in stacks:
            name = f"{path}.{counts.get(path, 0)}"
            counts[path] = counts.get(path, 0) + 1
        paths.append(_unique(name, taken))
    return paths


def _is_stack(members: list[_Candidate]) -> bool:
    """Several recurrent operators of one module: the levels of a torch LSTM."""
    return len(members) > 1 and all(c.cls in RECURRENT and c.cls == members[0].cls for c in members)


def _wanted_path(candidate: _Candidate) -> str:
    node = candidate.nodes[0]
    own = common_stem(candidate.values) or common_stem(
        leaf.tensor.name for e in candidate.expressions.values() for leaf in leaves(e)
    )
    module = module_of(node)
    path = own or module
    # Weights that are tied have the name of another layer.
    if own and module and not candidate.folded and not (own == module or own.startswith(f"{module}.")):
        path = module
    if not path:
        path = node.name or next((name for name in node.outputs if name), candidate.cls or "layer")
    # Folded weights must not pass for those of the layer that had the name.
    return f"{path}_{candidate.folded}" if candidate.folded else path


def _tensor_name(expression: Expression, path: str, local: str, seen: set[str]) -> str:
    found = list(leaves(expression))
    if len(found) == 1 and found[0].name not in seen:
        return found[0].name
    return f"{found[0].name}@{path}" if len(found) == 1 else f"{path}.{local}"


def _unique(name: str, seen: set[str]) -> str:
    unique, count = name, 1
    while unique in seen:
        count += 1
        unique = f"{name}_{count}"
    seen.add(unique)
    return unique
