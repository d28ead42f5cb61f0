"""SSTables as LevelDB has them: sorted keys, prefix compression, blocks with a CRC. The index of a tensor bundle is one.

>>> import pathlib, tempfile
>>> path = pathlib.Path(tempfile.mkdtemp()) / "table"
>>> with open(path, "wb") as out:
...     write_table(out, [(b"a", b"first"), (b"ab", b"second")])
>>> with SourceFile(path) as file:
...     _, _, entries = read_table(file)
...     [(key, value) for key, (_, value) in entries.items()]
[(b'a', b'first'), (b'ab', b'second')]

The layout is that of tensorflow/core/lib/io/table.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from neutral.containers import protobuf
from neutral.containers.crc32c import check_masked, crc32c, masked
from neutral.containers.files import SourceFile
from neutral.errors import BadFile, Problem, Unsupported

_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER = 48
_TRAILER = 5
_UNCOMPRESSED = 0
_BLOCK = 256 << 10
_RESTART_INTERVAL = 16

# Bounds on what an index may ask of memory; the largest published checkpoints stay well below them.
_LARGEST_INDEX = 64 << 20
_MOST_ENTRIES = 100_000
_LONGEST_KEY = 1 << 16
_MOST_KEY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block lies in the table, without its type byte and CRC."""

    offset: int
    size: int


def read_table(index: SourceFile) -> tuple[bytes, list[Block], dict[bytes, tuple[int, bytes]]]:
    """The whole index file, its data blocks, and its entries: key -> (place of the value in the file, value)."""
    where = str(index.path)
    if index.size > _LARGEST_INDEX:
        raise BadFile(Problem(where, f"an index of {index.size} bytes", f"at most {_LARGEST_INDEX}"))
    if index.size < _FOOTER:
        raise BadFile(Problem(where, f"{index.size} bytes", "a tensor bundle's index", "is it another kind of file?"))
    data = index.read(0, index.size)
    footer = memoryview(data)[-_FOOTER:]
    if footer[-len(_MAGIC) :] != _MAGIC:
        raise BadFile(Problem(where, "no table footer", "a tensor bundle's index", "is it another kind of file?"))
    meta, at = _read_handle(footer, 0, where)
    top, at = _read_handle(footer, at, where)
    if any(footer[at : -len(_MAGIC)]):
        raise BadFile(Problem(where, "bytes after the block handles", "zeros", "the file is damaged"))
    _block_entries(data, meta, where)
    blocks: list[Block] = []
    entries: dict[bytes, tuple[int, bytes]] = {}
    last, key_bytes = None, 0
    for limit, (_, value) in _block_entries(data, top, where).items():
        block, _ = _read_handle(memoryview(value), 0, where)
        blocks.append(block)
        for key, found in _block_entries(data, block, where).items():
            if (last is not None and key <= last) or key > limit:
                raise BadFile(Problem(where, "keys out of order", "sorted keys, each once", "the file is damaged"))
            last = key
            key_bytes += len(key)
            entries[key] = found
            if len(entries) > _MOST_ENTRIES or key_bytes > _MOST_KEY_BYTES:
                raise BadFile(Problem(where, f"over {_MOST_ENTRIES} tensors or endless names", "fewer"))
    return data, blocks, entries


def _read_handle(view: memoryview, at: int, where: str) -> tuple[Block, int]:
    offset, at = protobuf.read_varint(view, at, where)
    size, at = protobuf.read_varint(view, at, where)
    return Block(offset, size), at


def _block_entries(data: bytes, block: Block, where: str) -> dict[bytes, tuple[int, bytes]]:
    """The entries of one block, in order: key -> (place of the value in the file, value)."""
    stop = block.offset + block.size
    if block.size < 4 or stop + _TRAILER > len(data) - _FOOTER:
        raise BadFile(Problem(where, f"a block of {block.size} bytes at byte {block.offset}", "one inside the file"))
    view = memoryview(data)
    check_masked(
        where, crc32c(view[block.offset : stop + 1]), int.from_bytes(data[stop + 1 : stop + _TRAILER], "little")
    )
    if data[stop] != _UNCOMPRESSED:
        found = f"a compressed block (type {data[stop]})"
        raise Unsupported(Problem(where, found, "uncompressed blocks, which TensorFlow writes", "save it again"))
    restarts = int.from_bytes(data[stop - 4 : stop], "little")
    end = stop - 4 - 4 * restarts
    if end < block.offset:
        raise BadFile(
            Problem(where, f"{restarts} restart points in {block.size} bytes", "fewer", "the file is damaged")
        )
    entries: dict[bytes, tuple[int, bytes]] = {}
    key, at, key_bytes = b"", block.offset, 0
    region = view[:end]
    while at < end:
        shared, at = protobuf.read_varint(region, at, where)
        fresh, at = protobuf.read_varint(region, at, where)
        length, at = protobuf.read_varint(region, at, where)
        if shared > len(key) or fresh + length > end - at or shared + fresh > _LONGEST_KEY:
            raise BadFile(Problem(where, "an entry that runs past its block", "one inside it", "the file is damaged"))
        key = key[:shared] + data[at : at + fresh]
        at += fresh
        key_bytes += len(key)
        if key in entries or len(entries) > _MOST_ENTRIES or key_bytes > _MOST_KEY_BYTES:
            raise BadFile(
                Problem(where, "a key that occurs twice, or endless keys", "each once", "the file is damaged")
            )
        entries[key] = (at, data[at : at + length])
        at += length
    return entries


def write_table(out: BinaryIO, entries: Sequence[tuple[bytes, bytes]]) -> None:
    """Sorted entries as an SSTable."""
    at = 0

    def put(block: bytes) -> bytes:
        nonlocal at
        typed = block + bytes([_UNCOMPRESSED])
        out.write(typed + masked(crc32c(typed)).to_bytes(4, "little"))
        handle = protobuf.varint(at) + protobuf.varint(len(block))
        at += len(block) + _TRAILER
        return handle

    top: list[tuple[bytes, bytes]] = []
    group: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in entries:
        group.append((key, value))
        size += len(key) + len(value)
        if size >= _BLOCK:
            top.append((key, put(_block_bytes(group))))
            group, size = [], 0
    if group:
        top.append((group[-1][0], put(_block_bytes(group))))
    handles = put(_block_bytes([])) + put(_block_bytes(top))
    out.write(handles.ljust(_FOOTER - len(_MAGIC), b"\0") + _MAGIC)


def _block_bytes(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    out, restarts, last = bytearray(), [0], b""
    for i, (key, value) in enumerate(entries):
        shared = _shared(last, key)
        if i % _RESTART_INTERVAL == 0:
            shared = 0
            if i:
                restarts.append(len(out))
        out += protobuf.varint(shared) + protobuf.varint(len(key) - shared) + protobuf.varint(len(value))
        out += key[shared:] + value
        last = key
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def _shared(a: bytes, b: bytes) -> int:
    """How many leading bytes two keys have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
