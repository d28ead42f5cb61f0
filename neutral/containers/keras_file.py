"""A Keras file as bytes: its variables, its config, and the files or members they lie in.

Formats are told by content: `.keras` (a zip, or the same as a folder), the legacy `.h5`, `.weights.h5`, and the index of
sharded weights, `.weights.json`. The config is a text: it is parsed, bounded in size and depth, and never built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neutral.containers.files import SourceFile
from neutral.containers.hdf5 import SIGNATURE, Hdf5Source, open_hdf5
from neutral.containers.json_text import parse_json
from neutral.containers.keras_shards import Shards, open_shards
from neutral.containers.zip import ZipSource
from neutral.containers.zip_records import STORED
from neutral.errors import BadFile, Problem

Config = Mapping[str, Any]

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"

_LARGEST_JSON = 64 << 20
_SHARD = re.compile(r"(.+)_[0-9]{5}\.weights\.h5")


@dataclass
class KerasFile:
    """An opened Keras file: its variables, its config where it has one, and what must be closed."""

    path: Path
    format: str
    source: Hdf5Source
    config: Config | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    zip: ZipSource | None = None
    file: SourceFile | None = None
    shards: Shards | None = None

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.shards is not None:
            self.shards.close()


def open_keras(path: Path) -> KerasFile:
    """Open a Keras file of any format, told by its content."""
    if path.is_dir():
        return _open_folder(path)
    file = SourceFile(path)
    try:
        if file.size >= 8 and file.read(0, 8) == SIGNATURE:
            source = open_hdf5(file.section(0, file.size), str(path))
            return _open_h5(path, file, source)
        if file.read(0, min(file.size, 64)).lstrip()[:1] == b"{":
            file.close()
            shards = open_shards(path)
            return KerasFile(path, "weights.json", shards.whole, shards=shards)
        return _open_zip(path, file)
    except BaseException:
        file.close()
        raise


def _open_zip(path: Path, file: SourceFile) -> KerasFile:
    archive = ZipSource(file)
    for name in (CONFIG, WEIGHTS):
        if name not in archive.members:
            raise BadFile(Problem(str(path), f"no member {name}", "a .keras file", "save it again with model.save"))
    config = parse_json(archive.read(CONFIG, _LARGEST_JSON), f"{path}: {CONFIG}")
    metadata = {}
    if METADATA in archive.members:
        metadata = parse_json(archive.read(METADATA, 1 << 20), f"{path}: {METADATA}")
    where = f"{path}: {WEIGHTS}"
    # The structure is read out of order, the elements are read through a storage that checks the CRC.
    if archive.members[WEIGHTS].method == STORED:
        source = open_hdf5(archive.section(WEIGHTS), where, elements=archive.open(WEIGHTS))
    else:
        source = open_hdf5(archive.open(WEIGHTS), where)
    return KerasFile(path, "keras", source, config, _versions(metadata), archive, file)


def _open_folder(path: Path) -> KerasFile:
    """What `model.save(..., zipped=False)` writes."""
    texts = {}
    for name in (CONFIG, METADATA):
        if name == METADATA and not (path / name).exists():
            continue
        with SourceFile(path / name) as text:
            if text.size > _LARGEST_JSON:
                raise BadFile(Problem(str(path / name), f"{text.size} bytes", f"at most {_LARGEST_JSON}"))
            texts[name] = parse_json(text.read(0, text.size), str(path / name))
    file = SourceFile(path / WEIGHTS)
    try:
        source = open_hdf5(file.section(0, file.size), str(path / WEIGHTS))
    except BaseException:
        file.close()
        raise
    return KerasFile(path, "keras", source, texts[CONFIG], _versions(texts.get(METADATA, {})), None, file)


def _open_h5(path: Path, file: SourceFile, source: Hdf5Source) -> KerasFile:
    root = source.groups[""]
    versions = _versions(root)
    if "model_config" in root:
        text = root["model_config"]
        if not isinstance(text, str):
            raise BadFile(Problem(str(path), "a model_config that is no text", "JSON"))
        config = parse_json(text.encode("utf-8", "surrogateescape"), f"{path}: model_config")
        return KerasFile(path, "h5", source, config, versions, None, file)
    if "layer_names" in root or "layer_names0" in root:
        return KerasFile(path, "h5-weights", source, None, versions, None, file)
    if any(group.rpartition("/")[2] == "vars" for group in source.groups):
        _check_whole(path)
        return KerasFile(path, "weights.h5", source, None, versions, None, file)
    raise BadFile(Problem(str(path), "an HDF5 file without Keras weights", "one that Keras wrote"))


def _check_whole(path: Path) -> None:
    """A shard holds some of a model's variables, and would pass for a file of all of them."""
    found = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{found[1]}.weights.json") if found is not None else None
    if index is not None and index.is_file():
        raise BadFile(Problem(str(path), f"one of the shards of {index.name}", "all of them", f"name {index}"))


def _versions(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("keras_version", "backend") if isinstance(found.get(name), str)}
