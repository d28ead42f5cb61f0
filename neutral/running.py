"""Runs models in their own frameworks, and nothing else that a file may hold.

    model = keras_model(Path("lenet5.keras"), manifest)
    outputs = model.run([np.zeros((2, 28, 28, 1), np.float32)])

A file that can be run is a program. Before a framework gets it, the file is looked through, and what may do more than
compute is refused: Lambda and custom classes, pickled classes other than torch.nn's own, operators that read files or
call Python. Everything runs on the CPU, where frameworks agree in float32.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neutral.containers.files import SourceFile
from neutral.containers.keras_file import open_keras
from neutral.containers.onnx import open_onnx
from neutral.containers.zip import ZipSource
from neutral.conventions.keras_config import is_keras2, renamed_since_keras2
from neutral.errors import NeutralError, Problem, Refused, Unsupported, printable
from neutral.schema.graph import Graph
from neutral.schema.manifest import Manifest

Array = npt.NDArray[Any]
Axes = tuple[str, ...]

RUNS = "a .keras or whole-model .h5, a SavedModel, a .pt2, an .onnx, a pickled module of torch.nn's classes, or a file with a graph"


@dataclass(frozen=True)
class Port:
    """An input as the framework has it: sizes that are not known are None. `axes` are those of the graph's value."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    axes: Axes | None = None


@dataclass(frozen=True)
class Runnable:
    """A loaded model. `run` takes and gives arrays in the framework's own order of axes.

    `last`: images have their channels last. `inputs` is None if the file does not say what it takes; `outputs` are the
    axes of the graph's outputs, None if there is no graph. `example`: the shape of each input that the file was made with.
    """

    where: str
    last: bool
    inputs: tuple[Port, ...] | None
    outputs: tuple[Axes, ...] | None
    run: Callable[[Sequence[Array]], list[Array]]
    manifest: Manifest | None = None
    example: tuple[tuple[int, ...], ...] | None = None


def installed(framework: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(framework) is not None


def _need(where: Path, *packages: str) -> None:
    for package in packages:
        if not installed(package):
            raise Unsupported(
                Problem(
                    str(where), f"{package} missing", "it, to run the model", f"install neutral-weights[{packages[0]}]"
                )
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what the native code of a framework logs to stderr, which nothing in Python can switch off."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def framework_errors(where: str, doing: str) -> Iterator[None]:
    """What a framework raises, as a refusal in one line; what it logs is dropped."""
    try:
        with quiet():
            yield
    except (NeutralError, MemoryError):
        raise
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        told = printable(f"{type(error).__name__}: {text}" if text else type(error).__name__, 300)
        raise Refused(Problem(where, f"{told} while {doing}", "a model that runs")) from error


def _refused(where: Path, found: str, expected: str = "only what computes") -> Refused:
    return Refused(Problem(str(where), found, expected, f"pass {RUNS}"))


def _by(package: str, more: str = "") -> str:
    return f"run by {package} {sys.modules[package].__version__}{more}"


def _graph_ports(graph: Graph | None) -> tuple[Port, ...] | None:
    if graph is None:
        return None
    described = ((name, graph.values[name]) for name in graph.inputs)
    return tuple(Port(n, v.shape or (None,) * len(v.axes), v.dtype, v.axes) for n, v in described)


def _graph_outputs(graph: Graph | None) -> tuple[Axes, ...] | None:
    return None if graph is None else tuple(graph.values[name].axes for name in graph.outputs)


# --- Keras ---

_UNSAFE_CLASSES = {
    **dict.fromkeys(("Lambda", "__lambda__"), "code of its own"),
    **dict.fromkeys(("TFSMLayer", "TorchModuleWrapper", "FlaxLayer", "JaxLayer"), "a model of another file"),
    **dict.fromkeys(("StringLookup", "IntegerLookup", "TextVectorization"), "a vocabulary, which may be any file"),
}
_NOT_RUN = ("compile_config",)
"""Parts of a config that are not looked at if a model is loaded without its training settings."""


def keras_model(path: Path, manifest: Manifest) -> Runnable:
    """A `.keras` or whole-model `.h5` of Keras' own layers."""
    opened = open_keras(path)
    try:
        config = opened.config
    finally:
        opened.close()
    if config is None:
        raise _refused(path, "weights alone", "a model that can be run")
    for name, why in _unsafe(config):
        raise _refused(path, f"{name}: {why}")
    if is_keras2(config, opened.metadata.get("keras_version")):
        for name in renamed_since_keras2(config):
            raise _refused(path, f"{name} of Keras 2, which current Keras computes in another way", "the same in both")
    _need(path, "keras")
    with framework_errors(str(path), "loading it"):
        import keras

        with tempfile.TemporaryDirectory(prefix="neutral-") as work, keras.device("cpu:0"):
            # Keras tells the format by the suffix alone.
            link = Path(work, "model.keras" if opened.zip is not None else "model.h5")
            link.symlink_to(path.resolve())
            model = keras.models.load_model(link, compile=False, safe_mode=True)
        given = getattr(model, "inputs", None)
        if not given:
            raise _refused(path, "a model that was never built", "known inputs")
        named = {port.name: port.axes for port in _graph_ports(manifest.graph) or ()}
        ports = tuple(
            Port(x.name, tuple(x.shape), keras.backend.standardize_dtype(x.dtype), named.get(x.name)) for x in given
        )

    def run(arrays: Sequence[Array]) -> list[Array]:
        with keras.device("cpu:0"):
            tensors = [keras.ops.convert_to_tensor(x, p.dtype) for x, p in zip(arrays, ports, strict=True)]
            outputs = model(tensors if len(tensors) > 1 else tensors[0], training=False)
            return [np.asarray(keras.ops.convert_to_numpy(y)) for y in keras.tree.flatten(outputs)]

    where = f"{path}, {_by('keras', f' on {keras.backend.backend()}')}"
    last = '"channels_first"' not in json.dumps(config)
    return Runnable(where, last, ports, _graph_outputs(manifest.graph), run, manifest)


def _unsafe(value: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Classes named in a config that may do more than compute."""
    if depth > 200:
        yield "config", "nested too deep"
    elif isinstance(value, Mapping):
        cls, module = value.get("class_name"), value.get("module")
        if isinstance(cls, str):
            if cls in _UNSAFE_CLASSES:
                yield printable(cls), _UNSAFE_CLASSES[cls]
            if ">" in cls or (isinstance(module, str) and module.split(".")[0] != "keras"):
                yield printable(cls), f"a class of {printable(module or 'its own')}, which is not Keras' own"
        for key, inner in value.items():
            if key not in _NOT_RUN:
                yield from _unsafe(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _unsafe(inner, depth + 1)


# --- TensorFlow ---

_UNSAFE_OPERATORS = re.compile(
    r"(Read|Write)File|MatchingFiles|(Eager)?PyFunc(Stateless)?|.*Dataset.*|.*Debug.*|Print(V2)?|.*Summary.*|"
    r"(Xla|TPU|Remote|Collective|Load|Rpc|Send|Recv|_Send|_Recv).*|(WholeFile|TextLine|FixedLengthRecord|TFRecord).*Reader.*"
)
_SIGNATURE = "serving_default"


def saved_model(path: Path, manifest: Manifest) -> Runnable:
    """The serving signature of a SavedModel."""
    _need(path, "tensorflow")
    with framework_errors(str(path), "loading it"):
        import tensorflow as tf
        from tensorflow.core.protobuf import saved_model_pb2

        listed = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        for graph in (meta.graph_def for meta in listed.meta_graphs):
            nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
            for node in nodes:
                if _UNSAFE_OPERATORS.fullmatch(node.op):
                    raise _refused(path, f"the operator {printable(node.op)}")
        with tf.device("/CPU:0"):
            loaded = tf.saved_model.load(str(path))
        names = list(loaded.signatures)
        name = _SIGNATURE if _SIGNATURE in names else names[0] if len(names) == 1 else None
        if name is None:
            found = f"the signatures {', '.join(names)}" if names else "no signature"
            raise _refused(path, found, f"one, or one called {_SIGNATURE}")
        _, specs = loaded.signatures[name].structured_input_signature
        if not specs or any(spec.shape.rank is None for spec in specs.values()):
            raise _refused(path, "a signature whose inputs have any number of axes", "known inputs")
        described = {port.name: port.axes for port in _graph_ports(manifest.graph) or ()}
        ports = tuple(
            Port(key, tuple(spec.shape), spec.dtype.name, described.get(key))
            for key, spec in sorted(specs.items(), key=lambda item: _natural(item[0]))
        )

    def run(arrays: Sequence[Array]) -> list[Array]:
        with tf.device("/CPU:0"):
            tensors = {p.name: tf.cast(tf.constant(x), p.dtype) for x, p in zip(arrays, ports, strict=True)}
            outputs = loaded.signatures[name](**tensors)
            return [outputs[key].numpy() for key in sorted(outputs, key=_natural)]

    where, outputs = f"{path}, {_by('tensorflow')}", _graph_outputs(manifest.graph)
    return Runnable(where, True, ports, outputs, run, manifest)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name))


# --- ONNX ---

_ELEMENTS = {"float": "float32", "double": "float64"}
"""Names of dtypes that ONNX has otherwise."""


def onnx_model(path: Path, manifest: Manifest | None = None) -> Runnable:
    """An `.onnx`: operators alone, which onnxruntime itself has. The file and its external data were read before."""
    _need(path, "onnxruntime")
    open_onnx(path).close()
    with framework_errors(str(path), "loading it"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()
    graph = manifest.graph if manifest is not None else None
    known = {port.name: port.axes for port in _graph_ports(graph) or ()}
    ports = tuple(
        Port(
            x.name,
            tuple(n if type(n) is int and n >= 0 else None for n in x.shape),
            _onnx_dtype(x.type),
            known.get(x.name),
        )
        for x in given
    )

    def run(arrays: Sequence[Array]) -> list[Array]:
        fed = {port.name: np.asarray(x).astype(port.dtype) for port, x in zip(ports, arrays, strict=True)}
        outputs = session.run(None, fed)
        return [y.astype(np.float64) if y.dtype.kind == "f" else y for y in map(np.asarray, outputs)]

    return Runnable(f"{path}, {_by('onnxruntime')}", False, ports, _graph_outputs(graph), run, manifest)


def _onnx_dtype(told: str) -> str:
    """The dtype in `tensor(float)`."""
    name = told.removeprefix("tensor(").removesuffix(")")
    return _ELEMENTS.get(name, name)


# --- torch ---


def torch_module(path: Path, manifest: Manifest) -> Runnable:
    """A whole pickled module of classes of torch.nn."""
    _need(path, "torch")
    if manifest.source.format == "torchscript":
        raise _refused(path, "TorchScript, which is code")
    with framework_errors(str(path), "loading it"):
        import torch

        with torch.serialization.safe_globals(_torch_classes()):
            try:
                module = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                named = re.search(r"GLOBAL `?([\w.]+)", str(error))
                found = f"the class {named[1]}" if named else "more than tensors and modules"
                raise _refused(path, found, "classes of torch.nn's own, for no other is run") from None
    if not isinstance(module, torch.nn.Module):
        raise _refused(path, "weights alone", "a model that can be run")
    module.eval()
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def run(arrays: Sequence[Array]) -> list[Array]:
        tensors = (torch.from_numpy(x) for x in arrays)
        with torch.no_grad():
            return _torch_arrays(module(*(x.to(dtype) if x.is_floating_point() else x for x in tensors)))

    ports, outputs = _graph_ports(manifest.graph), _graph_outputs(manifest.graph)
    return Runnable(f"{path}, {_by('torch')}", False, ports, outputs, run, manifest)


def _torch_classes() -> list[Any]:
    """The module classes that torch itself defines."""
    import torch

    waiting, found = [torch.nn.Module], {torch.nn.Module}
    while waiting:
        fresh = set(waiting.pop().__subclasses__()) - found
        found |= fresh
        waiting += fresh
    return [cls for cls in found if cls.__module__.startswith("torch.nn.modules.")]


def _torch_arrays(outputs: Any) -> list[Array]:
    import torch

    flat = torch.utils._pytree.tree_leaves(outputs)
    tensors = [y.detach().cpu() for y in flat if isinstance(y, torch.Tensor)]
    return [y.double().numpy() if y.is_floating_point() else y.numpy() for y in tensors]


_OPERATORS = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|torch\.ops\.prims\.\w+\.\w+|torch\.sym_\w+|math\.(trunc|floor|ceil)|"
    r"torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond)|"
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|lt|le|gt|ge|eq|ne|and_|or_|not_)"
)
_EXPRESSION = re.compile(r"'[a-z]+\d+'|[a-z]+\d+|[a-z]+=|[A-Z][A-Za-z]*|\d+(?:\.\d+)?|[\s+\-*/%(),<>=]")
"""The parts of a size: torch gives the whole to sympy, which evaluates it as Python."""
_LONGEST_JSON = 1 << 28


def torch_program(path: Path, manifest: Manifest | None = None) -> Runnable:
    """A `.pt2` of torch.export. The manifest says what its axes are, if it was made of one."""
    _need(path, "torch")
    _check_program(path)
    with framework_errors(str(path), "loading it"):
        import torch

        with weights_only(), path.open("rb") as file:
            program = torch.export.load(file)
        # Guards are Python source in the file; what they check is checked by the operators.
        module = program.module(check_guards=False)
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        values = [nodes[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
        dtypes = [x.dtype for x in values]
    graph = manifest.graph if manifest is not None else None
    known = _graph_ports(graph) or ()
    axes = [port.axes for port in known] if len(known) == len(values) else [None] * len(values)
    names = [port.name for port in known] if len(known) == len(values) else [f"input {i}" for i in range(len(values))]
    ports = tuple(
        Port(name, tuple(n if type(n) is int else None for n in x.shape), str(x.dtype).removeprefix("torch."), a)
        for name, x, a in zip(names, values, axes, strict=True)
    )

    def run(arrays: Sequence[Array]) -> list[Array]:
        with torch.no_grad():
            return _torch_arrays(module(*(torch.from_numpy(x).to(d) for x, d in zip(arrays, dtypes, strict=True))))

    given = program.example_inputs[0] if program.example_inputs else ()
    example = tuple(tuple(x.shape) for x in given if isinstance(x, torch.Tensor))
    known_example = example if len(example) == len(ports) else None
    return Runnable(f"{path}, {_by('torch')}", False, ports, _graph_outputs(graph), run, manifest, known_example)


@contextmanager
def weights_only() -> Iterator[None]:
    """torch.export unpickles anything unless this variable says otherwise."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_program(path: Path) -> None:
    """Refuse a program that is more than torch's operators on tensors."""
    with SourceFile(path) as file:
        archive = ZipSource(file)
        for name in archive.members:
            if "/aotinductor/" in name or name.endswith(
                (".so", ".o", ".cpp", ".py", "serialized_exported_program.json")
            ):
                raise _refused(
                    path, f"{printable(name)}: code, or a format that torch has left", "a .pt2 of torch.export"
                )
            if name.endswith(".json"):
                text = archive.read(name, _LONGEST_JSON)
                try:
                    described = json.loads(text)
                except (ValueError, RecursionError):
                    raise _refused(path, f"{printable(name)}: text that is not JSON") from None
                for found in _unsafe_program(described):
                    raise _refused(path, f"{printable(name)}: {printable(found, 200)}")


def _unsafe_program(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()
            target, expression = one.get("target"), one.get("expr_str")
            if isinstance(target, str) and not _OPERATORS.fullmatch(target):
                yield f"the operator {target}"
            if isinstance(expression, str) and _EXPRESSION.sub("", expression):
                yield f"the size {expression}"
            if one.get("use_pickle"):
                yield "a pickle"
