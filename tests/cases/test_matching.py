"""Which layer goes where: by name, by map, by structure where that is unique; never by chance, nothing left over."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch
from torch import nn

import neutral
from neutral.cli import main
from tests.cases import models as m
from tests.cases.commands import Commands

L = keras.layers


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    """A state dict whose layers have these names, dots written as two underscores."""
    torch.save(OrderedDict((name.replace("__", "."), tensor) for name, tensor in tensors.items()), path)
    return path


def linears(path: Path, *names: str, size: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A module of one's own with equal Linears of these names: their order says nothing."""
    module = nn.Module()
    for name in names:
        module.add_module(name, nn.Linear(size, size, dtype=dtype))
    torch.save(m.randomized(module, seed), path)
    return path


def state(path: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(path, weights_only=False)
    return loaded.state_dict() if isinstance(loaded, nn.Module) else loaded


def test_names_that_differ_in_case_and_separators(tmp_path: Path, neutral_: Commands) -> None:
    inner = keras.Sequential([keras.Input((3,)), L.Dense(3, name="FC_1"), L.Dense(3, name="fc_2")], name="Encoder")
    m.randomized_keras(keras.Sequential([keras.Input((3,)), inner]), 1).save(tmp_path / "a.keras")
    wrapped = nn.Module()
    wrapped.add_module("encoder", nn.Module())
    wrapped.encoder.add_module("fc_2", nn.Linear(3, 3))
    wrapped.encoder.add_module("fc_1", nn.Linear(3, 3))
    torch.save(nn.DataParallel(wrapped).state_dict(), tmp_path / "t.pt")
    said = neutral_.ok("convert", tmp_path / "a.keras", tmp_path / "b.pt", "--into", tmp_path / "t.pt", "--explain")
    assert said.count("name, normalised") == 2
    weights = inner.get_weights()
    assert np.array_equal(state(tmp_path / "b.pt")["module.encoder.fc_1.weight"], weights[0].T)
    assert np.array_equal(state(tmp_path / "b.pt")["module.encoder.fc_2.weight"], weights[2].T)


def test_equal_layers_in_an_unknown_order_are_refused_and_a_map_settles_it(tmp_path: Path, neutral_: Commands) -> None:
    source, template = linears(tmp_path / "a.pt", "a", "b", "c", seed=1), linears(tmp_path / "t.pt", "x", "y", "c")
    out = tmp_path / "out.pt"
    command = ("convert", source, out, "--into", template)
    said = neutral_.refused(*command)
    assert "candidates: x, y" in said and "candidates: a, b" in said and "--map" in said and not out.exists()

    (tmp_path / "map.toml").write_text('[layers]\na = "y"\n')
    explained = neutral_.ok(*command, "--map", tmp_path / "map.toml", "--explain")
    rows = {tuple(line.split(maxsplit=2)) for line in explained.splitlines()}
    assert ("a", "y", "map") in rows and ("c", "c", "name") in rows
    assert ("b", "x", "the only layer of its kind and shapes") in rows
    given, found = state(source), state(out)
    assert all(torch.equal(given[f"{a}.weight"], found[f"{b}.weight"]) for a, b in ("ay", "bx", "cc"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[layers]\nnone = "x"\n', "none"),
        ('[layers]\na = "none"\n', "none"),
        ('[layers]\na = "x"\nb = "x"\n', "two layers mapped to it"),
        ("[layers]\na = 3\n", "a layer's path"),
        ("not toml", "TOML"),
    ],
)
def test_a_map_that_does_not_fit(text: str, says: str, tmp_path: Path, neutral_: Commands) -> None:
    source, template = linears(tmp_path / "a.pt", "a", "b"), linears(tmp_path / "t.pt", "x", "y")
    (tmp_path / "map.toml").write_text(text)
    out = tmp_path / "out.pt"
    assert says in neutral_.refused("convert", source, out, "--into", template, "--map", tmp_path / "map.toml")
    assert not out.exists()


def test_equal_layers_of_two_chains_go_in_order(tmp_path: Path, neutral_: Commands) -> None:
    """Both files say in which order the layers compute."""
    chain = m.randomized(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))), 1)
    torch.save(chain, tmp_path / "a.pt")
    model = keras.Sequential([keras.Input((3,)), *(L.Dense(3, name=f"layer{i}") for i in range(4))])
    model.save(tmp_path / "t.keras")
    said = neutral_.ok("convert", tmp_path / "a.pt", tmp_path / "b.keras", "--into", tmp_path / "t.keras", "--explain")
    assert said.count("order among layers of equal kind and shapes") == 4
    x = m.random(5, 3)
    m.assert_close(m.run_keras(keras.models.load_model(tmp_path / "b.keras"), x), m.run_torch(chain, x))


def test_equal_names_of_other_shapes_are_refused(tmp_path: Path, neutral_: Commands) -> None:
    source = linears(tmp_path / "a.pt", "fc", size=3)
    said = neutral_.refused("convert", source, tmp_path / "o.pt", "--into", linears(tmp_path / "t.pt", "fc", size=4))
    assert "fc -> fc" in said and "(3, 3)" in said and "(4, 4)" in said


def test_what_is_left_over_needs_a_word(tmp_path: Path, neutral_: Commands) -> None:
    source, template = linears(tmp_path / "a.pt", "body", "old_head"), linears(tmp_path / "t.pt", "body", "new", size=3)
    smaller = nn.Module()
    smaller.add_module("body", nn.Linear(3, 3))
    smaller.add_module("new_head", nn.Linear(3, 7))
    torch.save(m.randomized(smaller, 4), template)
    out = tmp_path / "out.pt"
    command = ("convert", source, out, "--into", template)
    said = neutral_.refused(*command)
    assert "--allow-unused 'old_head'" in said and "--allow-missing 'new_head'" in said
    said = neutral_.refused(*command, "--allow-unused", "old*")
    assert "--allow-unused" not in said and "--allow-missing 'new_head'" in said and not out.exists()
    neutral_.ok(*command, "--allow-unused", "old*", "--allow-missing", "new*")
    before, given, found = smaller.state_dict(), state(source), state(out)
    assert torch.equal(found["new_head.weight"], before["new_head.weight"])
    assert torch.equal(found["body.weight"], given["body.weight"])


def test_a_single_missing_tensor_is_told(tmp_path: Path, neutral_: Commands) -> None:
    """A scale that the template has and the archive has not is one; a bias is zero, and both are said."""
    torch.save(m.randomized(nn.Sequential(nn.Linear(3, 4, bias=False)), 1), tmp_path / "a.pt")
    torch.save(nn.Sequential(nn.Linear(3, 4)), tmp_path / "t.pt")
    said = neutral_.ok("convert", tmp_path / "a.pt", tmp_path / "o.pt", "--into", tmp_path / "t.pt")
    assert "bias" in said and not state(tmp_path / "o.pt")["0.bias"].any()
    # The other way a bias would be lost.
    torch.save(m.randomized(nn.Sequential(nn.Linear(3, 4)), 1), tmp_path / "b.pt")
    said = neutral_.refused("convert", tmp_path / "b.pt", tmp_path / "p.pt", "--into", tmp_path / "a.pt")
    assert "bias" in said and not (tmp_path / "p.pt").exists()


def test_another_eps_is_refused_and_another_padding_is_a_warning(tmp_path: Path, neutral_: Commands) -> None:
    norm = m.randomized(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, eps=1e-5)), 1)
    torch.save(norm, tmp_path / "a.pt")
    for eps, padding in ((1e-3, "valid"), (1e-5, "valid")):
        model = keras.Sequential(
            [keras.Input((6, 5, 2)), L.Conv2D(3, 3, padding=padding), L.BatchNormalization(epsilon=eps)]
        )
        model.save(tmp_path / "t.keras")
        command = ("convert", tmp_path / "a.pt", tmp_path / f"{eps}.keras", "--into", tmp_path / "t.keras")
        if eps == 1e-3:
            said = neutral_.refused(*command)
            assert "eps 1e-05" in said and "0.001" in said
        else:
            assert "warning: " in (said := neutral_.ok(*command)) and "padding is" in said


def test_other_strides_dilations_or_groups_are_refused(tmp_path: Path, neutral_: Commands) -> None:
    torch.save(nn.Sequential(nn.Conv2d(2, 4, 3, stride=2)), tmp_path / "a.pt")
    for settings in ({"strides": 1}, {"strides": 2, "dilation_rate": 1}):
        keras.Sequential([keras.Input((9, 9, 2)), L.Conv2D(4, 3, **settings)]).save(tmp_path / "t.keras")
        command = ("convert", tmp_path / "a.pt", tmp_path / "o.keras", "--into", tmp_path / "t.keras", "--force")
        if settings["strides"] == 1:
            assert "strides" in neutral_.refused(*command)
        else:
            neutral_.ok(*command)


def test_a_narrower_dtype_needs_cast_and_a_wider_one_is_reported(tmp_path: Path, neutral_: Commands) -> None:
    wide = linears(tmp_path / "wide.pt", "fc", seed=1, dtype=torch.float64)
    narrow = linears(tmp_path / "narrow.pt", "fc", dtype=torch.float16)
    out = tmp_path / "out.pt"
    command = ("convert", wide, out, "--into", narrow)
    said = neutral_.refused(*command)
    assert "--cast" in said and "float64" in said and "float16" in said and not out.exists()
    assert "lossy" in neutral_.ok(*command, "--cast")
    found = state(out)["fc.weight"]
    assert found.dtype == torch.float16 and torch.equal(found, state(wide)["fc.weight"].half())
    said = neutral_.ok("convert", narrow, tmp_path / "wider.pt", "--into", wide)
    assert "float64" in said and "lossy" not in said
    assert torch.equal(state(tmp_path / "wider.pt")["fc.weight"], state(narrow)["fc.weight"].double())


def test_an_unknown_layer_goes_only_where_its_own_framework_is(tmp_path: Path, neutral_: Commands) -> None:
    source = saved(tmp_path / "a.pt", own__table=torch.randn(3, 4, 5, 2, 2, 2), fc__weight=torch.randn(2, 3))
    template = saved(tmp_path / "t.pt", own__table=torch.zeros(3, 4, 5, 2, 2, 2), fc__weight=torch.zeros(2, 3))
    neutral_.ok("convert", source, tmp_path / "o.pt", "--into", template)
    assert torch.equal(state(tmp_path / "o.pt")["own.table"], state(source)["own.table"])
    said = neutral_.refused("convert", source, tmp_path / "o.weights.h5")
    assert "own: found a layer of unknown kind" in said


def test_every_problem_is_said_at_once(tmp_path: Path, neutral_: Commands) -> None:
    torch.save(nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Linear(3, 2)), tmp_path / "a.pt")
    model = [L.BatchNormalization(epsilon=0.1), L.LayerNormalization(epsilon=0.2), L.Dense(2, dtype="float16")]
    keras.Sequential([keras.Input((3,)), *model]).save(tmp_path / "t.keras")
    said = neutral_.refused("convert", tmp_path / "a.pt", tmp_path / "o.keras", "--into", tmp_path / "t.keras")
    assert said.count("eps 1e-05") == 2 and "--cast" in said


def test_the_python_api_reports_the_same(tmp_path: Path) -> None:
    source, template = linears(tmp_path / "a.pt", "a", "b", seed=1), linears(tmp_path / "t.pt", "x", "b")
    with neutral.export_model(source) as archive:
        report = neutral.import_model(archive, into=template, out=tmp_path / "o.pt", mapping={"a": "x"})
    assert [(pair.source, pair.target, pair.why) for pair in report.pairs] == [("a", "x", "map"), ("b", "b", "name")]
    assert report.out == tmp_path / "o.pt" and report.losses == ()


def test_what_was_left_out_is_listed_and_not_counted(tmp_path: Path, neutral_: Commands) -> None:
    source = linears(tmp_path / "a.pt", "body", "old_head")
    template = linears(tmp_path / "t.pt", "body", "new_head")
    patterns = ("--map", tmp_path / "map.toml", "--allow-unused", "old*", "--allow-missing", "new*")
    (tmp_path / "map.toml").write_text('body = "body"\n')
    torch.save(m.randomized(nn.Sequential(OrderedDict(body=nn.Linear(3, 3), new_head=nn.Linear(3, 7))), 4), template)
    command = ("convert", source, tmp_path / "o.pt", "--into", template, "--force", *patterns)
    said = neutral_.ok(*command, "--explain").splitlines()
    assert any(line.split() == ["old_head", "left", "out"] for line in said)
    assert any(line.split() == ["new_head", "kept", "as", "it", "was"] for line in said)
    assert "o.pt: 1 layer," in said[-1] and not any("warning" in line for line in said)
    said = neutral_.ok(*command, "--allow-unused", "nobody.*", "--allow-missing", "None")
    warnings = [line for line in said.splitlines() if line.startswith("neutral: warning: ")]
    assert ["--allow-unused 'nobody.*' matches no layer" in warnings[0], "old_head" in warnings[0]] == [True, True]
    assert "--allow-missing 'None' matches no layer" in warnings[1] and len(warnings) == 2
    report = neutral.convert(source, tmp_path / "p.pt", into=template, allow_unused=["old*"], allow_missing=["new*"])
    assert (report.layers, report.unused, report.missing) == (1, ("old_head",), ("new_head",))


# --- templates with several sets of weights ---


def two_sets(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint with the weights, their average and an optimizer."""
    module = m.randomized(nn.Linear(3, 5), 1)
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    module(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    averaged = m.randomized(nn.Linear(3, 5), 2).state_dict()
    sets = {"model": {f"fc.{k}": v for k, v in module.state_dict().items()}}
    sets["model_ema"] = {f"fc.{k}": v for k, v in averaged.items()}
    torch.save({**sets, "optimizer": optimizer.state_dict(), "epoch": 3}, path)
    return sets


@pytest.mark.parametrize("chosen", ["model", "model_ema"])
def test_one_set_of_a_template_is_replaced(chosen: str, tmp_path: Path, neutral_: Commands) -> None:
    sets = two_sets(tmp_path / "t.pth")
    source = saved(tmp_path / "a.pt", fc__weight=torch.randn(5, 3), fc__bias=torch.randn(5))
    out = tmp_path / "o.pth"
    said = neutral_.refused("convert", source, out, "--into", tmp_path / "t.pth")
    assert "choose one: --into-key model, --into-key model_ema" in said
    neutral_.ok("convert", source, out, "--into", tmp_path / "t.pth", "--into-key", chosen)
    found = torch.load(out, weights_only=True)
    expected = {**sets, chosen: state(source)}
    for key, tensors in expected.items():
        assert all(torch.equal(found[key][name], tensor) for name, tensor in tensors.items()), key
    with zipfile.ZipFile(tmp_path / "t.pth") as old, zipfile.ZipFile(out) as new:
        assert old.namelist() == new.namelist()
        assert sum(old.read(name) != new.read(name) for name in old.namelist()) == 2

    neutral_.ok("export", source, tmp_path / "a.nwt")
    imported = tmp_path / "p.pth"
    neutral_.ok("import", tmp_path / "a.nwt", "--into", tmp_path / "t.pth", "--into-key", chosen, "-o", imported)
    assert imported.read_bytes() == out.read_bytes()
    neutral.import_model(tmp_path / "a.nwt", into=tmp_path / "t.pth", into_key=chosen, out=imported, force=True)
    assert imported.read_bytes() == out.read_bytes()


def test_a_key_of_a_template_without_sets_is_refused(tmp_path: Path, neutral_: Commands) -> None:
    source = linears(tmp_path / "a.pt", "fc")
    keras.Sequential([keras.Input((3,)), L.Dense(3, name="fc")]).save(tmp_path / "t.keras")
    linears(tmp_path / "t.pt", "fc")
    for template, status in (("t.keras", 1), ("t.pt", 1)):
        command = ("convert", source, tmp_path / f"o.{template}", "--into", tmp_path / template)
        said = neutral_.refused(*command, "--into-key", "ema", status=status)
        assert "ema" in said and "leave --into-key out" in said
        neutral_.ok(*command)
    said = neutral_.refused("convert", source, tmp_path / "o.npz", "--into-key", "ema", status=2)
    assert "--into-key" in said and "--into TEMPLATE" in said
    with pytest.raises(neutral.WrongUsage, match="live model and a key"):
        neutral.convert(source, into=nn.Linear(3, 3), into_key="ema")


def test_a_key_of_a_source_without_sets_is_refused(tmp_path: Path, neutral_: Commands) -> None:
    linears(tmp_path / "a.pt", "fc")
    neutral_.ok("export", tmp_path / "a.pt", tmp_path / "a.nwt")
    said = neutral_.refused("digest", tmp_path / "a.pt", "--key", "ema")
    assert "the whole file is one set of weights" in said and "leave --key out" in said
    assert "leave --key out" in neutral_.refused("digest", tmp_path / "a.nwt", "--key", "ema", status=2)


def test_diff_of_sets(tmp_path: Path, neutral_: Commands) -> None:
    sets = two_sets(tmp_path / "a.pth")
    torch.save(sets["model_ema"], tmp_path / "ema.pt")
    neutral_.ok("convert", tmp_path / "ema.pt", tmp_path / "ema.weights.h5")
    both, h5, nothing = tmp_path / "a.pth", tmp_path / "ema.weights.h5", tmp_path / "ema.pt"
    for a, b in ((both, h5), (h5, both), (both, nothing), (both, both)):
        assert "same weights" in neutral_.ok("diff", a, b, "--key", "model_ema")
    assert neutral.diff(both, both, key="model", key_b="model_ema").lines
    assert not neutral.diff(both, both, key="model", key_b="model").lines
    assert main(["diff", str(both), str(both), "--key", "model", "--key", "model_ema"]) == 1
    said = neutral_.refused("diff", h5, nothing, "--key", "model_ema", status=2)
    assert said.count("model_ema") == 2 and said.count("leave --key out") == 2
    assert "one of: model, model_ema" in neutral_.refused("diff", h5, both, "--key", "nobody", status=2)
    assert "--key model" in neutral_.refused("diff", both, h5, status=2)
    assert "3 keys" in neutral_.refused("diff", both, both, *(("--key", "model") * 3), status=2)


def test_verify_says_what_to_do_with_sets(tmp_path: Path, neutral_: Commands) -> None:
    two_sets(tmp_path / "a.pth")
    said = neutral_.refused("verify", tmp_path / "a.pth", tmp_path / "a.pth")
    assert "export one of them and verify its archive: --key model, --key model_ema" in said


def test_average_of_a_tensorflow_template(tmp_path: Path, neutral_: Commands) -> None:
    """A checkpoint whose names tell the set: only the averages change."""
    import tensorflow as tf

    def value(*shape: int) -> tf.Variable:
        return tf.Variable(m.random(*shape))

    names = ("fc/kernel", "fc/bias", "fc/kernel/ExponentialMovingAverage", "fc/bias/ExponentialMovingAverage")
    tensors = [value(3, 5), value(5), value(3, 5), value(5)]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "t.ckpt"), tensor_names=list(names), shape_and_slices=[""] * 4, tensors=tensors
    )
    source = saved(tmp_path / "a.pt", fc__weight=torch.randn(5, 3), fc__bias=torch.randn(5))
    neutral_.ok("convert", source, tmp_path / "o.ckpt", "--into", tmp_path / "t.ckpt", "--into-key", "ema")
    found = tf.train.load_checkpoint(str(tmp_path / "o.ckpt"))
    assert np.array_equal(found.get_tensor(names[0]), tensors[0].numpy())
    assert np.array_equal(found.get_tensor(names[2]), state(source)["fc.weight"].numpy().T)
    assert np.array_equal(found.get_tensor(names[3]), state(source)["fc.bias"].numpy())


# --- a model that is one layer, whose path is empty; layers of names that are those of no kind ---


def visited(file: h5py.File) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found


def test_a_model_that_is_one_layer(tmp_path: Path, neutral_: Commands) -> None:
    source = saved(tmp_path / "a.pt", weight=torch.randn(6, 8))
    assert "1 layer of unknown kind (the model itself)" in neutral_.ok("show", source)
    said = neutral_.refused("convert", source, tmp_path / "o.weights.h5")
    assert said.startswith("the model itself: found a layer of unknown kind") and "--kind '=KIND'" in said
    assert "dense" in neutral_.ok("export", source, tmp_path / "a.nwt", "--kind", "=dense") + neutral_.ok(
        "show", tmp_path / "a.nwt"
    )
    with neutral.export_model(source, kinds={"": "dense"}, flatten={"": "4"}) as archive:
        (layer,) = archive.layers
        assert (layer.kind, dict(layer.channels)) == ("dense", {"in": 4})
    hints = ("--kind", "=dense", "--flatten", "=4")
    neutral_.ok("convert", source, tmp_path / "o.weights.h5", *hints)
    kernel = state(source)["weight"].numpy().reshape(6, 4, 2)
    with h5py.File(tmp_path / "o.weights.h5") as file:
        (found,) = (x[()] for x in visited(file) if x.shape == (8, 6))
    assert np.array_equal(found, kernel.transpose(2, 1, 0).reshape(8, 6))
    linears(tmp_path / "b.pt", "fc")
    said = neutral_.refused("export", tmp_path / "b.pt", tmp_path / "no.nwt", "--kind", "=dense")
    assert said.startswith("the model itself: found no such layer, expected one of fc")


def test_names_that_are_those_of_no_kind(tmp_path: Path, neutral_: Commands) -> None:
    """TF-slim's `fc/weights`: to name a kind does not help, and nobody is told to."""
    slim = tmp_path / "slim.npz"
    np.savez(slim, **{"fc/weights": m.random(3, 5), "fc/biases": m.random(5)})
    shown = neutral_.ok("show", slim)
    assert "1 layer of unknown kind (fc)" in shown and "--kind" not in shown and "template" in shown
    for command in (
        ("convert", slim, tmp_path / "o.safetensors"),
        ("export", slim, tmp_path / "o.nwt", "--kind", "fc=embedding"),
    ):
        said = neutral_.refused(*command)
        assert "no kind has tensors of these names: rename them as layers of numpy have them" in said
        assert "KIND" not in said and "give another" not in said and " a embedding" not in said
    named = saved(tmp_path / "a.pt", fc__weight=torch.randn(5, 3))
    said = neutral_.refused("export", named, tmp_path / "o.nwt", "--kind", "fc=lstm")
    assert "those of an lstm" in said and "give another --kind: dense, " in said
