"""Arrays in pickles against Python's own pickle, and against pickles made to harm."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neutral.containers.files import Memory, SourceFile
from neutral.containers.numpy_pickle import ArrayRef, array_tensor, copy_with, joined, load_arrays
from neutral.errors import BadFile, Refused
from neutral.native import from_array

RNG = np.random.default_rng(0)
ARRAYS = {
    "plain": RNG.random((3, 5)).astype("f4"),
    "fortran": np.asfortranarray(RNG.random((4, 6, 2))),
    "big": RNG.integers(-9, 9, (2, 7)).astype(">i4"),
    "scalar": np.array(3.5, "f8"),
    "empty": np.zeros((0, 4), "f2"),
    "flags": np.array([True, False]),
    "long": RNG.integers(0, 256, (70_001, 3), np.uint8),
    "complex": np.array([1 + 2j], "c8"),
}


def opened(data: bytes) -> tuple[Memory, Any]:
    storage = Memory(data)
    return storage, load_arrays(storage, "x")[0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_gives_what_python_reads(protocol: int) -> None:
    storage, root = opened(pickle.dumps(ARRAYS, protocol))
    assert set(root) == set(ARRAYS)
    for name, expected in ARRAYS.items():
        found = array_tensor(storage, root[name]).read()
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype.newbyteorder("=")), name
        np.testing.assert_array_equal(found, expected)


@given(st.binary(min_size=1, max_size=200_000), st.integers(2, 4), st.data())
@settings(max_examples=30, deadline=None)
def test_any_part_of_any_bytes(value: bytes, protocol: int, data: st.DataObject) -> None:
    """Protocol 2 stores them as UTF-8, in which half of them take two bytes."""
    storage, root = opened(pickle.dumps({"x": np.frombuffer(value, np.uint8)}, protocol))
    start = data.draw(st.integers(0, len(value) - 1))
    stop = data.draw(st.integers(start, len(value)))
    block = array_tensor(storage, root["x"]).block([(start, stop)])
    assert block.tobytes() == value[start:stop]


def test_a_string_of_python_2() -> None:
    elements = np.arange(3, dtype="f4").tobytes()
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    head = b"\x80\x02}U\x01xcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x03t"
    storage, root = opened(head + dtype + b"\x89T" + struct.pack("<I", len(elements)) + elements + b"tbs.")
    np.testing.assert_array_equal(array_tensor(storage, root["x"]).read(), np.arange(3, dtype="f4"))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_copy_has_other_elements_and_nothing_else_changes(protocol: int) -> None:
    original = {**ARRAYS, "step": 3, "name": "net"}
    storage, root = opened(pickle.dumps(original, protocol))
    new = {name: RNG.integers(0, 200, a.shape).astype(a.dtype.newbyteorder("=")) for name, a in ARRAYS.items()}
    out = io.BytesIO()
    copy_with(storage, out, [(name, root[name], from_array(array)) for name, array in new.items()])
    loaded = pickle.loads(out.getvalue())
    assert list(loaded) == list(original) and (loaded["step"], loaded["name"]) == (3, "net")
    for name, array in new.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
        assert loaded[name].flags.f_contiguous == ARRAYS[name].flags.f_contiguous
    same = io.BytesIO()
    copy_with(storage, same, [(name, root[name], array_tensor(storage, root[name])) for name in ARRAYS])
    assert same.getvalue() == storage.data


@pytest.mark.parametrize("protocol", [2, 4])
def test_parts_put_together(protocol: int) -> None:
    whole = RNG.random((5, 8)).astype("f4")
    flat = whole.reshape(-1)
    storage, root = opened(pickle.dumps({"a": flat[:13], "b": flat[13:14], "c": flat[14:]}, protocol))
    ref = joined([root[name] for name in "abc"], (5, 8))
    assert not ref.fault
    np.testing.assert_array_equal(array_tensor(storage, ref).read(), whole)
    np.testing.assert_array_equal(array_tensor(storage, ref).block([(1, 3), (2, 7)]), whole[1:3, 2:7])
    out = io.BytesIO()
    copy_with(storage, out, [("w", ref, from_array(whole + 1))])
    again = pickle.loads(out.getvalue())
    np.testing.assert_array_equal(np.concatenate([again[name] for name in "abc"]), flat + 1)
    assert joined([root["a"], root["b"]], (5, 8)).fault
    with pytest.raises(Refused, match="out of order"):
        copy_with(storage, io.BytesIO(), [("w", joined([root[name] for name in "bac"], (5, 8)), from_array(whole))])


def test_long_arrays_stay_in_the_file(tmp_path: Path) -> None:
    array = np.zeros(16 << 20, np.uint8)
    for protocol in (2, 4):
        (tmp_path / "x").write_bytes(pickle.dumps({"w": array, "v": array}, protocol))
        with SourceFile(tmp_path / "x") as file:
            tracemalloc.start()
            storage = file.section(0, file.size)
            root, _ = load_arrays(storage, "x")
            for tile in array_tensor(storage, root["w"]).tiles():
                assert not tile.any()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 12 << 20


def faulty(shape: bytes, elements: bytes, code: bytes = b"f4") -> ArrayRef:
    head = b"\x80\x04}X\x01\0\0\0xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
    dtype = b"cnumpy\ndtype\nX" + struct.pack("<I", len(code)) + code + b"\x89\x88\x87R"
    found: ArrayRef = opened(head + shape + dtype + b"\x89" + elements + b"tbs.")[1]["x"]
    return found


FAULTS = {
    "too few bytes": (b"K\x03\x85", b"C\x08" + bytes(8), b"f4"),
    "too many bytes": (b"K\x01\x85", b"C\x08" + bytes(8), b"f4"),
    "a shape of 4 TB": (b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85", b"C\x08" + bytes(8), b"f4"),
    "a negative shape": (b"J\xff\xff\xff\xff\x85", b"C\x04" + bytes(4), b"f4"),
    "a shape of floats": (b"G?\xf0\0\0\0\0\0\0\x85", b"C\x04" + bytes(4), b"f4"),
    "a shape of 40 axes": (b"(" + b"K\x01" * 40 + b"t", b"C\x04" + bytes(4), b"f4"),
    "objects": (b"K\x01\x85", b"C\x08" + bytes(8), b"O8"),
    "a list of elements": (b"K\x01\x85", b"]", b"f4"),
    "a text too short": (b"K\x03\x85", b"X\x04\0\0\0abcd", b"f4"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_array_that_is_none_says_why(name: str) -> None:
    assert faulty(*FAULTS[name]).fault


def test_a_text_that_holds_no_bytes_is_refused_when_it_is_read() -> None:
    for text in ("a\u20acbcd", "abcde"):
        raw = text.encode()
        storage = Memory(
            b"\x80\x02}X\x01\0\0\0xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x04\x85"
            b"cnumpy\ndtype\nU\x02u1\x89\x88\x87R\x89c_codecs\nencode\nX"
            + struct.pack("<I", len(raw))
            + raw
            + b"X\x06\0\0\0latin1\x86Rtbs."
        )
        root, _ = load_arrays(storage, "x")
        assert not root["x"].fault
        with pytest.raises(BadFile):
            array_tensor(storage, root["x"]).read()


def test_a_pickle_with_something_behind_it_or_set_twice() -> None:
    good = pickle.dumps({"x": np.zeros(3)}, 4)
    for bad in (good + b"x", good[:-20], b"\x80\x04"):
        with pytest.raises(BadFile):
            opened(bad)


def test_code_is_never_run() -> None:
    for data in (b"\x80\x02cposix\nsystem\nU\x04exit\x85R.", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R."):
        with pytest.raises(BadFile, match="runs code"):
            opened(data)
