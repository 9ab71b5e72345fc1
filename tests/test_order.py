"""The order of an epoch: a bijection of (seed, epoch, n), asked anywhere, mixed well."""

import time
import tracemalloc

import numpy as np
import pytest
from dpipe.streams.order import BlockShuffle, Permutation, Sequential, Shuffle, mixing
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_visits_each_sample_once_and_its_inverse_returns(n, key):
    permutation = Permutation(n, key)
    samples = permutation(np.arange(n))
    assert np.array_equal(np.sort(samples), np.arange(n))
    assert np.array_equal(permutation.inverse(samples), np.arange(n))


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 400), key=st.integers(0, 2**64 - 1), block=st.integers(1, 60), pool=st.integers(1, 9))
def test_a_block_shuffle_visits_each_sample_once_pool_by_pool(n, key, block, pool):
    order = BlockShuffle(n, key, block, pool)
    positions = np.arange(n)
    samples = order(positions)
    assert np.array_equal(np.sort(samples), positions)
    pools = order.pool_of(positions)
    assert np.all(np.diff(pools) >= 0)
    for number in np.unique(pools):
        held = set(order.blocks_of(int(number)).tolist())
        assert len(held) <= pool
        assert set((samples[pools == number] // block).tolist()) == held


@given(n=st.integers(1, 10**12), position=st.integers(0, 10**12 - 1), key=st.integers(0, 2**64 - 1))
def test_any_position_of_a_huge_order_is_found_at_once(n, position, key):
    permutation = Permutation(n, key)
    sample = permutation(np.array([position % n]))
    assert 0 <= sample[0] < n
    assert permutation.inverse(sample)[0] == position % n


def test_asking_in_pieces_gives_the_whole():
    for order in (Permutation(1000, 3), BlockShuffle(1000, 3, 64, 4), Sequential(1000)):
        whole = order(np.arange(1000))
        pieces = [order(np.arange(start, min(start + 37, 1000))) for start in range(0, 1000, 37)]
        assert np.array_equal(np.concatenate(pieces), whole)


def test_the_order_depends_on_seed_epoch_and_n_and_on_nothing_else():
    positions = np.arange(500)
    shuffle = Shuffle()
    first = shuffle.of_epoch(7, 0, 500)(positions)
    assert np.array_equal(first, shuffle.of_epoch(7, 0, 500)(positions))
    for seed, epoch in ((8, 0), (7, 1), (0, 7)):
        assert np.mean(shuffle.of_epoch(seed, epoch, 500)(positions) == first) < 0.02
    # Pinned: a changed order would silently change every resumed run.
    assert shuffle.of_epoch(0, 0, 10)(np.arange(10)).tolist() == PINNED


PINNED = [7, 4, 5, 3, 8, 2, 9, 0, 6, 1]


def test_positions_outside_the_epoch_are_refused():
    for order in (Permutation(10, 0), BlockShuffle(10, 0, 3, 2), Sequential(10)):
        for position in (10, -1):
            with pytest.raises(IndexError):
                order(np.array([position]))


def test_first_samples_are_spread_evenly_over_seeds():
    """Chi-square of which of 8 samples comes first and last, over 4,000 seeds: 7 degrees of freedom."""
    orders = np.array([Permutation(8, seed)(np.arange(8)) for seed in range(4000)])
    for place in (0, 3, 7):
        counts = np.bincount(orders[:, place], minlength=8)
        chi2 = ((counts - 500) ** 2 / 500).sum()
        assert chi2 < 24.3  # p = 0.001


def test_neighbours_in_the_order_are_strangers_in_the_dataset():
    n = 100_000
    samples = Permutation(n, 11)(np.arange(n))
    gaps = np.abs(np.diff(samples))
    assert abs(gaps.mean() / (n / 3) - 1) < 0.01
    assert abs(np.corrcoef(np.arange(n), samples)[0, 1]) < 0.01
    assert abs(np.corrcoef(samples[1:], samples[:-1])[0, 1]) < 0.01


def test_an_order_of_a_billion_samples_needs_no_memory_and_no_time():
    tracemalloc.start()
    begin = time.perf_counter()
    order = Shuffle().of_epoch(0, 0, 10**9)
    order(np.arange(999_990_000, 999_990_256))
    spent = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert spent < 0.2
    assert peak < 1_000_000


def test_mixing_tells_a_block_shuffle_from_a_global_one():
    n = 100_000

    def episodes(samples):
        return samples // 100

    assert mixing(Permutation(n, 1), episodes, 64) == pytest.approx(1, abs=0.03)
    one_run = mixing(BlockShuffle(n, 1, 512, 1), episodes, 64)
    many_runs = mixing(BlockShuffle(n, 1, 512, 64), episodes, 64)
    assert one_run < 0.15
    assert many_runs > 0.85
    assert mixing(Sequential(n), episodes, 64) < 0.05
