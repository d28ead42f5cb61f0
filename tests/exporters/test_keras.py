"""Keras files, written by Keras 3 and Keras 2, read without Keras: every tensor under its layer and its name."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tf_keras

from neutral.conventions.keras_config import entry_name, model_layers
from neutral.errors import BadFile, Refused
from neutral.exporters.keras import read, read_live
from neutral.native import NativeLayer, NativeModel
from tests.keras_models import BOTH, THREE, Subclassed, graph, made, randomized

CASES = [(name, k, build) for k in (keras, tf_keras) for name, build in BOTH.items()]
CASES += [(name, keras, build) for name, build in THREE.items()]
IDS = [f"{name}-{k.__name__}" for name, k, _ in CASES]


def by_value(model: NativeModel) -> list[tuple[np.ndarray[Any, Any], NativeLayer, str]]:
    return [(t.data.read(), layer, local) for layer in model.layers for local, t in layer.tensors.items()]


def check(native: NativeModel, model: Any, named: bool = True) -> None:
    """Every weight of the live model is found once, under the name and layer that Keras itself gives it."""
    found = by_value(native)
    expected = {id(w): w for w in model.weights}.values()
    copies = [local for _, _, local in found if local == "spectral/0"]
    assert len(found) == len(expected) + len(copies)
    for weight in expected:
        value = weight.numpy()
        where = [
            (layer, local)
            for array, layer, local in found
            if array.shape == value.shape and np.array_equal(array, value)
        ]
        where = [(layer, local) for layer, local in where if local != "spectral/0"]
        assert len(where) == 1, weight.name
        ((layer, local),) = where
        path = getattr(weight, "path", weight.name).partition(":")[0]
        if not named or layer.cls is None or ">" in layer.cls:
            continue
        final = {"depthwise_kernel": "kernel"} if layer.cls == "DepthwiseConv2D" else {"vector_u": "spectral/1"}
        name = path.split("/")[-1]
        assert local.split("/")[-1] == final.get(name, name).split("/")[-1], (path, local)
        assert layer.path.split(".")[-1] in path.split("/") or layer.path.split(".")[0] in path.split("/"), (
            path,
            layer.path,
        )
        for word in ("forward", "backward", "query", "key", "value", "attention_output"):
            if f"/{word}" in path:
                assert local.startswith(word), (path, local)


@pytest.mark.parametrize(("name", "k", "build"), CASES, ids=IDS)
def test_every_tensor_has_its_layer_and_name(tmp_path: Path, name: str, k: Any, build: Callable[[Any], Any]) -> None:
    model = made(build, k)
    model.save(tmp_path / "x.keras")
    model.save(tmp_path / "x.h5")
    model.save_weights(tmp_path / "x.weights.h5")
    full = read(tmp_path / "x.keras")
    legacy = read(tmp_path / "x.h5")
    check(full, model)
    check(legacy, model)
    check(read(tmp_path / "x.weights.h5"), model, named=False)
    assert not [note for note in full.notes if "no variables" in note or "unnamed" in note]
    assert full.ordered and legacy.ordered and full.metadata["config"]["class_name"]
    tops = list(dict.fromkeys(layer.path.split(".")[0] for layer in full.layers))
    assert tops == [layer.name for layer in model.layers]
    own = {layer.path for layer in full.layers if layer.cls and ">" in layer.cls}
    plain = [layer for layer in full.layers if not {layer.path, layer.path.rpartition(".")[0]} & own]
    others = {layer.path: layer for layer in legacy.layers}
    for layer in plain:
        assert others[layer.path].cls == layer.cls and layer.evidence == "class"
        assert set(layer.tensors) - set(others[layer.path].tensors) <= {"spectral/0"}
    if k is keras:
        live = read_live(model)
        assert [(x.path, x.cls) for x in live.layers if not x.cls or ">" not in x.cls] == [
            (x.path, x.cls) for x in plain
        ]
        check(live, model)


def test_an_unzipped_folder(tmp_path: Path) -> None:
    model = made(BOTH["branches"])
    model.save(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as archive:
        archive.extractall(tmp_path / "folder")
    check(read(tmp_path / "folder"), model)


def test_classes_of_the_recurrent_model(tmp_path: Path) -> None:
    made(BOTH["recurrent"]).save(tmp_path / "x.keras")
    layers = {layer.path: layer for layer in read(tmp_path / "x.keras").layers}
    assert layers["bidirectional"].cls == "LSTM" and layers["bidirectional"].config["merge_mode"] == "concat"
    assert layers["bidirectional_1"].cls == "GRU" and layers["bidirectional_1"].config["merge_mode"] == "sum"
    assert [layers[name].cls for name in ("rnn.0", "rnn.1", "rnn_1")] == ["LSTM", "GRU", "SimpleRNN"]
    assert all(layers[name].config["cell"] for name in ("rnn.0", "rnn.1", "rnn_1"))
    assert layers["time_distributed"].cls == "Dense" and layers["time_distributed"].config["time_distributed"]
    assert layers["gru"].config["reset_after"] is False
    assert list(layers["multi_head_attention"].tensors)[:2] == ["query/kernel", "query/bias"]


def test_weights_without_a_config_say_what_they_can(tmp_path: Path) -> None:
    made(BOTH["recurrent"]).save_weights(tmp_path / "x.weights.h5")
    made(BOTH["sequential"]).save_weights(tmp_path / "y.weights.h5")
    layers = {
        layer.path: layer
        for layer in (*read(tmp_path / "x.weights.h5").layers, *read(tmp_path / "y.weights.h5").layers)
    }
    assert layers["bidirectional"].cls == "LSTM" and "forward_layer/recurrent_kernel" in layers["bidirectional"].tensors
    assert layers["gru"].cls == "GRU" and layers["gru"].config["reset_after"] is False
    assert layers["first"].cls == "Conv2D" and list(layers["first"].tensors) == ["kernel", "bias"]
    # Three variables: gamma or beta may be the missing one.
    assert layers["batch_normalization"].cls is None and list(layers["batch_normalization"].tensors) == ["0", "1", "2"]
    assert layers["dense"].cls == "Dense" and list(layers["dense"].tensors) == ["kernel"]
    # The file says what its groups are called, and not what they are.
    assert {layer.evidence for layer in layers.values() if layer.cls} == {"name"}


def test_legacy_weights_without_a_config(tmp_path: Path) -> None:
    model = made(BOTH["recurrent"], tf_keras)
    model.save_weights(tmp_path / "x.h5")
    native = read(tmp_path / "x.h5")
    assert native.format == "h5-weights" and not native.ordered
    check(native, model, named=False)
    layers = {layer.path: layer for layer in native.layers}
    assert (layers["gru"].cls, layers["gru"].evidence) == ("GRU", "name")
    assert set(layers["multi_head_attention"].tensors) >= {"query/kernel", "attention_output/bias"}


def test_subclassed_models_are_named_by_their_attributes(tmp_path: Path) -> None:
    model = Subclassed()
    model(np.zeros((1, 5, 2)))
    randomized(model)
    model.save(tmp_path / "x.keras")
    native = read(tmp_path / "x.keras")
    check(native, model, named=False)
    assert not native.ordered
    classes = {layer.path: (layer.cls, layer.evidence, len(layer.tensors)) for layer in native.layers}
    assert classes["conv_one"] == ("Conv1D", "name", 2)
    assert sum(cls == "Dense" for cls, _, _ in classes.values()) == 5
    check(read_live(model), model, named=False)


def test_layers_of_ones_own_keep_their_variables(tmp_path: Path) -> None:
    model = made(THREE["custom"])
    model.save(tmp_path / "x.keras")
    native = read(tmp_path / "x.keras")
    layers = {layer.path: layer for layer in native.layers}
    assert layers["block"].cls == "own>Block" and list(layers["block"].tensors) == ["0"]
    assert np.array_equal(layers["block"].tensors["0"].data.read(), model.get_layer("block").factor.numpy())
    assert len(layers["block.inside"].tensors) == 2
    assert any("own>Block" in note for note in native.notes)


@pytest.mark.parametrize("k", [keras, tf_keras], ids=["keras3", "keras2"])
def test_the_order_of_random_graphs(k: Any) -> None:
    for seed in range(12):
        model = graph(k, seed)
        config = json.loads(model.to_json())
        random.Random(seed).shuffle(config["config"]["layers"])
        assert [entry_name(entry) for entry in model_layers(config)] == [layer.name for layer in model.layers]


def test_optimizer_variables_are_a_collection(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    randomized(model)
    for name in ("x.keras", "x.h5", "x.weights.h5"):
        if name.endswith("weights.h5"):
            model.save_weights(tmp_path / name)
        else:
            model.save(tmp_path / name)
        native = read(tmp_path / name)
        assert list(native.collections) == ["optimizer"] and len(native.collections["optimizer"]) == 2 + 2 * 2
        check(native, model, named=False)


def test_half_precision_and_quantized_variables(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, dtype="bfloat16", name="a")])
    model.save(tmp_path / "x.keras")
    assert str(read(tmp_path / "x.keras").layers[0].tensors["kernel"].data.dtype) == "bfloat16"
    assert read_live(model).layers[0].tensors["kernel"].data.read().dtype.name == "bfloat16"
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="a")])
    model.quantize("int8")
    model.save(tmp_path / "y.keras")
    native = read(tmp_path / "y.keras")
    assert native.layers[0].cls is None and list(native.layers[0].tensors) == ["0", "1", "2"]
    assert any("stay unnamed" in note for note in native.notes)


def rewritten(source: Path, out: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out


@pytest.fixture
def branches(tmp_path: Path) -> Path:
    made(BOTH["branches"]).save(tmp_path / "x.keras")
    return tmp_path / "x.keras"


def edit_weights(change: Callable[[h5py.File], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        data = io.BytesIO(members["model.weights.h5"])
        with h5py.File(data, "r+") as file:
            change(file)
        members["model.weights.h5"] = data.getvalue()

    return apply


def test_groups_that_name_another_layer_are_refused_not_swapped(branches: Path, tmp_path: Path) -> None:
    def swap(file: h5py.File) -> None:
        file.move("layers/dense", "layers/other")
        file.move("layers/dense_1", "layers/dense")
        file.move("layers/other", "layers/dense_1")

    with pytest.raises(Refused, match="that the config puts there"):
        read(rewritten(branches, tmp_path / "y.keras", edit_weights(swap)))


def test_variables_that_are_not_there_leave_a_note(branches: Path, tmp_path: Path) -> None:
    def remove(file: h5py.File) -> None:
        del file["layers/dense/vars/0"], file["layers/dense/vars/1"]

    native = read(rewritten(branches, tmp_path / "y.keras", edit_weights(remove)))
    assert any("no variables of this Dense" in note for note in native.notes)


def test_variables_nobody_knows_are_kept(branches: Path, tmp_path: Path) -> None:
    def add(file: h5py.File) -> None:
        file["surprise/vars/0"] = np.ones(3)

    native = read(rewritten(branches, tmp_path / "y.keras", edit_weights(add)))
    assert [layer.path for layer in native.layers if layer.cls is None] == ["surprise"]


def deep(members: dict[str, bytes]) -> None:
    members["config.json"] = b'{"config": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


def bomb(members: dict[str, bytes]) -> None:
    members["config.json"] = b'{"class_name": "' + b"a" * (65 << 20) + b'"}'


def not_json(members: dict[str, bytes]) -> None:
    members["config.json"] = b"\x80\x04."


def a_list(members: dict[str, bytes]) -> None:
    members["config.json"] = b"[]"


def no_weights(members: dict[str, bytes]) -> None:
    del members["model.weights.h5"]


def no_config(members: dict[str, bytes]) -> None:
    del members["config.json"]


def not_hdf5(members: dict[str, bytes]) -> None:
    members["model.weights.h5"] = b"x" * 100


def edit_config(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        config = json.loads(members["config.json"])
        change(config)
        members["config.json"] = json.dumps(config).encode()

    return apply


def cyclic(config: dict[str, Any]) -> None:
    for entry in config["config"]["layers"]:
        if entry["name"] == "deep":
            entry["inbound_nodes"][0]["args"][0]["config"]["keras_history"] = ["right", 0, 0]


def unknown_layer(config: dict[str, Any]) -> None:
    config["config"]["output_layers"] = [["nowhere", 0, 0]]


def wrong_types(config: dict[str, Any]) -> None:
    config["config"]["layers"] = [1, 2]


def endless_nest(config: dict[str, Any]) -> None:
    inner: dict[str, Any] = {"class_name": "Dense", "config": {"name": "d"}}
    for _ in range(100):
        inner = {"class_name": "TimeDistributed", "module": "keras.layers", "config": {"name": "t", "layer": inner}}
    config["class_name"], config["config"] = "Sequential", {"name": "s", "layers": [inner]}


BROKEN = [deep, bomb, not_json, a_list, no_weights, no_config, not_hdf5]
BROKEN_CONFIGS = [cyclic, unknown_layer, wrong_types, endless_nest]


@pytest.mark.parametrize(
    "change", [*BROKEN, *map(edit_config, BROKEN_CONFIGS)], ids=[f.__name__ for f in BROKEN + BROKEN_CONFIGS]
)
def test_broken_files_are_refused_in_one_line(branches: Path, tmp_path: Path, change: Any) -> None:
    with pytest.raises(BadFile) as caught:
        read(rewritten(branches, tmp_path / "y.keras", change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_a_compressed_bomb_of_a_config_is_refused(branches: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(branches) as archive, zipfile.ZipFile(tmp_path / "y.keras", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("config.json", b" " * (200 << 20))
        out.writestr("model.weights.h5", archive.read("model.weights.h5"))
    with pytest.raises(BadFile):
        read(tmp_path / "y.keras")


def test_a_config_is_read_and_never_built(branches: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def attack(config: dict[str, Any]) -> None:
        for i, (module, name) in enumerate(
            [("os", "system"), ("keras.layers", "Lambda"), ("keras.layers", "StringLookup")]
        ):
            code = {"class_name": "__lambda__", "config": {"code": "4wEAAAA=", "defaults": None, "closure": None}}
            settings = {"name": f"bad{i}", "command": f"touch {marker}", "function": code, "vocabulary": "/etc/passwd"}
            entry = {"module": module, "class_name": name, "config": settings, "name": f"bad{i}", "inbound_nodes": []}
            config["config"]["layers"].append(entry)
            config["config"]["input_layers"].append([f"bad{i}", 0, 0])

    native = read(rewritten(branches, tmp_path / "y.keras", edit_config(attack)))
    assert {"os.system", "Lambda", "StringLookup"} <= {layer.cls for layer in native.layers}
    assert not marker.exists()


def test_a_flipped_bit_of_the_weights_is_refused(branches: Path) -> None:
    name = "model.weights.h5"
    tensor = read(branches).layers[2].tensors["kernel"]
    data = bytearray(branches.read_bytes())
    data[data.index(tensor.data.read().tobytes())] ^= 1
    branches.write_bytes(data)
    with pytest.raises(BadFile, match=name):
        for found in read(branches).tensors():
            found.data.read()


def test_names_beyond_an_object_header_are_split(tmp_path: Path) -> None:
    names = [f"layer_{i:04}_{'x' * 120}" for i in range(700)]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for index, part in enumerate(np.array_split(np.array([name.encode() for name in names]), 2)):
            file.attrs[f"layer_names{index}"] = part
        for i, name in enumerate(names):
            file.create_group(name).attrs["weight_names"] = np.array([f"{name}/kernel:0".encode()])
            file[f"{name}/{name}/kernel:0"] = np.full((2, 3), i, np.float32)
    layers = read(tmp_path / "x.h5").layers
    assert [layer.path for layer in layers] == names
    assert layers[500].tensors["kernel"].data.read()[0, 0] == 500


def test_legacy_files_whose_lists_lie_are_refused(tmp_path: Path) -> None:
    for layer_names, weight_names in ([b"a", b"b"], [b"k"]), ([b"a"], [b"k", b"l"]), ([1], [b"k"]), ([b"../a"], [b"k"]):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file.attrs["layer_names"] = np.array(layer_names)
            file.create_group("a").attrs["weight_names"] = np.array(weight_names)
            file["a/k"] = np.zeros(3)
        with pytest.raises(BadFile):
            read(tmp_path / "x.h5")


def test_other_hdf5_files_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(BadFile, match="without Keras weights"):
        read(tmp_path / "x.h5")
    with pytest.raises(Refused, match="leave --key out"):
        read(tmp_path / "x.h5", key="x")


def test_reading_imports_no_framework(branches: Path) -> None:
    code = (
        "import sys, pathlib; from neutral.exporters.keras import read; model = read(pathlib.Path(sys.argv[1]));"
        "[t.data.read() for t in model.tensors()]; print({'keras', 'tensorflow', 'torch', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(branches)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("backward", "alike"),
    [({}, True), ({"activation": "relu"}, False), ({"recurrent_activation": "hard_sigmoid"}, False)],
)
def test_a_bidirectional_whose_layers_differ_is_no_lstm(backward: dict[str, str], alike: bool, tmp_path: Path) -> None:
    """One kind has one activation: a backward layer with its own must not be read as the forward one's mirror."""
    both = keras.layers.Bidirectional(
        keras.layers.LSTM(3), backward_layer=keras.layers.LSTM(3, go_backwards=True, **backward)
    )
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((4, 2)), both]).save(path)
    model = read(path)
    assert model.layers[0].cls == ("LSTM" if alike else "Bidirectional")
    assert (model.graph is not None) == alike
    model.close()
