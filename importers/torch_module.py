"""A torch module that computes the graph of an archive, and its `torch.export` file.

>>> from neutral.schema.kinds import Dense, Parameter
>>> from neutral.schema.manifest import Manifest, Source
>>> kernel = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> layers = (Dense(path="fc", parameters={"kernel": kernel}),)
>>> manifest = Manifest(source=Source(framework="torch", format="pt"), layers=layers, weights_digest="0" * 64)
>>> layer_classes(manifest)
{'fc': ('Linear', {'in_features': 3, 'out_features': 2, 'bias': False})}

Each layer becomes a module of torch's own class under the layer's path, so that the state dict has the names that a
torch user expects. What is no layer is computed between them.
"""

from __future__ import annotations

import io
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from neutral.containers.files import new_file
from neutral.errors import NeutralError, Problem, Refused, raise_all
from neutral.native import NativeModel, NativeTensor
from neutral.schema import layer_sizes, node_settings
from neutral.schema.graph import Graph, Node
from neutral.schema.inputs import example_inputs
from neutral.schema.kinds import AnyLayer
from neutral.schema.layer_sizes import per_axis
from neutral.schema.manifest import Manifest

if TYPE_CHECKING:
    import torch

Config = dict[str, Any]
NativeClass = tuple[str, Config]

# Which class of torch each layer becomes.


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


def _uses(graph: Graph | None) -> dict[str, tuple[str, int | None]]:
    """The operator of each layer and how many axes its input has, where a graph says it."""
    if graph is None:
        return {}
    nodes = [(n.layer, n.op, n.inputs) for n in graph.nodes]
    return {layer: (op, len(graph.values[ins[0]].axes)) for layer, op, ins in nodes if layer is not None and ins}


def _no_form(layer: Any, found: str, expected: str) -> Refused:
    return Refused(Problem(layer.path, found, expected, "it has no torch form; keep the layer in its own framework"))


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
    symmetric = _symmetric(layer.padding)
    config["padding"] = (0,) * len(config["kernel_size"]) if symmetric is None else symmetric
    if symmetric is not None and layer.padding_mode not in (None, "zeros"):
        config["padding_mode"] = layer.padding_mode
    return _reparametrized(layer, f"Conv{len(config['kernel_size'])}d", config)


def _symmetric(padding: Any) -> tuple[int, ...] | None:
    """The one number per axis that torch's own padding takes, or None where both sides differ."""
    if padding is None or isinstance(padding, str) or any(before != after for before, after in padding):
        return None
    return tuple(before for before, _ in padding)


def _conv_transpose(layer: Any, rank: int | None) -> NativeClass:
    config = _window(layer)
    padding, extra, _ = _transposed(layer, config)
    config |= {"padding": padding, "output_padding": extra}
    return _reparametrized(layer, f"ConvTranspose{len(config['kernel_size'])}d", config)


def _transposed(layer: Any, config: Config) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
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
        raise _no_form(layer, "a group norm without the number of groups", "groups")
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
        raise _no_form(layer, "an attention without the number of heads", "heads")
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


# The operators.


@dataclass(frozen=True)
class _Call:
    """One node at work: torch itself, the node, its layer and module if it has them, and its inputs."""

    torch: Any
    node: Node
    layer: Any
    module: Any
    ins: Sequence[Any]
    made: tuple[int | None, ...] | None

    @property
    def x(self) -> Any:
        return self.ins[0]

    @property
    def functional(self) -> Any:
        return self.torch.nn.functional

    @property
    def space(self) -> int:
        return int(self.x.ndim) - 2

    def number(self, name: str, default: float) -> float:
        value = self.node.attributes.get(name)
        return default if value is None else float(value)  # type: ignore[arg-type]

    def flag(self, name: str) -> bool:
        return bool(self.node.attributes.get(name))

    def refuse(self, found: str, expected: str) -> Refused:
        return Refused(Problem(self.node.name, found, expected, f"{self.node.op} has no torch form for it"))


Operator = Callable[[_Call], Any]


def _module(c: _Call) -> Any:
    return c.module(c.x)


def _same_pairs(c: _Call, k: Sequence[int], s: Sequence[int], d: Sequence[int], lower: bool) -> list[tuple[Any, Any]]:
    """(before, after) per spatial axis by the rule of TensorFlow, from the sizes of the value at hand."""
    pairs = []
    for i in range(c.space):
        total = layer_sizes.same_total(c.x.shape[i + 2], k[i], s[i], d[i])
        total = max(total, 0) if isinstance(total, int) else c.torch.sym_max(total, 0)
        small = total // 2
        pairs.append((total - small, small) if lower else (small, total - small))
    return pairs


def _padded(c: _Call, x: Any, pairs: Sequence[tuple[Any, Any]], mode: str = "constant", value: float = 0.0) -> Any:
    """`x` with (before, after) added to its last axes."""
    if all(isinstance(n, int) and n == 0 for pair in pairs for n in pair):
        return x
    # torch lists the last axis first.
    flat = [n for pair in reversed(list(pairs)) for n in pair]
    return c.functional.pad(x, flat, mode, value) if mode == "constant" else c.functional.pad(x, flat, mode)


_PADDING_MODES = {None: "constant", "zeros": "constant"}


def _run_conv(c: _Call) -> Any:
    padding = c.layer.padding
    if padding is None:
        raise c.refuse("no padding", "to know how its source pads")
    if _symmetric(padding) is not None:
        return c.module(c.x)
    k = layer_sizes.window(c.layer)
    s, d = per_axis(c.layer.strides, len(k), 1), per_axis(c.layer.dilation, len(k), 1)
    if padding == "causal":
        pairs: Sequence[tuple[Any, Any]] = [(d[i] * (k[i] - 1), 0) for i in range(len(k))]
    elif isinstance(padding, str):
        pairs = _same_pairs(c, k, s, d, padding == "same_lower")
    else:
        pairs = padding
    return c.module(_padded(c, c.x, pairs, _PADDING_MODES.get(c.layer.padding_mode, c.layer.padding_mode)))


def _run_conv_transpose(c: _Call) -> Any:
    if c.layer.padding is None:
        raise c.refuse("no padding", "to know how its source crops")
    y = c.module(c.x)
    k = layer_sizes.window(c.layer)
    settings = {"stride": per_axis(c.layer.strides, len(k), 1), "dilation": per_axis(c.layer.dilation, len(k), 1)}
    left = _transposed(c.layer, settings)[2]
    cut = tuple(slice(before, -after if after else None) for before, after in left)
    return y if all(pair == (0, 0) for pair in left) else y[(slice(None), slice(None), *cut)]


def _pool(c: _Call) -> Any:
    k = node_settings.ints(c.node, "kernel_shape") or ()
    s = node_settings.ints(c.node, "strides") or (1,) * c.space
    d = node_settings.ints(c.node, "dilations") or (1,) * c.space
    pads = node_settings.pool_pads(c.node, c.space)
    ceil = c.flag("ceil_mode")
    even = None
    if isinstance(pads, str):
        pairs: Sequence[tuple[Any, Any]] = _same_pairs(c, k, s, d, pads == "SAME_LOWER")
    else:
        pairs = pads
        if all(before == after and 2 * before <= n for (before, after), n in zip(pads, k, strict=True)):
            even = tuple(before for before, _ in pads)
    if ceil and even is None:
        raise c.refuse("ceil_mode with uneven padding", "padding that is equal on both sides")
    pool = getattr(c.functional, f"{'max' if c.node.op == 'MaxPool' else 'avg'}_pool{c.space}d")
    if c.node.op == "MaxPool":
        if even is not None:
            return pool(c.x, k, s, even, d, ceil)
        return pool(_padded(c, c.x, pairs, value=-math.inf), k, s, 0, d, ceil)
    if any(n != 1 for n in d):
        raise c.refuse(f"dilations {d}", "an average over neighbours")
    counted = c.flag("count_include_pad")
    if even is not None:
        return pool(c.x, k, s, even, ceil, counted)
    y = pool(_padded(c, c.x, pairs), k, s)
    if counted:
        return y
    # The share of each window that is not padding.
    ones = c.x.new_ones((1, 1, *c.x.shape[2:]))
    return y / pool(_padded(c, ones, pairs), k, s)


def _global_pool(c: _Call) -> Any:
    axes = tuple(range(2, c.x.ndim))
    return c.x.amax(axes, True) if c.node.op == "GlobalMaxPool" else c.x.mean(axes, True)


def _flatten(c: _Call) -> Any:
    axis = int(c.number("axis", 1))
    if axis == 1:
        return c.torch.flatten(c.x, 1)
    return c.x.reshape(reduce(operator.mul, c.x.shape[:axis], 1), -1)


def _reshape(c: _Call) -> Any:
    wanted = node_settings.ints(c.node, "shape") or ()
    return c.x.reshape(c.x.shape[0], *(c.x.shape[i + 1] if n == 0 else n for i, n in enumerate(wanted)))


def _transpose(c: _Call) -> Any:
    return c.x.permute(node_settings.ints(c.node, "perm") or tuple(reversed(range(c.x.ndim))))


def _slice(c: _Call) -> Any:
    return c.x[tuple(node_settings.slices(c.node, c.x.ndim))]


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(c: _Call) -> Any:
    pairs = node_settings.pads_of(c.node, c.x.ndim)
    mode = _PAD_MODES[str(c.node.attributes.get("mode", "constant"))]
    if mode == "constant":
        return _padded(c, c.x, pairs, mode, c.number("value", 0.0))
    if any(pair != (0, 0) for pair in pairs[:2]):
        raise c.refuse(f"{mode} padding of batch or channels", "padding of spatial axes")
    return _padded(c, c.x, pairs[2:], mode)


def _squeeze(c: _Call) -> Any:
    return c.x.squeeze(node_settings.ints(c.node, "axes") or ())


def _unsqueeze(c: _Call) -> Any:
    axes = node_settings.ints(c.node, "axes") or ()
    rank = c.x.ndim + len(axes)
    return reduce(lambda x, axis: x.unsqueeze(axis), sorted(axis % rank for axis in axes), c.x)


def _expand(c: _Call) -> Any:
    wanted = node_settings.ints(c.node, "shape") or ()
    wanted = (1,) * (c.x.ndim - len(wanted)) + wanted
    added = len(wanted) - c.x.ndim
    return c.x.expand(*(n if i < added or n != 1 else -1 for i, n in enumerate(wanted)))


_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def _resize(c: _Call) -> Any:
    scales = node_settings.scales_of(c.node, c.x.ndim)
    mode, align = _interpolation(c, scales)
    if scales is not None:
        return c.functional.interpolate(c.x, scale_factor=scales, mode=mode, align_corners=align)
    size = node_settings.resized(c.node, (0,) * c.space)
    return c.functional.interpolate(c.x, size=size, mode=mode, align_corners=align)


def _interpolation(c: _Call, scales: tuple[float, ...] | None) -> tuple[str, bool | None]:
    given = c.node.attributes
    mode, where = str(given.get("mode", "nearest")), str(given.get("coordinate_transformation_mode", "half_pixel"))
    if mode == "nearest":
        rounding = str(given.get("nearest_mode", "round_prefer_floor"))
        whole = scales is not None and all(s >= 1 and s == int(s) for s in scales)
        if (where, rounding) == ("asymmetric", "floor") or (
            whole and where == "half_pixel" and rounding.startswith("round")
        ):
            return "nearest", None
        if (where, rounding) == ("half_pixel", "round_prefer_ceil"):
            return "nearest-exact", None
        raise c.refuse(f"nearest with {where} and {rounding}", "asymmetric and floor")
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise c.refuse(f"{mode} with {where}", "half_pixel or align_corners")
    if mode == "linear":
        return _LINEAR[c.space], where == "align_corners"
    if mode == "cubic" and c.space == 2 and c.number("cubic_coeff_a", -0.75) == -0.75:
        return "bicubic", where == "align_corners"
    raise c.refuse(f"{mode} over {c.space} axes", "nearest, linear, or cubic with a = -0.75 over two axes")


def _depth_to_space(c: _Call) -> Any:
    block = int(c.number("blocksize", 1))
    if c.node.attributes.get("mode", "DCR") == "CRD":
        return c.functional.pixel_shuffle(c.x, block)
    batch, channels, height, width = c.x.shape
    y = c.x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(batch, channels // block**2, height * block, width * block)


def _space_to_depth(c: _Call) -> Any:
    block = int(c.number("blocksize", 1))
    batch, channels, height, width = c.x.shape
    y = c.x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(batch, channels * block**2, height // block, width // block)


def _reduced(c: _Call) -> Any:
    axes = node_settings.ints(c.node, "axes") or tuple(range(c.x.ndim))
    kept = bool(c.node.attributes.get("keepdims", 1))
    name = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "amax", "ReduceMin": "amin"}[c.node.op]
    return getattr(c.x, name)(axes, kept)


def _tensors(c: _Call) -> list[Any]:
    like = next(x for x in c.ins if isinstance(x, c.torch.Tensor))
    return [x if isinstance(x, c.torch.Tensor) else like.new_tensor(x) for x in c.ins]


_DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")


def _cast(c: _Call) -> Any:
    wanted = str(c.node.attributes.get("to"))
    if wanted not in _DTYPES:
        raise c.refuse(f"the dtype {wanted}", " ".join(_DTYPES))
    return c.x.to(getattr(c.torch, wanted))


def _constant(c: _Call) -> Any:
    """A number: torch's arithmetic takes it beside a tensor without changing the tensor's dtype."""
    for name in ("value_float", "value_int"):
        if name in c.node.attributes:
            return c.node.attributes[name]
    raise c.refuse(f"a constant {sorted(c.node.attributes)}", "value_float or value_int")


def _gather(c: _Call) -> Any:
    return c.module(c.x if not c.x.is_floating_point() else c.x.to(c.torch.int64))


def _run_group_norm(c: _Call) -> Any:
    if c.module is not None:
        return c.module(c.x)
    return c.functional.group_norm(c.x, int(c.number("num_groups", 1)), eps=c.number("epsilon", 1e-5))


def _run_instance_norm(c: _Call) -> Any:
    return c.module(c.x) if c.module is not None else c.functional.instance_norm(c.x, eps=c.number("epsilon", 1e-5))


def _run_last_axes_norm(c: _Call) -> Any:
    if c.module is not None:
        return c.module(c.x)
    axis = int(c.number("axis", -1)) % c.x.ndim
    norm = c.functional.layer_norm if c.node.op == "LayerNormalization" else c.functional.rms_norm
    return norm(c.x, tuple(c.x.shape[axis:]), eps=c.number("epsilon", 1e-5))


def _run_recurrent(c: _Call) -> Any:
    """Keras' meaning of the words: the last output of the backward direction is that of the first step."""
    ways = layer_sizes.directions(c.layer)
    gated = c.layer.kind == "lstm"
    x = c.x.flip(1) if c.layer.go_backwards else c.x
    # torch.export writes a recurrent module out step by step, which fixes the number of steps; a scan does not.
    state = _first_state(c, gated)
    y, final = c.module(x, state) if isinstance(x.shape[1], int) else _scan(c, x, state)
    h = final[0] if gated else final
    if not c.flag("return_sequences"):
        parts = [h[i] for i in range(ways)]
    else:
        parts = list(y.chunk(2, -1)) if ways == 2 else [y]
    outputs = _merged(c, parts, y if c.flag("return_sequences") else None)
    if c.flag("return_state"):
        for i in range(ways):
            outputs += [h[i], final[1][i]] if gated else [h[i]]
    return outputs if len(outputs) > 1 else outputs[0]


def _first_state(c: _Call, gated: bool) -> Any:
    states = list(c.ins[1:])
    if not states:
        return None
    if gated:
        return c.torch.stack(states[0::2]), c.torch.stack(states[1::2])
    return c.torch.stack(states)


def _scan(c: _Call, x: Any, state: Any) -> tuple[Any, Any]:
    """What the module of a recurrent layer returns, for a number of steps that is not known."""
    from torch._higher_order_ops.scan import scan

    linear = c.functional.linear
    outputs, finals = [], []
    for way in range(layer_sizes.directions(c.layer)):
        weights = {
            name: getattr(c.module, f"{name}_l0{'_reverse' if way else ''}", None)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        }
        steps = linear(x.flip(1) if way else x, weights["weight_ih"], weights["bias_ih"]).transpose(0, 1)
        step = _STEPS[c.layer.kind](c, weights)
        final, made = scan(step, _carry(c, x, state, way), steps)
        outputs.append(made.transpose(0, 1).flip(1) if way else made.transpose(0, 1))
        finals.append(final)
    states = tuple(c.torch.stack(parts) for parts in zip(*finals, strict=True))
    return c.torch.cat(outputs, -1), states if c.layer.kind == "lstm" else states[0]


def _carry(c: _Call, x: Any, state: Any, way: int) -> tuple[Any, ...]:
    if state is None:
        sizes = [layer_sizes.state_size(c.layer)]
        sizes += [layer_sizes.size(layer_sizes.kernel(c.layer), "unit")] if c.layer.kind == "lstm" else []
        return tuple(x.new_zeros(x.shape[0], n) for n in sizes)
    return tuple(part[way].clone() for part in (state if isinstance(state, tuple) else (state,)))


def _lstm_step(c: _Call, weights: Mapping[str, Any]) -> Any:
    def step(carry: Any, given: Any) -> Any:
        hidden, cell = carry
        gates = given + c.functional.linear(hidden, weights["weight_hh"], weights["bias_hh"])
        i, f, g, o = gates.chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        if weights["weight_hr"] is not None:
            hidden = c.functional.linear(hidden, weights["weight_hr"])
        return (hidden, cell), hidden.clone()

    return step


def _gru_step(c: _Call, weights: Mapping[str, Any]) -> Any:
    def step(carry: Any, given: Any) -> Any:
        (hidden,) = carry
        own = c.functional.linear(hidden, weights["weight_hh"], weights["bias_hh"])
        (r, z, n), (own_r, own_z, own_n) = given.chunk(3, -1), own.chunk(3, -1)
        new = (n + (r + own_r).sigmoid() * own_n).tanh()
        update = (z + own_z).sigmoid()
        hidden = (1 - update) * new + update * hidden
        return (hidden,), hidden.clone()

    return step


def _rnn_step(c: _Call, weights: Mapping[str, Any]) -> Any:
    activation = c.torch.relu if c.layer.activation == "relu" else c.torch.tanh

    def step(carry: Any, given: Any) -> Any:
        hidden = activation(given + c.functional.linear(carry[0], weights["weight_hh"], weights["bias_hh"]))
        return (hidden,), hidden.clone()

    return step


_STEPS = {"lstm": _lstm_step, "gru": _gru_step, "simple_rnn": _rnn_step}


def _merged(c: _Call, parts: list[Any], joined: Any) -> list[Any]:
    if len(parts) == 1:
        return parts
    mode = node_settings.merge_mode(c.node, c.layer)
    if mode == "none":
        return parts
    forward, backward = parts
    if mode == "concat":
        return [joined if joined is not None else c.torch.cat(parts, -1)]
    merge = {"sum": forward + backward, "mul": forward * backward, "ave": (forward + backward) / 2}
    if mode not in merge:
        raise c.refuse(f"the merge mode {mode}", "concat, sum, mul, ave or none")
    return [merge[mode]]


def _run_attention(c: _Call) -> Any:
    if len(c.ins) not in (1, 3):
        raise c.refuse(f"{len(c.ins)} inputs", "one, or a query, a key and a value")
    query, key, value = c.ins if len(c.ins) == 3 else (c.x,) * 3
    mask = None
    if c.flag("is_causal"):
        mask = c.torch.ones(query.shape[1], key.shape[1], dtype=c.torch.bool, device=query.device).triu(1)
    return c.module(query, key, value, need_weights=False, attn_mask=mask)[0]


def _run_einsum(c: _Call) -> Any:
    if c.layer.kind == "einsum_dense":
        return c.module(c.x)
    # A Linear in other words: some of the last axes in, some of the last axes out.
    data, _, out = node_settings.equation_terms(str(c.node.attributes["equation"]))
    summed = len([letter for letter in data.replace("...", "") if letter not in out])
    kept = c.x.ndim - summed
    made = (c.made or ())[kept:]
    if any(n is None for n in made):
        raise c.refuse("an output of unknown size", "the sizes of the axes it makes")
    return c.module(c.x.flatten(kept) if summed > 1 else c.x).reshape(*c.x.shape[:kept], *made)


def _hard_sigmoid(c: _Call) -> Any:
    alpha, beta = c.number("alpha", 0.2), c.number("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return c.functional.hardsigmoid(c.x)
    return (c.x * alpha + beta).clamp(0, 1)


def _selu(c: _Call) -> Any:
    alpha, gamma = c.node.attributes.get("alpha"), c.node.attributes.get("gamma")
    if alpha is None and gamma is None:
        return c.functional.selu(c.x)
    return c.functional.elu(c.x, c.number("alpha", 1.6732632423543772)) * c.number("gamma", 1.0507009873554805)


def _swish(c: _Call) -> Any:
    alpha = c.number("alpha", 1.0)
    return c.functional.silu(c.x) if alpha == 1.0 else c.x * c.torch.sigmoid(c.x * alpha)


def _shrink(c: _Call) -> Any:
    edge, bias = c.number("lambd", 0.5), c.number("bias", 0.0)
    if bias == 0:
        return c.functional.hardshrink(c.x, edge)
    if bias == edge:
        return c.functional.softshrink(c.x, edge)
    zero = c.torch.zeros_like(c.x)
    return c.torch.where(c.x > edge, c.x - bias, c.torch.where(c.x < -edge, c.x + bias, zero))


def _clip(c: _Call) -> Any:
    bounds = {name: c.node.attributes.get(name) for name in ("min", "max")}
    return c.x if bounds == {"min": None, "max": None} else c.x.clamp(**bounds)


def _lrn(c: _Call) -> Any:
    size = int(c.number("size", 1))
    if size % 2 == 0:
        raise c.refuse(f"a window of {size} channels", "an odd one")
    return c.functional.local_response_norm(
        c.x, size, c.number("alpha", 1e-4), c.number("beta", 0.75), c.number("bias", 1.0)
    )


_OPERATORS: dict[str, Operator] = {
    "Abs": lambda c: c.x.abs(),
    "Add": lambda c: reduce(operator.add, c.ins),
    "Attention": _run_attention,
    "AveragePool": _pool,
    "BatchNormalization": _module,
    "Cast": _cast,
    "Celu": lambda c: c.functional.celu(c.x, c.number("alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda c: c.torch.cat(list(c.ins), int(c.number("axis", 1))),
    "Constant": _constant,
    "Conv": _run_conv,
    "ConvTranspose": _run_conv_transpose,
    "Cos": lambda c: c.x.cos(),
    "DepthToSpace": _depth_to_space,
    "Div": lambda c: operator.truediv(*c.ins),
    "Einsum": _run_einsum,
    "Elu": lambda c: c.functional.elu(c.x, c.number("alpha", 1.0)),
    "Erf": lambda c: c.x.erf(),
    "Exp": lambda c: c.x.exp(),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": lambda c: c.x.floor(),
    "GRU": _run_recurrent,
    "Gather": _gather,
    "Gelu": lambda c: c.functional.gelu(c.x, approximate=str(c.node.attributes.get("approximate", "none"))),
    "Gemm": _module,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "GroupNormalization": _run_group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda c: c.functional.hardswish(c.x),
    "Identity": lambda c: c.x,
    "InstanceNormalization": _run_instance_norm,
    "LRN": _lrn,
    "LSTM": _run_recurrent,
    "LayerNormalization": _run_last_axes_norm,
    "LeakyRelu": lambda c: c.functional.leaky_relu(c.x, c.number("alpha", 0.01)),
    "Log": lambda c: c.x.log(),
    "LogSoftmax": lambda c: c.functional.log_softmax(c.x, int(c.number("axis", -1))),
    "Max": lambda c: reduce(c.torch.maximum, _tensors(c)),
    "MaxPool": _pool,
    "Mean": lambda c: reduce(operator.add, c.ins) / len(c.ins),
    "Min": lambda c: reduce(c.torch.minimum, _tensors(c)),
    "Mish": lambda c: c.functional.mish(c.x),
    "Mul": lambda c: reduce(operator.mul, c.ins),
    "Neg": lambda c: -c.x,
    "PRelu": _module,
    "Pad": _pad,
    "Pow": lambda c: operator.pow(*c.ins),
    "RMSNormalization": _run_last_axes_norm,
    "RNN": _run_recurrent,
    "Reciprocal": lambda c: c.x.reciprocal(),
    "ReduceMax": _reduced,
    "ReduceMean": _reduced,
    "ReduceMin": _reduced,
    "ReduceSum": _reduced,
    "Relu": lambda c: c.torch.relu(c.x),
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": lambda c: c.x.sigmoid(),
    "Sign": lambda c: c.x.sign(),
    "Sin": lambda c: c.x.sin(),
    "Slice": _slice,
    "Softmax": lambda c: c.functional.softmax(c.x, int(c.number("axis", -1))),
    "Softplus": lambda c: c.functional.softplus(c.x),
    "Softsign": lambda c: c.functional.softsign(c.x),
    "SpaceToDepth": _space_to_depth,
    "Sqrt": lambda c: c.x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda c: operator.sub(*c.ins),
    "Sum": lambda c: reduce(operator.add, c.ins),
    "Swish": _swish,
    "Tanh": lambda c: c.x.tanh(),
    "ThresholdedRelu": lambda c: c.functional.threshold(c.x, c.number("alpha", 1.0), 0.0),
    "Tile": lambda c: c.x.tile(node_settings.ints(c.node, "repeats") or ()),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


# The module.


def build_module(manifest: Manifest) -> torch.nn.Module:
    """A module in evaluation mode that computes the graph. Its weights are to be filled; norms start as identities."""
    import torch

    graph = _graph(manifest)
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


def _graph(manifest: Manifest) -> Graph:
    if manifest.graph is None:
        raise Refused(Problem("manifest", "no graph", "to know how the layers are wired", "import into a template"))
    return manifest.graph


def _used(manifest: Manifest, graph: Graph) -> Manifest:
    named = {node.layer for node in graph.nodes}
    return manifest.model_copy(update={"layers": tuple(layer for layer in manifest.layers if layer.path in named)})


def _check(graph: Graph, layers: Mapping[str, AnyLayer]) -> None:
    problems = []
    for node in graph.nodes:
        if node.op not in _OPERATORS:
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
        result = _OPERATORS[node.op](_Call(torch, node, layer, module, [values[n] for n in node.inputs], made))
        values.update(zip(node.outputs, result, strict=True) if len(node.outputs) > 1 else [(node.outputs[0], result)])
        for name in node.inputs:
            if last_use[name] == i and name not in kept:
                values.pop(name, None)
    outputs = tuple(values[name] for name in graph.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


# The file.

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
    found = dict(_named(model))
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
            state[name].data = _torch_tensor(tensor.data.read())


def _named(model: NativeModel) -> Iterator[tuple[str, NativeTensor]]:
    for layer in model.layers:
        for local, tensor in layer.tensors.items():
            renamed = (_RENAMED_SPECTRAL if "weight_orig" in layer.tensors else _RENAMED).get(local)
            yield (tensor.name.removesuffix(local) + renamed if renamed else tensor.name), tensor


def _torch_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
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


def export(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """Write the graph with its weights as a `torch.export` program. The batch, and each size that is not known, may
    change from call to call where the operators allow it."""
    import torch

    module = build_module(manifest)
    fill_module(module, model)
    graph = _graph(manifest)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in map(torch.from_numpy, example_inputs(manifest)))
    free = tuple(
        {i: torch.export.Dim.AUTO for i in range(x.ndim) if _is_free(graph, name, i)}
        for name, x in zip(graph.inputs, inputs, strict=True)
    )
    try:
        with warnings.catch_warnings():
            # torch warns of its own recurrent layers that their weights are kept in a list as well.
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs, dynamic_shapes=(free,))
    except NeutralError:
        raise
    except Exception as error:
        raise Refused(
            Problem(str(out), f"a graph that torch.export cannot take ({_first_line(error)})", "one that it can")
        ) from error
    with new_file(out, force) as file:
        torch.export.save(program, cast(BinaryIO, _Stream(file)))


class _Stream(io.RawIOBase):
    """The file as torch wants to see one: an io object that can be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any, /) -> int:
        return self._file.write(data)


def _is_free(graph: Graph, name: str, axis: int) -> bool:
    shape = graph.values[name].shape
    return shape is None or shape[axis] is None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
