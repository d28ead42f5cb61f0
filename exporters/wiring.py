"""Adds to a model what its own description says of how its layers are wired."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from neutral.errors import printable
from neutral.native import NativeModel
from neutral.schema.graph import Graph, Node

Capture = Callable[[Mapping[str, Any]], tuple[Graph | None, dict[str, dict[str, int]], list[str]]]

_MIXING = ("Gemm", "Conv", "ConvTranspose", "Gather", "LSTM", "GRU", "RNN", "Attention", "Einsum")
"""Layers behind which features have a new order of their own."""


def with_graph(model: NativeModel, described: Mapping[str, Any] | None, capture: Capture) -> NativeModel:
    """The model with the graph and the Flatten splits that `capture` finds in its description, if it has one."""
    if described is None:
        return model
    try:
        graph, splits, notes = capture(described)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # The description comes out of a file: settings may be missing, of any type, or contradict each other.
        note = printable(f"no graph: the model's description makes no sense ({type(error).__name__}: {error})", 200)
        return replace(model, notes=(*model.notes, note))
    if graph is not None:
        unusual = set(_beside_transposed_flatten(graph))
        splits = {path: axes for path, axes in splits.items() if axes or path not in unusual}
    return replace(model, graph=graph, splits=splits, notes=(*model.notes, *notes))


def _beside_transposed_flatten(graph: Graph) -> Iterator[str]:
    """The layers whose features lie in an order that only a Transpose of the graph gives.

    The same model written for another framework has them in its own order, so nothing can be said of their axes.
    """
    makers = {value: node for node in graph.nodes for value in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    for node in graph.nodes:
        if node.op in ("Flatten", "Reshape") and _moves(makers.get(node.inputs[0])):
            yield from _onward(node.outputs[0], readers)
        if _moves(node) and (before := makers.get(node.inputs[0])) is not None and before.op == "Reshape":
            yield from _backward(before.inputs[0], makers)


def _moves(node: Node | None) -> bool:
    if node is None or node.op != "Transpose":
        return False
    perm = node.attributes.get("perm")
    return not isinstance(perm, tuple) or perm != tuple(range(len(perm)))


def _onward(value: str, readers: Mapping[str, list[Node]]) -> Iterator[str]:
    seen, waiting = set(), [value]
    while waiting:
        for node in readers.get(waiting.pop(), ()):
            if node.name in seen:
                continue
            seen.add(node.name)
            if node.layer is not None:
                yield node.layer
            if node.op not in _MIXING:
                waiting.extend(node.outputs)


def _backward(value: str, makers: Mapping[str, Node]) -> Iterator[str]:
    seen, waiting = set(), [value]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.layer is not None:
            yield node.layer
        if node.op not in _MIXING:
            waiting.extend(node.inputs)
