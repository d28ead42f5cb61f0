"""Which class of Flax Linen each canonical layer becomes. Nothing here needs Flax.

>>> from neutral.schema.kinds import Dense, Parameter
>>> from neutral.schema.manifest import Manifest, Source
>>> kernel = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> layers = (Dense(path="fc", parameters={"kernel": kernel}),)
>>> manifest = Manifest(source=Source(framework="torch", format="pt"), layers=layers, weights_digest="0" * 64)
>>> layer_classes(manifest)
{'fc': ('Dense', {})}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from neutral.errors import Problem, Refused, an, named, raise_all
from neutral.native import Tensor
from neutral.schema import layer_sizes
from neutral.schema.manifest import Manifest

Config = dict[str, Any]
NativeClass = tuple[str, Config]


def layer_classes(manifest: Manifest) -> dict[str, NativeClass]:
    """The class and the settings that decide its form, per known layer; `Refused` lists what Flax does not have."""
    found: dict[str, NativeClass] = {}
    problems: list[Problem] = []
    for layer in manifest.layers:
        if layer.kind == "unknown" or all(parameter.state for parameter in layer.parameters.values()):
            continue
        try:
            found[layer.path] = _CLASSES[layer.kind](layer)
        except Refused as error:
            problems.extend(error.problems)
    raise_all(Refused, problems)
    return found


def remarks(manifest: Manifest) -> list[str]:
    """What a model must be built with for a new file to be right in it, where that is a choice."""
    turned = [layer.path for layer in manifest.layers if layer.kind == "conv_transpose"]
    if not turned:
        return []
    names = ", ".join(named(path) for path in turned[:5]) + (f" and {len(turned) - 5} more" if len(turned) > 5 else "")
    return [f"{names}: for ConvTranspose with transpose_kernel=False, as is usual; a template may have it otherwise"]


def _no_form(layer: Any, found: str, expected: str) -> Refused:
    return Refused(Problem(layer.path, found, expected, "it has no Flax form; keep the layer in its own framework"))


def _plain(name: str) -> Callable[[Any], NativeClass]:
    return lambda layer: (name, {})


def _conv_transpose(layer: Any) -> NativeClass:
    if (layer.groups or 1) != 1:
        raise _no_form(layer, f"a transposed convolution of {layer.groups} groups", "one group")
    return "ConvTranspose", {"transpose_kernel": False}


def _batch_norm(layer: Any) -> NativeClass:
    if not {"mean", "variance"} <= set(layer.parameters):
        raise _no_form(layer, "a batch norm without running statistics", "a mean and a variance")
    return "BatchNorm", {}


def _instance_norm(layer: Any) -> NativeClass:
    if "mean" in layer.parameters:
        raise _no_form(layer, "an instance norm with running statistics", "one that normalises by its input")
    return "InstanceNorm", {}


def _rms_norm(layer: Any) -> NativeClass:
    scale = layer.parameters["scale"]
    if len(scale.shape) != 1 and "channel" not in scale.axes:
        raise _no_form(layer, f"an RMS norm over {len(scale.shape)} axes", "one axis")
    return "RMSNorm", {}


def _prelu(layer: Any) -> NativeClass:
    shape = layer.parameters["slope"].shape
    if math.prod(shape) != 1:
        raise _no_form(layer, f"a PReLU with slopes {shape}", "one slope for all channels")
    return "PReLU", {}


def _recurrent(cell: str) -> Callable[[Any], NativeClass]:
    def rule(layer: Any) -> NativeClass:
        if "projection" in layer.parameters:
            raise _no_form(layer, "an LSTM with a projection", "one without")
        if layer.kind == "gru" and layer.reset_after is False:
            raise _no_form(layer, "a GRU with reset_after=False", "reset_after=True")
        if layer_sizes.directions(layer) == 2:
            return "Bidirectional", {}
        return (cell if (layer.native or "").endswith("Cell") else "RNN"), {}

    return rule


def _attention(layer: Any) -> NativeClass:
    if {"extra_key", "extra_value"} & set(layer.parameters):
        raise _no_form(layer, "attention with an extra key and value", "attention without")
    if layer.heads is None:
        problem = Problem(layer.path, "an attention without the number of heads", "heads", "use --into TEMPLATE")
        raise Refused(problem)
    if layer.kv_heads not in (None, layer.heads):
        raise _no_form(layer, f"{layer.heads} heads on {layer.kv_heads} of key and value", "as many")
    query, value = (math.prod(layer.parameters[f"{role}_kernel"].shape[:-1]) for role in ("query", "value"))
    if query != value:
        raise _no_form(layer, f"{query} features of queries, {value} of values", "as many")
    return "MultiHeadDotProductAttention", {}


def _einsum(layer: Any) -> NativeClass:
    if layer.equation is None:
        raise _no_form(layer, "an einsum without its equation", "the equation")
    return "Einsum", {"equation": layer.equation}


def _none(layer: Any) -> NativeClass:
    raise _no_form(layer, an(f"{layer.kind} layer"), "a kind that Flax has")


_CLASSES: Mapping[str, Callable[[Any], NativeClass]] = {
    "dense": _plain("Dense"),
    "conv": _plain("Conv"),
    "depthwise": _plain("Conv"),
    "conv_transpose": _conv_transpose,
    "embedding": _plain("Embed"),
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _plain("LayerNorm"),
    "rms_norm": _rms_norm,
    "group_norm": _plain("GroupNorm"),
    "prelu": _prelu,
    "simple_rnn": _recurrent("SimpleCell"),
    "lstm": _recurrent("LSTMCell"),
    "gru": _recurrent("GRUCell"),
    "attention": _attention,
    "einsum_dense": _einsum,
    "bilinear": _none,
}

_ALWAYS_BIASED = {"hi": ("hi", "hf", "hg", "ho"), "hn": ("ir", "iz", "in", "hn"), "h": ("i",)}
"""A part by which a cell is known, and those of its parts that have a bias whatever the source had."""


def layer_states(cls: str, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """What a class has beside the weights of its source: the biases of recurrent cells, all zero."""
    found = {}
    for local, kernel in tensors.items():
        place, _, name = local.removesuffix("/kernel").rpartition("/")
        prefix = f"{place}/" if place else ""
        for part in _ALWAYS_BIASED.get(name, ()) if cls in _RECURRENT else ():
            if f"{prefix}{part}/bias" not in tensors:
                found[f"{prefix}{part}/bias"] = np.zeros(kernel.shape[-1], kernel.dtype)
    return found


_RECURRENT = ("RNN", "Bidirectional", "LSTMCell", "GRUCell", "SimpleCell")
