"""Writes Keras files without Keras: into a template, or new.

A template (`.keras`, `.h5`, `.weights.h5`, of Keras 2 or 3) is copied and the elements of its datasets are replaced.
A new `.weights.h5` holds the layers in the order given, under the groups that Keras counts; a new `.keras` or `.h5`
holds the config of the archive's graph as well, with the groups in the order that Keras computes from it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard, cast

from neutral.containers.files import new_file, new_folder, refuse_inside, refuse_same
from neutral.containers.hdf5 import Hdf5Source, Hdf5Tree, fill_hdf5, in_place, plan_hdf5, spliced
from neutral.containers.keras_file import CONFIG, METADATA, WEIGHTS, KerasFile, open_keras
from neutral.containers.keras_shards import fill_shards
from neutral.containers.zip_replacing import replace_members
from neutral.containers.zip_writing import NewMember, write_zip
from neutral.conventions.keras_config import (
    Config,
    Holder,
    Slot,
    history_list,
    is_keras2,
    is_model,
    model_layers,
    slots,
)
from neutral.conventions.keras_live import live_variable
from neutral.conventions.keras_variables import (
    CELL_OF,
    KNOWN,
    NOT_TRAINED,
    VARIABLES,
    Counter,
    own_variables,
    parts,
    snake_case,
)
from neutral.errors import Problem, Refused, Unsupported, raise_all
from neutral.native import NativeLayer, NativeModel, Tensor
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

KERAS_VERSION = "3.15.1"
_NO_DATE = "1980-01-01@00:00:00"
_CELL_CLASS = {layer: cell for cell, layer in CELL_OF.items()}
_COPY = 4 << 20


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of the template with the elements of the datasets named replaced; all else byte for byte as it was."""
    refuse_same(out, template, *(template / name for name in (WEIGHTS,) if template.is_dir()))
    opened = open_keras(template)
    try:
        missing = [name for name in tensors if name not in opened.source.datasets]
        raise_all(
            Refused, (Problem(f"{template}: {name}", "no such dataset", "one of the template's") for name in missing)
        )
        whole = {**tensors, **_second_copies(opened.source, tensors)}
        if template.is_dir():
            _fill_folder(opened, whole, out, force)
        elif opened.shards is not None:
            fill_shards(opened.shards, whole, out, force)
        else:
            with new_file(out, force) as file:
                if opened.zip is None:
                    fill_hdf5(opened.source, whole, file)
                else:
                    _fill_zip(opened, whole, file)
    finally:
        opened.close()


def _second_copies(source: Hdf5Source, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A SpectralNormalization holds its layer's kernel once more (`<wrapper>/vars/0`): the copy follows the kernel.

    Keras reads the copy first and the kernel after it, so that a stale copy would still be a wrong file, not a wrong
    model.
    """
    copies = {}
    for name, tensor in tensors.items():
        wrapper = name.removesuffix("/layer/vars/0")
        copy, vector = f"{wrapper}/vars/0", f"{wrapper}/vars/1"
        if wrapper == name or not {copy, vector} <= set(source.datasets):
            continue
        if source.tensor(copy).shape == tensor.shape and source.tensor(vector).shape == (1, tensor.shape[-1]):
            copies[copy] = tensor
    return copies


def _fill_zip(opened: KerasFile, tensors: Mapping[str, Tensor], out: BinaryIO) -> None:
    assert opened.zip is not None
    if in_place(opened.source, tensors):
        replace_members(opened.zip, out, {WEIGHTS: (opened.source.storage.nbytes, spliced(opened.source, tensors))})
        return
    with tempfile.TemporaryFile() as spool:
        fill_hdf5(opened.source, tensors, cast(BinaryIO, spool))
        size = spool.seek(0, os.SEEK_END)
        spool.seek(0)
        replace_members(opened.zip, out, {WEIGHTS: (size, iter(lambda: spool.read(_COPY), b""))})


def _fill_folder(opened: KerasFile, tensors: Mapping[str, Tensor], out: Path, force: bool) -> None:
    refuse_inside(out, opened.path)
    with new_folder(out, force) as folder:
        for path in sorted(opened.path.rglob("*")):
            there = folder / path.relative_to(opened.path)
            if path.is_symlink():
                raise Refused(Problem(str(path), "a link", "files and folders", "copy what it points to first"))
            if path.is_dir():
                there.mkdir()
            elif path.relative_to(opened.path) != Path(WEIGHTS):
                shutil.copyfile(path, there)
        with (folder / WEIGHTS).open("w+b") as file:
            fill_hdf5(opened.source, tensors, file)


def fill_live(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Assign to the variables of a live Keras model, in place. Names are those of `exporters.keras.read_live`."""
    pairs = []
    problems = []
    for name, tensor in tensors.items():
        variable = live_variable(model, name)
        if not hasattr(variable, "assign"):
            found = "a variable of which its layer gives a copy alone"
            problems.append(Problem(name, found, "one that can be assigned to", "fill a file of the model instead"))
            continue
        shape, dtype = tuple(variable.shape), getattr(variable.dtype, "name", variable.dtype)
        if shape != tensor.shape or dtype != tensor.dtype.name:
            found = f"{tensor.dtype.name} of shape {tensor.shape}"
            problems.append(Problem(name, found, f"{dtype} of shape {shape}", "nothing was assigned"))
        pairs.append((variable, tensor))
    raise_all(Refused, problems)
    for variable, tensor in pairs:
        variable.assign(tensor.read())


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new file: `.weights.h5` from the layers alone; `.keras` or `.h5` with the model of the archive's graph."""
    from neutral.importers.keras_config import layer_names, model_config

    names = layer_names(manifest)
    layers = [replace(layer, path=names.get(layer.path, layer.path)) for layer in model.layers]
    own = manifest.source.settings.get("config") if model.format == "h5" else None
    suffix = suffix_of(out)
    if suffix in _LEGACY and is_legacy(own):
        with new_file(out, force) as file:
            write_legacy(file, own, model.layers, str(manifest.source.settings.get("keras_version", KERAS_VERSION)))
    elif suffix == ".weights.h5":
        with new_file(out, force) as file:
            write_weights(file, layers)
    elif suffix in (".keras", *_LEGACY):
        config = model_config(manifest)
        version = _version_of(config, manifest)
        with new_file(out, force) as file:
            if suffix in _LEGACY:
                write_legacy(file, config, layers, version)
            elif version == KERAS_VERSION:
                write_keras(file, config, layers)
            else:
                _write_zip(file, config, version, _as_named(layers))
    else:
        found = f"suffix {suffix}" if suffix else "no suffix"
        raise Unsupported(Problem(str(out), found, ".keras, .h5 or .weights.h5", "name the output so"))


def _version_of(config: Config, manifest: Manifest) -> str:
    """Keras 2 stays what the config of a Keras 2 file is for."""
    version = manifest.source.settings.get("keras_version")
    own = config == manifest.source.settings.get("config") and is_keras2(config, version)
    return str(version) if own else KERAS_VERSION


_LEGACY = (".h5", ".hdf5")


def write_weights(out: BinaryIO, layers: Iterable[NativeLayer]) -> None:
    """A `.weights.h5` that a flat Keras model of these layers, in this order, loads."""
    plan_hdf5(_weights_tree(layers)).write(out)


def write_keras(out: BinaryIO, config: Config, layers: Iterable[NativeLayer]) -> None:
    """A `.keras` of a serialized model and the layers of its slots, which pair by path."""
    groups: dict[str, dict[str, str | list[str]]] = {}
    datasets: dict[str, Tensor] = {}
    for slot, tensors in _paired(config, layers):
        for holder in slot.holders:
            group = f"{holder.group}/vars"
            groups[group] = {"name": min(holder.names[-1])} if holder.names and holder.names[-1] else {}
            for index, name in enumerate(own_variables(holder.cls, holder.config)):
                datasets[f"{group}/{index}"] = tensors[_local(holder, name)]
    _write_zip(out, config, KERAS_VERSION, Hdf5Tree(groups, datasets))


def _as_named(layers: Iterable[NativeLayer]) -> Hdf5Tree:
    """The variables where the source has them. Keras 2 looks for `vars` in every object that it finds."""
    datasets = {tensor.name: tensor.data for layer in layers for tensor in layer.tensors.values()}
    groups: dict[str, dict[str, str | list[str]]] = {"vars": {}}
    for name in datasets:
        steps = name.split("/")[:-2]
        for end, step in enumerate(steps, start=1):
            if step not in ("layers", "cells", "_layer_checkpoint_dependencies"):
                groups["/".join((*steps[:end], "vars"))] = {}
    return Hdf5Tree(groups, datasets)


def _write_zip(out: BinaryIO, config: Config, keras_version: str, weights: Hdf5Tree) -> None:
    plan = plan_hdf5(weights)
    metadata = {"keras_version": keras_version, "date_saved": _NO_DATE}
    members = [_text(METADATA, metadata), _text(CONFIG, config), NewMember(WEIGHTS, plan.size, plan.chunks())]
    write_zip(out, members)


def _text(name: str, value: Any) -> NewMember:
    data = json.dumps(value).encode()
    return NewMember(name, len(data), [data])


def _local(holder: Holder, name: str) -> str:
    return name if name.startswith("spectral/") else holder.prefix + name


def _paired(config: Config, layers: Iterable[NativeLayer]) -> Iterator[tuple[Slot, Mapping[str, Tensor]]]:
    """Each slot of the config with its layer's tensors; every tensor has its place, and every place its tensor."""
    by_path = {layer.path: layer for layer in layers}
    found = slots(config)
    problems = []
    pairs = []
    for slot in found:
        wanted = {_local(holder, name) for holder in slot.holders for name in own_variables(holder.cls, holder.config)}
        layer = by_path.pop(slot.path, None)
        there = {name: tensor.data for name, tensor in layer.tensors.items()} if layer is not None else {}
        spare = {name for name in set(there) - wanted if layer is not None and not layer.tensors[name].state}
        if "spectral/0" in wanted and "kernel" in there:
            there["spectral/0"] = there["kernel"]
        problems += [
            Problem(slot.path, f"no {name}", f"one, for its {slot.cls}") for name in sorted(wanted - set(there))
        ]
        problems += [Problem(slot.path, f"a tensor {name}", f"none, for its {slot.cls}") for name in sorted(spare)]
        pairs.append((slot, there))
    problems += [Problem(path, "a layer", "one that the model has") for path, layer in by_path.items() if layer.tensors]
    raise_all(Refused, problems)
    yield from pairs


# New weights without a config: groups counted in the order of the layers.


def _weights_tree(layers: Iterable[NativeLayer]) -> Hdf5Tree:
    groups: dict[str, dict[str, str | list[str]]] = {}
    datasets: dict[str, Tensor] = {}
    problems: list[Problem] = []
    counter = Counter()
    stacks: dict[str, tuple[str, Counter]] = {}
    for layer in layers:
        cls = layer.cls
        if cls is None or cls not in KNOWN:
            if layer.tensors:
                what = f"a layer of class {cls}" if cls else "a layer of unknown class"
                problems.append(
                    Problem(layer.path, what, "one of Keras' own layers", "pass --kind, or import into a template")
                )
            continue
        group, holders = _new_group(layer, cls, counter, stacks)
        groups.setdefault(f"{group}/vars", {"name": layer.path.rpartition(".")[2]})
        left = {name for name, tensor in layer.tensors.items() if not tensor.state}
        for inner, holder_cls, prefix in holders:
            if holder_cls == "SpectralNormalization" and not {"kernel", "spectral/1"} <= set(layer.tensors):
                problems.append(Problem(layer.path, "no kernel and spectral/1", "both, for a SpectralNormalization"))
            names = [name for name in VARIABLES.get(holder_cls, ()) if _prefixed(prefix, name) in layer.tensors]
            groups.setdefault(f"{inner}/vars", {})
            for index, name in enumerate(names):
                datasets[f"{inner}/vars/{index}"] = layer.tensors[_prefixed(prefix, name)].data
                left.discard(_prefixed(prefix, name))
        problems += [Problem(layer.path, f"a tensor {name}", f"none, for Keras' {cls}") for name in sorted(left)]
    raise_all(Refused, problems)
    return Hdf5Tree(groups, datasets)


def _prefixed(prefix: str, name: str) -> str:
    return name if name.startswith("spectral/") else prefix + name


def _new_group(
    layer: NativeLayer, cls: str, counter: Counter, stacks: dict[str, tuple[str, Counter]]
) -> tuple[str, list[tuple[str, str, str]]]:
    """The group of a layer, and (group, class, prefix) of everything below it that holds variables."""
    config = layer.config
    outer = ""
    if config.get("time_distributed"):
        outer = f"layers/{counter.unique('time_distributed')}/layer"
    if config.get("spectral_normalization"):
        wrapper = f"{outer}" if outer else f"layers/{counter.unique('spectral_normalization')}"
        return wrapper, [*_below(f"{wrapper}/layer", cls), (wrapper, "SpectralNormalization", "")]
    if config.get("bidirectional"):
        group = outer or f"layers/{counter.unique('bidirectional')}"
        sides = [(f"{group}/{side}_layer", f"{side}_layer/") for side in ("forward", "backward")]
        return group, [
            (there, part, side + prefix) for each, side in sides for there, part, prefix in _below(each, cls)
        ]
    if config.get("cell") and cls in _CELL_CLASS:
        stem, _, index = layer.path.rpartition(".")
        if index.isdecimal() and stem:
            if stem not in stacks:
                stacks[stem] = (outer or f"layers/{counter.unique('rnn')}", Counter())
            group, cells = stacks[stem]
            inner = f"{group}/cell/cells/{cells.unique(snake_case(_CELL_CLASS[cls]))}"
            return inner, [(inner, _CELL_CLASS[cls], "")]
        group = outer or f"layers/{counter.unique('rnn')}"
        return group, [(f"{group}/cell", _CELL_CLASS[cls], "")]
    group = outer or f"layers/{counter.unique(snake_case(cls))}"
    return group, _below(group, cls)


def _below(group: str, cls: str) -> list[tuple[str, str, str]]:
    return [(group, cls, ""), *((f"{group}/{part.group}", part.cls, part.prefix) for part in parts(cls))]


# The legacy full-model file, in the form that Keras 3 and Keras 2 both read.


def is_legacy(config: object) -> TypeGuard[Config]:
    """True for the config in a legacy file of Keras' own, of any version."""
    return isinstance(config, Mapping) and is_model(config) and "module" not in config


def write_legacy(
    out: BinaryIO, config: Config, layers: Iterable[NativeLayer], keras_version: str = KERAS_VERSION
) -> None:
    """A legacy `.h5` of a serialized model and the layers of its slots.

    A config that is in legacy words already stays as it is, with the names that its file gave to the variables.
    """
    layers = list(layers)
    as_it_is = is_legacy(config)
    native = {(layer.path, local): t.name for layer in layers for local, t in layer.tensors.items() if as_it_is}
    by_top: dict[str, list[tuple[Slot, Mapping[str, Tensor]]]] = {}
    for slot, tensors in _paired(config, layers):
        by_top.setdefault(slot.top, []).append((slot, tensors))
    versions: dict[str, str | list[str]] = {"keras_version": keras_version, "backend": "tensorflow"}
    names = [entry["config"]["name"] for entry in model_layers(config)]
    groups: dict[str, dict[str, str | list[str]]] = {
        "": {"model_config": json.dumps(config if as_it_is else legacy_config(config)), **versions},
        "model_weights": {"layer_names": names, **versions},
    }
    datasets: dict[str, Tensor] = {}
    for top in sorted(names):
        trained: list[tuple[str, Tensor]] = []
        others: list[tuple[str, Tensor]] = []
        scopes = Counter()
        for slot, tensors in by_top.get(top, []):
            for holder in slot.holders:
                own = [name for name in own_variables(holder.cls, holder.config) if name != "spectral/0"]
                scope = scopes.unique(_scope(holder)) if own else ""
                for name in own:
                    late = name in NOT_TRAINED or not holder.trainable
                    full = native.get((slot.path, _local(holder, name)), f"{scope}/{_LEGACY_NAMES.get(name, name)}:0")
                    full = full.removeprefix(f"model_weights/{top}/")
                    (others if late else trained).append((full, tensors[_local(holder, name)]))
        groups[f"model_weights/{top}"] = {"weight_names": [name for name, _ in trained + others]}
        datasets.update({f"model_weights/{top}/{name}": tensor for name, tensor in trained + others})
    plan_hdf5(Hdf5Tree(_split_long(groups), datasets)).write(out)


_LEGACY_NAMES = {"spectral/1": "vector_u"}


def _scope(holder: Holder) -> str:
    """The names around a variable: of the layers it lies in, and of its cell."""
    steps = []
    for level, names in enumerate(holder.names):
        directed = sorted(name for name in names if name.startswith(("forward_", "backward_")))
        last = level == len(holder.names) - 1
        steps.append(directed[0] if directed else min(names, default=snake_case(holder.cls) if last else "cell"))
    return "/".join(steps)


_ATTRIBUTE_LIMIT = 64512


def _split_long(groups: Mapping[str, Mapping[str, str | list[str]]]) -> dict[str, dict[str, str | list[str]]]:
    """Lists of names beyond what an HDF5 object header takes, split over `name0`, `name1`, ... as Keras does."""
    split: dict[str, dict[str, str | list[str]]] = {}
    for group, attributes in groups.items():
        split[group] = {}
        for name, value in attributes.items():
            width = max((len(text.encode()) for text in value), default=1) if isinstance(value, list) else 0
            if not isinstance(value, list) or width * len(value) <= _ATTRIBUTE_LIMIT:
                split[group][name] = value
                continue
            count = max(1, _ATTRIBUTE_LIMIT // width)
            for index, start in enumerate(range(0, len(value), count)):
                split[group][f"{name}{index}"] = value[start : start + count]
    return split


def legacy_config(entry: Config) -> dict[str, Any]:
    """A serialized Keras 3 model in the words that Keras 2 understands too."""
    config = dict(entry["config"])
    if is_model(entry):
        config["layers"] = [legacy_config(layer) for layer in config["layers"]]
        if "output_layers" in config:
            for key in ("input_layers", "output_layers"):
                config[key] = [[*pair, 0] for pair in history_list(config[key])]
    for key in ("layer", "cell", "backward_layer"):
        if isinstance(config.get(key), Mapping) and "class_name" in config[key]:
            config[key] = _inner(config[key])
    if isinstance(config.get("cells"), list):
        config["cells"] = [_inner(cell) for cell in config["cells"]]
    if isinstance(config.get("dtype"), Mapping):
        config["dtype"] = config["dtype"]["config"]["name"]
    if entry["class_name"] == "InputLayer" and "batch_shape" in config:
        config["batch_input_shape"] = config.pop("batch_shape")
    legacy: dict[str, Any] = {
        "class_name": "Functional" if entry["class_name"] == "Model" else entry["class_name"],
        "config": config,
    }
    if "inbound_nodes" in entry:
        legacy["name"] = config["name"]
        legacy["inbound_nodes"] = [_legacy_node(node) for node in entry["inbound_nodes"]]
    return legacy


def _inner(entry: Config) -> dict[str, Any]:
    """A layer inside a wrapper: both versions look it up by its module."""
    return {**legacy_config(entry), "module": "keras.layers", "registered_name": None}


def _legacy_node(node: Any) -> Any:
    """One call of a layer as both versions read it: `[["a", 0, 0, {settings}], ...]`.

    A call with several arguments that are tensors stays as it is: Keras 2 puts them among the settings, where Keras 3
    does not look for tensors.
    """
    if not isinstance(node, Mapping):
        return node
    args = node.get("args", [])
    tensors = args[0] if len(args) == 1 and isinstance(args[0], list) else args[:1]
    settings = {key: value for key, value in node.get("kwargs", {}).items() if value is not None}
    if len(args) != 1 or not all(map(_is_tensor, tensors)) or "__keras_tensor__" in json.dumps(settings):
        return node
    return [[*each["config"]["keras_history"], settings if i == 0 else {}] for i, each in enumerate(tensors)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__"
