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
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from neutral.containers.files import SourceFile
from neutral.errors import BadFile, Problem, printable

CONFIGS: Final = ("config.json", "generation_config.json")
_LONGEST: Final = 4 << 20
_LARGEST_COPY: Final = 256 << 20
_WEIGHTS: Final = re.compile(
    r"((pytorch|tf|flax|diffusion_\w+)_model|model|consolidated).*\.(safetensors|bin|h5|msgpack|pth|pt)"
)
_INDEX: Final = ".index.json"
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


def unread(folder: Path, weights: Iterable[str]) -> list[str]:
    """A note on other weights that lie beside those that are read, such as the same ones in the format of old days."""
    known = set(weights)
    found = sorted(path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and path.name not in known)
    return [f"weights beside these, not read: {', '.join(printable(name, 60) for name in found[:5])}"] if found else []


def refuse_rival(index: Path, listed_files: Iterable[str]) -> None:
    """`model.safetensors` beside `model.safetensors.index.json`: one loads the one, and one the other."""
    single = index.name.removesuffix(_INDEX)
    if single != index.name and (index.parent / single).is_file() and single not in set(listed_files):
        raise BadFile(
            Problem(
                str(index.parent),
                f"both {printable(single, 60)} and the index of a set of shards",
                "one set of weights",
                "name the file or the index itself",
            )
        )


def companions(folder: Path, weights: frozenset[str]) -> Iterator[Path]:
    """The small files that a copy of the folder has as well: configs, vocabularies, cards. `weights` are written anew."""
    for path in sorted(folder.iterdir()):
        plain = path.is_file() and not path.is_symlink()
        copied = path.suffix in _COPIED and not path.name.endswith(_INDEX)
        if plain and copied and path.name not in weights and path.stat().st_size <= _LARGEST_COPY:
            yield path


def copy_companions(folder: Path, out: Path, weights: frozenset[str]) -> None:
    """Copy these files into a folder that a template's copy is made in."""
    for path in companions(folder, weights):
        shutil.copyfile(path, out / path.name)
