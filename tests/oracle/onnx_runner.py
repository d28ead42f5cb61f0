"""ONNX's side of the oracle, run as a program: models made node by node or exported by torch, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from tests.columns import model_of
from tests.columns.onnx import FORMATS
from tests.oracle.process import serve
from tests.zoo import Case, Model, cases, make_inputs

OPSET = 23  # the first with RMSNormalization and Attention
BY_TORCH = ("onnx_torch", "onnx_torch_legacy")
ELEMENTS = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(int32)": "int32", "tensor(int64)": "int64"}

FILL: dict[str, Callable[[np.random.Generator, Any], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 0.5,
    "positive": lambda rng, shape: rng.uniform(0.5, 1.5, shape),
    "ones": lambda rng, shape: np.ones(shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "root": lambda rng, numbers: np.sqrt(np.float64(numbers[0])),
    "int64": lambda rng, numbers: np.array(numbers, dtype="int64"),
    "scalar": lambda rng, numbers: np.array(numbers[0], dtype="int64"),
}
WEIGHTS = ("normal", "positive")


def described(case: Case) -> Model:
    model = model_of(case, "onnx")
    if isinstance(model, str):
        raise LookupError(f"{case.name}: {model}")
    return model


def tensors_of(model: Model, seed: int, dtype: str) -> dict[str, np.ndarray]:
    """Every initializer; a tensor of two nodes is filled once."""
    rng = np.random.default_rng((seed, 4))
    found: dict[str, np.ndarray] = {}
    for row in model.layers:
        for name, (kind, shape) in row.args["tensors"].items():
            if name not in found:
                value = FILL[kind](rng, shape)
                found[name] = value if value.dtype == np.int64 else np.asarray(value, dtype)
    return found


def weight_names(model: Model) -> list[str]:
    """The initializers that are neither shapes nor constants of the operators."""
    rows = [row.args["tensors"] for row in model.layers]
    return list(dict.fromkeys(name for one in rows for name, (kind, _) in one.items() if kind in WEIGHTS))


def make(case: Case, seed: int, dtype: str, given: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    model = described(case)
    tensors = tensors_of(model, seed, dtype)
    if given is not None:
        if set(given) != set(weight_names(model)):
            raise ValueError(f"weights {sorted(given)} for {sorted(weight_names(model))}")
        tensors |= {name: array.astype(dtype).reshape(tensors[name].shape) for name, array in given.items()}
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [
        helper.make_tensor_value_info(f"x{i}", TensorProto.INT32 if one.below else element, one.shape)
        for i, one in enumerate(case.inputs)
    ]
    nodes = [
        helper.make_node(row.cls, row.of, [row.name], name=row.name, **row.args["attributes"]) for row in model.layers
    ]
    read = {name for row in model.layers for name in row.of}
    ends = [row.name for row in reversed(model.layers) if row.name not in read]
    ranks = [len(part.output) for part in reversed(case.parts or (case,))]
    outputs = [
        helper.make_tensor_value_info(name, element, [None] * rank) for name, rank in zip(ends, ranks, strict=True)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, case.name, inputs, outputs, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
    onnx.checker.check_model(made, full_check=True)
    return made


def exported(case: Case, seed: int, dtype: str, kind: str, path: Path) -> None:
    """By torch itself, from the module that torch's side of the oracle builds."""
    import torch

    from tests.oracle import torch_runner

    with torch.no_grad():
        module = torch_runner.fresh(case, seed, dtype)
    inputs = tuple(torch_runner.tensors(case, make_inputs(case, seed, dtype)))
    if kind == "onnx_torch":
        torch.onnx.export(module, inputs, path, dynamo=True, optimize=False, external_data=False, verbose=False)
    else:
        torch.onnx.export(module, inputs, path, dynamo=False)


def save(made: onnx.ModelProto, folder: Path, kind: str, weights: list[str]) -> Path:
    """Only weights lie outside: the checker wants the shapes that operators are given inside."""
    path = folder / f"{kind}.onnx"
    if kind == "onnx_external":
        for tensor in made.graph.initializer:
            if tensor.name in weights:
                set_external_data(tensor, location=f"{kind}.data")
    onnx.save_model(made, path)
    return path


def session(model: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    given = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(model: Path | bytes, arrays: list[np.ndarray]) -> np.ndarray:
    running = session(model)
    # An unused input keeps its place: they are matched by order.
    feed = {one.name: array.astype(ELEMENTS[one.type]) for one, array in zip(running.get_inputs(), arrays, strict=True)}
    output: np.ndarray = running.run(None, feed)[0]
    return output


def held(model: onnx.ModelProto, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """The initializers by name; of a model that others made, all that are not integers."""
    arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    return {
        name: array
        for name, array in arrays.items()
        if (name in names if names is not None else array.dtype.kind == "f")
    }


def build(
    case: str, seed: int, folder: str, equal: bool, formats: list[str] | None, dtype: str, weights: str | None
) -> dict[str, Any]:
    """A model of torch's own export has weights of its own, so it is asked for alone."""
    it = cases(equal)[case]
    kinds = formats if formats is not None else list(FORMATS[:1])
    inputs = make_inputs(it, seed, dtype)
    files: dict[str, str] = {}
    missing: dict[str, str] = {}
    if set(kinds) - set(FORMATS) or (set(kinds) & set(BY_TORCH) and len(kinds) > 1):
        raise ValueError(f"onnx has no formats {kinds} at once")
    if kinds and kinds[0] in BY_TORCH:
        path = Path(folder) / f"{kinds[0]}.onnx"
        try:
            exported(it, seed, dtype, kinds[0], path)
            output = run(path, inputs)
        except Exception as error:
            missing[kinds[0]] = f"{type(error).__name__}: {error}"
            return {"files": files, "missing": missing, **answer(folder, inputs, np.zeros(0), {})}
        files[kinds[0]] = str(path)
        return {"files": files, "missing": missing, **answer(folder, inputs, output, held(onnx.load(path)))}
    given = None
    if weights is not None:
        with np.load(weights) as arrays:
            given = {name: arrays[name] for name in arrays.files}
    made = make(it, seed, dtype, given)
    output = run(made.SerializeToString(), inputs)
    names = weight_names(described(it))
    named = held(made, names)
    for kind in kinds:
        files[kind] = str(save(onnx.ModelProto.FromString(made.SerializeToString()), Path(folder), kind, names))
    return {"files": files, "missing": missing, **answer(folder, inputs, output, named)}


def answer(folder: str, inputs: list[np.ndarray], output: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    path = Path(folder) / "onnx.npz"
    arrays = {f"input{i}": array for i, array in enumerate(inputs)}
    np.savez(path, output=output, **arrays, **{f"weights/{name}": array for name, array in weights.items()})
    return {"arrays": str(path), "inputs": len(inputs)}


def forward(case: str, file: str, arrays: str, equal: bool, dtype: str) -> dict[str, Any]:
    with np.load(arrays) as given:
        inputs = [given[f"input{i}"] for i in range(len(given.files))]
    np.savez(arrays, output=run(Path(file), inputs))
    return {}


def unseen(case: str, seed: int, equal: bool) -> dict[str, Any]:
    """In float32: not every operator of onnxruntime has a double version."""
    it = cases(equal)[case]
    inputs = make_inputs(it, seed)
    model = make(it, seed, "float32")
    before = run(model.SerializeToString(), inputs)
    names = weight_names(described(it))
    weights = held(model, names)
    found = []
    for name, kept in weights.items():
        change = np.linspace(0.1, 0.3, kept.size, dtype="float32").reshape(kept.shape)
        changed = make(it, seed, "float32", weights | {name: kept + change})
        if np.abs(run(changed.SerializeToString(), inputs) - before).max() < 1e-5:
            found.append(name)
    return {"names": found}


if __name__ == "__main__":
    serve({"build": build, "forward": forward, "unseen": unseen})
