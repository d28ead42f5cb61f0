"""Keras layers that normalise, and others with one weight per channel."""

from __future__ import annotations

from dataclasses import replace

from neutral.exporters.keras_builder import Builder, Handler
from neutral.exporters.keras_calls import Call
from neutral.exporters.keras_flow import Flow, Unclear
from neutral.schema.graph import Attribute


def _last_axis_only(call: Call, flow: Flow, default: int = -1) -> None:
    axis = call.config.get("axis", default)
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    if len(axes) != 1 or axes[0] not in (-1, flow.rank - 1):
        raise Unclear(f"its axis is {axis!r}")


def channel_norm(op: str) -> Handler:
    """A layer with weights per channel, for which ONNX wants the channel axis second."""

    def layer(b: Builder, call: Call) -> list[Flow]:
        flow, kind, path = call.x, op, call.path
        if flow.shape is None or flow.opaque:
            b.vector_layer(path, flow)
            return [flow]
        attributes: dict[str, Attribute] = {}
        own: str | None = path
        if op != "PRelu":
            _last_axis_only(call, flow)
        if op == "GroupNormalization":
            flow = b.ordered(flow)
            groups = call.config.get("groups", 32)
            kind = "InstanceNormalization" if groups in (-1, flow.dims[-1]) else op
            if not any(bool(call.config.get(key, True)) for key in ("center", "scale")):
                own, attributes = None, {"epsilon": call.number("epsilon", default=1e-3)}
                attributes |= {"num_groups": groups} if kind == op else {}
        if flow.rank == 2:
            flow = b.vector_layer(path, flow)
            return [b.emit(path, kind, [flow], flow, attributes, layer=own)]
        b.split(path, flow)
        turned = flow if flow.first else b.turn(flow, True)
        pending = flow.pending
        result = b.emit(path, kind, [turned], replace(turned, pending=None), attributes, layer=own)
        return [replace(b.restore(result, flow), pending=pending)]

    return layer


def last_norm(op: str) -> Handler:
    """A layer that normalises over the last axes, in Keras' order."""

    def layer(b: Builder, call: Call) -> list[Flow]:
        flow = call.x
        if call.flag("rms_scaling"):
            raise Unclear("it has rms_scaling")
        if flow.shape is None or flow.opaque:
            b.vector_layer(call.path, flow)
            return [flow]
        axis = call.config.get("axis", -1)
        axes = sorted(a % flow.rank for a in (axis if isinstance(axis, list | tuple) else [axis]))
        if not axes or axes != list(range(flow.rank - len(axes), flow.rank)) or axes[0] == 0:
            raise Unclear(f"its axis is {axis!r}")
        attributes: dict[str, Attribute] = {"axis": -len(axes)}
        owned = op == "RMSNormalization" or any(bool(call.config.get(key, True)) for key in ("center", "scale"))
        if not owned:
            attributes["epsilon"] = call.number("epsilon", default=1e-3)
        if flow.rank == 2:
            flow = b.vector_layer(call.path, flow) if owned else flow
        elif len(axes) < 3:
            b.split(call.path, flow)
            flow = b.as_is(flow)
        elif len(axes) == flow.rank - 1:  # over the whole image: its weights have the axes of the image
            b.split(call.path, flow)
            flow = b.channels_first(flow)
        else:
            raise Unclear(f"its axis is {axis!r}")
        return [b.emit(call.path, op, [flow], flow, attributes, layer=call.path if owned else None)]

    return layer
