"""How PyTorch stores layers. Names are those of a state dict, relative to the module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neutral.conventions.forms import Config, Convention, Form, Row, Sizes, layer


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(int(v) for v in value) if len(value) == rank else (int(value[0]),) * rank
    return (int(value),) * rank


def _kernel_size(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in sorted(n for n in sizes if n[0] == "x" and n[1:].isdigit()))


def _same_pads(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def _conv(config: Config, sizes: Sizes) -> dict[str, Any]:
    if "stride" not in config:
        return {}
    kernel = _kernel_size(sizes)
    rank = len(kernel)
    dilation = _per_axis(config.get("dilation", 1), rank)
    padding = config.get("padding", 0)
    pads: Any
    if padding == "same":
        pads = _same_pads(kernel, dilation)
    elif padding == "valid":
        pads = ((0, 0),) * rank
    else:
        pads = tuple((p, p) for p in _per_axis(padding, rank))
    return {
        "strides": _per_axis(config["stride"], rank),
        "padding": pads,
        "dilation": dilation,
        "groups": config.get("groups", 1),
        "padding_mode": config.get("padding_mode", "zeros"),
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
        "groups": config.get("groups", 1),
    }


def _running_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    momentum = config.get("momentum")
    return {"eps": config.get("eps"), "decay": None if momentum is None else 1 - momentum}


def _layer_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    shape = config.get("normalized_shape")
    return {"eps": config.get("eps"), "normalized_axes": None if shape is None else len(_as_tuple(shape))}


def _as_tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _group_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("eps"), "groups": config.get("num_groups")}


_FINFO_EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def _rms_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    if "eps" not in config:
        return {}
    # eps=None means the smallest step of the weight's dtype; modules are float32 unless they say otherwise.
    return {"eps": _FINFO_EPS["float32"] if config["eps"] is None else config["eps"]}


def _rnn(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"units": sizes.get("unit"), "bias_convention": "two", "activation": config.get("nonlinearity")}


def _gated(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "units": sizes.get("unit"),
        "bias_convention": "two",
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
    }


def _gru(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_gated(config, sizes), "reset_after": True}


def _attention(config: Config, sizes: Sizes) -> dict[str, Any]:
    heads = config.get("num_heads")
    return {"heads": heads, "kv_heads": heads}


def _square_state(sizes: Sizes) -> bool:
    """Without a projection the recurrent state has as many elements as there are units."""
    return sizes.get("hidden") == sizes.get("unit") and "projected" not in sizes


def _grouped(sizes: Sizes) -> bool:
    """The bias of a transposed convolution has `groups` times the kernel's output channels."""
    if "channel" not in sizes:
        return True
    groups, rest = divmod(sizes["channel"], sizes["out"])
    return rest == 0 and groups > 0 and sizes["in"] % groups == 0


def _recurrent(kind: str, gates: str, attributes: Any, level: str, projected: bool = False) -> tuple[Form, ...]:
    """The uni- and bidirectional form of a stack (`level` is the suffix of its names) or of a cell."""
    block = f"(gate:{gates} unit)" if gates else "unit"
    gate = f"gate:{gates} " if gates else ""
    forms = []
    for direction in ("", "{direction:|_reverse}") if level else ("",):
        end = f"{level}{direction}"
        rows = [
            Row("input_kernel", f"weight_ih{end}", f"{block} in"),
            Row("recurrent_kernel", f"weight_hh{end}", f"{block} hidden"),
            Row("bias", f"bias_{{side:ih|hh}}{end}", block, f"side {gate}unit".strip()),
        ]
        if projected:
            rows.append(Row("projection", f"weight_hr{end}", "hidden unit", required=True))
        classes = {"simple_rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
        cls = classes[kind] + ("" if level else "Cell")
        part = layer(kind, *rows, attributes=attributes, check=any_state if projected else _square_state)
        forms.append(Form((cls,), (part,), levels=bool(level)))
    return tuple(reversed(forms))


def any_state(sizes: Sizes) -> bool:
    return True


_DENSE = ("Linear", "NonDynamicallyQuantizableLinear")
_CONV = ("Conv1d", "Conv2d", "Conv3d")
_CONV_TRANSPOSE = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")

_KERNELS = (
    ("dense", _DENSE, "out in", Row("bias", "bias", "out"), None, lambda sizes: True),
    ("conv", _CONV, "out in ...", Row("bias", "bias", "out"), _conv, lambda sizes: "x0" in sizes),
    (
        "conv_transpose",
        _CONV_TRANSPOSE,
        "in out ...",
        Row("bias", "bias", "channel"),
        _conv_transpose,
        lambda sizes: "x0" in sizes and _grouped(sizes),
    ),
)


def _kernel_forms() -> tuple[Form, ...]:
    """Each layer with a kernel: plain, and in the four ways torch stores a reparametrized kernel."""
    forms = []
    for kind, classes, axes, bias, attributes, check in _KERNELS:
        raw_weight = "parametrizations.weight."
        variants: tuple[tuple[str | None, tuple[Row, ...]], ...] = (
            (None, (Row("kernel", "weight", axes),)),
            ("weight_norm", (Row("kernel_magnitude", "weight_g", raw=True, required=True), Row("kernel_direction", "weight_v", axes, axes, required=True))),
            ("weight_norm", (Row("kernel_magnitude", f"{raw_weight}original0", raw=True, required=True), Row("kernel_direction", f"{raw_weight}original1", axes, axes, required=True))),
            ("spectral_norm", (Row("kernel_raw", "weight_orig", axes, axes, required=True), Row("kernel_u", "weight_u", raw=True, required=True), Row("kernel_v", "weight_v", raw=True, required=True))),
            ("spectral_norm", (Row("kernel_raw", f"{raw_weight}original", axes, axes, required=True), Row("kernel_u", f"{raw_weight}0._u", raw=True, required=True), Row("kernel_v", f"{raw_weight}0._v", raw=True, required=True))),
        )  # fmt: skip
        for name, rows in variants:
            part = layer(kind, *rows, bias, attributes=_with(attributes, name), check=check)
            parametrized = tuple(f"Parametrized{cls}" for cls in classes)
            forms.append(Form((*classes, *parametrized), (part,)))
    return tuple(forms)


def _with(attributes: Any, reparametrization: str | None) -> Any:
    def both(config: Config, sizes: Sizes) -> dict[str, Any]:
        own = attributes(config, sizes) if attributes else {}
        return {**own, "reparametrization": reparametrization} if reparametrization else own

    return both


def _norm(kind: str, classes: tuple[str, ...], attributes: Any, statistics: bool) -> Form:
    rows = [Row("scale", "weight", "feature"), Row("bias", "bias", "feature")]
    if statistics:
        rows += [
            Row("mean", "running_mean", "feature", required=True),
            Row("variance", "running_var", "feature", required=True),
        ]
    return Form(classes, (layer(kind, *rows, attributes=attributes),))


_FUSED = Row("{part:query|key|value}_bias", "in_proj_bias", "(part projected)", "part projected")
_OUTPUT = (
    Row("output_kernel", "out_proj.weight", "out attended"),
    Row("output_bias", "out_proj.bias", "out"),
    Row("extra_key", "bias_k", "1 1 key"),
    Row("extra_value", "bias_v", "1 1 value"),
)

TORCH = Convention(
    framework="torch",
    flatten="channel position",
    forms=(
        *_kernel_forms(),
        Form(("Embedding", "EmbeddingBag"), (layer("embedding", Row("embedding", "weight", "token feature"), attributes=lambda c, s: {"padding_idx": c.get("padding_idx")}),)),
        _norm("batch_norm", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"), _running_norm, True),
        _norm("batch_norm", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"), _running_norm, False),
Form(("LayerNorm",), (layer("layer_norm", Row("scale", "weight", "feature", "feature", required=True), Row("bias", "bias", "feature", "feature"), attributes=_layer_norm),)),
                Form(("LayerNorm",), (layer("layer_norm", Row("scale", "weight", "...", required=True), Row("bias", "bias", "..."), attributes=_layer_norm),)),
        _norm("group_norm", ("GroupNorm",), _group_norm, False),
        _norm("instance_norm", ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), _running_norm, True),
        _norm("instance_norm", ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), _running_norm, False),
        Form(("RMSNorm",), (layer("rms_norm", Row("scale", "weight", "..."), attributes=_rms_norm),)),
        Form(("PReLU",), (layer("prelu", Row("slope", "weight", "feature", "feature")),)),
        *_recurrent("simple_rnn", "", _rnn, "_l{level}"),
        *_recurrent("lstm", "ifgo", _gated, "_l{level}", projected=True),
        *_recurrent("lstm", "ifgo", _gated, "_l{level}"),
        *_recurrent("gru", "rzn", _gru, "_l{level}"),
        *_recurrent("simple_rnn", "", _rnn, ""),
        *_recurrent("lstm", "ifgo", _gated, ""),
        *_recurrent("gru", "rzn", _gru, ""),
        Form(("MultiheadAttention",), (layer("attention", Row("{part:query|key|value}_kernel", "in_proj_weight", "(part projected) embed", "part projected embed", required=True), _FUSED, *_OUTPUT, attributes=_attention),)),
        Form(("MultiheadAttention",), (layer("attention", Row("query_kernel", "q_proj_weight", "query in"), Row("key_kernel", "k_proj_weight", "key in_key"), Row("value_kernel", "v_proj_weight", "value in_value"), _FUSED, *_OUTPUT, attributes=_attention),)),
        Form(("Bilinear",), (layer("bilinear", Row("kernel", "weight", "out in1 in2"), Row("bias", "bias", "out")),)),
    ),
)  # fmt: skip
