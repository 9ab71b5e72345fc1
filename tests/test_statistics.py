import numpy as np
import pytest
from dpipe.pipeline.statistics import (
    SAMPLED_SIDE,
    FrameHistogram,
    arange_statistics,
    column_statistics,
    constant_statistics,
    dataset_statistics,
    sampled_frames,
)


def test_column_statistics_of_numbers_one_can_check():
    got = column_statistics(np.array([[1.0, 10.0], [2.0, 10.0], [3.0, 10.0]]))
    assert got["min"] == [1, 10] and got["max"] == [3, 10] and got["mean"] == [2, 10]
    assert got["std"] == pytest.approx([np.sqrt(2 / 3), 0])
    assert got["q50"] == [2, 10] and got["q10"] == pytest.approx([1.2, 10]) and got["count"] == [3]


def test_dataset_statistics_of_pieces_equal_those_of_the_whole():
    values = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    pieces, whole = dataset_statistics(lambda: np.array_split(values, 7)), column_statistics(values)
    for name in whole:
        assert pieces[name] == pytest.approx(whole[name], rel=1e-12), name


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


@pytest.mark.parametrize("size", [(8, 8), (31, 200), (128, 128), (129, 161), (33, 33), (48, 47), (97, 480)])
def test_every_nth_pixel_of_the_wanted_frames_is_counted_once(size: tuple[int, int]):
    frames = np.random.default_rng(0).integers(0, 256, (5, *size, 3), np.uint8)
    step = max(1, round(min(size) / SAMPLED_SIDE))
    for wanted in (slice(None), np.array([0, 2, 4]), np.zeros(0, int)):
        histogram = FrameHistogram()
        histogram.add(frames, wanted)
        histogram.add(frames, wanted)
        thin = frames[wanted][:, ::step, ::step]
        expected = [2 * np.bincount(thin[..., colour].ravel(), minlength=256) for colour in range(3)]
        assert np.array_equal(histogram.counts, expected) and histogram.frames == 2 * len(thin)


def test_sampled_frames_follow_lerobots_count_and_reach_both_ends():
    assert sampled_frames(50).tolist() == list(range(50))
    many = sampled_frames(10_000)
    assert len(many) == 1000 and many[0] == 0 and many[-1] == 9999 and (np.diff(many) > 0).all()
