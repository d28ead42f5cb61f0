from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from neutral.containers.files import SourceFile
from neutral.containers.zip import ZipSource
from neutral.containers.zip_replacing import replace_members
from neutral.containers.zip_writing import NewMember, write_zip
from neutral.errors import BadFile, Refused, WrongUsage


def _opened(path: Path, data: bytes) -> ZipSource:
    path.write_bytes(data)
    return ZipSource(SourceFile(path))


def _all(source: ZipSource) -> dict[str, bytes]:
    return {name: source.read(name, 1 << 30) for name in source.members}


def _stored(source: ZipSource, name: str) -> bytes:
    storage = source.open(name)
    out = bytearray(storage.nbytes)
    storage.read_into(0, memoryview(out))
    return bytes(out)


def _plain(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as zipped:
        for name, data in members:
            zipped.writestr(zipfile.ZipInfo(name, (2001, 2, 3, 4, 5, 6)), data, method)
    return out.getvalue()


def _streamed(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip written to a pipe: data descriptors, and zip64 fields in the local headers."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", method) as zipped:  # type: ignore[arg-type]
        for name, data in members:
            with zipped.open(name, "w", force_zip64=name.startswith("wide")) as out:
                out.write(data)
    return bytes(pipe.data)


def _torch(**tensors: torch.Tensor) -> bytes:
    out = io.BytesIO()
    torch.save(tensors, out)
    return out.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "plain": lambda: _plain(("a", b"abc"), ("b/é", b""), ("c", bytes(range(256)) * 9)),
    "deflated": lambda: _plain(("a", b"abc"), ("b", bytes(70000)), ("e", b""), method=zipfile.ZIP_DEFLATED),
    "streamed": lambda: _streamed(("a", b"abc"), ("b", b""), ("wide", b"x" * 999), ("wide0", b"")),
    "streamed deflated": lambda: _streamed(("a", b"abc"), ("wide", bytes(5000)), method=zipfile.ZIP_DEFLATED),
    "torch": lambda: _torch(a=torch.arange(5.0), b=torch.arange(700)),
    "empty": lambda: _plain(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_zipfile_reads(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind]()
    source = _opened(tmp_path / "x", data)
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        expected = {name: zipped.read(name) for name in zipped.namelist()}
    assert list(source.members) == list(expected)
    assert _all(source) == expected
    for name, content in expected.items():
        source.verify(name)
        assert _stored(source, name) == content


@pytest.mark.parametrize("kind", KINDS)
def test_any_truncation_and_anything_behind_is_refused(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind]()
    for cut in {*range(min(len(data), 120)), *range(max(0, len(data) - 120), len(data))}:
        with pytest.raises(BadFile):
            _opened(tmp_path / "x", data[:cut])
    for tail in (b"x", b"\0" * 30, b"PK"):
        with pytest.raises(BadFile):
            _opened(tmp_path / "x", data + tail)
    with pytest.raises(BadFile):
        _opened(tmp_path / "x", b"#!" + data)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "empty"])
def test_a_flipped_bit_is_refused_or_changes_no_content(kind: str, tmp_path: Path) -> None:
    data = bytearray(KINDS[kind]())
    expected = _all(_opened(tmp_path / "x", bytes(data)))
    refused = 0
    for position in range(0, len(data), max(1, len(data) // 300)):
        data[position] ^= 1 << position % 8
        try:
            assert _all(_opened(tmp_path / "x", bytes(data))) == expected
        except BadFile as error:
            assert "\n" not in str(error)
            refused += 1
        data[position] ^= 1 << position % 8
    assert refused > 50


def _patched(data: bytes, place: int, layout: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, place, value)
    return bytes(changed)


def _central(data: bytes, index: int = 0) -> int:
    place = data.index(b"PK\x01\x02")
    for _ in range(index):
        place = data.index(b"PK\x01\x02", place + 4)
    return place


TWO = _plain(("a", b"abc"), ("b", b"defg"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(_plain(("a", b"1"), ("b", b"2")).replace(b"b", b"a"), "two members", id="duplicate"),
        pytest.param(_patched(_patched(TWO, _central(TWO) + 8, "<H", 1), 6, "<H", 1), "encrypted", id="encrypted"),
        pytest.param(_patched(TWO, 30, "B", ord("z")), "another name", id="local name"),
        pytest.param(_patched(TWO, 14, "<I", 7), "disagrees", id="local crc"),
        pytest.param(_patched(TWO, 18, "<I", 7), "disagrees", id="local size"),
        pytest.param(_patched(TWO, 8, "<H", 8), "disagrees", id="local method"),
        pytest.param(_patched(TWO, _central(TWO) + 42, "<I", 1 << 31), "in front of", id="offset outside"),
        pytest.param(_patched(TWO, _central(TWO) + 20, "<I", 1 << 31), "one size", id="two sizes"),
        pytest.param(_patched(TWO, _central(TWO) + 10, "<H", 12), "compression method 12", id="method"),
        pytest.param(_patched(TWO, len(TWO) - 12, "<H", 999), "disks", id="count here"),
        pytest.param(
            _patched(_patched(TWO, len(TWO) - 12, "<H", 999), len(TWO) - 14, "<H", 999), "999 members", id="count"
        ),
        pytest.param(_patched(TWO, len(TWO) - 6, "<I", 5), "central directory", id="directory offset"),
        pytest.param(_patched(TWO, len(TWO) - 18, "<H", 1), "disks", id="disk"),
        pytest.param(_patched(TWO, _central(TWO, 1) + 34, "<H", 1), "disks", id="member on another disk"),
        pytest.param(b"", "no zip end", id="nothing"),
        pytest.param(TWO.replace(b"b", b"\0"), "no NUL", id="name of NUL"),
    ],
)
def test_refuses(data: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=says):
        _opened(tmp_path / "x", data)


def test_refuses_overlapping_members(tmp_path: Path) -> None:
    inner = _plain(("b", b"hidden"))[: 31 + 6]
    data = bytearray(_plain(("a", inner), ("b", b"hidden")))
    struct.pack_into("<I", data, _central(bytes(data), 1) + 42, 31)
    with pytest.raises(BadFile, match="inside another"):
        _opened(tmp_path / "x", bytes(data))


def test_refuses_a_crc_flipped_in_all_three_readings(tmp_path: Path) -> None:
    data = bytearray(_plain(("a", bytes(100))))
    data[40] ^= 1
    source = _opened(tmp_path / "x", bytes(data))
    for reading in (source.verify, lambda name: source.read(name, 100), lambda name: _stored(source, name)):
        with pytest.raises(BadFile, match="CRC"):
            reading("a")
    storage = source.open("a")
    with pytest.raises(BadFile, match="CRC"):
        storage.read_into(50, memoryview(bytearray(10)))


def test_refuses_inflating_beyond_the_declared_size(tmp_path: Path) -> None:
    good = _plain(("a", bytes(40 << 20)), method=zipfile.ZIP_DEFLATED)
    for size, says in ((1000, "inflates to more"), (1 << 31, "times as many"), ((40 << 20) + 1, "inflates to")):
        data = _patched(_patched(good, 22, "<I", size), _central(good) + 24, "<I", size)
        source = _opened(tmp_path / "x", data)
        with pytest.raises(BadFile, match=says):
            source.read("a", 1 << 40)
        with pytest.raises(BadFile, match=says):
            _stored(source, "a") if size < 1 << 30 else source.open("a")


def test_a_large_compressed_member_is_read_from_anywhere(tmp_path: Path) -> None:
    content = np.random.default_rng(1).integers(0, 9, 10 << 20, dtype=np.uint8).tobytes()
    source = _opened(tmp_path / "x", _plain(("a", content), method=zipfile.ZIP_DEFLATED))
    storage = source.open("a")
    for offset in (9 << 20, 17, 5 << 20):
        out = bytearray(1000)
        storage.read_into(offset, memoryview(out))
        assert out == content[offset : offset + 1000]
    with pytest.raises(BadFile):
        storage.read_into(10 << 20, memoryview(bytearray(1)))


def test_reading_is_limited(tmp_path: Path) -> None:
    source = _opened(tmp_path / "x", TWO)
    with pytest.raises(BadFile, match="at most 2"):
        source.read("a", 2)
    with pytest.raises(BadFile, match="no member"):
        source.read("c", 2)


def test_write_is_reproducible_aligned_and_readable(tmp_path: Path) -> None:
    content = {"x/data.pkl": b"pickle", "x/data/0": os.urandom(5000), "x/é": b"", "x/data/1": b"q" * 77}

    def written() -> bytes:
        out = io.BytesIO()
        write_zip(out, (NewMember(n, len(c), [c[:3], memoryview(c)[3:]], 64) for n, c in content.items()))
        return out.getvalue()

    data = written()
    assert data == written()
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        assert zipped.testzip() is None
        assert {i.filename: zipped.read(i) for i in zipped.infolist()} == content
        assert {i.date_time for i in zipped.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    source = _opened(tmp_path / "x", data)
    assert _all(source) == content
    assert {member.data_offset % 64 for member in source.members.values()} == {0}


def test_write_refuses_wrong_sizes_and_names() -> None:
    for chunks in ([b"ab"], [b"abc", b"d"], []):
        with pytest.raises(Refused, match="announced"):
            write_zip(io.BytesIO(), [NewMember("a", 3, chunks)])
    with pytest.raises(WrongUsage):
        write_zip(io.BytesIO(), [NewMember("a", 0, []), NewMember("a", 0, [])])


@pytest.mark.parametrize("kind", [k for k in KINDS if "deflated" not in k])
def test_replacing_at_the_same_size_changes_data_and_crc_alone(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind]()
    source = _opened(tmp_path / "x", data)
    contents = _all(source)
    new = {name: bytes(255 - b for b in content) for name, content in contents.items() if len(content) > 2}
    out = io.BytesIO()
    replace_members(source, out, {name: (len(c), iter([c[:2], c[2:]])) for name, c in new.items()})
    changed = _opened(tmp_path / "y", out.getvalue())
    assert _all(changed) == contents | new
    assert len(out.getvalue()) == len(data)
    differing = {i for i, (a, b) in enumerate(zip(data, out.getvalue(), strict=True)) if a != b}
    crcs = sum(3 * 4 for _ in new)
    assert len(differing) <= sum(map(len, new.values())) + crcs
    back = io.BytesIO()
    replace_members(changed, back, {name: (len(contents[name]), [contents[name]]) for name in new})
    assert back.getvalue() == data


def test_replacing_nothing_copies(tmp_path: Path) -> None:
    for make in KINDS.values():
        data, out = make(), io.BytesIO()
        replace_members(_opened(tmp_path / "x", data), out, {})
        assert out.getvalue() == data


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "empty"])
def test_replacing_with_another_size_keeps_all_else(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind]()
    source = _opened(tmp_path / "x", data)
    contents = _all(source)
    first, *_ = (name for name, content in contents.items() if content)
    new = b"longer than it was " * 1001
    out = io.BytesIO()
    replace_members(source, out, {first: (len(new), iter([new[:7], new[7:]]))})
    changed = _opened(tmp_path / "y", out.getvalue())
    assert _all(changed) == contents | {first: new}
    with zipfile.ZipFile(out) as zipped, zipfile.ZipFile(io.BytesIO(data)) as was:
        assert zipped.testzip() is None
        for a, b in zip(zipped.infolist(), was.infolist(), strict=True):
            for attribute in (
                "filename",
                "date_time",
                "compress_type",
                "external_attr",
                "flag_bits",
                "extra",
                "comment",
            ):
                assert getattr(a, attribute) == getattr(b, attribute)
    for name, member in changed.members.items():
        if kind == "torch":
            assert member.data_offset % 64 == source.members[name].data_offset % 64 == 0
    back = io.BytesIO()
    replace_members(changed, back, {first: (len(contents[first]), [contents[first]])})
    assert back.getvalue() == data


def test_torch_loads_what_was_replaced(tmp_path: Path) -> None:
    data = _torch(a=torch.arange(5.0), b=torch.arange(700))
    source = _opened(tmp_path / "x", data)
    out = io.BytesIO()
    name = next(n for n in source.members if n.endswith("data/0"))
    replace_members(source, out, {name: (20, [np.full(5, 3, np.float32).tobytes()])})
    out.seek(0)
    loaded = torch.load(out, weights_only=True)
    assert loaded["a"].tolist() == [3.0] * 5 and loaded["b"].tolist() == list(range(700))


def test_torch_loads_what_was_written() -> None:
    data = _torch(a=torch.arange(5.0))
    with zipfile.ZipFile(io.BytesIO(data)) as zipped:
        members = [NewMember(n, len(zipped.read(n)), [zipped.read(n)], 64) for n in zipped.namelist()]
    out = io.BytesIO()
    write_zip(out, members)
    out.seek(0)
    assert torch.load(out, weights_only=True)["a"].tolist() == [0, 1, 2, 3, 4]


class _Sparse(io.FileIO):
    """A file that leaves holes where zeros are written."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if len(data) > 1 << 20:
            self.seek(len(data), os.SEEK_CUR)
            return len(data)
        return super().write(data)


def test_zip64_members_and_offsets(tmp_path: Path) -> None:
    block = bytes(64 << 20)
    size = (1 << 32) + 5
    with _Sparse(tmp_path / "x", "w+b") as out:
        chunks = [block] * (size // len(block)) + [bytes(5)]
        write_zip(out, [NewMember("large", size, chunks, 64), NewMember("after", 3, [b"abc"], 64)])  # type: ignore[arg-type]
    with zipfile.ZipFile(tmp_path / "x") as zipped:
        assert zipped.getinfo("large").file_size == size
        assert zipped.read("after") == b"abc"
    source = ZipSource(SourceFile(tmp_path / "x"))
    assert source.members["large"].size == size
    assert source.members["after"].header_offset > 1 << 32
    assert source.read("after", 3) == b"abc"
    assert source.members["large"].crc == zlib.crc32(bytes(5), _zeros_crc(size - 5, block))


def _zeros_crc(size: int, block: bytes) -> int:
    crc = 0
    for _ in range(size // len(block)):
        crc = zlib.crc32(block, crc)
    return crc


def test_too_many_members_are_refused_before_they_are_read(tmp_path: Path) -> None:
    headers = bytes(46 * ((1 << 18) + 1))
    count = len(headers) // 46
    end64 = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, len(headers), 0)
    locator = struct.pack("<IIQI", 0x07064B50, 0, len(headers), 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, len(headers), 0, 0)
    with pytest.raises(BadFile, match=f"at most {1 << 18} members"):
        _opened(tmp_path / "x", headers + end64 + locator + end)


def test_many_members(tmp_path: Path) -> None:
    out = io.BytesIO()
    write_zip(out, (NewMember(str(i), 0, []) for i in range(70_000)))
    assert len(_opened(tmp_path / "x", out.getvalue()).members) == 70_000
    with zipfile.ZipFile(out) as zipped:
        assert len(zipped.namelist()) == 70_000
