"""A copy of an ONNX model in which some tensors have other elements.

    with open_onnx(Path("model.onnx")) as opened:
        replace_tensors(opened, {"fc.weight": kernel}, Path("new.onnx"))

Elements that lie in one piece are replaced where they are, all else stays byte for byte. Numbers of varying length become
`raw_data`. The files of external data are copied under names of the new model's own, and the model names them so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from neutral.containers import protobuf
from neutral.containers.elements import element_bytes
from neutral.containers.files import SourceFile, check_output, new_file, new_files, pieces, refuse_same
from neutral.containers.onnx import OnnxFile, named_tensors
from neutral.containers.onnx_tensors import Span, TensorProto
from neutral.errors import Problem, Refused, raise_all
from neutral.native import Tensor

_RAW_DATA = 9
_LONGEST_NAME = 255
_CHECKSUM = 40
"""Digits of a SHA-1, the checksum of external data."""


@dataclass(frozen=True)
class _Edit:
    """Bytes from `start` to `stop` of a file replaced by `length` others."""

    start: int
    stop: int
    length: int
    data: Callable[[], Iterable[bytes | memoryview]]


def replace_tensors(opened: OnnxFile, tensors: Mapping[str, Tensor], out: Path, *, force: bool = False) -> None:
    """Write a copy with new elements for the tensors of these names (see `named_tensors`), of the same shapes and dtypes.

    Files of external data are written beside it, and all of them take their names together.
    """
    there = named_tensors(opened.model)
    raise_all(Refused, _misfits(str(opened.path), there, tensors))
    new = [(there[name], tensor) for name, tensor in tensors.items()]
    raise_all(Refused, _untied(there, tensors))
    names = new_locations([file.location for file in opened.data_files], opened.path.name, out.name)
    targets = [out, *(out.parent / name for name in names.values())]
    for target in targets:
        check_output(target, force)
        refuse_same(target, opened.path, *(file.file.path for file in opened.data_files))
    with new_files(out.parent, [*names.values(), out.name], force) as folder:
        digests = {}
        summed = {t.external.data_file.location for t in opened.tensors if t.external and t.external.checksum}
        for data_file in opened.data_files:
            edits = [_external_edit(old, tensor) for old, tensor in new if _lies_in(old, data_file.location)]
            with new_file(folder / names[data_file.location]) as file:
                digests[data_file.location] = _copy_with(data_file.file, edits, file, data_file.location in summed)
        edits = [edit for old, tensor in new for edit in _edits(old, tensor)]
        changes: dict[Span, int] = {}
        for old, tensor in new:
            if old.numbers:
                change = sum(edit.length - (edit.stop - edit.start) for edit in _edits(old, tensor))
                changes[old.span] = changes.get(old.span, 0) + change
        for old in opened.tensors:
            if old.external is not None:
                location = old.external.data_file.location
                edits.append(_text_edit(old.external.location, names[location]))
                changes[old.external.location] = edits[-1].length - (edits[-1].stop - edits[-1].start)
                if old.external.checksum is not None:
                    edits.append(_checksum_edit(opened, old, digests[location]))
        edits += _lengths(opened.file, changes)
        with new_file(folder / out.name) as file:
            _copy_with(opened.file, edits, file)


def new_locations(locations: Sequence[str], old: str, new: str) -> dict[str, str]:
    """Names for copies of files of external data, which follow the name of the model.

    >>> new_locations(["m.onnx.data", "m_data/fc.weight", "weights.bin"], "m.onnx", "new.onnx")
    {'m.onnx.data': 'new.onnx.data', 'm_data/fc.weight': 'new.onnx.fc.weight', 'weights.bin': 'new.onnx.weights.bin'}
    """
    found: dict[str, str] = {}
    used = {new}
    for location in locations:
        base = location.rpartition("/")[2]
        name = f"{new}.{base}"
        for whole, replaced in ((old, new), (Path(old).stem, Path(new).stem)):
            if base.startswith(whole) and not base[len(whole) : len(whole) + 1].isalnum():
                name = replaced + base[len(whole) :]
                break
        unique, count = name, 1
        while unique in used:
            count += 1
            unique = f"{name}.{count}"
        if len(unique.encode()) > _LONGEST_NAME:
            raise Refused(
                Problem(new, f"{unique!r} for a file of external data", "a shorter name", "shorten the output's")
            )
        used.add(unique)
        found[location] = unique
    return found


def _misfits(where: str, there: Mapping[str, TensorProto], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    for name, tensor in tensors.items():
        old = there.get(name)
        if old is None:
            yield Problem(name, f"no tensor of that name in {where}", "one")
        elif old.data is None:
            yield Problem(name, f"elements of ONNX's data type {old.code}", "elements of whole bytes")
        elif (old.data.shape, old.data.dtype) != (tensor.shape, tensor.dtype):
            yield Problem(name, f"{tensor.dtype} {tensor.shape}", f"{old.data.dtype} {old.data.shape}")


def _untied(there: Mapping[str, TensorProto], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Tensors that lie in the same bytes of external data, of which some would change or change differently."""
    shared: dict[tuple[str, int], list[str]] = {}
    for name, old in there.items():
        if old.external is not None and old.external.length:
            shared.setdefault((old.external.data_file.location, old.external.offset), []).append(name)
    for names in shared.values():
        first = tensors.get(names[0])
        for name in names[1:]:
            if not _same(first, tensors.get(name)):
                yield Problem(
                    name, f"other elements than {names[0]} has", "the same, for the two lie in the same bytes"
                )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is other:
        return True
    if one is None or other is None or one.nbytes != other.nbytes:
        return False
    return _digest(one) == _digest(other)


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    for piece in element_bytes(tensor):
        digest.update(piece)
    return digest.digest()


def _lies_in(old: TensorProto, location: str) -> bool:
    return old.external is not None and old.external.length > 0 and old.external.data_file.location == location


def _external_edit(old: TensorProto, tensor: Tensor) -> _Edit:
    assert old.external is not None
    start, length = old.external.offset, old.external.length
    return _Edit(start, start + length, length, lambda: element_bytes(tensor))


def _edits(old: TensorProto, tensor: Tensor) -> Iterator[_Edit]:
    """What changes in the model file itself; nothing, if the elements lie in another one, or there are none."""
    if old.inline is not None:
        yield _Edit(old.inline, old.inline + tensor.nbytes, tensor.nbytes, lambda: element_bytes(tensor))
    elif old.numbers:
        head = protobuf.varint(_RAW_DATA << 3 | protobuf.BYTES) + protobuf.varint(tensor.nbytes)
        first = old.numbers[0]
        yield _Edit(first.head, first.stop, len(head) + tensor.nbytes, lambda: chain((head,), element_bytes(tensor)))
        for place in old.numbers[1:]:
            yield _Edit(place.head, place.stop, 0, lambda: ())


def _text_edit(span: Span, text: str) -> _Edit:
    data = text.encode("utf-8")
    return _Edit(span.at, span.stop, len(data), lambda: (data,))


def _checksum_edit(opened: OnnxFile, old: TensorProto, digest: str) -> _Edit:
    assert old.external is not None and old.external.checksum is not None
    span = old.external.checksum
    if span.stop - span.at != _CHECKSUM:
        raise Refused(
            Problem(
                f"{opened.path}: external data {old.external.data_file.location!r}",
                "a checksum that is no SHA-1",
                "one that can be renewed",
                "save the model again without it",
            )
        )
    return _text_edit(span, digest)


def _lengths(file: SourceFile, changes: Mapping[Span, int]) -> list[_Edit]:
    """The lengths of all messages around what changes its size, innermost first: a longer length is a change, too."""
    grown = dict(changes)
    edits = []
    # A message begins behind those around it.
    waiting = sorted(_with_parents(changes), key=lambda span: -span.at)
    for span in waiting:
        change = grown.get(span, 0)
        if change and span.parent is not None:
            head = file.read(span.head, span.at - span.head)
            tag = head[: next(i for i, byte in enumerate(head) if byte < 0x80) + 1]
            renewed = tag + protobuf.varint(span.stop - span.at + change)
            edits.append(_Edit(span.head, span.at, len(renewed), lambda renewed=renewed: (renewed,)))  # type: ignore[misc]
            grown[span.parent] = grown.get(span.parent, 0) + change + len(renewed) - len(head)
    return edits


def _with_parents(spans: Iterable[Span]) -> set[Span]:
    found: set[Span] = set()
    for span in spans:
        at: Span | None = span
        while at is not None and at not in found:
            found.add(at)
            at = at.parent
    return found


def _copy_with(source: SourceFile, edits: Sequence[_Edit], out: BinaryIO, digested: bool = False) -> str:
    """Write the source with its edits; the SHA-1 of what was written, if it is wanted."""
    digest = hashlib.sha1(usedforsecurity=False) if digested else None
    done = 0

    def put(piece: bytes | memoryview) -> None:
        out.write(piece)
        if digest is not None:
            digest.update(piece)

    for edit in sorted(edits, key=lambda edit: (edit.start, edit.stop)):
        if edit.start < done:
            continue  # tied tensors: the same bytes for the same place
        for piece in pieces(source, done, edit.start):
            put(piece)
        written = 0
        for new in edit.data():
            put(new)
            written += len(new) if isinstance(new, bytes) else new.nbytes
        assert written == edit.length, (written, edit.length)
        done = edit.stop
    for piece in pieces(source, done, source.size):
        put(piece)
    return "" if digest is None else digest.hexdigest()
