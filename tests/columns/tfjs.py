"""TensorFlow.js models of the zoo: Keras's rows with the functions and options of `tf.layers`.

>>> from tests.zoo import cases
>>> [(row.cls, row.args) for row in column(cases()["lstm"]).layers]
[('lstm', {'units': 5, 'returnSequences': True, 'recurrentActivation': 'sigmoid'})]
>>> column(cases()["conv2d_groups"])
'convolutions of TensorFlow.js have no groups'
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.zoo import Case, Layer, Model

FORMATS = ("layers", "layers_sharded")
BLIND: dict[str, tuple[str, ...]] = {}

FUNCTIONS = {
    "Add": "add",
    "BatchNormalization": "batchNormalization",
    "Bidirectional": "bidirectional",
    "Concatenate": "concatenate",
    "Conv1D": "conv1d",
    "Conv2D": "conv2d",
    "Conv2DTranspose": "conv2dTranspose",
    "Conv3D": "conv3d",
    "Conv3DTranspose": "conv3dTranspose",
    "Dense": "dense",
    "DepthwiseConv2D": "depthwiseConv2d",
    "Dropout": "dropout",
    "Embedding": "embedding",
    "Flatten": "flatten",
    "GRU": "gru",
    "GRUCell": "gruCell",
    "GlobalAveragePooling2D": "globalAveragePooling2d",
    "LSTM": "lstm",
    "LSTMCell": "lstmCell",
    "LayerNormalization": "layerNormalization",
    "MaxPooling2D": "maxPooling2d",
    "PReLU": "prelu",
    "Permute": "permute",
    "RNN": "rnn",
    "ReLU": "reLU",
    "Reshape": "reshape",
    "SeparableConv2D": "separableConv2d",
    "Sequential": "sequential",
    "SimpleRNN": "simpleRNN",
    "SimpleRNNCell": "simpleRNNCell",
    "TimeDistributed": "timeDistributed",
    "ZeroPadding2D": "zeroPadding2d",
}
"""The functions of `tf.layers` by Keras's classes; other classes do not exist in TensorFlow.js."""

ABSENT = {
    "conv1d_causal": "causal padding is not implemented in TensorFlow.js",
    "separable_conv2d": "a separable convolution of TensorFlow.js does not save its depth multiplier",
}

GATED = ("LSTM", "LSTMCell", "GRU", "GRUCell")


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)


def translated(row: Layer) -> Layer:
    """The gates of TensorFlow.js are hard sigmoids of Keras 2 unless told otherwise."""
    args = {camel(name): camel(value) if name == "data_format" else value for name, value in row.args.items()}
    if row.cls in GATED:
        args["recurrentActivation"] = "sigmoid"
    inside = tuple(translated(one) for one in row.inside)
    return replace(row, cls=FUNCTIONS.get(row.cls, row.cls), args=args, inside=inside)


def every(rows: tuple[Layer, ...]) -> Iterator[Layer]:
    for row in rows:
        yield row
        yield from every(row.inside)


def why_not(row: Layer, names: set[str]) -> str | None:
    """Why TensorFlow.js has no such layer; a row whose class is an earlier row's name calls that layer again."""
    reasons: list[tuple[bool, Any]] = [
        (row.cls not in FUNCTIONS and row.cls not in names, f"TensorFlow.js has no layer {row.cls}"),
        ("groups" in row.args, "convolutions of TensorFlow.js have no groups"),
        ("output_padding" in row.args, "transposed convolutions of TensorFlow.js have no output padding"),
        (row.cls.startswith("GRU") and row.args.get("reset_after", True), "the GRU of TensorFlow.js resets before the product"),
    ]  # fmt: skip
    return next((reason for holds, reason in reasons if holds), None)


def spelled_out(case: Case, reshape: Layer) -> Layer:
    """TensorFlow.js infers no size in a reshape while the batch is unknown."""
    features = case.models["torch"].layers[-1].args["in_features"]
    return replace(reshape, args={"targetShape": (features,)})


def column(case: Case) -> Model | str:
    """A class of one's own cannot be saved, so its layers stand in a Sequential."""
    if "keras" not in case.models:
        return f"not in Keras either: {case.absent['keras']}"
    if case.name in ABSENT:
        return ABSENT[case.name]
    keras = case.models["keras"]
    names = {row.name for row in keras.layers}
    for row in every(keras.layers):
        if reason := why_not(row, names):
            return reason
    builder = "sequential" if keras.builder == "subclassed" else keras.builder
    layers = tuple(translated(row) for row in keras.layers)
    if case.name == "conv2d_reshape_dense":
        layers = (layers[0], spelled_out(case, layers[1]), *layers[2:])
    return replace(keras, builder=builder, layers=layers)
