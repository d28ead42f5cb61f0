"""Tensor bundles: those of TensorFlow are read, ours are read by TensorFlow, and a damaged one is refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from neutral.containers import protobuf
from neutral.containers.crc32c import crc32c, masked
from neutral.containers.tensor_bundle import Bundle, Strings
from neutral.containers.tensor_bundle_entries import Slice, piece_key
from neutral.containers.tensor_bundle_writing import replace_tensors, write_bundle
from neutral.errors import BadFile, NeutralError, Refused, Unsupported
from neutral.native import from_array

DTYPES = [
    *(np.float32, np.float64, np.float16, np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64, np.bool_, np.complex64, np.complex128),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn),
]


def some_array(dtype: object, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 2, shape) if dtype is np.bool_ else rng.normal(0, 20, shape)).astype(dtype)


def save(prefix: Path, arrays: dict[str, object], slices: dict[str, str] | None = None) -> None:
    """A checkpoint of one shard, written by TensorFlow's own op."""
    tensors = [tf.constant(array) for array in arrays.values()]
    shapes = [(slices or {}).get(name, "") for name in arrays]
    tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=list(arrays), shape_and_slices=shapes, tensors=tensors)


def merge(parts: list[Path], prefix: Path) -> None:
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(part) for part in parts], destination_prefix=str(prefix), delete_old_dirs=False
    )


def index(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")


def data(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".data-00000-of-00001")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A small checkpoint of TensorFlow's."""
    path = tmp_path / "good"
    save(
        path,
        {"a/kernel": some_array(np.float32, (3, 5)), "a/bias": some_array(np.float32, (5,), 1), "text": ["x", "yz"]},
    )
    return path


def test_every_dtype_that_tensorflow_writes(tmp_path: Path) -> None:
    arrays = {f"{np.dtype(dtype).name}": some_array(dtype, (3, 4)) for dtype in DTYPES}
    arrays |= {"scalar": some_array(np.float32, ()), "empty": some_array(np.float32, (0, 3))}
    save(tmp_path / "x", arrays)
    with Bundle(tmp_path / "x") as bundle:
        assert set(bundle.entries) == set(arrays)
        for name, array in arrays.items():
            found = bundle.tensor(name).read()
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_strings(prefix: Path) -> None:
    with Bundle(prefix) as bundle:
        assert bundle.strings("text") == Strings((2,), (b"x", b"yz"))
        with pytest.raises(Unsupported, match="strings"):
            bundle.tensor("text")


def test_several_shards(tmp_path: Path) -> None:
    arrays = {
        "a": some_array(np.float32, (7,), 1),
        "b": some_array(np.int64, (2, 3), 2),
        "c": some_array(np.float64, (4,), 3),
    }
    for name, array in arrays.items():
        save(tmp_path / f"part_{name}", {name: array})
    merge([tmp_path / f"part_{name}" for name in arrays], tmp_path / "whole")
    with Bundle(tmp_path / "whole") as bundle:
        assert len(bundle.shard_paths) == 3
        for name, array in arrays.items():
            assert bundle.tensor(name).read().tobytes() == array.tobytes()
        new = -arrays["b"]
        replace_tensors(bundle, {"b": from_array(new)}, tmp_path / "new")
    reader = tf.train.load_checkpoint(str(tmp_path / "new"))
    assert np.array_equal(reader.get_tensor("b"), new)
    assert np.array_equal(reader.get_tensor("c"), arrays["c"])


@pytest.mark.parametrize("wide", [3, 200])
def test_partitioned_variables(tmp_path: Path, wide: int) -> None:
    """One variable in four slices over two axes; 200 columns need numbers of two bytes in the keys."""
    whole = some_array(np.float32, (7, 2 * wide), 4)
    boxes = [(0, 3, 0, wide), (3, 4, 0, wide), (0, 3, wide, wide), (3, 4, wide, wide)]
    parts = []
    for i, (row, rows, column, columns) in enumerate(boxes):
        piece = whole[row : row + rows, column : column + columns]
        save(tmp_path / f"p{i}", {"w": piece}, {"w": f"7 {2 * wide} {row},{rows}:{column},{columns}"})
        parts.append(tmp_path / f"p{i}")
    merge(parts, tmp_path / "whole")
    with Bundle(tmp_path / "whole") as bundle:
        tensor = bundle.tensor("w")
        assert np.array_equal(tensor.read(), whole)
        assert np.array_equal(tensor.block([(2, 5), (1, wide + 1)]), whole[2:5, 1 : wide + 1])
        assert np.array_equal(np.concatenate(list(tensor.tiles(16))), whole.ravel())
        replace_tensors(bundle, {"w": tensor}, tmp_path / "same")
        replace_tensors(bundle, {"w": from_array(whole * 2)}, tmp_path / "twice")
    for made, original in zip(sorted(tmp_path.glob("same.*")), sorted(tmp_path.glob("whole.*")), strict=True):
        assert made.read_bytes() == original.read_bytes()
    assert np.array_equal(tf.train.load_checkpoint(str(tmp_path / "twice")).get_tensor("w"), whole * 2)


def test_a_slice_that_is_whole_on_an_axis(tmp_path: Path) -> None:
    whole = some_array(np.float32, (4, 6))
    for i in range(2):
        save(tmp_path / f"p{i}", {"w": whole[:, i * 3 : i * 3 + 3]}, {"w": f"4 6 -:{i * 3},3"})
    merge([tmp_path / "p0", tmp_path / "p1"], tmp_path / "whole")
    with Bundle(tmp_path / "whole") as bundle:
        assert np.array_equal(bundle.tensor("w").read(), whole)


def test_many_tensors_in_many_blocks(tmp_path: Path) -> None:
    arrays = {f"layer_{i:04d}/{'x' * 300}/kernel": np.full((2,), i, np.int32) for i in range(2000)}
    save(tmp_path / "theirs", arrays)
    write_bundle(tmp_path / "ours", {name: from_array(array) for name, array in arrays.items()})
    for name in ("theirs", "ours"):
        with Bundle(tmp_path / name) as bundle:
            assert len(bundle.blocks) > 1
            assert all(bundle.tensor(key).read()[1] == array[0] for key, array in arrays.items())
    reader = tf.train.load_checkpoint(str(tmp_path / "ours"))
    assert all(np.array_equal(reader.get_tensor(key), array) for key, array in arrays.items())


def test_tensorflow_reads_what_we_write(tmp_path: Path) -> None:
    arrays = {f"l/{np.dtype(dtype).name}": some_array(dtype, (5, 3)) for dtype in DTYPES} | {
        "s": some_array(np.float32, ())
    }
    arrays["empty"] = np.zeros((0, 2), np.float32)
    strings = {"words": Strings((3,), (b"", b"a" * 200, b"\xff\x00"))}
    write_bundle(tmp_path / "x", {name: from_array(array) for name, array in arrays.items()}, strings)
    reader = tf.train.load_checkpoint(str(tmp_path / "x"))
    assert set(reader.get_variable_to_shape_map()) == {*arrays, "words"}
    for name, array in arrays.items():
        found = reader.get_tensor(name)
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert list(reader.get_tensor("words")) == [b"", b"a" * 200, b"\xff\x00"]
    with Bundle(tmp_path / "x") as bundle:
        assert bundle.strings("words") == strings["words"]


def test_the_same_input_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    arrays = {"b": np.arange(3.0), "a": np.arange(4), "ab": np.ones(2, np.float16)}
    write_bundle(tmp_path / "x", {name: from_array(array) for name, array in arrays.items()})
    write_bundle(tmp_path / "y", {name: from_array(array) for name, array in reversed(arrays.items())})
    assert index(tmp_path / "x").read_bytes() == index(tmp_path / "y").read_bytes()
    assert data(tmp_path / "x").read_bytes() == data(tmp_path / "y").read_bytes()


def test_what_tensorflow_lacks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="dtype"):
        write_bundle(tmp_path / "x", {"a": from_array(np.zeros(2, "M8[s]"))})
    with pytest.raises(Refused, match="twice"):
        write_bundle(tmp_path / "x", {"": from_array(np.zeros(2))})
    assert list(tmp_path.iterdir()) == []


def test_replacing_with_its_own_tensors_changes_no_byte(prefix: Path, tmp_path: Path) -> None:
    with Bundle(prefix) as bundle:
        replace_tensors(
            bundle, {key: bundle.tensor(key) for key in bundle.entries if bundle.readable(key)}, tmp_path / "n"
        )
    assert index(tmp_path / "n").read_bytes() == index(prefix).read_bytes()
    assert data(tmp_path / "n").read_bytes() == data(prefix).read_bytes()


def test_replacing_changes_what_it_must_and_nothing_else(prefix: Path, tmp_path: Path) -> None:
    new = some_array(np.float32, (3, 5), 9)
    with Bundle(prefix) as bundle:
        entry = bundle.entries["a/kernel"]
        replace_tensors(bundle, {"a/kernel": from_array(new)}, tmp_path / "n")
    old = bytearray(data(prefix).read_bytes())
    old[entry.offset : entry.offset + entry.size] = new.tobytes()
    assert data(tmp_path / "n").read_bytes() == bytes(old)
    reader = tf.train.load_checkpoint(str(tmp_path / "n"))
    assert np.array_equal(reader.get_tensor("a/kernel"), new)
    changed = sum(a != b for a, b in zip(index(prefix).read_bytes(), index(tmp_path / "n").read_bytes(), strict=True))
    assert 0 < changed <= 8, "the checksum of the tensor and that of the block"


def test_what_does_not_fit_is_refused_all_at_once_and_nothing_is_left(prefix: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    wrong = {"a/kernel": np.zeros((5, 3), "f4"), "a/bias": np.zeros(5, "f8"), "c": np.zeros(1)}
    with Bundle(prefix) as bundle, pytest.raises(Refused) as caught:
        replace_tensors(bundle, {name: from_array(array) for name, array in wrong.items()}, tmp_path / "n")
    assert len(caught.value.problems) == 3
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_exists_needs_force(prefix: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "n", {"a": from_array(np.zeros(2))})
    old = index(tmp_path / "n").read_bytes()
    with pytest.raises(Refused, match="exists"):
        write_bundle(tmp_path / "n", {"a": from_array(np.ones(2))})
    assert index(tmp_path / "n").read_bytes() == old
    write_bundle(tmp_path / "n", {"a": from_array(np.ones(2))}, force=True)
    assert np.array_equal(tf.train.load_checkpoint(str(tmp_path / "n")).get_tensor("a"), np.ones(2))


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    class Breaks(type(from_array(np.zeros(1)))):  # type: ignore[misc]
        def block(self, ranges: object) -> np.ndarray:
            raise BadFile()

    with pytest.raises(BadFile):
        write_bundle(tmp_path / "x", {"a": from_array(np.ones(2)), "b": Breaks(np.ones(3))})
    assert list(tmp_path.iterdir()) == []


def test_big_endian(tmp_path: Path) -> None:
    """TensorFlow writes the byte order of its machine; no machine of ours has the other one, so this file is made."""
    array = some_array(np.float32, (2, 3))
    write_bundle(tmp_path / "x", {"a": from_array(array)})
    raw = array.astype(">f4").tobytes()
    data(tmp_path / "x").write_bytes(raw)
    entry = entry_bytes(1, (2, 3), 0, 24, crc=masked(crc32c(raw)))
    rebuild(tmp_path / "x", {b"": protobuf.number(1, 1) + protobuf.number(2, 1), b"a": entry})
    with Bundle(tmp_path / "x") as bundle:
        assert np.array_equal(bundle.tensor("a").read(), array)
        replace_tensors(bundle, {"a": from_array(-array)}, tmp_path / "y")
    assert data(tmp_path / "y").read_bytes() == (-array).astype(">f4").tobytes()


# Damaged and hostile files.


def entry_bytes(dtype: int, shape: tuple[int, ...], offset: int, size: int, crc: int = 0, shard: int = 0) -> bytes:
    dims = b"".join(protobuf.message(2, protobuf.number(1, n)) for n in shape)
    return (
        protobuf.number(1, dtype)
        + protobuf.message(2, dims)
        + protobuf.number(3, shard)
        + protobuf.number(4, offset)
        + protobuf.number(5, size)
        + protobuf.fixed32(6, crc)
    )


def table(entries: dict[bytes, bytes], kind: int = 0) -> bytes:
    """An SSTable with one data block, with good checksums whatever the entries say."""
    out = b""

    def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
        nonlocal out
        body = b"".join(
            protobuf.varint(0) + protobuf.varint(len(k)) + protobuf.varint(len(v)) + k + v for k, v in pairs
        )
        body += struct.pack("<2I", 0, 1) + bytes([kind])
        handle = protobuf.varint(len(out)) + protobuf.varint(len(body) - 1)
        out += body + masked(crc32c(body)).to_bytes(4, "little")
        return handle

    pairs = list(entries.items())
    top = block([(pairs[-1][0], block(pairs))])
    footer = (block([]) + top).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    return out + footer


def rebuild(prefix: Path, entries: dict[bytes, bytes], kind: int = 0) -> None:
    index(prefix).write_bytes(table(entries, kind))


HEADER = protobuf.number(1, 1)
CRC = masked(crc32c(bytes(8)))
HUGE = 1 << 62


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (entry_bytes(1, (2,), 4, 8), "part of its 8 bytes"),
        (entry_bytes(1, (2,), HUGE, 8), "part of its 8 bytes"),
        (entry_bytes(1, (1 << 40,), 0, 8), "bytes for shape"),
        (entry_bytes(1, (HUGE,), 0, 8), "elements"),
        (entry_bytes(1, (0, HUGE), 0, 0), "elements"),
        (entry_bytes(1, (1 << 40, 1 << 40), 0, 8), "elements"),
        (entry_bytes(1, (3,), 0, 8), "bytes for shape"),
        (entry_bytes(1, (1,), 0, 8), "bytes for shape"),
        (entry_bytes(1, (-2,), 0, 8), "no negative"),
        (entry_bytes(1, (-1, -2), 0, 8), "no negative"),
        (entry_bytes(1, (2,), -8, 8), "no negative"),
        (entry_bytes(1, (2,), 0, -8), "no negative"),
        (entry_bytes(1, (2,), 0, 8, shard=1), "shard 1"),
        (entry_bytes(1, (2,), 0, 8, shard=-1), "no negative"),
        (entry_bytes(1, (1,) * 40, 0, 4), "32 axes"),
        (protobuf.message(2, protobuf.number(3, 1)), "unknown rank"),
        (protobuf.message(1, b"x"), "wire type"),
        (b"\x08", "past the end"),
    ],
)
def test_forged_entries_are_refused_on_opening(tmp_path: Path, entry: bytes, message: str) -> None:
    data(tmp_path / "x").write_bytes(bytes(8))
    rebuild(tmp_path / "x", {b"": HEADER, b"a": entry})
    with pytest.raises(NeutralError, match=message):
        Bundle(tmp_path / "x")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({b"a": b""}, "no header"),
        ({b"": b""}, "0 shards"),
        ({b"": protobuf.number(1, 1 << 30)}, "shards"),
        ({b"": HEADER + protobuf.number(2, 2)}, "byte order"),
        ({b"": HEADER + protobuf.message(3, protobuf.number(2, 9))}, "version 9"),
        ({b"": protobuf.number(1, 2)}, "cannot be opened"),
        ({b"": HEADER, b"b": entry_bytes(1, (2,), 0, 8, CRC), b"a": entry_bytes(1, (2,), 0, 8, CRC)}, "out of order"),
        ({b"": HEADER, b"a": entry_bytes(1, (2,), 0, 8, CRC), b"b": entry_bytes(1, (1,), 4, 4)}, "two tensors at"),
        ({b"": HEADER, b"\0a": entry_bytes(1, (2,), 0, 8, CRC)}, "slices of no tensor"),
        ({b"": HEADER, b"\xff": entry_bytes(1, (2,), 0, 8, CRC)}, "UTF-8"),
    ],
)
def test_forged_tables_are_refused(tmp_path: Path, entries: dict[bytes, bytes], message: str) -> None:
    data(tmp_path / "x").write_bytes(bytes(8))
    rebuild(tmp_path / "x", entries)
    with pytest.raises(NeutralError, match=message):
        Bundle(tmp_path / "x")


def sliced(*boxes: tuple[int, int]) -> bytes:
    parts = (
        protobuf.message(1, protobuf.number(1, start) + protobuf.varint(16) + protobuf.varint(n)) for start, n in boxes
    )
    dims = protobuf.message(2, protobuf.number(1, 2))
    return protobuf.number(1, 1) + protobuf.message(2, dims) + b"".join(protobuf.message(7, part) for part in parts)


@pytest.mark.parametrize(
    ("boxes", "pieces", "message"),
    [
        ([(0, 1)], [(0, 1)], "tile"),
        ([(0, 1), (0, 1)], [(0, 1)], "tile"),
        ([(0, 2), (1, 1)], [(0, 2), (1, 1)], "tile"),
        ([(0, 1), (1, 1)], [(0, 1)], "no entry for a slice"),
        ([(0, 3)], [(0, 3)], "one inside"),
        ([(-1, 2)], [(-1, 2)], "one inside"),
        ([(1, HUGE)], [], "one inside"),
    ],
)
def test_slices_that_do_not_tile_are_refused(
    tmp_path: Path, boxes: list[tuple[int, int]], pieces: list[tuple[int, int]], message: str
) -> None:
    data(tmp_path / "x").write_bytes(bytes(64))
    entries = {b"": HEADER}
    for i, (start, length) in enumerate(pieces):
        part = Slice(((start, start + length),), (length,))
        crc = masked(crc32c(bytes(4 * length)))
        entries[piece_key("a", part)] = entry_bytes(1, (length,), 16 * i, 4 * length, crc)
    rebuild(tmp_path / "x", dict(sorted(entries.items())) | {b"a": sliced(*boxes)})
    with pytest.raises(BadFile, match=message):
        Bundle(tmp_path / "x")


def test_a_compressed_block_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    """A snappy bomb: whatever the block holds, it is not inflated."""
    data(tmp_path / "x").write_bytes(bytes(8))
    rebuild(tmp_path / "x", {b"": HEADER}, kind=1)
    with pytest.raises(Unsupported, match="compressed"):
        Bundle(tmp_path / "x")


def test_flipped_data_is_refused_when_read(prefix: Path) -> None:
    with Bundle(prefix) as bundle:
        offset = bundle.entries["a/kernel"].offset
    raw = bytearray(data(prefix).read_bytes())
    raw[offset + 9] ^= 1
    data(prefix).write_bytes(raw)
    with Bundle(prefix) as bundle:
        assert bundle.tensor("a/bias").read().shape == (5,)
        with pytest.raises(BadFile, match="checksum"):
            bundle.tensor("a/kernel").read()
        with pytest.raises(BadFile, match="checksum"):
            bundle.tensor("a/kernel").block([(0, 1), (0, 1)])
        with pytest.raises(BadFile, match="checksum"):
            list(bundle.tensor("a/kernel").permute((1, 0)).tiles(8))


@pytest.mark.parametrize("lengths", [(1, 3), (2, 1), (200, 0), (1 << 40, 1)])
def test_forged_strings_are_refused(tmp_path: Path, lengths: tuple[int, int]) -> None:
    body = b"".join(protobuf.varint(n) for n in lengths)
    raw = body + masked(crc32c(struct.pack("<2I", *(n & 0xFFFFFFFF for n in lengths)))).to_bytes(4, "little") + b"xyz"
    data(tmp_path / "x").write_bytes(raw)
    rebuild(tmp_path / "x", {b"": HEADER, b"a": entry_bytes(7, (2,), 0, len(raw))})
    with Bundle(tmp_path / "x") as bundle, pytest.raises(BadFile):
        bundle.strings("a")


def test_endless_strings_are_refused(tmp_path: Path) -> None:
    data(tmp_path / "x").write_bytes(bytes(100))
    rebuild(tmp_path / "x", {b"": HEADER, b"a": entry_bytes(7, (1 << 50,), 0, 100)})
    with Bundle(tmp_path / "x") as bundle, pytest.raises(BadFile, match="strings in"):
        bundle.strings("a")


def test_every_truncation_is_refused(prefix: Path) -> None:
    whole_index, whole_data = index(prefix).read_bytes(), data(prefix).read_bytes()
    for length in range(len(whole_index)):
        index(prefix).write_bytes(whole_index[:length])
        with pytest.raises(NeutralError):
            Bundle(prefix)
    index(prefix).write_bytes(whole_index)
    for length in range(len(whole_data)):
        data(prefix).write_bytes(whole_data[:length])
        with pytest.raises(BadFile):
            Bundle(prefix)


def test_every_flipped_byte_of_the_index_is_refused(prefix: Path) -> None:
    whole = index(prefix).read_bytes()
    for at in range(len(whole)):
        index(prefix).write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with pytest.raises(NeutralError):
            Bundle(prefix)


def test_mutations_behind_good_checksums_are_read_or_refused(tmp_path: Path) -> None:
    """Random damage to the entries themselves, the checksums of the blocks renewed."""
    rng = random.Random(3)
    raw = bytes(range(64))
    data(tmp_path / "x").write_bytes(raw)
    part = Slice(((0, 2),), (2,))
    good = {
        b"": HEADER + protobuf.message(3, protobuf.number(1, 1)),
        piece_key("s", part): entry_bytes(1, (2,), 40, 8, masked(crc32c(raw[40:48]))),
        b"a": entry_bytes(1, (2, 3), 0, 24, masked(crc32c(raw[:24]))),
        b"s": sliced((0, 2)),
        b"t": entry_bytes(7, (2,), 24, 16, 7),
    }
    refused = 0
    for _ in range(3000):
        body = bytearray(table(good))
        end = body.index(struct.pack("<2I", 0, 1))
        for _ in range(rng.randint(1, 3)):
            body[rng.randrange(end)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        body[end + 9 : end + 13] = masked(crc32c(bytes(body[: end + 9]))).to_bytes(4, "little")
        index(tmp_path / "x").write_bytes(body)
        try:
            with Bundle(tmp_path / "x") as bundle:
                for key in bundle.entries:
                    if bundle.readable(key):
                        bundle.tensor(key).read()
                    else:
                        bundle.strings(key)
        except NeutralError:
            refused += 1
    assert refused > 2000


@pytest.mark.parametrize("name", ["no such", "folder"])
def test_what_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.index").mkdir()
    with pytest.raises(BadFile):
        Bundle(tmp_path / name)
    (tmp_path / "zeros.index").write_bytes(bytes(1000))
    with pytest.raises(BadFile, match="footer"):
        Bundle(tmp_path / "zeros")
