"""Keras's side of the oracle, run as a program; the TensorFlow side builds its models with the same functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.oracle.process import serve
from tests.zoo import DEFAULT_FORMATS, Case, Layer, Model, cases, make_inputs, permute

WRAPPERS = ("Bidirectional", "TimeDistributed", "SpectralNormalization")
# Keras writes these as `.h5` and cannot load them: a list of axes comes back as its last, a class of one's own unbuilt.
H5_WEIGHTS_ONLY = ("layer_norm_image", "subclassed")
FILES = {"keras": "model.keras", "weights_h5": "model.weights.h5", "h5": "model.h5"}


@keras.saving.register_keras_serializable(package="zoo")
class Subclassed(keras.Model):
    """A model class of somebody's own: attributes, and a list of layers."""

    def __init__(self, units: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.units = list(units)
        self.hidden = keras.layers.Dense(units[0])
        self.blocks = [keras.layers.Dense(size) for size in units[1:-1]]
        self.head = keras.layers.Dense(units[-1])

    def call(self, x: Any) -> Any:
        x = self.hidden(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


def make_layer(row: Layer) -> Any:
    inside = [make_layer(one) for one in row.inside]
    if row.cls == "Sequential":
        return keras.Sequential(inside, name=row.name)
    cls = getattr(keras.layers, row.cls)
    if row.cls in WRAPPERS:
        return cls(inside[0], name=row.name, **row.args)
    if inside:
        return cls(inside if len(inside) > 1 else inside[0], name=row.name, **row.args)
    return cls(name=row.name, **row.args)


def make(case: Case, model: Model) -> Any:
    inputs = []
    for one, axes in zip(case.inputs, model.inputs, strict=True):
        sizes = dict(zip(one.axes, one.shape, strict=True))
        shape = tuple(sizes[letter] for letter in axes[1:])
        inputs.append(keras.Input(shape, dtype="int32" if one.below else None, name=f"x{len(inputs)}"))
    if model.builder == "sequential":
        return keras.Sequential([inputs[0], *(make_layer(row) for row in model.layers)], name="zoo")
    if model.builder == "subclassed":
        flat = [one for row in model.layers for one in row.inside or (row,)]
        built = Subclassed([row.args["units"] for row in flat], name="zoo")
        built(np.zeros((1, *inputs[0].shape[1:]), inputs[0].dtype))
        return built
    layers: dict[str, Any] = {}
    values: dict[str, Any] = {f"x{i}": value for i, value in enumerate(inputs)}
    value, ends = inputs[0], dict(values)
    for row in model.layers:
        layers[row.name] = layers[row.cls] if row.cls in layers else make_layer(row)
        arguments = [values[source] for source in row.of] or [value]
        ends = {name: end for name, end in ends.items() if all(end is not one for one in arguments)}
        merged = row.cls in ("Concatenate", "Add")
        value = values[row.name] = layers[row.name](arguments) if merged else layers[row.name](*arguments)
        ends[row.name] = value
    outputs = list(ends.values())
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs if len(outputs) > 1 else value, name="zoo")


def names(model: Any) -> list[str]:
    """Each weight's path, made unique, in the model's own order."""
    found: list[str] = []
    for weight in model.weights:
        path = re.sub(r"^zoo/", "", weight.path)
        found.append(path if path not in found else f"{path}#{len(found)}")
    return found


def randomize(model: Any, seed: int) -> None:
    rng = np.random.default_rng((seed, 2))
    for weight in model.weights:
        value = rng.standard_normal(weight.shape) * 0.5
        if weight.path.endswith("moving_variance"):
            value = rng.uniform(0.5, 1.5, weight.shape)
        weight.assign(value.astype(weight.dtype))


def fresh(case: Case, seed: int, dtype: str, framework: str = "keras") -> Any:
    keras.utils.clear_session(free_memory=False)
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    model = make(case, case.models[framework])
    randomize(model, seed)
    return model


def arranged(case: Case, arrays: Sequence[np.ndarray], framework: str = "keras") -> list[np.ndarray]:
    axes = case.models[framework].inputs
    return [permute(array, one.axes, to) for array, one, to in zip(arrays, case.inputs, axes, strict=True)]


def for_cpu(case: Case, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """On a CPU, channels-first convolutions of every dtype exist in XLA only."""
    if all(axes.endswith("c") or "c" not in axes for axes in case.models["keras"].inputs):
        return call
    compiled: Callable[[Any], Any] = tf.function(call, jit_compile=True)
    return compiled


def run(model: Any, case: Case, arrays: Sequence[np.ndarray]) -> np.ndarray:
    given = arranged(case, arrays)
    call = for_cpu(case, lambda x: model(x, training=False))
    outputs = keras.tree.flatten(call(given if len(given) > 1 else given[0]))
    return permute(keras.ops.convert_to_numpy(outputs[-1]), case.models["keras"].output, case.output)


def describe(model: Any, case: Case, seed: int, folder: str, dtype: str) -> dict[str, Any]:
    """The model's inputs, output and weights, as `build` answers them."""
    inputs = make_inputs(case, seed, dtype)
    arrays = {f"input{i}": array for i, array in enumerate(inputs)}
    arrays |= {f"weights/{n}": value for n, value in zip(names(model), model.get_weights(), strict=True)}
    path = Path(folder) / "keras.npz"
    np.savez(path, output=run(model, case, inputs), **arrays)
    return {"arrays": str(path), "inputs": len(inputs)}


def prepared(case: Case, seed: int, dtype: str, weights: str | None) -> Any:
    model = fresh(case, seed, dtype)
    if weights is not None:
        with np.load(weights) as given:
            model.set_weights([given[name] for name in names(model)])
    return model


def build(
    case: str, seed: int, folder: str, equal: bool, formats: list[str] | None, dtype: str, weights: str | None
) -> dict[str, Any]:
    it = cases(equal)[case]
    model = prepared(it, seed, dtype, weights)
    files: dict[str, str] = {}
    missing: dict[str, str] = {}
    for kind in formats if formats is not None else DEFAULT_FORMATS["keras"]:
        path = str(Path(folder) / FILES[kind])
        try:
            if kind == "weights_h5":
                model.save_weights(path)
            else:
                model.save(path)
            files[kind] = path
        except NotImplementedError as error:
            missing[kind] = str(error)
    return {"files": files, "missing": missing, **describe(model, it, seed, folder, dtype)}


def load(file: str, case: Case, dtype: str) -> Any:
    if file.endswith(".weights.h5") or (file.endswith(".h5") and case.name in H5_WEIGHTS_ONLY):
        model = fresh(case, 10**6, dtype)
        model.load_weights(file)
        return model
    keras.utils.clear_session(free_memory=False)
    return keras.saving.load_model(file, compile=False, custom_objects={"Subclassed": Subclassed})


def forward(case: str, file: str, arrays: str, equal: bool, dtype: str) -> dict[str, Any]:
    it = cases(equal)[case]
    with np.load(arrays) as given:
        inputs = [given[f"input{i}"] for i in range(len(given.files))]
    np.savez(arrays, output=run(load(file, it, dtype), it, inputs))
    return {}


def unseen(case: str, seed: int, equal: bool) -> dict[str, Any]:
    it = cases(equal)[case]
    model = fresh(it, seed, "float64")
    inputs = make_inputs(it, seed, "float64")
    before = run(model, it, inputs)
    found = []
    for name, weight in zip(names(model), model.weights, strict=True):
        kept = keras.ops.convert_to_numpy(weight)
        weight.assign(kept + np.linspace(0.1, 0.3, kept.size).reshape(kept.shape))
        if np.abs(run(model, it, inputs) - before).max() < 1e-7:
            found.append(name)
        weight.assign(kept)
    return {"names": found}


if __name__ == "__main__":
    serve({"build": build, "forward": forward, "unseen": unseen})
