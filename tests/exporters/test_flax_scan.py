"""Layers that nn.scan keeps in one: read one by one where it is certain which axis counts them, and put together again."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, serialization

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
    named: str | None = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scanned = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return scanned(name=self.named)(x, None)[0]


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


def twins(name: str) -> torch.nn.Module:
    module = torch.nn.Sequential(OrderedDict([(name, torch.nn.Sequential(Twin(), Twin(), Twin()))]))
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return module.eval()


def outputs(module: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(module(torch.from_numpy(X)))


@pytest.mark.parametrize(("axis", "named"), [(0, None), (1, None), (0, "blocks")])
def test_both_ways_and_back(axis: int, named: str | None, tmp_path: Path) -> None:
    model, name = Stack(axis, named), named or "ScanBlock_0"
    variables = jax.tree.map(
        lambda a: jnp.asarray(RNG.uniform(-0.5, 0.5, a.shape), "f4"), model.init(jax.random.key(0), X)
    )
    file, out = tmp_path / "m.msgpack", tmp_path / "out.msgpack"
    file.write_bytes(serialization.to_bytes(variables))
    module = twins(name)
    neutral.convert(file, into=module)
    assert np.allclose(outputs(module), np.asarray(model.apply(variables, X)), atol=1e-5)

    module = twins(name)
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


class Own(nnx.Module):
    """A block of NNX, every size another."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)
        self.conv = nnx.Conv(8, 6, (3,), padding=1, use_bias=False, rngs=rngs)
        self.back = nnx.Linear(6, 8, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.back(self.conv(self.norm(x)))


class OfNnx(nnx.Module):
    """As NNX keeps its layers: made by nnx.vmap, run by nnx.scan; one of them a layer itself."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.vmap(Own)(rngs.split(3))
        self.norms = nnx.vmap(lambda rngs: nnx.RMSNorm(8, rngs=rngs))(rngs.split(2))

    def __call__(self, x: Any) -> Any:
        for stack in (self.blocks, self.norms):
            x = nnx.scan(lambda x, one: one(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)
        return x


class OwnTwin(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.conv = torch.nn.Conv1d(8, 6, 3, padding=1, bias=False)
        self.back = torch.nn.Linear(6, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.back(self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2))
        return out


def test_stacks_of_a_live_model_of_nnx(tmp_path: Path) -> None:
    model = OfNnx(nnx.Rngs(0))
    nnx.update(
        model,
        jax.tree.map(lambda a: jnp.asarray(RNG.uniform(-0.5, 0.5, a.shape), a.dtype), nnx.state(model, nnx.Param)),
    )
    norms = [torch.nn.RMSNorm(8, eps=1e-6) for _ in range(2)]
    module = torch.nn.Sequential(
        OrderedDict(blocks=torch.nn.Sequential(*(OwnTwin() for _ in range(3))), norms=torch.nn.Sequential(*norms))
    )
    neutral.convert(model, into=module, flatten={})
    assert np.allclose(outputs(module), np.asarray(model(X)), atol=1e-5)
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    neutral.convert(module, into=model, flatten={})
    assert np.allclose(outputs(module), np.asarray(model(X)), atol=1e-5)


def test_a_stack_of_nnx_whose_axis_is_not_certain_is_no_layer(tmp_path: Path) -> None:
    """A kernel of 4 by 4 by 4 by 4 passes for that of a convolution of two dimensions."""
    convs = nnx.vmap(lambda rngs: nnx.Conv(4, 4, (4,), use_bias=False, rngs=rngs))(nnx.Rngs(0).split(4))
    with pytest.raises(Refused, match="of unknown kind"):
        neutral.convert(convs, tmp_path / "x.pt")


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


STACKS: dict[str, tuple[dict[str, tuple[int, ...]], bool | None]] = {
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
    "a name of a user's own": ({"layers/Dense_0/kernel": (3, 2, 4), "layers/Dense_0/bias": (3, 4)}, True),
    "a name, beside others": (
        {"layers/Dense_0/kernel": (3, 7, 4), "layers/LayerNorm_0/scale": (3, 2), "Dense_0/kernel": (4, 5)},
        None,
    ),
    "no name of Flax": ({"layers/fc/kernel": (3, 2, 4), "layers/fc/bias": (3, 4)}, False),
    "a class of a user's own": ({"net/Dense_0/w": (3, 2, 4), "net/LayerNorm_0/scale": (3, 2)}, False),
    "a class of a user's own, beside Flax's": ({"net/Dense_0/w": (4, 4), "net/Dense_1/kernel": (4, 4)}, False),
    "one layer of it all": ({"VmapDense_0/kernel": (3, 2, 4), "VmapDense_0/bias": (3, 4)}, True),
    "a whole model": ({"Dense_0/kernel": (3, 2, 4), "Dense_1/kernel": (3, 4, 5), "Dense_1/bias": (3, 5)}, True),
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
    if split is None:
        assert {".".join(path[:-1]) for path in found} == {
            "Dense_0",
            *(f"layers.{i}.{name}" for i in range(3) for name in ("Dense_0", "LayerNorm_0")),
        }
        return
    assert len(found) == (3 * len(tensors) if split else len(tensors))
    assert split or list(found) == list(tensors)


def test_a_stack_that_is_not_split_is_refused_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "m.msgpack"
    kernel, bias = np.ones((4, 4, 4), "f4"), np.ones((4, 4), "f4")
    file.write_bytes(serialization.to_bytes({"params": {"ScanX_0": {"Dense_0": {"kernel": kernel, "bias": bias}}}}))
    with pytest.raises(Refused, match="of unknown kind"):
        neutral.convert(file, tmp_path / "x.pt")
