"""PaddlePaddle's files and live layers, read into native layers. Files are read without paddle and run nothing.

    model = read(Path("lenet5.pdparams"))                   a state dict of paddle.save
    model = read(Path("last.pdparams"), key="ema")          one of several in it
    model = read(Path("lenet5.safetensors"))                one of paddle.save(..., safetensors=True)
    model = read_live(layer)                                a paddle.nn.Layer, or a state dict in memory

A file says names and elements, and no class. What a recurrent layer has twice in its state dict is read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from neutral.containers.files import SourceFile
from neutral.containers.paddle_file import DTYPES, PaddleFile, Saved
from neutral.containers.safetensors import open_safetensors
from neutral.conventions.paddle import (
    NORMALIZED_SHAPE,
    SPECTRAL_NORM_DIM,
    WEIGHT_NORM_DIM,
    channels_last,
    normed,
)
from neutral.conventions.paddle_names import places
from neutral.errors import BadFile, Problem, Refused, WrongUsage, raise_all
from neutral.exporters.live_settings import plain_setting
from neutral.native import Array, Computed, NativeLayer, NativeModel, NativeTensor, Tensor, from_array

_LAYER_DEPTH: Final = 200
_RECURRENT: Final = ("SimpleRNN", "LSTM", "GRU")
_HOOKS: Final = {"WeightNorm": WEIGHT_NORM_DIM, "SpectralNorm": SPECTRAL_NORM_DIM}


@dataclass(frozen=True)
class LayerClass:
    """What a live object says of one layer: its class and that class's own settings."""

    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The weights in a file of paddle.save; `key` (keys joined by dots) names the set if there are several."""
    with SourceFile(source) as file:
        plain = file.size > 9 and file.read(6, 3) == b"\0\0{"
    return _read_safetensors(source, key) if plain else _read_pickle(source, key)


def _read_pickle(source: Path, key: str | None) -> NativeModel:
    file = PaddleFile(source)
    try:
        return _model(file, key)
    except BaseException:
        file.close()
        raise


def _model(file: PaddleFile, key: str | None) -> NativeModel:
    place, chosen = file.choose(key)
    tensors = {name: NativeTensor(name, file.tensor(saved, name)) for name, saved in chosen.items()}
    tensors = _with_ties(tensors, chosen)
    layers, once = layers_of(tensors, None)
    kept: dict[str, Any] = {}
    names = file.names(place)
    if names is not None:
        # Pairs, for an archive sorts the keys of a mapping, and this is the file's order.
        kept["parameters"] = [list(pair) for pair in names.items()]
    if once:
        kept["once"] = once
    others = {**file.sets, **file.others}
    collections = {
        name or "itself": tuple(_readable(file, members)) for name, members in others.items() if members is not chosen
    }
    return NativeModel(
        "paddle",
        "pdparams",
        layers,
        collections={name: members for name, members in collections.items() if members},
        metadata={"metadata": kept} if kept else {},
        close=file.close,
    )


def _readable(file: PaddleFile, members: Mapping[str, Saved]) -> Iterator[NativeTensor]:
    """The tensors of a set that is not read, without those that are no arrays of numbers."""
    for name, saved in members.items():
        try:
            yield NativeTensor(name, file.tensor(saved, name))
        except (BadFile, Refused):
            continue


def _with_ties(tensors: Mapping[str, NativeTensor], saved: Mapping[str, Saved]) -> dict[str, NativeTensor]:
    """Tensors of one parameter are tied. Files that were put together of several may use a name twice: then they differ."""
    groups: dict[str, list[str]] = {}
    for name, value in saved.items():
        if value.parameter is not None:
            groups.setdefault(value.parameter, []).append(name)
    found = dict(tensors)
    for parameter, names in groups.items():
        if len(names) > 1 and all(same_elements(tensors[names[0]].data, tensors[name].data) for name in names[1:]):
            found |= {name: NativeTensor(name, tensors[name].data, ("parameter", parameter)) for name in names}
    return found


def same_elements(one: Tensor, other: Tensor) -> bool:
    """True if two tensors are the same to the bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(a.tobytes() == b.tobytes() for a, b in zip(one.tiles(), other.tiles(), strict=True))


def layers_of(
    tensors: Mapping[str, NativeTensor], classes: Mapping[str, LayerClass] | None
) -> tuple[tuple[NativeLayer, ...], list[str]]:
    """(the layers of a state dict, in the order of their first tensors; the names of a recurrent layer that are there once).

    What is there twice must be the same; of the two the flat name is kept.
    """
    place = places(tensors, None if classes is None else {path: known.cls for path, known in classes.items()})
    layers: dict[str, dict[str, NativeTensor]] = {}
    repeated = set()
    problems = []
    for name, tensor in tensors.items():
        at = place[name]
        if not at.local or not _is_text(name):
            problems.append(Problem(name, "a tensor name that is empty or no text", "a name", "rename it in the file"))
        if at.twin is not None:
            repeated.add(at.twin)
            if not same_elements(tensor.data, tensors[at.twin].data):
                problems.append(
                    Problem(
                        name,
                        f"other elements than those of {at.twin}",
                        "the same, for paddle's recurrent layers have each parameter under two names",
                        "save the state dict of the layer itself",
                    )
                )
            continue
        layers.setdefault(at.path, {})[at.local] = tensor
    raise_all(Refused, problems)
    alone = {
        tensor.name
        for members in layers.values()
        for local, tensor in members.items()
        if "_l" in local and tensor.name not in repeated
    }
    stacks = {path for path, members in layers.items() if "weight_ih_l0" in members}
    once = [name for name in tensors if name in alone and place[name].path in stacks]
    return tuple(_layer(path, members, (classes or {}).get(path)) for path, members in layers.items()), once


def _layer(path: str, tensors: Mapping[str, NativeTensor], known: LayerClass | None) -> NativeLayer:
    if known is None:
        return NativeLayer(path, None, tensors)
    return NativeLayer(path, known.cls, tensors, known.config, "class")


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_safetensors(source: Path, key: str | None) -> NativeModel:
    if key is not None:
        raise WrongUsage(
            Problem(str(source), f"the key {key!r}", "none", "a safetensors file holds one set of weights")
        )
    opened = open_safetensors(source)
    try:
        if not opened.tensors:
            raise BadFile(Problem(str(source), "no tensor", "at least one", "is this a file of weights?"))
        layers, once = layers_of({name: NativeTensor(name, data) for name, data in opened.tensors.items()}, None)
        metadata = {"metadata": {"once": once}} if once else {}
        return NativeModel("paddle", "paddle-safetensors", layers, metadata=metadata, close=opened.close)
    except BaseException:
        opened.close()
        raise


# Live layers


def read_live(model: Any) -> NativeModel:
    """The weights of a live `paddle.nn.Layer`, or of a state dict of paddle's tensors or numpy's arrays."""
    classes: dict[str, LayerClass] | None = None
    chain = False
    if isinstance(model, Mapping):
        state: Mapping[str, Any] = model
    else:
        state, classes = model.state_dict(), {}
        _describe(model, "", classes, 0)
        chain = _is_chain(model)
    tensors = {}
    skipped = []
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            tensors[name] = NativeTensor(name, from_array(_with_bfloat16(value)))
        elif hasattr(value, "numpy") and hasattr(value, "dtype"):
            tensors[name] = NativeTensor(name, live_tensor(name, value), ("live", id(value)))
        else:
            skipped.append(str(name))
    if not tensors:
        raise Refused(Problem(type(model).__qualname__, "a layer without a tensor", "at least one"))
    behind = any(channels_last(known.config) for known in (classes or {}).values())
    if classes is not None and behind:
        classes = {path: _of_one_axis(known) for path, known in classes.items()}
    layers, _ = layers_of(tensors, classes)
    raise_all(Refused, [problem for layer in layers for problem in _nonzero_padding(layer)])
    return NativeModel(
        "paddle",
        "state-dict" if classes is None else "layer",
        layers,
        ordered=chain,
        notes=("entries that are no tensors, left out: " + ", ".join(skipped[:10]),) if skipped else (),
        # Such a model flattens to (position, channel), which the layers behind do not tell.
        unsettled=frozenset(layer.path for layer in layers if layer.cls == "Linear") if behind else frozenset(),
    )


def _of_one_axis(known: LayerClass) -> LayerClass:
    """A norm of several axes as files have it, for where channels come last nobody knows which of the axes they are."""
    shape = normed(known.config)
    if known.cls != "LayerNorm" or shape is None:
        return known
    return LayerClass(known.cls, {**known.config, NORMALIZED_SHAPE: [math.prod(shape)]})


def _nonzero_padding(layer: NativeLayer) -> Iterator[Problem]:
    """An embedding gives zeros for its padding index, whatever its row holds; no other framework does."""
    index = layer.config.get("padding_idx")
    if layer.cls == "Embedding" and type(index) is int and index >= 0 and "weight" in layer.tensors:
        weight = layer.tensors["weight"].data
        if weight.block([(index, index + 1), (0, weight.shape[1])]).any():
            yield Problem(
                layer.path,
                f"an embedding whose row {index}, its padding_idx, is not zero",
                "zeros, which are what paddle gives for that index",
                "set the row to zero",
            )


def _describe(layer: Any, path: str, classes: dict[str, LayerClass], depth: int) -> None:
    if depth > _LAYER_DEPTH:
        raise Refused(Problem(path, "layers inside each other without an end", "a tree of layers"))
    classes[path] = LayerClass(class_name(layer), settings(layer))
    backwards = vars(layer).get("is_reverse")
    for name, child in layer._sub_layers.items():
        if child is None:
            continue
        inner = f"{path}.{name}" if path else name
        _describe(child, inner, classes, depth + 1)
        told = backwards if name == "cell" else {"cell_fw": False, "cell_bw": True}.get(name)
        if type(told) is bool and classes[inner].cls.endswith("Cell"):
            classes[inner] = LayerClass(classes[inner].cls, {**classes[inner].config, "is_reverse": told})


def class_name(layer: object) -> str:
    """The bare name of paddle's own layers, the qualified name of all else."""
    cls = type(layer)
    return cls.__name__ if cls.__module__.startswith("paddle.nn.") else f"{cls.__module__}.{cls.__qualname__}"


def settings(layer: Any) -> dict[str, Any]:
    """The attributes of a layer that are plain data, without the underscore in front; and what its hooks say."""
    found = {}
    for name, value in vars(layer).items():
        kept, plain = plain_setting(value)
        if kept and name != "training":
            found[name.lstrip("_")] = plain
    for hook in getattr(layer, "_forward_pre_hooks", {}).values():
        setting = _HOOKS.get(type(hook).__name__)
        if setting is not None and type(getattr(hook, "dim", None)) is int:
            found[setting] = hook.dim
    return found


def _is_chain(layer: Any) -> bool:
    """True if the layers are computed in their order: Sequentials of leaves of paddle's own."""
    if class_name(layer) != "Sequential":
        return False
    return all(
        _is_chain(child) or not child._sub_layers or class_name(child) in _RECURRENT
        for child in layer._sub_layers.values()
    )


def live_tensor(name: str, value: Any) -> Tensor:
    """The elements of a live tensor, copied out of paddle when they are read."""
    dtype = DTYPES.get(str(value.dtype).rpartition(".")[2])
    if dtype is None:
        raise Refused(Problem(name, f"a tensor of {value.dtype}", f"one of {', '.join(DTYPES)}", "convert it first"))
    return Computed(tuple(value.shape), dtype, lambda: _array(value, dtype))


def _array(value: Any, dtype: np.dtype[Any]) -> Array:
    found: Array = np.asarray(value.numpy())
    return found.view(dtype) if found.dtype != dtype else found


def _with_bfloat16(array: Array) -> Array:
    return array.view(DTYPES["bfloat16"]) if array.dtype == np.uint16 else array
