"""The header of a `.npy`: what dtype, shape and order the elements behind it have.

>>> import io, numpy
>>> from neutral.containers.files import Memory
>>> out = io.BytesIO(); numpy.save(out, numpy.zeros((2, 3), "f4"))
>>> header = read_header(Memory(out.getvalue()), "example", "the array")
>>> header.descr, header.shape, header.length
('<f4', (2, 3), 128)
"""

from __future__ import annotations

import ast
import math
import re
import struct
from dataclasses import dataclass
from typing import NoReturn

from neutral.errors import BadFile, Problem
from neutral.native import Storage

MAGIC = b"\x93NUMPY"
PLAIN = re.compile(r"[<>=|]?(b1|i[1248]|u[1248]|f[248]|c8|c16)")
RAW = re.compile(r"[<>|]?V([1-9])")
"""Elements of a dtype that NumPy cannot name, as bytes."""
_LARGEST_HEADER = 10_000  # numpy.load's own limit
_LARGEST_RANK = 32
_LENGTHS = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}


@dataclass(frozen=True)
class Npy:
    """What a header says, and how long it is."""

    descr: str
    fortran_order: bool
    shape: tuple[int, ...]
    length: int

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Those of the elements, None in C order."""
        if not self.fortran_order:
            return None
        return tuple(math.prod(n or 1 for n in self.shape[:axis]) for axis in range(len(self.shape)))


def read_header(storage: Storage, where: str, what: str) -> Npy:
    """Read and check a header; `what` is the array's name in a refusal."""

    def refuse(found: str, expected: str) -> NoReturn:
        raise BadFile(Problem(where, f"{what} {found}", expected))

    def read(offset: int, length: int) -> bytes:
        if offset + length > storage.nbytes:
            refuse(f"of {storage.nbytes} bytes", f"at least {offset + length}")
        out = bytearray(length)
        storage.read_into(offset, memoryview(out))
        return bytes(out)

    start = read(0, 8)
    version = (start[6], start[7])
    if start[:6] != MAGIC or version not in _LENGTHS:
        refuse(f"that starts with {start!r}", "an array of the .npy format 1.0, 2.0 or 3.0")
    packed = _LENGTHS[version]
    (length,) = struct.unpack(packed, read(8, struct.calcsize(packed)))
    begin = 8 + struct.calcsize(packed)
    if length > _LARGEST_HEADER:
        refuse(f"with a header of {length} bytes", f"at most {_LARGEST_HEADER}")
    raw = read(begin, length)
    try:
        fields = ast.literal_eval(raw.decode("utf-8" if version == (3, 0) else "latin-1").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        refuse("with a broken header", "a literal dict")
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        refuse(f"with the header {raw[:80]!r}", "the keys descr, fortran_order and shape")
    descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if not isinstance(descr, str):
        refuse("of a structured dtype", "numbers")
    if type(fortran) is not bool:
        refuse(f"with fortran_order {fortran!r}", "True or False")
    if not isinstance(shape, tuple) or len(shape) > _LARGEST_RANK or any(type(n) is not int or n < 0 for n in shape):
        refuse(f"of shape {shape!r}", f"at most {_LARGEST_RANK} sizes, none negative")
    if math.prod(n or 1 for n in shape) >= 1 << 58:
        refuse(f"of shape {shape!r}", "a shape that fits in memory")
    return Npy(descr, fortran, shape, begin + length)
