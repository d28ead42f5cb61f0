"""A safetensors file is known by its content, whatever the length of its header looks like."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from neutral.containers.pytree import write_orbax
from neutral.errors import BadFile, Refused, Unsupported
from neutral.frameworks import detect
from neutral.native import from_array

LENGTHS = {"zip": b"PK", "pickle": b"\x80\x02", "pickle 4": b"\x80\x04", "brace": b"{\x01", "hdf5": b"\x89H"}


@pytest.mark.parametrize("start", LENGTHS.values(), ids=LENGTHS)
def test_header_length_that_begins_like_another_format(start: bytes, tmp_path: Path) -> None:
    length = int.from_bytes(start, "little")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + np.ones(2, "float32").tobytes())
    assert safetensors.numpy.load_file(path)["w"].tolist() == [1, 1]
    assert detect(path) == ("safetensors", "safetensors")


def test_a_folder_of_checkpoints_named_by_a_prefix_says_which(tmp_path: Path) -> None:
    for name in ("model.index", "model.data-00000-of-00001", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadFile, match=r"found a folder.*name .*/model$"):
        detect(tmp_path)
    (tmp_path / "model.index").unlink()
    with pytest.raises(BadFile, match=r"found a folder.*name the file itself"):
        detect(tmp_path)


def test_a_folder_with_a_model_and_a_checkpoint_below_it_is_neither(tmp_path: Path) -> None:
    """As a model's folder is in which somebody trains: the checkpoint must not pass for the model."""
    (tmp_path / "runs").mkdir()
    write_orbax({("params", "w"): from_array(np.ones((2, 2), "f4"))}, {}, tmp_path / "runs" / "best")
    (tmp_path / "notes.txt").write_bytes(b"")
    assert detect(tmp_path) == detect(tmp_path / "runs") == ("flax", "orbax")
    safetensors.numpy.save_file({"fc.weight": np.ones((2, 2), "float32")}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match=r"name the one that is meant: .*/model\.safetensors, .*/runs/best$"):
        detect(tmp_path)
    assert detect(tmp_path / "model.safetensors")[0] == "safetensors"
    assert detect(tmp_path / "runs" / "best") == ("flax", "orbax")


def test_plain_arrays_may_be_paddles_or_torchs(tmp_path: Path) -> None:
    """PaddleNLP writes `format: np` and kernels that are the transpose of torch's: read as torch's, a square one lies."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"fc.weight": np.ones((2, 2), "float32")}, path, {"format": "np"})
    for source in (path, tmp_path):
        with pytest.raises(Refused, match="--from paddle-safetensors or --from safetensors"):
            detect(source)
    safetensors.numpy.save_file({"params/fc/kernel": np.ones((2, 2), "float32")}, path, {"format": "np"})
    assert detect(path) == ("flax", "flax-safetensors")


def test_a_package_of_aotinductor_is_compiled_code(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as package:
        for name in ("data/aotinductor/model/c7.wrapper.so", "archive_format", "byteorder"):
            package.writestr(f"model/{name}", "pt2")
    with pytest.raises(Unsupported, match=r"AOTInductor, which is compiled code.* torch\.export\.save"):
        detect(tmp_path / "model.pt2")


def test_a_folder_of_models_says_which_there_are(tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BadFile, match=r"name .*unet or .*vae"):
        detect(tmp_path)
