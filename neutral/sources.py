"""Reads anything that neutral can read into the contents of an archive: a file, an archive, a live model."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neutral import frameworks
from neutral.archive import Archive, Contents, open_archive
from neutral.canon import Known, deciding, read_layers
from neutral.canonical import CanonicalLayer
from neutral.containers.files import leads_outside
from neutral.conventions.forms import Convention
from neutral.conventions.hints import kind_hint
from neutral.errors import BadFile, Problem, Refused, WrongUsage, an, raise_all
from neutral.exporters.wiring import in_no_known_order
from neutral.framework import Framework
from neutral.frameworks import ARCHIVE, FRAMEWORKS
from neutral.native import NativeModel
from neutral.origin import native_again, origin_of
from neutral.schema.kinds import KINDS
from neutral.schema.manifest import Source

Model = str | os.PathLike[str] | object


def check_kinds(kinds: Mapping[str, str] | None) -> None:
    wrong = {
        pattern: kind for pattern, kind in (kinds or {}).items() if kind_hint(kind)[0] not in KINDS or kind == "unknown"
    }
    if wrong:
        known = ", ".join(sorted(kind for kind in KINDS if kind != "unknown"))
        told = (
            Problem(f"kind of {at}", f"{kind!r}", f"one of {known}", "correct the kind") for at, kind in wrong.items()
        )
        raise_all(WrongUsage, told)


_CHANNELS = re.compile(r"none|(?!$)(?P<in>[1-9]\d{0,17})?(:(?P<out>[1-9]\d{0,17}))?", re.ASCII)


def flatten_channels(flatten: Mapping[str, str] | None) -> dict[str, dict[str, int]] | None:
    """{"fc": "16:8"} as {"fc": {"in": 16, "out": 8}}."""
    if flatten is None:
        return None
    out: dict[str, dict[str, int]] = {}
    for layer, text in flatten.items():
        found = _CHANNELS.fullmatch(str(text))
        if found is None:
            ways = "numbers of channels, as in fc1=16, fc1=:8 or fc1=16:8, or fc1=none"
            raise WrongUsage(Problem(f"--flatten {layer}", f"{text!r}", ways, "correct it"))
        out[layer] = {axis: int(n) for axis, n in found.groupdict().items() if n}
    return out


Read = tuple[Contents, Callable[[], None], Path | None]


def read_source(
    source: Model,
    format: str | None,
    key: str | None,
    kinds: Mapping[str, str] | None,
    flatten: Mapping[str, Mapping[str, int]] | None,
    *,
    check: bool = True,
) -> Read:
    """Any source in canonical form, how to close it, and its path if it has one.

    The digests of an archive are verified (`check`) wherever its weights go on: what is written has digests of its own.
    """
    if isinstance(source, Archive):
        _refuse_key("archive", key)
        if check and source.path is not None:
            source.check()
        return _hinted(source.contents, kinds, flatten), lambda: None, source.path
    if not isinstance(source, str | os.PathLike):
        _refuse_key("source", key)
        name, native = read_live(source, format)
        return canonical_contents(native, FRAMEWORKS[name], key, kinds, flatten), native.close, None
    where = Path(source)
    name, _ = frameworks.by_format(format) if format is not None else frameworks.detect(where)
    if name == ARCHIVE:
        _refuse_key(str(where), key)
        archive = open_archive(where)
        try:
            if check:
                archive.check()
            return _hinted(archive.contents, kinds, flatten), archive.close, where
        except BaseException:
            archive.close()
            raise
    native = FRAMEWORKS[name].reader().read(where, key=key)
    try:
        return canonical_contents(native, FRAMEWORKS[name], key, kinds, flatten), native.close, where
    except BaseException:
        native.close()
        raise


def _refuse_key(where: str, key: str | None) -> None:
    """An archive and a live model hold one set of weights: there is none to choose."""
    if key is not None:
        raise WrongUsage(
            Problem(where, f"the key {key!r}", "no key, for it holds one set of weights", "leave --key out")
        )


def _live_framework(model: object, format: str | None) -> str:
    """The framework of a live object: the one that its classes name, or for a dict of arrays the one that the user names."""
    if isinstance(model, Mapping) and format:
        return frameworks.by_format(format)[0]
    for some in FRAMEWORKS.in_turn():
        for known in some.values():
            if known.live(model):
                return known.name
    raise WrongUsage(
        Problem(
            "source",
            an(type(model).__name__),
            "a path, a torch.nn.Module, a keras.Model or a dict of arrays",
            "save it to a file first",
        )
    )


def read_live(model: object, format: str | None) -> tuple[str, NativeModel]:
    name = _live_framework(model, format)
    native: NativeModel = FRAMEWORKS[name].reader().read_live(model)
    return name, native


def canonical_contents(
    native: NativeModel,
    framework: Framework,
    key: str | None,
    kinds: Mapping[str, str] | None,
    flatten: Mapping[str, Mapping[str, int]] | None,
) -> Contents:
    # What a canonical file of ours says of its Flattens may be what was once taken for granted, not known.
    certain = not framework.canonical
    pairs = read_layers(native, framework.convention(), kinds=kinds, flatten=flatten, certain=certain)
    layers = tuple(layer for _, found in pairs for layer in found if layer.tensors)
    if not any(layer.weights for layer in layers):
        raise BadFile(
            Problem(
                native.framework,
                "no weights",
                "a model with at least one tensor",
                "name another file, or another --key",
            )
        )
    _check_paths(layers)
    source = Source(
        framework=framework.name,
        format=native.format,
        key=key,
        order=tuple(tensor.name for tensor in native.tensors()),
        settings={
            **_plain(native.metadata),
            **forms([known for known, _ in pairs], framework.convention()),
            **_told_flatten(flatten),
        },
    )
    return Contents(layers, source, native.graph, native.ordered, native.collections, (), native.notes)


_KEPT = (
    "config",
    "keras_version",
    "object_graph",
    "prefix",
    "metadata",
    "order",
    "copies",
    "strings",
    "provenance",
    "turned",
    "remarks",
)
"""What of a reader's metadata the archive keeps, for the writer of the same format, or for what is to be said of it."""


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The reader's metadata as JSON; bytes as {"base64": text}."""
    kept = {name: metadata[name] for name in _KEPT if metadata.get(name) is not None}
    return {k: {"base64": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for k, v in kept.items()}


def forms(known: Sequence[Known], convention: Convention) -> dict[str, Any]:
    """What the writer of the same format must be told of the layers whose form their tensors do not tell."""
    found = {item.layer.path: told for item in known if (told := deciding(item, convention))}
    return {"forms": found} if found else {}


def _check_paths(layers: Sequence[CanonicalLayer]) -> None:
    seen: set[str] = set()
    problems = []
    for layer in layers:
        if layer.path in seen:
            problems.append(
                Problem(layer.path, "two layers of this path", "paths that differ", "rename one of them in the source")
            )
        if not layer.path.strip(".") and layer.path != "":
            problems.append(Problem(repr(layer.path), "a layer without a name", "a name", "rename it in the source"))
        names = (layer.path, *layer.tensors, *(name for t in layer.tensors.values() for name in t.native.values()))
        problems += [
            Problem(name, "a name that leads out of a folder", "a plain name", "rename it in the source")
            for name in dict.fromkeys(names)
            if leads_outside(name)
        ]
        seen.add(layer.path)
    raise_all(Refused, problems)


def _hinted(
    contents: Contents, kinds: Mapping[str, str] | None, flatten: Mapping[str, Mapping[str, int]] | None
) -> Contents:
    """An archive's contents read again with hints: its native layers are put together and recognised anew."""
    if not kinds and flatten is None:
        return contents
    framework = origin_of(contents)
    native = native_again(contents, framework)
    splits = {layer.path: dict(layer.channels) for layer in contents.layers if not layer.undecided}
    unsettled = frozenset(layer.path for layer in contents.layers if layer.undecided)
    moved = unsettled & in_no_known_order(contents.graph)
    native = replace(native, splits=splits, unsettled=unsettled - moved, orderless=moved)
    layers = tuple(
        layer
        for _, found in read_layers(
            native, framework.convention(), kinds=kinds, flatten=flatten, certain=contents.graph is not None
        )
        for layer in found
    )
    settings = {**contents.source.settings, **_told_flatten(flatten)}
    return replace(contents, layers=layers, source=contents.source.model_copy(update={"settings": settings}))


def _told_flatten(flatten: Mapping[str, Mapping[str, int]] | None) -> dict[str, Any]:
    """What the user said of the Flattens, kept beside the settings of the source."""
    return {} if flatten is None else {"flatten": {path: dict(axes) for path, axes in flatten.items()}}
