"""Finds the object of a live Keras model that a group of its file would belong to. Imports no framework.

A name is `<group>/vars/<number>`, as in a file, or `<group>/weights/<number>` for the weights of a layer that is not
Keras' own, sublayers included.
"""

from __future__ import annotations

from typing import Any

from neutral.conventions.keras_variables import Counter, snake_case

_LISTS = ("layers", "cells")


def live_object(model: Any, group: str) -> Any:
    """The object at `group` (`layers/lstm_1/cell`)."""
    found = model
    steps = iter(group.split("/")) if group else iter(())
    for step in steps:
        if step in _LISTS:
            counter = Counter()
            counted = {counter.unique(snake_case(type(each).__name__)): each for each in getattr(found, step)}
            found = counted[next(steps)]
        else:
            found = getattr(found, step, None) or getattr(found, f"_{step}")
    return found


def live_variables(holder: Any) -> list[Any]:
    """The variables of an object itself, in the order in which Keras numbers them."""
    store: dict[str, Any] = {}
    holder.save_own_variables(store)
    found = [store[name] for name in sorted(store, key=int)]
    if all(hasattr(each, "assign") for each in found):
        return found
    # Keras 2 hands out copies, in the order of these two lists.
    own = [*holder._trainable_weights, *holder._non_trainable_weights]
    return own if [tuple(x.shape) for x in own] == [tuple(x.shape) for x in found] else found


def live_variable(model: Any, name: str) -> Any:
    """The variable of a name that `live_object` and `live_variables` make."""
    holder, kind, number = name.rsplit("/", 2) if name.count("/") > 1 else ("", *name.split("/"))
    found = live_object(model, holder)
    return live_variables(found)[int(number)] if kind == "vars" else found.weights[int(number)]
