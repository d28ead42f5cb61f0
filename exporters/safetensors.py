"""safetensors files of torch state dicts, read into native layers without torch.

    model = read(Path("model.safetensors"))                     one file
    model = read(Path("model.safetensors.index.json"))          a set of shards, by its index
    model = read(Path("Llama-3-8B/"))                           a folder that holds one of these

Names are torch's, and so are the layouts. A file whose metadata says that another framework laid out its tensors
(`"format": "tf"`, `"flax"`, `"mlx"`) is refused, for its names cannot tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from neutral.containers.hub_folder import provenance, refuse_rival, unread
from neutral.containers.safetensors import TensorSet, aliases, open_safetensors, usual_order
from neutral.errors import BadFile, Problem, Refused, WrongUsage
from neutral.exporters.state_dict import common_prefix, layers_from_state_dict
from neutral.native import NativeModel, NativeTensor

_OTHER_LAYOUTS: Final = ("tf", "flax", "jax", "mlx", "keras", "paddle", "pd")


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The tensors of a file, an index of shards, or a folder with one of them.

    A tied tensor that `safetensors.torch.save_model` left out is given under its own name too, with the identity of
    the one that was kept.
    """
    if key is not None:
        raise WrongUsage(
            Problem(str(source), f"the key {key!r}", "none", "a safetensors file holds one set of weights")
        )
    opened = open_safetensors(source)
    try:
        return _model(source, opened)
    except BaseException:
        opened.close()
        raise


def _model(source: Path, opened: TensorSet) -> NativeModel:
    written_for = opened.metadata.get("format")
    if written_for in _OTHER_LAYOUTS:
        raise Refused(Problem(str(source), f"tensors in the layout of {written_for}", "those of a torch state dict"))
    if not opened.tensors:
        raise BadFile(Problem(str(source), "no tensor", "at least one", "is this a file of weights?"))
    ties = aliases(opened)
    kept = set(ties.values())
    tensors = {
        name: NativeTensor(name, data, ("tie", name) if name in kept else None) for name, data in opened.tensors.items()
    }
    tensors |= {alias: NativeTensor(alias, opened.tensors[name], ("tie", name)) for alias, name in ties.items()}
    prefix = common_prefix(tensors)
    notes = [f"the prefix {prefix} of every name is left out of the layer paths"] if prefix else []
    if source.is_dir():
        files = [file.path.name for file in opened.files]
        if opened.index is not None:
            refuse_rival(opened.index, files)
        notes += unread(source, files)
    return NativeModel(
        framework="torch",
        format="safetensors",
        layers=layers_from_state_dict(tensors),
        metadata=_metadata(opened) | ({"provenance": beside} if (beside := _beside(source, opened)) else {}),
        notes=tuple(notes),
        close=opened.close,
    )


def _beside(source: Path, opened: TensorSet) -> dict[str, Any]:
    """What a folder of Hugging Face says of its model; nothing of a single file that was named itself."""
    if source.is_dir():
        return provenance(source)
    return provenance(opened.index.parent) if opened.index is not None else {}


def _metadata(opened: TensorSet) -> dict[str, Any]:
    """What a new file needs to be as this one was: its metadata, and its order where that is not the usual one.

    The metadata are pairs, for an archive sorts the keys of a mapping. A set of shards becomes one file, in the usual order.
    """
    found: dict[str, Any] = {"metadata": [list(pair) for pair in opened.metadata.items()]}
    if opened.index is None and list(opened.tensors) != [name for name, _ in usual_order(opened.tensors.items())]:
        found["order"] = list(opened.tensors)
    return found
