"""Sharded weights of Keras 3 as bytes: an index (`.weights.json`) and the HDF5 files beside it, read as one.

`{"metadata": {...}, "weight_map": {"/layers/dense/vars": "m_00000.weights.h5", "/layers/lstm/cell/vars": [...]}}`: the
variables of one object may lie in several files, under their numbers. Every variable of every file is in the map, each in
one file alone, and the numbers of an object have no gaps, for a missing one would give its name to the next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neutral.containers.files import Memory, SourceFile, new_file
from neutral.containers.hdf5 import Dataset, Hdf5Source, fill_hdf5, natural, open_hdf5
from neutral.containers.json_text import parse_json
from neutral.containers.safetensors import shard_path
from neutral.errors import BadFile, Problem, Refused, printable
from neutral.native import Tensor

SUFFIX = ".weights.json"

_LARGEST_INDEX = 16 << 20
_MOST_SHARDS = 1000


@dataclass(frozen=True)
class Shards:
    """An opened set: all variables as of one file, each shard's own by its name, and the index as text."""

    index: Path
    text: bytes
    whole: Hdf5Source
    sources: Mapping[str, Hdf5Source]
    files: tuple[SourceFile, ...]

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_shards(index: Path) -> Shards:
    """Open a set by its index; the structure of every shard is checked, no element is read."""
    with SourceFile(index) as file:
        if file.size > _LARGEST_INDEX:
            raise BadFile(Problem(str(index), f"{file.size} bytes of JSON", f"at most {_LARGEST_INDEX}"))
        text = file.read(0, file.size)
    document = parse_json(text, str(index))
    places = _places(index, document)
    names = list(dict.fromkeys(name for shards in places.values() for name in shards))
    if len(names) > _MOST_SHARDS:
        raise BadFile(Problem(str(index), f"{len(names)} shards", f"at most {_MOST_SHARDS}"))
    files: list[SourceFile] = []
    try:
        sources = {}
        for name in names:
            files.append(SourceFile(shard_path(index, name)))
            section = files[-1].section(0, files[-1].size)
            sources[name] = open_hdf5(section, str(files[-1].path))
        whole = _merged(index, places, sources)
        _check_total(index, document, whole)
    except BaseException:
        for file in files:
            file.close()
        raise
    return Shards(index, text, whole, sources, tuple(files))


def _places(index: Path, document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group -> the shards that its variables lie in."""
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise BadFile(Problem(str(index), "no weight_map", "groups of variables and the files that hold them"))
    places: dict[str, list[str]] = {}
    for group, told in weight_map.items():
        shards = told if isinstance(told, list) else [told]
        for shard in shards:
            if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
                where = f"{index}: {printable(group, 100)}"
                raise BadFile(Problem(where, f"the shard {shard!r}", "the plain name of a file beside the index"))
        if len(set(shards)) != len(shards) or not shards or group.strip("/") in places:
            where = f"{index}: {printable(group, 100)}"
            raise BadFile(Problem(where, "no shard, or the same twice", "each shard of a group once"))
        places[group.strip("/")] = shards
    return places


def _merged(index: Path, places: Mapping[str, Sequence[str]], sources: Mapping[str, Hdf5Source]) -> Hdf5Source:
    groups: dict[str, dict[str, Any]] = {}
    datasets: dict[str, Dataset] = {}
    start = 0
    for shard, source in sources.items():
        for path, attributes in source.groups.items():
            known = groups.setdefault(path, {})
            if any(known.get(name, value) != value for name, value in attributes.items()):
                raise BadFile(Problem(f"{source.where}: {path}", "other attributes than in another shard", "the same"))
            known.update(attributes)
        for path, dataset in source.datasets.items():
            if shard not in places.get(path.rpartition("/")[0], ()):
                where = f"{source.where}: {path}"
                raise BadFile(Problem(where, "a variable that the index has not in this shard", "those it has"))
            if path in datasets:
                raise BadFile(Problem(f"{source.where}: {path}", "a variable that another shard has", "each once"))
            datasets[path] = replace(dataset, address=start + dataset.address)
        start += source.storage.nbytes
    _check_numbers(index, places, datasets)
    ordered = dict(sorted(datasets.items(), key=lambda item: natural(item[0])))
    return Hdf5Source(Memory(b""), str(index), groups, ordered)


def _check_numbers(index: Path, places: Mapping[str, Sequence[str]], datasets: Mapping[str, Dataset]) -> None:
    numbers: dict[str, set[str]] = {group: set() for group in places}
    for path in datasets:
        group, _, number = path.rpartition("/")
        numbers[group].add(number)
    for group, found in numbers.items():
        if found != {str(i) for i in range(len(found))} or not found:
            what = f"variables {', '.join(sorted(found))[:80] or 'of no number'}"
            raise BadFile(Problem(f"{index}: {printable(group, 100)}", what, "0, 1, 2 and so on", "a shard is missing"))


def _check_total(index: Path, document: Mapping[str, Any], whole: Hdf5Source) -> None:
    """Keras notes how many bytes all variables have: an index without its last shards has fewer."""
    metadata = document.get("metadata")
    told = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    found = sum(dataset.tensor.nbytes for dataset in whole.datasets.values())
    if isinstance(told, int | float) and told > found:
        raise BadFile(Problem(str(index), f"{found} bytes of variables", f"{told:g}", "a shard is missing"))


def fill_shards(opened: Shards, tensors: Mapping[str, Tensor], out: Path, force: bool) -> None:
    """A copy of the set with some variables replaced: `out` is its index, and its shards are named after it."""
    names = {shard: _renamed(opened, shard, out) for shard in opened.sources}
    _check_names(opened, names, out)
    for shard, source in opened.sources.items():
        mine = {path: tensors[path] for path in source.datasets if path in tensors}
        with new_file(out.parent / names[shard], force) as file:
            fill_hdf5(source, mine, file)
    with new_file(out, force) as file:
        file.write(opened.text if all(name == shard for shard, name in names.items()) else _reworded(opened, names))


def _renamed(opened: Shards, shard: str, out: Path) -> str:
    """`old_00000.weights.h5` as `new_00000.weights.h5`, where the index is `old.weights.json`."""
    old, new = (_stem(path) for path in (opened.index, out))
    return f"{new}{shard.removeprefix(old)}" if shard.startswith(f"{old}_") else shard


def _stem(path: Path) -> str:
    return path.name[: -len(SUFFIX)] if path.name.lower().endswith(SUFFIX) else path.stem


def _check_names(opened: Shards, names: Mapping[str, str], out: Path) -> None:
    """No shard takes the place of another, of the index, or of one of the template's in the same folder."""
    taken = list(names.values())
    # An output is written into a folder of its own beside its place first.
    near = opened.index.parent.resolve() in (out.parent.resolve(), out.parent.resolve().parent)
    clash = [name for name in taken if taken.count(name) > 1 or name == out.name or (near and name in opened.sources)]
    if clash:
        what = f"a shard {printable(clash[0], 100)} where there is one already"
        raise Refused(Problem(str(out), what, "another name, or another folder", "choose another output"))


def _reworded(opened: Shards, names: Mapping[str, str]) -> bytes:
    document = parse_json(opened.text, str(opened.index))

    def renamed(told: Any) -> Any:
        return [names[shard] for shard in told] if isinstance(told, list) else names[told]

    document["weight_map"] = {group: renamed(told) for group, told in document["weight_map"].items()}
    return json.dumps(document, indent=4).encode()
