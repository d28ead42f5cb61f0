"""Which class of torch each canonical layer becomes. Nothing here needs torch.

>>> from neutral.schema.kinds import Dense, Parameter
>>> from neutral.schema.manifest import Manifest, Source
>>> kernel = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> layers = (Dense(path="fc", parameters={"kernel": kernel}),)
>>> manifest = Manifest(source=Source(framework="torch", format="pt"), layers=layers, weights_digest="0" * 64)
>>> layer_classes(manifest)
{'fc': ('Linear', {'in_features': 3, 'out_features': 2, 'bias': False})}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from neutral.errors import Problem, Refused, raise_all
from neutral.schema import layer_sizes
from neutral.schema.graph import Graph
from neutral.schema.layer_sizes import per_axis
from neutral.schema.manifest import Manifest

Config = dict[str, Any]
NativeClass = tuple[str, Config]


def layer_classes(manifest: Manifest) -> dict[str, NativeClass]:
    """The torch class and its settings for each layer that is known; `Refused` lists those that torch does not have."""
    uses = _uses(manifest.graph)
    found: dict[str, NativeClass] = {}
    problems: list[Problem] = []
    for layer in manifest.layers:
        op, rank = uses.get(layer.path, ("", None))
        # An instance norm is a group norm of one channel a group; torch rounds the two differently.
        kind = "group_norm" if (layer.kind, op) == ("instance_norm", "GroupNormalization") else layer.kind
        if kind == "unknown" or all(parameter.state for parameter in layer.parameters.values()):
            continue
        try:
            found[layer.path] = _CLASSES[kind](layer, rank)
        except Refused as error:
            problems.extend(error.problems)
    raise_all(Refused, problems)
    return found


def layer_states(cls: str, roles: Collection[str]) -> dict[str, npt.NDArray[np.int64]]:
    """What a module's state dict holds beside its weights: a norm with running statistics counts its batches."""
    counts = cls.startswith(("BatchNorm", "InstanceNorm")) and "running_mean" in roles
    return {"num_batches_tracked": np.zeros((), np.int64)} if counts else {}


def _uses(graph: Graph | None) -> dict[str, tuple[str, int | None]]:
    """The operator of each layer and how many axes its input has, where a graph says it."""
    if graph is None:
        return {}
    nodes = [(n.layer, n.op, n.inputs) for n in graph.nodes]
    return {layer: (op, len(graph.values[ins[0]].axes)) for layer, op, ins in nodes if layer is not None and ins}


def _no_form(layer: Any, found: str, expected: str) -> Refused:
    return Refused(Problem(layer.path, found, expected, "it has no torch form; keep the layer in its own framework"))


def _unsaid(layer: Any, found: str, expected: str) -> Refused:
    return Refused(Problem(layer.path, found, expected, "the source does not say it: use --into TEMPLATE"))


def _reparametrized(layer: Any, cls: str, config: Config) -> NativeClass:
    if layer.reparametrization is not None:
        config["reparametrization"] = layer.reparametrization
        config["reparametrization_axis"] = layer.reparametrization_axis
    return cls, config


def _dense(layer: Any, rank: int | None) -> NativeClass:
    taken, made = layer_sizes.dense_sizes(layer)
    config = {"in_features": taken, "out_features": made, "bias": "bias" in layer.parameters}
    return _reparametrized(layer, "Linear", config)


def _window(layer: Any) -> Config:
    k = layer_sizes.window(layer)
    if not 1 <= len(k) <= 3:
        raise _no_form(layer, f"a convolution over {len(k)} axes", "1 to 3")
    taken, made, groups = layer_sizes.conv_channels(layer)
    return {
        "in_channels": taken,
        "out_channels": made,
        "kernel_size": k,
        "stride": per_axis(layer.strides, len(k), 1),
        "dilation": per_axis(layer.dilation, len(k), 1),
        "groups": groups,
        "bias": "bias" in layer.parameters,
    }


def _conv(layer: Any, rank: int | None) -> NativeClass:
    config = _window(layer)
    symmetric = symmetric_padding(layer.padding)
    config["padding"] = (0,) * len(config["kernel_size"]) if symmetric is None else symmetric
    if symmetric is not None and layer.padding_mode not in (None, "zeros"):
        config["padding_mode"] = layer.padding_mode
    return _reparametrized(layer, f"Conv{len(config['kernel_size'])}d", config)


def symmetric_padding(padding: Any) -> tuple[int, ...] | None:
    """The one number per axis that torch's own padding takes, or None where both sides differ."""
    if padding is None or isinstance(padding, str) or any(before != after for before, after in padding):
        return None
    return tuple(before for before, _ in padding)


def _conv_transpose(layer: Any, rank: int | None) -> NativeClass:
    config = _window(layer)
    padding, extra, _ = transposed_padding(layer, config)
    config |= {"padding": padding, "output_padding": extra}
    return _reparametrized(layer, f"ConvTranspose{len(config['kernel_size'])}d", config)


def transposed_padding(
    layer: Any, config: Config
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """torch's `padding` and `output_padding`, and what is left to cut off the output (before, after).

    torch cuts `padding` on both sides and adds `output_padding` behind, which must be less than a stride or dilation.
    """
    padding, extra, left = [], [], []
    for (before, after), added, stride, dilation in zip(
        *layer_sizes.crops(layer), config["stride"], config["dilation"], strict=True
    ):
        behind = added - after
        own = before if -before <= behind < max(stride, dilation) - before else 0
        grow = behind + own
        padding.append(own)
        extra.append(max(grow, 0))
        left.append((before - own, max(-grow, 0)))
        if extra[-1] >= max(stride, dilation):
            raise _no_form(layer, f"{extra[-1]} positions added behind", f"fewer than {max(stride, dilation)}")
    return tuple(padding), tuple(extra), tuple(left)


def _embedding(layer: Any, rank: int | None) -> NativeClass:
    tokens, features = layer_sizes.kernel(layer).shape
    config: Config = {"num_embeddings": tokens, "embedding_dim": features}
    if layer.padding_idx is not None:
        config["padding_idx"] = layer.padding_idx
    return "Embedding", config


def _features(layer: Any) -> int:
    for role in ("scale", "bias", "mean", "variance"):
        if role in layer.parameters:
            return math.prod(layer.parameters[role].shape)
    raise _no_form(layer, "no parameter", "one at least")


def _running_norm(name: str) -> Callable[[Any, int | None], NativeClass]:
    def rule(layer: Any, rank: int | None) -> NativeClass:
        config: Config = {"num_features": _features(layer)}
        _set(config, "eps", layer.eps)
        _set(config, "momentum", None if layer.decay is None else round(1 - layer.decay, 12))
        config["affine"] = bool({"scale", "bias"} & layer.parameters.keys())
        config["track_running_stats"] = name == "BatchNorm" or "mean" in layer.parameters
        return f"{name}{max((rank or 3) - 2, 1)}d", config

    return rule


def _set(config: Config, name: str, value: Any) -> None:
    if value is not None:
        config[name] = value


def _last_axes_norm(name: str) -> Callable[[Any, int | None], NativeClass]:
    def rule(layer: Any, rank: int | None) -> NativeClass:
        parameter = layer.parameters.get("scale") or layer.parameters.get("bias")
        if parameter is None:
            raise _no_form(layer, "no scale", "one, to know the axes")
        # The one axis of a vector may be recorded as (channel position).
        whole = "position" in parameter.axes
        config: Config = {"normalized_shape": (math.prod(parameter.shape),) if whole else parameter.shape}
        _set(config, "eps", layer.eps)
        config["elementwise_affine"] = True
        if name == "LayerNorm":
            config["bias"] = "bias" in layer.parameters
        return name, config

    return rule


def _group_norm(layer: Any, rank: int | None) -> NativeClass:
    channels = _features(layer)
    groups = getattr(layer, "groups", -1)
    groups = channels if groups == -1 else groups
    if groups is None:
        raise _unsaid(layer, "a group norm without the number of groups", "groups")
    config: Config = {"num_groups": groups, "num_channels": channels, "affine": True}
    _set(config, "eps", layer.eps)
    return "GroupNorm", config


def _prelu(layer: Any, rank: int | None) -> NativeClass:
    slope = layer.parameters["slope"]
    whole = "position" in slope.axes
    if not whole and math.prod(slope.shape[1:]) != 1:
        raise _no_form(layer, f"a PReLU with slopes {slope.shape}", "one slope, or one per channel")
    return "PReLU", {"num_parameters": math.prod(slope.shape) if whole else slope.shape[0]}


def _recurrent(name: str) -> Callable[[Any, int | None], NativeClass]:
    def rule(layer: Any, rank: int | None) -> NativeClass:
        weight = layer_sizes.kernel(layer)
        config: Config = {
            "input_size": layer_sizes.size(weight, "in"),
            "hidden_size": layer_sizes.size(weight, "unit"),
            "num_layers": 1,
            "bias": "bias" in layer.parameters,
            "batch_first": True,
            "bidirectional": layer_sizes.directions(layer) == 2,
        }
        if layer.go_backwards and config["bidirectional"]:
            raise _no_form(layer, "two directions of which the first runs backwards", "forward first")
        allowed = ("tanh", "relu") if name == "RNN" else ("tanh",)
        if (layer.activation or "tanh") not in allowed:
            raise _no_form(layer, f"the activation {layer.activation}", " or ".join(allowed))
        if name == "RNN":
            config["nonlinearity"] = layer.activation or "tanh"
        elif (layer.recurrent_activation or "sigmoid") != "sigmoid":
            raise _no_form(layer, f"the recurrent activation {layer.recurrent_activation}", "sigmoid")
        if name == "GRU" and layer.reset_after is False:
            raise _no_form(layer, "a GRU with reset_after=False", "reset_after=True")
        if "projection" in layer.parameters:
            config["proj_size"] = layer_sizes.state_size(layer)
        return name, config

    return rule


def _attention(layer: Any, rank: int | None) -> NativeClass:
    taken = {role: layer.parameters[f"{role}_kernel"].shape[-1] for role in ("query", "key", "value")}
    made = {role: math.prod(layer.parameters[f"{role}_kernel"].shape[:-1]) for role in ("query", "key", "value")}
    width = taken["query"]
    if layer.heads is None:
        raise _unsaid(layer, "an attention without the number of heads", "heads")
    if layer.kv_heads not in (None, layer.heads):
        raise _no_form(layer, f"{layer.heads} heads on {layer.kv_heads} of key and value", "as many")
    if set(made.values()) != {width} or layer.parameters["output_kernel"].shape[0] != width:
        raise _no_form(layer, f"projections to {tuple(made.values())} features", f"the {width} of the query")
    biases = {role for role in ("query", "key", "value", "output") if f"{role}_bias" in layer.parameters}
    config: Config = {
        "embed_dim": width,
        "num_heads": layer.heads,
        "bias": bool(biases),
        "add_bias_kv": "extra_key" in layer.parameters,
        "batch_first": True,
    }
    if (taken["key"], taken["value"]) != (width, width):
        config |= {"kdim": taken["key"], "vdim": taken["value"]}
    return "MultiheadAttention", config


def _einsum(layer: Any, rank: int | None) -> NativeClass:
    config: Config = {"equation": layer.equation, "shape": layer_sizes.kernel(layer).shape}
    if "bias" in layer.parameters:
        config["bias"] = layer.parameters["bias"].shape
    return "EinsumDense", config


def _bilinear(layer: Any, rank: int | None) -> NativeClass:
    made, first, second = layer_sizes.kernel(layer).shape
    config = {"in1_features": first, "in2_features": second, "out_features": made, "bias": "bias" in layer.parameters}
    return "Bilinear", config


_CLASSES: dict[str, Callable[[Any, int | None], NativeClass]] = {
    "dense": _dense,
    "conv": _conv,
    "depthwise": _conv,
    "conv_transpose": _conv_transpose,
    "embedding": _embedding,
    "batch_norm": _running_norm("BatchNorm"),
    "instance_norm": _running_norm("InstanceNorm"),
    "layer_norm": _last_axes_norm("LayerNorm"),
    "rms_norm": _last_axes_norm("RMSNorm"),
    "group_norm": _group_norm,
    "prelu": _prelu,
    "simple_rnn": _recurrent("RNN"),
    "lstm": _recurrent("LSTM"),
    "gru": _recurrent("GRU"),
    "attention": _attention,
    "einsum_dense": _einsum,
    "bilinear": _bilinear,
}
