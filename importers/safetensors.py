"""safetensors files of torch state dicts, written from native tensors without torch.

fill(Path("model.safetensors"), {"fc.weight": kernel, ...}, Path("new.safetensors"))   the file with other elements
fill(Path("model.safetensors.index.json"), {...}, Path("new/"))                        all shards, in a new folder
build(model, manifest, Path("new.safetensors"))                                        a new file
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neutral.containers.files import SourceFile, check_output, new_file, new_folder, refuse_same
from neutral.containers.hub_folder import copy_companions
from neutral.containers.safetensors import (
    TensorSet,
    aliases,
    misfits,
    open_safetensors,
    replace_tensors,
    usual_order,
    write,
)
from neutral.errors import Problem, Refused, Unsupported, raise_all
from neutral.native import NativeModel, NativeTensor, Tensor
from neutral.suffixes import suffix_of

if TYPE_CHECKING:
    from neutral.schema.manifest import Manifest

SUFFIX = ".safetensors"


def fill(
    template: Path, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False, key: str | None = None
) -> None:
    """A copy of the template in which the tensors named have new elements; all else stays byte for byte.

    For a set of shards `out` is a new folder with the index and the shards, or, if it ends in `.json`, the index,
    beside which the shards are written under the template's names.
    """
    opened = open_safetensors(template)
    try:
        new = _without_aliases(opened, tensors)
        raise_all(Refused, misfits(str(template), opened.tensors, new))
        if opened.index is None and template.is_dir():
            (source,) = opened.files
            refuse_same(out, template)
            with new_folder(out, force) as folder:
                with new_file(folder / source.path.name) as file:
                    replace_tensors(source, file, new)
                copy_companions(template, folder, frozenset({source.path.name}))
        elif opened.index is None:
            (source,) = opened.files
            refuse_same(out, source.path)
            with new_file(out, force) as file:
                replace_tensors(source, file, new)
        elif out.suffix.lower() == ".json":
            _fill_beside(opened, opened.index, new, out, force)
        else:
            refuse_same(out, opened.index.parent)
            with new_folder(out, force) as folder:
                _fill_shards(opened, opened.index, new, folder / opened.index.name, force)
                written = frozenset({opened.index.name, *(file.path.name for file in opened.files)})
                copy_companions(opened.index.parent, folder, written)
    finally:
        opened.close()


def _fill_beside(opened: TensorSet, index: Path, tensors: Mapping[str, Tensor], out: Path, force: bool) -> None:
    for target, source in [(out, index), *((out.parent / file.path.name, file.path) for file in opened.files)]:
        check_output(target, force)
        refuse_same(target, *(file.path for file in opened.files), index, source)
    if any(file.path.name == out.name for file in opened.files):
        raise Refused(Problem(str(out), "the name of a shard", "another name for the index"))
    _fill_shards(opened, index, tensors, out, force)


def _fill_shards(opened: TensorSet, index: Path, tensors: Mapping[str, Tensor], out: Path, force: bool) -> None:
    for source in opened.files:
        names = opened.shards[source.path]
        with new_file(out.parent / source.path.name, force) as file:
            replace_tensors(source, file, {name: tensors[name] for name in names if name in tensors})
    with SourceFile(index) as text, new_file(out, force) as file:
        file.write(text.read(0, text.size))


def _without_aliases(opened: TensorSet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that the file has; a tied one must be as the one it is tied to."""
    ties = aliases(opened)
    new = {name: data for name, data in tensors.items() if name not in ties}
    problems = []
    for alias, kept in ties.items():
        data = tensors.get(alias)
        if data is not None and not _same(data, new.setdefault(kept, data)):
            problems.append(Problem(alias, f"other elements than {kept} has", "the same, for the two are tied"))
    raise_all(Refused, problems)
    return new


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(a.tobytes() == b.tobytes() for a, b in zip(one.tiles(), other.tiles(), strict=True))


def build(model: NativeModel, manifest: Manifest, out: Path, *, force: bool = False) -> None:
    """A new file: torch's names, ordered as the format's library does it, or as the source file had them.

    Of tied tensors one is written and the others are named in the metadata, so that
    `safetensors.torch.load_model` ties them again.
    """
    if suffix_of(out) != SUFFIX:
        raise Unsupported(Problem(str(out), f"the suffix {out.suffix!r}", SUFFIX))
    settings: Mapping[str, Any] = manifest.source.settings if manifest.source.format == "safetensors" else {}
    metadata = _pairs(settings.get("metadata", {"format": "pt"}))
    tensors = {tensor.name: tensor for tensor in model.tensors()}
    left_out = dict(_left_out(tensors, metadata))
    untied = {k for k, v in metadata.items() if k in tensors and v in tensors and k not in left_out}
    metadata = {k: v for k, v in metadata.items() if k not in untied} | left_out
    named = usual_order((name, tensor.data) for name, tensor in tensors.items() if name not in left_out)
    order = settings.get("order")
    rank = {str(name): i for i, name in enumerate(order)} if isinstance(order, list) else {}
    if rank:
        named.sort(key=lambda item: rank.get(item[0], len(rank)))
    with new_file(out, force) as file:
        write(file, named, metadata)


def _pairs(told: object) -> dict[str, str]:
    """Metadata out of an archive: a list of pairs, or a mapping, as older archives have it."""
    pairs = told.items() if isinstance(told, Mapping) else told if isinstance(told, list) else ()
    return {str(pair[0]): str(pair[1]) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2}


def _left_out(tensors: Mapping[str, NativeTensor], metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(left out, kept) for all tied tensors: kept is the one that the source file had, else the first by name."""
    tied: dict[object, list[str]] = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.identity is not None:
            tied.setdefault((tensor.identity, tensor.data.shape, tensor.data.dtype), []).append(name)
    for names in tied.values():
        kept = next((metadata[name] for name in names if metadata.get(name) in names), names[0])
        yield from ((name, kept) for name in names if name != kept)
