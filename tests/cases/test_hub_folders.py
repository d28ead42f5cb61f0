"""Folders as Hugging Face keeps models: an index and its shards, a config that is kept and not believed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import neutral
from neutral.errors import BadFile, NeutralError, Refused
from neutral.frameworks import detect

CONFIG = {"model_type": "tiny", "architectures": ["Tiny"], "hidden_size": 5, "layer_norm_eps": 1e-12}


def state(seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": torch.from_numpy(rng.standard_normal((11, 5)).astype("float32")),
        "block.0.fc.weight": torch.from_numpy(rng.standard_normal((7, 5)).astype("float32")).to(torch.bfloat16),
        "block.0.fc.bias": torch.from_numpy(rng.standard_normal(7).astype("float32")),
        "head.weight": torch.from_numpy(rng.standard_normal((3, 7)).astype("float32")),
    }


def folder(path: Path, kind: str, seed: int) -> Path:
    """A folder with the weights in one file or two shards, and what lies beside them."""
    path.mkdir()
    save = torch.save if "bin" in kind else lambda tensors, file: safetensors.torch.save_file(tensors, file)
    stem, suffix = ("pytorch_model", ".bin") if "bin" in kind else ("model", ".safetensors")
    tensors = state(seed)
    if "shards" in kind:
        places = dict(zip(tensors, (1, 1, 2, 2), strict=True))  # one layer lies in both
        for number in (1, 2):
            shard = {name: tensors[name] for name, place in places.items() if place == number}
            save(shard, path / f"{stem}-0000{number}-of-00002{suffix}")
        index = {"metadata": {}, "weight_map": {n: f"{stem}-0000{p}-of-00002{suffix}" for n, p in places.items()}}
        (path / f"{stem}{suffix}.index.json").write_text(json.dumps(index), "utf-8")
    else:
        save(tensors, path / f"{stem}{suffix}")
    (path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (path / "vocab.txt").write_text("a\nb\n", "utf-8")
    return path


KINDS = ("safetensors", "safetensors shards", "bin", "bin shards")


def loaded(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".bin":
            found |= torch.load(file, weights_only=True)
        elif file.suffix == ".safetensors":
            found |= safetensors.torch.load_file(file)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_and_the_config_are_archived(kind: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "model", kind, 1)
    with neutral.export_model(source, tmp_path / "model.nwt") as archive:
        assert archive.manifest.source.settings["provenance"] == {"config.json": CONFIG}
        assert {layer.path for layer in archive.manifest.layers} == {"embed", "block.0.fc", "head"}
        digest = archive.manifest.weights_digest
    neutral.import_model(tmp_path / "model.nwt", out=tmp_path / "again.safetensors")
    assert same(safetensors.torch.load_file(tmp_path / "again.safetensors"), state(1))
    assert neutral.digest(tmp_path / "again.safetensors") == digest


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("template", KINDS)
def test_a_folder_is_filled_with_all_that_belongs_to_it(source: str, template: str, tmp_path: Path) -> None:
    given, goal = folder(tmp_path / "a", source, 1), folder(tmp_path / "b", template, 2)
    out = tmp_path / "filled"
    neutral.convert(given, out, into=goal)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in goal.iterdir())
    assert same(loaded(out), state(1))
    assert (out / "config.json").read_bytes() == (goal / "config.json").read_bytes()
    assert detect(out) == detect(goal)


def test_safetensors_go_before_pickles_in_one_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "safetensors", 1)
    torch.save(state(2), path / "pytorch_model.bin")
    assert detect(path)[0] == "safetensors"
    with neutral.export_model(path, tmp_path / "out.nwt") as archive:
        assert archive.manifest.notes[-1] == "weights beside these, not read: pytorch_model.bin"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_file_and_an_index_of_others_are_two_sets(kind: str, tmp_path: Path) -> None:
    """transformers loads the file; what made the shards, maybe after it, meant them."""
    path = folder(tmp_path / "model", f"{kind} shards", 1)
    other = folder(tmp_path / "other", kind, 2)
    single = next(file for file in other.iterdir() if file.suffix == f".{kind}")
    single.rename(path / single.name)
    with pytest.raises(BadFile, match=f"both {single.name} and the index"):
        neutral.export_model(path, tmp_path / "out.nwt")
    assert neutral.digest(path / f"{single.name}.index.json") != neutral.digest(path / single.name)


def test_the_index_of_other_shards_is_not_copied_without_them(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "safetensors", 1)
    for file in folder(tmp_path / "old", "bin shards", 2).glob("pytorch_model*"):
        file.rename(path / file.name)
    neutral.convert(folder(tmp_path / "given", "safetensors", 3), tmp_path / "filled", into=path)
    assert sorted(p.name for p in (tmp_path / "filled").iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    assert same(loaded(tmp_path / "filled"), state(3))


def test_the_index_itself_may_be_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "bin shards", 1)
    assert detect(path / "pytorch_model.bin.index.json") == ("torch", "bin-shards")
    assert neutral.digest(path / "pytorch_model.bin.index.json") == neutral.digest(path)


def test_records_of_two_shards_are_not_tied(tmp_path: Path) -> None:
    """Each file counts its records from nought."""
    path = folder(tmp_path / "model", "bin shards", 1)
    with neutral.export_model(path) as archive:
        assert not any(p.tied_to for _, p in archive.manifest.parameters())


def changed(path: Path, **places: str | None) -> Path:
    index = path / "pytorch_model.bin.index.json"
    told = json.loads(index.read_text())
    for name, place in places.items():
        name = name.replace("__", ".")
        if place is None:
            del told["weight_map"][name]
        else:
            told["weight_map"][name] = place
    index.write_text(json.dumps(told))
    return path


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ({"head__weight": "../x.bin"}, "plain name"),
        ({"head__weight": "/etc/passwd.bin"}, "plain name"),
        ({"head__weight": "nothing.bin"}, "not there"),
        ({"head__weight": "pytorch_model-00001-of-00002.bin"}, "head.weight"),
        ({"head__weight": None}, "head.weight"),
        ({"more__weight": "pytorch_model-00001-of-00002.bin"}, "more.weight"),
    ],
)
def test_an_index_that_is_not_true_is_refused(places: dict[str, str | None], found: str, tmp_path: Path) -> None:
    path = changed(folder(tmp_path / "model", "bin shards", 1), **places)
    with pytest.raises(BadFile, match=found) as caught:
        neutral.export_model(path, tmp_path / "out.nwt")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.nwt").exists()


def test_a_linked_shard_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "bin shards", 1)
    shard = path / "pytorch_model-00001-of-00002.bin"
    shard.rename(tmp_path / "elsewhere.bin")
    shard.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(BadFile, match="a link"):
        neutral.export_model(path)


@pytest.mark.parametrize("text", ["[]", "{", '{"a": NaN}', "[" * 10**6, "x" * (5 << 20)])
def test_a_config_that_is_none_changes_nothing(text: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "safetensors shards", 1)
    (path / "config.json").write_text(text)
    with neutral.export_model(path, tmp_path / "out.nwt") as archive:
        assert len(archive.layers) == 3
    assert neutral.digest(tmp_path / "out.nwt") == neutral.digest(folder(tmp_path / "other", "bin", 1))


def test_the_output_must_not_be_the_template(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "safetensors", 1)
    with pytest.raises((Refused, NeutralError)):
        neutral.convert(folder(tmp_path / "other", "bin", 2), path, into=path, force=True)
    assert same(loaded(path), state(1))
