"""Hostile sets of sharded Keras weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.hostile.commands import Commands
from tests.hostile.sources import Row, every_command

ONE, TWO = "m_00000.weights.h5", "m_00001.weights.h5"
MAP: dict[str, Any] = {"/layers/dense/vars": ONE, "/layers/dense_1/vars": [ONE, TWO]}


def good_set(folder: Path) -> Path:
    """The network of the other good files, its last bias in a shard of its own."""
    arrays = {
        ONE: {"dense/vars/0": (3, 5), "dense/vars/1": (5,), "dense_1/vars/0": (5, 2)},
        TWO: {"dense_1/vars/1": (2,)},
    }
    for name, shapes in arrays.items():
        with h5py.File(folder / name, "w") as file:
            for path, shape in shapes.items():
                file[f"layers/{path}"] = np.ones(shape, "f4")
    return index(folder, MAP)


def index(folder: Path, weight_map: Any, total: Any = 128.0) -> Path:
    path = folder / "m.weights.json"
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return path


def mapped(**changes: Any) -> Callable[[Path, Path], Path]:
    """The first group in other shards."""

    def make(good: Path, folder: Path) -> Path:
        good_set(folder)
        return index(folder, {**MAP, "/layers/dense/vars": changes["to"]})

    return make


def spoiled(spoil: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    """A set of which something is done to a shard."""

    def make(good: Path, folder: Path) -> Path:
        path = good_set(folder)
        spoil(folder / TWO)
        return path

    return make


def external(path: Path) -> None:
    path.unlink()
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/dense_1/vars/1", (2,), "f4", external=[("/etc/passwd", 0, 8)])


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def text(content: str) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        good_set(folder)
        (folder / "m.weights.json").write_text(content)
        return folder / "m.weights.json"

    return make


ROWS = (
    Row("shard outside", mapped(to="../m.weights.h5"), "plain name"),
    Row("shard of an absolute path", mapped(to="/etc/x.h5"), "plain name"),
    Row("shard outside, for Windows", mapped(to="..\\x.h5"), "plain name"),
    Row("shard that is missing", mapped(to="gone.weights.h5"), "not there"),
    Row("shard twice", mapped(to=[ONE, ONE]), "twice"),
    Row("group in another shard", mapped(to=TWO), "has not in this shard"),
    Row("2,000 shards", mapped(to=[f"{i}.h5" for i in range(2000)]), "shards"),
    Row("shard that is a link", spoiled(linked), "a link"),
    Row("shard that is a pipe", spoiled(piped), "pipe"),
    Row("shard cut short", spoiled(lambda path: path.write_bytes(path.read_bytes()[:600]))),
    Row("shard that is no HDF5", spoiled(lambda path: path.write_bytes(bytes(600))), "HDF5"),
    Row("shard with external elements", spoiled(external)),
    Row("deep index", text('{"weight_map": {"a": "x.h5", "b": ' + "[" * 1_000_000)),
)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused_sets_of_shards(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".weights.json")


def test_a_good_one_is_read_and_filled(run: Commands, good: Path, tmp_path: Path) -> None:
    good_set(tmp_path)
    assert run(tmp_path, "show", "m.weights.json").status == 0
    filled = run(tmp_path, "convert", good / "model.weights.h5", "n.weights.json", "--into", "m.weights.json")
    assert filled.status == 0, filled
    assert sorted(path.name for path in tmp_path.glob("n*")) == [
        "n.weights.json",
        "n_00000.weights.h5",
        "n_00001.weights.h5",
    ]
