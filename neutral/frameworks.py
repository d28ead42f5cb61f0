"""The registry: which frameworks there are, who reads and writes them, and what a file is.

>>> FRAMEWORKS["torch"].suffixes
('.pt', '.pth', '.ckpt', '.bin', '.pt2')

Nothing is imported until it is asked for: a framework's reader, writer and convention are named here by module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from neutral.containers.files import SourceFile
from neutral.conventions.forms import Convention
from neutral.errors import BadFile, Problem, Unsupported, WrongUsage, printable
from neutral.suffixes import ARCHIVE_SUFFIXES, suffix_of


@dataclass(frozen=True)
class Format:
    """One format of a framework's files, and the suffixes of such a file, the usual first.

    `reads` says in words what is read; nothing, if neutral does not read it. A file that is not `new` is written as the
    copy of a template alone. A `whole` one holds a model, not only its weights. A `folder` may be named without a suffix.
    """

    name: str
    reads: str
    suffixes: tuple[str, ...]
    new: bool = True
    whole: bool = False
    folder: bool = False


@dataclass(frozen=True)
class Framework:
    """One framework: modules of its reader, writer and convention, and its files (the usual format first).

    `target` is the module that decides which native class a canonical layer becomes where there is no template.
    `packages` are what a live model or a file that only the framework itself can write needs.
    """

    name: str
    exporter: str
    importer: str
    convention_module: str
    convention_name: str
    files: tuple[Format, ...]
    target: str | None = None
    packages: tuple[str, ...] = ()

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats that are read, by name."""
        return {file.name: file for file in self.files if file.reads}

    @property
    def reads(self) -> tuple[str, ...]:
        """The formats that are read, in words."""
        return tuple(file.reads for file in self.formats.values())

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes that are written."""
        return tuple(suffix for file in self.files if file.new for suffix in file.suffixes)

    def written_as(self, out: Path) -> Format:
        """The format of a new file of this name; without a known suffix the one of weights (a checkpoint's prefix)."""
        named = (file for file in self.files if file.new and suffix_of(out) in file.suffixes)
        return next(named, None) or self.usual(whole=False)

    def usual(self, whole: bool) -> Format:
        """The format of a new file that nobody named, a `whole` model or weights."""
        return next(file for file in self.files if file.new and (whole or not file.whole))

    def reader(self) -> ModuleType:
        return importlib.import_module(self.exporter)

    def writer(self) -> ModuleType:
        return importlib.import_module(self.importer)

    def convention(self) -> Convention:
        found: Convention = getattr(importlib.import_module(self.convention_module), self.convention_name)
        return found

    def installed(self) -> dict[str, str | None]:
        """The version of each package of the framework, None where it is not installed."""
        return {package: _version(package) for package in self.packages}


def _version(package: str) -> str | None:
    for name in _DISTRIBUTIONS.get(package, (package,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


_DISTRIBUTIONS = {"tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-macos", "tensorflow-intel")}

_TORCH = (".pt", ".pth", ".ckpt", ".bin")

FRAMEWORKS: Mapping[str, Framework] = {
    framework.name: framework
    for framework in (
        Framework(
            name="torch",
            exporter="neutral.exporters.torch",
            importer="neutral.importers.torch",
            convention_module="neutral.conventions.torch",
            convention_name="TORCH",
            files=(
                Format("pt", ".pt .pth .ckpt .bin (zip)", _TORCH),
                Format("pt-legacy", "before torch 1.6", _TORCH, new=False),
                Format("pt2", "", (".pt2",), whole=True),
            ),
            target="neutral.importers.torch_classes",
            packages=("torch",),
        ),
        Framework(
            name="keras",
            exporter="neutral.exporters.keras",
            importer="neutral.importers.keras",
            convention_module="neutral.conventions.keras",
            convention_name="KERAS",
            files=(
                Format("keras", ".keras", (".keras",), whole=True),
                Format("weights.h5", ".weights.h5 (Keras 2 and 3)", (".weights.h5",)),
                Format("h5", ".h5 (whole model, Keras 1 to 3)", (".h5", ".hdf5"), whole=True),
                Format("keras-folder", ".keras unzipped", (), new=False, whole=True, folder=True),
            ),
            target="neutral.importers.keras_config",
            packages=("keras",),
        ),
        Framework(
            name="tensorflow",
            exporter="neutral.exporters.tensorflow",
            importer="neutral.importers.tensorflow",
            convention_module="neutral.conventions.tensorflow",
            convention_name="TENSORFLOW",
            files=(
                Format("checkpoint", "checkpoint (TF 1 and 2)", (".ckpt",)),
                Format("savedmodel", "SavedModel folder", (".savedmodel",), whole=True, folder=True),
            ),
            target="neutral.importers.keras_config",
            packages=("tensorflow", "keras"),
        ),
        Framework(
            name="numpy",
            exporter="neutral.exporters.numpy",
            importer="neutral.importers.numpy",
            convention_module="neutral.conventions.numpy",
            convention_name="NUMPY",
            files=(Format("npz", ".npz", (".npz",)),),
            packages=("numpy",),
        ),
        Framework(
            name="safetensors",
            exporter="neutral.exporters.safetensors",
            importer="neutral.importers.safetensors",
            convention_module="neutral.conventions.torch",
            convention_name="TORCH",
            files=(
                Format("safetensors", ".safetensors (names of torch)", (".safetensors",)),
                Format("shards", "shards with an index", (".safetensors.index.json",), new=False, folder=True),
            ),
            target="neutral.importers.torch_classes",
            packages=("safetensors",),
        ),
    )
}

ARCHIVE = "archive"
"""The name that `detect` gives to neutral's own format."""


def owners(suffix: str) -> tuple[str, ...]:
    """Whose files have a suffix.

    >>> owners(".ckpt"), owners(".nwt"), owners(".txt")
    (('torch', 'tensorflow'), ('archive',), ())
    """
    found = (f.name for f in FRAMEWORKS.values() if any(suffix in file.suffixes for file in f.files))
    return (*found, ARCHIVE) if suffix in ARCHIVE_SUFFIXES else tuple(found)


def framework(name: str) -> Framework:
    """A framework by name; `WrongUsage` lists the names there are."""
    if name not in FRAMEWORKS:
        raise WrongUsage(
            Problem(printable(name), "no such framework", f"one of {', '.join(FRAMEWORKS)}", "correct the name")
        )
    return FRAMEWORKS[name]


def by_format(name: str) -> tuple[str, str]:
    """(framework, format) for a name that a user gave to either."""
    if name in FRAMEWORKS:
        return name, next(iter(FRAMEWORKS[name].formats))
    for known in FRAMEWORKS.values():
        if name in known.formats:
            return known.name, name
    names = [*FRAMEWORKS, *(f for known in FRAMEWORKS.values() for f in known.formats if f not in FRAMEWORKS)]
    raise WrongUsage(Problem(printable(name), "no such format", f"one of {', '.join(names)}", "correct the name"))


_HDF5 = b"\x89HDF\r\n\x1a\n"
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_SSTABLE = bytes.fromhex("57fb808b247547db")


def detect(path: str | os.PathLike[str]) -> tuple[str, str]:
    """(framework, format) of a file or folder, by its content and not by its suffix; (`archive`, `nwt`) for an archive.

    A checkpoint of TensorFlow is named by its prefix, its `.index` file or its folder. Raises `BadFile` for what no
    reader knows, `Unsupported` for a program of torch.export.
    """
    where = Path(path)
    if where.is_dir():
        return _detect_folder(where)
    if not where.exists() and where.with_name(f"{where.name}.index").is_file():
        return "tensorflow", "checkpoint"
    with SourceFile(where) as file:
        head = file.read(0, min(file.size, 64))
        # The length of a safetensors header may begin with the bytes of any other format; it ends with zeros.
        if head[6:9] == b"\0\0{":
            return _detect_safetensors(where)
        if head.startswith(b"PK"):
            return _detect_zip(file)
        if any(file.size >= at + 8 and file.read(at, 8) == _HDF5 for at in (0, 512, 1024, 2048)):
            return "keras", "weights.h5" if suffix_of(where) == ".weights.h5" else "h5"
        if file.size >= 48 and file.read(file.size - 8, 8) == _SSTABLE:
            return "tensorflow", "checkpoint"
        if head.startswith(_LEGACY_TORCH) or (head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            return "torch", "pt-legacy"
        if head[257:262] == b"ustar" or (file.size >= 512 and file.read(257, 5) == b"ustar"):
            return "torch", "pt-legacy"
        if head.lstrip()[:1] == b"{":
            return _detect_json(where)
        if len(head) > 8 and head[8:].lstrip()[:1] == b"{":
            return _detect_safetensors(where)
    raise BadFile(
        Problem(
            str(where),
            "content that no reader knows" if head else "an empty file",
            "a file of a format that `neutral formats` lists",
            "say what a source is with --from (of export, convert, show, digest)",
        )
    )


def _detect_folder(where: Path) -> tuple[str, str]:
    if (where / "saved_model.pb").is_file():
        return "tensorflow", "savedmodel"
    if (where / "config.json").is_file() and (where / "model.weights.h5").is_file():
        return "keras", "keras-folder"
    if (where / "checkpoint").is_file():
        return "tensorflow", "checkpoint"
    if any(where.glob("*.safetensors.index.json")):
        return "safetensors", "shards"
    if any(where.glob("*.safetensors")):
        return "safetensors", "safetensors"
    raise BadFile(
        Problem(
            str(where),
            "a folder",
            "a SavedModel, a checkpoint folder, an unzipped .keras or a folder of safetensors shards",
            "name the file itself",
        )
    )


def _detect_safetensors(where: Path) -> tuple[str, str]:
    from neutral.archive import is_archive

    # A shard, or an archive whose one key is damaged, must not pass for a model in the names of torch.
    if suffix_of(where) in ARCHIVE_SUFFIXES or is_archive(where):
        return ARCHIVE, "nwt"
    return "safetensors", "safetensors"


def _detect_zip(file: SourceFile) -> tuple[str, str]:
    from neutral.containers.torch_program import holds_program
    from neutral.containers.zip import ZipSource

    names = ZipSource(file).members.keys()
    if "config.json" in names and any(name in names for name in ("model.weights.h5", "model.weights.npz")):
        return "keras", "keras"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "torch", "pt"
    if names and all(name.endswith(".npy") for name in names):
        return "numpy", "npz"
    if holds_program(names):
        raise Unsupported(
            Problem(
                str(file.path),
                "a program of torch.export (.pt2), whose weights neutral does not read yet",
                "a .pt",
                "save the module or its state dict with torch.save; `neutral verify` alone takes a .pt2, to run it",
            )
        )
    shown = ", ".join(printable(name, 40) for name in list(names)[:4])
    raise BadFile(
        Problem(str(file.path), f"a zip of {shown or 'nothing'}", "a .pt, a .keras or an .npz", "name another file")
    )


def _detect_json(where: Path) -> tuple[str, str]:
    try:
        if where.stat().st_size <= 256 << 20:
            content: Any = json.loads(where.read_bytes())
            if isinstance(content, dict) and "weight_map" in content:
                metadata = content.get("metadata")
                if isinstance(metadata, dict) and "neutral" in metadata:
                    return ARCHIVE, "nwt"
                return "safetensors", "shards"
    except (ValueError, RecursionError):
        pass
    raise BadFile(
        Problem(str(where), "JSON without a weight_map", "an index of safetensors shards", "name another file")
    )


def writer_of(out: Path, to: str | None) -> Framework:
    """The framework that writes a file of this name: the one named, or the only one whose suffix it has."""
    suffix = suffix_of(out)
    fits = [f for f in FRAMEWORKS.values() if suffix in f.suffixes]
    if to is None:
        if len(fits) == 1:
            return fits[0]
        found = f"the suffix of {' and '.join(f.name for f in fits)}" if fits else "a suffix that no framework writes"
        raise WrongUsage(
            Problem(
                str(out), found, "a suffix of one framework", f"name the framework with --to ({', '.join(FRAMEWORKS)})"
            )
        )
    wanted = framework(to)
    if to == "torch" and any(f.name == "safetensors" for f in fits):
        return FRAMEWORKS["safetensors"]
    if wanted not in fits and not (to == "tensorflow" and not owners(suffix)):
        raise WrongUsage(
            Problem(
                str(out),
                f"a suffix that {to} does not write",
                f"one of {', '.join(wanted.suffixes)}",
                "choose another suffix",
            )
        )
    return wanted
