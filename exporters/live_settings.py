"""What of a live module's attributes are its settings: plain data.

>>> plain_setting((2, 3)), plain_setting("relu"), plain_setting(print)
((True, [2, 3]), (True, 'relu'), (False, None))
"""

from __future__ import annotations

from typing import Any, Final

_LONGEST: Final = 1000
_DEEPEST: Final = 3


def plain_setting(value: object, depth: int = 0) -> tuple[bool, Any]:
    """(True, the value) of a number, a text, None or lists of them; (False, None) of anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return True, value
    if not isinstance(value, list | tuple) or len(value) > _LONGEST or depth >= _DEEPEST:
        return False, None
    inner = [plain_setting(member, depth + 1) for member in value]
    return all(kept for kept, _ in inner), [plain for _, plain in inner]
