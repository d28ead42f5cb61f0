"""The archive: a safetensors file whose one metadata key, `neutral`, holds the manifest.

    with open_archive("model.nwt") as archive:
        archive.manifest.layers[0].kind, archive.tensor("conv1/kernel").read()

Written in one pass: the header goes out with digests of zeros, which have their final length, and is written again when
the elements have gone by and been hashed. Equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from pydantic import ValidationError

from neutral.canonical import CROSSING, HEADED, CanonicalLayer, CanonicalTensor, fine_axes
from neutral.containers.elements import element_bytes
from neutral.containers.files import SourceFile, check_output, leads_outside, new_file, new_files
from neutral.containers.safetensors import dtype_code, header_bytes, open_safetensors, read_header
from neutral.errors import BadFile, Problem, Refused, an, printable, raise_all
from neutral.native import NativeTensor, Tensor
from neutral.schema.graph import Graph
from neutral.schema.kinds import KINDS, LABELS, Layer, Parameter
from neutral.schema.manifest import FORMAT_VERSION, Loss, Manifest, Source
from neutral.suffixes import ARCHIVE_SUFFIXES, suffix_of, without_suffix

KEY = "neutral"
SUFFIX, INDEX_SUFFIX = ARCHIVE_SUFFIXES
_NO_DIGEST = "0" * 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Contents:
    """What goes into an archive: canonical layers and all that is known beside them."""

    layers: Sequence[CanonicalLayer]
    source: Source
    graph: Graph | None = None
    ordered: bool = False
    collections: Mapping[str, tuple[NativeTensor, ...]] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    created: str | None = None


class Archive:
    """An open archive, or a model in canonical form that was never written to one.

    `manifest` is validated; `layers` are canonical layers whose tensors are read when asked for.
    """

    def __init__(
        self,
        manifest: Manifest,
        contents: Contents,
        tensors: Mapping[str, Tensor],
        close: Callable[[], None],
        path: Path | None = None,
    ) -> None:
        self.manifest = manifest
        self.contents = contents
        self.path = path
        self._tensors = tensors
        self._close = close

    @property
    def layers(self) -> Sequence[CanonicalLayer]:
        return self.contents.layers

    def tensor(self, name: str) -> Tensor:
        """The unread tensor `<layer>/<role>`, in its canonical axes."""
        parameter = dict(self.manifest.parameters()).get(name)
        stored_name = parameter.tied_to if parameter is not None and parameter.tied_to else name
        if stored_name not in self._tensors:
            raise BadFile(
                Problem(str(self.path or "archive"), f"no tensor {printable(name)!r}", "one that the manifest lists")
            )
        return self._tensors[stored_name]

    def names(self) -> tuple[str, ...]:
        """The names of all weights and states."""
        return tuple(name for name, _ in self.manifest.parameters())

    def check(self, progress: Progress | None = None) -> None:
        """Recompute every digest; `BadFile` names each tensor whose elements are not those that were written."""
        listed = [*self.manifest.parameters(), *_collected(self.manifest)]
        mine = {name: p for name, p in listed if p.tied_to is None}
        found = digests([(name, self._tensors[name]) for name in mine], progress)
        problems = [
            Problem(
                f"{self.path}: {name}",
                "elements that differ from the digest",
                "the elements that were written",
                "restore the file from a copy",
            )
            for name, parameter in mine.items()
            if found[name] != parameter.sha256
        ]
        for name, parameter in listed:
            if parameter.tied_to is not None and mine[parameter.tied_to].sha256 != parameter.sha256:
                problems.append(
                    Problem(f"{self.path}: {name}", "a digest other than its tie's", f"that of {parameter.tied_to}")
                )
        if weights_digest(self.manifest.layers) != self.manifest.weights_digest:
            problems.append(
                Problem(
                    f"{self.path}: manifest",
                    "a weights digest that is not that of its layers",
                    "the digest of the layers",
                )
            )
        if problems:
            raise BadFile(*problems)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that tensors are read from."""
        self._close()


def _collected(manifest: Manifest) -> Iterator[tuple[str, Parameter]]:
    for collection, parameters in manifest.collections.items():
        for name, parameter in parameters.items():
            yield f"@{collection}/{name}", parameter


# --- from canonical layers to the manifest and its tensors ---


@dataclass(frozen=True)
class _Item:
    """One parameter on its way into the archive: its name there and its tensor in the axes that are stored."""

    name: str
    tensor: Tensor
    axes: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]
    origin: CanonicalTensor
    tied_to: str | None = None


def _items(layers: Sequence[CanonicalLayer], tie: bool = True) -> list[list[_Item]]:
    seen: dict[Hashable, list[_Item]] = {}
    grouped = []
    for layer in layers:
        mine = []
        for role, tensor in layer.tensors.items():
            fine = fine_axes(layer, tensor)
            data, position = tensor.data, 0
            for group in fine:
                data = data.split(position, [size for _, size in group])
                position += len(group)
            axes = tuple(name for group in fine for name, _ in group)
            item = _Item(f"{layer.path}/{role}", data, axes, tensor.labels, tensor)
            if tie and tensor.identity is not None:
                first = next((i for i in seen.get(tensor.identity, ()) if _same_elements(i, item)), None)
                if first is None:
                    seen.setdefault(tensor.identity, []).append(item)
                else:
                    item = replace(item, tied_to=first.name)
            mine.append(item)
        grouped.append(mine)
    return grouped


def _same_elements(a: _Item, b: _Item) -> bool:
    if a.tensor.shape != b.tensor.shape or a.tensor.dtype != b.tensor.dtype:
        return False
    found = digests([("a", a.tensor), ("b", b.tensor)])
    return found["a"] == found["b"]


def digests(
    tensors: Iterable[tuple[str, Tensor]], progress: Progress | None = None, sink: Callable[[Any], object] | None = None
) -> dict[str, str]:
    """SHA-256 of each tensor's elements, C order, little-endian; `sink` receives the bytes as they go by."""
    listed = list(tensors)
    total = sum(tensor.nbytes for _, tensor in listed)
    done = 0
    found = {}
    with ThreadPoolExecutor(1) as pool:
        for name, tensor in listed:
            sha = hashlib.sha256()
            for piece in element_bytes(tensor):
                pending: Future[None] = pool.submit(sha.update, piece)
                if sink is not None:
                    sink(piece)
                pending.result()
                done += len(piece)
                if progress is not None:
                    progress(done, total)
            found[name] = sha.hexdigest()
    return found


def _parameter(item: _Item, sha256: str) -> Parameter:
    return Parameter(
        axes=item.axes,
        labels={axis: tuple(names) for axis, names in item.labels.items()},
        shape=item.tensor.shape,
        dtype=item.tensor.dtype.name,
        sha256=sha256,
        native=dict(item.origin.native),
        tied_to=item.tied_to,
        state=item.origin.state,
    )


def _manifest(contents: Contents, grouped: Sequence[Sequence[_Item]], found: Mapping[str, str]) -> Manifest:
    layers = []
    for layer, items in zip(contents.layers, grouped, strict=True):
        parameters = {}
        for item in items:
            role = item.name[len(layer.path) + 1 :]
            parameters[role] = _parameter(item, found.get(item.tied_to or item.name, _NO_DIGEST))
        extra = {"candidates": layer.candidates} if layer.kind == "unknown" else {}
        try:
            described = KINDS[layer.kind](
                path=layer.path,
                native=layer.native,
                native_path=layer.native_path,
                part=layer.part,
                evidence=layer.evidence,
                parameters=parameters,
                channels=dict(layer.channels),
                undecided=layer.undecided,
                **extra,
                **layer.attributes,
            )
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            what = f"{'.'.join(str(part) for part in first['loc'])} that makes no sense ({first['msg']})"
            raise BadFile(Problem(layer.path, what, f"a setting that {an(layer.kind)} can have")) from None
        layers.append(described)
    collections = {
        name: {
            t.name: Parameter(
                axes=tuple(f"d{i}" for i in range(len(t.data.shape))),
                shape=t.data.shape,
                dtype=t.data.dtype.name,
                sha256=found.get(f"@{name}/{t.name}", _NO_DIGEST),
                native={t.name: t.name},
            )
            for t in tensors
        }
        for name, tensors in contents.collections.items()
    }
    return Manifest(
        source=contents.source,
        layers=tuple(layers),  # type: ignore[arg-type]
        weights_digest=weights_digest(layers),
        ordered=contents.ordered,
        graph=contents.graph,
        collections=collections,
        losses=contents.losses,
        notes=contents.notes,
        created=contents.created,
    )


def weights_digest(layers: Iterable[Layer]) -> str:
    """SHA-256 over the sorted digests of the layers that have weights.

    A layer's digest is that of its kind and, per role, axes, shape, dtype and elements. Axes count as the kind fuses
    them: a kernel known to follow a Flatten has the digest that it has where nobody knows.
    """
    return hashlib.sha256("\n".join(sorted(layer_digests(layers).values())).encode()).hexdigest()


def layer_digests(layers: Iterable[Layer]) -> dict[str, str]:
    """The digest of each layer that has weights, by path."""
    found = {}
    for layer in layers:
        roles = {}
        for role, parameter in layer.parameters.items():
            if not parameter.state:
                axes, shape = _coarse(layer, role, parameter)
                roles[role] = [axes, shape, parameter.dtype, parameter.sha256]
        if roles:
            text = json.dumps([layer.kind, roles], sort_keys=True, separators=(",", ":"))  # type: ignore[attr-defined]
            found[layer.path] = hashlib.sha256(text.encode()).hexdigest()
    return found


_FINE = (*dict.fromkeys(CROSSING.values()), HEADED)


def _coarse(layer: Layer, role: str, parameter: Parameter) -> tuple[list[str], list[int]]:
    """A parameter's axes as its kind fuses them, with their sizes."""
    axes, shape = list(parameter.axes), list(parameter.shape)
    for first, second in _FINE:
        for i in range(len(axes) - 1, 0, -1):
            if axes[i - 1] == first and axes[i] == second:
                axes[i - 1 : i + 1] = [""]
                shape[i - 1 : i + 1] = [shape[i - 1] * shape[i]]
    spec = type(layer).parameters_of.get(role)
    if spec is not None and "" in axes:
        names = [axis for axis in spec.axes if axis != "..."] or ["feature"]
        for i, axis in enumerate(axes):
            if axis == "":
                axes[i] = names[i] if i < len(names) else axis
    return axes, shape


def manifest_without_digests(contents: Contents) -> Manifest:
    """The manifest of a model on its way to a file: all but the digests, which are zeros."""
    return _manifest(contents, _items(contents.layers, tie=False), {})


# --- writing ---


def describe(contents: Contents, close: Callable[[], None], progress: Progress | None = None) -> Archive:
    """A model in canonical form with its manifest, every digest computed, nothing written."""
    grouped = _items(contents.layers)
    tensors = _stored(contents, grouped)
    manifest = _manifest(contents, grouped, digests(tensors.items(), progress))
    return Archive(manifest, contents, tensors, close)


def _stored(contents: Contents, grouped: Sequence[Sequence[_Item]]) -> dict[str, Tensor]:
    """What the archive stores, by name: larger dtypes first, then in the order of the manifest."""
    named = [(item.name, item.tensor) for items in grouped for item in items if item.tied_to is None]
    for collection, natives in contents.collections.items():
        named.extend((f"@{collection}/{native.name}", native.data) for native in natives)
    names = [item.name for items in grouped for item in items if item.tied_to is not None] + [name for name, _ in named]
    raise_all(
        Refused,
        (
            Problem(
                name, "two tensors of this name (a/b, c and a, b/c)", "names that differ", "rename one in the source"
            )
            for name in _twice(names)
        ),
    )
    return dict(sorted(named, key=lambda pair: -pair[1].dtype.itemsize))


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def write_archive(
    contents: Contents,
    path: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    source_digest: Callable[[], str] | None = None,
    shard_bytes: int | None = None,
) -> Path:
    """Write an archive in one pass; gives the path to open it by. `source_digest` runs beside the writing.

    With `shard_bytes` the tensors go into files `<stem>-00001-of-0000N.nwt` of about that size, and the manifest into
    `<stem>.nwt.index.json` beside them, which is the path given back.
    """
    grouped = _items(contents.layers)
    tensors = _stored(contents, grouped)
    unwritable = [
        Problem(name, f"{tensor.dtype} elements", "a dtype that safetensors can hold", "convert the weights first")
        for name, tensor in tensors.items()
        if dtype_code(tensor.dtype) is None
    ]
    if unwritable:
        raise Refused(*unwritable)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(source_digest) if source_digest is not None else None
        if pending is not None:
            contents = replace(contents, source=contents.source.model_copy(update={"sha256": _NO_DIGEST}))

        def finished(found: Mapping[str, str]) -> str:
            source = contents.source
            if pending is not None:
                source = source.model_copy(update={"sha256": pending.result()})
            return _manifest(replace(contents, source=source), grouped, found).to_json()

        if shard_bytes is not None:
            return _write_shards(tensors, path, shard_bytes, finished, force, progress)
        specs = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        with new_file(path, force) as out:
            first = header_bytes(specs, {KEY: _manifest(contents, grouped, {}).to_json()})
            out.write(first)
            found = digests(tensors.items(), progress, out.write)
            _rewrite_header(out, first, header_bytes(specs, {KEY: finished(found)}))
    return path


def _write_shards(
    tensors: Mapping[str, Tensor],
    path: Path,
    shard_bytes: int,
    finished: Callable[[Mapping[str, str]], str],
    force: bool,
    progress: Progress | None,
) -> Path:
    shards = _sharded(tensors, shard_bytes)
    stem = without_suffix(path) if suffix_of(path) in ARCHIVE_SUFFIXES else path.name
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}{SUFFIX}" for i in range(1, len(shards) + 1)]
    index = path.with_name(f"{stem}{INDEX_SUFFIX}")
    for name in (*names, index.name):
        check_output(path.with_name(name), force)
    found: dict[str, str] = {}
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    with new_files(path.parent, [*names, index.name], force) as made:
        for name, shard in zip(names, shards, strict=True):
            specs = [(tensor_name, tensor.dtype, tensor.shape) for tensor_name, tensor in shard.items()]
            before = done
            step = None if progress is None else lambda here, _, so_far=before: progress(so_far + here, total)
            with new_file(made / name) as out:
                out.write(header_bytes(specs, {}))
                found |= digests(shard.items(), step, out.write)
            done += sum(tensor.nbytes for tensor in shard.values())
        where = {tensor_name: name for name, shard in zip(names, shards, strict=True) for tensor_name in shard}
        content = {"metadata": {KEY: finished(found)}, "weight_map": where}
        with new_file(made / index.name) as out:
            out.write(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
    return index


def _sharded(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in order, in groups of at most `shard_bytes`, at least one in each."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _rewrite_header(out: BinaryIO, first: bytes, final: bytes) -> None:
    assert len(first) == len(final), "digests have a fixed length"
    out.seek(0)
    out.write(final)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder or a set of files: of the sorted lines `<sha256>  <relative name>`."""
    if path.is_file():
        return _sha256(path)
    found = sorted(p for p in (path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}.*")) if p.is_file())
    base = path if path.is_dir() else path.parent
    lines = "".join(f"{_sha256(p)}  {p.relative_to(base).as_posix()}\n" for p in found)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading ---


def is_archive(path: Path) -> bool:
    """True if a file is an archive, by its content; `BadFile` if it cannot be told."""
    with SourceFile(path) as file:
        return KEY in read_header(file).metadata


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """Open an archive, or a set of shards by its index; structure is verified, elements are read when asked for.

    Raises `BadFile` for all that is not exactly an archive of a known version.
    """
    where = Path(path)
    opened = open_safetensors(where)
    try:
        metadata = opened.metadata if opened.index is None else _index_metadata(opened.index)
        text = metadata.get(KEY)
        if not isinstance(text, str) or len(metadata) != 1:
            found = f"metadata {sorted(metadata)}"
            raise BadFile(Problem(str(where), found, f"the one key {KEY!r}", "give an archive that neutral wrote"))
        _check_version(where, text)
        manifest = Manifest.from_json(text, str(where))
        if not manifest.is_of(text):
            found = "a manifest that differs from its digest"
            raise BadFile(Problem(str(where), found, "the manifest that was written", "restore the file from a copy"))
        _check_structure(where, manifest, opened.tensors)
        contents = _contents(manifest, opened.tensors)
        raise_all(BadFile, list(_axis_problems(where, manifest, contents.layers))[:20])
        return Archive(manifest, contents, opened.tensors, opened.close, where)
    except BaseException:
        opened.close()
        raise


def _index_metadata(index: Path) -> dict[str, Any]:
    metadata = json.loads(index.read_bytes()).get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _check_version(where: Path, text: str) -> None:
    try:
        version = json.loads(text).get("format_version")
    except (ValueError, AttributeError, RecursionError):
        version = None
    if not isinstance(version, str) or version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise BadFile(
            Problem(
                str(where),
                f"archive version {printable(version, 40)}",
                f"version {FORMAT_VERSION.split('.')[0]}.x",
                "use a newer neutral",
            )
        )


def _check_structure(where: Path, manifest: Manifest, header: Mapping[str, Tensor]) -> None:
    """Manifest and header must describe the same tensors."""
    pairs = [*manifest.parameters(), *_collected(manifest)]
    listed = dict(pairs)
    mine = {name: p for name, p in listed.items() if p.tied_to is None}
    problems = [
        Problem(f"{where}: {name}", "two parameters of this name", "one") for name in _twice(name for name, _ in pairs)
    ]
    problems += [
        Problem(f"{where}: {name}", "a tensor of the manifest alone", "it in the header too")
        for name in mine.keys() - header.keys()
    ]
    problems += [
        Problem(f"{where}: {name}", "a tensor of the header alone", "it in the manifest too")
        for name in header.keys() - mine.keys()
    ]
    for name in mine.keys() & header.keys():
        parameter, entry = mine[name], header[name]
        told = (parameter.dtype, parameter.shape)
        if told != (entry.dtype.name, entry.shape):
            problems.append(
                Problem(
                    f"{where}: {name}", f"{told} in the manifest", f"{(entry.dtype.name, entry.shape)} as in the header"
                )
            )
    for name, parameter in listed.items():
        if len(parameter.axes) != len(parameter.shape):
            problems.append(
                Problem(f"{where}: {name}", f"{len(parameter.axes)} axes", f"{len(parameter.shape)}, one per size")
            )
        tie = parameter.tied_to
        if tie is not None and (
            tie not in mine or (mine[tie].dtype, mine[tie].shape) != (parameter.dtype, parameter.shape)
        ):
            problems.append(Problem(f"{where}: {name}", f"a tie to {tie}", "a stored tensor of its shape and dtype"))
    problems += [
        Problem(f"{where}: {name}", "a name that leads out of a folder", "a plain name")
        for name in dict.fromkeys(_names(manifest))
        if leads_outside(name)
    ]
    for layer in manifest.layers:
        problems.extend(_kind_problems(where, layer))
    if weights_digest(manifest.layers) != manifest.weights_digest:
        problems.append(
            Problem(
                f"{where}: manifest",
                "a weights digest that is not that of its layers",
                "the digest of the layers",
                "restore the file from a copy",
            )
        )
    if problems:
        raise BadFile(*sorted(problems, key=lambda p: p.where)[:20])


def _names(manifest: Manifest) -> Iterator[str]:
    """Every name that may become one in a file that is written."""
    for layer in manifest.layers:
        yield layer.path
        for role, parameter in layer.parameters.items():
            yield from (role, *parameter.native.values())
    for collection, parameters in manifest.collections.items():
        yield from (collection, *parameters)


def _kind_problems(where: Path, layer: Layer) -> Iterator[Problem]:
    """Parameters must have the axes of their kind, and their labels in its order."""
    spec = type(layer).parameters_of
    if not spec:
        return
    for role, parameter in layer.parameters.items():
        if parameter.state or role not in spec:
            continue
        axes, _ = _coarse(layer, role, parameter)
        plain = [axis for axis in axes if axis != "direction"]
        fixed = [axis for axis in spec[role].axes if axis != "..."]
        if plain[: len(fixed)] != fixed or ("..." not in spec[role].axes and len(plain) != len(fixed)):
            yield Problem(
                f"{where}: {layer.path}/{role}", f"axes {' '.join(parameter.axes)}", f"{' '.join(spec[role].axes)}"
            )
        labels = {axis: names for axis, names in (LABELS | spec[role].labels).items() if axis in axes}
        told = dict(parameter.labels)
        if told != labels:
            yield Problem(f"{where}: {layer.path}/{role}", f"labels {told}", f"{labels}")
        sizes = dict(zip(parameter.axes, parameter.shape, strict=False))
        wrong = {axis: len(names) for axis, names in labels.items() if sizes[axis] != len(names)}
        if wrong:
            yield Problem(f"{where}: {layer.path}/{role}", f"shape {parameter.shape}", f"blocks {wrong}")


def _axis_problems(where: Path, manifest: Manifest, layers: Sequence[CanonicalLayer]) -> Iterator[Problem]:
    """What a layer says of its channels and heads must be what the axes of its parameters say."""
    for told, layer in zip(manifest.layers, layers, strict=True):
        axes = {axis for tensor in layer.tensors.values() for axis in tensor.axes}
        # A layer of unknown kind keeps what is known of its channels for the kind that it may turn out to be.
        for axis in sorted({*told.channels, *told.undecided} - axes) if layer.kind != "unknown" else ():
            yield Problem(
                f"{where}: {layer.path}", f"an axis {axis} that crosses a Flatten", "an axis of its parameters"
            )
        for role, tensor in layer.tensors.items():
            parameter = told.parameters[role]
            fine = [axis for group in fine_axes(layer, tensor) for axis in group]
            if fine != list(zip(parameter.axes, parameter.shape, strict=True)):
                yield Problem(
                    f"{where}: {layer.path}/{role}",
                    f"axes {' '.join(parameter.axes)} of {parameter.shape}",
                    f"{' '.join(axis for axis, _ in fine)} of {tuple(n for _, n in fine)}",
                )


_LAYER_FIELDS = {
    "path",
    "native",
    "native_path",
    "part",
    "evidence",
    "parameters",
    "channels",
    "undecided",
    "kind",
    "candidates",
}


def _contents(manifest: Manifest, tensors: Mapping[str, Tensor]) -> Contents:
    layers = []
    for layer in manifest.layers:
        canonical = {}
        for role, parameter in layer.parameters.items():
            name = f"{layer.path}/{role}"
            axes, _ = _coarse(layer, role, parameter)
            data = _fused(tensors[parameter.tied_to or name], parameter)
            identity = parameter.tied_to or name
            canonical[role] = CanonicalTensor(
                data, tuple(axes), dict(parameter.labels), dict(parameter.native), identity, parameter.state
            )
        attributes = {
            k: v for k in type(layer).model_fields if k not in _LAYER_FIELDS and (v := getattr(layer, k)) is not None
        }
        layers.append(
            CanonicalLayer(
                layer.path,
                layer.kind,
                canonical,
                attributes,
                layer.evidence,
                layer.native,
                layer.native_path or layer.path,
                layer.part,
                getattr(layer, "candidates", ()),
                dict(layer.channels),
                layer.undecided,
            )
        )
    collections = {
        name: tuple(NativeTensor(native, tensors[f"@{name}/{native}"]) for native in parameters)
        for name, parameters in manifest.collections.items()
    }
    return Contents(
        tuple(layers),
        manifest.source,
        manifest.graph,
        manifest.ordered,
        collections,
        manifest.losses,
        manifest.notes,
        manifest.created,
    )


def _fused(tensor: Tensor, parameter: Parameter) -> Tensor:
    axes = list(parameter.axes)
    for first, second in _FINE:
        for i in range(len(axes) - 1, 0, -1):
            if axes[i - 1] == first and axes[i] == second:
                tensor = tensor.merge(i - 1, 2)
                axes[i - 1 : i + 1] = [""]
    return tensor
