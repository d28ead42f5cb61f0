"""Equinox's files: the leaves of a model as `.npy` records, one behind the other, without names.

>>> import pathlib, tempfile
>>> import numpy as np
>>> from neutral.containers.files import new_file
>>> from neutral.native import from_array
>>> path = pathlib.Path(tempfile.mkdtemp()) / "model.eqx"
>>> with new_file(path) as out:
...     write_records(out, [from_array(np.ones((2, 3))), from_array(np.array(7))])
>>> opened = EqxFile(path)
>>> [(record.shape, int(opened.tensor(i).read().sum())) for i, record in enumerate(opened.records)]
[((2, 3), 6), ((), 7)]

NumPy has no name for bfloat16 and the 8-bit floats; they are stored as bytes. Two bytes are a bfloat16, of one byte only
the model knows which dtype it is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from neutral.containers.elements import element_bytes
from neutral.containers.files import SourceFile, pieces
from neutral.containers.npy import MAGIC, PLAIN, RAW, Npy, read_header
from neutral.errors import BadFile, Problem, Refused, Unsupported, raise_all
from neutral.native import Stored, Tensor

MOST_RECORDS = 1 << 15
_BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Record:
    """One leaf: the header, where its elements begin, and how many bytes each has."""

    header: Npy
    offset: int
    itemsize: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def dtype(self, where: str, known: np.dtype[Any] | None = None) -> np.dtype[Any]:
        """The dtype of the elements, which for raw bytes is the one `known` from elsewhere."""
        if PLAIN.fullmatch(self.header.descr):
            plain: np.dtype[Any] = np.dtype(self.header.descr)
            return plain
        if known is not None and known.kind not in "biufc" and known.itemsize == self.itemsize:
            return known
        if self.itemsize == 2:
            return _BFLOAT16
        raise Unsupported(
            Problem(where, "bytes whose dtype the file does not say", "to know it", "read the file by its model")
        )


class EqxFile:
    """An opened file and its records."""

    def __init__(self, path: Path) -> None:
        self.file = SourceFile(path)
        try:
            self.records = tuple(_records(self.file))
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        self.file.close()

    def where(self, index: int) -> str:
        return f"{self.file.path}: leaf {index}"

    def tensor(self, index: int, known: np.dtype[Any] | None = None) -> Tensor:
        """A leaf, unread."""
        record = self.records[index]
        section = self.file.section(record.offset, record.nbytes)
        return Stored(section, record.shape, record.dtype(self.where(index), known), 0, record.header.strides)


def is_eqx(head: bytes) -> bool:
    """Whether a file begins as one of `.npy` records does."""
    return head.startswith(MAGIC)


def _records(file: SourceFile) -> Iterable[Record]:
    at, count = 0, 0
    while at < file.size:
        if count == MOST_RECORDS:
            raise BadFile(Problem(str(file.path), f"over {MOST_RECORDS} leaves", "fewer"))
        what = f"leaf {count}"
        header = read_header(file.section(at, file.size - at), str(file.path), what)
        raw = RAW.fullmatch(header.descr)
        if not raw and not PLAIN.fullmatch(header.descr):
            found = "Python objects (a pickle)" if "O" in header.descr else f"dtype {header.descr!r}"
            raise BadFile(Problem(str(file.path), f"{what} of {found}"[:200], "booleans, integers, floats or complex"))
        record = Record(header, at + header.length, int(raw[1]) if raw else np.dtype(header.descr).itemsize)
        at = record.offset + record.nbytes
        if at > file.size:
            found = f"{what} of {record.nbytes} bytes in {file.size - record.offset}"
            raise BadFile(Problem(str(file.path), found, "as many as there are", "the file is cut short or forged"))
        yield record
        count += 1


def write_records(out: BinaryIO, leaves: Iterable[Tensor], fortran: Sequence[int] = ()) -> None:
    """Write leaves as Equinox does, those at the places `fortran` in Fortran order."""
    for i, leaf in enumerate(leaves):
        turned = i in fortran and len(leaf.shape) > 1
        descr = np.lib.format.dtype_to_descr(leaf.dtype.newbyteorder("<"))
        if not isinstance(descr, str) or not (PLAIN.fullmatch(descr) or RAW.fullmatch(descr)):
            raise Refused(Problem(f"leaf {i}", f"dtype {leaf.dtype}", "numbers that .npy can hold"))
        header = io.BytesIO()
        fields = {"descr": descr, "fortran_order": turned, "shape": leaf.shape}
        np.lib.format.write_array_header_1_0(header, fields)
        out.write(header.getvalue())
        _write_elements(out, leaf, turned)


def _write_elements(out: BinaryIO, leaf: Tensor, turned: bool, byteorder: str = "<") -> None:
    stored = leaf.permute(tuple(reversed(range(len(leaf.shape))))) if turned else leaf
    for piece in element_bytes(stored, ">" if byteorder == ">" else "<"):
        out.write(piece)


def replace_records(opened: EqxFile, out: BinaryIO, leaves: Mapping[int, Tensor]) -> None:
    """A copy of the file in which the leaves at these places have other elements; all else stays byte for byte."""
    raise_all(Refused, (problem for i, leaf in leaves.items() for problem in _misfit(opened, i, leaf)))
    at = 0
    for i in sorted(leaves):
        record = opened.records[i]
        for piece in pieces(opened.file, at, record.offset):
            out.write(piece)
        _write_elements(out, leaves[i], record.header.fortran_order, record.header.descr[:1])
        at = record.offset + record.nbytes
    for piece in pieces(opened.file, at, opened.file.size):
        out.write(piece)


def _misfit(opened: EqxFile, index: int, leaf: Tensor) -> list[Problem]:
    if index >= len(opened.records):
        return [Problem(opened.where(index), "no such leaf", f"one of {len(opened.records)}")]
    record = opened.records[index]
    dtype = record.dtype(opened.where(index), leaf.dtype).newbyteorder("=")
    if (record.shape, dtype) != (leaf.shape, leaf.dtype):
        return [Problem(opened.where(index), f"{leaf.dtype} {list(leaf.shape)}", f"{dtype} {list(record.shape)}")]
    return []
