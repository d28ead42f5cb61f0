"""The nodes of the graph that stand for each operator of an ONNX model without weights: mostly the one of the same name.

>>> {"Relu", "MaxPool", "Reshape"} <= OPERATORS.keys()
True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neutral.exporters.onnx_flow import Builder, Flow, Inexpressible, Rule, broadcast, dtype_name
from neutral.exporters.onnx_shaping import SHAPING
from neutral.exporters.onnx_spatial import SPATIAL
from neutral.schema.graph import Attribute


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
        b.passed()
        return
    b.holds(x, b.make("Cast", [x], x.sizes, {"to": to}, order=x.order, dtype=to))


def _cast_like(b: Builder) -> None:
    if b.flow(b.value_of(0)).dtype != b.flow(b.value_of(1)).dtype:
        raise Inexpressible("a cast to the dtype of another value")
    b.passed()


def _joining(b: Builder) -> None:
    """Arithmetic on values, or on a value and a number."""
    node = b.node
    numbers = {name: b.scalar(name) for name in node.inputs if b.is_stored(name)}
    if any(number is None for number in numbers.values()):
        maybe = " (a batch normalization, as some exporters leave it?)" if node.op_type == "Mul" else ""
        raise Inexpressible(f"a {node.op_type} with a stored tensor of several elements that is no layer's{maybe}")
    flows = {name: b.flow(name) for name in node.inputs if name not in numbers}
    orders = {(flow.order, flow.channels) for flow in flows.values()}
    if len(orders) > 1 or len({flow.rank for flow in flows.values()}) > 1:
        flows = {name: b.plain(flow) for name, flow in flows.items()}
    first = next(iter(flows.values()))
    if any(len(b.scope.shape_of(name) or ()) > max(flow.rank for flow in flows.values()) for name in numbers):
        raise Inexpressible(f"a {node.op_type} that adds axes")
    sizes = broadcast([flow.sizes for flow in flows.values()])
    values = [
        flows[name]
        if name in flows
        else Flow(b.constant(float(numbers[name] or 0.0), first.dtype), (), first.dtype, ())
        for name in node.inputs
    ]
    if len(values) == 1:
        b.passed()
        return
    longest = max(flows.values(), key=lambda flow: flow.rank)
    y = b.make(node.op_type, values, sizes, order=longest.order, dtype=first.dtype)
    same = [flow for flow in flows.values() if flow.rank == y.rank]
    b.alike(*same, y)
    if first.channels:
        b.flows[node.outputs[0]] = Flow(y.value, y.sizes, y.dtype, y.order, first.channels)


OPERATORS: Mapping[str, Rule] = {
    **SHAPING,
    **SPATIAL,
    **dict.fromkeys(
        (
            "Abs", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sign",
            "Sin", "Softplus", "Softsign", "Sqrt", "Tanh",
        ),
        _same(),
    ),
    **dict.fromkeys(("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"), _joining),
    **dict.fromkeys(("LogSoftmax", "Softmax"), _softmax),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": _same(_float("alpha", 1.0)),
    "Clip": _clip,
    "Dropout": _dropout,
    "Elu": _same(_float("alpha", 1.0)),
    "Gelu": _same(("approximate", "none")),
    "HardSigmoid": _same(_float("alpha", 0.2), _float("beta", 0.5)),
    "Identity": Builder.passed,
    "LeakyRelu": _same(_float("alpha", 0.01)),
    "Selu": _same(_float("alpha", 1.6732631921768188), _float("gamma", 1.0507010221481323)),
    "Shrink": _same(_float("lambd", 0.5), _float("bias", 0.0)),
    "Swish": _same(_float("alpha", 1.0)),
    "ThresholdedRelu": _same(_float("alpha", 1.0)),
}  # fmt: skip
