"""Arrays by name, from an `.npz` or from memory, read into native layers.

>>> import numpy as np
>>> model = read_live({"encoder/fc/kernel": np.zeros((2, 3)), "encoder/fc/bias": np.zeros(2), "step": np.array(3)})
>>> [(layer.path, list(layer.tensors)) for layer in model.layers]
[('encoder.fc', ['kernel', 'bias']), ('', ['step'])]

An `.npz` that neutral wrote names its arrays `<layer>/<role>`, each in canonical layout, and says in the zip's comment
what kinds of layers they belong to. In a foreign one a name without `/` is a tensor of the model itself, and nothing
says what kind of layer it belongs to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neutral.containers.files import SourceFile
from neutral.containers.npz import EXTENSIONS, read_npz
from neutral.containers.zip import ZipSource
from neutral.conventions.npz_layers import read_comment
from neutral.errors import BadFile, Problem, WrongUsage
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
from neutral.schema.kinds import KINDS, Layer


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The arrays of an `.npz`."""
    if key is not None:
        raise WrongUsage(Problem(str(source), f"the key {key!r}", "none", "an .npz holds one set of arrays"))
    file = SourceFile(source)
    try:
        zipped = ZipSource(file)
        tensors = read_npz(zipped)
        if not tensors:
            raise BadFile(Problem(str(source), "no array", "at least one", "is this a file of weights?"))
    except BaseException:
        file.close()
        raise
    described = read_comment(zipped.comment)
    states = {f"{path}/{role}": (path, role) for path, told in described.items() for role in _states(told)}
    plain = _layers({name: NativeTensor(name, data, state=name in states) for name, data in tensors.items()}, states)
    layers = tuple(_told(layer, described.get(layer.path)) for layer in plain)
    decided = (x.path for x in layers if x.cls is not None and "channels" in described[x.path])
    splits = {path: _channels(described[path]) for path in decided}
    return NativeModel(framework="numpy", format="npz", layers=layers, splits=splits, close=file.close)


def _told(layer: NativeLayer, told: Mapping[str, Any] | None) -> NativeLayer:
    """A layer with the kind and settings that the file's comment gives it, if they make one."""
    if told is None or told.get("kind") not in KINDS or told["kind"] == "unknown":
        return layer
    kind = KINDS[told["kind"]]
    settings = {k: v for k, v in told.items() if k in kind.model_fields and k not in Layer.model_fields and k != "kind"}
    try:
        kind(path=layer.path, **settings)
    except ValueError:
        return layer
    return replace(layer, cls=told["kind"], config=settings, evidence="class")


def _states(told: Mapping[str, Any]) -> tuple[str, ...]:
    states = told.get("states")
    return tuple(str(role) for role in states) if isinstance(states, tuple) else ()


def _channels(told: Mapping[str, Any]) -> dict[str, int]:
    channels = told.get("channels")
    found = channels.items() if isinstance(channels, Mapping) else ()
    return {str(axis): n for axis, n in found if type(n) is int}


def read_live(model: Mapping[str, npt.ArrayLike]) -> NativeModel:
    """Arrays in memory by their names. One array under two names is tied."""
    tensors: dict[str, NativeTensor] = {}
    for name, value in model.items():
        array = np.asarray(value)
        if array.dtype.kind not in "biufc" and array.dtype.name not in EXTENSIONS:
            raise WrongUsage(Problem(name, f"an array of {array.dtype}", "an array of numbers"))
        place = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)
        tensors[name] = NativeTensor(
            name, from_array(array), ("array", *place) if array is value and array.size else None
        )
    return NativeModel(framework="numpy", format="arrays", layers=_layers(tensors))


def _layers(
    tensors: Mapping[str, NativeTensor], known: Mapping[str, tuple[str, str]] | None = None
) -> tuple[NativeLayer, ...]:
    """Layers in the order of their first arrays. Where dots would make `a/b` and `a.b` one, both keep their names.

    `known` has the layer and role of arrays whose role has a `/` in it.
    """
    groups: dict[str, dict[str, NativeTensor]] = {}
    for name, tensor in tensors.items():
        above, _, last = name.rpartition("/")
        layer, role = (known or {}).get(name, (above, last))
        groups.setdefault(layer, {})[role] = tensor
    paths = {layer: layer.replace("/", ".") for layer in groups}
    count = Counter(paths.values())
    return tuple(
        NativeLayer(path=path if count[path] == 1 else layer, cls=None, tensors=groups[layer])
        for layer, path in paths.items()
    )
