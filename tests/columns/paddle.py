"""PaddlePaddle's models of the zoo: torch's rows with Paddle's classes and arguments.

>>> from tests.zoo import cases
>>> [(row.cls, row.args) for row in column(cases()["dense_no_bias"]).layers]
[('Linear', {'in_features': 3, 'out_features': 5, 'bias_attr': False})]
>>> column(cases()["rms_norm"])
'paddle.nn has no RMSNorm layer, only a function'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.zoo import RECURRENT, Case, Layer, Model

FORMATS = ("pdparams",)
Arguments = dict[str, Any]

ABSENT = {
    "attention_bias_kv": "MultiHeadAttention has no learned extra key and value",
    "attention_value_dim": "MultiHeadAttention's values have the size of its keys",
    "gru_reset_before": "GRU applies the reset gate after the recurrent product",
    "instance_norm2d_statistics": "InstanceNorm2D keeps no statistics",
    "prelu_unshared": "PReLU has one slope per channel, or one for all",
    "rms_norm": "paddle.nn has no RMSNorm layer, only a function",
    **{
        f"{kind}_no_bias": "without biases, the kernel of Paddle 3.3 ends the process"
        for kind in ("rnn", "lstm", "gru")
    },
}
BLIND = dict.fromkeys(("attention", "attention_cross"), ("layer.k_proj.bias",))
"""Tensors that no forward pass can see: a bias on the keys shifts every score of a query alike."""

CLASSES = {
    "ConstantPad1d": "Pad1D",
    "ZeroPad2d": "ZeroPad2D",
    "MaxPool2d": "MaxPool2D",
    "AdaptiveAvgPool2d": "AdaptiveAvgPool2D",
    "RNN": "SimpleRNN",
    "RNNCell": "SimpleRNNCell",
    "MultiheadAttention": "MultiHeadAttention",
    **{f"{kind}{rank}d": f"{kind}{rank}D" for kind in ("Conv", "BatchNorm", "InstanceNorm") for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": f"Conv{rank}DTranspose" for rank in (1, 2, 3)},
}
"""Classes that are called otherwise; all others have torch's name."""


def renamed(**names: str) -> Callable[[Arguments], Arguments]:
    return lambda args: {names.get(name, name): value for name, value in args.items()}


def recurrent(args: Arguments) -> Arguments:
    """Paddle's sequences have the batch first unless they are `time_major`."""
    renames = {"nonlinearity": "activation"}
    kept = {
        renames.get(name, name): value for name, value in args.items() if name not in ("batch_first", "bidirectional")
    }
    return {**kept, "direction": "bidirect"} if args.get("bidirectional") else kept


def unbatched(args: Arguments) -> Arguments:
    return {name: value for name, value in args.items() if name not in ("batch_first", "affine")}


ARGUMENTS: dict[str, Callable[[Arguments], Arguments]] = {
    "Flatten": renamed(start_dim="start_axis", end_dim="stop_axis"),
    "Unflatten": renamed(dim="axis", unflattened_size="shape"),
    "LayerNorm": renamed(eps="epsilon"),
    "GroupNorm": renamed(eps="epsilon"),
    **{f"BatchNorm{rank}d": renamed(eps="epsilon") for rank in (1, 2, 3)},
    **{f"InstanceNorm{rank}d": lambda args: unbatched(renamed(eps="epsilon")(args)) for rank in (1, 2, 3)},
    **dict.fromkeys(("RNN", "LSTM", "GRU"), recurrent),
    "MultiheadAttention": unbatched,
}


def without_bias(cls: str, args: Arguments) -> Arguments:
    """`bias=False` and `affine=False` are attributes of the parameters."""
    rest = {name: value for name, value in args.items() if name not in ("bias", "affine")}
    if args.get("bias") is False:
        names = ("bias_ih_attr", "bias_hh_attr") if cls in RECURRENT else ("bias_attr",)
        rest |= dict.fromkeys(names, False)
    if args.get("affine") is False:
        rest |= {"weight_attr": False, "bias_attr": False}
    return rest


def wrapped(row: Layer) -> tuple[str, dict[str, Any]] | None:
    """Paddle has one style of each; axis 0 of torch's Linear weight is axis 1 of Paddle's."""
    if row.wrap is None:
        return None
    style, options = row.wrap[0].removeprefix("legacy_"), row.wrap[1]
    return style, {"dim": 1} if row.cls == "Linear" else options


def translated(row: Layer) -> Layer:
    args = ARGUMENTS.get(row.cls, dict)(without_bias(row.cls, row.args))
    inside = tuple(translated(one) for one in row.inside)
    return replace(row, cls=CLASSES.get(row.cls, row.cls), args=args, inside=inside, wrap=wrapped(row))


HALVES = {"batch_norm2d_center_only": {"weight_attr": False}, "batch_norm2d_scale_only": {"bias_attr": False}}
"""Paddle's batch norm can have one without the other, as Keras's can."""


def column(case: Case) -> Model | str:
    if case.name in ABSENT:
        return ABSENT[case.name]
    torch = case.models["torch"]
    layers = tuple(translated(row) for row in torch.layers)
    if case.name in HALVES:
        layers = tuple(replace(row, args=row.args | HALVES[case.name]) for row in layers)
    return replace(torch, layers=layers)
