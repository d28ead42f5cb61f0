"""Keras layers that work on spatial axes: convolutions, pooling, borders, upsampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from neutral.exporters.keras_activations import activated
from neutral.exporters.keras_builder import Builder, Handler
from neutral.exporters.keras_calls import Call
from neutral.exporters.keras_flow import Flow, Shape, Unclear
from neutral.exporters.keras_reshaping import vector
from neutral.schema.graph import Attribute

_TO_THE_END = (1 << 31) - 1


def _window(n: int | None, k: int, s: int, d: int, padding: str) -> int | None:
    if n is None:
        return None
    if padding in ("same", "causal"):
        return -(-n // s)
    size = (n - d * (k - 1) - 1) // s + 1
    if size < 1:
        raise Unclear(f"its window does not fit into {n} positions")
    return size


def _spatial(b: Builder, call: Call, rank: int) -> Flow:
    """The input of a layer that works on `rank` spatial axes."""
    if call.config.get("data_format") == "channels_first":
        raise Unclear("it has channels first")
    flow = b.ordered(call.x)
    if flow.rank != rank + 2:
        raise Unclear(f"its input has rank {flow.rank}")
    return b.channels_first(flow)


def _resized(flow: Flow, sizes: Sequence[int | None]) -> Flow:
    """The flow with other spatial sizes."""
    return replace(flow, shape=(flow.dims[0], *sizes, flow.dims[-1]), masked=False)


def _padding(call: Call, *allowed: str) -> str:
    padding = call.config.get("padding", "valid")
    if padding not in allowed:
        raise Unclear(f"its padding is {padding!r}")
    return str(padding)


def _sizes(call: Call, flow: Flow, rank: int, padding: str) -> Shape:
    kernel, strides = call.pair("kernel_size", rank), call.pair("strides", rank, 1)
    dilation = call.pair("dilation_rate", rank, 1)
    return tuple(
        _window(n, k, max(s, 1), d, padding) for n, k, s, d in zip(flow.space, kernel, strides, dilation, strict=True)
    )


def _convolution(b: Builder, call: Call, rank: int, channels: Callable[[Flow], int], *paddings: str) -> list[Flow]:
    flow = _spatial(b, call, rank)
    sizes = _sizes(call, flow, rank, _padding(call, *paddings))
    result = Flow("", (flow.dims[0], *sizes, channels(flow)), True, dtype=call.dtype(flow))
    result = b.emit(call.path, "Conv", [flow], result, layer=call.path)
    return activated(b, call, result)


def conv(rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        return _convolution(b, call, rank, lambda flow: call.positive("filters"), "valid", "same", "causal")

    return layer


def depthwise_conv(rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        return _convolution(
            b, call, rank, lambda flow: flow.features * call.positive("depth_multiplier"), "valid", "same"
        )

    return layer


def separable_conv(rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        sizes = _sizes(call, flow, rank, _padding(call, "valid", "same", "causal"))
        channels, dtype = flow.features * call.positive("depth_multiplier"), call.dtype(flow)
        middle = Flow("", (flow.dims[0], *sizes, channels), True, dtype=dtype)
        depthwise, pointwise = f"{call.path}.depthwise", f"{call.path}.pointwise"
        middle = b.emit(depthwise, "Conv", [flow], middle, layer=depthwise)
        result = replace(middle, shape=(*middle.dims[:-1], call.positive("filters")))
        result = b.emit(pointwise, "Conv", [middle], result, layer=pointwise)
        return activated(b, call, result)

    return layer


def conv_transpose(rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        padding = _padding(call, "valid", "same")
        kernel, strides = call.pair("kernel_size", rank), call.pair("strides", rank, 1)
        dilation = call.pair("dilation_rate", rank, 1)
        extra: Sequence[int | None] = [None] * rank
        if call.config.get("output_padding") is not None:
            extra = call.pair("output_padding", rank)
        sizes: list[int | None] = []
        for n, k, s, d, o in zip(flow.space, kernel, strides, dilation, extra, strict=True):
            span = d * (k - 1) + 1
            if n is None:
                sizes.append(None)
            elif padding == "same":
                sizes.append(n * s if o is None else (n - 1) * s + span % 2 + o)
            else:
                sizes.append((n - 1) * s + span + (max(s - span, 0) if o is None else o))
        result = Flow("", (flow.dims[0], *sizes, call.positive("filters")), True, dtype=call.dtype(flow))
        result = b.emit(call.path, "ConvTranspose", [flow], result, layer=call.path)
        return activated(b, call, result)

    return layer


def pool(op: str, rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        padding = _padding(call, "valid", "same")
        size = call.pair("pool_size", rank, 2)
        strides = call.pair("strides", rank) if call.config.get("strides") is not None else size
        sizes = [_window(n, k, max(s, 1), 1, padding) for n, k, s in zip(flow.space, size, strides, strict=True)]
        attributes: dict[str, Attribute] = {"kernel_shape": size, "strides": strides, "ceil_mode": 0}
        if padding == "same":
            attributes["auto_pad"] = "SAME_UPPER"
        else:
            attributes["pads"] = (0,) * (2 * rank)
        if op == "AveragePool":
            attributes["count_include_pad"] = 0
        return [b.emit(call.path, op, [flow], _resized(flow, sizes), attributes)]

    return layer


def global_pool(op: str, rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        if call.x.masked and op == "GlobalAveragePool":
            raise Unclear("it uses a mask")
        flow = _spatial(b, call, rank)
        pooled = _resized(flow, (1,) * rank)
        if call.flag("keepdims"):
            return [b.emit(call.path, op, [flow], pooled)]
        pooled = b.emit(f"{call.path}.pool", op, [flow], pooled)
        return [b.emit(call.path, "Flatten", [pooled], vector(pooled, pooled.dims[-1]), {"axis": 1})]

    return layer


def _borders(call: Call, key: str, rank: int) -> list[tuple[int, int]]:
    value = call.config.get(key, 1)
    if isinstance(value, int):
        value = [value] * rank if rank > 1 else [[value, value]]
    if rank == 1 and len(value) == 2 and all(isinstance(n, int) for n in value):
        value = [value]
    pairs = [(n, n) if isinstance(n, int) else tuple(n) for n in value]
    if len(pairs) != rank or not all(len(p) == 2 and all(isinstance(n, int) and n >= 0 for n in p) for p in pairs):
        raise Unclear(f"its {key} is {value!r}")
    return [(p[0], p[1]) for p in pairs]


def zero_padding(rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        pairs = _borders(call, "padding", rank)
        pads = (0, 0, *(p for p, _ in pairs), 0, 0, *(q for _, q in pairs))
        result = _resized(flow, [None if n is None else n + p + q for n, (p, q) in zip(flow.space, pairs, strict=True)])
        return [b.emit(call.path, "Pad", [flow], result, {"mode": "constant", "pads": pads, "value": 0.0})]

    return layer


def cropping(rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        pairs = _borders(call, "cropping", rank)
        result = _resized(flow, [None if n is None else n - p - q for n, (p, q) in zip(flow.space, pairs, strict=True)])
        if any(n is not None and n < 1 for n in result.space):
            raise Unclear("it leaves nothing")
        attributes: dict[str, Attribute] = {
            "axes": tuple(range(2, rank + 2)),
            "starts": tuple(p for p, _ in pairs),
            "ends": tuple(-q if q else _TO_THE_END for _, q in pairs),
        }
        return [b.emit(call.path, "Slice", [flow], result, attributes)]

    return layer


_RESIZE: dict[str, dict[str, Attribute]] = {
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
}


def upsampling(rank: int) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        factors = call.pair("size", rank, 2)
        mode = call.config.get("interpolation", "nearest")
        if mode not in _RESIZE:
            raise Unclear(f"its interpolation is {mode!r}")
        sizes = [None if n is None else n * f for n, f in zip(flow.space, factors, strict=True)]
        attributes: dict[str, Attribute] = {**_RESIZE[mode], "scales": (1.0, 1.0, *(float(f) for f in factors))}
        return [b.emit(call.path, "Resize", [flow], _resized(flow, sizes), attributes)]

    return layer
