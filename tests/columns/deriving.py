"""A column's rows from the torch rows of a case: a table says, for each torch class, the framework's rows.

Rows with lower-case classes are operations, the same in every column that is derived here (channels last):

    relu tanh                  applied to each value
    flatten                    (n, ...) -> (n, features)
    reshape(shape)             (n, ...) -> (n, *shape)
    transpose(axes)
    pad(pairs)                 zeros around the axes behind the batch, a (before, behind) pair for each
    max_pool(window)           strides are the window
    mean                       over space; space is gone
    fold / unfold(steps)       (n, t, ...) -> (n t, ...) and back
    concat add last            along the last axis; of two values; the last time step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.zoo import Case, Layer, Model, channels_last

Step = Callable[[Case, Layer], Sequence[Layer]]
Instead = str | Callable[[Case], Sequence[Layer]]
SEPARATE_FLATTENING = ("conv2d_permute_flatten_dense", "conv2d_channels_first_plain_flatten_dense")


class Absent(Exception):
    """The framework has no such layer; the message says why."""


def derive(case: Case, steps: Mapping[str, Step], instead: Mapping[str, Instead]) -> Model | str:
    """The model of a case: from `instead` where the case is named there, else from its torch rows."""
    try:
        other = instead.get(case.name)
        if isinstance(other, str):
            return other
        rows = other(case) if other else translated(case, case.models["torch"].layers, steps)
    except Absent as absent:
        return str(absent)
    inputs = tuple(channels_last(one.axes) for one in case.inputs)
    return Model("graph", tuple(rows), inputs, channels_last(case.output))


def translated(case: Case, rows: Sequence[Layer], steps: Mapping[str, Step]) -> list[Layer]:
    """The first row that a torch row becomes is applied to what the torch row was applied to."""
    found: list[Layer] = []
    for row in rows:
        if row.inside:
            found.append(Layer(row.name, "Container", {}, tuple(translated(case, row.inside, steps)), row.of))
            continue
        step = steps.get(row.cls)
        if step is None:
            if row.cls[0].isupper():
                raise Absent(f"no {row.cls}")
            found.append(row)
            continue
        made = step(case, row)
        found += [replace(one, of=row.of) for one in made[:1]] + list(made[1:])
    return found


def operation(cls: str, **args: Any) -> Step:
    return lambda case, row: [Layer(row.name, cls, args)]


def flatten(case: Case, row: Layer) -> Sequence[Layer]:
    """Torch's order of features is kept where a case says that it is."""
    flat = Layer(row.name, "flatten", {})
    if case.name in SEPARATE_FLATTENING:
        return [Layer(f"{row.name}_first", "transpose", {"axes": (0, 3, 1, 2)}), flat]
    return [flat]


def unflatten(case: Case, row: Layer) -> Sequence[Layer]:
    """Features become a feature map: channels first in torch, last here."""
    channels, *space = row.args["unflattened_size"]
    return [Layer(row.name, "reshape", {"shape": (*space, channels)})]


def no_statistics(layer: str) -> Step:
    """An instance norm without statistics."""

    def step(case: Case, row: Layer) -> Sequence[Layer]:
        if row.args.get("track_running_stats"):
            raise Absent(f"{layer} keeps no statistics")
        return [Layer(row.name, layer, {"num_features": row.args["num_features"], "epsilon": row.args["eps"]})]

    return step


OPERATIONS: dict[str, Step] = {
    "ReLU": operation("relu"),
    "Tanh": operation("tanh"),
    "Flatten": flatten,
    "Unflatten": unflatten,
    "MaxPool2d": lambda case, row: [Layer(row.name, "max_pool", {"window": (row.args["kernel_size"],) * 2})],
    "AdaptiveAvgPool2d": operation("mean"),
    "Dropout": lambda case, row: [Layer(row.name, "Dropout", {"rate": row.args["p"]})],
}


def many(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """`many(2, 3)` and `many((2, 2, 2), 3)` are (2, 2, 2)."""
    return (value,) * rank if isinstance(value, int) else tuple(value)


def levels(case: Case, row: Layer) -> list[tuple[str, int]]:
    """The name and the number of inputs of each level of a recurrent layer."""
    depth = row.args.get("num_layers", 1)
    size = row.args["hidden_size"] * (2 if row.args.get("bidirectional") else 1)
    names = case.stacks.get(row.name) or tuple(f"{row.name}_{i}" for i in range(depth))
    if depth == 1:
        names = (row.name,)
    return [(name, size if i else row.args["input_size"]) for i, name in enumerate(names)]
