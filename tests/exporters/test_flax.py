"""Sets of weights in a tree, the layers in one, and live objects."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx, serialization
from flax.core import freeze
from flax.training.train_state import TrainState

import neutral
from neutral.errors import BadFile, NeutralError, Refused
from neutral.exporters.flax import read, read_live
from neutral.frameworks import detect
from neutral.native import NativeModel

FC = {"kernel": np.arange(6, dtype="f4").reshape(2, 3), "bias": np.ones(3, "f4")}
BN = {"scale": np.ones(3, "f4"), "bias": np.zeros(3, "f4")}
STATISTICS = {"mean": np.zeros(3, "f4"), "var": np.ones(3, "f4")}


def saved(tree: dict[str, Any], folder: Path) -> Path:
    path = folder / "tree.msgpack"
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


def layers(model: NativeModel) -> dict[str, list[str]]:
    return {layer.path: sorted(layer.tensors) for layer in model.layers}


SETS: dict[str, tuple[dict[str, Any], dict[str, list[str]], list[str]]] = {
    "variables": (
        {"params": {"fc": FC, "bn": BN}, "batch_stats": {"bn": STATISTICS}},
        {"fc": ["bias", "kernel"], "bn": ["bias", "mean", "scale", "var"]},
        [],
    ),
    "parameters": ({"model": {"fc": FC}}, {"model.fc": ["bias", "kernel"]}, []),
    "statistics alone": ({"batch_stats": {"bn": STATISTICS}}, {"bn": ["mean", "var"]}, []),
    "a train state": (
        {"step": 3, "params": {"fc": FC}, "opt_state": {"0": {"mu": {"fc": FC}, "count": np.zeros(())}}},
        {"fc": ["bias", "kernel"]},
        ["opt_state"],
    ),
    "variables in a train state": (
        {"params": {"params": {"bn": BN}, "batch_stats": {"bn": STATISTICS}}, "opt_state": {"m": FC}},
        {"bn": ["bias", "mean", "scale", "var"]},
        ["opt_state"],
    ),
    "parameters beside an optimizer": (
        {"net": {"fc": FC}, "optimizer": {"mu": FC}, "step": np.zeros(())},
        {"net.fc": ["bias", "kernel"]},
        ["optimizer", "step"],
    ),
    "other collections": (
        {"params": {"fc": FC}, "cache": {"fc": {"index": np.zeros(())}}},
        {"fc": ["bias", "kernel"]},
        ["cache"],
    ),
    "a state of NNX": (
        {"fc": {name: {"value": a} for name, a in FC.items()}, "drop": {"rngs": {"count": {"value": np.zeros(())}}}},
        {"fc": ["bias", "kernel"], "drop.rngs": ["count"]},
        [],
    ),
    "some boxes of Linen": (
        {"params": {"fc": {"kernel": {"value": FC["kernel"]}, "bias": FC["bias"]}, "own": {"value": FC["bias"]}}},
        {"fc": ["bias", "kernel"], "own": ["value"]},
        [],
    ),
    "a list of layers": ({"layers": {"0": FC, "1": FC}}, {"layers.0": ["bias", "kernel"], "layers.1": ["bias", "kernel"]}, []),
    "one layer": (FC, {"": ["bias", "kernel"]}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_the_set_of_weights(name: str, tmp_path: Path) -> None:
    tree, found, beside = SETS[name]
    path = saved(tree, tmp_path)
    assert detect(path) == ("flax", "msgpack")
    model = read(path)
    assert layers(model) == found and sorted(model.collections) == sorted(beside)
    states = [t.name for t in model.tensors() if t.state]
    assert states == (["drop/rngs/count/value"] if name == "a state of NNX" else [])
    model.close()


SEVERAL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an average": ({"params": {"fc": FC}, "ema_params": {"fc": FC}}, ["params", "ema_params"]),
    "an average with statistics of its own": (
        {
            "params": {"bn": BN},
            "batch_stats": {"bn": STATISTICS},
            "ema_params": {"bn": BN},
            "ema_batch_stats": {"bn": {"mean": STATISTICS["mean"] + 7, "var": STATISTICS["var"]}},
        },
        ["params", "ema_params"],
    ),
    "two models": (
        {"generator": {"params": {"fc": FC}}, "discriminator": {"params": {"fc": FC}}, "step": np.zeros(())},
        ["generator.params", "discriminator.params"],
    ),
    "a bare average": ({"net": {"fc": FC}, "ema_net": {"fc": FC}}, ["net", "ema_net"]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_sets_are_never_chosen_in_silence(name: str, tmp_path: Path) -> None:
    tree, keys = SEVERAL[name]
    path = saved(tree, tmp_path)
    with pytest.raises(Refused, match="2 sets of weights") as caught:
        read(path)
    for key in keys:
        assert f"--key {key}" in str(caught.value)
        model = read(path, key=key)
        assert list(layers(model)) in (["fc"], ["bn"])
        assert all(t.name.startswith((key.replace(".", "/"), "batch_stats", "ema_b")) for t in model.tensors())
        if "statistics" in name:
            assert next(t for t in model.tensors() if "mean" in t.name).data.read()[0] == (7 if "ema" in key else 0)
        model.close()
    with pytest.raises(Refused, match=r"nothing under the key x.*one of: "):
        read(path, key="x")


def test_a_module_with_an_attribute_of_a_collections_name(tmp_path: Path) -> None:
    """It passes for a collection, and what lies beside it is at least named."""
    model = read(saved({"params": {"fc": FC}, "encoder": {"fc": FC}}, tmp_path))
    assert layers(model) == {"fc": ["bias", "kernel"]}
    assert model.notes == ("arrays beside the weights, left out: encoder",)
    model.close()
    model = read(saved({"norm": {"layer_instance": FC, "batch_stats": {"u": FC["bias"]}}, "fc": FC}, tmp_path))
    assert list(layers(model)) == ["fc", "norm.batch_stats", "norm.layer_instance"]
    model.close()


def test_a_flattened_tree(tmp_path: Path) -> None:
    for separator in "/,.":
        path = tmp_path / "flat.safetensors"
        names = {separator.join(("params", "fc", name)): a for name, a in FC.items()}
        safetensors.numpy.save_file(names, path)
        assert detect(path) == ("flax", "flax-safetensors")
        model = read(path)
        assert set(layers(model)["fc"]) == {"kernel", "bias"}
        assert {t.name for t in model.tensors()} == {"params/fc/kernel", "params/fc/bias"}
        model.close()
    safetensors.numpy.save_file({"fc.kernel": FC["kernel"]}, path)
    assert detect(path)[0] == "safetensors"
    safetensors.numpy.save_file({"fc.kernel": FC["kernel"]}, path, {"format": "flax"})
    assert detect(path)[0] == "flax"


def test_keys_with_separators_in_them(tmp_path: Path) -> None:
    model = read(saved({"params": {"a.b/c": FC, "~": FC}}, tmp_path))
    assert [t.name for t in model.tensors()][::2] == ["params/a.b~1c/bias", "params/~0/bias"]
    model.close()
    path = saved({"params": {"a.b": FC, "a": {"b": FC}}}, tmp_path)
    with pytest.raises(Refused, match="two layers of this path"):
        neutral.export_model(path)


def test_weight_norms_are_read_with_their_kernels(tmp_path: Path) -> None:
    class Net(nn.Module):
        def setup(self) -> None:
            self.inner = nn.WeightNorm(nn.Dense(3))

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.WeightNorm(nn.Dense(4))(self.inner(x))

    variables = nn.unbox(Net().init(jax.random.key(0), jnp.ones((1, 5))))
    model = read(saved(jax.tree.map(np.asarray, variables), tmp_path))
    names = layers(model)
    both = ["WeightNorm/scale", "bias", "kernel"]
    assert names == {"Dense_0": both, "inner.layer_instance": both}
    model.close()


@pytest.mark.parametrize("tree", [{"params": {}}, {"step": 3}, {"opt_state": {"0": np.zeros(3)}}])
def test_a_tree_without_weights(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no array that is a weight"):
        read(saved(tree, tmp_path))


def test_a_tree_without_an_end(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"kernel": np.zeros(3)}
    for _ in range(80):
        tree = {"a": tree}
    with pytest.raises(BadFile, match="levels"):
        read(saved(tree, tmp_path))


def test_a_wide_tree_is_read_in_no_time(tmp_path: Path) -> None:
    empty = np.zeros((1000, 0), "f4")
    wide = {"params": {str(i): {"kernel": empty, "bias": empty} for i in range(5_000)}}
    stack = {"params": {"ScanX_0": {f"Dense_{i}": {"kernel": np.zeros((1000, 0, 0), "f4")} for i in range(2_000)}}}
    for tree, count in ((wide, 5_000), (stack, 2_000)):
        path = saved(tree, tmp_path)
        started = time.monotonic()
        model = read(path)
        assert len(model.layers) == count and time.monotonic() - started < 10
        model.close()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a\nb\x1b[31m"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(NeutralError) as caught:
        neutral.convert(saved({"params": {name: {"gamma": FC["bias"]}}}, tmp_path), tmp_path / "out.pt")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


# Live objects


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.tied = self.blocks[0]
        self.up = nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=True, rngs=rngs)
        self.norm = nnx.BatchNorm(4, epsilon=1e-3, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.rnn = nnx.RNN(nnx.LSTMCell(4, 5, rngs=rngs))
        self.two = nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(4, 5, rngs=rngs)), nnx.RNN(nnx.GRUCell(4, 5, rngs=rngs)), rngs=rngs
        )
        self.other = nnx.RNN(nnx.SimpleCell(4, 5, residual=True, rngs=rngs))
        self.lora = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)


def test_a_live_module_tells_classes_and_settings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = read_live(Net(nnx.Rngs(0)))
    classes = {layer.path: layer.cls for layer in model.layers if not layer.path.endswith("rngs")}
    assert classes == {
        "blocks.0": "Linear",
        "blocks.1": "Linear",
        "up": "ConvTranspose",
        "norm": "BatchNorm",
        "rnn": "RNN",
        "two": "Bidirectional",
        "other": "RNN",
        "lora": "LoRALinear",
        "lora.lora": "LoRA",
    }
    with neutral.export_model(Net(nnx.Rngs(0))) as archive:
        kinds = {layer.path: layer.kind for layer in archive.manifest.layers if not layer.path.endswith("rngs")}
        assert kinds == {
            "blocks.0": "dense",
            "blocks.1": "dense",
            "up": "conv_transpose",
            "norm": "batch_norm",
            "rnn": "lstm",
            "two": "gru",
            "other": "unknown",
            "lora": "unknown",
            "lora.lora": "unknown",
        }


def test_a_class_of_a_users_own_passes_for_none() -> None:
    class Linear(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jnp.ones((3, 4)))

    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.fc = Linear()

    with neutral.export_model(Outer()) as archive:
        assert [(layer.kind, layer.native.rpartition(".")[2]) for layer in archive.manifest.layers] == [
            ("unknown", "Linear")
        ]


def test_live_trees() -> None:
    tree = {"params": {"fc": jax.tree.map(jnp.asarray, FC)}}
    state = TrainState.create(apply_fn=len, params=tree["params"], tx=optax.adam(1e-3))
    for live in (tree, freeze(tree), state, {"params": {"fc": FC}}, nnx.state(Net(nnx.Rngs(0)), nnx.Param)):
        found = layers(read_live(live))
        assert set(found.get("fc", found.get("blocks.0", ()))) == {"kernel", "bias"}
        with neutral.export_model(live) as archive:
            assert archive.manifest.source.framework == "flax"
    shared = jnp.ones((3, 3))
    with neutral.export_model({"a": {"kernel": shared}, "b": {"kernel": shared}}) as archive:
        assert [p.tied_to for layer in archive.manifest.layers for p in layer.parameters.values()] == [None, "a/kernel"]


def test_random_keys_are_left_out() -> None:
    model = read_live(Net(nnx.Rngs(0)))
    assert "PRNG keys" in model.notes[0]
    assert all(tensor.state == ("rngs" in tensor.name) for tensor in model.tensors())
