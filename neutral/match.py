"""Pairs the layers of an archive with those of a template.

By an explicit map, by equal names (normalised), and, for what is left, by structure: a kind with these canonical
shapes that stands once on each side; or several of them, if both sides know the order of computation. Never by chance:
what could be paired in two ways is refused with the candidates, and every layer of both sides is accounted for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from neutral.canon import compatible
from neutral.canonical import CanonicalLayer
from neutral.directions import has_directions
from neutral.errors import Problem, Refused, an, named, raise_all
from neutral.schema.graph import Graph
from neutral.schema.kinds import HARD_SIGMOIDS, KINDS


@dataclass(frozen=True)
class Side:
    """One of the two models: its layers in canonical form, and what is known of the order of computation.

    `chain`: every layer computes after the one before. `graph` tells the order of some pairs of layers where it is
    none.
    """

    layers: Sequence[CanonicalLayer]
    chain: bool = False
    graph: Graph | None = None


@dataclass(frozen=True)
class Pair:
    """A layer of the archive, the layer of the template that it goes to, and how that is known."""

    source: str
    target: str
    why: str


@dataclass(frozen=True)
class Pairing:
    """All pairs, and the layers that the caller allowed to stay out."""

    pairs: tuple[Pair, ...]
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def normalised(path: str) -> str:
    """A layer path without what frameworks add to it or write differently.

    >>> normalised("module.Encoder/RNN_1"), normalised("encoder.rnn_1")
    ('encoder.rnn_1', 'encoder.rnn_1')
    """
    parts = [part for part in re.split(r"[./]", path.lower()) if part]
    while len(parts) > 1 and parts[0] in ("module", "_orig_mod", "model", "network", "net"):
        parts = parts[1:]
    return ".".join(parts)


def pair_layers(
    source: Side,
    target: Side,
    *,
    mapping: Mapping[str, str] | None = None,
    allow_unused: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    alike: bool = False,
) -> Pairing:
    """The one pairing of two models, or `Refused` with all that stands in its way.

    `alike` says that both number their layers in the same way, so that equal numbers are equal names. `mapping` maps source
    paths to target paths. `allow_unused` and `allow_missing` are globs on the paths of source and target layers that may stay
    without a partner.
    """
    left = {layer.path: layer for layer in source.layers if layer.weights}
    right = {layer.path: layer for layer in target.layers if layer.weights}
    whole = (dict(left), dict(right))
    pairs: dict[str, Pair] = {}
    problems: list[Problem] = []
    _by_map(left, right, mapping or {}, pairs, problems)
    raise_all(Refused, problems)
    _by_name(source, target, left, right, alike, pairs, problems, (allow_unused, allow_missing))
    raise_all(Refused, problems)
    if alike:
        _by_place(left, right, pairs)
    _by_structure(source, target, left, right, pairs, whole)
    unused = tuple(path for path in left if _matches(path, allow_unused))
    missing = tuple(path for path in right if _matches(path, allow_missing))
    for path in left.keys() - set(unused):
        problems.append(_left_over(path, left[path], right.values(), "archive", "template", "--allow-unused"))
    for path in right.keys() - set(missing):
        problems.append(_left_over(path, right[path], left.values(), "template", "archive", "--allow-missing"))
    raise_all(Refused, sorted(problems, key=lambda p: p.where))
    order = {layer.path: i for i, layer in enumerate(source.layers)}
    return Pairing(tuple(sorted(pairs.values(), key=lambda p: order[p.source])), unused, missing)


def idle_patterns(flag: str, patterns: Sequence[str], layers: Iterable[CanonicalLayer]) -> list[str]:
    """What to say of patterns that no layer matches."""
    paths = [layer.path for layer in layers if layer.weights]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in paths)]
    return [f"{flag} {pattern!r} matches no layer; there are {', '.join(map(named, paths[:12]))}" for pattern in idle]


def _left_over(path: str, layer: CanonicalLayer, others: Any, mine: str, theirs: str, flag: str) -> Problem:
    near = [other.path for other in others if not conflicts(layer, other)]
    candidates = f"; candidates: {', '.join(near[:8])}" if near else ""
    apart = f" (its directions apart, as {path}:forward and {path}:backward)" if has_directions(layer) else ""
    return Problem(
        path,
        f"{an(_described(layer))} of the {mine} without a partner",
        f"exactly one in the {theirs}{candidates}",
        f"pair it in a --map file{apart}, or pass {flag} '{path}'",
    )


def _by_map(
    left: dict[str, CanonicalLayer],
    right: dict[str, CanonicalLayer],
    mapping: Mapping[str, str],
    pairs: dict[str, Pair],
    problems: list[Problem],
) -> None:
    taken: set[str] = set()
    for source, target in mapping.items():
        if source not in left:
            problems.append(
                Problem(
                    source,
                    "no such layer in the archive",
                    f"one of {', '.join(map(named, list(left)[:12]))}",
                    "correct the map",
                )
            )
        elif target not in right:
            problems.append(
                Problem(
                    target,
                    "no such layer in the template",
                    f"one of {', '.join(map(named, list(right)[:12]))}",
                    "correct the map",
                )
            )
        elif target in taken:
            problems.append(Problem(target, "two layers mapped to it", "one", "correct the map"))
        elif reason := conflicts(left[source], right[target]):
            problems.append(Problem(f"{source} -> {target}", reason, "layers of one kind and size", "correct the map"))
        else:
            taken.add(target)
            pairs[source] = Pair(source, target, "map")
    _remove(left, right, pairs)


def _by_name(
    source: Side,
    target: Side,
    left: dict[str, CanonicalLayer],
    right: dict[str, CanonicalLayer],
    alike: bool,
    pairs: dict[str, Pair],
    problems: list[Problem],
    allowed: tuple[Sequence[str], Sequence[str]],
) -> None:
    found = named_pairs(list(left), list(right), alike)
    for path, other in found.items():
        if reason := conflicts(left[path], right[other]):
            if _matches(path, allowed[0]) and _matches(other, allowed[1]):
                continue  # a head of another size: both stay as they are
            problems.append(
                Problem(
                    f"{path} -> {other}",
                    f"equal names but {reason}",
                    "layers of one kind and size",
                    _advice(left[path], right[other]),
                )
            )
        else:
            pairs[path] = Pair(path, other, "name" if path == other else "name, normalised")
    problems.extend(_out_of_order(source, target, left, found))
    _remove(left, right, pairs)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _by_place(left: dict[str, CanonicalLayer], right: dict[str, CanonicalLayer], pairs: dict[str, Pair]) -> None:
    """What is left, if all of it lies under equal names in both files, and is named alike but for the numbers.

    A Keras 3 file has two names of a layer: its place, which counts anew in each file and by which Keras itself loads,
    and its own, which counts on through a session.
    """
    ours, theirs = ({_place(layer): path for path, layer in side.items()} for side in (left, right))
    if len(ours) != len(left) or ours.keys() != theirs.keys():
        return
    found = {path: theirs[place] for place, path in ours.items()}
    if all(
        _uncounted(normalised(path)) == _uncounted(normalised(other)) and not conflicts(left[path], right[other])
        for path, other in found.items()
    ):
        pairs.update({path: Pair(path, other, "place in the file") for path, other in found.items()})
        _remove(left, right, pairs)


def _place(layer: CanonicalLayer) -> frozenset[str]:
    return frozenset(name for tensor in layer.weights.values() for name in tensor.native.values())


def _advice(source: CanonicalLayer, target: CanonicalLayer) -> str:
    if source.kind == target.kind == "unknown":
        return f"say with --kind '{source.path}=KIND' what it is"
    if "attention" in (source.kind, target.kind) and source.kind != target.kind:
        return "use a model that has the attention as one layer, too: no map pairs its projections"
    return "pair the layers in a --map file"


def named_pairs(left: Sequence[str], right: Sequence[str], alike: bool) -> dict[str, str]:
    """Layers of equal names. A counted name (`dense_1`, `layers.2`) is one only if both sides count the same ones.

    Frameworks count layers from where they stand: a second model in one session, or a layer more in front, shifts the
    numbers. Across frameworks (not `alike`) bare numbers are no names at all: one counts modules, the other layers.

    >>> named_pairs(["fc", "dense_1"], ["fc", "dense_1"], True)
    {'fc': 'fc', 'dense_1': 'dense_1'}
    >>> named_pairs(["fc", "dense", "dense_1"], ["fc", "dense_1", "dense_2"], True)
    {'fc': 'fc'}
    """
    ours, theirs = _index(left), _index(right)
    counted: dict[str, list[set[str]]] = {}
    for side, names in enumerate((ours, theirs)):
        for name in names:
            counted.setdefault(_uncounted(name), [set(), set()])[side].add(name)
    found = {}
    for name, paths in ours.items():
        if len(paths) > 1 or len(theirs.get(name, ())) != 1:
            continue
        mine, other = counted[_uncounted(name)]
        shifted = len(mine | other) > 1 and mine != other
        if shifted or (not alike and name.replace(".", "").isdigit()):
            continue
        found[paths[0]] = theirs[name][0]
    return found


def _uncounted(name: str) -> str:
    """A name without the number that its framework may have given it."""
    return re.sub(r"(^|[._])\d+$", "", name)


def _out_of_order(
    source: Side, target: Side, left: Mapping[str, CanonicalLayer], found: Mapping[str, str]
) -> Iterator[Problem]:
    """Layers of one kind and size whose counted names say another order than both models compute in."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path in (layer.path for layer in source.layers if layer.path in found):
        layer = left[path]
        counted = _uncounted(normalised(path))
        if counted != normalised(path) or any(_uncounted(normalised(p)) == counted for p in found if p != path):
            shapes = tuple(sorted((role, t.data.shape) for role, t in layer.weights.items()))
            groups.setdefault((counted, layer.kind, shapes), []).append(path)
    order = {layer.path: i for i, layer in enumerate(target.layers)}
    for paths in groups.values():
        others = [found[path] for path in paths]
        by_place = sorted(others, key=order.__getitem__)
        if others != by_place and _in_order(source, paths) and _in_order(target, by_place):
            yield Problem(
                f"{', '.join(paths)} -> {', '.join(others)}",
                "counted names that contradict the order of computation",
                "one that both agree on",
                "pair the layers in a --map file",
            )


def _index(layers: Iterable[str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = {}
    for path in layers:
        index.setdefault(normalised(path), []).append(path)
    return index


def _by_structure(
    source: Side,
    target: Side,
    left: dict[str, CanonicalLayer],
    right: dict[str, CanonicalLayer],
    pairs: dict[str, Pair],
    whole: tuple[Mapping[str, CanonicalLayer], Mapping[str, CanonicalLayer]],
) -> None:
    """Layers that only one partner can be of; then equal ones in the order of computation, if both sides have one.

    That names have taken all other partners away proves nothing (`fc1 fc2` and `fc2 fc3`): then the order of all must agree, or
    a map must have told which of them are which.
    """
    friends = {path: [other for other in right if not conflicts(layer, right[other])] for path, layer in left.items()}
    claims = {other: [path for path in friends if other in friends[path]] for other in right}
    known = dict(pairs)

    def take(paths: Sequence[str], others: Sequence[str], why: str) -> None:
        alike = [
            pair
            for pair in known.values()
            if not conflicts(whole[0][pair.source], whole[1][others[0]])
            and not conflicts(whole[0][paths[0]], whole[1][pair.target])
        ]
        found = {path: Pair(path, other, why) for path, other in zip(paths, others, strict=True)}
        told = any(pair.why == "map" for pair in alike)
        if not alike or told or _agree(source, target, [*found.values(), *alike]):
            pairs.update(found)

    for path, found in friends.items():
        if len(found) == 1 and len(claims[found[0]]) == 1:
            take([path], found, "the only layer of its kind and shapes")
    _remove(left, right, pairs)
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in left:
        groups.setdefault(tuple(friends[path]), []).append(path)
    for others, paths in groups.items():
        rest = [other for other in others if other in right]
        claimed = {path for other in rest for path in claims[other]}
        if not rest or len(rest) != len(paths) or claimed - set(paths):
            continue
        if _in_order(source, paths) and _in_order(target, rest):
            take(paths, rest, "order among layers of equal kind and shapes")
    _remove(left, right, pairs)


def _agree(source: Side, target: Side, pairs: Sequence[Pair]) -> bool:
    """Whether both sides compute the layers of these pairs one after the other, in the same order."""
    goes = {pair.source: pair.target for pair in pairs}
    ours = [layer.path for layer in source.layers if layer.path in goes]
    theirs = [layer.path for layer in target.layers if layer.path in goes.values()]
    return [goes[path] for path in ours] == theirs and _in_order(source, ours) and _in_order(target, theirs)


def _in_order(side: Side, paths: Sequence[str]) -> bool:
    """True if these layers compute one after the other: in a chain, within one stack, or along one way of the graph."""
    if side.chain:
        return True
    wanted = set(paths)
    if len({layer.native_path for layer in side.layers if layer.path in wanted}) == 1:
        return True
    return side.graph is not None and _one_after_the_other(side.graph, paths)


def _one_after_the_other(graph: Graph, paths: Sequence[str]) -> bool:
    """True if each of these layers needs what the one before it made."""
    ancestors: dict[str, set[str]] = {value: set() for value in graph.inputs}
    before: dict[str, set[str]] = {}
    for node in graph.nodes:
        needed = set().union(*(ancestors[value] for value in node.inputs)) if node.inputs else set()
        if node.layer is not None:
            if node.layer in before:
                return False  # a shared layer has no one place
            before[node.layer] = set(needed)
            needed.add(node.layer)
        for value in node.outputs:
            ancestors[value] = needed
    steps = itertools.pairwise(paths)
    return all(first in before and second in before and first in before[second] for first, second in steps)


def _remove(left: dict[str, CanonicalLayer], right: dict[str, CanonicalLayer], pairs: Mapping[str, Pair]) -> None:
    for pair in pairs.values():
        left.pop(pair.source, None)
        right.pop(pair.target, None)


def conflicts(source: CanonicalLayer, target: CanonicalLayer) -> str:
    """Why the weights of one layer cannot be those of another, or '' if they can."""
    if source.kind == target.kind == "unknown":
        if {r: t.data.shape for r, t in source.weights.items()} == {r: t.data.shape for r, t in target.weights.items()}:
            return ""
        return f"{_described(source)} against {_described(target)}"
    if source.kind == "unknown" or target.kind == "unknown":
        unknown, known = (source, target) if source.kind == "unknown" else (target, source)
        if any(compatible(kind, known.kind) for kind in unknown.candidates) and _sizes(unknown) == _sizes(known):
            return ""
        return f"{_described(source)} against {_described(target)}"
    if not compatible(source.kind, target.kind):
        return f"{an(source.kind)} against {an(target.kind)}"
    ours, theirs = _comparable(source), _comparable(target)
    for role in ours.keys() & theirs.keys():
        if ours[role] != theirs[role]:
            return f"{role} {source.tensors[role].data.shape} against {target.tensors[role].data.shape}"
    if "kernel" in _required(source.kind) and not (ours.keys() & theirs.keys()):
        return f"{_described(source)} against {_described(target)}"
    return ""


def _required(kind: str) -> set[str]:
    return {role for role, spec in KINDS[kind].parameters_of.items() if spec.required}


def _comparable(layer: CanonicalLayer) -> dict[str, tuple[int, ...]]:
    """Canonical shapes by role; the direction of a reparametrized kernel counts as the kernel."""
    alias = {"kernel_direction": "kernel", "kernel_raw": "kernel"}
    skip = ("kernel_magnitude", "kernel_u", "kernel_v", "bias")
    shapes = {alias.get(role, role): tensor.data.shape for role, tensor in layer.weights.items() if role not in skip}
    if layer.kind == "prelu":
        return {role: () if len(shape) == 1 else shape for role, shape in shapes.items()}
    return shapes


def _sizes(layer: CanonicalLayer) -> list[int]:
    """Element counts of the tensors of a layer, whatever their axes; zero sides of a bias are not counted."""
    return sorted(tensor.data.size for role, tensor in layer.weights.items() if not role.endswith("bias"))[-1:]


def _described(layer: CanonicalLayer) -> str:
    shapes = ", ".join(f"{role} {tensor.data.shape}" for role, tensor in layer.weights.items())
    return f"{layer.kind} ({shapes})"


_BEHAVIOUR = (
    "eps",
    "groups",
    "strides",
    "dilation",
    "reset_after",
    "recurrent_activation",
    "activation",
    "heads",
    "kv_heads",
    "equation",
    "axis",
    "attention_axes",
    "go_backwards",
    "merge_mode",
    "output_padding",
)
_AXES = ("axis", "attention_axes")
_REMARK = ("padding", "padding_mode", "decay", "padding_idx", "mask_zero")
_WIRED_ELSEWHERE: Mapping[str, Any] = {"go_backwards": False, "merge_mode": "concat"}
_UNSAID: Mapping[str, tuple[str, ...]] = {
    "attention": ("heads",),
    "batch_norm": ("eps",),
    "layer_norm": ("eps",),
    "rms_norm": ("eps",),
    "group_norm": ("groups", "eps"),
    "instance_norm": ("eps",),
    "simple_rnn": ("activation",),
}
"""Settings that no shape tells and that decide what the weights compute."""
_LAST_AXES = ("layer_norm", "rms_norm")
_WIRED_OUTSIDE = ("dense", "conv", "depthwise", "conv_transpose", "einsum_dense")


def differing_settings(
    source: CanonicalLayer,
    target: CanonicalLayer,
    wired_alike: bool,
    wirings_known: bool = False,
    advice: Mapping[str, str] | None = None,
) -> tuple[list[Problem], list[str]]:
    """Settings that both layers know and that differ: those that change the result, and remarks.

    `advice` is what the frameworks of the two say of settings that differ from all others'.

    What a framework may do outside of the layer (an activation behind it, padding before it) is compared only if both
    models wire it inside (`wired_alike`). Where the wirings of both are known, activations are compared by these.
    """
    problems, remarks = [], []
    where = source.path if source.path == target.path else f"{source.path} -> {target.path}"
    for name in _BEHAVIOUR:
        a, b = _setting(source, name, wired_alike), _setting(target, name, wired_alike)
        fused = name == "activation" and source.kind in _WIRED_OUTSIDE
        outside = fused or name in ("go_backwards", "merge_mode", "output_padding")
        if a is None or b is None or _equal(a, b) or (outside and not wired_alike):
            continue
        if fused and wirings_known and not (a in HARD_SIGMOIDS and b in HARD_SIGMOIDS):
            continue
        if name in _AXES and not _same_count(a, b):
            remarks.append(f"{where}: {name} is {a} in the source and {b} in the template")
            continue
        problems.append(_differing(where, name, a, b))
    for name in _REMARK:
        a, b = source.attributes.get(name), target.attributes.get(name)
        if a is not None and b is not None and not _equal(a, b):
            remarks.append(f"{where}: {name} is {a} in the source and {b} in the template")
    for name in () if wired_alike else _UNSAID.get(target.kind, ()):
        if source.attributes.get(name) is None and target.attributes.get(name) is not None:
            remarks.append(
                f"{where}: the source does not say {name}; taken to be {target.attributes[name]}, as in the template"
            )
    for name in () if wired_alike else _UNSAID.get(source.kind, ()):
        if source.attributes.get(name) is not None and target.attributes.get(name) is None:
            remarks.append(
                f"{where}: the template does not say {name}; the other model must have {source.attributes[name]}, as the source"
            )
    found, doubt = _differing_groups(source, target, where, wired_alike, advice or {})
    problems, remarks = problems + found, remarks + doubt
    for name, usual in _WIRED_ELSEWHERE.items():
        a, b = source.attributes.get(name), target.attributes.get(name)
        for mine, other, whose in ((a, b, "source"), (b, a, "template")):
            if mine not in (None, usual) and other is None:
                remarks.append(
                    f"{where}: {name} is {mine} in the {whose}; the other model must be wired to do the same"
                )
    for layer, other, whose in ((source, target, "source"), (target, source, "template")):
        axis = layer.attributes.get("axis")
        if layer.kind in _LAST_AXES and axis is not None and "axis" not in other.attributes and not _trailing(axis):
            remarks.append(f"{where}: axis is {axis} in the {whose}; the other model must be wired to do the same")
    return problems, remarks


def _differing_groups(
    source: CanonicalLayer, target: CanonicalLayer, where: str, wired_alike: bool, advice: Mapping[str, str]
) -> tuple[list[Problem], list[str]]:
    """Group norms that take other channels together, or of which one does not say which."""
    mine, other = (layer.attributes.get("grouping") for layer in (source, target))
    if mine == other or "group_norm" not in (source.kind, target.kind):
        return [], []
    if "unsaid" in (mine, other):
        whose = "source" if mine == "unsaid" else "template"
        taken = f"{where}: the {whose} does not say how it groups channels; taken to be as in the other model"
        return [], [taken if wired_alike or "interleaved" in (mine, other) else f"{taken}, side by side"]
    told = [f"channels of a group that are {grouping or 'side by side'}" for grouping in (mine, other)]
    do = advice.get("grouping", "build both models with the same groups")
    return [Problem(where, told[0], f"the template's {told[1]}", do)], []


def _differing(where: str, name: str, a: Any, b: Any) -> Problem:
    if a in HARD_SIGMOIDS and b in HARD_SIGMOIDS:
        found, expected = (f"{each} ({HARD_SIGMOIDS[each]})" for each in (a, b))
        return Problem(where, f"{name} {found}", f"the template's {expected}", "use a template of the source's Keras")
    return Problem(where, f"{name} {a}", f"the template's {b}", f"build the template with {name}={a}")


def _trailing(axes: Any) -> bool:
    """True for the last axes, and for those of which nobody knows whether they are."""
    listed = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
    return any(axis >= 0 for axis in listed) or listed == tuple(range(-len(listed), 0))


def _setting(layer: CanonicalLayer, name: str, wired_alike: bool) -> Any:
    """A setting as it is compared: said in one way, and where the kind itself says it, too."""
    value = layer.attributes.get(name)
    match name:
        case "groups" if layer.kind in ("instance_norm", "group_norm"):
            channels = next((tensor.data.shape[0] for tensor in layer.weights.values()), None)
            return channels if layer.kind == "instance_norm" or value == -1 else value
        case "equation" if value is not None:
            return _renamed(value)
        case "equation" if layer.kind == "dense" and layer.evidence == "class" and wired_alike:
            return "that of a dense layer"
    return value


def _renamed(equation: str) -> str:
    """An equation with its letters in alphabetical order.

    >>> _renamed("xyz,yw->xwz")
    'abc,bd->adc'
    """
    letters = dict.fromkeys(c for c in equation if c.isalpha())
    names = dict(zip(letters, (chr(ord("a") + i) for i in range(len(letters))), strict=True))
    return "".join(names.get(c, c) for c in equation)


def _same_count(a: Any, b: Any) -> bool:
    """True if axes are counted from one end in both, so that other numbers are other axes."""
    ends = {axis < 0 for value in (a, b) for axis in (value if isinstance(value, list | tuple) else (value,))}
    return len(ends) == 1


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float | int):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b)) + 1e-12
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
