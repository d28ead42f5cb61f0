"""Writing paddle's files without paddle; and what was tried with the real one (tests/paddle_session.py)."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import neutral
from neutral.errors import NeutralError, Refused, Unsupported
from neutral.exporters.paddle import read
from neutral.importers.paddle import build, fill
from neutral.importers.paddle_classes import layer_classes
from neutral.native import NativeLayer, NativeModel, NativeTensor, from_array
from neutral.schema.kinds import GRU, EinsumDense, Parameter, RMSNorm
from neutral.schema.manifest import Manifest, Source

ROOT = Path(__file__).resolve().parents[2]
CHECKS = [
    node.name
    for node in ast.parse((ROOT / "tests/paddle_session.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("paddle")
    command = [sys.executable, "-W", "ignore", "-m", "tests.paddle_session", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_with_paddle(check: str, session: dict[str, str]) -> None:
    assert not session[check], session[check]


def manifest(*layers: object, framework: str = "torch") -> Manifest:
    return Manifest(source=Source(framework=framework, format="pt"), layers=layers, weights_digest="0" * 64)  # type: ignore[arg-type]


def model(**tensors: np.ndarray) -> NativeModel:
    local = {name.rpartition(".")[2]: NativeTensor(name, from_array(array)) for name, array in tensors.items()}
    return NativeModel("paddle", "pdparams", (NativeLayer("rnn", "GRU", local),))


def test_a_new_file_has_recurrent_layers_under_both_names(tmp_path: Path) -> None:
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    arrays = {f"rnn.{name}{end}": np.random.default_rng(1).random(3) for name in names for end in ("", "_reverse")}
    build(model(**arrays), manifest(), tmp_path / "x.pdparams")
    loaded = pickle.loads((tmp_path / "x.pdparams").read_bytes())
    assert len(loaded) == 16
    for name in names:
        for end, cell in (("", "cell_fw"), ("_reverse", "cell_bw")):
            np.testing.assert_array_equal(loaded[f"rnn.0.{cell}.{name[:-3]}"], arrays[f"rnn.{name}{end}"])
    assert {tensor.name for tensor in read(tmp_path / "x.pdparams").tensors()} == set(arrays)


def test_dtypes_and_suffixes(tmp_path: Path) -> None:
    arrays = {f"rnn.{dtype}": np.ones((2, 0, 3), dtype) for dtype in ("f2", "f8", "i1", "i8", "?", "u1", "c8", "c16")}
    arrays["rnn.half"] = np.array([1.5, 2], ml_dtypes.bfloat16)
    arrays["rnn.one"] = np.array(3.0)
    build(model(**arrays), manifest(), tmp_path / "x.pdparams")
    found = {tensor.name: tensor.data for tensor in read(tmp_path / "x.pdparams").tensors()}
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert found[name].read().tobytes() == array.tobytes()
    assert pickle.loads((tmp_path / "x.pdparams").read_bytes())["rnn.half"].dtype == np.uint16
    with pytest.raises(Refused, match="float8_e5m2, expected one of"):
        build(model(**{"rnn.w": np.zeros(2, ml_dtypes.float8_e5m2)}), manifest(), tmp_path / "y.pdparams")
    with pytest.raises(Unsupported, match="suffix"):
        build(model(**arrays), manifest(), tmp_path / "y.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pdparams"]


def test_a_template_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "t.pdparams").write_bytes(pickle.dumps({"w": np.zeros((2, 3), "f4")}))
    for name, array, says in (
        ("v", np.zeros((2, 3), "f4"), "no tensor of that name"),
        ("w", np.zeros((3, 2), "f4"), r"float32\[3, 2\], expected float32\[2, 3\]"),
        ("w", np.zeros((2, 3), "f8"), r"float64\[2, 3\]"),
    ):
        with pytest.raises(Refused, match=says):
            fill(tmp_path / "t.pdparams", {name: from_array(array)}, tmp_path / "o.pdparams")
    with pytest.raises(Refused, match="the input itself"):
        fill(tmp_path / "t.pdparams", {}, tmp_path / "t.pdparams", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["t.pdparams"]


def parameter(*shape: int) -> Parameter:
    return Parameter(axes=tuple(f"x{i}" for i in range(len(shape))), shape=shape, dtype="float32", sha256="0" * 64)


def test_layers_that_paddle_does_not_have() -> None:
    rms = RMSNorm(path="a", parameters={"scale": parameter(3)})
    einsum = EinsumDense(path="b", parameters={"kernel": parameter(3, 2)})
    with pytest.raises(Refused, match=r"a: found an RMS norm.*b: found an einsum"):
        layer_classes(manifest(rms, einsum))
    gates = {"input_kernel": ("gate", "unit", "in"), "recurrent_kernel": ("gate", "unit", "hidden")}
    gru = GRU(
        path="c",
        reset_after=False,
        parameters={
            role: Parameter(axes=axes, shape=(3, 4, 4), dtype="float32", sha256="0" * 64)
            for role, axes in gates.items()
        },
    )
    with pytest.raises(Refused, match="no paddle form"):
        layer_classes(manifest(gru))


def test_torch_and_back(tmp_path: Path) -> None:
    """A Linear is turned, and known by its bias; a file that says nothing of its kind goes nowhere else."""
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "x.pt")
    neutral.convert(tmp_path / "x.pt", tmp_path / "x.pdparams", kinds={"1": "batch_norm"})
    loaded = pickle.loads((tmp_path / "x.pdparams").read_bytes())
    np.testing.assert_array_equal(loaded["0.weight"], module[0].weight.detach().numpy().T)
    assert list(loaded) == ["0.weight", "0.bias", "1.weight", "1.bias", "1._mean", "1._variance"]
    neutral.convert(tmp_path / "x.pdparams", tmp_path / "y.pt")
    back = torch.load(tmp_path / "y.pt")
    assert all(torch.equal(back[name], value) for name, value in module.state_dict().items())
    (tmp_path / "bare.pdparams").write_bytes(pickle.dumps({"fc.weight": np.zeros((4, 4), "f4")}))
    with pytest.raises(NeutralError, match="--kind"):
        neutral.convert(tmp_path / "bare.pdparams", tmp_path / "z.pt")
