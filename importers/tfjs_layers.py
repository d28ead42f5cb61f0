"""Keras' layers as those that TensorFlow.js has: one by one, or several that compute the same.

>>> steps(Call("Activation", {"name": "a", "activation": "silu"}, ((None, 4),)))
(Step(suffix='', cls='Activation', config={'activation': 'swish'}, inputs=('',)),)
>>> [(step.cls, step.config) for step in steps(Call("ZeroPadding1D", {"name": "p", "padding": [2, 1]}, ((None, 8, 3),)))]
[('Reshape', {'target_shape': [8, 1, 3]}), ('ZeroPadding2D', {'padding': [[2, 1], [0, 0]]}), ('Reshape', {'target_shape': [11, 3]})]

What its version 4.22 lacks or computes otherwise: layers of one and three spatial axes that pad, crop and repeat (these
are done in two axes at a time), groups, dilation of depthwise convolutions, output_padding, settings of ReLU and ELU,
`keepdims`, softmax over other axes than the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_tensor import Config, Shape

_NAMED = (
    "elu", "selu", "relu", "relu6", "linear", "sigmoid", "softplus", "softsign", "tanh", "softmax", "log_softmax", "gelu", "mish",
)  # fmt: skip

_ACTIVATIONS = {
    **{name: name for name in _NAMED},
    "silu": "swish",
    "swish": "swish",
    "celu": "elu",
}
"""Activation functions of Keras 3, by neutral's names, and what TensorFlow.js calls them."""


@dataclass(frozen=True)
class Call:
    """A Keras layer applied once: its class, its config, the shapes of its inputs in Keras' order of axes."""

    cls: str
    config: Config
    shapes: tuple[Shape, ...]
    depthwise: bool = False
    """A Conv2D with groups that Keras has for a depthwise convolution."""

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def settings(self) -> Config:
        return {key: value for key, value in self.config.items() if key not in ("name", "dtype")}


@dataclass(frozen=True)
class Step:
    """A TensorFlow.js layer: what its name adds to that of the Keras layer, and what it takes.

    It takes other steps by their suffixes, inputs of the Keras layer by their numbers (or "", the first), and the step
    of the Keras layer's own name as "=".
    """

    suffix: str
    cls: str
    config: Config
    inputs: tuple[str, ...] = ("",)


Rule = Callable[[Call], tuple[Step, ...]]


def _chain(*layers: tuple[str, str, Config]) -> tuple[Step, ...]:
    """Layers of which each takes the one before it."""
    before = ["", *(suffix for suffix, _, _ in layers)]
    return tuple(
        Step(suffix, cls, config, (taken,)) for taken, (suffix, cls, config) in zip(before, layers, strict=False)
    )


def _same(call: Call) -> tuple[Step, ...]:
    return (Step("", call.cls, call.settings, _inputs(call)),)


def _inputs(call: Call) -> tuple[str, ...]:
    return tuple(str(i) for i in range(len(call.shapes)))


def _activation(call: Call) -> tuple[Step, ...]:
    name = call.config["activation"]
    if name in _ACTIVATIONS:
        return _chain(("", "Activation", {"activation": _ACTIVATIONS[name]}))
    if name not in _COMPOSED:
        raise Inexpressible(f"the activation {name}", "one that TensorFlow.js has")
    return _COMPOSED[name]


def _scaled(scale: float, offset: float) -> Config:
    return {"scale": scale, "offset": offset}


_GATE: tuple[tuple[str, str, Config], ...] = (
    ("line", "Rescaling", _scaled(1 / 6, 0.5)),
    ("gate", "ReLU", {"max_value": 1.0}),
)

_COMPOSED: Mapping[str, tuple[Step, ...]] = {
    "hard_sigmoid": _chain(_GATE[0], ("", "ReLU", {"max_value": 1.0})),
    "hard_silu": (*_chain(*_GATE), Step("", "Multiply", {}, ("", "gate"))),
    "hard_swish": (*_chain(*_GATE), Step("", "Multiply", {}, ("", "gate"))),
    "hard_tanh": _chain(
        ("shift", "Rescaling", _scaled(1.0, 1.0)), ("bound", "ReLU", {"max_value": 2.0}), ("", "Rescaling", _scaled(1.0, -1.0))
    ),
    "leaky_relu": _chain(("", "LeakyReLU", {"alpha": 0.2})),
    # x - clip(x, -0.5, 0.5)
    "soft_shrink": (
        *_chain(
            ("shift", "Rescaling", _scaled(1.0, 0.5)),
            ("bound", "ReLU", {"max_value": 1.0}),
            ("less", "Rescaling", _scaled(-1.0, 0.5)),
        ),
        Step("", "Add", {}, ("", "less")),
    ),
}  # fmt: skip


def _relu(call: Call) -> tuple[Step, ...]:
    threshold, limit = call.config.get("threshold"), call.config.get("max_value")
    if threshold:
        return _chain(("", "ThresholdedReLU", {"theta": float(threshold)}))
    return _chain(("", "ReLU", {} if limit is None else {"max_value": float(limit)}))


def _leaky_relu(call: Call) -> tuple[Step, ...]:
    return _chain(("", "LeakyReLU", {"alpha": call.config["negative_slope"]}))


def _elu(call: Call) -> tuple[Step, ...]:
    alpha = float(call.config.get("alpha", 1.0))
    if alpha == 1.0:
        return _chain(("", "ELU", {}))
    # TensorFlow.js has alpha 1 alone: relu(x) (1 - alpha) + elu(x) alpha
    return (
        Step("relu", "ReLU", {}),
        Step("positive", "Rescaling", _scaled(1 - alpha, 0.0), ("relu",)),
        Step("elu", "ELU", {}),
        Step("both", "Rescaling", _scaled(alpha, 0.0), ("elu",)),
        Step("", "Add", {}, ("positive", "both")),
    )


def _softmax(call: Call) -> tuple[Step, ...]:
    rank = len(call.shape)
    axis = int(call.config.get("axis", -1)) % rank
    if axis == rank - 1:
        return _chain(("", "Softmax", {"axis": -1}))
    turned = [*(i for i in range(1, rank) if i != axis), axis]
    back = [turned.index(i) + 1 for i in range(1, rank)]
    return _chain(
        ("last", "Permute", {"dims": turned}), ("softmax", "Softmax", {"axis": -1}), ("", "Permute", {"dims": back})
    )


def _subtract(call: Call) -> tuple[Step, ...]:
    return (Step("less", "Rescaling", _scaled(-1.0, 0.0), ("1",)), Step("", "Add", {}, ("0", "less")))


def _spatial_dropout(call: Call) -> tuple[Step, ...]:
    shape = [None, *(1 for _ in call.shape[1:-1]), None]
    return _chain(("", "Dropout", {"rate": call.config["rate"], "noise_shape": shape}))


# Layers that TensorFlow.js has for two spatial axes alone.


def _grid(sizes: Sequence[int | None]) -> list[int]:
    """The sizes of a Reshape, one of which it may have to find out itself."""
    if list(sizes).count(None) > 1:
        raise Inexpressible(
            f"{list(sizes).count(None)} sizes that are not known", "at most one, to lay out two axes at a time"
        )
    return [-1 if n is None else n for n in sizes]


def _product(*sizes: int | None) -> int | None:
    known = [n for n in sizes if n is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _in_two_axes(
    call: Call,
    cls: str,
    config: Callable[[list[Any]], Config],
    amounts: list[Any],
    nothing: Any,
    sizes: Callable[[int | None, Any], int | None],
) -> tuple[Step, ...]:
    """A layer of one or three spatial axes by the one for two: `amounts` per axis, `sizes` what becomes of an axis."""
    *space, channels = call.shape[1:]
    grown = [sizes(n, amount) for n, amount in zip(space, amounts, strict=True)]
    if len(space) == 1:
        return _chain(
            ("wide", "Reshape", {"target_shape": _grid([space[0], 1, channels])}),
            ("two", cls, config([amounts[0], nothing])),
            ("", "Reshape", {"target_shape": _grid([grown[0], channels])}),
        )
    return _chain(
        ("wide", "Reshape", {"target_shape": _grid([space[0], space[1], _product(space[2], channels)])}),
        ("two", cls, config(amounts[:2])),
        ("deep", "Reshape", {"target_shape": _grid([_product(grown[0], grown[1]), space[2], channels])}),
        ("three", cls, config([nothing, amounts[2]])),
        ("", "Reshape", {"target_shape": _grid([*grown, channels])}),
    )


def _pairs(value: Any, count: int) -> list[Any]:
    return [list(value)] if count == 1 and not isinstance(value[0], list | tuple) else [list(pair) for pair in value]


def _bordered(key: str, sign: int) -> Rule:
    def rule(call: Call) -> tuple[Step, ...]:
        pairs = _pairs(call.config[key], len(call.shape) - 2)
        if len(pairs) == 2:
            return _same(call)

        def grown(n: int | None, pair: Any) -> int | None:
            return None if n is None else n + sign * sum(pair)

        return _in_two_axes(call, f"{call.cls[:-2]}2D", lambda both: {key: both}, pairs, [0, 0], grown)

    return rule


def _upsampling(call: Call) -> tuple[Step, ...]:
    size, rank = call.config["size"], len(call.shape) - 2
    factors = [size] * rank if isinstance(size, int) else list(size)
    if call.config.get("interpolation", "nearest") != "nearest":
        raise Inexpressible(
            "bilinear upsampling", "nearest, for TensorFlow.js places the pixels of a bilinear one elsewhere"
        )
    if rank == 2:
        return _chain(("", "UpSampling2D", {"size": factors, "interpolation": "nearest"}))

    def grown(n: int | None, factor: Any) -> int | None:
        return None if n is None else n * int(factor)

    def two(both: list[Any]) -> Config:
        return {"size": both, "interpolation": "nearest"}

    return _in_two_axes(call, "UpSampling2D", two, factors, 1, grown)


def _global_pool(call: Call) -> tuple[Step, ...]:
    rank, channels = len(call.shape) - 2, call.shape[-1]
    found: list[tuple[str, str, Config]] = [("", call.cls, {})]
    if rank == 3:
        found = [
            ("row", "Reshape", {"target_shape": _grid([_product(*call.shape[1:-1]), channels])}),
            ("", f"{call.cls[:-2]}1D", {}),
        ]
    if call.config.get("keepdims"):
        found[-1] = ("vector", *found[-1][1:])
        found.append(("", "Reshape", {"target_shape": _grid([*(1 for _ in range(rank)), channels])}))
    return _chain(*found)


_AS_IN_KERAS = (
    "Rescaling", "Flatten", "Reshape", "Permute", "RepeatVector", "Add", "Multiply", "Average", "Maximum", "Minimum",
    "Concatenate", "Dropout", "SpatialDropout1D", "GaussianNoise", "GaussianDropout", "AlphaDropout",
)  # fmt: skip

_LAYERS: Mapping[str, Rule] = {
    **dict.fromkeys(_AS_IN_KERAS, _same),
    **{f"{kind}Pooling{n}D": _same for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"Global{kind}Pooling{n}D": _global_pool for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": _bordered("padding", 1) for n in (1, 2, 3)},
    **{f"Cropping{n}D": _bordered("cropping", -1) for n in (1, 2, 3)},
    **{f"UpSampling{n}D": _upsampling for n in (1, 2, 3)},
    **{f"SpatialDropout{n}D": _spatial_dropout for n in (2, 3)},
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "ELU": _elu,
    "Softmax": _softmax,
    "Subtract": _subtract,
}  # fmt: skip


# Layers with weights: the one step with the suffix "" has them.


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
        before = _inner("pad", _bordered("padding", 1)(padded))
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
        for s in _bordered("cropping", -1)(cropped)
    ]
    return (Step("", call.cls, config), *behind)


def _prelu(call: Call) -> tuple[Step, ...]:
    return (Step("", "PReLU", {"shared_axes": call.config.get("shared_axes")}),)


_RECURRENT_ACTIVATIONS = {**_ACTIVATIONS, "hard_sigmoid": "hard_sigmoid"}
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
            if found[key] not in _ACTIVATIONS:
                raise Inexpressible(
                    f"the {key} {found[key]} in a recurrent layer", "one that TensorFlow.js has by name"
                )
            found[key] = _ACTIVATIONS[found[key]]
    return found


def _recurrent(call: Call) -> tuple[Step, ...]:
    config = recurrent_config(call.cls, call.settings)
    return (Step("", call.cls, config, _inputs(call)),)


def _bidirectional(call: Call) -> tuple[Step, ...]:
    inner = call.config["layer"]
    cls = str(inner["class_name"])
    layer = {"class_name": cls, "config": recurrent_config(cls, inner["config"])}
    config = {**call.settings, "layer": layer}
    return (Step("", "Bidirectional", config, _inputs(call)),)


_WEIGHED: Mapping[str, Rule] = {
    **dict.fromkeys(("Dense", "Embedding", "BatchNormalization", "LayerNormalization"), _same),
    **{f"Conv{n}D": _conv for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": _conv_transpose for n in (2, 3)},
    "DepthwiseConv2D": _depthwise,
    "PReLU": _prelu,
    **dict.fromkeys(("SimpleRNN", "LSTM", "GRU"), _recurrent),
    "Bidirectional": _bidirectional,
}

WITHOUT = {
    "Conv1DTranspose": "a transposed convolution of one axis",
    "DepthwiseConv1D": "a depthwise convolution of one axis",
    "GroupNormalization": "a group or instance norm",
    "RMSNormalization": "an RMS norm",
    "MultiHeadAttention": "attention",
    "GroupQueryAttention": "attention",
    "EinsumDense": "a dense layer by an einsum equation",
}
"""What TensorFlow.js' layers lack, in words."""


def steps(call: Call) -> tuple[Step, ...]:
    """The layers of TensorFlow.js that compute a call, inputs first; the last one gives its output."""
    rule = _LAYERS.get(call.cls) or _WEIGHED.get(call.cls)
    if rule is None:
        what = WITHOUT.get(call.cls, f"Keras' {call.cls}")
        raise Inexpressible(what, "a layer that TensorFlow.js has", "keep the model in its framework, or in Keras")
    return rule(call)


def has_weights(cls: str) -> bool:
    return cls in _WEIGHED
