"""Which class of paddle each canonical layer becomes. Nothing here needs paddle.

>>> from neutral.schema.kinds import Dense, Parameter
>>> from neutral.schema.manifest import Manifest, Source
>>> kernel = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> layers = (Dense(path="fc", parameters={"kernel": kernel}),)
>>> manifest = Manifest(source=Source(framework="torch", format="pt"), layers=layers, weights_digest="0" * 64)
>>> layer_classes(manifest)
{'fc': ('Linear', {'in_features': 3, 'out_features': 2, 'bias': False})}

Paddle's layers compute what torch's of the same name do, so the same settings decide whether there is one.
"""

from __future__ import annotations

import re
from typing import Any, Final

from neutral.errors import Problem, Refused, raise_all, reworded
from neutral.importers import torch_classes
from neutral.schema.manifest import Manifest

_RENAMED: Final = {"RNN": "SimpleRNN", "MultiheadAttention": "MultiHeadAttention"}
_ABSENT: Final = {"rms_norm": "an RMS norm", "einsum_dense": "an einsum of its own equation"}


def layer_classes(manifest: Manifest) -> dict[str, tuple[str, dict[str, Any]]]:
    """The paddle class and its settings for each layer that is known; `Refused` lists those that paddle does not have."""
    problems = [
        Problem(layer.path, _ABSENT[layer.kind], "a layer that paddle.nn has", "keep it in its own framework")
        for layer in manifest.layers
        if layer.kind in _ABSENT
    ]
    raise_all(Refused, problems)
    with reworded("torch", "paddle"):
        found = torch_classes.layer_classes(manifest)
    return {path: (paddle_class(cls), config) for path, (cls, config) in found.items()}


def paddle_class(cls: str) -> str:
    """The name that paddle gives to one of torch's classes.

    >>> paddle_class("Conv2d"), paddle_class("ConvTranspose1d"), paddle_class("RNN")
    ('Conv2D', 'Conv1DTranspose', 'SimpleRNN')
    """
    transposed = re.fullmatch(r"ConvTranspose(\d)d", cls)
    if transposed is not None:
        return f"Conv{transposed[1]}DTranspose"
    return _RENAMED.get(cls, re.sub(r"(\d)d$", r"\1D", cls))
