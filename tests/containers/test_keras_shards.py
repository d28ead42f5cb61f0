"""Sharded weights of Keras 3: read as one file, filled, and what is forged about them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import neutral
from neutral.containers.files import new_file
from neutral.containers.hdf5 import Hdf5Tree, plan_hdf5
from neutral.containers.keras_file import open_keras
from neutral.containers.keras_shards import open_shards
from neutral.errors import BadFile, NeutralError
from neutral.frameworks import detect
from neutral.native import from_array

RNG = np.random.default_rng(0)


def shard(path: Path, arrays: Mapping[str, Any]) -> None:
    groups: dict[str, dict[str, str | list[str]]] = {name.rpartition("/")[0]: {} for name in arrays}
    with new_file(path) as file:
        plan_hdf5(Hdf5Tree(groups, {name: from_array(array) for name, array in arrays.items()})).write(file)


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.normal(size=shape).astype("f4")


ONE, TWO = "m_00000.weights.h5", "m_00001.weights.h5"


def make(folder: Path, weight_map: Any = None, **more: Mapping[str, Any]) -> Path:
    """Two dense layers, the second one's variables in two shards."""
    folder.mkdir(exist_ok=True)
    one = {"layers/dense/vars/0": f32(3, 5), "layers/dense/vars/1": f32(5), "layers/dense_1/vars/0": f32(5, 2)}
    shard(folder / ONE, more.get("one", one))
    shard(folder / TWO, more.get("two", {"layers/dense_1/vars/1": f32(2)}))
    if weight_map is None:
        weight_map = {"/layers/dense/vars": ONE, "/layers/dense_1/vars": [ONE, TWO]}
    (folder / "m.weights.json").write_text(json.dumps({"metadata": {"total_size": 128.0}, "weight_map": weight_map}))
    return folder / "m.weights.json"


def test_an_object_may_lie_in_several_shards(tmp_path: Path) -> None:
    index = make(tmp_path)
    assert detect(index) == ("keras", "weights.json")
    opened = open_keras(index)
    assert opened.format == "weights.json"
    assert list(opened.source.datasets) == [f"layers/{n}/vars/{i}" for n in ("dense", "dense_1") for i in (0, 1)]
    assert len({dataset.address for dataset in opened.source.datasets.values()}) == 4
    opened.close()


def test_a_shard_is_not_a_whole_file(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(BadFile, match=r"name .*m\.weights\.json"):
        neutral.export_model(tmp_path / ONE, tmp_path / "x.nwt")


@pytest.mark.parametrize("out", ["n.weights.json", "other/m.weights.json", "other/plain.json"])
def test_a_copy_has_shards_of_its_own_name(out: str, tmp_path: Path) -> None:
    template, source = make(tmp_path / "t"), make(tmp_path / "s")
    (tmp_path / "t/other").mkdir()
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").glob("*.*")}
    neutral.convert(source, tmp_path / "t" / out, into=template)
    stem = Path(out).name.removesuffix(".json").removesuffix(".weights")
    wanted, found = open_shards(source), open_shards(tmp_path / "t" / out)
    assert sorted(found.sources) == [f"{stem}_0000{i}.weights.h5" for i in (0, 1)]
    for name in wanted.whole.datasets:
        assert np.array_equal(found.whole.tensor(name).read(), wanted.whole.tensor(name).read())
    for opened in (wanted, found):
        opened.close()
    assert all((tmp_path / "t" / name).read_bytes() == data for name, data in before.items())
    if stem == "m":
        assert (tmp_path / "t" / out).read_bytes() == template.read_bytes()


def test_other_shards_than_those_named_after_the_index_stay_apart(tmp_path: Path) -> None:
    source = make(tmp_path / "s")
    template = make(tmp_path / "t").rename(tmp_path / "t/x.weights.json")
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    for force in (False, True):
        with pytest.raises(NeutralError, match="where there is one already"):
            neutral.convert(source, tmp_path / "t/n.weights.json", into=template, force=force)
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before


ALL = {"/layers/dense/vars": ONE, "/layers/dense_1/vars": [ONE, TWO]}


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({**ALL, "/layers/dense/vars": "../m_00000.weights.h5"}, "plain name"),
        ({**ALL, "/layers/dense/vars": "/etc/passwd"}, "plain name"),
        ({**ALL, "/layers/dense/vars": "..\\x.h5"}, "plain name"),
        ({**ALL, "/layers/dense/vars": ".."}, "plain name"),
        ({**ALL, "/layers/dense/vars": "a\0.h5"}, "plain name"),
        ({**ALL, "/layers/dense/vars": 3}, "plain name"),
        ({**ALL, "/layers/dense/vars": []}, "no shard"),
        ({**ALL, "/layers/dense/vars": [ONE, ONE]}, "no shard"),
        ({**ALL, "layers/dense/vars": ONE}, "the same twice"),
        ({**ALL, "/layers/dense/vars": "gone.weights.h5"}, "not there"),
        ({**ALL, "/layers/dense/vars": "link.weights.h5"}, "a link"),
        ({**ALL, "/layers/dense/vars": "pipe.weights.h5"}, "pipe"),
        ({**ALL, "/layers/dense/vars": "m.weights.json"}, "HDF5"),
        ({**ALL, "/layers/dense/vars": TWO}, "the index has not in this shard"),
        ({"/layers/dense_1/vars": [ONE, TWO]}, "the index has not in this shard"),
        ({**ALL, "/layers/dense_1/vars": ONE}, "120 bytes of variables"),
        ({"/layers/dense/vars": ONE, "/layers/dense_1/vars": [TWO]}, "the index has not in this shard"),
        ({**ALL, "/layers/dense_2/vars": ONE}, "of no number"),
    ],
)  # fmt: skip
def test_an_index_that_is_forged_is_refused(weight_map: Any, says: str, tmp_path: Path) -> None:
    index = make(tmp_path, weight_map)
    (tmp_path / "link.weights.h5").symlink_to(ONE)
    os.mkfifo(tmp_path / "pipe.weights.h5")
    with pytest.raises(BadFile, match=says):
        open_shards(index)


@pytest.mark.parametrize(
    ("two", "says"),
    [
        ({"layers/dense_1/vars/0": f32(5, 2)}, "another shard has"),
        ({"layers/dense_1/vars/2": f32(2)}, "a shard is missing"),
        ({"layers/dense_1/vars/x": f32(2)}, "a shard is missing"),
        ({"layers/dense_1/deep/vars/0": f32(2)}, "the index has not in this shard"),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(two: Mapping[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=says):
        open_shards(make(tmp_path, two=two))


def test_a_first_shard_that_is_missing_is_noticed(tmp_path: Path) -> None:
    index = make(tmp_path, {"/layers/dense_1/vars": TWO})
    with pytest.raises(BadFile, match="a shard is missing"):
        open_shards(index)


def test_real_keras_loads_a_copy(tmp_path: Path) -> None:
    keras = importlib.import_module("keras")
    K = keras.layers

    def model() -> Any:
        layers = [
            K.Dense(40, name="fc"),
            K.Reshape((5, 8)),
            K.LSTM(6, return_sequences=True),
            K.BatchNormalization(),
            K.Dense(9),
        ]
        made = keras.Sequential([K.Input((30,)), *layers])
        for weight in made.weights:
            weight.assign(RNG.uniform(0.1, 1, weight.shape))
        return made

    source, template, other = model(), model(), model()
    source.save_weights(tmp_path / "s.weights.json", max_shard_size=5e-6)
    template.save_weights(tmp_path / "t.weights.json", max_shard_size=6e-6)
    assert all(len(list(tmp_path.glob(f"{name}_*"))) > 1 for name in "st")
    neutral.convert(tmp_path / "s.weights.json", tmp_path / "n.weights.json", into=tmp_path / "t.weights.json")
    other.load_weights(tmp_path / "n.weights.json")
    for found, wanted in zip(other.weights, source.weights, strict=True):
        assert np.array_equal(found.numpy(), wanted.numpy())
    source.save_weights(tmp_path / "whole.weights.h5")
    assert neutral.digest(tmp_path / "s.weights.json") == neutral.digest(tmp_path / "whole.weights.h5")
