"""What a TensorFlow.js model's own JSON can be written as again: itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neutral.archive import Contents
from neutral.conventions.tfjs import own_text


def describes(settings: Mapping[str, Any], source_format: str, form: str) -> bool:
    """True if an archive kept the JSON of its source, for a file of the same format."""
    return form == source_format == "layers-model" and own_text(settings) is not None


def renewed(contents: Contents) -> tuple[Contents, list[str], list[str]]:
    """Every model stays as it is."""
    return contents, [], []
