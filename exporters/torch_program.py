"""The weights of a program of torch.export (`.pt2`), with the classes and settings that its graph tells of their modules.

    model = read(Path("lenet5.pt2"))

A node of the graph names the modules it came from and takes their weights: so a Conv2d is known as one, with its strides. What
a module of an own class does is not looked at, and how the modules are wired is not taken over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neutral.containers.torch_program import TorchProgram
from neutral.errors import BadFile, Problem, WrongUsage
from neutral.exporters.state_dict import ModuleClass, layers_from_state_dict
from neutral.native import NativeModel, NativeTensor

_TORCH_S_OWN = re.compile(r"torch\.nn\.modules\.\w+\.(?:\w+\.)*(\w+)")
_WINDOW = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    **{f"torch.ops.aten.conv{n}d.{form}": _WINDOW for n in (1, 2, 3) for form in ("default", "padding")},
    **{
        f"torch.ops.aten.conv_transpose{n}d.{form}": {**_WINDOW, "output_padding": 0}
        for n in (1, 2, 3)
        for form in ("default", "input")
    },
    "torch.ops.aten.batch_norm.default": {"eps": None, "momentum": None},
    "torch.ops.aten.instance_norm.default": {"eps": None, "momentum": None},
    "torch.ops.aten.layer_norm.default": {"normalized_shape": None, "eps": 1e-05},
    "torch.ops.aten.group_norm.default": {"num_groups": None, "eps": 1e-05},
    "torch.ops.aten.rms_norm.default": {"normalized_shape": None, "eps": None},
}
"""What an operator says of the module that it came from: the settings of the module's class, and what they are if not said."""


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The weights of a program by the names of its state dict."""
    if key is not None:
        raise WrongUsage(Problem(str(source), f"the key {key!r}", "none", "a program holds one set of weights"))
    program = TorchProgram(source)
    try:
        tensors = {
            name: NativeTensor(
                name, program.tensor(name), ("pt2", place.member, place.offset, place.shape, place.strides)
            )
            for name, place in program.weights.items()
        }
        if not tensors:
            raise BadFile(Problem(str(source), "no tensor", "at least one", "is this a program with weights?"))
        layers = layers_from_state_dict(tensors, dict(_classes(program)))
    except BaseException:
        program.close()
        raise
    notes = (
        "a program of torch.export: its weights and what its operators say of them; no graph: how they are wired is not read",
    )
    return NativeModel("torch", "pt2", layers, notes=notes, close=program.close)


def _classes(program: TorchProgram) -> Iterator[tuple[str, ModuleClass]]:
    """Each module that the graph names, with the settings of its one operator."""
    classes: dict[str, str] = {}
    settings: dict[str, list[dict[str, Any] | None]] = {}
    weights = program.arguments()
    for node in program.nodes():
        metadata = node.get("metadata")
        stack = metadata.get("nn_module_stack") if isinstance(metadata, dict) else None
        modules = dict(_modules(stack)) if isinstance(stack, str) else {}
        classes |= modules
        owners = {weights[name].rpartition(".")[0] for name in _taken(node) if name in weights}
        inner = next(reversed(modules), "")
        settings.setdefault(inner, []).append(_told(node) if owners == {inner} else None)
    for path, cls in classes.items():
        own = _TORCH_S_OWN.fullmatch(cls)
        # A module of more than one operator (circular padding is one of its own) is set by all of them together.
        told = settings.get(path, [None])
        alike = own is not None and all(one == told[0] for one in told)
        yield path, ModuleClass(own[1] if own else cls, (told[0] or {}) if alike else {})


def _modules(stack: str) -> Iterator[tuple[str, str]]:
    """(path, class) of the modules in `key,path,class;...`; a module called again has `@1` behind its path."""
    for entry in stack.split(";"):
        parts = entry.split(",")
        if len(parts) == 3:
            yield re.sub(r"@\d+", "", parts[1]), parts[2]


def _inputs(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    inputs = node.get("inputs")
    for one in inputs if isinstance(inputs, list) else []:
        argument = one.get("arg") if isinstance(one, dict) else None
        if isinstance(argument, dict) and len(argument) == 1:
            yield str(one.get("name")), argument


def _taken(node: Mapping[str, Any]) -> Iterator[str]:
    for _, argument in _inputs(node):
        tensor = argument.get("as_tensor")
        if isinstance(tensor, dict):
            yield str(tensor.get("name"))


def _told(node: Mapping[str, Any]) -> dict[str, Any] | None:
    """A module's settings as its operator has them; nothing where one of them is not said."""
    defaults = SETTINGS.get(str(node.get("target")))
    if defaults is None:
        return None
    given = {name: next(iter(argument.values())) for name, argument in _inputs(node) if "as_none" not in argument}
    found = {name: given.get(name, default) for name, default in defaults.items()}
    return found if all(value is not None for value in found.values()) else None
