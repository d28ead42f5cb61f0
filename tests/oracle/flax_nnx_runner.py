"""Flax NNX's side of the oracle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.flax
from flax import nnx, serialization, traverse_util

from tests.columns.flax_nnx import CELLS, FORMATS
from tests.oracle.column_runner import Arrays, Side, apply, handlers
from tests.oracle.jax_operations import OPERATIONS, from_content, in_precision
from tests.oracle.process import serve
from tests.zoo import Case, Layer, Model

RENAMED = {"activation_fn": {"relu": nnx.relu, "tanh": nnx.tanh}}
OPTIONS: dict[str, dict[str, Any]] = {"MultiHeadAttention": {"decode": False}}


class Net(nnx.Module):
    """The rows of a column, each layer an attribute of its name."""

    def __init__(self, rows: tuple[Layer, ...], dtype: str, rngs: nnx.Rngs) -> None:
        self.rows = rows
        for row in rows:
            if row.cls not in OPERATIONS and not hasattr(self, row.cls):
                setattr(self, row.name, layer(row, dtype, rngs))

    def __call__(self, *inputs: Any) -> Any:
        def step(row: Layer, arguments: list[Any]) -> Any:
            if operation := OPERATIONS.get(row.cls):
                return operation(*arguments, **row.args)
            found = getattr(self, row.cls if hasattr(self, row.cls) else row.name)
            if isinstance(found, nnx.List):
                (value,) = arguments
                for one in found:
                    value = one(value)
                return value
            return found(*arguments)

        return apply(self.rows, inputs, step)


def layer(row: Layer, dtype: str, rngs: nnx.Rngs) -> Any:
    """Layers that are numbered are a list."""
    if row.cls == "Container" and not all(one.name.isdecimal() for one in row.inside):
        return Net(row.inside, dtype, rngs)
    inside = [layer(one, dtype, rngs) for one in row.inside]
    if row.cls == "Container":
        return nnx.List(inside)
    cls = getattr(nnx, row.cls)
    args = {name: RENAMED[name][value] if name in RENAMED else value for name, value in row.args.items()}
    known = inspect.signature(cls.__init__).parameters
    more: dict[str, Any] = {"rngs": rngs} if "rngs" in known else {}
    if "param_dtype" in known:
        more["param_dtype"] = jnp.dtype(dtype)
    if row.cls in CELLS:
        more["dtype"] = jnp.dtype(dtype)
    return cls(*inside, **args, **OPTIONS.get(row.cls, {}), **more)


@dataclass(frozen=True)
class Made:
    """A model's compiled call and the state that files hold."""

    call: Callable[..., Any]
    state: nnx.State
    dtype: str


def make(case: Case, model: Model, dtype: str) -> Made:
    with in_precision(dtype):
        net = nnx.eval_shape(lambda: Net(model.layers, dtype, nnx.Rngs(0)))
    net.eval()
    graph, streams, state = nnx.split(net, nnx.RngState, ...)
    # Running statistics are made in single precision whatever the layer's is.
    state = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, dtype), state)

    def call(state: nnx.State, *inputs: Any) -> Any:
        # No output depends on the streams in inference, but they must be there.
        real = jax.tree.map(real_stream, streams)
        return nnx.merge(graph, real, state)(*inputs)

    return Made(jax.jit(call), state, dtype)


def real_stream(like: Any) -> Any:
    return jnp.zeros(like.shape, like.dtype) if jnp.issubdtype(like.dtype, jnp.integer) else jax.random.key(0)


def flat(state: nnx.State) -> dict[tuple[Any, ...], Any]:
    return traverse_util.flatten_dict(nnx.to_pure_dict(state))


def joined(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def tensors(made: Made) -> Arrays:
    named = {joined(path): value for path, value in flat(made.state).items()}
    return {
        name: np.zeros(one.shape, one.dtype) if isinstance(one, jax.ShapeDtypeStruct) else np.asarray(one)
        for name, one in sorted(named.items())
    }


def with_pure(made: Made, pure: dict[str, Any]) -> Made:
    state = jax.tree.map(lambda one: one, made.state)
    nnx.replace_by_pure_dict(state, pure)
    return replace(made, state=state)


def fill(made: Made, values: Arrays) -> Made:
    paths = flat(made.state)
    assert {joined(path) for path in paths} == set(values)
    with in_precision(made.dtype):
        full = {path: jnp.asarray(values[joined(path)]) for path in paths}
    return with_pure(made, traverse_util.unflatten_dict(full))


def run(made: Made, inputs: Sequence[np.ndarray]) -> np.ndarray:
    with in_precision(made.dtype):
        return np.asarray(made.call(made.state, *inputs))


def save_orbax(content: Any, path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, content)


SAVE: dict[str, tuple[str, Callable[[Made, Path], Any]]] = {
    "orbax": ("orbax", lambda made, path: save_orbax(nnx.to_pure_dict(made.state), path)),
    "orbax_state": ("orbax_state", lambda made, path: save_orbax(made.state, path)),
    "msgpack": (
        "model.msgpack",
        lambda made, path: path.write_bytes(serialization.to_bytes(nnx.to_pure_dict(made.state))),
    ),
    "safetensors": (
        "model.safetensors",
        lambda made, path: safetensors.flax.save_file({joined(p): v for p, v in flat(made.state).items()}, path),
    ),
}


def save(made: Made, folder: Path, kind: str) -> Path:
    name, write = SAVE[kind]
    path = folder.resolve() / name
    with in_precision(made.dtype):
        write(made, path)
    return path


def load(made: Made, file: Path) -> Made:
    """Into the structure of the model: every name, shape and dtype must be there."""
    with in_precision(made.dtype):
        loaded = load_folder(made, file.resolve()) if file.is_dir() else load_file(made, file)
    before, after = flat(made.state), flat(loaded.state)
    assert set(before) == set(after)
    for path, like in before.items():
        one = after[path]
        assert one.shape == like.shape and one.dtype == like.dtype, f"{path}: {one.shape} {one.dtype}, not {like.shape}"
    return loaded


def load_file(made: Made, file: Path) -> Made:
    pure = nnx.to_pure_dict(made.state)
    if file.suffix == ".safetensors":
        found = safetensors.flax.load_file(file)
        names = {joined(path): path for path in flat(made.state)}
        assert set(names) == set(found), f"{sorted(found)} are not the names of {sorted(names)}"
        return with_pure(made, traverse_util.unflatten_dict({names[name]: value for name, value in found.items()}))
    return with_pure(made, from_content(pure, serialization.msgpack_restore(file.read_bytes())))


def load_folder(made: Made, folder: Path) -> Made:
    """A state is saved with its variables, whose arrays lie one level deeper under the name `value`."""
    with ocp.StandardCheckpointer() as checkpointer:
        names = jax.tree.leaves_with_path(checkpointer.metadata(folder).item_metadata.tree)
        whole = all(str(path[-1].key) == "value" for path, _ in names)
        content = made.state if whole else nnx.to_pure_dict(made.state)
        found = checkpointer.restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, content))
    return replace(made, state=found) if whole else with_pure(made, found)


if __name__ == "__main__":
    serve(handlers(Side("flax_nnx", 4, FORMATS, make, tensors, fill, run, save, load)))
