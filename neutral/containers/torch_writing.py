"""New files of torch.save that hold a state dict.

>>> import io
>>> import numpy as np
>>> from neutral.native import from_array
>>> out = io.BytesIO()
>>> write_state_dict(out, [("fc.bias", from_array(np.zeros(2, "f4")), None)])
>>> import zipfile
>>> zipfile.ZipFile(out).namelist()
['archive/data.pkl', 'archive/byteorder', 'archive/data/0', 'archive/version']
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Iterable
from typing import BinaryIO, Final

from neutral.containers.elements import element_bytes
from neutral.containers.pickle_writing import pickled_text, pickled_whole
from neutral.containers.torch_refs import DTYPES, STORAGES
from neutral.containers.zip_writing import NewMember, write_zip
from neutral.errors import Problem, Refused
from neutral.native import Tensor

_ALIGNMENT: Final = 64
_ORDER: Final = "<" if sys.byteorder == "little" else ">"
_ORDERED_DICT: Final = b"ccollections\nOrderedDict\n)R"

_TYPED: Final = {DTYPES[name]: cls for cls, name in STORAGES.items() if name in DTYPES}
_NEW_DTYPES: Final = {dtype: name for name, dtype in DTYPES.items() if dtype not in _TYPED}
"""dtypes that torch saves as an untyped storage and a dtype (`_rebuild_tensor_v3`)."""


def write_state_dict(out: BinaryIO, entries: Iterable[tuple[str, Tensor, Hashable]]) -> None:
    """Write a new zip file of torch.save: an OrderedDict of (name, tensor, identity).

    Entries of one identity, shape and dtype share one storage. Loads with `torch.load(weights_only=True)`, also mapped
    (`mmap=True`). The same entries give the same bytes.
    """
    pickled = bytearray(b"\x80\x02" + _ORDERED_DICT + b"(")
    storages: dict[object, tuple[str, Tensor]] = {}
    names: set[str] = set()
    for name, data, identity in entries:
        if name in names or data.dtype not in (_TYPED.keys() | _NEW_DTYPES.keys()):
            found = "a name that is there twice" if name in names else f"dtype {data.dtype}"
            raise Refused(Problem(name, found, "a name of its own and a dtype that torch has", "rename or cast it"))
        names.add(name)
        group = object() if identity is None or data.size == 0 else (identity, data.shape, data.dtype)
        key, _ = storages.setdefault(group, (str(len(storages)), data))
        pickled += pickled_text(name) + _pickled_tensor(key, data)
    pickled += b"u."
    members = [
        NewMember("archive/data.pkl", len(pickled), [pickled]),
        NewMember("archive/byteorder", len(sys.byteorder), [sys.byteorder.encode()]),
        *(
            NewMember(f"archive/data/{key}", data.nbytes, element_bytes(data, _ORDER), _ALIGNMENT)
            for key, data in storages.values()
        ),
        NewMember("archive/version", 2, [b"3\n"]),
    ]
    write_zip(out, members)


def _pickled_tensor(key: str, data: Tensor) -> bytes:
    strides = [math.prod(max(n, 1) for n in data.shape[axis + 1 :]) for axis in range(len(data.shape))]
    new = _NEW_DTYPES.get(data.dtype)
    cls = "UntypedStorage" if new else _TYPED[data.dtype]
    count = data.nbytes if new else data.size
    storage = (
        b"("
        + pickled_text("storage")
        + f"ctorch{'.storage' if new else ''}\n{cls}\n".encode()
        + pickled_text(key)
        + pickled_text("cpu")
        + pickled_whole(count)
        + b"tQ"
    )
    shape = b"(" + b"".join(map(pickled_whole, data.shape)) + b"t(" + b"".join(map(pickled_whole, strides)) + b"t"
    args = b"(" + storage + pickled_whole(0) + shape + b"\x89" + _ORDERED_DICT
    if new:
        return b"ctorch._utils\n_rebuild_tensor_v3\n" + args + f"ctorch\n{new}\ntR".encode()
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"tR"
