"""Hostile files of torch: pickles that call, bombs, forged tensors, tricks of zip, the legacy format, TorchScript."""

from __future__ import annotations

import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.containers.test_torch_file import BAD_LEGACY, FORGED, MAGIC, archive, one, tensor, text
from tests.hostile.commands import Commands, refused
from tests.hostile.making import with_members
from tests.hostile.sources import Row, every_command

GOOD = one(tensor([4, 4], [4, 1]))
TOUCH = text("touch MARK")
CALL = b"cposix\nsystem\n" + TOUCH + b"\x85R"

CODE = {
    "REDUCE": b"\x80\x02" + CALL + b".",
    "REDUCE of a builtin": b"\x80\x02cbuiltins\nexec\n" + text("open('MARK', 'w')") + b"\x85R.",
    "INST": b"(" + b"S'touch MARK'\niposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\n" + TOUCH + b"o.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + TOUCH + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93" + TOUCH + b"\x85}\x92.",
    "STACK_GLOBAL with a dotted name": b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93" + TOUCH + b"\x85R.",
    "before good data": GOOD[:2] + CALL + b"0" + GOOD[2:],
    "after good data": GOOD[:-1] + CALL + b"0.",
    "beside good data": GOOD[:-1] + text("x") + CALL + b"s.",
    "BUILD": GOOD[:-1] + text("x") + b"cposix\nsystem\n" + TOUCH + b"bs.",
    "_load_from_bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\nB"
    + struct.pack("<I", len(CALL) + 1) + CALL + b"." + b"\x85R.",
}  # fmt: skip

BOMBS = {
    "deep key": b"})" + b"\x85" * 10**6 + b"K\x01s.",
    "laughing key": b"})" + b"q\0h\0\x86" * 200 + b"K\x01s.",
    "memo of 2^28": b"Nr\0\0\0\x10.",
    "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "5 million marks": b"(" * 5_000_000 + b".",
    "integer of 2^31 bytes": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "deep list": b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
}

Make = Callable[[Path, Path], Path]


def pickled(data: bytes) -> Make:
    return lambda good, folder: archive(folder / "x.pt", data)


def changed(**members: bytes | None) -> Make:
    """The good file with members changed; `data_0` is data/0."""
    names = {name.replace("_", "/", 1): data for name, data in members.items()}
    return lambda good, folder: with_members(good / "model.pt", folder / "x.pt", names, "model/")


def bytes_changed(change: Callable[[bytearray], object], source: str = "model.pt") -> Make:
    def make(good: Path, folder: Path) -> Path:
        data = bytearray((good / source).read_bytes())
        change(data)
        (folder / "x.pt").write_bytes(data)
        return folder / "x.pt"

    return make


def written(data: bytes) -> Make:
    def make(good: Path, folder: Path) -> Path:
        (folder / "x.pt").write_bytes(data)
        return folder / "x.pt"

    return make


def flip_central(data: bytearray, place: int, value: int) -> None:
    """Set 16 bits of the first entry of the central directory."""
    struct.pack_into("<H", data, data.index(b"PK\x01\x02") + place, value)


def twice(good: Path, folder: Path) -> Path:
    with_members(good / "model.pt", folder / "x.pt", {"data/9": b"x" * 20}, "model/")
    data = (folder / "x.pt").read_bytes()
    (folder / "x.pt").write_bytes(data.replace(b"model/data/9", b"model/data/0"))
    return folder / "x.pt"


def deflate_bomb(good: Path, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("archive/data.pkl", "w", force_zip64=True) as record:
            for _ in range(700):
                record.write(bytes(1 << 20))
        file.writestr("archive/data/0", bytes(64))
        file.writestr("archive/version", b"3\n")
    return folder / "x.pt"


def old_tar(good: Path, folder: Path) -> Path:
    with tarfile.open(folder / "x.pt", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return folder / "x.pt"


def legacy_with_code(good: Path, folder: Path) -> Path:
    data = (good / "legacy.pt").read_bytes()
    start = data.index(b"ctorch.nn.modules.container\nSequential\n")
    return written(data[:start] + CALL + b"0" + data[start:])(good, folder)


def module_without_tensors(good: Path, folder: Path) -> Path:
    return pickled(b"\x80\x02cmy.net\nNet\n)\x81}" + text("_modules") + b"}sb.")(good, folder)


ROWS = (
    *(Row(f"code: {name}", pickled(data), "runs code") for name, data in CODE.items()),
    *(Row(f"bomb: {name}", pickled(data), slow=True) for name, data in BOMBS.items()),
    *(Row(f"forged: {name}", pickled(one(data))) for name, data in FORGED.items()),
    *(Row(f"legacy: {name}", written(data)) for name, data in BAD_LEGACY.items()),
    Row("stride 0 of 4 TB", pickled(one(tensor([1 << 40], [0]))), "many times larger"),
    Row("no tensor", pickled(b"\x80\x02}."), "no set of weights"),
    Row("module without tensors", module_without_tensors),
    Row("bytes after the pickle", pickled(GOOD + CALL + b"."), "after the pickle"),
    Row("record left out", changed(data_0=None), "record"),
    Row("record too short", changed(data_0=bytes(4))),
    Row("record too long", changed(data_0=bytes(400))),
    Row("big-endian by its own word only", changed(byteorder=b"middle")),
    Row("duplicate record", twice, "two members"),
    Row("two roots", lambda good, folder: with_members(good / "model.pt", folder / "x.pt", {"second/data.pkl": b"N."}), "two"),
    Row("encrypted", bytes_changed(lambda data: flip_central(data, 8, 1)), "encrypted"),
    Row("unknown compression", bytes_changed(lambda data: flip_central(data, 10, 12)), "compression"),
    Row("other name in front", bytes_changed(lambda data: data.__setitem__(30, data[30] ^ 1)), "another name"),
    Row("truncated", bytes_changed(lambda data: data.__delitem__(slice(len(data) // 2, None)))),
    Row("trailing bytes", bytes_changed(lambda data: data.extend(b"x"))),
    Row("deflate bomb", deflate_bomb, slow=True),
    Row("tar", old_tar, "tar"),
    Row("a .pt2", lambda good, folder: with_members(good / "model.pt", folder / "x.pt", {"data.pkl": None, "archive_format": b"pt2"}, "model/")),
    Row("legacy with code", legacy_with_code, "runs code"),
    Row("legacy cut", bytes_changed(lambda data: data.__delitem__(slice(-3, None)), "legacy.pt")),
    Row("legacy with trailing bytes", bytes_changed(lambda data: data.extend(b"x"), "legacy.pt")),
    Row("legacy magic alone", written(MAGIC)),
    Row("a pickle that torch did not write", written(pickle.dumps({"a": 1}))),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".pt")


@pytest.mark.parametrize("format", ["model.pt", "scripted.pt"])
def test_a_flipped_bit_of_a_weight_that_torch_reads(format: str, run: Commands, good: Path, tmp_path: Path) -> None:
    import torch

    data = bytearray((good / format).read_bytes())
    state = torch.load(good / "state.pt", weights_only=True)
    data[data.index(state["0.weight"].numpy().tobytes()) + 7] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    for command in (["export", "x.pt"], ["show", "x.pt"], ["digest", "x.pt"], ["convert", "x.pt", "out.npz"]):
        refused(run, tmp_path, command, "CRC")


def test_code_of_torchscript_is_not_run(run: Commands, good: Path, tmp_path: Path) -> None:
    """The weights are read; the code of `__setstate__` and `forward`, whatever it says, is text."""
    with zipfile.ZipFile(good / "scripted.pt") as file:
        name = next(name for name in file.namelist() if "/code/" in name and name.endswith(".py"))
        code = file.read(name)
    hostile = code + b"\n  def __setstate__(self, state: int) -> None:\n    ops.os.system('touch MARK')\n"
    with_members(good / "scripted.pt", tmp_path / "x.pt", {name: hostile})
    first, second = run(tmp_path, "digest", "x.pt"), run(tmp_path, "digest", good / "scripted.pt")
    assert (first.status, first.out) == (0, second.out)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_names_cannot_write_on_the_terminal(run: Commands, good: Path, tmp_path: Path) -> None:
    name = "\x1b[2J\nneutral: everything is fine\r" + "x" * 5000
    archive(tmp_path / "x.pt", b"\x80\x02}" + text(name) + tensor([1 << 40], [0]) + b"s.")
    assert len(refused(run, tmp_path, ["show", "x.pt"], "\\x1b[2J\\n")) < 2000


def test_one_storage_of_many_large_views(run: Commands, good: Path, tmp_path: Path) -> None:
    """Views of one record of 64 bytes, each of a megabyte and of another shape."""
    views = b"".join(text(f"w{i}") + tensor([(1 << 18) + i], [0]) + b"s" for i in range(2000))
    archive(tmp_path / "x.pt", b"\x80\x02}" + views + b".")
    refused(run, tmp_path, ["export", "x.pt"], "many times larger")
