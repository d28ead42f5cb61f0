"""What is known of a layer, what is a candidate, and what must be decided by who knows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from neutral.canon import binding_for, canonical_layers, compatible, native_tensors, read_layers, recognise
from neutral.canonical import CanonicalLayer, CanonicalTensor, fine_axes
from neutral.conventions.keras import KERAS
from neutral.conventions.torch import TORCH
from neutral.errors import Refused
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array


def native(
    path: str, cls: str | None, config: dict[str, object] | None = None, **shapes: tuple[int, ...]
) -> NativeLayer:
    tensors = {
        name.replace("__", "/"): NativeTensor(f"{path}.{name}", from_array(np.arange(np.prod(s, dtype=int), dtype="f4").reshape(s)))
        for name, s in shapes.items()
    }  # fmt: skip
    return NativeLayer(path, cls, tensors, config or {}, "class" if cls else "none")


def torch_model(*layers: NativeLayer, **more: object) -> NativeModel:
    return NativeModel("torch", "pt", layers, **more)  # type: ignore[arg-type]


def one(layer: NativeLayer, **hints: str) -> CanonicalLayer:
    (found,) = canonical_layers(torch_model(layer), TORCH, kinds=hints)
    return found


CONV = native("conv", "Conv2d", weight=(8, 3, 5, 5), bias=(8,))

BARE: list[tuple[dict[str, tuple[int, ...]], set[str]]] = [
    ({"weight": (4, 3)}, {"dense", "embedding", "layer_norm", "rms_norm"}),
    ({"weight": (4, 3), "bias": (4,)}, {"dense"}),
    ({"weight": (4, 3), "bias": (4, 3)}, {"layer_norm"}),
    ({"weight": (4,), "bias": (4,)}, {"batch_norm", "layer_norm", "group_norm", "instance_norm"}),
    ({"weight": (4,)}, {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu"}),
    ({"weight": (8, 3, 5, 5)}, {"conv", "conv_transpose", "layer_norm", "rms_norm"}),
    ({"weight": (8, 3, 5, 5), "bias": (8,)}, {"conv"}),
    ({"weight": (8, 3, 5, 5), "bias": (3,)}, {"conv_transpose"}),
    ({"weight": (8, 4, 5, 5), "bias": (8,)}, {"conv", "conv_transpose"}),
    ({"weight": (8, 8, 5, 5), "bias": (8,)}, {"conv", "conv_transpose"}),
    ({"weight": (8, 3, 5), "bias": (8,)}, {"conv", "bilinear"}),
    ({"weight_ih": (8, 3), "weight_hh": (8, 2)}, {"lstm"}),
    ({"weight_ih": (6, 3), "weight_hh": (6, 2)}, {"gru"}),
    ({"weight_ih": (2, 3), "weight_hh": (2, 2)}, {"simple_rnn"}),
    ({"weight_ih": (8, 3), "weight_hh": (8, 3)}, set()),
    ({"what": (3,)}, set()),
]


@pytest.mark.parametrize(("shapes", "kinds"), BARE)
def test_a_bare_layer_is_what_all_its_tensors_fit(shapes: dict[str, tuple[int, ...]], kinds: set[str]) -> None:
    found = one(native("x", None, **shapes))
    if len(kinds) == 1:
        assert {found.kind} == kinds and found.evidence == "name" and not found.candidates
    else:
        assert found.kind == "unknown" and set(found.candidates) == kinds
        for local, shape in shapes.items():
            assert found.tensors[local].data.shape == shape, "the source's own names and axes"


def test_a_hint_decides_and_must_fit() -> None:
    bare = native("x", None, weight=(4, 3))
    for kind, role in (("dense", "kernel"), ("embedding", "embedding"), ("rms_norm", "scale")):
        found = one(bare, x=kind)
        assert found.kind == kind and found.evidence == "hint" and role in found.tensors
    with pytest.raises(Refused, match="those of a conv as torch stores it"):
        one(bare, x="conv")
    with pytest.raises(Refused, match="no such layer"):
        one(bare, y="dense")
    assert one(bare, **{"?": "dense"}).kind == "dense"


def test_a_class_that_nobody_knows_stays_unknown() -> None:
    found = one(native("x", "my.Layer", weight=(4, 3), bias=(4,)))
    assert found.kind == "unknown" and not found.candidates and found.native == "my.Layer"
    found = one(native("x", "Linear", weight=(4, 3, 2)))
    assert found.kind == "unknown", "a Linear of three axes is none"


def test_state_is_no_weight() -> None:
    layer = native("x", "BatchNorm1d", weight=(3,), bias=(3,), running_mean=(3,), running_var=(3,))
    counter = NativeTensor("x.num_batches_tracked", from_array(np.array(7)), state=True)
    layer = NativeLayer("x", layer.cls, {**layer.tensors, "num_batches_tracked": counter}, {}, "class")
    found = one(layer)
    assert found.kind == "batch_norm" and found.weights.keys() == {"scale", "bias", "mean", "variance"}
    assert found.tensors["num_batches_tracked"].state


@pytest.mark.parametrize(
    ("config", "weight", "kind"),
    [
        ({"stride": 1, "groups": 1}, (4, 1, 2), "conv"),
        ({"stride": 1, "groups": 4}, (4, 1, 2), "depthwise"),
        ({"stride": 1, "groups": 2}, (4, 2, 2), "conv"),
        ({}, (4, 1, 2), "conv"),
    ],
)
def test_one_kind_for_one_computation(config: dict[str, object], weight: tuple[int, ...], kind: str) -> None:
    assert one(native("x", "Conv1d", config, weight=weight)).kind == kind


def test_as_many_groups_as_channels_is_an_instance_norm() -> None:
    assert one(native("x", "GroupNorm", {"num_groups": 4}, weight=(4,), bias=(4,))).kind == "instance_norm"
    assert one(native("x", "GroupNorm", {"num_groups": 2}, weight=(4,), bias=(4,))).kind == "group_norm"
    assert compatible("group_norm", "instance_norm") and not compatible("dense", "conv")


# --- Flatten ---


def test_behind_a_convolution_a_dense_layer_is_undecided() -> None:
    fc = native("fc", "Linear", weight=(10, 72), bias=(10,))
    conv, found = canonical_layers(torch_model(CONV, fc), TORCH)
    assert not conv.undecided and found.undecided == ("in", "out") and not found.channels
    (alone,) = canonical_layers(torch_model(fc), TORCH)
    assert not alone.undecided
    wide = native("conv", "Conv2d", weight=(96, 80, 5, 5))
    _, found = canonical_layers(torch_model(wide, fc), TORCH)
    assert not found.undecided, "72 elements are fewer than its channels"


@pytest.mark.parametrize("as_graph", [True, False])
def test_who_knows_the_flatten_decides(as_graph: bool) -> None:
    layers = (CONV, native("fc", "Linear", weight=(10, 72)), native("head", "Linear", weight=(10, 72)))
    known = {"fc": {"in": 8}, "head": {}}
    model = torch_model(*layers, splits=known if as_graph else {})
    _, fc, head = canonical_layers(model, TORCH, flatten=None if as_graph else known)
    assert fc.channels == {"in": 8} and not fc.undecided
    assert not head.channels and not head.undecided
    assert fine_axes(fc, fc.tensors["kernel"]) == ((("out", 10),), (("channel", 8), ("position", 9)))


def test_a_layer_that_is_not_named_crosses_none_only_if_it_follows_the_one_before() -> None:
    fc, after = native("fc", "Linear", weight=(10, 72)), native("after", "Linear", weight=(9, 10))
    model = torch_model(CONV, fc, after, native("other", "Linear", weight=(5, 72)))
    *_, plain, open_one = canonical_layers(model, TORCH, flatten={"fc": {"in": 8}})
    assert not plain.undecided and open_one.undecided == ("in",)
    assert not any(layer.undecided or layer.channels for layer in canonical_layers(model, TORCH, flatten={}))


def test_a_norm_behind_a_flatten_may_have_as_many_features_as_a_convolution_has_channels() -> None:
    first, second = native("c1", "Conv2d", weight=(16, 3, 3, 3)), native("c2", "Conv2d", weight=(4, 16, 3, 3))
    four = {"weight": (16,), "bias": (16,), "running_mean": (16,), "running_var": (16,)}
    norm, fc = native("bn", "BatchNorm1d", **four), native("fc", "Linear", weight=(5, 16))
    assert canonical_layers(torch_model(first, second, norm, fc), TORCH)[2].undecided == ("feature",)
    assert canonical_layers(torch_model(first, second, norm, fc), TORCH, flatten={"fc": {"in": 4}})[2].undecided
    assert not canonical_layers(torch_model(first, norm, second), TORCH)[1].undecided


def test_channels_must_divide() -> None:
    model = torch_model(CONV, native("fc", "Linear", weight=(10, 72)))
    for wrong in ({"in": 7}, {"in": 0}, {"in": -8}, {"feature": 8}):
        with pytest.raises(Refused, match="fc"):
            canonical_layers(model, TORCH, flatten={"fc": wrong})
    with pytest.raises(Refused, match="no such layer"):
        canonical_layers(model, TORCH, flatten={"fc9": {"in": 8}})
    (_, trivial) = canonical_layers(model, TORCH, flatten={"fc": {"in": 72}})
    assert not trivial.channels, "as many channels as elements: one position"


def test_keras_flattens_the_other_way() -> None:
    positions, channels, units = 6, 4, 3
    kernel = np.arange(72, dtype="f4").reshape(positions * channels, units)
    layer = NativeLayer("fc", "Dense", {"kernel": NativeTensor("k", from_array(kernel))}, {}, "class")
    (found,) = canonical_layers(NativeModel("keras", "h5", (layer,)), KERAS, flatten={"fc": {"in": channels}})
    wanted = kernel.reshape(positions, channels, units).transpose(2, 1, 0).reshape(units, -1)
    assert np.array_equal(found.tensors["kernel"].data.read(), wanted)
    binding = binding_for([found], "Linear", TORCH, {})
    assert not isinstance(binding, str)
    assert np.array_equal(native_tensors(binding, [found], TORCH, where="fc").tensors["weight"].read(), wanted)
    binding = binding_for([found], "Dense", KERAS, {})
    assert not isinstance(binding, str)
    assert np.array_equal(native_tensors(binding, [found], KERAS, where="fc").tensors["kernel"].read(), kernel)


# --- into a template ---


def dense(dtype: object = np.float32, bias: float | None = 0.5) -> CanonicalLayer:
    tensors = {"kernel": CanonicalTensor(from_array(np.ones((3, 2), dtype)), ("out", "in"))}
    if bias is not None:
        tensors["bias"] = CanonicalTensor(from_array(np.full(3, bias, dtype)), ("out",))
    return CanonicalLayer("fc", "dense", tensors)


def into(layer: CanonicalLayer, cast: bool = False, **template: np.ndarray):  # type: ignore[no-untyped-def]
    want = {name: NativeTensor(name, from_array(a)) for name, a in template.items()}
    ((known, _),) = read_layers(torch_model(NativeLayer("t", "Linear", want, {}, "class")), TORCH)
    assert known.binding is not None
    return native_tensors(known.binding, [layer], TORCH, where="t", want=want, cast=cast)


def test_what_one_side_does_without_is_neutral_or_refused() -> None:
    weight, bias = np.zeros((3, 2), "f4"), np.ones(3, "f4")
    added = into(dense(bias=None), weight=weight, bias=bias)
    assert not added.tensors["bias"].read().any() and [rule for rule, *_ in added.applied] == ["default"]
    dropped = into(dense(bias=0.0), weight=weight)
    assert not dropped.problems and [rule for rule, *_ in dropped.applied] == ["drop_default"]
    refused = into(dense(bias=1e-30), weight=weight)
    assert refused.problems and "bias" in refused.problems[0].found


def test_dtypes_are_widened_freely_and_narrowed_only_when_asked() -> None:
    half, full = np.zeros((3, 2), "f2"), np.zeros((3, 2), "f4")
    wide = into(dense("f2", None), weight=full)
    assert wide.tensors["weight"].dtype == "f4" and [rule for rule, *_ in wide.applied] == ["widen"] and not wide.losses
    refused = into(dense("f4", None), weight=half)
    assert "--cast" in refused.problems[0].do and "weight" not in refused.tensors
    narrow = into(dense("f4", None), True, weight=half)
    assert narrow.tensors["weight"].dtype == "f2" and [rule for rule, *_ in narrow.losses] == ["narrow"]
    for source, target in (("f2", ml_dtypes.bfloat16), (ml_dtypes.bfloat16, "f2"), ("i8", "f8"), ("f8", "i8")):
        assert into(dense(source, None), weight=np.zeros((3, 2), target)).problems, (source, target)


def test_shapes_must_be_equal() -> None:
    result = into(dense(), weight=np.zeros((3, 5), "f4"), bias=np.zeros(3, "f4"))
    assert result.problems and "weight" not in result.tensors
    transposed = into(dense(), weight=np.zeros((2, 3), "f4"), bias=np.zeros(2, "f4"))
    assert transposed.problems


def test_a_keras_gru_goes_only_where_its_reset_gate_acts() -> None:
    arrays = {"kernel": np.zeros((3, 6), "f4"), "recurrent_kernel": np.zeros((2, 6), "f4"), "bias": np.ones(6, "f4")}
    tensors = {name: NativeTensor(name, from_array(a)) for name, a in arrays.items()}
    model = NativeModel("keras", "h5", (NativeLayer("x", "GRU", tensors, {}, "class"),))
    (before,) = canonical_layers(model, KERAS)
    assert before.attributes["reset_after"] is False
    refused = binding_for([before], "GRU", TORCH, {})
    assert isinstance(refused, str) and "reset" in refused
    assert not isinstance(binding_for([before], "GRU", KERAS, {}), str)


def test_tensors_of_one_parameter_have_one_dtype() -> None:
    tensors = {
        name: NativeTensor(name, from_array(np.zeros(shape, dtype)))
        for name, shape, dtype in (
            ("weight_ih_l0", (8, 3), "f4"),
            ("weight_hh_l0", (8, 2), "f4"),
            ("bias_ih_l0", (8,), "f4"),
            ("bias_hh_l0", (8,), "f2"),
        )
    }
    with pytest.raises(Refused, match="several dtypes"):
        canonical_layers(torch_model(NativeLayer("x", "LSTM", tensors, {}, "class")), TORCH)


def _bare(path: str, kernel: tuple[int, ...], bias: tuple[int, ...]) -> NativeLayer:
    shapes = {"kernel": kernel, "bias": bias}
    tensors = {name: NativeTensor(f"{path}/{name}", from_array(np.zeros(shape))) for name, shape in shapes.items()}
    return NativeLayer(path, None, tensors)


def test_a_square_kernel_without_class_is_no_einsum_by_name_or_hint() -> None:
    """Its equation says which axis is which; a rectangular one tells by its bias."""
    square = _bare("einsum_dense", (4, 4), (4,))
    assert recognise(square, KERAS).candidates == ("dense", "einsum_dense")
    with pytest.raises(Refused, match="the setting that says what their axes are"):
        recognise(square, KERAS, "einsum_dense")
    known = recognise(square, KERAS, "dense").binding
    assert known is not None and known.form.classes == ("Dense",)
    turned = recognise(_bare("layer", (5, 3), (5,)), KERAS, "einsum_dense").binding
    assert turned is not None and turned.form.classes == ("EinsumDense",)
