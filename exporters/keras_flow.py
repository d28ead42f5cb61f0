"""A Keras tensor under way, and how the graph has it.

>>> image = Flow("x", (None, 8, 6, 3), first=True)
>>> axes_of(image), graph_axis(image, -1)
(('batch', 'channel', 'height', 'width'), 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neutral.canonical import SPATIAL

Shape = tuple[int | None, ...]

Config = Mapping[str, Any]


class Unclear(Exception):
    """A layer that the graph cannot express; the message says why."""


class Malformed(Exception):
    """A config that is no model."""


@dataclass(frozen=True)
class Flow:
    """A Keras tensor under way.

    `first`: the graph has its channel axis in front of the spatial ones. `channels`: it is a vector that the graph has
    in (channel position) order where Keras has (position channel). `origins` are the Flatten and Dense calls that could
    give it another order; a `fixed` one has its order from elsewhere. `trail` names the layers whose own vectors share
    this order. `pending` is the rank-3 model input or Reshape it is of, while nobody said whether that one is spatial. An
    `opaque` one comes from a layer that was not understood. `turned`: the graph has an image in Keras' order, for a layer that
    takes it so; `pixels`: a dense layer made such a one, or a vector is joined of its axes. `odd`: its channel axis may not be
    the last one. `joined`: it is a vector of joined axes, which another framework may have in another order.
    """

    name: str
    shape: Shape | None
    first: bool = False
    channels: int = 0
    origins: frozenset[str] = frozenset()
    fixed: bool = True
    trail: frozenset[str] = frozenset()
    pending: str | None = None
    source: str | None = None
    masked: bool = False
    opaque: bool = False
    odd: bool = False
    joined: bool = False
    turned: bool = False
    pixels: bool = False
    dtype: str = "float32"

    @property
    def dims(self) -> Shape:
        if self.shape is None:
            raise Unclear("its input has an unknown shape")
        return self.shape

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def space(self) -> Shape:
        """The sizes between the batch and the channels."""
        return self.dims[1:-1]

    @property
    def features(self) -> int:
        size = self.dims[-1] if self.rank > 1 else None
        if size is None:
            raise Unclear("its input has an unknown number of features")
        return size


def axes_of(flow: Flow) -> tuple[str, ...]:
    rank = flow.rank
    spatial = SPATIAL.get(rank - 2, tuple(f"axis{i}" for i in range(1, rank - 1)))
    if flow.first:
        return ("batch", "channel", *spatial)
    if rank == 2:
        return ("batch", "time" if flow.dtype.startswith(("int", "uint")) else "feature")
    if rank == 3:
        return ("batch", "time", "feature")
    return ("batch", *spatial, "channel") if rank > 3 else ("batch",)[:rank]


def graph_axis(flow: Flow, axis: Any) -> int:
    """Where the graph has an axis that Keras counts in its own order."""
    if not isinstance(axis, int) or not -flow.rank <= axis < flow.rank:
        raise Unclear(f"its axis is {axis!r}")
    place = int(axis) % flow.rank
    if not flow.first or place == 0:
        return place
    return 1 if place == flow.rank - 1 else place + 1
