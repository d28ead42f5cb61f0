"""Compares two models: their weights in canonical form, and what they compute on the same random input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from neutral.errors import printable
from neutral.schema.kinds import Layer, Parameter

if TYPE_CHECKING:
    from neutral.archive import Archive


def differing(a: Archive, b: Archive) -> list[str]:
    """One line per layer or parameter in which two models differ.

    Layers that are equal are paired by their digests, whatever they are called; the others by name, then in order.
    """
    from neutral.archive import layer_digests

    if a.manifest.weights_digest == b.manifest.weights_digest:
        return []
    left, right = layer_digests(a.manifest.layers), layer_digests(b.manifest.layers)
    rest: dict[str, list[str]] = {}
    for path, found in right.items():
        rest.setdefault(found, []).append(path)
    mine = []
    for path, found in left.items():
        if rest.get(found):
            rest[found].remove(path if path in rest[found] else rest[found][0])
        else:
            mine.append(path)
    theirs = [path for paths in rest.values() for path in paths]
    order = {layer.path: i for i, layer in enumerate(b.manifest.layers)}
    theirs.sort(key=lambda path: order[path])
    return list(_compared(a, b, mine, theirs))


def _compared(a: Archive, b: Archive, mine: list[str], theirs: list[str]) -> Iterator[str]:
    ours = {layer.path: layer for layer in a.manifest.layers}
    others = {layer.path: layer for layer in b.manifest.layers}
    for path in mine:
        partner = (
            path
            if path in theirs
            else next((p for p in theirs if p not in mine and _alike(ours[path], others[p])), None)
        )
        if partner is None:
            yield f"{printable(path)}: only in the first ({_kind(ours[path])})"
            continue
        theirs.remove(partner)
        name = printable(path) if path == partner else f"{printable(path)} / {printable(partner)}"
        if _kind(ours[path]) != _kind(others[partner]):
            yield f"{name}: {_kind(ours[path])} against {_kind(others[partner])}"
        yield from _parameters(a, b, name, ours[path], others[partner])
    for path in theirs:
        yield f"{printable(path)}: only in the second ({_kind(others[path])})"


def _alike(a: Layer, b: Layer) -> bool:
    return _kind(a) == _kind(b) and {r: p.shape for r, p in _weights(a).items()} == {
        r: p.shape for r, p in _weights(b).items()
    }


def _kind(layer: Layer) -> str:
    kind: str = layer.kind  # type: ignore[attr-defined]
    return kind


def _weights(layer: Layer) -> Mapping[str, Parameter]:
    return {role: parameter for role, parameter in layer.parameters.items() if not parameter.state}


def _parameters(a: Archive, b: Archive, name: str, left: Layer, right: Layer) -> Iterator[str]:
    ours, theirs = _weights(left), _weights(right)
    for role in sorted(ours.keys() | theirs.keys()):
        where = f"{name}/{printable(role)}"
        if role not in theirs:
            yield f"{where}: only in the first"
        elif role not in ours:
            yield f"{where}: only in the second"
        elif ours[role].shape != theirs[role].shape or ours[role].dtype != theirs[role].dtype:
            yield f"{where}: {_described(ours[role])} against {_described(theirs[role])}"
        elif ours[role].sha256 != theirs[role].sha256:
            yield f"{where}: {_distance(a, b, f'{left.path}/{role}', f'{right.path}/{role}')}"


def _described(parameter: Parameter) -> str:
    return f"{parameter.dtype} {' '.join(parameter.axes)} {parameter.shape}"


def _distance(a: Archive, b: Archive, left: str, right: str) -> str:
    """How far two tensors of one shape are apart, read tile by tile."""
    count, largest, total = 0, 0.0, 0
    for x, y in zip(a.tensor(left).tiles(), b.tensor(right).tiles(), strict=True):
        unequal = x.view(np.uint8).reshape(x.size, -1) != y.view(np.uint8).reshape(y.size, -1)
        count += int(unequal.any(axis=1).sum())
        total += x.size
        with np.errstate(all="ignore"):
            wide = np.complex128 if x.dtype.kind == "c" else np.float64
            gap = np.abs(x.astype(wide) - y.astype(wide))
        largest = max(largest, float(np.nanmax(gap, initial=0.0)))
    return f"{count} of {total} elements differ, by {largest:.3g} at the most"
