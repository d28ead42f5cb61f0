"""Files of `paddle.save`: a pickle of a dict of arrays, read without paddle and without running it.

    file = PaddleFile(Path("model.pdparams"))
    file.sets                  {"": {"fc.weight": Saved(...), ...}}: every set of weights in the file, by its place
    file.tensor(saved)         its elements, lazily

A state dict is saved as arrays by name, with the parameters' own names under `StructuredToParameterName@@`. Inside other
objects a tensor is saved as the pair of its own name and an array. Below protocol 4 arrays of more than 1 GB are cut in
parts, which `UnpackBigParamInfor@@` lists. bfloat16 is saved as uint16, which paddle does not have otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import ml_dtypes
import numpy as np

from neutral.containers.files import SourceFile
from neutral.containers.numpy_pickle import ArrayRef, array_tensor, joined, load_arrays, text_of
from neutral.containers.pickle_machine import items_of, members_of
from neutral.errors import BadFile, NeutralError, Problem, Refused, Unsupported, printable
from neutral.native import Tensor

NAME_TABLE: Final = "StructuredToParameterName@@"
CUT_TABLE: Final = "UnpackBigParamInfor@@"

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    **{name: np.dtype(name) for name in ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64")},
    **{name: np.dtype(name) for name in ("uint8", "complex64", "complex128")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes that a file of paddle can tell. Its 8-bit floats are saved as int8, and are loaded as such."""

_DEPTH: Final = 6
_VISITS: Final = 2_000_000
_ACCUMULATOR: Final = re.compile(
    r".*_(moment\d?(_max)?|beta[12]_pow_acc|velocity|inf_norm|mean_square|mean_grad|momentum|_?avg_squared_(grad|update)"
    r"|fp32_master)_\d+"
)
_NO_WEIGHTS: Final = re.compile(
    r"opt\w*|optim\w*|(lr_?)?sched\w*|rng\w*|(grad_?)?scaler|config|cfg|args|metrics?|loss(es)?"
)


@dataclass(frozen=True, eq=False)
class Saved:
    """One tensor of a file: its array, and the name that paddle gave the parameter (not its place in the model)."""

    array: ArrayRef
    parameter: str | None = None


class PaddleFile:
    """A file of paddle.save, open. `sets` are its sets of weights by their places, `others` what is known to be none."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = SourceFile(self.path)
        try:
            self._check()
            self._storage = self._file.section(0, self._file.size)
            self.root, self.globals = load_arrays(self._storage, str(path))
            self.sets: dict[str, dict[str, Saved]] = {}
            self.others: dict[str, dict[str, Saved]] = {}
            self.protocol = self._file.read(1, 1)[0]
            self._left = _VISITS
            self._search(self.root, "", 0, frozenset())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def storage(self) -> Any:
        """The bytes of the pickle."""
        return self._storage

    def _check(self) -> None:
        head = self._file.read(0, min(self._file.size, 16))
        if head[:1] != b"\x80":
            inference = head == bytes(16) or self.path.suffix.lower() in (".pdiparams", ".pdmodel")
            raise (Unsupported if inference else BadFile)(
                Problem(
                    str(self.path),
                    "the inference format of paddle.jit.save, whose parameters have no names" if inference else "no pickle",
                    "a state dict of paddle.save",
                    "save the model's own: paddle.save(layer.state_dict(), 'model.pdparams')" if inference else "",
                )
            )  # fmt: skip

    def _search(self, value: object, key: str, depth: int, above: frozenset[int]) -> None:
        """Collect the sets in a value: every mapping that has arrays in it."""
        items = items_of(value)
        if items is None or depth > _DEPTH or id(value) in above:
            return
        self._left -= len(items) + 1
        if self._left < 0:
            raise BadFile(Problem(str(self.path), "mappings inside each other without an end", "a state dict"))
        arrays = self._arrays(items)
        other = bool(key and _NO_WEIGHTS.fullmatch(key.rpartition(".")[2].lower())) or _is_optimizer(items, arrays)
        if arrays:
            (self.others if other else self.sets)[key] = arrays
        for name, child in items.items():
            if type(name) is str and name not in (NAME_TABLE, CUT_TABLE) and not other:
                self._search(child, f"{key}.{name}" if key else name, depth + 1, above | {id(value)})
        if other and not arrays:
            self.others.setdefault(key, {})

    def _arrays(self, items: Mapping[Any, Any]) -> dict[str, Saved]:
        """The tensors of a mapping by name; those that were cut are put together."""
        names = name_table(items)
        found = {}
        for name, value in items.items():
            saved = _saved(value)
            if type(name) is str and saved is not None:
                found[name] = Saved(saved.array, names.get(name, saved.parameter))
        cut = {name: items_of(told) or {} for name, told in (items_of(items.get(CUT_TABLE)) or {}).items()}
        whole = {name: Saved(self._put_together(found, name, told), names.get(name)) for name, told in cut.items()}
        parts = {text_of(part) for told in cut.values() for part in members_of(told.get("slices")) or ()}
        return {name: saved for name, saved in found.items() if name not in parts} | whole

    def _put_together(self, found: Mapping[str, Saved], name: object, told: Mapping[Any, Any]) -> ArrayRef:
        parts = [text_of(part) for part in members_of(told.get("slices")) or ()]
        shape = members_of(told.get("OriginShape"))
        plain = shape is not None and all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
        if type(name) is not str or not plain or not parts or any(part not in found for part in parts):
            problem = Problem(str(self.path), f"a broken {CUT_TABLE}", "the parts of each array", "the file is damaged")
            raise BadFile(problem)
        return joined([found[part].array for part in parts if part is not None], tuple(shape or ()))

    def choose(self, key: str | None) -> tuple[str, dict[str, Saved]]:
        """The one set of weights of the file with its place, or the one that `key` names."""
        where = str(self.path)
        known = {**self.sets, **{name: members for name, members in self.others.items() if members}}
        if key is not None:
            if key not in known:
                choices = ", ".join(f"--key {printable(name, 80)}" for name in known if name)
                raise Refused(Problem(where, f"nothing under the key {key}", choices or "no key, for there is one set"))
            return key, known[key]
        if not self.sets and self.others:
            raise Refused(
                Problem(
                    where,
                    "the state of an optimizer",
                    "the weights of a model",
                    "name the .pdparams, or a set of it with --key",
                )
            )
        if not self.sets:
            raise BadFile(Problem(where, *self._nameless()))
        if len(self.sets) > 1:
            names = ", ".join(printable(name, 80) or "its own" for name in list(self.sets)[:20])
            keys = ", ".join(f"--key {printable(name, 80)}" for name in list(self.sets)[:20] if name)
            found = f"{len(self.sets)} sets of weights ({names})"
            raise Refused(Problem(where, found, "to know which one is meant", f"choose one: {keys}"))
        return next(iter(self.sets.items()))

    def _nameless(self) -> tuple[str, str, str]:
        """What a file without a set of weights is: tensors outside of a dict have no place in a model."""
        do = "save a dict: paddle.save(layer.state_dict(), 'model.pdparams')"
        if _saved(self.root) is not None:
            return "one tensor alone", "a state dict", do
        if members_of(self.root) is not None:
            return "a list or tuple", "a state dict, whose tensors have names", do
        return "no array", "a state dict", "is this a file of weights?"

    def names(self, key: str) -> dict[str, str] | None:
        """The parameters' own names that the file lists for a set, in their order; None if it has no such list."""
        items = items_of(self.root) if not key else None
        return name_table(items) if items is not None and NAME_TABLE in items else None

    def dtype(self, saved: Saved) -> np.dtype[Any]:
        """The dtype that paddle gives an array when it is loaded; one that it does not have is `Refused`."""
        stored: np.dtype[Any] = saved.array.dtype
        if stored == np.dtype("<u2"):
            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        if stored.newbyteorder("=") not in DTYPES.values():
            problem = Problem(
                str(self.path), f"an array of {stored}", f"one of {', '.join(DTYPES)}", "convert it first"
            )
            raise Refused(problem)
        return stored

    def tensor(self, saved: Saved, name: str) -> Tensor:
        """The elements of a saved tensor, lazily."""
        if saved.array.fault:
            where = f"{self.path}: {printable(name, 80)}"
            raise BadFile(Problem(where, saved.array.fault, "an array of numbers", "the file is damaged or forged"))
        return array_tensor(self._storage, saved.array, self.dtype(saved))


def _saved(value: object) -> Saved | None:
    """An array, or the pair of a name and an array."""
    if type(value) is ArrayRef:
        return Saved(value)
    pair = members_of(value)
    if pair is not None and len(pair) == 2 and type(pair[1]) is ArrayRef and text_of(pair[0]) is not None:
        return Saved(pair[1], text_of(pair[0]))
    return None


def name_table(items: Mapping[Any, Any]) -> dict[str, str]:
    """The parameters' own names by their places in the model, as far as the file lists them."""
    table = items_of(items.get(NAME_TABLE)) or {}
    pairs = ((name, text_of(value)) for name, value in table.items())
    return {name: own for name, own in pairs if type(name) is str and own is not None}


def _is_optimizer(items: Mapping[Any, Any], arrays: Mapping[str, Saved]) -> bool:
    if "LR_Scheduler" in items or "master_weights" in items:
        return True
    return bool(arrays) and all(_ACCUMULATOR.fullmatch(name) for name in arrays)


def holds_tables(path: Path) -> bool:
    """True for a pickle that paddle.save alone makes: with its table of names, or with pairs of a name and an array."""
    try:
        with PaddleFile(path) as file:
            items = items_of(file.root) or {}
            paired = any(s.parameter is not None for members in file.sets.values() for s in members.values())
            return NAME_TABLE in items or CUT_TABLE in items or paired
    except NeutralError:
        return False
