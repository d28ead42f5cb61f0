"""Files that older versions of every framework wrote, and what those versions computed.

The folder `versions` says how they were made. Each file goes into a torch module of the same layers, whose forward pass must
give what was recorded, and its weights have the digest that they have always had.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import neutral
from tests.cases.models import randomized

HERE = Path(__file__).with_name("versions")
DIGESTS: Mapping[str, str] = json.loads((HERE / "digests.json").read_text("utf-8"))


class Image(nn.Module):
    def __init__(self, up: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, (3, 2))
        self.norm = nn.BatchNorm2d(3, eps=1e-3)
        self.relu = nn.ReLU()
        self.up = nn.ConvTranspose2d(3, 4, (2, 3), stride=2) if up else nn.Identity()
        self.dense = nn.Linear(144 if up else 24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.dense(self.up(self.relu(self.norm(self.conv(x)))).flatten(1))
        return out


class Text(nn.Module):
    def __init__(self, norm: bool = True, gru: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.norm = nn.LayerNorm(5, eps=1e-3) if norm else nn.Identity()
        self.gru = nn.GRU(5, 3, batch_first=True) if gru else None
        self.dense = nn.Linear(3 if gru else 5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.lstm(self.embedding(x))[0])
        out: torch.Tensor = self.dense(y if self.gru is None else self.gru(y)[0])
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, eps=1e-3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        out: torch.Tensor = self.attention(y, y, y)[0]
        return out


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "image": Image,
    "plain-image": lambda: Image(up=False),
    "text": Text,
    "plain-text": lambda: Text(norm=False),
    "lstm": lambda: Text(gru=False),
    "attention": Attention,
}

WEIGHTS = (
    "msgpack",
    "checkpoints.zip",
    "zarr.zip",
    "ocdbt.zip",
    "weights.h5",
    "checkpoint.index",
    "npz",
    "safetensors",
    "pdparams",
)
"""Formats of weights alone, which do not say what order a Flatten has."""

FLAX_CELLS = {"OptimizedLSTMCell_0": "lstm", "GRUCell_0": "gru"}
"""Flax names cells after their class, in whatever layer they are; the other layers have torch's names."""


def hints(framework: str, case: str, form: str) -> dict[str, Any]:
    """What the files do not say: the order of a Flatten in files of weights, and which way Flax keeps a kernel."""
    told: dict[str, Any] = {}
    if "image" in case and form in WEIGHTS:
        told["flatten"] = {"dense": "4" if case == "image" else "3"}
    if framework in ("flax", "orbax"):
        if case == "image":
            told["kinds"] = {"up": "conv_transpose(transpose_kernel=false)"}
        if case == "text":
            told["mapping"] = FLAX_CELLS
    return told


def files() -> list[str]:
    """Every file and folder, `<framework>-<version>/<name>`."""
    skipped = ("outputs.npz", "outputs.json")
    return sorted(
        f"{folder.name}/{file.name}"
        for folder in HERE.glob("*-*")
        for file in folder.iterdir()
        if file.name not in skipped and ".data-" not in file.name and folder.name.split("-")[0] not in OTHERS
    )


OTHERS = ("transformers", "safetensors", "tf2onnx")


def opened(name: str, folder: Path) -> Path:
    """The file, or the folder that a zip holds, unpacked."""
    path = HERE / name
    if path.suffix != ".zip":
        return path
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder / path.stem)
    return folder / path.stem


@cache
def recorded(folder: str) -> Mapping[str, np.ndarray]:
    """`x/<case>` and `y/<file>` of one version."""
    if (HERE / folder / "outputs.json").exists():
        said = json.loads((HERE / folder / "outputs.json").read_text("utf-8"))
        return {f"{side}/{name}": np.array(pair[side]) for name, pair in said.items() for side in "xy"}
    with np.load(HERE / folder / "outputs.npz") as arrays:
        return dict(arrays)


def expected(name: str) -> tuple[np.ndarray, np.ndarray]:
    """What went in and what came out, of the file's model."""
    folder, file = name.split("/")
    arrays = recorded(folder)
    stem = file.split(".")[0]
    y = next(y for key, y in arrays.items() if key in (f"y/{stem}", f"y/{case_of(name)}"))
    return arrays[f"x/{case_of(name)}"], y


def case_of(name: str) -> str:
    return name.split("/")[1].split(".")[0].split("_")[0]


@pytest.mark.parametrize("name", files())
def test_a_file_computes_what_its_writer_computed(name: str, tmp_path: Path) -> None:
    framework, case = name.split("-")[0], case_of(name)
    module = randomized(MODELS[case](), 1)
    told = hints(framework, case, name.split("/")[1].partition(".")[2])
    neutral.convert(opened(name, tmp_path), into=module, **told)
    x, y = expected(name)
    if "image" in case:  # recorded with its channels last
        x = np.moveaxis(x, -1, 1)
    given = torch.from_numpy(np.ascontiguousarray(x))
    with torch.no_grad():
        out = module(given.float() if given.ndim > 2 else given.long()).numpy()
    assert out.shape == y.shape and np.ptp(y) > 1e-2
    assert np.abs(out - y).max() < 1e-5


FAMILIES = {"orbax": "flax", "tf_keras": "keras"}
"""Whose weights these wrote, too."""

KINDS = {
    "conv": "conv",
    "up": "conv_transpose",
    "embedding": "embedding",
    "norm": "layer_norm",
    "dense": "dense",
    "attention": "attention",
}
"""The kinds of layers of which a file does not say them."""


@pytest.mark.parametrize("name", files())
def test_the_same_weights_have_one_digest(name: str, tmp_path: Path) -> None:
    """Every version of a framework, and each of its formats."""
    framework, case = name.split("-")[0], case_of(name)
    told = hints(framework, case, name.split("/")[1].partition(".")[2])
    told.pop("mapping", None)
    source = opened(name, tmp_path)
    with neutral.export_model(source, **told) as archive:
        unknown = [layer.path for layer in archive.manifest.layers if layer.kind == "unknown"]
    told["kinds"] = {path: KINDS[path] for path in unknown} | told.get("kinds", {})
    family = FAMILIES.get(framework, framework)
    assert neutral.digest(source, **told) == DIGESTS[f"{family}/{case}"]


@pytest.mark.parametrize("version", ["0.3.0", "0.4.0"])
@pytest.mark.parametrize("name", ["arrays", "metadata"])
def test_safetensors(version: str, name: str, tmp_path: Path) -> None:
    """Every dtype, a scalar, an array of nothing: as the version that is installed reads them, and back to the byte."""
    path = HERE / f"safetensors-{version}" / f"{name}.safetensors"
    expected = load_file(path)
    # One of the two files says `format: np`: such arrays are whose the user says.
    neutral.convert(path, tmp_path / "again.safetensors", format="safetensors")
    found = load_file(tmp_path / "again.safetensors")
    assert found.keys() == expected.keys() and len(found) == 13
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
        assert found[key].tobytes() == array.tobytes()
    neutral.convert(path, tmp_path / "filled.safetensors", format="safetensors", to="safetensors", into=path)
    assert (tmp_path / "filled.safetensors").read_bytes() == path.read_bytes()
    assert neutral.digest(path, format="safetensors") == DIGESTS["safetensors"]


def test_every_digest_is_of_a_file() -> None:
    used = {f"{FAMILIES.get(f, f)}/{case_of(name)}" for name in files() for f in [name.split("-")[0]]}
    assert used | {"safetensors"} == DIGESTS.keys()
