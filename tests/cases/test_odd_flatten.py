"""A Flatten behind a layer that leaves open which axis holds the channels: asked for, never taken to be the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

import neutral
from tests.cases import models as m

L = keras.layers


def saved(folder: Path, shape: tuple[int, ...], *layers: Any) -> tuple[Any, Path]:
    model = m.randomized_keras(keras.Sequential([keras.Input(shape), *layers, L.Dense(4, name="fc")]), 0)
    model.save(folder / "a.keras")
    return model, folder / "a.keras"


def template(folder: Path, norm: nn.Module, size: int) -> Path:
    torch.save(nn.Sequential(norm, nn.Flatten(), nn.Linear(size, 4)).eval(), folder / "t.pt")
    return folder / "t.pt"


def differs(model: Any, torch_file: Path, x: np.ndarray, given: np.ndarray) -> float:
    found = torch.load(torch_file, weights_only=False)(torch.tensor(given)).detach().numpy()
    return float(np.abs(model.predict(x, verbose=0) - found).max())


@pytest.mark.parametrize("norm", [L.BatchNormalization, L.UnitNormalization])
def test_a_norm_over_axis_1(norm: Any, tmp_path: Path) -> None:
    front = () if norm is L.BatchNormalization else (L.BatchNormalization(axis=1, epsilon=1e-5),)
    own = {"epsilon": 1e-5} if norm is L.BatchNormalization else {}
    _, a = saved(tmp_path, (4, 5), *front, norm(axis=1, **own), L.Flatten(), L.ReLU())
    with pytest.raises(neutral.NeutralError, match="fc: found in of 20 that may cross a Flatten"):
        neutral.convert(a, tmp_path / "out.pt", into=template(tmp_path, nn.BatchNorm1d(4), 20))


def test_the_user_can_say_that_the_channels_come_first(tmp_path: Path) -> None:
    model, a = saved(tmp_path, (4, 5), L.BatchNormalization(axis=1, epsilon=1e-5), L.Flatten())
    out, x = tmp_path / "out.pt", np.random.default_rng(1).normal(size=(2, 4, 5)).astype("f4")
    neutral.export_model(a, tmp_path / "a.nwt").close()
    with pytest.raises(neutral.NeutralError, match="may cross a Flatten"):
        neutral.import_model(tmp_path / "a.nwt", into=template(tmp_path, nn.BatchNorm1d(4), 20), out=out)
    neutral.convert(tmp_path / "a.nwt", tmp_path / "said.nwt", flatten={"fc": "none"})
    neutral.import_model(tmp_path / "said.nwt", into=template(tmp_path, nn.BatchNorm1d(4), 20), out=out)
    assert differs(model, out, x, x) < 1e-5


ODD: dict[str, tuple[Any, ...]] = {
    "permuted": (L.Permute((2, 1, 3)), L.Flatten()),
    "an unknown layer": (L.Lambda(lambda x: x * 2), L.Flatten()),
    "an unknown layer that flattens": (L.Lambda(lambda x: keras.ops.reshape(x, (-1, 60))),),
    "an unknown layer behind the Flatten": (L.Flatten(), L.Lambda(lambda x: x * 2)),
    "a pooling with channels first": (L.MaxPooling2D(1, data_format="channels_first"), L.Flatten()),
    "a Flatten with channels first": (L.Flatten(data_format="channels_first"),),
    "a Reshape of an unknown layer": (L.Lambda(lambda x: x * 2), L.Reshape((60,))),
}


@pytest.mark.parametrize("name", ODD)
def test_an_image_without_a_convolution(name: str, tmp_path: Path) -> None:
    _, a = saved(tmp_path, (4, 5, 3), L.BatchNormalization(epsilon=1e-5), *ODD[name])
    with pytest.raises(
        neutral.NeutralError,
        match=r"fc: found (in of 60 that may cross a Flatten|an image whose axes .* unusual order)",
    ):
        neutral.convert(a, tmp_path / "out.pt", into=template(tmp_path, nn.BatchNorm2d(3), 60))


def test_what_is_clear_is_not_asked_for(tmp_path: Path) -> None:
    model, a = saved(tmp_path, (4, 5, 3), L.BatchNormalization(epsilon=1e-5), L.Flatten())
    neutral.convert(a, tmp_path / "out.pt", into=template(tmp_path, nn.BatchNorm2d(3), 60))
    x = np.random.default_rng(1).normal(size=(2, 4, 5, 3)).astype("f4")
    assert differs(model, tmp_path / "out.pt", x, np.moveaxis(x, -1, 1).copy()) < 1e-5


@pytest.mark.parametrize(
    "layers",
    [
        (L.Lambda(lambda x: x * 1), L.Flatten()),
        (L.Masking(), L.LSTM(6, return_sequences=True), L.Flatten()),
        (L.GlobalAveragePooling1D(), L.Lambda(lambda x: x * 1)),
    ],
)
def test_a_sequence_has_one_order_everywhere(layers: tuple[Any, ...], tmp_path: Path) -> None:
    model, a = saved(tmp_path, (4, 5), *layers)
    report = neutral.convert(a, tmp_path / "out.pt")
    weights = torch.load(tmp_path / "out.pt", weights_only=False)
    kernel = next(w for name, w in weights.items() if name.endswith("fc.weight"))
    assert report.layers and np.array_equal(kernel.numpy().T, model.layers[-1].get_weights()[0])


class LastAxis(nn.Module):
    """A convolution, a layer on channels that are put last for it and first again behind it, a Flatten."""

    def __init__(self, inner: nn.Module, features: int) -> None:
        super().__init__()
        self.conv, self.inner, self.fc = nn.Conv2d(3, 6, 1), inner, nn.Linear(features * 20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: torch.Tensor = self.fc(x.relu().flatten(1))
        return out


def image_model(folder: Path, inner: Any) -> tuple[Any, Path]:
    return saved(folder, (4, 5, 3), L.Conv2D(6, 1, name="conv"), inner, L.ReLU(), L.Flatten())


def test_a_norm_of_an_images_channels_leaves_it_an_image(tmp_path: Path) -> None:
    model, a = image_model(tmp_path, L.LayerNormalization(epsilon=1e-5, name="inner"))
    module = LastAxis(nn.LayerNorm(6), 6).eval()
    torch.save(module.state_dict(), tmp_path / "t.pt")
    report = neutral.convert(a, tmp_path / "out.pt", into=tmp_path / "t.pt")
    assert any("eps" in warning for warning in report.warnings)
    module.load_state_dict(torch.load(tmp_path / "out.pt"))
    x = m.random(2, 3, 4, 5)
    m.assert_close(m.run_torch(module, x), m.run_keras(model, m.channels_last(x)), 1e-5)
    neutral.convert(a, tmp_path / "a.onnx")
    assert neutral.digest(tmp_path / "a.onnx") == neutral.digest(a)


def test_a_dense_layer_on_an_image_leaves_the_order_behind_it_open(tmp_path: Path) -> None:
    model, a = image_model(tmp_path, L.Dense(5, name="inner"))
    module = LastAxis(nn.Linear(6, 5), 5).eval()
    torch.save(module.state_dict(), tmp_path / "t.pt")
    with pytest.raises(neutral.NeutralError, match=r"fc: found in of 100.*--flatten"):
        neutral.convert(a, tmp_path / "out.pt", into=tmp_path / "t.pt")
    neutral.convert(a, tmp_path / "out.pt", into=tmp_path / "t.pt", flatten={"fc": "5"})
    module.load_state_dict(torch.load(tmp_path / "out.pt"))
    x = m.random(2, 3, 4, 5)
    m.assert_close(m.run_torch(module, x), m.run_keras(model, m.channels_last(x)), 1e-5)
    neutral.convert(a, tmp_path / "a.onnx")
    assert neutral.diff(tmp_path / "a.onnx", a).same


@pytest.mark.parametrize("axes", [[2, 3], [3], [1, 3], [2], None], ids=str)
def test_slopes_that_share_axes_stay_so(axes: list[int] | None, tmp_path: Path) -> None:
    model, a = saved(tmp_path, (4, 5, 3), L.Conv2D(3, 1), L.PReLU(shared_axes=axes), L.GlobalAveragePooling2D())
    neutral.convert(a, tmp_path / "web", to="tfjs")
    neutral.convert(tmp_path / "web", tmp_path / "b.keras")
    again = keras.models.load_model(tmp_path / "b.keras", compile=False)
    x = m.random(2, 4, 5, 3)
    m.assert_close(m.run_keras(again, x), m.run_keras(model, x))
