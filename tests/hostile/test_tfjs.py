"""Hostile TensorFlow.js models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.commands import Commands, refused
from tests.hostile.sources import Row, every_command
from tests.tfjs_models import Json, layer, save, sequential, weights

Edit = Callable[[Json, Path], None]


def good_model(folder: Path) -> Path:
    """The network of the other good files."""
    first = layer("Dense", "a", units=5, activation="relu", batch_input_shape=[None, 3])
    arrays = weights(a__kernel=(3, 5), a__bias=(5,), b__kernel=(5, 2), b__bias=(2,))
    return save(folder, sequential(first, layer("Dense", "b", units=2)), arrays)


def edited(edit: Edit) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        model = good_model(folder / "x")
        document = json.loads((model / "model.json").read_text())
        edit(document, model)
        (model / "model.json").write_text(json.dumps(document))
        return model

    return make


def weight(**changes: object) -> Callable[[Path, Path], Path]:
    """The first weight with other entries."""
    return edited(lambda document, _: document["weightsManifest"][0]["weights"][0].update(changes))


def shard(name: object) -> Callable[[Path, Path], Path]:
    return edited(lambda document, _: document["weightsManifest"][0].update(paths=[name]))


def shard_as(make: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    """The shard replaced by something else of its name."""

    def edit(document: Json, model: Path) -> None:
        (model / "weights.bin").rename(model.parent / "elsewhere.bin")
        make(model / "weights.bin")

    return edited(edit)


def topology(value: Any) -> Callable[[Path, Path], Path]:
    return edited(lambda document, _: document.update(modelTopology=value))


def text(content: str | bytes) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        model = good_model(folder / "x")
        data = content.encode() if isinstance(content, str) else content
        (model / "model.json").write_bytes(data)
        return model / "model.json"

    return make


def deep(levels: int) -> Json:
    found = sequential()
    for _ in range(levels):
        found = sequential(found)
    return found


MANIFEST = '"weightsManifest": [{"paths": ["weights.bin"], "weights": ['

ROWS = (
    Row("shard outside", shard("../elsewhere.bin"), "../elsewhere.bin"),
    Row("shard of an absolute path", shard("/etc/passwd"), "/etc/passwd"),
    Row("shard outside, for Windows", shard("..\\elsewhere.bin"), "elsewhere"),
    Row("shard that is no name", shard({"a": 1}), "a shard"),
    Row("shard with NUL", shard("weights.bin\0"), "a shard"),
    Row("shard that is the JSON", shard("model.json"), "twice"),
    Row("shard that is missing", shard("gone.bin"), "not there"),
    Row("shard that is a link", shard_as(lambda path: path.symlink_to("../elsewhere.bin")), "a link"),
    Row("shard that is a pipe", shard_as(os.mkfifo), "pipe"),
    Row("shard that is a folder", shard_as(Path.mkdir), "folder"),
    Row("shard cut short", shard_as(lambda path: path.write_bytes(bytes(100))), "cut short"),
    Row("shard with more bytes", shard_as(lambda path: path.write_bytes(bytes(200))), "forged"),
    Row("shape of 2^40", weight(shape=[1 << 40]), "shards"),
    Row("shape of 2^62 and 0", weight(shape=[1 << 62, 0]), "shards"),
    Row("shape of 10^400", weight(shape=[10**400]), "shards"),
    Row("negative shape", weight(shape=[-3, 5]), "shape"),
    Row("float shape", weight(shape=[3.0, 5.0]), "shape"),
    Row("40 axes", weight(shape=[1] * 40), "shape"),
    Row("other shape", weight(shape=[5, 4]), ""),
    Row("unknown dtype", weight(dtype="float64"), "float64"),
    Row("texts", weight(dtype="string"), "texts"),
    Row("name twice", weight(name="a/bias"), "two weights"),
    Row("name with NUL", weight(name="a\0"), "name"),
    Row("half a surrogate", weight(name="\ud800"), "name"),
    Row("name that leaves the folder", weight(name="../../x"), "../../x", as_template=False),
    Row("scale that is no number", weight(quantization={"dtype": "uint8", "min": 0, "scale": float("nan")}), "finite"),
    Row("scale of 10^300", weight(quantization={"dtype": "uint8", "min": 0, "scale": 1e300}), "float32"),
    Row("scale missing", weight(quantization={"dtype": "uint16"}), "finite"),
    Row("unknown quantization", weight(quantization={"dtype": "int4", "min": 0, "scale": 1}), "int4"),
    Row("graph model", edited(lambda document, _: document.update(format="graph-model")), "graph model"),
    Row("topology that is a list", topology([]), "modelTopology"),
    Row("topology of a cycle", topology({"class_name": "Model", "config": {"layers": 3, "input_layers": [], "output_layers": []}}), ""),
    Row("deep models", topology(deep(150)), "malformed"),
    Row("deep JSON", text('{"modelTopology": ' + "[" * 1_000_000), ""),
    Row("deep config", text('{"modelTopology": {"class_name": "Sequential", "config": ' + '{"a":' * 100_000), ""),
    Row("200,000 weights", text(
        '{"modelTopology": {}, ' + MANIFEST + ",".join(f'{{"name":"{i}","shape":[0],"dtype":"float32"}}' for i in range(200_000)) + "]}]}"
    ), "weights", slow=True),
    Row("weights that are no list", text('{"modelTopology": {}, "weightsManifest": [{"paths": [], "weights": 7}]}'), "paths"),
    Row("no weights", text('{"modelTopology": {"class_name": "Sequential", "config": []}, "weightsManifest": []}'), "no weight"),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused_tfjs_models(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, "")


def test_a_good_one_is_read_and_filled(run: Commands, good: Path, tmp_path: Path) -> None:
    good_model(tmp_path / "x")
    assert run(tmp_path, "export", "x", "x.nwt").status == 0
    filled = run(tmp_path, "convert", good / "model.keras", "out", "--into", "x")
    assert filled.status == 0, filled
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "weights.bin"]


def test_a_name_cannot_write_on_the_terminal(run: Commands, tmp_path: Path) -> None:
    weight(name="\x1b[31m\nneutral: done\r/kernel")(tmp_path, tmp_path)
    outcome = run(tmp_path, "show", "x")
    assert outcome.status == 0 and "\x1b" not in outcome.out


def test_nothing_is_written_where_a_model_is_already(run: Commands, good: Path, tmp_path: Path) -> None:
    good_model(tmp_path / "x")
    good_model(tmp_path / "y")
    refused(run, tmp_path, ["convert", good / "model.keras", "y", "--into", "x"], "exists")
    refused(run, tmp_path, ["convert", good / "model.keras", "x/in", "--into", "x", "--force"], "inside")
    refused(run, tmp_path, ["convert", good / "model.keras", "x/model.json", "--into", "x", "--force"], "input itself")
