"""Conv1D, Flatten, Dense: a transpose alone is silently wrong, for Keras flattens (L, C) and torch (C, L)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

import neutral
from tests.cases import models as m
from tests.cases.commands import Commands

L = keras.layers


def keras_model(length: int, channels: int, filters: int, kernel: int, units: int) -> Any:
    return keras.Sequential(
        [
            keras.Input((length, channels)),
            L.Conv1D(filters, kernel, padding="same", activation="relu", name="conv"),
            L.Flatten(name="flatten"),
            L.Dense(units, name="dense"),
        ]
    )


def torch_model(length: int, channels: int, filters: int, kernel: int, units: int) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv1d(channels, filters, kernel, padding="same"))
    model.add_module("relu", nn.ReLU())
    model.add_module("flatten", nn.Flatten())
    model.add_module("dense", nn.Linear(filters * length, units))
    return model


SIZES = {"no two sizes equal": (7, 2, 5, 3, 4), "all sizes equal": (3, 3, 3, 3, 3), "square": (4, 2, 4, 3, 16)}


@pytest.fixture(params=SIZES.values(), ids=list(SIZES))
def sizes(request: pytest.FixtureRequest) -> tuple[int, ...]:
    found: tuple[int, ...] = request.param
    return found


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_keras_to_torch(sizes: tuple[int, ...], suffix: str, tmp_path: Path, neutral_: Commands) -> None:
    length, channels, *_ = sizes
    model, module = m.randomized_keras(keras_model(*sizes), 1), m.randomized(torch_model(*sizes), 2)
    x = m.random(2, channels, length)
    expected = m.run_keras(model, m.channels_last(x))
    source = tmp_path / f"conv.{suffix}"
    model.save(source)

    torch.save(module, tmp_path / "template.pt")
    neutral_.ok("convert", source, tmp_path / "out.pt", "--into", tmp_path / "template.pt")
    m.assert_close(m.run_torch(m.load(tmp_path / "out.pt"), x), expected)

    neutral_.ok("convert", source, tmp_path / "state.pt", "--to", "torch")
    module.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    m.assert_close(m.run_torch(module, x), expected)

    neutral_.ok("convert", source, tmp_path / "conv.pt2")
    m.assert_close(m.run_torch(torch.export.load(tmp_path / "conv.pt2").module(), x), expected)

    # What the hand-written script does is wrong, with the right shapes.
    with torch.no_grad():
        module.dense.weight.copy_(torch.from_numpy(model.get_layer("dense").get_weights()[0].T.copy()))
    assert np.abs(m.run_torch(module, x) - expected).max() > 0.05


@pytest.mark.parametrize("suffix", ["keras", "h5", "weights.h5"])
def test_torch_to_keras(sizes: tuple[int, ...], suffix: str, tmp_path: Path, neutral_: Commands) -> None:
    length, channels, *_ = sizes
    model, module = m.randomized_keras(keras_model(*sizes), 1), m.randomized(torch_model(*sizes), 2)
    x = m.random(2, channels, length)
    expected = m.run_torch(module, x)
    source, template = tmp_path / "conv.pt", tmp_path / f"template.{suffix}"
    torch.save(module, source)
    (model.save_weights if suffix == "weights.h5" else model.save)(template)
    neutral_.ok("convert", source, tmp_path / f"into.{suffix}", "--into", template)
    neutral_.ok("convert", source, tmp_path / f"new.{suffix}")
    for name in ("into", "new"):
        out = tmp_path / f"{name}.{suffix}"
        if suffix == "weights.h5":
            model = m.randomized_keras(keras_model(*sizes), 7)
            model.load_weights(out)
        else:
            model = keras.models.load_model(out, compile=False)
        m.assert_close(m.run_keras(model, m.channels_last(x)), expected)


def test_there_and_back_is_bit_identical(sizes: tuple[int, ...]) -> None:
    model, module = m.randomized_keras(keras_model(*sizes), 1), torch_model(*sizes)
    before = model.get_weights()
    neutral.import_model(neutral.export_model(model), into=module)
    m.randomized_keras(model, 5)
    neutral.import_model(neutral.export_model(module), into=model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
