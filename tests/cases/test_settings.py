"""Settings that decide what a weight means: a template in which they differ is refused, however they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tf_keras
import torch
from torch import nn

import neutral
from tests.cases import models as m

L = keras.layers


def model(shape: tuple[int, ...], *layers: Any, seed: int = 0) -> Any:
    return m.randomized_keras(keras.Sequential([keras.Input(shape), *layers]), seed)


def attended(axes: Any) -> Any:
    x = keras.Input((5, 4, 6))
    return m.randomized_keras(keras.Model(x, L.MultiHeadAttention(2, 3, attention_axes=axes, name="e")(x, x)), 0)


def written(path: Path, made: Any) -> Path:
    if isinstance(made, nn.Module):
        torch.save(made.eval(), path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    made.save(path.with_suffix(".keras"))
    return path.with_suffix(".keras")


def norm(cls: Any, axis: Any, *rest: Any) -> Any:
    return model((4, 4), cls(*rest, axis=axis, name="e"))


OTHERWISE: dict[str, tuple[Any, Any, str]] = {
    "batch norm": (lambda: norm(L.BatchNormalization, 1), lambda: norm(L.BatchNormalization, -1), "axis -2"),
    "layer norm": (lambda: norm(L.LayerNormalization, 1), lambda: norm(L.LayerNormalization, -1), "axis -2"),
    "layer norm, two axes": (
        lambda: model((4, 4, 4), L.LayerNormalization(axis=(1, 2), name="e")),
        lambda: model((4, 4, 4), L.LayerNormalization(axis=(2, 3), name="e")),
        "axis (-3, -2)",
    ),
    "group norm": (lambda: norm(L.GroupNormalization, 1, 2), lambda: norm(L.GroupNormalization, -1, 2), "axis -2"),
    "instance norm": (lambda: norm(L.GroupNormalization, 1, 4), lambda: norm(L.GroupNormalization, -1, 4), "axis -2"),
    "rms norm": (lambda: norm(L.RMSNormalization, 1), lambda: norm(L.RMSNormalization, -1), "axis -2"),
    "normalization": (lambda: norm(L.Normalization, 1), lambda: norm(L.Normalization, -1), "axis -2"),
    "einsum against dense": (
        lambda: model((4, 4), L.EinsumDense("abc,bd->adc", (4, 4), name="e")),
        lambda: model((4, 4), L.EinsumDense("abc,cd->abd", (None, 4), name="e")),
        "equation abc,bd->adc",
    ),
    "dense against einsum": (
        lambda: model((4, 4), L.Dense(4, use_bias=False, name="e")),
        lambda: model((4, 4), L.EinsumDense("abc,bd->adc", (4, 4), name="e")),
        "equation that of a dense layer",
    ),
    "attention axes": (lambda: attended(1), lambda: attended(2), "attention_axes -3"),
    "attention axes, all of them": (lambda: attended(None), lambda: attended(2), "attention_axes (-3, -2)"),
    "groups of one channel": (
        lambda: norm(L.GroupNormalization, -1, 2),
        lambda: norm(L.GroupNormalization, -1, 4),
        "groups 2, expected the template's 4",
    ),
    "groups of one channel in the source": (
        lambda: norm(L.GroupNormalization, -1, -1),
        lambda: norm(L.GroupNormalization, -1, 2),
        "groups 4, expected the template's 2",
    ),
    "torch's groups": (lambda: nn.Sequential(nn.GroupNorm(2, 4)), lambda: nn.Sequential(nn.GroupNorm(4, 4)), "groups 2"),
    "an instance norm into groups": (
        lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True)),
        lambda: nn.Sequential(nn.GroupNorm(2, 4)),
        "groups 4",
    ),
    "groups across frameworks": (
        lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True, eps=1e-3)),
        lambda: model((4, 4, 4), L.GroupNormalization(2, name="e")),
        "groups 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_setting_that_differs_is_refused(name: str, tmp_path: Path) -> None:
    source, template, says = OTHERWISE[name]
    a, b = written(tmp_path / "a", source()), written(tmp_path / "b", template())
    out = tmp_path / f"out{b.suffix}"
    with pytest.raises(neutral.NeutralError) as raised:
        neutral.convert(a, out, into=b)
    assert says in str(raised.value) and not out.exists()


ALIKE: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "axis 1 of a vector": (lambda: model((4,), L.BatchNormalization(axis=1, name="e"), seed=1), lambda: model((4,), L.BatchNormalization(name="e")), (2, 4)),
    "the last axis by its number": (lambda: model((3, 4), L.LayerNormalization(axis=2, name="e"), seed=1), lambda: norm_of(3, 4), (2, 3, 4)),
    "other letters": (
        lambda: model((3, 4), L.EinsumDense("abc,bd->adc", (5, 4), name="e"), seed=1),
        lambda: model((3, 4), L.EinsumDense("xyz,yw->xwz", (5, 4), name="e")),
        (2, 3, 4),
    ),
    "attention over the one axis there is": (lambda: over_steps(None, 1), lambda: over_steps((1,), 0), (2, 5, 6)),
    "one group a channel": (
        lambda: model((3, 4), L.GroupNormalization(-1, name="e"), seed=1),
        lambda: model((3, 4), L.GroupNormalization(4, name="e")),
        (2, 3, 4),
    ),
}  # fmt: skip


def norm_of(*shape: int) -> Any:
    return model(shape, L.LayerNormalization(name="e"))


def over_steps(axes: Any, seed: int) -> Any:
    x = keras.Input((5, 6))
    return m.randomized_keras(keras.Model(x, L.MultiHeadAttention(2, 3, attention_axes=axes, name="e")(x, x)), seed)


@pytest.mark.parametrize("name", ALIKE)
def test_one_setting_in_two_ways_of_writing(name: str, tmp_path: Path) -> None:
    source, template, shape = ALIKE[name]
    given = source()
    a, b = written(tmp_path / "a", given), written(tmp_path / "b", template())
    neutral.convert(a, tmp_path / "out.keras", into=b)
    x = np.random.default_rng(3).normal(size=shape).astype("f4")
    found = keras.models.load_model(tmp_path / "out.keras", compile=False)
    np.testing.assert_array_equal(found.predict(x, verbose=0), given.predict(x, verbose=0))


def test_keras_2_writes_the_axis_of_a_norm_as_a_list(tmp_path: Path) -> None:
    old = tf_keras.Sequential([tf_keras.Input((3, 4)), tf_keras.layers.BatchNormalization(name="e")])
    old.save(tmp_path / "a.h5")
    written(tmp_path / "b", model((3, 4), L.BatchNormalization(name="e")))
    written(tmp_path / "c", model((3, 4), L.LayerNormalization(axis=1, name="e")))
    assert not neutral.convert(tmp_path / "a.h5", tmp_path / "out.keras", into=tmp_path / "b.keras").warnings


def test_a_channels_first_norm_goes_to_torch(tmp_path: Path) -> None:
    given = model((4, 5), L.BatchNormalization(axis=1, epsilon=1e-5, name="e"), seed=1)
    written(tmp_path / "a", given)
    written(tmp_path / "b", nn.Sequential(nn.BatchNorm1d(4)))
    neutral.convert(tmp_path / "a.keras", tmp_path / "out.pt", into=tmp_path / "b.pt")
    x = np.random.default_rng(3).normal(size=(2, 4, 5)).astype("f4")
    found = torch.load(tmp_path / "out.pt", weights_only=False)(torch.tensor(x)).detach()
    np.testing.assert_allclose(found, given.predict(x, verbose=0), atol=1e-5)


def test_a_mask_in_one_of_two_is_told(tmp_path: Path) -> None:
    a = written(tmp_path / "a", model((5,), L.Embedding(7, 3, mask_zero=True, name="e")))
    b = written(tmp_path / "b", model((5,), L.Embedding(7, 3, name="e")))
    report = neutral.convert(a, tmp_path / "out.keras", into=b)
    assert "e: mask_zero is True in the source and False in the template" in report.warnings


def test_a_layer_norm_over_another_axis_is_told_to_torch(tmp_path: Path) -> None:
    a = written(tmp_path / "a", model((4, 5), L.LayerNormalization(axis=1, epsilon=1e-5, name="e")))
    b = written(tmp_path / "b", nn.Sequential(nn.LayerNorm(4)))
    report = neutral.convert(a, tmp_path / "out.pt", into=b)
    assert any("axis is -2 in the source" in warning for warning in report.warnings)
