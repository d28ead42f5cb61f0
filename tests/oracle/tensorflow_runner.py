"""TensorFlow's side of the oracle: the Keras models of the zoo as checkpoints and SavedModels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.oracle import keras_runner
from tests.oracle.process import serve
from tests.zoo import DEFAULT_FORMATS, Case, cases, permute


def save(model: Any, folder: Path, kind: str) -> Path:
    match kind:
        case "checkpoint":
            return Path(tf.train.Checkpoint(model=model).save(str(folder / "checkpoint" / "model")))
        case "saved_model":
            model.export(str(folder / "saved_model"), verbose=False)
            return folder / "saved_model"
        case "plain_saved_model":
            tf.saved_model.save(model, str(folder / "plain_saved_model"))
            return folder / "plain_saved_model"
    raise ValueError(f"tensorflow has no format {kind}")


def left_out(model: Any, checkpoint: str) -> bool:
    """Whether TensorFlow saved less than the model; it says nothing when it does."""
    saved = [name for name, _ in tf.train.list_variables(checkpoint) if name.startswith("model/")]
    return len(saved) < len(model.weights)


def build(
    case: str, seed: int, folder: str, equal: bool, formats: list[str] | None, dtype: str, weights: str | None
) -> dict[str, Any]:
    it = cases(equal)[case]
    model = keras_runner.prepared(it, seed, dtype, weights)
    kinds = formats if formats is not None else DEFAULT_FORMATS["tensorflow"]
    files = {kind: str(save(model, Path(folder), kind)) for kind in kinds}
    missing: dict[str, str] = {}
    if "checkpoint" in files and left_out(model, files["checkpoint"]):
        del files["checkpoint"]
        missing["checkpoint"] = "tf.train.Checkpoint leaves out the layers that a Keras 3 layer holds in a list"
    return {"files": files, "missing": missing, **keras_runner.describe(model, it, seed, folder, dtype)}


def run_saved_model(folder: Path, case: Case, arrays: list[np.ndarray]) -> np.ndarray:
    """Call the function that the SavedModel itself holds; no Keras model is built."""
    loaded = tf.saved_model.load(str(folder))
    given = [tf.constant(array) for array in keras_runner.arranged(case, arrays, "tensorflow")]
    if hasattr(loaded, "serve"):
        output = keras_runner.for_cpu(case, loaded.serve)(given if len(given) > 1 else given[0])
    else:
        signature = loaded.signatures["serving_default"]
        names = sorted(signature.structured_input_signature[1])
        (output,) = signature(**dict(zip(names, given, strict=True))).values()
    return permute(output.numpy(), case.models["tensorflow"].output, case.output)


def restore(model: Any, prefix: str) -> None:
    """Weights of an object-based checkpoint, or of one that has names only: `layer/kernel`."""
    reader = tf.train.load_checkpoint(prefix)
    if reader.has_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"):
        tf.train.Checkpoint(model=model).read(prefix).assert_existing_objects_matched().expect_partial()
        return
    for name, weight in zip(keras_runner.names(model), model.weights, strict=True):
        weight.assign(reader.get_tensor(re.sub(r"/\w+_cell(_\d+)?/", "/", name)))


def forward(case: str, file: str, arrays: str, equal: bool, dtype: str) -> dict[str, Any]:
    it = cases(equal)[case]
    with np.load(arrays) as given:
        inputs = [given[f"input{i}"] for i in range(len(given.files))]
    path = Path(file)
    if path.is_dir() and (path / "saved_model.pb").exists():
        keras.config.set_floatx(dtype)
        output = run_saved_model(path, it, inputs)
    else:
        model = keras_runner.fresh(it, 10**6, dtype, "tensorflow")
        prefix = file.removesuffix(".index")
        restore(model, prefix)
        output = keras_runner.run(model, it, inputs)
    np.savez(arrays, output=output)
    return {}


if __name__ == "__main__":
    serve({"build": build, "forward": forward, "unseen": keras_runner.unseen})
