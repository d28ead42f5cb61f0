"""Layers that nn.scan or nn.vmap keeps in one: their tensors have an axis more, and are read as one layer per index.

>>> from neutral.native import NativeTensor, from_array
>>> import numpy as np
>>> shapes = {("ScanBlock_0", "Dense_0", "kernel"): (3, 2, 4), ("ScanBlock_0", "Dense_0", "bias"): (3, 4)}
>>> found = unstacked({path: NativeTensor("/".join(path), from_array(np.zeros(s))) for path, s in shapes.items()})
>>> [(".".join(path), tensor.name) for path, tensor in found.items()][:2]
[('ScanBlock_0.0.Dense_0.kernel', 'ScanBlock_0/Dense_0/kernel#0:0'), ('ScanBlock_0.1.Dense_0.kernel', 'ScanBlock_0/Dense_0/kernel#0:1')]

Linen calls such a layer `Scan…_0` if nobody names it. Which axis was added is a setting that no file has: an axis counts if
all tensors below agree on its size, and if without it they are what their automatic names say; then it must be the only one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from neutral.canon import bind
from neutral.containers.tree import Path
from neutral.conventions.flax import FLAX
from neutral.native import NativeLayer, NativeTensor, Tensor

_STACKED: Final = re.compile(r"(Scan|Vmap)\w*_\d+")
_AXES: Final = (0, 1, -1)
_MOST: Final = 1 << 18
"""Tensors that the layers of a stack can have."""

Weights = Mapping[Path, NativeTensor]
Grouped = Callable[[Weights], tuple[NativeLayer, ...]]


def unstacked(weights: Weights, grouped: Grouped | None = None) -> dict[Path, NativeTensor]:
    """The weights with the layers in a stack one by one; a stack whose axis is not certain stays as it is."""
    stacks: dict[Path, dict[Path, NativeTensor]] = {}
    for path, tensor in weights.items():
        at = next((i for i, key in enumerate(path[:-1]) if _STACKED.fullmatch(key)), None)
        if at is not None:
            stacks.setdefault(path[: at + 1], {})[path] = tensor
    axes = {node: _axis(members, len(node), grouped) for node, members in stacks.items()}
    found: dict[Path, NativeTensor] = {}
    for path, tensor in weights.items():
        node = next((path[:n] for n in range(1, len(path)) if path[:n] in axes), None)
        axis = axes[node] if node is not None else None
        if node is None or axis is None:
            found[path] = tensor
            continue
        where = axis % len(tensor.data.shape)
        for i in range(tensor.data.shape[where]):
            name = f"{tensor.name}#{where}:{i}"
            found[(*node, str(i), *path[len(node) :])] = NativeTensor(name, slice_of(tensor.data, where, i))
    return found


def slice_of(tensor: Tensor, axis: int, index: int) -> Tensor:
    """One of the tensors along an axis."""
    return tensor.take(axis, (index,)).split(axis, ())


def _axis(members: Weights, depth: int, grouped: Grouped | None) -> int | None:
    fit: dict[tuple[int, ...], int] = {}
    for axis in _AXES:
        shapes = [tensor.data.shape for tensor in members.values()]
        if any(len(shape) < (2 if axis == 1 else 1) for shape in shapes):
            continue
        sizes = {shape[axis] for shape in shapes}
        if len(sizes) == 1 and 0 < max(sizes) * len(members) <= _MOST and _named_rightly(members, depth, axis, grouped):
            fit.setdefault(tuple(axis % len(shape) for shape in shapes), axis)
    return next(iter(fit.values())) if len(fit) == 1 else None


def _named_rightly(members: Weights, depth: int, axis: int, grouped: Grouped | None) -> bool:
    """True if a layer's tensors without the axis are those of the class that its name says, and none contradicts."""
    first = {
        path[depth:]: NativeTensor(tensor.name, slice_of(tensor.data, axis % len(tensor.data.shape), 0))
        for path, tensor in members.items()
    }
    confirmed = False
    for layer in (grouped or _by_path)(first):
        cls = FLAX.auto_names.get(re.sub(r"_\d+$", "", layer.path.rpartition(".")[2]))
        shapes = {local: tensor.data.shape for local, tensor in layer.tensors.items() if not tensor.state}
        forms = [form for form in FLAX.forms if cls in form.classes and not form.vague]
        if not forms or not shapes:
            continue
        if all(isinstance(bind(form, shapes), str) for form in forms):
            return False
        confirmed = True
    return confirmed


def _by_path(weights: Weights) -> tuple[NativeLayer, ...]:
    made: dict[str, dict[str, NativeTensor]] = {}
    for path, tensor in weights.items():
        made.setdefault(".".join(path[:-1]), {})[path[-1]] = tensor
    return tuple(NativeLayer(path, None, tensors) for path, tensors in made.items())
