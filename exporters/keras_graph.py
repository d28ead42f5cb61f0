"""The graph of a Keras model, read from its config alone.

>>> config = {"class_name": "Sequential", "config": {"layers": [
...     {"class_name": "InputLayer", "config": {"name": "x", "batch_shape": [None, 4, 4, 3]}},
...     {"class_name": "Flatten", "config": {"name": "flat"}},
...     {"class_name": "Dense", "config": {"name": "fc", "units": 2, "activation": "relu"}}]}}
>>> graph, splits, notes = capture(config)
>>> [node.op for node in graph.nodes], graph.values["x"].shape, splits
(['Flatten', 'Gemm', 'Relu'], (None, 3, 4, 4), {'fc': {'in': 3}})

Keras has channels last, the graph channels first. A `Flow` is a Keras tensor under way: its shape in Keras' order, and
how the graph has it. Some decisions depend on what comes later (may this Flatten leave its permutation to the Dense
behind it?). They start favourably; what refutes one is written down in `Decisions`, and the capture runs again.
Constants are `Constant` nodes (attribute `value_float`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from neutral.conventions.forms import INPUT_RANK
from neutral.conventions.keras_config import is_keras2
from neutral.conventions.keras_variables import CONTAINERS
from neutral.errors import printable
from neutral.exporters.keras_builder import Builder, Decisions, Splits
from neutral.exporters.keras_calls import is_foreign
from neutral.exporters.keras_flow import Config, Flow, Malformed, Unclear
from neutral.exporters.keras_models import ModelWalk
from neutral.exporters.wiring import with_graph
from neutral.native import NativeModel
from neutral.schema.graph import Graph

_MOST_PASSES = 100


def _pass(config: Config, version: object, decisions: Decisions) -> tuple[Builder, list[Flow]]:
    builder = Builder(decisions, is_keras2(config, version))
    outputs = ModelWalk(builder, "", 0).run(config, None)
    kept = []
    for flow in outputs:
        flow = builder.ordered(flow)
        if flow.shape is not None and not flow.first and flow.rank in (4, 5) and not flow.opaque:
            flow = builder.channels_first(flow)
        kept.append(flow)
    return builder, kept


@dataclass
class Aside:
    """What a capture finds beside the graph: the rank of the input of each layer that counts axes, and the layers whose
    axis is joined of others in an order that the config does not tell."""

    ranks: dict[str, int] = field(default_factory=dict)
    unsettled: set[str] = field(default_factory=set)


def wired(model: NativeModel, config: Config | None, version: object = None) -> NativeModel:
    """The model with what its config says of its wiring; layers that count axes are told the rank of their input."""
    aside = Aside()
    found = with_graph(model, config, partial(capture, version=version, aside=aside))
    ranks = aside.ranks
    layers = (
        replace(layer, config={**layer.config, INPUT_RANK: ranks[layer.path]}) if layer.path in ranks else layer
        for layer in found.layers
    )
    return replace(found, layers=tuple(layers), unsettled=found.unsettled | aside.unsettled)


def capture(
    config: Mapping[str, Any], version: object = None, aside: Aside | None = None
) -> tuple[Graph | None, Splits, list[str]]:
    """The graph of a parsed model config, the splits of its vector layers, and remarks for the user.

    `version` is the version of Keras that the config's file tells.
    The graph is None if a layer has no place in it; the remarks say which. `splits` names each dense layer, norm and
    PReLU whose surroundings are understood even so. `aside` takes what else was found.
    """
    decisions = Decisions()
    for _ in range(_MOST_PASSES):
        decisions.changed = False
        try:
            if str(config.get("class_name")) not in CONTAINERS or is_foreign(config):
                raise Malformed(f"a model of class {config.get('class_name')!r}, which only its own code can wire")
            builder, outputs = _pass(config, version, decisions)
        except (Malformed, Unclear) as error:
            return None, {}, [printable(f"model: {error}; the archive has no graph")]
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            reason = f"its settings make no sense ({type(error).__name__})"
            return None, {}, [printable(f"model: {reason}; the archive has no graph")]
        if not decisions.changed:
            break
    else:
        return None, {}, ["model: its wiring contradicts itself; the archive has no graph"]
    if aside is not None:
        aside.ranks, aside.unsettled = builder.ranks, builder.unsettled
    splits = {path: axes for path, axes in builder.splits.items() if path not in builder.undecided}
    if builder.unclear or any(flow.opaque for flow in outputs):
        return None, splits, builder.notes
    graph = Graph(
        inputs=tuple(builder.inputs),
        outputs=tuple(flow.name for flow in outputs),
        values=builder.values,
        nodes=tuple(builder.nodes),
    )
    return graph, splits, builder.notes
