"""MLX's files and live modules, with the real framework: what says whose a file is, and what no shape tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import safetensors.numpy
import torch
from mlx.utils import tree_flatten

import neutral
from neutral import frameworks
from neutral.errors import NeutralError, Refused
from neutral.exporters.mlx import read, read_live
from neutral.importers.mlx import build, fill
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
from neutral.schema.manifest import Manifest, Source
from tests.hostile.making import safetensors_bytes


class Net(nn.Module):
    """Layers of every sort; `again` is `head` under another name, `blocks` is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 5), stride=(1, 2), padding=(0, 1))
        self.turned = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.BatchNorm(4, momentum=0.2)
        self.gru = nn.GRU(4, 5)
        self.attention = nn.MultiHeadAttention(6, 2, bias=True)
        self.blocks = [nn.Linear(3, 4), {"inner": nn.RNN(4, 4, nonlinearity=nn.relu)}]
        self.head = nn.Linear(4, 3)
        self.again = self.head
        self._private = mx.zeros((3,))


def net(seed: int) -> Net:
    made = Net()
    rng = np.random.default_rng(seed)
    made.load_weights(
        [(name, mx.array(rng.random(v.shape).astype("f4"))) for name, v in tree_flatten(made.parameters())]
    )
    made.again = made.head
    return made


def arrays(module: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(module.parameters())}


def same(ours: dict[str, np.ndarray[Any, Any]], theirs: dict[str, np.ndarray[Any, Any]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files_come_back_and_fill_templates(suffix: str, tmp_path: Path) -> None:
    source, template, out = (tmp_path / f"{name}{suffix}" for name in ("source", "template", "out"))
    net(1).save_weights(str(source))
    net(2).save_weights(str(template))
    assert frameworks.detect(source)[0] == "mlx"
    neutral.convert(source, tmp_path / "x.nwt")
    neutral.convert(tmp_path / "x.nwt", out, to="mlx")
    assert frameworks.detect(out)[0] == "mlx"
    loaded = net(3)
    loaded.load_weights(str(out), strict=True)
    same(arrays(loaded), arrays(net(1)))
    neutral.convert(source, tmp_path / f"filled{suffix}", into=template)
    loaded = net(3)
    loaded.load_weights(str(tmp_path / f"filled{suffix}"), strict=True)
    same(arrays(loaded), arrays(net(1)))
    neutral.convert(source, tmp_path / f"itself{suffix}", into=source)
    assert (tmp_path / f"itself{suffix}").read_bytes() == source.read_bytes()


def test_live_modules(tmp_path: Path) -> None:
    module, other = net(1), net(2)
    found = {layer.path: layer for layer in read_live(module).layers}
    assert {path: layer.cls for path, layer in found.items()} == {
        "conv": "Conv2d", "turned": "ConvTranspose2d", "norm": "BatchNorm", "gru": "GRU", "attention": "MultiHeadAttention",
        "blocks.0": "Linear", "blocks.1.inner": "RNN", "head": "Linear", "again": "Linear",
    }  # fmt: skip
    with neutral.export_model(module) as archive:
        told = {layer.path: layer for layer in archive.manifest.layers}
        ties = {name: p.tied_to for name, p in archive.manifest.parameters() if p.tied_to}
    assert ties == {"again/kernel": "head/kernel", "again/bias": "head/bias"}
    assert (told["conv"].strides, told["conv"].padding, told["conv"].groups) == ((1, 2), ((0, 0), (1, 1)), 1)
    assert (told["turned"].padding, told["turned"].output_padding) == (((1, 0), (1, 0)), (0, 0))
    assert told["norm"].decay == 0.8 and told["attention"].heads == 2 and told["blocks.1.inner"].activation == "relu"
    neutral.convert(module, into=other)
    same(arrays(other), arrays(module))
    module.save_weights(str(tmp_path / "x.safetensors"))
    third = net(3)
    neutral.convert(tmp_path / "x.safetensors", into=third)
    same(arrays(third), arrays(module))
    wrong = {"weight": np.zeros((3, 3), "f4"), "bias": np.zeros(3, "f4")}
    with pytest.raises(NeutralError, match=r"\(3, 3\)"):
        neutral.convert(wrong, into=nn.Linear(3, 4), kinds={"*": "dense"})


def test_bfloat16(tmp_path: Path) -> None:
    """`.npz` keeps it as two raw bytes, by which MLX knows it; numpy alone would not."""
    module = nn.Linear(3, 4)
    module.set_dtype(mx.bfloat16)
    expected = np.array(module.weight.astype(mx.float32))
    for suffix in (".npz", ".safetensors"):
        module.save_weights(str(tmp_path / f"a{suffix}"))
        tensors = {tensor.name: tensor.data for tensor in read(tmp_path / f"a{suffix}").tensors()}
        assert tensors["weight"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensors["weight"].read().astype("f4"), expected)
        neutral.convert(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", to="mlx")
        neutral.convert(tmp_path / f"a{suffix}", tmp_path / f"c{suffix}", into=tmp_path / f"b{suffix}")
        for name in "bc":
            found = mx.load(str(tmp_path / f"{name}{suffix}"))["weight"]
            assert found.dtype == mx.bfloat16
            np.testing.assert_array_equal(np.array(found.astype(mx.float32)), expected)
    other = nn.Linear(3, 4)
    other.set_dtype(mx.bfloat16)
    neutral.convert(module, into=other)
    assert other.weight.dtype == mx.bfloat16 and mx.array_equal(other.weight, module.weight)


def sorted_fields(*metadata: tuple[str, str]) -> bytes:
    fields = {"data_offsets": [0, 8], "dtype": "F32", "shape": [2]}
    return safetensors_bytes({**({"__metadata__": dict(metadata)} if metadata else {}), "w": fields}, bytes(8))


def test_whose_a_safetensors_file_is(tmp_path: Path) -> None:
    """MLX's metadata or its header say it. A header that others might have written, too, is refused; torch's never is MLX's."""
    path = tmp_path / "x.safetensors"

    def seen() -> str:
        return frameworks.detect(path)[0]

    weights = {"w": mx.zeros((2,))}
    mx.save_safetensors(str(path), weights)
    assert b'"__metadata__":null' in path.read_bytes() and seen() == "mlx"
    mx.save_safetensors(str(path), weights, {"format": "mlx"})
    assert seen() == "mlx"
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    assert seen() == "safetensors"
    mx.save_safetensors(str(path), weights, {"step": "3"})
    for content in (path.read_bytes(), sorted_fields(), sorted_fields(("a", "b"))):
        path.write_bytes(content)
        with pytest.raises(Refused, match="--from mlx or --from safetensors"):
            neutral.export_model(path)
        for named in ("mlx", "safetensors"):
            with neutral.export_model(path, format=named) as archive:
                assert archive.manifest.source.framework == {"mlx": "mlx", "safetensors": "safetensors"}[named]
    plain = {"w": np.zeros(2, "f4")}
    for metadata, owner in ((None, "safetensors"), ({"format": "pt"}, "safetensors"), ({"format": "mlx"}, "mlx")):
        safetensors.numpy.save_file(plain, path, metadata)
        assert seen() == owner
    safetensors.numpy.save_file(plain, path, {"format": "pt"})
    with pytest.raises(Refused, match="in the layout of pt"):
        neutral.export_model(path, format="mlx")


def test_whose_an_npz_is(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, w=np.zeros((2, 3), "f4"), s=np.zeros(()))
    assert frameworks.detect(path)[0] == "numpy"
    mx.savez(str(path), w=mx.zeros((2, 3)), s=mx.array(1.0))
    assert frameworks.detect(path)[0] == "mlx"
    mx.savez(str(path), s=mx.array(1.0))
    assert frameworks.detect(path)[0] == "numpy"


def test_a_template_whose_content_does_not_say_it(tmp_path: Path) -> None:
    """`to` says whose a template is; a convolution of equal sizes then has MLX's axes."""
    kernel = np.random.default_rng(0).random((3, 3, 3, 3)).astype("f4")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.from_numpy(kernel))
    torch.save(module, tmp_path / "x.pt")
    safetensors.numpy.save_file({"layers.0.weight": np.zeros_like(kernel)}, tmp_path / "t.safetensors")
    neutral.convert(tmp_path / "x.pt", tmp_path / "o.safetensors", to="mlx", into=tmp_path / "t.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "o.safetensors")["layers.0.weight"]
    np.testing.assert_array_equal(found, kernel.transpose(0, 2, 3, 1))
    np.savez(tmp_path / "t.npz", **{"layers.0.weight": np.zeros_like(kernel)})
    neutral.convert(tmp_path / "x.pt", tmp_path / "o.npz", to="mlx", into=tmp_path / "t.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "o.npz")["layers.0.weight"], kernel.transpose(0, 2, 3, 1))


def test_a_sequential_has_its_layers_in_a_list(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    torch.save(module, tmp_path / "x.pt")
    neutral.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", to="mlx")
    mine = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    mine.load_weights(str(tmp_path / "x.safetensors"), strict=True)
    x = np.random.default_rng(0).random((2, 3)).astype("f4")
    np.testing.assert_allclose(np.array(mine(mx.array(x))), module(torch.from_numpy(x)).detach().numpy(), atol=1e-6)
    neutral.convert(mine, tmp_path / "y.pt", to="torch")
    assert all(torch.equal(torch.load(tmp_path / "y.pt")[name], value) for name, value in module.state_dict().items())


def test_groups_that_take_other_channels(tmp_path: Path) -> None:
    """MLX's default interleaves them, as nobody else does: a live module says so, of a file it is a warning."""
    theirs = torch.nn.Sequential(torch.nn.GroupNorm(2, 4))
    torch.save(theirs, tmp_path / "x.pt")
    with pytest.raises(Refused, match="side by side, expected the template's channels of a group that are interleaved"):
        neutral.convert(tmp_path / "x.pt", into=nn.Sequential(nn.GroupNorm(2, 4)))
    with pytest.raises(Refused, match=r"interleaved, expected the template's.*pytorch_compatible=True\) in MLX"):
        neutral.convert(nn.Sequential(nn.GroupNorm(2, 4)), into=theirs)
    with pytest.raises(Refused, match=r"every n-th channel.*pytorch_compatible=True"):
        neutral.convert(nn.Sequential(nn.GroupNorm(2, 4)), tmp_path / "y.pt", to="torch")
    for fits in (nn.GroupNorm(2, 4, pytorch_compatible=True), nn.GroupNorm(1, 4), nn.GroupNorm(4, 4)):
        groups = torch.nn.Sequential(torch.nn.GroupNorm(fits.num_groups, 4))
        assert not neutral.convert(nn.Sequential(fits), into=groups).warnings
    nn.Sequential(nn.GroupNorm(2, 4)).save_weights(str(tmp_path / "g.safetensors"))
    report = neutral.convert(tmp_path / "g.safetensors", into=theirs)
    assert any("how it groups channels" in warning for warning in report.warnings)
    report = neutral.convert(tmp_path / "x.pt", tmp_path / "h.safetensors", into=tmp_path / "g.safetensors")
    assert any("the template does not say how it groups channels" in warning for warning in report.warnings)


def test_a_new_file_says_how_its_group_norm_is_to_be_built(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.GroupNorm(1, 4)), tmp_path / "x.pt")
    report = neutral.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", to="mlx")
    assert [note for note in report.notes if "0: for GroupNorm(pytorch_compatible=True)" in note]
    assert not any(note.startswith(("1:", "0, 1:")) for note in report.notes)
    nn.Sequential(nn.GroupNorm(2, 4)).save_weights(str(tmp_path / "g.safetensors"))
    with pytest.raises(Refused, match=r"without the number of groups.*--into"):
        neutral.convert(tmp_path / "g.safetensors", tmp_path / "g.pt", to="torch", kinds={"*0": "group_norm"})


def test_a_convolution_from_a_file_may_be_transposed(tmp_path: Path) -> None:
    nn.Sequential(nn.Conv2d(3, 4, 3)).save_weights(str(tmp_path / "x.safetensors"))
    with pytest.raises(Refused, match="--kind"):
        neutral.convert(tmp_path / "x.safetensors", tmp_path / "x.pt", to="torch")
    for kind, shape in (("conv", (4, 3, 3, 3)), ("conv_transpose", (3, 4, 3, 3))):
        neutral.convert(tmp_path / "x.safetensors", tmp_path / f"{kind}.pt", kinds={"*": kind})
        assert torch.load(tmp_path / f"{kind}.pt")["0.weight"].shape == shape


def test_biases_of_a_gru_that_are_only_added(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.GRU(3, 4, batch_first=True))
    torch.save(module, tmp_path / "x.pt")
    report = neutral.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", to="mlx")
    assert report.losses
    found = mx.load(str(tmp_path / "x.safetensors"))
    assert {name: value.shape for name, value in found.items()} == {
        "layers.0.Wx": (12, 3), "layers.0.Wh": (12, 4), "layers.0.b": (12,), "layers.0.bhn": (4,),
    }  # fmt: skip
    mine = nn.GRU(3, 4)
    mine.load_weights([(name.removeprefix("layers.0."), value) for name, value in found.items()])
    x = np.random.default_rng(0).random((2, 5, 3)).astype("f4")
    np.testing.assert_allclose(
        np.array(mine(mx.array(x))), module[0](torch.from_numpy(x))[0].detach().numpy(), atol=1e-6
    )
    report = neutral.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", into=tmp_path / "x.safetensors")
    assert not report.losses and (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_quantized_layers_stay_as_they_are(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 3))
    nn.quantize(module, class_predicate=lambda path, layer: path == "layers.0")
    module.save_weights(str(tmp_path / "q.safetensors"))
    with neutral.export_model(tmp_path / "q.safetensors") as archive:
        assert any("quantized: 0;" in note for note in archive.manifest.notes)
        assert [layer.kind for layer in archive.manifest.layers] == ["unknown", "dense"] or archive.manifest.layers
    neutral.convert(tmp_path / "q.safetensors", tmp_path / "q.nwt")
    neutral.convert(tmp_path / "q.nwt", tmp_path / "r.safetensors", to="mlx")
    before, after = (mx.load(str(tmp_path / f"{name}.safetensors")) for name in "qr")
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(NeutralError, match=r"unknown kind.*mx\.dequantize"):
        neutral.convert(tmp_path / "q.safetensors", tmp_path / "x.pt", to="torch")
    with pytest.raises(NeutralError, match=r"unknown kind.*mx\.dequantize"):
        neutral.convert(module, tmp_path / "x.pt", to="torch")


def test_shards_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for i, name in enumerate(("a", "b")):
        mx.save_safetensors(
            str(folder / f"{name}.safetensors"), {f"{name}.weight": mx.full((2, 3), i)}, {"format": "mlx"}
        )
    weight_map = {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))
    for path in (folder, index):
        assert frameworks.detect(path) == ("mlx", "mlx-shards")
        with neutral.export_model(path) as archive:
            assert [layer.path for layer in archive.manifest.layers] == ["a", "b"]


def test_what_mlx_does_not_have(tmp_path: Path) -> None:
    cases: dict[str, torch.nn.Module] = {
        "2 axes|two axes|over 2": torch.nn.LayerNorm((2, 3)),
        "two directions": torch.nn.LSTM(2, 3, bidirectional=True),
        "projection": torch.nn.LSTM(2, 3, proj_size=1),
        "in groups, expected one group": torch.nn.ConvTranspose2d(4, 4, 3, groups=2),
        "over 3 axes in groups": torch.nn.Conv3d(4, 4, 3, groups=2),
        "running statistics": torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        "keys of its own": torch.nn.MultiheadAttention(4, 2, add_bias_kv=True),
        "float64": torch.nn.Linear(2, 3).double(),
    }
    for says, module in cases.items():
        torch.save(torch.nn.Sequential(module), tmp_path / "x.pt")
        with pytest.raises(Refused, match=says):
            neutral.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", to="mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_template_that_does_not_fit(tmp_path: Path) -> None:
    for suffix in (".safetensors", ".npz"):
        nn.Linear(3, 2, bias=False).save_weights(str(tmp_path / f"t{suffix}"))
        for name, array in (
            ("v", np.zeros((2, 3), "f4")),
            ("weight", np.zeros((3, 2), "f4")),
            ("weight", np.zeros((2, 3))),
        ):
            with pytest.raises(Refused):
                fill(tmp_path / f"t{suffix}", {name: from_array(array)}, tmp_path / f"o{suffix}")
    manifest = Manifest(source=Source(framework="torch", format="pt"), layers=(), weights_digest="0" * 64)
    layer = NativeLayer("x", "Linear", {"w": NativeTensor("x.w", from_array(np.zeros(2, ml_dtypes.float8_e5m2)))})
    with pytest.raises(Refused, match="float8_e5m2"):
        build(NativeModel("mlx", "mlx", (layer,)), manifest, tmp_path / "o.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.npz", "t.safetensors"]
