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

Each value of the graph is a Keras tensor with its axes in some order (`KerasTensor.perm`). A Transpose of the graph only
changes what is known of the order; a Permute layer stands where an operator wants another one. A vector that Keras
flattened is in (position channel) order; dense kernels recorded with `channel position` axes take it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neutral.conventions.keras_config import is_keras2, is_model
from neutral.conventions.keras_variables import CONTAINERS
from neutral.errors import Problem, Refused, raise_all
from neutral.importers.keras_builder import Builder
from neutral.importers.keras_forms import NO_LAYER, Form, Inexpressible, form_of
from neutral.importers.keras_names import Names
from neutral.importers.keras_operators import add_nodes
from neutral.importers.keras_tensor import Config, KerasTensor
from neutral.schema.graph import Graph
from neutral.schema.kinds import (
    AnyLayer,
    Conv,
    ConvTranspose,
    Dense,
    Depthwise,
)
from neutral.schema.manifest import Manifest


def layer_names(manifest: Manifest) -> dict[str, str]:
    """The name that each layer of the manifest has in the Keras model, legal and unique: `{"features.0": "features.0"}`."""
    own = _own_config(manifest)
    if own is not None:
        return {layer.path: _native_path(layer, _walk(own)) for layer in manifest.layers}
    names = Names()
    return {layer.path: names.fresh(layer.path) for layer in manifest.layers}


def _own_config(manifest: Manifest) -> Config | None:
    """The source's own config, where it can be written again: one of Keras 2 only if nothing else is known."""
    settings = manifest.source.settings
    config = settings.get("config") if manifest.source.framework == "keras" else None
    if not isinstance(config, Mapping) or "module" not in config or not isinstance(config.get("config"), Mapping):
        return None
    rebuilt = manifest.graph is not None and is_keras2(config, settings.get("keras_version"))
    return None if rebuilt else dict(config)


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
        if str(layer.get("class_name")) in CONTAINERS and "layers" in layer["config"]:
            found.update(_walk(layer, path))
        else:
            found[path] = (str(layer.get("class_name")), dict(layer["config"]))
    return found


def _native_path(layer: AnyLayer, known: Mapping[str, Form]) -> str:
    for path in (layer.native_path, layer.path, layer.path.rpartition(".")[0]):
        if path and path in known:
            return path
    return layer.native_path or layer.path


def layer_classes(manifest: Manifest) -> dict[str, Form]:
    """Path -> (Keras class name, its config) for each layer with weights, with a graph or without one.

    A PReLU's config also has `alpha_rank`, which follows from its input and not from its settings.
    """
    weighed = [layer for layer in manifest.layers if any(not p.state for p in layer.parameters.values())]
    own = _own_config(manifest)
    if own is not None:
        known = _walk(own)
        return {
            layer.path: unwrapped(known.get(_native_path(layer, known), (layer.native or layer.kind, {})))
            for layer in weighed
        }
    names = layer_names(manifest)
    found = {} if manifest.graph is None else _built(manifest, manifest.graph).forms
    problems: list[Problem] = []
    for layer in weighed:
        if layer.path in found:
            continue
        try:
            cls, config = form_of(layer, False)
        except Inexpressible as reason:
            problems.append(reason.problem(layer.path))
        else:
            if isinstance(layer, Dense | Conv | Depthwise | ConvTranspose) and layer.activation:
                config = {**config, "activation": layer.activation}
            found[layer.path] = cls, {"name": names[layer.path], **config}
    raise_all(Refused, problems)
    return {layer.path: unwrapped(found[layer.path]) for layer in weighed}


def unwrapped(form: Form) -> Form:
    """A Bidirectional layer as the layer inside it, the way readers describe one; a class by its own name."""
    cls, config = form
    if cls == "GroupQueryAttention":  # the public name of keras.layers.GroupedQueryAttention
        return "GroupedQueryAttention", config
    if cls != "Bidirectional":
        return form
    inner = config["layer"]
    more = {"name": config.get("name"), "bidirectional": True, "merge_mode": config["merge_mode"]}
    return str(inner["class_name"]), {**inner["config"], **more}


def model_config(manifest: Manifest) -> Config:
    """The config of a complete Keras 3 model: `keras.saving.deserialize_keras_object` builds it.

    Raises `Refused` with everything that no Keras layer computes.
    """
    own = _own_config(manifest)
    if own is not None and is_model(own):
        return own
    builder, outputs = layers_of_graph(manifest)
    raise_all(Refused, builder.problems)
    return _assembled(builder, outputs)


def layers_of_graph(manifest: Manifest) -> tuple[Builder, list[KerasTensor]]:
    """The Keras layers that compute a manifest's graph, and its outputs; what none computes is in `problems`."""
    if manifest.graph is None:
        wanted = "one that says how the layers are wired"
        raise Refused(
            Problem("graph", f"an archive without a graph ({manifest.no_graph()})", wanted, f"write {NO_LAYER}")
        )
    builder = _built(manifest, manifest.graph)
    outputs: list[KerasTensor] = []
    try:
        outputs = builder.outputs()
    except Inexpressible as reason:
        builder.problems.append(reason.problem("output"))
    return builder, outputs


def _built(manifest: Manifest, graph: Graph) -> Builder:
    builder = Builder(manifest, graph, layer_names(manifest))
    add_nodes(builder)
    return builder


def _assembled(b: Builder, outputs: Sequence[KerasTensor]) -> Config:
    layers = []
    for name, entry in b.entries.items():
        described = {"module": "keras.layers", "class_name": entry.cls, "config": entry.config, "registered_name": None}
        nodes = [{"args": args, "kwargs": kwargs} for args, kwargs in entry.nodes]
        layers.append({**described, "name": name, "inbound_nodes": nodes})
    if is_chain(b, outputs):
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


def is_chain(b: Builder, outputs: Sequence[KerasTensor]) -> bool:
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
