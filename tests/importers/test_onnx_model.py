"""Whole ONNX models made from the graph of an archive, run by onnxruntime against the framework that the model is from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import neutral
from neutral.containers import onnx_building
from neutral.errors import Refused
from neutral.importers.onnx_model import build
from neutral.native import NativeModel
from neutral.schema.kinds import KINDS, Parameter
from neutral.schema.manifest import Manifest, Source
from tests.cases import models as m
from tests.onnx_running import attributes, initializers, operators, run_onnx

L = keras.layers
R = m.random


def image(*behind: nn.Module) -> nn.Module:
    """Two channels in, three into what is tested."""
    return nn.Sequential(nn.Conv2d(2, 3, 1), *behind)


def line(*behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 1), *behind)


def volume(*behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 3, 1), *behind)


def vector(*behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *behind, nn.Linear(6, 2))


PICTURE, WIRE, CUBE, FLAT = R(2, 2, 8, 7), R(2, 2, 11), R(2, 2, 5, 6, 7), 3 * R(3, 5)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 5))

TORCH: dict[str, tuple[Callable[[], nn.Module], np.ndarray]] = {
    "max pool, ceil": (lambda: image(nn.MaxPool2d(3, 2, 1, ceil_mode=True)), PICTURE),
    "max pool, ceil, last window in the padding": (lambda: image(nn.MaxPool2d(2, 3, ceil_mode=True)), R(2, 2, 7, 8)),
    "max pool, dilated": (lambda: image(nn.MaxPool2d((3, 2), (1, 2), (1, 0), dilation=(2, 3))), R(2, 2, 9, 10)),
    "max pool 1d": (lambda: line(nn.MaxPool1d(3, 2, 1, dilation=2, ceil_mode=True)), WIRE),
    "max pool 3d": (lambda: volume(nn.MaxPool3d(2, 2, 1, ceil_mode=True)), CUBE),
    "max pool of a border of zeros": (lambda: image(nn.ZeroPad2d(1), nn.MaxPool2d(2)), PICTURE - 9),
    "average": (lambda: image(nn.AvgPool2d(3, 2, 1)), PICTURE),
    "average, ceil": (lambda: image(nn.AvgPool2d(3, 2, 1, ceil_mode=True)), PICTURE),
    "average without the border, ceil": (
        lambda: image(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
        PICTURE,
    ),
    "average 3d": (lambda: volume(nn.AvgPool3d(2, 2, 1, ceil_mode=True)), CUBE),
    "average of a border": (lambda: image(nn.ZeroPad2d((1, 0, 2, 1)), nn.AvgPool2d(2)), PICTURE),
    "nearest": (lambda: image(nn.Upsample(scale_factor=(1.7, 0.6))), PICTURE),
    "nearest, exact": (lambda: image(nn.Upsample(scale_factor=(1.7, 0.6), mode="nearest-exact")), PICTURE),
    "nearest, to a size": (lambda: image(nn.Upsample(size=(5, 11))), PICTURE),
    "bilinear": (lambda: image(nn.Upsample(scale_factor=(1.7, 0.6), mode="bilinear")), PICTURE),
    "bilinear, corners": (lambda: image(nn.Upsample(size=(5, 1), mode="bilinear", align_corners=True)), PICTURE),
    "linear": (lambda: line(nn.Upsample(scale_factor=2.5, mode="linear")), WIRE),
    "trilinear": (lambda: volume(nn.Upsample(scale_factor=2, mode="trilinear")), CUBE),
    "bicubic": (lambda: image(nn.Upsample(scale_factor=(2, 3), mode="bicubic")), PICTURE),
    "pad, a number": (lambda: image(nn.ConstantPad2d((1, 2, 3, 0), 1.5), nn.Conv2d(3, 2, 2)), PICTURE),
    "pad, reflected": (lambda: image(nn.ReflectionPad2d((1, 2, 3, 0))), PICTURE),
    "pad, repeated": (lambda: image(nn.ReplicationPad2d((1, 2, 3, 0))), PICTURE),
    "pad, around": (lambda: image(nn.CircularPad2d((1, 2, 3, 0))), PICTURE),
    "conv, same": (lambda: image(nn.Conv2d(3, 4, (3, 4), padding="same", dilation=(1, 2))), PICTURE),
    "conv, reflected": (lambda: image(nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect")), PICTURE),
    "conv, around": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, 2, 2, groups=2, padding_mode="circular")), WIRE),
    "conv 3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, (3, 2, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2), groups=2)), CUBE),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2)),
        R(2, 4, 5, 6),
    ),
    "transposed, dilated": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, (3, 2), (2, 1), 2, (1, 2), dilation=(2, 3))),
        R(2, 2, 5, 6),
    ),
    "transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 4, 3, 2, 2)), R(2, 2, 5)),
    "transposed 3d": (lambda: nn.Sequential(nn.ConvTranspose3d(2, 3, 2, 2, 1, 1)), R(2, 2, 3, 4, 5)),
    "slopes of channels": (lambda: image(nn.PReLU(3)), PICTURE),
    "slopes of channels 1d": (lambda: line(nn.PReLU(3)), WIRE),
    "slopes of features": (lambda: vector(nn.PReLU(6)), FLAT),
    "one slope": (lambda: image(nn.PReLU()), PICTURE),
    "batch norm without weights": (lambda: line(nn.BatchNorm1d(3, affine=False)), WIRE),
    "instance norms": (lambda: image(nn.InstanceNorm2d(3, affine=True), nn.InstanceNorm2d(3)), PICTURE),
    "group norms": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 2), nn.GroupNorm(3, 6), nn.GroupNorm(2, 6, affine=False), nn.GroupNorm(6, 6)),
        PICTURE,
    ),
    "group norm of a vector": (lambda: vector(nn.GroupNorm(3, 6)), FLAT),
    "layer norms": (
        lambda: image(nn.LayerNorm((3, 8, 7)), nn.LayerNorm((8, 7), bias=False), nn.LayerNorm(7, elementwise_affine=False)),
        PICTURE,
    ),
    "rms norms": (lambda: image(nn.RMSNorm((8, 7)), nn.RMSNorm(7, elementwise_affine=False)), PICTURE),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(2, 8, 2), nn.PixelShuffle(2)), PICTURE),
    "local response": (lambda: nn.Sequential(nn.Conv2d(2, 8, 2), nn.LocalResponseNorm(3, 0.1, 0.6, 1.3)), PICTURE),
    "gated": (lambda: nn.Sequential(nn.Linear(5, 6), nn.GLU(), nn.LogSigmoid(), nn.Tanhshrink()), FLAT),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3), nn.LayerNorm(3)), TOKENS),
    "adaptive": (
        lambda: image(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Unflatten(1, (3, 1, 1)), nn.AdaptiveAvgPool2d(1)),
        PICTURE,
    ),
    **{
        f"activation {one}": (lambda one=one: vector(one), FLAT)  # type: ignore[misc]
        for one in (
            nn.CELU(1.7), nn.ELU(0.4), nn.GELU(), nn.GELU("tanh"), nn.Hardshrink(0.3), nn.Hardsigmoid(), nn.Hardswish(),
            nn.Hardtanh(-0.4, 0.8), nn.LeakyReLU(0.3), nn.LogSoftmax(1), nn.Mish(), nn.ReLU6(), nn.SELU(), nn.SiLU(),
            nn.Sigmoid(), nn.Softmax(-1), nn.Softmin(1), nn.Softplus(), nn.Softshrink(0.4), nn.Softsign(), nn.Tanh(),
            nn.Threshold(0.3, 0), nn.RReLU(), nn.Dropout(),
        )
    },
}  # fmt: skip


def converted(module: nn.Module, tmp_path: Path) -> Path:
    torch.save(module, tmp_path / "model.pt")
    neutral.convert(tmp_path / "model.pt", tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("name", TORCH)
def test_a_sequential_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    make, x = TORCH[name]
    module = m.randomized(make(), 3)
    (found,) = run_onnx(converted(module, tmp_path), x)
    m.assert_close(found, module(torch.from_numpy(x)).detach().numpy(), 3e-6)


# --- Keras, for what a Sequential of torch does not have ---


def sequence(*behind: Any) -> Any:
    return keras.Sequential([keras.Input((6, 5)), *behind])


def states() -> Any:
    x = keras.Input((6, 5))
    y, h, c = L.LSTM(4, return_sequences=True, return_state=True)(x)
    z = L.LSTM(4)(y, initial_state=[h, c])
    return keras.Model(x, [y, h, L.Dense(2)(z)])


def states_of_both() -> Any:
    x = keras.Input((6, 5))
    y, *given = L.Bidirectional(L.GRU(4, return_sequences=True, return_state=True))(x)
    return keras.Model(x, [y, *given, L.Bidirectional(L.GRU(4))(y, initial_state=given)])


def apart() -> Any:
    x = keras.Input((6, 5))
    return keras.Model(x, L.Bidirectional(L.SimpleRNN(4, activation="relu", return_sequences=True), merge_mode=None)(x))


def attention(**settings: Any) -> Any:
    x, y = keras.Input((6, 5)), keras.Input((4, 3))
    return keras.Model([x, y], L.MultiHeadAttention(2, 3, value_dim=4, **settings)(x, y))


def causal() -> Any:
    x = keras.Input((6, 5))
    return keras.Model(x, L.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True))


def grouped() -> Any:
    x = keras.Input((6, 8))
    return keras.Model(x, L.GroupQueryAttention(3, 4, 2)(x, x))


def shared() -> Any:
    """One layer on a vector and on a sequence."""
    x, y = keras.Input((6, 5)), keras.Input((5,))
    layer = L.Dense(4)
    return keras.Model([x, y], L.Multiply()([layer(x), L.RepeatVector(6)(layer(y))]))


KERAS: dict[str, tuple[Callable[[], Any], tuple[np.ndarray, ...]]] = {
    "backwards": (lambda: sequence(L.LSTM(4, go_backwards=True, return_sequences=True), L.GRU(3, go_backwards=True)), (R(3, 6, 5),)),
    "states": (states, (R(3, 6, 5),)),
    "states of both directions": (states_of_both, (R(3, 6, 5),)),
    "directions apart": (apart, (R(3, 6, 5),)),
    **{
        f"merged by {mode}": (
            lambda mode=mode: sequence(L.Bidirectional(L.LSTM(4, return_sequences=True), merge_mode=mode), L.Bidirectional(L.LSTM(3), merge_mode=mode)),
            (R(3, 6, 5),),
        )
        for mode in ("sum", "mul", "ave", "concat")
    },
    **{
        f"inside: {name}": (lambda name=name: sequence(L.LSTM(4, activation=name, recurrent_activation="hard_sigmoid")), (R(3, 6, 5),))
        for name in ("relu", "elu", "leaky_relu", "softsign", "softplus", "linear", "hard_sigmoid")
    },
    "reset before": (lambda: sequence(L.GRU(4, reset_after=False, return_sequences=True), L.GRU(3, use_bias=False)), (R(3, 6, 5),)),
    "attention": (attention, (R(3, 6, 5), R(3, 4, 3))),
    "attention of another width": (lambda: attention(output_shape=7, use_bias=False), (R(3, 6, 5), R(3, 4, 3))),
    "causal attention": (causal, (R(3, 6, 5),)),
    "shared keys": (grouped, (R(3, 6, 8),)),
    "einsum": (lambda: sequence(L.EinsumDense("abc,cd->adb", (4, 6), bias_axes="d")), (R(3, 6, 5),)),
    "einsum of both": (lambda: sequence(L.EinsumDense("abc,bcd->abd", (6, 4), bias_axes="bd")), (R(3, 6, 5),)),
    "one layer twice": (shared, (R(3, 6, 5), R(3, 5))),
    "slopes of elements": (lambda: sequence(L.Conv1D(4, 2), L.PReLU()), (R(3, 6, 5),)),
    "norm of an offset alone": (lambda: sequence(L.LayerNormalization(scale=False), L.Dense(3), L.BatchNormalization(scale=False, center=False)), (R(3, 6, 5),)),
    "norm over two axes": (lambda: sequence(L.LayerNormalization(axis=[1, 2])), (R(3, 6, 5),)),
    "transposed, same": (lambda: keras.Sequential([keras.Input((5, 6, 2)), L.Conv2DTranspose(3, 3, strides=2, padding="same"), L.Conv2DTranspose(2, 2, strides=3)]), (R(2, 5, 6, 2),)),
    "same, strided": (lambda: keras.Sequential([keras.Input((8, 7, 2)), L.Conv2D(3, 3, strides=2, padding="same"), L.MaxPooling2D(3, 2, padding="same"), L.AveragePooling2D(2, 1, padding="same")]), (R(2, 8, 7, 2),)),
    "causal": (lambda: sequence(L.Conv1D(4, 3, dilation_rate=2, padding="causal")), (R(3, 6, 5),)),
    "rescaled": (lambda: sequence(L.Rescaling(0.5, offset=-1.0), L.Dense(2, activation="hard_sigmoid")), (R(3, 6, 5),)),
}  # fmt: skip


@pytest.mark.parametrize("name", KERAS)
def test_a_keras_model_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    make, inputs = KERAS[name]
    model = m.randomized_keras(make(), 1)
    model.save(tmp_path / "model.keras")
    neutral.convert(tmp_path / "model.keras", tmp_path / "model.onnx")
    found = run_onnx(tmp_path / "model.onnx", *(channels_first(x, tmp_path) for x in inputs))
    expected = model([*inputs] if len(inputs) > 1 else inputs[0], training=False)
    expected = expected if isinstance(expected, list | tuple) else [expected]
    for ours, theirs in zip(found, expected, strict=True):
        wanted = keras.ops.convert_to_numpy(theirs)
        m.assert_close(ours if ours.shape == wanted.shape else m.channels_last(ours), wanted, 3e-6)


def channels_first(x: np.ndarray, tmp_path: Path) -> np.ndarray:
    """An image in the order of the model that was written; no two of its sizes are equal."""
    inputs = onnx.load(tmp_path / "model.onnx").graph.input
    shapes = [tuple(dim.dim_value for dim in port.type.tensor_type.shape.dim)[1:] for port in inputs]
    return x if x.shape[1:] in shapes else m.channels_first(x)


# --- the file ---


def test_nodes_and_initializers_have_the_names_of_the_layers(tmp_path: Path) -> None:
    module = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.PReLU(3)), flat=nn.Flatten(), head=nn.Linear(27, 2)))  # fmt: skip
    out = converted(m.randomized(module, 1), tmp_path)
    found = initializers(out)
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items() if "tracked" not in name}
    assert found.keys() == state.keys()
    assert found["body.2.weight"].shape == (3, 1, 1)
    assert all((found[name].reshape(array.shape) == array).all() for name, array in state.items())
    assert [node.name for node in onnx.load(out).graph.node] == ["body.0", "body.1", "body.2", "flat", "head"]


def test_tied_weights_are_one_initializer(tmp_path: Path) -> None:
    module = m.randomized(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)), 1)
    module[1].weight = module[0].weight
    out = converted(module, tmp_path)
    assert list(initializers(out)) == ["0.weight"] and operators(out) == ["Gather", "Transpose", "MatMul"]
    found, expected = run_onnx(out, TOKENS % 7)[0], module(torch.from_numpy(TOKENS % 7)).detach().numpy()
    m.assert_close(found, expected, 3e-6)
    assert neutral.digest(out) == neutral.digest(module)


def test_an_input_is_told_by_its_axes(tmp_path: Path) -> None:
    out = converted(nn.Sequential(nn.Conv2d(2, 3, 2)), tmp_path)
    graph = onnx.load(out).graph
    dims = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 2, "input_height", "input_width"]


@pytest.mark.parametrize(("layer", "opset", "ir"), [(nn.LayerNorm(4), 21, 10), (nn.RMSNorm(4), 23, 11)])
def test_the_lowest_operator_set_that_does(layer: nn.Module, opset: int, ir: int, tmp_path: Path) -> None:
    model = onnx.load(converted(nn.Sequential(nn.Linear(3, 4), layer), tmp_path))
    assert ([(one.domain, one.version) for one in model.opset_import], model.ir_version) == ([("", opset)], ir)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(5, 6), nn.CELU(1.7), nn.Softshrink(0.4), nn.LayerNorm(6), nn.Linear(6, 2))
    module = m.randomized(module, 1).to(getattr(torch, dtype))
    out = converted(module, tmp_path)
    onnx.checker.check_model(str(out), full_check=True)
    expected = module(torch.from_numpy(FLAT).to(getattr(torch, dtype))).detach().double().numpy()
    found = ReferenceEvaluator(str(out)) if dtype == "float64" else None
    if found is not None:
        # ONNX keeps settings (eps, alpha) in float32.
        np.testing.assert_allclose(found.run(None, {"input": FLAT.astype(dtype)})[0], expected, atol=1e-8, rtol=0)
    elif dtype == "float16":
        np.testing.assert_allclose(run_onnx(out, FLAT.astype(dtype))[0], expected, atol=5e-3)


def test_layers_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2).half())
    with pytest.raises(Refused, match=r"float32 \(0\) and float16 \(1\)"):
        converted(module, tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_weights_alone_are_no_model(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(Refused, match="without a graph"):
        neutral.convert(tmp_path / "model.pt", tmp_path / "model.onnx")
    manifest = Manifest(source=Source(framework="torch", format="pt"), layers=(), weights_digest="0" * 64)
    with pytest.raises(Refused, match="an ONNX file says how the layers are wired"):
        build(NativeModel("onnx", "onnx", ()), manifest, tmp_path / "model.onnx")


def test_what_onnx_does_not_have_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = sequence(L.LSTM(4, activation="gelu", name="odd"), L.Dense(3))
    model.save(tmp_path / "model.keras")
    with pytest.raises(Refused, match=r"^odd: found the activation gelu, expected one of tanh, sigmoid, relu"):
        neutral.convert(tmp_path / "model.keras", tmp_path / "model.onnx")


def test_a_projected_lstm_is_refused() -> None:
    from neutral.importers.onnx_classes import layer_classes

    shapes = {"input_kernel": (4, 3, 2), "recurrent_kernel": (4, 3, 1), "projection": (1, 3)}
    axes = {role: KINDS["lstm"].parameters_of[role].axes for role in shapes}
    parameters = {
        role: Parameter(axes=axes[role], shape=shape, dtype="float32", sha256="0" * 64)
        for role, shape in shapes.items()
    }
    layer = KINDS["lstm"](path="rnn", parameters=parameters)
    manifest = Manifest(source=Source(framework="torch", format="pt"), layers=(layer,), weights_digest="0" * 64)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="rnn: found an LSTM with a projection"):
        layer_classes(manifest)


def test_the_same_archive_gives_the_same_bytes(tmp_path: Path) -> None:
    out = converted(m.randomized(TORCH["group norms"][0](), 1), tmp_path)
    neutral.convert(tmp_path / "model.pt", tmp_path / "again.onnx")
    assert out.read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(Refused):
        converted(nn.Sequential(nn.Linear(3, 2)), tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == b"mine"


def test_a_model_of_many_bytes_has_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_building, "LARGEST", 10_000)
    module = m.randomized(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 40), nn.Linear(40, 3)), 1)
    out, x = converted(module, tmp_path), R(3, 64)
    assert out.stat().st_size < 3000 and (tmp_path / "model.onnx.data").stat().st_size >= 64 * 50 * 4
    m.assert_close(run_onnx(out, x)[0], module(torch.from_numpy(x)).detach().numpy(), 3e-6)
    places = [
        {entry.key: entry.value for entry in one.external_data}
        for one in onnx.load(out, load_external_data=False).graph.initializer
    ]
    assert [place.get("offset") for place in places] == ["0", None, "16384", None, None, None]
    assert neutral.digest(out) == neutral.digest(module)


def test_a_name_of_a_layer_may_be_that_of_an_input(tmp_path: Path) -> None:
    module = m.randomized(nn.Sequential(OrderedDict([("input", nn.Linear(5, 4)), ("input_", nn.Linear(4, 3))])), 1)
    out = converted(module, tmp_path)
    m.assert_close(run_onnx(out, FLAT)[0], module(torch.from_numpy(FLAT)).detach().numpy(), 3e-6)


def test_settings_of_a_convolution(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((8, 7, 2)), L.Conv2D(4, (3, 2), strides=(2, 1), padding="same", groups=2)])
    model.save(tmp_path / "model.keras")
    neutral.convert(tmp_path / "model.keras", tmp_path / "model.onnx")
    (node,) = onnx.load(tmp_path / "model.onnx").graph.node
    assert attributes(node) == {
        "auto_pad": b"SAME_UPPER", "dilations": [1, 1], "group": 2, "kernel_shape": [3, 2], "strides": [2, 1],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["x.onnx", "x.safetensors", "x.pt"])
def test_a_kernel_that_another_layer_takes_transposed(name: str, tmp_path: Path) -> None:
    """x · Wᵀ · W, of which a new file must not make x · Wᵀ · Wᵀ: the two are of one tensor, and not tied."""
    source, out = tmp_path / "w.onnx", tmp_path / "out" / name
    out.parent.mkdir()
    kernel = R(4, 4)
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "a.weight"], ["m"], transB=1),
        onnx.helper.make_node("MatMul", ["m", "a.weight"], ["y"]),
    ]
    info = [onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, ["n", 4]) for value in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], [onnx.numpy_helper.from_array(kernel, "a.weight")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), source)
    neutral.convert(source, out)
    if name == "x.onnx":
        x = R(3, 4)
        np.testing.assert_allclose(run_onnx(out, x)[0], x @ kernel.T @ kernel, atol=1e-5)
    kinds = {"*": "dense"} if name != "x.onnx" else {}
    with neutral.export_model(out, tmp_path / "x.nwt", kinds=kinds) as archive:
        found = sorted(archive.tensor(tensor).read().tobytes() for tensor in archive.names())
    assert found == sorted([kernel.tobytes(), kernel.T.tobytes()])


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.gru(self.lstm(x)[0])[0]
        return out


@pytest.mark.parametrize("opset", [9, 13])
def test_first_states_that_the_older_exporter_stored_as_zeros(opset: int, tmp_path: Path) -> None:
    """It writes those of one sequence, and an Expand to the batch."""
    module, x = m.randomized(_Tagger(), 3).eval(), R(2, 5, 4)
    torch.onnx.export(module, (torch.from_numpy(x),), str(tmp_path / "old.onnx"), dynamo=False, opset_version=opset)
    neutral.convert(tmp_path / "old.onnx", tmp_path / "new.onnx")
    with torch.no_grad():
        assert np.abs(run_onnx(tmp_path / "new.onnx", x)[0] - module(torch.from_numpy(x)).numpy()).max() < 1e-5
