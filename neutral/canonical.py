"""Canonical layers in memory: what the archive stores, unread.

Parameters have the axes of their kind, fused where the kind fuses them (`in` of a dense kernel); `fine_axes` says
which named axes each holds (channel and position behind a Flatten), and these are what the archive stores.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neutral.native import Tensor
from neutral.schema.kinds import Evidence

SPATIAL = {0: (), 1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}
"""Names of spatial axes by their number."""

_HEADS = {"query": "heads", "key": "kv_heads", "value": "kv_heads", "attended": "heads"}
"""Axes of an attention that hold (head dim), and the attribute that counts the heads."""


CROSSING = {
    "in": ("channel", "position"),
    "feature": ("channel", "position"),
    "out": ("out_channel", "out_position"),
}
"""The finer axes of an axis that crosses a Flatten or Reshape."""

HEADED = ("head", "dim")
"""The finer axes of an axis that holds attention heads."""


@dataclass(frozen=True)
class CanonicalTensor:
    """One canonical parameter, unread. `axes` are the kind's own, fused where the kind fuses; `native` maps the local
    names of the native tensors that it is made of to their full names."""

    data: Tensor
    axes: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    native: Mapping[str, str] = field(default_factory=dict)
    identity: Hashable = None
    state: bool = False


@dataclass(frozen=True)
class CanonicalLayer:
    """One canonical layer. `channels` tells the axes that cross a Flatten and their channels; `undecided` those of
    which nobody knows, which are in the order of the source."""

    path: str
    kind: str
    tensors: Mapping[str, CanonicalTensor]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    evidence: Evidence = "none"
    native: str | None = None
    native_path: str = ""
    part: str | None = None
    candidates: tuple[str, ...] = ()
    channels: Mapping[str, int] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, CanonicalTensor]:
        """The tensors that are weights, by role."""
        return {role: tensor for role, tensor in self.tensors.items() if not tensor.state}


def fine_axes(layer: CanonicalLayer, tensor: CanonicalTensor) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Per axis of a parameter the named axes it holds, with their sizes: what the archive stores.

    A dense kernel behind a Flatten is (out, channel, position), an attention's query kernel (head, dim, in).
    """
    out: list[tuple[tuple[str, int], ...]] = []
    for axis, size in zip(tensor.axes, tensor.data.shape, strict=True):
        heads = layer.attributes.get(_HEADS[axis]) if layer.kind == "attention" and axis in _HEADS else None
        if axis in layer.channels and axis in CROSSING:
            channel, position = CROSSING[axis]
            out.append(((channel, layer.channels[axis]), (position, size // layer.channels[axis])))
        elif isinstance(heads, int) and heads > 0 and size % heads == 0:
            out.append(((HEADED[0], heads), (HEADED[1], size // heads)))
        else:
            out.append(((axis, size),))
    return tuple(out)
