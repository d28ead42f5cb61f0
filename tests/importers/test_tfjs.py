"""Writing TensorFlow.js models: new ones from a graph, copies of templates, what its layers cannot compute."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import neutral
from neutral.containers.tfjs_model import open_tfjs
from neutral.errors import NeutralError, Refused
from tests.tfjs_models import Array, Json, layer, save, sequential, weights

torch = importlib.import_module("torch")
nn = torch.nn


def random(module: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.1, 1)
    return module.eval()


def topology(folder: Path) -> Json:
    found: Json = json.loads((folder / "model.json").read_text())["modelTopology"]["model_config"]
    return found


def classes(model: Json) -> list[str]:
    return [entry["class_name"] for entry in model["config"]["layers"]]


def held(folder: Path) -> dict[str, Array]:
    opened = open_tfjs(folder)
    found = {name: each.data.read() for name, each in opened.weights.items()}
    opened.close()
    return found


def converted(module: Any, tmp_path: Path) -> Path:
    torch.save(random(module), tmp_path / "m.pt")
    neutral.convert(tmp_path / "m.pt", tmp_path / "m.tfjs")
    return tmp_path / "m.tfjs"


def test_a_cnn_becomes_a_sequential_with_channels_last(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, (3, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 6, 2))
    folder = converted(module, tmp_path)
    model = topology(folder)
    assert model["class_name"] == "Sequential"
    assert classes(model) == ["InputLayer", "Conv2D", "ReLU", "Reshape", "Dense"]
    assert model["config"]["layers"][0]["config"]["batch_input_shape"] == [None, None, None, 3]
    found = held(folder)
    assert list(found) == ["0/kernel", "0/bias", "3/kernel", "3/bias"]
    assert np.array_equal(found["0/kernel"], module[0].weight.detach().numpy().transpose(2, 3, 1, 0))
    wanted = module[3].weight.detach().numpy().reshape(2, 4, 30).transpose(2, 1, 0).reshape(120, 2)
    assert np.array_equal(found["3/kernel"], wanted)


def test_a_depthwise_kernel_has_its_own_name(tmp_path: Path) -> None:
    folder = converted(nn.Sequential(nn.Conv2d(3, 6, (3, 2), groups=3, bias=False)), tmp_path)
    assert classes(topology(folder))[1] == "DepthwiseConv2D"
    ((name, found),) = held(folder).items()
    assert name.endswith("/depthwise_kernel") and found.shape == (3, 2, 3, 2)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (nn.ELU(0.5), ["ReLU", "Rescaling", "ELU", "Rescaling", "Add"]),
        (nn.Hardswish(), ["Rescaling", "ReLU", "Multiply"]),
        (nn.Softmax(1), ["Permute", "Softmax", "Permute"]),
        (nn.Hardtanh(), ["Rescaling", "ReLU", "Rescaling"]),
        (nn.SiLU(), ["Activation"]),
        (nn.LeakyReLU(0.1), ["LeakyReLU"]),
        (nn.Threshold(0.1, 0.0), ["ThresholdedReLU"]),
        (nn.Softshrink(), ["Rescaling", "ReLU", "Rescaling", "Add"]),
    ],
)
def test_activations_that_are_missing_are_put_together(module: Any, wanted: list[str], tmp_path: Path) -> None:
    found = classes(topology(converted(nn.Sequential(nn.Conv1d(3, 4, 2), module), tmp_path)))[2:]
    assert found == wanted or (module.__class__ is nn.Softmax and found == ["Softmax"])


def test_one_axis_is_padded_as_two(tmp_path: Path) -> None:
    model = topology(converted(nn.Sequential(nn.Conv1d(3, 4, 3, stride=2, padding=2)), tmp_path))
    assert classes(model)[1:] == ["Reshape", "ZeroPadding2D", "Reshape", "Conv1D"]
    assert model["config"]["layers"][2]["config"]["padding"] == [[2, 2], [0, 0]]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), "no groups"),
        (nn.Sequential(nn.Conv2d(3, 3, 3, groups=3, dilation=2)), "dilation"),
        (nn.Sequential(nn.Conv1d(3, 3, 3, groups=3)), "depthwise convolution of one axis"),
        (nn.Sequential(nn.ConvTranspose1d(3, 4, 3)), "transposed convolution of one axis"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1)), "output_padding"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, dilation=2)), "dilation"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)), "sizes that are known"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), "group or instance norm"),
        (nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4, eps=1e-5)), "RMS norm"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear")), "bilinear"),
        (nn.Sequential(nn.Linear(3, 4)).half(), "float16"),
        (nn.Sequential(nn.Linear(3, 4)).double(), "float64"),
    ],
)
def test_what_its_layers_do_not_compute_is_refused(module: Any, says: str, tmp_path: Path) -> None:
    torch.save(random(module), tmp_path / "m.pt")
    with pytest.raises(Refused, match=says):
        neutral.convert(tmp_path / "m.pt", tmp_path / "m.tfjs")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_shards_of_another_name_leave_a_model_beside_them_alone(tmp_path: Path) -> None:
    torch.save(random(nn.Sequential(nn.Linear(3, 4))), tmp_path / "m.pt")
    for name in ("model.json", "other.json"):
        neutral.convert(tmp_path / "m.pt", tmp_path / name, to="tfjs")
    found = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert found == ["group1-shard1of1.bin", "other-group1-shard1of1.bin"]


def test_weights_without_a_graph_make_no_model(tmp_path: Path) -> None:
    torch.save(random(nn.Sequential(nn.Linear(3, 4))).state_dict(), tmp_path / "m.pt")
    with pytest.raises(Refused, match="without a graph"):
        neutral.convert(tmp_path / "m.pt", tmp_path / "m.tfjs")


def dense_model(folder: Path, seed: int = 0, **more: Any) -> Path:
    first = layer("Dense", "a", units=4, activation="relu", batch_input_shape=[None, 3])
    arrays = weights(a__kernel=(3, 4), a__bias=(4,), b__kernel=(4, 2), b__bias=(2,))
    rng = np.random.default_rng(seed)
    arrays = {name: rng.uniform(size=array.shape).astype("<f4") for name, array in arrays.items()}
    return save(folder, sequential(first, layer("Dense", "b", units=2)), arrays, **more)


@pytest.mark.parametrize("out", ["new", "new.tfjs", "new.json", "folder/model.json"])
def test_a_template_is_copied_under_any_name(out: str, tmp_path: Path) -> None:
    template = dense_model(tmp_path / "t", 1)
    module = random(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 2)
    torch.save(module.state_dict(), tmp_path / "m.pt")
    (tmp_path / "folder").mkdir()
    pairs = {"0": "a", "2": "b"}
    neutral.convert(tmp_path / "m.pt", tmp_path / out, into=template, mapping=pairs, flatten={})
    found = tmp_path / out
    assert np.array_equal(held(found)["a/kernel"], module[0].weight.detach().numpy().T)
    text = found / "model.json" if found.is_dir() else found
    assert text.read_bytes() == (template / "model.json").read_bytes()
    assert not (set(tmp_path.iterdir()) - {tmp_path / name for name in ("t", "m.pt", "folder", out, "weights.bin")})


@pytest.mark.parametrize("force", [False, True])
def test_a_copy_does_not_overwrite_its_template(force: bool, tmp_path: Path) -> None:
    template = dense_model(tmp_path / "t", 1)
    source = dense_model(tmp_path / "s", 2)
    before = {path.name: path.read_bytes() for path in template.iterdir()}
    for out in (template / "other.json", template / "in", template, template / "model.json"):
        with pytest.raises(NeutralError):
            neutral.convert(source, out, into=template, force=force)
    assert {path.name: path.read_bytes() for path in template.iterdir()} == before


def test_a_quantized_template_is_refused_unless_it_holds_the_values(tmp_path: Path) -> None:
    def model(folder: Path, array: Sequence[Sequence[int]]) -> Path:
        entry = {"quantization": {"dtype": "uint8", "min": -1.0, "scale": 0.5}}
        dense = layer("Dense", "d", units=2, use_bias=False, batch_input_shape=[None, 2])
        return save(folder, sequential(dense), {"d/kernel": np.array(array, "u1")}, {"d/kernel": entry})

    template, other = model(tmp_path / "t", [[1, 2], [3, 4]]), model(tmp_path / "o", [[9, 8], [7, 255]])
    neutral.convert(other, tmp_path / "new", into=template)
    assert (tmp_path / "new/weights.bin").read_bytes() == bytes([9, 8, 7, 255])
    torch.save(random(nn.Linear(2, 2, bias=False)), tmp_path / "m.pt")
    with pytest.raises(Refused, match="quantization cannot hold"):
        neutral.convert(tmp_path / "m.pt", tmp_path / "no", into=template, mapping={"": "d"}, flatten={})


def test_an_archive_gives_the_files_back(tmp_path: Path) -> None:
    source = dense_model(tmp_path / "s", entries={"b/bias": {"group": "optimizer"}})
    neutral.export_model(source, tmp_path / "m.nwt").close()
    neutral.import_model(tmp_path / "m.nwt", to="tfjs")
    for name in ("model.json", "weights.bin"):
        assert (tmp_path / "m.tfjs" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("./weights.bin", "../weights.bin", r"\.\./weights\.bin"),
        ("./weights.bin", "/tmp/weights.bin", "/tmp/weights"),
        ('"paths": ["./weights.bin"]', '"paths": 3', "does not list|forged|no such|cut"),
        ('"weights": [{', '"weights": {}, "other": [{', "does not list"),
        ('"weightsManifest": [', '"weightsManifest": 7, "other": [', "does not list"),
        ('"shape": [3, 4]', '"shape": [4, 3]', "no such weight"),
        ('"shape": [3, 4]', '"shape": [3, 4], "quantization": {"dtype": "uint8", "min": 0, "scale": 1}', "cannot hold"),
        ('"format"', "[", "no JSON"),
    ],
)
def test_a_forged_archive_writes_nothing_elsewhere(old: str, new: str, says: str, tmp_path: Path) -> None:
    from tests.hostile.making import edited_archive

    source = dense_model(tmp_path / "s")
    neutral.export_model(source, tmp_path / "m.nwt").close()

    def edit(manifest: Json, header: Json) -> None:
        kept = manifest["source"]["settings"]["metadata"]
        assert old in kept["model_json"]
        kept["model_json"] = kept["model_json"].replace(old, new)

    edited_archive(tmp_path / "m.nwt", tmp_path / "forged.nwt", edit)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NeutralError, match=says):
        neutral.import_model(tmp_path / "forged.nwt", to="tfjs", out=tmp_path / "out.tfjs")
    assert sorted(tmp_path.iterdir()) == before
