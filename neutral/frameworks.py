"""Which frameworks there are, who reads and writes them, and what a file is.

>>> FRAMEWORKS["torch"].suffixes
('.pt', '.pth', '.ckpt', '.bin', '.pt2')

The frameworks that come with neutral stand in `registry.py`; others are plug-ins (`plugins.py`), looked for only where no
framework of neutral's own is meant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path

from neutral import plugins
from neutral.errors import BadFile, Problem, WrongUsage, printable
from neutral.framework import Framework
from neutral.registry import BUILT_IN
from neutral.signatures import Probe
from neutral.suffixes import ARCHIVE_SUFFIXES, suffix_of

ARCHIVE = "archive"
"""The name that `detect` gives to neutral's own format."""
_MOST_LOOKED_AT = 1000


class Frameworks(Mapping[str, Framework]):
    """The frameworks by name: neutral's own, then those of plug-ins."""

    def __init__(self, own: tuple[Framework, ...]) -> None:
        self.own = {framework.name: framework for framework in own}

    @cached_property
    def added(self) -> Mapping[str, Framework]:
        """What plug-ins add. Found once, when it is first asked for."""
        return plugins.frameworks((ARCHIVE, *self.own, *(form for own in self.own.values() for form in own.formats)))

    def __getitem__(self, name: str) -> Framework:
        return self.own[name] if name in self.own else self.added[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from self.added

    def __len__(self) -> int:
        return len(self.own) + len(self.added)

    def in_turn(self) -> Iterator[Mapping[str, Framework]]:
        """Neutral's own first; plug-ins only if nobody was content with these."""
        yield self.own
        yield self.added


FRAMEWORKS = Frameworks(BUILT_IN)


def owners(suffix: str) -> tuple[str, ...]:
    """Whose files have a suffix.

    >>> owners(".ckpt"), owners(".nwt"), owners(".txt")
    (('torch', 'tensorflow'), ('archive',), ())
    """
    if suffix in ARCHIVE_SUFFIXES:
        return (ARCHIVE,)
    for some in FRAMEWORKS.in_turn() if suffix else ():
        if found := tuple(f.name for f in some.values() if any(suffix in file.suffixes for file in f.files)):
            return found
    return ()


def framework(name: str) -> Framework:
    """A framework by name; `WrongUsage` lists the names there are."""
    if name not in FRAMEWORKS:
        raise WrongUsage(
            Problem(printable(name), "no such framework", f"one of {', '.join(FRAMEWORKS)}", "correct the name")
        )
    return FRAMEWORKS[name]


def by_format(name: str) -> tuple[str, str]:
    """(framework, format) for a name that a user gave to either."""
    if name in FRAMEWORKS:
        return name, next(iter(FRAMEWORKS[name].formats))
    for known in FRAMEWORKS.values():
        if name in known.formats:
            return known.name, name
    names = [*FRAMEWORKS, *(f for known in FRAMEWORKS.values() for f in known.formats if f not in FRAMEWORKS)]
    raise WrongUsage(Problem(printable(name), "no such format", f"one of {', '.join(names)}", "correct the name"))


def detect(path: str | os.PathLike[str]) -> tuple[str, str]:
    """(framework, format) of a file or folder, by its content and not by its suffix; (`archive`, `nwt`) for an archive.

    A checkpoint of TensorFlow is named by its prefix, its `.index` file or its folder. Raises `BadFile` for what no
    reader knows, `Unsupported` for what is known and not read.
    """
    where = Path(path)
    if not where.exists():
        for known in FRAMEWORKS.own.values():
            for form in known.files:
                if form.bare and any(where.with_name(f"{where.name}{end}").is_file() for end in form.beside):
                    return known.name, form.name
    with Probe(where) as probe:
        if _holds_archive(probe):
            return ARCHIVE, "nwt"
        for some in FRAMEWORKS.in_turn():
            for known in some.values():
                if (found := known.signature(probe)) is not None:
                    return known.name, found
        raise _unknown(probe)


def _holds_archive(probe: Probe) -> bool:
    if probe.container == "safetensors":
        from neutral.archive import is_archive

        # A shard, or an archive whose one key is damaged, must not pass for a model in the names of torch.
        return suffix_of(probe.path) in ARCHIVE_SUFFIXES or is_archive(probe.path)
    metadata = probe.json.get("metadata")
    return "weight_map" in probe.json and isinstance(metadata, dict) and "neutral" in metadata


def _unknown(probe: Probe) -> BadFile:
    where = str(probe.path)
    if probe.is_folder:
        inside = [str(probe.path / name) for name in _prefixes(probe.path) or _folders(probe.path)]
        expected = "a folder of a format that `neutral formats` lists"
        return BadFile(Problem(where, "a folder", expected, f"name {' or '.join(inside) or 'the file itself'}"))
    if probe.container == "zip":
        shown = ", ".join(printable(name, 40) for name in probe.members[:4])
        expected = "a zip of a format that `neutral formats` lists"
        return BadFile(Problem(where, f"a zip of {shown or 'nothing'}", expected, "name another file"))
    if probe.container == "json":
        expected = "an index of shards, a model.json, or another JSON of a format that `neutral formats` lists"
        return BadFile(Problem(where, "JSON that no reader knows", expected, "name another file"))
    return BadFile(
        Problem(
            where,
            "content that no reader knows" if probe.size else "an empty file",
            "a file of a format that `neutral formats` lists",
            "say what a source is with --from (of export, convert, show, digest)",
        )
    )


def _prefixes(folder: Path) -> list[str]:
    """The checkpoints in a folder that are named by a prefix of several files: the first few."""
    bare = (form for known in FRAMEWORKS.own.values() for form in known.files if form.bare)
    ends = tuple(end for form in bare for end in form.beside)
    found = (path.name for path in islice(folder.iterdir(), _MOST_LOOKED_AT) if path.name.endswith(ends))
    return sorted(name.removesuffix(end) for name in islice(found, 4) for end in ends if name.endswith(end))


def _folders(folder: Path) -> list[str]:
    """The folders in a folder: the first few."""
    return sorted(path.name for path in islice(folder.iterdir(), _MOST_LOOKED_AT) if path.is_dir())[:4]


def writer_of(out: Path, to: str | None) -> Framework:
    """The framework that writes a file of this name: the one named, or the only one whose suffix it has."""
    suffix = suffix_of(out)
    if to is None:
        found_in = ([f for f in some.values() if suffix in f.own_suffixes] for some in FRAMEWORKS.in_turn())
        fits = next((fits for fits in found_in if fits), []) if suffix else []
        if len(fits) == 1:
            return fits[0]
        if not fits and owners(suffix) not in ((), (ARCHIVE,)):
            raise WrongUsage(
                Problem(
                    str(out), f"the suffix {suffix}, which is only a copy's", "a template of it", "use --into TEMPLATE"
                )
            )
        nobody = "a suffix that no framework writes" if suffix else "no suffix"
        found = f"the suffix of {' and '.join(f.name for f in fits)}" if fits else nobody
        raise WrongUsage(
            Problem(
                str(out), found, "a suffix of one framework", f"name the framework with --to ({', '.join(FRAMEWORKS)})"
            )
        )
    wanted = framework(to)
    for each in (wanted, *(FRAMEWORKS[name] for name in wanted.also)):
        if suffix in each.suffixes:
            return each
    if not owners(suffix) and any(file.bare and file.new for file in wanted.files):
        return wanted
    raise WrongUsage(
        Problem(
            str(out),
            f"a suffix that {to} does not write",
            f"one of {', '.join(wanted.suffixes)}",
            "choose another suffix",
        )
    )
