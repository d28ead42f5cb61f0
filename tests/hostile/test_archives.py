"""Hostile and damaged archives: `check`, `show` and every import refuse them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import neutral
from neutral.errors import NeutralError
from tests.hostile.commands import Commands, refused
from tests.hostile.making import Json, archive_of, archive_parts, edited_archive
from tests.hostile.sources import Row

Make = Callable[[Path, Path], Path]
TARGETS = {
    "torch": ".pt",
    "keras": ".weights.h5",
    "tensorflow": ".ckpt",
    "numpy": ".npz",
    "safetensors": ".safetensors",
}


def edited(edit: Callable[[Json, Json], object], *, rehash: bool = True) -> Make:
    """The good archive with its manifest and header edited, its digests put right again."""
    return lambda good, folder: edited_archive(good / "model.nwt", folder / "x.nwt", edit, rehash=rehash)


def text(change: Callable[[str], str]) -> Make:
    """The good archive with the manifest's text changed."""

    def make(good: Path, folder: Path) -> Path:
        manifest, header, data = archive_parts(good / "model.nwt")
        plain = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        return archive_of(folder / "x.nwt", change(plain), header, data)

    return make


def with_key(good: Path, folder: Path) -> Path:
    manifest, header, data = archive_parts(good / "model.nwt")
    return archive_of(folder / "x.nwt", json.dumps(manifest), header, data, more="x")


def bytes_changed(change: Callable[[bytearray], object]) -> Make:
    def make(good: Path, folder: Path) -> Path:
        data = bytearray((good / "model.nwt").read_bytes())
        change(data)
        (folder / "x.nwt").write_bytes(data)
        return folder / "x.nwt"

    return make


def layer(manifest: Json, number: int = 0) -> Json:
    found: Json = manifest["layers"][number]
    return found


def kernel(manifest: Json, number: int = 0) -> Json:
    found: Json = layer(manifest, number)["parameters"]["kernel"]
    return found


def renamed(path: str) -> Callable[[Json, Json], None]:
    """The first layer under another path, in the manifest, the header and the graph."""

    def edit(manifest: Json, header: Json) -> None:
        old = layer(manifest)["path"]
        layer(manifest)["path"] = path
        for name in [*header]:
            if name.startswith(f"{old}/"):
                header[path + name[len(old) :]] = header.pop(name)
        manifest.pop("graph", None)

    return edit


def tied(first: str, second: str) -> Callable[[Json, Json], None]:
    """Both kernels made of one shape and dtype, each tied to what is named."""

    def edit(manifest: Json, header: Json) -> None:
        for number, tie in enumerate((first, second)):
            kernel(manifest, number)["tied_to"] = tie

    return edit


def set_shape(shape: list[Any]) -> Callable[[Json, Json], None]:
    return lambda manifest, header: kernel(manifest).update(shape=shape)


def set_both_shapes(shape: list[Any]) -> Callable[[Json, Json], None]:
    def edit(manifest: Json, header: Json) -> None:
        kernel(manifest)["shape"] = shape
        header["0/kernel"]["shape"] = shape

    return edit


ROWS = (
    *(Row(f"a layer named {path}", edited(renamed(path)), "leads out") for path in (
        "../x", "../../x", "a/../../x", "/tmp/x", "..\\x", "C:\\x", "..")),
    Row("a tensor named ../x by its source", edited(lambda m, h: kernel(m)["native"].update(weight="../x.weight")), "leads out"),
    Row("unknown major version", edited(lambda m, h: m.update(format_version="2.0")), "version"),
    Row("version of a number", edited(lambda m, h: m.update(format_version=1)), "version"),
    Row("no version", edited(lambda m, h: m.pop("format_version")), "version"),
    Row("unknown field", edited(lambda m, h: m.update(more=1)), "more"),
    Row("unknown field of a layer", edited(lambda m, h: layer(m).update(more=1)), "more"),
    Row("unknown kind of layer", edited(lambda m, h: layer(m).update(kind="os.system"))),
    Row("no layers", edited(lambda m, h: m.pop("layers")), "layers"),
    Row("layers of a number", edited(lambda m, h: m.update(layers=7)), "layers"),
    Row("a path twice", edited(lambda m, h: layer(m, 1).update(path=layer(m)["path"])), "two layers"),
    Row("another metadata key", with_key, "one key"),
    Row("duplicate key", text(lambda t: t[:-1] + ',"layers":[]}')),
    Row("duplicate key of the same value", text(lambda t: t[:-1] + ',"format_version":"1.0"}')),
    Row("NaN", text(lambda t: t.replace('"ordered":true', '"ordered":NaN'))),
    Row("a number that is NaN", edited(lambda m, h: layer(m).update(units=float("nan")))),
    Row("not JSON", text(lambda t: t[:-1])),
    Row("deep JSON", text(lambda t: "[" * 200_000)),
    Row("deep settings", text(lambda t: t.replace('"settings":{', '"settings":{"a":' + "[" * 3000 + "]" * 3000 + ",", 1))),
    Row("white space", text(lambda t: t.replace(",", ", ", 1)), "digest"),
    Row("manifest unlike the header in a shape", edited(set_shape([3, 5])), "header"),
    Row("manifest unlike the header in a dtype", edited(lambda m, h: kernel(m).update(dtype="int32")), "header"),
    Row("a tensor of the manifest alone", edited(lambda m, h: layer(m)["parameters"].update(more=kernel(m))), "manifest alone"),
    Row("a tensor of the header alone", edited(lambda m, h: layer(m)["parameters"].pop("kernel")), "header alone"),
    Row("shape of 2^62", edited(set_both_shapes([1 << 62, 1 << 62]))),
    Row("shape of 2^62 and 0", edited(set_both_shapes([1 << 62, 0]))),
    Row("negative shape", edited(set_both_shapes([-5, -3]))),
    Row("float shape", edited(set_both_shapes([5.0, 3.0]))),
    Row("true as a size", edited(set_shape([True, 3]))),
    Row("axes unlike the shape", edited(lambda m, h: kernel(m).update(axes=["out"])), "axes"),
    Row("axes of another kind", edited(lambda m, h: kernel(m).update(axes=["in", "out"])), "axes"),
    Row("unknown dtype", edited(lambda m, h: kernel(m).update(dtype="object"))),
    Row("tied to itself", edited(tied("0/kernel", "0/kernel")), "tie"),
    Row("tied to each other", edited(tied("2/kernel", "0/kernel")), "tie"),
    Row("tied to nothing", edited(tied("9/kernel", "9/kernel")), "tie"),
    Row("tied to another shape", edited(lambda m, h: layer(m, 1)["parameters"]["kernel"].update(tied_to="0/kernel"))),
    Row("weights digest of other weights", edited(lambda m, h: m.update(weights_digest="0" * 64), rehash=False), "weights digest"),
    Row("elements of another digest", edited(lambda m, h: kernel(m).update(sha256="0" * 64)), "differ"),
    Row("digest that is no digest", edited(lambda m, h: kernel(m).update(sha256="x"))),
    Row("a wire from nowhere", edited(lambda m, h: m["graph"]["nodes"][0].update(inputs=["nowhere"])), "nowhere"),
    Row("channels that do not divide", edited(lambda m, h: layer(m).update(channels={"in": 2}))),
    Row("negative channels", edited(lambda m, h: layer(m).update(channels={"in": -3}))),
    Row("undecided axis that is none", edited(lambda m, h: layer(m).update(undecided=["nonsense"]))),
    Row("truncated", bytes_changed(lambda data: data.__delitem__(slice(-1, None)))),
    Row("trailing byte", bytes_changed(lambda data: data.extend(b"x")), "end"),
    Row("flipped bit of its one key", bytes_changed(lambda data: data.__setitem__(data.index(b"neutral"), ord("m"))), "one key"),
    Row("flipped weight", bytes_changed(lambda data: data.__setitem__(-3, data[-3] ^ 1)), "digest"),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    row.make(good, tmp_path)
    for framework, suffix in (
        TARGETS.items() if row.says == "leads out" else [("torch", ".pt"), ("keras", ".weights.h5")]
    ):
        refused(run, tmp_path, ["import", "x.nwt", "--to", framework, "-o", f"out{suffix}"], row.says)
    refused(run, tmp_path, ["import", "x.nwt", "--into", good / "model.keras", "-o", "out.keras"], row.says)
    refused(run, tmp_path, ["check", "x.nwt"], row.says)
    refused(run, tmp_path, ["convert", "x.nwt", "out.npz"], row.says)
    refused(run, tmp_path, ["export", "x.nwt", "out.nwt"], row.says)
    refused(run, tmp_path, ["digest", "x.nwt"], row.says)
    refused(run, tmp_path, ["diff", "x.nwt", good / "model.nwt"], row.says, status=2)


def test_a_source_of_no_framework(run: Commands, good: Path, tmp_path: Path) -> None:
    edited(lambda manifest, header: manifest["source"].update(framework="os"))(good, tmp_path)
    for framework, suffix in TARGETS.items():
        refused(run, tmp_path, ["import", "x.nwt", "--to", framework, "-o", f"out{suffix}"], "framework")


@pytest.mark.parametrize("suffix", [".keras", ".pt2"])
def test_a_graph_of_other_layers(suffix: str, run: Commands, good: Path, tmp_path: Path) -> None:
    edited(lambda m, h: m["graph"]["nodes"][0].update(layer="nonsense"))(good, tmp_path)
    framework = {".keras": "keras", ".pt2": "torch"}[suffix]
    refused(run, tmp_path, ["import", "x.nwt", "--to", framework, "-o", f"out{suffix}"], "nonsense")


def test_the_recipe_is_that_of_archives(run: Commands, good: Path, tmp_path: Path) -> None:
    edited(lambda manifest, header: None)(good, tmp_path)
    assert run(tmp_path, "check", "x.nwt").status == 0
    edited(renamed("other"))(good, tmp_path)
    assert run(tmp_path, "check", "x.nwt").status == 0


def spoiled(data: bytes) -> list[tuple[str, bytes]]:
    """A bit of every second byte flipped, and truncations."""
    flips = [
        (f"bit of byte {i}", data[:i] + bytes([data[i] ^ 1 << i // 2 % 8]) + data[i + 1 :])
        for i in range(0, len(data), 2)
    ]
    return flips + [(f"cut at {n}", data[:n]) for n in range(0, len(data), 7)]


def test_no_flipped_bit_and_no_truncation_goes_unseen(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.nwt"
    for what, data in spoiled((good / "model.nwt").read_bytes()):
        path.write_bytes(data)
        try:
            with neutral.open_archive(path) as archive:
                archive.check()
        except NeutralError as error:
            assert "\n" not in str(error)
            continue
        pytest.fail(f"{what} is not found")


def test_flipped_bits_through_the_command_line(run: Commands, good: Path, tmp_path: Path) -> None:
    data = (good / "model.nwt").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for place in (0, 7, 8, 9, *np.linspace(10, 8 + length - 1, 12, dtype=int), 8 + length, len(data) - 1):
        (tmp_path / "x.nwt").write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        for arguments in (["check", "x.nwt"], ["import", "x.nwt", "--to", "torch", "-o", "out.pt"]):
            refused(run, tmp_path, arguments)


def test_shards_of_an_archive(run: Commands, good: Path, tmp_path: Path) -> None:
    """A bit flipped anywhere in the index or a shard, a shard of another archive, and a shard that is missing."""
    assert run(tmp_path, "export", good / "model.nwt", "x.nwt", "--shard-size", "60").status == 0
    index, *shards = sorted(tmp_path.iterdir(), key=lambda path: not path.name.endswith(".json"))
    assert run(tmp_path, "check", index.name).status == 0 and len(shards) > 1
    for path in (index, shards[0]):
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            try:
                with neutral.open_archive(index) as archive:
                    archive.check()
            except NeutralError as error:
                assert "\n" not in str(error)
                continue
            pytest.fail(f"a flipped bit of byte {place} of {path.name} is not found")
        path.write_bytes(whole)
    for spoil in (lambda: shards[0].write_bytes(shards[1].read_bytes()), shards[0].unlink):
        spoil()
        refused(run, tmp_path, ["check", index.name])
        refused(run, tmp_path, ["export", shards[1].name, "out.nwt"], "one key")
        refused(run, tmp_path, ["import", index.name, "--to", "torch", "-o", "out.pt"])
