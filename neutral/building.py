"""Without a template: an archive's layers as the native layers of a framework, for a new file.

Going back to the source's own framework gives its names, order and bytes again; another framework's class is chosen
for each canonical layer by the module that rebuilds that framework's models.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neutral.archive import Contents, manifest_without_digests
from neutral.canon import Written, binding_for, kind_advice, native_tensors, recognise
from neutral.canonical import CanonicalLayer, CanonicalTensor
from neutral.conventions.forms import Convention, same_family
from neutral.conventions.keras_config import is_keras2
from neutral.doubts import flatten_remark, undecided_problem
from neutral.errors import Problem, Refused, an, raise_all
from neutral.frameworks import Format, Framework
from neutral.journey import Journey
from neutral.native import NativeLayer, NativeModel, NativeTensor
from neutral.origin import native_again, origin_of
from neutral.outputs import keras3_config
from neutral.schema.manifest import Manifest


def build_model(
    contents: Contents, framework: Framework, form: Format, target: Path, journey: Journey
) -> tuple[NativeModel, Manifest]:
    """Native layers of the target framework for a new file, and the manifest that its writer may look at."""
    convention = framework.convention()
    origin = origin_of(contents).convention()
    if _of_keras2(contents) and framework.name == "keras" and form.whole:
        contents = _for_current_keras(contents, framework, journey)
    manifest = manifest_without_digests(contents)
    if form.whole:
        journey.problems += _wiring_problem(contents, form, manifest, target)
        journey.problems += _empty_layers(contents, target)
    if same_family(origin, convention) and not _rebuilt(contents, form) and not _classes_missing(contents, framework):
        native = native_again(contents, framework)
    elif framework.name == "numpy":
        native = _numpy_model(contents, framework, origin, journey)
    else:
        native = _foreign_model(contents, framework, convention, origin, manifest, form, journey)
    raise_all(Refused, journey.problems)
    if (
        framework.name in ("keras", "tensorflow")
        and native.graph is None
        and not keras3_config(contents)
        and not same_family(origin, convention)
    ):
        journey.notes.append("no graph: weights in the order of the layers, for a model of the same layers to load")
    return native, manifest


def _of_keras2(contents: Contents) -> bool:
    """True for a `.keras` of Keras 2, whose config current Keras seldom loads."""
    settings = contents.source.settings
    return keras3_config(contents) and is_keras2(settings["config"], settings.get("keras_version"))


def _for_current_keras(contents: Contents, framework: Framework, journey: Journey) -> Contents:
    """A model of Keras 2 with its graph, if current Keras can be given a model of that; else without."""
    manifest = manifest_without_digests(contents)
    assert framework.target is not None
    try:
        if contents.graph is None:
            raise Refused(Problem("graph", manifest.no_graph(), "one"))
        importlib.import_module(framework.target).model_config(manifest)
    except Refused as error:
        why = "; ".join(f"{problem.where}: {problem.found}" for problem in error.problems)
        journey.warnings.append(f"written as a file of Keras 2, like its source, for Keras 2 alone to load ({why})")
        return replace(contents, graph=None, notes=(*contents.notes, f"no graph: {why}"))
    journey.notes.append("a file of Keras 2: built anew for current Keras (--into keeps the file as it is)")
    return contents


def _described_by_itself(contents: Contents, form: Format) -> bool:
    """True if the source's own description of its model can be written again."""
    if form.name == contents.source.format == "h5":
        return True
    return keras3_config(contents) and form.name in ("keras", "h5")


def _wiring_problem(contents: Contents, form: Format, manifest: Manifest, target: Path) -> list[Problem]:
    """A whole model needs a graph, or the config that the source's own framework gave it."""
    if contents.graph is not None or _described_by_itself(contents, form):
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


def _rebuilt(contents: Contents, form: Format) -> bool:
    """True if a file is built from the graph although source and target store layers alike."""
    if form.name == "pt2":
        return True
    if not form.whole or contents.graph is None:
        return False
    return _of_keras2(contents) or not _described_by_itself(contents, form)


def _classes_missing(contents: Contents, framework: Framework) -> bool:
    """True for layers of a checkpoint without classes, on their way into a Keras file, which has them."""
    if framework.name != "keras" or contents.source.framework == "keras":
        return False
    return any(layer.native is None and layer.weights for layer in contents.layers)


def _numpy_model(contents: Contents, framework: Framework, origin: Convention, journey: Journey) -> NativeModel:
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
    return NativeModel(framework.name, "npz", tuple(layers))


def _unknown_problem(layer: CanonicalLayer, framework: Framework, origin: Convention) -> Problem:
    kinds = f"candidates: {', '.join(layer.candidates)}" if layer.candidates else f"tensors {', '.join(layer.weights)}"
    return Problem(
        layer.path,
        f"a layer of unknown kind ({kinds})",
        f"its kind, to write it for {framework.name}",
        kind_advice(layer, origin)
        + (", or use --into TEMPLATE" if layer.candidates and framework.name != "numpy" else ""),
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
    assert framework.target is not None
    for layer in contents.layers:
        if layer.kind == "unknown" and layer.weights:
            journey.problems.append(_unknown_problem(layer, framework, origin))
        elif layer.undecided and origin.flatten != convention.flatten and not whole:
            journey.problems.append(undecided_problem(layer))
    raise_all(Refused, journey.problems)
    classes: Mapping[str, tuple[str, Mapping[str, Any]]] = importlib.import_module(framework.target).layer_classes(
        manifest
    )
    layers = []
    for layer in contents.layers:
        if not layer.weights:
            continue
        cls, config = classes[layer.path]
        binding = binding_for([layer], cls, convention, config)
        if isinstance(binding, str):
            journey.problems.append(
                Problem(
                    layer.path,
                    f"{an(layer.kind)} ({binding})",
                    f"one that {framework.name} can hold as {cls}",
                    "use a template, or another framework",
                )
            )
            continue
        journey.warnings += [] if whole else flatten_remark(contents, layer, origin, convention)
        written = native_tensors(binding, [layer], convention, where=layer.path)
        journey.take(written)
        separator = "/" if framework.name in ("tensorflow", "keras") else "."
        prefix = layer.path.replace(".", "/") if separator == "/" else layer.path
        tensors = {
            local: NativeTensor(f"{prefix}{separator}{local}" if prefix else local, tensor, _tie(layer, written, local))
            for local, tensor in written.tensors.items()
        }
        if (
            "running_mean" in tensors
            and framework.name in ("torch", "safetensors")
            and layer.kind in ("batch_norm", "instance_norm")
        ):
            tensors["num_batches_tracked"] = _zero_count(f"{prefix}.num_batches_tracked")
        layers.append(NativeLayer(layer.path, cls, tensors, config, "graph"))
    return NativeModel(framework.name, framework.suffixes[0], tuple(layers), contents.graph, {}, contents.ordered)


def _zero_count(name: str) -> NativeTensor:
    import numpy as np

    from neutral.native import from_array

    return NativeTensor(name, from_array(np.zeros((), np.int64)), None, True)


def _tie(layer: CanonicalLayer, written: Written, local: str) -> Any:
    tensors: list[CanonicalTensor] = list(layer.weights.values())
    return tensors[0].identity if len(tensors) == 1 and len(written.tensors) == 1 else None
