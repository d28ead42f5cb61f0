r"""A pickle machine that calls nothing: pickles of protocols 0 to 5 become plain data and inert nodes.

>>> import pickle, collections
>>> from neutral.containers.files import Memory
>>> root, _ = load(Memory(pickle.dumps(collections.OrderedDict(a=[1, 2.5]), 2)))
>>> root, items_of(root)
(<collections.OrderedDict>, {'a': [1, 2.5]})

A global is only a name. What a pickle would call (REDUCE, NEWOBJ, INST, OBJ, BUILD) is recorded on a `Node` and never
called; a caller may pass a closed table of names whose arguments it turns into data itself. Names that run code are
refused as soon as they appear. Nothing here recurses, and every opcode is charged for the memory it takes, so that a
small file cannot ask for much of it.
"""

from __future__ import annotations

import codecs
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from neutral.errors import BadFile, Problem, printable
from neutral.native import Storage

Rebuild = Callable[[tuple[Any, ...]], object]

BUDGET: Final = 256 << 20
"""Bytes of memory that one pickle may take, as estimated by `_COST`; it bounds the time too."""

_COST: Final = 48
_WINDOW: Final = 1 << 18
_SHORT: Final = 1 << 12
_TEXTS: Final = "SVX\x8c\x8d"
_MARKS: Final = 10_000
_LONGEST_INT: Final = 1 << 12
_PLAIN_INT: Final = (1 << 61) - 1


class Global:
    """A name that the pickle mentions: `torch.FloatStorage`, `__main__.Net`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<the name {printable(self.name, 80)}>"


class Node:
    """What would have been an object: its class (or the function that makes it) and everything recorded on it."""

    __slots__ = ("appended", "args", "cls", "items", "kwargs", "state")

    def __init__(self, cls: str, args: tuple[Any, ...] = (), kwargs: object = None) -> None:
        self.cls = cls
        self.args = args
        self.kwargs = kwargs
        self.state: Any = None
        self.items: dict[Any, Any] | None = None
        self.appended: list[Any] | None = None

    def __repr__(self) -> str:
        return f"<{printable(self.cls, 80)}>"


class Blob:
    """A text or byte string of a pickle that is read lazily: where its `nbytes` bytes begin, counted from the start of
    the storage, and `value` if it is short. `opcode` says how it is stored: `T`, `U`, `B`, `C` and others as bytes, `X` and
    its like as UTF-8."""

    __slots__ = ("nbytes", "offset", "opcode", "value")

    def __init__(self, opcode: str, offset: int, nbytes: int, value: str | bytes | None) -> None:
        self.opcode = opcode
        self.offset = offset
        self.nbytes = nbytes
        self.value = value

    def __repr__(self) -> str:
        return f"<{self.nbytes} bytes at {self.offset}>"


class Opaque:
    """A dictionary key that is no plain scalar. Equal to itself alone, so that hashing it costs nothing."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def items_of(value: object) -> dict[Any, Any] | None:
    """The items of a dict, or of a node of a dict's subclass (OrderedDict, defaultdict); None for all else."""
    if type(value) is dict:
        return value
    if type(value) is not Node:
        return None
    if value.items is not None:
        return value.items
    if value.cls in _MAPPINGS:
        return _pairs(value.args[-1]) if value.args else {}
    return None


def members_of(value: object) -> Sequence[Any] | None:
    """The members of a list, tuple or set, or of a node of a subclass of them; None for all else."""
    if type(value) in (list, tuple):
        return value  # type: ignore[return-value]
    if type(value) is not Node:
        return None
    first = value.args[0] if value.args and type(value.args[0]) in (list, tuple) else ()
    if value.appended is None and value.cls not in _SEQUENCES:
        return None
    return [*first, *(value.appended or ())]


_MAPPINGS: Final = frozenset(
    {"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"}
)
_SEQUENCES: Final = frozenset(
    {"builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "collections.deque", "torch.Size"}
)


def _pairs(value: object) -> dict[Any, Any]:
    # OrderedDict of Python 2 and of protocol 0: the constructor's argument is a list of pairs.
    if type(value) is dict:
        return value
    members = value if type(value) in (list, tuple) else ()
    pairs = [p for p in members if type(p) in (list, tuple) and len(p) == 2]  # type: ignore[attr-defined]
    return {_key(k): v for k, v in pairs}


_RENAMED: Final = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins", "cPickle": "pickle"}
"""Modules of Python 2 that protocols 0 to 2 still name."""

_RUNS_CODE: Final = frozenset(
    {
        *("os", "posix", "nt", "subprocess", "commands", "pty", "shutil", "socket", "runpy", "importlib", "imp", "sys"),
        *(
            "ctypes",
            "pickle",
            "_pickle",
            "marshal",
            "webbrowser",
            "asyncio",
            "pdb",
            "bdb",
            "urllib",
            "ftplib",
            "smtplib",
        ),
        *("code.interact", "code.InteractiveInterpreter", "timeit.timeit", "pip.main", "pip._internal"),
        *("builtins.eval", "builtins.exec", "builtins.execfile", "builtins.compile", "builtins.open", "builtins.file"),
        *("builtins.input", "builtins.__import__", "builtins.breakpoint", "builtins.apply", "operator.methodcaller"),
        *("torch.load", "torch.serialization.load", "torch.storage._load_from_bytes", "torch.jit.load", "torch.hub"),
        *("torch.utils.cpp_extension", "torch._inductor.codecache", "numpy.load", "numpy.fromfile", "numpy.memmap"),
        *("joblib.load", "pandas.read_pickle", "types.CodeType", "types.FunctionType"),
    }
)
_INNER: Final = frozenset(
    {"os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "importlib", "builtins", "ctypes"}
)


def runs_code(name: str) -> bool:
    """True for names whose only use in a pickle is to run code, or to open another file.

    >>> runs_code("posix.system"), runs_code("torch.serialization.os.system"), runs_code("torch._utils._rebuild_tensor")
    (True, True, False)
    """
    parts = name.split(".")
    heads = (".".join(parts[:n]) for n in range(1, min(len(parts), 5) + 1))
    return not _INNER.isdisjoint(parts[1:-1]) or any(head in _RUNS_CODE for head in heads)


def load(
    storage: Storage,
    offset: int = 0,
    *,
    where: str = "pickle",
    rebuild: Mapping[str, Rebuild] | None = None,
    persistent: Callable[[object], object] | None = None,
    build: Callable[[object, object], None] | None = None,
    globals_seen: dict[str, None] | None = None,
    lazy: bool = False,
) -> tuple[object, int]:
    """The value of the pickle at `offset`, and the offset after it.

    `rebuild` is the closed table of functions that are understood: name -> data from the arguments. `persistent` gives
    the value of a persistent id. `build` is told when state is set on what `rebuild` or `persistent` made. Every name
    that the pickle mentions is put into `globals_seen`. If `lazy`, every text and byte string stands as a `Blob`, but for
    the keys of mappings and names: long ones stay in the file, and their bytes count for nothing.
    """
    machine = _Machine(storage, offset, where, rebuild or {}, persistent, build, globals_seen, lazy)
    return machine.run(), machine.base + machine.pos


def _key(value: object) -> Any:
    if type(value) is Blob and value.value is not None:
        value = value.value
    kind = type(value)
    if kind is str or kind is bytes or kind is float or kind is bool or value is None:
        return value
    if kind is int and -_PLAIN_INT < value < _PLAIN_INT:  # type: ignore[operator]
        return value
    return Opaque(value)


class _Machine:
    def __init__(
        self,
        storage: Storage,
        offset: int,
        where: str,
        rebuild: Mapping[str, Rebuild],
        persistent: Callable[[object], object] | None,
        build: Callable[[object, object], None] | None,
        globals_seen: dict[str, None] | None,
        lazy: bool = False,
    ) -> None:
        self.storage, self.start, self.base, self.where = storage, offset, offset, where
        self.rebuild, self.persistent, self.build_other = rebuild, persistent, build
        self.lazy = lazy
        self.seen: dict[str, None] = {} if globals_seen is None else globals_seen
        self.data = b""
        self.pos = 0
        self.left = BUDGET
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Global] = {}

    def run(self) -> object:
        operations, stop = _OPERATIONS, _STOP
        while True:
            if self.pos >= len(self.data):
                self._more(1)
            opcode = self.data[self.pos]
            self.pos += 1
            if opcode == stop:
                break
            self.left -= _COST
            if self.left < 0:
                self._charge(0)
            operation = operations.get(opcode)
            if operation is None:
                raise self._bad(f"the opcode {opcode:#04x}", "an opcode of the pickle protocols 0 to 5")
            operation(self)
        value = self.pop()
        if self.stack or self.marks:
            raise self._bad("values left behind at the end of a pickle", "one value")
        return value

    def _bad(self, found: str, expected: str, do: str = "the file is damaged or forged") -> BadFile:
        return BadFile(Problem(f"{self.where} at byte {self.base + self.pos - self.start}", found, expected, do))

    def _charge(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise self._bad(
                f"a pickle that would take more than {BUDGET >> 20} MB of memory",
                "a smaller one",
                "save the weights as a state dict",
            )

    def _more(self, count: int) -> None:
        have = len(self.data)
        rest = self.storage.nbytes - self.base - have
        missing = self.pos + count - have
        if missing > rest:
            raise self._bad("the end of the data in the middle of a pickle", f"{count} more bytes")
        step = min(rest, max(missing, _WINDOW, min(have, 16 << 20)))
        self._charge(step)
        buffer = bytearray(step)
        self.storage.read_into(self.base + have, memoryview(buffer))
        self.data += bytes(buffer)

    def take(self, count: int) -> bytes:
        if self.pos + count > len(self.data):
            self._more(count)
        start = self.pos
        self.pos = start + count
        return self.data[start : self.pos]

    def number(self, form: str, size: int) -> int:
        (value,) = struct.unpack(form, self.take(size))
        return int(value)

    def line(self) -> bytes:
        start = self.pos
        while (end := self.data.find(b"\n", start)) < 0:
            start = len(self.data)
            self._more(start - self.pos + 1)
        line = self.data[self.pos : end]
        self.pos = end + 1
        self._charge(len(line))
        return line

    def blob(self, count: int) -> bytes:
        self._charge(count)
        return self.take(count)

    def push_bytes(self, opcode: str, count: int) -> None:
        self.push(self.left_there(opcode, count) if self.lazy else self.blob(count))

    def push_text(self, opcode: str, count: int) -> None:
        old = opcode in "TU"  # of Python 2, whose arrays keep their elements in such strings
        if self.lazy:
            self.push(self.left_there(opcode, count))
        else:
            self.push(self.old_text(self.blob(count)) if old else self.text(self.blob(count)))

    def left_there(self, opcode: str, count: int) -> Blob:
        """The next bytes as a `Blob`; long ones are passed over without being read."""
        self._charge(200)
        value: str | bytes | None = None
        offset = self.base + self.pos
        if count <= _SHORT:
            value = self.blob(count)
            if opcode in "TU":
                value = value.decode("latin-1")
            elif opcode in _TEXTS:
                value = self.text(value)
        elif self.pos + count <= len(self.data):
            self.pos += count
        else:
            if offset + count > self.storage.nbytes:
                raise self._bad("the end of the data in the middle of a pickle", f"{count} more bytes")
            self.base, self.pos, self.data = offset + count, 0, b""
        return Blob(opcode, offset, count, value)

    def push_empty(self, value: object) -> None:
        self._charge(40)
        self.stack.append(value)

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self._bad("an empty stack", "a value on it")
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self._bad("an empty stack", "a value on it")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self._bad("no mark on the stack", "one")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def mark(self) -> None:
        if len(self.marks) >= _MARKS:
            raise self._bad(f"more than {_MARKS} marks inside each other", "a pickle that is not nested so deeply")
        self.marks.append(len(self.stack))

    def text(self, raw: bytes, errors: str = "surrogatepass") -> str:
        try:
            value = raw.decode("utf-8", errors)
        except UnicodeDecodeError:
            raise self._bad("a text that is no UTF-8", "UTF-8") from None
        if not value.isascii():
            self._charge(sys.getsizeof(value))
        return value

    def old_text(self, raw: bytes) -> str:
        # STRING of Python 2: bytes without an encoding; torch.load reads them as UTF-8.
        return self.text(raw, "backslashreplace")

    def find(self, module: object, name: object) -> Global:
        if type(module) is Blob and type(name) is Blob:
            module, name = module.value, name.value
        if type(module) is not str or type(name) is not str:
            raise self._bad("a global whose name is no text", "a module and a name")
        known = self.names.get((module, name))
        if known is None:
            self._charge(400)
            known = Global(f"{_RENAMED.get(module, module)}.{name}")
            if runs_code(known.name):
                raise BadFile(
                    Problem(
                        self.where,
                        f"the name {printable(known.name, 80)}, which runs code when the file is unpickled",
                        "weights and the classes of layers",
                        "nothing was run; do not open this file with torch.load",
                    )
                )
            self.names[module, name] = known
            self.seen[known.name] = None
        return known

    def make(self, callee: object, args: object, kwargs: object = None, *, new: bool = False) -> object:
        if type(args) is not tuple:
            raise self._bad("arguments that are no tuple", "a tuple")
        name = callee.name if type(callee) is Global else "(the result of a call)"
        if not new and name in _CONSTRUCTORS and args and type(args[0]) is Global:
            return self.make(args[0], args[1:] if name != "copyreg._reconstructor" else args[2:], new=True)
        understood = self.rebuild.get(name)
        if understood is not None:
            return understood(args)
        self._charge(150)
        return Node(name, args, kwargs)

    def set_items(self, target: object, values: list[Any]) -> None:
        if len(values) % 2:
            raise self._bad("a key without a value", "pairs")
        if type(target) is dict:
            into = target
        elif type(target) is Node:
            into = target.items = items_of(target) or {}
        else:
            raise self._bad(f"items set on {_what(target)}", "a dict")
        self._charge(len(values) * 60)
        for i in range(0, len(values), 2):
            into[_key(values[i])] = values[i + 1]

    def append(self, target: object, values: list[Any]) -> None:
        if type(target) is list:
            target.extend(values)
        elif type(target) is Node:
            if target.appended is None:
                target.appended = []
            target.appended.extend(values)
        else:
            raise self._bad(f"members added to {_what(target)}", "a list or a set")

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if type(target) is Node:
            if target.state is not None:
                raise self._bad(f"state set twice on {target!r}", "once")
            target.state = state
        elif self.build_other is not None:
            self.build_other(target, state)
        else:
            raise self._bad(f"state set on {_what(target)}", "an object")

    def remember(self, index: int) -> None:
        if index < 0:
            raise self._bad("a negative memo number", "a positive one")
        self._charge(100)
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self._bad(f"memo number {index} before it was set", "a value set before")
        self.push(self.memo[index])

    def integer(self, raw: bytes) -> int:
        if not re.fullmatch(rb"\s*[-+]?[0-9]{1,4000}L?\s*", raw):
            raise self._bad("an integer that is none", "decimal digits")
        return int(raw.strip().rstrip(b"L"))

    def real(self, raw: bytes) -> float:
        try:
            return float(raw[:100])
        except ValueError:
            raise self._bad("a number that is none", "a number") from None

    def long(self, count: int) -> int:
        if not 0 <= count <= _LONGEST_INT:
            raise self._bad(f"an integer of {count} bytes", f"at most {_LONGEST_INT}")
        return int.from_bytes(self.take(count), "little", signed=True)

    def pop_top(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def int_line(self) -> None:
        raw = self.line()
        self.push({b"00": False, b"01": True}[raw] if raw in (b"00", b"01") else self.integer(raw))

    def string_line(self) -> None:
        raw = self.line().strip()
        if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
            raise self._bad("a string without quotes", "a quoted string")
        try:
            self.push(self.old_text(codecs.escape_decode(raw[1:-1])[0]))
        except ValueError:
            raise self._bad("a string with a broken escape", "a quoted string") from None

    def unicode_line(self) -> None:
        raw = self.line()
        try:
            value = raw.decode("raw-unicode-escape")
        except UnicodeDecodeError:
            raise self._bad("a text with a broken escape", "a text") from None
        self._charge(4 * len(value))
        self.push(value)

    def global_lines(self) -> Global:
        return self.find(self.text(self.line()), self.text(self.line()))

    def stack_global(self) -> None:
        name = self.pop()
        self.push(self.find(self.pop(), name))

    def reduce(self) -> None:
        args = self.pop()
        self.push(self.make(self.pop(), args))

    def new(self) -> None:
        args = self.pop()
        self.push(self.make(self.pop(), args, new=True))

    def new_with_keywords(self) -> None:
        kwargs = self.pop()
        args = self.pop()
        self.push(self.make(self.pop(), args, kwargs, new=True))

    def inst(self) -> None:
        callee = self.global_lines()
        self.push(self.make(callee, tuple(self.pop_mark()), new=True))

    def obj(self) -> None:
        values = self.pop_mark()
        if not values:
            raise self._bad("an object without a class", "a class")
        self.push(self.make(values[0], tuple(values[1:]), new=True))

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def collection(self, cls: str) -> None:
        self._charge(150)
        self.push(Node(cls))

    def frozen_set(self) -> None:
        self._charge(150)
        self.push(Node("builtins.frozenset", (self.pop_mark(),)))

    def dict_from_mark(self) -> None:
        values = self.pop_mark()
        made: dict[Any, Any] = {}
        self._charge(64)
        self.set_items(made, values)
        self.push(made)

    def set_item(self) -> None:
        value = self.pop()
        key = self.pop()
        self.set_items(self.top(), [key, value])

    def set_items_from_mark(self) -> None:
        values = self.pop_mark()
        self.set_items(self.top(), values)

    def append_one(self) -> None:
        value = self.pop()
        self.append(self.top(), [value])

    def append_from_mark(self) -> None:
        values = self.pop_mark()
        self.append(self.top(), values)

    def extension(self, form: str, size: int) -> None:
        self.push(self.find("copyreg", f"extension_{self.number(form, size)}"))

    def persistent_id(self, value: object) -> None:
        if self.persistent is None:
            raise self._bad("a persistent id", "a pickle without references out of itself")
        self.push(self.persistent(value))

    def protocol(self) -> None:
        if (version := self.take(1)[0]) > 5:
            raise self._bad(f"pickle protocol {version}", "0 to 5")

    def no_buffers(self) -> None:
        raise self._bad("a reference to a buffer outside the pickle", "a pickle that holds its own data")


def _what(value: object) -> str:
    return repr(value) if type(value) in (Node, Global) else f"a {type(value).__name__}"


_CONSTRUCTORS: Final = frozenset({"copyreg._reconstructor", "copyreg.__newobj__"})
_STOP: Final = ord(".")

_OPERATIONS: Final[dict[int, Callable[[_Machine], None]]] = {
    key[0]: operation
    for key, operation in {
        b"(": _Machine.mark,
        b"0": _Machine.pop_top,
        b"1": lambda m: m.pop_mark() and None,
        b"2": lambda m: m.push(m.top()),
        b"F": lambda m: m.push(m.real(m.line())),
        b"I": _Machine.int_line,
        b"J": lambda m: m.push(m.number("<i", 4)),
        b"K": lambda m: m.push(m.take(1)[0]),
        b"L": lambda m: m.push(m.integer(m.line())),
        b"M": lambda m: m.push(m.number("<H", 2)),
        b"N": lambda m: m.push(None),
        b"P": lambda m: m.persistent_id(m.text(m.line())),
        b"Q": lambda m: m.persistent_id(m.pop()),
        b"R": _Machine.reduce,
        b"S": _Machine.string_line,
        b"T": lambda m: m.push_text("T", m.number("<I", 4)),
        b"U": lambda m: m.push_text("U", m.take(1)[0]),
        b"V": _Machine.unicode_line,
        b"X": lambda m: m.push_text("X", m.number("<I", 4)),
        b"a": _Machine.append_one,
        b"b": _Machine.build,
        b"c": lambda m: m.push(m.global_lines()),
        b"d": _Machine.dict_from_mark,
        b"}": lambda m: m.push_empty({}),
        b"e": _Machine.append_from_mark,
        b"g": lambda m: m.recall(m.integer(m.line())),
        b"h": lambda m: m.recall(m.take(1)[0]),
        b"i": _Machine.inst,
        b"j": lambda m: m.recall(m.number("<I", 4)),
        b"l": lambda m: m.push_empty(m.pop_mark()),
        b"]": lambda m: m.push_empty([]),
        b"o": _Machine.obj,
        b"p": lambda m: m.remember(m.integer(m.line())),
        b"q": lambda m: m.remember(m.take(1)[0]),
        b"r": lambda m: m.remember(m.number("<I", 4)),
        b"s": _Machine.set_item,
        b"t": lambda m: m.push_empty(tuple(m.pop_mark())),
        b")": lambda m: m.push(()),
        b"u": _Machine.set_items_from_mark,
        b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        b"\x80": _Machine.protocol,
        b"\x81": _Machine.new,
        b"\x82": lambda m: m.extension("<B", 1),
        b"\x83": lambda m: m.extension("<H", 2),
        b"\x84": lambda m: m.extension("<i", 4),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"\x8a": lambda m: m.push(m.long(m.take(1)[0])),
        b"\x8b": lambda m: m.push(m.long(m.number("<i", 4))),
        b"B": lambda m: m.push_bytes("B", m.number("<I", 4)),
        b"C": lambda m: m.push_bytes("C", m.take(1)[0]),
        b"\x8c": lambda m: m.push_text("\x8c", m.take(1)[0]),
        b"\x8d": lambda m: m.push_text("\x8d", m.number("<Q", 8)),
        b"\x8e": lambda m: m.push_bytes("\x8e", m.number("<Q", 8)),
        b"\x8f": lambda m: m.collection("builtins.set"),
        b"\x90": _Machine.append_from_mark,
        b"\x91": _Machine.frozen_set,
        b"\x92": _Machine.new_with_keywords,
        b"\x93": _Machine.stack_global,
        b"\x94": lambda m: m.remember(len(m.memo)),
        b"\x95": lambda m: m.take(8) and None,
        b"\x96": lambda m: m.push_bytes("\x96", m.number("<Q", 8)),
        b"\x97": _Machine.no_buffers,
        b"\x98": _Machine.no_buffers,
    }.items()
}
