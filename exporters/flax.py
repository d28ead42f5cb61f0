"""Flax's files and live objects, read into native layers. Files are read without Flax and JAX.

    model = read(Path("model.msgpack"))                    flax.serialization: variables, parameters or a TrainState
    model = read(Path("checkpoints/100"))                  a folder of Orbax, or a CheckpointManager's with its steps
    model = read(Path("model.safetensors"))                a flattened tree
    model = read(Path("state.msgpack"), key="ema_params")  one of several sets of weights in it
    model = read_live(variables)                           a dict of arrays, a FrozenDict, a TrainState, an nnx.Module

A file says no classes. Names that Linen gives by itself (`Dense_0`) and the parts of a layer (`cell/hi/kernel`) tell many of
them; the others stay open. The classes and settings of a live nnx.Module are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neutral.containers.pytree import PyTree, read_msgpack, read_orbax, split_key
from neutral.containers.safetensors import open_safetensors
from neutral.conventions.flax import full_name, separator_of
from neutral.errors import BadFile, Problem, printable
from neutral.exporters.flax_live import live_arrays, with_class
from neutral.exporters.flax_scan import auto_named
from neutral.exporters.flax_tree import WeightSet, choose, layers
from neutral.native import NativeModel


def read_live(model: Any) -> NativeModel:
    """The weights of a dict of arrays, a FrozenDict, a State, a TrainState or an nnx.Module."""
    live = live_arrays(model)
    chosen = choose(live.leaves, None, type(model).__name__, live.identities)
    found = layers(chosen.weights, live.known if live.classes else auto_named)
    found = tuple(with_class(layer, live.place(layer.path), live.classes) for layer in found)
    skipped = (f"{len(live.skipped)} PRNG keys are no weights, left out",) if live.skipped else ()
    return NativeModel("flax", "live", found, collections=chosen.rest, notes=(*_notes(chosen), *skipped))


_PLAIN = (type(None), bool, int, float, str, list, dict)
"""What of the entries that are no arrays JSON can keep."""


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The weights in a file or folder; `key` (keys joined by dots) names the set if there are several."""
    if source.is_dir():
        return _read_orbax(source, key)
    with source.open("rb") as file:
        head = file.read(10)
    if head[6:9] == b"\0\0{" or head[8:9] == b"{":
        return _read_safetensors(source, key)
    return _model(read_msgpack(source), "msgpack", key, str(source))


def _model(tree: PyTree, form: str, key: str | None, where: str, told: Mapping[str, Any] | None = None) -> NativeModel:
    try:
        chosen = choose(tree.leaves, key, where)
        found = layers(chosen.weights)
        order = [full_name(path) for path in tree.leaves]
        metadata: dict[str, Any] = {"metadata": {**_remembered(tree), **(told or {})}}
        if order != [tensor.name for layer in found for tensor in layer.tensors.values()]:
            metadata["order"] = order
        if chosen.several:
            metadata["metadata"]["several"] = True
        notes = _notes(chosen)
        return NativeModel(
            "flax", form, found, collections=chosen.rest, metadata=metadata, notes=notes, close=tree.close
        )
    except BaseException:
        tree.close()
        raise


def _notes(chosen: WeightSet) -> tuple[str, ...]:
    names = chosen.left_out
    return (f"arrays beside the weights, left out: {', '.join(printable(n, 80) for n in names[:10])}",) if names else ()


def _remembered(tree: PyTree) -> dict[str, Any]:
    """What a new file needs to be as this one was: what is no array, and what the container tells of the tree."""
    plain = [[list(path), value] for path, value in tree.others.items() if isinstance(value, _PLAIN)]
    return {name: value for name, value in (("others", plain), ("tree", dict(tree.metadata))) if value}


def _read_orbax(source: Path, key: str | None) -> NativeModel:
    """`key` may name the step (or item), the set of weights in it, or both: `100/ema_params`."""
    place, rest = split_key(source, key)
    return _model(read_orbax(source, place), "orbax", rest, str(source))


def _read_safetensors(source: Path, key: str | None) -> NativeModel:
    opened = open_safetensors(source)
    try:
        if not opened.tensors:
            raise BadFile(Problem(str(source), "no tensor", "at least one", "is this a file of weights?"))
        separator = separator_of(opened.tensors)
        leaves = {tuple(name.split(separator)): data for name, data in opened.tensors.items()}
        tree = PyTree(leaves, close=opened.close)
    except BaseException:
        opened.close()
        raise
    pairs = [list(pair) for pair in opened.metadata.items()]
    return _model(tree, "flax-safetensors", key, str(source), {"pairs": pairs, "separator": separator})
