"""Files of torch.save as bytes, against the real torch, and files made to harm."""

from __future__ import annotations

import io
import pickle
import random
import struct
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from neutral.containers.files import new_file
from neutral.containers.pickle_machine import items_of
from neutral.containers.torch_file import MAGIC, TorchFile
from neutral.containers.torch_filling import fill
from neutral.containers.torch_refs import DTYPES, TensorRef
from neutral.containers.torch_tree import weight_sets
from neutral.containers.torch_writing import write_state_dict
from neutral.containers.zip_writing import NewMember, write_zip
from neutral.errors import BadFile, NeutralError, Refused, Unsupported
from neutral.native import from_array

LEGACY = {"_use_new_zipfile_serialization": False}


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(10, 10)
    weight = torch.randn(3, 4)
    kinds = {
        "plain": weight,
        "tied": weight,
        "transposed": torch.randn(4, 6).t(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(5),
        "empty": torch.empty(0, 3),
        "slice": base[2:5, 1:4],
        "rows": base[6:],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "conjugate": torch.randn(3, dtype=torch.cfloat).conj(),
        "negative": torch.randn(3, dtype=torch.cfloat).conj().imag,
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    for name in DTYPES:
        kinds[name] = torch.arange(1, 7).to(torch.float32).reshape(2, 3).to(getattr(torch, name))
    return kinds


@pytest.fixture(params=["zip 2", "zip 4", "legacy"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    kinds = every_kind()
    path = tmp_path / "kinds.pt"
    if request.param == "legacy":
        # torch itself cannot load its newer dtypes from a legacy file.
        kinds = {name: t for name, t in kinds.items() if "float8" not in str(t.dtype) and "uint" not in str(t.dtype)}
        torch.save(kinds, path, **LEGACY)
    else:
        torch.save(kinds, path, pickle_protocol=int(request.param[-1]))
    return path, kinds


def refs(file: TorchFile) -> dict[str, TensorRef]:
    return dict(items_of(file.root) or {})


def test_every_tensor_has_the_bytes_that_torch_has(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, kinds = saved
    with TorchFile(path) as file:
        found = refs(file)
        assert list(found) == list(kinds)
        for name, ref in found.items():
            data = file.tensor(ref, name)
            assert data.shape == tuple(kinds[name].shape)
            assert str(kinds[name].dtype) == f"torch.{ref.dtype}" and data.dtype == DTYPES[ref.dtype]
            assert data.read().tobytes() == raw(kinds[name]), name
            assert b"".join(tile.tobytes() for tile in data.tiles(8)) == raw(kinds[name]), name
        identities = {name: file.identity(ref) for name, ref in found.items()}
        assert identities["plain"] == identities["tied"] is not None
        assert identities["empty"] is None
        others = [i for name, i in identities.items() if name not in ("tied", "empty")]
        assert len(set(others)) == len(others)


def test_filling_with_its_own_elements_gives_the_same_bytes(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = saved
    out = path.with_name("out.pt")
    with TorchFile(path) as file, new_file(out) as writer:
        fill(file, [(name, ref, from_array(file.tensor(ref).read())) for name, ref in refs(file).items()], writer)
    assert out.read_bytes() == path.read_bytes()


def test_filled_files_load_in_torch_with_the_new_elements(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, kinds = saved
    out = path.with_name("out.pt")
    rng = np.random.default_rng(1)
    new: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in kinds.items():
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        values = np.asarray(rng.integers(0, 2, tuple(tensor.shape))).astype(dtype)
        new[name] = (
            new["plain"]
            if name == "tied"
            else np.broadcast_to(values[:1], values.shape)
            if name == "expanded"
            else values
        )
    with TorchFile(path) as file, new_file(out) as writer:
        fill(file, [(name, ref, from_array(new[name])) for name, ref in refs(file).items()], writer)
    back = torch.load(out, weights_only=False)
    for name, tensor in back.items():
        assert raw(tensor) == np.ascontiguousarray(new[name]).tobytes(), name
        assert tensor.stride() == kinds[name].stride()
    untouched = back["slice"].untyped_storage().nbytes()
    assert untouched == kinds["slice"].untyped_storage().nbytes()


def test_bytes_between_the_tensors_stay(tmp_path: Path) -> None:
    base = torch.arange(100.0).reshape(10, 10)
    torch.save({"a": base[2:4], "b": base[6, 1:3], "c": base[0:1, ::2]}, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file, new_file(tmp_path / "y.pt") as writer:
        fill(file, [("a", refs(file)["a"], from_array(np.zeros((2, 10), np.float32)))], writer)
    back = torch.load(tmp_path / "y.pt", weights_only=True)
    whole = torch.empty(0).set_(back["a"].untyped_storage(), 0, (10, 10))
    expected = base.clone()
    expected[2:4] = 0
    assert torch.equal(whole, expected)
    with TorchFile(tmp_path / "x.pt") as file, new_file(tmp_path / "z.pt") as writer:
        fill(file, [("c", refs(file)["c"], from_array(np.full((1, 5), -1, np.float32)))], writer)
    back = torch.load(tmp_path / "z.pt", weights_only=True)
    assert back["c"].tolist() == [[-1.0] * 5] and back["a"].tolist() == base[2:4].tolist()


def test_ties_must_agree(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"a": weight, "b": weight, "t": weight.t(), "part": weight[1]}, tmp_path / "x.pt")
    one, other = np.eye(4, dtype=np.float32), np.ones((4, 4), np.float32)
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"a": one, "b": one.copy()}, True),
        ({"a": one, "b": other}, False),
        ({"a": one + 1, "t": (one + 1).T}, True),
        ({"a": np.triu(other), "t": np.triu(other)}, False),
        ({"a": one, "part": one[1]}, True),
        ({"a": one, "part": one[2]}, False),
    ]
    for number, (given, fits) in enumerate(cases):
        out = tmp_path / f"{number}.pt"
        with TorchFile(tmp_path / "x.pt") as file:
            entries = [(name, refs(file)[name], from_array(values)) for name, values in given.items()]
            if fits:
                with new_file(out) as writer:
                    fill(file, entries, writer)
                assert raw(torch.load(out, weights_only=True)["a"]) == given["a"].tobytes()
            else:
                with pytest.raises(Refused, match="differ"), new_file(out) as writer:
                    fill(file, entries, writer)
                assert not out.exists()


def test_other_shapes_and_dtypes_are_refused_all_at_once(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file, pytest.raises(Refused) as caught:
        fill(
            file,
            [
                ("a", refs(file)["a"], from_array(np.zeros(3, np.float32))),
                ("b", refs(file)["b"], from_array(np.zeros(3))),
            ],
            io.BytesIO(),
        )
    assert [p.where for p in caught.value.problems] == ["a", "b"]


def test_a_written_state_dict_loads_with_weights_only_and_mapped(tmp_path: Path) -> None:
    kinds = every_kind()
    torch.save(kinds, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file:
        entries = [(name, file.tensor(ref), file.identity(ref)) for name, ref in refs(file).items()]
        for name in ("one.pt", "two.pt"):
            with new_file(tmp_path / name) as writer:
                write_state_dict(writer, entries)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    for mapped in (False, True):
        back = torch.load(tmp_path / "one.pt", weights_only=True, mmap=mapped)
        assert type(back).__name__ == "OrderedDict" and list(back) == list(kinds)
        for name, tensor in back.items():
            assert (
                raw(tensor) == raw(kinds[name])
                and tensor.dtype == kinds[name].dtype
                and tensor.shape == kinds[name].shape
            )
        assert back["plain"].data_ptr() == back["tied"].data_ptr()
    with zipfile.ZipFile(tmp_path / "one.pt") as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
        assert sum("/data/" in name for name in archive.namelist()) == len(kinds) - 1


def test_what_torch_has_no_dtype_for_is_refused(tmp_path: Path) -> None:
    for dtype in (ml_dtypes.int4, ml_dtypes.float8_e3m4, np.dtype("S3")):
        with pytest.raises(Refused, match="dtype"):
            write_state_dict(io.BytesIO(), [("x", from_array(np.zeros(2, dtype)), None)])
    with pytest.raises(Refused, match="twice"):
        write_state_dict(io.BytesIO(), [("x", from_array(np.zeros(2)), None)] * 2)


def test_big_endian_files(tmp_path: Path) -> None:
    state = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "h": np.arange(5).astype(ml_dtypes.bfloat16),
        "c": np.array([1 + 2j, 3 - 4j], np.complex64),
        "i": np.array([1, 2], np.int64),
        "b": np.array([1, 2, 3], np.uint8),
    }
    plain = tmp_path / "little.pt"
    with new_file(plain) as writer:
        write_state_dict(writer, [(name, from_array(values), None) for name, values in state.items()])
    swapped = {f"archive/data/{i}": _swapped(values) for i, values in enumerate(state.values())} | {
        "archive/byteorder": b"big"
    }
    big = rewritten(plain, tmp_path / "big.pt", swapped)
    with TorchFile(big) as file:
        for name, ref in refs(file).items():
            assert file.tensor(ref).read().tobytes() == state[name].tobytes()
        new = {name: from_array(values[::-1].copy()) for name, values in state.items()}
        with new_file(tmp_path / "filled.pt") as writer:
            fill(file, [(name, ref, new[name]) for name, ref in refs(file).items()], writer)
    with zipfile.ZipFile(tmp_path / "filled.pt") as archive:
        for i, values in enumerate(state.values()):
            assert archive.read(f"archive/data/{i}") == _swapped(values[::-1].copy())
    torch.save({"f": torch.tensor([1.0, 2.0])}, tmp_path / "legacy.pt", **LEGACY)
    data = (tmp_path / "legacy.pt").read_bytes()
    data = data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    data = data[:-16] + data[-16:-8][::-1] + b"".join(data[i : i + 4][::-1] for i in (len(data) - 8, len(data) - 4))
    (tmp_path / "legacy.pt").write_bytes(data)
    with TorchFile(tmp_path / "legacy.pt") as file:
        assert file.big_endian and file.tensor(refs(file)["f"]).read().tolist() == [1.0, 2.0]


def _swapped(values: np.ndarray[Any, Any]) -> bytes:
    words = values.view(f"u{values.itemsize}") if values.dtype.kind == "V" else values
    return words.byteswap().tobytes()


def rewritten(source: Path, target: Path, changes: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, changes.get(name, old.read(name)))
        for name in changes.keys() - set(old.namelist()):
            new.writestr(name, changes[name])
    return target


def test_deflated_records_and_other_roots_are_legal(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "some name.pt")
    deflated = rewritten(tmp_path / "some name.pt", tmp_path / "x.pt", {}, zipfile.ZIP_DEFLATED)
    with TorchFile(deflated) as file:
        assert file.tensor(refs(file)["a"]).read()[999] == 999
        with new_file(tmp_path / "y.pt") as writer:
            fill(file, [("a", refs(file)["a"], from_array(np.zeros(1000, np.float32)))], writer)
    assert torch.load(tmp_path / "y.pt", weights_only=True)["a"].sum() == 0


# Hostile files


def archive(path: Path, pickled: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    records = {"0": bytes(64)} if records is None else records
    members = [
        ("archive/data.pkl", pickled),
        *((f"archive/data/{k}", v) for k, v in records.items()),
        ("archive/version", b"3\n"),
    ]
    buffer = io.BytesIO()
    write_zip(buffer, [NewMember(name, len(data), [data]) for name, data in members])
    path.write_bytes(buffer.getvalue())
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(
    shape: list[int], strides: list[int], offset: int = 0, count: int = 16, key: str = "0", cls: str = "FloatStorage"
) -> bytes:
    pid = b"(" + text("storage") + f"ctorch\n{cls}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    sizes = b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, strides)) + b"t"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + number(offset) + sizes + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def one(value: bytes) -> bytes:
    return b"\x80\x02}" + text("w") + value + b"s."


def read_all(path: Path) -> list[Any]:
    with TorchFile(path) as file:
        found = weight_sets(file.root).sets
        return [
            file.tensor(ref).read() for s in found for ref in s.tensors(str(path)).values() if type(ref) is TensorRef
        ]


def test_the_hand_made_file_is_good(tmp_path: Path) -> None:
    (values,) = read_all(archive(tmp_path / "x.pt", one(tensor([4, 4], [4, 1]))))
    assert values.shape == (4, 4)
    assert torch.load(tmp_path / "x.pt", weights_only=True)["w"].shape == (4, 4)


FORGED = {
    "shape beyond the storage": tensor([4, 5], [5, 1]),
    "offset beyond the storage": tensor([4, 4], [4, 1], offset=1),
    "offset of 2^62": tensor([1], [1], offset=1 << 62),
    "negative shape": tensor([-4, 4], [4, 1]),
    "negative stride": tensor([4, 4], [-4, 1], offset=15),
    "negative offset": tensor([4], [1], offset=-1),
    "shape of 2^62": tensor([1 << 62], [1]),
    "shape of 2^63": tensor([1 << 63], [0]),
    "product of 2^124": tensor([1 << 62, 1 << 62], [0, 0]),
    "fewer strides": tensor([4, 4], [1]),
    "40 axes": tensor([1] * 40, [1] * 40),
    "count unlike the record": tensor([4], [1], count=17),
    "count of 2^60": tensor([4], [1], count=1 << 60),
    "negative count": tensor([4], [1], count=-1),
    "no such record": tensor([4], [1], key="7"),
    "a path as key": tensor([4], [1], key="../version"),
    "no storage class": tensor([4], [1], cls="system"),
    "float shape": tensor([4], [1]).replace(number(4), b"G" + struct.pack(">d", 4.0), 1),
    "text shape": tensor([4], [1]).replace(number(4), text("4"), 1),
    "storage is a number": b"ctorch._utils\n_rebuild_tensor_v2\n(" + text("x") + b"tR",
    "unknown reference": text("x") + b"Q",
    "two sizes for one storage": b"(" + tensor([4], [1]) + tensor([4], [1], count=15) + b"t",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_tensors_are_refused(name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(BadFile) as caught:
        if not read_all(archive(tmp_path / "x.pt", one(FORGED[name]))):
            pytest.fail("read as a file without tensors")
    assert "\n" not in str(caught.value) and time.monotonic() - began < 5


MARK = "touch {}"


@pytest.mark.parametrize("where", ["before", "after", "instead"])
def test_code_is_not_run(where: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    call = b"cposix\nsystem\n" + text(f"touch {marker}") + b"\x85R"
    good = one(tensor([4], [1]))
    pickled = {"before": good[:2] + call + b"0" + good[2:], "after": good[:-1] + call + b"0.", "instead": call + b"."}[
        where
    ]
    with pytest.raises(BadFile, match=r"posix\.system"):
        TorchFile(archive(tmp_path / "x.pt", pickled))
    assert not marker.exists()


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.marker}",)


def test_code_in_files_that_torch_wrote_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for keywords in ({}, LEGACY):
        torch.save({"a": torch.zeros(2), "x": Runs(marker)}, tmp_path / "x.pt", **keywords)  # type: ignore[arg-type]
        with pytest.raises(BadFile, match="runs code"):
            TorchFile(tmp_path / "x.pt")
    assert not marker.exists()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    torch.save({"a": torch.arange(2000.0), "b": torch.arange(10.0)[2:5]}, tmp_path / "good.pt")
    return tmp_path / "good.pt"


def test_a_flipped_bit_in_a_record_is_refused_where_torch_reads_it(good: Path) -> None:
    data = bytearray(good.read_bytes())
    place = data.index(np.arange(1000, 1010, dtype=np.float32).tobytes())
    data[place] ^= 1
    good.write_bytes(data)
    torch.load(good, weights_only=True)
    with pytest.raises(BadFile, match="CRC"):
        read_all(good)


def test_a_flipped_bit_beside_a_view_is_refused(tmp_path: Path) -> None:
    torch.save({"b": torch.arange(1000.0)[:5]}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(np.arange(900, 910, dtype=np.float32).tobytes())] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(BadFile, match="CRC"):
        read_all(tmp_path / "x.pt")


def test_truncated_files_and_files_with_more_are_refused(good: Path) -> None:
    data = good.read_bytes()
    for changed in (data + b"x", *(data[:n] for n in range(0, len(data), 397))):
        good.write_bytes(changed)
        with pytest.raises(NeutralError):
            read_all(good)


def test_two_roots_other_zips_and_other_files_are_refused(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(good, "a") as file:
        file.writestr("second/data.pkl", b"N.")
    with pytest.raises(BadFile, match="two"):
        TorchFile(good)
    for content in (b"", b"PK\x03\x04", b"hello", pickle.dumps({"a": 1}), MAGIC[:-1], MAGIC):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(BadFile):
            TorchFile(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as file:
        file.writestr("a/archive_format", b"pt2")
    with pytest.raises(Unsupported, match="pt2"):
        TorchFile(tmp_path / "y.pt")
    import tarfile

    with tarfile.open(tmp_path / "z.pt", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(Unsupported, match="tar"):
        TorchFile(tmp_path / "z.pt")


def test_bytes_after_the_pickle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="after the pickle"):
        TorchFile(archive(tmp_path / "x.pt", one(tensor([4], [1])) + b"cos\nsystem\n."))


def test_a_deflate_bomb_is_refused_in_little_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", one(tensor([4], [1])))
        with file.open("archive/data/0", "w") as record:
            for _ in range(64):
                record.write(bytes(1 << 20))
    with pytest.raises(BadFile, match="bytes"):
        TorchFile(tmp_path / "x.pt")


# The legacy format


def legacy(pickled: bytes, keys: object, records: bytes, system: object = None, version: int = 1001) -> bytes:
    system = system if system is not None else {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    return MAGIC + b"." + pickle.dumps(version, 2) + pickle.dumps(system, 2) + pickled + pickle.dumps(keys, 2) + records


def legacy_tensor(count: int = 4, view: bytes = b"N") -> bytes:
    good = tensor([2], [1], count=count)
    return one(good.replace(b"tQ", view + b"tQ"))


RECORD = struct.pack("<q", 4) + np.arange(4, dtype=np.float32).tobytes()
VIEW = b"(" + text("v") + number(1) + number(2) + b"t"


def test_hand_made_legacy_files_are_good(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(legacy(legacy_tensor(), ["0"], RECORD))
    assert read_all(tmp_path / "x.pt")[0].tolist() == [0.0, 1.0]
    (tmp_path / "x.pt").write_bytes(legacy(legacy_tensor(view=VIEW), ["0"], RECORD))
    assert read_all(tmp_path / "x.pt")[0].tolist() == [1.0, 2.0]
    assert torch.load(tmp_path / "x.pt", weights_only=True)["w"].tolist() == [1.0, 2.0]


BAD_LEGACY = {
    "count of 2^40": legacy(legacy_tensor(1 << 40), ["0"], struct.pack("<q", 1 << 40) + bytes(16)),
    "count unlike the promise": legacy(legacy_tensor(), ["0"], struct.pack("<q", 3) + bytes(12)),
    "negative count": legacy(legacy_tensor(), ["0"], struct.pack("<q", -4) + bytes(16)),
    "trailing bytes": legacy(legacy_tensor(), ["0"], RECORD + b"x"),
    "cut": legacy(legacy_tensor(), ["0"], RECORD[:-1]),
    "no keys": legacy(legacy_tensor(), [], b""),
    "other keys": legacy(legacy_tensor(), ["1"], RECORD),
    "keys twice": legacy(legacy_tensor(), ["0", "0"], RECORD * 2),
    "keys no list": legacy(legacy_tensor(), "0", RECORD),
    "other version": legacy(legacy_tensor(), ["0"], RECORD, version=1002),
    "no byte order": legacy(legacy_tensor(), ["0"], RECORD, system={"protocol_version": 1001}),
    "view beyond": legacy(legacy_tensor(view=VIEW.replace(number(1), number(3))), ["0"], RECORD),
    "system with code": MAGIC + b"." + pickle.dumps(1001, 2) + b"cposix\nsystem\n.",
}


@pytest.mark.parametrize("name", BAD_LEGACY)
def test_bad_legacy_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(BAD_LEGACY[name])
    with pytest.raises(BadFile):
        read_all(tmp_path / "x.pt")


def test_mutated_files_give_tensors_or_one_kind_of_error(tmp_path: Path) -> None:
    rng = random.Random(7)
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 2), torch.nn.BatchNorm1d(3))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    with zipfile.ZipFile(buffer) as file:
        pickled = file.read("archive/data.pkl")
        records = {n.rpartition("/")[2]: file.read(n) for n in file.namelist() if "/data/" in n}
    old = io.BytesIO()
    torch.save(module.state_dict(), old, **LEGACY)  # type: ignore[arg-type]
    path = tmp_path / "x.pt"
    outcomes = {"read": 0, "refused": 0}
    for turn in range(900):
        data = bytearray(old.getvalue() if turn % 3 == 0 else buffer.getvalue() if turn % 3 == 1 else pickled)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        if turn % 3 == 2:
            archive(path, bytes(data), records)
        else:
            path.write_bytes(data)
        try:
            read_all(path)
            outcomes["read"] += 1
        except NeutralError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30


def test_no_flipped_bit_changes_a_weight(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    expected = [values.tobytes() for values in read_all(tmp_path / "x.pt")]
    refused = 0
    for place in range(0, len(data), 2):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (tmp_path / "y.pt").write_bytes(changed)
        try:
            assert [values.tobytes() for values in read_all(tmp_path / "y.pt")] == expected, place
        except NeutralError:
            refused += 1
    assert refused > 200


def test_reading_imports_no_torch(tmp_path: Path, good: Path) -> None:
    import subprocess

    code = (
        "import sys, pathlib; from neutral.exporters.torch import read; "
        f"m = read(pathlib.Path({str(good)!r})); assert len(list(m.tensors())) == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
