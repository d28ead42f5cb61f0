"""TensorFlow.js layers models as bytes: `model.json` and the shards beside it.

>>> import pathlib, tempfile
>>> import numpy as np
>>> from neutral.native import from_array
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> write(folder / "model.json", {"class_name": "Sequential"}, [("fc/kernel", from_array(np.ones((2, 3), np.float32)))])
>>> opened = open_tfjs(folder)
>>> opened.weights["fc/kernel"].data.shape, [file.path.name for file in opened.files]
((2, 3), ['group1-shard1of1.bin'])

The weights of a group follow each other without gaps, in the order of the manifest; the group's shards are these bytes
cut into files, so that one weight may lie in several. A quantized weight is stored as integers: its values are those
that TensorFlow.js computes of them when it loads the model.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neutral.containers.elements import element_bytes
from neutral.containers.files import SourceFile, leads_outside, new_file
from neutral.containers.json_text import parse_json
from neutral.containers.tfjs_quantization import Quantization, read_quantization
from neutral.errors import BadFile, Problem, Refused, Unsupported, printable, raise_all
from neutral.native import Stored, Tensor

Json = Mapping[str, Any]

MODEL = "model.json"

SHARD = 4 << 20
"""Bytes of a shard at the most, as TensorFlow.js' own converter writes them."""

_LARGEST_JSON = 16 << 20
_MOST_AXES = 32
_MOST_WEIGHTS = 100_000
_MOST_BYTES = 1 << 62

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "int32": np.dtype("<i4"),
    "bool": np.dtype("?"),
    "complex64": np.dtype("<c8"),
}


@dataclass(frozen=True)
class Weight:
    """One weight: its values, what is stored of it, and how these integers become values if it is quantized."""

    name: str
    data: Tensor
    stored: Stored
    quantization: Quantization | None = None
    group: str = ""


@dataclass(frozen=True)
class Group:
    """Weights that lie one after the other in the same shards."""

    shards: tuple[str, ...]
    files: tuple[SourceFile, ...]
    weights: tuple[Weight, ...]


@dataclass
class TfjsModel:
    """An opened model: its JSON, as text and parsed, and its weights by name, unread."""

    path: Path
    text: bytes
    document: Json
    groups: tuple[Group, ...] = ()
    weights: dict[str, Weight] = field(default_factory=dict)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return tuple(file for group in self.groups for file in group.files)

    def close(self) -> None:
        for file in self.files:
            file.close()


@dataclass(frozen=True)
class _Joined:
    """Files end to end as one `Storage`."""

    files: tuple[SourceFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for file in self.files:
            if not len(buffer):
                return
            here = max(0, min(len(buffer), file.size - offset))
            if here:
                file.read_into(offset, buffer[:here])
                buffer = buffer[here:]
            offset = max(0, offset - file.size)
        if len(buffer):
            raise BadFile(Problem(str(self.files[0].path), f"{len(buffer)} bytes too few", "all that it promises"))


def open_tfjs(path: Path) -> TfjsModel:
    """Open `model.json`, or the folder that holds it; every shard and every size is checked, no weight is read."""
    where = path / MODEL if path.is_dir() else path
    with SourceFile(where) as file:
        if file.size > _LARGEST_JSON:
            raise BadFile(Problem(str(where), f"{file.size} bytes of JSON", f"at most {_LARGEST_JSON}"))
        text = file.read(0, file.size)
    document = parse_json(text, str(where), "JSON as TensorFlow.js writes it")
    _check_format(where, document)
    manifest = document.get("weightsManifest")
    if not isinstance(manifest, list):
        raise BadFile(
            Problem(str(where), "no weightsManifest", "a list of groups of weights", "save the model with its weights")
        )
    opened = TfjsModel(where, text, document)
    try:
        _read_groups(opened, manifest)
    except BaseException:
        opened.close()
        raise
    return opened


def _check_format(where: Path, document: Json) -> None:
    topology = document.get("modelTopology")
    graph = isinstance(topology, Mapping) and ("node" in topology or "library" in topology)
    if document.get("format") == "graph-model" or graph:
        raise Unsupported(
            Problem(
                str(where),
                "a graph model of TensorFlow.js, whose weights are constants of a graph that was folded and renamed",
                "a layers model",
                "export the model that it was converted from (a SavedModel, a .keras)",
            )
        )
    if document.get("format") not in (None, "layers-model"):
        raise BadFile(Problem(str(where), f"the format {document['format']!r}", "'layers-model'"))
    if not isinstance(topology, Mapping):
        raise BadFile(Problem(str(where), "no modelTopology", "the layers of a model", "save the whole model"))


def _read_groups(opened: TfjsModel, manifest: Sequence[Any]) -> None:
    names: set[str] = set()
    for number, group in enumerate(manifest):
        where = f"{opened.path}: weightsManifest[{number}]"
        paths = group.get("paths") if isinstance(group, Mapping) else None
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(paths, list) or not isinstance(weights, list):
            raise BadFile(Problem(where, "no paths or no weights", "a list of each"))
        files: list[SourceFile] = []
        # Known to the model at once, so that whatever fails later closes the files.
        for shard in paths:
            path = _shard(opened.path, shard, names)
            files.append(SourceFile(path))
            opened.groups = (*opened.groups[:number], Group(tuple(paths), tuple(files), ()))
        found = tuple(_weights(where, weights, _Joined(tuple(files)), opened.weights))
        opened.groups = (*opened.groups[:number], Group(tuple(paths), tuple(files), found))


def _plain(model: Path, shard: object, names: set[str]) -> str:
    """A shard's path below the folder of `model.json`, which no other shard has."""
    if not isinstance(shard, str) or not shard or "\0" in shard or leads_outside(shard) or "\\" in shard:
        raise BadFile(Problem(str(model), f"a shard {shard!r}", "the name of a file beside model.json"))
    plain = "/".join(step for step in shard.split("/") if step not in ("", "."))
    if not plain or plain in names or plain == model.name:
        raise BadFile(Problem(str(model), f"a shard {shard!r} named twice", "each shard once"))
    names.add(plain)
    return plain


def _shard(model: Path, shard: object, names: set[str]) -> Path:
    """A shard that is there, reached without links."""
    path = model.parent
    for step in _plain(model, shard, names).split("/"):
        path = path / step
        try:
            mode = path.lstat().st_mode
        except OSError:
            found = f"a shard {shard!r} that is not there"
            raise BadFile(Problem(str(model), found, "every shard beside model.json")) from None
        if stat.S_ISLNK(mode):
            raise BadFile(Problem(str(path), "a link", "a shard that is a file", "copy the files into one folder"))
    return path


def _weights(where: str, entries: Sequence[Any], storage: _Joined, known: dict[str, Weight]) -> Iterator[Weight]:
    offset, total = 0, storage.nbytes
    for number, entry in enumerate(entries):
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not _is_name(name):
            raise BadFile(Problem(f"{where}.weights[{number}]", f"the name {name!r}", "a name, without NUL"))
        if len(known) >= _MOST_WEIGHTS:
            raise BadFile(Problem(where, f"more than {_MOST_WEIGHTS} weights", "fewer"))
        if name in known:
            raise BadFile(Problem(f"{where}: {printable(name)}", "two weights of this name", "each name once"))
        weight = _weight(f"{where}: {printable(name, 100)}", name, entry, storage, offset, total)
        offset += weight.stored.nbytes
        known[name] = weight
        yield weight
    if offset != total:
        raise BadFile(
            Problem(where, f"shards of {total} bytes", f"the {offset} of its weights", "a shard is cut short or forged")
        )


def _is_name(text: str) -> bool:
    return bool(text) and "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _weight(where: str, name: str, entry: Json, storage: _Joined, offset: int, total: int) -> Weight:
    shape, told = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise BadFile(Problem(where, f"the shape {shape!r}", f"at most {_MOST_AXES} sizes of 0 or more"))
    if told == "string":
        raise Unsupported(Problem(where, "a weight of texts", "numbers", "leave the layer out"))
    dtype = DTYPES.get(told) if isinstance(told, str) else None
    if dtype is None:
        raise BadFile(Problem(where, f"the dtype {told!r}", f"one of {', '.join(DTYPES)}"))
    quantization = read_quantization(where, entry["quantization"], dtype) if "quantization" in entry else None
    kept = dtype if quantization is None else quantization.stored
    widest = math.prod(n for n in shape if n) * 8
    if math.prod(shape) * kept.itemsize > total - offset or widest > _MOST_BYTES:
        found = f"{kept.name} {tuple(shape)} at byte {offset}"
        raise BadFile(Problem(where, found, f"less than the {total} bytes of its shards", "a shard is cut short"))
    stored = Stored(storage, shape, kept, offset)
    group = entry.get("group")
    data: Tensor = stored if quantization is None else quantization.values(stored)
    return Weight(name, data, stored, quantization, group if isinstance(group, str) else "")


# Writing.


def replace(opened: TfjsModel, tensors: Mapping[str, Tensor], out: Path, force: bool = False) -> None:
    """A copy of the model at `out` (its JSON) with new values for the weights named; shards lie beside it."""
    problems = []
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        weight = opened.weights.get(name)
        if weight is None:
            problems.append(Problem(f"{opened.path}: {name}", "no such weight", "one of the template's"))
        elif (weight.data.shape, weight.data.dtype) != (tensor.shape, tensor.dtype):
            wanted = f"{weight.data.dtype.name} of shape {weight.data.shape}"
            problems.append(Problem(name, f"{tensor.dtype.name} of shape {tensor.shape}", wanted))
        elif weight.quantization is None:
            replaced[name] = tensor
        elif not weight.quantization.holds(tensor):
            problems.append(
                Problem(
                    name,
                    f"values that the template's {weight.quantization.name} quantization cannot hold exactly",
                    "values of its own scale",
                    "use a template that is not quantized",
                )
            )
        else:
            replaced[name] = weight.quantization.quantized(tensor)
    raise_all(Refused, problems)
    for group in opened.groups:
        order = (replaced.get(weight.name, weight.stored) for weight in group.weights)
        shards = [(shard, file.size) for shard, file in zip(group.shards, group.files, strict=True)]
        _write_shards(out.parent, shards, order, force)
    with new_file(out, force) as file:
        file.write(opened.text)


def write(
    out: Path,
    topology: Json,
    weights: Sequence[tuple[str, Tensor]],
    described: Json | None = None,
    force: bool = False,
) -> None:
    """A new model: `out` is its JSON, `described` what stands in front of its topology there."""
    entries = [{"name": name, "shape": list(t.shape), "dtype": t.dtype.name} for name, t in weights]
    total = sum(tensor.nbytes for _, tensor in weights)
    count = max(1, -(-total // SHARD))
    sizes = [min(SHARD, total - SHARD * i) for i in range(count)]
    # Another name than the usual one may mean that another model lies in the same folder.
    own = "" if out.name == MODEL else f"{out.stem}-"
    shards = [(f"{own}group1-shard{i + 1}of{count}.bin", size) for i, size in enumerate(sizes)]
    manifest = [{"paths": [shard for shard, _ in shards], "weights": entries}]
    document = {
        "format": "layers-model",
        **(described or {}),
        "modelTopology": topology,
        "weightsManifest": manifest if weights else [],
    }
    if weights:
        _write_shards(out.parent, shards, (tensor for _, tensor in weights), force)
    with new_file(out, force) as file:
        file.write(json.dumps(document, separators=(",", ":")).encode())


def write_again(
    out: Path, text: bytes, sizes: Sequence[Any], tensors: Mapping[str, Tensor], force: bool = False
) -> None:
    """The model of a JSON that an archive kept: the same text, its shards of the `sizes` that they had.

    The text is no more to be trusted than a file. What it lists must be exactly the tensors given.
    """
    document = parse_json(text, str(out), "JSON as TensorFlow.js writes it")
    manifest = document.get("weightsManifest")
    groups: list[tuple[list[tuple[str, int]], list[Tensor]]] = []
    names: set[str] = set()
    left = dict(tensors)
    problems: list[Problem] = []
    for number, group in enumerate(_list(manifest)):
        given = group if isinstance(group, Mapping) else {}
        order = []
        for entry in _list(given.get("weights")):
            name = entry.get("name") if isinstance(entry, Mapping) else None
            tensor = left.pop(name, None) if isinstance(name, str) else None
            dtype = DTYPES.get(str(entry.get("dtype"))) if isinstance(entry, Mapping) else None
            if tensor is None or dtype != tensor.dtype or list(tensor.shape) != entry.get("shape"):
                problems.append(Problem(printable(name), "no such weight", "one for each that its JSON lists"))
                continue
            if "quantization" in entry:
                quantization = read_quantization(printable(name), entry["quantization"], dtype)
                if not quantization.holds(tensor):
                    problems.append(Problem(printable(name), "values that its quantization cannot hold", "its own"))
                tensor = quantization.quantized(tensor)
            order.append(tensor)
        shards = [_plain(out, shard, names) for shard in _list(given.get("paths"))]
        told = sizes[number] if number < len(sizes) else []
        groups.append((_sized(shards, told, sum(tensor.nbytes for tensor in order)), order))
    problems += [Problem(name, "a weight that its JSON does not list", "none") for name in left]
    raise_all(Refused, problems)
    for pairs, order in groups:
        _write_shards(out.parent, pairs, order, force)
    with new_file(out, force) as file:
        file.write(text)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _sized(shards: Sequence[str], told: Any, total: int) -> list[tuple[str, int]]:
    """Shards and their sizes: those told, if they add up, else as the converter cuts them."""
    known = isinstance(told, list) and len(told) == len(shards) and all(type(n) is int and n >= 0 for n in told)
    if known and sum(told) == total:
        return list(zip(shards, told, strict=True))
    step = SHARD if SHARD * len(shards) >= total else -(-total // max(len(shards), 1))
    return [(shard, max(0, min(step, total - step * i))) for i, shard in enumerate(shards)]


def _write_shards(folder: Path, shards: Sequence[tuple[str, int]], tensors: Iterable[Tensor], force: bool) -> None:
    """The bytes of tensors one after the other, cut into files of the sizes given."""
    pieces = (piece for tensor in tensors for piece in element_bytes(tensor))
    rest = memoryview(b"")
    for shard, size in shards:
        path = folder / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, force) as file:
            while size:
                rest = rest or next(pieces)
                file.write(rest[:size])
                size, rest = size - len(rest[:size]), rest[size:]
    assert not len(rest), shards
