"""Where an output goes, and which names it may have."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import neutral
from neutral.cli import main
from neutral.errors import WrongUsage
from neutral.outputs import beside
from tests.test_cli import failing


def make_model(folder: Path, name: str) -> None:
    """The same two layers under any name that a file of its format has."""
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    torch.save(module, folder / "made.pt")
    neutral.convert(folder / "made.pt", folder / name)
    (folder / "made.pt").unlink()


def make_shards(folder: Path, name: str) -> None:
    arrays = {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5), "2.bias": (2,)}
    for tensor, shape in arrays.items():
        safetensors.numpy.save_file({tensor: np.ones(shape, np.float32)}, folder / f"{tensor}.safetensors")
    index = {"metadata": {}, "weight_map": {tensor: f"{tensor}.safetensors" for tensor in arrays}}
    (folder / name).write_text(json.dumps(index))


def make_checkpoint(folder: Path, name: str) -> None:
    neutral.convert(folder.parent / "source.nwt", folder / name, to="tensorflow")


def make_saved_model(folder: Path, name: str) -> None:
    neutral.convert(folder.parent / "source.nwt", folder / f"{name}.savedmodel", to="tensorflow")
    (folder / f"{name}.savedmodel").rename(folder / name)


def make_unzipped(folder: Path, name: str) -> None:
    make_model(folder, "made.keras")
    with zipfile.ZipFile(folder / "made.keras") as file:
        file.extractall(folder / name)
    (folder / "made.keras").unlink()


TEMPLATES: dict[str, Callable[[Path, str], None]] = {
    "t.pt": make_model,
    "t.keras": make_model,
    "t.weights.h5": make_model,
    "t.h5": make_model,
    "t.npz": make_model,
    "t.safetensors": make_model,
    "t.ckpt": make_checkpoint,
    "t.safetensors.index.json": make_shards,
    "saved": make_saved_model,
    "unzipped": make_unzipped,
}

FIT = {
    "t.pt": ["o.pth", "o.CKPT", "o.bin", "o.mine"],
    "t.keras": ["o.keras", "O.KERAS", "o"],
    "t.weights.h5": ["o.weights.h5", "O.Weights.H5"],
    "t.h5": ["o.hdf5", "o.mine"],
    "t.npz": ["o.NPZ"],
    "t.safetensors": ["o.SafeTensors", "o.json"],
    "t.ckpt": ["o.ckpt", "o-1"],
    "t.safetensors.index.json": ["o.safetensors.index.json", "o.json", "o"],
    "saved": ["o.savedmodel", "o"],
    "unzipped": ["o"],
}

UNFIT = {
    "t.pt": ["o.keras", "o.pt2", "o.npz", "o.SAFETENSORS", "o.nwt"],
    "t.keras": ["o.pt", "o.h5", "o.weights.h5", "o.savedmodel"],
    "t.weights.h5": ["o.keras", "o.h5", "o.hdf5"],
    "t.h5": ["o.weights.h5", "o.keras"],
    "t.npz": ["o.pt", "o.nwt.index.json"],
    "t.safetensors": ["o.pt", "o.safetensors.index.json"],
    "t.ckpt": ["o.pt", "o.savedmodel", "o.keras"],
    "t.safetensors.index.json": ["o.safetensors", "o.pt"],
    "saved": ["o.ckpt", "o.keras"],
    "unzipped": ["o.keras", "o.h5"],
}

USUAL = {name: name.replace("t.", "source.") for name in TEMPLATES} | {
    "t.safetensors.index.json": "source",
    "saved": "source",
    "unzipped": "source",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    make_model(folder, "source.nwt")
    for name, make in TEMPLATES.items():
        (folder / f"of {name}").mkdir()
        make(folder / f"of {name}", name)
    return folder


@pytest.fixture
def there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive and a folder `of <name>` for each template."""
    shutil.copytree(made, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def filling(name: str) -> list[str]:
    return ["import", "source.nwt", "--into", f"of {name}/{name}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_copy_of_a_template_takes_the_suffixes_of_its_format(
    name: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, out in enumerate(FIT[name]):
        (there / f"new{i}").mkdir()
        assert main([*filling(name), "-o", f"new{i}/{out}"]) == 0, capsys.readouterr().err
        assert any(path.name.startswith(out) for path in (there / f"new{i}").iterdir())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_copy_of_a_template_takes_no_other_known_suffix(
    name: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(there.iterdir())
    for out in UNFIT[name]:
        said = failing([*filling(name), "-o", out], capsys, 2)
        assert out in said and "for a copy of" in said and "choose" in said
    assert sorted(there.iterdir()) == before


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_copy_is_named_as_the_source_with_the_templates_suffix(name: str, there: Path) -> None:
    assert main(["-q", *filling(name)]) == 0
    found = {path.name for path in there.iterdir()}
    assert USUAL[name] in found or f"{USUAL[name]}.index" in found


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("a/s.pt", "a/s.nwt"),
        ("s.weights.h5", "s.nwt"),
        ("S.Weights.H5", "S.nwt"),
        ("model.safetensors.index.json", "model.nwt"),
        ("m.NWT", "m.nwt"),
        ("m.nwt.index.json", "m.nwt"),
        ("model.mine", "model.nwt"),
        ("model.ckpt", "model.nwt"),
        ("model.ckpt-100", "model.ckpt-100.nwt"),
        ("Llama-3.1/", "Llama-3.1.nwt"),
        ("m.savedmodel/", "m.nwt"),
    ],
)
def test_beside_a_source(source: str, out: str, tmp_path: Path) -> None:
    """A file's suffix gives way; a folder's or a prefix's name may have a dot of its own."""
    place = tmp_path / source
    if source.endswith("/"):
        place.mkdir()
    elif "ckpt" not in source:
        place.parent.mkdir(exist_ok=True)
        place.touch()
    assert beside(place, ".nwt") == tmp_path / out


def test_beside_a_folder_of_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert beside(Path(), ".nwt") == tmp_path / "model.nwt"
    assert beside(Path(".."), ".nwt") == tmp_path.parent / f"{tmp_path.name}.nwt"
    with pytest.raises(WrongUsage, match="name the model"):
        beside(Path("/"), ".nwt")


def test_python_drops_the_suffix_of_the_source_as_the_command_does(there: Path) -> None:
    neutral.convert("source.nwt", "s.pt")
    assert neutral.convert("s.pt", to="safetensors").out == Path("s.safetensors")
    assert neutral.convert("s.pt", to="keras", flatten={}).out == Path("s.weights.h5")
    assert neutral.convert("s.weights.h5", to="numpy").out == Path("s.npz")


@pytest.mark.parametrize(
    "name", ["X.KERAS", "X.H5", "X.Weights.H5", "X.PT", "X.PT2", "X.NPZ", "X.SafeTensors", "X.CKPT", "X.NWT"]
)
def test_suffixes_in_upper_case(name: str, there: Path) -> None:
    to = ["--to", "torch"] if name == "X.CKPT" else []
    assert main(["-q", "convert", "source.nwt", name, *to]) == 0
    assert [path.name for path in there.iterdir() if path.name.startswith("X")] == [name]
    if name != "X.PT2":
        assert neutral.diff(name, "source.nwt").same


def test_the_suffix_of_an_archive_in_upper_case_gives_way(there: Path) -> None:
    (there / "source.nwt").rename(there / "Y.NWT")
    assert neutral.import_model("Y.NWT", to="keras").out == Path("Y.keras")
    assert main(["-q", "export", "Y.keras", "Z.NWT", "--shard-size", "100B"]) == 0
    assert (there / "Z.nwt.index.json").is_file()


FOLDERS = ["saved", "unzipped", "t.safetensors.index.json", "t.safetensors"]


@pytest.mark.parametrize("this", [".", "./", "../{}", "../{}/"])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_folder_where_one_stands(name: str, this: str, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = there / f"of {name}"
    folder = folder if "." in name else folder / name
    monkeypatch.chdir(folder)
    here = this.format(folder.name)
    before = sorted(folder.rglob("*"))
    assert main(["-q", "export", here]) == 0
    assert main(["-q", "import", str(beside(folder, ".nwt")), "--into", here, "-o", "../new"]) == 0
    assert main(["-q", "convert", here, "../again", "--into", here]) == 0
    assert neutral.diff("../new", here).same and neutral.diff("../again", here).same
    assert sorted(folder.rglob("*")) == before, "an archive lies beside what it was made of, not in it"


@pytest.mark.parametrize("out", [".", "./", "..", "/", ""])
def test_an_output_without_a_name(
    out: str, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(there / "of saved" / "saved")
    before = sorted(there.rglob("*"))
    said = failing(["convert", "../../source.nwt", out, "--into", ".", "--force"], capsys, 1)
    assert "name the output" in said
    assert sorted(there.rglob("*")) == before


@pytest.mark.parametrize("name", ["saved", "unzipped"])
def test_a_copy_of_a_folder_is_not_written_into_it(
    name: str, there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(there / f"of {name}" / name)
    before = sorted(there.rglob("*"))
    assert "inside" in failing(["convert", "../../source.nwt", "new", "--into", "."], capsys, 1)
    assert "inside" in failing(["convert", "../../source.nwt", "new", "--into", f"../{name}"], capsys, 1)
    assert sorted(there.rglob("*")) == before


def test_an_index_without_a_folder_part(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there / "of t.safetensors.index.json")
    index = "t.safetensors.index.json"
    assert neutral.export_model(index, "t.nwt").manifest.source.format == "safetensors"
    assert neutral.import_model("t.nwt", into=index, out="new").out == Path("new")
    assert neutral.import_model("t.nwt", into=index).out == Path("t")
    assert neutral.diff("new", index).same and neutral.diff("t", index).same
