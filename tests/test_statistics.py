import numpy as np
import pytest
from dpipe.pipeline.statistics import (
    FrameHistogram,
    _streamed_statistics,
    arange_statistics,
    column_statistics,
    constant_statistics,
    dataset_statistics,
    sampled_frames,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def test_column_statistics_of_numbers_one_can_check():
    got = column_statistics(np.array([[1.0, 10.0], [2.0, 10.0], [3.0, 10.0]]))
    assert got["min"] == [1, 10] and got["max"] == [3, 10] and got["mean"] == [2, 10]
    assert got["std"] == pytest.approx([np.sqrt(2 / 3), 0])
    assert got["q50"] == [2, 10] and got["q10"] == pytest.approx([1.2, 10]) and got["count"] == [3]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 60), st.integers(1, 3)), elements=finite), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_streamed_quantiles_are_exact_order_statistics(values, pieces):
    streamed = _streamed_statistics(lambda: np.array_split(values, pieces))
    wide = values.astype(np.float64)
    assert streamed["min"] == wide.min(axis=0).tolist() and streamed["max"] == wide.max(axis=0).tolist()
    ordered = np.sort(wide, axis=0)
    for name, q in QUANTILES.items():
        place = q * (len(wide) - 1)
        below, above = ordered[int(np.floor(place))], ordered[int(np.ceil(place))]
        expected = below + (place - np.floor(place)) * (above - below)
        np.testing.assert_array_equal(np.array(streamed[name]), expected)


def test_streamed_and_in_memory_agree_on_a_column_of_repeated_values():
    values = np.repeat(np.array([-1.0, 1.0], np.float32), [700, 300])[:, None]
    a = dataset_statistics(lambda: [values[:500], values[500:]])
    b = dataset_statistics(lambda: [values[:500], values[500:]], in_memory_rows=10)
    for name in a:
        assert a[name] == pytest.approx(b[name], abs=1e-12)


def test_arange_and_constant_statistics_equal_the_counted_ones():
    for start, count in ((0, 1), (5, 2), (100, 37)):
        counted = column_statistics(np.arange(start, start + count))
        closed = arange_statistics(start, count)
        for name in counted:
            assert closed[name] == pytest.approx(counted[name]), name
    counted, closed = column_statistics(np.full(4, 7)), constant_statistics(7, 4)
    assert closed == counted


def test_picture_statistics_are_of_levels_over_255_and_count_frames():
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    frames[2:, ..., 0] = 255
    histogram = FrameHistogram()
    histogram.add(frames[:1])
    histogram.add(frames[1:])
    got = histogram.statistics()
    assert got["mean"] == [[[0.5]], [[0.0]], [[0.0]]] and got["count"] == [4]
    assert got["max"][0] == [[1.0]] and got["q10"][0] == [[0.0]] and got["q90"][0] == [[1.0]]
    levels = frames[..., 0].ravel() / 255
    assert got["q50"][0][0][0] == pytest.approx(np.quantile(levels, 0.5))


def test_sampled_frames_follow_lerobots_count_and_reach_both_ends():
    assert sampled_frames(50).tolist() == list(range(50))
    many = sampled_frames(10_000)
    assert len(many) == 1000 and many[0] == 0 and many[-1] == 9999 and (np.diff(many) > 0).all()
