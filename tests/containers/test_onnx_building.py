"""New ONNX files, read with the onnx package and by neutral's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from neutral.containers import onnx_building
from neutral.containers.onnx import open_onnx
from neutral.containers.onnx_building import Described, Model, Node, write
from neutral.errors import Refused
from neutral.native import Tensor, from_array

ATTRIBUTES: dict[str, Any] = {
    "zero": 0,
    "below": -3,
    "large": -(1 << 63),
    "real": 0.1,
    "none": 0.0,
    "text": "déjà",
    "ints": (0, -1, 1 << 40),
    "floats": (0.5, 0.0),
    "texts": ("a", ""),
    "value": np.arange(6, dtype=np.int64).reshape(2, 3),
}


def model(weights: dict[str, Tensor], *nodes: Node) -> Model:
    x = Described("x", "float32", ("batch", 3, None))
    return Model(
        nodes or (Node("Identity", ("x",), ("y",)),), weights, (x,), (Described("y", "float32", (None, 3)),), 21
    )


def test_attributes_are_what_they_were(tmp_path: Path) -> None:
    write(model({}, Node("Odd", ("x", ""), ("y",), ATTRIBUTES, "layer.0")), tmp_path / "a.onnx")
    (node,) = onnx.load(tmp_path / "a.onnx").graph.node
    found = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    assert (node.op_type, node.name, list(node.input), list(node.output)) == ("Odd", "layer.0", ["x", ""], ["y"])
    assert (onnx.numpy_helper.to_array(found.pop("value")) == ATTRIBUTES["value"]).all()
    assert found.pop("real") == pytest.approx(0.1) and found.pop("text") == "déjà".encode()
    assert found == {
        "zero": 0, "below": -3, "large": -(1 << 63), "none": 0.0, "ints": [0, -1, 1 << 40], "floats": [0.5, 0.0], "texts": [b"a", b""],
    }  # fmt: skip
    assert all(one.type for one in node.attribute)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bfloat16", "int8", "bool", "complex64", "float8_e5m2"]
)
def test_weights_of_each_dtype(dtype: str, tmp_path: Path) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    weights = {
        "a": np.arange(6).reshape(2, 3).astype(kind),
        "scalar": np.asarray(1).astype(kind),
        "none": np.zeros((0, 2), kind),
    }
    write(model({name: from_array(array) for name, array in weights.items()}), tmp_path / "a.onnx")
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "a.onnx").graph.initializer}
    with open_onnx(tmp_path / "a.onnx") as opened:
        read = {name: one.data.read() for name, one in opened.model.graph.initializers.items() if one.data is not None}
    for found in (stored, read):
        assert {name: (array.shape, array.tobytes()) for name, array in found.items()} == {
            name: (array.shape, array.tobytes()) for name, array in weights.items()
        }


def test_a_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    write(model({"a": from_array(array).permute((1, 0))}), tmp_path / "a.onnx")
    assert (onnx.numpy_helper.to_array(onnx.load(tmp_path / "a.onnx").graph.initializer[0]) == array.T).all()


def test_inputs_and_outputs(tmp_path: Path) -> None:
    write(model({}), tmp_path / "a.onnx")
    graph = onnx.load(tmp_path / "a.onnx").graph
    dims = graph.input[0].type.tensor_type.shape.dim
    assert [dim.WhichOneof("value") for dim in dims] == ["dim_param", "dim_value", None]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_dtype_that_onnx_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="float8_e3m4"):
        write(model({"a": from_array(np.zeros(3, ml_dtypes.float8_e3m4))}), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_large_weights_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_building, "LARGEST", 1 << 14)
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(n).astype(np.float32) for name, n in (("a", 1500), ("b", 8), ("c", 4000))}
    write(model({name: from_array(array) for name, array in weights.items()}), tmp_path / "a.onnx")
    loaded = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert all((loaded[name] == array).all() for name, array in weights.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    with open_onnx(tmp_path / "a.onnx") as opened:
        places = {name: one.external is not None for name, one in opened.model.graph.initializers.items()}
    assert places == {"a": True, "b": False, "c": True}


def test_neither_file_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_building, "LARGEST", 100)
    weights = {"a": from_array(np.zeros(1000, np.float32))}
    for name in ("a.onnx", "b.onnx.data"):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(Refused):
            write(model(weights), tmp_path / name.removesuffix(".data"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx.data"]
    assert all(path.read_bytes() == b"mine" for path in tmp_path.iterdir())
