"""Keras' recurrent layers, cells and Bidirectional."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neutral.conventions.keras_config import mirrored
from neutral.conventions.keras_variables import CELL_OF
from neutral.errors import printable
from neutral.exporters.keras_builder import Builder
from neutral.exporters.keras_calls import Call, own_layer
from neutral.exporters.keras_flow import Config, Flow, Shape, Unclear
from neutral.schema.graph import Attribute

_RECURRENT = {"LSTM": ("LSTM", 2), "GRU": ("GRU", 1), "SimpleRNN": ("RNN", 1)}
"""Operator, and number of states."""


def _plain_recurrence(b: Builder, call: Call, config: Config) -> None:
    if config.get("time_major"):
        raise Unclear("it is time-major")
    if config.get("stateful"):
        b.note(printable(f"{call.path}: stateful; the graph starts each batch from zero"))


def _sequence_input(b: Builder, call: Call) -> tuple[Flow, list[Flow]]:
    states = list(call.inputs[1:])
    for key, value in call.arguments.items():
        if key == "initial_state" and value is not None:
            states += value if isinstance(value, list) else [value]
        elif value not in (None, False):
            raise Unclear(f"it is called with {key}")
    if not call.inputs or not all(isinstance(state, Flow) for state in states):
        raise Unclear("its inputs are not tensors")
    flow = call.inputs[0]
    if flow.masked:
        raise Unclear("it uses a mask")
    flow = b.as_is(flow)
    if flow.rank != 3:
        raise Unclear(f"its input has rank {flow.rank}")
    return flow, [b.as_is(state) for state in states]


def recurrent(b: Builder, call: Call) -> list[Flow]:
    _plain_recurrence(b, call, call.config)
    flow, states = _sequence_input(b, call)
    return _recurrence(b, call, call.config, flow, states)


def _results(config: Config, flow: Flow, units: int, state_count: int, width: int) -> tuple[list[Flow], list[Flow]]:
    """The output of a layer that runs over a sequence, and its final states where it gives them."""
    batch, steps, _ = flow.dims
    shape: Shape = (batch, steps, width) if config.get("return_sequences") else (batch, width)
    states = [Flow("", (batch, units), dtype=flow.dtype)] * (state_count if config.get("return_state") else 0)
    return [Flow("", shape, dtype=flow.dtype)], states


def _returned(config: Config) -> dict[str, Attribute]:
    return {key: bool(config.get(key)) for key in ("return_sequences", "return_state")}


def _check_states(states: list[Flow], expected: int) -> None:
    if len(states) not in (0, expected):
        raise Unclear(f"it is given {len(states)} states")


def _recurrence(b: Builder, call: Call, returned: Config, flow: Flow, states: list[Flow]) -> list[Flow]:
    op, state_count = _RECURRENT[call.cls]
    _check_states(states, state_count)
    units = call.positive("units")
    output, last = _results(returned, flow, units, state_count, units)
    return b.emit_many(call.path, op, [flow, *states], output + last, _returned(returned), layer=call.path)


def rnn(b: Builder, call: Call) -> list[Flow]:
    _plain_recurrence(b, call, call.config)
    if call.flag("go_backwards"):
        raise Unclear("it runs cells backwards")
    flow, states = _sequence_input(b, call)
    cls, cell = call.inner("cell")
    if cls in CELL_OF:
        return _recurrence(b, replace(call, cls=CELL_OF[cls], config=cell), call.config, flow, states)
    if cls != "StackedRNNCells" or states or call.flag("return_state") or cell.get("reverse_state_order"):
        raise Unclear(f"its cell is {cls!r}")
    cells = [own_layer("cell", entry) for entry in cell.get("cells", ())]
    if not cells or any(name not in CELL_OF for name, _ in cells):
        raise Unclear("it stacks cells that are not Keras' own")
    for i, (name, config) in enumerate(cells):
        returned = {"return_sequences": call.flag("return_sequences") or i < len(cells) - 1}
        one = replace(call, cls=CELL_OF[name], path=f"{call.path}.{i}", config=config)
        flow = _recurrence(b, one, returned, flow, [])[0]
    return [flow]


def _settings(layer: Mapping[str, Any]) -> Config:
    """A recurrent layer's own settings, those of its cell among them."""
    config = layer.get("config")
    if not isinstance(config, Mapping):
        raise Unclear("its backward layer has no config")
    cell = config.get("cell")
    inner = cell.get("config") if isinstance(cell, Mapping) else None
    return {**config, **inner} if isinstance(inner, Mapping) else config


def bidirectional(b: Builder, call: Call) -> list[Flow]:
    cls, config = call.inner("layer")
    if cls == "RNN":
        cls, cell = own_layer("cell", config.get("cell"))
        cls, config = CELL_OF.get(cls, cls), {**config, **cell}
    if cls not in _RECURRENT:
        raise Unclear(f"its layer is {cls!r}")
    backward = call.config.get("backward_layer")
    if isinstance(backward, Mapping) and backward.get("class_name") not in (cls, "RNN"):
        raise Unclear("its two layers are of different classes")
    if not mirrored(config, _settings(backward) if isinstance(backward, Mapping) else None):
        raise Unclear("its two layers do not compute alike, the second one backwards")
    _plain_recurrence(b, call, config)
    flow, states = _sequence_input(b, call)
    op, state_count = _RECURRENT[cls]
    _check_states(states, 2 * state_count)
    mode = call.config.get("merge_mode", "concat")
    if mode not in ("concat", "sum", "mul", "ave", None):
        raise Unclear(f"its merge_mode is {mode!r}")
    units = replace(call, config=config).positive("units")
    output, last = _results(config, flow, units, 2 * state_count, 2 * units if mode == "concat" else units)
    results = output * (2 if mode is None else 1) + last
    attributes: dict[str, Attribute] = {**_returned(config), "merge_mode": mode or "none"}
    return b.emit_many(call.path, op, [flow, *states], results, attributes, layer=call.path)
