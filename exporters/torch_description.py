"""A plain description of torch modules as a tree, and the chain that a Sequential makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What settings raise that no module of torch has: they come from a file."""

_PARAMETRIZED = "torch.nn.utils.parametrize.Parametrized"


@dataclass(frozen=True)
class Module:
    """One module: its path in the model, the name of its class, its settings, and the modules in it.

    `altered` says what makes it compute something else than its class does; then `cls` is "", for no rule fits it.
    """

    path: str
    cls: str
    config: Config
    children: tuple[Module, ...]
    altered: str = ""


def module_of(described: Mapping[str, Any], path: str = "") -> Module:
    """A tree of modules from plain data, as an exporter describes them."""
    path = str(described.get("path", path))
    children = tuple(
        module_of(child, f"{path}.{name}" if path else str(name)) for name, child in described.get("children") or ()
    )
    altered = str(described.get("altered") or "")
    cls = "" if altered else str(described.get("cls") or "").removeprefix(_PARAMETRIZED)
    return Module(path, cls, described.get("config") or {}, children, altered)


_COMPUTING = ("forward", "_call_impl", "_conv_forward", "_apply_instance_norm", "_output_padding")
"""Methods that a module looks up on itself while it computes; others (`train`, `extra_repr`) may be replaced."""
_HOOKS = {"_forward_pre_hooks": "a forward pre-hook", "_forward_hooks": "a forward hook"}
_KNOWN_HOOKS = ("torch.nn.utils.weight_norm.WeightNorm", "torch.nn.utils.spectral_norm.SpectralNorm")
"""Pre-hooks that only make a weight of the parameters that the layer's kind knows."""


def alteration(
    attributes: Mapping[Any, Any], items: Callable[[Any], Mapping[Any, Any] | None], cls: Callable[[Any], str]
) -> str:
    """What makes a module of these instance attributes compute something else than its class does, or "".

    `items` gives the members of a mapping among them, `cls` the qualified name of a hook's class.

    >>> alteration({"forward": print}, dict, repr), alteration({"_forward_hooks": {0: print}}, dict, repr)
    ('its forward was replaced', 'it has a forward hook')
    """
    for name in _COMPUTING:
        if name in attributes:
            return f"its {name} was replaced"
    for name, what in _HOOKS.items():
        known = _KNOWN_HOOKS if name == "_forward_pre_hooks" else ()
        if any(cls(hook) not in known for hook in (items(attributes.get(name) or {}) or {}).values()):
            return f"it has {what}"
    return ""


def chain_of(module: Module) -> Iterator[Module]:
    """The modules that a Sequential runs one after the other, those of inner Sequentials among them."""
    for child in module.children:
        if child.cls == "Sequential":
            yield from chain_of(child)
        else:
            yield child


def ints(value: Any) -> tuple[int, ...]:
    """A setting that is one whole number or several."""
    return (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)
