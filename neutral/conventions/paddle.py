"""How PaddlePaddle stores layers. Names are those of a state dict, relative to the layer; settings are the attributes of
live layers without the underscore in front, for files hold none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from neutral.conventions.forms import Attributes, Config, Convention, Form, Row, Shapes, Sizes, layer

WEIGHT_NORM_DIM = "weight_norm_dim"
SPECTRAL_NORM_DIM = "spectral_norm_dim"
"""Settings that readers add to layers with these hooks: the axis of the stored kernel that keeps its own norm."""

NORMALIZED_SHAPE = "normalized_shape"
"""What a layer norm of several axes has of these in a live layer, and in a hint: its scale is stored as one axis."""


def _kernel_size(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in sorted(n for n in sizes if n[0] == "x" and n[1:].isdigit()))


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(int(v) for v in value) if len(value) == rank else (int(value[0]),) * rank
    return (int(value),) * rank


def explicit_pads(padding: Any, rank: int, channels_last: bool) -> tuple[tuple[int, int], ...] | None:
    """Pairs (before, after) out of one of paddle's ways to say a padding; None for `same`.

    >>> explicit_pads([1, 2], 2, False), explicit_pads([0, 1, 2, 3], 2, False), explicit_pads("SAME", 1, False)
    (((1, 1), (2, 2)), ((0, 1), (2, 3)), None)
    >>> explicit_pads([[0, 0], [1, 2], [3, 4], [0, 0]], 2, True)
    ((1, 2), (3, 4))
    """
    if isinstance(padding, str):
        return None if padding.upper() == "SAME" else ((0, 0),) * rank
    if isinstance(padding, Sequence) and padding and isinstance(padding[0], Sequence):
        pairs = [(int(pair[0]), int(pair[-1])) for pair in padding]
        return tuple(pairs[1:-1] if channels_last else pairs[2:]) if len(pairs) == rank + 2 else tuple(pairs)
    if isinstance(padding, Sequence) and len(padding) == 2 * rank:
        return tuple((int(padding[2 * i]), int(padding[2 * i + 1])) for i in range(rank))
    return tuple((p, p) for p in _per_axis(padding, rank))


def channels_last(config: Config) -> bool:
    """True for a layer whose data have their channels behind.

    >>> channels_last({"data_format": "NHWC"}), channels_last({"data_format": "NCL"}), channels_last({})
    (True, False, False)
    """
    return str(config.get("data_format", "")).endswith("C") and len(str(config["data_format"])) > 2


def _same(kernel: Sequence[int], strides: Sequence[int]) -> Any:
    if any(s != 1 for s in strides):
        return "same"
    return tuple(((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel)


def _conv(config: Config, sizes: Sizes) -> dict[str, Any]:
    if "stride" not in config:
        return {}
    kernel = _kernel_size(sizes)
    strides = _per_axis(config["stride"], len(kernel))
    dilation = _per_axis(config.get("dilation", 1), len(kernel))
    pads: Any = explicit_pads(config.get("padding", 0), len(kernel), channels_last(config))
    if pads is None:
        # Paddle's `same` takes the dilation for 1.
        pads, dilation = _same(kernel, strides), (1,) * len(kernel)
    return {
        "strides": strides,
        "padding": pads,
        "dilation": dilation,
        "groups": config.get("groups", 1),
        "padding_mode": config.get("padding_mode", "zeros"),
    }


def _conv_transpose(config: Config, sizes: Sizes) -> dict[str, Any]:
    if "stride" not in config:
        return {}
    rank = len(_kernel_size(sizes))
    pads = explicit_pads(config.get("padding", 0), rank, channels_last(config))
    told = {
        "strides": _per_axis(config["stride"], rank),
        "dilation": _per_axis(config.get("dilation", 1), rank),
        "groups": config.get("groups", 1),
    }
    if pads is None:
        return {**told, "padding": "same"}
    extra = _per_axis(config.get("output_padding", 0), rank)
    return {
        **told,
        "padding": tuple((before, max(after - e, 0)) for (before, after), e in zip(pads, extra, strict=True)),
        "output_padding": tuple(max(e - after, 0) for (_, after), e in zip(pads, extra, strict=True)),
    }


def _running_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    """Paddle's momentum is the share that is kept."""
    return {"eps": config.get("epsilon"), "decay": config.get("momentum")}


def _layer_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    shape = config.get("normalized_shape")
    count = len(shape) if isinstance(shape, Sequence) else None if shape is None else 1
    return {"eps": config.get("epsilon"), "normalized_axes": count}


def _group_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("epsilon"), "groups": config.get("num_groups")}


def _instance_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("epsilon")}


def _embedding(config: Config, sizes: Sizes) -> dict[str, Any]:
    index = config.get("padding_idx")
    return {"padding_idx": index if isinstance(index, int) and index >= 0 else None}


def _backwards(config: Config) -> bool | None:
    found = config.get("is_reverse")
    return found if isinstance(found, bool) else None


def _rnn(config: Config, sizes: Sizes) -> dict[str, Any]:
    activation = {"RNN_TANH": "tanh", "RNN_RELU": "relu"}.get(str(config.get("mode")), config.get("activation"))
    return {
        "units": sizes.get("unit"),
        "bias_convention": "two",
        "activation": activation,
        "go_backwards": _backwards(config),
    }


def _gated(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "units": sizes.get("unit"),
        "bias_convention": "two",
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "go_backwards": _backwards(config),
    }


def _gru(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_gated(config, sizes), "reset_after": True}


def _attention(config: Config, sizes: Sizes) -> dict[str, Any]:
    heads = config.get("num_heads")
    return {"heads": heads, "kv_heads": heads}


def _square_state(sizes: Sizes) -> bool:
    """Without a projection the recurrent state has as many elements as there are units."""
    return sizes.get("hidden") == sizes.get("unit")


def _grouped(sizes: Sizes) -> bool:
    """The bias of a transposed convolution has `groups` times the kernel's output channels."""
    if "channel" not in sizes:
        return True
    groups, rest = divmod(sizes["channel"], sizes["out"])
    return rest == 0 and groups > 0 and sizes["in"] % groups == 0


def _recurrent(kind: str, gates: str, attributes: Attributes, stacked: bool) -> tuple[Form, ...]:
    """The two-way and the one-way form of a stack, or the form of a cell. A projected LSTM keeps that of its cells."""
    block = f"(gate:{gates} unit)" if gates else "unit"
    gate = f"gate:{gates} " if gates else ""
    cls = {"simple_rnn": "SimpleRNN", "lstm": "LSTM", "gru": "GRU"}[kind] + ("" if stacked else "Cell")
    ways = {"": "cell", "{direction:|_reverse}": "{direction:cell_fw|cell_bw}"}
    forms = []
    for direction, cell in reversed(ways.items()) if stacked else [("", "")]:
        end = f"_l{{level}}{direction}" if stacked else ""
        rows = [
            Row("input_kernel", f"weight_ih{end}", f"{block} in"),
            Row("recurrent_kernel", f"weight_hh{end}", f"{block} hidden"),
            Row("bias", f"bias_{{side:ih|hh}}{end}", block, f"side {gate}unit"),
        ]
        if kind == "lstm":
            place = f"{{level}}.{cell}." if stacked else ""
            projection = Row("projection", f"{place}weight_ho", "unit hidden", required=True)
            forms.append(Form((cls,), (layer(kind, *rows, projection, attributes=attributes),), levels=stacked))
        forms.append(Form((cls,), (layer(kind, *rows, attributes=attributes, check=_square_state),), levels=stacked))
    return tuple(forms)


_Check = Callable[[Sizes], bool]
_DENSE = ("Linear",)
_CONV = ("Conv1D", "Conv2D", "Conv3D")
_CONV_TRANSPOSE = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
_KERNELS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str, Attributes | None, _Check], ...] = (
    ("dense", _DENSE, ("in out",), "out", None, lambda sizes: True),
    ("conv", _CONV, ("out in x0", "out in x0 x1", "out in x0 x1 x2"), "out", _conv, lambda sizes: True),
    ("conv_transpose", _CONV_TRANSPOSE, ("in out x0", "in out x0 x1", "in out x0 x1 x2"), "channel", _conv_transpose, _grouped),
)  # fmt: skip


def _kernel_forms() -> tuple[Form, ...]:
    """Each layer with a kernel: plain, with a spectral norm, and with a weight norm along the first or second axis."""
    forms = []
    for kind, classes, ranks, bias_axis, attributes, check in _KERNELS:
        bias = Row("bias", "bias", bias_axis)
        for axes in ranks:
            canonical = "out in" if kind == "dense" else axes
            plain = (Row("kernel", "weight", axes, canonical, required=True), bias)
            forms.append(Form(classes, (layer(kind, *plain, attributes=_with(attributes, None), check=check),)))
            spectral = (
                Row("kernel_raw", "weight_orig", axes, canonical, required=True),
                Row("kernel_u", "weight_u", raw=True, required=True),
                Row("kernel_v", "weight_v", raw=True, required=True),
                bias,
            )
            part = layer(kind, *spectral, attributes=_with(attributes, "spectral_norm"), check=check)
            usual = 0 if kind == "conv" else 1
            forms.append(Form(classes, (part,), applies=_told(SPECTRAL_NORM_DIM, usual, None)))
            forms += _weight_norms(kind, classes, axes, canonical, bias, attributes, check)
    return tuple(forms)


def _weight_norms(
    kind: str,
    classes: tuple[str, ...],
    axes: str,
    canonical: str,
    bias: Row,
    attributes: Attributes | None,
    check: _Check,
) -> list[Form]:
    """A magnitude has one axis, and only a live layer or a hint says which one of the kernel it is: from a file it is known
    where no other axis has as many elements."""
    certain, told = [], []
    for dim, axis in enumerate(axes.split()[:2]):
        rows = (
            Row("kernel_magnitude", "weight_g", axis, " ".join(a if a == axis else "1" for a in canonical.split()), required=True),
            Row("kernel_direction", "weight_v", axes, canonical, required=True),
            bias,
        )  # fmt: skip
        known = _with(attributes, "weight_norm")
        alone = layer(kind, *rows, attributes=known, check=_alone(axis, axes.split(), check))
        certain.append(Form(classes, (alone,), applies=_told(WEIGHT_NORM_DIM, None)))
        part = layer(kind, *rows, attributes=known, check=check)
        says = f"{WEIGHT_NORM_DIM}={dim}"
        told.append(Form(classes, (part,), guessable=False, applies=_told(WEIGHT_NORM_DIM, dim), says=says))
    # One number for the whole kernel: a layout of no axes.
    whole = (
        Row("kernel_magnitude", "weight_g", " ", " ", required=True),
        Row("kernel_direction", "weight_v", axes, canonical, required=True),
        bias,
    )
    part = layer(kind, *whole, attributes=_with(attributes, "weight_norm"), check=check)
    return [*certain, *told, Form(classes, (part,), applies=_told(WEIGHT_NORM_DIM, -1, None))]


def _alone(axis: str, axes: list[str], check: _Check) -> _Check:
    return lambda sizes: check(sizes) and all(sizes[axis] != sizes[other] for other in axes if other != axis)


def _told(setting: str, *values: int | None) -> Callable[[Config], bool]:
    return lambda config: config.get(setting) in values


def _with(attributes: Attributes | None, reparametrization: str | None) -> Attributes:
    def both(config: Config, sizes: Sizes) -> dict[str, Any]:
        own = attributes(config, sizes) if attributes else {}
        return {**own, "reparametrization": reparametrization} if reparametrization else own

    return both


def _deciding(config: Config, shapes: Shapes) -> dict[str, Any]:
    shape = normed(config)
    told = {} if shape is None else {NORMALIZED_SHAPE: list(shape)}
    return told | {n: config[n] for n in (WEIGHT_NORM_DIM, SPECTRAL_NORM_DIM) if type(config.get(n)) is int}


def _silent(config: Config) -> bool:
    """False for a norm that has an activation in it."""
    return config.get("act") is None


_NORMED_AXES = ("h w", "c h w", "d c h w")


def _layer_norms() -> tuple[Form, ...]:
    """The scale of several axes is stored as one; only a live layer or a hint says of what sizes these are."""
    several = [("feature", "feature"), *((f"({axes})", axes) for axes in _NORMED_AXES)]
    return tuple(_layer_norm_form(native, canonical) for native, canonical in several)


def _layer_norm_form(native: str, canonical: str, sizes: Sizes = MappingProxyType({})) -> Form:
    rows = (Row("scale", "weight", native, canonical, required=True), Row("bias", "bias", native, canonical))
    part = replace(layer("layer_norm", *rows, attributes=_layer_norm), sizes=sizes)
    if native == "feature":
        return Form(("LayerNorm",), (part,), applies=lambda config: normed(config) is None)
    return Form(("LayerNorm",), (part,), guessable=False, says=f"{NORMALIZED_SHAPE}=SHAPE")


def normed(config: Config) -> tuple[int, ...] | None:
    """The sizes of a norm over several axes, where they are told.

    >>> normed({"normalized_shape": [5, 6]}), normed({"normalized_shape": [5]})
    ((5, 6), None)
    """
    shape = config.get(NORMALIZED_SHAPE)
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n > 0 for n in shape):
        return None
    return tuple(shape) if 2 <= len(shape) <= len(_NORMED_AXES) + 1 else None


def _of_settings(cls: str, config: Config) -> tuple[Form, ...]:
    shape = normed(config) if cls == "LayerNorm" else None
    if shape is None:
        return ()
    axes = _NORMED_AXES[len(shape) - 2]
    return (_layer_norm_form(f"({axes})", axes, dict(zip(axes.split(), shape, strict=True))),)


def _projections() -> tuple[Form, Form]:
    """Attention; and, for a hint (`dense`), the same tensors as four layers of a model that has its own attention."""
    roles = {"q_proj": ("query", "query in"), "k_proj": ("key", "key in_key"), "v_proj": ("value", "value in_value"), "out_proj": ("output", "out attended")}  # fmt: skip
    rows: list[Row] = []
    parts = []
    for name, (role, axes) in roles.items():
        made, taken = axes.split()
        rows += [
            Row(f"{role}_kernel", f"{name}.weight", f"{taken} {made}", required=True),
            Row(f"{role}_bias", f"{name}.bias", made),
        ]
        parts.append(
            layer("dense", Row("kernel", f"{name}.weight", "in out"), Row("bias", f"{name}.bias", "out"), suffix=name)
        )
    attention = Form(("MultiHeadAttention",), (layer("attention", *rows, attributes=_attention),))
    return attention, Form((), tuple(parts), guessable=False)


_AFFINE = (Row("scale", "weight", "feature"), Row("bias", "bias", "feature"))

PADDLE = Convention(
    framework="paddle",
    flatten="channel position",
    deciding=_deciding,
    build=_of_settings,
    forms=(
        *_kernel_forms(),
        Form(("Embedding",), (layer("embedding", Row("embedding", "weight", "token feature"), attributes=_embedding),)),
        Form(
            ("BatchNorm1D", "BatchNorm2D", "BatchNorm3D", "SyncBatchNorm", "BatchNorm"),
            (
                layer(
                    "batch_norm",
                    *_AFFINE,
                    Row("mean", "_mean", "feature", required=True),
                    Row("variance", "_variance", "feature", required=True),
                    attributes=_running_norm,
                ),
            ),
            applies=_silent,
        ),
        *_layer_norms(),
        Form(("GroupNorm",), (layer("group_norm", *_AFFINE, attributes=_group_norm),)),
        Form(
            ("InstanceNorm1D", "InstanceNorm2D", "InstanceNorm3D"),
            (
                layer(
                    "instance_norm",
                    Row("scale", "scale", "feature"),
                    Row("bias", "bias", "feature"),
                    attributes=_instance_norm,
                ),
            ),
        ),
        Form(("PReLU",), (layer("prelu", Row("slope", "_weight", "feature", "feature")),)),
        *_recurrent("simple_rnn", "", _rnn, True),
        *_recurrent("lstm", "ifgo", _gated, True),
        *_recurrent("gru", "rzn", _gru, True),
        *_recurrent("simple_rnn", "", _rnn, False),
        *_recurrent("lstm", "ifgo", _gated, False),
        *_recurrent("gru", "rzn", _gru, False),
        *_projections(),
        Form(
            ("Bilinear",),
            (layer("bilinear", Row("kernel", "weight", "out in1 in2"), Row("bias", "bias", "1 out", "out")),),
        ),
    ),
)
