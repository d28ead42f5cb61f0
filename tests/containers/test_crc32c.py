"""CRC-32C against the bit-by-bit definition and the vectors of RFC 3720."""

from __future__ import annotations

import numpy as np
import pytest

from neutral.containers.crc32c import Crc32c, crc32c, masked


def bit_by_bit(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


# Around the sizes at which bytes are folded (5685, less the four that start the register), then words, then scratch.
@pytest.mark.parametrize("size", [1, 7, 5680, 5681, 5682, 5690, 10010, 45475, 45476, 45484, 90001])
def test_every_stage_agrees_with_the_definition(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == bit_by_bit(data)


def test_long_input_is_the_same_in_one_piece_and_in_many() -> None:
    rng = np.random.default_rng(5)
    data = rng.bytes((1 << 19) * 3 + 12345)
    whole = crc32c(data)
    running = Crc32c()
    at = 0
    while at < len(data):
        step = int(rng.integers(1, 200_000))
        running.update(data[at : at + step])
        at += step
    assert running.value() == whole
    assert running.value() == whole, "asking for the value changes nothing"


def test_a_crc_of_zeros_depends_on_their_number() -> None:
    assert len({crc32c(bytes(n)) for n in range(300)}) == 300


def test_every_flipped_bit_is_seen_in_a_long_input() -> None:
    data = bytearray(np.random.default_rng(1).bytes(1 << 20))
    good = crc32c(data)
    for at in (0, 3, 4, 5685, 1 << 19, (1 << 20) - 1):
        for bit in (1, 128):
            data[at] ^= bit
            assert crc32c(data) != good, (at, bit)
            data[at] ^= bit


def test_mask_is_leveldbs() -> None:
    # The masked CRC of no bytes, as TensorFlow writes it for an empty tensor.
    assert masked(0) == 0xA282EAD8
    assert masked(0x8000) == 0xA282EAD9
    assert masked(0xFFFFFFFF) == (0xFFFFFFFF + 0xA282EAD8) & 0xFFFFFFFF
