"""PaddlePaddle's files and live layers, written from native tensors. Files are written without paddle.

fill(Path("lenet5.pdparams"), {"conv1.weight": kernel, ...}, Path("new.pdparams"))   the template's file with other elements
fill_live(layer, {"conv1.weight": kernel, ...})                                      the same, in place
build(model, manifest, Path("new.pdparams"))                                         a new state dict
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from neutral.containers.files import SourceFile, new_file, refuse_same
from neutral.containers.numpy_pickle import copy_with
from neutral.containers.paddle_file import DTYPES, PaddleFile
from neutral.containers.paddle_writing import write_state_dict
from neutral.containers.safetensors import misfits, open_safetensors, replace_tensors, usual_order, write
from neutral.conventions.paddle_names import places, repeated
from neutral.errors import Problem, Refused, Unsupported, raise_all
from neutral.native import NativeModel, Tensor
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

SUFFIXES: Final = (".pdparams", ".safetensors")


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of a file of paddle.save in which the tensors named have new elements; all else stays as it was.

    What a recurrent layer has under two names is replaced under both. `key` names the set if the file has several.
    """
    refuse_same(out, template)
    with SourceFile(template) as file:
        plain = file.size > 9 and file.read(6, 3) == b"\0\0{"
    if plain:
        _fill_safetensors(template, tensors, out, force)
        return
    with PaddleFile(template) as source:
        _, values = source.choose(key)
        problems = []
        entries = []
        for name, data in with_repeated(values, tensors).items():
            saved = values.get(name)
            if saved is None:
                problems.append(Problem(name, "no tensor of that name", "one of the template's"))
            elif (saved.array.shape, source.dtype(saved).newbyteorder("=")) != (data.shape, data.dtype):
                there = f"{source.dtype(saved)}{list(saved.array.shape)} as in the template"
                problems.append(Problem(name, f"{data.dtype}{list(data.shape)}", there))
            else:
                entries.append((name, saved.array, data))
        raise_all(Refused, problems)
        with new_file(out, force) as copy:
            copy_with(source.storage, copy, entries)


def _fill_safetensors(template: Path, tensors: Mapping[str, Tensor], out: Path, force: bool) -> None:
    opened = open_safetensors(template)
    try:
        if opened.index is not None:
            raise Unsupported(Problem(str(template), "an index of shards", "one file", "name the file itself"))
        new = with_repeated(opened.tensors, tensors)
        raise_all(Refused, misfits(str(template), opened.tensors, new))
        with new_file(out, force) as file:
            replace_tensors(opened.files[0], file, new)
    finally:
        opened.close()


def with_repeated(there: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and those of recurrent layers under the second name that they have in the template, too."""
    second = {name: at.twin for name, at in places(there).items() if at.twin is not None}
    return {**tensors, **{name: tensors[flat] for name, flat in second.items() if flat in tensors}}


def fill_live(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into a live `paddle.nn.Layer` or a state dict of its tensors. All are checked before the first."""
    state = model if isinstance(model, Mapping) else model.state_dict()
    problems = []
    for name, data in with_repeated(state, tensors).items():
        there = state.get(name)
        if there is None or not hasattr(there, "set_value"):
            problems.append(Problem(name, "no tensor of that name", "a name of the layer's state dict"))
            continue
        dtype = str(there.dtype).rpartition(".")[2]
        if data.shape != tuple(there.shape) or DTYPES.get(dtype) != data.dtype:
            there_is = f"{dtype}{list(there.shape)} as in the layer"
            problems.append(Problem(name, f"{data.dtype}{list(data.shape)}", there_is))
    problems += _padding_rows(model, tensors)
    raise_all(Refused, problems)
    for name, data in with_repeated(state, tensors).items():
        array = data.read()
        state[name].set_value(array.view(np.uint16) if array.dtype == DTYPES["bfloat16"] else array)


def _padding_rows(model: Any, tensors: Mapping[str, Tensor]) -> list[Problem]:
    """Embeddings that would give zeros for a row that is not zero."""
    problems = []
    layers = () if isinstance(model, Mapping) else model.named_sublayers(include_self=True)
    for path, layer in layers:
        index, name = vars(layer).get("_padding_idx"), f"{path}.weight" if path else "weight"
        if type(layer).__name__ == "Embedding" and type(index) is int and index >= 0 and name in tensors:
            data = tensors[name]
            if data.block([(index, index + 1), (0, data.shape[1])]).any():
                found = f"a row {index} that is not zero"
                expected = "zeros, for it is the layer's padding_idx, for which paddle gives zeros"
                problems.append(Problem(name, found, expected, "make the layer without padding_idx"))
    return problems


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new file of paddle.save with a state dict, which `paddle.load` and `set_state_dict` take.

    Recurrent layers have their parameters under both names. The parameters' own names are written if the source had them.
    """
    if suffix_of(out) not in SUFFIXES:
        raise Unsupported(Problem(str(out), f"the suffix {out.suffix!r}", " or ".join(SUFFIXES)))
    told = manifest.source.settings.get("metadata") if manifest.source.framework == "paddle" else None
    kept: Mapping[str, Any] = told if isinstance(told, dict) else {}
    own_names, once = _pairs(kept.get("parameters")), kept.get("once")
    entries = _entries(model, {str(name) for name in once} if isinstance(once, list) else set())
    order = list(own_names or ()) or (manifest.source.order if manifest.source.framework == "paddle" else ())
    rank = {name: i for i, name in enumerate(order)}
    named = sorted(entries.items(), key=lambda item: rank.get(item[0], len(rank)))
    raise_all(
        Refused,
        [
            Problem(name, f"elements of {data.dtype}", f"one of {', '.join(DTYPES)}", "convert it first")
            for name, data in named
            if data.dtype not in DTYPES.values()
        ],
    )
    with new_file(out, force) as file:
        if suffix_of(out) == SUFFIXES[0]:
            write_state_dict(file, named, own_names)
        else:
            # Paddle does not look at the metadata. Without them the file could be torch's, whose Linear is turned.
            write(file, usual_order(named), {"format": "paddle"})


def _entries(model: NativeModel, once: set[str]) -> dict[str, Tensor]:
    """Every tensor by its full name; those of a recurrent layer twice, but for those that the source had once."""
    found = {tensor.name: tensor.data for tensor in model.tensors()}
    for layer in model.layers:
        if layer.cls in ("SimpleRNN", "LSTM", "GRU", None):
            for local, second in repeated(layer.tensors).items():
                flat = layer.tensors[local]
                name = flat.name[: -len(local)] + second
                if flat.name not in once and flat.name.endswith(local):
                    found.setdefault(name, flat.data)
    return found


def _pairs(told: object) -> dict[str, str] | None:
    """The table of names out of an archive."""
    if not isinstance(told, list):
        return None
    return {str(pair[0]): str(pair[1]) for pair in told if isinstance(pair, list | tuple) and len(pair) == 2}
