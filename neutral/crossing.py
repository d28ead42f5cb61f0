"""Which axes cross a Flatten or Reshape: as a graph or the user says, or, where nobody does, which ones may.

>>> conv, fc = Seen("conv", ((8, 3, 5, 5), (8,)), (("conv", {"out": 8, "in": 3}),)), Seen("fc", ((10, 128),), ())
>>> crossing = Crossing.of([conv, fc], "channel position")
>>> flattened("fc", "fc", "dense", {"out": 10, "in": 128}, Told({}, None), crossing)
({}, ('in', 'out'))
>>> flattened("fc", "fc", "dense", {"out": 10, "in": 128}, Told({}, {"fc": {"in": 8}}), crossing)
({'in': 8}, ())

Channels-first frameworks flatten to (channel position), the others to (position channel); shapes tell nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from neutral.errors import Problem, Refused

Splits = Mapping[str, Mapping[str, int]]
"""Per layer path the channels of the axes that cross; nothing for a layer that is known to cross none."""

WITH_SPACE = ("conv", "conv_transpose", "depthwise", "separable")
_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu")
MAY_CROSS = {"dense": ("in", "out"), "batch_norm": ("feature",), "layer_norm": ("feature",), "prelu": ("feature",)}


@dataclass(frozen=True)
class Told:
    """What is said of Flattens: by the model itself (`splits`; `certain` if it is no conclusion), and by the user.

    `wired`: the model has a graph, which then left out of `splits` what lies in an order that no channels describe; but for
    those `open`, of which it leaves open in which order they are.
    """

    splits: Splits
    hints: Splits | None
    certain: bool = True
    wired: bool = False
    open: frozenset[str] = frozenset()

    def of(self, path: str, native_path: str) -> Mapping[str, int] | None:
        """What anybody says of a layer; None if nobody does. An empty set of hints says that no layer crosses."""
        if self.hints is not None:
            told = self.hint(path, native_path)
            if told is not None or not self.hints:
                return told or {}
        return self.known(path, native_path)

    def hint(self, path: str, native_path: str) -> Mapping[str, int] | None:
        """What the user says of this very layer."""
        hints = self.hints or {}
        return hints.get(path, hints.get(native_path))

    def known(self, path: str, native_path: str) -> Mapping[str, int] | None:
        """What the model says of it."""
        return self.splits.get(path, self.splits.get(native_path))


@dataclass(frozen=True)
class Seen:
    """A layer in the order of the file: the shapes of its tensors, and kind and axis sizes of what is known in it."""

    path: str
    shapes: tuple[tuple[int, ...], ...]
    parts: tuple[tuple[str, Mapping[str, int]], ...] = ()


@dataclass(frozen=True)
class Crossing:
    """What a model without a graph tells of its Flattens: `channels` of its convolutions, which a Flatten could join;
    `joined`, the sizes of its dense layers; per layer path, kind and size made of the layer `before` it (no norm); and
    `unsettled`, the layers that stand behind one for certain."""

    channels: frozenset[int]
    joined: frozenset[int]
    before: Mapping[str, tuple[str, str, int]]
    unsettled: frozenset[str] = frozenset()

    @classmethod
    def of(cls, layers: Sequence[Seen], flatten: str, unsettled: frozenset[str] = frozenset()) -> Crossing:
        """From layers in the order of the file; `flatten` is the order in which their framework flattens."""
        channels: set[int] = set()
        joined: set[int] = set()
        before: dict[str, tuple[str, str, int]] = {}
        last = ("", "", 0)
        for layer in layers:
            if not layer.shapes:
                continue
            before[layer.path] = last
            if not layer.parts:
                channels.update(n for shape in layer.shapes if len(shape) >= 3 for n in shape)
                joined.update(n for shape in layer.shapes if len(shape) == 2 for n in shape)
                largest = max(layer.shapes, key=len)
                if len(largest) > 1:
                    kind = "dense" if len(largest) == 2 else "conv"
                    last = (layer.path, kind, largest[0 if flatten == "channel position" else -1])
            for kind, sizes in layer.parts:
                made = [sizes[axis] for axis in ("in", "out", "channel", "group") if axis in sizes]
                if kind in WITH_SPACE:
                    channels.update(made)
                if kind == "dense":
                    joined.update(made)
                depth = sizes["group"] * sizes["mult"] if "mult" in sizes else 0
                size = depth or next((sizes[n] for n in ("channel", "out", "feature", "unit") if n in sizes), 0)
                if kind not in _NORMS:
                    last = (layer.path, kind, size)
        return cls(frozenset(channels), frozenset(joined), before, unsettled)

    def may(self, path: str, kind: str, size: int) -> bool:
        """True if an axis of this size may join channels and positions, of one feature map or of several.

        A norm that does stands beside a dense layer of its size, and not behind a convolution that makes this size.
        """
        if not any(1 < c < size for c in self.channels):
            return False
        behind = self.follows(path, size) and self.before[path][1] != "dense"
        return kind == "dense" or (size in self.joined and not behind)

    def follows(self, path: str, size: int) -> bool:
        """True if the layer before makes just what an axis of this size takes."""
        return path in self.before and self.before[path][2] == size

    def asks(self, path: str, kind: str, axis: str, size: int, hints: Splits | None) -> bool:
        """True if it must be asked whether an axis crosses a Flatten.

        Where the user has listed layers that do, another is taken to cross none if it takes what the layer before it
        makes, unless it is a norm behind a dense layer that was listed as being in front of a Reshape.
        """
        if hints and axis == "out":
            return False
        if hints and self.follows(path, size):
            return kind != "dense" and "out" in hints.get(self.before[path][0], {})
        return (axis != "out" and path in self.unsettled) or self.may(path, kind, size)

    def doubts(self, path: str, candidates: Sequence[str], sizes: Iterable[int], told: Told) -> tuple[str, ...]:
        """The axes of a layer of unknown kind that may cross a Flatten, whichever of its candidates it is."""
        sizes = set(sizes)
        pairs = {(kind, axis) for kind in candidates for axis in MAY_CROSS.get(kind, ())}
        listed = told.hints and any(self.follows(path, n) for n in sizes)
        asked = {axis for kind, axis in pairs if any(self.asks(path, kind, axis, n, told.hints) for n in sizes)}
        return () if listed and "feature" not in asked else tuple(sorted(asked))


def flattened(
    path: str, native_path: str, kind: str, sizes: Mapping[str, int], told: Told, crossing: Crossing
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The axes of a layer that cross a Flatten with their channels, and those of which that is not known.

    `Refused` for channels that do not divide the axis, and for a hint that the model contradicts.
    """
    hint, known = told.hint(path, native_path), told.known(path, native_path)
    if kind not in MAY_CROSS:
        if hint is not None:
            expected = f"one of {', '.join(MAY_CROSS)}, which alone can be behind a Flatten"
            raise Refused(Problem("flatten", f"a hint for a {kind}", expected, "leave the hint out"))
        return {}, ()
    axes = {axis: sizes[axis] for axis in MAY_CROSS[kind] if axis in sizes}
    given = told.of(path, native_path)
    if given is None:
        asked = (axis for axis, n in axes.items() if crossing.asks(native_path, kind, axis, n, told.hints))
        return {}, tuple(asked)
    channels = _divided(given, axes)
    if told.wired and known is None and channels and native_path not in told.open:
        expected = "none: the graph gives its elements in an order that no number of channels describes"
        raise Refused(Problem("flatten", f"the hint {_said(channels)}", expected, "leave the hint out"))
    if told.certain and told.hints is not None and known is not None and channels != _divided(known, axes):
        found, expected = _said(channels), f"{_said(_divided(known, axes))}, as the model itself says"
        raise Refused(Problem("flatten", f"the hint {found}", expected, "leave the hint out"))
    return channels, ()


def _said(channels: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={n}" for axis, n in channels.items()) or "none"


def _divided(given: Mapping[str, int], axes: Mapping[str, int]) -> dict[str, int]:
    """Channels by axis, without those that leave the axis as it is."""
    wanted = {("feature" if "feature" in axes else axis): n for axis, n in given.items()}
    for axis, n in wanted.items():
        if axis not in axes or n <= 0 or axes[axis] % n:
            found = f"{n} channels for {axes.get(axis, 'no')} elements"
            raise Refused(Problem(axis, found, "channels that divide the elements", "correct the number of channels"))
    return {axis: n for axis, n in wanted.items() if 1 < n < axes[axis]}
