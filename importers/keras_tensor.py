"""A Keras tensor that holds a value of a graph, its axes in some order.

>>> image = KerasTensor(("x", 0, 0), (None, 3, 8, 6), channels_last(4))
>>> image.json["config"]["shape"]
[None, 8, 6, 3]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class KerasTensor:
    """A Keras tensor that holds a value of the graph.

    Keras axis i is the value's axis perm[i]. `channels`: a vector in (position channel) order. `nonnegative`: no
    element is below zero, so that padding with zeros does not change a maximum. `told`: Keras knows the size of the
    last axis, without which it cannot make weights for it.
    """

    reference: tuple[str, int, int]
    shape: Shape
    perm: tuple[int, ...]
    dtype: str = "float32"
    channels: int = 0
    nonnegative: bool = False
    told: bool = True

    @property
    def rank(self) -> int:
        return len(self.perm)

    @property
    def json(self) -> Config:
        shape = [self.shape[axis] for axis in self.perm]
        config = {"shape": shape, "dtype": self.dtype, "keras_history": list(self.reference)}
        return {"class_name": "__keras_tensor__", "config": config}


def channels_last(rank: int) -> tuple[int, ...]:
    """The order of axes with channels last."""
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


def as_in_graph(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))
