"""TensorFlow's checkpoints and SavedModels, read without TensorFlow.

    model = read(Path("ckpt-1"))           # ckpt-1.index and ckpt-1.data-00000-of-00001
    model = read(Path("exported_model"))   # a folder with saved_model.pb and variables/
    [layer.path for layer in model.layers]

A tensor's native name is its key in the checkpoint. Layers are named from the object graph inside, or, in files of
TensorFlow 1, from the names of the variables.
"""

from __future__ import annotations

import shutil
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from neutral.containers.saved_model import (
    OBJECT_GRAPH_KEY,
    KerasObject,
    Node,
    copies,
    keras_objects,
    locate,
    object_graph,
)
from neutral.containers.tensor_bundle import Bundle
from neutral.containers.tensor_bundle_entries import DT_STRING
from neutral.conventions.keras_config import Slot, slots
from neutral.conventions.keras_variables import STATE as STATE_VARIABLES
from neutral.errors import BadFile, Problem, Unsupported, WrongUsage, printable
from neutral.exporters.keras_graph import wired
from neutral.exporters.tensorflow_names import STATE, Group, by_name, by_place, natural, sort_keys, unique
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array

CHECKPOINT, SAVED_MODEL = "checkpoint", "savedmodel"

_MODEL_IDENTIFIERS = frozenset(("_tf_keras_sequential", "_tf_keras_network", "_tf_keras_model"))


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """A checkpoint prefix, its index, a folder of checkpoints (the latest), or a SavedModel folder.

    `key` chooses a collection (`ema`) to be read as the weights.
    """
    prefix, folder = locate(source)
    bundle = Bundle(prefix)
    try:
        return _model(bundle, folder, key)
    except BaseException:
        bundle.close()
        raise


def _model(bundle: Bundle, folder: Path | None, key: str | None) -> NativeModel:
    where = str(bundle.prefix)
    metadata: dict[str, Any] = {}
    nodes: tuple[Node, ...] = ()
    if OBJECT_GRAPH_KEY in bundle.entries:
        metadata["object_graph"] = _single_string(bundle, OBJECT_GRAPH_KEY)
        nodes = object_graph(metadata["object_graph"], where)
    objects = keras_objects(folder) if folder else {}
    twice = copies(bundle, nodes)
    if twice:
        metadata["copies"] = {copy: originals[0] for copy, originals in twice.items()}
    texts = [name for name, entry in bundle.entries.items() if entry.dtype == DT_STRING and name != OBJECT_GRAPH_KEY]
    if texts:
        metadata["strings"] = {
            name: {"shape": list(found.shape), "values": [b64encode(v).decode() for v in found.values]}
            for name, found in ((name, bundle.strings(name)) for name in texts)
        }
    if config := _root_config(objects):
        metadata["config"] = config
    tensors = {
        name: NativeTensor(name, bundle.tensor(name), identity=name)
        for name, entry in bundle.entries.items()
        if entry.dtype != DT_STRING and name not in twice
    }
    if not tensors:
        raise BadFile(Problem(where, "no tensors", "a checkpoint with at least one"))
    counters = frozenset(
        n for n, t in tensors.items() if t.data.shape == () and np.issubdtype(t.data.dtype, np.integer)
    )
    found = sort_keys(nodes, list(tensors), counters)
    known = {n: o.metadata["name"] for n, o in objects.items() if isinstance(o.metadata.get("name"), str)}
    groups = unique([*by_place(found.placed, nodes, known), *by_name(found.named, listed=bool(nodes))])
    collections = {
        name: tuple(_state(tensors[k], name == STATE) for k in sorted(keys, key=natural))
        for name, keys in sorted(found.collections.items())
    }
    notes = [f"{printable(name)}: strings, kept aside" for name in texts]
    if key is not None:
        groups, collections = _chosen(where, key, groups, found.collections, collections, tensors)
    layers = tuple(_layer(group, objects, tensors) for group in groups)
    ordered = bool(groups) and all(group.positional for group in groups)
    model = NativeModel(
        framework="tensorflow",
        format=SAVED_MODEL if folder else CHECKPOINT,
        layers=layers,
        ordered=ordered,
        collections=collections,
        metadata=metadata,
        notes=tuple(notes),
        close=bundle.close,
    )
    return wired(model, metadata.get("config"))


def _single_string(bundle: Bundle, name: str) -> bytes:
    found = bundle.strings(name).values
    if len(found) != 1:
        raise BadFile(Problem(f"{bundle.prefix}: {name}", f"{len(found)} strings", "one"))
    return found[0]


def _state(tensor: NativeTensor, state: bool) -> NativeTensor:
    return NativeTensor(tensor.name, tensor.data, tensor.identity, state=state)


def _chosen(
    where: str,
    key: str,
    groups: list[Group],
    kept: Mapping[str, list[str]],
    collections: dict[str, tuple[NativeTensor, ...]],
    tensors: Mapping[str, NativeTensor],
) -> tuple[list[Group], dict[str, tuple[NativeTensor, ...]]]:
    """One collection in the place of the weights; only an average is one value for each weight, of the same shape."""
    if key != "ema" or key not in kept:
        offered = "ema" if "ema" in kept else "no other weights in this file"
        raise WrongUsage(Problem(where, f"--key {key}", offered, "leave --key out"))
    average = {name.rpartition("/")[0]: name for name in kept[key]}
    swapped = [
        Group(g.path, {local: average.get(name, name) for local, name in g.locals.items()}, g.node, g.index)
        for g in groups
    ]
    raw = tuple(tensors[name] for group in groups for name in group.locals.values() if name in average)
    return swapped, {name: found for name, found in collections.items() if name != key} | {"raw": raw}


def _layer(group: Group, objects: Mapping[int, KerasObject], tensors: Mapping[str, NativeTensor]) -> NativeLayer:
    slot = _described(objects.get(group.node) if group.node is not None else None, group.index)
    state = STATE_VARIABLES.get(slot.cls if slot else "Normalization", frozenset())
    found = {
        local: _state(tensors[key], local.startswith("spectral/") or (local in state and not tensors[key].data.shape))
        for local, key in group.locals.items()
    }
    if slot is None:
        return NativeLayer(group.path, None, found)
    return NativeLayer(group.path, slot.cls, found, slot.config, "class" if slot.known else "none")


def _described(known: KerasObject | None, index: int) -> Slot | None:
    """What Keras says of a layer, wrappers opened; `index` is the cell's number where it is a stack of them."""
    if known is None or "class_name" not in known.metadata:
        return None
    try:
        found = slots({"class_name": "Sequential", "config": {"layers": [known.metadata]}}, keras2=True)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return found[index] if index < len(found) else None


def _root_config(objects: Mapping[int, KerasObject]) -> dict[str, Any] | None:
    """The whole model's config, as Keras has it in its own files."""
    root = objects.get(0)
    if root is None or root.identifier not in _MODEL_IDENTIFIERS or not isinstance(root.metadata.get("config"), dict):
        return None
    return {"class_name": root.metadata.get("class_name"), "config": root.metadata["config"]}


def read_live(model: object) -> NativeModel:
    """A `tf.Module`, a `tf.train.Checkpoint`, any other object TensorFlow can track, or a dict of variables."""
    if isinstance(model, Mapping):
        return _from_variables(model)
    try:
        import tensorflow as tf
    except ImportError:
        raise Unsupported(
            Problem("tensorflow", "not installed", "it, to read a live object", "install neutral-weights[tensorflow]")
        ) from None
    folder = tempfile.mkdtemp(prefix="neutral-")
    try:
        checkpoint = model if isinstance(model, tf.train.Checkpoint) else tf.train.Checkpoint(root=model)
        found = read(Path(checkpoint.write(f"{folder}/live")))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

    def close() -> None:
        found.close()
        shutil.rmtree(folder, ignore_errors=True)

    return replace(found, format="live", close=close)


def _from_variables(variables: Mapping[Any, Any]) -> NativeModel:
    tensors = {
        str(name): NativeTensor(str(name), from_array(v.numpy() if hasattr(v, "numpy") else v), identity=str(name))
        for name, v in variables.items()
    }
    groups = by_name([(name, name) for name in tensors], listed=False)
    return NativeModel("tensorflow", "live", tuple(_layer(group, {}, tensors) for group in groups))
