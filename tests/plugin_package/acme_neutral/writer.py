"""Writes Acme's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neutral.errors import Problem, Refused, raise_all
from neutral.framework import Format
from neutral.native import NativeModel, Tensor
from neutral.schema.manifest import Manifest

FILES = (Format("acme", ".acme (JSON)", (".acme",)),)


def layer_classes(manifest: Manifest) -> dict[str, tuple[str, dict[str, Any]]]:
    classes = {"dense": "Full", "low_rank": "Thin"}
    raise_all(
        Refused,
        (
            Problem(x.path, x.kind, " or ".join(classes), "leave it out")
            for x in manifest.layers
            if x.kind not in classes
        ),
    )
    return {x.path: (classes[x.kind], {"alpha": x.alpha} if x.kind == "low_rank" else {}) for x in manifest.layers}


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    told = json.loads(template.read_text("utf-8"))
    for name, tensor in tensors.items():
        path, _, local = name.rpartition("/")
        told["layers"][path]["arrays"][local] = tensor.read().tolist()
    out.write_text(json.dumps(told), "utf-8")


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    classes = layer_classes(manifest)
    layers = {
        layer.path: {
            "class": classes[layer.path][0],
            "config": classes[layer.path][1],
            "arrays": {name: tensor.data.read().tolist() for name, tensor in layer.tensors.items()},
        }
        for layer in model.layers
    }
    out.write_text(json.dumps({"acme": 1, "layers": layers}), "utf-8")
