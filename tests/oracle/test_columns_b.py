"""The columns of PaddlePaddle, ONNX, TensorFlow.js and NumPy: they run, reload their own files, and compute what torch and
Keras compute when their weights are copied by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.columns import model_of
from tests.columns.paddle import BLIND as PADDLE_BLIND
from tests.oracle.process import Worker, difference
from tests.zoo import Case, Layer, Model, cases

Arrays = dict[str, np.ndarray]
CLOSE = 1e-5
TORCH = [name for name, case in cases().items() if "torch" in case.models]


@pytest.fixture(scope="module")
def paddle_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker("paddle", tmp_path_factory.mktemp("paddle")) as worker:
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
    source = torch_worker.build(name, seed=1, equal=equal, formats=[])
    template = paddle_worker.build(name, seed=2, equal=equal, formats=[])
    if unused := {"center_only": ("weight", 1.0), "scale_only": ("bias", 0.0)}.get(name.removeprefix("batch_norm2d_")):
        half, value = unused
        given = source.weights | {f"layer.{half}": np.full_like(source.weights["layer.weight"], value)}
        source = torch_worker.build(name, seed=1, equal=equal, formats=[], weights=given)
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
