"""Whole models to TensorFlow.js and back, run by TensorFlow.js itself; and what its quantized files compute."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import neutral
from tests.oracle import tfjs_runner
from tests.oracle.process import difference
from tests.oracle.tfjs_runner import Node
from tests.tfjs_models import layer, save, sequential

torch = importlib.import_module("torch")
keras = importlib.import_module("keras")
nn, K = torch.nn, keras.layers
Array = np.ndarray[Any, Any]
CLOSE = 1e-5
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    if reason := tfjs_runner.prepare():
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    started = Node(tmp_path_factory.mktemp("node"))
    yield started
    started.stop()


def computed(node: Node, model: Path, *inputs: Array) -> Array:
    """What TensorFlow.js computes of inputs in its own order of axes."""
    node.call("load", file=str(model / "model.json"))
    given = [
        {"file": node.write(f"x{i}.bin", array), "shape": array.shape, "dtype": array.dtype.name}
        for i, array in enumerate(inputs)
    ]
    shape = node.call("predict", inputs=given, file=str(node.folder / "y.bin"))["shape"]
    return np.fromfile(node.folder / "y.bin", "<f4").reshape(shape)


def f32(*shape: int) -> Array:
    return RNG.normal(size=shape).astype("f4")


def torch_cnn() -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, padding=1),
        nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.ELU(0.7), nn.ConvTranspose2d(8, 5, 3, stride=2), nn.GELU("tanh"),
        nn.Flatten(), nn.Linear(5 * 7 * 9, 16), nn.Hardswish(), nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 3), nn.Softmax(1),
    )  # fmt: skip


def torch_line() -> Any:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=2), nn.Softmax(1), nn.Upsample(scale_factor=2), nn.AvgPool1d(2), nn.Softshrink(),
        nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def torch_volume() -> Any:
    return nn.Sequential(
        nn.Conv3d(3, 4, (2, 3, 2)), nn.PReLU(4), nn.ConvTranspose3d(4, 2, 2, stride=2), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shape"), [(torch_cnn, (2, 3, 8, 12)), (torch_line, (2, 3, 9)), (torch_volume, (2, 3, 4, 5, 6))]
)
def test_torch_models(make: Any, shape: Sequence[int], node: Node, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = make().eval()
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.1, 0.6)
    torch.save(module, tmp_path / "m.pt")
    neutral.convert(tmp_path / "m.pt", to="tfjs")
    x = f32(*shape)
    wanted = module(torch.from_numpy(x)).detach().numpy()
    assert difference(computed(node, tmp_path / "m.tfjs", np.moveaxis(x, 1, -1).copy()), wanted) < CLOSE


def functional() -> Any:
    a, b = K.Input((8, 6, 3)), K.Input((4,))
    c = K.Conv2D(4, 3, padding="same", activation="relu")(a)
    d = K.DepthwiseConv2D(3, strides=1, padding="same")(c)
    s = K.Subtract()([K.Add()([c, d]), K.Multiply()([c, c])])
    gate = K.Conv2D(4, 1, activation="sigmoid")(K.GlobalAveragePooling2D(keepdims=True)(s))
    flat = K.Flatten()(K.AveragePooling2D(2)(K.Multiply()([s, gate])))
    return keras.Model([a, b], K.Dense(3, activation="hard_silu")(K.Concatenate()([flat, b])))


def sequence() -> Any:
    x = K.Input((5, 3))
    y, h, c = K.LSTM(4, return_sequences=True, return_state=True)(x)
    z = K.LSTM(4, return_sequences=True)(y, initial_state=[h, c])
    z = K.Bidirectional(K.GRU(3, reset_after=False, return_sequences=True))(z)
    return keras.Model(
        x, K.TimeDistributed(K.Dense(2))(K.RNN([K.SimpleRNNCell(3), K.LSTMCell(4)], return_sequences=True)(z))
    )


def nested() -> Any:
    inner = keras.Sequential([K.Input((6, 5, 2)), K.Conv2D(3, 2), K.Flatten(), K.BatchNormalization()])
    shared = K.Dense(7, activation="gelu")
    x = K.Input((6, 5, 2))
    h = shared(inner(x))
    return keras.Model(x, K.Average()([shared(K.Dense(60)(h)), h]))


def volume() -> Any:
    layers = [
        K.ZeroPadding3D(((1, 2), (0, 1), (2, 1))),
        K.Conv3D(3, 2),
        K.BatchNormalization(),
        K.Cropping3D(1),
        K.UpSampling3D(2),
    ]
    return keras.Sequential([K.Input((4, 5, 6, 2)), *layers, K.GlobalMaxPooling3D()])


@pytest.mark.parametrize("make", [functional, sequence, nested, volume])
def test_keras_models_and_back(make: Any, node: Node, tmp_path: Path) -> None:
    model = make()
    for weight in model.weights:
        weight.assign(RNG.uniform(0.1, 0.6, weight.shape))
    model.save(tmp_path / "m.keras")
    inputs = [f32(2, *each.shape[1:]) for each in model.inputs]
    wanted = np.asarray(model(inputs if len(inputs) > 1 else inputs[0]))
    neutral.convert(tmp_path / "m.keras", to="tfjs")
    assert difference(computed(node, tmp_path / "m.tfjs", *inputs), wanted) < CLOSE
    neutral.convert(tmp_path / "m.tfjs", tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    assert difference(np.asarray(again(inputs if len(inputs) > 1 else inputs[0])), wanted) < CLOSE


@pytest.mark.parametrize("quantization", ["uint8", "uint16", "float16"])
def test_quantized_weights_are_read_as_tensorflow_js_computes_them(
    quantization: str, node: Node, tmp_path: Path
) -> None:
    dtype = np.dtype(quantization)
    shapes = {"d/kernel": (5, 4), "d/bias": (4,)}
    if dtype.kind == "u":
        arrays = {name: RNG.integers(0, np.iinfo(dtype).max, shape, dtype) for name, shape in shapes.items()}
        told = {"dtype": quantization, "min": -0.3137, "scale": 0.7 / np.iinfo(dtype).max}
    else:
        arrays, told = (
            {name: RNG.normal(size=shape).astype(dtype) for name, shape in shapes.items()},
            {"dtype": quantization},
        )
    dense = layer("Dense", "d", units=4, batch_input_shape=[None, 5])
    model = save(tmp_path / "m", sequential(dense), arrays, {name: {"quantization": told} for name in shapes})
    neutral.convert(model, tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as found:
        kernel, bias = found["d/kernel"], found["d/bias"]
    # The rows of an identity matrix give the kernel back, bit for bit, if nothing is added.
    zero = {**arrays, "d/bias": np.zeros(4, dtype)}
    low = {"d/bias": {"quantization": {**told, "min": 0.0}} if dtype.kind == "u" else {"quantization": told}}
    plain = save(tmp_path / "p", sequential(dense), zero, {"d/kernel": {"quantization": told}, **low})
    assert np.array_equal(computed(node, plain, np.eye(5, dtype="f4")), kernel.T)
    x = f32(3, 5)
    assert difference(computed(node, model, x), x @ kernel.T + bias) < 1e-6


@pytest.mark.parametrize("cls", ["LSTM", "GRU"])
def test_hard_sigmoids_of_keras_2_stay_what_they_are(cls: str, node: Node, tmp_path: Path) -> None:
    """A file of Keras 2 is built anew for TensorFlow.js, whose hard_sigmoid is that of Keras 2."""
    h5py = importlib.import_module("h5py")
    gates = {"reset_after": False} if cls == "GRU" else {}
    recurrent = getattr(K, cls)(4, recurrent_activation="hard_sigmoid", name="r", **gates)
    model = keras.Sequential([K.Input((5, 3)), recurrent])
    for weight in model.weights:
        weight.assign(RNG.normal(size=weight.shape))
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        file.attrs["keras_version"] = "2.15.0"
    neutral.convert(tmp_path / "m.h5", to="tfjs")
    config = json.loads((tmp_path / "m.tfjs/model.json").read_text())["modelTopology"]["model_config"]["config"]
    assert config["layers"][1]["config"]["recurrent_activation"] == "hard_sigmoid"
    x = f32(2, 5, 3)
    kernel, recurrent_kernel, bias = (weight.numpy() for weight in model.weights)
    assert difference(computed(node, tmp_path / "m.tfjs", x), by_hand(cls, x, kernel, recurrent_kernel, bias)) < CLOSE


def by_hand(cls: str, x: Array, kernel: Array, recurrent: Array, bias: Array) -> Array:
    """The last output, from the definitions of Keras 2."""

    def hard(a: Array) -> Array:
        return np.clip(0.2 * a + 0.5, 0, 1)

    units = len(recurrent)
    h = c = np.zeros((len(x), units), "f4")
    for t in range(x.shape[1]):
        given = x[:, t] @ kernel + bias
        if cls == "LSTM":
            i, f, g, o = np.split(given + h @ recurrent, 4, axis=1)
            c = hard(f) * c + hard(i) * np.tanh(g)
            h = hard(o) * np.tanh(c)
        else:
            z, r = np.split(hard(given[:, : 2 * units] + h @ recurrent[:, : 2 * units]), 2, axis=1)
            new = np.tanh(given[:, 2 * units :] + (r * h) @ recurrent[:, 2 * units :])
            h = z * h + (1 - z) * new
    return h
