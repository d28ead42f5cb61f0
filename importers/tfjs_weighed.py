"""Keras' layers with weights as those that TensorFlow.js has: the one step with the suffix "" has the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_tensor import Config
from neutral.importers.tfjs_layers import bordered
from neutral.importers.tfjs_steps import ACTIVATIONS, Call, Rule, Step, grid, inputs_of, product, same


def _conv(call: Call) -> tuple[Step, ...]:
    config = call.settings
    groups = int(config.pop("groups", 1))
    if groups > 1 and call.depthwise and call.cls == "Conv2D":
        filters = int(config.pop("filters"))
        return _depthwise(Call("DepthwiseConv2D", {"depth_multiplier": filters // groups, **config}, call.shapes))
    if groups > 1:
        raise Inexpressible(
            f"a convolution of {groups} groups", "one group, for TensorFlow.js' convolutions have no groups"
        )
    if config.get("padding") == "causal":
        reach = config["kernel_size"][0] - 1
        left = [int(config["dilation_rate"][0] if config.get("dilation_rate") else 1) * reach, 0]
        padded = Call("ZeroPadding1D", {"padding": left}, call.shapes)
        before = _inner("pad", bordered("padding", 1)(padded))
        return (*before, Step("", call.cls, {**config, "padding": "valid"}, (before[-1].suffix,)))
    return (Step("", call.cls, config),)


def _inner(suffix: str, found: Sequence[Step]) -> tuple[Step, ...]:
    """Steps that are not the last ones: the one named "" gets a name, and the others stand in front of it."""

    def renamed(name: str) -> str:
        return f"{suffix}.{name}"

    return tuple(
        Step(
            renamed(s.suffix) if s.suffix else suffix, s.cls, s.config, tuple(renamed(i) if i else "" for i in s.inputs)
        )
        for s in found
    )


def _depthwise(call: Call) -> tuple[Step, ...]:
    config = call.settings
    dilation = config.pop("dilation_rate", 1)
    if set(dilation if isinstance(dilation, list) else [dilation]) != {1}:
        raise Inexpressible(
            f"a depthwise convolution with dilation {dilation}", "one without, for TensorFlow.js passes over it"
        )
    return (Step("", "DepthwiseConv2D", config),)


def _conv_transpose(call: Call) -> tuple[Step, ...]:
    """TensorFlow.js gives what Keras does without `output_padding`: at the least a step per input position."""
    config = call.settings
    dilation, extra = config.pop("dilation_rate", [1]), config.pop("output_padding", None)
    if set(dilation) != {1}:
        raise Inexpressible(f"a transposed convolution with dilation {dilation}", "one without")
    if extra is None:
        return (Step("", call.cls, config),)
    rest = [max(s - k, 0) - e for s, k, e in zip(config["strides"], config["kernel_size"], extra, strict=True)]
    if config["padding"] != "valid" or any(n < 0 for n in rest):
        raise Inexpressible(f"output_padding {list(extra)}", "none, for TensorFlow.js has none")
    if not any(rest):
        return (Step("", call.cls, config),)
    sizes = [
        None if n is None else n * s + max(k - s, 0)
        for n, s, k in zip(call.shape[1:-1], config["strides"], config["kernel_size"], strict=True)
    ]
    made = (call.shape[0], *sizes, config["filters"])
    cropped = Call(f"Cropping{len(rest)}D", {"cropping": [[0, n] for n in rest]}, (made,))
    behind = [
        Step(s.suffix or "crop", s.cls, s.config, tuple("=" if i in ("", "0") else i for i in s.inputs))
        for s in bordered("cropping", -1)(cropped)
    ]
    return (Step("", call.cls, config), *behind)


def _norm(call: Call) -> tuple[Step, ...]:
    """A norm, in fewer axes where there are more than TensorFlow.js normalises."""
    if len(call.shape) <= 4:
        return same(call)
    if call.config.get("axis", -1) != -1:
        raise Inexpressible(f"a norm over several of {len(call.shape)} axes", "one over the last axis")
    *space, channels = call.shape[1:]
    return (
        Step("rows", "Reshape", {"target_shape": grid([product(*space), channels])}),
        Step("", call.cls, call.settings, ("rows",)),
        Step("shape", "Reshape", {"target_shape": grid([*space, channels])}, ("=",)),
    )


def _prelu(call: Call) -> tuple[Step, ...]:
    return (Step("", "PReLU", {"shared_axes": call.config.get("shared_axes")}),)


_RECURRENT_ACTIVATIONS = {**ACTIVATIONS, "hard_sigmoid": "hard_sigmoid"}
"""Inside a recurrent layer no other layer can stand; `tfjs_config` has seen to it that this one is 0.2 x + 0.5."""


def recurrent_config(cls: str, config: Mapping[str, Any]) -> Config:
    """The settings of a recurrent layer in TensorFlow.js' words."""
    found = {key: value for key, value in config.items() if key not in ("dtype", "reset_after")}
    if cls == "GRU" and config.get("reset_after"):
        raise Inexpressible(
            "a GRU with reset_after=True",
            "reset_after=False, for TensorFlow.js has that alone",
            "retrain with reset_after=False, or use another framework",
        )
    for key in ("activation", "recurrent_activation"):
        if key in found:
            if found[key] not in _RECURRENT_ACTIVATIONS:
                raise Inexpressible(
                    f"the {key} {found[key]} in a recurrent layer", "one that TensorFlow.js has by name"
                )
            found[key] = _RECURRENT_ACTIVATIONS[found[key]]
    return found


def _recurrent(call: Call) -> tuple[Step, ...]:
    config = recurrent_config(call.cls, call.settings)
    return (Step("", call.cls, config, inputs_of(call)),)


def _bidirectional(call: Call) -> tuple[Step, ...]:
    inner = call.config["layer"]
    cls = str(inner["class_name"])
    layer = {"class_name": cls, "config": recurrent_config(cls, inner["config"])}
    config = {**call.settings, "layer": layer}
    return (Step("", "Bidirectional", config, inputs_of(call)),)


WEIGHED: Mapping[str, Rule] = {
    **dict.fromkeys(("Dense", "Embedding"), same),
    **dict.fromkeys(("BatchNormalization", "LayerNormalization"), _norm),
    **{f"Conv{n}D": _conv for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": _conv_transpose for n in (2, 3)},
    "DepthwiseConv2D": _depthwise,
    "PReLU": _prelu,
    **dict.fromkeys(("SimpleRNN", "LSTM", "GRU"), _recurrent),
    "Bidirectional": _bidirectional,
}

WITHOUT: Mapping[str, str] = {
    "Conv1DTranspose": "a transposed convolution of one axis",
    "DepthwiseConv1D": "a depthwise convolution of one axis",
    "GroupNormalization": "a group or instance norm",
    "RMSNormalization": "an RMS norm",
    "MultiHeadAttention": "attention",
    "GroupQueryAttention": "attention",
    "EinsumDense": "a dense layer by an einsum equation",
}
"""What TensorFlow.js' layers lack, in words."""
