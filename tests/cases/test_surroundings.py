"""What stands around paired layers: another order in front of one, or another activation behind it, is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

import neutral
from tests.cases import models as m

L = keras.layers
IMAGE = (4, 5, 3)


def keras_model(shape: tuple[int, ...], *layers: Any, seed: int = 0) -> Any:
    return m.randomized_keras(keras.Sequential([keras.Input(shape), *layers]), seed)


def torch_model(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


def joined(*order: int) -> Any:
    x = keras.Input(IMAGE)
    image = L.Conv2D(4, 2, name="c")(x)
    parts = (L.Flatten()(image), L.GlobalAveragePooling2D()(image))
    return m.randomized_keras(keras.Model(x, L.Dense(2, name="d")(L.Concatenate()([parts[i] for i in order]))), 0)


def maps(*order: int) -> Any:
    x = keras.Input(IMAGE)
    parts = (L.Conv2D(4, 1, name="a")(x), L.Conv2D(4, 1, name="b")(x))
    return m.randomized_keras(keras.Model(x, L.Conv2D(2, 1, name="d")(L.Concatenate()([parts[i] for i in order]))), 0)


def attended(**more: Any) -> Any:
    x = keras.Input((5, 6))
    return m.randomized_keras(keras.Model(x, L.MultiHeadAttention(2, 3, name="e")(x, x, **more)), 0)


def saved(path: Path, model: Any) -> Path:
    path = path.with_suffix(".pt" if isinstance(model, nn.Module) else ".keras")
    torch.save(model, path) if isinstance(model, nn.Module) else model.save(path)
    return path


def converted(folder: Path, source: Any, template: Any) -> neutral.Report:
    a, b = saved(folder / "a", source), saved(folder / "b", template)
    return neutral.convert(a, folder / f"out{b.suffix}", into=b)


Made = Callable[[], Any]


def flat(*layers: Any) -> Made:
    return lambda: keras_model(IMAGE, *layers, L.Dense(3, name="d"))


ORDERS: dict[str, tuple[Made, Made]] = {
    "permuted": (flat(L.Permute((2, 1, 3)), L.Flatten()), flat(L.Flatten())),
    "permuted behind a Reshape": (flat(L.Reshape((20, 3)), L.Permute((2, 1)), L.Flatten()), flat(L.Flatten())),
    "permuted behind a convolution": (
        flat(L.Conv2D(4, 2, name="c"), L.Permute((3, 1, 2)), L.Flatten()),
        flat(L.Conv2D(4, 2, name="c"), L.Flatten()),
    ),
    "a norm of vectors": (
        flat(L.Permute((2, 1, 3)), L.Flatten(), L.BatchNormalization(name="n")),
        flat(L.Flatten(), L.BatchNormalization(name="n")),
    ),
    "a square of steps": (
        lambda: keras_model((4, 4), L.Permute((2, 1)), L.Dense(3, name="d")),
        lambda: keras_model((4, 4), L.Dense(3, name="d")),
    ),
    "parts joined": (lambda: joined(0, 1), lambda: joined(1, 0)),
    "maps joined": (lambda: maps(0, 1), lambda: maps(1, 0)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_another_order_in_front_is_refused(name: str, tmp_path: Path) -> None:
    for first, second in (ORDERS[name], ORDERS[name][::-1]):
        with pytest.raises(neutral.NeutralError, match=r"[dn]: found inputs in another order"):
            converted(tmp_path, first(), second())
        assert not (tmp_path / "out.keras").exists()


ONE_ORDER: dict[str, tuple[Made, Made]] = {
    "a Reshape for a Flatten": (flat(L.Flatten()), flat(L.Reshape((60,)))),
    "in two steps": (flat(L.Reshape((20, 3)), L.Flatten()), flat(L.Flatten())),
    "permuted in two steps": (
        flat(L.Permute((2, 1, 3)), L.Permute((3, 1, 2)), L.Flatten()),
        flat(L.Permute((3, 2, 1)), L.Flatten()),
    ),
    "permuted and back": (flat(L.Permute((2, 1, 3)), L.Permute((2, 1, 3)), L.Flatten()), flat(L.Flatten())),
    "dropped out": (flat(L.Flatten(), L.Dropout(0.5)), flat(L.Dropout(0.1), L.Flatten())),
    "the same parts": (lambda: joined(1, 0), lambda: joined(1, 0)),
    "a Flatten that the graph has in another order": (
        flat(L.Conv2D(4, 2, name="c"), L.Flatten()),
        flat(L.Conv2D(4, 2, name="c"), L.Reshape((-1, 4)), L.Flatten()),
    ),
}


@pytest.mark.parametrize("name", ONE_ORDER)
def test_one_order_written_in_two_ways(name: str, tmp_path: Path) -> None:
    given = ONE_ORDER[name][0]()
    given = m.randomized_keras(given, 1)
    assert not converted(tmp_path, given, ONE_ORDER[name][1]()).warnings
    x = np.random.default_rng(3).normal(size=(2, *IMAGE)).astype("f4")
    found = keras.models.load_model(tmp_path / "out.keras", compile=False)
    np.testing.assert_allclose(found.predict(x, verbose=0), given.predict(x, verbose=0), atol=1e-5)


def steps(*layers: Any) -> Made:
    return lambda: keras_model((4,), L.Dense(4, name="a"), *layers, L.Dense(2, name="b"))


ACTIVATIONS: dict[str, tuple[Made, Made, str]] = {
    "torch's Tanh and a fused relu": (
        lambda: torch_model(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
        lambda: keras_model((4,), L.Dense(4, "relu", name="a"), L.Dense(2, name="b")),
        "0 -> a: found Tanh behind it, expected the template's Relu",
    ),
    "none and one": (
        lambda: keras_model((4,), L.Dense(4, name="a"), L.Dense(2, name="b")),
        lambda: torch_model(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        "a -> 0: found nothing behind it, expected the template's Relu",
    ),
    "slopes": (steps(L.LeakyReLU(negative_slope=0.1)), steps(L.LeakyReLU(negative_slope=0.5)), "alpha=0.1"),
    "GELU": (
        lambda: torch_model(nn.Linear(4, 4), nn.GELU("tanh"), nn.Linear(4, 2)),
        lambda: torch_model(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)),
        "Gelu(approximate=tanh)",
    ),
    "at the end": (
        lambda: torch_model(nn.Linear(4, 4), nn.Tanh()),
        lambda: keras_model((4,), L.Dense(4, name="a")),
        "found Tanh behind it, expected the template's nothing",
    ),
    "in front of all": (
        lambda: torch_model(nn.ReLU(), nn.Linear(4, 4)),
        lambda: torch_model(nn.Tanh(), nn.Linear(4, 4)),
        "input: found Relu behind it",
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_another_activation_is_refused(name: str, tmp_path: Path) -> None:
    source, template, says = ACTIVATIONS[name]
    with pytest.raises(neutral.NeutralError) as raised:
        converted(tmp_path, source(), template())
    assert says in str(raised.value)


def test_an_activation_behind_a_sum_is_compared(tmp_path: Path) -> None:
    def residual(activation: str) -> Any:
        x = keras.Input((4,))
        y = L.Add()([L.Dense(4, name="a")(x), x])
        return m.randomized_keras(keras.Model(x, L.Dense(2, name="b")(L.Activation(activation)(y))), 0)

    with pytest.raises(neutral.NeutralError, match="found Relu behind it, expected the template's Tanh"):
        converted(tmp_path, residual("relu"), residual("tanh"))
    assert converted(tmp_path, residual("relu"), residual("relu")).layers == 2


def test_activations_of_their_own_and_fused_ones_are_equal(tmp_path: Path) -> None:
    source = torch_model(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2), nn.Sigmoid())
    image = (L.Conv2D(4, 2, name="c"), L.MaxPooling2D(2), L.ReLU(), L.Dropout(0.2), L.Flatten())
    report = converted(tmp_path, source, keras_model(IMAGE, *image, L.Dense(2, "sigmoid", name="d")))
    assert not report.warnings
    x = np.random.default_rng(3).normal(size=(2, *IMAGE)).astype("f4")
    found = keras.models.load_model(tmp_path / "out.keras", compile=False).predict(x, verbose=0)
    wanted = source(torch.tensor(np.moveaxis(x, -1, 1).copy())).detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_new_layer_in_between_is_the_users_own_affair(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", steps(L.ReLU())())
    b = saved(tmp_path / "b", steps(L.BatchNormalization(name="new"), L.ReLU())())
    neutral.convert(a, tmp_path / "out.keras", into=b, allow_missing=["new"])


REMARKS: dict[str, tuple[Made, Made, str]] = {
    "poolings": (
        flat(L.Conv2D(4, 1, name="c"), L.MaxPooling2D(2), L.Flatten()),
        flat(L.Conv2D(4, 1, name="c"), L.AveragePooling2D(2), L.Flatten()),
        "c: MaxPool(kernel_shape=(2, 2), strides=(2, 2)) behind it in the source and AveragePool",
    ),
    "an average of positive numbers": (
        flat(L.Conv2D(4, 1, name="c"), L.ReLU(), L.AveragePooling2D(2), L.Flatten()),
        flat(L.Conv2D(4, 1, name="c"), L.AveragePooling2D(2), L.ReLU(), L.Flatten()),
        "c: Relu, AveragePool",
    ),
    "a softmax at the end": (
        lambda: torch_model(nn.Linear(4, 3)),
        lambda: keras_model((4,), L.Dense(3, "softmax", name="d")),
        "0 -> d: nothing behind it in the source and Softmax in the template",
    ),
    "a causal mask": (
        lambda: attended(use_causal_mask=True),
        attended,
        "e: is_causal is True in the source and False in the template",
    ),
}


@pytest.mark.parametrize("name", REMARKS)
def test_other_operators_are_told(name: str, tmp_path: Path) -> None:
    source, template, says = REMARKS[name]
    told = [warning for warning in converted(tmp_path, source(), template()).warnings if says in warning]
    assert len(told) == 1
