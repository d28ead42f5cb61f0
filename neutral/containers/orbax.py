"""Orbax's checkpoint folders: a tree in `_METADATA`, its arrays in zarr, in plain files or in an OCDBT.

>>> import pathlib, tempfile
>>> import numpy as np
>>> from neutral.native import from_array
>>> folder = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
>>> write({("params", "fc", "kernel"): from_array(np.arange(6.0).reshape(2, 3))}, {("step",): 1}, folder)
>>> tree = read(folder)
>>> tree.leaves[("params", "fc", "kernel")].read()[1], tree.leaves[("step",)].read()
(array([3., 4., 5.]), array(1))

A checkpoint is a folder with `_METADATA`. A CheckpointManager's folder holds one in each step (`100/default`), or
several (`100/params`, `100/state`). Before there was `_METADATA` (Orbax of 2023, and Flax's own checkpoints of that time)
the tree was in a msgpack file, `checkpoint`, which says of each array where it lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from neutral.containers import msgpack
from neutral.containers.codecs import Cursors
from neutral.containers.files import leads_outside, new_folder, refuse_inside, refuse_same
from neutral.containers.folder import Folder, copy_file, walk
from neutral.containers.ocdbt import MANIFEST, open_ocdbt
from neutral.containers.orbax_aggregate import AGGREGATE, is_aggregate, read_aggregate
from neutral.containers.orbax_metadata import (
    ARRAY,
    EMPTY,
    METADATA,
    SCALAR,
    STRING,
    STRINGS,
    TreeMetadata,
    metadata_text,
    plain_text,
    read_metadata,
    read_strings,
)
from neutral.containers.tree import DTYPES, Path, PyTree, dotted, grouped, in_order, misfits
from neutral.containers.zarr import Source, Store, ZarrArray, read_array
from neutral.containers.zarr_writing import rewrite_chunks, write_array
from neutral.errors import BadFile, Problem, Refused, Unsupported, printable, raise_all
from neutral.native import Tensor, from_array

_MOST_CHILDREN = 10_000
_MOST_LEAVES = 1 << 18
_UNFINISHED = ".orbax-checkpoint-tmp"


def checkpoints(folder: FilePath) -> list[str]:
    """The checkpoints in a folder by their places below it: `""` for itself, else those of steps and items."""
    if _is_checkpoint(folder):
        return [""]
    found: list[str] = []
    for child in _folders(folder):
        if _is_checkpoint(folder / child):
            found.append(child)
        else:
            found += (f"{child}/{item}" for item in _folders(folder / child) if _is_checkpoint(folder / child / item))
    return found


def _is_checkpoint(folder: FilePath) -> bool:
    metadata = folder / METADATA
    return (metadata.is_file() and not metadata.is_symlink()) or is_aggregate(folder / AGGREGATE)


def _folders(folder: FilePath) -> list[str]:
    with os.scandir(folder) as entries:
        first = [
            e.name for e, _ in zip(entries, range(_MOST_CHILDREN), strict=False) if e.is_dir(follow_symlinks=False)
        ]
    return sorted((n for n in first if _UNFINISHED not in n), key=lambda n: (not n.isdigit(), len(n) * n.isdigit(), n))


def locate(folder: FilePath, key: str | None) -> str:
    """The place of the checkpoint that is meant: the only one, or the one that `key` names."""
    found = checkpoints(folder)
    if not found:
        raise BadFile(
            Problem(str(folder), f"no {METADATA} in it", "a checkpoint of Orbax", "name the checkpoint itself")
        )
    if key is None and len(found) == 1:
        return found[0]
    steps = [place.split("/")[0] for place in found]
    names = [step if steps.count(step) == 1 else place for step, place in zip(steps, found, strict=True)]
    wanted = [p for p in found if key is not None and key.strip("/") in (p, p.split("/")[0], p.split("/")[-1])]
    if len(wanted) == 1 and key:
        return wanted[0]
    listed = ", ".join(name or "itself" for name in names[:20]) + (", …" if len(names) > 20 else "")
    what = f"{len(found)} checkpoints: {listed}" if key is None else f"the key {key!r} for {listed}"
    keys = ", ".join(f"--key {printable(name, 80)}" for name in names[:20] if name)
    raise Refused(Problem(str(folder), what, "one", f"choose one: {keys}"))


def split_key(folder: FilePath, key: str | None) -> tuple[str | None, str | None]:
    """The beginning of a key that names a checkpoint, and the rest, which names something in it.

    `100/params` may be a checkpoint of a step, or the parameters in the only checkpoint of one.
    """
    if key is None:
        return None, None
    found = checkpoints(folder)
    named = {name for place in found if place for name in (place, *place.split("/"))}
    parts = key.strip("/").split("/")
    for i in range(min(2, len(parts)), 0, -1):
        if "/".join(parts[:i]) in named:
            return "/".join(parts[:i]), "/".join(parts[i:]) or None
    return (None, key) if len(found) == 1 else (key, None)


def read(path: FilePath, key: str | None = None) -> PyTree:
    """The tree of a checkpoint, its arrays unread."""
    opened = _Checkpoint(path, locate(path, key))
    try:
        return opened.tree()
    except BaseException:
        opened.close()
        raise


class _Checkpoint:
    """An opened checkpoint: its metadata, and the store of its arrays."""

    def __init__(self, path: FilePath, place: str) -> None:
        self.folder = Folder(path / place if place else path)
        self.inside: PyTree | None = None
        self.metadata: TreeMetadata
        if self.folder.size(METADATA) is None:
            self.metadata, self.inside = read_aggregate(self.folder)
        else:
            self.metadata = read_metadata(self.folder)
        ocdbt = self.folder.size(MANIFEST) is not None if self.metadata.ocdbt is None else self.metadata.ocdbt
        self._cursors = Cursors()
        self._store: Store = open_ocdbt(self.folder) if ocdbt else self.folder
        self.plain = not ocdbt
        self.arrays: dict[Path, ZarrArray] = {}
        self.others: dict[Path, object] = {}
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        where = str(self.folder.path)
        if len(self.metadata.items) > _MOST_LEAVES:
            raise BadFile(Problem(where, f"over {_MOST_LEAVES} leaves", "fewer"))
        source = Source(where, self._cursors, fills=not self.metadata.complete)
        strings: Mapping[str, Any] | None = None
        for path, item in self.metadata.items.items():
            if item.kind in EMPTY:
                self.others[path] = EMPTY[item.kind]
            elif item.kind == STRING:
                strings = read_strings(self.folder) if strings is None else strings
                if not isinstance(strings.get(item.name), str):
                    raise BadFile(Problem(f"{where}: {item.name}", "no text", f"one in {STRINGS}"))
                self.others[path] = strings[item.name]
            else:
                if leads_outside(item.name) or "\0" in item.name:
                    raise BadFile(Problem(f"{where}: {item.name}", "a name that leads elsewhere", "one in the folder"))
                array = read_array(self._store, item.name, source)
                if array is None and self.inside is None and self.folder.size(AGGREGATE) is not None:
                    found = f"a value that may be in the file {AGGREGATE!r}, as in Orbax of 2023"
                    raise Unsupported(Problem(f"{where}: {item.name}", found, "an array", "save it with a newer Orbax"))
                if array is None:
                    raise BadFile(Problem(f"{where}: {item.name}", "no array", "that of the leaf", "get it again"))
                self.arrays[path] = array
        source.check("")

    @property
    def leaves(self) -> dict[Path, Tensor]:
        """Every array, those in the file of the tree last."""
        return {path: array.tensor for path, array in self.arrays.items()} | dict(
            {} if self.inside is None else self.inside.leaves
        )

    def tree(self) -> PyTree:
        metadata: dict[str, Any] = {}
        if self.inside is not None:
            if self.metadata.lists:
                metadata["lists"] = [list(path) for path in self.metadata.lists]
            return PyTree(self.leaves, self.inside.others, metadata, self.close)
        items = self.metadata.items
        if list(items) != [*self.arrays, *self.others]:
            metadata["order"] = [list(path) for path in items]
        if self.metadata.lists:
            metadata["lists"] = [list(path) for path in self.metadata.lists]
        if scalars := [list(path) for path in self.arrays if items[path].kind == SCALAR]:
            metadata["scalars"] = scalars
        if self.metadata.custom is not None:
            metadata["custom_metadata"] = self.metadata.custom
        return PyTree(self.leaves, self.others, metadata, self.close)

    def close(self) -> None:
        if self.inside is not None:
            self.inside.close()
        self._cursors.clear()
        self.folder.close()


def write(
    leaves: Mapping[Path, Tensor],
    others: Mapping[Path, object],
    folder: FilePath,
    metadata: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """A new checkpoint of plain files; `metadata` as `read` gives them."""
    remembered = metadata or {}
    scalars = {tuple(path) for path in remembered.get("scalars", ())}
    arrays = dict(leaves)
    texts: dict[Path, str] = {}
    kinds: dict[Path, str] = {}
    problems = list(_unwritable(leaves, others))
    for path, value in others.items():
        kind = next((k for k, empty in EMPTY.items() if type(value) is type(empty) and value == empty), None)
        if kind is not None:
            kinds[path] = kind
        elif isinstance(value, str):
            kinds[path], texts[path] = STRING, value
        elif isinstance(value, bool | int | float) and (not isinstance(value, int) or -(1 << 63) <= value < 1 << 63):
            kinds[path], arrays[path] = SCALAR, from_array(np.asarray(value))
        else:
            found = f"{type(value).__name__} {value!r}"[:80]
            problems.append(Problem(dotted(path), found, "an array, a number, a text, None or something empty"))
    raise_all(Refused, problems)
    order = in_order([*leaves, *others], remembered.get("order"))
    grouped(dict.fromkeys(order))
    items = [
        (path, kinds.get(path) or (SCALAR if path in scalars and not leaves[path].shape else ARRAY)) for path in order
    ]
    lists = [tuple(path) for path in remembered.get("lists", ())]
    with new_folder(folder, force) as out:
        (out / METADATA).write_text(metadata_text(items, lists, remembered.get("custom_metadata")), "utf-8")
        if texts:
            (out / STRINGS).write_text(_strings(texts), "utf-8")
        for path in order:
            if path in arrays:
                write_array(out, ".".join(path), arrays[path])


def _strings(texts: Mapping[Path, str]) -> str:
    return json.dumps({".".join(path): text for path, text in texts.items()}, separators=(",", ":"))


def _unwritable(leaves: Mapping[Path, Tensor], others: Mapping[Path, object]) -> Iterator[Problem]:
    names: dict[str, Path] = {}
    for path in (*leaves, *others):
        name = ".".join(path)
        parts = name.split("/")
        if (path in leaves and path in others) or names.setdefault(name, path) != path:
            yield Problem(dotted(path), f"two leaves of the name {name}", "one")
        bad = leads_outside(name) or "\0" in name or not all(part not in ("", ".") for part in parts)
        if bad or name in (METADATA, STRINGS) or any(len(part.encode()) > 250 for part in parts):
            yield Problem(dotted(path), "a name that no folder can have", "plain names")
    inside = {"/".join(name.split("/")[:i]) for name in names for i in range(1, name.count("/") + 1)}
    for name, path in names.items():
        if name in inside:
            yield Problem(dotted(path), "a name that other names begin with", "names apart")
    for path, tensor in leaves.items():
        if tensor.dtype.name not in DTYPES:
            yield Problem(dotted(path), f"dtype {tensor.dtype}", f"one of {', '.join(DTYPES)}")
        if tensor.size == 0:
            yield Problem(
                dotted(path), f"an array of shape {list(tensor.shape)}", "elements, for Orbax has no empty one"
            )


def replace(
    template: FilePath, tensors: Mapping[Path, Tensor], folder: FilePath, key: str | None = None, *, force: bool = False
) -> list[str]:
    """A copy of a folder in which the arrays named have other elements, and all else stays as it was.

    Chunks of zarr 2 in plain files are written where they lie, compressed as they were. A checkpoint in OCDBT or zarr
    3 becomes one of zarr 2 in plain files, with the metadata of the template: a note then says so.
    """
    refuse_same(folder, template)
    refuse_inside(folder, template)
    place = locate(template, key)
    opened = _Checkpoint(template, place)
    try:
        raise_all(Refused, misfits(template, opened.leaves, tensors))
        in_place = opened.plain and all(array.layout.version == 2 for array in opened.arrays.values())
        if opened.inside is not None and not in_place:
            found = f"the tree in a file {AGGREGATE!r}, as in Orbax of 2023, and arrays in OCDBT"
            raise Unsupported(Problem(str(template), found, "plain files of zarr 2", "save it with a newer Orbax"))
        root = f"{place}/" if place else ""
        with new_folder(folder, force) as out:
            if in_place:
                _rewrite(opened, template, tensors, out, root)
            else:
                _rebuild(opened, template, tensors, out, root)
        return [] if in_place else [_restored(opened, template)]
    finally:
        opened.close()


def _restored(opened: _Checkpoint, template: FilePath) -> str:
    versions = {array.layout.version for array in opened.arrays.values()}
    zarr = f"zarr {' and '.join(str(v) for v in sorted(versions))}" if versions else "zarr"
    stored = f"{zarr} in plain files" if opened.plain else f"{zarr} in an OCDBT"
    return f"{template} has its arrays as {stored}, the copy as zarr 2 in plain files, which Orbax restores as well"


def _rewrite(opened: _Checkpoint, template: FilePath, tensors: Mapping[Path, Tensor], out: FilePath, root: str) -> None:
    """The folder with new chunks of the arrays named."""
    written: set[str] = set()
    inside: dict[Path, Tensor] = {}
    for path, tensor in tensors.items():
        if path not in opened.arrays:
            inside[path] = tensor
            continue
        array = opened.arrays[path]
        written |= {root + name for name in rewrite_chunks(out / root, array.name, array.layout, tensor)}
    if inside:
        (out / root).mkdir(parents=True, exist_ok=True)
        msgpack.replace(opened.folder.path / AGGREGATE, inside, out / root / AGGREGATE)
        written.add(root + AGGREGATE)
    for name, is_folder in walk(template):
        if is_folder:
            (out / name).mkdir(parents=True, exist_ok=True)
        elif name not in written:
            copy_file(template / name, out / name)


def _rebuild(opened: _Checkpoint, template: FilePath, tensors: Mapping[Path, Tensor], out: FilePath, root: str) -> None:
    """The folder with all arrays of the checkpoint as new plain files in place of what held them."""
    arrays = {array.name for array in opened.arrays.values()}
    for name, is_folder in walk(template):
        if name.startswith(root) and _holds_arrays(name[len(root) :], arrays):
            continue
        if is_folder:
            (out / name).mkdir(parents=True, exist_ok=True)
        elif name != root + METADATA:
            copy_file(template / name, out / name)
    (out / root).mkdir(parents=True, exist_ok=True)
    (out / root / METADATA).write_text(plain_text(opened.folder, ""), "utf-8")
    for path, array in opened.arrays.items():
        write_array(out / root, array.name, tensors.get(path, array.tensor))


def _holds_arrays(name: str, arrays: Sequence[str] | set[str]) -> bool:
    """Whether a file or folder of a checkpoint is a part of its OCDBT, or of an array."""
    parts = name.split("/")
    ocdbt = parts[0] in ("d", MANIFEST) or parts[0].startswith(("ocdbt.process_", "manifest."))
    return ocdbt or any("/".join(parts[:i]) in arrays for i in range(1, len(parts) + 1))
