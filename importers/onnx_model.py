"""A new ONNX model that computes the graph of an archive. The file is written without onnx.

build(model, manifest, Path("new.onnx"))   nodes of the graph, initializers of the layers; above 2 GB with new.onnx.data

Nodes are named by the layers' paths, initializers as torch names them (`encoder.fc.weight`); those of recurrent layers
`W`, `R` and `B`, as ONNX does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from neutral.containers.onnx_building import Model, write
from neutral.errors import Problem, Refused, raise_all
from neutral.importers.onnx_builder import FLOATS, Builder, Call, numpy_dtype
from neutral.importers.onnx_operators import OPERATORS
from neutral.native import NativeLayer, NativeModel, Tensor
from neutral.rules import widens
from neutral.schema.graph import Graph
from neutral.schema.manifest import Manifest

_NAMES: Mapping[str, Mapping[str, str]] = {
    **{op: {"W": "weight", "B": "bias"} for op in ("Gemm", "MatMul", "Einsum", "Conv", "ConvTranspose")},
    "Gather": {"data": "weight"},
    "BatchNormalization": {"scale": "weight", "B": "bias", "mean": "running_mean", "var": "running_var"},
    "LayerNormalization": {"scale": "weight", "B": "bias"},
    "InstanceNormalization": {"scale": "weight", "B": "bias"},
    "GroupNormalization": {"scale": "weight", "bias": "bias"},
    "RMSNormalization": {"scale": "weight"},
    "PRelu": {"slope": "weight"},
    "Attention": {
        **{f"{role}.W": f"{role}.weight" for role in ("query", "key", "value", "output")},
        **{f"{role}.B": f"{role}.bias" for role in ("query", "key", "value", "output")},
    },
}
"""What torch calls the inputs of an operator. What is not named here keeps its own name."""


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """Write the model; `Refused` tells everything that ONNX does not compute."""
    graph = _graph(manifest, out)
    layers = {layer.path: layer for layer in model.layers if any(not t.state for t in layer.tensors.values())}
    kinds = {layer.path: layer for layer in manifest.layers}
    used = {node.layer for node in graph.nodes}
    problems = [
        Problem(path, "a layer that the graph does not use", "one of its nodes", "write weights alone")
        for path in layers
        if path not in used
    ]
    raise_all(Refused, problems)
    stored = _dtype(layers)
    names, weights, turned = _initializers(layers, manifest)
    builder = Builder(graph, names, _computing(manifest, graph, stored), stored)
    builder.turned |= turned
    for node in graph.nodes:
        rule = OPERATORS.get(node.op)
        if rule is None or (node.layer is not None and node.layer not in layers):
            found = f"the operator {node.op}" if rule is None else f"the layer {node.layer!r}"
            problems.append(Problem(node.name, found, "one that ONNX has" if rule is None else "a layer of known kind"))
            continue
        path = node.layer
        call = Call(builder, node, kinds.get(path or ""), None if path is None else layers[path])
        builder.dtypes.update(dict.fromkeys(node.outputs, _computed(builder, call)))
        try:
            rule(call)
        except Refused as error:
            problems.extend(error.problems)
    raise_all(Refused, problems)
    described = (tuple(builder.described(value) for value in values) for values in (graph.inputs, graph.outputs))
    inputs, outputs = described
    write(Model(tuple(builder.nodes), weights, inputs, outputs, builder.opset), out, force=force)


def _graph(manifest: Manifest, out: Path) -> Graph:
    if manifest.graph is None:
        found = f"an archive without a graph ({manifest.no_graph()})"
        expected = "one: an ONNX file says how the layers are wired"
        raise Refused(Problem(str(out), found, expected, "write .safetensors, or use --into TEMPLATE.onnx"))
    return manifest.graph


def _computed(builder: Builder, call: Call) -> str:
    """The dtype that a node makes: that of its weights, or else of what it is given."""
    return builder.dtype if call.native is not None else call.dtype


def _computing(manifest: Manifest, graph: Graph, stored: str) -> str:
    """The dtype of all that the layers make, if it is wider than that of the weights: then these are cast to it.

    Only ONNX's graphs say it for certain; others have float32 where their model computes as its weights are.
    """
    if manifest.source.framework != "onnx":
        return stored
    made = {graph.values[value].dtype for node in graph.nodes if node.layer is not None for value in node.outputs}
    wide = next(iter(made)) if len(made) == 1 else stored
    return wide if wide in FLOATS and widens(numpy_dtype(stored), numpy_dtype(wide)) else stored


def _dtype(layers: Mapping[str, NativeLayer]) -> str:
    """What the model computes with: the one dtype of its weights."""
    first: dict[str, str] = {}
    for layer in layers.values():
        for tensor in layer.tensors.values():
            if not tensor.state:
                first.setdefault(tensor.data.dtype.name, layer.path)
    odd = [Problem(path, f"weights of {dtype}", f"one of {', '.join(FLOATS)}", "convert them first")
           for dtype, path in first.items() if dtype not in FLOATS]  # fmt: skip
    raise_all(Refused, odd)
    if len(first) > 1:
        told = " and ".join(f"{dtype} ({path})" for dtype, path in first.items())
        raise Refused(Problem("weights", told, "one dtype, which ONNX's operators want", "convert the model to one"))
    return next(iter(first), "float32")


def _initializers(
    layers: Mapping[str, NativeLayer], manifest: Manifest
) -> tuple[dict[str, dict[str, str]], dict[str, Tensor], set[tuple[str, str]]]:
    """The name of each layer's initializers by their local names, all initializers, and the weights (layer, local name) that
    are the transpose of theirs. Tied tensors are one initializer."""
    names: dict[str, dict[str, str]] = {}
    weights: dict[str, Tensor] = {}
    turned: set[tuple[str, str]] = set()
    tied: dict[object, tuple[str, bool]] = {}
    source = _source_names(manifest)
    for path, layer in layers.items():
        own = names.setdefault(path, {})
        for local, tensor in layer.tensors.items():
            if tensor.state:
                continue
            # A MatMul has its kernel the other way round than a Gemm or a table.
            other = (layer.cls, local) == ("MatMul", "W")
            stored = _stored(layer, tensor.data)
            shape = stored.shape[::-1] if other else stored.shape
            key = (tensor.identity, shape, stored.dtype) if tensor.identity is not None else object()
            if key not in tied:
                usual = _NAMES.get(layer.cls or "", {}).get(local, local)
                wanted = source.get((path, local)) or (f"{path}.{usual}" if path else usual)
                name, count = wanted, 1
                while name in weights:
                    name, count = f"{wanted}_{count}", count + 1
                weights[name] = stored
                tied[key] = name, other
            own[local] = tied[key][0]
            if tied[key][1] != other:
                turned.add((path, local))
    return names, weights, turned


def _stored(layer: NativeLayer, tensor: Tensor) -> Tensor:
    """A tensor as the operator wants it: slopes of channels end in axes of one element for the space behind them."""
    behind = int(layer.config.get("slope_rank", 0)) - 1
    if layer.cls != "PRelu" or len(tensor.shape) != 1 or behind < 1:
        return tensor
    return tensor.split(0, (tensor.shape[0], *(1,) * behind))


def _source_names(manifest: Manifest) -> dict[tuple[str, str], str]:
    """What an ONNX source called its initializers, by layer and local name."""
    if manifest.source.framework != "onnx":
        return {}
    return {
        (layer.path, local): full
        for layer in manifest.layers
        for parameter in layer.parameters.values()
        for local, full in parameter.native.items()
    }
