"""Four LSTMs, dropout and a linear layer in a class that nobody can import: out to Keras, and a Keras file into it."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import neutral
from tests.cases import models as m
from tests.cases.commands import Commands

X = m.random(4, 7, 3)


@pytest.fixture(scope="module")
def source() -> Any:
    return m.randomized(m.LstmStack(), 1)


@pytest.fixture(scope="module")
def pickled(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return m.save(source, tmp_path_factory.mktemp("torch") / "lstm.pt")


@pytest.fixture(scope="module")
def keras_source() -> Any:
    return m.randomized_keras(m.lstm_stack_keras(), 2)


@pytest.fixture(scope="module")
def templates(keras_source: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keras")
    keras_source.save(folder / "lstm.keras")
    keras_source.save(folder / "lstm.h5")
    keras_source.save_weights(folder / "lstm.weights.h5")
    return {"keras": folder / "lstm.keras", "h5": folder / "lstm.h5", "weights.h5": folder / "lstm.weights.h5"}


def test_the_class_is_not_there_and_torch_is_not_imported(pickled: Path, tmp_path: Path) -> None:
    """In a process of its own, where neither the class nor a framework is imported."""
    code = (
        "import sys\nfrom neutral.cli import main\n"
        f"assert main(['export', {str(pickled)!r}, {str(tmp_path / 'lstm.nwt')!r}]) == 0\n"
        f"assert {m.USER_MODULE!r} not in sys.modules\n"
        "assert not {'torch', 'keras', 'tensorflow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with neutral.open_archive(tmp_path / "lstm.nwt") as archive:
        assert [layer.kind for layer in archive.manifest.layers] == ["lstm"] * 4 + ["dense"]
        assert [layer.native for layer in archive.manifest.layers] == ["LSTM"] * 4 + ["Linear"]


def paired(tmp_path: Path, pairs: dict[str, str]) -> tuple[object, ...]:
    """`--map` and a file of these pairs."""
    table = "".join(f'"{source}" = "{target}"\n' for source, target in pairs.items())
    (tmp_path / "map.toml").write_text(f"[layers]\n{table}")
    return "--map", tmp_path / "map.toml"


@pytest.mark.parametrize("suffix", ["keras", "h5", "weights.h5"])
def test_into_a_keras_template(
    suffix: str, source: Any, pickled: Path, templates: dict[str, Path], tmp_path: Path, neutral_: Commands
) -> None:
    archive, out = tmp_path / "lstm.nwt", tmp_path / f"out.{suffix}"
    neutral_.ok("export", pickled, archive)
    command = ("import", archive, "--into", templates[suffix], "-o", out, "--explain")
    if suffix == "weights.h5":
        # The file does not say in which order its layers compute: three equal ones could go anywhere.
        said = neutral_.refused(*command)
        assert "candidates: lstm_2, lstm_3, lstm_4" in said and "--map" in said and not out.exists()
        command = (*command, *paired(tmp_path, {f"rnn.{i}": f"lstm_{i + 1}" for i in range(4)}))
    said = neutral_.ok(*command)
    assert all(f"lossy: rnn.{i}: " in said for i in range(4)) and "bias" in said
    if suffix == "weights.h5":
        model = m.lstm_stack_keras()
        model.load_weights(out)
    else:
        model = keras.models.load_model(out, compile=False)
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.LSTM)]
    assert [layer.cell.bias.shape for layer in layers] == [(20,)] * 4
    m.assert_close(m.run_keras(model, X), m.run_torch(source, X))


def test_out_to_keras_weights_without_a_template(
    source: Any, pickled: Path, tmp_path: Path, neutral_: Commands
) -> None:
    """A class of one's own has no graph: the weights come in the order that a model of the same layers loads."""
    out = tmp_path / "lstm.weights.h5"
    said = neutral_.ok("convert", pickled, out, "--flatten", "none")
    assert "order of the layers" in said and said.count("lossy: rnn.") == 4
    model = m.lstm_stack_keras()
    model.load_weights(out)
    m.assert_close(m.run_keras(model, X), m.run_torch(source, X))


def test_the_pickle_comes_back_from_its_archive_byte_for_byte(
    pickled: Path, tmp_path: Path, neutral_: Commands
) -> None:
    """Two biases are kept in the archive: they are summed on the way to Keras alone."""
    neutral_.ok("export", pickled, tmp_path / "lstm.nwt")
    neutral_.ok("import", tmp_path / "lstm.nwt", "--into", pickled, "-o", tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == pickled.read_bytes()


@pytest.mark.parametrize("suffix", ["keras", "h5", "weights.h5"])
def test_a_keras_file_into_the_pickled_template(
    suffix: str, keras_source: Any, pickled: Path, templates: dict[str, Path], tmp_path: Path, neutral_: Commands
) -> None:
    archive, out = tmp_path / "keras.nwt", tmp_path / "out.pt"
    neutral_.ok("export", templates[suffix], archive)
    command = ("import", archive, "--into", pickled, "-o", out)
    if suffix == "weights.h5":
        assert "candidates: rnn.1, rnn.2, rnn.3" in neutral_.refused(*command) and not out.exists()
        command = (*command, *paired(tmp_path, {f"lstm_{i + 1}": f"rnn.{i}" for i in range(4)}))
    neutral_.ok(*command)
    module = m.load(out)
    assert type(module).__name__ == "LstmStack" and module.rnn.dropout == 0.1
    m.assert_close(m.run_torch(module, X), m.run_keras(keras_source, X))


def test_one_bias_to_two_and_back_to_one_is_exact(
    pickled: Path, keras_source: Any, templates: dict[str, Path], tmp_path: Path
) -> None:
    neutral.convert(templates["keras"], tmp_path / "torch.pt", into=pickled)
    neutral.convert(tmp_path / "torch.pt", tmp_path / "back.keras", into=templates["keras"])
    back = keras.models.load_model(tmp_path / "back.keras")
    assert all(np.array_equal(a, b) for a, b in zip(back.get_weights(), keras_source.get_weights(), strict=True))


def test_to_torch_from_the_graph(keras_source: Any, templates: dict[str, Path], tmp_path: Path) -> None:
    import torch

    neutral.convert(templates["h5"], tmp_path / "lstm.pt2")
    m.assert_close(
        m.run_torch(torch.export.load(tmp_path / "lstm.pt2").module(), X), m.run_keras(keras_source, X), 2e-6
    )


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_stack_stays_one_where_the_other_framework_has_stacks(bidirectional: bool, tmp_path: Path) -> None:
    """Into a new file of Paddle and back: its LSTM loads `weight_ih_l1` of one layer, not a layer called `rnn.1`."""
    module = torch.nn.Sequential(OrderedDict(rnn=torch.nn.LSTM(3, 5, num_layers=2, bidirectional=bidirectional)))
    torch.save(module, tmp_path / "stack.pt")
    neutral.convert(tmp_path / "stack.pt", tmp_path / "stack.pdparams")
    neutral.convert(tmp_path / "stack.pdparams", tmp_path / "back.pt", kinds={"rnn": "lstm"})
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == module.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())
