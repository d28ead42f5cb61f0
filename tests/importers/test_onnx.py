from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import neutral
from neutral.errors import Refused
from neutral.exporters.onnx import read
from neutral.importers.onnx import fill, fill_live
from neutral.native import from_array
from tests.exporters.test_onnx import INPUTS, Net, export_net, model_of, node, normal


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_net(tmp_path_factory.mktemp("exported"))


def run(path: Path, *inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    made: list[np.ndarray] = session.run(None, dict(zip(names, inputs, strict=True)))
    return made


def other_net(folded: bool = False) -> Net:
    """The same net with other weights; `folded`, without its norm, which its convolution computes."""
    torch.manual_seed(11)
    net = Net().eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if name.endswith("_var") else torch.randn(tensor.shape))
    if folded:
        conv = torch.nn.utils.fusion.fuse_conv_bn_eval(net.enc[0], net.enc[1])  # type: ignore[arg-type]
        net.enc = torch.nn.Sequential(conv, torch.nn.Identity(), torch.nn.ReLU())
    return net


@pytest.mark.parametrize("how", ["plain", "optimized", "legacy"])
def test_a_filled_model_computes_what_torch_computes(how: str, exported: Path, tmp_path: Path) -> None:
    net = other_net(folded=how != "plain")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    neutral.convert(tmp_path / "net.pt", tmp_path / "new.onnx", into=exported / f"{how}.onnx", flatten={"fc": 6})
    with torch.no_grad():
        expected = net(*INPUTS)
    for found, wanted in zip(run(tmp_path / "new.onnx", *(x.numpy() for x in INPUTS)), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
    onnx.checker.check_model(str(tmp_path / "new.onnx"))


def test_a_model_without_the_folded_norm_is_refused(exported: Path, tmp_path: Path) -> None:
    torch.save(other_net().state_dict(), tmp_path / "net.pt")
    with pytest.raises(Refused, match=r"enc\.1"):
        neutral.convert(tmp_path / "net.pt", tmp_path / "new.onnx", into=exported / "optimized.onnx", flatten={"fc": 6})


def test_what_is_read_can_be_filled_and_the_rest_stays(exported: Path, tmp_path: Path) -> None:
    template = exported / "plain.onnx"
    model = read(template)
    fill(template, {tensor.name: tensor.data for tensor in model.tensors()}, tmp_path / "same.onnx")
    model.close()
    again, first = onnx.load(tmp_path / "same.onnx"), onnx.load(template)
    assert again.SerializeToString() == first.SerializeToString()


def test_a_scaled_kernel_is_divided_again(tmp_path: Path) -> None:
    w = normal(3, 5)
    path = model_of(tmp_path / "x.onnx", [node("Gemm", "x w", "y", alpha=0.25)], {"w": w}, {"x": ["n", 3]})
    new, x = normal(3, 5), normal(2, 3)
    fill(path, {"w": from_array(new)}, tmp_path / "y.onnx")
    np.testing.assert_allclose(run(tmp_path / "y.onnx", x)[0], x @ new, rtol=1e-5, atol=1e-6)
    huge = np.full((3, 5), 3e38, np.float32)
    with pytest.raises(Refused, match="scale"):
        fill(path, {"w": from_array(huge)}, tmp_path / "z.onnx")
    assert not (tmp_path / "z.onnx").exists()


def test_tied_weights_must_agree(tmp_path: Path) -> None:
    nodes = [node("Gather", "e tokens", "g"), node("Transpose", "e", "t", perm=[1, 0]), node("MatMul", "g t", "y")]
    path = model_of(tmp_path / "x.onnx", nodes, {"e": normal(7, 5)}, {"tokens": ["n"]})
    model = read(path)
    table, head = (tensor.name for tensor in model.tensors())
    model.close()
    new = normal(7, 5)
    with pytest.raises(Refused, match="tied"):
        fill(path, {table: from_array(new), head: from_array(normal(5, 7))}, tmp_path / "y.onnx")
    fill(path, {table: from_array(new), head: from_array(new.T)}, tmp_path / "y.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(tmp_path / "y.onnx").graph.initializer[0]), new)


def test_layers_of_another_factor_are_not_filled(tmp_path: Path) -> None:
    """What no other framework has goes back into the same alone."""
    for name, alpha in (("a", 0.7), ("b", 0.7), ("c", 0.6)):
        model_of(
            tmp_path / f"{name}.onnx", [node("Gemm", "x w", "y", alpha=alpha)], {"w": normal(3, 5)}, {"x": ["n", 3]}
        )
    neutral.convert(tmp_path / "a.onnx", tmp_path / "new.onnx", into=tmp_path / "b.onnx")
    assert (tmp_path / "new.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()
    with pytest.raises(Refused):
        neutral.convert(tmp_path / "a.onnx", tmp_path / "other.onnx", into=tmp_path / "c.onnx")


def test_names_that_are_not_there_and_the_input_as_the_output(tmp_path: Path) -> None:
    path = model_of(tmp_path / "x.onnx", [node("MatMul", "x w", "y")], {"w": normal(3, 5)}, {"x": ["n", 3]})
    with pytest.raises(Refused, match="no tensor of that name"):
        fill(path, {"v": from_array(normal(3, 5))}, tmp_path / "y.onnx")
    with pytest.raises(Refused, match="the input itself"):
        fill(path, {}, path, force=True)
    assert [each.name for each in tmp_path.iterdir()] == ["x.onnx"]


def test_a_live_model_is_filled(tmp_path: Path) -> None:
    path = model_of(tmp_path / "x.onnx", [node("MatMul", "x w", "y")], {"w": normal(3, 5)}, {"x": ["n", 3]})
    live, new = onnx.load(path), normal(3, 5)
    fill_live(live, {"w": from_array(new)})
    np.testing.assert_array_equal(numpy_helper.to_array(live.graph.initializer[0]), new)
    assert helper.printable_graph(live.graph)


def test_external_data_goes_along(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported / "plain.onnx")
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    net = other_net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    neutral.convert(tmp_path / "net.pt", tmp_path / "new.onnx", into=tmp_path / "x.onnx", flatten={"fc": 6})
    assert (tmp_path / "new.onnx.weights").stat().st_size == (tmp_path / "weights").stat().st_size
    with torch.no_grad():
        expected = net(*INPUTS)[0].numpy()
    np.testing.assert_allclose(
        run(tmp_path / "new.onnx", *(x.numpy() for x in INPUTS))[0], expected, rtol=1e-4, atol=1e-4
    )
