"""The columns of PaddlePaddle, ONNX, TensorFlow.js and NumPy: they run, reload their own files, and compute what torch and
Keras compute when their weights are copied by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.columns import model_of
from tests.columns.onnx import BLIND as ONNX_BLIND
from tests.columns.onnx import FORMATS as ONNX_FORMATS
from tests.columns.paddle import BLIND as PADDLE_BLIND
from tests.columns.tfjs import FORMATS as TFJS_FORMATS
from tests.oracle import tfjs_runner
from tests.oracle.process import Built, OracleError, Worker, difference
from tests.oracle.test_oracle import effective
from tests.zoo import Case, Layer, Model, cases

Arrays = dict[str, np.ndarray]
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


def rows_of(layers: tuple[Layer, ...], prefix: str = "") -> Iterator[tuple[str, Layer]]:
    for row in layers:
        if row.cls == "Sequential":
            yield from rows_of(row.inside, f"{prefix}{row.name}.")
        else:
            yield f"{prefix}{row.name}", row


PADDLE_NAMES = {
    "_mean": "running_mean",
    "_variance": "running_var",
    "_weight": "weight",
    "scale": "weight",
    "weight_ho": "weight_hr_l0",
}
TORCH_NORMS = {
    "weight_norm": {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"},
    "spectral_norm": {
        "weight_orig": "parametrizations.weight.original",
        "weight_u": "parametrizations.weight.0._u",
        "weight_v": "parametrizations.weight.0._v",
    },
}


def torch_to_paddle(ours: Arrays, path: str, row: Layer, local: str, like: np.ndarray) -> np.ndarray:
    """The value of one tensor of a Paddle layer: Linear is (in, out), all else as in torch."""
    if row.cls == "MultiheadAttention":
        return attention_to_paddle(ours, path, local)
    if row.cls in ("RNN", "LSTM", "GRU"):
        last = local.rsplit(".", 1)[-1]
        if last != local and last != "weight_ho":
            level, side = local.split(".")[:2]
            last += f"_l{level}" + ("_reverse" if side == "cell_bw" else "")
        value = ours[f"{path}.{PADDLE_NAMES.get(last, last)}"]
        return value.T if last == "weight_ho" else value
    names = TORCH_NORMS.get(row.wrap[0], {}) if row.wrap else {}
    value = ours[f"{path}.{names.get(local, PADDLE_NAMES.get(local, local))}"]
    if row.cls == "Linear":
        value = value.T
    return value.reshape(like.shape)


def attention_to_paddle(ours: Arrays, path: str, local: str) -> np.ndarray:
    part, what = local.split(".")
    if part == "out_proj":
        value = ours[f"{path}.out_proj.{what}"]
    elif what == "bias":
        value = np.split(ours[f"{path}.in_proj_bias"], 3)["qkv".index(part[0])]
    elif f"{path}.in_proj_weight" in ours:
        value = np.split(ours[f"{path}.in_proj_weight"], 3)["qkv".index(part[0])]
    else:
        value = ours[f"{path}.{part}_weight"]
    return value.T if what == "weight" else value


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


# ONNX has the gates of an LSTM as i o f c, of a GRU as z r h; torch as i f g o and r z n.
ONNX_GATES = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
TORCH_SIDES = {"W": ("weight_ih",), "R": ("weight_hh",), "B": ("bias_ih", "bias_hh")}


def torch_to_onnx(ours: Arrays, rows: dict[str, Layer], node: Layer, name: str, like: np.ndarray) -> np.ndarray:
    """The value of one initializer of a node."""
    path, local = name.rsplit(".", 1)
    if local in TORCH_SIDES:
        level = "0" if path in rows else path.rsplit("_", 1)[1]
        return recurrent_to_onnx(ours, path if path in rows else "layer", f"_l{level}", node.cls, local, like)
    if path not in rows:
        value = attention_to_paddle(ours, *name.split(".", 1)) if path.endswith("_proj") else ours[name]
    elif local == "weight":
        value = effective(ours, path, rows[path])
        if node.cls == "MatMul" or node.args["attributes"].get("transB") == 0:
            value = value.T
        if node.cls == "Einsum" and "cd" in node.args["attributes"]["equation"]:
            value = value.T
    else:
        value = ours[name]
    return value.reshape(like.shape)


def recurrent_to_onnx(ours: Arrays, path: str, suffix: str, op: str, local: str, like: np.ndarray) -> np.ndarray:
    directions = []
    for reverse in ("", "_reverse")[: len(like)]:
        parts = []
        for side in TORCH_SIDES[local]:
            full = f"{path}.{side}{suffix}{reverse}"
            blocks = np.split(ours[full if full in ours else f"{path}.{side}"], len(ONNX_GATES[op]))
            parts += [blocks[gate] for gate in ONNX_GATES[op]]
        directions.append(np.concatenate(parts))
    return np.stack(directions)


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
    onnx = pytest.importorskip("onnx")
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
