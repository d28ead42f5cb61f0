"""Trees of named arrays, as JAX's libraries keep them: nested dicts and lists, flat by path.

>>> grouped({("params", "dense", "kernel"): 1, ("params", "dense", "bias"): 2, ("step",): 3})
{'params': {'dense': {'kernel': 1, 'bias': 2}}, 'step': 3}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from neutral.errors import Problem, Refused
from neutral.native import Tensor

Path = tuple[str, ...]
"""A leaf's place: the keys on the way to it, and the positions in lists, as strings."""

T = TypeVar("T")

_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)

DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name).newbyteorder("<")
    for name in _NAMES
    if name in np.sctypeDict or hasattr(ml_dtypes, name)
}
"""The dtypes that JAX's files name, little-endian, by their names in NumPy."""


@dataclass(frozen=True)
class PyTree:
    """A tree of arrays out of a file: `leaves` unread, in the file's order; `others` what is no array, by path too.

    Others are None, bool, int, float, complex, str, bytes, and `{}` and `[]` for what is empty. `metadata` can be
    written as JSON, and is what a writer of the same format needs beside both to give the tree back as it was.
    """

    leaves: Mapping[Path, Tensor]
    others: Mapping[Path, object] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = field(default=lambda: None, compare=False)


def dotted(path: Sequence[str]) -> str:
    """A path in words: its parts with dots between.

    >>> dotted(("params", "Dense_0", "kernel")), dotted(())
    ('params.Dense_0.kernel', 'the tree itself')
    """
    return ".".join(path) or "the tree itself"


def in_order(paths: Iterable[Path], order: Sequence[Sequence[str]] | None) -> list[Path]:
    """The paths in the order that metadata remember; those that they do not name come last.

    >>> in_order([("a",), ("b",), ("c",)], [["b"], ["a"]])
    [('b',), ('a',), ('c',)]
    """
    known = {tuple(path): i for i, path in enumerate(order or ())}
    return sorted(paths, key=lambda path: known.get(path, len(known)))


def grouped(flat: Mapping[Path, T]) -> Any:
    """Nested dicts from paths, each key where it is first seen. Refuses a path that is the beginning of another."""
    if () in flat and len(flat) == 1:
        return flat[()]
    root: dict[str, Any] = {}
    branches: dict[Path, dict[str, Any]] = {(): root}
    for path, leaf in flat.items():
        at = len(path) - 1 if path else 0
        while path[:at] not in branches:
            at -= 1
        branch = branches[path[:at]]
        for i in range(at, len(path) - 1):
            if path[i] in branch:
                _clash(path[: i + 1])
            branch[path[i]] = branches[path[: i + 1]] = branch = {}
        if not path or path[-1] in branch:
            _clash(path)
        branch[path[-1]] = leaf
    return root


def _clash(path: Path) -> None:
    raise Refused(Problem(dotted(path), "a leaf that has leaves of its own", "leaves at the ends of the tree alone"))


def misfits(source: object, leaves: Mapping[Path, Tensor], new: Mapping[Path, Tensor]) -> list[Problem]:
    """Why leaves cannot be replaced: not there, of another dtype or shape."""
    problems = []
    for path, tensor in new.items():
        there = leaves.get(path)
        where = f"{source}: {dotted(path)}"
        if there is None:
            problems.append(Problem(where, "no array of that name", "one"))
        elif (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
            problems.append(
                Problem(where, f"{tensor.dtype} {list(tensor.shape)}", f"{there.dtype} {list(there.shape)}")
            )
    return problems
