"""Operators that move elements, as Keras layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from neutral.conventions.keras_onnx import known_product
from neutral.errors import an
from neutral.importers.keras_activations import number
from neutral.importers.keras_builder import Builder
from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_tensor import Config, KerasTensor, as_in_graph, channels_last
from neutral.schema.graph import Node


def transpose(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.only(node)
    order = node.attributes.get("perm")
    if not isinstance(order, tuple) or sorted(int(str(n)) for n in order) != list(range(x.rank)):
        raise Inexpressible(f"perm {order!r}", f"an order of {x.rank} axes")
    axes = [int(str(n)) for n in order]
    x = b.vector(x, 0)
    return [replace(x, shape=b.shape(node.outputs[0]), perm=tuple(axes.index(axis) for axis in x.perm))]


def flatten(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.only(node)
    if x.rank == 2:
        return [x]
    if int(number(node, "axis", 1)) != 1:
        raise Inexpressible(f"a Flatten from axis {node.attributes.get('axis')}", "axis 1")
    wanted, size = b.flattened(node.outputs[0])
    channels, positions = x.shape[1], known_product(x.shape[2:])
    size = known_product(x.shape[1:]) or size
    if positions is None and size is not None and channels:
        positions = size // channels
    trivial = 1 in (channels, positions)
    if x.perm != as_in_graph(x.rank):
        x = b.image(x) if wanted or trivial else b.order(x, as_in_graph(x.rank))
    order = wanted if x.perm == channels_last(x.rank) and not trivial else 0
    if order and order != channels:
        raise Inexpressible(f"a kernel recorded for {order} channels", f"one for {channels}")
    like = KerasTensor(("", 0, 0), (x.shape[0], size), (0, 1), x.dtype, order, x.nonnegative)
    if b.open or known_product(x.shape[1:]) is None:
        if size is None:
            raise Inexpressible(
                "a Flatten of unknown size", "a dense layer behind it that tells", "import into a template"
            )
        config = {"target_shape": [size]}
        return [b.add(b.name(node), "Reshape", config, [x.json], like)]
    return [b.add(b.name(node), "Flatten", {}, [x.json], like)]


def reshape(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.only(node)
    target = node.attributes.get("shape")
    if not isinstance(target, tuple) or not all(isinstance(n, int) for n in target):
        raise Inexpressible(f"shape {target!r}", "a list of sizes")
    sizes = [int(str(n)) for n in target]
    if len(sizes) == 1 and x.rank > 2:
        return flatten(b, node.model_copy(update={"attributes": {"axis": 1}}))
    sizes = [x.shape[i + 1] if n == 0 and i + 1 < x.rank else n for i, n in enumerate(sizes)]  # type: ignore[misc]
    if any(n is None for n in sizes) or sizes.count(-1) > 1:
        raise Inexpressible(f"shape {target!r} of sizes that are not known", "at most one unknown size")
    rank, image = len(sizes) + 1, "channel" in b.graph.values[node.outputs[0]].axes
    if x.rank == 2 and x.channels and rank > 2 and sizes[0] == x.channels:
        config = {"target_shape": [*sizes[1:], sizes[0]]}
        like = replace(b.like(node, channels_last(rank), x), told=sizes[0] != -1)
        return [b.add(b.name(node), "Reshape", config, [x.json], like)]
    if x.perm == channels_last(x.rank) and x.rank > 3 and rank == 3 and image and sizes[0] == x.shape[1]:
        config = {"target_shape": [sizes[1], sizes[0]]}
        like = replace(b.like(node, channels_last(rank), x), told=sizes[0] != -1)
        return [b.add(b.name(node), "Reshape", config, [x.json], like)]
    x = b.plain(x)
    like = replace(b.like(node, as_in_graph(rank), x), nonnegative=x.nonnegative, told=sizes[-1] != -1)
    return [b.add(b.name(node), "Reshape", {"target_shape": sizes}, [x.json], like)]


def unsqueeze(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.plain(b.only(node))
    users = b.used.get(node.outputs[0], [])
    if node.attributes.get("axes") != (1,) or x.rank != 2 or [u.op for u in users] != ["Expand"]:
        raise Inexpressible("an Unsqueeze", "one that an Expand repeats")
    expand = users[0]
    shape = expand.attributes.get("shape")
    if not isinstance(shape, tuple) or len(shape) != 3 or (shape[0], shape[2]) != (1, 1):
        raise Inexpressible(f"an Expand to {shape!r}", "one along the time axis")
    like = replace(b.like(expand, (0, 1, 2), x), nonnegative=x.nonnegative)
    made = b.add(b.name(expand), "RepeatVector", {"n": int(str(shape[1]))}, [x.json], like)
    b.tensors[expand.outputs[0]] = made
    b.skipped.add(expand.name)
    return []


def _spaced(b: Builder, node: Node, axes: set[int]) -> KerasTensor:
    """The input with the named axes between the first and the last."""
    x = b.only(node)
    if not 3 <= x.rank <= 5 or 0 in axes:
        raise Inexpressible(f"{an(node.op)} along axes {sorted(axes)} of {x.rank}", "spatial axes")
    if axes & {x.perm[0], x.perm[-1]}:
        x = b.order(x, channels_last(x.rank) if 1 not in axes else as_in_graph(x.rank))
    if axes & {x.perm[0], x.perm[-1]}:
        raise Inexpressible(f"{an(node.op)} along axes {sorted(axes)}", "spatial axes alone")
    return x


def pad(b: Builder, node: Node) -> list[KerasTensor]:
    pads = node.attributes.get("pads")
    x = b.only(node)
    if node.attributes.get("mode", "constant") != "constant" or number(node, "value", 0.0) != 0.0:
        raise Inexpressible(f"padding of mode {node.attributes.get('mode')}", "padding with zeros")
    if not isinstance(pads, tuple) or len(pads) != 2 * x.rank:
        raise Inexpressible(f"pads {pads!r}", f"{2 * x.rank} numbers")
    sizes = [int(str(n)) for n in pads]
    pairs = dict(enumerate(zip(sizes[: x.rank], sizes[x.rank :], strict=True)))
    x = _spaced(b, node, {axis for axis, pair in pairs.items() if any(pair)})
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    wanted = [pairs[axis] for axis in x.perm[1:-1]]
    grown = [(max(p, 0), max(q, 0)) for p, q in wanted]
    cut = [(max(-p, 0), max(-q, 0)) for p, q in wanted]
    if any(n for pair in cut for n in pair):
        x = bordered(b, f"{b.name(node)}.crop", "Cropping", cut, x, like)
    return [bordered(b, b.name(node), "ZeroPadding", grown, x, like)]


def bordered(
    b: Builder, name: str, cls: str, pairs: Sequence[tuple[int, int]], x: KerasTensor, like: KerasTensor
) -> KerasTensor:
    key = "padding" if cls == "ZeroPadding" else "cropping"
    value: Any = list(pairs[0]) if len(pairs) == 1 else [list(pair) for pair in pairs]
    return b.add(name, f"{cls}{len(pairs)}D", {key: value}, [x.json], like)


def crop(b: Builder, node: Node) -> list[KerasTensor]:
    lists = [node.attributes.get(key) for key in ("axes", "starts", "ends")]
    if node.attributes.get("steps") not in (None, (1,) * len(lists[0] or ())) or not all(  # type: ignore[arg-type]
        isinstance(values, tuple) and len(values) == len(lists[0] or ())  # type: ignore[arg-type]
        for values in lists
    ):
        raise Inexpressible("a Slice with steps", "one that crops")
    rank = b.only(node).rank
    axes, starts, ends = ([int(str(n)) for n in values or ()] for values in lists)  # type: ignore[union-attr]
    crops: dict[int, tuple[int, int]] = {}
    for axis, start, end in zip(axes, starts, ends, strict=True):
        size = b.shape(node.inputs[0])[axis % rank]
        if (start < 0 or 0 < end < 2**31 - 1) and size is None:
            raise Inexpressible("a Slice of an axis of unknown size", "borders to crop")
        begin = start + (size or 0) if start < 0 else start
        crops[axis % rank] = begin, -end if end < 0 else max((size or end) - end, 0)
    x = _spaced(b, node, {axis for axis, pair in crops.items() if any(pair)})
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    pairs = [crops.get(axis, (0, 0)) for axis in x.perm[1:-1]]
    return [bordered(b, b.name(node), "Cropping", pairs, x, like)]


def resize(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.image(b.only(node))
    mode, coordinates = node.attributes.get("mode"), node.attributes.get("coordinate_transformation_mode")
    scales, sizes = node.attributes.get("scales"), node.attributes.get("sizes")
    space = x.rank - 2
    if isinstance(sizes, tuple):
        made = [int(str(n)) for n in sizes[-space:]]
        known = [n for n in x.shape[2:] if n]
        factors = [float(m) / n for m, n in zip(made, known, strict=False)] if len(known) == space else []
    else:
        factors = [float(str(f)) for f in scales[-space:]] if isinstance(scales, tuple) else []
    whole = bool(factors) and all(f == int(f) and f >= 1 for f in factors)
    linear = mode == "linear" and coordinates == "half_pixel"
    if not whole or not (
        (mode == "nearest" and coordinates in ("asymmetric", "half_pixel")) or (linear and space == 2)
    ):
        raise Inexpressible(
            f"a Resize ({mode}, {coordinates}) by {factors or scales}", "whole factors, nearest or bilinear"
        )
    if mode == "nearest" and coordinates == "asymmetric" and node.attributes.get("nearest_mode", "floor") != "floor":
        raise Inexpressible(f"nearest_mode {node.attributes.get('nearest_mode')!r}", "floor")
    config: Config = {"size": int(factors[0]) if space == 1 else [int(f) for f in factors]}
    if space == 2:
        config["interpolation"] = "bilinear" if linear else "nearest"
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    return [b.add(b.name(node), f"UpSampling{space}D", config, [x.json], like)]
