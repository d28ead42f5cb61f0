"""New files of `paddle.save` that hold a state dict: a pickle of protocol 4 of arrays by name.

>>> import io, pickle
>>> import numpy as np
>>> from neutral.native import from_array
>>> out = io.BytesIO()
>>> write_state_dict(out, [("fc.bias", from_array(np.zeros(2, "f4")))])
>>> pickle.loads(out.getvalue())
{'fc.bias': array([0., 0.], dtype=float32)}
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import BinaryIO, Final

from neutral.containers.elements import element_bytes
from neutral.containers.paddle_file import DTYPES, NAME_TABLE
from neutral.containers.pickle_writing import pickled_text, pickled_whole
from neutral.errors import Problem, Refused
from neutral.native import Tensor

_MEMO_FUNCTION: Final = b"q\x00"
_MEMO_CLASS: Final = b"q\x01"
_CODES: Final = {dtype: "u2" if name == "bfloat16" else dtype.str.lstrip("<>|=") for name, dtype in DTYPES.items()}


def write_state_dict(
    out: BinaryIO, entries: Iterable[tuple[str, Tensor]], own_names: Mapping[str, str] | None = None
) -> None:
    """Write (name, tensor) pairs, and the table of the parameters' own names if there is one.

    The same entries give the same bytes. bfloat16 is written as uint16, as paddle does.
    """
    out.write(b"\x80\x04}(")
    seen: set[str] = set()
    for name, data in entries:
        if name in seen or name == NAME_TABLE:
            raise Refused(
                Problem(name, "a name that is there twice, or paddle's own", "a name for itself", "rename it")
            )
        # numpy 1 has this module by its own name, numpy 2 under this older one, too.
        function = b"h\x00" if seen else b"cnumpy.core.multiarray\n_reconstruct\n" + _MEMO_FUNCTION
        cls = b"h\x01" if seen else b"cnumpy\nndarray\n" + _MEMO_CLASS
        seen.add(name)
        out.write(pickled_text(name) + function + cls + b"K\x00\x85C\x01b\x87R")
        shape = b"(" + b"".join(pickled_whole(n) for n in data.shape) + b"t"
        out.write(b"(K\x01" + shape + _dtype(_CODES[data.dtype]) + b"\x89\x8e" + struct.pack("<Q", data.nbytes))
        for piece in element_bytes(data):
            out.write(piece)
        out.write(b"tb")
    if own_names is not None:
        pairs = b"".join(pickled_text(name) + pickled_text(own) for name, own in own_names.items())
        out.write(pickled_text(NAME_TABLE) + b"}(" + pairs + b"u")
    out.write(b"u.")


def _dtype(code: str) -> bytes:
    order = b"|" if code.endswith("1") else b"<"
    return (
        b"cnumpy\ndtype\n"
        + pickled_text(code)
        + b"\x89\x88\x87R(K\x03"
        + pickled_text(order.decode())
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
