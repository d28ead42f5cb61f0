"""Every row of every table: it parses, its two directions are inverse, and no form takes what is another's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neutral.canon import bind, deciding, native_tensors, read_layers, row_layout, source_binding
from neutral.canonical import CanonicalLayer
from neutral.conventions.forms import (
    LETTERS,
    Convention,
    Form,
    Part,
    Row,
    brace_axes,
    expand,
    layer,
    role_expression,
)
from neutral.conventions.keras import KERAS, einsum_forms
from neutral.conventions.numpy import NUMPY
from neutral.conventions.tensorflow import TENSORFLOW
from neutral.conventions.torch import TORCH
from neutral.layout import parse
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
from neutral.schema.kinds import KINDS

CONVENTIONS = (TORCH, KERAS, NUMPY)
RAW = {"kernel_magnitude", "kernel_u", "kernel_v"}
REPARAMETRIZED = {"kernel_direction", "kernel_raw"}

EQUATIONS = (
    ("ab,bc->ac", "c"),
    ("abc,cd->abd", "d"),
    ("abc,cde->abde", "de"),
    ("abde,dec->abc", "c"),
    ("...x,xy->...y", "y"),
    ("abc,dc->abd", None),
    ("abc,bd->adc", None),
    ("abc,bcd->abd", None),
)


def built() -> Iterator[tuple[Convention, Form, dict[str, object]]]:
    for convention in CONVENTIONS:
        for form in convention.forms:
            yield convention, form, {}
    for equation, bias_axes in EQUATIONS:
        config = {"equation": equation, "bias_axes": bias_axes}
        for form in einsum_forms("EinsumDense", config):
            yield KERAS, form, config


FORMS = [
    pytest.param(*each, id=f"{each[0].framework}-{i}-{each[1].classes[0]}")
    for i, each in enumerate(built())
    if each[1].applies({})
]
"""All but those that no layer of a known class has."""

PARTS = [(part, form) for _, form, _ in built() for part in form.parts]


def axis_names(expression: str) -> list[str]:
    return [axis.name for group in parse(expression) for axis in group]


def letters(expression: str) -> dict[str, str]:
    return {axis.name: axis.letters for group in parse(expression) for axis in group if axis.letters}


def native_shape(row: Row, sizes: dict[str, int], spatial: tuple[int, ...]) -> tuple[int, ...]:
    out: list[int] = []
    for group in parse(row.native):
        if [axis.name for axis in group] == ["..."]:
            out.extend(spatial)
        else:
            out.append(math.prod(len(axis.letters) or sizes[axis.name] for axis in group))
    return tuple(out)


def draw_sizes(draw: st.DrawFn, part: Part) -> dict[str, int]:
    """Sizes that can be true: states as wide as there are units, groups that divide."""
    names = {name for row in part.rows if not row.raw for name in axis_names(row.native) if name != "..."}
    sizes = {name: draw(st.integers(2, 5)) for name in sorted(names)}
    sizes |= {name: n for row in part.rows for name, n in brace_axes(row.role)}
    if "direction" in sizes:
        sizes["direction"] = 2
    if "hidden" in sizes and not any(row.role == "projection" for row in part.rows):
        sizes["hidden"] = sizes["unit"]
    if part.kind == "conv_transpose" and "channel" in sizes:
        sizes["channel"] = sizes["out"]
    if part.kind == "depthwise" and "channel" in sizes and "group" in sizes:
        sizes["channel"] = sizes["group"] * sizes["mult"]
    return sizes


def draw_tensors(draw: st.DrawFn, form: Form, all_rows: bool) -> dict[str, np.ndarray]:
    """Arrays of distinct elements under the local names of a form, optional ones left out at will."""
    tensors: dict[str, np.ndarray] = {}
    shared: dict[str, int] = {}
    for part in form.parts:
        sizes = {**draw_sizes(draw, part), **shared}
        spatial = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
        levels = draw(st.integers(1, 3)) if form.levels else 1
        rows = [row for row in part.rows if row.required or all_rows or draw(st.booleans())] or [part.rows[0]]
        for level in range(levels):
            for row in rows:
                for name in expand(row.name, level):
                    shape = (3, 1) if row.raw else native_shape(row, sizes, spatial)
                    start = sum(array.size for array in tensors.values())
                    count = math.prod(shape)
                    tensors[name.text] = np.arange(start, start + count, dtype=np.int64).reshape(shape)
    return tensors


def model_of(
    form: Form, convention: Convention, config: dict[str, object], arrays: dict[str, np.ndarray]
) -> NativeModel:
    tensors = {name: NativeTensor(f"x/{name}", from_array(array)) for name, array in arrays.items()}
    one = NativeLayer("x", form.classes[0], tensors, config, "class")
    return NativeModel(convention.framework, "any", (one,))


def canonical(
    form: Form, convention: Convention, config: dict[str, object], arrays: dict[str, np.ndarray]
) -> list[CanonicalLayer]:
    ((_, layers),) = read_layers(model_of(form, convention, config, arrays), convention)
    return layers


@pytest.mark.parametrize(("part", "form"), PARTS, ids=lambda each: getattr(each, "kind", ""))
def test_every_row_is_one_of_its_kind(part: Part, form: Form) -> None:
    spec = KINDS[part.kind].parameters_of
    for row in part.rows:
        for role in expand(row.role):
            assert role.text in spec or role.text in RAW | REPARAMETRIZED or row.raw
        if row.raw:
            assert not row.native and not row.canonical
            continue
        way = row_layout(row, part.kind)
        assert sorted(axis_names(way.canonical)) == sorted(axis_names(way.native))
        found, wanted = letters(way.native), letters(way.canonical)
        assert {name: sorted(text) for name, text in found.items()} == {n: sorted(t) for n, t in wanted.items()}
        if row.role in spec:
            own = letters(role_expression(part.kind, row.role))
            assert {name: text for name, text in wanted.items() if name in own}.items() <= own.items()
            if spec[row.role].required:
                assert row.required, "a form without a required role would accept half a layer"
    required = {role for role, role_spec in spec.items() if role_spec.required}
    mine = {name.text for row in part.rows for name in expand(row.role)} | RAW
    assert required - {"kernel"} <= mine and ("kernel" not in required or mine & ({"kernel"} | REPARAMETRIZED))
    names = [name.text for row in part.rows for name in expand(row.name)]
    assert len(set(names)) == len(names), "two rows of one tensor"


@pytest.mark.parametrize(("convention", "form", "config"), FORMS)
def test_there_and_back_is_the_same_to_the_bit(convention: Convention, form: Form, config: dict[str, object]) -> None:
    @settings(max_examples=12, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        arrays = draw_tensors(data.draw, form, data.draw(st.booleans()))
        bound = bind(form, {name: array.shape for name, array in arrays.items()})
        assert not isinstance(bound, str), bound
        layers = canonical(form, convention, config, arrays)
        for each in layers:
            assert each.kind != "unknown"
            for role, tensor in each.tensors.items():
                assert len(tensor.axes) == len(tensor.data.shape)
                for axis, names in tensor.labels.items():
                    assert tensor.data.shape[tensor.axes.index(axis)] == len(names)
                assert role not in KINDS[each.kind].parameters_of or tensor.data.size
        ((known, _),) = read_layers(model_of(form, convention, config, arrays), convention)
        told = deciding(known, convention)
        back = source_binding(layers, convention, told.get("config"), told.get("sizes"))
        assert back is not None
        written = native_tensors(back, layers, convention, where="x")
        assert not written.problems and not written.losses and not written.applied
        assert written.tensors.keys() == arrays.keys()
        for name, array in arrays.items():
            assert np.array_equal(written.tensors[name].read(), array), name

    check()


def values(layers: list[CanonicalLayer]) -> list[tuple[str, dict[str, object]]]:
    return [(each.kind, {role: t.data.read().tolist() for role, t in each.tensors.items()}) for each in layers]


FIRST_WINS = {
    ("PReLU", "1 feature", "w feature"),
    ("PReLU", "1 1 feature", "h w feature"),
    ("PReLU", "1 1 1 feature", "d h w feature"),
}
"""One slope per channel may be stored with axes of size one; an input of one position is the same."""


@pytest.mark.parametrize(("convention", "form", "config"), FORMS)
def test_two_forms_of_a_class_read_the_same_or_not_at_all(
    convention: Convention, form: Form, config: dict[str, object]
) -> None:
    """What a later form is for is read by no earlier one in another way."""

    @settings(max_examples=8, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        arrays = draw_tensors(data.draw, form, data.draw(st.booleans()))
        shapes = {name: array.shape for name, array in arrays.items()}
        mine = None
        for other in convention.forms:
            if other is form or not other.applies({}) or not set(other.classes) & set(form.classes):
                continue
            bound = bind(other, shapes)
            pair = (form.classes[0], other.parts[0].rows[0].native, form.parts[0].rows[0].native)
            if isinstance(bound, str) or pair in FIRST_WINS or pair[::2] + pair[1:2] in FIRST_WINS:
                continue
            alone = [Convention(convention.framework, (f,), convention.flatten) for f in (form, other)]
            mine = mine or values(canonical(form, alone[0], config, arrays))
            assert values(canonical(form, alone[1], config, arrays)) == mine, (form, other)

    check()


@pytest.mark.parametrize(("convention", "form", "config"), FORMS)
def test_attributes_are_those_of_the_kind(convention: Convention, form: Form, config: dict[str, object]) -> None:
    """Where no config is known nothing is invented, and no name is one that the kind does not have."""

    @settings(max_examples=3, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        arrays = draw_tensors(data.draw, form, True)
        bound = bind(form, {name: array.shape for name, array in arrays.items()})
        assert not isinstance(bound, str)
        for each in bound.parts:
            found = each.part.attributes(config, each.sizes)
            assert found.keys() <= KINDS[each.part.kind].model_fields.keys()
            assert not {"eps", "strides", "dilation", "padding"} & {k for k, v in found.items() if v is not None} or (
                form.parts[0].suffix or each.part.kind in ("depthwise", "rms_norm")
            )

    check()


def test_a_form_without_its_required_tensors_does_not_bind() -> None:
    for _, form, _ in built():
        for part in form.parts:
            for row in part.rows:
                if row.required:
                    name = expand(row.name)[0].text
                    others = {n.text: (2,) for r in part.rows for n in expand(r.name) if n.text != name}
                    assert isinstance(bind(form, others), str)
        assert isinstance(bind(form, {}), str)
        assert isinstance(bind(form, {"what is this": (1,)}), str)


def test_letters_name_the_labels_of_every_kind() -> None:
    for kind, cls in KINDS.items():
        for role, spec in cls.parameters_of.items():
            expression = role_expression(kind, role)
            assert axis_names(expression) == list(spec.axes)
            for axis, labels in spec.labels.items():
                assert letters(expression)[axis] == "".join(LETTERS[label] for label in labels)
                assert len({LETTERS[label] for label in labels}) == len(labels)


def test_names_with_braces() -> None:
    found = [(name.text, name.place) for name in expand("w{a:x|y}_{level}{b:|_r}", 3)]
    assert found == [("wx_3", (0, 0)), ("wx_3_r", (0, 1)), ("wy_3", (1, 0)), ("wy_3_r", (1, 1))]
    assert brace_axes("w{a:x|y}_{level}{b:|_r}") == (("a", 2), ("b", 2))
    assert expand("plain") == expand("plain", 9) and brace_axes("plain") == ()


def test_a_part_knows_what_its_kind_requires() -> None:
    part = layer("dense", Row("kernel", "k", "in out"), Row("bias", "b", "out"))
    assert [row.required for row in part.rows] == [True, False]


def test_tensorflow_is_keras() -> None:
    assert TENSORFLOW.forms is KERAS.forms and TENSORFLOW.flatten == KERAS.flatten == "position channel"
    assert TORCH.flatten == NUMPY.flatten == "channel position"


def test_names_that_keras_gives_by_itself() -> None:
    known = KERAS.auto_names
    assert known["dense"] == "Dense" and known["conv2d_transpose"] == "Conv2DTranspose"
    assert known["multi_head_attention"] == "MultiHeadAttention" and known["p_re_lu"] == "PReLU"
    assert known["lstm"] == "LSTM" and known["gru"] == "GRU" and known["simple_rnn"] == "SimpleRNN"
