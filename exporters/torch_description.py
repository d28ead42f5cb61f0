"""A plain description of torch modules as a tree, and the chain that a Sequential makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What settings raise that no module of torch has: they come from a file."""

_PARAMETRIZED = "torch.nn.utils.parametrize.Parametrized"


@dataclass(frozen=True)
class Module:
    """One module: its path in the model, the name of its class, its settings, and the modules in it."""

    path: str
    cls: str
    config: Config
    children: tuple[Module, ...]


def module_of(described: Mapping[str, Any], path: str = "") -> Module:
    """A tree of modules from plain data, as an exporter describes them."""
    path = str(described.get("path", path))
    children = tuple(
        module_of(child, f"{path}.{name}" if path else str(name)) for name, child in described.get("children") or ()
    )
    cls = str(described.get("cls") or "").removeprefix(_PARAMETRIZED)
    return Module(path, cls, described.get("config") or {}, children)


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
