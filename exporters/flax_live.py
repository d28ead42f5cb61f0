"""Live objects of Flax, read into arrays by path, and the classes and settings of an nnx.Module."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from neutral.conventions.flax_live import Path, is_random_key, places, unboxed
from neutral.conventions.flax_settings import shapes_fit
from neutral.native import NativeLayer, Tensor, from_array

_ACTIVATIONS: Final = {"identity": "linear", "swish": "silu"}
"""Functions of JAX that Keras, and so neutral, calls otherwise."""


@dataclass
class Live:
    """The arrays of a live object, unread; which of them are one array; the classes of its modules, if it has some."""

    leaves: dict[Path, Tensor] = field(default_factory=dict)
    identities: dict[Path, Hashable] = field(default_factory=dict)
    classes: dict[Path, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def known(self, path: Path) -> tuple[str, dict[str, Any]] | None:
        return self.classes.get(path)

    def place(self, layer: str) -> Path:
        """The module that a layer is, or, one of a stack, that keeps it: its path without the number."""
        path = tuple(layer.split(".")) if layer else ()
        without = (path[:i] + path[i + 1 :] for i, key in enumerate(path) if key.isdecimal())
        return next((place for place in (path, *without) if place in self.classes), path)

    def add(self, path: Path, array: Any) -> None:
        if is_random_key(array):
            self.skipped.append(".".join(path))
            return
        self.leaves[path] = from_array(np.asarray(array))
        self.identities[path] = id(array)


def live_arrays(model: Any) -> Live:
    """What is in a dict of arrays, a State, a TrainState, or an nnx.Module."""
    found = Live()
    if _is_module(model):
        _walk(model, found)
    else:
        for place in places(model):
            found.add(place.path, place.array)
    return found


def _is_module(model: Any) -> bool:
    return any(cls.__module__.startswith("flax.nnx") and cls.__name__ == "Module" for cls in type(model).__mro__)


def _walk(model: Any, found: Live) -> None:
    from flax import nnx

    variables = []
    for path, node in nnx.iter_graph(model):
        place = tuple(str(key) for key in path)
        if isinstance(node, nnx.Variable):
            variables.append((place, unboxed(node)[0]))
        elif isinstance(node, nnx.Module):
            found.classes[place] = (_class(node), _settings(node))
    for place, array in sorted(variables, key=lambda pair: _order(pair[0])):
        found.add(place, array)


def _order(path: Path) -> list[tuple[int, int, str]]:
    return [(0, int(key), "") if key.isdecimal() else (1, 0, key) for key in path]


def _class(module: Any) -> str:
    """Flax's own name of a class; that of a user's with its module, so that it passes for none of these."""
    cls = type(module)
    return cls.__name__ if cls.__module__.startswith("flax.nnx") else f"{cls.__module__}.{cls.__qualname__}"


_FUNCTIONS: Final = ("gate_fn", "activation_fn")


def _settings(module: Any) -> dict[str, Any]:
    """The settings of a module that are plain values, functions by their names."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or callable(value):
            continue
        if isinstance(value, bool | int | float | str | tuple | list) or value is None:
            found[name] = value
    for name in _FUNCTIONS:
        if (function := getattr(module, name, None)) is not None:
            told = getattr(function, "__name__", "unknown")
            found[name] = _ACTIVATIONS.get(told, told)
    return found | _renamed(module, found)


def _renamed(module: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the words of the convention."""
    found: dict[str, Any] = {}
    if "einsum_str" in plain:
        found["equation"] = plain["einsum_str"]
    if "out_features" in plain and type(module).__name__ == "LinearGeneral":
        found["features"] = plain["out_features"]
        found["batch_axis"] = bool(getattr(module, "batch_axis", None))
    if "input_dilation" in plain and set(_listed(plain["input_dilation"])) == {1}:
        found["input_dilation"] = 1
    if getattr(module, "mask", None) is not None:
        found["masked"] = True
    return found


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def with_class(layer: NativeLayer, place: Path, classes: Mapping[Path, tuple[str, dict[str, Any]]]) -> NativeLayer:
    """A layer with the class and the settings of the module that it is; of an RNN and its cell both settings."""
    known = classes.get(place)
    if known is None:
        return layer
    cls, config = known
    if not shapes_fit(cls, config, {local: tensor.data.shape for local, tensor in layer.tensors.items()}):
        return replace(layer, cls=f"a stack of {cls}", evidence="class")
    if cls in ("RNN", "Bidirectional"):
        cell = (*place, "cell") if cls == "RNN" else (*place, "forward_rnn", "cell")
        of_cell = classes.get(cell)
        if of_cell is None or (cls == "Bidirectional" and not _alike(place, classes)):
            return replace(layer, cls=f"{cls} of another cell", evidence="class")
        config = {**of_cell[1], **config}
        if of_cell[0] not in _CELLS:
            cls = of_cell[0]
    return replace(layer, cls=cls, config=config, evidence="class")


_CELLS: Final = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")


def _alike(place: Path, classes: Mapping[Path, tuple[str, dict[str, Any]]]) -> bool:
    """True if both directions have cells of one class, set alike."""
    cells = [classes.get((*place, way, "cell")) for way in ("forward_rnn", "backward_rnn")]
    kept = [cell and (cell[0], {k: v for k, v in cell[1].items() if k != "in_features"}) for cell in cells]
    return kept[0] is not None and kept[0] == kept[1]
