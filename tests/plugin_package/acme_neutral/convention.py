"""How Acme stores layers, and the one kind of layer that only Acme has."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from neutral.conventions.forms import Config, Convention, Form, Row, Sizes, layer
from neutral.schema.kinds import Layer, Role


class LowRank(Layer):
    """y = up · (down · x) + bias."""

    kind: Literal["low_rank"] = "low_rank"
    alpha: float | None = None
    parameters_of: ClassVar[dict[str, Role]] = {
        "down": Role(("rank", "in"), required=True),
        "up": Role(("out", "rank"), required=True),
        "bias": Role(("out",)),
    }


def _alpha(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"alpha": config.get("alpha")}


ACME = Convention(
    framework="acme",
    forms=(
        Form(("Full",), (layer("dense", Row("kernel", "w", "in out"), Row("bias", "b", "out")),)),
        Form(
            ("Thin",),
            (
                layer(
                    LowRank,
                    Row("down", "d", "in rank"),
                    Row("up", "u", "rank out"),
                    Row("bias", "b", "out"),
                    attributes=_alpha,
                ),
            ),
        ),
    ),
    flatten="channel position",
    kinds=(LowRank,),
)
