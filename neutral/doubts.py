"""What one model leaves open and the other settles: the kinds of layers, and what crosses a Flatten.

A bare set of weights says neither. Where its partner (a template, or the other side of a comparison) does, its layers are
read as the partner's are; what neither side knows stays open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neutral.archive import Contents
from neutral.canon import bind, compatible, kind_advice, read_layers
from neutral.canonical import CanonicalLayer
from neutral.conventions.forms import Convention, Form, same_family
from neutral.crossing import MAY_CROSS
from neutral.errors import NeutralError, Problem, Refused, an
from neutral.framework import Framework
from neutral.native import NativeLayer, NativeModel, NativeTensor
from neutral.origin import origin_of, stored_form


def as_known(layer: CanonicalLayer, kind: str, origin: Convention, form: Form | None) -> CanonicalLayer:
    """A layer of unknown kind, read as what its partner is; in the form of one of the same family, if it has that."""
    if not any(compatible(kind, candidate) for candidate in layer.candidates):
        raise Refused(
            Problem(
                layer.path,
                f"tensors of {an(' or '.join(layer.candidates) or 'custom layer')}",
                f"those of {an(kind)}",
                "pair it with another layer",
            )
        )
    native = _raw_native(layer)
    shapes = {local: tensor.data.shape for local, tensor in native.tensors.items() if not tensor.state}
    if form is not None and not isinstance(bind(form, shapes), str):
        origin = replace(origin, forms=(form,))
    model = NativeModel(origin.framework, "", (native,), splits={native.path: layer.channels})
    found = [c for _, layers in read_layers(model, origin, kinds={_escaped(native.path): kind}) for c in layers]
    if len(found) > 1:
        raise Refused(
            Problem(
                layer.path,
                f"{len(found)} layers in one",
                f"one {kind}",
                f"export again with --kind '{layer.path}={kind}'",
            )
        )
    axes = {axis for tensor in found[0].weights.values() for axis in tensor.axes} & {*MAY_CROSS.get(kind, ())}
    return replace(found[0], undecided=tuple(a for a in layer.undecided if a in axes))


def _escaped(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _raw_native(layer: CanonicalLayer) -> NativeLayer:
    """A layer of unknown kind as the native layer that it came from."""
    tensors = {
        role: NativeTensor(next(iter(tensor.native.values()), role), tensor.data, tensor.identity, tensor.state)
        for role, tensor in layer.tensors.items()
    }
    return NativeLayer(layer.path, layer.native, tensors, {}, layer.evidence)


def reconciled(
    layer: CanonicalLayer,
    goal: CanonicalLayer,
    origin: Convention,
    convention: Convention,
    told: tuple[bool, bool],
    goal_told: bool,
    source_told: bool,
) -> CanonicalLayer:
    """The layer with its Flatten axes as the template's graph has them (`goal_told`), else as the source has them.

    A side without a config is taken to flatten as its framework does by itself; one whose config (`told`, of source
    and template) leaves the layer open flattens in a way of its own. What neither side knows is `Refused`.
    """
    differ = origin.flatten != convention.flatten
    if differ and ((layer.undecided and told[0]) or (goal.undecided and told[1])):
        raise Refused(undecided_problem(layer if layer.undecided else goal))
    if goal_told:
        guessed = not source_told and not layer.channels
        open_yet = layer.undecided or (guessed and goal.channels)
        return _decided(layer, dict(goal.channels), origin) if open_yet else replace(layer, channels=goal.channels)
    if layer.undecided and differ:
        raise Refused(undecided_problem(layer))
    return layer


def tells_wiring(settings: Mapping[str, Any]) -> bool:
    """True if a config lists the model's layers: one of a class of a user's own says nothing of what they are behind."""
    config = settings.get("config")
    inner = config.get("config") if isinstance(config, Mapping) else None
    return isinstance(inner, list) or (isinstance(inner, Mapping) and "layers" in inner)


def source_told(contents: Contents) -> bool:
    """True if a graph or the user said which layers cross a Flatten, so that nothing was concluded from sizes."""
    return contents.graph is not None or contents.source.settings.get("flatten") is not None


def flatten_remark(contents: Contents, layer: CanonicalLayer, origin: Convention, convention: Convention) -> list[str]:
    """What to say of a dense layer of which nothing tells whether it follows a Flatten, not even a convolution."""
    if (
        layer.kind != "dense"
        or layer.channels
        or layer.undecided
        or source_told(contents)
        or origin.flatten == convention.flatten
    ):
        return []
    return [
        "nothing says whether a dense layer follows a Flatten; taken to follow none (--flatten LAYER=CHANNELS, if one does)"
    ]


def _decided(layer: CanonicalLayer, channels: dict[str, int], origin: Convention) -> CanonicalLayer:
    """A layer in its source's order, now that the channels of its Flatten axes are known."""
    if origin.flatten != "channel position":
        layer = _read_again(layer, channels)
    return replace(layer, channels=channels, undecided=())


def _read_again(layer: CanonicalLayer, channels: Mapping[str, int]) -> CanonicalLayer:
    """The axes that cross a Flatten from (position channel) to (channel position)."""
    if layer.kind == "unknown":
        raise Refused(undecided_problem(layer))
    tensors = dict(layer.tensors)
    for role, tensor in layer.weights.items():
        data = tensor.data
        for i, axis in enumerate(tensor.axes):
            if axis in channels:
                order = [*range(i), i + 1, i, *range(i + 2, len(data.shape) + 1)]
                split = data.split(i, (data.shape[i] // channels[axis], channels[axis]))
                data = split.permute(order).merge(i, 2)
        tensors[role] = replace(tensor, data=data)
    return replace(layer, tensors=tensors)


def undecided_problem(layer: CanonicalLayer) -> Problem:
    """What to say of a layer that may follow a Flatten."""
    sizes = ", ".join(
        f"{axis} of {tensor.data.shape[tensor.axes.index(axis)]}"
        for axis in layer.undecided
        for tensor in (next((t for t in layer.weights.values() if axis in t.axes), None),)
        if tensor is not None
    )
    return Problem(
        layer.path,
        f"{sizes or 'an axis'} that may cross a Flatten (or Reshape)",
        "to know its channels, for frameworks flatten in different orders",
        f"export again with --flatten {layer.path}=CHANNELS if it is behind a Flatten, --flatten {layer.path}=none if not; --flatten none if no layer is",
    )


def agreed(
    left: Contents, right: Contents, pairs: Mapping[str, str]
) -> tuple[list[CanonicalLayer], list[CanonicalLayer], dict[str, Problem]]:
    """The layers of both sides of a comparison, each read as its partner tells where it does not tell itself.

    `pairs` maps paths of the left side to paths of the right. The third result says, by left path, what neither side tells
    of a pair that may be equal or not: their kind, or whether they cross a Flatten, though the two flatten in other orders.
    """
    ours = {layer.path: layer for layer in left.layers}
    theirs = {layer.path: layer for layer in right.layers}
    open_yet = {}
    for path, other in pairs.items():
        a, b = ours[path], theirs[other]
        try:
            a, b = _as_partner(a, b, left, right), _as_partner(b, a, right, left)
        except NeutralError:
            if _element_counts(a) == _element_counts(b):
                open_yet[path] = unknown_problem(a if a.kind == "unknown" else b, origin_of(left).convention())
            continue
        a, b = _flattened_as(a, b, left, right), _flattened_as(b, a, right, left)
        if (doubt := _open_between(a, b, left, right)) is not None:
            open_yet[path] = doubt
        ours[path], theirs[other] = a, b
    return list(ours.values()), list(theirs.values()), open_yet


def _as_partner(layer: CanonicalLayer, partner: CanonicalLayer, mine: Contents, other: Contents) -> CanonicalLayer:
    if layer.kind != "unknown" or partner.kind == "unknown":
        return layer
    convention = origin_of(mine).convention()
    alike = same_family(convention, origin_of(other).convention())
    form = stored_form(other, partner) if alike else None
    found = as_known(layer, partner.kind, convention, form)
    return replace(found, kind=partner.kind) if compatible(found.kind, partner.kind) else found


def _says(layer: CanonicalLayer, contents: Contents) -> bool:
    """True if it is known, and not concluded from sizes, whether a layer crosses a Flatten."""
    return not layer.undecided and (source_told(contents) or bool(layer.channels))


def _open_between(a: CanonicalLayer, b: CanonicalLayer, left: Contents, right: Contents) -> Problem | None:
    """What would have to be known to compare two layers."""
    ours, theirs = origin_of(left).convention(), origin_of(right).convention()
    if a.kind == b.kind == "unknown" and not same_family(ours, theirs):
        return unknown_problem(a, ours) if _element_counts(a) == _element_counts(b) else None
    if ours.flatten == theirs.flatten or _shapes(a) != _shapes(b):
        return None
    return next((undecided_problem(layer) for layer in (a, b) if layer.undecided), None)


def _shapes(layer: CanonicalLayer) -> dict[str, tuple[int, ...]]:
    return {role: tensor.data.shape for role, tensor in layer.weights.items()}


def _element_counts(layer: CanonicalLayer) -> list[int]:
    return sorted(tensor.data.size for tensor in layer.weights.values())


def unnamed_problem(layers: Sequence[CanonicalLayer], framework: Framework, *, template: bool = False) -> list[Problem]:
    """What to say of a source, or a template, whose file names no weights: nothing can be paired with them."""
    told = framework.unnamed
    if told is None or any(layer.kind != "unknown" or set(layer.weights) != {told.tensor} for layer in layers):
        return []
    return [
        Problem(
            f"the {framework.name} {'template' if template else 'file'}",
            f"{len(layers)} tensors without names",
            "to know which is which, which only its model tells",
            told.template if template else told.source,
        )
    ]


def unknown_problem(layer: CanonicalLayer, origin: Convention) -> Problem:
    """What to say of a layer of which neither side knows the kind."""
    return Problem(
        layer.path,
        "a layer of unknown kind on both sides",
        "its kind, for frameworks store it in different orders",
        kind_advice(layer, origin),
    )


def _flattened_as(layer: CanonicalLayer, partner: CanonicalLayer, mine: Contents, other: Contents) -> CanonicalLayer:
    """A layer in the order of its partner's Flatten; one that its own config leaves open flattens in a way of its own."""
    own_way = layer.undecided and tells_wiring(mine.source.settings)
    if own_way or layer.kind == "unknown" or _says(layer, mine) or not _says(partner, other):
        return layer
    return _decided(layer, dict(partner.channels), origin_of(mine).convention())
