"""TensorFlow's object graphs: which Python attribute held which variable, and what Keras said of each object.

>>> child = protobuf.message(1, protobuf.number(1, 1) + protobuf.text(2, "kernel"))
>>> value = protobuf.message(2, protobuf.text(1, "VARIABLE_VALUE") + protobuf.text(3, "kernel/.ATTRIBUTES/VARIABLE_VALUE"))
>>> nodes = object_graph(protobuf.message(1, child) + protobuf.message(1, value), "example")
>>> nodes[0].children, nodes[1].attributes[0].key
((('kernel', 1),), 'kernel/.ATTRIBUTES/VARIABLE_VALUE')

Messages: trackable_object_graph.proto, saved_model.proto, saved_object_graph.proto, and Keras 2's saved_metadata.proto.
The computation in a SavedModel is never looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neutral.containers import protobuf
from neutral.containers.files import SourceFile
from neutral.containers.tensor_bundle import Bundle
from neutral.errors import BadFile, Problem

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
MODEL_FILE = "saved_model.pb"
KERAS_FILE = "keras_metadata.pb"
VARIABLES = Path("variables", "variables")

_LONGEST_POINTER = 1 << 20
_POINTER = re.compile(r'^model_checkpoint_path:\s*"((?:[^"\\]|\\.)*)"', re.MULTILINE)
_SHARD = re.compile(r"(.*)\.data-\d{5}-of-\d{5}\Z")
_LARGEST_PART = 64 << 20
_LARGEST_JSON = 32 << 20
_MOST_NODES = 250_000
_MOST_LINKS = 600_000
_COPIES = "_all_variables"


@dataclass(frozen=True, slots=True)
class Attribute:
    """A value that an object saved: `name` (VARIABLE_VALUE), the variable's `full_name`, and the bundle's `key`."""

    name: str
    full_name: str
    key: str


@dataclass(frozen=True, slots=True)
class Node:
    """An object: its children by attribute name, its saved values, and whether it keeps optimizer slots."""

    children: tuple[tuple[str, int], ...]
    attributes: tuple[Attribute, ...]
    has_slots: bool


@dataclass(frozen=True)
class KerasObject:
    """What Keras 2 says of an object: its identifier (`_tf_keras_layer`) and its JSON."""

    identifier: str
    metadata: dict[str, Any]


def locate(source: Path) -> tuple[Path, Path | None]:
    """The checkpoint prefix that a path means, and the SavedModel folder around it, if there is one."""
    if source.is_dir():
        if (source / MODEL_FILE).exists():
            return source / VARIABLES, source
        if (source / "checkpoint").exists():
            return _latest(source / "checkpoint"), None
        found = sorted(source.glob("*.index"))
        if len(found) == 1:
            return found[0].with_suffix(""), None
        raise BadFile(
            Problem(
                str(source),
                f"a folder with {len(found)} checkpoints",
                f"{MODEL_FILE}, or a file `checkpoint`",
                "name one",
            )
        )
    if source.name == MODEL_FILE:
        return source.parent / VARIABLES, source.parent
    if source.suffix in (".index", ".meta"):
        return source.with_suffix(""), None
    if match := _SHARD.match(source.name):
        return source.with_name(match[1]), None
    return source, None


def _latest(pointer: Path) -> Path:
    """The checkpoint that a `checkpoint` file names. Only its last part counts: it lies beside the file."""
    with pointer.open("rb") as file:
        text = file.read(_LONGEST_POINTER).decode("utf-8", "replace")
    match = _POINTER.search(text)
    name = match[1].replace("\\\\", "/").rstrip("/").rpartition("/")[2] if match else ""
    if name in ("", ".", ".."):
        raise BadFile(Problem(str(pointer), "no model_checkpoint_path", "the text file that TensorFlow keeps"))
    return pointer.with_name(name)


def object_graph(data: bytes, where: str) -> tuple[Node, ...]:
    """The nodes of a TrackableObjectGraph; node 0 is the root. Every child exists."""
    nodes = []
    links = 0
    for field in protobuf.fields(data, where):
        if field.number == 1:
            nodes.append(_node(field.message(where), where))
            links += len(nodes[-1].children) + len(nodes[-1].attributes)
            if len(nodes) > _MOST_NODES or links > _MOST_LINKS:
                raise BadFile(Problem(where, f"over {_MOST_NODES} objects or {_MOST_LINKS} links", "fewer"))
    for node in nodes:
        for name, child in node.children:
            if not 0 <= child < len(nodes):
                raise BadFile(
                    Problem(where, f"{name} is object {child}", f"one of {len(nodes)}", "the file is damaged")
                )
    return tuple(nodes)


def _node(data: memoryview, where: str) -> Node:
    children, attributes, has_slots = [], [], False
    for field in protobuf.fields(data, where):
        if field.number == 1:
            child, name = 0, ""
            for part in protobuf.fields(field.message(where), where):
                if part.number == 1:
                    child = part.integer(where)
                elif part.number == 2:
                    name = part.string(where)
            children.append((name, child))
        elif field.number == 2:
            texts = {p.number: p.string(where) for p in protobuf.fields(field.message(where), where) if p.number <= 3}
            attributes.append(Attribute(texts.get(1, ""), texts.get(2, ""), texts.get(3, "")))
        elif field.number == 3:
            has_slots = True
    return Node(tuple(children), tuple(attributes), has_slots)


def pruned_object_graph(data: bytes, keys: Collection[str], where: str) -> bytes:
    """The same graph without the values whose keys are not among `keys`."""
    out = bytearray()
    for field in protobuf.fields(data, where):
        if field.number != 1:
            out += _again(field)
            continue
        node = bytearray()
        for part in protobuf.fields(field.message(where), where):
            if part.number == 2:
                key = next((p.string(where) for p in protobuf.fields(part.message(where), where) if p.number == 3), "")
                if key not in keys:
                    continue
            node += _again(part)
        out += protobuf.message(1, bytes(node))
    return bytes(out)


def _again(field: protobuf.Field) -> bytes:
    """A field as it was."""
    if field.wire == protobuf.BYTES:
        return protobuf.message(field.number, bytes(field.data))
    tag = protobuf.varint(field.number << 3 | field.wire)
    size = {protobuf.FIXED32: 4, protobuf.FIXED64: 8}.get(field.wire)
    return tag + (protobuf.varint(field.value) if size is None else field.value.to_bytes(size, "little"))


def copies(bundle: Bundle, nodes: tuple[Node, ...]) -> dict[str, tuple[str, ...]]:
    """Keys of variables that Keras 3's `Model.export` stores a second time -> the keys they may be a copy of.

    The exported functions run on the copies, listed under `_all_variables` in no order. A copy has the name, dtype,
    shape and checksum of its original; where two originals agree in all of these, both are given.
    """
    if not nodes:
        return {}
    listed = {child for name, child in nodes[0].children if name == _COPIES}
    copied = {child for parent in listed for _, child in nodes[parent].children}
    named = {child for node in listed_elsewhere(nodes, listed) for child in node}
    originals: dict[tuple[Any, ...], list[str]] = {}
    for number in sorted(named - {0}):
        for attribute in nodes[number].attributes:
            if attribute.key in bundle.entries:
                originals.setdefault(_signature(bundle, attribute), []).append(attribute.key)
    return {
        attribute.key: tuple(originals[_signature(bundle, attribute)])
        for number in sorted(copied - named)
        for attribute in nodes[number].attributes
        if attribute.key in bundle.entries and _signature(bundle, attribute) in originals
    }


def listed_elsewhere(nodes: tuple[Node, ...], without: Collection[int]) -> Iterator[tuple[int, ...]]:
    """The children of every node but those in `without`."""
    for number, node in enumerate(nodes):
        if number not in without:
            yield tuple(child for _, child in node.children)


def _signature(bundle: Bundle, attribute: Attribute) -> tuple[Any, ...]:
    entry = bundle.entries[attribute.key]
    return attribute.full_name, attribute.name, entry.dtype, entry.shape, entry.crc


def keras_objects(folder: Path) -> dict[int, KerasObject]:
    """What Keras 2 wrote of its objects, by their number in the object graph; empty for every other SavedModel."""
    path = folder / KERAS_FILE
    if not path.exists():
        return _objects_in_model(folder / MODEL_FILE)
    found = {}
    size = 0
    with SourceFile(path) as file:
        where = str(path)
        for number, offset, length in protobuf.file_fields(file, 0, file.size, where):
            if number == 1:
                node, identifier, text = 0, "", ""
                for field in protobuf.fields(_part(file, offset, length), where):
                    if field.number == 2:
                        node = field.integer(where)
                    elif field.number == 4:
                        identifier = field.string(where)
                    elif field.number == 5:
                        text = field.string(where)
                size += len(text)
                found[node] = KerasObject(identifier, _json(text, size, where))
    return found


def _objects_in_model(path: Path) -> dict[int, KerasObject]:
    """TensorFlow 2.0 to 2.4 kept Keras' words inside saved_model.pb: SavedUserObject.metadata."""
    found = {}
    read = 0
    where = str(path)
    with SourceFile(path) as file:
        for graph, start, size in protobuf.file_fields(file, 0, file.size, where):
            if graph != 2:
                continue
            for part, offset, length in protobuf.file_fields(file, start, start + size, where):
                if part != 7:
                    continue
                objects = (f for f in protobuf.fields(_part(file, offset, length), where) if f.number == 1)
                for number, field in enumerate(objects):
                    for kind in protobuf.fields(field.message(where), where):
                        if kind.number == 4:
                            texts = {
                                p.number: p.string(where)
                                for p in protobuf.fields(kind.message(where), where)
                                if p.number in (1, 3)
                            }
                            read += len(texts.get(3, ""))
                            if texts.get(3):
                                found[number] = KerasObject(texts.get(1, ""), _json(texts[3], read, where))
    return found


def _part(file: SourceFile, offset: int, length: int) -> bytes:
    if length > _LARGEST_PART:
        raise BadFile(Problem(str(file.path), f"an object graph of {length} bytes", f"at most {_LARGEST_PART}"))
    return file.read(offset, length)


def _json(text: str, read: int, where: str) -> dict[str, Any]:
    """An object of JSON; `read` characters of it have been met in all."""
    if read > _LARGEST_JSON:
        raise BadFile(Problem(where, f"metadata of over {read} characters", f"at most {_LARGEST_JSON}"))
    try:
        value = json.loads(text, object_hook=_plain) if text else {}
    except (ValueError, RecursionError):
        raise BadFile(Problem(where, "metadata that is not JSON", "JSON", "the file is damaged")) from None
    return value if isinstance(value, dict) else {}


def _plain(value: dict[str, Any]) -> Any:
    """Keras 2 writes tuples and shapes in a SavedModel as objects of their own; in its other files they are lists."""
    if value.get("class_name") in ("__tuple__", "TensorShape") and isinstance(value.get("items"), list):
        return value["items"]
    return value
