"""Flax's table against the documented layouts, written out in plain numpy; and what its names and shapes do not tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neutral.canon import Known, deciding, native_tensors, read_layers, recognise, source_binding
from neutral.conventions.flax import FLAX, full_name
from neutral.errors import Refused
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(1)


def array(*shape: int) -> np.ndarray:
    return np.asarray(RNG.normal(size=shape), np.float32)


def bare(path: str, arrays: Arrays, cls: str | None = None, **config: Any) -> NativeLayer:
    tensors = {name: NativeTensor(f"{path}/{name}", from_array(a)) for name, a in arrays.items()}
    return NativeLayer(path, cls, tensors, config, "none" if cls is None else "class")


def read(layer: NativeLayer, hint: str | None = None) -> tuple[Known, str, Arrays]:
    """What is known of a layer, its kind, its canonical arrays; and there is a way back to the bit."""
    model = NativeModel("flax", "any", (layer,))
    ((known, found),) = read_layers(model, FLAX, kinds={layer.path: hint} if hint else None)
    (canonical,) = found
    if known.binding is not None:
        again = source_binding(found, FLAX, **deciding(known, FLAX))
        assert again is not None
        written = native_tensors(again, found, FLAX, where="")
        assert not written.problems and not written.losses
        for name, tensor in layer.tensors.items():
            assert np.array_equal(written.tensors[name].read(), tensor.data.read()), name
    return known, canonical.kind, {role: tensor.data.read() for role, tensor in canonical.tensors.items()}


K1, K2, K3 = array(5, 3, 7), array(5, 4, 3, 7), array(2, 5, 4, 3, 7)
B7 = array(7)
LSTM = {f"i{gate}/kernel": array(3, 4) for gate in "ifgo"} | {
    f"h{gate}/{name}": array(*shape) for gate in "ifgo" for name, shape in (("kernel", (4, 4)), ("bias", (4,)))
}
GRU = {
    **{f"i{gate}/{name}": array(*shape) for gate in "rzn" for name, shape in (("kernel", (3, 4)), ("bias", (4,)))},
    **{f"h{gate}/kernel": array(4, 4) for gate in "rzn"},
    "hn/bias": array(4),
}
FUSED_LSTM = {"dense_i/kernel": array(3, 16), "dense_h/kernel": array(4, 16), "dense_h/bias": array(16)}
FUSED_GRU = {"dense_i/kernel": array(3, 12), "dense_h/kernel": array(4, 12), "dense_i/bias": array(12)}
ATTENTION = {
    f"{part}/{name}": array(*shape)
    for part in ("query", "key", "value")
    for name, shape in (("kernel", (5, 2, 3)), ("bias", (2, 3)))
} | {"out/kernel": array(2, 3, 7), "out/bias": array(7)}


def gates(kernels: Arrays, names: str, side: str) -> np.ndarray:
    return np.stack([kernels[f"{side}{name}/kernel"].T for name in names])


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


NAMED: list[tuple[str, Arrays, str, Arrays]] = [
    ("Dense_0", {"kernel": K1[0], "bias": B7}, "dense", {"kernel": K1[0].T, "bias": B7}),
    ("Conv_0", {"kernel": K1, "bias": B7}, "conv", {"kernel": K1.transpose(2, 1, 0), "bias": B7}),
    ("Conv_11", {"kernel": K2}, "conv", {"kernel": K2.transpose(3, 2, 0, 1)}),
    ("a.Conv_0", {"kernel": K3}, "conv", {"kernel": K3.transpose(4, 3, 0, 1, 2)}),
    ("emb", {"embedding": K1[0]}, "embedding", {"embedding": K1[0]}),
    ("LayerNorm_0", {"scale": B7, "bias": B7}, "layer_norm", {"scale": B7, "bias": B7}),
    ("LayerNorm_1", {"scale": K1}, "layer_norm", {"scale": K1.transpose(2, 0, 1)}),
    ("RMSNorm_0", {"scale": B7}, "rms_norm", {"scale": B7}),
    ("GroupNorm_0", {"scale": B7, "bias": B7}, "group_norm", {"scale": B7, "bias": B7}),
    ("InstanceNorm_0", {"scale": B7, "bias": B7}, "instance_norm", {"scale": B7, "bias": B7}),
    ("norm", {"scale": B7, "bias": B7 + 1, "mean": B7 + 2, "var": B7 + 3}, "batch_norm",
     {"scale": B7, "bias": B7 + 1, "mean": B7 + 2, "variance": B7 + 3}),
    ("act", {"negative_slope": array()}, "prelu", {}),
    ("DenseGeneral_0", {"kernel": K1, "bias": K1[0]}, "dense", {"kernel": K1.reshape(5, 21).T, "bias": K1[0].reshape(21)}),
    ("DenseGeneral_0", {"kernel": K1, "bias": B7}, "dense", {"kernel": K1.reshape(15, 7).T, "bias": B7}),
    ("cell", LSTM, "lstm", {
        "input_kernel": gates(LSTM, "ifgo", "i"),
        "recurrent_kernel": gates(LSTM, "ifgo", "h"),
        "bias": np.stack([np.stack([LSTM[f"h{g}/bias"] for g in "ifgo"]), zeros(4, 4)]),
    }),
    ("cell", {name.replace("if/", "if_/"): a for name, a in LSTM.items()}, "lstm", {"input_kernel": gates(LSTM, "ifgo", "i")}),
    ("rnn", {f"cell/{name}": a for name, a in LSTM.items()}, "lstm", {"input_kernel": gates(LSTM, "ifgo", "i")}),
    ("cell", FUSED_LSTM, "lstm", {
        "input_kernel": FUSED_LSTM["dense_i/kernel"].T.reshape(4, 4, 3),
        "bias": np.stack([FUSED_LSTM["dense_h/bias"].reshape(4, 4), zeros(4, 4)]),
    }),
    ("cell", GRU, "gru", {
        "recurrent_kernel": gates(GRU, "rzn", "h"),
        "bias": np.stack([np.stack([GRU[f"i{g}/bias"] for g in "rzn"]), np.stack([zeros(4), zeros(4), GRU["hn/bias"]])]),
    }),
    ("cell", FUSED_GRU, "gru", {
        "recurrent_kernel": FUSED_GRU["dense_h/kernel"].T.reshape(3, 4, 4),
        "bias": np.stack([FUSED_GRU["dense_i/bias"].reshape(3, 4), zeros(3, 4)]),
    }),
    ("bi", {f"{way}_rnn/cell/{n}": a + i for i, way in enumerate(("forward", "backward")) for n, a in GRU.items()}, "gru", {
        "input_kernel": np.stack([gates(GRU, "rzn", "i"), gates({n: a + 1 for n, a in GRU.items()}, "rzn", "i")]),
    }),
    ("cell", {"i/kernel": array(3, 4), "i/bias": array(4), "h/kernel": array(4, 4)}, "simple_rnn", {}),
    ("cell", {"dense_i/kernel": array(3, 4), "dense_i/bias": array(4), "dense_h/kernel": array(4, 4)}, "simple_rnn", {}),
    ("mha", ATTENTION, "attention", {
        "query_kernel": ATTENTION["query/kernel"].reshape(5, 6).T,
        "value_bias": ATTENTION["value/bias"].reshape(6),
        "output_kernel": ATTENTION["out/kernel"].reshape(6, 7).T,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("path", "arrays", "kind", "expected"), NAMED, ids=[f"{n[0]}-{n[2]}" for n in NAMED])
def test_what_names_and_parts_tell(path: str, arrays: Arrays, kind: str, expected: Arrays) -> None:
    known, found, tensors = read(bare(path, arrays))
    assert found == kind and known.evidence == "name"
    for role, value in expected.items():
        assert np.array_equal(tensors[role], value), role


OPEN: list[tuple[str, Arrays, tuple[str, ...]]] = [
    ("fc", {"kernel": K1[0], "bias": B7}, ("dense", "einsum_dense")),
    ("fc", {"kernel": K1, "bias": B7}, ("dense", "conv", "conv_transpose", "einsum_dense")),
    ("up", {"kernel": K2}, ("conv", "conv_transpose", "einsum_dense")),
    ("ConvTranspose_0", {"kernel": K2}, ("conv_transpose",)),
    ("ConvTranspose_0", {"kernel": array(3, 4, 4), "bias": array(4)}, ("conv_transpose",)),
    ("norm", {"scale": B7, "bias": B7}, ("layer_norm", "group_norm", "instance_norm")),
    ("norm", {"scale": B7}, ("layer_norm", "group_norm", "instance_norm", "rms_norm")),
    ("proj", {"kernel": array(4, 4, 4), "bias": array(4, 4)}, ("einsum_dense",)),
    ("stacked", {"kernel": array(2, 4, 5), "bias": array(2, 5)}, ()),
    ("Einsum_0", {"kernel": K1, "bias": K1[0]}, ("dense", "einsum_dense")),
    ("other", {"kernel": K1, "gamma": B7}, ()),
    ("Dense_0", {"kernel": array(4, 4), "WeightNorm/scale": array(4)}, ("dense",)),
]


@pytest.mark.parametrize(("path", "arrays", "candidates"), OPEN)
def test_what_is_left_open(path: str, arrays: Arrays, candidates: tuple[str, ...]) -> None:
    """A kernel may be that of an Einsum, whose equation no file has; a square one stands either way round."""
    known = recognise(bare(path, arrays), FLAX)
    if path == "stacked":
        assert known.binding is None
        return
    assert known.binding is None and known.candidates == candidates


def test_the_bias_tells_how_a_transposed_kernel_stands() -> None:
    kernel = array(3, 4, 2, 5)
    for bias, expected in ((5, kernel[::-1, ::-1].transpose(2, 3, 0, 1)), (2, kernel.transpose(3, 2, 0, 1))):
        _, kind, tensors = read(bare("ConvTranspose_0", {"kernel": kernel, "bias": array(bias)}))
        assert kind == "conv_transpose" and np.array_equal(tensors["kernel"], expected)


HINTS: list[tuple[Arrays, str, str, np.ndarray]] = [
    ({"kernel": K1[0]}, "dense", "dense", K1[0].T),
    ({"kernel": K2}, "conv_transpose(transpose_kernel=false)", "conv_transpose", K2[::-1, ::-1].transpose(2, 3, 0, 1)),
    ({"kernel": K2}, "conv_transpose(transpose_kernel=true)", "conv_transpose", K2.transpose(3, 2, 0, 1)),
    ({"kernel": K1}, "conv", "conv", K1.transpose(2, 1, 0)),
    ({"kernel": K1}, "einsum_dense(equation=bsd,hdk->bshk)", "dense", K1.transpose(0, 2, 1).reshape(35, 3)),
    ({"kernel": K1}, "einsum_dense(equation=bsd,dhk->hbsk)", "einsum_dense", K1.transpose(1, 2, 0)),
    ({"kernel": K1}, "einsum_dense(equation=abc,cde->abde)", "dense", K1.reshape(5, 21).T),
    ({"kernel": K1}, "einsum_dense(equation=bsd,hkd->bshk)", "dense", K1.reshape(15, 7)),
]


@pytest.mark.parametrize(("arrays", "hint", "kind", "kernel"), HINTS)
def test_what_a_hint_tells(arrays: Arrays, hint: str, kind: str, kernel: np.ndarray) -> None:
    known, found, tensors = read(bare("x", arrays), hint)
    assert (found, known.evidence) == (kind, "hint") and np.array_equal(tensors["kernel"], kernel)


@pytest.mark.parametrize(
    ("arrays", "hint", "message"),
    [
        ({"kernel": K2}, "conv_transpose", r"'x=conv_transpose\(transpose_kernel=false\)' or --kind 'x=conv_trans"),
        ({"kernel": K1}, "einsum_dense", r"'x=einsum_dense\(equation=EQUATION\)'"),
        ({"kernel": K2, "bias": B7}, "conv_transpose(transpose_kernel=true)", "with transpose_kernel=True"),
        ({"kernel": K2}, "conv(groups=3)", "the setting groups in a hint"),
        ({"kernel": array(4, 4), "WeightNorm/scale": array(4)}, "dense", r"feature_axes=-1\)' or .*feature_axes=-2"),
    ],
)
def test_hints_that_do_not_tell_enough_or_contradict(arrays: Arrays, hint: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        read(bare("x", arrays), hint)


@pytest.mark.parametrize("axis", [-1, -2, None])
def test_weight_norm(axis: int | None) -> None:
    kernel = array(3, 5, 7)
    scale = array() if axis is None else array(kernel.shape[axis])
    _, kind, tensors = read(bare("Conv_0", {"kernel": kernel, "WeightNorm/scale": scale}))
    shape = {None: (), -1: (7, 1, 1), -2: (1, 5, 1)}[axis]
    assert kind == "conv" and np.array_equal(tensors["kernel_direction"], kernel.transpose(2, 1, 0))
    assert np.array_equal(tensors["kernel_magnitude"], scale.reshape(shape))


SETTINGS: list[tuple[str, Arrays, dict[str, Any], dict[str, Any]]] = [
    ("Conv", {"kernel": K2}, {"padding": "SAME", "strides": 1}, {"padding": ((2, 2), (1, 2)), "strides": (1, 1)}),
    ("Conv", {"kernel": K2}, {"padding": "SAME", "strides": 2}, {"padding": "same"}),
    ("Conv", {"kernel": K2}, {"padding": "VALID"}, {"padding": ((0, 0), (0, 0)), "groups": 1}),
    ("Conv", {"kernel": K1}, {"padding": "CAUSAL", "kernel_dilation": 2}, {"padding": ((8, 0),), "dilation": (2,)}),
    ("Conv", {"kernel": K1}, {"padding": "CIRCULAR"}, {"padding": ((2, 2),), "padding_mode": "circular"}),
    ("Conv", {"kernel": K2}, {"padding": ((1, 2), 3)}, {"padding": ((1, 2), (3, 3))}),
    ("Conv", {"kernel": K2}, {"padding": 1}, {"padding": ((1, 1), (1, 1))}),
    ("ConvTranspose", {"kernel": K1}, {"padding": "VALID", "strides": 2, "transpose_kernel": True}, {"padding": ((0, 0),)}),
    ("ConvTranspose", {"kernel": K1}, {"padding": ((3, 5),), "strides": 2, "transpose_kernel": False},
     {"padding": ((1, 0),), "output_padding": (1,)}),
    ("BatchNorm", {"mean": B7, "var": B7}, {"epsilon": 1e-3, "momentum": 0.9, "axis": -1}, {"eps": 1e-3, "decay": 0.9}),
    ("GroupNorm", {"scale": B7}, {"epsilon": 1e-6, "num_groups": 7}, {"eps": 1e-6}),
    ("LayerNorm", {"scale": B7}, {"epsilon": 1e-6, "feature_axes": -1}, {"normalized_axes": 1}),
    ("GRUCell", FUSED_GRU, {"gate_fn": "sigmoid", "activation_fn": "tanh"}, {"recurrent_activation": "sigmoid"}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "arrays", "config", "attributes"), SETTINGS)
def test_what_settings_mean(cls: str, arrays: Arrays, config: dict[str, Any], attributes: dict[str, Any]) -> None:
    model = NativeModel("flax", "any", (bare("x", arrays, cls, **config),))
    ((_, (layer,)),) = read_layers(model, FLAX)
    assert layer.kind != "unknown" and {name: layer.attributes.get(name) for name in attributes} == attributes


@pytest.mark.parametrize(
    ("cls", "arrays", "config"),
    [
        ("SimpleCell", {"i/kernel": array(3, 4), "i/bias": array(4), "h/kernel": array(4, 4)}, {"residual": True}),
        ("Conv", {"kernel": K2}, {"padding": "VALID", "input_dilation": (2, 2)}),
        ("Conv", {"kernel": K2}, {"padding": "VALID", "masked": True}),
        ("LinearGeneral", {"kernel": K1, "bias": K1[:, 0]}, {"features": (7,), "axis": (-1,), "batch_axis": True}),
        ("my.Linear", {"kernel": K1[0]}, {}),
    ],
)
def test_layers_that_compute_something_else_are_of_no_kind(cls: str, arrays: Arrays, config: dict[str, Any]) -> None:
    assert recognise(bare("x", arrays, cls, **config), FLAX).binding is None


def test_full_names_tell_their_keys() -> None:
    from neutral.importers.flax import place_of

    for place in (("a", "b/c", "~1"), ("a/b", "c"), ("x",), ("", "~"), ("~0/", "/")):
        assert place_of(full_name(place)) == place
