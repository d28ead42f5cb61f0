"""safetensors files: eight bytes of length, a JSON header, and the elements of every tensor without gaps.

>>> import pathlib, tempfile
>>> import numpy as np
>>> from neutral.containers.files import new_file
>>> from neutral.native import from_array
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.safetensors"
>>> with new_file(path) as out:
...     write(out, [("w", from_array(np.arange(3.0).reshape(3, 1).T))], {"format": "np"})
>>> opened = open_safetensors(path)
>>> opened.tensors["w"].read(), opened.metadata
(array([[0., 1., 2.]]), {'format': 'np'})

The header is read by a scanner for just the JSON that the format allows, not by a JSON parser: duplicate keys, other
fields, booleans and floats as sizes, deep nesting are then not cases to think of. Beyond what the format's own
library checks, names must be unique, not empty and without NUL.

A set of shards is a folder with an index, as Hugging Face writes it: `{"metadata": {...}, "weight_map": {tensor
name: file name}}`. Shards are plain files beside the index; every tensor of every shard is in the index and lies
where it says.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from neutral.containers.elements import element_bytes
from neutral.containers.files import SourceFile, pieces
from neutral.errors import BadFile, Problem, Refused, raise_all
from neutral.native import Stored, Tensor

LARGEST_HEADER = 100_000_000
"""The format library's own limit, in bytes."""
LARGEST_INDEX = 32 << 20
MOST_TENSORS = 1 << 18
LARGEST_RANK = 32

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")

DTYPES: Mapping[str, np.dtype[Any]] = {
    code: np.dtype(getattr(ml_dtypes, name, None) or name).newbyteorder("<")
    for code, name in _NAMES.items()
    if name in np.sctypeDict or hasattr(ml_dtypes, name)
}
"""The format's dtypes, in the order of its library (which sorts tensors by it, the last first)."""

_CODES = {dtype.newbyteorder("="): code for code, dtype in DTYPES.items()}
_RANKS = {code: rank for rank, code in enumerate(DTYPES)}

_OPEN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*")
# Possessive, for the matcher would else remember every escape of a long string, at 100 bytes each.
_STRING = re.compile(r'[ \t\n\r]*+("([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)")')
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")
_FIELD = re.compile(
    r'[ \t\n\r]*"(dtype|shape|data_offsets)"[ \t\n\r]*:[ \t\n\r]*'
    r'(?:"([A-Za-z0-9_]{1,24})"|\[([0-9, \t\n\r]{0,1000})\])[ \t\n\r]*([,}])'
)
_SIZES = re.compile(r"[ \t\n\r]*(?:(?:0|[1-9][0-9]{0,19})(?:[ \t\n\r]*,[ \t\n\r]*(?:0|[1-9][0-9]{0,19}))*[ \t\n\r]*)?")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header; `offset` counts from the start of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A file's header: its entries in the order of the JSON text, and where the elements begin.

    `style` tells other writers than the format's own library: `null` one that writes that for no metadata, as MLX does;
    `sorted` one that writes the fields of an entry in alphabetical order, as MLX does, too.
    """

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    data_offset: int
    style: str = ""


@dataclass(frozen=True)
class TensorSet:
    """The tensors of a file, or of all the shards of an index, in order.

    `shards` maps file names to the names of their tensors; `index` is the index file, or None for a single file.
    `style` is that of the headers, if all have the same.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    shards: Mapping[Path, tuple[str, ...]]
    index: Path | None
    files: tuple[SourceFile, ...]
    style: str = ""

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_safetensors(path: Path) -> TensorSet:
    """Open a file, the index of a set of shards, or a folder that holds just one of these."""
    path = _in_folder(path) if path.is_dir() else path
    with SourceFile(path) as file:
        is_index = file.size > 0 and file.read(0, 1) == b"{"
    return _open_shards(path) if is_index else _open_file(path)


def aliases(opened: TensorSet) -> dict[str, str]:
    """Tied tensors that were left out, by the name of the tensor kept.

    `safetensors.torch.save_model` writes only one of several equal tensors, and an entry of the metadata for each
    other one: `{"lm_head.weight": "embed.weight"}`.
    """
    return {
        alias: kept
        for alias, kept in opened.metadata.items()
        if kept in opened.tensors and alias not in opened.tensors and not _name_fault(alias)
    }


def _open_file(path: Path) -> TensorSet:
    file = SourceFile(path)
    header = read_header(file)
    tensors = {entry.name: stored(file, entry) for entry in header.entries}
    return TensorSet(tensors, header.metadata, {path: tuple(tensors)}, None, (file,), header.style)


def _open_shards(path: Path) -> TensorSet:
    weight_map = read_index(path)
    problems: list[Problem] = []
    tensors: dict[str, Tensor] = {}
    shards: dict[Path, tuple[str, ...]] = {}
    metadata: dict[str, str] = {}
    files: list[SourceFile] = []
    styles: set[str] = set()
    for shard in dict.fromkeys(weight_map.values()):
        file = SourceFile(shard_path(path, shard))
        files.append(file)
        header = read_header(file)
        names = {entry.name for entry in header.entries}
        problems += (
            Problem(f"{path}: {name}", f"no such tensor in {shard}", "it where the index says")
            for name, mapped in weight_map.items()
            if mapped == shard and name not in names
        )
        problems += (
            Problem(f"{file.path}: {name}", f"a tensor {_mapped(weight_map.get(name))}", f"one that it maps to {shard}")
            for name in (entry.name for entry in header.entries)
            if weight_map.get(name) != shard
        )
        tensors.update({entry.name: stored(file, entry) for entry in header.entries})
        shards[file.path] = tuple(entry.name for entry in header.entries)
        metadata |= header.metadata
        styles.add(header.style)
    raise_all(BadFile, problems[:20])
    style = styles.pop() if len(styles) == 1 else ""
    return TensorSet({name: tensors[name] for name in weight_map}, metadata, shards, path, tuple(files), style)


def _mapped(shard: str | None) -> str:
    return "that the index does not list" if shard is None else f"that the index maps to {shard}"


def _in_folder(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.name for p in found[:5])
            raise BadFile(
                Problem(str(folder), f"{len(found)} files: {names}", f"one {pattern}", "name the file itself")
            )
    raise BadFile(Problem(str(folder), "no safetensors file in it", "an index or a .safetensors file"))


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index of shards: tensor name to file name, every file name a plain one."""
    with SourceFile(path) as file:
        if file.size > LARGEST_INDEX:
            _refuse(path, f"an index of {file.size} bytes", f"at most {LARGEST_INDEX}")
        raw = file.read(0, file.size)
    if raw.count(b"[") + raw.count(b"{") > 10_000:
        _refuse(path, "an index of thousands of lists", 'one map under "weight_map"')
    try:
        index = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"an index that cannot be read ({error})", "JSON")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        _refuse(path, "an index without a weight_map", "tensor names to file names")
    for name, shard in weight_map.items():
        if shard in ("", ".", "..") or re.search(r"[/\\\x00]", shard) or _name_fault(name):
            _refuse(path, f"tensor {name!r} in shard {shard!r}", "the plain name of a file beside the index")
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key used twice")
    return found


def shard_path(index: Path, shard: str) -> Path:
    """The shard's place beside its index; refused if it is not there or is a link."""
    path = index.parent / shard
    try:
        mode = path.lstat().st_mode
    except OSError:
        _refuse(index, f"shard {shard!r} that is not there", "every shard beside the index")
    if stat.S_ISLNK(mode):
        _refuse(path, "a link", "a shard that is a file", "copy the files themselves into one folder")
    return path


def stored(file: SourceFile, entry: Entry) -> Stored:
    """An entry's elements, lazily."""
    return Stored(file.section(entry.offset, entry.nbytes), entry.shape, entry.dtype)


def read_header(file: SourceFile) -> Header:
    """Read and check a file's header: every tensor lies in the file, and together they fill it."""
    if file.size < 8:
        _refuse(file.path, f"{file.size} bytes", "a safetensors file")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(file.size - 8, LARGEST_HEADER):
        _refuse(file.path, f"a header of {length} bytes", f"at most {min(file.size - 8, LARGEST_HEADER)}")
    try:
        text = file.read(8, length).decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(file.path, f"a header that is not UTF-8 at byte {8 + error.start}", "UTF-8")
    if not text.startswith("{"):
        _refuse(file.path, f"a header that starts with {text[:8]!r}", "a JSON object")
    return _Scanner(file, text, 8 + length).header()


class _Scanner:
    """Reads the header's text from left to right."""

    def __init__(self, file: SourceFile, text: str, data_offset: int) -> None:
        self._file, self._text, self._data_offset = file, text, data_offset
        self._at = 0
        self._style = ""

    def header(self) -> Header:
        entries: dict[str, Entry] = {}
        metadata: dict[str, str] | None = None
        for name in self._keys():
            if name == "__metadata__":
                if metadata is not None:
                    self._fail("__metadata__ twice", "it once")
                metadata = self._metadata()
                continue
            if name in entries:
                self._fail(f"tensor {name!r} twice", "it once")
            fault = _name_fault(name)
            if fault:
                self._fail(f"tensor {name!r}, {fault}", "a name")
            if len(entries) == MOST_TENSORS:
                self._fail(f"more than {MOST_TENSORS} tensors", "fewer")
            entries[name] = self._entry(name)
        if self._text[self._at :].strip(" \t\n\r"):
            self._fail(f"{self._excerpt()!r} behind the header", "nothing but white space")
        self._check_cover(entries.values())
        return Header(tuple(entries.values()), metadata or {}, self._data_offset, self._style)

    def _keys(self) -> Iterator[str]:
        """The keys of the object that begins here; whoever takes a key then reads its value."""
        self._match(_OPEN, "an object")
        if self._text.startswith("}", self._at):
            self._at += 1
            return
        while True:
            name = self._string()
            self._match(_COLON, "a colon")
            yield name
            if self._match(_NEXT, "a comma or the object's end")[1] == "}":
                return

    def _metadata(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self._text.startswith("null", self._at):
            self._at += len("null")
            self._style = "null"
            return found
        for key in self._keys():
            if key in found:
                self._fail(f"metadata {key!r} twice", "it once")
            if len(found) == MOST_TENSORS:
                self._fail(f"more than {MOST_TENSORS} entries of metadata", "fewer")
            found[key] = self._string()
        return found

    def _entry(self, name: str) -> Entry:
        self._match(_OPEN, f"the fields of {name!r}")
        fields: dict[str, str] = {}
        more = ","
        while more == ",":
            key, text, numbers, more = self._match(_FIELD, "dtype, shape or data_offsets, of sizes").groups()
            if key in fields or (text is None) is (key == "dtype"):
                self._fail(f"tensor {name!r} with a wrong {key}", "dtype, shape and data_offsets, each once")
            fields[key] = text if numbers is None else numbers
        if list(fields) == ["data_offsets", "dtype", "shape"] and not self._style:
            self._style = "sorted"
        if len(fields) != 3:
            self._fail(f"tensor {name!r} with {', '.join(fields)} alone", "dtype, shape and data_offsets")
        shape, offsets = self._sizes(name, fields["shape"]), self._sizes(name, fields["data_offsets"])
        dtype = DTYPES.get(fields["dtype"])
        if dtype is None:
            packed = fields["dtype"] in _PACKED
            what = "elements packed below a byte" if packed else "an unknown dtype"
            self._fail(f"tensor {name!r} of {fields['dtype']}, {what}", f"one of {', '.join(DTYPES)}")
        if len(shape) > LARGEST_RANK or math.prod(n or 1 for n in shape) >= 1 << 58:
            self._fail(
                f"tensor {name!r} of {len(shape)} axes", f"at most {LARGEST_RANK}, and a size that fits in memory"
            )
        if len(offsets) != 2 or math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
            self._fail(
                f"tensor {name!r} of {dtype.name} {shape} at {list(offsets)}",
                f"a start and an end {math.prod(shape) * dtype.itemsize} bytes apart",
            )
        return Entry(name, dtype, shape, self._data_offset + offsets[0], offsets[1] - offsets[0])

    def _sizes(self, name: str, text: str) -> tuple[int, ...]:
        if not _SIZES.fullmatch(text):
            self._fail(f"tensor {name!r} with [{text[:60]}]", "whole numbers")
        return tuple(map(int, text.split(","))) if text.strip() else ()

    def _check_cover(self, entries: Iterable[Entry]) -> None:
        end = self._data_offset
        for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
            if entry.offset != end:
                self._fail(f"tensor {entry.name!r} at byte {entry.offset}", f"byte {end}, without a gap or an overlap")
            end += entry.nbytes
        if end != self._file.size:
            self._fail(
                f"a file of {self._file.size} bytes", f"{end}, where its tensors end", "the file is cut short or forged"
            )

    def _string(self) -> str:
        quoted, text = self._match(_STRING, "a string").groups()
        try:
            if "\\" in text:
                text = json.loads(quoted)
            text.encode("utf-8")
        except ValueError:
            self._fail(f"a broken string {quoted[:60]}", "JSON")
        return str(text)

    def _match(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None:
            self._fail(f"{self._excerpt()!r} in the header at character {self._at}", expected)
        self._at = match.end()
        return match

    def _excerpt(self) -> str:
        return self._text[self._at : self._at + 60]

    def _fail(self, found: str, expected: str, do: str = "") -> NoReturn:
        _refuse(self._file.path, found, expected, do)


def _refuse(path: Path, found: str, expected: str, do: str = "") -> NoReturn:
    raise BadFile(Problem(str(path), found, expected, do))


def _name_fault(name: str) -> str:
    if not name:
        return "an empty name"
    return "a NUL in its name" if "\0" in name else ""


# Writing


def dtype_code(dtype: np.dtype[Any]) -> str | None:
    """The format's name for a dtype, or None if it has none."""
    return _CODES.get(dtype.newbyteorder("="))


def usual_order(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Tensors as the format's library orders them: larger dtypes first (so all are aligned), then by name."""
    return sorted(named, key=lambda item: (-_RANKS.get(dtype_code(item[1].dtype) or "", 0), item[0]))


def header_bytes(specs: Sequence[tuple[str, np.dtype[Any], Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The length and the header of a file of these tensors, whose elements then follow in the same order."""
    raise_all(Refused, _unwritable(specs))
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in specs:
        end = offset + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": dtype_code(dtype), "shape": [int(n) for n in shape], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise Refused(Problem("safetensors header", f"{len(text)} bytes", f"at most {LARGEST_HEADER}", "write shards"))
    return struct.pack("<Q", len(text)) + text


def _unwritable(specs: Sequence[tuple[str, np.dtype[Any], Sequence[int]]]) -> Iterator[Problem]:
    seen: set[str] = set()
    for name, dtype, _ in specs:
        fault = "a reserved name" if name == "__metadata__" else _name_fault(name)
        if fault or name in seen or not _encodable(name):
            yield Problem(repr(name), fault or "a name used twice, or not text", "one name for each tensor")
        seen.add(name)
        if dtype_code(dtype) is None:
            yield Problem(name, f"dtype {dtype}", f"one of {', '.join(DTYPES)}")


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write(out: BinaryIO, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]) -> None:
    """Write a file; the elements lie in the order given."""
    out.write(header_bytes([(name, tensor.dtype, tensor.shape) for name, tensor in tensors], metadata))
    for name, tensor in tensors:
        _write_elements(out, name, tensor)


def replace_tensors(source: SourceFile, out: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write a copy of the file in which the tensors named have other elements of the same shape and dtype."""
    entries = {entry.name: entry for entry in read_header(source).entries}
    raise_all(Refused, misfits(str(source.path), {name: stored(source, e) for name, e in entries.items()}, tensors))
    done = 0
    for entry in sorted((entries[name] for name in tensors), key=lambda e: (e.offset, e.nbytes)):
        _copy(source, out, done, entry.offset)
        _write_elements(out, entry.name, tensors[entry.name])
        done = entry.offset + entry.nbytes
    _copy(source, out, done, source.size)


def misfits(where: str, there: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """What keeps `tensors` from taking the places of those of the same names in `there`."""
    for name, tensor in tensors.items():
        place = there.get(name)
        if place is None:
            yield Problem(name, f"no tensor of that name in {where}", "one")
        elif (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            yield Problem(name, f"{tensor.dtype} {tensor.shape}", f"{place.dtype} {place.shape}")


def _write_elements(out: BinaryIO, name: str, tensor: Tensor) -> None:
    written = 0
    for piece in element_bytes(tensor):
        out.write(piece)
        written += piece.nbytes
    assert written == tensor.nbytes, (name, written, tensor.nbytes)


def _copy(source: SourceFile, out: BinaryIO, start: int, stop: int) -> None:
    for piece in pieces(source, start, stop):
        out.write(piece)
