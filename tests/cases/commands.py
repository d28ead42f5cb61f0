"""The command line as the cases use it."""

from __future__ import annotations

import pytest

from neutral.cli import main


class Commands:
    """`ok(...)` runs a command that must succeed, `refused(...)` one that must be refused in one line."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured

    def ok(self, *arguments: object) -> str:
        """All that was printed."""
        self._captured.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = self._captured.readouterr()
        assert status == 0, err
        return out + err

    def refused(self, *arguments: object, status: int = 1) -> str:
        """The error, without its beginning."""
        self._captured.readouterr()
        assert main([str(argument) for argument in arguments]) == status
        out, err = self._captured.readouterr()
        assert out == "" and err.startswith("neutral: error: ") and err.count("\n") == 1, err
        return err.removeprefix("neutral: error: ").strip()
