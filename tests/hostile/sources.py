"""A row of a table of hostile files, and every command that must refuse it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.commands import Commands, refused


@dataclass(frozen=True)
class Row:
    """A hostile file: how it is made from good ones in a folder, and a word that its refusal must say.

    `as_template` is False where the fault is in elements that an import replaces without reading them, or in names that
    it leaves as they are; a `slow` row is given to one command of each sort.
    """

    name: str
    make: Callable[[Path, Path], Path]
    says: str = ""
    as_template: bool = True
    slow: bool = False

    def __str__(self) -> str:
        return self.name


def every_command(row: Row, run: Commands, good: Path, folder: Path, suffix: str) -> None:
    """Commands that read a model refuse the row's file: export, as a template, and two others that change with the row."""
    source = row.make(good, folder).relative_to(folder)
    refused(run, folder, ["export", source, "out.nwt"], row.says)
    others = [
        (["show", source], 1),
        (["diff", source, good / "model.nwt"], 2),
        (["digest", source], 1),
        (["convert", source, "out.npz"], 1),
    ]
    first = 2 * (zlib.crc32(row.name.encode()) % 2)
    for arguments, status in [] if row.slow else others[first : first + 2]:
        refused(run, folder, arguments, row.says, status=status)
    if row.as_template:
        suffix = ".weights.h5" if source.name.endswith(".weights.h5") else suffix
        refused(run, folder, ["import", good / "model.nwt", "--into", source, "-o", f"out{suffix}"], row.says)
