"""The nodes of torch's activations and dropouts: modules that treat every feature alike.

>>> from neutral.exporters.torch_description import Module
>>> builder = Builder(("batch", "feature"), "float32", {"0"})
>>> builder.module = Module("0", "ReLU", {}, ())
>>> ACTIVATIONS["ReLU"](builder, {})
>>> builder.nodes[0].op
'Relu'
"""

from __future__ import annotations

from neutral.exporters.torch_builder import Builder, Inexpressible, Rule
from neutral.exporters.torch_description import Config


def _tanhshrink(b: Builder, config: Config) -> None:
    before = b.value
    squashed = b.node("Tanh", suffix="tanh")
    b.node("Sub", inputs=(before, squashed))


def _log_sigmoid(b: Builder, config: Config) -> None:
    b.node("Neg", suffix="neg")
    b.node("Softplus", suffix="softplus")
    b.node("Neg")


def _softplus(b: Builder, config: Config) -> None:
    if config.get("beta", 1) != 1:
        raise Inexpressible("a Softplus with beta has no ONNX operator")
    b.node("Softplus")


def _threshold(b: Builder, config: Config) -> None:
    if config["value"] != 0:
        raise Inexpressible("a Threshold to a value other than 0 has no ONNX operator")
    b.node("ThresholdedRelu", {"alpha": float(config["threshold"])})


def _gelu(b: Builder, config: Config) -> None:
    b.node("Gelu", {"approximate": str(config.get("approximate", "none"))})


def _activation(op: str, **settings: str | float) -> Rule:
    """An operator whose attributes are the module's own (given by name) or fixed numbers."""

    def rule(b: Builder, config: Config) -> None:
        b.node(op, {k: float(config[v] if isinstance(v, str) else v) for k, v in settings.items()})

    return rule


def _rrelu(b: Builder, config: Config) -> None:
    b.node("LeakyRelu", {"alpha": (float(config["lower"]) + float(config["upper"])) / 2})


def _dropout(b: Builder, config: Config) -> None:
    b.node("Identity", {"origin": b.module.cls, "rate": float(config.get("p", 0.5))})


def _softmax(op: str) -> Rule:
    def rule(b: Builder, config: Config) -> None:
        dim = config.get("dim")
        if dim is None:
            if b.rank == 3:
                raise Inexpressible(f"a {b.module.cls} without dim mixes the samples of a value of three axes")
            dim = 1
        if not -b.rank < dim < b.rank or dim % b.rank == 0:
            raise Inexpressible(f"a {b.module.cls} over the batch axis mixes the samples")
        if b.module.cls == "Softmin":
            b.node("Neg", suffix="neg")
        b.node(op, {"axis": int(dim)})

    return rule


def _softmax_2d(b: Builder, config: Config) -> None:
    b.need_image(2)
    b.node("Softmax", {"axis": 1})


ACTIVATIONS: dict[str, Rule] = {
    "CELU": _activation("Celu", alpha="alpha"),
    "ELU": _activation("Elu", alpha="alpha"),
    "GELU": _gelu,
    "Hardshrink": _activation("Shrink", lambd="lambd", bias=0.0),
    "Hardsigmoid": _activation("HardSigmoid", alpha=1 / 6, beta=0.5),
    "Hardswish": _activation("HardSwish"),
    "Hardtanh": _activation("Clip", min="min_val", max="max_val"),
    "Identity": _activation("Identity"),
    "LeakyReLU": _activation("LeakyRelu", alpha="negative_slope"),
    "LogSigmoid": _log_sigmoid,
    "LogSoftmax": _softmax("LogSoftmax"),
    "Mish": _activation("Mish"),
    "RReLU": _rrelu,
    "ReLU": _activation("Relu"),
    "ReLU6": _activation("Clip", min=0.0, max=6.0),
    "SELU": _activation("Selu"),
    "SiLU": _activation("Swish"),
    "Sigmoid": _activation("Sigmoid"),
    "Softmax": _softmax("Softmax"),
    "Softmax2d": _softmax_2d,
    "Softmin": _softmax("Softmax"),
    "Softplus": _softplus,
    "Softshrink": _activation("Shrink", lambd="lambd", bias="lambd"),
    "Softsign": _activation("Softsign"),
    "Tanh": _activation("Tanh"),
    "Tanhshrink": _tanhshrink,
    "Threshold": _threshold,
    **dict.fromkeys(("AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"), _dropout),
}  # fmt: skip
"""Modules that treat every feature of a vector alike, so that it may be permuted before or after them."""
