"""The tables of torch and Keras against the documented layouts, written out in plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neutral.canon import read_layers
from neutral.canonical import CanonicalLayer
from neutral.conventions.forms import Convention
from neutral.conventions.keras import KERAS
from neutral.conventions.torch import TORCH
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array


def array(*shape: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def read(convention: Convention, cls: str, arrays: dict[str, np.ndarray], **config: Any) -> list[CanonicalLayer]:
    tensors = {name: NativeTensor(f"x.{name}", from_array(a)) for name, a in arrays.items()}
    model = NativeModel(convention.framework, "any", (NativeLayer("x", cls, tensors, config, "class"),))
    ((_, layers),) = read_layers(model, convention)
    return layers


def blocks(fused: np.ndarray, order: str, wanted: str) -> np.ndarray:
    """The gates of a fused first axis, one by one, in the order wanted."""
    pieces = dict(zip(order, np.split(fused, len(order)), strict=True))
    return np.stack([pieces[gate] for gate in wanted])


W, B = array(7, 3), array(7)
CASES: list[tuple[Convention, str, dict[str, np.ndarray], dict[str, Any], str, dict[str, np.ndarray]]] = [
    (TORCH, "Linear", {"weight": W, "bias": B}, {}, "dense", {"kernel": W, "bias": B}),
    (KERAS, "Dense", {"kernel": W.T, "bias": B}, {}, "dense", {"kernel": W, "bias": B}),
    (TORCH, "Conv2d", {"weight": array(4, 3, 2, 5)}, {"stride": 1, "groups": 1}, "conv", {"kernel": array(4, 3, 2, 5)}),
    (KERAS, "Conv2D", {"kernel": array(4, 3, 2, 5).transpose(2, 3, 1, 0)}, {}, "conv", {"kernel": array(4, 3, 2, 5)}),
    (KERAS, "Conv1D", {"kernel": array(4, 3, 2).transpose(2, 1, 0)}, {}, "conv", {"kernel": array(4, 3, 2)}),
    (
        KERAS,
        "Conv2DTranspose",
        {"kernel": array(4, 3, 2, 5).transpose(2, 3, 1, 0)},
        {},
        "conv_transpose",
        {"kernel": array(4, 3, 2, 5)},
    ),
    (TORCH, "ConvTranspose2d", {"weight": array(4, 3, 2, 5)}, {}, "conv_transpose", {"kernel": array(4, 3, 2, 5)}),
    (
        KERAS,
        "DepthwiseConv2D",
        {"kernel": array(2, 5, 3, 4)},
        {},
        "depthwise",
        {"kernel": np.stack([array(2, 5, 3, 4)[:, :, c, m] for c in range(3) for m in range(4)])[:, None]},
    ),
    (
        TORCH,
        "Conv2d",
        {"weight": array(12, 1, 2, 5)},
        {"stride": 1, "groups": 3},
        "depthwise",
        {"kernel": array(12, 1, 2, 5)},
    ),
    (KERAS, "Embedding", {"embeddings": W}, {}, "embedding", {"embedding": W}),
    (TORCH, "Embedding", {"weight": W}, {}, "embedding", {"embedding": W}),
    (
        KERAS,
        "LayerNormalization",
        {"gamma": array(2, 5, 3)},
        {},
        "layer_norm",
        {"scale": array(2, 5, 3).transpose(2, 0, 1)},
    ),
    (KERAS, "PReLU", {"alpha": array(1, 1, 3)}, {}, "prelu", {"slope": array(3)}),
    (KERAS, "PReLU", {"alpha": array(2, 5, 3)}, {}, "prelu", {"slope": array(2, 5, 3).transpose(2, 0, 1)}),
    (
        TORCH,
        "LSTM",
        {"weight_ih_l0": array(8, 3), "weight_hh_l0": array(8, 2), "bias_ih_l0": array(8), "bias_hh_l0": array(8, start=8)},
        {},
        "lstm",
        {
            "input_kernel": blocks(array(8, 3), "ifgo", "ifgo"),
            "recurrent_kernel": blocks(array(8, 2), "ifgo", "ifgo"),
            "bias": np.stack([array(8).reshape(4, 2), array(8, start=8).reshape(4, 2)]),
        },
    ),
    (
        KERAS,
        "LSTM",
        {"kernel": array(8, 3).T, "recurrent_kernel": array(8, 2).T, "bias": array(8)},
        {},
        "lstm",
        {
            "input_kernel": blocks(array(8, 3), "ifgo", "ifgo"),
            "recurrent_kernel": blocks(array(8, 2), "ifgo", "ifgo"),
            "bias": np.stack([array(8).reshape(4, 2), np.zeros((4, 2))]),
        },
    ),
    (
        TORCH,
        "GRU",
        {"weight_ih_l0": array(6, 3), "weight_hh_l0": array(6, 2)},
        {},
        "gru",
        {"input_kernel": blocks(array(6, 3), "rzn", "rzn"), "recurrent_kernel": blocks(array(6, 2), "rzn", "rzn")},
    ),
    (
        KERAS,
        "GRU",
        {"kernel": array(6, 3).T, "recurrent_kernel": array(6, 2).T, "bias": array(2, 6)},
        {},
        "gru",
        {
            "input_kernel": blocks(array(6, 3), "zrn", "rzn"),
            "recurrent_kernel": blocks(array(6, 2), "zrn", "rzn"),
            "bias": np.stack([blocks(array(2, 6)[side], "zrn", "rzn") for side in (0, 1)]),
        },
    ),
    (
        KERAS,
        "SimpleRNN",
        {
            f"{way}_layer/{name}": array(*shape, start=start)
            for way, start in (("forward", 0), ("backward", 50))
            for name, shape in (("kernel", (3, 2)), ("recurrent_kernel", (2, 2)))
        },
        {"bidirectional": True},
        "simple_rnn",
        {
            "input_kernel": np.stack([array(3, 2).T, array(3, 2, start=50).T]),
            "recurrent_kernel": np.stack([array(2, 2).T, array(2, 2, start=50).T]),
        },
    ),
    (
        TORCH,
        "MultiheadAttention",
        {"in_proj_weight": array(12, 4), "in_proj_bias": array(12), "out_proj.weight": array(4, 4)},
        {"num_heads": 2},
        "attention",
        {
            "query_kernel": array(12, 4)[:4],
            "key_kernel": array(12, 4)[4:8],
            "value_kernel": array(12, 4)[8:],
            "query_bias": array(12)[:4],
            "key_bias": array(12)[4:8],
            "value_bias": array(12)[8:],
            "output_kernel": array(4, 4),
        },
    ),
    (
        KERAS,
        "MultiHeadAttention",
        {
            "query/kernel": array(5, 2, 3),
            "key/kernel": array(6, 2, 3),
            "value/kernel": array(7, 2, 4),
            "attention_output/kernel": array(2, 4, 5),
            "query/bias": array(2, 3),
        },
        {},
        "attention",
        {
            "query_kernel": array(5, 6).T,
            "key_kernel": array(6, 6).T,
            "value_kernel": array(7, 8).T,
            "output_kernel": array(8, 5).T,
            "query_bias": array(6),
        },
    ),
    (
        KERAS,
        "EinsumDense",
        {"kernel": array(2, 3, 4), "bias": array(4)},
        {"equation": "abde,dec->abc".replace("c", "f"), "bias_axes": "f"},
        "dense",
        {"kernel": array(6, 4).T, "bias": array(4)},
    ),
    (TORCH, "Bilinear", {"weight": array(2, 3, 4)}, {}, "bilinear", {"kernel": array(2, 3, 4)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("convention", "cls", "arrays", "config", "kind", "wanted"),
    [pytest.param(*case, id=f"{i}-{case[0].framework}-{case[1]}") for i, case in enumerate(CASES)],
)
def test_layouts_are_those_that_are_documented(
    convention: Convention,
    cls: str,
    arrays: dict[str, np.ndarray],
    config: dict[str, Any],
    kind: str,
    wanted: dict[str, np.ndarray],
) -> None:
    (found,) = read(convention, cls, arrays, **config)
    assert found.kind == kind and found.evidence == "class" and found.tensors.keys() == wanted.keys()
    for role, expected in wanted.items():
        assert np.array_equal(found.tensors[role].data.read(), expected), role


def test_a_separable_convolution_is_two_layers() -> None:
    depthwise, pointwise = read(
        KERAS, "SeparableConv2D", {"depthwise_kernel": array(2, 5, 3, 2), "pointwise_kernel": array(1, 1, 6, 4), "bias": array(4)}
    )  # fmt: skip
    assert (depthwise.path, depthwise.part, pointwise.path, pointwise.part) == (
        "x.depthwise", "depthwise", "x.pointwise", "pointwise",
    )  # fmt: skip
    assert depthwise.tensors["kernel"].data.shape == (6, 1, 2, 5)
    assert np.array_equal(pointwise.tensors["kernel"].data.read(), array(6, 4).T[:, :, None, None])
    assert depthwise.tensors.keys() == {"kernel"} and pointwise.tensors.keys() == {"kernel", "bias"}


def test_a_stack_is_one_layer_per_level() -> None:
    arrays = {f"weight_{of}_l{level}{way}": array(4, 4 if (of, level) == ("hh", 0) or of == "hh" else 3 if level == 0 else 8, start=9 * level)
              for level in (0, 1) for way in ("", "_reverse") for of in ("ih", "hh")}  # fmt: skip
    layers = read(TORCH, "RNN", arrays)
    assert [(each.path, each.part) for each in layers] == [("x.0", "0"), ("x.1", "1")]
    for level, each in enumerate(layers):
        assert each.tensors["input_kernel"].axes == ("direction", "unit", "in")
        assert each.tensors["input_kernel"].labels == {"direction": ("forward", "backward")}
        for direction, way in enumerate(("", "_reverse")):
            expected = arrays[f"weight_ih_l{level}{way}"]
            assert np.array_equal(each.tensors["input_kernel"].data.read()[direction], expected)
