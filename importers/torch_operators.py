"""What each operator of a graph computes in torch.

>>> {"Conv", "Relu", "Gemm"} <= OPERATORS.keys()
True
"""

from __future__ import annotations

import math
import operator
from functools import reduce
from typing import Any

from neutral.importers.torch_call import Call, Operator
from neutral.importers.torch_recurrent import recurrent
from neutral.importers.torch_spatial import (
    conv,
    conv_transpose,
    depth_to_space,
    global_pool,
    pad,
    pool,
    resize,
    space_to_depth,
)
from neutral.schema import node_settings


def _module(c: Call) -> Any:
    return c.module(c.x)


def _flatten(c: Call) -> Any:
    axis = int(c.number("axis", 1))
    if axis == 1:
        return c.torch.flatten(c.x, 1)
    return c.x.reshape(reduce(operator.mul, c.x.shape[:axis], 1), -1)


def _reshape(c: Call) -> Any:
    wanted = node_settings.ints(c.node, "shape") or ()
    return c.x.reshape(c.x.shape[0], *(c.x.shape[i + 1] if n == 0 else n for i, n in enumerate(wanted)))


def _transpose(c: Call) -> Any:
    return c.x.permute(node_settings.ints(c.node, "perm") or tuple(reversed(range(c.x.ndim))))


def _slice(c: Call) -> Any:
    return c.x[tuple(node_settings.slices(c.node, c.x.ndim))]


def _squeeze(c: Call) -> Any:
    return c.x.squeeze(node_settings.ints(c.node, "axes") or ())


def _unsqueeze(c: Call) -> Any:
    axes = node_settings.ints(c.node, "axes") or ()
    rank = c.x.ndim + len(axes)
    return reduce(lambda x, axis: x.unsqueeze(axis), sorted(axis % rank for axis in axes), c.x)


def _expand(c: Call) -> Any:
    wanted = node_settings.ints(c.node, "shape") or ()
    wanted = (1,) * (c.x.ndim - len(wanted)) + wanted
    added = len(wanted) - c.x.ndim
    return c.x.expand(*(n if i < added or n != 1 else -1 for i, n in enumerate(wanted)))


def _reduced(c: Call) -> Any:
    axes = node_settings.ints(c.node, "axes") or tuple(range(c.x.ndim))
    kept = bool(c.node.attributes.get("keepdims", 1))
    name = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "amax", "ReduceMin": "amin"}[c.node.op]
    return getattr(c.x, name)(axes, kept)


def _tensors(c: Call) -> list[Any]:
    like = next(x for x in c.ins if isinstance(x, c.torch.Tensor))
    return [x if isinstance(x, c.torch.Tensor) else like.new_tensor(x) for x in c.ins]


_DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")


def _cast(c: Call) -> Any:
    wanted = str(c.node.attributes.get("to"))
    if wanted not in _DTYPES:
        raise c.refuse(f"the dtype {wanted}", " ".join(_DTYPES))
    return c.x.to(getattr(c.torch, wanted))


def _constant(c: Call) -> Any:
    """A number: torch's arithmetic takes it beside a tensor without changing the tensor's dtype."""
    for name in ("value_float", "value_int"):
        if name in c.node.attributes:
            return c.node.attributes[name]
    raise c.refuse(f"a constant {sorted(c.node.attributes)}", "value_float or value_int")


def _gather(c: Call) -> Any:
    return c.module(c.x if not c.x.is_floating_point() else c.x.to(c.torch.int64))


def _group_norm(c: Call) -> Any:
    if c.module is not None:
        return c.module(c.x)
    return c.functional.group_norm(c.x, int(c.number("num_groups", 1)), eps=c.number("epsilon", 1e-5))


def _instance_norm(c: Call) -> Any:
    return c.module(c.x) if c.module is not None else c.functional.instance_norm(c.x, eps=c.number("epsilon", 1e-5))


def _last_axes_norm(c: Call) -> Any:
    if c.module is not None:
        return c.module(c.x)
    axis = int(c.number("axis", -1)) % c.x.ndim
    norm = c.functional.layer_norm if c.node.op == "LayerNormalization" else c.functional.rms_norm
    return norm(c.x, tuple(c.x.shape[axis:]), eps=c.number("epsilon", 1e-5))


def _attention(c: Call) -> Any:
    if len(c.ins) not in (1, 3):
        raise c.refuse(f"{len(c.ins)} inputs", "one, or a query, a key and a value")
    query, key, value = c.ins if len(c.ins) == 3 else (c.x,) * 3
    mask = None
    if c.flag("is_causal"):
        mask = c.torch.ones(query.shape[1], key.shape[1], dtype=c.torch.bool, device=query.device).triu(1)
    return c.module(query, key, value, need_weights=False, attn_mask=mask)[0]


def _einsum(c: Call) -> Any:
    if c.layer.kind == "einsum_dense":
        return c.module(c.x)
    # A Linear in other words: some of the last axes in, some of the last axes out.
    data, _, out = node_settings.equation_terms(str(c.node.attributes["equation"]))
    summed = len([letter for letter in data.replace("...", "") if letter not in out])
    kept = c.x.ndim - summed
    made = (c.made or ())[kept:]
    if any(n is None for n in made):
        raise c.refuse("an output of unknown size", "the sizes of the axes it makes")
    return c.module(c.x.flatten(kept) if summed > 1 else c.x).reshape(*c.x.shape[:kept], *made)


def _hard_sigmoid(c: Call) -> Any:
    alpha, beta = c.number("alpha", 0.2), c.number("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return c.functional.hardsigmoid(c.x)
    return (c.x * alpha + beta).clamp(0, 1)


def _selu(c: Call) -> Any:
    alpha, gamma = c.node.attributes.get("alpha"), c.node.attributes.get("gamma")
    if alpha is None and gamma is None:
        return c.functional.selu(c.x)
    return c.functional.elu(c.x, c.number("alpha", 1.6732632423543772)) * c.number("gamma", 1.0507009873554805)


def _swish(c: Call) -> Any:
    alpha = c.number("alpha", 1.0)
    return c.functional.silu(c.x) if alpha == 1.0 else c.x * c.torch.sigmoid(c.x * alpha)


def _shrink(c: Call) -> Any:
    edge, bias = c.number("lambd", 0.5), c.number("bias", 0.0)
    if bias == 0:
        return c.functional.hardshrink(c.x, edge)
    if bias == edge:
        return c.functional.softshrink(c.x, edge)
    zero = c.torch.zeros_like(c.x)
    return c.torch.where(c.x > edge, c.x - bias, c.torch.where(c.x < -edge, c.x + bias, zero))


def _clip(c: Call) -> Any:
    bounds = {name: c.node.attributes.get(name) for name in ("min", "max")}
    return c.x if bounds == {"min": None, "max": None} else c.x.clamp(**bounds)


def _lrn(c: Call) -> Any:
    size = int(c.number("size", 1))
    if size % 2 == 0:
        raise c.refuse(f"a window of {size} channels", "an odd one")
    return c.functional.local_response_norm(
        c.x, size, c.number("alpha", 1e-4), c.number("beta", 0.75), c.number("bias", 1.0)
    )


OPERATORS: dict[str, Operator] = {
    "Abs": lambda c: c.x.abs(),
    "Add": lambda c: reduce(operator.add, c.ins),
    "Attention": _attention,
    "AveragePool": pool,
    "BatchNormalization": _module,
    "Cast": _cast,
    "Celu": lambda c: c.functional.celu(c.x, c.number("alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda c: c.torch.cat(list(c.ins), int(c.number("axis", 1))),
    "Constant": _constant,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Cos": lambda c: c.x.cos(),
    "DepthToSpace": depth_to_space,
    "Div": lambda c: operator.truediv(*c.ins),
    "Einsum": _einsum,
    "Elu": lambda c: c.functional.elu(c.x, c.number("alpha", 1.0)),
    "Erf": lambda c: c.x.erf(),
    "Exp": lambda c: c.x.exp(),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": lambda c: c.x.floor(),
    "GRU": recurrent,
    "Gather": _gather,
    "Gelu": lambda c: c.functional.gelu(c.x, approximate=str(c.node.attributes.get("approximate", "none"))),
    "Gemm": _module,
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda c: c.functional.hardswish(c.x),
    "Identity": lambda c: c.x,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LSTM": recurrent,
    "LayerNormalization": _last_axes_norm,
    "LeakyRelu": lambda c: c.functional.leaky_relu(c.x, c.number("alpha", 0.01)),
    "Log": lambda c: c.x.log(),
    "LogSoftmax": lambda c: c.functional.log_softmax(c.x, int(c.number("axis", -1))),
    "Max": lambda c: reduce(c.torch.maximum, _tensors(c)),
    "MaxPool": pool,
    "Mean": lambda c: reduce(operator.add, c.ins) / len(c.ins),
    "Min": lambda c: reduce(c.torch.minimum, _tensors(c)),
    "Mish": lambda c: c.functional.mish(c.x),
    "Mul": lambda c: reduce(operator.mul, c.ins),
    "Neg": lambda c: -c.x,
    "PRelu": _module,
    "Pad": pad,
    "Pow": lambda c: operator.pow(*c.ins),
    "RMSNormalization": _last_axes_norm,
    "RNN": recurrent,
    "Reciprocal": lambda c: c.x.reciprocal(),
    "ReduceMax": _reduced,
    "ReduceMean": _reduced,
    "ReduceMin": _reduced,
    "ReduceSum": _reduced,
    "Relu": lambda c: c.torch.relu(c.x),
    "Reshape": _reshape,
    "Resize": resize,
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": lambda c: c.x.sigmoid(),
    "Sign": lambda c: c.x.sign(),
    "Sin": lambda c: c.x.sin(),
    "Slice": _slice,
    "Softmax": lambda c: c.functional.softmax(c.x, int(c.number("axis", -1))),
    "Softplus": lambda c: c.functional.softplus(c.x),
    "Softsign": lambda c: c.functional.softsign(c.x),
    "SpaceToDepth": space_to_depth,
    "Sqrt": lambda c: c.x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda c: operator.sub(*c.ins),
    "Sum": lambda c: reduce(operator.add, c.ins),
    "Swish": _swish,
    "Tanh": lambda c: c.x.tanh(),
    "ThresholdedRelu": lambda c: c.functional.threshold(c.x, c.number("alpha", 1.0), 0.0),
    "Tile": lambda c: c.x.tile(node_settings.ints(c.node, "repeats") or ()),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
