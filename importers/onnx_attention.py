"""Multi-head attention as products of matrices, which every runtime has.

ONNX has an operator of this name since opset 23, which few run as yet; and it has no weights.
"""

from __future__ import annotations

import math

import numpy as np

from neutral.importers.onnx_builder import Call, numpy_dtype


def attention(c: Call) -> None:
    """Heads that share keys and values (kv_heads < heads) are told apart by an axis of their own."""
    assert c.native is not None and c.layer is not None
    if len(c.node.inputs) not in (1, 3):
        raise c.refuse(f"{len(c.node.inputs)} inputs", "one, or a query, a key and a value")
    query, key, value = c.ins if len(c.node.inputs) == 3 else (c.x,) * 3
    heads, groups = int(c.native.config["q_num_heads"]), int(c.native.config["kv_num_heads"])
    if len(c.axes()) != 3:
        raise c.refuse(f"a query of {len(c.axes())} axes", "batch, time and feature")
    q = c.product(query, c.weight("query.W"), "query.B", suffix="query")
    k, v = (
        c.product(x, c.weight(f"{role}.W"), f"{role}.B", suffix=role) for x, role in ((key, "key"), (value, "value"))
    )
    k, v = (_with_extra(c, x, role) for x, role in ((k, "key"), (v, "value")))
    shared = heads != groups
    split = (groups, heads // groups) if shared else (heads,)
    alone = (groups, 1) if shared else (heads,)
    n = len(split)
    width = c.native.tensors["query.W"].data.shape[-1] // heads
    scale = c.constant("scale", 1 / math.sqrt(width), c.dtype)
    q = c.emit("Mul", [q, scale], suffix="scaled")
    last, positions = (0, *range(2, 2 + n)), 1
    q = _split(c, q, split, (*last, positions, 2 + n), "query.heads")
    k = _split(c, k, alone, (*last, 2 + n, positions), "key.heads")
    v = _split(c, v, alone, (*last, positions, 2 + n), "value.heads")
    scores = c.emit("MatMul", [q, k], suffix="scores")
    if c.flag("is_causal"):
        scores = _causal(c, scores)
    weights = c.emit("Softmax", [scores], suffix="softmax", axis=-1)
    made = c.emit("MatMul", [weights, v], suffix="attended")
    made = c.emit("Transpose", [made], suffix="attended.time", perm=[0, 1 + n, *range(1, 1 + n), 2 + n])
    made = c.emit("Reshape", [made, c.ints("attended.shape", 0, 0, -1)], suffix="attended.joined")
    c.product(made, c.weight("output.W"), "output.B", c.out, "output")


def _split(c: Call, x: str, heads: tuple[int, ...], perm: tuple[int, ...], suffix: str) -> str:
    parted = c.emit("Reshape", [x, c.ints(f"{suffix}.shape", 0, 0, *heads, -1)], suffix=suffix)
    return c.emit("Transpose", [parted], suffix=f"{suffix}.first", perm=list(perm))


def _with_extra(c: Call, x: str, role: str) -> str:
    """A learned key or value behind those of the input, the same one for each sample."""
    extra = c.weight(f"extra_{role}")
    if not extra:
        return x
    batch = c.emit("Shape", [x], suffix=f"{role}.batch", start=0, end=1)
    ones = c.ints(f"{role}.ones", 1, 1)
    shape = c.emit("Concat", [batch, ones], suffix=f"{role}.extra.shape", axis=0)
    each = c.emit("Expand", [extra, shape], suffix=f"{role}.extra")
    return c.emit("Concat", [x, each], suffix=f"{role}.longer", axis=1)


def _causal(c: Call, scores: str) -> str:
    """Nothing is added up to a position, minus infinity behind it."""
    size = c.emit("Shape", [scores], suffix="mask.shape", start=-2)
    lowest = np.asarray([-math.inf]).astype(numpy_dtype(c.dtype))
    filled = c.emit("ConstantOfShape", [size], suffix="mask.filled", value=lowest)
    mask = c.emit("Trilu", [filled, c.constant("mask.diagonal", np.asarray(1, np.int64))], suffix="mask", upper=1)
    return c.emit("Add", [scores, mask], suffix="masked")
