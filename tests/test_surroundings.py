"""Labels, orders and ways of two small graphs; graphs that make no sense say nothing."""

from __future__ import annotations

import pytest

from neutral.schema.graph import Attribute, Graph, Node, Value
from neutral.surroundings import Wiring, differing_surroundings

IMAGE = Value(axes=("batch", "channel", "height", "width"), shape=(None, 2, 3, 4))
VECTOR = Value(axes=("batch", "feature"), shape=(None, 24))
Step = tuple[str, dict[str, Attribute], Value] | tuple[str, dict[str, Attribute], Value, str]


def chain(*steps: Step, given: Value = IMAGE) -> Graph:
    """A graph of one line: (operator, attributes, result, layer) each."""
    values, nodes = {"x": given}, []
    for i, (op, attributes, made, *layer) in enumerate(steps):
        before, name = (nodes[-1].name if nodes else "x"), f"n{i}"
        values[name] = made
        own = layer[0] if layer else None
        nodes.append(Node(name=name, op=op, layer=own, inputs=(before,), outputs=(name,), attributes=attributes))
    return Graph(inputs=("x",), outputs=(nodes[-1].name,), values=values, nodes=tuple(nodes))


def compared(a: Graph, b: Graph, last: bool = False, one_order: bool = True) -> tuple[list[str], list[str]]:
    problems, remarks = differing_surroundings(Wiring(a, last), Wiring(b, last), {"fc": "fc"}, one_order)
    return [str(problem) for problem in problems], remarks


FLAT: Step = ("Flatten", {"axis": 1}, VECTOR)
FC: Step = ("Gemm", {}, VECTOR, "fc")
TURNED = Value(axes=("batch", "height", "width", "channel"), shape=(None, 3, 4, 2))
TURN: Step = ("Transpose", {"perm": (0, 2, 3, 1)}, TURNED)


def test_a_transpose_in_front_is_another_order_unless_only_the_graph_has_it() -> None:
    plain, turned = chain(FLAT, FC), chain(TURN, FLAT, FC)
    assert len(compared(plain, turned)[0]) == 1
    assert compared(plain, turned, last=True) == ([], []), "there the image lies turned already"
    assert compared(plain, turned, one_order=False) == ([], [])
    assert compared(turned, turned) == ([], [])


@pytest.mark.parametrize(
    "step",
    [
        ("Transpose", {"perm": (0, 7, 1, 2)}, TURNED),
        ("Transpose", {"perm": ("a", "b")}, TURNED),
        ("Reshape", {}, Value(axes=("batch", "feature"), shape=(None, 7))),
        ("Reshape", {}, Value(axes=("batch", "feature"), shape=(None, 1 << 60))),
        ("Concat", {"axis": 9}, TURNED),
        ("Concat", {"axis": "far"}, TURNED),
        ("Concat", {}, Value(axes=("batch", "feature"))),
    ],
)
def test_what_makes_no_sense_is_not_compared(step: Step) -> None:
    assert compared(chain(FLAT, FC), chain(step, FLAT, FC))[0] == []


def test_a_size_beyond_all_memory_is_not_compared() -> None:
    huge = Value(axes=("batch", "channel", "width"), shape=(None, 1 << 40, 1 << 40))
    turn: Step = ("Transpose", {"perm": (0, 2, 1)}, huge)
    assert compared(chain(FLAT, FC, given=huge), chain(turn, FLAT, FC, given=huge)) == ([], [])


def test_defaults_and_roundings_of_activations_are_equal() -> None:
    said = chain(FC, ("LeakyRelu", {"alpha": 0.01}, VECTOR), given=VECTOR)
    assert compared(said, chain(FC, ("LeakyRelu", {}, VECTOR), given=VECTOR)) == ([], [])
    assert compared(said, chain(FC, ("LeakyRelu", {"alpha": 0.01 + 1e-9}, VECTOR), given=VECTOR)) == ([], [])
    assert (
        "LeakyRelu(alpha=0.02)" in compared(said, chain(FC, ("LeakyRelu", {"alpha": 0.02}, VECTOR), given=VECTOR))[0][0]
    )


def test_a_long_way_is_not_walked_to_its_end() -> None:
    relu: Step = ("Relu", {}, VECTOR)
    assert compared(chain(FC, *[relu] * 5000, given=VECTOR), chain(FC, *[relu] * 5001, given=VECTOR)) == ([], [])


def test_a_layer_that_is_used_twice_is_compared_call_by_call() -> None:
    relu: Step = ("Relu", {}, VECTOR)
    tanh: Step = ("Tanh", {}, VECTOR)
    a, b = (chain(FC, relu, FC, end, given=VECTOR) for end in (relu, tanh))
    assert compared(a, a) == ([], []) and "found Relu behind it" in compared(a, b)[0][0]
