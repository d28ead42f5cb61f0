"""The manifest: strict, frozen, canonical, and as it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from neutral import schema
from neutral.errors import BadFile
from neutral.schema.graph import Graph, Node, Value
from neutral.schema.kinds import KINDS, LABELS, AnyLayer, Dense, Layer, Parameter
from neutral.schema.manifest import FORMAT_VERSION, Manifest, Source, json_schema

ZEROS = "0" * 64
KERNEL = Parameter(axes=("out", "in"), shape=(3, 2), dtype="float32", sha256=ZEROS)
MANIFEST = Manifest(
    source=Source(framework="torch", format="pt"),
    layers=(Dense(path="fc", parameters={"kernel": KERNEL}),),
    weights_digest=ZEROS,
)


def changed(**more: object) -> str:
    return json.dumps({**json.loads(MANIFEST.to_json()), **more})


def test_the_published_schema_is_that_of_the_models() -> None:
    published = Path(schema.__path__[0]) / "manifest.schema.json"
    assert published.read_text("utf-8") == json.dumps(json_schema(), indent=1, sort_keys=True) + "\n", "make schema"


def test_every_kind_is_in_the_union_and_in_the_table() -> None:
    members = get_args(get_args(AnyLayer)[0])
    assert set(members) == set(KINDS.values()) and len(members) == len(KINDS)
    for kind, cls in KINDS.items():
        assert cls.model_fields["kind"].default == kind and issubclass(cls, Layer)
        for role, spec in cls.parameters_of.items():
            assert len(set(spec.axes)) == len(spec.axes), (kind, role)
            assert set(spec.labels) <= set(spec.axes)
            assert all(names == spec.labels[axis] for axis, names in LABELS.items() if axis in spec.labels)


def test_canonical_json_goes_round() -> None:
    text = MANIFEST.to_json()
    found = Manifest.from_json(text)
    assert found.to_json() == text and found.is_of(text) and not found.is_of(text.replace("fc", "fd"))
    assert found == MANIFEST.model_copy(update={"manifest_digest": found.manifest_digest})
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert json.loads(text)["format_version"] == FORMAT_VERSION and "created" not in json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        changed(surprise=1),
        changed(weights_digest="xyz"),
        changed(weights_digest=ZEROS.replace("0", "A")),
        changed(format_version=1.0),
        changed(format_version="one"),
        changed(layers=[{"path": "a", "kind": "nonsense"}]),
        changed(layers=[{"path": "a"}]),
        changed(layers=[{"path": "a", "kind": "dense", "heads": 2}]),
        changed(layers=[{"path": "a", "kind": "dense"}, {"path": "a", "kind": "conv"}]),
        changed(layers=[{"path": 1, "kind": "dense"}]),
        changed(layers=[{"path": "a", "kind": "layer_norm", "eps": "1e-5"}]),
        changed(ordered="yes"),
        changed(notes="a note"),
        changed(source={"framework": "torch"}),
        changed(layers=[{"path": "a", "kind": "dense", "parameters": {"kernel": {"axes": [], "shape": [-1]}}}]),
        MANIFEST.to_json().replace("[3,2]", "[3.0,2]"),
        MANIFEST.to_json().replace("[3,2]", "[true,2]"),
        changed(layers=[{"path": "a", "kind": "layer_norm", "eps": 1}]).replace('"eps": 1', '"eps": NaN'),
    ],
)
def test_what_is_no_manifest_is_a_bad_file(text: str) -> None:
    with pytest.raises(BadFile) as raised:
        Manifest.from_json(text, "x.nwt")
    assert str(raised.value).startswith("x.nwt")


def test_nothing_can_be_changed_behind_its_back() -> None:
    with pytest.raises(ValidationError):
        MANIFEST.weights_digest = "1" * 64  # type: ignore[misc]
    with pytest.raises(ValidationError):
        KERNEL.shape = (1,)  # type: ignore[misc]


def test_names_of_parameters_in_order() -> None:
    assert [(name, p.shape) for name, p in MANIFEST.parameters()] == [("fc/kernel", (3, 2))]


VALUE = Value(axes=("batch", "feature"), shape=(None, 3))


def node(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Node:
    return Node(name=name, op="Relu", inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        ([node("a", ("y",), ("z",))], ("z",), "before it is made"),
        ([node("a", ("x",), ("y",)), node("a", ("y",), ("z",))], ("z",), "two nodes"),
        ([node("a", ("x",), ("y",)), node("b", ("x",), ("y",))], ("y",), "second time"),
        ([node("a", ("x",), ("x",))], ("x",), "second time"),
        ([node("a", ("x",), ("nobody",))], ("nobody",), "without a description"),
        ([], ("z",), "origin"),
    ],
)
def test_a_graph_is_wired_in_order(nodes: list[Node], outputs: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Graph(inputs=("x",), outputs=outputs, values=dict.fromkeys("xyz", VALUE), nodes=tuple(nodes))


def test_a_value_has_one_size_per_axis() -> None:
    with pytest.raises(ValidationError):
        Value(axes=("batch",), shape=(1, 2))
