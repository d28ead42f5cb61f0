"""The process that commands are run in, and good files to spoil."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.commands import Commands
from tests.hostile.making import make_good_files


@pytest.fixture(scope="session")
def run() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good files."""
    folder = tmp_path_factory.mktemp("good")
    make_good_files(folder)
    return folder
