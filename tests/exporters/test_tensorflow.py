"""TensorFlow's files, made by TensorFlow, Keras 3 and tf_keras, read without any of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from neutral.containers import protobuf
from neutral.containers.saved_model import OBJECT_GRAPH_KEY, object_graph, pruned_object_graph
from neutral.containers.tensor_bundle import Bundle, Strings
from neutral.containers.tensor_bundle_writing import write_bundle
from neutral.errors import BadFile, NeutralError, WrongUsage
from neutral.exporters.tensorflow import read, read_live
from neutral.exporters.tensorflow_names import by_name
from neutral.native import NativeModel, from_array

L = keras.layers
K = tf_keras.layers
CELL = {"kernel", "recurrent_kernel", "bias"}
DENSE = {"kernel", "bias"}
NORM = {"gamma", "beta", "moving_mean", "moving_variance"}
HEADS = {f"{head}/{name}" for head in ("query", "key", "value", "attention_output") for name in DENSE}
BOTH = {f"{side}_layer/{name}" for side in ("forward", "backward") for name in CELL}


def randomised(model: Any, seed: int = 0) -> Any:
    """Every weight random, statistics and biases included."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.1, 1, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def functional() -> Any:
    """A nested Sequential, and a layer name that occurs twice."""
    inner = keras.Sequential(
        [keras.Input((5,)), L.Dense(4, name="stem"), L.BatchNormalization(name="bn")], name="inner"
    )
    start = keras.Input((6,), name="start")
    found = inner(L.Dense(5, name="stem")(start))
    return randomised(keras.Model(start, L.Dense(3, name="head")(found), name="outer"))


def recurrent() -> Any:
    return randomised(
        keras.Sequential(
            [
                keras.Input((7, 4)),
                L.LSTM(3, return_sequences=True, name="enc"),
                L.Bidirectional(L.GRU(2, return_sequences=True), name="both"),
                L.TimeDistributed(L.Dense(5, name="inside"), name="each"),
                L.RNN(L.SimpleRNNCell(2), name="last"),
            ],
            name="seq",
        )
    )


def attention() -> Any:
    start = keras.Input((7, 4))
    found = L.MultiHeadAttention(2, 3, name="att")(start, start)
    found = L.SpectralNormalization(L.Dense(5, name="inside"), name="spectral")(found)
    return randomised(keras.Model(start, L.DepthwiseConv1D(2, name="depth")(found)))


class Custom(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.conv_one = L.Conv1D(3, 2, name="ignored")
        self.norm = L.BatchNormalization()
        self.zhead = L.Dense(2)

    def call(self, x: Any) -> Any:
        return self.zhead(self.norm(self.conv_one(x)))


def custom() -> Any:
    model = Custom()
    model(np.zeros((1, 5, 4), "f4"))
    return randomised(model)


def keras2() -> Any:
    return randomised(
        tf_keras.Sequential(
            [
                K.Dense(6, name="stem", input_shape=(7, 4)),
                K.LSTM(3, return_sequences=True, name="enc"),
                K.Bidirectional(K.GRU(2, return_sequences=True), name="both", merge_mode="sum"),
                K.RNN([K.LSTMCell(2), K.GRUCell(3)], return_sequences=True, name="stack"),
                K.TimeDistributed(K.Dense(5, name="inside"), name="each"),
                K.BatchNormalization(name="bn", epsilon=0.01),
                K.RNN(K.SimpleRNNCell(2), name="last"),
            ],
            name="seq",
        )
    )


def keras2_nested() -> Any:
    start = tf_keras.Input((7, 4))
    inner = tf_keras.Sequential([K.Dense(5, name="d", input_shape=(7, 4))], name="inner")
    found = inner(K.MultiHeadAttention(2, 3, name="att")(start, start))
    return randomised(tf_keras.Model(start, K.SeparableConv1D(3, 2, name="sep")(found), name="outer"))


def names(model: NativeModel) -> dict[str, set[str]]:
    return {layer.path: set(layer.tensors) for layer in model.layers}


def value(model: NativeModel, path: str, local: str) -> np.ndarray:
    (layer,) = [layer for layer in model.layers if layer.path == path]
    return layer.tensors[local].data.read()


def all_values(model: NativeModel) -> list[bytes]:
    return sorted(tensor.data.read().tobytes() for tensor in model.tensors())


FUNCTIONAL = {"stem": DENSE, "inner.stem": DENSE, "inner.bn": NORM, "head": DENSE}
RECURRENT = {"enc": CELL, "both": BOTH, "each": DENSE, "last": CELL}
ATTENTION = {"att": HEADS, "spectral": {*DENSE, "spectral/1"}, "depth": DENSE}
CUSTOM = {"conv_one": DENSE, "norm": NORM, "zhead": DENSE}


@pytest.mark.parametrize(
    ("make", "expected", "ordered"),
    [
        (functional, FUNCTIONAL, True),
        (recurrent, RECURRENT, True),
        (attention, ATTENTION, True),
        (custom, CUSTOM, False),
    ],
)
def test_keras_3_checkpoints(
    tmp_path: Path, make: Callable[[], Any], expected: dict[str, set[str]], ordered: bool
) -> None:
    live = make()
    prefix = tf.train.Checkpoint(model=live).write(str(tmp_path / "x"))
    model = read(Path(prefix))
    assert names(model) == expected
    assert list(names(model)) == list(expected) if ordered else True
    assert (model.framework, model.format, model.ordered) == ("tensorflow", "checkpoint", ordered)
    assert all_values(model) == sorted(w.tobytes() for w in live.get_weights())
    assert all(layer.cls is None and layer.evidence == "none" for layer in model.layers)
    for tensor in model.tensors():
        assert tensor.name.endswith("/.ATTRIBUTES/VARIABLE_VALUE")


def test_values_are_those_of_the_layers(tmp_path: Path) -> None:
    live = functional()
    tf.train.Checkpoint(model=live).write(str(tmp_path / "x"))
    live.export(str(tmp_path / "sm"), verbose=False)
    for source in ("x", "sm"):
        model = read(tmp_path / source)
        assert np.array_equal(value(model, "stem", "kernel"), live.get_layer("stem").kernel)
        inner = live.get_layer("inner")
        assert np.array_equal(value(model, "inner.stem", "kernel"), inner.get_layer("stem").kernel)
        assert np.array_equal(value(model, "inner.bn", "moving_variance"), inner.get_layer("bn").moving_variance)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (functional, FUNCTIONAL),
        # Only the name of the variable is left, which does not tell a wrapper from a model of one layer.
        (recurrent, {"enc": CELL, "both": BOTH, "each.inside": DENSE, "last": CELL}),
        (attention, ATTENTION),
        # Keras 3 names a subclassed model's variables without their layer.
        (custom, {"custom": DENSE, "custom_1": NORM, "custom_2": DENSE}),
    ],
)
def test_keras_3_exports_have_each_variable_once(
    tmp_path: Path, make: Callable[[], Any], expected: dict[str, set[str]]
) -> None:
    live = make()
    live.export(str(tmp_path / "sm"), verbose=False)
    model = read(tmp_path / "sm")
    assert model.format == "savedmodel"
    found = names(model)
    if make is custom:
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected.values()))
    else:
        assert found == expected
    with Bundle(tmp_path / "sm" / "variables" / "variables") as bundle:
        stored = [key for key in bundle.entries if key.startswith("_all_variables/")]
    assert stored and set(model.metadata["copies"]) == set(stored)
    assert all_values(model) == sorted(w.tobytes() for w in live.get_weights())
    assert all(tensor.name.startswith("variables/") for tensor in model.tensors())


def test_stacked_cells_and_seeds_of_an_export(tmp_path: Path) -> None:
    cells = [L.LSTMCell(2), L.GRUCell(3)]
    live = keras.Sequential([keras.Input((7, 4)), L.RNN(cells, name="stack"), L.Dropout(0.5), L.Dense(2, name="d")])
    live.export(str(tmp_path / "sm"), verbose=False)
    model = read(tmp_path / "sm")
    assert names(model) == {"stack.0": CELL, "stack.1": CELL, "d": DENSE}
    assert model.collections["state"] and all(tensor.state for tensor in model.collections["state"])


KERAS2 = {
    "stem": ("Dense", DENSE),
    "enc": ("LSTM", CELL),
    "both": ("GRU", BOTH),
    "stack.0": ("LSTM", CELL),
    "stack.1": ("GRU", CELL),
    "each": ("Dense", DENSE),
    "bn": ("BatchNormalization", NORM),
    "last": ("SimpleRNN", CELL),
}


def test_keras_2_checkpoint(tmp_path: Path) -> None:
    live = keras2()
    live.save_weights(str(tmp_path / "w"))
    model = read(tmp_path / "w")
    assert names(model) == {path: found for path, (_, found) in KERAS2.items()}
    assert list(names(model)) == list(KERAS2)
    assert model.ordered
    assert all_values(model) == sorted(w.tobytes() for w in live.get_weights())


def test_keras_2_saved_model_knows_its_classes(tmp_path: Path) -> None:
    live = keras2()
    live.save(str(tmp_path / "sm"), save_format="tf")
    model = read(tmp_path / "sm")
    assert {layer.path: (layer.cls, set(layer.tensors)) for layer in model.layers} == KERAS2
    assert {layer.evidence for layer in model.layers} == {"class"}
    configs = {layer.path: layer.config for layer in model.layers}
    assert configs["both"]["bidirectional"] is True and configs["both"]["merge_mode"] == "sum"
    assert configs["both"]["reset_after"] is True
    assert configs["each"]["time_distributed"] is True and configs["each"]["units"] == 5
    assert configs["stack.1"]["cell"] is True and configs["stack.1"]["units"] == 3
    assert configs["bn"]["epsilon"] == 0.01
    assert model.metadata["config"]["class_name"] == "Sequential"
    assert [layer["class_name"] for layer in model.metadata["config"]["config"]["layers"]][1:3] == ["Dense", "LSTM"]
    start = model.metadata["config"]["config"]["layers"][0]["config"]
    assert start["batch_input_shape"] == [None, 7, 4], "a tuple, as in Keras' other files"
    assert all_values(model) == sorted(w.tobytes() for w in live.get_weights())


def test_keras_2_nested_models(tmp_path: Path) -> None:
    live = keras2_nested()
    live.save_weights(str(tmp_path / "w"))
    live.save(str(tmp_path / "sm"), save_format="tf")
    separable = {"depthwise_kernel", "pointwise_kernel", "bias"}
    # The checkpoint counts the inner model and does not name it.
    assert names(read(tmp_path / "w")) == {"att": HEADS, "1.d": DENSE, "sep": separable}
    model = read(tmp_path / "sm")
    assert names(model) == {"att": HEADS, "inner.d": DENSE, "sep": separable}
    assert [layer.cls for layer in model.layers] == ["MultiHeadAttention", "Dense", "SeparableConv1D"]


def test_several_models_and_lists_of_layers(tmp_path: Path) -> None:
    class Block(K.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.att, self.dense = K.MultiHeadAttention(2, 3), [K.Dense(8, name="up"), K.Dense(4, name="down")]

        def call(self, x: Any) -> Any:
            return self.dense[1](self.dense[0](self.att(x, x)))

    class Model(tf_keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.cell = [Block(), Block()], K.Dense(2)

        def call(self, x: Any) -> Any:
            return self.cell(self.blocks[1](self.blocks[0](x)))

    live = Model()
    live(np.zeros((1, 5, 4), "f4"))
    tf.train.Checkpoint(left=live, right=functional()).write(str(tmp_path / "x"))
    block = {"att": HEADS, "dense.0": DENSE, "dense.1": DENSE}
    expected = {f"left.blocks.{i}.{path}": found for i in range(2) for path, found in block.items()}
    expected |= {"left.cell": DENSE} | {f"right.{path}": found for path, found in FUNCTIONAL.items()}
    model = read(tmp_path / "x")
    assert names(model) == expected
    assert list(names(model)) == list(expected)
    assert not model.ordered


@pytest.mark.parametrize("package", [keras, tf_keras])
def test_the_states_and_seeds_of_a_recurrent_layer_are_no_weights(tmp_path: Path, package: Any) -> None:
    start = package.Input(batch_shape=(2, 7, 4))
    found = package.layers.LSTM(3, stateful=True, dropout=0.3, return_sequences=True, name="enc")(start)
    found = package.layers.Bidirectional(package.layers.GRU(2, recurrent_dropout=0.3), name="both")(found)
    live = package.Model(start, found)
    live(np.zeros((2, 7, 4), "f4"), training=True)
    tf.train.Checkpoint(model=live).write(str(tmp_path / "x"))
    model = read(tmp_path / "x")
    assert names(model) == {"enc": CELL, "both": BOTH}
    assert all(tensor.state for tensor in model.collections.get("state", ()))


def test_custom_keras_2_layers_are_unknown(tmp_path: Path) -> None:
    class Scale(K.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.factor = self.add_weight(name="f", shape=(shape[-1],))

        def call(self, x: Any) -> Any:
            return x * self.factor

    live = tf_keras.Sequential([K.Dense(3, input_shape=(4,), name="d"), Scale(name="mine")])
    live.save(str(tmp_path / "sm"), save_format="tf")
    model = read(tmp_path / "sm")
    assert [(layer.path, layer.cls, set(layer.tensors)) for layer in model.layers] == [
        ("d", "Dense", DENSE),
        ("mine", "Custom>Scale", {"f"}),
    ]


@pytest.mark.parametrize("legacy", [False, True])
def test_optimizers_are_a_collection(tmp_path: Path, legacy: bool) -> None:
    """The weights keep their places although a Keras 3 optimizer lists them under shorter ones."""
    if legacy:
        live: Any = tf_keras.Sequential([K.Dense(3, input_shape=(4,), name="stem"), K.Dense(2, name="head")])
        optimizer: Any = tf_keras.optimizers.legacy.Adam()
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(live(np.ones((1, 4), "f4")))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, live.trainable_variables), live.trainable_variables, strict=True)
        )
    else:
        live = functional()
        optimizer = keras.optimizers.Adam()
        optimizer.build(live.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=live, opt=optimizer, step=tf.Variable(3, dtype=tf.int64))
    model = read(Path(checkpoint.save(str(tmp_path / "ckpt"))))
    assert list(names(model)) == (["stem", "head"] if legacy else list(FUNCTIONAL))
    assert all_values(model) == sorted(w.tobytes() for w in live.get_weights())
    assert len(model.collections["optimizer"]) >= 2 * len(live.trainable_variables)
    assert [tensor.name.partition("/")[0] for tensor in model.collections["state"]] == ["save_counter", "step"]
    assert all(tensor.state for tensor in model.collections["state"])


class Block(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(np.arange(6, dtype="f4").reshape(2, 3), name="called")
        self.parts = [tf.Variable([1.0, 2.0]), tf.Variable(tf.cast([3.0, 4.0], tf.bfloat16))]
        self.table = {"a/b": tf.Variable(7.0)}


def test_tf_module(tmp_path: Path) -> None:
    tf.saved_model.save(Block(), str(tmp_path / "sm"))
    model = read(tmp_path / "sm")
    assert names(model) == {"root": {"w"}, "parts": {"0", "1"}, "table": {"a/b"}}
    assert value(model, "parts", "1").dtype.name == "bfloat16"
    assert value(model, "table", "a/b") == 7


def tf1_checkpoint(folder: Path) -> Path:
    v1 = tf.compat.v1
    folder.mkdir()
    with tf.Graph().as_default(), v1.Session() as session:
        kernel = v1.get_variable("net/dense/kernel", [3, 4])
        bias = v1.get_variable("net/dense/bias", [4])
        v1.get_variable("alone", [2])
        step = v1.train.get_or_create_global_step()
        with v1.variable_scope("part", partitioner=v1.fixed_size_partitioner(3)):
            v1.get_variable("w", [7, 5])
        v1.train.AdamOptimizer().minimize(tf.reduce_sum(kernel) + tf.reduce_sum(bias), global_step=step)
        v1.train.ExponentialMovingAverage(0.9).apply([kernel, bias])
        session.run(v1.global_variables_initializer())
        return Path(v1.train.Saver(sharded=True).save(session, str(folder / "model"), global_step=5))


def test_tf1_checkpoint(tmp_path: Path) -> None:
    prefix = tf1_checkpoint(tmp_path / "tf1")
    model = read(prefix)
    assert names(model) == {"alone": {"0"}, "net.dense": {"bias", "kernel"}, "part": {"w"}}
    assert value(model, "part", "w").shape == (7, 5)
    assert {tensor.name for tensor in model.collections["state"]} == {"global_step"}
    averages = {"net/dense/bias/ExponentialMovingAverage", "net/dense/kernel/ExponentialMovingAverage"}
    assert {tensor.name for tensor in model.collections["ema"]} == averages
    adam = {"net/dense/kernel/Adam", "net/dense/kernel/Adam_1", "beta1_power", "beta2_power"}
    assert adam < {tensor.name for tensor in model.collections["optimizer"]}
    assert "object_graph" not in model.metadata
    smooth = read(prefix, key="ema")
    assert {t.name for layer in smooth.layers for t in layer.tensors.values()} == {*averages, "alone", "part/w"}
    assert {tensor.name for tensor in smooth.collections["raw"]} == {"net/dense/bias", "net/dense/kernel"}
    with pytest.raises(WrongUsage, match="--key other"):
        read(prefix, key="other")


def test_every_way_to_name_a_checkpoint(tmp_path: Path) -> None:
    prefix = tf1_checkpoint(tmp_path / "tf1")
    expected = names(read(prefix))
    ways = [tmp_path / "tf1", prefix.with_name(prefix.name + ".index"), prefix.with_name(prefix.name + ".meta")]
    for way in (*ways, prefix.with_name(prefix.name + ".data-00000-of-00001")):
        assert names(read(way)) == expected
    (tmp_path / "tf1" / "checkpoint").unlink()
    assert names(read(tmp_path / "tf1")) == expected
    tf.saved_model.save(Block(), str(tmp_path / "sm"))
    assert names(read(tmp_path / "sm" / "saved_model.pb")) == names(read(tmp_path / "sm"))


@pytest.mark.parametrize(
    "text", ["", "model_checkpoint_path: 5", 'model_checkpoint_path: ".."', 'model_checkpoint_path: "a/"']
)
def test_a_pointer_to_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint").write_text(text)
    with pytest.raises(BadFile):
        read(tmp_path)


def test_a_pointer_leads_nowhere_else(tmp_path: Path) -> None:
    prefix = tf1_checkpoint(tmp_path / "secret")
    (tmp_path / "bait").mkdir()
    (tmp_path / "bait" / "checkpoint").write_text(f'model_checkpoint_path: "{prefix}"')
    with pytest.raises(BadFile, match="bait"):
        read(tmp_path / "bait")


def test_neither_framework_is_imported(tmp_path: Path) -> None:
    functional().export(str(tmp_path / "sm"), verbose=False)
    code = (
        "import sys; from pathlib import Path; from neutral.exporters.tensorflow import read\n"
        "model = read(Path(sys.argv[1])); [t.data.read() for t in model.tensors()]; model.close()\n"
        "print(sorted({'tensorflow', 'keras', 'tf_keras', 'torch', 'google.protobuf'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sm")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_live_objects() -> None:
    block = Block()
    model = read_live(block)
    assert names(model) == {"root": {"w"}, "parts": {"0", "1"}, "table": {"a/b"}}
    assert np.array_equal(value(model, "root", "w"), block.w.numpy())
    model.close()
    given = {"net/dense/kernel": tf.Variable(tf.ones([2, 3])), "net/dense/bias": tf.Variable(tf.zeros([3]))}
    assert names(read_live(given)) == {"net.dense": DENSE}


def test_strings_are_kept_aside(tmp_path: Path) -> None:
    strings = {"words": Strings((2,), (b"a", b"\xff"))}
    write_bundle(tmp_path / "x", {"d/kernel": from_array(np.ones((2, 3), "f4"))}, strings)
    model = read(tmp_path / "x")
    assert names(model) == {"d": {"kernel"}}
    assert model.metadata["strings"] == {"words": {"shape": [2], "values": ["YQ==", "/w=="]}}
    assert "words" in model.notes[0]
    write_bundle(tmp_path / "y", {}, strings)
    with pytest.raises(BadFile, match="no tensors"):
        read(tmp_path / "y")


def test_names_alone() -> None:
    variables = [
        ("bi/forward_lstm/lstm_cell/kernel", "bi", "forward_layer/kernel"),
        ("bi/forward_lstm/lstm_cell/recurrent_kernel", "bi", "forward_layer/recurrent_kernel"),
        ("bi/backward_lstm/lstm_cell/kernel", "bi", "backward_layer/kernel"),
        ("bi/backward_lstm/lstm_cell/recurrent_kernel", "bi", "backward_layer/recurrent_kernel"),
        # TensorFlow 1's own LSTM: one fused kernel, which is no Keras LSTM and must not look like one.
        ("rnn/lstm_cell/kernel", "rnn.lstm_cell", "kernel"),
        ("rnn/lstm_cell/bias", "rnn.lstm_cell", "bias"),
        ("depth/depthwise_kernel", "depth", "kernel"),
        ("conv/kernel:0", "conv", "kernel"),
        ("a/query/kernel", "a.query", "kernel"),
    ]
    found = by_name([(name, name) for name, _, _ in variables], listed=False)
    assert {(key, group.path, local) for group in found for local, key in group.locals.items()} == set(variables)


# Damaged object graphs and metadata.


def test_a_child_that_does_not_exist_is_refused() -> None:
    child = protobuf.message(1, protobuf.number(1, 5) + protobuf.text(2, "x"))
    with pytest.raises(BadFile, match="object 5"):
        object_graph(protobuf.message(1, child), "test")


@pytest.mark.parametrize("depth", [60, 3000])
def test_cyclic_graphs_are_read_and_endless_ones_refused(tmp_path: Path, depth: int) -> None:
    nodes = []
    for i in range(depth):
        ends = [(i + 1, "next"), (0, "root")] if i + 1 < depth else [(0, "root")]
        children = b"".join(protobuf.message(1, protobuf.number(1, n) + protobuf.text(2, name)) for n, name in ends)
        key = protobuf.text(1, "VARIABLE_VALUE") + protobuf.text(2, "v") + protobuf.text(3, "k")
        nodes.append(protobuf.message(1, children + (protobuf.message(2, key) if i + 1 == depth else b"")))
    graph = Strings((), (b"".join(nodes),))
    write_bundle(tmp_path / "x", {"k": from_array(np.ones(2))}, {OBJECT_GRAPH_KEY: graph})
    if depth == 3000:
        with pytest.raises(BadFile, match="nested over"):
            read(tmp_path / "x")
    else:
        (layer,) = read(tmp_path / "x").layers
        assert layer.path.count(".") == depth - 3


def test_damaged_graphs_are_read_or_refused(tmp_path: Path) -> None:
    tf.train.Checkpoint(model=recurrent()).write(str(tmp_path / "x"))
    rng = random.Random(1)
    with Bundle(tmp_path / "x") as bundle:
        tensors = {key: bundle.tensor(key) for key in bundle.entries if bundle.readable(key)}
        good = bundle.strings(OBJECT_GRAPH_KEY).values[0]
        refused = 0
        for _ in range(120):
            graph = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                graph[rng.randrange(len(graph))] = rng.randrange(256)
            if rng.random() < 0.3:
                del graph[rng.randrange(len(graph)) :]
            strings = {OBJECT_GRAPH_KEY: Strings((), (bytes(graph),))}
            write_bundle(tmp_path / "y", tensors, strings, force=True)
            try:
                model = read(tmp_path / "y")
            except NeutralError:
                refused += 1
                continue
            everything = [*model.tensors(), *(t for found in model.collections.values() for t in found)]
            assert sorted(tensor.name for tensor in everything) == sorted(tensors), "each tensor exactly once"
            assert len({layer.path for layer in model.layers}) == len(model.layers)
            model.close()
    assert refused > 20


def test_damaged_metadata_is_read_or_refused(tmp_path: Path) -> None:
    keras2_nested().save(str(tmp_path / "sm"), save_format="tf")
    rng = random.Random(2)
    for name in ("keras_metadata.pb", "saved_model.pb"):
        path = tmp_path / "sm" / name
        good = path.read_bytes()
        if name == "saved_model.pb":
            (tmp_path / "sm" / "keras_metadata.pb").unlink()
        for _ in range(100):
            damaged = bytearray(good)
            damaged[rng.randrange(min(len(damaged), 3000))] = rng.randrange(256)
            path.write_bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.2 else damaged)
            try:
                assert len(list(read(tmp_path / "sm").tensors())) == 13
            except NeutralError:
                continue
        path.write_bytes(good)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "[]",
        '{"name": 5}',
        '{"class_name": "RNN", "config": {"cell": 1}}',
        '{"class_name": 3, "config": {}}',
    ],
)
def test_strange_metadata_gives_an_unknown_layer_or_a_refusal(tmp_path: Path, text: str) -> None:
    live = tf_keras.Sequential([K.Dense(3, input_shape=(4,), name="d")])
    live.save(str(tmp_path / "sm"), save_format="tf")
    node = protobuf.number(2, 1) + protobuf.text(4, "_tf_keras_layer") + protobuf.text(5, text)
    (tmp_path / "sm" / "keras_metadata.pb").write_bytes(protobuf.message(1, node))
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        with pytest.raises(BadFile, match="JSON"):
            read(tmp_path / "sm")
    else:
        (layer,) = read(tmp_path / "sm").layers
        assert (layer.path, layer.cls, set(layer.tensors)) == ("d", None, DENSE)


def test_pruning_keeps_all_but_the_missing(tmp_path: Path) -> None:
    tf.train.Checkpoint(model=functional()).write(str(tmp_path / "x"))
    with Bundle(tmp_path / "x") as bundle:
        graph = bundle.strings(OBJECT_GRAPH_KEY).values[0]
        keys = [key for key in bundle.entries if key != OBJECT_GRAPH_KEY]
    assert pruned_object_graph(graph, keys, "test") == graph
    fewer = object_graph(pruned_object_graph(graph, keys[1:], "test"), "test")
    before = object_graph(graph, "test")
    assert [node.children for node in fewer] == [node.children for node in before]
    assert {a.key for node in fewer for a in node.attributes} == set(keys[1:])
