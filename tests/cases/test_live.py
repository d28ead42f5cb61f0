"""Live models: read where they stand, filled in place, and left alone when something does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import neutral
from neutral.errors import Refused, WrongUsage
from tests.cases import models as m

L = keras.layers
X = m.random(2, 1, 28, 28)


def weights(model: Any) -> list[bytes]:
    return [weight.numpy().tobytes() for weight in model.weights]


def test_a_live_module_is_what_its_file_is(tmp_path: Path) -> None:
    module = m.randomized(m.lenet5(), 1)
    torch.save(module, tmp_path / "a.pt")
    with neutral.export_model(module) as live, neutral.export_model(tmp_path / "a.pt") as file:
        assert live.manifest.weights_digest == file.manifest.weights_digest
        assert live.manifest.graph == file.manifest.graph is not None
        assert np.array_equal(live.tensor("0/kernel").read(), module[0].weight.numpy(force=True))


def test_a_live_keras_model_is_what_its_file_is(tmp_path: Path) -> None:
    model = m.randomized_keras(m.lenet5_keras(), 1)
    model.save(tmp_path / "a.keras")
    with neutral.export_model(model) as live, neutral.export_model(tmp_path / "a.keras") as file:
        assert live.manifest.weights_digest == file.manifest.weights_digest
        assert live.manifest.graph == file.manifest.graph is not None


@pytest.mark.parametrize("inner", [False, True])
def test_a_live_keras_layer_whose_call_was_replaced(inner: bool, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5, 4)), L.Bidirectional(L.LSTM(3, name="lstm")), L.Dense(2, name="fc")])
    altered = model.layers[0].forward_layer if inner else model.layers[1]
    altered.call = lambda x, **_: x[:, :2]
    with neutral.export_model(model) as archive:
        assert archive.manifest.graph is None
        assert f"{altered.name}: no graph, because its call was replaced" in archive.manifest.notes
    for suffix in ("keras", "h5", "pt2"):
        with pytest.raises(Refused, match="no graph, because its call was replaced"):
            neutral.convert(model, tmp_path / f"a.{suffix}")
    neutral.convert(model, tmp_path / "a.weights.h5")
    model.load_weights(tmp_path / "a.weights.h5")


def test_torch_to_a_live_keras_model_and_back() -> None:
    module, model = m.randomized(m.lenet5(), 1), m.randomized_keras(m.lenet5_keras(), 2)
    report = neutral.import_model(neutral.export_model(module), into=model)
    assert report.out is None and len(report.pairs) == 5
    m.assert_close(m.run_keras(model, m.channels_last(X)), m.run_torch(module, X))
    other = m.randomized(m.LeNet5(), 3)
    place = other.features[0].weight.data_ptr()
    neutral.import_model(neutral.export_model(model), into=other)
    assert other.features[0].weight.data_ptr() == place
    assert [t.numpy().tobytes() for t in other.state_dict().values()] == list(m.state_bytes(module).values())


def test_an_archive_file_into_live_models(tmp_path: Path) -> None:
    module, model = m.randomized(m.LstmStack(), 1), m.lstm_stack_keras()
    neutral.export_model(module, tmp_path / "a.nwt").close()
    neutral.import_model(tmp_path / "a.nwt", into=model)
    x = m.random(3, 7, 3)
    m.assert_close(m.run_keras(model, x), m.run_torch(module, x))
    fresh = m.randomized(m.LstmStack(), 9)
    neutral.import_model(tmp_path / "a.nwt", into=fresh)
    assert m.state_bytes(fresh) == m.state_bytes(module)


def test_a_dict_of_arrays() -> None:
    """Names with slashes, kinds from a hint; without one nobody knows how the arrays lie."""
    rng = np.random.default_rng(0)
    arrays = {"0/kernel": rng.standard_normal((4, 3), np.float32), "0/bias": rng.standard_normal(4, np.float32)}
    with neutral.export_model(arrays, kinds={"0": "dense"}) as archive:
        assert archive.names() == ("0/kernel", "0/bias")
        assert np.array_equal(archive.tensor("0/kernel").read(), arrays["0/kernel"])
        module = nn.Sequential(nn.Linear(3, 4))
        neutral.import_model(archive, into=module)
    assert np.array_equal(module[0].weight.numpy(force=True), arrays["0/kernel"])
    with pytest.raises(neutral.Refused, match="unknown"):
        neutral.import_model(neutral.export_model(arrays), into=nn.Sequential(nn.Linear(3, 4)))


@pytest.mark.parametrize("of_numpy", [False, True])
def test_a_state_dict_is_torchs(of_numpy: bool) -> None:
    """Its kernels are (out, in): read as canonical arrays, a square one would be right by chance only."""
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    module = m.randomized(module, 1)
    state = {k: v.numpy() if of_numpy else v for k, v in module.state_dict().items()}
    hint = {"0": "dense", "2": "dense", "1": "batch_norm"}
    with neutral.export_model(state, kinds=hint) as archive, neutral.export_model(module) as live:
        assert archive.manifest.source.framework == "torch"
        assert np.array_equal(archive.tensor("0/kernel").read(), live.tensor("0/kernel").read())
        assert archive.manifest.weights_digest == live.manifest.weights_digest
    model = keras.Sequential([keras.Input((3,)), L.Dense(3), L.BatchNormalization(epsilon=1e-5), L.Dense(2)])
    neutral.import_model(neutral.export_model(state, kinds=hint), into=model)
    x = m.random(4, 3)
    m.assert_close(m.run_keras(model, x), m.run_torch(module, x))


@pytest.mark.parametrize("of_numpy", [False, True])
def test_a_state_dict_is_filled_in_place(of_numpy: bool) -> None:
    source, module = m.randomized(nn.Linear(3, 4), 1), m.randomized(nn.Linear(3, 4), 2)
    state = {k: v.numpy() if of_numpy else v for k, v in module.state_dict().items()}
    neutral.import_model(neutral.export_model(source), into=state)
    assert m.state_bytes(module) == m.state_bytes(source)
    with pytest.raises(Refused):
        neutral.import_model(neutral.export_model(nn.Linear(3, 5)), into=state)
    assert m.state_bytes(module) == m.state_bytes(source)


def test_convert_fills_a_live_model_without_an_output() -> None:
    source, module = m.randomized(nn.Linear(3, 4), 1), m.randomized(nn.Linear(3, 4), 2)
    neutral.convert(source, into=module)
    assert m.state_bytes(module) == m.state_bytes(source)


def test_arrays_with_slashes_are_no_state_dict() -> None:
    with neutral.export_model({"a.b/kernel": np.zeros((3, 2)), "c.weight": np.zeros(2)}) as archive:
        assert archive.manifest.source.framework == "numpy"


def test_arrays_come_out_in_the_dtype_that_they_have() -> None:
    module = nn.Module()
    for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)):
        module.register_buffer(f"b{i}", torch.arange(3, dtype=torch.float32).to(dtype))
    with neutral.export_model(module) as archive:
        found = {name: archive.tensor(name).read().dtype for name in archive.names()}
    assert list(found.values()) == [ml_dtypes.bfloat16, np.float16, np.float64, ml_dtypes.float8_e4m3fn]


def test_nothing_changes_when_torch_is_refused() -> None:
    """The first layers fit, the last does not."""
    source = m.randomized(m.lenet5(), 1)
    wrong = nn.Sequential(*list(m.randomized(m.lenet5(), 2))[:-1], nn.Linear(84, 11)).eval()
    before = m.state_bytes(wrong)
    with pytest.raises(Refused, match="11"):
        neutral.import_model(neutral.export_model(source), into=wrong)
    assert m.state_bytes(wrong) == before


def test_nothing_changes_when_keras_is_refused() -> None:
    source = m.randomized_keras(keras.Sequential([keras.Input((3,)), L.Dense(4, name="a"), L.Dense(2, name="b")]), 1)
    narrow = L.Dense(2, name="b", dtype="float16")
    wrong = m.randomized_keras(keras.Sequential([keras.Input((3,)), L.Dense(4, name="a"), narrow]), 2)
    before = weights(wrong)
    with neutral.export_model(source) as archive:
        with pytest.raises(Refused, match="cast"):
            neutral.import_model(archive, into=wrong)
        assert weights(wrong) == before
        neutral.import_model(archive, into=wrong, cast=True)
    assert weights(wrong)[:2] == weights(source)[:2]
    assert np.array_equal(wrong.weights[2].numpy(), source.weights[2].numpy().astype(np.float16))


def test_ties_of_a_live_module_stay() -> None:
    module = nn.Module()
    module.add_module("embedding", nn.Embedding(5, 3))
    module.add_module("head", nn.Linear(3, 5, bias=False))
    module.head.weight = module.embedding.weight
    with neutral.export_model(module) as archive:
        tied = {name: parameter.tied_to for name, parameter in archive.manifest.parameters() if parameter.tied_to}
        assert tied == {"head/kernel": "embedding/embedding"}
        m.randomized(module, 3)
    source = nn.Module()
    source.add_module("embedding", nn.Embedding(5, 3))
    source.add_module("head", nn.Linear(3, 5, bias=False))
    with pytest.raises(Refused):
        neutral.import_model(neutral.export_model(m.randomized(source, 4)), into=module)


def test_a_live_model_is_no_place_for_an_output(tmp_path: Path) -> None:
    module = m.lenet5()
    with pytest.raises(WrongUsage):
        neutral.import_model(neutral.export_model(module), into=module, out=tmp_path / "x.pt")
    with pytest.raises(WrongUsage, match=r"a keras\.Model or a dict"):
        neutral.export_model(3)


def test_a_model_that_does_not_describe_itself_has_weights_but_no_graph() -> None:
    class Own(keras.Model):
        def __init__(self, units: int) -> None:
            super().__init__()
            self.fc = keras.layers.Dense(units, name="fc")

        def call(self, x: Any) -> Any:
            return self.fc(x)

    model = Own(3)
    model(np.ones((1, 2), np.float32))
    with neutral.export_model(model) as archive:
        assert archive.manifest.graph is None
        assert any("no graph: the model does not describe itself" in note for note in archive.manifest.notes)
        np.testing.assert_array_equal(archive.tensor("fc/kernel").read(), model.fc.kernel.numpy().T)
