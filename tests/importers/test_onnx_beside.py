"""Images beside stored tensors, in exports of torch: what a Flatten behind them joins, judged by Keras."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

import neutral
from neutral.errors import Refused

L = keras.layers
SIZE = 4


class Net(nn.Module):
    """A convolution, something with a stored tensor, a Flatten, a dense layer."""

    def __init__(self, made: int, stored: tuple[int, ...], features: int, step: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, made, 3, padding=1)
        self.register_buffer("beside", torch.rand(stored) + 0.5)
        self.fc = nn.Linear(features, 5)
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.step(self.conv(x).relu(), self.beside).flatten(1))
        return out


def joined(x: Any, beside: Any) -> Any:
    return torch.cat([x, beside.expand(x.shape[0], -1, -1, -1)], 1)


def times(x: Any, beside: Any) -> Any:
    return x * beside


CASES = {
    "channels joined": (4, (1, 2, SIZE, SIZE), 6, joined),
    "one channel for all": (1, (1, 6, 1, 1), 6, times),
    "a factor per channel": (6, (6, 1, 1), 6, times),
    "a factor per pixel": (6, (SIZE, SIZE), 6, times),
    "one channel, all different": (1, (6, SIZE, SIZE), 6, times),
}

OPEN = {("channels joined", False)}
"""Exports that expand what is stored to the batch as they run, so that its sizes are not known and must be told."""


@pytest.mark.parametrize(("name", "dynamo"), [*((name, False) for name in CASES), ("channels joined", True)])
def test_channels_are_counted_with_what_is_stored(name: str, dynamo: bool, tmp_path: Path) -> None:
    made, stored, channels, step = CASES[name]
    torch.manual_seed(0)
    net = Net(made, stored, channels * SIZE * SIZE, step).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=dynamo)
    entry = keras.Input((SIZE, SIZE, 3))
    image = L.Conv2D(made, 3, padding="same", activation="relu", name="conv")(entry)
    spread = net.beside.reshape((1,) * (4 - net.beside.ndim) + tuple(net.beside.shape)).permute(0, 2, 3, 1).numpy()
    if step is joined:
        image = L.Lambda(lambda v: keras.ops.concatenate([v, keras.ops.repeat(spread, keras.ops.shape(v)[0], 0)], -1))(
            image
        )
    else:
        image = L.Lambda(lambda v: v * spread)(image)
    model = keras.Model(entry, L.Dense(5, name="fc")(L.Flatten()(image)))
    model.save_weights(tmp_path / "net.weights.h5")
    with neutral.export_model(tmp_path / "net.onnx") as archive:
        layers = {layer.path: layer for layer in archive.manifest.layers}
    is_open = (name, dynamo) in OPEN
    assert bool(layers["fc"].undecided) == is_open
    assert layers["fc"].channels == ({} if is_open else {"in": channels})
    unused = [path for path in layers if path not in ("conv", "fc")]
    neutral.convert(
        tmp_path / "net.onnx",
        tmp_path / "o.weights.h5",
        into=tmp_path / "net.weights.h5",
        allow_unused=unused,
        flatten={"fc": str(channels)} if is_open else None,
    )
    model.load_weights(tmp_path / "o.weights.h5")
    with torch.no_grad():
        expected = net(x).numpy()
    found = keras.ops.convert_to_numpy(model(x.permute(0, 2, 3, 1).numpy()))
    assert np.abs(found - expected).max() < 1e-5


def test_a_dense_layer_across_pixels_leaves_their_order_open(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Linear(SIZE, 2), nn.Flatten(), nn.Linear(6 * SIZE * 2, 5)).eval()
    torch.onnx.export(net, (torch.randn(2, 3, SIZE, SIZE),), tmp_path / "net.onnx", dynamo=False)
    with neutral.export_model(tmp_path / "net.onnx") as archive:
        assert [bool(layer.undecided) for layer in archive.manifest.layers if layer.parameters][-1]
    with pytest.raises(Refused, match="--flatten"):
        neutral.convert(tmp_path / "net.onnx", tmp_path / "o.msgpack", to="flax")
