"""Weights copied by hand between frameworks, from the frameworks' own definitions alone; values and names, no files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.oracle.test_oracle import effective
from tests.zoo import Layer

Arrays = dict[str, np.ndarray]


def rows_of(layers: tuple[Layer, ...], prefix: str = "") -> Iterator[tuple[str, Layer]]:
    for row in layers:
        if row.cls == "Sequential":
            yield from rows_of(row.inside, f"{prefix}{row.name}.")
        else:
            yield f"{prefix}{row.name}", row


PADDLE_NAMES = {
    "_mean": "running_mean",
    "_variance": "running_var",
    "_weight": "weight",
    "scale": "weight",
    "weight_ho": "weight_hr_l0",
}

TORCH_NORMS = {
    "weight_norm": {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"},
    "spectral_norm": {
        "weight_orig": "parametrizations.weight.original",
        "weight_u": "parametrizations.weight.0._u",
        "weight_v": "parametrizations.weight.0._v",
    },
}


def torch_to_paddle(ours: Arrays, path: str, row: Layer, local: str, like: np.ndarray) -> np.ndarray:
    """The value of one tensor of a Paddle layer: Linear is (in, out), all else as in torch."""
    if row.cls == "MultiheadAttention":
        return attention_to_paddle(ours, path, local)
    if row.cls in ("RNN", "LSTM", "GRU"):
        last = local.rsplit(".", 1)[-1]
        if last != local and last != "weight_ho":
            level, side = local.split(".")[:2]
            last += f"_l{level}" + ("_reverse" if side == "cell_bw" else "")
        value = ours[f"{path}.{PADDLE_NAMES.get(last, last)}"]
        return value.T if last == "weight_ho" else value
    names = TORCH_NORMS.get(row.wrap[0], {}) if row.wrap else {}
    value = ours[f"{path}.{names.get(local, PADDLE_NAMES.get(local, local))}"]
    if row.cls == "Linear":
        value = value.T
    return value.reshape(like.shape)


def attention_to_paddle(ours: Arrays, path: str, local: str) -> np.ndarray:
    part, what = local.split(".")
    if part == "out_proj":
        value = ours[f"{path}.out_proj.{what}"]
    elif what == "bias":
        value = np.split(ours[f"{path}.in_proj_bias"], 3)["qkv".index(part[0])]
    elif f"{path}.in_proj_weight" in ours:
        value = np.split(ours[f"{path}.in_proj_weight"], 3)["qkv".index(part[0])]
    else:
        value = ours[f"{path}.{part}_weight"]
    return value.T if what == "weight" else value


# ONNX has the gates of an LSTM as i o f c, of a GRU as z r h; torch as i f g o and r z n.
ONNX_GATES = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}

TORCH_SIDES = {"W": ("weight_ih",), "R": ("weight_hh",), "B": ("bias_ih", "bias_hh")}


def torch_to_onnx(ours: Arrays, rows: dict[str, Layer], node: Layer, name: str, like: np.ndarray) -> np.ndarray:
    """The value of one initializer of a node."""
    path, local = name.rsplit(".", 1)
    if local in TORCH_SIDES:
        level = "0" if path in rows else path.rsplit("_", 1)[1]
        return recurrent_to_onnx(ours, path if path in rows else "layer", f"_l{level}", node.cls, local, like)
    if path not in rows:
        value = attention_to_paddle(ours, *name.split(".", 1)) if path.endswith("_proj") else ours[name]
    elif local == "weight":
        value = effective(ours, path, rows[path])
        if node.cls == "MatMul" or node.args["attributes"].get("transB") == 0:
            value = value.T
        if node.cls == "Einsum" and "cd" in node.args["attributes"]["equation"]:
            value = value.T
    else:
        value = ours[name]
    return value.reshape(like.shape)


def recurrent_to_onnx(ours: Arrays, path: str, suffix: str, op: str, local: str, like: np.ndarray) -> np.ndarray:
    directions = []
    for reverse in ("", "_reverse")[: len(like)]:
        parts = []
        for side in TORCH_SIDES[local]:
            full = f"{path}.{side}{suffix}{reverse}"
            blocks = np.split(ours[full if full in ours else f"{path}.{side}"], len(ONNX_GATES[op]))
            parts += [blocks[gate] for gate in ONNX_GATES[op]]
        directions.append(np.concatenate(parts))
    return np.stack(directions)


NUMPY_ROLES = {
    "scale": "weight",
    "slope": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "variance": "running_var",
    "bias": "bias",
}

NUMPY_RECURRENT = {
    "input_kernel": ("weight_ih",),
    "recurrent_kernel": ("weight_hh",),
    "bias": ("bias_ih", "bias_hh"),
    "projection": ("weight_hr",),
}


def recurrent_to_numpy(ours: Arrays, path: str, level: str, role: str) -> np.ndarray:
    """Directions, then sides, then torch's rows: gates and units. A cell has one level and no number."""
    suffix = "" if f"{path}.weight_ih" in ours else f"_l{level}"
    directions = [reverse for reverse in ("", "_reverse") if f"{path}.weight_ih{suffix}{reverse}" in ours]
    return np.stack([[ours[f"{path}.{side}{suffix}{one}"] for side in NUMPY_RECURRENT[role]] for one in directions])


def torch_to_numpy(ours: Arrays, rows: dict[str, Layer], name: str, like: np.ndarray) -> np.ndarray:
    """The value of one canonical tensor: torch's gates and sides have the canonical order already."""
    path, role = name.rsplit("/", 1)
    path = path.replace("/", ".")
    if path not in rows or rows[path].cls.removesuffix("Cell") in ("RNN", "LSTM", "GRU"):
        level = "0" if path in rows else path.rsplit("_", 1)[1]
        return recurrent_to_numpy(ours, path if path in rows else "layer", level, role).reshape(like.shape)
    if rows[path].cls == "MultiheadAttention":
        if role.startswith("extra"):
            return ours[f"{path}.bias_{role[6]}"].reshape(like.shape)
        part, what = role.split("_")
        local = "out_proj" if part == "output" else f"{part[0]}_proj"
        value = attention_to_paddle(ours, path, f"{local}.{'bias' if what == 'bias' else 'weight'}")
        return value.T if what == "kernel" else value
    value = effective(ours, path, rows[path]) if role == "kernel" else ours[f"{path}.{NUMPY_ROLES[role]}"]
    return value.reshape(like.shape)


def gru_from_keras(theirs: Arrays) -> tuple[Arrays, Arrays]:
    """Keras has z r h side by side and one bias; ONNX z r h, one direction; the canonical order is r z n."""
    inward, outward, bias = (theirs[f"layer/gru_cell/{name}"] for name in ("kernel", "recurrent_kernel", "bias"))
    z, r, n = (slice(i * len(outward), (i + 1) * len(outward)) for i in range(3))
    onnx = {"layer.W": inward.T[None], "layer.R": outward.T[None], "layer.B": np.append(bias, 0 * bias)[None]}
    gates = {
        "layer/input_kernel": np.stack([inward.T[gate] for gate in (r, z, n)]),
        "layer/recurrent_kernel": np.stack([outward.T[gate] for gate in (r, z, n)]),
    }
    one = np.stack([bias[gate] for gate in (r, z, n)])
    return onnx, gates | {"layer/bias": np.stack([one, 0 * one])}


def attention_from_keras(theirs: Arrays) -> tuple[Arrays, Arrays]:
    """Keras has (in, heads, dim), and (heads, dim, out) for the output."""
    onnx: Arrays = {}
    canonical: Arrays = {}
    for part, short in (("query", "q"), ("key", "k"), ("value", "v"), ("attention_output", "out")):
        kernel, bias = theirs[f"layer/{part}/kernel"], theirs[f"layer/{part}/bias"].ravel()
        matrix = kernel.reshape(len(kernel), -1) if part != "attention_output" else kernel.reshape(-1, kernel.shape[-1])
        onnx |= {f"layer.{short}_proj.weight": matrix, f"layer.{short}_proj.bias": bias}
        role = part.removeprefix("attention_")
        canonical |= {f"layer/{role}_kernel": matrix.T, f"layer/{role}_bias": bias}
    return onnx, canonical


def slopes_from_keras(theirs: Arrays) -> tuple[Arrays, Arrays]:
    slopes = theirs["layer/alpha"].transpose(2, 0, 1)
    return {"layer.weight": slopes}, {"layer/slope": slopes}
