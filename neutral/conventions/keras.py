"""How Keras stores layers. Names are Keras 3's attribute names; Keras 2 files are read under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neutral.conventions.forms import INPUT_RANK, Config, Convention, Form, Part, Row, Shapes, Sizes, from_last, layer
from neutral.conventions.keras_variables import snake_case

_BIDIRECTIONAL = "{direction:forward_layer/|backward_layer/}"


def _kernel_size(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in sorted(n for n in sizes if n[0] == "x" and n[1:].isdigit()))


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, Sequence) else (int(value),) * rank


def activation_name(value: Any) -> str | None:
    """A config's activation as its name, that of a layer with its settings; None where it is not given.

    >>> activation_name({"class_name": "ReLU", "config": {}, "module": "keras.layers"})
    'ReLU'
    >>> activation_name({"class_name": "LeakyReLU", "config": {"name": "act", "alpha": 0.1}})
    'LeakyReLU(negative_slope=0.1)'
    """
    if value is None:
        return "linear"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        config = value.get("config")
        if isinstance(config, str):
            return config
        return _layer_as_name(str(value.get("class_name") or "unknown"), config)
    return "unknown"


_NO_SETTING = ("name", "dtype", "trainable")
_RENAMED = {("LeakyReLU", "alpha"): "negative_slope"}
"""Settings that Keras 2 called otherwise."""


def _layer_as_name(cls: str, config: Any) -> str:
    given = config if isinstance(config, Mapping) else {}
    told: dict[str, Any] = {
        str(_RENAMED.get((cls, key), key)): value["value"] if isinstance(value, Mapping) and "value" in value else value
        for key, value in given.items()
        if key not in _NO_SETTING and value is not None
    }
    shown = [f"{key}={told[key]:g}" if isinstance(told[key], float) else f"{key}={told[key]}" for key in sorted(told)]
    return f"{cls}({', '.join(shown)})" if shown else cls


def _activation(config: Config) -> dict[str, Any]:
    return {"activation": activation_name(config["activation"])} if "activation" in config else {}


def _dense(config: Config, sizes: Sizes) -> dict[str, Any]:
    return _activation(config)


def _padding(config: Config, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> Any:
    """Explicit pairs wherever they do not depend on the input's size."""
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    match config.get("padding", "valid"):
        case "same" if all(s == 1 for s in strides):
            return tuple((r // 2, r - r // 2) for r in reach)
        case "same":
            return "same"
        case "causal":
            return tuple((r, 0) for r in reach)
        case _:
            return tuple((0, 0) for _ in reach)


def _windowed(config: Config, kernel: tuple[int, ...]) -> dict[str, Any]:
    if "strides" not in config:
        return {}
    rank = len(kernel)
    strides = _per_axis(config["strides"], rank)
    dilation = _per_axis(config.get("dilation_rate", 1), rank)
    return {
        "strides": strides,
        "dilation": dilation,
        "padding": _padding(config, kernel, strides, dilation),
        "padding_mode": "zeros",
    }


def _conv(config: Config, sizes: Sizes) -> dict[str, Any]:
    window = _windowed(config, _kernel_size(sizes))
    return {**window, "groups": config.get("groups", 1), **_activation(config)} if window else {}


def _depthwise(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_windowed(config, _kernel_size(sizes)), "groups": sizes["group"], **_activation(config)}


def _separable_depthwise(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_windowed(config, _kernel_size(sizes)), "groups": sizes["group"]}


def _separable_pointwise(config: Config, sizes: Sizes) -> dict[str, Any]:
    rank = len(_kernel_size(sizes))
    ones = (1,) * rank
    return {
        "strides": ones,
        "dilation": ones,
        "padding": ((0, 0),) * rank,
        "padding_mode": "zeros",
        "groups": 1,
        **_activation(config),
    }


def _conv_transpose(config: Config, sizes: Sizes) -> dict[str, Any]:
    """What Keras crops off the full output, (n - 1) * stride + reach + 1 per axis, and what it adds behind it."""
    if "strides" not in config:
        return {}
    kernel = _kernel_size(sizes)
    rank = len(kernel)
    strides = _per_axis(config["strides"], rank)
    dilation = _per_axis(config.get("dilation_rate", 1), rank)
    extra = config.get("output_padding")
    extras: tuple[int | None, ...] = (None,) * rank if extra is None else _per_axis(extra, rank)
    same = config.get("padding", "valid") == "same"
    crops, added = [], []
    for k, s, d, op in zip(kernel, strides, dilation, extras, strict=True):
        width = d * (k - 1) + 1
        unasked = width - s if same else -max(s - width, 0)
        total = unasked if op is None else (2 * (width // 2) if same else 0) - op
        crops.append((max(total, 0) // 2, max(total, 0) - max(total, 0) // 2))
        added.append(max(-total, 0))
    return {
        "strides": strides,
        "dilation": dilation,
        "padding": tuple(crops),
        "output_padding": tuple(added),
        "groups": 1,
        **_activation(config),
    }


def _batch_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_norm(config, sizes), "decay": config.get("momentum")}


def _layer_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    axis = config.get("axis")
    count = None if axis is None else (len(axis) if isinstance(axis, Sequence) else 1)
    return {**_norm(config, sizes), "normalized_axes": count}


def _group_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_norm(config, sizes), "groups": config.get("groups")}


def _norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("epsilon"), "axis": from_last(config.get("axis"), config.get(INPUT_RANK))}


def _embedding(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"mask_zero": bool(config["mask_zero"])} if "mask_zero" in config else {}


def _recurrent_attributes(config: Config, sizes: Sizes, gated: bool) -> dict[str, Any]:
    if "units" not in config:
        return {"units": sizes.get("unit")}
    found: dict[str, Any] = {
        "units": sizes.get("unit"),
        **_activation(config),
        "go_backwards": bool(config.get("go_backwards", False)),
        "merge_mode": config.get("merge_mode"),
    }
    if gated:
        found["recurrent_activation"] = activation_name(config.get("recurrent_activation", "sigmoid"))
    return found


def _simple_rnn(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_recurrent_attributes(config, sizes, False), "bias_convention": "one"}


def _lstm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_recurrent_attributes(config, sizes, True), "bias_convention": "one"}


def _gru_after(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_recurrent_attributes(config, sizes, True), "bias_convention": "two", "reset_after": True}


def _gru_before(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_recurrent_attributes(config, sizes, True), "bias_convention": "one", "reset_after": False}


def _gru_without_bias(config: Config, sizes: Sizes) -> dict[str, Any]:
    after = config.get("reset_after")
    return {
        **_recurrent_attributes(config, sizes, True),
        "bias_convention": "none",
        "reset_after": after if isinstance(after, bool) else None,
    }


def _square_state(sizes: Sizes) -> bool:
    return sizes.get("hidden") == sizes.get("unit")


def _recurrent(cls: str, kind: str, gates: str) -> tuple[Form, ...]:
    block = f"(gate:{gates} unit)" if gates else "unit"
    canonical = {"ifgo": "gate:ifgo unit", "zrn": "gate:rzn unit", "": "unit"}[gates]
    one = (block, canonical, "one_bias")
    biases: dict[str, tuple[tuple[tuple[str, str, str] | None, Any], ...]] = {
        "simple_rnn": ((one, _simple_rnn),),
        "lstm": ((one, _lstm),),
        "gru": ((("side:ir " + block, "", ""), _gru_after), (one, _gru_before), (None, _gru_without_bias)),
    }
    forms = []
    for prefix in ("", _BIDIRECTIONAL):
        for bias, attributes in biases[kind]:
            rows = [
                Row("input_kernel", f"{prefix}kernel", f"in {block}"),
                Row("recurrent_kernel", f"{prefix}recurrent_kernel", f"hidden {block}"),
            ]
            if bias is not None:
                rows.append(Row("bias", f"{prefix}bias", bias[0], bias[1], bias[2], required=kind == "gru"))
            forms.append(Form((cls,), (layer(kind, *rows, attributes=attributes, check=_square_state),)))
    return tuple(forms)


def _attention(config: Config, sizes: Sizes) -> dict[str, Any]:
    axes, rank = config.get("attention_axes"), config.get(INPUT_RANK)
    if axes is None and rank is not None:
        axes = tuple(range(1, rank - 1))  # all but the batch and the features
    return {"heads": sizes["head"], "kv_heads": sizes["kv_head"], "attention_axes": from_last(axes, rank)}


_ATTENTION = (
    Row("query_kernel", "query/kernel", "in head dim", "(head dim) in"),
    Row("query_bias", "query/bias", "head dim", "(head dim)"),
    Row("key_kernel", "key/kernel", "in_key kv_head dim", "(kv_head dim) in_key"),
    Row("key_bias", "key/bias", "kv_head dim", "(kv_head dim)"),
    Row("value_kernel", "value/kernel", "in_value kv_head value_dim", "(kv_head value_dim) in_value"),
    Row("value_bias", "value/bias", "kv_head value_dim", "(kv_head value_dim)"),
    Row("output_kernel", "attention_output/kernel", "head value_dim out", "out (head value_dim)"),
    Row("output_bias", "attention_output/bias", "out"),
)


def _full_depth(sizes: Sizes) -> bool:
    return sizes.get("channel", sizes["group"] * sizes["mult"]) == sizes["group"] * sizes["mult"]


def _separable_parts() -> tuple[Part, ...]:
    depthwise = Row("kernel", "depthwise_kernel", "... group mult", "(group mult) 1 ...")
    return (
        layer("depthwise", depthwise, attributes=_separable_depthwise, suffix="depthwise"),
        layer(
            "conv",
            Row("kernel", "pointwise_kernel", "... in out"),
            Row("bias", "bias", "out"),
            attributes=_separable_pointwise,
            suffix="pointwise",
        ),
    )


def _of_rank(rank: int) -> Callable[[Config], bool]:
    """True for layers whose slope has this rank, where the config tells it."""
    return lambda config: bool(config.get("alpha_rank", rank) == rank)


def _slopes() -> tuple[Form, ...]:
    shared = ("feature", "1 feature", "1 1 feature", "1 1 1 feature")
    own = {"w feature": "feature w", "h w feature": "feature h w", "d h w feature": "feature d h w"}
    axes = {**dict.fromkeys(shared, "feature"), **own}
    return tuple(
        Form(
            ("PReLU",),
            (layer("prelu", Row("slope", "alpha", native, canonical)),),
            applies=_of_rank(len(native.split())),
        )
        for native, canonical in axes.items()
    )


def _layer_norms() -> tuple[Form, ...]:
    """One or two axes are the last ones of a sequence; three or more those of an image, its channels last."""
    axes = {"feature": "feature", "y x": "y x", "h w c": "c h w", "d h w c": "c d h w"}
    return tuple(
        Form(
            ("LayerNormalization",),
            (
                layer(
                    "layer_norm",
                    Row("scale", "gamma", native, canonical),
                    Row("bias", "beta", native, canonical),
                    attributes=_layer_norm,
                ),
            ),
        )
        for native, canonical in axes.items()
    )


def einsum_forms(cls: str, config: Config) -> tuple[Form, ...]:
    """The form of an EinsumDense from its equation: a dense layer where it is one, else its own kind.

    >>> part = einsum_forms("EinsumDense", {"equation": "abc,cde->abde", "bias_axes": "de"})[0].parts[0]
    >>> part.kind, part.rows[0].native, part.rows[0].canonical
    ('dense', 'c d e', '(d e) (c)')
    """
    equation = str(config.get("equation", "")).replace(" ", "")
    operands, _, result = equation.replace("...", "").partition("->")
    given, _, kernel = operands.partition(",")
    bias = str(config.get("bias_axes") or "")
    if cls != "EinsumDense" or not kernel.isalpha() or len(set(kernel)) != len(kernel):
        return ()
    made = [c for c in result if c in kernel and c not in given]
    summed = [c for c in given if c in kernel and c not in result]
    rest = [c for c in kernel if c not in made and c not in summed]
    native = " ".join(kernel)
    plain = (
        not rest
        and given.endswith("".join(summed))
        and result.endswith("".join(made))
        and given[: len(given) - len(summed)] == result[: len(result) - len(made)]
        and (not bias or list(bias) == made)
    )
    if plain:
        rows = [Row("kernel", "kernel", native, f"({' '.join(made)}) ({' '.join(summed)})".replace("()", "1"))]
        if bias:
            rows.append(Row("bias", "bias", " ".join(made), f"({' '.join(made)})"))
        return (Form(("EinsumDense",), (layer("dense", *rows, attributes=_dense),)),)
    order = [*rest, *made, *summed]
    rows = [Row("kernel", "kernel", native, " ".join(order))]
    if bias:
        rows.append(Row("bias", "bias", raw=True))

    def attributes(config: Config, sizes: Sizes) -> dict[str, Any]:
        return {"equation": equation, **_activation(config)}

    return (Form(("EinsumDense",), (layer("einsum_dense", *rows, attributes=attributes),)),)


_NORM = (Row("scale", "gamma", "feature"), Row("bias", "beta", "feature"))
_STATISTICS = (
    Row("mean", "moving_mean", "feature", required=True),
    Row("variance", "moving_variance", "feature", required=True),
)

FORMS = (
    Form(
        ("Dense",), (layer("dense", Row("kernel", "kernel", "in out"), Row("bias", "bias", "out"), attributes=_dense),)
    ),
    Form(
        ("Conv1D", "Conv2D", "Conv3D"),
        (
            layer(
                "conv",
                Row("kernel", "kernel", "... in out"),
                Row("bias", "bias", "out"),
                attributes=_conv,
                check=lambda sizes: "x0" in sizes,
            ),
        ),
    ),
    Form(
        ("DepthwiseConv1D", "DepthwiseConv2D"),
        (
            layer(
                "depthwise",
                Row("kernel", "kernel", "... group mult", "(group mult) 1 ..."),
                Row("bias", "bias", "channel", "channel"),
                attributes=_depthwise,
                check=lambda sizes: "x0" in sizes and _full_depth(sizes),
            ),
        ),
    ),
    Form(("SeparableConv1D", "SeparableConv2D"), _separable_parts()),
    Form(
        ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
        (
            layer(
                "conv_transpose",
                Row("kernel", "kernel", "... out in"),
                Row("bias", "bias", "channel"),
                attributes=_conv_transpose,
                check=lambda sizes: "x0" in sizes and sizes.get("channel", sizes["out"]) == sizes["out"],
            ),
        ),
    ),
    Form(("Embedding",), (layer("embedding", Row("embedding", "embeddings", "token feature"), attributes=_embedding),)),
    Form(
        ("BatchNormalization", "SyncBatchNormalization"),
        (layer("batch_norm", *_NORM, *_STATISTICS, attributes=_batch_norm),),
    ),
    *_layer_norms(),
    Form(("GroupNormalization",), (layer("group_norm", *_NORM, attributes=_group_norm),)),
    Form(("RMSNormalization",), (layer("rms_norm", Row("scale", "scale", "..."), attributes=_norm),)),
    *_slopes(),
    *_recurrent("SimpleRNN", "simple_rnn", ""),
    *_recurrent("LSTM", "lstm", "ifgo"),
    *_recurrent("GRU", "gru", "zrn"),
    Form(("MultiHeadAttention", "GroupedQueryAttention"), (layer("attention", *_ATTENTION, attributes=_attention),)),
)

_UNNAMED = (
    # Where the class is not known, the kernel of an EinsumDense may be stored the other way round.
    Form(
        ("EinsumDense",),
        (layer("einsum_dense", Row("kernel", "kernel", "out in", "out in"), Row("bias", "bias", "out", "out")),),
        applies=lambda config: False,
    ),
)


def _deciding(config: Config, shapes: Shapes) -> dict[str, Any]:
    found = {name: str(config[name]) for name in ("equation", "bias_axes") if config.get(name)}
    return {**found, "alpha_rank": len(shapes["alpha"])} if "alpha" in shapes else found


KERAS = Convention(
    framework="keras",
    forms=(*FORMS, *_UNNAMED),
    flatten="position channel",
    build=einsum_forms,
    deciding=_deciding,
    auto_names={snake_case(cls): cls for form in (*FORMS, *_UNNAMED) for cls in form.classes},
)
