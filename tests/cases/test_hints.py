"""A hint is for what a file does not say: one that the file contradicts is refused, one that it confirms is not."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
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


def test_settings_in_a_hint(tmp_path: Path, neutral_: Commands) -> None:
    """What no file says: whether a square kernel of Flax is kept turned around; and a hint for a template's layer."""
    from flax import serialization

    kernel = np.random.default_rng(1).normal(size=(3, 2, 4, 4)).astype("float32")
    (tmp_path / "up.msgpack").write_bytes(serialization.to_bytes({"params": {"up": {"kernel": kernel}}}))
    torch.save({"up.weight": torch.from_numpy(kernel.transpose(2, 3, 0, 1).copy())}, tmp_path / "up.pt")
    told = "conv_transpose(transpose_kernel="
    refused = neutral_.refused("convert", tmp_path / "up.msgpack", tmp_path / "x.pt", "--kind", "up=conv_transpose")
    assert f"--kind 'up={told}false)' or --kind 'up={told}true)'" in refused
    assert "the setting stride in a hint" in neutral_.refused(
        "export", tmp_path / "up.msgpack", tmp_path / "x.nwt", "--kind", "up=conv_transpose(stride=2)"
    )
    for value, expected in (
        ("false", kernel[::-1, ::-1].transpose(2, 3, 0, 1)),
        ("true", kernel.transpose(3, 2, 0, 1)),
    ):
        out = tmp_path / f"{value}.pt"
        neutral_.ok("convert", tmp_path / "up.msgpack", out, "--kind", f"up={told}{value})")
        assert np.array_equal(torch.load(out)["up.weight"].numpy(), expected)

    into = ("--into", tmp_path / "up.msgpack", "--kind", "up=conv_transpose")
    assert "--into-kind 'up=" in neutral_.refused("convert", tmp_path / "up.pt", tmp_path / "y.msgpack", *into)
    neutral_.ok("convert", tmp_path / "up.pt", tmp_path / "y.msgpack", *into, "--into-kind", f"up={told}false)")
    written = serialization.msgpack_restore((tmp_path / "y.msgpack").read_bytes())["params"]["up"]["kernel"]
    assert np.array_equal(written, kernel[::-1, ::-1])
