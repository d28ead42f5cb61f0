"""Hostile safetensors files, indexes of shards, and .npz files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.containers.test_npz import _npy as npy
from tests.hostile.commands import Commands, refused
from tests.hostile.making import copied, entry, npz_bytes, safetensors_bytes
from tests.hostile.sources import Row, every_command

TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def safetensors(header: object, data: bytes = bytes(8), length: int | None = None) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        (folder / "x.safetensors").write_bytes(safetensors_bytes(header, data, length))  # type: ignore[arg-type]
        return folder / "x.safetensors"

    return make


def named(name: str) -> Callable[[Path, Path], Path]:
    return safetensors({name: entry()})


SAFETENSORS = (
    Row("header of 2^63", safetensors(TWO, length=1 << 63), "header"),
    Row("header of 2^64 - 1", safetensors(TWO, length=(1 << 64) - 1), "header"),
    Row("header longer than the file", safetensors(TWO, length=1 << 20), "header"),
    Row("header shorter than it is", safetensors(TWO, length=20)),
    Row("duplicate keys", safetensors(json.dumps(TWO).replace('"b"', '"a"'), bytes(16)), "twice"),
    Row("duplicate keys, one escaped", safetensors(json.dumps(TWO).replace('"b"', '"\\u0061"'), bytes(16)), "twice"),
    Row("overlap", safetensors({"a": entry(), "b": entry()}), "overlap"),
    Row("gap", safetensors({"a": entry(offsets=(4, 12))}, bytes(12)), "gap"),
    Row("trailing bytes", safetensors(TWO, bytes(17)), "end"),
    Row("truncated", safetensors(TWO, bytes(15))),
    Row("unknown dtype", safetensors({"a": entry("F33")}), "unknown dtype"),
    Row("shape of 2^40", safetensors({"a": entry(shape=(1 << 40,))}), "apart"),
    Row("shape of 2^62 and 0", safetensors({"a": entry(shape=(1 << 62, 0), offsets=(0, 0))}, b""), "memory"),
    Row("negative shape", safetensors({"a": entry(shape=[-2])})),
    Row("float shape", safetensors({"a": entry(shape=[2.0])})),
    Row("true as a size", safetensors({"a": entry(shape=[True, 2])})),
    Row("33 axes", safetensors({"a": entry(shape=(1,) * 33, offsets=(0, 4))}, bytes(4)), "axes"),
    Row("offsets backwards", safetensors({"a": entry(offsets=(8, 0))}), "apart"),
    Row("offsets of 2^70", safetensors({"a": entry(offsets=(0, 1 << 70))})),
    Row("metadata of numbers", safetensors({"__metadata__": {"a": 1}, **TWO}, bytes(16)), "string"),
    Row("broken UTF-8", safetensors(b'{"\xff":1}'), "UTF-8"),
    Row("half a surrogate", safetensors(json.dumps({"a": entry()}).replace('"a"', '"\\ud800"')), "string"),
    Row("deep", safetensors('{"a":' + "[" * 1_000_000)),
    Row("no tensor", safetensors({}, b""), "no tensor"),
    Row("no name", named(""), "empty name"),
    Row("name with NUL", named("a\0b"), "NUL"),
    Row("name that leaves the folder", named("../../x.weight"), "../../x"),
    Row("name of an absolute path", named("/tmp/x.weight"), "/tmp/x"),
    Row("name that leaves the folder of Windows", named("..\\x.weight"), "x"),
    Row("900,000 empty tensors", safetensors(
        "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(900_000)) + "}", b""
    ), "tensors", slow=True),
)  # fmt: skip


@pytest.mark.parametrize("row", SAFETENSORS, ids=str)
def test_refused_safetensors(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".safetensors")


def test_a_name_cannot_write_on_the_terminal(run: Commands, good: Path, tmp_path: Path) -> None:
    name = "\x1b[31m\nneutral: done\r\u202e.weight"
    named(name)(good, tmp_path)
    outcome = run(tmp_path, "show", "x.safetensors")
    assert outcome.status == 0 and "\x1b" not in outcome.out and "\u202e" not in outcome.out
    reason = refused(run, tmp_path, ["convert", "x.safetensors", "out.keras"])
    assert "\\x1b[31m\\nneutral: done" in reason


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path, Path], Path]:
    """The good shards with another weight_map."""

    def make(good: Path, folder: Path) -> Path:
        copied(good / "shards", folder / "x")
        whole = json.loads((folder / "x" / INDEX).read_text())
        change(whole["weight_map"])
        (folder / "x" / INDEX).write_text(json.dumps(whole))
        return folder / "x" / INDEX

    return make


def index_text(text: str) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        copied(good / "shards", folder / "x")
        (folder / "x" / INDEX).write_text(text)
        return folder / "x" / INDEX

    return make


def linked_shard(good: Path, folder: Path) -> Path:
    copied(good / "shards", folder / "x")
    (folder / "x" / FIRST).rename(folder / "real")
    (folder / "x" / FIRST).symlink_to("../real")
    return folder / "x"


def missing_shard(good: Path, folder: Path) -> Path:
    copied(good / "shards", folder / "x")
    (folder / "x" / SECOND).unlink()
    return folder / "x"


def broken_shard(good: Path, folder: Path) -> Path:
    copied(good / "shards", folder / "x")
    with (folder / "x" / SECOND).open("r+b") as file:
        file.truncate(90)
    return folder / "x"


def shard_with_more(good: Path, folder: Path) -> Path:
    copied(good / "shards", folder / "x")
    (folder / "x" / SECOND).write_bytes((good / "model.safetensors").read_bytes())
    return folder / "x"


SHARDS = (
    Row("shard outside", index(lambda m: m.update({"0.bias": "../x.safetensors"})), "plain name"),
    Row("absolute shard", index(lambda m: m.update({"0.bias": "/etc/passwd"})), "plain name"),
    Row("shard without a name", index(lambda m: m.update({"0.bias": ""})), "plain name"),
    Row("missing shard of one tensor", index(lambda m: m.update({"0.bias": "no.safetensors"})), "no.safetensors"),
    Row("tensor mapped to another shard", index(lambda m: m.update({"0.bias": SECOND}))),
    Row("tensor that no shard has", index(lambda m: m.update({"9.bias": FIRST})), "9.bias"),
    Row("tensor that the index has not", index(lambda m: m.pop("0.bias")), "0.bias"),
    Row("tensor in two shards", shard_with_more),
    Row("linked shard", linked_shard, "a link"),
    Row("missing shard", missing_shard, SECOND),
    Row("broken shard", broken_shard, SECOND),
    Row("number as a shard", index(lambda m: m.update({"0.bias": 1}))),  # type: ignore[dict-item]
    Row("index of nothing", index_text('{"weight_map": {}}')),
    Row("index with a key twice", index_text(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'), "twice"),
    Row("index cut", index_text('{"weight_map": {"a": ')),
    Row("deep index", index_text('{"weight_map": ' + "[" * 90_000)),
)  # fmt: skip


@pytest.mark.parametrize("row", SHARDS, ids=str)
def test_refused_shards(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, "")


def npz(*members: tuple[str, bytes]) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        (folder / "x.npz").write_bytes(npz_bytes(*members))
        return folder / "x.npz"

    return make


def pickled_npz(good: Path, folder: Path) -> Path:
    class Runs:
        def __reduce__(self) -> object:
            return open, ("MARK", "w")

    np.savez(folder / "x.npz", a=np.array([Runs()], dtype=object))
    return folder / "x.npz"


def npz_changed(change: Callable[[bytearray], object]) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        data = bytearray((good / "model.npz").read_bytes())
        change(data)
        (folder / "x.npz").write_bytes(data)
        return folder / "x.npz"

    return make


def flip_a_weight(data: bytearray) -> None:
    data[data.index(b"\n", data.index(b"descr")) + 5] ^= 1


NPZ = (
    Row("object array", npz(("a.npy", npy("'|O'"))), "pickle"),
    Row("pickled objects", pickled_npz, "pickle"),
    Row("pickle member", npz(("a.npy", b"\x80\x04]\x94.      "))),
    Row("header that calls", npz(("a.npy", npy("__import__('os').system('touch MARK')"))), "header"),
    Row("shape of 2^40", npz(("a.npy", npy(shape=f"({1 << 40},)"))), "bytes"),
    Row("negative shape", npz(("a.npy", npy(shape="(-2,)")))),
    Row("header of 200 MB", npz(("a.npy", b"\x93NUMPY\x02\x00" + (200 << 20).to_bytes(4, "little") + bytes(99))), "header"),
    Row("deep header", npz(("a.npy", npy(extra=", 'x': " + "(" * 4000)))),
    Row("structured", npz(("a.npy", npy("[('a', '<f4')]"))), "structured"),
    Row("strings", npz(("a.npy", npy("'<U2'"))), "dtype"),
    Row("trailing bytes in a member", npz(("a.npy", npy(data=bytes(9)))), "bytes"),
    Row("short member", npz(("a.npy", npy(data=bytes(7)))), "bytes"),
    Row("duplicate member", lambda good, folder: npz_twice(good, folder), "two members"),
    Row("other member", npz(("a.npy", npy()), ("data.txt", b"x"))),
    Row("name that leaves the folder", npz(("../a/kernel.npy", npy())), "../a", as_template=False),
    Row("trailing bytes", npz_changed(lambda data: data.extend(b"x"))),
    Row("truncated", npz_changed(lambda data: data.__delitem__(slice(len(data) - 30, None)))),
    Row("flipped weight", npz_changed(flip_a_weight), "CRC", as_template=False),
    Row("no array", npz(), ""),
)  # fmt: skip


def npz_twice(good: Path, folder: Path) -> Path:
    data = npz_bytes(("a.npy", npy()), ("b.npy", npy()))
    (folder / "x.npz").write_bytes(data.replace(b"b.npy", b"a.npy"))
    return folder / "x.npz"


@pytest.mark.parametrize("row", NPZ, ids=str)
def test_refused_npz(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".npz")


def test_big_endian_arrays_are_legal(run: Commands, tmp_path: Path) -> None:
    np.savez(tmp_path / "big.npz", a=np.arange(6.0).reshape(2, 3).astype(">f8"))
    np.savez(tmp_path / "little.npz", a=np.arange(6.0).reshape(2, 3))
    big, little = run(tmp_path, "digest", "big.npz"), run(tmp_path, "digest", "little.npz")
    assert big.status == 0 and big.out == little.out
