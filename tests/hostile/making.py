"""Good files of every format, written by the real frameworks, and what is needed to spoil them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def make_good_files(folder: Path) -> None:
    """One small network of two dense layers in every format that torch, Keras and TensorFlow write, and in neutral's own."""
    import keras
    import safetensors.numpy
    import tensorflow as tf
    import torch

    import neutral

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    torch.save(module, folder / "model.pt")
    torch.save(module.state_dict(), folder / "state.pt")
    torch.save(module, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.jit.script(module).save(folder / "scripted.pt")
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    make_shards(folder / "shards", state)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, activation="relu"), keras.layers.Dense(2)])
    for name in ("model.keras", "model.h5"):
        model.save(folder / name)
    model.save_weights(folder / "model.weights.h5")
    tf.train.Checkpoint(model=model).write(str(folder / "ckpt"))
    model.export(str(folder / "saved"), verbose=False)
    neutral.export_model(folder / "model.pt", folder / "model.nwt").close()
    neutral.import_model(folder / "model.nwt", to="numpy")


def make_shards(folder: Path, state: Mapping[str, Any]) -> None:
    """A Hugging Face model of two shards and their index."""
    import safetensors.numpy

    folder.mkdir()
    weight_map = {}
    for number, prefix in ((1, "0."), (2, "2.")):
        name = f"model-{number:05}-of-00002.safetensors"
        mine = {key: array for key, array in state.items() if key.startswith(prefix)}
        safetensors.numpy.save_file(mine, folder / name)
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {"total_size": 148}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def safetensors_bytes(header: Json | bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def with_members(source: Path, target: Path, changes: Mapping[str, bytes | None], root: str = "") -> Path:
    """A zip with some members replaced, added, or (None) left out; `root` goes before each of their names."""
    changes = {root + name: data for name, data in changes.items()}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = changes.get(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
        for name in changes.keys() - set(old.namelist()):
            data = changes[name]
            if data is not None:
                new.writestr(name, data)
    return target


def copied(source: Path, target: Path) -> Path:
    """A file, a folder, or the files of a checkpoint's prefix under another name."""
    if source.is_dir():
        return Path(shutil.copytree(source, target))
    for path in [source] if source.exists() else source.parent.glob(f"{source.name}.*"):
        shutil.copyfile(path, target.with_name(target.name + path.name[len(source.name) :]))
    return target


def archive_parts(path: Path) -> tuple[Json, Json, bytes]:
    """(manifest, header entries, data) of an archive."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return json.loads(header.pop("__metadata__")["neutral"]), header, raw[8 + length :]


def edited_archive(good: Path, target: Path, edit: Callable[[Json, Json], None], *, rehash: bool = True) -> Path:
    """An archive whose manifest and header were changed, with the weights digest that the new manifest has."""
    manifest, header, data = archive_parts(good)
    edit(manifest, header)
    if rehash:
        manifest["weights_digest"] = digest_of(manifest)
    manifest["manifest_digest"] = "0" * 64
    blank = canonical_json(manifest)
    manifest["manifest_digest"] = hashlib.sha256(blank.encode()).hexdigest()
    return archive_of(target, canonical_json(manifest), header, data)


def canonical_json(value: Json) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def archive_of(target: Path, manifest: str, header: Json, data: bytes, **metadata: str) -> Path:
    """An archive of any manifest text."""
    target.write_bytes(safetensors_bytes({"__metadata__": {"neutral": manifest, **metadata}, **header}, data))
    return target


def digest_of(manifest: Json) -> str:
    """The weights digest that a manifest should have; that of the unchanged one if it is no manifest any more."""
    from neutral.archive import weights_digest
    from neutral.errors import BadFile
    from neutral.schema.manifest import Manifest

    try:
        return weights_digest(Manifest.from_json(json.dumps(manifest)).layers)
    except (BadFile, KeyError):
        return str(manifest.get("weights_digest"))


def npz_bytes(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        for name, data in members:
            zipped.writestr(name, data)
    return out.getvalue()
