from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neutral.errors import NeutralError, Refused, Unsupported
from neutral.exporters.numpy import read, read_live
from neutral.importers.numpy import build, fill, fill_live
from neutral.native import from_array
from neutral.schema.manifest import Manifest, Source


def _manifest(**source: object) -> Manifest:
    return Manifest(
        source=Source(**{"framework": "numpy", "format": "npz"} | source),  # type: ignore[arg-type]
        layers=(),
        weights_digest="0" * 64,
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_fill_changes_the_arrays_named(save: object, tmp_path: Path) -> None:
    arrays = {"a/w": np.arange(6.0).reshape(2, 3), "b/w": np.asfortranarray(np.ones((2, 3), ">f4"))}
    save(tmp_path / "x.npz", **arrays)  # type: ignore[operator]
    new = np.arange(6, dtype="f4").reshape(2, 3)
    fill(tmp_path / "x.npz", {"b/w": from_array(new)}, tmp_path / "y.npz")
    with np.load(tmp_path / "y.npz") as changed:
        assert changed.files == ["a/w", "b/w"]
        np.testing.assert_array_equal(changed["a/w"], arrays["a/w"])
        np.testing.assert_array_equal(changed["b/w"], new)
        assert changed["b/w"].dtype == np.dtype(">f4") and changed["b/w"].flags.f_contiguous
    fill(tmp_path / "y.npz", {"b/w": from_array(np.ones((2, 3), "f4"))}, tmp_path / "z.npz")
    assert (tmp_path / "z.npz").read_bytes() == (tmp_path / "x.npz").read_bytes()


def test_fill_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.ones(3))
    for name, array in (("w", np.ones(2)), ("w", np.ones(3, "f4")), ("v", np.ones(3))):
        with pytest.raises(Refused):
            fill(tmp_path / "x.npz", {name: from_array(array)}, tmp_path / "y.npz")
    for out in ("x.npz", "no/y.npz"):
        with pytest.raises(Refused):
            fill(tmp_path / "x.npz", {"w": from_array(np.zeros(3))}, tmp_path / out, force=True)
    (tmp_path / "z.npz").write_bytes(b"mine")
    with pytest.raises(Refused):
        fill(tmp_path / "x.npz", {"w": from_array(np.zeros(3))}, tmp_path / "z.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz", "z.npz"]
    assert np.load(tmp_path / "x.npz")["w"].tolist() == [1, 1, 1]


def test_fill_live_checks_all_before_it_writes() -> None:
    arrays = {"a": np.zeros(3), "b": np.zeros((2, 2), ">i4"), "c": np.zeros(())}
    with pytest.raises(Refused) as caught:
        fill_live(arrays, {"a": from_array(np.ones(3)), "b": from_array(np.ones(4)), "x": from_array(np.ones(1))})
    assert len(caught.value.problems) == 2 and not arrays["a"].any()
    new = {"a": np.arange(3.0), "b": np.arange(4, dtype="i4").reshape(2, 2), "c": np.array(7.0)}
    fill_live(arrays, {name: from_array(array) for name, array in new.items()})
    for name, array in new.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert arrays["b"].dtype == np.dtype(">i4")


def test_build_gives_numpy_the_arrays_by_their_names(tmp_path: Path) -> None:
    arrays = {"b/w": np.arange(6.0).reshape(2, 3).T, "a/w": np.array(3)}
    build(read_live(arrays), _manifest(), tmp_path / "x.npz")
    build(read_live(arrays), _manifest(order=("a/w", "b/w")), tmp_path / "y.npz")
    for file, names in (("x.npz", ["b/w", "a/w"]), ("y.npz", ["a/w", "b/w"])):
        with np.load(tmp_path / file) as loaded:
            assert loaded.files == names
            for name, array in arrays.items():
                np.testing.assert_array_equal(loaded[name], array)
    model = read(tmp_path / "x.npz")
    build(model, _manifest(), tmp_path / "z.npz")
    assert (tmp_path / "z.npz").read_bytes() == (tmp_path / "x.npz").read_bytes()


def test_build_refuses_other_suffixes_and_dtypes(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="npz"):
        build(read_live({"a": np.ones(2)}), _manifest(), tmp_path / "x.npy")
    with pytest.raises(NeutralError):
        build(read_live({"a": np.ones(2, np.longdouble)}), _manifest(), tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())
