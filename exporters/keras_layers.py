"""Which function makes the nodes of which Keras layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from neutral.conventions.keras_onnx import GLOBAL_POOLS, MERGES, NOISES, POOLS
from neutral.exporters.keras_activations import ACTIVATION_LAYERS
from neutral.exporters.keras_builder import Builder, Handler
from neutral.exporters.keras_calls import Call, is_foreign
from neutral.exporters.keras_dense import attention, dense, einsum_dense, embedding
from neutral.exporters.keras_flow import Config, Flow, Unclear
from neutral.exporters.keras_merging import concatenate, merge
from neutral.exporters.keras_norms import channel_norm, last_norm
from neutral.exporters.keras_operations import OPERATIONS, TF_FUNCTIONS
from neutral.exporters.keras_recurrent import bidirectional, recurrent, rnn
from neutral.exporters.keras_reshaping import flatten, permute, repeat_vector, reshape
from neutral.exporters.keras_windows import (
    conv,
    conv_transpose,
    cropping,
    depthwise_conv,
    global_pool,
    pool,
    separable_conv,
    upsampling,
    zero_padding,
)
from neutral.schema.graph import Attribute


def _identity(*settings: str) -> Handler:
    """A layer that does nothing outside of training; its settings are kept."""

    def layer(b: Builder, call: Call) -> list[Flow]:
        attributes: dict[str, Attribute] = {"origin": call.cls}
        amounts = {key: call.config.get(key) for key in settings}
        attributes |= {key: float(amount) for key, amount in amounts.items() if isinstance(amount, int | float)}
        return [b.emit(call.path, "Identity", [call.x], call.x, attributes)]

    return layer


_PER_STEP = {"Dense", "Activation", "ReLU", "LeakyReLU", "ELU", "Dropout", "LayerNormalization"}


def _time_distributed(b: Builder, call: Call) -> list[Flow]:
    cls, config = call.inner("layer")
    if cls not in _PER_STEP or call.x.shape is None or call.x.rank != 3:
        raise Unclear(f"it applies {cls!r} to each step")
    return _LAYERS[cls](b, replace(call, cls=cls, config=config))


def _spectral(b: Builder, call: Call) -> list[Flow]:
    cls, config = call.inner("layer")
    if cls not in _LAYERS:
        raise Unclear(f"it wraps {cls!r}")
    return _LAYERS[cls](b, replace(call, cls=cls, config=config))


_LAYERS: Mapping[str, Handler] = {
    **ACTIVATION_LAYERS,
    "Dense": dense,
    "Embedding": embedding,
    "MultiHeadAttention": attention,
    "GroupQueryAttention": attention,
    "GroupedQueryAttention": attention,
    "EinsumDense": einsum_dense,
    "BatchNormalization": channel_norm("BatchNormalization"),
    "GroupNormalization": channel_norm("GroupNormalization"),
    "PReLU": channel_norm("PRelu"),
    "LayerNormalization": last_norm("LayerNormalization"),
    "RMSNormalization": last_norm("RMSNormalization"),
    "Flatten": flatten,
    "Reshape": reshape,
    "Permute": permute,
    "RepeatVector": repeat_vector,
    **{cls: merge(op) for cls, op in MERGES.items()},
    "Concatenate": concatenate,
    "LSTM": recurrent,
    "GRU": recurrent,
    "SimpleRNN": recurrent,
    "RNN": rnn,
    "Bidirectional": bidirectional,
    "TimeDistributed": _time_distributed,
    "SpectralNormalization": _spectral,
    **{cls: _identity(setting) for cls, setting in NOISES.items()},
    "ActivityRegularization": _identity("l1", "l2"),
    "Identity": _identity(),
    **dict.fromkeys(
        ("RandomFlip", "RandomRotation", "RandomTranslation", "RandomZoom", "RandomContrast", "RandomBrightness"),
        _identity(),
    ),
    **{f"Conv{n}D": conv(n) for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": depthwise_conv(n) for n in (1, 2)},
    **{f"SeparableConv{n}D": separable_conv(n) for n in (1, 2)},
    **{f"Conv{n}DTranspose": conv_transpose(n) for n in (1, 2, 3)},
    **{f"{cls}{n}D": pool(op, n) for cls, op in POOLS.items() for n in (1, 2, 3)},
    **{f"{cls}{n}D": global_pool(op, n) for cls, op in GLOBAL_POOLS.items() for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": zero_padding(n) for n in (1, 2, 3)},
    **{f"Cropping{n}D": cropping(n) for n in (1, 2, 3)},
    **{f"UpSampling{n}D": upsampling(n) for n in (1, 2, 3)},
}  # fmt: skip

_FOLLOW_OPAQUE = {
    "Dense", "BatchNormalization", "LayerNormalization", "RMSNormalization", "PReLU", "GroupNormalization",
    "Flatten", "Reshape", "Dropout", "Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "Identity",
    "Add", "Subtract", "Multiply", "Maximum", "Minimum", "Average", "Concatenate",
}  # fmt: skip
"""Layers that can be followed although their input comes from a layer that was not understood."""

_TAKE_ARGUMENTS = {
    "LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional",
    "MultiHeadAttention", "GroupQueryAttention", "GroupedQueryAttention",
}  # fmt: skip
"""Layers that may be called with more than their inputs."""


def apply_layer(b: Builder, entry: Config, call: Call) -> list[Flow]:
    """The outputs of a serialised layer or operation, called as `call` says."""
    module = entry.get("module")
    operation = isinstance(module, str) and module.startswith("keras.src.ops")
    if call.cls == "TFOpLambda" and call.config.get("function") in TF_FUNCTIONS:
        operation, call = True, _as_operation(call)
    table = OPERATIONS if operation else _LAYERS
    if is_foreign(entry) or call.cls not in table:
        raise Unclear("not a layer that a graph can express")
    if call.arguments.get("training") not in (None, False):
        raise Unclear("it is called in training mode")
    if isinstance(call.arguments.get("mask"), Flow):
        raise Unclear("it is called with a mask")
    kept = {key: value for key, value in call.arguments.items() if key not in ("training", "mask")}
    if not operation and any(isinstance(value, list) or value not in (None, False) for value in call.constants):
        raise Unclear("it is called with a constant")
    takes_arguments = operation or call.cls in _TAKE_ARGUMENTS
    if not takes_arguments and any(value not in (None, False) for value in kept.values()):
        raise Unclear("it is called with arguments")
    if any(flow.opaque for flow in call.inputs) and call.cls not in _FOLLOW_OPAQUE:
        for flow in call.inputs:
            b.taint(flow)
        if all(flow.shape is None for flow in call.inputs):
            raise Unclear("its input comes from a layer that is not understood")
    return table[call.cls](b, replace(call, arguments=kept))


def _as_operation(call: Call) -> Call:
    """A function of TensorFlow that Keras 2 wrapped into a layer, as Keras 3 writes it."""
    others = [value for key, value in call.arguments.items() if key != "name"]
    flows = iter(call.inputs)
    first = [next(flows) if value is None else value for value in call.constants] or call.inputs
    operands = [*first, *others]
    inputs = tuple(value for value in operands if isinstance(value, Flow))
    numbers = tuple(None if isinstance(value, Flow) else value for value in operands)
    cls = TF_FUNCTIONS[call.config["function"]]
    constants = numbers if len(inputs) < len(operands) else ()
    return replace(call, cls=cls, config={}, arguments={}, inputs=inputs, constants=constants)
