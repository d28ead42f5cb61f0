"""OCDBT against TensorStore, which writes it, and forged ones."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore

from neutral.containers.codecs import compressed
from neutral.containers.crc32c import crc32c
from neutral.containers.folder import Folder
from neutral.containers.ocdbt import open_ocdbt
from neutral.containers.protobuf import varint
from neutral.errors import BadFile, NeutralError
from neutral.native import Storage

RANDOM = np.random.default_rng(0)


def _read(storage: Storage) -> bytes:
    out = bytearray(storage.nbytes)
    storage.read_into(0, memoryview(out))
    return bytes(out)


def _written(folder: Path, rounds: list[dict[str, bytes]], config: dict[str, Any]) -> dict[bytes, bytes]:
    """A database of several versions, and what its newest one holds."""
    meant: dict[bytes, bytes] = {}
    spec = {"driver": "ocdbt", "base": f"file://{folder}/", "config": config}
    store = tensorstore.KvStore.open(spec).result()
    for values in rounds:
        with tensorstore.Transaction() as transaction:
            for key, value in values.items():
                store.with_transaction(transaction)[key] = value
        meant |= {key.encode(): value for key, value in values.items()}
    return dict(sorted(meant.items()))


def _values(count: int) -> dict[str, bytes]:
    names = ("params.fc.kernel/0.", "params.fc.bias/", "é/", "")
    return {
        f"{names[i % 4]}{RANDOM.integers(1 << 30)}": RANDOM.bytes(int(RANDOM.integers(0, 60))) for i in range(count)
    }


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"compression": None},
        {"compression": {"id": "zstd", "level": 5}, "max_decoded_node_bytes": 300, "max_inline_value_bytes": 30},
        {"compression": None, "max_decoded_node_bytes": 200, "version_tree_arity_log2": 1},
        {"manifest_kind": "numbered", "max_inline_value_bytes": 0},
    ],
    ids=str,
)
def test_reads_what_tensorstore_writes(config: dict[str, Any], tmp_path: Path) -> None:
    meant = _written(tmp_path / "db", [_values(60) for _ in range(5)], config)
    values = open_ocdbt(Folder(tmp_path / "db")).values
    assert {key: _read(value) for key, value in values.items()} == meant
    assert list(values) == list(meant)


def test_the_newest_version_is_read_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/db/"}).result()
    store["a"] = b"old"
    store["a"] = b"new"
    found = open_ocdbt(Folder(tmp_path / "db")).get("a")
    assert found is not None and _read(found) == b"new"
    del store["a"]
    assert open_ocdbt(Folder(tmp_path / "db")).values == {}


def test_every_flipped_byte_of_manifest_and_nodes_is_noticed(tmp_path: Path) -> None:
    meant = _written(tmp_path / "db", [_values(40)], {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 1000})
    assert len(open_ocdbt(Folder(tmp_path / "db")).values) == len(meant)
    for file in (tmp_path / "db").rglob("*"):
        if file.is_file():
            good = file.read_bytes()
            for at in RANDOM.integers(len(good), size=60):
                bad = bytearray(good)
                bad[at] ^= 1 << RANDOM.integers(8)
                file.write_bytes(bytes(bad))
                try:
                    found = {k: _read(v) for k, v in open_ocdbt(Folder(tmp_path / "db")).values.items()}
                except NeutralError:
                    continue
                assert found == meant, "what no node refers to, such as an older version of one"
            file.write_bytes(good)


MANIFEST, NODE = 0x0CDB3A2A, 0x0CDB20DE


def _sealed(magic: int, body: bytes, *, compression: int = 0, crc: int = 0) -> bytes:
    """A manifest or node with its length and checksum."""
    head = magic.to_bytes(4, "big") + (18 + len(body)).to_bytes(8, "little") + bytes([0, compression])
    return head + body + (crc32c(head + body) ^ crc).to_bytes(4, "little")


def _files(*names: str, base: int = 0) -> bytes:
    """A table of data files that share no beginnings."""
    raw = [name.encode() for name in names]
    lengths = b"".join(varint(len(r)) for r in raw)
    return varint(len(raw)) + b"\0" * (len(raw) - 1) + lengths + varint(base) * len(raw) + b"".join(raw)


def _numbers(*values: int) -> bytes:
    return b"".join(map(varint, values))


def _manifest(length: int, *, name: str = "d/x", height: int = 0, offset: int = 0) -> bytes:
    config = bytes(16) + b"\0" + _numbers(100, 1000) + b"\4" + b"\0"
    version = _numbers(1, 1) + bytes([height]) + _numbers(0, offset, length, 0, 0, 0) + bytes(8)
    return _sealed(MANIFEST, config + _files(name) + version + b"\0")


def _leaf(keys: list[bytes], *, value: bytes = b"v", kinds: int = 0, files: bytes = b"\0", tail: bytes = b"") -> bytes:
    n = len(keys)
    head = b"\0" + files + varint(n) + b"\0" * (n - 1) + b"".join(varint(len(k)) for k in keys) + b"".join(keys)
    return _sealed(NODE, head + varint(len(value)) * n + bytes([kinds]) * n + (tail or value * n))


def _inner(height: int, children: list[tuple[bytes, int, int]], *, shared: int = 0, name: str = "d/x") -> bytes:
    """An inner node: the first key of each child, where it lies and how long it is."""
    n = len(children)
    body = bytes([height]) + _files(name) + varint(n) + b"\0" * (n - 1)
    body += b"".join(varint(len(key)) for key, _, _ in children) + varint(shared) * n
    body += b"".join(key for key, _, _ in children) + b"\0" * n
    body += b"".join(varint(offset) for _, offset, _ in children) + b"".join(varint(size) for _, _, size in children)
    return _sealed(NODE, body + b"\0" * 3 * n)


def _forge(folder: Path, manifest: bytes, data: bytes = b"") -> Path:
    (folder / "d").mkdir(parents=True)
    (folder / "manifest.ocdbt").write_bytes(manifest)
    (folder / "d" / "x").write_bytes(data)
    return folder


def test_the_forger_can_forge_a_good_one(tmp_path: Path) -> None:
    leaf = _leaf([b"a", b"b"])
    inner = _inner(1, [(b"a", 0, len(leaf))])
    folder = _forge(tmp_path / "db", _manifest(len(inner), height=1, offset=len(leaf)), leaf + inner)
    assert {k: _read(v) for k, v in open_ocdbt(Folder(folder)).values.items()} == {b"a": b"v", b"b": b"v"}


GOOD = _leaf([b"a", b"b"])
FORGED: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", GOOD),
    "another magic": (_sealed(NODE, b""), GOOD),
    "no versions": (_sealed(MANIFEST, bytes(17) + _numbers(1, 1) + b"\4\0" + b"\0" + b"\0"), GOOD),
    "2^60 versions": (_sealed(MANIFEST, bytes(17) + _numbers(1, 1) + b"\4\0" + b"\0" + varint(1 << 60)), GOOD),
    "2^60 files": (_sealed(MANIFEST, bytes(17) + _numbers(1, 1) + b"\4\0" + varint(1 << 60)), GOOD),
    "a kind of manifest": (_sealed(MANIFEST, bytes(16) + b"\7" + _numbers(1, 1) + b"\4\0"), GOOD),
    "numbered, without": (_sealed(MANIFEST, bytes(16) + b"\1" + _numbers(1, 1) + b"\4\0"), GOOD),
    "a checksum": (_manifest(len(GOOD)), GOOD[:-1] + bytes([GOOD[-1] ^ 1])),
    "a root of another height": (_manifest(len(GOOD), height=3), GOOD),
    "a root beyond the file": (_manifest(len(GOOD) + 1), GOOD),
    "a root of 2^62 bytes": (_manifest(1 << 62), GOOD),
    "a root elsewhere": (_manifest(len(GOOD), name="../x"), GOOD),
    "an absolute root": (_manifest(len(GOOD), name="/etc/passwd"), GOOD),
    "a root without a name": (_manifest(len(GOOD), name=""), GOOD),
    "a root with a NUL": (_manifest(len(GOOD), name="d/x\0"), GOOD),
    "a folder as root": (_manifest(len(GOOD), name="d"), GOOD),
    "keys in disorder": (_manifest(len(leaf := _leaf([b"b", b"a"]))), leaf),
    "a key twice": (_manifest(len(leaf := _leaf([b"a", b"a"]))), leaf),
    "a value elsewhere": (
        _manifest(len(leaf := _leaf([b"a"], kinds=1, files=_files("../../etc/passwd"), tail=b"\0\0"))), leaf
    ),
    "a value beyond the file": (
        _manifest(len(leaf := _leaf([b"a"], kinds=1, files=_files("d/x"), tail=b"\0" + varint(1 << 40)))), leaf
    ),
    "a value in no file": (_manifest(len(leaf := _leaf([b"a"], kinds=1, tail=b"\5\0"))), leaf),
    "a value of a kind": (_manifest(len(leaf := _leaf([b"a"], kinds=2))), leaf),
    "a value cut short": (_manifest(len(leaf := _leaf([b"a"], value=b"vv", tail=b"v"))), leaf),
    "bytes behind": (_manifest(len(leaf := _leaf([b"a"], tail=b"vv"))), leaf),
    "no entries": (_manifest(len(leaf := _sealed(NODE, b"\0\0\0"))), leaf),
    "2^40 entries": (_manifest(len(leaf := _sealed(NODE, b"\0\0" + varint(1 << 40)))), leaf),
    "a prefix of nothing": (
        _manifest(len(leaf := _sealed(NODE, b"\0\0\2" + b"\7" + b"\1\1" + b"ab" + b"\1\1\0\0vv"))), leaf
    ),
    "a child that is its parent": (
        _manifest(len(leaf := _inner(1, [(b"a", 0, 40)])), height=1), leaf
    ),
    "a subtree of more than its key": (
        _manifest(len(leaf := _inner(1, [(b"a", 0, 1)], shared=5)), height=1), leaf
    ),
    "a zstd bomb": (
        _manifest(len(leaf := _sealed(NODE, b"".join(compressed("zstd", 3, [memoryview(bytes(1 << 27))], 1 << 27)), compression=1))),
        leaf,
    ),
    "zstd that is none": (_manifest(len(leaf := _sealed(NODE, b"abc", compression=1))), leaf),
    "another compression": (_manifest(len(leaf := _sealed(NODE, b"abc", compression=2))), leaf),
}  # fmt: skip


@pytest.mark.parametrize(("manifest", "data"), FORGED.values(), ids=FORGED.keys())
def test_forged_databases(manifest: bytes, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(BadFile) as caught:
        open_ocdbt(Folder(_forge(tmp_path / "db", manifest, data)))
    assert "\n" not in str(caught.value)


def test_a_node_that_is_reached_twice_is_refused(tmp_path: Path) -> None:
    """Thirty levels of two children each, both the same: a thousand million leaves in a kilobyte."""
    data = GOOD
    place, size = 0, len(GOOD)
    for height in range(1, 31):
        inner = _inner(height, [(b"a", place, size), (b"b", place, size)])
        place, size = len(data), len(inner)
        data += inner
    with pytest.raises(BadFile, match="twice"):
        open_ocdbt(Folder(_forge(tmp_path / "db", _manifest(size, height=30, offset=place), data)))


def test_links_are_refused(tmp_path: Path) -> None:
    folder = _forge(tmp_path / "db", _manifest(len(GOOD)), GOOD)
    (tmp_path / "elsewhere").write_bytes(GOOD)
    (folder / "d" / "x").unlink()
    (folder / "d" / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadFile, match="a link"):
        open_ocdbt(Folder(folder))
    (folder / "d" / "x").unlink()
    (folder / "d").rmdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_bytes(GOOD)
    (folder / "d").symlink_to(tmp_path / "d")
    with pytest.raises(BadFile, match="a link"):
        open_ocdbt(Folder(folder))


def test_mutations_never_crash(tmp_path: Path) -> None:
    """Bodies with bytes changed, under checksums that fit."""
    leaf, inner = _leaf([b"a", b"bc"])[14:-4], _inner(1, [(b"a", 0, 30), (b"b", 30, 30)])[14:-4]
    manifest = _manifest(30)[14:-4]
    for i, (magic, body) in itertools.product(range(100), ((NODE, leaf), (NODE, inner), (MANIFEST, manifest))):
        raw = bytearray(body)
        for _ in range(RANDOM.integers(1, 4)):
            raw[RANDOM.integers(len(raw))] = RANDOM.integers(256)
        forged = _sealed(magic, bytes(raw))
        folder = tmp_path / str(i % 2)
        (folder / "d").mkdir(parents=True, exist_ok=True)
        (folder / "manifest.ocdbt").write_bytes(forged if magic == MANIFEST else _manifest(len(forged), height=body[0]))
        (folder / "d" / "x").write_bytes(_leaf([b"a"]) if magic == MANIFEST else forged)
        try:
            values = open_ocdbt(Folder(folder)).values
        except NeutralError as error:
            assert "\n" not in str(error)
        else:
            assert all(len(_read(v)) == v.nbytes for v in values.values())
