"""The models of the cases, in torch and in Keras, with random weights, and how to run them on one input.

Classes of a user's own live in a module that exists only inside `importable()`: neutral must do without them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Array = np.ndarray
L = keras.layers

USER_MODULE = "users_own_code"


@contextmanager
def importable() -> Iterator[None]:
    """Inside, the classes of this module can be found under the name that pickles know them by."""
    module = types.ModuleType(USER_MODULE)
    vars(module).update({cls.__name__: cls for cls in USERS_OWN})
    sys.modules[USER_MODULE] = module
    try:
        yield
    finally:
        del sys.modules[USER_MODULE]


def save(module: nn.Module, path: Path, **settings: Any) -> Path:
    """`torch.save` of the whole module: a pickle that names its classes."""
    with importable():
        torch.save(module, path, **settings)
    return path


def load(path: Path) -> Any:
    with importable():
        return torch.load(path, weights_only=False)


def state_bytes(module: nn.Module) -> dict[str, bytes]:
    """Every tensor of the state dict, by name, as its bytes."""
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


# --- random weights, one input ---


def _values(rng: np.random.Generator, variance: bool, shape: Sequence[int], summed: int) -> Array:
    """Of a size that keeps activations near one: `summed` products make one output."""
    bound = min(0.5, 1.5 / np.sqrt(max(summed, 1)))
    return rng.uniform(0.5, 1.5, shape) if variance else rng.uniform(-bound, bound, shape)


@torch.no_grad()
def randomized(module: nn.Module, seed: int) -> nn.Module:
    """Every tensor random, biases and statistics included."""
    rng = np.random.default_rng((seed, 1))
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(_values(rng, "running_var" in name, tensor.shape, tensor[:1].numel())))
    return module.eval()


def randomized_keras(model: Any, seed: int) -> Any:
    rng = np.random.default_rng((seed, 2))
    for weight in model.weights:
        if "seed" not in weight.path:
            size = int(np.prod(weight.shape[:-1]))
            weight.assign(_values(rng, "variance" in weight.path, weight.shape, size).astype(weight.dtype))
    return model


def randomized_keras_2(model: Any, seed: int) -> Any:
    rng = np.random.default_rng((seed, 4))
    model.set_weights([_values(rng, "variance" in w.name, w.shape, int(np.prod(w.shape[:-1]))) for w in model.weights])
    return model


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, 3)).standard_normal(shape).astype(np.float32)


def channels_last(array: Array) -> Array:
    return np.moveaxis(array, 1, -1) if array.ndim > 2 else array


def channels_first(array: Array) -> Array:
    return np.moveaxis(array, -1, 1) if array.ndim > 2 else array


@torch.no_grad()
def run_torch(module: nn.Module, *inputs: Array) -> Array:
    return module(*(torch.from_numpy(np.ascontiguousarray(x)) for x in inputs)).numpy()


def run_keras(model: Any, *inputs: Array) -> Array:
    return keras.ops.convert_to_numpy(model(list(inputs) if len(inputs) > 1 else inputs[0], training=False))


def assert_close(found: Array, expected: Array, tolerance: float = 1e-6) -> None:
    """Equal shapes, finite, no further apart than `tolerance` of the largest value (or of one)."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all() and np.ptp(expected) > 1e-3
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


# --- LeNet-5 ---


def lenet5() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten(),
        nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


class LeNet5(nn.Module):
    """The same layers in a class, in two Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        layers = list(lenet5())
        self.features = nn.Sequential(*layers[:8])
        self.classifier = nn.Sequential(*layers[8:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class WideLeNet5(nn.Module):
    """The textbook's other form: 16 channels of 5 by 5 are flattened, in `forward`, where no file says it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def lenet5_keras(prefix: str = "") -> Any:
    names = iter(range(12))
    rows: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (L.Conv2D, {"filters": 6, "kernel_size": 5, "padding": "same"}),
        (L.Activation, {"activation": "tanh"}),
        (L.AveragePooling2D, {"pool_size": 2}),
        (L.Conv2D, {"filters": 16, "kernel_size": 5}),
        (L.Activation, {"activation": "tanh"}),
        (L.AveragePooling2D, {"pool_size": 2}),
        (L.Conv2D, {"filters": 120, "kernel_size": 5}),
        (L.Activation, {"activation": "tanh"}),
        (L.Flatten, {}),
        (L.Dense, {"units": 84}),
        (L.Activation, {"activation": "tanh"}),
        (L.Dense, {"units": 10}),
    ]
    layers = [make(**settings, name=f"{prefix}{next(names)}") for make, settings in rows]
    return keras.Sequential([keras.Input((28, 28, 1)), *layers])


def wide_lenet5_keras() -> Any:
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            L.Conv2D(6, 5, padding="same", activation="relu", name="conv1"),
            L.MaxPooling2D(name="pool1"),
            L.Conv2D(16, 5, activation="relu", name="conv2"),
            L.MaxPooling2D(name="pool2"),
            L.Flatten(name="flatten"),
            L.Dense(120, activation="relu", name="fc1"),
            L.Dense(84, activation="relu", name="fc2"),
            L.Dense(10, name="fc3"),
        ]
    )


# --- four LSTMs ---


class LstmStack(nn.Module):
    """Four levels of LSTM, dropout, and a linear layer on the last step."""

    def __init__(self, inputs: int = 3, hidden: int = 5, outputs: int = 2) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, num_layers=4, batch_first=True, dropout=0.1)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.dropout(self.rnn(x)[0][:, -1]))


def lstm_stack_keras(names: Sequence[str] = ("lstm_1", "lstm_2", "lstm_3", "lstm_4", "out")) -> Any:
    return keras.Sequential(
        [
            keras.Input((7, 3)),
            *(L.LSTM(5, return_sequences=i < 3, name=names[i]) for i in range(4)),
            L.Dropout(0.2),
            L.Dense(2, name=names[4]),
        ]
    )


# --- a convolution whose padding has two sizes ---


class Padded(nn.Module):
    """What 'same' means for a kernel of 3 by 4: (1, 1) rows, (1, 2) columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, (3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (1, 2, 1, 1)))


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, (3, 4), padding="same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def same_keras() -> Any:
    return keras.Sequential([keras.Input((5, 6, 2)), L.Conv2D(5, (3, 4), padding="same", name="conv")])


USERS_OWN = (LeNet5, WideLeNet5, LstmStack, Padded, Same)
for _cls in USERS_OWN:
    _cls.__module__ = USER_MODULE
