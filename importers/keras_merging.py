"""Operators that join tensors, as Keras layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from neutral.conventions.keras_onnx import MERGES
from neutral.errors import an
from neutral.importers.keras_activations import changed, number, scaled
from neutral.importers.keras_builder import Builder
from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_tensor import KerasTensor, channels_last
from neutral.schema.graph import Node

_MERGES = {op: cls for cls, op in MERGES.items()}


def merge(b: Builder, node: Node) -> list[KerasTensor]:
    if any(value in b.constants for value in node.inputs):
        return [_with_number(b, node)]
    tensors = [b.input(node, i) for i in range(len(node.inputs))]
    if len(tensors) == 1 and node.op in ("Max", "Min", "Mean"):
        return tensors
    if len({x.rank for x in tensors}) != 1:
        raise Inexpressible("inputs of different ranks", "inputs of one rank")
    if node.op not in _MERGES:
        raise Inexpressible(f"{an(node.op)} of two tensors")
    tensors = aligned(b, tensors)
    nonnegative = node.op != "Sub" and all(x.nonnegative for x in tensors)
    like = replace(b.like(node, tensors[0].perm, tensors[0]), channels=tensors[0].channels, nonnegative=nonnegative)
    return [b.add(b.name(node), _MERGES[node.op], {}, [[x.json for x in tensors]], like)]


def aligned(b: Builder, tensors: Sequence[KerasTensor]) -> list[KerasTensor]:
    rank = tensors[0].rank
    orders = {x.perm for x in tensors}
    perm = tensors[0].perm if len(orders) == 1 else channels_last(rank)
    moved = [b.order(x, perm) for x in tensors]
    channels = {x.channels for x in moved}
    return [b.vector(x, min(channels)) for x in moved] if len(channels) > 1 else moved


def _with_number(b: Builder, node: Node) -> KerasTensor:
    first = node.inputs[0] in b.constants
    x = b.input(node, int(first))
    value = b.constants[node.inputs[int(not first)]]
    if node.op == "Max" and value == 0:
        return b.add(b.name(node), "ReLU", {}, [x.json], changed(x, nonnegative=True))
    scale, offset = {
        "Add": (1.0, value),
        "Mul": (value, 0.0),
        "Sub": (-1.0, value) if first else (1.0, -value),
        "Div": (None, 0.0) if first or value == 0 else (1.0 / value, 0.0),
    }.get(node.op, (None, 0.0))
    if scale is None:
        raise Inexpressible(f"{an(node.op)} of a tensor and {value}")
    return scaled(b, b.name(node), x, scale, offset)


def concat(b: Builder, node: Node) -> list[KerasTensor]:
    tensors = [b.vector(b.input(node, i), 0) for i in range(len(node.inputs))]
    if len({x.rank for x in tensors}) != 1:
        raise Inexpressible("inputs of different ranks", "inputs of one rank")
    tensors = aligned(b, tensors)
    perm = tensors[0].perm
    place = perm.index(int(number(node, "axis")) % len(perm))
    like = replace(b.like(node, perm, tensors[0]), nonnegative=all(x.nonnegative for x in tensors))
    like = replace(like, told=all(x.told for x in tensors))
    if len(tensors) == 1:
        return tensors
    config = {"axis": -1 if place == len(perm) - 1 else place}
    return [b.add(b.name(node), "Concatenate", config, [[x.json for x in tensors]], like)]
