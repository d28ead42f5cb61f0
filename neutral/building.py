"""Without a template: an archive's layers as the native layers of a framework, for a new file.

Going back to the source's own framework gives its names, order and bytes again; another framework's class is chosen
for each canonical layer by the module that rebuilds that framework's models.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from neutral.archive import Contents, manifest_without_digests
from neutral.canon import Written, binding_for, kind_advice, native_tensors, recognise
from neutral.canonical import CanonicalLayer, CanonicalTensor
from neutral.conventions.forms import Convention, same_family
from neutral.doubts import flatten_remark, undecided_problem, unnamed_problem
from neutral.errors import Problem, Refused, an, named, raise_all
from neutral.framework import Format, Framework
from neutral.journey import Journey
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
from neutral.origin import native_again, origin_of
from neutral.schema.kinds import KINDS
from neutral.schema.manifest import Manifest


def build_model(
    contents: Contents, framework: Framework, form: Format, target: Path, journey: Journey
) -> tuple[NativeModel, Manifest]:
    """Native layers of the target framework for a new file, and the manifest that its writer may look at."""
    convention = framework.convention()
    source = origin_of(contents)
    origin = source.convention()
    if framework.rewriter is not None and form.whole:
        contents, warnings, notes = importlib.import_module(framework.rewriter).renewed(contents)
        journey.warnings += warnings
        journey.notes += notes
    described = source.describes(contents.source.settings, contents.source.format, form)
    manifest = manifest_without_digests(contents)
    if form.whole:
        if not described:
            journey.problems += _wiring_problem(contents, manifest, target)
        journey.problems += _empty_layers(contents, target)
    alike = same_family(origin, convention)
    rebuilt = form.rebuilt or (form.whole and contents.graph is not None and not described)
    if alike and not rebuilt and not _classes_missing(contents, framework):
        native = native_again(contents, framework)
    elif framework.canonical:
        native = _canonical_model(contents, framework, origin, journey)
    else:
        raise_all(Refused, unnamed_problem(contents.layers, source))
        native = _foreign_model(contents, framework, convention, origin, manifest, form, journey)
    raise_all(Refused, journey.problems)
    if framework.by_place and native.graph is None and not described and not alike:
        journey.notes.append("no graph: weights in the order of the layers, for a model of the same layers to load")
        if source.by_name:
            raise_all(Refused, _order_unknown(native, framework))
    return native, manifest


def _order_unknown(native: NativeModel, framework: Framework) -> list[Problem]:
    """Layers of one class that stand in the order of their names, though the numbers in these do not count them up."""
    groups: dict[str | None, list[str]] = {}
    for layer in native.layers:
        groups.setdefault(layer.cls, []).append(layer.path)
    return [
        Problem(
            f"{', '.join(named(path) for path in paths[:5])}{', …' if len(paths) > 5 else ''}",
            f"{len(paths)} layers of class {cls} in the order of their names",
            f"the order in which they compute, for {framework.name} finds weights by their place",
            "use --into TEMPLATE",
        )
        for cls, paths in groups.items()
        if not _counted_up(paths)
    ]


def _counted_up(paths: Sequence[str]) -> bool:
    """True if paths differ in their numbers alone, and these count up.

    >>> _counted_up(["fc1", "fc2", "fc10"]), _counted_up(["head", "hidden"]), _counted_up(["fc1", "fc10", "fc2"])
    (True, False, False)
    """
    numbers = [[int(n) for n in re.findall(r"\d+", path)] for path in paths]
    return len({re.sub(r"\d+", "", path) for path in paths}) == 1 and numbers == sorted(numbers)


def _wiring_problem(contents: Contents, manifest: Manifest, target: Path) -> list[Problem]:
    """A whole model that its source does not describe needs a graph."""
    if contents.graph is not None:
        return []
    return [
        Problem(
            str(target),
            f"an archive without a graph ({manifest.no_graph()})",
            "one, to write a whole model",
            "write weights, or use --into TEMPLATE",
        )
    ]


def _empty_layers(contents: Contents, target: Path) -> list[Problem]:
    """Layers of no units, which models of Keras and programs of torch cannot have."""
    return [
        Problem(
            layer.path,
            f"a {role} of shape {tensor.data.shape}",
            f"sizes above 0, to write {target.suffix}",
            "write weights alone",
        )
        for layer in contents.layers
        for role, tensor in list(layer.weights.items())[:1]
        if 0 in tensor.data.shape
    ]


def _classes_missing(contents: Contents, framework: Framework) -> bool:
    """True for layers of a checkpoint without classes, on their way into a file that has them."""
    if not framework.classes or contents.source.framework == framework.name:
        return False
    return any(layer.native is None and layer.weights for layer in contents.layers)


def _canonical_model(contents: Contents, framework: Framework, origin: Convention, journey: Journey) -> NativeModel:
    """Canonical tensors as they are, under `<layer>/<role>`.

    A layer of unknown kind keeps its source's names and axes. Where these names are also those of a kind, a reader would
    take the axes for canonical ones: then the kind is asked for.
    """
    convention = framework.convention()
    layers = []
    for layer in contents.layers:
        tensors = {
            role: NativeTensor(f"{layer.path}/{role}" if layer.path else role, t.data, None, t.state)
            for role, t in layer.tensors.items()
        }
        if layer.kind == "unknown" and layer.weights:
            read = recognise(NativeLayer(layer.path, None, tensors), convention)
            if read.binding is not None or read.candidates:
                journey.problems.append(_unknown_problem(layer, framework, origin))
        elif layer.undecided and origin.flatten != convention.flatten:
            journey.problems.append(undecided_problem(layer))
        layers.append(NativeLayer(layer.path, layer.kind, tensors, layer.attributes, "class"))
    return NativeModel(framework.name, framework.files[0].name, tuple(layers))


def _unknown_problem(layer: CanonicalLayer, framework: Framework, origin: Convention) -> Problem:
    kinds = f"candidates: {', '.join(layer.candidates)}" if layer.candidates else f"tensors {', '.join(layer.weights)}"
    return Problem(
        layer.path,
        f"a layer of unknown kind ({kinds})",
        f"its kind, to write it for {framework.name}",
        kind_advice(layer, origin)
        + (", or use --into TEMPLATE" if layer.candidates and not framework.canonical else ""),
    )


def _foreign_model(
    contents: Contents,
    framework: Framework,
    convention: Convention,
    origin: Convention,
    manifest: Manifest,
    form: Format,
    journey: Journey,
) -> NativeModel:
    """Each canonical layer as a native layer of another framework.

    A model that is built whole from its graph needs no decision on a Flatten: the graph says what becomes of it.
    """
    whole = contents.graph is not None and form.whole
    journey.problems += _obstacles(contents, framework, convention, origin, whole)
    raise_all(Refused, journey.problems)
    targets = framework.targets()
    classes: Mapping[str, tuple[str, Mapping[str, Any]]] = targets.layer_classes(manifest)
    states: Callable[..., Mapping[str, Any]] = getattr(targets, "layer_states", lambda cls, roles: {})
    journey.notes += getattr(targets, "remarks", lambda manifest: [])(manifest)
    layers = []
    for path, parts in _units(contents, classes, convention, whole):
        cls, config = classes[parts[0].path]
        binding = binding_for(parts, cls, convention, config)
        if isinstance(binding, str):
            journey.problems.append(
                Problem(
                    path,
                    f"{an(parts[0].kind)} ({binding})",
                    f"one that {framework.name} can hold as {cls}",
                    "use a template, or another framework",
                )
            )
            continue
        for layer in parts:
            journey.warnings += [] if whole else flatten_remark(contents, layer, origin, convention)
        written = native_tensors(binding, parts, convention, where=path)
        journey.take(written)
        levels = path.replace(".", framework.separator)
        prefix = f"{levels}{framework.separator}" if levels else ""
        tensors = {
            local: NativeTensor(f"{prefix}{local}", tensor, _tie(parts[0], written, local) if len(parts) == 1 else None)
            for local, tensor in written.tensors.items()
        }
        tensors |= {
            local: NativeTensor(f"{prefix}{local}", from_array(value), None, True)
            for local, value in states(cls, written.tensors).items()
        }
        layers.append(NativeLayer(path, cls, tensors, config, "graph"))
    return NativeModel(framework.name, framework.suffixes[0], tuple(layers), contents.graph, {}, contents.ordered)


def _obstacles(
    contents: Contents, framework: Framework, convention: Convention, origin: Convention, whole: bool
) -> Iterator[Problem]:
    """Why layers can be no layers of another framework, as far as no class of it need be asked."""
    stored = {part.kind for form in convention.forms for part in form.parts}
    for layer in contents.layers:
        if layer.kind not in KINDS.own and layer.kind not in stored:
            yield Problem(layer.path, an(layer.kind), f"a kind that {framework.name} has", "use another framework")
        elif layer.kind == "unknown" and layer.weights:
            yield _unknown_problem(layer, framework, origin)
        elif layer.attributes.get("grouping") == "interleaved":
            found = "a group norm whose groups take every n-th channel"
            do = origin.advice.get("grouping", "group them so before training")
            yield Problem(layer.path, found, "channels side by side", do)
        elif layer.undecided and origin.flatten != convention.flatten and not whole:
            yield undecided_problem(layer)


def _units(
    contents: Contents, classes: Mapping[str, tuple[str, Mapping[str, Any]]], convention: Convention, whole: bool
) -> Iterator[tuple[str, list[CanonicalLayer]]]:
    """What becomes one native layer each: a canonical layer, or all levels of a stack where the framework has stacks, too.

    The nodes of a graph name each level by itself, so in a `whole` model they stay apart.
    """
    weighed = [layer for layer in contents.layers if layer.weights]
    for path, found in groupby(weighed, key=lambda layer: layer.native_path or layer.path):
        parts = list(found)
        cls, config = classes[parts[0].path]
        if len(parts) > 1 and not whole and all(classes[part.path][0] == cls for part in parts):
            binding = binding_for(parts, cls, convention, config)
            if not isinstance(binding, str) and binding.form.levels:
                yield path, parts
                continue
        yield from ((part.path, [part]) for part in parts)


def _tie(layer: CanonicalLayer, written: Written, local: str) -> Any:
    tensors: list[CanonicalTensor] = list(layer.weights.values())
    return tensors[0].identity if len(tensors) == 1 and len(written.tensors) == 1 else None
