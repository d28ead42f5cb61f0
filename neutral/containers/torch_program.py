"""Programs of torch.export (`.pt2`): how one is known. Their weights are not read yet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from neutral.containers.files import SourceFile
from neutral.containers.zip import ZipSource

_PROGRAM = re.compile(r"(^|/)(models/[^/]+\.json|serialized_exported_program\.json)$")
"""The member that holds the operators, of torch since 2.8 and before."""


def is_program(path: Path) -> bool:
    """Whether a file is one of torch.export."""
    if not path.is_file():
        return False
    with SourceFile(path) as file:
        return file.read(0, min(file.size, 2)) == b"PK" and holds_program(ZipSource(file).members)


def holds_program(names: Iterable[str]) -> bool:
    """Whether a zip of these members is one of torch.export."""
    return any(map(_PROGRAM.search, names))
