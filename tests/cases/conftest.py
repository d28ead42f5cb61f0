"""What every case has at hand."""

from __future__ import annotations

import pytest

from tests.cases.commands import Commands


@pytest.fixture
def neutral_(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)
