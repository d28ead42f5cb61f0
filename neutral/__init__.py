"""Move trained neural-network weights between frameworks through one archive: right, or refused.

    import neutral

    neutral.export_model("model.pt", "model.nwt")
    neutral.import_model("model.nwt", to="keras")

`export_model` reads any file or live model into an archive, `import_model` writes any framework's file from one or fills
a live model, `convert` does both at once; `open_archive`, `diff` and `digest` look at what is there. Errors are
`NeutralError`s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neutral.errors import BadFile, NeutralError, Refused, Unsupported, WrongUsage

if TYPE_CHECKING:
    from neutral.archive import Archive, open_archive
    from neutral.convert import Difference, Report, convert, diff, digest, export_model, import_model

__all__ = [
    "Archive",
    "BadFile",
    "Difference",
    "NeutralError",
    "Refused",
    "Report",
    "Unsupported",
    "WrongUsage",
    "convert",
    "diff",
    "digest",
    "export_model",
    "import_model",
    "open_archive",
]

_HOMES = {"Archive": "neutral.archive", "open_archive": "neutral.archive"}


def __getattr__(name: str) -> Any:
    # Loaded when first used: `neutral --help` needs none of it.
    if name not in __all__:
        raise AttributeError(f"module 'neutral' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "neutral.convert")), name)
