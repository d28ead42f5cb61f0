"""Torch's weights as those of Flax and MLX, from the definitions of these frameworks alone, to judge the columns.

`copied(case, rows, ours, framework)` gives the tensors of the column's model, under its full names, with which it computes
what the torch model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tests.oracle.column_runner import Arrays
from tests.oracle.test_oracle import effective, interleave, rows_of
from tests.zoo import Case, Layer

Weights = dict[str, Any]
STATISTICS = ("mean", "var")


class Torch:
    """The weights of one torch layer, and the sizes of the case's input."""

    def __init__(self, ours: Arrays, path: str, row: Layer, level: int, sizes: tuple[int, ...]) -> None:
        self.ours, self.path, self.row, self.level, self.sizes = ours, path, row, level, sizes

    def __getitem__(self, name: str) -> np.ndarray:
        return self.ours[f"{self.path}.{name}"]

    def __contains__(self, name: str) -> bool:
        return f"{self.path}.{name}" in self.ours

    @property
    def weight(self) -> np.ndarray:
        return effective(self.ours, self.path, self.row)

    def vectors(self, **names: str) -> Weights:
        return {ours: self[theirs] for ours, theirs in names.items() if theirs in self}

    def sides(self, backward: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Input and recurrent kernels, and their biases, zeros where there are none."""
        suffix = "" if self.row.cls.endswith("Cell") else f"_l{self.level}" + ("_reverse" if backward else "")
        kernels = self[f"weight_ih{suffix}"], self[f"weight_hh{suffix}"]
        biases = [
            self[f"{one}{suffix}"] if f"{one}{suffix}" in self else np.zeros(len(kernels[0]), kernels[0].dtype)
            for one in ("bias_ih", "bias_hh")
        ]
        return *kernels, biases[0], biases[1]

    def attention(self) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """Kernel (out, in) and bias of each part."""
        packed = np.split(self["in_proj_weight"], 3) if "in_proj_weight" in self else [None] * 3
        biases = np.split(self["in_proj_bias"], 3) if "in_proj_bias" in self else [None] * 3
        found = {}
        for name, weight, bias in zip(("query", "key", "value"), packed, biases, strict=True):
            found[name] = (self[f"{name[0]}_proj_weight"] if weight is None else weight, bias)
        return found | {"out": (self["out_proj.weight"], self.vectors(bias="out_proj.bias").get("bias"))}


def channels_last(kernel: np.ndarray) -> np.ndarray:
    """(out, in, space) as (space, in, out)."""
    return np.moveaxis(kernel, (0, 1), (-1, -2))


def bias(torch: Torch) -> Weights:
    return torch.vectors(bias="bias")


def flax_conv_transpose(kernel: np.ndarray, row: Layer) -> np.ndarray:
    """From (in, out, space): (space, out, in), or flipped in space and (space, in, out)."""
    if row.args["transpose_kernel"]:
        return channels_last(kernel)
    return np.flip(np.moveaxis(kernel, (0, 1), (-2, -1)), tuple(range(kernel.ndim - 2)))


def flax_norm(torch: Torch, row: Layer) -> Weights:
    found = torch.vectors(scale="weight", bias="bias", mean="running_mean", var="running_var")
    if row.cls == "BatchNorm":
        found = {name: value for name, value in found.items() if row.args.get(f"use_{name}", True)}
    return {name: np.moveaxis(value, 0, -1) if value.ndim > 1 else value for name, value in found.items()}


def weight_norm(torch: Torch, row: Layer) -> Weights:
    size, direction = (torch[f"parametrizations.weight.original{i}"] for i in (0, 1))
    (inner,) = row.inside
    if inner.cls == "Dense":
        direction = direction.T
    elif inner.cls == "Conv":
        direction = channels_last(direction)
    else:
        direction = flax_conv_transpose(direction, inner)
    size = size.reshape(()) if row.args["feature_axes"] is None else size.ravel()
    return {"kernel": direction, **bias(torch), "/WeightNorm_0/layer/kernel/scale": size}


def flax_attention(torch: Torch, row: Layer) -> Weights:
    heads, found = row.args["num_heads"], {}
    for name, (kernel, vector) in torch.attention().items():
        shape = (heads, -1, len(kernel)) if name == "out" else (kernel.shape[1], heads, -1)
        found[f"{name}/kernel"] = kernel.T.reshape(shape)
        if vector is not None:
            found[f"{name}/bias"] = vector if name == "out" else vector.reshape(heads, -1)
    return found


def cell(row: Layer, sides: Sequence[np.ndarray], gates: Callable[..., Weights]) -> Weights:
    ih, hh, bias_ih, bias_hh = sides
    return gates(row, ih.T, hh.T, bias_ih, bias_hh)


def linen_cell(row: Layer, ih: np.ndarray, hh: np.ndarray, bias_ih: np.ndarray, bias_hh: np.ndarray) -> Weights:
    """A kernel for each gate."""
    if row.cls == "SimpleCell":
        return {"i/kernel": ih, "i/bias": bias_ih + bias_hh, "h/kernel": hh}
    gates = "rzn" if row.cls == "GRUCell" else "ifgo"
    parts = (np.split(one, len(gates), axis=-1) for one in (ih, hh, bias_ih, bias_hh))
    found: Weights = {}
    for gate, kernel, recurrent, one, other in zip(gates, *parts, strict=True):
        found |= {f"i{gate}/kernel": kernel, f"h{gate}/kernel": recurrent}
        if row.cls != "GRUCell":
            found[f"h{gate}/bias"] = one + other
        elif gate == "n":
            found |= {"in/bias": one, "hn/bias": other}
        else:
            found[f"i{gate}/bias"] = one + other
    return found


def nnx_cell(row: Layer, ih: np.ndarray, hh: np.ndarray, bias_ih: np.ndarray, bias_hh: np.ndarray) -> Weights:
    if row.cls == "LSTMCell":
        found = linen_cell(row, ih, hh, bias_ih, bias_hh)
        return {name.replace("if/", "if_/"): value for name, value in found.items()}
    if row.cls == "GRUCell":
        assert not bias_hh[2 * len(bias_hh) // 3 :].any(), "the cell has no such bias"
    side = "dense_h" if row.cls == "OptimizedLSTMCell" else "dense_i"
    return {"dense_i/kernel": ih, "dense_h/kernel": hh, f"{side}/bias": bias_ih + bias_hh}


def flax_recurrent(torch: Torch, row: Layer, gates: Callable[..., Weights]) -> Weights:
    if row.cls == "RNN":
        (inner,) = row.inside
        place = "" if inner.name == row.name and gates is linen_cell else "cell/"
        return {f"{place}{name}": value for name, value in cell(inner, torch.sides(), gates).items()}
    found: Weights = {}
    for side in row.inside:
        parts = cell(side.inside[0], torch.sides(side.name == "backward_rnn"), gates)
        found |= {f"{side.name}/cell/{name}": value for name, value in parts.items()}
    return found


def general(torch: Torch, row: Layer) -> Weights:
    """Torch's columns and rows as several axes each."""
    taken = [torch.sizes[axis] for axis in row.args["axis"]]
    made = row.args["features" if row.cls == "DenseGeneral" else "out_features"]
    return {"kernel": torch.weight.T.reshape(*taken, *made), "bias": torch["bias"].reshape(made)}


Local = Callable[[Torch, Layer], Weights]
FLAX: dict[str, Local] = {
    "Dense": lambda torch, row: {"kernel": torch.weight.T, **bias(torch)},
    "Einsum": lambda torch, row: {
        "kernel": torch.weight if "dc" in row.args["einsum_str"] else torch.weight.T,
        **bias(torch),
    },
    "Conv": lambda torch, row: {"kernel": channels_last(torch.weight), **bias(torch)},
    "ConvTranspose": lambda torch, row: {"kernel": flax_conv_transpose(torch.weight, row), **bias(torch)},
    "WeightNorm": weight_norm,
    "Embed": lambda torch, row: {"embedding": torch.weight},
    **dict.fromkeys(("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm"), flax_norm),
    "PReLU": lambda torch, row: {"negative_slope": torch.weight.reshape(())},
    "MultiHeadDotProductAttention": flax_attention,
}
LINEN: dict[str, Local] = {
    **FLAX,
    "DenseGeneral": general,
    **dict.fromkeys(("RNN", "Bidirectional"), lambda torch, row: flax_recurrent(torch, row, linen_cell)),
}
NNX: dict[str, Local] = {
    **FLAX,
    "Linear": FLAX["Dense"],
    "LinearGeneral": general,
    "MultiHeadAttention": flax_attention,
    **dict.fromkeys(("RNN", "Bidirectional"), lambda torch, row: flax_recurrent(torch, row, nnx_cell)),
}


def mlx_conv(torch: Torch, row: Layer) -> Weights:
    """(out, space, in), transposed or not."""
    axes = ((0, 1), (-1, 0)) if "Transpose" in row.cls else ((1,), (-1,))
    return {"weight": np.moveaxis(torch.weight, *axes), **bias(torch)}


def mlx_norm(torch: Torch, row: Layer) -> Weights:
    names = ("weight", "bias", "running_mean", "running_var")
    return torch.vectors(**{name: name for name in names})


def mlx_recurrent(torch: Torch, row: Layer) -> Weights:
    ih, hh, bias_ih, bias_hh = torch.sides()
    kernels = {"Wxh": ih, "Whh": hh} if row.cls == "RNN" else {"Wx": ih, "Wh": hh}
    if not row.args["bias"]:
        return kernels
    if row.cls != "GRU":
        return {**kernels, "bias": bias_ih + bias_hh}
    start = 2 * len(bias_hh) // 3
    both = np.concatenate([(bias_ih + bias_hh)[:start], bias_ih[start:]])
    return {**kernels, "b": both, "bhn": bias_hh[start:]}


def mlx_attention(torch: Torch, row: Layer) -> Weights:
    found: Weights = {}
    for name, (kernel, vector) in torch.attention().items():
        found[f"{name}_proj/weight"] = kernel
        if vector is not None:
            found[f"{name}_proj/bias"] = vector
    return found


MLX: dict[str, Local] = {
    "Linear": lambda torch, row: {"weight": torch.weight, **bias(torch)},
    "Bilinear": lambda torch, row: {"weight": torch.weight.transpose(0, 2, 1), **bias(torch)},
    **{f"Conv{t}{rank}d": mlx_conv for rank in (1, 2, 3) for t in ("", "Transpose")},
    "Embedding": lambda torch, row: {"weight": torch.weight},
    **dict.fromkeys(("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "PReLU"), mlx_norm),
    **dict.fromkeys(("RNN", "LSTM", "GRU"), mlx_recurrent),
    "MultiHeadAttention": mlx_attention,
}
TABLES = {"flax_linen": LINEN, "flax_nnx": NNX, "mlx": MLX}


def column_rows(rows: Sequence[Layer], prefix: str = "") -> Iterator[tuple[str, Layer]]:
    for row in rows:
        if row.cls == "Container":
            yield from column_rows(row.inside, f"{prefix}{row.name}/")
        else:
            yield f"{prefix}{row.name}", row


def copied(case: Case, rows: Sequence[Layer], ours: Arrays, framework: str) -> Arrays:
    theirs = {path.replace("/", "."): row for path, row in rows_of(case.models["torch"].layers)}
    stacks = case.stacks or {"layer": ("layer_0", "layer_1")}
    level = {name: (path, i) for path, names in stacks.items() for i, name in enumerate(names)}
    sizes = case.inputs[0].shape
    found: Arrays = {}
    for path, row in column_rows(rows):
        local = TABLES[framework].get(row.cls)
        if local is None:
            continue
        dotted = path.replace("/", ".")
        name, depth = (dotted, 0) if dotted in theirs else level[dotted]
        for short, value in local(Torch(ours, name, theirs[name], depth, sizes), row).items():
            full = short[1:] if short.startswith("/") else f"{path}/{short}"
            found[full] = placed(case, name, row, framework, value)
    if case.name == "branches_flattened_concat":
        found |= two_maps(ours, framework)
    if framework == "flax_linen":
        statistics = [name.rsplit("/", 1)[-1] in STATISTICS for name in found]
        return {
            f"{'batch_stats' if is_statistic else 'params'}/{name}": value
            for (name, value), is_statistic in zip(found.items(), statistics, strict=True)
        }
    return {name.replace("/", "."): value for name, value in found.items()}


def placed(case: Case, path: str, row: Layer, framework: str, value: np.ndarray) -> np.ndarray:
    """Features of a flattened map in the order of channels-last frameworks."""
    last = framework == "mlx"
    plain = row.cls in ("Dense", "Linear")
    if path in case.flatten and (value.ndim > 1 or not plain):
        order = interleave(case.flatten[path], value.shape[-1 if last else 0])
        value = value[..., order] if last else value[order]
    if path in case.unflatten:
        order = interleave(case.unflatten[path], value.shape[0 if last else -1])
        value = value[order] if last else value[..., order]
    return value


def two_maps(ours: Arrays, framework: str) -> Arrays:
    """A dense layer over two flattened maps side by side."""
    head = ours["head.weight"].T
    widths = [len(ours[f"{side}.weight"]) for side in ("left", "right")]
    halves = np.split(head, [len(head) * widths[0] // sum(widths)])
    ordered = [half[interleave(width, len(half))] for half, width in zip(halves, widths, strict=True)]
    joined = np.concatenate(ordered)
    return {"head/weight": joined.T} if framework == "mlx" else {"head/kernel": joined}
