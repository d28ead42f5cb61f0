"""Networks of `keras.applications`, as Keras saves them, in every other format of the same network and built anew.

Small ones, with random weights: depthwise convolutions, uneven padding, branches that are added and joined, norms whose
eps is not the usual one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
import torch
from keras.src.applications import densenet, resnet

import neutral
from tests.cases import models as m

SHAPE = (32, 32, 3)
SETTINGS: Mapping[str, Any] = {"input_shape": SHAPE, "weights": None, "classes": 5, "classifier_activation": None}


def _densenet() -> Any:
    """DenseNet with one block where the usual one has six and more."""
    return densenet.DenseNet([1, 1, 1, 1], name="densenet", **SETTINGS)


def _resnet() -> Any:
    """ResNet with one block in each of two stacks, the second of which strides."""

    def stacks(x: Any) -> Any:
        x = resnet.stack_residual_blocks_v1(x, 8, 1, stride1=1, name="conv2")
        return resnet.stack_residual_blocks_v1(x, 12, 1, name="conv3")

    return resnet.ResNet(stacks, False, True, name="resnet", weights_name=None, **SETTINGS)


NETWORKS: Mapping[str, Callable[[], Any]] = {
    "mobilenet": lambda: keras.applications.MobileNet(alpha=0.25, **SETTINGS),
    "mobilenet_v2": lambda: keras.applications.MobileNetV2(alpha=0.35, **SETTINGS),
    "densenet": _densenet,
    "resnet": _resnet,
}


def _random(model: Any, seed: int) -> Any:
    """Random weights of a size that lets an input through to the end: else all of them would compute the same."""
    rng = np.random.default_rng((seed, 7))
    for layer in model.layers:
        for weight in layer.weights:
            if "gamma" in weight.name or "variance" in weight.name:
                values = rng.uniform(0.7, 1.4, weight.shape)
            elif len(weight.shape) == 1:
                values = rng.normal(0, 0.2, weight.shape)
            else:
                summed = np.prod(weight.shape[: 2 if "Depthwise" in type(layer).__name__ else -1])
                values = rng.normal(0, np.sqrt(2 / summed), weight.shape)
            weight.assign(values)
    return model


@dataclass(frozen=True)
class Saved:
    """A network, its files, and what it computes; `other` is the same network with other weights."""

    model: Any
    other: Any
    folder: Path
    x: np.ndarray
    y: np.ndarray


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    make, folder = NETWORKS[request.param], tmp_path_factory.mktemp(request.param)
    model, other = (_random(make(), seed) for seed in (1, 2))
    for name, each in (("a", model), ("other", other)):
        for suffix in ("keras", "h5"):
            each.save(folder / f"{name}.{suffix}")
        each.save_weights(folder / f"{name}.weights.h5")
    tf.train.Checkpoint(other).write(str(folder / "other.ckpt"))
    x = m.random(2, *SHAPE)
    y = m.run_keras(model, x)
    assert np.abs(y[0] - y[1]).max() > 1e-2 and not np.allclose(m.run_keras(other, x), y, atol=1e-2)
    yield Saved(model, other, folder, x, y)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return m.run_keras(keras.models.load_model(path, compile=False), x)


def test_every_file_has_one_digest(saved: Saved) -> None:
    """One of weights alone does not say what follows a Flatten: nothing here does."""
    digests = {neutral.digest(saved.folder / f"a.{suffix}") for suffix in ("keras", "h5")}
    assert digests == {neutral.digest(saved.folder / "a.weights.h5", flatten={})}
    assert neutral.diff(saved.folder / "a.keras", saved.folder / "a.weights.h5").same
    assert not neutral.diff(saved.folder / "a.keras", saved.folder / "other.weights.h5").same


@pytest.mark.parametrize(("source", "template"), [("weights.h5", "keras"), ("keras", "h5")])
def test_into_another_format(saved: Saved, source: str, template: str, tmp_path: Path) -> None:
    out = tmp_path / f"b.{template}"
    neutral.convert(saved.folder / f"a.{source}", out, into=saved.folder / f"other.{template}")
    m.assert_close(run(out, saved.x), saved.y)


def test_into_a_checkpoint_of_tensorflow_and_back(saved: Saved, tmp_path: Path) -> None:
    neutral.convert(saved.folder / "a.weights.h5", tmp_path / "b.ckpt", into=saved.folder / "other.ckpt")
    before = saved.other.get_weights()
    try:
        tf.train.Checkpoint(saved.other).read(str(tmp_path / "b.ckpt")).assert_existing_objects_matched()
        m.assert_close(m.run_keras(saved.other, saved.x), saved.y)
    finally:
        saved.other.set_weights(before)
    neutral.convert(tmp_path / "b.ckpt", tmp_path / "c.weights.h5", into=saved.folder / "other.weights.h5")
    assert neutral.diff(tmp_path / "c.weights.h5", saved.folder / "a.weights.h5").same


def test_built_anew_as_onnx(saved: Saved, tmp_path: Path) -> None:
    neutral.convert(saved.folder / "a.keras", tmp_path / "b.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    m.assert_close(session.run(None, {port.name: m.channels_first(saved.x)})[0], saved.y, 1e-5)


def test_built_anew_in_keras(saved: Saved, tmp_path: Path) -> None:
    neutral.convert(saved.folder / "a.h5", tmp_path / "b.keras")
    m.assert_close(run(tmp_path / "b.keras", saved.x), saved.y)


@pytest.mark.parametrize("saved", ["mobilenet_v2", "resnet"], indirect=True)
def test_built_anew_in_torch(saved: Saved, tmp_path: Path) -> None:
    """torch.export takes seconds: these two have all operators that the others have."""
    neutral.convert(saved.folder / "a.keras", tmp_path / "b.pt2")
    program = torch.export.load(tmp_path / "b.pt2").module()
    m.assert_close(m.run_torch(program, m.channels_first(saved.x)), saved.y, 1e-5)
