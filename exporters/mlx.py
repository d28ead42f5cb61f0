"""MLX's files and live modules, read into native layers. Files are read without mlx.

    model = read(Path("model.safetensors"))       what `module.save_weights` or `mx.save_safetensors` wrote
    model = read(Path("model.npz"))               what `module.save_weights` or `mx.savez` wrote
    model = read(Path("Llama-3-8B-4bit/"))        a folder of shards with their index
    model = read_live(module)                     an mlx.nn.Module

A file says names and elements, and no class. Its names are like torch's and its convolutions are not: whose a file is stands
in its metadata, in how its header is written, or with the user.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from neutral.containers.files import SourceFile
from neutral.containers.npz import read_npz
from neutral.containers.safetensors import open_safetensors
from neutral.containers.zip import ZipSource
from neutral.conventions.mlx_names import gates_of, is_gru, places
from neutral.errors import BadFile, Problem, Refused, WrongUsage, printable
from neutral.exporters.live_settings import plain_setting
from neutral.native import Array, Computed, NativeLayer, NativeModel, NativeTensor, Tensor

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64")},
    "bool": np.dtype(np.bool_),
    "bool_": np.dtype(np.bool_),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""MLX's dtypes by name."""

BFLOAT16: Final = DTYPES["bfloat16"]
_DEPTH: Final = 100
_ATTENTION: Final = "MultiHeadAttention"


@dataclass(frozen=True)
class ModuleClass:
    """What a live object says of one module: its class and that class's own settings."""

    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The tensors of a `.safetensors`, of a set of shards, or of an `.npz`."""
    if key is not None:
        raise WrongUsage(Problem(str(source), f"the key {key!r}", "none", "a file of MLX holds one set of weights"))
    return _read_npz(source) if is_zip(source) else _read_safetensors(source)


def is_zip(path: Path) -> bool:
    """Whether a path is a zip and no safetensors."""
    if path.is_dir():
        return False
    with SourceFile(path) as file:
        return file.size > 3 and file.read(0, 2) == b"PK"


def _read_safetensors(source: Path) -> NativeModel:
    opened = open_safetensors(source)
    try:
        written_for = opened.metadata.get("format", "mlx")
        if written_for != "mlx":
            found = f"tensors in the layout of {printable(written_for, 40)}, as the metadata say"
            raise Refused(Problem(str(source), found, "those of MLX", "read it as what it is"))
        kept = {"metadata": [list(pair) for pair in opened.metadata.items()]} if opened.metadata else {}
        form = "mlx" if opened.index is None else "mlx-shards"
        return _model(source, opened.tensors, form, kept, opened.close)
    except BaseException:
        opened.close()
        raise


def _read_npz(source: Path) -> NativeModel:
    file = SourceFile(source)
    try:
        return _model(source, read_npz(ZipSource(file), BFLOAT16), "mlx-npz", {}, file.close)
    except BaseException:
        file.close()
        raise


def _model(source: Path, tensors: Mapping[str, Tensor], form: str, kept: dict[str, Any], close: Any) -> NativeModel:
    if not tensors:
        raise BadFile(Problem(str(source), "no tensor", "at least one", "is this a file of weights?"))
    layers = layers_of({name: NativeTensor(name, data) for name, data in tensors.items()}, None)
    return NativeModel("mlx", form, layers, metadata=kept, notes=tuple(_quantized(layers)), close=close)


def layers_of(
    tensors: Mapping[str, NativeTensor], classes: Mapping[str, ModuleClass] | None
) -> tuple[NativeLayer, ...]:
    """The layers of parameters by name, in the order of their first tensors. The bias of a GRU's gates is three tensors.

    `classes` maps paths, as they stand in the names, to what is known of the modules there.
    """
    prefix_known = None if classes is None else {path for path, known in classes.items() if known.cls == _ATTENTION}
    place = places(list(tensors), None if prefix_known is None else _shortened(prefix_known, tensors))
    groups: dict[str, dict[str, NativeTensor]] = {}
    owner: dict[str, str] = {}
    for name, tensor in tensors.items():
        at = place[name]
        if not at.local:
            raise Refused(Problem(repr(name), "a tensor name that is empty", "a name", "rename it in the file"))
        groups.setdefault(at.path, {})[at.local] = tensor
        owner.setdefault(at.path, name[: len(name) - len(at.local)].rstrip("."))
    layers = []
    for path, members in groups.items():
        known = (classes or {}).get(owner[path])
        parts = _with_gates(members)
        if known is None:
            layers.append(NativeLayer(path, None, parts))
        else:
            layers.append(NativeLayer(path, known.cls, parts, known.config, "class"))
    return tuple(layers)


def _shortened(paths: set[str], tensors: Mapping[str, NativeTensor]) -> set[str]:
    from neutral.conventions.mlx_names import prefix_of

    prefix = prefix_of(tensors)
    return {path.removeprefix(prefix) for path in paths}


def _with_gates(members: Mapping[str, NativeTensor]) -> dict[str, NativeTensor]:
    if not is_gru({local: tensor.data for local, tensor in members.items()}):
        return dict(members)
    bias = members["b"]
    parts = {f"b{gate}": NativeTensor(f"{bias.name}{gate}", data) for gate, data in gates_of(bias.data).items()}
    return {local: tensor for local, tensor in members.items() if local != "b"} | parts


def _quantized(layers: tuple[NativeLayer, ...]) -> Iterator[str]:
    found = [layer.path for layer in layers if {"weight", "scales"} <= layer.tensors.keys()]
    if found:
        names = ", ".join(printable(path, 60) for path in found[:5]) + (
            f" and {len(found) - 5} more" if found[5:] else ""
        )
        yield (
            f"quantized: {names}; a file does not say in how many bits, so they stay as they are; "
            "for another framework dequantize them in MLX first (mx.dequantize)"
        )


# Live modules


def read_live(model: Any) -> NativeModel:
    """The weights of a live `mlx.nn.Module`, under the names that `save_weights` gives them."""
    classes: dict[str, ModuleClass] = {}
    found: dict[str, Any] = {}
    _describe(model, "", classes, found, 0)
    if not found:
        raise Refused(Problem(type(model).__qualname__, "a module without a tensor", "at least one"))
    tensors = {name: NativeTensor(name, live_tensor(name, value), ("live", id(value))) for name, value in found.items()}
    layers = layers_of(tensors, classes)
    return NativeModel("mlx", "module", layers, ordered=_is_chain(model), notes=tuple(_quantized(layers)))


def _describe(value: Any, path: str, classes: dict[str, ModuleClass], found: dict[str, Any], depth: int) -> None:
    """Collect the arrays of modules, dicts and lists by name, and the classes of modules by path."""
    if depth > _DEPTH:
        raise Refused(Problem(path, "modules inside each other without an end", "a tree of modules"))
    if is_module(value):
        classes[path] = ModuleClass(class_name(value), settings(value))
    for name, child in children(value):
        inner = f"{path}.{name}" if path else name
        if is_array(child):
            found[inner] = child
        elif isinstance(child, dict | list):
            _describe(child, inner, classes, found, depth + 1)


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """What is in a module (without what is private), a dict or a list, by name."""
    if isinstance(value, dict):
        hidden = is_module(value)
        yield from ((str(name), child) for name, child in value.items() if not (hidden and str(name).startswith("_")))
    elif isinstance(value, list):
        yield from ((str(i), child) for i, child in enumerate(value))


def is_module(value: object) -> bool:
    return any(cls.__name__ == "Module" and cls.__module__.startswith("mlx.nn.") for cls in type(value).__mro__)


def is_array(value: object) -> bool:
    return type(value).__name__ == "array" and type(value).__module__ == "mlx.core"


def class_name(module: object) -> str:
    """The bare name of MLX's own modules, the qualified name of all else."""
    cls = type(module)
    return cls.__name__ if cls.__module__.startswith("mlx.nn.") else f"{cls.__module__}.{cls.__qualname__}"


def settings(module: Any) -> dict[str, Any]:
    """The public attributes of a module that are plain data; those of a convolution are in part items of it."""
    found = {}
    for name, value in [*vars(module).items(), *module.items()]:
        kept, plain = plain_setting(value)
        if kept and not name.startswith("_"):
            found[name] = plain
    nonlinearity = vars(module).get("nonlinearity")
    if callable(nonlinearity):
        found["nonlinearity"] = str(getattr(nonlinearity, "__name__", "unknown"))
    return found


def _is_chain(module: Any) -> bool:
    """True if the modules are computed in their order: Sequentials of leaves of MLX's own."""
    if class_name(module) != "Sequential":
        return False
    return all(
        is_module(child)
        and (
            _is_chain(child)
            or class_name(child) == _ATTENTION
            or not any(isinstance(inner, dict | list) for _, inner in children(child))
        )
        for child in module.get("layers", ())
    )


def live_tensor(name: str, value: Any) -> Tensor:
    """The elements of a live array, copied out of MLX when they are read."""
    dtype = DTYPES.get(str(value.dtype).rpartition(".")[2])
    if dtype is None:
        raise Refused(Problem(name, f"an array of {value.dtype}", f"one of {', '.join(DTYPES)}", "convert it first"))
    return Computed(tuple(value.shape), dtype, lambda: _array(value, dtype))


def _array(value: Any, dtype: np.dtype[Any]) -> Array:
    if dtype != BFLOAT16:
        return np.asarray(value)
    # numpy has no bfloat16; in float32, which MLX itself converts to, it is exact.
    wide: Array = np.asarray(value.astype(_float32(value)))
    return wide.astype(dtype)


def _float32(value: Any) -> Any:
    """MLX's float32, without importing it."""
    return type(value)(np.zeros((), np.float32)).dtype
