"""Single values in the bytes of a pickle.

>>> import pickle
>>> pickle.loads(pickled_text("fc.bias") + b"."), pickle.loads(pickled_whole(1 << 31) + b".")
('fc.bias', 2147483648)
"""

from __future__ import annotations

import struct


def pickled_text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def pickled_whole(number: int) -> bytes:
    """A number that is not negative."""
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x09" + number.to_bytes(9, "little")
