"""What each kind of layer computes, from its textbook formula, on arrays in canonical axes; slow and plain.

>>> dense(np.array([[1.0, 2.0]]), {"kernel": np.array([[3.0, 4.0]]), "bias": np.array([5.0])})
array([[16.]])

Channels come first in feature maps (n c h w) and last in sequences (n t c). `w` holds a layer's tensors by role.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]
Pairs = Sequence[tuple[int, int]]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def relu(x: Array, w: Weights) -> Array:
    return np.maximum(x, 0)


def tanh(x: Array, w: Weights) -> Array:
    return np.tanh(x)


def nothing(x: Array, w: Weights) -> Array:
    return x


def dense(x: Array, w: Weights) -> Array:
    return x @ w["kernel"].T + w.get("bias", 0)


def bilinear(x: Array, y: Array, w: Weights) -> Array:
    return np.einsum("ni,oij,nj->no", x, w["kernel"], y) + w["bias"]


def einsum_dense(x: Array, w: Weights, equation: str) -> Array:
    return np.einsum(equation, x, w["kernel"]) + w["bias"]


def around(x: Array, size: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> Pairs:
    """What 'same' pads: as many windows as strides fit, and where the sum is odd one more behind."""
    pairs = []
    for n, k, s, d in zip(x.shape[2:], size, strides, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        pairs.append((total // 2, total - total // 2))
    return pairs


def every(start: Sequence[int], step: Sequence[int], count: Sequence[int]) -> tuple[slice, ...]:
    """From each `start`, `count` places `step` apart."""
    return tuple(slice(a, a + (n - 1) * s + 1, s) for a, s, n in zip(start, step, count, strict=True))


def conv(
    x: Array,
    w: Weights,
    strides: Sequence[int],
    padding: Pairs | Literal["same"],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """Each output is the sum over a window of input times kernel (not flipped), channels of its group only."""
    size = w["kernel"].shape[2:]
    pairs = around(x, size, strides, dilation) if padding == "same" else padding
    x = np.pad(x, [(0, 0), (0, 0), *pairs])
    lengths = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], size, strides, dilation, strict=True)]
    outputs = []
    for part, kernel in zip(np.split(x, groups, axis=1), np.split(w["kernel"], groups), strict=True):
        y = np.zeros((len(x), len(kernel), *lengths))
        for offset in np.ndindex(size):
            start = [a * d for a, d in zip(offset, dilation, strict=True)]
            seen = part[:, :, *every(start, strides, lengths)]
            y += np.einsum("ni...,oi->no...", seen, kernel[:, :, *offset])
        outputs.append(y)
    return over_channels(np.concatenate(outputs, axis=1), w)


def conv_transpose(
    x: Array,
    w: Weights,
    strides: Sequence[int],
    padding: Pairs,
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
) -> Array:
    """Each input spreads its kernel over the output; `padding` is cropped, `output_padding` kept behind."""
    size = w["kernel"].shape[2:]
    space = x.shape[2:]
    lengths = [
        (n - 1) * s + d * (k - 1) + 1 + more
        for n, s, d, k, more in zip(space, strides, dilation, size, output_padding, strict=True)
    ]
    outputs = []
    for part, kernel in zip(np.split(x, groups, axis=1), np.split(w["kernel"], groups), strict=True):
        y = np.zeros((len(x), kernel.shape[1], *lengths))
        for offset in np.ndindex(size):
            start = [a * d for a, d in zip(offset, dilation, strict=True)]
            y[:, :, *every(start, strides, space)] += np.einsum("ni...,io->no...", part, kernel[:, :, *offset])
        outputs.append(y)
    kept = tuple(slice(before, n - after) for (before, after), n in zip(padding, lengths, strict=True))
    return over_channels(np.concatenate(outputs, axis=1)[:, :, *kept], w)


def along_channels(vector: Array, x: Array) -> Array:
    return vector.reshape(1, -1, *(1,) * (x.ndim - 2))


def over_channels(x: Array, w: Weights) -> Array:
    return x + along_channels(w["bias"], x) if "bias" in w else x


def embedding(x: Array, w: Weights) -> Array:
    return w["embedding"][x]


def batch_norm(x: Array, w: Weights, eps: float) -> Array:
    y = (x - along_channels(w["mean"], x)) / np.sqrt(along_channels(w["variance"], x) + eps)
    return over_channels(y * along_channels(w["scale"], x) if "scale" in w else y, w)


def layer_norm(x: Array, w: Weights, eps: float) -> Array:
    axes = tuple(range(-w["scale"].ndim, 0))
    y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)
    return y * w["scale"] + w.get("bias", 0)


def group_norm(x: Array, w: Weights, eps: float, groups: int) -> Array:
    parts = x.reshape(len(x), groups, -1)
    y = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + eps)
    return over_channels(y.reshape(x.shape) * along_channels(w["scale"], x), w)


def instance_norm(x: Array, w: Weights, eps: float) -> Array:
    """A group norm of single channels; with statistics, what a batch norm computes."""
    return batch_norm(x, w, eps) if "mean" in w else group_norm(x, w, eps, x.shape[1])


def rms_norm(x: Array, w: Weights, eps: float) -> Array:
    axes = tuple(range(-w["scale"].ndim, 0))
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + eps) * w["scale"]


def prelu(x: Array, w: Weights) -> Array:
    slope = w["slope"] if w["slope"].ndim > 1 else along_channels(w["slope"], x)
    return np.where(x > 0, x, slope * x)


def one_direction(
    x: Array, w: Weights, unit: int, step: Callable[[Array, tuple[Array, ...]], tuple[Array, ...]]
) -> Array:
    """Steps over time from zeros; the first of the states is the output."""
    hidden = w["recurrent_kernel"].shape[-1]
    states: tuple[Array, ...] = (np.zeros((len(x), hidden)), np.zeros((len(x), unit)))
    outputs = []
    for t in range(x.shape[1]):
        states = step(x[:, t], states)
        outputs.append(states[0])
    return np.stack(outputs, axis=1)


Recurrent = Callable[..., Array]


def in_directions(once: Recurrent) -> Recurrent:
    """Of a layer of two directions, the second reads the sequence backwards; features lie side by side."""

    def layer(x: Array, w: Weights, bidirectional: bool, **settings: Any) -> Array:
        if not bidirectional:
            return once(x, w, **settings)
        forward, backward = ({role: array[side] for role, array in w.items()} for side in (0, 1))
        return np.concatenate([once(x, forward, **settings), once(x[:, ::-1], backward, **settings)[:, ::-1]], axis=-1)

    return layer


def sides(w: Weights) -> tuple[Any, Any]:
    return tuple(w["bias"]) if "bias" in w else (0, 0)


@in_directions
def simple_rnn(x: Array, w: Weights, activation: str) -> Array:
    act = {"tanh": np.tanh, "relu": lambda value: np.maximum(value, 0)}[activation]
    b, c = sides(w)

    def step(x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
        h = states[0]
        return (act(x @ w["input_kernel"].T + b + h @ w["recurrent_kernel"].T + c),)

    return one_direction(x, w, len(w["input_kernel"]), step)


@in_directions
def lstm(x: Array, w: Weights) -> Array:
    """c' = f c + i g; h' = o tanh(c'), projected where there is a projection."""
    b, c = sides(w)

    def step(x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
        h, cell = states
        gates = np.einsum("gui,ni->gnu", w["input_kernel"], x) + np.einsum("guh,nh->gnu", w["recurrent_kernel"], h)
        i, f, g, o = gates + np.expand_dims(b + c, -2) if "bias" in w else gates
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(cell)
        return (h @ w["projection"].T if "projection" in w else h), cell

    return one_direction(x, w, w["input_kernel"].shape[1], step)


@in_directions
def gru(x: Array, w: Weights, reset_after: bool) -> Array:
    """h' = (1 - z) n + z h; the reset gate acts on the product with h, or on h before it."""
    inward, outward, (b, c) = w["input_kernel"], w["recurrent_kernel"], sides(w)
    b, c = (b, c) if "bias" in w else (np.zeros(3), np.zeros(3))

    def step(x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
        h = states[0]
        r = sigmoid(x @ inward[0].T + b[0] + h @ outward[0].T + c[0])
        z = sigmoid(x @ inward[1].T + b[1] + h @ outward[1].T + c[1])
        inner = r * (h @ outward[2].T + c[2]) if reset_after else (r * h) @ outward[2].T + c[2]
        return ((1 - z) * np.tanh(x @ inward[2].T + b[2] + inner) + z * h,)

    return one_direction(x, w, inward.shape[1], step)


def attention(query: Array, key: Array, value: Array, w: Weights, heads: int) -> Array:
    """softmax(q k / sqrt(dim)) v for each head; an extra key and value stand behind the others."""
    parts = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        y = x @ w[f"{name}_kernel"].T + w.get(f"{name}_bias", 0)
        if f"extra_{name}" in w:
            y = np.concatenate([y, np.tile(w[f"extra_{name}"], (len(y), 1, 1))], axis=1)
        parts.append(y.reshape(*y.shape[:2], heads, -1))
    q, k, v = parts
    weights = softmax(np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1]))
    joined = np.einsum("nhqk,nkhd->nqhd", weights, v).reshape(*query.shape[:2], -1)
    return joined @ w["output_kernel"].T + w.get("output_bias", 0)


def flatten(x: Array, w: Weights, start: int = 1, end: int = -1) -> Array:
    stop = end % x.ndim + 1
    return x.reshape(*x.shape[:start], -1, *x.shape[stop:])


def unflatten(x: Array, w: Weights, axis: int, sizes: Sequence[int]) -> Array:
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def pad(x: Array, w: Weights, last_axis_first: Sequence[int]) -> Array:
    pairs = list(zip(last_axis_first[::2], last_axis_first[1::2], strict=True))[::-1]
    return np.pad(x, [(0, 0), (0, 0), *pairs])


def max_pool(x: Array, w: Weights, size: int) -> Array:
    high, wide = (n // size for n in x.shape[2:])
    x = x[:, :, : high * size, : wide * size]
    return x.reshape(*x.shape[:2], high, size, wide, size).max((3, 5))


def global_average_pool(x: Array, w: Weights) -> Array:
    return x.mean((2, 3), keepdims=True)


def concat(x: Array, y: Array, w: Weights) -> Array:
    return np.concatenate([x, y], axis=1)


def add(x: Array, y: Array, w: Weights) -> Array:
    return x + y


def last(x: Array, w: Weights) -> Array:
    return x[:, -1]


KINDS = (
    dense, bilinear, einsum_dense, conv, conv_transpose, embedding, batch_norm, layer_norm, group_norm, instance_norm,
    rms_norm, prelu, attention,
)  # fmt: skip
OPERATIONS = (relu, tanh, nothing, flatten, unflatten, pad, max_pool, global_average_pool, concat, add, last)

LAYERS: dict[str, Callable[..., Array]] = {
    **{function.__name__: function for function in KINDS},
    **{f"{function.__name__}()": function for function in OPERATIONS},
    "depthwise": conv,
    "simple_rnn": simple_rnn,
    "lstm": lstm,
    "gru": gru,
}
