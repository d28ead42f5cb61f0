"""How the layers of a model are wired.

The graph is a channels-first ONNX graph: operators have ONNX's names and meanings, and every value has its axes in the
order that ONNX and torch give them (batch, channel, then space; or batch, time, feature). A framework that keeps
channels last permutes when it is read and when it is written, so nothing in here depends on the source.

>>> relu = Node(name="act", op="Relu", inputs=("x",), outputs=("y",))
>>> vector = Value(axes=("batch", "feature"), shape=(None, 3))
>>> graph = Graph(inputs=("x",), outputs=("y",), values={"x": vector, "y": vector}, nodes=(relu,))

A node with `layer` set takes its weights and settings (strides, eps, ...) from that layer of the manifest; its `op` is the
ONNX operator of the layer (Gemm, Conv, ConvTranspose, Gather, BatchNormalization, LayerNormalization,
GroupNormalization, InstanceNormalization, RMSNormalization, PRelu, LSTM, GRU, RNN, Attention, Einsum). All other
nodes are complete in themselves, their settings in `attributes` under ONNX's names.

A recurrent node takes batch-first values (batch, time, feature). Its attributes: `return_sequences`, `return_state`
(booleans: outputs are the sequence or the last step, then the final states), and, if the layer has two directions,
`merge_mode` (concat, sum, mul, ave, or none for two outputs); `initial_state` inputs follow the sequence input.
An attention node takes query, key and value in this order (one input: self-attention).

Axis names: batch, channel, feature, time, depth, height, width; others are free names. Values between nodes may have
unknown shape, or None for a size that is not known.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from neutral.schema.base import Strict

Scalar = bool | int | float | str
Attribute = Scalar | tuple[Scalar, ...] | tuple[tuple[int, ...], ...] | None
Name = Annotated[str, Field(min_length=1)]


class Value(Strict):
    """A tensor that flows between nodes: its logical axes, and its shape with None for sizes not known."""

    axes: tuple[str, ...]
    shape: tuple[int | None, ...] | None = None
    dtype: str = "float32"

    @model_validator(mode="after")
    def _one_size_per_axis(self) -> Value:
        if self.shape is not None and len(self.shape) != len(self.axes):
            raise ValueError(f"{len(self.shape)} sizes for {len(self.axes)} axes")
        return self


class Node(Strict):
    """One operator, or one layer of the manifest."""

    name: Name
    op: Name
    layer: str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    attributes: dict[str, Attribute] = {}


class Graph(Strict):
    """Nodes in an order in which each value is made before it is used."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Value]
    nodes: tuple[Node, ...]

    @model_validator(mode="after")
    def _wired(self) -> Graph:
        known = set(self.inputs)
        names: set[str] = set()
        for node in self.nodes:
            if node.name in names:
                raise ValueError(f"two nodes are named {node.name!r}")
            names.add(node.name)
            for value in node.inputs:
                if value not in known:
                    raise ValueError(f"node {node.name!r} uses {value!r} before it is made")
            for value in node.outputs:
                if value in known:
                    raise ValueError(f"node {node.name!r} makes {value!r} a second time")
                known.add(value)
        missing = [v for v in (*self.outputs, *known) if v not in self.values]
        if missing or not set(self.outputs) <= known:
            raise ValueError(f"values without a description or an origin: {missing or self.outputs}")
        return self
