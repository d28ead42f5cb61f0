"""JSON out of a file: parsed, or refused in one line.

>>> parse_json(b'{"a": 1}', "x.json")
{'a': 1}
"""

from __future__ import annotations

import json
from typing import Any

from neutral.errors import BadFile, Problem


def parse_json(text: bytes, where: str, expected: str = "JSON as Keras writes it") -> dict[str, Any]:
    """A JSON object; damaged or deep text is a `BadFile`. Whoever read the text has bounded its size."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(Problem(where, f"text that is no JSON ({error})", expected)) from None
    if not isinstance(value, dict):
        raise BadFile(Problem(where, f"a JSON {type(value).__name__}", "a JSON object"))
    return value
