"""python make_mlx.py FOLDER, in an environment that has one version of mlx."""

from __future__ import annotations

import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from recording import folder, inputs, record, values


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, (3, 2))
        self.norm = nn.BatchNorm(3, eps=1e-3)
        if hasattr(nn, "ConvTranspose2d"):
            self.up = nn.ConvTranspose2d(3, 4, (2, 3), stride=2)
        self.dense = nn.Linear(144 if hasattr(nn, "ConvTranspose2d") else 24, 5)

    def __call__(self, x):
        x = nn.relu(self.norm(self.conv(x)))
        x = self.up(x) if "up" in self else x
        return self.dense(x.reshape(x.shape[0], -1))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 5)
        self.norm = nn.LayerNorm(5, eps=1e-3)
        self.gru = nn.GRU(5, 3)
        self.dense = nn.Linear(3, 2)

    def __call__(self, x):
        y = self.norm(self.lstm(self.embedding(x))[0])
        # Without a state, MLX before 0.30 leaves the recurrent bias out of the first step.
        return self.dense(self.gru(y, hidden=mx.zeros((y.shape[0], 3))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6, eps=1e-3)
        self.attention = nn.MultiHeadAttention(6, 2, bias=True)

    def __call__(self, x):
        y = self.norm(x)
        return self.attention(y, y, y)


def main(here):
    mx.set_default_device(mx.cpu)
    path, outputs = folder(here, "mlx", version("mlx")), {}
    models = {"image": Image, "text": Text, "attention": Attention}
    for name, make in models.items():
        if name == "text" and not hasattr(nn, "LSTM"):
            continue
        model = make()
        if name == "image" and "up" not in model:
            name = "plain-image"
        model.update(
            tree_unflatten(
                [
                    (key, mx.array(values(key.replace("_var", "/var"), x.shape)))
                    for key, x in tree_flatten(model.parameters())
                ]
            )
        )
        model.eval()
        outputs[name] = np.array(model(mx.array(inputs(name))))
        weights = dict(tree_flatten(model.parameters()))
        mx.savez(str(path / (name + ".npz")), **weights)
        if hasattr(mx, "save_safetensors"):
            mx.save_safetensors(str(path / (name + ".safetensors")), weights)
    record(path, outputs)


if __name__ == "__main__":
    main(sys.argv[1])
