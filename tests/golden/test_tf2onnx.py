"""Models of Keras that tf2onnx exported, and what Keras computed of them (see `versions/README.md`).

Each layer that neutral knows in them has Keras's own weights. Where it knows all, each way out of the file computes what was
recorded; where it does not, it says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

import neutral
from tests.onnx_running import run_onnx

Array = np.ndarray
L = keras.layers

HERE = Path(__file__).with_name("versions") / "tf2onnx-1.17.0"
FOLDED = ("folded_export", "residual_export")
"""The norms are in the weights of the convolutions: a model, but not that of Keras."""
WHOLE = ("conv1d_export", "flat_export", "flat_function", "lstm_export", "lstm_function", "norms_export",
         "separable_export", "tagger_export", "transposed_export", "unet_export")  # fmt: skip
REFUSED: Mapping[str, str] = {
    "attention_export": "a Add with a stored tensor of several elements",
    "cnn_export": r"a Mul with a stored tensor .* \(a batch normalization",
    "group-norm_export": "a Mul with a stored tensor of several elements",
    "gru-before_export": "the operator Loop",
    "gru_export": "the operator Loop",
    "mlp_export": r"a Mul with a stored tensor .* \(a batch normalization",
    "simple-rnn_export": "the operator Loop",
}
"""Why there is no new file of it."""


def onnx_file(name: str) -> Path:
    return HERE / f"{name}.onnx"


def keras_file(name: str) -> Path:
    return HERE / f"{name.split('_')[0]}.keras"


def recorded(name: str) -> tuple[Array, Array]:
    with np.load(HERE / "outputs.npz") as arrays:
        return arrays[f"x/{name.split('_')[0]}"], arrays[f"y/{name}"]


def close(found: Array, y: Array) -> None:
    assert found.shape == y.shape and np.ptp(y) > 1e-2
    assert np.abs(found - y).max() < 1e-5


def weights(path: Path) -> dict[str, set[tuple[str, ...]]]:
    """Kind -> (role, axes, digest) of all its layers."""
    found: dict[str, set[tuple[str, ...]]] = {}
    with neutral.export_model(path) as archive:
        for layer in archive.manifest.layers:
            for role, parameter in layer.parameters.items():
                found.setdefault(layer.kind, set()).add((role, " ".join(parameter.axes), parameter.sha256))
    return found


def test_every_file_is_here() -> None:
    assert {path.stem for path in HERE.glob("*.onnx")} == {*FOLDED, *WHOLE, *REFUSED}


@pytest.mark.parametrize("name", [*WHOLE, *REFUSED])
def test_layers_have_the_weights_of_keras(name: str) -> None:
    own, found = weights(keras_file(name)), weights(onnx_file(name))
    if name in WHOLE:
        assert "unknown" not in found
    for kind in found.keys() - {"unknown"}:
        if kind == "lstm":  # ONNX has two biases, of which one is zeros
            own[kind], found[kind] = ({each for each in side[kind] if each[0] != "bias"} for side in (own, found))
        if name == "attention_export":  # products of matrices there
            continue
        assert found[kind] and found[kind] <= own[kind], kind


@pytest.mark.parametrize("name", FOLDED)
def test_weights_that_were_computed_are_said_to_be(name: str) -> None:
    own, found = weights(keras_file(name)), weights(onnx_file(name))
    assert found["dense"] == own["dense"] and not found["conv"] & own["conv"]
    with neutral.export_model(onnx_file(name)) as archive:
        computed = [layer.path for layer in archive.manifest.layers if layer.kind == "conv"]
        assert computed and all(path.endswith("_computed") for path in computed)
        assert all(
            any(path in note and "not the layer's own" in note for note in archive.manifest.notes) for path in computed
        )
    with pytest.raises(neutral.NeutralError, match=r"norm1?: found a batch_norm"):
        neutral.convert(onnx_file(name), into=keras.models.load_model(keras_file(name)))
    if name == "folded_export":
        model = keras.Sequential([keras.Input((7, 6, 2)), L.Conv2D(3, (3, 2)), L.GlobalAveragePooling2D(), L.Dense(4)])
        done = neutral.convert(onnx_file(name), into=model)
        assert any("not the layer's own" in each for each in done.warnings)
        x, y = recorded(name)
        close(np.asarray(model(x)), y)


@pytest.mark.parametrize("name", WHOLE)
def test_into_keras(name: str) -> None:
    x, y = recorded(name)
    model = keras.models.load_model(keras_file(name))
    for variable in model.weights:
        if "float" in str(variable.dtype):
            variable.assign(np.full(variable.shape, 0.3))
    neutral.convert(onnx_file(name), into=model)
    close(np.asarray(model(x)), y)


@pytest.mark.parametrize("name", WHOLE)
def test_from_keras(name: str, tmp_path: Path) -> None:
    """Keras's weights in a copy of the exported model that had others."""
    x, y = recorded(name)
    model = keras.models.load_model(keras_file(name))
    for variable in model.weights:
        if "float" in str(variable.dtype):
            variable.assign(np.full(variable.shape, 0.3))
    neutral.convert(model, tmp_path / "others.onnx", into=onnx_file(name))
    assert np.abs(run_onnx(tmp_path / "others.onnx", x)[0] - y).max() > 1e-2
    neutral.convert(keras_file(name), tmp_path / "filled.onnx", into=tmp_path / "others.onnx")
    close(run_onnx(tmp_path / "filled.onnx", x)[0], y)


@pytest.mark.parametrize("name", [*FOLDED, *WHOLE])
def test_a_new_torch_program(name: str, tmp_path: Path) -> None:
    x, y = recorded(name)
    neutral.convert(onnx_file(name), tmp_path / "new.pt2")
    with torch.no_grad():
        close(torch.export.load(tmp_path / "new.pt2").module()(torch.from_numpy(x)).numpy(), y)


@pytest.mark.parametrize("name", [*FOLDED, *WHOLE])
def test_a_new_onnx_model(name: str, tmp_path: Path) -> None:
    x, y = recorded(name)
    neutral.convert(onnx_file(name), tmp_path / "new.onnx")
    close(run_onnx(tmp_path / "new.onnx", x)[0], y)


@pytest.mark.parametrize("name", [*FOLDED, *WHOLE])
def test_a_new_keras_model(name: str, tmp_path: Path) -> None:
    """An ONNX value of four axes is an image with its channels in front, which Keras has last."""
    x, y = recorded(name)
    neutral.convert(onnx_file(name), tmp_path / "new.keras")
    out = np.asarray(keras.models.load_model(tmp_path / "new.keras")(np.moveaxis(x, 1, -1) if x.ndim == 4 else x))
    close(np.moveaxis(out, -1, 1) if out.ndim == 4 else out, y)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("suffix", ["keras", "onnx", "pt2"])
def test_what_is_no_layer_is_refused(name: str, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(neutral.NeutralError, match=REFUSED[name]):
        neutral.convert(onnx_file(name), tmp_path / f"new.{suffix}")
    with pytest.raises(neutral.NeutralError, match="without a partner"):
        neutral.convert(onnx_file(name), into=keras.models.load_model(keras_file(name)))
