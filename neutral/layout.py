"""The layout language: how a native tensor's axes relate to the canonical ones.

>>> import numpy as np
>>> from neutral.native import from_array
>>> keras_dense = layout("out in", "in out")
>>> keras_dense.to_canonical(from_array(np.zeros((784, 10)))).shape
(10, 784)
>>> keras_gru = layout("gate:rzn unit in", "in (gate:zrn unit)")
>>> keras_gru.to_canonical(from_array(np.zeros((5, 12)))).shape
(3, 4, 5)
>>> keras_gru.bind((5, 13))
Traceback (most recent call last):
neutral.errors.BadLayout: 'in (gate:zrn unit)': found shape (5, 13), expected (gate:zrn unit) to divide 13

The notation is einops' where einops has it: names are axes, `...` the spatial axes, `(a b)` one axis that holds two,
row-major, `1` an axis of size one. `gate:zrn` names the blocks of an axis in storage order, one letter each; the same
axis on the other side has the same letters in its own order. `~k` is an axis stored backwards. Both directions come
from the one expression, so they are inverse by construction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from neutral.errors import BadLayout, Problem
from neutral.native import Tensor

_TOKEN = re.compile(r"\s*(?:(\.\.\.)|([()])|(~?)([a-z_][a-z_0-9]*)(?::([A-Za-z]+))?|(1))")


@dataclass(frozen=True)
class Axis:
    """One elementary axis: its name, the letters of its labelled blocks in storage order, whether it runs backwards."""

    name: str
    letters: str = ""
    reverse: bool = False

    def __str__(self) -> str:
        return ("~" if self.reverse else "") + self.name + (f":{self.letters}" if self.letters else "")


Group = tuple[Axis, ...]
"""The elementary axes that one stored axis holds; none for a stored axis of size one."""

_SPACE = Axis("...")


@lru_cache(maxsize=4096)
def parse(expression: str) -> tuple[Group, ...]:
    """The stored axes of one side, each as the elementary axes that it holds.

    >>> [tuple(str(axis) for axis in group) for group in parse("in (gate:zrn unit)")]
    [('in',), ('gate:zrn', 'unit')]
    """
    groups: list[Group] = []
    open_group: list[Axis] | None = None
    position = 0
    text = expression.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise BadLayout(Problem(repr(expression), f"{text[position:]!r}", "an axis name, '...', '1', '(' or ')'"))
        position = match.end()
        ellipsis, bracket, tilde, name, letters, one = match.groups()
        if bracket == "(":
            if open_group is not None:
                raise BadLayout(Problem(repr(expression), "a bracket inside a bracket", "one level of brackets"))
            open_group = []
        elif bracket == ")":
            if open_group is None:
                raise BadLayout(Problem(repr(expression), "')' without '('", "balanced brackets"))
            groups.append(tuple(open_group))
            open_group = None
        else:
            axes = () if one else ((_SPACE,) if ellipsis else (Axis(name, letters or "", bool(tilde)),))
            if open_group is not None:
                open_group.extend(axes)
            else:
                groups.append(axes)
    if open_group is not None:
        raise BadLayout(Problem(repr(expression), "'(' without ')'", "balanced brackets"))
    names = [axis.name for group in groups for axis in group]
    if len(set(names)) != len(names):
        raise BadLayout(Problem(repr(expression), "an axis named twice", "each axis once"))
    if any(len(set(axis.letters)) != len(axis.letters) for group in groups for axis in group):
        raise BadLayout(Problem(repr(expression), "a block named twice", "each letter of an axis once"))
    if any(_SPACE in group and group != (_SPACE,) for group in groups):
        raise BadLayout(Problem(repr(expression), "'...' among other axes of a bracket", "'...' by itself"))
    if "..." in names and any(re.fullmatch(r"x\d+", name) for name in names):
        raise BadLayout(Problem(repr(expression), "'...' beside an axis x0", "another name: '...' becomes x0 x1 x2"))
    return tuple(groups)


def _expanded(groups: Sequence[Group], spatial: int) -> tuple[Group, ...]:
    """`...` replaced by that many axes of its own."""
    out: list[Group] = []
    space = tuple(Axis(f"x{i}") for i in range(spatial))
    for group in groups:
        if group == (_SPACE,):
            out.extend((axis,) for axis in space)
        else:
            out.append(tuple(a for axis in group for a in (space if axis is _SPACE else (axis,))))
    return tuple(out)


@dataclass(frozen=True)
class Layout:
    """Canonical and native axes of one parameter, and the way between them. Made by `layout`."""

    canonical: str
    native: str

    def bind(self, shape: Sequence[int], sizes: Mapping[str, int] | None = None) -> dict[str, int]:
        """The size of each elementary axis, from a native shape (and `sizes` known before, which must agree)."""
        return _bind(self.native, shape, sizes or {})

    def bind_canonical(self, shape: Sequence[int], sizes: Mapping[str, int] | None = None) -> dict[str, int]:
        """The size of each elementary axis, from a canonical shape."""
        return _bind(self.canonical, shape, sizes or {})

    def to_canonical(self, tensor: Tensor, sizes: Mapping[str, int] | None = None) -> Tensor:
        """A view of a native tensor with canonical axes."""
        return _rearrange(tensor, self.native, self.canonical, sizes or {})

    def to_native(self, tensor: Tensor, sizes: Mapping[str, int] | None = None) -> Tensor:
        """A view of a canonical tensor with native axes."""
        return _rearrange(tensor, self.canonical, self.native, sizes or {})


@lru_cache(maxsize=4096)
def layout(canonical: str, native: str) -> Layout:
    """The layout of one parameter; both sides must have the same elementary axes and labels."""
    sides = []
    for expression in (canonical, native):
        axes = [axis for group in parse(expression) for axis in group]
        sides.append({axis.name: "".join(sorted(axis.letters)) for axis in axes})
    left, right = sides
    if left != right:
        differ = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
        raise BadLayout(
            Problem(f"{canonical!r} -> {native!r}", f"{', '.join(differ)} on one side only", "the same axes on both")
        )
    return Layout(canonical, native)


def _spatial(expression: str, rank: int) -> int:
    groups = parse(expression)
    plain = sum(1 for group in groups if group != (_SPACE,))
    return rank - plain if plain < len(groups) else 0


def _bind(expression: str, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
    groups = parse(expression)
    spatial = _spatial(expression, len(shape))
    groups = _expanded(groups, max(spatial, 0))
    if spatial < 0 or len(groups) != len(shape):
        raise BadLayout(Problem(repr(expression), f"shape {tuple(shape)}", f"{len(groups)} axes"))
    sizes = dict(known)
    if (_SPACE,) in parse(expression):
        _set(sizes, _SPACE.name, spatial, expression, shape)
    for group, size in zip(groups, shape, strict=True):
        for axis in group:
            if axis.letters:
                _set(sizes, axis.name, len(axis.letters), expression, shape)
        free = [axis.name for axis in group if axis.name not in sizes]
        fixed = math.prod(sizes[axis.name] for axis in group if axis.name in sizes)
        label = group[0] if len(group) == 1 else "(" + " ".join(str(axis) for axis in group) + ")"
        if len(free) > 1:
            raise BadLayout(
                Problem(repr(expression), f"shape {tuple(shape)}", f"the size of {' or '.join(free)} to be known")
            )
        if free:
            if fixed == 0 or size % fixed:
                raise BadLayout(Problem(repr(expression), f"shape {tuple(shape)}", f"{label} to divide {size}"))
            sizes[free[0]] = size // fixed
        elif fixed != size:
            raise BadLayout(Problem(repr(expression), f"shape {tuple(shape)}", f"{label or 'an axis'} of size {fixed}"))
    return sizes


def _set(sizes: dict[str, int], name: str, size: int, expression: str, shape: Sequence[int]) -> None:
    if sizes.setdefault(name, size) != size:
        raise BadLayout(Problem(repr(expression), f"shape {tuple(shape)}", f"{name} of size {size}, not {sizes[name]}"))


def _rearrange(tensor: Tensor, source: str, target: str, known: Mapping[str, int]) -> Tensor:
    sizes = _bind(source, tensor.shape, known)
    spatial = max(_spatial(source, len(tensor.shape)), 0)
    stored, wanted = _expanded(parse(source), spatial), _expanded(parse(target), spatial)
    position = 0
    for group in stored:
        tensor = tensor.split(position, [sizes[axis.name] for axis in group])
        position += len(group)
    have = [axis for group in stored for axis in group]
    want = [axis for group in wanted for axis in group]
    index = {axis.name: i for i, axis in enumerate(have)}
    goals = {axis.name: axis for axis in want}
    for i, axis in enumerate(have):
        goal = goals[axis.name]
        if axis.letters != goal.letters or axis.reverse != goal.reverse:
            tensor = tensor.take(i, _order(axis, goal, sizes[axis.name]))
    tensor = tensor.permute([index[axis.name] for axis in want])
    for position, group in enumerate(wanted):
        tensor = tensor.merge(position, len(group))
    return tensor


def _order(have: Axis, want: Axis, size: int) -> list[int]:
    stored: list[str | int] = list(have.letters) if have.letters else list(range(size))
    wanted: list[str | int] = list(want.letters) if want.letters else list(range(size))
    if have.reverse:
        stored.reverse()
    if want.reverse:
        wanted.reverse()
    where = {block: i for i, block in enumerate(stored)}
    return [where[block] for block in wanted]
