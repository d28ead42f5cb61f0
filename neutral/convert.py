"""The two journeys, export and import, top to bottom.

    archive = export_model("model.pt", "model.nwt")
    report = import_model("model.nwt", to="keras")

Export: detect, read, make canonical, write. Import: open, pair with a template or choose native forms, make native, write
beside the goal, read back and compare, move into place.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from neutral import frameworks
from neutral.archive import (
    INDEX_SUFFIX,
    SUFFIX,
    Archive,
    Contents,
    Progress,
    describe,
    file_digest,
    open_archive,
    write_archive,
)
from neutral.building import build_model
from neutral.containers.files import check_output, refuse_same
from neutral.conventions.forms import same_family
from neutral.doubts import agreed
from neutral.errors import BadFile, Problem, Refused, Unsupported, WrongUsage, named, reworded
from neutral.filling import fill_template, is_chain
from neutral.framework import named_object
from neutral.frameworks import ARCHIVE, FRAMEWORKS
from neutral.journey import Asked, Journey
from neutral.match import Pair, Side, named_pairs, pair_layers
from neutral.native import Witnessed
from neutral.origin import origin_of
from neutral.outputs import (
    check_suffix,
    check_target,
    compare_written,
    default_output,
    move_into_place,
    opened,
    template_format,
    witnessed,
    work_beside,
)
from neutral.schema.manifest import Manifest
from neutral.sources import Model, check_kinds, flatten_channels, read_live, read_source
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.running import Runnable
    from neutral.verify import Verification


@dataclass(frozen=True)
class Report:
    """What an import did: where to, which layer went where and why, what was lost, and what else to know.

    `unused` layers of the source went nowhere, `missing` ones of the template kept their weights. `layers` counts those
    that were written. `model` is the live model that was filled: the one given, or, where its framework never changes a
    model (Equinox), a new one.
    """

    out: Path | None
    pairs: tuple[Pair, ...] = ()
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layers: int = 0
    seconds: float = 0.0
    model: object = None


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
    check_kinds(kinds)
    goes_on = path is not None or bool(kinds) or flatten is not None
    contents, close, where = read_source(source, format, key, kinds, flatten_channels(flatten), check=goes_on)
    if created is not None:
        contents = replace(contents, created=created)
    try:
        if path is None:
            if (
                where is not None
                and not isinstance(source, Archive)
                and format is None
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
        _refuse_suffix(out)
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


def import_model(
    archive: str | os.PathLike[str] | Archive,
    to: str | None = None,
    *,
    into: Model | None = None,
    into_key: str | None = None,
    into_kinds: Mapping[str, str] | None = None,
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
        import_model("lenet5.nwt", into=module).model                 a live Equinox model, filled: a new one

    `into_key` chooses one of several sets of weights in the template; the others stay as they are. `into_kinds` maps globs
    on the template's layers to kinds.
    With a template (`into`) layers are paired by `mapping` (source path -> template path), by name, and by structure
    where that is unique. `allow_unused` and `allow_missing` are globs on layer paths of the archive and the template.
    `cast` allows a narrower dtype. Raises `Refused` with all that does not fit; then nothing was written.
    """
    started = time.monotonic()
    if not isinstance(archive, Archive):
        check_archive(Path(archive))
    with nullcontext(archive) if isinstance(archive, Archive) else open_archive(archive) as opened:
        if opened.path is not None:
            opened.check(progress)
        asked = Asked(mapping, allow_unused, allow_missing, cast, into_kinds)
        return _import(opened.contents, opened.path, _Goal(to, into, into_key, out, force), asked, started)


def _refuse_suffix(out: Path) -> None:
    """An archive under a framework's suffix would pass for that framework's file."""
    others = [name for name in frameworks.owners(suffix_of(out)) if name != ARCHIVE]
    if others:
        raise WrongUsage(
            Problem(
                str(out),
                f"the suffix of a {' or '.join(others)} file for an archive",
                SUFFIX,
                "choose another name, or use `neutral convert`",
            )
        )


def check_archive(path: Path) -> None:
    """Refuse another framework's file or folder in the place of an archive."""
    if not path.exists():
        return
    try:
        name, found = frameworks.detect(path)
    except BadFile:
        if not path.is_dir():
            raise
        expected = f"an archive ({SUFFIX}), or the index of its shards ({INDEX_SUFFIX})"
        raise BadFile(Problem(str(path), "a folder", expected, "name the file itself")) from None
    if name != ARCHIVE:
        raise BadFile(
            Problem(
                str(path),
                f"a {name} {'folder' if path.is_dir() else 'file'} ({found})",
                "an archive",
                "run `neutral export` on it first, or `neutral convert`",
            )
        )


def convert(
    source: Model,
    out: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    into: Model | None = None,
    into_key: str | None = None,
    into_kinds: Mapping[str, str] | None = None,
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
    target = None if out is None else Path(out)
    if target is not None and suffix_of(target) == SUFFIX and to is None and into is None and into_key is None:
        with export_model(
            source, target, format=format, key=key, kinds=kinds, flatten=flatten, force=force, progress=progress
        ) as archive:
            return Report(
                target, notes=archive.manifest.notes, layers=len(archive.layers), seconds=time.monotonic() - started
            )
    check_kinds(kinds)
    contents, close, where = read_source(source, format, key, kinds, flatten_channels(flatten))
    try:
        asked = Asked(mapping, allow_unused, allow_missing, cast, into_kinds)
        return _import(contents, where, _Goal(to, into, into_key, target, force), asked, started)
    finally:
        close()


@dataclass(frozen=True)
class _Goal:
    """Where an import goes: a framework, a template with the key of its weights, an output."""

    to: str | None
    into: Model | None
    into_key: str | None
    out: str | os.PathLike[str] | None
    force: bool


def _import(contents: Contents, where: Path | None, goal: _Goal, asked: Asked, started: float) -> Report:
    check_kinds(asked.kinds)
    to, into, into_key, out, force = goal.to, goal.into, goal.into_key, goal.out, goal.force
    journey = Journey()
    count = sum(1 for layer in contents.layers if layer.weights)
    if into is not None and not isinstance(into, str | os.PathLike):
        if out is not None:
            raise WrongUsage(
                Problem(
                    "into", "a live model and an output", "one of them", "leave `out` away, or give a template file"
                )
            )
        if into_key is not None:
            raise WrongUsage(Problem("into", "a live model and a key", "a model file", "leave the key away"))
        filled = _fill_live(contents, into, asked, journey)
        return replace(_report(None, journey, len(journey.pairs), started), model=filled)
    template = None if into is None else Path(into)
    if template is None and (asked.about_template() or into_key is not None):
        raise WrongUsage(
            Problem(
                "import", "a map, patterns or --into-key without a template", "--into TEMPLATE", "name the template"
            )
        )
    target = Path(out) if out is not None else default_output(contents, where, to, template)
    if template is not None:
        framework, form = template_format(template, to)
        check_suffix(target, template, form)
    else:
        framework = frameworks.writer_of(target, to)
        form = framework.written_as(target)
    check_target(target, form, force)
    refuse_same(target, *(path for path in (where, template) if path is not None))
    with ExitStack() as stack:
        if template is not None:
            native = stack.enter_context(opened(framework, template, into_key))
            fill_template(contents, native, framework, asked, journey)
            built, expected = None, {name: Witnessed(tensor) for name, tensor in journey.tensors.items()}
            work = stack.enter_context(work_beside(target))
            journey.notes += framework.writer().fill(template, expected, work / target.name, key=into_key) or ()
            count = len(journey.pairs)
        else:
            built, manifest = build_model(contents, framework, form, target, journey)
            built, expected = witnessed(built)
            work = stack.enter_context(work_beside(target))
            framework.writer().build(built, manifest, work / target.name)
        compare_written(framework, work / target.name, target, expected, built, into_key)
        move_into_place(work, target, force)
    return _report(target, journey, count, started)


def _report(out: Path | None, journey: Journey, layers: int, started: float) -> Report:
    losses = tuple(dict.fromkeys(f"{named(loss.layer)}: {loss.detail}" for loss in journey.losses))
    return Report(
        out,
        tuple(journey.pairs),
        journey.unused,
        journey.missing,
        losses,
        tuple(dict.fromkeys(journey.warnings)),
        tuple(dict.fromkeys(journey.notes)),
        layers,
        time.monotonic() - started,
    )


def _fill_live(contents: Contents, model: object, asked: Asked, journey: Journey) -> object:
    name, native = read_live(model, None)
    framework = FRAMEWORKS[name]
    fill_template(contents, native, framework, asked, journey)
    filled = framework.writer().fill_live(model, journey.tensors)
    return model if filled is None else filled


@dataclass(frozen=True)
class Difference:
    """How two models differ in canonical form: one line per layer or parameter; none if they are the same."""

    same: bool
    lines: tuple[str, ...]


def digest(
    source: Model,
    *,
    format: str | None = None,
    key: str | None = None,
    kinds: Mapping[str, str] | None = None,
    flatten: Mapping[str, str] | None = None,
) -> str:
    """The weights digest of anything that can be read: equal for equal weights, whatever the framework.

    Equal files that do not say the same of their layers (kinds, what follows a Flatten) differ; hints make them alike.
    """
    with export_model(source, format=format, key=key, kinds=kinds, flatten=flatten) as archive:
        _check_file(archive)
        return archive.manifest.weights_digest


def diff(a: Model, b: Model, *, key: str | None = None, key_b: str | None = None) -> Difference:
    """Compare the weights of two models in canonical form.

    `key` and `key_b` choose among several sets of weights: of `a` and of `b`, or `key` alone of each that has it.

    Layers of equal names are compared with each other; names that only count layers are none if the two sides count
    otherwise. The others are paired by their digests. Where both models are chains their order counts, too. What one side
    does not tell (kinds, what follows a Flatten) is taken from the other. `Refused` where neither tells and it would decide.
    """
    from neutral.verify import differing

    with ExitStack() as stack:
        left, right = _both(stack, a, b, key, key_b)
        origins = [origin_of(contents) for contents in (left, right)]
        alike = same_family(*(origin.convention() for origin in origins))
        paths = [[layer.path for layer in each.layers if layer.weights] for each in (left, right)]
        by_name = named_pairs(paths[0], paths[1], alike)
        sides = [
            Side(each.layers, is_chain(each.ordered, each.source.settings, origin), each.graph)
            for each, origin in zip((left, right), origins, strict=True)
        ]
        partners = _partners(sides, alike) or by_name
        ours, theirs, unsettled = agreed(left, right, partners)
        lines = differing(
            describe(replace(left, layers=ours), close=lambda: None),
            describe(replace(right, layers=theirs), close=lambda: None),
            by_name | {path: partners[path] for path in unsettled},
            all(side.chain for side in sides),
            unsettled,
        )
    return Difference(not lines, tuple(lines))


def _contents(stack: ExitStack, source: Model, key: str | None) -> Contents:
    contents, close, _ = read_source(source, None, key, None, None)
    stack.callback(close)
    return contents


def _partners(sides: Sequence[Side], alike: bool) -> dict[str, str]:
    """Which layers belong together, as a template would be filled; none if that is not certain."""
    try:
        return {pair.source: pair.target for pair in pair_layers(*sides, alike=alike).pairs}
    except Refused:
        return {}


def _both(stack: ExitStack, a: Model, b: Model, key: str | None, key_b: str | None) -> tuple[Contents, Contents]:
    if key is None or key_b is not None:
        return _contents(stack, a, key), _contents(stack, b, key_b)
    left, left_has_none = _keyed(stack, a, key)
    right, right_has_none = _keyed(stack, b, key)
    if left_has_none and right_has_none:
        raise Refused(*left_has_none, *right_has_none)
    return left, right


def _keyed(stack: ExitStack, source: Model, key: str) -> tuple[Contents, tuple[Problem, ...]]:
    """The set of a model that `key` names; where there is one set alone, that set, and why the key names none."""
    try:
        return _contents(stack, source, key), ()
    except (Refused, WrongUsage) as error:
        with suppress(Refused, WrongUsage):
            return _contents(stack, source, None), error.problems
        raise


def _check_file(archive: Archive) -> None:
    """What an archive's file says of its weights must be true of them before it is answered."""
    if archive.path is not None:
        archive.check()


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

    if seed < 0:
        raise WrongUsage(Problem("verify", f"the seed {seed}", "0 or more", "choose another"))
    with ExitStack() as stack:
        left, right = (_runnable(Path(path), stack) for path in (a, b))
        return compare(left, right, input_shape=input_shape, seed=seed, tolerance=tolerance)


def _runnable(path: Path, stack: ExitStack) -> Runnable:
    from neutral import running

    name, form = frameworks.detect(path)
    with reworded("choose one: ", "export one of them and verify its archive: "):
        archive = export_model(path)
    with archive:
        reasons: list[Problem] = []
        runner = None if name == ARCHIVE else FRAMEWORKS[name].runners.get(form)
        if runner is not None and path.is_dir() == FRAMEWORKS[name].formats[form].folder:
            run: Callable[[Path, Manifest], Runnable] = named_object(runner)
            try:
                return run(path, archive.manifest)
            except (Refused, Unsupported) as error:
                reasons += error.problems
        if archive.manifest.graph is None:
            what = f"{name} weights without a graph ({archive.manifest.no_graph()})"
            raise Refused(*reasons or [Problem(str(path), what, "a model that can be run", f"pass {running.RUNS}")])
        why = f" ({reasons[0].found})" if reasons else ""
        return _from_graph(archive, f"{path}, rebuilt from its graph{why}", stack)


def _from_graph(archive: Archive, where: str, stack: ExitStack) -> Runnable:
    """The graph of a model as a file of a framework that is installed and can run it."""
    from neutral import running

    work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neutral-")))
    problems: list[Problem] = []
    for name in origin_of(archive.contents).rebuilt_in:
        if not running.installed(name):
            problems.append(
                Problem(where, f"{name} missing", "it, to run the model", f"install neutral-weights[{name}]")
            )
            continue
        rebuilds = FRAMEWORKS[name].rebuilds
        assert rebuilds is not None, name
        file = work / rebuilds[0]
        try:
            import_model(archive, to=name, out=file)
            built: Runnable = named_object(rebuilds[1])(file, _manifest_of(file, archive))
        except (Refused, Unsupported) as error:
            problems += error.problems
            continue
        return replace(built, where=f"{where}, {built.where.rpartition(', ')[2]}")
    raise Refused(*problems)


def _manifest_of(rebuilt: Path, archive: Archive) -> Manifest:
    """What a rebuilt file says of its own graph, in its framework's names; else what the archive says."""
    with suppress(BadFile, Refused, Unsupported), export_model(rebuilt) as again:
        if again.manifest.graph is not None:
            return again.manifest
    return archive.manifest
