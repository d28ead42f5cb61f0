"""The names of layers in TensorFlow files: from the object graph where there is one, else from variable names.

>>> [group.path for group in by_name([("a", "enc/lstm_cell/kernel"), ("b", "enc/lstm_cell/recurrent_kernel")], listed=False)]
['enc']

An object graph says where a variable hangs (`model/_operations/1/cell/kernel`) and what it was called
(`seq/enc/lstm_cell/kernel`). Positions are replaced by names where the called name has them.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from neutral.containers.saved_model import Attribute, Node
from neutral.errors import BadFile, Problem

OPTIMIZER, METRICS, STATE = "optimizer", "metrics", "state"

_LISTS = frozenset(
    [
        "variables",
        "trainable_variables",
        "non_trainable_variables",
        "_all_variables",
        "_trainable_variables",
        "_non_trainable_variables",
        "_tracked",
        "keras_api",
        "regularization_losses",
        "signatures",
    ]
)
_CONTAINERS = frozenset(["_functional", "_operations", "_layers", "layers", "_self_tracked_trackables"])
_METRIC_EDGES = frozenset(
    ["metrics", "_metrics", "compiled_metrics", "compiled_loss", "_compile_metrics", "_loss_tracker"]
)
_RANDOM_EDGES = frozenset(["_random_generator", "seed_generator", "_seed_generator"])
_ITERATIONS = frozenset(["_iterations", "iterations", "iter"])
_ATTENTION = {
    prefix + name: local
    for prefix in ("", "_")
    for name, local in {
        "query_dense": "query",
        "key_dense": "key",
        "value_dense": "value",
        "output_dense": "attention_output",
    }.items()
}
_ATTENTION_NAMES = frozenset(_ATTENTION.values())
_DIRECTIONS = frozenset(("forward_layer", "backward_layer"))
_ALIASES = frozenset(["model", "net", "network", "module"])
# What Keras 2 hangs on every layer of a SavedModel beside its own attributes.
_BOOKKEEPING = (
    _LISTS
    | _RANDOM_EDGES
    | frozenset(
        [
            "__call__",
            "call_and_return_all_conditional_losses",
            "call_and_return_conditional_losses",
            "_default_save_signature",
            "state_spec",
            "input_spec",
        ]
    )
)
_STATES = frozenset(["states", "_states"])
_CELLED = _STATES | {"cell"}
_DIRECTED = _DIRECTIONS | {"layer"}
_WRAPPED = frozenset(["layer", "kernel", "_kernel", "vector_u", "sn_u"])
_POSITION = re.compile(r"layer(?:_with_weights)?-(\d+)\Z")
_CELL = re.compile(r"(?:lstm|gru|simple_rnn)_cell(?:_\d+)?\Z")
_NORM_LOCALS = frozenset(["gamma", "beta", "moving_mean", "moving_variance"])
_SLOTS = re.compile(r"(?:Adam|Adadelta|Adagrad|Ftrl|Momentum|RMSProp|adam_[mv])(?:_\d+)?\Z")
_AVERAGE = "ExponentialMovingAverage"
_POWERS = re.compile(r"(?:.*/)?beta[12]_power(?:_\d+)?\Z")
_COUNTERS = frozenset(("global_step", "save_counter"))

_DEEPEST = 100
_LIST_COST, _OPTIMIZER_COST = 10_000, 1_000_000


@dataclass(frozen=True)
class Group:
    """The variables of one layer: local name -> bundle key. `node` is the layer's object, `index` its cell's number."""

    path: str
    locals: dict[str, str] = field(default_factory=dict)
    node: int | None = None
    index: int = 0
    positional: bool = False


@dataclass(frozen=True)
class Place:
    """The best way to a variable: its edges from the root, the object after each edge, and each edge's rank."""

    edges: tuple[str, ...]
    nodes: tuple[int, ...]
    ranks: tuple[int, ...]
    attribute: Attribute


@dataclass
class Sorted:
    """Keys of a file by what they are."""

    placed: list[Place] = field(default_factory=list)
    named: list[tuple[str, str]] = field(default_factory=list)
    collections: dict[str, list[str]] = field(default_factory=dict)


def sort_keys(nodes: Sequence[Node], keys: Sequence[str], integer_scalars: frozenset[str]) -> Sorted:
    """Which keys are a layer's, by place or by name alone, and which belong to a collection."""
    found = Sorted()
    listed: list[tuple[tuple[int, ...], str, str]] = []
    seen = set()
    wanted = set(keys)
    optimizers = {number for number, node in enumerate(nodes) if _is_optimizer(node)}
    celled = {number for number, node in enumerate(nodes) if _has_cell(node)}
    for place in _places(nodes, optimizers):
        key, name = place.attribute.key, place.attribute.full_name
        if key not in wanted or key in seen:
            continue
        seen.add(key)
        if kind := _collection(place, optimizers, celled, key in integer_scalars):
            found.collections.setdefault(kind, []).append(key)
        elif _LISTS.isdisjoint(place.edges):
            found.placed.append(place)
        else:
            listed.append((place.ranks, key, name))
    found.named = [(key, name or key) for _, key, name in sorted(listed)]
    if rest := sorted(wanted - seen, key=natural):
        for key in rest:
            if kind := _named_collection(key, wanted):
                found.collections.setdefault(kind, []).append(key)
            else:
                found.named.append((key, key))
    return found


def _collection(place: Place, optimizers: set[int], celled: set[int], integer_scalar: bool) -> str | None:
    """The collection that a placed variable belongs to, or None for a weight."""
    owners = (0, *place.nodes[:-1])
    name = place.attribute.full_name
    if "/.OPTIMIZER_SLOT/" in place.attribute.key or not optimizers.isdisjoint(owners):
        return OPTIMIZER
    if not _METRIC_EDGES.isdisjoint(place.edges):
        return METRICS
    if not _RANDOM_EDGES.isdisjoint(place.edges) or name.endswith("seed_generator_state"):
        return STATE
    if any(edge in _STATES and n in celled for edge, n in zip(place.edges, owners, strict=True)):
        return STATE
    if name in _COUNTERS or (integer_scalar and len(place.edges) == 1):
        return STATE
    return None


def _named_collection(key: str, keys: set[str]) -> str | None:
    """The collection that a TF1 variable belongs to by its name: a slot is named after its variable."""
    base, _, last = key.rpartition("/")
    if base in keys and _SLOTS.match(last):
        return OPTIMIZER
    if base in keys and last == _AVERAGE:
        return "ema"
    if _POWERS.match(key) or "/.OPTIMIZER_SLOT/" in key:
        return OPTIMIZER
    return STATE if last in _COUNTERS else None


def _has_cell(node: Node) -> bool:
    return any(name == "cell" for name, _ in node.children)


def _is_optimizer(node: Node) -> bool:
    return node.has_slots or any(name in _ITERATIONS for name, _ in node.children)


def _places(nodes: Sequence[Node], optimizers: set[int]) -> list[Place]:
    """Every saved value with the cheapest way to it: by attributes, before lists, before an optimizer."""
    if not nodes:
        return []
    best: dict[int, tuple[int, str, int]] = {}
    done = {0}
    heap: list[tuple[int, int, int, int, str]] = []

    def push(number: int, cost: int) -> None:
        penalty = _OPTIMIZER_COST if number in optimizers else 0
        for rank, (name, child) in enumerate(nodes[number].children):
            if child not in done:
                heapq.heappush(heap, (cost + penalty + _edge_cost(name), number, rank, child, name))

    push(0, 0)
    while heap:
        cost, parent, rank, child, name = heapq.heappop(heap)
        if child not in done:
            done.add(child)
            best[child] = (parent, name, rank)
            push(child, cost)
    places = []
    for number, node in enumerate(nodes):
        if not node.attributes:
            continue
        edges, ways, ranks = [], [], []
        at = number
        while at in best:
            parent, name, rank = best[at]
            edges.append(name)
            ways.append(at)
            ranks.append(rank)
            at = parent
            if len(edges) > _DEEPEST:
                raise BadFile(Problem("object graph", f"objects nested over {_DEEPEST} deep", "fewer levels"))
        reversed_way = tuple(reversed(edges)), tuple(reversed(ways)), tuple(reversed(ranks))
        places += [Place(*reversed_way, attribute) for attribute in node.attributes]
    return places


def _edge_cost(name: str) -> int:
    if name in _LISTS or name in _METRIC_EDGES:
        return _LIST_COST
    return 2 if name in _CONTAINERS or _POSITION.match(name) else 1


@dataclass
class _Layer:
    """A layer under construction: the way to its object, its number inside a stack of cells, and its variables."""

    edges: tuple[str, ...]
    nodes: tuple[int, ...]
    ranks: tuple[int, ...]
    suffix: tuple[str, ...]
    variables: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Level:
    """One level of a layer's path."""

    label: str
    node: int
    parent: int
    positional: bool


def by_place(places: Sequence[Place], nodes: Sequence[Node], known: Mapping[int, str]) -> list[Group]:
    """Layers from the object graph. `known` are names that the file itself gives to objects."""
    keras3 = any(edge in ("_operations", "_kernel", "_embeddings") for place in places for edge in place.edges)
    layers: dict[tuple[tuple[int, ...], tuple[str, ...]], _Layer] = {}

    @cache
    def holds_only(allowed: frozenset[str], number: int) -> bool:
        return _holds_only(allowed, nodes[number], nodes)

    for place in places:
        _collect(place, holds_only, keras3, layers)
    ordered = sorted(layers.values(), key=lambda layer: (layer.ranks, layer.suffix))
    names = _position_names(ordered, known)
    levels = [_levels(layer) for layer in ordered]
    first = {level[0].label if len(level) > 1 and not level[0].positional else None for level in levels}
    stripped = len(first) == 1 and next(iter(first)) in _ALIASES
    if stripped:
        levels = [level[1:] for level in levels]
    paths = [
        ".".join([*(names.get(item.node, item.label) for item in level), *layer.suffix]) or "root"
        for level, layer in zip(levels, ordered, strict=True)
    ]
    times = Counter(paths)
    groups = []
    for path, level, layer in zip(paths, levels, ordered, strict=True):
        distinct = path if times[path] == 1 else ".".join([*layer.edges, *layer.suffix])
        node = layer.nodes[-1] if layer.nodes else 0
        index = int(layer.suffix[-1]) if layer.suffix else 0
        positional = bool(level) and all(item.positional for item in level)
        groups.append(Group(distinct, _locals(layer), node, index, positional))
    return groups


def _collect(
    place: Place,
    holds_only: Callable[[frozenset[str], int], bool],
    keras3: bool,
    layers: dict[tuple[tuple[int, ...], tuple[str, ...]], _Layer],
) -> None:
    """Find the layer of a variable: go up from it through cells, directions and wrappers."""
    value = place.attribute.name == "VARIABLE_VALUE"
    edges = place.edges[:-1] if value else place.edges
    local = (place.edges[-1] if place.edges else place.attribute.full_name) if value else place.attribute.name
    names = tuple(place.attribute.full_name.split("/"))[:-1]
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()
    used = len(edges)
    while used > 1:
        last = edges[used - 1]
        parent = place.nodes[used - 2]
        if used > 3 and last.isdigit() and edges[used - 3 : used - 1] == ("cell", "cells"):
            suffix, step, dropped = (last, *suffix), 3, 2
        elif last == "cell" and holds_only(_CELLED, parent):
            step, dropped = 1, 1
        elif last in _DIRECTIONS and holds_only(_DIRECTED, parent):
            prefix, step, dropped = (last, *prefix), 1, 1
        elif last in _ATTENTION:
            prefix, step, dropped = (_ATTENTION[last], *prefix), 1, 1
        elif last == "layer" and edges[used - 2] not in _ALIASES and holds_only(_WRAPPED, parent):
            step, dropped = 1, int(keras3)
        else:
            break
        used -= step
        names = names[: len(names) - dropped]
    way = place.nodes[:used]
    layer = layers.setdefault((way, suffix), _Layer(edges[:used], way, place.ranks[:used], suffix))
    layer.variables.append(("/".join((*prefix, local)), place.attribute.key, names))


def _holds_only(allowed: frozenset[str], node: Node, nodes: Sequence[Node]) -> bool:
    """Whether an object is a wrapper: beside what is allowed it has only Keras' bookkeeping and empty structures."""
    return all(
        name in allowed or name in _BOOKKEEPING or not (nodes[child].children or nodes[child].attributes)
        for name, child in node.children
    )


def _levels(layer: _Layer) -> list[_Level]:
    levels: list[_Level] = []
    pending, parent = False, 0
    for edge, node in zip(layer.edges, layer.nodes, strict=True):
        match = _POSITION.match(edge)
        if edge in _CONTAINERS:
            pending = True
            continue
        positional = bool(match) or (pending and edge.isdigit())
        levels.append(_Level(match[1] if match else edge, node, parent, positional))
        pending, parent = False, node
    return levels


def _position_names(layers: Sequence[_Layer], known: Mapping[int, str]) -> dict[int, str]:
    """Names for the objects that the graph only counts, where all that lies in them agrees on one."""
    votes: dict[int, set[str]] = {}
    siblings: dict[int, set[int]] = {}
    for layer in layers:
        levels = _levels(layer)
        last = next((i for i in range(len(levels) - 1, -1, -1) if levels[i].positional), None)
        if last is None:
            continue
        # What all variables of the layer agree on: the kernel of a wrapped layer carries that layer's name too.
        names = _common([names for _, _, names in layer.variables])
        # Under an attribute Keras 3 may leave the attribute's layer out of the name: then the position comes last.
        inside = len(levels) - 1 - last
        ends = names[: len(names) - inside] if inside and len(names) > last + 1 else names
        for level, name in zip(reversed(levels[: last + 1]), reversed(ends), strict=False):
            if not level.positional:
                break
            votes.setdefault(level.node, set()).add(name)
            siblings.setdefault(level.parent, set()).add(level.node)
    agreed = {node: next(iter(found)) for node, found in votes.items() if len(found) == 1}
    agreed |= {
        node: known[node] for node in votes.keys() | {n for layer in layers for n in layer.nodes} if node in known
    }
    for family in siblings.values():
        called = Counter(agreed[node] for node in family if node in agreed)
        for node in family:
            if node in agreed and node not in known and called[agreed[node]] > 1:
                del agreed[node]
    positional = {level.node for layer in layers for level in _levels(layer) if level.positional}
    return {node: name for node, name in agreed.items() if node in positional}


def _common(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest beginning that all have."""
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return tuple(column[0] for column in shared)


def _locals(layer: _Layer) -> dict[str, str]:
    """Local names as Keras 3 has them, by key; a name that would occur twice keeps its place in the list instead."""
    given = {name for name, _, _ in layer.variables}
    separable = any(name.endswith("pointwise_kernel") for name in given)
    found: dict[str, str] = {}
    for i, (name, key, _) in enumerate(layer.variables):
        wanted = _local_name(name, given, separable)
        found[wanted if wanted not in found else str(i)] = key
    return found


def _local_name(name: str, siblings: Collection[str], separable: bool) -> str:
    """An attribute's name as the public name of its variable."""
    head, slash, last = name.rpartition("/")
    if last.startswith("_") and head + slash + last.lstrip("_") not in siblings:
        last = last.lstrip("_")
    if last == "depthwise_kernel" and not separable:
        last = "kernel"
    if last in ("vector_u", "sn_u"):
        last = "spectral/1"
    return head + slash + last


def by_name(variables: Sequence[tuple[str, str]], *, listed: bool) -> list[Group]:
    """Layers from the names of variables: (key, `scope/layer/kernel`). `listed`: they are in Keras' own order."""
    named = [(key, tuple(name.removesuffix(":0").split("/"))) for key, name in variables]
    repeated = len({name for _, name in named}) < len(named)
    groups: list[tuple[tuple[str, ...], dict[str, str]]] = []
    latest: dict[tuple[str, ...], int] = {}
    previous: tuple[str, ...] | None = None
    for key, name in named:
        path, local = (name[:-1], name[-1]) if len(name) > 1 else (name, "0")
        at = latest.get(path)
        if at is None or local in groups[at][1] or (repeated and _other_kind(local, groups[at][1], path == previous)):
            at = latest[path] = len(groups)
            groups.append((path, {}))
        groups[at][1][local] = key
        previous = path
    if listed and len({path[0] for path, _ in groups}) == 1 and all(len(path) > 1 for path, _ in groups):
        # Sequential and subclassed models put their own name in front of every layer's.
        inside = [path[1:] for path, _ in groups]
        if not all(_CELL.match(path[0]) or path[0] in _ATTENTION_NAMES for path in inside):
            groups = [(path, found) for path, (_, found) in zip(inside, groups, strict=True)]
    return unique(Group(".".join(path), found) for path, found in _merged(groups))


def _other_kind(local: str, group: Mapping[str, str], adjacent: bool) -> bool:
    """Whether a variable cannot be of the layer before it, where names alone do not tell layers apart."""
    return not adjacent or (local in _NORM_LOCALS) != any(name in _NORM_LOCALS for name in group)


def _merged(groups: list[tuple[tuple[str, ...], dict[str, str]]]) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Cells, directions, attention projections and spectral norms joined to the layer that they are part of."""
    spectral = {path for path, found in groups if {"vector_u", "sn_u"} & found.keys()}
    places = {path for path, _ in groups} | {path[:-1] for path, _ in groups}
    families: dict[tuple[str, ...], set[str]] = {}
    for path, _ in groups:
        families.setdefault(path[:-1], set()).add(path[-1])
    out: dict[tuple[str, ...], tuple[dict[str, str], set[tuple[str, ...]]]] = {}
    result: list[tuple[tuple[str, ...], dict[str, str]]] = []
    stacks: dict[tuple[str, ...], int] = {}
    for path, found in groups:
        target, prefix = path, ""
        if len(path) > 1 and _CELL.match(path[-1]) and "recurrent_kernel" in found:
            target = path[:-1]
            if len(target) > 1 and target[-1].startswith("stacked_rnn_cells"):
                target = target[:-1]
                number = stacks.get(target, 0)
                stacks[target] = number + 1
                target = (*target, str(number))
            elif len(target) > 1 and (direction := _direction(target, places)):
                target, prefix = target[:-1], direction + "/"
        elif len(path) > 1 and path[-1] in _ATTENTION_NAMES:
            if _ATTENTION_NAMES - {"attention_output"} <= families[path[:-1]]:
                target, prefix = path[:-1], path[-1] + "/"
        elif path[:-1] in spectral:
            target = path[:-1]
        names = {prefix + local: key for local, key in found.items()}
        known, parts = out.get(target, ({}, {path}))
        if path in parts or known.keys() & names.keys():
            result.append((target, names))
            out[target] = names, {path}
        else:
            known.update(names)
            parts.add(path)
    return [(path, _public(found)) for path, found in result]


def _public(found: Mapping[str, str]) -> dict[str, str]:
    """Local names as Keras 3 has them; a name that would occur twice stays as it is."""
    separable = any(name.endswith("pointwise_kernel") for name in found)
    out: dict[str, str] = {}
    for name, key in found.items():
        wanted = _local_name(name, found, separable)
        out[name if wanted in out or (wanted != name and wanted in found) else wanted] = key
    return out


def _direction(path: tuple[str, ...], places: Collection[tuple[str, ...]]) -> str | None:
    for word, other in (("forward_", "backward_"), ("backward_", "forward_")):
        if path[-1].startswith(word):
            opposite = (*path[:-1], other + path[-1].removeprefix(word))
            return word + "layer" if opposite in places else None
    return None


def unique(groups: Iterable[Group]) -> list[Group]:
    """Paths made to differ: the second `a.b` is `a.b_1`."""
    used: set[str] = set()
    latest: Counter[str] = Counter()
    out = []
    for group in groups:
        label = group.path
        while label in used:
            latest[group.path] += 1
            label = f"{group.path}_{latest[group.path]}"
        used.add(label)
        out.append(replace(group, path=label))
    return out


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key in which `x10` comes after `x9`."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", name))
