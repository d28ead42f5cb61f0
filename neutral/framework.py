"""What neutral must know of a framework before it imports anything of it.

>>> zipped = Format("z", "a zip of arrays", (".z",))
>>> Framework("zed", "zed.reader", "zed.writer", "zed.tables:ZED", files=(zipped,)).suffixes
('.z',)
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from neutral.conventions.forms import Convention
from neutral.signatures import Live, Signature, never
from neutral.suffixes import suffix_of


@dataclass(frozen=True)
class Format:
    """One format of a framework's files, and the suffixes of such a file, the usual first.

    `reads` says in words what is read; nothing, if neutral does not read it. A file that is not `new` is written as the
    copy of a template alone. A `whole` one holds a model, not only its weights; a `rebuilt` one is made of the graph alone.
    A `folder` may be named without a suffix; so may the output of the format that is `bare`. A `shared` suffix is another
    framework's where nobody names this one. `beside` are suffixes of the files that lie beside the one named.
    """

    name: str
    reads: str
    suffixes: tuple[str, ...]
    new: bool = True
    whole: bool = False
    folder: bool = False
    bare: bool = False
    rebuilt: bool = False
    shared: bool = False
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unnamed:
    """Files that name no weights: what their tensors are called here, what helps instead of a file as a source or template."""

    tensor: str
    source: str
    template: str


def no_chain(settings: Mapping[str, Any]) -> bool:
    return False


def any_chain(settings: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Framework:
    """One framework: modules of its reader and writer, its convention (`module:name`), its files (the usual format first).

    `target` is the module that decides which native class a canonical layer becomes where there is no template. `rewriter`
    is the module that knows what the framework's own description of a model can be written as again. `packages` are what
    a live model or a file that only the framework itself can write needs, `extra` what installs them. `signature` knows its
    files and `live` its objects. `chain` says of a model whose layers are in the order of computation whether no two stand
    side by side. `runners` maps formats to the functions (`module:name`) with which `verify` runs them; `rebuilt_in` lists
    the frameworks in which it runs weights of a known graph, which these write and run as `rebuilds`. `separator` stands
    between the levels of a new tensor's name. `also` lists frameworks whose suffixes mean theirs when this one is named. A
    `canonical` one stores canonical tensors as they are; files of one with `classes` name each layer's class; one that
    loads `by_place` finds a weight by the place of its layer; `unnamed` says of one whose files name no weights what to do
    with these; in trees of one that keeps layers `by_name` they stand in the order of their names, which tells nothing of the
    order of computation.
    """

    name: str
    exporter: str
    importer: str
    convention_at: str
    files: tuple[Format, ...]
    target: str | None = None
    rewriter: str | None = None
    packages: tuple[str, ...] = ()
    extra: str | None = None
    signature: Signature = field(default=never)
    live: Live = field(default=lambda model: False)
    chain: Callable[[Mapping[str, Any]], bool] = field(default=no_chain)
    runners: Mapping[str, str] = field(default_factory=dict)
    rebuilds: tuple[str, str] | None = None
    rebuilt_in: tuple[str, ...] = ("torch", "keras")
    separator: str = "."
    also: tuple[str, ...] = ()
    canonical: bool = False
    classes: bool = False
    by_place: bool = False
    unnamed: Unnamed | None = None
    by_name: bool = False

    @property
    def formats(self) -> Mapping[str, Format]:
        """The formats that are read, by name."""
        return {file.name: file for file in self.files if file.reads}

    @property
    def reads(self) -> tuple[str, ...]:
        """The formats that are read, in words."""
        return tuple(file.reads for file in self.formats.values())

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes that are written."""
        return tuple(dict.fromkeys(suffix for file in self.files if file.new for suffix in file.suffixes))

    @property
    def own_suffixes(self) -> tuple[str, ...]:
        """Those of them that need no word of whose they are."""
        return tuple(suffix for file in self.files if file.new and not file.shared for suffix in file.suffixes)

    def written_as(self, out: Path) -> Format:
        """The format of a new file of this name."""
        named = (file for file in self.files if file.new and suffix_of(out) in file.suffixes)
        bare = (file for file in self.files if file.new and file.bare)
        return next(named, None) or next(bare, None) or self.usual(whole=False)

    def usual(self, whole: bool) -> Format:
        """The format of a new file that nobody named, a `whole` model or weights."""
        new = [file for file in self.files if file.new]
        return next((file for file in new if whole or not file.whole), new[0])

    def reader(self) -> ModuleType:
        return importlib.import_module(self.exporter)

    def writer(self) -> ModuleType:
        return importlib.import_module(self.importer)

    def targets(self) -> ModuleType:
        """The module that chooses native classes."""
        assert self.target is not None, self.name
        return importlib.import_module(self.target)

    def convention(self) -> Convention:
        found: Convention = named_object(self.convention_at)
        return found

    def describes(self, settings: Mapping[str, Any], source_format: str, form: Format) -> bool:
        """Whether the settings of a source hold a description of its model that can be written again in a format."""
        if self.rewriter is None:
            return False
        return bool(importlib.import_module(self.rewriter).describes(settings, source_format, form.name))

    def installed(self) -> dict[str, str | None]:
        """The version of each package of the framework, None where it is not installed."""
        return {package: _version(package) for package in self.packages}


def named_object(where: str) -> Any:
    """What `module:name` names.

    >>> named_object("math:pi")
    3.141592653589793
    """
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


_DISTRIBUTIONS = {
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-macos", "tensorflow-intel"),
    "paddle": ("paddlepaddle", "paddlepaddle-gpu"),
}
"""The distributions of a package that is called otherwise."""


def _version(package: str) -> str | None:
    for name in _DISTRIBUTIONS.get(package, (package,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
