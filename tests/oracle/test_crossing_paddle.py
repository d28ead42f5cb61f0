"""Paddle's layers against torch's and Keras', in both directions, by forward passes of the real frameworks.

What a file cannot say is refused, and only that: nothing comes out wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.columns import model_of
from tests.crossing import Column, Crossed, cross
from tests.measure import unwritable
from tests.oracle.process import Worker
from tests.zoo import Model, cases

PADDLE = Column("paddle", "pdparams", ".pdparams")

REFUSED = (
    ("layer_norm_image", "*", "the scale of several axes is stored as one"),
    ("*weight_norm_*", "True", "sizes are equal, and only a live layer says along which axis the magnitude is"),
    ("conv2d_channels_first*", "paddle -> keras", "the Flatten is in no framework's own order"),
    (
        "batch_norm2d_*_only",
        "torch -> paddle",
        "torch has scale and offset or neither, and this paddle layer one of them",
    ),
    ("*spectral_norm_*", "keras -> paddle", "a plain kernel has no vectors for its norm"),
    ("branches_flattened_concat", "*", "two flattened maps side by side"),
)
"""Cases (and ways, or whether all sizes are equal) in which a file of paddle says too little."""


@pytest.fixture(scope="module")
def with_paddle(
    torch_worker: Worker, keras_worker: Worker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Worker]]:
    with Worker("paddle", tmp_path_factory.mktemp("paddle")) as worker:
        yield {"torch": torch_worker, "keras": keras_worker, "paddle": worker}


def excused(name: str, equal: bool, way: Crossed) -> bool:
    return way.reason != "" and any(
        fnmatchcase(name, case) and (where in ("*", str(equal)) or where in way.way) for case, where, _ in REFUSED
    )


FIRST = {case.kind: name for name, case in reversed(cases().items()) if "keras" in case.models}
"""One case of each kind, for the slower of the two."""


def crossings(name: str, equal: bool, other: str, workers: dict[str, Worker], folder: Path) -> None:
    case = cases(equal).get(name)
    if case is None or other not in case.models or not isinstance(model_of(case, "paddle"), Model):
        return
    fmt = {"torch": "module", "keras": "keras"}[other]
    fmt = "state" if fmt in unwritable(case) else fmt
    ways = cross(case, PADDLE, other, fmt, workers, folder, equal)
    bad = [str(way) for way in ways if not excused(name, equal, way) and not way.right(case)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", cases())
def test_torch(name: str, equal: bool, with_paddle: dict[str, Worker], tmp_path: Path) -> None:
    crossings(name, equal, "torch", with_paddle, tmp_path)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
@pytest.mark.parametrize("name", FIRST.values())
def test_keras(name: str, equal: bool, with_paddle: dict[str, Worker], tmp_path: Path) -> None:
    crossings(name, equal, "keras", with_paddle, tmp_path)
