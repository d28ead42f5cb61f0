"""What the settings of Flax's layers mean: canonical attributes out of a live layer's own words, and forms by them.

>>> conv({"strides": (2, 2), "padding": "VALID"}, {"x0": 3, "x1": 3})["padding"]
((0, 0), (0, 0))

A file of parameters has no settings; then nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neutral.conventions.forms import INPUT_RANK, Config, Form, Row, Shapes, Sizes, from_last, layer

_MODES = {"CIRCULAR": "circular", "REFLECT": "reflect"}


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return tuple(int(v) for v in value) if isinstance(value, Sequence) else (int(value),) * rank


def _window(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in sorted(n for n in sizes if n[0] == "x" and n[1:].isdigit()))


def _reach(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]


def dense(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"activation": "linear"} if config else {}


def conv(config: Config, sizes: Sizes) -> dict[str, Any]:
    if "padding" not in config:
        return {}
    kernel = _window(sizes)
    rank = len(kernel)
    strides, dilation = (_per_axis(config.get(name), rank) for name in ("strides", "kernel_dilation"))
    padding = config["padding"]
    mode = _MODES.get(padding, "zeros") if isinstance(padding, str) else "zeros"
    return {
        "strides": strides,
        "dilation": dilation,
        "padding": _padding(padding, _reach(kernel, dilation), strides),
        "padding_mode": mode,
        "groups": config.get("feature_group_count", 1),
        "activation": "linear",
    }


def _padding(padding: Any, reach: Sequence[int], strides: Sequence[int]) -> Any:
    """Explicit pairs wherever they do not depend on the input's size."""
    if padding in _MODES or (padding == "SAME" and all(s == 1 for s in strides)):
        # Flax pads these by the window alone, whatever the strides.
        return tuple((r // 2, r - r // 2) for r in reach)
    match padding:
        case "SAME":
            return "same"
        case "SAME_LOWER":
            return "same_lower"
        case "VALID":
            return tuple((0, 0) for _ in reach)
        case "CAUSAL":
            return tuple((r, 0) for r in reach)
        case str():
            return None
    return _pairs(padding, len(reach))


def _pairs(padding: Any, rank: int) -> tuple[tuple[int, int], ...]:
    listed = padding if isinstance(padding, Sequence) else (padding,) * rank
    return tuple((int(p[0]), int(p[1])) if isinstance(p, Sequence) else (int(p), int(p)) for p in listed)


def conv_transpose(config: Config, sizes: Sizes) -> dict[str, Any]:
    """What is cropped off the full output, (n - 1) * stride + reach + 1 per axis, and what is added behind it."""
    if "padding" not in config or config["padding"] == "CIRCULAR":
        return {}
    kernel = _window(sizes)
    rank = len(kernel)
    strides, dilation = (_per_axis(config.get(name), rank) for name in ("strides", "kernel_dilation"))
    padding, crops, added = config["padding"], [], []
    for i, (reach, stride) in enumerate(zip(_reach(kernel, dilation), strides, strict=True)):
        before, after = (
            _dilated_padding(padding, reach, stride) if isinstance(padding, str) else _pairs(padding, rank)[i]
        )
        crops.append((reach - before, max(reach - after, 0)))
        added.append(max(after - reach, 0))
    return {
        "strides": strides,
        "dilation": dilation,
        "padding": tuple(crops) if all(before >= 0 for before, _ in crops) else None,
        "output_padding": tuple(added),
        "groups": 1,
        "activation": "linear",
    }


def _dilated_padding(padding: str, reach: int, stride: int) -> tuple[int, int]:
    """How jax.lax.conv_transpose pads an input between whose elements it has put zeros."""
    if padding == "SAME":
        total = reach + stride - 1
        before = reach if stride > reach else -(-total // 2)
    else:
        total = reach + stride - 1 + max(reach + 1 - stride, 0)
        before = reach
    return before, total - before


def norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("epsilon"), "axis": from_last(config.get("axis"), config.get(INPUT_RANK))}


def batch_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**norm(config, sizes), "decay": config.get("momentum")}


def layer_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    axes = config.get("feature_axes")
    count = None if axis_free(axes) else (len(axes) if isinstance(axes, Sequence) else 1)
    return {"eps": config.get("epsilon"), "axis": from_last(axes, None), "normalized_axes": count}


_LIVE_SHAPES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Linear": {"kernel": ("in_features", "out_features"), "bias": ("out_features",)},
    "LinearGeneral": {"kernel": ("in_features", "out_features"), "bias": ("out_features",)},
    "Conv": {"kernel": ("kernel_shape",), "bias": ("out_features",)},
    "ConvTranspose": {"kernel": ("kernel_shape",), "bias": ("out_features",)},
    "Einsum": {"kernel": ("kernel_shape",), "bias": ("bias_shape",)},
    "Embed": {"embedding": ("num_embeddings", "features")},
    **dict.fromkeys(
        ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"),
        dict.fromkeys(("scale", "bias", "mean", "var"), ("num_features",)),
    ),
}
"""The settings of a live layer that are the shapes of its tensors."""


def shapes_fit(cls: str, config: Config, shapes: Shapes) -> bool:
    """Whether tensors have the shapes that a live layer's settings say; those of a stack have an axis more.

    >>> shapes_fit("Embed", {"num_embeddings": 7, "features": 5}, {"embedding": (3, 7, 5)})
    False
    """
    axes = config.get("feature_axes")
    if isinstance(axes, Sequence) and len(axes) > 1:
        return all(len(shape) == len(axes) for shape in shapes.values())
    for local, names in _LIVE_SHAPES.get(cls, {}).items():
        told = [config[name] for name in names if config.get(name) is not None]
        if local not in shapes or len(told) < len(names) or config.get("batch_axis"):
            continue
        if shapes[local] != tuple(n for size in told for n in (size if isinstance(size, Sequence) else (size,))):
            return False
    return True


def axis_free(axes: Any) -> bool:
    return axes is None


def group_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("epsilon"), "groups": config.get("num_groups")}


def _recurrent(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "units": sizes.get("unit"),
        "activation": config.get("activation_fn"),
        "recurrent_activation": config.get("gate_fn"),
        "go_backwards": config.get("reverse"),
    }


def simple_rnn(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_recurrent(config, sizes), "bias_convention": "one"}


lstm = simple_rnn


def gru(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_recurrent(config, sizes), "reset_after": True}


def attention(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"heads": sizes["head"], "kv_heads": sizes["kv_head"]}


def einsum_forms(cls: str, config: Config) -> tuple[Form, ...]:
    """The forms that a live layer's settings tell: those of an Einsum by its equation, of a DenseGeneral by its axes.

    >>> part = einsum_forms("Einsum", {"equation": "abc,cde->abde"})[0].parts[0]
    >>> part.kind, part.rows[0].native, part.rows[0].canonical
    ('dense', 'c d e', '(d e) (c)')
    """
    if cls in ("DenseGeneral", "LinearGeneral") and "features" in config:
        return _general(config)
    equation = str(config.get("equation", "")).replace(" ", "")
    operands, _, result = equation.replace("...", "").partition("->")
    given, _, kernel = operands.partition(",")
    if cls != "Einsum" or not kernel.isalpha() or len(set(kernel)) != len(kernel):
        return ()
    made = [c for c in result if c in kernel and c not in given]
    summed = [c for c in given if c in kernel and c not in result]
    rest = [c for c in kernel if c not in made and c not in summed]
    plain = (
        not rest
        and given.endswith("".join(summed))
        and result.endswith("".join(made))
        and given[: len(given) - len(summed)] == result[: len(result) - len(made)]
    )
    native = " ".join(kernel)
    if plain:
        kernels = Row("kernel", "kernel", native, f"({' '.join(made)}) ({' '.join(summed)})".replace("()", "1"))
        bias = Row("bias", "bias", " ".join(made), f"({' '.join(made)})")
        return (Form(("Einsum",), (layer("dense", kernels, bias, attributes=dense),)),)
    kernels = Row("kernel", "kernel", native, " ".join([*rest, *made, *summed]))

    def attributes(config: Config, sizes: Sizes) -> dict[str, Any]:
        return {"equation": equation, "activation": "linear"}

    return (Form(("Einsum",), (layer("einsum_dense", kernels, Row("bias", "bias", raw=True), attributes=attributes),)),)


def _general(config: Config) -> tuple[Form, ...]:
    """A DenseGeneral over the last axes, how many of which it takes and makes being told; none with batch axes."""
    axes, features = config.get("axis", -1), config["features"]
    taken = len(axes) if isinstance(axes, Sequence) else 1
    made = len(features) if isinstance(features, Sequence) else 1
    if config.get("batch_axis"):
        return ()
    ins, outs = (" ".join(f"{name}{i}" for i in range(n)) for name, n in (("in", taken), ("out", made)))
    part = layer(
        "dense",
        Row("kernel", "kernel", f"{ins} {outs}", f"({outs}) ({ins})"),
        Row("bias", "bias", outs, f"({outs})"),
        attributes=dense,
    )
    return (Form((("DenseGeneral", "LinearGeneral")), (part,)),)
