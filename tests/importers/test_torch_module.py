"""Graphs rebuilt as torch modules: judged by the forward pass of the model they came from."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import neutral
from neutral.canon import canonical_layers
from neutral.conventions.torch import TORCH
from neutral.errors import Refused
from neutral.exporters.torch import read_live
from neutral.exporters.torch_graph import capture
from neutral.importers.torch_classes import layer_classes
from neutral.importers.torch_export import export
from neutral.importers.torch_module import build_module, fill_module
from neutral.native import NativeModel
from neutral.schema.graph import Attribute, Graph, Node, Value
from neutral.schema.inputs import example_inputs, solve_inputs
from neutral.schema.kinds import KINDS, Layer, Parameter
from neutral.schema.manifest import Manifest, Source
from neutral.schema.shapes import infer

Array = npt.NDArray[Any]


def manifest_of(layers: Sequence[Layer], graph: Graph | None = None) -> Manifest:
    return Manifest(
        source=Source(framework="torch", format="module"),
        layers=tuple(layers),  # type: ignore[arg-type]
        weights_digest="0" * 64,
        graph=graph,
    )


def parameter(axes: Sequence[str], shape: Sequence[int]) -> Parameter:
    return Parameter(axes=tuple(axes), shape=tuple(shape), dtype="float32", sha256=hashlib.sha256(b"").hexdigest())


def layer_of(kind: str, path: str, parameters: Mapping[str, tuple[str, Sequence[int]]], **settings: Any) -> Layer:
    made = {role: parameter(axes.split(), shape) for role, (axes, shape) in parameters.items()}
    return KINDS[kind](path=path, parameters=made, **settings)


def read(model: nn.Module) -> tuple[NativeModel, Manifest]:
    """A live Sequential and its manifest."""
    native = read_live(model)
    graph, splits, notes = capture(native.metadata["modules"])
    assert graph is not None, notes
    layers = []
    for layer in canonical_layers(replace(native, splits=splits), TORCH):
        parameters = {role: parameter(t.axes, t.data.shape) for role, t in layer.tensors.items() if not t.state}
        layers.append(KINDS[layer.kind](path=layer.path, parameters=parameters, **layer.attributes))
    return native, manifest_of(layers, graph)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model in which every tensor is random, statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand(tensor.shape, generator=generator) * (1 if "var" in name else 0.6)
                    + 0.1
                    - 0.3 * ("var" not in name)
                )
    return model.eval()


def as_tensors(arrays: Sequence[Array]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


ACTIVATIONS = [
    nn.CELU(0.5), nn.ELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.Hardshrink(0.3), nn.Hardsigmoid(), nn.Hardswish(),
    nn.Hardtanh(-2.0, 3.0), nn.Identity(), nn.LeakyReLU(0.2), nn.LogSigmoid(), nn.LogSoftmax(1), nn.Mish(),
    nn.PReLU(), nn.PReLU(5), nn.RReLU(), nn.ReLU(), nn.ReLU6(), nn.SELU(), nn.SiLU(), nn.Sigmoid(), nn.Softmax(-1),
    nn.Softmin(1), nn.Softplus(), nn.Softshrink(0.4), nn.Softsign(), nn.Tanh(), nn.Tanhshrink(),
    nn.Threshold(0.1, 0.0), nn.Dropout(0.3), nn.AlphaDropout(0.3),
]  # fmt: skip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "lenet": lenet,
    "vgg": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
        nn.Flatten(), nn.Linear(6 * 9, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3),
    ),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(3, 5, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(30, 4)),
    "batch norm between": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Flatten(), nn.BatchNorm1d(48), nn.PReLU(48), nn.LayerNorm(48), nn.Linear(48, 4)
    ),
    "decoder": lambda: nn.Sequential(
        nn.Linear(5, 6 * 12), nn.BatchNorm1d(72), nn.ReLU(), nn.Unflatten(1, (6, 3, 4)),
        nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 4, 2, 1, groups=2), nn.Sigmoid(),
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    ),
    "norms": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(3, 6, affine=False),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.GroupNorm(6, 6), nn.LocalResponseNorm(3),
    ),
    "last axes": lambda: nn.Sequential(
        nn.LayerNorm((4, 3)), nn.LayerNorm(3), nn.RMSNorm(3), nn.RMSNorm((4, 3), eps=1e-3), nn.LayerNorm(3, bias=False),
        nn.LayerNorm(3, elementwise_affine=False), nn.RMSNorm(3, elementwise_affine=False), nn.GELU(),
    ),
    "pools": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(2, 1, dilation=2),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.AdaptiveMaxPool2d(1),
    ),
    "pads": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.ZeroPad2d((1, 2, 0, 1)), nn.ReflectionPad2d((2, 1, 1, 0)),
        nn.ReplicationPad2d(1), nn.CircularPad2d((0, 1, 2, 0)), nn.ConstantPad2d(1, 0.7),
        nn.Conv2d(3, 2, (2, 3), padding="same", dilation=3),
    ),
    "3d": lambda: nn.Sequential(
        nn.Conv3d(2, 4, (1, 2, 3), groups=2), nn.BatchNorm3d(4), nn.AvgPool3d(2), nn.ConvTranspose3d(4, 3, 3, 2)
    ),
    "resize": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=1.5, mode="bilinear"),
        nn.Upsample(size=(7, 5), mode="nearest-exact"), nn.UpsamplingBilinear2d(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bicubic"), nn.PixelShuffle(2), nn.Sigmoid(),
    ),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, stride=2), nn.Conv2d(8, 3, 1), nn.Tanh()),
    "glu": lambda: nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2)),
    "embedding": lambda: nn.Sequential(
        nn.Embedding(11, 3, padding_idx=2), nn.Dropout(), nn.LayerNorm(3), nn.Flatten(), nn.Linear(12, 2)
    ),
    "activations": lambda: nn.Sequential(
        *(m for act in ACTIVATIONS for m in (nn.Linear(5, 5), act)), nn.Linear(5, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_sequential_gives_the_same_numbers(name: str) -> None:
    model = randomized(MODELS[name]())
    native, manifest = read(model)
    rebuilt = build_module(manifest)
    fill_module(rebuilt, native)
    inputs = as_tensors(example_inputs(manifest, batch=3))
    with torch.no_grad():
        expected, found = model(*inputs), rebuilt(*inputs)
    assert expected.shape == found.shape and expected.std() > 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_keys_are_those_of_the_source(name: str) -> None:
    model = MODELS[name]()
    _, manifest = read(model)
    assert set(build_module(manifest).state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", ["lenet", "batch norm between", "decoder", "embedding", "resize"])
def test_exported_program_takes_other_batches(name: str, tmp_path: Path) -> None:
    model = randomized(MODELS[name]())
    native, manifest = read(model)
    out = tmp_path / "model.pt2"
    export(native, manifest, out)
    program = torch.export.load(out)
    assert set(program.state_dict) == set(model.state_dict())
    for batch in (1, 5):
        inputs = as_tensors(example_inputs(manifest, batch=batch, seed=batch))
        with torch.no_grad():
            assert torch.allclose(program.module()(*inputs), model(*inputs), rtol=0, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_exported_program_takes_other_sizes(tmp_path: Path) -> None:
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    )
    native, manifest = read(model)
    export(native, manifest, tmp_path / "model.pt2")
    x = torch.randn(7, 3, 31, 18)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(tmp_path / "model.pt2").module()(x), model(x), atol=1e-6)


UNTOLD: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    # Only the product of height and width is known.
    "linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)),
        [(3, 6, 8), (3, 8, 6), (3, 4, 14)],
    ),
    # Several sizes give one number of windows.
    "strides": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 12, 2)
        ),
        [(3, 11, 15), (3, 12, 16), (3, 16, 13)],
    ),
    "one axis": (MODELS["conv1d"], [(3, 11), (3, 12)]),
    "square": (lenet, [(1, 28, 28), (1, 31, 29)]),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_exported_program_takes_each_size_that_the_layers_take(name: str, tmp_path: Path) -> None:
    make, sizes = UNTOLD[name]
    model = randomized(make())
    native, manifest = read(model)
    export(native, manifest, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch, size in enumerate(sizes, 1):
        x = torch.randn(batch, *size)
        with torch.no_grad():
            assert torch.allclose(program(x), model(x), rtol=0, atol=1e-6)
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.randn(2, *(3 * n if i else n for i, n in enumerate(sizes[0]))))


def test_a_program_that_torch_fixes_to_a_made_up_size(tmp_path: Path) -> None:
    """Seven positions are 1 x 7 or 7 x 1."""
    native, manifest = read(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(28, 2)))
    with pytest.raises(Refused, match=r"model.pt2: found an input 'input' whose height, width nobody knows"):
        export(native, manifest, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_norm_tells_the_size_of_each_axis(tmp_path: Path) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 4, 6])))
    native, manifest = read(model)
    assert solve_inputs(manifest) == {"input": (2, 3, 6, 8)}
    export(native, manifest, tmp_path / "model.pt2")
    x = torch.randn(5, 3, 6, 8)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(tmp_path / "model.pt2").module()(x), model(x), atol=1e-6)


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    native, manifest = read(nn.Sequential(nn.Linear(3, 2)))
    out = tmp_path / "model.pt2"
    out.write_bytes(b"mine")
    with pytest.raises(Refused):
        export(native, manifest, out)
    assert out.read_bytes() == b"mine"
    export(native, manifest, out, force=True)
    assert torch.export.load(out).module()(torch.ones(1, 3)).shape == (1, 2)


def test_other_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = randomized(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype))
        native, manifest = read(model)
        rebuilt = build_module(manifest)
        fill_module(rebuilt, native)
        x = torch.randn(5, 3).to(dtype)
        with torch.no_grad():
            assert torch.equal(rebuilt(x), model(x))


def test_tensors_that_do_not_fit_are_all_named() -> None:
    _, manifest = read(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    wrong = read_live(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2)))
    with pytest.raises(Refused) as error:
        fill_module(build_module(manifest), wrong)
    assert {p.where for p in error.value.problems} == {"0.weight", "0.bias", "1.weight", "2.weight", "2.bias"}


def test_layers_named_like_methods() -> None:
    graph = chain(
        [("half", "Gemm", "half", {}), ("train.type", "Gemm", "train.type", {})], ("batch", "feature"), (None, 3)
    )
    layers = [dense("half", 3, 4), dense("train.type", 4, 2)]
    module = build_module(manifest_of(layers, graph))
    assert set(module.state_dict()) == {"half.weight", "half.bias", "train.type.weight", "train.type.bias"}
    assert module(torch.ones(2, 3)).shape == (2, 2)


@pytest.mark.parametrize(
    "name", ["class", "None", 'a"b', "a\nb", "a\\b", "\ufb01", "half", "training", "graph", "code", "inner.def"]
)
def test_names_that_a_program_cannot_have(name: str, tmp_path: Path) -> None:
    graph = chain([("fc", "Gemm", name, {})], ("batch", "feature"), (None, 3))
    with pytest.raises(Refused, match="rename the layer") as error:
        export(NativeModel("torch", "pt", ()), manifest_of([dense(name, 3, 4)], graph), tmp_path / "model.pt2")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a'b", "a b", "1x", "a-b", "é", "self", "a$b", "{x}", "match", "inner.graph"])
def test_names_that_a_program_keeps(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict([(name.replace(".", "_"), randomized(nn.Linear(3, 4)))]))
    if "." in name:
        outer, inner = name.split(".")
        model = nn.Sequential(OrderedDict([(outer, nn.Sequential(OrderedDict([(inner, model[0])])))]))
    native, manifest = read(model)
    export(native, manifest, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    x = torch.randn(5, 3)
    with torch.no_grad():
        assert torch.allclose(program.module()(x), model(x), rtol=0, atol=1e-6)
    assert set(program.state_dict) == set(model.state_dict())


REPARAMETRIZED = {
    "weight_norm": {
        "kernel_magnitude": ("d0 d1 d2", (1, 3, 1)),
        "kernel_direction": ("out in width", (4, 3, 2)),
        "bias": ("out", (4,)),
    },
    "spectral_norm": {
        "kernel_raw": ("out in width", (4, 3, 2)),
        "kernel_u": ("d0", (4,)),
        "kernel_v": ("d0", (6,)),
        "bias": ("out", (4,)),
    },
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrized_kernel(name: str, legacy: bool, tmp_path: Path) -> None:
    """The module keeps magnitude and direction apart, by today's names, whichever names the source has."""
    family = nn.utils if legacy else nn.utils.parametrizations
    axis = 1 if name == "weight_norm" else 0
    model = nn.Sequential(getattr(family, name)(nn.Conv1d(3, 4, 2), dim=axis))
    native = read_live(randomized(model))
    layer = layer_of(
        "conv", "0", REPARAMETRIZED[name], strides=(1,), padding=((0, 0),), dilation=(1,), groups=1,
        reparametrization=name, reparametrization_axis=axis,
    )  # fmt: skip
    graph, _, notes = capture(native.metadata["modules"])
    assert graph is not None, notes
    manifest = manifest_of([layer], graph)
    export(native, manifest, tmp_path / "model.pt2")
    x = torch.randn(5, 3, 9)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(tmp_path / "model.pt2").module()(x), model(x), atol=1e-6)


# Input sizes.


def test_smallest_input_that_fits() -> None:
    _, manifest = read(lenet())
    assert solve_inputs(manifest, batch=2) == {"input": (2, 1, 28, 28)}


def test_input_that_is_not_square() -> None:
    _, manifest = read(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 15, 2)))
    (shape,) = solve_inputs(manifest).values()
    assert (shape[2] - 2) * (shape[3] - 2) == 15


@pytest.mark.parametrize(("size", "where"), [(None, "x: found no size"), (3, "more: found 4 features")])
def test_input_that_cannot_fit(size: int | None, where: str) -> None:
    graph = chain([("fc", "Gemm", "fc", {}), ("more", "Gemm", "more", {})], ("batch", "feature"), (None, size))
    with pytest.raises(Refused, match=where):
        solve_inputs(manifest_of([dense("fc", 3, 4), dense("more", 5, 2)], graph))


@pytest.mark.parametrize("name", ["batch norm between", "decoder"])
def test_axes_that_an_archive_has_split(name: str, tmp_path: Path) -> None:
    """A manifest records the axes that cross a Flatten as (channel position)."""
    model = randomized(MODELS[name]())
    neutral.convert(model, tmp_path / "m.pt2")
    inputs = as_tensors(example_inputs(read(model)[1], batch=3))
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(*inputs), model(*inputs))


@pytest.mark.parametrize("name", MODELS)
def test_inferred_shapes_are_those_of_torch(name: str) -> None:
    model = MODELS[name]().eval()
    _, manifest = read(model)
    assert manifest.graph is not None
    inputs = example_inputs(manifest)
    shapes = infer(manifest.graph, {x.path: x for x in manifest.layers}, {"input": inputs[0].shape})
    assert shapes[manifest.graph.outputs[0]] == model(*as_tensors(inputs)).shape


# Meanings that torch's own layers do not have, against Keras.


def dense(path: str, taken: int, made: int) -> Layer:
    return layer_of("dense", path, {"kernel": ("out in", (made, taken)), "bias": ("out", (made,))})


def chain(
    steps: Sequence[tuple[str, str, str | None, dict[str, Attribute]]],
    axes: tuple[str, ...],
    shape: tuple[int | None, ...],
    extra: Sequence[str] = (),
) -> Graph:
    """A graph of nodes one behind the other. `extra` names more outputs of the last node."""
    values = {"x": Value(axes=axes, shape=shape)}
    nodes, last = [], "x"
    for i, (name, op, layer, attributes) in enumerate(steps):
        outputs = (name, *extra) if i == len(steps) - 1 else (name,)
        nodes.append(Node(name=name, op=op, layer=layer, inputs=(last,), outputs=outputs, attributes=attributes))
        values |= {output: Value(axes=("batch",)) for output in outputs}
        last = name
    return Graph(inputs=("x",), outputs=(last, *extra), values=values, nodes=tuple(nodes))


def computed(manifest: Manifest, weights: Mapping[str, Array], x: Array, tmp_path: Path | None = None) -> list[Array]:
    """What the rebuilt module makes of `x`; with a folder also after torch.export."""
    module = build_module(manifest)
    state = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()}
    module.load_state_dict(state, strict=False)
    missing = set(module.state_dict()) - set(state)
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    with torch.no_grad():
        y = module(torch.from_numpy(x))
        if tmp_path is not None:
            free = ({0: torch.export.Dim.AUTO},)
            program = torch.export.export(module, (torch.from_numpy(x[:2]),), dynamic_shapes=(free,))
            torch.export.save(program, tmp_path / "m.pt2")
            again = torch.export.load(tmp_path / "m.pt2").module()(torch.from_numpy(x))
            for a, b in zip(_list(again), _list(y), strict=True):
                assert torch.allclose(a, b, atol=1e-6)
    return [tensor.numpy() for tensor in _list(y)]


def _list(y: Any) -> list[torch.Tensor]:
    return list(y) if isinstance(y, tuple) else [y]


def random_weights(layer: keras.layers.Layer, seed: int = 3) -> list[Array]:
    random = np.random.default_rng(seed)
    weights = [random.uniform(-0.6, 0.6, w.shape).astype(np.float32) for w in layer.get_weights()]
    layer.set_weights(weights)
    return weights


def first(x: Array) -> Array:
    return np.moveaxis(x, -1, 1)


def close(found: Array, expected: Any) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def image(*shape: int) -> Array:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [(8, 9), (7, 6), (5, 12)])
@pytest.mark.parametrize(("k", "s"), [((3, 4), 2), ((2, 5), 3), ((1, 3), 3)])
def test_same_padding_with_strides(k: tuple[int, int], s: int, size: tuple[int, int], tmp_path: Path) -> None:
    x = image(3, *size, 2)
    layer = keras.layers.Conv2D(4, k, s, padding="same")
    expected = layer(x)
    kernel, bias = random_weights(layer)
    expected = layer(x)
    conv = layer_of(
        "conv", "c", {"kernel": ("out in height width", (4, 2, *k)), "bias": ("out", (4,))},
        strides=(s, s), padding="same", dilation=(1, 1), groups=1,
    )  # fmt: skip
    graph = chain([("c", "Conv", "c", {})], ("batch", "channel", "height", "width"), (None, 2, *size))
    weights = {"c.weight": kernel.transpose(3, 2, 0, 1), "c.bias": bias}
    close(computed(manifest_of([conv], graph), weights, first(x), tmp_path)[0], first(np.asarray(expected)))


def test_same_padding_follows_the_size_of_the_input(tmp_path: Path) -> None:
    """One exported program, images of several sizes."""
    conv = layer_of("conv", "c", {"kernel": ("out in height width", (4, 2, 3, 4))}, strides=(2, 2), padding="same")
    graph = chain([("c", "Conv", "c", {})], ("batch", "channel", "height", "width"), (None, 2, None, None))
    manifest = manifest_of([conv], graph)
    module = build_module(manifest)
    kernel = image(4, 2, 3, 4)
    module.load_state_dict({"c.weight": torch.from_numpy(kernel)})
    free = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)
    program = torch.export.export(module, (torch.randn(2, 2, 8, 8),), dynamic_shapes=(free,)).module()
    layer = keras.layers.Conv2D(4, (3, 4), 2, padding="same", use_bias=False)
    layer.build((None, None, None, 2))
    layer.set_weights([kernel.transpose(2, 3, 1, 0)])
    for size in ((8, 9), (7, 6), (5, 12), (11, 11)):
        x = image(3, *size, 2)
        close(program(torch.from_numpy(first(x).copy())).detach().numpy(), first(np.asarray(layer(x))))


def test_causal_convolution(tmp_path: Path) -> None:
    x = image(3, 9, 2)
    layer = keras.layers.Conv1D(4, 3, padding="causal", dilation_rate=2)
    layer(x)
    kernel, bias = random_weights(layer)
    conv = layer_of(
        "conv", "c", {"kernel": ("out in width", (4, 2, 3)), "bias": ("out", (4,))},
        strides=(1,), padding="causal", dilation=(2,), groups=1,
    )  # fmt: skip
    graph = chain([("c", "Conv", "c", {})], ("batch", "channel", "width"), (None, 2, 9))
    weights = {"c.weight": kernel.transpose(2, 1, 0), "c.bias": bias}
    close(computed(manifest_of([conv], graph), weights, first(x), tmp_path)[0], first(np.asarray(layer(x))))


@pytest.mark.parametrize(
    ("k", "s", "padding"),
    [(3, 2, "same"), (4, 2, "same"), (2, 3, "same"), (5, 1, "same"), (3, 2, "valid"), (2, 3, "valid")],
)
def test_transposed_convolution(k: int, s: int, padding: str, tmp_path: Path) -> None:
    x = image(3, 5, 4, 2)
    layer = keras.layers.Conv2DTranspose(4, k, s, padding=padding)
    layer(x)
    kernel, bias = random_weights(layer)
    extra = (max(s - k, 0),) * 2 if padding == "valid" else None
    conv = layer_of(
        "conv_transpose", "c", {"kernel": ("in out height width", (2, 4, k, k)), "bias": ("out", (4,))},
        strides=(s, s), padding="same" if padding == "same" else ((0, 0), (0, 0)), output_padding=extra, dilation=(1, 1),
    )  # fmt: skip
    graph = chain([("c", "ConvTranspose", "c", {})], ("batch", "channel", "height", "width"), (None, 2, 5, 4))
    weights = {"c.weight": kernel.transpose(3, 2, 0, 1), "c.bias": bias}
    close(computed(manifest_of([conv], graph), weights, first(x), tmp_path)[0], first(np.asarray(layer(x))))


@pytest.mark.parametrize("kind", ["Max", "Average"])
@pytest.mark.parametrize(("k", "s"), [(2, 2), (3, 2), (4, 3)])
def test_same_pooling(kind: str, k: int, s: int, tmp_path: Path) -> None:
    x = image(3, 7, 8, 2)
    layer = getattr(keras.layers, f"{kind}Pooling2D")(k, s, padding="same")
    op = "MaxPool" if kind == "Max" else "AveragePool"
    settings: dict[str, Attribute] = {"kernel_shape": (k, k), "strides": (s, s), "auto_pad": "SAME_UPPER"}
    graph = chain([("p", op, None, settings)], ("batch", "channel", "height", "width"), (None, 2, 7, 8))
    close(computed(manifest_of([], graph), {}, first(x), tmp_path)[0], first(np.asarray(layer(x))))


GATES = {"LSTM": ("lstm", 4), "GRU": ("gru", 3), "SimpleRNN": ("simple_rnn", 1)}


def recurrent_layer(cls: str, taken: int, units: int, two: bool, **settings: Any) -> Layer:
    kind, gates = GATES[cls]
    front = ("direction " if two else "") + ("gate " if gates > 1 else "")
    sizes = ((2,) if two else ()) + ((gates,) if gates > 1 else ())
    return layer_of(
        kind, "r",
        {
            "input_kernel": (front + "unit in", (*sizes, units, taken)),
            "recurrent_kernel": (front + "unit hidden", (*sizes, units, units)),
            "bias": (front.replace("gate", "side gate") + "unit" if gates > 1 else front + "side unit", (*sizes[: int(two)], 2, *sizes[int(two) :], units)),
        },
        **settings,
    )  # fmt: skip


def torch_weights(cls: str, weights: Sequence[Array]) -> dict[str, Array]:
    """Keras' weights of one or two directions under torch's names."""
    found = {}
    for way, (kernel, recurrent, bias) in zip(("", "_reverse"), zip(*[iter(weights)] * 3, strict=True), strict=False):
        blocks = [1, 0, 2] if cls == "GRU" else list(range(GATES[cls][1]))
        units = recurrent.shape[0]
        order = np.concatenate([np.arange(units) + b * units for b in blocks])
        sides = bias if bias.ndim == 2 else np.stack([bias, np.zeros_like(bias)])
        found |= {
            f"r.weight_ih_l0{way}": kernel.T[order], f"r.weight_hh_l0{way}": recurrent.T[order],
            f"r.bias_ih_l0{way}": sides[0][order], f"r.bias_hh_l0{way}": sides[1][order],
        }  # fmt: skip
    return found


OPS = {"LSTM": "LSTM", "GRU": "GRU", "SimpleRNN": "RNN"}


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("cls", GATES)
def test_recurrent(cls: str, backwards: bool, sequences: bool, state: bool, tmp_path: Path) -> None:
    x = image(3, 5, 2)
    layer = getattr(keras.layers, cls)(4, return_sequences=sequences, return_state=state, go_backwards=backwards)
    layer(x)
    weights = torch_weights(cls, random_weights(layer))
    expected = layer(x)
    settings: dict[str, Attribute] = {"return_sequences": sequences, "return_state": state}
    extra = (["h", "c"] if cls == "LSTM" else ["h"]) if state else []
    graph = chain([("r", OPS[cls], "r", settings)], ("batch", "time", "feature"), (None, 5, 2), extra)
    described = recurrent_layer(cls, 2, 4, False, go_backwards=backwards)
    found = computed(
        manifest_of([described], graph), weights, x, tmp_path if sequences and state and backwards else None
    )
    for a, b in zip(found, expected if state else [expected], strict=True):
        close(a, b)


@pytest.mark.parametrize("mode", ["concat", "sum", "mul", "ave", None])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("cls", GATES)
def test_bidirectional(cls: str, sequences: bool, mode: str | None, tmp_path: Path) -> None:
    x = image(3, 5, 2)
    layer = keras.layers.Bidirectional(getattr(keras.layers, cls)(4, return_sequences=sequences), merge_mode=mode)
    layer(x)
    weights = torch_weights(cls, random_weights(layer))
    expected = layer(x)
    settings: dict[str, Attribute] = {"return_sequences": sequences, "merge_mode": mode or "none"}
    graph = chain(
        [("r", OPS[cls], "r", settings)], ("batch", "time", "feature"), (None, 5, 2), ["b"] if mode is None else []
    )
    found = computed(
        manifest_of([recurrent_layer(cls, 2, 4, True)], graph),
        weights,
        x,
        tmp_path if sequences and mode == "sum" else None,
    )
    for a, b in zip(found, expected if mode is None else [expected], strict=True):
        close(a, b)


@pytest.mark.parametrize(("cls", "two"), [("LSTM", True), ("GRU", False), ("SimpleRNN", False)])
def test_exported_program_takes_any_number_of_steps(cls: str, two: bool) -> None:
    layer = getattr(keras.layers, cls)(4, return_sequences=True)
    sequence = keras.Sequential([keras.Input((None, 2)), keras.layers.Bidirectional(layer) if two else layer])
    weights = torch_weights(cls, random_weights(sequence.layers[0]))
    graph = chain([("r", OPS[cls], "r", {"return_sequences": True})], ("batch", "time", "feature"), (None, None, 2))
    module = build_module(manifest_of([recurrent_layer(cls, 2, 4, two)], graph))
    module.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()})
    free = (dict.fromkeys((0, 1), torch.export.Dim.AUTO),)
    program = torch.export.export(module, (torch.randn(2, 8, 2),), dynamic_shapes=(free,)).module()
    for steps in (1, 13):
        x = image(3, steps, 2)
        close(program(torch.from_numpy(x)).detach().numpy(), sequence(x))


def test_bidirectional_states_and_initial_states() -> None:
    x, states = image(3, 5, 2), [image(3, 4) * (i + 1) for i in range(4)]
    layer = keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True, return_state=True))
    layer(x)
    weights = torch_weights("LSTM", random_weights(layer))
    expected = layer(x, initial_state=[keras.ops.convert_to_tensor(s) for s in states])
    names = ("x", "h0", "c0", "h1", "c1")
    made = ("r", "fh", "fc", "bh", "bc")
    values = {name: Value(axes=("batch",)) for name in (*names, *made)}
    settings: dict[str, Attribute] = {"return_sequences": True, "return_state": True}
    node = Node(name="r", op="LSTM", layer="r", inputs=names, outputs=made, attributes=settings)
    graph = Graph(inputs=names, outputs=made, values=values, nodes=(node,))
    module = build_module(manifest_of([recurrent_layer("LSTM", 2, 4, True)], graph))
    module.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()})
    found = module(*map(torch.from_numpy, [x, *states]))
    for a, b in zip(found, expected, strict=True):
        close(a.detach().numpy(), b)


@pytest.mark.parametrize(
    ("cls", "settings", "reason"),
    [
        ("GRU", {"reset_after": False}, "reset_after=False"),
        ("LSTM", {"recurrent_activation": "hard_sigmoid"}, "hard_sigmoid"),
        ("GRU", {"activation": "relu"}, "relu"),
        ("SimpleRNN", {"activation": "gelu"}, "gelu"),
    ],
)
def test_recurrent_layers_without_a_torch_form(cls: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        layer_classes(manifest_of([recurrent_layer(cls, 2, 4, False, **settings)]))


def attention_layer(heads: int, taken: int, key_dim: int, **settings: Any) -> Layer:
    made = heads * key_dim
    kernels: dict[str, tuple[str, Sequence[int]]] = {}
    for role in ("query", "key", "value"):
        kernels |= {
            f"{role}_kernel": ("head dim in", (heads, key_dim, taken)),
            f"{role}_bias": ("head dim", (heads, key_dim)),
        }
    kernels |= {"output_kernel": ("out head dim", (taken, heads, key_dim)), "output_bias": ("out", (taken,))}
    assert made
    return layer_of("attention", "a", kernels, heads=heads, **settings)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_takes_query_key_value(causal: bool) -> None:
    query, value, key = image(3, 5, 6), image(3, 4, 6) * 2, image(3, 4, 6) - 1
    layer = keras.layers.MultiHeadAttention(2, 3)
    layer(query, value, key)
    q, qb, k, kb, v, vb, o, ob = random_weights(layer)
    expected = layer(query, value, key, use_causal_mask=causal)
    weights = {
        "a.in_proj_weight": np.concatenate([w.reshape(6, 6).T for w in (q, k, v)]),
        "a.in_proj_bias": np.concatenate([b.reshape(6) for b in (qb, kb, vb)]),
        "a.out_proj.weight": o.reshape(6, 6).T, "a.out_proj.bias": ob,
    }  # fmt: skip
    values = {name: Value(axes=("batch", "time", "feature")) for name in ("q", "k", "v", "a")}
    attributes: dict[str, Attribute] = {"is_causal": 1} if causal else {}
    node = Node(name="a", op="Attention", layer="a", inputs=("q", "k", "v"), outputs=("a",), attributes=attributes)
    graph = Graph(inputs=("q", "k", "v"), outputs=("a",), values=values, nodes=(node,))
    module = build_module(manifest_of([attention_layer(2, 6, 3)], graph))
    module.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()})
    close(module(*map(torch.from_numpy, (query, key, value))).detach().numpy(), expected)


def test_cross_attention_from_keras(tmp_path: Path) -> None:
    """The reader of Keras and the writer of torch agree on which input is which."""
    inputs = [keras.Input((5, 6)), keras.Input((4, 6)), keras.Input((4, 6))]
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 3)(*inputs))
    model.set_weights(random_weights(model.layers[-1]))
    model.save(tmp_path / "m.keras")
    neutral.convert(tmp_path / "m.keras", tmp_path / "m.pt2")
    given = [image(3, 5, 6), image(3, 4, 6) * 2, image(3, 4, 6) - 1]
    program = torch.export.load(tmp_path / "m.pt2").module()
    close(program(*map(torch.from_numpy, given)).detach().numpy(), model(given))


def test_attention_without_a_torch_form() -> None:
    with pytest.raises(Refused, match="projections"):
        layer_classes(manifest_of([attention_layer(2, 6, 5)]))
    with pytest.raises(Refused, match="2 heads on 1"):
        layer_classes(manifest_of([attention_layer(2, 6, 3, kv_heads=1)]))


@pytest.mark.parametrize(
    ("equation", "shape", "output", "bias_axes", "canonical"),
    [
        ("abc,cde->abde", (3, 5, 4), (5, 2, 3), "de", "dec"),
        ("abc,bcd->abd", (3, 5, 4), (5, 2), "d", "bdc"),
        ("...x,xy->...y", (3, 5, 4), (5, 2), "y", "yx"),
    ],
)
def test_einsum_dense(
    equation: str, shape: tuple[int, ...], output: tuple[int, ...], bias_axes: str, canonical: str
) -> None:
    x = image(*shape)
    layer = keras.layers.EinsumDense(equation, output, bias_axes=bias_axes)
    layer(x)
    kernel, bias = random_weights(layer)
    own = equation.split(",")[1].split("->")[0]
    weight = kernel.transpose([own.index(c) for c in canonical])
    described = layer_of(
        "einsum_dense", "e", {"kernel": (" ".join(canonical), weight.shape), "bias": (" ".join("uvw"[: bias.ndim]), bias.shape)},
        equation=equation,
    )  # fmt: skip
    graph = chain([("e", "Einsum", "e", {"equation": equation})], ("batch", "time", "feature"), (None, *shape[1:]))
    found = computed(manifest_of([described], graph), {"e.weight": weight, "e.bias": bias}, x)[0]
    close(found, layer(x))
    layers = {"e": described}
    assert infer(graph, layers, {"x": shape})["e"] == found.shape  # type: ignore[arg-type]


def test_einsum_that_is_a_dense_layer() -> None:
    x = image(3, 5, 4)
    layer = keras.layers.EinsumDense("abc,cde->abde", (5, 2, 3), bias_axes="de")
    layer(x)
    kernel, bias = random_weights(layer)
    node = Node(
        name="e", op="Einsum", layer="e", inputs=("x",), outputs=("y",), attributes={"equation": "abc,cde->abde"}
    )
    values = {"x": Value(axes=("batch", "time", "feature")), "y": Value(axes=tuple("abde"), shape=(None, 5, 2, 3))}
    graph = Graph(inputs=("x",), outputs=("y",), values=values, nodes=(node,))
    found = computed(
        manifest_of([dense("e", 4, 6)], graph), {"e.weight": kernel.reshape(4, 6).T, "e.bias": bias.reshape(6)}, x
    )[0]
    close(found, layer(x))


def test_slopes_per_element_have_no_torch_form() -> None:
    slopes = layer_of("prelu", "p", {"slope": ("feature height width", (3, 4, 5))})
    with pytest.raises(Refused, match="slopes"):
        layer_classes(manifest_of([slopes]))


def test_an_operator_that_torch_lacks() -> None:
    graph = chain([("n", "NonMaxSuppression", None, {})], ("batch", "feature"), (None, 3))
    with pytest.raises(Refused, match="NonMaxSuppression"):
        build_module(manifest_of([], graph))


RESHAPING: list[tuple[str, dict[str, Attribute], Callable[[Array], Array]]] = [
    ("Transpose", {"perm": (0, 3, 1, 2)}, lambda x: x.transpose(0, 3, 1, 2)),
    ("Reshape", {"shape": (0, -1)}, lambda x: x.reshape(3, 2, 20)),
    ("Slice", {"starts": (1, 0), "ends": (-1, 2**31 - 1), "axes": (2, 3), "steps": (1, 2)}, lambda x: x[:, :, 1:-1, ::2]),
    ("Squeeze", {"axes": (1,)}, lambda x: x[:, 0] if x.shape[1] == 1 else x),
    ("Unsqueeze", {"axes": (1, 3)}, lambda x: x[:, None, :, None]),
    ("Expand", {"shape": (6, 1, 1, 1, 1)}, lambda x: np.broadcast_to(x, (6, *x.shape))),
    ("Tile", {"repeats": (1, 2, 1, 3)}, lambda x: np.tile(x, (1, 2, 1, 3))),
    ("ReduceMean", {"axes": (2, 3), "keepdims": 0}, lambda x: x.mean((2, 3))),
    ("ReduceMax", {"axes": (1,)}, lambda x: x.max(1, keepdims=True)),
    ("Flatten", {"axis": 2}, lambda x: x.reshape(6, 20)),
    ("Pad", {"pads": (0, 0, 1, 2, 0, 0, 3, 0), "mode": "constant", "value": 2.5}, lambda x: np.pad(x, ((0, 0), (0, 0), (1, 3), (2, 0)), constant_values=2.5)),
    ("Clip", {"max": 0.5}, lambda x: np.minimum(x, np.float32(0.5))),
    ("Shrink", {"lambd": 0.3, "bias": 0.1}, lambda x: np.where(x > 0.3, x - np.float32(0.1), np.where(x < -0.3, x + np.float32(0.1), 0))),
    ("SpaceToDepth", {"blocksize": 1}, lambda x: x),
]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes", "wanted"), RESHAPING, ids=lambda x: x if isinstance(x, str) else "")
def test_operators_that_move_elements(
    op: str, attributes: dict[str, Attribute], wanted: Callable[[Array], Array]
) -> None:
    x = image(3, 1 if op == "Squeeze" else 2, 4, 5)
    graph = chain([("y", op, None, attributes)], ("batch", "channel", "height", "width"), (None, *x.shape[1:]))
    (found,) = computed(manifest_of([], graph), {}, x)
    close(found, wanted(x))
    assert infer(graph, {}, {"x": x.shape})["y"] == found.shape


def test_operators_of_several_inputs() -> None:
    a, b = image(3, 4), image(3, 4) * 2 + 1
    values = {name: Value(axes=("batch", "feature"), shape=(None, 4)) for name in "ab"}
    cases = {
        "Add": a + b, "Sub": a - b, "Mul": a * b, "Div": a / b, "Max": np.maximum(a, b), "Min": np.minimum(a, b),
        "Mean": (a + b) / 2, "Concat": np.concatenate([a, b], 1),
    }  # fmt: skip
    nodes = [
        Node(name=op, op=op, inputs=("a", "b"), outputs=(op,), attributes={"axis": 1} if op == "Concat" else {})
        for op in cases
    ]
    nodes.append(Node(name="two", op="Constant", outputs=("two",), attributes={"value_float": 2.0}))
    nodes.append(Node(name="twice", op="Mul", inputs=("a", "two"), outputs=("twice",)))
    values |= {name: Value(axes=("batch", "feature")) for name in (*cases, "two", "twice")}
    graph = Graph(inputs=("a", "b"), outputs=(*cases, "twice"), values=values, nodes=tuple(nodes))
    found = build_module(manifest_of([], graph))(torch.from_numpy(a), torch.from_numpy(b))
    for y, expected in zip(found, [*cases.values(), a * 2], strict=True):
        close(y.numpy(), expected)
