"""Flax's msgpack files: what Flax itself writes, read, written again and replaced, and what is broken or forged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import flax.serialization
import flax.training.train_state
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import optax
import pytest

import neutral.containers.msgpack as ours
from neutral.containers import tree as trees
from neutral.containers.pytree import read_msgpack, replace_msgpack, write_msgpack
from neutral.errors import BadFile, NeutralError, Refused, Unsupported
from neutral.native import Stored, from_array

RANDOM = np.random.default_rng(0)

PLAIN: dict[str, Any] = {
    "batch_stats": {"bn": {"mean": RANDOM.normal(size=5), "var": RANDOM.normal(size=5).astype("f4")}},
    "params": {
        "bf16": RANDOM.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "complex": RANDOM.normal(size=(3, 1)) * 1j,
        "e4m3": RANDOM.normal(size=(2, 3)).astype(ml_dtypes.float8_e4m3fn),
        "empty": np.zeros((0, 3), np.int8),
        "flags": np.array([True, False]),
        "half": RANDOM.normal(size=70000).astype("f2"),
        "int4": np.array([1, -2, 3], ml_dtypes.int4),
        "scalar": np.float32(2.5),
        "zero_d": np.array(7, np.int64),
    },
    "rest": {
        "a": None, "b": True, "c": 1.5, "d": -(2**40), "e": "text", "f": b"bytes", "g": 1 - 2j, "h": {}, "i": 2**63, "j": -7, "k": 300
    },
}  # fmt: skip


def _saved(path: Path, value: object) -> Path:
    path.write_bytes(flax.serialization.msgpack_serialize(value))
    return path


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: leaf for key, child in items for p, leaf in _flat(child, (*path, str(key))).items()}
    return {path: value}


def _same(found: object, meant: object) -> bool:
    if isinstance(meant, np.ndarray | np.generic):
        array = np.asarray(found)
        return (array.dtype, array.shape, array.tobytes()) == (meant.dtype, meant.shape, meant.tobytes())
    return type(found) is type(meant) and found == meant


def test_reads_what_flax_writes_and_writes_the_same_bytes(tmp_path: Path) -> None:
    path = _saved(tmp_path / "x", PLAIN)
    tree = read_msgpack(path)
    found = {p: t.read() for p, t in tree.leaves.items()} | dict(tree.others)
    meant = _flat(PLAIN)
    assert found.keys() == meant.keys()
    assert all(_same(found[p], meant[p]) for p in meant)
    assert all(isinstance(t, Stored) for t in tree.leaves.values())
    write_msgpack(tree.leaves, tree.others, tmp_path / "y", tree.metadata)
    assert (tmp_path / "y").read_bytes() == path.read_bytes()
    tree.close()


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        {"w": [np.ones(2), {"a": np.zeros(1)}, [], 3]},
        {"layers": {0: {"w": np.ones(2)}, 1: {"w": np.zeros(3)}, -1: np.ones(1)}},
        {"a": 1, "b": np.ones(1), "c": 2, "d": np.ones(1)},
        {"w": {f"k{i}": np.float64(i) for i in range(70000 // 100)}},
        {"x" * 40: np.ones(1), "é" * 200: np.ones(1), "z" * 70000: np.ones((1, 1, 1))},
        [],
        None,
    ],
    ids=["array", "lists", "integer keys", "mixed order", "many", "long keys", "empty", "none"],
)
def test_other_trees_come_back_byte_for_byte(value: object, tmp_path: Path) -> None:
    path = _saved(tmp_path / "x", value)
    tree = read_msgpack(path)
    write_msgpack(tree.leaves, tree.others, tmp_path / "y", tree.metadata)
    assert (tmp_path / "y").read_bytes() == path.read_bytes()


def test_a_train_state(tmp_path: Path) -> None:
    params = {"z": {"kernel": jnp.ones((2, 3))}, "a": {"kernel": jnp.ones(4)}}
    state = flax.training.train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    path = tmp_path / "x"
    path.write_bytes(flax.serialization.to_bytes(state))
    tree = read_msgpack(path)
    assert tree.others == {("step",): 0, ("opt_state", "1"): {}}
    assert ("opt_state", "0", "mu", "a", "kernel") in tree.leaves
    write_msgpack(tree.leaves, tree.others, tmp_path / "y", tree.metadata)
    assert (tmp_path / "y").read_bytes() == path.read_bytes()


def test_a_written_tree_is_read_by_flax(tmp_path: Path) -> None:
    kernel = RANDOM.normal(size=(3, 4)).astype("f4")
    leaves = {("params", "fc", "kernel"): from_array(kernel.T), ("params", "n"): from_array(np.array(3))}
    write_msgpack(leaves, {("step",): 3}, tmp_path / "x")
    found = flax.serialization.msgpack_restore((tmp_path / "x").read_bytes())
    assert found["step"] == 3 and found["params"]["n"] == 3
    np.testing.assert_array_equal(found["params"]["fc"]["kernel"], kernel.T)


def test_chunked_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    monkeypatch.setattr(ours, "LARGEST_CHUNK", 100)
    value = {"deep": {"a": RANDOM.normal(size=(7, 9)).astype("f4"), "b": np.ones(2)}, "z": RANDOM.normal(size=(5, 5))}
    path = _saved(tmp_path / "x", value)
    tree = read_msgpack(path)
    np.testing.assert_array_equal(tree.leaves["deep", "a"].read(), value["deep"]["a"])
    np.testing.assert_array_equal(tree.leaves["z",].block([(1, 3), (2, 4)]), value["z"][1:3, 2:4])
    write_msgpack(tree.leaves, tree.others, tmp_path / "y", tree.metadata)
    assert (tmp_path / "y").read_bytes() == path.read_bytes()
    new = RANDOM.normal(size=(9, 7)).astype("f4")
    replace_msgpack(path, {("deep", "a"): from_array(new).permute((1, 0))}, tmp_path / "z")
    back = flax.serialization.msgpack_restore((tmp_path / "z").read_bytes())
    np.testing.assert_array_equal(back["deep"]["a"], new.T)
    np.testing.assert_array_equal(back["z"], value["z"])
    assert len((tmp_path / "z").read_bytes()) == len(path.read_bytes())


def test_an_array_of_over_a_gigabyte_in_a_list_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    monkeypatch.setattr(ours, "LARGEST_CHUNK", 100)
    path = _saved(tmp_path / "x", {"w": [np.ones(50), {"a": np.ones(50)}]})
    tree = read_msgpack(path)
    write_msgpack(tree.leaves, tree.others, tmp_path / "y", tree.metadata)
    assert (tmp_path / "y").read_bytes() == path.read_bytes()


def test_replacing_leaves_all_else(tmp_path: Path) -> None:
    path = _saved(tmp_path / "x", PLAIN)
    new = {p: from_array(np.asarray(v)[::-1].copy()) for p, v in _flat(PLAIN).items() if np.ndim(v)}
    replace_msgpack(path, new, tmp_path / "y")
    found = _flat(flax.serialization.msgpack_restore((tmp_path / "y").read_bytes()))
    for where, meant in _flat(PLAIN).items():
        assert _same(found[where], new[where].read() if where in new else meant), where
    replace_msgpack(tmp_path / "y", read_msgpack(path).leaves, tmp_path / "z")
    assert (tmp_path / "z").read_bytes() == path.read_bytes()


def test_replacing_refuses_misfits(tmp_path: Path) -> None:
    path = _saved(tmp_path / "x", {"a": np.ones(2)})
    with pytest.raises(Refused) as caught:
        replace_msgpack(path, {("a",): from_array(np.ones(3)), ("b",): from_array(np.ones(2))}, tmp_path / "y")
    assert len(caught.value.problems) == 2
    with pytest.raises(Refused, match="input itself"):
        replace_msgpack(path, {}, path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_writing_refuses(tmp_path: Path) -> None:
    one = from_array(np.ones(1))
    for leaves, others in (
        ({("a",): one, ("a", "b"): one}, {}),
        ({("a", "b"): one, ("a",): one}, {}),
        ({("a",): one}, {("a",): 1}),
        ({("a",): from_array(np.array(["x"]))}, {}),
        ({("a",): one}, {("b",): 1 << 64}),
        ({("a",): one}, {("b",): object()}),
        ({(ours.CHUNKED,): one}, {}),
    ):
        with pytest.raises(NeutralError):
            write_msgpack(leaves, others, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def _array(
    shape: object = (2,), dtype: object = "float32", data: object = b"12345678", kind: int = 1
) -> msgpack.ExtType:
    return msgpack.ExtType(kind, msgpack.packb((shape, dtype, data)))


BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "shape beyond the bytes": msgpack.packb({"a": _array((3,))}),
    "shape of 2^40": msgpack.packb({"a": _array((1 << 40,))}),
    "shape of 2^40 with none": msgpack.packb({"a": _array((0, 1 << 60), data=b"")}),
    "negative": msgpack.packb({"a": _array((-2,))}),
    "float": msgpack.packb({"a": _array((2.0,))}),
    "true": msgpack.packb({"a": _array((True, 2))}),
    "shape is a map": msgpack.packb({"a": _array({1: 2})}),
    "forty axes": msgpack.packb({"a": _array((1,) * 40 + (2,))}),
    "object": msgpack.packb({"a": _array(dtype="object")}),
    "structured": msgpack.packb({"a": _array(dtype="[('a', 'f4')]")}),
    "dtype is no text": msgpack.packb({"a": _array(dtype=3)}),
    "elements are no bytes": msgpack.packb({"a": _array(data=[1, 2])}),
    "bytes behind an array": msgpack.packb({"a": msgpack.ExtType(1, _array().data + b"\0")}),
    "empty extension": msgpack.packb({"a": msgpack.ExtType(1, b"")}),
    "a scalar of two": msgpack.packb({"a": _array(kind=3)}),
    "a scalar with an axis": msgpack.packb({"a": _array((1,), data=b"1234", kind=3)}),
    "complex of one": msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb([1.0]))}),
    "complex of text": msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb(["1", "2"]))}),
    "another extension": msgpack.packb({"a": msgpack.ExtType(9, b"x")}),
    "deep maps": b"\x81\xa1a" * 2_000_000 + b"\xc0",
    "deep lists": b"\x91" * 2_000_000 + b"\xc0",
    "deep and wide": b"\x91" * 200 + b"\xdd\x00\x06\x00\x00" + b"\xc0" * 0x60000,
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "a key as text and number": b"\x82\xa11\x01\x01\x02",
    "a key that is a list": b"\x81\x91\x01\x01",
    "a key that is none": b"\x81\xc0\x01",
    "a key that is no UTF-8": b"\x81\xa1\xff\x01",
    "two values": msgpack.packb({"a": _array()}) + b"\xc0",
    "a long map": b"\xdf\xff\xff\xff\xff",
    "a long list": b"\xdd\xff\xff\xff\xff\xc0",
    "long text": b"\xdb\xff\xff\xff\xffa",
    "long bytes": b"\xc6\xff\xff\xff\xffa",
    "a long extension": b"\xc9\xff\xff\xff\xff\x01a",
    "no such byte": b"\xc1",
    "chunks missing": msgpack.packb({ours.CHUNKED: True, "shape": {"0": 2}}),
    "chunks of another size": msgpack.packb({ours.CHUNKED: True, "shape": {"0": 3}, "chunks": {"0": _array()}}),
    "no chunk": msgpack.packb({ours.CHUNKED: True, "shape": {"0": 0}, "chunks": {}}),
    "chunks that are no arrays": msgpack.packb({ours.CHUNKED: True, "shape": {"0": 1}, "chunks": {"0": 1}}),
    "chunks of two dtypes": msgpack.packb(
        {ours.CHUNKED: True, "shape": {"0": 4}, "chunks": {"0": _array(), "1": _array(dtype="int32")}}
    ),
    "chunked shape of 2^40": msgpack.packb({ours.CHUNKED: True, "shape": {"0": 1 << 40}, "chunks": {"0": _array()}}),
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises((BadFile, Unsupported)) as caught:
        read_msgpack(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    good = flax.serialization.msgpack_serialize({"a": {"w": np.ones((2, 2)), "step": 70000}, "b": "text"})
    for length in range(len(good)):
        (tmp_path / "x").write_bytes(good[:length])
        with pytest.raises(BadFile):
            read_msgpack(tmp_path / "x")


def test_mutations_never_crash(tmp_path: Path) -> None:
    good = flax.serialization.msgpack_serialize({"a": {"w": np.ones((2, 2)), "step": 70000}, "b": ["text", 1j]})
    for _ in range(500):
        raw = bytearray(good)
        for _ in range(RANDOM.integers(1, 4)):
            raw[RANDOM.integers(len(raw))] = RANDOM.integers(256)
        (tmp_path / "x").write_bytes(bytes(raw))
        try:
            tree = read_msgpack(tmp_path / "x")
            for leaf in tree.leaves.values():
                leaf.read()
            tree.close()
        except NeutralError:
            pass


def test_floats_of_single_precision_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xca" + struct.pack(">f", 1.5))
    assert read_msgpack(tmp_path / "x").others == {(): 1.5}


def test_dtypes_are_those_of_numpy() -> None:
    assert all(dtype.name == name for name, dtype in trees.DTYPES.items())
