"""Names that Keras takes.

>>> names = Names()
>>> names.fresh("a/b"), names.fresh("a/b"), names.fresh("_x")
('a_b', 'a_b_1', 'layer_x')
"""

from __future__ import annotations

import re


def _legal(name: str) -> str:
    """A name that Keras takes: no slash, and a first character that TensorFlow's scopes allow."""
    clean = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
    return clean if re.match(r"[A-Za-z0-9]", clean) else f"layer{clean}"


class Names:
    """Names that Keras takes, each given once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def fresh(self, wanted: str) -> str:
        base = name = _legal(wanted)
        count = 1
        while name in self._taken:
            name, count = f"{base}_{count}", count + 1
        self._taken.add(name)
        return name
