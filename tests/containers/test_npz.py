from __future__ import annotations

import io
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from neutral.containers.files import SourceFile
from neutral.containers.npz import DTYPES_MEMBER, EXTENSIONS, read_npz, replace_arrays, write_npz
from neutral.containers.zip import ZipSource
from neutral.errors import BadFile, NeutralError, Refused
from neutral.native import Tensor, from_array


def _opened(path: Path) -> dict[str, Tensor]:
    return read_npz(ZipSource(SourceFile(path)))


def _from_members(path: Path, **members: bytes) -> dict[str, Tensor]:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, data in members.items():
            zipped.writestr(f"{name}.npy", data)
    return _opened(path)


def _npy(
    descr: str = "'<f4'", fortran: str = "False", shape: str = "(2,)", data: bytes = bytes(8), extra: str = ""
) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}{extra}}}\n".encode()
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + data


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    named = {
        code: (rng.standard_normal((3, 4, 5)) * 50).astype(code)
        for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16")
    }
    return named | {
        "big": np.arange(6, dtype=">i4").reshape(2, 3),
        "fortran": np.asfortranarray(rng.standard_normal((3, 4, 5))),
        "big fortran": np.asfortranarray(rng.standard_normal((3, 4))).astype(">f8", order="F"),
        "scalar": np.float64(3.5),
        "empty": np.zeros((0, 4), np.float32),
        "a/b.c": np.arange(3.0),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(save: object, tmp_path: Path) -> None:
    arrays = _arrays()
    save(tmp_path / "x.npz", **arrays)  # type: ignore[operator]
    tensors = _opened(tmp_path / "x.npz")
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        read = tensors[name].read()
        assert read.shape == array.shape and read.dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(read, array)


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    arrays = _arrays()
    out = io.BytesIO()
    write_npz(out, ((name, from_array(array)) for name, array in arrays.items()))
    out.seek(0)
    with np.load(out, allow_pickle=False) as loaded:
        assert loaded.files == list(arrays)
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(loaded[name], array)


def test_writing_is_reproducible() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    for out in (first, second):
        write_npz(out, [("a", from_array(np.arange(9.0).reshape(3, 3).T))])
    assert first.getvalue() == second.getvalue()


@pytest.mark.parametrize("name", EXTENSIONS)
def test_dtypes_that_numpy_cannot_name_come_back(name: str, tmp_path: Path) -> None:
    array = np.arange(1, 7).reshape(2, 3).astype(getattr(ml_dtypes, name))
    with (tmp_path / "x.npz").open("w+b") as out:
        write_npz(out, [("w", from_array(array)), ("b", from_array(np.arange(3.0)))])
    tensors = _opened(tmp_path / "x.npz")
    assert list(tensors) == ["w", "b"]
    assert tensors["w"].dtype == array.dtype
    assert tensors["w"].read().tobytes() == array.tobytes()
    with np.load(tmp_path / "x.npz") as loaded:
        assert loaded["w"].view(getattr(ml_dtypes, name)).tobytes() == array.tobytes()


def test_raw_bytes_without_their_dtype_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.ones(3, ml_dtypes.bfloat16))
    with pytest.raises(BadFile, match="raw bytes"):
        _opened(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (_npy(shape="(3,)"), "20 for|bytes"),
        (_npy(data=bytes(9)), "bytes"),
        (_npy(data=bytes(7)), "bytes"),
        (_npy(shape="(1 << 40,)"), "broken header"),
        (_npy(shape=f"({1 << 40},)"), "bytes"),
        (_npy(shape=f"(0, {1 << 62})", data=b""), "fits in memory"),
        (_npy(shape="(-2,)"), "negative"),
        (_npy(shape="(True, 2)"), "negative"),
        (_npy(shape="(2.0,)"), "negative"),
        (_npy(shape="[2]"), "sizes"),
        (_npy(shape="(" + "1," * 40 + ")"), "32 sizes"),
        (_npy(fortran="0"), "fortran_order"),
        (_npy(descr="'|O'"), "pickle"),
        (_npy(descr="[('a', '<f4')]"), "structured"),
        (_npy(descr="'<U2'"), "dtype"),
        (_npy(descr="'<f16'"), "dtype"),
        (_npy(descr="'<M8[s]'"), "dtype"),
        (_npy(descr="'<V4'"), "raw bytes"),
        (_npy(extra=", 'more': 1"), "keys"),
        (_npy(extra="}"), "broken header"),
        (_npy(descr="__import__('os').system('touch MARK')"), "broken header"),
        (_npy(extra=", 'x': " + "(" * 4000), "broken header"),
        (_npy(extra=", 'x': " + "-" * 9000 + "1"), "broken header|keys"),
        (b"\x93NUMPY\x02\x00" + (200 << 20).to_bytes(4, "little") + bytes(99), "header of"),
        (b"\x93NUMPY\x04\x00" + bytes(99), "1.0, 2.0 or 3.0"),
        (b"\x93NUMPY", "at least 8"),
        (b"\x80\x04]\x94.      ", "format"),
    ],
)
def test_refuses_hostile_members(member: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=says) as caught:
        _from_members(tmp_path / "x.npz", a=member)
    assert "\n" not in str(caught.value)
    assert not Path("MARK").exists()


def test_refuses_members_that_are_no_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as zipped:
        zipped.writestr("data.pkl", b"x")
    with pytest.raises(BadFile, match=r"\*\.npy"):
        _opened(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "names", [b"[1]", b'{"w":"float32"}', b'{"w":1}', b"{", b'{"no":"bfloat16"}', b'{"w":"bfloat16"}']
)
def test_refuses_a_broken_list_of_dtypes(names: bytes, tmp_path: Path) -> None:
    array = np.frombuffer(names, np.uint8)
    np.savez(tmp_path / "x.npz", **{"w": np.zeros(2, "V3"), DTYPES_MEMBER: array})
    with pytest.raises(BadFile):
        _opened(tmp_path / "x.npz")


def test_a_flipped_bit_is_found_on_reading(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(1000.0))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[2000] ^= 4
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(BadFile, match="CRC"):
        _opened(tmp_path / "x.npz")["a"].read()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_replacing_keeps_everything_else(save: object, tmp_path: Path) -> None:
    arrays = _arrays()
    save(tmp_path / "x.npz", **arrays)  # type: ignore[operator]
    source = ZipSource(SourceFile(tmp_path / "x.npz"))
    new = {n: from_array(np.asarray(a)[::-1].copy() if np.ndim(a) else a) for n, a in arrays.items() if n != "a/b.c"}
    with (tmp_path / "y.npz").open("w+b") as out:
        replace_arrays(source, out, new)
    assert (tmp_path / "y.npz").stat().st_size == (tmp_path / "x.npz").stat().st_size or save is np.savez_compressed
    with np.load(tmp_path / "y.npz") as changed, np.load(tmp_path / "x.npz") as was:
        assert changed.files == was.files
        for name, array in arrays.items():
            assert changed[name].dtype == was[name].dtype
            assert changed[name].flags.f_contiguous == was[name].flags.f_contiguous
            expected = array if name == "a/b.c" or not np.ndim(array) else np.asarray(array)[::-1]
            np.testing.assert_array_equal(changed[name], expected)
    with (tmp_path / "z.npz").open("w+b") as out:
        replace_arrays(ZipSource(SourceFile(tmp_path / "y.npz")), out, _opened(tmp_path / "x.npz"))
    assert (tmp_path / "z.npz").read_bytes() == (tmp_path / "x.npz").read_bytes()


def test_replacing_refuses_misfits(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(3.0))
    source = ZipSource(SourceFile(tmp_path / "x.npz"))
    wrong = {"a": from_array(np.arange(3)), "b": from_array(np.arange(3.0))}
    with pytest.raises(Refused) as caught:
        replace_arrays(source, io.BytesIO(), wrong)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "named",
    [
        [("a", np.arange(2)), ("a", np.arange(2))],
        [("", np.arange(2))],
        [("a", np.array(["x"]))],
        [("a", np.array([None]))],
        [(DTYPES_MEMBER, np.arange(2))],
        [(DTYPES_MEMBER, np.arange(2)), ("w", np.zeros(2, ml_dtypes.bfloat16))],
    ],
)
def test_writing_refuses(named: list[tuple[str, np.ndarray]]) -> None:
    with pytest.raises(NeutralError):
        write_npz(io.BytesIO(), ((name, from_array(array)) for name, array in named))
