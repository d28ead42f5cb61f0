"""Flax Linen's column: modules that infer the sizes of their inputs.

>>> from tests.zoo import cases
>>> column(cases()["conv2d_no_bias"]).layers[0].args["features"]
7
>>> column(cases()["prelu"])
'PReLU has one slope for all channels'

Kernels, biases and embeddings are in the collection `params`, running statistics in `batch_stats`, under the names
of the rows. A recurrent layer is `RNN(cell, name="layer")` with its tensors in `layer/cell/...`; where torch has a single
cell, the cell itself is called `layer`, as it is when made inside the call of a module.
"""

from __future__ import annotations

from dataclasses import replace

from tests.columns import flax
from tests.columns.deriving import derive
from tests.zoo import Case, Layer, Model

FORMATS = ("msgpack", "train_state", "orbax", "orbax_zarr", "orbax_manager", "safetensors", "safetensors_slash")
MORE = flax.MORE
INFERRED = ("in_features", "in_key_features", "in_value_features", "num_features")


def linen(row: Layer) -> Layer:
    args = {name: value for name, value in row.args.items() if name not in INFERRED}
    return replace(row, args=args, inside=tuple(linen(one) for one in row.inside))


def column(case: Case) -> Model | str:
    """Linen's model of the case, or why it has none."""
    model = derive(case, flax.STEPS, flax.INSTEAD)
    return model if isinstance(model, str) else replace(model, layers=tuple(linen(row) for row in model.layers))
