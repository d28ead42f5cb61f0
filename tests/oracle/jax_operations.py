"""The operations of derived columns in JAX, for both kinds of Flax."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

OPERATIONS: dict[str, Callable[..., Any]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "flatten": lambda x: x.reshape(x.shape[0], -1),
    "reshape": lambda x, shape: x.reshape(x.shape[0], *shape),
    "transpose": lambda x, axes: x.transpose(axes),
    "max_pool": lambda x, window: nn.max_pool(x, window, strides=window),
    "mean": lambda x: x.mean(tuple(range(1, x.ndim - 1))),
    "concat": lambda *values: jnp.concatenate(values, axis=-1),
    "add": jnp.add,
    "last": lambda x: x[:, -1],
}


def in_precision(dtype: str) -> AbstractContextManager[Any]:
    """JAX has no doubles unless told so."""
    context: AbstractContextManager[Any] = jax.enable_x64(dtype == "float64")
    return context


