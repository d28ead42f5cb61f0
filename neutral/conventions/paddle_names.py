"""Which layer a name of a Paddle state dict belongs to.

>>> place = places(["rnn.weight_ih_l0", "rnn.0.cell.weight_ih", "fc.weight"])
>>> place["rnn.0.cell.weight_ih"], place["fc.weight"]
(Place(path='rnn', local='0.cell.weight_ih', twin='rnn.weight_ih_l0'), Place(path='fc', local='weight', twin=None))

A recurrent layer is in its state dict twice: flat (`weight_ih_l0_reverse`) and by its cells (`0.cell_bw.weight_ih`). The
projections of attention are layers of their own there; here they belong to the attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_FLAT = re.compile(r"(weight|bias)_(ih|hh)_l(\d{1,4})(_reverse)?")
_CELL = re.compile(r"(?:(.*)\.)?((\d{1,4})\.(cell|cell_fw|cell_bw)\.((?:weight|bias)_(?:ih|hh)|weight_ho))")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Place:
    """The path of a layer, the name of a tensor in it, and the full name of the flat tensor that it repeats."""

    path: str
    local: str
    twin: str | None = None


def places(names: Iterable[str], classes: Mapping[str, str] | None = None) -> dict[str, Place]:
    """The place of each name. `classes` has the class of each layer by path, where these are known."""
    known = list(names)
    present = frozenset(known)
    stacks = {path for path, local in map(_parted, known) if _FLAT.fullmatch(local)}
    attentions = _attentions(known, classes)
    found = {}
    for name in known:
        path, local = _parted(name)
        parent, last = _parted(path)
        cell = _CELL.fullmatch(name)
        if cell is not None and (cell[1] or "") in stacks:
            twin = _joined(cell[1] or "", f"{cell[5]}_l{cell[3]}{'_reverse' if cell[4] == 'cell_bw' else ''}")
            found[name] = Place(cell[1] or "", cell[2], twin if twin in present else None)
        elif last in _PROJECTIONS and parent in attentions:
            found[name] = Place(parent, f"{last}.{local}")
        else:
            found[name] = Place(path, local)
    return found


def _attentions(names: list[str], classes: Mapping[str, str] | None) -> set[str]:
    """Layers with just the four projections of attention."""
    if classes is not None:
        return {path for path, cls in classes.items() if cls == "MultiHeadAttention"}
    locals_of: dict[str, dict[str, set[str]]] = {}
    for name in names:
        path, local = _parted(name)
        parent, last = _parted(path)
        if last in _PROJECTIONS:
            locals_of.setdefault(parent, {}).setdefault(last, set()).add(local)
    return {
        path
        for path, parts in locals_of.items()
        if len(parts) == len(_PROJECTIONS) and all("weight" in part <= {"weight", "bias"} for part in parts.values())
    }


def repeated(flat: Iterable[str]) -> dict[str, str]:
    """The name that a recurrent layer gives each of its flat local names a second time.

    >>> repeated(["weight_ih_l0", "bias_hh_l1"]), repeated(["weight_ih_l0", "weight_ih_l0_reverse"])
    ({'weight_ih_l0': '0.cell.weight_ih', 'bias_hh_l1': '1.cell.bias_hh'}, \
{'weight_ih_l0': '0.cell_fw.weight_ih', 'weight_ih_l0_reverse': '0.cell_bw.weight_ih'})
    """
    matches = [match for match in map(_FLAT.fullmatch, flat) if match is not None]
    both = any(match[4] for match in matches)
    return {
        match[0]: f"{match[3]}.{('cell_bw' if match[4] else 'cell_fw') if both else 'cell'}.{match[1]}_{match[2]}"
        for match in matches
    }


def _parted(name: str) -> tuple[str, str]:
    path, _, local = name.rpartition(".")
    return path, local


def _joined(path: str, local: str) -> str:
    return f"{path}.{local}" if path else local
