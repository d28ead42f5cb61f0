"""The nodes of the graph that stand for the operators of an ONNX model that have weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from neutral.conventions.onnx_layers import FoundLayer
from neutral.exporters.onnx_flow import Builder, Flow, Inexpressible, Sizes, dtype_name
from neutral.exporters.onnx_spatial import windows
from neutral.schema.graph import Attribute
from neutral.schema.node_settings import equation_terms


def _shape(found: FoundLayer, local: str = "W") -> tuple[int, ...]:
    return found.tensors[local].expression.shape


def _fits(found: FoundLayer, n: int | None, wanted: int, what: str) -> None:
    if n is not None and n != wanted:
        raise Inexpressible(f"{n} {what} for a layer of {wanted}")


def _vector(b: Builder, found: FoundLayer, x: Flow, turned: Mapping[str, int], axis: str) -> Flow:
    """What a layer of features takes: a vector in the order of its weights."""
    if x.rank == 2:
        return b.joined(x, turned.get(axis, 0))
    if turned:
        raise Inexpressible("a layer behind a Flatten on a value that is no vector")
    return b.plain(x)


Turned = Mapping[str, int]
"""The channels of those axes of a layer that hold (position channel) in the model and (channel position) in its views."""


def _made(b: Builder, x: Flow, y: Flow, channels: int) -> None:
    """Tell that the features that a layer makes lie in the graph in another order than in the model."""
    if channels:
        if y.rank != 2:
            raise Inexpressible("a layer in front of a Reshape that makes no vector")
        b.flows[b.node.outputs[0]] = Flow(y.value, y.sizes, y.dtype, y.order, channels)


def _dense(b: Builder, found: FoundLayer, turned: Turned) -> None:
    if b.attribute("transA", 0):
        raise Inexpressible("a Gemm of a transposed value")
    shape = _shape(found)
    made, taken = shape if b.node.op_type == "Gemm" and b.attribute("transB", 0) else shape[::-1]
    x = _vector(b, found, b.flow(b.value_of(0)), turned, "in")
    _fits(found, x.sizes[-1], taken, "features")
    if x.rank < 2:
        raise Inexpressible("a product with a vector without a batch")
    y = b.make("Gemm", [x], (*x.sizes[:-1], made), layer=found.path)
    if x.rank > 2:
        b.alike(x, y)
    _made(b, x, y, turned.get("out", 0))


def _windowed(b: Builder, found: FoundLayer) -> tuple[Flow, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    x = b.take(b.value_of(0))
    weight = _shape(found)
    space = len(weight) - 2
    if x.rank != len(weight) or space not in (1, 2, 3):
        raise Inexpressible(f"a convolution over {space} axes of a value of {x.rank}")
    strides, dilation = (tuple(found.config.get(name) or (1,) * space) for name in ("strides", "dilations"))
    b.image(x)
    return x, weight[2:], strides, dilation


def _conv(b: Builder, found: FoundLayer, turned: Turned) -> None:
    x, k, s, d = _windowed(b, found)
    weight, space = _shape(found), len(k)
    _fits(found, x.sizes[1], weight[1] * int(found.config.get("group", 1)), "channels")
    auto = found.config.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        made = [None if n is None else -(-n // s[i]) for i, n in enumerate(x.sizes[2:])]
    else:
        pads = (0,) * (2 * space) if auto == "VALID" else tuple(found.config.get("pads") or (0,) * (2 * space))
        made = [windows(n, k[i], s[i], pads[i], pads[i + space], d[i]) for i, n in enumerate(x.sizes[2:])]
    b.image(b.make("Conv", [x], (x.sizes[0], weight[0], *made), layer=found.path))


def _conv_transpose(b: Builder, found: FoundLayer, turned: Turned) -> None:
    x, k, s, d = _windowed(b, found)
    weight, space, config = _shape(found), len(k), found.config
    _fits(found, x.sizes[1], weight[0], "channels")
    if config.get("output_shape"):
        raise Inexpressible("a ConvTranspose that names the shape it makes")
    extra = tuple(config.get("output_padding") or (0,) * space)
    auto = config.get("auto_pad", "NOTSET")
    made: list[int | None] = []
    for i, n in enumerate(x.sizes[2:]):
        if n is None:
            made.append(None)
        elif auto in ("SAME_UPPER", "SAME_LOWER"):
            made.append(n * s[i])
        else:
            pads = (0,) * (2 * space) if auto == "VALID" else tuple(config.get("pads") or (0,) * (2 * space))
            made.append((n - 1) * s[i] + d[i] * (k[i] - 1) + 1 + extra[i] - pads[i] - pads[i + space])
    channels = weight[1] * int(config.get("group", 1))
    b.image(b.make("ConvTranspose", [x], (x.sizes[0], channels, *made), layer=found.path))


def _embedding(b: Builder, found: FoundLayer, turned: Turned) -> None:
    x = b.take(b.value_of(1))
    cast = b.scope.makers.get(b.value_of(0))
    to = cast.attributes.get("to") if cast is not None and cast.op_type == "Cast" else None
    dtype = dtype_name(to) if type(to) is int else found.tensors["data"].data().dtype.name
    b.make("Gather", [x], (*x.sizes, _shape(found, "data")[1]), layer=found.path, dtype=dtype)


def _features(found: FoundLayer) -> int:
    return math.prod(next(iter(found.tensors.values())).expression.shape)


def _channel_norm(b: Builder, found: FoundLayer, turned: Turned) -> None:
    """A norm or a slope for each channel, or each element of a vector."""
    if b.attribute("training_mode", 0) or len([name for name in b.node.outputs if name]) > 1:
        raise Inexpressible("a norm that is in training")
    x = b.flow(b.value_of(0))
    x = b.joined(x, turned.get("feature", 0)) if x.rank == 2 else b.plain(x)
    if x.rank < 2:
        raise Inexpressible("a norm of a value without channels")
    if b.node.op_type != "PRelu":
        _fits(found, x.sizes[1], _features(found), "channels")
    y = b.make(b.node.op_type, [x], x.sizes, layer=found.path)
    if b.node.op_type != "PRelu" or _features(found) > 1:
        b.image(x)
    b.alike(x, y)
    _made(b, x, y, turned.get("feature", 0) if x.rank == 2 else 0)


def _last_axes_norm(b: Builder, found: FoundLayer, turned: Turned) -> None:
    if len([name for name in b.node.outputs if name]) > 1:
        raise Inexpressible("a norm that gives its mean")
    x = b.flow(b.value_of(0))
    x = b.joined(x, turned.get("feature", 0)) if x.rank == 2 else b.plain(x)
    shape = next(iter(found.tensors.values())).expression.shape
    axis = int(b.attribute("axis", -1))
    count = -axis if axis < 0 else x.rank - axis
    if count != len(shape) or count >= x.rank:
        raise Inexpressible(f"a norm over {count} axes with a scale of {len(shape)}")
    for n, wanted in zip(x.sizes[-count:], shape, strict=True):
        _fits(found, n, wanted, "features")
    y = b.make(b.node.op_type, [x], x.sizes, {"axis": -count}, layer=found.path)
    b.alike(x, y)
    _made(b, x, y, turned.get("feature", 0) if x.rank == 2 else 0)


def _einsum(b: Builder, found: FoundLayer, turned: Turned) -> None:
    equation = str(found.config["equation"])
    if equation.count(",") != 1:
        raise Inexpressible("an Einsum of several values")
    data, weights, out = equation_terms(equation)
    value = next(name for name in b.node.inputs if b.scope.constant(name) is None)
    x = b.take(value)
    sizes: dict[str, int | None] = dict(zip(weights, _shape(found), strict=True))
    extra = x.rank - len(data.replace("...", ""))
    if extra < 0 or (extra and "..." not in data) or ("..." in weights):
        raise Inexpressible(f"the equation {equation} on a value of {x.rank} axes")
    stars = [f"*{i}" for i in range(extra)]
    for letter, n in zip(_letters(data, stars), x.sizes, strict=True):
        sizes.setdefault(letter, n)
    made: Sizes = tuple(sizes[letter] for letter in _letters(out, stars))
    settings: dict[str, Attribute] = {"equation": equation, "bias_axes": str(found.config.get("bias_axes", ""))}
    b.make("Einsum", [x], made, settings, layer=found.path)


def _letters(term: str, stars: list[str]) -> list[str]:
    before, found, after = term.partition("...")
    return [*before, *(stars if found else []), *after]


WEIGHED: Mapping[str, Callable[[Builder, FoundLayer, Turned], Any]] = {
    **dict.fromkeys(("Gemm", "MatMul"), _dense),
    **dict.fromkeys(("BatchNormalization", "GroupNormalization", "InstanceNormalization", "PRelu"), _channel_norm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _last_axes_norm),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gather": _embedding,
}
