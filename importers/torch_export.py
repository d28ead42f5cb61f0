"""A `torch.export` file of the graph of an archive and its weights."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from neutral.containers.files import new_file
from neutral.errors import NeutralError, Problem, Refused, Unsupported, misread
from neutral.importers.torch_module import build_module, fill_module, graph_of, torch_names, torch_tensor
from neutral.native import NativeModel
from neutral.running import quiet, weights_only
from neutral.schema.graph import Graph
from neutral.schema.inputs import example_inputs
from neutral.schema.manifest import Manifest

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


def export(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """Write the graph with its weights as a `torch.export` program. The batch, and each size that is not known, may
    change from call to call where the operators allow it."""
    try:
        import torch
    except ImportError:
        raise Unsupported(
            Problem(
                str(out),
                "torch missing",
                "torch, to export a program",
                "install neutral-weights[torch], or write a .pt",
            )
        ) from None

    module = build_module(manifest)
    fill_module(module, model)
    graph = graph_of(manifest)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in map(torch.from_numpy, example_inputs(manifest)))
    free = tuple(
        {i: torch.export.Dim.AUTO for i in range(x.ndim) if _is_free(graph, name, i)}
        for name, x in zip(graph.inputs, inputs, strict=True)
    )
    try:
        with warnings.catch_warnings():
            # torch warns of its own recurrent layers that their weights are kept in a list as well.
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs, dynamic_shapes=(free,))
    except NeutralError:
        raise
    except Exception as error:
        raise Refused(
            Problem(str(out), f"a graph that torch.export cannot take ({_first_line(error)})", "one that it can")
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the folders of this machine
    with new_file(out, force) as file:
        torch.export.save(program, cast(BinaryIO, _Stream(file)))
        _compare(model, program, file, out)


def _compare(model: NativeModel, program: ExportedProgram, file: BinaryIO, out: Path) -> None:
    """Read the file back: each tensor of the program must be there bit for bit, the model's own above all."""
    meant, found = _tensors(program), _tensors(_loaded(file, out))
    given = {name: tensor.data for name, tensor in torch_names(model)}

    def right(name: str) -> bool:
        if name not in meant or name not in found:
            return False
        # The module was filled from these: what it holds is no proof of them.
        wanted = torch_tensor(given[name].read()) if name in given else meant[name]
        return _same_bits(found[name], wanted)

    wrong = sorted(name for name in meant.keys() | found.keys() if not right(name))
    if wrong:
        raise misread(out, wrong)


def _loaded(file: BinaryIO, out: Path) -> ExportedProgram:
    import torch

    file.seek(0)
    # Buffered, for a read of the bare file stops short after two gigabytes.
    with quiet(), weights_only(), os.fdopen(os.dup(file.fileno()), "rb") as again:
        try:
            return torch.export.load(again)
        except Exception as error:
            raise misread(out, [f"the program ({_first_line(error)})"]) from error


def _tensors(program: ExportedProgram) -> dict[str, Any]:
    return {**program.state_dict, **program.constants}


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    import torch

    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    left, right = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (x, y))
    return torch.equal(left, right)


class _Stream(io.RawIOBase):
    """The file as torch wants to see one: an io object that can be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any, /) -> int:
        return self._file.write(data)


def _is_free(graph: Graph, name: str, axis: int) -> bool:
    shape = graph.values[name].shape
    return shape is None or shape[axis] is None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
