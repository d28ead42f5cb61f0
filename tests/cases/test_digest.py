"""Equal weights have one digest, whichever framework and format they lie in; others have another.

The weights are carried from Keras to torch by hand here, an expression per tensor: neutral is not asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import safetensors.torch
import tensorflow as tf
import torch
from torch import nn

import neutral
from tests.cases import models as m
from tests.cases.commands import Commands

L = keras.layers
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Two models, how to write one's weights as the other's, and what a file without classes must be told."""

    keras: Callable[[], Any]
    torch: Callable[[], nn.Module]
    carry: Callable[[Weights], Weights]
    kinds: Mapping[str, str] = field(default_factory=dict)
    flatten: Mapping[str, str] | None = None


def chain(**layers: nn.Module) -> nn.Sequential:
    module = nn.Sequential()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


def bag(**layers: nn.Module) -> nn.Module:
    """Layers of which nobody says how they are wired."""
    module = nn.Module()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


def mlp_keras() -> Any:
    return keras.Sequential([keras.Input((3,)), L.Dense(5, "relu", name="fc1"), L.Dense(4, use_bias=False, name="fc2")])


def mlp_torch() -> nn.Module:
    return chain(fc1=nn.Linear(3, 5), relu=nn.ReLU(), fc2=nn.Linear(5, 4, bias=False))


def mlp_carried(w: Weights) -> Weights:
    return {"fc1.weight": w["fc1/kernel"].T, "fc1.bias": w["fc1/bias"], "fc2.weight": w["fc2/kernel"].T}


def cnn_keras() -> Any:
    return keras.Sequential(
        [
            keras.Input((6, 5, 2)),
            L.Conv2D(4, (3, 2), name="conv"),
            L.BatchNormalization(name="norm"),
            L.Activation("relu"),
            L.Flatten(),
            L.Dense(3, name="fc"),
        ]
    )


def cnn_torch() -> nn.Module:
    return chain(
        conv=nn.Conv2d(2, 4, (3, 2)),
        norm=nn.BatchNorm2d(4, eps=1e-3),
        relu=nn.ReLU(),
        flatten=nn.Flatten(),
        fc=nn.Linear(64, 3),
    )


def cnn_carried(w: Weights) -> Weights:
    return {
        "conv.weight": w["conv/kernel"].transpose(3, 2, 0, 1),
        "conv.bias": w["conv/bias"],
        "norm.weight": w["norm/gamma"],
        "norm.bias": w["norm/beta"],
        "norm.running_mean": w["norm/moving_mean"],
        "norm.running_var": w["norm/moving_variance"],
        "norm.num_batches_tracked": np.array(0),
        "fc.weight": w["fc/kernel"].reshape(4, 4, 4, 3).transpose(3, 2, 0, 1).reshape(3, 64),
        "fc.bias": w["fc/bias"],
    }


def text_keras() -> Any:
    return keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            L.Embedding(11, 3, name="embedding"),
            L.LSTM(5, return_sequences=True, name="lstm"),
            L.SimpleRNN(4, name="rnn"),
            L.Dense(2, name="fc"),
        ]
    )


def text_torch() -> nn.Module:
    return bag(
        embedding=nn.Embedding(11, 3),
        lstm=nn.LSTM(3, 5, batch_first=True),
        rnn=nn.RNN(5, 4, batch_first=True),
        fc=nn.Linear(4, 2),
    )


def text_carried(w: Weights) -> Weights:
    """Keras has one bias of the two: the other is zero."""
    out = {"embedding.weight": w["embedding/embeddings"], "fc.weight": w["fc/kernel"].T, "fc.bias": w["fc/bias"]}
    for name in ("lstm", "rnn"):
        inner = f"{name}/{'lstm' if name == 'lstm' else 'simple_rnn'}_cell"
        out[f"{name}.weight_ih_l0"] = w[f"{inner}/kernel"].T
        out[f"{name}.weight_hh_l0"] = w[f"{inner}/recurrent_kernel"].T
        out[f"{name}.bias_ih_l0"] = w[f"{inner}/bias"]
        out[f"{name}.bias_hh_l0"] = np.zeros_like(w[f"{inner}/bias"])
    return out


def attention_keras() -> Any:
    x = keras.Input((5, 6))
    return keras.Model(x, L.MultiHeadAttention(2, 3, name="attention")(x, x))


def attention_torch() -> nn.Module:
    return bag(attention=nn.MultiheadAttention(6, 2, batch_first=True))


def attention_carried(w: Weights) -> Weights:
    three = ("query", "key", "value")
    return {
        "attention.in_proj_weight": np.concatenate([w[f"attention/{n}/kernel"].reshape(6, 6).T for n in three]),
        "attention.in_proj_bias": np.concatenate([w[f"attention/{n}/bias"].reshape(6) for n in three]),
        "attention.out_proj.weight": w["attention/attention_output/kernel"].reshape(6, 6).T,
        "attention.out_proj.bias": w["attention/attention_output/bias"],
    }


CASES = {
    "mlp": Case(mlp_keras, mlp_torch, mlp_carried, {"fc*": "dense"}),
    "cnn": Case(
        cnn_keras,
        cnn_torch,
        cnn_carried,
        {"conv": "conv", "norm": "batch_norm", "fc": "dense"},
        {"fc": "4"},
    ),
    "text": Case(text_keras, text_torch, text_carried, {"embedding": "embedding", "fc": "dense"}, {}),
    "attention": Case(attention_keras, attention_torch, attention_carried),
}


def keras_weights(model: Any) -> dict[str, np.ndarray]:
    return {w.path.removeprefix(f"{model.name}/"): w.numpy() for w in model.weights if "seed" not in w.path}


def saved_by_keras(model: Any, folder: Path) -> dict[str, Path]:
    files = {name: folder / f"model.{name}" for name in ("keras", "h5", "weights.h5")}
    model.save(files["keras"])
    model.save(files["h5"])
    model.save_weights(files["weights.h5"])
    files["checkpoint"] = Path(tf.train.Checkpoint(model=model).save(str(folder / "checkpoint")))
    tf.saved_model.save(model, str(folder / "saved"))
    files["savedmodel"] = folder / "saved"
    return files


def saved_by_torch(module: nn.Module, folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.pt" for name in ("module", "state", "legacy")}
    torch.save(module, files["module"])
    torch.save({"epoch": 1, "state_dict": module.state_dict()}, files["state"])
    torch.save(module.state_dict(), files["legacy"], _use_new_zipfile_serialization=False)
    files["safetensors"] = folder / "model.safetensors"
    safetensors.torch.save_file(module.state_dict(), files["safetensors"])
    return files


BARE = ("weights.h5", "checkpoint", "savedmodel", "state", "legacy", "safetensors", "npz")
"""Formats that do not say what crosses a Flatten, and most of them not what class each layer is of."""


def carried(case: Case, model: Any) -> nn.Module:
    module = case.torch()
    given = {name: torch.from_numpy(np.array(array)) for name, array in case.carry(keras_weights(model)).items()}
    module.load_state_dict(given)
    return module.eval()


@pytest.mark.parametrize("name", CASES)
def test_one_digest_whatever_the_framework(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = m.randomized_keras(case.keras(), 1)
    module = carried(case, model)
    files = saved_by_keras(model, tmp_path) | saved_by_torch(module, tmp_path)
    found = {"live keras": neutral.digest(model), "live torch": neutral.digest(module)}
    neutral.convert(files["keras"], tmp_path / "model.npz")
    for form, path in (files | {"npz": tmp_path / "model.npz"}).items():
        told = {"kinds": case.kinds, "flatten": case.flatten} if form in BARE else {}
        found[form] = neutral.digest(path, **told)
    with neutral.export_model(files["keras"], tmp_path / "model.nwt") as archive:
        found["archive"] = archive.manifest.weights_digest
    assert {form for form, value in found.items() if value != found["archive"]} == set()

    # One element of one tensor changes: so does the digest, and in all formats alike.
    weight = model.weights[0].numpy()
    weight.flat[0] += 1
    model.weights[0].assign(weight)
    changed = neutral.digest(model)
    assert changed != found["archive"] and changed == neutral.digest(carried(case, model))


@pytest.mark.parametrize("name", CASES)
def test_diff_takes_from_one_side_what_the_other_leaves_open(name: str, tmp_path: Path) -> None:
    """No hints here. What neither side tells is asked for; never are equal weights called different."""
    case = CASES[name]
    model = m.randomized_keras(case.keras(), 1)
    files = saved_by_keras(model, tmp_path) | saved_by_torch(carried(case, model), tmp_path)
    telling = {"keras", "h5", "module"}
    wrong = {}
    for (a, left), (b, right) in itertools.product(files.items(), repeat=2):
        try:
            found = neutral.diff(left, right).lines
        except neutral.Refused as error:
            found = () if not telling & {a, b} and "--" in str(error) else (str(error),)
        if found:
            wrong[a, b] = found
    assert not wrong


def test_diff_sees_one_element_even_where_one_side_is_bare(tmp_path: Path, neutral_: Commands) -> None:
    model = m.randomized_keras(cnn_keras(), 1)
    files = saved_by_keras(model, tmp_path)
    module = carried(CASES["cnn"], model)
    with torch.no_grad():
        module.fc.weight[0, 0] += 1
    torch.save(module.state_dict(), tmp_path / "bare.pt")
    (line,) = neutral.diff(files["keras"], tmp_path / "bare.pt").lines
    assert line.startswith("fc/kernel: 1 of 192 elements differ")
    assert "may cross a Flatten" in neutral_.refused("diff", files["weights.h5"], tmp_path / "bare.pt", status=2)


def test_the_order_of_a_flatten_counts() -> None:
    """The weights that a transpose alone would give have another digest."""
    model = m.randomized_keras(cnn_keras(), 1)
    module = carried(CASES["cnn"], model)
    with torch.no_grad():
        module.fc.weight.copy_(torch.from_numpy(model.get_layer("fc").get_weights()[0].T.copy()))
    assert neutral.digest(module) != neutral.digest(model)


def test_the_command_prints_the_digest_alone_and_diff_agrees(tmp_path: Path, neutral_: Commands) -> None:
    model = m.randomized_keras(mlp_keras(), 1)
    model.save(tmp_path / "model.keras")
    torch.save(carried(CASES["mlp"], model), tmp_path / "model.pt")
    printed = neutral_.ok("digest", tmp_path / "model.keras")
    assert len(printed) == 65 and printed == neutral_.ok("digest", tmp_path / "model.pt")
    assert "same" in neutral_.ok("diff", tmp_path / "model.keras", tmp_path / "model.pt")


def test_dtype_shape_and_kind_count_and_names_do_not() -> None:
    kernel = np.arange(30, dtype=np.float32).reshape(3, 5, 2)
    found = {
        neutral.digest({"a/kernel": array}, kinds={"a": kind})
        for array in (kernel, kernel.astype(np.float64), kernel.reshape(5, 3, 2))
        for kind in ("conv", "conv_transpose")
    }
    assert len(found) == 6
    assert neutral.digest({"a/kernel": kernel}) == neutral.digest({"other/kernel": kernel})
