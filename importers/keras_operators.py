"""Which function makes the Keras layers of which ONNX operator."""

from __future__ import annotations

from collections.abc import Mapping

from neutral.conventions.keras_onnx import MERGES
from neutral.errors import an
from neutral.importers.keras_activations import (
    cast,
    celu,
    clip,
    constant,
    elu,
    gelu,
    hard_sigmoid,
    identity,
    leaky_relu,
    named,
    neg,
    relu,
    softmax,
    thresholded,
)
from neutral.importers.keras_builder import Builder, Rule
from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_layers import (
    attention,
    channel_norm,
    conv,
    conv_transpose,
    einsum,
    gather,
    gemm,
    last_norm,
    prelu,
    recurrent,
)
from neutral.importers.keras_merging import concat, merge
from neutral.importers.keras_pooling import global_pool, pool
from neutral.importers.keras_reshaping import crop, flatten, pad, reshape, resize, transpose, unsqueeze

_OPERATORS: Mapping[str, Rule] = {
    "Relu": relu,
    "LeakyRelu": leaky_relu,
    "Elu": elu,
    "Celu": celu,
    **dict.fromkeys(
        ("Selu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Swish", "Mish", "HardSwish", "Exp", "Shrink"), named
    ),
    "HardSigmoid": hard_sigmoid,
    "Gelu": gelu,
    "Clip": clip,
    "ThresholdedRelu": thresholded,
    "Neg": neg,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Identity": identity,
    "Constant": constant,
    "Cast": cast,
    **dict.fromkeys((*MERGES.values(), "Div"), merge),
    "Transpose": transpose,
    "Flatten": flatten,
    "Reshape": reshape,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Pad": pad,
    "Slice": crop,
    "Resize": resize,
    "MaxPool": pool,
    "AveragePool": pool,
    "GlobalMaxPool": global_pool,
    "GlobalAveragePool": global_pool,
    "Gemm": gemm,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gather": gather,
    "BatchNormalization": channel_norm,
    "GroupNormalization": channel_norm,
    "InstanceNormalization": channel_norm,
    "LayerNormalization": last_norm,
    "RMSNormalization": last_norm,
    "PRelu": prelu,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent),
    "Attention": attention,
    "Einsum": einsum,
}


def add_nodes(b: Builder) -> None:
    """Add the Keras layers of all nodes; what none computes becomes a problem of the builder."""
    for node in b.graph.nodes:
        if node.name in b.skipped:
            continue
        try:
            rule = _OPERATORS.get(node.op)
            if rule is None:
                raise Inexpressible(f"the operator {node.op}")
            if any(value not in b.tensors and value not in b.constants for value in node.inputs):
                continue  # it follows a node that was refused already
            outputs = rule(b, node)
        except Inexpressible as reason:
            b.refuse(node, reason)
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            b.refuse(node, Inexpressible(f"{an(node.op)} whose settings make no sense ({error})"))
        else:
            b.tensors.update(zip(node.outputs, outputs, strict=False))
