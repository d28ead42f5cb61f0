"""New files and copies are what Flax itself loads, in the tree of the source or in that of Linen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import torch
from flax import nnx, serialization, traverse_util
from flax.core import freeze
from flax.training.train_state import TrainState

import neutral
from neutral.errors import Refused, WrongUsage

RNG = np.random.default_rng(1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = x.mean(1)
        return nn.Dense(6, name="fc")(x)


class Twin(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).mean(2).transpose(1, 2))


X = RNG.normal(size=(2, 6, 7, 3)).astype("f4")


def filled(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(RNG.uniform(0.5, 1.5, a.shape), a.dtype), tree)


@pytest.fixture
def twin() -> Twin:
    module = Twin().eval()
    for tensor in (*module.parameters(), module.norm.running_mean, module.norm.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return module


def outputs(twin: Twin) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(twin(torch.from_numpy(X.transpose(0, 3, 1, 2))))


def variables() -> Any:
    return filled(Net().init(jax.random.key(0), X))


def test_a_new_file_is_what_linen_loads(twin: Twin, tmp_path: Path) -> None:
    target = variables()
    for name in ("new.msgpack", "new.safetensors", "new.orbax", "new"):
        out = tmp_path / name
        neutral.convert(twin, out, to="flax", flatten={})
        if out.is_dir():
            with neutral.export_model(out) as archive:
                assert archive.manifest.source.format == "orbax"
            continue
        if out.suffix == ".msgpack":
            found = serialization.from_bytes(target, out.read_bytes())
        else:
            found = traverse_util.unflatten_dict(safetensors.flax.load_file(out), sep=".")
        assert jax.tree.structure(found) == jax.tree.structure(target)
        assert np.allclose(np.asarray(Net().apply(found, X)), outputs(twin), atol=1e-4)


def test_a_copy_keeps_all_else(twin: Twin, tmp_path: Path) -> None:
    target = variables()
    state = TrainState.create(apply_fn=len, params=target["params"], tx=optax.adam(1e-3))
    tree = serialization.to_state_dict(state.replace(step=7, opt_state=filled(state.opt_state)))
    tree |= {"batch_stats": target["batch_stats"], "note": "kept"}
    (tmp_path / "t.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    neutral.convert(twin, tmp_path / "new.msgpack", into=tmp_path / "t.msgpack", flatten={})
    found = serialization.msgpack_restore((tmp_path / "new.msgpack").read_bytes())
    assert found["step"] == 7 and found["note"] == "kept"
    same = jax.tree.map(np.array_equal, found["opt_state"], jax.tree.map(np.asarray, tree["opt_state"]))
    assert all(jax.tree.leaves(same))
    new = {name: found[name] for name in ("params", "batch_stats")}
    assert np.allclose(np.asarray(Net().apply(new, X)), outputs(twin), atol=1e-4)


class Partitioned(nn.Module):
    """Arrays of which some say how they lie on several devices."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        laid = nn.with_partitioning(nn.initializers.lecun_normal(), ("x", None))
        return nn.Dense(5, name="two")(nn.Dense(6, kernel_init=laid, name="one")(x))


def test_boxed_arrays_are_read_and_filled(tmp_path: Path) -> None:
    target = filled(Partitioned().init(jax.random.key(0), X))
    assert isinstance(target["params"]["one"]["kernel"], nn.Partitioned)
    file, folder = tmp_path / "t.msgpack", tmp_path / "t"
    file.write_bytes(serialization.to_bytes(target))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, target)
    one, two = torch.nn.Linear(3, 6), torch.nn.Linear(6, 5)
    module = torch.nn.ModuleDict({"one": one, "two": two})
    for template in (file, folder):
        neutral.convert(module, tmp_path / f"new_{template.name}", into=template, flatten={})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "new_t", target)
    for new in (serialization.from_bytes(target, (tmp_path / "new_t.msgpack").read_bytes()), restored):
        with torch.no_grad():
            assert np.allclose(np.asarray(Partitioned().apply(new, X)), two(one(torch.from_numpy(X))), atol=1e-5)
    neutral.convert(file, into=module, flatten={})
    assert np.array_equal(one.weight.detach(), np.asarray(target["params"]["one"]["kernel"].value).T)


def test_a_copy_says_that_its_arrays_lie_otherwise(tmp_path: Path, twin: Twin) -> None:
    target = variables()
    for name, ocdbt in (("ocdbt", True), ("plain", False)):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
            checkpointer.save(tmp_path / name, args=ocp.args.PyTreeSave(target))
        report = neutral.convert(twin, tmp_path / f"new_{name}", into=tmp_path / name, flatten={})
        assert ("in an OCDBT" in " ".join(report.notes)) is ocdbt


def test_one_of_several_sets_is_filled(tmp_path: Path, twin: Twin) -> None:
    target = jax.tree.map(np.asarray, variables())
    tree = {"params": target["params"], "ema_params": target["params"], "batch_stats": target["batch_stats"]}
    path, out = tmp_path / "t.msgpack", tmp_path / "new.msgpack"
    path.write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(Refused, match="--into-key params, --into-key ema_params"):
        neutral.convert(twin, out, into=path, flatten={})
    neutral.convert(twin, out, into=path, into_key="ema_params", flatten={})
    found = serialization.msgpack_restore(out.read_bytes())
    assert np.array_equal(found["params"]["fc"]["kernel"], target["params"]["fc"]["kernel"])
    assert np.allclose(found["ema_params"]["fc"]["kernel"], twin.fc.weight.detach().numpy().T)
    neutral.convert(out, tmp_path / "x.nwt", key="ema_params")
    neutral.convert(tmp_path / "x.nwt", tmp_path / "chosen.msgpack", to="flax")
    assert set(serialization.msgpack_restore((tmp_path / "chosen.msgpack").read_bytes())) == {
        "ema_params",
        "batch_stats",
    }


def test_there_and_back_again(tmp_path: Path) -> None:
    """With what is no array, no weight, tied or empty."""
    shared = RNG.normal(size=(3, 4)).astype("f4")
    tree = {
        "params": {"a": {"kernel": shared}, "Dropout_0": {}, "b": {"embedding": shared.astype(jnp.bfloat16)}},
        "cache": {"index": np.int32(3)},
        "step": 3,
        "name": "x",
    }
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree))
    neutral.convert(tmp_path / "a.msgpack", tmp_path / "a.nwt")
    neutral.convert(tmp_path / "a.nwt", tmp_path / "b.msgpack", to="flax")
    assert (tmp_path / "a.msgpack").read_bytes() == (tmp_path / "b.msgpack").read_bytes()


REFUSED: list[tuple[torch.nn.Module, str]] = [
    (torch.nn.ConvTranspose2d(4, 4, 3, groups=2), "a transposed convolution of 2 groups"),
    (torch.nn.PReLU(3), "a PReLU with slopes"),
    (torch.nn.LSTM(3, 4, proj_size=2), "an LSTM with a projection"),
    (torch.nn.Bilinear(2, 3, 4), "bilinear layer"),
    (torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True), "an instance norm with running statistics"),
    (torch.nn.MultiheadAttention(4, 2, add_bias_kv=True), "attention with an extra key and value"),
    (torch.nn.RMSNorm((3, 4)), "an RMS norm over 2 axes"),
]


def test_a_tree_is_not_in_the_order_of_computation(tmp_path: Path) -> None:
    """Its keys are sorted; a weights file of Keras, whose layers are found by their place, would have them swapped."""
    fc = {"kernel": np.ones((4, 4), "f4"), "bias": np.zeros(4, "f4")}

    def convert(*names: str) -> None:
        (tmp_path / "m.msgpack").write_bytes(serialization.msgpack_serialize({"params": dict.fromkeys(names, fc)}))
        kinds = dict.fromkeys(names, "dense")
        neutral.convert(tmp_path / "m.msgpack", tmp_path / "x.weights.h5", kinds=kinds, flatten={}, force=True)

    convert("fc1", "fc2")
    convert("only")
    for names in (("hidden", "head"), ("fc1", "fc2", "fc10")):
        with pytest.raises(Refused, match="in the order of their names, expected the order in which they compute"):
            convert(*names)


@pytest.mark.parametrize(("module", "reason"), REFUSED)
def test_what_flax_does_not_have(module: torch.nn.Module, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=reason):
        neutral.convert(torch.nn.Sequential(module), tmp_path / "x.msgpack", to="flax")
    assert not list(tmp_path.iterdir())


def test_cells_without_biases_get_zeros(tmp_path: Path) -> None:
    for module, cell in (
        (torch.nn.LSTM(3, 4, bias=False, batch_first=True), nn.OptimizedLSTMCell(4)),
        (torch.nn.GRU(3, 4, bias=False, batch_first=True), nn.GRUCell(4)),
        (torch.nn.RNN(3, 4, bias=False, batch_first=True), nn.SimpleCell(4)),
    ):
        neutral.convert(torch.nn.ModuleDict({"rnn": module}), tmp_path / "x.msgpack", to="flax", force=True)
        params = serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())["params"]["rnn"]
        x = X[:, 0]
        expected = module(torch.from_numpy(x))[0].detach().numpy()
        assert np.allclose(np.asarray(nn.RNN(cell).apply({"params": params}, x)), expected, atol=1e-6)


def test_the_gru_of_nnx_takes_no_recurrent_bias_of_the_new_gate() -> None:
    source, target = torch.nn.GRU(3, 4, batch_first=True), nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))

    class Holder(nnx.Module):
        def __init__(self) -> None:
            self.rnn = target

    module = torch.nn.ModuleDict({"rnn": source})
    with pytest.raises(Refused, match="a recurrent bias of the new gate that is not zero"):
        neutral.convert(module, into=Holder())
    with torch.no_grad():
        source.bias_hh_l0[8:] = 0
    report = neutral.convert(module, into=Holder())
    assert report.losses == ("rnn: input and recurrent bias were added to one",)
    x = X[:, 0]
    assert np.allclose(np.asarray(target(x)), source(torch.from_numpy(x))[0].detach().numpy(), atol=1e-6)


def test_a_new_file_says_how_its_transposed_kernels_stand(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"up": torch.nn.ConvTranspose2d(4, 4, 3)})
    report = neutral.convert(module, tmp_path / "x.msgpack", to="flax")
    assert any("transpose_kernel=False" in note for note in report.notes)
    params = serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())["params"]["up"]
    x = X[..., :1].repeat(4, -1)
    found = nn.ConvTranspose(4, (3, 3), padding="VALID").apply({"params": params}, x)
    expected = module["up"](torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    assert np.allclose(np.asarray(found), expected, atol=1e-5)


# Live objects


def test_live_trees_are_set_in_place(twin: Twin) -> None:
    weight = twin.fc.weight.detach().numpy().T
    for live in (variables(), jax.tree.map(np.array, variables())):
        before = live["params"]["fc"]["kernel"]
        neutral.convert(twin, into=live, flatten={})
        after = live["params"]["fc"]["kernel"]
        assert np.array_equal(np.asarray(after), weight) and isinstance(after, type(before))
        assert np.allclose(np.asarray(Net().apply(live, X)), outputs(twin), atol=1e-4)


def test_live_trees_that_cannot_be_set(twin: Twin) -> None:
    frozen = freeze(variables())
    with pytest.raises(Refused, match="a FrozenDict, which cannot be changed"):
        neutral.convert(twin, into=frozen, flatten={})
    live = variables()
    live["params"]["fc"]["kernel"] = live["params"]["fc"]["kernel"].astype(jnp.bfloat16)
    before = jax.tree.map(np.asarray, live)
    with pytest.raises(Refused, match="--cast"):
        neutral.convert(twin, into=live, flatten={})
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, np.asarray(b)), before, live)))


def test_a_live_module_is_set_in_place() -> None:
    class Module(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0))])
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))

    one, other = Module(), Module()
    nnx.update(one, filled(nnx.state(one)))
    neutral.convert(one, into=other)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(one), nnx.state(other))
    assert all(jax.tree.leaves(same))
    assert type(nnx.state(other)["norm"]["mean"]) is nnx.BatchStat


def test_a_suffix_that_flax_does_not_write(twin: Twin, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match=r"a suffix that flax does not write, expected one of \.msgpack"):
        neutral.convert(twin, tmp_path / "x.h5", to="flax", flatten={})
