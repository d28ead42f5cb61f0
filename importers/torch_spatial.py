"""Operators over the spatial axes: convolutions, pooling, padding, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from neutral.importers.torch_call import Call
from neutral.importers.torch_classes import symmetric_padding, transposed_padding
from neutral.schema import layer_sizes, node_settings
from neutral.schema.layer_sizes import per_axis

Ints = Sequence[int]


def conv(c: Call) -> Any:
    padding = c.layer.padding
    if padding is None:
        raise c.refuse("no padding", "to know how its source pads")
    if symmetric_padding(padding) is not None:
        return c.module(c.x)
    k = layer_sizes.window(c.layer)
    s, d = per_axis(c.layer.strides, len(k), 1), per_axis(c.layer.dilation, len(k), 1)
    if padding == "causal":
        pairs: Sequence[tuple[Any, Any]] = [(d[i] * (k[i] - 1), 0) for i in range(len(k))]
    elif isinstance(padding, str):
        pairs = _same_pairs(c, k, s, d, padding == "same_lower")
    else:
        pairs = padding
    return c.module(_padded(c, c.x, pairs, _PADDING_MODES.get(c.layer.padding_mode, c.layer.padding_mode)))


_PADDING_MODES = {None: "constant", "zeros": "constant"}


def conv_transpose(c: Call) -> Any:
    if c.layer.padding is None:
        raise c.refuse("no padding", "to know how its source crops")
    y = c.module(c.x)
    k = layer_sizes.window(c.layer)
    settings = {"stride": per_axis(c.layer.strides, len(k), 1), "dilation": per_axis(c.layer.dilation, len(k), 1)}
    left = transposed_padding(c.layer, settings)[2]
    cut = tuple(slice(before, -after if after else None) for before, after in left)
    return y if all(pair == (0, 0) for pair in left) else y[(slice(None), slice(None), *cut)]


def _same_pairs(c: Call, k: Sequence[int], s: Sequence[int], d: Sequence[int], lower: bool) -> list[tuple[Any, Any]]:
    """(before, after) per spatial axis by the rule of TensorFlow, from the sizes of the value at hand."""
    pairs = []
    for i in range(c.space):
        total = layer_sizes.same_total(c.x.shape[i + 2], k[i], s[i], d[i])
        total = max(total, 0) if isinstance(total, int) else c.torch.sym_max(total, 0)
        small = total // 2
        pairs.append((total - small, small) if lower else (small, total - small))
    return pairs


def _padded(c: Call, x: Any, pairs: Sequence[tuple[Any, Any]], mode: str = "constant", value: float = 0.0) -> Any:
    """`x` with (before, after) added to its last axes."""
    if all(isinstance(n, int) and n == 0 for pair in pairs for n in pair):
        return x
    # torch lists the last axis first.
    flat = [n for pair in reversed(list(pairs)) for n in pair]
    return c.functional.pad(x, flat, mode, value) if mode == "constant" else c.functional.pad(x, flat, mode)


def pool(c: Call) -> Any:
    k = node_settings.ints(c.node, "kernel_shape") or ()
    s = node_settings.ints(c.node, "strides") or (1,) * c.space
    d = node_settings.ints(c.node, "dilations") or (1,) * c.space
    pads = node_settings.pool_pads(c.node, c.space)
    ceil = c.flag("ceil_mode")
    even = None
    if isinstance(pads, str):
        pairs: Sequence[tuple[Any, Any]] = _same_pairs(c, k, s, d, pads == "SAME_LOWER")
    else:
        pairs = pads
        if all(before == after and 2 * before <= n for (before, after), n in zip(pads, k, strict=True)):
            even = tuple(before for before, _ in pads)
    if ceil and even is None:
        raise c.refuse("ceil_mode with uneven padding", "padding that is equal on both sides")
    if c.node.op == "MaxPool":
        if even is not None:
            return _max_pool(c, c.x, k, s, even, d, ceil)
        return _max_pool(c, _padded(c, c.x, pairs, value=-math.inf), k, s, (0,) * c.space, d, ceil)
    run = getattr(c.functional, f"avg_pool{c.space}d")
    if any(n != 1 for n in d):
        raise c.refuse(f"dilations {d}", "an average over neighbours")
    counted = c.flag("count_include_pad")
    if even is not None:
        return run(c.x, k, s, even, ceil, counted)
    y = run(_padded(c, c.x, pairs), k, s)
    if counted:
        return y
    # The share of each window that is not padding.
    ones = c.x.new_ones((1, 1, *c.x.shape[2:]))
    return y / run(_padded(c, ones, pairs), k, s)


def _max_pool(c: Call, x: Any, k: Ints, s: Ints, pads: Ints, d: Ints, ceil: bool) -> Any:
    if c.space > 1:
        return getattr(c.functional, f"max_pool{c.space}d")(x, k, s, pads, d, ceil)
    # torch.export fixes the size of what goes into max_pool1d.
    return c.functional.max_pool2d(x.unsqueeze(2), (1, *k), (1, *s), (0, *pads), (1, *d), ceil).squeeze(2)


def global_pool(c: Call) -> Any:
    axes = tuple(range(2, c.x.ndim))
    return c.x.amax(axes, True) if c.node.op == "GlobalMaxPool" else c.x.mean(axes, True)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def pad(c: Call) -> Any:
    pairs = node_settings.pads_of(c.node, c.x.ndim)
    mode = _PAD_MODES[str(c.node.attributes.get("mode", "constant"))]
    if mode == "constant":
        return _padded(c, c.x, pairs, mode, c.number("value", 0.0))
    if any(pair != (0, 0) for pair in pairs[:2]):
        raise c.refuse(f"{mode} padding of batch or channels", "padding of spatial axes")
    return _padded(c, c.x, pairs[2:], mode)


_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resize(c: Call) -> Any:
    scales = node_settings.scales_of(c.node, c.x.ndim)
    mode, align = _interpolation(c, scales)
    if scales is not None:
        return c.functional.interpolate(c.x, scale_factor=scales, mode=mode, align_corners=align)
    size = node_settings.resized(c.node, (0,) * c.space)
    return c.functional.interpolate(c.x, size=size, mode=mode, align_corners=align)


def _interpolation(c: Call, scales: tuple[float, ...] | None) -> tuple[str, bool | None]:
    given = c.node.attributes
    mode, where = str(given.get("mode", "nearest")), str(given.get("coordinate_transformation_mode", "half_pixel"))
    if mode == "nearest":
        rounding = str(given.get("nearest_mode", "round_prefer_floor"))
        whole = scales is not None and all(s >= 1 and s == int(s) for s in scales)
        if (where, rounding) == ("asymmetric", "floor") or (
            whole and where == "half_pixel" and rounding.startswith("round")
        ):
            return "nearest", None
        if (where, rounding) == ("half_pixel", "round_prefer_ceil"):
            return "nearest-exact", None
        raise c.refuse(f"nearest with {where} and {rounding}", "asymmetric and floor")
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise c.refuse(f"{mode} with {where}", "half_pixel or align_corners")
    if mode == "linear":
        return _LINEAR[c.space], where == "align_corners"
    if mode == "cubic" and c.space == 2 and c.number("cubic_coeff_a", -0.75) == -0.75:
        return "bicubic", where == "align_corners"
    raise c.refuse(f"{mode} over {c.space} axes", "nearest, linear, or cubic with a = -0.75 over two axes")


def depth_to_space(c: Call) -> Any:
    block = int(c.number("blocksize", 1))
    if c.node.attributes.get("mode", "DCR") == "CRD":
        return c.functional.pixel_shuffle(c.x, block)
    batch, channels, height, width = c.x.shape
    y = c.x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(batch, channels // block**2, height * block, width * block)


def space_to_depth(c: Call) -> Any:
    block = int(c.number("blocksize", 1))
    batch, channels, height, width = c.x.shape
    y = c.x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(batch, channels * block**2, height // block, width // block)
