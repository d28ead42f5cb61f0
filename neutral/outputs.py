"""The output of an import: its name, writing beside it, reading back, moving into place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from neutral import frameworks
from neutral.archive import Contents
from neutral.containers.files import check_output
from neutral.errors import BadFile, NeutralError, Problem, Refused, WrongUsage, misread, reworded
from neutral.framework import Format, Framework
from neutral.frameworks import ARCHIVE, FRAMEWORKS
from neutral.native import NativeModel, Tensor, Witnessed
from neutral.suffixes import suffix_of, without_suffix


def witnessed(model: NativeModel) -> tuple[NativeModel, dict[str, Witnessed]]:
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


def template_format(template: Path, to: str | None = None) -> tuple[Framework, Format]:
    """What a template is. Where its content does not say whose it is, `to` does."""
    try:
        name, found = frameworks.detect(template)
    except Refused:
        if to is None:
            raise
        wanted, suffix = frameworks.framework(to), suffix_of(template)
        fits = next((form for form in wanted.formats.values() if suffix in form.suffixes), None)
        if fits is None:
            raise
        return wanted, fits
    if name == ARCHIVE:
        raise WrongUsage(
            Problem(str(template), "an archive as the template", "a framework's own file", "name a model to be filled")
        )
    held = FRAMEWORKS[name]
    wanted = held if to is None else frameworks.framework(to)
    if to in (None, name) or held.name in wanted.also or wanted.convention() is held.convention():
        return held, held.formats[found]
    for form in wanted.formats.values():
        if form.shared and suffix_of(template) in form.suffixes:
            return wanted, form
    raise WrongUsage(Problem(str(template), f"a {name} file", f"a {to} template", "correct --to or --into"))


def default_output(contents: Contents, where: Path | None, to: str | None, template: Path | None) -> Path:
    """The source's name with the template's suffix, or with the framework's usual one."""
    if where is None:
        raise WrongUsage(Problem("out", "no output named", "a path", "name the file to write"))
    if template is not None:
        return beside(where, _suffix_of_a_copy(template, to))
    if to is None:
        raise WrongUsage(
            Problem("import", "neither a framework nor an output", "--to FRAMEWORK or -o OUT", "name one of them")
        )
    wanted = frameworks.framework(to)
    return beside(where, wanted.usual(whole=_has_graph(contents, wanted)).suffixes[0])


def beside(source: Path, suffix: str) -> Path:
    """The path beside a source, of its name with another suffix. Folders and prefixes may have dots in their names."""
    named = source.resolve() if source.name in ("", "..") else source
    if not named.name:
        raise WrongUsage(Problem(repr(str(source)), "a folder without a name", "the path of a model", "name the model"))
    has_suffix = named.is_file() or bool(frameworks.owners(suffix_of(named)))
    return named.with_name((without_suffix(named) if has_suffix else named.name) + suffix)


def _suffix_of_a_copy(template: Path, to: str | None) -> str:
    """The template's own suffix if files of its format have it, else their usual one; none, if a copy is a folder."""
    _, form = template_format(template, to)
    own = suffix_of(template)
    if form.folder or template.is_dir():
        return own if template.is_dir() and own in form.suffixes else ""
    return own if own in form.suffixes else form.suffixes[0]


def check_suffix(target: Path, template: Path, form: Format) -> None:
    """A copy of a template must not pass for a file of another format."""
    suffix = suffix_of(target)
    if suffix in (*form.suffixes, suffix_of(template)) or not frameworks.owners(suffix):
        return
    fit = [*form.suffixes, *(["a folder's name without a suffix"] if form.folder else [])]
    raise WrongUsage(
        Problem(
            str(target),
            f"the suffix {suffix} for a copy of {template} (format {form.name})",
            " or ".join(fit),
            "choose another suffix, or a template of that format",
        )
    )


def _has_graph(contents: Contents, wanted: Framework) -> bool:
    """Whether a whole model can be written: from a graph, or as its source described it."""
    if contents.graph is not None:
        return True
    source = FRAMEWORKS.get(contents.source.framework)
    settings, usual = contents.source.settings, wanted.usual(whole=True)
    return source is not None and source.describes(settings, contents.source.format, usual)


def check_target(target: Path, form: Format, force: bool) -> None:
    check_output(target, force)
    for end in form.beside:
        check_output(target.with_name(f"{target.name}{end}"), force)


@contextmanager
def opened(framework: Framework, path: Path, key: str | None = None) -> Iterator[NativeModel]:
    with reworded("--key", "--into-key"):
        native: NativeModel = framework.reader().read(path, key=key)
    try:
        yield native
    finally:
        native.close()


@contextmanager
def work_beside(target: Path) -> Iterator[Path]:
    """A folder beside the goal to write into, removed in the end."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name[:80]}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise Refused(Problem(str(target), f"{error.strerror}", "to write it", "nothing was left behind")) from None
    try:
        yield work
    except NeutralError as error:
        # Writers know the file by its place in the folder; the user knows it by its name.
        raise type(error)(
            *(replace(p, where=p.where.replace(str(work / target.name), str(target))) for p in error.problems)
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def move_into_place(work: Path, target: Path, force: bool) -> None:
    """Everything that was written takes its name; a folder that is in the way is replaced as a whole."""
    if target.is_dir():
        _check_replaceable(target, work / target.name)
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


def _check_replaceable(goal: Path, made: Path) -> None:
    """A folder gives way to a folder alone, and only if it holds a model: it may be anything that someone keeps."""
    try:
        holds_a_model = made.is_dir() and bool(frameworks.detect(goal))
    except BadFile:
        holds_a_model = False
    if not holds_a_model:
        raise Refused(Problem(str(goal), "a folder", "a model to replace, or nothing", "choose another name"))


def compare_written(
    framework: Framework,
    written: Path,
    target: Path,
    expected: Mapping[str, Witnessed],
    built: NativeModel | None,
    key: str | None = None,
) -> None:
    """Read the output back with the reader and compare every element with what was meant.

    A tensor is found by its name, or, in a new file whose format names tensors in its own way, by its layer and local
    name. What has neither (a layer's name that the format had to change) must be there under another one.
    """
    places = {
        t.name: (layer.path, local) for layer in (built.layers if built else ()) for local, t in layer.tensors.items()
    }
    with opened(framework, written, key) as native:
        # Another set of weights in the file may have the same names: those of the chosen one go before.
        aside = (tensor for tensors in native.collections.values() for tensor in tensors)
        named = {tensor.name: tensor.data for tensor in (*aside, *native.tensors())}
        placed = {(layer.path, local): t.data for layer in native.layers for local, t in layer.tensors.items()}
        found = {name: named.get(name, placed.get(places.get(name, ("", "")))) for name in expected}
        there = {name: tensor for name, tensor in found.items() if tensor is not None}
        again = _crcs(list(there.values()))
        states = {tensor.name for tensor in (built.tensors() if built else ()) if tensor.state}
        wrong = [
            name
            for (name, tensor), crc in zip(there.items(), again, strict=True)
            if not _is_meant(tensor, crc, expected[name])
            and not (name in states and _counts_as(tensor, expected[name]))
        ]
        missing = [name for name in expected if name not in there]
        if missing and built is not None:
            used = {id(tensor) for tensor in there.values()}
            others = [tensor for tensor in named.values() if id(tensor) not in used]
            wanted = sorted((expected[name].nbytes, expected[name].crc()) for name in missing)
            if wanted == sorted(zip((tensor.nbytes for tensor in others), _crcs(others), strict=True)):
                missing = []
    if missing or wrong:
        raise misread(target, missing + wrong)


def _is_meant(found: Tensor, crc: int, meant: Witnessed) -> bool:
    return (found.shape, found.dtype, crc) == (meant.shape, meant.dtype, meant.crc())


def _counts_as(found: Tensor, meant: Tensor) -> bool:
    """A counter is no weight: a framework has it in the integer dtype of its own, with an axis or without."""
    whole = found.dtype.kind in "iu" and meant.dtype.kind in "iu" and found.size == meant.size == 1
    return whole and int(found.read().reshape(())) == int(meant.read().reshape(()))


def _crcs(tensors: Sequence[Tensor]) -> list[int]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda tensor: Witnessed(tensor).crc(), tensors))
