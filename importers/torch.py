"""PyTorch's files and live modules, written from native tensors. Files are written without torch.

fill(Path("lenet5.pt"), {"conv1.weight": kernel, ...}, Path("new.pt"))   the template's file with other elements
fill_live(module, {"conv1.weight": kernel, ...})                         the same, in place
build(model, manifest, Path("new.pt"))                                   a new state dict; .pt2: a module of the graph
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from neutral.containers.files import new_file, refuse_same
from neutral.containers.torch_file import TorchFile
from neutral.containers.torch_filling import fill as fill_file
from neutral.containers.torch_program import TorchProgram, is_program, replace_weights
from neutral.containers.torch_refs import DTYPES, TensorRef
from neutral.containers.torch_tree import Found, WeightSet, choose, weight_sets
from neutral.containers.torch_writing import write_state_dict
from neutral.errors import Problem, Refused, Unsupported, printable, raise_all
from neutral.importers.numpy import fill_live as fill_arrays
from neutral.native import NativeModel, NativeTensor, Tensor, from_array
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    import torch

    from neutral.schema.manifest import Manifest

STATE_DICT_SUFFIXES: Final = (".pt", ".pth", ".ckpt", ".bin")


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of a file of torch.save in which the tensors named have new elements; all else stays byte for byte.

    `key` names the weight set if the file has several.
    """
    if template.is_dir() or template.name.endswith(".json"):
        from neutral.importers import torch_shards

        torch_shards.fill(template, tensors, out, force=force, key=key)
        return
    refuse_same(out, template)
    if is_program(template):
        _fill_program(template, tensors, out, force)
        return
    with TorchFile(template) as source:
        sets = weight_sets(source.root)
        chosen = choose(source, sets, key)
        values = chosen.tensors(str(source.path))
        entries = []
        problems = _shared(source, tensors, values, _beside(chosen, sets))
        for name, data in tensors.items():
            ref = values.get(name)
            if type(ref) is TensorRef:
                entries.append((name, ref, data))
            else:
                found = "no tensor of that name" if ref is None else "an array that is kept inside the pickle"
                problems.append(Problem(name, found, "a tensor with its elements in a record of the template"))
        raise_all(Refused, problems)
        with new_file(out, force) as file:
            fill_file(source, entries, file)


def _fill_program(template: Path, tensors: Mapping[str, Tensor], out: Path, force: bool) -> None:
    source = TorchProgram(template)
    try:
        with new_file(out, force) as file:
            replace_weights(source, tensors, file)
    finally:
        source.close()


def _beside(chosen: WeightSet, found: Found) -> list[WeightSet]:
    """The other sets of a file, but for those in which the chosen one lies, or which lie in it."""

    def within(inner: str, outer: str) -> bool:
        return f"{inner}.".startswith(f"{outer}." if outer else "")

    return [s for s in found.sets if not within(s.key, chosen.key) and not within(chosen.key, s.key)]


def _shared(
    source: TorchFile, tensors: Mapping[str, Tensor], values: Mapping[Any, Any], others: Sequence[WeightSet]
) -> list[Problem]:
    """Tensors to be replaced whose elements another set of the file has, too: it would change with them."""
    kept: dict[str, list[tuple[int, int, str]]] = {}
    for other in others:
        for name, ref in other.tensors(str(source.path)).items():
            if type(ref) is TensorRef:
                kept.setdefault(ref.storage.key, []).append((*ref.span, f"{other.key}.{name}"))
    problems = []
    for name in tensors:
        ref = values.get(name)
        if type(ref) is not TensorRef:
            continue
        start, stop = ref.span
        twin = next((n for a, b, n in kept.get(ref.storage.key, ()) if a < stop and start < b), None)
        if twin is not None:
            found = f"elements that {printable(twin, 80)} of another set has, too"
            problems.append(
                Problem(name, found, "elements of its own", "save the template with copies of the tensors (clone)")
            )
    return problems


def fill_live(model: torch.nn.Module | Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into a live module, or a state dict of torch's tensors or of numpy's arrays, by their names.

    All are checked before the first is written.
    """
    if isinstance(model, Mapping) and all(isinstance(model.get(name), np.ndarray) for name in tensors):
        fill_arrays(model, tensors)
        return
    import torch

    state = model if isinstance(model, Mapping) else model.state_dict(keep_vars=True)
    problems = []
    shared: dict[object, tuple[str, Tensor]] = {}
    for name, data in tensors.items():
        there = state.get(name)
        if not isinstance(there, torch.Tensor):
            problems.append(Problem(name, "no tensor of that name", "a name of the module's state dict"))
            continue
        problem = _unfit(name, there, data)
        if problem is None:
            place = (there.data_ptr(), there.device, tuple(there.shape), there.stride())
            first, twin = shared.setdefault(place if there.numel() else name, (name, data))
            if twin is not data and any(
                a.tobytes() != b.tobytes() for a, b in zip(twin.tiles(), data.tiles(), strict=True)
            ):
                problem = Problem(name, f"elements that differ from those of {first}", "equal ones, for they are tied")
        if problem is not None:
            problems.append(problem)
    raise_all(Refused, problems)
    with torch.no_grad():
        for name, data in tensors.items():
            state[name].copy_(_torch_tensor(data, state[name].dtype))


def _unfit(name: str, there: torch.Tensor, data: Tensor) -> Problem | None:
    import torch

    dtype = str(there.dtype).removeprefix("torch.")
    if torch.nn.parameter.is_lazy(there) or there.is_meta:
        return Problem(name, "a parameter without elements", "an initialized one", "run the module once first")
    if (
        there.layout != torch.strided
        or there.is_inference()
        or any(s == 0 and n > 1 for n, s in zip(there.shape, there.stride(), strict=True))
    ):
        return Problem(name, "a parameter that cannot be written in place", "a dense tensor of its own")
    if data.shape != tuple(there.shape) or DTYPES.get(dtype) != data.dtype:
        return Problem(name, f"{data.dtype}{list(data.shape)}", f"{dtype}{list(there.shape)} as in the module")
    return None


def _torch_tensor(data: Tensor, dtype: torch.dtype) -> torch.Tensor:
    import torch

    array = data.read()
    if array.dtype.isbuiltin != 2:  # 2: ml_dtypes, which torch does not know
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    return torch.from_numpy(array.view(f"i{array.dtype.itemsize}").copy()).view(dtype)


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new file of torch.save with a state dict, or (`.pt2`) a module rebuilt from the graph and saved by torch.export."""
    if suffix_of(out) == ".pt2":
        from neutral.importers.torch_export import export

        export(model, manifest, out, force=force)
        return
    if suffix_of(out) not in STATE_DICT_SUFFIXES:
        raise Unsupported(
            Problem(str(out), f"the suffix {printable(out.suffix)}", f"{', '.join(STATE_DICT_SUFFIXES)} or .pt2")
        )
    rank = {name: i for i, name in enumerate(manifest.source.order)} if manifest.source.framework == "torch" else {}
    entries = sorted(model.tensors(), key=lambda tensor: rank.get(tensor.name, len(rank)))
    with new_file(out, force) as file:
        write_state_dict(file, ((tensor.name, _counter(tensor), tensor.identity) for tensor in entries))


def _counter(tensor: NativeTensor) -> Tensor:
    """BatchNorm's counter as torch has it, an int64 without axes; every other tensor as it is."""
    if tensor.name.rpartition(".")[2] != "num_batches_tracked" or tensor.data.size != 1:
        return tensor.data
    return from_array(tensor.data.read().reshape(()).astype(np.int64))
