"""Models whose weights are stored narrower than they compute; norms in training mode and sequences of given lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import neutral
from tests.onnx_running import initializers, run_onnx


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).uniform(-1, 1, shape).astype(np.float32)


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    stored: dict[str, np.ndarray],
    x: tuple[int, list[int]],
    shape: list[int],
    lengths: str = "",
) -> Path:
    given = [helper.make_tensor_value_info("x", *x)]
    given += [helper.make_tensor_value_info(lengths, TensorProto.INT32, [x[1][1]])] if lengths else []
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    tensors = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "model", given, [made], tensors), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    onnx.save(model, path)
    return path


def test_half_weights_behind_casts_compute_in_float(tmp_path: Path) -> None:
    stored = {
        "table": random(9, 4), "fc1.weight": random(5, 4), "fc1.bias": random(5), "fc2.weight": random(5, 3),
        "fc2.bias": random(3),
    }  # fmt: skip
    nodes = [helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT) for name in stored]
    nodes += [
        helper.make_node("Gather", ["table.float", "x"], ["rows"]),
        helper.make_node("Gemm", ["rows", "fc1.weight.float", "fc1.bias.float"], ["one"], transB=1),
        helper.make_node("Relu", ["one"], ["relu"]),
        helper.make_node("MatMul", ["relu", "fc2.weight.float"], ["two"]),
        helper.make_node("Add", ["two", "fc2.bias.float"], ["y"]),
    ]
    half = {name: array.astype(np.float16) for name, array in stored.items()}
    source = saved(tmp_path / "source.onnx", nodes, half, (TensorProto.INT64, [2]), [2, 3])
    x = np.array([3, 7])
    neutral.convert(source, tmp_path / "new.onnx")
    (y,), (found,) = run_onnx(source, x), run_onnx(tmp_path / "new.onnx", x)
    assert found.dtype == y.dtype == np.float32
    assert np.abs(found - y).max() < 1e-6
    kept = initializers(tmp_path / "new.onnx")
    assert {name: array.dtype for name, array in kept.items()} == dict.fromkeys(half, np.dtype(np.float16))
    assert neutral.diff(source, tmp_path / "new.onnx").same


def test_a_norm_in_training_mode_is_told(tmp_path: Path) -> None:
    names = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    norm = helper.make_node("BatchNormalization", ["x", *names], ["y", "mean", "var"], training_mode=1)
    stored = {name: np.abs(random(3)) + i for i, name in enumerate(names)}
    source = saved(tmp_path / "source.onnx", [norm], stored, (TensorProto.FLOAT, [2, 3, 4, 5]), [2, 3, 4, 5])
    module = torch.nn.Sequential()
    module.add_module("norm", torch.nn.BatchNorm2d(3))
    done = neutral.convert(source, into=module)
    assert any("norm: exported in training mode" in each for each in done.warnings)
    np.testing.assert_array_equal(module.norm.running_var.numpy(), stored["norm.running_var"])


@pytest.mark.parametrize("lengths", ["", "lengths"])
def test_sequences_of_given_lengths_are_told(lengths: str, tmp_path: Path) -> None:
    lstm = helper.make_node("LSTM", ["x", "rnn.W", "rnn.R", "rnn.B", lengths], ["y"], hidden_size=4)
    stored = {"rnn.W": random(1, 16, 3), "rnn.R": random(1, 16, 4), "rnn.B": random(1, 32)}
    source = saved(tmp_path / "source.onnx", [lstm], stored, (TensorProto.FLOAT, [5, 2, 3]), [5, 1, 2, 4], lengths)
    module = torch.nn.Sequential()
    module.add_module("rnn", torch.nn.LSTM(3, 4))
    done = neutral.convert(source, into=module)
    assert any("sequence_lens" in each for each in done.warnings) == bool(lengths)
