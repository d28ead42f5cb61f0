"""Hostile and ordinary HDF5 files. Nothing outside a file is ever opened; nothing is read that was not checked."""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest

from neutral.containers import hdf5
from neutral.containers.files import Memory, SourceFile, new_file
from neutral.containers.hdf5 import Hdf5Source, Hdf5Tree, fill_hdf5, in_place, open_hdf5, plan_hdf5
from neutral.errors import BadFile, Refused
from neutral.native import from_array


def opened(path: Path) -> Hdf5Source:
    file = SourceFile(path)
    return open_hdf5(file.section(0, file.size), path.name)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", ">i4", "|u1", "|b1"])
@pytest.mark.parametrize(
    "packing", [{}, {"chunks": (2, 3)}, {"chunks": (2, 3), "compression": 4, "shuffle": True, "fletcher32": True}]
)
def test_elements_are_those_h5py_reads(tmp_path: Path, dtype: str, packing: dict[str, Any]) -> None:
    array = (np.random.default_rng(0).normal(size=(5, 7)) * 50).astype(dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("a/b", data=array, **packing)
        file["scalar"] = array.dtype.type(3)
        file["empty"] = array[:0]
    source = opened(tmp_path / "x.h5")
    assert np.array_equal(source.tensor("a/b").read(), array)
    assert np.array_equal(source.tensor("a/b").block([(1, 4), (2, 6)]), array[1:4, 2:6])
    assert source.tensor("a/b").dtype == array.dtype.newbyteorder("=")
    assert source.tensor("scalar").read() == array.dtype.type(3) and source.tensor("scalar").shape == ()
    assert source.tensor("empty").read().shape == (0, 7)


def test_compact_datasets_and_attributes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3,))
        dataset = h5py.h5d.create(file.id, b"compact", h5py.h5t.NATIVE_INT32, space, dcpl=plist)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([1, 2, 3], np.int32))
        file.attrs["text"], file.attrs["bytes"], file.attrs["number"] = "é", np.bytes_(b"x"), 7
        file.attrs["names"] = np.array([b"a", b"bc"])
        file.attrs["none"] = np.array([])
        file.attrs["reference"] = file["compact"].ref
    source = opened(tmp_path / "x.h5")
    assert source.tensor("compact").read().tolist() == [1, 2, 3]
    assert source.groups[""] == {"text": "é", "bytes": "x", "number": 7, "names": ["a", "bc"], "none": []}


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn"])
def test_types_hdf5_has_no_name_for(name: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, name))
    data = b"".join(plan_hdf5(Hdf5Tree(datasets={"a": from_array(array)})).chunks())
    tensor = open_hdf5(Memory(data), "x").tensor("a")
    assert tensor.dtype == array.dtype and np.array_equal(tensor.read(), array)


def test_opaque_bytes_without_a_known_name_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = np.zeros(3, "V2")
    with pytest.raises(BadFile, match="opaque elements of 2 bytes"):
        opened(tmp_path / "x.h5")


def external_link(file: h5py.File, other: Path) -> None:
    file["a"] = h5py.ExternalLink(str(other), "secret")


def soft_link(file: h5py.File, other: Path) -> None:
    file["a"] = h5py.SoftLink("/b")


def external_storage(file: h5py.File, other: Path) -> None:
    file.create_dataset("a", shape=(4,), dtype="u1", external=[(str(other), 0, 4)])


def virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout(shape=(4,), dtype="u1")
    layout[:] = h5py.VirtualSource(str(other), "secret", shape=(4,))
    file.create_virtual_dataset("a", layout)


def four_tebibytes(file: h5py.File, other: Path) -> None:
    file.create_dataset("a", shape=(1 << 40,), chunks=(1 << 20,), dtype="f4")


def unwritten(file: h5py.File, other: Path) -> None:
    file.create_dataset("a", shape=(1 << 40,), dtype="f4")


def cycle(file: h5py.File, other: Path) -> None:
    group = file.create_group("g")
    group["self"] = group


def deep(file: h5py.File, other: Path) -> None:
    group = file
    for _ in range(3000):
        group = group.create_group("g")


def strings(file: h5py.File, other: Path) -> None:
    file["a"] = ["text"]


def fixed_strings(file: h5py.File, other: Path) -> None:
    file["a"] = np.array([b"text"])


def references(file: h5py.File, other: Path) -> None:
    file.create_dataset("a", data=np.array([file.ref], h5py.ref_dtype))


def compound(file: h5py.File, other: Path) -> None:
    file["a"] = np.zeros(2, [("x", "f4"), ("y", "i4")])


def variable_length(file: h5py.File, other: Path) -> None:
    file.create_dataset("a", shape=(2,), dtype=h5py.vlen_dtype("i4"))


def named_type(file: h5py.File, other: Path) -> None:
    file["a"] = np.dtype("f4")


def enumeration(file: h5py.File, other: Path) -> None:
    file.create_dataset("a", data=[0, 1], dtype=h5py.enum_dtype({"X": 0, "Y": 1}, "i4"))


def odd_float(file: h5py.File, other: Path) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 10, 5, 0, 10)
    kind.set_size(2)
    h5py.h5d.create(file.id, b"a", kind, h5py.h5s.create_simple((2,)))


def other_filter(file: h5py.File, other: Path) -> None:
    file.create_dataset("a", data=np.zeros((4, 4)), compression="lzf")


def gzip_bomb(file: h5py.File, other: Path) -> None:
    dataset = file.create_dataset("a", shape=(1 << 28,), chunks=(1 << 28,), dtype="u1", compression=9)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    dataset.id.write_direct_chunk((0,), packed)


def many_members(file: h5py.File, other: Path) -> None:
    group = file.create_group("g")
    target = group.create_group("x")
    for i in range(hdf5_limit() + 1):
        h5py.h5o.link(target.id, group.id, b"%d" % i)


def hdf5_limit() -> int:
    from neutral.containers import hdf5_probe

    return hdf5_probe.MOST_LINKS


def two_names_of_a_group(file: h5py.File, other: Path) -> None:
    file["a"] = file.create_group("b")


HOSTILE = [
    (external_link, "a link to another file"),
    (soft_link, "a soft link"),
    (external_storage, "elements stored in another file"),
    (virtual, "a virtual dataset"),
    (four_tebibytes, "0 of 1048576 chunks"),
    (unwritten, "never written"),
    (cycle, "a group linked twice"),
    (two_names_of_a_group, "a group linked twice"),
    (deep, "nested deeper than 64"),
    (strings, "class string"),
    (fixed_strings, "class string"),
    (references, "class reference"),
    (compound, "class compound"),
    (variable_length, "class variable length"),
    (named_type, "a named type"),
    (enumeration, "class enumeration"),
    (odd_float, "float of an unusual form"),
    (other_filter, "HDF5 filter 32000"),
    (gzip_bomb, "a packed chunk of 268435456 bytes"),
]


@pytest.mark.parametrize(("make", "reason"), HOSTILE, ids=[make.__name__ for make, _ in HOSTILE])
def test_hostile_structures_are_refused(tmp_path: Path, make: Callable[[h5py.File, Path], None], reason: str) -> None:
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["secret"] = np.arange(4, dtype="u1")
    os.utime(other, (1, 1))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        make(file, other)
    started = time.monotonic()
    with pytest.raises(BadFile, match=reason) as caught:
        opened(tmp_path / "x.h5")
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    assert other.stat().st_atime == 1 or "noatime" in Path("/proc/mounts").read_text()


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neutral.containers.hdf5_probe.MOST_LINKS", 50)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        many_members(file, tmp_path)
    with pytest.raises(BadFile, match="more than 50 groups and datasets"):
        opened(tmp_path / "x.h5")


def test_two_names_of_a_dataset_are_one_tie(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = np.arange(4.0)
        file["b"] = file["a"]
        file["c"] = np.arange(4.0)
    datasets = opened(tmp_path / "x.h5").datasets
    assert datasets["a"].address == datasets["b"].address != datasets["c"].address


def test_overlapping_elements_are_refused(tmp_path: Path) -> None:
    tree = Hdf5Tree(datasets={"a": from_array(np.full(600, 7.0)), "b": from_array(np.full(600, 8.0))})
    data = bytearray(b"".join(plan_hdf5(tree).chunks()))
    (first, length), (second, _) = (open_hdf5(Memory(bytes(data)), "x").datasets[name].spans[0] for name in "ab")
    place = data.index(second.to_bytes(8, "little") + length.to_bytes(8, "little"))
    data[place : place + 8] = (first + 8).to_bytes(8, "little")
    with pytest.raises(BadFile, match="overlap"):
        open_hdf5(Memory(bytes(data)), "x")


def test_a_file_cut_short_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    tree = Hdf5Tree({"g": {"name": "n"}}, {"g/a": from_array(np.arange(300.0)), "g/b": from_array(np.arange(9.0))})
    data = b"".join(plan_hdf5(tree).chunks())
    for size in [0, 7, 8, 95, 96, *range(100, len(data), 397), len(data) - 1]:
        with pytest.raises(BadFile):
            open_hdf5(Memory(data[:size]), "x")


def test_a_hanging_or_crashing_libhdf5_is_a_bad_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(plan_hdf5(Hdf5Tree(datasets={"a": from_array(np.zeros(3))})).chunks())
    monkeypatch.setattr("neutral.containers.hdf5_probe.SECONDS", 1)
    monkeypatch.setattr("neutral.containers.hdf5_probe._walk", lambda *_: time.sleep(60))
    with pytest.raises(BadFile, match="HDF5 structure"):
        open_hdf5(Memory(data), "x")
    monkeypatch.setattr("neutral.containers.hdf5_probe._walk", lambda *_: os.kill(os.getpid(), 11))
    with pytest.raises(BadFile, match="libhdf5 fails"):
        open_hdf5(Memory(data), "x")


def test_the_child_cannot_open_files_nor_take_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(plan_hdf5(Hdf5Tree(datasets={"a": from_array(np.zeros(3))})).chunks())
    marker = tmp_path / "marker"
    attempts = [lambda: marker.write_text("x"), lambda: np.ones(1 << 28)]
    for attempt in attempts:
        monkeypatch.setattr(
            "neutral.containers.hdf5_probe._walk", lambda *_, a=attempt: a() and {"groups": {}, "datasets": []}
        )
        with pytest.raises(BadFile):
            open_hdf5(Memory(data), "x")
    assert not marker.exists()


def test_flipped_bytes_are_refused_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neutral.containers.hdf5_probe.SECONDS", 1)  # one of these files makes libhdf5 hang
    tree = Hdf5Tree({"g": {"name": "n"}}, {"g/a": from_array(np.arange(30.0)), "h/b": from_array(np.arange(9.0))})
    data = b"".join(plan_hdf5(tree).chunks())
    random_ = random.Random(1)
    outcomes = set()
    for _ in range(80):
        flipped = bytearray(data)
        for _ in range(random_.choice([1, 1, 4])):
            flipped[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        try:
            source = open_hdf5(Memory(bytes(flipped)), "x")
            for path in source.datasets:
                source.tensor(path).read()
            outcomes.add("read")
        except BadFile as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_damaged_chunk_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("a", data=np.arange(1000.0), chunks=(1000,), fletcher32=True)
        file.create_dataset("b", data=np.arange(1000.0), chunks=(1000,), compression=9)
    source = opened(tmp_path / "x.h5")
    data = bytearray((tmp_path / "x.h5").read_bytes())
    for name, reason in (("a", "checksum is wrong"), ("b", "does not unpack")):
        offset, length = source.datasets[name].spans[0]
        data[offset + length // 2] ^= 0xFF
        with pytest.raises(BadFile, match=reason):
            open_hdf5(Memory(bytes(data)), "x").tensor(name).read()


def test_a_file_that_shrinks_is_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(b"".join(plan_hdf5(Hdf5Tree(datasets={"a": from_array(np.zeros(9000))})).chunks()))
    tensor = opened(path).tensor("a")
    os.truncate(path, 4096)
    with pytest.raises(BadFile, match="end of the file"):
        tensor.read()


def test_new_files_are_the_same_bytes_each_time_and_h5py_reads_them(tmp_path: Path) -> None:
    arrays = {
        "z/deep/er": np.arange(24.0).reshape(2, 3, 4),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
        "half": np.arange(4, dtype=np.float16),
    }
    tree = Hdf5Tree(
        {"": {"config": "{}"}, "z": {"names": ["a", "bc"], "none": []}}, {k: from_array(v) for k, v in arrays.items()}
    )
    first = b"".join(plan_hdf5(tree).chunks())
    time.sleep(1.1)
    plan = plan_hdf5(tree)
    assert b"".join(plan.chunks()) == first and plan.size == len(first)
    (tmp_path / "x.h5").write_bytes(first)
    with h5py.File(tmp_path / "x.h5") as file:
        for name, array in arrays.items():
            assert np.array_equal(file[name][()], array) and file[name].dtype == array.dtype
        assert file.attrs["config"] == "{}" and list(file["z"].attrs["names"]) == [b"a", b"bc"]
        assert list(file["z"].attrs["none"]) == []
    source = opened(tmp_path / "x.h5")
    assert all(np.array_equal(source.tensor(name).read(), array) for name, array in arrays.items())


def test_filling_replaces_the_elements_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["plain"] = np.arange(600.0)
        file["big-endian"] = np.arange(4, dtype=">f4")
        file["scalar"] = 1.0
        file.create_dataset("packed", data=np.arange(100.0).reshape(10, 10), chunks=(3, 4), compression=4)
        file["kept"] = np.arange(5)
        file.attrs["a"] = "b"
    source = opened(path)
    new = {"plain": np.arange(600.0)[::-1], "scalar": np.array(2.0)}
    with new_file(tmp_path / "plain.h5") as out:
        fill_hdf5(source, {name: from_array(array) for name, array in new.items()}, out)
    before, after = path.read_bytes(), (tmp_path / "plain.h5").read_bytes()
    changed = {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
    spans = [range(start, start + length) for name in new for start, length in source.datasets[name].spans]
    assert changed and all(any(i in span for span in spans) for i in changed)
    new |= {"packed": np.random.default_rng(0).normal(size=(10, 10)), "big-endian": np.arange(4, 8, dtype="f4")}
    assert not in_place(source, ["packed"]) and not in_place(source, ["big-endian"])
    with new_file(tmp_path / "all.h5") as out:
        fill_hdf5(source, {name: from_array(array) for name, array in new.items()}, out)
    filled = opened(tmp_path / "all.h5")
    for name, array in new.items():
        assert np.array_equal(filled.tensor(name).read(), array), name
    assert np.array_equal(filled.tensor("kept").read(), np.arange(5)) and filled.groups[""] == {"a": "b"}


def test_filling_with_another_shape_or_type_is_refused(tmp_path: Path) -> None:
    source = open_hdf5(
        Memory(b"".join(plan_hdf5(Hdf5Tree(datasets={"a": from_array(np.zeros((2, 3)))})).chunks())), "x"
    )
    for wrong in (np.zeros((3, 2)), np.zeros((2, 3), np.float32)):
        with pytest.raises(Refused, match="nothing was written"), new_file(tmp_path / "out.h5") as out:
            fill_hdf5(source, {"a": from_array(wrong)}, out)
    assert list(tmp_path.iterdir()) == []


def test_names_are_sorted_by_their_numbers() -> None:
    names = ["dense_10/vars/0", "dense_2/vars/10", "dense_2/vars/9", "dense/vars/0", "conv/vars/0", "dense_1/vars/0"]
    expected = ["conv/vars/0", "dense/vars/0", "dense_1/vars/0", "dense_2/vars/9", "dense_2/vars/10", "dense_10/vars/0"]
    assert sorted(names, key=hdf5.natural) == expected
