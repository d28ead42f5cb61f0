"""The values of one graph of an ONNX model: who makes them, who uses them, and which are made of stored tensors alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from neutral.containers.onnx import GraphProto, NodeProto
from neutral.containers.onnx_constants import Expression, Joined, Leaf, Permuted, forward, leaves, reshaped, sliced
from neutral.containers.onnx_tensors import DTYPES, TensorProto
from neutral.rules import widens

_MOST_STEPS = 64
_MOST_LEAVES = 256
_LARGEST = 1 << 63
_MOST_NUMBERS = 1024

_SPREADING = ("Expand", "CastLike", "Cast", "Identity", "Reshape", "Slice", "Unsqueeze", "Squeeze", "Tile")

Numbers = tuple[int | None, ...]
"""A short list of whole numbers as an expression of shapes has it, None where one is not known."""


@dataclass
class Scope:
    """A graph, by its values. `names` tells the unique name of each stored tensor (see `named_tensors`)."""

    graph: GraphProto
    opset: int
    names: Mapping[int, str]
    parent: Scope | None = None
    makers: dict[str, NodeProto] = field(default_factory=dict)
    users: dict[str, list[NodeProto]] = field(default_factory=dict)
    _constants: dict[str, Expression | None] = field(default_factory=dict)
    _numbers: dict[str, Numbers | None] = field(default_factory=dict)
    _shapes: dict[str, tuple[int | str | None, ...]] = field(default_factory=dict)
    _given_out: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._given_out = {info.name for info in self.graph.outputs}
        for info in (*self.graph.outputs, *self.graph.inputs, *self.graph.value_infos.values()):
            if info.shape is not None:
                self._shapes[info.name] = info.shape
        for node in self.graph.nodes:
            for value in node.outputs:
                if value:
                    self.makers[value] = node
            for value in dict.fromkeys(node.inputs):
                if value:
                    self.users.setdefault(value, []).append(node)

    def learn(self, shapes: Mapping[str, Numbers]) -> None:
        """Shapes of values of which the file says none."""
        self._shapes |= {value: shape for value, shape in shapes.items() if value not in self._shapes}

    def name_of(self, tensor: TensorProto) -> str:
        return self.names[tensor.span.at]

    def constant(self, value: str, depth: int = 0) -> Expression | None:
        """What stored tensors make of a value, or None if it depends on more than them, or on them in another way."""
        if not value or depth > _MOST_STEPS:
            return None
        if value not in self._constants:
            self._constants[value] = None  # a cycle is no constant
            self._constants[value] = self._made(value, depth)
        return self._constants[value]

    def _made(self, value: str, depth: int) -> Expression | None:
        if value in self.graph.initializers:
            return self._leaf(self.graph.initializers[value])
        node = self.makers.get(value)
        if node is None:
            return self.parent.constant(value, depth + 1) if self.parent is not None else None
        if node.domain or not node.outputs or node.outputs[0] != value:
            return None
        if node.op_type == "Constant":
            held = node.attributes.get("value")
            return self._leaf(held) if isinstance(held, TensorProto) else None
        if node.op_type == "Concat":
            return self._joined(node, depth)
        base = self.constant(node.inputs[0], depth + 1) if node.inputs else None
        return None if base is None else self._moved(node, base)

    def _leaf(self, tensor: TensorProto) -> Leaf | None:
        return None if tensor.data is None else Leaf(self.name_of(tensor), tensor)

    def _joined(self, node: NodeProto, depth: int) -> Expression | None:
        parts = [self.constant(value, depth + 1) for value in node.inputs]
        known = [part for part in parts if part is not None]
        axis = node.attributes.get("axis")
        if not known or len(known) < len(parts) or type(axis) is not int:
            return None
        rank = len(known[0].shape)
        axis = axis + rank if axis < 0 else axis
        if not 0 <= axis < rank:
            return None
        around = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in known}
        found = [leaf for part in known for leaf in leaves(part)]
        dtypes = {leaf.tensor.code for leaf in found}
        if len(around) != 1 or len(dtypes) != 1 or len(found) > _MOST_LEAVES:
            return None
        return known[0] if len(known) == 1 else Joined(tuple(known), axis)

    def _moved(self, node: NodeProto, base: Expression) -> Expression | None:
        """An operator of one constant, if it moves elements and changes none."""
        rank = len(base.shape)
        match node.op_type:
            case "Identity":
                return base
            case "Cast":
                goal = DTYPES.get(_int(node, "to", 0))
                code = next(leaves(base)).tensor.code
                return base if goal is not None and widens(DTYPES[code], goal) else None
            case "Transpose":
                perm = node.attributes.get("perm", tuple(reversed(range(rank))))
                order = tuple(n for n in perm if type(n) is int) if isinstance(perm, tuple) else ()
                if sorted(order) != list(range(rank)):
                    return None
                return base if order == tuple(range(rank)) else Permuted(base, order)
            case "Reshape":
                sizes = self.numbers(node.inputs[1]) if len(node.inputs) > 1 else _ints(node, "shape")
                return None if sizes is None else reshaped(base, sizes, bool(_int(node, "allowzero", 0)))
            case "Unsqueeze" | "Squeeze":
                axes = self._axes(node, 1)
                return None if axes is None else _with_ones(base, axes, node.op_type == "Unsqueeze")
            case "Slice":
                return self._sliced(node, base)
        return None

    def _sliced(self, node: NodeProto, base: Expression) -> Expression | None:
        if len(node.inputs) < 3:
            starts, stops, axes = (_ints(node, name) for name in ("starts", "ends", "axes"))
            steps: Numbers | None = None
        else:
            starts, stops = (self.numbers(value) for value in node.inputs[1:3])
            axes, steps = (
                self.numbers(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] else None for i in (3, 4)
            )
            if any(len(node.inputs) > i and node.inputs[i] for i in (3,)) and axes is None:
                return None
            if len(node.inputs) > 4 and node.inputs[4] and (steps is None or any(step != 1 for step in steps)):
                return None
        if starts is None or stops is None:
            return None
        where = tuple(range(len(starts))) if axes is None else axes
        rank = len(base.shape)
        if not len(starts) == len(stops) == len(where) or None in (*starts, *stops, *where):
            return None
        placed = [axis + rank if axis is not None and axis < 0 else axis for axis in where]
        if any(axis is None or not 0 <= axis < rank for axis in placed) or len(set(placed)) != len(placed):
            return None
        first = {axis: n for axis, n in zip(placed, starts, strict=True) if axis is not None and n is not None}
        last = {axis: n for axis, n in zip(placed, stops, strict=True) if axis is not None and n is not None}
        return sliced(base, first, last)

    def _axes(self, node: NodeProto, place: int) -> Numbers | None:
        """The axes of an operator: an attribute, or, since opset 13, an input; () if there are none."""
        if len(node.inputs) > place and node.inputs[place]:
            return self.numbers(node.inputs[place])
        return _ints(node, "axes") if "axes" in node.attributes else ()

    def numbers(self, value: str, depth: int = 0) -> Numbers | None:
        """A short list of whole numbers, as shapes are; None inside it for what is not known, None if nothing is."""
        if not value or depth > _MOST_STEPS:
            return None
        if value not in self._numbers:
            self._numbers[value] = None
            stored = self.constant(value)
            node = self.makers.get(value)
            if stored is not None:
                self._numbers[value] = _numbers_of(stored)
            elif node is not None:
                self._numbers[value] = self._counted(node, depth)
            elif self.parent is not None:
                self._numbers[value] = self.parent.numbers(value, depth + 1)
        return self._numbers[value]

    def _counted(self, node: NodeProto, depth: int) -> Numbers | None:
        """What an operator on shapes makes."""
        if node.domain:
            return None
        if node.op_type == "Constant":
            single = node.attributes.get("value_int")
            return (single,) if type(single) is int else _ints(node, "value_ints")
        if node.op_type == "Shape" and node.inputs:
            shape = self.shape_of(node.inputs[0])
            end = node.attributes.get("end")
            return None if shape is None else shape[_int(node, "start", 0) : end if type(end) is int else None]
        parts = [self.numbers(name, depth + 1) for name in node.inputs]
        first = parts[0] if parts else None
        match node.op_type:
            case "Concat":
                joined = tuple(n for part in parts if part is not None for n in part)
                return joined if None not in parts and len(joined) <= _MOST_NUMBERS else None
            case "Cast" | "Identity" | "Squeeze" | "Reshape":
                return first
            case "Unsqueeze":
                # A size that is looked up in a Shape is one number, whichever it is.
                return (None,) if first is None else first
            case "Expand":
                return first if first is not None and len(parts) == 2 and parts[1] == (len(first),) else None
            case "Gather" if first is None and len(parts) == 2 and parts[1] is not None:
                # Looked up in something that is not known: numbers, all the same.
                return (None,) * len(parts[1])
            case "Gather" if first is not None and len(parts) == 2 and parts[1] is not None:
                places = [n for n in parts[1] if n is not None and -len(first) <= n < len(first)]
                return tuple(first[n] for n in places) if len(places) == len(parts[1]) else None
            case "Slice" if None not in parts[1:3]:
                return _cut_numbers(first, parts)
            case "Add" | "Sub" | "Mul" | "Div" if len(parts) == 2:
                return _computed(node.op_type, first, parts[1])
            case "Range" if all(part is not None and len(part) == 1 for part in parts) and len(parts) == 3:
                return _range(*(part[0] for part in parts if part is not None))
        return None

    def shape_of(self, value: str) -> Numbers | None:
        """The shape of a value, None inside it for sizes that are not known; None if nothing is known."""
        stored = self.constant(value)
        if stored is not None:
            return stored.shape
        told = self._shapes.get(value)
        if told is not None:
            return tuple(n if type(n) is int else None for n in told)
        if self.parent is not None and value not in self.makers:
            return self.parent.shape_of(value)
        return None

    def zero(self, value: str, depth: int = 0) -> bool:
        """True for a value that the graph itself makes of nothing but zeros; a stored tensor of several is none."""
        if depth > _MOST_STEPS:
            return False
        stored = self.constant(value)
        if stored is not None:
            return math.prod(stored.shape) == 1 and is_float(stored) and not forward(stored).read().any()
        node = self.makers.get(value)
        if node is None or node.domain or not node.inputs:
            return False
        if node.op_type == "Concat":
            return all(self.zero(part, depth + 1) for part in node.inputs)
        if node.op_type == "ConstantOfShape":
            held = node.attributes.get("value")
            data = held.data if isinstance(held, TensorProto) else None
            return held is None or (data is not None and data.size == 1 and not data.read().any())
        return node.op_type in _SPREADING and self.zero(node.inputs[0], depth + 1)

    def ones(self, value: str) -> bool:
        """True for a value that the graph itself makes of nothing but ones."""
        node = self.makers.get(value)
        held = node.attributes.get("value") if node is not None and node.op_type == "ConstantOfShape" else None
        data = held.data if isinstance(held, TensorProto) else None
        return data is not None and data.size == 1 and bool((data.read() == 1).all())

    def floats(self, value: str) -> Expression | None:
        """A constant of numbers with a fraction, as weights are."""
        found = self.constant(value)
        return found if found is not None and is_float(found) else None

    def only_user(self, value: str) -> NodeProto | None:
        """The one node that uses a value, if there is just one and the graph does not give the value away."""
        users = self.users.get(value, [])
        if len(users) != 1 or value in self._given_out:
            return None
        return users[0] if users[0].inputs.count(value) == 1 else None


def is_float(expression: Expression) -> bool:
    """True for elements that weights have: floats of any width, no whole numbers."""
    return DTYPES[next(leaves(expression)).tensor.code].kind not in "iub"


def _numbers_of(expression: Expression) -> Numbers | None:
    if len(expression.shape) > 1 or math.prod(expression.shape) > _MOST_NUMBERS:
        return None
    tensor = forward(expression)
    if tensor.dtype.kind not in "iu":
        return None
    return tuple(int(n) for n in tensor.read().reshape(-1))


def _cut_numbers(numbers: Numbers | None, parts: list[Numbers | None]) -> Numbers | None:
    """A Slice of a list: one start and one end, steps of one."""
    if len(parts) < 3:
        return None
    start, stop = parts[1], parts[2]
    rest = [part for part in parts[3:] if part not in ((0,), (-1,))] if len(parts) > 3 else []
    if start is None or stop is None or len(start) != 1 or len(stop) != 1 or any(part != (1,) for part in rest):
        return None
    if start[0] is None or stop[0] is None:
        return None
    if numbers is None:
        return (None,) if start[0] >= 0 and stop[0] == start[0] + 1 else None
    return numbers[start[0] : stop[0]]


def _computed(op: str, one: Numbers | None, other: Numbers | None) -> Numbers | None:
    """Arithmetic on sizes, element by element or with one number."""
    if one is None or other is None or (len(one) != len(other) and 1 not in (len(one), len(other))):
        return None
    count = max(len(one), len(other))
    pairs = zip(one * count if len(one) == 1 else one, other * count if len(other) == 1 else other, strict=True)
    return tuple(None if a is None or b is None else _result(op, a, b) for a, b in pairs)


def _result(op: str, a: int, b: int) -> int | None:
    # A chain of squares would grow without end.
    if abs(a) >= _LARGEST or abs(b) >= _LARGEST:
        return None
    match op:
        case "Add":
            return a + b
        case "Sub":
            return a - b
        case "Mul":
            return a * b
    return int(a / b) if b and abs(a) < 1 << 50 else None


def _range(start: int | None, stop: int | None, step: int | None) -> Numbers | None:
    if start is None or stop is None or not step or abs(stop - start) > _MOST_NUMBERS:
        return None
    return tuple(range(start, stop, step))


def _with_ones(base: Expression, axes: Numbers, more: bool) -> Expression | None:
    """Axes of size one put in, or left out."""
    rank = len(base.shape) + (len(axes) if more else 0)
    placed = {axis + rank if axis is not None and axis < 0 else axis for axis in axes}
    if any(axis is None or not 0 <= axis < rank for axis in placed) or len(placed) != len(axes):
        return None
    if more:
        rest = iter(base.shape)
        return reshaped(base, [1 if i in placed else next(rest) for i in range(rank)], allow_zero=True)
    gone = placed or {i for i, n in enumerate(base.shape) if n == 1}
    if any(base.shape[i] != 1 for i in gone if i is not None):
        return None
    return reshaped(base, [n for i, n in enumerate(base.shape) if i not in gone], allow_zero=True)


def _int(node: NodeProto, name: str, usual: int) -> int:
    value = node.attributes.get(name, usual)
    return value if type(value) is int else usual


def _ints(node: NodeProto, name: str) -> Numbers | None:
    value = node.attributes.get(name)
    if not isinstance(value, tuple):
        return None
    return tuple(n for n in value if type(n) is int)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node holds: the branches of an If, the body of a Loop."""
    for value in node.attributes.values():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, GraphProto):
                yield each
