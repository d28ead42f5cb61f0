"""python make_keras.py FOLDER keras|tf_keras|tensorflow.keras, in an environment that has one version of it."""

from __future__ import annotations

import importlib
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
from recording import folder, inputs, record, values

keras = importlib.import_module(sys.argv[2])
VERSION = keras.__version__
OLD = VERSION.startswith("2.")
L = keras.layers


def image():
    return keras.Sequential(
        [
            keras.Input((4, 5, 2)) if not OLD else L.InputLayer((4, 5, 2)),
            L.Conv2D(3, (3, 2), name="conv"),
            L.BatchNormalization(name="norm"),
            L.Activation("relu", name="relu"),
            L.Conv2DTranspose(4, (2, 3), strides=2, name="up"),
            L.Flatten(name="flatten"),
            L.Dense(5, name="dense"),
        ],
        name="image",
    )


def text():
    x = keras.Input((5,), name="x", dtype="int32")
    y = L.Embedding(7, 4, name="embedding")(x)
    y = L.LSTM(5, return_sequences=True, name="lstm")(y)
    y = L.LayerNormalization(name="norm")(y)
    y = L.GRU(3, return_sequences=True, name="gru")(y)
    return keras.Model(x, L.Dense(2, name="dense")(y), name="text")


def attention():
    x = keras.Input((5, 6), name="x")
    y = L.LayerNormalization(name="norm")(x)
    return keras.Model(x, L.MultiHeadAttention(2, 3, name="attention")(y, y), name="attention_model")


def main(here):
    path, outputs = folder(here, sys.argv[2].split(".")[-1], VERSION), {}
    for name, model in (("image", image()), ("text", text()), ("attention", attention())):
        for layer in model.layers:
            layer.set_weights(
                [
                    values(f"{layer.name}/{i}{'/var' if layer.name == 'norm' and i == 3 else ''}", w.shape)
                    for i, w in enumerate(layer.get_weights())
                ]
            )
        outputs[name] = np.asarray(model(inputs(name)))
        suffixes = ("h5",) if VERSION.startswith("2.8") else ("h5", "keras", "weights.h5")
        for suffix in suffixes:
            goal = str(path / (name + "." + suffix))
            try:
                model.save_weights(goal) if suffix == "weights.h5" else model.save(goal)
            except ValueError as error:  # Keras 3.0 gives two weights of an attention one name in such a file
                print(goal, error)
                (path / (name + "." + suffix)).unlink()
        if OLD:
            model.save_weights(str(path / (name + ".checkpoint")), save_format="tf")
            (path / "checkpoint").unlink()
    record(path, outputs)


if __name__ == "__main__":
    main(sys.argv[1])
