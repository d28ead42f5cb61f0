"""A to an archive and back to A: names, order, dtypes, ties, bytes."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import safetensors
import safetensors.torch
import tensorflow as tf
import tf_keras
import torch
from torch import nn

import neutral
from tests.cases import models as m
from tests.cases.commands import Commands

L = keras.layers
DTYPES = (
    torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64, torch.float32,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def every_dtype() -> OrderedDict[str, torch.Tensor]:
    """Out of alphabetical order; 0-d and empty tensors, NaN and negative zero among them."""
    torch.manual_seed(0)
    state = OrderedDict((f"z{i}.weight", (torch.randn(3, 4) * 9).to(d)) for i, d in enumerate(DTYPES))
    state["odd.weight"] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    state["odd.scalar"] = torch.tensor(2.5, dtype=torch.float64)
    state["odd.empty"] = torch.zeros(0, 3)
    state["b.weight"] = torch.randn(4, 3).T
    state["a.weight"] = torch.randn(10)[3:7]
    return state


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), data.view(torch.uint8).numpy().tobytes() if data.numel() else b""


def through_archive(source: Path, out: Path, neutral_: Commands, *options: object) -> None:
    archive = out.with_name("between.nwt")
    neutral_.ok("export", source, archive)
    neutral_.ok("check", archive)
    neutral_.ok("import", archive, "-o", out, *options)


def test_a_state_dict_of_every_dtype(tmp_path: Path, neutral_: Commands) -> None:
    state = every_dtype()
    state["tied.weight"] = state["z5.weight"]
    torch.save(state, tmp_path / "a.pt")
    through_archive(tmp_path / "a.pt", tmp_path / "back.pt", neutral_, "--to", "torch")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == list(state)
    assert {name: raw(tensor) for name, tensor in back.items()} == {name: raw(tensor) for name, tensor in state.items()}
    assert back["tied.weight"].data_ptr() == back["z5.weight"].data_ptr()
    assert len({tensor.data_ptr() for tensor in back.values() if tensor.numel()}) == len(back) - 2


def test_a_state_dict_into_itself_is_the_same_file(tmp_path: Path, neutral_: Commands) -> None:
    torch.save({"epoch": 3, "state_dict": every_dtype()}, tmp_path / "a.pt")
    through_archive(tmp_path / "a.pt", tmp_path / "back.pt", neutral_, "--into", tmp_path / "a.pt")
    assert (tmp_path / "back.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_the_legacy_format_into_itself_is_the_same_file(tmp_path: Path, neutral_: Commands) -> None:
    torch.save(m.randomized(m.lenet5(), 1), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    through_archive(tmp_path / "a.pt", tmp_path / "back.pt", neutral_, "--into", tmp_path / "a.pt")
    assert (tmp_path / "back.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_safetensors_of_every_dtype(tmp_path: Path, neutral_: Commands) -> None:
    state = {name: tensor.contiguous() for name, tensor in every_dtype().items()}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    through_archive(tmp_path / "a.safetensors", tmp_path / "back.safetensors", neutral_)
    back = safetensors.torch.load_file(tmp_path / "back.safetensors")
    assert {name: raw(tensor) for name, tensor in back.items()} == {name: raw(tensor) for name, tensor in state.items()}
    with safetensors.safe_open(tmp_path / "back.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    neutral_.ok(
        "convert", tmp_path / "a.safetensors", tmp_path / "same.safetensors", "--into", tmp_path / "a.safetensors"
    )
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_bfloat16_by_way_of_npz(tmp_path: Path, neutral_: Commands) -> None:
    """numpy has no bfloat16: the file must say it in a way that is read again."""
    state = {"fc.weight": torch.randn(3, 4).to(torch.bfloat16), "fc.bias": torch.randn(3).to(torch.bfloat16)}
    torch.save(state, tmp_path / "a.pt")
    neutral_.ok("convert", tmp_path / "a.pt", tmp_path / "a.npz", "--flatten", "none")
    neutral_.ok("convert", tmp_path / "a.npz", tmp_path / "b.pt", "--into", tmp_path / "a.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_npz_of_many_dtypes(tmp_path: Path, neutral_: Commands) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "encoder/fc/kernel": rng.standard_normal((3, 4)),
        "encoder/fc/bias": np.asfortranarray(rng.standard_normal((4, 2))).astype(np.float16),
        "count": np.array(3),
        "mask": np.array([True, False]),
        "other.name": np.arange(6, dtype=np.int8).reshape(2, 3),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    through_archive(tmp_path / "a.npz", tmp_path / "back.npz", neutral_)
    with np.load(tmp_path / "a.npz") as saved, np.load(tmp_path / "back.npz") as back:
        assert back.files == saved.files
        assert all(back[n].dtype == saved[n].dtype and back[n].shape == saved[n].shape for n in saved.files)
        assert all(back[n].tobytes() == saved[n].tobytes() for n in saved.files)


def test_a_single_layer_has_no_path(tmp_path: Path, neutral_: Commands) -> None:
    """`nn.Linear` alone: its tensors lie in no layer."""
    module = m.randomized(nn.Linear(3, 4), 1)
    torch.save(module.state_dict(), tmp_path / "a.pt")
    through_archive(tmp_path / "a.pt", tmp_path / "back.pt", neutral_)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == ["weight", "bias"] and torch.equal(back["weight"], module.weight)
    neutral_.ok("import", tmp_path / "between.nwt", "--to", "numpy", "-o", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert sorted(arrays.files) == ["bias", "kernel"]
    model = keras.Sequential([keras.Input((3,)), L.Dense(4)])
    model.save(tmp_path / "t.keras")
    neutral_.ok("convert", tmp_path / "a.npz", tmp_path / "b.keras", "--into", tmp_path / "t.keras")
    x = m.random(2, 3)
    m.assert_close(m.run_keras(keras.models.load_model(tmp_path / "b.keras"), x), m.run_torch(module, x))


# --- Keras and TensorFlow ---


def many_layers() -> Any:
    x = inputs = keras.Input((8, 8, 2), name="image")
    x = L.Conv2D(3, 3, name="conv")(x)
    x = L.BatchNormalization(name="norm")(x)
    y = L.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = L.Add(name="add")([x, y])
    x = L.SeparableConv2D(4, 3, name="separable")(x)
    x = L.Reshape((16, 4), name="reshape")(x)
    x = L.Bidirectional(L.GRU(3), name="gru")(x)
    outputs = L.Dense(2, name="dense")(x)
    return m.randomized_keras(keras.Model(inputs, outputs), 1)


def equal_weights(a: Any, b: Any) -> bool:
    """The same names in the same order, the same dtypes, the same bytes."""
    return [(w.path, w.dtype, w.numpy().tobytes()) for w in a.weights] == [
        (w.path, w.dtype, w.numpy().tobytes()) for w in b.weights
    ]


def hdf5(path: Path) -> dict[str, object]:
    """All that a legacy file says: its config, its versions, the names of its weights in order, and the weights."""
    with h5py.File(path) as file:
        found: dict[str, object] = {**file.attrs, "model_config": json.loads(file.attrs["model_config"])}
        for name in file["model_weights"].attrs["layer_names"]:
            group = file["model_weights"][name.decode() if isinstance(name, bytes) else name]
            names = [n.decode() if isinstance(n, bytes) else n for n in group.attrs["weight_names"]]
            found[group.name] = [(n, group[n][()].tobytes()) for n in names]
    return found


@pytest.mark.parametrize("suffix", ["keras", "h5", "weights.h5"])
def test_keras_files(suffix: str, tmp_path: Path, neutral_: Commands) -> None:
    model = many_layers()
    source, back, same = (tmp_path / f"{name}.{suffix}" for name in ("a", "back", "same"))
    (model.save_weights if suffix == "weights.h5" else model.save)(source)
    through_archive(source, back, neutral_)
    neutral_.ok("import", tmp_path / "between.nwt", "--into", source, "-o", same)
    assert same.read_bytes() == source.read_bytes()
    if suffix == "h5":
        assert hdf5(back) == hdf5(source)
    if suffix == "weights.h5":
        found = keras.models.clone_model(model)
        found.load_weights(back)
        assert [w.numpy().tobytes() for w in found.weights] == [w.numpy().tobytes() for w in model.weights]
    else:
        found = keras.models.load_model(back, compile=False)
        # Loading renames what lies in a Bidirectional; the model to compare with has been loaded, too.
        loaded = keras.models.load_model(source, compile=False)
        assert equal_weights(found, loaded)
        assert found.get_config() == loaded.get_config()
    x = m.random(2, 8, 8, 2)
    assert np.array_equal(m.run_keras(found, x), m.run_keras(model, x))


def test_a_keras_2_file_is_loaded_by_keras_2_again(tmp_path: Path, neutral_: Commands) -> None:
    """Layers that current Keras cannot load from a legacy file, and a model in a model."""
    k = tf_keras.layers
    inner = tf_keras.Sequential([k.Dense(4), k.BatchNormalization(), k.Dense(3)])
    model = tf_keras.Sequential([tf_keras.Input((7, 3)), k.Bidirectional(k.LSTM(4, return_sequences=True)), inner])
    model.add(k.SeparableConv1D(3, 2))
    m.randomized_keras_2(model, 1).save(tmp_path / "a.h5")
    through_archive(tmp_path / "a.h5", tmp_path / "back.h5", neutral_)
    assert hdf5(tmp_path / "back.h5") == hdf5(tmp_path / "a.h5")
    x = m.random(2, 7, 3)
    assert np.array_equal(tf_keras.models.load_model(tmp_path / "back.h5", compile=False)(x), model(x))


def test_a_mixed_precision_and_a_float64_model(tmp_path: Path, neutral_: Commands) -> None:
    for policy in ("mixed_bfloat16", "bfloat16", "float16", "float64"):
        model = keras.Sequential([keras.Input((3,)), L.Dense(4, dtype=policy, name="a"), L.Dense(2, dtype=policy)])
        source, back = tmp_path / f"{policy}.keras", tmp_path / f"{policy}-back.keras"
        m.randomized_keras(model, 1).save(source)
        neutral_.ok("export", source, tmp_path / f"{policy}.nwt")
        neutral_.ok("import", tmp_path / f"{policy}.nwt", "--to", "keras", "-o", back)
        assert equal_weights(keras.models.load_model(back), keras.models.load_model(source))


def test_a_tensorflow_checkpoint_is_restored_by_tensorflow(tmp_path: Path, neutral_: Commands) -> None:
    model = many_layers()
    source = Path(tf.train.Checkpoint(model=model, step=tf.Variable(7)).write(str(tmp_path / "a")))
    neutral_.ok("export", source, tmp_path / "a.nwt")
    neutral_.ok("import", tmp_path / "a.nwt", "--to", "tensorflow", "-o", tmp_path / "back.ckpt")
    reader, again = (tf.train.load_checkpoint(str(tmp_path / name)) for name in ("a", "back.ckpt"))
    shapes = {name: shape for name, shape in reader.get_variable_to_shape_map().items() if "OBJECT_GRAPH" not in name}
    back = {name: shape for name, shape in again.get_variable_to_shape_map().items() if "OBJECT_GRAPH" not in name}
    weights = {name for name in shapes if "save_counter" not in name}
    assert weights <= set(back) | {"step/.ATTRIBUTES/VARIABLE_VALUE"}
    assert all(np.array_equal(reader.get_tensor(name), again.get_tensor(name)) for name in weights & set(back))
    fresh, step = m.randomized_keras(keras.models.clone_model(model), 5), tf.Variable(0)
    status = tf.train.Checkpoint(model=fresh, step=step).read(str(tmp_path / "back.ckpt"))
    status.assert_existing_objects_matched()
    assert [w.numpy().tobytes() for w in fresh.weights] == [w.numpy().tobytes() for w in model.weights]
    assert step.numpy() == 7


def test_tensorflow_files_into_themselves_are_the_same(tmp_path: Path, neutral_: Commands) -> None:
    model = many_layers()
    tf.train.Checkpoint(model=model).write(str(tmp_path / "a"))
    tf.saved_model.save(model, str(tmp_path / "saved"))
    neutral_.ok("convert", tmp_path / "a", tmp_path / "same", "--into", tmp_path / "a", "--to", "tensorflow")
    assert (tmp_path / "same.data-00000-of-00001").read_bytes() == (tmp_path / "a.data-00000-of-00001").read_bytes()
    neutral_.ok("convert", tmp_path / "saved", tmp_path / "saved2", "--into", tmp_path / "saved")
    files = sorted(p.relative_to(tmp_path / "saved") for p in (tmp_path / "saved").rglob("*") if p.is_file())
    assert files and all(
        (tmp_path / "saved" / p).read_bytes() == (tmp_path / "saved2" / p).read_bytes()
        for p in files
        if p.suffix != ".index"
    )


# --- more than one set of weights, prefixes, optimizers ---


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_averaged_weights_beside_raw_ones(tmp_path: Path, neutral_: Commands) -> None:
    module, _ = trained()
    raw_weights, averaged = module.state_dict(), m.randomized(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 3)
    torch.save({"model": raw_weights, "model_ema": averaged.state_dict(), "epoch": 1}, tmp_path / "a.pt")
    for key, expected in (("model", raw_weights), ("model_ema", averaged.state_dict())):
        neutral_.ok("export", tmp_path / "a.pt", tmp_path / f"{key}.nwt", "--key", key)
        neutral_.ok("import", tmp_path / f"{key}.nwt", "--to", "torch", "-o", tmp_path / f"{key}.pt")
        back = torch.load(tmp_path / f"{key}.pt", weights_only=True)
        assert list(back) == list(expected) and all(torch.equal(back[name], expected[name]) for name in back)
    assert neutral_.ok("digest", tmp_path / "a.pt", "--key", "model_ema") != neutral_.ok(
        "digest", tmp_path / "a.pt", "--key", "model"
    )
    said = neutral_.refused("export", tmp_path / "a.pt", tmp_path / "no.nwt", "--key", "nothing")
    assert "model" in said and "model_ema" in said
    said = neutral_.refused("export", tmp_path / "a.pt", tmp_path / "no.nwt")
    assert "--key model, --key model_ema" in said
    assert not (tmp_path / "no.nwt").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_are_left_out_of_paths_and_come_back_in_names(prefix: str, tmp_path: Path, neutral_: Commands) -> None:
    module, _ = trained()
    state = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    through_archive(tmp_path / "a.pt", tmp_path / "back.pt", neutral_)
    with neutral.open_archive(tmp_path / "between.nwt") as archive:
        assert [layer.path for layer in archive.manifest.layers] == ["0", "1"]
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in back)
    torch.save(module.state_dict(), tmp_path / "plain.pt")
    assert neutral.digest(tmp_path / "a.pt") == neutral.digest(tmp_path / "plain.pt")


def test_data_parallel_itself(tmp_path: Path, neutral_: Commands) -> None:
    module, _ = trained()
    torch.save(nn.DataParallel(module).state_dict(), tmp_path / "a.pt")
    torch.save(module, tmp_path / "template.pt")
    neutral_.ok("convert", tmp_path / "a.pt", tmp_path / "b.pt", "--into", tmp_path / "template.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "template.pt").read_bytes()


def test_an_optimizer_is_kept_beside_the_weights(tmp_path: Path, neutral_: Commands) -> None:
    module, optimizer = trained()
    torch.save(
        {"model_state_dict": module.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, tmp_path / "a.pt"
    )
    neutral_.ok("export", tmp_path / "a.pt", tmp_path / "a.nwt")
    neutral_.ok("check", tmp_path / "a.nwt")
    with neutral.open_archive(tmp_path / "a.nwt") as archive:
        (kept,) = archive.manifest.collections.values()
        assert len(kept) == 12  # step, exp_avg and exp_avg_sq of four parameters
        assert sum("exp_avg_sq" in name for name in kept) == 4
        torch.save(module.state_dict(), tmp_path / "plain.pt")
        assert archive.manifest.weights_digest == neutral.digest(tmp_path / "plain.pt")
    neutral_.ok("import", tmp_path / "a.nwt", "--into", tmp_path / "a.pt", "-o", tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_a_keras_optimizer_is_kept_too(tmp_path: Path, neutral_: Commands) -> None:
    model = keras.Sequential([keras.Input((3,)), L.Dense(4, name="a"), L.Dense(2, name="b")])
    model.compile("adam", "mse")
    model.fit(m.random(4, 3), m.random(4, 2), verbose=0)
    model.save(tmp_path / "a.keras")
    neutral_.ok("export", tmp_path / "a.keras", tmp_path / "a.nwt")
    with neutral.open_archive(tmp_path / "a.nwt") as archive:
        assert [len(kept) for kept in archive.manifest.collections.values()] == [10]
    neutral_.ok("import", tmp_path / "a.nwt", "--into", tmp_path / "a.keras", "-o", tmp_path / "b.keras")
    assert (tmp_path / "b.keras").read_bytes() == (tmp_path / "a.keras").read_bytes()


def test_the_same_input_gives_the_same_archive(tmp_path: Path, neutral_: Commands) -> None:
    many_layers().save(tmp_path / "a.keras")
    for name in ("one.nwt", "two.nwt"):
        neutral_.ok("export", tmp_path / "a.keras", tmp_path / name)
    assert (tmp_path / "one.nwt").read_bytes() == (tmp_path / "two.nwt").read_bytes()
    with safetensors.safe_open(tmp_path / "one.nwt", "np") as opened:
        assert list(opened.metadata()) == ["neutral"] and "conv/kernel" in opened.keys()  # noqa: SIM118
