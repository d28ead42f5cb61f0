"""A writer that is wrong, or a disk that is, in one bit of one element: refused for every output, and nothing is left."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

import neutral
from neutral.errors import NeutralError
from neutral.frameworks import FRAMEWORKS
from neutral.native import Array, NativeModel, Range, Tensor, from_array
from tests.hostile.making import make_shards

OUTPUTS = {
    "model.pt": "torch",
    "model.pth": "torch",
    "model.ckpt": "torch",
    "model.bin": "torch",
    "model.safetensors": "safetensors",
    "model.keras": "keras",
    "model.h5": "keras",
    "model.hdf5": "keras",
    "model.weights.h5": "keras",
    "model.npz": "numpy",
    "checkpoint.ckpt": "tensorflow",
    "model.savedmodel": "tensorflow",
}
TEMPLATES = {
    "model.pt": "torch",
    "state.pt": "torch",
    "legacy.pt": "torch",
    "a program by its name.pt2": "torch",
    "model.safetensors": "safetensors",
    "shards": "safetensors",
    "model.keras": "keras",
    "model.h5": "keras",
    "model.weights.h5": "keras",
    "model.npz": "numpy",
    "checkpoint.ckpt": "tensorflow",
    "model.savedmodel": "tensorflow",
}


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


BIAS = network(0)[0].bias.detach().numpy().tobytes()
"""The bytes of a tensor that lies alike in all formats."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.pt"
    torch.save(network(0), path)
    return path


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with other weights, in all formats."""
    folder, module = tmp_path_factory.mktemp("templates"), network(1)
    torch.save(module, folder / "model.pt")
    torch.save(module.state_dict(), folder / "state.pt")
    torch.save(module.state_dict(), folder / "a program by its name.pt2")
    torch.save(module, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    make_shards(folder / "shards", {name: tensor.numpy() for name, tensor in module.state_dict().items()})
    for name, framework in TEMPLATES.items():
        if framework != "torch" and name != "shards":
            neutral.convert(folder / "model.pt", folder / name, to=framework)
    return folder


class Flipped(Tensor):
    """A tensor with one bit of its first element changed, where its base tells those who ask that it was not."""

    def __init__(self, base: Tensor) -> None:
        self._base = base
        self.shape, self.dtype, self.streams = base.shape, base.dtype, base.streams

    def block(self, ranges: Sequence[Range]) -> Array:
        block = self._base.block(ranges)
        return flipped(block) if all(start == 0 < stop for start, stop in ranges) else block

    def tiles(self, limit: int = 1 << 20) -> Iterator[Array]:
        for i, tile in enumerate(self._base.tiles(limit)):
            yield tile if i else flipped(tile)


def flipped(array: Array) -> Array:
    changed = array.copy()
    changed.reshape(-1).view(np.uint8)[0] ^= 1
    return changed


def with_a_flipped_tensor(given: Any) -> Any:
    """What a writer is given, a model or tensors by name, with the last tensor flipped."""
    if isinstance(given, NativeModel):
        *layers, last = given.layers
        *tensors, (local, tensor) = last.tensors.items()
        changed = dict([*tensors, (local, replace(tensor, data=Flipped(tensor.data)))])
        return replace(given, layers=(*layers, replace(last, tensors=changed)))
    assert isinstance(given, Mapping)
    *others, (name, data) = given.items()
    return dict([*others, (name, Flipped(data))])


def break_writer(monkeypatch: pytest.MonkeyPatch, framework: str, function: str, *, disk: bool) -> None:
    """Make a writer write one bit other than it was told, or the disk keep one bit other than was written."""
    writer = FRAMEWORKS[framework].writer()
    write: Callable[..., None] = getattr(writer, function)

    def wrong(*arguments: Any, **more: Any) -> None:
        place, out = {"build": 0, "fill": 1}[function], arguments[2]
        before = [with_a_flipped_tensor(x) if i == place else x for i, x in enumerate(arguments)]
        write(*(arguments if disk else before), **more)
        if disk:
            damage(out.parent)

    monkeypatch.setattr(writer, function, wrong)


def damage(folder: Path) -> None:
    holding = [path for path in folder.rglob("*") if path.is_file() and BIAS in path.read_bytes()]
    assert holding
    for path in holding:
        path.write_bytes(damaged(path.read_bytes()))


def damaged(content: bytes) -> bytes:
    assert BIAS in content
    return content.replace(BIAS, bytes([BIAS[0] ^ 1]) + BIAS[1:])


def refused(source: Path, out: Path, says: str, **more: Any) -> None:
    with pytest.raises(NeutralError, match=says) as raised:
        neutral.convert(source, out, **more)
    assert str(out) in str(raised.value) and ".tmp" not in str(raised.value)
    assert list(out.parent.iterdir()) == []


WRONG = {False: "read back other than written", True: "found "}
"""What is said if a writer wrote other bytes than it was told, and if the disk changed them: there a format's own sum tells."""


@pytest.mark.parametrize("disk", WRONG)
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_new_file(name: str, disk: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_writer(monkeypatch, OUTPUTS[name], "build", disk=disk)
    refused(source, tmp_path / name, WRONG[disk], to=OUTPUTS[name])


@pytest.mark.parametrize("disk", WRONG)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_filled_template(
    name: str, disk: bool, source: Path, templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_writer(monkeypatch, TEMPLATES[name], "fill", disk=disk)
    refused(source, tmp_path / name, WRONG[disk], into=templates / name)


def reshaped(tensor: Tensor) -> Tensor:
    """The same bytes in another shape."""
    return tensor.merge(0, 2).split(0, tensor.shape[::-1])


def as_whole_numbers(tensor: Tensor) -> Tensor:
    """The same bytes as another dtype."""
    return from_array(tensor.read().view(np.int32))


@pytest.mark.parametrize("wrong", [reshaped, as_whole_numbers])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.weights.h5", "model.npz", "checkpoint.ckpt"])
def test_the_right_bytes_of_another_tensor(
    name: str, wrong: Callable[[Tensor], Tensor], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FRAMEWORKS[OUTPUTS[name]].writer()
    build = writer.build

    def of_another_kernel(model: NativeModel, *rest: Any) -> None:
        first, *layers = model.layers
        (local, kernel), *others = first.tensors.items()
        changed = dict([(local, replace(kernel, data=wrong(kernel.data))), *others])
        build(replace(model, layers=(replace(first, tensors=changed), *layers)), *rest)

    monkeypatch.setattr(writer, "build", of_another_kernel)
    refused(source, tmp_path / name, "read back other than written", to=OUTPUTS[name])


@pytest.mark.parametrize(("dtype", "shape"), [(np.int32, ()), (np.int64, (1,)), (np.int32, (1,))])
def test_a_counter_is_written_as_torch_has_it(dtype: type[Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    norm = {f"bn.{name}": np.ones(4, np.float32) for name in ("weight", "bias", "running_mean", "running_var")}
    counter = np.full(shape, 7, dtype)
    safetensors.numpy.save_file({**norm, "bn.num_batches_tracked": counter}, tmp_path / "a.safetensors")
    neutral.convert(tmp_path / "a.safetensors", tmp_path / "a.pt")
    kept = torch.load(tmp_path / "a.pt", weights_only=True)["bn.num_batches_tracked"]
    assert kept.dtype == torch.int64 and kept.shape == () and kept.item() == 7


# A program of torch.export is written by torch and read back by its writer.


def test_a_program_of_other_weights(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.export.save

    def wrong(program: Any, out: Any) -> None:
        program.state_dict["2.bias"].data.view(torch.uint8)[0] ^= 1
        save(program, out)

    monkeypatch.setattr(torch.export, "save", wrong)
    refused(source, tmp_path / "model.pt2", r"found 2\.bias read back other than written")


def test_a_program_filled_wrong(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from neutral.importers import torch_export

    fill = torch_export.fill_module
    monkeypatch.setattr(torch_export, "fill_module", lambda module, model: fill(module, with_a_flipped_tensor(model)))
    refused(source, tmp_path / "model.pt2", r"found 2\.bias read back other than written")


def test_a_program_that_the_disk_changed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving_as(monkeypatch, damaged)
    refused(source, tmp_path / "model.pt2", r"found 0\.bias read back other than written")


def test_a_program_cut_short(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saving_as(monkeypatch, lambda content: content[: len(content) // 2])
    refused(source, tmp_path / "model.pt2", r"found the program \(.+\) read back other than written")
    assert capfd.readouterr().err == ""


def saving_as(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]) -> None:
    """Let a program be saved with other bytes."""
    save = torch.export.save

    def wrong(program: Any, out: Any) -> None:
        kept = io.BytesIO()
        save(program, kept)
        out.write(change(kept.getvalue()))

    monkeypatch.setattr(torch.export, "save", wrong)
