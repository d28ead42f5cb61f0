"""Which layers MLX's names belong to."""

from __future__ import annotations

from neutral.conventions.mlx_names import Place, places, prefix_for, prefix_of


def test_the_list_of_a_sequential_is_left_out_where_it_is_the_model() -> None:
    assert prefix_of(["layers.0.weight", "layers.1.layers.0.weight"]) == "layers."
    assert prefix_of(["layers.0.weight", "head.weight"]) == prefix_of(["layers.name.weight"]) == prefix_of([]) == ""
    assert prefix_for(["0", "2.attention"]) == "layers."
    assert prefix_for(["0", "head"]) == prefix_for(["a.0"]) == prefix_for([""]) == prefix_for([]) == ""
    assert places(["layers.1.layers.0.weight"])["layers.1.layers.0.weight"] == Place("1.layers.0", "weight")
    assert places(["weight"])["weight"] == Place("", "weight")


def test_projections_are_an_attention_only_together() -> None:
    names = [f"a.{part}.weight" for part in ("query_proj", "key_proj", "value_proj", "out_proj")]
    assert {place.path for place in places(names).values()} == {"a"}
    assert places(names[:3])[names[0]] == Place("a.query_proj", "weight")
    assert places([*names, "a.out_proj.scales"])[names[0]] == Place("a.query_proj", "weight")
    assert places(names, [])[names[0]] == Place("a.query_proj", "weight")
