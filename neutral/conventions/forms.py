"""What a convention is made of.

A convention is a tuple of forms. A `Form` says how one native class stores one or more canonical layers; a `Part` is
one of these layers; a `Row` is one line of the table: canonical role, native name, native axes. Reader and writer are
the two directions of the same row.

    Row("kernel", "weight", "out in")                       torch's Linear
    Row("input_kernel", "weight_ih_l{level}{direction:|_reverse}", "(gate:ifgo unit) in")

A brace in a native name is an axis across tensors: its alternatives, in the axis' order, stand between bars. A brace
in a role is an axis across roles. `{level}` counts the layers of a stack, which become layers of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

from neutral.schema.kinds import KINDS, Layer

Config = Mapping[str, Any]
Sizes = Mapping[str, int]
Attributes = Callable[[Config, Sizes], dict[str, Any]]
Shapes = Mapping[str, tuple[int, ...]]

LETTERS: dict[str, str] = {
    "input": "i", "forget": "f", "cell": "g", "output": "o",
    "reset": "r", "update": "z", "new": "n", "recurrent": "r",
}  # fmt: skip
"""The letter that stands for a labelled block in a layout expression."""

INPUT_RANK = "input_rank"
"""A setting that readers add to layers which count axes: how many axes the layer's input has."""


def from_last(axes: Any, rank: Any) -> int | tuple[int, ...] | None:
    """Axes of a config, counted from the last one where the rank is known; None where they are not given.

    >>> from_last(-1, None), from_last([3], 4), from_last([1, 2], 4), from_last(1, None)
    (-1, -1, (-3, -2), 1)
    """
    listed = list(axes) if isinstance(axes, list | tuple) else [axes]
    if not listed or any(type(axis) is not int for axis in listed):
        return None
    found = tuple(axis - rank if axis >= 0 and type(rank) is int else axis for axis in listed)
    return found[0] if len(found) == 1 else found


_BRACE = re.compile(r"\{(\w+)(?::([^}]*))?\}")


@dataclass(frozen=True)
class Name:
    """One concrete tensor or role name that a pattern stands for, and its place along each brace's axis."""

    text: str
    place: tuple[int, ...]


@lru_cache(maxsize=4096)
def expand(pattern: str, level: int = 0) -> tuple[Name, ...]:
    """All the names of a pattern.

    >>> [n.text for n in expand("bias_{side:ih|hh}_l{level}", 2)]
    ['bias_ih_l2', 'bias_hh_l2']
    """
    pattern = pattern.replace("{level}", str(level))
    pieces = _BRACE.split(pattern)
    literals, braces = pieces[0::3], [text.split("|") for text in pieces[2::3]]
    names = []
    for place in product(*(range(len(options)) for options in braces)):
        text = literals[0]
        for options, i, literal in zip(braces, place, literals[1:], strict=True):
            text += options[i] + literal
        names.append(Name(text, place))
    return tuple(names)


@lru_cache(maxsize=4096)
def brace_axes(pattern: str) -> tuple[tuple[str, int], ...]:
    """The axes that a pattern's braces stand for, with their sizes."""
    return tuple((name, len(options.split("|"))) for name, options in _BRACE.findall(pattern.replace("{level}", "0")))


@lru_cache(maxsize=1024)
def role_expression(kind: str, role: str) -> str:
    """A role's canonical axes as a layout expression, labels included.

    >>> role_expression("gru", "bias")
    'side:ir gate:rzn unit'
    """
    spec = KINDS[kind].parameters_of[role]
    words = []
    for axis in spec.axes:
        letters = "".join(LETTERS[label] for label in spec.labels.get(axis, ()))
        words.append(f"{axis}:{letters}" if letters else axis)
    return " ".join(words)


@dataclass(frozen=True)
class Row:
    """One parameter: canonical `role`, native `name`, native axes.

    `canonical` replaces the kind's own axes where the native form needs finer ones. `rule` names a change of values
    (see rules.py). A `raw` row has no canonical axes: its tensor is kept as it is.
    """

    role: str
    name: str
    native: str = ""
    canonical: str = ""
    rule: str = ""
    required: bool = False
    raw: bool = False


def no_attributes(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {}


def any_sizes(sizes: Sizes) -> bool:
    return True


@dataclass(frozen=True)
class Part:
    """One canonical layer in a native one. `check` says whether the bound axis sizes can be true.

    `any_reset`: a GRU of two biases whose reset gate may act before or after the product, as its config says.
    `sizes`: those of fused axes, where the config says them.
    """

    kind: str
    rows: tuple[Row, ...]
    suffix: str = ""
    attributes: Attributes = no_attributes
    check: Callable[[Sizes], bool] = any_sizes
    any_reset: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """How the native `classes` store their layers.

    `applies` looks at the native config where there is one. `levels`: the single part repeats per level of a stack.
    `guessable`: the form may be recognised from names and shapes where neither class nor hint is known. `says`: the setting
    to which it applies, as a hint tells it (`transpose_kernel=false`), where no file does. `vague`: nothing but that setting tells what the axes are.
    """

    classes: tuple[str, ...]
    parts: tuple[Part, ...]
    levels: bool = False
    guessable: bool = True
    applies: Callable[[Config], bool] = field(default=lambda config: True)
    says: str = ""
    vague: bool = False


@dataclass(frozen=True)
class Convention:
    """All that neutral knows of how one framework stores layers.

    `forms`: the table, most specific first; `build` may add forms that depend on a layer's config (einsum equations).
    `flatten`: how a Flatten orders what it joins, as a layout expression of `channel` and `position`.
    `deciding`: what of a layer's config and local shapes tells its form where class and canonical tensors do not.
    `auto_names`: the name that the framework gives to an unnamed layer of a class, without its number -> the class.
    `kinds`: layer kinds that neutral does not have; only the convention of a plug-in has any.
    `advice`: what to do with a layer that no other framework has, by its setting, or its tensor, that they do not have.
    """

    framework: str
    forms: tuple[Form, ...]
    flatten: str
    build: Callable[[str, Config], tuple[Form, ...]] = field(default=lambda cls, config: ())
    deciding: Callable[[Config, Shapes], dict[str, Any]] = field(default=lambda config, shapes: {})
    auto_names: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[type[Layer], ...] = ()
    advice: Mapping[str, str] = field(default_factory=dict)


def same_family(a: Convention, b: Convention) -> bool:
    """True if both store every layer alike."""
    return a.forms is b.forms


def layer(
    kind: str | type[Layer],
    *rows: Row,
    attributes: Attributes = no_attributes,
    check: Callable[[Sizes], bool] = any_sizes,
    suffix: str = "",
) -> Part:
    """A part, its required rows marked from the kind's own table. A kind of a plug-in is given as its class."""
    cls = KINDS[kind] if isinstance(kind, str) else kind
    spec = cls.parameters_of
    marked = tuple(
        Row(
            r.role,
            r.name,
            r.native,
            r.canonical,
            r.rule,
            r.required or (r.role in spec and spec[r.role].required),
            r.raw,
        )
        for r in rows
    )
    return Part(str(cls.model_fields["kind"].default), marked, suffix, attributes, check)
