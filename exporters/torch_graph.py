"""The graph of a torch `nn.Sequential`, from a plain description of its modules.

>>> linear = {"cls": "Linear", "path": "0", "config": {"in_features": 3, "out_features": 2}, "children": []}
>>> relu = {"cls": "ReLU", "path": "1", "config": {}, "children": []}
>>> model = {"cls": "Sequential", "path": "", "config": {}, "children": [["0", linear], ["1", relu]]}
>>> graph, splits, notes = capture(model)
>>> [node.op for node in graph.nodes], graph.values["input"].shape, splits
(['Gemm', 'Relu'], (None, 3), {'0': {}})

Only a Sequential says how its modules are wired. Inside a class of the user's own the Sequentials still tell which of
their layers cross a Flatten, as long as what decides it lies between two of their modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neutral.errors import printable
from neutral.exporters.torch_builder import SPACE, Builder, Contradiction, Inexpressible
from neutral.exporters.torch_description import ODD, Module, chain_of, module_of
from neutral.exporters.torch_rules import add_module
from neutral.exporters.torch_splits import Seen, Splits, chain_splits, inner_splits
from neutral.schema.graph import Graph

Captured = tuple[Graph | None, Splits, list[str]]


def capture(modules: Mapping[str, Any]) -> Captured:
    """The graph (None if it cannot be told), the splits of the layers whose surroundings are certain, and notes."""
    root = module_of(modules)
    if root.cls != "Sequential":
        why = root.altered or f"{root.cls} is not a Sequential"
        return None, inner_splits(root.children), [f"{root.path or 'model'}: no graph, because {why}"]
    chain = list(chain_of(root))
    if not chain:
        return None, {}, ["model: no graph, because the Sequential is empty"]
    graph, reason = _graph(chain)
    splits = {**inner_splits(chain), **chain_splits(chain, _first_seen(graph), whole=True)}
    return graph, splits, [] if graph is not None else [reason]


_INPUTS: tuple[tuple[str, ...], ...] = (
    ("batch", "feature"),
    ("batch", "time", "feature"),
    *(("batch", "channel", *SPACE[n]) for n in (1, 2, 3)),
)
"""What the input of a chain may be, tried in this order: a Linear takes any number of axes, a Conv2d just one."""


def _graph(chain: Sequence[Module]) -> tuple[Graph | None, str]:
    reasons: list[tuple[int, str]] = []
    starts_with_tokens = chain[0].cls == "Embedding"
    for axes in (("batch", "time"),) if starts_with_tokens else _INPUTS:
        builder = Builder(axes, "int64" if starts_with_tokens else "float32", {module.path for module in chain})
        try:
            for module in chain:
                add_module(builder, module)
            return builder.graph(), ""
        except (Inexpressible, Contradiction) as reason:
            told = str(reason)
        except ODD:
            told = f"the settings of {builder.module.cls} are odd"
        reasons.append((len(builder.nodes), f"{printable(builder.module.path)}: no graph, because {printable(told)}"))
    # The input that went furthest is the likeliest.
    return None, max(reasons, key=lambda entry: entry[0])[1]


def _first_seen(graph: Graph | None) -> Seen:
    """What a whole model is given: as the graph found out, else a value of which nobody joined the axes."""
    if graph is None:
        return Seen("plain")
    value = graph.values[graph.inputs[0]]
    order = "image" if "channel" in value.axes else "plain"
    return Seen(order, value.shape[1] if value.shape else None, len(value.axes))
