"""What a tree of arrays means to Flax: its sets of weights, and the layers in one.

>>> from neutral.native import from_array
>>> one = from_array([[0.0]])
>>> tree = {("params", "Conv_0", "kernel"): one, ("params", "rnn", "cell", "i", "kernel"): one,
...         ("params", "rnn", "cell", "h", "kernel"): one, ("opt_state", "0", "count"): one}
>>> chosen = choose(tree, None, "model.msgpack")
>>> [(layer.path, list(layer.tensors)) for layer in layers(chosen.weights)]
[('Conv_0', ['kernel']), ('rnn', ['cell/i/kernel', 'cell/h/kernel'])]

A tree may hold several sets (the raw weights and their moving average, two networks). One is never chosen in silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from neutral.containers.tree import Path
from neutral.conventions.flax import ATTENTION_PARTS, CELLS, FORMS, PARAMS, STATISTICS, full_name
from neutral.errors import BadFile, Problem, Refused, printable, raise_all
from neutral.exporters.flax_scan import Known, auto_named, unstacked
from neutral.native import NativeLayer, NativeTensor, Tensor

_NO_WEIGHTS: Final = re.compile(
    r"opt(im\w*|_state\w*|s)?|tx|steps?|epochs?|iteration|(lr_?)?sched\w*|rngs?|\w*_rng|rng_\w*|random\w*|metrics?"
    r"|loss(es)?|loss_scale|dynamic_scale|config|cfg|args|history|dropout_\w*",
    re.IGNORECASE,
)
"""Keys beside a model under which arrays are no weights."""
_AVERAGE: Final = re.compile(r"ema|shadow|averag|polyak", re.IGNORECASE)
_DEEPEST: Final = 64
_DEEP: Final = 6
"""Levels at which sets of weights are looked for."""

Node = dict[str, Any]


@dataclass(frozen=True)
class WeightSet:
    """One set of weights: its place in the tree, and its tensors by path below it, statistics among the parameters."""

    place: Path
    weights: Mapping[Path, NativeTensor]
    rest: Mapping[str, tuple[NativeTensor, ...]] = field(default_factory=dict)
    several: bool = False

    @property
    def left_out(self) -> list[str]:
        """What lies beside the weights under names that do not say that it is none."""
        return [name for name in self.rest if not _NO_WEIGHTS.fullmatch(name) and not _AVERAGE.search(name)]

    @property
    def key(self) -> str:
        return ".".join(self.place)


def _place_name(place: Path) -> str:
    return printable(".".join(place), 80)


@dataclass(frozen=True)
class _Found:
    """Where a set of weights begins, where its statistics are, and what else belongs to none."""

    params: Path
    statistics: Path | None = None


def choose(
    leaves: Mapping[Path, Tensor], key: str | None, where: str, identities: Mapping[Path, Hashable] | None = None
) -> WeightSet:
    """The one set of weights in a tree, or the one that `key` (keys joined by dots) names; all else beside it.

    `identities` are equal for leaves that are one array.
    """
    deep = next((path for path in leaves if len(path) > _DEEPEST), None)
    if deep is not None:
        raise BadFile(
            Problem(f"{where}: {_place_name(deep[:4])}", f"{len(deep)} levels", f"at most {_DEEPEST}", "is it forged?")
        )
    root = _nested(leaves)
    found = list(_sets(root, (), 0))
    if key is not None:
        chosen = next((f for f in found if ".".join(f.params) == key), None) or _below(root, key)
        if chosen is None:
            known = ", ".join(_place_name(f.params) for f in found if f.params) or "none, for the whole tree is one set"
            raise Refused(
                Problem(where, f"nothing under the key {printable(key)}", f"one of: {known}", "correct --key")
            )
    elif not found:
        raise BadFile(Problem(where, "no array that is a weight", "at least one", "is this a file of weights?"))
    elif len(found) > 1:
        names = ", ".join(f"--key {_place_name(f.params)}" for f in found[:20])
        raise Refused(
            Problem(where, f"{len(found)} sets of weights", "to know which one is meant", f"choose one: {names}")
        )
    else:
        chosen = found[0]
    return _weight_set(leaves, chosen, found, where, identities or {})


def _nested(leaves: Mapping[Path, Tensor]) -> Node:
    root: Node = {}
    for path in leaves:
        node = root
        for name in path[:-1]:
            below = node.setdefault(name, {})
            if not isinstance(below, dict):
                break
            node = below
        else:
            if path:
                node[path[-1]] = path
    return root


def _sets(node: Node, place: Path, depth: int) -> Iterator[_Found]:
    """Every set of weights at or below a node."""
    if _is_variables(node):
        yield from _variables(node, node.get(PARAMS, {}), place, depth)
        return
    branches = {name: child for name, child in node.items() if isinstance(child, dict)}
    plausible = {name: child for name, child in branches.items() if depth or not _NO_WEIGHTS.fullmatch(name)}
    if depth < _DEEP:
        inner = [
            f
            for name, child in plausible.items()
            if _has_variables(child, depth + 1)
            for f in _sets(child, (*place, name), depth + 1)
        ]
        if inner:
            yield from inner
            return
    averages = [name for name in plausible if depth == 0 and _AVERAGE.search(name)]
    if averages:
        statistics = (*place, STATISTICS) if STATISTICS in plausible else None
        for name in [name for name in plausible if name != STATISTICS]:
            yield _Found((*place, name), statistics)
    elif plausible or any(not isinstance(child, dict) for child in node.values()):
        yield _Found(place)


def _is_variables(node: Node) -> bool:
    """True for a dict of variables, a layer of statistics alone being one, too."""
    return isinstance(node.get(PARAMS), dict) or (node.keys() == {STATISTICS} and isinstance(node[STATISTICS], dict))


def _has_variables(node: Node, depth: int) -> bool:
    if _is_variables(node):
        return True
    return depth < _DEEP and any(_has_variables(child, depth + 1) for child in node.values() if isinstance(child, dict))


def _variables(node: Node, params: Node, place: Path, depth: int) -> Iterator[_Found]:
    """The sets of a dict of variables or a TrainState: its parameters, and averages of them beside."""
    statistics = (*place, STATISTICS) if isinstance(node.get(STATISTICS), dict) else None
    if isinstance(params.get(PARAMS), dict) and depth < _DEEP:
        yield from _variables(params, params[PARAMS], (*place, PARAMS), depth + 1)
    else:
        yield _Found((*place, PARAMS), statistics)
    for name, child in node.items():
        if name not in (PARAMS, STATISTICS) and isinstance(child, dict) and _AVERAGE.search(name) and child:
            if STATISTICS in name or name.endswith("stats"):
                continue
            if isinstance(child.get(PARAMS), dict):
                yield from _variables(child, child[PARAMS], (*place, name), depth + 1)
            else:
                own = next((n for n in node if _AVERAGE.search(n) and n.endswith(STATISTICS)), None)
                yield _Found((*place, name), (*place, own) if own else statistics)


def _below(root: Node, key: str) -> _Found | None:
    """What lies under keys joined by dots; a key may itself have dots in it."""
    node, rest = root, key
    place: Path = ()
    while rest:
        names = [n for n, child in node.items() if isinstance(child, dict) and (rest == n or rest.startswith(n + "."))]
        if not names:
            return None
        name = max(names, key=len)
        node, place, rest = node[name], (*place, name), rest[len(name) + 1 :]
    inner = list(_sets(node, place, 1))
    return inner[0] if len(inner) == 1 else _Found(place)


def _weight_set(
    leaves: Mapping[Path, Tensor],
    chosen: _Found,
    found: list[_Found],
    where: str,
    identities: Mapping[Path, Hashable],
) -> WeightSet:
    weights: dict[Path, NativeTensor] = {}
    rest: dict[str, list[NativeTensor]] = {}
    problems = []
    others = {f.params: ".".join(f.params) for f in found if f.params != chosen.params}
    for path, data in leaves.items():
        relative = _relative(path, chosen)
        if relative is None:
            above = (others[path[:n]] for n in range(1, len(path)) if path[:n] in others)
            name = next(above, path[0] if path else "")
            rest.setdefault(name, []).append(NativeTensor(full_name(path), data))
        elif relative in weights:
            problems.append(
                Problem(f"{where}: {_place_name(path)}", "a name among parameters and statistics", "each once")
            )
        else:
            weights[relative] = NativeTensor(full_name(path), data, identities.get(path))
    raise_all(Refused, problems)
    if not weights:
        raise BadFile(Problem(where, "no array that is a weight", "at least one", "is this a file of weights?"))
    return WeightSet(
        chosen.params, _without_value(weights), {name: tuple(tensors) for name, tensors in rest.items()}, len(found) > 1
    )


def _relative(path: Path, chosen: _Found) -> Path | None:
    """A leaf's path in the set, or None if it is not in it."""
    for place in (chosen.params, chosen.statistics):
        if place is not None and path[: len(place)] == place and len(path) > len(place):
            relative = path[len(place) :]
            return None if not place and _NO_WEIGHTS.fullmatch(relative[0]) else relative
    return None


_BOXED: Final = frozenset(row.name.rpartition("/")[2] for form in FORMS for part in form.parts for row in part.rows)
"""What layers call their tensors."""


def _without_value(weights: dict[Path, NativeTensor]) -> dict[Path, NativeTensor]:
    """Without the key that a Variable of NNX or a box of Linen (`nn.Partitioned`) adds to the path of its array.

    Every array of NNX has it; of Linen only those that have a box.
    """
    boxed = {path for path in weights if len(path) > 1 and path[-1] == "value"}
    if len(boxed) < len(weights):
        beside = Counter(path[:-1] for path in weights)
        boxed = {path for path in boxed if path[-2] in _BOXED and beside[path[:-1]] == 1 and path[:-1] not in weights}
    return {path[:-1] if path in boxed else path: tensor for path, tensor in weights.items()}


# Layers


def layers(weights: Mapping[Path, NativeTensor], known: Known = auto_named) -> tuple[NativeLayer, ...]:
    """The layers of a set of weights, in the order of their first tensors; recurrent cells and attentions in one piece.

    Those in a stack are layers of their own. `known` tells the class of what is at a path.
    """
    return grouped(unstacked(weights, grouped, known))


def grouped(weights: Mapping[Path, NativeTensor]) -> tuple[NativeLayer, ...]:
    tree = _Tree.of(weights)
    made: dict[Path, dict[str, NativeTensor]] = {}
    for name, tensor in weights.items():
        path = _normalised(name, tree)
        at = tree.layer_of(path)
        local = "/".join(path[at:])
        state = tensor.state or "rngs" in path[:-1]
        made.setdefault(path[:at], {})[local] = NativeTensor(tensor.name, tensor.data, tensor.identity, state)
    return tuple(NativeLayer(".".join(path), None, tensors) for path, tensors in made.items())


_CELL_PARTS: Final = frozenset(frozenset(cell) for cell in CELLS)
_OF_A_KERNEL: Final = re.compile(r"(.+)/kernel/scale")


def _normalised(path: Path, tree: _Tree) -> Path:
    """A leaf's path, that of a WeightNorm's scale beside the kernel that it scales.

    Linen keeps it under a WeightNorm's own name, in a key that has the path of the kernel in it.
    """
    found = _OF_A_KERNEL.fullmatch(path[-1])
    if found is None:
        return path
    inner = tuple(found[1].split("/"))
    for above in (path[:-2], path[:-1]):
        layer = (*above, *inner)
        if "kernel" in tree.below.get(layer, ()):
            return (*layer, "WeightNorm", "scale")
    return path


@dataclass(frozen=True)
class _Tree:
    """The names below each node (but for the streams of random numbers), and the rank of each leaf."""

    below: Mapping[Path, frozenset[str]]
    ranks: Mapping[Path, int]

    @classmethod
    def of(cls, weights: Mapping[Path, NativeTensor]) -> _Tree:
        below: dict[Path, set[str]] = {}
        for path in weights:
            for i, name in enumerate(path):
                if name != "rngs":
                    below.setdefault(path[:i], set()).add(name)
        ranks = {path: len(tensor.data.shape) for path, tensor in weights.items()}
        return cls({path: frozenset(names) for path, names in below.items()}, ranks)

    def layer_of(self, path: Path) -> int:
        """How many keys of a leaf's path are those of its layer."""
        if path[-2:] == ("WeightNorm", "scale"):
            return len(path) - 2
        for at in range(len(path) - 1):
            node, name = path[:at], path[at]
            if name == "rngs":
                break
            if name in ATTENTION_PARTS and self._is_attention(node):
                return at
            if self._is_cell(node) or self._is_rnn(node) or self._is_bidirectional(node):
                return at
        return len(path) - 1

    def _names(self, node: Path) -> frozenset[str]:
        return self.below.get(node, frozenset())

    def _is_cell(self, node: Path) -> bool:
        names = self._names(node)
        return names in _CELL_PARTS and all(
            self._names((*node, name)) <= {"kernel", "bias"} and self.ranks.get((*node, name, "kernel")) == 2
            for name in names
        )

    def _is_rnn(self, node: Path) -> bool:
        return self._names(node) == {"cell"} and self._is_cell((*node, "cell"))

    def _is_bidirectional(self, node: Path) -> bool:
        ways = {"forward_rnn", "backward_rnn"}
        return self._names(node) == ways and all(self._is_rnn((*node, way)) for way in ways)

    def _is_attention(self, node: Path) -> bool:
        return self._names(node) >= set(ATTENTION_PARTS) and all(
            self._names((*node, part)) <= {"kernel", "bias"} and self.ranks.get((*node, part, "kernel")) == 3
            for part in ATTENTION_PARTS
        )
