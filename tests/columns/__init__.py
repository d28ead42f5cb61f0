"""The zoo in more frameworks: each module here gives its framework's model of a case, from the rows of torch or Keras.

A column is data: `column(case)` gives a `Model` whose rows the framework's runner in tests/oracle understands, or says in
words why the framework has no such model. Columns and runners know the frameworks from their own documentation and source,
never from neutral's tables.
"""

from __future__ import annotations

import importlib

from tests.zoo import Case, Model, side_by_side

COLUMNS = ("flax_linen", "flax_nnx", "onnx", "paddle", "mlx", "tfjs", "numpy")


def model_of(case: Case, framework: str) -> Model | str:
    """The framework's model of a case, or why it has none."""
    if framework in case.models:
        return case.models[framework]
    if framework not in COLUMNS:
        return case.absent[framework]
    module = importlib.import_module(f"tests.columns.{framework}")
    if case.parts:
        models = [model_of(part, framework) for part in case.parts]
        missing = [model for model in models if isinstance(model, str)]
        put_together = getattr(module, "side_by_side", side_by_side)
        if missing:
            return missing[0]
        together: Model = put_together(list(case.parts), models)
        return together
    found: Model | str = module.column(case)
    return found
