"""PyTorch's files and modules filled and built, and loaded back by torch itself."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neutral.errors import Refused, Unsupported
from neutral.exporters.torch import read, read_live
from neutral.importers.torch import build, fill, fill_live
from neutral.native import NativeModel, NativeTensor, Tensor, from_array
from neutral.schema.manifest import Manifest, Source

LEGACY = {"_use_new_zipfile_serialization": False}
MANIFEST = Manifest(source=Source(framework="keras", format="keras"), layers=(), weights_digest="0" * 64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 5))
        self.bn = nn.BatchNorm2d(4)
        self.rnn = nn.LSTM(4, 5, 2, bidirectional=True)
        self.attention = nn.MultiheadAttention(8, 2)
        self.out = nn.Linear(4, 2, dtype=torch.bfloat16)
        self.register_buffer("mask", torch.ones(7), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    module = Net()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(torch.randn(value.shape) if not name.endswith("tracked") else torch.tensor(seed))
    return module


def tensors_of(model: NativeModel) -> dict[str, Tensor]:
    return {tensor.name: tensor.data for tensor in model.tensors()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


@pytest.mark.parametrize("keywords", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_pickled_module_is_filled(keywords: dict[str, Any], tmp_path: Path) -> None:
    source, template = net(1), net(2)
    torch.save(template, tmp_path / "t.pt", **keywords)
    fill(tmp_path / "t.pt", tensors_of(read_live(source)), tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=False)
    assert_equal(back.state_dict(), source.state_dict())
    assert type(back) is Net and torch.equal(back.mask, template.mask)
    fill(tmp_path / "out.pt", tensors_of(read_live(template)), tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "t.pt").read_bytes()


def test_only_the_bytes_of_the_named_tensors_change(tmp_path: Path) -> None:
    source, template = net(1), net(2)
    optimizer = torch.optim.SGD(template.parameters(), momentum=0.9)
    template(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    torch.save({"model": template.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "t.ckpt")
    fill(tmp_path / "t.ckpt", {"conv.weight": tensors_of(read_live(source))["conv.weight"]}, tmp_path / "out.ckpt")
    with zipfile.ZipFile(tmp_path / "t.ckpt") as old, zipfile.ZipFile(tmp_path / "out.ckpt") as new:
        assert new.testzip() is None and old.namelist() == new.namelist()
        assert len([name for name in old.namelist() if old.read(name) != new.read(name)]) == 1
    back = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert torch.equal(back["model"]["conv.weight"], source.conv.weight)
    assert torch.equal(back["model"]["conv.bias"], template.conv.bias)
    assert torch.equal(
        back["optimizer"]["state"][0]["momentum_buffer"], optimizer.state_dict()["state"][0]["momentum_buffer"]
    )


def test_the_weight_set_is_known_by_the_key(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second, other = (dict(nn.Linear(2, n).state_dict()) for n in (3, 3, 3))
    torch.save({"model": first, "ema": second}, tmp_path / "t.pt")
    given = {k: from_array(v.numpy()) for k, v in other.items()}
    with pytest.raises(Refused, match="--key ema"):
        fill(tmp_path / "t.pt", given, tmp_path / "b.pt")
    fill(tmp_path / "t.pt", given, tmp_path / "b.pt", key="ema")
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert_equal(back["ema"], other)
    assert_equal(back["model"], first)


def test_a_set_that_shares_elements_with_another_is_not_filled(tmp_path: Path) -> None:
    """To replace one would change the other; a set within another is part of it."""
    shared, flat = torch.zeros(2, 3), torch.zeros(10)
    torch.save({"model": {"w": shared, "v": flat[:5]}, "ema": {"w": shared.t(), "v": flat[5:]}}, tmp_path / "t.pt")
    with pytest.raises(Refused, match=r"w: found elements that model\.w of another set has"):
        fill(tmp_path / "t.pt", {"w": from_array(np.ones((3, 2), np.float32))}, tmp_path / "o.pt", key="ema")
    fill(tmp_path / "t.pt", {"v": from_array(np.ones(5, np.float32))}, tmp_path / "o.pt", key="ema")
    back = torch.load(tmp_path / "o.pt", weights_only=True)
    assert back["ema"]["v"].all() and not back["model"]["v"].any()
    torch.save({"g": net(1), "d": net(2)}, tmp_path / "t.pt")
    inner = {"weight": from_array(np.ones((4, 3, 3, 5), np.float32))}
    fill(tmp_path / "t.pt", inner, tmp_path / "n.pt", key="g._modules.conv")
    back = torch.load(tmp_path / "n.pt", weights_only=False)
    assert back["g"].conv.weight.eq(1).all()
    assert_equal(back["d"].state_dict(), net(2).state_dict())


def test_what_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, 3), "b": torch.zeros(3)}, tmp_path / "t.pt")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"a": np.zeros((3, 2), np.float32)}, r"float32\[3, 2\].*float32\[2, 3\]"),
        ({"a": np.zeros((2, 3))}, "float64"),
        ({"c": np.zeros(3, np.float32), "d": np.zeros(3, np.float32)}, "c: .*; d: "),
    )
    for given, message in cases:
        with pytest.raises(Refused, match=message):
            fill(tmp_path / "t.pt", {k: from_array(v) for k, v in given.items()}, tmp_path / "out.pt")
    good = {"a": from_array(np.zeros((2, 3), np.float32))}
    with pytest.raises(Refused, match="itself"):
        fill(tmp_path / "t.pt", good, tmp_path / "t.pt", force=True)
    (tmp_path / "there.pt").write_bytes(b"mine")
    with pytest.raises(Refused, match="exists"):
        fill(tmp_path / "t.pt", good, tmp_path / "there.pt")
    assert (tmp_path / "there.pt").read_bytes() == b"mine"
    fill(tmp_path / "t.pt", good, tmp_path / "there.pt", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.pt", "there.pt"]


def test_a_live_module_is_filled_in_place() -> None:
    source, target = net(1), net(2)
    weight = target.conv.weight
    fill_live(target, tensors_of(read_live(source)))
    assert_equal(target.state_dict(), source.state_dict())
    assert target.conv.weight is weight and weight.requires_grad


def test_live_dtypes_of_one_byte_and_conjugated_buffers() -> None:
    source, target = nn.Module(), nn.Module()
    for module, value in ((source, 1.0), (target, 2.0)):
        module.register_buffer("eight", torch.full((3,), value).to(torch.float8_e5m2))
        module.register_buffer("scalar", torch.tensor(value, dtype=torch.bfloat16))
        module.register_buffer("conj", (torch.randn(3, dtype=torch.cfloat) * value).conj())
    fill_live(target, tensors_of(read_live(source)))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name].float() if name == "eight" else target.state_dict()[name],
                           value.float() if name == "eight" else value)  # fmt: skip


def test_a_live_module_is_not_filled_by_half() -> None:
    target = net(2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    zeros = from_array(np.zeros((4, 3, 3, 5), np.float32))
    wrong: tuple[dict[str, Tensor], ...] = (
        {"conv.weight": zeros, "conv.bias": from_array(np.zeros(5, np.float32))},
        {"conv.weight": zeros, "conv.bias": from_array(np.zeros(4, np.float64))},
        {"conv.weight": zeros, "nothing": zeros},
        {"conv.weight": zeros, "mask": from_array(np.zeros(7, np.float32))},
    )
    for given in wrong:
        with pytest.raises(Refused):
            fill_live(target, given)
    assert_equal(target.state_dict(), before)
    with pytest.raises(Refused, match="without elements"):
        fill_live(nn.LazyLinear(2), {"weight": zeros})


def test_live_ties_must_agree() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    one, other = np.eye(3, dtype=np.float32), np.ones((3, 3), np.float32)
    with pytest.raises(Refused, match="tied"):
        fill_live(module, {"0.weight": from_array(one), "1.weight": from_array(other)})
    fill_live(module, {"0.weight": from_array(one), "1.weight": from_array(one.copy())})
    assert torch.equal(module[1].weight, torch.eye(3))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_a_built_state_dict_loads_strictly(suffix: str, tmp_path: Path) -> None:
    source, target = net(1), net(2)
    out = tmp_path / f"out{suffix}"
    build(read_live(source), MANIFEST, out)
    assert_equal(torch.load(out, weights_only=True), source.state_dict())
    target.load_state_dict(torch.load(out, weights_only=True, mmap=True), strict=True)
    assert_equal(target.state_dict(), source.state_dict())
    with pytest.raises(Refused, match="exists"):
        build(read_live(source), MANIFEST, out)
    first = out.read_bytes()
    build(read(out), MANIFEST, tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == first


def test_built_ties_share_one_storage_and_counters_have_no_axes(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[1].weight = module[0].weight
    model = read_live(module)
    layers = list(model.layers)
    counted = dict(layers[2].tensors)
    counted["num_batches_tracked"] = NativeTensor(
        "2.num_batches_tracked", from_array(np.array([7], np.int32)), state=True
    )
    layers[2] = type(layers[2])(layers[2].path, layers[2].cls, counted)
    build(NativeModel("torch", "pt", tuple(layers)), MANIFEST, tmp_path / "x.pt")
    back = torch.load(tmp_path / "x.pt", weights_only=True)
    assert back["0.weight"].data_ptr() == back["1.weight"].data_ptr()
    counter = back["2.num_batches_tracked"]
    assert counter.dtype == torch.int64 and counter.shape == () and counter.item() == 7


def test_the_order_of_a_torch_source_is_given_back(tmp_path: Path) -> None:
    state = {"b.weight": torch.zeros(1), "a.weight": torch.ones(1), "b.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "x.pt")
    model = read(tmp_path / "x.pt")
    source = Source(framework="torch", format="pt", order=tuple(state))
    build(model, MANIFEST.model_copy(update={"source": source}), tmp_path / "y.pt")
    assert_equal(torch.load(tmp_path / "y.pt", weights_only=True), state)


def test_other_suffixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_live(nn.Linear(1, 1))
    with pytest.raises(Unsupported, match=r"\.pt2"):
        build(model, MANIFEST, tmp_path / "x.onnx")
    calls: list[Any] = []
    monkeypatch.setattr("neutral.importers.torch_export.export", lambda *given, **named: calls.append((given, named)))
    build(model, MANIFEST, tmp_path / "x.pt2", force=True)
    assert calls == [((model, MANIFEST, tmp_path / "x.pt2"), {"force": True})]
