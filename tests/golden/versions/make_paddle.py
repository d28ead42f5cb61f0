"""python make_paddle.py FOLDER, in an environment that has one version of paddlepaddle."""

from __future__ import annotations

import sys

import numpy as np
import paddle
from paddle import nn
from recording import folder, inputs, record, values


class Image(nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(2, 3, (3, 2))
        self.norm = nn.BatchNorm2D(3, epsilon=1e-3)
        self.up = nn.Conv2DTranspose(3, 4, (2, 3), stride=2)
        self.dense = nn.Linear(144, 5)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.conv(x)))
        return self.dense(paddle.flatten(self.up(x), 1))


class Text(nn.Layer):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 5)
        self.norm = nn.LayerNorm(5, epsilon=1e-3)
        self.gru = nn.GRU(5, 3)
        self.dense = nn.Linear(3, 2)

    def forward(self, x):
        return self.dense(self.gru(self.norm(self.lstm(self.embedding(x))[0]))[0])


class Attention(nn.Layer):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6, epsilon=1e-3)
        self.attention = nn.MultiHeadAttention(6, 2)

    def forward(self, x):
        return self.attention(self.norm(x))


def main(here):
    paddle.set_device("cpu")
    path, outputs = folder(here, "paddle", paddle.__version__), {}
    for name, model in (("image", Image()), ("text", Text()), ("attention", Attention())):
        for key, tensor in model.state_dict().items():
            tensor.set_value(values(key.replace("_variance", "/var"), tensor.shape))
        model.eval()
        x = inputs(name)
        x = np.moveaxis(x, -1, 1).copy() if name == "image" else x
        with paddle.no_grad():
            outputs[name] = model(paddle.to_tensor(x)).numpy()
        paddle.save(model.state_dict(), str(path / (name + ".pdparams")))
        paddle.save(model.state_dict(), str(path / (name + "_protocol2.pdparams")), protocol=2)
    record(path, outputs)


if __name__ == "__main__":
    main(sys.argv[1])
