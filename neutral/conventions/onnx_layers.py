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
from neutral.containers.onnx import GraphProto, ModelProto, NodeProto, named_tensors
from neutral.containers.onnx_constants import Expression, Leaf, backward, forward, leaves
from neutral.containers.onnx_tensors import DTYPES, STRING
from neutral.conventions.onnx import RECURRENT, refusal
from neutral.conventions.onnx_candidates import Call, Candidate, candidate_of, made_by, turn
from neutral.conventions.onnx_flatten import Crossings, Used, follow
from neutral.conventions.onnx_idioms import idiom_of
from neutral.conventions.onnx_names import OPERATIONS, anonymous, common_stem, module_of
from neutral.conventions.onnx_scope import Scope, subgraphs
from neutral.conventions.onnx_sizes import sizes_of
from neutral.conventions.onnx_wrapped import wrapped
from neutral.errors import Problem, Unsupported, raise_all
from neutral.native import Tensor

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
_TRAINING = "exported in training mode; it takes the statistics of its input, not those that are stored"
_LENGTHS = "its sequences end at the lengths that the graph gives it (sequence_lens); the other model must be wired to do the same"
_SEQUENCE_LENS = 4
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
    calls: tuple[Call, ...] = ()
    """Where it is used, if each use is several nodes instead of its operator."""


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
    remarks: Mapping[str, str] = field(default_factory=dict)
    """What is to be said of layers whose weights another model may not compute the same with."""


def layers_of(model: ModelProto, where: str) -> FoundLayers:
    """The layers of a model; `Unsupported` for weights that numpy has no elements for."""
    names = {tensor.span.at: name for name, tensor in named_tensors(model).items()}
    finder = _Finder(model.opset, names)
    scope = Scope(model.graph, model.opset, names)
    scope.learn(sizes_of(scope))
    finder.graph(scope)
    for function in model.functions:
        body = GraphProto(function.name, function.nodes)
        finder.graph(Scope(body, function.opsets.get("", model.opset), names))
    raise_all(Unsupported, _unreadable(model, where))
    crossings = finder.crossings(scope)
    for number, axes in crossings.turned.items():
        turn(finder.candidates[number], axes, crossings.splits[number])
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
        finder.remarks,
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


class _Finder:
    def __init__(self, opset: int, names: Mapping[int, str]) -> None:
        self.opset = opset
        self.names = names
        self.candidates: list[Candidate] = []
        self.loose: list[tuple[Leaf, NodeProto | None]] = []
        self.notes: list[str] = []
        self.remarks: dict[str, str] = {}
        self._used: set[str] = set()
        self._shared: dict[Any, Candidate] = {}

    def graph(self, scope: Scope) -> None:
        claimed: set[tuple[int, str]] = set()
        for node in scope.graph.nodes:
            if (id(node), "") in claimed:
                continue
            found = idiom_of(scope, node) or wrapped(scope, node) or candidate_of(scope, node)
            if found is not None:
                candidate, used = found
                claimed |= {(id(user), value) for user, value in used}
                key = _same_as(candidate)
                if key in self._shared:
                    self._shared[key].nodes += candidate.nodes
                    self._shared[key].calls += candidate.calls
                else:
                    self._shared[key] = candidate
                    self.candidates.append(candidate)
            for inner in subgraphs(node):
                self.graph(Scope(inner, scope.opset, scope.names, scope))
        self._loose(scope, claimed)

    def _loose(self, scope: Scope, claimed: set[tuple[int, str]]) -> None:
        """Uses of stored tensors in which they are no weights of a layer that is known, and tensors without a use."""
        for node in scope.graph.nodes:
            if any(scope.constant(value) is not None for value in node.outputs[:1]):
                continue
            for place, value in enumerate(node.inputs):
                expression = scope.constant(value)
                if expression is None:
                    self._listed(scope, node, value, place)
                    continue
                for leaf in leaves(expression):
                    self._used.add(leaf.name)
                    if (id(node), value) not in claimed and _is_weight(leaf, node, place, _starts_only(scope, node)):
                        self.loose.append((leaf, node))
        for name, tensor in scope.graph.initializers.items():
            leaf = Leaf(scope.name_of(tensor), tensor)
            if (
                tensor.data is not None
                and leaf.name not in self._used
                and name not in scope.users
                and _is_weight(leaf, None, 0, False)
            ):
                self.loose.append((leaf, None))

    def _listed(self, scope: Scope, node: NodeProto, value: str, place: int) -> None:
        """Say it of numbers with a fraction that a node has in its attributes, not as a tensor."""
        maker = scope.makers.get(value)
        if maker is None or maker.op_type != "Constant" or place in _SETTINGS.get(node.op_type, ()):
            return
        listed = maker.attributes.get("value_floats")
        if isinstance(listed, tuple) and len(listed) > 1:
            self.notes.append(
                f"{value}: {len(listed)} numbers of the graph itself, which are no tensor and are left out"
            )

    def crossings(self, scope: Scope) -> Crossings:
        """Which layers cross a Flatten, by their numbers."""
        used: dict[int, Used] = {}
        adds: set[int] = set()
        for candidate in self.candidates:
            for call in candidate.calls:
                own = {id(node) for node in call.nodes}
                # What happens inside is not followed, unless others take part in it.
                adds |= {
                    id(node)
                    for node in call.nodes[:-1]
                    if all(id(user) in own for value in node.outputs for user in scope.users.get(value, ()))
                }
        for number, candidate in enumerate(self.candidates):
            first = next(iter(candidate.expressions.values()))
            made = made_by(candidate, first)[0]
            ends = {id(call.nodes[-1]): call for call in candidate.calls}
            for node in candidate.nodes:
                if id(node) in ends or (not ends and node.op_type == candidate.cls):
                    source = ends[id(node)].source if ends else ""
                    used[id(node)] = Used(number, str(candidate.cls), first.shape, made, source)
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
            if remark := _remark(candidate):
                self.remarks[path] = remark
                self.notes.append(f"{path}: {remark}")
            why = refusal(str(candidate.cls), candidate.config) or candidate.config.get("odd", "")
            if "P" in views:
                why = "; ".join(part for part in (why, "peepholes") if part)
            if why:
                # Its tensors get names of their own, so that they fit into the same layer with the same settings alone.
                views = {f"{local} ({why})": view for local, view in views.items()}
                self.notes.append(f"{path}: a {candidate.cls} with {why}, which no other framework has; kept as it is")
            calls = tuple(candidate.calls)
            yield FoundLayer(path, candidate.cls, views, candidate.config, tuple(candidate.nodes), calls)
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
                path = (module_of(node) if node else "") or (node.name if node else "").lstrip("/") or leaf.name
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


def _same_as(candidate: Candidate) -> Any:
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


def _remark(candidate: Candidate) -> str:
    """What must be known of a layer's weights before another model computes with them."""
    if candidate.folded:
        return f"{_FOLDED[candidate.folded]}; they are not the layer's own"
    if candidate.cls == "BatchNormalization" and candidate.config.get("training_mode"):
        return _TRAINING
    ended = any(
        node.op_type in RECURRENT and any(node.inputs[_SEQUENCE_LENS : _SEQUENCE_LENS + 1]) for node in candidate.nodes
    )
    return _LENGTHS if ended else ""


def _paths(candidates: list[Candidate]) -> list[str]:
    """A path for each layer: after its module, its tensors or its node; layers of a stack are numbered."""
    wanted = [_wanted_path(candidate) for candidate in candidates]
    members: dict[str, list[Candidate]] = {}
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


def _is_stack(members: list[Candidate]) -> bool:
    """Several recurrent operators of one module: the levels of a torch LSTM."""
    return len(members) > 1 and all(c.cls in RECURRENT and c.cls == members[0].cls for c in members)


def _wanted_path(candidate: Candidate) -> str:
    node = candidate.nodes[0]
    own = common_stem(candidate.values) or common_stem(
        leaf.tensor.name for e in candidate.expressions.values() for leaf in leaves(e)
    )
    module = module_of(node)
    path = own or module
    # Weights that are tied have the name of another layer.
    if own and module and not candidate.folded and not _within(own, module):
        path = module
    if not path:
        path = node.name or next((name for name in node.outputs if name), candidate.cls or "layer")
        path = path.lstrip("/") or candidate.cls or "layer"
    # Folded weights must not pass for those of the layer that had the name.
    return f"{path}_{candidate.folded}" if candidate.folded else path


def _within(own: str, module: str) -> bool:
    """True if a name is that of a module or of a part of it; TensorFlow names some of a layer's own operations, too."""
    return own == module or own.startswith(f"{module}.") or module in {f"{own}.{part}" for part in OPERATIONS}


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
