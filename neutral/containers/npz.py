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

import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from neutral.containers.elements import element_bytes
from neutral.containers.npy import MAGIC, PLAIN, RAW, Npy, read_header
from neutral.containers.zip import ZipSource
from neutral.containers.zip_replacing import replace_members
from neutral.containers.zip_writing import Chunk, NewMember, write_zip
from neutral.errors import BadFile, Problem, Refused, raise_all
from neutral.native import Stored, Tensor, from_array

DTYPES_MEMBER = "__neutral_dtypes__"

_LARGEST_DTYPES = 16 << 20
_ALIGNMENT = 64
_TWO_BYTES = ("<V2", "|V2")

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
    return Stored(storage, header.shape, dtype, header.length, header.strides)


def _array_name(source: ZipSource, member: str) -> str:
    if not member.endswith(".npy") or member == ".npy":
        _refuse(source, f"member {member!r}", "only members named *.npy", "is it an .npz file?")
    return member[: -len(".npy")]


def _read_header(source: ZipSource, member: str) -> Npy:
    return read_header(source.open(member), str(source.file.path), repr(member))


def _dtype(source: ZipSource, member: str, descr: str, extension: np.dtype[Any] | None) -> np.dtype[Any]:
    if PLAIN.fullmatch(descr) and extension is None:
        return np.dtype(descr)
    raw = RAW.fullmatch(descr)
    if extension is None:
        what = "raw bytes, whose dtype the file does not say" if raw else f"dtype {descr!r}"
        what = "Python objects (a pickle)" if "O" in descr else what
        _refuse(source, f"{member!r} of {what}", "booleans, integers, floats or complex numbers")
    if not raw or extension.itemsize != int(raw[1]):
        _refuse(source, f"{member!r} of {descr!r} that is to be {extension}", "raw bytes of that size")
    return extension


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
    text = bytearray(_read_header(source, member).length)
    source.open(member).read_into(0, memoryview(text))
    return bytes(text)


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
        if tensor.dtype.name not in EXTENSIONS and not PLAIN.fullmatch(tensor.dtype.str):
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
    return MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text


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
        head = bytearray(header.length)
        source.open(member).read_into(0, memoryview(head))
        rearranged = tensor.permute(tuple(reversed(range(len(tensor.shape))))) if header.fortran_order else tensor
        elements = element_bytes(rearranged, ">" if header.descr.startswith(">") else "<")
        new[member] = (len(head) + tensor.nbytes, itertools.chain([bytes(head)], elements))
    replace_members(source, out, new)


def _misfits(source: ZipSource, arrays: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    for name, tensor in tensors.items():
        there = arrays.get(name)
        if there is None:
            yield Problem(name, f"no array of that name in {source.file.path}", "one")
        elif (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
            yield Problem(name, f"{tensor.dtype} {tensor.shape}", f"{there.dtype} {there.shape}")
