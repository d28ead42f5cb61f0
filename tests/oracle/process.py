"""Workers: one long-lived process per framework, spoken to in lines of JSON, arrays in `.npz` files.

with Worker("torch", folder) as worker:
    built = worker.build("dense", seed=1)           # files written by torch itself, inputs, output, weights
    output = worker.forward("dense", built.files["state"], built.inputs)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
Handler = Callable[..., dict[str, Any]]


class OracleError(Exception):
    """A worker could not do what it was asked; the message is the framework's own, with its traceback."""


@dataclass(frozen=True)
class Built:
    """A model as its framework saved it: a file per format, and what it computes.

    `missing` says why the framework itself cannot write a format. Inputs and output are in the case's canonical axes;
    weights are in the framework's own names and layouts.
    """

    files: dict[str, Path]
    missing: dict[str, str]
    inputs: list[np.ndarray]
    output: np.ndarray
    weights: dict[str, np.ndarray]


class Worker:
    """A framework in a process of its own."""

    def __init__(self, framework: str, folder: Path) -> None:
        self.framework = framework
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._number = count()
        self._log = (self.folder / "worker.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.oracle.{framework}_runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **QUIET},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise OracleError(f"the {self.framework} worker died:\n{self._log.read()[-3000:]}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise OracleError(f"{self.framework}: {command} {arguments.get('case', '')}: {reply['error']}")
        return reply

    def build(
        self,
        case: str,
        seed: int,
        folder: Path | None = None,
        *,
        equal: bool = False,
        formats: Sequence[str] | None = None,
        dtype: str = "float32",
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> Built:
        """Build the case with random weights (or these) and save it in `formats` (by default the cheap common one)."""
        folder = folder if folder is not None else self.folder / f"{next(self._number):05d}-{case}"
        folder.mkdir(parents=True, exist_ok=True)
        given = None
        if weights is not None:
            given = str(folder / "given.npz")
            np.savez(given, **dict(weights))
        reply = self.call(
            "build",
            case=case,
            seed=seed,
            folder=str(folder),
            equal=equal,
            formats=list(formats) if formats is not None else None,
            dtype=dtype,
            weights=given,
        )
        with np.load(reply["arrays"]) as arrays:
            inputs = [arrays[f"input{i}"] for i in range(reply["inputs"])]
            held = {name[len("weights/") :]: arrays[name] for name in arrays.files if name.startswith("weights/")}
            output = arrays["output"]
        files = {name: Path(path) for name, path in reply["files"].items()}
        return Built(files, reply["missing"], inputs, output, held)

    def forward(
        self,
        case: str,
        file: Path,
        inputs: Sequence[np.ndarray],
        *,
        equal: bool = False,
        dtype: str = "float32",
    ) -> np.ndarray:
        """Load the file with the framework and run it; inputs and output in the case's canonical axes."""
        path = self.folder / f"{next(self._number):05d}-forward.npz"
        np.savez(path, **{f"input{i}": array for i, array in enumerate(inputs)})
        self.call("forward", case=case, file=str(file), arrays=str(path), equal=equal, dtype=dtype)
        with np.load(path) as arrays:
            output: np.ndarray = arrays["output"]
        path.unlink()
        return output

    def unseen(self, case: str, seed: int, *, equal: bool = False) -> list[str]:
        """The names of the tensors that can change without changing the output."""
        names: list[str] = self.call("unseen", case=case, seed=seed, equal=equal)["names"]
        return names


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value where that is above one."""
    if found.shape != expected.shape:
        return float("inf")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    return float(np.abs(found.astype("float64") - expected.astype("float64")).max(initial=0.0)) / scale


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer requests until the input ends. Frameworks print to stdout, so the answers get a descriptor of their own."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = handlers[request.pop("command")](**request)
        except Exception as error:
            reply = {
                "error": f"{type(error).__name__}: {str(error)[:1000]}\n{''.join(traceback.format_tb(error.__traceback__))}"
            }
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
