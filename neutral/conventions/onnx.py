"""How ONNX stores layers: the initializers of the operators that have weights, under the names of the operators' inputs.

The weight of Gemm, MatMul and Einsum is called `W` here and their bias `B`, as Conv's are. `config` is the attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from neutral.conventions.forms import Config, Convention, Form, Row, Shapes, Sizes, layer
from neutral.conventions.keras import einsum_forms
from neutral.conventions.onnx_activations import activation_names

RECURRENT = ("RNN", "LSTM", "GRU")
_USUAL_FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "LSTM": ("sigmoid", "tanh", "tanh"),
    "GRU": ("sigmoid", "tanh"),
    "RNN": ("tanh",),
}
_DIRECTIONS = ("forward", "reverse", "bidirectional")


def _kernel_size(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in sorted(n for n in sizes if n[0] == "x" and n[1:].isdigit()))


def _ints(value: Any, rank: int, usual: int = 1) -> tuple[int, ...]:
    found = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return tuple(int(n) for n in found) if len(found) == rank else (usual,) * rank


def _pads(value: Any, rank: int) -> tuple[tuple[int, int], ...]:
    """All begins, then all ends, as pairs."""
    flat = _ints(value, 2 * rank, 0)
    return tuple(zip(flat[:rank], flat[rank:], strict=True))


def _halves(total: int, upper: bool) -> tuple[int, int]:
    """An odd one goes behind, or with SAME_LOWER in front."""
    return (total // 2, total - total // 2) if upper else (total - total // 2, total // 2)


def _conv(config: Config, sizes: Sizes) -> dict[str, Any]:
    kernel = _kernel_size(sizes)
    rank = len(kernel)
    strides, dilation = _ints(config.get("strides"), rank), _ints(config.get("dilations"), rank)
    auto = config.get("auto_pad", "NOTSET")
    padding: Any
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        upper = auto == "SAME_UPPER"
        padding = "same" if upper else "same_lower"
        if all(s == 1 for s in strides):
            padding = tuple(_halves(d * (k - 1), upper) for k, d in zip(kernel, dilation, strict=True))
    else:
        padding = _pads(None if auto == "VALID" else config.get("pads"), rank)
    return {
        "strides": strides,
        "padding": padding,
        "dilation": dilation,
        "groups": config.get("group", 1),
        "padding_mode": "zeros",
    }


def _conv_transpose(config: Config, sizes: Sizes) -> dict[str, Any]:
    kernel = _kernel_size(sizes)
    rank = len(kernel)
    strides, dilation = _ints(config.get("strides"), rank), _ints(config.get("dilations"), rank)
    found: dict[str, Any] = {"strides": strides, "dilation": dilation, "groups": config.get("group", 1)}
    if config.get("output_shape"):
        return found  # what is cropped depends on the input's size
    extra = _ints(config.get("output_padding"), rank, 0)
    auto = config.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            d * (k - 1) + 1 + e - s for k, s, d, e in zip(kernel, strides, dilation, extra, strict=True)
        ]  # the output has strides times the input's size
        if min(totals, default=0) < 0:
            return found
        pads: Sequence[tuple[int, int]] = [_halves(total, auto == "SAME_UPPER") for total in totals]
    else:
        pads = _pads(None if auto == "VALID" else config.get("pads"), rank)
    return {
        **found,
        "padding": tuple((begin, max(end - e, 0)) for (begin, end), e in zip(pads, extra, strict=True)),
        "output_padding": tuple(max(e - end, 0) for (_, end), e in zip(pads, extra, strict=True)),
    }


def _eps(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"eps": config.get("epsilon", 1e-5)}


def _batch_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_eps(config, sizes), "decay": config.get("momentum", 0.9)}


def _layer_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    axis = config.get("axis", -1)
    return {**_eps(config, sizes), "normalized_axes": -axis if axis < 0 else None}


def _group_norm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {**_eps(config, sizes), "groups": config.get("num_groups")}


def _functions(cls: str, config: Config) -> tuple[str, ...] | None:
    """neutral's names of a recurrent node's functions, in ONNX's order, one direction's for both; None for others."""
    if not config.get("activations"):
        return _USUAL_FUNCTIONS[cls]
    found = activation_names(config, len(_USUAL_FUNCTIONS[cls]))
    # The cell's function and that of what an LSTM gives out are one in all other frameworks.
    return found if found is None or len(set(found[1:])) <= 1 else None


def _recurrent_attributes(cls: str, config: Config, sizes: Sizes) -> dict[str, Any]:
    functions = _functions(cls, config) or (None,)
    return {
        "units": sizes.get("unit"),
        "bias_convention": "two",
        "go_backwards": True if config.get("direction") == "reverse" else None,
        "activation": functions[-1],
        "recurrent_activation": functions[0] if cls in ("LSTM", "GRU") else None,
    }


def _rnn(config: Config, sizes: Sizes) -> dict[str, Any]:
    return _recurrent_attributes("RNN", config, sizes)


def _lstm(config: Config, sizes: Sizes) -> dict[str, Any]:
    return _recurrent_attributes("LSTM", config, sizes)


def _gru(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        **_recurrent_attributes("GRU", config, sizes),
        "reset_after": bool(config.get("linear_before_reset", 0)),
    }


def _square_state(sizes: Sizes) -> bool:
    return sizes.get("hidden") == sizes.get("unit")


def _grouped(sizes: Sizes) -> bool:
    """The bias of a transposed convolution has `group` times the kernel's output channels."""
    if "channel" not in sizes:
        return True
    groups, rest = divmod(sizes["channel"], sizes["out"])
    return rest == 0 and groups > 0 and sizes["in"] % groups == 0


def refusal(cls: str, config: Config) -> str:
    """Why a recurrent node computes what no layer of another framework does; empty, if it does not.

    >>> refusal("LSTM", {"activations": ("Sigmoid", "Tanh", "Tanh")}), refusal("LSTM", {"clip": 3.0})
    ('', 'clip 3')
    """
    if cls not in RECURRENT:
        return ""
    reasons = []
    clip = config.get("clip", 0.0)
    if clip:
        reasons.append(f"clip {clip:g}")
    if config.get("input_forget", 0):
        reasons.append("input_forget")
    if config.get("direction", "forward") not in _DIRECTIONS:
        reasons.append(f"direction {config['direction']}")
    if _functions(cls, config) is None:
        given = ", ".join(str(name) for name in config.get("activations") or ())
        reasons.append(f"activations {given}")
    return "; ".join(reasons)


_Attributes = Callable[[Config, Sizes], dict[str, Any]]


def _recurrent(cls: str, kind: str, gates: str, labels: str, attributes: _Attributes) -> tuple[Form, ...]:
    """One direction, and two. `gates` in ONNX's order, `labels` in the canonical one; B is W's biases, then R's."""
    block, gate = (f"(gate:{gates} unit)", f"gate:{labels} ") if gates else ("unit", "")
    sides = f"(side:ir gate:{gates} unit)" if gates else "(side:ir unit)"
    forms = []
    for native, canonical in (("1", ""), ("direction", "direction ")):
        rows = (
            Row("input_kernel", "W", f"{native} {block} in", f"{canonical}{gate}unit in"),
            Row("recurrent_kernel", "R", f"{native} {block} hidden", f"{canonical}{gate}unit hidden"),
            Row("bias", "B", f"{native} {sides}", f"{canonical}side:ir {gate}unit"),
        )
        part = replace(layer(kind, *rows, attributes=attributes, check=_square_state), any_reset=True)
        forms.append(Form((cls,), (part,), guessable=False, applies=lambda config: not refusal(cls, config)))
    return tuple(forms)


def _norm(cls: str, kind: str, attributes: _Attributes, *names: str) -> Form:
    roles = ("scale", "bias", "mean", "variance")
    rows = [
        Row(role, name, "feature", required=role in ("mean", "variance"))
        for role, name in zip(roles, names, strict=False)
    ]
    return Form((cls,), (layer(kind, *rows, attributes=attributes),), guessable=False)


def _dense(classes: tuple[str, ...], axes: str, applies: Callable[[Config], bool]) -> Form:
    part = layer("dense", Row("kernel", "W", axes), Row("bias", "B", "out"))
    return Form(classes, (part,), guessable=False, applies=applies)


def _einsum(cls: str, config: Config) -> tuple[Form, ...]:
    """An Einsum as Keras' EinsumDense of the same equation, or as a bilinear layer.

    >>> _einsum("Einsum", {"equation": "ni,nj,oij->no"})[0].parts[0].rows[0].native
    'out in1 in2'
    """
    equation = str(config.get("equation", "")).replace(" ", "")
    if cls != "Einsum":
        return ()
    if equation.count(",") == 2:
        return _bilinear(equation)
    forms = []
    for form in einsum_forms("EinsumDense", {"equation": equation, "bias_axes": config.get("bias_axes", "")}):
        (known,) = form.parts
        rows = [replace(row, name=name) for row, name in zip(known.rows, ("W", "B"), strict=False)]
        if known.kind == "einsum_dense" and len(rows) == 1:
            rows.append(Row("bias", "B", raw=True))
        forms.append(Form(("Einsum",), (replace(known, rows=tuple(rows)),), guessable=False))
    return tuple(forms)


def _bilinear(equation: str) -> tuple[Form, ...]:
    operands, _, result = equation.partition("->")
    first, second, kernel = operands.split(",")
    shared = result[:-1]
    names = {result[-1:]: "out", first[-1:]: "in1", second[-1:]: "in2"}
    told = sorted(kernel) == sorted(names) and not set(kernel) & set(shared)
    if not told or first[:-1] != shared or second[:-1] != shared:
        return ()
    rows = (Row("kernel", "W", " ".join(names[letter] for letter in kernel)), Row("bias", "B", "out"))
    return (Form(("Einsum",), (layer("bilinear", *rows),), guessable=False),)


_ATTENTION = (
    Row("query_kernel", "query.W", "in query"),
    Row("query_bias", "query.B", "query"),
    Row("key_kernel", "key.W", "in_key key"),
    Row("key_bias", "key.B", "key"),
    Row("value_kernel", "value.W", "in_value value"),
    Row("value_bias", "value.B", "value"),
    Row("output_kernel", "output.W", "attended out"),
    Row("output_bias", "output.B", "out"),
    Row("extra_key", "extra_key", "1 1 key"),
    Row("extra_value", "extra_value", "1 1 key"),
)
"""An attention is several operators: products with these weights, and what stands between them."""


def _attention(config: Config, sizes: Sizes) -> dict[str, Any]:
    heads = config.get("q_num_heads")
    return {"heads": heads, "kv_heads": config.get("kv_num_heads", heads)}


def _deciding(config: Config, shapes: Shapes) -> dict[str, Any]:
    return {
        name: config[name] for name in ("equation", "bias_axes", "transB", "linear_before_reset") if config.get(name)
    }


ONNX = Convention(
    framework="onnx",
    flatten="channel position",
    forms=(
        _dense(("Gemm",), "out in", lambda config: bool(config.get("transB", 0))),
        _dense(("Gemm", "MatMul"), "in out", lambda config: not config.get("transB", 0)),
        Form(("Conv",), (layer("conv", Row("kernel", "W", "out in ..."), Row("bias", "B", "out"), attributes=_conv, check=lambda sizes: "x0" in sizes),), guessable=False),
        Form(("ConvTranspose",), (layer("conv_transpose", Row("kernel", "W", "in out ..."), Row("bias", "B", "channel"), attributes=_conv_transpose, check=lambda sizes: "x0" in sizes and _grouped(sizes)),), guessable=False),
        Form(("Gather",), (layer("embedding", Row("embedding", "data", "token feature")),), guessable=False),
        _norm("BatchNormalization", "batch_norm", _batch_norm, "scale", "B", "mean", "var"),
        Form(("LayerNormalization",), (layer("layer_norm", Row("scale", "scale", "feature", "feature"), Row("bias", "B", "feature", "feature"), attributes=_layer_norm),), guessable=False),
        Form(("LayerNormalization",), (layer("layer_norm", Row("scale", "scale", "..."), Row("bias", "B", "..."), attributes=_layer_norm),), guessable=False),
        _norm("GroupNormalization", "group_norm", _group_norm, "scale", "bias"),
        _norm("InstanceNormalization", "instance_norm", _eps, "scale", "B"),
        Form(("RMSNormalization",), (layer("rms_norm", Row("scale", "scale", "..."), attributes=_eps),), guessable=False),
        Form(("PRelu",), (layer("prelu", Row("slope", "slope", "feature", "feature")),), guessable=False),
        Form(("PRelu",), (layer("prelu", Row("slope", "slope", "feature ...", "feature ...")),), guessable=False),
        Form(("Attention",), (layer("attention", *_ATTENTION, attributes=_attention),), guessable=False),
        *_recurrent("RNN", "simple_rnn", "", "", _rnn),
        *_recurrent("LSTM", "lstm", "iofg", "ifgo", _lstm),
        *_recurrent("GRU", "gru", "zrn", "rzn", _gru),
    ),
    build=_einsum,
    deciding=_deciding,
)  # fmt: skip
