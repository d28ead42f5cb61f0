"""Pooling operators as Keras layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from neutral.importers.keras_builder import Builder
from neutral.importers.keras_forms import Inexpressible
from neutral.importers.keras_reshaping import bordered
from neutral.importers.keras_tensor import KerasTensor
from neutral.schema.graph import Node


def numbers(node: Node, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = node.attributes.get(key, default)
    value = default if value is None else value
    if not isinstance(value, tuple) or len(value) != len(default):
        raise Inexpressible(f"{key} {value!r}", f"{len(default)} numbers")
    return tuple(int(str(n)) for n in value)


def pool(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.image(b.only(node))
    space = x.rank - 2
    if space not in (1, 2, 3):
        raise Inexpressible(f"a pooling of {space} axes", "1 to 3")
    kernel = numbers(node, "kernel_shape", (0,) * space)
    strides = numbers(node, "strides", (1,) * space)
    pads = numbers(node, "pads", (0,) * (2 * space))
    pairs = list(zip(pads[:space], pads[space:], strict=True))
    if set(numbers(node, "dilations", (1,) * space)) != {1}:
        raise Inexpressible("a pooling with dilation", "one without")
    average, automatic = node.op == "AveragePool", node.attributes.get("auto_pad", "NOTSET")
    if automatic not in ("NOTSET", "VALID", "SAME_UPPER"):
        raise Inexpressible(f"auto_pad {automatic}", "SAME_UPPER, or explicit pads")
    space_sizes = x.shape[2:]
    if node.attributes.get("ceil_mode"):
        _ceil_is_floor(space_sizes, kernel, strides, pairs)
    counted = bool(node.attributes.get("count_include_pad", 0)) and average
    padding, name = "valid", b.name(node)
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    if automatic == "SAME_UPPER":
        if counted:
            raise Inexpressible("automatic padding that is counted", "padding that is not")
        padding = "same"
    elif any(pads):
        if not counted and all(
            pair == _same_pads(n, k, s) for n, k, s, pair in zip(space_sizes, kernel, strides, pairs, strict=True)
        ):
            padding = "same"
        elif counted or (not average and x.nonnegative):
            grown = replace(
                x,
                shape=(
                    *x.shape[:2],
                    *(None if n is None else n + sum(p) for n, p in zip(space_sizes, pairs, strict=True)),
                ),
            )
            x = bordered(b, f"{name}.pad", "ZeroPadding", pairs, x, grown)
        else:
            raise Inexpressible(
                f"{'an average' if average else 'a maximum'} with padding {[list(pair) for pair in pairs]}",
                "values known to be not negative" if not average else "padding that is counted",
            )
    cls = f"{'Average' if average else 'Max'}Pooling{space}D"
    config = {"pool_size": per_axis(kernel), "strides": per_axis(strides), "padding": padding}
    return [b.add(name, cls, config, [x.json], like)]


def per_axis(sizes: tuple[int, ...]) -> int | list[int]:
    return sizes[0] if len(sizes) == 1 else list(sizes)


def _same_pads(n: int | None, k: int, s: int) -> tuple[int, int] | None:
    """What 'same' pads on an axis of n; n does not matter at stride 1."""
    if n is None and s != 1:
        return None
    total = k - 1 if s == 1 else max((-(-(n or 0) // s) - 1) * s + k - (n or 0), 0)
    return total // 2, total - total // 2


def _ceil_is_floor(
    sizes: Sequence[int | None], kernel: Sequence[int], strides: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> None:
    for n, k, s, pair in zip(sizes, kernel, strides, pairs, strict=True):
        if s != 1 and (n is None or (n + sum(pair) - k) % s):
            raise Inexpressible("a pooling with ceil_mode", "windows that fit the size of the input")


def global_pool(b: Builder, node: Node) -> list[KerasTensor]:
    x = b.image(b.only(node))
    space = x.rank - 2
    if space not in (1, 2, 3):
        raise Inexpressible(f"a pooling of {space} axes", "1 to 3")
    cls = f"Global{'Average' if node.op == 'GlobalAveragePool' else 'Max'}Pooling{space}D"
    users = b.used.get(node.outputs[0], [])
    if [user.op for user in users] == ["Flatten"] and node.outputs[0] not in b.graph.outputs:
        like = KerasTensor(("", 0, 0), (x.shape[0], x.shape[1]), (0, 1), x.dtype, 0, x.nonnegative)
        made = b.add(b.name(users[0]), cls, {}, [x.json], like)
        b.tensors[users[0].outputs[0]] = made
        b.skipped.add(users[0].name)
        return []
    like = replace(b.like(node, x.perm, x), nonnegative=x.nonnegative)
    return [b.add(b.name(node), cls, {"keepdims": True}, [x.json], like)]
