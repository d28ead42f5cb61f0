"""PyTorch's side of the oracle. Run as a program: the classes below then live in `__main__` and exist nowhere else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.oracle.process import serve
from tests.zoo import DEFAULT_FORMATS, Case, Layer, Model, cases, make_inputs, permute

WRAPS: dict[str, Callable[..., nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "legacy_weight_norm": nn.utils.weight_norm,
    "legacy_spectral_norm": nn.utils.spectral_norm,
}


class Graph(nn.Module):
    """Layers and operations applied to earlier values by name."""

    def __init__(self, rows: list[tuple[str, str, tuple[str, ...]]], layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.rows = rows
        for name, module in layers.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Tensor:
        values = {f"x{i}": value for i, value in enumerate(inputs)}
        value = inputs[0]
        for name, cls, of in self.rows:
            arguments = [values[source] for source in of] or [value]
            value = values[name] = self.step(name, cls, arguments)
        return value

    def step(self, name: str, cls: str, arguments: list[Tensor]) -> Tensor:
        if cls == "concat":
            return torch.cat(arguments, dim=1)
        if cls == "add":
            return torch.add(*arguments)
        if cls == "last":
            return arguments[0][:, -1]
        module = self.get_submodule(cls if cls in self._modules else name)
        if isinstance(module, nn.RNNCellBase):
            return over_time(module, *arguments)
        result = module(*arguments)
        return result[0] if isinstance(result, tuple) else result


def over_time(cell: nn.RNNCellBase, x: Tensor) -> Tensor:
    state: Any = None
    steps = []
    for step in x.unbind(1):
        state = cell(step, state)
        steps.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(steps, dim=1)


def make_layer(row: Layer) -> nn.Module:
    if row.inside:
        return sequential(row.inside)
    module: nn.Module = getattr(nn, row.cls)(**row.args)
    if row.wrap is not None:
        style, options = row.wrap
        WRAPS[style](module, **options)
    return module


def sequential(rows: tuple[Layer, ...]) -> nn.Sequential:
    return nn.Sequential(OrderedDict((row.name, make_layer(row)) for row in rows))


def make(model: Model) -> nn.Module:
    if model.builder == "sequential":
        return sequential(model.layers)
    layers = {row.name: make_layer(row) for row in model.layers if hasattr(nn, row.cls)}
    return Graph([(row.name, row.cls, row.of) for row in model.layers], layers)


def randomize(module: nn.Module, seed: int) -> None:
    rng = np.random.default_rng((seed, 1))
    for name, tensor in module.state_dict().items():
        value = rng.standard_normal(tensor.shape) * 0.5
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, tensor.shape)
        if name.endswith("weight_g") or name.endswith("weight.original0"):
            value = rng.uniform(0.3, 1.5, tensor.shape)
        if not tensor.is_floating_point():
            value = rng.integers(1, 1000, tensor.shape)
        tensor.copy_(torch.as_tensor(value))


def fit_norms(module: nn.Module, model: Model, inputs: list[Tensor]) -> None:
    """A spectral norm's vectors mean something only after some power iterations, which training does."""
    if any(row.wrap is not None and "spectral" in row.wrap[0] for row in model.layers):
        module.train()
        for _ in range(2):
            module(*inputs)
    module.eval()


def tensors(case: Case, arrays: list[np.ndarray]) -> list[Tensor]:
    axes = case.models["torch"].inputs
    moved = [permute(array, one.axes, to) for array, one, to in zip(arrays, case.inputs, axes, strict=True)]
    return [torch.from_numpy(array) for array in moved]


def run(module: nn.Module, case: Case, arrays: list[np.ndarray]) -> np.ndarray:
    output: np.ndarray = module(*tensors(case, arrays)).numpy()
    return permute(output, case.models["torch"].output, case.output)


def fresh(case: Case, seed: int, dtype: str) -> nn.Module:
    module = make(case.models["torch"]).to(getattr(torch, dtype))
    randomize(module, seed)
    fit_norms(module, case.models["torch"], tensors(case, make_inputs(case, seed, dtype)))
    return module


def save(module: nn.Module, folder: Path, kind: str) -> Path:
    state = module.state_dict()
    match kind:
        case "state":
            torch.save(state, path := folder / "state.pt")
        case "module":
            torch.save(module, path := folder / "module.pt")
        case "legacy_state":
            torch.save(state, path := folder / "legacy_state.pt", _use_new_zipfile_serialization=False)
        case "legacy_module":
            torch.save(module, path := folder / "legacy_module.pt", _use_new_zipfile_serialization=False)
        case "safetensors":
            safetensors.torch.save_file(state, path := folder / "model.safetensors")
        case _:
            raise ValueError(f"torch has no format {kind}")
    return path


def build(
    case: str, seed: int, folder: str, equal: bool, formats: list[str] | None, dtype: str, weights: str | None
) -> dict[str, Any]:
    it = cases(equal)[case]
    module = fresh(it, seed, dtype)
    if weights is not None:
        with np.load(weights) as given:
            module.load_state_dict({name: torch.from_numpy(given[name]) for name in given.files})
    files: dict[str, str] = {}
    missing: dict[str, str] = {}
    for kind in formats if formats is not None else DEFAULT_FORMATS["torch"]:
        try:
            files[kind] = str(save(module, Path(folder), kind))
        except RuntimeError as error:
            if "parametrized modules" not in str(error):
                raise
            missing[kind] = str(error)
    inputs = make_inputs(it, seed, dtype)
    arrays = {f"input{i}": array for i, array in enumerate(inputs)}
    arrays |= {f"weights/{name}": tensor.numpy() for name, tensor in module.state_dict().items()}
    path = Path(folder) / "torch.npz"
    np.savez(path, output=run(module, it, inputs), **arrays)
    return {"files": files, "missing": missing, "arrays": str(path), "inputs": len(inputs)}


def load(file: str, case: Case, dtype: str) -> nn.Module:
    if file.endswith(".pt2"):
        return torch.export.load(file).module()
    if file.endswith(".safetensors"):
        found: Any = safetensors.torch.load_file(file)
    else:
        found = torch.load(file, weights_only=False)
    if isinstance(found, nn.Module):
        return found.eval()
    module = fresh(case, 10**6, dtype)
    module.load_state_dict(found, strict=True)
    return module


def forward(case: str, file: str, arrays: str, equal: bool, dtype: str) -> dict[str, Any]:
    it = cases(equal)[case]
    with np.load(arrays) as given:
        inputs = [given[f"input{i}"] for i in range(len(given.files))]
    np.savez(arrays, output=run(load(file, it, dtype), it, inputs))
    return {}


def unseen(case: str, seed: int, equal: bool) -> dict[str, Any]:
    it = cases(equal)[case]
    module = fresh(it, seed, "float64")
    inputs = make_inputs(it, seed, "float64")
    before = run(module, it, inputs)
    names = []
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        kept = tensor.clone()
        tensor.add_(torch.linspace(0.1, 0.3, tensor.numel(), dtype=tensor.dtype).reshape(tensor.shape))
        if np.abs(run(module, it, inputs) - before).max() < 1e-7:
            names.append(name)
        tensor.copy_(kept)
    return {"names": names}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    serve({"build": build, "forward": forward, "unseen": unseen})
