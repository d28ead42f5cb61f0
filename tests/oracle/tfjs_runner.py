"""TensorFlow.js's side of the oracle, run as a program: it drives one Node process.

The packages are installed by npm beside `tfjs/runner.mjs` when they are first needed, as the lock file says.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.columns import model_of
from tests.columns.tfjs import FORMATS
from tests.oracle.process import serve
from tests.zoo import Case, Layer, Model, cases, make_inputs, permute

HERE = Path(__file__).resolve().parent / "tfjs"
SHARDS = {"layers": 1, "layers_sharded": 3}
INSTALL = ("npm", "ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts")
Arrays = dict[str, np.ndarray]


def prepare() -> str | None:
    """Install what the lock file says unless it is there; why that cannot be, in words."""
    if lacking := [name for name in ("node", "npm") if shutil.which(name) is None]:
        return f"TensorFlow.js needs {' and '.join(lacking)}, not found on this machine"
    digest = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()
    done = HERE / "node_modules" / ".installed"
    with (HERE / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() or done.read_text() != digest:
            installed = subprocess.run(INSTALL, cwd=HERE, capture_output=True, text=True)
            if installed.returncode != 0:
                return f"npm could not install TensorFlow.js: {(installed.stderr or installed.stdout).strip()[-300:]}"
            done.write_text(digest)
    return None


class Node:
    """TensorFlow.js in a process of its own; arrays are handed over as files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            ["node", str(HERE / "runner.mjs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "Node died"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def write(self, name: str, array: np.ndarray) -> str:
        path = self.folder / name
        path.write_bytes(array.tobytes())
        return str(path)


def described(case: Case) -> Model:
    model = model_of(case, "tfjs")
    if isinstance(model, str):
        raise LookupError(f"{case.name}: {model}")
    return model


def as_json(row: Layer) -> dict[str, Any]:
    inside = [as_json(one) for one in row.inside]
    return {"name": row.name, "cls": row.cls, "args": row.args, "of": row.of, "inside": inside}


def shapes(weights: list[dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, in the model's order; a name that comes again is numbered."""
    found: dict[str, tuple[int, ...]] = {}
    for weight in weights:
        name = weight["name"]
        found[name if name not in found else f"{name}#{len(found)}"] = tuple(weight["shape"])
    return found


def make(node: Node, case: Case) -> dict[str, tuple[int, ...]]:
    model = described(case)
    inputs = []
    for one, axes in zip(case.inputs, model.inputs, strict=True):
        sizes = dict(zip(one.axes, one.shape, strict=True))
        inputs.append({"shape": [sizes[letter] for letter in axes[1:]], "dtype": "int32" if one.below else "float32"})
    rows = [as_json(row) for row in model.layers]
    return shapes(node.call("make", builder=model.builder, rows=rows, inputs=inputs)["weights"])


def random(names: dict[str, tuple[int, ...]], seed: int) -> Arrays:
    rng = np.random.default_rng((seed, 5))
    return {
        name: rng.uniform(0.5, 1.5, shape) if "moving_variance" in name else rng.standard_normal(shape) * 0.5
        for name, shape in names.items()
    }


def fill(node: Node, weights: Arrays) -> None:
    numbers = [array.astype("<f4").ravel() for array in weights.values()]
    node.call("set", file=node.write("set.bin", np.concatenate(numbers)))


def held(node: Node) -> Arrays:
    file = node.folder / "get.bin"
    names = shapes(node.call("get", file=str(file))["weights"])
    numbers = np.fromfile(file, "<f4")
    parts = np.split(numbers, np.cumsum([int(np.prod(shape)) for shape in names.values()]))
    return {name: part.reshape(shape) for (name, shape), part in zip(names.items(), parts[:-1], strict=True)}


def run(node: Node, case: Case, arrays: list[np.ndarray]) -> np.ndarray:
    model = described(case)
    inputs = []
    for i, (array, one, to) in enumerate(zip(arrays, case.inputs, model.inputs, strict=True)):
        moved = permute(array, one.axes, to)
        inputs.append({"file": node.write(f"input{i}.bin", moved), "shape": moved.shape, "dtype": moved.dtype.name})
    file = node.folder / "output.bin"
    shape = node.call("predict", inputs=inputs, file=str(file))["shape"]
    return permute(np.fromfile(file, "<f4").reshape(shape), model.output, case.output)


def single(dtype: str) -> None:
    if dtype != "float32":
        raise ValueError(f"TensorFlow.js computes in float32, not {dtype}")


def build(
    node: Node,
    case: str,
    seed: int,
    folder: str,
    equal: bool,
    formats: list[str] | None,
    dtype: str,
    weights: str | None,
) -> dict[str, Any]:
    single(dtype)
    it = cases(equal)[case]
    names = make(node, it)
    values = random(names, seed)
    if weights is not None:
        with np.load(weights) as given:
            values = {name: given[name].reshape(shape) for name, shape in names.items()}
    fill(node, values)
    files = {}
    for kind in formats if formats is not None else FORMATS[:1]:
        files[kind] = node.call("save", folder=str(Path(folder) / kind), shards=SHARDS[kind])["file"]
    inputs = make_inputs(it, seed)
    arrays = {f"input{i}": array for i, array in enumerate(inputs)}
    arrays |= {f"weights/{name}": array for name, array in held(node).items()}
    path = Path(folder) / "tfjs.npz"
    np.savez(path, output=run(node, it, inputs), **arrays)
    return {"files": files, "missing": {}, "arrays": str(path), "inputs": len(inputs)}


def forward(node: Node, case: str, file: str, arrays: str, equal: bool, dtype: str) -> dict[str, Any]:
    single(dtype)
    it = cases(equal)[case]
    with np.load(arrays) as given:
        inputs = [given[f"input{i}"] for i in range(len(given.files))]
    node.call("load", file=file)
    np.savez(arrays, output=run(node, it, inputs))
    return {}


def unseen(node: Node, case: str, seed: int, equal: bool) -> dict[str, Any]:
    it = cases(equal)[case]
    values = random(make(node, it), seed)
    inputs = make_inputs(it, seed)
    fill(node, values)
    before = run(node, it, inputs)
    found = []
    for name, kept in values.items():
        fill(node, values | {name: kept + np.linspace(0.1, 0.3, kept.size).reshape(kept.shape)})
        if np.abs(run(node, it, inputs) - before).max() < 1e-5:
            found.append(name)
    return {"names": found}


if __name__ == "__main__":
    if reason := prepare():
        raise SystemExit(reason)
    with TemporaryDirectory() as folder:
        node = Node(Path(folder))
        handlers = {"build": build, "forward": forward, "unseen": unseen}
        serve({name: partial(handler, node) for name, handler in handlers.items()})
        node.stop()
