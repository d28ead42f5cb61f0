"""MLX's files and live modules, written from native tensors. Files are written without mlx.

fill(Path("model.safetensors"), {"conv.weight": kernel, ...}, Path("new.safetensors"))   the file with other elements
fill_live(module, {"conv.weight": kernel, ...})                                          the same, in place
build(model, manifest, Path("new.safetensors"))                                          a new file for `load_weights`

New files say that they are MLX's: `.safetensors` in their metadata, `.npz` in how their headers are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from neutral.containers.files import SourceFile, new_file, refuse_same
from neutral.containers.npz import replace_arrays, write_npz
from neutral.containers.safetensors import usual_order, write
from neutral.containers.zip import ZipSource
from neutral.conventions.mlx_names import prefix_for, whole
from neutral.errors import Problem, Refused, Unsupported, raise_all
from neutral.importers import safetensors
from neutral.native import NativeModel, Tensor
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

SUFFIXES: Final = (".safetensors", ".npz")
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_DEPTH: Final = 100


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of a file, or of a set of shards, in which the tensors named have new elements; all else stays as it was."""
    joined = whole(tensors)
    if not _is_zip(template):
        safetensors.fill(template, joined, out, force=force)
        return
    refuse_same(out, template)
    with SourceFile(template) as file, new_file(out, force) as copy:
        replace_arrays(ZipSource(file), copy, joined, _BFLOAT16)


def _is_zip(path: Path) -> bool:
    if path.is_dir():
        return False
    with SourceFile(path) as file:
        return file.size > 3 and file.read(0, 2) == b"PK"


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new file that `load_weights` takes. Layers that are numbered are those of a Sequential, whose list is `layers`."""
    suffix = suffix_of(out)
    if suffix not in SUFFIXES:
        raise Unsupported(Problem(str(out), f"the suffix {out.suffix!r}", " or ".join(SUFFIXES)))
    source = manifest.source
    again = source.framework == "mlx"
    prefix = "" if again else prefix_for(layer.path for layer in model.layers if layer.tensors)
    named = {f"{prefix}{name}": data for name, data in whole({t.name: t.data for t in model.tensors()}).items()}
    raise_all(Refused, _unfit(named, suffix))
    order = {name: i for i, name in enumerate(source.order)} if again else {}
    entries = sorted(named.items(), key=lambda item: order.get(item[0], len(order)))
    with new_file(out, force) as file:
        if suffix == ".npz":
            write_npz(file, entries, as_mlx=True)
        else:
            told = source.settings.get("metadata") if again else None
            pairs = {str(k): str(v) for k, v in told} if isinstance(told, list) else {}
            write(file, usual_order(entries), {**pairs, "format": "mlx"})


_WITHOUT: Final = ("float64", "complex128")
"""Dtypes of numpy that MLX loads from no file."""


def _unfit(named: Mapping[str, Tensor], suffix: str) -> Iterator[Problem]:
    for name, data in named.items():
        raw = data.dtype.isbuiltin == 2 and data.dtype != _BFLOAT16
        if raw or data.dtype.name in _WITHOUT:
            yield Problem(name, f"elements of {data.dtype}", "a dtype that MLX loads", "convert it first")


def fill_live(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors into a live `mlx.nn.Module`, by their names. All are checked before the first is written."""
    places: dict[str, tuple[Any, Any]] = {}
    _find(model, "", places, 0)
    named = whole(tensors)
    problems = []
    for name, data in named.items():
        if name not in places:
            problems.append(Problem(name, "no array of that name", "a name of the module's parameters"))
            continue
        there = _held(*places[name])
        dtype = str(there.dtype).rpartition(".")[2].rstrip("_")
        if data.shape != tuple(there.shape) or data.dtype.name != dtype:
            expected = f"{dtype}{list(there.shape)} as in the module"
            problems.append(Problem(name, f"{data.dtype}{list(data.shape)}", expected))
    raise_all(Refused, problems)
    for name, data in named.items():
        holder, key = places[name]
        holder[key] = _array(data, _held(holder, key))


def _find(value: Any, path: str, places: dict[str, tuple[Any, Any]], depth: int) -> None:
    """Where each array is held: a module, dict or list, and its key there."""
    if depth > _DEPTH:
        raise Refused(Problem(path, "modules inside each other without an end", "a tree of modules"))
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        inner = f"{path}.{key}" if path else str(key)
        if type(child).__name__ == "array" and type(child).__module__ == "mlx.core":
            places[inner] = value, key
        elif isinstance(child, dict | list):
            _find(child, inner, places, depth + 1)


def _held(holder: Any, key: Any) -> Any:
    return holder[key]


def _array(data: Tensor, like: Any) -> Any:
    """The elements as an array of MLX, made by the class of the one that it replaces."""
    array = data.read()
    make = type(like)
    if array.dtype == _BFLOAT16:
        return make(array.view(np.uint16)).view(like.dtype)
    return make(array)
