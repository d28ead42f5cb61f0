"""The layout language against a reference in plain numpy that goes element by element."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neutral.containers.files import Memory
from neutral.errors import BadLayout
from neutral.layout import layout, parse
from neutral.native import Stored, from_array

NAMES = ("out", "in", "gate", "unit", "dim_2", "x", "h")
LETTERS = "abcdefgAB"


@dataclass(frozen=True)
class Side:
    """One side of a random layout: groups of (name, letters, reversed); the group `...` has the name alone."""

    groups: tuple[tuple[tuple[str, str, bool], ...], ...]

    def __str__(self) -> str:
        words = []
        for group in self.groups:
            axes = [f"{'~' if back else ''}{name}{f':{letters}' if letters else ''}" for name, letters, back in group]
            words.append(axes[0] if len(axes) == 1 else f"({' '.join(axes)})" if axes else "1")
        return " ".join(words)


@dataclass(frozen=True)
class Case:
    canonical: Side
    native: Side
    sizes: dict[str, int]
    spatial: tuple[int, ...]

    def shape(self, side: Side) -> tuple[int, ...]:
        out: list[int] = []
        for group in side.groups:
            names = [name for name, _, _ in group]
            out.extend(self.spatial if names == ["..."] else [math.prod(self.sizes[name] for name in names)])
        return tuple(out)

    def index(self, side: Side, coordinate: dict[str, int | str], position: tuple[int, ...]) -> tuple[int, ...]:
        """Where an element lies: its coordinate is a number per axis, or the letter of its block."""
        out: list[int] = []
        for group in side.groups:
            if [name for name, _, _ in group] == ["..."]:
                out.extend(position)
                continue
            at = 0
            for name, letters, back in group:
                n = self.sizes[name]
                where = letters.index(str(coordinate[name])) if letters else int(coordinate[name])
                at = at * n + (n - 1 - where if back else where)
            out.append(at)
        return tuple(out)

    def reference(self, array: np.ndarray, source: Side, target: Side) -> np.ndarray:
        out = np.empty(self.shape(target), array.dtype)
        names = list(self.sizes)
        labels = {name: letters for group in source.groups for name, letters, _ in group if letters}
        for place in np.ndindex(*self.sizes.values()):
            coordinate: dict[str, int | str] = {
                name: sorted(labels[name])[i] if name in labels else i for name, i in zip(names, place, strict=True)
            }
            for position in np.ndindex(*self.spatial):
                out[self.index(target, coordinate, position)] = array[self.index(source, coordinate, position)]
        return out


@st.composite
def cases(draw: st.DrawFn) -> Case:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4))
    labelled = [name for name in names if draw(st.booleans())]
    letters = {name: draw(st.integers(1, 4)) for name in labelled}
    sizes = {name: letters.get(name) or draw(st.integers(1, 4)) for name in names}
    spatial = tuple(draw(st.lists(st.integers(1, 3), max_size=2))) if draw(st.booleans()) else None

    def side(blocks: dict[str, str]) -> Side:
        axes = [(name, blocks.get(name, ""), draw(st.booleans())) for name in draw(st.permutations(names))]
        groups: list[tuple[tuple[str, str, bool], ...]] = []
        while axes:
            count = draw(st.integers(1, len(axes)))
            groups.append(tuple(axes[:count]))
            axes = axes[count:]
            if draw(st.integers(0, 5)) == 0:
                groups.append(())
        if spatial is not None:
            groups.insert(draw(st.integers(0, len(groups))), (("...", "", False),))
        return Side(tuple(groups))

    alphabet = {name: LETTERS[:n] for name, n in letters.items()}
    sides = [side({name: "".join(draw(st.permutations(text))) for name, text in alphabet.items()}) for _ in range(2)]
    return Case(sides[0], sides[1], sizes, spatial or ())


@settings(max_examples=600, deadline=None)
@given(cases())
def test_both_directions_are_the_reference_and_inverse(case: Case) -> None:
    way = layout(str(case.canonical), str(case.native))
    for source, target, go, back in (
        (case.native, case.canonical, way.to_canonical, way.to_native),
        (case.canonical, case.native, way.to_native, way.to_canonical),
    ):
        array = np.arange(math.prod(case.shape(source)), dtype=np.int32).reshape(case.shape(source))
        for tensor in (from_array(array), Stored(Memory(array.astype(">i4").tobytes()), array.shape, ">i4")):
            moved = go(tensor, case.sizes)
            assert moved.shape == case.shape(target)
            assert np.array_equal(moved.read(), case.reference(array, source, target))
            assert np.array_equal(back(moved, case.sizes).read(), array)


@settings(max_examples=300, deadline=None)
@given(cases(), st.data())
def test_bind_finds_the_sizes_or_refuses(case: Case, data: st.DataObject) -> None:
    way = layout(str(case.canonical), str(case.native))
    for side, bind in ((case.native, way.bind), (case.canonical, way.bind_canonical)):
        shape = case.shape(side)
        found = bind(shape, case.sizes)
        assert {name: found[name] for name in case.sizes} == case.sizes
        assert tuple(found[f"x{i}"] for i in range(len(case.spatial))) == case.spatial
        if not shape:
            continue
        place = data.draw(st.integers(0, len(shape) - 1))
        if any(group == (("...", "", False),) for group in side.groups):
            continue
        wrong = (*shape[:place], shape[place] + 1, *shape[place + 1 :])
        with pytest.raises(BadLayout) as raised:
            bind(wrong, case.sizes)
        assert repr(str(side)) in str(raised.value) and f"shape {wrong}" in str(raised.value)
        if ("...",) not in [tuple(name for name, _, _ in group) for group in side.groups]:
            with pytest.raises(BadLayout):
                bind((*shape, 1), case.sizes)
            with pytest.raises(BadLayout):
                bind(shape[:-1], case.sizes)


def test_labels_are_permuted_as_they_are_named() -> None:
    """Keras keeps a GRU's gates as z r n, the archive as r z n."""
    blocks = {"z": [0.0, 1.0], "r": [10.0, 11.0], "n": [20.0, 21.0]}
    keras = np.array([[*blocks["z"], *blocks["r"], *blocks["n"]]])
    canonical = layout("gate:rzn unit in", "in (gate:zrn unit)").to_canonical(from_array(keras)).read()
    assert canonical[:, :, 0].tolist() == [blocks["r"], blocks["z"], blocks["n"]]


def test_reversed_axes_run_backwards() -> None:
    array = np.arange(6).reshape(2, 3)
    assert np.array_equal(layout("a b", "a ~b").to_canonical(from_array(array)).read(), array[:, ::-1])
    assert np.array_equal(layout("~a b", "~a b").to_canonical(from_array(array)).read(), array)
    assert np.array_equal(layout("a b", "(~a b)").to_native(from_array(array)).read(), array[::-1].reshape(-1))


@pytest.mark.parametrize(
    ("expression", "shape", "sizes"),
    [
        ("out in", (3,), {}),
        ("out in", (3, 4, 5), {}),
        ("in (gate:zrn unit)", (5, 13), {}),
        ("(a b)", (6,), {}),
        ("(a b)", (7,), {"a": 2}),
        ("(a b)", (6,), {"a": 2, "b": 4}),
        ("a:xyz", (4,), {}),
        ("a b", (2, 3), {"b": 4}),
        ("a 1", (2, 2), {}),
        ("... a b", (2,), {}),
        ("a:xy", (2,), {"a": 3}),
        ("(a b)", (5,), {"a": 0}),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(expression: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    way = layout(expression, expression)
    for bind in (way.bind, way.bind_canonical):
        with pytest.raises(BadLayout) as raised:
            bind(shape, sizes)
        (problem,) = raised.value.problems
        assert problem.where == repr(expression) and problem.found == f"shape {shape}" and problem.expected
    with pytest.raises(BadLayout):
        way.to_native(from_array(np.zeros(shape)), sizes)


@pytest.mark.parametrize(
    "expression",
    [
        "(a",
        "a)",
        "((a))",
        "a a",
        "(a b) a",
        "... ...",
        "a, b",
        "A",
        "a:",
        "2",
        "a:xx",
        "~",
        "a-b",
        "(a ...)",
        "(... )b(c ...)",
        "x0 ...",
        "é",
    ],
)
def test_a_malformed_expression_is_refused(expression: str) -> None:
    with pytest.raises(BadLayout) as raised:
        parse(expression)
    assert raised.value.problems[0].where == repr(expression)


@pytest.mark.parametrize(
    ("canonical", "native"), [("a b", "a"), ("a", "a b"), ("a:xy", "a"), ("a:xy", "a:xz"), ("a ...", "a"), ("a", "b")]
)
def test_sides_that_differ_are_refused(canonical: str, native: str) -> None:
    with pytest.raises(BadLayout) as raised:
        layout(canonical, native)
    assert repr(canonical) in str(raised.value) and repr(native) in str(raised.value)


def test_axes_without_elements() -> None:
    way = layout("gate:ab unit in", "in (gate:ba unit)")
    empty = from_array(np.zeros((0, 6), np.float32))
    assert way.to_canonical(empty).shape == (2, 3, 0)
    assert way.to_native(way.to_canonical(empty)).read().shape == (0, 6)
    assert layout("", "1 1").to_canonical(from_array(np.ones((1, 1)))).shape == ()
    assert layout("", "1 1").to_native(from_array(np.array(3.0))).read().tolist() == [[3.0]]
