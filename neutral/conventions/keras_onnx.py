"""What Keras and ONNX call the same computations: the one table that reading and writing a Keras graph share.

>>> ACTIVATIONS["relu6"]
('Clip', {'min': 0.0, 'max': 6.0})
>>> activation_name("Swish", {}), activation_name("Shrink", {"lambd": 0.5, "bias": 0.5}), activation_name("Elu", {"alpha": 2.0})
('silu', 'soft_shrink', None)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from neutral.schema.graph import Attribute

ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Attribute]]] = {
    "relu": ("Relu", {}),
    "relu6": ("Clip", {"min": 0.0, "max": 6.0}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "elu": ("Elu", {"alpha": 1.0}),
    "celu": ("Celu", {"alpha": 1.0}),
    "selu": ("Selu", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "silu": ("Swish", {}),
    "swish": ("Swish", {}),
    "mish": ("Mish", {}),
    "hard_silu": ("HardSwish", {}),
    "hard_swish": ("HardSwish", {}),
    "hard_tanh": ("Clip", {"min": -1.0, "max": 1.0}),
    "hard_shrink": ("Shrink", {"lambd": 0.5, "bias": 0.0}),
    "soft_shrink": ("Shrink", {"lambd": 0.5, "bias": 0.5}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.2}),
    "exponential": ("Exp", {}),
}
"""Activation functions that are one operator on each element. Of two names for one, Keras 3 writes the first."""

FUNCTIONS = frozenset(ACTIVATIONS) | {
    "linear", "softmax", "log_softmax", "log_sigmoid", "glu", "sparse_plus", "sparse_sigmoid", "sparsemax", "squareplus",
    "tanh_shrink", "threshold",
}  # fmt: skip
"""All activation functions that Keras 3 has by name."""

KERAS2_ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Attribute]]] = {
    **ACTIVATIONS,
    "hard_sigmoid": ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),
}
"""The same as Keras 1 and 2 compute them."""

KERAS2_NAMES: Mapping[str, str] = {"hard_sigmoid": "hard_sigmoid_0.2"}
"""Activation functions that Keras 3 computes in another way than Keras 2: Keras 2's name, and neutral's name for it."""

NONNEGATIVE = frozenset({"relu", "relu6", "sigmoid", "hard_sigmoid", "softplus", "exponential"})
"""Activation functions whose results are never below zero."""

MERGES: Mapping[str, str] = {
    "Add": "Add",
    "Subtract": "Sub",
    "Multiply": "Mul",
    "Maximum": "Max",
    "Minimum": "Min",
    "Average": "Mean",
}
"""Layers that join tensors element by element."""

POOLS: Mapping[str, str] = {"MaxPooling": "MaxPool", "AveragePooling": "AveragePool"}
GLOBAL_POOLS: Mapping[str, str] = {"GlobalMaxPooling": "GlobalMaxPool", "GlobalAveragePooling": "GlobalAveragePool"}
"""Layers for 1, 2 and 3 spatial axes: `MaxPooling2D`."""

NOISES: Mapping[str, str] = {
    "Dropout": "rate",
    "AlphaDropout": "rate",
    "GaussianDropout": "rate",
    "GaussianNoise": "stddev",
    **{f"SpatialDropout{n}D": "rate" for n in (1, 2, 3)},
}
"""Layers that do something in training only, and the setting that says how much."""

_DEFAULTS: Mapping[str, Mapping[str, Attribute]] = {
    "Celu": {"alpha": 1.0},
    "Elu": {"alpha": 1.0},
    "Gelu": {"approximate": "none"},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "LeakyRelu": {"alpha": 0.01},
    "Shrink": {"lambd": 0.5, "bias": 0.0},
}
"""What ONNX takes where an attribute is not given."""

_CLOSE = 1e-7


def activation_name(op: str, attributes: Mapping[str, Attribute]) -> str | None:
    """The activation function of Keras 3 that an operator with these attributes computes, if there is one."""
    given = {**_DEFAULTS.get(op, {}), **attributes}
    for name, (known, settings) in ACTIVATIONS.items():
        if op == known and all(_equal(given.get(key), value) for key, value in settings.items()):
            return name
    return None


def _equal(given: Attribute, wanted: Attribute) -> bool:
    if isinstance(given, int | float) and isinstance(wanted, int | float):
        return abs(given - wanted) < _CLOSE
    return given == wanted


def known_product(sizes: Sequence[int | None]) -> int | None:
    """The product of sizes, or None if one of them is not known."""
    known = [n for n in sizes if n is not None]
    return math.prod(known) if len(known) == len(sizes) else None
