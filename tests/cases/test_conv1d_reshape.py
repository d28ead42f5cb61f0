"""Dense, Reshape, Conv1D: Keras reshapes to (L, C), torch to (C, L). What only looks like it, an RNN behind it, has one order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
import torch
from torch import nn

import neutral
from tests.cases import models as m
from tests.cases.commands import Commands

L = keras.layers

SIZES = {"no two sizes equal": (7, 5, 3, 4, 2), "all sizes equal": (3, 3, 3, 3, 3)}


@pytest.fixture(params=SIZES.values(), ids=list(SIZES))
def sizes(request: pytest.FixtureRequest) -> tuple[int, ...]:
    found: tuple[int, ...] = request.param
    return found


def keras_model(inputs: int, length: int, channels: int, filters: int, kernel: int) -> Any:
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            L.Dense(length * channels, name="dense"),
            L.ReLU(name="relu"),
            L.Reshape((length, channels), name="reshape"),
            L.Conv1D(filters, kernel, name="conv"),
        ]
    )


def torch_model(inputs: int, length: int, channels: int, filters: int, kernel: int) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("dense", nn.Linear(inputs, length * channels))
    model.add_module("relu", nn.ReLU())
    model.add_module("reshape", nn.Unflatten(1, (channels, length)))
    model.add_module("conv", nn.Conv1d(channels, filters, kernel))
    return model


def test_keras_to_torch(sizes: tuple[int, ...], tmp_path: Path, neutral_: Commands) -> None:
    model, module = m.randomized_keras(keras_model(*sizes), 1), m.randomized(torch_model(*sizes), 2)
    x = m.random(2, sizes[0])
    expected = m.run_keras(model, x)
    model.save(tmp_path / "a.keras")
    torch.save(module.state_dict(), tmp_path / "t.pt")
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "o.pt", "--into", tmp_path / "t.pt")
    module.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    m.assert_close(m.channels_last(m.run_torch(module, x)), expected)
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "a.pt2")
    m.assert_close(m.channels_last(m.run_torch(torch.export.load(tmp_path / "a.pt2").module(), x)), expected)
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "a.onnx")
    neutral_.ok("verify", tmp_path / "a.keras", tmp_path / "a.onnx")
    assert neutral.digest(tmp_path / "a.keras") == neutral.digest(tmp_path / "a.onnx")


def test_torch_to_keras(sizes: tuple[int, ...], tmp_path: Path, neutral_: Commands) -> None:
    model, module = m.randomized_keras(keras_model(*sizes), 1), m.randomized(torch_model(*sizes), 2)
    x = m.random(2, sizes[0])
    expected = m.channels_last(m.run_torch(module, x))
    torch.save(module, tmp_path / "a.pt")
    model.save(tmp_path / "t.keras")
    neutral_.ok("convert", tmp_path / "a.pt", tmp_path / "o.keras", "--into", tmp_path / "t.keras")
    neutral_.ok("convert", tmp_path / "a.pt", tmp_path / "new.keras")
    for name in ("o.keras", "new.keras"):
        m.assert_close(m.run_keras(keras.models.load_model(tmp_path / name, compile=False), x), expected)


def test_a_reshape_in_front_of_an_rnn_keeps_its_order(
    sizes: tuple[int, ...], tmp_path: Path, neutral_: Commands
) -> None:
    inputs, length, features, units, _ = sizes
    model = keras.Sequential(
        [keras.Input((inputs,)), L.Dense(length * features), L.Reshape((length, features)), L.LSTM(units)]
    )
    m.randomized_keras(model, 1).save(tmp_path / "a.keras")
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "a.onnx")
    neutral_.ok("verify", tmp_path / "a.keras", tmp_path / "a.onnx")


def test_a_reshape_that_both_read_is_in_no_one_order(tmp_path: Path, neutral_: Commands) -> None:
    """The convolution takes it transposed, so torch's Linear may not take the kernel as it is: nothing is said of its rows."""
    x = keras.Input((7,))
    line = L.Reshape((5, 3))(L.Dense(15, name="dense")(x))
    both = keras.Model(x, [L.LSTM(4)(line), L.Conv1D(2, 3)(line)])
    m.randomized_keras(both, 1).save(tmp_path / "a.keras")
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "a.pt2")
    neutral_.ok("verify", tmp_path / "a.keras", tmp_path / "a.pt2")
    with neutral.export_model(tmp_path / "a.keras") as archive:
        dense = next(layer for layer in archive.manifest.layers if layer.path == "dense")
    assert dense.channels == {}
