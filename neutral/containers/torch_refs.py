"""What the pickle of a torch.save file refers to: storages and tensors, made from its calls without making them.

>>> storage = StorageRef("0", "float32", 0, 24, 24)
>>> TensorRef(storage, 0, (2, 3), (3, 1), "float32").size
6
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np

from neutral.containers.pickle_machine import Global, Node, Rebuild, items_of
from neutral.errors import BadFile, Problem, printable
from neutral.native import Tensor, from_array

_RANK_LIMIT: Final = 32

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float64": np.dtype(np.float64), "float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16), "int64": np.dtype(np.int64), "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16), "int8": np.dtype(np.int8), "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32), "uint16": np.dtype(np.uint16), "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_), "complex128": np.dtype(np.complex128), "complex64": np.dtype(np.complex64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz), "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
"""torch's dtypes by name. Not among them: quantized, complex32, float4 pairs, bit and sub-byte types."""

STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "QInt8Storage": "qint8", "QInt32Storage": "qint32", "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4", "UntypedStorage": "",
}  # fmt: skip
"""The storage classes of torch (also under torch.cuda) and their dtypes; an untyped one counts bytes."""

ITEMSIZE: Final = {"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1, "": 1, "complex32": 4,
                    "float4_e2m1fn_x2": 1, "bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1} | {
    name: dtype.itemsize for name, dtype in DTYPES.items()
}  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class StorageRef:
    """One storage that a pickle refers to: its key, the dtype the reference names ("" if untyped), its bytes.

    `first` and `nbytes` say which part of the stored bytes it is; all of them but for the views of legacy files.
    """

    key: str
    dtype: str
    first: int
    nbytes: int
    whole: int


@dataclass(frozen=True, eq=False, slots=True)
class TensorRef:
    """One tensor that a pickle refers to. `offset` and `strides` count elements. Not read yet.

    `conj` and `neg`: torch applies them when it reads the elements.
    """

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    conj: bool = False
    neg: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """Where in its storage the bytes of its elements begin and end, with those that lie between them."""
        width = ITEMSIZE.get(self.dtype, 1)
        start = self.storage.first + self.offset * width
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return start, start + (last + 1) * width if self.size else start


class Refs:
    """Makes references out of the pickle's calls, and remembers them all, to be checked when the storages are known."""

    def __init__(self, where: str, *, legacy: bool) -> None:
        self.where, self.legacy = where, legacy
        self.storages: dict[str, StorageRef] = {}
        self.tensors: list[TensorRef] = []
        self.rebuild: dict[str, Rebuild] = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": self._inner,
            "torch._utils._rebuild_parameter_with_state": self._inner,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": self._from_device,
            "torch.nn.parameter.Parameter": self._inner,
            "torch.nn.parameter.Buffer": self._inner,
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            "torch._tensor._rebuild_from_type": self._from_type,
            "_codecs.encode": _encoded,
            "numpy.core.multiarray.scalar": _numpy_scalar,
            "numpy._core.multiarray.scalar": _numpy_scalar,
        }

    def _bad(self, found: str, expected: str) -> BadFile:
        return BadFile(Problem(self.where, found, expected, "the file is damaged or forged"))

    def persistent(self, value: object) -> object:
        if type(value) is not tuple or not value:
            raise self._bad("a reference that is no tuple", "a reference to a storage")
        if value[0] == "module" and len(value) == 4:
            return value[1]
        if value[0] != "storage" or len(value) != (6 if self.legacy else 5):
            raise self._bad(
                f"a reference to {printable(value[0] if type(value[0]) is str else '?', 40)}",
                "a reference to a storage",
            )
        cls, key, count = value[1], value[2], value[4]
        name = cls.name.rpartition(".")[2] if type(cls) is Global and cls.name.startswith("torch.") else ""
        dtype = STORAGES.get(name)
        if dtype is None:
            raise self._bad(f"storage class {printable(getattr(cls, 'name', '?'), 60)}", "one of torch's storages")
        if type(key) is not str or not _is_count(count):
            raise self._bad("a storage without a key and a count", "a key and a count of elements")
        item = ITEMSIZE[dtype]
        first, whole = 0, count * item
        nbytes = whole
        view = value[5] if self.legacy else None
        if view is not None:
            if (
                type(view) is not tuple
                or len(view) != 3
                or not _is_count(view[1])
                or not _is_count(view[2])
                or view[1] + view[2] > count
            ):
                raise self._bad(f"a view of storage {printable(key, 40)} that leaves it", "one inside it")
            first, nbytes = view[1] * item, view[2] * item
        known = self.storages.get(key)
        if known is not None and (known.whole // item != count or (self.legacy and known.dtype != dtype)):
            raise self._bad(f"storage {printable(key, 40)} with two sizes or dtypes", "one")
        if known is not None and (known.dtype, known.first, known.nbytes) == (dtype, first, nbytes):
            return known
        made = StorageRef(key, dtype, first, nbytes, whole)
        self.storages.setdefault(key, made)
        return made

    def _tensor(self, args: tuple[Any, ...]) -> object:
        if not 4 <= len(args) <= 7:
            raise self._bad(f"a tensor of {len(args)} arguments", "4 to 7")
        return self._make(args[0], args[1], args[2], args[3], None, args[6] if len(args) == 7 else None)

    def _tensor_v3(self, args: tuple[Any, ...]) -> object:
        if not 7 <= len(args) <= 8 or type(args[6]) is not Global or not args[6].name.startswith("torch."):
            raise self._bad("a tensor without a dtype", "7 or 8 arguments")
        return self._make(args[0], args[1], args[2], args[3], args[6].name[6:], args[7] if len(args) == 8 else None)

    def _make(
        self, storage: object, offset: object, shape: object, strides: object, dtype: str | None, bits: object
    ) -> object:
        if type(storage) is not StorageRef:
            return Node("torch._utils._rebuild_tensor_v2", (storage,))
        shape, strides = _counts(shape), _counts(strides)
        if shape is None or strides is None or not _is_count(offset) or len(shape) != len(strides):
            raise self._bad(
                "a tensor whose shape, strides or offset are no counts", "whole numbers from 0 on, one stride per axis"
            )
        if len(shape) > _RANK_LIMIT:
            raise self._bad(f"a tensor of {len(shape)} axes", f"at most {_RANK_LIMIT}")
        marks = items_of(bits) or {}
        made = TensorRef(
            storage, offset, shape, strides, dtype or storage.dtype or "uint8",  # type: ignore[arg-type]
            bool(marks.get("conj")), bool(marks.get("neg")),
        )  # fmt: skip
        self.tensors.append(made)
        return made

    def _inner(self, args: tuple[Any, ...]) -> object:
        return args[0] if args else Node("torch.nn.parameter.Parameter")

    def _from_device(self, args: tuple[Any, ...]) -> object:
        # Tensors of XLA and its like: (the same tensor in main memory, dtype, device, requires_grad).
        if (
            len(args) == 4
            and type(args[0]) is TensorRef
            and type(args[1]) is Global
            and args[1].name == f"torch.{args[0].dtype}"
        ):
            return args[0]
        return Node("torch._utils._rebuild_device_tensor_from_cpu_tensor", args)

    def _from_type(self, args: tuple[Any, ...]) -> object:
        # (function, subclass, its arguments, state). A subclass with further tensors in its state, such as the scale of a
        # quantized one, is not its elements alone.
        node = Node("torch._tensor._rebuild_from_type_v2", args)
        if len(args) < 3 or type(args[0]) is not Global or type(args[2]) is not tuple:
            return node
        understood = self.rebuild.get(args[0].name)
        state = args[3] if len(args) > 3 else None
        parts = state if type(state) is tuple else (state,)
        held = [value for part in parts for value in (items_of(part) or {}).values()]
        if understood is None or any(type(value) in (TensorRef, Node) for value in held):
            return node
        return understood(args[2])

    def build(self, target: object, state: object) -> None:
        """State set on a tensor: attributes, or (requires_grad, volatile, hooks) of torch 0.3; never its elements."""
        if type(state) is tuple and any(type(part) in (StorageRef, TensorRef) for part in state):
            raise self._bad("a tensor whose elements are set a second time", "once")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _counts(value: object) -> tuple[int, ...] | None:
    if type(value) is Node and value.cls == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) not in (tuple, list) or not all(_is_count(n) for n in value):  # type: ignore[attr-defined]
        return None
    return tuple(value)  # type: ignore[arg-type]


def _encoded(args: tuple[Any, ...]) -> object:
    # How protocol 2 stores bytes: as latin-1 text.
    if len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1"):
        try:
            return args[0].encode("latin-1")
        except UnicodeEncodeError:
            pass
    return Node("_codecs.encode", args)


def _numpy_scalar(args: tuple[Any, ...]) -> object:
    dtype = _numpy_dtype(args[0]) if len(args) == 2 else None
    if dtype is None or type(args[1]) is not bytes or len(args[1]) != dtype.itemsize:
        return Node("numpy.scalar", args)
    return np.frombuffer(args[1], dtype)[0].item()


def _numpy_dtype(value: object) -> np.dtype[Any] | None:
    if type(value) is not Node or value.cls != "numpy.dtype" or not value.args or type(value.args[0]) is not str:
        return None
    code = value.args[0]
    if code[:1] not in "fiub" or code not in _NUMPY_CODES:
        return None
    order = value.state[1] if type(value.state) is tuple and len(value.state) > 1 else "="
    return np.dtype(code).newbyteorder("<" if order == "<" else ">" if order == ">" else "=")


_NUMPY_CODES: Final = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})


def numpy_array(value: object) -> Tensor | None:
    """The array that a node of a pickled numpy array holds, or None if it is no such thing."""
    if type(value) is not Node or value.cls not in (
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
    ):
        return None
    state = value.state
    if type(state) is not tuple or len(state) != 5 or type(state[4]) is not bytes:
        return None
    shape, dtype = _counts(state[1]), _numpy_dtype(state[2])
    if shape is None or dtype is None or len(shape) > _RANK_LIMIT or math.prod(shape) * dtype.itemsize != len(state[4]):
        return None
    return from_array(np.frombuffer(state[4], dtype).reshape(shape, order="F" if state[3] else "C"))
