"""The msgpack file in which Orbax of 2023 kept the tree of a checkpoint, before there was `_METADATA`.

    {"params": {"kernel": "PLACEHOLDER://params.kernel"}, "step": 7}

A leaf is a value, an array (all of them, where Flax's own checkpoints were written with Orbax), or says in which folder of
zarr the array lies.
"""

from __future__ import annotations

import stat
from pathlib import Path as FilePath

from neutral.containers import msgpack
from neutral.containers.folder import Folder
from neutral.containers.orbax_metadata import ARRAY, Item, TreeMetadata
from neutral.containers.tree import Path, PyTree
from neutral.errors import BadFile, Problem

AGGREGATE = "checkpoint"
_PLACEHOLDER = "PLACEHOLDER://"
_MAPS = (*range(0x81, 0x90), 0xDE, 0xDF)
"""The first bytes of a map in msgpack. The file of this name that TensorFlow keeps is a text."""


def is_aggregate(path: FilePath) -> bool:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(1)[:1] in [bytes([first]) for first in _MAPS]
    except OSError:
        return False


def read_aggregate(folder: Folder) -> tuple[TreeMetadata, PyTree]:
    """Which arrays lie beside the file, and what is in it. Whoever asks closes the second."""
    folder.size(AGGREGATE)  # refuses what is no plain file
    tree = msgpack.read(folder.path / AGGREGATE)
    elsewhere: dict[Path, Item] = {}
    for path, value in tree.others.items():
        if isinstance(value, str) and value.startswith(_PLACEHOLDER):
            elsewhere[path] = Item(value.removeprefix(_PLACEHOLDER), ARRAY)
    if len({item.name for item in elsewhere.values()}) != len(elsewhere):
        tree.close()
        raise BadFile(Problem(f"{folder.path}: {AGGREGATE}", "two leaves in one place", "each in its own"))
    others = {path: value for path, value in tree.others.items() if path not in elsewhere}
    lists = tuple(tuple(path) for path in tree.metadata.get("lists", ()))
    # What zarr writes of an array that is its fill value throughout is nothing.
    metadata = TreeMetadata(elsewhere, lists, ocdbt=None, zarr3=False, complete=False, custom=None)
    return metadata, PyTree(tree.leaves, others, tree.metadata, tree.close)
