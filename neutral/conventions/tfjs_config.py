"""The topology of a TensorFlow.js model in the words of Keras 2, with what TensorFlow.js makes of them.

>>> layer = {"class_name": "ReLU", "config": {"name": "act", "negative_slope": 0.1}}
>>> as_keras2({"class_name": "Sequential", "config": {"layers": [layer]}}).remarks
('act: TensorFlow.js computes this ReLU without its negative_slope 0.1, and it is read so',)

Its classes take fewer settings than Keras', and pass over the others in silence; some defaults differ. What is read is
what TensorFlow.js computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from neutral.conventions.keras_config import entry_name, is_model
from neutral.errors import printable

Config = Mapping[str, Any]

_DEEPEST = 64

_DEFAULTS: Mapping[str, Config] = {
    "LSTM": {"recurrent_activation": "hard_sigmoid"},
    "GRU": {"recurrent_activation": "hard_sigmoid"},
    "LSTMCell": {"recurrent_activation": "hard_sigmoid"},
    "GRUCell": {"recurrent_activation": "hard_sigmoid"},
    "Softmax": {"axis": 1},
}
"""What a class does where a setting is not given, if it is not what Keras 2 does."""


def _nothing(value: Any) -> bool:
    return value in (None, 0, False)


def _ones(value: Any) -> bool:
    return value is None or value == 1 or (isinstance(value, list) and all(n == 1 for n in value))


_PASSED_OVER: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "ReLU": {"negative_slope": _nothing, "threshold": _nothing},
    "DepthwiseConv2D": {"dilation_rate": _ones},
    **{f"Conv{n}DTranspose": {"dilation_rate": _ones, "output_padding": lambda value: value is None} for n in (2, 3)},
    **{
        f"Global{pool}Pooling{n}D": {"keepdims": _nothing} for pool in ("Average", "Max") for n in (1, 2)
    },
    "Bidirectional": {"backward_layer": _nothing},
}  # fmt: skip
"""Settings that TensorFlow.js passes over, and whether a value makes no difference."""

_DEEP = ("DepthwiseConv2D", "SeparableConv2D")

ASYMMETRIC = "bilinear_asymmetric"
"""What TensorFlow.js computes for `bilinear`: positions are multiples of the step, not centres of pixels."""


@dataclass(frozen=True)
class Topology:
    """A model's config, as Keras 2 would have written what TensorFlow.js computes, and what was changed."""

    config: Config
    remarks: tuple[str, ...] = ()


def model_of(topology: Config) -> Config:
    """The model's own entry: in files of the converter it lies in `model_config`."""
    inner = topology.get("model_config")
    return inner if isinstance(inner, Mapping) else topology


def as_keras2(entry: Config, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Topology:
    """The same model in the words of Keras 2; `shapes` are those of its weights.

    Raises what malformed configs make Python raise.
    """
    remarks: list[str] = []
    return Topology(_entry(entry, shapes or {}, remarks, 0), tuple(remarks))


def _entry(entry: Config, shapes: Mapping[str, tuple[int, ...]], remarks: list[str], depth: int) -> Config:
    if depth > _DEEPEST:
        raise ValueError(f"layers nested deeper than {_DEEPEST} levels")
    config: Any = entry.get("config")
    if is_model(entry):
        listed = isinstance(config, list)
        layers = [_entry(layer, shapes, remarks, depth + 1) for layer in (config if listed else config["layers"])]
        if entry["class_name"] == "Sequential":
            layers = [*_unsaid_input(layers), *layers]
        return {**entry, "config": layers if listed else {**config, "layers": layers}}
    if not isinstance(config, Mapping):
        return entry
    cls = str(entry.get("class_name"))
    given = {key: value for key, value in config.items() if value is not None or key not in _DEFAULTS.get(cls, {})}
    changed = {**_DEFAULTS.get(cls, {}), **given}
    if cls in _DEEP and given.get("depth_multiplier") is None:  # TensorFlow.js does not save that of a SeparableConv2D
        kernel = shapes.get(f"{entry_name(entry)}/depthwise_kernel", (1,))
        changed["depth_multiplier"] = kernel[-1] if kernel else 1
    for setting, harmless in _PASSED_OVER.get(cls, {}).items():
        value = changed.pop(setting, None)
        if not harmless(value):
            told = "" if isinstance(value, Mapping) else printable(value, 40)
            remark = f"{entry_name(entry)}: TensorFlow.js computes this {cls} without its {setting} {told}".rstrip()
            remarks.append(printable(f"{remark}, and it is read so"))
    if cls == "UpSampling2D" and changed.get("interpolation") == "bilinear":
        changed["interpolation"] = ASYMMETRIC
    for key in ("layer", "cell"):
        if isinstance(changed.get(key), Mapping):
            changed[key] = _entry(changed[key], shapes, remarks, depth + 1)
    if isinstance(changed.get("cells"), list):
        changed["cells"] = [_entry(cell, shapes, remarks, depth + 1) for cell in changed["cells"]]
    return {**entry, "config": changed}


def _unsaid_input(layers: list[Config]) -> list[Config]:
    """The input of a Sequential whose first layer says the shape, as a layer of its own, as Keras 2 writes it."""
    first = layers[0]["config"] if layers else {}
    shape = first.get("batch_input_shape") if isinstance(first, Mapping) else None
    if shape is None or layers[0]["class_name"] == "InputLayer":
        return []
    cast = {} if layers[0]["class_name"] == "Embedding" else {"dtype": first.get("dtype") or "float32"}
    name = f"{entry_name(layers[0])}_input"
    return [{"class_name": "InputLayer", "config": {"name": name, "batch_input_shape": shape, **cast}}]


def outline(entry: Config) -> Config:
    """The classes of a model and of those in it, without settings: whether it is a chain can be told from that."""
    if not is_model(entry):
        return {"class_name": entry.get("class_name"), "config": {}}
    config = entry["config"]
    layers = config if isinstance(config, list) else config["layers"]
    return {"class_name": entry["class_name"], "config": {"layers": [outline(layer) for layer in layers]}}
