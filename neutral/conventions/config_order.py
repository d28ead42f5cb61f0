"""Whether a model's layers follow each other one by one, by its Keras-style config.

>>> is_sequential({"config": {"class_name": "Sequential", "config": {"layers": []}}}), is_sequential({})
(True, False)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_sequential(settings: Mapping[str, Any]) -> bool:
    """True if the config of a source's settings is that of a Sequential, and so are the models in it."""
    config = settings.get("config")
    return isinstance(config, Mapping) and _sequential(config)


def _sequential(config: Mapping[str, Any]) -> bool:
    if config.get("class_name") != "Sequential":
        return False
    inner = config.get("config")
    layers = inner.get("layers", ()) if isinstance(inner, Mapping) else inner or ()
    models = [each for each in layers if isinstance(each, Mapping) and "layers" in (each.get("config") or {})]
    return all(_sequential(each) for each in models)
