"""The manifest of an archive.

>>> manifest = Manifest(source=Source(framework="torch", format="pt"), layers=(), weights_digest="0" * 64)
>>> Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()
True
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from neutral.errors import BadFile, Problem
from neutral.schema.base import Strict
from neutral.schema.graph import Graph
from neutral.schema.kinds import Parameter, Sha256, StoredLayer

FORMAT_VERSION = "1.0"
_NO_DIGEST = "0" * 64


class Source(Strict):
    """Where the weights came from. `settings` holds what the framework's own file needs to be written again."""

    framework: str
    format: str
    sha256: Sha256 | None = None
    key: str | None = None
    order: tuple[str, ...] = ()
    settings: dict[str, Any] = {}


class Loss(Strict):
    """A rule that lost something when it was applied: which, to what, and what was lost."""

    rule: str
    layer: str
    detail: str


class Manifest(Strict):
    """All that an archive says beside its tensors. See the archive section of the README for the meaning of each field."""

    format_version: Annotated[str, Field(pattern=r"^\d+\.\d+$")] = FORMAT_VERSION
    source: Source
    layers: tuple[StoredLayer, ...]
    weights_digest: Sha256
    manifest_digest: Sha256 = _NO_DIGEST
    ordered: bool = False
    graph: Graph | None = None
    collections: dict[str, dict[str, Parameter]] = {}
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    created: str | None = None

    @model_validator(mode="after")
    def _each_name_once(self) -> Manifest:
        paths = [layer.path for layer in self.layers]
        twice = sorted({p for p in paths if paths.count(p) > 1}) if len(set(paths)) != len(paths) else []
        if twice:
            raise ValueError(f"two layers are named {twice[0]!r}")
        return self

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no insignificant white space, absent fields left out; with its own digest."""
        fields = self.model_dump(mode="json", exclude_defaults=False, exclude_none=True)
        fields["manifest_digest"] = _NO_DIGEST
        fields["manifest_digest"] = hashlib.sha256(_canonical(fields).encode("utf-8", "surrogatepass")).hexdigest()
        return _canonical(fields)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "manifest") -> Manifest:
        """Validate JSON text; `BadFile` names each field that is wrong."""
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise BadFile(*_problems(where, error)) from None
        except (ValueError, RecursionError):
            raise BadFile(Problem(where, "text that is not JSON", "a manifest")) from None

    def is_of(self, text: str) -> bool:
        """Whether the text that this was read from has the digest that it says: that of the text with zeros for it."""
        key = '"manifest_digest":"{}"'
        blank = text.replace(key.format(self.manifest_digest), key.format(_NO_DIGEST))
        return hashlib.sha256(blank.encode("utf-8", "surrogatepass")).hexdigest() == self.manifest_digest

    def no_graph(self) -> str:
        """Why there is no graph, as far as the reader of the source noted it: a phrase for a message."""
        noted = next((note for note in self.notes if "no graph" in note), "")
        return noted.removesuffix("; the archive has no graph") or "the source does not say how its layers are wired"

    def parameters(self) -> Iterable[tuple[str, Parameter]]:
        """(`<layer>/<role>`, parameter) of every layer, in order."""
        for layer in self.layers:
            for role, parameter in layer.parameters.items():
                yield f"{layer.path}/{role}", parameter


def _canonical(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _problems(where: str, error: ValidationError) -> list[Problem]:
    return [
        Problem(f"{where}: {'.'.join(str(part) for part in detail['loc'])}", f"{detail['msg']}", "a valid manifest")
        for detail in error.errors(include_url=False, include_input=False)[:5]
    ]


def json_schema() -> dict[str, Any]:
    """The published JSON Schema, generated from the models."""
    return Manifest.model_json_schema(mode="serialization")
