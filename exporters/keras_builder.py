"""One pass over a Keras model: the nodes and values found so far, and what earlier passes found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from neutral.errors import printable
from neutral.exporters.keras_calls import Call
from neutral.exporters.keras_flow import Flow, Malformed, axes_of
from neutral.schema.graph import Attribute, Node, Value

Splits = dict[str, dict[str, int]]

_MOST_NODES = 100_000


@dataclass
class Decisions:
    """What earlier passes found out. `changed`: this pass found out more."""

    orders: dict[str, int] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    natures: dict[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    changed: bool = False

    def deny(self, origins: frozenset[str]) -> None:
        self.changed |= not origins <= self.denied
        self.denied |= origins

    def order(self, origins: frozenset[str], channels: int) -> None:
        for origin in origins:
            self.changed |= origin not in self.orders
            self.orders.setdefault(origin, channels)

    def nature(self, name: str, nature: str) -> None:
        self.changed |= name not in self.natures and nature == "spatial"
        self.natures.setdefault(name, nature)

    def token(self, name: str) -> None:
        self.changed |= name not in self.tokens
        self.tokens.add(name)


class Builder:
    """One pass over a model: the nodes and values found so far."""

    def __init__(self, decisions: Decisions, keras2: bool) -> None:
        self.decisions = decisions
        self.keras2 = keras2
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.inputs: list[str] = []
        self.notes: list[str] = []
        self.unclear = False
        self.splits: Splits = {}
        self.split_origins: dict[str, frozenset[str]] = {}
        self.undecided: set[str] = set()
        self.unsettled: set[str] = set()
        self.ranks: dict[str, int] = {}
        self._taken: set[str] = set()
        self._turned: dict[tuple[str, bool], str] = {}

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def problem(self, where: str, text: str) -> None:
        self.unclear = True
        self.note(printable(f"{where}: {text}; the archive has no graph"))

    def fresh(self, name: str) -> str:
        wanted, count = name or "node", 1
        while wanted in self._taken:
            wanted, count = f"{name}#{count}", count + 1
        self._taken.add(wanted)
        return wanted

    def describe(self, flow: Flow) -> None:
        shape = flow.dims
        if flow.first:
            shape = (shape[0], shape[-1], *shape[1:-1])
        self.values[flow.name] = Value(axes=axes_of(flow), shape=shape, dtype=flow.dtype)

    def emit(
        self,
        name: str,
        op: str,
        inputs: Sequence[Flow],
        result: Flow,
        attributes: Mapping[str, Attribute] | None = None,
        layer: str | None = None,
    ) -> Flow:
        """A node of one output; `result` describes it (its name is replaced)."""
        return self.emit_many(name, op, inputs, [result], attributes, layer)[0]

    def emit_many(
        self,
        name: str,
        op: str,
        inputs: Sequence[Flow],
        results: Sequence[Flow],
        attributes: Mapping[str, Attribute] | None = None,
        layer: str | None = None,
    ) -> list[Flow]:
        if len(self.nodes) >= _MOST_NODES:
            raise Malformed(f"a model of more than {_MOST_NODES} nodes")
        node = self.fresh(name)
        names = [node, *(self.fresh(f"{node}:{i}") for i in range(1, len(results)))]
        flows = [replace(r, name=n, pending=r.pending, source=None) for r, n in zip(results, names, strict=True)]
        if not any(flow.opaque for flow in (*inputs, *flows)):
            for flow in flows:
                self.describe(flow)
            self.nodes.append(
                Node(
                    name=node,
                    op=op,
                    layer=layer,
                    inputs=tuple(flow.name for flow in inputs),
                    outputs=tuple(names),
                    attributes=dict(attributes or {}),
                )
            )
        return flows

    def constant(self, name: str, value: float, dtype: str) -> Flow:
        scalar = Flow(name, (), dtype=dtype)
        return self.emit(f"{name}.constant", "Constant", [], scalar, {"value_float": float(value)})

    # How the order of a flow's axes is settled.

    def channels_first(self, flow: Flow) -> Flow:
        """The flow with the channel axis where ONNX's spatial operators expect it."""
        if flow.first:
            return flow
        if flow.pending is not None:
            self.decisions.nature(flow.pending, "spatial")
        return self.turn(flow, True)

    def as_is(self, flow: Flow) -> Flow:
        """The flow with its axes in Keras' order, a vector's elements too."""
        flow = self.ordered(flow)
        if flow.pending is not None:
            self.decisions.nature(flow.pending, "sequence")
        return replace(self.turn(flow, False), turned=True) if flow.first else replace(flow, pending=None)

    def ordered(self, flow: Flow) -> Flow:
        """The flow, refusing that a vector is in another order than in Keras."""
        if flow.channels:
            self.decisions.deny(flow.origins)
        return replace(flow, channels=0, origins=frozenset(), fixed=True)

    def turn(self, flow: Flow, first: bool) -> Flow:
        """The flow with its channel axis in front of the spatial ones, or behind them."""
        rank = flow.rank
        known = self._turned.get((flow.name, first))
        turned = replace(flow, first=first, pending=None)
        if known is not None:
            return replace(turned, name=known)
        perm = (0, rank - 1, *range(1, rank - 1)) if first else (0, *range(2, rank), 1)
        result = self.emit(f"{flow.name}.transpose", "Transpose", [flow], turned, {"perm": perm})
        self._turned[flow.name, first] = result.name
        return result

    def restore(self, flow: Flow, like: Flow) -> Flow:
        """The flow in the order that another of the same rank has."""
        return flow if flow.first == like.first or flow.rank < 3 else self.turn(flow, like.first)

    # Layers whose vectors follow the order of a Flatten or Reshape.

    def split(self, path: str, flow: Flow, **axes: int) -> None:
        wanted = {axis: size for axis, size in axes.items() if size}
        known = self.splits.setdefault(path, wanted)
        if known != wanted:
            self.decisions.deny(flow.origins | self.split_origins.get(path, frozenset()))
        self.split_origins[path] = self.split_origins.get(path, frozenset()) | flow.origins
        if flow.opaque:
            self.undecided.add(path)
        if flow.opaque and flow.joined:
            self.unsettled.add(path)
        if flow.pixels and flow.shape is not None and flow.rank == 2:
            # Whoever takes the dense layer for one of channels may put these in front again before the Flatten.
            self.undecided.add(path)
            self.unsettled.add(path)

    def vector_layer(self, path: str, flow: Flow) -> Flow:
        """A layer with one weight per element of a vector: its weights take the vector's order."""
        self.split(path, flow, feature=flow.channels)
        return replace(flow, trail=flow.trail | {path}) if flow.shape is None or flow.rank == 2 else flow

    def taint(self, flow: Flow) -> None:
        """Something not understood uses the flow: nobody knows what its order means."""
        self.ordered(flow)
        self.undecided |= flow.trail


Handler = Callable[[Builder, Call], list[Flow]]
"""Adds the nodes of one layer; gives its outputs."""
