"""Exact statistics: every row counts, and memory does not."""

import numpy as np
import pytest
from dpipe.schemas.errors import DataError
from dpipe.schemas.statistics import QUANTILES, exact_statistics, fit_statistics
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_counting_finds_the_quantiles_that_sorting_finds(seed, cuts, dtype, scale):
    rng = np.random.default_rng(seed)
    blocks = [(rng.normal(size=(n, 2)) * scale).astype(dtype) for n in cuts]
    blocks[0][0] = 0.0
    blocks[-1][-1] = -0.0
    rows = np.concatenate(blocks).astype(np.float64)
    counted, count = exact_statistics(lambda: blocks, in_memory_bytes=1)
    in_memory, _ = exact_statistics(lambda: blocks)
    assert count == len(rows)
    for name, q in QUANTILES.items():
        expected = np.quantile(rows, q, axis=0)
        np.testing.assert_array_equal(in_memory[name], expected)
        np.testing.assert_allclose(counted[name], expected, rtol=1e-15)
    for name, expected in (("min", rows.min(0)), ("max", rows.max(0))):
        np.testing.assert_array_equal(counted[name], expected)
    np.testing.assert_allclose(counted["mean"], rows.mean(0), rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(counted["std"], rows.std(0), rtol=1e-9)
    np.testing.assert_array_equal(counted["levels"], in_memory["levels"])


def test_rows_that_are_not_finite_are_left_out_either_way():
    rows = np.array([[1.0, 1.0], [np.nan, 50.0], [3.0, 1.0]])
    for limit in (1, 2**30):
        stats, count = exact_statistics(lambda: [rows], in_memory_bytes=limit)
        assert count == 2
        assert stats["max"].tolist() == [3.0, 1.0] and stats["levels"].tolist() == [2, 1]
        assert stats["std"].tolist() == [1.0, 0.0]
    with pytest.raises(DataError, match="without one finite row"):
        fit_statistics(np.full((2, 1), np.inf))


def test_memory_is_histograms_not_rows():
    import tracemalloc

    def blocks():
        for i in range(12):
            yield np.random.default_rng(i).normal(size=(100_000, 1)).astype(np.float32)

    tracemalloc.start()
    stats, count = exact_statistics(blocks, in_memory_bytes=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1_200_000 and peak < 16e6  # sorted as float64 the rows alone take 20 MB
    assert stats["q99"][0] == pytest.approx(2.326, abs=0.01)
