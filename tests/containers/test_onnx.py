from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from neutral.containers.onnx import NodeProto, Opaque, open_onnx
from neutral.containers.onnx import named_tensors as by_name
from neutral.containers.onnx_constants import (
    Cut,
    Expression,
    Joined,
    Leaf,
    Permuted,
    Reshaped,
    backward,
    forward,
    undoable,
)
from neutral.containers.onnx_writing import replace_tensors
from neutral.errors import Refused
from neutral.native import from_array

RNG = np.random.default_rng(0)
TYPED = {
    "float": (TensorProto.FLOAT, (2, 3), RNG.standard_normal(6)),
    "half": (TensorProto.FLOAT16, (2, 3), RNG.standard_normal(6).astype(np.float16)),
    "brain": (TensorProto.BFLOAT16, (5,), RNG.standard_normal(5)),
    "eight": (TensorProto.FLOAT8E4M3FN, (4,), [0.5, -2, 3, 0]),
    "long": (TensorProto.INT64, (4,), [0, -1, 2**62, -(2**63)]),
    "byte": (TensorProto.INT8, (4,), [0, -1, 127, -128]),
    "word": (TensorProto.UINT32, (2,), [1, 2**32 - 1]),
    "words": (TensorProto.UINT64, (2,), [1, 2**64 - 1]),
    "truth": (TensorProto.BOOL, (2,), [True, False]),
    "double": (TensorProto.DOUBLE, (2,), [1.5, 2.5]),
    "complex": (TensorProto.COMPLEX64, (2,), [1 + 2j, 3 - 4j]),
    "empty": (TensorProto.FLOAT, (0, 3), []),
    "scalar": (TensorProto.FLOAT, (), [3.0]),
    "texts": (TensorProto.STRING, (2,), ["a", "b"]),
    "nibbles": (TensorProto.INT4, (3,), [1, -2, 3]),
}


def _tensors() -> list[TensorProto]:
    typed = [helper.make_tensor(name, code, shape, values) for name, (code, shape, values) in TYPED.items()]
    raw = [numpy_helper.from_array(RNG.standard_normal((3, 4)), "raw"), numpy_helper.from_array(np.arange(4.0), "raw2")]
    return [*typed, *raw]


def _saved(path: Path, *nodes: Any, tensors: list[TensorProto] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", [], [], _tensors() if tensors is None else tensors)
    model = helper.make_model(graph, producer_name="tests", ir_version=10)
    path.write_bytes(model.SerializeToString())
    return model


def _external(path: Path, location: str, checksum: bool = False) -> None:
    """A model with all its float tensors in one file of external data."""
    tensors = [numpy_helper.from_array(RNG.standard_normal((n, 3)).astype(np.float32), f"t{n}") for n in (2, 4)]
    data = b"pad!" + b"".join(tensor.raw_data for tensor in tensors)
    at = 4
    for tensor in tensors:
        size = len(tensor.raw_data)
        set_external_data(tensor, location, at, size, hashlib.sha1(data).hexdigest() if checksum else None)
        tensor.ClearField("raw_data")
        at += size
    (path.parent / location).parent.mkdir(exist_ok=True)
    (path.parent / location).write_bytes(data)
    _saved(path, tensors=tensors)


def test_reads_every_way_in_which_elements_are_stored(tmp_path: Path) -> None:
    model = _saved(tmp_path / "x.onnx")
    with open_onnx(tmp_path / "x.onnx") as opened:
        found = opened.model.graph.initializers
        assert list(found) == [tensor.name for tensor in model.graph.initializer]
        for tensor in model.graph.initializer:
            data = found[tensor.name].data
            if tensor.name in ("texts", "nibbles"):
                assert data is None
                continue
            expected = numpy_helper.to_array(tensor)
            assert data is not None and data.dtype == expected.dtype and data.shape == expected.shape
            assert data.read().tobytes() == expected.tobytes(), tensor.name


def test_floats_may_come_one_by_one(tmp_path: Path) -> None:
    """Readers must take repeated fields that are not packed, too."""
    typed = _tensors()[0]
    packed = typed.SerializeToString()
    start = packed.index(bytes([4 << 3 | 2, 24]))
    single = b"".join(bytes([4 << 3 | 5]) + packed[start + 2 + i : start + 6 + i] for i in range(0, 24, 4))
    model = _saved(tmp_path / "x.onnx", tensors=[])
    inner = model.graph.SerializeToString()
    spoiled = packed[:start] + single + packed[start + 26 :]
    inner += bytes([5 << 3 | 2, len(spoiled)]) + spoiled
    (tmp_path / "x.onnx").write_bytes(bytes([8, 10, 7 << 3 | 2, len(inner)]) + inner)
    with open_onnx(tmp_path / "x.onnx") as opened:
        data = opened.model.graph.initializers["float"].data
        assert data is not None
        np.testing.assert_array_equal(data.read(), numpy_helper.to_array(typed))
        new = np.arange(6, dtype=np.float32).reshape(2, 3)
        replace_tensors(opened, {"float": from_array(new)}, tmp_path / "y.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(tmp_path / "y.onnx").graph.initializer[0]), new)


def test_attributes_are_what_onnx_says_they_are(tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="inside")], "inner", [], [], _tensors()[:1])
    values = {
        "f": 1.5, "i": -3, "zero": 0, "s": "text", "bytes": b"\xff\xfe", "fs": [0.5, 2.0], "is": [1, -2], "ss": ["a", "b"],
        "t": _tensors()[0], "g": inner,
    }  # fmt: skip
    node = helper.make_node("Test", ["a", ""], ["b"], name="n", domain="d", **values)
    node.metadata_props.add(key="k", value="v")
    node.attribute.add(name="type", type=onnx.AttributeProto.TYPE_PROTO)
    model = _saved(tmp_path / "x.onnx", node)
    model.functions.add(name="F", domain="d", input=["q"], output=["r"])
    model.functions[0].node.add(op_type="Elu").attribute.add(name="alpha", ref_attr_name="a", type=1)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with open_onnx(tmp_path / "x.onnx") as opened:
        (found,) = opened.model.graph.nodes
        assert (found.op_type, found.name, found.domain, found.inputs, found.metadata) == (
            "Test",
            "n",
            "d",
            ("a", ""),
            {"k": "v"},
        )
        plain = {name: found.attributes[name] for name in ("f", "i", "zero", "s", "bytes", "fs", "is", "ss")}
        assert plain == {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name not in "tg"}
        assert found.attributes["type"] == Opaque(13)
        assert opened.model.functions[0].nodes[0].attributes["alpha"].name == "a"  # type: ignore[union-attr]
        assert opened.model.opset == model.opset_import[0].version
        assert set(by_name(opened.model)) >= {"n.t", "n.g/float", "float"}


def test_nodes_are_told_without_onnx_for_the_domain_of_its_own() -> None:
    assert NodeProto("Relu") == NodeProto("Relu", domain="")


def test_replaced_elements_change_nothing_else(tmp_path: Path) -> None:
    model = _saved(tmp_path / "x.onnx")
    before = (tmp_path / "x.onnx").read_bytes()
    new = np.arange(12.0).reshape(3, 4)
    with open_onnx(tmp_path / "x.onnx") as opened:
        replace_tensors(
            opened, {"raw": from_array(new.T.copy().T), "float": from_array(np.ones((2, 3), "f4"))}, tmp_path / "y.onnx"
        )
        replace_tensors(opened, {}, tmp_path / "z.onnx")
    assert (tmp_path / "z.onnx").read_bytes() == before
    after = (tmp_path / "y.onnx").read_bytes()
    assert len(after) == len(before)
    old = next(t for t in model.graph.initializer if t.name == "raw").raw_data
    ones, was = np.ones(6, "f4").tobytes(), numpy_helper.to_array(model.graph.initializer[0]).tobytes()
    assert after == before.replace(old, new.tobytes()).replace(was, ones)


def test_every_kind_of_tensor_can_be_replaced(tmp_path: Path) -> None:
    held = helper.make_tensor("", TensorProto.INT64, [3], [1, -2, 300])
    _saved(tmp_path / "x.onnx", helper.make_node("Constant", [], ["made"], value=held))
    with open_onnx(tmp_path / "x.onnx") as opened:
        there = {name: t.data for name, t in by_name(opened.model).items() if t.data is not None}
        new = {name: from_array(RNG.integers(0, 100, t.shape).astype(t.dtype)) for name, t in there.items()}
        replace_tensors(opened, new, tmp_path / "y.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "y.onnx").graph.initializer[0] and str(tmp_path / "y.onnx"))
    with open_onnx(tmp_path / "y.onnx") as opened:
        again = by_name(opened.model)
        for name, tensor in new.items():
            data = again[name].data
            assert data is not None and data.read().tobytes() == tensor.read().tobytes(), name


@pytest.mark.parametrize("location", ["weights.bin", "x.onnx.data", "sub/t2"])
def test_external_data_is_copied_under_the_name_of_the_model(location: str, tmp_path: Path) -> None:
    _external(tmp_path / "x.onnx", location)
    new = np.arange(12, dtype=np.float32).reshape(4, 3)
    name = "long" * 40 + ".onnx"
    with open_onnx(tmp_path / "x.onnx") as opened:
        replace_tensors(opened, {"t4": from_array(new)}, tmp_path / name)
        old = opened.model.graph.initializers["t2"].data
        assert old is not None
        found = onnx.load(tmp_path / name)
        np.testing.assert_array_equal(numpy_helper.to_array(found.graph.initializer[0]), old.read())
        np.testing.assert_array_equal(numpy_helper.to_array(found.graph.initializer[1]), new)
    told = {"weights.bin": f"{name}.weights.bin", "x.onnx.data": f"{name}.data", "sub/t2": f"{name}.t2"}
    assert (tmp_path / told[location]).read_bytes()[:4] == b"pad!"


def test_a_checksum_of_external_data_is_renewed(tmp_path: Path) -> None:
    _external(tmp_path / "x.onnx", "weights.bin", checksum=True)
    with open_onnx(tmp_path / "x.onnx") as opened:
        replace_tensors(opened, {"t2": from_array(np.ones((2, 3), "f4"))}, tmp_path / "y.onnx")
    (told,) = {
        e.value
        for t in onnx.load(tmp_path / "y.onnx", load_external_data=False).graph.initializer
        for e in t.external_data
        if e.key == "checksum"
    }
    assert told == hashlib.sha1((tmp_path / "y.onnx.weights.bin").read_bytes()).hexdigest()


def test_refuses_what_does_not_fit_and_leaves_nothing(tmp_path: Path) -> None:
    _saved(tmp_path / "x.onnx")
    with open_onnx(tmp_path / "x.onnx") as opened:
        for name, array in (
            ("raw", np.ones(3)),
            ("raw", np.ones((3, 4), "f4")),
            ("none", np.ones(2)),
            ("nibbles", np.ones(3)),
        ):
            with pytest.raises(Refused):
                replace_tensors(opened, {name: from_array(array)}, tmp_path / "y.onnx")
        with pytest.raises(Refused, match="the input itself"):
            replace_tensors(opened, {}, tmp_path / "x.onnx", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_tensors_that_lie_in_the_same_bytes_change_together(tmp_path: Path) -> None:
    _external(tmp_path / "x.onnx", "w")
    model = onnx.load(tmp_path / "x.onnx", load_external_data=False)
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
    model.graph.initializer[2].name = "twin"
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    one, two = (from_array(np.full((2, 3), n, np.float32)) for n in (1, 2))
    with open_onnx(tmp_path / "x.onnx") as opened:
        for given in ({"t2": one}, {"t2": one, "twin": two}):
            with pytest.raises(Refused, match="same bytes"):
                replace_tensors(opened, given, tmp_path / "y.onnx")
        replace_tensors(opened, {"t2": one, "twin": one}, tmp_path / "y.onnx")
    for tensor in onnx.load(tmp_path / "y.onnx").graph.initializer[::2]:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), one.read())


def _leaf(tmp_path: Path, name: str, array: np.ndarray) -> Leaf:
    path = tmp_path / f"{name}.onnx"
    _saved(path, tensors=[numpy_helper.from_array(array, name)])
    return Leaf(name, open_onnx(path).model.graph.initializers[name])


def test_what_an_expression_makes_can_be_taken_back(tmp_path: Path) -> None:
    a, b = np.arange(24.0).reshape(8, 3), np.arange(100.0, 124.0).reshape(8, 3)
    la, lb = _leaf(tmp_path, "a", a), _leaf(tmp_path, "b", b)

    def gates(leaf: Leaf) -> Expression:
        parts = tuple(Cut(leaf, 0, 2 * i, 2 * i + 2) for i in (0, 3, 1, 2))
        return Reshaped(Joined(parts, 0), (1, 8, 3))

    both = Joined((gates(la), gates(lb)), 0)
    order = [0, 1, 6, 7, 2, 3, 4, 5]
    np.testing.assert_array_equal(forward(both).read(), np.stack([a[order], b[order]]))
    assert undoable(both)
    new = RNG.standard_normal((2, 8, 3))
    found = backward(both, from_array(new))
    for name, side in (("a", 0), ("b", 1)):
        np.testing.assert_array_equal(found[name].read()[order], new[side])
    turned = Permuted(Reshaped(la, (2, 4, 3)), (2, 0, 1))
    np.testing.assert_array_equal(backward(turned, forward(turned))["a"].read(), a)


def test_an_expression_without_some_elements_cannot_be_taken_back(tmp_path: Path) -> None:
    leaf = _leaf(tmp_path, "a", np.arange(24.0).reshape(8, 3))
    for expression in (
        Cut(leaf, 0, 0, 4),
        Joined((leaf, leaf), 0),
        Joined((Cut(leaf, 0, 0, 5), Cut(leaf, 0, 4, 8)), 0),
    ):
        assert not undoable(expression)
