"""A bidirectional layer of torch or Keras, and Flax's two cells side by side: a map tells which is which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import neutral
from neutral.errors import Refused

INPUT, UNITS, CLASSES = 4, 6, 3
CELLS = {"lstm": (linen.LSTMCell, torch.nn.LSTM), "rnn": (linen.SimpleCell, torch.nn.RNN)}
INTO_FLAX = {"rnn:forward": "{}_0", "rnn:backward": "{}_1", "fc": "Dense_0"}


class Tagger(torch.nn.Module):
    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.rnn = CELLS[kind][1](size, UNITS, bidirectional=True, batch_first=True)
        self.fc = torch.nn.Linear(2 * UNITS, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.rnn(x)[0])
        return out


class FlaxTagger(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x: Any) -> Any:
        cell = CELLS[self.kind][0]
        both = linen.Bidirectional(linen.RNN(cell(UNITS)), linen.RNN(cell(UNITS)))
        return linen.Dense(CLASSES)(both(x))


def names(kind: str) -> dict[str, str]:
    return {source: target.format(CELLS[kind][0].__name__) for source, target in INTO_FLAX.items()}


def saved(kind: str, size: int, folder: Path) -> tuple[Any, Path, FlaxTagger, Path, Any]:
    """Both models with random weights, their files, and an input."""
    torch.manual_seed(1)
    ours, theirs = Tagger(kind, size).eval(), FlaxTagger(kind)
    x = np.random.default_rng(2).standard_normal((2, 5, size)).astype(np.float32)
    rng = np.random.default_rng(3)
    shapes = theirs.init(jax.random.key(0), jnp.asarray(x))
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)
    torch.save(ours.state_dict(), folder / "model.pt")
    (folder / "model.msgpack").write_bytes(flax.serialization.to_bytes(params))
    return ours, folder / "model.pt", theirs, folder / "model.msgpack", x


def restored(path: Path) -> Any:
    return flax.serialization.msgpack_restore(path.read_bytes())


@pytest.mark.parametrize("size", [INPUT, UNITS], ids=["unequal", "equal"])
@pytest.mark.parametrize("kind", CELLS)
def test_apart(kind: str, size: int, tmp_path: Path) -> None:
    ours, file, theirs, template, x = saved(kind, size, tmp_path)
    report = neutral.convert(file, tmp_path / "o.msgpack", into=template, mapping=names(kind), flatten={})
    with torch.no_grad():
        expected = ours(torch.from_numpy(x)).numpy()
    found = theirs.apply(restored(tmp_path / "o.msgpack"), jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert {loss.partition(": ")[0] for loss in report.losses} == {"rnn:forward", "rnn:backward"}
    assert any("rnn:backward" in warning and "go_backwards" in warning for warning in report.warnings)


@pytest.mark.parametrize("size", [INPUT, UNITS], ids=["unequal", "equal"])
@pytest.mark.parametrize("kind", CELLS)
def test_together(kind: str, size: int, tmp_path: Path) -> None:
    ours, template, theirs, file, x = saved(kind, size, tmp_path)
    back = {source: target for target, source in names(kind).items()}
    report = neutral.convert(file, tmp_path / "o.pt", into=template, mapping=back, flatten={})
    ours.load_state_dict(torch.load(tmp_path / "o.pt"))
    with torch.no_grad():
        found = ours(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, theirs.apply(restored(file), jnp.asarray(x)), atol=1e-5)
    assert report.losses == ()


def test_there_and_back_is_what_it_was(tmp_path: Path) -> None:
    _, template, _, file, _ = saved("lstm", INPUT, tmp_path)
    there = names("lstm")
    neutral.convert(file, tmp_path / "o.pt", into=template, mapping={b: a for a, b in there.items()}, flatten={})
    neutral.convert(tmp_path / "o.pt", tmp_path / "o.msgpack", into=file, mapping=there, flatten={})
    for a, b in zip(*(jax.tree.leaves(restored(path)) for path in (file, tmp_path / "o.msgpack")), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"LSTMCell_0": "rnn:forward"}, "rnn: found a layer for one of its directions"),
        ({"LSTMCell_0": "rnn:forward", "Dense_0": "rnn:backward"}, "layers of different kinds or sizes"),
        ({"LSTMCell_0:forward": "rnn"}, "LSTMCell_0: found a layer of one direction"),
        ({"LSTMCell_0": "rnn:backwards"}, "rnn:backwards: found no such layer in the template"),
        ({}, r"rnn:forward and rnn:backward"),
    ],
)
def test_what_a_map_cannot_mean_is_refused(mapping: Mapping[str, str], says: str, tmp_path: Path) -> None:
    _, template, _, file, _ = saved("lstm", INPUT, tmp_path)
    with pytest.raises(Refused, match=says):
        neutral.convert(file, tmp_path / "o.pt", into=template, mapping=mapping, flatten={})
    assert not (tmp_path / "o.pt").exists()


def test_layers_that_say_they_compute_forward_are_not_both_directions(tmp_path: Path) -> None:
    import keras

    made = [keras.layers.LSTM(UNITS, return_sequences=True, name=name) for name in ("one", "two")]
    x = keras.Input((5, INPUT))
    keras.Model(x, keras.layers.concatenate([layer(x) for layer in made])).save(tmp_path / "m.keras")
    torch.save({f"rnn.{k}": v for k, v in Tagger("lstm", INPUT).rnn.state_dict().items()}, tmp_path / "t.pt")
    with pytest.raises(Refused, match="one and two: found a forward layer"):
        mapping = {"one": "rnn:forward", "two": "rnn:backward"}
        neutral.convert(tmp_path / "m.keras", tmp_path / "o.pt", into=tmp_path / "t.pt", mapping=mapping)
