"""Which class of Equinox a canonical layer becomes without a template: none, for nothing tells the order of its leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neutral.errors import Problem, Unsupported
from neutral.schema.manifest import Manifest


def layer_classes(manifest: Manifest) -> Mapping[str, tuple[str, dict[str, Any]]]:
    """Refuses every model: a file of Equinox holds leaves without names, which only a model of Equinox gives an order."""
    raise Unsupported(
        Problem(
            f"a model of {manifest.source.framework}",
            "no model of Equinox to fill",
            "one, for a file of Equinox names no leaf",
            "fill a live model: import_model(archive, into=model).model",
        )
    )
