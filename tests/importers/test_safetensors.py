from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

import neutral
from neutral.errors import Refused, Unsupported
from neutral.exporters.safetensors import read
from neutral.importers.safetensors import build, fill
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
from neutral.schema.manifest import Manifest, Source


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zembed = torch.nn.Embedding(7, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.head = torch.nn.Linear(5, 7)
        self.head.weight = self.zembed.weight


def _manifest(model: NativeModel) -> Manifest:
    return Manifest(
        source=Source(framework=model.framework, format=model.format, settings=dict(model.metadata)),
        layers=(),
        weights_digest="0" * 64,
    )


def _shards(folder: Path) -> Path:
    folder.mkdir()
    for shard, names in (("one", "ca"), ("two", "b")):
        safetensors.numpy.save_file({n: np.full(2, ord(n), np.float32) for n in names}, folder / f"{shard}.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(
        '{"metadata": {"x": 1},\n "weight_map": {"c": "one.safetensors", "a": "one.safetensors", "b": "two.safetensors"}}'
    )
    return index


def test_fill_replaces_those_bytes_alone(tmp_path: Path) -> None:
    x, y = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    safetensors.numpy.save_file({"a": np.arange(2.0), "b": np.arange(6).reshape(2, 3)}, x, {"k": "v"})
    new = np.arange(6)[::-1].reshape(3, 2).T
    fill(x, {"b": from_array(new)}, y)
    loaded = safetensors.numpy.load_file(y)
    np.testing.assert_array_equal(loaded["b"], new)
    np.testing.assert_array_equal(loaded["a"], np.arange(2.0))
    fill(y, {"b": from_array(np.arange(6).reshape(2, 3))}, tmp_path / "z.safetensors")
    assert (tmp_path / "z.safetensors").read_bytes() == x.read_bytes()


def test_fill_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    x = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.arange(2.0)}, x)
    for name, array in (("a", np.ones(3)), ("a", np.ones(2, "f4")), ("b", np.ones(2))):
        with pytest.raises(Refused):
            fill(x, {name: from_array(array)}, tmp_path / "y.safetensors")
    with pytest.raises(Refused, match="input itself"):
        fill(x, {}, x, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_fill_of_tied_tensors(tmp_path: Path) -> None:
    x, y = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    safetensors.torch.save_model(_Tied(), str(x))
    new = {name: from_array(np.full((7, 5), 4, np.float32)) for name in ("head.weight", "zembed.weight")}
    fill(x, new, y)
    model = _Tied()
    safetensors.torch.load_model(model, y)
    assert model.head.weight is model.zembed.weight and model.head.weight.unique().tolist() == [4]
    fill(x, {"zembed.weight": new["zembed.weight"]}, tmp_path / "z.safetensors")
    assert (tmp_path / "z.safetensors").read_bytes() == y.read_bytes()
    new["zembed.weight"] = from_array(np.full((7, 5), 5, np.float32))
    with pytest.raises(Refused, match="tied"):
        fill(x, new, tmp_path / "w.safetensors")


def test_fill_of_shards_into_a_folder_or_beside_an_index(tmp_path: Path) -> None:
    index = _shards(tmp_path / "m")
    new = {"b": from_array(np.full(2, 7, np.float32)), "a": from_array(np.full(2, 8, np.float32))}
    (tmp_path / "beside").mkdir()
    fill(index, new, tmp_path / "folder")
    fill(tmp_path / "m", new, tmp_path / "beside" / "other.index.json")
    for found in (tmp_path / "folder", tmp_path / "beside" / "other.index.json"):
        assert {t.name: t.data.read().tolist() for t in read(found).tensors()} == {
            "c": [99, 99],
            "a": [8, 8],
            "b": [7, 7],
        }
    assert (tmp_path / "folder" / index.name).read_bytes() == index.read_bytes()
    assert (tmp_path / "beside" / "other.index.json").read_bytes() == index.read_bytes()


def test_fill_of_shards_refuses(tmp_path: Path) -> None:
    index = _shards(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in index.parent.iterdir()}
    for out in (index, index.parent, index.parent / "other.json", index.parent / "one.safetensors"):
        with pytest.raises(Refused):
            fill(index, {}, out, force=True)
    (tmp_path / "two.safetensors").write_bytes(b"mine")
    with pytest.raises(Refused, match="exists"):
        fill(index, {}, tmp_path / "new.json")
    assert {p.name: p.read_bytes() for p in index.parent.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "two.safetensors"]


def _mixed() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 5).bfloat16())
    return module.state_dict()


def _in_an_order_of_its_own(path: Path) -> None:
    entries = {
        "__metadata__": {"z": "é\n", "also.a": "b", "a": "x"},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"abcdefgh")


_FILES: dict[str, Callable[[Path], None]] = {
    "no metadata": lambda path: safetensors.torch.save_file(_mixed(), path),
    "metadata": lambda path: safetensors.torch.save_file(_mixed(), path, {"format": "pt", "who": "me", "a": "1"}),
    "of numpy": lambda path: safetensors.numpy.save_file({"fc.weight": np.eye(3), "n": np.zeros((0, 2), "f2")}, path),
    "equal, not tied": lambda path: safetensors.torch.save_file({"b.w": torch.ones(2), "a.w": torch.ones(2)}, path),
    "save_model": lambda path: safetensors.torch.save_model(_Tied(), str(path), metadata={"who": "me"}),
    "ties, a later name kept": lambda path: safetensors.torch.save_file(
        {"z.weight": torch.rand(3, 2)}, path, {"m.weight": "z.weight", "format": "pt", "a.weight": "z.weight"}
    ),
    "an order of its own": _in_an_order_of_its_own,
}


@pytest.mark.parametrize("through_an_archive", [False, True])
@pytest.mark.parametrize("name", _FILES)
def test_a_file_converted_to_its_own_format_is_the_same(name: str, through_an_archive: bool, tmp_path: Path) -> None:
    x, y = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    _FILES[name](x)
    if through_an_archive:
        neutral.export_model(x, tmp_path / "x.nwt").close()
        neutral.import_model(tmp_path / "x.nwt", to="safetensors", out=y)
    else:
        neutral.convert(x, y)
    assert y.read_bytes() == x.read_bytes()


def test_shards_become_a_file_in_the_usual_order(tmp_path: Path) -> None:
    """In the order of the index elements of eight bytes could lie behind odd ones, where torch cannot view them."""
    index = _shards(tmp_path / "m")
    neutral.convert(index, tmp_path / "y.safetensors")
    with safetensors.safe_open(tmp_path / "y.safetensors", "pt") as opened:
        assert list(opened.offset_keys()) == ["a", "b", "c"]


@pytest.mark.parametrize("told", [{"who": "me"}, [["who", "me"]], [["who", "me"], 1, "ab", ["x"]]])
def test_metadata_of_older_archives_and_nonsense(told: object, tmp_path: Path) -> None:
    source = Source(framework="safetensors", format="safetensors", settings={"metadata": told})
    model = NativeModel(
        "torch", "safetensors", (NativeLayer("", None, {"a": NativeTensor("a", from_array(np.ones(2)))}),)
    )
    build(model, Manifest(source=source, layers=(), weights_digest="0" * 64), tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as opened:
        assert opened.metadata() == {"who": "me"}


def test_build_from_another_framework_ties_for_load_model(tmp_path: Path) -> None:
    was = _Tied()
    state = {name: tensor.detach().numpy() for name, tensor in was.state_dict().items()}
    shared = from_array(state["head.weight"])
    tensors = {
        n: NativeTensor(n, shared if a.shape == (7, 5) else from_array(a), "tie" if a.shape == (7, 5) else None)
        for n, a in state.items()
    }
    model = NativeModel(
        "keras", "keras", (NativeLayer("all", None, tensors),), metadata={"metadata": {"no": "torch's"}}
    )
    build(model, _manifest(model), tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "zembed.weight": "head.weight"}
        assert set(opened.keys()) == set(state) - {"zembed.weight"}
    again = _Tied()
    safetensors.torch.load_model(again, tmp_path / "x.safetensors")
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name])


def test_build_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    tensor = NativeTensor("a", from_array(np.ones(2, np.complex128)))
    model = NativeModel("torch", "pt", (NativeLayer("", None, {"a": tensor}),))
    with pytest.raises(Refused, match="complex128"):
        build(model, _manifest(model), tmp_path / "x.safetensors")
    with pytest.raises(Unsupported, match="suffix"):
        build(model, _manifest(model), tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())
