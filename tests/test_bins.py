"""Coarse-bin tokens against the numbers of Libra-VLA's definition."""

import numpy as np
import pytest
from dpipe.schemas.bins import (
    BIN_GRID,
    centre,
    centre_openvla,
    encode,
    encode_openvla,
    invalid_token,
    residual,
    token_dtype,
)
from hypothesis import given
from hypothesis import strategies as st

ACTIONS = np.array([0.37, -0.37, 0.999, -1, 0, 1, 1.7, -1.5])


def test_ten_bins_of_known_actions():
    tokens = encode(ACTIONS, 10)
    assert tokens.tolist() == [6, 3, 9, 0, 5, 9, 9, 0]
    np.testing.assert_allclose(centre(tokens, 10), [0.3, -0.3, 0.9, -0.9, 0.1, 0.9, 0.9, -0.9], atol=1e-12)
    assert tokens.dtype == np.uint8


def test_a_gripper_takes_the_outer_bins():
    assert encode(np.array([1.0, -1.0]), 2).tolist() == [1, 0]
    tokens = encode(np.array([1.0, -1.0]), 10)
    assert tokens.tolist() == [9, 0]
    np.testing.assert_allclose(residual(np.array([1.0, -1.0]), tokens, 10), [0.1, -0.1], atol=1e-12)


@pytest.mark.parametrize("bins", [2, 10, 50, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_centre_encodes_to_its_own_bin(bins: int, dtype: type):
    k = np.arange(bins)
    assert encode(centre(k, bins).astype(dtype), bins).tolist() == k.tolist()


def test_bin_edges_are_those_of_float64_for_stored_float32():
    # -0.8f is a little above -0.8: exact arithmetic on the stored value says bin 1, as float64 does.
    stored = np.array([-0.8, -0.6, 0.2], dtype=np.float32)
    assert encode(stored, 10).tolist() == encode(stored.astype(np.float64), 10).tolist()
    assert encode(np.array([-1.0, 0.0, 1.0]), 10).tolist() == [0, 5, 9]


def test_edges_are_no_place_to_test_from_and_float32_would_move_them():
    def plain(a, bins):
        return np.clip(np.floor((a + 1) / 2 * bins), 0, bins - 1).astype(int)

    edges = np.array([-0.8, -0.6])  # exact arithmetic says bins 1 and 2
    assert encode(edges, 10).tolist() == [0, 2] == plain(edges, 10).tolist()
    assert plain(edges.astype(np.float32), np.float32(10)).tolist() == [0, 1]
    every = -1 + 2 * np.arange(1, 100) / 100
    assert encode(every, 100).tolist() == plain(every, 100).tolist()
    moved = plain(every, 100) != plain(every.astype(np.float32), np.float32(100))
    assert 10 < np.count_nonzero(moved) < 25  # about one in six of the edges of 100 bins


@pytest.mark.parametrize(("bins", "expected"), [(2, 8.33e-2), (10, 3.33e-3), (50, 1.33e-4), (100, 3.33e-5)])
def test_uniform_actions_leave_the_residual_variance_of_one_bin(bins: int, expected: float):
    a = np.linspace(-1, 1, 200_001)
    assert np.mean(residual(a, encode(a, bins), bins) ** 2) == pytest.approx(expected, rel=5e-3)
    counts = np.bincount(encode(a, bins), minlength=bins)
    entropy = -np.sum(counts / len(a) * np.log2(counts / len(a)))
    assert entropy == pytest.approx(np.log2(bins), abs=1e-3)


@given(st.floats(-1, 1), st.sampled_from(BIN_GRID))
def test_centre_plus_residual_is_the_action_and_the_residual_fits_its_bin(action: float, bins: int):
    a = np.array([action])
    tokens = encode(a, bins)
    rest = residual(a, tokens, bins)
    assert abs(rest[0]) <= 1 / bins + 1e-9
    assert centre(tokens, bins)[0] + rest[0] == pytest.approx(action, abs=1e-12)


def test_values_that_are_no_numbers_get_the_reserved_token():
    a = np.array([np.nan, np.inf, 0.0])
    assert encode(a, 10).tolist() == [255, 255, 5]
    assert encode(a, 300).tolist() == [65535, 65535, 150]
    assert np.isnan(residual(a, encode(a, 10), 10)).tolist() == [True, True, False]


def test_tokens_take_one_byte_while_a_value_is_left_for_invalid():
    assert token_dtype(254) == np.uint8 and token_dtype(255) == np.uint16
    assert invalid_token(254) == 255 and invalid_token(256) == 65535
    with pytest.raises(ValueError):
        token_dtype(1)


def test_openvla_bins_are_another_code():
    tokens = encode_openvla(np.array([0.0, 0.37, 1.0, -1.0]))
    assert tokens.tolist() == [127, 174, 254, 0]
    np.testing.assert_allclose(centre_openvla(tokens), [0.0, 0.36863, 0.99608, -0.99608], atol=1e-5)
    assert encode(np.array([0.37]), 256).tolist() != [174]
