"""What a user says of a layer: its kind, and settings of its class that decide how it is stored.

>>> kind_hint("conv_transpose"), kind_hint("conv_transpose(transpose_kernel=false)")
(('conv_transpose', {}), ('conv_transpose', {'transpose_kernel': False}))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from neutral.conventions.forms import Convention

_HINT = re.compile(r"(\w+)\s*(?:\((.*)\))?", re.DOTALL)
_SETTING = re.compile(r"\s*(\w+)\s*=\s*(.*?)\s*", re.DOTALL)


def kind_hint(text: str) -> tuple[str, dict[str, Any]]:
    """(kind, settings) of a hint; what is no such text is a kind that nobody has."""
    found = _HINT.fullmatch(text)
    if found is None:
        return text, {}
    settings = {}
    for each in re.split(r",(?=\s*\w+\s*=)", found[2]) if found[2] else ():
        setting = _SETTING.fullmatch(each)
        if setting is None:
            return text, {}
        settings[setting[1]] = _value(setting[2])
    return found[1], settings


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def settings_known(convention: Convention) -> frozenset[str]:
    """The settings that a hint can tell a framework's convention."""
    return frozenset(name for form in convention.forms for name in kind_hint(f"kind({form.says})")[1])


def ways(kind: str, says: Iterable[str]) -> list[str]:
    """The hints that tell the forms of a kind apart.

    >>> ways("conv_transpose", ["transpose_kernel=false", "transpose_kernel=true", "transpose_kernel=false", ""])
    ['conv_transpose(transpose_kernel=false)', 'conv_transpose(transpose_kernel=true)']
    """
    return [f"{kind}({each})" for each in dict.fromkeys(says) if each]
