"""What both kinds of Flax share: the operations of derived columns in JAX, precision, and what a msgpack file holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization, traverse_util

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


def from_content(target: Any, content: Any) -> Any:
    """`serialization.from_bytes` drops what a file has too much; here that is an error as well."""
    ours, theirs = (
        set(traverse_util.flatten_dict(tree, keep_empty_nodes=True))
        for tree in (serialization.to_state_dict(target), content)
    )
    if ours != theirs:
        raise ValueError(f"the file's names differ from the model's: {sorted(map(str, ours ^ theirs))}")
    return serialization.from_state_dict(target, content)
