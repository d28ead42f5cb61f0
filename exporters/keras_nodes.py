"""The wiring in the config of a functional model: which tensors each call of a layer takes, in Keras 2 and Keras 3.

>>> call = parse_node(1, 0, [["x", 0, 0, {}]], {"x": 0, "fc": 1})
>>> call.positional
(TensorReference(reference=('x', 0, 0)),)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neutral.conventions.keras_config import CONSTANT
from neutral.conventions.keras_variables import CONTAINERS
from neutral.exporters.keras_flow import Config, Malformed

Reference = tuple[str, int, int]


@dataclass(frozen=True)
class Application:
    """One inbound node of a layer of a functional model, not yet resolved."""

    layer: int
    node: int
    positional: tuple[Any, ...]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class TensorReference:
    """A tensor named in a config: layer, node, output."""

    reference: Reference


def found_references(value: Any) -> list[Reference]:
    if isinstance(value, TensorReference):
        return [value.reference]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [r for v in value for r in found_references(v)] if isinstance(value, list | tuple) else []


def _is_reference(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and isinstance(value[2], int)
    )


def _is_input(value: Any) -> bool:
    """A tensor, or a constant, that a node of Keras 2 takes."""
    return _is_reference(value) or (isinstance(value, list) and len(value) in (3, 4) and value[0] == CONSTANT)


def references(value: Any) -> list[Reference]:
    """`["name", 0, 0]`, a list of such, or a dict of such."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if _is_reference(value):
        value = [value]
    if not isinstance(value, list | tuple) or not value or not all(_is_reference(v) for v in value):
        raise Malformed("inputs or outputs that are not named")
    return [(v[0], v[1], v[2]) for v in value]


def inbound_nodes(layer: Config) -> list[Any]:
    nodes = layer.get("inbound_nodes") or []
    if not isinstance(nodes, list):
        raise Malformed("inbound nodes that are no list")
    return nodes


def parse_node(layer: int, number: int, node: Any, names: Mapping[str, int]) -> Application:
    """One inbound node: of Keras 3 (args, kwargs) or of Keras 2 (nested lists)."""
    if isinstance(node, Mapping):
        arguments = node.get("kwargs") or {}
        if not isinstance(node.get("args", []), list) or not isinstance(arguments, Mapping):
            raise Malformed("an inbound node without args")
        positional = [_tensors3(value) for value in node.get("args", [])]
        return Application(layer, number, tuple(positional), {k: _tensors3(v) for k, v in arguments.items()})
    if isinstance(node, list) and node and _is_input(node):
        node = [node]
    if not isinstance(node, list) or not node or not all(_is_input(entry) for entry in node):
        raise Malformed("an inbound node that is not understood")
    arguments = {}
    positional = [
        entry[2] if entry[0] == CONSTANT else TensorReference((entry[0], entry[1], entry[2])) for entry in node
    ]
    for entry in node:
        extra = entry[3] if len(entry) == 4 else {}
        if not isinstance(extra, Mapping):
            raise Malformed("an inbound node that is not understood")
        arguments.update({k: _tensors2(v, names) for k, v in extra.items()})
    return Application(layer, number, tuple(positional), arguments)


def _tensors3(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__":
        config = value.get("config")
        history: Any = config.get("keras_history") if isinstance(config, Mapping) else None
        if not _is_reference(history):
            raise Malformed("a tensor without a history")
        return TensorReference((history[0], history[1], history[2]))
    return [_tensors3(v) for v in value] if isinstance(value, list) else value


def _tensors2(value: Any, names: Mapping[str, int]) -> Any:
    if _is_reference(value) and value[0] in names:
        return TensorReference((value[0], value[1], value[2]))
    return [_tensors2(v, names) for v in value] if isinstance(value, list) else value


def first_node(layer: Config) -> int:
    """Keras 2 does not write the node with which a nested model was made, but counts it."""
    config, nodes = layer["config"], inbound_nodes(layer)
    if str(layer.get("class_name")) not in CONTAINERS or not nodes or isinstance(nodes[0], Mapping):
        return 0
    inner = config.get("layers") if isinstance(config, Mapping) else None
    head = inner[0] if isinstance(inner, list) and inner else None
    return int(isinstance(head, Mapping) and head.get("class_name") == "InputLayer")


def declared_shapes(layers: Sequence[Config]) -> dict[Reference, Any]:
    """The shapes that Keras 3 writes beside each tensor."""
    shapes: dict[Reference, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Mapping):
            config = value.get("config")
            if value.get("class_name") == "__keras_tensor__" and isinstance(config, Mapping):
                history: Any = config.get("keras_history")
                if _is_reference(history):
                    shapes[history[0], history[1], history[2]] = config.get("shape")
                return
            value = list(value.values())
        if isinstance(value, list):
            for inner in value:
                visit(inner)

    for layer in layers:
        visit(layer.get("inbound_nodes"))
    return shapes
