"""How TensorFlow.js stores layers: as Keras 2 does, for the classes that it has.

>>> [row.name for row in TFJS.forms[2].parts[0].rows], TFJS.forms[2].classes
(['depthwise_kernel', 'bias'], ('DepthwiseConv2D',))
>>> sorted({kind for form in TFJS.forms for kind in (part.kind for part in form.parts)})[:4]
['batch_norm', 'conv', 'conv_transpose', 'dense']

A GRU applies its reset gate before the recurrent kernel and has one bias (`reset_after` is refused by its own code).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from neutral.conventions.forms import Convention, Form, Part
from neutral.conventions.keras import KERAS

WEIGHED = frozenset({
    "Dense", "Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "Conv3DTranspose", "DepthwiseConv2D", "SeparableConv2D",
    "Embedding", "BatchNormalization", "LayerNormalization", "PReLU", "SimpleRNN", "LSTM", "GRU",
})  # fmt: skip
"""Classes of TensorFlow.js 4.22 that have weights and a kind here."""

VARIABLES = {("DepthwiseConv2D", "kernel"): "depthwise_kernel"}
"""Variables that Keras 3 has under another name: (class, Keras 3's name) -> the one here."""

_TEXT, _SIZES = "model_json", "shards"


def kept(text: str, sizes: list[list[int]]) -> dict[str, Any]:
    """What an archive keeps of a file, to give it back byte for byte: its JSON, the sizes of its shards by group."""
    return {"metadata": {_TEXT: text, _SIZES: sizes}}


def own_text(settings: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """That JSON and those sizes out of an archive's settings, if they are there.

    >>> own_text(kept("{}", [[4]]))
    ('{}', [[4]])
    """
    found = settings.get("metadata")
    if not isinstance(found, Mapping) or not isinstance(found.get(_TEXT), str):
        return None
    sizes = found.get(_SIZES)
    return found[_TEXT], sizes if isinstance(sizes, list) else []


def _forms() -> Iterator[Form]:
    for form in KERAS.forms:
        classes = tuple(cls for cls in form.classes if cls in WEIGHED)
        rows = [row for part in form.parts for row in part.rows]
        if classes and not any(row.native.startswith("side") for row in rows):
            yield replace(form, classes=classes, parts=tuple(_named(classes[0], part) for part in form.parts))


def _named(cls: str, part: Part) -> Part:
    rows = tuple(replace(row, name=VARIABLES.get((cls, row.name), row.name)) for row in part.rows)
    return replace(part, rows=rows)


TFJS = Convention(framework="tfjs", forms=tuple(_forms()), flatten=KERAS.flatten, deciding=KERAS.deciding)
