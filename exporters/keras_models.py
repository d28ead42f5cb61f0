"""Walks the layers of a Sequential or functional model config, nested models in place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neutral.conventions.keras_onnx import known_product
from neutral.conventions.keras_variables import CONTAINERS
from neutral.exporters.keras_builder import Builder
from neutral.exporters.keras_calls import Call, dtype_of, is_foreign
from neutral.exporters.keras_flow import Config, Flow, Malformed, Shape, Unclear
from neutral.exporters.keras_layers import apply_layer
from neutral.exporters.keras_nodes import (
    Application,
    Reference,
    TensorReference,
    declared_shapes,
    first_node,
    found_references,
    inbound_nodes,
    parse_node,
    references,
)

_DEEPEST = 64

_NORMS = {
    "BatchNormalization", "SyncBatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization",
    "Normalization", "UnitNormalization",
}  # fmt: skip
_COUNT_AXES = {*_NORMS, "MultiHeadAttention", "GroupQueryAttention", "GroupedQueryAttention"}
"""Layers whose settings number the axes of their input."""


class ModelWalk:
    """Walks one model config; nested models are walked in place."""

    def __init__(self, builder: Builder, prefix: str, depth: int) -> None:
        if depth > _DEEPEST:
            raise Malformed(f"models nested more than {_DEEPEST} deep")
        self.b, self.prefix, self.depth = builder, prefix, depth

    def run(self, spec: Config, inputs: list[Flow] | None) -> list[Flow]:
        config = spec.get("config")
        if isinstance(config, list):  # Keras 1 and early Keras 2 write a Sequential as the bare list
            config = {"layers": config}
        if not isinstance(config, Mapping) or not isinstance(config.get("layers"), list):
            raise Malformed("a model without a list of layers (subclassed models have none)")
        layers = config["layers"]
        if not all(isinstance(layer, Mapping) and isinstance(layer.get("config"), Mapping | list) for layer in layers):
            raise Malformed("a layer that is no JSON object with a config")
        if spec.get("class_name") == "Sequential":
            return self._sequential(spec, config, layers, inputs)
        return self._functional(config, layers, inputs)

    def _path(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def _input(self, layer: Config | None, shape: Any, name: str, dtype: str) -> Flow:
        if not isinstance(shape, list | tuple) or not all(n is None or (isinstance(n, int) and n >= 0) for n in shape):
            raise Unclear(f"its shape is {shape!r}")
        if layer is not None and (layer.get("sparse") or layer.get("ragged")):
            raise Unclear("it is sparse or ragged")
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
        return self._input(config, shape, _name(layer), dtype_of(config))

    def _sequential(self, spec: Config, config: Config, layers: list[Config], inputs: list[Flow] | None) -> list[Flow]:
        if inputs is not None and len(inputs) != 1:
            raise Unclear(f"it has {len(inputs)} inputs")
        flow = None if inputs is None else inputs[0]
        named: set[str] = set()
        for i, layer in enumerate(layers):
            if layer.get("class_name") == "InputLayer":
                if flow is None:
                    flow = self._input_layer(layer)
                continue
            if flow is None:
                flow = self._guessed_input(spec, config, layer)
            if _name(layer) in named:
                raise Malformed(f"two layers named {_name(layer)!r}")
            named.add(_name(layer))
            declared = _declared(layers[i + 1]) if i + 1 < len(layers) else None
            flow = self._apply(layer, self._call(layer, [flow]), {0: declared})(0)
        if flow is None:
            raise Malformed("a model without layers")
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
            raise Malformed("a Sequential that does not say the shape of its input")
        return self._input(None, shape, "input", "float32")

    def _apply(self, entry: Config, call: Call, declared: Mapping[int, Any]) -> Callable[[int], Flow]:
        """Apply a layer; the result gives its outputs by number. `declared` are their shapes if the config says."""
        try:
            if _is_model(entry):
                if any(value not in (None, False) for value in call.arguments.values()):
                    raise Unclear("it is called with arguments")
                return _numbered(ModelWalk(self.b, call.path, self.depth + 1).run(entry, list(call.inputs)))
            self._note_rank(call)
            return _numbered(apply_layer(self.b, entry, call))
        except (Unclear, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            sense = f"its settings make no sense ({type(error).__name__})"
            self.b.problem(call.path, f"{call.cls}: {error if isinstance(error, Unclear) else sense}")
            for flow in (*call.inputs, *_flows(list(call.arguments.values()))):
                self.b.taint(flow)
            return lambda index: _not_understood(call, f"{call.path}?{index}", _as_shape(declared.get(index)))

    def _note_rank(self, call: Call) -> None:
        if call.cls in _COUNT_AXES and call.inputs and call.inputs[0].shape is not None:
            self.b.ranks[call.path] = call.inputs[0].rank

    def _call(self, entry: Config, inputs: list[Flow], **more: Any) -> Call:
        name, cls = _name(entry), str(entry.get("class_name"))
        return Call(cls, name, self._path(name), entry["config"], tuple(inputs), keras2=self.b.keras2, **more)

    def _functional(self, config: Config, layers: list[Config], inputs: list[Flow] | None) -> list[Flow]:
        names = {_name(layer): i for i, layer in enumerate(layers)}
        if len(names) != len(layers):
            raise Malformed("two layers of one name")
        heads = references(config.get("input_layers"))
        flows: dict[Reference, Callable[[int], Flow]] = {}
        for position, (name, _, _) in enumerate(heads):
            if name not in names:
                raise Malformed(f"an input {name!r} that is no layer")
            if inputs is None:
                flow = self._input_layer(layers[names[name]])
            elif position < len(inputs):
                flow = inputs[position]
            else:
                raise Unclear(f"it is called with {len(inputs)} inputs")
            flows[name, 0, 0] = _always(flow)
        if inputs is not None and len(inputs) != len(heads):
            raise Unclear(f"it is called with {len(inputs)} inputs")
        waiting = [
            parse_node(i, n, node, names)
            for i, layer in enumerate(layers)
            if layer.get("class_name") != "InputLayer"
            for n, node in enumerate(inbound_nodes(layer))
        ]
        shapes = declared_shapes(layers)
        shift = {name: first_node(layers[i]) for name, i in names.items()}
        self._run(layers, waiting, flows, shapes, shift)
        outputs = []
        for name, node, tensor in references(config.get("output_layers")):
            made = flows.get((name, node - shift.get(name, 0), 0))
            if made is None:
                raise Malformed(f"an output {name!r} that nothing makes")
            outputs.append(made(tensor))
        return outputs

    def _run(
        self,
        layers: list[Config],
        waiting: list[Application],
        flows: dict[Reference, Callable[[int], Flow]],
        shapes: Mapping[Reference, Any],
        shift: Mapping[str, int],
    ) -> None:
        """Apply the layers, each as soon as its inputs are there."""

        def key(reference: Reference) -> Reference:
            return (reference[0], reference[1] - shift.get(reference[0], 0), 0)

        missing = [{key(r) for r in found_references((a.positional, dict(a.arguments)))} - set(flows) for a in waiting]
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
            name = _name(layer)

            def resolve(value: Any) -> Any:
                if isinstance(value, TensorReference):
                    return flows[key(value.reference)](value.reference[2])
                if isinstance(value, list | tuple):
                    return [resolve(v) for v in value]
                return value

            positional = resolve(application.positional)
            arguments = {k: resolve(v) for k, v in application.arguments.items()}
            constants = tuple(None if _all_flows(v) else v for v in positional)
            constants = () if all(v is None for v in constants) else constants
            declared = {t: s for (n, node, t), s in shapes.items() if (n, node) == (name, application.node)}
            made = (name, application.node, 0)
            call = self._call(layer, _flows(positional), arguments=arguments, constants=constants)
            flows[made] = self._apply(layer, call, declared)
            for user in users.get(made, ()):
                missing[user].discard(made)
                if not missing[user]:
                    ready.append(user)
        if done != len(waiting):
            raise Malformed("layers that use each other in a circle, or an output that nothing makes")


def _not_understood(call: Call, name: str, shape: Shape | None) -> Flow:
    """What a layer makes that is not understood: its axes may be in another order than in a channels-last model."""
    ranks = [len(flow.shape) for flow in call.inputs if flow.shape is not None]
    moved = call.cls in _NORMS or call.config.get("data_format") == "channels_first"
    odd = moved or any(rank > 3 for rank in ranks) or any(flow.odd for flow in call.inputs)
    joins = call.cls == "Flatten" or (shape is not None and len(shape) == 2 and _same_size(call.inputs, shape))
    joined = (odd and joins) or any(flow.joined for flow in call.inputs)
    return Flow(name, shape, opaque=True, odd=odd, joined=joined)


def _same_size(flows: Sequence[Flow], shape: Shape) -> bool:
    sizes = [known_product(flow.shape[1:]) for flow in flows if flow.shape is not None and len(flow.shape) > 2]
    return shape[1] is not None and sizes == [shape[1]]


def _name(entry: Config) -> str:
    config = entry["config"]
    name = entry.get("name") or (config.get("name") if isinstance(config, Mapping) else None)
    if not isinstance(name, str) or not name:
        name = str(entry.get("class_name") or "layer").lower()
    return name


def _is_model(entry: Config) -> bool:
    config = entry["config"]
    listed = isinstance(config, list) or (isinstance(config, Mapping) and "layers" in config)
    return str(entry.get("class_name")) in CONTAINERS and listed and not is_foreign(entry)


def _numbered(outputs: Sequence[Flow]) -> Callable[[int], Flow]:
    def output(index: int) -> Flow:
        if not 0 <= index < len(outputs):
            raise Malformed(f"output {index} of a layer that has {len(outputs)}")
        return outputs[index]

    return output


def _always(flow: Flow) -> Callable[[int], Flow]:
    return lambda index: flow


def _flows(values: Sequence[Any]) -> list[Flow]:
    found: list[Flow] = []
    for value in values:
        if isinstance(value, Flow):
            found.append(value)
        elif isinstance(value, list):
            found += _flows(value)
    return found


def _all_flows(value: Any) -> bool:
    return isinstance(value, Flow) or (isinstance(value, list) and all(_all_flows(v) for v in value))


def _declared(layer: Config) -> Any:
    build = layer.get("build_config")
    return build.get("input_shape") if isinstance(build, Mapping) else None


def _as_shape(value: Any) -> Shape | None:
    if isinstance(value, list | tuple) and value and all(n is None or isinstance(n, int) for n in value):
        return (None, *value[1:])
    return None
