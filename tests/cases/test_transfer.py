"""Templates as people have them: a new head, activations written otherwise, counters of another session, own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tf_keras
import torch
import torch.nn.functional as F
from torch import nn

import neutral
from tests.cases import models as m
from tests.cases.commands import Commands

L = keras.layers


def bag(**layers: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return m.randomized(module, 1)


def chain(*layers: Any) -> Any:
    return m.randomized_keras(keras.Sequential([keras.Input((6,)), *layers]), 1)


def test_a_head_of_another_size_and_the_same_name(tmp_path: Path, neutral_: Commands) -> None:
    for name, classes in (("old", 10), ("new", 3)):
        torch.save(bag(conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, classes)).state_dict(), tmp_path / f"{name}.pt")
    command = (
        "convert",
        tmp_path / "old.pt",
        tmp_path / "out.pt",
        "--into",
        tmp_path / "new.pt",
        "--allow-unused",
        "fc",
    )
    assert "equal names but kernel (10, 4) against (3, 4)" in neutral_.refused(*command)
    said = neutral_.ok(*command, "--allow-missing", "fc", "--explain")
    assert "left out" in said and "kept as it was" in said
    old, new, out = (torch.load(tmp_path / f"{name}.pt") for name in ("old", "new", "out"))
    assert torch.equal(out["conv.weight"], old["conv.weight"]) and torch.equal(out["fc.weight"], new["fc.weight"])


@pytest.mark.parametrize(
    "layers", [(L.Dense(5), L.ReLU()), (L.Dense(5), L.Activation("relu")), (L.Dense(5, activation="relu"),)]
)
def test_a_fused_activation_and_one_of_its_own(layers: tuple[Any, ...], tmp_path: Path, neutral_: Commands) -> None:
    fused = chain(L.Dense(5, activation="relu"), L.Dense(2))
    fused.save(tmp_path / "a.keras")
    other = keras.Sequential.from_config(chain(*layers, L.Dense(2)).get_config())
    other.save(tmp_path / "b.keras")
    neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "out.keras", "--into", tmp_path / "b.keras")
    x = m.random(3, 6)
    m.assert_close(m.run_keras(keras.models.load_model(tmp_path / "out.keras"), x), m.run_keras(fused, x))
    chain(L.Dense(5, activation="tanh"), L.Dense(2)).save(tmp_path / "c.keras")
    text = neutral_.refused("convert", tmp_path / "b.keras", tmp_path / "no.keras", "--into", tmp_path / "c.keras")
    assert "Relu behind it, expected the template's Tanh" in text


@pytest.mark.parametrize("suffix", ["weights.h5", "keras", "live"])
def test_counters_of_another_session(suffix: str, tmp_path: Path, neutral_: Commands) -> None:
    """Keras pairs by the places in the file, which count anew; the layers' own names count on."""
    first, second = (chain(L.Dense(6), L.Dense(6), L.Dense(2)) for _ in range(2))
    second.set_weights([w + 1 for w in second.get_weights()])
    first.save_weights(tmp_path / "a.weights.h5")
    if suffix == "live":
        neutral.convert(tmp_path / "a.weights.h5", into=second)
    elif suffix == "keras":
        second.save(tmp_path / "b.keras")
        neutral_.ok("convert", tmp_path / "a.weights.h5", tmp_path / "out.keras", "--into", tmp_path / "b.keras")
        second = keras.models.load_model(tmp_path / "out.keras")
    else:
        second.save_weights(tmp_path / "b.weights.h5")
        out = tmp_path / "out.weights.h5"
        neutral_.ok("convert", tmp_path / "a.weights.h5", out, "--into", tmp_path / "b.weights.h5")
        second.load_weights(out)
    assert all(np.array_equal(a, b) for a, b in zip(first.get_weights(), second.get_weights(), strict=True))


@keras.saving.register_keras_serializable("test_transfer")
class Own(keras.Model):
    """A class whose config does not tell its wiring."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.conv1, self.flat = L.Conv2D(5, 3, activation="relu"), L.Flatten()
        self.fc1, self.fc2 = L.Dense(7, activation="relu"), L.Dense(2)

    def call(self, x: Any) -> Any:
        return self.fc2(self.fc1(self.flat(self.conv1(x))))


def test_a_template_of_a_users_own_class(tmp_path: Path, neutral_: Commands) -> None:
    module = bag(conv1=nn.Conv2d(3, 5, 3), fc1=nn.Linear(60, 7), fc2=nn.Linear(7, 2))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    template = Own()
    x = m.random(2, 5, 6, 3)
    template(x)
    template.save(tmp_path / "own.keras")
    command = ("convert", tmp_path / "a.pt", tmp_path / "out.keras", "--into", tmp_path / "own.keras")
    assert "--flatten fc1=CHANNELS" in neutral_.refused(*command)
    said = neutral_.ok(*command, "--flatten", "fc1=5")
    assert "the template does not say how it flattens" in said
    neutral.convert(tmp_path / "a.pt", into=template, flatten={"fc1": "5"})
    image = torch.from_numpy(m.channels_first(x))
    with torch.no_grad():
        hidden = F.relu(module.fc1(torch.flatten(F.relu(module.conv1(image)), 1)))
        wanted = module.fc2(hidden).numpy()
    m.assert_close(np.asarray(template(x)), wanted)
    m.assert_close(np.asarray(keras.models.load_model(tmp_path / "out.keras")(x)), wanted)


def test_bare_weights_of_a_text_model(tmp_path: Path, neutral_: Commands) -> None:
    """An embedding is behind no Flatten, whatever else its tensor could be."""
    torch.save(
        bag(emb=nn.Embedding(30, 8), conv=nn.Conv1d(8, 10, 3), fc=nn.Linear(10, 2)).state_dict(), tmp_path / "a.pt"
    )
    layers = [L.Embedding(30, 8), L.Conv1D(10, 3), L.GlobalMaxPooling1D(), L.Dense(2)]
    keras.Sequential([keras.Input((7,)), *layers]).save(tmp_path / "b.keras")
    neutral_.ok("convert", tmp_path / "a.pt", tmp_path / "out.keras", "--into", tmp_path / "b.keras")


def test_an_eps_that_only_the_template_says(tmp_path: Path, neutral_: Commands) -> None:
    torch.save(bag(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)).state_dict(), tmp_path / "a.pt")
    layers = [L.Conv2D(4, 3, name="conv"), L.BatchNormalization(name="norm")]
    keras.Sequential([keras.Input((8, 8, 3)), *layers]).save(tmp_path / "b.keras")
    said = neutral_.ok("convert", tmp_path / "a.pt", tmp_path / "out.keras", "--into", tmp_path / "b.keras")
    assert "norm: the source does not say eps; taken to be 0.001, as in the template" in said


def test_a_live_model_of_keras_2(tmp_path: Path) -> None:
    module = m.randomized(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, eps=1e-3)), 1).eval()
    torch.save(module, tmp_path / "a.pt")
    model = tf_keras.Sequential([tf_keras.Input((6,)), tf_keras.layers.Dense(5), tf_keras.layers.BatchNormalization()])
    neutral.convert(tmp_path / "a.pt", into=model)
    x = m.random(3, 6)
    m.assert_close(np.asarray(model(x)), m.run_torch(module, x))


@pytest.mark.parametrize(
    ("layers", "shape", "other"),
    [
        ((L.Conv2D(6, 3), L.MaxPooling2D(), L.Conv2D(5, 3), L.GlobalAveragePooling2D()), (None, None, 3), (3, 28, 37)),
        ((L.Conv1D(6, 3), L.MaxPooling1D(), L.MaxPooling1D(3, padding="same")), (None, 4), (4, 23)),
    ],
)
def test_a_program_takes_inputs_of_any_size(
    layers: tuple[Any, ...], shape: tuple[int | None, ...], other: tuple[int, ...], tmp_path: Path
) -> None:
    model = m.randomized_keras(keras.Sequential([keras.Input(shape), *layers]), 1)
    model.save(tmp_path / "a.keras")
    neutral.convert(tmp_path / "a.keras", tmp_path / "a.pt2")
    x = m.random(2, *other)
    found = torch.export.load(tmp_path / "a.pt2").module()(torch.from_numpy(x)).detach().numpy()
    wanted = m.run_keras(model, m.channels_last(x))
    m.assert_close(found, wanted if wanted.ndim == 2 else m.channels_first(wanted))


def test_diff_does_not_call_nameless_layers_different(tmp_path: Path, neutral_: Commands) -> None:
    named = bag(c1=nn.Conv2d(3, 8, 3), b1=nn.BatchNorm2d(8), c2=nn.Conv2d(8, 8, 3), b2=nn.BatchNorm2d(8))
    torch.save(nn.Sequential(*named.children()), tmp_path / "chain.pt")
    torch.save(named.state_dict(), tmp_path / "bare.pt")
    text = neutral_.refused("diff", tmp_path / "bare.pt", tmp_path / "chain.pt", status=2)
    assert "a layer of unknown kind with no layer of that name on the other side" in text
    neutral.convert(tmp_path / "bare.pt", tmp_path / "bare.npz")
    assert "--kind" in neutral_.refused("diff", tmp_path / "chain.pt", tmp_path / "bare.npz", status=2)
