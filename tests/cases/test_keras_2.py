"""Files of Keras 2: what it calls by Keras 3's names and computes otherwise, its wiring, its `.keras` files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tf_keras
import torch

import neutral
from tests.cases import models as m
from tests.cases.commands import Commands

L, K2 = keras.layers, tf_keras.layers
SUFFIXES = pytest.mark.parametrize("suffix", ["h5", "keras"])


def chain(*layers: Any, shape: tuple[int, ...]) -> Any:
    return m.randomized_keras_2(tf_keras.Sequential([tf_keras.Input(shape), *layers]), 1)


def wide(*shape: int) -> np.ndarray:
    """Far enough from zero for the ends of a hard sigmoid."""
    return 3 * m.random(*shape)


def run_keras_2(path: Path, x: np.ndarray) -> np.ndarray:
    return tf_keras.models.load_model(path, compile=False)(x).numpy()


def run_keras_3(path: Path, x: np.ndarray) -> np.ndarray:
    return m.run_keras(keras.models.load_model(path, compile=False), x)


def run_program(path: Path, x: np.ndarray) -> np.ndarray:
    return m.run_torch(torch.export.load(path).module(), x)


# --- hard_sigmoid: 0.2x + 0.5 in Keras 2, x/6 + 0.5 in Keras 3 ---


@SUFFIXES
@pytest.mark.parametrize("cls", ["LSTM", "GRU", "Bidirectional"])
def test_a_recurrent_hard_sigmoid(cls: str, suffix: str, tmp_path: Path, neutral_: Commands) -> None:
    def layer(k: Any) -> Any:
        inner = getattr(k, "LSTM" if cls == "Bidirectional" else cls)(4, recurrent_activation="hard_sigmoid", name="r")
        return k.Bidirectional(inner, name="b") if cls == "Bidirectional" else inner

    source, keras3, keras2 = tmp_path / f"a.{suffix}", tmp_path / "three.keras", tmp_path / f"two.{suffix}"
    model = chain(layer(K2), shape=(5, 3))
    model.save(source)
    keras.Sequential([keras.Input((5, 3)), layer(L)]).save(keras3)
    m.randomized_keras_2(tf_keras.Sequential([tf_keras.Input((5, 3)), layer(K2)]), 2).save(keras2)
    said = neutral_.refused("convert", source, tmp_path / "no.keras", "--into", keras3)
    assert "hard_sigmoid_0.2 (0.2x + 0.5, as in Keras 2)" in said and "hard_sigmoid (x/6 + 0.5, as in Keras 3)" in said
    assert "hard_sigmoid_0.2" in neutral_.refused("convert", keras3, tmp_path / f"no.{suffix}", "--into", source)
    assert "hard_sigmoid_0.2" in neutral_.refused("convert", source, tmp_path / "no.pt2")
    neutral_.ok("convert", source, tmp_path / f"b.{suffix}", "--into", keras2)
    x = wide(2, 5, 3)
    assert np.array_equal(run_keras_2(tmp_path / f"b.{suffix}", x), model(x))
    assert "hard_sigmoid" in neutral_.refused("verify", source, keras3)


def test_a_recurrent_hard_sigmoid_in_a_new_file(tmp_path: Path, neutral_: Commands) -> None:
    model = chain(K2.LSTM(4, recurrent_activation="hard_sigmoid"), shape=(5, 3))
    for suffix in ("h5", "keras"):
        model.save(tmp_path / f"a.{suffix}")
    said = neutral_.refused("convert", tmp_path / "a.h5", tmp_path / "b.keras")
    assert "the activation hard_sigmoid_0.2 (0.2x + 0.5, as in Keras 2)" in said
    said = neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "b.keras")
    assert "warning" in said and "a file of Keras 2" in said and "hard_sigmoid_0.2" in said
    neutral_.ok("convert", tmp_path / "a.h5", tmp_path / "b.h5")
    x = wide(2, 5, 3)
    for suffix in ("h5", "keras"):
        assert np.array_equal(run_keras_2(tmp_path / f"b.{suffix}", x), model(x))
        assert neutral.digest(tmp_path / f"b.{suffix}") == neutral.digest(tmp_path / "a.h5")
    with neutral.export_model(tmp_path / "b.keras") as archive:
        assert archive.manifest.layers[0].recurrent_activation == "hard_sigmoid_0.2"


@SUFFIXES
def test_a_hard_sigmoid_behind_a_dense(suffix: str, tmp_path: Path, neutral_: Commands) -> None:
    model = chain(
        K2.Dense(5, activation="hard_sigmoid", name="a"),
        K2.Dense(2, name="b"),
        K2.Activation("hard_sigmoid"),
        shape=(4,),
    )
    source, template = tmp_path / f"a.{suffix}", tmp_path / "t.keras"
    model.save(source)
    keras.Sequential([keras.Input((4,)), L.Dense(5, activation="hard_sigmoid", name="a"), L.Dense(2, name="b")]).save(
        template
    )
    assert "activation hard_sigmoid_0.2" in neutral_.refused(
        "convert", source, tmp_path / "n.keras", "--into", template
    )
    x = wide(7, 4)
    for goal, run in (("b.keras", run_keras_3), ("b.pt2", run_program)):
        neutral_.ok("convert", source, tmp_path / goal)
        m.assert_close(run(tmp_path / goal, x), model(x).numpy())
        neutral_.ok("verify", source, tmp_path / goal)


def test_a_hard_sigmoid_of_keras_3_through_a_legacy_file(tmp_path: Path, neutral_: Commands) -> None:
    """A legacy file is in the words of Keras 2; its version says which Keras is meant."""
    model = m.randomized_keras(keras.Sequential([keras.Input((4,)), L.Dense(3, activation="hard_sigmoid")]), 1)
    model.save(tmp_path / "a.keras")
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "b.h5")
    neutral_.ok("convert", tmp_path / "b.h5", tmp_path / "c.pt2")
    x = wide(7, 4)
    m.assert_close(run_keras_3(tmp_path / "b.h5", x), m.run_keras(model, x))
    m.assert_close(run_program(tmp_path / "c.pt2", x), m.run_keras(model, x))


def test_a_hard_sigmoid_in_a_saved_model(tmp_path: Path, neutral_: Commands) -> None:
    model = chain(K2.LSTM(4, recurrent_activation="hard_sigmoid", name="r"), shape=(5, 3))
    model.save(str(tmp_path / "a"), save_format="tf")
    keras.Sequential([keras.Input((5, 3)), L.LSTM(4, recurrent_activation="hard_sigmoid", name="r")]).save(
        tmp_path / "t.keras"
    )
    said = neutral_.refused("convert", tmp_path / "a", tmp_path / "b.keras", "--into", tmp_path / "t.keras")
    assert "hard_sigmoid_0.2" in said


# --- constants, and wiring that makes no sense ---


@SUFFIXES
@pytest.mark.parametrize("divided", [False, True])
def test_a_constant_to_the_left_of_an_operator(divided: bool, suffix: str, tmp_path: Path, neutral_: Commands) -> None:
    x = tf_keras.Input((4,))
    y = K2.Dense(3, name="a")(1 - x) + K2.Dense(3, name="b")(0.5 / (x * x + 2) if divided else 0.5 * x)
    model = m.randomized_keras_2(tf_keras.Model(x, 2 - y), 1)
    model.save(tmp_path / f"a.{suffix}")
    x = m.random(5, 4)
    neutral_.ok("convert", tmp_path / f"a.{suffix}", tmp_path / "b.pt2")
    m.assert_close(run_program(tmp_path / "b.pt2", x), model(x).numpy())
    if not divided:  # no layer of Keras divides a number by a tensor
        neutral_.ok("convert", tmp_path / f"a.{suffix}", tmp_path / "b.keras")
        m.assert_close(run_keras_3(tmp_path / "b.keras", x), model(x).numpy())


@SUFFIXES
@pytest.mark.parametrize("where", ["operator", "layer"])
def test_a_constant_that_is_no_number_costs_the_graph_alone(
    where: str, suffix: str, tmp_path: Path, neutral_: Commands
) -> None:
    x = tf_keras.Input((4,))
    ones = np.ones((1, 4), np.float32)
    y = ones - x if where == "operator" else K2.Add()([x, ones])
    model = m.randomized_keras_2(tf_keras.Model(x, K2.Dense(3)(y)), 1)
    model.save(tmp_path / f"a.{suffix}")
    assert "no graph" in neutral_.ok("export", tmp_path / f"a.{suffix}", tmp_path / "a.nwt")
    neutral_.ok("convert", tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    if where == "operator":  # Keras 2 cannot load a layer's constant itself
        x = m.random(5, 4)
        assert np.array_equal(run_keras_2(tmp_path / f"b.{suffix}", x), model(x))


@pytest.mark.parametrize("node", [[["nowhere", 0, 0, {}]], [["a", 7, 0, {}]], [["b", 0, 0, {}]]])
def test_wiring_that_makes_no_sense_costs_the_graph_alone(node: Any, tmp_path: Path, neutral_: Commands) -> None:
    """A legacy file names its variables."""
    x = tf_keras.Input((4,), name="x")
    model = m.randomized_keras_2(tf_keras.Model(x, K2.Dense(3, name="b")(K2.Dense(4, name="a")(x))), 1)
    model.save(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][2]["inbound_nodes"] = [node]
        file.attrs["model_config"] = json.dumps(config)
    assert "no graph" in neutral_.ok("export", tmp_path / "a.h5", tmp_path / "a.nwt")
    with neutral.open_archive(tmp_path / "a.nwt") as archive:
        assert {layer.path: layer.kind for layer in archive.manifest.layers} == {"a": "dense", "b": "dense"}
        assert np.array_equal(archive.tensor("a/kernel").read().T, model.get_weights()[0])


def test_settings_that_old_files_lack(tmp_path: Path) -> None:
    chain(K2.GRU(4, use_bias=False, reset_after=False), shape=(5, 3)).save(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        del config["config"]["layers"][1]["config"]["reset_after"]
        file.attrs["model_config"] = json.dumps(config)
    with neutral.export_model(tmp_path / "a.h5") as archive:
        assert archive.manifest.layers[0].reset_after is False


# --- `.keras` files of Keras 2 ---


def test_a_keras_file_of_keras_2_is_built_anew_for_keras_3(tmp_path: Path, neutral_: Commands) -> None:
    model = chain(
        K2.Conv2D(4, 3), K2.BatchNormalization(), K2.LeakyReLU(0.3), K2.Flatten(), K2.Dense(2), shape=(7, 9, 3)
    )
    model.save(tmp_path / "a.keras")
    x = m.random(2, 7, 9, 3)
    for goal in ("b.keras", "b.h5"):
        assert "a file of Keras 2" in neutral_.ok("convert", tmp_path / "a.keras", tmp_path / goal)
        m.assert_close(run_keras_3(tmp_path / goal, x), model(x).numpy())
    neutral_.ok("export", tmp_path / "a.keras", tmp_path / "a.nwt")
    neutral_.ok("import", tmp_path / "a.nwt", "--to", "keras", "-o", tmp_path / "c.keras")
    assert (tmp_path / "c.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "d.keras", "--into", tmp_path / "a.keras")
    assert (tmp_path / "d.keras").read_bytes() == (tmp_path / "a.keras").read_bytes()


def test_a_keras_file_of_keras_2_without_a_graph_stays_one(tmp_path: Path, neutral_: Commands) -> None:
    """Masks are not captured; attention is filed under names that Keras 3 does not use."""
    x = tf_keras.Input((5, 6))
    y = K2.MultiHeadAttention(2, 3)(x, x)
    model = m.randomized_keras_2(tf_keras.Model(x, K2.LSTM(4)(K2.Masking()(y))), 1)
    model.save(tmp_path / "a.keras")
    said = neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "b.keras")
    assert "written as a file of Keras 2" in said and "Masking" in said
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "b.h5")
    x = m.random(2, 5, 6)
    for goal in ("b.keras", "b.h5"):
        assert np.array_equal(run_keras_2(tmp_path / goal, x), model(x))
    with zipfile.ZipFile(tmp_path / "a.keras") as a, zipfile.ZipFile(tmp_path / "b.keras") as b:
        assert json.loads(a.read("config.json")) == json.loads(b.read("config.json"))
        versions = [json.loads(file.read("metadata.json"))["keras_version"] for file in (a, b)]
        assert versions[0] == versions[1]


# --- why there is no whole model ---


@pytest.mark.parametrize("goal", ["b.keras", "b.pt2", "b.savedmodel"])
def test_the_reason_for_a_missing_graph(goal: str, tmp_path: Path, neutral_: Commands) -> None:
    chain(K2.Masking(name="mask"), K2.LSTM(4), shape=(5, 3)).save(tmp_path / "a.h5")
    assert "an archive without a graph (mask: Masking" in neutral_.refused(
        "convert", tmp_path / "a.h5", tmp_path / goal
    )
    torch.save(torch.nn.Sequential(torch.nn.Unfold(2), torch.nn.Linear(3, 4)), tmp_path / "a.pt")
    if goal == "b.pt2":
        said = neutral_.refused("convert", tmp_path / "a.pt", tmp_path / goal)
        assert "an archive without a graph (0: no graph, because Unfold" in said


# --- an activation that is a layer has settings ---


def test_layers_as_activations_are_compared_with_their_settings(tmp_path: Path, neutral_: Commands) -> None:
    def model(k: Any, slope: float) -> Any:
        act = k.layers.LeakyReLU(slope)
        return k.Sequential([k.Input((5, 3)), k.layers.LSTM(4, activation=act, name="r")])

    m.randomized_keras_2(model(tf_keras, 0.1), 1).save(tmp_path / "a.h5")
    m.randomized_keras(model(keras, 0.1), 2).save(tmp_path / "same.keras")
    model(keras, 0.5).save(tmp_path / "other.keras")
    said = neutral_.refused("convert", tmp_path / "a.h5", tmp_path / "b.keras", "--into", tmp_path / "other.keras")
    assert "activation LeakyReLU(negative_slope=0.1)" in said and "LeakyReLU(negative_slope=0.5)" in said
    assert "LeakyReLU" in neutral_.refused("convert", tmp_path / "a.h5", tmp_path / "b.keras")
    neutral_.ok("convert", tmp_path / "a.h5", tmp_path / "b.keras", "--into", tmp_path / "same.keras")
    x = m.random(2, 5, 3)
    m.assert_close(run_keras_3(tmp_path / "b.keras", x), run_keras_2(tmp_path / "a.h5", x))
