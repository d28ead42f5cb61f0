"""What a manifest says, in words: the summary, the rows of a table, and the questions that its source left open.

>>> in_bytes(246_824), count(61_706, "parameter")
('247 kB', '61,706 parameters')
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from neutral.errors import printable
from neutral.schema.kinds import Parameter
from neutral.schema.manifest import Manifest

COLUMNS = ("layer", "kind", "parameter", "axes", "shape", "dtype", "size")
LISTED = 5
"""How many names a sentence lists at the most."""


def summary(manifest: Manifest) -> str:
    """Source, number of layers, parameters and bytes; what is tied counts once."""
    stored = [parameter for _, parameter in manifest.parameters() if parameter.tied_to is None]
    weights = sum(math.prod(parameter.shape) for parameter in stored if not parameter.state)
    source = printable(f"{manifest.source.framework} {manifest.source.format}")
    layers = count(len(manifest.layers), "layer")
    return f"{source}, {layers}, {count(weights, 'parameter')}, {in_bytes(sum(map(_nbytes, stored)))}"


def rows(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    """One row per parameter, under COLUMNS; a layer is named in its first row only."""
    for layer in manifest.layers:
        first: tuple[str, str] = (layer.path, layer.kind)
        if not layer.parameters:
            yield (*first, "", "", "", "", "")
        for role, parameter in layer.parameters.items():
            name = f"{role} (state)" if parameter.state else role
            shape = "×".join(str(size) for size in parameter.shape) or "scalar"
            size = f"= {parameter.tied_to}" if parameter.tied_to else in_bytes(_nbytes(parameter))
            yield (*first, name, " ".join(parameter.axes), shape, parameter.dtype, size)
            first = ("", "")


def open_questions(manifest: Manifest) -> Iterator[str]:
    """What the source did not say, with the option that says it."""
    unknown = [layer.path for layer in manifest.layers if layer.kind == "unknown"]
    if unknown:
        yield (
            f"{count(len(unknown), 'layer')} of unknown kind ({_some(unknown)}), kept as in the source; "
            "--kind PATTERN=KIND says what they are"
        )
    undecided = [layer.path for layer in manifest.layers if layer.undecided]
    if undecided:
        yield (
            f"{count(len(undecided), 'layer')} may stand behind a Flatten ({_some(undecided)}); "
            "--flatten LAYER=CHANNELS, or --flatten none, says so"
        )


def in_bytes(number: int) -> str:
    """A size with three digits and a unit (powers of 1000)."""
    size, unit = float(number), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, bigger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, 80) for name in names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"


def _nbytes(parameter: Parameter) -> int:
    bits = re.search(r"\d+", parameter.dtype)
    return math.prod(parameter.shape) * (int(bits.group()) if bits else 8) // 8
