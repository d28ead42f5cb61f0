from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from neutral.errors import BadFile, Refused, WrongUsage
from neutral.exporters.safetensors import read


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.head = torch.nn.Linear(5, 7)
        self.head.weight = self.embed.weight


def test_reads_a_torch_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, (4, 5)), torch.nn.BatchNorm2d(3), torch.nn.LSTM(6, 7))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "x.safetensors", {"format": "pt"})
    found = read(tmp_path / "x.safetensors")
    assert (found.framework, found.format) == ("torch", "safetensors")
    assert {layer.path: set(layer.tensors) for layer in found.layers} == {
        "0": {"weight", "bias"},
        "1": {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
        "2": {"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"},
    }
    for tensor in found.tensors():
        np.testing.assert_array_equal(tensor.data.read(), model.state_dict()[tensor.name].numpy())
        assert tensor.state is tensor.name.endswith("num_batches_tracked")
        assert tensor.identity is None
    found.close()


def test_tied_tensors_come_back_under_both_names(tmp_path: Path) -> None:
    model = _Tied()
    safetensors.torch.save_model(model, str(tmp_path / "x.safetensors"))
    tensors = {tensor.name: tensor for tensor in read(tmp_path / "x.safetensors").tensors()}
    assert set(tensors) == set(model.state_dict())
    assert tensors["head.weight"].identity == tensors["embed.weight"].identity is not None
    assert tensors["head.bias"].identity is None
    np.testing.assert_array_equal(tensors["head.weight"].data.read(), model.embed.weight.detach().numpy())


def test_shards_and_prefixes(tmp_path: Path) -> None:
    for shard, name in (("one", "module.a.weight"), ("two", "module.b.weight")):
        safetensors.numpy.save_file({name: np.ones((2, 3), np.float32)}, tmp_path / f"{shard}.safetensors")
    weight_map = {"module.b.weight": "two.safetensors", "module.a.weight": "one.safetensors"}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, tmp_path / "m.safetensors.index.json"):
        found = read(path)
        assert [layer.path for layer in found.layers] == ["b", "a"]
        assert [tensor.name for tensor in found.tensors()] == list(weight_map)
        assert "module." in found.notes[0]


def test_refuses(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({}, path)
    with pytest.raises(BadFile, match="no tensor"):
        read(path)
    with pytest.raises(WrongUsage, match="one set"):
        read(path, key="model")
    for framework in ("tf", "flax", "mlx"):
        safetensors.numpy.save_file({"a": np.ones(2)}, path, {"format": framework})
        with pytest.raises(Refused, match=f"layout of {framework}"):
            read(path)


def test_reading_imports_no_framework(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a.weight": np.ones((2, 3))}, tmp_path / "x.safetensors")
    code = (
        "import sys; from pathlib import Path; from neutral.exporters.safetensors import read\n"
        "assert [t.data.read().sum() for t in read(Path(sys.argv[1])).tensors()] == [6]\n"
        "assert not {'torch', 'tensorflow', 'keras', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.safetensors")], check=True)
