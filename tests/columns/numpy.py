"""The zoo in plain NumPy: each layer as the kind it is, its tensors in the canonical axes of `schema/kinds.py`.

>>> from tests.zoo import cases
>>> (row,) = column(cases()["gru_bidirectional"]).layers
>>> row.name, row.cls, row.args["tensors"]["bias"]
('layer', 'gru', (2, 2, 3, 5))
>>> [row.name for row in column(cases()["nested"]).layers]
['body/one', 'body/deep/two', 'head']

A row's class is a kind or an operation (`relu()`) of tests/oracle/numpy_layers.py; its `args` are the settings, and the shapes of
its `tensors` by role. Weights are plain: a weight or spectral norm is not a kind. A stacked recurrent layer is a layer a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.zoo import Case, Layer, Model

FORMATS = ("npz",)
Arguments = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

BLIND = dict.fromkeys(("attention", "attention_cross", "attention_value_dim"), ("layer/key_bias",))
"""Tensors that no forward pass can see: a bias on the keys shifts every score of a query alike."""

RECURRENT = {"RNN": "simple_rnn", "LSTM": "lstm", "GRU": "gru"}
GATES: dict[str, tuple[int, ...]] = {"simple_rnn": (), "lstm": (4,), "gru": (3,)}
"""Gates are input, forget, cell, output; and reset, update, new. Sides are input, recurrent."""

Kind = tuple[str, Arguments, Shapes]


def several(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def with_bias(args: Arguments, kernel: tuple[int, ...], size: int) -> Shapes:
    return {"kernel": kernel, "bias": (size,)} if args.get("bias", True) else {"kernel": kernel}


def dense(args: Arguments) -> Kind:
    into, out = args["in_features"], args["out_features"]
    return "dense", {}, with_bias(args, (out, into), out)


def bilinear(args: Arguments) -> Kind:
    out = args["out_features"]
    return "bilinear", {}, {"kernel": (out, args["in1_features"], args["in2_features"]), "bias": (out,)}


def einsum(args: Arguments) -> Kind:
    """The kernel's axes are the letters that it makes, then those that it takes from the input."""
    left, right = args["equation"].split("->")
    given, kernel = left.split(",")
    sizes = dict(zip(right, (1, *args["output_shape"]), strict=True)) | dict(zip(given, args["input"], strict=True))
    ordered = "".join(sorted(kernel, key=lambda letter: letter in given))
    tensors = {"kernel": tuple(sizes[one] for one in ordered), "bias": tuple(sizes[one] for one in args["bias_axes"])}
    return "einsum_dense", {"equation": f"{given},{ordered}->{right}"}, tensors


def window(args: Arguments, rank: int) -> Arguments:
    padding = args.get("padding", 0)
    return {
        "strides": several(args.get("stride", 1), rank),
        "padding": padding if padding == "same" else tuple((one, one) for one in several(padding, rank)),
        "dilation": several(args.get("dilation", 1), rank),
        "groups": args.get("groups", 1),
    }


def conv(rank: int) -> Callable[[Arguments], Kind]:
    def kind(args: Arguments) -> Kind:
        out, groups = args["out_channels"], args.get("groups", 1)
        kernel = (out, args["in_channels"] // groups, *several(args["kernel_size"], rank))
        return "conv", window(args, rank), with_bias(args, kernel, out)

    return kind


def conv_transpose(rank: int) -> Callable[[Arguments], Kind]:
    def kind(args: Arguments) -> Kind:
        out, groups = args["out_channels"], args.get("groups", 1)
        kernel = (args["in_channels"], out // groups, *several(args["kernel_size"], rank))
        extra = {"output_padding": several(args.get("output_padding", 0), rank)}
        return "conv_transpose", window(args, rank) | extra, with_bias(args, kernel, out)

    return kind


def embedding(args: Arguments) -> Kind:
    return "embedding", {}, {"embedding": (args["num_embeddings"], args["embedding_dim"])}


def batch_norm(args: Arguments) -> Kind:
    names = [name for name in ("scale", "bias") if args.get("affine", True) and args.get(name, True)]
    return "batch_norm", {"eps": args["eps"]}, dict.fromkeys([*names, "mean", "variance"], (args["num_features"],))


def instance_norm(args: Arguments) -> Kind:
    names = ["scale", "bias", *(["mean", "variance"] if args.get("track_running_stats") else [])]
    return "instance_norm", {"eps": args["eps"]}, dict.fromkeys(names, (args["num_features"],))


def layer_norm(args: Arguments) -> Kind:
    names = ["scale", "bias"] if args.get("bias", True) else ["scale"]
    return "layer_norm", {"eps": args["eps"]}, dict.fromkeys(names, several(args["normalized_shape"], 1))


def group_norm(args: Arguments) -> Kind:
    settings = {"eps": args["eps"], "groups": args["num_groups"]}
    return "group_norm", settings, dict.fromkeys(["scale", "bias"], (args["num_channels"],))


def rms_norm(args: Arguments) -> Kind:
    return "rms_norm", {"eps": args["eps"]}, {"scale": several(args["normalized_shape"], 1)}


def prelu(args: Arguments) -> Kind:
    return "prelu", {}, {"slope": args.get("slope", (args.get("num_parameters", 1),))}


def attention(args: Arguments) -> Kind:
    heads, width = args["num_heads"], args["embed_dim"]
    value = heads * args.get("value_dim", width // heads)
    tensors: Shapes = {
        "query_kernel": (width, width),
        "key_kernel": (width, args.get("kdim", width)),
        "value_kernel": (value, args.get("vdim", width)),
        "output_kernel": (width, value),
    }
    if args.get("bias", True):
        tensors |= {"query_bias": (width,), "key_bias": (width,), "value_bias": (value,), "output_bias": (width,)}
    if args.get("add_bias_kv"):
        tensors |= {"extra_key": (width,), "extra_value": (value,)}
    return "attention", {"heads": heads}, tensors


def level(cls: str, args: Arguments, into: int) -> Kind:
    """One level of a recurrent layer; `hidden` is what a step hands to the next."""
    kind = RECURRENT[cls.removesuffix("Cell")]
    unit, hidden = args["hidden_size"], args.get("proj_size", args["hidden_size"])
    front = (2,) if args.get("bidirectional") else ()
    gates = GATES[kind]
    tensors: Shapes = {"input_kernel": (*front, *gates, unit, into), "recurrent_kernel": (*front, *gates, unit, hidden)}
    if args.get("bias", True):
        tensors["bias"] = (*front, 2, *gates, unit)
    if "proj_size" in args:
        tensors["projection"] = (*front, hidden, unit)
    settings: Arguments = {"bidirectional": bool(front)}
    if kind == "simple_rnn":
        settings["activation"] = args.get("nonlinearity", "tanh")
    if kind == "gru":
        settings["reset_after"] = args.get("reset_after", True)
    return kind, settings, tensors


def operation(name: str, **names: str) -> Callable[[Arguments], Kind]:
    """Something without weights; `names` are its settings by torch's names for them."""
    return lambda args: (f"{name}()", {ours: args[theirs] for ours, theirs in names.items() if theirs in args}, {})


KINDS: dict[str, Callable[[Arguments], Kind]] = {
    "Linear": dense,
    "Bilinear": bilinear,
    "EinsumDense": einsum,
    **{f"Conv{rank}d": conv(rank) for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": conv_transpose(rank) for rank in (1, 2, 3)},
    "Embedding": embedding,
    **{f"BatchNorm{rank}d": batch_norm for rank in (1, 2)},
    **{f"InstanceNorm{rank}d": instance_norm for rank in (1, 2)},
    "LayerNorm": layer_norm,
    "GroupNorm": group_norm,
    "RMSNorm": rms_norm,
    "PReLU": prelu,
    "MultiheadAttention": attention,
    "ReLU": operation("relu"),
    "Tanh": operation("tanh"),
    "Dropout": operation("nothing"),
    "Flatten": operation("flatten", start="start_dim", end="end_dim"),
    "Unflatten": operation("unflatten", axis="dim", sizes="unflattened_size"),
    "ConstantPad1d": operation("pad", last_axis_first="padding"),
    "ZeroPad2d": operation("pad", last_axis_first="padding"),
    "MaxPool2d": operation("max_pool", size="kernel_size"),
    "AdaptiveAvgPool2d": operation("global_average_pool"),
    "concat": operation("concat"),
    "add": operation("add"),
    "last": operation("last"),
}

KERAS_ONLY: dict[str, Callable[[Case, Arguments], tuple[str, Arguments]]] = {
    "EinsumDense": lambda case, args: ("EinsumDense", args | {"input": case.inputs[0].shape}),
    "GRU": lambda case, args: (
        "GRU",
        {"input_size": case.inputs[0].shape[-1], "hidden_size": args["units"], "reset_after": args["reset_after"]},
    ),
    "MultiHeadAttention": lambda case, args: (
        "MultiheadAttention",
        {"embed_dim": case.inputs[0].shape[-1], "num_heads": args["num_heads"], "value_dim": args["value_dim"]},
    ),
    "PReLU": lambda case, args: ("PReLU", {"slope": case.inputs[0].shape[1:]}),
}
"""Keras's rows in torch's words, for cases that torch lacks or says less exactly."""

HALVES: dict[str, Arguments] = {
    "batch_norm2d_center_only": {"scale": False},
    "batch_norm2d_scale_only": {"bias": False},
}


def rows_of(case: Case) -> tuple[Layer, ...]:
    if "torch" in case.models and case.kind != "einsum_dense":
        more = HALVES.get(case.name, {})
        return tuple(
            Layer(one.name, one.cls, one.args | more, one.inside, one.of) for one in case.models["torch"].layers
        )
    (row,) = case.models["keras"].layers
    cls, args = KERAS_ONLY[row.cls](case, row.args)
    # Torch's attention is called with query, key and value.
    return (Layer(row.name, cls, args, of=("x0",) * 3 if cls == "MultiheadAttention" else ()),)


def flat(rows: tuple[Layer, ...], prefix: str, names: set[str]) -> list[Layer]:
    """Rows without containers and stacks, in the order of computation; a row that calls an earlier one keeps its name."""
    found: list[Layer] = []
    for row in rows:
        name = prefix + row.name
        if row.cls == "Sequential":
            found += flat(row.inside, f"{name}/", names)
        elif row.cls in names and row.cls != row.name:
            found.append(Layer(name, row.cls, {"tensors": {}}, of=row.of))
        elif row.cls.removesuffix("Cell") in RECURRENT:
            found += levels(row, name)
        else:
            kind, settings, tensors = KINDS[row.cls](row.args)
            found.append(Layer(name, kind, {**settings, "tensors": tensors}, of=row.of))
    return found


def levels(row: Layer, name: str) -> list[Layer]:
    depth = row.args.get("num_layers", 1)
    into = row.args["input_size"]
    found = []
    for i in range(depth):
        kind, settings, tensors = level(row.cls, row.args, into)
        found.append(Layer(name if depth == 1 else f"{name}_{i}", kind, {**settings, "tensors": tensors}, of=row.of))
        into = row.args["hidden_size"] * (1 + settings["bidirectional"])
    return found


def column(case: Case) -> Model | str:
    rows = rows_of(case)
    found = flat(rows, "", {row.name for row in rows})
    if case.kind in ("depthwise_conv", "separable_conv"):
        found = [one if one.args["groups"] == 1 else Layer(one.name, "depthwise", one.args) for one in found]
    return Model("graph", tuple(found), tuple(one.axes for one in case.inputs), case.output)
