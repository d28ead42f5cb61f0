"""How neutral's own .npz files store layers: canonical roles and canonical axes, fused where the kind fuses them."""

from __future__ import annotations

from typing import Any

from neutral.conventions.forms import Config, Convention, Form, Row, Sizes, layer, role_expression
from neutral.schema.kinds import KINDS


def _attributes(config: Config, sizes: Sizes) -> dict[str, Any]:
    return dict(config)


def _two_directions(sizes: Sizes) -> bool:
    return sizes.get("direction") == 2


def _forms() -> tuple[Form, ...]:
    forms = []
    for kind, cls in KINDS.items():
        if kind == "unknown":
            continue
        plain = tuple(Row(role, role, role_expression(kind, role)) for role in cls.parameters_of)
        forms.append(Form((kind,), (layer(kind, *plain, attributes=_attributes),)))
        if "direction" in _RECURRENT.get(kind, ""):
            both = tuple(
                Row(role, role, f"direction {role_expression(kind, role)}", f"direction {role_expression(kind, role)}")
                for role in cls.parameters_of
            )
            forms.append(Form((kind,), (layer(kind, *both, attributes=_attributes, check=_two_directions),)))
    return tuple(forms)


_RECURRENT = dict.fromkeys(("simple_rnn", "lstm", "gru"), "direction")

NUMPY = Convention(framework="numpy", forms=_forms(), flatten="channel position")
