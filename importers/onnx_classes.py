"""Which ONNX operator each canonical layer becomes, with the operator's own attributes. Nothing here needs onnx.

>>> from neutral.schema.kinds import Dense, Parameter
>>> from neutral.schema.manifest import Manifest, Source
>>> kernel = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> layers = (Dense(path="fc", parameters={"kernel": kernel}),)
>>> manifest = Manifest(source=Source(framework="torch", format="pt"), layers=layers, weights_digest="0" * 64)
>>> layer_classes(manifest)
{'fc': ('Gemm', {'alpha': 1.0, 'beta': 1.0, 'transA': 0, 'transB': 1})}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from neutral.conventions.onnx_activations import IN_RECURRENT, activation_settings
from neutral.errors import Problem, Refused, raise_all
from neutral.schema import layer_sizes
from neutral.schema.graph import Graph, Node
from neutral.schema.layer_sizes import per_axis
from neutral.schema.manifest import Manifest

Config = dict[str, Any]
NativeClass = tuple[str, Config]
Uses = Sequence[tuple[Node, int]]
"""The nodes that compute a layer, each with the number of axes of its first input."""


def layer_classes(manifest: Manifest) -> dict[str, NativeClass]:
    """The operator and its attributes for each layer that is known; `Refused` lists those that ONNX does not have."""
    uses = uses_of(manifest.graph)
    found: dict[str, NativeClass] = {}
    problems: list[Problem] = []
    for layer in manifest.layers:
        nodes = uses.get(layer.path, ())
        # An instance norm is a group norm of one channel a group.
        op = nodes[0][0].op if nodes else ""
        kind = "group_norm" if (layer.kind, op) == ("instance_norm", "GroupNormalization") else layer.kind
        if kind == "unknown" or all(parameter.state for parameter in layer.parameters.values()):
            continue
        try:
            found[layer.path] = _CLASSES[kind](layer, nodes)
        except Refused as error:
            problems.extend(error.problems)
    raise_all(Refused, problems)
    return found


def uses_of(graph: Graph | None) -> dict[str, list[tuple[Node, int]]]:
    """The nodes of each layer."""
    uses: dict[str, list[tuple[Node, int]]] = {}
    for node in graph.nodes if graph is not None else ():
        if node.layer is not None and node.inputs:
            uses.setdefault(node.layer, []).append((node, len(graph.values[node.inputs[0]].axes)))  # type: ignore[union-attr]
    return uses


def _no_form(layer: Any, found: str, expected: str) -> Refused:
    return Refused(Problem(layer.path, found, expected, "it has no ONNX form; keep the layer in its own framework"))


def _need(layer: Any, value: Any, what: str) -> Any:
    if value is None:
        raise _no_form(layer, f"no {what}", "to know it")
    return value


def _dense(layer: Any, uses: Uses) -> NativeClass:
    """A Gemm, which takes matrices alone; behind values of more axes, a MatMul and an Add."""
    if all(rank == 2 and node.op == "Gemm" for node, rank in uses):
        return "Gemm", {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    return "MatMul", {}


def _window(layer: Any) -> Config:
    k = layer_sizes.window(layer)
    if not 1 <= len(k) <= 3:
        raise _no_form(layer, f"a convolution over {len(k)} axes", "1 to 3")
    return {
        "kernel_shape": k,
        "strides": per_axis(layer.strides, len(k), 1),
        "dilations": per_axis(layer.dilation, len(k), 1),
        "group": layer_sizes.conv_channels(layer)[2],
    }


def _conv(layer: Any, uses: Uses) -> NativeClass:
    config = _window(layer)
    padding = layer.padding
    k, s, d = config["kernel_shape"], config["strides"], config["dilations"]
    if padding == "causal":
        padding = tuple((d[i] * (k[i] - 1), 0) for i in range(len(k)))
    elif isinstance(padding, str) and max(d) > 1:
        # onnxruntime has no automatic padding of dilated windows; where each position is taken it is always the same.
        if max(s) > 1:
            raise _no_form(layer, f"padding {padding!r} of a convolution with strides and dilation", "explicit padding")
        totals = [d[i] * (k[i] - 1) for i in range(len(k))]
        halves = [(total // 2, total - total // 2) for total in totals]
        padding = tuple(pair if padding == "same" else pair[::-1] for pair in halves)
    if padding is None:
        raise _no_form(layer, "no padding", "to know how its source pads")
    if layer.padding_mode not in (None, "zeros"):
        if isinstance(padding, str):
            raise _no_form(layer, f"padding {padding!r} of mode {layer.padding_mode}", "explicit padding")
        config["padding_mode"] = layer.padding_mode
    if isinstance(padding, str):
        config["auto_pad"] = {"same": "SAME_UPPER", "same_lower": "SAME_LOWER"}[padding]
    else:
        config["pads"] = flat_pads(padding)
    return "Conv", config


def flat_pads(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """ONNX's order: what is in front of each axis, then what is behind.

    >>> flat_pads([(1, 2), (3, 4)])
    (1, 3, 2, 4)
    """
    return (*(before for before, _ in pairs), *(after for _, after in pairs))


def _conv_transpose(layer: Any, uses: Uses) -> NativeClass:
    config = _window(layer)
    _need(layer, layer.padding, "padding")
    pairs, extra = layer_sizes.crops(layer)
    if any(n < 0 for pair in pairs for n in pair):
        raise _no_form(layer, f"padding {pairs}", "padding of 0 or more")
    return "ConvTranspose", {**config, "pads": flat_pads(pairs), "output_padding": extra}


def _embedding(layer: Any, uses: Uses) -> NativeClass:
    return "Gather", {"axis": 0}


def _eps(layer: Any, uses: Uses) -> Config:
    """Without a graph nothing is computed, so that nobody needs to know."""
    return {} if layer.eps is None and not uses else {"epsilon": float(_need(layer, layer.eps, "eps"))}


def _batch_norm(layer: Any, uses: Uses) -> NativeClass:
    if not {"mean", "variance"} <= layer.parameters.keys():
        raise _no_form(layer, "a batch norm without running statistics", "a mean and a variance")
    decay = {} if layer.decay is None else {"momentum": float(layer.decay)}
    return "BatchNormalization", {**_eps(layer, uses), **decay}


def _instance_norm(layer: Any, uses: Uses) -> NativeClass:
    if {"mean", "variance"} & layer.parameters.keys():
        raise _no_form(layer, "an instance norm with running statistics", "one that normalises by its input")
    return "InstanceNormalization", _eps(layer, uses)


def _group_norm(layer: Any, uses: Uses) -> NativeClass:
    channels = next(math.prod(parameter.shape) for parameter in layer.parameters.values())
    groups = getattr(layer, "groups", -1)
    groups = channels if groups == -1 else _need(layer, groups, "number of groups")
    return "GroupNormalization", {"num_groups": groups, **_eps(layer, uses)}


def _last_axes_norm(op: str) -> Callable[[Any, Uses], NativeClass]:
    def rule(layer: Any, uses: Uses) -> NativeClass:
        parameter = layer.parameters.get("scale") or layer.parameters["bias"]
        # The one axis of a vector may be recorded as (channel position).
        count = 1 if "position" in parameter.axes else len(parameter.shape)
        return op, {"axis": -count, **_eps(layer, uses)}

    return rule


def _prelu(layer: Any, uses: Uses) -> NativeClass:
    """`slope_rank`: how many axes the slopes have, so that they are one per channel."""
    slope = layer.parameters["slope"]
    if math.prod(slope.shape) == 1 or "position" in slope.axes:
        return "PRelu", {"slope_rank": 1}
    ranks = {rank - 1 for _, rank in uses} or {len(slope.shape)}
    if len(ranks) > 1 or (len(slope.shape) > 1 and {len(slope.shape)} != ranks):
        raise _no_form(
            layer, f"slopes {slope.shape} for values of {' and '.join(str(n + 1) for n in ranks)} axes", "one shape"
        )
    return "PRelu", {"slope_rank": ranks.pop()}


def _recurrent(op: str) -> Callable[[Any, Uses], NativeClass]:
    def rule(layer: Any, uses: Uses) -> NativeClass:
        if "projection" in layer.parameters:
            raise _no_form(layer, "an LSTM with a projection", "one without")
        weight = layer_sizes.kernel(layer)
        ways = layer_sizes.directions(layer)
        direction = "bidirectional" if ways == 2 else "reverse" if layer.go_backwards else "forward"
        config: Config = {"hidden_size": layer_sizes.size(weight, "unit"), "direction": direction}
        own, gates = _activation(layer, "activation", "tanh"), _activation(layer, "recurrent_activation", "sigmoid")
        config |= activation_settings({"RNN": [own], "GRU": [gates, own], "LSTM": [gates, own, own]}[op] * ways)
        if op == "GRU":
            config["linear_before_reset"] = int(bool(_need(layer, layer.reset_after, "reset_after")))
        return op, config

    return rule


def _activation(layer: Any, setting: str, default: str) -> str:
    name = str(getattr(layer, setting, None) or default)
    if name not in IN_RECURRENT:
        raise _no_form(layer, f"the {setting.replace('_', ' ')} {name}", f"one of {', '.join(IN_RECURRENT)}")
    return name


def _attention(layer: Any, uses: Uses) -> NativeClass:
    """`Attention` here means the four products and what is between them, for which ONNX has one name since opset 23."""
    heads = _need(layer, layer.heads, "number of heads")
    if layer.attention_axes not in (None, -2, (-2,)):
        raise _no_form(layer, f"attention over the axes {layer.attention_axes}", "the second last one")
    return "Attention", {"q_num_heads": heads, "kv_num_heads": layer.kv_heads or heads}


def _einsum(layer: Any, uses: Uses) -> NativeClass:
    return "Einsum", {"equation": str(_need(layer, layer.equation, "equation")).replace(" ", "")}


def _bilinear(layer: Any, uses: Uses) -> NativeClass:
    raise _no_form(layer, "a bilinear layer", "one that a graph can hold")


_CLASSES: dict[str, Callable[[Any, Uses], NativeClass]] = {
    "dense": _dense,
    "conv": _conv,
    "depthwise": _conv,
    "conv_transpose": _conv_transpose,
    "embedding": _embedding,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _last_axes_norm("LayerNormalization"),
    "rms_norm": _last_axes_norm("RMSNormalization"),
    "group_norm": _group_norm,
    "prelu": _prelu,
    "simple_rnn": _recurrent("RNN"),
    "lstm": _recurrent("LSTM"),
    "gru": _recurrent("GRU"),
    "attention": _attention,
    "einsum_dense": _einsum,
    "bilinear": _bilinear,
}
