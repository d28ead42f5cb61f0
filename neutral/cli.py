"""The command line, and the only place that prints.

    neutral export model.pt model.nwt
    neutral import model.nwt --to keras

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 refused or failed, 2 wrong usage; `diff` answers
0 same, 1 different, 2 trouble. A command is parsed first and run afterwards, so that what goes wrong in it is reported here,
in one line, and not by the parser.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import neutral
from neutral import frameworks, plugins, report
from neutral.archive import SUFFIX
from neutral.containers.files import SourceFile
from neutral.errors import BadFile, NeutralError, Problem, WrongUsage, named, printable
from neutral.outputs import beside

if TYPE_CHECKING:
    from neutral.convert import Report

GLOBAL_OPTIONS = ("-q", "--quiet", "--verbose", "--debug", "--version")
LARGEST_MAP = 16 << 20
LISTED = 10
"""How many remarks of one sort are printed without `--verbose`."""

# The common base of all that typer raises for a wrong command line; typer itself does not export it.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A model file, of any format that `neutral formats` lists.")
]
AnyFile = Annotated[Path, typer.Argument(metavar="FILE", help="An archive, or any model file.")]
ArchiveFile = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="An archive (.nwt).")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; its suffix decides the format.")]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FORMAT",
        help="What the file is, where its content alone does not say: a name that `neutral formats` lists.",
    ),
]
To = Annotated[
    str | None, typer.Option("--to", metavar="FRAMEWORK", help=f"One of {', '.join(frameworks.FRAMEWORKS.own)}.")
]
Key = Annotated[
    str | None, typer.Option("--key", metavar="NAME", help="Which of several sets of weights in one checkpoint.")
]
IntoKey = Annotated[
    str | None,
    typer.Option("--into-key", metavar="NAME", help="Which of several sets of weights in TEMPLATE is to be replaced."),
]
Kind = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="PATTERN=KIND",
        help="The kind of the layers that a glob matches (=KIND: a model that is one layer), with settings where the kind "
        "has several forms: 'up=conv_transpose(transpose_kernel=false)'. May be repeated.",
    ),
]
IntoKind = Annotated[
    list[str] | None,
    typer.Option(
        "--into-kind",
        metavar="PATTERN=KIND",
        help="The kind of layers of TEMPLATE whose file does not say it, as in norm=layer_norm. May be repeated.",
    ),
]
Flatten = Annotated[
    list[str] | None,
    typer.Option(
        "--flatten",
        metavar="LAYER=CHANNELS",
        help="Channels that were flattened in front of a layer (LAYER=:CHANNELS: reshaped behind it). May be repeated; `none`: no layer.",
    ),
]
Into = Annotated[
    Path | None,
    typer.Option("--into", metavar="TEMPLATE", help="A model whose weights are to be replaced (in a copy)."),
]
MapFile = Annotated[
    Path | None,
    typer.Option("--map", metavar="FILE", help='Which layer goes where: TOML, [layers] "source path" = "target path".'),
]
AllowUnused = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-unused", metavar="PATTERN", help="Layers of the source that may be left out. May be repeated."
    ),
]
AllowMissing = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-missing",
        metavar="PATTERN",
        help="Layers of the template that may keep their weights. May be repeated.",
    ),
]
Cast = Annotated[bool, typer.Option("--cast", help="Allow a narrower dtype than the source's.")]
Explain = Annotated[bool, typer.Option("--explain", help="Print which layer went where, why, and what had no partner.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]


class Stopped(BaseException):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class Screen:
    """What the user wants to see, and where it goes. `trouble` is the exit status of a failure."""

    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    trouble: int = 1

    def say(self, text: str) -> None:
        """A result that `--quiet` leaves out."""
        if not self.quiet:
            self.answer(text)

    def answer(self, text: str) -> None:
        """A result that was asked for."""
        _write(sys.stdout, text)

    def remark(self, sort: str, lines: Iterable[str]) -> None:
        """Warnings and notes: the first few of a sort, all with `--verbose`."""
        if self.quiet:
            return
        found = [printable(line, 1000) for line in lines]
        shown = found if self.verbose else found[:LISTED]
        for line in shown:
            _write(sys.stderr, f"neutral: {sort}: {line}")
        if len(found) > len(shown):
            _write(sys.stderr, f"neutral: {sort}: {len(found) - len(shown)} more; --verbose lists them")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table as wide as the terminal; with unbroken lines where there is none."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(width=None if sys.stdout.isatty() else 100_000, highlight=False)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in columns:
            table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell, 2000)) for cell in row))
        with console.capture() as captured:
            console.print(table)
        _write(sys.stdout, "\n".join(line.rstrip() for line in captured.get().splitlines()))

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None] | None]:
        """A callback that shows a bar once the work has taken a second; None where nobody looks."""
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        bar = Bar(what)
        try:
            yield bar
        finally:
            bar.close()


class Bar:
    """A progress bar that appears only when work takes longer than a second."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._shown: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._shown is None:
            if time.monotonic() - self._started < 1:
                return
            self._shown = self._show()
        self._shown.update(self._shown.task_ids[0], completed=done, total=total)

    def _show(self) -> Any:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        shown = Progress(*columns, console=Console(stderr=True), transient=True)
        shown.add_task(escape(printable(self._what, 60)), total=None)
        shown.start()
        return shown

    def close(self) -> None:
        if self._shown is not None:
            self._shown.stop()


def _write(stream: Any, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a command; parsing it gives the work to do, not yet done."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def parsed(**given: Any) -> Callable[[], int]:
            return functools.partial(function, **given)

        app.command(name, epilog=f"Everywhere: {', '.join(GLOBAL_OPTIONS)}.")(parsed)
        return function

    return register


@app.callback(invoke_without_command=True)
def _everywhere(
    ctx: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and asked-for answers only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the pairing of layers and every note, too.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Move trained weights between frameworks, each into each: right, or refused. `neutral formats` lists them."""
    screen: Screen = ctx.obj
    screen.quiet, screen.verbose, screen.debug = quiet, verbose, debug
    if version:
        from importlib.metadata import version as version_of

        screen.answer(f"neutral {version_of('neutral-weights')}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        _write(sys.stderr, ctx.get_help())
        raise typer.Exit(2)


@command("export")
def _export(
    ctx: typer.Context,
    source: Source,
    archive: Annotated[
        Path | None, typer.Argument(metavar="ARCHIVE", help="The archive to write [SOURCE's stem and .nwt].")
    ] = None,
    source_format: From = None,
    key: Key = None,
    kind: Kind = None,
    flatten: Flatten = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size", metavar="SIZE", help="Split the archive into files of about this size: 500MB, 5GB."
        ),
    ] = None,
    force: Force = False,
) -> int:
    """Write a model's weights into an archive."""
    screen: Screen = ctx.obj
    out = archive if archive is not None else beside(source, SUFFIX)
    started = time.monotonic()
    with (
        screen.progress(f"export {source.name}") as progress,
        neutral.export_model(
            source,
            out,
            **_reading(source_format, key, kind, flatten),
            force=force,
            shard_bytes=_size(shard_size),
            progress=progress,
        ) as written,
    ):
        manifest = written.manifest
        out = written.path or out
    screen.remark("note", report.open_questions(manifest))
    screen.remark("note", manifest.notes)
    screen.say(f"{printable(out)}: {report.summary(manifest)}, {time.monotonic() - started:.2f} s")
    return 0


@command("import")
def _import(
    ctx: typer.Context,
    archive: ArchiveFile,
    to: To = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="OUT", help="The file to write; its suffix decides the format."),
    ] = None,
    into: Into = None,
    into_key: IntoKey = None,
    into_kind: IntoKind = None,
    map_file: MapFile = None,
    allow_unused: AllowUnused = None,
    allow_missing: AllowMissing = None,
    cast: Cast = False,
    explain: Explain = False,
    force: Force = False,
) -> int:
    """Write a framework's file from an archive."""
    screen: Screen = ctx.obj
    if to is None and into is None and out is None:
        raise WrongUsage(
            Problem("import", "no destination", "--to FRAMEWORK, -o OUT or --into TEMPLATE", "name one of them")
        )
    writing = _writing(to, into, into_key, into_kind, map_file, allow_unused, allow_missing, cast)
    with screen.progress(f"import {archive.name}") as progress:
        result = neutral.import_model(archive, out=out, **writing, force=force, progress=progress)
    return _reported(screen, result, explain)


@command("convert")
def _convert(
    ctx: typer.Context,
    source: Source,
    out: Out,
    to: To = None,
    into: Into = None,
    into_key: IntoKey = None,
    into_kind: IntoKind = None,
    map_file: MapFile = None,
    source_format: From = None,
    key: Key = None,
    kind: Kind = None,
    flatten: Flatten = None,
    allow_unused: AllowUnused = None,
    allow_missing: AllowMissing = None,
    cast: Cast = False,
    explain: Explain = False,
    force: Force = False,
) -> int:
    """Export and import in one step, without a file in the middle."""
    screen: Screen = ctx.obj
    reading = _reading(source_format, key, kind, flatten)
    writing = _writing(to, into, into_key, into_kind, map_file, allow_unused, allow_missing, cast)
    with screen.progress(f"convert {source.name}") as progress:
        result = neutral.convert(source, out, **reading, **writing, force=force, progress=progress)
    return _reported(screen, result, explain)


@command("show")
def _show(
    ctx: typer.Context,
    file: AnyFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    source_format: From = None,
    key: Key = None,
) -> int:
    """List the layers of any file that neutral can read."""
    screen: Screen = ctx.obj
    with (
        screen.progress(f"read {file.name}") as progress,
        neutral.export_model(file, format=source_format, key=key, progress=progress) as archive,
    ):
        manifest = archive.manifest
    if as_json:
        screen.answer(json.dumps(json.loads(manifest.to_json()), indent=2, sort_keys=True))
        return 0
    screen.answer(f"{printable(file)}: {report.summary(manifest)}")
    screen.answer(f"weights digest {manifest.weights_digest}\n")
    screen.table(report.COLUMNS, report.rows(manifest))
    notes = [
        *report.open_questions(manifest),
        *manifest.notes,
        *(f"{x.layer}: {x.rule}, {x.detail}" for x in manifest.losses),
    ]
    if notes:
        screen.answer("\n" + "\n".join(f"note: {printable(note, 1000)}" for note in notes))
    return 0


@command("check")
def _check(ctx: typer.Context, archive: ArchiveFile) -> int:
    """Check an archive's structure and every digest in it."""
    from neutral.convert import check_archive

    screen: Screen = ctx.obj
    check_archive(archive)
    with neutral.open_archive(archive) as opened:
        opened.check()
        count = sum(1 for _ in opened.manifest.parameters())
    screen.say(f"{printable(archive)}: structure and the digests of all {count} tensors are right")
    return 0


@command("diff")
def _diff(
    ctx: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="An archive, or any model file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="An archive, or any model file.")],
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            metavar="NAME",
            help="Which of several sets of weights: of each file that has it, or, given twice, of A and of B.",
        ),
    ] = None,
) -> int:
    """Compare two files in canonical form: 0 same, 1 different, 2 trouble."""
    screen: Screen = ctx.obj
    screen.trouble = 2
    if key and len(key) > 2:
        raise WrongUsage(Problem("--key", f"{len(key)} keys", "one, or two: the first file's and the second's"))
    key_a, key_b = (*(key or ()), None, None)[:2]
    difference = neutral.diff(a, b, key=key_a, key_b=key_b)
    for line in difference.lines:
        screen.say(printable(line, 1000))
    if difference.same:
        screen.say("same weights")
    return 0 if difference.same else 1


@command("digest")
def _digest(
    ctx: typer.Context,
    file: AnyFile,
    source_format: From = None,
    key: Key = None,
    kind: Kind = None,
    flatten: Flatten = None,
) -> int:
    """Print the weights digest: equal for equal weights, whatever the framework."""
    screen: Screen = ctx.obj
    with neutral.export_model(file, **_reading(source_format, key, kind, flatten)) as archive:
        if archive.path is not None:
            archive.check()
        questions = report.open_questions(archive.manifest)
        screen.remark("note", (f"{question}; a file that says it has another digest" for question in questions))
        screen.answer(archive.manifest.weights_digest)
    return 0


@command("verify")
def _verify(
    ctx: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="A model that can be run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="N,C,H,W", help="Shape of the input, channels first, with the batch."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random input.")] = 0,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Largest difference that counts as the same.")] = 1e-5,
) -> int:
    """Run both models on the same random input and compare what comes out."""
    from neutral.convert import verify

    screen: Screen = ctx.obj
    outcome = verify(a, b, input_shape=_shape(input_shape), seed=seed, tolerance=tolerance)
    for line in outcome.lines:
        screen.say(printable(line, 1000))
    verdict = "same" if outcome.same else "different"
    screen.say(f"{verdict}: the largest difference is {outcome.max_difference:.3g}, allowed is {tolerance:.3g}")
    return 0 if outcome.same else 1


@command("formats")
def _formats(ctx: typer.Context) -> int:
    """List what is readable, writable, and installed."""
    screen: Screen = ctx.obj
    screen.table(report.FORMAT_COLUMNS, report.formats(frameworks.FRAMEWORKS.values()))
    screen.answer("")
    screen.table(("framework", "installed"), report.installed(frameworks.FRAMEWORKS.values()))
    return 0


def _reading(
    source_format: str | None, key: str | None, kind: list[str] | None, flatten: list[str] | None
) -> dict[str, Any]:
    """The options of a command that reads a model."""
    if source_format is not None:
        frameworks.by_format(source_format)
    return {"format": source_format, "key": key, "kinds": _kinds(kind), "flatten": _flatten(flatten)}


def _writing(
    to: str | None,
    into: Path | None,
    into_key: str | None,
    into_kind: list[str] | None,
    map_file: Path | None,
    allow_unused: list[str] | None,
    allow_missing: list[str] | None,
    cast: bool,
) -> dict[str, Any]:
    """The options of a command that writes a model."""
    if to is not None:
        frameworks.framework(to)
    return {
        "to": to,
        "into": into,
        "into_key": into_key,
        "into_kinds": _kinds(into_kind, "--into-kind"),
        "mapping": None if map_file is None else read_map(map_file),
        "allow_unused": tuple(allow_unused or ()),
        "allow_missing": tuple(allow_missing or ()),
        "cast": cast,
    }


def _pairs(option: str, values: list[str] | None, what: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for value in values or ():
        # A kind may have settings in brackets, with further equal signs in them.
        found = re.fullmatch(r"(.*?)=([^=()]+(?:\(.*\))?)", value, re.DOTALL)
        left, right = found.groups() if found else ("", "")
        if not right:
            raise WrongUsage(Problem(option, f"{value!r}", what))
        if pairs.setdefault(left, right) != right:
            raise WrongUsage(Problem(option, f"{left!r} twice, as {pairs[left]} and {right}", "it once"))
    return pairs


def _kinds(values: list[str] | None, option: str = "--kind") -> dict[str, str]:
    return _pairs(option, values, "PATTERN=KIND")


def _flatten(values: list[str] | None) -> dict[str, str] | None:
    """None: not said. An empty mapping: no layer crosses a Flatten."""
    if not values:
        return None
    if values == ["none"]:
        return {}
    return _pairs("--flatten", values, "LAYER=CHANNELS, LAYER=:CHANNELS or, alone, `none`")


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,14})\s*([A-Za-z]{0,3})", text, re.ASCII)
    if found is None or found[2].upper() not in _UNITS:
        raise WrongUsage(Problem("--shard-size", repr(text), "a size, as in 500MB or 5GB"))
    return int(found[1]) * _UNITS[found[2].upper()]


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = re.split(r"[,x]", text)
    if not all(re.fullmatch(r"[1-9][0-9]{0,9}", size, re.ASCII) for size in sizes):
        raise WrongUsage(Problem("--input-shape", f"{text!r}", "sizes with commas between them, as in 1,1,28,28"))
    return tuple(int(size) for size in sizes)


def read_map(path: Path) -> dict[str, str]:
    """The layer pairs of a `--map` file: a table [layers] of strings, or strings at the top."""
    try:
        with SourceFile(path) as file:
            table = tomllib.loads(file.read(0, min(file.size, LARGEST_MAP)).decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFile(
            Problem(str(path), f"text that is not TOML ({error})", '"source path" = "target path" lines')
        ) from None
    layers = table.pop("layers", {})
    if not isinstance(layers, dict):
        layers = {"layers": layers}
    pairs: dict[str, object] = {**table, **layers}
    for name, target in pairs.items():
        if not isinstance(target, str):
            raise BadFile(
                Problem(
                    f"{path}: {name}",
                    f"{type(target).__name__}",
                    "a layer's path",
                    "put a path with dots between quotation marks",
                )
            )
    return {name: str(target) for name, target in pairs.items()}


def _reported(screen: Screen, result: Report, explain: bool) -> int:
    pairing = [
        *((named(pair.source), named(pair.target), pair.why) for pair in result.pairs),
        *((named(path), "", "left out") for path in result.unused),
        *(("", named(path), "kept as it was") for path in result.missing),
    ]
    if pairing and (explain or screen.verbose):
        screen.table(("source", "target", "why"), pairing)
    screen.remark("warning", result.warnings)
    screen.remark("lossy", result.losses)
    screen.remark("note", result.notes)
    screen.say(f"{printable(result.out)}: {report.count(result.layers, 'layer')}, {result.seconds:.2f} s")
    return 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP as exceptions inside the block, so that nothing half-written is left behind."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status is the answer.

    >>> main(["digest", "no-such-file.pt"])
    1
    """
    screen = Screen()
    try:
        with _stoppable():
            status = _run(list(sys.argv[1:] if arguments is None else arguments), screen)
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # Whoever read the answer has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, typer.Abort):
        return _failed(screen, 128 + signal.SIGINT, "interrupted, nothing was left behind")
    except Stopped as stopped:
        return _failed(
            screen, 128 + stopped.number, f"stopped by {signal.Signals(stopped.number).name}, nothing was left behind"
        )
    except UsageError as error:
        return _failed(screen, 2, _usage(error))
    except WrongUsage as error:
        return _failed(screen, 2, str(error))
    except NeutralError as error:
        return _failed(screen, screen.trouble, str(error))
    except OSError as error:
        where = error.filename if error.filename is not None else "the system"
        return _failed(
            screen, screen.trouble, str(Problem(str(where), error.strerror or str(error), "to read or write it"))
        )
    except MemoryError:
        return _failed(
            screen, screen.trouble, str(Problem("memory", "too little of it", "one tile of one tensor to fit"))
        )
    except Exception as error:
        return _failed(screen, screen.trouble, str(_bug(error)))


def _bug(error: Exception) -> Problem:
    """What nobody meant to happen, and whose bug it is."""
    found = f"{type(error).__name__} ({error})" if str(error) else type(error).__name__
    plugin, certain = plugins.blamed(error) or ("", False)
    where = f"plug-in {plugin}" if certain else "neutral"
    whose = f"the {where}" if certain else f"neutral, or in the plug-in {plugin}" if plugin else where
    return Problem(where, found, "no such failure", f"this is a bug in {whose}: run it with --debug and report it")


def _run(arguments: list[str], screen: Screen) -> int:
    parser = typer.main.get_command(app)
    work = parser.main(_global_first(arguments), prog_name="neutral", standalone_mode=False, obj=screen)
    if not callable(work):
        return int(work or 0)
    with warnings.catch_warnings():
        if not screen.debug:
            warnings.simplefilter("ignore")
        return int(work())


def _global_first(arguments: list[str]) -> list[str]:
    """The options that every command has may stand anywhere; the parser wants them in front.

    >>> _global_first(["show", "x.pt", "--debug", "--", "-q"])
    ['--debug', 'show', 'x.pt', '--', '-q']
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    front = [word for word in arguments[:end] if word in GLOBAL_OPTIONS]
    return [*front, *(word for word in arguments[:end] if word not in GLOBAL_OPTIONS), *arguments[end:]]


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    name = context.command_path if context is not None else "neutral"
    message = error.format_message() if isinstance(error, typer.BadParameter) else getattr(error, "message", str(error))
    return f"{name}: {printable(' '.join(message.split()).rstrip('.'), 1000)}, see `{name} --help`"


def _failed(screen: Screen, status: int, text: str) -> int:
    if screen.debug:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        _write(sys.stderr, f"neutral: error: {text}")
        sys.stderr.flush()
    return status
