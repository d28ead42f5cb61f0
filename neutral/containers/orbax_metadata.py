"""What an Orbax folder says of the tree that it holds: `_METADATA`, and the same for a new one.

A path is written twice there, as the `repr` of a tuple and as a list of keys, each with its type: 1 for a position in
a list, 2 for a key of a dict. Arrays lie under the keys joined by dots. What is empty, and None, is in the metadata
alone; texts are in a file of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from neutral.containers.folder import Folder
from neutral.containers.tree import Path
from neutral.errors import BadFile, Problem

METADATA = "_METADATA"
STRINGS = "_strings.json"
LARGEST = 16 << 20
_MOST_BRACKETS = 1 << 20

EMPTY: Mapping[str, object] = {"None": None, "Dict": {}, "List": [], "Tuple": (), "NamedTuple": None}
"""The values that are in the metadata alone, by the names of their types."""

STRING, SCALAR, ARRAY = "string", "scalar", "np.ndarray"


@dataclass(frozen=True)
class Item:
    """One leaf: the name of its array, the type of its value."""

    name: str
    kind: str


@dataclass(frozen=True)
class TreeMetadata:
    """The leaves of a checkpoint in order, and how their arrays are stored.

    `lists` are the paths of what is a list or tuple. `complete`: every chunk was written, also one that equals the
    fill value, so that a missing one is damage.
    """

    items: Mapping[Path, Item]
    lists: tuple[Path, ...]
    ocdbt: bool | None
    zarr3: bool
    complete: bool
    custom: Any


def read_metadata(folder: Folder, prefix: str = "") -> TreeMetadata:
    """The metadata of the checkpoint in a folder, or in a folder below it."""
    fields = read_json(folder, f"{prefix}{METADATA}")
    where = f"{folder.path}: {prefix}{METADATA}"
    tree = fields.get("tree_metadata")
    if not isinstance(tree, dict):
        _refuse(where, "no tree_metadata", "the tree of a checkpoint")
    items: dict[Path, Item] = {}
    lists: dict[Path, None] = {}
    names: set[str] = set()
    for text, entry in tree.items():
        path, sequences = _path(entry, f"{where}: {text}")
        kind = entry.get("value_metadata")
        kind = kind.get("value_type") if isinstance(kind, dict) else None
        name = ".".join(path)
        if not isinstance(kind, str) or path in items or name in names:
            _refuse(f"{where}: {text}", "a leaf without a type, or of a name that is there twice", "each leaf once")
        items[path] = Item(name, kind)
        names.add(name)
        lists |= dict.fromkeys(sequences)
    settings = [fields.get(name) for name in ("use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value")]
    if any(setting not in (None, True, False) for setting in settings):
        _refuse(where, "settings that are neither true nor false", "those of Orbax")
    return TreeMetadata(
        items, tuple(lists), settings[0], bool(settings[1]), bool(settings[2]), fields.get("custom_metadata")
    )


def _path(entry: object, where: str) -> tuple[Path, list[Path]]:
    """A leaf's path, and those of the lists on the way to it."""
    keys = entry.get("key_metadata") if isinstance(entry, dict) else None
    if not isinstance(keys, list) or len(keys) > 256:
        _refuse(where, "no list of keys", "key_metadata")
    path: list[str] = []
    lists: list[Path] = []
    for key in keys:
        name = key.get("key") if isinstance(key, dict) else None
        if not isinstance(name, str | int) or key.get("key_type") not in (1, 2):
            _refuse(where, "a key without a name, or of an unknown type", "names, of type 1 or 2")
        if key["key_type"] == 1:
            lists.append(tuple(path))
        path.append(str(name))
    return tuple(path), lists


def read_strings(folder: Folder, prefix: str = "") -> Mapping[str, Any]:
    """The texts of a checkpoint, by the names of their leaves."""
    return {} if folder.size(f"{prefix}{STRINGS}") is None else read_json(folder, f"{prefix}{STRINGS}")


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A file that is one JSON object."""
    raw = folder.read(name, LARGEST)
    where = f"{folder.path}: {name}"
    if raw.count(b"[") + raw.count(b"{") > _MOST_BRACKETS:
        _refuse(where, f"over {_MOST_BRACKETS} lists", "fewer")
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _refuse(where, f"text that is no JSON ({error})", "JSON")
    if not isinstance(fields, dict):
        _refuse(where, "JSON of something else", "an object")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key used twice")
    return found


def metadata_text(items: Iterable[tuple[Path, str]], lists: Iterable[Path], custom: Any = None) -> str:
    """The metadata of a new checkpoint of plain files: paths in order, with the types of their values."""
    known = set(lists)
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": 1 if path[:i] in known else 2} for i, key in enumerate(path)],
            "value_metadata": {"value_type": kind, "skip_deserialize": kind in EMPTY},
        }
        for path, kind in items
    }
    return json.dumps({"tree_metadata": tree, **_PLAIN, "custom_metadata": custom})


_PLAIN = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}


def plain_text(folder: Folder, prefix: str) -> str:
    """The metadata of a checkpoint as they are, but for how its arrays are stored: in plain files, every chunk."""
    return json.dumps({**read_json(folder, f"{prefix}{METADATA}"), **_PLAIN})


def _refuse(where: str, found: str, expected: str) -> NoReturn:
    raise BadFile(Problem(where, found, expected, "the file is damaged or forged"))
