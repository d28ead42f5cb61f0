"""Recurrent layers as ONNX runs them: over (time, batch, feature), with an axis for the direction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neutral.importers.onnx_builder import Call
from neutral.schema import layer_sizes, node_settings

_TO_THE_FRONT = -(1 << 63)
_MERGES = {"sum": "ReduceSum", "mul": "ReduceProd", "ave": "ReduceMean"}


def recurrent(c: Call) -> None:
    """The states of both directions, and Keras' meaning of the words: see `schema.graph`."""
    assert c.layer is not None
    ways = layer_sizes.directions(c.layer)
    lstm, sequences = c.layer.kind == "lstm", c.flag("return_sequences")
    backwards = bool(getattr(c.layer, "go_backwards", None))
    x = c.x
    if backwards and ways == 2:
        x = _flipped(c, x, "flip")
    x = c.emit("Transpose", [x], suffix="time", perm=[1, 0, 2])
    inputs = [x, c.weight("W"), c.weight("R"), c.weight("B"), "", *_first_states(c, ways, lstm)]
    while not inputs[-1]:
        inputs.pop()
    fresh = c.b.fresh
    made = [fresh(f"{c.name}/{part}") for part in ("sequence", "hidden", *(("cell",) if lstm else ()))]
    names = ("hidden_size", "direction", "activations", "activation_alpha", "activation_beta", "linear_before_reset")
    c.emit(c.node.op, inputs, made, **c.config(*names))
    count = 2 if ways == 2 and node_settings.merge_mode(c.node, c.layer) == "none" else 1
    outputs, states = c.outs[:count], c.outs[count:]
    if sequences:
        _sequences(c, made[0], ways, backwards and ways == 1, outputs)
    else:
        _merged(c, c.emit("Transpose", [made[1]], suffix="last", perm=[1, 0, 2]), ways, 1, outputs)
    kinds = made[1:] if c.flag("return_state") else []
    if len(states) != ways * len(kinds):
        raise c.refuse(f"{len(c.outs)} outputs", f"{count + ways * len(kinds)}")
    for i, output in enumerate(states):
        way, kind = divmod(i, len(kinds))
        _direction(c, kinds[kind], 0, way, output, f"state{i}")


def _flipped(c: Call, x: str, suffix: str, axis: int = 1, into: str | None = None) -> str:
    ranges = [
        c.ints(f"{suffix}.{name}", n)
        for name, n in (("starts", -1), ("ends", _TO_THE_FRONT), ("axes", axis), ("steps", -1))
    ]
    return c.emit("Slice", [x, *ranges], into, suffix)


def _first_states(c: Call, ways: int, lstm: bool) -> list[str]:
    """initial_h and initial_c, with the axis of the directions in front."""
    given = c.ins[1:]
    if not given:
        return []
    kinds = 2 if lstm else 1
    if len(given) != ways * kinds:
        raise c.refuse(f"{len(given)} states", f"{ways * kinds}")
    made = []
    for kind, name in enumerate(("initial_h", "initial_c")[:kinds]):
        front = c.ints(f"{name}.axes", 0)
        parts = [c.emit("Unsqueeze", [state, front], suffix=name) for state in given[kind::kinds]]
        made.append(parts[0] if ways == 1 else c.emit("Concat", parts, suffix=f"{name}.both", axis=0))
    return made


def _sequences(c: Call, y: str, ways: int, flip: bool, outputs: Sequence[str]) -> None:
    """(time, direction, batch, unit) as (batch, time, direction, unit), and the directions as one."""
    if not flip:
        _merged(c, c.emit("Transpose", [y], suffix="batch", perm=[2, 0, 1, 3]), ways, 2, outputs)
        return
    # ONNX puts the steps of a reversed layer in the order of its input, Keras leaves them reversed.
    turned = c.b.fresh(f"{c.name}/reversed")
    _merged(c, c.emit("Transpose", [y], suffix="batch", perm=[2, 0, 1, 3]), ways, 2, [turned])
    _flipped(c, turned, "flip", into=outputs[0])


def _merged(c: Call, y: str, ways: int, axis: int, outputs: Sequence[str]) -> None:
    """The directions, which lie along `axis` in front of the units, as one value or one each."""
    if ways == 1:
        c.emit("Squeeze", [y, c.ints("direction.axes", axis)], outputs[0], "squeeze")
        return
    mode = node_settings.merge_mode(c.node, c.layer)
    if mode == "none":
        for way, output in enumerate(outputs):
            _direction(c, y, axis, way, output, ("forward", "backward")[way])
    elif mode == "concat":
        c.emit("Reshape", [y, c.ints("shape", *(0,) * axis, -1)], outputs[0], "concat")
    elif mode in _MERGES:
        c.emit(_MERGES[mode], [y, c.ints("direction.axes", axis)], outputs[0], mode, keepdims=0)
    else:
        raise c.refuse(f"the merge mode {mode}", "concat, sum, mul, ave or none")


def _direction(c: Call, y: str, axis: int, way: int, output: str, suffix: str) -> None:
    index = c.constant(f"{suffix}.index", np.asarray(way, np.int64))
    c.emit("Gather", [y, index], output, suffix, axis=axis)
