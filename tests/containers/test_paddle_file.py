"""Files of paddle.save: which sets of weights they hold, and what they refuse. Real ones: tests/importers/test_paddle.py."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from neutral.containers.numpy_pickle import array_tensor
from neutral.containers.paddle_file import CUT_TABLE, NAME_TABLE, PaddleFile, holds_tables
from neutral.errors import BadFile, Refused, Unsupported

W = np.arange(6, dtype="f4").reshape(2, 3)
STATE = {"fc.weight": W, "fc.bias": W[0]}


class Named:
    """A tensor as paddle pickles it inside other objects: `tuple` called with its name and its array."""

    def __init__(self, name: str, array: Any) -> None:
        self.pair = (name, array)

    def __reduce__(self) -> Any:
        return tuple, (self.pair,)


def opened(folder: Path, value: object, protocol: int = 4) -> PaddleFile:
    (folder / "x.pdparams").write_bytes(pickle.dumps(value, protocol))
    return PaddleFile(folder / "x.pdparams")


def test_a_state_dict_with_its_table_of_names(tmp_path: Path) -> None:
    file = opened(tmp_path, {**STATE, NAME_TABLE: {"fc.weight": "linear_0.w_0", "fc.bias": "linear_0.b_0"}})
    key, chosen = file.choose(None)
    assert key == "" and list(chosen) == ["fc.weight", "fc.bias"]
    assert chosen["fc.bias"].parameter == "linear_0.b_0"
    assert file.names("") == {"fc.weight": "linear_0.w_0", "fc.bias": "linear_0.b_0"}
    np.testing.assert_array_equal(file.tensor(chosen["fc.weight"], "fc.weight").read(), W)


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_inside_other_objects(tmp_path: Path, protocol: int) -> None:
    weights = {name: Named(f"own_{name}", array) for name, array in STATE.items()}
    optimizer = {"linear_0.w_0_moment1_0": Named("m", W), "LR_Scheduler": {"last_epoch": 3}}
    file = opened(tmp_path, {"epoch": 3, "model": weights, "opt": optimizer, "x": [1, (2, "a")]}, protocol)
    key, chosen = file.choose(None)
    assert key == "model" and chosen["fc.weight"].parameter == "own_fc.weight"
    assert list(file.others) == ["opt"] and file.names(key) is None
    assert list(file.choose("opt")[1]) == ["linear_0.w_0_moment1_0"]
    with pytest.raises(Refused, match="nothing under the key ema"):
        file.choose("ema")


def test_several_sets_are_for_the_user_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"2 sets of weights .model, ema.*choose one: --key model, --key ema"):
        opened(tmp_path, {"model": STATE, "ema": STATE}).choose(None)


@pytest.mark.parametrize(
    "state",
    [
        {"linear_0.w_0_moment1_0": W, "linear_0.w_0_beta1_pow_acc_0": W[0]},
        {"w_velocity_0": W, "LR_Scheduler": {"last_epoch": 1}},
        {"LR_Scheduler": {"last_epoch": 1}},
    ],
)
def test_an_optimizer_is_no_model(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="the state of an optimizer"):
        opened(tmp_path, state).choose(None)


def test_an_array_that_was_cut(tmp_path: Path) -> None:
    table = {"big": {"OriginShape": (2, 3), "slices": ["big@@.0", "big@@.1"]}}
    flat = W.reshape(-1)
    file = opened(tmp_path, {"fc.bias": W[0], "big@@.0": flat[:4], "big@@.1": flat[4:], CUT_TABLE: table}, 2)
    _, chosen = file.choose(None)
    assert list(chosen) == ["fc.bias", "big"]
    np.testing.assert_array_equal(array_tensor(file.storage, chosen["big"].array).read(), W)
    for told in ({"OriginShape": (2, 3), "slices": ["none"]}, {"OriginShape": (-2, -3), "slices": ["big@@.0"]}, {}, 3):
        with pytest.raises(BadFile, match="broken"):
            opened(tmp_path, {"big@@.0": flat, CUT_TABLE: {"big": told}}, 2)
    wrong = {"OriginShape": (2, 4), "slices": ["big@@.0"]}
    _, chosen = opened(tmp_path, {"big@@.0": flat, CUT_TABLE: {"big": wrong}}, 2).choose(None)
    with pytest.raises(BadFile, match="do not make the shape"):
        PaddleFile(tmp_path / "x.pdparams").tensor(chosen["big"], "big")


def test_dtypes(tmp_path: Path) -> None:
    """uint16 is bfloat16; what paddle does not have is refused."""
    bits = np.array([0x3F80, 0x4000], np.uint16)
    file = opened(tmp_path, {"w": bits, "u": np.zeros(2, np.uint32), "e": np.array([None])})
    _, chosen = file.choose(None)
    assert file.tensor(chosen["w"], "w").read().tolist() == [1.0, 2.0]
    assert file.tensor(chosen["w"], "w").dtype == ml_dtypes.bfloat16
    with pytest.raises(Refused, match="uint32"):
        file.tensor(chosen["u"], "u")
    with pytest.raises(BadFile, match="no plain numbers"):
        file.tensor(chosen["e"], "e")


def test_what_is_no_file_of_paddle_save(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no array"):
        opened(tmp_path, {"a": 1}).choose(None)
    for nameless, found in (
        (Named("own", W), "one tensor alone"),
        ([Named("own", W)], "a list"),
        ((STATE, {}), "a list"),
    ):
        with pytest.raises(BadFile, match=rf"{found}.*paddle\.save\(layer"):
            opened(tmp_path, nameless).choose(None)
    for name, content, error in (
        ("x.pdiparams", b"\0" * 40, Unsupported),
        ("x.pdmodel", b"\x0a\x05program", Unsupported),
        ("x.pdparams", b"", BadFile),
        ("x.pdparams", b"hello", BadFile),
        ("x.pdparams", pickle.dumps(STATE)[:-30], BadFile),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error):
            PaddleFile(tmp_path / name)


def test_which_pickles_are_paddles_for_certain(tmp_path: Path) -> None:
    for value, certain in (
        ({**STATE, NAME_TABLE: {}}, True),
        ({"model": {"w": Named("linear_0.w_0", W)}}, True),
        (STATE, False),
        ({"a": 1}, False),
    ):
        (tmp_path / "x").write_bytes(pickle.dumps(value, 4))
        assert holds_tables(tmp_path / "x") is certain
    (tmp_path / "x").write_bytes(b"\x80\x04garbage")
    assert not holds_tables(tmp_path / "x")
