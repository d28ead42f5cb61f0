"""The files in which JAX's libraries keep trees of arrays: Flax's msgpack and Orbax's folders, read and written alike.

>>> import pathlib, tempfile
>>> import numpy as np
>>> from neutral.native import from_array
>>> path = pathlib.Path(tempfile.mkdtemp()) / "model.msgpack"
>>> write_msgpack({("params", "dense", "kernel"): from_array(np.ones((2, 3), "f4"))}, {("step",): 7}, path)
>>> tree = read_msgpack(path)
>>> tree.leaves[("params", "dense", "kernel")].shape, tree.others
((2, 3), {('step',): 7})

Nothing here needs JAX, and no layer is known: what the paths mean is for the framework's reader to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from neutral.containers import msgpack, orbax
from neutral.containers.orbax import split_key
from neutral.containers.tree import Path, PyTree
from neutral.native import Tensor

__all__ = [
    "Path",
    "PyTree",
    "read_msgpack",
    "read_orbax",
    "replace_msgpack",
    "replace_orbax",
    "split_key",
    "write_msgpack",
    "write_orbax",
]


def read_msgpack(path: FilePath) -> PyTree:
    """A file of `flax.serialization.to_bytes` or `msgpack_serialize`. Its close closes the file."""
    return msgpack.read(path)


def write_msgpack(
    leaves: Mapping[Path, Tensor],
    others: Mapping[Path, object],
    out: FilePath,
    metadata: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """A new file, as `flax.serialization.to_bytes` writes it: leaves, then others, each key where it is first seen.

    `metadata` are those of a tree read from such a file: they bring back its order, its lists, and keys that are ints.
    """
    msgpack.write(leaves, others, out, metadata, force=force)


def replace_msgpack(template: FilePath, tensors: Mapping[Path, Tensor], out: FilePath, *, force: bool = False) -> None:
    """A copy of a file in which the leaves named have other elements; all else stays byte for byte."""
    msgpack.replace(template, tensors, out, force=force)


def read_orbax(path: FilePath, key: str | None = None) -> PyTree:
    """A folder of Orbax: a checkpoint, or a CheckpointManager's folder with one step and one item in it.

    Where a folder holds several steps or items, `key` names one: `100`, `params` or `100/params`. Refused, with the
    names there are, if it is missing.
    """
    return orbax.read(path, key)


def write_orbax(
    leaves: Mapping[Path, Tensor],
    others: Mapping[Path, object],
    folder: FilePath,
    metadata: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """A new checkpoint folder of plain files, which Orbax's own checkpointers restore.

    `metadata` are those of a tree read from such a folder: they bring back its order, lists and dicts.
    """
    orbax.write(leaves, others, folder, metadata, force=force)


def replace_orbax(
    template: FilePath, tensors: Mapping[Path, Tensor], folder: FilePath, key: str | None = None, *, force: bool = False
) -> list[str]:
    """A copy of a checkpoint folder in which the leaves named have other elements.

    Plain zarr arrays are rewritten where they lie, in the template's own chunks. A template in OCDBT, whose values
    cannot be changed in place, becomes a folder of plain files with the same tree, which a note says.
    """
    return orbax.replace(template, tensors, folder, key, force=force)
