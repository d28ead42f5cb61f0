"""ONNX models as bytes: graphs, nodes, attributes and tensors, read without the onnx package and without the tensors.

    with open_onnx(Path("model.onnx")) as opened:
        for node in opened.model.graph.nodes:
            print(node.op_type, node.inputs, node.attributes.get("strides"))
        opened.model.graph.initializers["fc.weight"].data.read()

The dataclasses are the messages of onnx.proto under their own names. The elements of a tensor stay in the file, or in the
file of external data beside it, until they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from neutral.containers.files import SourceFile
from neutral.containers.onnx_data_files import DataFiles
from neutral.containers.onnx_tensors import Span, TensorProto, check_overlaps, read_tensor
from neutral.containers.protobuf import FIXED32, FileReader, Place
from neutral.errors import BadFile, Problem

_MOST_FIELDS = 2_000_000
_MOST_NODES = 250_000
_MOST_DEPTH = 32
_LONGEST_NAME = 1 << 16
_LONGEST_TEXT = 1 << 22
_LONGEST_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Reference:
    """The value of an attribute inside a function: that of the function's own attribute of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """The value of an attribute that is kept unread: a type, a sparse tensor, a text of many megabytes."""

    type: int


@dataclass(frozen=True, slots=True)
class NodeProto:
    """One operator. `inputs` and `outputs` name values; an empty name is an input or output that is left out."""

    op_type: str
    name: str = ""
    domain: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    overload: str = ""


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """What a graph says of a value: the code of its elements, its shape with None or a name for unknown sizes."""

    name: str
    elem_type: int = 0
    shape: tuple[int | str | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class GraphProto:
    """A graph. `initializers` by name, in the order of the file; `sparse` names those that are stored sparsely."""

    name: str = ""
    nodes: tuple[NodeProto, ...] = ()
    initializers: Mapping[str, TensorProto] = field(default_factory=dict)
    inputs: tuple[ValueInfo, ...] = ()
    outputs: tuple[ValueInfo, ...] = ()
    value_infos: Mapping[str, ValueInfo] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FunctionProto:
    """A function of the model's own: nodes that call it by `domain` and `name` stand for `nodes`."""

    domain: str = ""
    name: str = ""
    overload: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    nodes: tuple[NodeProto, ...] = ()
    opsets: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


AttributeValue = (
    int
    | float
    | str
    | bytes
    | TensorProto
    | GraphProto
    | Reference
    | Opaque
    | None
    | tuple[int, ...]
    | tuple[float, ...]
    | tuple[str | bytes, ...]
    | tuple[TensorProto, ...]
    | tuple[GraphProto, ...]
)
"""What an attribute holds; None where it has a name and nothing else."""


@dataclass(frozen=True, slots=True)
class ModelProto:
    """A model: its graph, the operator sets that it is written in (by domain, "" for ONNX's own), and who made it."""

    ir_version: int = 0
    producer_name: str = ""
    producer_version: str = ""
    domain: str = ""
    model_version: int = 0
    opsets: Mapping[str, int] = field(default_factory=dict)
    graph: GraphProto = field(default_factory=GraphProto)
    functions: tuple[FunctionProto, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators; 1 where the model names none."""
        return self.opsets.get("", 1)


@dataclass(frozen=True)
class OnnxFile:
    """An open model file with the files of external data that it names."""

    path: Path
    file: SourceFile
    model: ModelProto
    tensors: tuple[TensorProto, ...]
    """Every tensor of the file, initializers and attributes of all graphs and functions, in the order of the file."""
    data_files: DataFiles

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.data_files.close()


def open_onnx(path: Path) -> OnnxFile:
    """Read all of a model but the elements of its tensors."""
    file = SourceFile(path)
    data_files = DataFiles(path.parent)
    try:
        parser = _Parser(FileReader(file, str(path), _MOST_FIELDS), data_files)
        model = parser.model(Span(0, 0, file.size, None))
        check_overlaps(str(path), parser.tensors)
        return OnnxFile(path, file, model, tuple(parser.tensors), data_files)
    except BaseException:
        file.close()
        data_files.close()
        raise


def named_tensors(model: ModelProto) -> dict[str, TensorProto]:
    """Every tensor of a model under a name of its own.

    That is the name of an initializer of the main graph, and of the value that a Constant makes; in graphs inside nodes
    and in functions the name of the node or function goes before.
    """
    found: dict[str, TensorProto] = {}
    _name_tensors(model.graph, "", found)
    for function in model.functions:
        _name_node_tensors(function.nodes, f"{function.domain}.{function.name}/", found)
    return found


def _name_tensors(graph: GraphProto, prefix: str, found: dict[str, TensorProto]) -> None:
    for name, tensor in graph.initializers.items():
        _put(found, prefix + name, tensor)
    _name_node_tensors(graph.nodes, prefix, found)


def _name_node_tensors(nodes: Iterable[NodeProto], prefix: str, found: dict[str, TensorProto]) -> None:
    for node in nodes:
        made = next((name for name in node.outputs if name), "")
        for name, value in node.attributes.items():
            own = prefix + (made if node.op_type == "Constant" else f"{node.name or made}.{name}")
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, TensorProto):
                    _put(found, own, each)
                elif isinstance(each, GraphProto):
                    _name_tensors(each, f"{own}/", found)


def _put(found: dict[str, TensorProto], name: str, tensor: TensorProto) -> None:
    inside = name.lstrip("/")
    unique, count = inside, 1
    while unique in found:
        count += 1
        unique = f"{inside}#{count}"
    found[unique] = tensor


class _Parser:
    """One file in the reading. Every method takes the span of a message and gives what it says."""

    def __init__(self, reader: FileReader, data_files: DataFiles) -> None:
        self.reader = reader
        self.where = reader.where
        self.data_files = data_files
        self.tensors: list[TensorProto] = []
        self.nodes = 0

    def model(self, span: Span) -> ModelProto:
        numbers: dict[int, int] = {}
        texts: dict[int, str] = {}
        opsets: dict[str, int] = {}
        functions: list[FunctionProto] = []
        metadata: dict[str, str] = {}
        graph: GraphProto | None = None
        for place in self._fields(span):
            match place.number:
                case 1 | 5:
                    numbers[place.number] = place.integer(self.where)
                case 2 | 3 | 4:
                    texts[place.number] = self._name(place)
                case 7:
                    if graph is not None:
                        raise BadFile(Problem(self.where, "two graphs", "one", "the file is damaged"))
                    graph = self.graph(span.inside(place), 0)
                case 8:
                    self._opset(place, opsets)
                case 14:
                    self._entry(place, metadata)
                case 25:
                    functions.append(self.function(span.inside(place)))
        if graph is None:
            raise BadFile(Problem(self.where, "no graph", "a ModelProto with one", "name an ONNX model"))
        return ModelProto(
            numbers.get(1, 0),
            texts.get(2, ""),
            texts.get(3, ""),
            texts.get(4, ""),
            numbers.get(5, 0),
            opsets,
            graph,
            tuple(functions),
            metadata,
        )

    def graph(self, span: Span, depth: int) -> GraphProto:
        if depth > _MOST_DEPTH:
            raise BadFile(Problem(self.where, f"graphs {depth} deep in each other", f"at most {_MOST_DEPTH}"))
        name = ""
        nodes: list[NodeProto] = []
        initializers: dict[str, TensorProto] = {}
        inputs: list[ValueInfo] = []
        outputs: list[ValueInfo] = []
        infos: dict[str, ValueInfo] = {}
        metadata: dict[str, str] = {}
        sparse: list[str] = []
        for place in self._fields(span):
            match place.number:
                case 1:
                    nodes.append(self.node(span.inside(place), depth))
                case 2:
                    name = self._name(place)
                case 5:
                    tensor = self.tensor(span.inside(place))
                    if tensor.name in initializers:
                        raise BadFile(Problem(self.where, f"two initializers {tensor.name!r}", "names that differ"))
                    initializers[tensor.name] = tensor
                case 11:
                    inputs.append(self._value_info(place))
                case 12:
                    outputs.append(self._value_info(place))
                case 13:
                    info = self._value_info(place)
                    infos[info.name] = info
                case 15:
                    sparse.append(self._sparse_name(place))
                case 16:
                    self._entry(place, metadata)
        return GraphProto(
            name, tuple(nodes), initializers, tuple(inputs), tuple(outputs), infos, metadata, tuple(sparse)
        )

    def function(self, span: Span) -> FunctionProto:
        texts: dict[int, str] = {}
        lists: dict[int, list[str]] = {4: [], 5: [], 6: []}
        attributes: dict[str, AttributeValue] = {}
        nodes: list[NodeProto] = []
        opsets: dict[str, int] = {}
        metadata: dict[str, str] = {}
        for place in self._fields(span):
            match place.number:
                case 1 | 10 | 13:
                    texts[place.number] = self._name(place)
                case 4 | 5 | 6:
                    lists[place.number].append(self._name(place))
                case 7:
                    nodes.append(self.node(span.inside(place), 0))
                case 9:
                    self._opset(place, opsets)
                case 11:
                    self._attribute(span.inside(place), attributes, 0)
                case 14:
                    self._entry(place, metadata)
        return FunctionProto(
            texts.get(10, ""),
            texts.get(1, ""),
            texts.get(13, ""),
            tuple(lists[4]),
            tuple(lists[5]),
            {**dict.fromkeys(lists[6]), **attributes},
            tuple(nodes),
            opsets,
            metadata,
        )

    def node(self, span: Span, depth: int) -> NodeProto:
        self.nodes += 1
        if self.nodes > _MOST_NODES:
            raise BadFile(Problem(self.where, f"over {_MOST_NODES} nodes", "fewer"))
        texts: dict[int, str] = {}
        inputs: list[str] = []
        outputs: list[str] = []
        attributes: dict[str, AttributeValue] = {}
        metadata: dict[str, str] = {}
        for place in self._fields(span):
            match place.number:
                case 1:
                    inputs.append(self._name(place))
                case 2:
                    outputs.append(self._name(place))
                case 3 | 4 | 7 | 8:
                    texts[place.number] = self._name(place)
                case 5:
                    self._attribute(span.inside(place), attributes, depth)
                case 9:
                    self._entry(place, metadata)
        return NodeProto(
            texts.get(4, ""),
            texts.get(3, ""),
            domain_of(texts.get(7, "")),
            tuple(inputs),
            tuple(outputs),
            attributes,
            metadata,
            texts.get(8, ""),
        )

    def tensor(self, span: Span) -> TensorProto:
        found = read_tensor(self.reader, span, self.data_files)
        self.tensors.append(found)
        return found

    def _attribute(self, span: Span, into: dict[str, AttributeValue], depth: int) -> None:
        name, reference, kind = "", "", 0
        single: dict[int, AttributeValue] = {}
        ints: list[int] = []
        floats: list[float] = []
        strings: list[str | bytes] = []
        tensors: list[TensorProto] = []
        graphs: list[GraphProto] = []
        for place in self._fields(span):
            match place.number:
                case 1:
                    name = self._name(place)
                case 20:
                    kind = place.integer(self.where)
                case 21:
                    reference = self._name(place)
                case 2:
                    single[1] = self._float(place)
                case 3:
                    single[2] = place.integer(self.where)
                case 4:
                    single[3] = self._text(place)
                case 5:
                    single[4] = self.tensor(span.inside(place))
                case 6:
                    single[5] = self.graph(span.inside(place), depth + 1)
                case 7:
                    floats += self.reader.floats(place, _LONGEST_NUMBERS)
                case 8:
                    ints += self.reader.integers(place, _LONGEST_NUMBERS)
                case 9:
                    text = self._text(place)
                    strings.append("" if isinstance(text, Opaque) else text)
                case 10:
                    tensors.append(self.tensor(span.inside(place)))
                case 11:
                    graphs.append(self.graph(span.inside(place), depth + 1))
        if name in into:
            raise BadFile(Problem(self.where, f"two attributes {name!r} of one node", "one", "the file is damaged"))
        if reference:
            into[name] = Reference(reference)
            return
        lists: dict[int, AttributeValue] = {
            6: tuple(floats),
            7: tuple(ints),
            8: tuple(strings),
            9: tuple(tensors),
            10: tuple(graphs),
        }
        if kind == 0:  # Models of the first IR version do not say the type.
            kind = next(iter(single), 0) or next((code for code, value in lists.items() if value), 0)
        # proto3 leaves out a value of zero.
        zeros: dict[int, AttributeValue] = {1: 0.0, 2: 0, 3: ""}
        into[name] = lists[kind] if kind in lists else single.get(kind, zeros.get(kind, Opaque(kind) if kind else None))

    def _value_info(self, place: Place) -> ValueInfo:
        name, elem_type = "", 0
        shape: tuple[int | str | None, ...] | None = None
        for part in self.reader.message(place):
            if part.number == 1:
                name = self._name(part)
            elif part.number == 2:
                for kind in self.reader.message(part):
                    if kind.number == 1:
                        elem_type, shape = self._tensor_type(kind)
        return ValueInfo(name, elem_type, shape)

    def _tensor_type(self, place: Place) -> tuple[int, tuple[int | str | None, ...] | None]:
        elem_type = 0
        shape: tuple[int | str | None, ...] | None = None
        for part in self.reader.message(place):
            if part.number == 1:
                elem_type = part.integer(self.where)
            elif part.number == 2:
                sizes: list[int | str | None] = []
                for dim in self.reader.message(part):
                    if dim.number == 1:
                        sizes.append(self._size(dim))
                shape = tuple(sizes)
        return elem_type, shape

    def _size(self, place: Place) -> int | str | None:
        found: int | str | None = None
        for part in self.reader.message(place):
            if part.number == 1:
                found = part.integer(self.where)
            elif part.number == 2:
                found = self._name(part) or None
        # A size below zero is a converter's word for an unknown one.
        return None if isinstance(found, int) and found < 0 else found

    def _sparse_name(self, place: Place) -> str:
        for part in self.reader.message(place):
            if part.number == 1:
                for each in self.reader.message(part):
                    if each.number == 8:
                        return self._name(each)
        return ""

    def _opset(self, place: Place, into: dict[str, int]) -> None:
        domain, version = "", 0
        for part in self.reader.message(place):
            if part.number == 1:
                domain = self._name(part)
            elif part.number == 2:
                version = part.integer(self.where)
        into[domain_of(domain)] = version

    def _entry(self, place: Place, into: dict[str, str]) -> None:
        key, value = "", ""
        for part in self.reader.message(place):
            if part.number == 1:
                key = self._name(part)
            elif part.number == 2 and part.length <= _LONGEST_TEXT:
                value = self.reader.string(part, _LONGEST_TEXT)
        into[key] = value

    def _fields(self, span: Span) -> Iterator[Place]:
        return self.reader.fields(span.at, span.stop)

    def _name(self, place: Place) -> str:
        return self.reader.string(place, _LONGEST_NAME)

    def _text(self, place: Place) -> str | bytes | Opaque:
        if place.length > _LONGEST_TEXT:
            return Opaque(3)
        data = self.reader.data(place, _LONGEST_TEXT)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data

    def _float(self, place: Place) -> float:
        if place.wire != FIXED32:
            raise BadFile(Problem(self.where, f"a float with wire type {place.wire}", f"wire type {FIXED32}"))
        return self.reader.floats(place, 4)[0]


def domain_of(name: str) -> str:
    """The domain of ONNX's own operators has two names.

    >>> domain_of("ai.onnx"), domain_of("com.microsoft")
    ('', 'com.microsoft')
    """
    return "" if name == "ai.onnx" else name
