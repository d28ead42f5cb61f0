"""ONNX models written without the onnx package.

fill(Path("model.onnx"), {"fc.weight": kernel, ...}, Path("new.onnx"))   the model with other elements
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neutral.containers.elements import element_bytes
from neutral.containers.files import refuse_same
from neutral.containers.onnx import open_onnx
from neutral.containers.onnx_writing import replace_tensors
from neutral.conventions.onnx_layers import layers_of
from neutral.errors import Problem, Refused, raise_all
from neutral.native import NativeModel, Tensor

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of the template in which the tensors named have new elements; all else stays byte for byte.

    Names are those that the reader gives. Files of external data are copied beside it, under the name of `out`.
    """
    with open_onnx(template) as opened:
        refuse_same(out, template)
        views = {
            view.name: view
            for layer in layers_of(opened.model, str(template)).layers
            for view in layer.tensors.values()
        }
        problems = []
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name not in views:
                problems.append(Problem(name, f"no tensor of that name in {template}", "one"))
                continue
            for place, data in views[name].stored(tensor).items():
                if place in stored and not _same(stored[place], data):
                    problems.append(
                        Problem(
                            name, f"other elements than another layer has in {place}", "the same, for the two are tied"
                        )
                    )
                stored[place] = data
        raise_all(Refused, problems)
        replace_tensors(opened, stored, out, force=force)


def fill_live(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give an `onnx.ModelProto` in memory other elements."""
    with tempfile.TemporaryDirectory(prefix="neutral-") as folder:
        old, new = Path(folder) / "old.onnx", Path(folder) / "new.onnx"
        old.write_bytes(model.SerializeToString())
        fill(old, tensors, new)
        model.ParseFromString(new.read_bytes())


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new model, from the archive's graph."""
    from neutral.importers import onnx_model

    onnx_model.build(model, manifest, out, force=force)


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return (one.shape, one.dtype) == (other.shape, other.dtype) and _digest(one) == _digest(other)


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    for piece in element_bytes(tensor):
        digest.update(piece)
    return digest.digest()
