"""Operators with weights as Keras layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from neutral.importers.keras_activations import changed, number
from neutral.importers.keras_builder import Builder
from neutral.importers.keras_forms import (
    Inexpressible,
    channels_of,
    conv_padding,
    explicit_padding,
    form_of,
    kernel_of,
    kernel_sides,
    rest_of_padding,
)
from neutral.importers.keras_pooling import per_axis
from neutral.importers.keras_reshaping import bordered
from neutral.importers.keras_tensor import Config, KerasTensor, as_in_graph
from neutral.schema.graph import Node
from neutral.schema.kinds import (
    AnyLayer,
    Conv,
    ConvTranspose,
    Depthwise,
)
from neutral.schema.node_settings import equation_terms


def gemm(b: Builder, node: Node) -> list[KerasTensor]:
    layer, x = b.layer(node), b.only(node)
    form = form_of(layer, True)
    kernel = kernel_of(layer)
    cut = kernel_sides(kernel)[0]
    taken = channels_of(kernel.axes[cut:], kernel.shape[cut:])
    given = channels_of(kernel.axes[:cut], kernel.shape[:cut])
    if x.rank > 2:
        if x.perm[-1] != x.rank - 1:
            x = b.order(x, as_in_graph(x.rank))
        if taken or given:
            raise Inexpressible("a kernel recorded in channels, on a value that is no vector", "a vector")
        x = b.sized(x, math.prod(kernel.shape[cut:]))
        return [b.weigh(node, form, [x.json], b.like(node, x.perm, x))]
    x = b.vector(x, taken)
    like = replace(b.like(node, (0, 1), x), channels=given)
    like = replace(like, shape=(like.shape[0], form[1]["units"]))
    return [b.weigh(node, form, [x.json], like)]


def conv(b: Builder, node: Node) -> list[KerasTensor]:
    layer, x = b.layer(node), b.image(b.only(node))
    if not isinstance(layer, Conv | Depthwise):
        raise Inexpressible(f"a layer of kind {layer.kind}", "a convolution")
    cls, config = form_of(layer, True)
    name, like = b.name(node), b.like(node, x.perm, x)
    pairs = explicit_padding(layer)
    if pairs is not None and conv_padding(layer, True) is None:
        sizes = [None if n is None else n + sum(pair) for n, pair in zip(x.shape[2:], pairs, strict=True)]
        x = bordered(b, f"{name}.pad", "ZeroPadding", pairs, x, replace(x, shape=(*x.shape[:2], *sizes)))
    strides = config["strides"]
    apart = max(strides) > 1 and max(config["dilation_rate"]) > 1
    if not apart:
        return [b.weigh(node, (cls, config), [x.json], like)]
    # Keras has no convolution with both; one with stride 1, of which every n-th position is kept, is the same.
    if config["padding"] != "valid":
        raise Inexpressible("strides and dilation with 'same' padding", "explicit padding")
    config = {**config, "strides": [1] * len(strides)}
    dense = replace(like, shape=(*like.shape[:2], *(None,) * len(strides)))
    y = b.weigh(node, (cls, config), [x.json], dense)
    pick = {"pool_size": per_axis((1,) * len(strides)), "strides": per_axis(tuple(strides)), "padding": "valid"}
    return [b.add(f"{name}.pick", f"MaxPooling{len(strides)}D", pick, [y.json], like)]


def conv_transpose(b: Builder, node: Node) -> list[KerasTensor]:
    layer, x = b.layer(node), b.image(b.only(node))
    if not isinstance(layer, ConvTranspose):
        raise Inexpressible(f"a layer of kind {layer.kind}", "a transposed convolution")
    form = form_of(layer, True)
    like = b.like(node, x.perm, x)
    pairs = explicit_padding(layer)
    if pairs is None:
        return [b.weigh(node, form, [x.json], like)]
    crops = [(before, max(-rest, 0)) for (before, _), rest in zip(pairs, rest_of_padding(layer), strict=True)]
    if any(n < 0 for pair in pairs for n in pair):
        raise Inexpressible(f"padding {[list(pair) for pair in pairs]}", "padding of 0 or more")
    if not any(n for pair in crops for n in pair):
        return [b.weigh(node, form, [x.json], like)]
    whole = [None if n is None else n + sum(pair) for n, pair in zip(like.shape[2:], crops, strict=True)]
    y = b.weigh(node, form, [x.json], replace(like, shape=(*like.shape[:2], *whole)))
    return [bordered(b, f"{b.name(node)}.crop", "Cropping", crops, y, like)]


def gather(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.plain(b.only(node))
    form = form_of(b.layer(node), True)
    return [b.weigh(node, form, [x.json], replace(b.like(node, as_in_graph(x.rank + 1), x), dtype=b.dtype))]


def _unweighed(b: Builder, node: Node) -> AnyLayer | None:
    """The layer of a norm, or None if it has no weights and its settings stand in the node."""
    return None if node.layer is None else b.layer(node)


def channel_norm(b: Builder, node: Node) -> list[KerasTensor]:
    x, layer = b.only(node), _unweighed(b, node)
    if layer is None:
        if node.op == "BatchNormalization":
            raise Inexpressible("a batch norm without statistics", "a mean and a variance")
        groups = -1 if node.op == "InstanceNormalization" else int(number(node, "num_groups"))
        settings: dict[str, Any] = {
            "groups": groups,
            "epsilon": number(node, "epsilon"),
            "center": False,
            "scale": False,
        }
        x = b.image(x) if x.rank > 2 else b.vector(x, 0)
        return [b.add(b.name(node), "GroupNormalization", {"axis": -1, **settings}, [x.json], changed(x))]
    form = form_of(layer, True)
    x = b.image(x) if x.rank > 2 else b.vector(x, _recorded(layer))
    return [b.weigh(node, form, [x.json], changed(x))]


def _recorded(layer: AnyLayer) -> int:
    """The channels of a layer with one weight per element of a flattened image, else 0."""
    parameter = next((p for p in layer.parameters.values() if not p.state), None)
    return 0 if parameter is None else channels_of(parameter.axes, parameter.shape)


def last_norm(b: Builder, node: Node) -> list[KerasTensor]:
    x, layer = b.only(node), _unweighed(b, node)
    count = -int(number(node, "axis", -1))
    settings: Config
    if layer is None:
        if node.op == "RMSNormalization":
            raise Inexpressible("an RMS norm without a scale", "one with a scale")
        x = b.order(x, as_in_graph(x.rank)) if x.rank > 2 else x
        axis: int | list[int] = -1 if count == 1 else list(range(-count, 0))
        settings = {"axis": axis, "epsilon": number(node, "epsilon"), "center": False, "scale": False}
        return [b.add(b.name(node), "LayerNormalization", settings, [x.json], changed(x))]
    form = form_of(layer, True)
    if x.rank == 2:
        x = b.vector(x, _recorded(layer))
        return [b.weigh(node, form, [x.json], changed(x))]
    if form[1]["axis"] != -1 and len(form[1]["axis"]) > 2:  # over the whole image: the weights follow its axes
        if len(form[1]["axis"]) != x.rank - 1:
            raise Inexpressible(f"a norm over {len(form[1]['axis'])} axes of {x.rank}", "all but the batch axis")
        first, *rest = next(iter(layer.parameters.values())).shape
        x = b.pinned(b.image(x), [*rest, first])
        return [b.weigh(node, form, [x.json], changed(x))]
    if form[1]["axis"] != -1 or x.perm[-1] != x.rank - 1:
        x = b.order(x, as_in_graph(x.rank))
    weight = next(iter(layer.parameters.values()), None)
    if weight is not None:
        x = b.sized(x, *weight.shape)
    return [b.weigh(node, form, [x.json], changed(x))]


def prelu(b: Builder, node: Node) -> list[KerasTensor]:
    layer, x = b.layer(node), b.only(node)
    slope = layer.parameters["slope"]
    x = b.image(x) if x.rank > 2 else b.vector(x, _recorded(layer))
    if math.prod(slope.shape) == 1:
        shared: list[int] | None = list(range(1, x.rank))
    elif len(slope.shape) == 1:
        shared = list(range(1, x.rank - 1)) or None
    else:
        # Stored with channels in front, as the graph has them; Keras counts them as the last axis.
        one = [i for i, n in enumerate(slope.shape) if n == 1 and x.rank > 2 and x.shape[i + 1] != 1]
        shared = sorted(i or x.rank - 1 for i in one) or None
        if not shared and len(slope.shape) == x.rank - 1:
            x = b.pinned(x, [*slope.shape[1:], slope.shape[0]])
    made = b.weigh(node, ("PReLU", {"shared_axes": shared}), [x.json], changed(x))
    cls, config = b.forms[str(node.layer)]
    b.forms[str(node.layer)] = cls, {**config, "alpha_rank": x.rank - 1}
    return [made]


def recurrent(b: Builder, node: Node) -> list[KerasTensor]:
    layer = b.layer(node)
    cls, config = form_of(layer, True)
    x, *states = (b.plain(b.input(node, i)) for i in range(len(node.inputs)))
    x = b.sized(x, layer.parameters["input_kernel"].shape[-1])
    flags = {key: bool(node.attributes.get(key)) for key in ("return_sequences", "return_state")}
    if cls == "Bidirectional":
        inner = config["layer"]
        config = {**config, "layer": {**inner, "config": {**inner["config"], **flags}}}
        mode = node.attributes.get("merge_mode")
        if mode is not None:
            config["merge_mode"] = None if mode == "none" else mode
        config["layer"]["config"]["name"] = b.paths[str(node.layer)]
        if b.dtype != "float32":
            config["layer"]["config"]["dtype"] = b.dtype
    else:
        config = {**config, **flags}
    kwargs = {"initial_state": [state.json for state in states]} if states else {}
    ranks = [len(b.graph.values[output].axes) for output in node.outputs]
    first = b.weigh(node, (cls, config), [x.json], b.like(node, as_in_graph(ranks[0]), x), kwargs)
    name, index, _ = first.reference
    others = [
        replace(b.like(node, as_in_graph(rank), x, i), reference=(name, index, i))
        for i, rank in enumerate(ranks[1:], start=1)
    ]
    return [first, *others]


def attention(b: Builder, node: Node) -> list[KerasTensor]:
    tensors = [b.plain(b.input(node, i)) for i in range(len(node.inputs))]
    if len(tensors) not in (1, 3):
        raise Inexpressible(f"{len(tensors)} inputs", "a query, a key and a value")
    query, key, value = tensors * 3 if len(tensors) == 1 else tensors
    arguments = [query.json, value.json]  # Keras takes the value before the key
    if key != value:
        arguments.append(key.json)
    kwargs = {"use_causal_mask": True} if node.attributes.get("is_causal") else {}
    form = form_of(b.layer(node), True)
    if len(node.outputs) > 1:
        raise Inexpressible("attention scores as an output", "the result alone")
    return [b.weigh(node, form, arguments, b.like(node, (0, 1, 2), query), kwargs)]


def einsum(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.plain(b.only(node))
    cls, config = form_of(b.layer(node), True)
    shape = b.shape(node.outputs[0])
    bias = node.attributes.get("bias_axes")
    if "bias" in b.layer(node).parameters and not bias:
        raise Inexpressible("a bias whose axes are not known", "bias_axes", "export the model again")
    data, kernel, out = equation_terms(str(node.attributes["equation"]))
    if not (data + out).count("...") and data[:1] != out[:1]:
        raise Inexpressible(f"the equation {node.attributes['equation']}", "the batch in front on both sides")
    if cls == "EinsumDense":
        config = {**config, "output_shape": list(shape[1:]), "bias_axes": bias or None}
    else:
        # A dense layer in other words; Keras' Dense takes one axis and makes one.
        if len(kernel) != 2 or sum(letter in data for letter in kernel) != 1:
            raise Inexpressible(
                f"a dense layer of the equation {node.attributes['equation']}", "one over the last axis"
            )
    return [b.weigh(node, (cls, config), [x.json], b.like(node, as_in_graph(len(shape)), x))]
