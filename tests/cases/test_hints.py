"""A hint is for what a file does not say: one that the file contradicts is refused, one that it confirms is not."""

from __future__ import annotations

from pathlib import Path

import keras
import pytest
import torch
from torch import nn

from tests.cases import models as m
from tests.cases.commands import Commands

L = keras.layers


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    torch.save(m.randomized(module, 1), tmp_path / "chain.pt")
    return tmp_path / "chain.pt"


@pytest.mark.parametrize(
    ("hint", "found"),
    [
        (("--flatten", "3=12"), "3: flatten: found the hint in=12, expected in=4"),
        (("--flatten", "none"), "3: flatten: found the hint none, expected in=4"),
        (("--flatten", "3=none"), "3: flatten: found the hint none, expected in=4"),
        (("--flatten", "0=4"), "0: flatten: found a hint for a conv"),
        (("--kind", "0=conv_transpose"), "0: found the hint that it is a conv_transpose, expected a conv"),
        (("--kind", "3=embedding", "--kind", "0=dense"), "3: found the hint that it is an embedding, expected a dense"),
    ],
)
def test_a_class_or_graph_that_contradicts_a_hint(
    hint: tuple[str, ...], found: str, chain: Path, tmp_path: Path, neutral_: Commands
) -> None:
    out = tmp_path / "out.nwt"
    assert found in neutral_.refused("export", chain, out, *hint)
    neutral_.ok("export", chain, out)
    assert not (tmp_path / "again.nwt").exists()
    if hint[0] == "--flatten":
        assert found in neutral_.refused("export", out, tmp_path / "again.nwt", *hint)


def test_a_hint_that_says_what_is_known_changes_nothing(chain: Path, tmp_path: Path, neutral_: Commands) -> None:
    plain = neutral_.ok("digest", chain)
    assert plain == neutral_.ok("digest", chain, "--flatten", "3=4", "--kind", "0=conv", "--kind", "3=dense")


def test_no_channels_describe_an_order_of_its_own(tmp_path: Path, neutral_: Commands) -> None:
    layers = [L.Conv2D(2, 2, name="conv"), L.Permute((2, 1, 3)), L.Flatten(), L.Dense(4, name="fc")]
    keras.Sequential([keras.Input((4, 5, 3)), *layers]).save(tmp_path / "permuted.keras")
    text = neutral_.refused("export", tmp_path / "permuted.keras", tmp_path / "x.nwt", "--flatten", "fc=2")
    assert "fc: flatten: found the hint in=2, expected none: the graph gives its elements in an order" in text


def test_what_was_taken_for_granted_can_be_corrected(tmp_path: Path, neutral_: Commands) -> None:
    """Without a convolution a dense layer is taken to follow no Flatten; a hint to the archive may still say it does."""
    torch.save({"fc.weight": torch.randn(5, 12), "fc.bias": torch.randn(5)}, tmp_path / "bare.pt")
    neutral_.ok("export", tmp_path / "bare.pt", tmp_path / "bare.nwt", "--kind", "fc=dense")
    neutral_.ok("export", tmp_path / "bare.nwt", tmp_path / "told.nwt", "--flatten", "fc=3")
    assert "out channel position" in neutral_.ok("show", tmp_path / "told.nwt")
