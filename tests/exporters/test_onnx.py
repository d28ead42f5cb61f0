from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import neutral
from neutral.canon import canonical_layers
from neutral.canonical import CanonicalLayer
from neutral.conventions.onnx import ONNX
from neutral.conventions.torch import TORCH
from neutral.errors import BadFile, Unsupported, WrongUsage
from neutral.exporters.onnx import read, read_live
from neutral.exporters.torch import read as read_torch
from neutral.frameworks import detect

RNG = np.random.default_rng(7)


class Net(torch.nn.Module):
    """Layers whose weights torch's exporters store in three different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.up = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
        self.act = torch.nn.PReLU(6)
        self.fc = torch.nn.Linear(6 * 7 * 9, 5)
        self.emb = torch.nn.Embedding(11, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.mix = torch.nn.Linear(5, 5, bias=False)
        self.rnn = torch.nn.LSTM(5, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = torch.nn.GRU(6, 4)
        self.head = torch.nn.Linear(4, 11, bias=False)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = self.fc(self.act(self.up(self.enc(image))).flatten(1))
        made, _ = self.rnn(self.mix(self.norm(self.emb(tokens))))
        return flat, self.head(self.gru(made)[0])


INPUTS = (torch.randn(2, 3, 6, 7), torch.randint(0, 11, (2, 5)))


def random_net() -> Net:
    torch.manual_seed(3)
    net = Net().eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if name.endswith("_var") else torch.randn(tensor.shape))
    return net


def export_net(folder: Path) -> Path:
    """A folder with the net's state dict, and the net as torch exports it in three ways."""
    net = random_net()
    torch.save(net.state_dict(), folder / "net.pt")
    logging.disable(logging.CRITICAL)
    torch.onnx.export(net, INPUTS, str(folder / "plain.onnx"), dynamo=True, optimize=False, verbose=False)
    torch.onnx.export(net, INPUTS, str(folder / "optimized.onnx"), dynamo=True, verbose=False)
    torch.onnx.export(net, INPUTS, str(folder / "legacy.onnx"), dynamo=False)
    logging.disable(logging.NOTSET)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_net(tmp_path_factory.mktemp("exported"))


def layers(path: Path) -> dict[str, CanonicalLayer]:
    return {layer.path: layer for layer in canonical_layers(read(path), ONNX)}


def same(one: CanonicalLayer, other: CanonicalLayer) -> bool:
    ours, theirs = one.weights, other.weights
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[role].data.read(), theirs[role].data.read()) for role in ours
    )


@pytest.mark.parametrize("how", ["plain", "optimized", "legacy"])
def test_every_layer_has_its_modules_name_and_weights(how: str, exported: Path) -> None:
    expected = {layer.path: layer for layer in canonical_layers(read_torch(exported / "net.pt"), TORCH)}
    found = layers(exported / f"{how}.onnx")
    folded = {"plain": {}, "optimized": {"enc.0": "enc.0_folded"}, "legacy": {"enc.0": "enc.0_computed"}}[how]
    assert detect(exported / f"{how}.onnx") == ("onnx", "onnx")
    for path, layer in expected.items():
        if how != "plain" and path in ("enc.0", "enc.1"):
            continue
        # The layouts of a bare state dict are torch's, whatever it takes the layers for.
        known = found.pop(path)
        if layer.kind == "unknown":
            assert known.kind != "unknown" and len(known.weights) == len(layer.weights)
        else:
            assert known.kind == layer.kind and same(known, layer), path
    assert set(found) == set(folded.values())


def test_folded_weights_do_not_pass_for_those_of_the_layer(exported: Path) -> None:
    for how, said in (("optimized", "a batch normalization was computed into"), ("legacy", "does not say of what")):
        model = read(exported / f"{how}.onnx")
        assert any(said in note for note in model.notes)
        assert not {"enc.0", "enc.1"} & {layer.path for layer in model.layers}
        model.close()


def test_a_flatten_is_known_from_the_graph(exported: Path) -> None:
    for how in ("plain", "optimized", "legacy"):
        model = read(exported / f"{how}.onnx")
        assert model.splits["fc"] == {"in": 6}, how
        model.close()


def model_of(
    path: Path, nodes: Sequence[Any], weights: dict[str, np.ndarray], inputs: dict[str, Sequence[Any]], opset: int = 21
) -> Path:
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "g", info, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), [output], name=f"{output}_node", **attributes)


@pytest.mark.parametrize("first", [True, False])
def test_the_bias_of_a_matmul_is_added_from_either_side(first: bool, tmp_path: Path) -> None:
    w, b = normal(3, 5), normal(5)
    add = node("Add", "b m" if first else "m b", "y")
    found = layers(model_of(tmp_path / "x.onnx", [node("MatMul", "x w", "m"), add], {"w": w, "b": b}, {"x": ["n", 3]}))
    (dense,) = found.values()
    np.testing.assert_array_equal(dense.tensors["kernel"].data.read(), w.T)
    np.testing.assert_array_equal(dense.tensors["bias"].data.read(), b)


def test_a_product_that_is_used_twice_has_no_bias(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Mul", "a m", "y")]
    found = layers(model_of(tmp_path / "x.onnx", nodes, {"w": normal(3, 5), "b": normal(5)}, {"x": ["n", 3]}))
    assert {layer.kind: set(layer.tensors) for layer in found.values()} == {"dense": {"kernel"}, "unknown": {"value"}}


def test_constants_are_followed_through_what_only_moves_them(tmp_path: Path) -> None:
    w = normal(5, 3)
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(w.reshape(1, 15))),
        helper.make_node("Constant", [], ["shape"], value_ints=[5, -1]),
        node("Identity", "c", "i"),
        node("Reshape", "i shape", "r"),
        node("Transpose", "r", "t"),
        node("Cast", "t", "d", to=onnx.TensorProto.DOUBLE),
        node("MatMul", "x d", "y"),
    ]
    (dense,) = layers(model_of(tmp_path / "x.onnx", nodes, {}, {"x": ["n", 3]})).values()
    np.testing.assert_array_equal(dense.tensors["kernel"].data.read(), w)


def test_what_computes_with_a_weight_before_it_is_used_hides_it(tmp_path: Path) -> None:
    nodes = [node("Mul", "w s", "v"), node("MatMul", "x v", "y")]
    found = layers(model_of(tmp_path / "x.onnx", nodes, {"w": normal(3, 5), "s": normal(5)}, {"x": ["n", 3]}))
    assert {layer.kind for layer in found.values()} == {"unknown"} and len(found) == 2


def test_a_weight_of_two_operators_is_tied(tmp_path: Path) -> None:
    nodes = [node("Gather", "e tokens", "g"), node("Transpose", "e", "t", perm=[1, 0]), node("MatMul", "g t", "y")]
    model = read(model_of(tmp_path / "x.onnx", nodes, {"e": normal(7, 5)}, {"tokens": ["n"]}))
    table, head = model.layers
    (one,), (other,) = table.tensors.values(), head.tensors.values()
    assert (table.cls, head.cls) == ("Gather", "MatMul")
    assert one.identity == other.identity and one.name != other.name


def test_a_layer_used_twice_is_one(tmp_path: Path) -> None:
    nodes = [node("MatMul", "a w", "m"), node("MatMul", "b w", "n"), node("Concat", "m n", "y", axis=1)]
    found = layers(model_of(tmp_path / "x.onnx", nodes, {"w": normal(3, 5)}, {"a": ["n", 3], "b": ["n", 3]}))
    assert [layer.kind for layer in found.values()] == ["dense"]


def test_a_weight_that_is_used_in_another_way_too_is_told(tmp_path: Path) -> None:
    """Else filling one use would change the other."""
    nodes = [node("LayerNormalization", "x w", "m"), node("Mul", "m w", "y")]
    found = layers(model_of(tmp_path / "x.onnx", nodes, {"w": normal(5)}, {"x": ["n", 5]}))
    assert sorted(layer.kind for layer in found.values()) == ["layer_norm", "unknown"]


def test_factors_of_a_gemm(tmp_path: Path) -> None:
    w, b = normal(3, 5), normal(5)
    gemm = node("Gemm", "x w b", "y", alpha=0.5, beta=4.0)
    (dense,) = layers(model_of(tmp_path / "x.onnx", [gemm], {"w": w, "b": b}, {"x": ["n", 3]})).values()
    np.testing.assert_array_equal(dense.tensors["kernel"].data.read(), w.T / 2)
    np.testing.assert_array_equal(dense.tensors["bias"].data.read(), b * 4)
    gemm = node("Gemm", "x w b", "y", alpha=0.7)
    model = read(model_of(tmp_path / "y.onnx", [gemm], {"w": w, "b": b}, {"x": ["n", 3]}))
    assert set(model.layers[0].tensors) == {"W (alpha 0.7)", "B (alpha 0.7)"}
    assert [layer.kind for layer in canonical_layers(model, ONNX)] == ["unknown"]


@pytest.mark.parametrize(("slope", "shape", "expected"), [
    ((4, 1, 1), ["n", 4, 5, 6], (4,)),
    ((1, 4, 1, 1), ["n", 4, 5, 6], (4,)),
    ((1,), ["n", 4, 5, 6], (1,)),
    ((4,), ["n", 4], (4,)),
    ((4, 5, 6), ["n", 4, 5, 6], (4, 5, 6)),
    ((6,), ["n", 4, 5, 6], None),
    ((2, 4, 5, 6), ["n", 4, 5, 6], None),
])  # fmt: skip
def test_a_slope_belongs_to_the_axis_that_it_reaches(
    slope: tuple[int, ...], shape: list[Any], expected: tuple[int, ...] | None, tmp_path: Path
) -> None:
    found = layers(model_of(tmp_path / "x.onnx", [node("PRelu", "x s", "y")], {"s": normal(*slope)}, {"x": shape}))
    (layer,) = found.values()
    assert (
        (layer.kind, layer.tensors["slope"].data.shape) == ("prelu", expected) if expected else layer.kind == "unknown"
    )


def test_names_with_a_slash_in_front_stay_inside_a_folder(tmp_path: Path) -> None:
    """Torch's older exporter calls its nodes and constants so, such as those of a group norm."""
    stored = numpy_helper.from_array(normal(4, 1, 1))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["/m"], name="/MatMul"),
        helper.make_node("Constant", [], ["/gn/Constant_2_output_0"], value=stored),
        helper.make_node("Mul", ["/m", "/gn/Constant_2_output_0"], ["/gn/Mul_output_0"], name="/gn/Mul"),
    ]
    source = model_of(tmp_path / "x.onnx", nodes, {"w": normal(4, 4)}, {"x": ["n", 4, 4, 4]})
    with neutral.export_model(source, tmp_path / "x.nwt") as archive:
        assert sorted(archive.names()) == ["MatMul/kernel", "gn/Constant_2_output_0/value"]
    neutral.import_model(tmp_path / "x.nwt", into=source, out=tmp_path / "y.onnx")
    assert neutral.diff(source, tmp_path / "y.onnx").same


@pytest.mark.parametrize(("axis", "scale", "shape", "kind"), [
    (-1, (4,), ["n", 4, 4, 4], "layer_norm"),
    (-2, (4, 4), ["n", 4, 4, 4], "layer_norm"),
    (2, (4, 4), ["n", 4, 4, 4], "layer_norm"),
    (-1, (4, 4), ["n", 4, 4, 4], "unknown"),
    (1, (4,), ["n", 4, 4, 4], "unknown"),
    (2, (4, 4), None, "unknown"),
])  # fmt: skip
@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_a_norm_whose_scale_is_stretched_is_kept_as_it_is(
    op: str, axis: int, scale: tuple[int, ...], shape: list[Any] | None, kind: str, tmp_path: Path
) -> None:
    """No other framework has a scale per position of a norm over one axis, and equal sizes would fit."""
    norm = node(op, "x s", "y", axis=axis)
    path = model_of(tmp_path / "x.onnx", [norm], {"s": normal(*scale)}, {"x": shape}, opset=23)  # type: ignore[dict-item]
    expected = "rms_norm" if kind == "layer_norm" and op[0] == "R" else kind
    assert [layer.kind for layer in layers(path).values()] == [expected]


def test_a_group_norm_with_one_scale_a_group_is_kept_as_it_is(tmp_path: Path) -> None:
    weights = {"s": normal(2), "b": normal(2)}
    norm = node("GroupNormalization", "x s b", "y", num_groups=2)
    model = read(model_of(tmp_path / "x.onnx", [norm], weights, {"x": ["n", 6, 3]}, opset=18))
    assert "one scale for each group" in "".join(model.notes)
    assert [layer.kind for layer in canonical_layers(model, ONNX)] == ["unknown"]


@pytest.mark.parametrize(("last", "turned"), [(False, False), (True, True)])
def test_a_flatten_of_a_turned_image(last: bool, turned: bool, tmp_path: Path) -> None:
    """TensorFlow's images are turned before they are joined: then the kernel has its rows in that order."""
    w = normal(4 * 3 * 3, 5)
    nodes = [node("Conv", "x k", "c")]
    nodes += [node("Transpose", "c", "t", perm=[0, 2, 3, 1])] if last else []
    nodes += [node("Flatten", "t" if last else "c", "f"), node("Gemm", "f w", "y")]
    path = model_of(tmp_path / "x.onnx", nodes, {"k": normal(4, 2, 3, 3), "w": w}, {"x": ["n", 2, 5, 5]})
    model = read(path)
    assert next(iter(axes for axes in model.splits.values() if axes)) == {"in": 4}
    dense = next(layer for layer in canonical_layers(model, ONNX) if layer.kind == "dense")
    expected = w.reshape(9, 4, 5).swapaxes(0, 1).reshape(36, 5).T if turned else w.T
    np.testing.assert_array_equal(dense.tensors["kernel"].data.read(), expected)


def test_a_turned_image_is_told_where_the_template_has_no_graph(tmp_path: Path) -> None:
    """A torch model that permutes before its Flatten is exported so, and wants the weights back as they were."""
    nodes = [
        node("Conv", "x c", "i"),
        node("Transpose", "i", "t", perm=[0, 2, 3, 1]),
        node("Flatten", "t", "f"),
        node("Gemm", "f fc.weight", "y", transB=1),
    ]
    weights = {"c": normal(2, 2, 1, 1), "fc.weight": normal(3, 8)}
    source = model_of(tmp_path / "x.onnx", nodes, weights, {"x": ["n", 2, 2, 2]})
    template = {"c.weight": torch.zeros(2, 2, 1, 1), "fc.weight": torch.zeros(3, 8)}
    torch.save(template, tmp_path / "t.pt")
    for middle in (source, tmp_path / "x.nwt"):
        if middle != source:
            neutral.export_model(source, middle).close()
        report = neutral.convert(middle, tmp_path / "out.pt", into=tmp_path / "t.pt", force=True)
        assert [text.split(":")[0] for text in report.warnings] == ["fc"]
        assert "permutation" in report.warnings[0]


def test_a_dense_layer_in_front_of_an_image(tmp_path: Path) -> None:
    weights = {"w": normal(3, 36), "b": normal(36), "shape": np.array([0, 4, 3, 3]), "k": normal(2, 4, 2, 2)}
    nodes = [
        node("Gemm", "x w b", "g"),
        node("Relu", "g", "a"),
        node("Reshape", "a shape", "r"),
        node("Conv", "r k", "y"),
    ]
    model = read(model_of(tmp_path / "x.onnx", nodes, weights, {"x": ["n", 3]}))
    assert {"out": 4} in model.splits.values()


def test_a_vector_that_is_divided_and_never_an_image_is_not_decided(tmp_path: Path) -> None:
    weights = {"w": normal(3, 36), "shape": np.array([0, 4, 3, 3]), "v": normal(3, 5)}
    nodes = [node("Gemm", "x w", "g"), node("Reshape", "g shape", "r"), node("MatMul", "r v", "y")]
    model = read(model_of(tmp_path / "x.onnx", nodes, weights, {"x": ["n", 3]}))
    assert "g_node" not in model.splits


def test_layers_inside_of_graphs_inside_of_nodes(tmp_path: Path) -> None:
    inner = [
        helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["o"], name=name)], name, [], [helper.make_tensor_value_info("o", 1, None)], [numpy_helper.from_array(normal(3, 3), "w")])
        for name in ("yes", "no")
    ]  # fmt: skip
    chosen = helper.make_node("If", ["c"], ["y"], name="if", then_branch=inner[0], else_branch=inner[1])
    found = read(model_of(tmp_path / "x.onnx", [chosen], {}, {"x": ["n", 3], "c": []}))
    assert {(layer.path, layer.cls) for layer in found.layers} == {("yes", "MatMul"), ("no", "MatMul")}
    assert len({tensor.name for tensor in found.tensors()}) == 2


def test_weights_that_a_graph_inside_uses(tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["o"], name="inside")], "body", [], [helper.make_tensor_value_info("o", 1, None)])  # fmt: skip
    chosen = helper.make_node("If", ["c"], ["y"], name="if", then_branch=inner, else_branch=inner)
    found = read(model_of(tmp_path / "x.onnx", [chosen], {"w": normal(3, 3)}, {"x": ["n", 3], "c": []}))
    assert [(layer.path, layer.cls) for layer in found.layers] == [("inside", "MatMul")]


def test_weights_inside_of_functions(tmp_path: Path) -> None:
    path = model_of(tmp_path / "x.onnx", [helper.make_node("F", ["x"], ["y"], domain="own")], {}, {"x": ["n", 3]})
    model = onnx.load(path)
    opsets = [helper.make_opsetid("", 21)]
    body = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(3, 5))),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="inside"),
    ]
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], body, opsets))
    path.write_bytes(model.SerializeToString())
    (layer,) = canonical_layers(read(path), ONNX)
    assert (layer.path, layer.kind, layer.tensors["kernel"].data.shape) == ("inside", "dense", (5, 3))


def test_numbers_of_the_graph_itself_are_told(tmp_path: Path) -> None:
    listed = helper.make_node("Constant", [], ["v"], value_floats=[1.0, 2.0, 3.0])
    nodes = [listed, node("Mul", "x v", "m"), node("MatMul", "m w", "y")]
    model = read(model_of(tmp_path / "x.onnx", nodes, {"w": normal(3, 5)}, {"x": ["n", 3]}))
    assert "v: 3 numbers of the graph itself" in " ".join(model.notes)


def test_a_live_model(tmp_path: Path) -> None:
    w = normal(3, 5)
    live = onnx.load(model_of(tmp_path / "x.onnx", [node("MatMul", "x w", "y")], {"w": w}, {"x": ["n", 3]}))
    (tensor,) = read_live(live).tensors()
    np.testing.assert_array_equal(tensor.data.read(), w)
    with pytest.raises(Unsupported):
        read_live(object())


def test_refuses_keys_and_files_without_weights(tmp_path: Path) -> None:
    path = model_of(tmp_path / "x.onnx", [node("Relu", "x", "y")], {}, {"x": ["n"]})
    with pytest.raises(BadFile, match="no weights"):
        read(path)
    with pytest.raises(WrongUsage):
        read(path, key="ema")
