"""Keras layers that join tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from neutral.exporters.keras_builder import Builder, Handler
from neutral.exporters.keras_calls import Call
from neutral.exporters.keras_flow import Flow, Shape, Unclear, graph_axis


def _merged(b: Builder, flows: Sequence[Flow]) -> list[Flow]:
    """Flows brought to one order of axes, that of an image if there is one."""
    if len({flow.rank for flow in flows}) > 1:
        raise Unclear("its inputs have different ranks")
    if flows[0].rank >= 3:
        if any(flow.first for flow in flows):
            return [b.channels_first(b.ordered(flow)) for flow in flows]
        pending = {flow.pending for flow in flows}
        return list(flows) if len(pending) == 1 else [b.as_is(flow) for flow in flows]
    if len({flow.channels for flow in flows}) > 1:
        return [b.ordered(flow) for flow in flows]
    return list(flows)


def _broadcast(flows: Sequence[Flow]) -> Shape:
    shape: list[int | None] = []
    for sizes in zip(*(flow.dims for flow in flows), strict=True):
        wide = {n for n in sizes if n != 1}
        if len(wide - {None}) > 1:
            raise Unclear(f"its inputs do not fit: {[list(flow.dims) for flow in flows]}")
        shape.append(1 if not wide else next(iter(wide - {None}), None))
    return tuple(shape)


def _joined(flows: Sequence[Flow], shape: Shape) -> Flow:
    return replace(
        flows[0],
        shape=shape,
        origins=frozenset().union(*(flow.origins for flow in flows)),
        trail=frozenset().union(*(flow.trail for flow in flows)),
        fixed=any(flow.fixed for flow in flows),
        masked=any(flow.masked for flow in flows),
        opaque=any(flow.opaque for flow in flows),
        joined=any(flow.joined for flow in flows),
    )


def merge(op: str) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        if len(call.inputs) < (2 if op == "Sub" else 1) or (op == "Sub" and len(call.inputs) != 2):
            raise Unclear(f"it has {len(call.inputs)} inputs")
        if any(flow.opaque for flow in call.inputs):
            return [_opaque_join(b, call.inputs)]
        flows = _merged(b, call.inputs)
        shape = _broadcast(flows)
        if flows[0].rank == 2 and any(flow.dims[1] != shape[1] for flow in flows):
            flows = [b.ordered(flow) for flow in flows]
        result = _joined(flows, shape)
        if op in ("Max", "Min", "Mean") or len(flows) <= 2:
            return [b.emit(call.path, op if len(flows) > 1 else "Identity", flows, result)]
        total = flows[0]
        for i, flow in enumerate(flows[1:], start=1):
            name = call.path if i == len(flows) - 1 else f"{call.path}.{i}"
            total = b.emit(name, op, [total, flow], replace(result, shape=_broadcast([total, flow])))
        return [total]

    return layer


def _opaque_join(b: Builder, flows: Sequence[Flow]) -> Flow:
    for flow in flows:
        b.taint(flow)
    shapes = {flow.shape for flow in flows}
    odd, joined = any(flow.odd for flow in flows), any(flow.joined for flow in flows)
    return Flow("", shapes.pop() if len(shapes) == 1 else None, opaque=True, odd=odd, joined=joined)


def concatenate(b: Builder, call: Call) -> list[Flow]:
    if any(flow.opaque for flow in call.inputs):
        return [_opaque_join(b, call.inputs)]
    if not call.inputs:
        raise Unclear("it has no inputs")
    flows = _merged(b, [b.ordered(flow) for flow in call.inputs])
    axis = call.config.get("axis", -1)
    where = graph_axis(flows[0], axis)
    sizes = [flow.dims[axis] for flow in flows]
    total = None if any(n is None for n in sizes) else sum(n for n in sizes if n is not None)
    shape = list(_broadcast([replace(flow, shape=_without(flow.dims, axis)) for flow in flows]))
    shape[axis] = total
    result = replace(_joined(flows, tuple(shape)), origins=frozenset(), fixed=True)
    return [b.emit(call.path, "Concat", flows, result, {"axis": where})]


def _without(shape: Shape, axis: int) -> Shape:
    kept = list(shape)
    kept[axis] = 1
    return tuple(kept)
