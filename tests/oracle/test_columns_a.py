"""The columns of Flax and MLX are judged without the package: what they say they compute, they compute, and their own files
come back."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.columns import model_of
from tests.oracle.by_hand import copied
from tests.oracle.process import OracleError, Worker, difference
from tests.zoo import Case, Model, cases

COLUMNS = ("flax_linen", "flax_nnx", "mlx")
MODULES = {name: importlib.import_module(f"tests.columns.{name}") for name in COLUMNS}
HAVE = [(name, column) for column in COLUMNS for name, case in cases().items() if isinstance(model_of(case, column), Model)]
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
@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
def test_every_case_has_a_model_or_a_reason(column: str, equal: bool) -> None:
    for case in cases(equal).values():
        found = model_of(case, column)
        assert isinstance(found, Model) or " " in found
    counted = sum(isinstance(model_of(case, column), Model) for case in cases().values())
    assert counted == {"flax_linen": 135, "flax_nnx": 133, "mlx": 134}[column]


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
