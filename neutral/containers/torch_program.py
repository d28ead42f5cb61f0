"""Programs of torch.export (`.pt2`): where their weights lie, and what their text says of the modules. No code is run.

>>> holds_program(["m/models/model.json", "m/data/weights/weight_0"]), holds_program(["archive/data.pkl"])
(True, False)

`<root>/data/weights/<model>_weights_config.json` maps the names of a state dict to members of plain bytes, with dtype,
sizes, strides and offset of each tensor. `<root>/models/<model>.json` is the graph; each of its nodes names the modules it
came from. See torch/export/pt2_archive and torch/_export/serde/schema.py of torch 2.8 and later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import ml_dtypes
import numpy as np

from neutral.containers.elements import element_bytes
from neutral.containers.files import SourceFile
from neutral.containers.zip import ZipSource
from neutral.containers.zip_records import STORED
from neutral.containers.zip_replacing import replace_members
from neutral.errors import BadFile, Problem, Refused, Unsupported, printable, raise_all
from neutral.native import Array, Stored, Tensor

_PROGRAM = re.compile(r"(^|/)(models/[^/]+\.json|serialized_exported_program\.json)$")
"""The member that holds the operators, of torch since 2.8 and before."""
_WEIGHTS = re.compile(r"(?P<root>.*?)data/weights/(?P<model>[^/]+)_weights_config\.json")
_LONGEST_JSON: Final = 256 << 20
_MOST_AXES: Final = 32

# torch/_export/serde/schema.py, ScalarType
DTYPES: Final[Mapping[int, np.dtype[Any]]] = {
    1: np.dtype(np.uint8), 2: np.dtype(np.int8), 3: np.dtype(np.int16), 4: np.dtype(np.int32), 5: np.dtype(np.int64),
    6: np.dtype(np.float16), 7: np.dtype(np.float32), 8: np.dtype(np.float64), 10: np.dtype(np.complex64),
    11: np.dtype(np.complex128), 12: np.dtype(np.bool_), 13: np.dtype(ml_dtypes.bfloat16), 28: np.dtype(np.uint16),
    29: np.dtype(ml_dtypes.float8_e4m3fn), 30: np.dtype(ml_dtypes.float8_e5m2),
    31: np.dtype(ml_dtypes.float8_e4m3fnuz), 32: np.dtype(ml_dtypes.float8_e5m2fnuz),
    33: np.dtype(ml_dtypes.float8_e8m0fnu), 34: np.dtype(np.uint32), 35: np.dtype(np.uint64),
}  # fmt: skip
_STRIDED: Final = 7


def is_program(path: Path) -> bool:
    """Whether a file is one of torch.export."""
    if not path.is_file():
        return False
    with SourceFile(path) as file:
        return file.read(0, min(file.size, 2)) == b"PK" and holds_program(ZipSource(file).members)


def holds_program(names: Iterable[str]) -> bool:
    """Whether a zip of these members is one of torch.export."""
    return any(map(_PROGRAM.search, names))


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its member of the zip, dtype, and shape, strides and offset in elements."""

    member: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    parameter: bool


class TorchProgram:
    """A `.pt2` opened for reading: the places of its weights by name, and the nodes of its graph."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = SourceFile(path)
        try:
            self.zip = ZipSource(self.file)
            self._root, self._model = self._only_model()
            self.weights = dict(self._places())
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        self.file.close()

    def _only_model(self) -> tuple[str, str]:
        found = [match for name in self.zip.members if (match := _WEIGHTS.fullmatch(name))]
        if not found:
            raise Unsupported(
                Problem(
                    str(self.path),
                    "a program of torch.export from before torch 2.8",
                    "the format of 2.8 and later",
                    "load it with its own torch and save its state_dict",
                )
            )
        if len(found) > 1:
            names = ", ".join(printable(match["model"], 40) for match in found[:5])
            raise Unsupported(Problem(str(self.path), f"the models {names}", "one", "save each in a file of its own"))
        return found[0]["root"], found[0]["model"]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.zip.read(name, _LONGEST_JSON), object_pairs_hook=self._once)
        except (ValueError, RecursionError):
            raise self._bad(f"{printable(name)}: text that is not JSON", "JSON") from None
        if not isinstance(found, dict):
            raise self._bad(f"{printable(name)}: no object", "an object")
        return found

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise self._bad("a key that is there twice", "each once")
        return found

    def _bad(self, found: str, expected: str) -> BadFile:
        return BadFile(Problem(str(self.path), found, expected, "the file is damaged or forged"))

    def _places(self) -> Iterator[tuple[str, Place]]:
        folder = f"{self._root}data/weights/"
        told = self._json(f"{folder}{self._model}_weights_config.json").get("config")
        if not isinstance(told, dict):
            raise self._bad("weights without a config", "one")
        for name, payload in told.items():
            yield name, self._place(folder, name, payload)

    def _place(self, folder: str, name: str, payload: Any) -> Place:
        where = printable(name)
        meta = payload.get("tensor_meta") if isinstance(payload, dict) else None
        if not isinstance(payload, dict) or not isinstance(payload.get("path_name"), str):
            raise self._bad(f"{where}: no place", "a member of the zip")
        if payload.get("use_pickle") or not isinstance(meta, dict):
            raise Unsupported(
                Problem(
                    f"{self.path}: {where}",
                    "a tensor inside a pickle",
                    "plain bytes",
                    "save the state dict with torch.save",
                )
            )
        member = folder + payload["path_name"]
        if "/" in payload["path_name"] or member not in self.zip.members:
            raise self._bad(f"{where}: the member {printable(payload['path_name'])}", "one of the zip")
        dtype = DTYPES.get(meta.get("dtype"))  # type: ignore[arg-type]
        if dtype is None or meta.get("layout") != _STRIDED:
            raise Unsupported(Problem(f"{self.path}: {where}", "a dtype or layout that numpy has not", "dense numbers"))
        shape, strides = (self._ints(where, meta.get(key)) for key in ("sizes", "strides"))
        (offset,) = self._ints(where, [meta.get("storage_offset")])
        if len(shape) != len(strides) or len(shape) > _MOST_AXES:
            raise self._bad(f"{where}: {len(shape)} sizes and {len(strides)} strides", "as many")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        held = self.zip.members[member].size // dtype.itemsize
        elements = int(np.prod([int(n) for n in shape], dtype=object)) if shape else 1
        if elements and (last >= held or elements > held):
            raise self._bad(f"{where}: elements up to {last}", f"at most {held}, as its member has")
        return Place(member, dtype, shape, strides, offset, payload.get("is_param") is True)

    def _ints(self, where: str, listed: Any) -> tuple[int, ...]:
        values = [one.get("as_int") if isinstance(one, dict) else None for one in listed] if isinstance(listed, list) else [None]  # fmt: skip
        found = [n for n in values if type(n) is int and 0 <= n < 1 << 62]
        if len(found) < len(values):
            raise self._bad(f"{where}: sizes that are no numbers", "numbers that are not negative")
        return tuple(found)

    def tensor(self, name: str) -> Tensor:
        """A weight, unread."""
        place = self.weights[name]
        member = self.zip.members[place.member]
        storage = self.zip.section(place.member) if member.method == STORED else self.zip.open(place.member)
        return Stored(
            storage,
            place.shape,
            place.dtype.newbyteorder("<"),
            place.offset * place.dtype.itemsize,
            place.strides if place.shape and 0 not in place.shape else None,
        )

    def nodes(self) -> list[Mapping[str, Any]]:
        """The graph's nodes, as the file has them; none where it has no graph that is understood."""
        name = f"{self._root}models/{self._model}.json"
        if name not in self.zip.members:
            return []
        graph: Any = self._json(name)
        for key in ("graph_module", "graph", "nodes"):
            graph = graph.get(key) if isinstance(graph, dict) else None
        return [node for node in graph if isinstance(node, dict)] if isinstance(graph, list) else []

    def arguments(self) -> dict[str, str]:
        """The graph's own names of the weights: argument -> name in the state dict."""
        name = f"{self._root}models/{self._model}.json"
        told: Any = self._json(name) if name in self.zip.members else None
        for key in ("graph_module", "signature", "input_specs"):
            told = told.get(key) if isinstance(told, dict) else None
        found: dict[str, str] = {}
        for spec in told if isinstance(told, list) else []:
            for kind, key in (("parameter", "parameter_name"), ("buffer", "buffer_name")):
                one = spec.get(kind) if isinstance(spec, dict) else None
                argument = one.get("arg") if isinstance(one, dict) else None
                if isinstance(argument, dict) and isinstance(one, dict):
                    found[str(argument.get("name"))] = str(one.get(key))
        return found


def replace_weights(source: TorchProgram, tensors: Mapping[str, Tensor], out: BinaryIO) -> None:
    """A copy of a program in which the weights named have new elements; all else stays byte for byte."""
    by_member: dict[str, list[tuple[str, Place, Tensor]]] = {}
    problems = []
    for name, data in tensors.items():
        place = source.weights.get(name)
        if place is None or (place.shape, place.dtype) != (data.shape, data.dtype):
            there = "no tensor of that name" if place is None else f"{place.dtype} {place.shape}"
            problems.append(Problem(name, there, f"{data.dtype} {data.shape}", "use a template with the same layer"))
        else:
            by_member.setdefault(place.member, []).append((name, place, data))
    raise_all(Refused, problems)
    new = {member: _content(source, member, parts) for member, parts in by_member.items()}
    replace_members(source.zip, out, new)


def _content(
    source: TorchProgram, member: str, parts: list[tuple[str, Place, Tensor]]
) -> tuple[int, Iterable[bytes | memoryview]]:
    size = source.zip.members[member].size
    (_, place, data), *others = parts
    plain = Stored(source.zip.open(member), place.shape, place.dtype, 0, place.strides).contiguous and not place.offset
    if not others and plain and data.nbytes == size:
        return size, element_bytes(data)
    return size, _patched(source, member, size, parts)


def _patched(source: TorchProgram, member: str, size: int, parts: list[tuple[str, Place, Tensor]]) -> Iterator[bytes]:
    """A member whose tensors have strides, or share elements: equal ones, for they are tied."""
    content = bytearray(source.zip.read(member, size))
    written: list[tuple[str, Array, Array]] = []
    for name, place, data in parts:
        steps = tuple(n * place.dtype.itemsize for n in place.strides)
        view: Array = np.ndarray(
            place.shape, place.dtype.newbyteorder("<"), content, place.offset * place.dtype.itemsize, steps
        )
        values = data.read()
        view[...] = values
        written.append((name, view, values))
    for name, view, values in written:
        if view.tobytes() != values.astype(view.dtype).tobytes():
            raise Refused(
                Problem(
                    name, "elements that differ from those of a tensor it is tied to", "equal ones, for they are tied"
                )
            )
    yield bytes(content)
