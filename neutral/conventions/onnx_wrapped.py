"""Layers that TensorFlow computes on other axes than its own: reshaped in front of the operator and back behind it.

x -> Reshape (-1, in) -> MatMul -> Reshape (all but the last axis of x, out) -> Add                    a dense layer
x -> Unsqueeze -> Transpose -> Conv, one of its axes of one position -> Squeeze -> Add                 a 1-D convolution
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neutral.containers.onnx import NodeProto
from neutral.containers.onnx_constants import Reshaped
from neutral.conventions.onnx_candidates import Call, Candidate, Use, bias_behind, candidate_of
from neutral.conventions.onnx_ranks import rank_of
from neutral.conventions.onnx_scope import Scope

_MOST_STEPS = 64
_WINDOWED = ("Conv", "ConvTranspose")
_PER_AXIS: Mapping[str, int] = {"kernel_shape": 1, "strides": 1, "dilations": 1, "output_padding": 0}

Size = int | tuple[str, int]
"""A size of an axis: a number, or `(value, axis)`, whatever it is there."""


def wrapped(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    """The layer of which a node is the operator, if it is such a one."""
    if node.domain or not node.inputs or not node.outputs:
        return None
    if node.op_type == "MatMul":
        return _dense(scope, node)
    return _convolution(scope, node) if node.op_type in _WINDOWED else None


def _maker(scope: Scope, value: str, op: str) -> NodeProto | None:
    node = scope.makers.get(value)
    return node if node is not None and not node.domain and node.op_type == op and node.inputs else None


def _next(scope: Scope, node: NodeProto, op: str) -> NodeProto | None:
    user = scope.only_user(node.outputs[0])
    return user if user is not None and not user.domain and user.op_type == op else None


def _called(scope: Scope, found: tuple[Candidate, list[Use]], call: Call) -> tuple[Candidate, list[Use]]:
    """The layer with the bias that is added behind the last of these nodes."""
    candidate, uses = found
    last = call.nodes[-1]
    more = bias_behind(scope, candidate, last) if "B" not in candidate.expressions else []
    behind = candidate.nodes[1:]
    candidate.calls = [replace(call, nodes=(*call.nodes, *behind))]
    candidate.nodes = list(candidate.calls[0].nodes)
    candidate.values += [value for _, value in more]
    return candidate, [*uses, *more]


# --- dense ---


def _dense(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    before, after = _maker(scope, node.inputs[0], "Reshape"), _next(scope, node, "Reshape")
    if before is None or after is None or scope.only_user(before.outputs[0]) is not node:
        return None
    found = candidate_of(scope, node)
    if found is None or len(before.inputs) < 2 or len(after.inputs) < 2 or len(found[0].nodes) > 1:
        return None
    made = found[0].expressions["W"].shape[1]
    source, rank = before.inputs[0], rank_of(scope, before.inputs[0])
    whole = sizes(scope, after.inputs[1])
    # The product says how long the last axis is in between; if all others are kept, it was as long before.
    if rank is None or rank < 2 or whole is None or len(whole) != rank:
        return None
    if whole[-1] != made or any(not _same(scope, n, source, i) for i, n in enumerate(whole[:-1])):
        return None
    return _called(scope, found, Call(source, (before, node, after)))


def _same(scope: Scope, size: Size, source: str, axis: int) -> bool:
    """True if a size is that of an axis of a value."""
    return size == _axis(scope, source, axis) or (size == 0 and axis >= 0)


def sizes(scope: Scope, value: str, depth: int = 0) -> tuple[Size, ...] | None:
    """The sizes that nodes compute, as those of other values where they are no numbers."""
    stored = scope.constant(value)
    node = scope.makers.get(value)
    if stored is not None:
        told = scope.numbers(value)
        known = tuple(n for n in told or () if n is not None)
        return known if told is not None and len(known) == len(told) else None
    if node is None or node.domain or depth > _MOST_STEPS or not node.inputs:
        return None
    if node.op_type in ("Cast", "Identity", "Unsqueeze"):
        return sizes(scope, node.inputs[0], depth + 1)
    if node.op_type == "Concat":
        parts = [sizes(scope, part, depth + 1) for part in node.inputs]
        return None if None in parts else tuple(n for part in parts for n in part or ())
    if node.op_type == "Shape" and not {"start", "end"} & node.attributes.keys():
        rank = rank_of(scope, node.inputs[0])
        return None if rank is None else tuple(_axis(scope, node.inputs[0], i) for i in range(rank))
    if node.op_type == "Gather" and len(node.inputs) == 2:
        return _picked(scope, node, depth)
    if node.op_type == "Slice" and len(node.inputs) > 2:
        whole, ends = sizes(scope, node.inputs[0], depth + 1), [scope.numbers(each) for each in node.inputs[1:]]
        if whole is None or any(end is None or len(end) != 1 or end[0] is None for end in ends):
            return None
        start, stop, *rest = (end[0] for end in ends if end is not None)
        return whole[start:stop] if rest in ([], [0], [0, 1]) else None
    return None


def _picked(scope: Scope, node: NodeProto, depth: int) -> tuple[Size, ...] | None:
    places = scope.numbers(node.inputs[1])
    if places is None or any(n is None for n in places):
        return None
    shaped = _maker(scope, node.inputs[0], "Shape")
    if shaped is not None and all(n is not None and n >= 0 for n in places) and not shaped.attributes:
        return tuple(_axis(scope, shaped.inputs[0], n) for n in places if n is not None)
    whole = sizes(scope, node.inputs[0], depth + 1)
    if whole is None or any(n is None or not -len(whole) <= n < len(whole) for n in places):
        return None
    return tuple(whole[n] for n in places if n is not None)


def _axis(scope: Scope, value: str, axis: int) -> Size:
    """One size of a value; the size of what was only transposed is that in front of it."""
    for _ in range(_MOST_STEPS):
        node = scope.makers.get(value)
        perm = node.attributes.get("perm") if node is not None else None
        if node is None or node.domain or node.op_type != "Transpose" or not isinstance(perm, tuple):
            break
        if not 0 <= axis < len(perm):
            break
        place = perm[axis]
        if type(place) is not int:
            break
        value, axis = node.inputs[0], place
    told = scope.shape_of(value)
    known = told[axis] if told is not None and axis < len(told) else None
    return known if known is not None else (value, axis)


# --- convolution ---


def _convolution(scope: Scope, node: NodeProto) -> tuple[Candidate, list[Use]] | None:
    turn = _maker(scope, node.inputs[0], "Transpose")
    widened = _maker(scope, (turn or node).inputs[0], "Unsqueeze")
    narrowed = _next(scope, node, "Squeeze")
    if widened is None or narrowed is None or any(
        scope.only_user(one.outputs[0]) is None for one in (turn, widened) if one is not None
    ):  # fmt: skip
        return None
    found = candidate_of(scope, node)
    if found is None or len(found[0].nodes) > 1:
        return None
    weight = found[0].expressions["W"]
    rank = len(weight.shape)
    added, gone = _one_axis(scope, widened, rank), _one_axis(scope, narrowed, rank)
    given = None if turn is None else turn.attributes.get("perm")
    perm = tuple(n for n in given if type(n) is int) if isinstance(given, tuple) else tuple(range(rank))
    if added is None or gone is None or gone < 2 or sorted(perm) != list(range(rank)):
        return None
    if turn is not None and given != perm:
        return None
    if perm[gone] != added or weight.shape[gone] != 1:
        return None
    config = _without(found[0].config, gone - 2, rank - 2)
    if config is None:
        return None
    shape = (*weight.shape[:gone], *weight.shape[gone + 1 :])
    found[0].config = config
    found[0].expressions["W"] = Reshaped(weight, shape)
    # The source's axes in the order in which the operator takes them.
    order = tuple(axis - (axis > added) for axis in perm if axis != added)
    inner = tuple(one for one in (widened, turn, node, narrowed) if one is not None)
    return _called(scope, found, Call(widened.inputs[0], inner, order if order != tuple(range(rank - 1)) else ()))


def _one_axis(scope: Scope, node: NodeProto, rank: int) -> int | None:
    """The one axis that a node puts in or leaves out of a value of so many."""
    axes = scope.numbers(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get("axes")
    if not isinstance(axes, tuple) or len(axes) != 1 or type(axes[0]) is not int or not -rank <= axes[0] < rank:
        return None
    return axes[0] % rank


def _without(config: Mapping[str, Any], axis: int, rank: int) -> dict[str, Any] | None:
    """The settings without one axis, on which the operator must do nothing."""
    if rank < 2 or config.get("output_shape"):
        return None
    found = dict(config)
    for name, usual in _PER_AXIS.items():
        given = found.get(name)
        if isinstance(given, tuple) and len(given) == rank:
            if given[axis] != usual and name in ("kernel_shape", "output_padding"):
                return None
            found[name] = (*given[:axis], *given[axis + 1 :])
        elif given is not None:
            return None
    pads = found.get("pads")
    if isinstance(pads, tuple):
        if len(pads) != 2 * rank or pads[axis] or pads[axis + rank]:
            return None
        found["pads"] = tuple(n for i, n in enumerate(pads) if i % rank != axis)
    strides = config.get("strides")
    if isinstance(strides, tuple) and strides[axis] != 1 and config.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    return found
