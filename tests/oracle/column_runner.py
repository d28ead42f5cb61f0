"""What the runners of the columns share: the answers to `build`, `forward` and `unseen`, from a framework's few functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.columns import model_of
from tests.oracle.process import Handler
from tests.zoo import Case, Layer, Model, cases, make_inputs, permute

Arrays = dict[str, np.ndarray]


class Unwritable(Exception):
    """The framework itself cannot write this format; the message says why."""


@dataclass(frozen=True)
class Side:
    """A framework: how its models are made, filled, run, saved and loaded.

    `make(case, model, dtype)` gives the framework's model with unset tensors, once for a case; `tensors` their names
    and values; `fill` a model with all of these values in their places; `run` its output in the model's own axes.
    `load(made, file)` fills a model from a file by the framework's own means, and checks names, shapes and dtypes
    where those do not.
    """

    name: str
    number: int
    formats: Sequence[str]
    make: Callable[[Case, Model, str], Any]
    tensors: Callable[[Any], Arrays]
    fill: Callable[[Any, Arrays], Any]
    run: Callable[[Any, Sequence[np.ndarray]], np.ndarray]
    save: Callable[[Any, Path, str], Path]
    load: Callable[[Any, Path], Any]


def random_value(name: str, like: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Variances and the sizes of normalized weights are positive."""
    last = name.replace("/", ".").rsplit(".", 1)[-1]
    value = np.asarray(rng.standard_normal(like.shape)) * 0.5
    if last in ("var", "running_var"):
        value = rng.uniform(0.5, 1.5, like.shape)
    if name.endswith("kernel/scale") or ".scales." in name:
        value = rng.uniform(0.3, 1.5, like.shape)
    return np.asarray(value).astype(like.dtype)


def model(side: Side, case: Case) -> Model:
    found = model_of(case, side.name)
    if isinstance(found, str):
        raise ValueError(f"{side.name} has no {case.name}: {found}")
    return found


def filled(side: Side, made: Any, seed: int) -> Any:
    rng = np.random.default_rng((seed, side.number))
    return side.fill(made, {name: random_value(name, like, rng) for name, like in side.tensors(made).items()})


def run(side: Side, case: Case, made: Any, arrays: Sequence[np.ndarray]) -> np.ndarray:
    ours = model(side, case)
    moved = [permute(array, one.axes, to) for array, one, to in zip(arrays, case.inputs, ours.inputs, strict=True)]
    return permute(side.run(made, moved), ours.output, case.output)


def handlers(side: Side) -> Mapping[str, Handler]:
    @cache
    def made_once(case: str, equal: bool, dtype: str) -> Any:
        it = cases(equal)[case]
        return side.make(it, model(side, it), dtype)

    def fresh(case: str, seed: int, equal: bool, dtype: str) -> Any:
        return filled(side, made_once(case, equal, dtype), seed)

    def build(
        case: str, seed: int, folder: str, equal: bool, formats: list[str] | None, dtype: str, weights: str | None
    ) -> dict[str, Any]:
        it = cases(equal)[case]
        made = fresh(case, seed, equal, dtype)
        if weights is not None:
            with np.load(weights) as given:
                made = side.fill(made, {name: given[name] for name in given.files})
        wanted = formats if formats is not None else side.formats[:1]
        files: dict[str, str] = {}
        missing: dict[str, str] = {}
        for kind in wanted:
            try:
                files[kind] = str(side.save(made, Path(folder), kind))
            except Unwritable as reason:
                missing[kind] = str(reason)
        inputs = make_inputs(it, seed, dtype)
        arrays = {f"input{i}": array for i, array in enumerate(inputs)}
        arrays |= {f"weights/{name}": array for name, array in side.tensors(made).items()}
        path = Path(folder) / f"{side.name}.npz"
        np.savez(path, output=run(side, it, made, inputs), **arrays)
        return {"files": files, "missing": missing, "arrays": str(path), "inputs": len(inputs)}

    def forward(case: str, file: str, arrays: str, equal: bool, dtype: str) -> dict[str, Any]:
        it = cases(equal)[case]
        with np.load(arrays) as given:
            inputs = [given[f"input{i}"] for i in range(len(given.files))]
        made = side.load(fresh(case, 10**6, equal, dtype), Path(file))
        np.savez(arrays, output=run(side, it, made, inputs))
        return {}

    def unseen(case: str, seed: int, equal: bool) -> dict[str, Any]:
        it = cases(equal)[case]
        made = fresh(case, seed, equal, "float32")
        inputs = make_inputs(it, seed)
        before = run(side, it, made, inputs)
        held = {name: array.copy() for name, array in side.tensors(made).items()}
        names = []
        for name, array in held.items():
            step = np.linspace(0.1, 0.3, array.size).reshape(array.shape).astype(array.dtype)
            after = run(side, it, side.fill(made, held | {name: array + step}), inputs)
            if np.abs(after - before).max() < 1e-5:
                names.append(name)
        return {"names": names}

    return {"build": build, "forward": forward, "unseen": unseen}


Step = Callable[[Layer, list[Any]], Any]


def apply(rows: Sequence[Layer], inputs: Sequence[Any], step: Step) -> Any:
    """Apply rows to inputs: each to the values that it names, or to the one before."""
    values = {f"x{i}": value for i, value in enumerate(inputs)}
    value = inputs[0]
    for row in rows:
        value = values[row.name] = step(row, [values[name] for name in row.of] or [value])
    return value
