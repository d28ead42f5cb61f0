"""Layers are paired in the one way there is, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from neutral.canonical import CanonicalLayer, CanonicalTensor
from neutral.errors import Refused
from neutral.match import Side, conflicts, differing_settings, normalised, pair_layers
from neutral.native import from_array
from neutral.schema.graph import Graph, Node, Value

AXES = {2: ("out", "in"), 1: ("feature",), 4: ("out", "in", "height", "width")}


def layer(
    path: str, kind: str = "dense", attributes: dict[str, object] | None = None, **shapes: tuple[int, ...]
) -> CanonicalLayer:
    tensors = {
        role: CanonicalTensor(from_array(np.zeros(shape, "f4")), AXES.get(len(shape), ("x",) * len(shape)))
        for role, shape in (shapes or {"kernel": (3, 2)}).items()
    }
    return CanonicalLayer(path, kind, tensors, attributes or {}, native_path=path)


def pairs(
    source: list[CanonicalLayer], target: list[CanonicalLayer], chain: bool = False, **more: object
) -> dict[str, str]:
    found = pair_layers(Side(source, chain), Side(target, chain), **more)  # type: ignore[arg-type]
    return {pair.source: pair.target for pair in found.pairs}


def refusal(source: list[CanonicalLayer], target: list[CanonicalLayer], chain: bool = False, **more: object) -> str:
    with pytest.raises(Refused) as raised:
        pairs(source, target, chain, **more)
    return str(raised.value)


def test_names_pair_first_whatever_their_order() -> None:
    source = [layer("model.a"), layer("model.b")]
    assert pairs(source, [layer("B"), layer("A")]) == {"model.a": "A", "model.b": "B"}


def test_what_is_unique_in_kind_and_shapes_needs_no_name() -> None:
    source = [layer("a"), layer("b", kernel=(5, 2)), layer("c", "embedding", embedding=(3, 2))]
    target = [layer("x", "embedding", embedding=(3, 2)), layer("y", kernel=(5, 2)), layer("z")]
    assert pairs(source, target) == {"a": "z", "b": "y", "c": "x"}
    assert pairs(source, target, True) == {"a": "z", "b": "y", "c": "x"}


def test_equal_layers_pair_by_order_only_where_there_is_one() -> None:
    source, target = [layer("a"), layer("b")], [layer("x"), layer("y")]
    assert pairs(source, target, True) == {"a": "x", "b": "y"}
    for one_chain in (
        (Side(source, True), Side(target)),
        (Side(source), Side(target, True)),
        (Side(source), Side(target)),
    ):
        with pytest.raises(Refused) as raised:
            pair_layers(*one_chain)
        assert len(raised.value.problems) == 4
        assert "candidates: x, y" in str(raised.value) and "candidates: a, b" in str(raised.value)


def graph(*edges: tuple[str, str, str]) -> Graph:
    """A graph of dense layers, (layer, input, output) each."""
    value = Value(axes=("batch", "feature"))
    names = {name for _, a, b in edges for name in (a, b)} | {"in"}
    nodes = tuple(
        Node(name=f"n{i}", op="Gemm", layer=of, inputs=(a,), outputs=(b,)) for i, (of, a, b) in enumerate(edges)
    )
    return Graph(inputs=("in",), outputs=(edges[-1][2],), values=dict.fromkeys(names, value), nodes=nodes)


def test_a_graph_orders_what_computes_one_after_the_other() -> None:
    source, target = [layer("a"), layer("b")], [layer("x"), layer("y")]
    line = Side(source, graph=graph(("a", "in", "m"), ("b", "m", "out")))
    same = Side(target, graph=graph(("x", "in", "m"), ("y", "m", "out")))
    fork = Side(target, graph=graph(("x", "in", "m"), ("y", "in", "out")))
    shared = Side(target, graph=graph(("x", "in", "m"), ("x", "m", "n"), ("y", "n", "out")))
    assert {p.source: p.target for p in pair_layers(line, same).pairs} == {"a": "x", "b": "y"}
    for other in (fork, shared):
        with pytest.raises(Refused):
            pair_layers(line, other)


def test_a_group_of_another_size_is_refused() -> None:
    message = refusal([layer("a"), layer("b")], [layer("x"), layer("y"), layer("z")], True)
    assert all(f"{path}: found a dense" in message for path in "abxyz")


def test_equal_names_of_layers_that_cannot_be_equal_are_refused() -> None:
    assert "equal names but kernel (3, 2) against (3, 4)" in refusal([layer("a")], [layer("a", kernel=(3, 4))])
    assert "a dense against a bilinear" in refusal([layer("a")], [layer("a", "bilinear", kernel=(3, 2, 2))])
    assert "no map pairs its projections" in refusal([layer("a")], [layer("a", "attention", query_kernel=(3, 2))])


def three(*names: str) -> list[CanonicalLayer]:
    return [layer(name) for name in names]


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("fc1 fc2 fc3", "fc0 fc1 fc2"),
        ("fc1 fc2", "fc2 fc3"),
        ("enc mid dec", "mid dec fin"),
        ("a.fc b.fc", "b.fc c.fc"),
    ],
)
def test_names_that_are_off_by_one_prove_nothing_of_the_one_that_is_left(ours: str, theirs: str, chain: bool) -> None:
    (left,) = set(ours.split()) - set(theirs.split())
    (right,) = set(theirs.split()) - set(ours.split())
    message = refusal(three(*ours.split()), three(*theirs.split()), chain)
    assert f"{left}: found a dense" in message and f"{right}: found a dense" in message


def test_one_that_names_leave_over_needs_an_order_that_agrees() -> None:
    source, target = three("fc1", "fc2", "head"), three("fc1", "fc2", "out")
    assert pairs(source, target, True) == {"fc1": "fc1", "fc2": "fc2", "head": "out"}
    assert "head: found a dense" in refusal(source, target)
    assert pairs(source, target, mapping={"head": "out"}) == {"fc1": "fc1", "fc2": "fc2", "head": "out"}
    wide = {"kernel": (5, 2)}
    found = pairs([*source[:2], layer("head", **wide)], [*target[:2], layer("out", **wide)])
    assert found == {"fc1": "fc1", "fc2": "fc2", "head": "out"}


def test_every_layer_is_accounted_for() -> None:
    source, target = [layer("a"), layer("old")], [layer("a"), layer("new", kernel=(9, 2))]
    message = refusal(source, target)
    assert "old" in message and "new" in message and "--allow-unused" in message and "--allow-missing" in message
    found = pair_layers(Side(source), Side(target), allow_unused=["o*"], allow_missing=["new"])
    assert found.unused == ("old",) and found.missing == ("new",) and len(found.pairs) == 1
    assert "new" in refusal(source, target, allow_unused=["old"])


def test_a_map_is_obeyed_or_all_its_errors_are_told() -> None:
    source, target = [layer("a"), layer("b")], [layer("a"), layer("b"), layer("c", kernel=(9, 9))]
    assert pairs(source, target[:2], mapping={"a": "b"}, allow_unused=["*"], allow_missing=["*"])["a"] == "b"
    assert pairs(source, target[:2], mapping={"a": "b", "b": "a"}) == {"a": "b", "b": "a"}
    with pytest.raises(Refused) as raised:
        pairs(source, target, mapping={"nobody": "a", "a": "nowhere", "b": "c"})
    assert len(raised.value.problems) == 3
    assert "two layers mapped to it" in refusal(source, target, mapping={"a": "b", "b": "b"})


def test_layers_without_weights_need_no_partner() -> None:
    assert pairs([layer("a"), CanonicalLayer("act", "unknown", {})], [layer("a")]) == {"a": "a"}


def test_numbers_are_names_only_where_both_count_alike() -> None:
    source, target = [layer("0"), layer("1", kernel=(5, 3))], [layer("1"), layer("2", kernel=(5, 3))]
    assert pairs(source, target) == {"0": "1", "1": "2"}
    assert pairs(source, target, alike=True) == {"0": "1", "1": "2"}, "the numbers are shifted, the shapes are not"
    assert "equal names" in refusal(source, [layer("1"), layer("0", kernel=(5, 3))], alike=True)


def test_shifted_numbers_do_not_swap_equal_layers() -> None:
    """A layer more in front: `dense_1` of one model is `dense_2` of the other."""
    source, target = [layer("dense"), layer("dense_1")], [layer("dense_1"), layer("dense_2")]
    assert "candidates" in refusal(source, target, alike=True)
    ordered = pair_layers(Side(source, chain=True), Side(target, chain=True), alike=True)
    assert {pair.source: pair.target for pair in ordered.pairs} == {"dense": "dense_1", "dense_1": "dense_2"}


def test_counted_names_must_not_contradict_the_order_of_computation() -> None:
    source, target = [layer("dense"), layer("dense_1")], [layer("dense_1"), layer("dense")]
    with pytest.raises(Refused, match="contradict the order"):
        pair_layers(Side(source, chain=True), Side(target, chain=True), alike=True)
    named = pair_layers(Side(source), Side(target), alike=True)
    assert {pair.source: pair.target for pair in named.pairs} == {"dense": "dense", "dense_1": "dense_1"}


def test_an_unknown_layer_pairs_with_what_it_can_be() -> None:
    bare = CanonicalLayer("a", "unknown", layer("a", weight=(3, 2)).tensors, candidates=("dense", "embedding"))
    assert not conflicts(bare, layer("a")) and not conflicts(bare, layer("a", "embedding", embedding=(3, 2)))
    assert conflicts(bare, layer("a", kernel=(3, 3))) and conflicts(bare, layer("a", "rms_norm", scale=(6,)))
    assert not conflicts(bare, bare)


def test_depthwise_is_a_convolution_and_a_bias_is_no_conflict() -> None:
    conv = layer("a", "conv", kernel=(4, 1, 2, 2))
    assert not conflicts(conv, layer("a", "depthwise", kernel=(4, 1, 2, 2), bias=(4,)))
    assert conflicts(conv, layer("a", "conv_transpose", kernel=(4, 1, 2, 2)))


@pytest.mark.parametrize(
    ("a", "b"), [("a.b", "A/b"), ("module.a", "a"), ("_orig_mod.module.a", "a"), ("model.net.a", "a"), ("a//b", "a.b")]
)
def test_what_frameworks_add_to_names_does_not_count(a: str, b: str) -> None:
    assert normalised(a) == normalised(b)


def test_names_that_differ_stay_different() -> None:
    assert len({normalised(name) for name in ("a", "a_1", "b.a", "a.b", "model", "amodel", "")}) == 7


def settings(a: dict[str, object], b: dict[str, object], alike: bool = True, kind: str = "dense") -> tuple[int, int]:
    problems, remarks = differing_settings(layer("a", kind, a), layer("a", kind, b), alike)
    return len(problems), len(remarks)


def test_settings_that_change_the_result_are_problems() -> None:
    assert settings({"eps": 1e-5}, {"eps": 1e-3}) == (1, 0)
    assert settings({"eps": 1e-5}, {"eps": 1.0000001e-5}) == (0, 0)
    assert settings({"eps": 1e-5}, {}) == (0, 0)
    assert settings({"strides": (1, 2)}, {"strides": (2, 1)}) == (1, 0)
    assert settings({"strides": [1, 2]}, {"strides": (1, 2)}) == (0, 0)
    assert settings({"reset_after": True}, {"reset_after": False}) == (1, 0)
    assert settings({"heads": 2, "groups": 3}, {"heads": 4, "groups": 1}) == (2, 0)
    assert settings({"padding": "same"}, {"padding": ((0, 0),)}) == (0, 1)
    assert settings({"decay": 0.9}, {"decay": 0.99}) == (0, 1)


def test_an_activation_counts_where_both_wire_it_inside() -> None:
    assert settings({"activation": "relu"}, {"activation": "linear"}) == (1, 0)
    assert settings({"activation": "relu"}, {"activation": "linear"}, alike=False) == (0, 0)
    assert settings({"activation": "relu"}, {"activation": "tanh"}, alike=False, kind="lstm") == (1, 0)


@pytest.mark.parametrize("alike", [True, False])
def test_a_setting_that_only_the_template_says_is_reported_across_frameworks(alike: bool) -> None:
    """`torch.load` and `load_state_dict` take it from the module as well, so within a framework it is no news."""
    problems, remarks = differing_settings(layer("a", "attention", {}), layer("a", "attention", {"heads": 3}), alike)
    assert not problems
    assert remarks == ([] if alike else ["a: the source does not say heads; taken to be 3, as in the template"])


@pytest.mark.parametrize("alike", [True, False])
def test_a_setting_that_only_the_source_says_is_reported_across_frameworks(alike: bool) -> None:
    problems, remarks = differing_settings(layer("a", "group_norm", {"groups": 2}), layer("a", "group_norm", {}), alike)
    assert not problems
    told = "a: the template does not say groups; the other model must have 2, as the source"
    assert remarks == ([] if alike else [told])
