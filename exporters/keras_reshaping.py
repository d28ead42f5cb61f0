"""Keras layers that rearrange elements."""

from __future__ import annotations

import math
from dataclasses import replace

from neutral.conventions.keras_onnx import known_product
from neutral.exporters.keras_builder import Builder
from neutral.exporters.keras_calls import Call
from neutral.exporters.keras_flow import Flow, Shape, Unclear, graph_axis
from neutral.schema.graph import Attribute


def vector(flow: Flow, size: int | None) -> Flow:
    return Flow("", (flow.dims[0], size), dtype=flow.dtype)


def flatten(b: Builder, call: Call) -> list[Flow]:
    flow = call.x
    if call.config.get("data_format") == "channels_first":
        raise Unclear("it has channels first")
    if flow.opaque or flow.shape is None:
        joined = flow.joined or (flow.odd and (flow.shape is None or flow.rank > 2))
        shape = None if flow.shape is None else (flow.dims[0], known_product(flow.dims[1:]))
        return [replace(flow, shape=shape, joined=joined)]
    if flow.rank == 1:
        raise Unclear("its input has no axis but the batch")
    if flow.rank == 2:
        return [b.emit(call.path, "Flatten", [flow], flow, {"axis": 1})]
    return [_to_vector(b, call.path, flow, "Flatten", {"axis": 1})]


def _to_vector(b: Builder, path: str, flow: Flow, op: str, attributes: dict[str, Attribute]) -> Flow:
    """A Flatten. The permutation of an image is left to the layers behind it, where they can take it."""
    if flow.turned and not flow.first:
        flow = b.turn(flow, True)
    positions, channels = known_product(flow.dims[1:-1]), flow.dims[-1]
    size = None if positions is None or channels is None else positions * channels
    key = f"flatten:{path}"
    many = 1 not in (positions, channels)
    result = replace(
        vector(flow, size), joined=flow.joined or (flow.first and many), pixels=flow.pixels and not flow.first and many
    )
    if flow.first and 1 not in (positions, channels):
        if key in b.decisions.denied or channels is None:
            flow = b.as_is(flow)
        else:
            result = replace(result, channels=channels, origins=frozenset({key}), fixed=False)
    if not flow.first:
        flow = b.as_is(flow)
    return b.emit(path, op, [flow], result, attributes)


def _target_shape(call: Call, flow: Flow) -> Shape:
    target = call.config.get("target_shape")
    if (
        not isinstance(target, list | tuple)
        or not all(isinstance(n, int) for n in target)
        or list(target).count(-1) > 1
    ):
        raise Unclear(f"its target_shape is {target!r}")
    total, known = known_product(flow.dims[1:]), math.prod(n for n in target if n != -1)
    if total is not None and (known == 0 or total % known or (-1 not in target and total != known)):
        raise Unclear(f"its target_shape {target!r} does not fit {list(flow.dims[1:])!r}")
    inferred = None if total is None else total // known
    return (flow.dims[0], *(inferred if n == -1 else n for n in target))


def reshape(b: Builder, call: Call) -> list[Flow]:
    flow = call.x
    if flow.opaque:
        return [replace(flow, shape=None, joined=flow.joined or flow.odd)]
    shape = _target_shape(call, flow)
    wanted = tuple(-1 if n is None else n for n in shape[1:])
    if len(shape) == 2 and flow.rank > 2:
        return [_to_vector(b, call.path, flow, "Reshape", {"shape": wanted})]
    key, line = f"reshape:{call.path}", flow.rank == 2 and len(shape) == 3
    spatial = len(shape) in (4, 5) or (line and b.decisions.natures.get(key) == "spatial")
    if flow.rank == 2 and spatial and shape[-1] is not None:
        positions, channels = known_product(shape[1:-1]), shape[-1]
        if flow.channels == channels or 1 in (positions, channels):
            flow = flow if flow.channels == channels else b.ordered(flow)
            result = Flow("", shape, True, dtype=flow.dtype)
            return [b.emit(call.path, "Reshape", [flow], result, {"shape": (wanted[-1], *wanted[:-1])})]
        if not flow.channels and not flow.fixed and not flow.origins & b.decisions.denied:
            b.decisions.order(flow.origins, channels)
    flow = b.as_is(flow)
    result = Flow("", shape, pending=key if line and key not in b.decisions.natures else None, dtype=flow.dtype)
    return [b.emit(call.path, "Reshape", [flow], result, {"shape": wanted})]


def permute(b: Builder, call: Call) -> list[Flow]:
    dims = call.config.get("dims")
    flow = b.ordered(call.x)
    if not isinstance(dims, list | tuple) or sorted(dims) != list(range(1, flow.rank)):
        raise Unclear(f"its dims are {dims!r}")
    if flow.pending is not None:
        b.decisions.nature(flow.pending, "sequence")
    perm = (0, *dims)
    graph_perm = tuple(graph_axis(flow, axis) for axis in perm)
    result = Flow("", tuple(flow.dims[axis] for axis in perm), dtype=flow.dtype)
    return [b.emit(call.path, "Transpose", [flow], result, {"perm": graph_perm})]


def repeat_vector(b: Builder, call: Call) -> list[Flow]:
    flow, count = b.as_is(call.x), call.positive("n")
    if flow.rank != 2:
        raise Unclear(f"its input has rank {flow.rank}")
    batch, size = flow.dims
    once = Flow("", (batch, 1, size), dtype=flow.dtype)
    once = b.emit(f"{call.path}.unsqueeze", "Unsqueeze", [flow], once, {"axes": (1,)})
    result = replace(once, shape=(batch, count, size))
    return [b.emit(call.path, "Expand", [once], result, {"shape": (1, count, 1)})]
