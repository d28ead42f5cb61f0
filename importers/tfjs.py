"""Writes TensorFlow.js layers models without TensorFlow.js: into a template, or new.

fill(Path("web_model"), {"fc/kernel": kernel, ...}, Path("new"))     a folder: model.json and its shards
fill(Path("web_model"), {...}, Path("new/model.json"))               the same, by the name of the JSON

A new model has the topology of the archive's graph, or, going back to TensorFlow.js, its source's own JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from neutral.containers.files import new_folder, refuse_inside, refuse_same
from neutral.containers.tfjs_model import MODEL, open_tfjs, replace, write, write_again
from neutral.conventions.tfjs import own_text
from neutral.errors import Problem, WrongUsage
from neutral.native import NativeLayer, NativeModel, Tensor
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

FOLDERS = ("", ".tfjs")
"""Suffixes of the folder of a model."""


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of the template with new values for the weights named; its JSON stays byte for byte.

    `out` is a new folder, or, if it ends in `.json`, the model's JSON, beside which its shards are written.
    """
    opened = open_tfjs(template)
    try:
        refuse_same(out, opened.path, *(file.path for file in opened.files))
        # Its shards have the template's names, so that they would take the place of the template's own.
        refuse_inside(out, opened.path.parent)
        with _place(out, opened.path.name, force) as model:
            replace(opened, tensors, model, force)
    finally:
        opened.close()


@contextmanager
def _place(out: Path, name: str, force: bool) -> Iterator[Path]:
    """Where the JSON of a model goes: `out` itself, or into the folder `out`."""
    if suffix_of(out) == ".json":
        yield out
        return
    with new_folder(out, force) as folder:
        yield folder / name


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new model: `out` is a folder without a suffix or with `.tfjs`, or the name of its JSON."""
    from neutral.importers.tfjs_config import layer_names, topology

    if suffix_of(out) not in (*FOLDERS, ".json"):
        expected = "a folder's name, .tfjs or .json"
        raise WrongUsage(Problem(str(out), f"the suffix {out.suffix}", expected, "choose another suffix"))
    own = own_text(manifest.source.settings) if manifest.source.framework == "tfjs" else None
    if own is not None and model.format == manifest.source.format:
        aside = (tensor for tensors in model.collections.values() for tensor in tensors)
        tensors = {tensor.name: tensor.data for tensor in (*aside, *model.tensors())}
        with _place(out, MODEL, force) as place:
            write_again(place, own[0].encode(), own[1], tensors, force)
        return
    names = layer_names(manifest)
    described = {"generatedBy": "neutral", "convertedBy": None}
    with _place(out, MODEL, force) as place:
        write(place, topology(manifest), list(_weights(model.layers, names)), described, force)


def _weights(layers: Sequence[NativeLayer], names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(name that TensorFlow.js looks for, tensor) of every layer."""
    for layer in layers:
        scope = names.get(layer.path, layer.path)
        for local, tensor in layer.tensors.items():
            side, _, variable = local.rpartition("/")
            inner = f"{side.removesuffix('_layer')}_{scope}/" if side else ""
            yield f"{scope}/{inner}{variable}", tensor.data
