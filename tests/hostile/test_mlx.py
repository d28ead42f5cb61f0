"""Hostile files of MLX: those of safetensors and npz are refused elsewhere; here, what only MLX's reader sees."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.commands import Commands, refused
from tests.hostile.making import npz_bytes, safetensors_bytes
from tests.hostile.sources import Row, every_command

Make = Callable[[Path, Path], Path]
NULL = '{"__metadata__":null,'


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> str:
    return json.dumps({"data_offsets": offsets, "dtype": dtype, "shape": shape})


def header(text: str, data: bytes = bytes(8)) -> Make:
    return written(safetensors_bytes(text, data), "x.safetensors")


def written(content: bytes, name: str) -> Make:
    def make(good: Path, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def npy(descr: str = "<f4", shape: str = "(2, )", data: bytes = bytes(8)) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def zipped(*members: tuple[str, bytes]) -> Make:
    return written(npz_bytes(*members), "x.npz")


def shards(files: dict[str, bytes], weight_map: dict[str, Any]) -> Make:
    def make(good: Path, folder: Path) -> Path:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        index = folder / "x.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        return index

    return make


SHARD = safetensors_bytes(NULL + f'"w":{entry()}}}', bytes(8))

ROWS = (
    Row("null and metadata", header(NULL + f'"__metadata__":{{}},"w":{entry()}}}'), "twice"),
    Row("null for an entry", header(NULL + '"w":null}'), "the fields"),
    Row("nul", header(f'{{"__metadata__":nul,"w":{entry()}}}'), "an object"),
    Row("nullnull", header(f'{{"__metadata__":nullnull,"w":{entry()}}}'), "a comma"),
    Row("beyond the file", header(NULL + f'"w":{entry(offsets=(0, 1 << 40), shape=(1 << 38,))}}}')),
    Row("no tensor", header('{"__metadata__":null}', b""), "no tensor"),
    Row("no word of whose it is", header(f'{{"__metadata__":{{"a":"b"}},"w":{entry()}}}'), "--from mlx"),
    Row("an empty name", header(NULL + f'"":{entry()}}}'), "empty name"),
    Row("a name that leads outside", header(NULL + f'"../../x.weight":{entry()}}}'), "leads out", as_template=False),
    Row("shape of 4 TB", zipped(("w.npy", npy(shape="(1099511627776, )")))),
    Row("three raw bytes", zipped(("w.npy", npy("<V3", "(2, )", bytes(6)))), "raw bytes"),
    Row("half an element", zipped(("w.npy", npy("<V2", "(2, )", bytes(3))))),
    Row("objects", zipped(("w.npy", npy("|O", "(1, )", b"cos\nsystem\n."))), "Python objects"),
    Row("a shard that leads outside", shards({}, {"w": "../x.safetensors"}), as_template=False),
    Row(
        "a shard that is not there",
        shards({"a.safetensors": SHARD}, {"w": "a.safetensors", "v": "b.safetensors"}),
        as_template=False,
    ),
    Row(
        "a shard without its tensor",
        shards({"a.safetensors": SHARD}, {"w": "a.safetensors", "v": "a.safetensors"}),
        as_template=False,
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".npz" if row.make(good, tmp_path).suffix == ".npz" else ".safetensors")


def test_a_file_of_torch_is_not_read_as_one_of_mlx(run: Commands, good: Path, tmp_path: Path) -> None:
    data = safetensors_bytes({"__metadata__": {"format": "pt"}, "w": json.loads(entry())}, bytes(8))
    (tmp_path / "x.safetensors").write_bytes(data)
    refused(run, tmp_path, ["export", "x.safetensors", "--from", "mlx"], "layout of pt")
    (tmp_path / "x.safetensors").write_bytes(SHARD)
    assert run(tmp_path, "show", "x.safetensors").status == 0
