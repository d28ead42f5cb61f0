"""python make_onnx.py FOLDER, in an environment that has one version of onnx and onnxruntime.

Each model is written in several of the operator sets that this version knows.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from recording import folder, inputs, record, values

OPSETS = {"1.12.0": (9, 12, 13, 15), "1.16.2": (11, 14, 17, 21)}
"""Those that this version is to write."""


class Writing:
    def __init__(self):
        self.nodes, self.weights = [], []

    def weight(self, name, *shape):
        self.weights.append(numpy_helper.from_array(values(name, shape), name))
        return name

    def constant(self, name, array):
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op, *given, out=None, **settings):
        out = out or op.lower() + str(len(self.nodes))
        outputs = out if isinstance(out, list) else [out]
        self.nodes.append(helper.make_node(op, list(given), outputs, name="/" + outputs[0], **settings))
        return outputs[0]

    def model(self, opset, x, y):
        graph = helper.make_graph(self.nodes, "model", [x], [y], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], producer_name="onnx")
        made.ir_version = min(made.ir_version, 9)
        onnx.checker.check_model(made)
        return made


def image(opset):
    """A convolution, its norm, a transposed convolution, and a dense layer as Gemm behind a Flatten: channels first."""
    w = Writing()
    x = w.node("Conv", "x", w.weight("conv.weight", 3, 2, 3, 2), w.weight("conv.bias", 3), kernel_shape=[3, 2])
    norm = [w.weight("norm." + n, 3) for n in ("weight", "bias", "running_mean", "running_var")]
    x = w.node("Relu", w.node("BatchNormalization", x, *norm, epsilon=1e-3))
    x = w.node(
        "ConvTranspose",
        x,
        w.weight("up.weight", 3, 4, 2, 3),
        w.weight("up.bias", 4),
        kernel_shape=[2, 3],
        strides=[2, 2],
    )
    x = w.node("Flatten", x)
    if opset % 2:
        x = w.node("Gemm", x, w.weight("dense.weight", 5, 144), w.weight("dense.bias", 5), out="y", transB=1)
    else:
        x = w.node(
            "Add",
            w.node("MatMul", x, w.constant("dense.weight", values("dense.weight", (5, 144)).T)),
            w.weight("dense.bias", 5),
            out="y",
        )
    return w.model(opset, io("x", TensorProto.FLOAT, 2, 2, 4, 5), io("y", TensorProto.FLOAT, 2, 5))


def io(name, dtype, *shape):
    return helper.make_tensor_value_info(name, dtype, ["batch", *shape[1:]] if shape[0] == 2 else list(shape))


def squeezed(w, opset, x):
    """(step, direction, batch, unit) without its second axis, which became an input in operator set 13."""
    if opset < 13:
        return w.node("Squeeze", x, axes=[1])
    return w.node("Squeeze", x, w.constant("one" + str(len(w.nodes)), np.array([1], np.int64)))


def text(opset):
    """An embedding, an LSTM, a GRU that resets after its product, and a dense layer."""
    w = Writing()
    x = w.node("Gather", w.weight("embedding.weight", 7, 4), "x", axis=0)
    x = w.node("Transpose", x, perm=[1, 0, 2])
    lstm = [w.weight("lstm.W", 1, 20, 4), w.weight("lstm.R", 1, 20, 5), w.weight("lstm.B", 1, 40)]
    x = squeezed(w, opset, w.node("LSTM", x, *lstm, hidden_size=5))
    if opset >= 17:
        x = w.node("LayerNormalization", x, w.weight("norm.weight", 5), w.weight("norm.bias", 5), epsilon=1e-3)
    gru = [w.weight("gru.W", 1, 9, 5), w.weight("gru.R", 1, 9, 3), w.weight("gru.B", 1, 18)]
    x = squeezed(w, opset, w.node("GRU", x, *gru, hidden_size=3, linear_before_reset=1))
    x = w.node("Transpose", x, perm=[1, 0, 2])
    w.node("Add", w.node("MatMul", x, w.weight("dense.weight", 3, 2)), w.weight("dense.bias", 2), out="y")
    return w.model(opset, io("x", TensorProto.INT32, 2, 5), io("y", TensorProto.FLOAT, 2, 5, 2))


def main(here):
    path, outputs = folder(here, "onnx", onnx.__version__), {}
    for opset in OPSETS[onnx.__version__]:
        for case, made in (("image", image(opset)), ("text", text(opset))):
            kind = "plain-text" if case == "text" and opset < 17 else case  # without a norm
            name = kind + "_opset" + str(opset)
            onnx.save(made, str(path / (name + ".onnx")))
            session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
            x = inputs(case)
            outputs[name] = session.run(None, {"x": np.moveaxis(x, -1, 1).copy() if case == "image" else x})[0]
    record(path, outputs)


if __name__ == "__main__":
    main(sys.argv[1])
