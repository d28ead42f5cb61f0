"""Equinox's models and files, written from native tensors.

    new = fill_live(model, {"layers.0.weight": kernel, ...})           the model with other weights; the old one stays
    fill(Path("model.eqx"), {...}, Path("new.eqx"), skeleton=model)    the file with other elements
    save(new, Path("new.eqx"))                                         a new file of a live model
    build(model, manifest, Path("new.eqx"))                            a new file of what was read from Equinox

A model of Equinox is a value: parts of it may be shared with others (`equinox.tree_at` copies no more than it must), and
functions compiled with it inside keep what they saw. So it is never changed; filling gives a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neutral.containers.eqx import EqxFile, replace_records, write_records
from neutral.containers.files import new_file, refuse_same
from neutral.conventions.equinox_model import Leaf, Model, checked, groups, settled, stored, tensor_of
from neutral.errors import Problem, Refused, Unsupported, raise_all
from neutral.native import NativeModel, Tensor
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

SUFFIX = ".eqx"


def fill(
    template: Path,
    tensors: Mapping[str, Tensor],
    out: Path,
    *,
    force: bool = False,
    key: str | None = None,
    skeleton: Any = None,
) -> None:
    """A copy of a file in which the leaves named have other elements: by the names of a model, else by their numbers."""
    refuse_same(out, template)
    opened = EqxFile(template)
    try:
        if skeleton is None:
            places = {str(i): i for i in range(len(opened.records))}
            new = dict(tensors)
        else:
            model = checked(skeleton)
            places = {leaf.name: i for i, leaf in enumerate(model.leaves)}
            if len(places) != len(opened.records):
                found, expected = f"{len(opened.records)} leaves", f"the {len(places)} of the model"
                raise Refused(Problem(str(template), found, expected, "give the model that was saved"))
            there = {leaf.name: opened.tensor(i, leaf.dtype) for i, leaf in enumerate(model.leaves)}
            new = _with_counters(model, tensors, there)
        raise_all(Refused, (Problem(name, "no such leaf", "one of the file") for name in new if name not in places))
        with new_file(out, force) as file:
            replace_records(opened, file, {places[name]: tensor for name, tensor in new.items()})
    finally:
        opened.close()


def _with_counters(model: Model, tensors: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leaves to write: what layers show as it is stored, and the counters of statistics that change."""
    new = stored(tensors, {leaf.name: leaf.shape for leaf in model.leaves})
    for group in groups(model, {**there, **{name: tensor for name, tensor in new.items() if name in there}}):
        statistics = [tensor.name for local, tensor in group.tensors.items() if "state_index/" in local]
        if group.cls == "BatchNorm" and any(name in new for name in statistics):
            new |= settled(group)
    return new


def fill_live(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A model as this one is, with other weights: a module, or a module and its state. The one given is not changed."""
    import jax

    found = checked(model)
    by_name = {leaf.name: leaf for leaf in found.leaves}
    new = _with_counters(found, tensors, {leaf.name: tensor_of(leaf) for leaf in found.leaves})
    raise_all(
        Refused, [problem for name, tensor in new.items() for problem in _misfit(name, by_name.get(name), tensor)]
    )
    leaves, structure = jax.tree_util.tree_flatten(model)
    for name, tensor in new.items():
        leaf = by_name[name]
        leaves[leaf.at] = _as_leaf(leaf, tensor)
    return jax.tree_util.tree_unflatten(structure, leaves)


def _misfit(name: str, leaf: Leaf | None, tensor: Tensor) -> list[Problem]:
    if leaf is None:
        return [Problem(name, "no leaf of that name", "one of the model")]
    if leaf.shape != tensor.shape or (leaf.dtype != tensor.dtype and not leaf.number):
        return [Problem(name, f"{tensor.dtype} {list(tensor.shape)}", f"{leaf.dtype} {list(leaf.shape)}")]
    return []


def _as_leaf(leaf: Leaf, tensor: Tensor) -> Any:
    """Elements as what the leaf is: a number, an array of NumPy, or one of JAX where it lies."""
    array = tensor.read()
    if leaf.number:
        return type(leaf.value)(array.item())
    if isinstance(leaf.value, np.ndarray | np.generic):
        return array if isinstance(leaf.value, np.ndarray) else array[()]
    import jax

    sharding = getattr(leaf.value, "sharding", None)
    return jax.device_put(array, sharding) if sharding is not None else jax.numpy.asarray(array)


def save(model: Any, out: Path, *, force: bool = False) -> None:
    """A new file of a live model, as `equinox.tree_serialise_leaves` writes it."""
    with new_file(out, force) as file:
        write_records(file, (tensor_of(leaf) for leaf in checked(model).leaves))


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new file of a model that came from Equinox; from elsewhere nothing tells the order of leaves."""
    if suffix_of(out) != SUFFIX:
        raise Unsupported(Problem(str(out), f"the suffix {out.suffix!r}", SUFFIX))
    tensors = {tensor.name: tensor.data for tensor in model.tensors()}
    told: Mapping[str, Any] = manifest.source.settings.get("metadata") or {}
    for name in told.get("grouped") or ():
        # The axis of groups of a transposed convolution is no axis of the leaf.
        tensors[name] = tensors[name].merge(0, 2)
    names = [str(name) for name in told.get("leaves") or sorted(tensors, key=int)]
    leaves = stored(tensors, {name: tensors[name].shape if name in tensors else () for name in names})
    fortran = [int(i) for i in told.get("fortran") or ()]
    with new_file(out, force) as file:
        write_records(file, (leaves[name] for name in names), fortran)
