"""What neutral does with real files and layers of PaddlePaddle, in a process of its own: paddle after TensorFlow crashes.

`python -m tests.paddle_session FOLDER` runs every check below and prints, as JSON, what each of them raised.
"""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import torch

import neutral
from neutral.errors import NeutralError

nn = paddle.nn
TABLE = "StructuredToParameterName@@"


class Net(nn.Layer):
    """Layers of every sort; `again` is `head` under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2D(4)
        self.rnn = nn.LSTM(4, 5, num_layers=2, direction="bidirect")
        self.one_way = nn.GRU(4, 5)
        self.attention = nn.MultiHeadAttention(10, 2)
        self.table = nn.Embedding(7, 10)
        self.head = nn.Linear(10, 7, bias_attr=False)
        self.again = self.head
        self.slim = nn.utils.weight_norm(nn.Linear(4, 3), dim=1)


def net(seed: int, *bfloat16: str) -> Any:
    made = Net()
    rng = np.random.default_rng(seed)
    for value in {id(v): v for v in made.state_dict().values()}.values():
        value.set_value(rng.uniform(0.1, 1, value.shape).astype("f4"))
    for name in bfloat16:
        getattr(made, name).to(dtype="bfloat16")
    return made


def same(state: dict[str, Any], expected: Any) -> None:
    wanted = expected.state_dict()
    assert set(state) == set(wanted), set(state) ^ set(wanted)
    for name, value in wanted.items():
        assert state[name].dtype == value.dtype, name
        assert np.array_equal(state[name].numpy(), value.numpy()), name


def loads(path: Path, expected: Any) -> None:
    """Paddle loads the file into a layer, nothing missing and nothing left over."""
    state = paddle.load(str(path))
    assert net(9).set_state_dict(state) == ([], [])
    same(state, expected)


def refused(word: str, action: Callable[[], object]) -> None:
    try:
        action()
    except NeutralError as error:
        assert word in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"not refused: {word}")


def check_every_protocol_comes_back(folder: Path) -> None:
    digests = set()
    for protocol in (2, 3, 4):
        paddle.save(net(1).state_dict(), str(folder / f"{protocol}.pdparams"), protocol=protocol)
        neutral.convert(folder / f"{protocol}.pdparams", folder / f"{protocol}.nwt")
        report = neutral.convert(folder / f"{protocol}.nwt", folder / f"back{protocol}.pdparams")
        assert not report.losses
        loads(folder / f"back{protocol}.pdparams", net(1))
        before, after = (pickle.loads((folder / f"{n}{protocol}.pdparams").read_bytes()) for n in ("", "back"))
        assert list(before) == list(after) and list(before[TABLE].items()) == list(after[TABLE].items())
        with neutral.export_model(folder / f"{protocol}.nwt") as archive:
            digests.add(archive.manifest.weights_digest)
            ties = {name: p.tied_to for name, p in archive.manifest.parameters() if p.tied_to}
            assert ties == {"again/weight": "head/weight"}
            assert not any("cell" in name for _, p in archive.manifest.parameters() for name in p.native)
    assert len(digests) == 1


def check_a_template_keeps_all_else(folder: Path) -> None:
    for protocol in (2, 3, 4):
        source, template = folder / f"s{protocol}.pdparams", folder / f"t{protocol}.pdparams"
        out, itself = folder / f"o{protocol}.pdparams", folder / f"i{protocol}.pdparams"
        paddle.save(net(1).state_dict(), str(source), protocol=protocol)
        paddle.save(net(2).state_dict(), str(template), protocol=protocol)
        neutral.convert(source, out, into=template)
        loads(out, net(1))
        assert pickle.loads(out.read_bytes())[TABLE] == pickle.loads(template.read_bytes())[TABLE]
        neutral.convert(source, itself, into=source)
        assert itself.read_bytes() == source.read_bytes()


def check_live_layers(folder: Path) -> None:
    layer, other = net(1), net(2)
    with neutral.export_model(layer) as archive:
        kinds = {each.path: each.kind for each in archive.manifest.layers}
        by_path = {each.path: each for each in archive.manifest.layers}
    assert kinds == {
        "conv": "conv", "bn": "batch_norm", "rnn.0": "lstm", "rnn.1": "lstm", "one_way": "gru", "attention": "attention",
        "table": "embedding", "head": "dense", "again": "dense", "slim": "dense",
    }  # fmt: skip
    assert (
        by_path["conv"].padding == ((1, 1), (1, 1)) and by_path["bn"].decay == 0.9 and by_path["attention"].heads == 2
    )
    neutral.convert(layer, into=other)
    same(other.state_dict(), layer)
    paddle.save(layer.state_dict(), str(folder / "live.pdparams"))
    third = net(3)
    neutral.convert(folder / "live.pdparams", into=third)
    same(third.state_dict(), layer)
    refused(
        "(3, 3) against (4, 3)",
        lambda: neutral.convert({"weight": np.zeros((3, 3), "f4")}, into=nn.Linear(3, 4), kinds={"*": "dense"}),
    )


def check_bfloat16(folder: Path) -> None:
    layer = net(1, "conv", "head")
    paddle.save(layer.state_dict(), str(folder / "bf.pdparams"))
    neutral.convert(folder / "bf.pdparams", folder / "bf.nwt")
    neutral.convert(folder / "bf.nwt", folder / "bf2.pdparams")
    loads_back = paddle.load(str(folder / "bf2.pdparams"))
    same(loads_back, layer)
    assert loads_back["conv.weight"].dtype == paddle.bfloat16
    other = net(2, "conv", "head")
    neutral.convert(folder / "bf.pdparams", into=other)
    same(other.state_dict(), layer)


def check_safetensors(folder: Path) -> None:
    """Paddle's own have no word of whose they are; those that neutral writes do."""
    paddle.save(net(1).state_dict(), str(folder / "a.safetensors"), safetensors=True)
    paddle.save(net(2).state_dict(), str(folder / "b.safetensors"), safetensors=True)
    neutral.convert(
        folder / "a.safetensors", folder / "c.safetensors", to="paddle", into=folder / "b.safetensors", format="paddle"
    )
    same(paddle.load(str(folder / "c.safetensors"), safetensors=True), net(1))
    neutral.convert(folder / "a.safetensors", folder / "d.safetensors", to="paddle", format="paddle")
    same(paddle.load(str(folder / "d.safetensors"), safetensors=True), net(1))
    with neutral.export_model(folder / "d.safetensors") as archive:
        assert archive.manifest.source.framework == "paddle"


def check_checkpoints(folder: Path) -> None:
    layer = nn.Linear(2, 3)
    optimizer = paddle.optimizer.Adam(parameters=layer.parameters())
    layer(paddle.ones([1, 2])).sum().backward()
    optimizer.step()
    state, steps = layer.state_dict(), optimizer.state_dict()
    paddle.save(steps, str(folder / "x.pdopt"))
    refused("the state of an optimizer", lambda: neutral.export_model(folder / "x.pdopt"))
    paddle.save({"epoch": 3, "model": state, "opt": steps}, str(folder / "one.pdparams"))
    with neutral.export_model(folder / "one.pdparams") as archive:
        assert [(each.path, each.kind) for each in archive.manifest.layers] == [("", "dense")]
        assert len(archive.manifest.collections["opt"]) == len([v for v in steps.values() if hasattr(v, "numpy")])
    paddle.save({"model": state, "ema": state}, str(folder / "two.pdparams"))
    refused("--key model, --key ema", lambda: neutral.export_model(folder / "two.pdparams"))
    paddle.save({"model": state, "ema": nn.Linear(2, 3).state_dict()}, str(folder / "two.pdparams"))
    neutral.convert(
        folder / "two.pdparams", folder / "out.pdparams", key="ema", into=folder / "two.pdparams", into_key="model"
    )
    loaded = paddle.load(str(folder / "out.pdparams"))
    assert np.array_equal(loaded["model"]["weight"].numpy(), loaded["ema"]["weight"].numpy())


def check_inference_files(folder: Path) -> None:
    paddle.jit.save(nn.Linear(2, 3), str(folder / "inf"), input_spec=[paddle.static.InputSpec([None, 2])])
    refused("have no names", lambda: neutral.export_model(folder / "inf.pdiparams"))


def check_a_recurrent_layer_that_contradicts_itself(folder: Path) -> None:
    state = {name: value.numpy() for name, value in nn.GRU(2, 3).state_dict().items()}
    state["0.cell.weight_hh"] = state["0.cell.weight_hh"] + 1
    (folder / "gru.pdparams").write_bytes(pickle.dumps(state))
    refused("other elements than those of weight_hh_l0", lambda: neutral.export_model(folder / "gru.pdparams"))
    flat = {name: value for name, value in state.items() if "cell" not in name}
    (folder / "flat.pdparams").write_bytes(pickle.dumps(flat))
    neutral.convert(folder / "flat.pdparams", folder / "flat.nwt")
    neutral.convert(folder / "flat.nwt", folder / "flat2.pdparams")
    assert list(pickle.loads((folder / "flat2.pdparams").read_bytes())) == list(flat)


def check_projected_and_wrapped_cells(folder: Path) -> None:
    projected = nn.LSTM(4, 5, proj_size=3)
    with neutral.export_model(projected) as archive:
        (layer,) = archive.manifest.layers
        assert layer.parameters["projection"].shape == (3, 5)
    paddle.save(projected.state_dict(), str(folder / "p.pdparams"))
    other = nn.LSTM(4, 5, proj_size=3)
    neutral.convert(folder / "p.pdparams", into=other)
    same(other.state_dict(), projected)
    both = nn.BiRNN(nn.GRUCell(2, 3), nn.GRUCell(2, 3))
    with neutral.export_model(both) as archive:
        told = {each.path: (each.kind, each.go_backwards) for each in archive.manifest.layers}
    assert told == {"cell_fw": ("gru", False), "cell_bw": ("gru", True)}


def check_what_other_frameworks_would_compute_otherwise(folder: Path) -> None:
    table = nn.Embedding(5, 3, padding_idx=1)
    with neutral.export_model(table) as archive:
        assert archive.manifest.layers[0].padding_idx == 1
    table.weight.set_value(np.ones((5, 3), "f4"))
    refused("padding_idx", lambda: neutral.export_model(table))
    refused(
        "padding_idx",
        lambda: neutral.convert(
            {"weight": np.ones((5, 3), "f4")}, into=nn.Embedding(5, 3, padding_idx=1), kinds={"*": "embedding"}
        ),
    )
    with neutral.export_model(nn.BatchNorm(3, act="relu")) as archive:
        assert archive.manifest.layers[0].kind == "unknown"
    behind = nn.Sequential(nn.Conv2D(3, 4, 3, data_format="NHWC"), nn.Flatten(), nn.Linear(16, 2))
    with neutral.export_model(behind) as archive:
        assert "in" in archive.manifest.layers[-1].undecided


def check_windows(folder: Path) -> None:
    def told(layer: Any) -> Any:
        with neutral.export_model(layer) as archive:
            return archive.manifest.layers[0]

    # Paddle's `same` takes the dilation for 1.
    same_pads = told(nn.Conv2D(1, 2, 3, padding="SAME", dilation=2))
    assert same_pads.padding == ((1, 1), (1, 1)) and same_pads.dilation == (1, 1)
    assert told(nn.Conv2D(1, 2, 3, padding="SAME", stride=2)).padding == "same"
    assert told(nn.Conv2D(1, 2, 3, padding=[1, 2, 3, 4])).padding == ((1, 2), (3, 4))
    assert told(nn.Conv1D(1, 2, 3, padding="VALID")).padding == ((0, 0),)
    mirrored = told(nn.Conv2D(1, 2, 3, padding=1, padding_mode="reflect"))
    assert mirrored.padding == ((1, 1), (1, 1)) and mirrored.padding_mode == "reflect"
    turned = told(nn.Conv2DTranspose(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2))
    assert (turned.padding, turned.output_padding, turned.groups) == (((1, 0), (1, 0)), (0, 0), 2)


def norm_of_several_axes(folder: Path, shape: list[int]) -> None:
    mapping, rng = {"0": "0"}, np.random.default_rng(1)
    mine, theirs = nn.Sequential(nn.LayerNorm(shape)), torch.nn.Sequential(torch.nn.LayerNorm(shape))
    x = rng.normal(size=(2, *shape)).astype("f4")
    hint = {"0": f"layer_norm(normalized_shape={shape})"}
    saved, filled = folder / "x.pdparams", folder / "y.pdparams"
    paddle.save(mine.state_dict(), str(saved))

    def alike() -> None:
        with torch.no_grad():
            there = theirs(torch.from_numpy(x)).numpy()
        assert np.abs(mine(paddle.to_tensor(x)).numpy() - there).max() < 1e-5

    def change() -> None:
        for value in mine.state_dict().values():
            value.set_value(rng.uniform(0.1, 1, value.shape).astype("f4"))
        for parameter in theirs.state_dict().values():
            parameter.copy_(torch.from_numpy(rng.uniform(0.1, 1, shape).astype("f4")))

    change()
    neutral.convert(mine, into=theirs, mapping=mapping)
    alike()
    assert neutral.digest(mine) == neutral.digest(theirs)
    change()
    neutral.convert(theirs, into=mine, mapping=mapping)
    alike()
    change()
    neutral.convert(mine, folder / "x.pt", to="torch", force=True)
    theirs.load_state_dict(torch.load(folder / "x.pt"))
    alike()
    change()
    paddle.save(mine.state_dict(), str(saved))
    neutral.convert(saved, into=theirs, kinds=hint, mapping=mapping)
    alike()
    change()
    neutral.convert(theirs, filled, into=saved, into_kinds=hint, mapping=mapping, force=True)
    mine.set_state_dict(paddle.load(str(filled)))
    alike()
    change()
    neutral.export_model(mine, folder / "x.nwt", force=True).close()
    neutral.import_model(folder / "x.nwt", to="paddle", out=filled, force=True)
    neutral.import_model(folder / "x.nwt", into=theirs, mapping=mapping)
    mine.set_state_dict(paddle.load(str(filled)))
    alike()
    for wrong in ("[7, 7]", "7"):
        told = {"0": f"layer_norm(normalized_shape={wrong})"}
        refused("0", partial(neutral.convert, saved, into=theirs, kinds=told, mapping=mapping))
    refused("layer_norm(normalized_shape=", lambda: neutral.convert(saved, into=theirs, mapping=mapping))


def check_layer_norms_of_several_axes(folder: Path) -> None:
    """Stored as one axis: a layer in memory says of what sizes they are, a hint of a file."""
    for shape in ([5, 6], [4, 4], [2, 3, 4], [2, 2, 2]):
        norm_of_several_axes(folder, shape)
    behind = nn.Sequential(nn.Conv2D(3, 4, 1, data_format="NHWC"), nn.LayerNorm([4, 4, 4]))
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.LayerNorm([4, 4, 4]))
    refused("(64,)", lambda: neutral.convert(behind, into=theirs, mapping={"0": "0", "1": "1"}))


CHECKS = {name: check for name, check in dict(globals()).items() if name.startswith("check_")}


def main(folder: Path) -> dict[str, str]:
    paddle.set_device("cpu")
    found = {}
    for name, check in CHECKS.items():
        mine = folder / name
        mine.mkdir()
        try:
            check(mine)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
