"""Which variables Keras' own layers have, in the order in which they are created and therefore saved.

>>> own_variables("BatchNormalization", {"scale": False})
('beta', 'moving_mean', 'moving_variance')
>>> parts("Bidirectional")
()
>>> [part.group for part in parts("LSTM")]
['cell']

Keras 3 and Keras 2.13+ save variables by number (`vars/0`, `vars/1`), so a missing one shifts the rest. Where a file
has no config, the number of variables decides, or leaves them unnamed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

_CONV = ("kernel", "bias")
_CELL = ("kernel", "recurrent_kernel", "bias")
_NORM = ("gamma", "beta")

VARIABLES: Mapping[str, tuple[str, ...]] = {
    "Dense": _CONV,
    "EinsumDense": _CONV,
    "Conv1D": _CONV,
    "Conv2D": _CONV,
    "Conv3D": _CONV,
    "Conv1DTranspose": _CONV,
    "Conv2DTranspose": _CONV,
    "Conv3DTranspose": _CONV,
    "DepthwiseConv1D": _CONV,
    "DepthwiseConv2D": _CONV,
    "SeparableConv1D": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "SeparableConv2D": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "Embedding": ("embeddings",),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "LayerNormalization": _NORM,
    "GroupNormalization": _NORM,
    "RMSNormalization": ("scale",),
    "UnitNormalization": (),
    "Normalization": ("mean", "variance", "count"),
    "PReLU": ("alpha",),
    "SimpleRNNCell": _CELL,
    "LSTMCell": _CELL,
    "GRUCell": _CELL,
    "ConvLSTMCell": _CELL,
    "ConvLSTM1DCell": _CELL,
    "ConvLSTM2DCell": _CELL,
    "ConvLSTM3DCell": _CELL,
    "Attention": ("scale", "concat_score_weight"),
    "AdditiveAttention": ("scale",),
    "SpectralNormalization": ("spectral/0", "spectral/1"),
}
"""All variables that a layer of the class may have itself, in order of creation."""

STATE: Mapping[str, frozenset[str]] = {
    "Normalization": frozenset({"count"}),
    "SpectralNormalization": frozenset({"spectral/0", "spectral/1"}),
}
"""Variables that are no weights: counters, and copies of a weight that is stored beside them."""

NOT_TRAINED = frozenset({"moving_mean", "moving_variance", "mean", "variance", "count", "spectral/0", "spectral/1"})
"""Variables that legacy HDF5 files list after all trained ones of a top-level layer."""


@dataclass(frozen=True)
class Part:
    """A piece of a layer that holds variables: its group below the layer's, its class, what its local names begin with."""

    group: str
    cls: str
    prefix: str = ""
    name: str | None = None
    """The name Keras gives it (legacy files name variables by it), or None if that is the cell's own."""


_HEADS = (
    Part("query_dense", "EinsumDense", "query/", "query"),
    Part("key_dense", "EinsumDense", "key/", "key"),
    Part("value_dense", "EinsumDense", "value/", "value"),
    Part("output_dense", "EinsumDense", "attention_output/", "attention_output"),
)

_PARTS: Mapping[str, tuple[Part, ...]] = {
    "SimpleRNN": (Part("cell", "SimpleRNNCell"),),
    "LSTM": (Part("cell", "LSTMCell"),),
    "GRU": (Part("cell", "GRUCell"),),
    "ConvLSTM1D": (Part("cell", "ConvLSTM1DCell"),),
    "ConvLSTM2D": (Part("cell", "ConvLSTM2DCell"),),
    "ConvLSTM3D": (Part("cell", "ConvLSTM3DCell"),),
    "MultiHeadAttention": _HEADS,
    "GroupedQueryAttention": tuple(replace(head, group=f"_{head.group}") for head in _HEADS),
}

PYTHON_NAME: Mapping[str, str] = {"GroupQueryAttention": "GroupedQueryAttention"}
"""Classes that a config calls by another name than their own, by which groups are counted."""

CELL_OF: Mapping[str, str] = {"LSTMCell": "LSTM", "GRUCell": "GRU", "SimpleRNNCell": "SimpleRNN"}
"""A cell inside `RNN` is computed as the layer of the same kind."""

RECURRENT = frozenset({"SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"})

CONTAINERS = frozenset({"Sequential", "Functional", "Model"})

WRAPPERS = frozenset({"Bidirectional", "TimeDistributed", "SpectralNormalization", "RNN", "StackedRNNCells"})

_WEIGHTLESS = """
    InputLayer Activation Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D AlphaDropout GaussianNoise
    GaussianDropout ActivityRegularization Flatten Reshape Permute RepeatVector Lambda Masking Identity Softmax ReLU
    LeakyReLU ELU ThresholdedReLU Add Subtract Multiply Average Maximum Minimum Concatenate Dot MaxPooling1D MaxPooling2D
    MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D
    GlobalMaxPooling3D GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D AdaptiveAveragePooling1D
    AdaptiveAveragePooling2D AdaptiveAveragePooling3D AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D
    ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D UpSampling1D UpSampling2D UpSampling3D
    Rescaling Resizing CenterCrop RandomFlip RandomRotation RandomZoom RandomTranslation RandomCrop RandomContrast
    RandomBrightness CategoryEncoding Discretization Hashing StringLookup IntegerLookup TextVectorization
    TFOpLambda SlicingOpLambda"""

WEIGHTLESS = frozenset(_WEIGHTLESS.split())

KNOWN = frozenset(VARIABLES) | frozenset(_PARTS) | CONTAINERS | WRAPPERS | WEIGHTLESS


def parts(cls: str) -> tuple[Part, ...]:
    """The pieces below a layer of Keras' own class `cls` that hold its variables, in order of creation."""
    return _PARTS.get(cls, ())


def own_variables(cls: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The variables that a layer of class `cls` with this config has itself, in order of creation."""
    return tuple(name for name in VARIABLES.get(cls, ()) if _present(cls, name, config))


def _present(cls: str, name: str, config: Mapping[str, Any]) -> bool:
    if cls == "EinsumDense" and name == "bias":
        return bool(config.get("bias_axes"))
    if cls == "Attention":
        return bool(config.get("use_scale")) if name == "scale" else config.get("score_mode") == "concat"
    if cls == "AdditiveAttention":
        return bool(config.get("use_scale", True))
    if cls == "Normalization":
        return config.get("mean") is None
    switch = _SWITCH.get((cls, name)) or ("use_bias" if name == "bias" else None)
    return switch is None or bool(config.get(switch, True))


_SWITCH: Mapping[tuple[str, str], str] = {
    (cls, name): switch
    for cls in ("BatchNormalization", "LayerNormalization", "GroupNormalization")
    for name, switch in (("gamma", "scale"), ("beta", "center"))
}


def variables_by_count(cls: str, count: int) -> tuple[str, ...] | None:
    """The variables of a layer of class `cls` of which only their number is known, or None if that does not decide.

    >>> variables_by_count("BatchNormalization", 4), variables_by_count("BatchNormalization", 3)
    (('gamma', 'beta', 'moving_mean', 'moving_variance'), None)
    """
    whole = VARIABLES.get(cls, ())
    optional = [
        name for name in whole if name == "bias" or (cls, name) in _SWITCH or cls in ("Attention", "AdditiveAttention")
    ]
    missing = len(whole) - count
    if missing < 0:
        return None
    choices = [set(gone) for gone in combinations(optional, missing)]
    return tuple(name for name in whole if name not in choices[0]) if len(choices) == 1 else None


def snake_case(cls: str) -> str:
    """The name of the group that Keras gives a layer of class `cls` (`keras.src.utils.naming.to_snake_case`).

    >>> snake_case("Conv2DTranspose"), snake_case("PReLU"), snake_case("RMSNormalization")
    ('conv2d_transpose', 'p_re_lu', 'rms_normalization')
    """
    name = re.sub(r"\W+", "", cls)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


_CLASS_OF_GROUP = {snake_case(cls): cls for cls in sorted(KNOWN)}


def class_of_group(group: str) -> str | None:
    """Keras' own class whose layers Keras files under `group` (`conv2d_12`), or None.

    >>> class_of_group("conv2d_transpose_3"), class_of_group("my_block")
    ('Conv2DTranspose', None)
    """
    return _CLASS_OF_GROUP.get(group) or _CLASS_OF_GROUP.get(re.sub(r"_[1-9][0-9]*$", "", group))


class Counter:
    """Numbers names as Keras does: `dense`, `dense_1`, `dense_2`."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def unique(self, name: str) -> str:
        number = self._used.get(name)
        self._used[name] = 0 if number is None else number + 1
        return name if number is None else f"{name}_{number + 1}"
