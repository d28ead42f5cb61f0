"""The files of external data of an ONNX model: plain files below the model's folder, reached by no link."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neutral.containers.files import SourceFile, leads_outside
from neutral.errors import BadFile, Problem


@dataclass(frozen=True)
class DataFile:
    """A file of external data: the location that the model names, and the file."""

    location: str
    file: SourceFile


class DataFiles:
    """The files of external data of a model in a folder, each opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, DataFile] = {}

    def __iter__(self) -> Iterator[DataFile]:
        return iter(self._opened.values())

    def open(self, location: str, where: str) -> DataFile:
        """The file at a location: a plain file below the model's folder, reached by no link."""
        if location not in self._opened:
            path = self._checked(location, where)
            file = SourceFile(path)
            if path.stat().st_nlink != 1:
                file.close()
                raise BadFile(_location(where, location, "a file of several names (hard links)", "a copy of its own"))
            self._opened[location] = DataFile(location, file)
        return self._opened[location]

    def _checked(self, location: str, where: str) -> Path:
        parts = location.split("/")
        if not location or "\0" in location or leads_outside(location):
            raise BadFile(_location(where, location, "a path that leads out of the model's folder", "one inside it"))
        path = self._folder
        for part in parts:
            path = path / part
            try:
                mode = path.lstat().st_mode
            except (OSError, ValueError) as error:
                said = getattr(error, "strerror", None) or "not a path"
                raise BadFile(
                    _location(where, location, f"no file there ({said})", "the file that was saved with it")
                ) from None
            if stat.S_ISLNK(mode):
                raise BadFile(_location(where, location, "a link", "the file itself"))
        return path

    def close(self) -> None:
        for opened in self._opened.values():
            opened.file.close()


def _location(where: str, location: str, found: str, expected: str) -> Problem:
    return Problem(f"{where}: external data {location!r}", found, expected, "put the model's files in one folder")
