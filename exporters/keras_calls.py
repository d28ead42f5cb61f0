"""One Keras layer applied once, and its settings, each checked when it is asked for.

>>> call = Call("Conv2D", "c", "c", {"filters": 4, "kernel_size": [3, 2], "strides": 1}, ())
>>> call.positive("filters"), call.pair("kernel_size", 2), call.pair("strides", 2)
(4, (3, 2), (1, 1))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neutral.conventions.keras_config import entry_class
from neutral.exporters.keras_flow import Config, Flow, Unclear


def is_foreign(entry: Config) -> bool:
    """True if a serialised object is not one of Keras' own classes."""
    return not isinstance(entry.get("class_name"), str) or not entry_class(entry)[1]


def dtype_of(config: Config, default: str = "float32") -> str:
    spec = config.get("dtype")
    if isinstance(spec, Mapping):
        inner = spec.get("config")
        spec = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(spec, str):
        return default
    return spec.removeprefix("mixed_")


def own_layer(where: str, entry: Any) -> tuple[str, Config]:
    """Class and config of a serialised layer, which must be one of Keras' own."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("config"), Mapping) or is_foreign(entry):
        raise Unclear(f"its {where} is not one of Keras' own")
    return str(entry.get("class_name")), entry["config"]


@dataclass(frozen=True)
class Call:
    """One layer applied once."""

    cls: str
    name: str
    path: str
    config: Config
    inputs: tuple[Flow, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keras2: bool = False
    constants: tuple[Any, ...] = ()

    @property
    def x(self) -> Flow:
        if len(self.inputs) != 1:
            raise Unclear(f"it has {len(self.inputs)} inputs")
        return self.inputs[0]

    def number(self, *keys: str, default: float | None = None) -> float:
        """The first of some settings that is given."""
        for key in keys:
            value = self.config.get(key)
            if value is not None:
                return float(value["value"] if isinstance(value, Mapping) else value)  # Keras 2: a numpy scalar
        if default is None:
            raise Unclear(f"it lacks {keys[0]}")
        return default

    def pair(self, key: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """A setting per spatial axis: an integer for all, or a list."""
        value = self.config.get(key, default)
        value = default if value is None else value
        sizes = (value,) * count if isinstance(value, int) else tuple(value or ())
        if len(sizes) != count or not all(isinstance(n, int) and n >= 0 for n in sizes):
            raise Unclear(f"its {key} is {value!r}")
        return sizes

    def positive(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Unclear(f"its {key} is {value!r}")
        return int(value)

    def flag(self, key: str) -> bool:
        return bool(self.config.get(key, False))

    def dtype(self, flow: Flow) -> str:
        """The type that the layer computes in."""
        return dtype_of(self.config, flow.dtype if flow.dtype.startswith("float") else "float32")

    def inner(self, key: str) -> tuple[str, Config]:
        """Class and config of a layer inside this one."""
        return own_layer(key, self.config.get(key))
