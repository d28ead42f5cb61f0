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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neutral.errors import printable
from neutral.schema.graph import Attribute, Graph, Node, Value

Config = Mapping[str, Any]
Splits = dict[str, dict[str, int]]
Captured = tuple[Graph | None, Splits, list[str]]

_ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What settings raise that no module of torch has: they come from a file."""

_PARAMETRIZED = "torch.nn.utils.parametrize.Parametrized"
_SPACE = {1: ("width",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class _Module:
    path: str
    cls: str
    config: Config
    children: tuple[_Module, ...]


def capture(modules: Mapping[str, Any]) -> Captured:
    """The graph (None if it cannot be told), the splits of the layers whose surroundings are certain, and notes."""
    root = _module(modules, "")
    if root.cls != "Sequential":
        return (
            None,
            _inner_splits(root.children),
            [f"{root.path or 'model'}: no graph, because {root.cls} is not a Sequential"],
        )
    chain = list(_chain(root))
    if not chain:
        return None, {}, ["model: no graph, because the Sequential is empty"]
    graph, reason = _graph(chain)
    splits = {**_inner_splits(chain), **_chain_splits(chain, _first_seen(graph), whole=True)}
    return graph, splits, [] if graph is not None else [reason]


def _module(described: Mapping[str, Any], path: str) -> _Module:
    path = str(described.get("path", path))
    children = tuple(
        _module(child, f"{path}.{name}" if path else str(name)) for name, child in described.get("children") or ()
    )
    cls = str(described.get("cls") or "").removeprefix(_PARAMETRIZED)
    return _Module(path, cls, described.get("config") or {}, children)


def _chain(module: _Module) -> Iterator[_Module]:
    for child in module.children:
        if child.cls == "Sequential":
            yield from _chain(child)
        else:
            yield child


# Splits: which layers cross a Flatten or an Unflatten.


def _inner_splits(modules: Sequence[_Module]) -> Splits:
    """Splits inside the Sequentials of modules whose own wiring is not known."""
    found: Splits = {}
    for module in modules:
        if module.cls == "Sequential":
            chain = list(_chain(module))
            found |= _inner_splits(chain)
            found |= _chain_splits(chain, _Seen("unknown"), whole=False)
        else:
            found |= _inner_splits(module.children)
    return found


@dataclass(frozen=True)
class _Seen:
    """What is known of the value between two modules.

    `order`: `plain` (no axis of it is a joined image), `image` (channels, then space), `flat` (a joined image), or
    `unknown`. `channels` counts the features of a plain value, or the channels of an image, joined or not.
    """

    order: str
    channels: int | None = None
    rank: int | None = None


_UNKNOWN = _Seen("unknown")


def _first_seen(graph: Graph | None) -> _Seen:
    """What a whole model is given: as the graph found out, else a value of which nobody joined the axes."""
    if graph is None:
        return _Seen("plain")
    value = graph.values[graph.inputs[0]]
    order = "image" if "channel" in value.axes else "plain"
    return _Seen(order, value.shape[1] if value.shape else None, len(value.axes))


def _chain_splits(chain: Sequence[_Module], seen: _Seen, whole: bool) -> Splits:
    """The splits of a chain. `whole`: nothing comes after it that could divide an axis."""
    found: Splits = {}
    pending: list[_Module] = []
    for i, module in enumerate(chain):
        try:
            seen, pending = _stepped(module, chain[i + 1 :], seen, pending, found)
        except _ODD:
            _forget(found, [*pending, module])
            seen, pending = _UNKNOWN, []
    if not whole and seen.order != "image":
        # What follows outside may divide the axis that these layers made.
        _forget(found, pending)
    return found


def _stepped(
    module: _Module, rest: Sequence[_Module], seen: _Seen, pending: list[_Module], found: Splits
) -> tuple[_Seen, list[_Module]]:
    """What is known after a module, and the layers since the last Linear, whose axis may yet be divided."""
    cls, config = module.cls, module.config
    if cls == "Linear":
        _name(found, module, _crossing(seen, int(config["in_features"]), "in"))
        return _after_linear(seen, config), [module]
    if cls in _VECTOR_NORMS or cls == "PReLU":
        features = _features(module)
        _name(found, module, {} if features == 1 else _crossing(seen, features, "feature"))
        return seen, [*pending, module]
    if cls in _EQUIVARIANT:
        return seen, pending
    after = _unflattened(seen, config, rest) if cls == "Unflatten" else _moved(seen, module, rest)
    if cls in _CHANNEL_NORMS:
        found[module.path] = {}
    if cls == "Unflatten":
        _divide(found, pending, seen, after)
    elif after == _UNKNOWN:
        _forget(found, pending)
    return after, []


def _name(found: Splits, module: _Module, crossing: dict[str, int] | None) -> None:
    if crossing is not None:
        found[module.path] = crossing


def _forget(found: Splits, layers: Sequence[_Module]) -> None:
    for module in layers:
        found.pop(module.path, None)


def _divide(found: Splits, pending: Sequence[_Module], before: _Seen, after: _Seen) -> None:
    """Record that the axis which the pending layers made is divided into channels and space."""
    if after == _UNKNOWN:
        _forget(found, pending)
        return
    for module in pending:
        if module.path in found and _features(module) == before.channels and _divides(before, after):
            axis = "out" if module.cls == "Linear" else "feature"
            found[module.path] = {**found[module.path], axis: after.channels or 1}


def _divides(before: _Seen, after: _Seen) -> bool:
    return before.channels is not None and after.channels is not None and 1 < after.channels < before.channels


def _crossing(seen: _Seen, features: int, axis: str) -> dict[str, int] | None:
    if seen.order == "unknown" or (seen.order == "flat" and seen.channels is None):
        return None
    if seen.order == "flat" and 1 < (seen.channels or 1) < features:
        return {axis: seen.channels or 1}
    return {}


def _features(module: _Module) -> int:
    names = {"Linear": "out_features", "PReLU": "num_parameters", "BatchNorm1d": "num_features"}
    return math.prod(_ints(module.config[names.get(module.cls, "normalized_shape")]))


def _after_linear(seen: _Seen, config: Config) -> _Seen:
    return seen if seen.order == "image" else _Seen("plain", int(config["out_features"]), seen.rank)


def _unflattened(seen: _Seen, config: Config, rest: Sequence[_Module]) -> _Seen:
    sizes = _ints(config.get("unflattened_size", ()))
    vector = seen.rank == 2 or _next_rank(rest) == len(sizes) + 1
    if seen.order != "plain" or not vector or config.get("dim") not in (1, -1):
        return _UNKNOWN
    if len(sizes) < 2 or seen.channels != math.prod(sizes):
        return _UNKNOWN
    return _Seen("image", sizes[0], len(sizes) + 1)


def _next_rank(rest: Sequence[_Module]) -> int | None:
    """How many axes the next module takes that takes no other number."""
    following = next((m for m in rest if m.cls not in _EQUIVARIANT), None)
    return _MAKES_CHANNELS[following.cls][1] if following and following.cls in _MAKES_CHANNELS else None


def _moved(seen: _Seen, module: _Module, rest: Sequence[_Module]) -> _Seen:
    """What is known after a module that is neither a Linear nor treats every feature alike."""
    cls, config = module.cls, module.config
    if cls in _MAKES_CHANNELS:
        name, rank = _MAKES_CHANNELS[cls]
        return _Seen("image", int(config[name]), rank)
    if cls == "Embedding":
        return _Seen("plain", int(config["embedding_dim"]), 3)
    if cls == "Flatten":
        return _flattened(seen, config, rest)
    if cls == "PixelShuffle" and seen.order == "image" and seen.channels is not None:
        return _Seen("image", seen.channels // int(config["upscale_factor"]) ** 2, 4)
    if cls in _KEEPS_CHANNELS:
        return seen if seen.order == "image" else _UNKNOWN
    return seen if cls == "GroupNorm" else _UNKNOWN


def _flattened(seen: _Seen, config: Config, rest: Sequence[_Module]) -> _Seen:
    start, end = int(config.get("start_dim", 1)), int(config.get("end_dim", -1))
    if seen.rank is None:
        # The input of a whole model, taken as the vector that this Flatten makes of it.
        return seen if seen.order == "plain" and seen.channels is None and (start, end) == (1, -1) else _UNKNOWN
    last = seen.rank - 1
    if start == 1 and end % seen.rank == last:
        # Axes that all frameworks have in one order (batch, time, feature) keep it when they are joined.
        moves = seen.order == "image" and _ends_in_linear(rest)
        if seen.order == "plain" and seen.rank == 2:
            return seen
        return _Seen("flat", seen.channels if moves else 1, 2)
    if seen.order == "image" and start >= 2:
        return _Seen("image", seen.channels, seen.rank - (end % seen.rank) + start)
    return _UNKNOWN


def _ends_in_linear(rest: Sequence[_Module]) -> bool:
    """True if all modules up to the next Linear treat every feature alike, so that the order can move into weights."""
    for module in rest:
        if module.cls == "Linear":
            return True
        if module.cls not in _EQUIVARIANT and module.cls not in _VECTOR_NORMS and module.cls != "PReLU":
            return False
    return False


_VECTOR_NORMS = ("BatchNorm1d", "LayerNorm", "RMSNorm")
_CHANNEL_NORMS = ("BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
_MAKES_CHANNELS = {
    **{f"Conv{n}d": ("out_channels", n + 2) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": ("out_channels", n + 2) for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": ("num_features", n + 2) for n in (2, 3)},
    **{f"InstanceNorm{n}d": ("num_features", n + 2) for n in (1, 2, 3)},
}
_KEEPS_CHANNELS = (
    *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")),
    *(f"{kind}Pad{n}d" for n in (1, 2, 3) for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")),
    "Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d", "LocalResponseNorm",
)  # fmt: skip


# The graph.


class _Inexpressible(Exception):
    """A module that the graph has no operator for."""


class _Contradiction(Exception):
    """A module that cannot take the value it would be given."""


class _Size:
    """The size of an axis, known or to be found out. A joined axis knows the axes it is made of."""

    def __init__(self, n: int | None = None, parts: Sequence[_Size] = ()) -> None:
        self.known, self.parts = n, tuple(parts)

    @property
    def n(self) -> int | None:
        if self.known is None and self.parts and all(part.n is not None for part in self.parts):
            self.known = math.prod(part.n or 0 for part in self.parts)
        return self.known

    def must_be(self, n: int, what: str) -> None:
        if self.n is not None and self.n != n:
            raise _Contradiction(f"it takes {n} {what} and would be given {self.n}")
        self.known = n
        open_parts = [part for part in self.parts if part.n is None]
        if self.parts:
            rest, left = divmod(n, math.prod(part.n for part in self.parts if part.n is not None))
            if left or (not open_parts and rest != 1):
                raise _Contradiction(f"it takes {n} {what}, not a multiple of the channels")
            if len(open_parts) == 1:
                open_parts[0].must_be(rest, what)


class _Builder:
    """The graph so far, and the value that the next module is given."""

    def __init__(self, axes: tuple[str, ...], dtype: str, paths: set[str]) -> None:
        self.nodes: list[Node] = []
        self.made: list[tuple[str, tuple[str, ...], list[_Size], str]] = []
        self.input = "input"
        while self.input in paths:
            self.input += "_"
        self.value, self.axes, self.sizes = self.input, axes, [_Size() for _ in axes]
        self.made.append((self.input, axes, self.sizes, dtype))
        self.module = _Module("", "", {}, ())

    def add(self, module: _Module) -> None:
        self.module = module
        rule = _RULES.get(module.cls)
        if rule is None:
            raise _Inexpressible(f"{module.cls or 'the module'} is not an operator that neutral knows")
        rule(self, module.config)

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def space(self) -> int:
        return self.rank - 2

    def node(
        self,
        op: str,
        attributes: Mapping[str, Attribute] | None = None,
        *,
        layer: bool = False,
        axes: tuple[str, ...] | None = None,
        sizes: list[_Size] | None = None,
        inputs: tuple[str, ...] | None = None,
        suffix: str = "",
    ) -> str:
        name = f"{self.module.path}.{suffix}" if suffix else self.module.path
        taken = (self.value,) if inputs is None else inputs
        own = self.module.path if layer else None
        self.nodes.append(
            Node(name=name, op=op, layer=own, inputs=taken, outputs=(name,), attributes=dict(attributes or {}))
        )
        self.value, self.axes = name, self.axes if axes is None else axes
        self.sizes = self.sizes if sizes is None else sizes
        self.made.append((name, self.axes, self.sizes, "float32"))
        return name

    def need_image(self, space: int) -> None:
        if self.space != space or self.axes[1] != "channel":
            raise _Contradiction(f"it takes (batch, channel, {', '.join(_SPACE[space])}), not {self.axes}")

    def graph(self) -> Graph:
        values = {
            name: Value(axes=axes, shape=tuple(size.n for size in sizes), dtype=dtype)
            for name, axes, sizes, dtype in self.made
        }
        return Graph(inputs=(self.input,), outputs=(self.value,), values=values, nodes=tuple(self.nodes))


_INPUTS: tuple[tuple[str, ...], ...] = (
    ("batch", "feature"),
    ("batch", "time", "feature"),
    *(("batch", "channel", *_SPACE[n]) for n in (1, 2, 3)),
)
"""What the input of a chain may be, tried in this order: a Linear takes any number of axes, a Conv2d just one."""


def _graph(chain: Sequence[_Module]) -> tuple[Graph | None, str]:
    reasons: list[tuple[int, str]] = []
    starts_with_tokens = chain[0].cls == "Embedding"
    for axes in (("batch", "time"),) if starts_with_tokens else _INPUTS:
        builder = _Builder(axes, "int64" if starts_with_tokens else "float32", {module.path for module in chain})
        try:
            for module in chain:
                builder.add(module)
            return builder.graph(), ""
        except (_Inexpressible, _Contradiction) as reason:
            told = str(reason)
        except _ODD:
            told = f"the settings of {builder.module.cls} are odd"
        reasons.append((len(builder.nodes), f"{printable(builder.module.path)}: no graph, because {printable(told)}"))
    # The input that went furthest is the likeliest.
    return None, max(reasons, key=lambda entry: entry[0])[1]


def _ints(value: Any) -> tuple[int, ...]:
    return (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    found = _ints(value)
    return found * rank if len(found) == 1 else found


def _windows(n: int | None, k: int, s: int, before: int, after: int, d: int, ceil: bool = False) -> _Size:
    if n is None:
        return _Size()
    span = n + before + after - d * (k - 1) - 1
    if span < 0:
        raise _Contradiction(f"its window of {d * (k - 1) + 1} is larger than {n}")
    made = -(-span // s) + 1 if ceil else span // s + 1
    return _Size(made - (ceil and (made - 1) * s >= n + before))


def _linear(b: _Builder, config: Config) -> None:
    b.sizes[-1].must_be(int(config["in_features"]), "features")
    b.node("Gemm", layer=True, sizes=[*b.sizes[:-1], _Size(int(config["out_features"]))])


def _conv(space: int) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        b.need_image(space)
        b.sizes[1].must_be(int(config["in_channels"]), "channels")
        k, s, d = (_each(config[name], space) for name in ("kernel_size", "stride", "dilation"))
        padding = config["padding"]
        pairs = [(0, 0)] * space
        if padding == "same":
            totals = [d[i] * (k[i] - 1) for i in range(space)]
            pairs = [(total // 2, total - total // 2) for total in totals]
        elif not isinstance(padding, str):
            pairs = [(p, p) for p in _each(padding, space)]
        made = [_windows(b.sizes[i + 2].n, k[i], s[i], *pairs[i], d[i]) for i in range(space)]
        b.node("Conv", layer=True, sizes=[b.sizes[0], _Size(int(config["out_channels"])), *made])

    return rule


def _conv_transpose(space: int) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        b.need_image(space)
        b.sizes[1].must_be(int(config["in_channels"]), "channels")
        k, s, d, p, extra = (
            _each(config[name], space) for name in ("kernel_size", "stride", "dilation", "padding", "output_padding")
        )
        made = []
        for i in range(space):
            n = b.sizes[i + 2].n
            full = None if n is None else (n - 1) * s[i] - 2 * p[i] + d[i] * (k[i] - 1) + extra[i] + 1
            made.append(_Size(full))
        b.node("ConvTranspose", layer=True, sizes=[b.sizes[0], _Size(int(config["out_channels"])), *made])

    return rule


def _batch_norm(space: int) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        if not (space == 1 and b.rank == 2):
            b.need_image(space)
        if config.get("track_running_stats", True) is False:
            raise _Inexpressible("a BatchNorm without running statistics depends on the batch")
        b.sizes[1].must_be(int(config["num_features"]), "features")
        b.node("BatchNormalization", layer=True)

    return rule


def _instance_norm(space: int) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        b.need_image(space)
        b.sizes[1].must_be(int(config["num_features"]), "channels")
        owns = bool(config.get("affine")) or bool(config.get("track_running_stats"))
        b.node("InstanceNormalization", {} if owns else {"epsilon": float(config["eps"])}, layer=owns)

    return rule


def _last_axes_norm(op: str) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        shape = _ints(config["normalized_shape"])
        if len(shape) >= b.rank:
            raise _Contradiction(f"it takes {len(shape) + 1} axes or more")
        for size, n in zip(b.sizes[-len(shape) :], shape, strict=True):
            size.must_be(n, "features")
        owns = bool(config.get("elementwise_affine", True))
        # torch reads eps=None as the smallest step of the input's dtype.
        eps = 2.0**-23 if config.get("eps") is None else float(config["eps"])
        b.node(op, {} if owns else {"axis": -len(shape), "epsilon": eps}, layer=owns)

    return rule


def _group_norm(b: _Builder, config: Config) -> None:
    if b.axes[1] not in ("channel", "feature"):
        raise _Contradiction(f"it takes (batch, channel, ...), not {b.axes}")
    b.sizes[1].must_be(int(config["num_channels"]), "channels")
    owns = bool(config.get("affine", True))
    attributes = {} if owns else {"num_groups": int(config["num_groups"]), "epsilon": float(config["eps"])}
    b.node("GroupNormalization", attributes, layer=owns)


def _prelu(b: _Builder, config: Config) -> None:
    slopes = int(config.get("num_parameters", 1))
    if slopes > 1:
        if b.axes[1] not in ("channel", "feature"):
            raise _Contradiction(f"it takes (batch, channel, ...), not {b.axes}")
        b.sizes[1].must_be(slopes, "channels")
    b.node("PRelu", layer=True)


def _embedding(b: _Builder, config: Config) -> None:
    if b.nodes and not all(node.op == "Identity" for node in b.nodes):
        raise _Inexpressible("an Embedding of computed numbers has no counterpart elsewhere")
    if config.get("max_norm") is not None:
        raise _Inexpressible("an Embedding with max_norm changes its rows when they are looked up")
    if b.rank != 2:
        raise _Contradiction("it takes (batch, time)")
    b.node(
        "Gather",
        layer=True,
        axes=("batch", "time", "feature"),
        sizes=[*b.sizes, _Size(int(config["embedding_dim"]))],
    )


def _max_pool(space: int) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        b.need_image(space)
        if config.get("return_indices"):
            raise _Inexpressible("a pooling that returns indices makes two values")
        d = _each(config.get("dilation", 1), space)
        _pool(b, "MaxPool", config, space, d, {"dilations": d})

    return rule


def _avg_pool(space: int) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        b.need_image(space)
        if config.get("divisor_override") is not None:
            raise _Inexpressible("divisor_override makes an AvgPool that is no average")
        counted = {"count_include_pad": int(bool(config.get("count_include_pad", True)))}
        _pool(b, "AveragePool", config, space, (1,) * space, counted)

    return rule


def _pool(b: _Builder, op: str, config: Config, space: int, d: Sequence[int], more: Mapping[str, Attribute]) -> None:
    k = _each(config["kernel_size"], space)
    stride = config.get("stride")
    s = k if stride is None else _each(stride, space)
    p = _each(config.get("padding", 0), space)
    ceil = bool(config.get("ceil_mode", False))
    made = [_windows(b.sizes[i + 2].n, k[i], s[i], p[i], p[i], d[i], ceil) for i in range(space)]
    attributes = {"kernel_shape": k, "strides": s, "pads": (*p, *p), "ceil_mode": int(ceil), **more}
    b.node(op, attributes, sizes=[*b.sizes[:2], *made])


def _adaptive_pool(space: int, kind: str) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        b.need_image(space)
        if config.get("return_indices"):
            raise _Inexpressible("a pooling that returns indices makes two values")
        asked = config["output_size"]
        wanted = (asked,) * space if asked is None or isinstance(asked, int) else tuple(asked)
        given = [size.n for size in b.sizes[2:]]
        if all(n == 1 for n in wanted):
            b.node(f"Global{kind}", sizes=[*b.sizes[:2], *(_Size(1) for _ in wanted)])
            return
        made = [g if w is None else int(w) for w, g in zip(wanted, given, strict=True)]
        if all(m and g and g % m == 0 for m, g in zip(made, given, strict=True)):
            k = tuple((g or 0) // (m or 1) for m, g in zip(made, given, strict=True))
            attributes: dict[str, Attribute] = {"kernel_shape": k, "strides": k, "pads": (0,) * (2 * space)}
            b.node(kind, attributes, sizes=[*b.sizes[:2], *map(_Size, made)])
            return
        raise _Inexpressible(f"an adaptive pooling to {wanted} depends on the size of its input")

    return rule


def _flatten(b: _Builder, config: Config) -> None:
    start, end = (int(config.get(name, default)) for name, default in (("start_dim", 1), ("end_dim", -1)))
    start, end = (i + b.rank if i < 0 else i for i in (start, end))
    if start == 0 and end > 0:
        raise _Inexpressible("a Flatten that joins the batch axis mixes the samples")
    if end >= b.rank:
        raise _Contradiction(f"it takes {end + 1} axes or more")
    if start == 1 and end == b.rank - 1:
        joined = b.sizes[1] if b.rank == 2 else _Size(parts=b.sizes[1:])
        b.node("Flatten", {"axis": 1}, axes=("batch", "feature"), sizes=[b.sizes[0], joined])
        return
    if start >= end:
        b.node("Identity")
        return
    joined = _Size(parts=b.sizes[start : end + 1])
    sizes = [*b.sizes[:start], joined, *b.sizes[end + 1 :]]
    if b.axes[1] != "channel" or start == 1:
        raise _Inexpressible(f"a Flatten from axis {start} to {end} makes axes without a meaning")
    _reshape(b, ("batch", "channel", *_SPACE[len(sizes) - 2]), sizes, joined=start)


def _reshape(b: _Builder, axes: tuple[str, ...], sizes: list[_Size], joined: int) -> None:
    """A Reshape in which at most the axis `joined` is not written as a number or kept in its place."""
    shape = [size.n if size.n is not None else -1 if i == joined else 0 for i, size in enumerate(sizes)][1:]
    kept = all(n != 0 or sizes[i + 1] is b.sizes[i + 1] for i, n in enumerate(shape))
    if not kept:
        raise _Inexpressible("the sizes that it keeps are not known")
    b.node("Reshape", {"shape": tuple(shape)}, axes=axes, sizes=sizes)


def _divided(b: _Builder, config: Config) -> None:
    dim = config["dim"]
    if not isinstance(dim, int):
        raise _Inexpressible("named axes have no counterpart elsewhere")
    dim = dim + b.rank if dim < 0 else dim
    sizes = _ints(config["unflattened_size"])
    if b.rank != 2 or dim != 1 or not 2 <= len(sizes) <= 4:
        raise _Inexpressible(f"an Unflatten of axis {dim} of {b.rank} makes axes without a meaning")
    if -1 in sizes and b.sizes[1].n is not None:
        rest = b.sizes[1].n // max(1, math.prod(n for n in sizes if n != -1))
        sizes = tuple(rest if n == -1 else n for n in sizes)
    if -1 not in sizes:
        b.sizes[1].must_be(math.prod(sizes), "features")
    axes = ("batch", "channel", *_SPACE[len(sizes) - 1])
    made = [b.sizes[0], *(_Size(None if n == -1 else n) for n in sizes)]
    b.node("Reshape", {"shape": sizes}, axes=axes, sizes=made)


_RESIZE: dict[str, tuple[str, dict[str, Attribute]]] = {
    "nearest": ("nearest", {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    "nearest-exact": ("nearest", {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}),
    **dict.fromkeys(("linear", "bilinear", "trilinear"), ("linear", {"coordinate_transformation_mode": "half_pixel"})),
    "bicubic": ("cubic", {"coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75}),
}


def _upsample(b: _Builder, config: Config) -> None:
    if b.axes[1] != "channel":
        raise _Contradiction(f"it takes (batch, channel, ...), not {b.axes}")
    mode, attributes = _RESIZE[str(config["mode"])]
    if config["mode"] in ("linear", "bilinear", "trilinear", "bicubic"):
        b.need_image({"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}[str(config["mode"])])
    if config.get("align_corners"):
        attributes = {**attributes, "coordinate_transformation_mode": "align_corners"}
    size, scale = config.get("size"), config.get("scale_factor")
    if size is not None:
        wanted = _each(size, b.space)
        made = [_Size(n) for n in wanted]
        b.node("Resize", {"mode": mode, **attributes, "sizes": wanted}, sizes=[*b.sizes[:2], *made])
        return
    if config.get("recompute_scale_factor"):
        raise _Inexpressible("recompute_scale_factor makes the factor depend on the size of the input")
    factors = (scale,) * b.space if isinstance(scale, int | float) else tuple(scale or ())
    factors = tuple(float(f) for f in factors)
    made = [
        _Size(None if size.n is None else math.floor(size.n * f)) for size, f in zip(b.sizes[2:], factors, strict=True)
    ]
    b.node("Resize", {"mode": mode, **attributes, "scales": (1.0, 1.0, *factors)}, sizes=[*b.sizes[:2], *made])


def _pad(mode: str, space: int) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        b.need_image(space)
        flat = _each(config["padding"], 2 * space)
        # torch lists the last axis first.
        pairs = [(flat[2 * i], flat[2 * i + 1]) for i in reversed(range(space))]
        pads = (0, 0, *(p for p, _ in pairs), 0, 0, *(p for _, p in pairs))
        attributes: dict[str, Attribute] = {"mode": mode, "pads": pads}
        if mode == "constant":
            attributes["value"] = float(config.get("value", 0.0))
        made = [
            _Size(None if size.n is None else size.n + sum(pair)) for size, pair in zip(b.sizes[2:], pairs, strict=True)
        ]
        b.node("Pad", attributes, sizes=[*b.sizes[:2], *made])

    return rule


def _pixel_shuffle(b: _Builder, config: Config) -> None:
    b.need_image(2)
    factor = int(config["upscale_factor"])
    channels = b.sizes[1].n
    if channels is not None and channels % factor**2:
        raise _Contradiction(f"{channels} channels cannot be shuffled by {factor}")
    made = [None if channels is None else channels // factor**2]
    made += [None if size.n is None else size.n * factor for size in b.sizes[2:]]
    b.node("DepthToSpace", {"blocksize": factor, "mode": "CRD"}, sizes=[b.sizes[0], *map(_Size, made)])


def _local_response_norm(b: _Builder, config: Config) -> None:
    if b.axes[1] != "channel":
        raise _Contradiction(f"it takes (batch, channel, ...), not {b.axes}")
    if int(config["size"]) % 2 == 0:
        raise _Inexpressible("torch places an even window one channel away from where ONNX does")
    b.node(
        "LRN",
        {
            "size": int(config["size"]),
            "alpha": float(config["alpha"]),
            "beta": float(config["beta"]),
            "bias": float(config["k"]),
        },
    )


def _dropout(b: _Builder, config: Config) -> None:
    b.node("Identity", {"origin": b.module.cls, "rate": float(config.get("p", 0.5))})


def _softmax(op: str) -> Callable[[_Builder, Config], None]:
    def rule(b: _Builder, config: Config) -> None:
        dim = config.get("dim")
        if dim is None:
            if b.rank == 3:
                raise _Inexpressible(f"a {b.module.cls} without dim mixes the samples of a value of three axes")
            dim = 1
        if not -b.rank < dim < b.rank or dim % b.rank == 0:
            raise _Inexpressible(f"a {b.module.cls} over the batch axis mixes the samples")
        if b.module.cls == "Softmin":
            b.node("Neg", suffix="neg")
        b.node(op, {"axis": int(dim)})

    return rule


def _softmax_2d(b: _Builder, config: Config) -> None:
    b.need_image(2)
    b.node("Softmax", {"axis": 1})


def _glu(b: _Builder, config: Config) -> None:
    axis = int(config.get("dim", -1)) % b.rank
    whole = b.sizes[axis].n
    if axis == 0 or whole is None or whole % 2:
        raise _Inexpressible("a GLU over an axis of unknown or odd size cannot be cut in halves")
    before, sizes = b.value, [*b.sizes[:axis], _Size(whole // 2), *b.sizes[axis + 1 :]]
    halves = ((0, whole // 2, "value"), (whole // 2, whole, "gate"))
    names = []
    for start, end, suffix in halves:
        cut = {"starts": (start,), "ends": (end,), "axes": (axis,)}
        names.append(b.node("Slice", cut, sizes=sizes, inputs=(before,), suffix=suffix))
    gate = b.node("Sigmoid", suffix="sigmoid")
    b.node("Mul", inputs=(names[0], gate))


def _tanhshrink(b: _Builder, config: Config) -> None:
    before = b.value
    squashed = b.node("Tanh", suffix="tanh")
    b.node("Sub", inputs=(before, squashed))


def _log_sigmoid(b: _Builder, config: Config) -> None:
    b.node("Neg", suffix="neg")
    b.node("Softplus", suffix="softplus")
    b.node("Neg")


def _softplus(b: _Builder, config: Config) -> None:
    if config.get("beta", 1) != 1:
        raise _Inexpressible("a Softplus with beta has no ONNX operator")
    b.node("Softplus")


def _threshold(b: _Builder, config: Config) -> None:
    if config["value"] != 0:
        raise _Inexpressible("a Threshold to a value other than 0 has no ONNX operator")
    b.node("ThresholdedRelu", {"alpha": float(config["threshold"])})


def _gelu(b: _Builder, config: Config) -> None:
    b.node("Gelu", {"approximate": str(config.get("approximate", "none"))})


def _activation(op: str, **settings: str | float) -> Callable[[_Builder, Config], None]:
    """An operator whose attributes are the module's own (given by name) or fixed numbers."""

    def rule(b: _Builder, config: Config) -> None:
        b.node(op, {k: float(config[v] if isinstance(v, str) else v) for k, v in settings.items()})

    return rule


def _rrelu(b: _Builder, config: Config) -> None:
    b.node("LeakyRelu", {"alpha": (float(config["lower"]) + float(config["upper"])) / 2})


_ACTIVATIONS: dict[str, Callable[[_Builder, Config], None]] = {
    "CELU": _activation("Celu", alpha="alpha"),
    "ELU": _activation("Elu", alpha="alpha"),
    "GELU": _gelu,
    "Hardshrink": _activation("Shrink", lambd="lambd", bias=0.0),
    "Hardsigmoid": _activation("HardSigmoid", alpha=1 / 6, beta=0.5),
    "Hardswish": _activation("HardSwish"),
    "Hardtanh": _activation("Clip", min="min_val", max="max_val"),
    "Identity": _activation("Identity"),
    "LeakyReLU": _activation("LeakyRelu", alpha="negative_slope"),
    "LogSigmoid": _log_sigmoid,
    "Mish": _activation("Mish"),
    "RReLU": _rrelu,
    "ReLU": _activation("Relu"),
    "ReLU6": _activation("Clip", min=0.0, max=6.0),
    "SELU": _activation("Selu"),
    "SiLU": _activation("Swish"),
    "Sigmoid": _activation("Sigmoid"),
    "Softplus": _softplus,
    "Softshrink": _activation("Shrink", lambd="lambd", bias="lambd"),
    "Softsign": _activation("Softsign"),
    "Tanh": _activation("Tanh"),
    "Tanhshrink": _tanhshrink,
    "Threshold": _threshold,
    **dict.fromkeys(("AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"), _dropout),
}  # fmt: skip
_EQUIVARIANT = (*_ACTIVATIONS, "Softmax", "LogSoftmax", "Softmin", "Softmax2d")
"""Modules that treat every feature of a vector alike, so that it may be permuted before or after them."""

_RULES: dict[str, Callable[[_Builder, Config], None]] = {
    **_ACTIVATIONS,
    **{f"Conv{n}d": _conv(n) for n in _SPACE},
    **{f"ConvTranspose{n}d": _conv_transpose(n) for n in _SPACE},
    **{f"BatchNorm{n}d": _batch_norm(n) for n in _SPACE},
    **{f"InstanceNorm{n}d": _instance_norm(n) for n in _SPACE},
    **{f"MaxPool{n}d": _max_pool(n) for n in _SPACE},
    **{f"AvgPool{n}d": _avg_pool(n) for n in _SPACE},
    **{f"AdaptiveAvgPool{n}d": _adaptive_pool(n, "AveragePool") for n in _SPACE},
    **{f"AdaptiveMaxPool{n}d": _adaptive_pool(n, "MaxPool") for n in _SPACE},
    **{f"ZeroPad{n}d": _pad("constant", n) for n in _SPACE},
    **{f"ConstantPad{n}d": _pad("constant", n) for n in _SPACE},
    **{f"ReflectionPad{n}d": _pad("reflect", n) for n in _SPACE},
    **{f"ReplicationPad{n}d": _pad("edge", n) for n in _SPACE},
    **{f"CircularPad{n}d": _pad("wrap", n) for n in _SPACE},
    "Embedding": _embedding,
    "Flatten": _flatten,
    "GLU": _glu,
    "GroupNorm": _group_norm,
    "LayerNorm": _last_axes_norm("LayerNormalization"),
    "Linear": _linear,
    "LocalResponseNorm": _local_response_norm,
    "LogSoftmax": _softmax("LogSoftmax"),
    "PReLU": _prelu,
    "PixelShuffle": _pixel_shuffle,
    "RMSNorm": _last_axes_norm("RMSNormalization"),
    "Softmax": _softmax("Softmax"),
    "Softmax2d": _softmax_2d,
    "Softmin": _softmax("Softmax"),
    "Unflatten": _divided,
    **dict.fromkeys(("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"), _upsample),
}
