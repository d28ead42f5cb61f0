"""The sources of the golden archives: made of seeded numbers, without any framework.

python -m tests.golden.make     writes tests/golden/*.nwt anew
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from neutral.archive import Contents, write_archive
from neutral.canon import canonical_layers
from neutral.conventions.keras import KERAS
from neutral.conventions.torch import TORCH
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
from neutral.schema.graph import Graph, Node, Value
from neutral.schema.manifest import Source

HERE = Path(__file__).parent


def _tensor(seed: int, name: str, *shape: int, dtype: object = np.float32, tie: str | None = None) -> NativeTensor:
    """Small multiples of 1/8, which every dtype holds: no arithmetic of any machine is in them."""
    eighths = np.random.RandomState(seed).randint(-16, 17, shape)
    return NativeTensor(name, from_array((eighths / 8).astype(dtype)), tie)


def _layer(
    seed: int, path: str, cls: str | None, config: Mapping[str, object] | None = None, dtype: object = np.float32, **shapes: tuple[int, ...]
) -> NativeLayer:  # fmt: skip
    tensors = {
        local: _tensor(seed + i, f"{path}.{local}", *shape, dtype=dtype) for i, (local, shape) in enumerate(shapes.items())
    }  # fmt: skip
    return NativeLayer(path, cls, tensors, config or {}, "class" if cls else "none")


def _torch() -> Contents:
    gates = {"weight_ih_l0": (12, 4), "weight_hh_l0": (12, 3), "bias_ih_l0": (12,), "bias_hh_l0": (12,)}
    shared = _tensor(30, "embed.weight", 6, 4, tie="shared")
    counter = NativeTensor("norm.num_batches_tracked", from_array(np.array(5)), state=True)
    norm = _layer(
        20,
        "norm",
        "BatchNorm2d",
        {"eps": 1e-5, "momentum": 0.125},
        weight=(2,),
        bias=(2,),
        running_mean=(2,),
        running_var=(2,),
    )
    layers = (
        _layer(1, "conv", "Conv2d", {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}, weight=(2, 1, 2, 3), bias=(2,)),
        replace(norm, tensors={**norm.tensors, "num_batches_tracked": counter}),
        _layer(3, "fc", "Linear", dtype=np.float16, weight=(3, 12), bias=(3,)),
        NativeLayer("embed", "Embedding", {"weight": shared}, {}, "class"),
        NativeLayer("head", "Linear", {"weight": replace(shared, name="head.weight")}, {}, "class"),
        _layer(7, "lstm", "LSTM", **gates),
        _layer(40, "what", "my.Layer", dtype=ml_dtypes.bfloat16, some=(2, 2)),
    )  # fmt: skip
    model = NativeModel("torch", "pt", layers, splits={"fc": {"in": 2}, "head": {}})
    order = tuple(tensor.name for tensor in model.tensors())
    value = Value(axes=("batch", "channel", "height", "width"))
    node = Node(name="conv", op="Conv", layer="conv", inputs=("x",), outputs=("y",))
    return Contents(
        canonical_layers(model, TORCH),
        Source(framework="torch", format="pt", sha256="0" * 64, order=order),
        Graph(inputs=("x",), outputs=("y",), values={"x": value, "y": value}, nodes=(node,)),
        collections={"optimizer": (_tensor(50, "fc.weight/exp_avg", 3, 12),)},
        notes=("a note: größer",),
        created="2024-01-02T03:04:05Z",
    )


def _keras() -> Contents:
    gru = {"kernel": (4, 9), "recurrent_kernel": (3, 9), "bias": (2, 9)}
    attention = {
        "query/kernel": (4, 2, 3),
        "key/kernel": (4, 2, 3),
        "value/kernel": (4, 2, 3),
        "attention_output/kernel": (2, 3, 4),
    }
    layers = (
        _layer(1, "conv", "Conv2D", {"strides": [1, 1], "padding": "same", "groups": 1}, kernel=(3, 2, 1, 2), bias=(2,)),
        _layer(3, "fc", "Dense", {"activation": "relu"}, kernel=(12, 3), bias=(3,)),
        _layer(5, "gru", "GRU", {"units": 3, "reset_after": True}, **gru),
        _layer(8, "mha", "MultiHeadAttention", **attention),
        _layer(14, "sep", "SeparableConv1D", depthwise_kernel=(3, 2, 2), pointwise_kernel=(1, 4, 3)),
    )  # fmt: skip
    model = NativeModel("keras", "keras", layers, splits={"fc": {"in": 2}})
    order = tuple(tensor.name for tensor in model.tensors())
    return Contents(
        canonical_layers(model, KERAS), Source(framework="keras", format="keras", order=order), ordered=True
    )


def golden() -> Iterator[tuple[str, Contents]]:
    """The name and contents of each golden archive."""
    yield "torch.nwt", _torch()
    yield "keras.nwt", _keras()


if __name__ == "__main__":
    for name, contents in golden():
        write_archive(contents, HERE / name, force=True)
