"""One direction of a bidirectional layer by itself, where a map asks for it.

Most frameworks have both directions in one layer. Flax has two cells side by side where they are written inside of
`nn.Bidirectional`. A map tells which is which, from the one into the other or back:

    "lstm:forward" = "LSTMCell_0"        "LSTMCell_0" = "lstm:forward"
    "lstm:backward" = "LSTMCell_1"       "LSTMCell_1" = "lstm:backward"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from neutral.canonical import CanonicalLayer, CanonicalTensor
from neutral.errors import Problem, Refused, raise_all
from neutral.native import stack
from neutral.schema.kinds import LABELS

AXIS = "direction"
DIRECTIONS = LABELS[AXIS]


def has_directions(layer: CanonicalLayer) -> bool:
    """Whether a layer computes in both directions."""
    return any(AXIS in tensor.axes for tensor in layer.weights.values())


def directed(
    layers: Sequence[CanonicalLayer], targets: Sequence[str], mapping: Mapping[str, str]
) -> tuple[list[CanonicalLayer], dict[str, str]]:
    """The layers of a source, those apart or together that a map to `targets` has so, and the map in their names.

    Raises `Refused` for a layer of one direction that is to be taken apart, and for two that do not go together.
    """
    problems: list[Problem] = []
    found = _apart(layers, mapping, problems)
    found, pairs = _together(found, targets, dict(mapping), problems)
    raise_all(Refused, problems)
    return found, pairs


def _named(path: str, known: set[str]) -> tuple[str, str] | None:
    """The layer and the direction that a name of a map means."""
    layer, _, direction = path.rpartition(":")
    return (layer, direction) if direction in DIRECTIONS and layer in known and path not in known else None


def _apart(
    layers: Sequence[CanonicalLayer], mapping: Mapping[str, str], problems: list[Problem]
) -> list[CanonicalLayer]:
    known = {layer.path for layer in layers}
    wanted = {named[0] for source in mapping if (named := _named(source, known))}
    found = []
    for layer in layers:
        if layer.path in wanted and has_directions(layer):
            found += [_one(layer, direction) for direction in DIRECTIONS]
            continue
        if layer.path in wanted:
            problems.append(Problem(layer.path, "a layer of one direction", "one of two", "correct the map"))
        found.append(layer)
    return found


def _one(layer: CanonicalLayer, direction: str) -> CanonicalLayer:
    tensors = {
        role: replace(
            tensor,
            data=tensor.data.take(0, (DIRECTIONS.index(direction),)).split(0, ()),
            axes=tensor.axes[1:],
            labels={axis: labels for axis, labels in tensor.labels.items() if axis != AXIS},
            identity=None,
        )
        for role, tensor in layer.weights.items()
    }
    settings = {**layer.attributes, "go_backwards": direction == "backward", "merge_mode": None}
    return replace(layer, path=f"{layer.path}:{direction}", tensors=tensors, attributes=settings)


def _together(
    layers: Sequence[CanonicalLayer], targets: Sequence[str], pairs: dict[str, str], problems: list[Problem]
) -> tuple[list[CanonicalLayer], dict[str, str]]:
    """Two layers that a map sends to the directions of one, as that one."""
    by_path = {layer.path: layer for layer in layers}
    halves: dict[str, dict[str, str]] = {}
    for source, target in pairs.items():
        if source in by_path and (named := _named(target, set(targets))):
            halves.setdefault(named[0], {})[named[1]] = source
    joined = {}
    for target, sources in halves.items():
        parts = [by_path[sources[direction]] for direction in DIRECTIONS if direction in sources]
        if problem := _unlike(target, parts):
            problems.append(problem)
            continue
        whole = _both(*parts)
        joined[parts[0].path] = whole
        pairs = {path: other for path, other in pairs.items() if path not in sources.values()} | {whole.path: target}
    second = {sources["backward"] for sources in halves.values() if "backward" in sources}
    return [joined.get(layer.path, layer) for layer in layers if layer.path not in second], pairs


def _unlike(target: str, parts: Sequence[CanonicalLayer]) -> Problem | None:
    """Why these are not the two directions of one layer."""
    if len(parts) < len(DIRECTIONS):
        return Problem(target, "a layer for one of its directions", "one for each", "map the other, too")
    where = " and ".join(part.path for part in parts)
    if any(part.kind == "unknown" for part in parts):
        return Problem(where, "layers of unknown kind", "to know it", "say with --kind what they are")
    forms = [{role: (t.axes, t.data.shape, t.data.dtype) for role, t in part.weights.items()} for part in parts]
    if parts[0].kind != parts[1].kind or forms[0] != forms[1] or any(map(has_directions, parts)):
        return Problem(
            where, "layers of different kinds or sizes", "two alike, for one of two directions", "correct the map"
        )
    backwards = tuple(part.attributes.get("go_backwards") for part in parts)
    if backwards[0] or backwards[1] is False:
        return Problem(
            where, "a forward layer that computes backward, or the reverse", "each in its direction", "correct the map"
        )
    return None


def _both(forward: CanonicalLayer, backward: CanonicalLayer) -> CanonicalLayer:
    tensors = {
        role: CanonicalTensor(
            stack((one.data, backward.weights[role].data)),
            (AXIS, *one.axes),
            {**one.labels, AXIS: DIRECTIONS},
            {
                f"{direction}.{local}": name
                for direction, part in zip(DIRECTIONS, (forward, backward), strict=True)
                for local, name in part.weights[role].native.items()
            },
        )
        for role, one in forward.weights.items()
    }
    settings = {**forward.attributes, "go_backwards": None}
    return replace(forward, path=f"{forward.path} and {backward.path}", tensors=tensors, attributes=settings)
