"""Reads TensorFlow.js layers models without TensorFlow.js: a folder with `model.json` and its shards.

    model = read(Path("web_model/"))
    model = read(Path("web_model/model.json"))

The topology names every layer, its class and settings, in the words of Keras 2; so its graph is that of a Keras model.
A weight belongs to the layer in whose scope TensorFlow.js looks for it (`lstm/kernel`), or, as files of Keras 2 have it,
to that scope without its innermost part (`lstm/lstm_cell/kernel`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neutral.containers.tfjs_model import TfjsModel, Weight, open_tfjs
from neutral.conventions.keras_config import Slot, unwired
from neutral.conventions.keras_variables import own_variables
from neutral.conventions.tfjs import VARIABLES, kept
from neutral.conventions.tfjs_config import as_keras2, model_of, outline
from neutral.errors import BadFile, Problem, WrongUsage, printable
from neutral.exporters.keras import config_slots
from neutral.exporters.keras_graph import wired
from neutral.native import NativeLayer, NativeModel, NativeTensor

_KERAS = "2.15.0"
"""The version of Keras in whose words a topology is written, whatever it says itself."""

_OPTIMIZER = "optimizer"


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The layers of a model; values of quantized weights are those that TensorFlow.js computes of them."""
    if key is not None:
        raise WrongUsage(
            Problem(str(source), f"the key {key!r}", "none", "a TensorFlow.js model has one set of weights")
        )
    opened = open_tfjs(source)
    try:
        return _model(opened)
    except BaseException:
        opened.close()
        raise


def _model(opened: TfjsModel) -> NativeModel:
    where = str(opened.path)
    if not opened.weights:
        raise BadFile(Problem(where, "no weight", "at least one", "is this a model with its weights?"))
    try:
        entry = model_of(opened.document["modelTopology"])
        topology = as_keras2(entry, {name: weight.data.shape for name, weight in opened.weights.items()})
        classes = outline(entry)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BadFile(
            Problem(
                where, f"a topology that is malformed ({type(error).__name__})", "layers as TensorFlow.js lists them"
            )
        ) from None
    slots, ordered = _slots(topology.config, where)
    notes = list(topology.remarks)
    weights = {name: weight for name, weight in opened.weights.items() if weight.group != _OPTIMIZER}
    lacking: list[str] = []
    layers = tuple(_layers(slots, weights, notes, lacking))
    quantized = sorted({w.quantization.name for w in weights.values() if w.quantization is not None})
    if quantized:
        notes.append(f"weights quantized as {', '.join(quantized)}: read as the values that TensorFlow.js computes")
    aside = tuple(_tensor(weight) for weight in opened.weights.values() if weight.group == _OPTIMIZER)
    model = NativeModel(
        framework="tfjs",
        format="layers-model",
        layers=layers,
        ordered=ordered,
        collections={_OPTIMIZER: aside} if aside else {},
        metadata={"config": classes, **_text(opened)},
        notes=tuple(notes),
        close=opened.close,
    )
    if lacking:
        because = f"{printable(lacking[0], 80)}: no graph, because the file has not all weights of the model"
        return replace(model, notes=(*model.notes, because))
    return wired(model, topology.config, _KERAS)


def _text(opened: TfjsModel) -> dict[str, Any]:
    """What gives the file back as it was."""
    try:
        sizes = [[file.size for file in group.files] for group in opened.groups]
        return kept(opened.text.decode("utf-8"), sizes)
    except UnicodeDecodeError:  # JSON may be UTF-16: such a model is written anew
        return {}


def _slots(config: Mapping[str, Any], where: str) -> tuple[list[Slot], bool]:
    """The layers, and whether they are in the order of computation: weights have names, whatever the wiring says."""
    try:
        return config_slots(config, where, _KERAS), True
    except BadFile:
        try:
            return config_slots(unwired(config), where, _KERAS), False
        except (TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise


def _tensor(weight: Weight) -> NativeTensor:
    return NativeTensor(weight.name, weight.data)


def _layers(
    slots: list[Slot], weights: Mapping[str, Weight], notes: list[str], lacking: list[str]
) -> Iterator[NativeLayer]:
    """The layers with their weights. `lacking` are those of which the file has not all: TensorFlow.js loads no such model."""
    places = {target: (slot.path, local) for slot in slots for target, local in _targets(slot)}
    held: dict[str, dict[str, NativeTensor]] = {}
    left: dict[str, Weight] = {}
    for name, weight in weights.items():
        path, local = places.get(name) or places.get(_without_cell(name)) or ("", "")
        if not local:
            left[name] = weight
        elif local in held.setdefault(path, {}):
            raise BadFile(Problem(printable(name), "a second weight for the same place", "one", "save the model again"))
        else:
            held[path][local] = _tensor(weight)
    for slot in slots:
        tensors = held.get(slot.path, {})
        wanted = {local: None for _, local in _targets(slot)}
        missing = [local for local in wanted if local not in tensors]
        cls: str | None = slot.cls
        if missing:
            lacking.append(slot.path)
            notes.append(f"{slot.path}: the file has no {', '.join(missing)} of this {slot.cls}")
            cls = slot.cls if not tensors else None
        if not slot.known:
            own = [name for name in left if name.split("/")[0] == _owner(slot)]
            tensors = {name.partition("/")[2]: _tensor(left.pop(name)) for name in own}
            notes.append(f"{slot.path}: {slot.cls} is not a layer of TensorFlow.js; its weights are kept as they are")
        ordered = {local: tensors[local] for local in (*wanted, *tensors) if local in tensors}
        yield NativeLayer(slot.path, cls, ordered, slot.config, "class" if cls else "none")
    for scope in dict.fromkeys(name.rpartition("/")[0] for name in left):
        own = [name for name in left if name.rpartition("/")[0] == scope]
        notes.append(f"{scope}: weights of no layer of the topology")
        yield NativeLayer(
            f"{scope.replace('/', '.')}#weights", None, {name.rpartition("/")[2]: _tensor(left[name]) for name in own}
        )


def _without_cell(name: str) -> str:
    """`lstm/lstm_cell/kernel` as TensorFlow.js shortens it: `lstm/kernel`."""
    *scope, variable = name.split("/")
    return "/".join((*scope[:-1], variable))


def _targets(slot: Slot) -> Iterator[tuple[str, str]]:
    """(name that TensorFlow.js looks for, local name) of each variable; files of Keras 3's weights have numbers."""
    count = 0
    for holder in slot.holders:
        for variable in own_variables(holder.cls, holder.config):
            name = VARIABLES.get((holder.cls, variable), variable)
            scope = "/".join((_owner(slot), *_inside(slot, holder.prefix)))
            yield f"{scope}/{name}", holder.prefix + name
            yield f"{scope}/{count}", holder.prefix + name
            count += 1


def _owner(slot: Slot) -> str:
    """The name of the layer of its model that a slot is, or lies in: wrapped layers have their variables in its scope."""
    level = slot.group.split("/").count("layers")
    return min(slot.names[level - 1]) if level else slot.path


def _inside(slot: Slot, prefix: str) -> tuple[str, ...]:
    """The scopes within the layer's own."""
    side = prefix.partition("_layer/")[0]
    if side:
        return (f"{side}_{slot.config.get('name', '')}",)
    stack, _, index = slot.path.rpartition(".")
    return (f"RNNCell_{index}",) if "/cells/" in f"/{slot.group}" and stack else ()
