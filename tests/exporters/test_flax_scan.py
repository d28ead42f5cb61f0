"""Layers that nn.scan keeps in one: read one by one where it is certain which axis counts them, and put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import serialization

import neutral
from neutral.errors import Refused
from neutral.exporters.flax_scan import unstacked
from neutral.exporters.flax_tree import grouped
from neutral.native import NativeTensor, from_array

RNG = np.random.default_rng(1)
X = RNG.normal(size=(2, 5, 8)).astype("f4")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: None) -> Any:
        y = nn.Dense(6)(nn.LayerNorm()(x))
        y = nn.Dense(8)(y)
        return x + nn.MultiHeadDotProductAttention(num_heads=2)(y), None


class Stack(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scanned = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return scanned()(x, None)[0]


class Twin(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.LayerNorm_0 = torch.nn.LayerNorm(8, eps=1e-6)
        self.Dense_0 = torch.nn.Linear(8, 6)
        self.Dense_1 = torch.nn.Linear(6, 8)
        self.MultiHeadDotProductAttention_0 = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.Dense_1(self.Dense_0(self.LayerNorm_0(x)))
        out: torch.Tensor = x + self.MultiHeadDotProductAttention_0(y, y, y)[0]
        return out


def twins() -> torch.nn.Module:
    module = torch.nn.Module()
    module.ScanBlock_0 = torch.nn.Sequential(Twin(), Twin(), Twin())
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return module.eval()


def outputs(module: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(module.ScanBlock_0(torch.from_numpy(X)))


@pytest.mark.parametrize("axis", [0, 1])
def test_both_ways_and_back(axis: int, tmp_path: Path) -> None:
    model = Stack(axis)
    variables = jax.tree.map(
        lambda a: jnp.asarray(RNG.uniform(-0.5, 0.5, a.shape), "f4"), model.init(jax.random.key(0), X)
    )
    file, out = tmp_path / "m.msgpack", tmp_path / "out.msgpack"
    file.write_bytes(serialization.to_bytes(variables))
    module = twins()
    neutral.convert(file, into=module)
    assert np.allclose(outputs(module), np.asarray(model.apply(variables, X)), atol=1e-5)

    module = twins()
    neutral.convert(module, out, into=file)
    found = serialization.from_bytes(variables, out.read_bytes())
    assert np.allclose(outputs(module), np.asarray(model.apply(found, X)), atol=1e-5)
    neutral.convert(module, into=variables)
    assert np.allclose(outputs(module), np.asarray(model.apply(variables, X)), atol=1e-5)

    neutral.convert(file, tmp_path / "m.nwt")
    for name in ("again.msgpack", "again", "again.safetensors"):
        neutral.convert(tmp_path / "m.nwt", tmp_path / name, to="flax")
        with neutral.export_model(file) as one, neutral.export_model(tmp_path / name) as other:
            assert one.manifest.weights_digest == other.manifest.weights_digest
            assert [layer.path for layer in one.manifest.layers] == [layer.path for layer in other.manifest.layers]
    assert (tmp_path / "again.msgpack").read_bytes() == file.read_bytes()


def test_some_of_a_stack(tmp_path: Path) -> None:
    """What stays out keeps the template's elements."""
    file, out = tmp_path / "m.msgpack", tmp_path / "out.msgpack"
    kernel, bias = RNG.normal(size=(3, 2, 4)).astype("f4"), RNG.normal(size=(3, 4)).astype("f4")
    file.write_bytes(serialization.to_bytes({"params": {"ScanX_0": {"Dense_0": {"kernel": kernel, "bias": bias}}}}))
    module = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 4)})
    neutral.convert(
        module, out, into=file, mapping={"one": "ScanX_0.1.Dense_0"}, allow_missing=["ScanX_0.[02].*"], flatten={}
    )
    found = serialization.msgpack_restore(out.read_bytes())["params"]["ScanX_0"]["Dense_0"]
    assert np.array_equal(found["kernel"][1], module["one"].weight.detach().numpy().T)
    assert np.array_equal(found["kernel"][::2], kernel[::2]) and np.array_equal(found["bias"][::2], bias[::2])


STACKS: dict[str, tuple[dict[str, tuple[int, ...]], bool]] = {
    "axis 0": ({"ScanX_0/Dense_0/kernel": (3, 2, 4), "ScanX_0/Dense_0/bias": (3, 4)}, True),
    "axis 1": ({"ScanX_0/Dense_0/kernel": (2, 3, 4), "ScanX_0/Dense_0/bias": (4, 3)}, True),
    "axis -1": ({"ScanX_0/Dense_0/kernel": (2, 4, 3), "ScanX_0/Dense_0/bias": (4, 3)}, True),
    "inside": ({"net/ScanX_1/LayerNorm_0/scale": (3, 2), "net/ScanX_1/Dense_0/kernel": (3, 7, 5)}, True),
    "inside, either way": (
        {"net/ScanX_1/LayerNorm_0/scale": (3, 2), "net/ScanX_1/Dense_0/kernel": (3, 2, 5)},
        False,
    ),
    "all sizes equal": ({"ScanX_0/Dense_0/kernel": (4, 4, 4), "ScanX_0/Dense_0/bias": (4, 4)}, False),
    "a norm alone": ({"ScanX_0/LayerNorm_0/scale": (3, 2)}, False),
    "one set for all": ({"ScanX_0/Dense_0/kernel": (4, 4), "ScanX_0/Dense_0/bias": (4,)}, False),
    "names of a user's own": ({"ScanX_0/fc/kernel": (3, 2, 4), "ScanX_0/fc/bias": (3, 4)}, False),
    "no name of Flax": ({"layers/Dense_0/kernel": (3, 2, 4), "layers/Dense_0/bias": (3, 4)}, False),
    "sizes that differ": ({"ScanX_0/Dense_0/kernel": (3, 2, 4), "ScanX_0/Dense_1/kernel": (5, 2, 4)}, False),
    "an attention": (
        {
            f"ScanX_0/MultiHeadDotProductAttention_0/{part}/kernel": (3, 5, 2, 4) if part != "out" else (3, 2, 4, 5)
            for part in ("query", "key", "value", "out")
        },
        True,
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_split_only_where_its_axis_is_certain(name: str) -> None:
    shapes, split = STACKS[name]
    tensors = {tuple(n.split("/")): NativeTensor(n, from_array(np.zeros(s))) for n, s in shapes.items()}
    found = unstacked(tensors, grouped)
    assert len(found) == (3 * len(tensors) if split else len(tensors))
    assert split or list(found) == list(tensors)


def test_a_stack_that_is_not_split_is_refused_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "m.msgpack"
    kernel, bias = np.ones((4, 4, 4), "f4"), np.ones((4, 4), "f4")
    file.write_bytes(serialization.to_bytes({"params": {"ScanX_0": {"Dense_0": {"kernel": kernel, "bias": bias}}}}))
    with pytest.raises(Refused, match="of unknown kind"):
        neutral.convert(file, tmp_path / "x.pt")
