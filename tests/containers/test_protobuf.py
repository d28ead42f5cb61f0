"""The wire format: what is written is read, and what is malformed is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neutral.containers import protobuf
from neutral.containers.files import SourceFile
from neutral.errors import BadFile


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_integers_come_back(value: int) -> None:
    found = list(protobuf.fields(protobuf.number(7, value), "test"))
    assert [(field.number, field.integer("test")) for field in found] == ([(7, value)] if value else [])


@given(st.lists(st.tuples(st.integers(1, (1 << 29) - 1), st.binary(max_size=300)), max_size=5))
def test_messages_come_back_in_order(parts: list[tuple[int, bytes]]) -> None:
    data = b"".join(protobuf.message(number, content) for number, content in parts)
    found = list(protobuf.fields(data, "test"))
    assert [(field.number, bytes(field.message("test"))) for field in found] == parts
    assert [data[field.at : field.at + len(field.data)] for field in found] == [content for _, content in parts]


def test_mixed_fields() -> None:
    data = protobuf.text(1, "é") + protobuf.fixed32(6, 0) + b"\x11" + (5).to_bytes(8, "little") + protobuf.number(3, -1)
    first, second, third, fourth = protobuf.fields(data, "test")
    assert first.string("test") == "é"
    assert second.fixed32("test") == 0
    assert (third.number, third.wire, third.value) == (2, protobuf.FIXED64, 5)
    assert fourth.integer("test") == -1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80", "past the end"),
        (b"\x0a\x05ab", "past the end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "past the end"),
        (b"\x0d\x01\x02", "past the end"),
        (b"\x09\x01\x02", "past the end"),
        (b"\x08" + b"\xff" * 10, "64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "64 bits"),
        (b"\x0b", "wire type 3"),
        (b"\x0f", "wire type 7"),
        (b"\x00\x00", "field number 0"),
        (b"\x80\x80\x80\x80\x80\x01\x00", "field number"),
    ],
)
def test_malformed_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=message):
        list(protobuf.fields(data, "test"))
    path = tmp_path / "x.pb"
    path.write_bytes(data)
    with SourceFile(path) as file, pytest.raises(BadFile):
        list(protobuf.file_fields(file, 0, file.size, "test"))


def test_a_field_of_another_type_is_refused() -> None:
    (field,) = protobuf.fields(protobuf.number(1, 5), "test")
    for read in (field.message, field.string, field.fixed32):
        with pytest.raises(BadFile, match="wire type"):
            read("test")
    (text,) = protobuf.fields(protobuf.message(1, b"\xff"), "test")
    with pytest.raises(BadFile, match="UTF-8"):
        text.string("test")


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        found = list(protobuf.fields(data, "test"))
    except BadFile:
        return
    assert sum(len(field.data) for field in found) <= len(data)


def test_a_file_is_walked_without_reading_what_lies_in_it(tmp_path: Path) -> None:
    data = protobuf.number(1, 9) + protobuf.message(2, b"x" * 5000) + protobuf.fixed32(3, 1) + protobuf.message(4, b"y")
    path = tmp_path / "x.pb"
    path.write_bytes(data)
    with SourceFile(path) as file:
        found = [
            (number, file.read(at, length)) for number, at, length in protobuf.file_fields(file, 0, file.size, "t")
        ]
    assert found == [(2, b"x" * 5000), (4, b"y")]
