"""What a file of torch.save means by its nodes: its sets of weights, and the modules of a pickled module.

>>> found = weight_sets({"epoch": 3, "model": {"fc.weight": _example()}, "ema": {"fc.weight": _example()}})
>>> [s.key for s in found.sets]
['model', 'ema']

A file may hold several weight sets: the raw weights and their moving average, two networks. One is never chosen in
silence. Modules are known by what their state holds (`_parameters`, `_modules`), so that no class is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from neutral.containers.pickle_machine import Node, items_of, members_of
from neutral.containers.torch_file import TorchFile
from neutral.containers.torch_refs import StorageRef, TensorRef, numpy_array
from neutral.errors import BadFile, Problem, Refused, printable

_DEPTH: Final = 8
_MODULE_DEPTH: Final = 200
VISITS: Final = 100_000
_NAME_CHARACTERS: Final = 64 << 20

_LONG_LIST: Final = 10_000
_PACKED_CLASS: Final = re.compile(
    r"__torch__\.torch\.classes\.(quantized|rnn|sparse|xnnpack|mkldnn|mkl|metal|vulkan)\."
)
_FEW: Final = 8

_NO_WEIGHTS: Final = re.compile(
    r"optim\w*|(lr_?)?sched\w*|callbacks?|loops|rng\w*|random\w*|amp|(grad_?)?scaler|hyper_parameters|hparams"
    r"|datamodule\w*|args|config|cfg|history|sampler\w*|metrics?|loss(es)?|MixedPrecision\w*",
    re.IGNORECASE,
)
"""Keys of a checkpoint under which tensors are no weights."""
_AVERAGE: Final = re.compile(r"ema|shadow|averag", re.IGNORECASE)


PACKED: Final = "weights packed by a class of torch's own, as quantized layers have them"
_OWN_WAY: Final = "a module that is pickled in a way of its own"


def _example() -> TensorRef:
    return TensorRef(StorageRef("0", "float32", 0, 4, 4), 0, (1,), (1,), "float32")


@dataclass(frozen=True)
class WeightSet:
    """One set of weights in a file. `key` is its place, "" for the whole file; `value` a mapping or a module's node."""

    key: str
    value: Any

    def tensors(self, where: str) -> Mapping[Any, Any]:
        """Names and values as the state dict has them, or would have them."""
        return walk(self.value, where).tensors if is_module(self.value) else children_of(self.value)


@dataclass
class Found:
    """The weight sets of a file, what is known to be none by its key, and tensors that lie beside the sets."""

    sets: list[WeightSet] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)
    stray: list[str] = field(default_factory=list)


def is_tensor(value: object) -> bool:
    """True for what holds elements: a tensor of torch, readable or not, or an array of numpy."""
    return type(value) is TensorRef or is_unreadable(value) or numpy_array(value) is not None


def is_unreadable(value: object) -> bool:
    """True for tensors that are not plain elements in a storage: sparse, quantized, meta, uninitialized, …"""
    return type(value) is Node and ("._rebuild_" in value.cls or value.cls.startswith("torch.nn.parameter."))


def packs_weights(value: object) -> bool:
    """True for an object of torch's own C++ classes, or a tuple of quantized tensors: where quantized layers keep their
    weights."""
    if type(value) is Node:
        told = members_of(value.state) if value.cls == "torch.ScriptObject" else None
        return _PACKED_CLASS.match(str(told[-1]) if told else value.cls) is not None
    return type(value) is tuple and any(is_unreadable(member) for member in value[:_FEW])


def is_module(value: object) -> bool:
    """True for the node of a pickled torch.nn.Module, of whatever class, and for TorchScript's."""
    if type(value) is not Node:
        return False
    state = items_of(value.state)
    if state is None:
        return False
    return value.cls.startswith("__torch__.") or all(
        items_of(state.get(part)) is not None for part in ("_parameters", "_modules")
    )


def weight_sets(root: object) -> Found:
    """All weight sets of a file, in its order.

    A set is a module, or a mapping that holds tensors and no further set. Apart come what is under optimizers' and
    similar keys, lists of tensors and mappings of single numbers (metrics); they count as sets only if the file has
    nothing else, or if their key speaks of an average of the weights.
    """
    found = Found()
    lesser: list[WeightSet] = []
    _search(root, "", 0, found, lesser, set())
    averages = [s for s in lesser if _AVERAGE.search(s.key)]
    found.sets += lesser if not found.sets else averages
    found.others |= {s.key: s.value for s in lesser if s not in found.sets}
    return found


def _search(value: Any, key: str, depth: int, found: Found, lesser: list[WeightSet], seen: set[int]) -> bool:
    """Collect the sets in `value`; true if there are any. Not deeper than a few levels, so recursion is bounded."""
    if depth > _DEPTH or id(value) in seen or len(seen) > VISITS:
        return False
    if is_module(value):
        seen.add(id(value))
        found.sets.append(WeightSet(key, value))
        return True
    children = children_of(value)
    if not children:
        return False
    seen.add(id(value))
    if key and children.keys() >= {"state", "param_groups"}:
        found.others[key] = value
        return False
    within = False
    direct = []
    for name, child in children.items():
        if type(name) is not str or name.endswith("_extra_state"):
            continue
        place = f"{key}.{name}" if key else name
        if is_tensor(child):
            direct.append(place)
        elif depth == 0 and _NO_WEIGHTS.fullmatch(name):
            found.others[place] = child
        else:
            within = _search(child, place, depth + 1, found, lesser, seen) or within
    if within:
        found.stray += direct
    elif direct:
        numbers = not any(type(v) is not TensorRef or v.shape for v in children.values() if is_tensor(v))
        mapping = items_of(value) is not None
        if not mapping or (numbers and depth):
            lesser.append(WeightSet(key, value))
            return False
        found.sets.append(WeightSet(key, value))
        return True
    return within


def children_of(value: Any) -> dict[Any, Any]:
    """What is inside a container or an object, by name; the members of a list by number."""
    items = items_of(value)
    if items is not None:
        return items
    if type(value) is Node:
        return items_of(value.state) or {}
    members = members_of(value)
    if members is None or len(members) > _LONG_LIST:
        return {}
    return {str(i): member for i, member in enumerate(members)}


def choose(file: TorchFile, found: Found, key: str | None) -> WeightSet:
    """The one weight set of a file, or the one that `key` names."""
    where = str(file.path)
    if key is not None:
        named = {s.key: s for s in found.sets}.get(key)
        value = named.value if named else _resolve(file.root, key)
        if value is None:
            raise Refused(
                Problem(where, f"nothing under the key {key}", *_choice([s.key for s in found.sets if s.key]))
            )
        return WeightSet(key, value)
    if not found.sets:
        raise BadFile(
            Problem(
                where,
                "no set of weights",
                "a state dict or a module with tensors",
                "name its place with --key" if found.others else "is this a file of weights?",
            )
        )
    if len(found.sets) > 1:
        names = ", ".join(f"--key {printable(s.key, 80)}" for s in found.sets[:20])
        raise Refused(
            Problem(where, f"{len(found.sets)} sets of weights", "to know which one is meant", f"choose one: {names}")
        )
    return found.sets[0]


def _choice(keys: Sequence[str]) -> tuple[str, str]:
    """(what keys a file has, what to do): its one set of weights may be the whole file, which has none."""
    if keys:
        return f"one of: {listed(keys)}", "choose one with --key"
    return "no key, for the whole file is one set of weights", "leave --key out"


def _resolve(value: Any, key: str) -> Any:
    """What lies under keys joined by dots; a key may itself have dots in it."""
    while key:
        children = {k: v for k, v in children_of(value).items() if type(k) is str}
        name = max((k for k in children if key == k or key.startswith(k + ".")), key=len, default=None)
        if name is None:
            return None
        value, key = children[name], key[len(name) + 1 :]
    return value if is_module(value) or children_of(value) else None


def listed(names: Sequence[object]) -> str:
    """Some of the names, and how many more there are."""
    shown = [printable(name, 80) for name in names[:10]]
    return ", ".join(shown) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@dataclass(frozen=True)
class Module:
    """One module of a pickled module: its path, its name in its parent, its node, the paths of its children."""

    path: str
    name: str
    node: Node
    children: list[Module] = field(default_factory=list)


@dataclass
class Walked:
    """A pickled module: its tensors by state-dict name, and its modules, the outermost first."""

    tensors: dict[str, Any] = field(default_factory=dict)
    modules: list[Module] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    """Where weights may be that cannot be read, and what is there."""


def walk(root: Node, where: str) -> Walked:
    """Every persistent tensor of a pickled module under the name that its state dict would give it."""
    walked = Walked()
    characters = 0
    pending: list[tuple[Module, Module | None, frozenset[int]]] = [(Module("", "", root), None, frozenset())]
    while pending:
        module, parent, above = pending.pop()
        path, node = module.path, module.node
        characters += len(path) + 100
        endless = id(node) in above or len(above) >= _MODULE_DEPTH
        if endless or len(walked.modules) >= VISITS or characters > _NAME_CHARACTERS:
            raise BadFile(
                Problem(
                    f"{where}: {printable(path, 80)}",
                    "modules inside each other without an end",
                    "a tree of modules",
                    "the file is forged",
                )
            )
        walked.modules.append(module)
        if parent is not None:
            parent.children.append(module)
        state = items_of(node.state) or {}
        own, children = _members(node, state)
        prefix = path + "." if path else ""
        walked.closed |= {f"{prefix}{local}": what for local, what in _closed(state)}
        for local, value in own.items():
            if type(local) is str and value is not None:
                walked.tensors[prefix + local] = value
                characters += len(prefix) + len(local)
        inside = above | {id(node)}
        pending += [(Module(prefix + name, name, child), module, inside) for name, child in reversed(children.items())]
    return walked


def _closed(state: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """What of a module's state is neither a tensor nor a module, and may hold weights all the same."""
    for name, value in state.items():
        if type(name) is str and packs_weights(value):
            yield name, PACKED
        elif type(name) is str and type(value) is Node and value.cls.startswith("__torch__.") and _is_own(value):
            yield name, PACKED if ".quantized." in value.cls else _OWN_WAY
    for name, value in (items_of(state.get("_modules")) or {}).items():
        if type(name) is str and type(value) is Node and not is_module(value):
            yield name, PACKED if ".quantized." in value.cls else _OWN_WAY


def _is_own(value: Node) -> bool:
    return value.state is not None and items_of(value.state) is None


def _members(node: Node, state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, Node]]:
    """(a module's own parameters and persistent buffers, its submodules)."""
    if node.cls.startswith("__torch__."):
        own = {name: value for name, value in state.items() if type(value) is TensorRef}
        return own, {name: value for name, value in state.items() if type(name) is str and is_module(value)}
    passing = {m for m in members_of(state.get("_non_persistent_buffers_set")) or () if type(m) is str}
    own = dict(items_of(state.get("_parameters")) or {})
    own |= {name: value for name, value in (items_of(state.get("_buffers")) or {}).items() if name not in passing}
    modules = items_of(state.get("_modules")) or {}
    return own, {name: value for name, value in modules.items() if type(name) is str and is_module(value)}
