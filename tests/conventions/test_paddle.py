"""What of paddle's tables no zoo sees: names that repeat, ways to say a padding, what files cannot tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neutral.canon import canonical_layers, recognise
from neutral.conventions.paddle import PADDLE, WEIGHT_NORM_DIM, explicit_pads
from neutral.conventions.paddle_names import Place, places, repeated
from neutral.errors import Refused
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array


def native(cls: str | None = None, config: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> NativeLayer:
    tensors = {name: NativeTensor(name, from_array(np.ones(shape, "f4"))) for name, shape in shapes.items()}
    return NativeLayer("x", cls, tensors, config or {}, "class" if cls else "none")


@pytest.mark.parametrize(
    ("padding", "rank", "last", "pads"),
    [
        (1, 2, False, ((1, 1), (1, 1))),
        ([1, 2], 2, False, ((1, 1), (2, 2))),
        ([3], 2, False, ((3, 3), (3, 3))),
        ([1, 2], 1, False, ((1, 2),)),
        ([0, 1, 2, 3], 2, False, ((0, 1), (2, 3))),
        ([[0, 0], [0, 0], [1, 2], [3, 4]], 2, False, ((1, 2), (3, 4))),
        ([[0, 0], [1, 2], [3, 4], [0, 0]], 2, True, ((1, 2), (3, 4))),
        ("valid", 3, False, ((0, 0),) * 3),
        ("same", 3, False, None),
    ],
)
def test_every_way_to_say_a_padding(padding: Any, rank: int, last: bool, pads: Any) -> None:
    assert explicit_pads(padding, rank, last) == pads


def test_names_that_repeat() -> None:
    found = places(
        ["a.rnn.weight_ih_l1_reverse", "a.rnn.1.cell_bw.weight_ih", "a.rnn.1.cell_fw.weight_ho", "0.cell.weight_ih"]
    )
    assert found["a.rnn.1.cell_bw.weight_ih"].twin == "a.rnn.weight_ih_l1_reverse"
    assert found["a.rnn.1.cell_fw.weight_ho"] == Place("a.rnn", "1.cell_fw.weight_ho")
    # Without a flat name beside it, a cell is a layer of its own.
    assert found["0.cell.weight_ih"] == Place("0.cell", "weight_ih")
    assert places(["weight_ih_l0", "0.cell.weight_ih"])["0.cell.weight_ih"] == Place(
        "", "0.cell.weight_ih", "weight_ih_l0"
    )
    assert repeated(["weight", "weight_ih_l0x"]) == {}


def test_projections_are_an_attention_only_together() -> None:
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    names = [f"a.{part}.{what}" for part in parts for what in ("weight", "bias")]
    assert {place.path for place in places(names).values()} == {"a"}
    assert places(names[:-2])["a.q_proj.bias"] == Place("a.q_proj", "bias")
    assert places([*names, "a.q_proj.scale"])["a.q_proj.bias"] == Place("a.q_proj", "bias")
    assert places(names, {"a": "my.Attention"})["a.q_proj.bias"] == Place("a.q_proj", "bias")


def test_a_hint_makes_four_dense_layers_of_an_attention() -> None:
    layer = native(**{f"{part}.weight": (4, 4) for part in ("q_proj", "k_proj", "v_proj", "out_proj")})
    model = NativeModel("paddle", "pdparams", (layer,))
    assert [each.kind for each in canonical_layers(model, PADDLE)] == ["attention"]
    found = canonical_layers(model, PADDLE, kinds={"x": "dense"})
    assert [(each.path, each.kind) for each in found] == [
        (f"x.{p}", "dense") for p in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]


def test_which_axis_a_magnitude_has() -> None:
    """Known where only one axis is as long; else a live layer or a hint says it."""
    for shapes, magnitude in (
        ({"weight_v": (4, 3), "weight_g": (3,)}, (3, 1)),
        ({"weight_v": (4, 3), "weight_g": (4,)}, (1, 4)),
        ({"weight_v": (5, 3, 2, 2), "weight_g": (5,)}, (5, 1, 1, 1)),
        ({"weight_v": (5, 3, 2), "weight_g": ()}, ()),
    ):
        model = NativeModel("paddle", "pdparams", (native(None, **shapes),))  # type: ignore[arg-type]
        kind = "dense" if len(shapes["weight_v"]) == 2 else "conv"
        (found,) = canonical_layers(model, PADDLE, kinds={"x": kind})
        assert found.tensors["kernel_magnitude"].data.shape == magnitude
    square = {"weight_v": (4, 4), "weight_g": (4,)}
    assert recognise(native(**square), PADDLE).binding is None
    with pytest.raises(Refused, match="without the setting"):
        recognise(native(**square), PADDLE, "dense")
    told = NativeModel("paddle", "pdparams", (native(**square),))
    with pytest.raises(Refused, match=r"weight_norm_dim=0\).*weight_norm_dim=1\)"):
        canonical_layers(told, PADDLE, kinds={"x": "dense"})
    for dim, shape in ((0, (1, 4)), (1, (4, 1))):
        (found,) = canonical_layers(told, PADDLE, kinds={"x": f"dense(weight_norm_dim={dim})"})
        assert found.tensors["kernel_magnitude"].data.shape == shape
        model = NativeModel("paddle", "layer", (native("Linear", {WEIGHT_NORM_DIM: dim}, **square),))
        assert canonical_layers(model, PADDLE)[0].tensors["kernel_magnitude"].data.shape == shape
