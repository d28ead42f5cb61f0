"""An archive's layers as the native layers that they came from: their framework's names, order and forms again."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from neutral.archive import Contents
from neutral.canon import native_tensors, source_binding
from neutral.canonical import CanonicalLayer
from neutral.conventions.forms import Form
from neutral.errors import Problem, Refused, Unsupported, an, raise_all
from neutral.framework import Framework
from neutral.frameworks import FRAMEWORKS
from neutral.native import NativeLayer, NativeModel, NativeTensor


def _told_form(contents: Contents, path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """What `forms` said of a layer; nothing if it makes no sense."""
    forms = contents.source.settings.get("forms")
    told = forms.get(path) if isinstance(forms, dict) else None
    config, sizes = (told.get(name) for name in ("config", "sizes")) if isinstance(told, dict) else (None, None)
    if not isinstance(config, dict) or not isinstance(sizes, dict):
        return {}, {}
    return config, {axis: n for axis, n in sizes.items() if type(n) is int and n >= 0}


def stored_form(contents: Contents, layer: CanonicalLayer) -> Form | None:
    """The form that a layer had in its own framework, if it was a native layer by itself."""
    config, sizes = _told_form(contents, layer.native_path or layer.path)
    binding = source_binding([layer], origin_of(contents).convention(), config, sizes)
    return binding.form if binding is not None else None


def _metadata(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: base64.b64decode(v["base64"]) if isinstance(v, dict) and v.keys() == {"base64"} else v
        for k, v in settings.items()
    }


def origin_of(contents: Contents) -> Framework:
    """The framework that an archive says it is from."""
    name = contents.source.framework
    if name not in FRAMEWORKS:
        raise Unsupported(
            Problem("source", f"the framework {name!r}", f"one of {', '.join(FRAMEWORKS)}", "export the source again")
        )
    return FRAMEWORKS[name]


def _groups(contents: Contents) -> dict[str, list[CanonicalLayer]]:
    """Canonical layers by the native layer that they came from."""
    groups: dict[str, list[CanonicalLayer]] = {}
    for layer in contents.layers:
        groups.setdefault(layer.native_path or layer.path, []).append(layer)
    return groups


def native_again(contents: Contents, framework: Framework) -> NativeModel:
    """The source's own native layers again: its names, its order."""
    convention = framework.convention()
    layers = []
    problems: list[Problem] = []
    order = {name: i for i, name in enumerate(contents.source.order)}
    for path, parts in _groups(contents).items():
        tensors: dict[str, NativeTensor] = {}
        config, sizes = _told_form(contents, path)
        if any(part.kind != "unknown" for part in parts):
            binding = source_binding(parts, convention, config, sizes)
            if binding is None:
                problems.append(
                    Problem(
                        path,
                        f"{an(parts[0].kind)} whose form is not known any more",
                        f"a form of {convention.framework}",
                        "export the source again",
                    )
                )
                continue
            written = native_tensors(binding, parts, convention, where=path)
            problems += written.problems
            names = {local: full for part in parts for t in part.weights.values() for local, full in t.native.items()}
            identities = {
                local: t.identity
                for part in parts
                for t in part.weights.values()
                if len(t.native) == 1
                for local in t.native
            }
            for local, data in written.tensors.items():
                tensors[local] = NativeTensor(names[local], data, identities.get(local))
        for part in parts:
            for role, tensor in part.tensors.items():
                if tensor.state or part.kind == "unknown":
                    tensors[role] = NativeTensor(
                        tensor.native.get(role, f"{path}.{role}"), tensor.data, tensor.identity, tensor.state
                    )
        tensors = dict(sorted(tensors.items(), key=lambda pair: order.get(pair[1].name, len(order))))
        config = {**config, **_native_config(parts)}
        layers.append(NativeLayer(path, parts[0].native, tensors, config, parts[0].evidence))
    raise_all(Refused, problems)
    layers.sort(
        key=lambda layer: min((order.get(t.name, len(order)) for t in layer.tensors.values()), default=len(order))
    )
    return NativeModel(
        framework.name,
        contents.source.format,
        tuple(layers),
        contents.graph,
        {},
        contents.ordered,
        contents.collections,
        _metadata(contents.source.settings),
    )


def _native_config(parts: Sequence[CanonicalLayer]) -> dict[str, Any]:
    directed = any("direction" in t.axes for part in parts for t in part.weights.values())
    return {"bidirectional": True} if directed else {}
