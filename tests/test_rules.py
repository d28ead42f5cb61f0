"""Changes of values: exact where they say so, and what torch computes where torch does."""

from __future__ import annotations

import copy
import warnings
from itertools import product

import ml_dtypes
import numpy as np
import pytest

from neutral import rules
from neutral.native import from_array

NEGATIVE_ZERO = np.array(-0.0, np.float32)
FLOATS = ("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("axis", [0, 1])
def test_one_bias_becomes_two_and_one_again(name: str, axis: int) -> None:
    bias = np.array([[1.5, -0.0, 3.0, -2.0]] * 3, np.float32).astype(dtype(name))
    both = rules.add_zero_bias(from_array(bias), axis)
    read = both.read()
    assert both.dtype == bias.dtype and np.array_equal(read.take(0, axis), bias) and not read.take(1, axis).any()
    merged = rules.merge_biases(both, axis)
    assert merged.exact and merged.tensor.read().tobytes() == bias.tobytes(), "-0.0 included"


def test_a_zero_side_of_any_sign_is_no_loss() -> None:
    """x + (-0.0) is x to the bit; x + 0.0 would turn -0.0 into 0.0, so nothing is added."""
    first = np.array([-0.0, 0.0, 1e-45, -3.0], np.float32)
    for zero in (np.float32(0.0), NEGATIVE_ZERO):
        merged = rules.merge_biases(from_array(np.stack([first, np.full(4, zero)])), 0)
        assert merged.exact and merged.tensor.read().tobytes() == first.tobytes()


@pytest.mark.parametrize("name", FLOATS)
def test_two_biases_are_added_in_their_own_dtype(name: str) -> None:
    both = np.array([[1.0, 2.0, -4.0], [0.5, 0.0, 4.0]], np.float32).astype(dtype(name))
    merged = rules.merge_biases(from_array(both), 0)
    assert not merged.exact and merged.tensor.dtype == both.dtype
    assert merged.tensor.read().astype(float).tolist() == [1.5, 2.0, 0.0]
    odd = both.copy()
    odd[1] = np.float32(np.nan)
    assert not rules.merge_biases(from_array(odd), 0).exact


def test_every_neutral_value_is_one_that_changes_nothing() -> None:
    values = {"bias": 0.0, "query_bias": 0.0, "scale": 1.0, "mean": 0.0, "variance": 1.0}
    assert {role: rules.default_value(role) for role in values} == values
    for role in ("kernel", "recurrent_kernel", "slope", "embedding", "extra_key", "kernel_direction", "projection", ""):
        assert rules.default_value(role) is None


def test_filled_and_is_all() -> None:
    tensor = rules.filled(1.0, (3, 5), dtype("bfloat16"))
    assert tensor.shape == (3, 5) and tensor.dtype == dtype("bfloat16") and rules.is_all(tensor, 1.0)
    changed = tensor.read().copy()
    changed[2, 4] = 1.0078125
    assert not rules.is_all(from_array(changed), 1.0)
    assert not rules.is_all(from_array(np.array([0.0, np.nan])), 0.0)
    assert rules.is_all(from_array(np.array([0.0, -0.0])), 0.0)
    assert rules.is_all(from_array(np.zeros(0)), 5.0)


SMALL = ("bool", "int8", "uint8", "int16", "uint16", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")
LARGE = ("int32", "int64", "uint64", "float32", "float64", "complex64", "complex128")


def every_value(name: str) -> np.ndarray:
    if name == "bool":
        return np.array([False, True])
    if name == "int4":
        return np.arange(-8, 8).astype(ml_dtypes.int4)
    kind = dtype(name)
    return np.arange(1 << (8 * kind.itemsize), dtype=f"u{kind.itemsize}").view(kind)


@pytest.mark.parametrize(("source", "target"), [*product(SMALL, SMALL + LARGE)])
def test_widening_is_exact_for_every_value(source: str, target: str) -> None:
    """All values of the small dtypes, there and back. What is exact may be refused only for unusual targets."""
    values = every_value(source)
    wide = np.complex128 if dtype(target).kind == "c" else np.float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = values.astype(dtype(target)).astype(wide)
        exact = np.array_equal(there, values.astype(wide), equal_nan=True)
    found = rules.widens(dtype(source), dtype(target))
    assert found <= exact
    if target in ("float16", "bfloat16", *LARGE) and dtype(target).kind in "fcV":
        assert found == exact


def test_large_dtypes() -> None:
    yes = {
        *(("int32", t) for t in ("int64", "float64", "complex128")),
        *(("float32", t) for t in ("float64", "complex64", "complex128")),
        ("float64", "complex128"),
        ("complex64", "complex128"),
        *((name, name) for name in LARGE),
    }
    assert {pair for pair in product(LARGE, LARGE) if rules.widens(*map(np.dtype, pair))} == yes
    assert not any(rules.widens(np.dtype(a), dtype(b)) for a, b in product(LARGE, SMALL))


def test_weight_norm_is_that_of_torch() -> None:
    import torch
    from torch.nn.utils import parametrizations

    torch.manual_seed(0)
    for module, dims in (
        (torch.nn.Linear(5, 4), (0, 1, None)),
        (torch.nn.Conv2d(3, 4, 2), (0, 1, 2, None)),
        (torch.nn.ConvTranspose1d(3, 1, 2), (0, 1)),
    ):
        for dim in dims:
            plain = module.weight.detach()
            normed = parametrizations.weight_norm(copy.deepcopy(module), dim=dim)
            with torch.no_grad():
                normed.parametrizations.weight.original0.mul_(1.7)
            g = normed.parametrizations.weight.original0.detach().numpy()
            v = normed.parametrizations.weight.original1.detach().numpy()
            kernel = rules.weight_norm_kernel(from_array(g), from_array(v)).read()
            assert np.allclose(kernel, normed.weight.detach().numpy(), rtol=1e-6, atol=1e-7)
            magnitude = rules.weight_norm_magnitude(from_array(plain.numpy()), g.shape).read()
            assert magnitude.shape == g.shape and np.allclose(magnitude * 1.7, g, rtol=1e-6)


def test_spectral_norm_is_that_of_torch() -> None:
    import torch
    from torch.nn.utils import parametrizations

    torch.manual_seed(0)
    for module, axis in (
        (torch.nn.Linear(5, 4), 0),
        (torch.nn.Linear(4, 4), 0),
        (torch.nn.Conv2d(3, 4, 2), 0),
        (torch.nn.ConvTranspose1d(3, 3, 2), 1),
        (torch.nn.ConvTranspose2d(3, 4, 2), 1),
    ):
        normed = parametrizations.spectral_norm(module).eval()
        held = normed.parametrizations.weight
        raw, u, v = (t.detach().numpy() for t in (held.original, held[0]._u, held[0]._v))
        found = rules.spectral_norm_kernel(*map(from_array, (raw, u, v)), axis).read()
        assert np.allclose(found, normed.weight.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_the_list_of_rules_is_closed() -> None:
    assert {name for name, rule in rules.RULES.items() if rule.exact} == {
        "one_bias",
        "new_bias",
        "input_bias",
        "default",
        "drop_default",
        "broadcast",
        "widen",
    }
    assert {name for name, rule in rules.RULES.items() if not rule.exact} == {
        "merge_biases",
        "effective_kernel",
        "magnitude",
        "narrow",
    }


@pytest.mark.parametrize("axis", [0, 1])
def test_a_gru_bias_without_what_is_only_added(axis: int) -> None:
    """Linen keeps four biases, NNX three; what is added to another is added, to the bit where it is zero."""
    lead = (2,) * axis
    four = np.arange(1.0, 1 + 4 * 3 * 2**axis).reshape(*lead, 4, 3)
    sides = rules.two_sides("new_bias", from_array(four), axis)
    assert sides.shape == (*lead, 2, 3, 3) == (*lead, *sides.shape[axis:])
    assert rules.stored_shape("new_bias", sides.shape, axis) == four.shape
    back = rules.as_stored("new_bias", sides, axis)
    assert back.exact and not back.lost and np.array_equal(back.tensor.read(), four)
    three = rules.as_stored("input_bias", sides, axis)
    assert "new gate" in three.lost

    both = np.random.default_rng(1).normal(size=(*lead, 2, 3, 3))
    added = rules.as_stored("new_bias", from_array(both), axis)
    first, second = np.moveaxis(both, axis, 0)
    gates = np.moveaxis(first, axis, 0), np.moveaxis(second, axis, 0)
    expected = [gates[0][0] + gates[1][0], gates[0][1] + gates[1][1], gates[0][2], gates[1][2]]
    assert not added.exact and np.array_equal(added.tensor.read(), np.stack(expected, axis))

    gates[1][2][...] = 0
    fused = rules.as_stored("input_bias", from_array(both), axis)
    assert not fused.lost and np.array_equal(fused.tensor.read(), np.stack(expected[:3], axis))
    assert rules.stored_shape("input_bias", both.shape, axis) == fused.tensor.shape
    assert not rules.two_sides("input_bias", fused.tensor, axis).take(axis, (1,)).read().any()
