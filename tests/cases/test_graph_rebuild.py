"""Whole models made from the graph alone: Keras to `.pt2` and to `.keras`, torch Sequentials to `.keras`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

import neutral
from neutral.errors import Refused
from tests.cases import models as m
from tests.cases.commands import Commands

L = keras.layers

# --- Keras models of the tutorials ---


def mlp() -> Any:
    return keras.Sequential(
        [
            keras.Input((6,)),
            L.Dense(8, activation="relu"),
            L.BatchNormalization(),
            L.Dropout(0.5),
            L.Dense(5, activation="elu"),
            L.LayerNormalization(),
            L.Dense(3, activation="softmax"),
        ]
    )


def branches() -> Any:
    """Branches, an addition, a concatenation, strides and 'same' padding on even sizes."""
    inputs = keras.Input((8, 10, 3), name="image")
    x = L.Rescaling(1 / 4, offset=-0.5)(inputs)
    x = L.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="stem")(x)
    a = L.Conv2D(4, 3, padding="same", use_bias=False, name="a1")(x)
    a = L.BatchNormalization(name="a2")(a)
    a = L.ReLU(name="a3")(a)
    x = L.Add(name="add")([x, a])
    b = L.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="b1")(x)
    c = L.SeparableConv2D(5, 3, padding="same", activation="tanh", name="c1")(x)
    d = L.MaxPooling2D(3, strides=1, padding="same", name="d1")(x)
    x = L.Concatenate(name="concat")([b, c, d])
    x = L.ZeroPadding2D(((0, 1), (2, 1)), name="pad")(x)
    x = L.AveragePooling2D(2, name="pool")(x)
    x = L.Flatten(name="flatten")(x)
    x = L.Dense(7, activation="leaky_relu", name="fc1")(x)
    return keras.Model(inputs, L.Dense(3, name="fc2")(x))


def pooled() -> Any:
    """Two inputs, two global poolings, a product."""
    image, side = keras.Input((6, 5, 2), name="image"), keras.Input((4,), name="side")
    x = L.Conv2D(4, (2, 3), activation="gelu", name="conv")(image)
    x = L.Multiply(name="gate")([L.GlobalAveragePooling2D(name="mean")(x), L.Dense(4, "sigmoid", name="fc")(side)])
    y = L.GlobalMaxPooling2D(name="max")(L.Conv2D(3, 1, name="other")(image))
    return keras.Model([image, side], L.Dense(2, name="out")(L.Concatenate(name="both")([x, y])))


def decoder() -> Any:
    """A Dense in front of a Reshape crosses the same boundary the other way."""
    return keras.Sequential(
        [
            keras.Input((5,)),
            L.Dense(3 * 4 * 6, activation="relu", name="fc"),
            L.Reshape((3, 4, 6), name="reshape"),
            L.Conv2DTranspose(4, 4, strides=2, padding="same", activation="relu", name="up1"),
            L.BatchNormalization(name="norm"),
            L.UpSampling2D(2, name="up2"),
            L.Conv2DTranspose(1, 3, strides=1, padding="valid", activation="sigmoid", name="up3"),
        ]
    )


def autoencoder() -> Any:
    inner = keras.Sequential([keras.Input((6, 6, 2)), L.Conv2D(3, 3, strides=2, padding="same")], name="encoder")
    outer = keras.Sequential([keras.Input((3, 3, 3)), L.Conv2DTranspose(2, 2, strides=2)], name="decoder")
    inputs = keras.Input((6, 6, 2))
    return keras.Model(inputs, outer(inner(inputs)))


def text(recurrent: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: keras.Sequential(
        [keras.Input((7,), dtype="int32"), L.Embedding(11, 4, name="embedding"), recurrent(), L.Dense(2, name="out")]
    )


def text_conv() -> Any:
    return keras.Sequential(
        [
            keras.Input((9,), dtype="int32"),
            L.Embedding(11, 4),
            L.Conv1D(5, 3, activation="relu", padding="causal"),
            L.MaxPooling1D(2),
            L.GlobalMaxPooling1D(),
            L.Dense(2),
        ]
    )


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 11, shape).astype(np.int32)


KERAS: dict[str, tuple[Callable[[], Any], tuple[np.ndarray, ...]]] = {
    "mlp": (mlp, (m.random(4, 6),)),
    "branches": (branches, (m.random(2, 8, 10, 3),)),
    "two inputs": (pooled, (m.random(3, 6, 5, 2), m.random(3, 4))),
    "decoder": (decoder, (m.random(3, 5),)),
    "nested autoencoder": (autoencoder, (m.random(2, 6, 6, 2),)),
    "rnn": (text(lambda: L.SimpleRNN(5)), (tokens(4, 7),)),
    "lstm": (text(lambda: L.LSTM(5, dropout=0.3)), (tokens(4, 7),)),
    "gru": (text(lambda: L.GRU(5)), (tokens(4, 7),)),
    "bidirectional": (text(lambda: L.Bidirectional(L.LSTM(5))), (tokens(4, 7),)),
    "bidirectional sum": (text(lambda: L.Bidirectional(L.GRU(3), merge_mode="sum")), (tokens(4, 7),)),
    "conv text": (text_conv, (tokens(4, 9),)),
}


@pytest.fixture(params=KERAS)
def keras_case(request: pytest.FixtureRequest) -> tuple[Any, tuple[np.ndarray, ...]]:
    build, inputs = KERAS[request.param]
    return m.randomized_keras(build(), 1), inputs


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_keras_to_an_exported_torch_program(
    keras_case: tuple[Any, tuple[np.ndarray, ...]], suffix: str, tmp_path: Path, neutral_: Commands
) -> None:
    model, inputs = keras_case
    source, out = tmp_path / f"model.{suffix}", tmp_path / "model.pt2"
    model.save(source)
    neutral_.ok("export", source, tmp_path / "model.nwt")
    neutral_.ok("import", tmp_path / "model.nwt", "--to", "torch", "-o", out)
    program = torch.export.load(out).module()
    found = m.run_torch(program, *(m.channels_first(x) for x in inputs))
    m.assert_close(m.channels_last(found), m.run_keras(model, *inputs), 1e-5)


def test_keras_to_keras_again(keras_case: tuple[Any, tuple[np.ndarray, ...]], tmp_path: Path) -> None:
    """From a `.keras` with its own config, and from a legacy `.h5` with one made anew from the graph."""
    model, inputs = keras_case
    expected = m.run_keras(model, *inputs)
    for suffix in ("keras", "h5"):
        model.save(tmp_path / f"model.{suffix}")
        neutral.convert(tmp_path / f"model.{suffix}", tmp_path / f"{suffix}.keras")
        m.assert_close(m.run_keras(keras.models.load_model(tmp_path / f"{suffix}.keras"), *inputs), expected)


def test_a_gru_that_torch_does_not_have_is_refused_with_the_reason(tmp_path: Path, neutral_: Commands) -> None:
    model = text(lambda: L.GRU(5, reset_after=False, name="gru"))()
    model.save(tmp_path / "model.keras")
    said = neutral_.refused("convert", tmp_path / "model.keras", tmp_path / "model.pt2")
    assert "gru: " in said and "reset_after=False" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.keras"]


# --- torch Sequentials ---


def named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def nested() -> nn.Module:
    def block(taken: int, made: int) -> nn.Sequential:
        return named(
            conv=nn.Conv2d(taken, made, 3, padding=1, bias=False), norm=nn.BatchNorm2d(made), act=nn.ReLU(inplace=True)
        )

    return named(
        features=named(one=block(2, 4), pool=nn.MaxPool2d(2), two=block(4, 6)),
        average=nn.AdaptiveAvgPool2d(1),
        head=named(flatten=nn.Flatten(), dropout=nn.Dropout(0.5), fc=nn.Linear(6, 3), out=nn.LogSoftmax(dim=1)),
    )


def flattened() -> nn.Module:
    """Vectors between Flatten and Linear cross the boundary, too."""
    return nn.Sequential(
        nn.Conv2d(2, 5, (3, 2), stride=(2, 1), dilation=(1, 2)),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.BatchNorm1d(40),
        nn.Linear(40, 6),
        nn.GELU(),
        nn.Linear(6, 3),
    )


def torch_decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6 * 3 * 4),
        nn.ReLU(),
        nn.Unflatten(1, (6, 3, 4)),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.MaxPool1d(3, 2, padding=1), nn.Conv1d(4, 4, 3, groups=2),
        nn.PReLU(4), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def torch_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 3)
    )


TORCH: dict[str, tuple[Callable[[], nn.Module], np.ndarray]] = {
    "lenet5": (m.lenet5, m.random(2, 1, 28, 28)),
    "nested": (nested, m.random(3, 2, 8, 6)),
    "flattened": (flattened, m.random(3, 2, 7, 7)),
    "decoder": (torch_decoder, m.random(3, 5)),
    "one dimension": (one_dimensional, m.random(3, 3, 11)),
    "mlp": (torch_mlp, m.random(4, 6)),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("suffix", ["keras", "h5", "savedmodel"])
def test_torch_to_keras_and_tensorflow(name: str, suffix: str, tmp_path: Path, neutral_: Commands) -> None:
    build, x = TORCH[name]
    module, out = m.randomized(build(), 2), tmp_path / f"model.{suffix}"
    torch.save(module, tmp_path / "model.pt")
    neutral_.ok("convert", tmp_path / "model.pt", out)
    expected = m.run_torch(module, x)
    if suffix == "savedmodel":
        import tensorflow as tf

        loaded = tf.saved_model.load(str(out))
        found = loaded.serve(m.channels_last(x)).numpy()
    else:
        found = m.run_keras(keras.models.load_model(out, compile=False), m.channels_last(x))
    m.assert_close(m.channels_first(found), expected, 2e-6)


def test_a_maximum_over_a_border_that_keras_would_fill_with_zeros_is_refused(
    tmp_path: Path, neutral_: Commands
) -> None:
    """torch pads a maximum with minus infinity; behind a ReLU zeros are the same, behind a PReLU they are not."""
    torch.save(nn.Sequential(nn.PReLU(2), nn.MaxPool1d(3, 2, padding=1)), tmp_path / "model.pt")
    said = neutral_.refused("convert", tmp_path / "model.pt", tmp_path / "model.keras")
    assert "a maximum with padding" in said and [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("name", ["nested", "decoder"])
def test_there_and_back_through_two_graphs(name: str, tmp_path: Path) -> None:
    """torch to Keras by the graph, Keras to torch by the graph of what came out."""
    build, x = TORCH[name]
    module = m.randomized(build(), 2)
    torch.save(module, tmp_path / "model.pt")
    neutral.convert(tmp_path / "model.pt", tmp_path / "model.keras")
    neutral.convert(tmp_path / "model.keras", tmp_path / "model.pt2")
    m.assert_close(m.run_torch(torch.export.load(tmp_path / "model.pt2").module(), x), m.run_torch(module, x), 2e-6)
    assert neutral.digest(tmp_path / "model.keras") == neutral.digest(module)


def test_a_class_of_ones_own_has_no_graph(tmp_path: Path) -> None:
    m.save(m.randomized(m.LeNet5(), 1), tmp_path / "own.pt")
    with pytest.raises(Refused):
        neutral.convert(tmp_path / "own.pt", tmp_path / "own.keras", flatten={"classifier.1": "120"})
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]


@pytest.mark.parametrize("suffix", ["keras", "h5", "pt2"])
def test_a_layer_of_no_units_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)), tmp_path / "a.pt")
    with pytest.raises(Refused, match=r"^0: found a kernel of shape \(0, 4\), expected sizes above 0"):
        neutral.convert(tmp_path / "a.pt", tmp_path / f"b.{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    neutral.convert(tmp_path / "a.pt", tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt")["0.weight"].shape == (0, 4)
