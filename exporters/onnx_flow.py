"""A graph under construction from the nodes of an ONNX model, and the values that flow through it.

A Transpose only changes what is known of the order of a value's axes, as exporters put several around a recurrent layer; a
Transpose of the graph is made where an operator wants the axes in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neutral.containers.onnx import NodeProto
from neutral.containers.onnx_constants import forward
from neutral.containers.onnx_tensors import DTYPES
from neutral.conventions.onnx_scope import Scope
from neutral.exporters.onnx_numbers import Computing
from neutral.schema.graph import Attribute, Graph, Node, Value

SPACE = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}

Sizes = tuple[int | None, ...]
_LARGEST = 1 << 48
"""More elements than an axis can have."""
_MOST_CASTS = 4


class Inexpressible(Exception):
    """Something that the graph has no operator for."""


@dataclass(frozen=True)
class Flow:
    """A value of the ONNX model: axis i is axis `order[i]` of the graph's `value`. `sizes` are in the model's order.

    `channels`, if not 0: a vector that is an image of so many channels, joined in the order (position channel), as models
    have it that were converted from TensorFlow; the graph's value is joined in the order (channel position).
    """

    value: str
    sizes: Sizes
    dtype: str
    order: tuple[int, ...]
    channels: int = 0

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def shape(self) -> Sizes:
        return self.sizes

    @property
    def turned(self) -> bool:
        return self.order != tuple(range(self.rank))


@dataclass(frozen=True)
class Lifted:
    """Values (or outputs of a recurrent layer) along a new axis in front of the batch, as recurrent operators have their
    states."""

    parts: tuple[Any, ...]

    @property
    def shape(self) -> Sizes:
        return (len(self.parts), *self.parts[0].shape)

    def settled(self, b: Builder) -> Flow:
        raise Inexpressible("an axis in front of the first one")


class Builder:
    """The nodes so far. `flows` maps the names of the model's values to what they are in the graph."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.nodes: list[Any] = []
        """Nodes, and recurrent ones that wait for what becomes of their outputs."""
        self.flows: dict[str, Any] = {}
        self.sizes: dict[str, Sizes] = {}
        self.dtypes: dict[str, str] = {}
        self.node = NodeProto("")
        self._alike: dict[str, str] = {}
        self._images: set[str] = set()
        self._taken: set[str] = set()
        self._names: set[str] = set()
        self.zeros: dict[str, bool] = {}
        """Which first states of recurrent layers are nothing but zeros."""
        self._counts: dict[str, int] = {}
        self._computing = Computing(scope, self.shape_of)
        self.given_out: set[str] = set()
        self._turned: dict[tuple[str, tuple[int, ...]], str] = {}
        self._numbers: dict[tuple[str, str], str] = {}

    # Values.

    def fresh(self, name: str) -> str:
        return self._unlike(name or "value", self._taken)

    def _unlike(self, name: str, taken: set[str]) -> str:
        """The name, with a number behind it if it is taken; which it is then."""
        found = name
        while found in taken:
            self._counts[name] = self._counts.get(name, 0) + 1
            found = f"{name}#{self._counts[name]}"
        taken.add(found)
        return found

    def describe(self, name: str, sizes: Sizes, dtype: str) -> str:
        """A new value of the graph."""
        if any(n is not None and not 0 <= n < _LARGEST for n in sizes):
            raise Inexpressible(f"a value of sizes {sizes}")
        name = self.fresh(name)
        self.sizes[name], self.dtypes[name] = sizes, dtype
        return name

    def flow(self, name: str) -> Flow:
        """A value of the model, its axes in whatever order they lie."""
        found = self.flows.get(name)
        if isinstance(found, Flow):
            return found
        if found is not None:
            return self.settled(found)
        raise Inexpressible("a value that depends on the sizes of others, or on a stored tensor that is no layer's")

    def settled(self, found: Any) -> Flow:
        flow: Flow = found.settled(self)
        return flow

    def take(self, name: str) -> Flow:
        """A value with its axes, and the elements of a vector, in the model's order."""
        return self.plain(self.flow(name))

    def plain(self, flow: Flow) -> Flow:
        if flow.channels:
            return self._regrouped(flow, flow.channels, True)
        if not flow.turned:
            return flow
        key = (flow.value, flow.order)
        if key not in self._turned:
            made = self.describe(f"{flow.value}.transpose", flow.sizes, flow.dtype)
            self.emit("Transpose", [flow.value], [made], {"perm": flow.order})
            self._turned[key] = made
        return Flow(self._turned[key], flow.sizes, flow.dtype, tuple(range(flow.rank)))

    def joined(self, flow: Flow, channels: int) -> Flow:
        """A vector whose elements lie in the graph in the order (channel position) of so many channels, or, for 0, in the
        model's order."""
        if flow.channels == channels:
            return flow
        flow = self.plain(flow)
        return self._regrouped(flow, channels, False) if channels else flow

    def _regrouped(self, flow: Flow, channels: int, back: bool) -> Flow:
        """The elements of a vector in the other order of channels and positions."""
        size = flow.sizes[1]
        if size is None or size % channels:
            raise Inexpressible(f"a vector of {size} elements of {channels} channels")
        key = (flow.value, (channels, int(back)))
        if key not in self._turned:
            grid = (channels, size // channels) if back else (size // channels, channels)
            names = [self.describe(f"{flow.value}.{part}", (flow.sizes[0], *sizes), flow.dtype) for part, sizes in
                     (("grid", grid), ("turn", grid[::-1]), ("vector", (size,)))]  # fmt: skip
            # The layer behind it takes an image in an order of its own (`behind_moved_images`).
            self._images.add(self._root(names[0] if back else names[1]))
            self.emit("Reshape", [flow.value], [names[0]], {"shape": grid})
            self.emit("Transpose", [names[0]], [names[1]], {"perm": (0, 2, 1)})
            self.emit("Reshape", [names[1]], [names[2]], {"shape": (size,)})
            self._turned[key] = names[2]
        return Flow(self._turned[key], flow.sizes, flow.dtype, (0, 1), 0 if back else channels)

    def turned_to(self, flow: Flow, order: Sequence[int]) -> Flow:
        """A flow with its axes permuted, which costs nothing."""
        return replace(flow, sizes=tuple(flow.sizes[i] for i in order), order=tuple(flow.order[i] for i in order))

    # Nodes.

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Mapping[str, Attribute] | None = None,
        layer: str | None = None,
    ) -> None:
        unique = self.node_name(layer if layer is not None else outputs[0])
        self.nodes.append(
            Node(
                name=unique,
                op=op,
                layer=layer,
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                attributes=dict(attributes or {}),
            )
        )

    def node_name(self, wanted: str) -> str:
        """A name that no node has yet."""
        return self._unlike(wanted or "node", self._names)

    def make(
        self,
        op: str,
        inputs: Sequence[Flow],
        sizes: Sizes,
        attributes: Mapping[str, Attribute] | None = None,
        *,
        layer: str | None = None,
        dtype: str | None = None,
        output: int = 0,
        order: tuple[int, ...] | None = None,
    ) -> Flow:
        """A node whose output is that of the node at hand; `order` if its axes lie as those of its input do."""
        own = self.node.outputs[output]
        told = tuple(range(len(sizes))) if order is None else order
        stored: list[int | None] = [None] * len(sizes)
        for i, place in enumerate(told):
            stored[place] = sizes[i]
        dtype = dtype or inputs[0].dtype
        made = self.describe(own, tuple(stored), dtype)
        self.emit(op, [flow.value for flow in inputs], [made], attributes, layer)
        flow = Flow(made, sizes, dtype, told)
        self.flows[own] = flow
        return flow

    def part(self, op: str, x: Flow, sizes: Sizes, attributes: Mapping[str, Attribute], suffix: str) -> Flow:
        """One of several nodes that compute the node at hand."""
        made = self.describe(f"{self.node.outputs[0]}.{suffix}", sizes, x.dtype)
        self.emit(op, [x.value], [made], attributes)
        return Flow(made, sizes, x.dtype, tuple(range(len(sizes))))

    # What the axes of a value mean.

    def alike(self, *flows: Flow) -> None:
        """The axes of these values mean the same."""
        roots = {self._root(flow.value) for flow in flows}
        first = min(roots)
        for root in roots - {first}:
            self._alike[root] = first
            if root in self._images:
                self._images.add(first)

    def holds(self, x: Flow, y: Flow) -> None:
        """The output at hand is `y`, which has an element for each of `x`, in the same order."""
        self.alike(x, y)
        if x.channels:
            self.flows[self.node.outputs[0]] = replace(y, channels=x.channels)

    def passed(self) -> None:
        """The output at hand is the first input itself."""
        self.flows[self.node.outputs[0]] = self.flows[self.value_of(0)]

    def image(self, *flows: Flow) -> None:
        """The second axis of these values is channels, those behind it are space."""
        self._images.update(self._root(flow.value) for flow in flows if flow.rank > 2)

    def _root(self, value: str) -> str:
        way = []
        while value in self._alike:
            way.append(value)
            value = self._alike[value]
        self._alike.update(dict.fromkeys(way, value))
        return value

    def axes(self, value: str) -> tuple[str, ...]:
        rank = len(self.sizes[value])
        space = SPACE.get(rank - 2, tuple(f"axis{i}" for i in range(2, rank)))
        if self.is_image(value):
            return ("batch", "channel", *space)
        if rank == 2:
            return ("batch", "feature" if "float" in self.dtypes[value] else "time")
        return ("batch", "time", "feature")[:rank]

    def is_image(self, value: str) -> bool:
        """Values of four axes or five that no layer says anything of are taken to be images."""
        rank = len(self.sizes[value])
        return rank > 3 or (rank == 3 and self._root(value) in self._images)

    # What stands beside the data.

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    def value_of(self, place: int) -> str:
        return self.node.inputs[place] if len(self.node.inputs) > place else ""

    def numbers(self, place: int, attribute: str = "") -> tuple[int | None, ...] | None:
        """A list of whole numbers: an input, or in older operator sets an attribute; None if there is none."""
        value = self.value_of(place)
        if value:
            return self._computing.numbers(value)
        given = self.node.attributes.get(attribute) if attribute else None
        return tuple(n for n in given if type(n) is int) if isinstance(given, tuple) else None

    def shape_of(self, value: str) -> Sizes | None:
        """The sizes of a value as far as they are known, its axes in the model's order."""
        found = self.flows.get(value)
        return found.shape if found is not None else self.scope.shape_of(value)

    def known(self, place: int, attribute: str = "", what: str = "a list of numbers") -> tuple[int, ...] | None:
        """The same where all must be known; None only if there is no list."""
        found = self.numbers(place, attribute)
        if found is None:
            if self.value_of(place):
                raise Inexpressible(f"{what} that is computed")
            return None
        if any(n is None for n in found):
            raise Inexpressible(f"{what} that is computed")
        return tuple(n for n in found if n is not None)

    def is_stored(self, value: str) -> bool:
        """True for what does not depend on the model's inputs."""
        maker = self.scope.makers.get(value)
        if maker is not None and maker.op_type == "CastLike" and value not in self.flows:
            return self.is_stored(maker.inputs[0])
        return self.scope.constant(value) is not None or (maker is not None and maker.op_type == "Constant")

    def scalar(self, value: str) -> float | None:
        """The number that a stored tensor of one element is."""
        return scalar_of(self.scope, value)

    def constant(self, number: float, dtype: str) -> str:
        """A Constant node of the graph, one for each number."""
        key = (repr(number), dtype)
        if key not in self._numbers:
            self._numbers[key] = self.describe(f"{self.node.outputs[0]}.constant", (), dtype)
            self.emit("Constant", [], [self._numbers[key]], {"value_float": number})
        return self._numbers[key]

    # The end.

    def finished(self, inputs: Sequence[str], outputs: Sequence[str]) -> Graph:
        nodes = [node for one in self.nodes for node in ([one] if isinstance(one, Node) else list(one.nodes()))]
        values = {
            name: Value(axes=self.axes(name), shape=sizes, dtype=self.dtypes[name])
            for name, sizes in self.sizes.items()
        }
        return Graph(inputs=tuple(inputs), outputs=tuple(outputs), values=values, nodes=tuple(nodes))


Rule = Callable[[Builder], None]
"""Adds the nodes that stand for the node at hand."""


def broadcast(shapes: Sequence[Sizes]) -> Sizes:
    """The sizes of values that are joined element by element."""
    rank = max(len(shape) for shape in shapes)
    made: list[int | None] = []
    for sizes in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        wide = [n for n in sizes if n != 1]
        known = {n for n in wide if n is not None}
        if len(known) > 1:
            raise Inexpressible(f"values of sizes {' and '.join(map(str, shapes))} that do not fit each other")
        made.append(1 if not wide else next(iter(known), None))
    return tuple(made)


def scalar_of(scope: Scope, value: str) -> float | None:
    """The number that a stored tensor of one element is, or that stands in the attributes of a node."""
    maker = scope.makers.get(value)
    for _ in range(_MOST_CASTS):
        if maker is None or maker.op_type != "CastLike" or not maker.inputs:
            break
        value = maker.inputs[0]
        maker = scope.makers.get(value)
    if maker is not None and maker.op_type == "Constant" and "value" not in maker.attributes:
        given = maker.attributes.get("value_float", maker.attributes.get("value_int"))
        return float(given) if isinstance(given, int | float) else None
    stored = scope.constant(value)
    if stored is None or any(n != 1 for n in stored.shape):
        return None
    return float(forward(stored).read().reshape(()).astype("float64"))


def dtype_name(code: int) -> str:
    """The name of a data type, or `Inexpressible`."""
    if code not in DTYPES:
        raise Inexpressible(f"elements of the data type {code}")
    return DTYPES[code].name
