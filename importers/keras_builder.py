"""The Keras layers that compute a graph, while they are put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from neutral.errors import Problem
from neutral.importers.keras_forms import NO_LAYER, Form, Inexpressible, channels_of, kernel_of, kernel_sides
from neutral.importers.keras_names import Names
from neutral.importers.keras_tensor import Config, KerasTensor, Shape, as_in_graph, channels_last
from neutral.schema.graph import Graph, Node
from neutral.schema.kinds import (
    GRU,
    LSTM,
    AnyLayer,
    Conv,
    ConvTranspose,
    Dense,
    Depthwise,
    SimpleRNN,
)
from neutral.schema.manifest import Manifest

_FEATURES_KEPT = {
    "Relu", "LeakyRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "Tanh", "Gelu", "Softplus", "Softsign", "Swish",
    "Mish", "HardSwish", "Exp", "Clip", "ThresholdedRelu", "Shrink", "Identity", "Softmax", "LogSoftmax", "Neg",
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Mean",
}  # fmt: skip
"""Operators behind which a vector still has one element per element in front."""


@dataclass
class Entry:
    """One Keras layer, applied as many times as it has inbound nodes."""

    cls: str
    config: Config
    nodes: list[tuple[list[Any], Config]] = field(default_factory=list)


class Builder:
    """The layers and tensors found so far. `paths`: the name that each layer of the manifest has in Keras."""

    def __init__(self, manifest: Manifest, graph: Graph, paths: Mapping[str, str]) -> None:
        self.graph = graph
        self.layers: dict[str, AnyLayer] = {layer.path: layer for layer in manifest.layers}
        self.paths = paths
        self.names = Names()
        for layer in manifest.layers:
            if layer.parameters:
                self.names.fresh(self.paths[layer.path])
        self.entries: dict[str, Entry] = {}
        self.tensors: dict[str, KerasTensor] = {}
        self.constants: dict[str, float] = {}
        self.forms: dict[str, Form] = {}
        self.problems: list[Problem] = []
        self.used: dict[str, list[Node]] = {}
        self.skipped: set[str] = set()
        self._permuted: dict[tuple[tuple[str, int, int], tuple[int, ...], int], KerasTensor] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self.used.setdefault(value, []).append(node)
        dtypes = {p.dtype for layer in manifest.layers for p in layer.parameters.values() if "float" in p.dtype}
        self.open = False
        """Some size beside the batch is not known to Keras, whatever the graph found out later."""
        self.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        if self.dtype not in ("float64", "float32", "float16", "bfloat16"):
            self.dtype = "float32"
        for value in graph.inputs:
            self.tensors[value] = self._input_tensor(value)

    # Building blocks.

    def add(
        self,
        name: str,
        cls: str,
        config: Config,
        args: Sequence[Any],
        like: KerasTensor,
        kwargs: Config | None = None,
    ) -> KerasTensor:
        """Apply a new layer of no weights; `like` describes its output."""
        name = self.names.fresh(name)
        self.entries[name] = Entry(cls, {"name": name, **self._policy(), **config})
        return self._apply(name, args, kwargs or {}, like)

    def _policy(self) -> Config:
        return {} if self.dtype == "float32" else {"dtype": self.dtype}

    def _apply(self, name: str, args: Sequence[Any], kwargs: Config, like: KerasTensor) -> KerasTensor:
        entry = self.entries[name]
        entry.nodes.append((list(args), kwargs))
        return replace(like, reference=(name, len(entry.nodes) - 1, 0))

    def weigh(
        self, node: Node, form: Form, args: Sequence[Any], like: KerasTensor, kwargs: Config | None = None
    ) -> KerasTensor:
        """Apply the layer that a node names; the same one twice if the graph does."""
        path = str(node.layer)
        name = self.paths[path]
        entry = Entry(form[0], {"name": name, **self._policy(), **form[1]})
        known = self.entries.setdefault(name, entry)
        if (known.cls, known.config) != (entry.cls, entry.config):
            raise Inexpressible("two uses of it that need different settings", "the same settings in each")
        self.forms[path] = known.cls, known.config
        return self._apply(name, args, kwargs or {}, replace(like, told=True))

    def layer(self, node: Node) -> AnyLayer:
        if node.layer is None or node.layer not in self.layers:
            raise Inexpressible("no layer", f"the layer of this {node.op}", "export the model again")
        return self.layers[node.layer]

    def name(self, node: Node) -> str:
        return self.paths.get(str(node.layer), node.name)

    def shape(self, value: str) -> Shape:
        described = self.graph.values[value]
        return described.shape if described.shape is not None else (None,) * len(described.axes)

    def like(self, node: Node, perm: tuple[int, ...], of: KerasTensor, output: int = 0) -> KerasTensor:
        """A tensor for an output of a node, in the order `perm`."""
        shape = self.shape(node.outputs[output])
        if len(shape) != len(perm):
            raise Inexpressible(f"an output of rank {len(shape)}", f"rank {len(perm)}")
        dtype = of.dtype if "float" in of.dtype else self.dtype
        return KerasTensor(("", 0, 0), shape, perm, dtype, told=of.told)

    def input(self, node: Node, index: int = 0) -> KerasTensor:
        if index >= len(node.inputs):
            raise Inexpressible(f"{len(node.inputs)} inputs", f"at least {index + 1}")
        value = node.inputs[index]
        if value in self.constants:
            raise Inexpressible("a constant", "a tensor that depends on the model's input")
        return self.tensors[value]

    def only(self, node: Node) -> KerasTensor:
        if len(node.inputs) != 1:
            raise Inexpressible(f"{len(node.inputs)} inputs", "one")
        return self.input(node)

    def order(self, tensor: KerasTensor, perm: tuple[int, ...]) -> KerasTensor:
        """The tensor with its axes in the order `perm`."""
        if tensor.perm == perm:
            return tensor
        key = (tensor.reference, perm, 0)
        if key not in self._permuted:
            if perm[0] != 0 or tensor.perm[0] != 0:
                raise Inexpressible("a batch axis that is not the first", "batches in front")
            dims = [tensor.perm.index(axis) for axis in perm[1:]]
            name = f"{tensor.reference[0]}.permute"
            like = replace(tensor, perm=perm, told=not self.open)
            made = self.add(name, "Permute", {"dims": dims}, [tensor.json], like)
            self._permuted[key] = made
        return self._permuted[key]

    def vector(self, tensor: KerasTensor, channels: int) -> KerasTensor:
        """A vector with its elements in (position channel) order of `channels`, or in the graph's order if 0."""
        if tensor.channels == channels:
            return tensor
        if tensor.channels:
            tensor = self._regroup(tensor, tensor.channels, True)
        return self._regroup(tensor, channels, False) if channels else tensor

    def _regroup(self, tensor: KerasTensor, channels: int, back: bool) -> KerasTensor:
        size = tensor.shape[1]
        if size is None or size % channels:
            raise Inexpressible(f"a vector of {size} elements", f"a multiple of {channels} channels")
        key = (tensor.reference, (channels,), int(back))
        if key not in self._permuted:
            base, grid = tensor.reference[0], [size // channels, channels] if back else [channels, size // channels]
            matrix = replace(tensor, shape=(tensor.shape[0], *grid), perm=(0, 1, 2), channels=0)
            matrix = self.add(f"{base}.grid", "Reshape", {"target_shape": grid}, [tensor.json], matrix)
            turned = replace(matrix, shape=(tensor.shape[0], *reversed(grid)))
            turned = self.add(f"{base}.turn", "Permute", {"dims": [2, 1]}, [matrix.json], turned)
            flat = replace(tensor, channels=0 if back else channels)
            made = self.add(f"{base}.vector", "Reshape", {"target_shape": [size]}, [turned.json], flat)
            self._permuted[key] = made
        return self._permuted[key]

    def pinned(self, tensor: KerasTensor, sizes: Sequence[int]) -> KerasTensor:
        """The tensor, its sizes (in Keras' order, without the batch) told to Keras by a Reshape if need be."""
        if not self.open:
            return tensor
        name = f"{tensor.reference[0]}.shape"
        return self.add(name, "Reshape", {"target_shape": list(sizes)}, [tensor.json], tensor)

    def sized(self, tensor: KerasTensor, *last: int) -> KerasTensor:
        """The tensor, its last sizes (those of a layer's weights) told to Keras by a Reshape if need be."""
        if tensor.told if len(last) == 1 else not self.open:
            return tensor
        others = [tensor.shape[axis] for axis in tensor.perm[1 : -len(last)]]
        if others.count(None) > 1:
            raise Inexpressible(
                f"{others.count(None)} axes of unknown size in front of the weighed ones",
                "at most one",
                "import into a template that says them",
            )
        return replace(self.pinned(tensor, [*(-1 if n is None else n for n in others), *last]), told=True)

    def image(self, tensor: KerasTensor) -> KerasTensor:
        return self.order(tensor, channels_last(tensor.rank))

    def plain(self, tensor: KerasTensor) -> KerasTensor:
        return self.vector(self.order(tensor, as_in_graph(tensor.rank)), 0)

    # Inputs and outputs.

    def refuse(self, node: Node, reason: Inexpressible) -> None:
        where = reason.problem(node.layer or node.name)
        self.problems.append(replace(where, do=where.do or f"write {NO_LAYER}"))

    def _input_tensor(self, value: str) -> KerasTensor:
        described = self.graph.values[value]
        rank, shape = len(described.axes), self.shape(value)
        perm = channels_last(rank) if "channel" in described.axes else as_in_graph(rank)
        tokens = any(node.op == "Gather" for node in self.used.get(value, ()))
        dtype = "int32" if tokens and "int" not in described.dtype else described.dtype
        if shape[1:] and described.shape is None:
            width = self._width(value)
            shape = (None, width, *shape[2:]) if "channel" in described.axes else (*shape[:-1], width)
        name = self.names.fresh(value)
        batch = [None, *(shape[axis] for axis in perm[1:])]
        self.open |= None in batch[1:]
        self.entries[name] = Entry("InputLayer", {"name": name, "batch_shape": batch, "dtype": dtype})
        return KerasTensor((name, 0, 0), (None, *shape[1:]), perm, dtype, told=batch[-1] is not None)

    def _width(self, value: str) -> int | None:
        """The features or channels that the first layer behind a value takes."""
        for node in self.used.get(value, ()):
            layer = self.layers.get(node.layer or "")
            if isinstance(layer, Dense):
                kernel = kernel_of(layer)
                return math.prod(kernel.shape[kernel_sides(kernel)[0] :])
            if isinstance(layer, Conv | Depthwise):
                return kernel_of(layer).shape[1] * (layer.groups or 1)
            if isinstance(layer, ConvTranspose):
                return kernel_of(layer).shape[0]
            if isinstance(layer, LSTM | GRU | SimpleRNN):
                return layer.parameters["input_kernel"].shape[-1]
            if layer is None and node.op not in ("Flatten", "Reshape", "Transpose"):
                found = next((self._width(output) for output in node.outputs), None)
                if found is not None:
                    return found
        return None

    def outputs(self) -> list[KerasTensor]:
        made = []
        for value in self.graph.outputs:
            if value not in self.tensors:
                continue
            tensor, axes = self.tensors[value], self.graph.values[value].axes
            last = len(axes) > 2 and axes[1] == "channel"
            made.append(self.image(tensor) if last else self.plain(tensor))
        return made

    def flattened(self, value: str) -> tuple[int, int | None]:
        """What stands behind a Flatten: channels that a dense kernel is recorded with, and its number of inputs."""
        waiting, size, channels = list(self.used.get(value, ())), None, 0
        while waiting:
            node = waiting.pop(0)
            layer = self.layers.get(node.layer or "")
            if isinstance(layer, Dense):
                kernel = kernel_of(layer)
                cut = kernel_sides(kernel)[0]
                size = size or math.prod(kernel.shape[cut:])
                channels = channels or channels_of(kernel.axes[cut:], kernel.shape[cut:])
            elif layer is not None and node.op in ("BatchNormalization", "LayerNormalization", "PRelu"):
                vector = next(p for p in layer.parameters.values() if not p.state)
                size = size or (math.prod(vector.shape) if math.prod(vector.shape) > 1 else None)
                channels = channels or channels_of(vector.axes, vector.shape)
                waiting += [user for output in node.outputs for user in self.used.get(output, ())]
            elif node.op in _FEATURES_KEPT:
                waiting += [user for output in node.outputs for user in self.used.get(output, ())]
        return channels, size


Rule = Callable[[Builder, Node], list[KerasTensor]]
"""Adds the Keras layers of one node; gives its outputs."""
