"""Frameworks that other packages add, by their entry points.

    [project.entry-points."neutral.exporters"]
    acme = "acme_neutral.reader"             read(path, *, key=None); may have signature(probe), live(model), read_live(model)
    [project.entry-points."neutral.importers"]
    acme = "acme_neutral.writer"             FILES, fill, build, layer_classes; may have fill_live
    [project.entry-points."neutral.conventions"]
    acme = "acme_neutral.convention:ACME"    a Convention; its `kinds` are layer kinds that neutral does not have

A framework has all three. A package is loaded only where no framework of neutral's own is meant, or all are listed. Two
claims to one name (a framework, a format, a layer kind) are refused, whoever makes them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from traceback import walk_tb
from typing import Any

from neutral.conventions.forms import Convention
from neutral.errors import Problem, WrongUsage, raise_all
from neutral.framework import Format, Framework
from neutral.schema.kinds import KINDS
from neutral.signatures import never

GROUPS = ("neutral.exporters", "neutral.importers", "neutral.conventions")


def frameworks(taken: Iterable[str]) -> Mapping[str, Framework]:
    """The frameworks of all plug-ins. `taken` are names that no framework or format of theirs may have."""
    found = {group: list(entry_points(group=group)) for group in GROUPS}
    raise_all(WrongUsage, _claims(found, set(taken)))
    named = {group: {entry.name: entry for entry in entries} for group, entries in found.items()}
    names = sorted({name for entries in named.values() for name in entries})
    raise_all(WrongUsage, (_incomplete(name, named) for name in names if any(name not in named[g] for g in GROUPS)))
    made = {name: _framework(name, *(named[group][name] for group in GROUPS)) for name in names}
    raise_all(
        WrongUsage, _twice((form, each.name) for each in made.values() for form in each.formats if form not in taken)
    )
    raise_all(
        WrongUsage,
        (_claimed(form, each.name, "neutral") for each in made.values() for form in each.formats if form in set(taken)),
    )
    len(KINDS.added)  # the kinds are as unique as the frameworks
    return made


def _claims(found: Mapping[str, list[EntryPoint]], taken: set[str]) -> list[Problem]:
    problems = []
    for entries in found.values():
        problems += [_claimed(entry.name, _package(entry), "neutral") for entry in entries if entry.name in taken]
        problems += _twice((entry.name, _package(entry)) for entry in entries)
    return problems


def _twice(claims: Iterable[tuple[str, str]]) -> list[Problem]:
    first: dict[str, str] = {}
    return [_claimed(name, by, first[name]) for name, by in claims if first.setdefault(name, by) != by]


def _claimed(name: str, by: str, other: str) -> Problem:
    return Problem(f"plug-in {by}", f"the name {name!r}, which {other} has", "a name of its own", f"uninstall {by}")


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _incomplete(name: str, named: Mapping[str, Mapping[str, EntryPoint]]) -> Problem:
    missing = [group for group in GROUPS if name not in named[group]]
    return Problem(
        f"plug-in {name}", f"no entry point in {' and '.join(missing)}", f"one in each of {', '.join(GROUPS)}"
    )


def _framework(name: str, reader: EntryPoint, writer: EntryPoint, convention: EntryPoint) -> Framework:
    reading, writing, table = (_loaded(entry) for entry in (reader, writer, convention))
    if not isinstance(table, Convention) or table.framework != name:
        raise WrongUsage(
            Problem(f"plug-in {name}", f"{convention.value}, which is not its convention", f"a Convention of {name!r}")
        )
    files = getattr(writing, "FILES", ())
    if not files or not all(isinstance(file, Format) for file in files):
        raise WrongUsage(Problem(f"plug-in {name}", f"{writer.value} without FILES", "the formats of its files"))
    return Framework(
        name=name,
        exporter=reader.module,
        importer=writer.module,
        convention_at=f"{convention.module}:{convention.attr}",
        files=tuple(files),
        target=writer.module,
        signature=getattr(reading, "signature", never),
        live=getattr(reading, "live", lambda model: False),
    )


def blamed(error: BaseException) -> tuple[str, bool] | None:
    """The plug-in in whose code an exception was raised, and True; one that neutral was working for, and False."""
    packages = {
        entry.module.rpartition(".")[0] or entry.module: _package(entry)
        for group in GROUPS
        for entry in entry_points(group=group)
        if entry.module in sys.modules
    }
    frames = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    owners = [_owner(name, {**packages, __package__: ""}) for name in reversed(frames)]
    ours = [owner for owner in owners if owner is not None]
    found = next(filter(None, ours), None) or next(iter(packages.values()), None)
    return None if found is None else (found, ours[:1] == [found])


def _owner(module: str, packages: Mapping[str, str]) -> str | None:
    return next((by for package, by in packages.items() if f"{module}.".startswith(f"{package}.")), None)


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WrongUsage(
            Problem(f"plug-in {_package(entry)}", f"{found} while loading {entry.value}", "a module that loads")
        ) from error
