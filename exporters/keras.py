"""Reads Keras files without Keras: `.keras`, `.weights.h5`, and the legacy `.h5` of Keras 2 and 3.

Variables in a `.keras` or `.weights.h5` have numbers instead of names, and their groups are counted per class. So the
config decides which layer a group is (`keras_config`), and the name that newer files note beside each group must
agree. Without a config, class and number of variables say what they can, and the rest stays unnamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neutral.containers.hdf5 import Attribute, Hdf5Source, natural
from neutral.containers.json_text import parse_json
from neutral.containers.keras_file import KerasFile, open_keras
from neutral.conventions.keras_config import Config, Holder, Slot, is_keras2, is_model, layer_slots, slots, unwired
from neutral.conventions.keras_live import live_object, live_variables
from neutral.conventions.keras_variables import (
    CELL_OF,
    STATE,
    VARIABLES,
    Counter,
    class_of_group,
    own_variables,
    parts,
    snake_case,
    variables_by_count,
)
from neutral.errors import BadFile, Problem, Refused, printable
from neutral.exporters.keras_graph import wired
from neutral.native import Computed, NativeLayer, NativeModel, NativeTensor

_COLLECTIONS = ("optimizer", "optimizer_weights", "metrics", "compile_metrics", "loss")


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The layers of a Keras file. The framework is not imported; nothing of the config is built."""
    if key is not None:
        raise Refused(Problem(str(source), f"key {key!r}", "no key: a Keras file holds one model", "leave --key out"))
    opened = open_keras(source)
    try:
        bound = _legacy(opened) if opened.format.startswith("h5") else _object_layout(opened)
    except BaseException:
        opened.close()
        raise
    metadata = {"config": opened.config, **opened.metadata}
    model = NativeModel(
        framework="keras",
        format=opened.format,
        layers=tuple(bound.layers),
        ordered=bound.ordered,
        collections={name: tuple(tensors) for name, tensors in bound.collections.items()},
        metadata={name: value for name, value in metadata.items() if value is not None},
        notes=tuple(bound.notes),
        close=opened.close,
    )
    return wired(model, opened.config, opened.metadata.get("keras_version"))


def read_live(model: Any) -> NativeModel:
    """The layers of a live Keras model; values are fetched when they are read. Names are those `fill_live` takes."""
    from keras import ops

    notes: list[str] = []
    layers = []
    config, ordered = _live_config(model, notes)
    for slot in _live_slots(model, config):
        tensors: dict[str, NativeTensor] = {}
        found = live_object(model, slot.group)
        if slot.names and slot.names[-1] and found.name not in slot.names[-1]:
            raise Refused(Problem(slot.path, f"a layer named {found.name} in its place", "the order of the config"))
        named = _live_named(model, slot) if slot.known else None
        cls = slot.cls if named is not None or not slot.known else None
        if named is None:
            notes.append(
                f"{slot.path}: {slot.cls} is not a layer of Keras, or not as its class has it; its variables are kept as they are"
            )
            named = {str(i): (f"{slot.group}/weights/{i}", each, False) for i, each in enumerate(found.weights)}
        for local, (name, variable, state) in named.items():
            data = Computed(tuple(variable.shape), _dtype(variable.dtype), partial(ops.convert_to_numpy, variable))
            tensors[local] = NativeTensor(name, data, id(variable), state)
        layers.append(NativeLayer(slot.path, cls, tensors, slot.config, "class" if cls else "none"))
    altered = _live_alteration(model)
    if altered:
        # The config does not tell of it, so that a model made of the config would be another one.
        notes.append(altered)
        config = None
    metadata = {"config": config} if config is not None else {}
    read = NativeModel("keras", "live", tuple(layers), ordered=ordered, metadata=metadata, notes=tuple(notes))
    return wired(read, config)


_COMPUTING = ("call", "convolution_op", "inner_loop")
"""Methods that a layer looks up on itself while it computes."""


def _live_alteration(model: Any) -> str:
    """Why a model computes something else than its classes do, or ""."""
    for layer in model._flatten_layers():
        for name in _COMPUTING:
            if name in vars(layer):
                return f"{layer.name}: no graph, because its {name} was replaced"
    return ""


def _live_config(model: Any, notes: list[str]) -> tuple[Config | None, bool]:
    try:
        config = parse_json(model.to_json().encode(), "model.to_json()")
    except (NotImplementedError, TypeError, ValueError) as error:  # a subclass of Model without get_config
        notes.append(printable(f"no graph: the model does not describe itself ({type(error).__name__}: {error})", 200))
        return None, False
    return config, is_model(config)


def _live_slots(model: Any, config: Config | None) -> list[Slot]:
    if config is not None and is_model(config):
        return config_slots(config, "model.to_json()")
    from keras import saving

    counter = Counter()
    found = []
    for layer in model.layers:
        cls = type(layer)
        group = f"layers/{counter.unique(snake_case(cls.__name__))}"
        own = cls.__module__.startswith("keras.")
        plain = {"module": cls.__module__, "class_name": cls.__name__, "config": {"name": layer.name}}
        found += layer_slots(saving.serialize_keras_object(layer) if own else plain, group)
    return found


def _live_named(model: Any, slot: Slot) -> dict[str, tuple[str, Any, bool]] | None:
    """local name -> (name, variable, state), or None if the variables are not those that the class has."""
    named = {}
    for holder in slot.holders:
        variables = live_variables(live_object(model, holder.group))
        names = own_variables(holder.cls, holder.config)
        if len(variables) != len(names):
            return None
        for index, (name, variable) in enumerate(zip(names, variables, strict=True)):
            local = name if name.startswith("spectral/") else holder.prefix + name
            named[local] = (f"{holder.group}/vars/{index}", variable, name in STATE.get(holder.cls, ()))
    return named


def _dtype(told: Any) -> np.dtype[Any]:
    """The dtype of a live variable: Keras 3 tells its name, Keras 2 has TensorFlow's own."""
    name = getattr(told, "name", str(told))
    return np.dtype(getattr(ml_dtypes, name, name))


@dataclass
class _Bound:
    layers: list[NativeLayer] = field(default_factory=list)
    collections: dict[str, list[NativeTensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ordered: bool = False


def config_slots(config: Config, where: str, version: object = None) -> list[Slot]:
    """`keras_config.slots`, with a malformed config as a `BadFile`."""
    try:
        return slots(config, is_keras2(config, version))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        found = f"a config that is malformed ({type(error).__name__}: {error})"
        raise BadFile(Problem(where, found, "a Sequential or Functional config as Keras writes it")) from None


# Keras 2.13 and later: numbered variables in a tree of objects.


def _object_layout(opened: KerasFile) -> _Bound:
    tree = _Tree(opened.source)
    bound = _Bound()
    config = opened.config
    if config is not None and is_model(config):
        bound.ordered = True
        for slot in config_slots(config, str(opened.path), opened.metadata.get("keras_version")):
            bound.layers += tree.bind(slot, bound.notes)
    elif config is not None:
        bound.notes.append(f"{config.get('class_name')}: a class of its own; its layers are named by its attributes")
    for path in sorted(tree.unclaimed(), key=natural):
        head = path.split("/")[0].lstrip("_")
        if head in _COLLECTIONS:
            bound.collections.setdefault(head, []).append(tree.claim(path))
    bound.layers += tree.walk("", "")
    return bound


class _Tree:
    """The datasets of an HDF5 file, each of which is claimed by one layer."""

    def __init__(self, source: Hdf5Source) -> None:
        self.source = source
        self._claimed: set[str] = set()
        self._variables: dict[str, list[str]] = {}
        self._children: dict[str, list[str]] = {}
        for path in source.datasets:
            group, _, name = path.rpartition("/")
            if group.rpartition("/")[2] == "vars" or group == "vars":
                self._variables.setdefault(group, []).append(name)
        for path in source.groups:
            if path:
                self._children.setdefault(path.rpartition("/")[0], []).append(path.rpartition("/")[2])
        for names in self._variables.values():
            names.sort(key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))

    def unclaimed(self) -> list[str]:
        return [path for path in self.source.datasets if path not in self._claimed]

    def claim(self, path: str, state: bool = False) -> NativeTensor:
        self._claimed.add(path)
        dataset = self.source.datasets[path]
        return NativeTensor(path, dataset.tensor, dataset.address, state)

    def variables(self, group: str) -> list[str]:
        """The numbered variables of an object, in order."""
        holder = f"{group}/vars".lstrip("/")
        return [f"{holder}/{name}" for name in self._variables.get(holder, [])]

    def name(self, group: str) -> str | None:
        """The object's own name, which files of Keras 3 note beside its variables."""
        name = self.source.groups.get(f"{group}/vars".lstrip("/"), {}).get("name")
        return name if isinstance(name, str) and name else None

    def place(self, group: str) -> str:
        """The group as this file has it: Keras 2 has `_query_dense` for `query_dense`, and 2.12 another `layers`."""
        found = ""
        for part in group.split("/"):
            for spelling in (part, f"_{part}", "_layer_checkpoint_dependencies" if part == "layers" else part):
                candidate = f"{found}/{spelling}".lstrip("/")
                if candidate in self.source.groups:
                    break
            else:
                candidate = f"{found}/{part}".lstrip("/")
            found = candidate
        return found

    def bind(self, slot: Slot, notes: list[str]) -> list[NativeLayer]:
        """The layers (one, and what else its group holds) of a place that the config names."""
        group = self.place(slot.group)
        self._check_name(slot.group, slot.names)
        if not slot.known:
            notes.append(f"{slot.path}: {slot.cls} is not a layer of Keras; its variables are kept as they are")
            found = self.walk(group, slot.path, slot)
            bare = not any(layer.path == slot.path for layer in found)
            return [NativeLayer(slot.path, slot.cls, {}, slot.config, "class"), *found] if bare else found
        held = [(holder, self.variables(self.place(holder.group))) for holder in slot.holders]
        for holder, _ in held:
            self._check_name(holder.group, holder.names)
        expected = [own_variables(holder.cls, holder.config) for holder, _ in held]
        counts = [len(paths) for _, paths in held]
        if not any(counts) and any(expected):
            notes.append(f"{slot.path}: the file has no variables of this {slot.cls}")
            expected = [() for _ in held]
        tensors: dict[str, NativeTensor] = {}
        cls: str | None = slot.cls
        evidence = "class"
        if counts == [len(names) for names in expected]:
            for (holder, paths), names in zip(held, expected, strict=True):
                for path, name in zip(paths, names, strict=True):
                    local = name if name.startswith("spectral/") else holder.prefix + name
                    tensors[local] = self.claim(path, name in STATE.get(holder.cls, ()))
        else:
            wanted = ", ".join(name for names in expected for name in names)
            notes.append(f"{slot.path}: {sum(counts)} variables where {slot.cls} has {wanted}; they stay unnamed")
            cls, evidence = None, "none"
            for path in (path for _, paths in held for path in paths):
                tensors[str(len(tensors))] = self.claim(path)
        extra = self.walk(group, slot.path)
        states = [layer for layer in extra if all(tensor.state for tensor in layer.tensors.values())]
        for layer in states:
            for local, tensor in layer.tensors.items():
                tensors[f"{layer.path.removeprefix(slot.path).lstrip('.')}/{local}"] = tensor
        layer = NativeLayer(slot.path, cls, tensors, slot.config, evidence)
        return [layer, *(other for other in extra if other not in states)]

    def _check_name(self, group: str, names: tuple[frozenset[str], ...]) -> None:
        noted = self.name(self.place(group))
        if noted is not None and names and names[-1] and noted not in names[-1]:
            where = f"{self.source.where}: {group}"
            expected = f"the layer {' or '.join(sorted(names[-1]))} that the config puts there"
            raise Refused(
                Problem(where, f"variables of a layer named {noted}", expected, "save the model again with Keras")
            )

    def walk(self, group: str, path: str, top: Slot | None = None) -> list[NativeLayer]:
        """What the tree under `group` holds and nobody claimed, without a config: one layer per object with variables."""
        layers: list[NativeLayer] = []
        waiting = [(group, path, top)]
        while waiting:
            here, there, slot = waiting.pop()
            layer, below = self._object(here, there, slot)
            if layer is not None:
                layers.append(layer)
            waiting += reversed(below)
        return _distinct(layers)

    def _object(
        self, group: str, path: str, slot: Slot | None
    ) -> tuple[NativeLayer | None, list[tuple[str, str, Slot | None]]]:
        """The layer that an object is, if it has variables, and its children: (group, path, nothing known)."""
        where = path or "model"
        layer = self._recognized(group, where) if slot is None else None
        if layer is None:
            cls, config, evidence = (slot.cls, slot.config, "class") if slot is not None else (None, {}, "none")
            mine = [each for each in self.variables(group) if each not in self._claimed]
            tensors = {str(i): self.claim(each, _is_seed(group)) for i, each in enumerate(mine)}
            layer = NativeLayer(where, cls, tensors, config, evidence)
        below: list[tuple[str, str, Slot | None]] = []
        for child in sorted(self._children.get(group, []), key=natural):
            if child != "vars":
                inner = f"{group}/{child}".lstrip("/")
                below.append((inner, f"{path}.{self._step(group, child)}".strip("."), None))
        return (layer if layer.tensors else None), below

    def _recognized(self, group: str, path: str) -> NativeLayer | None:
        """One of Keras' own layers, wrapped or not, as far as group names and numbers of variables decide."""
        found, evidence = self._class(group)
        config: dict[str, Any] = {}
        pieces: list[tuple[str, str, str]] = []
        while found in _WRAPPERS:
            config[_WRAPPERS[found]] = True
            if found == "SpectralNormalization":
                pieces.append((group, found, ""))
            group = f"{group}/layer"
            found, evidence = self._class(group)
        cells = {"": group}
        if found in ("Bidirectional", "RNN"):
            config["bidirectional" if found == "Bidirectional" else "cell"] = True
            prefixes = ("forward_layer/", "backward_layer/") if found == "Bidirectional" else ("",)
            cells = {prefix: f"{group}/{prefix}cell" for prefix in prefixes}
            classes = {self._class(cell)[0] for cell in cells.values()}
            found, evidence = classes.pop() if len(classes) == 1 else None, "name"
            if found not in CELL_OF:
                return None
        elif found in CELL_OF:
            config["cell"] = True
        if found is None or not (found in VARIABLES or parts(found)):
            return None
        for prefix, holder in cells.items():
            pieces.append((holder, found, prefix))
            pieces += [(self.place(f"{holder}/{part.group}"), part.cls, prefix + part.prefix) for part in parts(found)]
        tensors = self._by_count(pieces)
        if tensors is None:
            return None
        cls = CELL_OF.get(found, found)
        biases = [tensor.data for local, tensor in tensors.items() if local.endswith("bias")]
        if cls == "GRU" and biases:
            config["reset_after"] = len(biases[0].shape) == 2
        return NativeLayer(path, cls, tensors, config, evidence)

    def _by_count(self, pieces: list[tuple[str, str, str]]) -> dict[str, NativeTensor] | None:
        """The variables of (group, class, prefix) pieces, as far as their number decides their names, else None."""
        named: list[tuple[str, str, bool]] = []
        for group, cls, prefix in pieces:
            paths = [path for path in self.variables(group) if path not in self._claimed]
            names = variables_by_count(cls, len(paths))
            if names is None:
                return None
            for name, path in zip(names, paths, strict=True):
                local = name if name.startswith("spectral/") else prefix + name
                named.append((local, path, name in STATE.get(cls, ())))
        return {local: self.claim(path, state) for local, path, state in named}

    def _step(self, group: str, child: str) -> str:
        """What a child adds to the path of its layer: nothing for a list of layers, else its name."""
        inner = f"{group}/{child}".lstrip("/")
        if f"{inner}/vars" not in self.source.groups:
            return "" if child in ("layers", "_layer_checkpoint_dependencies", "cells") else child
        if child == "cell":
            return ""
        return (self.name(inner) or child) if self._listed(group) else child

    def _listed(self, group: str) -> bool:
        """True for a group whose members are counted by class: a list of layers."""
        return f"{group}/vars".lstrip("/") not in self.source.groups and group != ""

    def _class(self, group: str) -> tuple[str | None, str]:
        """The class of an object, by its counted group in a list, or by the name that Keras gave it."""
        parent, _, own = group.rpartition("/")
        if self._listed(parent):
            cls = class_of_group(own)
            return (cls, "name") if cls else (None, "none")
        name = self.name(group)
        cls = class_of_group(name) if name else self._cell_class(group)
        return (cls, "name") if cls else (None, "none")

    def _cell_class(self, group: str) -> str | None:
        """The cell that an unnamed group called `cell` holds: its gates show in the recurrent kernel (units, n * units)."""
        paths = self.variables(group)
        if group.rpartition("/")[2] != "cell" or len(paths) not in (2, 3):
            return None
        shape = self.source.tensor(paths[1]).shape
        return _CELL_OF_GATES.get(shape[1] / shape[0]) if len(shape) == 2 and shape[0] else None


_CELL_OF_GATES: Mapping[float, str] = {1: "SimpleRNNCell", 3: "GRUCell", 4: "LSTMCell"}

_WRAPPERS = {"TimeDistributed": "time_distributed", "SpectralNormalization": "spectral_normalization"}


def _is_seed(group: str) -> bool:
    return "seed_generator" in group or "random_generator" in group


def _distinct(layers: list[NativeLayer]) -> list[NativeLayer]:
    """Layers whose paths differ: the later ones of one path are numbered."""
    seen: dict[str, int] = {}
    distinct = []
    for layer in layers:
        count = seen.get(layer.path, 0)
        seen[layer.path] = count + 1
        distinct.append(replace(layer, path=f"{layer.path}#{count}") if count else layer)
    return distinct


# Legacy HDF5: one group per layer of the outermost model, variables by name.


def _legacy(opened: KerasFile) -> _Bound:
    source = opened.source
    root = "model_weights" if opened.config is not None else ""
    if root not in source.groups:
        raise BadFile(Problem(str(opened.path), "no group model_weights", "a model that Keras saved"))
    bound = _Bound()
    weights = {name: _weights(source, root, name) for name in _names(source, root, "layer_names")}
    by_top: dict[str, list[Slot]] = {}
    if opened.config is not None and is_model(opened.config):
        found, bound.ordered = _legacy_slots(opened, opened.config)
        for slot in found:
            by_top.setdefault(slot.top, []).append(slot)
    order = [*by_top, *(name for name in weights if name not in by_top)]
    for top in order:
        bound.layers += _legacy_layers(source, top, by_top.get(top), weights.get(top, {}), bound.notes)
    taken = {path for named in weights.values() for path in named.values()}
    for path, dataset in source.datasets.items():
        if path not in taken:
            head = path.split("/")[0]
            name = "optimizer" if head == "optimizer_weights" else "other"
            bound.collections.setdefault(name, []).append(NativeTensor(path, dataset.tensor, dataset.address))
    return bound


def _legacy_slots(opened: KerasFile, config: Config) -> tuple[list[Slot], bool]:
    """The layers, and whether they are in the order of computation.

    Legacy files name their variables, so that they can be told apart where the wiring makes no sense.
    """
    where, version = str(opened.path), opened.metadata.get("keras_version")
    try:
        return config_slots(config, where, version), True
    except BadFile:
        try:
            return config_slots(unwired(config), where, version), False
        except (TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise


def _names(source: Hdf5Source, group: str, attribute: str) -> list[str]:
    """A list of names; long lists are split over `layer_names0`, `layer_names1`, ..."""
    attributes = source.groups[group]
    if attribute in attributes:
        return _texts(source, group, attributes[attribute])
    names: list[str] = []
    index = 0
    while f"{attribute}{index}" in attributes:
        names += _texts(source, group, attributes[f"{attribute}{index}"])
        index += 1
    return names


def _texts(source: Hdf5Source, group: str, value: Attribute) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadFile(
            Problem(f"{source.where}: {group}", "names that are no list of texts", "a file as Keras writes it")
        )
    return value


def _weights(source: Hdf5Source, root: str, layer: str) -> dict[str, str]:
    """The variables of a layer of the outermost model: name -> dataset, in the file's order."""
    group = f"{root}/{layer}".lstrip("/")
    if group not in source.groups:
        raise BadFile(
            Problem(f"{source.where}: {group}", "no such group", "one for every layer that layer_names lists")
        )
    found = {}
    for name in _names(source, group, "weight_names"):
        path = f"{group}/{name}"
        if path not in source.datasets:
            raise BadFile(Problem(f"{source.where}: {path}", "no such dataset", "one for every name in weight_names"))
        found[name] = path
    return found


def _tensor(source: Hdf5Source, path: str, state: bool = False) -> NativeTensor:
    dataset = source.datasets[path]
    return NativeTensor(path, dataset.tensor, dataset.address, state)


_LOCAL = {
    ("DepthwiseConv1D", "depthwise_kernel"): "kernel",
    ("DepthwiseConv2D", "depthwise_kernel"): "kernel",
    ("SpectralNormalization", "vector_u"): "spectral/1",
    ("SpectralNormalization", "sn_u"): "spectral/1",
}
"""Names of variables in legacy files that differ from Keras 3's attribute names."""

_Key = tuple[str, ...]


def _local_names(holder: Holder, variables: Mapping[str, str]) -> dict[str, str]:
    return {_LOCAL.get((holder.cls, variable), variable): path for variable, path in variables.items()}


def _pair(expected: Iterable[Slot], groups: Mapping[_Key, Mapping[str, str]]) -> dict[tuple[str, str], _Key]:
    """Which named group of variables belongs to which holder, as far as names leave no choice."""
    paired: dict[tuple[str, str], _Key] = {}
    holders = {(slot.path, h.group): h for slot in expected for h in slot.holders if own_variables(h.cls, h.config)}
    free = dict(groups)
    while True:
        fits = {place: [key for key in free if _fits(holder, key, free[key])] for place, holder in holders.items()}
        takers: dict[_Key, int] = {}
        for keys in fits.values():
            for key in keys:
                takers[key] = takers.get(key, 0) + 1
        sure = {place: keys[0] for place, keys in fits.items() if len(keys) == 1 and takers[keys[0]] == 1}
        if not sure:
            break
        for place, key in sure.items():
            paired[place] = key
            del holders[place], free[key]
    # Keras 2 names the variables of a wrapped layer by the wrapper alone (`time_distributed/kernel:0`).
    if len(holders) == 1 and len(free) == 1:
        (place, holder), (key, variables) = holders.popitem(), free.popitem()
        if set(_local_names(holder, variables)) == _file_names(holder):
            paired[place] = key
    return paired


def _fits(holder: Holder, key: _Key, variables: Mapping[str, str]) -> bool:
    """True if the names around the variables are those of the holder, from the innermost outwards."""
    chain = holder.names[-len(key) :] if key else ()
    named = all(not names or part in names for part, names in zip(reversed(key), reversed(chain), strict=False))
    return bool(key) and named and set(_local_names(holder, variables)) == _file_names(holder)


def _file_names(holder: Holder) -> set[str]:
    """The variables that legacy files have: not the copy of the kernel that a SpectralNormalization holds."""
    return set(own_variables(holder.cls, holder.config)) - {"spectral/0"}


def _legacy_layers(
    source: Hdf5Source, top: str, expected: list[Slot] | None, weights: Mapping[str, str], notes: list[str]
) -> Iterator[NativeLayer]:
    """The layers that one layer of the outermost model consists of."""
    groups: dict[_Key, dict[str, str]] = {}
    for name, path in weights.items():
        *holder_names, variable = name.partition(":")[0].split("/")
        groups.setdefault(tuple(holder_names), {})[variable] = path
    evidence = "class"
    if expected is None:
        expected, evidence = _guessed(top, groups), "name"
    paired = _pair(expected, groups)
    left = dict(groups)
    for slot in expected:
        tensors: dict[str, NativeTensor] = {}
        missing = [h for h in slot.holders if own_variables(h.cls, h.config) and (slot.path, h.group) not in paired]
        for holder in () if missing else slot.holders:
            key = paired.get((slot.path, holder.group))
            if key is not None:
                for local, path in _local_names(holder, left.pop(key)).items():
                    tensors[holder.prefix + local] = _tensor(source, path, local in STATE.get(holder.cls, ()))
        if missing:
            notes.append(
                f"{slot.path}: the variables of this {slot.cls} are not those that its config tells; they stay unnamed"
            )
        elif not slot.known:
            notes.append(f"{slot.path}: {slot.cls} is not a layer of Keras; its variables are kept as they are")
            for key in [key for key in left if len(expected) == 1 or slot.path.split(".")[-1] in key]:
                for variable, path in left.pop(key).items():
                    tensors[str(len(tensors))] = _tensor(source, path, _is_seed("/".join((*key, variable))))
        yield NativeLayer(
            slot.path, None if missing else slot.cls, tensors, slot.config, "none" if missing else evidence
        )
    for key, variables in left.items():
        state = _is_seed("/".join(key))
        tensors = {name: _tensor(source, path, state) for name, path in variables.items()}
        yield NativeLayer(".".join(key) if key[:1] == (top,) else ".".join((top, *key)), None, tensors)


def _guessed(top: str, groups: Mapping[_Key, Mapping[str, str]]) -> list[Slot]:
    """The layer that a file without a config has under an automatic name (`conv2d_3`), if its variables agree."""
    cls = class_of_group(top)
    if cls is None or not (cls in VARIABLES or parts(cls)):
        return []
    names = (frozenset([top]),)
    pieces = [
        (cls, "", names, ""),
        *((p.cls, f"/{p.group}", (*names, frozenset([p.name] if p.name else [])), p.prefix) for p in parts(cls)),
    ]
    holders = []
    for holder_cls, group, chain, prefix in pieces:
        whole = VARIABLES.get(holder_cls, ())
        if whole:
            probe = Holder(top + group, chain, holder_cls, {}, prefix)
            there = [key for key, variables in groups.items() if set(_local_names(probe, variables)) <= set(whole)]
            found = [_local_names(probe, groups[key]) for key in there]
            config = _switches(holder_cls, found[0]) if found else {}
            holders.append(Holder(top + group, chain, holder_cls, config, prefix))
    slot = Slot(top, cls, {}, True, top, top, names, tuple(holders))
    complete = len(_pair([slot], groups)) == len(holders) == len(groups)
    return [slot] if complete else []


def _switches(cls: str, found: Mapping[str, str]) -> Config:
    """The config under which a layer has exactly the variables found, as far as they depend on one."""
    return {
        "use_bias": "bias" in found,
        "bias_axes": "x" if "bias" in found else None,
        "scale": "gamma" in found,
        "center": "beta" in found,
    }
