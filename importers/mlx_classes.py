"""Which class of MLX each canonical layer becomes. Nothing here needs mlx.

>>> from neutral.schema.kinds import Dense, Parameter
>>> from neutral.schema.manifest import Manifest, Source
>>> kernel = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> layers = (Dense(path="fc", parameters={"kernel": kernel}),)
>>> manifest = Manifest(source=Source(framework="torch", format="pt"), layers=layers, weights_digest="0" * 64)
>>> layer_classes(manifest)
{'fc': ('Linear', {'in_features': 3, 'out_features': 2, 'bias': False})}

Most of MLX's layers compute what torch's of the same name do; what only one of the two has is told here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final

from neutral.errors import Problem, Refused, named, raise_all, reworded
from neutral.importers import torch_classes
from neutral.schema import layer_sizes
from neutral.schema.manifest import Manifest

_RENAMED: Final = {"MultiheadAttention": "MultiHeadAttention"}
_KEEP: Final = "it has no MLX form; keep the layer in its own framework"


def layer_classes(manifest: Manifest) -> dict[str, tuple[str, dict[str, Any]]]:
    """The MLX class and its settings for each layer that is known; `Refused` lists those that MLX does not have."""
    raise_all(Refused, (problem for layer in manifest.layers for problem in _absent(layer)))
    attentions = {layer.path: attention(layer) for layer in manifest.layers if layer.kind == "attention"}
    rest = tuple(layer for layer in manifest.layers if layer.path not in attentions)
    with reworded("torch", "MLX"):
        found = torch_classes.layer_classes(manifest.model_copy(update={"layers": rest, "graph": None}))
    classes = {path: (mlx_class(cls), _settings(cls, config)) for path, (cls, config) in found.items()}
    return {
        layer.path: {**classes, **attentions}[layer.path]
        for layer in manifest.layers
        if layer.path in {**classes, **attentions}
    }


def _absent(layer: Any) -> Iterator[Problem]:
    """What MLX's own layers cannot be."""

    def no(found: str, expected: str) -> Problem:
        return Problem(layer.path, found, expected, _KEEP)

    match layer.kind:
        case "einsum_dense":
            yield no("an einsum of its own equation", "a layer that mlx.nn has")
        case "conv" | "depthwise" if (layer.groups or 1) > 1 and len(layer_sizes.window(layer)) == 3:
            yield no("a convolution over 3 axes in groups", "one group")
        case "conv_transpose" if (layer.groups or 1) > 1:
            yield no("a transposed convolution in groups", "one group")
        case "layer_norm" | "rms_norm" if _axes_of_scale(layer) > 1:
            yield no(f"a norm over {_axes_of_scale(layer)} axes", "the last one")
        case "instance_norm" if "mean" in layer.parameters:
            yield no("an instance norm with running statistics", "one without")
        case "batch_norm" | "instance_norm" | "group_norm" if len({"scale", "bias"} & layer.parameters.keys()) == 1:
            yield no("a norm with a scale or a bias alone", "both or neither")
        case "lstm" | "gru" | "simple_rnn" if layer_sizes.directions(layer) == 2:
            yield no("a recurrent layer of two directions", "one")
        case "lstm" if "projection" in layer.parameters:
            yield no("an LSTM with a projection", "one without")
        case _:
            pass


def _axes_of_scale(layer: Any) -> int:
    parameter = layer.parameters.get("scale") or layer.parameters.get("bias")
    return 1 if parameter is None or "position" in parameter.axes else len(parameter.shape)


def attention(layer: Any) -> tuple[str, dict[str, Any]]:
    """MLX's attention takes values and keys of any size; all four projections have a bias or none has."""
    if layer.kv_heads not in (None, layer.heads) or {"extra_key", "extra_value"} & layer.parameters.keys():
        found = "an attention with fewer heads of key and value, or with keys of its own"
        raise Refused(Problem(layer.path, found, "as many heads as of the query, and no more keys", _KEEP))
    biases = {role for role in ("query", "key", "value", "output") if f"{role}_bias" in layer.parameters}
    if len(biases) not in (0, 4):
        raise Refused(Problem(layer.path, f"biases of {', '.join(sorted(biases))} alone", "four or none", _KEEP))
    made = math.prod(layer.parameters["query_kernel"].shape[:-1])
    return "MultiHeadAttention", {"dims": made, "num_heads": layer.heads, "bias": bool(biases)}


def mlx_class(cls: str) -> str:
    """The name that MLX gives to one of torch's classes: norms have none of their axes in it.

    >>> mlx_class("BatchNorm2d"), mlx_class("Conv2d")
    ('BatchNorm', 'Conv2d')
    """
    return _RENAMED.get(cls, re.sub(r"^(BatchNorm|InstanceNorm)\dd$", r"\1", cls))


def _settings(cls: str, config: dict[str, Any]) -> dict[str, Any]:
    """A group norm is as torch's only if it is told to be."""
    return {**config, "pytorch_compatible": True} if cls == "GroupNorm" else config


def remarks(manifest: Manifest) -> list[str]:
    """What a model must be built with for a new file to be right in it, where that is a choice."""
    grouped = [layer.path for layer in manifest.layers if layer.kind == "group_norm" and layer.groups != 1]
    listed = ", ".join(map(named, grouped[:5])) + (f" and {len(grouped) - 5} more" if len(grouped) > 5 else "")
    return [f"{listed}: for GroupNorm(pytorch_compatible=True), which is not MLX's default"] if grouped else []
