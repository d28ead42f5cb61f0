"""The nodes of each class of torch module: `RULES` by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neutral.exporters.torch_activations import ACTIVATIONS
from neutral.exporters.torch_builder import SPACE, Builder, Contradiction, Inexpressible, Rule, Size
from neutral.exporters.torch_description import Config, Module, ints
from neutral.schema.graph import Attribute


def _each(value: Any, rank: int) -> tuple[int, ...]:
    found = ints(value)
    return found * rank if len(found) == 1 else found


def _windows(n: int | None, k: int, s: int, before: int, after: int, d: int, ceil: bool = False) -> Size:
    if n is None:
        return Size()
    span = n + before + after - d * (k - 1) - 1
    if span < 0:
        raise Contradiction(f"its window of {d * (k - 1) + 1} is larger than {n}")
    made = -(-span // s) + 1 if ceil else span // s + 1
    return Size(made - (ceil and (made - 1) * s >= n + before))


def _linear(b: Builder, config: Config) -> None:
    b.sizes[-1].must_be(int(config["in_features"]), "features")
    b.node("Gemm", layer=True, sizes=[*b.sizes[:-1], Size(int(config["out_features"]))])


def _conv(space: int) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        b.need_image(space)
        b.sizes[1].must_be(int(config["in_channels"]), "channels")
        k, s, d = (_each(config[name], space) for name in ("kernel_size", "stride", "dilation"))
        padding = config["padding"]
        pairs = [(0, 0)] * space
        if padding == "same":
            totals = [d[i] * (k[i] - 1) for i in range(space)]
            pairs = [(total // 2, total - total // 2) for total in totals]
        elif not isinstance(padding, str):
            pairs = [(p, p) for p in _each(padding, space)]
        made = [_windows(b.sizes[i + 2].n, k[i], s[i], *pairs[i], d[i]) for i in range(space)]
        b.node("Conv", layer=True, sizes=[b.sizes[0], Size(int(config["out_channels"])), *made])

    return rule


def _conv_transpose(space: int) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        b.need_image(space)
        b.sizes[1].must_be(int(config["in_channels"]), "channels")
        k, s, d, p, extra = (
            _each(config[name], space) for name in ("kernel_size", "stride", "dilation", "padding", "output_padding")
        )
        made = []
        for i in range(space):
            n = b.sizes[i + 2].n
            full = None if n is None else (n - 1) * s[i] - 2 * p[i] + d[i] * (k[i] - 1) + extra[i] + 1
            made.append(Size(full))
        b.node("ConvTranspose", layer=True, sizes=[b.sizes[0], Size(int(config["out_channels"])), *made])

    return rule


def _batch_norm(space: int) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        if not (space == 1 and b.rank == 2):
            b.need_image(space)
        if config.get("track_running_stats", True) is False:
            raise Inexpressible("a BatchNorm without running statistics depends on the batch")
        b.sizes[1].must_be(int(config["num_features"]), "features")
        b.node("BatchNormalization", layer=True)

    return rule


def _instance_norm(space: int) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        b.need_image(space)
        b.sizes[1].must_be(int(config["num_features"]), "channels")
        owns = bool(config.get("affine")) or bool(config.get("track_running_stats"))
        b.node("InstanceNormalization", {} if owns else {"epsilon": float(config["eps"])}, layer=owns)

    return rule


def _last_axes_norm(op: str) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        shape = ints(config["normalized_shape"])
        if len(shape) >= b.rank:
            raise Contradiction(f"it takes {len(shape) + 1} axes or more")
        for size, n in zip(b.sizes[-len(shape) :], shape, strict=True):
            size.must_be(n, "features")
        owns = bool(config.get("elementwise_affine", True))
        # torch reads eps=None as the smallest step of the input's dtype.
        eps = 2.0**-23 if config.get("eps") is None else float(config["eps"])
        b.node(op, {} if owns else {"axis": -len(shape), "epsilon": eps}, layer=owns)

    return rule


def _group_norm(b: Builder, config: Config) -> None:
    if b.axes[1] not in ("channel", "feature"):
        raise Contradiction(f"it takes (batch, channel, ...), not {b.axes}")
    b.sizes[1].must_be(int(config["num_channels"]), "channels")
    owns = bool(config.get("affine", True))
    attributes = {} if owns else {"num_groups": int(config["num_groups"]), "epsilon": float(config["eps"])}
    b.node("GroupNormalization", attributes, layer=owns)


def _prelu(b: Builder, config: Config) -> None:
    slopes = int(config.get("num_parameters", 1))
    if slopes > 1:
        if b.axes[1] not in ("channel", "feature"):
            raise Contradiction(f"it takes (batch, channel, ...), not {b.axes}")
        b.sizes[1].must_be(slopes, "channels")
    b.node("PRelu", layer=True)


def _embedding(b: Builder, config: Config) -> None:
    if b.nodes and not all(node.op == "Identity" for node in b.nodes):
        raise Inexpressible("an Embedding of computed numbers has no counterpart elsewhere")
    if config.get("max_norm") is not None:
        raise Inexpressible("an Embedding with max_norm changes its rows when they are looked up")
    if b.rank != 2:
        raise Contradiction("it takes (batch, time)")
    b.node(
        "Gather",
        layer=True,
        axes=("batch", "time", "feature"),
        sizes=[*b.sizes, Size(int(config["embedding_dim"]))],
    )


def _max_pool(space: int) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        b.need_image(space)
        if config.get("return_indices"):
            raise Inexpressible("a pooling that returns indices makes two values")
        d = _each(config.get("dilation", 1), space)
        _pool(b, "MaxPool", config, space, d, {"dilations": d})

    return rule


def _avg_pool(space: int) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        b.need_image(space)
        if config.get("divisor_override") is not None:
            raise Inexpressible("divisor_override makes an AvgPool that is no average")
        counted = {"count_include_pad": int(bool(config.get("count_include_pad", True)))}
        _pool(b, "AveragePool", config, space, (1,) * space, counted)

    return rule


def _pool(b: Builder, op: str, config: Config, space: int, d: Sequence[int], more: Mapping[str, Attribute]) -> None:
    k = _each(config["kernel_size"], space)
    stride = config.get("stride")
    s = k if stride is None else _each(stride, space)
    p = _each(config.get("padding", 0), space)
    ceil = bool(config.get("ceil_mode", False))
    made = [_windows(b.sizes[i + 2].n, k[i], s[i], p[i], p[i], d[i], ceil) for i in range(space)]
    attributes = {"kernel_shape": k, "strides": s, "pads": (*p, *p), "ceil_mode": int(ceil), **more}
    b.node(op, attributes, sizes=[*b.sizes[:2], *made])


def _adaptive_pool(space: int, kind: str) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        b.need_image(space)
        if config.get("return_indices"):
            raise Inexpressible("a pooling that returns indices makes two values")
        asked = config["output_size"]
        wanted = (asked,) * space if asked is None or isinstance(asked, int) else tuple(asked)
        given = [size.n for size in b.sizes[2:]]
        if all(n == 1 for n in wanted):
            b.node(f"Global{kind}", sizes=[*b.sizes[:2], *(Size(1) for _ in wanted)])
            return
        made = [g if w is None else int(w) for w, g in zip(wanted, given, strict=True)]
        if all(m and g and g % m == 0 for m, g in zip(made, given, strict=True)):
            k = tuple((g or 0) // (m or 1) for m, g in zip(made, given, strict=True))
            attributes: dict[str, Attribute] = {"kernel_shape": k, "strides": k, "pads": (0,) * (2 * space)}
            b.node(kind, attributes, sizes=[*b.sizes[:2], *map(Size, made)])
            return
        raise Inexpressible(f"an adaptive pooling to {wanted} depends on the size of its input")

    return rule


def _flatten(b: Builder, config: Config) -> None:
    start, end = (int(config.get(name, default)) for name, default in (("start_dim", 1), ("end_dim", -1)))
    start, end = (i + b.rank if i < 0 else i for i in (start, end))
    if start == 0 and end > 0:
        raise Inexpressible("a Flatten that joins the batch axis mixes the samples")
    if end >= b.rank:
        raise Contradiction(f"it takes {end + 1} axes or more")
    if start == 1 and end == b.rank - 1:
        joined = b.sizes[1] if b.rank == 2 else Size(parts=b.sizes[1:])
        b.node("Flatten", {"axis": 1}, axes=("batch", "feature"), sizes=[b.sizes[0], joined])
        return
    if start >= end:
        b.node("Identity")
        return
    joined = Size(parts=b.sizes[start : end + 1])
    sizes = [*b.sizes[:start], joined, *b.sizes[end + 1 :]]
    if b.axes[1] != "channel" or start == 1:
        raise Inexpressible(f"a Flatten from axis {start} to {end} makes axes without a meaning")
    _reshape(b, ("batch", "channel", *SPACE[len(sizes) - 2]), sizes, joined=start)


def _reshape(b: Builder, axes: tuple[str, ...], sizes: list[Size], joined: int) -> None:
    """A Reshape in which at most the axis `joined` is not written as a number or kept in its place."""
    shape = [size.n if size.n is not None else -1 if i == joined else 0 for i, size in enumerate(sizes)][1:]
    kept = all(n != 0 or sizes[i + 1] is b.sizes[i + 1] for i, n in enumerate(shape))
    if not kept:
        raise Inexpressible("the sizes that it keeps are not known")
    b.node("Reshape", {"shape": tuple(shape)}, axes=axes, sizes=sizes)


def _unflatten(b: Builder, config: Config) -> None:
    dim = config["dim"]
    if not isinstance(dim, int):
        raise Inexpressible("named axes have no counterpart elsewhere")
    dim = dim + b.rank if dim < 0 else dim
    sizes = ints(config["unflattened_size"])
    if b.rank != 2 or dim != 1 or not 2 <= len(sizes) <= 4:
        raise Inexpressible(f"an Unflatten of axis {dim} of {b.rank} makes axes without a meaning")
    if -1 in sizes and b.sizes[1].n is not None:
        rest = b.sizes[1].n // max(1, math.prod(n for n in sizes if n != -1))
        sizes = tuple(rest if n == -1 else n for n in sizes)
    if -1 not in sizes:
        b.sizes[1].must_be(math.prod(sizes), "features")
    axes = ("batch", "channel", *SPACE[len(sizes) - 1])
    made = [b.sizes[0], *(Size(None if n == -1 else n) for n in sizes)]
    b.node("Reshape", {"shape": sizes}, axes=axes, sizes=made)


_RESIZE: dict[str, tuple[str, dict[str, Attribute]]] = {
    "nearest": ("nearest", {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    "nearest-exact": ("nearest", {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}),
    **dict.fromkeys(("linear", "bilinear", "trilinear"), ("linear", {"coordinate_transformation_mode": "half_pixel"})),
    "bicubic": ("cubic", {"coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75}),
}


def _upsample(b: Builder, config: Config) -> None:
    if b.axes[1] != "channel":
        raise Contradiction(f"it takes (batch, channel, ...), not {b.axes}")
    mode, attributes = _RESIZE[str(config["mode"])]
    if config["mode"] in ("linear", "bilinear", "trilinear", "bicubic"):
        b.need_image({"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}[str(config["mode"])])
    if config.get("align_corners"):
        attributes = {**attributes, "coordinate_transformation_mode": "align_corners"}
    size, scale = config.get("size"), config.get("scale_factor")
    if size is not None:
        wanted = _each(size, b.space)
        made = [Size(n) for n in wanted]
        b.node("Resize", {"mode": mode, **attributes, "sizes": wanted}, sizes=[*b.sizes[:2], *made])
        return
    if config.get("recompute_scale_factor"):
        raise Inexpressible("recompute_scale_factor makes the factor depend on the size of the input")
    factors = (scale,) * b.space if isinstance(scale, int | float) else tuple(scale or ())
    factors = tuple(float(f) for f in factors)
    made = [
        Size(None if size.n is None else math.floor(size.n * f)) for size, f in zip(b.sizes[2:], factors, strict=True)
    ]
    b.node("Resize", {"mode": mode, **attributes, "scales": (1.0, 1.0, *factors)}, sizes=[*b.sizes[:2], *made])


def _pad(mode: str, space: int) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        b.need_image(space)
        flat = _each(config["padding"], 2 * space)
        # torch lists the last axis first.
        pairs = [(flat[2 * i], flat[2 * i + 1]) for i in reversed(range(space))]
        pads = (0, 0, *(p for p, _ in pairs), 0, 0, *(p for _, p in pairs))
        attributes: dict[str, Attribute] = {"mode": mode, "pads": pads}
        if mode == "constant":
            attributes["value"] = float(config.get("value", 0.0))
        made = [
            Size(None if size.n is None else size.n + sum(pair)) for size, pair in zip(b.sizes[2:], pairs, strict=True)
        ]
        b.node("Pad", attributes, sizes=[*b.sizes[:2], *made])

    return rule


def _pixel_shuffle(b: Builder, config: Config) -> None:
    b.need_image(2)
    factor = int(config["upscale_factor"])
    channels = b.sizes[1].n
    if channels is not None and channels % factor**2:
        raise Contradiction(f"{channels} channels cannot be shuffled by {factor}")
    made = [None if channels is None else channels // factor**2]
    made += [None if size.n is None else size.n * factor for size in b.sizes[2:]]
    b.node("DepthToSpace", {"blocksize": factor, "mode": "CRD"}, sizes=[b.sizes[0], *map(Size, made)])


def _local_response_norm(b: Builder, config: Config) -> None:
    if b.axes[1] != "channel":
        raise Contradiction(f"it takes (batch, channel, ...), not {b.axes}")
    if int(config["size"]) % 2 == 0:
        raise Inexpressible("torch places an even window one channel away from where ONNX does")
    b.node(
        "LRN",
        {
            "size": int(config["size"]),
            "alpha": float(config["alpha"]),
            "beta": float(config["beta"]),
            "bias": float(config["k"]),
        },
    )


def _glu(b: Builder, config: Config) -> None:
    axis = int(config.get("dim", -1)) % b.rank
    whole = b.sizes[axis].n
    if axis == 0 or whole is None or whole % 2:
        raise Inexpressible("a GLU over an axis of unknown or odd size cannot be cut in halves")
    before, sizes = b.value, [*b.sizes[:axis], Size(whole // 2), *b.sizes[axis + 1 :]]
    halves = ((0, whole // 2, "value"), (whole // 2, whole, "gate"))
    names = []
    for start, end, suffix in halves:
        cut = {"starts": (start,), "ends": (end,), "axes": (axis,)}
        names.append(b.node("Slice", cut, sizes=sizes, inputs=(before,), suffix=suffix))
    gate = b.node("Sigmoid", suffix="sigmoid")
    b.node("Mul", inputs=(names[0], gate))


RULES: dict[str, Rule] = {
    **ACTIVATIONS,
    **{f"Conv{n}d": _conv(n) for n in SPACE},
    **{f"ConvTranspose{n}d": _conv_transpose(n) for n in SPACE},
    **{f"BatchNorm{n}d": _batch_norm(n) for n in SPACE},
    **{f"InstanceNorm{n}d": _instance_norm(n) for n in SPACE},
    **{f"MaxPool{n}d": _max_pool(n) for n in SPACE},
    **{f"AvgPool{n}d": _avg_pool(n) for n in SPACE},
    **{f"AdaptiveAvgPool{n}d": _adaptive_pool(n, "AveragePool") for n in SPACE},
    **{f"AdaptiveMaxPool{n}d": _adaptive_pool(n, "MaxPool") for n in SPACE},
    **{f"ZeroPad{n}d": _pad("constant", n) for n in SPACE},
    **{f"ConstantPad{n}d": _pad("constant", n) for n in SPACE},
    **{f"ReflectionPad{n}d": _pad("reflect", n) for n in SPACE},
    **{f"ReplicationPad{n}d": _pad("edge", n) for n in SPACE},
    **{f"CircularPad{n}d": _pad("wrap", n) for n in SPACE},
    "Embedding": _embedding,
    "Flatten": _flatten,
    "GLU": _glu,
    "GroupNorm": _group_norm,
    "LayerNorm": _last_axes_norm("LayerNormalization"),
    "Linear": _linear,
    "LocalResponseNorm": _local_response_norm,
    "PReLU": _prelu,
    "PixelShuffle": _pixel_shuffle,
    "RMSNorm": _last_axes_norm("RMSNormalization"),
    "Unflatten": _unflatten,
    **dict.fromkeys(("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"), _upsample),
}


def add_module(builder: Builder, module: Module) -> None:
    """Add the nodes of a module, or raise what keeps it out of a graph."""
    builder.module = module
    if module.altered:
        raise Inexpressible(module.altered)
    rule = RULES.get(module.cls)
    if rule is None:
        raise Inexpressible(f"{module.cls or 'the module'} is not an operator that neutral knows")
    rule(builder, module.config)
