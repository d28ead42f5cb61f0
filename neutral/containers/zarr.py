"""Arrays in the zarr formats 2 and 3, as TensorStore writes them: a grid of chunks, each a value in a store of keys.

    array = read_array(store, "params.fc.kernel", Source(cursors, fills=False))
    array.tensor.read()

The store is a folder of files, or an OCDBT. Format 2 has one compressor a chunk; format 3 a list of codecs, of which
`bytes`, a compressor and `sharding_indexed` (chunks inside a chunk, an index behind them) are known. An array of one
chunk without a compressor is a view of its file. A chunk that is not there is damage, or, where the writer left out
what equals the fill value, that value.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np

from neutral.containers.codecs import CODECS, Cursors, Decompressed
from neutral.containers.crc32c import crc32c
from neutral.containers.tree import DTYPES
from neutral.errors import BadFile, Problem, Unsupported
from neutral.native import Array, Range, Storage, Stored, Tensor

LARGEST_METADATA = 1 << 16
LARGEST_RANK = 32
MOST_CHUNKS = 1 << 20
_LARGEST_FILL = 16
"""How many times the bytes of a store its missing chunks may make of it."""
_FREE_FILL = 64 << 20
_NOWHERE = (1 << 64) - 1

PLAIN = re.compile(r"[<>|](?:b1|[iu][1248]|f[248]|c8|c16)")

Index = tuple[int, ...]


class Store(Protocol):
    """Values by key."""

    def get(self, key: str) -> Storage | None: ...


class Source:
    """What the arrays of one store share: where decompression stopped, and bounds on all of them together."""

    def __init__(self, where: str, cursors: Cursors, *, fills: bool) -> None:
        self.where = where
        self.cursors = cursors
        self.fills = fills
        self.chunks = 0
        self.stored = 0
        self.filled = 0

    def check(self, name: str) -> None:
        """Refuse arrays that are mostly missing, whose size nothing in the store bounds."""
        if self.filled > _FREE_FILL + _LARGEST_FILL * self.stored:
            _refuse(
                self, name, f"{self.filled} bytes of missing chunks", f"at most {_LARGEST_FILL} times what is there"
            )


@dataclass(frozen=True)
class Layout:
    """How the chunks of an array are stored. `fortran`: the first axis varies fastest; `codec` compresses each chunk."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: tuple[int, ...]
    fortran: bool
    codec: str | None
    level: int
    fill: Any
    key: Callable[[Index], str]
    shards: _Shards | None = None
    version: int = 2

    @property
    def grid(self) -> tuple[int, ...]:
        """How many chunks there are along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of a chunk's elements."""
        axes = range(len(self.chunk))
        return tuple(math.prod(self.chunk[:axis] if self.fortran else self.chunk[axis + 1 :]) for axis in axes)

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize


@dataclass(frozen=True)
class _Shards:
    """Chunks inside a larger one: how many along each axis, and whether their index comes first."""

    inside: tuple[int, ...]
    index_first: bool
    index_checked: bool


@dataclass(frozen=True)
class ZarrArray:
    """An array's layout, its metadata as they are stored, and its elements unread."""

    name: str
    layout: Layout
    tensor: Tensor


def read_array(store: Store, name: str, source: Source) -> ZarrArray | None:
    """The array of a name; None if there is none. Every chunk's place is found and checked, none is read."""
    for version, file in ((2, f"{name}/.zarray"), (3, f"{name}/zarr.json")):
        raw = store.get(file)
        if raw is not None:
            fields = _json(raw, source, file)
            layout = _layout_2(fields, source, name) if version == 2 else _layout_3(fields, source, name)
            return ZarrArray(name, layout, _tensor(store, name, layout, source))
    return None


def _json(raw: Storage, source: Source, name: str) -> Mapping[str, Any]:
    if raw.nbytes > LARGEST_METADATA:
        _refuse(source, name, f"{raw.nbytes} bytes", f"at most {LARGEST_METADATA}")
    data = bytearray(raw.nbytes)
    raw.read_into(0, memoryview(data))
    try:
        fields = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        _refuse(source, name, f"text that is no JSON ({error})", "the metadata of an array")
    if not isinstance(fields, dict):
        _refuse(source, name, "JSON of something else", "the metadata of an array")
    return fields


def _layout_2(fields: Mapping[str, Any], source: Source, name: str) -> Layout:
    shape, chunk = _sizes(fields.get("shape"), source, name), _sizes(fields.get("chunks"), source, name)
    separator, order = fields.get("dimension_separator", "."), fields.get("order")
    if fields.get("zarr_format") != 2 or separator not in (".", "/") or order not in ("C", "F"):
        _refuse(source, name, "metadata of another form", "zarr_format 2, an order C or F, a separator . or /")
    if fields.get("filters"):
        raise _unknown(source, name, "filters")
    _check_sizes(shape, chunk, source, name)
    dtype = _dtype_2(fields.get("dtype"), source, name)
    codec, level = _compressor(fields.get("compressor"), source, name)
    return Layout(
        shape,
        dtype,
        chunk,
        order == "F",
        codec,
        level,
        _fill(fields.get("fill_value"), dtype, source, name),
        lambda index: separator.join(map(str, index)) or "0",
    )


def _dtype_2(name: object, source: Source, array: str) -> np.dtype[Any]:
    if isinstance(name, str):
        if PLAIN.fullmatch(name):
            return np.dtype(name)
        if name in DTYPES:
            return DTYPES[name]
    raise _unknown(source, array, f"elements of dtype {name!r}"[:80])


def _compressor(found: object, source: Source, name: str) -> tuple[str | None, int]:
    if found is None:
        return None, 0
    kind = found.get("id") if isinstance(found, dict) else None
    level = found.get("level", 1) if isinstance(found, dict) else None
    if kind not in CODECS or type(level) is not int or not -(1 << 17) <= level <= 22:
        raise _unknown(source, name, f"the compressor {kind!r}"[:80])
    return kind, level


def _layout_3(fields: Mapping[str, Any], source: Source, name: str) -> Layout:
    shape = _sizes(fields.get("shape"), source, name)
    if fields.get("zarr_format") != 3 or fields.get("node_type") != "array" or fields.get("storage_transformers"):
        _refuse(source, name, "metadata of another form", "an array of zarr_format 3")
    grid, keys = _named(fields.get("chunk_grid"), source, name), _named(fields.get("chunk_key_encoding"), source, name)
    if grid[0] != "regular" or keys[0] not in ("default", "v2"):
        raise _unknown(source, name, f"a grid {grid[0]!r} with keys {keys[0]!r}")
    outer = chunk = _sizes(grid[1].get("chunk_shape"), source, name)
    dtype_name = fields.get("data_type")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise _unknown(source, name, f"elements of type {dtype_name!r}"[:80])
    codecs = _codecs(fields.get("codecs"), source, name)
    shards: _Shards | None = None
    if codecs and codecs[0][0] == "sharding_indexed":
        if len(codecs) > 1:
            raise _unknown(source, name, "codecs behind sharding_indexed")
        chunk, codecs, shards = _sharding(codecs[0][1], outer, source, name)
    if not codecs or codecs[0][0] != "bytes" or len(codecs) > 2 or (codecs[1:] and codecs[1][0] not in CODECS):
        raise _unknown(source, name, f"the codecs {', '.join(codec[0] for codec in codecs)}"[:200])
    endian = codecs[0][1].get("endian", "little")
    if endian not in ("little", "big"):
        _refuse(source, name, "an unknown byte order", "little or big")
    _check_sizes(shape, outer, source, name)
    _check_sizes(shape, chunk, source, name)
    dtype = DTYPES[dtype_name].newbyteorder(">" if endian == "big" else "<")
    level = codecs[1][1].get("level", 1) if codecs[1:] else 0
    separator = keys[1].get("separator", "/" if keys[0] == "default" else ".")
    if separator not in (".", "/") or type(level) is not int:
        _refuse(source, name, "a separator or level of another form", ". or /, a whole number")
    return Layout(
        shape,
        dtype,
        chunk,
        False,
        codecs[1][0] if codecs[1:] else None,
        level,
        _fill(fields.get("fill_value"), dtype, source, name),
        _key_3(keys[0] == "default", separator),
        shards,
        3,
    )


def _key_3(default: bool, separator: str) -> Callable[[Index], str]:
    return lambda index: separator.join(["c"] * default + [str(i) for i in index]) or "0"


def _sharding(
    fields: Mapping[str, Any], outer: tuple[int, ...], source: Source, name: str
) -> tuple[tuple[int, ...], list[tuple[str, Mapping[str, Any]]], _Shards]:
    chunk = _sizes(fields.get("chunk_shape"), source, name)
    index = [codec[0] for codec in _codecs(fields.get("index_codecs"), source, name)]
    place = fields.get("index_location", "end")
    if index not in (["bytes"], ["bytes", "crc32c"]) or place not in ("start", "end"):
        raise _unknown(source, name, f"an index of shards in {', '.join(index)}"[:200])
    if len(chunk) != len(outer) or any(not c or o % c for o, c in zip(outer, chunk, strict=True)):
        _refuse(source, name, f"chunks {list(chunk)} in shards {list(outer)}", "a whole number of chunks in each")
    inside = tuple(o // c for o, c in zip(outer, chunk, strict=True))
    codecs = _codecs(fields.get("codecs"), source, name)
    return chunk, codecs, _Shards(inside, place == "start", "crc32c" in index)


def _codecs(found: object, source: Source, name: str) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(found, list) or len(found) > 8:
        _refuse(source, name, "codecs of another form", "a list of codecs")
    return [_named(codec, source, name) for codec in found]


def _named(found: object, source: Source, name: str) -> tuple[str, Mapping[str, Any]]:
    """A part of format 3's metadata: its name, and its configuration, if it has one."""
    settings = found.get("configuration", {}) if isinstance(found, dict) else None
    kind = found.get("name") if isinstance(found, dict) else None
    if not isinstance(kind, str) or not isinstance(settings, dict):
        _refuse(source, name, "metadata of another form", "a name and a configuration")
    return kind[:60], settings


def _sizes(found: object, source: Source, name: str) -> tuple[int, ...]:
    if not isinstance(found, list) or len(found) > LARGEST_RANK or any(type(n) is not int or n < 0 for n in found):
        _refuse(source, name, f"the sizes {found!r}"[:80], f"a list of at most {LARGEST_RANK} whole numbers")
    return tuple(found)


def _check_sizes(shape: tuple[int, ...], chunk: tuple[int, ...], source: Source, name: str) -> None:
    if len(shape) != len(chunk) or 0 in chunk:
        _refuse(source, name, f"chunks {list(chunk)} of shape {list(shape)}", "a size of at least 1 for every axis")
    if max(math.prod(n or 1 for n in shape), math.prod(chunk)) >= 1 << 58:
        _refuse(source, name, f"an array of shape {list(shape)}", "one that fits in memory")


def _fill(found: object, dtype: np.dtype[Any], source: Source, name: str) -> Any:
    """A fill value; None where it is null, for then TensorStore writes every chunk."""
    if found is None:
        return None
    native = dtype.newbyteorder("=")
    named = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    try:
        if isinstance(found, str) and found.startswith("0x") and native.itemsize <= 8:
            bits = int(found[:20], 16).to_bytes(native.itemsize, "little")
            return np.frombuffer(bits, native.newbyteorder("<"))[0].astype(native)
        parts: list[Any] = found if isinstance(found, list) and len(found) == 2 and native.kind == "c" else [found]
        values = [named[part] if isinstance(part, str) else part for part in parts]
        if all(isinstance(value, bool | int | float) for value in values):
            value = complex(float(values[0]), float(values[1])) if len(values) == 2 else values[0]
            return np.array(value).astype(native)[()]
    except (KeyError, ValueError, OverflowError):
        pass
    raise _bad(source, name, f"the fill value {found!r}"[:80], f"one of dtype {native}")


def _tensor(store: Store, name: str, layout: Layout, source: Source) -> Tensor:
    count = math.prod(layout.grid)
    source.chunks += count
    if source.chunks > MOST_CHUNKS:
        _refuse(source, name, f"over {MOST_CHUNKS} chunks", "fewer")
    find = _in_shards(store, name, layout, source) if layout.shards else _alone(store, name, layout)
    for index in np.ndindex(*layout.grid):
        found = find(index)
        size = layout.chunk_bytes
        if found is not None:
            source.stored += found.nbytes
            _open(found, layout, name, index, source)
        elif layout.fill is None or not source.fills:
            key = f"{name}/{layout.key(index)}"
            _refuse(
                source, key, "no such chunk", "every chunk of the array", "the checkpoint is cut short; get it again"
            )
        else:
            source.filled += size
    if count == 1 and (only := find((0,) * len(layout.shape))) is not None:
        opened = _open(only, layout, name, (0,) * len(layout.shape), source)
        return Stored(opened, layout.shape, layout.dtype, 0, layout.strides)
    return _Chunked(layout, lambda index: _chunk(find(index), layout, name, index, source))


def _alone(store: Store, name: str, layout: Layout) -> Callable[[Index], Storage | None]:
    return lambda index: store.get(f"{name}/{layout.key(index)}")


def _in_shards(store: Store, name: str, layout: Layout, source: Source) -> Callable[[Index], Storage | None]:
    """Finds chunks inside shards, whose indexes are read once."""
    shards = layout.shards
    assert shards is not None
    indexes: dict[Index, tuple[Storage, Array] | None] = {}

    def find(index: Index) -> Storage | None:
        outer = tuple(i // n for i, n in zip(index, shards.inside, strict=True))
        if outer not in indexes:
            key = f"{name}/{layout.key(outer)}"
            whole = store.get(key)
            indexes[outer] = None if whole is None else (whole, _shard_index(whole, shards, key, source))
        entry = indexes[outer]
        if entry is None:
            return None
        offset, length = map(int, entry[1][tuple(i % n for i, n in zip(index, shards.inside, strict=True))])
        return None if offset == length == _NOWHERE else _Part(entry[0], offset, length)

    return find


def _shard_index(whole: Storage, shards: _Shards, key: str, source: Source) -> Array:
    size = 16 * math.prod(shards.inside)
    total = size + 4 * shards.index_checked
    if total > whole.nbytes:
        _refuse(source, key, f"a shard of {whole.nbytes} bytes", f"an index of {total}")
    raw = bytearray(total)
    whole.read_into(0 if shards.index_first else whole.nbytes - total, memoryview(raw))
    if shards.index_checked and crc32c(raw[:size]) != int.from_bytes(raw[size:], "little"):
        _refuse(source, key, "an index with another checksum", "the stored one", "the file is damaged; get it again")
    entries = np.frombuffer(raw[:size], "<u8").reshape(*shards.inside, 2)
    flat = entries.reshape(-1, 2).astype(object)
    if any(o + n > whole.nbytes for o, n in flat if not o == n == _NOWHERE):
        _refuse(source, key, "a chunk that runs past the end", f"one inside {whole.nbytes} bytes")
    return entries


@dataclass(frozen=True)
class _Part:
    """A part of a storage."""

    whole: Storage
    offset: int
    nbytes: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= offset + len(buffer) <= self.nbytes
        self.whole.read_into(self.offset + offset, buffer)


def _open(found: Storage, layout: Layout, name: str, index: Index, source: Source) -> Storage:
    """A chunk's elements as bytes."""
    where = f"{source.where}: {name} at {list(index)}"
    if layout.codec is not None:
        return Decompressed(found, layout.codec, layout.chunk_bytes, where, source.cursors)
    if found.nbytes != layout.chunk_bytes:
        raise BadFile(
            Problem(where, f"a chunk of {found.nbytes} bytes", f"{layout.chunk_bytes}", "the file is damaged or forged")
        )
    return found


def _chunk(found: Storage | None, layout: Layout, name: str, index: Index, source: Source) -> Tensor | None:
    if found is None:
        return None
    return Stored(_open(found, layout, name, index, source), layout.chunk, layout.dtype, 0, layout.strides)


class _Chunked(Tensor):
    """An array of several chunks, or of missing ones, which are full of the fill value."""

    def __init__(self, layout: Layout, chunk: Callable[[Index], Tensor | None]) -> None:
        self.shape = layout.shape
        self.dtype = layout.dtype.newbyteorder("=")
        self._layout, self._chunk = layout, chunk

    def block(self, ranges: Sequence[Range]) -> Array:
        out = np.empty([b - a for a, b in ranges], self.dtype)
        if out.size == 0:
            return out
        for index, common in overlaps(ranges, self._layout.chunk):
            chunk = self._chunk(index)
            target = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, ranges, strict=True))
            if chunk is None:
                out[target] = self._layout.fill
            else:
                begins = [i * c for i, c in zip(index, self._layout.chunk, strict=True)]
                out[target] = chunk.block([(a - low, b - low) for (a, b), low in zip(common, begins, strict=True)])
        return out


def overlaps(ranges: Sequence[Range], chunk: tuple[int, ...]) -> Iterator[tuple[Index, list[Range]]]:
    """The chunks that a rectangle meets, in C order, and what of it lies in each."""
    spans = [range(a // c, -(-b // c)) for (a, b), c in zip(ranges, chunk, strict=True)]
    for index in itertools.product(*spans):
        yield (
            index,
            [(max(a, i * c), min(b, (i + 1) * c)) for i, (a, b), c in zip(index, ranges, chunk, strict=True)],
        )


def _refuse(source: Source, name: str, found: str, expected: str, do: str = "") -> NoReturn:
    raise _bad(source, name, found, expected, do)


def _bad(source: Source, name: str, found: str, expected: str, do: str = "") -> BadFile:
    return BadFile(Problem(f"{source.where}: {name}", found, expected, do or "the file is damaged or forged"))


def _unknown(source: Source, name: str, found: str) -> Unsupported:
    return Unsupported(
        Problem(f"{source.where}: {name}", found, "numbers, compressed by zstd, gzip, zlib or nothing", "save it so")
    )
