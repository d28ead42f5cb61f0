"""Small Keras models with random weights, in Keras 3 and in Keras 2 (`tf_keras`), for the readers' and writers' tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tf_keras

Models = dict[str, Callable[[Any], Any]]


@keras.saving.register_keras_serializable("own")
class Block(keras.layers.Layer):
    """A layer of a class that is not Keras' own, with a variable and a layer of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.inside = keras.layers.Dense(3)

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(shape[-1],), name="factor")
        self.inside.build(shape)

    def call(self, x: Any) -> Any:
        return self.inside(x * self.factor)


class Subclassed(keras.Model):
    """Attributes on both sides of `layers` in the alphabet, a list in a list, and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_one = keras.layers.Conv1D(3, 2)
        self.zhead = keras.layers.Dense(2)
        self.blocks = [keras.layers.Dense(4), [keras.layers.Dense(5), keras.layers.Dense(6)]]
        self.named = {"a": keras.layers.Dense(7)}

    def call(self, x: Any) -> Any:
        x = self.conv_one(x)
        for layer in (self.blocks[0], *self.blocks[1], self.named["a"]):
            x = layer(x)
        return self.zhead(x)


def sequential(k: Any) -> Any:
    layers = k.layers
    return k.Sequential(
        [
            k.Input((9, 8, 2)),
            layers.Conv2D(3, (2, 3), name="first"),
            layers.BatchNormalization(scale=False),
            layers.DepthwiseConv2D(2, depth_multiplier=2),
            layers.PReLU(shared_axes=[1, 2]),
            layers.Conv2DTranspose(5, 2),
            layers.SeparableConv2D(7, 2),
            layers.LayerNormalization(center=False),
            layers.Flatten(),
            layers.Dense(4, use_bias=False),
            layers.Dropout(0.5),
            layers.Dense(3),
        ]
    )


def many(k: Any) -> Any:
    """More than ten layers of one class: HDF5 lists dense_10 before dense_2."""
    return k.Sequential([k.Input((2,)), *(k.layers.Dense(3 + i % 2, name=f"d{i}") for i in range(13))])


def branches(k: Any) -> Any:
    layers = k.layers
    a, b = k.Input((4,), name="a"), k.Input((4,), name="b")
    shared = layers.Dense(4, name="shared")
    left = layers.Dense(4, name="left")(shared(a))
    right = layers.Dense(4, name="right")(layers.Dense(4, name="deep")(b))
    both = layers.Add()([left, shared(right)])
    return k.Model([a, b], [layers.Dense(4, name="top")(both), layers.Dense(4, name="side")(right)])


def nested(k: Any) -> Any:
    layers = k.layers
    x = k.Input((4,))
    inner = k.Sequential(
        [k.Input((4,)), layers.Dense(4, name="one"), layers.BatchNormalization(name="two")], name="inner"
    )
    y = k.Input((4,))
    deeper = k.Model(y, layers.Dense(4, name="four")(inner(layers.Dense(4, name="three")(y))), name="deeper")
    return k.Model(x, layers.Dense(4, name="five")(deeper(deeper(x))))


def recurrent(k: Any) -> Any:
    layers = k.layers
    x = inputs = k.Input((6, 4))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.MultiHeadAttention(2, 5, dropout=0.1)(x, x)
    x = layers.RNN([layers.LSTMCell(7), layers.GRUCell(8)], return_sequences=True)(x)
    x = layers.RNN(layers.SimpleRNNCell(9), return_sequences=True)(x)
    x = layers.TimeDistributed(layers.Dense(10))(x)
    x = layers.GRU(11, return_sequences=True, reset_after=False)(x)
    x = layers.SimpleRNN(12, return_sequences=True)(x)
    x = layers.Bidirectional(layers.GRU(3), merge_mode="sum")(x)
    return k.Model(inputs, layers.Dense(2)(x))


def others(k: Any) -> Any:
    layers = k.layers
    tokens = k.Input((6,), dtype="int32")
    x = layers.Embedding(11, 4)(tokens)
    x = layers.EinsumDense("abc,cd->abd", output_shape=(None, 8), bias_axes="d")(x)
    x = layers.GroupNormalization(groups=2)(x)
    x = layers.Conv1D(6, 2, use_bias=False)(x)
    return k.Model(tokens, layers.GlobalAveragePooling1D()(x))


BOTH: Models = {
    "sequential": sequential,
    "many": many,
    "branches": branches,
    "nested": nested,
    "recurrent": recurrent,
    "others": others,
}


def normalized(k: Any) -> Any:
    layers = k.layers
    x = inputs = k.Input((7, 4))
    x = layers.RMSNormalization()(x)
    x = layers.SpectralNormalization(layers.Conv1D(5, 2))(x)
    x = layers.GroupQueryAttention(3, 4, 2)(x, x)
    x = layers.ConvLSTM1D(3, 2, return_sequences=True)(layers.Reshape((2, 3, 5))(x))
    return k.Model(inputs, layers.Flatten()(x))


def custom(k: Any) -> Any:
    x = k.Input((4,))
    return k.Model(x, k.layers.Dense(2, name="after")(Block(name="block")(k.layers.Dense(5, name="before")(x))))


THREE: Models = {"normalized": normalized, "custom": custom}


def made(build: Callable[[Any], Any], k: Any = keras, seed: int = 0) -> Any:
    """The model with every float variable random, so that no two tensors are equal."""
    k.utils.set_random_seed(seed)
    if k is keras:
        keras.backend.clear_session()
    else:
        tf_keras.backend.clear_session()
    return randomized(build(k), seed)


def randomized(model: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.uniform(0.1, 0.5, size=variable.shape).astype("float32"))
    return model


def graph(k: Any, seed: int) -> Any:
    """A random graph: several inputs and outputs, shared layers, shared nested models."""
    choose = random.Random(seed)
    layers = k.layers
    inputs = [k.Input((4,), name=f"i{i}") for i in range(choose.randint(1, 3))]
    tensors, shared = list(inputs), []
    for i in range(choose.randint(3, 14)):
        kind = choose.random()
        if kind < 0.3 and len(tensors) > 1:
            tensors.append(layers.Add(name=f"add{i}")(choose.sample(tensors, 2)))
        elif kind < 0.45 and shared:
            tensors.append(choose.choice(shared)(choose.choice(tensors)))
        elif kind < 0.6:
            x = k.Input((4,))
            shared.append(k.Model(x, layers.Dense(4)(layers.Dense(4)(x)), name=f"model{i}"))
            tensors.append(shared[-1](choose.choice(tensors)))
        elif kind < 0.65:
            tensors.append(choose.choice(tensors) + choose.choice(tensors))
        else:
            shared.append(layers.Dense(4, name=f"dense{i}"))
            tensors.append(shared[-1](choose.choice(tensors)))
    return k.Model(inputs, [*choose.sample(tensors[len(inputs) :], choose.randint(1, 2)), tensors[-1]])
