"""The graph of an ONNX model: the same operators, with the first axis kept, layers by their paths.

The archive's graph is an ONNX graph with a few words more for recurrent layers, so that most nodes stay as they are. Where an
operator computes what the graph has no word for, there is none, and a note says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neutral.containers.onnx import ModelProto, NodeProto, ValueInfo, named_tensors
from neutral.conventions.onnx import RECURRENT
from neutral.conventions.onnx_layers import FoundLayer, FoundLayers
from neutral.conventions.onnx_scope import Scope, subgraphs
from neutral.errors import printable
from neutral.exporters.onnx_activations import activation, fused_activations
from neutral.exporters.onnx_flow import Builder, Flow, Inexpressible, Sizes, dtype_name
from neutral.exporters.onnx_operators import OPERATORS
from neutral.exporters.onnx_recurrence import followed, recurrent
from neutral.exporters.onnx_weighed import WEIGHED
from neutral.exporters.onnx_weightless import WEIGHTLESS
from neutral.exporters.wiring import with_graph
from neutral.native import NativeModel
from neutral.schema.graph import Graph


def wired(model: NativeModel, parsed: ModelProto, found: FoundLayers) -> NativeModel:
    """The model with its graph, if there is one that says the same."""

    def captured(described: Mapping[str, Any]) -> tuple[Graph | None, dict[str, dict[str, int]], list[str]]:
        graph, reason = capture(parsed, found)
        splits = {path: dict(axes) for path, axes in model.splits.items()}
        return graph, splits, [reason] if reason else []

    wired_model = with_graph(model, {"graph": parsed}, captured)
    return replace(wired_model, unsettled=wired_model.unsettled | model.unsettled)


def capture(parsed: ModelProto, found: FoundLayers) -> tuple[Graph | None, str]:
    """The graph, or None and the reason."""
    names = {tensor.span.at: name for name, tensor in named_tensors(parsed).items()}
    scope = Scope(parsed.graph, parsed.opset, names)
    walk = _Walk(scope, found)
    try:
        return walk.graph(), ""
    except Inexpressible as reason:
        where = printable(walk.where, 80)
        return None, printable(
            f"{where}: no graph, because of {reason}" if where else f"no graph, because of {reason}", 300
        )


class _Walk:
    def __init__(self, scope: Scope, found: FoundLayers) -> None:
        self.scope = scope
        self.builder = Builder(scope)
        self.found = found
        self.where = ""
        self.layers: dict[int, tuple[FoundLayer, NodeProto | None]] = {}
        self.added: set[int] = set()
        self.calls: dict[int, tuple[FoundLayer, NodeProto, tuple[int, ...]]] = {}
        """The last one of several nodes that are a layer, and the one node that stands for all."""
        self.fused = fused_activations(scope)
        self.added |= {id(node) for one in self.fused.values() for node in one.inner}
        for layer in found.layers:
            if layer.cls is not None:
                self._place(layer)

    def _place(self, layer: FoundLayer) -> None:
        """The nodes of a layer; behind one of them may stand the Add of its bias."""
        for call in layer.calls:
            *inner, last = call.nodes
            self.added |= {id(node) for node in inner}
            self.calls[id(last)] = (
                layer,
                replace(last, op_type=str(layer.cls), inputs=(call.source,), attributes=layer.config),
                call.order,
            )
        main: NodeProto | None = None
        for node in layer.nodes if not layer.calls else ():
            if node.op_type == layer.cls:
                main = node
                self.layers[id(node)] = layer, None
            elif main is not None:
                self.layers[id(main)] = layer, node
                self.added.add(id(node))

    def graph(self) -> Graph:
        b, parsed = self.builder, self.scope.graph
        inputs = [self._input(info) for info in parsed.inputs if info.name not in parsed.initializers]
        if not inputs:
            raise Inexpressible("no input")
        live = self._live()
        for node in parsed.nodes:
            if id(node) in live and id(node) not in self.added:
                self._node(node)
        outputs = [self._output(info.name, inputs) for info in parsed.outputs]
        return b.finished(inputs, outputs)

    def _input(self, info: ValueInfo) -> str:
        b, name = self.builder, info.name
        self.where = name
        if name in b.flows:
            raise Inexpressible("two values of one name")
        if not info.shape:
            raise Inexpressible("an input of a shape that is not known")
        sizes: Sizes = tuple(n if type(n) is int else None for n in info.shape)
        dtype = dtype_name(info.elem_type)
        made = b.describe(name, sizes, dtype)
        b.flows[name] = Flow(made, sizes, dtype, tuple(range(len(sizes))))
        return made

    def _output(self, name: str, inputs: list[str]) -> str:
        b = self.builder
        self.where = name
        flow = b.take(name)
        if flow.value in inputs or flow.value in b.given_out:
            made = b.describe(f"{name}.output", flow.sizes, flow.dtype)
            b.emit("Identity", [flow.value], [made])
            b.alike(flow, replace(flow, value=made))
            flow = replace(flow, value=made)
        b.given_out.add(flow.value)
        return flow.value

    def _live(self) -> set[int]:
        """The nodes on which an output depends."""
        waiting = [info.name for info in self.scope.graph.outputs]
        live: set[int] = set()
        seen: set[str] = set()
        while waiting:
            value = waiting.pop()
            node = self.scope.makers.get(value)
            if value in seen or node is None:
                continue
            seen.add(value)
            if id(node) not in live:
                live.add(id(node))
                waiting.extend(name for name in node.inputs if name)
        return live

    def _node(self, node: NodeProto) -> None:
        b = self.builder
        self.where = node.name or next(iter(node.outputs), node.op_type)
        if node.domain or next(subgraphs(node), None) is not None:
            raise Inexpressible(f"the operator {printable(f'{node.domain}.{node.op_type}'.lstrip('.'), 60)}")
        if any(name in b.flows for name in node.outputs):
            raise Inexpressible("two values of one name")
        if id(node) in self.calls:
            layer, b.node, order = self.calls[id(node)]
            if order:
                given = f"{b.node.inputs[0]} (turned for {layer.path})"
                b.flows[given] = b.turned_to(b.flow(b.node.inputs[0]), order)
                b.node = replace(b.node, inputs=(given,))
            self._layer(b.node, layer)
            return
        if id(node) in self.fused:
            one = self.fused[id(node)]
            b.node = replace(node, inputs=(one.source,))
            activation(b, one)
            return
        if self._aside(node):
            return
        placed = self.layers.get(id(node))
        if placed is not None:
            layer, add = placed
            b.node = node if add is None else replace(node, outputs=(add.outputs[0], *node.outputs[1:]))
            self._layer(node, layer)
            return
        b.node = node
        if followed(b, node):
            return
        rule = WEIGHTLESS.get(node.op_type) or OPERATORS.get(node.op_type)
        if rule is None:
            raise Inexpressible(f"the operator {printable(node.op_type, 60)}")
        rule(b)

    def _layer(self, node: NodeProto, layer: FoundLayer) -> None:
        odd = next((local.partition(" (")[2][:-1] for local in layer.tensors if " (" in local), "")
        if odd:
            raise Inexpressible(f"a {node.op_type} with {odd}")
        channels = self.found.turned.get(layer.path, {})
        if node.op_type in RECURRENT:
            recurrent(self.builder, layer)
        elif node.op_type in WEIGHED:
            WEIGHED[node.op_type](self.builder, layer, channels)
        else:
            raise Inexpressible(f"the operator {node.op_type}")

    def _aside(self, node: NodeProto) -> bool:
        """True for nodes that compute sizes or rearrange stored tensors: nothing that flows."""
        b = self.builder
        if id(node) in self.layers:
            return False
        if all(b.is_stored(value) or self.scope.zero(value) for value in node.outputs if value):
            return True
        if node.op_type in ("Shape", "Size", "Constant", "ConstantOfShape"):
            return True
        return not any(value in b.flows for value in node.inputs)
