"""Files of `torch.save` as bytes: where each tensor lies.

>>> import numpy as np, pathlib, tempfile
>>> from neutral.containers.files import new_file
>>> from neutral.containers.torch_writing import write_state_dict
>>> from neutral.native import from_array
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

import struct
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import numpy as np
import numpy.typing as npt

from neutral.containers.files import Memory, SourceFile, pieces
from neutral.containers.pickle_machine import items_of, load
from neutral.containers.torch_refs import DTYPES, ITEMSIZE, Refs, TensorRef
from neutral.containers.zip import ZipSource
from neutral.containers.zip_replacing import replace_members
from neutral.errors import BadFile, Problem, Refused, Unsupported, printable
from neutral.native import Array, Range, Storage, Stored, Tensor

MAGIC: Final = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
"""The pickle of the number that opens a legacy file."""

_PICKLE_LIMIT: Final = 96 << 20
_LOGICAL_FACTOR: Final = 16
_LOGICAL_EXTRA: Final = 64 << 20


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


class Elements(Tensor):
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
        self._refs = Refs(str(self.path), legacy=False)
        pickled = Memory(self.zip.read(self._root + "data.pkl", _PICKLE_LIMIT))
        self.root, end = self._load(pickled, 0, "data.pkl")
        if end != pickled.nbytes:
            raise self._bad(f"{pickled.nbytes - end} bytes after the pickle", "none")
        for storage in self._refs.storages.values():
            name = self._record(storage.key)
            member = names.get(name)
            if member is None:
                raise self._bad(f"no record {printable(name, 80)}", "the storage that the pickle names")
            item = ITEMSIZE[storage.dtype]
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
        self._refs = Refs(str(self.path), legacy=True)
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
            if count * ITEMSIZE[storage.dtype] != storage.whole:
                raise self._bad(f"storage {printable(key, 40)} of {count} elements", f"{storage.whole} bytes")
            self._file.section(at + 8, storage.whole)
            self._sections[key] = (at + 8, storage.whole)
            at += 8 + storage.whole
        if at != self._file.size:
            raise self._bad(f"{self._file.size - at} bytes after the last storage", "none")

    def _check(self) -> None:
        for ref in self._refs.tensors:
            item = ITEMSIZE.get(ref.dtype)
            if item is None:
                continue
            last = sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True)) if ref.size else -1
            if (ref.offset + last + 1) * item > ref.storage.nbytes and ref.size:
                raise self._bad(
                    f"a tensor of shape {ref.shape}, strides {ref.strides}, offset {ref.offset} in {ref.storage.nbytes} bytes",
                    "one inside its storage",
                )

    @property
    def constants(self) -> int:
        """How many tensors a TorchScript has as constants of its code."""
        return sum(name.startswith(f"{self._root}constants/") for name in self.zip.members)

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
        return Elements(stored, dtype, ref.conj, ref.neg)

    def identity(self, ref: TensorRef) -> Hashable:
        """Equal for references to the very same elements: tied weights. None for tensors without elements."""
        if ref.size == 0:
            return None
        first = ref.storage.first + ref.offset * ITEMSIZE.get(ref.dtype, 1)
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
            for chunk in pieces(self._file, at, start):
                out.write(chunk)
            for chunk in storages[key]:
                out.write(chunk)
            at = start + length
        for chunk in pieces(self._file, at, self._file.size):
            out.write(chunk)
