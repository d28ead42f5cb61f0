"""How Equinox stores layers. Names are those of a module's fields, `/` between levels (`query_proj/weight`).

Inputs have no batch axis and their channels first. A kernel lies as torch has it, but that of a transposed convolution, which
is (out, in, ...) and turned around; a bias of a convolution has an axis of one per spatial axis. What stands in the state of a
model counts as a part of the layer whose index it is under: `batch_state_index/0` is the mean of a BatchNorm.

Some tensors are shown otherwise than they are stored (see equinox_model.py): the biases of a GRUCell one by one, and the
kernel of a ConvTranspose with the axis of its groups in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neutral.conventions.forms import Attributes, Config, Convention, Form, Row, Sizes, layer

CONV = ("Conv", "Conv1d", "Conv2d", "Conv3d")
CONV_TRANSPOSE = ("ConvTranspose", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
WRAPPERS = ("WeightNorm", "SpectralNorm")
"""Classes that normalise a tensor of the layer inside them."""

SPACE = ("x0", "x0 x1", "x0 x1 x2")


def _dense(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"activation": "linear"} if config else {}


def _reach(config: Config) -> list[int]:
    return [d * (k - 1) for k, d in zip(config["kernel_size"], config["dilation"], strict=True)]


def _conv(config: Config, sizes: Sizes) -> dict[str, Any]:
    if "stride" not in config:
        return {}
    return {
        "strides": tuple(config["stride"]),
        "padding": _padding(config),
        "padding_mode": str(config["padding_mode"]).lower(),
        "dilation": tuple(config["dilation"]),
        "groups": config["groups"],
        "activation": "linear",
    }


def _padding(config: Config) -> Any:
    """Explicit pairs wherever they do not depend on the input's size."""
    padding, reach = config["padding"], _reach(config)
    if not isinstance(padding, str):
        return tuple((int(before), int(after)) for before, after in padding)
    if padding == "VALID":
        return tuple((0, 0) for _ in reach)
    if all(stride == 1 for stride in config["stride"]):
        halves = [(r // 2, r - r // 2) for r in reach]
        return tuple(halves if padding == "SAME" else [(after, before) for before, after in halves])
    return padding.lower()


def _conv_transpose(config: Config, sizes: Sizes) -> dict[str, Any]:
    """What is cropped off the full output, and what is added behind it."""
    if "stride" not in config or config["padding_mode"] != "ZEROS":
        return {}
    crops, added = [], []
    for i, (reach, stride, extra) in enumerate(
        zip(_reach(config), config["stride"], config["output_padding"], strict=True)
    ):
        padding = config["padding"]
        if not isinstance(padding, str):
            before, after = padding[i]
        elif padding == "VALID":
            before = after = 0
        else:
            total = reach - stride + extra + 1
            before = (max(total, 0) + (padding == "SAME_LOWER")) // 2
            after, extra = max(total, 0) - before, max(-total, 0)
        crops.append((int(before), max(int(after - extra), 0)))
        added.append(max(int(extra - after), 0))
    return {
        "strides": tuple(config["stride"]),
        "padding": tuple(crops),
        "output_padding": tuple(added),
        "dilation": tuple(config["dilation"]),
        "groups": config["groups"],
        "activation": "linear",
    }


def _norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("eps")}


def _batch_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("eps"), "decay": config.get("momentum")}


def _layer_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    shape = config.get("shape")
    return {"eps": config.get("eps"), "normalized_axes": None if shape is None else len(shape)}


def _group_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("eps"), "groups": config.get("groups")}


def _lstm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "units": sizes.get("unit"),
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "bias_convention": "one",
    }


def _gru(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"units": sizes.get("unit"), "activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True}


def _attention(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"heads": config.get("num_heads"), "kv_heads": config.get("num_heads")}


def _square_state(sizes: Sizes) -> bool:
    return sizes["hidden"] == sizes["unit"]


def _kernel_forms() -> tuple[Form, ...]:
    """Each layer with a kernel: plain, and as the layer inside a WeightNorm or a SpectralNorm."""
    kernels: list[tuple[str, tuple[str, ...], str, str, Row, Attributes]] = [
        ("dense", ("Linear",), "out in", "out in", Row("bias", "bias", "out"), _dense)
    ]
    for space in SPACE:
        ones = " ".join("1" for _ in space.split())
        turned = " ".join(f"~{axis}" for axis in space.split())
        bias, channel = Row("bias", "bias", f"out {ones}", "out"), Row("bias", "bias", f"channel {ones}", "channel")
        kernels.append(("conv", CONV, f"out in {space}", f"out in {space}", bias, _conv))
        native, canonical = f"group out in {turned}", f"(group in) out {space}"
        kernels.append(("conv_transpose", CONV_TRANSPOSE, native, canonical, channel, _conv_transpose))
    forms = []
    for kind, classes, native, canonical, bias, attributes in kernels:
        part = layer(kind, Row("kernel", "weight", native, canonical), bias, attributes=attributes)
        forms.append(Form(classes, (part,), guessable=kind != "conv_transpose"))
        if kind != "conv_transpose":
            forms += _wrapped(kind, classes, native, bias, attributes)
    return tuple(forms)


def _wrapped(kind: str, classes: tuple[str, ...], axes: str, bias: Row, attributes: Attributes) -> list[Form]:
    inner = Row(bias.role, f"layer/{bias.name}", bias.native, bias.canonical)
    ways: dict[str, tuple[Row, ...]] = {
        "WeightNorm": (
            Row("kernel_magnitude", "g", raw=True, required=True),
            Row("kernel_direction", "layer/weight", axes, axes, required=True),
        ),
        "SpectralNorm": (
            Row("kernel_raw", "layer/weight", axes, axes, required=True),
            Row("kernel_u", "uv_index/0", raw=True, required=True),
            Row("kernel_v", "uv_index/1", raw=True, required=True),
        ),
    }
    return [
        Form(
            (wrapper,),
            (layer(kind, *rows, inner, attributes=_normalised(attributes, wrapper)),),
            guessable=False,
            applies=_around(classes),
        )
        for wrapper, rows in ways.items()
    ]


def _normalised(attributes: Attributes, wrapper: str) -> Attributes:
    name = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}[wrapper]
    return lambda config, sizes: {**attributes(config, sizes), "reparametrization": name}


def _around(classes: Sequence[str]) -> Callable[[Config], bool]:
    return lambda config: config.get("inner") in classes and config.get("weight_name") == "weight"


def _statistics(index: str) -> Form:
    return Form(
        ("BatchNorm",),
        (
            layer(
                "batch_norm",
                Row("scale", "weight", "feature"),
                Row("bias", "bias", "feature"),
                Row("mean", f"{index}/0", "feature", required=True),
                Row("variance", f"{index}/1", "feature", required=True),
                attributes=_batch_norm,
            ),
        ),
    )


def _affine(kind: str, cls: str, axes: str, attributes: Attributes) -> Form:
    """A norm over all axes of its input; one axis is the feature, several are what the language calls space."""
    same = axes if axes == "feature" else ""
    rows = (Row("scale", "weight", axes, same, required=True), Row("bias", "bias", axes, same))
    return Form((cls,), (layer(kind, *rows, attributes=attributes),))


BIASES = ("reset", "update", "new")
"""The blocks of a GRUCell's `bias`, each of which counts as a tensor."""

_GRU_BIAS = "{part:" + "|".join([*(f"bias/{name}" for name in BIASES), "bias_n"]) + "}"

_CELLS = (
    Form(
        ("LSTMCell",),
        (
            layer(
                "lstm",
                Row("input_kernel", "weight_ih", "(gate:ifgo unit) in"),
                Row("recurrent_kernel", "weight_hh", "(gate:ifgo unit) hidden"),
                Row("bias", "bias", "(gate:ifgo unit)", "gate:ifgo unit", "one_bias"),
                attributes=_lstm,
                check=_square_state,
            ),
        ),
    ),
    Form(
        ("GRUCell",),
        (
            layer(
                "gru",
                Row("input_kernel", "weight_ih", "(gate:rzn unit) in"),
                Row("recurrent_kernel", "weight_hh", "(gate:rzn unit) hidden"),
                Row("bias", _GRU_BIAS, "unit", "part unit", "new_bias"),
                attributes=_gru,
                check=_square_state,
            ),
        ),
    ),
)

_ATTENTION = (
    Row("query_kernel", "query_proj/weight", "query in"),
    Row("query_bias", "query_proj/bias", "query"),
    Row("key_kernel", "key_proj/weight", "key in_key"),
    Row("key_bias", "key_proj/bias", "key"),
    Row("value_kernel", "value_proj/weight", "value in_value"),
    Row("value_bias", "value_proj/bias", "value"),
    Row("output_kernel", "output_proj/weight", "out attended"),
    Row("output_bias", "output_proj/bias", "out"),
)

_PRELU = tuple(
    # A slope of one axis would go along the last axis of an input, whichever that is, and is known for none.
    Form(("PReLU",), (layer("prelu", Row("slope", "negative_slope", native, canonical)),))
    for native, canonical in (("", "1"), ("1", "1"), ("feature 1", "feature"), ("feature 1 1", "feature"), ("feature 1 1 1", "feature"))
)  # fmt: skip

EQUINOX = Convention(
    framework="equinox",
    flatten="channel position",
    forms=(
        *_kernel_forms(),
        Form(("Embedding",), (layer("embedding", Row("embedding", "weight", "token feature")),)),
        _statistics("batch_state_index"),
        _statistics("ema_state_index"),
        _affine("layer_norm", "LayerNorm", "feature", _layer_norm),
        _affine("layer_norm", "LayerNorm", "...", _layer_norm),
        Form(
            ("GroupNorm",),
            (
                layer(
                    "group_norm",
                    Row("scale", "weight", "feature"),
                    Row("bias", "bias", "feature"),
                    attributes=_group_norm,
                ),
            ),
        ),
        Form(
            ("RMSNorm",),
            (layer("rms_norm", Row("scale", "weight", "..."), Row("bias", "bias", "..."), attributes=_norm),),
        ),
        *_PRELU,
        *_CELLS,
        Form(("MultiheadAttention",), (layer("attention", *_ATTENTION, attributes=_attention),)),
    ),
)

KNOWN: Mapping[str, bool] = {
    **{cls: False for form in EQUINOX.forms for cls in form.classes},
    **dict.fromkeys(("MultiheadAttention", *WRAPPERS), True),
}
"""Equinox's classes that have a form, and whether the modules inside one belong to it."""
