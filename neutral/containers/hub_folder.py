"""What lies beside the weights in a folder as Hugging Face keeps models: the config, and small files that belong to it.

>>> import pathlib, tempfile
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> _ = (folder / "config.json").write_text('{"model_type": "bert"}')
>>> provenance(folder)
{'config.json': {'model_type': 'bert'}}

The config is kept as where the weights came from, and given to nobody as truth: no class is built of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from neutral.containers.files import SourceFile

CONFIGS: Final = ("config.json", "generation_config.json")
_LONGEST: Final = 4 << 20
_LARGEST_COPY: Final = 256 << 20
_COPIED: Final = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".spm", ".bpe")


def provenance(folder: Path) -> dict[str, Any]:
    """The configs in a folder as plain data; what is no JSON object, too long or a link is left out."""
    found = {name: _object(folder / name) for name in CONFIGS}
    return {name: config for name, config in found.items() if config is not None}


def _object(path: Path) -> dict[str, Any] | None:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _LONGEST:
        return None
    with SourceFile(path) as file:
        try:
            found = json.loads(file.read(0, file.size), parse_constant=str)
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, dict) else None


def companions(folder: Path, weights: frozenset[str]) -> Iterator[Path]:
    """The small files that a copy of the folder has as well: configs, vocabularies, cards. `weights` are written anew."""
    for path in sorted(folder.iterdir()):
        plain = path.is_file() and not path.is_symlink()
        if plain and path.name not in weights and path.suffix in _COPIED and path.stat().st_size <= _LARGEST_COPY:
            yield path


def copy_companions(folder: Path, out: Path, weights: frozenset[str]) -> None:
    """Copy these files into a folder that a template's copy is made in."""
    for path in companions(folder, weights):
        shutil.copyfile(path, out / path.name)
