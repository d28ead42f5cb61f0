"""A `torch.export` file of the graph of an archive and its weights."""

from __future__ import annotations

import ast
import io
import keyword
import os
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from neutral.containers.files import new_file
from neutral.errors import NeutralError, Problem, Refused, Unsupported, misread, raise_all
from neutral.importers.torch_module import build_module, fill_module, graph_of, torch_names, torch_tensor
from neutral.native import NativeModel
from neutral.running import quiet, weights_only
from neutral.schema.graph import Graph
from neutral.schema.inputs import example_inputs, other_inputs, solve_inputs
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

    raise_all(Refused, _unwritable(manifest, out))
    module = build_module(manifest)
    fill_module(module, model)
    graph = graph_of(manifest)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    inputs = tuple(
        x.to(dtype) if x.is_floating_point() else x for x in map(torch.from_numpy, example_inputs(manifest, roomy=True))
    )
    try:
        program = _program(module, inputs, graph)
    except NeutralError:
        raise
    except Exception as error:
        raise Refused(
            Problem(str(out), f"a graph that torch.export cannot take ({_first_line(error)})", "one that it can")
        ) from error
    _check_sizes(program, manifest, graph, out)
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


def _program(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], graph: Graph) -> torch.export.ExportedProgram:
    """The program, in which each size that the graph does not know is free where the operators allow it."""
    import torch

    free = tuple(
        {i: torch.export.Dim.AUTO for i in range(x.ndim) if _is_free(graph, name, i)}
        for name, x in zip(graph.inputs, inputs, strict=True)
    )
    with warnings.catch_warnings():
        # torch warns of its own recurrent layers that their weights are kept in a list as well.
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs, dynamic_shapes=(free,))


def _fixed(program: torch.export.ExportedProgram, graph: Graph) -> dict[tuple[str, int], int]:
    """The sizes that torch fixed although the graph does not know them: by input and axis, the batch left out."""
    nodes = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"}
    shapes = zip(graph.inputs, (nodes[str(name)] for name in program.graph_signature.user_inputs), strict=True)
    return {
        (name, i): int(n)
        for name, shape in shapes
        for i, n in enumerate(shape)
        if i and str(n).isdecimal() and _is_free(graph, name, i)  # torch keeps a fixed size as a symbol of one value
    }


def _check_sizes(program: torch.export.ExportedProgram, manifest: Manifest, graph: Graph, out: Path) -> None:
    """Refuse sizes that are made up: fixed ones that are unlike each other, where others fit as well.

    torch fixes a size where a window of one position is left of it.
    """
    fixed = _fixed(program, graph)
    if len(set(fixed.values())) < 2 or other_inputs(manifest, solve_inputs(manifest, roomy=True)) is None:
        return
    name = next(iter(fixed))[0]
    axes = ", ".join(graph.values[name].axes[i] for where, i in fixed if where == name)
    raise Refused(
        Problem(
            str(out),
            f"an input {name!r} whose {axes} nobody knows, in a program that torch can write for one size alone",
            "to know them",
            "write a .pt or .keras",
        )
    )


def _unwritable(manifest: Manifest, out: Path) -> Iterator[Problem]:
    """Layers whose names a program cannot have: torch writes them as Python code, and loads another name or none."""
    import torch

    inner, outer = torch.nn.Module(), torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    paths = dict.fromkeys(node.layer for node in graph_of(manifest).nodes if node.layer)
    for path in paths:
        for i, name in enumerate(path.split(".")):
            if hasattr(inner if i else outer, name):
                found = "a name that torch's modules use themselves"
            elif not _is_code(name):
                found = "a name that Python code cannot have as it is"
            else:
                continue
            expected = "another, for a program keeps names as code"
            yield Problem(f"{out}: {path!r}", found, expected, "rename the layer, or write a .pt or .safetensors")


def _is_code(name: str) -> bool:
    """Whether `x.name`, or `getattr(x, "name")` for what is no identifier, gives that name.

    >>> [_is_code(name) for name in ("conv", "0", "a b", "class", 'a"b')]
    [True, True, True, False, False]
    """
    if name.isidentifier():
        return not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name
    try:
        return bool(ast.literal_eval(f'"{name}"') == name)
    except (SyntaxError, ValueError):
        return False


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
