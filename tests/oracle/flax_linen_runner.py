"""Flax Linen's side of the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import safetensors.flax
from flax import serialization, traverse_util
from flax.training.train_state import TrainState

from tests.columns.flax_linen import FORMATS
from tests.oracle.column_runner import Arrays, Side, apply, handlers
from tests.oracle.jax_operations import OPERATIONS, from_content, in_precision
from tests.oracle.process import serve
from tests.zoo import Case, Layer, Model

Variables = dict[str, Any]
RENAMED = {"activation_fn": {"relu": nn.relu, "tanh": nn.tanh}}
INFERENCE: dict[str, dict[str, Any]] = {
    "BatchNorm": {"use_running_average": True},
    "Dropout": {"deterministic": True},
    "MultiHeadDotProductAttention": {"deterministic": True},
}


class Net(nn.Module):
    """The rows of a column, each layer under its own name."""

    rows: tuple[Layer, ...]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        made: dict[str, Any] = {}

        def step(row: Layer, arguments: list[Any]) -> Any:
            if row.cls in made:
                return made[row.cls](*arguments)
            if operation := OPERATIONS.get(row.cls):
                return operation(*arguments, **row.args)
            made[row.name] = layer(row, self.dtype)
            return made[row.name](*arguments)

        return apply(self.rows, inputs, step)


def layer(row: Layer, dtype: str, outer: Layer | None = None) -> nn.Module:
    """Call inside a module, to which a layer belongs under its name. A layer inside another belongs to that one.

    Unless both have one name: then the inner layer is the module's, and the outer one is named by Flax.
    """
    if row.cls == "Container":
        return Net(row.inside, dtype, name=row.name)
    more: dict[str, Any] = {}
    if outer is not None and outer.name != row.name:
        more["parent"] = None
    elif all(one.name != row.name for one in row.inside):
        more["name"] = row.name
    cls = getattr(nn, row.cls)
    if "param_dtype" in cls.__dataclass_fields__:
        more["param_dtype"] = dtype
    args = {name: RENAMED[name][value] if name in RENAMED else value for name, value in row.args.items()}
    inside = [layer(one, dtype, row) for one in row.inside]
    built: nn.Module = cls(*inside, **args, **INFERENCE.get(row.cls, {}), **more)
    return built


@dataclass(frozen=True)
class Made:
    """A module's compiled call and its variables."""

    call: Callable[..., Any]
    variables: Variables
    dtype: str


def make(case: Case, model: Model, dtype: str) -> Made:
    module = Net(model.layers, dtype)
    inputs = []
    for one, axes in zip(case.inputs, model.inputs, strict=True):
        sizes = dict(zip(one.axes, one.shape, strict=True))
        shape = tuple(sizes[letter] for letter in axes)
        inputs.append(jax.ShapeDtypeStruct(shape, "int32" if one.below else dtype))
    with in_precision(dtype):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return Made(jax.jit(module.apply), jax.tree.map(lambda one: np.zeros(one.shape, dtype), shapes), dtype)


def tensors(made: Made) -> Arrays:
    flat = traverse_util.flatten_dict(made.variables, sep="/")
    return {name: np.asarray(flat[name]) for name in sorted(flat)}


def fill(made: Made, values: Arrays) -> Made:
    flat = traverse_util.flatten_dict(made.variables)
    assert {"/".join(path) for path in flat} == set(values)
    with in_precision(made.dtype):
        full = {path: jnp.asarray(values["/".join(path)]) for path in flat}
    return replace(made, variables=traverse_util.unflatten_dict(full))


def run(made: Made, inputs: Sequence[np.ndarray]) -> np.ndarray:
    with in_precision(made.dtype):
        return np.asarray(made.call(made.variables, *inputs))


class StateWithStatistics(TrainState):
    """The usual way to keep running statistics in a train state."""

    batch_stats: Any


def train_state(made: Made) -> TrainState:
    """As after some steps of Adam."""
    cls = StateWithStatistics if "batch_stats" in made.variables else TrainState
    state = cls.create(apply_fn=made.call, tx=optax.adam(1e-3), **made.variables)
    rng = np.random.default_rng(7)
    moments = jax.tree.map(lambda one: jnp.asarray(rng.uniform(0.1, 1, one.shape), one.dtype), state.opt_state)
    return state.replace(step=7, opt_state=moments)


def join(made: Made, separator: str) -> dict[str, Any]:
    return traverse_util.flatten_dict(made.variables, sep=separator)


def save_orbax(made: Made, path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, made.variables)


def save_zarr(made: Made, path: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(made.variables))


def save_manager(made: Made, path: Path) -> None:
    with ocp.CheckpointManager(path) as manager:
        manager.save(7, args=ocp.args.StandardSave(made.variables))


SAVE: dict[str, tuple[str, Callable[[Made, Path], Any]]] = {
    "msgpack": ("model.msgpack", lambda made, path: path.write_bytes(serialization.to_bytes(made.variables))),
    "train_state": (
        "train_state.msgpack",
        lambda made, path: path.write_bytes(serialization.to_bytes(train_state(made))),
    ),
    "orbax": ("orbax", save_orbax),
    "orbax_zarr": ("orbax_zarr", save_zarr),
    "orbax_manager": ("orbax_manager", save_manager),
    "safetensors": ("model.safetensors", lambda made, path: safetensors.flax.save_file(join(made, "."), path)),
    "safetensors_slash": ("slash.safetensors", lambda made, path: safetensors.flax.save_file(join(made, "/"), path)),
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
        found = load_folder(made, file.resolve()) if file.is_dir() else load_file(made, file)
    assert jax.tree.structure(found) == jax.tree.structure(made.variables)
    for (path, one), like in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(made.variables), strict=True):
        place = jax.tree_util.keystr(path)
        assert one.shape == like.shape and one.dtype == like.dtype, (
            f"{place}: {one.shape} {one.dtype}, not {like.shape}"
        )
    return replace(made, variables=found)


def load_file(made: Made, file: Path) -> Variables:
    if file.suffix == ".safetensors":
        found = safetensors.flax.load_file(file)
        for separator in "./":
            flat = traverse_util.flatten_dict(made.variables, sep=separator)
            if set(flat) == set(found):
                names = dict(zip(flat, traverse_util.flatten_dict(made.variables), strict=True))
                return traverse_util.unflatten_dict({names[name]: value for name, value in found.items()})
        raise ValueError(f"{sorted(found)} are not the names of {sorted(flat)}")
    content = serialization.msgpack_restore(file.read_bytes())
    if "opt_state" in content:
        state = from_content(train_state(made), content)
        more = {"batch_stats": state.batch_stats} if "batch_stats" in made.variables else {}
        return {"params": state.params, **more}
    if set(made.variables) == {"params"} and "params" not in content:
        return {"params": from_content(made.variables["params"], content)}
    restored: Variables = from_content(made.variables, content)
    return restored


def load_folder(made: Made, folder: Path) -> Variables:
    steps = [one for one in folder.iterdir() if one.is_dir() and one.name.isdecimal()]
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, made.variables)
    if steps:
        with ocp.CheckpointManager(folder) as manager:
            found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(target))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(folder, target)
    restored: Variables = found
    return restored


if __name__ == "__main__":
    serve(handlers(Side("flax_linen", 3, FORMATS, make, tensors, fill, run, save, load)))
