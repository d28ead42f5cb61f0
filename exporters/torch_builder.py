"""A graph under construction: the nodes so far, and the value that the next torch module is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from neutral.exporters.torch_description import Config, Module
from neutral.schema.graph import Attribute, Graph, Node, Value

SPACE = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}


class Inexpressible(Exception):
    """A module that the graph has no operator for."""


class Contradiction(Exception):
    """A module that cannot take the value it would be given."""


class Size:
    """The size of an axis, known or to be found out. A joined axis knows the axes it is made of."""

    def __init__(self, n: int | None = None, parts: Sequence[Size] = ()) -> None:
        self.known, self.parts = n, tuple(parts)

    @property
    def n(self) -> int | None:
        if self.known is None and self.parts and all(part.n is not None for part in self.parts):
            self.known = math.prod(part.n or 0 for part in self.parts)
        return self.known

    def must_be(self, n: int, what: str) -> None:
        if self.n is not None and self.n != n:
            raise Contradiction(f"it takes {n} {what} and would be given {self.n}")
        self.known = n
        open_parts = [part for part in self.parts if part.n is None]
        if self.parts:
            rest, left = divmod(n, math.prod(part.n for part in self.parts if part.n is not None))
            if left or (not open_parts and rest != 1):
                raise Contradiction(f"it takes {n} {what}, not a multiple of the channels")
            if len(open_parts) == 1:
                open_parts[0].must_be(rest, what)


class Builder:
    """The graph so far, and the value that the next module is given."""

    def __init__(self, axes: tuple[str, ...], dtype: str, paths: set[str]) -> None:
        self.nodes: list[Node] = []
        self.made: list[tuple[str, tuple[str, ...], list[Size], str]] = []
        self.input = "input"
        while self.input in paths:
            self.input += "_"
        self.value, self.axes, self.sizes = self.input, axes, [Size() for _ in axes]
        self.made.append((self.input, axes, self.sizes, dtype))
        self.module = Module("", "", {}, ())

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def space(self) -> int:
        return self.rank - 2

    def node(
        self,
        op: str,
        attributes: Mapping[str, Attribute] | None = None,
        *,
        layer: bool = False,
        axes: tuple[str, ...] | None = None,
        sizes: list[Size] | None = None,
        inputs: tuple[str, ...] | None = None,
        suffix: str = "",
    ) -> str:
        name = f"{self.module.path}.{suffix}" if suffix else self.module.path
        taken = (self.value,) if inputs is None else inputs
        own = self.module.path if layer else None
        self.nodes.append(
            Node(name=name, op=op, layer=own, inputs=taken, outputs=(name,), attributes=dict(attributes or {}))
        )
        self.value, self.axes = name, self.axes if axes is None else axes
        self.sizes = self.sizes if sizes is None else sizes
        self.made.append((name, self.axes, self.sizes, "float32"))
        return name

    def need_image(self, space: int) -> None:
        if self.space != space or self.axes[1] != "channel":
            raise Contradiction(f"it takes (batch, channel, {', '.join(SPACE[space])}), not {self.axes}")

    def graph(self) -> Graph:
        values = {
            name: Value(axes=axes, shape=tuple(size.n for size in sizes), dtype=dtype)
            for name, axes, sizes, dtype in self.made
        }
        return Graph(inputs=(self.input,), outputs=(self.value,), values=values, nodes=tuple(self.nodes))


Rule = Callable[[Builder, Config], None]
"""Adds the nodes of `builder.module`, whose settings it is given."""
