"""MLX's column: torch's layers, channels last.

>>> from tests.zoo import cases
>>> [row.cls for row in column(cases()["conv2d_same_even"]).layers]
['pad', 'Conv2d']
>>> column(cases()["lstm_bidirectional"])
'recurrent layers have one direction'

Layers are attributes under the names of the rows. MLX's layers pad both sides alike and with a number, so what 'same'
adds on one side only is an operation before the layer. A group norm is built with `pytorch_compatible=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.columns.deriving import OPERATIONS, Absent, Instead, Step, derive, levels, many, no_statistics
from tests.zoo import Case, Layer, Model

FORMATS = ("safetensors", "npz")
MORE: dict[str, str] = {
    "batch_norm2d_center_only": "a batch norm has scale and shift or neither: the scale is ones",
    "batch_norm2d_scale_only": "a batch norm has scale and shift or neither: the shift is zeros",
}
"""Cases in which the framework's model has more tensors than Keras's: what these would hold is said."""


def number(values: tuple[int, ...]) -> int | tuple[int, ...]:
    """A layer of one dimension takes numbers, not tuples."""
    return values[0] if len(values) == 1 else values


def plain(cls: str, **names: str) -> Step:
    """The same layer with its arguments renamed; arguments that are not named are left out."""

    def step(case: Case, row: Layer) -> Sequence[Layer]:
        args = {ours: row.args[theirs] for ours, theirs in names.items() if theirs in row.args}
        return [Layer(row.name, cls, args)]

    return step


def padding_layer(case: Case, row: Layer) -> Sequence[Layer]:
    """Torch lists the last axis first."""
    pairs = row.args["padding"]
    return [Layer(row.name, "pad", {"pairs": tuple(zip(pairs[::2], pairs[1::2], strict=True))[::-1]})]


def conv(case: Case, row: Layer) -> Sequence[Layer]:
    args, rank = row.args, int(row.cls[-2])
    kernel, dilation = many(args["kernel_size"], rank), many(args.get("dilation", 1), rank)
    shape: dict[str, Any] = {
        "in_channels": args["in_channels"],
        "out_channels": args["out_channels"],
        "kernel_size": number(kernel),
        "stride": number(many(args.get("stride", 1), rank)),
        "dilation": number(dilation),
        "bias": args.get("bias", True),
    }
    if rank < 3:
        shape["groups"] = args.get("groups", 1)
    elif args.get("groups", 1) != 1:
        raise Absent("Conv3d has no groups")
    if args.get("padding") != "same":
        return [Layer(row.name, row.cls, {**shape, "padding": number(many(args.get("padding", 0), rank))})]
    total = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    if all(one % 2 == 0 for one in total):
        return [Layer(row.name, row.cls, {**shape, "padding": number(tuple(one // 2 for one in total))})]
    pairs = tuple((one // 2, one - one // 2) for one in total)
    return [Layer(f"{row.name}_pad", "pad", {"pairs": pairs}), Layer(row.name, row.cls, shape)]


def conv_transpose(case: Case, row: Layer) -> Sequence[Layer]:
    args, rank = row.args, int(row.cls[-2])
    if args.get("groups", 1) != 1:
        raise Absent("transposed convolutions have no groups")
    settings = {"kernel_size": args["kernel_size"], "stride": 1, "padding": 0, "output_padding": 0}
    shape: dict[str, Any] = {name: number(many(args.get(name, value), rank)) for name, value in settings.items()}
    channels = {name: args[name] for name in ("in_channels", "out_channels")}
    return [Layer(row.name, row.cls, {**channels, **shape, "bias": args.get("bias", True)})]


def layer_norm(case: Case, row: Layer) -> Sequence[Layer]:
    args = row.args
    if not isinstance(args["normalized_shape"], int):
        raise Absent("LayerNorm is over the last axis only")
    shape = {"dims": args["normalized_shape"], "eps": args["eps"], "bias": args.get("bias", True)}
    return [Layer(row.name, "LayerNorm", shape)]


def instance_norm(case: Case, row: Layer) -> Sequence[Layer]:
    no_statistics("InstanceNorm")(case, row)
    args = {"dims": row.args["num_features"], "eps": row.args["eps"], "affine": row.args["affine"]}
    return [Layer(row.name, "InstanceNorm", args)]


def recurrent(case: Case, row: Layer) -> Sequence[Layer]:
    args = row.args
    if args.get("proj_size"):
        raise Absent("no LSTM has a projection")
    if args.get("bidirectional"):
        raise Absent("recurrent layers have one direction")
    more = {"nonlinearity": args["nonlinearity"]} if "nonlinearity" in args else {}
    cls, bias = row.cls.removesuffix("Cell"), args.get("bias", True)
    return [
        Layer(name, cls, {"input_size": size, "hidden_size": args["hidden_size"], "bias": bias, **more})
        for name, size in levels(case, row)
    ]


def attention(case: Case, row: Layer) -> Sequence[Layer]:
    args = row.args
    if args.get("add_bias_kv"):
        raise Absent("no learned extra key and value")
    width = args["embed_dim"]
    sizes = {
        "dims": width,
        "num_heads": args["num_heads"],
        "key_input_dims": args.get("kdim", width),
        "value_input_dims": args.get("vdim", width),
        "bias": args.get("bias", True),
    }
    return [Layer(row.name, "MultiHeadAttention", sizes)]


def unflatten(case: Case, row: Layer) -> Sequence[Layer]:
    """The last axis may become two axes, which no feature map is."""
    if row.args["dim"] != -1:
        return OPERATIONS["Unflatten"](case, row)
    return [Layer(row.name, "split", {"shape": row.args["unflattened_size"]})]


def flatten(case: Case, row: Layer) -> Sequence[Layer]:
    return [Layer(row.name, "merge", {})] if row.args.get("start_dim") == 2 else OPERATIONS["Flatten"](case, row)


STEPS: dict[str, Step] = {
    **OPERATIONS,
    "Flatten": flatten,
    "Unflatten": unflatten,
    "Dropout": plain("Dropout", p="p"),
    "MaxPool2d": plain("MaxPool2d", kernel_size="kernel_size"),
    "ConstantPad1d": padding_layer,
    "ZeroPad2d": padding_layer,
    "Linear": plain("Linear", input_dims="in_features", output_dims="out_features", bias="bias"),
    "Bilinear": plain("Bilinear", input1_dims="in1_features", input2_dims="in2_features", output_dims="out_features"),
    **{f"Conv{rank}d": conv for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": conv_transpose for rank in (1, 2, 3)},
    "Embedding": plain("Embedding", num_embeddings="num_embeddings", dims="embedding_dim"),
    "BatchNorm1d": plain("BatchNorm", num_features="num_features", eps="eps", affine="affine"),
    "BatchNorm2d": plain("BatchNorm", num_features="num_features", eps="eps", affine="affine"),
    "LayerNorm": layer_norm,
    "GroupNorm": lambda case, row: [
        Layer(
            row.name,
            "GroupNorm",
            {
                "num_groups": row.args["num_groups"],
                "dims": row.args["num_channels"],
                "eps": row.args["eps"],
                "pytorch_compatible": True,
            },
        )
    ],
    "InstanceNorm1d": instance_norm,
    "InstanceNorm2d": instance_norm,
    "RMSNorm": plain("RMSNorm", dims="normalized_shape", eps="eps"),
    "PReLU": plain("PReLU", num_parameters="num_parameters"),
    **dict.fromkeys(("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"), recurrent),
    "MultiheadAttention": attention,
}


def each_step(case: Case) -> Sequence[Layer]:
    """A convolution has one batch axis."""
    fold, row, unfold = case.models["torch"].layers
    steps = unfold.args["unflattened_size"][1]
    return [Layer(fold.name, "fold", {}), *conv(case, row), Layer(unfold.name, "unfold", {"steps": steps})]


def value_size(case: Case) -> Sequence[Layer]:
    """Attention whose values have a size of their own, from Keras's row."""
    (row,) = case.models["keras"].layers
    heads, width = row.args["num_heads"], case.inputs[0].shape[-1]
    args = {"dims": heads * row.args["key_dim"], "num_heads": heads, "value_input_dims": width}
    sizes = {**args, "value_dims": heads * row.args["value_dim"], "value_output_dims": width, "bias": True}
    return [Layer(row.name, "MultiHeadAttention", sizes, of=("x0", "x0", "x0"))]


INSTEAD: dict[str, Instead] = {
    "time_distributed_conv2d": each_step,
    "attention_value_dim": value_size,
    "prelu_unshared": "PReLU has a slope for each channel, or one for all",
    "gru_reset_before": "the reset gate is applied after the recurrent product",
    **{
        f"{style}_{layer}_wrapped": "no spectral norm; the plain layer is another case"
        for style in ("spectral_norm", "legacy_spectral_norm")
        for layer in ("dense", "conv2d")
    },
}


def column(case: Case) -> Model | str:
    """MLX's model of the case, or why it has none."""
    return derive(case, STEPS, INSTEAD)
