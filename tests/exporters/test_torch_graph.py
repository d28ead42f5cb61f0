"""The graph and the splits of torch modules, captured from real ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neutral.exporters.torch import read, read_live
from neutral.exporters.torch_graph import capture
from neutral.exporters.torch_rules import RULES
from neutral.schema.graph import Graph, Node


def captured(model: nn.Module) -> tuple[Graph | None, dict[str, dict[str, int]], list[str]]:
    return capture(read_live(model).metadata["modules"])


def graph_of(model: nn.Module) -> Graph:
    graph, _, notes = captured(model)
    assert graph is not None, notes
    assert notes == []
    return graph


def only_node(module: nn.Module, channels: int = 3, rank: int = 2) -> Node:
    """The node of a module that stands behind a convolution."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](2, channels, 1)
    nodes = graph_of(nn.Sequential(conv, module)).nodes
    assert len(nodes) == 2
    return nodes[1]


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5), nn.Tanh(), nn.Flatten(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def test_lenet() -> None:
    graph, splits, notes = captured(lenet())
    assert graph is not None and notes == []
    assert [node.op for node in graph.nodes] == [
        "Conv", "Tanh", "AveragePool", "Conv", "Tanh", "AveragePool", "Conv", "Tanh", "Flatten", "Gemm", "Tanh", "Gemm",
    ]  # fmt: skip
    assert graph.values["input"].axes == ("batch", "channel", "height", "width")
    assert graph.values["input"].shape == (None, 1, None, None)
    assert graph.values[graph.outputs[0]].shape == (None, 10)
    # 120 features from 120 channels are one position: nothing is permuted.
    assert splits == {"9": {}, "11": {}}


def test_flatten_to_linear() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 25, 7))
    assert captured(model)[1] == {"4": {"in": 8}}


def test_vectors_between_flatten_and_linear() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 5, 3), nn.Flatten(), nn.BatchNorm1d(20), nn.PReLU(20), nn.Dropout(), nn.LayerNorm(20),
        nn.PReLU(), nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Linear(6, 2),
    )  # fmt: skip
    graph, splits, _ = captured(model)
    assert splits == {
        "2": {"feature": 5}, "3": {"feature": 5}, "5": {"feature": 5}, "6": {}, "7": {"in": 5}, "8": {}, "9": {},
    }  # fmt: skip
    # 20 features of 5 channels: the last convolution left 4 positions.
    assert graph is not None and graph.values["0"].shape == (None, 5, 4)


def test_decoder() -> None:
    model = nn.Sequential(
        nn.Linear(10, 8 * 9), nn.BatchNorm1d(72), nn.ReLU(), nn.Unflatten(1, (8, 3, 3)), nn.ConvTranspose2d(8, 4, 3)
    )
    graph, splits, _ = captured(model)
    assert splits == {"0": {"out": 8}, "1": {"feature": 8}}
    assert graph is not None and graph.nodes[3].attributes == {"shape": (8, 3, 3)}


def test_linear_between_flatten_and_unflatten() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 6 * 4), nn.Unflatten(-1, (6, 2, 2)), nn.Conv2d(6, 2, 1)
    )
    assert captured(model)[1] == {"2": {"in": 4, "out": 6}}


def test_order_that_cannot_move_into_weights() -> None:
    """Behind a GroupNorm over neighbouring features no permutation of a Linear is the same."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.GroupNorm(2, 36), nn.Linear(36, 5))
    assert captured(model)[1] == {"2": {}, "3": {}}
    output = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(36))
    assert captured(output)[1] == {"2": {}}


def test_input_that_is_flattened_at_once() -> None:
    graph, splits, _ = captured(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert graph is not None and graph.values["input"].shape == (None, 12)
    assert splits == {"1": {}, "3": {}}


def test_nested() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
    graph, splits, _ = captured(model)
    assert graph is not None
    assert [node.layer for node in graph.nodes if node.layer] == ["0.0", "0.1", "1.2"]
    assert splits == {"0.1": {}, "1.2": {}}


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 7))
        self.classifier = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        self.fc = nn.Linear(2, 2)


def test_custom_class() -> None:
    """Only what lies between two modules of one Sequential is certain."""
    graph, splits, notes = captured(Custom())
    assert graph is None
    assert len(notes) == 1 and "Custom" in notes[0]
    assert splits == {"features.1": {}, "head.2": {"in": 6}, "classifier.2": {}}


def test_custom_module_inside_a_sequential() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Custom(), nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    graph, splits, notes = captured(model)
    assert graph is None and notes[0].startswith("1: no graph")
    assert splits["4"] == {} and "3" not in splits and splits["1.head.2"] == {"in": 6}


def test_linear_in_front_of_something_unknown() -> None:
    """What is unknown may divide the axis that the Linear makes."""
    _, splits, _ = captured(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), Custom()))
    assert "0" not in splits and "1" not in splits


SAME_SHAPE: list[tuple[nn.Module, str, dict[str, Any]]] = [
    (nn.CELU(0.5), "Celu", {"alpha": 0.5}),
    (nn.ELU(0.7), "Elu", {"alpha": 0.7}),
    (nn.GELU(), "Gelu", {"approximate": "none"}),
    (nn.GELU("tanh"), "Gelu", {"approximate": "tanh"}),
    (nn.Hardshrink(0.3), "Shrink", {"lambd": 0.3, "bias": 0.0}),
    (nn.Hardsigmoid(), "HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    (nn.Hardswish(), "HardSwish", {}),
    (nn.Hardtanh(-2.0, 3.0), "Clip", {"min": -2.0, "max": 3.0}),
    (nn.Identity(), "Identity", {}),
    (nn.LeakyReLU(0.2), "LeakyRelu", {"alpha": 0.2}),
    (nn.LogSoftmax(1), "LogSoftmax", {"axis": 1}),
    (nn.Mish(), "Mish", {}),
    (nn.RReLU(0.25, 0.5), "LeakyRelu", {"alpha": 0.375}),
    (nn.ReLU(), "Relu", {}),
    (nn.ReLU6(), "Clip", {"min": 0.0, "max": 6.0}),
    (nn.SELU(), "Selu", {}),
    (nn.SiLU(), "Swish", {}),
    (nn.Sigmoid(), "Sigmoid", {}),
    (nn.Softmax(-1), "Softmax", {"axis": -1}),
    (nn.Softmax2d(), "Softmax", {"axis": 1}),
    (nn.Softplus(), "Softplus", {}),
    (nn.Softshrink(0.4), "Shrink", {"lambd": 0.4, "bias": 0.4}),
    (nn.Softsign(), "Softsign", {}),
    (nn.Tanh(), "Tanh", {}),
    (nn.Threshold(0.1, 0.0), "ThresholdedRelu", {"alpha": 0.1}),
    (nn.Dropout(0.3), "Identity", {"origin": "Dropout", "rate": 0.3}),
    (nn.Dropout2d(0.2), "Identity", {"origin": "Dropout2d", "rate": 0.2}),
    (nn.LocalResponseNorm(3, 0.1, 0.5, 2.0), "LRN", {"size": 3, "alpha": 0.1, "beta": 0.5, "bias": 2.0}),
    (nn.InstanceNorm2d(3), "InstanceNormalization", {"epsilon": 1e-5}),
    (nn.GroupNorm(3, 3, affine=False), "GroupNormalization", {"num_groups": 3, "epsilon": 1e-5}),
    (nn.AdaptiveAvgPool2d((1, 1)), "GlobalAveragePool", {}),
    (nn.AdaptiveMaxPool2d(1), "GlobalMaxPool", {}),
    (
        nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True),
        "MaxPool",
        {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "dilations": (2, 2), "ceil_mode": 1},
    ),
    (
        nn.AvgPool2d((2, 3), padding=(0, 1), count_include_pad=False),
        "AveragePool",
        {"kernel_shape": (2, 3), "strides": (2, 3), "pads": (0, 1, 0, 1), "ceil_mode": 0, "count_include_pad": 0},
    ),
    (
        nn.Upsample(scale_factor=2),
        "Resize",
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "scales": (1.0, 1.0, 2.0, 2.0)},
    ),
    (
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        "Resize",
        {"mode": "linear", "coordinate_transformation_mode": "align_corners", "scales": (1.0, 1.0, 2.0, 2.0)},
    ),
    (nn.ZeroPad2d((1, 2, 3, 4)), "Pad", {"mode": "constant", "value": 0.0, "pads": (0, 0, 3, 1, 0, 0, 4, 2)}),
    (nn.ReflectionPad2d((1, 2, 3, 4)), "Pad", {"mode": "reflect", "pads": (0, 0, 3, 1, 0, 0, 4, 2)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "op", "attributes"), SAME_SHAPE, ids=lambda x: repr(x) if isinstance(x, nn.Module) else ""
)
def test_operator(module: nn.Module, op: str, attributes: dict[str, Any]) -> None:
    node = only_node(module)
    assert (node.op, node.attributes, node.layer) == (op, attributes, None)


def test_pixel_shuffle() -> None:
    node = only_node(nn.PixelShuffle(2), channels=8)
    assert (node.op, node.attributes) == ("DepthToSpace", {"blocksize": 2, "mode": "CRD"})
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(2 * 16, 3))
    assert captured(model)[1] == {"3": {"in": 2}}


def test_flatten_of_space_only() -> None:
    node = only_node(nn.Flatten(2), channels=8)
    assert (node.op, node.attributes) == ("Reshape", {"shape": (8, -1)})


INEXPRESSIBLE = [
    nn.AdaptiveAvgPool2d((3, 2)),
    nn.Flatten(0),
    nn.MaxPool2d(2, return_indices=True),
    nn.AvgPool2d(2, divisor_override=3),
    nn.Softmax(0),
    nn.Softplus(beta=2.0),
    nn.Threshold(0.1, 5.0),
    nn.BatchNorm2d(3, track_running_stats=False),
    nn.LSTM(3, 3),
    nn.TransformerEncoderLayer(4, 2),
    nn.Bilinear(2, 2, 2),
    nn.LocalResponseNorm(2),
    nn.ChannelShuffle(3),
]


@pytest.mark.parametrize("module", INEXPRESSIBLE, ids=lambda module: type(module).__name__)
def test_no_graph_but_a_note(module: nn.Module) -> None:
    graph, _, notes = captured(nn.Sequential(nn.Conv2d(2, 3, 1), module))
    assert graph is None
    assert len(notes) == 1 and notes[0].startswith("1: no graph, because ")


def doubled(module: nn.Module, given: Any, made: torch.Tensor) -> torch.Tensor:
    return made * 2


def silent(*given: Any) -> None:
    pass


def flipped(module: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (given[0].flip(-1),)


def replaced(module: nn.Module, name: str = "forward") -> None:
    setattr(module, name, torch.relu)


ALTERATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "it has a forward hook": lambda module: module.register_forward_hook(doubled),
    "it has a forward pre-hook": lambda module: module.register_forward_pre_hook(flipped),
    "its forward was replaced": replaced,
    "its _conv_forward was replaced": lambda module: replaced(module, "_conv_forward"),
}


def pickled(module: nn.Module, path: Path) -> Any:
    torch.save(module, path)
    return read(path)


@pytest.mark.parametrize("why", ALTERATIONS)
@pytest.mark.parametrize("where", ["model", "0", "1", "1.0"])
def test_a_module_that_was_altered_has_no_graph(why: str, where: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    ALTERATIONS[why](model.get_submodule(where) if where != "model" else model)
    for found in (read_live(model), pickled(model, tmp_path / "a.pt")):
        assert found.graph is None and f"{where}: no graph, because {why}" in found.notes
        assert [layer.path for layer in found.layers] == ["0", "1.1"]


def test_an_altered_module_may_move_what_it_is_given() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2), nn.Linear(2, 5))
    assert captured(model)[1] == {"2": {"in": 4}, "3": {}}
    model[1].register_forward_hook(doubled)
    assert captured(model)[1] == {"3": {}}


def test_a_hook_of_a_wrapper_is_the_models() -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(4, 3)))
    assert read_live(model).graph is not None
    model.register_forward_hook(doubled)
    assert read_live(model).notes[-1] == "model: no graph, because it has a forward hook"


def test_what_does_not_change_the_numbers_keeps_the_graph(tmp_path: Path) -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.utils.spectral_norm(nn.Linear(3, 2)))
    model.eval()[0].register_full_backward_hook(silent)
    model[0].register_load_state_dict_pre_hook(silent)
    model[0].register_state_dict_post_hook(silent)
    replaced(model, "train")
    replaced(model[0], "extra_repr")
    assert read_live(model).graph is not None
    assert pickled(model, tmp_path / "a.pt").graph is not None
    assert read_live(torch.compile(nn.Sequential(nn.Linear(4, 3)))).graph is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), ("batch", "feature")),
        (nn.Sequential(nn.Linear(3, 2), nn.Conv1d(4, 2, 1)), ("batch", "channel", "width")),
        (nn.Sequential(nn.LayerNorm((4, 3)), nn.Linear(3, 2)), ("batch", "time", "feature")),
        (nn.Sequential(nn.ZeroPad3d(1), nn.Conv3d(4, 2, 1)), ("batch", "channel", "depth", "height", "width")),
        (nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)), ("batch", "time")),
    ],
)
def test_axes_of_the_input(model: nn.Sequential, axes: tuple[str, ...]) -> None:
    assert graph_of(model).values["input"].axes == axes


def test_sizes_are_found_from_behind() -> None:
    graph = graph_of(nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 2)))
    assert graph.values["input"].shape == (None, 4)
    assert graph.values["input"].dtype == "int64"


def test_layers_that_contradict_each_other() -> None:
    graph, _, notes = captured(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(37, 2)))
    assert graph is None and notes == [
        "2: no graph, because it takes 37 features, not a multiple of the channels",
    ]


def test_graph_runs_in_torch() -> None:
    """The axes and sizes that the graph names are those that torch computes."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.MaxPool2d(2, ceil_mode=True), nn.Upsample(size=(6, 4)),
        nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), nn.AdaptiveAvgPool2d((6, 4)),
    )  # fmt: skip
    graph = graph_of(model)
    x = torch.zeros(5, 2, 9, 11)
    for node, module in zip(graph.nodes, model, strict=True):
        x = module(x)
        known = graph.values[node.outputs[0]].shape
        assert known is not None and all(n in (None, m) for n, m in zip(known, x.shape, strict=True))
    assert graph.values[graph.outputs[0]].shape == (None, 4, 6, 4)


def test_module_named_input() -> None:
    model = nn.Sequential(OrderedDict(input=nn.Linear(3, 4), input_=nn.ReLU(), output=nn.Linear(4, 2)))
    graph, splits, _ = captured(model)
    assert graph is not None and graph.inputs == ("input__",)
    assert splits == {"input": {}, "output": {}}


ODD_SETTINGS: list[dict[str, Any]] = [
    {},
    {"in_features": "many", "out_features": None},
    {"in_features": [], "out_features": {}},
    {"in_features": 0, "out_features": -1, "normalized_shape": [], "kernel_size": [], "unflattened_size": [0, -1]},
    {"in_features": 1 << 80, "out_features": 1 << 80, "normalized_shape": [1 << 80], "upscale_factor": 0, "size": 0},
]


@pytest.mark.parametrize("config", ODD_SETTINGS)
@pytest.mark.parametrize("cls", [*sorted(RULES), "Sequential", "\x1b[31m", ""])
def test_settings_that_no_torch_module_has(cls: str, config: dict[str, Any]) -> None:
    """A description from a file may say anything: the answer is a graph, or a note, never an exception."""
    linear = {"cls": "Linear", "path": "1", "config": {"in_features": 4, "out_features": 4}, "children": []}
    odd = {"cls": cls, "path": "2", "config": config, "children": []}
    chain = [["1", linear], ["2", odd], ["3", {**linear, "path": "3"}], ["3", {**linear, "path": "3"}]]
    graph, _, notes = capture({"cls": "Sequential", "path": "", "config": {}, "children": chain})
    assert graph is None and len(notes) == 1 and notes[0].isprintable()
    capture({"cls": "pkg.Net", "path": "", "config": {}, "children": [["", {"cls": "Sequential", "children": chain}]]})
