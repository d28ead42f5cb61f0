"""A torch state dict in several files with an index, as Hugging Face wrote it before safetensors.

model = read(Path("model/pytorch_model.bin.index.json"))        or the folder that holds it
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from neutral.containers.hub_folder import provenance, refuse_rival, unread
from neutral.containers.safetensors import read_index, shard_path
from neutral.errors import BadFile, Problem, WrongUsage, printable, raise_all
from neutral.exporters import torch
from neutral.exporters.state_dict import layers_from_state_dict
from neutral.native import NativeModel, NativeTensor

SINGLE = "pytorch_model.bin"
INDEX = "*.bin.index.json"


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The tensors of all shards under their names; a folder with one file alone is that file."""
    folder = source if source.is_dir() else source.parent
    index = index_of(source)
    if index is None:
        model = torch.read(source / SINGLE, key=key)
        notes = (*model.notes, *unread(folder, [SINGLE]))
        return replace(model, metadata={**model.metadata, "provenance": provenance(folder)}, notes=notes)
    if key is not None:
        raise WrongUsage(Problem(str(source), f"the key {key!r}", "none", "a set of shards holds one set of weights"))
    places = read_index(index)
    if source.is_dir():
        refuse_rival(index, places.values())
    with ExitStack() as stack:
        tensors = dict(_shards(index, places, stack))
        model = NativeModel(
            "torch",
            "bin-shards",
            layers_from_state_dict({name: tensors[name] for name in places}),
            metadata={"provenance": provenance(folder)},
            notes=tuple(unread(folder, places.values())) if source.is_dir() else (),
        )
        return replace(model, close=stack.pop_all().close)


def index_of(source: Path) -> Path | None:
    """The index that a path names or a folder holds; None for a folder with a single file."""
    if not source.is_dir():
        return source
    found = sorted(source.glob(INDEX))
    if len(found) > 1:
        names = ", ".join(printable(path.name, 60) for path in found[:5])
        raise BadFile(Problem(str(source), f"{len(found)} indexes: {names}", "one", "name the index itself"))
    return found[0] if found else None


def _shards(index: Path, places: Mapping[str, str], stack: ExitStack) -> dict[str, NativeTensor]:
    found: dict[str, NativeTensor] = {}
    problems: list[Problem] = []
    for shard in dict.fromkeys(places.values()):
        model = torch.read(shard_path(index, shard))
        stack.callback(model.close)
        for tensor in model.tensors():
            if places.get(tensor.name) != shard:
                mapped = places.get(tensor.name)
                problems.append(
                    Problem(f"{index}: {tensor.name}", f"in {shard}", f"in {mapped}" if mapped else "in the index, too")
                )
            # Two files count their records alike: only tensors of one file are tied.
            identity = None if tensor.identity is None else (shard, tensor.identity)
            found[tensor.name] = replace(tensor, identity=identity)
    problems += (
        Problem(f"{index}: {name}", f"no such tensor in {shard}", "it where the index says")
        for name, shard in places.items()
        if name not in found
    )
    raise_all(BadFile, problems[:20])
    return found
