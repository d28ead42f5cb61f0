"""The pickle machine against Python's own pickle, and against pickles made to harm."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import pathlib
import pickle
import pickletools
import random
import struct
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neutral.containers.files import Memory
from neutral.containers.pickle_machine import Global, Node, Opaque, items_of, load, members_of, runs_code
from neutral.errors import BadFile, NeutralError


def read(data: bytes, **keywords: Any) -> Any:
    return load(Memory(data), **keywords)[0]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(-(2**60), 2**60) | st.none(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(plain, st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_plain_data_comes_out_as_python_reads_it(value: object, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_bytes_survive_every_protocol_that_has_them(value: bytes) -> None:
    for protocol in (3, 4, 5):
        assert read(pickle.dumps(value, protocol)) == value
    assert read(pickle.dumps(bytearray(value), 5)) == value


def test_every_opcode_of_python_is_known() -> None:
    from neutral.containers.pickle_machine import _OPERATIONS

    known = {chr(code) for code in _OPERATIONS} | {"."}
    assert known == {opcode.code for opcode in pickletools.opcodes}


@dataclasses.dataclass
class Point:
    x: int
    y: list[int]


class Colour(enum.Enum):
    RED = 1


class Slotted:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


@pytest.mark.parametrize("protocol", range(6))
def test_objects_become_nodes(protocol: int) -> None:
    here = Point.__module__
    point = read(pickle.dumps(Point(1, [2]), protocol))
    assert type(point) is Node and point.cls == f"{here}.Point" and point.state == {"x": 1, "y": [2]}
    path = read(pickle.dumps(pathlib.PurePosixPath("a/b"), protocol))
    assert path.cls.startswith("pathlib.") and path.args == ("a", "b")
    assert read(pickle.dumps(Colour.RED, protocol)).args == (1,)
    ordered = read(pickle.dumps(collections.OrderedDict(a=1, b=2), protocol))
    assert list(items_of(ordered).items()) == [("a", 1), ("b", 2)]  # type: ignore[union-attr]
    assert items_of(read(pickle.dumps(collections.defaultdict(list, a=[1]), protocol))) == {"a": [1]}
    assert list(members_of(read(pickle.dumps(collections.deque([1, 2]), protocol))) or ()) == [1, 2]
    assert sorted(members_of(read(pickle.dumps({3, 4}, protocol))) or ()) == [3, 4]
    assert sorted(members_of(read(pickle.dumps(frozenset({3, 4}), protocol))) or ()) == [3, 4]
    assert type(read(pickle.dumps(int, protocol))) is Global
    assert read(pickle.dumps(datetime.date(2020, 1, 2), protocol)).cls == "datetime.date"
    if protocol >= 2:
        assert read(pickle.dumps(Slotted(), protocol)).state == (None, {"a": 1})


def test_cycles_and_shared_values() -> None:
    loop: list[Any] = []
    loop.append(loop)
    got = read(pickle.dumps(loop))
    assert got[0] is got
    shared = ["x"]
    one, two = read(pickle.dumps((shared, shared)))
    assert one is two


def test_pickles_of_python_2() -> None:
    assert read(b"S'a\\x41'\n.") == "aA"
    assert read(b"U\x02\xc3\xa9.") == "é"
    assert read(b"U\x01\xe9.") == "\\xe9"
    assert read(b"c__builtin__\nset\n((lp0\nI1\natR.").cls == "builtins.set"
    assert read(b"(i__main__\nNet\n(dp0\nS'a'\nI1\nsb.").state == {"a": 1}
    assert read(b"(c__main__\nNet\nK\x01o.").args == (1,)


def test_the_closed_table_and_persistent_ids() -> None:
    table = {"some.make": lambda args: ("made", *args)}
    assert read(b"csome\nmake\nK\x01\x85R.", rebuild=table) == ("made", 1)
    assert read(b"\x80\x02K\x07Q.", persistent=lambda value: ("pid", value)) == ("pid", 7)
    assert read(b"P12\n.", persistent=lambda value: ("pid", value)) == ("pid", "12")
    seen: dict[str, None] = {}
    read(b"cmy.net\nNet\n)\x81.", globals_seen=seen)
    assert list(seen) == ["my.net.Net"]


def test_the_end_is_told() -> None:
    data = pickle.dumps([1]) + pickle.dumps("next") + b"rest"
    _, middle = load(Memory(data))
    value, end = load(Memory(data), middle)
    assert value == "next" and data[end:] == b"rest"


def test_keys_that_are_no_scalars_are_never_hashed() -> None:
    (key,) = read(pickle.dumps({(1, 2): 3}))
    assert type(key) is Opaque and key.value == (1, 2)
    (key,) = read(pickle.dumps({2**61 - 1: 3}))
    assert type(key) is Opaque and key.value == 2**61 - 1


RUN = (
    b"cposix\nsystem\n(X\x04\0\0\0touctR.",
    b"(iposix\nsystem\n.",
    b"(X\x01\0\0\0acnt\nsystem\no.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93)}\x92.",
    b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93.",
    b"c__builtin__\neval\n.",
    b"cbuiltins\nexec\n0N.",
    b"ctorch.storage\n_load_from_bytes\n.",
    b"crunpy\n_run_code\n.",
    b"csubprocess\nPopen\n)\x81.",
)


@pytest.mark.parametrize("data", RUN)
def test_names_that_run_code_are_refused(data: bytes) -> None:
    with pytest.raises(BadFile, match="runs code"):
        read(data)


def test_names_of_ordinary_classes_are_not_refused() -> None:
    for name in ("os_models.net.Net", "code.model.Net", "my.operators.Conv", "torch.nn.modules.linear.Linear"):
        assert not runs_code(name)


def nested(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1) + b"."


BOMBS = {
    "deep key": b"})" + b"\x85" * 10**6 + b"K\x01s.",
    "laughing key": b"})" + b"q\0h\0\x86" * 200 + b"K\x01s.",
    "deep list": nested(10**6),
    "memo": b"Nr\0\0\0\x10.",
    "bytes of 2^60": b"\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "text of 2^60": b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "text of 2^31": b"X" + struct.pack("<I", 1 << 31) + b".",
    "marks": b"(" * 5_000_000 + b".",
    "integer of 2^31 bytes": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "integer of -1 bytes": b"\x8b" + struct.pack("<i", -1) + b"a.",
    "decimal integer": b"L" + b"9" * 1_000_000 + b"L\n.",
    "sets": b"\x8f" * 2_000_000,
    "memoized": b"N" + b"\x94" * 3_000_000 + b".",
    "nodes": b"ca\nb\nq\0)\x81" + b"h\0)\x81" * 2_000_000 + b".",
    "equal hashes": b"}("
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(50_000))
    + b"u.",
    "long key again and again": b"\x8b"
    + struct.pack("<i", 4000)
    + b"\x11" * 4000
    + b"q\0}"
    + b"h\0Ns" * 200_000
    + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little_time_and_memory(name: str) -> None:
    began = time.monotonic()
    try:
        read(BOMBS[name])
    except BadFile as error:
        assert "\n" not in str(error)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("unit", [b"\x8f", b"}", b"]", b"N\x94", b"ca\nb\n)\x81", b")\x85", b"X\x01\0\0\0a", b"(N}u"])
def test_memory_stays_near_the_budget(unit: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neutral.containers.pickle_machine.BUDGET", 8 << 20)
    data = b"}" + unit * 150_000
    tracemalloc.start()
    with pytest.raises(BadFile):
        read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize(
    "data",
    [b"", b".", b"N", b"0.", b"NN.", b"(.", b"(N.", b"h\0.", b"g5\n.", b"\xff.", b"\x80\x06N.", b"Ixx\n.", b"Fx\n.", b"S'a\n.",
     b"X\x01\0\0\0\xff.", b"NNR.", b"N)b.", b"}Nb.", b"](Ns.", b"NNNs.", b"](Nu.", b"}(Nu.", b"}(NNNu.", b"Na.", b"\x97.",
     b"\x98.", b"NQ.", b"ca\nb\n)\x81Nb}b}b.", b"\x93.", b"NN\x93.", b"V\\ud\n.", b"p-1\n.", b"(o.", b"(R.", b"\x95\0", b"1."],
)  # fmt: skip
def test_broken_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(BadFile):
        read(data)


def test_mutated_pickles_give_a_value_or_one_kind_of_error() -> None:
    rng = random.Random(5)
    value = {
        "a": [1, 2.5, "text", b"bytes", None, True, 2**70],
        "o": Point(1, [2]),
        "s": {1, 2},
        "d": collections.OrderedDict(x=1),
    }
    seeds = [pickle.dumps(value, protocol) for protocol in range(6)]
    refused = 0
    for _ in range(6000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        try:
            read(bytes(data))
        except NeutralError:
            refused += 1
    assert 1000 < refused < 6000
