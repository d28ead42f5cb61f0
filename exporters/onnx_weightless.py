"""Norms of an ONNX model that have no weights: their scale is made of ones and their bias of zeros by the graph itself."""

from __future__ import annotations

from collections.abc import Mapping

from neutral.exporters.onnx_flow import Builder, Inexpressible, Rule
from neutral.schema.graph import Attribute


def _check(b: Builder) -> None:
    scale, bias = b.value_of(1), b.value_of(2)
    if not b.scope.ones(scale) or (bias and not b.scope.zero(bias)):
        raise Inexpressible(f"a {b.node.op_type} whose weights are computed")
    if len([name for name in b.node.outputs if name]) > 1:
        raise Inexpressible("a norm that gives its mean")


def _channel_norm(b: Builder) -> None:
    _check(b)
    x = b.take(b.value_of(0))
    settings: dict[str, Attribute] = {"epsilon": float(b.attribute("epsilon", 1e-5))}
    if b.node.op_type == "GroupNormalization":
        settings["num_groups"] = int(b.attribute("num_groups", 1))
    y = b.make(b.node.op_type, [x], x.sizes, settings)
    b.image(x)
    b.alike(x, y)


def _last_axes_norm(b: Builder) -> None:
    _check(b)
    x = b.take(b.value_of(0))
    axis = int(b.attribute("axis", -1))
    axis = axis if axis < 0 else axis - x.rank
    if -axis >= x.rank:
        raise Inexpressible("a norm over the batch")
    settings: dict[str, Attribute] = {"axis": axis, "epsilon": float(b.attribute("epsilon", 1e-5))}
    b.alike(x, b.make(b.node.op_type, [x], x.sizes, settings))


WEIGHTLESS: Mapping[str, Rule] = {
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization"), _channel_norm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _last_axes_norm),
}
