"""Hostile msgpack files of Flax, folders of Orbax and files of Equinox."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from neutral.containers.codecs import compressed
from neutral.containers.pytree import write_msgpack, write_orbax
from neutral.native import from_array
from tests.containers.test_msgpack import BROKEN
from tests.containers.test_msgpack import _array as ext_array
from tests.containers.test_npz import _npy as npy
from tests.containers.test_ocdbt import FORGED
from tests.hostile.commands import Commands, refused
from tests.hostile.sources import Row, every_command

LEAVES = {
    ("params", f"Dense_{i}", local): from_array(np.random.default_rng(i).normal(size=shape).astype("f4"))
    for i, shapes in enumerate((((3, 5), (5,)), ((5, 2), (2,))))
    for local, shape in zip(("kernel", "bias"), shapes, strict=True)
}
KERNEL = "params.Dense_0.kernel"


def msgpack_of(data: bytes) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        (folder / "x.msgpack").write_bytes(data)
        return folder / "x.msgpack"

    return make


def cut_msgpack(good: Path, folder: Path) -> Path:
    write_msgpack(LEAVES, {}, folder / "whole")
    (folder / "x.msgpack").write_bytes((folder / "whole").read_bytes()[:-9])
    (folder / "whole").unlink()
    return folder / "x.msgpack"


# A file that does not begin as a map of names is not known for one, and its refusal says so.
MSGPACK = (
    *(Row(name, msgpack_of(data)) for name, data in BROKEN.items()),
    Row("truncated", cut_msgpack, "bytes"),
    Row("a name that forges lines", msgpack_of(msgpack.packb({"a\n\x1b[31mneutral: ok": ext_array((9,))})), "bytes"),
    Row("no array", msgpack_of(msgpack.packb({"a": 1}))),
)


@pytest.mark.parametrize("row", MSGPACK, ids=str)
def test_refused_msgpack(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".msgpack")


def orbax(spoil: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    """A good checkpoint, spoiled."""

    def make(good: Path, folder: Path) -> Path:
        write_orbax(LEAVES, {("note",): "text"}, folder / "x")
        spoil(folder / "x")
        return folder / "x"

    return make


def described(**changes: object) -> Callable[[Path], object]:
    """The kernel's `.zarray` with other fields."""

    def spoil(folder: Path) -> None:
        path = folder / KERNEL / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def tree(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """`_METADATA` with another tree or other settings."""

    def spoil(folder: Path) -> None:
        fields = json.loads((folder / "_METADATA").read_text())
        edit(fields)
        (folder / "_METADATA").write_text(json.dumps(fields))

    return spoil


def keys(*path: object, kind: int = 2) -> Callable[[Path], object]:
    """The kernel under another path."""

    def edit(fields: dict[str, Any]) -> None:
        entry = fields["tree_metadata"]["('params', 'Dense_0', 'kernel')"]
        entry["key_metadata"] = [{"key": key, "key_type": kind} for key in path]

    return tree(edit)


def text(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "_METADATA").write_bytes(data)


def chunk(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / KERNEL / "0.0")


def linked_chunk(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def linked_array(folder: Path) -> None:
    (folder / KERNEL).rename(folder.parent / "elsewhere")
    (folder / KERNEL).symlink_to(folder.parent / "elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def zstd(size: int, **changes: object) -> Callable[[Path], object]:
    """The kernel's chunk as zstd of so many zeros."""

    def spoil(folder: Path) -> None:
        described(compressor={"id": "zstd", "level": 1}, **changes)(folder)
        data = b"".join(compressed("zstd", 1, [memoryview(bytes(size))], size))
        (folder / KERNEL / "0.0").write_bytes(data)

    return spoil


def sparse(folder: Path) -> None:
    """4 TiB of which nothing is there."""
    described(shape=[1 << 20, 1 << 20], chunks=[1 << 20, 1 << 19], fill_value=0.0)(folder)
    tree(lambda fields: fields.update(store_array_data_equal_to_fill_value=False))(folder)
    (folder / KERNEL / "0.0").unlink()


def ocdbt(manifest: bytes, data: bytes) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tree(lambda fields: fields.update(use_ocdbt=True))(folder)
        (folder / "d").mkdir()
        (folder / "manifest.ocdbt").write_bytes(manifest)
        (folder / "d" / "x").write_bytes(data)

    return spoil


def zarr_3(**changes: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        fields = {
            "zarr_format": 3, "node_type": "array", "shape": [3, 5], "data_type": "float32", "fill_value": 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 5]}},
            "chunk_key_encoding": {"name": "default"}, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }  # fmt: skip
        (folder / KERNEL / ".zarray").unlink()
        (folder / KERNEL / "c" / "0").mkdir(parents=True)
        (folder / KERNEL / "0.0").rename(folder / KERNEL / "c" / "0" / "0")
        (folder / KERNEL / "zarr.json").write_text(json.dumps(fields | changes))

    return spoil


def sharded(chunk_shape: list[int], **settings: object) -> Callable[[Path], object]:
    index = {"index_codecs": [{"name": "bytes"}, {"name": "crc32c"}], "codecs": [{"name": "bytes"}]}
    codec = {"name": "sharding_indexed", "configuration": {"chunk_shape": chunk_shape, **index, **settings}}
    return zarr_3(codecs=[codec])


ORBAX = (
    Row("metadata that is no JSON", orbax(text(b"{")), "JSON"),
    Row("metadata of a list", orbax(text(b"[]"))),
    Row("empty metadata", orbax(text(b"{}")), "tree"),
    Row("deep metadata", orbax(text(b'{"tree_metadata": ' + b"[" * 200_000)), "JSON"),
    Row("wide metadata", orbax(text(b'{"tree_metadata": [' + b"[]," * 2_000_000 + b"[]]}")), "lists"),
    Row("large metadata", orbax(text(b" " * (17 << 20))), "bytes"),
    Row("a key twice in the metadata", orbax(text(b'{"tree_metadata": {}, "tree_metadata": {}}')), "twice"),
    Row("no leaves", orbax(tree(lambda fields: fields.update(tree_metadata={})))),
    Row("settings of text", orbax(tree(lambda fields: fields.update(use_ocdbt="no"))), "true nor false"),
    Row("a path that leads out", orbax(keys("..", "..", "etc")), "no array"),
    Row("a path with a slash that leads out", orbax(keys("../../etc/passwd")), "elsewhere"),
    Row("an absolute path", orbax(keys("/etc/passwd")), "elsewhere"),
    Row("a path with NUL", orbax(keys("a\0b")), "elsewhere"),
    Row("a long path", orbax(keys("a" * 100_000))),
    Row("a deep path", orbax(keys(*["a"] * 300)), "keys"),
    Row("a path that forges lines", orbax(keys("a\n\x1b[31mneutral: ok")), "no array"),
    Row("a path that is there twice", orbax(keys("params", "Dense_1", "kernel")), "twice"),
    Row("a key of an unknown type", orbax(keys("a", kind=7)), "type"),
    Row("a key that is a list", orbax(keys(["a"])), "name"),
    Row("another leaf's array", orbax(keys("params.Dense_1", "kernel")), "twice"),
    Row("no such array", orbax(keys("params", "Dense_7", "kernel")), "no array"),
    Row("no text", orbax(lambda folder: (folder / "_strings.json").write_text("{}")), "no text"),
    Row("texts that are no JSON", orbax(lambda folder: (folder / "_strings.json").write_text("{")), "JSON"),
    Row("a missing chunk", orbax(chunk(Path.unlink)), "no such chunk"),
    Row("a short chunk", orbax(chunk(lambda path: os.truncate(path, 59))), "bytes"),
    Row("a long chunk", orbax(chunk(lambda path: os.truncate(path, 61))), "bytes"),
    Row("a linked chunk", orbax(chunk(linked_chunk)), "a link"),
    Row("a linked array", orbax(linked_array), "a link"),
    Row("a chunk that is a pipe", orbax(chunk(pipe)), "a pipe"),
    Row("metadata that is a pipe", orbax(lambda folder: pipe(folder / "_METADATA"))),
    Row("shape of 2^40", orbax(described(shape=[1 << 20, 1 << 20], chunks=[1 << 20, 1 << 20])), "bytes"),
    Row("shape of 2^40 in chunks", orbax(described(shape=[1 << 20, 1 << 20], chunks=[1, 1])), "chunks"),
    Row("shape of 2^60 and 0", orbax(described(shape=[1 << 60, 0], chunks=[1, 1])), "memory"),
    Row("nothing of 4 TiB is there", orbax(sparse), "missing chunks"),
    Row("negative shape", orbax(described(shape=[-3, -5])), "sizes"),
    Row("float shape", orbax(described(shape=[3.0, 5])), "sizes"),
    Row("40 axes", orbax(described(shape=[1] * 40, chunks=[1] * 40)), "sizes"),
    Row("chunks of another rank", orbax(described(chunks=[3])), "chunks"),
    Row("chunks of 0", orbax(described(chunks=[0, 5])), "chunks"),
    Row("objects", orbax(described(dtype="|O")), "dtype"),
    Row("structured", orbax(described(dtype=[["a", "<f4"]])), "dtype"),
    Row("texts", orbax(described(dtype="<U4")), "dtype"),
    Row("filters", orbax(described(filters=[{"id": "delta"}])), "filters"),
    Row("blosc", orbax(described(compressor={"id": "blosc"})), "blosc"),
    Row("zarr 7", orbax(described(zarr_format=7)), "zarr_format"),
    Row("a separator that leads out", orbax(described(dimension_separator="/../")), "separator"),
    Row("a fill value of text", orbax(described(fill_value="x")), "fill value"),
    Row("deep zarr metadata", orbax(lambda f: (f / KERNEL / ".zarray").write_text("[" * 60_000)), "JSON"),
    Row("large zarr metadata", orbax(lambda f: (f / KERNEL / ".zarray").write_bytes(bytes(1 << 20))), "bytes"),
    Row("zstd of more than there should be", orbax(zstd(100)), "exactly", as_template=False),
    Row("zstd of less than there should be", orbax(zstd(40)), "ends early", as_template=False),
    Row("a zstd bomb", orbax(zstd(1 << 30)), "exactly", as_template=False, slow=True),
    Row("4 TiB of zstd", orbax(zstd(100, shape=[1 << 20, 1 << 20], chunks=[1 << 20, 1 << 20])), "zstd"),
    Row("zstd that is none", orbax(described(compressor={"id": "zstd"})), "decompress", as_template=False),
    Row("gzip that is none", orbax(described(compressor={"id": "gzip"})), "decompress", as_template=False),
    Row("zarr 3 with a transform", orbax(zarr_3(storage_transformers=[{"name": "x"}])), "another form"),
    Row("zarr 3 with another codec", orbax(zarr_3(codecs=[{"name": "bytes"}, {"name": "blosc"}])), "blosc"),
    Row("zarr 3 without codecs", orbax(zarr_3(codecs=[])), "codecs"),
    Row("zarr 3 of texts", orbax(zarr_3(data_type="string")), "type"),
    Row("zarr 3 of 2^40", orbax(zarr_3(shape=[1 << 20, 1 << 20])), "chunk"),
    Row("shards without an index", orbax(sharded([1, 1])), "index"),
    Row("shards with another checksum", orbax(sharded([3, 5])), "checksum"),
    Row("shards past the end", orbax(sharded([3, 5], index_codecs=[{"name": "bytes"}])), "past the end"),
    Row("shards that do not divide", orbax(sharded([2, 2])), "whole number"),
    Row("shards in shards", orbax(sharded([3, 5], codecs=[{"name": "sharding_indexed"}])), "codecs"),
    Row("an OCDBT that is not there", orbax(tree(lambda fields: fields.update(use_ocdbt=True))), "no such file"),
    *(Row(f"OCDBT: {name}", orbax(ocdbt(*parts)), slow=True) for name, parts in FORGED.items()),
)


def aggregate(data: bytes) -> Callable[[Path], object]:
    """The tree as Orbax of 2023 kept it."""

    def spoil(folder: Path) -> None:
        (folder / "_METADATA").unlink()
        (folder / "checkpoint").write_bytes(data)

    return spoil


def places(*names: str) -> Callable[[Path, Path], Path]:
    """Leaves that lie in these places."""
    leaves = {f"w{i}": f"PLACEHOLDER://{name}" for i, name in enumerate(names)}
    return orbax(aggregate(msgpack.packb({"params": leaves})))


AGGREGATED = (
    *(Row(name, orbax(aggregate(data))) for name, data in BROKEN.items()),
    Row("a place outside", places("../../etc/passwd"), "elsewhere"),
    Row("an absolute place", places("/etc/passwd"), "elsewhere"),
    Row("a place with NUL", places("a\0b"), "elsewhere"),
    Row("the folder itself", places(""), ""),
    Row("a place where nothing is", places("params.Dense_7.kernel"), "no array"),
    Row("one place for two", places(KERNEL, KERNEL), "two leaves"),
    Row("a place that forges lines", places("a\n\x1b[31mneutral: ok"), "no array"),
    Row("no array at all", orbax(aggregate(msgpack.packb({"a": 1})))),
    Row("an array of other bytes", orbax(aggregate(msgpack.packb({"a": ext_array((9,))}))), "bytes"),
)


@pytest.mark.parametrize("row", AGGREGATED, ids=str)
def test_refused_orbax_of_2023(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, "")


@pytest.mark.parametrize("row", ORBAX, ids=str)
def test_refused_orbax(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, "")


def eqx(*records: bytes) -> Callable[[Path, Path], Path]:
    def make(good: Path, folder: Path) -> Path:
        (folder / "x.eqx").write_bytes(b"".join(records))
        return folder / "x.eqx"

    return make


EQUINOX = (
    Row("truncated", eqx(npy(), npy()[:-1]), "bytes"),
    Row("truncated header", eqx(npy(), npy()[:30]), "bytes"),
    Row("bytes behind", eqx(npy(), b"x")),
    Row("objects", eqx(npy("'|O'")), "pickle"),
    Row("pickle", eqx(npy(), b"\x80\x04]\x94.      ")),
    Row("header that calls", eqx(npy("__import__('os').system('touch MARK')")), "header"),
    Row("shape of 2^40", eqx(npy(shape=f"({1 << 40},)")), "bytes"),
    Row("negative shape", eqx(npy(shape="(-2,)"))),
    Row("deep header", eqx(npy(extra=", 'x': " + "(" * 4000))),
    Row("structured", eqx(npy("[('a', '<f4')]")), "structured"),
    Row("an 8-bit float of no name", eqx(npy("'|V1'", data=bytes(2))), "dtype"),
    Row("100,000 leaves", eqx(*[npy(shape="()", data=bytes(4))] * 100_000), "leaves", slow=True),
)


@pytest.mark.parametrize("row", EQUINOX, ids=str)
def test_refused_equinox(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".eqx")


def test_the_spoiled_ones_were_good(run: Commands, tmp_path: Path) -> None:
    source = orbax(lambda folder: None)(tmp_path, tmp_path)
    assert run(tmp_path, "export", source, "out.nwt").status == 0
    zarr_3()(source)
    assert run(tmp_path, "diff", source, "out.nwt").status == 0
    write_msgpack(LEAVES, {}, tmp_path / "x.msgpack")
    assert run(tmp_path, "diff", tmp_path / "x.msgpack", "out.nwt").status == 0


def test_a_pipe_is_no_file(run: Commands, good: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.msgpack")
    refused(run, tmp_path, ["export", "x.msgpack", "out.nwt"], "pipe")
