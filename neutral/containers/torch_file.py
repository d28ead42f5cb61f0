"""Files of `torch.save` as bytes: where each tensor lies, how it is replaced, how a new state dict is written.

>>> import numpy as np, pathlib, tempfile
>>> from neutral.containers.files import new_file
>>> path = pathlib.Path(tempfile.mkdtemp()) / "x.pt"
>>> with new_file(path) as out:
...     write_state_dict(out, [("fc.weight", from_array(np.arange(6.0).reshape(2, 3)), None)])
>>> with TorchFile(path) as file:
...     weight = items_of(file.root)["fc.weight"]
...     weight.shape, file.tensor(weight).read()[1]
((2, 3), array([3., 4., 5.]))

Read are the zip format (torch 1.6 and later, TorchScript's too) and the legacy format before it, of either byte order.
Pickles go through `pickle_machine`: nothing is called and no class is needed. Every tensor of the file, asked for or
not, is checked to lie inside its storage when the file is opened; the bytes of a zip record are checked against its
CRC-32 when they are first read.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from neutral.containers.files import Memory, SourceFile
from neutral.containers.pickle_machine import Global, Node, Rebuild, items_of, load
from neutral.containers.zip import ZipSource
from neutral.containers.zip_replacing import replace_members
from neutral.containers.zip_writing import NewMember, write_zip
from neutral.errors import BadFile, Problem, Refused, Unsupported, printable, raise_all
from neutral.native import TILE, Array, Range, Storage, Stored, Tensor, from_array

MAGIC: Final = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
"""The pickle of the number that opens a legacy file."""

_PICKLE_LIMIT: Final = 96 << 20
_RANK_LIMIT: Final = 32
_LOGICAL_FACTOR: Final = 16
_LOGICAL_EXTRA: Final = 64 << 20

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

_STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "QInt8Storage": "qint8", "QInt32Storage": "qint32", "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4", "UntypedStorage": "",
}  # fmt: skip
"""The storage classes of torch (also under torch.cuda) and their dtypes; an untyped one counts bytes."""

_ITEMSIZE: Final = {"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1, "": 1, "complex32": 4,
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


class _Refs:
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
        dtype = _STORAGES.get(name)
        if dtype is None:
            raise self._bad(f"storage class {printable(getattr(cls, 'name', '?'), 60)}", "one of torch's storages")
        if type(key) is not str or not _is_count(count):
            raise self._bad("a storage without a key and a count", "a key and a count of elements")
        item = _ITEMSIZE[dtype]
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


class _VerifiedFirst:
    """A zip record whose CRC-32 is verified before the first of its bytes is given out: for tensors that are a part of it."""

    def __init__(self, storage: Storage, verify: Callable[[], None]) -> None:
        self._storage, self._verify = storage, verify
        self._verified = False

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not self._verified:
            self._verify()
            self._verified = True
        self._storage.read_into(offset, buffer)


class _Elements(Tensor):
    """Stored elements seen as another dtype of the same width, then conjugated or negated."""

    def __init__(self, base: Tensor, dtype: npt.DTypeLike, conj: bool, neg: bool) -> None:
        self._base, self._conj, self._neg = base, conj, neg
        self.shape = base.shape
        self.dtype = np.dtype(dtype)

    def block(self, ranges: Sequence[Range]) -> Array:
        block = np.asarray(self._base.block(ranges))
        if block.dtype != self.dtype:
            block = np.ascontiguousarray(block).reshape(block.shape).view(self.dtype)
        if self._conj:
            block = np.asarray(np.conj(block))
        return np.asarray(np.negative(block)) if self._neg else block


class TorchFile:
    """A file of torch.save, open. `root` is what was saved: plain data, `Node`s and `TensorRef`s."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.globals: dict[str, None] = {}
        self.big_endian = False
        self._file = SourceFile(self.path)
        self._whole: dict[str, Storage] = {}
        self._partly: dict[str, Storage] = {}
        try:
            head = self._file.read(0, min(512, self._file.size))
            if head[:4] == b"PK\x03\x04":
                self._open_zip()
            elif head.startswith(MAGIC):
                self._open_legacy()
            elif head[257:262] == b"ustar":
                raise Unsupported(
                    Problem(
                        str(path),
                        "the tar format of torch before 0.1.10",
                        "the zip or the legacy format",
                        "save it again with any later torch",
                    )
                )
            else:
                raise BadFile(
                    Problem(
                        str(path), "a file that is none of torch.save's", "a zip file or the legacy format of torch"
                    )
                )
            self._check()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def _bad(self, found: str, expected: str, do: str = "the file is damaged or forged") -> BadFile:
        return BadFile(Problem(str(self.path), found, expected, do))

    def _open_zip(self) -> None:
        self.zip = ZipSource(self._file)
        names = self.zip.members
        roots = [
            name[: -len("data.pkl")]
            for name in names
            if name.count("/") <= 1 and (name == "data.pkl" or name.endswith("/data.pkl"))
        ]
        if len(roots) > 1:
            raise self._bad("two data.pkl", "one folder with one data.pkl")
        if not roots:
            kind = (
                "a torch.export archive (.pt2)"
                if any(n.endswith("/archive_format") for n in names)
                else "a zip file without data.pkl"
            )
            raise Unsupported(
                Problem(str(self.path), kind, "a file of torch.save", "save its state_dict with torch.save")
            )
        self._root = roots[0]
        order = self.zip.read(self._root + "byteorder", 16).strip() if self._root + "byteorder" in names else b"little"
        if order not in (b"little", b"big"):
            raise self._bad(f"byte order {printable(order, 40)}", "little or big")
        self.big_endian = order == b"big"
        script = self._root + "constants.pkl" in names
        self.format = "torchscript" if script else "zip"
        self._refs = _Refs(str(self.path), legacy=False)
        pickled = Memory(self.zip.read(self._root + "data.pkl", _PICKLE_LIMIT))
        self.root, end = self._load(pickled, 0, "data.pkl")
        if end != pickled.nbytes:
            raise self._bad(f"{pickled.nbytes - end} bytes after the pickle", "none")
        for storage in self._refs.storages.values():
            name = self._record(storage.key)
            member = names.get(name)
            if member is None:
                raise self._bad(f"no record {printable(name, 80)}", "the storage that the pickle names")
            item = _ITEMSIZE[storage.dtype]
            if member.size // item * item != storage.whole:
                raise self._bad(f"record {printable(name, 80)} of {member.size} bytes", f"{storage.whole} bytes")

    def _load(self, storage: Storage, offset: int, what: str) -> tuple[Any, int]:
        refs = self._refs
        return load(
            storage, offset, where=f"{self.path}: {what}", rebuild=refs.rebuild, persistent=refs.persistent,
            build=refs.build, globals_seen=self.globals,
        )  # fmt: skip

    def _open_legacy(self) -> None:
        self.format = "legacy"
        self._refs = _Refs(str(self.path), legacy=True)
        whole = self._file.section(0, self._file.size)
        self._sections: dict[str, tuple[int, int]] = {}
        _, at = self._load(whole, 0, "magic number")
        version, at = self._load(whole, at, "version")
        if version != 1001:
            raise self._bad("a protocol version that is not 1001", "1001")
        system, at = self._load(whole, at, "system")
        little = (items_of(system) or {}).get("little_endian")
        if type(little) is not bool:
            raise self._bad("no byte order", "little_endian true or false")
        self.big_endian = not little
        self.root, at = self._load(whole, at, "data")
        keys, at = self._load(whole, at, "storage keys")
        if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
            raise self._bad("storage keys that are no list of names", "a list of names")
        if set(keys) != set(self._refs.storages):
            raise self._bad("storage keys that are not those of the pickle", "the same keys")
        for key in keys:
            storage = self._refs.storages[key]
            (count,) = struct.unpack(">q" if self.big_endian else "<q", self._file.read(at, 8))
            if count * _ITEMSIZE[storage.dtype] != storage.whole:
                raise self._bad(f"storage {printable(key, 40)} of {count} elements", f"{storage.whole} bytes")
            self._file.section(at + 8, storage.whole)
            self._sections[key] = (at + 8, storage.whole)
            at += 8 + storage.whole
        if at != self._file.size:
            raise self._bad(f"{self._file.size - at} bytes after the last storage", "none")

    def _check(self) -> None:
        for ref in self._refs.tensors:
            item = _ITEMSIZE.get(ref.dtype)
            if item is None:
                continue
            last = sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True)) if ref.size else -1
            if (ref.offset + last + 1) * item > ref.storage.nbytes and ref.size:
                raise self._bad(
                    f"a tensor of shape {ref.shape}, strides {ref.strides}, offset {ref.offset} in {ref.storage.nbytes} bytes",
                    "one inside its storage",
                )

    def logical_limit(self) -> int:
        """How many bytes the distinct tensors read from this file may have together.

        Expanded tensors (stride 0) have more elements than bytes. Sixteen times what the storages hold, and 64 MB,
        are more than any real model needs, and far below the terabytes that a forged stride asks for.
        """
        return _LOGICAL_FACTOR * sum(s.whole for s in self._refs.storages.values()) + _LOGICAL_EXTRA

    def storage(self, key: str, *, whole: bool = True) -> Storage:
        """The bytes of a storage. Unless they are read `whole`, from start to end, their CRC is verified beforehand."""
        if self.format == "legacy":
            return self._file.section(*self._sections[key])
        slot = self._whole if whole else self._partly
        if key not in slot:
            name = self._record(key)
            opened = self.zip.open(name)
            slot[key] = opened if whole else _VerifiedFirst(opened, lambda: self.zip.verify(name))
        return slot[key]

    def plain(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype to read stored elements with: of the file's byte order, unsigned where numpy cannot swap."""
        if dtype.itemsize == 1 or self.big_endian == (sys.byteorder == "big"):
            return dtype
        order = ">" if self.big_endian else "<"
        return np.dtype(f"{order}u{dtype.itemsize}") if dtype.isbuiltin == 2 else dtype.newbyteorder(order)  # type: ignore[arg-type]

    def tensor(self, ref: TensorRef, name: str = "tensor") -> Tensor:
        """The elements of a reference, lazily. `name` is for the error if numpy has no such dtype."""
        dtype = DTYPES.get(ref.dtype)
        if dtype is None:
            raise Refused(
                Problem(
                    name,
                    f"dtype torch.{printable(ref.dtype, 40)}",
                    "a dtype that numpy or ml_dtypes has",
                    "dequantize or convert it before saving",
                )
            )
        if self.big_endian and ref.storage.dtype == "" and dtype.itemsize > 1:
            raise Refused(
                Problem(
                    name,
                    "an untyped storage in a big-endian file",
                    "a known byte order",
                    "save it again on a little-endian machine",
                )
            )
        if ref.size * dtype.itemsize > self.logical_limit():
            raise self._bad(
                f"{printable(name, 80)} of shape {ref.shape}", "a tensor not many times larger than the file"
            )
        whole = ref.offset == 0 and ref.size * dtype.itemsize == ref.storage.whole
        storage = self.storage(ref.storage.key, whole=whole)
        offset = ref.storage.first + ref.offset * dtype.itemsize
        stored = Stored(storage, ref.shape, self.plain(dtype), offset, ref.strides)
        if stored.dtype == dtype and not ref.conj and not ref.neg:
            return stored
        return _Elements(stored, dtype, ref.conj, ref.neg)

    def identity(self, ref: TensorRef) -> Hashable:
        """Equal for references to the very same elements: tied weights. None for tensors without elements."""
        if ref.size == 0:
            return None
        first = ref.storage.first + ref.offset * _ITEMSIZE.get(ref.dtype, 1)
        strides = tuple(s if n > 1 else 0 for n, s in zip(ref.shape, ref.strides, strict=True))
        return (ref.storage.key, first, ref.shape, strides, ref.dtype, ref.conj, ref.neg)

    def size_of(self, key: str) -> int:
        """How many bytes a storage has in the file."""
        return self._sections[key][1] if self.format == "legacy" else self.zip.members[self._record(key)].size

    def _record(self, key: str) -> str:
        return self._root + "data/" + key

    def copy_with(self, out: BinaryIO, storages: Mapping[str, Iterable[memoryview]]) -> None:
        """Write a copy of the file in which the bytes of some storages are replaced, and nothing else."""
        if self.format != "legacy":
            new = {self._record(key): (self.size_of(key), chunks) for key, chunks in storages.items()}
            replace_members(self.zip, out, new)
            return
        at = 0
        for key, (start, length) in sorted(self._sections.items(), key=lambda item: item[1]):
            if key not in storages:
                continue
            for chunk in _pieces(self._file.section(0, self._file.size), at, start):
                out.write(chunk)
            for chunk in storages[key]:
                out.write(chunk)
            at = start + length
        for chunk in _pieces(self._file.section(0, self._file.size), at, self._file.size):
            out.write(chunk)


def _pieces(storage: Storage, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a range, in pieces that are valid until the next one is taken."""
    buffer = memoryview(bytearray(min(TILE, max(stop - start, 0))))
    while start < stop:
        piece = buffer[: stop - start]
        storage.read_into(start, piece)
        yield piece
        start += len(piece)


@dataclass(frozen=True)
class _Run:
    """Elements that lie without gaps at byte `start`, in the order of `data`."""

    name: str
    start: int
    data: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.data.nbytes


def fill(source: TorchFile, entries: Sequence[tuple[str, TensorRef, Tensor]], out: BinaryIO) -> None:
    """Write a copy of `source` in which the tensors named have new elements: (name for errors, reference, elements).

    All else stays byte for byte: the pickles, other storages, the bytes of a storage between its tensors. Tensors that
    share elements must agree on them.
    """
    problems = []
    by_storage: dict[str, list[tuple[str, TensorRef, Tensor]]] = {}
    for name, ref, data in entries:
        dtype = DTYPES.get(ref.dtype)
        if data.shape != ref.shape or data.dtype != dtype:
            problems.append(
                Problem(name, f"{data.dtype}{list(data.shape)}", f"{ref.dtype}{list(ref.shape)} as in the template")
            )
        elif ref.size:
            by_storage.setdefault(ref.storage.key, []).append((name, ref, data))
    raise_all(Refused, problems)
    source.copy_with(out, {key: _filled(source, key, members) for key, members in by_storage.items()})


def _filled(source: TorchFile, key: str, members: Sequence[tuple[str, TensorRef, Tensor]]) -> Iterator[memoryview]:
    runs: dict[object, _Run] = {}
    dense = True
    for name, ref, data in members:
        run, order = _run(name, ref, data)
        if run is None:
            dense = False
            break
        twin = runs.setdefault((run.start, run.data.shape, order, run.data.dtype), run)
        if twin.data is not run.data:
            _compare(twin, run)
    ordered = sorted(runs.values(), key=lambda run: run.start)
    apart = all(a.stop <= b.start for a, b in pairwise(ordered))
    return _streamed(source, key, ordered) if dense and apart else _scattered(source, key, members)


def _run(name: str, ref: TensorRef, data: Tensor) -> tuple[_Run | None, tuple[int, ...]]:
    """The tensor as a run of bytes if its elements lie without gaps, in whatever order of its axes."""
    order = tuple(sorted(range(len(ref.shape)), key=lambda axis: (-ref.strides[axis], axis)))
    step = 1
    for axis in reversed(order):
        if ref.shape[axis] > 1 and ref.strides[axis] != step:
            return None, order
        step *= ref.shape[axis]
    if ref.conj or ref.neg:
        data = _Elements(data, data.dtype, ref.conj, ref.neg)
    return _Run(name, ref.storage.first + ref.offset * data.dtype.itemsize, data.permute(order)), order


def _compare(one: _Run, other: _Run) -> None:
    for a, b in zip(one.data.tiles(), other.data.tiles(), strict=True):
        if a.tobytes() != b.tobytes():
            raise _disagree(one.name, other.name)


def _disagree(one: str, other: str) -> Refused:
    return Refused(
        Problem(
            other,
            f"elements that differ from those of {printable(one, 80)}",
            "equal ones, for the template stores them once (tied weights)",
            "untie them in the template, or give both the same values",
        )
    )


def _streamed(source: TorchFile, key: str, runs: Sequence[_Run]) -> Iterator[memoryview]:
    size = source.size_of(key)
    at = 0
    for run in runs:
        yield from _pieces(source.storage(key, whole=False), at, run.start)
        plain = source.plain(run.data.dtype)
        for tile in run.data.tiles():
            yield _bytes(_stored(tile, plain))
        at = run.stop
    yield from _pieces(source.storage(key, whole=False), at, size)


def _stored(values: Array, plain: np.dtype[Any]) -> Array:
    if plain == values.dtype:
        return values
    return values.view(plain.newbyteorder("=")).astype(plain) if values.dtype.isbuiltin == 2 else values.astype(plain)


def _scattered(source: TorchFile, key: str, members: Sequence[tuple[str, TensorRef, Tensor]]) -> Iterator[memoryview]:
    size = source.size_of(key)
    if size > _SCATTER_LIMIT:
        raise Refused(
            Problem(
                members[0][0],
                f"views that overlap or have gaps, in a storage of {size >> 20} MB",
                f"at most {_SCATTER_LIMIT >> 20} MB",
                "save the template with contiguous tensors",
            )
        )
    buffer = bytearray(size)
    source.storage(key).read_into(0, memoryview(buffer))
    views = []
    for name, ref, data in members:
        plain = source.plain(data.dtype)
        start = ref.storage.first + ref.offset * plain.itemsize
        view: Array = np.ndarray(ref.shape, plain, buffer, start, tuple(s * plain.itemsize for s in ref.strides))
        values = _stored(
            (_Elements(data, data.dtype, ref.conj, ref.neg) if ref.conj or ref.neg else data).read(), plain
        )
        view[...] = values
        views.append((name, view, values))
    for name, view, values in views:
        if view.tobytes() != values.tobytes():
            raise _disagree("another view of the same storage", name)
    yield memoryview(buffer)


def _bytes(tile: Array) -> memoryview:
    return tile.view(np.uint8).data.cast("B")


_TYPED: Final = {DTYPES[name]: cls for cls, name in _STORAGES.items() if name in DTYPES}
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
        pickled += _text(name) + _pickled_tensor(key, data)
    pickled += b"u."
    members = [
        NewMember("archive/data.pkl", len(pickled), [pickled]),
        NewMember("archive/byteorder", len(sys.byteorder), [sys.byteorder.encode()]),
        *(
            NewMember(f"archive/data/{key}", data.nbytes, map(_bytes, data.tiles()), _ALIGNMENT)
            for key, data in storages.values()
        ),
        NewMember("archive/version", 2, [b"3\n"]),
    ]
    write_zip(out, members)


_ALIGNMENT: Final = 64
_SCATTER_LIMIT: Final = 256 << 20
_ORDERED_DICT: Final = b"ccollections\nOrderedDict\n)R"


def _pickled_tensor(key: str, data: Tensor) -> bytes:
    strides = [math.prod(max(n, 1) for n in data.shape[axis + 1 :]) for axis in range(len(data.shape))]
    new = _NEW_DTYPES.get(data.dtype)
    cls = "UntypedStorage" if new else _TYPED[data.dtype]
    count = data.nbytes if new else data.size
    storage = (
        b"("
        + _text("storage")
        + f"ctorch{'.storage' if new else ''}\n{cls}\n".encode()
        + _text(key)
        + _text("cpu")
        + _whole(count)
        + b"tQ"
    )
    shape = b"(" + b"".join(map(_whole, data.shape)) + b"t(" + b"".join(map(_whole, strides)) + b"t"
    args = b"(" + storage + _whole(0) + shape + b"\x89" + _ORDERED_DICT
    if new:
        return b"ctorch._utils\n_rebuild_tensor_v3\n" + args + f"ctorch\n{new}\ntR".encode()
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"tR"


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _whole(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x09" + number.to_bytes(9, "little")
