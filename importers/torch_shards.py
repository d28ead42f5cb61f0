"""A copy of a folder of torch's shards with other weights: every shard filled, index and small files as they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from neutral.containers.files import SourceFile, new_file, new_folder, refuse_same
from neutral.containers.hub_folder import copy_companions
from neutral.containers.safetensors import read_index, shard_path
from neutral.errors import BadFile, Problem
from neutral.importers import torch
from neutral.native import Tensor

SINGLE = "pytorch_model.bin"


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """`out` is a new folder with the files of the template's folder."""
    folder = template if template.is_dir() else template.parent
    refuse_same(out, folder)
    indexes = sorted(folder.glob("*.bin.index.json")) if template.is_dir() else [template]
    if len(indexes) > 1:
        raise BadFile(Problem(str(template), f"{len(indexes)} indexes", "one", "name the index itself"))
    with new_folder(out, force) as made:
        if not indexes:
            torch.fill(folder / SINGLE, tensors, made / SINGLE, key=key)
            copy_companions(folder, made, frozenset({SINGLE}))
            return
        places = read_index(indexes[0])
        for shard in dict.fromkeys(places.values()):
            mine = {name: tensor for name, tensor in tensors.items() if places.get(name) == shard}
            torch.fill(shard_path(indexes[0], shard), mine, made / shard)
        with SourceFile(indexes[0]) as text, new_file(made / indexes[0].name) as file:
            file.write(text.read(0, text.size))
        copy_companions(folder, made, frozenset({*places.values(), indexes[0].name}))
