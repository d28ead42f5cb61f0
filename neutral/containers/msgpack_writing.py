"""Values as msgpack, in the shortest form of each, as its own library packs them.

>>> packed({"a": [None, True, -1, 1.5], "b": b"xy"}).hex(" ")
'82 a1 61 94 c0 c3 ff cb 3f f8 00 00 00 00 00 00 a1 62 c4 02 78 79'
"""

from __future__ import annotations

import struct

from neutral.containers.msgpack_scanning import COMPLEX
from neutral.errors import Problem, Refused

_INTEGERS = (
    (0, 1 << 8, b"\xcc", ">B"), (0, 1 << 16, b"\xcd", ">H"), (0, 1 << 32, b"\xce", ">I"), (0, 1 << 64, b"\xcf", ">Q"),
    (-1 << 7, 0, b"\xd0", ">b"), (-1 << 15, 0, b"\xd1", ">h"), (-1 << 31, 0, b"\xd2", ">i"), (-1 << 63, 0, b"\xd3", ">q"),
)  # fmt: skip
_LENGTHS = {
    # The byte of the shortest form and its limit, then those with a length of 1, 2 and 4 bytes.
    "map": (0x80, 16, (None, 0xDE, 0xDF)),
    "array": (0x90, 16, (None, 0xDC, 0xDD)),
    "str": (0xA0, 32, (0xD9, 0xDA, 0xDB)),
    "bin": (0, 0, (0xC4, 0xC5, 0xC6)),
    "ext": (0, 0, (0xC7, 0xC8, 0xC9)),
}
_FIXED_EXTENSIONS = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}


def packed(value: object) -> bytes:
    """A value without arrays. Text that was read as lone surrogates, and ints of over 64 bits, are refused."""
    if value is None or isinstance(value, bool):
        return b"\xc0" if value is None else b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode("utf-8")
        return packed_head("str", len(raw)) + raw
    if isinstance(value, bytes):
        return packed_head("bin", len(value)) + value
    if isinstance(value, complex):
        data = packed([value.real, value.imag])
        return extension_head(COMPLEX, len(data)) + data
    if isinstance(value, list | tuple):
        return packed_head("array", len(value)) + b"".join(map(packed, value))
    if isinstance(value, dict):
        return packed_head("map", len(value)) + b"".join(packed(k) + packed(v) for k, v in value.items())
    raise Refused(Problem(repr(value)[:80], f"a {type(value).__name__}", "None, bool, int, float, complex, str, bytes"))


def _integer(value: int) -> bytes:
    if -32 <= value < 128:
        return struct.pack(">b", value) if value < 0 else bytes([value])
    for low, high, tag, form in _INTEGERS:
        if low <= value < high:
            return tag + struct.pack(form, value)
    raise Refused(Problem(str(value)[:40], "a whole number of over 64 bits", "one that msgpack can hold"))


def packed_head(what: str, length: int) -> bytes:
    """What comes before the nodes of a `map` or `array`, the bytes of a `str` or `bin`, the type of an `ext`."""
    base, limit, (one, two, four) = _LENGTHS[what]
    if length < limit:
        return bytes([base | length])
    if one is not None and length < 1 << 8:
        return bytes([one, length])
    if length < 1 << 16:
        return bytes([two or 0]) + struct.pack(">H", length)
    if length < 1 << 32:
        return bytes([four or 0]) + struct.pack(">I", length)
    raise Refused(Problem(f"{length} bytes", "more than msgpack can hold in one piece", f"less than {1 << 32}"))


def extension_head(kind: int, length: int) -> bytes:
    """What comes before the bytes of an extension."""
    fixed = _FIXED_EXTENSIONS.get(length)
    return (bytes([fixed]) if fixed else packed_head("ext", length)) + bytes([kind])


def array_head(kind: int, shape: tuple[int, ...], dtype: str, nbytes: int) -> bytes:
    """What comes before the elements of an array."""
    inner = packed_head("array", 3) + packed(shape) + packed(dtype) + packed_head("bin", nbytes)
    return extension_head(kind, len(inner) + nbytes) + inner
