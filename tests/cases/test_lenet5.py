"""LeNet-5 in torch and Keras, both directions, with and without a template: outputs and activations agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import neutral
import neutral.cli
from neutral.errors import Refused
from tests.cases import models as m
from tests.cases.commands import Commands

X = m.random(3, 1, 28, 28)
X_LAST = m.channels_last(X)
KINDS = ("--kind", "[036]=conv", "--kind", "*11=dense", "--kind", "9=dense")
FLATTEN = ("--flatten", "9=120")


@pytest.fixture(scope="module")
def source() -> Any:
    return m.randomized(m.lenet5(), 1)


@pytest.fixture(scope="module")
def keras_source() -> Any:
    return m.randomized_keras(m.lenet5_keras(), 2)


@pytest.fixture(scope="module")
def torch_files(source: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every way that torch saves them."""
    folder = tmp_path_factory.mktemp("torch")
    files = {name: folder / f"{name}.pt" for name in ("lenet5", "own_class", "state", "checkpoint", "legacy")}
    own = m.LeNet5()
    own.load_state_dict(dict(zip(own.state_dict(), source.state_dict().values(), strict=True)))
    torch.save(source, files["lenet5"])
    m.save(own.eval(), files["own_class"])
    torch.save(source.state_dict(), files["state"])
    torch.save({"model_state_dict": source.state_dict(), "epoch": 3}, files["checkpoint"])
    m.save(own.eval(), files["legacy"], _use_new_zipfile_serialization=False)
    return files


@pytest.fixture(scope="module")
def keras_files(keras_source: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every way that Keras and TensorFlow save them."""
    folder = tmp_path_factory.mktemp("keras")
    files = {name: folder / f"lenet5.{name}" for name in ("keras", "h5", "weights.h5", "savedmodel", "exported")}
    for name in ("keras", "h5", "weights.h5"):
        (keras_source.save_weights if name == "weights.h5" else keras_source.save)(files[name])
    tf.saved_model.save(keras_source, str(files["savedmodel"]))
    keras_source.export(files["exported"], verbose=False)
    files["checkpoint"] = Path(tf.train.Checkpoint(model=keras_source).save(str(folder / "ckpt")))
    return files


@pytest.fixture(scope="module")
def torch_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "template.pt"
    torch.save(m.randomized(m.lenet5(), 3), path)
    return path


@pytest.fixture(scope="module")
def own_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return m.save(m.randomized(m.LeNet5(), 3), tmp_path_factory.mktemp("template") / "template.pt")


def torch_activations(module: torch.nn.Sequential) -> Iterator[tuple[str, np.ndarray]]:
    value = torch.from_numpy(X)
    with torch.no_grad():
        for name, layer in module.named_children():
            value = layer(value)
            yield name, value.numpy()


def keras_activations(model: Any) -> dict[str, np.ndarray]:
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    probe = keras.Model(model.inputs, [layer.output for layer in layers])
    found = probe([X_LAST], training=False)
    return {
        layer.name: m.channels_first(keras.ops.convert_to_numpy(value))
        for layer, value in zip(layers, found, strict=True)
    }


def agree_everywhere(model: Any, module: torch.nn.Sequential) -> None:
    """Every one of the twelve layers computes the same, and so does the whole."""
    found = keras_activations(model)
    compared = [name for name, expected in torch_activations(module) if m.assert_close(found[name], expected) is None]
    assert len(compared) == 12
    m.assert_close(m.run_keras(model, X_LAST), m.run_torch(module, X))


# --- torch to Keras ---


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_out_of_a_pickle_without_a_template(
    suffix: str, source: Any, torch_files: dict[str, Path], tmp_path: Path, neutral_: Commands
) -> None:
    archive, out = tmp_path / "lenet5.nwt", tmp_path / f"lenet5{suffix}"
    neutral_.ok("export", torch_files["lenet5"], archive)
    neutral_.ok("check", archive)
    neutral_.ok("import", archive, "--to", "keras", "-o", out)
    agree_everywhere(keras.models.load_model(out, compile=False), source)


def test_the_default_output_is_a_keras_file(torch_files: dict[str, Path], tmp_path: Path, neutral_: Commands) -> None:
    archive = tmp_path / "lenet5.nwt"
    neutral_.ok("export", torch_files["lenet5"], archive)
    neutral_.ok("import", archive, "--to", "keras")
    assert keras.models.load_model(tmp_path / "lenet5.keras").count_params() == 61706
    assert "lenet5.keras" in neutral_.refused("import", archive, "--to", "keras")


@pytest.mark.parametrize("name", ["lenet5", "own_class", "state", "checkpoint", "legacy"])
@pytest.mark.parametrize("into", ["keras", "h5", "weights.h5"])
def test_every_torch_file_into_every_keras_template(
    name: str, into: str, source: Any, torch_files: dict[str, Path], keras_files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / f"out.{into}"
    flatten = None
    if into == "weights.h5" and name != "lenet5":
        # Neither side has a graph: only the flag can tell.
        behind = "classifier.1" if name in ("own_class", "legacy") else "9"
        with pytest.raises(Refused, match=f"--flatten {behind}=CHANNELS"):
            neutral.convert(torch_files[name], out, into=keras_files[into])
        assert list(tmp_path.iterdir()) == []
        flatten = {behind: "120"}
    neutral.convert(torch_files[name], out, into=keras_files[into], flatten=flatten)
    if into == "weights.h5":
        model = m.lenet5_keras()
        model.load_weights(out)
    else:
        model = keras.models.load_model(out, compile=False)
    agree_everywhere(model, source)


@pytest.mark.parametrize("name", ["checkpoint", "savedmodel", "exported"])
def test_into_a_tensorflow_template(
    name: str, source: Any, torch_files: dict[str, Path], keras_files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    neutral.convert(torch_files["lenet5"], out, into=keras_files[name])
    if name == "checkpoint":
        model = m.lenet5_keras()
        tf.train.Checkpoint(model=model).restore(str(out)).assert_existing_objects_matched()
        found = m.run_keras(model, X_LAST)
    else:
        found = served(out)
    m.assert_close(found, m.run_torch(source, X))


def served(folder: Path) -> np.ndarray:
    """What the SavedModel's own signature answers."""
    loaded = tf.saved_model.load(str(folder))
    function = loaded.signatures.get("serving_default") or loaded.signatures["serve"]
    (name,) = function.structured_input_signature[1]
    return next(iter(function(**{name: tf.constant(X_LAST)}).values())).numpy()


def test_a_saved_model_made_from_the_graph(source: Any, torch_files: dict[str, Path], tmp_path: Path) -> None:
    neutral.convert(torch_files["lenet5"], tmp_path / "lenet5.savedmodel")
    m.assert_close(served(tmp_path / "lenet5.savedmodel"), m.run_torch(source, X))


def test_weights_and_checkpoint_without_a_template(source: Any, torch_files: dict[str, Path], tmp_path: Path) -> None:
    model = m.lenet5_keras()
    neutral.convert(torch_files["lenet5"], tmp_path / "lenet5.weights.h5")
    model.load_weights(tmp_path / "lenet5.weights.h5")
    agree_everywhere(model, source)
    neutral.convert(torch_files["lenet5"], tmp_path / "lenet5.ckpt", to="tensorflow")
    reader = tf.train.load_checkpoint(str(tmp_path / "lenet5.ckpt"))
    held = [reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in name]
    assert sorted(a.tobytes() for a in held) == sorted(w.numpy().tobytes() for w in model.weights)


# --- a bare state dict ---


def test_a_state_dict_is_refused_with_the_flags_that_settle_it(
    torch_files: dict[str, Path], tmp_path: Path, neutral_: Commands
) -> None:
    said = neutral_.refused("convert", torch_files["state"], tmp_path / "out.weights.h5")
    assert "--kind '0=KIND'" in said and "conv, conv_transpose" in said and "--flatten 9=CHANNELS" in said
    said = neutral_.refused("convert", torch_files["state"], tmp_path / "out.weights.h5", *KINDS)
    assert "--kind" not in said and "--flatten 9=CHANNELS" in said
    assert list(tmp_path.iterdir()) == []


def test_a_state_dict_with_hints(source: Any, torch_files: dict[str, Path], tmp_path: Path, neutral_: Commands) -> None:
    archive, out = tmp_path / "state.nwt", tmp_path / "state.weights.h5"
    neutral_.ok("export", torch_files["state"], archive, *KINDS, *FLATTEN)
    assert "order of the layers" in neutral_.ok("import", archive, "--to", "keras")
    model = m.lenet5_keras()
    model.load_weights(out)
    agree_everywhere(model, source)


def test_a_flatten_of_many_positions_is_never_guessed(tmp_path: Path) -> None:
    """16 channels of 5 by 5, flattened in `forward`: only the template or the flag tells."""
    module, model = m.randomized(m.WideLeNet5(), 4), m.wide_lenet5_keras()
    path, template = m.save(module, tmp_path / "wide.pt"), tmp_path / "template.keras"
    model.save(template)
    expected = m.run_torch(module, X)
    with pytest.raises(Refused, match=r"fc1: .* --flatten fc1=CHANNELS"):
        neutral.convert(path, tmp_path / "no.weights.h5")
    neutral.convert(path, tmp_path / "told.weights.h5", flatten={"fc1": "16"})
    model.load_weights(tmp_path / "told.weights.h5")
    m.assert_close(m.run_keras(model, X_LAST), expected)
    neutral.convert(path, tmp_path / "into.keras", into=template)
    m.assert_close(m.run_keras(keras.models.load_model(tmp_path / "into.keras"), X_LAST), expected)
    m.randomized_keras(model, 5).save(tmp_path / "back.keras")
    neutral.convert(tmp_path / "back.keras", tmp_path / "back.pt", into=path)
    m.assert_close(m.run_torch(m.load(tmp_path / "back.pt"), X), m.run_keras(model, X_LAST))


def test_a_wrong_number_of_channels_is_refused(torch_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="9"):
        neutral.export_model(torch_files["state"], tmp_path / "a.nwt", flatten={"9": "7"})
    assert list(tmp_path.iterdir()) == []


# --- Keras to torch ---


@pytest.mark.parametrize("name", ["keras", "h5", "weights.h5", "checkpoint", "savedmodel", "exported"])
@pytest.mark.parametrize("whole", [True, False])
def test_every_keras_file_into_a_torch_template(
    name: str,
    whole: bool,
    keras_source: Any,
    keras_files: dict[str, Path],
    torch_template: Path,
    own_template: Path,
    tmp_path: Path,
    neutral_: Commands,
) -> None:
    archive, out = tmp_path / "keras.nwt", tmp_path / "out.pt"
    template = torch_template if whole else own_template
    neutral_.ok("export", keras_files[name], archive)
    if not whole and name not in ("keras", "h5"):
        # Neither side has a graph: only the flag can tell.
        assert "--flatten 9=CHANNELS" in neutral_.refused("import", archive, "--into", template, "-o", out)
        neutral_.ok("export", keras_files[name], archive, "--flatten", "9=120", "--force")
    explained = neutral_.ok("import", archive, "--into", template, "-o", out, "--explain")
    assert explained.count("only layer of its kind and shapes") + explained.count(" name") >= 5
    module = m.load(out)
    if whole:
        agree_everywhere(keras_source, module)
    m.assert_close(m.run_torch(module, X), m.run_keras(keras_source, X_LAST))


@pytest.mark.parametrize("name", ["keras", "h5"])
def test_keras_to_torch_without_a_template(
    name: str, keras_source: Any, keras_files: dict[str, Path], tmp_path: Path, neutral_: Commands
) -> None:
    expected = m.run_keras(keras_source, X_LAST)
    neutral_.ok("convert", keras_files[name], tmp_path / "state.pt", "--to", "torch")
    module = m.lenet5()
    module.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    agree_everywhere(keras_source, module)
    neutral_.ok("convert", keras_files[name], tmp_path / "state.safetensors")
    from safetensors.torch import load_file

    module = m.randomized(m.lenet5(), 9)
    module.load_state_dict(load_file(tmp_path / "state.safetensors"))
    m.assert_close(m.run_torch(module, X), expected)
    neutral_.ok("convert", keras_files[name], tmp_path / "whole.pt2")
    program = torch.export.load(tmp_path / "whole.pt2")
    m.assert_close(m.run_torch(program.module(), X), expected)


def test_torch_to_an_exported_program(source: Any, torch_files: dict[str, Path], tmp_path: Path) -> None:
    neutral.convert(torch_files["lenet5"], tmp_path / "lenet5.pt2")
    program = torch.export.load(tmp_path / "lenet5.pt2")
    m.assert_close(m.run_torch(program.module(), X), m.run_torch(source, X), 0)


# --- npz and safetensors ---


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_by_way_of_a_plain_file_of_arrays(
    suffix: str, source: Any, torch_files: dict[str, Path], keras_files: dict[str, Path], tmp_path: Path
) -> None:
    between, out = tmp_path / f"lenet5{suffix}", tmp_path / "out.keras"
    neutral.convert(torch_files["lenet5"], between)
    if suffix == ".npz":
        with np.load(between) as arrays:
            assert sorted(arrays)[:2] == ["0/bias", "0/kernel"] and len(arrays) == 10
            assert np.array_equal(arrays["0/kernel"], source[0].weight.numpy(force=True))
    neutral.convert(between, out, into=keras_files["keras"])
    agree_everywhere(keras.models.load_model(out), source)


# --- the same weights, and back again ---


def test_there_and_back_is_the_same_file(torch_files: dict[str, Path], tmp_path: Path, neutral_: Commands) -> None:
    """torch to a Keras model made from the graph, and from it into the pickle it came from: not one byte differs."""
    back = tmp_path / "back.pt"
    neutral_.ok("convert", torch_files["lenet5"], tmp_path / "lenet5.keras")
    neutral_.ok("convert", tmp_path / "lenet5.keras", back, "--into", torch_files["lenet5"])
    assert back.read_bytes() == torch_files["lenet5"].read_bytes()
    assert "same weights" in neutral_.ok("diff", tmp_path / "lenet5.keras", torch_files["lenet5"])


def test_verify_runs_both_and_tells_equal_from_different(
    torch_files: dict[str, Path], torch_template: Path, tmp_path: Path, neutral_: Commands
) -> None:
    out = tmp_path / "lenet5.keras"
    neutral_.ok("convert", torch_files["lenet5"], out)
    shape = ("--input-shape", "2,1,28,28")
    assert "same: the largest difference" in neutral_.ok("verify", torch_files["lenet5"], out, *shape)
    assert neutral.cli.main(["verify", str(torch_template), str(out), *shape]) == 1
