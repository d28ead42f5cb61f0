"""A torch module that computes the graph of an archive.

Each layer becomes a module of torch's own class under the layer's path, so that the state dict has the names that a
torch user expects. What is no layer is computed between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neutral.errors import Problem, Refused, raise_all
from neutral.importers.torch_call import Call
from neutral.importers.torch_classes import Config, layer_classes
from neutral.importers.torch_operators import OPERATORS
from neutral.native import NativeModel, NativeTensor
from neutral.schema import layer_sizes, node_settings
from neutral.schema.graph import Graph
from neutral.schema.kinds import AnyLayer
from neutral.schema.manifest import Manifest

if TYPE_CHECKING:
    import torch


def build_module(manifest: Manifest) -> torch.nn.Module:
    """A module in evaluation mode that computes the graph. Its weights are to be filled; norms start as identities."""
    import torch

    graph = graph_of(manifest)
    layers = {layer.path: layer for layer in manifest.layers}
    _check(graph, layers)
    classes = layer_classes(_used(manifest, graph))
    with torch.device("meta"):
        modules = {path: _native(cls, config, layers[path]) for path, (cls, config) in classes.items()}

    class Graphed(torch.nn.Module):
        """The layers by their paths, and the graph between them."""

        def forward(self, *inputs: torch.Tensor) -> Any:
            return _forward(torch, graph, layers, modules, inputs)

    root = Graphed()
    for path, module in modules.items():
        _register(torch, root, path, module)
    root.to_empty(device="cpu")
    _reset(modules.values())
    return root.eval()


def graph_of(manifest: Manifest) -> Graph:
    if manifest.graph is None:
        found = f"no graph ({manifest.no_graph()})"
        raise Refused(Problem("manifest", found, "to know how the layers are wired", "import into a template"))
    return manifest.graph


def _used(manifest: Manifest, graph: Graph) -> Manifest:
    named = {node.layer for node in graph.nodes}
    return manifest.model_copy(update={"layers": tuple(layer for layer in manifest.layers if layer.path in named)})


def _check(graph: Graph, layers: Mapping[str, AnyLayer]) -> None:
    problems = []
    for node in graph.nodes:
        if node.op not in OPERATORS:
            problems.append(Problem(node.name, f"the operator {node.op}", "one that torch has"))
        elif node.layer is not None and (node.layer not in layers or layers[node.layer].kind == "unknown"):
            problems.append(Problem(node.name, f"the layer {node.layer!r}", "a layer of known kind"))
        elif node.layer is not None and not all(node.layer.split(".")):
            problems.append(Problem(node.name, f"the layer path {node.layer!r}", "names between the dots"))
    raise_all(Refused, problems)


def _native(cls: str, config: Config, layer: Any) -> Any:
    import torch

    if cls == "EinsumDense":
        return _einsum_module(config, layer)
    settings = {k: v for k, v in config.items() if not k.startswith("reparametrization")}
    module = getattr(torch.nn, cls)(**settings)
    if config.get("reparametrization") == "weight_norm":
        axis = config["reparametrization_axis"]
        return torch.nn.utils.parametrizations.weight_norm(module, dim=0 if axis is None else axis)
    if config.get("reparametrization") == "spectral_norm":
        return torch.nn.utils.parametrizations.spectral_norm(module, dim=config["reparametrization_axis"])
    return module


def _einsum_module(config: Config, layer: Any) -> Any:
    import torch

    data, _, out = node_settings.equation_terms(config["equation"])
    equation = f"{data},{layer_sizes.kernel_letters(layer)}->{out}"

    class EinsumDense(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(config["shape"]))
            self.bias = torch.nn.Parameter(torch.empty(config["bias"])) if "bias" in config else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.einsum(equation, x, self.weight)
            return y if self.bias is None else y + self.bias

    return EinsumDense()


def _register(torch: Any, root: Any, path: str, module: Any) -> None:
    *parents, name = path.split(".")
    place = root
    for parent in parents:
        place = place._modules.setdefault(parent, torch.nn.Module())
    # Not add_module: a layer may be named as a method of Module is (`type`, `half`).
    module._modules.update(place._modules.get(name, torch.nn.Module())._modules)
    place._modules[name] = module


def _reset(modules: Any) -> None:
    """Identities where a norm may lack a parameter, and counters at 0."""
    for module in modules:
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in _DEFAULTS and hasattr(module, "eps"):
                tensor.data.fill_(_DEFAULTS[name])
            elif name in ("bias_k", "bias_v"):
                tensor.data.fill_(0)


_DEFAULTS = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}


def _forward(
    torch: Any, graph: Graph, layers: Mapping[str, Any], modules: Mapping[str, Any], inputs: Sequence[Any]
) -> Any:
    if len(inputs) != len(graph.inputs):
        raise Refused(Problem("model", f"{len(inputs)} inputs", f"{len(graph.inputs)}: {', '.join(graph.inputs)}"))
    values = dict(zip(graph.inputs, inputs, strict=True))
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    kept = set(graph.outputs)
    for i, node in enumerate(graph.nodes):
        path = node.layer
        layer, module = (layers[path], modules[path]) if path is not None else (None, None)
        made = graph.values[node.outputs[0]].shape
        result = OPERATORS[node.op](Call(torch, node, layer, module, [values[n] for n in node.inputs], made))
        values.update(zip(node.outputs, result, strict=True) if len(node.outputs) > 1 else [(node.outputs[0], result)])
        for name in node.inputs:
            if last_use[name] == i and name not in kept:
                values.pop(name, None)
    outputs = tuple(values[name] for name in graph.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


_RENAMED = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
_RENAMED_SPECTRAL = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}
"""torch's older names of reparametrized weights, and those that its modules have today."""


def fill_module(module: torch.nn.Module, model: NativeModel) -> None:
    """Put the tensors of a native model into a module of `build_module`, each under its own name."""
    state = module.state_dict(keep_vars=True)
    found = dict(torch_names(model))
    problems = [
        Problem(name, f"no tensor of shape {tuple(tensor.shape)}", "every weight of the module")
        for name, tensor in state.items()
        if name not in found and name.rpartition(".")[2] not in _DEFAULTS
    ]
    problems += [
        Problem(name, "a tensor without a place", "a weight of the module")
        for name, tensor in found.items()
        if name not in state and not tensor.state
    ]
    problems += [
        Problem(name, f"shape {tensor.data.shape}", f"{tuple(state[name].shape)}")
        for name, tensor in found.items()
        if name in state and tuple(tensor.data.shape) != tuple(state[name].shape)
    ]
    raise_all(Refused, problems)
    for name, tensor in found.items():
        if name in state:
            state[name].data = torch_tensor(tensor.data.read())


def torch_names(model: NativeModel) -> Iterator[tuple[str, NativeTensor]]:
    """The tensors by the names that a module of `build_module` has for them."""
    for layer in model.layers:
        for local, tensor in layer.tensors.items():
            renamed = (_RENAMED_SPECTRAL if "weight_orig" in layer.tensors else _RENAMED).get(local)
            yield (tensor.name.removesuffix(local) + renamed if renamed else tensor.name), tensor


def torch_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """An array as a tensor; dtypes that numpy has from ml_dtypes go by their bits."""
    import torch

    array = np.array(array, order="C", copy=True)
    if array.dtype.kind != "V" and array.dtype.name in ("bool", *_NUMPY_OWN):
        return torch.from_numpy(array)
    wanted = getattr(torch, array.dtype.name, None)
    if not isinstance(wanted, torch.dtype) or wanted.itemsize != array.dtype.itemsize:
        raise Refused(Problem("weights", f"the dtype {array.dtype.name}", "one that torch has"))
    bits = torch.from_numpy(array.view(f"int{8 * array.dtype.itemsize}"))
    return bits.view(wanted)


_NUMPY_OWN = (
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip
