"""What a file is, is read from its content; and no framework is imported for it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from neutral.cli import main
from neutral.errors import BadFile, WrongUsage
from neutral.frameworks import FRAMEWORKS, by_format, detect, framework, writer_of


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in names:
            file.writestr(name, b"")
    return out.getvalue()


def safetensors(metadata: dict[str, str]) -> bytes:
    header = json.dumps({"__metadata__": metadata, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0"


CONTENT: list[tuple[bytes, tuple[str, str]]] = [
    (zipped("config.json", "model.weights.h5", "metadata.json"), ("keras", "keras")),
    (zipped("archive/data.pkl", "archive/version"), ("torch", "pt")),
    (zipped("a.npy", "b/c.npy"), ("numpy", "npz")),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ("torch", "pt-legacy")),
    (safetensors({"format": "pt"}), ("safetensors", "safetensors")),
    (safetensors({"neutral": "{}"}), ("archive", "nwt")),
    (b'{"metadata": {}, "weight_map": {}}', ("safetensors", "shards")),
]


@pytest.mark.parametrize("suffix", ["bin", "h5", "nwt", "pt"])
@pytest.mark.parametrize(("content", "wanted"), CONTENT)
def test_a_suffix_is_no_evidence(content: bytes, wanted: tuple[str, str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    if suffix == "nwt" and wanted[0] == "safetensors" and not content.startswith(b"{"):
        wanted = ("archive", "nwt")  # an archive that lost its key is a damaged archive, not a model of torch
    assert detect(path) == wanted and detect(str(path)) == wanted


def test_hdf5_and_its_user_block(tmp_path: Path) -> None:
    for name, block in (("a.h5", 0), ("b.weights.h5", 0), ("c.pt", 512), ("d.bin", 2048)):
        with h5py.File(tmp_path / name, "w", userblock_size=block):
            pass
    assert detect(tmp_path / "a.h5") == detect(tmp_path / "c.pt") == detect(tmp_path / "d.bin") == ("keras", "h5")
    assert detect(tmp_path / "b.weights.h5") == ("keras", "weights.h5")


def test_folders_and_prefixes(tmp_path: Path) -> None:
    for folder, files, wanted in (
        ("saved", ["saved_model.pb"], ("tensorflow", "savedmodel")),
        ("ckpt", ["checkpoint"], ("tensorflow", "checkpoint")),
        ("unzipped", ["config.json", "model.weights.h5"], ("keras", "keras-folder")),
        ("single", ["model.safetensors"], ("safetensors", "safetensors")),
        ("shards", ["model.safetensors.index.json", "1.safetensors"], ("safetensors", "shards")),
    ):
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).touch()
        assert detect(tmp_path / folder) == wanted
    (tmp_path / "model.index").touch()
    assert detect(tmp_path / "model") == ("tensorflow", "checkpoint")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match="a folder"):
        detect(tmp_path / "empty")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P",
        b"PK\3\4",
        b"{",
        b"{}",
        b"[" * 5000,
        b"\x89HDF",
        b"GIF89a" + bytes(600),
        zipped("x.txt"),
        zipped(),
        bytes(700),
    ],
)
def test_what_nobody_knows_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BadFile) as raised:
        detect(tmp_path / "x")
    assert "\n" not in str(raised.value) and str(tmp_path / "x") in str(raised.value)


@pytest.mark.parametrize("name", ["archive/models/model.json", "serialized_exported_program.json"])
def test_a_program_of_torch_export_is_known(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An old or empty one, too: it is named, not taken for a zip of anything."""
    path = tmp_path / "x.pt"
    path.write_bytes(zipped("archive/data/weights/weight_0", name))
    assert detect(path) == ("torch", "pt2")
    for command in (["show"], ["digest"], ["export"]):
        assert main([*command, str(path)]) > 0
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "torch 2.8" in said
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt"}


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile):
        detect(tmp_path / "nothing")


def test_a_writer_is_found_by_suffix_or_named() -> None:
    assert writer_of(Path("a.keras"), None).name == "keras"
    assert writer_of(Path("a.PT"), None).name == "torch"
    assert writer_of(Path("a.npz"), None).name == "numpy"
    assert writer_of(Path("a.safetensors"), "torch").name == "safetensors"
    assert writer_of(Path("a.ckpt"), "tensorflow").name == "tensorflow"
    assert writer_of(Path("a"), "tensorflow").name == "tensorflow"
    for name, to in (("a.ckpt", None), ("a.xyz", None), ("a.keras", "torch"), ("a.pt", "keras"), ("a.pt", "onnx")):
        with pytest.raises(WrongUsage):
            writer_of(Path(name), to)


def test_every_framework_is_whole() -> None:
    for name, each in FRAMEWORKS.items():
        assert framework(name) is each and each.convention().framework in FRAMEWORKS
        assert callable(each.reader().read) and callable(each.writer().fill) and callable(each.writer().build)
        assert each.reads and each.suffixes and all(suffix.startswith(".") for suffix in each.suffixes)
        for known in each.formats:
            assert by_format(known)[1] == known
        assert all(version for version in each.installed().values()), "the tests run with every framework"
    with pytest.raises(WrongUsage, match="torch, keras, tensorflow"):
        framework("docx")
    with pytest.raises(WrongUsage):
        by_format("docx")


HEAVY = (
    "{'torch', 'keras', 'tensorflow', 'tf_keras', 'jax', 'flax', 'orbax', 'tensorstore', 'equinox', 'onnx', 'onnxruntime', "
    "'paddle', 'mlx'} & set(sys.modules)"
)
GOLDEN = Path(__file__).parent / "golden" / "versions"


def run_without_frameworks(script: str, *arguments: str) -> str:
    """What a fresh interpreter prints; the last line is what it has imported of the frameworks."""
    whole = f"import sys\n{script}\nprint(sorted({HEAVY}))"
    run = subprocess.run([sys.executable, "-c", whole, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def test_no_framework_is_imported_to_read_a_file(tmp_path: Path) -> None:
    """One process reads one file of each kind: an import for any of them would show."""
    import keras
    import tensorflow as tf
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    torch.save(module, tmp_path / "module.pt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.save(module.state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="relu")])
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    model.save(tmp_path / "model.h5")
    tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint-1"))
    np.savez(tmp_path / "arrays.npz", **{"fc/kernel": np.zeros((2, 3))})
    names = (
        "module.pt",
        "state.pt",
        "legacy.pt",
        "model.keras",
        "model.weights.h5",
        "model.h5",
        "checkpoint-1",
        "arrays.npz",
    )
    script = (
        "from neutral.cli import main\n"
        "for source in sys.argv[1:]:\n"
        "    assert main(['export', source, source + '.nwt', '-q']) == 0, source\n"
    )
    assert run_without_frameworks(script, *(str(tmp_path / name) for name in names)) == "[]"
    assert all((tmp_path / f"{name}.nwt").is_file() for name in names)


def test_no_framework_is_imported_to_convert_any_file_to_any_other(tmp_path: Path) -> None:
    """Files that the frameworks wrote once, each into arrays and, from the arrays, into a new file of each framework."""
    with zipfile.ZipFile(GOLDEN / "orbax-0.11.0" / "image.ocdbt.zip") as zipped_folder:
        zipped_folder.extractall(tmp_path / "orbax")
    sources = {
        "flax": GOLDEN / "flax-0.10.2" / "image.msgpack",
        "orbax": tmp_path / "orbax",
        "onnx": GOLDEN / "onnx-1.12.0" / "image_opset13.onnx",
        "mlx": GOLDEN / "mlx-0.28.0" / "image.safetensors",
        "paddle": GOLDEN / "paddle-3.0.0" / "image_protocol2.pdparams",
        "tfjs": GOLDEN / "tfjs-3.21.0" / "image",
    }
    outputs = ("b.pt", "b.safetensors", "b.weights.h5", "b.msgpack", "b.pdparams", "b.npz")
    script = (
        "import os\n"
        "from neutral.cli import main\n"
        "work, *sources = sys.argv[1:]\n"
        "os.chdir(work)\n"
        "for number, source in enumerate(sources):\n"
        "    assert main(['export', source, f'{number}.nwt', '-q']) == 0, source\n"
        "for to, name in (('torch', 'b.pt'), ('torch', 'b.safetensors'), ('keras', 'b.weights.h5'), ('flax', 'b.msgpack'),\n"
        "                 ('paddle', 'b.pdparams'), ('mlx', 'c.safetensors'), ('numpy', 'b.npz')):\n"
        "    assert main(['import', '5.nwt', '--to', to, '-o', name, '-q']) == 0, name\n"
    )
    given = (str(tmp_path), *(str(path) for path in sources.values()))
    assert run_without_frameworks(script, *given) == "[]"
    assert all((tmp_path / name).is_file() for name in outputs)


@pytest.mark.parametrize("script", ["import neutral", "import neutral.cli", "import neutral\ndir(neutral)"])
def test_importing_neutral_imports_no_framework(script: str) -> None:
    assert run_without_frameworks(script) == "[]"
