"""The sizes that flow through a graph.

>>> from neutral.schema.graph import Graph, Node, Value
>>> image = Value(axes=("batch", "channel", "height", "width"))
>>> pool = Node(name="p", op="MaxPool", inputs=("x",), outputs=("y",), attributes={"kernel_shape": (2, 2), "strides": (2, 2)})
>>> graph = Graph(inputs=("x",), outputs=("y",), values={"x": image, "y": image}, nodes=(pool,))
>>> infer(graph, {}, {"x": (2, 3, 28, 28)})["y"]
(2, 3, 14, 14)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from neutral.errors import Problem, Refused
from neutral.schema.graph import Graph, Node
from neutral.schema.kinds import AnyLayer
from neutral.schema.layer_sizes import (
    conv_channels,
    crops,
    dense_sizes,
    directions,
    kernel,
    kernel_letters,
    per_axis,
    size,
    state_size,
    window,
)
from neutral.schema.node_settings import (
    Misfit,
    Shape,
    equation_terms,
    ints,
    merge_mode,
    pads_of,
    pool_pads,
    reshaped,
    resized,
    slices,
)

Rule = Callable[[Node, Any, Sequence[Shape]], Sequence[Shape]]


def _broadcast(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    try:
        return [tuple(np.broadcast_shapes(*ins))]
    except ValueError:
        raise Misfit(" and ".join(map(str, ins))) from None


def _keep(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    return [ins[0]]


def _need(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise Misfit(f"{found} {what} where the layer has {expected}")


def _gemm(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    taken, made = dense_sizes(layer)
    _need(ins[0][-1], taken, "features")
    return [(*ins[0][:-1], made)]


def _convolution(layer: Any, given: Shape) -> tuple[int, Shape, Shape, Shape]:
    """The channels that a convolution of either direction makes, its window, strides and dilation."""
    taken, made, _ = conv_channels(layer)
    k = window(layer)
    if len(given) != len(k) + 2:
        raise Misfit(f"{len(given)} axes for a kernel over {len(k)}")
    _need(given[1], taken, "channels")
    strides, dilation = per_axis(layer.strides, len(k), 1), per_axis(layer.dilation, len(k), 1)
    return made, k, strides, dilation


def _conv(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    made, k, strides, dilation = _convolution(layer, ins[0])
    spatial = []
    for i, n in enumerate(ins[0][2:]):
        if layer.padding in ("same", "same_lower", "causal"):
            spatial.append(-(-n // strides[i]))
        else:
            before, after = layer.padding[i] if layer.padding else (0, 0)
            spatial.append((n + before + after - dilation[i] * (k[i] - 1) - 1) // strides[i] + 1)
    return [(ins[0][0], made, *spatial)]


def _conv_transpose(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    made, k, strides, dilation = _convolution(layer, ins[0])
    pairs, extra = crops(layer)
    spatial = [
        (n - 1) * strides[i] + dilation[i] * (k[i] - 1) + 1 + extra[i] - sum(pairs[i]) for i, n in enumerate(ins[0][2:])
    ]
    return [(ins[0][0], made, *spatial)]


def _pool(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    rank = len(ins[0]) - 2
    k = ints(node, "kernel_shape") or ()
    strides, dilation = ints(node, "strides") or (1,) * rank, ints(node, "dilations") or (1,) * rank
    if not len(k) == len(strides) == len(dilation) == rank:
        raise Misfit(f"{len(ins[0])} axes for a window over {len(k)}")
    pads = pool_pads(node, rank)
    spatial = []
    for i, n in enumerate(ins[0][2:]):
        if isinstance(pads, str):
            spatial.append(-(-n // strides[i]))
            continue
        span = n + sum(pads[i]) - dilation[i] * (k[i] - 1) - 1
        made = span // strides[i] + 1
        if node.attributes.get("ceil_mode") and span >= 0:
            made = -(-span // strides[i]) + 1
            # A window that would start behind the input and the padding before it is dropped.
            made -= (made - 1) * strides[i] >= n + pads[i][0]
        spatial.append(made)
    return [(*ins[0][:2], *spatial)]


def _global_pool(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    return [(*ins[0][:2], *(1 for _ in ins[0][2:]))]


def _flatten(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    axis = int(node.attributes.get("axis", 1))  # type: ignore[arg-type]
    return [(math.prod(ins[0][:axis]), math.prod(ins[0][axis:]))]


def _reshape(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    return [reshaped(ins[0], ints(node, "shape") or ())]


def _transpose(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    perm = ints(node, "perm") or tuple(reversed(range(len(ins[0]))))
    if sorted(perm) != list(range(len(ins[0]))):
        raise Misfit(f"{len(ins[0])} axes in the order {perm}")
    return [tuple(ins[0][i] for i in perm)]


def _concat(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    axis = int(node.attributes["axis"]) % len(ins[0])  # type: ignore[arg-type]
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in ins}
    if len(rest) != 1:
        raise Misfit(" and ".join(map(str, ins)))
    return [(*ins[0][:axis], sum(shape[axis] for shape in ins), *ins[0][axis + 1 :])]


def _pad(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    pairs = pads_of(node, len(ins[0]))
    if node.attributes.get("mode") == "reflect" and any(max(p) >= n for p, n in zip(pairs, ins[0], strict=True)):
        raise Misfit(f"{ins[0]} reflected by {pairs}")
    return [tuple(n + before + after for n, (before, after) in zip(ins[0], pairs, strict=True))]


def _slice(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    return [tuple(len(range(*s.indices(n))) for n, s in zip(ins[0], slices(node, len(ins[0])), strict=True))]


def _squeeze(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    axes = {a % len(ins[0]) for a in ints(node, "axes") or ()}
    if any(ins[0][a] != 1 for a in axes):
        raise Misfit(f"{ins[0]} without its axes {sorted(axes)}")
    return [tuple(n for i, n in enumerate(ins[0]) if i not in axes)]


def _unsqueeze(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    axes = ints(node, "axes") or ()
    rank = len(ins[0]) + len(axes)
    wanted = {a % rank for a in axes}
    rest = iter(ins[0])
    return [tuple(1 if i in wanted else next(rest) for i in range(rank))]


def _expand(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    return _broadcast(node, layer, [ins[0], ints(node, "shape") or ()])


def _tile(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    repeats = ints(node, "repeats") or ()
    if len(repeats) != len(ins[0]):
        raise Misfit(f"{len(repeats)} repeats for {len(ins[0])} axes")
    return [tuple(n * r for n, r in zip(ins[0], repeats, strict=True))]


def _resize(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    return [(*ins[0][:2], *resized(node, ins[0][2:]))]


def _depth_to_space(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    block = int(node.attributes["blocksize"])  # type: ignore[arg-type]
    batch, channels, height, width = ins[0]
    if channels % (block * block):
        raise Misfit(f"{channels} channels in blocks of {block * block}")
    return [(batch, channels // (block * block), height * block, width * block)]


def _space_to_depth(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    block = int(node.attributes["blocksize"])  # type: ignore[arg-type]
    batch, channels, height, width = ins[0]
    if height % block or width % block:
        raise Misfit(f"{height} x {width} in blocks of {block}")
    return [(batch, channels * block * block, height // block, width // block)]


def _reduce(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    axes = {a % len(ins[0]) for a in ints(node, "axes") or tuple(range(len(ins[0])))}
    kept = node.attributes.get("keepdims", 1)
    return [tuple(1 if i in axes else n for i, n in enumerate(ins[0]) if kept or i not in axes)]


def _gather(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    return [(*ins[0], kernel(layer).shape[1])]


def _channel_norm(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    for parameter in layer.parameters.values() if layer is not None else ():
        if parameter.state is False and math.prod(parameter.shape) not in ins[0][1:]:
            raise Misfit(f"{ins[0]} for {math.prod(parameter.shape)} features")
    return [ins[0]]


def _last_axes_norm(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    scale = layer.parameters.get("scale") if layer is not None else None
    if scale is not None:
        # The one axis of a vector may be recorded as (channel position).
        rank = 1 if "position" in scale.axes else len(scale.shape)
        if math.prod(ins[0][-rank:]) != math.prod(scale.shape):
            raise Misfit(f"{ins[0]} for a scale of {scale.shape}")
    return [ins[0]]


def _recurrent(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    batch, time, features = ins[0]
    _need(features, size(kernel(layer), "in"), "features")
    made = state_size(layer)
    both = directions(layer) == 2
    mode = merge_mode(node, layer) if both else ""
    width = 2 * made if mode == "concat" else made
    out: Shape = (batch, time, width) if node.attributes.get("return_sequences") else (batch, width)
    outputs = [out, out] if mode == "none" else [out]
    if node.attributes.get("return_state"):
        cell = [(batch, size(kernel(layer), "unit"))] if layer.kind == "lstm" else []
        outputs += [(batch, made), *cell] * directions(layer)
    return outputs


def _attention(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    return [(*ins[0][:-1], layer.parameters["output_kernel"].shape[0])]


def _einsum(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    data, _, out = equation_terms(layer.equation)
    sizes = dict(zip(kernel_letters(layer), kernel(layer).shape, strict=True))
    extra = len(ins[0]) - len(data.replace("...", ""))
    if extra < 0 or (extra and "..." not in data):
        raise Misfit(f"{len(ins[0])} axes for {layer.equation}")
    stars = [f"*{i}" for i in range(extra)]
    for letter, n in zip(_letters(data, stars), ins[0], strict=True):
        if sizes.setdefault(letter, n) != n:
            raise Misfit(f"{ins[0]} for {layer.equation}")
    return [tuple(sizes[letter] for letter in _letters(out, stars))]


def _linear_einsum(node: Node, layer: Any, ins: Sequence[Shape], made: Sequence[int | None] | None) -> Sequence[Shape]:
    """An einsum that is a dense layer: the sizes of the axes it makes are those that the graph names."""
    data, _, out = equation_terms(str(node.attributes["equation"]))
    kept = len(ins[0]) - len([letter for letter in data.replace("...", "") if letter not in out])
    taken, units = dense_sizes(layer)
    _need(math.prod(ins[0][kept:]), taken, "features")
    sizes = [n for n in (made or ())[kept:] if n is not None]
    _need(math.prod(sizes), units, "features made")
    return [(*ins[0][:kept], *sizes)]


def _letters(term: str, stars: list[str]) -> list[str]:
    head, dots, tail = term.partition("...")
    return [*head, *(stars if dots else ()), *tail]


ELEMENTWISE = (
    "Abs", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "Cast", "LRN", "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
"""Operators whose output has the shape of their one input."""
BROADCAST = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "Sum")
RECURRENT = ("LSTM", "GRU", "RNN")

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _keep),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(RECURRENT, _recurrent),
    **dict.fromkeys(("BatchNormalization", "GroupNormalization", "InstanceNormalization"), _channel_norm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _last_axes_norm),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("GlobalMaxPool", "GlobalAveragePool"), _global_pool),
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"), _reduce),
    "Attention": _attention,
    "Concat": _concat,
    "Constant": lambda node, layer, ins: [()],
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "PRelu": _keep,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
NEEDS_LAYER = ("Attention", "Conv", "ConvTranspose", "Einsum", "Gather", "Gemm", "PRelu", *RECURRENT)


def infer(graph: Graph, layers: Mapping[str, AnyLayer], input_shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """The shape of every value, batch included; `Refused` names the node that cannot take what it is given."""
    shapes: dict[str, Shape] = {name: tuple(input_shapes[name]) for name in graph.inputs}
    for node in graph.nodes:
        ins = [shapes[name] for name in node.inputs]
        made = graph.values[node.outputs[0]].shape
        shapes.update(zip(node.outputs, _outputs(node, layers, ins, made), strict=True))
    return shapes


def _outputs(
    node: Node, layers: Mapping[str, AnyLayer], ins: Sequence[Shape], made: Sequence[int | None] | None
) -> Sequence[Shape]:
    rule = RULES.get(node.op)
    if rule is None:
        raise Refused(Problem(node.name, f"the operator {node.op}", "one that neutral can run"))
    layer = layers.get(node.layer) if node.layer is not None else None
    if layer is None and (node.layer is not None or node.op in NEEDS_LAYER):
        raise Refused(Problem(node.name, f"{node.op} of the layer {node.layer!r}", "a layer of the manifest"))
    try:
        if node.op == "Einsum" and layer is not None and layer.kind == "dense":
            outputs: Sequence[Shape] = _linear_einsum(node, layer, ins, made)
        else:
            outputs = rule(node, layer, ins)
    except (Misfit, ValueError, IndexError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, Misfit) else " and ".join(map(str, ins))
        raise Refused(Problem(node.name, reason, f"an input that {node.op} can take")) from None
    if any(n < 1 for shape in outputs for n in shape) or len(outputs) != len(node.outputs):
        sizes = " and ".join(map(str, outputs))
        raise Refused(Problem(node.name, f"{sizes} from {' and '.join(map(str, ins))}", "sizes above 0"))
    return outputs
