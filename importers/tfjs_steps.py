"""What Keras' layers become in TensorFlow.js: steps, each a layer of its own, and what steps are put together of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_tensor import Config, Shape

_NAMED = (
    "elu", "selu", "relu", "relu6", "linear", "sigmoid", "softplus", "softsign", "tanh", "softmax", "log_softmax", "gelu", "mish",
)  # fmt: skip

ACTIVATIONS = {
    **{name: name for name in _NAMED},
    "silu": "swish",
    "swish": "swish",
    "celu": "elu",
}
"""Activation functions of Keras 3, by neutral's names, and what TensorFlow.js calls them."""


@dataclass(frozen=True)
class Call:
    """A Keras layer applied once: its class, its config, the shapes of its inputs in Keras' order of axes."""

    cls: str
    config: Config
    shapes: tuple[Shape, ...]
    depthwise: bool = False
    """A Conv2D with groups that Keras has for a depthwise convolution."""

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def settings(self) -> Config:
        return {key: value for key, value in self.config.items() if key not in ("name", "dtype")}


@dataclass(frozen=True)
class Step:
    """A TensorFlow.js layer: what its name adds to that of the Keras layer, and what it takes.

    It takes other steps by their suffixes, inputs of the Keras layer by their numbers (or "", the first), and the step
    of the Keras layer's own name as "=".
    """

    suffix: str
    cls: str
    config: Config
    inputs: tuple[str, ...] = ("",)


Rule = Callable[[Call], tuple[Step, ...]]


def chain(*layers: tuple[str, str, Config]) -> tuple[Step, ...]:
    """Layers of which each takes the one before it."""
    before = ["", *(suffix for suffix, _, _ in layers)]
    return tuple(
        Step(suffix, cls, config, (taken,)) for taken, (suffix, cls, config) in zip(before, layers, strict=False)
    )


def same(call: Call) -> tuple[Step, ...]:
    return (Step("", call.cls, call.settings, inputs_of(call)),)


def inputs_of(call: Call) -> tuple[str, ...]:
    return tuple(str(i) for i in range(len(call.shapes)))


def grid(sizes: Sequence[int | None]) -> list[int]:
    """The sizes of a Reshape, one of which it may have to find out itself."""
    if list(sizes).count(None) > 1:
        raise Inexpressible(
            f"{list(sizes).count(None)} sizes that are not known", "at most one, to lay out two axes at a time"
        )
    return [-1 if n is None else n for n in sizes]


def product(*sizes: int | None) -> int | None:
    known = [n for n in sizes if n is not None]
    return math.prod(known) if len(known) == len(sizes) else None
