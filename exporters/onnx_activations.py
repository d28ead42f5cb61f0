"""Activations that exporters write as several operators: the graph has one word for each.

x * sigmoid(x)                                              Swish
x * clip(x / 6 + 1/2, 0, 1)                                 HardSwish
x * tanh(softplus(x))                                       Mish
where(x > 20, x, softplus(x))                               Softplus
where(x < 0, x + n, x)                                      x itself, where it looks up rows of a table of n
x / 2 * (1 + erf(x / sqrt(2)))                              Gelu
x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))       Gelu, approximated
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from neutral.containers.onnx import NodeProto
from neutral.conventions.onnx_scope import Scope
from neutral.exporters.onnx_flow import Builder, scalar_of
from neutral.schema.graph import Attribute

_CLOSE = 1e-6
_MOST_FACTORS = 6
_LINEAR_FROM = 20.0
"""Where softplus(x) is x in float32."""


@dataclass(frozen=True)
class Fused:
    """An activation of the value `source`, or, without `op`, the value itself; `inner` are the nodes that it takes the place
    of, but for the last."""

    op: str
    attributes: Mapping[str, Attribute]
    source: str
    inner: tuple[NodeProto, ...]


def activation(b: Builder, one: Fused) -> None:
    x = b.flow(one.source)
    if not one.op:
        b.flows[b.node.outputs[0]] = x
        return
    y = b.make(one.op, [x], x.sizes, one.attributes, order=x.order)
    b.holds(x, y)


def fused_activations(scope: Scope) -> dict[int, Fused]:
    """By the identity of the last node of each."""
    found: dict[int, Fused] = {}
    for node in scope.graph.nodes:
        if node.domain or not node.outputs:
            continue
        rules = _RULES.get(node.op_type, ())
        one = next((made for rule in rules if (made := rule(scope, node)) is not None), None)
        if one is not None and all(_inside(scope, inner, one, node) for inner in one.inner):
            found[id(node)] = one
    return found


def _inside(scope: Scope, inner: NodeProto, one: Fused, last: NodeProto) -> bool:
    """True if nothing but the nodes of the activation uses what an inner one makes."""
    own = {id(last), *map(id, one.inner)}
    value = inner.outputs[0]
    given_out = any(info.name == value for info in scope.graph.outputs)
    return not given_out and all(id(user) in own for user in scope.users.get(value, ()))


def _maker(scope: Scope, value: str, *ops: str) -> NodeProto | None:
    node = scope.makers.get(value)
    return node if node is not None and not node.domain and node.op_type in ops and node.inputs else None


def _is(number: float | None, wanted: float) -> bool:
    return number is not None and math.isclose(number, wanted, rel_tol=_CLOSE)


def _where(scope: Scope, node: NodeProto) -> Fused | None:
    if len(node.inputs) != 3:
        return None
    condition, x, other = node.inputs
    greater, soft = _maker(scope, condition, "Greater"), _maker(scope, other, "Softplus")
    if greater is None or soft is None or len(greater.inputs) != 2 or greater.inputs[0] != x or soft.inputs[0] != x:
        return None
    limit = scalar_of(scope, greater.inputs[1])
    if limit is None or limit < _LINEAR_FROM:
        return None
    return Fused("Softplus", {}, x, (greater, soft))


def _product(scope: Scope, node: NodeProto) -> Fused | None:
    """Two values that are multiplied, and numbers beside them."""
    inner: list[NodeProto] = []
    number, values = 1.0, []
    for kind, factor in _factors(scope, node, inner):
        if kind == "number":
            number *= float(factor)
        else:
            values.append(str(factor))
    if len(values) != 2:
        return None
    for x, gate in (values, values[::-1]):
        found = _gated(scope, x, gate, number)
        if found is not None:
            op, attributes, more = found
            return Fused(op, attributes, x, (*inner, *more))
    return None


def _factors(scope: Scope, node: NodeProto, inner: list[NodeProto]) -> Iterator[tuple[str, str | float]]:
    waiting, count = list(node.inputs), 0
    while waiting:
        value = waiting.pop()
        count += 1
        number = scalar_of(scope, value)
        product = _maker(scope, value, "Mul")
        if number is not None:
            yield "number", number
        elif (
            product is not None
            and count < _MOST_FACTORS
            and any(
                scalar_of(scope, each) is not None or _maker(scope, each, "Add") is not None for each in product.inputs
            )
        ):
            inner.append(product)
            waiting += product.inputs
        else:
            yield "value", value


_Gated = tuple[str, dict[str, Attribute], list[NodeProto]]


def _gated(scope: Scope, x: str, gate: str, number: float) -> _Gated | None:
    """What x * gate * number is."""
    plain = _is(number, 1)
    sigmoid = _maker(scope, gate, "Sigmoid", "HardSigmoid")
    if sigmoid is not None and plain and sigmoid.inputs[0] == x:
        if sigmoid.op_type == "Sigmoid":
            return "Swish", {}, [sigmoid]
        alpha, beta = (sigmoid.attributes.get(name, usual) for name, usual in (("alpha", 0.2), ("beta", 0.5)))
        hard = isinstance(alpha, float) and isinstance(beta, float) and _is(alpha, 1 / 6) and _is(beta, 0.5)
        return ("HardSwish", {}, [sigmoid]) if hard else None
    tanh = _maker(scope, gate, "Tanh")
    soft = _maker(scope, tanh.inputs[0], "Softplus") if tanh is not None else None
    if tanh is not None and soft is not None and plain and soft.inputs[0] == x:
        return "Mish", {}, [soft, tanh]
    return _gelu(scope, x, gate) if _is(number, 0.5) else None


def _gelu(scope: Scope, x: str, gate: str) -> _Gated | None:
    """1 + erf(x / sqrt(2)), or 1 + tanh(...)."""
    adds = _maker(scope, gate, "Add")
    parts = _with_number(scope, adds)
    curve = _maker(scope, parts[0], "Erf", "Tanh") if parts is not None and _is(parts[1], 1) else None
    if adds is None or curve is None:
        return None
    inner: list[NodeProto] = [curve, adds]
    scaled = _times(scope, curve.inputs[0])
    if scaled is None:
        return None
    value, factor, node = scaled
    inner.append(node)
    if curve.op_type == "Erf":
        return ("Gelu", {"approximate": "none"}, inner) if value == x and _is(factor, math.sqrt(0.5)) else None
    series = _maker(scope, value, "Add")
    if series is None or not _is(factor, math.sqrt(2 / math.pi)) or x not in series.inputs or len(series.inputs) != 2:
        return None
    cubic = _times(scope, series.inputs[1] if series.inputs[0] == x else series.inputs[0])
    power = _maker(scope, cubic[0], "Pow") if cubic is not None else None
    if cubic is None or power is None or power.inputs[0] != x or not _is(cubic[1], 0.044715):
        return None
    if not _is(scalar_of(scope, power.inputs[1]), 3):
        return None
    return "Gelu", {"approximate": "tanh"}, [*inner, series, cubic[2], power]


def _with_number(scope: Scope, node: NodeProto | None) -> tuple[str, float] | None:
    """The value and the number that a node joins."""
    if node is None or len(node.inputs) != 2:
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        number = scalar_of(scope, other)
        if number is not None:
            return value, number
    return None


def _times(scope: Scope, value: str) -> tuple[str, float, NodeProto] | None:
    """The value and the number of value * number, or value / number."""
    node = _maker(scope, value, "Mul", "Div")
    found = _with_number(scope, node)
    if node is None or found is None or (node.op_type == "Div" and (found[0] != node.inputs[0] or not found[1])):
        return None
    return found[0], found[1] if node.op_type == "Mul" else 1 / found[1], node


# --- places of rows, counted from the end where they are negative, as ONNX's Gather itself does ---


def _chosen_place(scope: Scope, node: NodeProto) -> Fused | None:
    """where(x < 0, x + n, x)"""
    if len(node.inputs) != 3:
        return None
    less, x = _negative(scope, node.inputs[0]), node.inputs[2]
    adds = _maker(scope, node.inputs[1], "Add")
    if less is None or adds is None or less[0] != x or not _rows_behind(scope, node, adds, x):
        return None
    return Fused("", {}, x, (*less[1], adds))


def _summed_place(scope: Scope, node: NodeProto) -> Fused | None:
    """(x < 0) * (x + n) + x * not (x < 0)"""
    products = [_maker(scope, value, "Mul") for value in node.inputs]
    for one, other in (products, products[::-1]) if len(products) == 2 else ():
        if one is None or other is None or len(one.inputs) != 2 or len(other.inputs) != 2:
            continue
        for negative, moved in (one.inputs, one.inputs[::-1]):
            less, adds = _negative(scope, negative), _maker(scope, moved, "Add")
            if less is None or adds is None or less[0] not in other.inputs:
                continue
            x = less[0]
            rest = _negated(scope, other.inputs[1] if other.inputs[0] == x else other.inputs[0])
            if rest is not None and rest[0] == x and _rows_behind(scope, node, adds, x):
                inner = {id(each): each for each in (one, other, adds, *less[1], *rest[1])}
                return Fused("", {}, x, tuple(inner.values()))
    return None


def _uncast(scope: Scope, value: str, inner: list[NodeProto]) -> str:
    cast = _maker(scope, value, "Cast")
    if cast is None:
        return value
    inner.append(cast)
    return cast.inputs[0]


def _negative(scope: Scope, value: str) -> tuple[str, list[NodeProto]] | None:
    """x of x < 0, and the nodes of it."""
    inner: list[NodeProto] = []
    less = _maker(scope, _uncast(scope, value, inner), "Less")
    if less is None or len(less.inputs) != 2 or scalar_of(scope, less.inputs[1]) != 0:
        return None
    inner.append(less)
    return _uncast(scope, less.inputs[0], inner), inner


def _negated(scope: Scope, value: str) -> tuple[str, list[NodeProto]] | None:
    """x of not (x < 0), and the nodes of it."""
    inner: list[NodeProto] = []
    turned = _maker(scope, _uncast(scope, value, inner), "Not")
    less = _negative(scope, turned.inputs[0]) if turned is not None else None
    return None if turned is None or less is None else (less[0], [*inner, turned, *less[1]])


def _rows_behind(scope: Scope, node: NodeProto, adds: NodeProto, x: str) -> bool:
    """True if x + n is added up, n rows of each table in which the result of a node is looked up."""
    told = _with_number(scope, adds)
    users = scope.users.get(node.outputs[0], [])
    tables = [scope.constant(user.inputs[0]) for user in users if user.op_type == "Gather" and len(user.inputs) == 2]
    if told is None or told[0] != x or not users or len(tables) < len(users):
        return False
    first = all(user.attributes.get("axis", 0) == 0 for user in users)
    return first and all(table is not None and table.shape[:1] == (told[1],) for table in tables)


_RULES: Mapping[str, tuple[Callable[[Scope, NodeProto], Fused | None], ...]] = {
    "Add": (_summed_place,),
    "Mul": (_product,),
    "Where": (_where, _chosen_place),
}
