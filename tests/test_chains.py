"""Random walks through the frameworks; see chains.py. `make chains` takes the long ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chains import COLUMNS, random_models, walks
from tests.oracle.process import Worker
from tests.test_pairs import NODE

MODELS, WALKS = (int(n) for n in os.environ.get("NEUTRAL_CHAINS", "40x6").split("x"))


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Worker]]:
    with ExitStack() as stack:
        present = [name for name in COLUMNS if NODE or name != "tfjs"]
        yield {name: stack.enter_context(Worker(name, tmp_path_factory.mktemp(name))) for name in present}


@pytest.mark.parametrize("name", random_models(MODELS))
def test_walks_change_nothing_that_is_not_declared(name: str, workers: Mapping[str, Worker], tmp_path: Path) -> None:
    walked = walks(name, WALKS, workers, tmp_path)
    assert not walked.wrong
    assert walked.steps > WALKS
