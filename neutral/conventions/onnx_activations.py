"""The activation functions inside ONNX's recurrent operators, which have names and numbers of their own there.

>>> activation_settings(["hard_sigmoid", "tanh"])
{'activations': ('HardSigmoid', 'Tanh'), 'activation_alpha': (0.16666666666666666,), 'activation_beta': (0.5,)}
>>> activation_names({"activations": ("HardSigmoid", "Tanh"), "activation_alpha": (0.2,), "activation_beta": (0.5,)}, 2)
('hard_sigmoid_0.2', 'tanh')
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

IN_RECURRENT: Mapping[str, tuple[str, float | None, float | None]] = {
    "tanh": ("Tanh", None, None),
    "sigmoid": ("Sigmoid", None, None),
    "relu": ("Relu", None, None),
    "softsign": ("Softsign", None, None),
    "softplus": ("Softplus", None, None),
    "hard_sigmoid": ("HardSigmoid", 1 / 6, 0.5),
    "hard_sigmoid_0.2": ("HardSigmoid", 0.2, 0.5),
    "elu": ("Elu", 1.0, None),
    "leaky_relu": ("LeakyRelu", 0.2, None),
    "linear": ("Affine", 1.0, 0.0),
}
"""neutral's name of a function: ONNX's, and its alpha and beta where it has them."""

_USUAL: Mapping[str, tuple[float | None, float | None]] = {
    "Affine": (1.0, 0.0),
    "Elu": (1.0, None),
    "HardSigmoid": (0.2, 0.5),
    "LeakyRelu": (0.01, None),
    "ScaledTanh": (1.0, 1.0),
    "ThresholdedRelu": (1.0, None),
}
"""The functions that have numbers, and what these are where a node does not say."""


def activation_settings(names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The attributes of a recurrent operator whose functions are these, in ONNX's order."""
    found = [IN_RECURRENT[name] for name in names]
    settings: dict[str, tuple[Any, ...]] = {"activations": tuple(name for name, _, _ in found)}
    for key, numbers in (
        ("activation_alpha", tuple(alpha for _, alpha, _ in found if alpha is not None)),
        ("activation_beta", tuple(beta for _, _, beta in found if beta is not None)),
    ):
        if numbers:
            settings[key] = numbers
    return settings


def activation_names(config: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    """neutral's names of the functions that a node names, `count` for each direction; None if it has others, or other
    ones in its two directions, or names none."""
    given = [str(name) for name in config.get("activations") or ()]
    alphas, betas = (list(config.get(f"activation_{name}") or ()) for name in ("alpha", "beta"))
    found = []
    for name in given:
        known = next((usual for usual in (*_USUAL, *_NUMBERLESS) if usual.lower() == name.lower()), None)
        if known is None:
            return None
        # A function takes the next number of each list, if it has such a number at all.
        alpha, beta = _USUAL.get(known, (None, None))
        alpha = alphas.pop(0) if alpha is not None and alphas else alpha
        beta = betas.pop(0) if beta is not None and betas else beta
        found.append(next((mine for mine, other in IN_RECURRENT.items() if _equal(other, (known, alpha, beta))), None))
    if not found or None in found or len(found) % count or found[:count] * (len(found) // count) != found:
        return None
    return tuple(str(name) for name in found[:count])


_NUMBERLESS = ("Relu", "Sigmoid", "Softplus", "Softsign", "Tanh")


def _equal(a: tuple[str, float | None, float | None], b: tuple[str, float | None, float | None]) -> bool:
    """One function; its numbers were rounded to float32 in the file."""
    if a[0] != b[0]:
        return False
    pairs = zip(a[1:], b[1:], strict=True)
    return all(x == y or (x is not None and y is not None and math.isclose(x, y, rel_tol=1e-6)) for x, y in pairs)
