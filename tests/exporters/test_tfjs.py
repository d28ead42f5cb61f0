"""Reading TensorFlow.js models: which layer a weight belongs to, and what TensorFlow.js makes of a topology."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import neutral
from neutral.canon import read_layers
from neutral.conventions.tfjs import TFJS
from neutral.errors import BadFile, Refused, WrongUsage
from neutral.exporters.tfjs import read
from neutral.native import NativeLayer, NativeModel
from tests.tfjs_models import Array, Json, functional, layer, save, sequential, weights

INPUT = {"batch_input_shape": [None, 5, 3], "dtype": "float32"}


def only(model: NativeModel) -> NativeLayer:
    (found,) = (each for each in model.layers if each.tensors)
    return found


def kinds(model: NativeModel) -> list[str]:
    return [each.kind for _, found in read_layers(model, TFJS) for each in found if each.weights]


def test_a_cnn_has_its_classes_graph_and_flatten(tmp_path: Path) -> None:
    topology = sequential(
        layer("Conv2D", "c", filters=4, kernel_size=[3, 2], strides=[1, 1], batch_input_shape=[None, 9, 7, 3]),
        layer("Flatten", "f"),
        layer("Dense", "d", units=2, activation="softmax"),
    )
    arrays = weights(c__kernel=(3, 2, 3, 4), c__bias=(4,), d__kernel=(168, 2), d__bias=(2,))
    model = read(save(tmp_path / "m", topology, arrays))
    assert [(each.path, each.cls, list(each.tensors)) for each in model.layers if each.tensors] == [
        ("c", "Conv2D", ["kernel", "bias"]),
        ("d", "Dense", ["kernel", "bias"]),
    ]
    assert model.ordered and model.splits == {"d": {"in": 4}}
    assert model.graph is not None and model.graph.inputs == ("c_input",)
    assert [node.op for node in model.graph.nodes] == ["Conv", "Flatten", "Gemm", "Softmax"]
    found = {t.name: t.data.read() for t in model.tensors()}
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    model.close()


LSTM_SHAPES = {"kernel": (3, 8), "recurrent_kernel": (2, 8), "bias": (8,)}


def lstm(scope: str) -> dict[str, Array]:
    return weights(**{f"{scope}/{name}".replace("/", "__"): shape for name, shape in LSTM_SHAPES.items()})


@pytest.mark.parametrize(
    ("entry", "scopes", "prefixes"),
    [
        (layer("LSTM", "r", units=2, **INPUT), ["r"], [""]),
        (layer("LSTM", "r", units=2, **INPUT), ["r/lstm_cell"], [""]),
        (layer("LSTM", "r", units=2, **INPUT), ["r/any_name"], [""]),
        (layer("RNN", "r", cell=layer("LSTMCell", "inner", units=2), **INPUT), ["r"], [""]),
        (
            layer("Bidirectional", "b", layer=layer("LSTM", "r", units=2), merge_mode="concat", **INPUT),
            ["b/forward_r", "b/backward_r"],
            ["forward_layer/", "backward_layer/"],
        ),
        (
            layer("Bidirectional", "b", layer=layer("LSTM", "r", units=2), merge_mode="concat", **INPUT),
            ["b/forward_r/lstm_cell_1", "b/backward_r/lstm_cell_2"],
            ["forward_layer/", "backward_layer/"],
        ),
    ],
)
def test_recurrent_weights_are_found_in_every_scope_that_tensorflow_js_takes(
    tmp_path: Path, entry: Json, scopes: list[str], prefixes: list[str]
) -> None:
    arrays = {name: array for scope in scopes for name, array in lstm(scope).items()}
    model = read(save(tmp_path / "m", sequential(entry), arrays))
    assert list(only(model).tensors) == [prefix + name for prefix in prefixes for name in LSTM_SHAPES]
    assert kinds(model) == ["lstm"]
    model.close()


def test_stacked_cells_have_scopes_of_their_own(tmp_path: Path) -> None:
    cells = [layer("LSTMCell", "a", units=2), layer("LSTMCell", "b", units=2)]
    cell = {"class_name": "StackedRNNCells", "config": {"cells": cells}}
    second = weights(r__RNNCell_1__kernel=(2, 8), r__RNNCell_1__recurrent_kernel=(2, 8), r__RNNCell_1__bias=(8,))
    arrays = {**lstm("r/RNNCell_0"), **second}
    model = read(save(tmp_path / "m", sequential(layer("RNN", "r", cell=cell, **INPUT)), arrays))
    assert [(each.path, len(each.tensors)) for each in model.layers if each.tensors] == [("r.0", 3), ("r.1", 3)]
    model.close()


def test_weights_of_wrapped_and_nested_layers(tmp_path: Path) -> None:
    inner = sequential(layer("Dense", "a", units=4, batch_input_shape=[None, 3]), layer("Dense", "b", units=2))
    inner["config"]["name"] = "inner"
    inner |= {"name": "inner", "inbound_nodes": [[["x", 0, 0, {}]]]}
    behind = {**layer("Dense", "c", [], units=2), "inbound_nodes": [[["inner", 1, 0, {}]]]}
    topology = functional([layer("InputLayer", "x", [], batch_input_shape=[None, 3]), inner, behind], ["x"], ["c"])
    arrays = weights(a__kernel=(3, 4), a__bias=(4,), b__kernel=(4, 2), b__bias=(2,), c__kernel=(2, 2), c__bias=(2,))
    model = read(save(tmp_path / "m", topology, arrays))
    assert [each.path for each in model.layers if each.tensors] == ["inner.a", "inner.b", "c"]
    assert model.graph is not None
    model.close()
    wrapped = sequential(layer("TimeDistributed", "t", layer=layer("Dense", "d", units=2), **INPUT))
    model = read(save(tmp_path / "n", wrapped, weights(t__kernel=(3, 2), t__bias=(2,))))
    assert list(only(model).tensors) == ["kernel", "bias"] and kinds(model) == ["dense"]
    model.close()


def test_numbered_weights_are_in_the_order_of_the_layer(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"n__{i}": (3,) for i in range(4)}
    entry = layer("BatchNormalization", "n", axis=-1, epsilon=0.01, **INPUT)
    model = read(save(tmp_path / "m", sequential(entry), weights(**shapes)))
    assert {local: t.name for local, t in only(model).tensors.items()} == {
        "gamma": "n/0", "beta": "n/1", "moving_mean": "n/2", "moving_variance": "n/3",
    }  # fmt: skip
    model.close()


@pytest.mark.parametrize(
    ("entry", "shapes", "wanted", "remark"),
    [
        (layer("LSTM", "r", units=2, **INPUT), LSTM_SHAPES, {"recurrent_activation": "hard_sigmoid_0.2"}, ""),
        (
            layer("LSTM", "r", units=2, recurrent_activation=None, **INPUT),
            LSTM_SHAPES,
            {"recurrent_activation": "hard_sigmoid_0.2"},
            "",
        ),
        (
            layer("LSTM", "r", units=2, recurrent_activation="sigmoid", **INPUT),
            LSTM_SHAPES,
            {"recurrent_activation": "sigmoid"},
            "",
        ),
        (
            layer("GRU", "r", units=2, recurrent_activation="sigmoid", **INPUT),
            {"kernel": (3, 6), "recurrent_kernel": (2, 6), "bias": (6,)},
            {"reset_after": False},
            "",
        ),
        (
            layer("DepthwiseConv2D", "r", kernel_size=[3, 2], strides=[1, 1], dilation_rate=[2, 2], batch_input_shape=[None, 9, 7, 3]),
            {"depthwise_kernel": (3, 2, 3, 2), "bias": (6,)},
            {"dilation": (1, 1), "groups": 3},
            "without its dilation_rate [2, 2]",
        ),
        (
            layer("Conv2DTranspose", "r", filters=2, kernel_size=[2, 2], strides=[3, 3], output_padding=[1, 1], padding="valid", batch_input_shape=[None, 9, 7, 3]),
            {"kernel": (2, 2, 2, 3), "bias": (2,)},
            {"output_padding": (1, 1), "padding": ((0, 0), (0, 0))},
            "without its output_padding [1, 1]",
        ),
    ],
)  # fmt: skip
def test_attributes_are_what_tensorflow_js_computes(
    tmp_path: Path, entry: Json, shapes: dict[str, tuple[int, ...]], wanted: dict[str, object], remark: str
) -> None:
    arrays = weights(**{f"r__{name}": shape for name, shape in shapes.items()})
    model = read(save(tmp_path / "m", sequential(entry), arrays))
    ((_, (found,)),) = ((k, v) for k, v in read_layers(model, TFJS) if v[0].weights)
    assert {key: found.attributes[key] for key in wanted} == wanted
    assert any(remark in note for note in model.notes) if remark else not model.notes
    assert model.graph is not None
    model.close()


def test_settings_that_tensorflow_js_passes_over_are_not_in_the_graph(tmp_path: Path) -> None:
    dense = layer("Dense", "d", units=3, batch_input_shape=[None, 3])
    topology = sequential(dense, layer("ReLU", "a", negative_slope=0.1, max_value=2.0, threshold=0.0))
    model = read(save(tmp_path / "m", topology, weights(d__kernel=(3, 3), d__bias=(3,))))
    assert model.graph is not None and [node.op for node in model.graph.nodes] == ["Gemm", "Clip"]
    assert model.notes == ("a: TensorFlow.js computes this ReLU without its negative_slope 0.1, and it is read so",)
    model.close()


def test_bilinear_upsampling_is_not_what_others_compute(tmp_path: Path) -> None:
    up = layer("UpSampling2D", "u", size=[2, 2], interpolation="bilinear", batch_input_shape=[None, 4, 4, 2])
    conv = layer("Conv2D", "c", filters=3, kernel_size=[2, 2], strides=[1, 1])
    model = read(save(tmp_path / "m", sequential(up, conv), weights(c__kernel=(2, 2, 2, 3), c__bias=(3,))))
    assert model.graph is None and "bilinear_asymmetric" in model.notes[0]
    model.close()


def test_what_does_not_belong_to_a_layer_is_kept_and_told(tmp_path: Path) -> None:
    dense = layer("Dense", "d", units=2, batch_input_shape=[None, 3])
    own = layer("MyLayer", "mine", gain=2)
    arrays = weights(d__kernel=(3, 2), mine__a=(2,), mine__deep__b=(2,), lost__w=(4,), adam__m=(3,))
    model = read(save(tmp_path / "m", sequential(dense, own), arrays, {"adam/m": {"group": "optimizer"}}))
    found = {each.path: (each.cls, list(each.tensors)) for each in model.layers}
    assert found == {
        "d": (None, ["kernel"]),
        "mine": ("Custom>MyLayer", ["a", "deep/b"]),
        "lost#weights": (None, ["w"]),
    }
    assert [t.name for t in model.collections["optimizer"]] == ["adam/m"]
    assert [note for note in model.notes if "d: the file has no bias of this Dense" in note]
    model.close()


def test_a_model_without_all_of_its_weights_is_no_whole_one(tmp_path: Path) -> None:
    """TensorFlow.js refuses to load it: a new model would compute as if what is missing were nothing."""
    first, last = (layer("Dense", name, units=2, batch_input_shape=[None, 3]) for name in ("a", "b"))
    arrays = weights(a__kernel=(3, 2), a__bias=(2,), b__kernel=(2, 2))
    path = save(tmp_path / "m", sequential(first, last), arrays)
    model = read(path)
    assert model.graph is None and model.notes[-1].startswith("b: no graph, because the file has not all weights")
    model.close()
    with pytest.raises(Refused, match="has not all weights"):
        neutral.convert(path, tmp_path / "m.keras")


def test_two_weights_for_one_place_are_refused(tmp_path: Path) -> None:
    arrays = {**lstm("r"), **lstm("r/cell")}
    with pytest.raises(BadFile, match="second weight"):
        read(save(tmp_path / "m", sequential(layer("LSTM", "r", units=2, **INPUT)), arrays))


def test_quantized_weights_are_told(tmp_path: Path) -> None:
    topology = sequential(layer("Dense", "d", units=2, use_bias=False, batch_input_shape=[None, 3]))
    stored = np.arange(6, dtype="u1").reshape(3, 2)
    told = {"quantization": {"dtype": "uint8", "min": -1.0, "scale": 0.5}}
    model = read(save(tmp_path / "m", topology, {"d/kernel": stored}, {"d/kernel": told}))
    assert only(model).tensors["kernel"].data.read().tolist() == [[-1, -0.5], [0, 0.5], [1, 1.5]]
    assert model.notes == ("weights quantized as uint8: read as the values that TensorFlow.js computes",)
    model.close()


def test_the_converters_files_have_the_model_deeper(tmp_path: Path) -> None:
    dense = layer("Dense", "d", units=2, batch_input_shape=[None, 3])
    folder = save(tmp_path / "m", sequential(dense), weights(d__kernel=(3, 2), d__bias=(2,)))
    text = json.loads((folder / "model.json").read_text())
    text["modelTopology"] = {"keras_version": "2.15.0", "backend": "tensorflow", "model_config": sequential(dense)}
    del text["format"]
    (folder / "model.json").write_text(json.dumps(text))
    model = read(folder / "model.json")
    assert model.graph is not None and kinds(model) == ["dense"]
    model.close()


@pytest.mark.parametrize(
    "topology",
    [
        {"class_name": "Sequential", "config": {"layers": [3]}},
        {"class_name": "Sequential", "config": {"layers": [{"config": {}}]}},
        {"class_name": 3, "config": {}},
        {},
    ],
)
def test_topologies_that_make_no_sense_are_refused(tmp_path: Path, topology: Json) -> None:
    with pytest.raises(BadFile):
        read(save(tmp_path / "m", topology, weights(a=(2,))))


def test_deep_topologies_are_refused(tmp_path: Path) -> None:
    topology = sequential()
    for _ in range(200):
        topology = sequential(topology)
    with pytest.raises(BadFile, match="malformed"):
        read(save(tmp_path / "m", topology, weights(a=(2,))))


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no weight"):
        read(save(tmp_path / "m", sequential(layer("Flatten", "f", **INPUT)), {}))


def test_there_is_one_set_of_weights(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="one set"):
        read(tmp_path, key="ema")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("dilation_rate", {"a": 1}), ("strides", ["x", 1]), ("dilation_rate", [None, 1])],
)
def test_settings_of_any_type_are_refused_in_one_line(setting: str, value: object, tmp_path: Path) -> None:
    settings = {"filters": 4, "kernel_size": [3, 2], "strides": [1, 1], "batch_input_shape": [None, 9, 7, 3]}
    conv = layer("Conv2D", "c", **{**settings, setting: value})
    source = save(tmp_path / "m", sequential(conv), weights(c__kernel=(3, 2, 3, 4), c__bias=(4,)))
    with pytest.raises(BadFile, match="make no sense"):
        neutral.export_model(source, tmp_path / "m.nwt")


def test_attributes_of_another_type_are_refused_in_one_line(tmp_path: Path) -> None:
    entry = layer("BatchNormalization", "n", axis=-1, epsilon=True, **INPUT)
    arrays = weights(n__gamma=(3,), n__beta=(3,), n__moving_mean=(3,), n__moving_variance=(3,))
    with pytest.raises(BadFile, match="eps that makes no sense"):
        neutral.export_model(save(tmp_path / "m", sequential(entry), arrays), tmp_path / "m.nwt")
