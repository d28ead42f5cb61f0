"""python make_tf2onnx.py FOLDER, in an environment that has one version of keras, tensorflow and tf2onnx.

Each model is exported by Keras itself (`model.export(format="onnx")`), some by tf2onnx from a function, too. The model's own
file stands beside them.
"""

from __future__ import annotations

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
import tf2onnx
from recording import folder, record, values

L = keras.layers
OPSET = 17


def sequential(name, shape, *layers, dtype="float32"):
    return keras.Sequential([keras.Input(shape, dtype=dtype, name="x"), *layers], name=name)


def mlp():
    return sequential(
        "mlp",
        (4,),
        L.Dense(7, activation="relu", name="fc1"),
        L.BatchNormalization(name="norm"),
        L.Dense(5, name="fc2"),
    )


def cnn():
    return sequential(
        "cnn",
        (9, 8, 2),
        L.Conv2D(3, (3, 2), strides=(1, 2), padding="same", name="conv1"),
        L.ReLU(name="relu"),
        L.BatchNormalization(name="norm"),
        L.MaxPooling2D(2, name="pool"),
        L.Conv2D(5, (2, 1), name="conv2"),
        L.Flatten(name="flatten"),
        L.Dense(6, name="fc"),
    )


def folded():
    """A norm right behind its convolution, which tf2onnx computes into it."""
    return sequential(
        "folded",
        (7, 6, 2),
        L.Conv2D(3, (3, 2), use_bias=False, name="conv"),
        L.BatchNormalization(name="norm"),
        L.GlobalAveragePooling2D(name="pool"),
        L.Dense(4, name="fc"),
    )


def separable():
    return sequential(
        "separable",
        (8, 7, 3),
        L.DepthwiseConv2D((3, 2), depth_multiplier=2, name="depthwise"),
        L.SeparableConv2D(5, (2, 3), padding="same", name="separable"),
        L.GlobalMaxPooling2D(name="pool"),
        L.Dense(4, name="fc"),
    )


def transposed():
    return sequential(
        "transposed",
        (5, 4, 3),
        L.Conv2DTranspose(2, (3, 2), strides=2, padding="same", name="up1"),
        L.ReLU(name="relu"),
        L.Conv2DTranspose(4, (2, 3), strides=2, name="up2"),
    )


def conv1d():
    return sequential(
        "conv1d",
        (9, 3),
        L.Conv1D(5, 3, padding="causal", activation="relu", name="conv1"),
        L.Conv1D(4, 2, strides=2, name="conv2"),
        L.Flatten(name="flatten"),
        L.Dense(2, name="fc"),
    )


def lstm():
    return sequential(
        "lstm",
        (5,),
        L.Embedding(11, 4, name="embedding"),
        L.LSTM(6, return_sequences=True, name="lstm1"),
        L.LSTM(3, name="lstm2"),
        L.Dense(2, name="fc"),
        dtype="int32",
    )


def gru():
    return sequential(
        "gru",
        (5, 4),
        L.GRU(6, return_sequences=True, name="gru1"),
        L.GRU(3, name="gru2"),
        L.Dense(2, name="fc"),
    )


def gru_before():
    return sequential("gru_before", (5, 4), L.GRU(6, reset_after=False, name="gru"), L.Dense(2, name="fc"))


def simple_rnn():
    return sequential("simple_rnn", (5, 4), L.SimpleRNN(6, name="rnn"), L.Dense(2, name="fc"))


def norms():
    return sequential(
        "norms",
        (5, 6),
        L.LayerNormalization(name="norm1"),
        L.Dense(8, activation="elu", name="fc1"),
        L.RMSNormalization(name="norm2"),
        L.Dense(4, name="fc2"),
    )


def group_norm():
    return sequential("group_norm", (5, 6), L.Dense(4, name="fc"), L.GroupNormalization(2, name="norm"))


def unet():
    x = keras.Input((8, 6, 2), name="x")
    left = L.Conv2D(3, 3, padding="same", activation="relu", name="down")(x)
    y = L.MaxPooling2D(2, name="pool")(left)
    y = L.Conv2D(5, 2, padding="same", activation="relu", name="middle")(y)
    y = L.Conv2DTranspose(4, 2, strides=2, name="up")(y)
    y = L.Concatenate(name="join")([y, left])
    return keras.Model(x, L.Conv2D(2, 1, name="out")(y), name="unet")


def residual():
    x = keras.Input((6, 5, 3), name="x")
    y = L.Conv2D(4, 3, padding="same", use_bias=False, name="conv1")(x)
    y = L.ReLU(name="relu1")(L.BatchNormalization(name="norm1")(y))
    y = L.Conv2D(3, 3, padding="same", use_bias=False, name="conv2")(y)
    y = L.Add(name="sum")([L.BatchNormalization(name="norm2")(y), x])
    y = L.GlobalAveragePooling2D(name="pool")(L.ReLU(name="relu2")(y))
    return keras.Model(x, L.Dense(2, name="fc")(y), name="residual")


def flat():
    """Convolutions without a norm, flattened with their channels last."""
    return sequential(
        "flat",
        (9, 8, 2),
        L.Conv2D(3, (3, 2), strides=(1, 2), padding="same", activation="relu", name="conv1"),
        L.AveragePooling2D(2, name="pool"),
        L.Conv2D(5, (2, 1), name="conv2"),
        L.Flatten(name="flatten"),
        L.Dense(6, activation="tanh", name="fc1"),
        L.Dense(3, name="fc2"),
    )


def tagger():
    return sequential(
        "tagger",
        (5,),
        L.Embedding(11, 4, name="embedding"),
        L.Bidirectional(L.LSTM(3, return_sequences=True, name="lstm"), name="both"),
        L.Dense(7, activation="relu", name="fc1"),
        L.Dense(2, name="fc2"),
        dtype="int32",
    )


def attention():
    x = keras.Input((5, 6), name="x")
    y = L.MultiHeadAttention(2, 3, name="attention")(x, x)
    return keras.Model(x, L.Dense(4, name="fc")(y), name="attention_model")


CASES = (
    mlp, cnn, flat, folded, separable, transposed, unet, residual, conv1d, lstm, gru, gru_before, simple_rnn, tagger,
    norms, group_norm, attention,
)  # fmt: skip
BOTH = ("flat", "lstm")
"""Exported both ways, which make the same of all the others, too."""


def randomize(model):
    for weight in model.weights:
        if weight.dtype == "float32":
            weight.assign(values(weight.path.replace("variance", "var"), weight.shape))


def inputs(case, model):
    numbers = np.random.RandomState(1)
    shape = (2, *model.inputs[0].shape[1:])
    if model.inputs[0].dtype == "int32":
        return numbers.randint(0, 11, shape).astype(np.int32)
    return numbers.uniform(-1, 1, shape).astype(np.float32)


def main(here):
    path, outputs, given = folder(here, "tf2onnx", tf2onnx.__version__.partition("+")[0]), {}, {}
    for make in CASES:
        case = make.__name__.replace("_", "-")
        model = make()
        randomize(model)
        given[case] = inputs(case, model)
        y = np.asarray(model(given[case]))
        model.save(str(path / (case + ".keras")))
        model.export(str(path / (case + "_export.onnx")), format="onnx", verbose=False)
        outputs[case + "_export"] = y
        if case in BOTH:
            function(model, str(path / (case + "_function.onnx")))
            outputs[case + "_function"] = y
    record(path, outputs, given)


def function(model, at):
    spec = tf.TensorSpec([None, *model.inputs[0].shape[1:]], model.inputs[0].dtype, name="x")
    call = tf.function(lambda x: model(x, training=False), input_signature=[spec])
    tf2onnx.convert.from_function(call, input_signature=[spec], opset=OPSET, output_path=at)


if __name__ == "__main__":
    main(sys.argv[1])
