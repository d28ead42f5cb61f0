"""What every part of the manifest has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen model that knows all of its fields: an unknown one is an error, and nothing is coerced silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="strings", allow_inf_nan=False)
