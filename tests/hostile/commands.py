"""The command line in processes of its own: what it says, what it takes, and what it leaves behind.

`python -m tests.hostile.commands` is a process that has neutral imported and forks a child for every command line it
is given, so that a crash, a hang or a peak of memory is the command's own.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECONDS = 10
MEGABYTES = 512
_WINGS = ("equinox", "flax", "keras", "mlx", "numpy", "onnx", "paddle", "safetensors", "tensorflow", "tfjs", "torch")
_IMPORTED = (
    "neutral.cli",
    *(f"neutral.exporters.{name}" for name in _WINGS),
    *(f"neutral.importers.{name}" for name in _WINGS),
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `peak` is its memory in megabytes above that of the imported package."""

    status: int
    out: str
    err: str
    seconds: float
    peak: float


class Commands:
    """Runs command lines, each in a fork of one process that has neutral imported."""

    def __enter__(self) -> Self:
        quiet = {"PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.commands"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **quiet},
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self._baseline = 0.0
        with tempfile.TemporaryDirectory() as folder:
            self._baseline = self(Path(folder), "--version").peak
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)

    def __call__(self, folder: Path, *arguments: object, limits: Mapping[str, int] | None = None) -> Outcome:
        """Run `neutral ARGUMENTS` in `folder`, with resource limits by their names."""
        assert self._server.stdin is not None and self._server.stdout is not None
        request = {"folder": str(folder), "arguments": [str(a) for a in arguments], "limits": dict(limits or {})}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Outcome(**{**answer, "peak": answer["peak"] - self._baseline})


def refused(
    run: Commands,
    folder: Path,
    arguments: Sequence[object],
    says: str = "",
    *,
    status: int = 1,
    limits: Mapping[str, int] | None = None,
) -> str:
    """The reason of a command that must be refused: one line, soon, in little memory, with nothing left behind."""
    before = listing(folder)
    outcome = run(folder, *arguments, limits=limits)
    assert outcome.status == status, (arguments, outcome)
    assert outcome.out == "", (arguments, outcome)
    reason = one_line(outcome.err)
    assert says in reason, (arguments, says, reason)
    assert listing(folder) == before, arguments
    assert outcome.seconds < SECONDS, (arguments, outcome)
    assert outcome.peak < MEGABYTES, (arguments, outcome)
    return reason


def one_line(err: str) -> str:
    """The reason in what was written to stderr, which is one printable line."""
    assert err.startswith("neutral: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    reason = err.removeprefix("neutral: error: ").removesuffix("\n")
    assert reason.isprintable() and "Traceback" not in reason and "bug in neutral" not in reason, err
    return reason


def listing(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything in a folder, hidden or not, with what it is and holds; links and pipes are not followed."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        content = ""
        if path.is_file() and not path.is_symlink():
            content = hashlib.sha256(path.read_bytes()).hexdigest() if info.st_size < 1 << 24 else str(info.st_mtime_ns)
        found[str(path.relative_to(folder))] = (info.st_mode, info.st_size, content)
    return found


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    out, err = _Pipe(), _Pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _run(request, out.writing, err.writing)
    _, status, used = os.wait4(child, 0)
    seconds = time.monotonic() - started
    return {
        "status": os.waitstatus_to_exitcode(status),
        "out": out.content(),
        "err": err.content(),
        "seconds": seconds,
        "peak": used.ru_maxrss / 1024,
    }


class _Pipe:
    """What a child writes, a megabyte at most. Unlike a file it is not counted by the limit on files."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 1 << 20)

    def content(self) -> str:
        os.close(self.writing)
        with os.fdopen(self.reading, "rb") as file:
            return file.read().decode()


def _run(request: dict[str, Any], out: int, err: int) -> None:
    status = 99
    try:
        os.chdir(request["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        signal.alarm(3 * SECONDS)
        for name, limit in request["limits"].items():
            number = getattr(resource, name)
            resource.setrlimit(number, (limit, resource.getrlimit(number)[1]))
        from neutral.cli import main

        status = main(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
