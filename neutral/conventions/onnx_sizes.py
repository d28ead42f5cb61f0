"""How long the axes of a value of an ONNX graph are, where the file does not say it: computed from the values in front of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from neutral.containers.onnx import NodeProto
from neutral.containers.onnx_constants import forward
from neutral.conventions.onnx_ranks import ELEMENTWISE
from neutral.conventions.onnx_scope import Numbers, Scope

_LIKE_FIRST = ELEMENTWISE | {
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization", "RMSNormalization",
}  # fmt: skip
_LONGEST = 8
_LARGEST = 1 << 24
_JOINING = ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum", "Where")


def sizes_of(scope: Scope) -> dict[str, Numbers]:
    """By the names of the values, None inside for what is not known."""
    found: dict[str, Numbers] = {}
    # In the order of computation, so that nothing is looked for deep down.
    for node in scope.graph.nodes:
        if node.domain or not node.inputs or not node.outputs or scope.shape_of(node.outputs[0]) is not None:
            continue
        special = _SPECIAL.get(node.op_type)
        if special is not None:
            whole = found.get(node.inputs[0]) or scope.shape_of(node.inputs[0])
            told = special(scope, node, whole) if whole is not None else None
            if told is not None:
                found[node.outputs[0]] = told
            continue
        rule = _RULES.get(node.op_type)
        ins = [found.get(value) or scope.shape_of(value) if value else None for value in node.inputs]
        made = rule(node, ins) if rule is not None and ins[0] is not None else None
        if made is not None and all(n is None or n >= 0 for n in made):
            found[node.outputs[0]] = made
    return found


def _factors(scope: Scope, node: NodeProto) -> tuple[float, ...]:
    """By how much a Resize stretches each axis; nothing if that is not told so."""
    place = 1 if node.op_type == "Upsample" or scope.opset < 11 else 2
    value = node.inputs[place] if len(node.inputs) > place else ""
    stored = scope.floats(value) if value else None
    if stored is None or "axes" in node.attributes or math.prod(stored.shape) > _LONGEST:
        return ()
    found = tuple(float(n) for n in forward(stored).read().reshape(-1))
    return found if all(math.isfinite(n) and 0 < n < _LARGEST for n in found) else ()


def _resized(scope: Scope, node: NodeProto, whole: Numbers) -> Numbers | None:
    factors = _factors(scope, node)
    if len(factors) != len(whole):
        return None
    return tuple(None if n is None else math.floor(n * f) for n, f in zip(whole, factors, strict=True))


def _cut(scope: Scope, node: NodeProto, whole: Numbers) -> Numbers | None:
    """A Slice with steps of one."""
    lists = [scope.numbers(value) if value else None for value in node.inputs[1:]]
    if len(lists) < 3:
        lists = [tuple(n for n in given if type(n) is int) if isinstance(given := node.attributes.get(name), tuple) else None
                 for name in ("starts", "ends", "axes")]  # fmt: skip
    starts, ends, axes, *steps = lists
    if starts is None or ends is None or axes is None or not len(starts) == len(ends) == len(axes):
        return None
    if any(step is None or set(step) != {1} for step in steps):
        return None
    made = list(whole)
    for start, end, axis in zip(starts, ends, axes, strict=True):
        if start is None or end is None or axis is None or not -len(whole) <= axis < len(whole):
            return None
        n = whole[axis]
        made[axis] = None if n is None else len(range(*slice(start, end).indices(n)))
    return tuple(made)


_SPECIAL: Mapping[str, Callable[[Scope, NodeProto, Numbers], Numbers | None]] = {
    "Resize": _resized,
    "Slice": _cut,
    "Upsample": _resized,
}
"""Operators whose settings are inputs."""

_Ins = Sequence[Numbers | None]
_Rule = Callable[[NodeProto, _Ins], Numbers | None]


def _ints(node: NodeProto, name: str, count: int, usual: int) -> tuple[int, ...] | None:
    given = node.attributes.get(name)
    if given is None:
        return (usual,) * count
    known = tuple(n for n in given if type(n) is int) if isinstance(given, tuple) else ()
    return known if len(known) == count else None


def _whole(node: NodeProto, name: str, usual: int) -> int:
    given = node.attributes.get(name)
    return given if type(given) is int else usual


def _same(node: NodeProto, ins: _Ins) -> Numbers | None:
    return ins[0]


def _window(node: NodeProto, whole: Numbers, kernel: Numbers) -> tuple[int | None, ...] | None:
    """The space that windows over the space of a value make."""
    space = whole[2:]
    strides, dilations = _ints(node, "strides", len(space), 1), _ints(node, "dilations", len(space), 1)
    pads = _ints(node, "pads", 2 * len(space), 0)
    if strides is None or dilations is None or pads is None or len(kernel) != len(space) or 0 in strides:
        return None
    auto = node.attributes.get("auto_pad", "NOTSET")
    made: list[int | None] = []
    for i, (n, k, s, d) in enumerate(zip(space, kernel, strides, dilations, strict=True)):
        if n is None or k is None:
            made.append(None)
        elif auto in ("SAME_UPPER", "SAME_LOWER"):
            made.append(-(-n // s))
        else:
            span = n + (0 if auto == "VALID" else pads[i] + pads[i + len(space)]) - d * (k - 1) - 1
            made.append(span // s + 1 if span >= 0 else None)
    return tuple(made)


def _conv(node: NodeProto, ins: _Ins) -> Numbers | None:
    whole, weight = ins[0], ins[1] if len(ins) > 1 else None
    if whole is None or weight is None or len(weight) != len(whole):
        return None
    space = _window(node, whole, weight[2:])
    return None if space is None else (whole[0], weight[0], *space)


def _conv_transpose(node: NodeProto, ins: _Ins) -> Numbers | None:
    whole, weight = ins[0], ins[1] if len(ins) > 1 else None
    if whole is None or weight is None or len(weight) != len(whole) or weight[1] is None:
        return None
    count = len(whole) - 2
    s, d = _ints(node, "strides", count, 1), _ints(node, "dilations", count, 1)
    extra, pads = _ints(node, "output_padding", count, 0), _ints(node, "pads", 2 * count, 0)
    known = s is not None and d is not None and extra is not None and pads is not None
    if not known or node.attributes.get("output_shape"):
        return None
    auto = node.attributes.get("auto_pad", "NOTSET")
    made: list[int | None] = []
    for i, (n, k) in enumerate(zip(whole[2:], weight[2:], strict=True)):
        if n is None or k is None:
            made.append(None)
        elif auto in ("SAME_UPPER", "SAME_LOWER"):
            made.append(n * s[i])  # type: ignore[index]
        else:
            cut = 0 if auto == "VALID" else pads[i] + pads[i + count]  # type: ignore[index]
            made.append((n - 1) * s[i] + d[i] * (k - 1) + 1 + extra[i] - cut)  # type: ignore[index]
    return (whole[0], weight[1] * _whole(node, "group", 1), *made)


def _pool(node: NodeProto, ins: _Ins) -> Numbers | None:
    whole = ins[0]
    kernel = None if whole is None else _ints(node, "kernel_shape", len(whole) - 2, 1)
    if whole is None or kernel is None or _whole(node, "ceil_mode", 0):
        return None
    space = _window(node, whole, kernel)
    return None if space is None else (*whole[:2], *space)


def _global_pool(node: NodeProto, ins: _Ins) -> Numbers | None:
    whole = ins[0] or ()
    return (*whole[:2], *(1 for _ in whole[2:]))


def _joining(node: NodeProto, ins: _Ins) -> Numbers | None:
    known = [each for each in ins if each is not None]
    if len(known) < len(ins):
        return None
    rank = max(len(each) for each in known)
    made: list[int | None] = []
    for sizes in zip(*((1,) * (rank - len(each)) + tuple(each) for each in known), strict=True):
        wide = {n for n in sizes if n != 1}
        made.append(1 if not wide else wide.pop() if len(wide) == 1 else None)
    return tuple(made)


def _transpose(node: NodeProto, ins: _Ins) -> Numbers | None:
    whole = ins[0] or ()
    perm = _ints(node, "perm", len(whole), 0) if "perm" in node.attributes else tuple(reversed(range(len(whole))))
    return None if perm is None or sorted(perm) != list(range(len(whole))) else tuple(whole[i] for i in perm)


def _concat(node: NodeProto, ins: _Ins) -> Numbers | None:
    first, axis = ins[0] or (), _whole(node, "axis", 0)
    if not -len(first) <= axis < len(first) or any(each is None or len(each) != len(first) for each in ins):
        return None
    axis %= len(first)
    joined = [each[axis] for each in ins if each is not None]
    total = None if None in joined else sum(n for n in joined if n is not None)
    return (*first[:axis], total, *first[axis + 1 :])


def _flatten(node: NodeProto, ins: _Ins) -> Numbers | None:
    whole = ins[0] or ()
    return (whole[0], _product(whole[1:])) if _whole(node, "axis", 1) == 1 and whole else None


def _product(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else math.prod(n for n in sizes if n is not None)


_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_LIKE_FIRST, _same),
    **dict.fromkeys(_JOINING, _joining),
    **dict.fromkeys(("AveragePool", "MaxPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Flatten": _flatten,
    "Transpose": _transpose,
}
