"""Equinox's files: what Equinox writes, read, written again and replaced; broken ones."""

from __future__ import annotations

import io
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from neutral.containers import eqx as containers_eqx
from neutral.containers.eqx import EqxFile, replace_records, write_records
from neutral.errors import BadFile, Refused, Unsupported
from neutral.native import from_array

RANDOM = np.random.default_rng(0)
LEAVES = [
    jnp.asarray(RANDOM.normal(size=(3, 4)), jnp.float32),
    np.asfortranarray(RANDOM.normal(size=(2, 3))),
    jnp.ones(3, jnp.bfloat16),
    0.5,
    True,
    3,
    1j,
    np.float32(2),
    np.array([1, 2], ">i4"),
    jnp.zeros((0, 2)),
]


def _saved(path: Path, leaves: object = LEAVES) -> Path:
    eqx.tree_serialise_leaves(path, leaves)
    return path


def test_reads_what_equinox_writes(tmp_path: Path) -> None:
    opened = EqxFile(_saved(tmp_path / "x.eqx"))
    assert len(opened.records) == len(LEAVES)
    for i, leaf in enumerate(LEAVES):
        np.testing.assert_array_equal(opened.tensor(i).read(), np.asarray(leaf))
        assert opened.tensor(i).dtype == np.asarray(leaf).dtype.newbyteorder("=")
    opened.close()


def test_writes_the_same_bytes(tmp_path: Path) -> None:
    leaves = [leaf for leaf in LEAVES if getattr(leaf, "dtype", None) != np.dtype(">i4")]
    opened = EqxFile(_saved(tmp_path / "x.eqx", leaves))
    out = io.BytesIO()
    fortran = [i for i, record in enumerate(opened.records) if record.header.fortran_order]
    write_records(out, (opened.tensor(i) for i in range(len(leaves))), fortran)
    assert out.getvalue() == (tmp_path / "x.eqx").read_bytes()


def test_replacing_leaves_all_else(tmp_path: Path) -> None:
    opened = EqxFile(_saved(tmp_path / "x.eqx"))
    new = {i: from_array(RANDOM.permutation(opened.tensor(i).read().T).T) for i in (0, 1, 2, 8)}
    with (tmp_path / "y.eqx").open("w+b") as out:
        replace_records(opened, out, new)
    like = [np.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in LEAVES]
    found = eqx.tree_deserialise_leaves(tmp_path / "y.eqx", like)
    for i, leaf in enumerate(LEAVES):
        np.testing.assert_array_equal(found[i], new[i].read() if i in new else np.asarray(leaf))
    back = EqxFile(tmp_path / "y.eqx")
    with (tmp_path / "z.eqx").open("w+b") as out:
        replace_records(back, out, {i: opened.tensor(i) for i in range(len(LEAVES))})
    assert (tmp_path / "z.eqx").read_bytes() == (tmp_path / "x.eqx").read_bytes()
    with pytest.raises(Refused) as caught:
        replace_records(opened, io.BytesIO(), {0: from_array(np.ones(2)), 99: from_array(np.ones(2))})
    assert len(caught.value.problems) == 2


def test_one_byte_needs_to_be_told(tmp_path: Path) -> None:
    dtype = np.dtype(ml_dtypes.float8_e4m3fn)
    opened = EqxFile(_saved(tmp_path / "x.eqx", [jnp.ones(3, jnp.float8_e4m3fn)]))
    with pytest.raises(Unsupported, match="model"):
        opened.tensor(0)
    assert opened.tensor(0, dtype).read().astype("f4").tolist() == [1, 1, 1]


def _npy(descr: str = "'<f4'", shape: str = "(2,)", data: bytes = bytes(8)) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        _npy()[:-1],
        _npy() + b"x",
        _npy() + _npy()[:20],
        _npy(shape="(1 << 40,)"),
        _npy(shape=f"({1 << 40},)"),
        _npy(shape=f"({1 << 62}, 0)", data=b""),
        _npy(shape="(-2,)"),
        _npy("'|O'"),
        _npy("'<U2'"),
        _npy("[('a', '<f4')]"),
        _npy(shape="(" * 4000),
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY\x09\x00" + bytes(20),
    ],
    ids=lambda data: repr(data[10:60]),
)
def test_broken_files(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.eqx").write_bytes(data)
    with pytest.raises(BadFile) as caught:
        EqxFile(tmp_path / "x.eqx")
    assert "\n" not in str(caught.value)


def test_too_many_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers_eqx, "MOST_RECORDS", 3)
    (tmp_path / "x.eqx").write_bytes(_npy() * 3)
    assert len(EqxFile(tmp_path / "x.eqx").records) == 3
    (tmp_path / "x.eqx").write_bytes(_npy() * 4)
    with pytest.raises(BadFile, match="over 3"):
        EqxFile(tmp_path / "x.eqx")
