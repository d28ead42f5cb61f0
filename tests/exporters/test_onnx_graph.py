"""The graph of ONNX models that others wrote: what it says, and that a model built of it computes the same."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import neutral
from neutral.archive import open_archive
from neutral.schema.graph import Graph
from neutral.schema.manifest import Manifest
from tests.cases import models as m
from tests.onnx_running import run_onnx

Array = np.ndarray
R = m.random
SEEDS = iter(range(10_000))


def weight(*shape: int) -> Array:
    return np.random.default_rng(next(SEEDS)).standard_normal(shape).astype(np.float32) / 2


def whole(*numbers: int) -> Array:
    return np.asarray(numbers, np.int64)


def saved(
    path: Path,
    nodes: Sequence[Any],
    given: dict[str, Array],
    shape: Sequence[int | str | None],
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 21,
) -> Path:
    """A model of one input `x`, with the shapes that onnx infers."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(shape))],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    known = all(not node.domain for node in nodes)
    onnx.save(onnx.shape_inference.infer_shapes(model) if known else model, path)
    return path


def op(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(
        kind, ["" if name == "_" else name for name in inputs.split()], outputs.split(), **attributes
    )


def exported(path: Path, tmp_path: Path) -> Manifest:
    neutral.export_model(path, tmp_path / "model.nwt", force=True)
    with open_archive(tmp_path / "model.nwt") as archive:
        return archive.manifest


def graph_of(path: Path, tmp_path: Path) -> Graph:
    manifest = exported(path, tmp_path)
    assert manifest.graph is not None, manifest.notes
    return manifest.graph


def told(graph: Graph) -> list[str]:
    return [f"{node.op} {node.layer}" if node.layer else node.op for node in graph.nodes]


def assert_same_everywhere(path: Path, tmp_path: Path, x: Array, to: Sequence[str] = ("onnx", "pt2", "keras")) -> None:
    """A new ONNX model, a program of torch and a model of Keras, each made of the graph, compute what the file does."""
    graph = graph_of(path, tmp_path)
    expected = run_onnx(path, x)
    image, made_image = ("channel" in graph.values[value].axes for value in (graph.inputs[0], graph.outputs[0]))
    for suffix in to:
        out = tmp_path / f"again.{suffix}"
        neutral.import_model(tmp_path / "model.nwt", out=out, force=True)
        if suffix == "onnx":
            found = run_onnx(out, x)
        elif suffix == "pt2":
            y = torch.export.load(out).module()(torch.from_numpy(x))
            found = [one.detach().numpy() for one in (y if isinstance(y, tuple) else (y,))]
        else:
            import keras

            y = m.run_keras(keras.models.load_model(out), m.channels_last(x) if image else x)
            found = [m.channels_first(y) if made_image else y]
        for ours, theirs in zip(found, expected, strict=suffix != "keras"):
            m.assert_close(ours, theirs, 1e-5)


# --- layers ---


def test_a_product_and_a_sum_are_one_layer(tmp_path: Path) -> None:
    nodes = [op("MatMul", "x w", "h"), op("Add", "b h", "r"), op("Relu", "r", "a"), op("MatMul", "a v", "y")]
    given = {"w": weight(5, 4), "b": weight(4), "v": weight(4, 3)}
    path = saved(tmp_path / "a.onnx", nodes, given, ("n", 6, 5))
    graph = graph_of(path, tmp_path)
    assert [one.split(" ")[0] for one in told(graph)] == ["Gemm", "Relu", "Gemm"]
    assert graph.values[graph.outputs[0]].shape == (None, 6, 3)
    assert_same_everywhere(path, tmp_path, R(2, 6, 5))


@pytest.mark.parametrize("turned", [0, 1])
def test_a_gemm_either_way_round(turned: int, tmp_path: Path) -> None:
    given = {"fc.weight": weight(4, 4), "fc.bias": weight(4)}
    nodes = [op("Gemm", "x fc.weight fc.bias", "y", transB=turned)]
    path = saved(tmp_path / "a.onnx", nodes, given, ("n", 4))
    assert told(graph_of(path, tmp_path)) == ["Gemm fc"]
    assert_same_everywhere(path, tmp_path, R(3, 4))


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
def test_automatic_padding(auto: str, tmp_path: Path) -> None:
    more = {"pads": [1, 0, 2, 1]} if auto == "NOTSET" else {}
    nodes = [
        op("Conv", "x c.weight c.bias", "c", strides=[2, 1], auto_pad=auto, **more),
        op("MaxPool", "c", "p", kernel_shape=[2, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
        op("AveragePool", "p", "y", kernel_shape=[2, 1], auto_pad="VALID"),
    ]
    path = saved(tmp_path / "a.onnx", nodes, {"c.weight": weight(4, 2, 3, 2), "c.bias": weight(4)}, ("n", 2, 10, 7))
    to = ("onnx", "pt2") if auto == "SAME_LOWER" else ("onnx", "pt2", "keras")
    if auto == "NOTSET":
        to = ("onnx", "pt2")  # a maximum with padding, of values that may be negative
    assert_same_everywhere(path, tmp_path, R(3, 2, 10, 7), to)


@pytest.mark.parametrize("size", [(5, 3, 4), (3, 3, 3)])
def test_a_flatten_crosses_channels(size: tuple[int, int, int], tmp_path: Path) -> None:
    channels, height, width = size
    joined = channels * height * width
    nodes = [
        op("Conv", "x c.weight", "c", pads=[1, 1, 1, 1]),
        op("Relu", "c", "r"),
        op("Reshape", "r shape", "f"),
        op("BatchNormalization", "f n.weight n.bias n.mean n.var", "n"),
        op("Gemm", "n fc.weight fc.bias", "y", transB=1),
    ]
    given = {"c.weight": weight(channels, 2, 3, 3), "shape": whole(-1, joined), "fc.weight": weight(3, joined)}
    given |= {f"n.{name}": weight(joined) for name in ("weight", "bias", "mean")} | {"fc.bias": weight(3)}
    given["n.var"] = np.abs(weight(joined)) + 1
    path = saved(tmp_path / "a.onnx", nodes, given, (None, 2, height, width))
    manifest = exported(path, tmp_path)
    layers = {layer.path: layer for layer in manifest.layers}
    assert layers["fc"].channels == {"in": channels} and layers["n"].channels == {"feature": channels}
    assert_same_everywhere(path, tmp_path, R(2, 2, height, width))


@pytest.mark.parametrize("size", [(5, 3, 4), (3, 3, 3)])
def test_an_image_that_is_turned_round_before_it_is_flattened(size: tuple[int, int, int], tmp_path: Path) -> None:
    """As TensorFlow's models become: the vector is (position channel), and one in front of an image as well."""
    channels, height, width = size
    joined = channels * height * width
    nodes = [
        op("Conv", "x c.weight", "c", pads=[1, 1, 1, 1]),
        op("Transpose", "c", "t", perm=[0, 2, 3, 1]),
        op("Reshape", "t shape", "f"),
        op("Relu", "f", "r"),
        op("Gemm", "r fc.weight fc.bias", "g", transB=1),
        op("Tanh", "g", "a"),
        op("Gemm", "a up.weight up.bias", "u"),
        op("Reshape", "u image", "i"),
        op("Transpose", "i", "b", perm=[0, 3, 1, 2]),
        op("Conv", "b d.weight", "y"),
    ]
    given = {
        "c.weight": weight(channels, 2, 3, 3), "shape": whole(-1, joined), "fc.weight": weight(4, joined), "fc.bias": weight(4),
        "up.weight": weight(4, joined), "up.bias": weight(joined), "image": whole(0, height, width, channels),
        "d.weight": weight(2, channels, 2, 2),
    }  # fmt: skip
    path = saved(tmp_path / "a.onnx", nodes, given, (None, 2, height, width))
    assert_same_everywhere(path, tmp_path, R(2, 2, height, width))


def test_a_vector_in_tensorflows_order_that_leaves_the_model(tmp_path: Path) -> None:
    nodes = [
        op("Conv", "x c.weight", "c"),
        op("Transpose", "c", "t", perm=[0, 2, 3, 1]),
        op("Flatten", "t", "y"),
    ]
    path = saved(tmp_path / "a.onnx", nodes, {"c.weight": weight(3, 2, 2, 2)}, ("n", 2, 5, 4))
    assert_same_everywhere(path, tmp_path, R(2, 2, 5, 4), ("onnx", "pt2"))


# --- recurrent layers ---


def recurrent(kind: str, ways: int, **more: Any) -> tuple[Any, dict[str, Array]]:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    given = {
        "rnn.W": weight(ways, gates * 4, 5), "rnn.R": weight(ways, gates * 4, 4), "rnn.B": weight(ways, 2 * gates * 4),
    }  # fmt: skip
    direction = "bidirectional" if ways == 2 else "forward"
    node = op(kind, "t rnn.W rnn.R rnn.B", "Y H", **{"hidden_size": 4, "direction": direction, **more})
    return node, given


SEQUENCE: dict[str, tuple[int, list[Any]]] = {
    "squeezed": (1, [op("Squeeze", "Y one", "s"), op("Transpose", "s", "y", perm=[1, 0, 2])]),
    "as torch does": (
        2,
        [op("Transpose", "Y", "s", perm=[0, 2, 1, 3]), op("Reshape", "s joined", "j"), op("Transpose", "j", "y", perm=[1, 0, 2])],
    ),
    "as we do": (2, [op("Transpose", "Y", "s", perm=[2, 0, 1, 3]), op("Reshape", "s joined", "y")]),
    "the last": (1, [op("Squeeze", "H zero", "y")]),
    "the last of both": (2, [op("Transpose", "H", "s", perm=[1, 0, 2]), op("Reshape", "s last", "y")]),
    "each by number": (
        2,
        [op("Gather", "H first", "a", axis=0), op("Gather", "H second", "b", axis=0), op("Concat", "b a", "y", axis=1)],
    ),
    "summed": (2, [op("ReduceSum", "Y one", "s", keepdims=0), op("Transpose", "s", "y", perm=[1, 0, 2])]),
    "cut": (
        2,
        [op("Split", "Y", "p q", axis=1, num_outputs=2), op("Squeeze", "p one", "a"), op("Squeeze", "q one", "b"),
         op("Mul", "a b", "s"), op("Transpose", "s", "y", perm=[1, 0, 2])],
    ),
    "both the sequence and the last": (
        2,
        [op("Transpose", "Y", "s", perm=[2, 0, 1, 3]), op("Reshape", "s joined", "q"), op("ReduceMean", "q one", "mean", keepdims=0),
         op("Transpose", "H", "l", perm=[1, 0, 2]), op("Reshape", "l last", "h"), op("Add", "mean h", "y")],
    ),
}  # fmt: skip
NUMBERS = {
    "zero": whole(0),
    "one": whole(1),
    "joined": whole(0, 0, -1),
    "last": whole(0, -1),
    "first": np.int64(0),
    "second": np.int64(-1),
}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("name", SEQUENCE)
def test_what_exporters_put_around_a_recurrent_layer(name: str, kind: str, tmp_path: Path) -> None:
    ways, behind = SEQUENCE[name]
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    layer, given = recurrent(kind, ways, **more)
    nodes = [op("Transpose", "x", "t", perm=[1, 0, 2]), layer, *behind]
    given |= {key: np.asarray(value) for key, value in NUMBERS.items()}
    path = saved(tmp_path / "a.onnx", nodes, given, ("n", 6, 5))
    graph = graph_of(path, tmp_path)
    assert f"{kind} rnn" in told(graph) and "Reshape" not in told(graph)
    to = ("onnx", "pt2") if "both the" in name or name == "cut" else ("onnx", "pt2", "keras")
    assert_same_everywhere(path, tmp_path, R(3, 6, 5), to)


def test_a_layer_that_runs_backwards(tmp_path: Path) -> None:
    layer, given = recurrent("LSTM", 1, direction="reverse")
    nodes = [op("Transpose", "x", "t", perm=[1, 0, 2]), layer, op("Squeeze", "H zero", "y")]
    path = saved(tmp_path / "a.onnx", nodes, given | {"zero": whole(0)}, ("n", 6, 5))
    assert_same_everywhere(path, tmp_path, R(3, 6, 5))
    nodes = [*nodes[:2], op("Squeeze", "Y one", "s"), op("Transpose", "s", "y", perm=[1, 0, 2])]
    path = saved(tmp_path / "b.onnx", nodes, given | {"one": whole(1)}, ("n", 6, 5))
    manifest = exported(path, tmp_path)
    assert (
        manifest.graph is None and "runs backwards and gives its steps in the order of its input" in manifest.notes[-1]
    )


def test_first_states(tmp_path: Path) -> None:
    """Two layers, the second one begins with the states of the first."""
    first, given = recurrent("GRU", 2, linear_before_reset=1)
    second = op("GRU", "u b.W b.R b.B _ H", "Z G", hidden_size=4, direction="bidirectional", linear_before_reset=1)
    given |= {
        "b.W": weight(2, 12, 8),
        "b.R": weight(2, 12, 4),
        "b.B": weight(2, 24),
        "joined": whole(0, 0, -1),
        "last": whole(0, -1),
    }
    nodes = [
        op("Transpose", "x", "t", perm=[1, 0, 2]), first, op("Transpose", "Y", "s", perm=[0, 2, 1, 3]),
        op("Reshape", "s joined", "u"), second, op("Transpose", "G", "g", perm=[1, 0, 2]), op("Reshape", "g last", "y"),
    ]  # fmt: skip
    path = saved(tmp_path / "a.onnx", nodes, given, ("n", 6, 5))
    assert_same_everywhere(path, tmp_path, R(3, 6, 5), ("onnx", "pt2"))


# --- several operators that are one ---


def norm(axes: str, last: str = "n") -> list[Any]:
    """(x - mean) / sqrt(mean of squares + eps)."""
    return [
        op("ReduceMean", f"h {axes}", "m"), op("Sub", "h m", "d"), op("Pow", "d two", "q"), op("ReduceMean", f"q {axes}", "v"),
        op("Add", "v eps", "e"), op("Sqrt", "e", "s"), op("Div", "d s", last),
    ]  # fmt: skip


def floats(**numbers: float) -> dict[str, Array]:
    return {name: np.asarray(number, np.float32) for name, number in numbers.items()}


ROOT_OF_PI = float(np.sqrt(2 / np.pi))
IDIOMS: dict[str, tuple[str, list[Any], dict[str, Array]]] = {
    "layer norm": (
        "LayerNormalization",
        [*norm("last"), op("Mul", "n norm.weight", "w"), op("Add", "w norm.bias", "y")],
        {"norm.weight": weight(4), "norm.bias": weight(4), "last": whole(-1), **floats(two=2, eps=7e-4)},
    ),
    "layer norm without a bias": (
        "LayerNormalization",
        [*norm("last"), op("Mul", "norm.weight n", "y")],
        {"norm.weight": weight(4), "last": whole(-1), **floats(two=2, eps=7e-4)},
    ),
    "rms norm": (
        "RMSNormalization",
        [op("Mul", "h h", "q"), op("ReduceMean", "q last", "v"), op("Add", "eps v", "e"), op("Sqrt", "e", "s"),
         op("Reciprocal", "s", "r"), op("Mul", "r h", "n"), op("Mul", "n norm.weight", "y")],
        {"norm.weight": weight(4), "last": whole(-1), **floats(eps=7e-4)},
    ),
    "rms norm by a power": (
        "RMSNormalization",
        [op("Pow", "h two", "q"), op("ReduceMean", "q last", "v"), op("Add", "v eps", "e"), op("Pow", "e half", "r"),
         op("Mul", "h r", "n"), op("Mul", "norm.weight n", "y")],
        {"norm.weight": weight(4), "last": whole(-1), **floats(two=2, half=-0.5, eps=7e-4)},
    ),
    "swish": ("Swish", [op("Sigmoid", "h", "s"), op("Mul", "s h", "y")], {}),
    "hard swish": ("HardSwish", [op("HardSigmoid", "h", "s", alpha=1 / 6), op("Mul", "h s", "y")], {}),
    "mish": ("Mish", [op("Softplus", "h", "s"), op("Tanh", "s", "t"), op("Mul", "h t", "y")], {}),
    "softplus": (
        "Softplus",
        [op("Softplus", "h", "s"), op("Greater", "h limit", "g"), op("Where", "g h s", "y")],
        floats(limit=20),
    ),
    "gelu": (
        "Gelu",
        [op("Div", "h root", "d"), op("Erf", "d", "e"), op("Add", "e one", "a"), op("Mul", "h a", "p"), op("Mul", "p half", "y")],
        floats(root=float(np.sqrt(2)), one=1, half=0.5),
    ),
    "gelu, halved first": (
        "Gelu",
        [op("Mul", "h root", "d"), op("Erf", "d", "e"), op("Add", "one e", "a"), op("Mul", "half h", "p"), op("Mul", "p a", "y")],
        floats(root=float(np.sqrt(0.5)), one=1, half=0.5),
    ),
    "gelu, approximated": (
        "Gelu",
        [op("Pow", "h three", "c"), op("Mul", "c small", "k"), op("Add", "h k", "l"), op("Mul", "l root", "d"), op("Tanh", "d", "e"),
         op("Add", "e one", "a"), op("Mul", "h a", "p"), op("Mul", "p half", "y")],
        floats(three=3, small=0.044715, root=ROOT_OF_PI, one=1, half=0.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IDIOMS)
def test_several_operators_are_one(name: str, tmp_path: Path) -> None:
    kind, nodes, given = IDIOMS[name]
    path = saved(
        tmp_path / "a.onnx",
        [op("MatMul", "x fc.weight", "h"), *nodes],
        {"fc.weight": weight(5, 4), **given},
        ("n", 6, 5),
    )
    expected = f"{kind} norm" if "norm" in name else kind
    assert told(graph_of(path, tmp_path)) == ["Gemm fc", expected]
    assert_same_everywhere(path, tmp_path, 2 * R(2, 6, 5))


@pytest.mark.parametrize("channels", [6, 3])
def test_a_group_norm_of_older_operator_sets(channels: int, tmp_path: Path) -> None:
    nodes = [
        op("Conv", "x c.weight", "h"), op("Reshape", "h groups", "g"), op("InstanceNormalization", "g ones zeros", "i", epsilon=7e-4),
        op("Shape", "h", "s"), op("Reshape", "i s", "b"), op("Mul", "b n.weight", "w"), op("Add", "w n.bias", "y"),
    ]  # fmt: skip
    given = {"c.weight": weight(channels, 2, 2, 2), "groups": whole(0, 3, -1), "ones": np.ones(3, np.float32)}
    given |= {"zeros": np.zeros(3, np.float32), "n.weight": weight(channels, 1, 1), "n.bias": weight(1, channels, 1, 1)}
    path = saved(tmp_path / "a.onnx", nodes, given, ("n", 2, 5, 4))
    assert told(graph_of(path, tmp_path)) == ["Conv c", "GroupNormalization n"]
    assert_same_everywhere(path, tmp_path, R(2, 2, 5, 4))


def test_what_is_almost_one_operator_stays_as_it_is(tmp_path: Path) -> None:
    """Another limit, another root, a value in the middle that is used elsewhere."""
    nodes = [op("MatMul", "x fc.weight", "h"), op("Sigmoid", "h", "s"), op("Mul", "s h", "p"), op("Add", "p s", "y")]
    path = saved(tmp_path / "a.onnx", nodes, {"fc.weight": weight(5, 4)}, ("n", 6, 5))
    assert told(graph_of(path, tmp_path))[1:] == ["Sigmoid", "Mul", "Add"]
    assert_same_everywhere(path, tmp_path, R(2, 6, 5))
    _, nodes, given = IDIOMS["gelu"]
    path = saved(
        tmp_path / "b.onnx",
        [op("MatMul", "x fc.weight", "h"), *nodes],
        {"fc.weight": weight(5, 4), **given, **floats(root=1.4)},
        ("n", 6, 5),
    )
    assert told(graph_of(path, tmp_path))[1:] == ["Constant", "Div", "Erf", "Constant", "Add", "Mul", "Constant", "Mul"]
    assert_same_everywhere(path, tmp_path, R(2, 6, 5), ("onnx", "pt2"))


@pytest.mark.parametrize("kept", [0, 1])
def test_a_mean_of_all_of_space_is_a_pooling(kept: int, tmp_path: Path) -> None:
    nodes = [op("Conv", "x c.weight", "h"), op("ReduceMean", "h space", "y", keepdims=kept)]
    path = saved(tmp_path / "a.onnx", nodes, {"c.weight": weight(3, 2, 2, 2), "space": whole(-1, -2)}, ("n", 2, 5, 4))
    assert_same_everywhere(path, tmp_path, R(2, 2, 5, 4))


# --- what there is no graph of ---


@pytest.mark.parametrize(
    ("nodes", "given", "reason"),
    [
        ([op("Gemm", "x w", "h"), op("Not", "h", "y")], {}, "the operator Not"),
        ([op("Gemm", "x w", "h"), op("Mul", "h v", "y")], {"v": weight(4)}, "a Mul with a stored tensor of several elements"),
        ([op("Gemm", "x w", "h"), op("Reshape", "h s", "y")], {"s": whole(1, -1)}, "does not keep the first axis"),
        ([op("Gemm", "x w", "h"), op("Transpose", "h", "y", perm=[1, 0])], {}, ""),
        ([op("Gemm", "x w", "h"), op("Softmax", "h", "y", axis=0)], {}, "over the batch axis"),
        ([op("Gemm", "x w", "h", alpha=0.3), op("Relu", "h", "y")], {}, "alpha 0.3"),
        ([op("Gemm", "x w", "h"), op("ReduceMean", "h", "y")], {}, "of the first axis"),
        ([op("Gemm", "x w", "h"), op("Shape", "h", "s"), op("Cast", "s", "y", to=1)], {}, "depends on the sizes"),
    ],
)  # fmt: skip
def test_there_is_no_graph_and_a_note_says_why(
    nodes: list[Any], given: dict[str, Array], reason: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.onnx", nodes, {"w": weight(3, 4), **given}, ("n", 3))
    manifest = exported(path, tmp_path)
    if reason:
        assert manifest.graph is None and any(reason in note for note in manifest.notes), manifest.notes
    else:
        assert manifest.graph is not None


def test_an_operator_of_somebody_elses(tmp_path: Path) -> None:
    nodes = [op("Gemm", "x w", "h"), helper.make_node("FusedMatMul", ["h", "h"], ["y"], domain="com.microsoft")]
    manifest = exported(saved(tmp_path / "a.onnx", nodes, {"w": weight(3, 4)}, ("n", 3)), tmp_path)
    assert manifest.graph is None and "the operator com.microsoft.FusedMatMul" in manifest.notes[-1]


def test_an_input_of_unknown_rank(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.onnx", [op("Relu", "x", "h"), op("Gemm", "h w", "y")], {"w": weight(3, 4)}, ("n", 3))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    manifest = exported(path, tmp_path)
    assert manifest.graph is None and "a shape that is not known" in manifest.notes[-1]


# --- files that mean harm ---


def test_sizes_that_take_forever_to_compute(tmp_path: Path) -> None:
    """Each number of a chain is used twice by the next one, and each is the square of the one before."""
    for kind in ("Add", "Mul"):
        chain = [op("Shape", "x", "n0"), *(op(kind, f"n{i} n{i}", f"n{i + 1}") for i in range(60))]
        nodes = [*chain, op("Gemm", "x w", "h"), op("Reshape", "h n60", "y")]
        path = saved(tmp_path / f"{kind}.onnx", nodes, {"w": weight(3, 4)}, (7, 3))
        assert exported(path, tmp_path).graph is None


def test_a_tower_of_tiles(tmp_path: Path) -> None:
    nodes = [
        op("Gemm", "x w", "v0"),
        *(op("Tile", f"v{i} many", f"v{i + 1}") for i in range(40)),
        op("Relu", "v40", "y"),
    ]
    path = saved(tmp_path / "a.onnx", nodes, {"w": weight(3, 4), "many": whole(1, 1 << 40)}, (7, 3))
    manifest = exported(path, tmp_path)
    assert manifest.graph is None and "a value of sizes" in manifest.notes[-1]


def test_one_name_for_many_nodes(tmp_path: Path) -> None:
    count = 3000
    nodes = [helper.make_node("Gemm", [f"v{i}", "w"], [f"v{i + 1}"], name="same") for i in range(count)]
    nodes = [op("Identity", "x", "v0"), *nodes, op("Relu", f"v{count}", "y")]
    manifest = exported(saved(tmp_path / "a.onnx", nodes, {"w": weight(3, 3)}, ("n", 3)), tmp_path)
    assert manifest.graph is not None and len(manifest.graph.nodes) == count + 1


# --- older operator sets ---


def test_settings_that_were_attributes(tmp_path: Path) -> None:
    nodes = [
        op("Conv", "x c.weight", "c"),
        op("Clip", "c", "k", min=-0.5, max=0.75),
        op("Pad", "k", "p", pads=[0, 0, 1, 0, 0, 0, 0, 2], value=0.5),
        op("Slice", "p", "s", starts=[1], ends=[9], axes=[3]),
        op("ReduceMean", "s", "r", axes=[2], keepdims=1),
        op("Squeeze", "r", "q", axes=[2]),
        op("Unsqueeze", "q", "y", axes=[3]),
    ]
    path = saved(tmp_path / "a.onnx", nodes, {"c.weight": weight(3, 2, 2, 2)}, ("n", 2, 6, 7), opset=9)
    model = onnx.load(path)
    model.ir_version = 4
    onnx.save(model, path)
    assert_same_everywhere(path, tmp_path, R(2, 2, 6, 7), ("onnx", "pt2"))


# --- models that torch exports ---


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(120, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = torch.nn.functional.max_pool2d(x + self.norm(self.b(x)), 2)
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, kind: str, pick: str, **settings: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(5, 4, batch_first=True, **settings)
        self.fc = nn.Linear(8 if self.rnn.bidirectional else 4, 3)
        self.pick = pick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, state = self.rnn(x)
        if self.pick == "state":
            h = state[0] if isinstance(state, tuple) else state
            y = torch.cat([h[-2], h[-1]], 1) if self.rnn.bidirectional else h[-1]
        return self.fc(y[:, -1] if self.pick == "last" else y)  # type: ignore[no-any-return]


MODULES: dict[str, tuple[Callable[[], nn.Module], Array]] = {
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.GELU(), nn.Linear(5, 3)
        ),
        R(3, 2, 8, 6),
    ),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Softmax(-1)),
        R(4, 6),
    ),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 5, bias=False), nn.LayerNorm(5)), R(4, 7, 6)),
    "decoder": (
        lambda: nn.Sequential(
            nn.Linear(5, 72), nn.ReLU(), nn.Unflatten(1, (6, 3, 4)), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.ReLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(4, 1, 3, padding="same"),
        ),
        R(3, 5),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)), np.random.default_rng(0).integers(0, 11, (3, 5))),
    "residual": (Residual, R(2, 3, 10, 12)),
    "lstm": (lambda: Recurrent("LSTM", "all"), R(3, 7, 5)),
    "lstm, both ways, last step": (lambda: Recurrent("LSTM", "last", bidirectional=True), R(3, 7, 5)),
    "gru, two levels, last states": (lambda: Recurrent("GRU", "state", bidirectional=True, num_layers=2), R(3, 7, 5)),
}  # fmt: skip


@pytest.mark.parametrize("how", ["dynamo", "unoptimized", "fixed", "torchscript"])
@pytest.mark.parametrize("name", MODULES)
def test_what_torch_exports(name: str, how: str, tmp_path: Path) -> None:
    make, x = MODULES[name]
    module, path = m.randomized(make(), 3), tmp_path / "torch.onnx"
    free = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    settings: dict[str, Any] = {
        "dynamo": {"dynamo": True, **free},
        "unoptimized": {"dynamo": True, "optimize": False, **free},
        "fixed": {"dynamo": True},
        "torchscript": {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}},
    }[how]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(module, (torch.from_numpy(x),), str(path), **settings)
    assert_same_everywhere(path, tmp_path, x, ("onnx", "keras"))
