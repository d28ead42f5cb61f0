"""A new ONNX file, written without the onnx package: nodes and types at once, the elements of weights tile by tile.

>>> relu = Node("Relu", ("x",), ("y",), name="act")
>>> image = Described("x", "float32", ("batch", 3))
>>> file = Model((relu,), {}, (image,), (Described("y", "float32", ("batch", 3)),), opset=21)
>>> len(_serialized_nodes(file)), dtype_number("bfloat16")
(19, 16)

A message of protobuf has at most 2 GB. Of a larger model the elements lie in a file beside it, `<name>.data`, each tensor
from a whole page on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from neutral.containers.files import check_output, new_file
from neutral.containers.onnx_tensors import CODES
from neutral.containers.protobuf import BYTES, VARINT, message, text, varint
from neutral.errors import Problem, Refused
from neutral.native import Tensor

Attribute = int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | npt.NDArray[Any]

LARGEST = 2_000_000_000
"""Bytes of a file without a second one for the elements: protobuf reads less than 2 GiB."""
_SMALL = 1024
"""Bytes of a tensor that is kept in the model all the same, as the onnx package does it."""
_PAGE = 4096
"""Elements beside the model begin at whole pages, so that they can be mapped into memory."""

IR_VERSIONS: Mapping[int, int] = {21: 10, 22: 10, 23: 11}
"""The version of the format that came with a version of the operators."""


@dataclass(frozen=True)
class Node:
    """One operator. An array among the attributes is a tensor."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Described:
    """An input or output of the model: its elements, and each axis as a size, a name for one, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Model:
    """What a file says: nodes in the order of computation, and the weights by name."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, Tensor]
    inputs: tuple[Described, ...]
    outputs: tuple[Described, ...]
    opset: int
    name: str = "graph"
    metadata: Mapping[str, str] = field(default_factory=dict)


def dtype_number(name: str) -> int:
    """ONNX's number of a dtype, or `Refused`."""
    found = next((code for dtype, code in CODES.items() if dtype.name == name), None)
    if found is None:
        raise Refused(Problem("weights", f"the dtype {name}", "one that ONNX has"))
    return found


def write(model: Model, out: Path, *, force: bool = False) -> None:
    """Write the file; and `<name>.data` beside it, first, if the model is larger than LARGEST."""
    whole = sum(tensor.nbytes for tensor in model.weights.values()) + len(_serialized_nodes(model))
    if whole <= LARGEST:
        with new_file(out, force) as file:
            _write_model(model, file, {}, "")
        return
    aside = out.with_name(f"{out.name}.data")
    check_output(out, force)
    places = _places(model.weights)
    with new_file(aside, force) as file:
        at = 0
        for name, (offset, length) in places.items():
            file.write(bytes(offset - at))
            _write_elements(model.weights[name], file)
            at = offset + length
    with new_file(out, force) as file:
        _write_model(model, file, places, aside.name)


def _places(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(offset, length) of the tensors that lie beside the model."""
    places, at = {}, 0
    for name, tensor in weights.items():
        if tensor.nbytes >= _SMALL:
            places[name] = at, tensor.nbytes
            at += -(-tensor.nbytes // _PAGE) * _PAGE
    return places


Part = tuple[bytes, Tensor | None]
"""Bytes, and a tensor whose elements follow them."""


def _write_model(model: Model, file: BinaryIO, places: Mapping[str, tuple[int, int]], aside: str) -> None:
    """ModelProto: its fields in the order of their numbers, as protobuf writes them."""
    graph = list(_graph(model, places, aside))
    size = sum(len(head) + (tensor.nbytes if tensor is not None else 0) for head, tensor in graph)
    file.write(_int(1, IR_VERSIONS[model.opset]) + text(2, "neutral"))
    file.write(varint(7 << 3 | BYTES) + varint(size))
    for head, tensor in graph:
        file.write(head)
        if tensor is not None:
            _write_elements(tensor, file)
    file.write(message(8, text(1, "") + _int(2, model.opset)))
    for key, value in model.metadata.items():
        file.write(message(14, text(1, key) + text(2, value)))


def _write_elements(tensor: Tensor, file: BinaryIO) -> None:
    for tile in tensor.tiles():
        file.write(tile.view(np.uint8).data)


def _graph(model: Model, places: Mapping[str, tuple[int, int]], aside: str) -> Iterator[Part]:
    """GraphProto, piece by piece."""
    yield _serialized_nodes(model) + text(2, model.name), None
    for name, tensor in model.weights.items():
        head = b"".join(_int(1, n) for n in tensor.shape) + _int(2, dtype_number(tensor.dtype.name)) + text(8, name)
        if name in places:
            offset, length = places[name]
            told = (("location", aside), ("offset", str(offset)), ("length", str(length)))
            head += b"".join(message(13, text(1, key) + text(2, value)) for key, value in told) + _int(14, 1)
            yield message(5, head), None
            continue
        head += varint(9 << 3 | BYTES) + varint(tensor.nbytes)
        yield varint(5 << 3 | BYTES) + varint(len(head) + tensor.nbytes) + head, tensor
    yield b"".join(message(11, _described(value)) for value in model.inputs), None
    yield b"".join(message(12, _described(value)) for value in model.outputs), None


def _serialized_nodes(model: Model) -> bytes:
    return b"".join(message(1, _node(node)) for node in model.nodes)


def _node(node: Node) -> bytes:
    parts = [text(1, name) for name in node.inputs] + [text(2, name) for name in node.outputs]
    parts += [text(3, node.name)] if node.name else []
    parts += [text(4, node.op)]
    parts += [message(5, text(1, name) + _attribute(value)) for name, value in sorted(node.attributes.items())]
    return b"".join(parts)


def _attribute(value: Attribute) -> bytes:
    """The field of AttributeProto that holds the value, and the field that says which one it is."""
    if isinstance(value, np.ndarray):
        return message(5, _tensor(value)) + _int(20, 4)
    if isinstance(value, str):
        return text(4, value) + _int(20, 3)
    if isinstance(value, int):  # before float: a bool is an int
        return _int(3, value) + _int(20, 2)
    if isinstance(value, float):
        return _float(2, value) + _int(20, 1)
    for kind, encode, of_list in _LISTS:
        if all(isinstance(item, kind) for item in value):
            return b"".join(encode(item) for item in value) + _int(20, of_list)
    raise TypeError(f"an attribute {value!r}")


def _tensor(array: npt.NDArray[Any]) -> bytes:
    dims = b"".join(_int(1, n) for n in array.shape)
    return dims + _int(2, dtype_number(array.dtype.name)) + message(9, np.ascontiguousarray(array).tobytes())


def _described(value: Described) -> bytes:
    """ValueInfoProto of a tensor."""
    dims = b"".join(message(1, _dimension(n)) for n in value.shape)
    return text(1, value.name) + message(2, message(1, _int(1, dtype_number(value.dtype)) + message(2, dims)))


def _dimension(n: int | str | None) -> bytes:
    if n is None:
        return b""
    return text(2, n) if isinstance(n, str) else _int(1, n)


def _int(field_number: int, value: int) -> bytes:
    """A varint field, written for 0 too: in ONNX's proto2 an absent field is not a zero."""
    return varint(field_number << 3 | VARINT) + varint(int(value))


def _float(field_number: int, value: float) -> bytes:
    return varint(field_number << 3 | 5) + struct.pack("<f", value)


_LISTS: Sequence[tuple[type, Callable[[Any], bytes], int]] = (
    (int, lambda item: _int(8, item), 7),
    (float, lambda item: _float(7, item), 6),
    (str, lambda item: text(9, item), 8),
)
"""What the items of a list are, their field, and the number of the list's type."""
