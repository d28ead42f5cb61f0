"""The leaves of a live Equinox model in the order of its files, and how layers show them. Imports no framework.

>>> [(leaf.name, leaf.value) for leaf in walk([{"b": 1.5, "a": 0.5}, "no number"]).leaves]
[('0.a', 0.5), ('0.b', 1.5)]

A leaf has the name of its place, dots between levels. A model and its state, (model, state), count as one: what lies in the
state has the place of the `StateIndex` that the model keeps for it. Nothing of the model is run.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from neutral.conventions.equinox import BIASES, CONV_TRANSPOSE, KNOWN
from neutral.errors import Problem, Refused
from neutral.native import Computed, NativeLayer, NativeTensor, Tensor, from_array, stack

_DEEPEST = 200
_NUMBERS = (bool, int, float, complex)
_COUNTERS = ("batch_counter", "ema_first_time_index")
"""Parts of a BatchNorm's state that are no statistics."""
_STATISTICS = ("batch_state_index/0", "batch_state_index/1")


@dataclass(frozen=True)
class Leaf:
    """One leaf that files hold. `at` counts all leaves of the model, also those that files leave out."""

    path: tuple[str, ...]
    value: Any
    at: int
    owners: tuple[tuple[int, Any], ...]

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def number(self) -> bool:
        """Whether it is a plain number of Python."""
        return isinstance(self.value, _NUMBERS)

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.number else tuple(int(n) for n in self.value.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.asarray(self.value).dtype if self.number else np.dtype(self.value.dtype)


@dataclass(frozen=True)
class Model:
    """The leaves that files hold, and those of all leaves, in the order of JAX.

    `states` are the places of which a state has the values, so that those in the model are of its beginning.
    """

    leaves: tuple[Leaf, ...]
    all: tuple[Any, ...]
    states: frozenset[tuple[str, ...]]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(leaf.name for leaf in self.leaves)


def checked(model: Any) -> Model:
    """The leaves of a model, which must be those that JAX finds, whose trees may have nodes of other classes."""
    found = walk(model)
    jax = sys.modules.get("jax")  # Whoever made the model has imported it.
    leaves = found.all if jax is None else jax.tree_util.tree_leaves(model)
    for mine, theirs in itertools.zip_longest(found.all, leaves, fillvalue=_NONE):
        if mine is not theirs:
            raise Refused(
                Problem(
                    type(model if mine is _NONE else mine).__qualname__,
                    "an object whose parts JAX alone knows",
                    "modules, lists, tuples and dicts",
                    "keep its arrays in these",
                )
            )
    if all(leaf.number for leaf in found.leaves):
        raise Refused(Problem(type(model).__qualname__, "a model without an array", "at least one"))
    return found


_NONE = object()


def walk(model: Any) -> Model:
    """The leaves of a module, of (module, state), or of any nested lists and dicts of modules."""
    walker = _Walker()
    pair = isinstance(model, tuple | list) and len(model) == 2
    if pair and _is_state(model[1]) and not _is_state(model[0]):
        walker.visit(model[0], (), ())
        walker.visit(model[1], ("state",), ())
    else:
        walker.visit(model, (), ())
    counts = Counter(leaf.name for leaf in walker.leaves)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise Refused(Problem(twice, "two leaves of that name", "names that differ", "rename a key with a dot in it"))
    return Model(tuple(walker.leaves), tuple(walker.all), frozenset(walker.states))


class _Walker:
    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self.all: list[Any] = []
        self.states: set[tuple[str, ...]] = set()
        self._indexes: dict[Any, tuple[tuple[str, ...], tuple[tuple[int, Any], ...]]] = {}

    def visit(self, node: Any, path: tuple[str, ...], owners: tuple[tuple[int, Any], ...]) -> None:
        if len(path) > _DEEPEST:
            raise Refused(Problem(".".join(path[:5]), f"over {_DEEPEST} levels", "a model of layers"))
        if node is None:
            return
        if _is_state(node):
            for marker, value in _state_items(node):
                place, above = self._indexes.get(marker, ((*path, str(marker)), owners))
                self.states.add(place)
                self.visit(value, place, above)
            return
        if _is_module(node):
            if type(node).__name__ == "StateIndex":
                self._indexes[node.marker] = (path, owners)
            else:
                owners = (*owners, (len(path), node))
        children = list(_children(node))
        if children or _is_node(node):
            for name, child in children:
                self.visit(child, (*path, name), owners)
            return
        if _is_array(node) or isinstance(node, _NUMBERS):
            self.leaves.append(Leaf(path, node, len(self.all), owners))
        self.all.append(node)


def _is_module(node: Any) -> bool:
    ancestors = type(node).__mro__
    named = any(base.__name__ == "Module" and base.__module__.startswith("equinox.") for base in ancestors)
    return named and dataclasses.is_dataclass(node)


def _is_state(node: Any) -> bool:
    return type(node).__name__ == "State" and type(node).__module__.startswith("equinox.")


def _state_items(state: Any) -> Iterator[tuple[Any, Any]]:
    held = getattr(state, "_state", None)
    if not isinstance(held, dict):
        raise Refused(Problem("state", "a state that was used up", "the newest state of the model"))
    yield from held.items()


def _is_node(node: Any) -> bool:
    """Whether something without children is a node of the tree all the same, and no leaf of it."""
    return isinstance(node, list | dict | tuple) or _is_module(node)


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """The nodes below one, in the order of JAX: fields that are not static, keys of plain dicts sorted."""
    if _is_module(node):
        for field in dataclasses.fields(node):
            if not field.metadata.get("static", False) and hasattr(node, field.name):
                yield field.name, getattr(node, field.name)
    elif isinstance(node, OrderedDict):
        yield from ((str(key), child) for key, child in node.items())
    elif isinstance(node, dict):
        yield from ((str(key), node[key]) for key in sorted(node))
    elif isinstance(node, tuple) and hasattr(node, "_fields"):
        yield from zip(node._fields, node, strict=True)
    elif isinstance(node, list | tuple):
        yield from ((str(i), child) for i, child in enumerate(node))
    elif type(node).__name__ == "Partial" and type(node).__module__.startswith("jax."):
        yield from (("args", node.args), ("keywords", node.keywords))


def _is_array(node: Any) -> bool:
    """An array of NumPy or JAX, or the shape and dtype of one; no key of a random generator."""
    return hasattr(node, "shape") and hasattr(node, "dtype") and not isinstance(node, type) and _plain(node.dtype)


def _plain(dtype: Any) -> bool:
    try:
        return np.dtype(dtype).kind in "biufcV"
    except TypeError:
        return False


def tensor_of(leaf: Leaf) -> Tensor:
    """The elements of a live leaf, unread."""
    if leaf.number or isinstance(leaf.value, np.ndarray | np.generic):
        return from_array(np.asarray(leaf.value))
    return Computed(leaf.shape, leaf.dtype, lambda: np.asarray(leaf.value))


def layers(model: Model, tensors: Mapping[str, Tensor]) -> tuple[NativeLayer, ...]:
    """The layers of a model in order, with tensors given by the names of the leaves, as the convention has them."""
    return tuple(
        NativeLayer(".".join(group.path), group.cls, shown(group), group.config, group.evidence)
        for group in groups(model, tensors)
    )


@dataclass(frozen=True)
class Group:
    """A layer with its tensors as they are stored."""

    path: tuple[str, ...]
    cls: str | None
    config: Mapping[str, Any]
    tensors: dict[str, NativeTensor]
    stacked: bool = False

    @property
    def evidence(self) -> str:
        return "class" if self.stacked or self.cls in KNOWN else "none"


def groups(model: Model, tensors: Mapping[str, Tensor]) -> list[Group]:
    """The leaves of a model by the modules that they belong to."""
    found: dict[tuple[str, ...], Group] = {}
    for leaf in model.leaves:
        depth, owner = _owner(leaf)
        place = leaf.path[:depth]
        if place not in found:
            cls, config = (None, {}) if owner is None else (class_name(owner), settings(owner))
            found[place] = Group(place, cls, config, {})
        rest = leaf.path[depth:]
        at = rest.index("init") if "init" in rest else 0
        first = bool(at) and leaf.path[: depth + at] in model.states
        local = "/".join(rest if first or not at else rest[:at] + rest[at + 1 :]) or "leaf"
        state = leaf.number or first or local in _COUNTERS
        found[place].tensors[local] = NativeTensor(leaf.name, tensors[leaf.name], state=state)
    return [_as_made(group) for group in found.values()]


_RANKS = {
    "Linear": 2,
    "Embedding": 2,
    "LSTMCell": 2,
    "GRUCell": 2,
    "MultiheadAttention": 2,
    "GroupNorm": 1,
    "BatchNorm": 1,
}
"""The axes of a layer's kernel, or of what it has in its place, where its settings do not say them."""
_MAIN = ("weight", "layer/weight", "weight_ih", "query_proj/weight", "batch_state_index/0", "ema_state_index/0")


def _as_made(group: Group) -> Group:
    """The layer, unless it is several in one, as `equinox.filter_vmap` makes them: these have an axis more."""
    window, shape = group.config.get("kernel_size"), group.config.get("shape")
    rank = _RANKS.get(str(group.config.get("inner", group.cls)))
    if window is not None:
        rank = len(window) + 2
    elif shape is not None:
        rank = len(shape)
    main = next((group.tensors[local] for local in _MAIN if local in group.tensors), None)
    if group.cls not in KNOWN or rank is None or main is None or len(main.data.shape) == rank:
        return group
    return dataclasses.replace(group, cls=f"a stack of {group.cls}", stacked=True)


def _owner(leaf: Leaf) -> tuple[int, Any]:
    """The module that a leaf belongs to: the outermost one that has all below it, else the innermost."""
    whole = next((each for each in leaf.owners if KNOWN.get(class_name(each[1]), False)), None)
    return whole or (leaf.owners[-1] if leaf.owners else (0, None))


def class_name(module: Any) -> str:
    """The class of Equinox that computes what a module computes, else the name of its own."""
    own = type(module)
    base = next((cls for cls in own.__mro__ if cls.__module__.startswith("equinox.nn")), None)
    called = next((cls for cls in own.__mro__ if "__call__" in cls.__dict__), None)
    if base is not None and called is not None and called.__module__.startswith("equinox.nn"):
        return base.__name__
    return f"{own.__module__}.{own.__qualname__}" if own.__name__ in KNOWN else own.__name__


def settings(module: Any) -> dict[str, Any]:
    """The static fields of a module; of one around another also those of the inner one."""
    found = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.metadata.get("static", False) and hasattr(module, field.name)
    }
    plain = {name: value for name, value in found.items() if isinstance(value, str | bool | int | float | tuple | None)}
    inner = getattr(module, "layer", None) if class_name(module) in ("WeightNorm", "SpectralNorm") else None
    return {**settings(inner), **plain, "inner": class_name(inner)} if inner is not None else plain


def shown(group: Group) -> dict[str, NativeTensor]:
    """A layer's tensors as the convention has them; `stored` is the way back."""
    if group.stacked:
        # Under names of their own no hint can make a layer of them.
        return {f"stack/{local}": tensor for local, tensor in group.tensors.items()}
    found = dict(group.tensors)
    if group.cls == "GRUCell" and "bias" in found:
        bias = found.pop("bias")
        gates = bias.data.split(0, (len(BIASES), bias.data.shape[0] // len(BIASES)))
        for i, gate in enumerate(BIASES):
            view = gates.take(0, (i,)).split(0, ())
            found[f"bias/{gate}"] = dataclasses.replace(bias, name=f"{bias.name}/{gate}", data=view)
    if group.cls in CONV_TRANSPOSE and "weight" in found:
        weight, n = found["weight"], group.config["groups"]
        view = weight.data.split(0, (n, weight.data.shape[0] // n)) if n > 1 else weight.data.merge(0, 0)
        found["weight"] = dataclasses.replace(weight, data=view)
    if (scale := correction(group)) != 1:
        for local in _STATISTICS:
            found[local] = dataclasses.replace(found[local], data=_divided(found[local].data, scale))
    return found


def correction(group: Group) -> float:
    """What inference divides the statistics of a BatchNorm by.

    In the mode `batch` they begin at zero and are divided by 1 - momentum^steps, which after some thousand steps is one.
    """
    if group.cls != "BatchNorm" or not {"batch_counter", *_STATISTICS} <= group.tensors.keys():
        return 1
    steps = int(group.tensors["batch_counter"].data.read())
    scale = np.float32(1) - np.float32(group.config["momentum"]) ** np.float32(steps)
    return 1 if steps == 0 else float(scale)


def settled(group: Group) -> dict[str, Tensor]:
    """The counters that a BatchNorm must have when its statistics come from elsewhere, by the names of the leaves.

    Training goes on from such statistics as from those of many steps; else the next step would replace or distort them.
    """
    if "ema_first_time_index" in group.tensors:
        return {group.tensors["ema_first_time_index"].name: from_array(np.array(False))}
    counter, momentum = group.tensors.get("batch_counter"), group.config.get("momentum", 0)
    if counter is None or (int(counter.data.read()) and correction(group) == 1):
        return {}
    steps = int(np.ceil(-30 * np.log(2) / np.log(momentum))) if 0 < momentum < 1 else 1
    return {counter.name: from_array(np.array(steps, counter.data.dtype))}


def _divided(statistic: Tensor, scale: float) -> Tensor:
    def compute() -> Any:
        return (statistic.read() / np.asarray(scale, statistic.dtype)).astype(statistic.dtype)

    return Computed(statistic.shape, statistic.dtype, compute)


def stored(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors by the names that layers show, as leaves of these names and shapes.

    >>> parts = {f"bias/{gate}": from_array(np.ones(2)) for gate in BIASES}
    >>> stored(parts, {"bias": (6,)})["bias"].shape
    (6,)
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        base, _, last = name.rpartition("/")
        if name in shapes or last not in BIASES or base not in shapes:
            shape = shapes.get(name, tensor.shape)
            grouped = len(tensor.shape) == len(shape) + 1 and tensor.shape[2:] == shape[1:]
            found[name] = tensor.merge(0, 2) if grouped else tensor
        elif base not in found:
            parts = [tensors[f"{base}/{gate}"] for gate in BIASES if f"{base}/{gate}" in tensors]
            if len(parts) != len(BIASES):
                raise Refused(Problem(base, f"{len(parts)} blocks of a bias", ", ".join(BIASES)))
            found[base] = stack(parts, 0).merge(0, 2)
    return found
