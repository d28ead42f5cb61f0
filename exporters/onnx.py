"""ONNX models read into native layers, without the onnx package.

    model = read(Path("model.onnx"))

An initializer is known by the operator that uses it as its weight; its layer is called after the module it came from, where
the exporter says so. What no such operator uses is kept, as a layer of unknown kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neutral.containers.onnx import ModelProto, OnnxFile, open_onnx
from neutral.containers.onnx_constants import leaves
from neutral.conventions.onnx_layers import FoundLayer, View, layers_of
from neutral.errors import BadFile, Problem, Unsupported, WrongUsage
from neutral.exporters.onnx_graph import wired
from neutral.native import NativeLayer, NativeModel, NativeTensor


def read(source: Path, *, key: str | None = None) -> NativeModel:
    """The layers of a model file, with what lies in its files of external data."""
    if key is not None:
        raise WrongUsage(Problem(str(source), f"the key {key!r}", "none", "an ONNX model holds one set of weights"))
    opened = open_onnx(source)
    try:
        return _model(opened)
    except BaseException:
        opened.close()
        raise


def read_live(model: Any) -> NativeModel:
    """The layers of an `onnx.ModelProto` in memory."""
    import tempfile

    if not hasattr(model, "SerializeToString"):
        raise Unsupported(Problem("model", f"a {type(model).__name__}", "an onnx.ModelProto"))
    with tempfile.TemporaryDirectory(prefix="neutral-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        # The open file outlives its name.
        return read(path)


def _model(opened: OnnxFile) -> NativeModel:
    found = layers_of(opened.model, str(opened.path))
    layers = tuple(_layer(layer) for layer in found.layers)
    if not any(layer.tensors for layer in layers):
        raise BadFile(Problem(str(opened.path), "no weights", "at least one", "is this a file of weights?"))
    model = NativeModel(
        framework="onnx",
        format="onnx",
        layers=layers,
        splits=found.splits,
        ordered=False,
        metadata=_metadata(opened.model)
        | ({"turned": sorted(found.turned)} if found.turned else {})
        | ({"remarks": dict(found.remarks)} if found.remarks else {}),
        notes=found.notes,
        close=opened.close,
        unsettled=found.unsettled,
    )
    return wired(model, opened.model, found)
    return wired(model, opened.model, found)


def _layer(found: FoundLayer) -> NativeLayer:
    tensors = {local: _tensor(view) for local, view in found.tensors.items()}
    return NativeLayer(found.path, found.cls, tensors, found.config, "graph" if found.cls is not None else "none")


def _tensor(view: View) -> NativeTensor:
    stored = list(leaves(view.expression))
    identity = None
    if len(stored) == 1:
        external = stored[0].tensor.external
        lies = (external.data_file.location, external.offset) if external and external.length else stored[0].name
        identity = ("onnx", lies, view.factor)
    return NativeTensor(view.name, view.data(), identity)


def _metadata(model: ModelProto) -> dict[str, Any]:
    """What a new file says of itself as this one did."""
    return {
        "ir_version": model.ir_version,
        "opsets": [[domain, version] for domain, version in model.opsets.items()],
        "producer": [model.producer_name, model.producer_version],
        "metadata": [list(pair) for pair in model.metadata.items()],
    }
