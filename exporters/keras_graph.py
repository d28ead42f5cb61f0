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
behind it?). They start favourably; what refutes one is written down in `_Decisions`, and the capture runs again.
Constants are `Constant` nodes (attribute `value_float`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from neutral.errors import printable
from neutral.schema.graph import Attribute, Graph, Node, Value

Splits = dict[str, dict[str, int]]
Shape = tuple[int | None, ...]
Config = Mapping[str, Any]
Reference = tuple[str, int, int]

_SPATIAL = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}
_TO_THE_END = (1 << 31) - 1
_MOST_NODES = 100_000
_DEEPEST = 64
_MOST_PASSES = 100


class _Unclear(Exception):
    """A layer that the graph cannot express; the message says why."""


class _Malformed(Exception):
    """A config that is no model."""


@dataclass(frozen=True)
class Flow:
    """A Keras tensor under way.

    `first`: the graph has its channel axis in front of the spatial ones. `channels`: it is a vector that the graph has
    in (channel position) order where Keras has (position channel). `origins` are the Flatten and Dense calls that could
    give it another order; a `fixed` one has its order from elsewhere. `trail` names the layers whose own vectors share
    this order. `pending` is the rank-3 model input it is, while nobody said whether that one is spatial. An `opaque`
    one comes from a layer that was not understood.
    """

    name: str
    shape: Shape | None
    first: bool = False
    channels: int = 0
    origins: frozenset[str] = frozenset()
    fixed: bool = True
    trail: frozenset[str] = frozenset()
    pending: str | None = None
    source: str | None = None
    masked: bool = False
    opaque: bool = False
    dtype: str = "float32"

    @property
    def dims(self) -> Shape:
        if self.shape is None:
            raise _Unclear("its input has an unknown shape")
        return self.shape

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def features(self) -> int:
        size = self.dims[-1] if self.rank > 1 else None
        if size is None:
            raise _Unclear("its input has an unknown number of features")
        return size


@dataclass
class _Decisions:
    """What earlier passes found out. `changed`: this pass found out more."""

    orders: dict[str, int] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    natures: dict[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    changed: bool = False

    def deny(self, origins: frozenset[str]) -> None:
        self.changed |= not origins <= self.denied
        self.denied |= origins

    def order(self, origins: frozenset[str], channels: int) -> None:
        for origin in origins:
            self.changed |= origin not in self.orders
            self.orders.setdefault(origin, channels)

    def nature(self, name: str, nature: str) -> None:
        self.changed |= name not in self.natures and nature == "spatial"
        self.natures.setdefault(name, nature)

    def token(self, name: str) -> None:
        self.changed |= name not in self.tokens
        self.tokens.add(name)


@dataclass(frozen=True)
class _Call:
    """One layer applied once."""

    cls: str
    name: str
    path: str
    config: Config
    inputs: tuple[Flow, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keras2: bool = False
    constants: tuple[Any, ...] = ()

    @property
    def x(self) -> Flow:
        if len(self.inputs) != 1:
            raise _Unclear(f"it has {len(self.inputs)} inputs")
        return self.inputs[0]

    def pair(self, key: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """A setting per spatial axis: an integer for all, or a list."""
        value = self.config.get(key, default)
        value = default if value is None else value
        sizes = (value,) * count if isinstance(value, int) else tuple(value or ())
        if len(sizes) != count or not all(isinstance(n, int) and n >= 0 for n in sizes):
            raise _Unclear(f"its {key} is {value!r}")
        return sizes

    def positive(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _Unclear(f"its {key} is {value!r}")
        return int(value)

    def flag(self, key: str) -> bool:
        return bool(self.config.get(key, False))


class _Builder:
    """One pass over a model: the nodes and values found so far."""

    def __init__(self, decisions: _Decisions, keras2: bool) -> None:
        self.decisions = decisions
        self.keras2 = keras2
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.inputs: list[str] = []
        self.notes: list[str] = []
        self.unclear = False
        self.splits: Splits = {}
        self.split_origins: dict[str, frozenset[str]] = {}
        self.undecided: set[str] = set()
        self._taken: set[str] = set()
        self._turned: dict[tuple[str, bool], str] = {}

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def problem(self, where: str, text: str) -> None:
        self.unclear = True
        self.note(printable(f"{where}: {text}; the archive has no graph"))

    def fresh(self, name: str) -> str:
        wanted, count = name or "node", 1
        while wanted in self._taken:
            wanted, count = f"{name}#{count}", count + 1
        self._taken.add(wanted)
        return wanted

    def describe(self, flow: Flow) -> None:
        shape = flow.dims
        if flow.first:
            shape = (shape[0], shape[-1], *shape[1:-1])
        self.values[flow.name] = Value(axes=_axes(flow), shape=shape, dtype=flow.dtype)

    def emit(
        self,
        name: str,
        op: str,
        inputs: Sequence[Flow],
        result: Flow,
        attributes: Mapping[str, Attribute] | None = None,
        layer: str | None = None,
    ) -> Flow:
        """A node of one output; `result` describes it (its name is replaced)."""
        return self.emit_many(name, op, inputs, [result], attributes, layer)[0]

    def emit_many(
        self,
        name: str,
        op: str,
        inputs: Sequence[Flow],
        results: Sequence[Flow],
        attributes: Mapping[str, Attribute] | None = None,
        layer: str | None = None,
    ) -> list[Flow]:
        if len(self.nodes) >= _MOST_NODES:
            raise _Malformed(f"a model of more than {_MOST_NODES} nodes")
        node = self.fresh(name)
        names = [node, *(self.fresh(f"{node}:{i}") for i in range(1, len(results)))]
        flows = [replace(r, name=n, pending=r.pending, source=None) for r, n in zip(results, names, strict=True)]
        if not any(flow.opaque for flow in (*inputs, *flows)):
            for flow in flows:
                self.describe(flow)
            self.nodes.append(
                Node(
                    name=node,
                    op=op,
                    layer=layer,
                    inputs=tuple(flow.name for flow in inputs),
                    outputs=tuple(names),
                    attributes=dict(attributes or {}),
                )
            )
        return flows

    def constant(self, name: str, value: float, dtype: str) -> Flow:
        scalar = Flow(name, (), dtype=dtype)
        return self.emit(f"{name}.constant", "Constant", [], scalar, {"value_float": float(value)})

    # How the order of a flow's axes is settled.

    def channels_first(self, flow: Flow) -> Flow:
        """The flow with the channel axis where ONNX's spatial operators expect it."""
        if flow.first:
            return flow
        if flow.pending is not None:
            self.decisions.nature(flow.pending, "spatial")
        return self._turn(flow, True)

    def as_is(self, flow: Flow) -> Flow:
        """The flow with its axes in Keras' order, a vector's elements too."""
        flow = self.ordered(flow)
        if flow.pending is not None:
            self.decisions.nature(flow.pending, "sequence")
        return self._turn(flow, False) if flow.first else replace(flow, pending=None)

    def ordered(self, flow: Flow) -> Flow:
        """The flow, refusing that a vector is in another order than in Keras."""
        if flow.channels:
            self.decisions.deny(flow.origins)
        return replace(flow, channels=0, origins=frozenset(), fixed=True)

    def _turn(self, flow: Flow, first: bool) -> Flow:
        rank = flow.rank
        known = self._turned.get((flow.name, first))
        turned = replace(flow, first=first, pending=None)
        if known is not None:
            return replace(turned, name=known)
        perm = (0, rank - 1, *range(1, rank - 1)) if first else (0, *range(2, rank), 1)
        result = self.emit(f"{flow.name}.transpose", "Transpose", [flow], turned, {"perm": perm})
        self._turned[flow.name, first] = result.name
        return result

    def restore(self, flow: Flow, like: Flow) -> Flow:
        """The flow in the order that another of the same rank has."""
        return flow if flow.first == like.first or flow.rank < 3 else self._turn(flow, like.first)

    # Layers whose vectors follow the order of a Flatten or Reshape.

    def split(self, path: str, flow: Flow, **axes: int) -> None:
        wanted = {axis: size for axis, size in axes.items() if size}
        known = self.splits.setdefault(path, wanted)
        if known != wanted:
            self.decisions.deny(flow.origins | self.split_origins.get(path, frozenset()))
        self.split_origins[path] = self.split_origins.get(path, frozenset()) | flow.origins
        if flow.opaque:
            self.undecided.add(path)

    def vector_layer(self, path: str, flow: Flow) -> Flow:
        """A layer with one weight per element of a vector: its weights take the vector's order."""
        self.split(path, flow, feature=flow.channels)
        return replace(flow, trail=flow.trail | {path}) if flow.shape is None or flow.rank == 2 else flow

    def taint(self, flow: Flow) -> None:
        """Something not understood uses the flow: nobody knows what its order means."""
        self.ordered(flow)
        self.undecided |= flow.trail

    def activate(self, call: _Call, flow: Flow, spec: Any) -> Flow:
        return _activation(self, f"{call.path}.activation", spec, flow, call.keras2)


def _axes(flow: Flow) -> tuple[str, ...]:
    rank = flow.rank
    spatial = _SPATIAL.get(rank - 2, tuple(f"axis{i}" for i in range(1, rank - 1)))
    if flow.first:
        return ("batch", "channel", *spatial)
    if rank == 2:
        return ("batch", "time" if flow.dtype.startswith(("int", "uint")) else "feature")
    if rank == 3:
        return ("batch", "time", "feature")
    return ("batch", *spatial, "channel") if rank > 3 else ("batch",)[:rank]


def _axis(flow: Flow, axis: Any) -> int:
    """Where the graph has an axis that Keras counts in its own order."""
    if not isinstance(axis, int) or not -flow.rank <= axis < flow.rank:
        raise _Unclear(f"its axis is {axis!r}")
    place = int(axis) % flow.rank
    if not flow.first or place == 0:
        return place
    return 1 if place == flow.rank - 1 else place + 1


def _product(sizes: Sequence[int | None]) -> int | None:
    known = [n for n in sizes if n is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _dtype_of(config: Config, default: str = "float32") -> str:
    spec = config.get("dtype")
    if isinstance(spec, Mapping):
        inner = spec.get("config")
        spec = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(spec, str):
        return default
    return spec.removeprefix("mixed_")


# Activations.

_ACTIVATIONS: dict[str, tuple[str, dict[str, Attribute]]] = {
    "relu": ("Relu", {}),
    "relu6": ("Clip", {"min": 0.0, "max": 6.0}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "elu": ("Elu", {"alpha": 1.0}),
    "celu": ("Celu", {"alpha": 1.0}),
    "selu": ("Selu", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "silu": ("Swish", {}),
    "swish": ("Swish", {}),
    "mish": ("Mish", {}),
    "hard_silu": ("HardSwish", {}),
    "hard_swish": ("HardSwish", {}),
    "hard_tanh": ("Clip", {"min": -1.0, "max": 1.0}),
    "hard_shrink": ("Shrink", {"lambd": 0.5, "bias": 0.0}),
    "soft_shrink": ("Shrink", {"lambd": 0.5, "bias": 0.5}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.2}),
    "exponential": ("Exp", {}),
}
_HARD_SIGMOID: dict[bool, dict[str, Attribute]] = {
    False: {"alpha": 1 / 6, "beta": 0.5},
    True: {"alpha": 0.2, "beta": 0.5},
}


def _activation(b: _Builder, name: str, spec: Any, flow: Flow, keras2: bool) -> Flow:
    """The node of an activation given by name, as a serialised function, or as a serialised layer."""
    if isinstance(spec, Mapping):
        config = spec.get("config")
        if isinstance(config, Mapping) and spec.get("class_name") in _ACTIVATION_LAYERS and not _foreign(spec):
            inner = _Call(str(spec["class_name"]), name, name, config, (flow,), keras2=keras2)
            return _one(_ACTIVATION_LAYERS[inner.cls](b, inner))
        plain = spec.get("class_name") == "function" and spec.get("module") in ("builtins", None)
        spec = config if plain and spec.get("registered_name") in (None, "function", config) else spec
    if spec is None or spec == "linear":
        return flow
    if spec in ("softmax", "log_softmax"):
        op = "Softmax" if spec == "softmax" else "LogSoftmax"
        return b.emit(name, op, [flow], flow, {"axis": _axis(flow, -1)}) if not flow.opaque else flow
    if spec == "hard_sigmoid":
        return b.emit(name, "HardSigmoid", [flow], flow, _HARD_SIGMOID[keras2])
    if spec == "log_sigmoid":
        for step, op in enumerate(("Neg", "Softplus", "Neg")):
            flow = b.emit(f"{name}.{step}" if step < 2 else name, op, [flow], flow)
        return flow
    if isinstance(spec, str) and spec in _ACTIVATIONS:
        op, attributes = _ACTIVATIONS[spec]
        return b.emit(name, op, [flow], flow, attributes)
    raise _Unclear(f"its activation is {str(spec)[:60]!r}")


def _float(call: _Call, *keys: str, default: float | None = None) -> float:
    for key in keys:
        if call.config.get(key) is not None:
            value = call.config[key]
            if isinstance(
                value, Mapping
            ):  # Keras 2 writes numpy scalars as {"class_name": "__ndarray__"/..., "value": x}
                value = value.get("value")
            return float(value)
    if default is None:
        raise _Unclear(f"it lacks {keys[0]}")
    return default


def _relu_layer(b: _Builder, call: _Call) -> list[Flow]:
    slope = _float(call, "negative_slope", default=0.0)
    threshold = _float(call, "threshold", default=0.0)
    limit = None if call.config.get("max_value") is None else _float(call, "max_value")
    flow = call.x
    if threshold and slope:
        raise _Unclear("it has a threshold and a slope")
    if threshold:
        if threshold < 0:
            raise _Unclear("its threshold is negative")
        name = call.path if limit is None else f"{call.path}.threshold"
        flow = b.emit(name, "ThresholdedRelu", [flow], flow, {"alpha": threshold})
    elif slope:
        name = call.path if limit is None else f"{call.path}.leaky"
        flow = b.emit(name, "LeakyRelu", [flow], flow, {"alpha": slope})
    elif limit is None:
        return [b.emit(call.path, "Relu", [flow], flow)]
    if limit is None:
        return [flow]
    bounds: dict[str, Attribute] = {"max": limit} if slope else {"min": 0.0, "max": limit}
    return [b.emit(call.path, "Clip", [flow], flow, bounds)]


def _softmax_layer(b: _Builder, call: _Call) -> list[Flow]:
    flow = call.inputs[0]
    if len(call.inputs) > 1 or flow.masked:
        raise _Unclear("it uses a mask")
    axis = call.config.get("axis", -1)
    if isinstance(axis, Sequence) and len(axis) == 1:
        axis = axis[0]
    if flow.opaque:
        return [flow]
    return [b.emit(call.path, "Softmax", [flow], flow, {"axis": _axis(flow, axis)})]


def _with_alpha(op: str, *keys: str, default: float) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        return [b.emit(call.path, op, [call.x], call.x, {"alpha": _float(call, *keys, default=default)})]

    return layer


def _activation_layer(b: _Builder, call: _Call) -> list[Flow]:
    flow = call.inputs[0]
    if len(call.inputs) != 1:
        raise _Unclear(f"it has {len(call.inputs)} inputs")
    if flow.masked and call.config.get("activation") == "softmax":
        raise _Unclear("it uses a mask")
    spec = call.config.get("activation")
    if spec in (None, "linear"):
        return [b.emit(call.path, "Identity", [flow], flow)]
    return [_activation(b, call.path, spec, flow, call.keras2)]


def _function_layer(spec: str) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        if call.constants or any(value not in (None, True) for value in call.config.values() if value != call.name):
            raise _Unclear("it has settings of its own")
        return [_activation(b, call.path, spec, call.x, False)]

    return layer


def _gelu_operation(b: _Builder, call: _Call) -> list[Flow]:
    approximate = call.arguments.get("approximate", call.config.get("approximate", True))
    attributes: dict[str, Attribute] = {"approximate": "tanh" if approximate else "none"}
    return [b.emit(call.path, "Gelu", [call.x], call.x, attributes)]


_ACTIVATION_LAYERS: dict[str, Callable[[_Builder, _Call], list[Flow]]] = {
    "Activation": _activation_layer,
    "ReLU": _relu_layer,
    "Softmax": _softmax_layer,
    "LeakyReLU": _with_alpha("LeakyRelu", "negative_slope", "alpha", default=0.3),
    "ELU": _with_alpha("Elu", "alpha", default=1.0),
    "ThresholdedReLU": _with_alpha("ThresholdedRelu", "theta", default=1.0),
}


# Layers that keep the shape.


def _identity(**settings: str) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        attributes: dict[str, Attribute] = {"origin": call.cls}
        for attribute, key in settings.items():
            if isinstance(call.config.get(key), int | float):
                attributes[attribute] = float(call.config[key])
        return [b.emit(call.path, "Identity", [call.x], call.x, attributes)]

    return layer


def _rescaling(b: _Builder, call: _Call) -> list[Flow]:
    flow = replace(call.x, dtype=_dtype_of(call.config, "float32"))
    if not call.x.dtype.startswith("float"):
        flow = b.emit(f"{call.path}.cast", "Cast", [call.x], flow, {"to": flow.dtype})
    scale, offset = call.config.get("scale", 1.0), call.config.get("offset", 0.0)
    if not isinstance(scale, int | float) or not isinstance(offset, int | float):
        raise _Unclear("its scale or offset is per channel")
    last = call.path if not offset else f"{call.path}.scale"
    flow = b.emit(last, "Mul", [flow, b.constant(f"{call.path}.scale", scale, flow.dtype)], flow)
    if offset:
        flow = b.emit(call.path, "Add", [flow, b.constant(f"{call.path}.offset", offset, flow.dtype)], flow)
    return [flow]


def _last_axis_only(call: _Call, flow: Flow, default: int = -1) -> None:
    axis = call.config.get("axis", default)
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    if len(axes) != 1 or axes[0] not in (-1, flow.rank - 1):
        raise _Unclear(f"its axis is {axis!r}")


def _channel_norm(op: str) -> Callable[[_Builder, _Call], list[Flow]]:
    """A layer with weights per channel, for which ONNX wants the channel axis second."""

    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow, kind, path = call.x, op, call.path
        if flow.shape is None or flow.opaque:
            b.vector_layer(path, flow)
            return [flow]
        attributes: dict[str, Attribute] = {}
        own: str | None = path
        if op != "PRelu":
            _last_axis_only(call, flow)
        if op == "GroupNormalization":
            flow = b.ordered(flow)
            groups = call.config.get("groups", 32)
            kind = "InstanceNormalization" if groups in (-1, flow.dims[-1]) else op
            if not any(bool(call.config.get(key, True)) for key in ("center", "scale")):
                own, attributes = None, {"epsilon": _float(call, "epsilon", default=1e-3)}
                attributes |= {"num_groups": groups} if kind == op else {}
        if flow.rank == 2:
            flow = b.vector_layer(path, flow)
            return [b.emit(path, kind, [flow], flow, attributes, layer=own)]
        b.split(path, flow)
        turned = flow if flow.first else b._turn(flow, True)
        pending = flow.pending
        result = b.emit(path, kind, [turned], replace(turned, pending=None), attributes, layer=own)
        return [replace(b.restore(result, flow), pending=pending)]

    return layer


def _last_norm(op: str) -> Callable[[_Builder, _Call], list[Flow]]:
    """A layer that normalises over the last axes, in Keras' order."""

    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = call.x
        if call.flag("rms_scaling"):
            raise _Unclear("it has rms_scaling")
        if flow.shape is None or flow.opaque:
            b.vector_layer(call.path, flow)
            return [flow]
        axis = call.config.get("axis", -1)
        axes = sorted(a % flow.rank for a in (axis if isinstance(axis, list | tuple) else [axis]))
        if not axes or axes != list(range(flow.rank - len(axes), flow.rank)) or axes[0] == 0:
            raise _Unclear(f"its axis is {axis!r}")
        attributes: dict[str, Attribute] = {"axis": -len(axes)}
        owned = op == "RMSNormalization" or any(bool(call.config.get(key, True)) for key in ("center", "scale"))
        if not owned:
            attributes["epsilon"] = _float(call, "epsilon", default=1e-3)
        if flow.rank == 2:
            flow = b.vector_layer(call.path, flow) if owned else flow
        elif len(axes) < 3:
            b.split(call.path, flow)
            flow = b.as_is(flow)
        elif len(axes) == flow.rank - 1:  # over the whole image: its weights have the axes of the image
            b.split(call.path, flow)
            flow = b.channels_first(flow)
        else:
            raise _Unclear(f"its axis is {axis!r}")
        return [b.emit(call.path, op, [flow], flow, attributes, layer=call.path if owned else None)]

    return layer


# Dense, embeddings, attention.


def _dense(b: _Builder, call: _Call) -> list[Flow]:
    units = call.positive("units")
    flow, key = call.x, f"dense:{call.path}"
    if flow.shape is not None and flow.rank > 2:
        flow = b.as_is(flow)
        b.split(call.path, flow)
        result = Flow("", (*flow.dims[:-1], units), trail=frozenset({call.path}), masked=flow.masked)
    else:
        order = 0 if key in b.decisions.denied else b.decisions.orders.get(key, 0)
        b.split(call.path, flow, **{"in": flow.channels, "out": order})
        shape = (None if flow.shape is None else flow.dims[0], units)
        result = Flow("", shape, channels=order, origins=frozenset({key}), fixed=False)
        result = replace(result, trail=frozenset({call.path}), masked=flow.masked)
    result = b.emit(call.path, "Gemm", [flow], replace(result, dtype=_compute(call, flow)), layer=call.path)
    return [b.activate(call, result, call.config.get("activation"))]


def _compute(call: _Call, flow: Flow) -> str:
    return _dtype_of(call.config, flow.dtype if flow.dtype.startswith("float") else "float32")


def _embedding(b: _Builder, call: _Call) -> list[Flow]:
    flow = call.x
    if not flow.dtype.startswith(("int", "uint")):
        if flow.source is not None:
            b.decisions.token(flow.source)
        else:
            flow = b.emit(f"{call.path}.cast", "Cast", [flow], replace(b.as_is(flow), dtype="int64"), {"to": "int64"})
    flow = b.as_is(flow)
    result = Flow("", (*flow.dims, call.positive("output_dim")), dtype=_dtype_of(call.config))
    result = replace(result, masked=call.flag("mask_zero"))
    return [b.emit(call.path, "Gather", [flow], result, layer=call.path)]


def _attention(b: _Builder, call: _Call) -> list[Flow]:
    for key in ("use_gate", "sliding_window"):
        if call.config.get(key):
            raise _Unclear(f"it has {key}")
    if call.config.get("attention_axes") not in (None, [1], (1,)):
        raise _Unclear(f"its attention_axes are {call.config.get('attention_axes')!r}")
    given = dict(zip(("query", "value", "key"), call.inputs, strict=False))
    attributes: dict[str, Attribute] = {}
    for key, value in call.arguments.items():
        if key in ("query", "value", "key") and isinstance(value, Flow):
            given[key] = value
        elif key == "use_causal_mask" and value is True:
            attributes["is_causal"] = 1
        elif value not in (None, False):
            raise _Unclear(f"it is called with {key}")
    if not {"query", "value"} <= set(given) or len(call.inputs) > 3:
        raise _Unclear("it is called without a query and a value")
    if any(flow.masked for flow in given.values()):
        raise _Unclear("it uses a mask")
    query, value = b.as_is(given["query"]), b.as_is(given["value"])
    key_flow = b.as_is(given["key"]) if "key" in given else value
    if {query.rank, value.rank, key_flow.rank} != {3}:
        raise _Unclear("its inputs are not of rank 3")
    size = call.config.get("output_shape")
    size = size[0] if isinstance(size, list | tuple) and len(size) == 1 else size
    size = query.features if size is None else size
    if not isinstance(size, int):
        raise _Unclear(f"its output_shape is {size!r}")
    result = Flow("", (*query.dims[:2], size), dtype=query.dtype)
    names = {flow.name for flow in (query, value, key_flow)}
    inputs = [query] if len(names) == 1 else [query, key_flow, value]
    return [b.emit(call.path, "Attention", inputs, result, attributes, layer=call.path)]


def _einsum_dense(b: _Builder, call: _Call) -> list[Flow]:
    flow = b.as_is(call.x)
    equation = call.config.get("equation")
    if not isinstance(equation, str) or equation.count("->") != 1 or equation.count(",") != 1:
        raise _Unclear(f"its equation is {equation!r}")
    equation = equation.replace(" ", "")
    operands, output = equation.split("->")
    given, kernel = operands.split(",")
    wanted = call.config.get("output_shape")
    sizes = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    shape = _einsum_shape(given, output, flow.dims, sizes)
    result = Flow("", shape, dtype=flow.dtype, masked=flow.masked)
    bias = str(call.config.get("bias_axes") or "")
    joined = _dense_like(given.replace("...", ""), kernel, output.replace("...", ""), bias)
    if joined is None:
        attributes: dict[str, Attribute] = {"equation": equation, "bias_axes": bias}
        result = b.emit(call.path, "Einsum", [flow], result, attributes, layer=call.path)
    else:
        result = _einsum_as_dense(b, call, flow, result, *joined)
    return [b.activate(call, result, call.config.get("activation"))]


def _dense_like(given: str, kernel: str, output: str, bias: str) -> tuple[int, int] | None:
    """How many axes an einsum sums and makes, if it is a dense layer on the last axes; else None."""
    made = [c for c in output if c in kernel and c not in given]
    summed = [c for c in given if c in kernel and c not in output]
    if set(kernel) - set(made) - set(summed) or len(set(kernel)) != len(kernel) or not summed or not made:
        return None
    ends = given.endswith("".join(summed)) and output.endswith("".join(made))
    rest = given[: len(given) - len(summed)] == output[: len(output) - len(made)]
    return (len(summed), len(made)) if ends and rest and (not bias or list(bias) == made) else None


def _einsum_as_dense(b: _Builder, call: _Call, flow: Flow, result: Flow, summed: int, made: int) -> Flow:
    """A Gemm over the last axes as one."""
    b.split(call.path, flow)
    if summed > 1:
        dims = (*flow.dims[: flow.rank - summed], _product(flow.dims[flow.rank - summed :]))
        target = tuple(-1 if n is None else n for n in dims[1:])
        flow = b.emit(f"{call.path}.join", "Reshape", [flow], replace(flow, shape=dims), {"shape": target})
    dims = (*result.dims[: result.rank - made], _product(result.dims[result.rank - made :]))
    joined = b.emit(call.path, "Gemm", [flow], replace(result, shape=dims), layer=call.path)
    if made == 1:
        return joined
    target = tuple(-1 if n is None else n for n in result.dims[1:])
    return b.emit(f"{call.path}.split", "Reshape", [joined], result, {"shape": target})


def _einsum_shape(letters: str, output: str, shape: Shape, wanted: list[int | None]) -> Shape:
    known: dict[str, int | None] = {}
    middle: Shape = ()
    if "..." in letters:
        before, after = letters.split("...")
        middle = shape[len(before) : len(shape) - len(after)]
        known.update(zip(after, shape[len(shape) - len(after) :], strict=True))
        letters = before
    known.update(zip(letters, shape, strict="..." not in output))
    head, _, tail = output.partition("...") if "..." in output else ("", "", output)
    ends = dict(zip(reversed(output.replace("...", "")), reversed(wanted), strict=False))
    sizes = {c: known[c] if c in known else ends.get(c) for c in head + tail}
    if "..." in output:
        return (*(sizes[c] for c in head), *middle, *(sizes[c] for c in tail))
    return tuple(sizes[c] for c in tail)


# Convolutions and pooling.


def _window(n: int | None, k: int, s: int, d: int, padding: str) -> int | None:
    if n is None:
        return None
    if padding in ("same", "causal"):
        return -(-n // s)
    size = (n - d * (k - 1) - 1) // s + 1
    if size < 1:
        raise _Unclear(f"its window does not fit into {n} positions")
    return size


def _spatial(b: _Builder, call: _Call, rank: int) -> Flow:
    """The input of a layer that works on `rank` spatial axes."""
    if call.config.get("data_format") == "channels_first":
        raise _Unclear("it has channels first")
    flow = b.ordered(call.x)
    if flow.rank != rank + 2:
        raise _Unclear(f"its input has rank {flow.rank}")
    return b.channels_first(flow)


def _padding(call: _Call, *allowed: str) -> str:
    padding = call.config.get("padding", "valid")
    if padding not in allowed:
        raise _Unclear(f"its padding is {padding!r}")
    return str(padding)


def _sizes(call: _Call, flow: Flow, rank: int, padding: str) -> Shape:
    kernel, strides = call.pair("kernel_size", rank), call.pair("strides", rank, 1)
    dilation = call.pair("dilation_rate", rank, 1)
    return tuple(
        _window(n, k, max(s, 1), d, padding)
        for n, k, s, d in zip(flow.dims[1:-1], kernel, strides, dilation, strict=True)
    )


def _conv(rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        sizes = _sizes(call, flow, rank, _padding(call, "valid", "same", "causal"))
        result = Flow("", (flow.dims[0], *sizes, call.positive("filters")), True, dtype=_compute(call, flow))
        result = b.emit(call.path, "Conv", [flow], result, layer=call.path)
        return [b.activate(call, result, call.config.get("activation"))]

    return layer


def _depthwise(rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        sizes = _sizes(call, flow, rank, _padding(call, "valid", "same"))
        channels = flow.features * call.positive("depth_multiplier")
        result = Flow("", (flow.dims[0], *sizes, channels), True, dtype=_compute(call, flow))
        result = b.emit(call.path, "Conv", [flow], result, layer=call.path)
        return [b.activate(call, result, call.config.get("activation"))]

    return layer


def _separable(rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        sizes = _sizes(call, flow, rank, _padding(call, "valid", "same", "causal"))
        middle = Flow("", (flow.dims[0], *sizes, flow.features * call.positive("depth_multiplier")), True)
        middle = replace(middle, dtype=_compute(call, flow))
        depthwise, pointwise = f"{call.path}.depthwise", f"{call.path}.pointwise"
        middle = b.emit(depthwise, "Conv", [flow], middle, layer=depthwise)
        result = replace(middle, shape=(*middle.dims[:-1], call.positive("filters")))
        result = b.emit(pointwise, "Conv", [middle], result, layer=pointwise)
        return [b.activate(call, result, call.config.get("activation"))]

    return layer


def _conv_transpose(rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        padding = _padding(call, "valid", "same")
        kernel, strides = call.pair("kernel_size", rank), call.pair("strides", rank, 1)
        dilation = call.pair("dilation_rate", rank, 1)
        extra: Sequence[int | None] = [None] * rank
        if call.config.get("output_padding") is not None:
            extra = call.pair("output_padding", rank)
        sizes: list[int | None] = []
        for n, k, s, d, o in zip(flow.dims[1:-1], kernel, strides, dilation, extra, strict=True):
            span = d * (k - 1) + 1
            if n is None:
                sizes.append(None)
            elif padding == "same":
                sizes.append(n * s if o is None else (n - 1) * s + span % 2 + o)
            else:
                sizes.append((n - 1) * s + span + (max(s - span, 0) if o is None else o))
        result = Flow("", (flow.dims[0], *sizes, call.positive("filters")), True, dtype=_compute(call, flow))
        result = b.emit(call.path, "ConvTranspose", [flow], result, layer=call.path)
        return [b.activate(call, result, call.config.get("activation"))]

    return layer


def _pool(op: str, rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        padding = _padding(call, "valid", "same")
        size = call.pair("pool_size", rank, 2)
        strides = call.pair("strides", rank) if call.config.get("strides") is not None else size
        sizes = [_window(n, k, max(s, 1), 1, padding) for n, k, s in zip(flow.dims[1:-1], size, strides, strict=True)]
        attributes: dict[str, Attribute] = {"kernel_shape": size, "strides": strides, "ceil_mode": 0}
        if padding == "same":
            attributes["auto_pad"] = "SAME_UPPER"
        else:
            attributes["pads"] = (0,) * (2 * rank)
        if op == "AveragePool":
            attributes["count_include_pad"] = 0
        result = replace(flow, shape=(flow.dims[0], *sizes, flow.dims[-1]), masked=False)
        return [b.emit(call.path, op, [flow], result, attributes)]

    return layer


def _global_pool(op: str, rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        if call.x.masked and op == "GlobalAveragePool":
            raise _Unclear("it uses a mask")
        flow = _spatial(b, call, rank)
        pooled = replace(flow, shape=(flow.dims[0], *(1,) * rank, flow.dims[-1]), masked=False)
        if call.flag("keepdims"):
            return [b.emit(call.path, op, [flow], pooled)]
        pooled = b.emit(f"{call.path}.pool", op, [flow], pooled)
        return [b.emit(call.path, "Flatten", [pooled], _vector(pooled, pooled.dims[-1]), {"axis": 1})]

    return layer


def _vector(flow: Flow, size: int | None) -> Flow:
    return Flow("", (flow.dims[0], size), dtype=flow.dtype)


def _borders(call: _Call, key: str, rank: int) -> list[tuple[int, int]]:
    value = call.config.get(key, 1)
    if isinstance(value, int):
        value = [value] * rank if rank > 1 else [[value, value]]
    if rank == 1 and len(value) == 2 and all(isinstance(n, int) for n in value):
        value = [value]
    pairs = [(n, n) if isinstance(n, int) else tuple(n) for n in value]
    if len(pairs) != rank or not all(len(p) == 2 and all(isinstance(n, int) and n >= 0 for n in p) for p in pairs):
        raise _Unclear(f"its {key} is {value!r}")
    return [(p[0], p[1]) for p in pairs]


def _zero_padding(rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        pairs = _borders(call, "padding", rank)
        sizes = [None if n is None else n + p + q for n, (p, q) in zip(flow.dims[1:-1], pairs, strict=True)]
        pads = (0, 0, *(p for p, _ in pairs), 0, 0, *(q for _, q in pairs))
        result = replace(flow, shape=(flow.dims[0], *sizes, flow.dims[-1]), masked=False)
        return [b.emit(call.path, "Pad", [flow], result, {"mode": "constant", "pads": pads, "value": 0.0})]

    return layer


def _cropping(rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        pairs = _borders(call, "cropping", rank)
        sizes = [None if n is None else n - p - q for n, (p, q) in zip(flow.dims[1:-1], pairs, strict=True)]
        if any(n is not None and n < 1 for n in sizes):
            raise _Unclear("it leaves nothing")
        attributes: dict[str, Attribute] = {
            "axes": tuple(range(2, rank + 2)),
            "starts": tuple(p for p, _ in pairs),
            "ends": tuple(-q if q else _TO_THE_END for _, q in pairs),
        }
        result = replace(flow, shape=(flow.dims[0], *sizes, flow.dims[-1]), masked=False)
        return [b.emit(call.path, "Slice", [flow], result, attributes)]

    return layer


_RESIZE: dict[str, dict[str, Attribute]] = {
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
}


def _upsampling(rank: int) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        flow = _spatial(b, call, rank)
        factors = call.pair("size", rank, 2)
        mode = call.config.get("interpolation", "nearest")
        if mode not in _RESIZE:
            raise _Unclear(f"its interpolation is {mode!r}")
        sizes = [None if n is None else n * f for n, f in zip(flow.dims[1:-1], factors, strict=True)]
        result = replace(flow, shape=(flow.dims[0], *sizes, flow.dims[-1]), masked=False)
        attributes: dict[str, Attribute] = {**_RESIZE[mode], "scales": (1.0, 1.0, *(float(f) for f in factors))}
        return [b.emit(call.path, "Resize", [flow], result, attributes)]

    return layer


# Layers that rearrange.


def _flatten(b: _Builder, call: _Call) -> list[Flow]:
    flow = call.x
    if call.config.get("data_format") == "channels_first":
        raise _Unclear("it has channels first")
    if flow.opaque or flow.shape is None:
        return [replace(flow, shape=None if flow.shape is None else (flow.dims[0], _product(flow.dims[1:])))]
    if flow.rank == 1:
        raise _Unclear("its input has no axis but the batch")
    if flow.rank == 2:
        return [b.emit(call.path, "Flatten", [flow], flow, {"axis": 1})]
    return [_to_vector(b, call.path, flow, "Flatten", {"axis": 1})]


def _to_vector(b: _Builder, path: str, flow: Flow, op: str, attributes: dict[str, Attribute]) -> Flow:
    """A Flatten. The permutation of an image is left to the layers behind it, where they can take it."""
    positions, channels = _product(flow.dims[1:-1]), flow.dims[-1]
    size = None if positions is None or channels is None else positions * channels
    key = f"flatten:{path}"
    result = _vector(flow, size)
    if flow.first and 1 not in (positions, channels):
        if key in b.decisions.denied or channels is None:
            flow = b.as_is(flow)
        else:
            result = replace(result, channels=channels, origins=frozenset({key}), fixed=False)
    if not flow.first:
        flow = b.as_is(flow)
    return b.emit(path, op, [flow], result, attributes)


def _target_shape(call: _Call, flow: Flow) -> Shape:
    target = call.config.get("target_shape")
    if (
        not isinstance(target, list | tuple)
        or not all(isinstance(n, int) for n in target)
        or list(target).count(-1) > 1
    ):
        raise _Unclear(f"its target_shape is {target!r}")
    total, known = _product(flow.dims[1:]), math.prod(n for n in target if n != -1)
    if total is not None and (known == 0 or total % known or (-1 not in target and total != known)):
        raise _Unclear(f"its target_shape {target!r} does not fit {list(flow.dims[1:])!r}")
    inferred = None if total is None else total // known
    return (flow.dims[0], *(inferred if n == -1 else n for n in target))


def _reshape(b: _Builder, call: _Call) -> list[Flow]:
    flow = call.x
    if flow.opaque:
        return [replace(flow, shape=None)]
    shape = _target_shape(call, flow)
    wanted = tuple(-1 if n is None else n for n in shape[1:])
    if len(shape) == 2 and flow.rank > 2:
        return [_to_vector(b, call.path, flow, "Reshape", {"shape": wanted})]
    if flow.rank == 2 and len(shape) in (4, 5) and shape[-1] is not None:
        positions, channels = _product(shape[1:-1]), shape[-1]
        if flow.channels == channels or 1 in (positions, channels):
            flow = flow if flow.channels == channels else b.ordered(flow)
            result = Flow("", shape, True, dtype=flow.dtype)
            return [b.emit(call.path, "Reshape", [flow], result, {"shape": (wanted[-1], *wanted[:-1])})]
        if not flow.channels and not flow.fixed and not flow.origins & b.decisions.denied:
            b.decisions.order(flow.origins, channels)
    flow = b.as_is(flow)
    return [b.emit(call.path, "Reshape", [flow], Flow("", shape, dtype=flow.dtype), {"shape": wanted})]


def _permute(b: _Builder, call: _Call) -> list[Flow]:
    dims = call.config.get("dims")
    flow = b.ordered(call.x)
    if not isinstance(dims, list | tuple) or sorted(dims) != list(range(1, flow.rank)):
        raise _Unclear(f"its dims are {dims!r}")
    if flow.pending is not None:
        b.decisions.nature(flow.pending, "sequence")
    perm = (0, *dims)
    graph_perm = tuple(_axis(flow, axis) for axis in perm)
    result = Flow("", tuple(flow.dims[axis] for axis in perm), dtype=flow.dtype)
    return [b.emit(call.path, "Transpose", [flow], result, {"perm": graph_perm})]


def _repeat_vector(b: _Builder, call: _Call) -> list[Flow]:
    flow, count = b.as_is(call.x), call.positive("n")
    if flow.rank != 2:
        raise _Unclear(f"its input has rank {flow.rank}")
    batch, size = flow.dims
    once = Flow("", (batch, 1, size), dtype=flow.dtype)
    once = b.emit(f"{call.path}.unsqueeze", "Unsqueeze", [flow], once, {"axes": (1,)})
    result = replace(once, shape=(batch, count, size))
    return [b.emit(call.path, "Expand", [once], result, {"shape": (1, count, 1)})]


# Layers of several inputs.


def _merged(b: _Builder, flows: Sequence[Flow]) -> list[Flow]:
    """Flows brought to one order of axes, that of an image if there is one."""
    if len({flow.rank for flow in flows}) > 1:
        raise _Unclear("its inputs have different ranks")
    if flows[0].rank >= 3:
        if any(flow.first for flow in flows):
            return [b.channels_first(b.ordered(flow)) for flow in flows]
        pending = {flow.pending for flow in flows}
        return list(flows) if len(pending) == 1 else [b.as_is(flow) for flow in flows]
    if len({flow.channels for flow in flows}) > 1:
        return [b.ordered(flow) for flow in flows]
    return list(flows)


def _broadcast(flows: Sequence[Flow]) -> Shape:
    shape: list[int | None] = []
    for sizes in zip(*(flow.dims for flow in flows), strict=True):
        wide = {n for n in sizes if n != 1}
        if len(wide - {None}) > 1:
            raise _Unclear(f"its inputs do not fit: {[list(flow.dims) for flow in flows]}")
        shape.append(1 if not wide else next(iter(wide - {None}), None))
    return tuple(shape)


def _joined(flows: Sequence[Flow], shape: Shape) -> Flow:
    return replace(
        flows[0],
        shape=shape,
        origins=frozenset().union(*(flow.origins for flow in flows)),
        trail=frozenset().union(*(flow.trail for flow in flows)),
        fixed=any(flow.fixed for flow in flows),
        masked=any(flow.masked for flow in flows),
        opaque=any(flow.opaque for flow in flows),
    )


def _merge(op: str) -> Callable[[_Builder, _Call], list[Flow]]:
    def layer(b: _Builder, call: _Call) -> list[Flow]:
        if len(call.inputs) < (2 if op == "Sub" else 1) or (op == "Sub" and len(call.inputs) != 2):
            raise _Unclear(f"it has {len(call.inputs)} inputs")
        if any(flow.opaque for flow in call.inputs):
            return [_opaque_join(b, call.inputs)]
        flows = _merged(b, call.inputs)
        shape = _broadcast(flows)
        if flows[0].rank == 2 and any(flow.dims[1] != shape[1] for flow in flows):
            flows = [b.ordered(flow) for flow in flows]
        result = _joined(flows, shape)
        if op in ("Max", "Min", "Mean") or len(flows) <= 2:
            return [b.emit(call.path, op if len(flows) > 1 else "Identity", flows, result)]
        total = flows[0]
        for i, flow in enumerate(flows[1:], start=1):
            name = call.path if i == len(flows) - 1 else f"{call.path}.{i}"
            total = b.emit(name, op, [total, flow], replace(result, shape=_broadcast([total, flow])))
        return [total]

    return layer


def _opaque_join(b: _Builder, flows: Sequence[Flow]) -> Flow:
    for flow in flows:
        b.taint(flow)
    shapes = {flow.shape for flow in flows}
    return Flow("", shapes.pop() if len(shapes) == 1 else None, opaque=True)


def _concatenate(b: _Builder, call: _Call) -> list[Flow]:
    if any(flow.opaque for flow in call.inputs):
        return [_opaque_join(b, call.inputs)]
    if not call.inputs:
        raise _Unclear("it has no inputs")
    flows = _merged(b, [b.ordered(flow) for flow in call.inputs])
    axis = call.config.get("axis", -1)
    where = _axis(flows[0], axis)
    sizes = [flow.dims[axis] for flow in flows]
    total = None if any(n is None for n in sizes) else sum(n for n in sizes if n is not None)
    shape = list(_broadcast([replace(flow, shape=_without(flow.dims, axis)) for flow in flows]))
    shape[axis] = total
    result = replace(_joined(flows, tuple(shape)), origins=frozenset(), fixed=True)
    return [b.emit(call.path, "Concat", flows, result, {"axis": where})]


def _without(shape: Shape, axis: int) -> Shape:
    kept = list(shape)
    kept[axis] = 1
    return tuple(kept)


def _operation(op: str) -> Callable[[_Builder, _Call], list[Flow]]:
    """Arithmetic on tensors written with `+` and the like: two tensors, or a tensor and a number."""
    merge = _merge(op)

    def layer(b: _Builder, call: _Call) -> list[Flow]:
        numbers = [value for value in call.constants if isinstance(value, int | float)]
        if len(call.inputs) == 2 and not call.constants:
            if op != "Div":
                return merge(b, call)
        elif len(call.inputs) == 1 and len(call.constants) == 2 and len(numbers) == 1:
            flow = call.x
            if not flow.dtype.startswith(("float", "bfloat")):
                raise _Unclear("it computes with integers")
            number = b.constant(call.path, numbers[0], flow.dtype)
            inputs = [flow if value is None else number for value in call.constants]
            return [b.emit(call.path, op, inputs, flow)]
        raise _Unclear("it is called with something else than tensors and a number")

    return layer


# Recurrent layers.

_RECURRENT = {"LSTM": ("LSTM", 2), "GRU": ("GRU", 1), "SimpleRNN": ("RNN", 1)}
_CELLS = {"LSTMCell": "LSTM", "GRUCell": "GRU", "SimpleRNNCell": "SimpleRNN"}


def _plain_recurrence(b: _Builder, call: _Call, config: Config) -> None:
    if config.get("time_major"):
        raise _Unclear("it is time-major")
    if config.get("stateful"):
        b.note(printable(f"{call.path}: stateful; the graph starts each batch from zero"))


def _sequence_input(b: _Builder, call: _Call) -> tuple[Flow, list[Flow]]:
    states = list(call.inputs[1:])
    for key, value in call.arguments.items():
        if key == "initial_state" and value is not None:
            states += value if isinstance(value, list) else [value]
        elif value not in (None, False):
            raise _Unclear(f"it is called with {key}")
    if not call.inputs or not all(isinstance(state, Flow) for state in states):
        raise _Unclear("its inputs are not tensors")
    flow = call.inputs[0]
    if flow.masked:
        raise _Unclear("it uses a mask")
    flow = b.as_is(flow)
    if flow.rank != 3:
        raise _Unclear(f"its input has rank {flow.rank}")
    return flow, [b.as_is(state) for state in states]


def _recurrent(b: _Builder, call: _Call) -> list[Flow]:
    op, state_count = _RECURRENT[call.cls]
    _plain_recurrence(b, call, call.config)
    flow, states = _sequence_input(b, call)
    if len(states) not in (0, state_count):
        raise _Unclear(f"it is given {len(states)} states")
    return _recurrence(b, call.path, op, state_count, call.positive("units"), call.config, flow, states)


def _recurrence(
    b: _Builder, path: str, op: str, state_count: int, units: int, config: Config, flow: Flow, states: list[Flow]
) -> list[Flow]:
    sequences, with_state = bool(config.get("return_sequences")), bool(config.get("return_state"))
    batch, steps, _ = flow.dims
    shape: Shape = (batch, steps, units) if sequences else (batch, units)
    results = [Flow("", shape, dtype=flow.dtype)]
    results += [Flow("", (batch, units), dtype=flow.dtype)] * (state_count if with_state else 0)
    attributes: dict[str, Attribute] = {"return_sequences": sequences, "return_state": with_state}
    return b.emit_many(path, op, [flow, *states], results, attributes, layer=path)


def _inner(call: _Call, key: str) -> tuple[str, Config]:
    spec = call.config.get(key)
    if not isinstance(spec, Mapping) or not isinstance(spec.get("config"), Mapping) or _foreign(spec):
        raise _Unclear(f"its {key} is not one of Keras' own")
    return str(spec.get("class_name")), spec["config"]


def _rnn(b: _Builder, call: _Call) -> list[Flow]:
    _plain_recurrence(b, call, call.config)
    if call.flag("go_backwards"):
        raise _Unclear("it runs cells backwards")
    flow, states = _sequence_input(b, call)
    cls, cell = _inner(call, "cell")
    if cls in _CELLS:
        op, count = _RECURRENT[_CELLS[cls]]
        units = _Call(cls, call.name, call.path, cell, ()).positive("units")
        if len(states) not in (0, count):
            raise _Unclear(f"it is given {len(states)} states")
        return _recurrence(b, call.path, op, count, units, call.config, flow, states)
    if cls != "StackedRNNCells" or states or call.flag("return_state") or cell.get("reverse_state_order"):
        raise _Unclear(f"its cell is {cls!r}")
    cells = [_inner(_Call("", "", "", {"cell": spec}, ()), "cell") for spec in cell.get("cells", ())]
    if not cells or any(name not in _CELLS for name, _ in cells):
        raise _Unclear("it stacks cells that are not Keras' own")
    for i, (name, config) in enumerate(cells):
        op, count = _RECURRENT[_CELLS[name]]
        last = i == len(cells) - 1
        settings = {"return_sequences": call.flag("return_sequences") if last else True}
        units = _Call(name, "", "", config, ()).positive("units")
        flow = _recurrence(b, f"{call.path}.{i}", op, count, units, settings, flow, [])[0]
    return [flow]


def _bidirectional(b: _Builder, call: _Call) -> list[Flow]:
    cls, config = _inner(call, "layer")
    if cls == "RNN":
        cls, cell = _inner(_Call("", "", "", config, ()), "cell")
        cls, config = _CELLS.get(cls, cls), {**config, **cell}
    if cls not in _RECURRENT:
        raise _Unclear(f"its layer is {cls!r}")
    backward = call.config.get("backward_layer")
    if isinstance(backward, Mapping) and backward.get("class_name") not in (cls, "RNN"):
        raise _Unclear("its two layers are of different classes")
    _plain_recurrence(b, call, config)
    flow, states = _sequence_input(b, call)
    op, state_count = _RECURRENT[cls]
    if len(states) not in (0, 2 * state_count):
        raise _Unclear(f"it is given {len(states)} states")
    mode = call.config.get("merge_mode", "concat")
    if mode not in ("concat", "sum", "mul", "ave", None):
        raise _Unclear(f"its merge_mode is {mode!r}")
    units = _Call(cls, "", "", config, ()).positive("units")
    sequences, with_state = bool(config.get("return_sequences")), bool(config.get("return_state"))
    batch, steps, _ = flow.dims
    width = 2 * units if mode == "concat" else units
    shape: Shape = (batch, steps, width) if sequences else (batch, width)
    results = [Flow("", shape, dtype=flow.dtype)] * (2 if mode is None else 1)
    results += [Flow("", (batch, units), dtype=flow.dtype)] * (2 * state_count if with_state else 0)
    attributes: dict[str, Attribute] = {"return_sequences": sequences, "return_state": with_state}
    attributes["merge_mode"] = mode or "none"
    return b.emit_many(call.path, op, [flow, *states], results, attributes, layer=call.path)


# Wrappers.

_PER_STEP = {"Dense", "Activation", "ReLU", "LeakyReLU", "ELU", "Dropout", "LayerNormalization"}


def _time_distributed(b: _Builder, call: _Call) -> list[Flow]:
    cls, config = _inner(call, "layer")
    if cls not in _PER_STEP or call.x.shape is None or call.x.rank != 3:
        raise _Unclear(f"it applies {cls!r} to each step")
    return _LAYERS[cls](b, replace(call, cls=cls, config=config))


def _spectral(b: _Builder, call: _Call) -> list[Flow]:
    cls, config = _inner(call, "layer")
    if cls not in _LAYERS:
        raise _Unclear(f"it wraps {cls!r}")
    return _LAYERS[cls](b, replace(call, cls=cls, config=config))


_Handler = Callable[[_Builder, _Call], list[Flow]]

_LAYERS: dict[str, _Handler] = {
    **_ACTIVATION_LAYERS,
    "Dense": _dense,
    "Embedding": _embedding,
    "MultiHeadAttention": _attention,
    "GroupQueryAttention": _attention,
    "GroupedQueryAttention": _attention,
    "EinsumDense": _einsum_dense,
    "BatchNormalization": _channel_norm("BatchNormalization"),
    "GroupNormalization": _channel_norm("GroupNormalization"),
    "PReLU": _channel_norm("PRelu"),
    "LayerNormalization": _last_norm("LayerNormalization"),
    "RMSNormalization": _last_norm("RMSNormalization"),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "RepeatVector": _repeat_vector,
    "Add": _merge("Add"),
    "Subtract": _merge("Sub"),
    "Multiply": _merge("Mul"),
    "Maximum": _merge("Max"),
    "Minimum": _merge("Min"),
    "Average": _merge("Mean"),
    "Concatenate": _concatenate,
    "Rescaling": _rescaling,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "SimpleRNN": _recurrent,
    "RNN": _rnn,
    "Bidirectional": _bidirectional,
    "TimeDistributed": _time_distributed,
    "SpectralNormalization": _spectral,
    **dict.fromkeys(
        ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianDropout", "AlphaDropout"),
        _identity(rate="rate"),
    ),
    "GaussianNoise": _identity(stddev="stddev"),
    "ActivityRegularization": _identity(l1="l1", l2="l2"),
    "Identity": _identity(),
    **dict.fromkeys(
        (
            "RandomFlip", "RandomRotation", "RandomTranslation", "RandomZoom", "RandomContrast", "RandomBrightness",
        ),
        _identity(),
    ),
    **{f"Conv{n}D": _conv(n) for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": _depthwise(n) for n in (1, 2)},
    **{f"SeparableConv{n}D": _separable(n) for n in (1, 2)},
    **{f"Conv{n}DTranspose": _conv_transpose(n) for n in (1, 2, 3)},
    **{f"MaxPooling{n}D": _pool("MaxPool", n) for n in (1, 2, 3)},
    **{f"AveragePooling{n}D": _pool("AveragePool", n) for n in (1, 2, 3)},
    **{f"GlobalMaxPooling{n}D": _global_pool("GlobalMaxPool", n) for n in (1, 2, 3)},
    **{f"GlobalAveragePooling{n}D": _global_pool("GlobalAveragePool", n) for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": _zero_padding(n) for n in (1, 2, 3)},
    **{f"Cropping{n}D": _cropping(n) for n in (1, 2, 3)},
    **{f"UpSampling{n}D": _upsampling(n) for n in (1, 2, 3)},
}  # fmt: skip

_OPERATIONS: dict[str, _Handler] = {
    "Add": _operation("Add"),
    "Subtract": _operation("Sub"),
    "Multiply": _operation("Mul"),
    "Divide": _operation("Div"),
    "TrueDivide": _operation("Div"),
    "Maximum": _operation("Max"),
    "Minimum": _operation("Min"),
    "Relu": _function_layer("relu"),
    "Relu6": _function_layer("relu6"),
    "Sigmoid": _function_layer("sigmoid"),
    "Silu": _function_layer("silu"),
    "Tanh": _function_layer("tanh"),
    "Exp": _function_layer("exponential"),
    "Softplus": _function_layer("softplus"),
    "Softsign": _function_layer("softsign"),
    "Selu": _function_layer("selu"),
    "HardSigmoid": _function_layer("hard_sigmoid"),
    "HardSilu": _function_layer("hard_silu"),
    "Gelu": _gelu_operation,
}
"""`keras.ops` on symbolic tensors, and the operators of Python."""

_TF_FUNCTIONS = {
    "math.add": "Add", "__operators__.add": "Add", "math.subtract": "Subtract", "math.multiply": "Multiply",
    "math.truediv": "Divide", "math.divide": "Divide", "math.maximum": "Maximum", "math.minimum": "Minimum",
    "nn.relu": "Relu", "nn.relu6": "Relu6", "math.sigmoid": "Sigmoid", "math.tanh": "Tanh", "math.exp": "Exp",
    "nn.silu": "Silu",
}  # fmt: skip
"""The same in Keras 2 (`TFOpLambda`)."""


def _foreign(spec: Config) -> bool:
    """True if a serialised object is not one of Keras' own classes."""
    module, name, registered = spec.get("module"), spec.get("class_name"), spec.get("registered_name")
    if not isinstance(name, str) or ">" in name or (isinstance(registered, str) and ">" in registered):
        return True
    return isinstance(module, str) and module.split(".")[0] not in ("keras", "tf_keras", "tensorflow")


def _one(flows: list[Flow]) -> Flow:
    return flows[0]


# Models.

_MODELS = ("Sequential", "Functional", "Model")


@dataclass(frozen=True)
class _Application:
    """One inbound node of a layer of a functional model, not yet resolved."""

    layer: int
    node: int
    positional: tuple[Any, ...]
    arguments: Mapping[str, Any]


class _Model:
    """Walks one model config; nested models are walked in place."""

    def __init__(self, builder: _Builder, prefix: str, depth: int) -> None:
        if depth > _DEEPEST:
            raise _Malformed(f"models nested more than {_DEEPEST} deep")
        self.b, self.prefix, self.depth = builder, prefix, depth

    def run(self, spec: Config, inputs: list[Flow] | None) -> list[Flow]:
        config = spec.get("config")
        if isinstance(config, list):  # Keras 1 and early Keras 2 write a Sequential as the bare list
            config = {"layers": config}
        if not isinstance(config, Mapping) or not isinstance(config.get("layers"), list):
            raise _Malformed("a model without a list of layers (subclassed models have none)")
        layers = config["layers"]
        if not all(isinstance(layer, Mapping) and isinstance(layer.get("config"), Mapping | list) for layer in layers):
            raise _Malformed("a layer that is no JSON object with a config")
        if spec.get("class_name") == "Sequential":
            return self._sequential(spec, config, layers, inputs)
        return self._functional(config, layers, inputs)

    def _name(self, layer: Config) -> str:
        config = layer["config"]
        name = layer.get("name") or (config.get("name") if isinstance(config, Mapping) else None)
        if not isinstance(name, str) or not name:
            name = str(layer.get("class_name") or "layer").lower()
        return name

    def _path(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def _input(self, layer: Config | None, shape: Any, name: str, dtype: str) -> Flow:
        if not isinstance(shape, list | tuple) or not all(n is None or (isinstance(n, int) and n >= 0) for n in shape):
            raise _Unclear(f"its shape is {shape!r}")
        if layer is not None and (layer.get("sparse") or layer.get("ragged")):
            raise _Unclear("it is sparse or ragged")
        path = self.b.fresh(self._path(name))
        dims = (None, *shape[1:]) if shape else ()
        first = len(dims) in (4, 5) or self.b.decisions.natures.get(path) == "spatial"
        pending = path if len(dims) == 3 and path not in self.b.decisions.natures else None
        if path in self.b.decisions.tokens:
            dtype, first = "int64", False
        flow = Flow(path, dims, first, pending=pending, source=path, dtype=dtype)
        self.b.inputs.append(path)
        self.b.describe(flow)
        return flow

    def _input_layer(self, layer: Config) -> Flow:
        config = layer["config"]
        shape = config.get("batch_shape", config.get("batch_input_shape"))
        return self._input(config, shape, self._name(layer), _dtype_of(config))

    def _sequential(self, spec: Config, config: Config, layers: list[Config], inputs: list[Flow] | None) -> list[Flow]:
        if inputs is not None and len(inputs) != 1:
            raise _Unclear(f"it has {len(inputs)} inputs")
        flow = None if inputs is None else inputs[0]
        named: set[str] = set()
        for i, layer in enumerate(layers):
            own = layer["config"]
            if layer.get("class_name") == "InputLayer":
                if flow is None:
                    flow = self._input_layer(layer)
                continue
            if flow is None:
                flow = self._guessed_input(spec, config, layer)
            name = self._name(layer)
            if name in named:
                raise _Malformed(f"two layers named {name!r}")
            named.add(name)
            declared = _declared(layers[i + 1]) if i + 1 < len(layers) else None
            flow = self.apply(layer, own, name, [flow], {}, {0: declared})(0)
        if flow is None:
            raise _Malformed("a model without layers")
        return [flow]

    def _guessed_input(self, spec: Config, config: Config, layer: Config) -> Flow:
        """The input of a Sequential that has no InputLayer: the shape stands somewhere else."""
        own = layer["config"] if isinstance(layer["config"], Mapping) else {}
        build = spec.get("build_config")
        candidates = [
            own.get("batch_input_shape"),
            config.get("build_input_shape"),
            build.get("input_shape") if isinstance(build, Mapping) else None,
            _declared(layer),
        ]
        shape = next((c for c in candidates if isinstance(c, list | tuple)), None)
        if shape is None and isinstance(own.get("layers"), list) and own["layers"]:
            inner = own["layers"][0]
            if isinstance(inner, Mapping) and isinstance(inner.get("config"), Mapping):
                shape = inner["config"].get("batch_shape", inner["config"].get("batch_input_shape"))
        if shape is None:
            raise _Malformed("a Sequential that does not say the shape of its input")
        return self._input(None, shape, "input", "float32")

    def apply(
        self,
        layer: Config,
        config: Any,
        name: str,
        inputs: list[Flow],
        arguments: Mapping[str, Any],
        declared: Mapping[int, Any],
        constants: tuple[Any, ...] = (),
    ) -> Callable[[int], Flow]:
        """Apply a layer; the result gives its outputs by number."""
        path, cls = self._path(name), str(layer.get("class_name"))
        given = [*inputs, *(value for value in _flows(list(arguments.values())))]
        try:
            if (
                cls in _MODELS
                and not _foreign(layer)
                and isinstance(config, list | Mapping)
                and "layers" in (config if isinstance(config, Mapping) else {"layers": 0})
            ):
                if any(value not in (None, False) for value in arguments.values()):
                    raise _Unclear("it is called with arguments")
                outputs = _Model(self.b, path, self.depth + 1).run(layer, inputs)
            else:
                outputs = self._layer(layer, config, cls, name, path, inputs, arguments, constants)
        except (_Unclear, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            reason = (
                str(error) if isinstance(error, _Unclear) else f"its settings make no sense ({type(error).__name__})"
            )
            self.b.problem(path, f"{cls}: {reason}")
            for flow in given:
                self.b.taint(flow)
            return lambda index: Flow(f"{path}?{index}", _as_shape(declared.get(index)), opaque=True)
        return _numbered(outputs)

    def _layer(
        self,
        layer: Config,
        config: Config,
        cls: str,
        name: str,
        path: str,
        inputs: list[Flow],
        arguments: Mapping[str, Any],
        constants: tuple[Any, ...],
    ) -> list[Flow]:
        module = layer.get("module")
        operation = isinstance(module, str) and module.startswith("keras.src.ops")
        table = _OPERATIONS if operation else _LAYERS
        if cls == "TFOpLambda" and config.get("function") in _TF_FUNCTIONS:
            cls, table, operation = _TF_FUNCTIONS[config["function"]], _OPERATIONS, True
            others = [value for key, value in arguments.items() if key != "name"]
            constants = (None, *others) if others and not isinstance(others[0], Flow) else ()
            inputs = [*inputs, *(value for value in others if isinstance(value, Flow))]
            config, arguments = {}, {}
        if _foreign(layer) or cls not in table:
            raise _Unclear("not a layer that a graph can express")
        if arguments.get("training") not in (None, False):
            raise _Unclear("it is called in training mode")
        if any(isinstance(value, Flow) for key, value in arguments.items() if key == "mask"):
            raise _Unclear("it is called with a mask")
        kept = {key: value for key, value in arguments.items() if key not in ("training", "mask")}
        call = _Call(cls, name, path, config, tuple(inputs), kept, self.b.keras2, constants)
        takes_arguments = cls in _RECURRENT or cls in ("RNN", "Bidirectional") or "Attention" in cls or operation
        if not takes_arguments and any(value not in (None, False) for value in kept.values()):
            raise _Unclear("it is called with arguments")
        if any(flow.opaque for flow in inputs) and cls not in _FOLLOW_OPAQUE:
            for flow in inputs:
                self.b.taint(flow)
            if all(flow.shape is None for flow in inputs):
                raise _Unclear("its input comes from a layer that is not understood")
        return table[cls](self.b, call)

    def _functional(self, config: Config, layers: list[Config], inputs: list[Flow] | None) -> list[Flow]:
        names = {self._name(layer): i for i, layer in enumerate(layers)}
        if len(names) != len(layers):
            raise _Malformed("two layers of one name")
        heads = _references(config.get("input_layers"))
        flows: dict[Reference, Callable[[int], Flow]] = {}
        for position, (name, _, _) in enumerate(heads):
            if name not in names:
                raise _Malformed(f"an input {name!r} that is no layer")
            if inputs is None:
                flow = self._input_layer(layers[names[name]])
            elif position < len(inputs):
                flow = inputs[position]
            else:
                raise _Unclear(f"it is called with {len(inputs)} inputs")
            flows[name, 0, 0] = _always(flow)
        if inputs is not None and len(inputs) != len(heads):
            raise _Unclear(f"it is called with {len(inputs)} inputs")
        waiting = [
            _parse(i, n, node, names)
            for i, layer in enumerate(layers)
            if layer.get("class_name") != "InputLayer"
            for n, node in enumerate(_inbound(layer))
        ]
        shapes = _declared_shapes(layers)
        shift = {name: _first_node(layers[i]) for name, i in names.items()}
        self._run(layers, waiting, flows, shapes, shift)
        outputs = []
        for name, node, tensor in _references(config.get("output_layers")):
            made = flows.get((name, node - shift.get(name, 0), 0))
            if made is None:
                raise _Malformed(f"an output {name!r} that nothing makes")
            outputs.append(made(tensor))
        return outputs

    def _run(
        self,
        layers: list[Config],
        waiting: list[_Application],
        flows: dict[Reference, Callable[[int], Flow]],
        shapes: Mapping[Reference, Any],
        shift: Mapping[str, int],
    ) -> None:
        """Apply the layers, each as soon as its inputs are there."""

        def key(reference: Reference) -> Reference:
            return (reference[0], reference[1] - shift.get(reference[0], 0), 0)

        missing = [{key(r) for r in _found((a.positional, dict(a.arguments)))} - set(flows) for a in waiting]
        users: dict[Reference, list[int]] = {}
        for i, needs in enumerate(missing):
            for need in needs:
                users.setdefault(need, []).append(i)
        ready = deque(i for i, needs in enumerate(missing) if not needs)
        done = 0
        while ready:
            i = ready.popleft()
            done += 1
            application = waiting[i]
            layer = layers[application.layer]
            name = self._name(layer)

            def resolve(value: Any) -> Any:
                if isinstance(value, _Ref):
                    return flows[key(value.reference)](value.reference[2])
                if isinstance(value, list | tuple):
                    return [resolve(v) for v in value]
                return value

            positional = resolve(application.positional)
            arguments = {k: resolve(v) for k, v in application.arguments.items()}
            constants = tuple(None if isinstance(v, Flow) else v for v in positional)
            constants = () if all(v is None or isinstance(v, list) for v in constants) else constants
            declared = {t: s for (n, node, t), s in shapes.items() if (n, node) == (name, application.node)}
            made = (name, application.node, 0)
            flows[made] = self.apply(
                layer, layer["config"], name, _flows(positional), arguments, declared, constants
            )  # fmt: skip
            for user in users.get(made, ()):
                missing[user].discard(made)
                if not missing[user]:
                    ready.append(user)
        if done != len(waiting):
            raise _Malformed("layers that use each other in a circle, or an output that nothing makes")


_FOLLOW_OPAQUE = {
    "Dense", "BatchNormalization", "LayerNormalization", "RMSNormalization", "PReLU", "GroupNormalization",
    "Flatten", "Reshape", "Dropout", "Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "Identity",
    "Add", "Subtract", "Multiply", "Maximum", "Minimum", "Average", "Concatenate",
}  # fmt: skip
"""Layers that can be followed although their input comes from a layer that was not understood."""


def _numbered(outputs: Sequence[Flow]) -> Callable[[int], Flow]:
    def output(index: int) -> Flow:
        if not 0 <= index < len(outputs):
            raise _Malformed(f"output {index} of a layer that has {len(outputs)}")
        return outputs[index]

    return output


def _always(flow: Flow) -> Callable[[int], Flow]:
    return lambda index: flow


@dataclass(frozen=True)
class _Ref:
    """A tensor named in a config: layer, node, output."""

    reference: Reference


def _flows(values: Sequence[Any]) -> list[Flow]:
    found: list[Flow] = []
    for value in values:
        if isinstance(value, Flow):
            found.append(value)
        elif isinstance(value, list):
            found += _flows(value)
    return found


def _found(value: Any) -> list[Reference]:
    if isinstance(value, _Ref):
        return [value.reference]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [r for v in value for r in _found(v)] if isinstance(value, list | tuple) else []


def _is_reference(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and isinstance(value[2], int)
    )


def _references(value: Any) -> list[Reference]:
    """`["name", 0, 0]`, a list of such, or a dict of such."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if _is_reference(value):
        value = [value]
    if not isinstance(value, list | tuple) or not value or not all(_is_reference(v) for v in value):
        raise _Malformed("inputs or outputs that are not named")
    return [(v[0], v[1], v[2]) for v in value]


def _inbound(layer: Config) -> list[Any]:
    nodes = layer.get("inbound_nodes") or []
    if not isinstance(nodes, list):
        raise _Malformed("inbound nodes that are no list")
    return nodes


def _parse(layer: int, number: int, node: Any, names: Mapping[str, int]) -> _Application:
    """One inbound node: of Keras 3 (args, kwargs) or of Keras 2 (nested lists)."""
    if isinstance(node, Mapping):
        arguments = node.get("kwargs") or {}
        if not isinstance(node.get("args", []), list) or not isinstance(arguments, Mapping):
            raise _Malformed("an inbound node without args")
        positional = [_tensors3(value) for value in node.get("args", [])]
        return _Application(layer, number, tuple(positional), {k: _tensors3(v) for k, v in arguments.items()})
    if isinstance(node, list) and node and _is_reference(node):
        node = [node]
    if not isinstance(node, list) or not node or not all(_is_reference(entry) for entry in node):
        raise _Malformed("an inbound node that is not understood")
    arguments = {}
    for entry in node:
        extra = entry[3] if len(entry) == 4 else {}
        if not isinstance(extra, Mapping):
            raise _Malformed("an inbound node that is not understood")
        arguments.update({k: _tensors2(v, names) for k, v in extra.items()})
    return _Application(layer, number, tuple(_Ref((e[0], e[1], e[2])) for e in node), arguments)


def _tensors3(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__":
        config = value.get("config")
        history: Any = config.get("keras_history") if isinstance(config, Mapping) else None
        if not _is_reference(history):
            raise _Malformed("a tensor without a history")
        return _Ref((history[0], history[1], history[2]))
    return [_tensors3(v) for v in value] if isinstance(value, list) else value


def _tensors2(value: Any, names: Mapping[str, int]) -> Any:
    if _is_reference(value) and value[0] in names:
        return _Ref((value[0], value[1], value[2]))
    return [_tensors2(v, names) for v in value] if isinstance(value, list) else value


def _first_node(layer: Config) -> int:
    """Keras 2 does not write the node with which a nested model was made, but counts it."""
    config, nodes = layer["config"], _inbound(layer)
    if layer.get("class_name") not in _MODELS or not nodes or isinstance(nodes[0], Mapping):
        return 0
    inner = config.get("layers") if isinstance(config, Mapping) else None
    head = inner[0] if isinstance(inner, list) and inner else None
    return int(isinstance(head, Mapping) and head.get("class_name") == "InputLayer")


def _declared(layer: Config) -> Any:
    build = layer.get("build_config")
    return build.get("input_shape") if isinstance(build, Mapping) else None


def _declared_shapes(layers: Sequence[Config]) -> dict[Reference, Any]:
    """The shapes that Keras 3 writes beside each tensor."""
    shapes: dict[Reference, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Mapping):
            config = value.get("config")
            if value.get("class_name") == "__keras_tensor__" and isinstance(config, Mapping):
                history: Any = config.get("keras_history")
                if _is_reference(history):
                    shapes[history[0], history[1], history[2]] = config.get("shape")
                return
            value = list(value.values())
        if isinstance(value, list):
            for inner in value:
                visit(inner)

    for layer in layers:
        visit(layer.get("inbound_nodes"))
    return shapes


def _as_shape(value: Any) -> Shape | None:
    if isinstance(value, list | tuple) and value and all(n is None or isinstance(n, int) for n in value):
        return (None, *value[1:])
    return None


def _is_keras2(config: Config) -> bool:
    version = config.get("keras_version")
    if isinstance(version, str):
        return version[:1] in ("1", "2")
    return "module" not in config


def _pass(config: Config, decisions: _Decisions) -> tuple[_Builder, list[Flow]]:
    builder = _Builder(decisions, _is_keras2(config))
    outputs = _Model(builder, "", 0).run(config, None)
    kept = []
    for flow in outputs:
        flow = builder.ordered(flow)
        if flow.shape is not None and not flow.first and flow.rank in (4, 5) and not flow.opaque:
            flow = builder.channels_first(flow)
        kept.append(flow)
    return builder, kept


def capture(config: Mapping[str, Any]) -> tuple[Graph | None, Splits, list[str]]:
    """The graph of a parsed model config, the splits of its vector layers, and remarks for the user.

    The graph is None if a layer has no place in it; the remarks say which. `splits` names each dense layer, norm and
    PReLU whose surroundings are understood even so.
    """
    decisions = _Decisions()
    for _ in range(_MOST_PASSES):
        decisions.changed = False
        try:
            if config.get("class_name") not in _MODELS or _foreign(config):
                raise _Malformed(f"a model of class {config.get('class_name')!r}, which only its own code can wire")
            builder, outputs = _pass(config, decisions)
        except (_Malformed, _Unclear) as error:
            return None, {}, [printable(f"model: {error}; the archive has no graph")]
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            reason = f"its settings make no sense ({type(error).__name__})"
            return None, {}, [printable(f"model: {reason}; the archive has no graph")]
        if not decisions.changed:
            break
    else:
        return None, {}, ["model: its wiring contradicts itself; the archive has no graph"]
    splits = {path: axes for path, axes in builder.splits.items() if path not in builder.undecided}
    if builder.unclear or any(flow.opaque for flow in outputs):
        return None, splits, builder.notes
    names = tuple(flow.name for flow in outputs)
    graph = Graph(
        inputs=tuple(builder.inputs), outputs=names, values=builder.values, nodes=tuple(builder.nodes)
    )  # fmt: skip
    return graph, splits, builder.notes
