"""The columns of PaddlePaddle, ONNX, TensorFlow.js and NumPy: they run, reload their own files, and compute what torch and
Keras compute when their weights are copied by hand."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.columns import model_of
from tests.columns.numpy import BLIND as NUMPY_BLIND
from tests.columns.onnx import BLIND as ONNX_BLIND
from tests.columns.onnx import FORMATS as ONNX_FORMATS
from tests.columns.paddle import BLIND as PADDLE_BLIND
from tests.columns.tfjs import FORMATS as TFJS_FORMATS
from tests.oracle import tfjs_runner
from tests.oracle.by_hand_b import (
    attention_from_keras,
    gru_from_keras,
    rows_of,
    slopes_from_keras,
    torch_to_numpy,
    torch_to_onnx,
    torch_to_paddle,
)
from tests.oracle.process import Built, OracleError, Worker, difference
from tests.zoo import Case, Model, cases

CLOSE = 1e-5
TORCH = [name for name, case in cases().items() if "torch" in case.models]


@pytest.fixture(scope="module")
def paddle_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker("paddle", tmp_path_factory.mktemp("paddle")) as worker:
        yield worker


@pytest.fixture(scope="module")
def onnx_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker("onnx", tmp_path_factory.mktemp("onnx")) as worker:
        yield worker


def has(case: Case, framework: str) -> bool:
    """Whether the framework has the case; a reason is worth reading where it has not."""
    model = model_of(case, framework)
    if isinstance(model, str):
        assert len(model.split()) > 3, model
    return isinstance(model, Model)


def reloads(worker: Worker, name: str, equal: bool) -> None:
    case = cases(equal)[name]
    built = worker.build(name, seed=3, equal=equal)
    (file,) = built.files.values()
    assert not built.missing
    assert np.isfinite(built.output).all() and np.abs(built.output).max() > 1e-2
    assert built.output.ndim == len(case.output)
    assert [array.shape for array in built.inputs] == [one.shape for one in case.inputs]
    assert difference(worker.forward(name, file, built.inputs, equal=equal), built.output) < 1e-6
    again = worker.build(name, seed=3, equal=equal, formats=[])
    other = worker.build(name, seed=4, equal=equal, formats=[])
    assert again.weights.keys() == built.weights.keys() == other.weights.keys()
    assert all(np.array_equal(array, built.weights[weight]) for weight, array in again.weights.items())
    assert difference(again.output, built.output) == 0
    assert any(not np.array_equal(array, built.weights[weight]) for weight, array in other.weights.items())


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", cases())
def test_paddle_reloads_its_own_file(name: str, equal: bool, paddle_worker: Worker) -> None:
    if name in cases(equal) and has(cases(equal)[name], "paddle"):
        reloads(paddle_worker, name, equal)


def torch_source(worker: Worker, name: str, equal: bool) -> Built:
    """Torch's batch norm has scale and shift or neither: what the case lacks is one or zero."""
    built = worker.build(name, seed=1, equal=equal, formats=[])
    half = {"batch_norm2d_center_only": ("weight", 1.0), "batch_norm2d_scale_only": ("bias", 0.0)}.get(name)
    if half is None:
        return built
    given = built.weights | {f"layer.{half[0]}": np.full_like(built.weights["layer.weight"], half[1])}
    return worker.build(name, seed=1, equal=equal, formats=[], weights=given)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", TORCH)
def test_paddle_computes_what_torch_computes(
    name: str, equal: bool, torch_worker: Worker, paddle_worker: Worker
) -> None:
    if name not in cases(equal) or not has(cases(equal)[name], "paddle"):
        return
    source = torch_source(torch_worker, name, equal)
    template = paddle_worker.build(name, seed=2, equal=equal, formats=[])
    rows = dict(rows_of(cases(equal)[name].models["torch"].layers))
    copied = {}
    for full, like in template.weights.items():
        path = next(path for path in rows if full.startswith(path + "."))
        copied[full] = torch_to_paddle(source.weights, path, rows[path], full.removeprefix(path + "."), like)
    assert difference(template.output, source.output) > 1e-3, "a template must not be right already"
    built = paddle_worker.build(name, seed=1, equal=equal, formats=[], weights=copied)
    assert difference(built.output, source.output) < CLOSE


@pytest.mark.parametrize("name", cases())
def test_every_paddle_tensor_matters(name: str, paddle_worker: Worker) -> None:
    if has(cases()[name], "paddle"):
        assert paddle_worker.unseen(name, seed=1) == list(PADDLE_BLIND.get(name, ()))


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", cases())
def test_onnx_reloads_its_own_file(name: str, equal: bool, onnx_worker: Worker) -> None:
    if name in cases(equal) and has(cases(equal)[name], "onnx"):
        reloads(onnx_worker, name, equal)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", TORCH)
def test_onnx_computes_what_torch_computes(name: str, equal: bool, torch_worker: Worker, onnx_worker: Worker) -> None:
    if name not in cases(equal) or not has(cases(equal)[name], "onnx"):
        return
    case = cases(equal)[name]
    source = torch_source(torch_worker, name, equal)
    template = onnx_worker.build(name, seed=2, equal=equal, formats=[])
    rows = dict(rows_of(case.models["torch"].layers))
    model = model_of(case, "onnx")
    assert isinstance(model, Model)
    nodes = {tensor: node for node in model.layers for tensor in node.args["tensors"]}
    copied = {
        tensor: torch_to_onnx(source.weights, rows, nodes[tensor], tensor, like)
        for tensor, like in template.weights.items()
    }
    assert difference(template.output, source.output) > 1e-3, "a template must not be right already"
    built = onnx_worker.build(name, seed=1, equal=equal, formats=[], weights=copied)
    assert difference(built.output, source.output) < CLOSE


@pytest.mark.parametrize("name", cases())
def test_every_onnx_tensor_matters(name: str, onnx_worker: Worker) -> None:
    if has(cases()[name], "onnx"):
        assert onnx_worker.unseen(name, seed=1) == list(ONNX_BLIND.get(name, ()))


# What torch's exporters cannot write, or write so that onnxruntime cannot run it (torch 2.13).
UNEXPORTED = {
    "onnx_torch": {"conv3d_no_bias", "lstm_projection"},
    "onnx_torch_legacy": {"bilinear", "rms_norm", "lstm_projection", "spectral_norm_dense"},
}
EXPORTED = ["conv2d_flatten_norm_dense", "lstm_bidirectional_stack2", "attention_bias_kv", "shared_layer", "group_norm"]


@pytest.mark.parametrize("name", sorted(set(EXPORTED).union(*UNEXPORTED.values())))
@pytest.mark.parametrize("kind", UNEXPORTED)
def test_onnx_by_torch(name: str, kind: str, torch_worker: Worker, onnx_worker: Worker) -> None:
    built = onnx_worker.build(name, seed=3, formats=[kind])
    assert set(built.missing) == ({kind} if name in UNEXPORTED[kind] else set())
    if not built.missing:
        assert difference(built.output, torch_worker.build(name, seed=3, formats=[]).output) < CLOSE
        assert difference(onnx_worker.forward(name, built.files[kind], built.inputs), built.output) < 1e-6


@pytest.mark.parametrize("name", ["conv2d_flatten_norm_dense", "lstm_stack2", "attention_cross"])
def test_onnx_with_external_data(name: str, onnx_worker: Worker) -> None:
    built = onnx_worker.build(name, seed=3, formats=["onnx", "onnx_external"])
    sizes = {kind: file.stat().st_size for kind, file in built.files.items()}
    weights = sum(array.nbytes for array in built.weights.values())
    assert sizes["onnx"] > weights
    assert (built.files["onnx_external"].parent / "onnx_external.data").stat().st_size >= weights
    for file in built.files.values():
        assert difference(onnx_worker.forward(name, file, built.inputs), built.output) < 1e-6


def test_onnx_formats_of_two_models_are_not_mixed(onnx_worker: Worker) -> None:
    with pytest.raises(OracleError, match="at once"):
        onnx_worker.build("dense", seed=1, formats=ONNX_FORMATS)


STANDARD = {
    "gemm": "test_gemm_",
    "conv": "test_conv_",
    "convtranspose": "test_convtranspose_",
    "groupnormalization": "test_group_normalization_",
    "prelu": "test_prelu_",
    "rnn": "test_simple_rnn_",
    "lstm": "test_lstm_",
    "gru": "test_gru_",
}
"""Modules of the standard's own examples, and how the examples are called."""


@pytest.mark.parametrize("module", STANDARD)
def test_onnxruntime_runs_the_standards_own_examples(module: str, tmp_path: Path, onnx_worker: Worker) -> None:
    onnx = importlib.import_module("onnx")
    node = importlib.import_module("onnx.backend.test.case.node")
    importlib.import_module(f"onnx.backend.test.case.node.{module}")
    ran = 0
    for example in node._NodeTestCases:
        ((inputs, outputs),) = example.data_sets
        known = all(array.dtype.name in ("float32", "float64") for array in (*inputs, outputs[0]))
        # onnxruntime has no recurrent operators whose batch comes first.
        if example.name.startswith(STANDARD[module]) and known and not example.name.endswith("batchwise"):
            onnx.save(example.model, tmp_path / "model.onnx")
            found = onnx_worker.forward("dense", tmp_path / "model.onnx", inputs)
            assert difference(found, outputs[0]) < 1e-4, example.name
            ran += 1
    assert ran > 1


@pytest.fixture(scope="module")
def tfjs_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    if reason := tfjs_runner.prepare():
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    with Worker("tfjs", tmp_path_factory.mktemp("tfjs")) as worker:
        yield worker


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", cases())
def test_tfjs_reloads_its_own_file(name: str, equal: bool, tfjs_worker: Worker) -> None:
    if name in cases(equal) and has(cases(equal)[name], "tfjs"):
        reloads(tfjs_worker, name, equal)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", cases())
def test_tfjs_computes_what_keras_computes(name: str, equal: bool, keras_worker: Worker, tfjs_worker: Worker) -> None:
    """The weights are the same arrays, in the same order but for the statistics, which stand last."""
    if name not in cases(equal) or not has(cases(equal)[name], "tfjs"):
        return
    source = keras_worker.build(name, seed=1, equal=equal, formats=[])
    template = tfjs_worker.build(name, seed=2, equal=equal, formats=[])
    ordered = sorted(source.weights, key=lambda weight: "/moving_" in weight)
    pairs = list(zip(template.weights, ordered, strict=True))
    assert all(ours.endswith(theirs.rsplit("/", 1)[1]) for ours, theirs in pairs)
    copied = {ours: source.weights[theirs] for ours, theirs in pairs}
    assert {ours: array.shape for ours, array in copied.items()} == {
        ours: array.shape for ours, array in template.weights.items()
    }
    assert difference(template.output, source.output) > 1e-3, "a template must not be right already"
    built = tfjs_worker.build(name, seed=1, equal=equal, formats=[], weights=copied)
    assert difference(built.output, source.output) < CLOSE


@pytest.mark.parametrize("name", cases())
def test_every_tfjs_tensor_matters(name: str, tfjs_worker: Worker) -> None:
    if has(cases()[name], "tfjs"):
        assert tfjs_worker.unseen(name, seed=1) == []


def test_tfjs_writes_shards(tfjs_worker: Worker) -> None:
    built = tfjs_worker.build("lstm_stack2", seed=3, formats=TFJS_FORMATS)
    assert {kind: len(list(file.parent.glob("*.bin"))) for kind, file in built.files.items()} == {
        "layers": 1,
        "layers_sharded": 3,
    }
    for file in built.files.values():
        assert difference(tfjs_worker.forward("lstm_stack2", file, built.inputs), built.output) < 1e-6


def test_tfjs_without_node_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert tfjs_runner.prepare() == "TensorFlow.js needs node and npm, not found on this machine"


@pytest.fixture(scope="module")
def numpy_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker("numpy", tmp_path_factory.mktemp("numpy")) as worker:
        yield worker


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", cases())
def test_numpy_reloads_its_own_file(name: str, equal: bool, numpy_worker: Worker) -> None:
    if name in cases(equal):
        assert has(cases(equal)[name], "numpy")
        reloads(numpy_worker, name, equal)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", TORCH)
def test_numpy_computes_what_torch_computes(name: str, equal: bool, torch_worker: Worker, numpy_worker: Worker) -> None:
    if name not in cases(equal):
        return
    source = torch_source(torch_worker, name, equal)
    template = numpy_worker.build(name, seed=2, equal=equal, formats=[])
    rows = dict(rows_of(cases(equal)[name].models["torch"].layers))
    copied = {tensor: torch_to_numpy(source.weights, rows, tensor, like) for tensor, like in template.weights.items()}
    assert difference(template.output, source.output) > 1e-3, "a template must not be right already"
    built = numpy_worker.build(name, seed=1, equal=equal, formats=[], weights=copied)
    assert difference(built.output, source.output) < CLOSE


@pytest.mark.parametrize("name", cases())
def test_every_numpy_tensor_matters(name: str, numpy_worker: Worker) -> None:
    assert numpy_worker.unseen(name, seed=1) == list(NUMPY_BLIND.get(name, ()))


IN_KERAS_ALONE = {
    "gru_reset_before": gru_from_keras,
    "attention_value_dim": attention_from_keras,
    "prelu_unshared": slopes_from_keras,
}


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", IN_KERAS_ALONE)
def test_onnx_and_numpy_compute_what_only_keras_computes(
    name: str, equal: bool, keras_worker: Worker, onnx_worker: Worker, numpy_worker: Worker
) -> None:
    source = keras_worker.build(name, seed=1, equal=equal, formats=[])
    for worker, weights in zip((onnx_worker, numpy_worker), IN_KERAS_ALONE[name](source.weights), strict=True):
        built = worker.build(name, seed=1, equal=equal, formats=[], weights=weights)
        assert difference(built.output, source.output) < CLOSE


def test_double_precision(paddle_worker: Worker, numpy_worker: Worker) -> None:
    for worker in (paddle_worker, numpy_worker):
        built = worker.build("lstm", seed=1, dtype="float64")
        (file,) = built.files.values()
        assert built.output.dtype == np.float64, worker.framework
        assert difference(worker.forward("lstm", file, built.inputs, dtype="float64"), built.output) < 1e-12


def test_a_case_that_a_framework_lacks_is_refused_with_the_reason(paddle_worker: Worker) -> None:
    with pytest.raises(OracleError, match="no RMSNorm layer"):
        paddle_worker.build("rms_norm", seed=1)


TOGETHER = ("dense+lstm", "shared_layer+conv2d_flatten_dense", "text_classifier+attention", "nested+mlp+embedding")


@pytest.mark.parametrize("framework", ["paddle", "onnx", "tfjs", "numpy"])
@pytest.mark.parametrize("name", TOGETHER)
def test_cases_put_together(name: str, framework: str, request: pytest.FixtureRequest) -> None:
    worker = request.getfixturevalue(f"{framework}_worker")
    if has(cases()[name], framework):
        reloads(worker, name, equal=False)
        parts = [part.name for part in cases()[name].parts]
        alone = [len(worker.build(part, seed=1, formats=[]).weights) for part in parts]
        assert len(worker.build(name, seed=1, formats=[]).weights) == sum(alone)
