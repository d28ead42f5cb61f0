"""A tensor's elements as the bytes that files hold.

>>> import numpy as np
>>> from neutral.native import from_array
>>> b"".join(element_bytes(from_array(np.array([1, 258], np.uint16)))).hex(" ")
'01 00 02 01'
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Literal

import numpy as np

from neutral.containers.files import pieces
from neutral.native import Stored, Tensor


def element_bytes(tensor: Tensor, byteorder: Literal["<", ">"] = "<") -> Iterator[memoryview]:
    """The elements in C order, little-endian unless told otherwise, a few MB at a time.

    Each piece is valid only until the next one is taken.
    """
    if isinstance(tensor, Stored) and tensor.contiguous and _is_native(byteorder):
        yield from pieces(tensor.storage, tensor.offset, tensor.offset + tensor.nbytes)
        return
    for tile in tensor.tiles():
        yield tile.astype(tile.dtype.newbyteorder(byteorder), copy=False).view(np.uint8).data


def _is_native(byteorder: str) -> bool:
    return byteorder == ("<" if sys.byteorder == "little" else ">")
