"""What neutral refuses, and how it says so.

>>> from neutral.errors import Refused, Problem
>>> str(Refused(Problem("fc1", "512 input features", "to know whether they follow a Flatten", "pass --flatten fc1=CHANNELS")))
'fc1: found 512 input features, expected to know whether they follow a Flatten, pass --flatten fc1=CHANNELS'

Every problem has four parts: where, what was found, what was expected, what to do. Problems are collected before
anything is raised, so that a user sees all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

_LONGEST = 400


def printable(text: object, limit: int = _LONGEST) -> str:
    r"""Text that came out of a file, made safe to print: control characters escaped, long text cut.

    >>> printable("a\x1b[31mb\n")
    'a\\x1b[31mb\\n'
    """
    raw = str(text)
    safe = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in raw[: limit + 1]
    )
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def named(path: str) -> str:
    """A layer's path in words: a bare module's state dict has one layer, whose path is empty.

    >>> named("fc1"), named("")
    ('fc1', 'the model itself')
    """
    return path or "the model itself"


_AN = re.compile(r"[aeio]|u(?!ni|int)|(lstm|rms|rnn)", re.IGNORECASE)


def an(noun: str) -> str:
    """A noun with its article.

    >>> an("embedding"), an("lstm"), an("dense")
    ('an embedding', 'an lstm', 'a dense')
    """
    return f"{'an' if _AN.match(noun) else 'a'} {noun}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what was found, what was expected, what to do about it."""

    where: str
    found: str
    expected: str = ""
    do: str = ""

    def __str__(self) -> str:
        parts = [f"found {self.found}"]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.do:
            parts.append(self.do)
        return printable(named(self.where)) + ": " + ", ".join(printable(part, 1000) for part in parts)


class NeutralError(Exception):
    """The base of all that neutral raises on purpose. Holds one or more problems."""

    def __init__(self, *problems: Problem) -> None:
        self.problems: tuple[Problem, ...] = problems
        super().__init__(*problems)

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self.problems)


class BadFile(NeutralError):
    """A file is broken, hostile, or not what it says it is."""


class Refused(NeutralError):
    """The request is understood, and answering it could give wrong weights."""


class Unsupported(NeutralError):
    """A format, framework or package that this installation cannot serve."""


class BadLayout(NeutralError):
    """A layout expression that is malformed, or does not fit the shape it is applied to."""


class WrongUsage(NeutralError):
    """The request itself makes no sense: an unknown name, options that exclude each other."""


@contextmanager
def reworded(said: str, meant: str) -> Iterator[None]:
    """What is refused inside the block, in the words of who asked: a reader knows no option but its own `--key`."""
    try:
        yield
    except NeutralError as error:
        raise type(error)(
            *(
                replace(p, **{part: getattr(p, part).replace(said, meant) for part in ("found", "expected", "do")})
                for p in error.problems
            )
        ) from error


def misread(where: object, names: Sequence[str]) -> NeutralError:
    """An output that holds something else than it should, found by reading it back."""
    return NeutralError(
        Problem(
            str(where),
            f"{', '.join(names[:5])} read back other than written",
            "what was meant to be written",
            "nothing was left behind; please report this",
        )
    )


def raise_all(kind: type[NeutralError], problems: Iterable[Problem]) -> None:
    """Raise `kind` with all the problems, or return if there are none."""
    found = tuple(problems)
    if found:
        raise kind(*found)
