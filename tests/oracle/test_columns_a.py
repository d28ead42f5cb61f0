"""The columns of Flax and MLX are judged without the package: what they say they compute, they compute, and their own files
come back."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgpack
import numpy as np
import pytest

from tests.columns import model_of
from tests.oracle.by_hand import copied
from tests.oracle.process import OracleError, Worker, difference
from tests.zoo import Case, Model, cases

COLUMNS = ("flax_linen", "flax_nnx", "mlx")
MODULES = {name: importlib.import_module(f"tests.columns.{name}") for name in COLUMNS}
HAVE = [
    (name, column) for column in COLUMNS for name, case in cases().items() if isinstance(model_of(case, column), Model)
]
FROM_TORCH = [(name, column) for name, column in HAVE if "torch" in cases()[name].models]
EVERY_FORMAT = ("conv2d_flatten_norm_dense", "lstm_bidirectional", "subclassed", "weight_norm_dense")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    started = {name: Worker(name, tmp_path_factory.mktemp(name)) for name in COLUMNS}
    yield started
    for worker in started.values():
        worker.stop()


@pytest.mark.parametrize("column", COLUMNS)
def test_the_examples_of_columns_are_true(column: str) -> None:
    assert doctest.testmod(MODULES[column]) == doctest.TestResults(failed=0, attempted=3)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
def test_every_case_has_a_model_or_a_reason(column: str, equal: bool) -> None:
    for case in cases(equal).values():
        found = model_of(case, column)
        assert isinstance(found, Model) or " " in found
    counted = sum(isinstance(model_of(case, column), Model) for case in cases().values() if not case.parts)
    assert counted == {"flax_linen": 135, "flax_nnx": 133, "mlx": 132}[column]


@pytest.mark.parametrize(("name", "column"), HAVE)
def test_a_framework_reloads_its_own_file(name: str, column: str, columns: dict[str, Worker]) -> None:
    worker = columns[column]
    built = worker.build(name, seed=3)
    assert list(built.files) == [MODULES[column].FORMATS[0]]
    assert np.isfinite(built.output).all() and np.abs(built.output).max() > 1e-2
    for file in built.files.values():
        assert difference(worker.forward(name, file, built.inputs), built.output) < 1e-6


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_a_framework_reloads_every_format(name: str, column: str, columns: dict[str, Worker]) -> None:
    if (name, column) not in HAVE:
        assert (name, column) == ("lstm_bidirectional", "mlx")
        return
    formats = MODULES[column].FORMATS
    built = columns[column].build(name, seed=3, formats=formats)
    assert tuple(built.files) == formats
    for file in built.files.values():
        assert difference(columns[column].forward(name, file, built.inputs), built.output) < 1e-6


@pytest.mark.parametrize("column", COLUMNS)
def test_the_same_seed_gives_the_same_model(column: str, columns: dict[str, Worker]) -> None:
    one, same, other = (columns[column].build("batch_norm2d", seed=seed) for seed in (3, 3, 4))
    assert difference(one.output, same.output) == 0
    assert difference(one.output, other.output) > 1e-2
    for name, array in one.weights.items():
        assert np.array_equal(array, same.weights[name]) and not np.array_equal(array, other.weights[name])


BATCH_NORM_HALVES = {"batch_norm2d_center_only": ("weight", 1.0), "batch_norm2d_scale_only": ("bias", 0.0)}


def torch_weights(case: Case, column: str, worker: Worker, equal: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The weights and the output of a torch model that the column's model can equal."""
    built = worker.build(case.name, seed=1, equal=equal, formats=[])
    given = dict(built.weights)
    if case.name in BATCH_NORM_HALVES:
        half, value = BATCH_NORM_HALVES[case.name]
        given[f"layer.{half}"] = np.full_like(given[f"layer.{half}"], value)
    if case.name in getattr(MODULES[column], "LESS", {}):
        for name in [name for name in given if "bias_hh" in name]:
            given[name] = given[name] * (np.arange(len(given[name])) < 2 * len(given[name]) // 3)
    built = worker.build(case.name, seed=1, equal=equal, formats=[], weights=given)
    return given, built.output


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize(("name", "column"), FROM_TORCH)
def test_weights_copied_by_hand_compute_what_torch_computes(
    name: str, column: str, equal: bool, torch_worker: Worker, columns: dict[str, Worker]
) -> None:
    if name not in cases(equal):
        return
    case = cases(equal)[name]
    model = model_of(case, column)
    assert isinstance(model, Model)
    given, output = torch_weights(case, column, torch_worker, equal)
    template = columns[column].build(name, seed=2, equal=equal, formats=[])
    assert template.output.shape == output.shape
    assert difference(template.output, output) > 1e-3, "a template must not be right already"
    weights = copied(case, model.layers, given, column)
    assert {n: a.shape for n, a in weights.items()} == {n: a.shape for n, a in template.weights.items()}
    built = columns[column].build(name, seed=1, equal=equal, formats=[], weights=weights)
    assert difference(built.output, output) < CLOSE


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


Weights = Mapping[str, np.ndarray]


def of_layer(weights: Weights) -> dict[str, np.ndarray]:
    """The tensors of the only layer, under their own names."""
    return {re.sub(r"^.*?layer[./]", "", name).replace("/", "."): array for name, array in weights.items()}


def gates(own: Weights, column: str, order: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The kernels (in, out) of each gate on the input and the recurrent side, as each framework documents them."""
    if column == "flax_linen":
        yield from ((own[f"cell.i{gate}.kernel"], own[f"cell.h{gate}.kernel"]) for gate in order)
        return
    nnx = column == "flax_nnx"
    sides = ("cell.dense_i.kernel", "cell.dense_h.kernel") if nnx else ("Wx", "Wh")
    blocks = (np.split(own[side] if nnx else own[side].T, len(order), axis=1) for side in sides)
    yield from zip(*blocks, strict=True)


def lstm(own: Weights, column: str, x: np.ndarray) -> np.ndarray:
    kernels = list(gates(own, column, "ifgo"))
    if column == "flax_linen":
        biases = [own[f"cell.h{gate}.bias"] for gate in "ifgo"]
    else:
        biases = np.split(own["cell.dense_h.bias" if column == "flax_nnx" else "bias"], 4)
    h = c = np.zeros((len(x), len(biases[0])))
    steps = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ one + h @ other + b for (one, other), b in zip(kernels, biases, strict=True))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        steps.append(h)
    return np.stack(steps, axis=1)


def gru(own: Weights, column: str, x: np.ndarray) -> np.ndarray:
    (r_x, r_h), (z_x, z_h), (n_x, n_h) = gates(own, column, "rzn")
    if column == "flax_linen":
        r_b, z_b, n_b = (own[f"cell.i{gate}.bias"] for gate in "rzn")
    else:
        r_b, z_b, n_b = np.split(own["cell.dense_i.bias" if column == "flax_nnx" else "b"], 3)
    recurrent = {"flax_linen": "cell.hn.bias", "mlx": "bhn"}.get(column)
    h_b = own[recurrent] if recurrent else np.zeros_like(n_b)
    h = np.zeros((len(x), len(n_b)))
    steps = []
    for t in range(x.shape[1]):
        r = sigmoid(x[:, t] @ r_x + h @ r_h + r_b)
        z = sigmoid(x[:, t] @ z_x + h @ z_h + z_b)
        n = np.tanh(x[:, t] @ n_x + n_b + r * (h @ n_h + h_b))
        h = (1 - z) * n + z * h
        steps.append(h)
    return np.stack(steps, axis=1)


def conv2d(own: Weights, column: str, x: np.ndarray) -> np.ndarray:
    kernel = own["weight"].transpose(1, 2, 3, 0) if column == "mlx" else own["kernel"]
    high, wide = (size - k + 1 for size, k in zip(x.shape[2:], kernel.shape[:2], strict=True))
    found = sum(
        np.einsum("nchw,co->nohw", x[:, :, i : i + high, j : j + wide], kernel[i, j])
        for i, j in np.ndindex(kernel.shape[:2])
    )
    return np.asarray(found) + own["bias"][:, None, None]


def dense(own: Weights, column: str, x: np.ndarray) -> np.ndarray:
    return x @ (own["weight"].T if column == "mlx" else own["kernel"]) + own["bias"]


def epsilon(name: str) -> float:
    return float(cases()[name].models["torch"].layers[0].args["eps"])


def layer_norm(own: Weights, column: str, x: np.ndarray) -> np.ndarray:
    scale = own["weight" if column == "mlx" else "scale"]
    variance = x.var(-1, keepdims=True) + epsilon("layer_norm")
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance) * scale + own["bias"]


def batch_norm2d(own: Weights, column: str, x: np.ndarray) -> np.ndarray:
    names = ("running_mean", "running_var", "weight") if column == "mlx" else ("mean", "var", "scale")
    mean, var, scale, bias = (own[name][:, None, None] for name in (*names, "bias"))
    return (x - mean) / np.sqrt(var + epsilon("batch_norm2d")) * scale + bias


FORMULAS = {one.__name__: one for one in (dense, layer_norm, batch_norm2d, conv2d, lstm, gru)}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_documented_formula_gives_the_output(name: str, column: str, columns: dict[str, Worker]) -> None:
    built = columns[column].build(name, seed=5, formats=[])
    (x,) = (one.astype("float64") for one in built.inputs)
    assert difference(FORMULAS[name](of_layer(built.weights), column, x), built.output) < 1e-6


def test_values_of_another_size_in_attention(keras_worker: Worker, columns: dict[str, Worker]) -> None:
    """Keras's attention with a size for values, which torch has not, in MLX."""
    source = keras_worker.build("attention_value_dim", seed=1, formats=[])
    weights = {}
    for name in ("query", "key", "value", "attention_output"):
        kernel, bias = (source.weights[f"layer/{name}/{part}"] for part in ("kernel", "bias"))
        ours = "layer.out_proj" if name == "attention_output" else f"layer.{name}_proj"
        width = kernel.shape[-1] if name == "attention_output" else kernel.shape[1] * kernel.shape[2]
        weights[f"{ours}.weight"] = kernel.reshape(-1, width).T
        weights[f"{ours}.bias"] = bias.ravel()
    built = columns["mlx"].build("attention_value_dim", seed=1, formats=[], weights=weights)
    assert difference(built.output, source.output) < CLOSE


@pytest.mark.parametrize(("name", "column"), HAVE)
def test_every_tensor_matters_to_the_output(name: str, column: str, columns: dict[str, Worker]) -> None:
    """But for a bias on the keys, which a softmax does not see."""
    keys = {"flax_linen": "params/layer/key/bias", "flax_nnx": "layer.key.bias", "mlx": "layer.key_proj.bias"}
    blind = cases()[name].kind == "multi_head_attention" and "no_bias" not in name
    assert columns[column].unseen(name, seed=1) == ([keys[column]] if blind else [])


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ["lstm", "rnn", "gru", "conv2d", "batch_norm2d"])
def test_double_precision(name: str, column: str, columns: dict[str, Worker]) -> None:
    worker = columns[column]
    built = worker.build(name, seed=1, dtype="float64", formats=MODULES[column].FORMATS)
    assert set(built.missing) == ({"safetensors"} if column == "mlx" else set())
    file = next(iter(built.files.values()))
    assert built.output.dtype == np.float64
    assert difference(worker.forward(name, file, built.inputs, dtype="float64"), built.output) < 1e-12
    (x,) = built.inputs
    if name in FORMULAS:
        # MLX computes convolutions and sigmoids of doubles in single precision.
        limit = 1e-6 if column == "mlx" else 1e-12
        assert difference(FORMULAS[name](of_layer(built.weights), column, x), built.output) < limit


@pytest.mark.parametrize("column", COLUMNS)
def test_a_file_of_another_model_is_not_loaded(column: str, columns: dict[str, Worker]) -> None:
    """Neither with a tensor too many or too few, nor with another shape."""
    worker = columns[column]
    formats = MODULES[column].FORMATS
    dense, bare, wide = (
        worker.build(name, seed=1, formats=formats) for name in ("dense", "dense_no_bias", "einsum_dense_merge")
    )
    for kind in formats:
        for case, file in (
            ("dense", bare.files[kind]),
            ("dense_no_bias", dense.files[kind]),
            ("dense", wide.files[kind]),
        ):
            with pytest.raises(OracleError):
                worker.forward(case, file, dense.inputs)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ["dense+lstm", "gru_cell+conv2d_flatten_dense", "weight_norm_dense+attention"])
def test_cases_side_by_side_are_one_model(name: str, column: str, columns: dict[str, Worker]) -> None:
    """Of two cases, each with inputs of its own; the output is the last one's."""
    built = columns[column].build(name, seed=3)
    (file,) = built.files.values()
    assert difference(columns[column].forward(name, file, built.inputs), built.output) < 1e-6
    last = columns[column].build(name.split("+")[1], seed=3, formats=[])
    assert built.output.shape == last.output.shape
    assert len(built.weights) > len(last.weights)


def test_parameters_alone_are_loaded_too(columns: dict[str, Worker], tmp_path: Path) -> None:
    """Many msgpack files of Linen hold the parameters and no collection around them."""
    built = columns["flax_linen"].build("dense", seed=1)
    content = msgpack.unpackb(built.files["msgpack"].read_bytes())
    bare = tmp_path / "params.msgpack"
    bare.write_bytes(msgpack.packb(content["params"]))
    assert difference(columns["flax_linen"].forward("dense", bare, built.inputs), built.output) == 0
