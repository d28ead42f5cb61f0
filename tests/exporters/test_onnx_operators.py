"""ONNX's own test cases of its operators: what neutral reads of them computes what ONNX's reference implementation does.

The cases give nodes and shapes; the weights are random, for theirs are ones. Each layer is computed from its canonical form
by definitions that know nothing of ONNX.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neutral.canon import canonical_layers
from neutral.canonical import CanonicalLayer
from neutral.conventions.onnx import ONNX
from neutral.exporters.onnx import read

onnx = importlib.import_module("onnx")
torch = importlib.import_module("torch")

Array = np.ndarray
Weights = dict[str, Array]


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    """ONNX's cases of one node, by name."""
    from onnx.backend.test.case.node import collect_testcases

    return {
        case.name.removeprefix("test_"): case for case in collect_testcases(None) if len(case.model.graph.node) == 1
    }


def model_of(case: Any, path: Path) -> tuple[Array, Array]:
    """A model of a case's node whose weights are initializers; its input, and what ONNX's reference makes of it."""
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(5)
    graph = case.model.graph
    values: dict[str, Array] = {}
    for info, given in zip(graph.input, case.data_sets[0][0], strict=True):
        given = np.asarray(given)
        draw = rng.standard_normal(given.shape)
        draw = np.abs(draw) + 0.5 if "var" in info.name else draw
        values[info.name] = draw.astype(given.dtype) if given.dtype.kind == "f" else given
    first = graph.input[0].name
    states = {"initial_h", "initial_c", "seq_lens"}
    made = onnx.ModelProto()
    made.CopyFrom(case.model)
    kept = [info for info in graph.input if info.name == first or info.name in states]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    weights = {name: value for name, value in values.items() if name not in {info.name for info in kept}}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    path.write_bytes(made.SerializeToString())
    found = ReferenceEvaluator(made).run(None, {info.name: values[info.name] for info in kept})
    named = {info.name: value for info, value in zip(made.graph.output, found, strict=True)}
    return values[first], named.get("Y_h", found[0])


def weights_of(layer: CanonicalLayer) -> Weights:
    return {role: tensor.data.read() for role, tensor in layer.weights.items()}


def spread(vector: Array, rank: int) -> Array:
    """A vector of channels, to be added to a value of so many axes."""
    return vector.reshape(-1, *(1,) * (rank - 2))


def dense(x: Array, w: Weights, a: Any) -> Array:
    return x @ w["kernel"].T + w.get("bias", 0)


def conv(x: Array, w: Weights, a: Any) -> Array:
    pairs = a["padding"]
    if pairs in ("same", "same_lower"):
        sizes, k = x.shape[2:], w["kernel"].shape[2:]
        totals = [
            max((-(-n // s) - 1) * s + d * (m - 1) + 1 - n, 0)
            for n, m, s, d in zip(sizes, k, a["strides"], a["dilation"], strict=True)
        ]
        pairs = [(total // 2, total - total // 2)[:: 1 if pairs == "same" else -1] for total in totals]
    x = np.pad(x, [(0, 0), (0, 0), *pairs])
    function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[x.ndim - 2]
    made = function(torch.tensor(x), torch.tensor(w["kernel"]), None, a["strides"], 0, a["dilation"], a["groups"])
    return made.numpy() + spread(w.get("bias", np.zeros(1, x.dtype)), x.ndim)


def conv_transpose(x: Array, w: Weights, a: Any) -> Array:
    function = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}[x.ndim - 2]
    full = function(
        torch.tensor(x), torch.tensor(w["kernel"]), None, a["strides"], 0, 0, a["groups"], a["dilation"]
    ).numpy()
    cut = tuple(slice(b, n - e) for (b, e), n in zip(a["padding"], full.shape[2:], strict=True))
    made = np.pad(full[(..., *cut)], [(0, 0), (0, 0), *((0, extra) for extra in a["output_padding"])])
    return made + spread(w.get("bias", np.zeros(1, x.dtype)), x.ndim)


def batch_norm(x: Array, w: Weights, a: Any) -> Array:
    scale, bias, mean, variance = (spread(w[role], x.ndim) for role in ("scale", "bias", "mean", "variance"))
    return (x - mean) / np.sqrt(variance + a["eps"]) * scale + bias


def normalised(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def layer_norm(x: Array, w: Weights, a: Any) -> Array:
    return normalised(x, tuple(range(x.ndim - w["scale"].ndim, x.ndim)), a["eps"]) * w["scale"] + w.get("bias", 0)


def rms_norm(x: Array, w: Weights, a: Any) -> Array:
    axes = tuple(range(x.ndim - w["scale"].ndim, x.ndim))
    return x / np.sqrt((x * x).mean(axes, keepdims=True) + a["eps"]) * w["scale"]


def instance_norm(x: Array, w: Weights, a: Any) -> Array:
    return normalised(x, tuple(range(2, x.ndim)), a["eps"]) * spread(w["scale"], x.ndim) + spread(w["bias"], x.ndim)


def group_norm(x: Array, w: Weights, a: Any) -> Array:
    grouped = x.reshape(len(x), a["groups"], -1)
    return normalised(grouped, (2,), a["eps"]).reshape(x.shape) * spread(w["scale"], x.ndim) + spread(w["bias"], x.ndim)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def steps(kind: str, x: Array, w: Weights, a: Any) -> Array:
    """The outputs of one direction, (time, batch, unit); x is (time, batch, feature)."""
    units = w["recurrent_kernel"].shape[-1]
    gates = w["input_kernel"].shape[:-1]
    both = w.get("bias", np.zeros((2, *gates), x.dtype))
    h = c = np.zeros((x.shape[1], units), x.dtype)
    found = []
    for at in x:
        ours = np.einsum("...ui,bi->...bu", w["input_kernel"], at) + both[0][..., None, :]
        if kind == "gru" and not a["reset_after"]:
            kernels, side = w["recurrent_kernel"], both[1][:, None, :]
            r, z = (sigmoid(ours[i] + h @ kernels[i].T + side[i]) for i in (0, 1))
            n = np.tanh(ours[2] + (r * h) @ kernels[2].T + side[2])
            h = z * h + (1 - z) * n
            found.append(h)
            continue
        theirs = np.einsum("...ui,bi->...bu", w["recurrent_kernel"], h) + both[1][..., None, :]
        if kind == "simple_rnn":
            h = np.tanh(ours + theirs)
        elif kind == "lstm":
            i, f, g, o = ours + theirs
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            r, z = sigmoid(ours[:2] + theirs[:2])
            h = z * h + (1 - z) * np.tanh(ours[2] + r * theirs[2])
        found.append(h)
    return np.stack(found)


def last_states(kind: str) -> Callable[[Array, Weights, Any], Array]:
    """The last state of each direction, (direction, batch, unit), as the cases of ONNX have it among their outputs."""

    def compute(x: Array, w: Weights, a: Any) -> Array:
        if w["input_kernel"].ndim == {"simple_rnn": 3}.get(kind, 4):
            sides = [{role: value[i] for role, value in w.items()} for i in (0, 1)]
            return np.stack([steps(kind, x, sides[0], a)[-1], steps(kind, x[::-1], sides[1], a)[-1]])
        return steps(kind, x[::-1] if a.get("go_backwards") else x, w, a)[-1][None]

    return compute


COMPUTE: dict[str, Callable[[Array, Weights, Any], Array]] = {
    "dense": dense,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "instance_norm": instance_norm,
    "group_norm": group_norm,
    **{kind: last_states(kind) for kind in ("simple_rnn", "lstm", "gru")},
}

KNOWN = {
    "dense": "gemm_default_vector_bias gemm_default_no_bias gemm_default_zero_bias gemm_transposeB gemm_alpha gemm_beta matmul_2d",
    "conv": """basic_conv_with_padding basic_conv_without_padding conv_with_strides_padding conv_with_strides_no_padding
        conv_with_strides_and_asymmetric_padding conv_with_autopad_same""",
    "conv_transpose": """convtranspose convtranspose_1d convtranspose_3d convtranspose_pads convtranspose_dilations
        convtranspose_pad convtranspose_autopad_same convtranspose_group_2 convtranspose_group_2_image_3""",
    "batch_norm": "batchnorm_example batchnorm_epsilon",
    "layer_norm": """layer_normalization_default_axis layer_normalization_2d_axis1 layer_normalization_4d_axis2
        layer_normalization_4d_axis_negative_3 layer_normalization_3d_axis_negative_1_epsilon""",
    "rms_norm": "rms_normalization_default_axis rms_normalization_4d_axis_negative_2 rms_normalization_3d_axis2_epsilon",
    "instance_norm": "instancenorm_example instancenorm_epsilon",
    "group_norm": "group_normalization_example group_normalization_epsilon",
    "lstm": "lstm_defaults lstm_with_initial_bias lstm_reverse lstm_bidirectional lstm_batchwise",
    "gru": "gru_defaults gru_with_initial_bias gru_reverse gru_bidirectional gru_batchwise",
    "simple_rnn": "simple_rnn_defaults simple_rnn_with_initial_bias simple_rnn_reverse simple_rnn_bidirectional simple_rnn_batchwise",
}  # fmt: skip


def cases() -> Iterator[tuple[str, str]]:
    for kind, names in KNOWN.items():
        for name in names.split():
            yield kind, name


@pytest.mark.parametrize(("kind", "name"), cases())
def test_it_computes_what_the_reference_does(kind: str, name: str, nodes: dict[str, Any], tmp_path: Path) -> None:
    x, expected = model_of(nodes[name], tmp_path / "model.onnx")
    model = read(tmp_path / "model.onnx")
    (layer,) = canonical_layers(model, ONNX)
    assert layer.kind == kind
    if name.endswith("_batchwise"):
        x, expected = x.swapaxes(0, 1), expected.swapaxes(0, 1)
    found = COMPUTE[kind](x, weights_of(layer), layer.attributes)
    model.close()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


APART = {
    "prelu_broadcast": "",
    "prelu_example": "",
    "lstm_with_peepholes": "peepholes",
    "gemm_all_attributes": "beta 0.35",
    "gemm_default_scalar_bias": "",
    "gemm_default_single_elem_vector_bias": "",
    "gemm_default_matrix_bias": "",
}


@pytest.mark.parametrize("name", APART)
def test_what_no_other_framework_has_is_kept_as_it_is(name: str, nodes: dict[str, Any], tmp_path: Path) -> None:
    model_of(nodes[name], tmp_path / "model.onnx")
    model = read(tmp_path / "model.onnx")
    assert {layer.kind for layer in canonical_layers(model, ONNX)} == {"unknown"}
    assert APART[name] in "".join(model.notes)
    model.close()
