"""Keras' layers without weights as those that TensorFlow.js has: one by one, or several that compute the same.

Its version 4.22 lacks layers of one and three spatial axes that pad, crop and repeat (these are done in two axes at a
time), most activations of Keras 3, settings of ReLU and ELU, `keepdims`, and softmax over other axes than the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_tensor import Config
from neutral.importers.tfjs_steps import ACTIVATIONS, Call, Rule, Step, chain, grid, product, same


def _activation(call: Call) -> tuple[Step, ...]:
    name = call.config["activation"]
    if name in ACTIVATIONS:
        return chain(("", "Activation", {"activation": ACTIVATIONS[name]}))
    if name not in _COMPOSED:
        raise Inexpressible(f"the activation {name}", "one that TensorFlow.js has")
    return _COMPOSED[name]


def _scaled(scale: float, offset: float) -> Config:
    return {"scale": scale, "offset": offset}


_GATE: tuple[tuple[str, str, Config], ...] = (
    ("line", "Rescaling", _scaled(1 / 6, 0.5)),
    ("gate", "ReLU", {"max_value": 1.0}),
)

_COMPOSED: Mapping[str, tuple[Step, ...]] = {
    "hard_sigmoid": chain(_GATE[0], ("", "ReLU", {"max_value": 1.0})),
    "hard_silu": (*chain(*_GATE), Step("", "Multiply", {}, ("", "gate"))),
    "hard_swish": (*chain(*_GATE), Step("", "Multiply", {}, ("", "gate"))),
    "hard_tanh": chain(
        ("shift", "Rescaling", _scaled(1.0, 1.0)), ("bound", "ReLU", {"max_value": 2.0}), ("", "Rescaling", _scaled(1.0, -1.0))
    ),
    "leaky_relu": chain(("", "LeakyReLU", {"alpha": 0.2})),
    # x - clip(x, -0.5, 0.5)
    "soft_shrink": (
        *chain(
            ("shift", "Rescaling", _scaled(1.0, 0.5)),
            ("bound", "ReLU", {"max_value": 1.0}),
            ("less", "Rescaling", _scaled(-1.0, 0.5)),
        ),
        Step("", "Add", {}, ("", "less")),
    ),
}  # fmt: skip


def _relu(call: Call) -> tuple[Step, ...]:
    threshold, limit = call.config.get("threshold"), call.config.get("max_value")
    if threshold:
        return chain(("", "ThresholdedReLU", {"theta": float(threshold)}))
    return chain(("", "ReLU", {} if limit is None else {"max_value": float(limit)}))


def _leaky_relu(call: Call) -> tuple[Step, ...]:
    return chain(("", "LeakyReLU", {"alpha": call.config["negative_slope"]}))


def _elu(call: Call) -> tuple[Step, ...]:
    alpha = float(call.config.get("alpha", 1.0))
    if alpha == 1.0:
        return chain(("", "ELU", {}))
    # TensorFlow.js has alpha 1 alone: relu(x) (1 - alpha) + elu(x) alpha
    return (
        Step("relu", "ReLU", {}),
        Step("positive", "Rescaling", _scaled(1 - alpha, 0.0), ("relu",)),
        Step("elu", "ELU", {}),
        Step("both", "Rescaling", _scaled(alpha, 0.0), ("elu",)),
        Step("", "Add", {}, ("positive", "both")),
    )


def _softmax(call: Call) -> tuple[Step, ...]:
    rank = len(call.shape)
    axis = int(call.config.get("axis", -1)) % rank
    if axis == rank - 1:
        return chain(("", "Softmax", {"axis": -1}))
    turned = [*(i for i in range(1, rank) if i != axis), axis]
    back = [turned.index(i) + 1 for i in range(1, rank)]
    return chain(
        ("last", "Permute", {"dims": turned}), ("softmax", "Softmax", {"axis": -1}), ("", "Permute", {"dims": back})
    )


def _subtract(call: Call) -> tuple[Step, ...]:
    return (Step("less", "Rescaling", _scaled(-1.0, 0.0), ("1",)), Step("", "Add", {}, ("0", "less")))


def _spatial_dropout(call: Call) -> tuple[Step, ...]:
    shape = [None, *(1 for _ in call.shape[1:-1]), None]
    return chain(("", "Dropout", {"rate": call.config["rate"], "noise_shape": shape}))


# Layers that TensorFlow.js has for two spatial axes alone.


def _in_two_axes(
    call: Call,
    cls: str,
    config: Callable[[list[Any]], Config],
    amounts: list[Any],
    nothing: Any,
    sizes: Callable[[int | None, Any], int | None],
) -> tuple[Step, ...]:
    """A layer of one or three spatial axes by the one for two: `amounts` per axis, `sizes` what becomes of an axis."""
    *space, channels = call.shape[1:]
    grown = [sizes(n, amount) for n, amount in zip(space, amounts, strict=True)]
    if len(space) == 1:
        return chain(
            ("wide", "Reshape", {"target_shape": grid([space[0], 1, channels])}),
            ("two", cls, config([amounts[0], nothing])),
            ("", "Reshape", {"target_shape": grid([grown[0], channels])}),
        )
    return chain(
        ("wide", "Reshape", {"target_shape": grid([space[0], space[1], product(space[2], channels)])}),
        ("two", cls, config(amounts[:2])),
        ("deep", "Reshape", {"target_shape": grid([product(grown[0], grown[1]), space[2], channels])}),
        ("three", cls, config([nothing, amounts[2]])),
        ("", "Reshape", {"target_shape": grid([*grown, channels])}),
    )


def _pairs(value: Any, count: int) -> list[Any]:
    return [list(value)] if count == 1 and not isinstance(value[0], list | tuple) else [list(pair) for pair in value]


def bordered(key: str, sign: int) -> Rule:
    def rule(call: Call) -> tuple[Step, ...]:
        pairs = _pairs(call.config[key], len(call.shape) - 2)
        if sign < 0 and None in call.shape[1:-1]:  # TensorFlow.js takes such a size for 0, and all that follows from it
            raise Inexpressible(
                "a crop of sizes that are not known", "sizes that are known", "export a model that says them"
            )
        if len(pairs) == 2:
            return same(call)

        def grown(n: int | None, pair: Any) -> int | None:
            return None if n is None else n + sign * sum(pair)

        return _in_two_axes(call, f"{call.cls[:-2]}2D", lambda both: {key: both}, pairs, [0, 0], grown)

    return rule


def _upsampling(call: Call) -> tuple[Step, ...]:
    size, rank = call.config["size"], len(call.shape) - 2
    factors = [size] * rank if isinstance(size, int) else list(size)
    if call.config.get("interpolation", "nearest") != "nearest":
        raise Inexpressible(
            "bilinear upsampling", "nearest, for TensorFlow.js places the pixels of a bilinear one elsewhere"
        )
    if rank == 2:
        return chain(("", "UpSampling2D", {"size": factors, "interpolation": "nearest"}))

    def grown(n: int | None, factor: Any) -> int | None:
        return None if n is None else n * int(factor)

    def two(both: list[Any]) -> Config:
        return {"size": both, "interpolation": "nearest"}

    return _in_two_axes(call, "UpSampling2D", two, factors, 1, grown)


def _global_pool(call: Call) -> tuple[Step, ...]:
    rank, channels = len(call.shape) - 2, call.shape[-1]
    found: list[tuple[str, str, Config]] = [("", call.cls, {})]
    if rank == 3:
        found = [
            ("row", "Reshape", {"target_shape": grid([product(*call.shape[1:-1]), channels])}),
            ("", f"{call.cls[:-2]}1D", {}),
        ]
    if call.config.get("keepdims"):
        found[-1] = ("vector", *found[-1][1:])
        found.append(("", "Reshape", {"target_shape": grid([*(1 for _ in range(rank)), channels])}))
    return chain(*found)


_AS_IN_KERAS = (
    "Rescaling", "Flatten", "Reshape", "Permute", "RepeatVector", "Add", "Multiply", "Average", "Maximum", "Minimum",
    "Concatenate", "Dropout", "SpatialDropout1D", "GaussianNoise", "GaussianDropout", "AlphaDropout",
)  # fmt: skip

LAYERS: Mapping[str, Rule] = {
    **dict.fromkeys(_AS_IN_KERAS, same),
    **{f"{kind}Pooling{n}D": same for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"Global{kind}Pooling{n}D": _global_pool for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": bordered("padding", 1) for n in (1, 2, 3)},
    **{f"Cropping{n}D": bordered("cropping", -1) for n in (1, 2, 3)},
    **{f"UpSampling{n}D": _upsampling for n in (1, 2, 3)},
    **{f"SpatialDropout{n}D": _spatial_dropout for n in (2, 3)},
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "ELU": _elu,
    "Softmax": _softmax,
    "Subtract": _subtract,
}  # fmt: skip
