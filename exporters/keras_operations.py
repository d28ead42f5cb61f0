"""`keras.ops` on symbolic tensors, and Python's operators between them."""

from __future__ import annotations

from collections.abc import Mapping

from neutral.exporters.keras_activations import activation
from neutral.exporters.keras_builder import Builder, Handler
from neutral.exporters.keras_calls import Call
from neutral.exporters.keras_flow import Flow, Unclear
from neutral.exporters.keras_merging import merge
from neutral.schema.graph import Attribute


def _arithmetic(op: str) -> Handler:
    """Arithmetic on tensors written with `+` and the like: two tensors, or a tensor and a number."""
    merged = merge(op)

    def layer(b: Builder, call: Call) -> list[Flow]:
        numbers = [value for value in call.constants if isinstance(value, int | float)]
        if len(call.inputs) == 2 and not call.constants:
            if op != "Div":
                return merged(b, call)
        elif len(call.inputs) == 1 and len(call.constants) == 2 and len(numbers) == 1:
            flow = call.x
            if not flow.dtype.startswith(("float", "bfloat")):
                raise Unclear("it computes with integers")
            number = b.constant(call.path, numbers[0], flow.dtype)
            inputs = [flow if value is None else number for value in call.constants]
            return [b.emit(call.path, op, inputs, flow)]
        raise Unclear("it is called with something else than tensors and a number")

    return layer


def _function(spec: str) -> Handler:
    def layer(b: Builder, call: Call) -> list[Flow]:
        if call.constants or any(value not in (None, True) for value in call.config.values() if value != call.name):
            raise Unclear("it has settings of its own")
        return [activation(b, call.path, spec, call.x, False)]

    return layer


def _gelu(b: Builder, call: Call) -> list[Flow]:
    approximate = call.arguments.get("approximate", call.config.get("approximate", True))
    attributes: dict[str, Attribute] = {"approximate": "tanh" if approximate else "none"}
    return [b.emit(call.path, "Gelu", [call.x], call.x, attributes)]


OPERATIONS: Mapping[str, Handler] = {
    "Add": _arithmetic("Add"),
    "Subtract": _arithmetic("Sub"),
    "Multiply": _arithmetic("Mul"),
    "Divide": _arithmetic("Div"),
    "TrueDivide": _arithmetic("Div"),
    "Maximum": _arithmetic("Max"),
    "Minimum": _arithmetic("Min"),
    "Relu": _function("relu"),
    "Relu6": _function("relu6"),
    "Sigmoid": _function("sigmoid"),
    "Silu": _function("silu"),
    "Tanh": _function("tanh"),
    "Exp": _function("exponential"),
    "Softplus": _function("softplus"),
    "Softsign": _function("softsign"),
    "Selu": _function("selu"),
    "HardSigmoid": _function("hard_sigmoid"),
    "HardSilu": _function("hard_silu"),
    "Gelu": _gelu,
}

TF_FUNCTIONS = {
    "math.add": "Add", "__operators__.add": "Add", "math.subtract": "Subtract", "math.multiply": "Multiply",
    "math.truediv": "Divide", "math.divide": "Divide", "math.maximum": "Maximum", "math.minimum": "Minimum",
    "nn.relu": "Relu", "nn.relu6": "Relu6", "math.sigmoid": "Sigmoid", "math.tanh": "Tanh", "math.exp": "Exp",
    "nn.silu": "Silu",
}  # fmt: skip
"""What Keras 2 calls them (`TFOpLambda`)."""
