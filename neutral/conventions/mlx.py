"""How MLX stores layers. Names are those of `parameters()`, relative to the module; channels come last.

From a file a convolution cannot be told from a transposed one, nor how a group norm groups its channels; live modules say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neutral.conventions.forms import Attributes, Config, Convention, Form, Row, Sizes, layer
from neutral.conventions.mlx_names import GRU_BIAS


def _kernel_size(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in sorted(n for n in sizes if n[0] == "x" and n[1:].isdigit()))


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(int(v) for v in value) if len(value) == rank else (int(value[0]),) * rank
    return (int(value),) * rank


def _conv(config: Config, sizes: Sizes) -> dict[str, Any]:
    if "stride" not in config:
        return {}
    rank = len(_kernel_size(sizes))
    return {
        "strides": _per_axis(config["stride"], rank),
        "padding": tuple((p, p) for p in _per_axis(config.get("padding", 0), rank)),
        "dilation": _per_axis(config.get("dilation", 1), rank),
        "groups": config.get("groups", 1),
        "padding_mode": "zeros",
    }


def _conv_transpose(config: Config, sizes: Sizes) -> dict[str, Any]:
    if "stride" not in config:
        return {}
    rank = len(_kernel_size(sizes))
    pads = _per_axis(config.get("padding", 0), rank)
    extra = _per_axis(config.get("output_padding", 0), rank)
    return {
        "strides": _per_axis(config["stride"], rank),
        "padding": tuple((p, max(p - e, 0)) for p, e in zip(pads, extra, strict=True)),
        "output_padding": tuple(max(e - p, 0) for p, e in zip(pads, extra, strict=True)),
        "dilation": _per_axis(config.get("dilation", 1), rank),
        "groups": 1,
    }


def _batch_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    momentum = config.get("momentum")
    return {"eps": config.get("eps"), "decay": None if momentum is None else 1 - momentum}


def _norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("eps")}


def _layer_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("eps"), "normalized_axes": 1 if "eps" in config else None}


def _group_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    """By default channel c belongs to group c modulo the groups, as in no other framework."""
    groups, compatible = config.get("num_groups"), config.get("pytorch_compatible")
    alike = compatible is True or groups in (1, sizes.get("feature"))
    grouping = None if alike else "unsaid" if compatible is None else "interleaved"
    return {"eps": config.get("eps"), "groups": groups, "grouping": grouping}


def _rnn(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"units": sizes.get("unit"), "bias_convention": "one", "activation": config.get("nonlinearity")}


def _gated(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "units": sizes.get("unit"),
        "bias_convention": "one",
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
    }


def _gru(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_gated(config, sizes), "bias_convention": "two", "reset_after": True}


def _attention(config: Config, sizes: Sizes) -> dict[str, Any]:
    heads = config.get("num_heads")
    return {"heads": heads, "kv_heads": heads}


def _square_state(sizes: Sizes) -> bool:
    return sizes.get("hidden") == sizes.get("unit")


def _same_bias(sizes: Sizes) -> bool:
    return "x0" in sizes and sizes.get("channel", sizes["out"]) == sizes["out"]


def _named(cls: str, kind: str, *rows: Row, attributes: Attributes) -> Form:
    return Form((cls,), (layer(kind, *rows, attributes=attributes),))


def _no_settings(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {}


_AFFINE = (Row("scale", "weight", "feature"), Row("bias", "bias", "feature"))
_LAST = (Row("scale", "weight", "feature", "feature", required=True), Row("bias", "bias", "feature", "feature"))
_STATISTICS = (
    Row("mean", "running_mean", "feature", required=True),
    Row("variance", "running_var", "feature", required=True),
)


def _projections() -> tuple[Row, ...]:
    parts = {"query": "query in", "key": "key in_key", "value": "value in_value"}
    rows = [
        row
        for part, axes in parts.items()
        for row in (
            Row(f"{part}_kernel", f"{part}_proj.weight", axes),
            Row(f"{part}_bias", f"{part}_proj.bias", axes.split()[0]),
        )
    ]
    return (
        *rows,
        Row("output_kernel", "out_proj.weight", "out attended"),
        Row("output_bias", "out_proj.bias", "out"),
    )


MLX = Convention(
    framework="mlx",
    flatten="position channel",
    advice={
        "grouping": "use GroupNorm(pytorch_compatible=True) in MLX",
        "scales": "dequantize it in MLX first (mx.dequantize)",
    },
    forms=(
        _named(
            "Linear", "dense", Row("kernel", "weight", "out in"), Row("bias", "bias", "out"), attributes=_no_settings
        ),
        Form(
            ("Conv1d", "Conv2d", "Conv3d"),
            (
                layer(
                    "conv",
                    Row("kernel", "weight", "out ... in"),
                    Row("bias", "bias", "out"),
                    attributes=_conv,
                    check=lambda sizes: "x0" in sizes,
                ),
            ),
        ),
        Form(
            ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
            (
                layer(
                    "conv_transpose",
                    Row("kernel", "weight", "out ... in"),
                    Row("bias", "bias", "channel"),
                    attributes=_conv_transpose,
                    check=_same_bias,
                ),
            ),
        ),
        _named("Embedding", "embedding", Row("embedding", "weight", "token feature"), attributes=_no_settings),
        _named("BatchNorm", "batch_norm", *_AFFINE, *_STATISTICS, attributes=_batch_norm),
        _named("BatchNorm", "batch_norm", *_AFFINE, attributes=_batch_norm),
        _named("LayerNorm", "layer_norm", *_LAST, attributes=_layer_norm),
        _named("GroupNorm", "group_norm", *_AFFINE, attributes=_group_norm),
        _named("InstanceNorm", "instance_norm", *_AFFINE, attributes=_norm),
        _named("RMSNorm", "rms_norm", Row("scale", "weight", "feature", "feature"), attributes=_norm),
        _named("PReLU", "prelu", Row("slope", "weight", "feature", "feature"), attributes=_no_settings),
        Form(
            ("RNN",),
            (
                layer(
                    "simple_rnn",
                    Row("input_kernel", "Wxh", "unit in"),
                    Row("recurrent_kernel", "Whh", "unit hidden"),
                    Row("bias", "bias", "unit", "unit", "one_bias"),
                    attributes=_rnn,
                    check=_square_state,
                ),
            ),
        ),
        Form(
            ("LSTM",),
            (
                layer(
                    "lstm",
                    Row("input_kernel", "Wx", "(gate:ifgo unit) in"),
                    Row("recurrent_kernel", "Wh", "(gate:ifgo unit) hidden"),
                    Row("bias", "bias", "(gate:ifgo unit)", "gate:ifgo unit", "one_bias"),
                    attributes=_gated,
                    check=_square_state,
                ),
            ),
        ),
        Form(
            ("GRU",),
            (
                layer(
                    "gru",
                    Row("input_kernel", "Wx", "(gate:rzn unit) in"),
                    Row("recurrent_kernel", "Wh", "(gate:rzn unit) hidden"),
                    Row("bias", f"{{part:{'|'.join(GRU_BIAS)}}}", "unit", "part unit", "new_bias"),
                    attributes=_gru,
                    check=_square_state,
                ),
            ),
        ),
        _named("MultiHeadAttention", "attention", *_projections(), attributes=_attention),
        _named(
            "Bilinear",
            "bilinear",
            Row("kernel", "weight", "out in2 in1"),
            Row("bias", "bias", "out"),
            attributes=_no_settings,
        ),
    ),
)
