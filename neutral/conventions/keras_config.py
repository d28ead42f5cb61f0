"""The places of variables that a Keras config implies: which layer, which group, in which order.

Nothing of a config is built or resolved: it is a text to be read. Keras numbers the groups of a file per class in the
order of `model.layers`, which for a Functional model is an order of the graph, not of the config (`graph_order`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neutral.conventions.keras_onnx import KERAS2_NAMES
from neutral.conventions.keras_variables import CELL_OF, KNOWN, PYTHON_NAME, RECURRENT, Counter, parts, snake_case

Config = Mapping[str, Any]

_KERAS_MODULES = ("keras", "tf_keras", "tensorflow.keras", "tensorflow.python.keras")
_OPERATION_MODULES = ("keras.ops", "keras.src.ops")
_DEEPEST = 64


@dataclass(frozen=True)
class Holder:
    """Something that has numbered variables of its own: a layer, or a piece of one."""

    group: str
    """Its group in a file of Keras 2.13 and later; `<group>/vars` holds the variables."""
    names: tuple[frozenset[str], ...]
    """The names it and the layers around it may have, outermost first; an empty set where the config does not say."""
    cls: str
    config: Config
    prefix: str = ""
    trainable: bool = True


@dataclass(frozen=True)
class Slot:
    """One layer of the model, as `NativeLayer` has it, and where its variables are."""

    path: str
    cls: str
    config: Config
    known: bool
    """False for a class that is not Keras' own: what it holds is found in the file."""
    group: str
    top: str
    """The layer of the outermost model that it belongs to."""
    names: tuple[frozenset[str], ...]
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True)
class _Place:
    group: str
    path: str
    top: str
    names: tuple[frozenset[str], ...]
    flags: Config
    trainable: bool
    depth: int

    def down(self, group: str, *names: str, path: str | None = None, **flags: Any) -> _Place:
        return _Place(
            f"{self.group}/{group}".lstrip("/"),
            self.path if path is None else f"{self.path}.{path}".lstrip("."),
            self.top,
            (*self.names, frozenset(names)),
            {**self.flags, **flags},
            self.trainable,
            self.depth + 1,
        )


def is_keras2(config: Config, version: object = None) -> bool:
    """True for a config of Keras 1 or 2; `version` is what its file says beside it.

    >>> is_keras2({"module": "keras"}), is_keras2({"module": "keras"}, "2.15.0"), is_keras2({"class_name": "Sequential"})
    (False, True, True)
    """
    told = version or config.get("keras_version")
    return told[:2] in ("1.", "2.") if isinstance(told, str) else "module" not in config


def entry_name(entry: Config) -> str:
    """The name of a serialized layer."""
    name = entry.get("name") or entry["config"].get("name")
    return name if isinstance(name, str) else ""


def entry_class(entry: Config) -> tuple[str, bool]:
    """The class of a serialized layer, and whether it is Keras' own."""
    cls, module, registered = entry["class_name"], entry.get("module"), entry.get("registered_name")
    if not isinstance(cls, str):
        raise TypeError(f"class_name {cls!r}")
    cls = PYTHON_NAME.get(cls, cls)
    if isinstance(registered, str) and ">" in registered:
        return registered, False
    if ">" in cls:
        return cls, False
    if isinstance(module, str):
        own = module.split(".")[0] in {m.split(".")[0] for m in _KERAS_MODULES} and module.startswith(_KERAS_MODULES)
        return (cls, True) if own else (f"{module}.{cls}", False)
    return (cls, True) if cls in KNOWN and registered in (None, cls) else (f"Custom>{cls}", False)


def python_name(entry: Config) -> str:
    """The name of the class that Keras makes of a serialized layer, by which it counts groups."""
    cls = entry["class_name"]
    if cls == "Model" and is_model(entry):
        return "Functional"
    return PYTHON_NAME.get(cls, cls.rpartition(">")[2])


def is_model(entry: Config) -> bool:
    """True for a Sequential or Functional model, whose layers its config lists."""
    config = entry.get("config")
    if entry.get("class_name") == "Sequential":
        return isinstance(config, list) or (isinstance(config, Mapping) and "layers" in config)
    return isinstance(config, Mapping) and {"layers", "input_layers", "output_layers"} <= set(config)


def unwired(entry: Config) -> Config:
    """A model without its wiring: its layers, in the order in which the config lists them."""
    if not is_model(entry):
        return entry
    config = entry["config"]
    whole = {"layers": config} if isinstance(config, list) else config
    layers = [unwired(layer) for layer in whole["layers"]]
    return {**entry, "class_name": "Sequential", "config": {**whole, "layers": layers}}


def model_layers(entry: Config) -> list[Config]:
    """The layers of a serialized model in the order of Keras' `model.layers`."""
    config = entry["config"]
    if entry["class_name"] == "Sequential":
        listed = list(config if isinstance(config, list) else config["layers"])
        return listed[1:] if listed and listed[0]["class_name"] == "InputLayer" else listed
    return [layer for layer in graph_order(config) if not _is_operation(layer)]


def _is_operation(entry: Config) -> bool:
    module = entry.get("module")
    return isinstance(module, str) and module.startswith(_OPERATION_MODULES)


def graph_order(config: Config) -> list[Config]:
    """The operations of a Functional config, inputs first (`keras.src.ops.function.map_graph`).

    By depth, counted from the outputs, and within one depth by the first visit of a depth-first walk from the outputs.
    """
    entries = {entry_name(entry): entry for entry in config["layers"]}
    nodes, outputs = _numbered_nodes(config, entries)
    visited: dict[str, int] = {}
    finished: list[tuple[str, int]] = []
    done: set[tuple[str, int]] = set()
    open_: set[tuple[str, int]] = set()
    for output in outputs:
        stack: list[tuple[tuple[str, int], Iterator[tuple[str, int]]]] = []
        wanted: tuple[str, int] | None = output
        while wanted is not None or stack:
            if wanted is not None and wanted not in done:
                if wanted in open_:
                    raise ValueError(f"layer {wanted[0]!r} is part of a cycle")
                open_.add(wanted)
                visited.setdefault(wanted[0], len(visited))
                stack.append((wanted, iter(nodes[wanted])))
            wanted = next(stack[-1][1], None) if stack else None
            if wanted is None and stack:
                node = stack.pop()[0]
                open_.discard(node)
                done.add(node)
                finished.append(node)
    node_depth: dict[tuple[str, int], int] = {}
    depth: dict[str, int] = {}
    for node in reversed(finished):
        here = max(node_depth.get(node, 0), depth.get(node[0], 0))
        depth[node[0]] = node_depth[node] = here
        for parent in nodes[node]:
            node_depth[parent] = max(node_depth.get(parent, 0), here + 1)
    for name, _ in history_list(config["input_layers"]):
        if name not in depth:
            depth[name], visited[name] = 0, -1
    return [entries[name] for name in sorted(depth, key=lambda name: (-depth[name], visited[name]))]


_Calls = dict[tuple[str, int], list[tuple[str, int]]]


def _numbered_nodes(config: Config, entries: Mapping[str, Config]) -> tuple[_Calls, list[tuple[str, int]]]:
    """The inputs of each call of each layer, and the calls that give the outputs. Calls count from 0.

    A nested model has its own construction as a first call, which is not in the file. Keras 2 counts it everywhere;
    Keras 3 counts it in `output_layers` alone, and for Functional models alone (`Functional.get_config`).
    """
    modern = any(isinstance(node, Mapping) for entry in entries.values() for node in entry.get("inbound_nodes") or [])
    calls = {
        name: [_node_inputs(node, entries) for node in entry.get("inbound_nodes") or [[]]]
        for name, entry in entries.items()
    }
    outputs = history_list(config["output_layers"])
    referred = [pair for each in calls.values() for inputs in each for pair in inputs]
    highest: dict[str, int] = {}
    for name, index in referred if modern else referred + outputs:
        highest[name] = max(index, highest.get(name, 0))
    nested = {name for name, entry in entries.items() if is_model(entry)}
    first = {name: int(name in nested and highest.get(name, 0) == len(each)) for name, each in calls.items()}
    last = (
        {name: int(name in nested and entries[name]["class_name"] != "Sequential") for name in calls}
        if modern
        else first
    )
    numbered = {
        (name, index): [(inner, number - first[inner]) for inner, number in inputs]
        for name, each in calls.items()
        for index, inputs in enumerate(each)
    }
    return numbered, [(name, max(0, index - last[name])) for name, index in outputs]


def history_list(value: Any) -> list[tuple[str, int]]:
    """(layer, node) of `[["a", 0, 0], ...]`, of a single flat `["a", 0, 0]`, or of a nest of them."""
    if isinstance(value, Mapping):
        return [pair for key in sorted(value) for pair in history_list(value[key])]
    if isinstance(value, list):
        if len(value) >= 3 and isinstance(value[0], str) and isinstance(value[1], int):
            return [(value[0], value[1])]
        return [pair for part in value for pair in history_list(part)]
    return []


CONSTANT = "_CONSTANT_VALUE"
"""The layer that Keras 2 names where a call takes a constant first: `["_CONSTANT_VALUE", -1, 1.0, {"y": ["a", 0, 0]}]`."""


def _node_inputs(node: Any, entries: Mapping[str, Config]) -> list[tuple[str, int]]:
    """The tensors that one call of a layer takes, in the order Keras flattens them."""
    if isinstance(node, Mapping):
        return _keras_tensors([node.get("args", []), node.get("kwargs", {})])
    found: list[tuple[str, int]] = []
    for part in _legacy_calls(node):
        found += [] if part[0] == CONSTANT else [(part[0], part[1])]
        if len(part) > 3 and isinstance(part[3], Mapping):
            arguments = [pair for key in sorted(part[3]) for pair in history_list(part[3][key])]
            found += [pair for pair in arguments if pair[0] in entries]
    return found


def _legacy_calls(node: Any) -> list[list[Any]]:
    """`["a", 0, 0, {kwargs}]` entries of a Keras 2 node, in whatever nest."""
    if isinstance(node, Mapping):
        return [call for key in sorted(node) for call in _legacy_calls(node[key])]
    if not isinstance(node, list):
        return []
    if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
        return [node]
    return [call for part in node for call in _legacy_calls(part)]


def _keras_tensors(value: Any) -> list[tuple[str, int]]:
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            name, node, _ = value["config"]["keras_history"]
            return [(name, node)]
        return [pair for key in sorted(value) for pair in _keras_tensors(value[key])]
    if isinstance(value, list):
        return [pair for part in value for pair in _keras_tensors(part)]
    return []


def slots(model: Config, keras2: bool = False) -> list[Slot]:
    """Every layer of a serialized Sequential or Functional model, nested ones too, in the order of computation.

    Those of a Keras 2 model (`keras2`) have their settings in the words of Keras 3, where these mean something else.
    """
    found = list(_model_slots(model, _Place("", "", "", (), {}, True, 0)))
    return [replace(slot, config=_from_keras2(slot)) for slot in found] if keras2 else found


_KERAS2_DEFAULTS: Mapping[str, Config] = {"GRU": {"reset_after": False}}
"""What a layer did before Keras had the setting."""


def _from_keras2(slot: Slot) -> Config:
    names = {key: _keras2_name(slot.config[key]) for key in _ACTIVATIONS if key in slot.config}
    return {**_KERAS2_DEFAULTS.get(slot.cls, {}), **slot.config, **names}


_ACTIVATIONS = ("activation", "recurrent_activation")


def renamed_since_keras2(value: Any) -> Iterator[str]:
    """Activations named anywhere in a config of Keras 2 that Keras 3 computes in another way."""
    if isinstance(value, Mapping):
        yield from (str(value[key]) for key in _ACTIVATIONS if key in value and _keras2_name(value[key]) != value[key])
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from renamed_since_keras2(inner)


def _keras2_name(spec: Any) -> Any:
    """An activation of Keras 2, by the name that tells it apart from Keras 3's."""
    name = spec.get("config") if isinstance(spec, Mapping) else spec
    return KERAS2_NAMES.get(name, spec) if isinstance(name, str) else spec


def layer_slots(entry: Config, group: str) -> list[Slot]:
    """The layers that one serialized layer at `group` of some object consists of."""
    name = entry_name(entry)
    return list(_slots(entry, _Place(group, name, name, (frozenset([name]),), {}, True, 1)))


def _model_slots(model: Config, place: _Place) -> Iterator[Slot]:
    if place.depth > _DEEPEST:
        raise ValueError(f"models nested deeper than {_DEEPEST} levels")
    counter = Counter()
    config = model["config"]
    trainable = place.trainable and not (isinstance(config, Mapping) and config.get("trainable") is False)
    for entry in model_layers(model):
        name = entry_name(entry)
        inner = place.down(f"layers/{counter.unique(snake_case(python_name(entry)))}", name, path=name)
        yield from _slots(
            entry, _Place(inner.group, inner.path, place.top or name, inner.names, place.flags, trainable, inner.depth)
        )


def _slots(entry: Config, place: _Place) -> Iterator[Slot]:
    if place.depth > _DEEPEST:
        raise ValueError(f"layers nested deeper than {_DEEPEST} levels")
    if is_model(entry):
        yield from _model_slots(entry, place)
        return
    cls, own = entry_class(entry)
    config: Config = entry["config"]
    if config.get("trainable") is False:
        place = _Place(place.group, place.path, place.top, place.names, place.flags, False, place.depth)
    if not own or cls not in KNOWN:
        yield _slot(place, cls, config, known=False)
    elif cls == "TimeDistributed":
        inner = config["layer"]
        yield from _slots(inner, place.down("layer", entry_name(inner), time_distributed=True))
    elif cls == "SpectralNormalization":
        inner = config["layer"]
        own_part = Holder(place.group, place.names, cls, config, trainable=False)
        for slot in _slots(inner, place.down("layer", entry_name(inner), spectral_normalization=True)):
            holders = (*slot.holders, own_part)
            yield Slot(slot.path, slot.cls, slot.config, slot.known, place.group, slot.top, place.names, holders)
    elif cls == "Bidirectional":
        yield from _bidirectional(entry, place)
    elif cls == "RNN":
        yield from _cells(config, place)
    else:
        yield _slot(place, cls, config)


def _slot(place: _Place, cls: str, config: Config, prefix: str = "", known: bool = True) -> Slot:
    """A layer that has its variables itself, or in pieces of fixed names."""
    holders = [Holder(place.group, place.names, cls, config, prefix, place.trainable)]
    for part in parts(cls):
        names = frozenset([part.name] if part.name else [])
        part_config = config if part.cls != "EinsumDense" else {"bias_axes": config.get("use_bias", True)}
        holders.append(
            Holder(
                f"{place.group}/{part.group}",
                (*place.names, names),
                part.cls,
                part_config,
                prefix + part.prefix,
                place.trainable,
            )
        )
    return Slot(
        place.path,
        cls,
        {**config, **place.flags},
        known,
        place.group,
        place.top,
        place.names,
        tuple(holders) if known else (),
    )


def _bidirectional(entry: Config, place: _Place) -> Iterator[Slot]:
    config = entry["config"]
    forward = config["layer"]
    backward = config.get("backward_layer") or forward
    sides = []
    for side, layer in (("forward", forward), ("backward", backward)):
        stem = entry_name(layer).removeprefix("forward_").removeprefix("backward_")
        inner = place.down(f"{side}_layer", entry_name(layer), stem, f"{side}_{stem}", f"{side}_{entry_name(layer)}")
        cls, own = entry_class(layer)
        if own and cls == "RNN":
            cell_cls, own = entry_class(layer["config"]["cell"])
            if own and cell_cls in CELL_OF:
                cell = layer["config"]["cell"]
                merged = {**layer["config"], **cell["config"], "cell": True}
                sides.append((CELL_OF[cell_cls], merged, _slot(inner, CELL_OF[cell_cls], merged, f"{side}_layer/")))
                continue
        if not own or cls not in RECURRENT:
            yield _slot(place, f"Bidirectional>{cls}", config, known=False)
            return
        sides.append((cls, layer["config"], _slot(inner, cls, layer["config"], f"{side}_layer/")))
    (cls, inner_config, first), (other, other_config, second) = sides
    merged = {**inner_config, **place.flags, "bidirectional": True, "merge_mode": config.get("merge_mode", "concat")}
    alike = mirrored(inner_config, other_config if config.get("backward_layer") else None)
    cls = cls if cls == other and alike else "Bidirectional"
    yield Slot(place.path, cls, merged, True, place.group, place.top, place.names, first.holders + second.holders)


_SAME_BOTH_WAYS = ("units", "activation", "recurrent_activation", "use_bias", "reset_after")


def mirrored(forward: Config, backward: Config | None) -> bool:
    """True if the two layers of a Bidirectional compute alike, the second one backwards; None: it is made of the first."""
    if forward.get("go_backwards"):
        return False
    if backward is None:
        return True
    return bool(backward.get("go_backwards")) and all(forward.get(n) == backward.get(n) for n in _SAME_BOTH_WAYS)


def _cells(config: Config, place: _Place) -> Iterator[Slot]:
    cell = config["cell"]
    cells: Sequence[Config] = [cell]
    inner = place.down("cell", entry_name(cell))
    places = [inner]
    if entry_class(cell) == ("StackedRNNCells", True):
        counter = Counter()
        cells = cell["config"]["cells"]
        places = [
            inner.down(
                f"cells/{counter.unique(snake_case(python_name(each)))}",
                entry_name(each),
                path=str(i),
            )
            for i, each in enumerate(cells)
        ]
    for each, there in zip(cells, places, strict=True):
        cls, own = entry_class(each)
        shared = {key: config[key] for key in ("return_sequences", "go_backwards") if key in config}
        merged = {**shared, **each["config"], **there.flags, "cell": True}
        if own and cls in CELL_OF:
            holder = Holder(there.group, there.names, cls, each["config"], trainable=place.trainable)
            yield Slot(there.path, CELL_OF[cls], merged, True, there.group, place.top, there.names, (holder,))
        else:
            yield Slot(there.path, cls, merged, False, there.group, place.top, there.names)
