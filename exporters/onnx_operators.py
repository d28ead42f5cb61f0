"""The nodes of the graph that stand for each operator of an ONNX model without weights: mostly the one of the same name.

>>> {"Relu", "MaxPool", "Reshape"} <= OPERATORS.keys()
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neutral.containers.onnx_constants import forward
from neutral.exporters.onnx_flow import Builder, Flow, Inexpressible, Lifted, Sizes, dtype_name
from neutral.schema.graph import Attribute

Rule = Callable[[Builder], None]


def _same(*named: tuple[str, Any]) -> Rule:
    """An operator on each element, with these attributes and their defaults."""

    def rule(b: Builder) -> None:
        x = b.flow(b.value_of(0))
        given = {name: b.attribute(name, default) for name, default in named}
        y = b.make(b.node.op_type, [x], x.sizes, given, order=x.order)
        b.holds(x, y)

    return rule


def _float(name: str, default: float) -> tuple[str, float]:
    return name, default


def _passed(b: Builder) -> None:
    """What does nothing when a model is used: the value itself."""
    b.flows[b.node.outputs[0]] = b.flows[b.value_of(0)]


def _dropout(b: Builder) -> None:
    x = b.flow(b.value_of(0))
    ratio = b.scalar(b.value_of(1)) if b.value_of(1) else b.attribute("ratio", 0.5)
    settings: dict[str, Attribute] = {"origin": "Dropout", "rate": float(0.5 if ratio is None else ratio)}
    b.holds(x, b.make("Identity", [x], x.sizes, settings, order=x.order))


def _softmax(b: Builder) -> None:
    x = b.take(b.value_of(0))
    axis = int(b.attribute("axis", -1 if b.scope.opset >= 13 else 1)) % x.rank
    if b.scope.opset < 13 and axis != x.rank - 1:
        raise Inexpressible(f"a {b.node.op_type} over several axes as one, as before opset 13")
    if axis == 0:
        raise Inexpressible(f"a {b.node.op_type} over the batch axis")
    b.alike(x, b.make(b.node.op_type, [x], x.sizes, {"axis": axis}))


def _clip(b: Builder) -> None:
    x = b.flow(b.value_of(0))
    bounds: dict[str, Attribute] = {}
    for place, name in ((1, "min"), (2, "max")):
        if b.value_of(place):
            bounds[name] = b.scalar(b.value_of(place))
            if bounds[name] is None:
                raise Inexpressible("a Clip whose bounds are computed")
        elif isinstance(b.attribute(name), float):
            bounds[name] = b.attribute(name)
    b.holds(x, b.make("Clip", [x], x.sizes, bounds, order=x.order))


def _cast(b: Builder) -> None:
    x = b.flow(b.value_of(0))
    to = dtype_name(int(b.attribute("to", 0)))
    if to == x.dtype:
        _passed(b)
        return
    b.holds(x, b.make("Cast", [x], x.sizes, {"to": to}, order=x.order, dtype=to))


def _cast_like(b: Builder) -> None:
    if b.flow(b.value_of(0)).dtype != b.flow(b.value_of(1)).dtype:
        raise Inexpressible("a cast to the dtype of another value")
    _passed(b)


def _broadcast(shapes: Sequence[Sizes]) -> Sizes:
    rank = max(len(shape) for shape in shapes)
    made: list[int | None] = []
    for sizes in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        wide = [n for n in sizes if n != 1]
        known = {n for n in wide if n is not None}
        if len(known) > 1:
            raise Inexpressible(f"values of sizes {' and '.join(map(str, shapes))} that do not fit each other")
        made.append(1 if not wide else next(iter(known), None))
    return tuple(made)


_FOLDED = ("Add", "Mul", "Max", "Min")
"""Operators of any number of values that two at a time compute as well."""


def _joining(b: Builder) -> None:
    """Arithmetic on values, or on a value and a number."""
    node = b.node
    numbers = {name: b.scalar(name) for name in node.inputs if b.is_stored(name)}
    if any(number is None for number in numbers.values()):
        raise Inexpressible(f"a {node.op_type} with a stored tensor of several elements that is no layer's")
    flows = {name: b.flow(name) for name in node.inputs if name not in numbers}
    orders = {(flow.order, flow.channels) for flow in flows.values()}
    if len(orders) > 1 or len({flow.rank for flow in flows.values()}) > 1:
        flows = {name: b.plain(flow) for name, flow in flows.items()}
    first = next(iter(flows.values()))
    if any(len(b.scope.shape_of(name) or ()) > max(flow.rank for flow in flows.values()) for name in numbers):
        raise Inexpressible(f"a {node.op_type} that adds axes")
    sizes = _broadcast([flow.sizes for flow in flows.values()])
    values = [
        flows[name]
        if name in flows
        else Flow(b.constant(float(numbers[name] or 0.0), first.dtype), (), first.dtype, ())
        for name in node.inputs
    ]
    if len(values) == 1:
        _passed(b)
        return
    longest = max(flows.values(), key=lambda flow: flow.rank)
    y = b.make(node.op_type, values, sizes, order=longest.order, dtype=first.dtype)
    same = [flow for flow in flows.values() if flow.rank == y.rank]
    b.alike(*same, y)
    if first.channels:
        b.flows[node.outputs[0]] = Flow(y.value, y.sizes, y.dtype, y.order, first.channels)


def windows(n: int | None, k: int, s: int, before: int, after: int, d: int = 1, ceil: bool = False) -> int | None:
    """How many windows an axis of n elements has."""
    if n is None:
        return None
    span = n + before + after - d * (k - 1) - 1
    if span < 0:
        raise Inexpressible(f"a window of {d * (k - 1) + 1} on {n} elements")
    made = -(-span // s) + 1 if ceil else span // s + 1
    return made - (ceil and (made - 1) * s >= n + before)


def _per_axis(b: Builder, name: str, rank: int, default: int) -> tuple[int, ...]:
    value = b.attribute(name)
    if value is None:
        return (default,) * rank
    if not isinstance(value, tuple) or len(value) != rank:
        raise Inexpressible(f"{name} {value} for {rank} axes")
    return value


def _spatial(b: Builder) -> Flow:
    x = b.take(b.value_of(0))
    if x.rank not in (3, 4, 5):
        raise Inexpressible(f"a {b.node.op_type} of a value of {x.rank} axes")
    b.image(x)
    return x


def _pool(b: Builder) -> None:
    if len([name for name in b.node.outputs if name]) > 1:
        raise Inexpressible("a pooling that gives indices")
    x = _spatial(b)
    space = x.rank - 2
    k, s, d = (_per_axis(b, name, space, 1) for name in ("kernel_shape", "strides", "dilations"))
    auto = b.attribute("auto_pad", "NOTSET")
    ceil = bool(b.attribute("ceil_mode", 0))
    settings: dict[str, Attribute] = {"kernel_shape": k, "strides": s, "ceil_mode": int(ceil)}
    if b.node.op_type == "MaxPool":
        settings["dilations"] = d
    else:
        settings["count_include_pad"] = int(b.attribute("count_include_pad", 0))
        if any(n != 1 for n in d):
            raise Inexpressible("an average over every second position")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        if any(n != 1 for n in d):
            raise Inexpressible("automatic padding of dilated windows")
        settings["auto_pad"] = auto
        made = [None if n is None else -(-n // s[i]) for i, n in enumerate(x.sizes[2:])]
    else:
        pads = (0,) * (2 * space) if auto == "VALID" else _per_axis(b, "pads", 2 * space, 0)
        settings["pads"] = pads
        made = [windows(n, k[i], s[i], pads[i], pads[i + space], d[i], ceil) for i, n in enumerate(x.sizes[2:])]
    b.image(b.make(b.node.op_type, [x], (*x.sizes[:2], *made), settings))


def _global_pool(b: Builder) -> None:
    x = _spatial(b)
    b.image(b.make(b.node.op_type, [x], (*x.sizes[:2], *(1 for _ in x.sizes[2:]))))


def _product(sizes: Sequence[int | None]) -> int | None:
    return None if any(n is None for n in sizes) else math.prod(n for n in sizes if n is not None)


def _flatten(b: Builder) -> None:
    x = b.flow(b.value_of(0))
    axis = int(b.attribute("axis", 1))
    if axis % max(x.rank, 1) != 1:
        raise Inexpressible(f"a Flatten in front of axis {axis}")
    _to_vector(b)


def _to_vector(b: Builder) -> None:
    """All axes but the batch as one; an image whose channels are last keeps its own order in the graph."""
    x = b.flow(b.value_of(0))
    last = (0, *range(2, x.rank), 1)
    if x.rank > 2 and x.order == last and x.sizes[-1] is not None:
        sizes = (x.sizes[0], _product(x.sizes[1:]))
        y = b.make("Flatten", [x], sizes, {"axis": 1})
        channels = 0 if 1 in (x.sizes[-1], _product(x.sizes[1:-1])) else x.sizes[-1]
        b.flows[b.node.outputs[0]] = Flow(y.value, y.sizes, y.dtype, y.order, channels or 0)
        return
    if x.rank == 2 and x.channels:
        _passed(b)
        return
    x = b.plain(x)
    b.make("Flatten", [x], (x.sizes[0], _product(x.sizes[1:])), {"axis": 1})


def _reshape(b: Builder) -> None:
    target = b.numbers(1, "shape")
    if target is None:
        raise Inexpressible("a Reshape to a shape that is computed")
    x = b.flow(b.value_of(0))
    if 0 in target and b.attribute("allowzero", 0):
        raise Inexpressible("a Reshape to an empty shape")
    rest = _kept_batch(x.sizes, target)
    if len(rest) == 1 and x.rank >= 2:
        _to_vector(b)
        return
    sizes = _reshaped(x.sizes, rest)
    if x.channels and x.channels == rest[-1] and len(rest) > 2 and -1 not in rest[-1:]:
        # (position channel) as space and channels again: in the graph the channels stay in front.
        order = (0, *range(2, len(sizes)), 1)
        shape = (rest[-1], *rest[:-1])
        y = b.make("Reshape", [x], sizes, {"shape": shape}, order=order)
        b.image(y)
        return
    x = b.plain(x)
    b.make("Reshape", [x], sizes, {"shape": rest})


def _kept_batch(given: Sizes, target: Sequence[int | None]) -> tuple[int, ...]:
    """What a Reshape makes of all axes but the first, which it must keep: as in the graph, 0 keeps a size, -1 is the rest."""
    if not target or not given:
        raise Inexpressible("a Reshape of all axes")
    first, rest = target[0], list(target[1:])
    # A size that is looked up in a value is one number that nobody knows; two of them could be anything.
    if rest.count(None) > 1 or (None in rest and -1 in rest):
        raise Inexpressible("a Reshape to a shape that is computed")
    known = [-1 if n is None else n for n in rest]
    full = [given[i + 1] if n == 0 and i + 1 < len(given) else n for i, n in enumerate(known)]
    have, want = _product(given[1:]), None if -1 in full else _product(full)
    same = have is not None and want == have
    if first == 0 or (first is not None and first > 0 and first == given[0]):
        kept = True
    elif first == -1 or first is None:
        # The rest of the elements is the batch exactly if all others are accounted for.
        kept = same or (first is None and -1 in known)
    else:
        kept = False
    if not kept:
        raise Inexpressible(f"a Reshape to {tuple(target)} that does not keep the first axis")
    return tuple(known)


def _reshaped(given: Sizes, rest: Sequence[int]) -> Sizes:
    full: list[int | None] = [given[i + 1] if n == 0 and i + 1 < len(given) else n for i, n in enumerate(rest)]
    if -1 in full:
        place = full.index(-1)
        have, others = _product(given[1:]), _product([n for n in full if n != -1])
        full[place] = None if have is None or not others else have // others
    return (given[0], *full)


def _transpose(b: Builder) -> None:
    x = b.flow(b.value_of(0))
    if x.channels:
        x = b.plain(x)
    perm = b.attribute("perm") or tuple(reversed(range(x.rank)))
    if not isinstance(perm, tuple) or sorted(perm) != list(range(x.rank)):
        raise Inexpressible(f"a Transpose of {x.rank} axes to {perm}")
    b.flows[b.node.outputs[0]] = b.turned_to(x, perm)


def _axes(b: Builder, rank: int, place: int = 1) -> tuple[int, ...] | None:
    found = b.known(place, "axes", "axes")
    return None if found is None else tuple(sorted(axis % rank for axis in found))


def _squeeze(b: Builder) -> None:
    x = b.take(b.value_of(0))
    axes = _axes(b, x.rank)
    if axes is None:
        if None in x.sizes:
            raise Inexpressible("a Squeeze of sizes that are not known")
        axes = tuple(i for i, n in enumerate(x.sizes) if n == 1)
    if 0 in axes:
        raise Inexpressible("a Squeeze of the first axis")
    _squeezed(b, x, axes)


def _squeezed(b: Builder, x: Flow, axes: Sequence[int]) -> None:
    """A Squeeze; a Flatten where it leaves one axis, for frameworks that have no Squeeze."""
    sizes = tuple(n for i, n in enumerate(x.sizes) if i not in axes)
    if len(sizes) == 2 and all(x.sizes[axis] == 1 for axis in axes):
        b.make("Flatten", [x], sizes, {"axis": 1})
    else:
        b.make("Squeeze", [x], sizes, {"axes": tuple(axes)})


def _unsqueeze(b: Builder) -> None:
    x = b.take(b.value_of(0))
    found = b.known(1, "axes", "axes") or ()
    rank = x.rank + len(found)
    axes = tuple(sorted(axis % rank for axis in found))
    if axes == (0,):
        b.flows[b.node.outputs[0]] = Lifted((x,))
        return
    if 0 in axes:
        raise Inexpressible("an Unsqueeze in front of the first axis")
    rest = iter(x.sizes)
    b.make("Unsqueeze", [x], tuple(1 if i in axes else next(rest, None) for i in range(rank)), {"axes": axes})


def _concat(b: Builder) -> None:
    flows = [b.take(name) for name in b.node.inputs]
    axis = int(b.attribute("axis", 1)) % flows[0].rank
    if axis == 0:
        raise Inexpressible("a Concat of the first axis")
    if len({flow.rank for flow in flows}) > 1:
        raise Inexpressible("a Concat of values of different ranks")
    around = _broadcast([(*flow.sizes[:axis], 1, *flow.sizes[axis + 1 :]) for flow in flows])
    total = [flow.sizes[axis] for flow in flows]
    made = None if any(n is None for n in total) else sum(n for n in total if n is not None)
    y = b.make("Concat", flows, (*around[:axis], made, *around[axis + 1 :]), {"axis": axis})
    b.alike(*flows, y)


_END = (1 << 31) - 1


def _slice(b: Builder) -> None:
    x = b.take(b.value_of(0))
    starts, ends = b.known(1, "starts", "a Slice"), b.known(2, "ends", "a Slice")
    if starts is None or ends is None:
        raise Inexpressible("a Slice without ends")
    axes = b.known(3, "axes", "a Slice") or tuple(range(len(starts)))
    steps = b.known(4, "", "a Slice") or (1,) * len(starts)
    if any(step < 1 for step in steps):
        raise Inexpressible("a Slice that runs backwards")
    ranges = [
        (axis % x.rank, start, end, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
        if (start, step) != (0, 1) or end < (x.sizes[axis % x.rank] or _END)
    ]
    if not ranges:
        _passed(b)
        return
    axes, starts, ends, steps = zip(*ranges, strict=True)
    if 0 in axes:
        raise Inexpressible("a Slice of the first axis")
    ends = tuple(max(min(end, _END), -_END) for end in ends)
    starts = tuple(max(min(start, _END), -_END) for start in starts)
    sizes = list(x.sizes)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        n = sizes[axis]
        sizes[axis] = None if n is None else len(range(*slice(start, end, step).indices(n)))
    settings: dict[str, Attribute] = {"starts": starts, "ends": ends, "axes": axes}
    if any(step != 1 for step in steps):
        settings["steps"] = steps
    b.alike(x, b.make("Slice", [x], tuple(sizes), settings))


def _split(b: Builder) -> None:
    x = b.take(b.value_of(0))
    axis = int(b.attribute("axis", 0)) % x.rank
    n, count = x.sizes[axis], len(b.node.outputs)
    sizes = b.known(1, "split", "a Split")
    if sizes is None:
        if n is None:
            raise Inexpressible("a Split of a size that is not known")
        each = -(-n // count)
        sizes = (*(each,) * (count - 1), n - each * (count - 1))
    if axis == 0 or len(sizes) != count:
        raise Inexpressible("a Split of the first axis" if axis == 0 else f"a Split into {len(sizes)} of {count}")
    at = 0
    for i, size in enumerate(sizes):
        cut: dict[str, Attribute] = {"starts": (at,), "ends": (at + size,), "axes": (axis,)}
        at += size
        if b.node.outputs[i]:
            made = (*x.sizes[:axis], size, *x.sizes[axis + 1 :])
            b.alike(x, b.make("Slice", [x], made, cut, output=i))


def _gather(b: Builder) -> None:
    """One position of an axis. (Rows of a table are a layer.)"""
    x = b.take(b.value_of(0))
    index = b.scope.numbers(b.value_of(1))
    stored = b.scope.constant(b.value_of(1))
    axis = int(b.attribute("axis", 0)) % x.rank
    if index is None or len(index) != 1 or index[0] is None or stored is None or axis == 0:
        raise Inexpressible("a Gather of more than one position")
    at = index[0]
    cut: dict[str, Attribute] = {"starts": (at,), "ends": (at + 1 if at != -1 else _END,), "axes": (axis,)}
    kept = (*x.sizes[:axis], 1, *x.sizes[axis + 1 :])
    if len(stored.shape) == 1:
        b.alike(x, b.make("Slice", [x], kept, cut))
        return
    one = b.part("Slice", x, kept, cut, "position")
    b.alike(x, one)
    _squeezed(b, one, (axis,))


_PAD_MODES = ("constant", "reflect", "edge", "wrap")


def _pad(b: Builder) -> None:
    x = b.take(b.value_of(0))
    pads = b.known(1, "pads", "pads")
    axes = b.known(3, "", "axes")
    mode = str(b.attribute("mode", "constant"))
    value = b.scalar(b.value_of(2)) if b.value_of(2) else float(b.attribute("value", 0.0))
    if pads is None or mode not in _PAD_MODES or (mode == "constant" and value is None):
        raise Inexpressible(f"a Pad of mode {mode} that is computed")
    axes = tuple(range(x.rank)) if axes is None else tuple(axis % x.rank for axis in axes)
    if len(pads) != 2 * len(axes) or any(n < 0 for n in pads):
        raise Inexpressible(f"pads {pads}")
    whole = [0] * (2 * x.rank)
    for i, axis in enumerate(axes):
        whole[axis], whole[axis + x.rank] = pads[i], pads[i + len(axes)]
    settings: dict[str, Attribute] = {"mode": mode, "pads": tuple(whole)}
    if mode == "constant":
        settings["value"] = value
    sizes = tuple(None if n is None else n + whole[i] + whole[i + x.rank] for i, n in enumerate(x.sizes))
    b.alike(x, b.make("Pad", [x], sizes, settings))


_ODD_RESIZE = (("exclude_outside", 0), ("antialias", 0), ("keep_aspect_ratio_policy", "stretch"))


def _resize(b: Builder) -> None:
    x = _spatial(b)
    for name, usual in _ODD_RESIZE:
        if b.attribute(name, usual) != usual:
            raise Inexpressible(f"a Resize with {name}")
    mode = str(b.attribute("mode", "nearest"))
    old = b.node.op_type == "Upsample" or b.scope.opset < 11
    settings: dict[str, Attribute] = {"mode": "linear" if mode.endswith("linear") else mode}
    # Before opset 11 there was one way alone.
    where = str(b.attribute("coordinate_transformation_mode", "asymmetric" if old else "half_pixel"))
    if where == "pytorch_half_pixel":
        where = "half_pixel"  # they differ in an axis of one position alone, which is refused below
    settings["coordinate_transformation_mode"] = where
    if settings["mode"] == "nearest":
        settings["nearest_mode"] = str(b.attribute("nearest_mode", "floor" if old else "round_prefer_floor"))
    if settings["mode"] == "cubic":
        settings["cubic_coeff_a"] = float(b.attribute("cubic_coeff_a", -0.75))
    places = (None, 1, None) if old else (1, 2, 3)
    scales = _scales(b, 1 if old else 2, "scales")
    sizes = None if old or scales is not None else b.known(places[2] or 3, "", "sizes")
    axes = tuple(axis % x.rank for axis in b.attribute("axes") or range(x.rank))
    if scales is not None:
        factors = [1.0] * x.rank
        for axis, factor in zip(axes, scales, strict=True):
            factors[axis] = factor
        if factors[:2] != [1.0, 1.0]:
            raise Inexpressible("a Resize of batch or channels")
        settings["scales"] = tuple(factors)
        made = [None if n is None else math.floor(n * f) for n, f in zip(x.sizes[2:], factors[2:], strict=True)]
    elif sizes is not None:
        wanted = list(x.sizes)
        for axis, size in zip(axes, sizes, strict=True):
            wanted[axis] = size
        if wanted[1] != x.sizes[1] or None in wanted[2:]:
            raise Inexpressible("a Resize of batch or channels")
        made = wanted[2:]
        settings["sizes"] = tuple(n for n in made if n is not None)
    else:
        raise Inexpressible("a Resize without scales or sizes")
    if b.attribute("coordinate_transformation_mode") == "pytorch_half_pixel" and (None in made or 1 in made):
        raise Inexpressible("a Resize to one position, or to a number of them that is not known, as torch once did it")
    b.image(b.make("Resize", [x], (*x.sizes[:2], *made), settings))


def _scales(b: Builder, place: int, attribute: str) -> tuple[float, ...] | None:
    value = b.value_of(place)
    if not value:
        given = b.attribute(attribute)
        return tuple(float(n) for n in given) if isinstance(given, tuple) and given else None
    maker = b.scope.makers.get(value)
    if maker is not None and isinstance(maker.attributes.get("value_floats"), tuple):
        return tuple(float(n) for n in maker.attributes["value_floats"])  # type: ignore[union-attr, arg-type]
    stored = b.scope.floats(value)
    if stored is None:
        raise Inexpressible("a Resize by scales that are computed")
    found = forward(stored)
    return tuple(float(n) for n in found.read().reshape(-1)) if 0 < found.size <= 8 else None


def _depth_to_space(b: Builder) -> None:
    x = _spatial(b)
    block = int(b.attribute("blocksize", 1))
    if x.rank != 4:
        raise Inexpressible(f"a {b.node.op_type} of {x.rank} axes")
    batch, channels, *space = x.sizes
    if b.node.op_type == "DepthToSpace":
        made = [None if channels is None else channels // block**2, *(None if n is None else n * block for n in space)]
        settings: dict[str, Attribute] = {"blocksize": block, "mode": str(b.attribute("mode", "DCR"))}
    else:
        made = [None if channels is None else channels * block**2, *(None if n is None else n // block for n in space)]
        settings = {"blocksize": block}
    b.image(b.make(b.node.op_type, [x], (batch, *made), settings))


_POOLING = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


def _global_reduction(b: Builder, x: Flow, kept: bool) -> None:
    """A reduction of all of space is a pooling, which more frameworks have."""
    op, sizes = _POOLING[b.node.op_type], (*x.sizes[:2], *(1 for _ in x.sizes[2:]))
    b.image(x)
    if kept:
        b.image(b.make(op, [x], sizes))
        return
    pooled = b.part(op, x, sizes, {}, "pool")
    b.image(pooled)
    b.make("Flatten", [pooled], x.sizes[:2], {"axis": 1})


def _reduce(b: Builder) -> None:
    x = b.take(b.value_of(0))
    axes = _axes(b, x.rank)
    if axes is None or 0 in axes:
        if not axes and b.attribute("noop_with_empty_axes", 0):
            _passed(b)
            return
        raise Inexpressible(f"a {b.node.op_type} of the first axis")
    kept = bool(b.attribute("keepdims", 1))
    if b.node.op_type in _POOLING and x.rank > 3 and axes == tuple(range(2, x.rank)):
        _global_reduction(b, x, kept)
        return
    sizes = tuple(1 if i in axes else n for i, n in enumerate(x.sizes) if kept or i not in axes)
    y = b.make(b.node.op_type, [x], sizes, {"axes": axes, "keepdims": int(kept)})
    if kept:
        b.alike(x, y)


def _expand(b: Builder) -> None:
    x = b.take(b.value_of(0))
    target = b.known(1, "", "a shape")
    if target is None or len(target) > x.rank or (len(target) == x.rank and target[0] not in (1, x.sizes[0])):
        raise Inexpressible("an Expand that adds axes or batches")
    shape = (1,) * (x.rank - len(target)) + tuple(target)
    b.make("Expand", [x], _broadcast([x.sizes, shape]), {"shape": (1, *shape[1:])})


def _tile(b: Builder) -> None:
    x = b.take(b.value_of(0))
    repeats = b.known(1, "", "repeats")
    if repeats is None or len(repeats) != x.rank or repeats[0] != 1:
        raise Inexpressible("a Tile of the first axis")
    sizes = tuple(None if n is None else n * r for n, r in zip(x.sizes, repeats, strict=True))
    b.alike(x, b.make("Tile", [x], sizes, {"repeats": repeats}))


def _lrn(b: Builder) -> None:
    x = _spatial(b)
    settings: dict[str, Attribute] = {"size": int(b.attribute("size", 1))}
    settings |= {
        name: float(b.attribute(name, usual)) for name, usual in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    }
    b.image(b.make("LRN", [x], x.sizes, settings))


OPERATORS: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "Abs", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sign",
            "Sin", "Softplus", "Softsign", "Sqrt", "Tanh",
        ),
        _same(),
    ),
    **dict.fromkeys(("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"), _joining),
    **dict.fromkeys(("AveragePool", "MaxPool"), _pool),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_to_space),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("LogSoftmax", "Softmax"), _softmax),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": _same(_float("alpha", 1.0)),
    "Clip": _clip,
    "Concat": _concat,
    "Dropout": _dropout,
    "Elu": _same(_float("alpha", 1.0)),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _same(("approximate", "none")),
    "HardSigmoid": _same(_float("alpha", 0.2), _float("beta", 0.5)),
    "Identity": _passed,
    "LRN": _lrn,
    "LeakyRelu": _same(_float("alpha", 0.01)),
    "Pad": _pad,
    "Reshape": _reshape,
    "Selu": _same(_float("alpha", 1.6732631921768188), _float("gamma", 1.0507010221481323)),
    "Shrink": _same(_float("lambd", 0.5), _float("bias", 0.0)),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Swish": _same(_float("alpha", 1.0)),
    "ThresholdedRelu": _same(_float("alpha", 1.0)),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}  # fmt: skip
