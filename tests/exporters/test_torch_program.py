"""Programs of torch.export: their weights read without torch, filled as a template, judged by torch."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import neutral
from neutral.errors import BadFile, NeutralError, Refused, Unsupported

IMAGES = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 3, 9, 8)).astype("float32"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))
        self.round = nn.Conv2d(5, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4, eps=0.03)
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7))
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.inner[0].weight
        self.rnn = nn.GRU(7, 4, batch_first=True)
        self.low = nn.Parameter(torch.zeros(7, 4, dtype=torch.bfloat16).t())
        self.register_buffer("shift", torch.ones(7), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.round(self.conv(x))).mean((2, 3))
        x = self.inner(x + self.tied(x)[:, :4]) + self.shift
        return self.rnn(x[:, None])[0] + self.low.float().sum()


def random_net(seed: int) -> Net:
    net = Net().eval()
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=made) + 0.1)
    return net


def program(path: Path, net: nn.Module) -> Path:
    torch.export.save(torch.export.export(net, (IMAGES,)), path)
    return path


def computed(path: Path) -> np.ndarray:
    found: np.ndarray = torch.export.load(path).module()(IMAGES).detach().numpy()
    return found


def test_every_tensor_under_its_name_with_ties_and_strides(tmp_path: Path) -> None:
    net = random_net(1)
    path = program(tmp_path / "net.pt2", net)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert neutral.convert(path, tmp_path / "again.pt").warnings == ()
    again, state = torch.load(tmp_path / "again.pt"), net.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in state)
    assert again["tied.weight"].data_ptr() == again["inner.0.weight"].data_ptr()


def test_classes_and_settings_that_the_operators_tell(tmp_path: Path) -> None:
    with neutral.export_model(program(tmp_path / "net.pt2", random_net(1))) as archive:
        layers = {layer.path: layer for layer in archive.manifest.layers}
    assert {path: layer.kind for path, layer in layers.items()} == {
        "": "unknown", "conv": "conv", "round": "conv", "norm": "batch_norm", "inner.0": "dense", "inner.2": "dense",
        "tied": "dense", "rnn": "gru",
    }  # fmt: skip
    conv: Any = layers["conv"]
    assert (conv.strides, conv.padding, conv.dilation) == ((2, 1), ((1, 1), (1, 1)), (1, 2))
    around: Any = layers["round"]
    assert around.padding is None and around.strides is None, "its padding is an operator of its own"
    norm: Any = layers["norm"]
    assert norm.eps == 0.03 and round(norm.decay, 6) == 0.9


def test_a_program_is_filled(tmp_path: Path) -> None:
    """From a state dict and from another program: the rest of the file stays, and torch computes the other's outputs."""
    wanted = program(tmp_path / "one.pt2", random_net(1))
    template = program(tmp_path / "two.pt2", random_net(2))
    torch.save(random_net(1).state_dict(), tmp_path / "one.pt")
    for source in ("one.pt2", "one.pt"):
        out = tmp_path / f"from_{source}.pt2"
        neutral.convert(tmp_path / source, out, into=template)
        np.testing.assert_array_equal(computed(out), computed(wanted))
        assert np.abs(computed(out) - computed(template)).max() > 1e-3
        with zipfile.ZipFile(out) as new, zipfile.ZipFile(template) as old:
            assert new.namelist() == old.namelist()
            assert all(new.read(n) == old.read(n) for n in new.namelist() if "/data/weights/weight_" not in n)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    template = program(tmp_path / "net.pt2", random_net(1))
    state = {name: tensor.clone() for name, tensor in random_net(2).state_dict().items()}
    state["tied.weight"] += 1
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(Refused, match="tied"):
        neutral.convert(tmp_path / "state.pt", tmp_path / "out.pt2", into=template)
    assert not (tmp_path / "out.pt2").exists()


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The program with another weights config."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("_weights_config.json"):
                told = json.loads(data)
                change(told["config"])
                data = json.dumps(told).encode()
            new.writestr(name, data)
    path.write_bytes(out.getvalue())
    return path


def payload(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["conv.weight"]
    return found


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], type[NeutralError]]] = {
    "a path that leads out": (lambda c: payload(c).update(path_name="../x"), BadFile),
    "an absolute path": (lambda c: payload(c).update(path_name="/etc/passwd"), BadFile),
    "a member that is not there": (lambda c: payload(c).update(path_name="weight_99"), BadFile),
    "a pickle": (lambda c: payload(c).update(use_pickle=True), Unsupported),
    "more elements than bytes": (lambda c: payload(c)["tensor_meta"].update(sizes=[{"as_int": 1 << 40}] * 4), BadFile),
    "an offset beyond the end": (
        lambda c: payload(c)["tensor_meta"].update(storage_offset={"as_int": 1 << 30}),
        BadFile,
    ),
    "a negative size": (lambda c: payload(c)["tensor_meta"]["sizes"][0].update(as_int=-5), BadFile),
    "a size that is a name": (lambda c: payload(c)["tensor_meta"]["sizes"].append({"as_expr": "s0"}), BadFile),
    "strides that go beyond": (lambda c: payload(c)["tensor_meta"]["strides"][0].update(as_int=1 << 40), BadFile),
    "stride nought, many elements": (
        lambda c: payload(c)["tensor_meta"].update(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}]),
        BadFile,
    ),
    "a dtype of nobody": (lambda c: payload(c)["tensor_meta"].update(dtype=99), Unsupported),
    "no meta": (lambda c: payload(c).pop("tensor_meta"), Unsupported),
    "a list for a payload": (lambda c: c.update({"conv.weight": []}), BadFile),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_forged_programs_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, error = HOSTILE[name]
    path = rewritten(program(tmp_path / "net.pt2", random_net(1)), change)
    with pytest.raises(error) as caught:
        neutral.export_model(path, tmp_path / "out.nwt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.nwt").exists()


def test_programs_of_before_torch_2_8_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as made:
        made.writestr("serialized_exported_program.json", "{}")
        made.writestr("serialized_state_dict.pt", b"")
    with pytest.raises(Unsupported, match=r"before torch 2\.8"):
        neutral.export_model(tmp_path / "old.pt2")
