"""Keras' activation functions and activation layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neutral.conventions.keras_onnx import ACTIVATIONS, KERAS2_ACTIVATIONS
from neutral.exporters.keras_builder import Builder, Handler
from neutral.exporters.keras_calls import Call, dtype_of, is_foreign
from neutral.exporters.keras_flow import Flow, Unclear, graph_axis
from neutral.schema.graph import Attribute


def activation(b: Builder, name: str, spec: Any, flow: Flow, keras2: bool) -> Flow:
    """The node of an activation given by name, as a serialised function, or as a serialised layer."""
    if isinstance(spec, Mapping):
        config = spec.get("config")
        if isinstance(config, Mapping) and spec.get("class_name") in ACTIVATION_LAYERS and not is_foreign(spec):
            inner = Call(str(spec["class_name"]), name, name, config, (flow,), keras2=keras2)
            return ACTIVATION_LAYERS[inner.cls](b, inner)[0]
        plain = spec.get("class_name") == "function" and spec.get("module") in ("builtins", None)
        spec = config if plain and spec.get("registered_name") in (None, "function", config) else spec
    if spec is None or spec == "linear":
        return flow
    if spec in ("softmax", "log_softmax"):
        op = "Softmax" if spec == "softmax" else "LogSoftmax"
        return b.emit(name, op, [flow], flow, {"axis": graph_axis(flow, -1)}) if not flow.opaque else flow
    if spec == "log_sigmoid":
        for step, op in enumerate(("Neg", "Softplus", "Neg")):
            flow = b.emit(f"{name}.{step}" if step < 2 else name, op, [flow], flow)
        return flow
    known = KERAS2_ACTIVATIONS if keras2 else ACTIVATIONS
    if isinstance(spec, str) and spec in known:
        op, attributes = known[spec]
        return b.emit(name, op, [flow], flow, attributes)
    raise Unclear(f"its activation is {str(spec)[:60]!r}")


def activated(b: Builder, call: Call, flow: Flow) -> list[Flow]:
    """The result of a layer that ends in an activation of its own."""
    return [activation(b, f"{call.path}.activation", call.config.get("activation"), flow, call.keras2)]


def _relu_layer(b: Builder, call: Call) -> list[Flow]:
    slope = call.number("negative_slope", default=0.0)
    threshold = call.number("threshold", default=0.0)
    limit = None if call.config.get("max_value") is None else call.number("max_value")
    flow = call.x
    if threshold and slope:
        raise Unclear("it has a threshold and a slope")
    if threshold:
        if threshold < 0:
            raise Unclear("its threshold is negative")
        name = call.path if limit is None else f"{call.path}.threshold"
        flow = b.emit(name, "ThresholdedRelu", [flow], flow, {"alpha": threshold})
    elif slope:
        name = call.path if limit is None else f"{call.path}.leaky"
        flow = b.emit(name, "LeakyRelu", [flow], flow, {"alpha": slope})
    elif limit is None:
        return [b.emit(call.path, "Relu", [flow], flow)]
    if limit is None:
        return [flow]
    bounds: dict[str, Attribute] = {"max": limit} if slope else {"min": 0.0, "max": limit}
    return [b.emit(call.path, "Clip", [flow], flow, bounds)]


def _softmax_layer(b: Builder, call: Call) -> list[Flow]:
    flow = call.inputs[0]
    if len(call.inputs) > 1 or flow.masked:
        raise Unclear("it uses a mask")
    axis = call.config.get("axis", -1)
    if isinstance(axis, Sequence) and len(axis) == 1:
        axis = axis[0]
    if flow.opaque:
        return [flow]
    return [b.emit(call.path, "Softmax", [flow], flow, {"axis": graph_axis(flow, axis)})]


def _with_alpha(op: str, *keys: str, default: float) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        return [b.emit(call.path, op, [call.x], call.x, {"alpha": call.number(*keys, default=default)})]

    return layer


def _activation_layer(b: Builder, call: Call) -> list[Flow]:
    flow = call.inputs[0]
    if len(call.inputs) != 1:
        raise Unclear(f"it has {len(call.inputs)} inputs")
    if flow.masked and call.config.get("activation") == "softmax":
        raise Unclear("it uses a mask")
    spec = call.config.get("activation")
    if spec in (None, "linear"):
        return [b.emit(call.path, "Identity", [flow], flow)]
    return [activation(b, call.path, spec, flow, call.keras2)]


def _rescaling(b: Builder, call: Call) -> list[Flow]:
    flow = replace(call.x, dtype=dtype_of(call.config, "float32"))
    if not call.x.dtype.startswith("float"):
        flow = b.emit(f"{call.path}.cast", "Cast", [call.x], flow, {"to": flow.dtype})
    scale, offset = call.config.get("scale", 1.0), call.config.get("offset", 0.0)
    if not isinstance(scale, int | float) or not isinstance(offset, int | float):
        raise Unclear("its scale or offset is per channel")
    last = call.path if not offset else f"{call.path}.scale"
    flow = b.emit(last, "Mul", [flow, b.constant(f"{call.path}.scale", scale, flow.dtype)], flow)
    if offset:
        flow = b.emit(call.path, "Add", [flow, b.constant(f"{call.path}.offset", offset, flow.dtype)], flow)
    return [flow]


ACTIVATION_LAYERS: dict[str, Handler] = {
    "Activation": _activation_layer,
    "ReLU": _relu_layer,
    "Softmax": _softmax_layer,
    "LeakyReLU": _with_alpha("LeakyRelu", "negative_slope", "alpha", default=0.3),
    "ELU": _with_alpha("Elu", "alpha", default=1.0),
    "Rescaling": _rescaling,
    "ThresholdedReLU": _with_alpha("ThresholdedRelu", "theta", default=1.0),
}
