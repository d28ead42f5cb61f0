"""TensorFlow.js models for tests: topologies as TensorFlow.js and its converter write them, with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]
Array = np.ndarray[Any, Any]


def layer(cls: str, name: str, inbound: Sequence[str] | None = None, **config: object) -> Json:
    """A serialized layer; `inbound` names the layers that it is called on, in a functional model."""
    entry: Json = {"class_name": cls, "config": {"name": name, "trainable": True, **config}}
    if inbound is not None:
        entry |= {"name": name, "inbound_nodes": [[[other, 0, 0, {}] for other in inbound]] if inbound else []}
    return entry


def sequential(*layers: Json) -> Json:
    return {"class_name": "Sequential", "config": {"name": "sequential_1", "layers": list(layers)}}


def functional(layers: Sequence[Json], inputs: Sequence[str], outputs: Sequence[str]) -> Json:
    ends = {"input_layers": [[name, 0, 0] for name in inputs], "output_layers": [[name, 0, 0] for name in outputs]}
    return {"class_name": "Model", "config": {"name": "model_1", "layers": list(layers), **ends}}


def weights(**shapes: tuple[int, ...]) -> dict[str, Array]:
    """Random weights; a name is written with two underscores for each slash."""
    rng = np.random.default_rng(len(shapes))
    return {name.replace("__", "/"): rng.uniform(0.1, 1, shape).astype("<f4") for name, shape in shapes.items()}


def save(folder: Path, topology: Json, arrays: Mapping[str, Array], entries: Mapping[str, Json] | None = None) -> Path:
    """The model as TensorFlow.js saves it: one file of weights. `entries` add to what the manifest says of a weight."""
    folder.mkdir()
    manifest = [
        {"name": name, "shape": list(a.shape), "dtype": "float32", **(entries or {}).get(name, {})}
        for name, a in arrays.items()
    ]
    document = {
        "format": "layers-model",
        "generatedBy": "TensorFlow.js tfjs-layers v4.22.0",
        "convertedBy": None,
        "modelTopology": {**topology, "keras_version": "tfjs-layers 4.22.0", "backend": "tensor_flow.js"},
        "weightsManifest": [{"paths": ["./weights.bin"], "weights": manifest}],
    }
    (folder / "model.json").write_text(json.dumps(document))
    (folder / "weights.bin").write_bytes(b"".join(a.tobytes() for a in arrays.values()))
    return folder
