"""Move trained neural-network weights between frameworks through one archive: right, or refused.

    import neutral

    neutral.export_model("model.pt", "model.nwt")
    neutral.import_model("model.nwt", to="keras")

`export_model` reads any file or live model into an archive, `import_model` writes any framework's file from one or fills
a live model, `convert` does both at once; `open_archive`, `diff` and `digest` look at what is there. Errors are
`NeutralError`s.
"""

from __future__ import annotations

from neutral.archive import Archive, open_archive
from neutral.convert import Difference, Report, convert, diff, digest, export_model, import_model
from neutral.errors import BadFile, NeutralError, Refused, Unsupported, WrongUsage

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
