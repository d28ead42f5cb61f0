"""ONNX models of the zoo: each row is one node; its name is also the name of its output.

>>> from tests.zoo import cases
>>> [(row.name, row.cls, row.of) for row in column(cases()["dense"]).layers]
[('layer', 'Gemm', ('x0', 'layer.weight', 'layer.bias'))]
>>> [(row.name, row.cls) for row in column(cases()["lstm"]).layers]
[('layer/time_first', 'Transpose'), ('layer', 'LSTM'), ('layer/squeeze', 'Squeeze'), ('layer/batch_first', 'Transpose')]
>>> column(cases()["lstm"]).layers[1].args["tensors"]["layer.W"]
('normal', (1, 20, 3))

`of` holds all inputs of a node, initializers among them. A row's `args` are the node's `attributes`, and its `tensors` by
name: how each is filled, and its shape (`int64`: its elements). Weights are plain: ONNX has no weight or spectral norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.zoo import Case, Layer, Model, lettered

FORMATS = ("onnx", "onnx_external", "onnx_torch", "onnx_torch_legacy")
Arguments = dict[str, Any]
Tensor = tuple[str, tuple[int, ...]]

ABSENT = {
    "instance_norm2d_statistics": "InstanceNormalization keeps no statistics",
    "lstm_projection": "the LSTM operator has no projection",
}
BLIND = {
    "attention": ("layer.k_proj.bias",),
    "attention_cross": ("layer.k_proj.bias",),
    "attention_value_dim": ("layer.k_proj.bias",),
}
"""Tensors that no forward pass can see: a bias on the keys shifts every score of a query alike."""

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


@dataclass
class Nodes:
    """Rows in the making: the value that each row of the case became, and whether its vectors lie in (n, c)."""

    flat: bool
    rows: list[Layer] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)

    def add(
        self, name: str, op: str, of: Sequence[str], tensors: dict[str, Tensor] | None = None, **attributes: Any
    ) -> str:
        """A node; tensors whose names are not among its inputs yet are appended to them."""
        tensors = tensors or {}
        inputs = (*of, *(tensor for tensor in tensors if tensor not in of))
        self.rows.append(Layer(name, op, {"attributes": attributes, "tensors": tensors}, of=inputs))
        return name


Translate = Callable[[Nodes, str, str, Arguments, list[str]], str]
"""(nodes, name of the node, path of its tensors, torch's arguments, values) -> the resulting value."""


def several(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def dense(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    """Gemm for (n, c), with the weight either way round; MatMul and Add for more axes."""
    into, out = args["in_features"], args["out_features"]
    bias: dict[str, Tensor] = {f"{path}.bias": ("normal", (out,))} if args.get("bias", True) else {}
    if nodes.flat and bias:
        turned = not name.endswith("head")
        shape = (out, into) if turned else (into, out)
        return nodes.add(name, "Gemm", of, {f"{path}.weight": ("normal", shape), **bias}, transB=int(turned))
    product = nodes.add(name, "MatMul", of, {f"{path}.weight": ("normal", (into, out))})
    return nodes.add(f"{name}/add", "Add", [product], bias) if bias else product


def conv(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    size = args["kernel_size"]
    rank = args["rank"]
    groups = args.get("groups", 1)
    shape = (args["out_channels"], args["in_channels"] // groups, *several(size, rank))
    return nodes.add(name, "Conv", of, windowed(path, shape, args), **window(args, rank))


def conv_transpose(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    rank = args["rank"]
    groups = args.get("groups", 1)
    shape = (args["in_channels"], args["out_channels"] // groups, *several(args["kernel_size"], rank))
    extra = {"output_padding": several(args["output_padding"], rank)} if "output_padding" in args else {}
    return nodes.add(name, "ConvTranspose", of, windowed(path, shape, args), **window(args, rank), **extra)


def windowed(path: str, shape: tuple[int, ...], args: Arguments) -> dict[str, Tensor]:
    bias: dict[str, Tensor] = {f"{path}.bias": ("normal", (args["out_channels"],))} if args.get("bias", True) else {}
    return {f"{path}.weight": ("normal", shape), **bias}


def window(args: Arguments, rank: int) -> Arguments:
    padding = args.get("padding", 0)
    around = {"auto_pad": "SAME_UPPER"} if padding == "same" else {"pads": several(padding, rank) * 2}
    return {
        "kernel_shape": several(args["kernel_size"], rank),
        "strides": several(args.get("stride", 1), rank),
        "dilations": several(args.get("dilation", 1), rank),
        "group": args.get("groups", 1),
        **around,
    }


def pad(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    """Torch names the last axis first, each with before and after; ONNX all befores, then all afters."""
    pairs = list(zip(args["padding"][::2], args["padding"][1::2], strict=True))[::-1]
    before, after = ((0, 0, *(pair[side] for pair in pairs)) for side in (0, 1))
    return nodes.add(name, "Pad", of, {f"{name}/pads": ("int64", (*before, *after))})


def embedding(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    table: Tensor = ("normal", (args["num_embeddings"], args["embedding_dim"]))
    return nodes.add(name, "Gather", [f"{path}.weight", *of], {f"{path}.weight": table}, axis=0)


def batch_norm(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    """The operator has all four; a scale or bias that the case lacks is constant."""
    size = (args["num_features"],)
    tensors: dict[str, Tensor] = {
        f"{path}.weight": ("normal" if args.get("scale", True) else "ones", size),
        f"{path}.bias": ("normal" if args.get("center", True) else "zeros", size),
        f"{path}.running_mean": ("normal", size),
        f"{path}.running_var": ("positive", size),
    }
    return nodes.add(name, "BatchNormalization", of, tensors, epsilon=args["eps"])


def norm(op: str, **also: Callable[[Arguments], Any]) -> Translate:
    def translate(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
        size = next(args[key] for key in ("normalized_shape", "num_features", "num_channels") if key in args)
        shape = several(size, 1)
        tensors: dict[str, Tensor] = {f"{path}.weight": ("normal", shape)}
        if op != "RMSNormalization" and args.get("bias", True):
            tensors[f"{path}.bias"] = ("normal", shape)
        attributes = {key: value(args) for key, value in also.items()}
        return nodes.add(name, op, of, tensors, epsilon=args["eps"], **attributes)

    return translate


def last_axes(args: Arguments) -> int:
    return -len(several(args["normalized_shape"], 1))


def prelu(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    """The slope is broadcast to the input from the right."""
    slope = args.get("slope") or (args.get("num_parameters", 1), *(() if nodes.flat else (1, 1)))
    return nodes.add(name, "PRelu", of, {f"{path}.weight": ("normal", slope)})


def recurrent(op: str) -> Translate:
    """Time comes first, directions are an axis of the output, and each level is a node of its own."""

    def translate(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
        size, levels = args["hidden_size"], args.get("num_layers", 1)
        two = args.get("bidirectional", False)
        attributes: Arguments = {"hidden_size": size, "direction": "bidirectional" if two else "forward"}
        if op == "GRU":
            attributes["linear_before_reset"] = int(args.get("reset_after", True))
        if "nonlinearity" in args:
            attributes["activations"] = [args["nonlinearity"].title()] * (1 + two)
        value = nodes.add(f"{name}/time_first", "Transpose", of, perm=(1, 0, 2))
        into = args["input_size"]
        for level in range(levels):
            node = name if levels == 1 else f"{name}_{level}"
            tensors = weights_of(op, node, 1 + two, size, into, args.get("bias", True))
            value = nodes.add(node, op, [value], tensors, **attributes)
            into = size * (1 + two)
            if two:
                value = nodes.add(f"{node}/side_by_side", "Transpose", [value], perm=(0, 2, 1, 3))
                value = nodes.add(f"{node}/join", "Reshape", [value], {f"{node}/joined": ("int64", (0, 0, -1))})
            else:
                value = nodes.add(f"{node}/squeeze", "Squeeze", [value], {f"{node}/axes": ("int64", (1,))})
        return nodes.add(f"{name}/batch_first", "Transpose", [value], perm=(1, 0, 2))

    return translate


def weights_of(op: str, node: str, directions: int, size: int, into: int, bias: bool) -> dict[str, Tensor]:
    rows = GATES[op] * size
    shapes: dict[str, tuple[int, ...]] = {"W": (directions, rows, into), "R": (directions, rows, size)}
    if bias:
        shapes["B"] = (directions, 2 * rows)
    return {f"{node}.{name}": ("normal", shape) for name, shape in shapes.items()}


def attention(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    """Four projections around either the Attention operator or what it stands for."""
    heads, width = args["num_heads"], args["embed_dim"]
    into = (width, args.get("kdim", width), args.get("vdim", width))
    key, value_size = width // heads, args.get("value_dim", width // heads)
    sizes = (width, width, heads * value_size)
    bias = {"bias": args.get("bias", True)}
    parts = [
        dense(nodes, f"{name}.{part}_proj", f"{path}.{part}_proj", {"in_features": i, "out_features": o, **bias}, [x])
        for part, i, o, x in zip("qkv", into, sizes, of, strict=True)
    ]
    if args.get("add_bias_kv"):
        parts[1:] = [one_more(nodes, name, path, "kv"[i], width, parts[i + 1]) for i in (0, 1)]
    if "kdim" in args or "value_dim" in args:
        joined = nodes.add(name, "Attention", parts, q_num_heads=heads, kv_num_heads=heads)
    else:
        joined = attended(nodes, name, heads, key, parts)
    out = {"in_features": heads * value_size, "out_features": width, **bias}
    return dense(nodes, f"{name}.out_proj", f"{path}.out_proj", out, [joined])


def one_more(nodes: Nodes, name: str, path: str, part: str, width: int, value: str) -> str:
    """A learned key or value behind the others: (1, 1, width), as often as the batch is long."""
    start = nodes.add(f"{name}/{part}_shape", "Shape", [value], start=0, end=1)
    ones: dict[str, Tensor] = {f"{name}/{part}_ones": ("int64", (1, 1))}
    shape = nodes.add(f"{name}/{part}_expanded", "Concat", [start], ones, axis=0)
    tensor = f"{path}.bias_{part}"
    again = nodes.add(f"{name}/{part}_expand", "Expand", [tensor, shape], {tensor: ("normal", (1, 1, width))})
    return nodes.add(f"{name}/{part}_more", "Concat", [value, again], axis=1)


def attended(nodes: Nodes, name: str, heads: int, key: int, parts: list[str]) -> str:
    split = []
    for part, value in zip("qkv", parts, strict=True):
        shape: dict[str, Tensor] = {f"{name}/{part}_heads": ("int64", (0, 0, heads, -1))}
        value = nodes.add(f"{name}/{part}_split", "Reshape", [value], shape)
        perm = (0, 2, 3, 1) if part == "k" else (0, 2, 1, 3)
        split.append(nodes.add(f"{name}/{part}_turned", "Transpose", [value], perm=perm))
    scores = nodes.add(f"{name}/scores", "MatMul", split[:2])
    scale: dict[str, Tensor] = {f"{name}/root": ("root", (key,))}
    scores = nodes.add(f"{name}/scaled", "Div", [scores], scale)
    weights = nodes.add(f"{name}/weights", "Softmax", [scores], axis=-1)
    value = nodes.add(name, "MatMul", [weights, split[2]])
    value = nodes.add(f"{name}/turned", "Transpose", [value], perm=(0, 2, 1, 3))
    return nodes.add(f"{name}/joined", "Reshape", [value], {f"{name}/width": ("int64", (0, 0, -1))})


def bilinear(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    shape = (args["out_features"], args["in1_features"], args["in2_features"])
    weight: dict[str, Tensor] = {f"{path}.weight": ("normal", shape)}
    value = nodes.add(name, "Einsum", [of[0], f"{path}.weight", of[1]], weight, equation="ni,oij,nj->no")
    return nodes.add(f"{name}/add", "Add", [value], {f"{path}.bias": ("normal", shape[:1])})


def einsum(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    """From Keras's row: letters get their sizes from the input and from `output_shape`."""
    left, right = args["equation"].split("->")
    given, kernel = left.split(",")
    sizes = dict(zip(right, (1, *args["output_shape"]), strict=True)) | dict(zip(given, args["input"], strict=True))
    weight: dict[str, Tensor] = {f"{path}.weight": ("normal", tuple(sizes[letter] for letter in kernel))}
    bias: dict[str, Tensor] = {f"{path}.bias": ("normal", tuple(sizes[letter] for letter in args["bias_axes"]))}
    value = nodes.add(name, "Einsum", of, weight, equation=args["equation"])
    return nodes.add(f"{name}/add", "Add", [value], bias)


def flatten(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    if not args:
        return nodes.add(name, "Flatten", of, axis=1)
    tail = nodes.add(f"{name}/tail", "Shape", of, start=args["end_dim"] + 1)
    return reshaped(nodes, name, of, (-1,), tail)


def unflatten(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    if args["dim"] == 1:
        return nodes.add(name, "Reshape", of, {f"{name}/shape": ("int64", (0, *args["unflattened_size"]))})
    tail = nodes.add(f"{name}/tail", "Shape", of, start=1)
    return reshaped(nodes, name, of, args["unflattened_size"], tail)


def reshaped(nodes: Nodes, name: str, of: list[str], front: tuple[int, ...], tail: str) -> str:
    """To a shape of which only the front is known beforehand."""
    fixed: dict[str, Tensor] = {f"{name}/front": ("int64", front)}
    shape = nodes.add(f"{name}/shape", "Concat", [f"{name}/front", tail], fixed, axis=0)
    return nodes.add(name, "Reshape", [*of, shape])


def plain(op: str, **attributes: Any) -> Translate:
    return lambda nodes, name, path, args, of: nodes.add(name, op, of, **attributes)


def max_pool(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    size = several(args["kernel_size"], 2)
    return nodes.add(name, "MaxPool", of, kernel_shape=size, strides=size)


def last(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    return nodes.add(name, "Gather", of, {f"{name}/index": ("scalar", (-1,))}, axis=1)


def left_out(nodes: Nodes, name: str, path: str, args: Arguments, of: list[str]) -> str:
    return of[0]


TRANSLATE: dict[str, Translate] = {
    "Linear": dense,
    "Bilinear": bilinear,
    "EinsumDense": einsum,
    **{f"Conv{rank}d": conv for rank in (1, 2, 3)},
    **{f"ConvTranspose{rank}d": conv_transpose for rank in (1, 2, 3)},
    "ConstantPad1d": pad,
    "ZeroPad2d": pad,
    "Embedding": embedding,
    **{f"BatchNorm{rank}d": batch_norm for rank in (1, 2)},
    **{f"InstanceNorm{rank}d": norm("InstanceNormalization") for rank in (1, 2)},
    "LayerNorm": norm("LayerNormalization", axis=last_axes),
    "GroupNorm": norm("GroupNormalization", num_groups=lambda args: args["num_groups"]),
    "RMSNorm": norm("RMSNormalization", axis=last_axes),
    "PReLU": prelu,
    **{cls: recurrent(cls.removesuffix("Cell")) for op in GATES for cls in (op, f"{op}Cell")},
    "MultiheadAttention": attention,
    "Flatten": flatten,
    "Unflatten": unflatten,
    "ReLU": plain("Relu"),
    "Tanh": plain("Tanh"),
    "MaxPool2d": max_pool,
    "AdaptiveAvgPool2d": plain("GlobalAveragePool"),
    "Dropout": left_out,
    "concat": plain("Concat", axis=1),
    "add": plain("Add"),
    "last": last,
}


def einsum_rows(case: Case) -> list[Layer]:
    (row,) = case.models["keras"].layers
    return [replace(row, args=row.args | {"input": case.inputs[0].shape})]


def half_norm(scale: bool, center: bool) -> Callable[[Case], list[Layer]]:
    def rows(case: Case) -> list[Layer]:
        (row,) = case.models["torch"].layers
        return [replace(row, args=row.args | {"scale": scale, "center": center})]

    return rows


def reset_before(case: Case) -> list[Layer]:
    (row,) = case.models["keras"].layers
    args = {"input_size": case.inputs[0].shape[-1], "hidden_size": row.args["units"], "reset_after": False}
    return [Layer("layer", "GRU", args)]


def value_dim(case: Case) -> list[Layer]:
    (row,) = case.models["keras"].layers
    sizes = {name: row.args[name] for name in ("num_heads", "value_dim")}
    args = {"embed_dim": case.inputs[0].shape[-1], **sizes}
    return [Layer("layer", "MultiheadAttention", args, of=("x0", "x0", "x0"))]


REWRITTEN: dict[str, Callable[[Case], list[Layer]]] = {
    **{f"einsum_dense{suffix}": einsum_rows for suffix in ("", "_transposed", "_split", "_merge")},
    "batch_norm2d_plain": half_norm(scale=False, center=False),
    "batch_norm2d_center_only": half_norm(scale=False, center=True),
    "batch_norm2d_scale_only": half_norm(scale=True, center=False),
    "prelu_unshared": lambda case: [Layer("layer", "PReLU", {"slope": case.inputs[0].shape[1:]})],
    "gru_reset_before": reset_before,
    "attention_value_dim": value_dim,
}
"""What Keras says and torch does not, in torch's words."""


def translate(nodes: Nodes, rows: tuple[Layer, ...], prefix: str, value: str) -> str:
    by_name = {row.name: row for row in rows}
    for row in rows:
        of = [nodes.values[source] for source in row.of] or [value]
        name = prefix + row.name
        if row.cls == "Sequential":
            value = translate(nodes, row.inside, f"{name}.", value)
        else:
            shared = by_name.get(row.cls)
            source = shared or row
            rank = {"rank": int(source.cls[-2])} if source.cls.startswith("Conv") else {}
            value = TRANSLATE[source.cls](nodes, name, prefix + source.name, source.args | rank, of)
        nodes.values[row.name] = value
    return value


def column(case: Case) -> Model | str:
    if case.name in ABSENT:
        return ABSENT[case.name]
    rows = tuple(REWRITTEN[case.name](case)) if case.name in REWRITTEN else case.models["torch"].layers
    nodes = Nodes("nc" in (case.inputs[0].axes, case.output))
    nodes.values |= {f"x{i}": f"x{i}" for i in range(len(case.inputs))}
    value = translate(nodes, rows, "", "x0")
    assert value == nodes.rows[-1].name
    return Model("graph", tuple(nodes.rows), tuple(one.axes for one in case.inputs), case.output)


def side_by_side(parts: list[Case], models: list[Model]) -> Model:
    """The nodes of several models; nodes, values and initializers are told apart by a letter, inputs are counted on."""
    rows: list[Layer] = []
    first = 0
    for (letter, part), model in zip(lettered(parts), models, strict=True):
        inputs = {f"x{i}": f"x{first + i}" for i in range(len(part.inputs))}
        for row in model.layers:
            of = tuple(inputs.get(name, f"{letter}_{name}") for name in row.of)
            tensors = {f"{letter}_{name}": tensor for name, tensor in row.args["tensors"].items()}
            rows.append(replace(row, name=f"{letter}_{row.name}", args=row.args | {"tensors": tensors}, of=of))
        first += len(part.inputs)
    return Model("graph", tuple(rows), tuple(axes for model in models for axes in model.inputs), models[-1].output)
