"""Graphs that put the axes of an image in another order before they flatten it."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import neutral
from tests.onnx_running import run_onnx

L = keras.layers
LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
UNUSUAL = ([0, 1, 3, 2], [0, 2, 1, 3], [0, 3, 2, 1])


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).uniform(-1, 1, shape).astype(np.float32)


def saved(path: Path, perm: list[int], join: str, *, last: bool = False) -> Path:
    """A convolution, a Transpose, a Flatten or Reshape, and a dense layer; no shapes but those of the input."""
    nodes = [
        helper.make_node("Conv", ["x.first" if last else "x", "conv.weight", "conv.bias"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Transpose", ["relu"], ["turned"], perm=perm),
        helper.make_node(join, ["turned", "shape"][: 1 + (join == "Reshape")], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    if last:
        nodes.insert(0, helper.make_node("Transpose", ["x"], ["x.first"], perm=FIRST))
    stored = {
        "conv.weight": random(4, 3, 2, 2), "conv.bias": random(4), "fc.weight": random(7, 80), "fc.bias": random(7),
        "shape": np.array([-1, 80]),
    }  # fmt: skip
    shape = ["batch", 6, 5, 3] if last else ["batch", 3, 6, 5]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
        for name, sizes in (("x", shape), ("y", ["batch", 7]))
    ]
    graph = helper.make_graph(
        nodes, "model", ports[:1], ports[1:], [numpy_helper.from_array(array, name) for name, array in stored.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


class Net(nn.Module):
    def __init__(self, perm: list[int] | None = None) -> None:
        super().__init__()
        self.perm = perm
        self.conv = nn.Conv2d(3, 4, 2)
        self.fc = nn.Linear(80, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu()
        out: torch.Tensor = self.fc((x if self.perm is None else x.permute(self.perm)).flatten(1))
        return out


@pytest.mark.parametrize("join", ["Flatten", "Reshape"])
@pytest.mark.parametrize("perm", [LAST, *UNUSUAL])
def test_a_new_model_without_shapes_inside(perm: list[int], join: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source.onnx", perm, join, last=True)
    x = random(2, 6, 5, 3)
    (y,) = run_onnx(source, x)
    neutral.convert(source, tmp_path / "new.onnx")
    assert np.abs(run_onnx(tmp_path / "new.onnx", x)[0] - y).max() < 1e-5
    neutral.convert(source, tmp_path / "new.pt2")
    with torch.no_grad():
        found = torch.export.load(tmp_path / "new.pt2").module()(torch.from_numpy(x)).numpy()
    assert np.abs(found - y).max() < 1e-5


@pytest.mark.parametrize("join", ["Flatten", "Reshape"])
@pytest.mark.parametrize("perm", UNUSUAL)
def test_an_unusual_order_is_said_to_torch(perm: list[int], join: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source.onnx", perm, join)
    x = random(2, 3, 6, 5)
    net = Net(perm)
    torch.save(net.state_dict(), tmp_path / "template.pt")
    done = neutral.convert(source, tmp_path / "filled.pt", into=tmp_path / "template.pt")
    assert any("fc" in each and "unusual order" in each for each in done.warnings)
    net.load_state_dict(torch.load(tmp_path / "filled.pt"))
    with torch.no_grad():
        assert np.abs(net(torch.from_numpy(x)).numpy() - run_onnx(source, x)[0]).max() < 1e-5


@pytest.mark.parametrize("perm", UNUSUAL)
def test_an_unusual_order_is_refused_by_keras(perm: list[int], tmp_path: Path) -> None:
    source = saved(tmp_path / "source.onnx", perm, "Flatten")
    model = keras.Sequential(
        [keras.Input((6, 5, 3)), L.Conv2D(4, 2, activation="relu", name="conv"), L.Flatten(), L.Dense(7, name="fc")]
    )
    with pytest.raises(neutral.NeutralError, match=r"fc: found an image .* unusual order"):
        neutral.convert(source, into=model)


SPACE: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], tuple[int, int, int], list[L.Layer]]] = {
    "resized": (
        [helper.make_node("Resize", ["conv", "", "scales"], ["made"], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        {"scales": np.array([1, 1, 2, 2], np.float32)}, (4, 10, 8), [L.UpSampling2D(2)],
    ),
    "cut": (
        [helper.make_node("Slice", ["conv", "starts", "ends", "axes"], ["made"])],
        {"starts": np.array([1]), "ends": np.array([4]), "axes": np.array([2])}, (4, 3, 4), [L.Cropping2D(((1, 1), (0, 0)))],
    ),
    "pooled": (
        [helper.make_node("MaxPool", ["conv"], ["made"], kernel_shape=[2, 2], strides=[2, 1])],
        {}, (4, 2, 3), [L.MaxPooling2D(2, (2, 1))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("first", [0, -1])
@pytest.mark.parametrize("name", SPACE)
def test_channels_last_behind_operators_on_space(name: str, first: int, tmp_path: Path) -> None:
    """Never as if nothing were said of the order."""
    between, stored, (channels, height, width), same = SPACE[name]
    count = channels * height * width
    nodes = [
        helper.make_node("Transpose", ["x"], ["x.first"], perm=FIRST),
        helper.make_node("Conv", ["x.first", "conv.weight", "conv.bias"], ["conv"]),
        *between,
        helper.make_node("Transpose", ["made"], ["last"], perm=LAST),
        helper.make_node("Reshape", ["last", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "fc.weight"], ["y"]),
    ]
    tensors = {
        "conv.weight": random(4, 3, 2, 2), "conv.bias": random(4), "fc.weight": random(count, 7) / 8,
        "shape": np.array([first, count]), **stored,
    }  # fmt: skip
    ports = [
        helper.make_tensor_value_info(port, TensorProto.FLOAT, ["batch", *sizes])
        for port, sizes in (("x", [6, 5, 3]), ("y", [7]))
    ]
    graph = helper.make_graph(
        nodes, "model", ports[:1], ports[1:], [numpy_helper.from_array(array, each) for each, array in tensors.items()]
    )
    source = tmp_path / "source.onnx"
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    onnx.save(made, source)
    x = random(2, 6, 5, 3)
    (y,) = run_onnx(source, x)
    neutral.convert(source, tmp_path / "new.onnx")
    assert np.abs(run_onnx(tmp_path / "new.onnx", x)[0] - y).max() < 1e-5
    model = keras.Sequential(
        [keras.Input((6, 5, 3)), L.Conv2D(4, 2), *same, L.Flatten(), L.Dense(7, use_bias=False, name="fc")]
    )
    try:
        neutral.convert(source, into=model)
    except neutral.NeutralError as refused:
        raise AssertionError(name) from refused
    else:
        assert np.abs(np.asarray(model(x)) - y).max() < 1e-5
