"""Layers out of a flat mapping of names to tensors, as torch names them.

>>> from neutral.native import from_array
>>> names = ("module.fc.weight", "module.fc.bias", "module.attn.in_proj_weight", "module.attn.out_proj.weight")
>>> layers = layers_from_state_dict({name: NativeTensor(name, from_array([0.0])) for name in names})
>>> [(layer.path, list(layer.tensors)) for layer in layers]
[('fc', ['weight', 'bias']), ('attn', ['in_proj_weight', 'out_proj.weight'])]

A name says to which module a tensor belongs, and nothing about its kind: that is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from neutral.errors import Problem, Refused, raise_all
from neutral.native import NativeLayer, NativeTensor

PREFIXES: Final = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put in front of every name."""

_ATTENTION: Final = ("in_proj_weight", "in_proj_bias", "q_proj_weight")
_STATE: Final = frozenset({"num_batches_tracked", "_extra_state"})


@dataclass(frozen=True)
class ModuleClass:
    """What a file or a live object says of one module: its class and that class's own settings."""

    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)


def common_prefix(names: Iterable[str]) -> str:
    """The wrappers' prefixes that every name has.

    >>> common_prefix(["module._orig_mod.a.weight", "module._orig_mod.b"]), common_prefix(["module.a", "b"])
    ('module._orig_mod.', '')
    """
    known = list(names)
    prefix = ""
    while known:
        longer = next((prefix + p for p in PREFIXES if all(name.startswith(prefix + p) for name in known)), None)
        if longer is None:
            break
        prefix = longer
    return prefix


def layers_from_state_dict(
    tensors: Mapping[str, NativeTensor], classes: Mapping[str, ModuleClass] | None = None
) -> tuple[NativeLayer, ...]:
    """The layers of a state dict, in the order of their first tensors.

    Prefixes that all names have are left out of the paths; `NativeTensor.name` keeps the whole name. `classes` maps
    paths (with those prefixes) to what is known of the modules there; without it every class is unknown.
    """
    prefix = common_prefix(tensors)
    names = {name[len(prefix) :] for name in tensors}
    attention = {
        path
        for path in (name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in _ATTENTION)
        if classes is None or ((path_class := classes.get(prefix + path)) and path_class.cls == "MultiheadAttention")
    }
    layers: dict[str, dict[str, NativeTensor]] = {}
    problems = []
    for full, tensor in tensors.items():
        path, local = _place(full[len(prefix) :], attention)
        if not local or not is_text(full):
            problems.append(Problem(full, "a tensor name that is empty or no text", "a name", "rename it in the file"))
        state = tensor.state or local.rpartition(".")[2] in _STATE
        layers.setdefault(path, {})[local] = replace(tensor, state=state)
    raise_all(Refused, problems)
    unsure = classes is None and any(_is_turned(local) for local in layers.values())
    return tuple(
        NativeLayer(path, LINEAR_OR_CONV1D, local)
        if unsure and _is_square(local)
        else _layer(path, local, (classes or {}).get(prefix + path))
        for path, local in layers.items()
    )


LINEAR_OR_CONV1D: Final = "Linear or transformers.Conv1D"
"""The class of a square layer in a model some of whose dense layers are turned: GPT-2's are (in, out), with torch's names."""


def _is_turned(tensors: Mapping[str, NativeTensor]) -> bool:
    """True for a matrix whose bias belongs to its second axis, as no layer of torch has it."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if len(tensors) != 2 or weight is None or bias is None or len(weight.data.shape) != 2:
        return False
    rows, columns = weight.data.shape
    return rows != columns and bias.data.shape == (columns,)


def _is_square(tensors: Mapping[str, NativeTensor]) -> bool:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if len(tensors) != 2 or weight is None or bias is None or len(weight.data.shape) != 2:
        return False
    return weight.data.shape == (*bias.data.shape, *bias.data.shape)


def _layer(path: str, tensors: Mapping[str, NativeTensor], known: ModuleClass | None) -> NativeLayer:
    if known is None:
        return NativeLayer(path, None, tensors)
    return NativeLayer(path, known.cls, tensors, known.config, "class")


def _place(name: str, attention: set[str]) -> tuple[str, str]:
    """(the layer's path, the tensor's name in it)."""
    dotted = "." + name
    marker = dotted.find(".parametrizations.")
    if marker >= 0:
        path, local = name[: max(marker - 1, 0)], dotted[marker + 1 :]
    else:
        path, _, local = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    if last == "out_proj" and parent in attention:
        return parent, f"out_proj.{local}"
    return path, local


def is_text(name: str) -> bool:
    """False for text with halves of surrogate pairs, which has no UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
