"""The nodes of the graph that stand for operators over the space of images: pooling, borders, resizing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from neutral.containers.onnx_constants import forward
from neutral.exporters.onnx_flow import Builder, Flow, Inexpressible, Rule
from neutral.schema.graph import Attribute


def windows(n: int | None, k: int, s: int, before: int, after: int, d: int = 1, ceil: bool = False) -> int | None:
    """How many windows an axis of n elements has."""
    if n is None:
        return None
    span = n + before + after - d * (k - 1) - 1
    if span < 0:
        raise Inexpressible(f"a window of {d * (k - 1) + 1} on {n} elements")
    made = -(-span // s) + 1 if ceil else span // s + 1
    return made - (ceil and (made - 1) * s >= n + before)


def _per_axis(b: Builder, name: str, rank: int, default: int) -> tuple[int, ...]:
    value = b.attribute(name)
    if value is None:
        return (default,) * rank
    if not isinstance(value, tuple) or len(value) != rank:
        raise Inexpressible(f"{name} {value} for {rank} axes")
    return value


def _spatial(b: Builder) -> Flow:
    x = b.take(b.value_of(0))
    if x.rank not in (3, 4, 5):
        raise Inexpressible(f"a {b.node.op_type} of a value of {x.rank} axes")
    b.image(x)
    return x


def _pool(b: Builder) -> None:
    if len([name for name in b.node.outputs if name]) > 1:
        raise Inexpressible("a pooling that gives indices")
    x = _spatial(b)
    space = x.rank - 2
    k, s, d = (_per_axis(b, name, space, 1) for name in ("kernel_shape", "strides", "dilations"))
    auto = b.attribute("auto_pad", "NOTSET")
    ceil = bool(b.attribute("ceil_mode", 0))
    settings: dict[str, Attribute] = {"kernel_shape": k, "strides": s, "ceil_mode": int(ceil)}
    if b.node.op_type == "MaxPool":
        settings["dilations"] = d
    else:
        settings["count_include_pad"] = int(b.attribute("count_include_pad", 0))
        if any(n != 1 for n in d):
            raise Inexpressible("an average over every second position")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        if any(n != 1 for n in d):
            raise Inexpressible("automatic padding of dilated windows")
        settings["auto_pad"] = auto
        made = [None if n is None else -(-n // s[i]) for i, n in enumerate(x.sizes[2:])]
    else:
        pads = (0,) * (2 * space) if auto == "VALID" else _per_axis(b, "pads", 2 * space, 0)
        settings["pads"] = pads
        made = [windows(n, k[i], s[i], pads[i], pads[i + space], d[i], ceil) for i, n in enumerate(x.sizes[2:])]
    b.image(b.make(b.node.op_type, [x], (*x.sizes[:2], *made), settings))


def _global_pool(b: Builder) -> None:
    x = _spatial(b)
    b.image(b.make(b.node.op_type, [x], (*x.sizes[:2], *(1 for _ in x.sizes[2:]))))


_PAD_MODES = ("constant", "reflect", "edge", "wrap")


def _pad(b: Builder) -> None:
    x = b.take(b.value_of(0))
    pads = b.known(1, "pads", "pads")
    axes = b.known(3, "", "axes")
    mode = str(b.attribute("mode", "constant"))
    value = b.scalar(b.value_of(2)) if b.value_of(2) else float(b.attribute("value", 0.0))
    if pads is None or mode not in _PAD_MODES or (mode == "constant" and value is None):
        raise Inexpressible(f"a Pad of mode {mode} that is computed")
    axes = tuple(range(x.rank)) if axes is None else tuple(axis % x.rank for axis in axes)
    if len(pads) != 2 * len(axes) or any(n < 0 for n in pads):
        raise Inexpressible(f"pads {pads}")
    whole = [0] * (2 * x.rank)
    for i, axis in enumerate(axes):
        whole[axis], whole[axis + x.rank] = pads[i], pads[i + len(axes)]
    settings: dict[str, Attribute] = {"mode": mode, "pads": tuple(whole)}
    if mode == "constant":
        settings["value"] = value
    sizes = tuple(None if n is None else n + whole[i] + whole[i + x.rank] for i, n in enumerate(x.sizes))
    b.alike(x, b.make("Pad", [x], sizes, settings))


_ODD_RESIZE = (("exclude_outside", 0), ("antialias", 0), ("keep_aspect_ratio_policy", "stretch"))


def _resize(b: Builder) -> None:
    x = _spatial(b)
    for name, usual in _ODD_RESIZE:
        if b.attribute(name, usual) != usual:
            raise Inexpressible(f"a Resize with {name}")
    mode = str(b.attribute("mode", "nearest"))
    old = b.node.op_type == "Upsample" or b.scope.opset < 11
    settings: dict[str, Attribute] = {"mode": "linear" if mode.endswith("linear") else mode}
    # Before opset 11 there was one way alone.
    where = str(b.attribute("coordinate_transformation_mode", "asymmetric" if old else "half_pixel"))
    if where == "pytorch_half_pixel":
        where = "half_pixel"  # they differ in an axis of one position alone, which is refused below
    settings["coordinate_transformation_mode"] = where
    if settings["mode"] == "nearest":
        settings["nearest_mode"] = str(b.attribute("nearest_mode", "floor" if old else "round_prefer_floor"))
    if settings["mode"] == "cubic":
        settings["cubic_coeff_a"] = float(b.attribute("cubic_coeff_a", -0.75))
    places = (None, 1, None) if old else (1, 2, 3)
    scales = _scales(b, 1 if old else 2, "scales")
    sizes = None if old or scales is not None else b.known(places[2] or 3, "", "sizes")
    axes = tuple(axis % x.rank for axis in b.attribute("axes") or range(x.rank))
    if scales is not None:
        factors = [1.0] * x.rank
        for axis, factor in zip(axes, scales, strict=True):
            factors[axis] = factor
        if factors[:2] != [1.0, 1.0]:
            raise Inexpressible("a Resize of batch or channels")
        settings["scales"] = tuple(factors)
        made = [None if n is None else math.floor(n * f) for n, f in zip(x.sizes[2:], factors[2:], strict=True)]
    elif sizes is not None:
        wanted = list(x.sizes)
        for axis, size in zip(axes, sizes, strict=True):
            wanted[axis] = size
        if wanted[1] != x.sizes[1] or None in wanted[2:]:
            raise Inexpressible("a Resize of batch or channels")
        made = wanted[2:]
        settings["sizes"] = tuple(n for n in made if n is not None)
    else:
        raise Inexpressible("a Resize without scales or sizes")
    if b.attribute("coordinate_transformation_mode") == "pytorch_half_pixel" and (None in made or 1 in made):
        raise Inexpressible("a Resize to one position, or to a number of them that is not known, as torch once did it")
    b.image(b.make("Resize", [x], (*x.sizes[:2], *made), settings))


def _scales(b: Builder, place: int, attribute: str) -> tuple[float, ...] | None:
    value = b.value_of(place)
    if not value:
        given = b.attribute(attribute)
        return tuple(float(n) for n in given) if isinstance(given, tuple) and given else None
    maker = b.scope.makers.get(value)
    if maker is not None and isinstance(maker.attributes.get("value_floats"), tuple):
        return tuple(float(n) for n in maker.attributes["value_floats"])  # type: ignore[union-attr, arg-type]
    stored = b.scope.floats(value)
    if stored is None:
        raise Inexpressible("a Resize by scales that are computed")
    found = forward(stored)
    return tuple(float(n) for n in found.read().reshape(-1)) if 0 < found.size <= 8 else None


def _depth_to_space(b: Builder) -> None:
    x = _spatial(b)
    block = int(b.attribute("blocksize", 1))
    if x.rank != 4:
        raise Inexpressible(f"a {b.node.op_type} of {x.rank} axes")
    batch, channels, *space = x.sizes
    if b.node.op_type == "DepthToSpace":
        made = [None if channels is None else channels // block**2, *(None if n is None else n * block for n in space)]
        settings: dict[str, Attribute] = {"blocksize": block, "mode": str(b.attribute("mode", "DCR"))}
    else:
        made = [None if channels is None else channels * block**2, *(None if n is None else n // block for n in space)]
        settings = {"blocksize": block}
    b.image(b.make(b.node.op_type, [x], (batch, *made), settings))


def _lrn(b: Builder) -> None:
    x = _spatial(b)
    settings: dict[str, Attribute] = {"size": int(b.attribute("size", 1))}
    settings |= {
        name: float(b.attribute(name, usual)) for name, usual in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    }
    b.image(b.make("LRN", [x], x.sizes, settings))


SPATIAL: Mapping[str, Rule] = {
    **dict.fromkeys(("AveragePool", "MaxPool"), _pool),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_to_space),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "LRN": _lrn,
    "Pad": _pad,
}
