"""Equinox's layers against torch's, both ways, by their outputs; live models are not changed, files come back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import neutral
from neutral.canon import canonical_layers
from neutral.conventions.equinox import EQUINOX
from neutral.conventions.equinox_model import checked
from neutral.errors import Refused, Unsupported
from neutral.exporters import equinox as reader
from neutral.importers import equinox as writer

KEYS = iter(jax.random.split(jax.random.key(0), 10_000))
RANDOM = np.random.default_rng(0)


def key() -> jax.Array:
    return next(KEYS)


def randomized(model: Any) -> Any:
    """The model with every array of floats random, variances above zero."""

    def fill(path: Any, leaf: Any) -> Any:
        if not eqx.is_inexact_array(leaf):
            return leaf
        values = RANDOM.normal(size=leaf.shape)
        variance = "<flat index" in jax.tree_util.keystr(path) and jax.tree_util.keystr(path).endswith("[1]")
        return jnp.asarray(np.abs(values) + 0.5 if variance else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, model)


def randomized_torch(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.randn(tensor.shape).abs() + 0.5 if name.endswith("var") else torch.randn(tensor.shape)
                )
    return module.eval()


def _vmapped(model: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.vmap(model)(jnp.asarray(x)))


def _torch_run(module: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()


def _floats(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype("f4")


def _sizes(*sizes: int, equal: bool) -> tuple[int, ...]:
    return (4,) * len(sizes) if equal else sizes


Case = tuple[Any, torch.nn.Module, np.ndarray]


def _linear(equal: bool) -> Case:
    i, o = _sizes(3, 5, equal=equal)
    return eqx.nn.Linear(i, o, key=key()), torch.nn.Linear(i, o), _floats(2, i)


def _linear_without_bias(equal: bool) -> Case:
    i, o = _sizes(3, 5, equal=equal)
    return eqx.nn.Linear(i, o, use_bias=False, key=key()), torch.nn.Linear(i, o, bias=False), _floats(2, i)


def _conv(rank: int, **options: Any) -> Callable[[bool], Case]:
    def case(equal: bool) -> Case:
        i, o = _sizes(6, 4, equal=equal)
        kernel = (3,) * rank if equal else (2, 3, 4)[:rank]
        ours = getattr(eqx.nn, f"Conv{rank}d")(i, o, kernel, key=key(), **options)
        theirs = getattr(torch.nn, f"Conv{rank}d")(i, o, kernel, **options)
        return ours, theirs, _floats(2, i, *(7, 8, 9)[:rank])

    return case


def _transposed(rank: int, **options: Any) -> Callable[[bool], Case]:
    def case(equal: bool) -> Case:
        i, o = _sizes(6, 4, equal=equal)
        kernel = (3,) * rank if equal else (2, 3, 4)[:rank]
        ours = getattr(eqx.nn, f"ConvTranspose{rank}d")(i, o, kernel, key=key(), **options)
        theirs = getattr(torch.nn, f"ConvTranspose{rank}d")(i, o, kernel, **options)
        return ours, theirs, _floats(2, i, *(5, 6, 7)[:rank])

    return case


def _embedding(equal: bool) -> Case:
    n, d = _sizes(7, 3, equal=equal)
    return eqx.nn.Embedding(n, d, key=key()), torch.nn.Embedding(n, d), RANDOM.integers(0, n, 5)


def _layer_norm(*shape: int) -> Callable[[bool], Case]:
    return lambda equal: (eqx.nn.LayerNorm(shape), torch.nn.LayerNorm(shape), _floats(2, *shape))


def _group_norm(equal: bool) -> Case:
    return eqx.nn.GroupNorm(2, 6), torch.nn.GroupNorm(2, 6), _floats(2, 6, 4, 5)


def _rms_norm(equal: bool) -> Case:
    return eqx.nn.RMSNorm(5, use_bias=False), torch.nn.RMSNorm(5, eps=1e-5), _floats(2, 5)


def _prelu(*shape: int) -> Callable[[bool], Case]:
    def case(equal: bool) -> Case:
        return eqx.nn.PReLU(jnp.ones(shape)), torch.nn.PReLU(shape[0] if shape else 1), _floats(2, 6, 4, 5)

    return case


def _sequential(equal: bool) -> Case:
    a, b, c = _sizes(3, 5, 2, equal=equal)
    ours = eqx.nn.Sequential(
        [
            eqx.nn.Linear(a, b, key=key()),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.LayerNorm(b),
            eqx.nn.Linear(b, c, key=key()),
        ]
    )
    theirs = torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.LayerNorm(b), torch.nn.Linear(b, c))
    return ours, theirs, _floats(2, a)


CASES: dict[str, Callable[[bool], Case]] = {
    "Linear": _linear,
    "Linear without bias": _linear_without_bias,
    "Conv1d": _conv(1, stride=2, padding=1),
    "Conv2d": _conv(2, padding=(1, 2), dilation=2),
    "Conv2d in groups": _conv(2, groups=2, stride=(1, 2)),
    "Conv2d without bias": _conv(2),
    "Conv3d": _conv(3, groups=2),
    "ConvTranspose1d": _transposed(1, stride=3, padding=1, output_padding=2),
    "ConvTranspose2d": _transposed(2, stride=2, padding=(1, 0), output_padding=1),
    "ConvTranspose2d dilated": _transposed(2, stride=2, dilation=2),
    "ConvTranspose2d in groups": _transposed(2, stride=2, groups=2),
    "ConvTranspose3d": _transposed(3, stride=2, padding=1, groups=2),
    "Embedding": _embedding,
    "LayerNorm": _layer_norm(5),
    "LayerNorm over two axes": _layer_norm(4, 5),
    "GroupNorm": _group_norm,
    "RMSNorm": _rms_norm,
    "PReLU": _prelu(),
    "PReLU per channel": _prelu(6, 1, 1),
    "Sequential": _sequential,
}
CASES["Conv2d without bias"] = lambda equal: (
    eqx.nn.Conv2d(3, 4, 3, use_bias=False, key=key()),
    torch.nn.Conv2d(3, 4, 3, bias=False),
    _floats(2, 3, 6, 7),
)

ALL = [
    pytest.param(*case, id=f"{case[0]}-{'equal' if case[1] else 'unequal'}")
    for case in itertools.product(CASES, (False, True))
]


@pytest.mark.parametrize(("name", "equal"), ALL)
def test_to_torch(name: str, equal: bool, tmp_path: Path) -> None:
    ours, theirs, x = CASES[name](equal)
    ours = randomized(ours)
    neutral.export_model(ours, tmp_path / "x.nwt").close()
    neutral.import_model(tmp_path / "x.nwt", into=randomized_torch(theirs))
    np.testing.assert_allclose(_torch_run(theirs, x), _vmapped(ours, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "equal"), ALL)
def test_from_torch(name: str, equal: bool, tmp_path: Path) -> None:
    ours, theirs, x = CASES[name](equal)
    theirs = randomized_torch(theirs)
    neutral.export_model(theirs, tmp_path / "x.nwt").close()
    before = [np.array(leaf) for leaf in jax.tree_util.tree_leaves(ours) if eqx.is_array(leaf)]
    filled: Any = neutral.import_model(tmp_path / "x.nwt", into=ours).model
    np.testing.assert_allclose(_vmapped(filled, x), _torch_run(theirs, x), rtol=1e-4, atol=1e-5)
    after = [leaf for leaf in jax.tree_util.tree_leaves(ours) if eqx.is_array(leaf)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), "the model given is not changed"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_cells(name: str, equal: bool, bias: bool, tmp_path: Path) -> None:
    i, u = _sizes(3, 5, equal=equal)
    ours = randomized(getattr(eqx.nn, name)(i, u, use_bias=bias, key=key()))
    theirs = randomized_torch(getattr(torch.nn, name)(i, u, bias=bias))
    x, h, c = _floats(i), _floats(u), _floats(u)
    state = (h, c) if name == "LSTMCell" else h
    torch_state = jax.tree.map(lambda a: torch.from_numpy(a)[None], state)

    def both(model: Any, module: torch.nn.Module) -> None:
        found = model(jnp.asarray(x), jax.tree.map(jnp.asarray, state))
        with torch.no_grad():
            meant = module(torch.from_numpy(x)[None], torch_state)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(meant), strict=True):
            np.testing.assert_allclose(a, b.numpy()[0], atol=1e-5)

    neutral.export_model(theirs, tmp_path / "torch.nwt").close()
    both(neutral.import_model(tmp_path / "torch.nwt", into=ours).model, theirs)
    neutral.export_model(ours, tmp_path / "equinox.nwt").close()
    neutral.import_model(tmp_path / "equinox.nwt", into=theirs)
    both(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_attention(bias: bool, tmp_path: Path) -> None:
    ways = {f"use_{part}_bias": bias for part in ("query", "key", "value", "output")}
    ours = randomized(eqx.nn.MultiheadAttention(2, 6, key=key(), **ways))
    theirs = randomized_torch(torch.nn.MultiheadAttention(6, 2, bias=bias, batch_first=True))
    q, k, v = _floats(3, 6), _floats(4, 6), _floats(4, 6)

    def both(model: Any) -> None:
        with torch.no_grad():
            meant, _ = theirs(*(torch.from_numpy(a)[None] for a in (q, k, v)))
        np.testing.assert_allclose(model(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)), meant.numpy()[0], atol=1e-4)

    neutral.export_model(theirs, tmp_path / "torch.nwt").close()
    both(neutral.import_model(tmp_path / "torch.nwt", into=ours).model)
    neutral.export_model(ours, tmp_path / "equinox.nwt").close()
    neutral.import_model(tmp_path / "equinox.nwt", into=theirs)
    both(ours)


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    rest: dict[str, Any]

    def __init__(self, mode: Any) -> None:
        self.conv = eqx.nn.Conv2d(3, 5, 3, key=key())
        self.norm = eqx.nn.BatchNorm(5, "batch", eps=1e-3, momentum=0.9, mode=mode)
        self.rest = {"drop": eqx.nn.Dropout(0.3)}

    def __call__(self, x: Any, state: Any) -> Any:
        x, state = self.norm(self.conv(x), state)
        return self.rest["drop"](x, inference=True), state


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.norm = torch.nn.BatchNorm2d(5, eps=1e-3, momentum=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def _run_net(net: Any, x: np.ndarray, *, train: bool = False) -> Any:
    model = net[0] if train else eqx.nn.inference_mode(net[0])
    out, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(jnp.asarray(x), net[1])
    return (net[0], state) if train else np.asarray(out)


@pytest.mark.parametrize("steps", [0, 3, 5000])
@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_batch_norm(mode: str, steps: int, tmp_path: Path) -> None:
    net = eqx.nn.make_with_state(Net)(mode)
    x = _floats(4, 3, 6, 7)
    if steps:
        for _ in range(3):
            net = _run_net(net, x + _floats(1), train=True)
    if steps > 3 and mode == "batch":
        net = eqx.tree_at(lambda pair: pair[1]._state["Net.norm.batch_counter"], net, jnp.asarray(steps))
    theirs = randomized_torch(TorchNet())
    if steps or mode == "batch":
        neutral.export_model(net, tmp_path / "x.nwt").close()
        neutral.import_model(tmp_path / "x.nwt", into=theirs)
        np.testing.assert_allclose(_torch_run(theirs, x), _run_net(net, x), rtol=1e-4, atol=1e-4)
    theirs = randomized_torch(theirs)
    neutral.export_model(theirs, tmp_path / "y.nwt").close()
    filled: Any = neutral.import_model(tmp_path / "y.nwt", into=net).model
    np.testing.assert_allclose(_run_net(filled, x), _torch_run(theirs, x), rtol=1e-4, atol=1e-5)
    # Training goes on from the statistics that were given.
    trained = _run_net(filled, x, train=True)
    theirs.train()
    with torch.no_grad():
        theirs.norm.momentum = 0.1
        theirs(torch.from_numpy(x))
    mean = theirs.norm.running_mean.numpy()
    index = "ema_state_index" if mode == "ema" else "batch_state_index"
    np.testing.assert_allclose(trained[1]._state[f"Net.norm.{index}"][0], mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inner", ["Linear", "Conv2d"])
@pytest.mark.parametrize("wrapper", ["WeightNorm", "SpectralNorm"])
def test_normalised_kernels(wrapper: str, inner: str, tmp_path: Path) -> None:
    layer = eqx.nn.Linear(3, 5, key=key()) if inner == "Linear" else eqx.nn.Conv2d(3, 5, 2, key=key())
    x = _floats(2, 3) if inner == "Linear" else _floats(2, 3, 6, 7)
    plain = torch.nn.Linear(3, 5) if inner == "Linear" else torch.nn.Conv2d(3, 5, 2)
    if wrapper == "WeightNorm":
        ours: Any = randomized(eqx.nn.WeightNorm(layer))
        meant = _vmapped(ours, x)
    else:
        ours, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(layer, "weight", inference=True, key=key())
        run = jax.vmap(lambda a: ours(a, state)[0])
        meant, ours = np.asarray(run(jnp.asarray(x))), (ours, state)
    neutral.export_model(ours, tmp_path / "x.nwt").close()
    neutral.import_model(tmp_path / "x.nwt", into=plain)
    np.testing.assert_allclose(_torch_run(plain, x), meant, rtol=1e-4, atol=1e-5)


def test_settings_are_compared(tmp_path: Path) -> None:
    neutral.export_model(torch.nn.LayerNorm(5, eps=1e-3), tmp_path / "x.nwt").close()
    with pytest.raises(Refused, match="eps"):
        neutral.import_model(tmp_path / "x.nwt", into=eqx.nn.LayerNorm(5))
    neutral.export_model(torch.nn.Conv2d(3, 4, 3, padding=1), tmp_path / "y.nwt").close()
    report = neutral.import_model(tmp_path / "y.nwt", into=eqx.nn.Conv2d(3, 4, 3, key=key()))
    assert any("padding" in warning for warning in report.warnings)
    with pytest.raises(Refused, match="strides"):
        neutral.import_model(tmp_path / "y.nwt", into=eqx.nn.Conv2d(3, 4, 3, 2, key=key()))


@pytest.mark.parametrize("padding", ["VALID", "SAME", "SAME_LOWER", ((1, 2), (0, 1))])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_what_paddings_mean(padding: Any, stride: int, dilation: int) -> None:
    """The settings that layers are compared by say what the layers compute."""
    layer = eqx.nn.Conv2d(2, 3, (2, 5), stride, padding, dilation, key=key())
    settings = _settings(layer)
    x = _floats(2, 11, 12)
    if isinstance(settings["padding"], str):
        assert stride > 1 and settings["padding"] == padding.lower()
    else:
        pads = [side for pair in reversed(settings["padding"]) for side in pair]
        padded = torch.nn.functional.pad(torch.from_numpy(x), pads)
        weight, bias = (torch.from_numpy(np.array(a)) for a in (layer.weight, layer.bias))
        meant = torch.nn.functional.conv2d(padded[None], weight, bias.flatten(), stride, 0, dilation)
        np.testing.assert_allclose(layer(jnp.asarray(x)), meant[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("padding", ["VALID", "SAME", "SAME_LOWER", ((1, 2), (0, 1)), 3])
@pytest.mark.parametrize(("stride", "extra", "dilation"), [(1, 0, 1), (2, 1, 1), (3, 2, 1), (3, 0, 2), (4, 2, 1)])
def test_what_paddings_of_transposed_convolutions_mean(padding: Any, stride: int, extra: int, dilation: int) -> None:
    ways = {"stride": stride, "padding": padding, "output_padding": extra, "dilation": dilation}
    layer = eqx.nn.ConvTranspose2d(2, 3, (2, 5), key=key(), **ways)
    settings = _settings(layer)
    x = _floats(2, 5, 6)
    weight = torch.from_numpy(np.flip(np.array(layer.weight), (2, 3)).swapaxes(0, 1).copy())
    bias = torch.from_numpy(np.array(layer.bias)).flatten()
    full = torch.nn.functional.conv_transpose2d(torch.from_numpy(x)[None], weight, None, stride, dilation=dilation)[0]
    (top, bottom), (left, right) = settings["padding"]
    below, beside = settings["output_padding"]
    cut = torch.nn.functional.pad(full, (-left, beside - right, -top, below - bottom)) + bias[:, None, None]
    np.testing.assert_allclose(layer(jnp.asarray(x)), cut.numpy(), atol=1e-4)


def _settings(layer: Any) -> dict[str, Any]:
    """The canonical attributes of a layer."""
    (found,) = canonical_layers(reader.read_live(layer), EQUINOX)
    return dict(found.attributes)


def test_an_rms_norm_with_a_bias_has_no_place_in_torch(tmp_path: Path) -> None:
    ours = randomized(eqx.nn.RMSNorm(5))
    neutral.export_model(ours, tmp_path / "x.nwt").close()
    with pytest.raises(Refused, match="bias"):
        neutral.import_model(tmp_path / "x.nwt", into=torch.nn.RMSNorm(5, eps=1e-5))
    neutral.export_model(eqx.nn.RMSNorm(5), tmp_path / "y.nwt").close()
    neutral.import_model(tmp_path / "y.nwt", into=torch.nn.RMSNorm(5, eps=1e-5))


def _models() -> list[Any]:
    return [
        randomized(eqx.nn.make_with_state(Net)("batch")),
        Net("ema"),
        eqx.nn.MLP(2, 3, 4, 2, activation=eqx.nn.PReLU(), key=key()),
        {
            "gru": eqx.nn.GRUCell(3, 4, key=key()),
            "b": [eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, key=key()), 0.5, None],
        },
        eqx.tree_at(lambda m: m.weight, eqx.nn.Linear(3, 4, key=key()), jnp.ones((4, 3), jnp.bfloat16)),
    ]


@pytest.mark.parametrize("number", range(5))
def test_files_come_back(number: int, tmp_path: Path) -> None:
    model = _models()[number]
    eqx.tree_serialise_leaves(tmp_path / "x.eqx", model)
    writer.save(model, tmp_path / "saved.eqx")
    assert (tmp_path / "saved.eqx").read_bytes() == (tmp_path / "x.eqx").read_bytes()
    neutral.export_model(tmp_path / "x.eqx", tmp_path / "x.nwt").close()
    neutral.import_model(tmp_path / "x.nwt", to="equinox", out=tmp_path / "y.eqx")
    assert (tmp_path / "y.eqx").read_bytes() == (tmp_path / "x.eqx").read_bytes()
    if isinstance(model, dict):
        return
    neutral.export_model(model, tmp_path / "live.nwt").close()
    neutral.import_model(tmp_path / "live.nwt", to="equinox", out=tmp_path / "z.eqx")
    assert (tmp_path / "z.eqx").read_bytes() == (tmp_path / "x.eqx").read_bytes()


def test_a_file_by_its_model(tmp_path: Path) -> None:
    model = eqx.nn.make_with_state(Net)("batch")
    saved = randomized(model)
    eqx.tree_serialise_leaves(tmp_path / "x.eqx", saved)
    for skeleton in (model, eqx.filter_eval_shape(lambda: model)):
        read, live = reader.read(tmp_path / "x.eqx", skeleton=skeleton), reader.read_live(saved)
        assert [(a.path, a.cls, list(a.tensors)) for a in read.layers] == [
            (b.path, b.cls, list(b.tensors)) for b in live.layers
        ]
        for one, two in zip(read.tensors(), live.tensors(), strict=True):
            np.testing.assert_array_equal(one.data.read(), two.data.read())
        read.close()
    with pytest.raises(Refused, match="leaves"):
        reader.read(tmp_path / "x.eqx", skeleton=eqx.nn.Linear(2, 2, key=key()))
    tensors = {tensor.name: tensor.data for tensor in reader.read_live(saved).tensors() if not tensor.state}
    eqx.tree_serialise_leaves(tmp_path / "fresh.eqx", model)
    writer.fill(tmp_path / "fresh.eqx", tensors, tmp_path / "new.eqx", skeleton=model)
    found = eqx.tree_deserialise_leaves(tmp_path / "new.eqx", model)
    meant = writer.fill_live(model, tensors)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(meant), strict=True):
        assert np.array_equal(one, two) if eqx.is_array(one) else one == two


def test_no_file_is_made_of_another_framework(tmp_path: Path) -> None:
    neutral.export_model(torch.nn.Linear(2, 3), tmp_path / "x.nwt").close()
    with pytest.raises(Unsupported, match="fill a live model"):
        neutral.import_model(tmp_path / "x.nwt", to="equinox", out=tmp_path / "y.eqx")
    assert not (tmp_path / "y.eqx").exists()


@jax.tree_util.register_pytree_node_class
class Box:
    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def tree_flatten(self) -> Any:
        return (self.inside,), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Any:
        return cls(*children)


class Linear(eqx.Module):
    """Somebody's own layer of a name that Equinox has, with a kernel the other way around."""

    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight


class Boxed(eqx.Module):
    box: Box
    linear: eqx.nn.Linear


def test_what_jax_alone_can_open_is_refused() -> None:
    model = Boxed(Box(jnp.ones(2)), eqx.nn.Linear(2, 2, key=key()))
    with pytest.raises(Refused, match="Box"):
        checked(model)


def test_ones_own_layer_is_not_taken_for_that_of_equinox() -> None:
    (layer,) = reader.read_live(Linear(jnp.ones((2, 2)))).layers
    assert layer.cls != "Linear" and layer.evidence == "none"

    class Mine(eqx.nn.Linear):
        pass

    (layer,) = reader.read_live(Mine(2, 2, key=key())).layers
    assert layer.cls == "Linear"


@pytest.mark.parametrize("model", _models()[:4], ids=range(4))
def test_the_walk_is_that_of_jax(model: Any) -> None:
    found = checked(model)
    assert all(a is b for a, b in zip(found.all, jax.tree_util.tree_leaves(model), strict=True))


def test_a_file_without_names_says_what_to_do_and_that_works(tmp_path: Path) -> None:
    """The advice, taken word for word."""
    model, twin, x = _mlp()
    file, out, torch_file, new = (tmp_path / name for name in ("m.eqx", "new.pt", "twin.pt", "new.eqx"))
    eqx.tree_serialise_leaves(file, model)
    torch.save(twin, torch_file)
    advice = r"neutral\.convert\(equinox\.tree_deserialise_leaves\(FILE, model\), OUT\)$"
    for into in (None, torch_file):
        with pytest.raises(Refused, match=advice):
            neutral.convert(file, out, into=into, flatten={})
    neutral.convert(eqx.tree_deserialise_leaves(file, model), out, into=torch_file, flatten={})
    loaded = torch.load(out, weights_only=False)
    assert np.allclose(loaded(torch.from_numpy(x)).detach(), jax.vmap(model)(x), atol=1e-5)

    with pytest.raises(
        Refused, match=r"into=model\)\.model, and save that with equinox\.tree_serialise_leaves\(OUT, model\)$"
    ):
        neutral.convert(torch_file, new, into=file, flatten={})
    filled = neutral.convert(torch_file, into=model, flatten={}).model
    eqx.tree_serialise_leaves(new, filled)
    again = eqx.tree_deserialise_leaves(new, model)
    assert np.allclose(twin(torch.from_numpy(x)).detach(), jax.vmap(again)(x), atol=1e-5)
    neutral.convert(file, tmp_path / "leaves.npz")


def _mlp() -> tuple[eqx.nn.MLP, torch.nn.Module, np.ndarray]:
    twin = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    return eqx.nn.MLP(3, 4, 5, 1, key=key()), twin, _floats(2, 3)


STACKED: dict[str, Callable[[jax.Array], Any]] = {
    "Linear": lambda key: eqx.nn.Linear(3, 5, use_bias=False, key=key),
    "Conv1d": lambda key: eqx.nn.Conv1d(3, 5, 2, use_bias=False, key=key),
    "ConvTranspose1d": lambda key: eqx.nn.ConvTranspose1d(4, 6, 2, groups=2, use_bias=False, key=key),
    "LayerNorm": lambda key: eqx.nn.LayerNorm(5),
    "RMSNorm": lambda key: eqx.nn.RMSNorm(5, use_bias=False),
    "GroupNorm": lambda key: eqx.nn.GroupNorm(2, 6),
    "WeightNorm": lambda key: eqx.nn.WeightNorm(eqx.nn.Conv1d(3, 5, 2, use_bias=False, key=key)),
    "GRUCell": lambda key: eqx.nn.GRUCell(3, 5, key=key),
    "Embedding": lambda key: eqx.nn.Embedding(3, 5, key=key),
}


@pytest.mark.parametrize("name", STACKED)
def test_layers_in_one_do_not_pass_for_a_layer_of_more_axes(name: str, tmp_path: Path) -> None:
    """A stack of Conv1d, as jax.lax.scan runs it, has the tensors of a Conv2d."""
    holder = eqx.nn.Sequential([eqx.filter_vmap(STACKED[name])(jax.random.split(key(), 6))])
    for kinds in (None, {"*": "conv"}):
        with pytest.raises(Refused, match=r"layers\.0: "):
            neutral.convert(holder, tmp_path / "x.pt", flatten={}, kinds=kinds)
    file = tmp_path / "m.nwt"
    neutral.convert(holder, file)
    neutral.import_model(file, to="equinox", out=tmp_path / "m.eqx")
    eqx.tree_serialise_leaves(tmp_path / "meant.eqx", holder)
    assert (tmp_path / "m.eqx").read_bytes() == (tmp_path / "meant.eqx").read_bytes()
