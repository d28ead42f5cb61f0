"""The topology of a TensorFlow.js model that computes a manifest's graph, on data with channels last.

The graph becomes Keras' layers first (`keras_config`); each of these becomes one TensorFlow.js layer, or several that
compute the same (`tfjs_layers`). The topology is in the words of Keras 2, which are those of TensorFlow.js.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neutral.errors import Problem, Refused, named, raise_all
from neutral.importers.keras_builder import Builder, Entry
from neutral.importers.keras_config import layers_of_graph, unwrapped
from neutral.importers.keras_forms import Form, Inexpressible
from neutral.importers.keras_tensor import Config, KerasTensor
from neutral.importers.tfjs_layers import LAYERS
from neutral.importers.tfjs_steps import Call, Step
from neutral.importers.tfjs_weighed import WEIGHED, WITHOUT
from neutral.schema.kinds import GRU, LSTM, AnyLayer, Depthwise, SimpleRNN
from neutral.schema.manifest import Manifest

_Reference = tuple[str, int, int]

KERAS_VERSION = "2.15.0"
"""The last Keras 2, whose words these are."""

_STANDING_FOR = {"hard_sigmoid_0.2": "hard_sigmoid"}
"""What TensorFlow.js calls hard_sigmoid has that name in Keras 3 as another function."""


@dataclass
class _Layer:
    cls: str
    config: Config
    nodes: list[list[_Reference]] = field(default_factory=list)


@dataclass
class Translated:
    """TensorFlow.js' layers by name, and by path what each layer of the manifest became."""

    builder: Builder
    outputs: list[KerasTensor]
    layers: dict[str, _Layer] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    final: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def translated(manifest: Manifest) -> Translated:
    """The manifest's graph as TensorFlow.js' layers; what they do not compute is in `problems`."""
    problems = list(_unfit(manifest))
    builder, outputs = layers_of_graph(_plain(manifest))
    found = Translated(builder, outputs, problems=problems + _renamed(builder.problems))
    paths = {builder.paths[path]: path for path in builder.layers if path in builder.paths}
    kinds = {name: builder.layers[path] for name, path in paths.items()}
    for name, entry in builder.entries.items():
        try:
            _add(found, name, entry, kinds.get(name), paths.get(name, ""))
        except Inexpressible as reason:
            found.problems.append(reason.problem(paths.get(name, name)))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            what = f"settings of {entry.cls} that make no sense ({type(error).__name__})"
            found.problems.append(Problem(paths.get(name, name), what, "those of a layer of TensorFlow.js"))
    return found


def _plain(manifest: Manifest) -> Manifest:
    """The manifest without its own framework's config, its activations by names that Keras' layers take."""
    layers = tuple(_standing(layer) for layer in manifest.layers)
    return manifest.model_copy(update={"source": manifest.source.model_copy(update={"settings": {}}), "layers": layers})


def _standing(layer: AnyLayer) -> AnyLayer:
    if not isinstance(layer, LSTM | GRU | SimpleRNN):
        return layer
    told = {key: getattr(layer, key, None) for key in ("activation", "recurrent_activation")}
    return layer.model_copy(update={key: _STANDING_FOR[name] for key, name in told.items() if name in _STANDING_FOR})


def _unfit(manifest: Manifest) -> Sequence[Problem]:
    """Weights and activations that TensorFlow.js' layers cannot have, whatever the graph."""
    problems = []
    for layer in manifest.layers:
        dtypes = sorted({p.dtype for p in layer.parameters.values() if not p.state} - {"float32"})
        if dtypes:
            found = f"weights of dtype {', '.join(dtypes)}"
            problems.append(Problem(named(layer.path), found, "float32, which TensorFlow.js' layers have alone"))
        for key in ("activation", "recurrent_activation"):
            if isinstance(layer, LSTM | GRU | SimpleRNN) and getattr(layer, key, None) == "hard_sigmoid":
                found = f"the {key} hard_sigmoid (x/6 + 0.5, as in Keras 3)"
                problems.append(Problem(named(layer.path), found, "0.2x + 0.5, which TensorFlow.js calls by that name"))
    return problems


def _renamed(problems: Sequence[Problem]) -> list[Problem]:
    return [
        Problem(
            p.where,
            p.found,
            p.expected.replace("Keras 3's", "TensorFlow.js'").replace("a Keras layer", "a layer of TensorFlow.js"),
            p.do,
        )
        for p in problems
    ]


def _add(found: Translated, name: str, entry: Entry, layer: AnyLayer | None, path: str) -> None:
    """One Keras layer, each of the times that it is applied."""
    if entry.cls == "InputLayer":
        found.layers[name] = _Layer("InputLayer", _input_config(entry.config))
        found.final[name, 0] = (name, 0)
        return
    for index, (args, kwargs) in enumerate(entry.nodes):
        tensors = [*_tensors(args), *_tensors(kwargs.get("initial_state", []))]
        if set(kwargs) - {"initial_state"}:
            raise Inexpressible(f"a call with {', '.join(sorted(kwargs))}", "a call without")
        shapes = tuple(tuple(tensor["config"]["shape"]) for tensor in tensors)
        made = steps(Call(entry.cls, entry.config, shapes, isinstance(layer, Depthwise)))
        inputs = _apart(found, name, [_reference(tensor) for tensor in tensors])
        names = {
            step.suffix: found.builder.names.fresh(f"{name}.{step.suffix}") if step.suffix else name for step in made
        }
        nodes: dict[str, int] = {}
        for step in made:
            here = found.layers.setdefault(
                names[step.suffix], _Layer(step.cls, {"name": names[step.suffix], **step.config})
            )
            nodes[step.suffix] = len(here.nodes)
            here.nodes.append([_taken(taken, inputs, names, nodes) for taken in step.inputs])
        found.final[name, index] = (names[made[-1].suffix], nodes[made[-1].suffix])
        if path and entry.cls in WEIGHED:
            main = next(step for step in made if not step.suffix)
            rank = {"alpha_rank": len(shapes[0]) - 1} if main.cls == "PReLU" else {}
            found.forms[path] = main.cls, {"name": name, **main.config, **rank}


def steps(call: Call) -> tuple[Step, ...]:
    """The layers of TensorFlow.js that compute a call, inputs first; the last one gives its output.

    >>> steps(Call("Activation", {"name": "a", "activation": "silu"}, ((None, 4),)))
    (Step(suffix='', cls='Activation', config={'activation': 'swish'}, inputs=('',)),)
    >>> [step.cls for step in steps(Call("ZeroPadding1D", {"name": "p", "padding": [2, 1]}, ((None, 8, 3),)))]
    ['Reshape', 'ZeroPadding2D', 'Reshape']
    """
    rule = LAYERS.get(call.cls) or WEIGHED.get(call.cls)
    if rule is None:
        what = WITHOUT.get(call.cls, f"Keras' {call.cls}")
        raise Inexpressible(what, "a layer that TensorFlow.js has", "keep the model in its framework, or in Keras")
    return rule(call)


def _apart(found: Translated, name: str, inputs: Sequence[_Reference]) -> list[_Reference]:
    """The inputs of a call, a second use of one as a copy: TensorFlow.js forgets a tensor too soon that a layer takes twice.

    Its executor counts by how many layers a tensor is taken, and counts down by how many times (`executor.ts`).
    """
    apart: list[_Reference] = []
    for reference in inputs:
        if reference in apart:
            copy = found.builder.names.fresh(f"{name}.again")
            found.layers[copy] = _Layer("Activation", {"name": copy, "activation": "linear"}, [[reference]])
            reference = (copy, 0, _INNER)
        apart.append(reference)
    return apart


_INNER = -1
"""Marks a reference to a step of the same call, which is not to be looked up."""


def _taken(taken: str, inputs: Sequence[_Reference], names: Mapping[str, str], nodes: Mapping[str, int]) -> _Reference:
    if taken == "" or taken.isdecimal():
        return inputs[int(taken or 0)]
    suffix = "" if taken == "=" else taken
    return (names[suffix], nodes[suffix], _INNER)


def _input_config(config: Config) -> Config:
    dtype = str(config.get("dtype", "float32"))
    shape = list(config["batch_shape"])
    return {
        "name": config["name"],
        "batch_input_shape": shape,
        "dtype": "int32" if "int" in dtype else "float32",
        "sparse": False,
    }


def _tensors(args: Any) -> list[Any]:
    if isinstance(args, Mapping):
        return [args]
    return [tensor for arg in args for tensor in _tensors(arg)]


def _reference(tensor: Any) -> _Reference:
    name, node, index = tensor["config"]["keras_history"]
    return (name, node, index)


def topology(manifest: Manifest) -> Config:
    """What stands in `modelTopology`. Raises `Refused` with all that TensorFlow.js does not compute."""
    found = translated(manifest)
    raise_all(Refused, found.problems)
    model = found.builder.names.fresh("model")
    layers = []
    for name, layer in found.layers.items():
        nodes = [[[*_resolved(found, reference), {}] for reference in node] for node in layer.nodes]
        layers.append({"class_name": layer.cls, "config": layer.config, "name": name, "inbound_nodes": nodes})
    heads = [list(found.builder.tensors[value].reference) for value in found.builder.graph.inputs]
    tails = [_resolved(found, tensor.reference) for tensor in found.outputs]
    config: Config
    if _is_chain(layers, heads, tails):
        plain = [{key: layer[key] for key in ("class_name", "config")} for layer in layers]
        config = {"class_name": "Sequential", "config": {"name": model, "layers": plain}}
    else:
        whole = {"name": model, "trainable": True, "layers": layers, "input_layers": heads, "output_layers": tails}
        config = {"class_name": "Functional", "config": whole}
    return {"keras_version": KERAS_VERSION, "backend": "tensorflow", "model_config": config}


def _resolved(found: Translated, reference: _Reference) -> list[Any]:
    name, node, index = reference
    if index == _INNER:
        return [name, node, 0]
    return [*found.final[name, node], index]


def _is_chain(layers: Sequence[Mapping[str, Any]], heads: Sequence[Any], tails: Sequence[Any]) -> bool:
    """True if each layer takes the whole output of the one before it, and nothing else."""
    if len(heads) != 1 or len(tails) != 1 or layers[0]["class_name"] != "InputLayer" or len(layers) < 2:
        return False
    expected = [layers[0]["name"], 0, 0, {}]
    for layer in layers[1:]:
        if layer["inbound_nodes"] != [[expected]]:
            return False
        expected = [layer["name"], 0, 0, {}]
    return bool(tails[0] == expected[:3])


def layer_classes(manifest: Manifest) -> dict[str, Form]:
    """Path -> (TensorFlow.js' class, its config) of each layer with weights. Raises `Refused` with all that has none.

    A PReLU's config also has `alpha_rank`, which follows from its input and not from its settings.
    """
    found = translated(manifest)
    weighed = [layer.path for layer in manifest.layers if any(not p.state for p in layer.parameters.values())]
    told = {problem.where for problem in found.problems}
    idle = "a layer that the graph does not use"
    found.problems += [
        Problem(named(path), idle, "one that it does")
        for path in weighed
        if path not in found.forms and not told & {path, named(path)}
    ]
    raise_all(Refused, found.problems)
    return {path: unwrapped(found.forms[path]) for path in weighed}


def layer_names(manifest: Manifest) -> dict[str, str]:
    """The name that each layer of the manifest has in the model."""
    from neutral.importers.keras_config import layer_names as names

    return names(_plain(manifest))
