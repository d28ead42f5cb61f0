"""The nodes of the graph that stand for operators that move, join or take apart axes. The first axis is kept by all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from neutral.exporters.onnx_flow import Builder, Flow, Inexpressible, Lifted, Rule, Sizes, broadcast
from neutral.schema.graph import Attribute


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
        b.passed()
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
    around = broadcast([(*flow.sizes[:axis], 1, *flow.sizes[axis + 1 :]) for flow in flows])
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
        b.passed()
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
            b.passed()
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
    b.make("Expand", [x], broadcast([x.sizes, shape]), {"shape": (1, *shape[1:])})


def _tile(b: Builder) -> None:
    x = b.take(b.value_of(0))
    repeats = b.known(1, "", "repeats")
    if repeats is None or len(repeats) != x.rank or repeats[0] != 1:
        raise Inexpressible("a Tile of the first axis")
    sizes = tuple(None if n is None else n * r for n, r in zip(x.sizes, repeats, strict=True))
    b.alike(x, b.make("Tile", [x], sizes, {"repeats": repeats}))


SHAPING: Mapping[str, Rule] = {
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
