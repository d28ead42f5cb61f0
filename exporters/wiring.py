"""Adds to a model what its own description says of how its layers are wired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from neutral.native import NativeModel
from neutral.schema.graph import Graph

Capture = Callable[[Mapping[str, Any]], tuple[Graph | None, dict[str, dict[str, int]], list[str]]]


def with_graph(model: NativeModel, described: Mapping[str, Any] | None, capture: Capture) -> NativeModel:
    """The model with the graph and the Flatten splits that `capture` finds in its description, if it has one."""
    if described is None:
        return model
    graph, splits, notes = capture(described)
    return replace(model, graph=graph, splits=splits, notes=(*model.notes, *notes))
