"""What stands around paired layers in two wired models: the order of the elements in front, the operators behind.

Values get labels that both models share: inputs by name, paired layers by their pair, other operators by what they are
computed from. Each element that an operator computes anew is numbered; Flatten, Reshape, Transpose and Concat only move
numbers, so that two layers take their inputs in one order exactly if they take the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neutral.errors import Problem
from neutral.schema.graph import Graph, Node

Sequences = Mapping[int, frozenset[tuple[str, ...]]]


@dataclass(frozen=True)
class Wiring:
    """One of the two models. `channels_last`: its framework has the channels of an image last, as the graph has not."""

    graph: Graph
    channels_last: bool


_ACTIVATIONS: Mapping[str, Mapping[str, Any]] = {
    **{op: {} for op in ("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign", "Swish", "HardSwish", "Mish")},
    **{op: {} for op in ("Selu", "Exp", "Neg", "Abs", "Clip")},
    **{op: {"alpha": 1.0} for op in ("Elu", "Celu", "ThresholdedRelu")},
    "LeakyRelu": {"alpha": 0.01},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Shrink": {"lambd": 0.5, "bias": 0.0},
    "Gelu": {"approximate": "none"},
}
"""Operators on each element, with what ONNX takes where an attribute is not given."""

_NORMS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization", "PRelu")
_LAST_NORMS = ("LayerNormalization", "RMSNormalization")
_POINTWISE = {"Gemm": -1, **dict.fromkeys(_NORMS, 1)}
"""Layers that treat all positions alike, and the axis of their features where channels come first."""
_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_MOVES = (*_RESHAPES, "Transpose", "Concat")
_SILENT = ("Identity", "Cast", *_RESHAPES, "Transpose")
_KEEPS_ORDER = (*_ACTIVATIONS, *_NORMS, *_LAST_NORMS, "Identity", "Cast", "Softmax", "LogSoftmax")
_COMMUTES = ("Add", "Mul", "Max", "Min", "Mean")
_MAXIMA = ("MaxPool", "GlobalMaxPool")
_TOLD_OF_POOLS = ("kernel_shape", "strides")
_TOLD_OF_LAYERS = ("is_causal", "return_sequences")
_MOST_ELEMENTS = 1 << 22
_LONGEST_WAY = 64


def differing_surroundings(
    source: Wiring, target: Wiring, pairs: Mapping[str, str], one_order: bool
) -> tuple[list[Problem], list[str]]:
    """What stands around the paired layers (source path -> target path) and differs: what is refused, and remarks.

    `one_order` says that both frameworks keep the axes of their values in one order, so that it can be compared.
    """
    labels: dict[Any, int] = {}
    numbers: dict[Any, int] = {}
    named = set(source.graph.inputs) == set(target.graph.inputs)
    ours = _Side(source, {path: path for path in pairs}, "source", named, labels, numbers)
    theirs = _Side(target, {other: path for path, other in pairs.items()}, "target", named, labels, numbers)
    problems: list[Problem] = []
    remarks: list[str] = []
    for label in ours.anchors.keys() & theirs.anchors.keys():
        a, b = ours.anchors[label], theirs.anchors[label]
        where = a.where if a.where == b.where else f"{a.where} -> {b.where}"
        if a.node is not None and b.node is not None and a.node.layer is not None:
            remarks += _differing_calls(where, a.node, b.node)
            if one_order and _in_another_order(ours, a.node, theirs, b.node):
                problems.append(_order_problem(where))
        refused, told = _behind(where, ours.behind(a.value), theirs.behind(b.value))
        problems += refused
        remarks += told
    return sorted(problems, key=lambda problem: problem.where), sorted(remarks)


def _order_problem(where: str) -> Problem:
    return Problem(
        where,
        "inputs in another order than in the template (Permute, Reshape or Concatenate in front)",
        "one order",
        "build the template with the same layers in front of it",
    )


def _differing_calls(where: str, a: Node, b: Node) -> Iterator[str]:
    for name in _TOLD_OF_LAYERS:
        mine, other = bool(a.attributes.get(name)), bool(b.attributes.get(name))
        if a.op == b.op and mine != other:
            yield f"{where}: {name} is {mine} in the source and {other} in the template"


def _behind(where: str, ours: Sequences, theirs: Sequences) -> tuple[list[Problem], list[str]]:
    """Operators between an anchor and the next ones, compared where both models have the same next one."""
    for end in ours.keys() & theirs.keys():
        a, b = ours[end], theirs[end]
        if {_activations(way) for way in a} != {_activations(way) for way in b}:
            do = "build the template with the same activations"
            return [Problem(where, f"{_told(a)} behind it", f"the template's {_told(b)}", do)], []
        if {_settled(way) for way in a} != {_settled(way) for way in b}:
            return [], [f"{where}: {_told(a)} behind it in the source and {_told(b)} in the template"]
    return [], []


def _activations(way: Sequence[str]) -> tuple[str, ...]:
    return tuple(step for step in way if step.split("(")[0] in _ACTIVATIONS)


def _settled(way: Sequence[str]) -> tuple[str, ...]:
    """A way with its maxima behind all else: a maximum and a growing function commute."""
    return tuple(sorted(way, key=lambda step: step.split("(")[0] in _MAXIMA))


def _told(ways: frozenset[tuple[str, ...]]) -> str:
    return " or ".join(sorted(", ".join(way) or "nothing" for way in ways))


@dataclass(frozen=True)
class _Anchor:
    """A value that both models may have, where a way to the next ones begins."""

    where: str
    value: str
    node: Node | None = None


class _Side:
    """The labels, anchors and numbered elements of one model."""

    def __init__(
        self,
        wiring: Wiring,
        names: Mapping[str, str],
        side: str,
        named_inputs: bool,
        labels: dict[Any, int],
        numbers: dict[Any, int],
    ) -> None:
        self.graph, self.channels_last = wiring.graph, wiring.channels_last
        self.anchors: dict[int, _Anchor] = {}
        self._named_inputs = named_inputs
        self._names, self._side, self._shared, self._numbers = names, side, labels, numbers
        self._labels: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._constants: dict[str, Any] = {}
        self._makers = {value: node for node in self.graph.nodes for value in node.outputs}
        self._readers: dict[str, list[Node]] = {}
        self._elements: dict[str, np.ndarray[Any, Any]] = {}
        for node in self.graph.nodes:
            for value in node.inputs:
                self._readers.setdefault(value, []).append(node)
        self._label_all()

    def _label(self, *key: Any) -> int:
        return self._shared.setdefault(key, len(self._shared))

    def _label_all(self) -> None:
        uses: Counter[str] = Counter()
        made_as: Counter[int] = Counter()
        for i, name in enumerate(self.graph.inputs):
            self._labels[name] = self._label("input", name if self._named_inputs else i)
            self.anchors[self._labels[name]] = _Anchor(name, name)
        for node in self.graph.nodes:
            if node.op == "Constant":
                self._constants[node.outputs[0]] = node.attributes.get("value_float")
            own = self._own_label(node, uses)
            merges = node.layer is not None or len(self._computed(node)) > 1
            if merges and node.outputs:
                made_as[own] += 1
                self.anchors[own] = _Anchor(node.layer or node.name, node.outputs[0], node)
                self._ends[node.name] = own
            keeps = node.op in _KEEPS_ORDER and node.inputs
            for i, value in enumerate(node.outputs):
                made = self._label(own, i) if i else own
                self._labels[value] = self._labels[node.inputs[0]] if keeps else made
        self.anchors = {label: anchor for label, anchor in self.anchors.items() if made_as[label] < 2}

    def _own_label(self, node: Node, uses: Counter[str]) -> int:
        if node.layer is not None:
            uses[node.layer] += 1
            name = self._names.get(node.layer)
            return self._label("layer", (self._side, node.layer) if name is None else name, uses[node.layer])
        given = [self._labels[value] for value in node.inputs]
        given = sorted(given) if node.op in _COMMUTES else given
        moved: tuple[Any, ...] = ()
        if node.op in _MOVES:
            how = () if node.op in _RESHAPES else (node.op, node.attributes.get("perm"), node.attributes.get("axis"))
            moved = (*how, *(self._native_shape(value) for value in (*node.inputs, *node.outputs)))
        constant = self._constants.get(node.outputs[0]) if node.outputs else None
        return self._label("moved" if node.op in _MOVES else node.op, moved, constant, *given)

    def label_of(self, value: str) -> int:
        return self._labels[value]

    def _computed(self, node: Node) -> list[str]:
        return [value for value in node.inputs if value not in self._constants]

    # What stands behind a value.

    def behind(self, value: str) -> Sequences:
        """By the label of the next anchor (-1: an output), the operators on the ways to it."""
        found: dict[int, set[tuple[str, ...]]] = {}
        waiting: list[tuple[str, tuple[str, ...]]] = [(value, ())]
        while waiting:
            here, way = waiting.pop()
            if len(way) > _LONGEST_WAY:
                continue
            readers = self._readers.get(here, ())
            if not readers:
                found.setdefault(-1, set()).add(way)
            for node in readers:
                if node.name in self._ends:
                    found.setdefault(self._ends[node.name], set()).add(way)
                elif node.outputs:
                    waiting.append((node.outputs[0], way if node.op in _SILENT else (*way, self._step(node))))
        return {end: frozenset(ways) for end, ways in found.items()}

    def _step(self, node: Node) -> str:
        """An operator with those of its settings that are compared."""
        settings: dict[str, Any] = {}
        if node.op in _ACTIVATIONS:
            settings = {**_ACTIVATIONS[node.op], **node.attributes}
        elif node.op in ("MaxPool", "AveragePool"):
            settings = {name: node.attributes.get(name) for name in _TOLD_OF_POOLS}
        numbers = [self._constants[value] for value in node.inputs if value in self._constants]
        told = [f"{name}={_number(value)}" for name, value in sorted(settings.items())]
        told += [_number(number) for number in numbers]
        return f"{node.op}({', '.join(told)})" if told else node.op

    # Which elements a value consists of.

    def taken(self, node: Node, value: str) -> np.ndarray[Any, Any]:
        """The numbers of the elements that a layer is given; those of one feature in no order, if it knows none."""
        elements = self.elements(value)
        if node.op not in _POINTWISE:
            return elements
        axis = -1 if self.channels_last or elements.ndim == 2 else _POINTWISE[node.op]
        return np.sort(np.moveaxis(elements, axis, -1).reshape(-1, elements.shape[axis]), axis=0)

    def elements(self, value: str) -> np.ndarray[Any, Any]:
        waiting = [value]
        while waiting:
            here = waiting[-1]
            maker = self._makers.get(here)
            given = list(maker.inputs) if maker is not None and maker.op in _MOVES else []
            if maker is not None and maker.op in _KEEPS_ORDER:
                given = list(maker.inputs[:1])
            missing = [each for each in given if each not in self._elements]
            if missing:
                waiting += missing
                continue
            self._elements[here] = self._moved(maker, here) if maker is not None and given else self._fresh(here)
            waiting.pop()
        return self._elements[value]

    def _fresh(self, value: str) -> np.ndarray[Any, Any]:
        shape = self._native_shape(value)
        size = math.prod(shape)
        if size > _MOST_ELEMENTS:
            raise ValueError("too many elements to compare")
        first = self._numbers.setdefault((self._labels[value], shape), self._numbers.get("next", 0))
        if first == self._numbers.get("next", 0):
            self._numbers["next"] = first + size
        return np.arange(first, first + size).reshape(shape)

    def _moved(self, node: Node, value: str) -> np.ndarray[Any, Any]:
        given = [self._elements[each] for each in node.inputs]
        if node.op in _RESHAPES:
            return given[0].reshape(self._native_shape(value))
        if node.op not in _MOVES:
            return given[0]
        turned = [
            np.moveaxis(each, -1, 1) if self._turned(name) else each
            for each, name in zip(given, node.inputs, strict=True)
        ]
        perm, axis = node.attributes.get("perm"), node.attributes.get("axis")
        if sum(each.size for each in given) > _MOST_ELEMENTS:
            raise ValueError("too many elements to compare")
        if node.op == "Concat":
            made = np.concatenate(turned, axis if isinstance(axis, int) else 1)
        else:
            made = turned[0].transpose(perm if isinstance(perm, tuple) else None)  # type: ignore[arg-type]
        return np.moveaxis(made, 1, -1) if self._turned(value) else made

    def _turned(self, value: str) -> bool:
        """True if the graph has the channels of this value first and its framework has them last."""
        axes = self.graph.values[value].axes
        return self.channels_last and len(axes) > 2 and axes[1] == "channel"

    def _native_shape(self, value: str) -> tuple[int, ...]:
        """The shape in the framework's own order, 1 for what is not known."""
        described = self.graph.values[value]
        shape = tuple(n or 1 for n in described.shape or (1,) * len(described.axes))
        return (*shape[:1], *shape[2:], shape[1]) if self._turned(value) else shape


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


def _in_another_order(ours: _Side, a: Node, theirs: _Side, b: Node) -> bool:
    """True if two layers are certainly given the same elements in different orders."""
    for mine, other in zip(a.inputs, b.inputs, strict=False):
        if ours.label_of(mine) == theirs.label_of(other):
            continue
        try:
            left, right = ours.taken(a, mine), theirs.taken(b, other)
        except (
            ValueError,
            TypeError,
            IndexError,
        ):  # sizes that the graph does not know, or settings that make no sense
            continue
        if left.shape == right.shape and not np.array_equal(left, right):
            return bool(np.array_equal(np.sort(left, axis=None), np.sort(right, axis=None)))
    return False
