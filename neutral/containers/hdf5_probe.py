"""The structure of an HDF5 file, read by libhdf5 in a child process that cannot harm the caller.

Damaged HDF5 files make libhdf5 hang and crash, and hostile ones make it open other files. So the walk runs in a
forked child without the right to open any file, within limits of time and memory; what it finds comes back as JSON
and is checked by the parent (`neutral.containers.hdf5`), which reads the elements itself and never calls libhdf5.
Where the system has no `fork` the walk runs in the process itself.
"""

from __future__ import annotations

import codecs
import contextlib
import faulthandler
import io
import json
import os
import select
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5t, h5z

from neutral.errors import BadFile, NeutralError, Problem
from neutral.native import Storage

SECONDS = 6
"""Time that the walk may take."""

MEMORY = 384 << 20
"""Bytes of address space that the walk may take beyond those the process has."""

DEEPEST = 64
"""Levels of groups."""

MOST_LINKS = 100_000
"""Members of all groups together."""

MOST_ATTRIBUTE_BYTES = 32 << 20

_REPLY_LIMIT = 96 << 20


class StorageFile(io.RawIOBase):
    """A `Storage` as a read-only Python file."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._storage.nbytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._storage.nbytes - self._position))
        self._storage.read_into(self._position, view[:count])
        self._position += count
        return count


def probe(storage: Storage, where: str) -> dict[str, Any]:
    """`{"groups": {path: attributes}, "datasets": [description]}` of the HDF5 file in `storage`."""
    if not hasattr(os, "fork"):
        return _walk(storage, where)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of fork in a process with threads; h5py holds its own lock over the fork, and the child
        # touches nothing but h5py.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        _serve(storage, where, reading, writing)
    os.close(writing)
    try:
        reply = _receive(reading, where)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        answer = json.loads(reply)
    except ValueError:
        raise _broken(where, "an HDF5 structure on which libhdf5 fails") from None
    if "problem" in answer:
        raise BadFile(Problem(*answer["problem"]))
    return dict(answer)


def _receive(reading: int, where: str) -> bytes:
    deadline = time.monotonic() + SECONDS + 1
    pieces: list[bytes] = []
    total = 0
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise _broken(where, f"an HDF5 structure that takes more than {SECONDS} s to walk")
        piece = os.read(reading, 1 << 20)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        total += len(piece)
        if total > _REPLY_LIMIT:
            raise _broken(where, "an HDF5 structure of more than 96 MB")


def _serve(storage: Storage, where: str, reading: int, writing: int) -> None:
    """The child: walk, answer, leave. Nothing of the parent's Python frames is unwound."""
    try:
        os.close(reading)
        faulthandler.disable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _confine()
        try:
            answer = _walk(storage, where)
        except NeutralError as error:
            problem = error.problems[0]
            answer = {"problem": [problem.where, problem.found, problem.expected, problem.do]}
        data = memoryview(json.dumps(answer).encode())
        while data:
            data = data[os.write(writing, data) :]
    finally:
        os._exit(0)


def _confine() -> None:
    """Memory is limited, a crash leaves no core file, and no further file can be opened."""
    import resource

    for codec in ("ascii", "utf-8", "latin-1"):  # h5py looks them up late, and Python reads them from files
        codecs.lookup(codec)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def _walk(storage: Storage, where: str) -> dict[str, Any]:
    try:
        with h5py.File(StorageFile(storage), "r") as file:
            return _Walk(where, storage.nbytes).run(file)
    except NeutralError:
        raise
    except MemoryError:
        raise _broken(where, "an HDF5 structure that takes too much memory") from None
    except RecursionError:
        raise _broken(where, "an HDF5 structure that is nested too deep") from None
    except Exception as error:
        raise _broken(where, f"an HDF5 file that libhdf5 refuses ({error})") from None


class _Walk:
    def __init__(self, where: str, size: int) -> None:
        self.where = where
        self.size = size
        self.links = 0
        self.attribute_bytes = 0

    def run(self, file: h5py.File) -> dict[str, Any]:
        if file.id.get_create_plist().get_userblock():
            raise _broken(self.where, "an HDF5 user block", "a file as Keras writes it")
        root = h5g.open(file.id, b"/")
        groups: dict[str, Any] = {"": self.attributes("", root)}
        datasets: list[dict[str, Any]] = []
        seen = {h5o.get_info(root).addr}
        waiting: list[tuple[str, int, h5g.GroupID]] = [("", 0, root)]
        while waiting:
            path, depth, group = waiting.pop()
            for name in self.members(path, group):
                inner = f"{path}/{_text(self.where, name)}".lstrip("/")
                item = h5o.open(group, name)
                address = h5o.get_info(item).addr
                if isinstance(item, h5g.GroupID):
                    if address in seen:
                        raise _broken(self.at(inner), "a group linked twice", "a tree of groups")
                    if depth >= DEEPEST:
                        raise _broken(self.at(inner), f"groups nested deeper than {DEEPEST} levels")
                    seen.add(address)
                    groups[inner] = self.attributes(inner, item)
                    waiting.append((inner, depth + 1, item))
                elif isinstance(item, h5d.DatasetID):
                    datasets.append({**self.dataset(inner, item), "address": address})
                else:
                    raise _broken(self.at(inner), "a named type", "groups and datasets")
        return {"groups": groups, "datasets": datasets}

    def at(self, path: str) -> str:
        return f"{self.where}: {path or '/'}"

    def members(self, path: str, group: h5g.GroupID) -> list[bytes]:
        names = []
        for name in group:
            self.links += 1
            if self.links > MOST_LINKS:
                raise _broken(self.where, f"more than {MOST_LINKS} groups and datasets")
            kind = group.links.get_info(name).type
            if kind != h5l.TYPE_HARD:
                what = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}.get(kind, "a link")
                raise _broken(
                    f"{self.at(path)}/{_text(self.where, name)}", what, "groups and datasets of this file alone"
                )
            names.append(name)
        return names

    def attributes(self, path: str, item: h5g.GroupID | h5d.DatasetID) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(h5a.get_num_attrs(item)):
            attribute = h5a.open(item, index=index)
            kind = attribute.get_type()
            count = attribute.get_space().get_simple_extent_npoints()
            size = count * kind.get_size()
            if size > self.size:
                raise _broken(
                    self.at(path), f"an attribute of {size} bytes", f"one inside the file's {self.size} bytes"
                )
            if kind.get_class() not in (h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM):
                continue
            name = _text(self.where, attribute.name)
            found[name] = value = _plain(self.where, h5py.AttributeManager(_Holder(item))[name])
            self.attribute_bytes += len(str(value))
            if self.attribute_bytes > MOST_ATTRIBUTE_BYTES:
                raise _broken(self.where, f"attributes of more than {MOST_ATTRIBUTE_BYTES >> 20} MB")
        return found

    def dataset(self, path: str, item: h5d.DatasetID) -> dict[str, Any]:
        where = self.at(path)
        created = item.get_create_plist()
        layout = created.get_layout()
        # Before anything else is asked of it: the shape of a virtual dataset is read from the files that it names.
        if layout == h5d.VIRTUAL:
            raise _broken(where, "a virtual dataset (its elements lie in other files)", "elements in this file")
        if created.get_external_count():
            raise _broken(where, "elements stored in another file", "elements in this file")
        shape = [int(n) for n in item.shape]
        dtype = _dtype(where, item)
        described: dict[str, Any] = {
            "path": path,
            "shape": shape,
            "dtype": dtype,
            "attributes": self.attributes(path, item),
        }
        if layout == h5d.CONTIGUOUS:
            described["offset"] = item.get_offset()
        elif layout == h5d.COMPACT:
            # Compact elements lie in the object header (64 KB at the most), whose place libhdf5 does not tell.
            if item.get_storage_size() > 65536:
                raise _broken(where, "a compact dataset of more than 64 KB")
            described["bytes"] = _elements(item, shape, dtype)
        else:
            described["chunk"] = [int(n) for n in created.get_chunk()]
            described["filters"] = [_filter(where, created, i) for i in range(created.get_nfilters())]
            described["chunks"] = chunks = []
            item.chunk_iter(
                lambda c: chunks.append(
                    [*map(int, c.chunk_offset), int(c.byte_offset), int(c.size), int(c.filter_mask)]
                )
            )
        return described


class _Holder:
    """What `h5py.AttributeManager` asks of the object whose attributes it reads."""

    def __init__(self, item: h5g.GroupID | h5d.DatasetID) -> None:
        self.id = item


def _elements(item: h5d.DatasetID, shape: list[int], dtype: str) -> str:
    array = np.empty(shape, np.dtype(dtype))
    if array.size:
        item.read(h5py.h5s.ALL, h5py.h5s.ALL, array, item.get_type())
    return array.tobytes().hex()


def _dtype(where: str, item: h5d.DatasetID) -> str:
    """The numpy type string whose elements lie in the file exactly as numpy would have them."""
    kind = item.get_type()
    if kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.ENUM, h5t.OPAQUE):
        dtype = kind.dtype
        same = kind.get_class() == h5t.OPAQUE or (
            kind.get_class() == h5t.ENUM and dtype == np.bool_ and kind.get_size() == 1
        )
        if dtype.kind in "iufbV" and (same or kind.equal(h5t.py_create(dtype))):
            return str(dtype.str)
    raise _broken(where, f"elements of HDF5 class {_CLASSES.get(kind.get_class(), kind.get_class())}", "plain numbers")


_CLASSES = {
    h5t.INTEGER: "integer of an unusual form",
    h5t.FLOAT: "float of an unusual form",
    h5t.ENUM: "enumeration",
    h5t.STRING: "string",
    h5t.VLEN: "variable length",
    h5t.REFERENCE: "reference",
    h5t.COMPOUND: "compound",
    h5t.ARRAY: "array",
    h5t.BITFIELD: "bit field",
    h5t.TIME: "time",
}

_FILTERS = {h5z.FILTER_DEFLATE: "deflate", h5z.FILTER_SHUFFLE: "shuffle", h5z.FILTER_FLETCHER32: "fletcher32"}


def _filter(where: str, created: h5py.h5p.PropDCID, index: int) -> str:
    code = created.get_filter(index)[0]
    if code not in _FILTERS:
        raise _broken(
            where, f"HDF5 filter {code}", "deflate, shuffle or fletcher32", "rewrite the file without compression"
        )
    return _FILTERS[code]


def _plain(where: str, value: Any) -> Any:
    """An attribute as JSON has it: text, numbers, lists of them."""
    if isinstance(value, (bytes, np.bytes_)):
        return _text(where, bytes(value))
    if isinstance(value, np.ndarray):
        return [_plain(where, part) for part in value.reshape(-1)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (str, int, float, bool)):
        return value
    return None


def _text(where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _broken(where, f"a name that is not UTF-8: {raw!r}") from None


def _broken(where: str, found: str, expected: str = "an HDF5 file as Keras writes it", do: str = "") -> BadFile:
    return BadFile(Problem(where, found, expected, do or "the file is damaged or forged; nothing was read from it"))
