"""NumPy's side of the oracle, run as a program: arrays by canonical name, computed in double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.columns import model_of
from tests.columns.numpy import FORMATS
from tests.oracle.numpy_layers import LAYERS
from tests.oracle.process import serve
from tests.zoo import Case, Model, cases, make_inputs

Arrays = dict[str, np.ndarray]


def described(case: Case) -> Model:
    model = model_of(case, "numpy")
    if isinstance(model, str):
        raise LookupError(f"{case.name}: {model}")
    return model


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {f"{row.name}/{role}": shape for row in model.layers for role, shape in row.args["tensors"].items()}


def random(model: Model, seed: int, dtype: str) -> Arrays:
    rng = np.random.default_rng((seed, 6))
    found = {}
    for name, shape in shapes_of(model).items():
        value = rng.uniform(0.5, 1.5, shape) if name.endswith("/variance") else rng.standard_normal(shape) * 0.5
        found[name] = value.astype(dtype)
    return found


def run(case: Case, weights: Arrays, inputs: list[np.ndarray], dtype: str) -> np.ndarray:
    model = described(case)
    if {name: array.shape for name, array in weights.items()} != shapes_of(model):
        raise ValueError(f"{ {name: array.shape for name, array in weights.items()} } for {shapes_of(model)}")
    values = {
        f"x{i}": array if one.below else array.astype("float64")
        for i, (array, one) in enumerate(zip(inputs, case.inputs, strict=True))
    }
    value = values["x0"]
    rows = {row.name: row for row in model.layers}
    for row in model.layers:
        source = rows.get(row.cls, row)
        given = [values[name] for name in row.of] or [value]
        held = {role: weights[f"{source.name}/{role}"].astype("float64") for role in source.args["tensors"]}
        settings = {name: setting for name, setting in source.args.items() if name != "tensors"}
        value = values[row.name] = LAYERS[source.cls](*given, held, **settings)
    return value.astype(dtype)


def build(
    case: str, seed: int, folder: str, equal: bool, formats: list[str] | None, dtype: str, weights: str | None
) -> dict[str, Any]:
    it = cases(equal)[case]
    held = random(described(it), seed, dtype)
    if weights is not None:
        with np.load(weights) as given:
            held = {name: given[name].astype(dtype) for name in given.files}
    files = {}
    for kind in formats if formats is not None else FORMATS[:1]:
        if kind != "npz":
            raise ValueError(f"numpy has no format {kind}")
        files[kind] = str(Path(folder) / "model.npz")
        np.savez(files[kind], **held)
    inputs = make_inputs(it, seed, dtype)
    arrays = {f"input{i}": array for i, array in enumerate(inputs)}
    path = Path(folder) / "numpy.npz"
    named = {f"weights/{name}": array for name, array in held.items()}
    np.savez(path, output=run(it, held, inputs, dtype), **arrays, **named)
    return {"files": files, "missing": {}, "arrays": str(path), "inputs": len(inputs)}


def forward(case: str, file: str, arrays: str, equal: bool, dtype: str) -> dict[str, Any]:
    it = cases(equal)[case]
    with np.load(arrays) as given:
        inputs = [given[f"input{i}"] for i in range(len(given.files))]
    with np.load(file) as archive:
        weights = {name: archive[name] for name in archive.files}
    weights = arranged(plain(weights), shapes_of(described(it)))
    np.savez(arrays, output=run(it, weights, inputs, dtype))
    return {}


def plain(weights: Arrays) -> Arrays:
    """Without counters, and each reparametrized kernel multiplied out: g v / |v|, or w / (u w v)."""
    found: Arrays = {}
    for name, array in weights.items():
        path, _, role = name.rpartition("/")
        if role == "kernel_direction":
            g = weights[f"{path}/kernel_magnitude"]
            axes = tuple(i for i in range(array.ndim) if g.ndim == 0 or g.shape[i] == 1)
            found[f"{path}/kernel"] = g * array / np.sqrt((array * array).sum(axes, keepdims=True))
        elif role == "kernel_raw":
            u, v = weights[f"{path}/kernel_u"], weights[f"{path}/kernel_v"]
            found[f"{path}/kernel"] = array / (u @ array.reshape(len(u), -1) @ v)
        elif role not in ("num_batches_tracked", "kernel_magnitude", "kernel_u", "kernel_v"):
            found[name] = array
    return found


def arranged(weights: Arrays, wanted: dict[str, tuple[int, ...]]) -> Arrays:
    """Under the names of this model: the layers of a stack have others in other frameworks, in the same order."""
    paths = [list(dict.fromkeys(name.rpartition("/")[0] for name in names)) for names in (weights, wanted)]
    if len(paths[0]) != len(paths[1]) or {*paths[0]} == {*paths[1]}:
        return weights
    names = dict(zip(*paths, strict=True))
    renamed = {f"{names[n.rpartition('/')[0]]}/{n.rpartition('/')[2]}": array for n, array in weights.items()}
    return {name: renamed[name] for name in wanted} if renamed.keys() == wanted.keys() else weights


def unseen(case: str, seed: int, equal: bool) -> dict[str, Any]:
    it = cases(equal)[case]
    weights = random(described(it), seed, "float64")
    inputs = make_inputs(it, seed, "float64")
    before = run(it, weights, inputs, "float64")
    names = []
    for name, kept in weights.items():
        changed = kept + np.linspace(0.1, 0.3, kept.size).reshape(kept.shape)
        if np.abs(run(it, weights | {name: changed}, inputs, "float64") - before).max() < 1e-7:
            names.append(name)
    return {"names": names}


if __name__ == "__main__":
    serve({"build": build, "forward": forward, "unseen": unseen})
