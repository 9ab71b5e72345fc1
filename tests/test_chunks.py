"""Chunks, futures and windows: which rows, what is padding, what padding holds."""

import numpy as np
import pytest
from dpipe.schemas.chunks import (
    ABSOLUTE,
    DELTA,
    GRIPPER,
    absolute_from_start,
    chunk_index,
    dimension_kinds,
    future_index,
    gather_chunk,
    masked_mean,
    relative_to_start,
    window_index,
)
from hypothesis import given
from hypothesis import strategies as st


def test_last_frames_repeat_and_are_marked():
    index, is_pad = chunk_index(frames=4, horizon=3)
    assert index.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 3], [3, 3, 3]]
    assert is_pad.tolist() == [[False] * 3, [False] * 3, [False, False, True], [False, True, True]]
    assert index.dtype == np.int64 and is_pad.dtype == bool


def test_a_chunk_may_begin_later_than_its_frame():
    index, is_pad = chunk_index(frames=4, horizon=2, start=2)
    assert index.tolist() == [[2, 3], [3, 3], [3, 3], [3, 3]]
    assert is_pad.tolist() == [[False, False], [False, True], [True, True], [True, True]]


def test_future_is_clamped_to_the_last_frame_and_marked():
    index, is_pad = future_index(frames=5, offset=2)
    assert index.tolist() == [2, 3, 4, 4, 4]
    assert is_pad.tolist() == [False, False, False, True, True]
    index, is_pad = future_index(frames=3, offset=-1)
    assert index.tolist() == [0, 0, 1] and is_pad.tolist() == [True, False, False]


def test_windows_end_at_their_frame_and_repeat_the_first():
    index, is_pad = window_index(frames=3, window=3)
    assert index.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert is_pad.tolist() == [[True, True, False], [True, False, False], [False, False, False]]
    assert window_index(frames=5, window=2, stride=3)[0].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 4]]


def test_padding_holds_still_whatever_the_action_means():
    action = np.array([[1.0, 10.0, -1.0], [2.0, 20.0, 1.0]])
    chunks, is_pad = gather_chunk(action, horizon=3, kinds=(ABSOLUTE, DELTA, GRIPPER))
    assert is_pad[1].tolist() == [False, True, True]
    assert chunks[1].tolist() == [[2, 20, 1], [2, 0, 1], [2, 0, 1]]


def test_gripper_dimensions_are_known_by_name():
    assert dimension_kinds(("x", "gripper", "left_gripper_width"), delta=True) == (DELTA, GRIPPER, GRIPPER)
    assert dimension_kinds(("x", "gripper"), delta=False) == (ABSOLUTE, GRIPPER)


def test_offsets_from_a_start_return_to_absolute_and_spare_the_gripper():
    chunks = np.array([[[1.0, 1.0], [3.0, -1.0]]])
    offsets = relative_to_start(chunks, np.array([[1.0, 5.0]]), (ABSOLUTE, GRIPPER))
    assert offsets.tolist() == [[[0, 1], [2, -1]]]
    assert (
        absolute_from_start(offsets, np.array([[1.0, 5.0]]), (ABSOLUTE, GRIPPER)).tolist() == chunks.tolist()
    )
    with pytest.raises(ValueError, match="deltas already"):
        relative_to_start(chunks, chunks[:, 0], (DELTA, GRIPPER))


@given(frames=st.integers(1, 40), horizon=st.integers(1, 12), start=st.integers(0, 5))
def test_chunks_equal_the_slow_loop(frames: int, horizon: int, start: int):
    index, is_pad = chunk_index(frames, horizon, start)
    for t in range(frames):
        for h in range(horizon):
            assert index[t, h] == min(t + start + h, frames - 1)
            assert is_pad[t, h] == (t + start + h >= frames)


def test_masked_mean_counts_valid_steps_only_and_survives_none():
    loss = np.array([[1.0, 3.0], [5.0, 100.0]])
    assert masked_mean(loss, np.array([[1, 1], [1, 0]])) == 3.0
    assert masked_mean(loss, np.zeros((2, 2))) == 0.0
    # DIAL's human sample: 18 of 47 dimensions over 16 steps make a denominator of 288.
    dims = np.arange(47) < 18
    assert masked_mean(np.ones((16, 47)), dims) == 1.0
    assert np.broadcast_to(dims, (16, 47)).sum() == 288
