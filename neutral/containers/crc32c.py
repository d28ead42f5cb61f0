"""CRC-32C (Castagnoli) with numpy alone, at gigabytes a second.

>>> hex(crc32c(b"123456789"))
'0xe3069283'

A CRC is linear over GF(2): the remainder of the message, read as a polynomial, modulo P. x^5685 + x^1362 + x^426 + 1
is a multiple of P, and so is its 2^k-th power, which only multiplies the exponents by 2^k. So 64-bit words (k = 6)
are folded forward by three plain XORs of whole vectors, then bytes (k = 3), until 5685 bytes are left; those are the
XOR of one table entry per set bit.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from neutral.errors import BadFile, Problem

_POLYNOMIAL = 0x82F63B78
_HIGH, _MIDDLE, _LOW = 5685, 1362, 426
_SHIFTS = (_HIGH - _MIDDLE, _HIGH - _LOW, _HIGH)
_SCRATCH = 1 << 19
# Four bytes that take the register from zero to all ones, where a CRC-32C starts.
_START = b"\x54\x64\x1f\x64"
_MASK = 0xA282EAD8

_Unit = TypeVar("_Unit", np.uint64, np.uint8)


class Crc32c:
    """The running CRC-32C of bytes that come in pieces."""

    def __init__(self) -> None:
        self._scratch = np.empty(_SCRATCH, np.uint8)
        self._scratch[: len(_START)] = np.frombuffer(_START, np.uint8)
        self._filled = len(_START)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        source = np.frombuffer(data, np.uint8)
        done = 0
        while done < len(source):
            count = min(_SCRATCH - self._filled, len(source) - done)
            self._scratch[self._filled : self._filled + count] = source[done : done + count]
            self._filled += count
            done += count
            if self._filled == _SCRATCH:
                rest = _folded(self._scratch.view(np.uint64)).view(np.uint8)
                self._scratch[: len(rest)] = rest
                self._filled = len(rest)

    def value(self) -> int:
        """The CRC of all bytes so far."""
        pending = self._scratch[: self._filled].copy()
        words = self._filled // 8 * 8
        rest = _folded(pending[:words].view(np.uint64)).view(np.uint8)
        rest = _folded(np.concatenate([rest, pending[words:]]))
        bits = np.unpackbits(rest, bitorder="little").view(np.bool_)
        table = _bit_table()[-len(bits) :]
        return int(np.bitwise_xor.reduce(table[bits], initial=0)) ^ 0xFFFFFFFF


def _folded(units: npt.NDArray[_Unit]) -> npt.NDArray[_Unit]:
    """The last `_HIGH` units, with all before them folded in; `units` is changed."""
    start, end = 0, len(units) - _HIGH
    while start < end:
        count = min(_SHIFTS[0], end - start)
        piece = units[start : start + count]
        for shift in _SHIFTS:
            target = units[start + shift : start + shift + count]
            np.bitwise_xor(target, piece, out=target)
        start += count
    return units[start:]


@cache
def _bit_table() -> npt.NDArray[np.uint32]:
    """What a set bit adds to the CRC, by its place; the last entry is for the last bit."""
    table = np.empty(_HIGH * 8, np.uint32)
    register = _POLYNOMIAL
    for place in range(len(table) - 1, -1, -1):
        table[place] = register
        register = (register >> 1) ^ (_POLYNOMIAL if register & 1 else 0)
    return table


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """The CRC-32C of some bytes."""
    crc = Crc32c()
    crc.update(data)
    return crc.value()


def masked(crc: int) -> int:
    """A CRC as LevelDB and TensorFlow store it, so that a CRC of bytes that hold CRCs stays a good one."""
    return (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF


def check_masked(where: str, computed: int, stored: int) -> None:
    """Refuse bytes whose CRC is not the one stored with them."""
    if masked(computed) != stored:
        found = f"checksum {masked(computed):08x}"
        raise BadFile(Problem(where, found, f"{stored:08x} as stored", "the bytes are damaged; get the file again"))
