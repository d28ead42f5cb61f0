"""Equinox's models and files, read into native layers.

    read_live(model)                           a module, or (module, state) if it has one
    read(Path("model.eqx"), skeleton=model)    a file, by a model of the same structure
    read(Path("model.eqx"))                    a file by itself: leaves 0, 1, ... of which nothing is known

Files of `equinox.tree_serialise_leaves` have no names: only a model tells which leaf is which. Its own arrays are not read
then, and `equinox.filter_eval_shape` makes one that has none. A live model is walked, not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neutral.containers.eqx import EqxFile
from neutral.conventions.equinox import CONV_TRANSPOSE
from neutral.conventions.equinox_model import Group, Model, checked, class_name, correction, groups, layers, tensor_of
from neutral.errors import BadFile, Problem, Refused, WrongUsage, raise_all
from neutral.native import NativeLayer, NativeModel, NativeTensor, Tensor


def read(source: Path, *, key: str | None = None, skeleton: Any = None) -> NativeModel:
    """The leaves of a file; by a model that has the same structure, its layers."""
    if key is not None:
        raise WrongUsage(Problem(str(source), f"the key {key!r}", "none", "a file of Equinox holds one set of weights"))
    opened = EqxFile(source)
    try:
        if not opened.records:
            raise BadFile(Problem(str(source), "no leaf", "at least one", "is this a file of weights?"))
        return _unnamed(opened) if skeleton is None else _named(opened, skeleton)
    except BaseException:
        opened.close()
        raise


def _unnamed(opened: EqxFile) -> NativeModel:
    found = tuple(
        NativeLayer(str(i), None, {"leaf": NativeTensor(str(i), opened.tensor(i))}) for i in range(len(opened.records))
    )
    note = "a file of Equinox names no leaf: they are 0, 1, ... here; by the model itself their layers are known"
    return NativeModel("equinox", "eqx", found, metadata={"metadata": _form(opened)}, notes=(note,), close=opened.close)


def _form(opened: EqxFile) -> dict[str, Any]:
    """Which leaves lie in Fortran order."""
    turned = [i for i, record in enumerate(opened.records) if record.header.fortran_order]
    return {"fortran": turned} if turned else {}


def _named(opened: EqxFile, skeleton: Any) -> NativeModel:
    model = checked(skeleton)
    if len(model.leaves) != len(opened.records):
        found, expected = f"{len(opened.records)} leaves", f"the {len(model.leaves)} of the model"
        raise Refused(Problem(str(opened.file.path), found, expected, "give the model that was saved"))
    tensors = {leaf.name: opened.tensor(i, leaf.dtype) for i, leaf in enumerate(model.leaves)}
    misfits = (
        Problem(
            f"{opened.file.path}: {leaf.name}",
            f"{there.dtype} {list(there.shape)}",
            f"the model's {leaf.dtype} {list(leaf.shape)}",
            "give the model that was saved",
        )
        for leaf, there in zip(model.leaves, tensors.values(), strict=True)
        if there.shape != leaf.shape or (there.dtype != leaf.dtype and not leaf.number)
    )
    raise_all(Refused, list(misfits)[:20])
    return _model(skeleton, model, tensors, opened)


def read_live(model: Any) -> NativeModel:
    """The weights of a live module, or of a module and its state."""
    found = checked(model)
    shapes = [leaf for leaf in found.leaves if not leaf.number and not hasattr(leaf.value, "__array__")]
    raise_all(Refused, [Problem(leaf.name, "the shape of an array", "an array") for leaf in shapes[:20]])
    return _model(model, found, {leaf.name: tensor_of(leaf) for leaf in found.leaves}, None)


def _model(live: Any, model: Model, tensors: Mapping[str, Tensor], opened: EqxFile | None) -> NativeModel:
    root = live[0] if isinstance(live, tuple | list) and live else live
    found = layers(model, tensors)
    told: dict[str, Any] = {"leaves": [leaf.name for leaf in model.leaves]}
    if grouped := [layer.tensors["weight"].name for layer in found if layer.cls in CONV_TRANSPOSE]:
        told["grouped"] = grouped
    return NativeModel(
        "equinox",
        "module" if opened is None else "eqx",
        found,
        ordered=class_name(root) in ("Sequential", "MLP"),
        metadata={"metadata": told | ({} if opened is None else _form(opened))},
        notes=tuple(_notes(groups(model, tensors))),
        close=(lambda: None) if opened is None else opened.close,
    )


def _notes(found: Sequence[Group]) -> Iterator[str]:
    for group in found:
        path = ".".join(group.path)
        if group.cls == "BatchNorm" and not any("state_index" in local for local in group.tensors):
            yield f"{path}: its statistics are in the state of the model; give (model, state)"
        elif (scale := correction(group)) != 1:
            yield f"{path}: its statistics are of few steps, and divided by {scale:.6g} as inference divides them"
