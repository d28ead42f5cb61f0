"""Finds the arrays in a live tree: nested dicts, lists, states and train states, by duck typing. Imports no framework.

>>> import numpy as np
>>> tree = {"params": {"fc": {"kernel": np.zeros((2, 3))}}, "step": 3, "opt_state": (np.zeros(1),)}
>>> [(place.path, place.array.shape) for place in places(tree)]
[(('params', 'fc', 'kernel'), (2, 3)), (('opt_state', '0'), (1,))]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]
_DEEPEST = 64


@dataclass(frozen=True)
class Place:
    """Where an array is in a live tree: its path, the container that holds it, and its key there.

    `box` is what is around the array itself, if anything is: a Variable of NNX, a box of Linen's metadata.
    """

    path: Path
    array: Any
    holder: Any
    key: Any
    box: Any = None


def places(tree: Any) -> Iterator[Place]:
    """Every array of a live tree, in its order."""
    pending: list[tuple[Path, Any, Any, Any]] = [((), tree, None, None)]
    while pending:
        path, value, holder, key = pending.pop()
        array, box = unboxed(value)
        if is_array(array):
            yield Place(path, array, holder, key, box)
        elif len(path) < _DEEPEST:
            pending += [((*path, str(k)), child, value, k) for k, child in reversed(_children(value))]


def is_array(value: Any) -> bool:
    """True for arrays of numpy and JAX."""
    return all(hasattr(value, name) for name in ("shape", "dtype", "ndim", "__array__"))


def is_random_key(array: Any) -> bool:
    """True for JAX's typed PRNG keys, which are no numbers."""
    return str(array.dtype).startswith("key<")


def unboxed(value: Any) -> tuple[Any, Any]:
    """(an array, what is around it): a Variable of NNX, or a box with metadata, has it inside."""
    names = {cls.__name__ for cls in type(value).__mro__ if cls.__module__.partition(".")[0] == "flax"}
    if "Variable" in names or "VariableState" in names:
        return (value.get_value() if hasattr(value, "get_value") else value.value), value
    if "AxisMetadata" in names:
        return value.unbox(), value
    return value, None


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return list(value._asdict().items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []
