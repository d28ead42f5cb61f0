"""Operators on each element, and those that join tensors, as Keras layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neutral.conventions.keras_onnx import NOISES, NONNEGATIVE, activation_name
from neutral.errors import an
from neutral.importers.keras_builder import Builder
from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_tensor import KerasTensor
from neutral.schema.graph import Node


def changed(tensor: KerasTensor, **changes: Any) -> KerasTensor:
    return replace(tensor, **{"nonnegative": False, **changes})


def named(b: Builder, node: Node) -> list[KerasTensor]:
    """An operator that is one of Keras' activation functions."""
    name = activation_name(node.op, node.attributes)
    if name is None:
        settings = " and ".join(str(value) for value in node.attributes.values())
        raise Inexpressible(f"{an(node.op)} of {settings or 'unusual settings'}", "the settings that Keras has")
    like = changed(b.only(node), nonnegative=name in NONNEGATIVE)
    return [b.add(b.name(node), "Activation", {"activation": name}, [b.only(node).json], like)]


def number(node: Node, key: str, default: float | None = None) -> float:
    value = node.attributes.get(key, default)
    if not isinstance(value, int | float):
        raise Inexpressible(f"{key} {value!r}", "a number")
    return float(value)


def scaled(b: Builder, name: str, x: KerasTensor, scale: float, offset: float = 0.0) -> KerasTensor:
    return b.add(name, "Rescaling", {"scale": scale, "offset": offset}, [x.json], changed(x))


def relu(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.only(node)
    return [b.add(b.name(node), "ReLU", {}, [x.json], changed(x, nonnegative=True))]


def leaky_relu(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.only(node)
    slope = number(node, "alpha", 0.01)
    if slope < 0:
        raise Inexpressible(f"a negative slope of {slope}", "one of 0 or more")
    config = {"negative_slope": slope}
    return [b.add(b.name(node), "LeakyReLU", config, [x.json], changed(x))]


def elu(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.only(node)
    return [b.add(b.name(node), "ELU", {"alpha": number(node, "alpha", 1.0)}, [x.json], changed(x))]


def celu(b: Builder, node: Node) -> list[KerasTensor]:
    if activation_name(node.op, node.attributes):
        return named(b, node)
    x, alpha = b.only(node), number(node, "alpha", 1.0)
    inner = scaled(b, f"{b.name(node)}.in", x, 1 / alpha)
    unit = b.add(b.name(node), "ELU", {"alpha": 1.0}, [inner.json], changed(x))
    return [scaled(b, f"{b.name(node)}.out", unit, alpha)]


def clip(b: Builder, node: Node) -> list[KerasTensor]:
    low, high = node.attributes.get("min"), node.attributes.get("max")
    x = b.only(node)
    if low == 0 and isinstance(high, int | float) and high >= 0:
        like = changed(x, nonnegative=True)
        return [b.add(b.name(node), "ReLU", {"max_value": float(high)}, [x.json], like)]
    if low == 0 and high is None:
        return relu(b, node)
    if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
        # min + relu(x - min) up to max - min
        shifted = scaled(b, f"{b.name(node)}.shift", x, 1.0, -float(low))
        config = {"max_value": float(high) - float(low)}
        bounded = b.add(b.name(node), "ReLU", config, [shifted.json], changed(x))
        return [scaled(b, f"{b.name(node)}.back", bounded, 1.0, float(low))]
    raise Inexpressible(f"a Clip from {low} to {high}", "two bounds")


def thresholded(b: Builder, node: Node) -> list[KerasTensor]:
    x, alpha = b.only(node), number(node, "alpha", 1.0)
    if alpha < 0:
        raise Inexpressible(f"a threshold of {alpha}", "one of 0 or more")
    return [b.add(b.name(node), "ReLU", {"threshold": alpha}, [x.json], changed(x, nonnegative=True))]


def hard_sigmoid(b: Builder, node: Node) -> list[KerasTensor]:
    if activation_name(node.op, node.attributes):
        return named(b, node)
    slope, offset = number(node, "alpha", 0.2), number(node, "beta", 0.5)
    line = scaled(b, f"{b.name(node)}.line", b.only(node), slope, offset)
    like = changed(line, nonnegative=True)
    return [b.add(b.name(node), "ReLU", {"max_value": 1.0}, [line.json], like)]


def gelu(b: Builder, node: Node) -> list[KerasTensor]:
    if activation_name(node.op, node.attributes):
        return named(b, node)
    # 0.5 x (1 + tanh(u)) = x sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x^3)
    x, name, factor = b.only(node), b.name(node), 2 * math.sqrt(2 / math.pi)
    square = b.add(f"{name}.square", "Multiply", {}, [[x.json, x.json]], changed(x, nonnegative=True))
    series = scaled(b, f"{name}.series", square, factor * 0.044715, factor)
    product = b.add(f"{name}.product", "Multiply", {}, [[x.json, series.json]], changed(x))
    gate = b.add(f"{name}.gate", "Activation", {"activation": "sigmoid"}, [product.json], changed(x))
    return [b.add(name, "Multiply", {}, [[x.json, gate.json]], changed(x))]


def neg(b: Builder, node: Node) -> list[KerasTensor]:
    return [scaled(b, b.name(node), b.only(node), -1.0)]


def softmax(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.only(node)
    axis = int(number(node, "axis", -1)) % x.rank
    place = x.perm.index(axis)
    if node.op == "LogSoftmax":
        if place != x.rank - 1:
            x = b.order(x, (*(a for a in x.perm if a != axis), axis))
        named = {"activation": "log_softmax"}
        return [b.add(b.name(node), "Activation", named, [x.json], changed(x))]
    config = {"axis": -1 if place == x.rank - 1 else place}
    return [b.add(b.name(node), "Softmax", config, [x.json], changed(x, nonnegative=True))]


_NOISES: Mapping[str, tuple[str, str]] = {
    **{cls: (cls, setting) for cls, setting in NOISES.items()},
    **{f"Dropout{n}d": (f"SpatialDropout{n}D", "rate") for n in (1, 2, 3)},
}
"""The class that an Identity came from, in Keras or torch: Keras' class, and its setting."""


def identity(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.only(node)
    cls, key = _NOISES.get(str(node.attributes.get("origin")), ("", ""))
    amount = node.attributes.get(key)
    if not cls or not isinstance(amount, int | float):
        return [x]
    if cls.startswith("Spatial"):
        if x.rank != int(cls[-2]) + 2:
            return [x]
        x = b.image(x) if "channel" in b.graph.values[node.outputs[0]].axes else b.plain(x)
    return [b.add(b.name(node), cls, {key: float(amount)}, [x.json], x)]


def constant(b: Builder, node: Node) -> list[KerasTensor]:
    b.constants[node.outputs[0]] = number(node, "value_float")
    return []


def cast(b: Builder, node: Node) -> list[KerasTensor]:
    x, to = b.only(node), str(node.attributes.get("to"))
    if "float" in to and "float" not in x.dtype:
        return [replace(scaled(b, b.name(node), x, 1.0), dtype=b.dtype)]
    if x.reference[0] in {b.tensors[value].reference[0] for value in b.graph.inputs} and "int" in to:
        return [x]
    raise Inexpressible(f"a Cast from {x.dtype} to {to}", "a Cast of the model's input")
