"""Checkpoints and SavedModels that neutral wrote, taken by TensorFlow and Keras."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import neutral
from neutral.containers.tensor_bundle import Strings
from neutral.containers.tensor_bundle_writing import write_bundle
from neutral.errors import BadFile, Refused, Unsupported
from neutral.exporters.tensorflow import read, read_live
from neutral.importers.tensorflow import build, fill, fill_live
from neutral.native import NativeLayer, NativeModel, NativeTensor, Tensor, from_array
from neutral.schema.manifest import Manifest, Source

L = keras.layers
NO_GRAPH = Manifest(source=Source(framework="torch", format="pt"), layers=(), weights_digest="0" * 64)


def randomised(model: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.1, 1, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def network() -> Any:
    inner = keras.Sequential(
        [keras.Input((5,)), L.Dense(5, name="stem"), L.BatchNormalization(name="bn")], name="inner"
    )
    start = keras.Input((5,), name="start")
    return randomised(keras.Model(start, L.Dense(3, name="head")(inner(L.Dense(5, name="stem")(start)))))


def own(model: NativeModel) -> dict[str, Tensor]:
    """All tensors of a file by native name."""
    others = (tensor for found in model.collections.values() for tensor in found)
    return {tensor.name: tensor.data for tensor in (*model.tensors(), *others)}


def doubled(model: NativeModel) -> dict[str, Tensor]:
    return {tensor.name: from_array(tensor.data.read() * 2) for tensor in model.tensors()}


def same_files(a: Path, b: Path) -> None:
    names = sorted(path.relative_to(a) for path in a.rglob("*"))
    assert names == sorted(path.relative_to(b) for path in b.rglob("*"))
    for name in names:
        assert (a / name).is_dir() or (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_checkpoint_filled_with_itself_is_itself(tmp_path: Path) -> None:
    live = network()
    optimizer = keras.optimizers.Adam()
    optimizer.build(live.trainable_variables)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    prefix = Path(tf.train.Checkpoint(model=live, opt=optimizer).write(str(tmp_path / "a" / "x")))
    fill(prefix, own(read(prefix)), tmp_path / "b" / "x")
    same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("suffix", ["", ".index"])
def test_a_filled_checkpoint_is_restored(tmp_path: Path, suffix: str) -> None:
    live = network()
    prefix = Path(tf.train.Checkpoint(model=live).write(str(tmp_path / "x")))
    fill(prefix, doubled(read(prefix)), tmp_path / f"new.ckpt{suffix}")
    fresh = network()
    tf.train.Checkpoint(model=fresh).read(str(tmp_path / "new.ckpt")).assert_consumed()
    assert all(np.array_equal(a, 2 * b) for a, b in zip(fresh.get_weights(), live.get_weights(), strict=True))


def test_a_saved_model_filled_with_itself_is_itself(tmp_path: Path) -> None:
    network().export(str(tmp_path / "a"), verbose=False)
    fill(tmp_path / "a", own(read(tmp_path / "a")), tmp_path / "b")
    same_files(tmp_path / "a", tmp_path / "b")


def test_a_filled_saved_model_computes_with_the_new_weights(tmp_path: Path) -> None:
    """The functions of a Keras 3 export run on its second copy of the variables."""
    live, other = network(), randomised(network(), 7)
    live.export(str(tmp_path / "a"), verbose=False)
    other.export(str(tmp_path / "other"), verbose=False)
    given = {
        (layer.path, local): tensor
        for layer in read(tmp_path / "other").layers
        for local, tensor in layer.tensors.items()
    }
    model = read(tmp_path / "a")
    new = {t.name: given[layer.path, local].data for layer in model.layers for local, t in layer.tensors.items()}
    fill(tmp_path / "a", new, tmp_path / "b")
    x = np.random.default_rng(0).normal(size=(4, 5)).astype("f4")
    loaded = tf.saved_model.load(str(tmp_path / "b"))
    computed = loaded.serve(x)
    np.testing.assert_allclose(computed, other(x), atol=1e-6)
    assert np.abs(computed - live(x)).max() > 0.1
    changed = {
        p.name
        for p in (tmp_path / "a").rglob("*")
        if p.is_file() and p.read_bytes() != (tmp_path / "b" / p.relative_to(tmp_path / "a")).read_bytes()
    }
    assert changed == {"variables.index", "variables.data-00000-of-00001"}


def test_copies_that_cannot_be_told_apart_are_filled_alike_or_refused(tmp_path: Path) -> None:
    """Two subclassed layers whose variables have one name and the same zeros."""

    class Pair(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = L.Dense(3), L.Dense(3)

        def call(self, x: Any) -> Any:
            return self.two(self.one(x))

    live = Pair()
    live(np.zeros((1, 3), "f4"))
    live.export(str(tmp_path / "a"), verbose=False)
    model = read(tmp_path / "a")
    biases = [layer.tensors["bias"] for layer in model.layers]
    assert len(biases) == 2
    ones = from_array(np.ones(3, "f4"))
    fill(tmp_path / "a", {bias.name: ones for bias in biases}, tmp_path / "b")
    x = np.zeros((1, 3), "f4")
    expected = np.ones((1, 3), "f4") @ live.two.kernel.numpy() + 1
    loaded = tf.saved_model.load(str(tmp_path / "b"))
    np.testing.assert_allclose(loaded.serve(x), expected, atol=1e-6)
    with pytest.raises(Refused, match="same name and values"):
        fill(tmp_path / "a", {biases[0].name: ones, biases[1].name: from_array(np.zeros(3, "f4"))}, tmp_path / "c")
    with pytest.raises(Refused, match="same name and values"):
        fill(tmp_path / "a", {biases[0].name: ones}, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_keras_2_saved_model_is_filled(tmp_path: Path) -> None:
    live = randomised(
        tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,)), tf_keras.layers.BatchNormalization()])
    )
    live.save(str(tmp_path / "a"), save_format="tf")
    fill(tmp_path / "a", doubled(read(tmp_path / "a")), tmp_path / "b")
    loaded = tf_keras.models.load_model(str(tmp_path / "b"), compile=False)
    assert all(np.array_equal(a, 2 * b) for a, b in zip(loaded.get_weights(), live.get_weights(), strict=True))


def test_links_in_a_saved_model_are_refused(tmp_path: Path) -> None:
    network().export(str(tmp_path / "a"), verbose=False)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "a" / "assets" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BadFile, match="link"):
        fill(tmp_path / "a", {}, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "secret"]


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    prefix = Path(tf.train.Checkpoint(model=network()).write(str(tmp_path / "x")))
    network().export(str(tmp_path / "a"), verbose=False)
    before = sorted(path.name for path in tmp_path.iterdir())
    for source in (prefix, tmp_path / "a"):
        with pytest.raises(Refused, match="input itself"):
            fill(source, {}, source, force=True)
        with pytest.raises(Refused):
            fill(source, {"nothing": from_array(np.ones(1))}, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_checkpoint_built_again_is_object_based(tmp_path: Path) -> None:
    live = network()
    optimizer = keras.optimizers.Adam()
    optimizer.build(live.trainable_variables)
    prefix = Path(
        tf.train.Checkpoint(model=live, opt=optimizer, step=tf.Variable(3, dtype=tf.int64)).save(str(tmp_path / "x"))
    )
    build(read(prefix), NO_GRAPH, tmp_path / "new.ckpt")
    fresh = randomised(network(), 5)
    other = keras.optimizers.Adam()
    other.build(fresh.trainable_variables)
    restored = tf.train.Checkpoint(model=fresh, opt=other, step=tf.Variable(0, dtype=tf.int64))
    restored.restore(str(tmp_path / "new.ckpt")).assert_consumed()
    assert all(np.array_equal(a, b) for a, b in zip(fresh.get_weights(), live.get_weights(), strict=True))
    assert int(restored.step) == 3
    assert own(read(prefix)).keys() == own(read(tmp_path / "new.ckpt")).keys()


def test_a_checkpoint_without_its_optimizer_is_restored_too(tmp_path: Path) -> None:
    live = network()
    optimizer = keras.optimizers.Adam()
    optimizer.build(live.trainable_variables)
    prefix = Path(tf.train.Checkpoint(model=live, opt=optimizer).write(str(tmp_path / "x")))
    model = read(prefix)
    build(
        NativeModel("tensorflow", "checkpoint", model.layers, metadata=model.metadata), NO_GRAPH, tmp_path / "new.ckpt"
    )
    fresh = randomised(network(), 5)
    tf.train.Checkpoint(model=fresh).read(str(tmp_path / "new.ckpt")).expect_partial().assert_existing_objects_matched()
    assert all(np.array_equal(a, b) for a, b in zip(fresh.get_weights(), live.get_weights(), strict=True))


def test_a_checkpoint_of_a_saved_model_has_both_copies(tmp_path: Path) -> None:
    network().export(str(tmp_path / "a"), verbose=False)
    build(read(tmp_path / "a"), NO_GRAPH, tmp_path / "new")
    theirs = tf.train.load_checkpoint(str(tmp_path / "a" / "variables" / "variables"))
    ours = tf.train.load_checkpoint(str(tmp_path / "new"))
    assert ours.get_variable_to_shape_map() == theirs.get_variable_to_shape_map()
    for name in theirs.get_variable_to_shape_map():
        assert np.array_equal(ours.get_tensor(name), theirs.get_tensor(name))


def layer(path: str, **arrays: np.ndarray) -> NativeLayer:
    return NativeLayer(path, None, {n: NativeTensor(f"foreign {path} {n}", from_array(a)) for n, a in arrays.items()})


def test_without_an_object_graph_keys_are_layer_and_name(tmp_path: Path) -> None:
    kernel, table = np.random.default_rng(0).normal(size=(2, 3)), np.ones((4, 2), "f2")
    model = NativeModel("torch", "pt", (layer("encoder.fc", kernel=kernel), layer("emb", embeddings=table)))
    build(model, NO_GRAPH, tmp_path / "x.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt.data-00000-of-00001", "x.ckpt.index"]
    reader = tf.train.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert reader.get_variable_to_shape_map() == {"encoder/fc/kernel": [2, 3], "emb/embeddings": [4, 2]}
    assert np.array_equal(reader.get_tensor("encoder/fc/kernel"), kernel)
    assert [found.path for found in read(tmp_path / "x.ckpt").layers] == ["emb", "encoder.fc"]
    with pytest.raises(Refused, match="two tensors"):
        build(NativeModel("torch", "pt", (layer("a.b", c=kernel), layer("a/b", c=kernel))), NO_GRAPH, tmp_path / "y")


def test_strings_come_back(tmp_path: Path) -> None:
    words = Strings((2,), (b"a", b"\xff"))
    write_bundle(tmp_path / "x", {"d/kernel": from_array(np.ones((2, 3)))}, {"words": words})
    build(read(tmp_path / "x"), NO_GRAPH, tmp_path / "y")
    assert list(tf.train.load_checkpoint(str(tmp_path / "y")).get_tensor("words")) == [b"a", b"\xff"]


def test_a_saved_model_is_made_from_a_graph(tmp_path: Path) -> None:
    live = network()
    live.save(tmp_path / "x.keras")
    neutral.convert(tmp_path / "x.keras", tmp_path / "x.savedmodel", to="tensorflow")
    x = np.random.default_rng(0).normal(size=(4, 5)).astype("f4")
    loaded = tf.saved_model.load(str(tmp_path / "x.savedmodel"))
    np.testing.assert_allclose(loaded.serve(x), live(x), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.keras", "x.savedmodel"]


def test_a_saved_model_needs_a_graph(tmp_path: Path) -> None:
    model = NativeModel("torch", "pt", (layer("d", kernel=np.ones((2, 3))),))
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "x.savedmodel", tmp_path / "folder"):
        with pytest.raises(Refused, match="without a graph"):
            build(model, NO_GRAPH, out)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_saved_model_needs_the_frameworks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NativeModel("torch", "pt", (layer("d", kernel=np.ones((2, 3))),))
    some_graph = cast(Manifest, type("SomeGraph", (), {"graph": object()}))
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(Unsupported, match=r"keras missing.*install neutral-weights\[tensorflow\]"):
        build(model, some_graph, tmp_path / "x.savedmodel")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    model = NativeModel("torch", "pt", (layer("d", kernel=np.ones((2, 3))),))
    with pytest.raises(Refused, match="No space left"):
        build(model, NO_GRAPH, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_live_objects_are_filled_in_place() -> None:
    class Block(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(np.arange(6, dtype="f4").reshape(2, 3))
            self.parts = [tf.Variable([1.0, 2.0])]

    block = Block()
    model = read_live(block)
    fill_live(block, doubled(model))
    assert np.array_equal(block.w, 2 * np.arange(6).reshape(2, 3))
    assert np.array_equal(block.parts[0], [2, 4])
    with pytest.raises(Refused):
        fill_live(block, {"nothing": from_array(np.ones(1))})
    given = {"d/kernel": tf.Variable(tf.zeros([2, 3]))}
    fill_live(given, {"d/kernel": from_array(np.ones((2, 3), "f4"))})
    assert float(tf.reduce_sum(given["d/kernel"])) == 6
    with pytest.raises(Refused) as caught:
        fill_live(given, {"d/kernel": from_array(np.ones((3, 2), "f4")), "e": from_array(np.ones(1))})
    assert len(caught.value.problems) == 2
