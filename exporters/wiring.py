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

_SIZES: Mapping[str, tuple[tuple[str, str, int], ...]] = {
    "Dense": (("units", "kernel", -1),),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), (("filters", "kernel", -1),)),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), (("filters", "kernel", -2),)),
    **dict.fromkeys(("SimpleRNN", "LSTM", "GRU"), (("units", "recurrent_kernel", -2),)),
    "Embedding": (("output_dim", "embeddings", -1), ("embedding_dim", "weight", -1)),
    "Linear": (("out_features", "weight", 0), ("in_features", "weight", 1)),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), (("out_channels", "weight", 0),)),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), (("in_channels", "weight", 0),)),
}
"""Settings of a class that its tensors tell, too: (setting, tensor, axis)."""


def with_graph(model: NativeModel, described: Mapping[str, Any] | None, capture: Capture) -> NativeModel:
    """The model with the graph and the Flatten splits that `capture` finds in its description, if it has one."""
    if described is None:
        return model
    wrong = next(_contradictions(model), None)
    if wrong is not None:
        return replace(model, notes=(*model.notes, f"no graph: {wrong}"))
    try:
        graph, splits, notes = capture(described)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # The description comes out of a file: settings may be missing, of any type, or contradict each other.
        note = printable(f"no graph: the model's description makes no sense ({type(error).__name__}: {error})", 200)
        return replace(model, notes=(*model.notes, note))
    orderless: frozenset[str] = frozenset()
    if graph is not None:
        orderless = frozenset(path for path in behind_moved_images(graph) if not splits.get(path))
        unusual = set(_beside_transposed_flatten(graph))
        splits = {path: axes for path, axes in splits.items() if axes or path not in unusual}
    return replace(model, graph=graph, splits=splits, orderless=orderless, notes=(*model.notes, *notes))


def _contradictions(model: NativeModel) -> Iterator[str]:
    """Settings that say another size than the tensors have: such a description says nothing of a Flatten, either."""
    for layer in model.layers:
        for setting, local, axis in _SIZES.get(layer.cls or "", ()):
            told, tensor = layer.config.get(setting), layer.tensors.get(local)
            if type(told) is int and tensor is not None and len(tensor.data.shape) >= 2:
                found = tensor.data.shape[axis]
                if told != found:
                    yield f"{printable(layer.path, 80)}: {setting} is {printable(told, 40)}, its {local} has {found}"


def _beside_transposed_flatten(graph: Graph) -> Iterator[str]:
    """The layers whose features lie in an order that only a Transpose of the graph gives.

    The same model written for another framework has them in its own order, so nothing can be said of their axes.
    """
    makers, readers = _makers(graph), _readers(graph)
    for node in graph.nodes:
        if node.op in ("Flatten", "Reshape") and _moves(makers.get(node.inputs[0])):
            yield from _onward(node.outputs[0], readers)
        if _moves(node) and (before := makers.get(node.inputs[0])) is not None and before.op == "Reshape":
            yield from _backward(before.inputs[0], makers)


def _makers(graph: Graph) -> dict[str, Node]:
    return {value: node for node in graph.nodes for value in node.outputs}


def _readers(graph: Graph) -> dict[str, list[Node]]:
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    return readers


def in_no_known_order(graph: Graph | None) -> frozenset[str]:
    """The layers that take or make elements in an order that no number of channels describes."""
    return (
        frozenset() if graph is None else frozenset({*behind_moved_images(graph), *_beside_transposed_flatten(graph)})
    )


def behind_moved_images(graph: Graph | None) -> Iterator[str]:
    """The layers that take a vector of the elements of an image, in an order that only a Transpose gives."""
    if graph is None:
        return
    makers = _makers(graph)
    readers = _readers(graph)
    inputs = {node.layer: node.inputs[0] for node in graph.nodes if node.layer is not None and node.inputs}
    images = {name for name, value in graph.values.items() if "channel" in value.axes}
    for node in graph.nodes:
        if node.op not in ("Flatten", "Reshape"):
            continue
        before = makers.get(node.inputs[0])
        if before is not None and _moves(before) and images & {*before.inputs, *before.outputs}:
            behind = _onward(node.outputs[0], readers)
            yield from (layer for layer in behind if len(graph.values[inputs[layer]].axes) == 2)


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
