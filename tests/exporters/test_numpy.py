from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from neutral.errors import BadFile, WrongUsage
from neutral.exporters.numpy import read, read_live


def test_reads_layers_of_an_npz(tmp_path: Path) -> None:
    arrays = {
        "enc/fc/kernel": np.arange(6.0).reshape(2, 3),
        "out/bias": np.arange(2),
        "enc/fc/bias": np.zeros(2),
        "w": np.ones(1),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    model = read(tmp_path / "x.npz")
    assert (model.framework, model.format) == ("numpy", "npz")
    assert [(layer.path, layer.cls, list(layer.tensors)) for layer in model.layers] == [
        ("enc.fc", None, ["kernel", "bias"]),
        ("out", None, ["bias"]),
        ("", None, ["w"]),
    ]
    for tensor in model.tensors():
        np.testing.assert_array_equal(tensor.data.read(), arrays[tensor.name])
    model.close()


def test_layers_that_differ_by_a_slash_alone_stay_apart() -> None:
    model = read_live({"a/b/w": np.zeros(1), "a.b/w": np.ones(1)})
    assert [layer.tensors["w"].name for layer in model.layers] == ["a/b/w", "a.b/w"]
    assert [layer.path for layer in model.layers] == ["a/b", "a.b"]


def test_arrays_in_memory() -> None:
    shared = np.arange(3.0)
    model = read_live({"a/w": shared, "b/w": shared, "c/w": shared.copy(), "d/w": np.ones(2, ml_dtypes.bfloat16)})
    a, b, c, d = model.tensors()
    assert a.identity == b.identity != c.identity
    assert d.data.read().dtype == ml_dtypes.bfloat16
    assert a.data.read().tolist() == [0, 1, 2]


@pytest.mark.parametrize("array", [np.array(["x"]), np.array([None]), np.zeros(2, "V3"), np.zeros(2, "M8[s]")])
def test_arrays_of_no_numbers_are_refused(array: np.ndarray) -> None:
    with pytest.raises(WrongUsage, match="numbers"):
        read_live({"a": array})


def test_refuses_a_key_and_an_empty_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz")
    with pytest.raises(BadFile, match="no array"):
        read(tmp_path / "x.npz")
    with pytest.raises(WrongUsage):
        read(tmp_path / "x.npz", key="a")
