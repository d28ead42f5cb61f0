"""Which layer a name of MLX's parameters belongs to, and the bias of a GRU as the parts that it is made of.

>>> places(["layers.0.weight", "layers.1.query_proj.weight"])["layers.0.weight"]
Place(path='0', local='weight')

A Sequential keeps its layers in a list called `layers`. Where every name begins with that list, it is the model itself,
and the paths are the numbers alone, as in other frameworks.

A GRU has the biases of its three gates in one tensor, `b`, and a recurrent one for the new gate alone, `bhn`. Here `b` is
three tensors, `b[r]`, `b[z]` and `b[n]`, so that all four are biases of one size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from neutral.native import Tensor, stack

GATES = ("[r]", "[z]", "[n]")
GRU_BIAS = (*(f"b{gate}" for gate in GATES), "bhn")
PROJECTIONS = ("query_proj", "key_proj", "value_proj", "out_proj")

_LIST = re.compile(r"layers\.(?=\d)")


@dataclass(frozen=True)
class Place:
    """The path of a layer, and the name of a tensor in it."""

    path: str
    local: str


def prefix_of(names: Iterable[str]) -> str:
    """`layers.` if all names begin with the list of a Sequential."""
    known = list(names)
    return "layers." if known and all(_LIST.match(name) for name in known) else ""


def prefix_for(paths: Iterable[str]) -> str:
    """`layers.` if all layers are numbered, as those of a Sequential are."""
    known = list(paths)
    return "layers." if known and all(path.partition(".")[0].isdecimal() for path in known) else ""


def places(names: Sequence[str], attentions: Iterable[str] | None = None) -> dict[str, Place]:
    """The place of each name. `attentions` are the paths of layers that are known to be attentions."""
    prefix = prefix_of(names)
    parted = {name: _parted(name[len(prefix) :]) for name in names}
    known = _attentions(parted.values()) if attentions is None else set(attentions)
    found = {}
    for name, (path, local) in parted.items():
        parent, last = _parted(path)
        inside = last in PROJECTIONS and parent in known
        found[name] = Place(parent, f"{last}.{local}") if inside else Place(path, local)
    return found


def _attentions(parted: Iterable[tuple[str, str]]) -> set[str]:
    """Layers with just the four projections of attention."""
    parts: dict[str, dict[str, set[str]]] = {}
    for path, local in parted:
        parent, last = _parted(path)
        if last in PROJECTIONS:
            parts.setdefault(parent, {}).setdefault(last, set()).add(local)
    return {
        path
        for path, found in parts.items()
        if len(found) == len(PROJECTIONS) and all("weight" in part <= {"weight", "bias"} for part in found.values())
    }


def _parted(name: str) -> tuple[str, str]:
    path, _, local = name.rpartition(".")
    return path, local


def gates_of(bias: Tensor) -> dict[str, Tensor]:
    """The bias of a GRU's gates by what is behind its name: `[r]`, `[z]`, `[n]`."""
    parts = bias.split(0, (len(GATES), bias.shape[0] // len(GATES)))
    return {gate: parts.take(0, (i,)).split(0, ()) for i, gate in enumerate(GATES)}


def is_gru(tensors: Mapping[str, Tensor]) -> bool:
    """True for the local names and shapes of a GRU with biases."""
    if tensors.keys() != {"Wx", "Wh", "b", "bhn"}:
        return False
    shapes = tensors["b"].shape, tensors["bhn"].shape
    return all(len(shape) == 1 for shape in shapes) and shapes[0][0] == len(GATES) * shapes[1][0]


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by full name with the parts of each GRU's bias put together again.

    >>> import numpy as np
    >>> from neutral.native import from_array
    >>> whole({f"gru.b{gate}": from_array(np.full(2, i)) for i, gate in enumerate(GATES)})["gru.b"].read().tolist()
    [0, 0, 1, 1, 2, 2]
    """
    found: dict[str, Tensor] = {}
    for name, data in tensors.items():
        base, gate = name[:-3], name[-3:]
        if gate not in GATES or any(base + each not in tensors for each in GATES):
            found[name] = data
        elif gate == GATES[0]:
            found[base] = stack([tensors[base + each] for each in GATES]).merge(0, 2)
    return found
