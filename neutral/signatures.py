"""What a file or folder is, by its content: a `Probe` looks at it once, and each framework's signature looks at the probe.

>>> import pathlib, tempfile, zipfile
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.npz"
>>> with zipfile.ZipFile(path, "w") as made:
...     made.writestr("a.npy", b"")
>>> with Probe(path) as probe:
...     probe.container, numpy(probe), keras(probe)
('zip', 'npz', None)

A container is imported where a probe is one, not before: most files are of one kind.

A signature gives the name of the framework's format, or None. It must be sure: what two frameworks could both have written
is left to `--from`. `live` objects are told by the modules of their classes. Nothing is imported for either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

from neutral.containers.files import SourceFile
from neutral.errors import NeutralError, Problem, Refused, Unsupported
from neutral.suffixes import suffix_of

_HDF5 = b"\x89HDF\r\n\x1a\n"
_SSTABLE = bytes.fromhex("57fb808b247547db")
_LONGEST_JSON = 256 << 20


class Probe:
    """A file or folder that is looked at: each look is made once, when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_folder = path.is_dir()
        self._file = None if self.is_folder else SourceFile(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def size(self) -> int:
        return 0 if self._file is None else self._file.size

    def read(self, offset: int, length: int) -> bytes:
        """As many of these bytes as the file has."""
        if self._file is None or offset >= self.size:
            return b""
        return self._file.read(offset, min(length, self.size - offset))

    @cached_property
    def head(self) -> bytes:
        return self.read(0, 64)

    @cached_property
    def container(self) -> str:
        """`folder`, `safetensors`, `zip`, `hdf5`, `sstable`, `pickle`, `tar`, `json`, or nothing known."""
        if self._file is None:
            return "folder"
        # The length of a safetensors header may begin with the bytes of any other format; it ends with zeros.
        if self.head[6:9] == b"\0\0{":
            return "safetensors"
        if self.head.startswith(b"PK"):
            return "zip"
        if any(self.read(at, 8) == _HDF5 for at in (0, 512, 1024, 2048)):
            return "hdf5"
        if self.size >= 48 and self.read(self.size - 8, 8) == _SSTABLE:
            return "sstable"
        if self.head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            return "pickle"
        if self.read(257, 5) == b"ustar":
            return "tar"
        if self.head.lstrip()[:1] == b"{":
            return "json"
        return "safetensors" if self.head[8:].lstrip()[:1] == b"{" else ""

    @cached_property
    def members(self) -> tuple[str, ...]:
        """The names in a zip; nothing for another file."""
        from neutral.containers.zip import ZipSource

        return tuple(ZipSource(self._file).members) if self.container == "zip" and self._file is not None else ()

    @cached_property
    def of_mlx(self) -> bool:
        """Whether MLX wrote the arrays of a zip."""
        arrays = bool(self.members) and all(name.endswith(".npy") for name in self.members)
        if not arrays or self._file is None:
            return False
        try:
            from neutral.containers.npz import is_of_mlx
            from neutral.containers.zip import ZipSource

            return is_of_mlx(ZipSource(self._file))
        except NeutralError:
            return False

    def has(self, *names: str) -> bool:
        """Whether a folder has files of all these names."""
        return self.is_folder and all((self.path / name).is_file() for name in names)

    def any(self, pattern: str) -> bool:
        """Whether a folder has an entry that fits a glob."""
        return self.is_folder and any(self.path.glob(pattern))

    @cached_property
    def json(self) -> Mapping[str, Any]:
        """The content of a JSON object; nothing for another file, or a broken one."""
        if self.container != "json" or self.size > _LONGEST_JSON:
            return {}
        try:
            found = json.loads(self.read(0, self.size))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def layout(self) -> str:
        """What safetensors, alone, as shards or in a folder, say of their layout: the `format` of their metadata; else `mlx`
        or `mlx?` for a header as MLX writes it; else nothing."""
        from neutral.containers.safetensors import open_safetensors

        shards = self.container == "json" and "weight_map" in self.json
        if not (self.container == "safetensors" or shards or self.any("*.safetensors")):
            return ""
        try:
            opened = open_safetensors(self.path)
        except NeutralError:
            return ""
        try:
            told = opened.metadata.get("format")
            return told if told is not None else {"null": "mlx", "sorted": "mlx?"}.get(opened.style, "")
        finally:
            opened.close()

    @cached_property
    def safetensors(self) -> tuple[Mapping[str, str], tuple[str, ...]]:
        """(metadata, names) of a safetensors file; nothing for another file, or a broken one."""
        if self.container != "safetensors":
            return {}, ()
        from neutral.containers.safetensors import open_safetensors

        try:
            opened = open_safetensors(self.path)
        except NeutralError:
            return {}, ()
        try:
            return opened.metadata, tuple(opened.tensors)
        finally:
            opened.close()


Signature = Callable[[Probe], str | None]
Live = Callable[[object], bool]


def never(of: object) -> None:
    """The signature of a framework whose files are only known by `--from`."""
    return


def instance_of(*classes: tuple[str, str]) -> Live:
    """True for objects of a class (package, name) or below it, told by their own class' ancestors."""

    def test(model: object) -> bool:
        ancestors = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(model).__mro__}
        return not ancestors.isdisjoint(classes)

    return test


# --- the frameworks ---


def torch(probe: Probe) -> str | None:
    if probe.container in ("pickle", "tar"):
        return None if paddle(probe) is not None else "pt-legacy"
    if any(name.rpartition("/")[2] == "data.pkl" for name in probe.members):
        return "pt"
    from neutral.containers.torch_program import holds_program

    if holds_program(probe.members):
        return "pt2"
    if any("/data/aotinductor/" in name for name in probe.members):
        raise Unsupported(
            Problem(
                str(probe.path),
                "a package of AOTInductor, which is compiled code",
                "a program of torch.export (.pt2), or a state dict",
                "save the program that it was compiled from with torch.export.save",
            )
        )
    shards = probe.json.get("weight_map")
    if isinstance(shards, dict) and shards and all(str(file).endswith(".bin") for file in shards.values()):
        return "bin-shards"
    beside = probe.has("pytorch_model.bin") or probe.any("*.bin.index.json")
    return "bin-shards" if beside and not probe.any("*.safetensors") else None


def keras(probe: Probe) -> str | None:
    if probe.container == "hdf5":
        return "weights.h5" if suffix_of(probe.path) == ".weights.h5" else "h5"
    if _maps_to_hdf5(probe.json.get("weight_map")):
        return "weights.json"
    weights = ("model.weights.h5", "model.weights.npz")
    if "config.json" in probe.members and any(name in probe.members for name in weights):
        return "keras"
    return "keras-folder" if probe.has("config.json", "model.weights.h5") else None


def _maps_to_hdf5(weight_map: object) -> bool:
    """True for the map of sharded weights: groups of variables and the HDF5 files, one or several, that hold them."""
    if not isinstance(weight_map, dict):
        return False
    shards = [shard for told in weight_map.values() for shard in (told if isinstance(told, list) else [told])]
    return bool(shards) and all(isinstance(shard, str) and shard.endswith(".h5") for shard in shards)


def tensorflow(probe: Probe) -> str | None:
    if probe.has("saved_model.pb"):
        return "savedmodel"
    return "checkpoint" if probe.container == "sstable" or _points(probe) else None


def _points(probe: Probe) -> bool:
    """Whether a folder has TensorFlow's `checkpoint`, which names one; Orbax once had another file of that name."""
    if not probe.has("checkpoint"):
        return False
    from neutral.containers.orbax_aggregate import is_aggregate

    return not is_aggregate(probe.path / "checkpoint")


def numpy(probe: Probe) -> str | None:
    if probe.of_mlx:
        return None
    return "npz" if probe.members and all(name.endswith(".npy") for name in probe.members) else None


def safetensors(probe: Probe) -> str | None:
    if probe.layout in ("mlx", "mlx?", "paddle", "np"):
        return None
    if probe.container == "safetensors":
        return "safetensors"
    if probe.any("*.safetensors.index.json") or "weight_map" in probe.json:
        return "shards"
    return "safetensors" if probe.any("*.safetensors") else None


_ONNX_NUMBERS, _ONNX_GRAPH, _ONNX_PARTS = (1, 5), 7, (2, 3, 4, 6, 7, 8, 14, 20, 25, 26)
_MOST_ONNX_PARTS = 4096


def onnx(probe: Probe) -> str | None:
    """A protobuf that is, to its last byte, the fields of a ModelProto: a version, and one graph among others."""
    if probe.container or not probe.head:
        return None
    from neutral.containers.protobuf import BYTES, VARINT, FileReader

    seen: list[int] = []
    try:
        with SourceFile(probe.path) as file:
            for part in FileReader(file, str(probe.path), _MOST_ONNX_PARTS).fields(0, file.size):
                wire = VARINT if part.number in _ONNX_NUMBERS else BYTES
                if part.number not in (*_ONNX_NUMBERS, *_ONNX_PARTS) or part.wire != wire:
                    return None
                seen.append(part.number)
    except NeutralError:
        return None
    return "onnx" if 1 in seen and seen.count(_ONNX_GRAPH) == 1 else None


def paddle(probe: Probe) -> str | None:
    """A pickle with paddle's own tables or pairs in it, or of its suffix; what jit.save makes, to be refused in words."""
    suffix = suffix_of(probe.path)
    if probe.layout == "np":
        # PaddleNLP: safe_save_file(state_dict, path, metadata={"format": "np"}), its Linear's weights being `in out`.
        raise Refused(
            Problem(
                str(probe.path),
                "safetensors of plain arrays (the format of their metadata is np), as PaddleNLP and others write them",
                "to know whose layout they have, for paddle's kernels are the transpose of torch's under the same names",
                "say it with --from paddle-safetensors or --from safetensors",
            )
        )
    if probe.container == "safetensors":
        return "paddle-safetensors" if probe.layout == "paddle" else None
    if suffix in (".pdparams", ".pdopt", ".pdiparams", ".pdmodel") and probe.container in ("pickle", ""):
        return "pdparams"
    if probe.container != "pickle":
        return None
    from neutral.containers.paddle_file import holds_tables

    return "pdparams" if holds_tables(probe.path) else None


def tfjs(probe: Probe) -> str | None:
    if probe.has("model.json"):
        with Probe(probe.path / "model.json") as inner:
            return tfjs(inner)
    return "layers-model" if {"modelTopology", "weightsManifest"} & probe.json.keys() else None


_OF_A_LAYER = ("kernel", "bias", "scale", "embedding", "mean", "var", "negative_slope", "value")


def flax(probe: Probe) -> str | None:
    """A msgpack map, a folder of Orbax, or a flattened tree that says so or has the collections of Linen."""
    if probe.is_folder:
        from neutral.containers.orbax import holds_checkpoint

        return "orbax" if holds_checkpoint(probe.path) else None
    if probe.container == "safetensors":
        metadata, names = probe.safetensors
        return "flax-safetensors" if metadata.get("format") == "flax" or _is_flat_tree(names) else None
    return "msgpack" if not probe.container and _is_msgpack_map(probe.head) else None


def _is_msgpack_map(head: bytes) -> bool:
    """True for a map whose first key is text.

    >>> _is_msgpack_map(b"\\x81\\xa6params"), _is_msgpack_map(b"\\x81\\x01"), _is_msgpack_map(b"")
    (True, False, False)
    """
    first = head[0] if head else 0
    at = 1 if 0x81 <= first <= 0x8F else {0xDE: 3, 0xDF: 5}.get(first, 0)
    key = head[at] if 0 < at < len(head) else 0
    return 0xA1 <= key <= 0xBF or 0xD9 <= key <= 0xDB


def _is_flat_tree(names: tuple[str, ...]) -> bool:
    """True for names of Linen's variables with a separator between the keys."""
    parts = [re.split(r"[/.,]", name) for name in names]
    return bool(parts) and all(
        len(keys) > 1 and keys[0] in ("params", "batch_stats") and keys[-1] in _OF_A_LAYER for keys in parts
    )


def mlx(probe: Probe) -> str | None:
    """Files whose metadata say so, or whose headers are as MLX alone writes them."""
    if probe.layout == "mlx?":
        raise Refused(
            Problem(
                str(probe.path),
                "safetensors written as MLX writes them, whose metadata do not say whose layout they have",
                "to know it, for MLX's convolutions and torch's have other axes under the same names",
                "say it with --from mlx or --from safetensors, or save them with the metadata {'format': 'mlx'}",
            )
        )
    if probe.layout == "mlx":
        return "mlx" if probe.container == "safetensors" else "mlx-shards"
    return "mlx-npz" if probe.of_mlx else None


_TENSOR_OF_A_MODULE = re.compile(
    r"(weight|bias)(_[a-z0-9_]+)?|in_proj_(weight|bias)|running_(mean|var)|num_batches_tracked"
)


def is_state_dict(model: Mapping[Any, Any]) -> bool:
    """True if the names are a torch module's: levels with dots between them, or tensors of the module itself.

    >>> is_state_dict({"fc.weight": 0, "bias": 0}), is_state_dict({"fc/kernel": 0}), is_state_dict({"x": 0})
    (True, False, False)
    """
    return bool(model) and all(
        isinstance(name, str) and "/" not in name and ("." in name or _TENSOR_OF_A_MODULE.fullmatch(name) is not None)
        for name in model
    )


def live_torch(model: object) -> bool:
    """A torch.nn.Module, or a dict of arrays with a module's names."""
    return is_state_dict(model) if _is_plain(model) else instance_of(("torch", "Module"))(model)


def live_arrays(model: object) -> bool:
    """A dict of arrays that no framework's names are in."""
    return _is_plain(model)


live_mlx = instance_of(("mlx", "Module"))


def _is_plain(model: object) -> TypeGuard[Mapping[Any, Any]]:
    """A mapping that is no module: those of MLX are dicts of what is in them."""
    return isinstance(model, Mapping) and not live_mlx(model)


def live_flax(model: object) -> bool:
    """An nnx.Module, a State, a TrainState, or nested dicts (a FrozenDict) of arrays of NumPy or JAX."""
    if instance_of(("flax", "Module"), ("flax", "State"), ("flax", "TrainState"))(model):
        return True
    if not isinstance(model, Mapping) or not any(isinstance(value, Mapping) for value in model.values()):
        return False
    value: object = model
    while isinstance(value, Mapping) and value:
        value = next(iter(value.values()))
    return type(value).__module__.partition(".")[0] in ("numpy", "jax", "jaxlib", "flax")


def equinox(probe: Probe) -> str | None:
    """Records of `.npy`; a single one under that suffix is an array of NumPy's own."""
    if probe.container:
        return None
    from neutral.containers.eqx import is_eqx

    return "eqx" if is_eqx(probe.head) and suffix_of(probe.path) != ".npy" else None


def live_equinox(model: object) -> bool:
    """A module, or a module and its state."""
    is_module = instance_of(("equinox", "Module"))
    if isinstance(model, tuple | list) and len(model) == 2:
        return is_module(model[0]) and instance_of(("equinox", "State"))(model[1])
    return is_module(model)
