"""Archives that were written once are written so for ever, to the byte.

If a test here fails, the format has changed: archives that people keep would get other digests, or could not be read.
Where that is meant, raise the format version, say so in the changelog, and run `python -m tests.golden.make`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from neutral.archive import Contents, open_archive, write_archive
from tests.golden.make import HERE, golden

DIGESTS = {
    "keras.nwt": "23db0a929b446ddc76d507d759d0d93a8738fb446b89bd74362e68a56f7d6d34",
    "torch.nwt": "28f8b80748f2db630128abc6aef0de44e8339f5740475ffaecf7cea616055d60",
}


@pytest.mark.parametrize(("name", "contents"), [pytest.param(*each, id=each[0]) for each in golden()])
def test_the_same_bytes_as_ever(name: str, contents: Contents, tmp_path: Path) -> None:
    write_archive(contents, tmp_path / "again.nwt")
    assert (tmp_path / "again.nwt").read_bytes() == (HERE / name).read_bytes()


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_old_archives_are_read(name: str) -> None:
    with open_archive(HERE / name) as archive:
        archive.check()
        assert archive.manifest.weights_digest == DIGESTS[name]


def test_every_golden_archive_is_tested() -> None:
    assert {path.name for path in HERE.glob("*.nwt")} == DIGESTS.keys() == {name for name, _ in golden()}
