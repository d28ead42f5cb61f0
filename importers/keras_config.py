"""The Keras 3 config of a model that computes a manifest's graph, on data with channels last.

>>> from neutral.schema.graph import Graph, Node, Value
>>> from neutral.schema.kinds import Dense, Parameter
>>> from neutral.schema.manifest import Manifest, Source
>>> kernel = Parameter(axes=("out", "in"), shape=(2, 3), dtype="float32", sha256="0" * 64)
>>> graph = Graph(inputs=("x",), outputs=("y",), nodes=(Node(name="n", op="Gemm", layer="fc", inputs=("x",), outputs=("y",)),),
...     values={"x": Value(axes=("batch", "feature"), shape=(None, 3)), "y": Value(axes=("batch", "feature"), shape=(None, 2))})
>>> manifest = Manifest(source=Source(framework="torch", format="pt"), weights_digest="0" * 64, graph=graph,
...     layers=(Dense(path="fc", parameters={"kernel": kernel}),))
>>> [(layer["class_name"], layer["config"]["name"]) for layer in model_config(manifest)["config"]["layers"]]
[('InputLayer', 'x'), ('Dense', 'fc')]

Each value of the graph is a Keras tensor with its axes in some order (`_Tensor.perm`). A Transpose of the graph only
changes what is known of the order; a Permute layer stands where an operator wants another one. A vector that Keras
flattened is in (position channel) order; dense kernels recorded with `channel position` axes take it as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from neutral.errors import Problem, Refused, raise_all
from neutral.schema.graph import Graph, Node
from neutral.schema.kinds import (
    GRU,
    LSTM,
    AnyLayer,
    Attention,
    BatchNorm,
    Bilinear,
    Conv,
    ConvTranspose,
    Dense,
    Depthwise,
    EinsumDense,
    Embedding,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Parameter,
    PReLU,
    RMSNorm,
    SimpleRNN,
    Unknown,
)
from neutral.schema.manifest import Manifest

Config = dict[str, Any]
Form = tuple[str, Config]
Shape = tuple[int | None, ...]

_MODELS = ("Sequential", "Functional", "Model")
_KERNELS = ("kernel", "kernel_direction", "kernel_raw")
_NO_LAYER = "a weights file, or a model of the source's own framework"


class _Inexpressible(Exception):
    """Something that no Keras layer computes. Arguments: what was found, what was expected, what to do."""

    def __init__(self, found: str, expected: str = "something that a Keras layer computes", do: str = "") -> None:
        self.found, self.expected, self.do = found, expected, do
        super().__init__(found)


# Names.


def _legal(name: str) -> str:
    """A name that Keras takes: no slash, and a first character that TensorFlow's scopes allow."""
    clean = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
    return clean if re.match(r"[A-Za-z0-9]", clean) else f"layer{clean}"


class _Names:
    def __init__(self) -> None:
        self._taken: set[str] = set()

    def fresh(self, wanted: str) -> str:
        base = name = _legal(wanted)
        count = 1
        while name in self._taken:
            name, count = f"{base}_{count}", count + 1
        self._taken.add(name)
        return name


def layer_names(manifest: Manifest) -> dict[str, str]:
    """The name that each layer of the manifest has in the Keras model, legal and unique: `{"features.0": "features.0"}`."""
    own = _own_config(manifest)
    if own is not None:
        return {layer.path: _native_path(layer, _walk(own)) for layer in manifest.layers}
    names = _Names()
    return {layer.path: names.fresh(layer.path) for layer in manifest.layers}


# A model that came from Keras 3 goes back as it was.


def _own_config(manifest: Manifest) -> Config | None:
    config = manifest.source.settings.get("config") if manifest.source.framework == "keras" else None
    if isinstance(config, Mapping) and "module" in config and isinstance(config.get("config"), Mapping):
        return dict(config)
    return None


def _walk(config: Mapping[str, Any], prefix: str = "") -> dict[str, Form]:
    """Path -> (class name, config) of every layer of a model config, nested ones too."""
    found: dict[str, Form] = {}
    inner = config.get("config")
    layers = inner.get("layers") if isinstance(inner, Mapping) else None
    for layer in layers if isinstance(layers, list) else ():
        if not isinstance(layer, Mapping) or not isinstance(layer.get("config"), Mapping):
            continue
        name = str(layer.get("name") or layer["config"].get("name"))
        path = f"{prefix}.{name}" if prefix else name
        if layer.get("class_name") in _MODELS and "layers" in layer["config"]:
            found.update(_walk(layer, path))
        else:
            found[path] = (str(layer.get("class_name")), dict(layer["config"]))
    return found


def _native_path(layer: AnyLayer, known: Mapping[str, Form]) -> str:
    for path in (layer.native_path, layer.path, layer.path.rpartition(".")[0]):
        if path and path in known:
            return path
    return layer.native_path or layer.path


# Layers: which Keras class and config a canonical layer becomes.


def _kernel(layer: AnyLayer) -> Parameter:
    for role in _KERNELS:
        if role in layer.parameters:
            return layer.parameters[role]
    raise _Inexpressible("no kernel", "a layer with a kernel")


def _sides(parameter: Parameter) -> tuple[int, int]:
    """Output and input axes of a dense kernel: how many axes belong to the output, and its size."""
    axes, shape = parameter.axes, parameter.shape
    if "in" in axes:
        cut = axes.index("in")
    elif "out" in axes:
        cut = axes.index("out") + 1
    else:
        cut = len(axes) // 2
    return cut, math.prod(shape[:cut])


def _channels(axes: Sequence[str], shape: Sequence[int]) -> int:
    """Channels of a fused axis that is recorded as (channel position), else 0."""
    found = next((n for axis, n in zip(axes, shape, strict=True) if axis in ("channel", "out_channel")), 0)
    if len(axes) > 1 and not found:
        raise _Inexpressible(f"axes {', '.join(axes)}", "one axis, or channel and position")
    return found


def _need(value: Any, what: str) -> Any:
    if value is None:
        raise _Inexpressible(f"unknown {what}", "a source that says it", "import into a template that has it")
    return value


def _spatial_rank(layer: AnyLayer) -> int:
    rank = len(_kernel(layer).shape) - 2
    if rank not in (1, 2, 3):
        raise _Inexpressible(f"a kernel with {rank} spatial axes", "1 to 3")
    return rank


def _window(layer: Conv | Depthwise | ConvTranspose, known: bool) -> Config:
    """Strides and dilation; left out where they are not known and nobody builds a model of them."""
    rank = _spatial_rank(layer)
    config: Config = {"kernel_size": list(_kernel(layer).shape[2:])}
    if known or layer.strides is not None:
        config["strides"] = list(_need(layer.strides, "strides"))
    if known or layer.dilation is not None:
        config["dilation_rate"] = list(layer.dilation or (1,) * rank)
    return config


def _pairs(layer: Conv | Depthwise | ConvTranspose) -> tuple[tuple[int, int], ...] | None:
    return None if layer.padding is None or isinstance(layer.padding, str) else layer.padding


def _centred(layer: Conv | Depthwise) -> bool:
    """Explicit padding that is what 'same' pads at stride 1."""
    kernel, dilation = _kernel(layer).shape[2:], layer.dilation or (1,) * _spatial_rank(layer)
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return set(layer.strides or (0,)) == {1} and _pairs(layer) == tuple((t // 2, t - t // 2) for t in totals)


def _conv_padding(layer: Conv | Depthwise, known: bool) -> str | None:
    """Keras' padding of a convolution; None where it takes a layer of its own in front."""
    if layer.padding_mode not in (None, "zeros"):
        raise _Inexpressible(f"padding_mode {layer.padding_mode!r}", "a convolution that pads with zeros")
    if layer.padding == "same_lower":
        raise _Inexpressible("padding that puts the odd position in front", "explicit padding, 'same' or 'causal'")
    if layer.padding == "causal" and (_spatial_rank(layer) != 1 or isinstance(layer, Depthwise)):
        raise _Inexpressible("causal padding in this layer", "it in a Conv1D")
    if isinstance(layer.padding, str):
        return layer.padding
    pairs = _need(layer.padding, "padding") if known else layer.padding
    if pairs is None or not any(n for pair in pairs for n in pair):
        return "valid"
    return "same" if _centred(layer) else None


def _conv_form(layer: Conv, known: bool) -> Form:
    rank, kernel = _spatial_rank(layer), _kernel(layer)
    config = {"filters": kernel.shape[0], **_window(layer, known), "groups": layer.groups or 1}
    return f"Conv{rank}D", {**config, "padding": _conv_padding(layer, known) or "valid", **_bias(layer)}


def _bias(layer: AnyLayer) -> Config:
    return {"use_bias": "bias" in layer.parameters}


def _depthwise_form(layer: Depthwise, known: bool) -> Form:
    rank, out = _spatial_rank(layer), _kernel(layer).shape[0]
    groups = layer.groups if known or layer.groups is not None else out
    groups = int(_need(groups, "number of groups"))
    config = {**_window(layer, known), "padding": _conv_padding(layer, known) or "valid", **_bias(layer)}
    # TensorFlow has no depthwise convolution in 3-D, nor one whose strides differ.
    if rank == 3 or len(set(layer.strides or (1,))) > 1:
        return f"Conv{rank}D", {"filters": out, "groups": groups, **config}
    return f"DepthwiseConv{rank}D", {"depth_multiplier": out // max(groups, 1), **config}


def _conv_transpose_form(layer: ConvTranspose, known: bool) -> Form:
    if (layer.groups or 1) != 1:
        raise _Inexpressible(
            f"a transposed convolution of {layer.groups} groups",
            "one group, for Keras' transposed convolutions have no groups",
            "import it to torch",
        )
    rank = _spatial_rank(layer)
    config = {"filters": _kernel(layer).shape[1], **_window(layer, known), **_bias(layer)}
    if max(config.get("strides", [1])) > 1 and max(config.get("dilation_rate", [1])) > 1:
        raise _Inexpressible("a transposed convolution with strides and dilation", "one of the two")
    if layer.padding == "same":
        extra = None if layer.output_padding is None else list(layer.output_padding)
        return f"Conv{rank}DTranspose", {**config, "padding": "same", "output_padding": extra}
    if isinstance(layer.padding, str):
        raise _Inexpressible(f"padding {layer.padding!r}", "explicit padding or 'same'")
    if layer.padding is None and not known:
        return f"Conv{rank}DTranspose", config
    extra = [max(n, 0) for n in _rest(layer)]
    strides = config.get("strides", [1] * rank)
    if any(e >= s for e, s in zip(extra, strides, strict=True)):
        raise _Inexpressible(f"output_padding {extra}", f"less than the strides {strides}")
    return f"Conv{rank}DTranspose", {**config, "padding": "valid", "output_padding": extra}


def _rest(layer: ConvTranspose) -> list[int]:
    """output_padding beyond what the padding crops again at the end of each axis."""
    pairs = _need(_pairs(layer), "padding")
    extra = layer.output_padding or (0,) * len(pairs)
    return [o - after for o, (_, after) in zip(extra, pairs, strict=True)]


def _dense_form(layer: Dense, known: bool) -> Form:
    return "Dense", {"units": _sides(_kernel(layer))[1], **_bias(layer)}


def _embedding_form(layer: Embedding, known: bool) -> Form:
    tokens, features = layer.parameters["embedding"].shape
    return "Embedding", {"input_dim": tokens, "output_dim": features}


def _affine(layer: AnyLayer) -> Config:
    return {"center": "bias" in layer.parameters, "scale": "scale" in layer.parameters}


def _eps(layer: BatchNorm | LayerNorm | GroupNorm | InstanceNorm | RMSNorm, known: bool) -> Config:
    return {"epsilon": float(_need(layer.eps, "eps"))} if known or layer.eps is not None else {}


def _batch_norm_form(layer: BatchNorm, known: bool) -> Form:
    if not {"mean", "variance"} <= set(layer.parameters):
        raise _Inexpressible("a batch norm without running statistics", "a mean and a variance")
    decay = {} if layer.decay is None else {"momentum": float(layer.decay)}
    return "BatchNormalization", {"axis": -1, **_eps(layer, known), **decay, **_affine(layer)}


def _layer_norm_form(layer: LayerNorm, known: bool) -> Form:
    sample = next(iter(layer.parameters.values()), None)
    count = layer.normalized_axes or (len(sample.shape) if sample is not None else None)
    count = int(_need(count, "number of normalized axes"))
    if sample is not None and "channel" in sample.axes:  # one axis, recorded as (channel position)
        count = 1
    axis: int | list[int] = -1 if count == 1 else list(range(-count, 0))
    return "LayerNormalization", {"axis": axis, **_eps(layer, known), **_affine(layer)}


def _group_norm_form(layer: GroupNorm, known: bool) -> Form:
    groups = int(_need(layer.groups, "number of groups"))
    return "GroupNormalization", {"groups": groups, "axis": -1, **_eps(layer, known), **_affine(layer)}


def _instance_norm_form(layer: InstanceNorm, known: bool) -> Form:
    if "mean" in layer.parameters:
        raise _Inexpressible("an instance norm with running statistics", "one that normalises by its input")
    return "GroupNormalization", {"groups": -1, "axis": -1, **_eps(layer, known), **_affine(layer)}


def _rms_norm_form(layer: RMSNorm, known: bool) -> Form:
    scale = layer.parameters["scale"]
    if len(scale.shape) != 1 and "channel" not in scale.axes:
        raise _Inexpressible(f"an RMS norm over {len(scale.shape)} axes", "one axis")
    return "RMSNormalization", {"axis": -1, **_eps(layer, known)}


def _prelu_form(layer: PReLU, known: bool) -> Form:
    return "PReLU", {}


def _recurrent_form(layer: LSTM | GRU | SimpleRNN, known: bool) -> Form:
    if "projection" in layer.parameters:
        raise _Inexpressible("an LSTM with a projection", "one without, for Keras has none", "import it to torch")
    kernel = layer.parameters["recurrent_kernel"]
    config: Config = {
        "units": kernel.shape[kernel.axes.index("unit")],
        "activation": layer.activation or "tanh",
        **_bias(layer),
        "go_backwards": bool(layer.go_backwards),
    }
    if not isinstance(layer, SimpleRNN):
        config["recurrent_activation"] = layer.recurrent_activation or "sigmoid"
    if isinstance(layer, GRU):
        config["reset_after"] = True if layer.reset_after is None else layer.reset_after
    cls = {"lstm": "LSTM", "gru": "GRU", "simple_rnn": "SimpleRNN"}[layer.kind]
    return _two_ways(layer, cls, config) if kernel.axes[0] == "direction" else (cls, config)


def _two_ways(layer: LSTM | GRU | SimpleRNN, cls: str, config: Config) -> Form:
    mode = layer.merge_mode or "concat"
    inner = {"module": "keras.layers", "class_name": cls, "config": config, "registered_name": None}
    return "Bidirectional", {"layer": inner, "merge_mode": None if mode == "none" else mode}


def _attention_form(layer: Attention, known: bool) -> Form:
    if {"extra_key", "extra_value"} & set(layer.parameters):
        raise _Inexpressible("attention with an extra key and value", "attention without")
    heads = int(_need(layer.heads, "number of heads"))
    groups = layer.kv_heads or heads
    query, value, output = (layer.parameters[f"{name}_kernel"].shape for name in ("query", "value", "output"))
    width, size = math.prod(query[:-1]), output[0]
    bias = any(role.endswith("_bias") for role in layer.parameters)
    if groups != heads:
        config = {"head_dim": width // heads, "num_query_heads": heads, "num_key_value_heads": groups}
        return "GroupQueryAttention", {**config, "use_bias": bias}
    config = {"num_heads": heads, "key_dim": width // heads, "value_dim": math.prod(value[:-1]) // heads}
    return "MultiHeadAttention", {**config, "use_bias": bias, "output_shape": None if size == query[-1] else [size]}


def _einsum_form(layer: EinsumDense, known: bool) -> Form:
    return "EinsumDense", {"equation": str(_need(layer.equation, "equation")).replace(" ", "")}


def _no_form(layer: AnyLayer, known: bool) -> Form:
    raise _Inexpressible(f"a layer of kind {layer.kind}", "a kind that Keras has", f"write {_NO_LAYER}")


_FORMS: dict[type[Any], Callable[[Any, bool], Form]] = {
    Dense: _dense_form,
    Conv: _conv_form,
    Depthwise: _depthwise_form,
    ConvTranspose: _conv_transpose_form,
    Embedding: _embedding_form,
    BatchNorm: _batch_norm_form,
    LayerNorm: _layer_norm_form,
    GroupNorm: _group_norm_form,
    InstanceNorm: _instance_norm_form,
    RMSNorm: _rms_norm_form,
    PReLU: _prelu_form,
    SimpleRNN: _recurrent_form,
    LSTM: _recurrent_form,
    GRU: _recurrent_form,
    Attention: _attention_form,
    EinsumDense: _einsum_form,
    Bilinear: _no_form,
    Unknown: _no_form,
}


def _form(layer: AnyLayer, known: bool) -> Form:
    """The Keras class and config of a layer. `known`: a model is built, so every setting must be known."""
    try:
        return _FORMS[type(layer)](layer, known)
    except (KeyError, ValueError, IndexError) as error:
        raise _Inexpressible(f"parameters that do not make a {layer.kind} ({error})", "those of its kind") from None


def layer_classes(manifest: Manifest) -> dict[str, Form]:
    """Path -> (Keras class name, its config) for each layer with weights, with a graph or without one.

    A PReLU's config also has `alpha_rank`, which follows from its input and not from its settings.
    """
    weighed = [layer for layer in manifest.layers if any(not p.state for p in layer.parameters.values())]
    own = _own_config(manifest)
    if own is not None:
        known = _walk(own)
        return {
            layer.path: _unwrapped(known.get(_native_path(layer, known), (layer.native or layer.kind, {})))
            for layer in weighed
        }
    names = layer_names(manifest)
    found: dict[str, Form] = {}
    if manifest.graph is not None:
        builder = _Builder(manifest, manifest.graph)
        builder.run()
        found = builder.forms
    problems: list[Problem] = []
    for layer in weighed:
        if layer.path in found:
            continue
        try:
            cls, config = _form(layer, False)
        except _Inexpressible as reason:
            problems.append(Problem(layer.path, reason.found, reason.expected, reason.do))
        else:
            if isinstance(layer, Dense | Conv | Depthwise | ConvTranspose) and layer.activation:
                config = {**config, "activation": layer.activation}
            found[layer.path] = cls, {"name": names[layer.path], **config}
    raise_all(Refused, problems)
    return {layer.path: _unwrapped(found[layer.path]) for layer in weighed}


def _unwrapped(form: Form) -> Form:
    """A Bidirectional layer as the layer inside it, the way readers describe one; a class by its own name."""
    cls, config = form
    if cls == "GroupQueryAttention":  # the public name of keras.layers.GroupedQueryAttention
        return "GroupedQueryAttention", config
    if cls != "Bidirectional":
        return form
    inner = config["layer"]
    more = {"name": config.get("name"), "bidirectional": True, "merge_mode": config["merge_mode"]}
    return str(inner["class_name"]), {**inner["config"], **more}


# The graph.


@dataclass(frozen=True)
class _Tensor:
    """A Keras tensor that holds a value of the graph.

    Keras axis i is the value's axis perm[i]. `channels`: a vector in (position channel) order. `nonnegative`: no
    element is below zero, so that padding with zeros does not change a maximum.
    """

    reference: tuple[str, int, int]
    shape: Shape
    perm: tuple[int, ...]
    dtype: str = "float32"
    channels: int = 0
    nonnegative: bool = False

    @property
    def rank(self) -> int:
        return len(self.perm)

    @property
    def json(self) -> Config:
        shape = [self.shape[axis] for axis in self.perm]
        config = {"shape": shape, "dtype": self.dtype, "keras_history": list(self.reference)}
        return {"class_name": "__keras_tensor__", "config": config}


def _last(rank: int) -> tuple[int, ...]:
    """The order of axes with channels last."""
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


def _plain(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))


@dataclass
class _Entry:
    """One Keras layer, applied as many times as it has inbound nodes."""

    cls: str
    config: Config
    nodes: list[tuple[list[Any], Config]] = field(default_factory=list)


class _Builder:
    def __init__(self, manifest: Manifest, graph: Graph) -> None:
        self.graph = graph
        self.layers: dict[str, AnyLayer] = {layer.path: layer for layer in manifest.layers}
        self.paths = layer_names(manifest)
        self.names = _Names()
        for layer in manifest.layers:
            if layer.parameters:
                self.names.fresh(self.paths[layer.path])
        self.entries: dict[str, _Entry] = {}
        self.tensors: dict[str, _Tensor] = {}
        self.constants: dict[str, float] = {}
        self.forms: dict[str, Form] = {}
        self.problems: list[Problem] = []
        self.used: dict[str, list[Node]] = {}
        self.skipped: set[str] = set()
        self._permuted: dict[tuple[tuple[str, int, int], tuple[int, ...], int], _Tensor] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self.used.setdefault(value, []).append(node)
        dtypes = {p.dtype for layer in manifest.layers for p in layer.parameters.values() if "float" in p.dtype}
        self.open = False
        """Some size beside the batch is not known to Keras, whatever the graph found out later."""
        self.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        if self.dtype not in ("float64", "float32", "float16", "bfloat16"):
            self.dtype = "float32"

    # Building blocks.

    def add(
        self,
        name: str,
        cls: str,
        config: Config,
        args: Sequence[Any],
        like: _Tensor,
        kwargs: Config | None = None,
    ) -> _Tensor:
        """Apply a new layer of no weights; `like` describes its output."""
        name = self.names.fresh(name)
        self.entries[name] = _Entry(cls, {"name": name, **self._policy(), **config})
        return self._apply(name, args, kwargs or {}, like)

    def _policy(self) -> Config:
        return {} if self.dtype == "float32" else {"dtype": self.dtype}

    def _apply(self, name: str, args: Sequence[Any], kwargs: Config, like: _Tensor) -> _Tensor:
        entry = self.entries[name]
        entry.nodes.append((list(args), kwargs))
        return replace(like, reference=(name, len(entry.nodes) - 1, 0))

    def weigh(
        self, node: Node, form: Form, args: Sequence[Any], like: _Tensor, kwargs: Config | None = None
    ) -> _Tensor:
        """Apply the layer that a node names; the same one twice if the graph does."""
        path = str(node.layer)
        name = self.paths[path]
        entry = _Entry(form[0], {"name": name, **self._policy(), **form[1]})
        known = self.entries.setdefault(name, entry)
        if (known.cls, known.config) != (entry.cls, entry.config):
            raise _Inexpressible("two uses of it that need different settings", "the same settings in each")
        self.forms[path] = known.cls, known.config
        return self._apply(name, args, kwargs or {}, like)

    def layer(self, node: Node) -> AnyLayer:
        if node.layer is None or node.layer not in self.layers:
            raise _Inexpressible("no layer", f"the layer of this {node.op}", "export the model again")
        return self.layers[node.layer]

    def name(self, node: Node) -> str:
        return self.paths.get(str(node.layer), node.name)

    def shape(self, value: str) -> Shape:
        described = self.graph.values[value]
        return described.shape if described.shape is not None else (None,) * len(described.axes)

    def like(self, node: Node, perm: tuple[int, ...], of: _Tensor, output: int = 0) -> _Tensor:
        """A tensor for an output of a node, in the order `perm`."""
        shape = self.shape(node.outputs[output])
        if len(shape) != len(perm):
            raise _Inexpressible(f"an output of rank {len(shape)}", f"rank {len(perm)}")
        dtype = of.dtype if "float" in of.dtype else self.dtype
        return _Tensor(("", 0, 0), shape, perm, dtype)

    def input(self, node: Node, index: int = 0) -> _Tensor:
        if index >= len(node.inputs):
            raise _Inexpressible(f"{len(node.inputs)} inputs", f"at least {index + 1}")
        value = node.inputs[index]
        if value in self.constants:
            raise _Inexpressible("a constant", "a tensor that depends on the model's input")
        return self.tensors[value]

    def only(self, node: Node) -> _Tensor:
        if len(node.inputs) != 1:
            raise _Inexpressible(f"{len(node.inputs)} inputs", "one")
        return self.input(node)

    def order(self, tensor: _Tensor, perm: tuple[int, ...]) -> _Tensor:
        """The tensor with its axes in the order `perm`."""
        if tensor.perm == perm:
            return tensor
        key = (tensor.reference, perm, 0)
        if key not in self._permuted:
            if perm[0] != 0 or tensor.perm[0] != 0:
                raise _Inexpressible("a batch axis that is not the first", "batches in front")
            dims = [tensor.perm.index(axis) for axis in perm[1:]]
            name = f"{tensor.reference[0]}.permute"
            made = self.add(name, "Permute", {"dims": dims}, [tensor.json], replace(tensor, perm=perm))
            self._permuted[key] = made
        return self._permuted[key]

    def vector(self, tensor: _Tensor, channels: int) -> _Tensor:
        """A vector with its elements in (position channel) order of `channels`, or in the graph's order if 0."""
        if tensor.channels == channels:
            return tensor
        if tensor.channels:
            tensor = self._regroup(tensor, tensor.channels, True)
        return self._regroup(tensor, channels, False) if channels else tensor

    def _regroup(self, tensor: _Tensor, channels: int, back: bool) -> _Tensor:
        size = tensor.shape[1]
        if size is None or size % channels:
            raise _Inexpressible(f"a vector of {size} elements", f"a multiple of {channels} channels")
        key = (tensor.reference, (channels,), int(back))
        if key not in self._permuted:
            base, grid = tensor.reference[0], [size // channels, channels] if back else [channels, size // channels]
            matrix = replace(tensor, shape=(tensor.shape[0], *grid), perm=(0, 1, 2), channels=0)
            matrix = self.add(f"{base}.grid", "Reshape", {"target_shape": grid}, [tensor.json], matrix)
            turned = replace(matrix, shape=(tensor.shape[0], *reversed(grid)))
            turned = self.add(f"{base}.turn", "Permute", {"dims": [2, 1]}, [matrix.json], turned)
            flat = replace(tensor, channels=0 if back else channels)
            made = self.add(f"{base}.vector", "Reshape", {"target_shape": [size]}, [turned.json], flat)
            self._permuted[key] = made
        return self._permuted[key]

    def pinned(self, tensor: _Tensor, sizes: Sequence[int]) -> _Tensor:
        """The tensor, its sizes (in Keras' order, without the batch) told to Keras by a Reshape if need be."""
        if not self.open:
            return tensor
        name = f"{tensor.reference[0]}.shape"
        return self.add(name, "Reshape", {"target_shape": list(sizes)}, [tensor.json], tensor)

    def image(self, tensor: _Tensor) -> _Tensor:
        return self.order(tensor, _last(tensor.rank))

    def plain(self, tensor: _Tensor) -> _Tensor:
        return self.vector(self.order(tensor, _plain(tensor.rank)), 0)

    # The whole.

    def run(self) -> None:
        for value in self.graph.inputs:
            self.tensors[value] = self._input_tensor(value)
        for node in self.graph.nodes:
            if node.name in self.skipped:
                continue
            try:
                rule = _OPERATORS.get(node.op)
                if rule is None:
                    raise _Inexpressible(f"the operator {node.op}")
                if any(value not in self.tensors and value not in self.constants for value in node.inputs):
                    continue  # it follows a node that was refused already
                outputs = rule(self, node)
            except _Inexpressible as reason:
                self._refuse(node.layer or node.name, reason)
            except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
                self._refuse(
                    node.layer or node.name, _Inexpressible(f"a {node.op} whose settings make no sense ({error})")
                )
            else:
                self.tensors.update(zip(node.outputs, outputs, strict=False))

    def _refuse(self, where: str, reason: _Inexpressible) -> None:
        do = reason.do or f"write {_NO_LAYER}"
        self.problems.append(Problem(where, reason.found, reason.expected, do))

    def _input_tensor(self, value: str) -> _Tensor:
        described = self.graph.values[value]
        rank, shape = len(described.axes), self.shape(value)
        perm = _last(rank) if "channel" in described.axes else _plain(rank)
        tokens = any(node.op == "Gather" for node in self.used.get(value, ()))
        dtype = "int32" if tokens and "int" not in described.dtype else described.dtype
        if shape[1:] and described.shape is None:
            width = self._width(value)
            shape = (None, width, *shape[2:]) if "channel" in described.axes else (*shape[:-1], width)
        name = self.names.fresh(value)
        batch = [None, *(shape[axis] for axis in perm[1:])]
        self.open |= None in batch[1:]
        self.entries[name] = _Entry("InputLayer", {"name": name, "batch_shape": batch, "dtype": dtype})
        return _Tensor((name, 0, 0), (None, *shape[1:]), perm, dtype)

    def _width(self, value: str) -> int | None:
        """The features or channels that the first layer behind a value takes."""
        for node in self.used.get(value, ()):
            layer = self.layers.get(node.layer or "")
            if isinstance(layer, Dense):
                kernel = _kernel(layer)
                return math.prod(kernel.shape[_sides(kernel)[0] :])
            if isinstance(layer, Conv | Depthwise):
                return _kernel(layer).shape[1] * (layer.groups or 1)
            if isinstance(layer, ConvTranspose):
                return _kernel(layer).shape[0]
            if isinstance(layer, LSTM | GRU | SimpleRNN):
                return layer.parameters["input_kernel"].shape[-1]
            if layer is None and node.op not in ("Flatten", "Reshape", "Transpose"):
                found = next((self._width(output) for output in node.outputs), None)
                if found is not None:
                    return found
        return None

    def outputs(self) -> list[_Tensor]:
        made = []
        for value in self.graph.outputs:
            if value not in self.tensors:
                continue
            tensor, axes = self.tensors[value], self.graph.values[value].axes
            last = len(axes) > 2 and axes[1] == "channel"
            made.append(self.image(tensor) if last else self.plain(tensor))
        return made

    def flattened(self, value: str) -> tuple[int, int | None]:
        """What stands behind a Flatten: channels that a dense kernel is recorded with, and its number of inputs."""
        waiting, size, channels = list(self.used.get(value, ())), None, 0
        while waiting:
            node = waiting.pop(0)
            layer = self.layers.get(node.layer or "")
            if isinstance(layer, Dense):
                kernel = _kernel(layer)
                cut = _sides(kernel)[0]
                size = size or math.prod(kernel.shape[cut:])
                channels = channels or _channels(kernel.axes[cut:], kernel.shape[cut:])
            elif layer is not None and node.op in ("BatchNormalization", "LayerNormalization", "PRelu"):
                vector = next(p for p in layer.parameters.values() if not p.state)
                size = size or (math.prod(vector.shape) if math.prod(vector.shape) > 1 else None)
                channels = channels or _channels(vector.axes, vector.shape)
                waiting += [user for output in node.outputs for user in self.used.get(output, ())]
            elif node.op in _SHAPELESS:
                waiting += [user for output in node.outputs for user in self.used.get(output, ())]
        return channels, size


_SHAPELESS = {
    "Relu", "LeakyRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "Tanh", "Gelu", "Softplus", "Softsign", "Swish",
    "Mish", "HardSwish", "Exp", "Clip", "ThresholdedRelu", "Shrink", "Identity", "Softmax", "LogSoftmax", "Neg", "Dropout",
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Mean",
}  # fmt: skip


# Operators without weights.


def _same(tensor: _Tensor, **changes: Any) -> _Tensor:
    return replace(tensor, **{"nonnegative": False, **changes})


def _function(name: str, nonnegative: bool = False) -> Callable[[_Builder, Node], list[_Tensor]]:
    def rule(b: _Builder, node: Node) -> list[_Tensor]:
        x = b.only(node)
        like = _same(x, nonnegative=nonnegative)
        return [b.add(b.name(node), "Activation", {"activation": name}, [x.json], like)]

    return rule


def _number(node: Node, key: str, default: float | None = None) -> float:
    value = node.attributes.get(key, default)
    if not isinstance(value, int | float):
        raise _Inexpressible(f"{key} {value!r}", "a number")
    return float(value)


def _scaled(b: _Builder, name: str, x: _Tensor, scale: float, offset: float = 0.0) -> _Tensor:
    return b.add(name, "Rescaling", {"scale": scale, "offset": offset}, [x.json], _same(x))


def _relu(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.only(node)
    return [b.add(b.name(node), "ReLU", {}, [x.json], _same(x, nonnegative=True))]


def _leaky_relu(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.only(node)
    slope = _number(node, "alpha", 0.01)
    if slope < 0:
        raise _Inexpressible(f"a negative slope of {slope}", "one of 0 or more")
    config = {"negative_slope": slope}
    return [b.add(b.name(node), "LeakyReLU", config, [x.json], _same(x))]


def _elu(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.only(node)
    return [b.add(b.name(node), "ELU", {"alpha": _number(node, "alpha", 1.0)}, [x.json], _same(x))]


def _celu(b: _Builder, node: Node) -> list[_Tensor]:
    x, alpha = b.only(node), _number(node, "alpha", 1.0)
    if alpha == 1.0:
        return _function("celu")(b, node)
    inner = _scaled(b, f"{b.name(node)}.in", x, 1 / alpha)
    unit = b.add(b.name(node), "ELU", {"alpha": 1.0}, [inner.json], _same(x))
    return [_scaled(b, f"{b.name(node)}.out", unit, alpha)]


def _clip(b: _Builder, node: Node) -> list[_Tensor]:
    low, high = node.attributes.get("min"), node.attributes.get("max")
    x = b.only(node)
    if low == 0 and isinstance(high, int | float) and high >= 0:
        like = _same(x, nonnegative=True)
        return [b.add(b.name(node), "ReLU", {"max_value": float(high)}, [x.json], like)]
    if low == 0 and high is None:
        return _relu(b, node)
    if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
        # min + relu(x - min) up to max - min
        shifted = _scaled(b, f"{b.name(node)}.shift", x, 1.0, -float(low))
        config = {"max_value": float(high) - float(low)}
        bounded = b.add(b.name(node), "ReLU", config, [shifted.json], _same(x))
        return [_scaled(b, f"{b.name(node)}.back", bounded, 1.0, float(low))]
    raise _Inexpressible(f"a Clip from {low} to {high}", "two bounds")


def _thresholded(b: _Builder, node: Node) -> list[_Tensor]:
    x, alpha = b.only(node), _number(node, "alpha", 1.0)
    if alpha < 0:
        raise _Inexpressible(f"a threshold of {alpha}", "one of 0 or more")
    return [b.add(b.name(node), "ReLU", {"threshold": alpha}, [x.json], _same(x, nonnegative=True))]


def _hard_sigmoid(b: _Builder, node: Node) -> list[_Tensor]:
    alpha, beta = _number(node, "alpha", 0.2), _number(node, "beta", 0.5)
    if beta == 0.5 and abs(alpha - 1 / 6) < 1e-7:
        return _function("hard_sigmoid", True)(b, node)
    line = _scaled(b, f"{b.name(node)}.line", b.only(node), alpha, beta)
    like = _same(line, nonnegative=True)
    return [b.add(b.name(node), "ReLU", {"max_value": 1.0}, [line.json], like)]


def _gelu(b: _Builder, node: Node) -> list[_Tensor]:
    if node.attributes.get("approximate", "none") == "none":
        return _function("gelu")(b, node)
    # 0.5 x (1 + tanh(u)) = x sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x^3)
    x, name, factor = b.only(node), b.name(node), 2 * math.sqrt(2 / math.pi)
    square = b.add(f"{name}.square", "Multiply", {}, [[x.json, x.json]], _same(x, nonnegative=True))
    series = _scaled(b, f"{name}.series", square, factor * 0.044715, factor)
    product = b.add(f"{name}.product", "Multiply", {}, [[x.json, series.json]], _same(x))
    gate = b.add(f"{name}.gate", "Activation", {"activation": "sigmoid"}, [product.json], _same(x))
    return [b.add(name, "Multiply", {}, [[x.json, gate.json]], _same(x))]


def _shrink(b: _Builder, node: Node) -> list[_Tensor]:
    kinds = {(0.5, 0.0): "hard_shrink", (0.5, 0.5): "soft_shrink"}
    key = (_number(node, "lambd", 0.5), _number(node, "bias", 0.0))
    if key not in kinds:
        raise _Inexpressible(f"a Shrink of {key[0]} and {key[1]}", "0.5, and 0 or 0.5")
    return _function(kinds[key])(b, node)


def _neg(b: _Builder, node: Node) -> list[_Tensor]:
    return [_scaled(b, b.name(node), b.only(node), -1.0)]


def _softmax(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.only(node)
    axis = int(_number(node, "axis", -1)) % x.rank
    place = x.perm.index(axis)
    if node.op == "LogSoftmax":
        if place != x.rank - 1:
            x = b.order(x, (*(a for a in x.perm if a != axis), axis))
        named = {"activation": "log_softmax"}
        return [b.add(b.name(node), "Activation", named, [x.json], _same(x))]
    config = {"axis": -1 if place == x.rank - 1 else place}
    return [b.add(b.name(node), "Softmax", config, [x.json], _same(x, nonnegative=True))]


_DROPOUTS: dict[str, tuple[str, str]] = {
    "Dropout": ("Dropout", "rate"),
    "AlphaDropout": ("AlphaDropout", "rate"),
    "GaussianDropout": ("GaussianDropout", "rate"),
    "GaussianNoise": ("GaussianNoise", "stddev"),
    **{f"SpatialDropout{n}D": (f"SpatialDropout{n}D", "rate") for n in (1, 2, 3)},
    **{f"Dropout{n}d": (f"SpatialDropout{n}D", "rate") for n in (1, 2, 3)},
}


def _identity(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.only(node)
    cls, key = _DROPOUTS.get(str(node.attributes.get("origin")), ("", ""))
    amount = node.attributes.get(key)
    if not cls or not isinstance(amount, int | float):
        return [x]
    if cls.startswith("Spatial"):
        if x.rank != int(cls[-2]) + 2:
            return [x]
        x = b.image(x) if "channel" in b.graph.values[node.outputs[0]].axes else b.plain(x)
    return [b.add(b.name(node), cls, {key: float(amount)}, [x.json], x)]


def _constant(b: _Builder, node: Node) -> list[_Tensor]:
    b.constants[node.outputs[0]] = _number(node, "value_float")
    return []


def _cast(b: _Builder, node: Node) -> list[_Tensor]:
    x, to = b.only(node), str(node.attributes.get("to"))
    if "float" in to and "float" not in x.dtype:
        return [replace(_scaled(b, b.name(node), x, 1.0), dtype=b.dtype)]
    if x.reference[0] in {b.tensors[value].reference[0] for value in b.graph.inputs} and "int" in to:
        return [x]
    raise _Inexpressible(f"a Cast from {x.dtype} to {to}", "a Cast of the model's input")


_MERGES = {"Add": "Add", "Sub": "Subtract", "Mul": "Multiply", "Max": "Maximum", "Min": "Minimum", "Mean": "Average"}


def _merge(b: _Builder, node: Node) -> list[_Tensor]:
    if any(value in b.constants for value in node.inputs):
        return [_with_number(b, node)]
    tensors = [b.input(node, i) for i in range(len(node.inputs))]
    if len(tensors) == 1 and node.op in ("Max", "Min", "Mean"):
        return tensors
    if len({x.rank for x in tensors}) != 1:
        raise _Inexpressible("inputs of different ranks", "inputs of one rank")
    if node.op not in _MERGES:
        raise _Inexpressible(f"a {node.op} of two tensors")
    tensors = _aligned(b, tensors)
    nonnegative = node.op != "Sub" and all(x.nonnegative for x in tensors)
    like = replace(b.like(node, tensors[0].perm, tensors[0]), channels=tensors[0].channels, nonnegative=nonnegative)
    return [b.add(b.name(node), _MERGES[node.op], {}, [[x.json for x in tensors]], like)]


def _aligned(b: _Builder, tensors: Sequence[_Tensor]) -> list[_Tensor]:
    rank = tensors[0].rank
    orders = {x.perm for x in tensors}
    perm = tensors[0].perm if len(orders) == 1 else _last(rank)
    moved = [b.order(x, perm) for x in tensors]
    channels = {x.channels for x in moved}
    return [b.vector(x, min(channels)) for x in moved] if len(channels) > 1 else moved


def _with_number(b: _Builder, node: Node) -> _Tensor:
    first = node.inputs[0] in b.constants
    x = b.input(node, int(first))
    number = b.constants[node.inputs[int(not first)]]
    if node.op == "Max" and number == 0:
        return b.add(b.name(node), "ReLU", {}, [x.json], _same(x, nonnegative=True))
    scale, offset = {
        "Add": (1.0, number),
        "Mul": (number, 0.0),
        "Sub": (-1.0, number) if first else (1.0, -number),
        "Div": (None, 0.0) if first or number == 0 else (1.0 / number, 0.0),
    }.get(node.op, (None, 0.0))
    if scale is None:
        raise _Inexpressible(f"a {node.op} of a tensor and {number}")
    return _scaled(b, b.name(node), x, scale, offset)


# Operators that move elements.


def _transpose(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.only(node)
    order = node.attributes.get("perm")
    if not isinstance(order, tuple) or sorted(int(str(n)) for n in order) != list(range(x.rank)):
        raise _Inexpressible(f"perm {order!r}", f"an order of {x.rank} axes")
    axes = [int(str(n)) for n in order]
    x = b.vector(x, 0)
    return [replace(x, shape=b.shape(node.outputs[0]), perm=tuple(axes.index(axis) for axis in x.perm))]


def _product(shape: Sequence[int | None]) -> int | None:
    return math.prod(n or 0 for n in shape) if all(n is not None for n in shape) else None


def _flatten(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.only(node)
    if x.rank == 2:
        return [x]
    if int(_number(node, "axis", 1)) != 1:
        raise _Inexpressible(f"a Flatten from axis {node.attributes.get('axis')}", "axis 1")
    wanted, size = b.flattened(node.outputs[0])
    channels, positions = x.shape[1], _product(x.shape[2:])
    size = _product(x.shape[1:]) or size
    if positions is None and size is not None and channels:
        positions = size // channels
    trivial = 1 in (channels, positions)
    if x.perm != _plain(x.rank):
        x = b.image(x) if wanted or trivial else b.order(x, _plain(x.rank))
    order = wanted if x.perm == _last(x.rank) and not trivial else 0
    if order and order != channels:
        raise _Inexpressible(f"a kernel recorded for {order} channels", f"one for {channels}")
    like = _Tensor(("", 0, 0), (x.shape[0], size), (0, 1), x.dtype, order, x.nonnegative)
    if b.open or _product(x.shape[1:]) is None:
        if size is None:
            raise _Inexpressible(
                "a Flatten of unknown size", "a dense layer behind it that tells", "import into a template"
            )
        config = {"target_shape": [size]}
        return [b.add(b.name(node), "Reshape", config, [x.json], like)]
    return [b.add(b.name(node), "Flatten", {}, [x.json], like)]


def _reshape(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.only(node)
    target = node.attributes.get("shape")
    if not isinstance(target, tuple) or not all(isinstance(n, int) for n in target):
        raise _Inexpressible(f"shape {target!r}", "a list of sizes")
    sizes = [int(str(n)) for n in target]
    if len(sizes) == 1 and x.rank > 2:
        return _flatten(b, node.model_copy(update={"attributes": {"axis": 1}}))
    sizes = [x.shape[i + 1] if n == 0 and i + 1 < x.rank else n for i, n in enumerate(sizes)]  # type: ignore[misc]
    if any(n is None for n in sizes) or sizes.count(-1) > 1:
        raise _Inexpressible(f"shape {target!r} of sizes that are not known", "at most one unknown size")
    rank, image = len(sizes) + 1, "channel" in b.graph.values[node.outputs[0]].axes
    if x.rank == 2 and x.channels and rank > 2 and sizes[0] == x.channels:
        config = {"target_shape": [*sizes[1:], sizes[0]]}
        return [b.add(b.name(node), "Reshape", config, [x.json], b.like(node, _last(rank), x))]
    if x.perm == _last(x.rank) and x.rank > 3 and rank == 3 and image and sizes[0] == x.shape[1]:
        config = {"target_shape": [sizes[1], sizes[0]]}
        return [b.add(b.name(node), "Reshape", config, [x.json], b.like(node, _last(rank), x))]
    x = b.plain(x)
    like = replace(b.like(node, _plain(rank), x), nonnegative=x.nonnegative)
    return [b.add(b.name(node), "Reshape", {"target_shape": sizes}, [x.json], like)]


def _unsqueeze(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.plain(b.only(node))
    users = b.used.get(node.outputs[0], [])
    if node.attributes.get("axes") != (1,) or x.rank != 2 or [u.op for u in users] != ["Expand"]:
        raise _Inexpressible("an Unsqueeze", "one that an Expand repeats")
    expand = users[0]
    shape = expand.attributes.get("shape")
    if not isinstance(shape, tuple) or len(shape) != 3 or (shape[0], shape[2]) != (1, 1):
        raise _Inexpressible(f"an Expand to {shape!r}", "one along the time axis")
    like = replace(b.like(expand, (0, 1, 2), x), nonnegative=x.nonnegative)
    made = b.add(b.name(expand), "RepeatVector", {"n": int(str(shape[1]))}, [x.json], like)
    b.tensors[expand.outputs[0]] = made
    b.skipped.add(expand.name)
    return []


def _concat(b: _Builder, node: Node) -> list[_Tensor]:
    tensors = [b.vector(b.input(node, i), 0) for i in range(len(node.inputs))]
    if len({x.rank for x in tensors}) != 1:
        raise _Inexpressible("inputs of different ranks", "inputs of one rank")
    tensors = _aligned(b, tensors)
    perm = tensors[0].perm
    place = perm.index(int(_number(node, "axis")) % len(perm))
    like = replace(b.like(node, perm, tensors[0]), nonnegative=all(x.nonnegative for x in tensors))
    if len(tensors) == 1:
        return tensors
    config = {"axis": -1 if place == len(perm) - 1 else place}
    return [b.add(b.name(node), "Concatenate", config, [[x.json for x in tensors]], like)]


def _spaced(b: _Builder, node: Node, axes: set[int]) -> _Tensor:
    """The input with the named axes between the first and the last."""
    x = b.only(node)
    if not 3 <= x.rank <= 5 or 0 in axes:
        raise _Inexpressible(f"a {node.op} along axes {sorted(axes)} of {x.rank}", "spatial axes")
    if axes & {x.perm[0], x.perm[-1]}:
        x = b.order(x, _last(x.rank) if 1 not in axes else _plain(x.rank))
    if axes & {x.perm[0], x.perm[-1]}:
        raise _Inexpressible(f"a {node.op} along axes {sorted(axes)}", "spatial axes alone")
    return x


def _pad(b: _Builder, node: Node) -> list[_Tensor]:
    pads = node.attributes.get("pads")
    x = b.only(node)
    if node.attributes.get("mode", "constant") != "constant" or _number(node, "value", 0.0) != 0.0:
        raise _Inexpressible(f"padding of mode {node.attributes.get('mode')}", "padding with zeros")
    if not isinstance(pads, tuple) or len(pads) != 2 * x.rank:
        raise _Inexpressible(f"pads {pads!r}", f"{2 * x.rank} numbers")
    sizes = [int(str(n)) for n in pads]
    pairs = dict(enumerate(zip(sizes[: x.rank], sizes[x.rank :], strict=True)))
    x = _spaced(b, node, {axis for axis, pair in pairs.items() if any(pair)})
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    wanted = [pairs[axis] for axis in x.perm[1:-1]]
    grown = [(max(p, 0), max(q, 0)) for p, q in wanted]
    cut = [(max(-p, 0), max(-q, 0)) for p, q in wanted]
    if any(n for pair in cut for n in pair):
        x = _bordered(b, f"{b.name(node)}.crop", "Cropping", cut, x, like)
    return [_bordered(b, b.name(node), "ZeroPadding", grown, x, like)]


def _bordered(b: _Builder, name: str, cls: str, pairs: Sequence[tuple[int, int]], x: _Tensor, like: _Tensor) -> _Tensor:
    key = "padding" if cls == "ZeroPadding" else "cropping"
    value: Any = list(pairs[0]) if len(pairs) == 1 else [list(pair) for pair in pairs]
    return b.add(name, f"{cls}{len(pairs)}D", {key: value}, [x.json], like)


def _slice(b: _Builder, node: Node) -> list[_Tensor]:
    lists = [node.attributes.get(key) for key in ("axes", "starts", "ends")]
    if node.attributes.get("steps") not in (None, (1,) * len(lists[0] or ())) or not all(  # type: ignore[arg-type]
        isinstance(values, tuple) and len(values) == len(lists[0] or ())  # type: ignore[arg-type]
        for values in lists
    ):
        raise _Inexpressible("a Slice with steps", "one that crops")
    rank = b.only(node).rank
    axes, starts, ends = ([int(str(n)) for n in values or ()] for values in lists)  # type: ignore[union-attr]
    crops: dict[int, tuple[int, int]] = {}
    for axis, start, end in zip(axes, starts, ends, strict=True):
        size = b.shape(node.inputs[0])[axis % rank]
        if (start < 0 or 0 < end < 2**31 - 1) and size is None:
            raise _Inexpressible("a Slice of an axis of unknown size", "borders to crop")
        begin = start + (size or 0) if start < 0 else start
        crops[axis % rank] = begin, -end if end < 0 else max((size or end) - end, 0)
    x = _spaced(b, node, {axis for axis, pair in crops.items() if any(pair)})
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    pairs = [crops.get(axis, (0, 0)) for axis in x.perm[1:-1]]
    return [_bordered(b, b.name(node), "Cropping", pairs, x, like)]


def _resize(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.image(b.only(node))
    mode, coordinates = node.attributes.get("mode"), node.attributes.get("coordinate_transformation_mode")
    scales, sizes = node.attributes.get("scales"), node.attributes.get("sizes")
    space = x.rank - 2
    if isinstance(sizes, tuple):
        made = [int(str(n)) for n in sizes[-space:]]
        known = [n for n in x.shape[2:] if n]
        factors = [float(m) / n for m, n in zip(made, known, strict=False)] if len(known) == space else []
    else:
        factors = [float(str(f)) for f in scales[-space:]] if isinstance(scales, tuple) else []
    whole = bool(factors) and all(f == int(f) and f >= 1 for f in factors)
    linear = mode == "linear" and coordinates == "half_pixel"
    if not whole or not (
        (mode == "nearest" and coordinates in ("asymmetric", "half_pixel")) or (linear and space == 2)
    ):
        raise _Inexpressible(
            f"a Resize ({mode}, {coordinates}) by {factors or scales}", "whole factors, nearest or bilinear"
        )
    if mode == "nearest" and coordinates == "asymmetric" and node.attributes.get("nearest_mode", "floor") != "floor":
        raise _Inexpressible(f"nearest_mode {node.attributes.get('nearest_mode')!r}", "floor")
    config: Config = {"size": int(factors[0]) if space == 1 else [int(f) for f in factors]}
    if space == 2:
        config["interpolation"] = "bilinear" if linear else "nearest"
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    return [b.add(b.name(node), f"UpSampling{space}D", config, [x.json], like)]


# Pooling.


def _numbers(node: Node, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = node.attributes.get(key, default)
    value = default if value is None else value
    if not isinstance(value, tuple) or len(value) != len(default):
        raise _Inexpressible(f"{key} {value!r}", f"{len(default)} numbers")
    return tuple(int(str(n)) for n in value)


def _pool(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.image(b.only(node))
    space = x.rank - 2
    if space not in (1, 2, 3):
        raise _Inexpressible(f"a pooling of {space} axes", "1 to 3")
    kernel = _numbers(node, "kernel_shape", (0,) * space)
    strides = _numbers(node, "strides", (1,) * space)
    pads = _numbers(node, "pads", (0,) * (2 * space))
    pairs = list(zip(pads[:space], pads[space:], strict=True))
    if set(_numbers(node, "dilations", (1,) * space)) != {1}:
        raise _Inexpressible("a pooling with dilation", "one without")
    average, automatic = node.op == "AveragePool", node.attributes.get("auto_pad", "NOTSET")
    if automatic not in ("NOTSET", "VALID", "SAME_UPPER"):
        raise _Inexpressible(f"auto_pad {automatic}", "SAME_UPPER, or explicit pads")
    space_sizes = x.shape[2:]
    if node.attributes.get("ceil_mode"):
        _ceil_is_floor(space_sizes, kernel, strides, pairs)
    counted = bool(node.attributes.get("count_include_pad", 0)) and average
    padding, name = "valid", b.name(node)
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    if automatic == "SAME_UPPER":
        if counted:
            raise _Inexpressible("automatic padding that is counted", "padding that is not")
        padding = "same"
    elif any(pads):
        if not counted and all(
            pair == _same_pads(n, k, s) for n, k, s, pair in zip(space_sizes, kernel, strides, pairs, strict=True)
        ):
            padding = "same"
        elif counted or (not average and x.nonnegative):
            grown = replace(
                x,
                shape=(
                    *x.shape[:2],
                    *(None if n is None else n + sum(p) for n, p in zip(space_sizes, pairs, strict=True)),
                ),
            )
            x = _bordered(b, f"{name}.pad", "ZeroPadding", pairs, x, grown)
        else:
            raise _Inexpressible(
                f"{'an average' if average else 'a maximum'} with padding {[list(pair) for pair in pairs]}",
                "values known to be not negative" if not average else "padding that is counted",
            )
    cls = f"{'Average' if average else 'Max'}Pooling{space}D"
    config = {"pool_size": _per_axis(kernel), "strides": _per_axis(strides), "padding": padding}
    return [b.add(name, cls, config, [x.json], like)]


def _per_axis(sizes: tuple[int, ...]) -> int | list[int]:
    return sizes[0] if len(sizes) == 1 else list(sizes)


def _same_pads(n: int | None, k: int, s: int) -> tuple[int, int] | None:
    """What 'same' pads on an axis of n; n does not matter at stride 1."""
    if n is None and s != 1:
        return None
    total = k - 1 if s == 1 else max((-(-(n or 0) // s) - 1) * s + k - (n or 0), 0)
    return total // 2, total - total // 2


def _ceil_is_floor(
    sizes: Sequence[int | None], kernel: Sequence[int], strides: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> None:
    for n, k, s, pair in zip(sizes, kernel, strides, pairs, strict=True):
        if s != 1 and (n is None or (n + sum(pair) - k) % s):
            raise _Inexpressible("a pooling with ceil_mode", "windows that fit the size of the input")


def _global_pool(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.image(b.only(node))
    space = x.rank - 2
    if space not in (1, 2, 3):
        raise _Inexpressible(f"a pooling of {space} axes", "1 to 3")
    cls = f"Global{'Average' if node.op == 'GlobalAveragePool' else 'Max'}Pooling{space}D"
    users = b.used.get(node.outputs[0], [])
    if [user.op for user in users] == ["Flatten"] and node.outputs[0] not in b.graph.outputs:
        like = _Tensor(("", 0, 0), (x.shape[0], x.shape[1]), (0, 1), x.dtype, 0, x.nonnegative)
        made = b.add(b.name(users[0]), cls, {}, [x.json], like)
        b.tensors[users[0].outputs[0]] = made
        b.skipped.add(users[0].name)
        return []
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    return [b.add(b.name(node), cls, {"keepdims": True}, [x.json], like)]


# Operators with weights.


def _gemm(b: _Builder, node: Node) -> list[_Tensor]:
    layer, x = b.layer(node), b.only(node)
    form = _form(layer, True)
    kernel = _kernel(layer)
    cut = _sides(kernel)[0]
    taken = _channels(kernel.axes[cut:], kernel.shape[cut:])
    given = _channels(kernel.axes[:cut], kernel.shape[:cut])
    if x.rank > 2:
        if x.perm[-1] != x.rank - 1:
            x = b.order(x, _plain(x.rank))
        if taken or given:
            raise _Inexpressible("a kernel recorded in channels, on a value that is no vector", "a vector")
        return [b.weigh(node, form, [x.json], b.like(node, x.perm, x))]
    x = b.vector(x, taken)
    like = replace(b.like(node, (0, 1), x), channels=given)
    like = replace(like, shape=(like.shape[0], form[1]["units"]))
    return [b.weigh(node, form, [x.json], like)]


def _conv(b: _Builder, node: Node) -> list[_Tensor]:
    layer, x = b.layer(node), b.image(b.only(node))
    if not isinstance(layer, Conv | Depthwise):
        raise _Inexpressible(f"a layer of kind {layer.kind}", "a convolution")
    cls, config = _form(layer, True)
    name, like = b.name(node), b.like(node, x.perm, x)
    pairs = _pairs(layer)
    if pairs is not None and _conv_padding(layer, True) is None:
        sizes = [None if n is None else n + sum(pair) for n, pair in zip(x.shape[2:], pairs, strict=True)]
        x = _bordered(b, f"{name}.pad", "ZeroPadding", pairs, x, replace(x, shape=(*x.shape[:2], *sizes)))
    strides = config["strides"]
    apart = max(strides) > 1 and max(config["dilation_rate"]) > 1
    if not apart:
        return [b.weigh(node, (cls, config), [x.json], like)]
    # Keras has no convolution with both; one with stride 1, of which every n-th position is kept, is the same.
    if config["padding"] != "valid":
        raise _Inexpressible("strides and dilation with 'same' padding", "explicit padding")
    config = {**config, "strides": [1] * len(strides)}
    dense = replace(like, shape=(*like.shape[:2], *(None,) * len(strides)))
    y = b.weigh(node, (cls, config), [x.json], dense)
    pick = {"pool_size": _per_axis((1,) * len(strides)), "strides": _per_axis(tuple(strides)), "padding": "valid"}
    return [b.add(f"{name}.pick", f"MaxPooling{len(strides)}D", pick, [y.json], like)]


def _conv_transpose(b: _Builder, node: Node) -> list[_Tensor]:
    layer, x = b.layer(node), b.image(b.only(node))
    if not isinstance(layer, ConvTranspose):
        raise _Inexpressible(f"a layer of kind {layer.kind}", "a transposed convolution")
    form = _form(layer, True)
    like = b.like(node, x.perm, x)
    pairs = _pairs(layer)
    if pairs is None:
        return [b.weigh(node, form, [x.json], like)]
    crops = [(before, max(-rest, 0)) for (before, _), rest in zip(pairs, _rest(layer), strict=True)]
    if any(n < 0 for pair in pairs for n in pair):
        raise _Inexpressible(f"padding {[list(pair) for pair in pairs]}", "padding of 0 or more")
    if not any(n for pair in crops for n in pair):
        return [b.weigh(node, form, [x.json], like)]
    whole = [None if n is None else n + sum(pair) for n, pair in zip(like.shape[2:], crops, strict=True)]
    y = b.weigh(node, form, [x.json], replace(like, shape=(*like.shape[:2], *whole)))
    return [_bordered(b, f"{b.name(node)}.crop", "Cropping", crops, y, like)]


def _gather(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.plain(b.only(node))
    form = _form(b.layer(node), True)
    return [b.weigh(node, form, [x.json], replace(b.like(node, _plain(x.rank + 1), x), dtype=b.dtype))]


def _unweighed(b: _Builder, node: Node) -> AnyLayer | None:
    """The layer of a norm, or None if it has no weights and its settings stand in the node."""
    return None if node.layer is None else b.layer(node)


def _channel_norm(b: _Builder, node: Node) -> list[_Tensor]:
    x, layer = b.only(node), _unweighed(b, node)
    if layer is None:
        if node.op == "BatchNormalization":
            raise _Inexpressible("a batch norm without statistics", "a mean and a variance")
        groups = -1 if node.op == "InstanceNormalization" else int(_number(node, "num_groups"))
        settings: dict[str, Any] = {
            "groups": groups,
            "epsilon": _number(node, "epsilon"),
            "center": False,
            "scale": False,
        }
        x = b.image(x) if x.rank > 2 else b.vector(x, 0)
        return [b.add(b.name(node), "GroupNormalization", {"axis": -1, **settings}, [x.json], _same(x))]
    form = _form(layer, True)
    x = b.image(x) if x.rank > 2 else b.vector(x, _recorded(layer))
    return [b.weigh(node, form, [x.json], _same(x))]


def _recorded(layer: AnyLayer) -> int:
    """The channels of a layer with one weight per element of a flattened image, else 0."""
    parameter = next((p for p in layer.parameters.values() if not p.state), None)
    return 0 if parameter is None else _channels(parameter.axes, parameter.shape)


def _last_norm(b: _Builder, node: Node) -> list[_Tensor]:
    x, layer = b.only(node), _unweighed(b, node)
    count = -int(_number(node, "axis", -1))
    settings: Config
    if layer is None:
        if node.op == "RMSNormalization":
            raise _Inexpressible("an RMS norm without a scale", "one with a scale")
        x = b.order(x, _plain(x.rank)) if x.rank > 2 else x
        axis: int | list[int] = -1 if count == 1 else list(range(-count, 0))
        settings = {"axis": axis, "epsilon": _number(node, "epsilon"), "center": False, "scale": False}
        return [b.add(b.name(node), "LayerNormalization", settings, [x.json], _same(x))]
    form = _form(layer, True)
    if x.rank == 2:
        x = b.vector(x, _recorded(layer))
        return [b.weigh(node, form, [x.json], _same(x))]
    if form[1]["axis"] != -1 and len(form[1]["axis"]) > 2:  # over the whole image: the weights follow its axes
        if len(form[1]["axis"]) != x.rank - 1:
            raise _Inexpressible(f"a norm over {len(form[1]['axis'])} axes of {x.rank}", "all but the batch axis")
        first, *rest = next(iter(layer.parameters.values())).shape
        x = b.pinned(b.image(x), [*rest, first])
        return [b.weigh(node, form, [x.json], _same(x))]
    if form[1]["axis"] != -1 or x.perm[-1] != x.rank - 1:
        x = b.order(x, _plain(x.rank))
    return [b.weigh(node, form, [x.json], _same(x))]


def _prelu(b: _Builder, node: Node) -> list[_Tensor]:
    layer, x = b.layer(node), b.only(node)
    slope = layer.parameters["slope"]
    x = b.image(x) if x.rank > 2 else b.vector(x, _recorded(layer))
    if math.prod(slope.shape) == 1:
        shared: list[int] | None = list(range(1, x.rank))
    elif len(slope.shape) == 1:
        shared = list(range(1, x.rank - 1)) or None
    else:
        shared = [i + 1 for i, n in enumerate(slope.shape[1:]) if n == 1 and x.rank > 2 and x.shape[i + 2] != 1] or None
        if not shared and len(slope.shape) == x.rank - 1:
            x = b.pinned(x, [*slope.shape[1:], slope.shape[0]])
    made = b.weigh(node, ("PReLU", {"shared_axes": shared}), [x.json], _same(x))
    cls, config = b.forms[str(node.layer)]
    b.forms[str(node.layer)] = cls, {**config, "alpha_rank": x.rank - 1}
    return [made]


def _recurrent(b: _Builder, node: Node) -> list[_Tensor]:
    layer = b.layer(node)
    cls, config = _form(layer, True)
    x, *states = (b.plain(b.input(node, i)) for i in range(len(node.inputs)))
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
    first = b.weigh(node, (cls, config), [x.json], b.like(node, _plain(ranks[0]), x), kwargs)
    name, index, _ = first.reference
    others = [
        replace(b.like(node, _plain(rank), x, i), reference=(name, index, i))
        for i, rank in enumerate(ranks[1:], start=1)
    ]
    return [first, *others]


def _attention(b: _Builder, node: Node) -> list[_Tensor]:
    tensors = [b.plain(b.input(node, i)) for i in range(len(node.inputs))]
    if len(tensors) not in (1, 3):
        raise _Inexpressible(f"{len(tensors)} inputs", "a query, a key and a value")
    query, key, value = tensors * 3 if len(tensors) == 1 else tensors
    arguments = [query.json, value.json]  # Keras takes the value before the key
    if key != value:
        arguments.append(key.json)
    kwargs = {"use_causal_mask": True} if node.attributes.get("is_causal") else {}
    form = _form(b.layer(node), True)
    if len(node.outputs) > 1:
        raise _Inexpressible("attention scores as an output", "the result alone")
    return [b.weigh(node, form, arguments, b.like(node, (0, 1, 2), query), kwargs)]


def _einsum(b: _Builder, node: Node) -> list[_Tensor]:
    x = b.plain(b.only(node))
    cls, config = _form(b.layer(node), True)
    shape = b.shape(node.outputs[0])
    bias = node.attributes.get("bias_axes")
    if "bias" in b.layer(node).parameters and not bias:
        raise _Inexpressible("a bias whose axes are not known", "bias_axes", "export the model again")
    config = {**config, "output_shape": list(shape[1:]), "bias_axes": bias or None}
    return [b.weigh(node, (cls, config), [x.json], b.like(node, _plain(len(shape)), x))]


_OPERATORS: dict[str, Callable[[_Builder, Node], list[_Tensor]]] = {
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _function("selu"),
    "Sigmoid": _function("sigmoid", True),
    "Tanh": _function("tanh"),
    "Softplus": _function("softplus", True),
    "Softsign": _function("softsign"),
    "Swish": _function("silu"),
    "Mish": _function("mish"),
    "HardSwish": _function("hard_silu"),
    "Exp": _function("exponential", True),
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Clip": _clip,
    "ThresholdedRelu": _thresholded,
    "Shrink": _shrink,
    "Neg": _neg,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Identity": _identity,
    "Constant": _constant,
    "Cast": _cast,
    **dict.fromkeys((*_MERGES, "Div"), _merge),
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "Resize": _resize,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalMaxPool": _global_pool,
    "GlobalAveragePool": _global_pool,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gather": _gather,
    "BatchNormalization": _channel_norm,
    "GroupNormalization": _channel_norm,
    "InstanceNormalization": _channel_norm,
    "LayerNormalization": _last_norm,
    "RMSNormalization": _last_norm,
    "PRelu": _prelu,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    "Attention": _attention,
    "Einsum": _einsum,
}


def model_config(manifest: Manifest) -> Config:
    """The config of a complete Keras 3 model: `keras.saving.deserialize_keras_object` builds it.

    Raises `Refused` with everything that no Keras layer computes.
    """
    own = _own_config(manifest)
    if own is not None:
        return own
    if manifest.graph is None:
        raise Refused(
            Problem(
                "graph", "an archive without a graph", "one that says how the layers are wired", f"write {_NO_LAYER}"
            )
        )
    builder = _Builder(manifest, manifest.graph)
    builder.run()
    outputs: list[_Tensor] = []
    try:
        outputs = builder.outputs()
    except _Inexpressible as reason:
        builder.problems.append(Problem("output", reason.found, reason.expected, reason.do))
    raise_all(Refused, builder.problems)
    return _assembled(builder, outputs)


def _assembled(b: _Builder, outputs: Sequence[_Tensor]) -> Config:
    layers = []
    for name, entry in b.entries.items():
        described = {"module": "keras.layers", "class_name": entry.cls, "config": entry.config, "registered_name": None}
        nodes = [{"args": args, "kwargs": kwargs} for args, kwargs in entry.nodes]
        layers.append({**described, "name": name, "inbound_nodes": nodes})
    if _is_chain(b, outputs):
        plain = [{k: v for k, v in layer.items() if k not in ("name", "inbound_nodes")} for layer in layers]
        return _model("Sequential", {"name": b.names.fresh("model"), "layers": plain})
    heads = [list(b.tensors[value].reference) for value in b.graph.inputs]
    tails = [list(tensor.reference) for tensor in outputs]
    config = {"name": b.names.fresh("model"), "trainable": True, "layers": layers}
    return _model("Model", {**config, "input_layers": _alone(heads), "output_layers": _alone(tails)})


def _alone(references: list[Any]) -> list[Any]:
    """A single reference without a list around it, as Keras has it: it warns where it wants a list and gets a tensor."""
    return references[0] if len(references) == 1 else references


def _model(cls: str, config: Config) -> Config:
    return {"module": "keras", "class_name": cls, "config": config, "registered_name": None}


def _is_chain(b: _Builder, outputs: Sequence[_Tensor]) -> bool:
    """True if each layer takes the whole output of the one before it, and nothing else."""
    if len(b.graph.inputs) != 1 or len(outputs) != 1:
        return False
    before: list[Any] | None = None
    for name, entry in b.entries.items():
        if before is not None:
            arguments = [argument for args, _ in entry.nodes for argument in args]
            only = arguments[0] if len(entry.nodes) == len(arguments) == 1 and not entry.nodes[0][1] else None
            if not isinstance(only, dict) or only["config"]["keras_history"] != before:
                return False
        before = [name, 0, 0]
    return before == list(outputs[0].reference)
