"""PaddlePaddle's side of the oracle, run as a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle

from tests.columns import model_of
from tests.columns.paddle import FORMATS
from tests.oracle.process import serve
from tests.zoo import Case, Layer, Model, cases, make_inputs, permute

nn = paddle.nn
WRAPS = {"weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm}


class Graph(nn.Layer):
    """Layers and operations applied to earlier values by name."""

    def __init__(self, rows: list[tuple[str, str, tuple[str, ...]]], layers: dict[str, Any]) -> None:
        super().__init__()
        self.rows = rows
        for name, one in layers.items():
            self.add_sublayer(name, one)

    def forward(self, *inputs: Any) -> Any:
        values = {f"x{i}": value for i, value in enumerate(inputs)}
        value = inputs[0]
        for name, cls, of in self.rows:
            arguments = [values[source] for source in of] or [value]
            value = values[name] = self.step(name, cls, arguments)
        return value

    def step(self, name: str, cls: str, arguments: list[Any]) -> Any:
        if cls == "concat":
            return paddle.concat(arguments, axis=1)
        if cls == "add":
            return paddle.add(*arguments)
        if cls == "last":
            return arguments[0][:, -1]
        layer = getattr(self, cls if cls in self._sub_layers else name)
        if isinstance(layer, nn.layer.rnn.RNNCellBase):
            return over_time(layer, *arguments)
        result = layer(*arguments)
        return result[0] if isinstance(result, tuple) else result


def over_time(cell: Any, x: Any) -> Any:
    state: Any = None
    steps = []
    for step in paddle.unbind(x, axis=1):
        output, state = cell(step, state)
        steps.append(output)
    return paddle.stack(steps, axis=1)


def make_layer(row: Layer) -> Any:
    if row.inside:
        return sequential(row.inside)
    layer = getattr(nn, row.cls)(**row.args)
    if row.wrap is not None:
        style, options = row.wrap
        WRAPS[style](layer, **options)
    return layer


def sequential(rows: tuple[Layer, ...]) -> Any:
    return nn.Sequential(*((row.name, make_layer(row)) for row in rows))


def make(model: Model) -> Any:
    if model.builder == "sequential":
        return sequential(model.layers)
    layers = {row.name: make_layer(row) for row in model.layers if row.cls[0].isupper()}
    return Graph([(row.name, row.cls, row.of) for row in model.layers], layers)


def state_of(layer: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in layer.state_dict().items()}


def held_constant(layer: Any, name: str) -> bool:
    """`bias_ih_attr=False` leaves a bias of zeros in the cell and in its state: a constant, not a weight."""
    owner = layer
    *path, last = name.split(".")
    for part in path:
        owner = owner[int(part)] if isinstance(owner, nn.LayerList) else getattr(owner, part)
    return last.startswith("bias") and getattr(owner, last).stop_gradient


def randomize(layer: Any, seed: int) -> None:
    """A state names some tensors twice (`weight_ih_l0` is `0.cell.weight_ih`): each gets one value."""
    rng = np.random.default_rng((seed, 3))
    done: set[int] = set()
    for name, tensor in layer.state_dict().items():
        if id(tensor) in done or held_constant(layer, name):
            continue
        done.add(id(tensor))
        value = rng.standard_normal(tensor.shape) * 0.5
        if name.endswith(("_variance", "weight_g")):
            value = rng.uniform(0.5, 1.5, tensor.shape)
        set_value(tensor, value)


def set_value(tensor: Any, value: Any) -> None:
    tensor.set_value(np.asarray(value, dtype=str(tensor.dtype).removeprefix("paddle.")))


def fit_norms(layer: Any, model: Model, inputs: list[Any]) -> None:
    """A spectral norm's vectors mean something only after some power iterations, which training does."""
    if any(row.wrap is not None and "spectral" in row.wrap[0] for row in model.layers):
        layer.train()
        for _ in range(2):
            layer(*inputs)
    layer.eval()


def described(case: Case) -> Model:
    model = model_of(case, "paddle")
    if isinstance(model, str):
        raise LookupError(f"{case.name}: {model}")
    return model


def tensors(case: Case, arrays: list[np.ndarray]) -> list[Any]:
    axes = described(case).inputs
    moved = [permute(array, one.axes, to) for array, one, to in zip(arrays, case.inputs, axes, strict=True)]
    return [paddle.to_tensor(array) for array in moved]


def run(layer: Any, case: Case, arrays: list[np.ndarray]) -> np.ndarray:
    output: np.ndarray = layer(*tensors(case, arrays)).numpy()
    return permute(output, described(case).output, case.output)


def fresh(case: Case, seed: int, dtype: str) -> Any:
    paddle.set_default_dtype(dtype)
    layer = make(described(case))
    randomize(layer, seed)
    fit_norms(layer, described(case), tensors(case, make_inputs(case, seed, dtype)))
    return layer


def load_into(layer: Any, state: dict[str, Any]) -> None:
    missing, unexpected = layer.set_state_dict(state)
    if missing or unexpected:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")


def build(
    case: str, seed: int, folder: str, equal: bool, formats: list[str] | None, dtype: str, weights: str | None
) -> dict[str, Any]:
    it = cases(equal)[case]
    layer = fresh(it, seed, dtype)
    if weights is not None:
        with np.load(weights) as given:
            load_into(layer, {name: given[name] for name in given.files})
    files: dict[str, str] = {}
    for kind in formats if formats is not None else FORMATS[:1]:
        if kind != "pdparams":
            raise ValueError(f"paddle has no format {kind}")
        files[kind] = str(Path(folder) / "model.pdparams")
        paddle.save(layer.state_dict(), files[kind])
    inputs = make_inputs(it, seed, dtype)
    arrays = {f"input{i}": array for i, array in enumerate(inputs)}
    arrays |= {f"weights/{name}": array for name, array in state_of(layer).items()}
    path = Path(folder) / "paddle.npz"
    np.savez(path, output=run(layer, it, inputs), **arrays)
    return {"files": files, "missing": {}, "arrays": str(path), "inputs": len(inputs)}


def forward(case: str, file: str, arrays: str, equal: bool, dtype: str) -> dict[str, Any]:
    it = cases(equal)[case]
    with np.load(arrays) as given:
        inputs = [given[f"input{i}"] for i in range(len(given.files))]
    layer = fresh(it, 10**6, dtype)
    load_into(layer, paddle.load(file))
    np.savez(arrays, output=run(layer, it, inputs))
    return {}


def unseen(case: str, seed: int, equal: bool) -> dict[str, Any]:
    it = cases(equal)[case]
    layer = fresh(it, seed, "float64")
    inputs = make_inputs(it, seed, "float64")
    before = run(layer, it, inputs)
    names = []
    done: set[int] = set()
    for name, tensor in layer.state_dict().items():
        if id(tensor) in done or held_constant(layer, name):
            continue
        done.add(id(tensor))
        kept = tensor.numpy()
        set_value(tensor, kept + np.linspace(0.1, 0.3, kept.size).reshape(kept.shape))
        if np.abs(run(layer, it, inputs) - before).max() < 1e-7:
            names.append(name)
        set_value(tensor, kept)
    return {"names": names}


if __name__ == "__main__":
    paddle.set_device("cpu")
    with paddle.no_grad():
        serve({"build": build, "forward": forward, "unseen": unseen})
