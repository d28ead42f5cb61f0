"""Which Keras class and config a canonical layer becomes.

>>> from neutral.schema.kinds import Dense, Parameter
>>> kernel = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> form_of(Dense(path="fc", parameters={"kernel": kernel}), known=True)
('Dense', {'units': 2, 'use_bias': False})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from neutral.conventions.keras_onnx import FUNCTIONS
from neutral.errors import Problem, an
from neutral.importers.keras_tensor import Config
from neutral.schema.kinds import (
    GRU,
    HARD_SIGMOIDS,
    LSTM,
    AnyLayer,
    Attention,
    BatchNorm,
    Bilinear,
    Conv,
    ConvTranspose,
    Dense,
    Depthwise,
    EinsumDense,
    Embedding,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Parameter,
    PReLU,
    RMSNorm,
    SimpleRNN,
    Unknown,
)

Form = tuple[str, Config]

NO_LAYER = "a weights file, or a model of the source's own framework"


class Inexpressible(Exception):
    """Something that no Keras layer computes. Arguments: what was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str = "something that a Keras layer computes", do: str = "") -> None:
        self.found, self.expected, self.do = found, expected, do
        super().__init__(found)

    def problem(self, where: str) -> Problem:
        return Problem(where, self.found, self.expected, self.do)


def kernel_of(layer: AnyLayer) -> Parameter:
    for role in ("kernel", "kernel_direction", "kernel_raw"):
        if role in layer.parameters:
            return layer.parameters[role]
    raise Inexpressible("no kernel", "a layer with a kernel")


def kernel_sides(parameter: Parameter) -> tuple[int, int]:
    """Output and input axes of a dense kernel: how many axes belong to the output, and its size."""
    axes, shape = parameter.axes, parameter.shape
    if "in" in axes:
        cut = axes.index("in")
    elif "out" in axes:
        cut = axes.index("out") + 1
    else:
        cut = len(axes) // 2
    return cut, math.prod(shape[:cut])


def channels_of(axes: Sequence[str], shape: Sequence[int]) -> int:
    """Channels of a fused axis that is recorded as (channel position), else 0."""
    found = next((n for axis, n in zip(axes, shape, strict=True) if axis in ("channel", "out_channel")), 0)
    if len(axes) > 1 and not found:
        raise Inexpressible(f"axes {', '.join(axes)}", "one axis, or channel and position")
    return found


def _need(value: Any, what: str) -> Any:
    if value is None:
        raise Inexpressible(f"unknown {what}", "a source that says it", "import into a template that has it")
    return value


def _spatial_rank(layer: AnyLayer) -> int:
    rank = len(kernel_of(layer).shape) - 2
    if rank not in (1, 2, 3):
        raise Inexpressible(f"a kernel with {rank} spatial axes", "1 to 3")
    return rank


def _window(layer: Conv | Depthwise | ConvTranspose, known: bool) -> Config:
    """Strides and dilation; left out where they are not known and nobody builds a model of them."""
    rank = _spatial_rank(layer)
    config: Config = {"kernel_size": list(kernel_of(layer).shape[2:])}
    if known or layer.strides is not None:
        config["strides"] = list(_need(layer.strides, "strides"))
    if known or layer.dilation is not None:
        config["dilation_rate"] = list(layer.dilation or (1,) * rank)
    return config


def explicit_padding(layer: Conv | Depthwise | ConvTranspose) -> tuple[tuple[int, int], ...] | None:
    return None if layer.padding is None or isinstance(layer.padding, str) else layer.padding


def _centred(layer: Conv | Depthwise) -> bool:
    """Explicit padding that is what 'same' pads at stride 1."""
    kernel, dilation = kernel_of(layer).shape[2:], layer.dilation or (1,) * _spatial_rank(layer)
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return set(layer.strides or (0,)) == {1} and explicit_padding(layer) == tuple((t // 2, t - t // 2) for t in totals)


def conv_padding(layer: Conv | Depthwise, known: bool) -> str | None:
    """Keras' padding of a convolution; None where it takes a layer of its own in front."""
    if layer.padding_mode not in (None, "zeros"):
        raise Inexpressible(f"padding_mode {layer.padding_mode!r}", "a convolution that pads with zeros")
    if layer.padding == "same_lower":
        raise Inexpressible("padding that puts the odd position in front", "explicit padding, 'same' or 'causal'")
    if layer.padding == "causal" and (_spatial_rank(layer) != 1 or isinstance(layer, Depthwise)):
        raise Inexpressible("causal padding in this layer", "it in a Conv1D")
    if isinstance(layer.padding, str):
        return layer.padding
    pairs = _need(layer.padding, "padding") if known else layer.padding
    if pairs is None or not any(n for pair in pairs for n in pair):
        return "valid"
    return "same" if _centred(layer) else None


def _conv_form(layer: Conv, known: bool) -> Form:
    rank, kernel = _spatial_rank(layer), kernel_of(layer)
    config = {"filters": kernel.shape[0], **_window(layer, known), "groups": layer.groups or 1}
    return f"Conv{rank}D", {**config, "padding": conv_padding(layer, known) or "valid", **_bias(layer)}


def _bias(layer: AnyLayer) -> Config:
    return {"use_bias": "bias" in layer.parameters}


def _depthwise_form(layer: Depthwise, known: bool) -> Form:
    rank, out = _spatial_rank(layer), kernel_of(layer).shape[0]
    groups = layer.groups if known or layer.groups is not None else out
    groups = int(_need(groups, "number of groups"))
    config = {**_window(layer, known), "padding": conv_padding(layer, known) or "valid", **_bias(layer)}
    # TensorFlow has no depthwise convolution in 3-D, nor one whose strides differ.
    if rank == 3 or len(set(layer.strides or (1,))) > 1:
        return f"Conv{rank}D", {"filters": out, "groups": groups, **config}
    return f"DepthwiseConv{rank}D", {"depth_multiplier": out // max(groups, 1), **config}


def _conv_transpose_form(layer: ConvTranspose, known: bool) -> Form:
    if (layer.groups or 1) != 1:
        raise Inexpressible(
            f"a transposed convolution of {layer.groups} groups",
            "one group, for Keras' transposed convolutions have no groups",
            "import it to torch",
        )
    rank = _spatial_rank(layer)
    config = {"filters": kernel_of(layer).shape[1], **_window(layer, known), **_bias(layer)}
    if max(config.get("strides", [1])) > 1 and max(config.get("dilation_rate", [1])) > 1:
        raise Inexpressible("a transposed convolution with strides and dilation", "one of the two")
    if layer.padding == "same":
        extra = None if layer.output_padding is None else list(layer.output_padding)
        return f"Conv{rank}DTranspose", {**config, "padding": "same", "output_padding": extra}
    if isinstance(layer.padding, str):
        raise Inexpressible(f"padding {layer.padding!r}", "explicit padding or 'same'")
    if layer.padding is None and not known:
        return f"Conv{rank}DTranspose", config
    extra = [max(n, 0) for n in rest_of_padding(layer)]
    strides = config.get("strides", [1] * rank)
    if any(e >= s for e, s in zip(extra, strides, strict=True)):
        raise Inexpressible(f"output_padding {extra}", f"less than the strides {strides}")
    return f"Conv{rank}DTranspose", {**config, "padding": "valid", "output_padding": extra}


def rest_of_padding(layer: ConvTranspose) -> list[int]:
    """output_padding beyond what the padding crops again at the end of each axis."""
    pairs = _need(explicit_padding(layer), "padding")
    extra = layer.output_padding or (0,) * len(pairs)
    return [o - after for o, (_, after) in zip(extra, pairs, strict=True)]


def _dense_form(layer: Dense, known: bool) -> Form:
    return "Dense", {"units": kernel_sides(kernel_of(layer))[1], **_bias(layer)}


def _embedding_form(layer: Embedding, known: bool) -> Form:
    tokens, features = layer.parameters["embedding"].shape
    return "Embedding", {"input_dim": tokens, "output_dim": features}


def _affine(layer: AnyLayer) -> Config:
    return {"center": "bias" in layer.parameters, "scale": "scale" in layer.parameters}


def _eps(layer: BatchNorm | LayerNorm | GroupNorm | InstanceNorm | RMSNorm, known: bool) -> Config:
    return {"epsilon": float(_need(layer.eps, "eps"))} if known or layer.eps is not None else {}


def _batch_norm_form(layer: BatchNorm, known: bool) -> Form:
    if not {"mean", "variance"} <= set(layer.parameters):
        raise Inexpressible("a batch norm without running statistics", "a mean and a variance")
    decay = {} if layer.decay is None else {"momentum": float(layer.decay)}
    return "BatchNormalization", {"axis": -1, **_eps(layer, known), **decay, **_affine(layer)}


def _layer_norm_form(layer: LayerNorm, known: bool) -> Form:
    sample = next(iter(layer.parameters.values()), None)
    count = layer.normalized_axes or (len(sample.shape) if sample is not None else None)
    count = int(_need(count, "number of normalized axes"))
    if sample is not None and "channel" in sample.axes:  # one axis, recorded as (channel position)
        count = 1
    axis: int | list[int] = -1 if count == 1 else list(range(-count, 0))
    return "LayerNormalization", {"axis": axis, **_eps(layer, known), **_affine(layer)}


def _group_norm_form(layer: GroupNorm, known: bool) -> Form:
    groups = int(_need(layer.groups, "number of groups"))
    return "GroupNormalization", {"groups": groups, "axis": -1, **_eps(layer, known), **_affine(layer)}


def _instance_norm_form(layer: InstanceNorm, known: bool) -> Form:
    if "mean" in layer.parameters:
        raise Inexpressible("an instance norm with running statistics", "one that normalises by its input")
    return "GroupNormalization", {"groups": -1, "axis": -1, **_eps(layer, known), **_affine(layer)}


def _rms_norm_form(layer: RMSNorm, known: bool) -> Form:
    scale = layer.parameters["scale"]
    if len(scale.shape) != 1 and "channel" not in scale.axes:
        raise Inexpressible(f"an RMS norm over {len(scale.shape)} axes", "one axis")
    return "RMSNormalization", {"axis": -1, **_eps(layer, known)}


def _prelu_form(layer: PReLU, known: bool) -> Form:
    return "PReLU", {}


def _recurrent_form(layer: LSTM | GRU | SimpleRNN, known: bool) -> Form:
    if "projection" in layer.parameters:
        raise Inexpressible("an LSTM with a projection", "one without, for Keras has none", "import it to torch")
    kernel = layer.parameters["recurrent_kernel"]
    if known:
        for name in (layer.activation, getattr(layer, "recurrent_activation", None)):
            _check_activation(name)
    config: Config = {
        "units": kernel.shape[kernel.axes.index("unit")],
        "activation": layer.activation or "tanh",
        **_bias(layer),
        "go_backwards": bool(layer.go_backwards),
    }
    if not isinstance(layer, SimpleRNN):
        config["recurrent_activation"] = layer.recurrent_activation or "sigmoid"
    if isinstance(layer, GRU):
        config["reset_after"] = True if layer.reset_after is None else layer.reset_after
    cls = {"lstm": "LSTM", "gru": "GRU", "simple_rnn": "SimpleRNN"}[layer.kind]
    return _two_ways(layer, cls, config) if kernel.axes[0] == "direction" else (cls, config)


def _check_activation(name: str | None) -> None:
    """Inside a recurrent layer only a function with a name can stand."""
    if name is not None and name not in FUNCTIONS:
        meaning = f" ({HARD_SIGMOIDS[name]})" if name in HARD_SIGMOIDS else ""
        raise Inexpressible(f"the activation {name}{meaning} in a recurrent layer", "one of Keras 3's functions")


def _two_ways(layer: LSTM | GRU | SimpleRNN, cls: str, config: Config) -> Form:
    mode = layer.merge_mode or "concat"
    inner = {"module": "keras.layers", "class_name": cls, "config": config, "registered_name": None}
    return "Bidirectional", {"layer": inner, "merge_mode": None if mode == "none" else mode}


def _attention_form(layer: Attention, known: bool) -> Form:
    if {"extra_key", "extra_value"} & set(layer.parameters):
        raise Inexpressible("attention with an extra key and value", "attention without")
    heads = int(_need(layer.heads, "number of heads"))
    groups = layer.kv_heads or heads
    query, value, output = (layer.parameters[f"{name}_kernel"].shape for name in ("query", "value", "output"))
    width, size = math.prod(query[:-1]), output[0]
    bias = any(role.endswith("_bias") for role in layer.parameters)
    if groups != heads:
        config = {"head_dim": width // heads, "num_query_heads": heads, "num_key_value_heads": groups}
        return "GroupQueryAttention", {**config, "use_bias": bias}
    config = {"num_heads": heads, "key_dim": width // heads, "value_dim": math.prod(value[:-1]) // heads}
    return "MultiHeadAttention", {**config, "use_bias": bias, "output_shape": None if size == query[-1] else [size]}


def _einsum_form(layer: EinsumDense, known: bool) -> Form:
    return "EinsumDense", {"equation": str(_need(layer.equation, "equation")).replace(" ", "")}


def _no_form(layer: AnyLayer, known: bool) -> Form:
    raise Inexpressible(f"a layer of kind {layer.kind}", "a kind that Keras has", f"write {NO_LAYER}")


_FORMS: dict[type[Any], Callable[[Any, bool], Form]] = {
    Dense: _dense_form,
    Conv: _conv_form,
    Depthwise: _depthwise_form,
    ConvTranspose: _conv_transpose_form,
    Embedding: _embedding_form,
    BatchNorm: _batch_norm_form,
    LayerNorm: _layer_norm_form,
    GroupNorm: _group_norm_form,
    InstanceNorm: _instance_norm_form,
    RMSNorm: _rms_norm_form,
    PReLU: _prelu_form,
    SimpleRNN: _recurrent_form,
    LSTM: _recurrent_form,
    GRU: _recurrent_form,
    Attention: _attention_form,
    EinsumDense: _einsum_form,
    Bilinear: _no_form,
    Unknown: _no_form,
}


def form_of(layer: AnyLayer, known: bool) -> Form:
    """The Keras class and config of a layer. `known`: a model is built, so every setting must be known."""
    try:
        return _FORMS[type(layer)](layer, known)
    except (KeyError, ValueError, IndexError) as error:
        raise Inexpressible(f"parameters that do not make {an(layer.kind)} ({error})", "those of its kind") from None
