"""Folders as sources: names that lead out, links, pipes, files that are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neutral.containers.folder import Folder, walk
from neutral.errors import BadFile


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    path = tmp_path / "folder"
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "b" / "file").write_bytes(b"abcdef")
    (tmp_path / "outside").write_bytes(b"outside")
    (path / "link").symlink_to(tmp_path / "outside")
    (path / "up").symlink_to(tmp_path)
    os.mkfifo(path / "pipe")
    return Folder(path)


def test_parts_are_read(folder: Folder) -> None:
    out = bytearray(3)
    folder.part("a/b/file", 2, 3).read_into(0, memoryview(out))
    assert out == b"cde" and folder.size("a/b/file") == 6 and folder.read("a/b/file", 6) == b"abcdef"
    assert folder.get("a/none") is None and folder.get("none/none") is None


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../outside", "a/../../outside", "link", "up/outside", "pipe", "a", "a/b", "x\0y", "x" * 5000],
)
def test_other_names_are_refused(folder: Folder, name: str) -> None:
    with pytest.raises(BadFile):
        folder.get(name)


def test_parts_beyond_the_end_are_refused(folder: Folder) -> None:
    for offset, length in ((0, 7), (6, 1), (1 << 62, 1)):
        with pytest.raises(BadFile):
            folder.part("a/b/file", offset, length)
    with pytest.raises(BadFile):
        folder.part("a/b/none", 0, 0)
    with pytest.raises(BadFile):
        folder.read("a/b/file", 5)
    part = folder.part("a/b/file", 0, 6)
    (folder.path / "a" / "b" / "file").write_bytes(b"ab")
    with pytest.raises(BadFile):
        part.read_into(0, memoryview(bytearray(6)))


def test_many_files_are_not_all_kept_open(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / str(i)).write_bytes(str(i).encode())
    folder = Folder(tmp_path)
    assert all(folder.read(str(i), 10) == str(i).encode() for i in range(300))
    assert len(folder._open) < 100
    folder.close()
    assert not folder._open


def test_walking_refuses_links_and_pipes(folder: Folder) -> None:
    with pytest.raises(BadFile, match=r"link|pipe"):
        list(walk(folder.path))
    for name in ("link", "up", "pipe"):
        (folder.path / name).unlink()
    assert list(walk(folder.path)) == [("a", True), ("a/b", True), ("a/b/file", False)]
