"""Layers out of names alone, held against what torch's own modules name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import neutral
from neutral.errors import Refused
from neutral.exporters.state_dict import ModuleClass, common_prefix, layers_from_state_dict
from neutral.native import NativeTensor, from_array


def tensors(*names: str) -> dict[str, NativeTensor]:
    return {name: NativeTensor(name, from_array(np.zeros(2))) for name in names}


def grouped(module: nn.Module) -> dict[str, list[str]]:
    return {layer.path: list(layer.tensors) for layer in layers_from_state_dict(tensors(*module.state_dict()))}


def test_layers_are_in_the_order_of_their_first_tensors() -> None:
    layers = layers_from_state_dict(tensors("b.weight", "a.weight", "b.bias", "c.d.e.weight", "scale"))
    assert [(layer.path, list(layer.tensors)) for layer in layers] == [
        ("b", ["weight", "bias"]),
        ("a", ["weight"]),
        ("c.d.e", ["weight"]),
        ("", ["scale"]),
    ]
    assert {(layer.cls, layer.evidence) for layer in layers} == {(None, "none")}


def test_prefixes_go_only_when_every_name_has_them() -> None:
    assert [layer.path for layer in layers_from_state_dict(tensors("module.a.w", "module.b.w"))] == ["a", "b"]
    assert [layer.path for layer in layers_from_state_dict(tensors("module.a.w", "b.w"))] == ["module.a", "b"]
    (layer,) = layers_from_state_dict(tensors("_orig_mod.module.fc.weight"))
    assert layer.path == "fc" and layer.tensors["weight"].name == "_orig_mod.module.fc.weight"
    assert common_prefix([]) == ""
    assert common_prefix(["modules.a"]) == ""


def test_attention_keeps_its_out_proj() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.MultiheadAttention(4, 2)
            self.two = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
            self.three = nn.MultiheadAttention(4, 2, bias=False)
            self.own = nn.ModuleDict({"q": nn.Linear(4, 4), "out_proj": nn.Linear(4, 4)})

    groups = grouped(Block())
    assert groups["one"] == ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert groups["two"][:3] == ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert groups["two"][-2:] == ["out_proj.weight", "out_proj.bias"]
    assert groups["three"] == ["in_proj_weight", "out_proj.weight"]
    assert list(groups)[3:] == ["own.q", "own.out_proj"]
    assert grouped(nn.MultiheadAttention(4, 2)) == {"": groups["one"]}


def test_a_known_class_that_is_no_attention_keeps_its_child_apart() -> None:
    names = tensors("a.in_proj_weight", "a.out_proj.weight")
    classes = {"a": ModuleClass("my.Attention"), "a.out_proj": ModuleClass("Linear")}
    assert [layer.path for layer in layers_from_state_dict(names, classes)] == ["a", "a.out_proj"]
    classes["a"] = ModuleClass("MultiheadAttention", {"num_heads": 2})
    (layer,) = layers_from_state_dict(names, classes)
    assert (layer.cls, layer.evidence, layer.config["num_heads"]) == ("MultiheadAttention", "class", 2)


def test_parametrizations_belong_to_the_layer() -> None:
    module = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    )
    assert grouped(module) == {
        "0": ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"],
        "1": ["bias", "parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"],
    }  # fmt: skip
    alone = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    assert list(grouped(alone)) == [""]


def test_counters_are_state() -> None:
    (layer,) = layers_from_state_dict(tensors(*nn.BatchNorm1d(2).state_dict()))
    assert [name for name, tensor in layer.tensors.items() if tensor.state] == ["num_batches_tracked"]


@pytest.mark.parametrize("name", ["", "a.", "a\ud800.weight"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(Refused):
        layers_from_state_dict(tensors(name))


def test_every_name_of_a_real_model_is_accounted_for() -> None:
    model = torch.nn.Transformer(8, 2, 2, 2, 16)
    layers = layers_from_state_dict(tensors(*model.state_dict()))
    assert [t.name for layer in layers for t in layer.tensors.values()] == list(model.state_dict())
    assert all(
        (f"{layer.path}." if layer.path else "") + local == t.name
        for layer in layers
        for local, t in layer.tensors.items()
    )


def test_square_layers_beside_turned_ones_are_not_taken_for_linear(tmp_path: Path) -> None:
    """GPT-2's layers are (in, out) under torch's names; of a square one nothing tells."""
    import keras

    state = {
        "attn.c_attn.weight": torch.randn(4, 12), "attn.c_attn.bias": torch.randn(12),
        "attn.c_proj.weight": torch.randn(4, 4), "attn.c_proj.bias": torch.randn(4),
    }  # fmt: skip
    torch.save(state, tmp_path / "gpt2.pt")
    with neutral.export_model(tmp_path / "gpt2.pt") as archive:
        assert [layer.kind for layer in archive.layers] == ["unknown", "unknown"]
    neutral.convert(tmp_path / "gpt2.pt", tmp_path / "again.safetensors")
    template = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="c_proj")])
    template.save(tmp_path / "template.keras")
    torch.save({name: state[name] for name in ("attn.c_attn.weight", "attn.c_attn.bias")}, tmp_path / "turned.pt")
    with pytest.raises(Refused, match="c_proj"):
        neutral.convert(
            tmp_path / "gpt2.pt",
            tmp_path / "out.keras",
            into=tmp_path / "template.keras",
            mapping={"attn.c_proj": "c_proj"},
            allow_unused=["attn.c_attn"],
        )
    square = {name: state[name] for name in ("attn.c_proj.weight", "attn.c_proj.bias")}
    torch.save(square, tmp_path / "square.pt")
    with neutral.export_model(tmp_path / "square.pt") as archive:
        assert [layer.kind for layer in archive.layers] == ["dense"]
