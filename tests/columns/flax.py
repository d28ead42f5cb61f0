"""What the columns of Flax Linen and Flax NNX share: rows in Linen's words, with the sizes of inputs that NNX asks for.

Flax is channels last everywhere. Its padding is 'VALID', 'SAME', 'CAUSAL' or explicit pairs; that of a transposed
convolution is counted on the dilated input, so torch's `p` is `kernel - 1 - p` there (flax.linen.ConvTranspose,
jax.lax.conv_transpose). With `transpose_kernel` the kernel is (space, out, in) and not flipped, else (space, in, out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tests.columns.deriving import OPERATIONS, Absent, Instead, Step, levels, many, no_statistics
from tests.zoo import Case, Layer

PADDING: dict[str, str] = {"conv1d_causal": "CAUSAL", "conv2d_same_stride": "SAME"}
"""Cases in which torch has a padding layer of its own."""

ACCURATE = {"use_fast_variance": False}
"""Flax's usual E[x²] - E[x]² loses digits: a layer norm of three values was off by more than 1e-5."""

ONE_SLOPE = "PReLU has one slope for all channels"
ALWAYS_BIAS = "the cells always have biases"

MORE: dict[str, str] = {
    **{f"{kind}_no_bias": f"{ALWAYS_BIAS}: a model without them has zeros there" for kind in ("rnn", "lstm", "gru")},
}
"""Cases in which the framework's model has more tensors than the other models: what these would hold is said.

Into the framework they are filled with that; out of it they may hold anything, and then a refusal is right.
"""


def transposes_kernel(case: Case) -> bool:
    """Half of the transposed convolutions are built with `transpose_kernel=True`."""
    return case.name.startswith("conv_transpose") and (case.name.endswith("_no_bias") or "3d" in case.name)


def dense(case: Case, row: Layer) -> Sequence[Layer]:
    args = row.args
    return wrapped(
        row,
        Layer(
            row.name,
            "Dense",
            {
                "in_features": args["in_features"],
                "features": args["out_features"],
                "use_bias": args.get("bias", True),
            },
        ),
    )


def conv(case: Case, row: Layer) -> Sequence[Layer]:
    args, rank = row.args, int(row.cls[-2])
    padding: Any = args.get("padding", 0)
    if isinstance(padding, str):
        padding = padding.upper()
    else:
        padding = tuple((p, p) for p in many(padding, rank)) if padding else "VALID"
    return wrapped(
        row,
        Layer(
            row.name,
            "Conv",
            {
                "in_features": args["in_channels"],
                "features": args["out_channels"],
                "kernel_size": many(args["kernel_size"], rank),
                "strides": many(args.get("stride", 1), rank),
                "kernel_dilation": many(args.get("dilation", 1), rank),
                "feature_group_count": args.get("groups", 1),
                "padding": PADDING.get(case.name, padding),
                "use_bias": args.get("bias", True),
            },
        ),
    )


def padding_layer(case: Case, row: Layer) -> Sequence[Layer]:
    """The convolution pads itself."""
    if case.name not in PADDING:
        raise ValueError(f"{case.name}: how does Flax pad here?")
    return []


def conv_transpose(case: Case, row: Layer) -> Sequence[Layer]:
    args, rank = row.args, int(row.cls[-2])
    if args.get("groups", 1) != 1:
        raise Absent("ConvTranspose has no groups")
    kernel, pad = many(args["kernel_size"], rank), many(args.get("padding", 0), rank)
    extra = many(args.get("output_padding", 0), rank)
    padding: Any = "VALID"
    if case.name.endswith("_same"):
        padding = "SAME"
    elif any(pad) or any(extra):
        padding = tuple((k - 1 - p, k - 1 - p + e) for k, p, e in zip(kernel, pad, extra, strict=True))
    return wrapped(
        row,
        Layer(
            row.name,
            "ConvTranspose",
            {
                "in_features": args["in_channels"],
                "features": args["out_channels"],
                "kernel_size": kernel,
                "strides": many(args.get("stride", 1), rank),
                "padding": padding,
                "use_bias": args.get("bias", True),
                "transpose_kernel": transposes_kernel(case),
            },
        ),
    )


def wrapped(row: Layer, plain: Layer) -> Sequence[Layer]:
    """`weight_norm` is Flax's wrapper; the legacy style, and spectral norm, are the plain layer, as in Keras.

    Flax's spectral norm takes a power step at every call, training or not, so that it computes something else. Torch's
    `dim` is an axis of (out, in, space), of (in, out, space) where transposed; Flax has (space, in, out).
    """
    if row.wrap is None or row.wrap[0] != "weight_norm":
        return [plain]
    dim = row.wrap[1].get("dim", 0)
    out_first = plain.cls != "ConvTranspose"
    axis = None if dim is None else -1 if (dim == 0) == out_first else -2
    return [Layer(row.name, "WeightNorm", {"feature_axes": axis}, (plain,))]


HALVES: dict[str, dict[str, bool]] = {
    "batch_norm2d_center_only": {"use_bias": True, "use_scale": False},
    "batch_norm2d_scale_only": {"use_bias": False, "use_scale": True},
}


def batch_norm(case: Case, row: Layer) -> Sequence[Layer]:
    affine = row.args.get("affine", True)
    parts = HALVES.get(case.name, {"use_bias": affine, "use_scale": affine})
    args = {"num_features": row.args["num_features"], "epsilon": row.args["eps"], **parts}
    return [Layer(row.name, "BatchNorm", args)]


def layer_norm(case: Case, row: Layer) -> Sequence[Layer]:
    shape = row.args["normalized_shape"]
    args = {"epsilon": row.args["eps"], "use_bias": row.args.get("bias", True), **ACCURATE}
    if isinstance(shape, int):
        return [Layer(row.name, "LayerNorm", {"num_features": shape, **args})]
    channels, *space = shape
    axes = tuple(range(-len(shape), 0))
    every = {"num_features": (*space, channels), "reduction_axes": axes, "feature_axes": axes}
    return [Layer(row.name, "LayerNorm", {**every, **args})]


def group_norm(case: Case, row: Layer) -> Sequence[Layer]:
    args = row.args
    sizes = {"num_features": args["num_channels"], "num_groups": args["num_groups"]}
    return [Layer(row.name, "GroupNorm", {**sizes, "epsilon": args["eps"], **ACCURATE})]


def instance_norm(case: Case, row: Layer) -> Sequence[Layer]:
    return [replace(one, args={**one.args, **ACCURATE}) for one in no_statistics("InstanceNorm")(case, row)]


def prelu(case: Case, row: Layer) -> Sequence[Layer]:
    if row.args.get("num_parameters", 1) != 1:
        raise Absent(ONE_SLOPE)
    return [Layer(row.name, "PReLU", {})]


CELLS = {"RNN": "SimpleCell", "LSTM": "OptimizedLSTMCell", "GRU": "GRUCell"}


def recurrent(case: Case, row: Layer) -> Sequence[Layer]:
    args = row.args
    if args.get("proj_size"):
        raise Absent("no cell has a projection")
    found = []
    for name, size in levels(case, row):
        shape: dict[str, Any] = {"in_features": size, "features": args["hidden_size"]}
        if args.get("nonlinearity"):
            shape["activation_fn"] = args["nonlinearity"]
        cell = Layer("cell", CELLS[row.cls], shape)
        both = (Layer("forward_rnn", "RNN", {}, (cell,)), Layer("backward_rnn", "RNN", {}, (cell,)))
        two = args.get("bidirectional")
        found.append(Layer(name, "Bidirectional", {}, both) if two else Layer(name, "RNN", {}, (cell,)))
    return found


SINGLE_CELLS = {"RNNCell": "SimpleCell", "LSTMCell": "LSTMCell", "GRUCell": "GRUCell"}


def single_cell(case: Case, row: Layer) -> Sequence[Layer]:
    """The plain LSTM cell here, the optimized one in layers; and the name is the cell's."""
    args = {"in_features": row.args["input_size"], "features": row.args["hidden_size"]}
    return [Layer(row.name, "RNN", {}, (Layer(row.name, SINGLE_CELLS[row.cls], args),))]


def attention(case: Case, row: Layer) -> Sequence[Layer]:
    args = row.args
    if args.get("add_bias_kv"):
        raise Absent("no learned extra key and value")
    width = args["embed_dim"]
    return [
        Layer(
            row.name,
            "MultiHeadDotProductAttention",
            {
                "num_heads": args["num_heads"],
                "in_features": width,
                "in_key_features": args.get("kdim", width),
                "in_value_features": args.get("vdim", width),
                "qkv_features": width,
                "use_bias": args.get("bias", True),
            },
        )
    ]


STEPS: dict[str, Step] = {
    **OPERATIONS,
    "Linear": dense,
    **{f"Conv{rank}d": conv for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": conv_transpose for rank in (1, 2, 3)},
    "ConstantPad1d": padding_layer,
    "ZeroPad2d": padding_layer,
    "Embedding": lambda case, row: [
        Layer(
            row.name,
            "Embed",
            {"num_embeddings": row.args["num_embeddings"], "features": row.args["embedding_dim"]},
        )
    ],
    "BatchNorm1d": batch_norm,
    "BatchNorm2d": batch_norm,
    "LayerNorm": layer_norm,
    "GroupNorm": group_norm,
    "InstanceNorm1d": instance_norm,
    "InstanceNorm2d": instance_norm,
    "RMSNorm": lambda case, row: [
        Layer(row.name, "RMSNorm", {"num_features": row.args["normalized_shape"], "epsilon": row.args["eps"]})
    ],
    "PReLU": prelu,
    **dict.fromkeys(CELLS, recurrent),
    **dict.fromkeys(SINGLE_CELLS, single_cell),
    "MultiheadAttention": attention,
}


def einsum(cls: str) -> Callable[[Case], Sequence[Layer]]:
    """Keras's equation, as Flax's `Einsum` or, where the kernel's axes are in the order in and out, `DenseGeneral`."""

    def rows(case: Case) -> Sequence[Layer]:
        (row,) = case.models["keras"].layers
        given, rest = row.args["equation"].split(",")
        kernel, result = rest.split("->")
        sizes = dict(zip(given, case.inputs[0].shape, strict=True))
        sizes |= {one: size for one, size in zip(result[1:], row.args["output_shape"], strict=True) if size}
        ours = [one for one in result if one in kernel]
        if cls == "Einsum":
            shape = tuple(sizes[one] for one in kernel)
            return [Layer(row.name, "Einsum", {"einsum_str": row.args["equation"], "shape": shape})]
        taken = [one for one in kernel if one not in result]
        assert kernel == "".join([*taken, *ours])
        args: dict[str, Any] = {
            "in_features": tuple(sizes[one] for one in taken),
            "features": tuple(sizes[one] for one in ours),
            "axis": tuple(given.index(one) - len(given) for one in taken),
        }
        return [Layer(row.name, "DenseGeneral", args)]

    return rows


def each_step(case: Case) -> Sequence[Layer]:
    """A convolution takes any number of batch axes."""
    return conv(case, case.models["torch"].layers[1])


INSTEAD: dict[str, Instead] = {
    "einsum_dense": einsum("Einsum"),
    "einsum_dense_transposed": einsum("Einsum"),
    "einsum_dense_split": einsum("DenseGeneral"),
    "einsum_dense_merge": einsum("DenseGeneral"),
    "time_distributed_conv2d": each_step,
    "bilinear": "no bilinear layer",
    "prelu_unshared": ONE_SLOPE,
    "gru_reset_before": "the reset gate is applied after the recurrent product",
    "attention_value_dim": "queries, keys and values have the same size in attention",
    **{
        f"{style}_{layer}_wrapped": "SpectralNorm takes a power step at every call: it never uses the stored kernel"
        for style in ("spectral_norm", "legacy_spectral_norm")
        for layer in ("dense", "conv2d")
    },
}
