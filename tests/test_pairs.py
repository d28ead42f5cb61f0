"""The table of ten frameworks holds: every kind, every ordered pair, judged by a forward pass in both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import pairs_table
from tests.oracle.process import Worker
from tests.pairs import COLUMNS, every, measure, results, summary, wrong

NODE = bool(os.environ.get("CI")) or all(shutil.which(name) for name in ("node", "npm"))
"""Without Node a person may leave TensorFlow.js out; where changes are judged its absence is a failure."""


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Worker]]:
    with ExitStack() as stack:
        present = [name for name in COLUMNS if NODE or name != "tfjs"]
        yield {name: stack.enter_context(Worker(name, tmp_path_factory.mktemp(name))) for name in present}


@pytest.mark.parametrize(("zoo", "name"), every())
def test_every_pair(zoo: str, name: str, columns: Mapping[str, Worker], tmp_path: Path) -> None:
    """Nothing is wrong, and what converts is what docs/table.md says; without Node, TensorFlow.js is left out."""
    cells = measure(name, columns, tmp_path / "case", equal=zoo == "equal")
    assert not wrong(cells)
    assert summary(cells) == present(results()[zoo][name], tuple(columns)), "see python -m tests.pairs_table"


def present(found: Mapping[str, str], columns: tuple[str, ...]) -> dict[str, str]:
    kept = {s: " ".join(p for p in pairs.split() if set(p.split("-")) <= {*columns}) for s, pairs in found.items()}
    return {status: pairs for status, pairs in kept.items() if pairs}


def test_the_table_is_what_was_measured() -> None:
    assert pairs_table.TABLE.read_text("utf-8") == pairs_table.table(results()["distinct"])


def test_nothing_is_wrong() -> None:
    assert not [s for zoo in results().values() for case in zoo.values() for s in case if s.startswith("wrong")]
