"""Compares two models: their weights in canonical form, and what they compute on the same random input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neutral.errors import Problem, Refused, WrongUsage, printable, raise_all
from neutral.running import Array, Port, Runnable, framework_errors
from neutral.schema.graph import Graph
from neutral.schema.inputs import solve_inputs, token_limits
from neutral.schema.kinds import Layer, Parameter
from neutral.schema.manifest import Manifest

if TYPE_CHECKING:
    from neutral.archive import Archive


def differing(
    a: Archive, b: Archive, named: Mapping[str, str], in_order: bool, unsettled: Mapping[str, Problem]
) -> list[str]:
    """One line per layer or parameter in which two models differ.

    `named` pairs layers of equal names: they are held against each other. The others are paired by their digests,
    whatever they are called, and what is left by kind and shapes. `in_order` says that both models list their layers in
    the order of computation, which must then be the same. `unsettled` says, by the path of the first, what would have to be
    known to compare a pair; `Refused` if the models differ in nothing else.
    """
    from neutral.archive import layer_digests

    left, right = layer_digests(a.manifest.layers), layer_digests(b.manifest.layers)
    unlike = {path: other for path, other in named.items() if left[path] != right[other]}
    rest: dict[str, list[str]] = {}
    for path, found in right.items():
        if path not in named.values():
            rest.setdefault(found, []).append(path)
    mine = []
    for path, found in left.items():
        if path in named:
            continue
        if rest.get(found):
            rest[found].pop(0)
        else:
            mine.append(path)
    theirs = [path for paths in rest.values() for path in paths]
    order = {layer.path: i for i, layer in enumerate(b.manifest.layers)}
    theirs.sort(key=lambda path: order[path])
    open_pairs = [path for path in unlike if path in unsettled]
    unlike = {path: other for path, other in unlike.items() if path not in open_pairs}
    nameless = _nameless(a, b, mine, theirs)
    lines = list(_compared(a, b, unlike, *([], []) if nameless else (mine, theirs)))
    if not lines:
        raise_all(Refused, [*(unsettled[path] for path in open_pairs), *nameless])
    lines += [f"{printable(path)}: other elements, or the same in another order" for path in open_pairs]
    lines += [f"{problem.where}: {problem.found}" for problem in nameless]
    if not lines and in_order and list(left.values()) != list(right.values()):
        ways = (" ".join(map(printable, paths)) for paths in (left, right))
        lines.append(f"the same layers in another order of computation: {' and '.join(ways)}")
    return lines


def _nameless(a: Archive, b: Archive, mine: Sequence[str], theirs: Sequence[str]) -> list[Problem]:
    """Layers of unknown kind of which no name tells their partner, if all that has no partner may be equal."""
    sides = [
        [layer for layer in archive.manifest.layers if layer.path in paths]
        for archive, paths in ((a, mine), (b, theirs))
    ]
    counts = [sorted(math.prod(p.shape) for layer in side for p in _weights(layer).values()) for side in sides]
    if counts[0] != counts[1]:
        return []
    return [
        Problem(
            printable(layer.path),
            "a layer of unknown kind with no layer of that name on the other side",
            "to know what it is",
            f"export it with --kind '{layer.path}=KIND', and compare the archive",
        )
        for side in sides
        for layer in side
        if _kind(layer) == "unknown"
    ]


def _compared(a: Archive, b: Archive, unlike: Mapping[str, str], mine: list[str], theirs: list[str]) -> Iterator[str]:
    ours = {layer.path: layer for layer in a.manifest.layers}
    others = {layer.path: layer for layer in b.manifest.layers}
    pairs: list[tuple[str, str | None]] = list(unlike.items())
    for path in mine:
        partner = next((p for p in theirs if _alike(ours[path], others[p])), None)
        if partner is not None:
            theirs.remove(partner)
        pairs.append((path, partner))
    for path, partner in pairs:
        if partner is None:
            yield f"{printable(path)}: only in the first ({_kind(ours[path])})"
            continue
        name = printable(path) if path == partner else f"{printable(path)} / {printable(partner)}"
        if _kind(ours[path]) != _kind(others[partner]):
            yield f"{name}: {_kind(ours[path])} against {_kind(others[partner])}"
        yield from _parameters(a, b, name, ours[path], others[partner])
    for path in theirs:
        yield f"{printable(path)}: only in the second ({_kind(others[path])})"


def _alike(a: Layer, b: Layer) -> bool:
    shapes = [{role: parameter.shape for role, parameter in _weights(each).items()} for each in (a, b)]
    return _kind(a) == _kind(b) and shapes[0] == shapes[1]


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


# What two models compute.

_BATCH, _FEWEST = 16, 2
"""How many rows are run where the models leave it open: on few of them, what differs may hide behind a ReLU."""
_NUMBERS = 1 << 20
"""What an input may have before fewer rows are run: 16 of a large image take minutes and gigabytes."""
_ROWS = 2
"""How many numbers an integer input may hold if no table says it: a flag, or a bool, is the least that one can be."""

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Verification:
    """Whether two models compute the same: the largest difference of an output, and what was run on what."""

    same: bool
    max_difference: float
    lines: tuple[str, ...]


def compare(
    a: Runnable,
    b: Runnable,
    *,
    input_shape: Sequence[int] | None = None,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> Verification:
    """Run both models on one random input and compare what comes out.

    The input is made once, with channels first. A model that keeps channels last (Keras, TensorFlow) gets it transposed,
    and its output is transposed back: where the graph of one of the two says (batch, channel, ...), and, if neither has
    a graph, where a value has four axes or more. Sizes that neither model fixes are the first that all layers of a graph
    can take, and 16 rows (of large inputs fewer); `input_shape` (channels first, with the batch) goes before them. Inputs of models that name them alike
    belong together by name, else by order. Inputs that are looked up in tables are row numbers.

    Models that take other shapes, or give others, are different. So are models of whose outputs none is a finite number.
    Where no output of either model varies with the input by more than the tolerance, a line says how little that proves.
    """
    lines = [f"A: {a.where}", f"B: {b.where}"]
    inputs = _inputs(a, b, input_shape)
    if isinstance(inputs, str):
        return Verification(False, math.inf, (*lines, inputs))
    arrays = _random(inputs, np.random.default_rng(seed))
    lines += [f"input {printable(i.name)}: {_kind_of(i)} {i.shape}" for i in inputs]
    left, right = (_outputs(side, arrays, inputs, which) for which, side in enumerate((a, b)))
    if len(left) != len(right):
        return Verification(False, math.inf, (*lines, f"A gives {len(left)} outputs, B gives {len(right)}"))
    if not left:
        raise Refused(Problem(a.where, "no output", "one at least"))
    largest, telling = 0.0, False
    for i, (x, y) in enumerate(zip(*_channels_first(a, b, left, right), strict=True)):
        gap, varied = _gap(x, y), max(_variation(x), _variation(y)) > tolerance
        largest, telling = max(largest, gap), telling or varied
        if x.shape != y.shape:
            lines.append(f"output {i}: A gives {x.shape}, B gives {y.shape}")
        else:
            alike = "" if varied else " alike in every row"
            lines.append(f"output {i}: {x.shape}, values {_range(x)}{alike}, largest difference {gap:.3g}")
    if largest <= tolerance and not telling:
        lines.append(_NOTHING_TOLD)
    return Verification(largest <= tolerance, largest, tuple(lines))


@dataclass(frozen=True)
class _Input:
    """One input of both models: its shape with channels first, and which input of each model it is.

    `rows`: it holds whole numbers below this. `moved`: whether A and B have the channels of it last.
    """

    name: str
    shape: tuple[int, ...]
    rows: int | None
    places: tuple[int, int]
    moved: tuple[bool, bool]


def _inputs(a: Runnable, b: Runnable, given: Sequence[int] | None) -> list[_Input] | str:
    """The inputs that both models take, or why there are none."""
    ours, theirs = a.inputs, b.inputs
    if ours is None and theirs is None:
        if given is None:
            raise Refused(
                Problem(
                    a.where, "an input of unknown shape", "to know it", "name it with --input-shape, channels first"
                )
            )
        ours = theirs = (Port("input", (None,) * len(given), "float32"),)
    ours, theirs = ours or theirs or (), theirs or ours or ()
    if len(ours) != len(theirs):
        return f"A takes {len(ours)} inputs, B takes {len(theirs)}"
    if given is not None and len(ours) != 1:
        raise WrongUsage(
            Problem("--input-shape", "one shape", f"{len(ours)}, as many as there are inputs", "leave it out")
        )
    by_name = {port.name: i for i, port in enumerate(theirs)}
    named = by_name.keys() == {port.name for port in ours}
    pairs = [(i, by_name[port.name] if named else i) for i, port in enumerate(ours)]
    moved = [_moved(a, b, ours[i].axes, theirs[j].axes, len(ours[i].shape)) for i, j in pairs]
    merged: list[Shape] = []
    for (i, j), (left, right) in zip(pairs, moved, strict=True):
        x, y = _first(ours[i].shape, left), _first(theirs[j].shape, right)
        both = _merged(x, y)
        if both is None:
            return f"input {printable(ours[i].name)}: A takes {_shown(x)}, B takes {_shown(y)}"
        if given is not None:
            asked = _merged(both, tuple(given))
            if asked is None:
                raise Refused(Problem("--input-shape", f"{tuple(given)}", f"{_shown(both)}, which the models take"))
            both = asked
        merged.append(both)
    shapes = _fewer_rows(merged, _solved(a, b, merged, pairs, moved))
    found = []
    for (i, j), shape, both_moved in zip(pairs, shapes, moved, strict=True):
        rows = [n for n in (_rows(a, i), _rows(b, j)) if n is not None]
        whole = bool(rows) or any(port.dtype.startswith(("int", "uint", "bool")) for port in (ours[i], theirs[j]))
        limit = min(rows, default=_ROWS) if whole else None
        found.append(_Input(ours[i].name, shape, limit, (i, j), both_moved))
    return found


def _moved(
    a: Runnable, b: Runnable, ours: Sequence[str] | None, theirs: Sequence[str] | None, rank: int
) -> tuple[bool, bool]:
    """Whether A and B have the channel axis of a value last that is to have it first."""
    known = [axes for axes in (ours, theirs) if axes is not None]
    image = any(axes[1:2] == ("channel",) for axes in known) if known else rank >= 4
    image = image and rank >= 3
    return image and a.last, image and b.last


def _first(shape: Shape, moved: bool) -> Shape:
    return (shape[0], shape[-1], *shape[1:-1]) if moved else shape


def _last(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1])


def _whole(shape: Shape) -> tuple[int, ...]:
    return tuple(n for n in shape if n is not None)


def _merged(x: Shape, y: Shape) -> Shape | None:
    """What both say of a shape, or None if they contradict each other."""
    if len(x) != len(y) or any(m is not None and n is not None and m != n for m, n in zip(x, y, strict=True)):
        return None
    return tuple(n if m is None else m for m, n in zip(x, y, strict=True))


def _shown(shape: Shape) -> str:
    return f"({', '.join('?' if n is None else str(n) for n in shape)})"


def _solved(
    a: Runnable,
    b: Runnable,
    shapes: list[Shape],
    pairs: list[tuple[int, int]],
    moved: list[tuple[bool, bool]],
) -> list[tuple[int, ...]]:
    """The shapes without unknown sizes."""
    shapes = [(_BATCH if shape[0] is None else shape[0], *shape[1:]) if shape else shape for shape in shapes]
    if all(None not in shape for shape in shapes):
        return [_whole(shape) for shape in shapes]
    first: Refused | None = None
    for which, side in enumerate((a, b)):
        names = _graph_names(side)
        if names is None or side.manifest is None or side.manifest.graph is None:
            continue
        graph = side.manifest.graph
        mine = [names[pair[which]] for pair in pairs]
        # A graph that has the channels of a moved value last has it as the framework does.
        turned = [
            m[which] and graph.values[name].axes[1:2] != ("channel",) for name, m in zip(mine, moved, strict=True)
        ]
        told = {name: _last(shape) if t else shape for name, shape, t in zip(mine, shapes, turned, strict=True)}
        try:
            found = solve_inputs(_told(side.manifest, graph, told))
        except Refused as error:
            first = first or error
            continue
        return [_whole(_first(found[name], t)) for name, t in zip(mine, turned, strict=True)]
    for which, side in enumerate((a, b)):
        made = _of_example(side, which, shapes, pairs, moved) if first is None else None
        if made is not None:
            return made
    unknown = ", ".join(_shown(shape) for shape in shapes)
    do = "name it with --input-shape, channels first" if len(shapes) == 1 else "pass models that say their input sizes"
    raise first or Refused(Problem(a.where, f"an input {unknown} of which no graph tells the sizes", "all sizes", do))


def _fewer_rows(known: Sequence[Shape], shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Large inputs with as many rows as are run in a reasonable time, if no model fixes how many."""
    free = [bool(shape) and shape[0] is None for shape in known]
    row = max((math.prod(shape[1:]) for shape, is_free in zip(shapes, free, strict=True) if is_free), default=1)
    rows = max(_FEWEST, min(_BATCH, _NUMBERS // max(row, 1)))
    return [(rows, *shape[1:]) if is_free else shape for shape, is_free in zip(shapes, free, strict=True)]


def _of_example(
    side: Runnable, which: int, shapes: list[Shape], pairs: list[tuple[int, int]], moved: list[tuple[bool, bool]]
) -> list[tuple[int, ...]] | None:
    """The shapes with the sizes of the inputs that a program was made with; None if it has none that fit."""
    if side.example is None:
        return None
    examples = [_first(side.example[pair[which]], m[which]) for pair, m in zip(pairs, moved, strict=True)]
    found = [_merged(x, (x[0], *shape[1:])) for x, shape in zip(shapes, examples, strict=True)]
    return None if None in found else [_whole(shape) for shape in found if shape is not None]


def _told(manifest: Manifest, graph: Graph, shapes: Mapping[str, Shape]) -> Manifest:
    """The manifest with these input shapes, in the order of the graph's own axes."""
    values = dict(graph.values)
    for name, shape in shapes.items():
        if len(values[name].axes) != len(shape):
            raise Refused(Problem(name, f"an input {_shown(shape)}", f"the axes {', '.join(values[name].axes)}"))
        values[name] = values[name].model_copy(update={"shape": shape})
    return manifest.model_copy(update={"graph": graph.model_copy(update={"values": values})})


def _graph_names(side: Runnable) -> tuple[str, ...] | None:
    """The graph's inputs in the order of the model's own."""
    if side.manifest is None or side.manifest.graph is None:
        return None
    listed = side.manifest.graph.inputs
    if side.inputs is None or len(side.inputs) != len(listed):
        return None
    own = tuple(port.name for port in side.inputs)
    return own if set(own) == set(listed) else listed


def _rows(side: Runnable, index: int) -> int | None:
    """How many rows the tables have in which an input is looked up; None if it is not, or nobody knows."""
    names = _graph_names(side)
    if names is not None and side.manifest is not None:
        return token_limits(side.manifest).get(names[index])
    if side.manifest is None or side.inputs is None:
        return None
    # Keras declares the input of an Embedding as float unless it is told otherwise.
    if len(side.inputs) > 1 and not side.inputs[index].dtype.startswith(("int", "uint")):
        return None
    tables = [layer.parameters["embedding"] for layer in side.manifest.layers if layer.kind == "embedding"]
    return min((table.shape[0] for table in tables), default=None)


def _kind_of(given: _Input) -> str:
    return "normal float32" if given.rows is None else f"int64 below {given.rows}"


def _random(inputs: Sequence[_Input], random: np.random.Generator) -> list[Array]:
    return [
        random.standard_normal(i.shape).astype(np.float32)
        if i.rows is None
        else random.integers(0, max(i.rows, 1), i.shape, np.int64)
        for i in inputs
    ]


def _outputs(side: Runnable, arrays: Sequence[Array], inputs: Sequence[_Input], which: int) -> list[Array]:
    """What one of the models makes of the arrays, in its own order of axes."""
    given = {
        i.places[which]: np.ascontiguousarray(np.moveaxis(x, 1, -1)) if i.moved[which] else x
        for i, x in zip(inputs, arrays, strict=True)
    }
    with framework_errors(side.where, f"running it on {', '.join(str(x.shape) for x in given.values())}"):
        return side.run([given[place] for place in sorted(given)])


def _channels_first(a: Runnable, b: Runnable, left: list[Array], right: list[Array]) -> tuple[list[Array], list[Array]]:
    x, y = [], []
    for i, (ours, theirs) in enumerate(zip(left, right, strict=True)):
        moved = _moved(a, b, _axes_of(a, i), _axes_of(b, i), max(ours.ndim, theirs.ndim))
        x.append(np.moveaxis(ours, -1, 1) if moved[0] and ours.ndim > 2 else ours)
        y.append(np.moveaxis(theirs, -1, 1) if moved[1] and theirs.ndim > 2 else theirs)
    return x, y


def _axes_of(side: Runnable, output: int) -> Sequence[str] | None:
    return side.outputs[output] if side.outputs is not None and output < len(side.outputs) else None


def _gap(x: Array, y: Array) -> float:
    """The largest difference; infinite for other shapes, and where not both are the same number that is not finite."""
    if x.shape != y.shape:
        return math.inf
    wide = np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64
    x, y = x.astype(wide), y.astype(wide)
    finite = np.isfinite(x) & np.isfinite(y)
    alike = np.isnan(x) & np.isnan(y) | (x == y)
    if (x.size and not finite.any()) or not (finite | alike).all():
        return math.inf
    return float(np.abs(x[finite] - y[finite]).max(initial=0.0))


_NOTHING_TOLD = (
    "warning: no output varies with the input (dead or saturated units?), so that this tells little of the weights; "
    "try another --seed or --input-shape, and compare the weights with `neutral diff`"
)


def _variation(x: Array) -> float:
    """How far the rows of an output are from the first of them; of a single row, how far it is from zero."""
    wide = x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
    with np.errstate(all="ignore"):
        away = np.abs(wide - wide[:1] if x.ndim and len(x) > 1 else wide)
    return float(away[~np.isnan(away)].max(initial=0.0))


def _range(x: Array) -> str:
    if not x.size or x.dtype.kind == "c":
        return "none" if not x.size else "complex"
    return f"{np.min(x):.3g} to {np.max(x):.3g}"
