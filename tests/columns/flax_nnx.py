"""Flax NNX's column: modules that hold their own variables and are told the sizes of their inputs.

>>> from tests.zoo import cases
>>> row = column(cases()["dense"]).layers[0]
>>> row.cls, sorted(row.args)
('Linear', ['in_features', 'out_features', 'use_bias'])

Layers are attributes under the names of the rows; `subclassed` keeps its blocks in an `nnx.List`. A cell lies in the
attribute `cell` of its `RNN`. The optimized LSTM cell and the GRU cell hold all gates in one kernel, the plain LSTM
cell (where torch has a single cell) one kernel a gate. Seeds and counters of random streams are no part of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tests.columns import flax
from tests.columns.deriving import Absent, Instead, Step, derive
from tests.zoo import Case, Layer, Model

FORMATS = ("orbax", "orbax_state", "msgpack", "safetensors")
MORE = flax.MORE
NO_RECURRENT_BIAS = "the GRU cell has no bias on the recurrent side: torch's must be zero for its candidate gate"
LESS: dict[str, str] = {
    **dict.fromkeys(
        [
            "text_classifier",
            *(
                f"gru{suffix}"
                for suffix in (
                    "",
                    "_stack2",
                    "_stack4",
                    "_bidirectional",
                    "_bidirectional_stack2",
                    "_cell",
                    "_cells_stacked",
                )
            ),
        ],
        NO_RECURRENT_BIAS,
    )
}
"""Cases in which the other models have tensors that the framework's has not: only out of it is a result certain."""

CLASSES = {"Dense": "Linear", "DenseGeneral": "LinearGeneral", "MultiHeadDotProductAttention": "MultiHeadAttention"}
FEATURES = ("Linear", "LinearGeneral", "Conv", "ConvTranspose")
CELLS = ("SimpleCell", "LSTMCell", "OptimizedLSTMCell", "GRUCell")


def nnx(row: Layer) -> Layer:
    cls = CLASSES.get(row.cls, row.cls)
    args = dict(row.args)
    if cls in FEATURES:
        args["out_features"] = args.pop("features")
    elif cls in CELLS:
        args["hidden_features"] = args.pop("features")
    elif cls == "Einsum":
        args["kernel_shape"] = args.pop("shape")
        kernel, result = args["einsum_str"].split(",")[1].split("->")
        args["bias_shape"] = tuple(args["kernel_shape"][kernel.index(one)] for one in result if one in kernel)
    elif cls == "MultiHeadAttention":
        sizes = {args.pop("in_key_features"), args.pop("in_value_features")}
        if len(sizes) > 1:
            raise Absent("keys and values are made of inputs of one size")
        args["in_kv_features"] = sizes.pop()
    elif cls == "LayerNorm" and not isinstance(args["num_features"], int):
        raise Absent("LayerNorm has scale and bias for one axis only")
    return replace(row, cls=cls, args=args, inside=tuple(nnx(one) for one in row.inside))


def plain(row: Layer) -> Layer:
    """Flax's WeightNorm overwrites its layer's kernel at every call and keeps its scales in no variable: not used."""
    return row.inside[0] if row.cls == "WeightNorm" else row


def ours(step: Step) -> Step:
    def steps(case: Case, row: Layer) -> Sequence[Layer]:
        return [nnx(plain(one)) for one in step(case, row)]

    return steps


def others(instead: Instead) -> Instead:
    return instead if isinstance(instead, str) else lambda case: [nnx(row) for row in instead(case)]


STEPS = {cls: ours(step) for cls, step in flax.STEPS.items()}
INSTEAD = {name: others(instead) for name, instead in flax.INSTEAD.items()}


def column(case: Case) -> Model | str:
    """NNX's model of the case, or why it has none."""
    return derive(case, STEPS, INSTEAD)
