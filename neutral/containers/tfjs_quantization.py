"""How TensorFlow.js turns quantized weights into values, and which values a quantization holds.

>>> import numpy as np
>>> from neutral.native import from_array
>>> eight = read_quantization("w", {"dtype": "uint8", "min": -1.0, "scale": 0.5}, np.dtype("float32"))
>>> stored = from_array(np.array([0, 2, 255], np.uint8))
>>> eight.values(stored).read().tolist()
[-1.0, 0.0, 126.5]
>>> eight.holds(eight.values(stored)), eight.holds(from_array(np.array([0.3], np.float32)))
(True, False)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neutral.errors import BadFile, Problem
from neutral.native import Array, Range, Tensor

_STORED: Mapping[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "float16": np.dtype("<f2")}


@dataclass(frozen=True)
class Quantization:
    """One weight's: `value = stored * scale + low`; a `float16` one is widened alone."""

    name: str
    dtype: np.dtype[Any]
    scale: float = 1.0
    low: float = 0.0

    @property
    def stored(self) -> np.dtype[Any]:
        return _STORED[self.name]

    def values(self, stored: Tensor) -> Tensor:
        """The values, as TensorFlow.js computes them."""
        return _Mapped(stored, self, False, self.dtype)

    def quantized(self, values: Tensor) -> Tensor:
        """What is stored of values; only those for which it `holds` come back as they were."""
        return _Mapped(values, self, True, self.stored)

    def holds(self, values: Tensor) -> bool:
        """Whether every value would come back bit for bit."""
        return all(_same_bits(self.expand(self.reduce(tile)), tile) for tile in values.tiles())

    def expand(self, stored: Array) -> Array:
        if self.name == "float16":
            return np.asarray(stored, self.dtype)
        # In double precision, then rounded once, as a JavaScript number that is put into a Float32Array.
        values = stored.astype(np.float64) * self.scale + self.low
        return np.asarray(np.floor(values + 0.5) if self.dtype.kind == "i" else values).astype(self.dtype)

    def reduce(self, values: Array) -> Array:
        with np.errstate(all="ignore"):
            if self.name == "float16":
                return values.astype(self.stored)
            steps = (
                np.rint((values.astype(np.float64) - self.low) / self.scale) if self.scale else np.zeros(values.shape)
            )
            found: Array = np.nan_to_num(np.clip(steps, 0, np.iinfo(self.stored).max)).astype(self.stored)
            return found


def _same_bits(one: Array, other: Array) -> bool:
    return one.tobytes() == other.astype(one.dtype, copy=False).tobytes()


class _Mapped(Tensor):
    """Elements of another tensor, expanded or reduced one by one."""

    def __init__(self, base: Tensor, quantization: Quantization, reducing: bool, dtype: np.dtype[Any]) -> None:
        self._base = base
        self._map = quantization.reduce if reducing else quantization.expand
        self.shape = base.shape
        self.dtype = dtype.newbyteorder("=")
        self.streams = base.streams

    def block(self, ranges: Sequence[Range]) -> Array:
        return self._map(self._base.block(ranges)).astype(self.dtype, copy=False)


def read_quantization(where: str, told: object, dtype: np.dtype[Any]) -> Quantization:
    """A manifest's `quantization`, if TensorFlow.js would load a weight of this dtype with it."""
    given = told if isinstance(told, dict) else {}
    name = str(given.get("dtype"))
    if name not in _STORED or (dtype.kind == "i" and name == "float16") or dtype.name not in ("float32", "int32"):
        found = f"{dtype.name} quantized as {name}"
        raise BadFile(Problem(where, found, "float32 as uint8, uint16 or float16, or int32 as uint8 or uint16"))
    if name == "float16":
        return Quantization(name, dtype)
    scale: Any = given.get("scale")
    low: Any = given.get("min")
    if not _is_number(scale) or not _is_number(low):
        raise BadFile(Problem(where, f"quantization with min {low!r} and scale {scale!r}", "two finite numbers"))
    ends = (float(low), float(low) + float(scale) * float(np.iinfo(_STORED[name]).max))
    limit = float(np.finfo(np.float32).max) if dtype.kind == "f" else 2.0**31 - 1
    if not all(abs(end) <= limit for end in ends):
        raise BadFile(Problem(where, f"quantization from {ends[0]:g} to {ends[1]:g}", f"values that {dtype.name} has"))
    return Quantization(name, dtype, float(scale), float(low))


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False
