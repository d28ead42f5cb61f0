"""Acme's files: {"acme": 1, "layers": {path: {"class": ..., "config": {...}, "arrays": {name: nested lists}}}}."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
from neutral.signatures import Probe


def signature(probe: Probe) -> str | None:
    return "acme" if "acme" in probe.json else None


def read(source: Path, *, key: str | None = None) -> NativeModel:
    layers = []
    for path, told in json.loads(source.read_text("utf-8"))["layers"].items():
        arrays = {name: np.array(values, "float32") for name, values in told["arrays"].items()}
        tensors = {name: NativeTensor(f"{path}/{name}", from_array(array)) for name, array in arrays.items()}
        layers.append(NativeLayer(path, told["class"], tensors, told["config"], "class"))
    return NativeModel("acme", "acme", tuple(layers))
