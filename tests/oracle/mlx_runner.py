"""MLX's side of the oracle, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tests.columns.mlx import FORMATS
from tests.oracle.column_runner import Arrays, Side, Unwritable, apply, handlers
from tests.oracle.process import serve
from tests.zoo import Case, Layer, Model

FILES = {"safetensors": "model.safetensors", "npz": "model.npz"}
OPERATIONS: dict[str, Callable[..., mx.array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "flatten": lambda x: x.reshape(x.shape[0], -1),
    "reshape": lambda x, shape: x.reshape(x.shape[0], *shape),
    "split": lambda x, shape: x.reshape(*x.shape[:-1], *shape),
    "merge": lambda x: x.reshape(*x.shape[:-2], -1),
    "transpose": lambda x, axes: x.transpose(*axes),
    "pad": lambda x, pairs: mx.pad(x, [(0, 0), *pairs, (0, 0)]),
    "mean": lambda x: x.mean(tuple(range(1, x.ndim - 1))),
    "fold": lambda x: x.reshape(-1, *x.shape[2:]),
    "unfold": lambda x, steps: x.reshape(-1, steps, *x.shape[1:]),
    "concat": lambda *values: mx.concatenate(values, axis=-1),
    "add": mx.add,
    "last": lambda x: x[:, -1],
}
FUNCTIONS = {"nonlinearity": {"relu": nn.relu, "tanh": nn.tanh}}


class Net(nn.Module):
    """The rows of a column, each layer an attribute of its name; blocks that are numbered are a list."""

    def __init__(self, rows: tuple[Layer, ...]) -> None:
        super().__init__()
        self._rows = list(rows)
        for row in rows:
            if row.cls not in OPERATIONS and row.cls not in self:
                setattr(self, row.name, layer(row))

    def __call__(self, *inputs: mx.array) -> mx.array:
        def step(row: Layer, arguments: list[mx.array]) -> mx.array:
            if operation := OPERATIONS.get(row.cls):
                return operation(*arguments, **row.args)
            found = (
                self[row.cls] if row.cls in self else self[row.name] if row.name in self else getattr(self, row.name)
            )
            if isinstance(found, list):
                (value,) = arguments
                for one in found:
                    value = one(value)
                return value
            result = found(*arguments)
            return result[0] if isinstance(found, nn.LSTM) else result

        found: mx.array = apply(self._rows, inputs, step)
        return found


def layer(row: Layer) -> Any:
    if row.cls == "Container":
        if all(one.name.isdecimal() for one in row.inside):
            return [layer(one) for one in row.inside]
        return Net(row.inside)
    args = {name: FUNCTIONS[name][value] if name in FUNCTIONS else value for name, value in row.args.items()}
    return getattr(nn, row.cls)(**args)


@dataclass(frozen=True)
class Made:
    net: Net
    dtype: str


def make(case: Case, model: Model, dtype: str) -> Made:
    net = Net(model.layers)
    net.set_dtype(getattr(mx, dtype))
    return Made(net.eval(), dtype)


def tensors(made: Made) -> Arrays:
    return {name: np.array(value) for name, value in sorted(tree_flatten(made.net.parameters()))}


def fill(made: Made, values: Arrays) -> Made:
    made.net.load_weights(
        [(name, mx.array(value, getattr(mx, made.dtype))) for name, value in values.items()], strict=True
    )
    return made


def run(made: Made, inputs: Sequence[np.ndarray]) -> np.ndarray:
    return np.array(made.net(*(mx.array(one, getattr(mx, str(one.dtype))) for one in inputs)))


def save(made: Made, folder: Path, kind: str) -> Path:
    if kind == "safetensors" and made.dtype == "float64":
        raise Unwritable("MLX writes no float64 into safetensors")
    path = folder / FILES[kind]
    made.net.save_weights(str(path))
    return path


def load(made: Made, file: Path) -> Made:
    """Strictly: names and shapes are checked by MLX."""
    before = {name: array.dtype for name, array in tensors(made).items()}
    made.net.load_weights(str(file), strict=True)
    assert before == {name: array.dtype for name, array in tensors(made).items()}
    return made


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    serve(handlers(Side("mlx", 5, FORMATS, make, tensors, fill, run, save, load)))
