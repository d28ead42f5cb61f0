"""A column of the zoo against torch and Keras, in both directions, judged by a forward pass.

Each case goes from torch's and Keras' files into the column's template and back, into a new file of the column, and from the
column's file into its own template. Help is given only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import neutral
from neutral.errors import NeutralError
from tests.columns import model_of
from tests.measure import KINDS, OWN_FLATTEN, flatten_hints, layers_of
from tests.oracle.process import Worker, difference
from tests.zoo import Case, Model

CLOSE = 1e-5
ONE_LAYER = ("torch", "paddle")
"""Frameworks that have a stack of recurrent layers as one layer."""


@dataclass(frozen=True)
class Column:
    """A framework of the zoo's columns: its format, the suffix of a new file, and what says whose a file is."""

    framework: str
    format: str
    suffix: str
    named: bool = False


@dataclass(frozen=True)
class Crossed:
    """What became of one way: how far the outputs are apart, or why it was refused."""

    way: str
    apart: float | None
    reason: str = ""
    help: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def right(self, case: Case) -> bool:
        """True for the same output; and, where the Flatten is in no framework's own order, for a warning that says so."""
        warned = case.name in OWN_FLATTEN and any("does not say how it flattens" in w for w in self.warnings)
        return self.apart is not None and (self.apart < CLOSE or warned)

    def __str__(self) -> str:
        return f"{self.way}: {self.reason or self.apart} {self.help}"


def kind_hints(case: Case, framework: str) -> dict[str, str]:
    model = model_of(case, framework)
    assert isinstance(model, Model)
    return {path: KINDS[row.cls] for path, row in layers_of(model.layers) if row.cls in KINDS}


def mapping(case: Case, source: str, target: str) -> dict[str, str]:
    """Stacked recurrent layers: one layer of several levels here, several layers there."""
    found = {}
    for path, names in case.stacks.items():
        if len(names) > 1:
            for i, name in enumerate(names):
                ours, theirs = (f"{path}.{i}" if side in ONE_LAYER else name for side in (source, target))
                if ours != theirs:
                    found[ours] = theirs
    return found


def helped(
    case: Case, source: str, target: str, given: dict[str, Any], file: Path, out: Path, **more: Any
) -> neutral.Report:
    while True:
        try:
            return neutral.convert(file, out, **more, **given)
        except NeutralError as error:
            text = str(error)
            if "--flatten" in text and "flatten" not in given and case.name not in OWN_FLATTEN:
                given["flatten"] = flatten_hints(case)
            elif "--kind" in text and "kinds" not in given:
                given["kinds"] = kind_hints(case, source)
            elif "--map" in text and "mapping" not in given and (pairs := mapping(case, source, target)):
                given["mapping"] = pairs
            else:
                raise


def plain(case: Case, framework: str) -> bool:
    """True if a new file has the layers of the case's model: no cells, stacks of several levels, norms of kernels, halves."""
    rows = [row for model in case.models.values() for _, row in layers_of(model.layers)]
    other = case.name.endswith(("_cell", "_cells_stacked", "_only")) or case.name in ("subclassed", *OWN_FLATTEN)
    return not other and not any(row.wrap or row.args.get("num_layers", 1) > 1 for row in rows)


def cross(
    case: Case, column: Column, other: str, format: str, workers: Mapping[str, Worker], folder: Path, equal: bool
) -> list[Crossed]:
    """Both directions between the column and one other framework, into templates; and a new file of the column."""
    mine = column.framework
    theirs = {mine: column.format, other: format}
    found = []
    for source, target, new in ((other, mine, False), (other, mine, True), (mine, other, False), (mine, mine, False)):
        built = workers[source].build(case.name, 1, equal=equal, formats=[theirs[source]])
        template = None
        given: dict[str, Any] = {"format": mine} if column.named and source == mine else {}
        if new and not plain(case, other):
            continue
        way = f"{case.name} {source} -> {target}{' (new)' if new else ''}"
        if new:
            out = folder / f"new{len(list(folder.iterdir()))}{column.suffix}"
            more: dict[str, Any] = {"to": mine}
        else:
            template = workers[target].build(case.name, 2, equal=equal, formats=[theirs[target]]).files[theirs[target]]
            out = folder / f"{len(list(folder.iterdir()))}-{template.name}"
            more = {"into": template, **({"to": mine} if column.named and target == mine else {})}
        try:
            report = helped(case, source, target, given, built.files[theirs[source]], out, **more)
        except NeutralError as error:
            assert not out.exists()
            found.append(Crossed(way, None, str(error), tuple(given)))
            continue
        output = workers[target].forward(case.name, out, built.inputs, equal=equal)
        found.append(Crossed(way, difference(output, built.output), "", tuple(given), report.warnings))
    return found
