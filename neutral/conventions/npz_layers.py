"""What neutral's own .npz files say of their layers, in the comment of the zip: kinds, settings, Flatten axes.

>>> layers = {"fc": {"kind": "dense", "channels": {"in": 16}}}
>>> read_comment(write_comment(layers)) == layers
True

The comment is `neutral` and zlib-compressed JSON in base64. A comment has at most 65535 bytes; where more would be needed
there is none, and the layers are known by their arrays alone, as those of any other file.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from typing import Any

_MARK = b"neutral "
_LONGEST = 65535
_LARGEST_TEXT = 16 << 20


def write_comment(layers: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The comment for layers by path; empty if it would be too long."""
    text = json.dumps(layers, sort_keys=True, separators=(",", ":")).encode()
    comment = _MARK + base64.b64encode(zlib.compress(text, 9))
    return comment if len(comment) <= _LONGEST else b""


def read_comment(comment: bytes) -> dict[str, dict[str, Any]]:
    """The layers that a comment describes; none for a comment of somebody else or a damaged one."""
    if not comment.startswith(_MARK):
        return {}
    try:
        machine = zlib.decompressobj()
        text = machine.decompress(base64.b64decode(comment[len(_MARK) :], validate=True), _LARGEST_TEXT)
        found = json.loads(text) if machine.eof else {}
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(path): _frozen(layer) for path, layer in found.items() if isinstance(layer, dict)}


def _frozen(value: Any) -> Any:
    """JSON with tuples for lists, as settings have them."""
    if isinstance(value, dict):
        return {str(name): _frozen(item) for name, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
