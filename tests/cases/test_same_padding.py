"""Conv2D whose 'same' padding has two sizes, matched by name, both ways; 10,000 conversions lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest

import neutral
from tests.cases import models as m
from tests.cases.commands import Commands

X = m.random(2, 2, 5, 6)
X_LAST = m.channels_last(X)

TORCH = {"same": m.Same, "padded": m.Padded}


@pytest.fixture(params=["same", "padded"])
def module(request: pytest.FixtureRequest) -> Any:
    return m.randomized(TORCH[request.param](), 1)


@pytest.mark.parametrize("suffix", ["keras", "h5", "weights.h5"])
def test_torch_to_keras(suffix: str, module: Any, tmp_path: Path, neutral_: Commands) -> None:
    source, template, out = tmp_path / "conv.pt", tmp_path / f"template.{suffix}", tmp_path / f"out.{suffix}"
    model = m.randomized_keras(m.same_keras(), 2)
    (model.save_weights if suffix == "weights.h5" else model.save)(template)
    m.save(module, source)
    explained = neutral_.ok("convert", source, out, "--into", template, "--explain")
    assert any(line.split() == ["conv", "conv", "name"] for line in explained.splitlines())
    if suffix == "weights.h5":
        model.load_weights(out)
    else:
        model = keras.models.load_model(out, compile=False)
    m.assert_close(m.run_keras(model, X_LAST), m.channels_last(m.run_torch(module, X)))


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_keras_to_torch(suffix: str, module: Any, tmp_path: Path, neutral_: Commands) -> None:
    source, template, out = tmp_path / f"conv.{suffix}", tmp_path / "template.pt", tmp_path / "out.pt"
    model = m.randomized_keras(m.same_keras(), 2)
    model.save(source)
    m.save(module, template)
    neutral_.ok("convert", source, out, "--into", template)
    m.assert_close(m.channels_last(m.run_torch(m.load(out), X)), m.run_keras(model, X_LAST))


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_from_the_graph(suffix: str, tmp_path: Path) -> None:
    """Without a template the padding is built in, one column more behind than before."""
    import torch

    model = m.randomized_keras(m.same_keras(), 2)
    model.save(tmp_path / f"conv.{suffix}")
    neutral.convert(tmp_path / f"conv.{suffix}", tmp_path / "conv.pt2")
    program = torch.export.load(tmp_path / "conv.pt2").module()
    m.assert_close(m.channels_last(m.run_torch(program, X)), m.run_keras(model, X_LAST))
    chain = m.randomized(torch.nn.Sequential(torch.nn.Conv2d(2, 5, (3, 4), padding="same")), 3)
    torch.save(chain, tmp_path / "chain.pt")
    neutral.convert(tmp_path / "chain.pt", tmp_path / "chain.keras")
    built = keras.models.load_model(tmp_path / "chain.keras")
    m.assert_close(m.run_keras(built, X_LAST), m.channels_last(m.run_torch(chain, X)))


def test_ten_thousand_conversions_end_where_they_began() -> None:
    """Between two live models, so that each conversion really goes through the canonical form."""
    module, model = m.randomized(m.Same(), 1), m.randomized_keras(m.same_keras(), 2)
    first = m.state_bytes(module)
    for _ in range(5000):
        there = neutral.import_model(neutral.export_model(module), into=model)
        for tensor in module.state_dict().values():
            tensor.zero_()
        back = neutral.import_model(neutral.export_model(model), into=module)
        for weight in model.weights:
            weight.assign(weight.value * 0)
    assert [pair.why for pair in (*there.pairs, *back.pairs)] == ["name", "name"]
    assert m.state_bytes(module) == first


def test_files_converted_to_and_fro_end_bit_identical(tmp_path: Path) -> None:
    pickled, saved = m.save(m.randomized(m.Padded(), 1), tmp_path / "conv.pt"), tmp_path / "conv.keras"
    m.same_keras().save(saved)
    first = m.state_bytes(m.load(pickled))
    m.save(m.randomized(m.Padded(), 9), tmp_path / "template.pt")
    neutral.convert(pickled, saved, into=_copy(saved), force=True)
    after_one = saved.read_bytes()
    for _ in range(25):
        neutral.convert(saved, pickled, into=tmp_path / "template.pt", force=True)
        neutral.convert(pickled, saved, into=_copy(saved), force=True)
    assert saved.read_bytes() == after_one
    assert m.state_bytes(m.load(pickled)) == first


def _copy(path: Path) -> Path:
    """A template may not be the output itself."""
    copy = path.with_name(f"template{path.suffix}")
    copy.write_bytes(path.read_bytes())
    return copy
