"""MLX's layers against torch's and Keras', in both directions, by forward passes of the real frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.columns import model_of
from tests.crossing import Column, Crossed, cross
from tests.measure import unwritable
from tests.oracle.process import Worker
from tests.zoo import Model, cases

FORMATS = {"safetensors": Column("mlx", "safetensors", ".safetensors"), "npz": Column("mlx", "npz", ".npz")}

REFUSED = (
    ("*spectral_norm_*", "mlx -> torch", "a plain kernel has no vectors for its norm"),
    ("*_cells_stacked", "True", "cells of one size, whose order a file does not say"),
    ("conv2d_channels_first*", "", "the Flatten is in no framework's own order"),
    ("conv2d_permute_flatten_dense", "", "the Flatten is in no framework's own order"),
    ("branches_flattened_concat", "", "two flattened maps side by side"),
    ("group_norm*", "keras -> mlx (new)", "a layer of the case's model is made otherwise"),
)
"""Cases and ways (or whether all sizes are equal) in which a file of MLX says too little."""


@pytest.fixture(scope="module")
def with_mlx(
    torch_worker: Worker, keras_worker: Worker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Worker]]:
    with Worker("mlx", tmp_path_factory.mktemp("mlx")) as worker:
        yield {"torch": torch_worker, "keras": keras_worker, "mlx": worker}


def excused(name: str, equal: bool, way: Crossed) -> bool:
    return way.reason != "" and any(
        fnmatchcase(name, case) and (where == str(equal) or where in way.way) for case, where, _ in REFUSED
    )


FIRST = {case.kind: name for name, case in reversed(cases().items()) if "keras" in case.models}
"""One case of each kind, for the slower of the two."""


def crossings(name: str, equal: bool, other: str, column: Column, workers: dict[str, Worker], folder: Path) -> None:
    case = cases(equal).get(name)
    if case is None or other not in case.models or not isinstance(model_of(case, "mlx"), Model):
        return
    fmt = {"torch": "module", "keras": "keras"}[other]
    fmt = "state" if fmt in unwritable(case) else fmt
    ways = cross(case, column, other, fmt, workers, folder, equal)
    bad = [str(way) for way in ways if not excused(name, equal, way) and not way.right(case)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", cases())
def test_torch(name: str, equal: bool, with_mlx: dict[str, Worker], tmp_path: Path) -> None:
    crossings(name, equal, "torch", FORMATS["safetensors"], with_mlx, tmp_path)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", FIRST.values())
def test_keras(name: str, equal: bool, with_mlx: dict[str, Worker], tmp_path: Path) -> None:
    crossings(name, equal, "keras", FORMATS["npz"], with_mlx, tmp_path)
