"""An ONNX graph while it is put together from the graph of an archive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neutral.containers.onnx_building import Attribute, Described, dtype_number
from neutral.containers.onnx_building import Node as Written
from neutral.errors import Problem, Refused
from neutral.native import NativeLayer
from neutral.schema.graph import Graph, Node, Scalar
from neutral.schema.kinds import AnyLayer

LOWEST_OPSET = 21
"""The first with the GroupNormalization that has a scale per channel; the ones below lack Gelu and LayerNormalization."""

_NEEDS_OPSET: Mapping[str, int] = {"RMSNormalization": 23}
_BFLOAT16_OPSET = 22
"""The first in which convolutions and most other operators take bfloat16."""

FLOATS = ("float32", "float64", "float16", "bfloat16")


class Builder:
    """The nodes and weights so far, and what each value of the archive's graph is called and made of."""

    def __init__(
        self, graph: Graph, weights: Mapping[str, Mapping[str, str]], dtype: str, stored: str | None = None
    ) -> None:
        self.graph = graph
        self.weights = weights
        """The names of each layer's initializers, by their local names."""
        self.dtype = dtype
        self.stored = stored or dtype
        """What the nodes compute with, and what the weights are stored as."""
        self.cast: dict[str, str] = {}
        """Weights that are stored in another dtype, as they are computed with."""
        self.nodes: list[Written] = []
        self.turned: set[tuple[str, str]] = set()
        """Weights (layer, local name) that are the transpose of their initializer, which is another layer's, too."""
        self.transposed: dict[str, str] = {}
        self.constants: dict[str, Scalar] = {}
        """Numbers of the graph, which become tensors of the dtype that they meet."""
        self._taken = {name for names in weights.values() for name in names.values()}
        self._node_names: set[str] = set()
        self._counts: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        for value in (*graph.inputs, *graph.outputs, *graph.values):
            if value not in self.names:
                self.names[value] = self.fresh(value)
        for value in graph.inputs:
            told = graph.values[value].dtype
            self.dtypes[value] = dtype if told in FLOATS else told

    def fresh(self, name: str) -> str:
        """A name that no value has yet: this one, or this one with a number behind it."""
        return self._unlike(name, self._taken)

    def _unlike(self, name: str, taken: set[str]) -> str:
        found = name
        while found in taken:
            self._counts[name] = self._counts.get(name, 0) + 1
            found = f"{name}_{self._counts[name]}"
        taken.add(found)
        return found

    def add(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, attributes: Mapping[str, Attribute]
    ) -> None:
        unique = self._unlike(name, self._node_names)
        self.nodes.append(Written(op, tuple(inputs), tuple(outputs), dict(attributes), unique))

    def shape(self, value: str) -> tuple[int | None, ...]:
        described = self.graph.values[value]
        return described.shape if described.shape is not None else (None,) * len(described.axes)

    @property
    def opset(self) -> int:
        lowest = _BFLOAT16_OPSET if self.dtype == "bfloat16" else LOWEST_OPSET
        return max([lowest, *(_NEEDS_OPSET.get(node.op, 0) for node in self.nodes)])

    def described(self, value: str) -> Described:
        """An input or output: sizes that are not known have names, the batch the same everywhere."""
        inputs = value in self.graph.inputs
        axes, sizes = self.graph.values[value].axes, self.shape(value)
        shape: list[int | str | None] = [
            n if n is not None else "batch" if i == 0 else f"{self.names[value]}_{axes[i]}" if inputs else None
            for i, n in enumerate(sizes)
        ]
        return Described(self.names[value], self.dtypes[value], tuple(shape))


@dataclass(frozen=True)
class Call:
    """One node of the archive's graph at work: its layer, and the names of its inputs and outputs."""

    b: Builder
    node: Node
    layer: AnyLayer | None
    native: NativeLayer | None

    @property
    def x(self) -> str:
        return self.tensor(0)

    @property
    def ins(self) -> list[str]:
        return [self.tensor(i) for i in range(len(self.node.inputs))]

    def tensor(self, i: int) -> str:
        """The name of an input; a number of the graph becomes a tensor of the dtype of the others."""
        if i >= len(self.node.inputs):
            raise self.refuse(f"{len(self.node.inputs)} inputs", f"at least {i + 1}")
        value = self.node.inputs[i]
        if value not in self.b.constants:
            return self.b.names[value]
        return self.constant(value, np.asarray(self.b.constants[value]), self.dtype)

    @property
    def dtype(self) -> str:
        """What the node computes with: the dtype of its first input that is no number."""
        return next((self.b.dtypes[v] for v in self.node.inputs if v not in self.b.constants), self.b.dtype)

    @property
    def name(self) -> str:
        """What the nodes of ONNX are called: as the layer, or as the node itself."""
        return self.node.layer or self.node.name

    @property
    def out(self) -> str:
        return self.b.names[self.node.outputs[0]]

    @property
    def outs(self) -> list[str]:
        return [self.b.names[value] for value in self.node.outputs]

    def axes(self, i: int = 0) -> tuple[str, ...]:
        return self.b.graph.values[self.node.inputs[i]].axes

    @property
    def rank(self) -> int:
        return len(self.axes())

    def shape(self, i: int = 0) -> tuple[int | None, ...]:
        return self.b.shape(self.node.inputs[i])

    def emit(
        self,
        op: str,
        inputs: Sequence[str] | None = None,
        into: str | Sequence[str] | None = None,
        suffix: str = "",
        **attributes: Any,
    ) -> str:
        """Add an operator; gives its (first) output. Without `into` a new value is made.

        What belongs to a layer without being it has a name with a slash, which no reader takes for a layer's.
        """
        name = "/".join(filter(None, (self.name, suffix)))
        outputs = [self.b.fresh(name)] if into is None else [into] if isinstance(into, str) else list(into)
        self.b.add(op, [self.x] if inputs is None else inputs, outputs, name, attributes)
        return outputs[0]

    def constant(self, suffix: str, value: Any, dtype: str | None = None) -> str:
        """A tensor that is no weight: it stands in a node of its own."""
        array = np.asarray(value)
        if dtype is not None:
            array = array.astype(numpy_dtype(dtype))
        name = f"{self.name}/{suffix}"
        output = self.b.fresh(name)
        self.b.add("Constant", (), (output,), name, {"value": array})
        return output

    def filled(self, suffix: str, value: float, shape: Sequence[int]) -> str:
        """A parameter of one number that the layer itself does not have."""
        number = np.asarray([value]).astype(numpy_dtype(self.dtype))
        return self.emit("ConstantOfShape", [self.ints(f"{suffix}.shape", *shape)], suffix=suffix, value=number)

    def ints(self, suffix: str, *values: int) -> str:
        return self.constant(suffix, np.asarray(values, np.int64))

    def weight(self, local: str) -> str:
        """The initializer of a local name, or nothing (an input that is left out) where the layer has none."""
        path = self.node.layer or ""
        name = self.b.weights[path].get(local, "")
        if name and self.b.stored != self.b.dtype:
            if name not in self.b.cast:
                self.b.cast[name] = self.emit("Cast", [name], suffix=f"{local}.cast", to=dtype_number(self.b.dtype))
            name = self.b.cast[name]
        if (path, local) not in self.b.turned:
            return name
        if name not in self.b.transposed:
            self.b.transposed[name] = self.emit("Transpose", [name], suffix="transpose", perm=[1, 0])
        return self.b.transposed[name]

    def product(self, x: str, kernel: str, bias: str, into: str | None = None, suffix: str = "") -> str:
        """x · kernel + bias over the last axis; the bias is an initializer of that local name, if the layer has it."""
        if not self.weight(bias):
            return self.emit("MatMul", [x, kernel], into, suffix)
        made = self.emit("MatMul", [x, kernel], None, suffix)
        return self.emit("Add", [made, self.weight(bias)], into, ".".join(filter(None, (suffix, "add"))))

    def config(self, *names: str) -> dict[str, Any]:
        """Settings of the native layer that become attributes of the operator as they are."""
        assert self.native is not None
        return {name: self.native.config[name] for name in names if name in self.native.config}

    def number(self, name: str, default: float) -> float:
        value = self.node.attributes.get(name)
        return default if value is None else float(value)  # type: ignore[arg-type]

    def flag(self, name: str) -> bool:
        return bool(self.node.attributes.get(name))

    def refuse(self, found: str, expected: str) -> Refused:
        return Refused(Problem(self.name, found, expected, f"{self.node.op} has no ONNX form for it"))


def numpy_dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


Rule = Callable[[Call], None]
"""Adds the operators of one node, which make its outputs."""
