"""A program of torch.export is known by its members."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from neutral.containers.torch_program import is_program


def test_a_program_that_torch_wrote(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    torch.export.save(torch.export.export(model, (torch.ones(1, 3),)), tmp_path / "x.pt2")
    torch.save(model.state_dict(), tmp_path / "y.pt2")
    assert is_program(tmp_path / "x.pt2") and not is_program(tmp_path / "y.pt2")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("m/models/model.json", True),
        ("serialized_exported_program.json", True),
        ("m/models/deep/model.json", False),
        ("mymodels/model.json", False),
        ("x.json", False),
    ],
)
def test_members(name: str, known: bool, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as file:
        file.writestr(name, "{}")
    assert is_program(tmp_path / "x") is known


def test_what_is_no_zip_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert not any(is_program(path) for path in (tmp_path, tmp_path / "empty", tmp_path / "nothing"))
