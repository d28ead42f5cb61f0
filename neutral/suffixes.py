"""What a path's name says: its suffix, which decides the format of a new file.

>>> suffix_of(Path("X.Weights.H5")), suffix_of(Path("a.b/model.PT")), suffix_of(Path("ckpt-1"))
('.weights.h5', '.pt', '')
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

ARCHIVE_SUFFIXES: Final = (".nwt", ".nwt.index.json")
_OF_SEVERAL_PARTS: Final = (
    ".weights.h5",
    ".weights.json",
    ".safetensors.index.json",
    ".bin.index.json",
    ".nwt.index.json",
)


def suffix_of(path: Path) -> str:
    """The suffix in lower case, with the parts that belong together: `.weights.h5` is no `.h5`."""
    name = path.name.lower()
    return next((suffix for suffix in _OF_SEVERAL_PARTS if name.endswith(suffix)), path.suffix.lower())


def without_suffix(path: Path) -> str:
    """The name without its suffix.

    >>> without_suffix(Path("X.Weights.H5")), without_suffix(Path(".keras"))
    ('X', '.keras')
    """
    return path.name[: len(path.name) - len(suffix_of(path))] or path.name
