"""Keras layers that are matrix products: dense layers, einsums, embeddings, attention."""

from __future__ import annotations

from dataclasses import replace

from neutral.conventions.keras_onnx import known_product
from neutral.exporters.keras_activations import activated
from neutral.exporters.keras_builder import Builder
from neutral.exporters.keras_calls import Call, dtype_of
from neutral.exporters.keras_flow import Flow, Shape, Unclear
from neutral.schema.graph import Attribute


def dense(b: Builder, call: Call) -> list[Flow]:
    units = call.positive("units")
    flow, key = call.x, f"dense:{call.path}"
    if flow.shape is not None and flow.rank > 2:
        flow = b.as_is(flow)
        b.split(call.path, flow)
        result = Flow("", (*flow.dims[:-1], units), trail=frozenset({call.path}), masked=flow.masked)
        result = replace(result, pixels=flow.turned or flow.pixels)
    else:
        order = 0 if key in b.decisions.denied else b.decisions.orders.get(key, 0)
        b.split(call.path, flow, **{"in": flow.channels, "out": order})
        shape = (None if flow.shape is None else flow.dims[0], units)
        result = Flow("", shape, channels=order, origins=frozenset({key}), fixed=False)
        result = replace(result, trail=frozenset({call.path}), masked=flow.masked)
    result = b.emit(call.path, "Gemm", [flow], replace(result, dtype=call.dtype(flow)), layer=call.path)
    return activated(b, call, result)


def embedding(b: Builder, call: Call) -> list[Flow]:
    flow = call.x
    if not flow.dtype.startswith(("int", "uint")):
        if flow.source is not None:
            b.decisions.token(flow.source)
        else:
            flow = b.emit(f"{call.path}.cast", "Cast", [flow], replace(b.as_is(flow), dtype="int64"), {"to": "int64"})
    flow = b.as_is(flow)
    result = Flow("", (*flow.dims, call.positive("output_dim")), dtype=dtype_of(call.config))
    result = replace(result, masked=call.flag("mask_zero"))
    return [b.emit(call.path, "Gather", [flow], result, layer=call.path)]


def attention(b: Builder, call: Call) -> list[Flow]:
    for key in ("use_gate", "sliding_window"):
        if call.config.get(key):
            raise Unclear(f"it has {key}")
    if call.config.get("attention_axes") not in (None, [1], (1,)):
        raise Unclear(f"its attention_axes are {call.config.get('attention_axes')!r}")
    given = dict(zip(("query", "value", "key"), call.inputs, strict=False))
    attributes: dict[str, Attribute] = {}
    for key, value in call.arguments.items():
        if key in ("query", "value", "key") and isinstance(value, Flow):
            given[key] = value
        elif key == "use_causal_mask" and value is True:
            attributes["is_causal"] = 1
        elif value not in (None, False):
            raise Unclear(f"it is called with {key}")
    if not {"query", "value"} <= set(given) or len(call.inputs) > 3:
        raise Unclear("it is called without a query and a value")
    if any(flow.masked for flow in given.values()):
        raise Unclear("it uses a mask")
    query, value = b.as_is(given["query"]), b.as_is(given["value"])
    key_flow = b.as_is(given["key"]) if "key" in given else value
    if {query.rank, value.rank, key_flow.rank} != {3}:
        raise Unclear("its inputs are not of rank 3")
    size = call.config.get("output_shape")
    size = size[0] if isinstance(size, list | tuple) and len(size) == 1 else size
    size = query.features if size is None else size
    if not isinstance(size, int):
        raise Unclear(f"its output_shape is {size!r}")
    result = Flow("", (*query.dims[:2], size), dtype=query.dtype)
    names = {flow.name for flow in (query, value, key_flow)}
    inputs = [query] if len(names) == 1 else [query, key_flow, value]
    return [b.emit(call.path, "Attention", inputs, result, attributes, layer=call.path)]


def einsum_dense(b: Builder, call: Call) -> list[Flow]:
    flow = b.as_is(call.x)
    equation = call.config.get("equation")
    if not isinstance(equation, str) or equation.count("->") != 1 or equation.count(",") != 1:
        raise Unclear(f"its equation is {equation!r}")
    equation = equation.replace(" ", "")
    operands, output = equation.split("->")
    given, kernel = operands.split(",")
    wanted = call.config.get("output_shape")
    sizes = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    shape = _einsum_shape(given, output, flow.dims, sizes)
    result = Flow("", shape, dtype=flow.dtype, masked=flow.masked, pixels=flow.turned or flow.pixels)
    bias = str(call.config.get("bias_axes") or "")
    joined = _dense_like(given.replace("...", ""), kernel, output.replace("...", ""), bias)
    if joined is None:
        attributes: dict[str, Attribute] = {"equation": equation, "bias_axes": bias}
        result = b.emit(call.path, "Einsum", [flow], result, attributes, layer=call.path)
    else:
        result = _einsum_as_dense(b, call, flow, result, *joined)
    return activated(b, call, result)


def _dense_like(given: str, kernel: str, output: str, bias: str) -> tuple[int, int] | None:
    """How many axes an einsum sums and makes, if it is a dense layer on the last axes; else None."""
    made = [c for c in output if c in kernel and c not in given]
    summed = [c for c in given if c in kernel and c not in output]
    if set(kernel) - set(made) - set(summed) or len(set(kernel)) != len(kernel) or not summed or not made:
        return None
    ends = given.endswith("".join(summed)) and output.endswith("".join(made))
    rest = given[: len(given) - len(summed)] == output[: len(output) - len(made)]
    return (len(summed), len(made)) if ends and rest and (not bias or list(bias) == made) else None


def _einsum_as_dense(b: Builder, call: Call, flow: Flow, result: Flow, summed: int, made: int) -> Flow:
    """A Gemm over the last axes as one."""
    b.split(call.path, flow)
    if summed > 1:
        dims = (*flow.dims[: flow.rank - summed], known_product(flow.dims[flow.rank - summed :]))
        target = tuple(-1 if n is None else n for n in dims[1:])
        flow = b.emit(f"{call.path}.join", "Reshape", [flow], replace(flow, shape=dims), {"shape": target})
    dims = (*result.dims[: result.rank - made], known_product(result.dims[result.rank - made :]))
    joined = b.emit(call.path, "Gemm", [flow], replace(result, shape=dims), layer=call.path)
    if made == 1:
        return joined
    target = tuple(-1 if n is None else n for n in result.dims[1:])
    return b.emit(f"{call.path}.split", "Reshape", [joined], result, {"shape": target})


def _einsum_shape(letters: str, output: str, shape: Shape, wanted: list[int | None]) -> Shape:
    known: dict[str, int | None] = {}
    middle: Shape = ()
    if "..." in letters:
        before, after = letters.split("...")
        middle = shape[len(before) : len(shape) - len(after)]
        known.update(zip(after, shape[len(shape) - len(after) :], strict=True))
        letters = before
    known.update(zip(letters, shape, strict="..." not in output))
    head, _, tail = output.partition("...") if "..." in output else ("", "", output)
    ends = dict(zip(reversed(output.replace("...", "")), reversed(wanted), strict=False))
    sizes = {c: known[c] if c in known else ends.get(c) for c in head + tail}
    if "..." in output:
        return (*(sizes[c] for c in head), *middle, *(sizes[c] for c in tail))
    return tuple(sizes[c] for c in tail)
