"""Which layers of an ONNX graph stand behind a Flatten or in front of a Reshape, and in which order channels and space lie there.

The graph is followed from its inputs on: every value is `Seen` as what it holds. ONNX's images have their channels first, so
that a Flatten joins (channel position). What was converted from TensorFlow turns its images round before: then a vector holds
(position channel), and the layers behind it are `turned`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from neutral.containers.onnx import NodeProto
from neutral.conventions.onnx_ranks import ELEMENTWISE
from neutral.conventions.onnx_scope import Numbers, Scope

PLAIN, IMAGE, LAST, FLAT, TURNED, DIVIDED, MIXED, GIVEN, JOINED, UNKNOWN = (
    "plain", "image", "last", "flat", "turned", "divided", "mixed", "given", "joined", "unknown",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What a value holds.

    `plain`: no axis of it is a joined image. `image`: channels, then space; `last`: space, then channels. `flat`: an image in
    one axis, (channel position); `turned`: (position channel). `divided`: a plain vector as several axes, `sizes`, which may
    become an image. `mixed`: plain, its axes in another order. `given`: an input of the model; `joined`: such a one in one axis.
    `unknown`: none of these for certain. `channels` are those of the image, `pending` the layers (and their axes) that made the
    last axis of a plain value. `pixels`: a dense layer took the last axis of an image, whose other axes are still there.
    """

    order: str
    channels: int | None = None
    rank: int | None = None
    pending: tuple[tuple[int, str], ...] = ()
    sizes: Numbers = ()
    pixels: bool = False


@dataclass
class Crossings:
    """Per layer (by its number) the channels of the axes that cross; nothing for one that crosses none, no entry for one of
    which nobody knows. `turned` are the axes that lie in the order (position channel); `unsettled` layers join some axes."""

    splits: dict[int, dict[str, int]] = field(default_factory=dict)
    turned: dict[int, set[str]] = field(default_factory=dict)
    unsettled: set[int] = field(default_factory=set)
    forgotten: set[int] = field(default_factory=set)

    def name(self, layer: int, axis: str, seen: Seen, size: int) -> None:
        """Record what a layer takes in or treats."""
        if seen.order in (UNKNOWN, JOINED, GIVEN, DIVIDED) and not (seen.order == GIVEN and axis == "in"):
            self.forget([(layer, axis)])
            if seen.order == JOINED:
                self.unsettled.add(layer)
            return
        if seen.order in (FLAT, TURNED):
            if seen.channels is None or size % seen.channels:
                self.forget([(layer, axis)])
                return
            self.cross(layer, axis, seen.channels, seen.order == TURNED, size)
        else:
            self.cross(layer, axis, 0, False, size)

    def cross(self, layer: int, axis: str, channels: int, turned: bool, size: int) -> None:
        """Record one axis; two uses of a layer must agree."""
        crosses = 1 < channels < size
        known = self.splits.get(layer)
        now = {axis: channels} if crosses else {}
        if known is not None and axis in known and known[axis] != now.get(axis):
            self.forget([(layer, axis)])
            return
        self.splits[layer] = {**(known or {}), **now}
        if turned and crosses:
            self.turned.setdefault(layer, set()).add(axis)

    def forget(self, layers: Sequence[tuple[int, str]]) -> None:
        self.forgotten |= {layer for layer, _ in layers}


@dataclass(frozen=True)
class Used:
    """A layer as the graph is followed: its number, operator, and shape of its first weight."""

    number: int
    cls: str
    shape: tuple[int, ...]
    made: int
    source: str = ""
    """The value that it takes, if the node at hand is the last of several."""


def follow(scope: Scope, layers: Mapping[int, Used], adds: frozenset[int]) -> Crossings:
    """What crosses, for the layers that nodes (by their identity) compute; `adds` are nodes that add a layer's bias."""
    found = Crossings()
    values: dict[str, Seen] = {}
    for info in scope.graph.inputs:
        if info.name not in scope.graph.initializers:
            rank = None if info.shape is None else len(info.shape)
            values[info.name] = Seen(PLAIN if rank is not None and rank <= 2 else GIVEN, rank=rank)
    for node in scope.graph.nodes:
        ins = [values.get(v, Seen(UNKNOWN)) for v in node.inputs if v and scope.constant(v) is None]
        if id(node) in layers:
            source = layers[id(node)].source
            given = values.get(source, Seen(UNKNOWN)) if source else ins[0] if ins else Seen(UNKNOWN)
            seen = _through_layer(layers[id(node)], given, found)
        elif id(node) in adds:
            seen = ins[0] if ins else Seen(UNKNOWN)
        elif not ins or not node.outputs:
            continue
        else:
            seen = _RULES.get(node.op_type if not node.domain else "", _other)(scope, node, ins, found)
        for value in node.outputs:
            if value:
                values[value] = seen
    for layer in found.forgotten:
        found.splits.pop(layer, None)
        found.turned.pop(layer, None)
    return found


def _through_layer(layer: Used, seen: Seen, found: Crossings) -> Seen:
    cls, shape = layer.cls, layer.shape
    if cls in ("Gemm", "MatMul", "Einsum"):
        size = shape[0] * shape[1] // layer.made if len(shape) == 2 and layer.made else 0
        found.name(layer.number, "in", seen, size)
        if seen.order == DIVIDED:
            found.forget(seen.pending)
        pixels = seen.pixels or seen.order in (IMAGE, LAST)
        if seen.order == IMAGE:
            return Seen(MIXED, rank=seen.rank, pixels=pixels)
        rank = 2 if cls == "Gemm" else seen.rank
        return Seen(PLAIN, layer.made, rank, ((layer.number, "out"),), pixels=pixels and seen.order != FLAT)
    if cls in ("Conv", "ConvTranspose"):
        _settle(seen, found)
        return Seen(IMAGE, layer.made, len(shape))
    if cls == "Gather":
        return Seen(PLAIN, layer.made, None if seen.rank is None else seen.rank + 1)
    if cls in ("RNN", "LSTM", "GRU"):
        return Seen(MIXED, rank=4)
    if cls in ("InstanceNormalization", "GroupNormalization"):
        _settle(seen, found)
        return _as_image(seen)
    # Norms and slopes per channel, or per element of a vector.
    if seen.order == DIVIDED and cls in ("BatchNormalization", "PRelu"):
        _settle(seen, found)
        seen = _as_image(seen)
    if shape == (1,):
        found.cross(layer.number, "feature", 0, False, 1)
        return seen
    found.name(layer.number, "feature", seen, shape[0] if shape else 1)
    return replace(seen, pending=(*seen.pending, (layer.number, "feature"))) if seen.order == PLAIN else seen


def _settle(seen: Seen, found: Crossings) -> None:
    """A value is used as an image: a vector that was divided for it had channels in front."""
    if seen.order == DIVIDED and len(seen.sizes) > 2 and seen.sizes[1] is not None:
        for layer, axis in seen.pending:
            found.cross(layer, axis, seen.sizes[1], False, _total(seen))
    elif seen.order in (MIXED, PLAIN, DIVIDED):
        found.forget(seen.pending)


def _total(seen: Seen) -> int:
    total = 1
    for n in seen.sizes[1:]:
        total *= n or 1
    return total


def _as_image(seen: Seen) -> Seen:
    if seen.order == DIVIDED:
        return Seen(IMAGE, seen.sizes[1], len(seen.sizes))
    return seen if seen.order in (IMAGE, UNKNOWN) else Seen(UNKNOWN)


Rule = Callable[[Scope, NodeProto, Sequence[Seen], Crossings], Seen]


def _same(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    return ins[0]


def _spatial(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    """Pooling and the like, which keep channels."""
    _settle(ins[0], found)
    if ins[0].order == GIVEN:
        return Seen(UNKNOWN)
    return _as_image(ins[0])


def _joining(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    """Operators on elements: all values alike, or constants beside one."""
    pending = tuple(dict.fromkeys(p for seen in ins for p in seen.pending))
    kinds = {(seen.order, seen.channels if seen.order in (IMAGE, LAST, FLAT, TURNED) else None) for seen in ins}
    if len(kinds) == 1:
        joined = replace(ins[0], pending=pending, pixels=any(seen.pixels for seen in ins))
        return _broadcast(scope, node, joined, found)
    if {order for order, _ in kinds} <= {PLAIN, MIXED}:
        return Seen(MIXED, pending=pending, pixels=any(seen.pixels for seen in ins))
    divided = [seen for seen in ins if seen.order == DIVIDED]
    if divided and any(seen.order == IMAGE for seen in ins) and len(kinds) == 2:
        for seen in divided:
            _settle(seen, found)
        images = [_as_image(seen) for seen in ins]
        if len({seen.channels for seen in images}) == 1:
            return images[0]
    found.forget(pending)
    return Seen(UNKNOWN)


def _stored(scope: Scope, node: NodeProto) -> Iterator[Numbers]:
    """The shapes of the stored tensors that a node takes beside what the model computes."""
    for value in node.inputs:
        stored = scope.constant(value)
        if stored is not None:
            yield stored.shape


def _broadcast(scope: Scope, node: NodeProto, seen: Seen, found: Crossings) -> Seen:
    """A value beside stored tensors: its channels, where it has one for all, become as many as theirs."""
    for shape in _stored(scope, node):
        if seen.order in (IMAGE, LAST) and seen.rank is not None and len(shape) <= seen.rank:
            from_behind = seen.rank - 1 if seen.order == IMAGE else 1
        elif seen.order in (PLAIN, FLAT, TURNED, MIXED, GIVEN) and len(shape) <= (seen.rank or len(shape)):
            from_behind = 1
        else:
            found.forget(seen.pending)
            return Seen(UNKNOWN)
        theirs = shape[-from_behind] if len(shape) >= from_behind else 1
        if theirs != 1 and seen.channels in (1, None) and seen.order in (IMAGE, LAST):
            seen = replace(seen, channels=theirs)
        elif theirs != 1 and seen.channels == 1 and seen.order in (PLAIN, MIXED):
            found.forget(seen.pending)
            seen = replace(seen, channels=theirs, pending=())
    return seen


def _concat(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    pending = tuple(dict.fromkeys(p for seen in ins for p in seen.pending))
    stored, rank = list(_stored(scope, node)), ins[0].rank
    along = node.attributes.get("axis")
    if all(seen.order == IMAGE and seen.channels is not None for seen in ins) and rank and along in (1, 1 - rank):
        if all(len(shape) == rank for shape in stored):
            return Seen(IMAGE, sum(seen.channels or 0 for seen in ins) + sum(shape[1] or 0 for shape in stored), rank)
    elif all(seen.order in (PLAIN, MIXED) for seen in ins):
        pixels = any(seen.pixels for seen in ins)
        if rank == 2:
            # What becomes of them may become an image, of which each layer made some part.
            return Seen(MIXED, None, 2, pending, pixels=pixels)
        return Seen(PLAIN if all(seen.order == PLAIN for seen in ins) else MIXED, None, rank, pixels=pixels)
    found.forget(pending)
    return Seen(UNKNOWN)


def _within_space(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    """A Slice of an image that takes all of its channels."""
    seen = ins[0]
    axes = scope.numbers(node.inputs[3]) if len(node.inputs) > 3 else node.attributes.get("axes")
    rank = seen.rank if seen.order == IMAGE else None
    if rank is None or not isinstance(axes, tuple) or any(type(axis) is not int or axis % rank < 2 for axis in axes):
        return _other(scope, node, ins, found)
    return seen


def _counted(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    """Sizes, which hold no features."""
    return Seen(UNKNOWN)


def _flatten(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    (seen,) = ins[:1]
    axis = node.attributes.get("axis", 1)
    if axis == 1:
        return _joined_to_vector(scope, node.inputs[0], seen, found)
    return _other(scope, node, ins, found)


def _joined_to_vector(scope: Scope, value: str, seen: Seen, found: Crossings) -> Seen:
    """All axes but the batch become one."""
    match seen.order:
        case "image":
            return Seen(FLAT, seen.channels, 2)
        case "last":
            return Seen(TURNED, seen.channels, 2)
        case "divided":
            return Seen(PLAIN, None, 2, seen.pending)
        case "given":
            sizes = scope.shape_of(value) or ()
            # With one axis that is longer than one, there is one order alone.
            if sizes and sum(1 for n in sizes[1:] if n != 1) <= 1:
                return Seen(PLAIN, None, 2)
            return Seen(JOINED, None, 2)
        case "plain" | "mixed" if seen.pixels and seen.rank != 2:
            return Seen(JOINED, None, 2)
        case "plain" | "mixed" | "flat" | "turned":
            return replace(seen, rank=2) if seen.rank == 2 else replace(seen, rank=2, pending=())
    return Seen(UNKNOWN)


def _reshape(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    seen = ins[0]
    target = scope.numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    whole = scope.shape_of(node.inputs[0])
    if target is None:
        target = scope.shape_of(node.outputs[0])
    if target is None:
        return _other(scope, node, ins, found)
    if len(target) == 2 and _keeps_batch(target, whole):
        return _joined_to_vector(scope, node.inputs[0], seen, found)
    kept = len(target) > 2 and _same_size(target, whole, 0)
    if seen.order == IMAGE and kept and seen.channels is not None and target[1] in (seen.channels, 0):
        return replace(seen, rank=len(target))
    if seen.order == FLAT and kept and seen.channels is not None and target[1] == seen.channels:
        return Seen(IMAGE, seen.channels, len(target))
    if seen.order == LAST and len(target) == 3 and seen.channels is not None and target[2] in (seen.channels, -1):
        return Seen(PLAIN, seen.channels, 3)
    if seen.order == PLAIN and seen.rank == 2 and len(target) > 2:
        sizes = _divided_sizes(target, seen, whole)
        return Seen(DIVIDED, None, len(target), seen.pending, sizes) if sizes else _other(scope, node, ins, found)
    if seen.order in (PLAIN, MIXED):
        return Seen(MIXED if len(target) > 2 else PLAIN, None, len(target), seen.pending, pixels=seen.pixels)
    return _other(scope, node, ins, found)


def _keeps_batch(target: Numbers, whole: Numbers | None) -> bool:
    """True for (batch, all the rest)."""
    if _same_size(target, whole, 0):
        return True
    rest = None if whole is None or None in whole[1:] else _product(whole[1:])
    return target[0] in (-1, None) and rest is not None and target[1] == rest


def _same_size(target: Numbers, whole: Numbers | None, axis: int) -> bool:
    """True if an axis keeps its size for certain: by a zero, by a number, or as all others are known to."""
    same = whole is not None and axis < len(whole)
    if target[axis] == 0 or (whole is not None and same and target[axis] == whole[axis] and target[axis] is not None):
        return True
    # The size of the batch was looked up: nothing else is written so.
    return target[axis] is None and all(n is not None for i, n in enumerate(target) if i != axis)


def _product(sizes: Numbers) -> int:
    total = 1
    for n in sizes:
        total *= n or 0
    return total


def _divided_sizes(target: Numbers, seen: Seen, whole: Numbers | None) -> Numbers:
    """The sizes that a vector is divided into; nothing if they are not known."""
    features = seen.channels if whole is None or len(whole) != 2 or whole[1] is None else whole[1]
    sizes = list(target[1:])
    if sizes.count(-1) == 1 and features is not None and None not in sizes:
        rest = -_product(tuple(sizes))
        sizes[sizes.index(-1)] = features // rest if rest and features % rest == 0 else None
    if None in sizes or features is None or _product(tuple(sizes)) != features:
        return ()
    return (None, *sizes)


def _transpose(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    seen = ins[0]
    given = node.attributes.get("perm")
    perm = given if isinstance(given, tuple) else ()
    rank = len(perm)
    to_last, to_first = (0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))
    if perm == tuple(range(rank)) and rank:
        return seen
    if seen.order == IMAGE and perm == to_last and rank == seen.rank:
        return replace(seen, order=LAST)
    if seen.order == LAST and perm == to_first and rank == seen.rank:
        return replace(seen, order=IMAGE)
    if seen.order == DIVIDED and perm == to_first and rank == len(seen.sizes):
        channels = seen.sizes[-1]
        for layer, axis in seen.pending:
            found.cross(layer, axis, channels or 0, True, _total(seen))
        return Seen(IMAGE, channels, rank)
    if seen.order == PLAIN and perm == (0, 2, 1):
        return Seen(IMAGE, seen.channels, 3)
    if seen.order == GIVEN:
        return seen
    if seen.order in (PLAIN, MIXED):
        return Seen(MIXED, None, rank or seen.rank, seen.pending, pixels=seen.pixels)
    return _other(scope, node, ins, found)


def _squeeze(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    seen = ins[0]
    axes = scope.numbers(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get("axes")
    count = len(axes) if isinstance(axes, tuple) else None
    if seen.order == IMAGE and seen.rank is not None and count == seen.rank - 2:
        return Seen(PLAIN, seen.channels, 2)
    return _other(scope, node, ins, found)


def _reduce(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    """A mean over all of space."""
    seen = ins[0]
    axes = scope.numbers(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get("axes")
    if seen.order in (IMAGE, LAST) and seen.rank is not None and isinstance(axes, tuple) and None not in axes:
        rank = seen.rank
        placed = sorted(axis + rank if axis < 0 else axis for axis in axes if isinstance(axis, int))
        if placed == list(range(2, rank) if seen.order == IMAGE else range(1, rank - 1)):
            return seen if node.attributes.get("keepdims", 1) else Seen(PLAIN, seen.channels, 2)
    return _other(scope, node, ins, found)


def _other(scope: Scope, node: NodeProto, ins: Sequence[Seen], found: Crossings) -> Seen:
    """Operators that are not followed: sequences stay what they are, images and vectors of images do not."""
    pending = tuple(dict.fromkeys(p for seen in ins for p in seen.pending))
    if all(seen.order in (PLAIN, MIXED) for seen in ins) and node.op_type in _OF_SEQUENCES:
        return Seen(MIXED, pending=pending, pixels=any(seen.pixels for seen in ins))
    found.forget(pending)
    return Seen(UNKNOWN)


_OF_SEQUENCES = frozenset(
    [
        "Attention",
        "Concat",
        "Expand",
        "Gather",
        "GatherElements",
        "GatherND",
        "MatMul",
        "Pad",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Reshape",
        "ReverseSequence",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _same),
    **dict.fromkeys(
        [
            "AveragePool",
            "GlobalAveragePool",
            "GlobalLpPool",
            "GlobalMaxPool",
            "LRN",
            "LpPool",
            "MaxPool",
            "Resize",
            "Upsample",
        ],
        _spatial,
    ),
    **dict.fromkeys(["Add", "Div", "Max", "Mean", "Min", "Mod", "Mul", "Pow", "Sub", "Sum", "Where"], _joining),
    **dict.fromkeys(["Shape", "Size"], _counted),
    "Concat": _concat,
    "Slice": _within_space,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "ReduceMean": _reduce,
    "ReduceMax": _reduce,
}
