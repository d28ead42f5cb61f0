"""What a manifest says, in words: the summary, the rows of a table, and the questions that its source left open. Which
formats there are.

>>> in_bytes(246_824), count(61_706, "parameter")
('247 kB', '61,706 parameters')
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from neutral.canon import hintable
from neutral.errors import named, printable
from neutral.framework import Format, Framework
from neutral.frameworks import FRAMEWORKS
from neutral.schema.kinds import Layer, Parameter
from neutral.schema.manifest import Manifest

COLUMNS = ("layer", "kind", "parameter", "axes", "shape", "dtype", "size")
FORMAT_COLUMNS = ("framework", "--from", "reads", "writes")
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
        first: tuple[str, str] = (named(layer.path), layer.kind)
        if not layer.parameters:
            yield (*first, "", "", "", "", "")
        for role, parameter in layer.parameters.items():
            name = f"{role} (state)" if parameter.state else role
            shape = "×".join(str(size) for size in parameter.shape) or "scalar"
            size = f"= {parameter.tied_to}" if parameter.tied_to else in_bytes(_nbytes(parameter))
            yield (*first, name, " ".join(parameter.axes), shape, parameter.dtype, size)
            first = ("", "")


_UNKNOWN = {
    True: "--kind PATTERN=KIND says what they are",
    False: "no kind has tensors of these names, so that only a template with the same ones takes them",
}
"""What to do about layers of unknown kind: whether the names of their tensors are those of a kind -> advice."""


def open_questions(manifest: Manifest) -> Iterator[str]:
    """What the source did not say, with the option that says it."""
    unknown = {layer.path: _hintable(manifest, layer) for layer in manifest.layers if layer.kind == "unknown"}
    for fits, advice in _UNKNOWN.items():
        paths = [path for path, found in unknown.items() if found == fits]
        if paths:
            yield f"{count(len(paths), 'layer')} of unknown kind ({_some(paths)}), kept as in the source; {advice}"
    undecided = [layer.path for layer in manifest.layers if layer.undecided]
    if undecided:
        yield (
            f"{count(len(undecided), 'layer')} may stand behind a Flatten ({_some(undecided)}); "
            "--flatten LAYER=CHANNELS, or --flatten none, says so"
        )


def _hintable(manifest: Manifest, layer: Layer) -> bool:
    """True if the names of a layer's tensors are those of a kind that its framework stores."""
    framework = FRAMEWORKS.get(manifest.source.framework)
    shapes = {role: parameter.shape for role, parameter in layer.parameters.items() if not parameter.state}
    return framework is not None and bool(hintable(shapes, framework.convention()))


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
    shown = ", ".join(printable(named(name), 80) for name in names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"


def _nbytes(parameter: Parameter) -> int:
    bits = re.search(r"\d+", parameter.dtype)
    return math.prod(parameter.shape) * (int(bits.group()) if bits else 8) // 8


def formats(frameworks: Iterable[Framework]) -> Iterator[tuple[str, ...]]:
    """One row per format, under FORMAT_COLUMNS; a framework is named in its first row only."""
    for framework in frameworks:
        name = framework.name
        for form in framework.files:
            yield name, form.name if form.reads else "", form.reads, _written(form)
            name = ""


def _written(form: Format) -> str:
    if not form.new:
        return "with --into"
    return " ".join((*form.suffixes, "(or none)") if form.bare else form.suffixes)


def installed(frameworks: Iterable[Framework]) -> Iterator[tuple[str, str]]:
    """What is installed of each framework, as far as anything of it is ever needed."""
    for framework in frameworks:
        versions = framework.installed().items()
        told = ", ".join(f"{package} {version or '(not installed)'}" for package, version in versions)
        yield framework.name, told or "nothing needed"
