"""Which operators of ONNX compute each node of a graph: mostly the one of the same name.

>>> {"Conv", "Relu", "Gemm"} <= OPERATORS.keys()
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from neutral.containers.onnx_building import dtype_number
from neutral.importers.onnx_attention import attention
from neutral.importers.onnx_builder import Call, Rule
from neutral.importers.onnx_recurrent import recurrent
from neutral.schema import node_settings


def _same(*attributes: str) -> Rule:
    """The operator of the same name, with those of the node's attributes that it has."""

    def rule(c: Call) -> None:
        given = {name: c.node.attributes[name] for name in attributes if c.node.attributes.get(name) is not None}
        c.emit(c.node.op, c.ins, c.out, **{name: _plain(value) for name, value in given.items()})

    return rule


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else int(value) if isinstance(value, bool) else value


def _real(*attributes: str) -> Rule:
    """The operator of the same name, its attributes real numbers, whether or not they are whole."""

    def rule(c: Call) -> None:
        given = {name: c.node.attributes[name] for name in attributes if c.node.attributes.get(name) is not None}
        c.emit(c.node.op, c.ins, c.out, **{name: float(value) for name, value in given.items()})  # type: ignore[arg-type]

    return rule


def dense(c: Call) -> None:
    assert c.native is not None
    if c.native.cls == "Gemm":
        inputs = [c.x, c.weight("W"), *filter(None, [c.weight("B")])]
        c.emit("Gemm", inputs, c.out, **c.config("alpha", "beta", "transA", "transB"))
    else:
        c.product(c.x, c.weight("W"), "B", c.out)


def _einsum(c: Call) -> None:
    assert c.native is not None and c.layer is not None
    if c.layer.kind == "dense":
        _linear_einsum(c)
        return
    equation = str(c.native.config["equation"])
    if not c.weight("B"):
        c.emit("Einsum", [c.x, c.weight("W")], c.out, equation=equation)
        return
    made = c.emit("Einsum", [c.x, c.weight("W")], equation=equation)
    c.emit("Add", [made, c.weight("B")], c.out, "add")


def _linear_einsum(c: Call) -> None:
    """A dense layer in other words: some of the last axes in, some of the last axes out."""
    data, _, out = node_settings.equation_terms(str(c.node.attributes["equation"]))
    summed = len([letter for letter in data.replace("...", "") if letter not in out])
    kept = c.rank - summed
    made = c.b.shape(c.node.outputs[0])[kept:]
    if any(n is None for n in made):
        raise c.refuse("an output of unknown size", "the sizes of the axes it makes")
    x = c.x if summed == 1 else c.emit("Reshape", [c.x, c.ints("joined", *(0,) * kept, -1)], suffix="join")
    y = c.product(x, c.weight("W"), "B")
    c.emit("Reshape", [y, c.ints("shape", *(0,) * kept, *made)], c.out, "split")  # type: ignore[arg-type]


_PAD_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
"""torch's words for the border of a convolution, and ONNX's."""


def _conv(c: Call) -> None:
    assert c.native is not None
    config = c.config("kernel_shape", "strides", "dilations", "group", "pads", "auto_pad")
    x = c.x
    if "padding_mode" in c.native.config:
        mode = str(c.native.config["padding_mode"])
        if mode not in _PAD_MODES:
            raise c.refuse(f"padding of mode {mode}", ", ".join(_PAD_MODES))
        space, pads = len(config["kernel_shape"]), config.pop("pads")
        axes = c.ints("axes", *range(2, 2 + space))
        x = c.emit("Pad", [x, c.ints("pads", *pads), "", axes], suffix="pad", mode=_PAD_MODES[mode])
    inputs = [x, c.weight("W"), *filter(None, [c.weight("B")])]
    c.emit("Conv", inputs, c.out, **config)


def _conv_transpose(c: Call) -> None:
    config = c.config("kernel_shape", "strides", "dilations", "group", "pads", "output_padding")
    inputs = [c.x, c.weight("W"), *filter(None, [c.weight("B")])]
    c.emit("ConvTranspose", inputs, c.out, **config)


def _gather(c: Call) -> None:
    indices = c.x
    if c.b.dtypes[c.node.inputs[0]] not in ("int32", "int64"):
        indices = c.emit("Cast", [indices], suffix="cast", to=dtype_number("int64"))
    c.emit("Gather", [c.weight("data"), indices], c.out, **c.config("axis"))


def _batch_norm(c: Call) -> None:
    if c.native is None:
        raise c.refuse("no statistics", "a mean and a variance")
    features = _features(c)
    neutral = (("scale", 1.0), ("B", 0.0))
    affine = [c.weight(local) or c.filled(local, value, (features,)) for local, value in neutral]
    c.emit(
        "BatchNormalization",
        [c.x, *affine, c.weight("mean"), c.weight("var")],
        c.out,
        **c.config("epsilon", "momentum"),
    )


def _features(c: Call) -> int:
    """The channels of a norm: as many as its weights, or as the graph says of its input."""
    if c.native is not None:
        return next(math.prod(tensor.data.shape) for tensor in c.native.tensors.values() if not tensor.state)
    known = c.shape()[1]
    if known is None:
        raise c.refuse("a number of channels that is not known", "to know it, for a norm without weights")
    return known


def _channel_norm(scale: str, bias: str) -> Rule:
    def rule(c: Call) -> None:
        features, settings = _features(c), {}
        if c.native is not None:
            settings = c.config("num_groups", "epsilon")
        else:
            settings["epsilon"] = c.number("epsilon", 1e-5)
            if c.node.op == "GroupNormalization":
                settings["num_groups"] = int(c.number("num_groups", 1))
        found = [
            (c.weight(local) if c.native is not None else "") or c.filled(local, value, (features,))
            for local, value in ((scale, 1.0), (bias, 0.0))
        ]
        c.emit(c.node.op, [c.x, *found], c.out, **settings)

    return rule


def _last_axes_norm(scale: str, bias: str) -> Rule:
    def rule(c: Call) -> None:
        if c.native is not None:
            settings = c.config("axis", "epsilon")
            shape: tuple[int | None, ...] = next(t.data.shape for t in c.native.tensors.values() if not t.state)
        else:
            axis = int(c.number("axis", -1))
            settings = {"axis": axis, "epsilon": c.number("epsilon", 1e-5)}
            shape = c.shape()[axis % c.rank :]
            if None in shape:
                raise c.refuse("sizes that are not known", "to know them, for a norm without weights")
        found = (c.weight(scale) if c.native is not None else "") or c.filled(scale, 1.0, shape)  # type: ignore[arg-type]
        offset = c.weight(bias) if c.native is not None and bias else ""
        c.emit(c.node.op, [c.x, found, *filter(None, [offset])], c.out, **settings)

    return rule


def _pool(c: Call) -> None:
    space = c.rank - 2
    given = c.node.attributes
    pads = node_settings.pool_pads(c.node, space)
    config: dict[str, Any] = {"kernel_shape": list(node_settings.ints(c.node, "kernel_shape") or ())}
    config["strides"] = list(node_settings.ints(c.node, "strides") or (1,) * space)
    dilations = node_settings.ints(c.node, "dilations") or (1,) * space
    if any(n != 1 for n in dilations):
        config["dilations"] = list(dilations)
    if isinstance(pads, str):
        config["auto_pad"] = pads
    else:
        config["pads"] = [*(before for before, _ in pads), *(after for _, after in pads)]
    for name in ("ceil_mode", *(("count_include_pad",) if c.node.op == "AveragePool" else ())):
        if given.get(name):
            config[name] = 1
    c.emit(c.node.op, [c.x], c.out, **config)


def _pad(c: Call) -> None:
    """The axes are named: onnxruntime 1.31 joins a Pad without them with the pooling behind it, to other numbers."""
    pairs = node_settings.pads_of(c.node, c.rank)
    axes = [i for i, pair in enumerate(pairs) if pair != (0, 0)] or [c.rank - 1]
    pads = c.ints("pads", *(pairs[i][0] for i in axes), *(pairs[i][1] for i in axes))
    mode = str(c.node.attributes.get("mode", "constant"))
    value = c.constant("value", c.number("value", 0.0), c.dtype) if mode == "constant" else ""
    c.emit("Pad", [c.x, pads, value, c.ints("axes", *axes)], c.out, mode=mode)


def _slice(c: Call) -> None:
    starts, ends = node_settings.ints(c.node, "starts") or (), node_settings.ints(c.node, "ends") or ()
    axes = node_settings.ints(c.node, "axes") or tuple(range(len(starts)))
    inputs = [c.x, c.ints("starts", *starts), c.ints("ends", *ends), c.ints("axes", *axes)]
    steps = node_settings.ints(c.node, "steps")
    c.emit("Slice", [*inputs, c.ints("steps", *steps)] if steps else inputs, c.out)


def _resize(c: Call) -> None:
    given = c.node.attributes
    names = ("mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a")
    settings: dict[str, Any] = {name: given[name] for name in names if given.get(name) is not None}
    if "cubic_coeff_a" in settings:
        settings["cubic_coeff_a"] = float(settings["cubic_coeff_a"])
    scales = node_settings.scales_of(c.node, c.rank)
    if scales is not None:
        factors = c.constant("scales", np.asarray((1.0, 1.0, *scales), np.float32))
        c.emit("Resize", [c.x, "", factors], c.out, **settings)
        return
    sizes = node_settings.resized(c.node, (0,) * (c.rank - 2))
    settings["axes"] = tuple(range(2, c.rank))
    c.emit("Resize", [c.x, "", "", c.ints("sizes", *sizes)], c.out, **_lists(settings))


def _lists(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in settings.items()}


def _with_ints(attribute: str, *, batch: bool = False) -> Rule:
    """An operator that takes a list of integers as its second input; `batch`: the list leaves out the batch."""

    def rule(c: Call) -> None:
        values = node_settings.ints(c.node, attribute) or ()
        c.emit(c.node.op, [c.x, c.ints(attribute, *(0,) * batch, *values)], c.out)

    return rule


def _reduce(c: Call) -> None:
    axes = node_settings.ints(c.node, "axes")
    inputs = [c.x, c.ints("axes", *axes)] if axes else [c.x]
    c.emit(c.node.op, inputs, c.out, keepdims=int(bool(c.node.attributes.get("keepdims", 1))))


def _clip(c: Call) -> None:
    bounds = [c.node.attributes.get(name) for name in ("min", "max")]
    found = ["" if n is None else c.constant(name, n, c.dtype) for n, name in zip(bounds, ("min", "max"), strict=True)]
    while found and not found[-1]:
        found.pop()
    c.emit("Clip", [c.x, *found], c.out)


def _cast(c: Call) -> None:
    wanted = str(c.node.attributes.get("to"))
    c.emit("Cast", [c.x], c.out, to=dtype_number(wanted))
    c.b.dtypes[c.node.outputs[0]] = wanted


def _constant(c: Call) -> None:
    for name in ("value_float", "value_int"):
        value = c.node.attributes.get(name)
        if isinstance(value, int | float):
            c.b.constants[c.node.outputs[0]] = value
            return
    raise c.refuse(f"a constant {sorted(c.node.attributes)}", "value_float or value_int")


def _lrn(c: Call) -> None:
    size = int(c.number("size", 1))
    settings: dict[str, Any] = {
        name: c.number(name, default) for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    }
    c.emit("LRN", [c.x], c.out, size=size, **settings)


def _swish(c: Call) -> None:
    """x · sigmoid(alpha · x); ONNX has an operator for it since opset 24."""
    alpha, gated = c.number("alpha", 1.0), c.x
    if alpha != 1.0:
        gated = c.emit("Mul", [c.x, c.constant("alpha", alpha, c.dtype)], suffix="scaled")
    c.emit("Mul", [c.x, c.emit("Sigmoid", [gated], suffix="sigmoid")], c.out)


def _celu(c: Call) -> None:
    """ONNX has it for float32 alone; alpha · elu(x / alpha) for others."""
    alpha = c.number("alpha", 1.0)
    if c.dtype == "float32":
        c.emit("Celu", [c.x], c.out, alpha=alpha)
        return
    factor = c.constant("alpha", alpha, c.dtype)
    c.emit("Mul", [c.emit("Elu", [c.emit("Div", [c.x, factor], suffix="in")], suffix="elu"), factor], c.out)


def _shrink(c: Call) -> None:
    """ONNX has it for all numbers but bfloat16."""
    settings: dict[str, Any] = {"lambd": c.number("lambd", 0.5), "bias": c.number("bias", 0.0)}
    if c.dtype != "bfloat16":
        c.emit("Shrink", [c.x], c.out, **settings)
        return
    wide = c.emit("Cast", [c.x], suffix="wide", to=dtype_number("float32"))
    c.emit("Cast", [c.emit("Shrink", [wide], suffix="shrink", **settings)], c.out, to=dtype_number("bfloat16"))


def _prelu(c: Call) -> None:
    c.emit("PRelu", [c.x, c.weight("slope")], c.out)


OPERATORS: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "Abs", "Add", "Cos", "Div", "Erf", "Exp", "Floor", "GlobalAveragePool", "GlobalMaxPool", "HardSwish",
            "Identity", "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid",
            "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh",
        ),
        _same(),
    ),
    **dict.fromkeys(("Concat", "Flatten", "LogSoftmax", "Softmax"), _same("axis")),
    **dict.fromkeys(("Elu", "LeakyRelu", "ThresholdedRelu"), _real("alpha")),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _with_ints("axes")),
    "Attention": attention,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Celu": _celu,
    "Clip": _clip,
    "Constant": _constant,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _same("blocksize", "mode"),
    "Einsum": _einsum,
    "Expand": _with_ints("shape"),
    "Gather": _gather,
    "Gelu": _same("approximate"),
    "Gemm": dense,
    "GroupNormalization": _channel_norm("scale", "bias"),
    "HardSigmoid": _real("alpha", "beta"),
    "InstanceNormalization": _channel_norm("scale", "B"),
    "LRN": _lrn,
    "LayerNormalization": _last_axes_norm("scale", "B"),
    "PRelu": _prelu,
    "Pad": _pad,
    "RMSNormalization": _last_axes_norm("scale", ""),
    "Reshape": _with_ints("shape", batch=True),
    "Resize": _resize,
    "Selu": _real("alpha", "gamma"),
    "Shrink": _shrink,
    "Slice": _slice,
    "SpaceToDepth": _same("blocksize"),
    "Swish": _swish,
    "Tile": _with_ints("repeats"),
    "Transpose": _same("perm"),
}  # fmt: skip
