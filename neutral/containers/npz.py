"""NumPy's `.npz`: a zip of `.npy` members, each a short header and the raw elements.

>>> import pathlib, tempfile
>>> import numpy as np
>>> from neutral.containers.files import SourceFile, new_file
>>> from neutral.native import from_array
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.npz"
>>> with new_file(path) as out:
...     write_npz(out, [("fc/kernel", from_array(np.arange(3.0)))])
>>> float(np.load(path)["fc/kernel"].sum())
3.0
>>> read_npz(ZipSource(SourceFile(path)))["fc/kernel"].read()
array([0., 1., 2.])

NumPy has no name for bfloat16 and the 8-bit floats; `numpy.save` writes such arrays as raw bytes (`<V2`, `|V1`) and
forgets what they were. So does `write_npz`, but it adds a member `__neutral_dtypes__.npy`, the bytes of a JSON object
from array name to dtype name, by which `read_npz` gives them back; `numpy.load(...)[name].view(ml_dtypes.bfloat16)`
does the same by hand. Without that member raw bytes are refused. Files with only ordinary dtypes do not have it.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from neutral.containers.elements import element_bytes
from neutral.containers.zip import ZipSource
from neutral.containers.zip_replacing import replace_members
from neutral.containers.zip_writing import Chunk, NewMember, write_zip
from neutral.errors import BadFile, Problem, Refused, raise_all
from neutral.native import Storage, Stored, Tensor, from_array

DTYPES_MEMBER = "__neutral_dtypes__"

_MAGIC = b"\x93NUMPY"
_LARGEST_HEADER = 10_000  # numpy.load's own limit
_LARGEST_RANK = 32
_LARGEST_DTYPES = 16 << 20
_ALIGNMENT = 64
_LENGTHS = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}
_PLAIN = re.compile(r"[<>=|]?(b1|i[1248]|u[1248]|f[248]|c8|c16)")
_TWO_BYTES = ("<V2", "|V2")
_RAW = re.compile(r"[<>|]?V([1-9])")

EXTENSIONS: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        "float8_e3m4",
        "float8_e4m3",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float6_e2m3fn",
        "float6_e3m2fn",
        "float4_e2m1fn",
        "int4",
        "uint4",
        "int2",
        "uint2",
    )
    if hasattr(ml_dtypes, name)
}
"""Dtypes that NumPy cannot name, those that this ml_dtypes has."""


@dataclass(frozen=True)
class _Npy:
    """What a `.npy` header says, and how long it is."""

    descr: str
    fortran_order: bool
    shape: tuple[int, ...]
    length: int


def read_npz(source: ZipSource, raw: np.dtype[Any] | None = None) -> dict[str, Tensor]:
    """Every array of the file by its name, lazily, in the file's order. `raw` is the dtype of two raw bytes, where one knows
    it of whoever wrote the file."""
    extensions = _read_extensions(source)
    tensors: dict[str, Tensor] = {}
    for member in source.members:
        name = _array_name(source, member)
        if name != DTYPES_MEMBER:
            extension = extensions.pop(name, None)
            if extension is None and raw is not None and _read_header(source, member).descr in _TWO_BYTES:
                extension = raw
            tensors[name] = _read_array(source, member, extension)
    if extensions:
        _refuse(source, f"a dtype for {next(iter(extensions))!r}", "dtypes of arrays that are there")
    return tensors


def _read_array(source: ZipSource, member: str, extension: np.dtype[Any] | None) -> Stored:
    header = _read_header(source, member)
    storage = source.open(member)
    dtype = _dtype(source, member, header.descr, extension)
    expected = header.length + math.prod(header.shape) * dtype.itemsize
    if expected != storage.nbytes:
        _refuse(source, f"{member!r} of {storage.nbytes} bytes", f"{expected} for its shape {header.shape} of {dtype}")
    strides = _fortran_strides(header.shape) if header.fortran_order else None
    return Stored(storage, header.shape, dtype, header.length, strides)


def _array_name(source: ZipSource, member: str) -> str:
    if not member.endswith(".npy") or member == ".npy":
        _refuse(source, f"member {member!r}", "only members named *.npy", "is it an .npz file?")
    return member[: -len(".npy")]


def _read_header(source: ZipSource, member: str) -> _Npy:
    storage = source.open(member)
    start = _read(source, member, storage, 0, 8)
    version = (start[6], start[7])
    if start[:6] != _MAGIC or version not in _LENGTHS:
        _refuse(source, f"{member!r} that starts with {start!r}", "an array of the .npy format 1.0, 2.0 or 3.0")
    packed = _LENGTHS[version]
    (length,) = struct.unpack(packed, _read(source, member, storage, 8, struct.calcsize(packed)))
    begin = 8 + struct.calcsize(packed)
    if length > _LARGEST_HEADER:
        _refuse(source, f"{member!r} with a header of {length} bytes", f"at most {_LARGEST_HEADER}")
    raw = _read(source, member, storage, begin, length)
    try:
        fields = ast.literal_eval(raw.decode("utf-8" if version == (3, 0) else "latin-1").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        _refuse(source, f"{member!r} with a broken header", "a literal dict")
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        _refuse(source, f"{member!r} with the header {raw[:80]!r}", "the keys descr, fortran_order and shape")
    descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if not isinstance(descr, str):
        _refuse(source, f"{member!r} of a structured dtype", "numbers")
    if type(fortran) is not bool:
        _refuse(source, f"{member!r} with fortran_order {fortran!r}", "True or False")
    if not isinstance(shape, tuple) or len(shape) > _LARGEST_RANK or any(type(n) is not int or n < 0 for n in shape):
        _refuse(source, f"{member!r} of shape {shape!r}", f"at most {_LARGEST_RANK} sizes, none negative")
    if math.prod(n or 1 for n in shape) >= 1 << 58:
        _refuse(source, f"{member!r} of shape {shape!r}", "a shape that fits in memory")
    return _Npy(descr, fortran, shape, begin + length)


def _read(source: ZipSource, member: str, storage: Storage, offset: int, length: int) -> bytes:
    if offset + length > storage.nbytes:
        _refuse(source, f"{member!r} of {storage.nbytes} bytes", f"at least {offset + length}")
    out = bytearray(length)
    storage.read_into(offset, memoryview(out))
    return bytes(out)


def _dtype(source: ZipSource, member: str, descr: str, extension: np.dtype[Any] | None) -> np.dtype[Any]:
    if _PLAIN.fullmatch(descr) and extension is None:
        return np.dtype(descr)
    raw = _RAW.fullmatch(descr)
    if extension is None:
        what = "raw bytes, whose dtype the file does not say" if raw else f"dtype {descr!r}"
        what = "Python objects (a pickle)" if "O" in descr else what
        _refuse(source, f"{member!r} of {what}", "booleans, integers, floats or complex numbers")
    if not raw or extension.itemsize != int(raw[1]):
        _refuse(source, f"{member!r} of {descr!r} that is to be {extension}", "raw bytes of that size")
    return extension


def _fortran_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(n or 1 for n in shape[:axis]) for axis in range(len(shape)))


def _read_extensions(source: ZipSource) -> dict[str, np.dtype[Any]]:
    member = f"{DTYPES_MEMBER}.npy"
    if member not in source.members:
        return {}
    if source.members[member].size > _LARGEST_DTYPES:
        _refuse(source, f"{member!r} of {source.members[member].size} bytes", f"at most {_LARGEST_DTYPES}")
    text = _read_array(source, member, None).read().tobytes()
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, dict) or any(not isinstance(n, str) or n not in EXTENSIONS for n in names.values()):
        _refuse(source, f"a broken {member!r}", f"array names to dtypes out of {', '.join(EXTENSIONS)}")
    return {name: EXTENSIONS[dtype] for name, dtype in names.items()}


def _refuse(source: ZipSource, found: str, expected: str, do: str = "") -> NoReturn:
    raise BadFile(Problem(str(source.file.path), found, expected, do))


def is_of_mlx(source: ZipSource) -> bool:
    """True if MLX wrote every array: its headers have a comma behind each size, and none behind the shape."""
    ends = [_header_text(source, member).rstrip() for member in source.members if member.endswith(".npy")]
    return any(end.endswith(b", )}") for end in ends) and all(end.endswith((b", )}", b"()}")) for end in ends)


def _header_text(source: ZipSource, member: str) -> bytes:
    header = _read_header(source, member)
    return _read(source, member, source.open(member), 0, header.length)


def write_npz(
    out: BinaryIO, tensors: Iterable[tuple[str, Tensor]], comment: bytes = b"", *, as_mlx: bool = False
) -> None:
    """Write arrays in the order given. The same tensors give the same bytes; elements lie at multiples of 64.

    `comment` becomes the zip's comment, which numpy does not look at. With `as_mlx` headers are as MLX writes them, by
    which its files are known, and two raw bytes are bfloat16 without further words.
    """
    named = list(tensors)
    if as_mlx:
        raise_all(Refused, _unwritable(named, ""))
        write_zip(out, (_new_member(name, tensor, _mlx_header(tensor)) for name, tensor in named), comment)
        return
    extensions = {name: tensor.dtype.name for name, tensor in named if tensor.dtype.name in EXTENSIONS}
    if extensions:
        text = json.dumps(extensions, sort_keys=True, separators=(",", ":")).encode()
        named.append((DTYPES_MEMBER, from_array(np.frombuffer(text, np.uint8))))
    raise_all(Refused, _unwritable(named, DTYPES_MEMBER if extensions else ""))
    write_zip(out, (_new_member(name, tensor, _header(tensor)) for name, tensor in named), comment)


def _unwritable(named: Iterable[tuple[str, Tensor]], reserved: str) -> Iterator[Problem]:
    seen: set[str] = set()
    for name, tensor in named:
        if name in seen or not name:
            yield Problem(repr(name), "a name that is empty or used twice", "one name for each array")
        seen.add(name)
        if name == DTYPES_MEMBER != reserved:
            yield Problem(name, "an array of that name", "another name, this one is reserved")
        if tensor.dtype.name not in EXTENSIONS and not _PLAIN.fullmatch(tensor.dtype.str):
            yield Problem(name, f"dtype {tensor.dtype}", "numbers that .npz can hold")


def _new_member(name: str, tensor: Tensor, header: bytes) -> NewMember:
    chunks: Iterable[Chunk] = itertools.chain([header], element_bytes(tensor))
    return NewMember(f"{name}.npy", len(header) + tensor.nbytes, chunks, _ALIGNMENT)


def _header(tensor: Tensor) -> bytes:
    return _packed(repr({"descr": _descr(tensor), "fortran_order": False, "shape": tuple(tensor.shape)}))


def _mlx_header(tensor: Tensor) -> bytes:
    shape = "".join(f"{n}, " for n in tensor.shape)
    return _packed(f"{{'descr': '{_descr(tensor)}', 'fortran_order': False, 'shape': ({shape})}}")


def _descr(tensor: Tensor) -> str:
    item = tensor.dtype.itemsize
    one = "|" if item == 1 else "<"
    return f"{one}V{item}" if tensor.dtype.name in EXTENSIONS else tensor.dtype.newbyteorder("<").str


def _packed(header: str) -> bytes:
    text = header.encode("ascii")
    fill = -(len(text) + 11) % _ALIGNMENT
    text += b" " * fill + b"\n"
    return _MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text


def replace_arrays(
    source: ZipSource, out: BinaryIO, tensors: Mapping[str, Tensor], raw: np.dtype[Any] | None = None
) -> None:
    """Write a copy of the file in which the arrays named have other elements of the same shape and dtype.

    Headers stay, and so do Fortran order, byte order and compression. `raw` as for `read_npz`.
    """
    arrays = read_npz(source, raw)
    raise_all(Refused, _misfits(source, arrays, tensors))
    new: dict[str, tuple[int, Iterable[Chunk]]] = {}
    for name, tensor in tensors.items():
        member = f"{name}.npy"
        header = _read_header(source, member)
        head = _read(source, member, source.open(member), 0, header.length)
        rearranged = tensor.permute(tuple(reversed(range(len(tensor.shape))))) if header.fortran_order else tensor
        elements = element_bytes(rearranged, ">" if header.descr.startswith(">") else "<")
        new[member] = (len(head) + tensor.nbytes, itertools.chain([head], elements))
    replace_members(source, out, new)


def _misfits(source: ZipSource, arrays: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    for name, tensor in tensors.items():
        there = arrays.get(name)
        if there is None:
            yield Problem(name, f"no array of that name in {source.file.path}", "one")
        elif (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
            yield Problem(name, f"{tensor.dtype} {tensor.shape}", f"{there.dtype} {there.shape}")
