"""The records of a zip file, as PKWARE's APPNOTE.TXT has them; the section numbers below are its own."""

from __future__ import annotations

import struct
from dataclasses import dataclass

STORED, DEFLATED = 0, 8

LOCAL = struct.Struct("<IHHHHHIIIHH")  # 4.3.7 local file header
CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")  # 4.3.12 central directory header
END = struct.Struct("<IHHHHIIH")  # 4.3.16 end of central directory record
END64 = struct.Struct("<IQHHIIQQQQ")  # 4.3.14 zip64 end of central directory record
LOCATOR = struct.Struct("<IIQI")  # 4.3.15 zip64 end of central directory locator
LOCAL_SIGN, CENTRAL_SIGN, DESCRIPTOR_SIGN = 0x04034B50, 0x02014B50, 0x08074B50
END_SIGN, END64_SIGN, LOCATOR_SIGN = 0x06054B50, 0x06064B50, 0x07064B50
WITH_DESCRIPTOR = 0x0008
UTF8 = 0x0800
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF
ZIP64_FIELD = 0x0001
PADDING_FIELD = 0x4246  # "FB", the extra field that torch pads with; torch fills it with "Z"
VERSION, VERSION_ZIP64 = 20, 45

# 4.3.9 data descriptor: signature optional, sizes of 4 or 8 bytes. The longer forms come first, because a shorter one
# may be the beginning of a longer one.
DESCRIPTORS = (
    (struct.Struct("<IIQQ"), True),
    (struct.Struct("<IIII"), True),
    (struct.Struct("<IQQ"), False),
    (struct.Struct("<III"), False),
)


@dataclass(frozen=True, slots=True)
class Member:
    """One entry, as the central directory and its local header agree on it. Offsets count from the file's start."""

    name: str
    method: int
    flags: int
    size: int
    compressed_size: int
    crc: int
    header_offset: int
    data_offset: int
    end: int
    """Behind the data and the data descriptor."""
    descriptor: int
    """The data descriptor's length, 0 without one."""
    central_offset: int
    central_length: int


@dataclass(frozen=True)
class End:
    """Where the central directory lies, and what follows it."""

    directory_offset: int
    directory_length: int
    count: int
    zip64: bytes
    """The zip64 end record with whatever it carries, or nothing."""
    comment: bytes
