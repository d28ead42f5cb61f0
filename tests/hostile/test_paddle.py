"""Hostile files of paddle: pickles that call, bombs, forged arrays, tables that lie, the inference format."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hostile.commands import Commands, refused
from tests.hostile.sources import Row, every_command
from tests.hostile.test_torch import BOMBS, CALL, CODE

W = np.arange(6, dtype="f4").reshape(2, 3)
STATE = {"0.weight": W, "0.bias": W[0]}
GOOD = pickle.dumps({**STATE, "StructuredToParameterName@@": {}}, 4)
OLD = pickle.dumps({**STATE, "StructuredToParameterName@@": {}}, 2)
HEAD = b"\x80\x04}(X\x01\0\0\0xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
DTYPE = b"cnumpy\ndtype\nX\x02\0\0\0f4\x89\x88\x87R(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"

Make = Callable[[Path, Path], Path]


def written(data: bytes, name: str = "x.pdparams") -> Make:
    def make(good: Path, folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def saved(value: Any, protocol: int = 4) -> Make:
    return written(pickle.dumps(value, protocol))


def array(shape: bytes, elements: bytes) -> bytes:
    """A pickle of one array of float32 with this shape and these elements."""
    return HEAD + shape + DTYPE + elements + b"tbu."


class Dense:
    """What paddle makes of a DenseTensor inside other objects: a call of `eval`."""

    def __reduce__(self) -> Any:
        return eval, ("data", {"data": W})


FORGED = {
    "too few elements": array(b"K\x03\x85", b"C\x08" + bytes(8)),
    "4 TB": array(b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85", b"C\x08" + bytes(8)),
    "a product beyond 64 bits": array(b"(" + (b"\x8a\x06" + (1 << 40).to_bytes(6, "little")) * 3 + b"t", b"C\x00"),
    "negative": array(b"J\xff\xff\xff\xff\x85", b"C\x04" + bytes(4)),
    "elements beyond the file": array(b"K\x02\x85", b"\x8e" + struct.pack("<Q", 1 << 40) + bytes(8)),
    "elements of 2^63": array(b"K\x02\x85", b"\x8e" + struct.pack("<Q", 1 << 63) + bytes(8)),
    "elements that are no bytes": array(b"K\x02\x85", b"N"),
    "elements of another array": HEAD + b"K\x02\x85" + DTYPE + b"C\x08" + bytes(8) + b"tb" + b"(K\x01tbu.",
    "a shape of a million axes": array(b"(" + b"K\x01" * 10**6 + b"t", b"C\x04" + bytes(4)),
    "objects": pickle.dumps({"x": np.array([{"a": 1}, None])}, 4),
    "a structure": pickle.dumps({"x": np.zeros(2, "f4,i4")}, 4),
    "a text that is no bytes": OLD.replace(b"latin1", b"utf-16"),
}

ROWS = (
    *(Row(f"code: {name}", written(b"\x80\x02" + data), "" if b"FloatStorage" in data else "runs code") for name, data in CODE.items()),
    Row("code: eval of a DenseTensor", saved({"model": STATE, "x": Dense()}), "runs code"),
    Row("code: beside good data", written(GOOD[:-1] + CALL + b"0."), "runs code"),
    *(Row(f"bomb: {name}", written(b"\x80\x04" + data), slow=True) for name, data in BOMBS.items()),
    *(Row(f"forged: {name}", written(data)) for name, data in FORGED.items()),
    Row("bytes after the pickle", written(GOOD + CALL + b"."), "behind the pickle"),
    Row("truncated", written(GOOD[: len(GOOD) // 2])),
    Row("one byte less", written(GOOD[:-1])),
    Row("no array", saved({"a": 1}), "no array"),
    Row("an optimizer", saved({"LR_Scheduler": {}, **STATE}), "optimizer"),
    Row("two sets", saved({"a": STATE, "b": STATE}), "2 sets"),
    Row("a table of parts that are not there", saved({**STATE, "UnpackBigParamInfor@@": {"w": {"slices": ["v"]}}}, 2), "broken"),
    Row("parts of 2^61 elements", saved({"v": W[0], "UnpackBigParamInfor@@": {"w": {"slices": ["v"], "OriginShape": (1 << 61,)}}}, 2)),
    Row("a recurrent layer that contradicts itself", saved({"weight_ih_l0": W, "0.cell.weight_ih": W + 1}), "other elements"),
    Row("an empty name", saved({"": W}), "empty"),
    Row("a name that leads outside", saved({"../../x.weight": W, "../../x.bias": W[0]}), "leads out", as_template=False),
    Row("the inference format", written(bytes(100), "x.pdiparams"), "no names"),
    Row("a program", written(b"\x0a\x05hello", "x.pdmodel"), "no names"),
    Row("no pickle", written(b"hello"), ""),
    Row("nothing", written(b""), ""),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".pdparams")


def test_mappings_of_mappings_end(run: Commands, good: Path, tmp_path: Path) -> None:
    inner: dict[str, Any] = {f"k{i}": i for i in range(100)}
    for _ in range(5):
        inner = {f"k{i}": inner for i in range(100)}
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(inner, 4))
    refused(run, tmp_path, ["export", "x.pdparams"], "without an end")


def test_names_cannot_write_on_the_terminal(run: Commands, good: Path, tmp_path: Path) -> None:
    name = "\x1b[2J\nneutral: everything is fine\r" + "x" * 3000
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps({name: np.zeros(2, np.uint32), "fc.bias": W}, 4))
    assert len(refused(run, tmp_path, ["show", "x.pdparams"])) < 2000


def test_mutated_files_are_refused_or_read(tmp_path: Path) -> None:
    """Single bytes changed anywhere: nothing but neutral's own errors, and no file is made by it."""
    from neutral.errors import NeutralError
    from neutral.exporters.paddle import read

    rng = np.random.default_rng(0)
    path = tmp_path / "x.pdparams"
    for good in (GOOD, OLD):
        for place in rng.integers(0, len(good), 600):
            data = bytearray(good)
            data[place] = rng.integers(0, 256)
            path.write_bytes(data)
            try:
                model = read(path)
            except NeutralError:
                continue
            for tensor in model.tensors():
                assert tensor.data.nbytes <= 2 * len(good)
            model.close()
    assert [each.name for each in tmp_path.iterdir()] == ["x.pdparams"]
