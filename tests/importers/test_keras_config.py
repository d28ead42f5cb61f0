"""Configs rebuilt from graphs, judged by the forward pass of the real Keras."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

from neutral.errors import Refused
from neutral.exporters.keras_graph import capture
from neutral.importers.keras_config import layer_classes, layer_names, model_config
from neutral.schema.graph import Graph, Node, Value
from neutral.schema.kinds import KINDS, AnyLayer, Parameter
from neutral.schema.manifest import Manifest, Source

DIGEST = "0" * 64


def parameter(axes: str, *shape: int) -> Parameter:
    return Parameter(axes=tuple(axes.split()), shape=shape, dtype="float32", sha256=DIGEST)


def layer(kind: str, path: str, parameters: dict[str, Parameter], **attributes: Any) -> AnyLayer:
    made: AnyLayer = KINDS[kind](path=path, parameters=parameters, **attributes)  # type: ignore[assignment]
    return made


def manifest(layers: list[AnyLayer], graph: Graph | None, framework: str = "torch", **settings: Any) -> Manifest:
    source = Source(framework=framework, format="x", settings=settings)
    return Manifest(source=source, layers=tuple(layers), weights_digest=DIGEST, graph=graph)


def chain(axes: str, shape: tuple[int | None, ...] | None, *steps: tuple[Any, ...]) -> Graph:
    """A graph of one node after another. A step: op, layer or None, attributes, axes and shape of its output."""
    values, nodes, last = {"x": Value(axes=tuple(axes.split()), shape=shape)}, [], "x"
    for i, (op, path, attributes, out_axes, out_shape) in enumerate(steps):
        name = f"n{i}"
        values[name] = Value(axes=tuple(out_axes.split()), shape=out_shape)
        nodes.append(Node(name=name, op=op, layer=path, inputs=(last,), outputs=(name,), attributes=attributes))
        last = name
    return Graph(inputs=("x",), outputs=(last,), values=values, nodes=tuple(nodes))


# Canonical layers of a Keras model, by hand.


def _pairs(config: dict[str, Any], kernel: tuple[int, ...]) -> Any:
    if config["padding"] == "valid":
        return ((0, 0),) * len(kernel)
    reach = [d * (k - 1) for k, d in zip(kernel, config["dilation_rate"], strict=True)]
    if config["padding"] == "causal":
        return ((reach[0], 0),)
    return "same" if max(config["strides"]) > 1 else tuple((r // 2, r - r // 2) for r in reach)


def _canonical(path: str, live: Any, split: dict[str, int]) -> list[AnyLayer]:
    config, cls = live.get_config(), type(live).__name__
    shapes = {w.name: tuple(w.shape) for w in live.weights}
    bias = {"bias": parameter("out", *shapes["bias"])} if "bias" in shapes and len(shapes["bias"]) == 1 else {}
    window = {k: tuple(config[n]) for k, n in (("strides", "strides"), ("dilation", "dilation_rate")) if n in config}
    if cls == "Dense":
        i, o = shapes["kernel"]
        made = ("out_channel out_position", split["out"], o // split["out"]) if split.get("out") else ("out", o)
        taken = ("channel position", split["in"], i // split["in"]) if split.get("in") else ("in", i)
        return [layer("dense", path, {"kernel": parameter(f"{made[0]} {taken[0]}", *made[1:], *taken[1:]), **bias})]
    if cls.startswith("Conv") and not cls.endswith("Transpose"):
        *kernel, i, o = shapes["kernel"]
        padding = _pairs(config, tuple(kernel))
        role = {"kernel": parameter("out in h w d"[: 6 + 2 * len(kernel)], o, i, *kernel), **bias}
        return [layer("conv", path, role, padding=padding, groups=config["groups"], padding_mode="zeros", **window)]
    if cls.startswith("DepthwiseConv"):
        *kernel, i, m = shapes["kernel"]
        role = {"kernel": parameter("out in h w"[: 6 + 2 * len(kernel)], i * m, 1, *kernel), **bias}
        return [layer("depthwise", path, role, padding=_pairs(config, tuple(kernel)), groups=i, **window)]
    if cls.endswith("Transpose"):
        *kernel, o, i = shapes["kernel"]
        role = {"kernel": parameter("in out h w d"[: 6 + 2 * len(kernel)], i, o, *kernel), **bias}
        crops, extras = [], []
        for k, s in zip(kernel, config["strides"], strict=True):
            total = k - s if config["padding"] == "same" else -max(s - k, 0)
            crops.append((max(total, 0) // 2, max(total, 0) - max(total, 0) // 2))
            extras.append(max(-total, 0))
        return [
            layer("conv_transpose", path, role, padding=tuple(crops), output_padding=tuple(extras), groups=1, **window)
        ]
    if cls == "Embedding":
        return [layer("embedding", path, {"embedding": parameter("token feature", *shapes["embeddings"])})]
    if cls in ("LSTM", "GRU", "SimpleRNN", "Bidirectional"):
        inner = live.forward_layer if cls == "Bidirectional" else live
        own, name = inner.get_config(), type(inner).__name__
        kind, gates = {"LSTM": ("lstm", 4), "GRU": ("gru", 3), "SimpleRNN": ("simple_rnn", 1)}[name]
        u, i = own["units"], inner.cell.kernel.shape[0]
        two = ("direction ", (2,)) if cls == "Bidirectional" else ("", ())
        gate = ("gate ", (gates,)) if gates > 1 else ("", ())
        roles = {
            "input_kernel": parameter(f"{two[0]}{gate[0]}unit in", *two[1], *gate[1], u, i),
            "recurrent_kernel": parameter(f"{two[0]}{gate[0]}unit hidden", *two[1], *gate[1], u, u),
        }
        if own["use_bias"]:
            roles["bias"] = parameter(f"{two[0]}side {gate[0]}unit", *two[1], 2, *gate[1], u)
        more = {"go_backwards": own["go_backwards"], "activation": own["activation"]}
        if gates > 1:
            more["recurrent_activation"] = own["recurrent_activation"]
        if kind == "gru":
            more["reset_after"] = own["reset_after"]
        return [layer(kind, path, roles, **more)]
    if cls == "MultiHeadAttention":
        q, h, d = live.query_dense.kernel.shape
        k, v, e = live.key_dense.kernel.shape[0], live.value_dense.kernel.shape[-1], live.output_dense.kernel.shape[-1]
        roles = {"query_kernel": ("head dim in", h, d, q), "key_kernel": ("head dim in_key", h, d, k)}
        roles |= {
            "value_kernel": ("head value_dim in_value", h, v, k),
            "output_kernel": ("out head value_dim", e, h, v),
        }
        roles |= {"query_bias": ("head dim", h, d)} if config["use_bias"] else {}
        return [layer("attention", path, {r: parameter(*a) for r, a in roles.items()}, heads=h, kv_heads=h)]
    names = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "variance", "alpha": "slope"}
    vector = ("channel position", split["feature"]) if split.get("feature") else None
    roles = {}
    for name, shape in shapes.items():
        axes = "xyzuv"[: len(shape)]
        kept = tuple(n for n in shape if n != 1) or (1,)
        if vector and len(shape) == 1:
            roles[names.get(name, name)] = parameter(vector[0], vector[1], shape[0] // vector[1])
        elif cls == "PReLU":
            own_shape = (shape[-1], *shape[:-1]) if kept != (shape[-1],) else kept
            roles["slope"] = parameter(" ".join("fghij"[: len(own_shape)]), *own_shape)
        else:
            moved = (shape[-1], *shape[:-1]) if len(shape) > 2 else shape
            roles[names.get(name, name)] = parameter(" ".join(axes), *moved)
    eps = {"eps": config["epsilon"]} if "epsilon" in config else {}
    if cls == "BatchNormalization":
        return [layer("batch_norm", path, roles, decay=config["momentum"], axis=-1, **eps)]
    if cls == "LayerNormalization":
        axis = config["axis"]
        return [layer("layer_norm", path, roles, normalized_axes=1 if isinstance(axis, int) else len(axis), **eps)]
    if cls == "GroupNormalization":
        groups = {"groups": config["groups"]} if config["groups"] != -1 else {}
        return [layer("group_norm" if groups else "instance_norm", path, roles, **groups, **eps)]
    kind = {"RMSNormalization": "rms_norm", "PReLU": "prelu"}[cls]
    return [layer(kind, path, roles, **eps)]


def _live_layers(model: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for one in model.layers:
        if isinstance(one, keras.Model):
            found.update(_live_layers(one, f"{prefix}{one.name}."))
        else:
            found[f"{prefix}{one.name}"] = one
    return found


def archived(model: Any) -> Manifest:
    """The manifest that a Keras model would have if it had come from somewhere else."""
    graph, splits, notes = capture(json.loads(model.to_json()))
    assert graph is not None, notes
    found, live = [], _live_layers(model)
    for path, one in live.items():
        inner = one.layer if isinstance(one, L.TimeDistributed) else one
        if inner.weights:
            found += _canonical(path, inner, splits.get(path, {}))
    return manifest(found, graph)


def randomise(model: Any, seed: int = 3) -> None:
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "float" in weight.dtype:
            low = 0.3 if "variance" in weight.name else -0.6
            weight.assign(rng.uniform(low, 0.9, weight.shape).astype("float32"))


def rebuilt(model: Any) -> Any:
    """The model again, from its graph; weights copied by layer."""
    made = keras.saving.deserialize_keras_object(json.loads(json.dumps(model_config(archived(model)))))
    randomise(model)
    names, live = layer_names(archived(model)), _live_layers(model)
    for path, name in names.items():
        made.get_layer(name).set_weights(live[path].get_weights())
    return made


def inputs(model: Any, seed: int = 1) -> list[Any]:
    rng = np.random.default_rng(seed)
    found = []
    for one in model.inputs:
        shape = (2, *(n or 5 for n in one.shape[1:]))
        token = "int" in one.dtype
        found.append(rng.integers(0, 9, shape) if token else rng.normal(size=shape).astype("float32"))
    return found


def lenet() -> Any:
    return keras.Sequential(
        [
            L.Input((14, 14, 1)),
            L.Conv2D(6, 5, padding="same", activation="tanh", name="c1"),
            L.AveragePooling2D(2, name="p1"),
            L.Conv2D(16, 3, activation="relu", name="c2"),
            L.MaxPooling2D(2, name="p2"),
            L.Flatten(name="flat"),
            L.Dropout(0.3, name="drop"),
            L.Dense(84, activation="tanh", name="f1"),
            L.Dense(10, activation="softmax", name="f2"),
        ]
    )


def lstm_stack() -> Any:
    return keras.Sequential(
        [
            L.Input((7,), dtype="int32"),
            L.Embedding(11, 5, name="table"),
            L.LSTM(4, return_sequences=True, name="r1"),
            L.Dropout(0.2),
            L.Bidirectional(L.GRU(3, return_sequences=True, reset_after=False), merge_mode="sum", name="r2"),
            L.TimeDistributed(L.Dense(6), name="step"),
            L.SimpleRNN(5, go_backwards=True, use_bias=False, name="r3"),
            L.Dense(2, name="out"),
        ]
    )


def branches() -> Any:
    x = L.Input((9, 8, 3), name="image")
    a = L.Conv2D(4, (3, 2), padding="same", strides=2, use_bias=False, name="a")(x)
    a = L.BatchNormalization(name="bn")(a)
    a = L.ReLU(6.0)(a)
    d = L.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="d")(x)
    d = L.Conv2D(4, 1, strides=2, activation="gelu", name="e")(d)
    y = L.Add()([a, d])
    y = L.Concatenate()([y, a, L.MaxPooling2D(3, 2, padding="same")(x)])
    inner = keras.Sequential([L.Input((5, 4, 11)), L.Conv2D(6, 2, name="c"), L.LeakyReLU(0.2)], name="inner")
    z = inner(y)
    g = L.GlobalAveragePooling2D(keepdims=True)(z)
    g = L.Dense(6, activation="sigmoid", name="gate")(g)
    z = L.Multiply()([z, g])
    f = L.Flatten()(z)
    f = L.BatchNormalization(name="fbn")(f)
    f = L.PReLU(name="fpr")(f)
    s = L.Input((6, 5), name="sequence")
    h, hs, cs = L.LSTM(4, return_sequences=True, return_state=True, name="r1")(s)
    h = L.LSTM(4, return_sequences=True, name="r2")(h, initial_state=[hs, cs])
    h = L.MultiHeadAttention(2, 3, value_dim=2, name="at")(h, s, use_causal_mask=True)
    h = L.LayerNormalization(name="ln")(h)
    h = L.Conv1D(5, 3, padding="causal", name="c1")(h)
    h = L.BatchNormalization(name="b1")(h)
    h = L.GlobalMaxPooling1D()(h)
    top = L.Concatenate()([L.Dense(7, name="fc")(f), h])
    shared = L.Dense(9, name="shared")
    top = shared(L.Dense(12, activation="elu", name="fd")(top) * 0.5 + 1.0)
    return keras.Model([x, s], [L.Softmax()(top), shared(L.RepeatVector(3)(L.Dense(12, name="fe")(h))), z])


def decoder() -> Any:
    return keras.Sequential(
        [
            L.Input((5,)),
            L.Dense(3 * 2 * 8, activation="relu", name="d"),
            L.BatchNormalization(name="bn"),
            L.Reshape((3, 2, 8)),
            L.Conv2DTranspose(6, 3, strides=2, padding="same", activation="relu", name="t1"),
            L.Conv2DTranspose(4, (2, 4), strides=(3, 2), name="t2"),
            L.UpSampling2D((2, 3), interpolation="bilinear"),
            L.Cropping2D(((1, 0), (2, 1))),
            L.ZeroPadding2D(((0, 2), (1, 0))),
            L.GroupNormalization(2, name="gn"),
            L.LayerNormalization(axis=[1, 2, 3], name="ln"),
            L.PReLU(shared_axes=[1, 2], name="pr"),
            L.Conv2D(1, 3, padding="same", name="last"),
        ]
    )


def sequences() -> Any:
    x = L.Input((12, 4))
    y = L.Conv1D(6, 3, strides=2, padding="same", name="c")(x)
    y = L.PReLU(name="p")(y)
    y = L.Permute((2, 1))(y)
    y = L.LayerNormalization(name="n")(y)
    y = L.Bidirectional(L.LSTM(3), name="b")(y)
    y = L.Reshape((2, 3))(y)
    y = L.BatchNormalization(name="q")(y)
    y = L.Conv1DTranspose(4, 3, strides=2, name="t")(y)
    y = L.Flatten()(y)
    return keras.Model(x, [L.Dense(3, name="o")(y), L.Softmax()(y)])


MODELS: list[Callable[[], Any]] = [lenet, lstm_stack, branches, decoder, sequences]


@pytest.mark.parametrize("make", MODELS)
def test_a_rebuilt_model_computes_the_same(make: Callable[[], Any]) -> None:
    model = make()
    again = rebuilt(model)
    data = inputs(model)
    data = data if len(data) > 1 else data[0]
    for wanted, found in zip(*(_listed(m.predict(data, verbose=0)) for m in (model, again)), strict=True):
        assert wanted.shape == found.shape and np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=1e-5)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_a_chain_is_a_sequential_of_the_same_layers() -> None:
    config = model_config(archived(lenet()))
    assert config["class_name"] == "Sequential"
    classes = [entry["class_name"] for entry in config["config"]["layers"]]
    fused = ["Activation", "ReLU", "Activation", "Softmax"]
    assert [c for c in classes if c not in fused] == [
        "InputLayer", "Conv2D", "AveragePooling2D", "Conv2D", "MaxPooling2D", "Flatten", "Dropout", "Dense", "Dense",
    ]  # fmt: skip
    assert [c for c in classes if c in fused] == fused


# Single operators, as torch has them.


def conv(**attributes: Any) -> AnyLayer:
    known = {"strides": (1, 1), "dilation": (1, 1), "padding": ((0, 0), (0, 0)), "groups": 1, **attributes}
    return layer("conv", "features.0", {"kernel": parameter("out in h w", 4, 3, 3, 3)}, **known)


IMAGE = "batch channel height width"


def built(layers: list[AnyLayer], graph: Graph) -> tuple[list[str], Any]:
    config = model_config(manifest(layers, graph))
    classes = [entry["class_name"] for entry in config["config"]["layers"]][1:]
    return classes, keras.saving.deserialize_keras_object(config)


def test_symmetric_padding_with_strides_is_a_layer_of_its_own() -> None:
    graph = chain(IMAGE, (None, 3, 8, 8), ("Conv", "features.0", {}, IMAGE, (None, 4, 4, 4)))
    classes, model = built([conv(strides=(2, 2), padding=((1, 1), (1, 1)))], graph)
    assert classes == ["ZeroPadding2D", "Conv2D"]
    assert model.output_shape == (None, 4, 4, 4) and model.get_layer("features.0").padding == "valid"


def test_centred_padding_is_same() -> None:
    graph = chain(IMAGE, (None, 3, 8, 8), ("Conv", "features.0", {}, IMAGE, (None, 4, 8, 8)))
    classes, model = built([conv(padding=((1, 1), (1, 1)))], graph)
    assert classes == ["Conv2D"] and model.get_layer("features.0").padding == "same"


def test_strides_with_dilation_keep_every_nth_position() -> None:
    graph = chain(IMAGE, (None, 3, 9, 9), ("Conv", "features.0", {}, IMAGE, (None, 4, 3, 3)))
    classes, model = built([conv(strides=(2, 2), dilation=(2, 2))], graph)
    assert classes == ["Conv2D", "MaxPooling2D"] and model.output_shape == (None, 3, 3, 4)


def test_a_transposed_convolution_is_cropped() -> None:
    role = {"kernel": parameter("in out h w", 3, 5, 3, 3)}
    settings = {"strides": (2, 2), "dilation": (1, 1), "padding": ((1, 1), (1, 1)), "output_padding": (1, 1)}
    up = layer("conv_transpose", "up", role, groups=1, **settings)
    graph = chain(IMAGE, (None, 3, 4, 4), ("ConvTranspose", "up", {}, IMAGE, (None, 5, 8, 8)))
    classes, model = built([up], graph)
    assert classes == ["Conv2DTranspose", "Cropping2D"] and model.output_shape == (None, 8, 8, 5)
    assert model.layers[1].cropping == ((1, 0), (1, 0))


def test_an_unknown_size_becomes_a_reshape() -> None:
    fc = layer("dense", "fc", {"kernel": parameter("out channel position", 2, 4, 36)})
    graph = chain(
        IMAGE,
        (None, 3, None, None),
        ("Conv", "features.0", {}, IMAGE, (None, 4, None, None)),
        ("Flatten", None, {"axis": 1}, "batch feature", (None, 144)),
        ("Gemm", "fc", {}, "batch feature", (None, 2)),
    )
    classes, model = built([conv(), fc], graph)
    assert classes == ["Conv2D", "Reshape", "Dense"]
    assert model.predict(np.ones((1, 8, 8, 3), "float32"), verbose=0).shape == (1, 2)


SIGNAL = "batch channel width"


def signal(shape: tuple[int | None, ...] | None, *steps: tuple[Any, ...]) -> Graph:
    """A Conv1d of 4 channels, and what follows it."""
    return chain(SIGNAL, shape, ("Conv", "c", {}, SIGNAL, (None, 4, 6)), *steps)


def conv1d() -> AnyLayer:
    role = {"kernel": parameter("out in w", 4, 3, 3)}
    return layer("conv", "c", role, strides=(1,), dilation=(1,), padding=((0, 0),), groups=1)


@pytest.mark.parametrize("shape", [(None, 3, None), (None, 3, 8), None])
def test_a_dense_layer_over_positions(shape: tuple[int | None, ...] | None) -> None:
    a = layer("dense", "a", {"kernel": parameter("out in", 5, 6)})
    z = layer("dense", "z", {"kernel": parameter("out channel position", 2, 4, 5)})
    steps = ("Gemm", "a", {}, SIGNAL, (None, 4, 5)), ("Flatten", None, {"axis": 1}, "batch feature", (None, 20))
    graph = signal(shape, *steps, ("Gemm", "z", {}, "batch feature", (None, 2)))
    _, model = built([conv1d(), a, z], graph)
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(2, 8, 3)), rng.normal(size=(3, 3, 4))
    over, last = rng.normal(size=(6, 5)), rng.normal(size=(4, 5, 2))
    model.get_layer("c").set_weights([kernel])
    model.get_layer("a").set_weights([over])
    model.get_layer("z").set_weights([last.transpose(1, 0, 2).reshape(20, 2)])
    windows = np.stack([x[:, i : i + 3] for i in range(6)], axis=1)
    hidden = np.einsum("blki,kio->bol", windows, kernel) @ over
    np.testing.assert_allclose(
        model.predict(x, verbose=0), np.einsum("bcp,cpo->bo", hidden, last), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_a_norm_over_positions_of_unknown_number(shape: tuple[int, ...]) -> None:
    count = len(shape)
    norm = layer("layer_norm", "n", {"scale": parameter("a b"[: 2 * count - 1], *shape)}, eps=1e-5)
    graph = signal((None, 3, None), ("LayerNormalization", "n", {"axis": -count}, SIGNAL, (None, 4, 6)))
    _, model = built([conv1d(), norm], graph)
    found = model.predict(np.random.default_rng(4).normal(size=(2, 8, 3)), verbose=0)
    assert found.shape == (2, 6, 4) and model.get_layer("n").gamma.shape == shape
    np.testing.assert_allclose(found.mean(axis=1 if count == 1 else (1, 2)), 0, atol=1e-5)


def test_a_recurrent_layer_over_positions_of_unknown_number() -> None:
    roles = {"input_kernel": parameter("unit in", 2, 6), "recurrent_kernel": parameter("unit hidden", 2, 2)}
    settings = {"activation": "tanh", "go_backwards": False}
    graph = signal((None, 3, None), ("RNN", "r", {"return_sequences": False}, "batch feature", (None, 2)))
    _, model = built([conv1d(), layer("simple_rnn", "r", roles, **settings)], graph)
    assert model.get_layer("r").cell.kernel.shape == (6, 2)


def test_a_flatten_of_an_unsplit_kernel_permutes_the_value() -> None:
    fc = layer("dense", "fc", {"kernel": parameter("out in", 2, 24)})
    steps = ("Flatten", None, {"axis": 1}, "batch feature", (None, 24)), ("Gemm", "fc", {}, "batch feature", (None, 2))
    classes, model = built([fc], chain(IMAGE, (None, 4, 2, 3), *steps))
    assert classes == ["Permute", "Flatten", "Dense"]
    x, kernel = np.random.default_rng(1).normal(size=(2, 4, 2, 3)), np.random.default_rng(2).normal(size=(24, 2))
    model.get_layer("fc").set_weights([kernel])
    found = model.predict(np.moveaxis(x, 1, -1), verbose=0)
    np.testing.assert_allclose(found, x.reshape(2, 24) @ kernel, rtol=1e-4, atol=1e-5)


ELEMENTWISE: list[tuple[str, dict[str, Any], Callable[[Any], Any]]] = [
    ("Clip", {"min": 0.0, "max": 6.0}, lambda x: np.clip(x, 0, 6)),
    ("Clip", {"min": -0.5, "max": 0.75}, lambda x: np.clip(x, -0.5, 0.75)),
    ("LeakyRelu", {"alpha": 0.07}, lambda x: np.where(x > 0, x, 0.07 * x)),
    ("Celu", {"alpha": 0.7}, lambda x: np.where(x > 0, x, 0.7 * np.expm1(x / 0.7))),
    ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}, lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    ("Gelu", {"approximate": "tanh"}, lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))),
    ("HardSwish", {}, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("ThresholdedRelu", {"alpha": 0.4}, lambda x: np.where(x > 0.4, x, 0)),
    ("Shrink", {"lambd": 0.5, "bias": 0.5}, lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0)),
    ("Neg", {}, lambda x: -x),
    ("LogSoftmax", {"axis": 1}, lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))),
]


@pytest.mark.parametrize(("op", "attributes", "wanted"), ELEMENTWISE)
def test_elementwise_operators(op: str, attributes: dict[str, Any], wanted: Callable[[Any], Any]) -> None:
    _, model = built([], chain("batch feature", (None, 40), (op, None, attributes, "batch feature", (None, 40))))
    x = np.linspace(-4, 8, 80, dtype="float32").reshape(2, 40)
    np.testing.assert_allclose(model.predict(x, verbose=0), wanted(x.astype("float64")), atol=3e-6)


POOL = {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}


def test_a_padded_maximum_after_a_relu() -> None:
    relu = ("Relu", None, {}, IMAGE, (None, 2, 6, 6))
    classes, _ = built([], chain(IMAGE, (None, 2, 6, 6), relu, ("MaxPool", None, POOL, IMAGE, (None, 2, 3, 3))))
    assert classes == ["ReLU", "ZeroPadding2D", "MaxPooling2D"]
    odd = ("MaxPool", None, POOL, IMAGE, (None, 2, 4, 4))
    assert built([], chain(IMAGE, (None, 2, 7, 7), odd))[0] == ["MaxPooling2D"], "the padding of 'same' on 7"


def one(op: str, path: str | None, attributes: dict[str, Any]) -> Graph:
    return chain(IMAGE, (None, 3, 8, 8), (op, path, attributes, IMAGE, (None, 4, 4, 4)))


VOLUME = "batch channel depth height width"


def volume() -> AnyLayer:
    role = {"kernel": parameter("out in d h w", 4, 3, 1, 1, 1)}
    return layer("conv", "c", role, strides=(1,) * 3, dilation=(1,) * 3, padding=((0, 0),) * 3, groups=1)


def over() -> AnyLayer:
    return layer("dense", "a", {"kernel": parameter("out in", 5, 6)})


def depths() -> Graph:
    conv3d = ("Conv", "c", {}, VOLUME, (None, 4, None, None, 6))
    return chain(VOLUME, (None, 3, None, None, None), conv3d, ("Gemm", "a", {}, VOLUME, (None, 4, None, None, 5)))


REFUSALS: list[tuple[str, list[AnyLayer], Graph, str]] = [
    ("max pool", [], one("MaxPool", None, POOL), "not negative"),
    ("uncounted average", [], one("AveragePool", None, POOL), "padding that is counted"),
    ("ceil mode", [], one("MaxPool", None, {**POOL, "pads": (0,) * 4, "ceil_mode": 1}), "ceil_mode"),
    ("padding mode", [conv(padding_mode="reflect")], one("Conv", "features.0", {}), "'reflect'"),
    ("unknown strides", [conv(strides=None)], one("Conv", "features.0", {}), "unknown strides"),
    ("reflection", [], one("Pad", None, {"mode": "reflect", "pads": (0, 0, 1, 1, 0, 0, 1, 1)}), "padding with zeros"),
    ("operator", [], one("DepthToSpace", None, {"blocksize": 2}), "DepthToSpace"),
    ("unknown sizes", [volume(), over()], depths(), "2 axes of unknown size"),
    ("missing layer", [], one("Conv", "features.0", {}), "no layer"),
]


@pytest.mark.parametrize(("name", "layers", "graph", "reason"), REFUSALS, ids=[r[0] for r in REFUSALS])
def test_what_keras_cannot_compute_is_refused(name: str, layers: list[AnyLayer], graph: Graph, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        model_config(manifest(layers, graph))
    assert all(p.where and p.found and p.expected and p.do for p in refused.value.problems)


def test_all_problems_are_told_at_once() -> None:
    role = {"kernel": parameter("in out h w", 4, 2, 3, 3)}
    grouped = layer("conv_transpose", "up", role, groups=2, strides=(1, 1), padding=((0, 0), (0, 0)))
    lstm = {
        "input_kernel": parameter("gate unit in", 4, 3, 2),
        "recurrent_kernel": parameter("gate unit hidden", 4, 3, 1),
    }
    values = {n: Value(axes=tuple(IMAGE.split()), shape=(None, 4, 5, 5)) for n in "xyz"}
    values |= {n: Value(axes=("batch", "time", "feature"), shape=(None, 5, 2)) for n in "st"}
    nodes = (
        Node(name="a", op="ConvTranspose", layer="up", inputs=("x",), outputs=("y",)),
        Node(name="b", op="Relu", inputs=("y",), outputs=("z",)),
        Node(name="c", op="LSTM", layer="rnn", inputs=("s",), outputs=("t",)),
    )
    graph = Graph(inputs=("x", "s"), outputs=("z", "t"), values=values, nodes=nodes)
    rnn = layer("lstm", "rnn", {**lstm, "projection": parameter("hidden unit", 1, 3)})
    with pytest.raises(Refused) as refused:
        model_config(manifest([grouped, rnn], graph))
    assert [p.where for p in refused.value.problems] == ["up", "rnn"]
    assert "groups" in str(refused.value) and "projection" in str(refused.value)


def test_without_a_graph_there_is_no_model_but_there_are_layers() -> None:
    bare = conv(strides=None, dilation=None, padding=None, groups=None)
    two = {
        "input_kernel": ("direction gate unit in", 2, 4, 3, 5),
        "recurrent_kernel": ("direction gate unit hidden", 2, 4, 3, 3),
    }
    rnn = layer("lstm", "rnn", {role: parameter(*shape) for role, shape in two.items()})
    source = manifest([bare, layer("dense", "_x/y", {"kernel": parameter("out in", 2, 3)}), rnn], None)
    with pytest.raises(Refused, match="without a graph"):
        model_config(source)
    classes = layer_classes(source)
    assert [classes[path][0] for path in ("features.0", "_x/y", "rnn")] == ["Conv2D", "Dense", "LSTM"]
    assert classes["features.0"][1]["kernel_size"] == [3, 3] and "strides" not in classes["features.0"][1]
    assert classes["rnn"][1]["bidirectional"] is True
    assert layer_names(source) == {"features.0": "features.0", "_x/y": "layer_x_y", "rnn": "rnn"}
    with pytest.raises(Refused, match="kind unknown"):
        layer_classes(manifest([layer("unknown", "u", {"w": parameter("a b", 2, 3)})], None))
    assert layer_classes(manifest([layer("unknown", "u", {})], None)) == {}, "a layer without weights"


def test_a_config_of_keras_3_is_given_back() -> None:
    own = json.loads(lenet().to_json())
    back = manifest(archived(lenet()).layers, None, "keras", config=own)  # type: ignore[arg-type]
    assert model_config(back) == own
    assert layer_classes(back)["c1"][0] == "Conv2D" and layer_classes(back)["c1"][1]["filters"] == 6
    assert layer_names(back)["f2"] == "f2"


def test_attention_of_grouped_heads() -> None:
    shapes = {"query": (12, 6), "key": (6, 6), "value": (6, 6), "output": (6, 12)}
    roles = {f"{name}_kernel": parameter("out in", *shape) for name, shape in shapes.items()}
    attention = layer("attention", "at", roles, heads=4, kv_heads=2)
    axes = "batch time feature"
    graph = chain(axes, (None, 5, 6), ("Attention", "at", {}, axes, (None, 5, 6)))
    classes, model = built([attention], graph)
    assert classes == ["GroupQueryAttention"] and model.count_params() == sum(a * b for a, b in shapes.values())
    assert layer_classes(manifest([attention], graph))["at"][0] == "GroupedQueryAttention"
