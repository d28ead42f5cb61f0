"""How neutral's own .npz files store layers: canonical roles and canonical axes, fused where the kind fuses them.

No form is guessed: the arrays of a foreign file may have the same names in other axes. Neutral's own files say what
their layers are; of others the user does.
"""

from __future__ import annotations

from typing import Any

from neutral.conventions.forms import Config, Convention, Form, Row, Sizes, layer, role_expression
from neutral.schema.kinds import KINDS


def _attributes(config: Config, sizes: Sizes) -> dict[str, Any]:
    return dict(config)


def _two_directions(sizes: Sizes) -> bool:
    return sizes.get("direction") == 2


def _vectors(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a norm over one axis, which may cross a Flatten."""
    return tuple(Row(row.role, row.name, "feature", "feature", required=row.role == "scale") for row in rows)


def _reparametrized(kind: str) -> tuple[tuple[Row, ...], ...]:
    """A kernel as magnitude and direction, or with the vectors that give its norm."""
    if kind not in ("dense", "conv", "depthwise", "conv_transpose"):
        return ()
    axes, bias = role_expression(kind, "kernel"), Row("bias", "bias", role_expression(kind, "bias"))
    stored = (("kernel_direction", ("kernel_magnitude",)), ("kernel_raw", ("kernel_u", "kernel_v")))
    return tuple(
        (
            *(Row(role, role, raw=True, required=True) for role in beside),
            Row(kernel, kernel, axes, axes, required=True),
            bias,
        )
        for kernel, beside in stored
    )


def _forms_of(kind: str) -> tuple[Form, ...]:
    roles = KINDS[kind].parameters_of
    plain = tuple(Row(role, role, role_expression(kind, role)) for role in roles)
    rows = [_vectors(plain), plain] if plain[0].native == "..." else [plain, *_reparametrized(kind)]
    forms = [Form((kind,), (layer(kind, *each, attributes=_attributes),), guessable=False) for each in rows]
    if "direction" in _RECURRENT.get(kind, ""):
        both = tuple(
            Row(role, role, f"direction {role_expression(kind, role)}", f"direction {role_expression(kind, role)}")
            for role in roles
        )
        part = layer(kind, *both, attributes=_attributes, check=_two_directions)
        forms.append(Form((kind,), (part,), guessable=False))
    return tuple(forms)


def _of_plugins(cls: str, config: Config) -> tuple[Form, ...]:
    """The forms of a kind that a plug-in brings along."""
    return _forms_of(cls) if cls not in KINDS.own and cls in KINDS else ()


_RECURRENT = dict.fromkeys(("simple_rnn", "lstm", "gru"), "direction")

NUMPY = Convention(
    framework="numpy",
    forms=tuple(form for kind in KINDS.own if kind != "unknown" for form in _forms_of(kind)),
    flatten="channel position",
    build=_of_plugins,
)
