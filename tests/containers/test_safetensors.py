from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from neutral.containers.files import SourceFile
from neutral.containers.safetensors import (
    DTYPES,
    header_bytes,
    open_safetensors,
    read_header,
    replace_tensors,
    usual_order,
    write,
)
from neutral.errors import BadFile, Refused
from neutral.native import from_array


def _file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {f"t.{code}": (rng.standard_normal((3, 4, 5)) * 9).astype(dtype) for code, dtype in DTYPES.items()} | {
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 3), np.float32),
        'odd "name" \\ \n é 😀': np.arange(3),
        "transposed": rng.standard_normal((3, 4)).T,
    }


@pytest.mark.parametrize("arrange", [list, usual_order])
def test_round_trip_of_every_dtype(arrange: Callable[[Any], Any], tmp_path: Path) -> None:
    arrays = _arrays()
    named = arrange((name, from_array(array)) for name, array in arrays.items())
    with (tmp_path / "x").open("w+b") as out:
        write(out, named, {"neutral": '{"a": "\\"é"}'})
    opened = open_safetensors(tmp_path / "x")
    assert list(opened.tensors) == [name for name, _ in named]
    assert opened.metadata == {"neutral": '{"a": "\\"é"}'}
    for name, array in arrays.items():
        read = opened.tensors[name].read()
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
    opened.close()


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    arrays = {name: array for name, array in _arrays().items() if "F8" not in name}
    with (tmp_path / "x").open("w+b") as out:
        write(out, [(name, from_array(array)) for name, array in arrays.items()], {"format": "np"})
    plain = {name: array for name, array in arrays.items() if array.dtype != ml_dtypes.bfloat16}
    with safetensors.safe_open(tmp_path / "x", "np") as opened:
        assert set(opened.keys()) == set(arrays)
        assert opened.metadata() == {"format": "np"}
        for name, array in plain.items():
            np.testing.assert_array_equal(opened.get_tensor(name), array)
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert loaded["t.BF16"].to(torch.float32).numpy().tobytes() == arrays["t.BF16"].astype(np.float32).tobytes()


def test_the_library_accepts_every_dtype(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w+b") as out:
        write(out, [(name, from_array(array)) for name, array in _arrays().items()], {})
    with safetensors.safe_open(tmp_path / "x", "pt") as opened:
        assert set(opened.keys()) == set(_arrays())
        assert {opened.get_slice(f"t.{code}").get_dtype() for code in DTYPES} == set(DTYPES)


def test_usual_order_gives_the_bytes_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.arange(4, dtype=torch.float32),
        "n": torch.tensor(3),
        "h": torch.ones(3, dtype=torch.bfloat16),
        "e": torch.ones(2, dtype=torch.float8_e4m3fn),
        "c": torch.ones(2, dtype=torch.complex64),
        "d": torch.ones(2, dtype=torch.float64),
        "t": torch.tensor([True, False]),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x", {"format": "pt"})
    opened = open_safetensors(tmp_path / "x")
    out = io.BytesIO()
    write(out, usual_order(reversed(opened.tensors.items())), opened.metadata)  # type: ignore[call-overload]
    assert out.getvalue() == (tmp_path / "x").read_bytes()


def test_data_starts_at_a_multiple_of_eight() -> None:
    for name in ("a", "ab", "abc", "abcd"):
        assert len(header_bytes([(name, np.dtype("f4"), (2,))], {})) % 8 == 0


TWO = {"a": _entry(), "b": _entry(offsets=(8, 16))}
GOOD = json.dumps(_entry())


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (f'{{"a":{GOOD},"a":{json.dumps(_entry(offsets=(8, 16)))}}}', bytes(16), "twice"),
        (f'{{"a":{GOOD},"\\u0061":{json.dumps(_entry(offsets=(8, 16)))}}}', bytes(16), "twice"),
        ('{"__metadata__":{},"__metadata__":{}}', b"", "twice"),
        ('{"__metadata__":{"a":"1","a":"2"}}', b"", "twice"),
        ('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "wrong dtype"),
        ('{"a":{"dtype":"F32","shape":[2]}}', bytes(8), "alone"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":[1]}}', bytes(8), "dtype, shape or data_offsets"),
        ('{"a":{"dtype":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8), "wrong dtype"),
        ('{"a":{"dtype":"F32","shape":"F32","data_offsets":[0,8]}}', bytes(8), "wrong shape"),
        ({"__metadata__": {"a": 1}}, b"", "a string"),
        ({"__metadata__": {"a": {}}}, b"", "a string"),
        ({"__metadata__": []}, b"", "an object"),
        ('{"__metadata__":nul}', b"", "an object"),
        ({"a": _entry(), "b": _entry(offsets=(4, 12))}, bytes(12), "overlap"),
        ({"a": _entry(), "b": _entry()}, bytes(8), "overlap"),
        ({"a": _entry(), "b": _entry(offsets=(12, 20))}, bytes(20), "gap"),
        ({"a": _entry(offsets=(4, 12))}, bytes(12), "gap"),
        (TWO, bytes(15), "16|end"),
        (TWO, bytes(17), "end"),
        ({}, b"x", "end"),
        ({"a": _entry("F33")}, bytes(8), "unknown dtype"),
        ({"a": _entry("f32")}, bytes(8), "unknown dtype"),
        ({"a": _entry("F4", (16,))}, bytes(8), "packed below a byte"),
        ({"a": _entry("F6_E2M3", (8,), (0, 6))}, bytes(6), "packed below a byte"),
        ({"a": _entry(shape=(3,))}, bytes(8), "12 bytes apart"),
        ({"a": _entry(shape=(1 << 40,))}, bytes(8), "bytes apart"),
        ({"a": _entry(shape=(1 << 62, 0), offsets=(0, 0))}, b"", "fits in memory"),
        ({"a": _entry(shape=(1,) * 33, offsets=(0, 4))}, bytes(4), "33 axes"),
        ({"a": _entry(shape=[True, 2])}, bytes(8), "dtype, shape or data_offsets"),
        ({"a": _entry(shape=[-2])}, bytes(8), "dtype, shape or data_offsets"),
        ({"a": _entry(shape=[2.0])}, bytes(8), "dtype, shape or data_offsets"),
        ({"a": _entry(shape=["2"])}, bytes(8), "dtype, shape or data_offsets"),
        ({"a": _entry(shape=[[2]])}, bytes(8), "dtype, shape or data_offsets"),
        ('{"a":{"dtype":"F32","shape":[2,],"data_offsets":[0,8]}}', bytes(8), "whole numbers"),
        ('{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}', bytes(8), "whole numbers"),
        ('{"a":{"dtype":"F32","shape":[1 2],"data_offsets":[0,8]}}', bytes(8), "whole numbers"),
        ({"a": _entry(offsets=(8, 0))}, bytes(8), "bytes apart"),
        ({"a": _entry(offsets=(0,))}, bytes(8), "bytes apart"),
        ({"a": _entry(offsets=(0, 8, 8))}, bytes(8), "bytes apart"),
        ({"": _entry()}, bytes(8), "empty name"),
        ({"a\0": _entry()}, bytes(8), "NUL"),
        (f'{{"\\ud800":{GOOD}}}', bytes(8), "broken string"),
        (f'{{"\\x":{GOOD}}}', bytes(8), "broken string"),
        (f'{{"a\n":{GOOD}}}', bytes(8), "a string"),
        (b'{"\xff":1}', b"", "UTF-8"),
        ("[]", b"", "starts with"),
        (" {}", b"", "starts with"),
        ("", b"", "starts with"),
        ("{", b"", "a string"),
        ("{}x", b"", "behind the header"),
        ("{}\0", b"", "behind the header"),
        ('{"a":' * 100_000, b"", "dtype, shape or data_offsets"),
        ('{"a":' + "[" * 1_000_000, b"", "the fields of"),
        (f'{{"a":{GOOD},}}', bytes(8), "a string"),
        (f'{{"a":{GOOD} "b":1}}', bytes(8), "a comma"),
    ],
)
def test_refuses_malformed_headers(header: object, data: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=says) as caught:
        open_safetensors_file(_file(tmp_path / "x", header, data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 3000


def open_safetensors_file(path: Path) -> object:
    with SourceFile(path) as file:
        return read_header(file)


@pytest.mark.parametrize("length", [0, 3, 101_000_000, 1 << 63, (1 << 64) - 1])
def test_refuses_header_lengths(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(BadFile):
        open_safetensors_file(path)
    with path.open("r+b") as sparse:
        sparse.truncate(1 << 32)
    with pytest.raises(BadFile):
        open_safetensors_file(path)


def test_refuses_every_truncation(tmp_path: Path) -> None:
    data = _file(tmp_path / "x", TWO, bytes(16)).read_bytes()
    for length in range(len(data)):
        (tmp_path / "x").write_bytes(data[:length])
        with pytest.raises(BadFile):
            open_safetensors_file(tmp_path / "x")


def test_white_space_and_any_order_of_fields_are_legal(tmp_path: Path) -> None:
    text = '{ "a" :\n{ "shape" : [ 2 , 1 ] ,\t"data_offsets":[ 0, 8 ],"dtype" : "F32" } , "e":{"dtype":"U8","shape":[0],"data_offsets":[8,8]} }  \n'
    path = _file(tmp_path / "x", text, np.array([1, 2], "<f4").tobytes())
    opened = open_safetensors_file(path)
    assert [(e.name, e.shape, e.nbytes) for e in opened.entries] == [("a", (2, 1), 8), ("e", (0,), 0)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a":{"dtype":"F32","shape":[' + "1," * 10_000_000 + '1],"data_offsets":[0,4]}}', "dtype, shape or"),
        ('{"' + "\\u0061" * 5_000_000, "a string"),
        ('{"a"' + " " * 50_000_000 + "x", "a colon"),
        ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(300_000)) + "}}", "entries of metadata"),
    ],
    ids=["axes", "escapes", "spaces", "metadata"],
)
def test_long_headers_are_refused_soon_and_in_little_memory(text: str, says: str, tmp_path: Path) -> None:
    path = _file(tmp_path / "x", text)
    code = (
        "import resource, sys; from tests.containers.test_safetensors import open_safetensors_file as read\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read(sys.argv[1])\n"
        "except Exception as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    message, megabytes = run.stdout.splitlines()
    assert says in message
    assert int(megabytes) < 512
    assert time.perf_counter() - start < 10


def test_900_thousand_empty_tensors_are_refused_soon(tmp_path: Path) -> None:
    body = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(900_000))
    path = _file(tmp_path / "x", "{" + body + "}")
    start = time.perf_counter()
    with pytest.raises(BadFile, match="tensors"):
        open_safetensors_file(path)
    assert time.perf_counter() - start < 10


def test_names_are_only_names(tmp_path: Path) -> None:
    path = _file(tmp_path / "x", {"../../x\x1b[31m": _entry()}, bytes(8))
    assert list(open_safetensors(path).tensors) == ["../../x\x1b[31m"]
    with pytest.raises(BadFile) as caught:
        open_safetensors_file(_file(tmp_path / "x", {"../../x\x1b[31m": _entry("F9")}, bytes(8)))
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "named",
    [
        [("", np.zeros(1))],
        [("a\0", np.zeros(1))],
        [("\ud800", np.zeros(1))],
        [("__metadata__", np.zeros(1))],
        [("a", np.zeros(1)), ("a", np.zeros(1))],
        [("a", np.zeros(1, "c16"))],
        [("a", np.zeros(1, ml_dtypes.float4_e2m1fn))],
        [("a", np.array(["x"]))],
    ],
)
def test_writing_refuses(named: list[tuple[str, np.ndarray]]) -> None:
    out = io.BytesIO()
    with pytest.raises(Refused):
        write(out, [(name, from_array(array)) for name, array in named], {})
    assert not out.getvalue()


def test_replacing_changes_those_bytes_alone(tmp_path: Path) -> None:
    path = _file(tmp_path / "x", ' {"b":0}'[1:-6] + json.dumps(TWO)[1:], np.arange(4, dtype="<f4").tobytes())
    was = path.read_bytes()
    out = io.BytesIO()
    with SourceFile(path) as file:
        replace_tensors(file, out, {"b": from_array(np.array([8, 9], np.float32))})
        assert out.getvalue() == was[:-8] + np.array([8, 9], "<f4").tobytes()
        wrong = {"b": from_array(np.zeros(3, np.float32)), "a": from_array(np.zeros(2)), "c": from_array(np.zeros(2))}
        with pytest.raises(Refused) as caught:
            replace_tensors(file, io.BytesIO(), wrong)
    assert len(caught.value.problems) == 3


def _shards(folder: Path, weight_map: object = None, **shards: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for shard, names in shards.items():
        safetensors.numpy.save_file({n: np.full(2, ord(n), np.float32) for n in names}, folder / f"{shard}.safetensors")
    if weight_map is None:
        weight_map = {n: f"{shard}.safetensors" for shard, names in shards.items() for n in names}
    index = folder / "model.safetensors.index.json"
    text = (
        weight_map
        if isinstance(weight_map, str)
        else json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map})
    )
    index.write_text(text)
    return index


def test_shards_are_read_as_one_set(tmp_path: Path) -> None:
    index = _shards(tmp_path / "m", one=["c", "a"], two=["b"])
    for path in (index, tmp_path / "m"):
        opened = open_safetensors(path)
        assert opened.index == index
        assert {name: t.read().tolist() for name, t in opened.tensors.items()} == {n: [ord(n)] * 2 for n in "cab"}
        assert {shard.name: set(names) for shard, names in opened.shards.items()} == {
            "one.safetensors": {"a", "c"},
            "two.safetensors": {"b"},
        }


ONE = "one.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "shards", "says"),
    [
        ({"a": "../x.safetensors"}, {"one": ["a"]}, "plain name"),
        ({"a": "/etc/passwd"}, {"one": ["a"]}, "plain name"),
        ({"a": "..\\x"}, {"one": ["a"]}, "plain name"),
        ({"a": ".."}, {"one": ["a"]}, "plain name"),
        ({"a": ""}, {"one": ["a"]}, "plain name"),
        ({"a": ONE, "": ONE}, {"one": ["a"]}, "plain name"),
        ({"a": ONE, "b": "two.safetensors"}, {"one": ["a"]}, "not there"),
        ({"a": ONE, "b": "two.safetensors"}, {"one": ["a"], "two": ["a", "b"]}, "maps to one"),
        ({"a": ONE, "b": ONE}, {"one": ["a"]}, "no such tensor"),
        ({"a": ONE}, {"one": ["a", "b"]}, "does not list"),
        ({"a": 1}, {"one": ["a"]}, "weight_map"),
        ([], {"one": ["a"]}, "weight_map"),
        ("{}", {"one": ["a"]}, "weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', {}, "twice"),
        ('{"weight_map": {"a": ', {}, "JSON"),
        ('{"weight_map": ' + "[" * 9000, {}, "JSON"),
        ('{"weight_map": ' + "[" * 90000, {}, "thousands"),
    ],
)
def test_refuses_bad_indexes(weight_map: object, shards: dict[str, list[str]], says: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=says) as caught:
        open_safetensors(_shards(tmp_path, weight_map, **shards))
    assert "\n" not in str(caught.value)


def test_refuses_a_shard_that_is_a_link(tmp_path: Path) -> None:
    index = _shards(tmp_path, one=["a"])
    (tmp_path / ONE).rename(tmp_path / "real")
    (tmp_path / ONE).symlink_to("real")
    with pytest.raises(BadFile, match="a link"):
        open_safetensors(index)


def test_refuses_folders_without_one_answer(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no safetensors file"):
        open_safetensors(tmp_path)
    for name in "ab":
        _file(tmp_path / f"{name}.safetensors", {})
    with pytest.raises(BadFile, match="2 files"):
        open_safetensors(tmp_path)
