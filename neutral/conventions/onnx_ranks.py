"""How many axes a value of an ONNX graph has, as far as the graph tells without running it."""

from __future__ import annotations

from neutral.containers.onnx import NodeProto
from neutral.conventions.onnx import RECURRENT
from neutral.conventions.onnx_scope import Scope

_MOST_STEPS = 64
ELEMENTWISE = frozenset(
    [
        "Abs",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "LogSoftmax",
        "Mish",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softmax",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
        "PRelu",
    ]
)
"""Operators that compute each element of the first value by itself."""
_LIKE_FIRST = ELEMENTWISE | frozenset(
    [
        "AveragePool",
        "BatchNormalization",
        "Concat",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "GroupNormalization",
        "InstanceNormalization",
        "LRN",
        "LayerNormalization",
        "MaxPool",
        "Pad",
        "RMSNormalization",
        "Resize",
        "Slice",
        "Transpose",
        "Upsample",
    ]
)
_LIKE_WEIGHT = ("Conv", "ConvTranspose")
_LARGEST_OF = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "Where", "Pow")


def rank_of(scope: Scope, value: str, depth: int = 0) -> int | None:
    """The number of axes of a value, or None."""
    shape = scope.shape_of(value)
    if shape is not None:
        return len(shape)
    node = scope.makers.get(value)
    if node is None or node.domain or depth > _MOST_STEPS:
        return None
    # The second output of a recurrent operator, for one, has fewer axes than the first.
    return _rank_made(scope, node, depth) if node.outputs[0] == value else None


def _rank_made(scope: Scope, node: NodeProto, depth: int) -> int | None:
    op = node.op_type
    if op in _LIKE_WEIGHT and len(node.inputs) > 1:
        return rank_of(scope, node.inputs[1], depth + 1)
    if op in ("Gemm", "Flatten"):
        return 2
    if op in RECURRENT:
        return 4
    if op in _LIKE_FIRST and node.inputs:
        return rank_of(scope, node.inputs[0], depth + 1)
    if op in _LARGEST_OF:
        ranks = [rank_of(scope, value, depth + 1) for value in node.inputs]
        known = [rank for rank in ranks if rank is not None]
        return max(known) if len(known) == len(ranks) and known else None
    if op in ("Squeeze", "Unsqueeze") and node.inputs:
        axes = scope.numbers(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get("axes")
        rank = rank_of(scope, node.inputs[0], depth + 1)
        if rank is None or not isinstance(axes, tuple):
            return None
        return rank + len(axes) * (1 if op == "Unsqueeze" else -1)
    if op == "Gather" and len(node.inputs) > 1:
        data, rows = (rank_of(scope, value, depth + 1) for value in node.inputs[:2])
        return None if data is None or rows is None else data + rows - 1
    if op == "MatMul" and len(node.inputs) > 1:
        first, second = (rank_of(scope, value, depth + 1) for value in node.inputs[:2])
        return None if first is None or second is None or min(first, second) < 2 else max(first, second)
    if op == "Reshape" and len(node.inputs) > 1:
        sizes = scope.numbers(node.inputs[1])
        return None if sizes is None else len(sizes)
    return None
