"""TensorFlow's checkpoints and SavedModels, written.

    fill(Path("ckpt-1"), {"dense/kernel": kernel}, Path("new.ckpt"))   # the same checkpoint with another kernel
    build(model, manifest, Path("new.ckpt"))                           # a checkpoint of its own

TensorFlow is needed for one thing alone: to make a SavedModel where there is none, for that holds traced functions.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neutral.containers.files import check_output, new_folder, refuse_inside, refuse_same
from neutral.containers.saved_model import (
    OBJECT_GRAPH_KEY,
    VARIABLES,
    copies,
    locate,
    object_graph,
    pruned_object_graph,
)
from neutral.containers.tensor_bundle import Bundle, Strings
from neutral.containers.tensor_bundle_writing import replace_tensors, write_bundle
from neutral.errors import BadFile, Problem, Refused, Unsupported
from neutral.native import NativeModel, NativeTensor, Tensor
from neutral.running import quiet
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

_SAVED_MODEL_SUFFIX = ".savedmodel"


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of a checkpoint or SavedModel with the named tensors replaced, all else byte for byte as it was."""
    prefix, folder = locate(template)
    with Bundle(prefix) as bundle:
        wanted = _with_copies(bundle, tensors)
        if folder is None:
            target = _prefix_of(out)
            refuse_same(target.with_name(target.name + ".index"), bundle.index_path)
            replace_tensors(bundle, wanted, target, force=force)
            return
        refuse_same(out, folder)
        refuse_inside(out, folder)
        with new_folder(out, force) as fresh:
            _copy_tree(folder, fresh, {bundle.index_path, *bundle.shard_paths})
            replace_tensors(bundle, wanted, fresh / VARIABLES)


def _prefix_of(out: Path) -> Path:
    return out.with_suffix("") if out.suffix == ".index" else out


def _with_copies(bundle: Bundle, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and those that the file holds a second time."""
    wanted = dict(tensors)
    if OBJECT_GRAPH_KEY not in bundle.entries:
        return wanted
    nodes = object_graph(bundle.strings(OBJECT_GRAPH_KEY).values[0], str(bundle.prefix))
    for copy, originals in copies(bundle, nodes).items():
        given = [tensors[name] for name in originals if name in tensors]
        if not given:
            continue
        if len(originals) > 1 and (len(given) < len(originals) or not _all_equal(given)):
            raise Refused(
                Problem(
                    f"{bundle.prefix}: {copy}",
                    f"a copy of one of {len(originals)} variables that have the same name and values",
                    "to know which of them it is",
                    "fill a template with random weights, or export it from the model again",
                )
            )
        wanted.setdefault(copy, given[0])
    return wanted


def _all_equal(tensors: list[Tensor]) -> bool:
    """Whether tensors hold the same bytes."""
    first, *others = tensors
    return all(
        a.tobytes() == b.tobytes() for other in others for a, b in zip(first.tiles(), other.tiles(), strict=True)
    )


def _copy_tree(source: Path, target: Path, without: set[Path]) -> None:
    """The plain files of a folder, but for some. Links and devices are refused, not followed."""
    for folder, names, files in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir(exist_ok=True)
        for name in (*names, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise BadFile(Problem(str(path), "a link or a device", "plain files and folders in a SavedModel"))
            if stat.S_ISREG(mode) and path not in without:
                shutil.copyfile(path, here / name, follow_symlinks=False)


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new checkpoint at the prefix `out`; a SavedModel where `out` ends in `.savedmodel`, or is a folder to be.

    The checkpoint is object-based if the model was read from such a one, else its keys are `<layer>/<name>`.
    """
    if suffix_of(out) == _SAVED_MODEL_SUFFIX or out.is_dir():
        _build_saved_model(model, manifest, out, force)
        return
    metadata = model.metadata
    kept = metadata.get("object_graph")
    tensors: dict[str, Tensor] = {}
    for layer in model.layers:
        for local, tensor in layer.tensors.items():
            key = tensor.name if kept is not None else f"{layer.path.replace('.', '/')}/{local}"
            _put(tensors, key, tensor, out)
    for collection in model.collections.values():
        for tensor in collection:
            _put(tensors, tensor.name, tensor, out)
    for copy, original in metadata.get("copies", {}).items():
        if original in tensors:
            tensors.setdefault(copy, tensors[original])
    strings = {
        name: Strings(tuple(found["shape"]), tuple(map(b64decode, found["values"])))
        for name, found in metadata.get("strings", {}).items()
    }
    if kept is not None:
        graph = pruned_object_graph(kept, {*tensors, *strings}, str(out))
        strings[OBJECT_GRAPH_KEY] = Strings((), (graph,))
    write_bundle(_prefix_of(out), tensors, strings, force=force)


def _put(tensors: dict[str, Tensor], key: str, tensor: NativeTensor, out: Path) -> None:
    if key in tensors:
        raise Refused(Problem(f"{out}: {key}", "two tensors of this name", "names that differ", "rename a layer"))
    tensors[key] = tensor.data


def _build_saved_model(model: NativeModel, manifest: Manifest, out: Path, force: bool) -> None:
    """Keras makes it: the functions in a SavedModel are traced, not written by hand."""
    with quiet():
        _traced(model, manifest, out, force)


def _traced(model: NativeModel, manifest: Manifest, out: Path, force: bool) -> None:
    if manifest.graph is None:
        raise Refused(
            Problem(
                str(out),
                f"an archive without a graph ({manifest.no_graph()})",
                "one that says how its layers are wired, which a SavedModel holds",
                "write a checkpoint (OUT ending in .ckpt), or pass --into a SavedModel",
            )
        )
    check_output(out, force)
    try:
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")
        import keras
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise Unsupported(
            Problem(
                str(out),
                f"{error.name or 'a package'} missing",
                "Keras and TensorFlow, to trace a SavedModel",
                "install neutral-weights[tensorflow], or write a checkpoint (.ckpt)",
            )
        ) from None
    if keras.backend.backend() != "tensorflow":
        found = f"Keras running on {keras.backend.backend()}"
        raise Unsupported(Problem(str(out), found, "its TensorFlow backend", "set KERAS_BACKEND=tensorflow"))
    from neutral.importers.keras import build as build_keras

    with tempfile.TemporaryDirectory(prefix="neutral-") as work:
        path = Path(work, "model.keras")
        build_keras(model, manifest, path)
        try:
            live = keras.models.load_model(path, compile=False)
        except Exception as error:
            found = f"a graph that Keras does not build ({' '.join(str(error).split())})"
            raise Refused(
                Problem(str(out), found, "one that it builds", "write a checkpoint (.ckpt) instead")
            ) from None
        with new_folder(out, force) as fresh:
            live.export(str(fresh), verbose=False)


def fill_live(model: object, tensors: Mapping[str, Tensor]) -> None:
    """Put values into a `tf.Module`, a `tf.train.Checkpoint`, or any object TensorFlow can track, in place.

    A dict of variables is filled by its keys.
    """
    if isinstance(model, Mapping):
        _assign(model, tensors)
        return
    try:
        import tensorflow as tf
    except ImportError:
        raise Unsupported(
            Problem("tensorflow", "not installed", "it, to fill a live object", "install neutral-weights[tensorflow]")
        ) from None
    checkpoint = model if isinstance(model, tf.train.Checkpoint) else tf.train.Checkpoint(root=model)
    with tempfile.TemporaryDirectory(prefix="neutral-") as work:
        before = Path(checkpoint.write(f"{work}/before"))
        fill(before, tensors, Path(work, "after"))
        checkpoint.read(f"{work}/after").assert_consumed()


def _assign(variables: Mapping[Any, Any], tensors: Mapping[str, Tensor]) -> None:
    problems = []
    for name, tensor in tensors.items():
        if name not in variables:
            problems.append(Problem(name, "no such variable", f"one of {len(variables)}"))
        elif tuple(variables[name].shape) != tensor.shape or variables[name].dtype.as_numpy_dtype != tensor.dtype:
            found = f"{tensor.dtype} of shape {list(tensor.shape)}"
            problems.append(
                Problem(name, found, f"{variables[name].dtype.name} of shape {list(variables[name].shape)}")
            )
    if problems:
        raise Refused(*problems)
    for name, tensor in tensors.items():
        variables[name].assign(tensor.read())
