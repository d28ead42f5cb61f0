"""Compressed bytes read from any position, and what does not decompress to what it should."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from typing import Any

import numpy as np
import pytest
import zstandard

from neutral.containers import codecs
from neutral.containers.codecs import Cursors, Decompressed, compressed, decompress
from neutral.containers.files import Memory
from neutral.errors import BadFile, NeutralError, Unsupported

RANDOM = np.random.default_rng(0)
DATA = bytes(RANDOM.integers(0, 4, 300_000, np.uint8))


def _compressed(codec: str, data: bytes = DATA) -> bytes:
    return b"".join(compressed(codec, 3, [memoryview(data)[:70_000], memoryview(data)[70_000:]], len(data)))


def _read(storage: Decompressed, offset: int, length: int) -> bytes:
    out = bytearray(length)
    storage.read_into(offset, memoryview(out))
    return bytes(out)


def test_the_usual_libraries_understand_it() -> None:
    assert gzip.decompress(_compressed("gzip")) == DATA
    assert zlib.decompress(_compressed("zlib")) == DATA
    assert zstandard.decompress(_compressed("zstd")) == DATA
    assert b"".join(compressed(None, 0, [memoryview(DATA)], len(DATA))) == DATA


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_any_part_is_read(codec: str) -> None:
    cursors = Cursors()
    storages = [Decompressed(Memory(_compressed(codec)), codec, len(DATA), f"x{i}", cursors) for i in range(40)]
    for i in range(200):
        start, stop = sorted(int(n) for n in RANDOM.integers(0, len(DATA) + 1, 2))
        assert _read(storages[i % 40], start, stop - start) == DATA[start:stop]
    for start in range(0, len(DATA), 50_000):
        assert _read(storages[0], start, 50_000) == DATA[start : start + 50_000]
    assert decompress(_compressed(codec), codec, len(DATA), "x") == DATA


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_another_size_is_refused(codec: str) -> None:
    for size in (len(DATA) - 1, len(DATA) + 1):
        with pytest.raises(BadFile):
            _read(Decompressed(Memory(_compressed(codec)), codec, size, "x", Cursors()), 0, size)
    with pytest.raises(BadFile, match="over 299999 bytes"):
        decompress(_compressed(codec), codec, len(DATA) - 1, "x")
    with pytest.raises(BadFile, match="expected more"):
        Decompressed(Memory(_compressed(codec, b"")), codec, 1 << 40, "x", Cursors())


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_broken_data_are_refused(codec: str) -> None:
    good = _compressed(codec)
    for bad in (b"", good[:-5], good[: len(good) // 2], good + b"more", b"x" + good, bytes(100)):
        with pytest.raises(BadFile) as caught:
            _read(Decompressed(Memory(bad + bytes(20) * (not bad)), codec, len(DATA), "x", Cursors()), 0, len(DATA))
        assert "\n" not in str(caught.value)
    for _ in range(100):
        raw = bytearray(good)
        raw[RANDOM.integers(len(raw))] ^= 1 << RANDOM.integers(8)
        with contextlib.suppress(NeutralError):
            _read(Decompressed(Memory(bytes(raw)), codec, len(DATA), "x", Cursors()), 0, len(DATA))


def test_zstd_that_looks_back_too_far_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = writer.compress(bytes(1 << 20)) + writer.flush()
    with pytest.raises(BadFile, match="zstd"):
        _read(Decompressed(Memory(data), "zstd", 1 << 20, "x", Cursors()), 0, 1 << 20)


def test_without_zstd_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(codecs.importlib, "import_module", without)
    with pytest.raises(Unsupported, match="pip install zstandard"):
        decompress(b"", "zstd", 1, "x")
