"""The sizes that flow through a graph, and inputs that fit it.

>>> from neutral.schema.graph import Graph, Node, Value
>>> image = Value(axes=("batch", "channel", "height", "width"))
>>> pool = Node(name="p", op="MaxPool", inputs=("x",), outputs=("y",), attributes={"kernel_shape": (2, 2), "strides": (2, 2)})
>>> graph = Graph(inputs=("x",), outputs=("y",), values={"x": image, "y": image}, nodes=(pool,))
>>> infer(graph, {}, {"x": (2, 3, 28, 28)})["y"]
(2, 3, 14, 14)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from neutral.errors import Problem, Refused
from neutral.schema.graph import Graph, Node, Value
from neutral.schema.kinds import AnyLayer, Parameter
from neutral.schema.manifest import Manifest

Shape = tuple[int, ...]
Rule = Callable[[Node, Any, Sequence[Shape]], Sequence[Shape]]

_SMALLEST = 8
"""Where the search for an unknown size starts: an image smaller than this is nothing but border."""
_LARGEST = 512
_LARGEST_PAIR = 48


class Misfit(Exception):
    """A shape that an operator cannot take."""


def kernel(layer: Any) -> Parameter:
    """The kernel of a layer, in whatever form the layer has it."""
    for role in ("kernel", "kernel_direction", "kernel_raw", "embedding", "input_kernel"):
        if role in layer.parameters:
            found: Parameter = layer.parameters[role]
            return found
    raise Refused(Problem(layer.path, f"a {layer.kind} without a kernel", "its kernel"))


def size(parameter: Parameter, axis: str) -> int:
    """The size of a named axis."""
    return parameter.shape[parameter.axes.index(axis)]


def dense_sizes(layer: Any) -> tuple[int, int]:
    """Input and output features of a dense layer, whose axes may be recorded in finer ones.

    Where neither `in` nor `out` is whole, both are (channel position), made ones first.
    """
    weight = kernel(layer)
    if "out" in weight.axes:
        made = size(weight, "out")
    elif "in" in weight.axes:
        made = math.prod(weight.shape) // max(size(weight, "in"), 1)
    else:
        made = math.prod(weight.shape[: len(weight.shape) // 2])
    return math.prod(weight.shape) // max(made, 1), made


def window(layer: Any) -> Shape:
    """The spatial sizes of a convolution's kernel."""
    weight = kernel(layer)
    named = [weight.axes.index(axis) for axis in ("in", "out") if axis in weight.axes]
    return weight.shape[1 + max(named) if named else 2 :]


def conv_channels(layer: Any) -> tuple[int, int, int]:
    """Input channels, output channels and groups of a convolution of any kind."""
    weight = kernel(layer)
    spatial = len(window(layer))
    head = weight.shape[: len(weight.shape) - spatial]
    if layer.kind == "conv_transpose":
        groups = layer.groups or 1
        return head[0], math.prod(head[1:]) * groups, groups
    made = math.prod(head[:-1])
    if layer.kind == "depthwise":
        groups = layer.groups or (head[0] if len(head) > 2 else None)
        if groups is None:
            raise Refused(
                Problem(layer.path, f"{made} output channels", "to know how many input channels they belong to")
            )
        return groups * head[-1], made, groups
    groups = layer.groups or 1
    return head[-1] * groups, made, groups


def per_axis(value: Sequence[int] | int | None, rank: int, default: int) -> Shape:
    """A setting that may be absent, or one number for all spatial axes."""
    if value is None:
        return (default,) * rank
    if isinstance(value, int):
        return (value,) * rank
    return tuple(value) * rank if len(value) == 1 else tuple(value)


def same_total(length: Any, window: int, stride: int, dilation: int) -> Any:
    """How much padding makes ceil(length / stride) windows, before it is clipped at 0."""
    return (-(-length // stride) - 1) * stride + (window - 1) * dilation + 1 - length


def crops(layer: Any) -> tuple[tuple[tuple[int, int], ...], Shape]:
    """What a transposed convolution cuts off (before, after) and adds at the end, per spatial axis."""
    sizes = window(layer)
    rank = len(sizes)
    strides, dilation = per_axis(layer.strides, rank, 1), per_axis(layer.dilation, rank, 1)
    extra = per_axis(layer.output_padding, rank, 0)
    if layer.padding is None:
        return ((0, 0),) * rank, extra
    if not isinstance(layer.padding, str):
        return tuple(layer.padding), extra
    if layer.padding == "causal":
        raise Refused(Problem(layer.path, "a causal transposed convolution", "padding 'same' or explicit pairs"))
    pairs, tail = [], []
    for k, s, d in zip(sizes, strides, dilation, strict=True):
        total = (k - 1) * d + 1 - s
        small, large = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
        pairs.append((small, large) if layer.padding == "same" else (large, small))
        tail.append(max(-total, 0))
    return tuple(pairs), tuple(tail)


def pads_of(node: Node, rank: int) -> tuple[tuple[int, int], ...]:
    """A Pad node's (before, after) for each of all `rank` axes."""
    flat = ints(node, "pads") or ()
    axes = ints(node, "axes") or tuple(range(rank))
    if len(flat) != 2 * len(axes):
        raise Misfit(f"{len(flat)} pads for {len(axes)} axes")
    pairs = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        pairs[axis] = (flat[i], flat[i + len(axes)])
    return tuple(pairs)


def pool_pads(node: Node, rank: int) -> tuple[tuple[int, int], ...] | str:
    """A pooling's explicit (before, after) per spatial axis, or its automatic rule."""
    auto = node.attributes.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return str(auto)
    flat = ints(node, "pads") or (0,) * (2 * rank)
    if len(flat) != 2 * rank:
        raise Misfit(f"{len(flat)} pads for {rank} spatial axes")
    return tuple((flat[i], flat[i + rank]) for i in range(rank))


def ints(node: Node, name: str) -> Shape | None:
    """An attribute that is a list of integers, or None where it is absent."""
    value = node.attributes.get(name)
    if value is None:
        return None
    if isinstance(value, int):
        return (value,)
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return tuple(int(v) for v in value)  # type: ignore[arg-type]
    raise Misfit(f"{name}={value!r}")


def slices(node: Node, rank: int) -> list[slice]:
    """A Slice node's ranges, one for each of all `rank` axes."""
    starts, ends = ints(node, "starts") or (), ints(node, "ends") or ()
    axes = ints(node, "axes") or tuple(range(len(starts)))
    steps = ints(node, "steps") or (1,) * len(starts)
    out = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise Misfit(f"a step of {step}")
        out[axis] = slice(start, end, step)
    return out


def scales_of(node: Node, rank: int) -> tuple[float, ...] | None:
    """A Resize node's factor for each spatial axis, or None where it names sizes instead."""
    scales = node.attributes.get("scales")
    if scales is None:
        return None
    if not isinstance(scales, tuple) or len(scales) not in (rank, rank - 2):
        raise Misfit(f"scales={scales!r} for {rank} axes")
    return tuple(float(s) for s in scales[-(rank - 2) :])  # type: ignore[arg-type]


def resized(node: Node, spatial: Shape) -> Shape:
    """The spatial sizes that a Resize node makes."""
    rank = len(spatial) + 2
    scales = scales_of(node, rank)
    if scales is not None:
        return tuple(math.floor(n * s) for n, s in zip(spatial, scales, strict=True))
    sizes = ints(node, "sizes") or ()
    if len(sizes) not in (rank, rank - 2):
        raise Misfit(f"sizes={sizes!r} for {rank} axes")
    return sizes[-(rank - 2) :]


def reshaped(shape: Sequence[int], wanted: Sequence[int]) -> Shape:
    """ONNX's Reshape of what follows the batch axis: 0 keeps a size, -1 takes what is left."""
    out = [shape[i + 1] if n == 0 and i + 1 < len(shape) else n for i, n in enumerate(wanted)]
    total = math.prod(shape[1:])
    if -1 in out:
        rest = math.prod(n for n in out if n != -1)
        if out.count(-1) > 1 or rest < 1 or total % rest:
            raise Misfit(f"{tuple(shape)} reshaped to {tuple(wanted)}")
        out[out.index(-1)] = total // rest
    if math.prod(out) != total or any(n < 0 for n in out):
        raise Misfit(f"{tuple(shape)} reshaped to {tuple(wanted)}")
    return (shape[0], *out)


def directions(layer: Any) -> int:
    """2 for a layer that runs both ways."""
    return 2 if "direction" in kernel(layer).axes else 1


def state_size(layer: Any) -> int:
    """The size of a recurrent layer's output in one direction."""
    projection = layer.parameters.get("projection")
    return size(projection, "hidden") if projection else size(kernel(layer), "unit")


def merge_mode(node: Node, layer: Any) -> str:
    """How the two directions of a layer become one output: the node's word, the layer's, or concat."""
    mode = node.attributes.get("merge_mode", layer.merge_mode)
    return "concat" if mode is None and "merge_mode" not in node.attributes else str(mode or "none").lower()


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


def _conv(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    taken, made, _ = conv_channels(layer)
    k = window(layer)
    if len(ins[0]) != len(k) + 2:
        raise Misfit(f"{len(ins[0])} axes for a kernel over {len(k)}")
    _need(ins[0][1], taken, "channels")
    strides, dilation = per_axis(layer.strides, len(k), 1), per_axis(layer.dilation, len(k), 1)
    spatial = []
    for i, n in enumerate(ins[0][2:]):
        if layer.padding in ("same", "same_lower", "causal"):
            spatial.append(-(-n // strides[i]))
        else:
            before, after = layer.padding[i] if layer.padding else (0, 0)
            spatial.append((n + before + after - dilation[i] * (k[i] - 1) - 1) // strides[i] + 1)
    return [(ins[0][0], made, *spatial)]


def _conv_transpose(node: Node, layer: Any, ins: Sequence[Shape]) -> list[Shape]:
    taken, made, _ = conv_channels(layer)
    k = window(layer)
    if len(ins[0]) != len(k) + 2:
        raise Misfit(f"{len(ins[0])} axes for a kernel over {len(k)}")
    _need(ins[0][1], taken, "channels")
    strides, dilation = per_axis(layer.strides, len(k), 1), per_axis(layer.dilation, len(k), 1)
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


def equation_terms(equation: str | None) -> tuple[str, str, str]:
    """Input, kernel and output of an einsum equation.

    >>> equation_terms("abc,cd->abd")
    ('abc', 'cd', 'abd')
    """
    try:
        left, out = (equation or "").replace(" ", "").split("->")
        data, weights = left.split(",")
    except ValueError:
        raise Misfit(f"the equation {equation!r}") from None
    return data, weights, out


def kernel_letters(layer: Any) -> str:
    """The letters of an einsum kernel in its canonical order: those of both sides, made ones, then taken ones."""
    data, weights, out = equation_terms(layer.equation)
    axes = kernel(layer).axes
    if sorted(axes) == sorted(weights):
        return "".join(axes)
    made = [letter for letter in out.replace("...", "") if letter in weights and letter not in data]
    taken = [letter for letter in data.replace("...", "") if letter in weights and letter not in out]
    return "".join([*(letter for letter in weights if letter not in made + taken), *made, *taken])


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


def solve_inputs(manifest: Manifest, batch: int = 2) -> dict[str, Shape]:
    """A shape for each input of the graph: its own sizes where known, else the first that fit all layers.

    All unknown sizes are tried as one number first (square images), then each on its own.
    """
    graph = _graph(manifest)
    layers = {layer.path: layer for layer in manifest.layers}
    known = {name: _known(graph.values[name], batch) for name in graph.inputs}
    holes = sum(n is None for shape in known.values() for n in shape)
    first: Refused | None = None
    for filling in _fillings(holes):
        shapes = _filled(known, filling)
        try:
            infer(graph, layers, shapes)
        except Refused as error:
            first = first or error
            continue
        return shapes
    assert first is not None
    if not holes:
        raise first
    reason = f"no size up to {_LARGEST} that all layers can take (with {_SMALLEST}: {first})"
    raise Refused(Problem(", ".join(graph.inputs), reason, "an input that fits", "name the input's shape"))


def _graph(manifest: Manifest) -> Graph:
    if manifest.graph is None:
        raise Refused(Problem("manifest", "no graph", "to know how the layers are wired"))
    return manifest.graph


def _known(value: Value, batch: int) -> tuple[int | None, ...]:
    shape = value.shape if value.shape is not None else (None,) * len(value.axes)
    return tuple(batch if i == 0 and n is None else n for i, n in enumerate(shape))


def _fillings(holes: int) -> Iterator[tuple[int, ...]]:
    if holes == 0:
        yield ()
        return
    sizes = [*range(_SMALLEST, _LARGEST + 1), *range(1, _SMALLEST)]
    for n in sizes:
        yield (n,) * holes
    if 2 <= holes <= 3:
        pair = range(1, _LARGEST_PAIR + 1) if holes == 2 else range(1, 17)
        yield from (filling for filling in product(pair, repeat=holes) if len(set(filling)) > 1)


def _filled(known: Mapping[str, tuple[int | None, ...]], filling: Sequence[int]) -> dict[str, Shape]:
    rest = iter(filling)
    return {name: tuple(next(rest) if n is None else n for n in shape) for name, shape in known.items()}


def token_limits(manifest: Manifest) -> dict[str, int]:
    """For each input that is looked up in tables: how many rows the smallest of them has."""
    graph = _graph(manifest)
    layers = {layer.path: layer for layer in manifest.layers}
    origin = {name: name for name in graph.inputs}
    limits: dict[str, int] = {}
    for node in graph.nodes:
        source = origin.get(node.inputs[0]) if node.inputs else None
        if source is None:
            continue
        if node.op == "Gather" and node.layer in layers:
            rows = kernel(layers[node.layer]).shape[0]
            limits[source] = min(rows, limits.get(source, rows))
        elif node.op in ("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice"):
            origin.update((name, source) for name in node.outputs)
    return limits


def example_inputs(manifest: Manifest, batch: int = 2, seed: int = 0) -> list[npt.NDArray[Any]]:
    """Random inputs that the graph can take, in the order of its inputs: equal for equal seeds."""
    graph = _graph(manifest)
    shapes, limits = solve_inputs(manifest, batch), token_limits(manifest)
    random = np.random.default_rng(seed)
    out: list[npt.NDArray[Any]] = []
    for name in graph.inputs:
        dtype = graph.values[name].dtype
        if name in limits:
            whole = np.dtype(dtype) if dtype.startswith(("int", "uint")) else np.dtype(np.int64)
            out.append(random.integers(0, max(limits[name], 1), shapes[name]).astype(whole))
        elif dtype.startswith(("int", "uint")):
            out.append(random.integers(0, 2, shapes[name]).astype(dtype))
        else:
            out.append(random.standard_normal(shapes[name]).astype(dtype if dtype == "float64" else np.float32))
    return out
