"""What is written takes its name as a whole, synced, or not at all."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import pytest

from neutral.containers import files
from neutral.containers.files import new_file
from neutral.crc32 import crc32
from neutral.errors import Refused


def test_a_large_file_is_synced_beside_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_SYNCED", 100)
    sizes = []
    monkeypatch.setattr(files, "_sync_data", lambda fd: sizes.append(os.fstat(fd).st_size))
    with new_file(tmp_path / "x") as out:
        out.write(b"a" * 60)
        assert not sizes
        out.write(b"b" * 60)
        out.synced()
        assert sizes == [120]
        out.write(b"c" * 60)
    assert (tmp_path / "x").read_bytes() == b"a" * 60 + b"b" * 60 + b"c" * 60


def test_an_error_of_that_syncing_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports a failed write to the disk once: the last fsync may find nothing wrong."""

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "_SYNCED", 100)
    monkeypatch.setattr(files, "_sync_data", fails)
    with pytest.raises(Refused, match="Input/output error"), new_file(tmp_path / "x") as out:
        out.write(bytes(100))
    assert list(tmp_path.iterdir()) == []


def test_crc32_is_that_of_zlib() -> None:
    data = os.urandom(1 << 16)
    running = 0
    for start in range(0, len(data), 999):
        running = crc32(memoryview(data)[start : start + 999], running)
    assert running == crc32(data) == zlib.crc32(data)
    assert crc32(b"") == 0
