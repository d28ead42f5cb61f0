"""PyTorch's files and live modules, read into native layers. Files are read without torch and without any class.

    model = read(Path("lenet5.pt"))                        a state dict, a checkpoint of one, or a whole pickled module
    model = read(Path("last.ckpt"), key="ema.state_dict")  one of several weight sets in it
    model = read_live(module)                              a torch.nn.Module, or a state dict in memory

A file may hold several weight sets (the raw weights and their moving average, two networks). One is never chosen in
silence: `read` lists them, and `key` names the one wanted.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from neutral.containers.pickle_machine import Node, items_of, members_of
from neutral.containers.torch_file import TorchFile
from neutral.containers.torch_program import is_program
from neutral.containers.torch_refs import DTYPES, TensorRef, numpy_array
from neutral.containers.torch_tree import (
    PACKED,
    VISITS,
    Walked,
    children_of,
    choose,
    is_module,
    is_unreadable,
    listed,
    packs_weights,
    walk,
    weight_sets,
)
from neutral.errors import BadFile, Problem, Refused, printable, raise_all
from neutral.exporters.state_dict import ModuleClass, common_prefix, is_text, layers_from_state_dict
from neutral.exporters.torch_description import alteration
from neutral.exporters.torch_graph import capture
from neutral.exporters.wiring import with_graph
from neutral.native import Array, Computed, NativeModel, NativeTensor, Tensor, from_array

if TYPE_CHECKING:
    import torch

_COLLECTION_DEPTH: Final = 16
_LONG_SETTING: Final = 1000
_KNOWN_GLOBALS: Final = (
    "torch.",
    "collections.",
    "builtins.",
    "numpy.",
    "_codecs.",
    "copyreg.",
    "__torch__.",
    "pathlib.",
    "argparse.",
)


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The weights in a file of torch.save; `key` (keys joined by dots) names the set if there are several.

    Of a program of torch.export (`.pt2`): its weights, see `exporters.torch_program`; of a folder, or the index of a set of
    shards: `exporters.torch_shards`.
    """
    if source.is_dir() or source.name.endswith(".json"):
        from neutral.exporters import torch_shards

        return torch_shards.read(source, key=key)
    if is_program(source):
        from neutral.exporters import torch_program

        return torch_program.read(source, key=key)
    file = TorchFile(source)
    try:
        return _read(file, key)
    except BaseException:
        file.close()
        raise


def _read(file: TorchFile, key: str | None) -> NativeModel:
    found = weight_sets(file.root)
    chosen = choose(file, found, key)
    notes = []
    tree = None
    classes: dict[str, ModuleClass] | None = None
    if is_module(chosen.value):
        walked = walk(chosen.value, str(file.path))
        raise_all(Refused, [_closed(name, what) for name, what in walked.closed.items()])
        values: Mapping[Any, Any] = walked.tensors
        if file.format != "torchscript":
            tree, classes = described(walked)
        else:
            classes = scripted(walked)
            notes += _script_notes(file)
    else:
        values = children_of(chosen.value)
    limit = _Limit(file)
    tensors, skipped = native_tensors(file, values, limit)
    if not tensors:
        frozen = file.format == "torchscript" and bool(file.constants)
        found_no = "no tensor but the constants of its code, as in a frozen TorchScript" if frozen else "no tensor"
        do = "save the module before torch.jit.freeze" if frozen else "is this a file of weights?"
        raise BadFile(Problem(str(file.path), found_no, "at least one", do))
    if skipped:
        notes.append("entries that are no tensors, left out: " + listed(skipped))
    prefix = common_prefix(tensors)
    if prefix:
        notes.append(f"the prefix {prefix} of every name is left out of the layer paths")
    others = {s.key: s.value for s in found.sets if s.value is not chosen.value} | found.others
    collections = {name: _collection(file, name, value, limit) for name, value in others.items()}
    if found.stray:
        notes.append("tensors beside the weights, left out: " + listed(found.stray))
    unknown = [name for name in file.globals if not name.startswith(_KNOWN_GLOBALS)]
    if unknown:
        notes.append("classes that the file names and that were not looked for: " + listed(unknown))
    metadata: dict[str, Any] = {"key": chosen.key} if chosen.key else {}
    if tree is not None:
        metadata["modules"] = _unwrapped(tree, prefix)
    model = NativeModel(
        "torch",
        {"zip": "pt", "legacy": "pt-legacy", "torchscript": "torchscript"}[file.format],
        layers_from_state_dict(tensors, classes),
        ordered=tree is not None and _is_chain(metadata["modules"]),
        collections={name: members for name, members in collections.items() if members},
        metadata=metadata,
        notes=tuple(notes),
        close=file.close,
    )
    return with_graph(model, metadata.get("modules"), capture)


# Tensors


class _Limit:
    """Adds up the bytes of distinct tensors, and refuses more than the file may have."""

    def __init__(self, file: TorchFile) -> None:
        self._where, self._left = str(file.path), file.logical_limit()
        self._seen: set[Hashable] = set()

    def count(self, name: str, nbytes: int, identity: Hashable) -> None:
        if identity in self._seen:
            return
        self._seen.add(identity)
        self._left -= nbytes
        if self._left < 0:
            raise BadFile(
                Problem(
                    f"{self._where}: {printable(name, 80)}",
                    f"a tensor of {nbytes} bytes",
                    "tensors not many times larger than the file",
                    "the strides are forged, or save the expanded tensor contiguous",
                )
            )


def native_tensors(
    file: TorchFile, values: Mapping[Any, Any], limit: _Limit
) -> tuple[dict[str, NativeTensor], list[str]]:
    """(the tensors of a mapping, the names of what is no tensor)."""
    tensors: dict[str, NativeTensor] = {}
    skipped: list[str] = []
    problems: list[Problem] = []
    for name, value in values.items():
        if type(name) is not str:
            skipped.append(str(name))
        elif type(value) is TensorRef:
            try:
                data = file.tensor(value, name)
            except Refused as error:
                problems += error.problems
                continue
            identity = file.identity(value)
            limit.count(name, data.nbytes, identity)
            tensors[name] = NativeTensor(name, data, identity)
        elif (array := numpy_array(value)) is not None:
            tensors[name] = NativeTensor(name, array, id(value))
        elif is_unreadable(value):
            problems.append(
                Problem(
                    name,
                    f"a tensor made by {printable(value.cls, 60)}",
                    "a dense tensor whose elements are in the file",
                    "convert it to a plain tensor before saving",
                )
            )
        elif packs_weights(value):
            problems.append(_closed(name, PACKED))
        else:
            skipped.append(name)
    raise_all(Refused, problems)
    return tensors, skipped


def _closed(name: str, what: str) -> Problem:
    do = "use the model as it was before it was quantized" if what == PACKED else "save its state dict"
    return Problem(name, what, "dense tensors with elements", do)


def _collection(file: TorchFile, key: str, value: Any, limit: _Limit) -> tuple[NativeTensor, ...]:
    """Every tensor under a place that is not the weights; those that cannot be read are left out."""
    members: list[NativeTensor] = []
    pending: list[tuple[str, Any, int]] = [("", value, 0)]
    seen: set[int] = set()
    while pending and len(seen) < VISITS:
        path, item, depth = pending.pop()
        if type(item) is TensorRef:
            if item.dtype in DTYPES:
                data = file.tensor(item, path)
                identity = file.identity(item)
                limit.count(path, data.nbytes, identity)
                members.append(NativeTensor(path or "0", data, identity))
        elif id(item) not in seen and depth <= _COLLECTION_DEPTH:
            seen.add(id(item))
            inner = walk(item, str(file.path)).tensors if is_module(item) else children_of(item)
            pending += reversed(
                [(f"{path}.{k}" if path else str(k), v, depth + 1) for k, v in inner.items() if type(k) in (str, int)]
            )
    return tuple(members)


# Whole modules


_PARAMETRIZED: Final = "torch.nn.utils.parametrize.Parametrized"
_MANGLED: Final = re.compile(r"___torch_mangle_\d+\.")


def scripted(walked: Walked) -> dict[str, ModuleClass]:
    """The classes of a TorchScript's modules by path; their settings are in its code. A parametrized module has a class of
    torch's that only borrows the name of its own."""
    found = {module.path: script_class(module.node.cls) for module in walked.modules}
    return {path: ModuleClass(cls) for path, cls in found.items() if not cls.startswith(_PARAMETRIZED)}


def script_class(qualified: str) -> str:
    """A class of TorchScript as the class that it was made of.

    >>> script_class("__torch__.torch.nn.modules.conv.___torch_mangle_3.Conv2d"), script_class("__torch__.Net")
    ('Conv2d', 'Net')
    """
    return class_name(_MANGLED.sub("", qualified.removeprefix("__torch__.")))


def _script_notes(file: TorchFile) -> list[str]:
    notes = ["TorchScript: which tensors are parameters and how layers are set is in its code, which is not run"]
    if file.constants:
        notes.append(
            f"constants of its code that are tensors, left out: {file.constants}; weights, if it was frozen in part"
        )
    return notes


def described(walked: Walked) -> tuple[dict[str, Any], dict[str, ModuleClass]]:
    """(the tree of modules as plain data, class and settings by path)."""
    trees: dict[str, dict[str, Any]] = {}
    classes: dict[str, ModuleClass] = {}
    known: dict[int, tuple[ModuleClass, str]] = {}
    for module in reversed(walked.modules):
        node = module.node
        if id(node) not in known:
            state = items_of(node.state) or {}
            altered = alteration(state, items_of, lambda hook: hook.cls if type(hook) is Node else "")
            known[id(node)] = ModuleClass(class_name(node.cls), plain_config(state)), altered
        classes[module.path], altered = known[id(node)]
        children = [[child.name, trees[child.path]] for child in module.children]
        trees[module.path] = _description(classes[module.path], module.path, children, altered)
    return trees[""], classes


def _description(known: ModuleClass, path: str, children: list[list[Any]], altered: str) -> dict[str, Any]:
    """One module of the tree as plain data."""
    told = {"cls": known.cls, "path": path, "config": known.config, "children": children}
    return {**told, "altered": altered} if altered else told


def class_name(qualified: str) -> str:
    """The bare name of torch's own layers, the qualified name of all else.

    >>> class_name("torch.nn.modules.conv.Conv2d"), class_name("__main__.Net")
    ('Conv2d', '__main__.Net')
    """
    return qualified.rpartition(".")[2] if re.fullmatch(r"torch\.nn\.modules\.\w+\.\w+", qualified) else qualified


def plain_config(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """The public attributes of a module that are plain data: numbers, texts, None, lists of them."""
    config: dict[str, Any] = {}
    for name, value in attributes.items():
        if type(name) is str and not name.startswith("_") and name != "training":
            kept, plain = _plain(value, 0)
            if kept:
                config[name] = plain
    return config


def _plain(value: object, depth: int) -> tuple[bool, Any]:
    if value is None or type(value) in (bool, int, float):
        return True, value
    if isinstance(value, str):
        return is_text(value), value
    members = value if isinstance(value, (list, tuple)) else members_of(value)
    if (
        members is None
        or len(members) > _LONG_SETTING
        or depth >= 3
        or (type(value) is Node and value.cls != "torch.Size")
    ):
        return False, None
    inner = [_plain(member, depth + 1) for member in members]
    return all(kept for kept, _ in inner), [plain for _, plain in inner]


def _unwrapped(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The tree below the wrappers whose prefixes were left out of the paths. A wrapper's hooks are the whole model's."""
    altered: dict[str, Any] = {}
    for name in prefix.split(".")[:-1]:
        altered |= {key: tree[key] for key in tree if key == "altered"}
        tree = dict(tree["children"])[name]
    return altered | _relocated(tree, len(prefix)) if prefix else tree


def _relocated(tree: dict[str, Any], cut: int) -> dict[str, Any]:
    # No deeper than _MODULE_DEPTH, which `walk` has checked.
    children = [[name, _relocated(child, cut)] for name, child in tree["children"]]
    return {**tree, "path": tree["path"][cut:], "children": children}


def _is_chain(tree: Mapping[str, Any]) -> bool:
    """True if the modules are computed in their order: Sequentials of leaves of torch's own."""
    if tree["cls"] == "Sequential" and "altered" not in tree:
        return all(
            (child["cls"] == "Sequential" and _is_chain(child)) or not child["children"]
            for _, child in tree["children"]
        )
    return False


# Live modules


def read_live(model: torch.nn.Module | Mapping[str, Any]) -> NativeModel:
    """The weights of a live module or state dict, without a copy where they lie in main memory.

    Names are those of the state dict, whose values may be numpy's arrays as well as torch's tensors.
    """
    if isinstance(model, Mapping):
        return _read_state_dict(model)
    tensors = {}
    skipped = []
    problems: list[Problem] = []
    import torch

    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = NativeTensor(name, live_tensor(name, value), _live_identity(value))
        else:
            skipped.append(name)
            problems += [_closed(name, PACKED)] if _is_packed(value) else []
    raise_all(Refused, problems)
    if not tensors:
        raise Refused(Problem(type(model).__qualname__, "a module without a tensor", "at least one"))
    prefix = common_prefix(tensors)
    classes: dict[str, ModuleClass] = {}
    tree = _live_tree(model, "", classes)
    modules = _unwrapped(tree, prefix)
    found = NativeModel(
        "torch",
        "module",
        layers_from_state_dict(tensors, classes),
        ordered=_is_chain(modules),
        metadata={"modules": modules},
        notes=_live_notes(skipped, prefix),
    )
    return with_graph(found, modules, capture)


def _is_packed(value: object) -> bool:
    """True for what quantized layers have in a state dict: objects of torch's C++ classes, tuples of tensors."""
    if isinstance(value, tuple):
        return any(getattr(member, "is_quantized", False) is True for member in value)
    return type(value).__name__ == "ScriptObject"


def _read_state_dict(state: Mapping[str, Any]) -> NativeModel:
    tensors = {}
    skipped = []
    problems: list[Problem] = []
    for name, value in state.items():
        if isinstance(value, np.ndarray | np.generic):
            tensors[name] = _live_array(name, value)
        elif any(cls.__module__ == "torch" and cls.__name__ == "Tensor" for cls in type(value).__mro__):
            tensors[name] = NativeTensor(name, live_tensor(name, value), _live_identity(value))
        else:
            skipped.append(name)
            problems += [_closed(name, PACKED)] if _is_packed(value) else []
    raise_all(Refused, problems)
    if not tensors:
        raise Refused(Problem("state dict", "no tensor in it", "at least one"))
    notes = _live_notes(skipped, common_prefix(tensors))
    return NativeModel("torch", "state-dict", layers_from_state_dict(tensors), notes=notes)


def _live_array(name: str, value: np.ndarray[Any, Any] | np.generic) -> NativeTensor:
    array = np.asarray(value)
    if array.dtype.newbyteorder("=") not in DTYPES.values():
        raise Refused(Problem(name, f"an array of {array.dtype}", "one of a dtype that torch has", "convert it first"))
    place = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)
    return NativeTensor(name, from_array(array), ("array", *place) if array is value and array.size else None)


def _live_notes(skipped: list[str], prefix: str) -> tuple[str, ...]:
    left_out = ("entries that are no tensors, left out: " + listed(skipped),) if skipped else ()
    short = (f"the prefix {prefix} of every name is left out of the layer paths",) if prefix else ()
    return left_out + short


def _live_tree(module: torch.nn.Module, path: str, classes: dict[str, ModuleClass]) -> dict[str, Any]:
    from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

    cls = type_before_parametrizations(module) if is_parametrized(module) else type(module)
    config = plain_config(vars(module))
    known = ModuleClass(class_name(f"{cls.__module__}.{cls.__qualname__}"), config)
    classes[path] = known
    children = [
        [name, _live_tree(child, f"{path}.{name}" if path else name, classes)]
        for name, child in module._modules.items()
        if child is not None and name != "parametrizations"
    ]
    attributes = dict(vars(module))
    if _qualified(module) == "torch._dynamo.eval_frame.OptimizedModule":
        del attributes["forward"]  # torch.compile's own, which computes the same
    return _description(known, path, children, alteration(attributes, dict, _qualified))


def _qualified(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def live_tensor(name: str, value: torch.Tensor) -> Tensor:
    """The elements of a live tensor: a view of its memory, or a copy made when read if it lies on another device."""
    import torch

    dtype = DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided or value.is_meta or torch.nn.parameter.is_lazy(value):
        what = "meta" if value.is_meta else f"{value.layout} {value.dtype}".replace("torch.", "")
        raise Refused(
            Problem(
                name,
                f"a tensor that is {what}",
                "a dense tensor with elements, of a dtype that numpy or ml_dtypes has",
                "convert or initialize it first",
            )
        )
    detached = value.detach()
    if detached.device.type == "cpu":
        return from_array(_array(detached, dtype))
    return Computed(tuple(value.shape), dtype, lambda: _array(detached.cpu(), dtype))


def _array(value: torch.Tensor, dtype: np.dtype[Any]) -> Array:
    import torch

    plain = value.resolve_conj().resolve_neg()
    if dtype.isbuiltin != 2:  # 2: ml_dtypes, which torch does not know
        return plain.numpy()
    width = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return plain.view(width).numpy().view(dtype)


def _live_identity(value: torch.Tensor) -> Hashable:
    if value.numel() == 0 or value.is_meta:
        return None
    place = value.untyped_storage().data_ptr()
    strides = tuple(s if n > 1 else 0 for n, s in zip(value.shape, value.stride(), strict=True))
    return (str(value.device), place, value.storage_offset(), tuple(value.shape), strides, str(value.dtype))
