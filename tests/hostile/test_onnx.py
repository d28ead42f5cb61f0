"""Hostile ONNX models: what a file may claim of tensors, of other files, and of itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from neutral.containers.protobuf import message, number, text, varint
from tests.hostile.commands import MEGABYTES, SECONDS, Commands
from tests.hostile.sources import Row, every_command

Make = Callable[[Path, Path], Path]
FLOAT, INT64, FLOAT16 = 1, 7, 10


def tensor(
    name: str = "fc.weight",
    dims: Sequence[int] = (2, 3),
    raw: bytes | None = bytes(24),
    code: int = FLOAT,
    more: bytes = b"",
) -> bytes:
    """A TensorProto."""
    sizes = b"".join(varint(1 << 3) + varint(n) for n in dims)
    return sizes + number(2, code) + more + text(8, name) + (message(9, raw) if raw is not None else b"")


def node(
    op: str = "MatMul", inputs: Sequence[str] = ("x", "fc.weight"), outputs: Sequence[str] = ("y",), more: bytes = b""
) -> bytes:
    """A NodeProto."""
    wires = b"".join(text(1, value) for value in inputs) + b"".join(text(2, value) for value in outputs)
    return wires + text(4, op) + more


def graph(*tensors: bytes, nodes: Sequence[bytes] = (node(),), more: bytes = b"") -> bytes:
    """A GraphProto."""
    return (
        b"".join(message(1, one) for one in nodes) + text(2, "g") + b"".join(message(5, one) for one in tensors) + more
    )


def model(inner: bytes, more: bytes = b"") -> bytes:
    """A ModelProto."""
    return number(1, 10) + text(2, "tests") + message(7, inner) + message(8, number(2, 21)) + more


def of(*tensors: bytes, **more: object) -> Make:
    return written(model(graph(*tensors, **more)))  # type: ignore[arg-type]


def written(data: bytes) -> Make:
    def make(good: Path, folder: Path) -> Path:
        (folder / "x.onnx").write_bytes(data)
        return folder / "x.onnx"

    return make


def external(before: Callable[[Path], object] = lambda folder: None, **entries: str) -> Make:
    """A tensor whose 24 bytes lie in another file; `before` puts what there is in its place."""
    told = {"location": "x.data", **entries}

    def make(good: Path, folder: Path) -> Path:
        pairs = b"".join(message(13, text(1, key) + text(2, value)) for key, value in told.items())
        (folder / "x.data").write_bytes(bytes(24))
        before(folder)
        return of(tensor(raw=None, more=pairs + number(14, 1)))(good, folder)

    return make


def replaced(by: Callable[[Path], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / "x.data").unlink()
        by(folder / "x.data")

    return make


def linked(path: Path) -> None:
    (path.parent / "other").write_bytes(bytes(24))
    path.symlink_to("other")


def linked_folder(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "x.data").write_bytes(bytes(24))
    (folder / "sub").symlink_to("real")


def hard_linked(path: Path) -> None:
    (path.parent / "other").write_bytes(bytes(24))
    os.link(path.parent / "other", path)


def overlapping(good: Path, folder: Path) -> Path:
    (folder / "x.data").write_bytes(bytes(100))
    parts = []
    for i in range(20):
        pairs = {"location": "x.data", "offset": str(i), "length": "24"}
        told = b"".join(message(13, text(1, key) + text(2, value)) for key, value in pairs.items())
        parts.append(tensor(f"t{i}", raw=None, more=told + number(14, 1)))
    return of(*parts)(good, folder)


def deep(levels: int) -> bytes:
    """Graphs in attributes of nodes of graphs."""
    inner = graph(tensor())
    for _ in range(levels):
        attribute = text(1, "body") + message(6, inner) + number(20, 5)
        inner = graph(nodes=[node("Loop", more=message(5, attribute))])
    return model(inner)


def doubled(levels: int) -> Make:
    """Each value is the one before, joined with itself."""
    nodes, value = [], "fc.weight"
    for i in range(levels):
        axis = message(5, text(1, "axis") + varint(3 << 3) + varint(0) + number(20, 2))
        nodes.append(node("Concat", (value, value), (f"v{i}",), axis))
        value = f"v{i}"
    return of(tensor(), nodes=[*nodes, node("MatMul", ("x", value))])


def chained(count: int) -> Make:
    names = ["fc.weight", *(f"v{i}" for i in range(count))]
    nodes = [node("Identity", names[i : i + 1], names[i + 1 : i + 2]) for i in range(count)]
    return of(tensor(), nodes=[*nodes, node("MatMul", ("x", names[-1]))])


HUGE = b"\xff" * 10 + b"\x01"
ROWS = (
    Row("negative size", of(tensor(dims=(-2, -3))), "shape"),
    Row("size of 2^62", of(tensor(dims=(1 << 62, 2))), "shape"),
    Row("size of 2^62 and 0", of(tensor(dims=(1 << 62, 0), raw=b"")), "shape"),
    Row("65 axes", of(tensor(dims=(1,) * 65, raw=bytes(4))), "shape"),
    Row("4 TiB", of(tensor(dims=(1 << 20, 1 << 20))), "bytes"),
    Row("4 TiB of nothing", of(tensor(dims=(1 << 20, 1 << 20), raw=None)), "no elements"),
    Row("short raw_data", of(tensor(raw=bytes(23))), "bytes"),
    Row("long raw_data", of(tensor(raw=bytes(25))), "bytes"),
    Row("raw_data twice", of(tensor() + message(9, bytes(24))), "twice"),
    Row("raw and typed", of(tensor(more=message(4, bytes(24)))), "field"),
    Row("floats among the integers", of(tensor(raw=None, more=message(7, bytes(6)))), "field"),
    Row("short float_data", of(tensor(raw=None, more=message(4, bytes(20)))), "bytes"),
    Row("odd float_data", of(tensor(raw=None, more=message(4, bytes(23)))), "bytes"),
    Row("few numbers", of(tensor(raw=None, code=FLOAT16, more=message(5, bytes(5)))), "numbers"),
    Row("number cut off", of(tensor(raw=None, code=FLOAT16, more=message(5, bytes(5) + b"\x80"))), "cut off"),
    Row("numbers outside the dtype", of(tensor(raw=None, code=FLOAT16, more=message(5, bytes(5) + varint(1 << 20)))), "outside", as_template=False),
    Row("number of 11 bytes", of(tensor(raw=None, code=FLOAT16, more=message(5, bytes(5) + HUGE))), "64 bits", as_template=False),
    Row("numbers without an end", of(tensor(raw=None, code=FLOAT16, dims=(1,), more=message(5, b"\x80" * (8 << 20) + b"\1")), nodes=[node("Add")]), "64 bits", as_template=False),
    Row("unknown data type", of(tensor(code=99)), "data type"),
    Row("no data type", of(tensor(code=0)), "data type"),
    Row("segments", of(tensor(more=message(3, b""))), "segments"),
    Row("elements of four bits", of(tensor(code=22, raw=bytes(3))), "smaller than a byte"),
    Row("four bits, wrong count", of(tensor(code=22, raw=bytes(4))), "bits"),
    Row("strings alone", of(tensor(code=8, raw=None, more=message(6, b"a") * 6)), "no weights"),
    Row("two of one name", of(tensor(), tensor()), "two initializers"),
    Row("sparse", of(tensor(), more=message(15, message(1, tensor("s")))), "sparse"),
    Row("no weight", of(), "no weights"),
    Row("two attributes of one name", of(tensor(), nodes=[node(more=message(5, text(1, "a")) * 2)]), "two attributes"),
    Row("name of 1 MB", of(tensor("w" * (1 << 20))), "at most"),
    Row("name that is no text", of(tensor(more=message(8, b"\xff\xfe"))), "UTF-8"),
    Row("name that leaves the folder", of(tensor("../../x")), "../..", as_template=False),
    Row("two graphs", written(model(graph(tensor()), message(7, graph(tensor())))), ""),
    Row("60 graphs deep", written(deep(60)), "deep"),
    Row("2000 graphs deep", written(deep(2000)), "deep"),
    Row("a million nodes", written(model(b"\x0a\x00" * 1_000_000)), "nodes", slow=True),
    Row("20 million fields", written(model(message(1, b"\x0a\x00" * 20_000_000))), "fields", slow=True),
    Row("20 million numbers", written(model(graph(tensor(), nodes=[node(more=message(5, text(1, "a") + message(8, bytes(20_000_000))))]))), "", slow=True),
    Row("attribute of the wrong wire type", of(tensor(), nodes=[node(more=varint(5 << 3) + varint(1))]), "wire type"),
    Row("field that runs past the end", written(model(graph(tensor()))[:-30]), ""),
    Row("length of 2^63", written(number(1, 10) + varint(7 << 3 | 2) + varint(1 << 63)), ""),
    Row("group", written(number(1, 10) + varint(7 << 3 | 3) + message(7, graph(tensor()))), ""),
    Row("trailing bytes", written(model(graph(tensor())) + b"\xff"), ""),
    Row("empty", written(b""), ""),
    Row("location that leaves the folder", external(location="../x.data"), "leads out"),
    Row("location that leaves it later", external(location="a/../../x.data"), "leads out"),
    Row("absolute location", external(location="/etc/passwd"), "leads out"),
    Row("location of another system", external(location="C:\\x.data"), "leads out"),
    Row("location with NUL", external(location="x.data\0y"), ""),
    Row("no location", external(location=""), "leads out"),
    Row("missing file", external(location="y.data"), "no file"),
    Row("folder", external(location="."), ""),
    Row("symbolic link", external(replaced(linked)), "a link"),
    Row("link to a file outside", external(replaced(lambda path: path.symlink_to("/etc/passwd"))), "a link"),
    Row("linked folder", external(linked_folder, location="sub/x.data"), "a link"),
    Row("hard link", external(replaced(hard_linked)), "hard link"),
    Row("pipe", external(replaced(os.mkfifo)), "pipe"),
    Row("negative offset", external(offset="-1"), "part"),
    Row("offset of 2^62", external(offset=str(1 << 62)), "part"),
    Row("offset of 40 digits", external(offset="9" * 40), "offset"),
    Row("offset that is no number", external(offset="1_0"), "offset"),
    Row("negative length", external(length="-1"), "part"),
    Row("long length", external(length="25"), "part"),
    Row("short length", external(length="23"), "elements"),
    Row("cut data file", external(replaced(lambda path: path.write_bytes(bytes(20)))), "elements"),
    Row("overlapping external data", overlapping, "overlap"),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".onnx")


@pytest.mark.parametrize("make", [chained(20_000), doubled(60)], ids=["20,000 nodes in a row", "doubled 60 times"])
def test_values_are_followed_to_a_depth_and_no_further(make: Make, run: Commands, tmp_path: Path) -> None:
    """What lies behind is no weight that is known; nothing fails."""
    outcome = run(tmp_path, "digest", make(tmp_path, tmp_path))
    assert outcome.status == 0 and outcome.seconds < SECONDS and outcome.peak < MEGABYTES, outcome
