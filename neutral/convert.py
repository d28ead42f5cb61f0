"""The two journeys, export and import, top to bottom.

    archive = export_model("model.pt", "model.nwt")
    report = import_model("model.nwt", to="keras")

Export: detect, read, make canonical, write. Import: open, pair with a template or choose native forms, make native, write
beside the goal, read back and compare, move into place.
"""

from __future__ import annotations

import base64
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neutral import frameworks
from neutral.archive import (
    INDEX_SUFFIX,
    SUFFIX,
    Archive,
    Contents,
    describe,
    file_digest,
    manifest_without_digests,
    open_archive,
    write_archive,
)
from neutral.canon import (
    Known,
    Written,
    binding_for,
    compatible,
    deciding,
    native_tensors,
    read_layers,
    recognise,
    source_binding,
)
from neutral.canonical import CanonicalLayer, CanonicalTensor
from neutral.containers.files import check_output, leads_outside, refuse_same
from neutral.conventions.forms import Convention
from neutral.errors import BadFile, NeutralError, Problem, Refused, Unsupported, WrongUsage, raise_all
from neutral.frameworks import ARCHIVE, FRAMEWORKS, Framework
from neutral.match import Pair, Side, differing_settings, pair_layers
from neutral.native import NativeLayer, NativeModel, NativeTensor, Tensor, Witnessed
from neutral.schema.kinds import KINDS
from neutral.schema.manifest import Loss, Manifest, Source

if TYPE_CHECKING:
    from neutral.running import Runnable
    from neutral.verify import Verification

Progress = Callable[[int, int], None]
Model = str | os.PathLike[str] | object


@dataclass(frozen=True)
class Report:
    """What an import did: where to, which layer went where and why, what was lost, and what else to know."""

    out: Path | None
    pairs: tuple[Pair, ...] = ()
    losses: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layers: int = 0
    seconds: float = 0.0


# --- export ---


def export_model(
    source: Model,
    path: str | os.PathLike[str] | None = None,
    *,
    format: str | None = None,
    key: str | None = None,
    kinds: Mapping[str, str] | None = None,
    flatten: Mapping[str, str] | None = None,
    force: bool = False,
    created: str | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Archive:
    """Read a model into an archive, in memory or, with `path`, in a file.

        with export_model("lenet5.pt", "lenet5.nwt") as archive:
            print(archive.manifest.weights_digest)

    `source` is a file of any format that `detect` knows, an archive, a torch.nn.Module, a keras.Model, or a dict of
    arrays. `format` names what the source is where its content does not say. `key` chooses one of several sets of
    weights in a checkpoint. `kinds` maps globs on layer paths to kinds. `flatten` names every layer that crosses a
    Flatten, with its channels as text (`16` in front of it, `:8` of a Reshape behind it, `16:8` both); an empty mapping
    says that none does. `shard_bytes` splits the archive into files of about that size. Elements are read when the
    archive is written or asked for; close the archive after use.

    Raises `BadFile` for a broken or hostile source, `Refused` where something would have to be guessed.
    """
    _check_kinds(kinds)
    contents, close, where = _read(source, format, key, kinds, _channels(flatten))
    if created is not None:
        contents = replace(contents, created=created)
    try:
        if path is None:
            if (
                where is not None
                and not isinstance(source, Archive)
                and _is_archive(where)
                and not kinds
                and flatten is None
            ):
                close()
                return open_archive(where)
            return describe(contents, close, progress)
        out = Path(path)
        check_output(out, force)
        if where is not None:
            refuse_same(out, where)
        digest = (lambda: file_digest(where)) if where is not None and contents.source.sha256 is None else None
        written = write_archive(
            contents, out, force=force, progress=progress, source_digest=digest, shard_bytes=shard_bytes
        )
    except BaseException:
        close()
        raise
    close()
    return open_archive(written)


def _is_archive(where: Path) -> bool:
    return frameworks.detect(where)[0] == ARCHIVE


def _check_kinds(kinds: Mapping[str, str] | None) -> None:
    known = sorted(kind for kind in KINDS if kind != "unknown")
    raise_all(
        WrongUsage,
        (Problem(f"kind of {pattern}", f"{kind!r}", f"one of {', '.join(known)}", "correct the kind") for pattern, kind in (kinds or {}).items() if kind not in known),
    )  # fmt: skip


def _channels(flatten: Mapping[str, str] | None) -> dict[str, dict[str, int]] | None:
    """{"fc": "16:8"} as {"fc": {"in": 16, "out": 8}}."""
    if flatten is None:
        return None
    out: dict[str, dict[str, int]] = {}
    for layer, text in flatten.items():
        before, _, behind = str(text).partition(":")
        if str(text) == "none":
            before = behind = ""
        elif not (before + behind).isdecimal():
            raise WrongUsage(
                Problem(f"flatten of {layer}", f"{text!r}", "numbers of channels: 16, :8, 16:8 or none", "correct it")
            )
        out[layer] = {axis: int(n) for axis, n in (("in", before), ("out", behind)) if n}
    return out


Read = tuple[Contents, Callable[[], None], Path | None]


def _read(
    source: Model,
    format: str | None,
    key: str | None,
    kinds: Mapping[str, str] | None,
    flatten: Mapping[str, Mapping[str, int]] | None,
) -> Read:
    """Any source in canonical form, how to close it, and its path if it has one."""
    if isinstance(source, Archive):
        return _hinted(source.contents, kinds, flatten), lambda: None, source.path
    if not isinstance(source, str | os.PathLike):
        name, native = _read_live(source, format)
        return _canonical(native, FRAMEWORKS[name], key, kinds, flatten), native.close, None
    where = Path(source)
    name, _ = frameworks.by_format(format) if format is not None else frameworks.detect(where)
    if name == ARCHIVE:
        archive = open_archive(where)
        try:
            return _hinted(archive.contents, kinds, flatten), archive.close, where
        except BaseException:
            archive.close()
            raise
    native = FRAMEWORKS[name].reader().read(where, key=key)
    try:
        return _canonical(native, FRAMEWORKS[name], key, kinds, flatten), native.close, where
    except BaseException:
        native.close()
        raise


_LIVE = (
    ("torch", "torch.nn.modules.module", "Module"),
    ("keras", "keras", "Model"),
    ("tensorflow", "tensorflow", "Module"),
)


def _live_framework(model: object, format: str | None) -> str:
    """The framework of a live object, told by the modules of its classes: nothing is imported for it."""
    if isinstance(model, Mapping):
        return frameworks.by_format(format)[0] if format else "numpy"
    for cls in type(model).__mro__:
        root = cls.__module__.partition(".")[0]
        if root == "torch" and cls.__name__ == "Module":
            return "torch"
        if root in ("keras", "tf_keras") and cls.__name__ == "Layer":
            return "keras"
        if root == "tensorflow" and cls.__name__ in ("Module", "AutoTrackable"):
            return "tensorflow"
    raise WrongUsage(
        Problem(
            "source",
            f"a {type(model).__name__}",
            "a path, a torch.nn.Module, a keras.Model or a dict of arrays",
            "save it to a file first",
        )
    )


def _read_live(model: object, format: str | None) -> tuple[str, NativeModel]:
    name = _live_framework(model, format)
    native: NativeModel = FRAMEWORKS[name].reader().read_live(model)
    return name, native


def _canonical(
    native: NativeModel,
    framework: Framework,
    key: str | None,
    kinds: Mapping[str, str] | None,
    flatten: Mapping[str, Mapping[str, int]] | None,
) -> Contents:
    pairs = read_layers(native, framework.convention(), kinds=kinds, flatten=flatten)
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
        settings={**_plain(native.metadata), **_forms([known for known, _ in pairs], framework.convention())},
    )
    return Contents(layers, source, native.graph, native.ordered, native.collections, (), native.notes)


_KEPT = ("config", "keras_version", "object_graph", "prefix", "metadata", "order", "copies", "strings")
"""What of a reader's metadata the archive keeps, for the writer of the same format."""


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The reader's metadata as JSON; bytes as {"base64": text}."""
    kept = {name: metadata[name] for name in _KEPT if metadata.get(name) is not None}
    return {k: {"base64": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for k, v in kept.items()}


def _forms(known: Sequence[Known], convention: Convention) -> dict[str, Any]:
    """What the writer of the same format must be told of the layers whose form their tensors do not tell."""
    found = {item.layer.path: told for item in known if (told := deciding(item, convention))}
    return {"forms": found} if found else {}


def _told_form(contents: Contents, path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """What `_forms` said of a layer; nothing if it makes no sense."""
    forms = contents.source.settings.get("forms")
    told = forms.get(path) if isinstance(forms, dict) else None
    config, sizes = (told.get(name) for name in ("config", "sizes")) if isinstance(told, dict) else (None, None)
    if not isinstance(config, dict) or not isinstance(sizes, dict):
        return {}, {}
    return config, {axis: n for axis, n in sizes.items() if type(n) is int and n >= 0}


def _metadata(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: base64.b64decode(v["base64"]) if isinstance(v, dict) and v.keys() == {"base64"} else v
        for k, v in settings.items()
    }


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
    framework = _origin(contents)
    native = _native_model(contents, framework)
    splits = {layer.path: dict(layer.channels) for layer in contents.layers if not layer.undecided}
    native = replace(native, splits=splits)
    layers = tuple(
        layer
        for _, found in read_layers(native, framework.convention(), kinds=kinds, flatten=flatten)
        for layer in found
    )
    return replace(contents, layers=layers)


def _origin(contents: Contents) -> Framework:
    """The framework that an archive says it is from."""
    name = contents.source.framework
    if name not in FRAMEWORKS:
        raise Unsupported(
            Problem("source", f"the framework {name!r}", f"one of {', '.join(FRAMEWORKS)}", "export the source again")
        )
    return FRAMEWORKS[name]


# --- import ---


@dataclass
class _Journey:
    """What is collected on the way to one output."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def take(self, written: Written) -> None:
        self.losses += [Loss(rule=rule, layer=layer, detail=detail) for rule, layer, detail in written.losses]
        self.notes += [f"{where}: {says}" for _, where, says in written.applied]
        self.problems += written.problems


def import_model(
    archive: str | os.PathLike[str] | Archive,
    to: str | None = None,
    *,
    into: Model | None = None,
    out: str | os.PathLike[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    allow_unused: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    cast: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a framework's native file from an archive, or fill a live model.

        import_model("lenet5.nwt", to="keras")                        lenet5.keras
        import_model("lenet5.nwt", into="other.h5", out="new.h5")     a copy of other.h5 with these weights
        import_model("lenet5.nwt", into=module)                       a live torch or Keras model, in place

    With a template (`into`) layers are paired by `mapping` (source path -> template path), by name, and by structure
    where that is unique. `allow_unused` and `allow_missing` are globs on layer paths of the archive and the template.
    `cast` allows a narrower dtype. Raises `Refused` with all that does not fit; then nothing was written.
    """
    started = time.monotonic()
    if isinstance(archive, Archive):
        return _import(
            archive.contents, archive.path, to, into, out, mapping, allow_unused, allow_missing, cast, force, started
        )
    with open_archive(archive) as opened:
        opened.check(progress)
        return _import(
            opened.contents, opened.path, to, into, out, mapping, allow_unused, allow_missing, cast, force, started
        )


def convert(
    source: Model,
    out: str | os.PathLike[str],
    *,
    to: str | None = None,
    into: Model | None = None,
    format: str | None = None,
    key: str | None = None,
    kinds: Mapping[str, str] | None = None,
    flatten: Mapping[str, str] | None = None,
    mapping: Mapping[str, str] | None = None,
    allow_unused: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    cast: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Export and import without a file in the middle; an `out` that ends with `.nwt` is an export alone."""
    started = time.monotonic()
    target = Path(out)
    if target.name.endswith(SUFFIX) and to is None and into is None:
        with export_model(
            source, target, format=format, key=key, kinds=kinds, flatten=flatten, force=force, progress=progress
        ) as archive:
            return Report(
                target, notes=archive.manifest.notes, layers=len(archive.layers), seconds=time.monotonic() - started
            )
    _check_kinds(kinds)
    contents, close, where = _read(source, format, key, kinds, _channels(flatten))
    try:
        return _import(contents, where, to, into, target, mapping, allow_unused, allow_missing, cast, force, started)
    finally:
        close()


def _import(
    contents: Contents,
    where: Path | None,
    to: str | None,
    into: Model | None,
    out: str | os.PathLike[str] | None,
    mapping: Mapping[str, str] | None,
    allow_unused: Sequence[str],
    allow_missing: Sequence[str],
    cast: bool,
    force: bool,
    started: float,
) -> Report:
    journey = _Journey()
    count = sum(1 for layer in contents.layers if layer.weights)
    if into is not None and not isinstance(into, str | os.PathLike):
        if out is not None:
            raise WrongUsage(
                Problem(
                    "into", "a live model and an output", "one of them", "leave `out` away, or give a template file"
                )
            )
        _fill_live(contents, into, mapping, allow_unused, allow_missing, cast, journey)
        return _report(None, journey, count, started)
    template = None if into is None else Path(into)
    if template is None and (mapping or allow_unused or allow_missing):
        raise WrongUsage(
            Problem("import", "a map or patterns without a template", "--into TEMPLATE", "name the template")
        )
    target = Path(out) if out is not None else _default_output(contents, where, to, template)
    if template is not None:
        framework, _ = _template_framework(template)
        if (
            to is not None
            and frameworks.framework(to).convention() is not framework.convention()
            and to != framework.name
        ):
            raise WrongUsage(
                Problem(str(template), f"a {framework.name} file", f"a {to} template", "correct --to or --into")
            )
    else:
        framework = frameworks.writer_of(target, to)
    _check_target(target, framework, force)
    refuse_same(target, *(path for path in (where, template) if path is not None))
    with ExitStack() as stack:
        if template is not None:
            native = stack.enter_context(_opened(framework, template))
            _pair(contents, native, framework, mapping, allow_unused, allow_missing, cast, journey)
            expected = {name: Witnessed(tensor) for name, tensor in journey.tensors.items()}
            work = stack.enter_context(_beside(target))
            framework.writer().fill(template, expected, work / target.name)
        else:
            built, manifest = _build(contents, framework, target, journey)
            built, expected = _witnessed(built)
            work = stack.enter_context(_beside(target))
            framework.writer().build(built, manifest, work / target.name)
        if not target.name.endswith(".pt2"):
            _compare_written(framework, work / target.name, target, expected, by_name=template is not None)
        _move(work, target, force)
    return _report(target, journey, count, started)


def _witnessed(model: NativeModel) -> tuple[NativeModel, dict[str, Witnessed]]:
    """The model with tensors that remember what was written of them, and these by name."""
    found: dict[str, Witnessed] = {}
    layers = []
    for layer in model.layers:
        tensors = {}
        for local, tensor in layer.tensors.items():
            found[tensor.name] = Witnessed(tensor.data)
            tensors[local] = replace(tensor, data=found[tensor.name])
        layers.append(replace(layer, tensors=tensors))
    return replace(model, layers=tuple(layers)), found


def _report(out: Path | None, journey: _Journey, layers: int, started: float) -> Report:
    losses = tuple(dict.fromkeys(f"{loss.layer}: {loss.detail}" for loss in journey.losses))
    return Report(
        out,
        tuple(journey.pairs),
        losses,
        tuple(journey.warnings),
        tuple(dict.fromkeys(journey.notes)),
        layers,
        time.monotonic() - started,
    )


def _template_framework(template: Path) -> tuple[Framework, str]:
    name, found = frameworks.detect(template)
    if name == ARCHIVE:
        raise WrongUsage(
            Problem(str(template), "an archive as the template", "a framework's own file", "name a model to be filled")
        )
    return FRAMEWORKS[name], found


def _default_output(contents: Contents, where: Path | None, to: str | None, template: Path | None) -> Path:
    """The archive's stem with the template's suffix, or with the framework's usual one."""
    if where is None:
        raise WrongUsage(Problem("out", "no output named", "a path", "name the file to write"))
    stem = where.name.removesuffix(INDEX_SUFFIX).removesuffix(SUFFIX)
    if template is not None:
        suffix = ".weights.h5" if template.name.endswith(".weights.h5") else template.suffix
        return where.with_name(stem + suffix)
    if to is None:
        raise WrongUsage(
            Problem("import", "neither a framework nor an output", "--to FRAMEWORK or -o OUT", "name one of them")
        )
    framework = frameworks.framework(to)
    suffix = framework.suffixes[0]
    if framework.name == "keras" and not _has_graph(contents):
        suffix = ".weights.h5"
    return where.with_name(stem + suffix)


def _has_graph(contents: Contents) -> bool:
    return contents.graph is not None or (contents.source.framework == "keras" and _keras3_config(contents))


def _keras3_config(contents: Contents) -> bool:
    config = contents.source.settings.get("config")
    return isinstance(config, dict) and "module" in config


def _check_target(target: Path, framework: Framework, force: bool) -> None:
    check_output(target, force)
    if framework.name == "tensorflow":
        check_output(target.with_name(f"{target.name}.index"), force)


@contextmanager
def _opened(framework: Framework, path: Path) -> Iterator[NativeModel]:
    native: NativeModel = framework.reader().read(path)
    try:
        yield native
    finally:
        native.close()


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder beside the goal to write into, removed in the end."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name[:80]}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise Refused(Problem(str(target), f"{error.strerror}", "to write it", "nothing was left behind")) from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move(work: Path, target: Path, force: bool) -> None:
    """Everything that was written takes its name; a folder that is in the way is replaced as a whole."""
    try:
        for made in sorted(work.iterdir(), key=lambda path: (path.name == target.name, path.name.endswith(".index"))):
            goal = target.with_name(made.name)
            check_output(goal, force)
            if goal.is_dir():
                goal.replace(work / f"{made.name}.replaced")
            made.replace(goal)
    except OSError as error:
        raise Refused(
            Problem(str(target), f"{error.strerror}", "to move it into place", "nothing was left behind")
        ) from None


def _compare_written(
    framework: Framework, written: Path, target: Path, expected: Mapping[str, Witnessed], *, by_name: bool
) -> None:
    """Read the output back with the reader and compare every element with what was meant."""
    with _opened(framework, written) as native:
        found = {tensor.name: tensor.data for tensor in native.tensors()}
        if by_name:
            for tensors in native.collections.values():
                found.update({tensor.name: tensor.data for tensor in tensors})
            missing = [name for name in expected if name not in found]
            again = _crcs([found[name] for name in expected if name in found])
            there = [name for name in expected if name in found]
            wrong = [name for name, crc in zip(there, again, strict=True) if crc != expected[name].crc()]
        else:
            wanted = sorted((tensor.nbytes, tensor.crc()) for tensor in expected.values())
            got = sorted(zip((t.nbytes for t in found.values()), _crcs(list(found.values())), strict=True))
            missing, wrong = [], ([] if wanted == got else ["weights"])
    if missing or wrong:
        names = ", ".join((missing + wrong)[:5])
        raise NeutralError(
            Problem(
                str(target),
                f"{names} read back other than written",
                "what was meant to be written",
                "nothing was left behind; please report this",
            )
        )


def _crcs(tensors: Sequence[Tensor]) -> list[int]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda tensor: Witnessed(tensor).crc(), tensors))


# --- into a template ---


def _fill_live(
    contents: Contents,
    model: object,
    mapping: Mapping[str, str] | None,
    allow_unused: Sequence[str],
    allow_missing: Sequence[str],
    cast: bool,
    journey: _Journey,
) -> None:
    name, native = _read_live(model, None)
    framework = FRAMEWORKS[name]
    _pair(contents, native, framework, mapping, allow_unused, allow_missing, cast, journey)
    framework.writer().fill_live(model, journey.tensors)


def _pair(
    contents: Contents,
    template: NativeModel,
    framework: Framework,
    mapping: Mapping[str, str] | None,
    allow_unused: Sequence[str],
    allow_missing: Sequence[str],
    cast: bool,
    journey: _Journey,
) -> None:
    """Pair an archive with a template and collect, by native name, the template's tensors with the archive's weights."""
    convention = framework.convention()
    origin = _origin(contents).convention()
    known = read_layers(template, convention)
    theirs = [layer for _, layers in known for layer in layers]
    alike = _same_family(origin, convention)
    pairing = pair_layers(
        Side(contents.layers, _is_chain(contents.ordered, contents.source.settings, origin), contents.graph),
        Side(theirs, _is_chain(template.ordered, template.metadata, convention), template.graph),
        mapping=mapping,
        allow_unused=allow_unused,
        allow_missing=allow_missing,
        alike=alike,
    )
    journey.pairs.extend(pairing.pairs)
    sources = {layer.path: layer for layer in contents.layers}
    partner = {pair.target: sources[pair.source] for pair in pairing.pairs}
    told = ("config" in contents.source.settings, template.metadata.get("config") is not None)
    for item, layers in known:
        _fill_layer(item, layers, partner, convention, origin, alike, told, cast, journey)
    raise_all(Refused, journey.problems)


def _is_chain(ordered: bool, settings: Mapping[str, Any], convention: Convention) -> bool:
    """True if the order of the layers is that of computation and no two of them stand side by side.

    That is so in a Sequential. Another Keras model may branch; then its graph tells which layers follow each other.
    """
    if convention is FRAMEWORKS["torch"].convention():
        return ordered
    config = settings.get("config")
    return ordered and isinstance(config, Mapping) and _sequential(config)


def _sequential(config: Mapping[str, Any]) -> bool:
    if config.get("class_name") != "Sequential":
        return False
    inner = config.get("config")
    layers = inner.get("layers", ()) if isinstance(inner, Mapping) else inner or ()
    models = [each for each in layers if isinstance(each, Mapping) and "layers" in (each.get("config") or {})]
    return all(_sequential(each) for each in models)


def _same_family(a: Convention, b: Convention) -> bool:
    return a.forms is b.forms


def _fill_layer(
    item: Known,
    layers: Sequence[CanonicalLayer],
    partner: Mapping[str, CanonicalLayer],
    convention: Convention,
    origin: Convention,
    alike: bool,
    told: tuple[bool, bool],
    cast: bool,
    journey: _Journey,
) -> None:
    native = item.layer
    wanted = [layer for layer in layers if layer.weights]
    mine = [partner[layer.path] for layer in wanted if layer.path in partner]
    if not mine:
        return
    if len(mine) < len(wanted):
        journey.problems.append(
            Problem(
                native.path,
                f"partners for {len(mine)} of the {len(wanted)} layers it stores",
                "all or none",
                "pair the others, too",
            )
        )
        return
    binding = item.binding
    if binding is None and mine[0].kind == "unknown":
        _fill_unknown(native, mine[0], alike, journey)
        return
    try:
        if binding is None:
            binding = recognise(native, convention, mine[0].kind).binding
        assert binding is not None
        kinds = [bound.part.kind for bound in binding.parts]
        mine = [
            _as_known(layer, kind, origin) if layer.kind == "unknown" else layer
            for layer, kind in zip(mine, kinds, strict=True)
        ]
        ready = []
        for layer, goal in zip(mine, layers, strict=True):
            problems, remarks = differing_settings(layer, goal, alike)
            journey.problems += problems
            journey.warnings += remarks
            ready.append(_reconciled(layer, goal, origin, convention, told))
            if ready[-1].channels and (layer.undecided or goal.undecided) and origin.flatten != convention.flatten:
                whose, which = ("source", origin) if layer.undecided else ("template", convention)
                journey.warnings.append(
                    f"{layer.path}: the {whose} does not say how it flattens; taken to be as {which.framework} does by itself, ({which.flatten})"
                )
    except NeutralError as error:
        journey.problems += [
            replace(p, where=p.where if p.where.startswith(native.path) else f"{native.path}: {p.where}")
            for p in error.problems
        ]
        return
    written = native_tensors(binding, ready, convention, where=native.path, want=native.tensors, cast=cast)
    journey.take(written)
    for local, tensor in written.tensors.items():
        journey.tensors[native.tensors[local].name] = tensor
    _fill_state(native, mine, journey)


def _fill_state(native: NativeLayer, layers: Sequence[CanonicalLayer], journey: _Journey) -> None:
    """State of the same name, shape and dtype goes along; other state stays as the template has it."""
    for layer in layers:
        for role, tensor in layer.tensors.items():
            goal = native.tensors.get(role)
            if (
                tensor.state
                and goal is not None
                and goal.state
                and (goal.data.shape, goal.data.dtype) == (tensor.data.shape, tensor.data.dtype)
            ):
                journey.tensors[goal.name] = tensor.data


def _fill_unknown(native: NativeLayer, layer: CanonicalLayer, alike: bool, journey: _Journey) -> None:
    """A layer that neither side knows: the same tensors under the same names, if both frameworks store layers alike."""
    if not alike:
        journey.problems.append(
            Problem(
                layer.path,
                "a layer of unknown kind on both sides",
                "its kind, to bring it to another framework",
                f"export again with --kind '{layer.path}=KIND'",
            )
        )
        return
    for role, tensor in layer.weights.items():
        goal = native.tensors.get(role)
        if goal is None or goal.data.shape != tensor.data.shape or goal.data.dtype != tensor.data.dtype:
            found = "nothing" if goal is None else f"{goal.data.dtype} {goal.data.shape}"
            journey.problems.append(
                Problem(
                    f"{native.path}.{role}",
                    found,
                    f"{tensor.data.dtype} {tensor.data.shape}",
                    "use a template with the same layer",
                )
            )
        else:
            journey.tensors[goal.name] = tensor.data


def _as_known(layer: CanonicalLayer, kind: str, origin: Convention) -> CanonicalLayer:
    """A layer of unknown kind, read as what its partner is."""
    if not any(compatible(kind, candidate) for candidate in layer.candidates):
        raise Refused(
            Problem(
                layer.path,
                f"tensors of a {' or '.join(layer.candidates) or 'custom layer'}",
                f"those of a {kind}",
                "pair it with another layer",
            )
        )
    native = _raw_native(layer)
    model = NativeModel(origin.framework, "", (native,), splits={native.path: layer.channels})
    found = [c for _, layers in read_layers(model, origin, kinds={_escaped(native.path): kind}) for c in layers]
    if len(found) > 1:
        raise Refused(
            Problem(
                layer.path,
                f"{len(found)} layers in one",
                f"one {kind}",
                f"export again with --kind '{layer.path}={kind}'",
            )
        )
    axes = {axis for tensor in found[0].weights.values() for axis in tensor.axes}
    return replace(found[0], undecided=tuple(a for a in layer.undecided if a in axes))


def _escaped(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _raw_native(layer: CanonicalLayer) -> NativeLayer:
    """A layer of unknown kind as the native layer that it came from."""
    tensors = {
        role: NativeTensor(next(iter(tensor.native.values()), role), tensor.data, tensor.identity, tensor.state)
        for role, tensor in layer.tensors.items()
    }
    return NativeLayer(layer.path, layer.native, tensors, {}, layer.evidence)


def _reconciled(
    layer: CanonicalLayer, goal: CanonicalLayer, origin: Convention, convention: Convention, told: tuple[bool, bool]
) -> CanonicalLayer:
    """The layer with its Flatten axes as the template has them, or `Refused` where neither side knows them.

    A side without a config is taken to flatten as its framework does by itself; one whose config (`told`, of source
    and template) leaves the layer open flattens in a way of its own.
    """
    if origin.flatten != convention.flatten and ((layer.undecided and told[0]) or (goal.undecided and told[1])):
        raise Refused(undecided_problem(layer if layer.undecided else goal))
    if not goal.undecided:
        return (
            _decided(layer, dict(goal.channels), origin) if layer.undecided else replace(layer, channels=goal.channels)
        )
    if layer.undecided and origin.flatten != convention.flatten:
        raise Refused(undecided_problem(layer))
    return layer


def _decided(layer: CanonicalLayer, channels: dict[str, int], origin: Convention) -> CanonicalLayer:
    """A layer in its source's order, now that the channels of its Flatten axes are known."""
    if origin.flatten != "channel position":
        layer = _read_again(layer, channels)
    return replace(layer, channels=channels, undecided=())


def _read_again(layer: CanonicalLayer, channels: Mapping[str, int]) -> CanonicalLayer:
    """The axes that cross a Flatten from (position channel) to (channel position)."""
    if layer.kind == "unknown":
        raise Refused(undecided_problem(layer))
    tensors = dict(layer.tensors)
    for role, tensor in layer.weights.items():
        data = tensor.data
        for i, axis in enumerate(tensor.axes):
            if axis in channels:
                order = [*range(i), i + 1, i, *range(i + 2, len(data.shape) + 1)]
                split = data.split(i, (data.shape[i] // channels[axis], channels[axis]))
                data = split.permute(order).merge(i, 2)
        tensors[role] = replace(tensor, data=data)
    return replace(layer, tensors=tensors)


def undecided_problem(layer: CanonicalLayer) -> Problem:
    """What to say of a layer that may follow a Flatten."""
    sizes = ", ".join(
        f"{axis} of {tensor.data.shape[tensor.axes.index(axis)]}"
        for axis in layer.undecided
        for tensor in (next((t for t in layer.weights.values() if axis in t.axes), None),)
        if tensor is not None
    )
    return Problem(
        layer.path,
        f"{sizes or 'an axis'} that may cross a Flatten (or Reshape)",
        "to know its channels, for frameworks flatten in different orders",
        f"export again with --flatten {layer.path}=CHANNELS for each layer behind a Flatten, or --flatten none",
    )


# --- without a template ---


def _build(contents: Contents, framework: Framework, target: Path, journey: _Journey) -> tuple[NativeModel, Manifest]:
    """Native layers of the target framework for a new file, and the manifest that its writer may look at."""
    convention = framework.convention()
    origin = _origin(contents).convention()
    manifest = _manifest_of(contents)
    if (
        _same_family(origin, convention)
        and not _rebuilt(contents, target)
        and not _classes_missing(contents, framework)
    ):
        native = _native_model(contents, framework)
    elif framework.name == "numpy":
        native = _numpy_model(contents, framework, origin, journey)
    else:
        native = _foreign_model(contents, framework, convention, origin, manifest, target, journey)
    raise_all(Refused, journey.problems)
    if (
        framework.name in ("keras", "tensorflow")
        and native.graph is None
        and not _keras3_config(contents)
        and not _same_family(origin, convention)
    ):
        journey.notes.append("no graph: weights in the order of the layers, for a model of the same layers to load")
    return native, manifest


_WHOLE = (".pt2", ".keras", ".h5", ".hdf5", ".savedmodel")
"""Suffixes of files that hold a model and not only its weights."""


def _rebuilt(contents: Contents, target: Path) -> bool:
    """True if a file is built from the graph although source and target store layers alike."""
    if target.name.endswith(".pt2"):
        return True
    whole = target.name.endswith(_WHOLE) and not target.name.endswith(".weights.h5")
    again = target.name.endswith((".h5", ".hdf5")) and contents.source.format == "h5"
    return whole and not again and not _keras3_config(contents) and contents.graph is not None


def _classes_missing(contents: Contents, framework: Framework) -> bool:
    """True for layers of a checkpoint without classes, on their way into a Keras file, which has them."""
    if framework.name != "keras" or contents.source.framework == "keras":
        return False
    return any(layer.native is None and layer.weights for layer in contents.layers)


def _manifest_of(contents: Contents) -> Manifest:
    """The manifest without digests: writers look at kinds, attributes, shapes and the graph alone."""
    return manifest_without_digests(contents)


def _groups(contents: Contents) -> dict[str, list[CanonicalLayer]]:
    """Canonical layers by the native layer that they came from."""
    groups: dict[str, list[CanonicalLayer]] = {}
    for layer in contents.layers:
        groups.setdefault(layer.native_path or layer.path, []).append(layer)
    return groups


def _native_model(contents: Contents, framework: Framework) -> NativeModel:
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
                        f"a {parts[0].kind} whose form is not known any more",
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


def _numpy_model(contents: Contents, framework: Framework, origin: Convention, journey: _Journey) -> NativeModel:
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
                journey.problems.append(_unknown_problem(layer, framework))
        elif layer.undecided and origin.flatten != convention.flatten:
            journey.problems.append(undecided_problem(layer))
        layers.append(NativeLayer(layer.path, layer.kind, tensors, layer.attributes, "class"))
    return NativeModel(framework.name, "npz", tuple(layers))


def _unknown_problem(layer: CanonicalLayer, framework: Framework) -> Problem:
    kinds = f"candidates: {', '.join(layer.candidates)}" if layer.candidates else "no kind that neutral knows fits"
    return Problem(
        layer.path,
        f"a layer of unknown kind ({kinds})",
        f"its kind, to write it for {framework.name}",
        f"export again with --kind '{layer.path}=KIND'"
        + ("" if framework.name == "numpy" else ", or use --into TEMPLATE"),
    )


def _foreign_model(
    contents: Contents,
    framework: Framework,
    convention: Convention,
    origin: Convention,
    manifest: Manifest,
    target: Path,
    journey: _Journey,
) -> NativeModel:
    """Each canonical layer as a native layer of another framework.

    A model that is built whole from its graph needs no decision on a Flatten: the graph says what becomes of it.
    """
    whole = contents.graph is not None and target.name.endswith(_WHOLE) and not target.name.endswith(".weights.h5")

    assert framework.target is not None
    for layer in contents.layers:
        if layer.kind == "unknown" and layer.weights:
            journey.problems.append(_unknown_problem(layer, framework))
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
                    f"a {layer.kind} ({binding})",
                    f"one that {framework.name} can hold as {cls}",
                    "use a template, or another framework",
                )
            )
            continue
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


# --- comparing ---


@dataclass(frozen=True)
class Difference:
    """How two models differ in canonical form: one line per layer or parameter; none if they are the same."""

    same: bool
    lines: tuple[str, ...]


def digest(
    source: Model,
    *,
    key: str | None = None,
    kinds: Mapping[str, str] | None = None,
    flatten: Mapping[str, str] | None = None,
) -> str:
    """The weights digest of anything that can be read: equal for equal weights, whatever the framework."""
    with export_model(source, key=key, kinds=kinds, flatten=flatten) as archive:
        return archive.manifest.weights_digest


def diff(a: Model, b: Model, *, key: str | None = None) -> Difference:
    """Compare the weights of two models in canonical form, names left out where digests pair the layers."""
    from neutral.verify import differing

    with export_model(a, key=key) as left, export_model(b, key=key) as right:
        lines = differing(left, right)
    return Difference(not lines, tuple(lines))


# --- running ---


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    input_shape: Sequence[int] | None = None,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> Verification:
    """Run two models on the same random input and compare what comes out; see `neutral.verify.compare`.

        verify("lenet5.pt", "lenet5.keras").same

    A file of a model is run by its own framework. An archive, and a file that its framework cannot run, is rebuilt from
    its graph, in the source's framework where that is installed. `input_shape` has the batch and channels first.

    Raises `Refused` for weights without a model, for a file that would run code of its own, and where a framework fails.
    """
    from neutral.verify import compare

    with ExitStack() as stack:
        left, right = (_runnable(Path(path), stack) for path in (a, b))
        return compare(left, right, input_shape=input_shape, seed=seed, tolerance=tolerance)


_RUN_BY = {
    ("torch", "pt"): "torch_module",
    ("torch", "pt-legacy"): "torch_module",
    ("keras", "keras"): "keras_model",
    ("keras", "h5"): "keras_model",
    ("tensorflow", "savedmodel"): "saved_model",
}
_REBUILT_AS = {"torch": "model.pt2", "keras": "model.keras"}


def _runnable(path: Path, stack: ExitStack) -> Runnable:
    from neutral import running

    if running.is_program(path):
        return running.torch_program(path)
    found = frameworks.detect(path)
    with export_model(path) as archive:
        reasons: list[Problem] = []
        if found in _RUN_BY and path.is_dir() == (found[1] == "savedmodel"):
            run: Callable[[Path, Manifest], Runnable] = getattr(running, _RUN_BY[found])
            try:
                return run(path, archive.manifest)
            except (Refused, Unsupported) as error:
                reasons += error.problems
        if archive.manifest.graph is None:
            what = f"{found[0]} weights without a graph"
            raise Refused(*reasons or [Problem(str(path), what, "a model that can be run", f"pass {running.RUNS}")])
        why = f" ({reasons[0].found})" if reasons else ""
        return _from_graph(archive, f"{path}, rebuilt from its graph{why}", stack)


def _from_graph(archive: Archive, where: str, stack: ExitStack) -> Runnable:
    """The graph of a model as a file of the source's framework, or of another that is installed."""
    from neutral import running

    work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neutral-")))
    own = "torch" if archive.manifest.source.framework in ("torch", "safetensors", "numpy") else "keras"
    problems: list[Problem] = []
    for framework in sorted(_REBUILT_AS, key=lambda name: name != own):
        if not running.installed(framework):
            problems.append(Problem(where, f"{framework} missing", "it, to run the model"))
            continue
        file = work / _REBUILT_AS[framework]
        try:
            import_model(archive, to=framework, out=file)
            if framework == "torch":
                built = running.torch_program(file, archive.manifest)
            else:
                with export_model(file) as again:
                    built = running.keras_model(file, again.manifest)
        except (Refused, Unsupported) as error:
            problems += error.problems
            continue
        return replace(built, where=f"{where}, {built.where.rpartition(', ')[2]}")
    raise Refused(*problems)
