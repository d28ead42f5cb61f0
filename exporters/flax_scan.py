"""Layers that nn.scan or nn.vmap keeps in one: their tensors have an axis more, and are read as one layer per index.

>>> from neutral.native import NativeTensor, from_array
>>> import numpy as np
>>> shapes = {("ScanBlock_0", "Dense_0", "kernel"): (3, 2, 4), ("ScanBlock_0", "Dense_0", "bias"): (3, 4)}
>>> found = unstacked({path: NativeTensor("/".join(path), from_array(np.zeros(s))) for path, s in shapes.items()})
>>> [(".".join(path), tensor.name) for path, tensor in found.items()][:2]
[('ScanBlock_0.0.Dense_0.kernel', 'ScanBlock_0/Dense_0/kernel#0:0'), ('ScanBlock_0.1.Dense_0.kernel', 'ScanBlock_0/Dense_0/kernel#0:1')]

Linen calls such a layer `Scan…_0` if nobody names it. Which axis was added is a setting that no file has: an axis counts if
all tensors below agree on its size, and if without it they are what their automatic names, or the classes of a live model,
say; then it must be the only one. Under a name that says nothing there must be a layer that is what it says only then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from neutral.canon import bind
from neutral.containers.tree import Path
from neutral.conventions.flax import FLAX
from neutral.conventions.flax_settings import shapes_fit
from neutral.conventions.forms import Config, Shapes
from neutral.native import NativeLayer, NativeTensor, Tensor

_STACKED: Final = re.compile(r"(Scan|Vmap)\w*_\d+")
_AUTOMATIC: Final = re.compile(r"(?:Scan|Vmap)*(\w+?)_\d+")
_AXES: Final = (0, 1, -1)
_MOST: Final = 1 << 18
"""Tensors that the layers of a stack can have."""
_DEEP: Final = 8
"""Levels at which a stack is looked for."""

Weights = Mapping[Path, NativeTensor]
Grouped = Callable[[Weights], tuple[NativeLayer, ...]]
Known = Callable[[Path], tuple[str, Config] | None]


def auto_named(path: Path) -> tuple[str, Config] | None:
    """The class of a layer that Linen named by itself.

    >>> auto_named(("net", "Dense_0")), auto_named(("net", "VmapDense_0")), auto_named(("net", "head"))
    (('Dense', {}), ('Dense', {}), None)
    """
    found = _AUTOMATIC.fullmatch(path[-1]) if path else None
    cls = FLAX.auto_names.get(found[1]) if found else None
    return None if cls is None else (cls, {})


def unstacked(weights: Weights, grouped: Grouped | None = None, known: Known = auto_named) -> dict[Path, NativeTensor]:
    """The weights with the layers in a stack one by one; a stack whose axis is not certain stays as it is."""
    group = grouped or _by_path
    stacks: dict[Path, dict[Path, NativeTensor]] = {}
    for path, tensor in weights.items():
        at = next((i for i, key in enumerate(path[:-1]) if _STACKED.fullmatch(key)), None)
        if at is not None:
            stacks.setdefault(path[: at + 1], {})[path] = tensor
    axes = {node: _axis(members, node, group, known) for node, members in stacks.items()}
    aside = {path for members in stacks.values() for path in members}
    axes |= _unnamed({path: tensor for path, tensor in weights.items() if path not in aside}, group, known)
    found: dict[Path, NativeTensor] = {}
    for path, tensor in weights.items():
        node = next((path[:n] for n in range(len(path)) if path[:n] in axes), None)
        axis = axes[node] if node is not None else None
        if node is None or axis is None:
            found[path] = tensor
            continue
        where = axis % len(tensor.data.shape)
        for i in range(tensor.data.shape[where]):
            name = f"{tensor.name}#{where}:{i}"
            found[(*node, str(i), *path[len(node) :])] = NativeTensor(name, slice_of(tensor.data, where, i))
    return found


def _unnamed(weights: Weights, grouped: Grouped, known: Known) -> dict[Path, int | None]:
    """The stacks whose names say nothing: above layers that are not what they say, and are that without an axis."""
    places = {tensor.name: path for path, tensor in weights.items()}
    wrong = dict(_misfits(grouped(weights), places, known))
    nodes = {node for path, depth in wrong.items() for node in _above(path, depth)}
    members: dict[Path, dict[Path, NativeTensor]] = {node: {} for node in nodes}
    for path, tensor in weights.items():
        for n in range(min(len(path), _DEEP)):
            if path[:n] in members:
                members[path[:n]][path] = tensor
    axes: dict[Path, int | None] = {}
    found: dict[Path, int | None] = {}
    for path, depth in wrong.items():
        for node in _above(path, depth):
            if node not in axes:
                axes[node] = _axis(members[node], node, grouped, known)
            if axes[node] is not None:
                found[_last_common(node, members[node], path[: depth - 1])] = axes[node]
                break
    return found


def _last_common(node: Path, members: Weights, deepest: Path) -> Path:
    """The last place that all members of a stack are below."""
    n = len(node)
    while n < len(deepest) and all(path[: n + 1] == deepest[: n + 1] for path in members):
        n += 1
    return (*node, *deepest[len(node) : n])


def _misfits(layers: tuple[NativeLayer, ...], places: Mapping[str, Path], known: Known) -> Iterator[tuple[Path, int]]:
    """A tensor's path, and how many keys of it are those of its layer, for each layer that is not what it says."""
    for layer in layers:
        local, tensor = next(iter(layer.tensors.items()))
        path = places[tensor.name]
        told = known(tuple(layer.path.split(".")) if layer.path else ())
        shapes = _shapes(layer)
        if told is not None and shapes and _fits(*told, shapes) is False:
            yield path, len(path) - 1 - local.count("/")


def _above(path: Path, depth: int) -> Iterator[Path]:
    """Where a stack may begin above a layer: the topmost place first, the root and the layer itself last."""
    yield from (path[:n] for n in (*range(1, min(depth, _DEEP)), 0, depth) if n < _DEEP)


def slice_of(tensor: Tensor, axis: int, index: int) -> Tensor:
    """One of the tensors along an axis."""
    return tensor.take(axis, (index,)).split(axis, ())


def _axis(members: Weights, node: Path, grouped: Grouped, known: Known) -> int | None:
    fit: dict[tuple[int, ...], int] = {}
    for axis in _AXES:
        shapes = [tensor.data.shape for tensor in members.values()]
        if any(len(shape) < (2 if axis == 1 else 1) for shape in shapes):
            continue
        sizes = {shape[axis] for shape in shapes}
        if (
            len(sizes) == 1
            and 0 < max(sizes) * len(members) <= _MOST
            and _named_rightly(members, node, axis, grouped, known)
        ):
            fit.setdefault(tuple(axis % len(shape) for shape in shapes), axis)
    return next(iter(fit.values())) if len(fit) == 1 else None


def _named_rightly(members: Weights, node: Path, axis: int, grouped: Grouped, known: Known) -> bool:
    """True if a layer's tensors without the axis are those of the class that is known of it, and none contradicts."""
    first = {
        path[len(node) :]: NativeTensor(tensor.name, slice_of(tensor.data, axis % len(tensor.data.shape), 0))
        for path, tensor in members.items()
    }
    confirmed = False
    for layer in grouped(first):
        told = known((*node, *layer.path.split(".")) if layer.path else node)
        fits = None if told is None else _fits(*told, _shapes(layer))
        if fits is False:
            return False
        confirmed = confirmed or fits is True
    return confirmed


def _shapes(layer: NativeLayer) -> Shapes:
    return {local: tensor.data.shape for local, tensor in layer.tensors.items() if not tensor.state}


def _fits(cls: str, config: Config, shapes: Shapes) -> bool | None:
    """Whether tensors are those of a class; None where nothing is known of it."""
    # What a file does not say may be so; what a live layer says is so.
    forms = [
        form for form in FLAX.forms if cls in form.classes and not form.vague and (not config or form.applies(config))
    ]
    forms += FLAX.build(cls, config) if config else ()
    if not forms or not shapes:
        return None
    return shapes_fit(cls, config, shapes) and any(not isinstance(bind(form, shapes), str) for form in forms)


def _by_path(weights: Weights) -> tuple[NativeLayer, ...]:
    made: dict[str, dict[str, NativeTensor]] = {}
    for path, tensor in weights.items():
        made.setdefault(".".join(path[:-1]), {})[path[-1]] = tensor
    return tuple(NativeLayer(path, None, tensors) for path, tensors in made.items())
