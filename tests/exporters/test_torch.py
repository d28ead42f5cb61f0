"""PyTorch's files and modules read, held against what torch itself says of them."""

from __future__ import annotations

import collections
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao import quantization

from neutral.errors import BadFile, NeutralError, Refused
from neutral.exporters.torch import read, read_live
from neutral.native import NativeModel

LEGACY = {"_use_new_zipfile_serialization": False}


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def assert_same_tensors(model: NativeModel, state: dict[str, torch.Tensor]) -> None:
    assert [t.name for t in model.tensors()] == list(state)
    for tensor in model.tensors():
        assert tensor.data.shape == tuple(state[tensor.name].shape)
        assert tensor.data.read().tobytes() == raw(state[tensor.name]), tensor.name


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 5), padding=(1, 2), stride=2, bias=False)
        self.bn = nn.BatchNorm2d(4, eps=1e-4)
        self.rnn = nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm([2, 3])
        self.head = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Dropout(0.25), nn.Linear(4, 2))
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("mask", torch.ones(7), persistent=False)
        self.cached = torch.ones(5)
        self.sizes = [1, 2, (3, 4)]
        self.function = torch.relu
        self.shared = self.head[3]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("keywords", [{}, LEGACY, {"pickle_protocol": 4}, {"pickle_protocol": 5}], ids=str)
def test_a_pickled_module_reads_as_the_live_one(keywords: dict[str, Any], tmp_path: Path) -> None:
    module = net()
    torch.save(module, tmp_path / "net.pt", **keywords)
    model, live = read(tmp_path / "net.pt"), read_live(module)
    assert_same_tensors(model, module.state_dict())
    assert_same_tensors(live, module.state_dict())
    assert model.metadata["modules"] == live.metadata["modules"]
    for one, other in zip(model.layers, live.layers, strict=True):
        assert (one.path, one.cls, one.config, one.evidence) == (other.path, other.cls, other.config, "class")
        assert [t.state for t in one.tensors.values()] == [t.state for t in other.tensors.values()]
    assert [(layer.path, layer.cls) for layer in model.layers] == [
        ("", f"{__name__}.Net"),
        ("conv", "Conv2d"),
        ("bn", "BatchNorm2d"),
        ("rnn", "LSTM"),
        ("attention", "MultiheadAttention"),
        ("norm", "LayerNorm"),
        ("head.3", "Linear"),
        ("shared", "Linear"),
    ]
    by_path = {layer.path: layer for layer in model.layers}
    assert by_path[""].config == {"sizes": [1, 2, [3, 4]]}
    assert by_path["conv"].config["kernel_size"] == [3, 5] and by_path["conv"].config["padding"] == [1, 2]
    assert by_path["bn"].config["eps"] == 1e-4 and by_path["norm"].config["normalized_shape"] == [2, 3]
    assert by_path["rnn"].config["bidirectional"] is True and "weight_hh_l1_reverse" in by_path["rnn"].tensors
    assert by_path["attention"].config["num_heads"] == 2 and "out_proj.bias" in by_path["attention"].tensors
    tied = by_path["shared"].tensors["weight"].identity
    assert tied is not None and tied == by_path["head.3"].tensors["weight"].identity
    assert not model.ordered and any(f"{__name__}.Net" in note for note in model.notes)


def test_a_module_whose_class_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = types.ModuleType("gone_for_good")
    code = """
from torch import nn
from torch.ao import quantization
class Gone(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, 2)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 2)
"""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, here.__name__, here)
        exec(code, vars(here))
        torch.manual_seed(3)
        module = here.Gone()
        torch.save(module, tmp_path / "whole.pt")
        torch.save(module.state_dict(), tmp_path / "state.pt")
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "whole.pt", weights_only=False)
    model = read(tmp_path / "whole.pt")
    assert_same_tensors(model, torch.load(tmp_path / "state.pt", weights_only=True))
    assert [(layer.path, layer.cls) for layer in model.layers] == [("rnn", "GRU"), ("out", "Linear")]
    tree = model.metadata["modules"]
    assert tree["cls"] == "gone_for_good.Gone"
    assert [(name, child["cls"]) for name, child in tree["children"]] == [
        ("rnn", "GRU"),
        ("drop", "Dropout"),
        ("out", "Linear"),
    ]
    assert tree["children"][1][1]["config"] == {"p": 0.5, "inplace": False}


def test_sequential_is_in_the_order_of_computation(tmp_path: Path) -> None:
    module = nn.Sequential(
        collections.OrderedDict(
            features=nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)),
            flat=nn.Flatten(),
            fc=nn.Linear(8, 3),
        )
    )
    torch.save(module, tmp_path / "x.pt")
    model = read(tmp_path / "x.pt")
    assert model.ordered and read_live(module).ordered
    assert [layer.path for layer in model.layers] == ["features.0", "fc"]
    tree = model.metadata["modules"]
    assert tree["children"][0][1]["children"][2][1]["config"]["kernel_size"] == 2
    assert tree["children"][0][1]["children"][2][1]["path"] == "features.2"
    assert not read_live(nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))).ordered


@pytest.mark.parametrize("keywords", [{}, LEGACY], ids=str)
def test_state_dicts(keywords: dict[str, Any], tmp_path: Path) -> None:
    state = net().state_dict()
    state["head.3.weight"] = state["head.3.weight"].bfloat16()
    torch.save(state, tmp_path / "x.pth", **keywords)
    model = read(tmp_path / "x.pth")
    assert_same_tensors(model, state)
    assert model.framework == "torch" and {layer.cls for layer in model.layers} == {None} and not model.ordered


def test_wrappers_leave_the_paths_alone(tmp_path: Path) -> None:
    module = nn.DataParallel(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    torch.save(module, tmp_path / "whole.pt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    for model in (read(tmp_path / "state.pt"), read(tmp_path / "whole.pt"), read_live(module)):
        assert_same_tensors(model, module.state_dict())
        assert [layer.path for layer in model.layers] == ["0", "1"]
        assert any("prefix module." in note for note in model.notes)
    live = read_live(module)
    assert live.metadata["modules"]["cls"] == "Sequential" and live.ordered
    assert [child["path"] for _, child in live.metadata["modules"]["children"]] == ["0", "1"]
    assert read(tmp_path / "whole.pt").metadata["modules"] == live.metadata["modules"]


def state(seed: int, size: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(nn.Linear(2, size).state_dict())


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("place", ["state_dict", "model", "model_state_dict", "net", "weights"])
def test_a_checkpoint_of_one_set(place: str, tmp_path: Path) -> None:
    module, optimizer = trained()
    torch.save(
        {
            place: module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": 4,
            "best_acc1": torch.tensor(71.0),
            "metrics_by_epoch": {"loss": torch.tensor(0.5), "acc": torch.tensor(0.1)},
            "losses": [torch.tensor(0.5)],
            "rng_state": torch.get_rng_state(),
            "lr": 0.1,
        },
        tmp_path / "x.pt",
    )
    model = read(tmp_path / "x.pt")
    assert_same_tensors(model, module.state_dict())
    assert model.metadata["key"] == place
    assert {t.name for t in model.collections["optimizer"]} == {
        f"state.{i}.{what}" for i in (0, 1) for what in ("step", "exp_avg", "exp_avg_sq")
    }
    assert any("best_acc1" in note for note in model.notes)


def test_lightning(tmp_path: Path) -> None:
    module, optimizer = trained()
    torch.save(
        {
            "epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.0.0",
            "state_dict": {f"model.{k}": v for k, v in module.state_dict().items()},
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.3)}},
            "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [{"last_epoch": 3}],
            "hyper_parameters": {"lr": 0.1, "width": torch.tensor(2)},
        },
        tmp_path / "x.ckpt",
    )  # fmt: skip
    model = read(tmp_path / "x.ckpt")
    assert [(layer.path, list(layer.tensors)) for layer in model.layers] == [("model", ["weight", "bias"])]
    assert len(model.collections["optimizer_states"]) == 6


def test_several_sets_are_listed_and_never_chosen_in_silence(tmp_path: Path) -> None:
    raw_weights, average = state(0), state(1)
    torch.save({"model": raw_weights, "train": {"state_dict_ema": average}, "step": 3}, tmp_path / "x.pt")
    with pytest.raises(Refused, match=r"2 sets of weights.*--key model, --key train\.state_dict_ema"):
        read(tmp_path / "x.pt")
    assert_same_tensors(read(tmp_path / "x.pt", key="model"), raw_weights)
    chosen = read(tmp_path / "x.pt", key="train.state_dict_ema")
    assert_same_tensors(chosen, average)
    assert [t.name for t in chosen.collections["model"]] == ["weight", "bias"]
    with pytest.raises(Refused, match=r"nothing under the key nowhere.*model, train\.state_dict_ema"):
        read(tmp_path / "x.pt", key="nowhere")


def test_an_average_as_a_list_counts_as_a_set(tmp_path: Path) -> None:
    torch.save({"model": state(0), "ema": {"shadow_params": list(state(1).values()), "decay": 0.9}}, tmp_path / "x.pt")
    with pytest.raises(Refused, match=r"--key ema\.shadow_params"):
        read(tmp_path / "x.pt")
    assert [t.name for t in read(tmp_path / "x.pt", key="ema.shadow_params").tensors()] == ["0", "1"]


def test_an_average_alone_is_taken(tmp_path: Path) -> None:
    torch.save({"ema": state(1)}, tmp_path / "x.pt")
    assert_same_tensors(read(tmp_path / "x.pt"), state(1))


def test_keys_with_dots_and_numbers(tmp_path: Path) -> None:
    torch.save({"a.b": {"c": state(0)}, "nets": [state(1), state(2, 4)]}, tmp_path / "x.pt")
    assert_same_tensors(read(tmp_path / "x.pt", key="a.b.c"), state(0))
    assert_same_tensors(read(tmp_path / "x.pt", key="nets.1"), state(2, 4))


def test_modules_inside_a_checkpoint(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    torch.save({"epoch": 1, "model": module, "ema": None}, tmp_path / "x.pt")
    model = read(tmp_path / "x.pt")
    assert model.layers[0].cls == "Linear" and model.metadata["key"] == "model" and model.ordered
    torch.save({"model": module, "ema": nn.Sequential(nn.Linear(2, 3))}, tmp_path / "y.pt")
    with pytest.raises(Refused, match="--key ema"):
        read(tmp_path / "y.pt")


def test_ties_and_views_in_a_state_dict(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    torch.save({"a.w": weight, "b.w": weight, "c.w": weight[:2], "d.w": weight.t()}, tmp_path / "x.pt")
    a, b, c, d = read(tmp_path / "x.pt").tensors()
    assert a.identity == b.identity and len({a.identity, c.identity, d.identity}) == 3
    live = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    live[1].weight = live[0].weight
    one, other = read_live(live).tensors()
    assert one.identity == other.identity and one.identity is not None


def test_live_dtypes_and_views_without_a_copy() -> None:
    module = nn.Module()
    for dtype in (
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.int8,
        torch.bool,
        torch.float8_e4m3fn,
    ):
        module.register_buffer(str(dtype)[6:] + "_", torch.tensor([0.0, 1.0, 2.0]).to(dtype))
    module.register_buffer("conj", torch.randn(3, dtype=torch.cfloat).conj())
    module.register_buffer("scalar", torch.tensor(3.0, dtype=torch.bfloat16))
    assert_same_tensors(read_live(module), module.state_dict())
    linear = nn.Linear(2, 2, dtype=torch.bfloat16)
    weight = next(read_live(linear).tensors()).data.block([(0, 2), (0, 2)])
    with torch.no_grad():
        linear.weight.fill_(2)
    assert (weight == 2).all()


def test_live_parametrizations() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2, stride=2))
    (layer,) = read_live(nn.Sequential(module)).layers
    assert layer.cls == "Conv1d" and layer.config["stride"] == [2]
    assert list(layer.tensors) == ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]


def test_live_modules_without_elements_are_refused() -> None:
    for module in (nn.LazyLinear(3), nn.Linear(2, 2, device="meta")):
        with pytest.raises(Refused, match="weight"):
            read_live(module)
    with pytest.raises(Refused, match="without a tensor"):
        read_live(nn.ReLU())


@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript_weights_are_read_with_their_classes_and_its_code_is_not_run(tmp_path: Path, how: str) -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Conv1d(3, 4, 1)).eval()
    made = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.randn(1, 2, 5))
    made.save(tmp_path / "x.pt")
    model = read(tmp_path / "x.pt")
    assert model.format == "torchscript"
    assert [(layer.cls, layer.config) for layer in model.layers] == [
        ("Conv1d", {}),
        ("BatchNorm1d", {}),
        ("Conv1d", {}),
    ]
    got = {t.name: t.data.read().tobytes() for t in model.tensors()}
    assert got == {name: raw(tensor) for name, tensor in module.state_dict().items()}


def test_a_parametrized_module_of_torchscript_has_no_class_of_its_own(tmp_path: Path) -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    torch.jit.trace(module, torch.randn(1, 3)).save(tmp_path / "x.pt")
    assert {layer.cls for layer in read(tmp_path / "x.pt").layers} == {None}


def test_a_frozen_torchscript_has_its_weights_in_its_code(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)).eval()
    torch.jit.freeze(torch.jit.script(module)).save(tmp_path / "x.pt")
    with pytest.raises(BadFile, match=r"constants of its code.* before torch\.jit\.freeze"):
        read(tmp_path / "x.pt")
    torch.jit.freeze(torch.jit.script(module), preserved_attrs=["1"]).save(tmp_path / "y.pt")
    model = read(tmp_path / "y.pt")
    assert [layer.path for layer in model.layers] == ["1"] and "left out: 2" in model.notes[-1]


class Quantizable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.conv, self.out = quantization.QuantStub(), nn.Conv2d(2, 3, 2), quantization.DeQuantStub()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(self.out(self.conv(self.into(x))))
        return normed


def quantized(how: str) -> nn.Module:
    if how == "static":
        module = Quantizable().eval()
        module.into.qconfig = module.conv.qconfig = quantization.get_default_qconfig("x86")  # type: ignore[assignment]
        prepared = quantization.prepare(module)
        prepared(torch.randn(1, 2, 4, 4))
        made: nn.Module = quantization.convert(prepared)
        return made
    cls = nn.Linear if how == "linear" else nn.LSTM
    return quantization.quantize_dynamic(  # type: ignore[no-any-return]
        nn.Sequential(nn.LayerNorm(5), cls(5, 6)), {cls}, dtype=torch.qint8
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["linear", "lstm", "static"])
def test_layers_that_are_quantized_are_not_left_out_in_silence(tmp_path: Path, how: str) -> None:
    module = quantized(how)
    torch.save(module, tmp_path / "module.pt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.jit.script(module).save(tmp_path / "script.pt")
    for name in ("module", "state", "script"):
        with pytest.raises(Refused, match=r"quantized|qtensor"):
            read(tmp_path / f"{name}.pt")
    for live in (module, module.state_dict()):
        with pytest.raises(Refused, match=r"quantized|qint8"):
            read_live(live)


def test_numpy_arrays_in_a_state_dict(tmp_path: Path) -> None:
    arrays = {
        "a.w": np.arange(6.0).reshape(2, 3),
        "b.w": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "c.w": np.arange(3, dtype=">f4"),
    }
    torch.save(arrays, tmp_path / "x.pt")
    for tensor in read(tmp_path / "x.pt").tensors():
        assert (tensor.data.read() == arrays[tensor.name]).all()


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    quantized = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    for name, value in {"sparse": sparse, "quantized": quantized, "meta": torch.empty(2, device="meta")}.items():
        torch.save({"good": torch.zeros(2), f"{name}.weight": value}, tmp_path / "x.pt")
        with pytest.raises(Refused, match=rf"{name}\.weight"):
            read(tmp_path / "x.pt")
    torch.save(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), tmp_path / "x.pt")
    with pytest.raises(Refused, match=r"0\.weight: .*UninitializedParameter"):
        read(tmp_path / "x.pt")
    torch.save({"half": torch.zeros(2, dtype=torch.complex32)}, tmp_path / "x.pt")
    with pytest.raises(Refused, match="complex32"):
        read(tmp_path / "x.pt")


class Marked(torch.Tensor):
    pass


def test_tensor_subclasses(tmp_path: Path) -> None:
    plain, scaled = torch.randn(3).as_subclass(Marked), torch.randn(3).as_subclass(Marked)
    plain.note = "text"
    scaled.scale = torch.ones(1)
    torch.save({"plain": plain}, tmp_path / "x.pt")
    assert next(read(tmp_path / "x.pt").tensors()).data.read().tolist() == plain.tolist()
    torch.save({"scaled": scaled}, tmp_path / "y.pt")
    with pytest.raises(Refused, match="scaled"):
        read(tmp_path / "y.pt")


def test_files_without_weights_are_errors(tmp_path: Path) -> None:
    for value in ({"epoch": 1}, [], nn.ReLU(), torch.zeros(3), "text", None):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(BadFile):
            read(tmp_path / "x.pt")


def test_expanded_tensors_and_forged_ones(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(1, 3).expand(100, 3)}, tmp_path / "x.pt")
    assert next(read(tmp_path / "x.pt").tensors()).data.read().shape == (100, 3)
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.pt")
    with pytest.raises(BadFile, match="larger than the file"):
        read(tmp_path / "x.pt")
    base = torch.zeros(1)
    torch.save({str(i): base.expand(1 << 23, i) for i in range(1, 5)}, tmp_path / "x.pt")
    with pytest.raises(BadFile, match="larger than the file"):
        read(tmp_path / "x.pt")


def test_modules_that_multiply_or_contain_themselves_are_refused(tmp_path: Path) -> None:
    inner: nn.Module = nn.Linear(1, 1)
    for _ in range(40):
        outer = nn.Module()
        outer.a = inner
        outer.b = inner
        inner = outer
    torch.save(inner, tmp_path / "x.pt")
    with pytest.raises(BadFile, match="inside each other"):
        read(tmp_path / "x.pt")
    looped = nn.Module()
    looped._modules["again"] = looped
    looped.w = nn.Parameter(torch.zeros(1))
    torch.save(looped, tmp_path / "y.pt")
    with pytest.raises(BadFile, match="inside each other"):
        read(tmp_path / "y.pt")


def test_names_are_printed_safely(tmp_path: Path) -> None:
    torch.save(
        {"a\x1b[31m\nb": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8), "c": torch.zeros(1)},
        tmp_path / "x.pt",
    )
    with pytest.raises(NeutralError) as caught:
        read(tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
