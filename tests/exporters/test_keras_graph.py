"""Graphs captured from configs that the real Keras wrote."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import keras
import pytest
import tf_keras
from keras import layers as L

from neutral.exporters.keras_graph import capture
from neutral.schema.graph import Graph

K2: Any = tf_keras.layers


def config_of(model: Any) -> Any:
    return json.loads(model.to_json())


def captured(model: Any) -> tuple[Graph, dict[str, dict[str, int]]]:
    graph, splits, notes = capture(config_of(model))
    assert graph is not None, notes
    return graph, splits


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def sequential(*layers: Any) -> Any:
    return keras.Sequential(list(layers))


def in_keras_order(graph: Graph, name: str) -> tuple[int | None, ...]:
    value = graph.values[name]
    assert value.shape is not None
    first = len(value.axes) > 2 and value.axes[1] == "channel"
    return (value.shape[0], *value.shape[2:], value.shape[1]) if first else value.shape


IMAGE, STEPS, VOLUME = (11, 10, 4), (12, 6), (7, 8, 6, 2)
SHAPES: list[tuple[tuple[int, ...], list[Any]]] = [
    (IMAGE, [L.Conv2D(5, (3, 2), strides=(2, 1), padding="same", name="t"), L.Flatten(), L.Dense(2)]),
    (IMAGE, [L.Conv2D(6, 3, dilation_rate=2, groups=2, name="t", activation="relu")]),
    (IMAGE, [L.DepthwiseConv2D(3, depth_multiplier=3, name="t")]),
    (IMAGE, [L.Conv2DTranspose(5, 3, strides=2, padding="same", name="t")]),
    (IMAGE, [L.Conv2DTranspose(5, 3, strides=2, padding="same", output_padding=1, name="t")]),
    (IMAGE, [L.Conv2DTranspose(5, 2, strides=3, name="t")]),
    (IMAGE, [L.Conv2DTranspose(5, 4, strides=3, output_padding=2, name="t")]),
    (IMAGE, [L.MaxPooling2D((3, 2), strides=2, padding="same", name="t")]),
    (IMAGE, [L.AveragePooling2D(3, name="t")]),
    (IMAGE, [L.ZeroPadding2D(((1, 2), (0, 3)), name="t"), L.Cropping2D(((1, 0), (2, 2)), name="u")]),
    (IMAGE, [L.UpSampling2D((2, 3), name="t"), L.Permute((3, 1, 2), name="u")]),
    (IMAGE, [L.GlobalAveragePooling2D(keepdims=True, name="t"), L.Reshape((-1,), name="u")]),
    (IMAGE, [L.GlobalMaxPooling2D(name="t"), L.RepeatVector(3, name="u")]),
    (IMAGE, [L.Dense(3, name="t"), L.LayerNormalization(name="u"), L.Reshape((55, 6), name="v")]),
    (IMAGE, [L.SpatialDropout2D(0.2, name="t"), L.Rescaling(0.5, 1.0, name="u"), L.GaussianNoise(0.1, name="v")]),
    (STEPS, [L.Conv1D(5, 3, strides=2, padding="causal", name="t"), L.LSTM(3, name="u")]),
    (STEPS, [L.MaxPooling1D(2, name="t"), L.GRU(4, return_sequences=True, name="u"), L.Flatten(name="v")]),
    (
        STEPS,
        [L.DepthwiseConv1D(3, depth_multiplier=2, name="t"), L.UpSampling1D(2, name="u"), L.Cropping1D(2, name="v")],
    ),
    (STEPS, [L.ZeroPadding1D((1, 2), name="t"), L.Conv1DTranspose(2, 3, name="u"), L.GlobalAveragePooling1D(name="v")]),
    (STEPS, [L.EinsumDense("abc,cde->abde", (12, 2, 3), bias_axes="de", name="t"), L.Reshape((12, 6), name="u")]),
    (STEPS, [L.EinsumDense("abc,bcd->abd", (12, 5), name="t"), L.BatchNormalization(name="u")]),
    (STEPS, [L.Bidirectional(L.SimpleRNN(4, return_sequences=True), merge_mode="ave", name="t")]),
    (STEPS, [L.RNN(L.GRUCell(5), return_sequences=True, name="t"), L.TimeDistributed(L.Dense(2), name="u")]),
    (VOLUME, [L.Conv3D(3, 2, strides=2, name="t"), L.MaxPooling3D(2, name="u"), L.GroupNormalization(3, name="v")]),
    (VOLUME, [L.Conv3DTranspose(3, 2, name="t"), L.ZeroPadding3D(1, name="u"), L.GlobalMaxPooling3D(name="v")]),
    (VOLUME, [L.AveragePooling3D(2, name="t"), L.UpSampling3D(2, name="u"), L.Cropping3D(1, name="v")]),
]


@pytest.mark.parametrize(
    ("shape", "layers"), SHAPES, ids=[f"{type(s[1][0]).__name__}-{i}" for i, s in enumerate(SHAPES)]
)
def test_shapes_are_those_of_keras(shape: tuple[int, ...], layers: list[Any]) -> None:
    model = sequential(L.Input(shape), *layers)
    graph, _ = captured(model)
    for layer in model.layers:
        made = next(n for n in (f"{layer.name}.activation", f"{layer.name}.split", layer.name) if n in graph.values)
        assert in_keras_order(graph, made) == layer.output.shape, layer.name
    kinds = {node.layer for node in graph.nodes if node.layer}
    assert kinds == {layer.name for layer in model.layers if layer.weights}


def test_lenet() -> None:
    graph, splits = captured(
        sequential(
            L.Input((28, 28, 1), name="image"),
            L.Conv2D(6, 5, padding="same", activation="tanh", name="c1"),
            L.AveragePooling2D(2, name="p1"),
            L.Conv2D(16, 5, activation="tanh", name="c2"),
            L.Flatten(name="flat"),
            L.Dropout(0.25, name="drop"),
            L.Dense(84, name="f1"),
            L.Dense(10, activation="softmax", name="f2"),
        )
    )
    assert ops(graph) == [
        "Conv",
        "Tanh",
        "AveragePool",
        "Conv",
        "Tanh",
        "Flatten",
        "Identity",
        "Gemm",
        "Gemm",
        "Softmax",
    ]
    assert [n.layer for n in graph.nodes if n.layer] == ["c1", "c2", "f1", "f2"]
    assert graph.values["image"].axes == ("batch", "channel", "height", "width")
    assert graph.values["image"].shape == (None, 1, 28, 28) and graph.values["flat"].shape == (None, 1600)
    assert splits == {"f1": {"in": 16}, "f2": {}}
    dropout = graph.nodes[6].attributes
    assert dropout == {"origin": "Dropout", "rate": 0.25}


def conv() -> Any:
    return L.Conv2D(4, 2, name="c")


SPLITS: list[tuple[str, list[Any], dict[str, dict[str, int]], bool]] = [
    (
        "vectors between",
        [conv(), L.Flatten(), L.BatchNormalization(name="b"), L.PReLU(name="p"), L.ReLU(), L.Dense(3, name="d")],
        {"b": {"feature": 4}, "p": {"feature": 4}, "d": {"in": 4}},
        False,
    ),
    ("layer norm", [conv(), L.Flatten(), L.LayerNormalization(name="n"), L.Dense(3, name="d")], {"n": {"feature": 4}, "d": {"in": 4}}, False),
    ("group norm", [conv(), L.Flatten(), L.GroupNormalization(2, name="n"), L.Dense(3, name="d")], {"n": {}, "d": {}}, True),
    ("output", [conv(), L.Flatten(), L.Softmax()], {}, True),
    ("both", [conv(), L.Flatten(), L.Dense(24, name="d"), L.Reshape((2, 2, 6)), L.Conv2D(1, 1)], {"d": {"in": 4, "out": 6}}, False),
    ("one position", [L.Conv2D(4, (5, 6)), L.Flatten(), L.Dense(3, name="d")], {"d": {}}, False),
    ("one channel", [L.Conv2D(1, 2), L.Flatten(), L.Dense(3, name="d")], {"d": {}}, False),
    ("pooled", [conv(), L.GlobalAveragePooling2D(), L.Dense(3, name="d")], {"d": {}}, False),
    ("reshape as flatten", [conv(), L.Reshape((-1,)), L.Dense(3, name="d")], {"d": {"in": 4}}, False),
    ("permuted by hand", [conv(), L.Permute((3, 1, 2)), L.Flatten(), L.Dense(3, name="d")], {"d": {}}, False),
    ("dense on an image", [L.Dense(4, name="a"), L.Flatten(), L.Dense(3, name="d")], {"a": {}}, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layers", "wanted", "turned"), SPLITS, ids=[s[0] for s in SPLITS])
def test_splits(name: str, layers: list[Any], wanted: dict[str, dict[str, int]], turned: bool) -> None:
    graph, splits = captured(sequential(L.Input((5, 6, 3)), *layers))
    assert splits == wanted
    assert ("Transpose" in ops(graph)) == (turned or name == "permuted by hand")


def test_a_decoder_divides_the_output_of_its_dense_layer() -> None:
    graph, splits = captured(
        sequential(L.Input((5,)), L.Dense(24, "relu", name="d"), L.BatchNormalization(name="b"), L.Reshape((3, 2, 4)))
    )
    assert splits == {"d": {"out": 4}, "b": {"feature": 4}}
    assert graph.nodes[-1].attributes == {"shape": (4, 3, 2)} and "Transpose" not in ops(graph)


def test_a_shared_dense_layer_cannot_take_two_orders() -> None:
    x, y = L.Input((3, 2, 4)), L.Input((24,))
    shared = L.Dense(2, name="shared")
    graph, splits = captured(keras.Model([x, y], [shared(L.Flatten()(x)), shared(y)]))
    assert splits == {"shared": {}} and ops(graph).count("Transpose") == 1
    assert [node.layer for node in graph.nodes if node.layer] == ["shared", "shared"]
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


def test_a_sequence_is_flattened_as_it_is() -> None:
    graph, splits = captured(
        sequential(L.Input(STEPS), L.LSTM(4, return_sequences=True), L.Flatten(), L.Dense(2, name="d"))
    )
    assert splits == {"d": {}} and ops(graph) == ["LSTM", "Flatten", "Gemm"]
    assert graph.values[graph.inputs[0]].axes == ("batch", "time", "feature")


def test_a_spatial_sequence_has_channels_in_front() -> None:
    graph, splits = captured(
        sequential(L.Input(STEPS), L.BatchNormalization(name="b"), L.Conv1D(5, 3), L.Flatten(), L.Dense(2, name="d"))
    )
    assert graph.values[graph.inputs[0]].axes == ("batch", "channel", "width")
    assert splits == {"b": {}, "d": {"in": 5}} and "Transpose" not in ops(graph)


def test_a_convolution_of_embeddings_is_turned_and_turned_back() -> None:
    graph, _ = captured(sequential(L.Input((9,)), L.Embedding(20, 4), L.Conv1D(5, 3), L.LSTM(3)))
    assert ops(graph) == ["Gather", "Transpose", "Conv", "Transpose", "LSTM"]
    assert graph.values[graph.inputs[0]].dtype == "int64"


def test_recurrent_layers_with_states() -> None:
    x = L.Input(STEPS)
    y, h, c = L.LSTM(4, return_sequences=True, return_state=True, name="a")(x)
    y = L.LSTM(4, name="b")(y, initial_state=[h, c])
    graph, _ = captured(keras.Model(x, y))
    assert graph.nodes[0].outputs == ("a", "a:1", "a:2") and graph.nodes[1].inputs == ("a", "a:1", "a:2")
    assert graph.nodes[0].attributes == {"return_sequences": True, "return_state": True}
    stacked = sequential(L.Input(STEPS), L.RNN([L.LSTMCell(3), L.LSTMCell(5)], name="r"))
    graph, _ = captured(stacked)
    assert [(n.layer, n.attributes["return_sequences"]) for n in graph.nodes] == [("r.0", True), ("r.1", False)]


def test_nested_models_are_inlined() -> None:
    inner = keras.Sequential(
        [L.Input((5, 6, 3)), L.Conv2D(4, 2, name="c"), L.ReLU(6.0, negative_slope=0.1)], name="inner"
    )
    x = L.Input((5, 6, 3))
    middle = keras.Model(x, L.MaxPooling2D(2)(inner(x)), name="middle")
    a, b = L.Input((5, 6, 3)), L.Input((5, 6, 3))
    y = L.Subtract()([middle(a), middle(b)])
    graph, splits = captured(keras.Model([a, b], L.Dense(2, name="d")(L.Flatten()(y))))
    assert [n.layer for n in graph.nodes if n.layer] == ["middle.inner.c"] * 2 + ["d"]
    assert splits == {"d": {"in": 4}} and "LeakyRelu" in ops(graph) and "Clip" in ops(graph)


def test_attention_takes_the_key_before_the_value() -> None:
    q, v, k = L.Input((5, 6), name="q"), L.Input((4, 6), name="v"), L.Input((4, 6), name="k")
    graph, _ = captured(keras.Model([q, v, k], L.MultiHeadAttention(2, 3, name="at")(q, v, k, use_causal_mask=True)))
    assert graph.nodes[0].inputs == ("q", "k", "v") and graph.nodes[0].attributes == {"is_causal": 1}


def test_operators_with_numbers() -> None:
    x = L.Input((4,))
    graph, _ = captured(keras.Model(x, keras.ops.relu(1.0 - x * 0.5)))
    assert ops(graph) == ["Constant", "Mul", "Constant", "Sub", "Relu"]
    assert graph.nodes[3].inputs[1] == graph.nodes[1].name, "one minus x, not x minus one"


def test_separable_convolutions_are_two() -> None:
    graph, _ = captured(
        sequential(L.Input(IMAGE), L.SeparableConv2D(5, 3, depth_multiplier=2, name="s", activation="relu"))
    )
    assert [n.layer for n in graph.nodes] == ["s.depthwise", "s.pointwise", None]
    assert graph.values["s.depthwise"].shape == (None, 8, 9, 8)


REFUSED: list[tuple[str, list[Any], str]] = [
    ("lambda", [L.Lambda(lambda x: x, name="bad"), L.Flatten(), L.Dense(3, name="e")], "bad"),
    ("attention mask", [L.Masking(name="bad")], "bad"),
    ("normalization", [L.UnitNormalization(name="bad")], "bad"),
    ("convolution per step", [L.Reshape((3, 4, 5, 1)), L.TimeDistributed(L.Conv2D(2, 2), name="bad")], "bad"),
    ("channels first", [L.Flatten(data_format="channels_first", name="bad")], "bad"),
    ("bicubic", [L.UpSampling2D(2, interpolation="bicubic", name="bad")], "bad"),
]


@pytest.mark.parametrize(("name", "layers", "where"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_has_no_graph_is_named(name: str, layers: list[Any], where: str) -> None:
    graph, splits, notes = capture(config_of(sequential(L.Input((6, 5, 2)), *layers)))
    assert graph is None and len(notes) == 1 and notes[0].startswith(f"{where}: ")
    assert splits == {}


def test_masks_have_no_graph() -> None:
    model = sequential(
        L.Input((6,), dtype="int32"), L.Embedding(9, 4, mask_zero=True), L.LSTM(3, name="r"), L.Dense(2, name="d")
    )
    graph, splits, notes = capture(config_of(model))
    assert graph is None and notes[0].startswith("r: LSTM: it uses a mask") and splits == {}


def test_splits_are_known_around_a_layer_that_is_not() -> None:
    layers = [conv(), L.Flatten(), L.Dense(8, name="a"), L.Dense(7, name="b"), L.Lambda(lambda x: x)]
    more = [L.Dense(6, name="e"), L.ReLU(), L.Dense(5, name="f"), L.Dense(4, name="g")]
    graph, splits, _ = capture(config_of(sequential(L.Input((5, 6, 3)), *layers, *more)))
    assert graph is None
    assert splits == {"a": {"in": 4}, "f": {}, "g": {}}, "b feeds the unknown layer, e follows it"


def test_files_of_keras_2() -> None:
    x = K2.Input((8, 8, 3))
    inner = tf_keras.Sequential(
        [K2.Conv2D(4, 3, input_shape=(8, 8, 3), name="c"), K2.LeakyReLU(0.2), K2.ReLU(6.0)], name="inner"
    )
    y = K2.Flatten()(K2.Concatenate()([inner(x), inner(x)]))
    s = K2.Input((5, 7))
    h, a, b = K2.LSTM(4, return_sequences=True, return_state=True)(s)
    h = K2.LSTM(4)(h, initial_state=[a, b])
    y = K2.Dense(4, activation="hard_sigmoid", name="d")(y)
    model = tf_keras.Model([x, s], K2.Add()([y, h * 2.0]))
    graph, splits = captured(model)
    assert [n.layer for n in graph.nodes if n.op == "Conv"] == ["inner.c"] * 2
    assert splits == {"d": {"in": 8}}
    assert {"alpha": 0.2, "beta": 0.5} in [n.attributes for n in graph.nodes if n.op == "HardSigmoid"]
    slope = next(n.attributes["alpha"] for n in graph.nodes if n.op == "LeakyRelu")
    assert isinstance(slope, float) and abs(slope - 0.2) < 1e-6
    plain = tf_keras.Sequential([K2.Dense(3, name="a"), K2.Dense(4, name="b")])
    plain.build((None, 7))
    graph, splits = captured(plain)
    assert graph.values[graph.inputs[0]].shape == (None, 7) and splits == {"a": {}, "b": {}}


def test_the_order_of_the_layers_in_a_config_does_not_matter() -> None:
    x = L.Input((5, 6, 3))
    y = L.Add()([L.Conv2D(4, 1, name="a")(x), L.Conv2D(4, 1, name="b")(x)])
    config = config_of(keras.Model(x, L.Dense(2, name="d")(L.Flatten()(y))))
    wanted, splits, _ = capture(config)
    shuffled = copy.deepcopy(config)
    random.Random(4).shuffle(shuffled["config"]["layers"])
    found, same, _ = capture(shuffled)
    assert wanted is not None and found is not None and same == splits == {"d": {"in": 4}}
    assert sorted(n.model_dump_json() for n in found.nodes) == sorted(n.model_dump_json() for n in wanted.nodes)


def test_a_custom_class_with_a_name_of_keras_is_not_believed() -> None:
    config = config_of(sequential(L.Input((4,)), L.Dense(3, name="d")))
    config["config"]["layers"][1].update(module="my.package", registered_name="my>Dense")
    graph, splits, notes = capture(config)
    assert graph is None and splits == {} and notes[0].startswith("d: ")
    assert capture({"class_name": "MyModel", "config": {}})[0] is None


def _values(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in entries for found in _values(inner, (*path, key)))]


def test_a_broken_config_never_does_worse_than_have_no_graph() -> None:
    x = L.Input((5, 6, 3))
    y = L.Concatenate()([L.Conv2D(4, 2, name="a")(x), L.MaxPooling2D(2, 1)(x)])
    y = L.Dense(6, name="d")(L.Flatten()(y))
    y = L.Bidirectional(L.LSTM(3), name="r")(L.Reshape((2, 3))(y))
    config = config_of(keras.Model(x, y))
    chosen = random.Random(1)
    for path in chosen.sample(_values(config), 250):
        for poison in (None, -1, "x", [], {}, [[1]], {"class_name": "Dense", "config": {}}, 10**30):
            broken = copy.deepcopy(config)
            if path:
                inner = broken
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = poison
                graph, _, notes = capture(broken)
                assert graph is not None or notes


def test_models_inside_models_do_not_explode() -> None:
    leaf: dict[str, Any] = {
        "class_name": "ReLU",
        "config": {"name": "r"},
        "name": "r",
        "inbound_nodes": [[["i", 0, 0, {}]]],
    }
    model: dict[str, Any] = leaf
    for _ in range(40):
        start = {"class_name": "InputLayer", "config": {"name": "i", "batch_shape": [None, 3]}, "inbound_nodes": []}
        twice = {**model, "name": "m", "inbound_nodes": [[["i", 0, 0, {}]], [["m", 0, 0, {}]]]}
        layers = [{**start, "name": "i"}, twice]
        inner = {"layers": layers, "input_layers": [["i", 0, 0]], "output_layers": [["m", 1, 0]], "name": "m"}
        model = {"class_name": "Functional", "config": inner}
    graph, _, notes = capture(model)
    assert graph is None and len(notes) == 1
