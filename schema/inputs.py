"""Inputs that fit a graph: their shapes, found by trial where they are not known, and random numbers of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from neutral.errors import Problem, Refused
from neutral.schema.graph import Graph, Value
from neutral.schema.layer_sizes import kernel
from neutral.schema.manifest import Manifest
from neutral.schema.node_settings import Shape
from neutral.schema.shapes import infer

_SMALLEST = 8
"""Where the search for an unknown size starts: an image smaller than this is nothing but border."""
_ROOMY = 64
"""Where it starts for a program: torch fixes a size of which a layer leaves one position."""
_LARGEST = 512
_LARGEST_PAIR = 48


def solve_inputs(manifest: Manifest, batch: int = 2, *, roomy: bool = False) -> dict[str, Shape]:
    """A shape for each input of the graph: its own sizes where known, else the first that fit all layers.

    All unknown sizes are tried as one number first (square images), then each on its own, the most alike first. `roomy`
    ones are larger where they may be: no axis of a layer then comes down to one position.
    """
    graph = _graph(manifest)
    known = {name: _known(graph.values[name], batch) for name in graph.inputs}
    holes = _holes(known)
    first: Refused | None = None
    for filling in _fillings(holes, _ROOMY if roomy and holes <= 2 else _SMALLEST):
        shapes = _filled(known, filling)
        error = _misfit(manifest, graph, shapes)
        if error is None:
            return shapes
        first = first or error
    assert first is not None
    if not holes:
        raise first
    reason = f"no size up to {_LARGEST} that all layers can take (with {_SMALLEST}: {first})"
    raise Refused(Problem(", ".join(graph.inputs), reason, "an input that fits", "name the input's shape"))


def other_inputs(manifest: Manifest, shapes: Mapping[str, Shape], batch: int = 2) -> dict[str, Shape] | None:
    """Shapes that fit all layers as well as these do, or None if no others do."""
    graph = _graph(manifest)
    known = {name: _known(graph.values[name], batch) for name in graph.inputs}
    others = (_filled(known, filling) for filling in _fillings(_holes(known)))
    return next((found for found in others if found != shapes and _misfit(manifest, graph, found) is None), None)


def _misfit(manifest: Manifest, graph: Graph, shapes: Mapping[str, Shape]) -> Refused | None:
    """Why the graph cannot take inputs of these shapes."""
    try:
        made = infer(graph, {layer.path: layer for layer in manifest.layers}, shapes)
    except Refused as error:
        return error
    given = {name: graph.values[name].shape for name in graph.inputs}
    if all(shape is not None and None not in shape[1:] for shape in given.values()):
        return None
    for name, value in graph.values.items():
        # A graph may know a size that no layer tells: that of each axis of a norm over several.
        told, found = (value.shape or ())[1:], made.get(name, ())[1:]
        if any(n not in (None, m) for n, m in zip(told, found, strict=False)):
            return Refused(Problem(name, f"{made[name]}", f"{value.shape}, as the graph has it"))
    return None


def _holes(known: Mapping[str, Sequence[int | None]]) -> int:
    return sum(n is None for shape in known.values() for n in shape)


def _graph(manifest: Manifest) -> Graph:
    if manifest.graph is None:
        raise Refused(Problem("manifest", "no graph", "to know how the layers are wired"))
    return manifest.graph


def _known(value: Value, batch: int) -> tuple[int | None, ...]:
    shape = value.shape if value.shape is not None else (None,) * len(value.axes)
    return tuple(batch if i == 0 and n is None else n for i, n in enumerate(shape))


def _fillings(holes: int, smallest: int = _SMALLEST) -> Iterator[tuple[int, ...]]:
    if holes == 0:
        yield ()
        return
    sizes = [*range(smallest, _LARGEST + 1), *range(1, smallest)]
    for n in sizes:
        yield (n,) * holes
    if 2 <= holes <= 3:
        pair = range(1, _LARGEST_PAIR + 1) if holes == 2 else range(1, 17)
        unlike = (filling for filling in product(pair, repeat=holes) if len(set(filling)) > 1)
        yield from sorted(unlike, key=lambda filling: max(filling) / min(filling))


def _filled(known: Mapping[str, tuple[int | None, ...]], filling: Sequence[int]) -> dict[str, Shape]:
    rest = iter(filling)
    return {name: tuple(next(rest) if n is None else n for n in shape) for name, shape in known.items()}


def token_limits(manifest: Manifest) -> dict[str, int]:
    """For each input that is looked up in tables: how many rows the smallest of them has."""
    graph = _graph(manifest)
    layers = {layer.path: layer for layer in manifest.layers}
    origin = {name: name for name in graph.inputs}
    limits: dict[str, int] = {}
    for node in graph.nodes:
        source = origin.get(node.inputs[0]) if node.inputs else None
        if source is None:
            continue
        if node.op == "Gather" and node.layer in layers:
            rows = kernel(layers[node.layer]).shape[0]
            limits[source] = min(rows, limits.get(source, rows))
        elif node.op in ("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice"):
            origin.update((name, source) for name in node.outputs)
    return limits


def example_inputs(manifest: Manifest, batch: int = 2, seed: int = 0, *, roomy: bool = False) -> list[npt.NDArray[Any]]:
    """Random inputs that the graph can take, in the order of its inputs: equal for equal seeds."""
    graph = _graph(manifest)
    shapes, limits = solve_inputs(manifest, batch, roomy=roomy), token_limits(manifest)
    random = np.random.default_rng(seed)
    out: list[npt.NDArray[Any]] = []
    for name in graph.inputs:
        dtype = graph.values[name].dtype
        if name in limits:
            whole = np.dtype(dtype) if dtype.startswith(("int", "uint")) else np.dtype(np.int64)
            out.append(random.integers(0, max(limits[name], 1), shapes[name]).astype(whole))
        elif dtype.startswith(("int", "uint")):
            out.append(random.integers(0, 2, shapes[name]).astype(dtype))
        else:
            out.append(random.standard_normal(shapes[name]).astype(dtype if dtype == "float64" else np.float32))
    return out
