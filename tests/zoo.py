"""One tiny model per layer kind, described side by side for each framework; data only, no framework is imported.

The models of one case compute the same function when they hold the same weights. So: build and save the model of
framework S, convert its file into a template of framework T, run the result in T, compare the two outputs.

>>> case = cases()["conv2d_same_even"]
>>> sorted(case.models)
['keras', 'tensorflow', 'torch']
>>> case.models["torch"].inputs, case.models["keras"].inputs
(('nchw',), ('nhwc',))
>>> [array.shape for array in make_inputs(case, seed=1)]
[(8, 2, 5, 6)]

`cases()` has no two dimensions equal in any weight, as far as the kind allows it; `cases(equal=True)` has every
dimension equal, and there shapes catch nothing. Inputs and outputs are exchanged in the canonical axes of the case
(channels first); each runner transposes to the axes of its own model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

FRAMEWORKS = ("torch", "keras", "tensorflow")
FORMATS: dict[str, tuple[str, ...]] = {
    "torch": ("state", "module", "safetensors", "legacy_state", "legacy_module"),
    "keras": ("keras", "weights_h5", "h5"),
    "tensorflow": ("checkpoint", "saved_model", "plain_saved_model"),
}
DEFAULT_FORMATS: dict[str, tuple[str, ...]] = {
    "torch": ("state",),
    "keras": ("keras",),
    "tensorflow": ("checkpoint",),
}
RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
ABSENT = "the framework has no such layer"


@dataclass(frozen=True)
class Layer:
    """One row of a model: a layer class of the framework by name, its arguments, and what it is applied to.

    `of` names earlier rows or inputs (`x0`, `x1`); empty means the row before. `inside` holds the layers of a
    container or wrapper. `wrap` names a torch weight reparametrization with its options.
    """

    name: str
    cls: str
    args: dict[str, Any]
    inside: tuple[Layer, ...] = ()
    of: tuple[str, ...] = ()
    wrap: tuple[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Input:
    """A canonical input: axis letters (n batch, c channels, t time, l / h w / d h w space) and sizes."""

    axes: str
    shape: tuple[int, ...]
    below: int = 0  # positive: integers below this number


@dataclass(frozen=True)
class Model:
    """How one framework builds the case: the runner's builder, its rows, and the axes of inputs and output."""

    builder: str  # "sequential", "graph" or "subclassed"
    layers: tuple[Layer, ...]
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Case:
    """One kind of layer in every framework that has it.

    `refusals`: pairs (source, target) that must be refused, with a word of the reason. `may_refuse`: pairs in which a
    refusal is acceptable, but a result must be right. `absent`: frameworks without the layer, and why. `stacks`:
    torch layer -> the several Keras layers it equals, in order; every other layer has the same path in all frameworks
    (`a.b` in torch, `a/b` in Keras). `flatten`: torch layer after a flattened feature map -> number of channels;
    `unflatten`: torch layer before its features become a feature map -> number of channels. `blind`: tensors that no forward pass can see, by framework; compare these by value.
    `parts`: the cases that a model of several was put together from, see `together`.
    """

    name: str
    kind: str
    inputs: tuple[Input, ...]
    output: str
    models: dict[str, Model]
    refusals: dict[tuple[str, str], str] = field(default_factory=dict)
    may_refuse: frozenset[tuple[str, str]] = frozenset()
    absent: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    flatten: dict[str, int] = field(default_factory=dict)
    unflatten: dict[str, int] = field(default_factory=dict)
    blind: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: str = ""
    parts: tuple[Case, ...] = ()

    @property
    def frameworks(self) -> tuple[str, ...]:
        return tuple(framework for framework in FRAMEWORKS if framework in self.models)

    def pairs(self) -> list[tuple[str, str]]:
        """The (source, target) pairs that must convert rightly, a framework to itself included."""
        every = [(source, target) for source in self.frameworks for target in self.frameworks]
        return [pair for pair in every if pair not in self.refusals]


@dataclass(frozen=True)
class Sizes:
    """Sizes are written as `d(7)`: 7 in the distinct zoo, 4 (or the second number) in the equal one."""

    equal: bool

    def __call__(self, distinct: int, equal: int = 4) -> int:
        return equal if self.equal else distinct


Family = Callable[[Sizes], Iterator[Case]]
FAMILIES: list[Family] = []


def family(function: Family) -> Family:
    FAMILIES.append(function)
    return function


class Cases(dict[str, Case]):
    """Cases by name; `dense+lstm` is put together from the two when it is asked for."""

    def __missing__(self, name: str) -> Case:
        if "+" not in name:
            raise KeyError(name)
        self[name] = together(name, [self[part] for part in name.split("+")])
        return self[name]


@cache
def cases(equal: bool = False) -> dict[str, Case]:
    """Every case by name. Cases that cannot have all dimensions equal are missing from the equal zoo."""
    found: dict[str, Case] = Cases()
    for function in FAMILIES:
        for case in function(Sizes(equal)):
            if case.name in found:
                raise ValueError(f"two cases are called {case.name}")
            found[case.name] = case
    return found


def together(name: str, parts: list[Case]) -> Case:
    """One model of several cases side by side, each with inputs of its own; the output is the last one's.

    >>> both = cases()["dense+lstm"]
    >>> [row.name for row in both.models["torch"].layers], both.models["torch"].inputs
    (['a_layer', 'b_layer'], ('nc', 'ntc'))
    """
    frameworks = [f for f in parts[0].models if all(f in part.models for part in parts)]
    stacks = {
        f"{p}_{path}": tuple(f"{p}_{one}" for one in names)
        for p, part in lettered(parts)
        for path, names in part.stacks.items()
    }
    return Case(
        name,
        "together",
        tuple(one for part in parts for one in part.inputs),
        parts[-1].output,
        {f: side_by_side(parts, [part.models[f] for part in parts]) for f in frameworks},
        stacks=stacks,
        flatten={f"{p}_{path}": n for p, part in lettered(parts) for path, n in part.flatten.items()},
        unflatten={f"{p}_{path}": n for p, part in lettered(parts) for path, n in part.unflatten.items()},
        parts=tuple(parts),
    )


def lettered(parts: list[Case]) -> list[tuple[str, Case]]:
    return list(zip("abcdefgh", parts, strict=False))


def side_by_side(parts: list[Case], models: list[Model]) -> Model:
    """The rows of several models of one framework, their names and inputs told apart."""
    rows: list[Layer] = []
    first = 0
    for (letter, part), model in zip(lettered(parts), models, strict=True):
        names = {row.name: f"{letter}_{row.name}" for row in model.layers}
        names |= {f"x{i}": f"x{first + i}" for i in range(len(part.inputs))}
        for i, row in enumerate(model.layers):
            of = tuple(names[one] for one in row.of) or ((f"x{first}",) if i == 0 else ())
            cls = row.cls if row.cls == row.name else names.get(row.cls, row.cls)  # `last` is called what it does
            rows.append(replace(row, name=names[row.name], cls=cls, of=of))
        first += len(part.inputs)
    return Model("graph", tuple(rows), tuple(axes for model in models for axes in model.inputs), models[-1].output)


def make_inputs(case: Case, seed: int, dtype: str = "float32") -> list[np.ndarray]:
    """The random inputs of a case in canonical axes; the same for every framework."""
    rng = np.random.default_rng((seed, 77))
    return [
        rng.integers(0, one.below, one.shape).astype("int32")
        if one.below
        else rng.standard_normal(one.shape).astype(dtype)
        for one in case.inputs
    ]


def permute(array: np.ndarray, axes: str, to: str) -> np.ndarray:
    """Transpose by axis letters: `permute(x, "nchw", "nhwc")`."""
    return np.ascontiguousarray(array.transpose([axes.index(letter) for letter in to]))


def channels_last(axes: str) -> str:
    return axes.replace("c", "") + "c" if "c" in axes else axes


def layer(
    name: str,
    cls: str,
    *inside: Layer,
    of: tuple[str, ...] = (),
    wrap: tuple[str, dict[str, Any]] | None = None,
    **args: Any,
) -> Layer:
    return Layer(name, cls, args, inside, of, wrap)


def _builder(rows: tuple[Layer, ...]) -> str:
    """Lower-case classes are operations, not layers; they and recurrent torch layers (tuples) need a custom module."""
    plain = all(not row.of and row.cls not in RECURRENT and row.cls[0].isupper() for row in rows)
    return "sequential" if plain else "graph"


Rows = Layer | list[Layer] | None


def case(
    name: str,
    kind: str,
    inputs: Input | list[Input],
    torch: Rows = None,
    keras: Rows = None,
    output: str = "",
    keras_axes: Callable[[str], str] = channels_last,
    keras_builder: str = "",
    **more: Any,
) -> Case:
    """A case from its rows. The output has the axes of the first input unless told otherwise.

    TensorFlow's model is the Keras model, saved the TensorFlow way.
    """
    inputs = [inputs] if isinstance(inputs, Input) else inputs
    output = output or inputs[0].axes
    models: dict[str, Model] = {}
    if torch is not None:
        rows = tuple(torch) if isinstance(torch, list) else (torch,)
        models["torch"] = Model(_builder(rows), rows, tuple(one.axes for one in inputs), output)
    if keras is not None:
        rows = tuple(keras) if isinstance(keras, list) else (keras,)
        axes = tuple(keras_axes(one.axes) for one in inputs)
        builder = keras_builder or ("sequential" if all(not row.of for row in rows) else "graph")
        models["keras"] = models["tensorflow"] = Model(builder, rows, axes, keras_axes(output))
    absent = {framework: ABSENT for framework in FRAMEWORKS if framework not in models} | more.pop("absent", {})
    return Case(name, kind, tuple(inputs), output, models, absent=absent, **more)


def refused(sources: str, targets: str, reason: str) -> dict[tuple[str, str], str]:
    return {(source, target): reason for source in sources.split() for target in targets.split()}


KERAS = "keras tensorflow"
TO_TORCH = frozenset({("keras", "torch"), ("tensorflow", "torch")})
TO_KERAS = frozenset({("torch", "keras"), ("torch", "tensorflow")})


@family
def dense(d: Sizes) -> Iterator[Case]:
    x = Input("nc", (d(2), d(3)))
    for name, bias in (("dense", True), ("dense_no_bias", False)):
        yield case(
            name,
            "dense",
            x,
            layer("layer", "Linear", in_features=d(3), out_features=d(5), bias=bias),
            layer("layer", "Dense", units=d(5), use_bias=bias),
        )
    yield case(
        "mlp",
        "dense",
        x,
        [
            layer("first", "Linear", in_features=d(3), out_features=d(5)),
            layer("relu", "ReLU"),
            layer("second", "Linear", in_features=d(5), out_features=d(6)),
            layer("tanh", "Tanh"),
            layer("third", "Linear", in_features=d(6), out_features=d(7)),
        ],
        [
            layer("first", "Dense", units=d(5), activation="relu"),
            layer("second", "Dense", units=d(6), activation="tanh"),
            layer("third", "Dense", units=d(7)),
        ],
    )
    yield case(
        "time_distributed_dense",
        "dense",
        Input("ntc", (d(2), d(6), d(3))),
        layer("layer", "Linear", in_features=d(3), out_features=d(5)),
        layer("layer", "TimeDistributed", layer("inner", "Dense", units=d(5))),
    )
    yield case(
        "bilinear",
        "bilinear",
        [Input("nc", (d(2), d(3))), Input("nc", (d(2), d(5)))],
        layer("layer", "Bilinear", of=("x0", "x1"), in1_features=d(3), in2_features=d(5), out_features=d(7)),
        refusals=refused("torch", KERAS, "ilinear"),
    )


@family
def einsum_dense(d: Sizes) -> Iterator[Case]:
    x = Input("ntc", (d(2), d(6), d(3)))
    for name, equation in (("einsum_dense", "abc,cd->abd"), ("einsum_dense_transposed", "abc,dc->abd")):
        yield case(
            name,
            "einsum_dense",
            x,
            layer("layer", "Linear", in_features=d(3), out_features=d(5)),
            layer("layer", "EinsumDense", equation=equation, output_shape=(None, d(5)), bias_axes="d"),
        )
    yield case(
        "einsum_dense_split",
        "einsum_dense",
        x,
        [
            layer("layer", "Linear", in_features=d(3), out_features=d(5) * d(7)),
            layer("split", "Unflatten", dim=-1, unflattened_size=(d(5), d(7))),
        ],
        layer("layer", "EinsumDense", equation="abc,cde->abde", output_shape=(None, d(5), d(7)), bias_axes="de"),
        "nthc",
        notes="two output axes of Keras are one axis of torch",
    )
    yield case(
        "einsum_dense_merge",
        "einsum_dense",
        Input("nthc", (d(2), d(6), d(5), d(3))),
        [
            layer("merge", "Flatten", start_dim=2),
            layer("layer", "Linear", in_features=d(5) * d(3), out_features=d(7)),
        ],
        layer("layer", "EinsumDense", equation="abcd,cde->abe", output_shape=(None, d(7)), bias_axes="e"),
        "ntc",
        notes="two input axes of Keras are one axis of torch; no feature map, so nothing is permuted",
    )


SPACE = {1: "l", 2: "hw", 3: "dhw"}


@family
def conv(d: Sizes) -> Iterator[Case]:
    for rank, kernel, field_ in ((1, (4,), (11,)), (2, (4, 6), (9, 11)), (3, (4, 5, 6), (8, 9, 7))):
        ours, theirs = f"Conv{rank}d", f"Conv{rank}D"
        size = tuple(d(k) for k in kernel)
        space = tuple(d(f, 7) for f in field_)
        x = Input("nc" + SPACE[rank], (1, d(3), *space))
        variants: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("", {}, {}),
            ("_no_bias", {"bias": False}, {"use_bias": False}),
            ("_same", {"padding": "same"}, {"padding": "same"}),
        ]
        strides = (2, 3, 1)[:rank]
        variants.append(("_stride", {"stride": strides}, {"strides": strides}))
        for suffix, torch, keras in variants:
            yield case(
                f"conv{rank}d{suffix}",
                "conv",
                x,
                layer("layer", ours, in_channels=d(3), out_channels=d(7), kernel_size=size, **torch),
                layer("layer", theirs, filters=d(7), kernel_size=size, **keras),
            )
        dilation = (2, 3, 1)[:rank]
        wide = tuple(d(f, 13) + 4 * rank for f in field_)
        yield case(
            f"conv{rank}d_dilation",
            "conv",
            Input("nc" + SPACE[rank], (1, d(3), *wide)),
            layer("layer", ours, in_channels=d(3), out_channels=d(7), kernel_size=size, dilation=dilation),
            layer("layer", theirs, filters=d(7), kernel_size=size, dilation_rate=dilation),
        )
        groups = d(3, 2)
        yield case(
            f"conv{rank}d_groups",
            "conv",
            Input("nc" + SPACE[rank], (1, d(6), *space)),
            layer("layer", ours, in_channels=d(6), out_channels=d(9), kernel_size=size, groups=groups),
            layer("layer", theirs, filters=d(9), kernel_size=size, groups=groups),
        )


@family
def conv_padding(d: Sizes) -> Iterator[Case]:
    yield case(
        "conv1d_causal",
        "conv",
        Input("ncl", (d(2), d(3), d(11))),
        [
            layer("pad", "ConstantPad1d", padding=((d(4) - 1) * 2, 0), value=0.0),
            layer("layer", "Conv1d", in_channels=d(3), out_channels=d(5), kernel_size=d(4), dilation=2),
        ],
        layer("layer", "Conv1D", filters=d(5), kernel_size=d(4), dilation_rate=2, padding="causal"),
    )
    yield case(
        "conv2d_same_even",
        "conv",
        Input("nchw", (d(8), d(2), d(5), d(6))),
        layer("layer", "Conv2d", in_channels=d(2), out_channels=d(7), kernel_size=(d(3), d(4)), padding="same"),
        layer("layer", "Conv2D", filters=d(7), kernel_size=(d(3), d(4)), padding="same"),
        notes="an even kernel with 'same' pads one more on the right and below, in torch and in Keras",
    )
    yield case(
        "conv2d_explicit_padding",
        "conv",
        Input("nchw", (d(2, 3), d(4, 3), d(6, 3), d(7, 3))),
        layer(
            "layer",
            "Conv2d",
            in_channels=d(4, 3),
            out_channels=d(7, 3),
            kernel_size=(3, d(5, 3)),
            padding=(1, d(2, 1)),
        ),
        layer("layer", "Conv2D", filters=d(7, 3), kernel_size=(3, d(5, 3)), padding="same"),
    )
    strided = {"in_channels": d(2), "out_channels": d(7), "kernel_size": (d(3), 4), "stride": 2}
    yield case(
        "conv2d_same_stride",
        "conv",
        Input("nchw", (d(5), d(2), 8, 9)),
        [layer("pad", "ZeroPad2d", padding=(1, 2, d(0, 1), 1)), layer("layer", "Conv2d", **strided)],
        layer("layer", "Conv2D", filters=d(7), kernel_size=(d(3), 4), strides=2, padding="same"),
        notes="'same' with a stride pads by the input size, and one more behind where the sum is odd",
    )
    yield case(
        "conv2d_zero_padding",
        "conv",
        Input("nchw", (d(5), d(2), 8, 9)),
        layer("layer", "Conv2d", **strided, padding=(1, 2)),
        [
            layer("pad", "ZeroPadding2D", padding=(1, 2)),
            layer("layer", "Conv2D", filters=d(7), kernel_size=(d(3), 4), strides=2),
        ],
    )
    yield case(
        "conv2d_channels_first",
        "conv",
        Input("nchw", (d(2), d(3), d(9, 7), d(11, 8))),
        layer("layer", "Conv2d", in_channels=d(3), out_channels=d(5), kernel_size=(d(4), d(6))),
        layer("layer", "Conv2D", filters=d(5), kernel_size=(d(4), d(6)), data_format="channels_first"),
        keras_axes=str,
        notes="Keras 3 on TensorFlow adds the bias along the width where the width of the output equals the channels",
    )


@family
def depthwise(d: Sizes) -> Iterator[Case]:
    for rank, kernel, field_ in ((1, (4,), (11,)), (2, (4, 5), (9, 11))):
        size = tuple(d(k) for k in kernel)
        x = Input("nc" + SPACE[rank], (d(2), d(3), *(d(f, 7) for f in field_)))
        middle = d(3) * d(2)
        into = {"in_channels": d(3), "out_channels": middle, "kernel_size": size, "groups": d(3)}
        yield case(
            f"depthwise_conv{rank}d",
            "depthwise_conv",
            x,
            layer("layer", f"Conv{rank}d", **into),
            layer("layer", f"DepthwiseConv{rank}D", kernel_size=size, depth_multiplier=d(2)),
        )
        yield case(
            f"depthwise_as_groups_conv{rank}d",
            "conv",
            x,
            layer("layer", f"Conv{rank}d", **into),
            layer("layer", f"Conv{rank}D", filters=middle, kernel_size=size, groups=d(3)),
        )
        yield case(
            f"separable_conv{rank}d",
            "separable_conv",
            x,
            layer(
                "layer",
                "Sequential",
                layer("depthwise", f"Conv{rank}d", **into, bias=False),
                layer("pointwise", f"Conv{rank}d", in_channels=middle, out_channels=d(7), kernel_size=1),
            ),
            layer("layer", f"SeparableConv{rank}D", filters=d(7), kernel_size=size, depth_multiplier=d(2)),
            stacks={"layer.depthwise": ("layer",), "layer.pointwise": ("layer",)},
            notes="one Keras layer is two torch convolutions, of which only the second has a bias",
        )


@family
def conv_transpose(d: Sizes) -> Iterator[Case]:
    for rank, kernel, field_ in ((1, (4,), (7,)), (2, (4, 6), (5, 7)), (3, (2, 4, 6), (5, 3, 4))):
        ours, theirs = f"ConvTranspose{rank}d", f"Conv{rank}DTranspose"
        size = tuple(d(k) for k in kernel)
        x = Input("nc" + SPACE[rank], (1, d(3), *(d(f) for f in field_)))
        same = tuple((k - 2) // 2 for k in size)
        variants: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("", {}, {}),
            ("_stride", {"stride": 2}, {"strides": 2}),
            ("_no_bias", {"bias": False}, {"use_bias": False}),
            ("_same", {"stride": 2, "padding": same}, {"strides": 2, "padding": "same"}),
        ]
        for suffix, torch, keras in variants:
            yield case(
                f"conv_transpose{rank}d{suffix}",
                "conv_transpose",
                x,
                layer("layer", ours, in_channels=d(3), out_channels=d(5), kernel_size=size, **torch),
                layer("layer", theirs, filters=d(5), kernel_size=size, **keras),
            )
    yield case(
        "conv_transpose2d_output_padding",
        "conv_transpose",
        Input("nchw", (d(2), d(3), d(5), d(7))),
        layer(
            "layer",
            "ConvTranspose2d",
            in_channels=d(3),
            out_channels=d(7),
            kernel_size=(d(4), d(6)),
            stride=2,
            output_padding=1,
        ),
        layer("layer", "Conv2DTranspose", filters=d(7), kernel_size=(d(4), d(6)), strides=2, output_padding=1),
    )
    yield case(
        "conv_transpose2d_groups",
        "conv_transpose",
        Input("nchw", (d(2), d(6), d(5), d(7))),
        layer(
            "layer",
            "ConvTranspose2d",
            in_channels=d(6),
            out_channels=d(9, 8),
            kernel_size=(d(4), d(5)),
            groups=d(3, 2),
        ),
        refusals=refused("torch", KERAS, "group"),
        absent={"keras": "Conv2DTranspose has no groups", "tensorflow": "Conv2DTranspose has no groups"},
    )


@family
def embedding(d: Sizes) -> Iterator[Case]:
    x = Input("nt", (d(2), d(6)), below=d(7))
    table = layer("layer", "Embedding", num_embeddings=d(7), embedding_dim=d(5))
    entry = layer("layer", "Embedding", input_dim=d(7), output_dim=d(5))
    yield case("embedding", "embedding", x, table, entry, "ntc")
    yield case(
        "embedding_flatten_dense",
        "embedding",
        x,
        [table, layer("flat", "Flatten"), layer("head", "Linear", in_features=d(6) * d(5), out_features=d(3))],
        [entry, layer("flat", "Flatten"), layer("head", "Dense", units=d(3))],
        "nc",
        notes="a sequence has its channels last in both frameworks: the flatten must not be permuted",
    )


@family
def normalization(d: Sizes) -> Iterator[Case]:
    flat = Input("nc", (d(6), d(3)))
    line = Input("ncl", (d(2), d(3), d(7)))
    image = Input("nchw", (d(2), d(3), d(5), d(7)))
    many = Input("nchw", (d(2), d(6), d(5), d(7)))
    words = Input("ntc", (d(2), d(6), d(3)))
    for name, x, rank in (("batch_norm1d", flat, 1), ("batch_norm1d_line", line, 1), ("batch_norm2d", image, 2)):
        yield case(
            name,
            "batch_norm",
            x,
            layer("layer", f"BatchNorm{rank}d", num_features=d(3), eps=0.03),
            layer("layer", "BatchNormalization", epsilon=0.03),
        )
    yield case(
        "batch_norm2d_plain",
        "batch_norm",
        image,
        layer("layer", "BatchNorm2d", num_features=d(3), eps=0.03, affine=False),
        layer("layer", "BatchNormalization", epsilon=0.03, scale=False, center=False),
    )
    for name, options, lacks in (
        ("center_only", {"scale": False}, "scale in layer"),
        ("scale_only", {"center": False}, "bias in layer"),
    ):
        yield case(
            f"batch_norm2d_{name}",
            "batch_norm",
            image,
            layer("layer", "BatchNorm2d", num_features=d(3), eps=0.03),
            layer("layer", "BatchNormalization", epsilon=0.03, **options),
            may_refuse=TO_TORCH,
            refusals=refused("torch", KERAS, lacks),
            notes="torch has both or none: the missing one becomes ones or zeros; random ones do not fit into Keras",
        )
    yield case(
        "layer_norm",
        "layer_norm",
        words,
        layer("layer", "LayerNorm", normalized_shape=d(3), eps=0.0007),
        layer("layer", "LayerNormalization", epsilon=0.0007),
    )
    yield case(
        "layer_norm_no_bias",
        "layer_norm",
        words,
        layer("layer", "LayerNorm", normalized_shape=d(3), eps=0.0007, bias=False),
        layer("layer", "LayerNormalization", epsilon=0.0007, center=False),
    )
    yield case(
        "layer_norm_image",
        "layer_norm",
        image,
        layer("layer", "LayerNorm", normalized_shape=(d(3), d(5), d(7)), eps=0.0007),
        layer("layer", "LayerNormalization", axis=[1, 2, 3], epsilon=0.0007),
        may_refuse=TO_TORCH | TO_KERAS,
        notes="over a whole feature map: the scale itself is (C, H, W) in torch and (H, W, C) in Keras",
    )
    yield case(
        "group_norm",
        "group_norm",
        many,
        layer("layer", "GroupNorm", num_groups=d(3, 2), num_channels=d(6), eps=0.03),
        layer("layer", "GroupNormalization", groups=d(3, 2), epsilon=0.03),
    )
    yield case(
        "instance_norm1d",
        "instance_norm",
        line,
        layer("layer", "InstanceNorm1d", num_features=d(3), eps=0.03, affine=True),
        layer("layer", "GroupNormalization", groups=-1, epsilon=0.03),
    )
    yield case(
        "instance_norm2d",
        "instance_norm",
        image,
        layer("layer", "InstanceNorm2d", num_features=d(3), eps=0.03, affine=True),
        layer("layer", "GroupNormalization", groups=-1, epsilon=0.03),
    )
    yield case(
        "instance_norm2d_statistics",
        "instance_norm",
        image,
        layer("layer", "InstanceNorm2d", num_features=d(3), eps=0.03, affine=True, track_running_stats=True),
        refusals=refused("torch", KERAS, "statistic"),
        absent={"keras": "GroupNormalization keeps no statistics", "tensorflow": "as in Keras"},
        notes="with its statistics it computes what a batch norm computes",
    )
    yield case(
        "rms_norm",
        "rms_norm",
        words,
        layer("layer", "RMSNorm", normalized_shape=d(3), eps=0.03),
        layer("layer", "RMSNormalization", epsilon=0.03),
    )


@family
def prelu(d: Sizes) -> Iterator[Case]:
    image = Input("nchw", (d(2), d(3), d(5), d(7)))
    flat = Input("nc", (d(2), d(3)))
    yield case(
        "prelu",
        "prelu",
        image,
        layer("layer", "PReLU", num_parameters=d(3)),
        layer("layer", "PReLU", shared_axes=[1, 2]),
    )
    yield case("prelu_flat", "prelu", flat, layer("layer", "PReLU", num_parameters=d(3)), layer("layer", "PReLU"))
    yield case(
        "prelu_single",
        "prelu",
        image,
        layer("layer", "PReLU"),
        layer("layer", "PReLU", shared_axes=[1, 2, 3]),
    )
    yield case(
        "prelu_unshared",
        "prelu",
        image,
        None,
        layer("layer", "PReLU"),
        refusals=refused(KERAS, "torch", "slopes"),
        absent={"torch": "one slope per channel, or one for all"},
    )


@family
def recurrent(d: Sizes) -> Iterator[Case]:
    x = Input("ntc", (d(2), d(6), d(3)))
    base = {"input_size": d(3), "batch_first": True}
    size = d(5)
    for ours, theirs, kind in (("RNN", "SimpleRNN", "rnn"), ("LSTM", "LSTM", "lstm"), ("GRU", "GRU", "gru")):
        torch = {"hidden_size": size, **base}
        keras = {"units": size, "return_sequences": True}
        yield case(kind, kind, x, layer("layer", ours, **torch), layer("layer", theirs, **keras))
        yield case(
            f"{kind}_no_bias",
            kind,
            x,
            layer("layer", ours, **torch, bias=False),
            layer("layer", theirs, **keras, use_bias=False),
        )
        for depth in (2, 4):
            yield case(
                f"{kind}_stack{depth}",
                kind,
                x,
                layer("layer", ours, **torch, num_layers=depth),
                [layer(f"layer_{i}", theirs, **keras) for i in range(depth)],
                stacks={"layer": tuple(f"layer_{i}" for i in range(depth))},
            )
        yield case(
            f"{kind}_bidirectional",
            kind,
            x,
            layer("layer", ours, **torch, bidirectional=True),
            layer("layer", "Bidirectional", layer("inner", theirs, **keras)),
        )
        yield case(
            f"{kind}_bidirectional_stack2",
            kind,
            x,
            layer("layer", ours, **torch, bidirectional=True, num_layers=2),
            [layer(f"layer_{i}", "Bidirectional", layer("inner", theirs, **keras)) for i in range(2)],
            stacks={"layer": ("layer_0", "layer_1")},
        )
        cell = "SimpleRNNCell" if kind == "rnn" else f"{theirs}Cell"
        yield case(
            f"{kind}_cell",
            kind,
            x,
            layer("layer", f"{ours}Cell", input_size=d(3), hidden_size=size),
            layer("layer", "RNN", layer("inner", cell, units=size), return_sequences=True),
        )
        yield case(
            f"{kind}_cells_stacked",
            kind,
            x,
            layer("layer", ours, **torch, num_layers=2),
            layer(
                "layer", "RNN", layer("one", cell, units=size), layer("two", cell, units=size), return_sequences=True
            ),
            notes="one Keras RNN layer holding two cells",
        )
    yield case(
        "rnn_relu",
        "rnn",
        x,
        layer("layer", "RNN", **base, hidden_size=size, nonlinearity="relu"),
        layer("layer", "SimpleRNN", units=size, return_sequences=True, activation="relu"),
    )
    yield case(
        "gru_reset_before",
        "gru",
        x,
        None,
        layer("layer", "GRU", units=size, return_sequences=True, reset_after=False),
        refusals=refused(KERAS, "torch", "reset_after"),
        absent={"torch": "the reset gate is applied after the recurrent product"},
    )
    if not d.equal:
        yield case(
            "lstm_projection",
            "lstm",
            x,
            layer("layer", "LSTM", **base, hidden_size=7, proj_size=5),
            refusals=refused("torch", KERAS, "proj"),
            notes="a projection is smaller than the hidden size, so it has no place in the equal zoo",
        )


@family
def attention(d: Sizes) -> Iterator[Case]:
    heads, key = d(3), d(5)
    width = heads * key
    x = Input("ntc", (d(2), d(6), width))
    blind = {"torch": (), "keras": ("layer/key/bias",), "tensorflow": ("layer/key/bias",)}
    for name, bias in (("attention", True), ("attention_no_bias", False)):
        yield case(
            name,
            "multi_head_attention",
            x,
            layer(
                "layer",
                "MultiheadAttention",
                of=("x0", "x0", "x0"),
                embed_dim=width,
                num_heads=heads,
                bias=bias,
                batch_first=True,
            ),
            layer("layer", "MultiHeadAttention", of=("x0", "x0"), num_heads=heads, key_dim=key, use_bias=bias),
            blind=blind if bias else {},
            notes="a bias on the keys shifts every score of a query alike; the softmax does not see it",
        )
    yield case(
        "attention_cross",
        "multi_head_attention",
        [x, Input("ntc", (d(2), d(8), d(4))), Input("ntc", (d(2), d(8), d(7)))],
        layer(
            "layer",
            "MultiheadAttention",
            of=("x0", "x1", "x2"),
            embed_dim=width,
            num_heads=heads,
            kdim=d(4),
            vdim=d(7),
            batch_first=True,
        ),
        layer("layer", "MultiHeadAttention", of=("x0", "x2", "x1"), num_heads=heads, key_dim=key),
        blind=blind,
        notes="inputs are query, key, value; Keras is called with query, value, key",
    )
    yield case(
        "attention_value_dim",
        "multi_head_attention",
        x,
        None,
        layer("layer", "MultiHeadAttention", of=("x0", "x0"), num_heads=heads, key_dim=key, value_dim=d(7, 2)),
        blind=blind,
        refusals=refused(KERAS, "torch", "projections"),
        absent={"torch": "values have the size of keys"},
    )
    yield case(
        "attention_bias_kv",
        "multi_head_attention",
        x,
        layer(
            "layer",
            "MultiheadAttention",
            of=("x0", "x0", "x0"),
            embed_dim=width,
            num_heads=heads,
            add_bias_kv=True,
            batch_first=True,
        ),
        refusals=refused("torch", KERAS, "an extra key"),
        absent={"keras": "no learned extra key and value", "tensorflow": "no learned extra key and value"},
    )


@family
def reparametrized(d: Sizes) -> Iterator[Case]:
    flat = Input("nc", (d(2), d(3)))
    image = Input("nchw", (d(2), d(3), d(9, 7), d(11, 7)))
    line = Input("ncl", (d(2), d(3), d(7)))
    kernel = (d(4), d(6))
    linear = {"in_features": d(3), "out_features": d(5)}
    conv2d = {"in_channels": d(3), "out_channels": d(5), "kernel_size": kernel}
    plain_dense = layer("layer", "Dense", units=d(5))
    plain_conv = layer("layer", "Conv2D", filters=d(5), kernel_size=kernel)
    for style in ("weight_norm", "legacy_weight_norm"):
        yield case(f"{style}_dense", style, flat, layer("layer", "Linear", wrap=(style, {}), **linear), plain_dense)
        yield case(f"{style}_conv2d", style, image, layer("layer", "Conv2d", wrap=(style, {}), **conv2d), plain_conv)
        yield case(
            f"{style}_conv2d_dim1",
            style,
            image,
            layer("layer", "Conv2d", wrap=(style, {"dim": 1}), **conv2d),
            plain_conv,
        )
        yield case(
            f"{style}_conv2d_whole",
            style,
            image,
            layer("layer", "Conv2d", wrap=(style, {"dim": None}), **conv2d),
            plain_conv,
        )
        yield case(
            f"{style}_conv_transpose1d",
            style,
            line,
            layer("layer", "ConvTranspose1d", wrap=(style, {}), in_channels=d(3), out_channels=d(5), kernel_size=d(4)),
            layer("layer", "Conv1DTranspose", filters=d(5), kernel_size=d(4)),
        )
    wrapped = {
        "dense": layer("layer", "SpectralNormalization", layer("inner", "Dense", units=d(5))),
        "conv2d": layer("layer", "SpectralNormalization", layer("inner", "Conv2D", filters=d(5), kernel_size=kernel)),
    }
    stored = TO_TORCH | {("torch", "torch")}
    for style in ("spectral_norm", "legacy_spectral_norm"):
        for name, x, ours, plain in (
            ("dense", flat, layer("layer", "Linear", wrap=(style, {}), **linear), plain_dense),
            ("conv2d", image, layer("layer", "Conv2d", wrap=(style, {}), **conv2d), plain_conv),
        ):
            yield case(
                f"{style}_{name}",
                style,
                x,
                ours,
                plain,
                may_refuse=stored,
                notes="torch divides by a stored estimate of the norm at every forward pass",
            )
            vector = {"keras": ("layer/vector_u",), "tensorflow": ("layer/vector_u",)}
            yield case(
                f"{style}_{name}_wrapped",
                style,
                x,
                ours,
                wrapped[name],
                may_refuse=stored,
                blind=vector,
                notes="Keras's kernel is the divided one already; inference does not touch it nor vector_u",
            )


@family
def flattened(d: Sizes) -> Iterator[Case]:
    for rank, kernel, field_ in ((1, (4,), (11,)), (2, (4, 6), (8, 11)), (3, (3, 4, 5), (5, 6, 8))):
        size = tuple(d(k) for k in kernel)
        space = tuple(d(f, 7) for f in field_)
        left = [f - k + 1 for f, k in zip(space, size, strict=True)]
        features = int(np.prod(left)) * d(9)
        x = Input("nc" + SPACE[rank], (1, d(2), *space))
        shape = {"in_channels": d(2), "out_channels": d(9), "kernel_size": size}
        first = layer("first", f"Conv{rank}d", **shape)
        entry = layer("first", f"Conv{rank}D", filters=d(9), kernel_size=size)
        flat = layer("flat", "Flatten")
        head = layer("head", "Linear", in_features=features, out_features=d(7))
        last = layer("head", "Dense", units=d(7))
        here = {"flatten": {"head": d(9)}}
        ours, theirs = [first, flat, head], [entry, flat, last]
        yield case(f"conv{rank}d_flatten_dense", "flatten", x, ours, theirs, "nc", **here)
        yield case(
            f"conv{rank}d_flatten_norm_dense",
            "flatten",
            x,
            [first, flat, layer("norm", "BatchNorm1d", num_features=features, eps=0.03), layer("relu", "ReLU"), head],
            [entry, flat, layer("norm", "BatchNormalization", epsilon=0.03), layer("relu", "ReLU"), last],
            "nc",
            flatten={"norm": d(9), "head": d(9)},
            notes="the batch norm's vectors lie on flattened features too",
        )
        if rank != 2:
            continue
        yield case(
            "conv2d_flatten_layer_norm_dense",
            "flatten",
            x,
            [first, flat, layer("norm", "LayerNorm", normalized_shape=features, eps=0.0007), head],
            [entry, flat, layer("norm", "LayerNormalization", epsilon=0.0007), last],
            "nc",
            flatten={"norm": d(9), "head": d(9)},
        )
        yield case(
            "conv2d_flatten_prelu_dense",
            "flatten",
            x,
            [first, flat, layer("act", "PReLU", num_parameters=features), head],
            [entry, flat, layer("act", "PReLU"), last],
            "nc",
            flatten={"act": d(9), "head": d(9)},
        )
        yield case(
            "conv2d_reshape_dense",
            "flatten",
            x,
            ours,
            [entry, layer("flat", "Reshape", target_shape=(-1,)), last],
            "nc",
            **here,
        )
        yield case(
            "conv2d_permute_flatten_dense",
            "flatten",
            x,
            ours,
            [entry, layer("first_channels", "Permute", dims=(3, 1, 2)), flat, last],
            "nc",
            notes="Keras flattens in torch's order here: nothing may be permuted",
        )
        yield case(
            "conv2d_channels_first_flatten_dense",
            "flatten",
            x,
            [layer("first", "Conv2d", **shape, bias=False), flat, head],
            [
                layer("first", "Conv2D", filters=d(9), kernel_size=size, data_format="channels_first", use_bias=False),
                layer("flat", "Flatten", data_format="channels_first"),
                last,
            ],
            "nc",
            keras_axes=str,
            **here,
            notes="Flatten(data_format='channels_first') moves the channels last first: still permuted",
        )
        yield case(
            "conv2d_channels_first_plain_flatten_dense",
            "flatten",
            x,
            [layer("first", "Conv2d", **shape, bias=False), flat, head],
            [
                layer("first", "Conv2D", filters=d(9), kernel_size=size, data_format="channels_first", use_bias=False),
                layer("flat", "Flatten", data_format="channels_last"),
                last,
            ],
            "nc",
            keras_axes=str,
            notes="channels first, flattened as it is: torch's order, nothing may be permuted",
        )
        pooled = d(9) * (left[0] // 2) * (left[1] // 2)
        yield case(
            "conv2d_pool_flatten_dense",
            "flatten",
            x,
            [
                first,
                layer("relu", "ReLU"),
                layer("pool", "MaxPool2d", kernel_size=2),
                flat,
                layer("drop", "Dropout", p=0.5),
                layer("head", "Linear", in_features=pooled, out_features=d(7)),
                layer("act", "ReLU"),
                layer("out", "Linear", in_features=d(7), out_features=d(3)),
            ],
            [
                layer("first", "Conv2D", filters=d(9), kernel_size=size, activation="relu"),
                layer("pool", "MaxPooling2D", pool_size=2),
                flat,
                layer("drop", "Dropout", rate=0.5),
                layer("head", "Dense", units=d(7), activation="relu"),
                layer("out", "Dense", units=d(3)),
            ],
            "nc",
            **here,
        )
        yield case(
            "conv2d_global_pool_dense",
            "flatten",
            x,
            [
                first,
                layer("pool", "AdaptiveAvgPool2d", output_size=1),
                flat,
                layer("head", "Linear", in_features=d(9), out_features=d(7)),
            ],
            [entry, layer("pool", "GlobalAveragePooling2D"), last],
            "nc",
            notes="one pixel is left, so every order is the same",
        )


@family
def decoder(d: Sizes) -> Iterator[Case]:
    channels, high, wide = d(3), d(4), d(6)
    x = Input("nc", (d(2), d(7)))
    grow = layer("grow", "Linear", in_features=d(7), out_features=channels * high * wide)
    unflat = layer("unflat", "Unflatten", dim=1, unflattened_size=(channels, high, wide))
    sprout = layer("grow", "Dense", units=channels * high * wide)
    reshape = layer("unflat", "Reshape", target_shape=(high, wide, channels))
    size = (d(2), d(8))
    yield case(
        "dense_reshape_conv2d",
        "flatten",
        x,
        [grow, unflat, layer("last", "ConvTranspose2d", in_channels=channels, out_channels=d(5), kernel_size=size)],
        [sprout, reshape, layer("last", "Conv2DTranspose", filters=d(5), kernel_size=size)],
        "nchw",
        unflatten={"grow": channels},
        notes="the outputs of the dense layer lie on a feature map: its bias is permuted too",
    )
    size = (d(2), d(6))
    yield case(
        "dense_norm_reshape_conv2d",
        "flatten",
        x,
        [
            grow,
            layer("norm", "BatchNorm1d", num_features=channels * high * wide, eps=0.03),
            layer("relu", "ReLU"),
            unflat,
            layer("last", "Conv2d", in_channels=channels, out_channels=d(5), kernel_size=size),
        ],
        [
            sprout,
            layer("norm", "BatchNormalization", epsilon=0.03),
            layer("relu", "ReLU"),
            reshape,
            layer("last", "Conv2D", filters=d(5), kernel_size=size),
        ],
        "nchw",
        unflatten={"grow": channels, "norm": channels},
    )


@family
def wired(d: Sizes) -> Iterator[Case]:
    """Models of several layers, nested and branched."""
    flat = Input("nc", (d(2), d(3)))
    image = Input("nchw", (d(2), d(3), d(7), d(8)))
    small = (d(2), d(4))
    yield case(
        "nested",
        "nested",
        flat,
        [
            layer(
                "body",
                "Sequential",
                layer("one", "Linear", in_features=d(3), out_features=d(5)),
                layer("deep", "Sequential", layer("two", "Linear", in_features=d(5), out_features=d(6))),
            ),
            layer("head", "Linear", in_features=d(6), out_features=d(7)),
        ],
        [
            layer(
                "body",
                "Sequential",
                layer("one", "Dense", units=d(5)),
                layer("deep", "Sequential", layer("two", "Dense", units=d(6))),
            ),
            layer("head", "Dense", units=d(7)),
        ],
    )
    yield case(
        "subclassed",
        "nested",
        flat,
        [
            layer("hidden", "Linear", in_features=d(3), out_features=d(5)),
            layer(
                "blocks",
                "Sequential",
                layer("0", "Linear", in_features=d(5), out_features=d(6)),
                layer("1", "Linear", in_features=d(6), out_features=d(7)),
            ),
            layer("head", "Linear", in_features=d(7), out_features=d(8)),
        ],
        [
            layer("hidden", "Dense", units=d(5)),
            layer("blocks", "Sequential", layer("0", "Dense", units=d(6)), layer("1", "Dense", units=d(7))),
            layer("head", "Dense", units=d(8)),
        ],
        keras_builder="subclassed",
        notes="a Keras class of its own: `hidden` and `head` are attributes, `blocks` a list",
    )
    yield case(
        "branches_concat",
        "graph",
        image,
        [
            layer("left", "Conv2d", of=("x0",), in_channels=d(3), out_channels=d(5), kernel_size=small),
            layer("right", "Conv2d", of=("x0",), in_channels=d(3), out_channels=d(6), kernel_size=small),
            layer("join", "concat", of=("right", "left")),
            layer("last", "Conv2d", of=("join",), in_channels=d(6) + d(5), out_channels=d(7), kernel_size=1),
        ],
        [
            layer("left", "Conv2D", of=("x0",), filters=d(5), kernel_size=small),
            layer("right", "Conv2D", of=("x0",), filters=d(6), kernel_size=small),
            layer("join", "Concatenate", of=("right", "left")),
            layer("last", "Conv2D", of=("join",), filters=d(7), kernel_size=1),
        ],
    )
    yield case(
        "branches_add",
        "graph",
        Input("nchw", (d(2, 3), d(3, 3), d(8, 3), d(6, 3))),
        [
            layer("skip", "Conv2d", of=("x0",), in_channels=d(3, 3), out_channels=d(5, 3), kernel_size=1),
            layer(
                "body",
                "Conv2d",
                of=("x0",),
                in_channels=d(3, 3),
                out_channels=d(5, 3),
                kernel_size=(d(7, 3), d(9, 3)),
                padding=(d(3, 1), d(4, 1)),
            ),
            layer("norm", "BatchNorm2d", of=("body",), num_features=d(5, 3), eps=0.03),
            layer("join", "add", of=("norm", "skip")),
            layer("act", "ReLU", of=("join",)),
            layer("flat", "Flatten", of=("act",)),
            layer("head", "Linear", of=("flat",), in_features=d(5, 3) * d(8, 3) * d(6, 3), out_features=d(9, 3)),
        ],
        [
            layer("skip", "Conv2D", of=("x0",), filters=d(5, 3), kernel_size=1),
            layer("body", "Conv2D", of=("x0",), filters=d(5, 3), kernel_size=(d(7, 3), d(9, 3)), padding="same"),
            layer("norm", "BatchNormalization", of=("body",), epsilon=0.03),
            layer("join", "Add", of=("norm", "skip")),
            layer("act", "ReLU", of=("join",)),
            layer("flat", "Flatten", of=("act",)),
            layer("head", "Dense", of=("flat",), units=d(9, 3)),
        ],
        "nc",
        flatten={"head": d(5, 3)},
    )
    yield case(
        "branches_flattened_concat",
        "graph",
        image,
        [
            layer("left", "Conv2d", of=("x0",), in_channels=d(3), out_channels=d(5), kernel_size=small),
            layer("right", "Conv2d", of=("x0",), in_channels=d(3), out_channels=d(6), kernel_size=small),
            layer("left_flat", "Flatten", of=("left",)),
            layer("right_flat", "Flatten", of=("right",)),
            layer("join", "concat", of=("left_flat", "right_flat")),
            layer(
                "head",
                "Linear",
                of=("join",),
                in_features=(d(5) + d(6)) * (d(7) - d(2) + 1) * (d(8) - d(4) + 1),
                out_features=d(7),
            ),
        ],
        [
            layer("left", "Conv2D", of=("x0",), filters=d(5), kernel_size=small),
            layer("right", "Conv2D", of=("x0",), filters=d(6), kernel_size=small),
            layer("left_flat", "Flatten", of=("left",)),
            layer("right_flat", "Flatten", of=("right",)),
            layer("join", "Concatenate", of=("left_flat", "right_flat")),
            layer("head", "Dense", of=("join",), units=d(7)),
        ],
        "nc",
        may_refuse=TO_TORCH | TO_KERAS,
        notes="the dense layer reads two flattened maps side by side: permuted in two pieces",
    )
    yield case(
        "shared_layer",
        "graph",
        [flat, Input("nc", (d(2), d(3)))],
        [
            layer("twin", "Linear", of=("x0",), in_features=d(3), out_features=d(5)),
            layer("again", "twin", of=("x1",)),
            layer("join", "concat", of=("twin", "again")),
            layer("head", "Linear", of=("join",), in_features=2 * d(5), out_features=d(7)),
        ],
        [
            layer("twin", "Dense", of=("x0",), units=d(5)),
            layer("again", "twin", of=("x1",)),
            layer("join", "Concatenate", of=("twin", "again")),
            layer("head", "Dense", of=("join",), units=d(7)),
        ],
        notes="one layer called twice: its weights are stored once",
    )
    yield case(
        "time_distributed_conv2d",
        "conv",
        Input("ntchw", (d(2), d(6), d(3), d(5), d(7))),
        [
            layer("fold", "Flatten", start_dim=0, end_dim=1),
            layer("layer", "Conv2d", in_channels=d(3), out_channels=d(8), kernel_size=small),
            layer("unfold", "Unflatten", dim=0, unflattened_size=(-1, d(6))),
        ],
        layer("layer", "TimeDistributed", layer("inner", "Conv2D", filters=d(8), kernel_size=small)),
    )


@family
def sequences(d: Sizes) -> Iterator[Case]:
    x = Input("ntc", (d(2), d(6), d(3)))
    lstm = layer("layer", "LSTM", input_size=d(3), hidden_size=d(5), batch_first=True)
    head = layer("head", "Linear", in_features=d(5), out_features=d(7))
    yield case(
        "lstm_last_dense",
        "lstm",
        x,
        [lstm, layer("last", "last"), head],
        [layer("layer", "LSTM", units=d(5)), layer("head", "Dense", units=d(7))],
        "nc",
    )
    yield case(
        "lstm_flatten_dense",
        "lstm",
        x,
        [lstm, layer("flat", "Flatten"), layer("head", "Linear", in_features=d(6) * d(5), out_features=d(7))],
        [
            layer("layer", "LSTM", units=d(5), return_sequences=True),
            layer("flat", "Flatten"),
            layer("head", "Dense", units=d(7)),
        ],
        "nc",
        notes="a sequence has its channels last in both frameworks: the flatten must not be permuted",
    )
    yield case(
        "lstm_dropout_dense",
        "lstm",
        x,
        [
            layer("layer", "LSTM", input_size=d(3), hidden_size=d(5), num_layers=4, dropout=0.3, batch_first=True),
            layer("drop", "Dropout", p=0.3),
            head,
        ],
        [
            *(layer(f"layer_{i}", "LSTM", units=d(5), return_sequences=True) for i in range(4)),
            layer("drop", "Dropout", rate=0.3),
            layer("head", "Dense", units=d(7)),
        ],
        stacks={"layer": ("layer_0", "layer_1", "layer_2", "layer_3")},
    )
    yield case(
        "text_classifier",
        "gru",
        Input("nt", (d(2), d(6)), below=d(9)),
        [
            layer("words", "Embedding", num_embeddings=d(9), embedding_dim=d(3)),
            layer("layer", "GRU", input_size=d(3), hidden_size=d(5), batch_first=True),
            layer("last", "last"),
            head,
        ],
        [
            layer("words", "Embedding", input_dim=d(9), output_dim=d(3)),
            layer("layer", "GRU", units=d(5)),
            layer("head", "Dense", units=d(7)),
        ],
        "nc",
    )
