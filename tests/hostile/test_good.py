"""The files that the others are made from are good: what refuses the others refuses what was done to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.commands import Commands

GOOD = ("model.pt", "state.pt", "legacy.pt", "scripted.pt", "model.safetensors", "shards", "model.npz", "model.keras", "model.h5",
        "model.weights.h5", "ckpt", "saved", "model.nwt")  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_files_are_read(name: str, run: Commands, good: Path, tmp_path: Path) -> None:
    for arguments in (["digest", good / name], ["show", good / name], ["export", good / name, "out.nwt"]):
        outcome = run(tmp_path, *arguments)
        assert outcome.status == 0, outcome
    assert run(tmp_path, "check", "out.nwt").status == 0
    assert run(tmp_path, "diff", "out.nwt", good / name).status == 0
