"""Arrays by name, written to an `.npz` or into memory.

fill(Path("weights.npz"), {"fc/kernel": kernel}, Path("new.npz"))    the file with other elements
fill_live(arrays, {"fc/kernel": kernel})                             the same, in place
build(model, manifest, Path("new.npz"))                              a new file
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neutral.containers.files import SourceFile, new_file, refuse_same
from neutral.containers.npz import replace_arrays, write_npz
from neutral.containers.zip import ZipSource
from neutral.conventions.npz_layers import write_comment
from neutral.errors import Problem, Refused, Unsupported, raise_all
from neutral.native import NativeModel, Tensor
from neutral.schema.kinds import Layer
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

SUFFIX = ".npz"


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of an `.npz` in which the arrays named have new elements; all else stays as it was."""
    refuse_same(out, template)
    with SourceFile(template) as file:
        source = ZipSource(file)
        with new_file(out, force) as copy:
            replace_arrays(source, copy, tensors)


def fill_live(model: Mapping[str, npt.NDArray[np.generic]], tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into arrays in memory. All are checked before the first is written."""
    problems = []
    for name, data in tensors.items():
        there = model.get(name)
        if not isinstance(there, np.ndarray) or not there.flags.writeable:
            problems.append(Problem(name, "no array of that name that can be written", "a writable numpy array"))
        elif (there.shape, there.dtype.newbyteorder("=")) != (data.shape, data.dtype):
            problems.append(Problem(name, f"{data.dtype} {data.shape}", f"{there.dtype} {there.shape}"))
    raise_all(Refused, problems)
    for name, data in tensors.items():
        model[name][...] = data.read()


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new `.npz` of all tensors under their names, in order."""
    if suffix_of(out) != SUFFIX:
        raise Unsupported(Problem(str(out), f"the suffix {out.suffix!r}", SUFFIX))
    rank = {name: i for i, name in enumerate(manifest.source.order)} if manifest.source.framework == "numpy" else {}
    tensors = sorted(model.tensors(), key=lambda tensor: rank.get(tensor.name, len(rank)))
    with new_file(out, force) as file:
        write_npz(file, ((tensor.name, tensor.data) for tensor in tensors), write_comment(_described(manifest)))


def _described(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What the arrays alone do not say of their layers: kind, settings, axes that cross a Flatten, what is no weight."""
    found: dict[str, dict[str, Any]] = {}
    for layer in manifest.layers:
        states = [role for role, parameter in layer.parameters.items() if parameter.state]
        told: dict[str, Any] = {"states": states} if states else {}
        if layer.kind != "unknown":
            told |= layer.model_dump(mode="json", exclude_none=True, exclude=set(Layer.model_fields))
            told |= {} if layer.undecided else {"channels": layer.channels}
        if told:
            found[layer.path] = told
    return found
