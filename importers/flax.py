"""Flax's files and live objects, written from native tensors. Files are written without Flax and JAX.

fill(Path("model.msgpack"), {"params/Dense_0/kernel": kernel}, Path("new.msgpack"))   the file with other elements
fill_live(variables, {"params/Dense_0/kernel": kernel})                               the same, in place
build(model, manifest, Path("new.msgpack"))                                           a new file of variables
build(model, manifest, Path("new"))                                                   a new folder of Orbax

A new file has the variables of Linen, {"params": …, "batch_stats": …}; one of a Flax source has its tree again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from neutral.containers.files import new_file, refuse_same
from neutral.containers.pytree import (
    PyTree,
    read_msgpack,
    read_orbax,
    replace_msgpack,
    replace_orbax,
    split_key,
    write_msgpack,
    write_orbax,
)
from neutral.containers.safetensors import misfits, open_safetensors, replace_tensors, usual_order, write
from neutral.containers.tree import Path as Place
from neutral.conventions.flax import PARAMS, SEPARATORS, STATISTICS, full_name, separator_of
from neutral.conventions.flax_live import Place as LivePlace
from neutral.conventions.flax_live import places, unboxed
from neutral.errors import Problem, Refused, WrongUsage, an, raise_all
from neutral.native import Array, NativeModel, Tensor, from_array, stack
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

MSGPACK: Final = ".msgpack"
SAFETENSORS: Final = ".safetensors"
ORBAX: Final = (".orbax", "")


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> list[str]:
    """A copy of a file or folder in which the tensors named have new elements; all else stays as it was, but for notes."""
    if suffix_of(template) == SAFETENSORS and template.is_file():
        _fill_safetensors(template, tensors, out, force)
        return []
    if template.is_dir():
        place, _ = split_key(template, key)
        leaves = _leaves(tensors, lambda: read_orbax(template, place))
        return replace_orbax(template, leaves, out, place, force=force)
    replace_msgpack(template, _leaves(tensors, lambda: read_msgpack(template)), out, force=force)
    return []


_SLICE: Final = re.compile(r"(.*)#(\d+):(\d+)", re.DOTALL)
"""The name of a tensor that is one of those along an axis of a leaf."""


def _leaves(tensors: Mapping[str, Tensor], opened: Callable[[], PyTree]) -> dict[Place, Tensor]:
    """The leaves of a template that change, put together again where a stack was read as several layers."""
    if not any(_SLICE.fullmatch(name) for name in tensors):
        return {place_of(name): data for name, data in tensors.items()}
    tree = opened()
    try:
        # What is not replaced is read from the template, so that it must stay open: its elements are few enough to keep.
        kept = {place: from_array(tree.leaves[place].read()) for place in _stacks(tensors) if place in tree.leaves}
    finally:
        tree.close()
    return whole(tensors, kept)


def _stacks(tensors: Mapping[str, Tensor]) -> set[Place]:
    return {place_of(found[1]) for found in map(_SLICE.fullmatch, tensors) if found is not None}


def whole(tensors: Mapping[str, Tensor], there: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """Tensors by the place of their leaf; of those along an axis of one, the missing ones are as they are `there`.

    >>> one = from_array([1.0])
    >>> whole({"a/kernel#0:1": one}, {("a", "kernel"): from_array([[0.0], [0.0]])})[("a", "kernel")].read().tolist()
    [[0.0], [1.0]]
    """
    leaves: dict[Place, Tensor] = {}
    pieces: dict[Place, dict[int, Tensor]] = {}
    axes: dict[Place, int] = {}
    for name, data in tensors.items():
        found = _SLICE.fullmatch(name)
        place = place_of(found[1] if found else name)
        leaves[place] = data
        if found is not None:
            pieces.setdefault(place, {})[int(found[3])] = data
            axes[place] = int(found[2])
    for place, given in pieces.items():
        axis = axes[place]
        old = there.get(place)
        count = len(given) if old is None else old.shape[axis]
        if old is None and set(given) != set(range(count)):
            raise Refused(
                Problem(full_name(place), f"{count} layers of a stack", "all of them", "write the whole stack")
            )
        parts = [given[i] if i in given else old.take(axis, (i,)).split(axis, ()) for i in range(count)]  # type: ignore[union-attr]
        leaves[place] = stack(parts, axis)
    return leaves


def _fill_safetensors(template: Path, tensors: Mapping[str, Tensor], out: Path, force: bool) -> None:
    opened = open_safetensors(template)
    try:
        separator = separator_of(opened.tensors)
        there = {tuple(name.split(separator)): data for name, data in opened.tensors.items()}
        new = {separator.join(place): data for place, data in whole(tensors, there).items()}
        raise_all(Refused, misfits(str(template), opened.tensors, new))
        (source,) = opened.files
        refuse_same(out, source.path)
        with new_file(out, force) as file:
            replace_tensors(source, file, new)
    finally:
        opened.close()


def place_of(name: str) -> Place:
    """The keys of a leaf's full name.

    >>> place_of("params/WeightNorm_0/Dense_0~1kernel~1scale")
    ('params', 'WeightNorm_0', 'Dense_0/kernel/scale')
    """
    return tuple(key.replace("~2", "#").replace("~1", "/").replace("~0", "~") for key in name.split("/"))


def fill_live(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Set the arrays named in nested dicts, a State, a TrainState or an nnx.Module. All are checked before the first is set."""
    found = _live_places(model)
    there = {place: from_array(np.asarray(found[place].array)) for place in _stacks(tensors) if place in found}
    leaves = whole(tensors, there)
    problems = []
    for path, data in leaves.items():
        place = found.get(path)
        if place is None:
            problems.append(Problem(full_name(path), "no array of that name", "one of the model's"))
        elif (problem := _unfit(full_name(path), place, data)) is not None:
            problems.append(problem)
    raise_all(Refused, problems)
    for path, array in {path: data.read() for path, data in leaves.items()}.items():
        _set(found[path], array)


def _live_places(model: Any) -> dict[Place, LivePlace]:
    if not any(cls.__module__.startswith("flax.nnx") and cls.__name__ == "Module" for cls in type(model).__mro__):
        return {place.path: place for place in places(model)}
    from flax import nnx

    found = {}
    for keys, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            path = tuple(str(key) for key in keys)
            found[path] = LivePlace(path, unboxed(node)[0], None, None, node)
    return found


def _unfit(name: str, place: LivePlace, data: Tensor) -> Problem | None:
    there = place.array
    if (tuple(there.shape), np.dtype(there.dtype)) != (data.shape, data.dtype):
        return Problem(name, f"{data.dtype}{list(data.shape)}", f"{there.dtype}{list(there.shape)} as in the model")
    if place.box is None and not _writable(there) and not isinstance(place.holder, MutableMapping | list):
        kind = type(place.holder).__name__
        return Problem(
            name, f"an array in {an(kind)}, which cannot be changed", "one in a dict", "unfreeze the tree first"
        )
    return None


def _writable(array: Any) -> bool:
    return isinstance(array, np.ndarray) and bool(array.flags.writeable)


def _set(place: LivePlace, data: Array) -> None:
    new: Any = data
    if _writable(place.array):
        place.array[...] = new
        return
    if not isinstance(place.array, np.ndarray):
        import jax

        new = jax.device_put(new, getattr(place.array, "sharding", None))
    if place.box is None:
        place.holder[place.key] = new
    elif hasattr(place.box, "set_value"):
        place.box.set_value(new)
    elif hasattr(place.box, "replace_boxed"):
        place.holder[place.key] = place.box.replace_boxed(new)
    else:
        place.box.value = new


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new file of the suffix's format, or a folder of Orbax."""
    own = manifest.source.framework == "flax"
    settings: Mapping[str, Any] = manifest.source.settings if own else {}
    leaves = _own_leaves(model, manifest) if own else dict(_linen_leaves(model))
    suffix = suffix_of(out)
    if suffix == SAFETENSORS:
        _build_safetensors(leaves, settings, out, force)
    elif suffix == MSGPACK:
        others, kept = _beside(settings, manifest.source.format == "msgpack")
        write_msgpack(leaves, others, out, kept, force=force)
    elif suffix in ORBAX:
        others, kept = _beside(settings, manifest.source.format == "orbax")
        write_orbax(leaves, others, out, kept, force=force)
    else:
        expected = f"{MSGPACK}, {SAFETENSORS}, or {ORBAX[0]} or none for a folder of Orbax"
        raise WrongUsage(Problem(str(out), f"the suffix {out.suffix}", expected, "choose another suffix"))


def _linen_leaves(model: NativeModel) -> Iterator[tuple[Place, Tensor]]:
    """The variables of Linen: running statistics in a collection of their own."""
    for layer in model.layers:
        above = tuple(layer.path.split(".")) if layer.path else ()
        for local, tensor in layer.tensors.items():
            statistic = layer.cls == "BatchNorm" and local in ("mean", "var")
            yield (STATISTICS if statistic else PARAMS, *above, *local.split("/")), tensor.data


def _own_leaves(model: NativeModel, manifest: Manifest) -> dict[Place, Tensor]:
    """The tree that the source had, in its order; of several sets of weights the one that was chosen."""
    tensors = {tensor.name: tensor.data for tensor in model.tensors()}
    if not _settings(manifest.source.settings).get("several"):
        tensors |= {t.name: t.data for members in model.collections.values() for t in members}
    order = manifest.source.settings.get("order")
    known = order if isinstance(order, list) else manifest.source.order
    rank = {str(name).partition("#")[0]: i for i, name in enumerate(known)}
    leaves = whole(tensors, {})
    return {place: leaves[place] for place in sorted(leaves, key=lambda place: rank.get(full_name(place), len(rank)))}


def _settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    found = settings.get("metadata")
    return found if isinstance(found, Mapping) else {}


def _beside(settings: Mapping[str, Any], same: bool) -> tuple[dict[Place, object], dict[str, Any]]:
    """What the source's tree has beside arrays, and what a writer of its format remembers of it."""
    kept = _settings(settings)
    listed = kept.get("others", ())
    pairs = (
        [pair for pair in listed if isinstance(pair, Sequence) and len(pair) == 2]
        if isinstance(listed, Sequence)
        else []
    )
    others = {tuple(map(str, place)): value for place, value in pairs if isinstance(place, Sequence)}
    tree = kept.get("tree")
    return others, dict(tree) if same and isinstance(tree, Mapping) else {}


def _build_safetensors(leaves: Mapping[Place, Tensor], settings: Mapping[str, Any], out: Path, force: bool) -> None:
    """A flattened tree; the separator is the source's, else one that no key has in it."""
    used = {character for place in leaves for key in place for character in key}
    told = _settings(settings).get("separator")
    fit = [s for s in (told, *reversed(SEPARATORS)) if s in SEPARATORS and s not in used]
    if not fit:
        raise Refused(
            Problem(
                str(out),
                f"keys with {' and '.join(SEPARATORS)} in them",
                "one that can separate them",
                f"write {MSGPACK}",
            )
        )
    pairs = _settings(settings).get("pairs")
    metadata = {str(k): str(v) for k, v in pairs} if isinstance(pairs, list) else {"format": "flax"}
    named = usual_order((fit[0].join(place), data) for place, data in leaves.items())
    with new_file(out, force) as file:
        write(file, named, metadata)
