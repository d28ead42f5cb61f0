"""Environment and oracle workers for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.oracle.process import QUIET, Worker

os.environ.update({name: value for name, value in QUIET.items() if name != "OMP_NUM_THREADS"})


@pytest.fixture(scope="session")
def torch_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker("torch", tmp_path_factory.mktemp("torch")) as worker:
        yield worker


@pytest.fixture(scope="session")
def keras_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker("keras", tmp_path_factory.mktemp("keras")) as worker:
        yield worker


@pytest.fixture(scope="session")
def tensorflow_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker("tensorflow", tmp_path_factory.mktemp("tensorflow")) as worker:
        yield worker


@pytest.fixture(scope="session")
def workers(torch_worker: Worker, keras_worker: Worker, tensorflow_worker: Worker) -> dict[str, Worker]:
    return {"torch": torch_worker, "keras": keras_worker, "tensorflow": tensorflow_worker}


LONG = (
    "test_pairs",
    "test_zoo",
    "test_chains",
    "test_columns_a",
    "test_crossing_mlx",
    "test_crossing_paddle",
    "test_columns_b",
)
"""Files that take minutes. They come first, so that at the end no process waits for one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
