"""Noise from seeds: known bits, the distribution it claims, and independence of order and place."""

import numpy as np
import pytest
from dpipe.schemas.noise import (
    flow_noise,
    frame_seeds,
    noised,
    normal,
    random_bits,
    shifted_sigma,
    stratified,
    uniform,
)


def test_the_bits_are_splitmix64s():
    # The reference implementation's first three outputs from seed 1234567.
    found = random_bits(np.array(1234567, dtype=np.uint64), 3)
    assert found.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_normals_are_standard_normal_and_float32():
    values = normal(np.arange(500, dtype=np.uint64), 401)
    assert values.shape == (500, 401) and values.dtype == np.float32
    wide = values.astype(np.float64)
    assert abs(wide.mean()) < 0.01 and wide.std() == pytest.approx(1, abs=0.01)
    assert ((wide**4).mean()) == pytest.approx(3, abs=0.1)
    assert abs(np.corrcoef(wide[:, 0], wide[:, 201])[0, 1]) < 0.15  # both halves of one pair
    known = normal(np.array(7, dtype=np.uint64), 4)
    np.testing.assert_array_equal(known, normal(np.array([7], dtype=np.uint64), 4)[0])


def test_uniforms_never_reach_one():
    values = uniform(np.arange(1000, dtype=np.uint64), 50)
    assert values.min() >= 0 and values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.01)


def test_seeds_belong_to_the_episode_and_not_to_its_place():
    seeds = frame_seeds("ab" * 16, np.arange(100), draw=0, seed=0)
    assert len(set(seeds.tolist())) == 100 and int(seeds.max()) < 2**63
    np.testing.assert_array_equal(frame_seeds("ab" * 16, np.arange(50, 100), 0, 0), seeds[50:])
    for content, draw, seed in (("cd" * 16, 0, 0), ("ab" * 16, 1, 0), ("ab" * 16, 0, 1)):
        assert (frame_seeds(content, np.arange(100), draw, seed) != seeds).all()


def test_each_stratum_holds_one_time_in_an_order_that_varies():
    times = stratified(np.arange(2000, dtype=np.uint64), 8)
    assert np.sort((times * 8).astype(int), axis=1).tolist() == [list(range(8))] * 2000
    assert len({tuple(row) for row in (times * 8).astype(int).tolist()}) > 1500
    assert times.mean() == pytest.approx(0.5, abs=0.005)


def test_pfds_noise_levels_and_what_lies_at_both_ends():
    assert shifted_sigma(np.array([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 2.5 / 3, 1])
    action = np.full((3, 2, 1), 4.0)
    noise = flow_noise(np.arange(3, dtype=np.uint64), 2, 1)
    x = noised(action, noise, np.array([0.0, 0.25, 1.0]))
    np.testing.assert_array_equal(x[0], action[0])
    np.testing.assert_allclose(x[1], 0.75 * action[1] + 0.25 * noise[1], rtol=1e-6)
    np.testing.assert_array_equal(x[2], noise[2])
    # the velocity eps - a leads from x back to the action: x - sigma v = a
    np.testing.assert_allclose(x[1] - 0.25 * (noise[1] - action[1]), action[1], atol=1e-6)
