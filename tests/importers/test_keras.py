"""Keras files filled and built without Keras, loaded by Keras 3 and Keras 2: same outputs, nothing else touched."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import onnx
import pytest
import tf_keras

import neutral
from neutral.containers.files import new_file
from neutral.errors import Refused
from neutral.exporters.keras import read, read_live
from neutral.importers.keras import fill, fill_live, write_keras, write_legacy, write_weights
from neutral.native import NativeLayer, NativeTensor, Tensor, from_array
from tests.keras_models import BOTH, THREE, Subclassed, made, randomized

FORMATS = ["x.keras", "x.h5", "x.weights.h5"]
CASES = [(name, keras, BOTH[name]) for name in ("sequential", "recurrent", "nested")]
CASES += [(name, tf_keras, BOTH[name]) for name in ("sequential", "recurrent")] + [("custom", keras, THREE["custom"])]
IDS = [f"{name}-{k.__name__}" for name, k, _ in CASES]


def save(model: Any, path: Path) -> Path:
    model.save_weights(path) if path.name.endswith("weights.h5") else model.save(path)
    return path


def inputs(model: Any) -> Any:
    rng = np.random.default_rng(7)
    return [rng.normal(size=(2, *x.shape[1:])).astype("float32") for x in model.inputs]


def output(model: Any, x: Any) -> list[np.ndarray[Any, Any]]:
    found = model(x if len(x) > 1 else x[0], training=False)
    return [np.asarray(each) for each in (found if isinstance(found, (list, tuple)) else [found])]


def same(first: Any, second: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def values(path: Path) -> dict[str, Tensor]:
    return {tensor.name: tensor.data for tensor in read(path).tensors()}


@pytest.mark.parametrize(("name", "k", "build"), CASES, ids=IDS)
def test_a_filled_template_is_the_other_model(tmp_path: Path, name: str, k: Any, build: Any) -> None:
    model, other = made(build, k, 1), made(build, k, 2)
    x = inputs(model)
    expected, before = output(model, x), output(other, x)
    assert not same(expected, before)
    for kind in FORMATS:
        source, template = save(model, tmp_path / f"a{kind}"), save(other, tmp_path / f"b{kind}")
        out = tmp_path / f"c{kind}"
        paired = dict(zip(values(template), values(source).values(), strict=True))
        fill(template, paired, out)
        assert out.stat().st_size == template.stat().st_size
        for tensor, wanted in zip(values(out).values(), values(source).values(), strict=True):
            assert np.array_equal(tensor.read(), wanted.read())
        if kind.endswith("weights.h5"):
            fresh = made(build, k, 3)
            fresh.load_weights(out)
            assert same(output(fresh, x), expected)
    if k is keras:
        assert same(output(keras.models.load_model(tmp_path / "cx.keras"), x), expected)


def test_all_else_of_a_template_stays(tmp_path: Path) -> None:
    model = made(BOTH["branches"])
    model.compile("adam", "mse")
    model.save(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras", "a") as archive:
        archive.writestr("assets/words.txt", "one\ntwo")
    tensor = read(tmp_path / "x.keras").layers[2].tensors["kernel"]
    fill(tmp_path / "x.keras", {tensor.name: from_array(tensor.data.read() + 1)}, tmp_path / "y.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as before, zipfile.ZipFile(tmp_path / "y.keras") as after:
        assert before.namelist() == after.namelist() and after.testzip() is None
        for name in before.namelist():
            old, new = before.read(name), after.read(name)
            changed = sum(a != b for a, b in zip(old, new, strict=True))
            assert changed == 0 if name != "model.weights.h5" else 0 < changed <= tensor.data.nbytes
    assert json.loads(zipfile.ZipFile(tmp_path / "y.keras").read("metadata.json"))


def test_a_folder_and_packed_files_are_filled(tmp_path: Path) -> None:
    made(BOTH["many"]).save(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as archive:
        archive.extractall(tmp_path / "folder")
        members = {name: archive.read(name) for name in archive.namelist()}
    packed = io.BytesIO()
    with h5py.File(io.BytesIO(members["model.weights.h5"])) as old, h5py.File(packed, "w") as new:
        paths: list[str] = []
        old.visit(paths.append)
        for path in paths:
            if isinstance(old[path], h5py.Dataset):
                new.create_dataset(path, data=old[path][()], chunks=old[path].shape, compression=4)
            else:
                new.require_group(path).attrs.update(old[path].attrs)
    members["model.weights.h5"] = packed.getvalue()
    with zipfile.ZipFile(tmp_path / "packed.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    for name in ("folder", "packed.keras"):
        wanted = {key: from_array(tensor.read() * 2) for key, tensor in values(tmp_path / name).items()}
        fill(tmp_path / name, wanted, tmp_path / f"filled-{name}")
        found = values(tmp_path / f"filled-{name}")
        assert all(np.array_equal(found[key].read(), tensor.read()) for key, tensor in wanted.items())
    loaded = keras.models.load_model(tmp_path / "filled-packed.keras")
    assert np.array_equal(loaded.get_layer("d3").kernel.numpy(), found["layers/dense_3/vars/0"].read())


def test_both_kernels_of_a_spectral_normalization(tmp_path: Path) -> None:
    made(THREE["normalized"]).save(tmp_path / "x.keras")
    tensor = next(layer for layer in read(tmp_path / "x.keras").layers if "spectral/0" in layer.tensors).tensors[
        "kernel"
    ]
    fill(tmp_path / "x.keras", {tensor.name: from_array(tensor.data.read() + 1)}, tmp_path / "y.keras")
    layer = next(layer for layer in read(tmp_path / "y.keras").layers if "spectral/0" in layer.tensors)
    assert np.array_equal(layer.tensors["spectral/0"].data.read(), tensor.data.read() + 1)


def test_wrong_tensors_write_nothing(tmp_path: Path) -> None:
    made(BOTH["many"]).save(tmp_path / "x.keras")
    name, tensor = next(iter(values(tmp_path / "x.keras").items()))
    wrong = [{"layers/nothing/vars/0": tensor}, {name: from_array(tensor.read().T)}, {name: tensor.cast("float64")}]
    for tensors in wrong:
        with pytest.raises(Refused):
            fill(tmp_path / "x.keras", tensors, tmp_path / "y.keras")
    with pytest.raises(Refused):
        fill(tmp_path / "x.keras", {}, tmp_path / "x.keras", force=True)
    fill(tmp_path / "x.keras", {}, tmp_path / "z.keras")
    assert (tmp_path / "z.keras").read_bytes() == (tmp_path / "x.keras").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.keras", "z.keras"]


@pytest.mark.parametrize("name", ["recurrent", "normalized", "custom"])
def test_live_models_are_filled_in_place(name: str) -> None:
    build = {**BOTH, **THREE}[name]
    model, other = made(build, seed=1), made(build, seed=2)
    x = inputs(model)
    new = {tensor.name: from_array(tensor.data.read()) for tensor in read_live(model).tensors()}
    fill_live(other, new)
    assert same(output(other, x), output(model, x))
    key, tensor = next(iter(new.items()))
    with pytest.raises(Refused, match="nothing was assigned"):
        fill_live(other, {**new, key: tensor.cast("float64")})


def test_a_live_subclassed_model_is_filled(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 2)).astype("float32")
    model, other = Subclassed(), Subclassed()
    model(x), other(x)
    randomized(model, 1), randomized(other, 2)
    fill_live(other, {tensor.name: from_array(tensor.data.read()) for tensor in read_live(model).tensors()})
    assert np.array_equal(model(x), other(x))


BUILT = ["sequential", "many", "branches", "nested", "recurrent", "others", "normalized"]


@pytest.mark.parametrize("name", BUILT)
def test_a_new_keras_file_is_the_model(tmp_path: Path, name: str) -> None:
    model = made({**BOTH, **THREE}[name])
    x = inputs(model)
    native = read(save(model, tmp_path / "a.keras"))
    with new_file(tmp_path / "b.keras") as out:
        write_keras(out, native.metadata["config"], native.layers)
    assert same(output(keras.models.load_model(tmp_path / "b.keras"), x), output(model, x))
    again = read(tmp_path / "b.keras")
    assert [layer.path for layer in again.layers] == [layer.path for layer in native.layers]
    with new_file(tmp_path / "c.keras") as out:
        write_keras(out, native.metadata["config"], native.layers)
    assert (tmp_path / "b.keras").read_bytes() == (tmp_path / "c.keras").read_bytes()


@pytest.mark.parametrize("name", ["sequential", "many", "branches", "nested", "recurrent", "others"])
def test_a_new_legacy_file_is_the_model(tmp_path: Path, name: str) -> None:
    model = made(BOTH[name])
    x = inputs(model)
    native = read(save(model, tmp_path / "a.keras"))
    with new_file(tmp_path / "b.h5") as out:
        write_legacy(out, native.metadata["config"], native.layers)
    expected = output(model, x)
    assert same(output(keras.models.load_model(tmp_path / "b.h5", compile=False), x), expected)
    again = {layer.path: layer for layer in read(tmp_path / "b.h5").layers}
    for layer in native.layers:
        for local, tensor in layer.tensors.items():
            assert np.array_equal(again[layer.path].tensors[local].data.read(), tensor.data.read())


def test_a_spectral_normalization_in_a_new_legacy_file(tmp_path: Path) -> None:
    k = keras.layers
    model = randomized(keras.Sequential([keras.Input((4,)), k.SpectralNormalization(k.Dense(3)), k.Dense(2)]))
    native = read(save(model, tmp_path / "a.keras"))
    with new_file(tmp_path / "b.h5") as out:
        write_legacy(out, native.metadata["config"], native.layers)
    x = inputs(model)
    assert same(output(keras.models.load_model(tmp_path / "b.h5", compile=False), x), output(model, x))


PLAIN = [
    ("Conv2D", {"filters": 3, "kernel_size": 2}),
    ("BatchNormalization", {"center": False}),
    ("Flatten", {}),
    ("Dense", {"units": 4, "use_bias": False}),
    ("Dense", {"units": 5}),
]


def minimal(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"module": "keras.layers", "class_name": name, "config": dict(settings), "registered_name": None}


def test_a_legacy_file_that_both_versions_load(tmp_path: Path) -> None:
    layers = [minimal("InputLayer", {"batch_shape": [None, 4, 5, 2], "dtype": "float32", "name": "in"})]
    layers += [minimal(cls, {"name": f"l{i}", **settings}) for i, (cls, settings) in enumerate(PLAIN)]
    config = {
        "module": "keras",
        "class_name": "Sequential",
        "config": {"name": "s", "layers": layers},
        "registered_name": None,
    }
    model = randomized(keras.saving.deserialize_keras_object(config))
    native = read(save(model, tmp_path / "a.keras"))
    with new_file(tmp_path / "b.h5") as out:
        write_legacy(out, config, native.layers)
    x = inputs(model)
    for k in (keras, tf_keras):
        assert np.allclose(
            output(k.models.load_model(tmp_path / "b.h5", compile=False), x), output(model, x), atol=1e-6
        )


@pytest.mark.parametrize("name", ["sequential", "many", "recurrent", "others", "normalized"])
def test_new_weights_load_into_a_flat_model(tmp_path: Path, name: str) -> None:
    build = {**BOTH, **THREE}[name]
    model, other = made(build, seed=1), made(build, seed=2)
    native = read(save(model, tmp_path / "a.keras"))
    with new_file(tmp_path / "b.weights.h5") as out:
        write_weights(out, native.layers)
    other.load_weights(tmp_path / "b.weights.h5")
    x = inputs(model)
    assert same(output(other, x), output(model, x))


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    tensor = NativeTensor("x", from_array(np.zeros((2, 3))))
    for layer in (
        NativeLayer("a", None, {"0": tensor}),
        NativeLayer("a", "own>Block", {"0": tensor}),
        NativeLayer("a", "Dense", {"weight": tensor}),
    ):
        with pytest.raises(Refused, match="a: "), new_file(tmp_path / "x.weights.h5") as out:
            write_weights(out, [layer])
    native = read(save(made(BOTH["many"]), tmp_path / "a.keras"))
    config = native.metadata["config"]
    for layers in (native.layers[1:], (*native.layers, NativeLayer("z", "Dense", {"kernel": tensor}))):
        with pytest.raises(Refused), new_file(tmp_path / "b.keras") as out:
            write_keras(out, config, layers)
    assert [path.name for path in tmp_path.iterdir()] == ["a.keras"]


@pytest.mark.parametrize("equation", ["ij,jk->ik", "ij,kj->ik", "ij,jk->ki"])
def test_an_einsum_that_is_a_dense_layer_becomes_one(equation: str, tmp_path: Path) -> None:
    """What has the batch elsewhere than in front is none of Keras' layers."""
    kernel, x = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("float32")
    node = onnx.helper.make_node("Einsum", ["x", "fc.weight"], ["y"], equation=equation)
    info = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 4]), ("y", None))
    ]
    stored = onnx.numpy_helper.from_array(kernel, "fc.weight")
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:], [stored])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), tmp_path / "x.onnx")
    if equation.endswith("i"):
        with pytest.raises(Refused, match="batch in front"):
            neutral.convert(tmp_path / "x.onnx", tmp_path / "x.keras")
        return
    neutral.convert(tmp_path / "x.onnx", tmp_path / "x.keras")
    made = keras.models.load_model(tmp_path / "x.keras")
    np.testing.assert_allclose(np.asarray(made(x)), np.einsum(equation, x, kernel), atol=1e-5)
