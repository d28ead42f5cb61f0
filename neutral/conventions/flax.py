"""How Flax stores layers, Linen and NNX alike. Names are those of the parameter tree below a layer, `/` between levels.

Parameters and running statistics of a layer count as one: a reader joins the collections `params` and `batch_stats`. The
cell of an `nn.RNN` is named `cell/…` in it, those of a `Bidirectional` `forward_rnn/cell/…` and `backward_rnn/cell/…`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from neutral.conventions.flax_settings import (
    attention,
    batch_norm,
    conv,
    conv_transpose,
    dense,
    einsum_forms,
    group_norm,
    gru,
    layer_norm,
    lstm,
    norm,
    simple_rnn,
)
from neutral.conventions.forms import Attributes, Config, Convention, Form, Row, Shapes, Sizes, layer

PARAMS = "params"
STATISTICS = "batch_stats"
SEPARATORS = ("/", ",", ".")
"""What may stand between the keys of a flattened tree, the surest first."""


def separator_of(names: Iterable[str]) -> str:
    """What stands between the keys of flattened names.

    >>> separator_of(["params/fc.1/kernel"]), separator_of(["params,fc,kernel"]), separator_of(["fc.kernel", "scale"])
    ('/', ',', '.')
    """
    known = list(names)
    return next((s for s in SEPARATORS if any(s in name for name in known)), ".")


def full_name(path: Sequence[str]) -> str:
    """A leaf's full name. A slash within a key is written ~1, a tilde ~0, and what stands before the number of a slice ~2.

    >>> full_name(("params", "WeightNorm_0", "Dense_0/kernel/scale"))
    'params/WeightNorm_0/Dense_0~1kernel~1scale'
    """
    return "/".join(key.replace("~", "~0").replace("/", "~1").replace("#", "~2") for key in path)


LSTM_GATES = ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")
LSTM_GATES_NNX = ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")
GRU_GATES = ("ir", "iz", "in", "hr", "hz", "hn")
SIMPLE_PARTS = ("i", "h")
FUSED_PARTS = ("dense_i", "dense_h")

CELLS = (LSTM_GATES, LSTM_GATES_NNX, GRU_GATES, SIMPLE_PARTS, FUSED_PARTS)
"""The names below a recurrent cell, by which it is known."""

ATTENTION_PARTS = ("query", "key", "value", "out")

_DIRECTIONS = "{direction:forward_rnn/cell/|backward_rnn/cell/}"


_SPACES = ("x0", "x0 x1", "x0 x1 x2")
"""Spatial axes of a kernel."""


# Layers with a kernel, and the same with a WeightNorm around


def _normed(space: int, native: str, canonical: str) -> tuple[tuple[Row, ...], ...]:
    """The rows of a kernel under WeightNorm, its scale one per output (as is usual), per input, or one in all."""
    ones = ["1"] * (2 + space)
    first, second, *_ = canonical.split()
    scales = [("", "")]
    for i, axis in enumerate((first, second)):
        scales.append((axis, " ".join([*ones[:i], axis, *ones[i + 1 :]])))
    return tuple(
        (
            Row("kernel_magnitude", "WeightNorm/scale", one, many, required=True),
            Row("kernel_direction", "kernel", native, canonical, required=True),
        )
        for one, many in scales
    )


def _kernel_forms(
    kind: str,
    classes: tuple[str, ...],
    layouts: tuple[tuple[str, str], ...],
    bias: Row,
    attributes: Attributes,
    check: Callable[[Sizes], bool],
    applies: Callable[[Config], bool] = lambda config: True,
    says: str = "",
) -> tuple[Form, ...]:
    """A layer by the layouts of its kernel (native and canonical axes): plain, then under WeightNorm."""
    forms = []
    for native, canonical in layouts:
        rows = (Row("kernel", "kernel", native, canonical), bias)
        forms.append(
            Form(classes, (layer(kind, *rows, attributes=attributes, check=check),), applies=applies, says=says)
        )
    for native, canonical in layouts:
        for pair in _normed(len(canonical.split()) - 2, native, canonical):
            axis = -1 if pair[0].native == "out" else -2 if pair[0].native == "in" else None
            told = f"feature_axes={json.dumps(axis)}"
            forms.append(
                Form(
                    classes,
                    (layer(kind, *pair, bias, attributes=_reparametrized(attributes), check=check),),
                    applies=_both(applies, _told("feature_axes", axis)),
                    says=f"{says}, {told}" if says else told,
                )
            )
    return tuple(forms)


def _reparametrized(attributes: Attributes) -> Attributes:
    return lambda config, sizes: {**attributes(config, sizes), "reparametrization": "weight_norm"}


def _told(name: str, value: object) -> Callable[[Config], bool]:
    """True for layers of which a setting is known to be so; what nobody says applies to none."""
    return lambda config: name in config and config[name] == value


def _both(one: Callable[[Config], bool], other: Callable[[Config], bool]) -> Callable[[Config], bool]:
    return lambda config: one(config) and other(config)


_BIAS = Row("bias", "bias", "out")
_DENSE = _kernel_forms(
    "dense",
    ("Dense", "Linear", "DenseGeneral", "LinearGeneral"),
    (("in out", "out in"),),
    _BIAS,
    dense,
    lambda sizes: True,
    applies=lambda config: config.get("kernel_rank", 2) == 2,
)
_CONV = _kernel_forms(
    "conv",
    ("Conv",),
    tuple((f"{space} in out", f"out in {space}") for space in _SPACES),
    _BIAS,
    conv,
    lambda sizes: True,
    applies=lambda config: config.get("input_dilation") in (None, 1) and not config.get("masked"),
)


def _transposed(kernel: bool) -> tuple[Form, ...]:
    """By `transpose_kernel`: (k out in); without it, as is usual, (k in out) and turned around."""
    layouts = []
    for space in _SPACES:
        turned = " ".join(f"~{axis}" for axis in space.split())
        layouts.append((f"{space} out in" if kernel else f"{turned} in out", f"in out {space}"))
    return _kernel_forms(
        "conv_transpose",
        ("ConvTranspose",),
        tuple(layouts),
        Row("bias", "bias", "channel"),
        conv_transpose,
        lambda sizes: sizes.get("channel", sizes["out"]) == sizes["out"],
        applies=_told("transpose_kernel", kernel),
        says=f"transpose_kernel={str(kernel).lower()}",
    )


def _general(taken: int, made: int) -> Form:
    """A DenseGeneral over several axes. Its bias tells how many it makes, if it has no batch axes in front of them."""
    ins, outs = (" ".join(f"{name}{i}" for i in range(n)) for name, n in (("in", taken), ("out", made)))

    def without_batch(sizes: Sizes) -> bool:
        return made == 1 or sizes["in0"] != sizes["out0"]

    part = layer(
        "dense",
        Row("kernel", "kernel", f"{ins} {outs}", f"({outs}) ({ins})"),
        Row("bias", "bias", outs, f"({outs})", required=True),
        attributes=dense,
        check=without_batch,
    )
    rank = taken + made
    return Form(
        ("DenseGeneral", "LinearGeneral"),
        (part,),
        applies=lambda config: "features" not in config and config.get("kernel_rank", rank) == rank,
        says=f"kernel_rank={rank}",
    )


_UNNAMED_EINSUMS = tuple(
    # A kernel whose class is not known may be that of an Einsum, whose equation alone tells its axes.
    Form(
        ("Einsum",),
        (layer("einsum_dense", Row("kernel", "kernel", axes, axes), Row("bias", "bias", raw=True)),),
        applies=lambda config: False,
        says="equation=EQUATION",
        vague=True,
    )
    for axes in ("a b", "a b c", "a b c d", "a b c d e")
)


# Norms


_AFFINE = (Row("scale", "scale", "feature"), Row("bias", "bias", "feature"))


def _layer_norms() -> tuple[Form, ...]:
    """One or two axes are the last ones of a sequence; three or more those of an image, its channels last."""
    axes = {"feature": "feature", "y x": "y x", "h w c": "c h w", "d h w c": "c d h w"}
    return tuple(
        Form(
            ("LayerNorm",),
            (
                layer(
                    "layer_norm",
                    Row("scale", "scale", native, canonical),
                    Row("bias", "bias", native, canonical),
                    attributes=layer_norm,
                ),
            ),
        )
        for native, canonical in axes.items()
    )


# Recurrent layers


def _square_state(sizes: Sizes) -> bool:
    return sizes["hidden"] == sizes["unit"]


def _gate(names: str) -> str:
    """The names of one tensor per gate as a brace."""
    return "{gate:" + names + "}"


def _cells(classes: tuple[str, ...], kind: str, attributes: Attributes, rows: Callable[[str], list[Row]]) -> list[Form]:
    """A cell by itself, in an RNN, and one per direction."""

    def applies(config: Config) -> bool:
        return not config.get("residual")

    return [
        Form(named, (layer(kind, *rows(prefix), attributes=attributes, check=_square_state),), applies=applies)
        for prefix, named in (("", classes), ("cell/", ("RNN",)), (_DIRECTIONS, ("Bidirectional",)))
    ]


def _lstm(forget: str) -> Callable[[str], list[Row]]:
    """One tensor per gate, of which those of the recurrent side have the bias."""
    return lambda prefix: [
        Row("input_kernel", prefix + _gate(f"ii|{forget}|ig|io") + "/kernel", "in unit"),
        Row("recurrent_kernel", prefix + _gate("hi|hf|hg|ho") + "/kernel", "hidden unit"),
        Row("bias", prefix + _gate("hi|hf|hg|ho") + "/bias", "unit", "gate:ifgo unit", "one_bias"),
    ]


def _lstm_fused(prefix: str) -> list[Row]:
    block = "(gate:ifgo unit)"
    return [
        Row("input_kernel", f"{prefix}dense_i/kernel", f"in {block}"),
        Row("recurrent_kernel", f"{prefix}dense_h/kernel", f"hidden {block}"),
        Row("bias", f"{prefix}dense_h/bias", block, "gate:ifgo unit", "one_bias"),
    ]


def _gru(prefix: str) -> list[Row]:
    """The recurrent biases of reset and update gate are left out, for they are only added to those of the input."""
    return [
        Row("input_kernel", prefix + _gate("ir|iz|in") + "/kernel", "in unit"),
        Row("recurrent_kernel", prefix + _gate("hr|hz|hn") + "/kernel", "hidden unit"),
        Row("bias", prefix + "{part:ir|iz|in|hn}/bias", "unit", "part unit", "new_bias"),
    ]


def _gru_fused(prefix: str) -> list[Row]:
    block = "(gate:rzn unit)"
    return [
        Row("input_kernel", f"{prefix}dense_i/kernel", f"in {block}"),
        Row("recurrent_kernel", f"{prefix}dense_h/kernel", f"hidden {block}"),
        Row("bias", f"{prefix}dense_i/bias", block, "gate:rzn unit", "input_bias"),
    ]


def _simple(of_input: str, of_state: str) -> Callable[[str], list[Row]]:
    return lambda prefix: [
        Row("input_kernel", f"{prefix}{of_input}/kernel", "in unit"),
        Row("recurrent_kernel", f"{prefix}{of_state}/kernel", "hidden unit"),
        Row("bias", f"{prefix}{of_input}/bias", "unit", "unit", "one_bias"),
    ]


_RECURRENT = (
    *_cells(("LSTMCell", "OptimizedLSTMCell"), "lstm", lstm, _lstm("if")),
    *_cells(("LSTMCell",), "lstm", lstm, _lstm("if_")),
    *_cells(("OptimizedLSTMCell",), "lstm", lstm, _lstm_fused),
    *_cells(("GRUCell",), "gru", gru, _gru),
    *_cells(("GRUCell",), "gru", gru, _gru_fused),
    *_cells(("SimpleCell",), "simple_rnn", simple_rnn, _simple("i", "h")),
    *_cells(("SimpleCell",), "simple_rnn", simple_rnn, _simple("dense_i", "dense_h")),
)


# Attention

_ATTENTION = (
    Row("query_kernel", "query/kernel", "in head dim", "(head dim) in"),
    Row("query_bias", "query/bias", "head dim", "(head dim)"),
    Row("key_kernel", "key/kernel", "in_key kv_head dim", "(kv_head dim) in_key"),
    Row("key_bias", "key/bias", "kv_head dim", "(kv_head dim)"),
    Row("value_kernel", "value/kernel", "in_value kv_head value_dim", "(kv_head value_dim) in_value"),
    Row("value_bias", "value/bias", "kv_head value_dim", "(kv_head value_dim)"),
    Row("output_kernel", "out/kernel", "head value_dim out", "out (head value_dim)"),
    Row("output_bias", "out/bias", "out"),
)


_DECIDING = ("transpose_kernel", "feature_axes", "equation", "features", "axis", "batch_axis")
"""Settings without which the tensors of a layer do not tell how they are stored."""


def _deciding(config: Config, shapes: Shapes) -> dict[str, Any]:
    return {
        name: config[name]
        for name in _DECIDING
        if name in config and (name != "feature_axes" or "WeightNorm/scale" in shapes) and "kernel" in shapes
    }


FORMS = (
    *_DENSE,
    *(_general(taken, made) for taken, made in product((1, 2), (1, 2)) if (taken, made) != (1, 1)),
    *_CONV,
    *_transposed(False),
    *_transposed(True),
    Form(("Embed",), (layer("embedding", Row("embedding", "embedding", "token feature")),)),
    Form(
        ("BatchNorm",),
        (
            layer(
                "batch_norm",
                *_AFFINE,
                Row("mean", "mean", "feature", required=True),
                Row("variance", "var", "feature", required=True),
                attributes=batch_norm,
            ),
        ),
    ),
    *_layer_norms(),
    Form(("GroupNorm",), (layer("group_norm", *_AFFINE, attributes=group_norm),)),
    Form(("InstanceNorm",), (layer("instance_norm", *_AFFINE, attributes=norm),)),
    Form(("RMSNorm",), (layer("rms_norm", Row("scale", "scale", "..."), attributes=norm),)),
    Form(("PReLU",), (layer("prelu", Row("slope", "negative_slope", "", "1")),)),
    *_RECURRENT,
    Form(
        ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"),
        (
            layer(
                "attention",
                *_ATTENTION,
                attributes=attention,
                check=lambda sizes: sizes["dim"] == sizes["value_dim"],
            ),
        ),
    ),
    *_UNNAMED_EINSUMS,
)


_LIFTED = ("", "Checkpoint", "Remat", "Jit")
"""What transformations that keep a layer's tensors as they are put in front of its class."""

FLAX = Convention(
    framework="flax",
    forms=FORMS,
    flatten="position channel",
    build=einsum_forms,
    deciding=_deciding,
    auto_names={f"{lifted}{cls}": cls for form in FORMS for cls in form.classes for lifted in _LIFTED},
)
