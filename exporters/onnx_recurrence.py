"""Recurrent operators of an ONNX model as nodes of the graph.

ONNX gives all steps as (time, direction, batch, unit) and the last states as (direction, batch, unit); exporters put transposes,
squeezes and reshapes behind them until the axes are those of their framework. These are followed here letter by letter, until
the value is one that the graph's node has: the sequence or the last step, of both directions joined, or of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neutral.containers.onnx import NodeProto
from neutral.containers.onnx_constants import forward
from neutral.conventions.onnx_layers import FoundLayer
from neutral.exporters.onnx_flow import Builder, Flow, Inexpressible, Lifted, Sizes
from neutral.schema.graph import Attribute, Node

_TIME, _WAYS, _BATCH, _UNITS, _ONE = "t", "d", "b", "u", "1"
_JOINED = _WAYS + _UNITS
_MERGES = {"ReduceSum": "sum", "ReduceProd": "mul", "ReduceMean": "ave"}
_LARGEST_STATE = 1 << 24
_MOST_STEPS = 64
_ALL_STEPS = -(1 << 31)
_LONG = 1 << 30
"""More steps than a sequence has."""


class Recurrence:
    """A recurrent node whose outputs are not all known yet: it stands in the list of nodes until the end."""

    def __init__(self, b: Builder, found: FoundLayer, x: Flow, states: Sequence[Flow]) -> None:
        self.b, self.found, self.x, self.given = b, found, x, tuple(states)
        self.name = b.node_name(found.path)
        self.op = b.node.op_type
        recurrent = found.tensors["R"].expression.shape
        self.ways, self.units = recurrent[0], recurrent[2]
        self.reversed = found.config.get("direction") == "reverse"
        self.wanted: dict[str, str] = {}
        self.values: dict[tuple[str, int], str] = {}

    def value(self, kind: str, mode: str, way: int = 0) -> str:
        """A value of the graph: `sequence` or `last`, the directions merged by `mode`; `hidden` or `cell` of one direction."""
        if kind in ("sequence", "last") and self.wanted.setdefault(kind, mode) != mode:
            raise Inexpressible("two directions that are merged in two ways")
        if (kind, way) not in self.values:
            width = self.units * (2 if mode == "concat" and self.ways == 2 else 1)
            batch, time, _ = self.x.sizes
            sizes = (batch, time, width) if kind == "sequence" else (batch, width)
            name = self.name if kind == "sequence" and not way else f"{self.name}.{kind}{way or ''}"
            self.values[kind, way] = self.b.describe(name, sizes, self.x.dtype)
        return self.values[kind, way]

    def nodes(self) -> Iterator[Node]:
        """The node with the outputs that were asked for, and what makes the last step where it has the sequence, too."""
        sequence, last = self.wanted.get("sequence"), self.wanted.get("last")
        states = {kind for kind, _ in self.values} & {"hidden", "cell"} or (sequence and last)
        kind = "sequence" if sequence or not last else "last"
        mode = (sequence or last or "concat") if self.ways == 2 else ""
        if not sequence and not last:
            kind = "last"
        outputs = [self.value(kind, mode or "concat", way) for way in range(2 if mode == "none" else 1)]
        settings: dict[str, Attribute] = {"return_sequences": kind == "sequence", "return_state": bool(states)}
        if self.ways == 2:
            settings["merge_mode"] = mode
        if states:
            kinds = ("hidden", "cell") if self.op == "LSTM" else ("hidden",)
            outputs += [self.value(state, "one", way) for way in range(self.ways) for state in kinds]
        inputs = (self.x.value, *(state.value for state in self.given))
        yield Node(
            name=self.name,
            op=self.op,
            layer=self.found.path,
            inputs=inputs,
            outputs=tuple(outputs),
            attributes=settings,
        )
        if sequence and last:
            yield from self._last(last)

    def _last(self, mode: str) -> Iterator[Node]:
        """The last step of a layer whose sequence is used as well: its hidden states."""
        hidden = tuple(self.value("hidden", "one", way) for way in range(self.ways))
        made = [name for (kind, _), name in sorted(self.values.items()) if kind == "last"]
        if mode == "none" or self.ways == 1:
            for state, name in zip(hidden, made, strict=False):
                yield Node(name=name, op="Identity", inputs=(state,), outputs=(name,))
            return
        op = {"concat": "Concat", "sum": "Add", "mul": "Mul", "ave": "Mean"}[mode]
        attributes: dict[str, Attribute] = {"axis": 1} if op == "Concat" else {}
        yield Node(name=made[0], op=op, inputs=hidden, outputs=(made[0],), attributes=attributes)


@dataclass(frozen=True)
class Steps:
    """An output of a recurrent operator under way. `axes`: what each axis holds, in letters; `way`: the one direction that is
    left; `merge`: how the two became one; `backwards`: the steps are in the order in which they were computed."""

    source: Recurrence
    kind: str
    axes: tuple[str, ...]
    way: int | None = None
    merge: str | None = None
    backwards: bool = False

    @property
    def shape(self) -> Sizes:
        return tuple(_sizes(self.source)[axis] for axis in self.axes)

    def settled(self, b: Builder) -> Flow:
        """The value of the graph that this is, or `Inexpressible`."""
        kind = "sequence" if self.kind == "Y" else "last"
        if self.kind == "Y" and self.source.reversed and not self.backwards:
            raise Inexpressible("a layer that runs backwards and gives its steps in the order of its input")
        if self.kind == "Y" and self.backwards and not self.source.reversed:
            raise Inexpressible("the steps of a recurrent layer in reverse")
        alone = self.source.ways == 1 or self.way is not None or self.merge is not None
        width = _UNITS if alone else _JOINED
        plain = (_BATCH, _TIME, width) if self.kind == "Y" else (_BATCH, width)
        if sorted(self.axes) != sorted(plain):
            raise Inexpressible("the directions of a recurrent layer as an axis of its own")
        value = self._value(kind, alone)
        sizes = {_BATCH: self.source.x.sizes[0], _TIME: self.source.x.sizes[1]}
        made = self.source.units * (1 if alone else 2)
        order = tuple(plain.index(axis) for axis in self.axes)
        return Flow(value, tuple(sizes.get(axis, made) for axis in self.axes), self.source.x.dtype, order)

    def _value(self, kind: str, alone: bool) -> str:
        source = self.source
        if self.kind == "C":
            if not alone or self.merge:
                raise Inexpressible("the cell states of two directions as one")
            return source.value("cell", "one", self.way or 0)
        if source.ways == 1:
            return source.value(kind, "concat")
        if self.way is not None and self.kind == "H":
            return source.value("hidden", "one", self.way)
        if self.way is not None:
            # Both outputs of the node are named, though one may stay without a use.
            return [source.value(kind, "none", way) for way in (0, 1)][self.way]
        return source.value(kind, self.merge or "concat")


def recurrent(b: Builder, found: FoundLayer) -> None:
    """A recurrent operator: its node waits for what becomes of its outputs."""
    node = b.node
    if b.value_of(4):
        raise Inexpressible("a recurrent layer that is told the lengths of its sequences")
    batch_first = bool(found.config.get("layout", 0))
    x = b.flow(b.value_of(0))
    if x.rank != 3:
        raise Inexpressible(f"a recurrent layer on a value of {x.rank} axes")
    x = b.plain(x if batch_first else b.turned_to(x, (1, 0, 2)))
    ways = found.tensors["R"].expression.shape[0]
    source = Recurrence(b, found, x, _states(b, ways, batch_first))
    b.nodes.append(source)
    axes = {
        "Y": (_BATCH, _TIME, _WAYS, _UNITS) if batch_first else (_TIME, _WAYS, _BATCH, _UNITS),
        **dict.fromkeys(("H", "C"), (_BATCH, _WAYS, _UNITS) if batch_first else (_WAYS, _BATCH, _UNITS)),
    }
    for name, kind in zip(node.outputs, "YHC", strict=False):
        if name:
            b.flows[name] = Steps(source, kind, axes[kind])


def _states(b: Builder, ways: int, batch_first: bool) -> list[Flow]:
    """The first states in the order of the graph: those of each direction together."""
    places = (5, 6) if b.node.op_type == "LSTM" else (5,)
    names = [b.value_of(place) for place in places]
    if all(not name or _is_zero(b, name) for name in names):
        return []
    found: list[Sequence[Flow]] = []
    for name in names:
        if not name or _is_zero(b, name):
            raise Inexpressible("one of two first states")
        lifted = _lifted(b.flows.get(name))
        if isinstance(lifted, Lifted):
            found.append([b.plain(part if isinstance(part, Flow) else b.settled(part)) for part in lifted.parts])
        else:
            found.append(_unlifted(b, name, ways, batch_first))
    if any(len(parts) != ways for parts in found):
        raise Inexpressible("first states of another number of directions")
    return [parts[way] for way in range(ways) for parts in found]


def _is_zero(b: Builder, name: str, depth: int = 0) -> bool:
    """True for states of nothing but zeros, which the graph makes or an exporter has stored, for one sequence or for all."""
    if name not in b.zeros:
        stored, maker = b.scope.constant(name), b.scope.makers.get(name)
        small = stored is not None and math.prod(stored.shape) <= _LARGEST_STATE
        spread = maker is not None and not maker.domain and maker.op_type in ("Expand", "Tile") and depth < _MOST_STEPS
        if stored is None and maker is not None and spread:
            b.zeros[name] = _is_zero(b, maker.inputs[0], depth + 1)
        else:
            b.zeros[name] = not forward(stored).read().any() if stored is not None and small else b.scope.zero(name)
    return b.zeros[name]


def _unlifted(b: Builder, name: str, ways: int, batch_first: bool) -> Sequence[Flow]:
    """The states of each direction, out of a value with an axis for the directions."""
    whole = b.take(name)
    if whole.rank != 3:
        raise Inexpressible(f"first states of {whole.rank} axes")
    axis = 1 if batch_first else 0
    rest = tuple(n for i, n in enumerate(whole.sizes) if i != axis)
    parts = []
    for way in range(ways):
        one = whole
        if ways > 1:
            kept = (*whole.sizes[:axis], 1, *whole.sizes[axis + 1 :])
            cut: dict[str, Attribute] = {"starts": (way,), "ends": (way + 1,), "axes": (axis,)}
            one = b.part("Slice", whole, kept, cut, f"state{way}.cut")
        parts.append(b.part("Squeeze", one, rest, {"axes": (axis,)}, f"state{way}"))
    return parts


def followed(b: Builder, node: NodeProto) -> bool:
    """True if the node rearranges an output of a recurrent operator, which then goes on being one."""
    steps = b.flows.get(node.inputs[0]) if node.inputs else None
    b.node = node
    made: Sequence[Any] = ()
    if isinstance(steps, Steps) and node.op_type in _FOLLOWED:
        made = _FOLLOWED[node.op_type](b, steps)
    elif node.op_type == "Concat":
        made = _side_by_side(b) or _stacked(b)
    elif isinstance(steps, Lifted):
        made = _picked(b, steps)
    for name, one in zip(node.outputs, made, strict=False):
        b.flows[name] = one
    return bool(made)


def _stacked(b: Builder) -> list[Lifted]:
    """States of several layers or directions along a first axis."""
    parts: list[Any] = []
    for name in b.node.inputs:
        one = _lifted(b.flows.get(name))
        if not isinstance(one, Lifted):
            return []
        parts += one.parts
    return [Lifted(tuple(parts))] if parts and b.attribute("axis") == 0 else []


def _side_by_side(b: Builder) -> list[Steps]:
    """The units of both directions of a layer in one axis, forward first."""
    parts = [b.flows.get(name) for name in b.node.inputs]
    first, *rest = parts
    if (
        not isinstance(first, Steps)
        or len(rest) != 1
        or not isinstance(rest[0], Steps)
        or (first.way, rest[0].way) != (0, 1)
    ):
        return []
    axis = b.attribute("axis")
    if replace(rest[0], way=0) != first or type(axis) is not int or first.axes[axis % len(first.axes)] != _UNITS:
        return []
    axes = tuple(_JOINED if letter == _UNITS else letter for letter in first.axes)
    return [replace(first, way=None, axes=axes)]


def _lifted(one: Any) -> Any:
    """The states of a recurrent layer as those of each direction."""
    if not isinstance(one, Steps) or one.axes[0] != _WAYS:
        return one
    return Lifted(tuple(_of_way(_without(one, {0}), way) for way in range(one.source.ways)))


def _picked(b: Builder, lifted: Lifted) -> list[Any]:
    """One of several states, or all of them as they are."""
    if b.node.op_type == "Identity":
        return [lifted]
    if b.node.op_type != "Gather" or b.attribute("axis", 0) != 0:
        return []
    stored = b.scope.constant(b.value_of(1))
    index = b.scope.numbers(b.value_of(1))
    if stored is None or stored.shape or index is None or index[0] is None:
        return []
    return [lifted.parts[index[0]]] if -len(lifted.parts) <= index[0] < len(lifted.parts) else []


def _moved(b: Builder, steps: Steps) -> list[Steps]:
    perm = b.attribute("perm") or tuple(reversed(range(len(steps.axes))))
    return [replace(steps, axes=tuple(steps.axes[i] for i in perm))]


def _squeezed(b: Builder, steps: Steps) -> list[Steps]:
    axes = b.known(1, "axes", "axes")
    if axes is None:
        return []
    gone = {axis % len(steps.axes) for axis in axes}
    return [_without(steps, gone)] if all(_is_one(steps, axis) for axis in gone) else []


def _is_one(steps: Steps, axis: int) -> bool:
    return steps.axes[axis] == _ONE or (steps.axes[axis] == _WAYS and steps.source.ways == 1)


def _without(steps: Steps, gone: set[int]) -> Steps:
    return replace(steps, axes=tuple(axis for i, axis in enumerate(steps.axes) if i not in gone))


def _sizes(source: Recurrence) -> Mapping[str, int | None]:
    """How long each axis is."""
    batch, time, _ = source.x.sizes
    joined = source.ways * source.units
    return {_BATCH: batch, _TIME: time, _UNITS: source.units, _WAYS: source.ways, _ONE: 1, _JOINED: joined}


def _reshaped(b: Builder, steps: Steps) -> list[Steps]:
    """Axes of one element left out, or the directions joined with the units behind them."""
    target = b.numbers(1, "shape")
    if target is None:
        return []
    sizes = _sizes(steps.source)
    ones = {i for i in range(len(steps.axes)) if _is_one(steps, i)}
    if ones and len(target) == len(steps.axes) - len(ones):
        made = _without(steps, ones)
    elif steps.axes[-2:] == (_WAYS, _UNITS) and len(target) == len(steps.axes) - 1:
        made = replace(steps, axes=(*steps.axes[:-2], _JOINED))
    else:
        return []
    for i, (n, axis) in enumerate(zip(target, made.axes, strict=True)):
        kept = n == 0 and axis == steps.axes[i]
        if not kept and n not in (None, -1, sizes[axis]):
            return []
    # A number that nobody knows may be any of the axes', but for one the others tell it.
    return [made] if sum(n in (None, -1) for n in target) <= 1 or _named(target, made) else []


def _named(target: Sequence[int | None], made: Steps) -> bool:
    """True if only batch and time, whose sizes are looked up, are not told: the units are, or are what is left."""
    return all(
        n not in (None, -1) or axis in (_BATCH, _TIME) or n == -1 for n, axis in zip(target, made.axes, strict=True)
    )


def _gathered(b: Builder, steps: Steps) -> list[Steps]:
    stored = b.scope.constant(b.value_of(1))
    index = b.scope.numbers(b.value_of(1))
    axis = int(b.attribute("axis", 0)) % len(steps.axes)
    if stored is None or stored.shape or index is None or index[0] is None:
        return []
    if steps.axes[axis] == _WAYS:
        return [_of_way(_without(steps, {axis}), index[0])]
    last = _last_step(steps)
    if steps.axes[axis] == _TIME and last is not None and index[0] == -1:
        return [_without(last, {axis})]
    return []


def _last_step(steps: Steps) -> Steps | None:
    """The last step of all, which is the last state, if one direction computes them in this order."""
    alone = steps.source.ways == 1 and steps.kind == "Y" and steps.backwards == steps.source.reversed
    return replace(steps, kind="H", backwards=False) if alone else None


def _of_way(steps: Steps, way: int) -> Steps:
    return steps if steps.source.ways == 1 else replace(steps, way=way % 2)


def _sliced(b: Builder, steps: Steps) -> list[Steps]:
    starts, ends, axes, step = (b.known(place, "", "a Slice") for place in (1, 2, 3, 4))
    if not starts or not ends or not axes or len(axes) != 1:
        return []
    axis = axes[0] % len(steps.axes)
    if steps.axes[axis] == _TIME and step in (None, (1,)) and starts[0] == -1 and ends[0] > _LONG:
        last = _last_step(steps)
        made = tuple(_ONE if i == axis else letter for i, letter in enumerate(steps.axes))
        return [replace(last, axes=made)] if last is not None else []
    if steps.axes[axis] == _TIME and step == (-1,) and starts[0] in (-1, (1 << 63) - 1) and ends[0] <= _ALL_STEPS:
        return [replace(steps, backwards=not steps.backwards)]
    if steps.axes[axis] != _WAYS or steps.source.ways == 1 or step not in (None, (1,)):
        return []
    chosen = range(2)[slice(starts[0], ends[0])]
    if len(chosen) != 1:
        return []
    made = tuple(_ONE if i == axis else letter for i, letter in enumerate(steps.axes))
    return [replace(steps, axes=made, way=chosen[0])]


def _split(b: Builder, steps: Steps) -> list[Steps]:
    axis = int(b.attribute("axis", 0)) % len(steps.axes)
    if steps.axes[axis] != _WAYS or len(b.node.outputs) != 2 or b.known(1, "split", "a Split") not in (None, (1, 1)):
        return []
    made = tuple(_ONE if i == axis else letter for i, letter in enumerate(steps.axes))
    return [replace(steps, axes=made, way=way) for way in range(2)]


def _merged(b: Builder, steps: Steps) -> list[Steps]:
    axes = b.known(1, "axes", "axes")
    if axes is None or len(axes) != 1 or b.attribute("keepdims", 1) or steps.source.ways != 2:
        return []
    axis = axes[0] % len(steps.axes)
    if steps.axes[axis] != _WAYS:
        return []
    return [replace(_without(steps, {axis}), merge=_MERGES[b.node.op_type])]


def _unchanged(b: Builder, steps: Steps) -> list[Steps]:
    return [steps]


_FOLLOWED: Mapping[str, Callable[[Builder, Steps], list[Steps]]] = {
    **dict.fromkeys(_MERGES, _merged),
    **dict.fromkeys(("Identity", "Dropout"), _unchanged),
    "Gather": _gathered,
    "Reshape": _reshaped,
    "Slice": _sliced,
    "Split": _split,
    "Squeeze": _squeezed,
    "Transpose": _moved,
}
