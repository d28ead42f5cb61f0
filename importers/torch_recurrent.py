"""Recurrent layers as torch runs them, and step by step where the number of steps is not known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neutral.importers.torch_call import Call
from neutral.schema import layer_sizes, node_settings


def recurrent(c: Call) -> Any:
    """Keras' meaning of the words: the last output of the backward direction is that of the first step."""
    ways = layer_sizes.directions(c.layer)
    gated = c.layer.kind == "lstm"
    x = c.x.flip(1) if c.layer.go_backwards else c.x
    # torch.export writes a recurrent module out step by step, which fixes the number of steps; a scan does not.
    state = _first_state(c, gated)
    y, final = c.module(x, state) if isinstance(x.shape[1], int) else _scan(c, x, state)
    h = final[0] if gated else final
    if not c.flag("return_sequences"):
        parts = [h[i] for i in range(ways)]
    else:
        parts = list(y.chunk(2, -1)) if ways == 2 else [y]
    outputs = _merged(c, parts, y if c.flag("return_sequences") else None)
    if c.flag("return_state"):
        for i in range(ways):
            outputs += [h[i], final[1][i]] if gated else [h[i]]
    return outputs if len(outputs) > 1 else outputs[0]


def _first_state(c: Call, gated: bool) -> Any:
    states = list(c.ins[1:])
    if not states:
        return None
    if gated:
        return c.torch.stack(states[0::2]), c.torch.stack(states[1::2])
    return c.torch.stack(states)


def _merged(c: Call, parts: list[Any], joined: Any) -> list[Any]:
    if len(parts) == 1:
        return parts
    mode = node_settings.merge_mode(c.node, c.layer)
    if mode == "none":
        return parts
    forward, backward = parts
    if mode == "concat":
        return [joined if joined is not None else c.torch.cat(parts, -1)]
    merge = {"sum": forward + backward, "mul": forward * backward, "ave": (forward + backward) / 2}
    if mode not in merge:
        raise c.refuse(f"the merge mode {mode}", "concat, sum, mul, ave or none")
    return [merge[mode]]


def _scan(c: Call, x: Any, state: Any) -> tuple[Any, Any]:
    """What the module of a recurrent layer returns, for a number of steps that is not known."""
    from torch._higher_order_ops.scan import scan

    linear = c.functional.linear
    outputs, finals = [], []
    for way in range(layer_sizes.directions(c.layer)):
        weights = {
            name: getattr(c.module, f"{name}_l0{'_reverse' if way else ''}", None)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        }
        steps = linear(x.flip(1) if way else x, weights["weight_ih"], weights["bias_ih"]).transpose(0, 1)
        step = _STEPS[c.layer.kind](c, weights)
        final, made = scan(step, _carry(c, x, state, way), steps)
        outputs.append(made.transpose(0, 1).flip(1) if way else made.transpose(0, 1))
        finals.append(final)
    states = tuple(c.torch.stack(parts) for parts in zip(*finals, strict=True))
    return c.torch.cat(outputs, -1), states if c.layer.kind == "lstm" else states[0]


def _carry(c: Call, x: Any, state: Any, way: int) -> tuple[Any, ...]:
    if state is None:
        sizes = [layer_sizes.state_size(c.layer)]
        sizes += [layer_sizes.size(layer_sizes.kernel(c.layer), "unit")] if c.layer.kind == "lstm" else []
        return tuple(x.new_zeros(x.shape[0], n) for n in sizes)
    return tuple(part[way].clone() for part in (state if isinstance(state, tuple) else (state,)))


def _lstm_step(c: Call, weights: Mapping[str, Any]) -> Any:
    def step(carry: Any, given: Any) -> Any:
        hidden, cell = carry
        gates = given + c.functional.linear(hidden, weights["weight_hh"], weights["bias_hh"])
        i, f, g, o = gates.chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        if weights["weight_hr"] is not None:
            hidden = c.functional.linear(hidden, weights["weight_hr"])
        return (hidden, cell), hidden.clone()

    return step


def _gru_step(c: Call, weights: Mapping[str, Any]) -> Any:
    def step(carry: Any, given: Any) -> Any:
        (hidden,) = carry
        own = c.functional.linear(hidden, weights["weight_hh"], weights["bias_hh"])
        (r, z, n), (own_r, own_z, own_n) = given.chunk(3, -1), own.chunk(3, -1)
        new = (n + (r + own_r).sigmoid() * own_n).tanh()
        update = (z + own_z).sigmoid()
        hidden = (1 - update) * new + update * hidden
        return (hidden,), hidden.clone()

    return step


def _rnn_step(c: Call, weights: Mapping[str, Any]) -> Any:
    activation = c.torch.relu if c.layer.activation == "relu" else c.torch.tanh

    def step(carry: Any, given: Any) -> Any:
        hidden = activation(given + c.functional.linear(carry[0], weights["weight_hh"], weights["bias_hh"]))
        return (hidden,), hidden.clone()

    return step


_STEPS = {"lstm": _lstm_step, "gru": _gru_step, "simple_rnn": _rnn_step}
