"""What the scripts of this folder share. It needs NumPy alone, of any version."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np


def values(name, shape):
    """Random weights that depend on their name and shape alone: each version of a framework writes the same ones."""
    numbers = np.random.RandomState(zlib.crc32(repr((name, tuple(shape))).encode()))
    low, high = (0.5, 1.5) if "var" in name.rsplit("/", 1)[-1] else (-0.5, 0.5)
    return numbers.uniform(low, high, shape).astype(np.float32)


def inputs(case):
    """The input of a model: images have their channels last."""
    numbers = np.random.RandomState(1)
    case = case.split("-")[-1]
    if case == "text":
        return numbers.randint(0, 7, (2, 5)).astype(np.int32)
    return numbers.uniform(-1, 1, {"image": (2, 4, 5, 2), "attention": (2, 5, 6)}[case]).astype(np.float32)


def folder(here, framework, version):
    """The folder of one version's files."""
    path = (Path(here) / (framework + "-" + version)).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def record(path, outputs, of=None):
    """What the models computed, by the names of their files, and of what: `y/<file>`, `x/<case>`."""
    arrays = {"y/" + name: np.asarray(y) for name, y in outputs.items()}
    cases = {name.split("_")[0] for name in outputs}
    arrays.update({"x/" + case: inputs(case) if of is None else of[case] for case in sorted(cases)})
    np.savez_compressed(str(path / "outputs.npz"), **arrays)


def packed(path):
    """A folder as a zip of the same name."""
    with zipfile.ZipFile(str(path) + ".zip", "w") as file:
        for part in sorted(path.rglob("*")):
            if part.is_file():
                name = zipfile.ZipInfo(part.relative_to(path).as_posix())
                file.writestr(name, part.read_bytes(), zipfile.ZIP_DEFLATED)
    shutil.rmtree(path)
