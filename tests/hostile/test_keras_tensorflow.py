"""Hostile HDF5 and .keras files, checkpoints and SavedModels."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from neutral.containers import protobuf
from neutral.containers.crc32c import crc32c, masked
from tests.containers import test_hdf5
from tests.containers.test_tensor_bundle import HEADER, HUGE, entry_bytes, index, table
from tests.hostile.commands import Commands, refused
from tests.hostile.making import copied, with_members
from tests.hostile.sources import Row, every_command

Make = Callable[[Path, Path], Path]


def structure(make: Callable[[h5py.File, Path], None], name: str) -> Make:
    """A file of one hostile structure, with another file beside it that it would like to read."""

    def made(good: Path, folder: Path) -> Path:
        with h5py.File(folder / "other.h5", "w") as file:
            file["secret"] = np.arange(4, dtype="u1")
        with h5py.File(folder / name, "w") as file:
            make(file, folder / "other.h5")
        return folder / name

    return made


def in_the_model(change: Callable[[h5py.File], object], source: str = "model.h5") -> Make:
    """A good file of Keras with something in it changed."""

    def make(good: Path, folder: Path) -> Path:
        shutil.copyfile(good / source, folder / source)
        with h5py.File(folder / source, "r+") as file:
            change(file)
        return folder / source

    return make


def kernel(file: h5py.File) -> str:
    """The path of the first kernel."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if getattr(item, "shape", None) == (3, 5) else None)
    return names[0]


def replaced(file: h5py.File, **dataset: Any) -> None:
    name = kernel(file)
    del file[name]
    file.create_dataset(name, **dataset)


def linked(file: h5py.File, link: object) -> None:
    name = kernel(file)
    del file[name]
    file[name] = link


def cut(source: str, keep: float) -> Make:
    def make(good: Path, folder: Path) -> Path:
        data = (good / source).read_bytes()
        (folder / source).write_bytes(data[: int(len(data) * keep)])
        return folder / source

    return make


def set_config(text: object, good: Path, folder: Path) -> Path:
    shutil.copyfile(good / "model.h5", folder / "model.h5")
    with h5py.File(folder / "model.h5", "r+") as file:
        file.attrs["model_config"] = text
    return folder / "model.h5"


def config_of_bytes(good: Path, folder: Path) -> Path:
    data = (good / "model.h5").read_bytes().replace(b'"class_name"', b'"class_nam\xff"')
    (folder / "model.h5").write_bytes(data)
    return folder / "model.h5"


HDF5 = (
    *(Row(make.__name__, structure(make, "x.h5"), says, slow=True) for make, says in test_hdf5.HOSTILE),
    Row("a weight linked to another file", in_the_model(lambda f: linked(f, h5py.ExternalLink("/etc/passwd", "x"))), "link"),
    Row("a weight stored in another file", in_the_model(
        lambda f: replaced(f, shape=(3, 5), dtype="f4", external=[("/etc/passwd", 0, 60)])), "another file"),
    Row("a weight of 4 TiB", in_the_model(lambda f: replaced(f, shape=(1 << 20, 1 << 20), chunks=(1 << 10, 1 << 10)))),
    Row("a weight of strings", in_the_model(lambda f: replaced(f, data=[b"x"])), "string"),
    Row("a weight left out", in_the_model(lambda f: f.__delitem__(kernel(f)))),
    Row("a cycle in .weights.h5", in_the_model(lambda f: f["layers"].__setitem__("self", f["layers"]), "model.weights.h5"), "twice"),
    Row("a link in .weights.h5", in_the_model(lambda f: linked(f, h5py.SoftLink("/x")), "model.weights.h5"), "link"),
    Row("half of an .h5", cut("model.h5", 0.5)),
    Row("almost all of an .h5", cut("model.h5", 0.99)),
    Row("half of a .weights.h5", cut("model.weights.h5", 0.5)),
    Row("config that is no JSON", lambda good, folder: set_config("{", good, folder), "JSON"),
    Row("config that is no UTF-8", config_of_bytes, "JSON"),
    Row("config of a number", lambda good, folder: set_config(7, good, folder)),
    Row("deep config", lambda good, folder: set_config("[" * 20_000, good, folder), "JSON"),
    Row("config of a list", lambda good, folder: set_config("[]", good, folder), "JSON"),
    Row("no Keras file", in_the_model(lambda f: [f.__delitem__(name) for name in [*f]] and f.attrs.clear())),
)  # fmt: skip


@pytest.mark.parametrize("row", HDF5, ids=str)
def test_refused_hdf5(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".h5")


def member(name: str, data: bytes | None) -> Make:
    return lambda good, folder: with_members(good / "model.keras", folder / "x.keras", {name: data})


def config(good: Path) -> Any:
    with zipfile.ZipFile(good / "model.keras") as file:
        return json.loads(file.read("config.json"))


def with_config(change: Callable[[Any], object]) -> Make:
    def make(good: Path, folder: Path) -> Path:
        text = config(good)
        change(text)
        return with_members(good / "model.keras", folder / "x.keras", {"config.json": json.dumps(text).encode()})

    return make


def with_structure(make: Callable[[h5py.File, Path], None]) -> Make:
    def made(good: Path, folder: Path) -> Path:
        path = structure(make, "x.h5")(good, folder)
        return with_members(good / "model.keras", folder / "x.keras", {"model.weights.h5": path.read_bytes()})

    return made


def config_bomb(good: Path, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.keras", "w", zipfile.ZIP_DEFLATED) as new:
        with new.open("config.json", "w", force_zip64=True) as packed:
            for _ in range(300):
                packed.write(b" " * (1 << 20))
        with zipfile.ZipFile(good / "model.keras") as old:
            new.writestr("model.weights.h5", old.read("model.weights.h5"))
    return folder / "x.keras"


def flipped(good: Path, folder: Path) -> Path:
    data = bytearray((good / "model.keras").read_bytes())
    with zipfile.ZipFile(good / "model.keras") as file:
        weights = file.read("model.weights.h5")
    source = test_hdf5.hdf5.open_hdf5(test_hdf5.Memory(weights), "x")
    offset, _ = next(iter(source.datasets.values())).spans[0]
    data[data.index(weights[:512]) + offset + 2] ^= 4
    (folder / "x.keras").write_bytes(data)
    return folder / "x.keras"


KERAS = (
    *(Row(make.__name__, with_structure(make), says, slow=True) for make, says in (
        (test_hdf5.external_link, "link"), (test_hdf5.external_storage, "another file"), (test_hdf5.virtual, "virtual"),
        (test_hdf5.four_tebibytes, "chunks"), (test_hdf5.gzip_bomb, "packed chunk"), (test_hdf5.deep, "deeper"))),
    Row("zip bomb as the config", config_bomb, "config.json", slow=True),
    Row("no config", member("config.json", None)),
    Row("no weights", member("model.weights.h5", None)),
    Row("config that is no JSON", member("config.json", b"{"), "JSON"),
    Row("deep config", member("config.json", b'{"a":' * 50_000), "JSON"),
    Row("config of NaN", member("config.json", b"NaN")),
    Row("metadata that is no JSON", member("metadata.json", b"{"), "JSON"),
    Row("weights that are no HDF5", member("model.weights.h5", b"hello"), "model.weights.h5"),
    Row("layers of a number", with_config(lambda c: c["config"].update(layers=7))),
    Row("layer of a list", with_config(lambda c: c["config"].update(layers=[[], 3]))),
    Row("layer named out of the folder", with_config(lambda c: c["config"]["layers"][1]["config"].update(name="../x")), "../x", as_template=False),
    Row("flipped bit of a weight", flipped, "CRC", as_template=False),
    Row("half", cut("model.keras", 0.5)),
)  # fmt: skip


@pytest.mark.parametrize("row", KERAS, ids=str)
def test_refused_keras(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".keras")


def keras_layer(module: str, cls: str, **settings: Any) -> Json:
    return {"module": module, "class_name": cls, "config": {"name": "odd", **settings}, "registered_name": None}


Json = dict[str, Any]
LAMBDA = {
    "class_name": "__lambda__",
    "config": {"code": "4wEAAAAAAAAAAAAAAAEAAAABAAAAQwAAAHMEAAAAZAFTACkCTukBAAAAqQByAQAAAA==", "defaults": None, "closure": None},
}  # fmt: skip


@pytest.mark.parametrize(
    "layer",
    [
        keras_layer("keras.layers", "Lambda", function=LAMBDA, arguments={}),
        keras_layer("os", "system", command="touch MARK"),
        keras_layer("builtins", "exec", source="open('MARK', 'w')"),
        keras_layer("keras.layers", "StringLookup", vocabulary="/etc/passwd", max_tokens=None),
        keras_layer("keras.layers", "TFSMLayer", filepath="/etc", call_endpoint="serve"),
    ],
    ids=lambda layer: str(layer["class_name"]),
)
def test_a_layer_of_code_is_text(layer: Json, run: Commands, good: Path, tmp_path: Path) -> None:
    """The weights beside it are read; the layer itself is neither built nor looked for."""
    with_config(lambda c: c["config"]["layers"].insert(2, layer))(good, tmp_path)
    plain, odd = run(tmp_path, "digest", good / "model.keras"), run(tmp_path, "digest", "x.keras")
    assert (odd.status, odd.out, odd.peak < 512) == (0, plain.out, True), odd
    assert run(tmp_path, "export", "x.keras", "x.nwt").status == 0
    assert run(tmp_path, "import", "x.nwt", "--into", "x.keras", "-o", "back.keras").status == 0
    assert (tmp_path / "back.keras").read_bytes() == (tmp_path / "x.keras").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.keras", "x.keras", "x.nwt"]


@pytest.mark.parametrize("units", [-5, "5", [], 1e300, 7, 1 << 70])
def test_a_config_that_cannot_be_true_gives_no_graph(units: object, run: Commands, good: Path, tmp_path: Path) -> None:
    with_config(lambda c: c["config"]["layers"][1]["config"].update(units=units))(good, tmp_path)
    outcome = run(tmp_path, "export", "x.keras", "x.nwt")
    assert outcome.status == 0 and "no graph" in outcome.err
    refused(run, tmp_path, ["import", "x.nwt", "--to", "torch", "-o", "out.pt2"], "graph")


def test_a_member_that_leads_outside_is_not_unpacked(run: Commands, good: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with_members(good / "model.keras", tmp_path / "in" / "x.keras", {"../MARK": b"x", "assets/../../MARK": b"y"})
    for arguments in (["export", "x.keras"], ["import", good / "model.nwt", "--into", "x.keras", "-o", "y.keras"]):
        run(tmp_path / "in", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def entries(*pairs: tuple[bytes, bytes], data: bytes = bytes(8), kind: int = 0) -> Make:
    """A checkpoint of these entries, with good checksums of its index."""

    def make(good: Path, folder: Path) -> Path:
        (folder / "x.data-00000-of-00001").write_bytes(data)
        index(folder / "x").write_bytes(table({b"": HEADER, **dict(pairs)}, kind))
        return folder / "x"

    return make


def forged(entry: bytes) -> Make:
    return entries((b"w", entry))


def changed(suffix: str, change: Callable[[bytearray], object]) -> Make:
    def make(good: Path, folder: Path) -> Path:
        copied(good / "ckpt", folder / "x")
        path = folder / f"x{suffix}"
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        return folder / "x"

    return make


INDEX, DATA = ".index", ".data-00000-of-00001"
CRC = masked(crc32c(bytes(8)))
CHECKPOINTS = (
    Row("entry beyond the shard", forged(entry_bytes(1, (2,), 4, 8)), "part of its 8 bytes"),
    Row("offset of 2^62", forged(entry_bytes(1, (2,), HUGE, 8)), "part of its 8 bytes"),
    Row("shape of 2^40", forged(entry_bytes(1, (1 << 40,), 0, 8)), "bytes for shape"),
    Row("shape unlike the size", forged(entry_bytes(1, (3,), 0, 8)), "bytes for shape"),
    Row("negative shape", forged(entry_bytes(1, (-2,), 0, 8)), "negative"),
    Row("negative offset", forged(entry_bytes(1, (2,), -8, 8)), "negative"),
    Row("another shard", forged(entry_bytes(1, (2,), 0, 8, shard=1)), "shard"),
    Row("unknown dtype", forged(entry_bytes(99, (2,), 0, 8, CRC))),
    Row("no elements right", forged(entry_bytes(1, (2,), 0, 8, crc=7)), "checksum", as_template=False),
    Row("two tensors at one place", entries(
        (b"a", entry_bytes(1, (2,), 0, 8, CRC)), (b"b", entry_bytes(1, (1,), 4, 4))), "two tensors at"),
    Row("strings alone", forged(entry_bytes(7, (1 << 50,), 0, 8))),
    Row("strings as the object graph", entries(
        (b"_CHECKPOINTABLE_OBJECT_GRAPH", entry_bytes(7, (1,), 0, 8)), (b"w", entry_bytes(1, (2,), 0, 8, CRC)))),
    Row("snappy bomb", entries((b"w", entry_bytes(1, (2,), 0, 8, CRC)), kind=1), "compressed"),
    Row("2^30 shards", entries((b"w", entry_bytes(1, (2,), 0, 8, CRC)), (b"", protobuf.number(1, 1 << 30))), "shards"),
    Row("name that leads outside", entries((b"../../x/kernel", entry_bytes(1, (2,), 0, 8, CRC))), "../..", as_template=False),
    Row("flipped bit of the index", changed(INDEX, lambda data: data.__setitem__(20, data[20] ^ 1)), "checksum"),
    Row("flipped bit of the data", changed(DATA, lambda data: data.__setitem__(3, data[3] ^ 1)), "checksum", as_template=False),
    Row("index cut", changed(INDEX, lambda data: data.__delitem__(slice(60, None)))),
    Row("data cut", changed(DATA, lambda data: data.__delitem__(slice(-5, None)))),
    Row("no index", changed(INDEX, lambda data: data.clear())),
)  # fmt: skip


@pytest.mark.parametrize("row", CHECKPOINTS, ids=str)
def test_refused_checkpoints(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".ckpt")


def saved(change: Callable[[Path], object]) -> Make:
    def make(good: Path, folder: Path) -> Path:
        copied(good / "saved", folder / "x")
        change(folder / "x")
        return folder / "x"

    return make


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


VARIABLES = "variables/variables"
SAVED = (
    Row("no variables", saved(lambda folder: shutil.rmtree(folder / "variables")), "variables"),
    Row("no shard", saved(lambda folder: (folder / f"{VARIABLES}{DATA}").unlink()), "variables"),
    Row("shard cut", saved(lambda folder: (folder / f"{VARIABLES}{DATA}").write_bytes(b"x"))),
    Row("flipped index", saved(lambda folder: flip(folder / f"{VARIABLES}{INDEX}", 30)), "checksum"),
    Row("flipped weight", saved(lambda folder: flip(folder / f"{VARIABLES}{DATA}", 5)), "checksum", as_template=False),
)  # fmt: skip


@pytest.mark.parametrize("row", SAVED, ids=str)
def test_refused_saved_models(row: Row, run: Commands, good: Path, tmp_path: Path) -> None:
    every_command(row, run, good, tmp_path, ".savedmodel")


def test_operations_of_a_saved_model_are_not_run(run: Commands, good: Path, tmp_path: Path) -> None:
    """Functions that write and read files are copied as they are into what is filled, and nothing else becomes of them."""
    import tensorflow as tf

    class Writes(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = tf.Variable(tf.ones((3, 5)), name="dense/kernel")

        @tf.function(input_signature=[tf.TensorSpec((None, 3))])
        def __call__(self, x: Any) -> Any:
            tf.io.write_file("MARK", "x")
            return x @ self.kernel + tf.cast(tf.strings.length(tf.io.read_file("/etc/passwd")), tf.float32)

    tf.saved_model.save(Writes(), str(tmp_path / "x"))
    assert run(tmp_path, "export", "x", "x.nwt").status == 0
    assert run(tmp_path, "import", "x.nwt", "--into", "x", "-o", "y").status == 0
    assert (tmp_path / "y" / "saved_model.pb").read_bytes() == (tmp_path / "x" / "saved_model.pb").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.nwt", "y"]


def test_a_pointer_leads_to_its_own_folder(run: Commands, good: Path, tmp_path: Path) -> None:
    """The file `checkpoint` may name any path; only what lies beside it is read."""
    (tmp_path / "x").mkdir()
    copied(good / "ckpt", tmp_path / "secret")
    (tmp_path / "x" / "checkpoint").write_text(f'model_checkpoint_path: "{tmp_path}/secret"\n')
    outcome = run(tmp_path, "export", "x", "out.nwt")
    assert outcome.status == 1 and not (tmp_path / "out.nwt").exists()


def test_the_recipe_of_a_checkpoint_is_good(run: Commands, tmp_path: Path) -> None:
    forged(entry_bytes(1, (2,), 0, 8, CRC))(tmp_path, tmp_path)
    assert run(tmp_path, "show", "x").status == 0
