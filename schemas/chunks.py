"""Which frames a sample looks at: future chunks, one future frame, past windows, and what padding holds.

Shapes  T frames of one episode, H steps of a chunk, S steps of a window, D dimensions. Indices are local to
the episode. `is_pad` is True where a value is repeated padding (the polarity of LeRobot's `*_is_pad`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

ABSOLUTE = "absolute"
DELTA = "delta"
GRIPPER = "gripper"


def chunk_index(frames: int, horizon: int, start: int = 0) -> tuple[Index, Mask]:
    """Rows of the chunk that begins `start` frames after each frame: index [T, H], is_pad [T, H].

    Step h of frame t is row min(t + start + h, T - 1); it is padding when t + start + h >= T.
    """
    if horizon < 1:
        raise ValueError(f"a chunk has at least one step, not {horizon}")
    wanted = np.arange(frames, dtype=np.int64)[:, None] + (start + np.arange(horizon, dtype=np.int64))
    return np.minimum(wanted, frames - 1), wanted >= frames


def future_index(frames: int, offset: int) -> tuple[Index, Mask]:
    """Row of the frame `offset` ahead of each frame: index [T], is_pad [T]; a negative offset looks back."""
    wanted = np.arange(frames, dtype=np.int64) + offset
    return np.clip(wanted, 0, frames - 1), (wanted < 0) | (wanted >= frames)


def window_index(frames: int, window: int, stride: int = 1) -> tuple[Index, Mask]:
    """Rows of the `window` frames that end at each frame, oldest first: index [T, S], is_pad [T, S].

    Before the episode's start the first frame is repeated. `stride` frames lie between two window steps.
    """
    if window < 1 or stride < 1:
        raise ValueError(f"a window has at least one step and one frame between steps: {window}, {stride}")
    past = np.arange(window - 1, -1, -1, dtype=np.int64) * stride
    wanted = np.arange(frames, dtype=np.int64)[:, None] - past
    return np.maximum(wanted, 0), wanted < 0


def dimension_kinds(names: Sequence[str], delta: bool) -> tuple[str, ...]:
    """How each action dimension is padded: `gripper` by its name, else `delta` or `absolute`."""
    rest = DELTA if delta else ABSOLUTE
    return tuple(GRIPPER if "gripper" in name else rest for name in names)


def gather_chunk(
    values: NDArray[np.generic], horizon: int, start: int = 0, kinds: Sequence[str] | None = None
) -> tuple[NDArray[np.generic], Mask]:
    """[T, D] values -> [T, H, D] chunks and their is_pad [T, H].

    Padding repeats the last row; with `kinds` (one per dimension) the dimensions that are `delta` hold 0
    there instead, because the arm that has stopped does not go on moving. The rule is that of Seer's CALVIN
    loader and of GR00T's.
    """
    index, is_pad = chunk_index(len(values), horizon, start)
    chunks = values[index]
    return (chunks if kinds is None else pad_actions(chunks, is_pad, kinds)), is_pad


def pad_actions(chunks: NDArray[np.generic], is_pad: Mask, kinds: Sequence[str]) -> NDArray[np.generic]:
    """[..., H, D] chunks whose padding repeats the last row -> a copy with `delta` dimensions 0 there."""
    unknown = set(kinds) - {ABSOLUTE, DELTA, GRIPPER}
    if unknown or len(kinds) != chunks.shape[-1]:
        raise ValueError(f"{len(kinds)} kinds {sorted(set(kinds))} for {chunks.shape[-1]} dimensions")
    zeroed = is_pad[..., None] & np.array([kind == DELTA for kind in kinds])
    return np.where(zeroed, np.zeros((), chunks.dtype), chunks)


def relative_to_start(
    chunks: NDArray[np.floating], reference: NDArray[np.floating], kinds: Sequence[str]
) -> NDArray[np.floating]:
    """[..., H, D] absolute chunks -> offsets from `reference` [..., D] at each chunk's start.

    Gripper dimensions stay as they are; `delta` dimensions are refused, being relative to something else.
    """
    if DELTA in kinds:
        raise ValueError("these actions are deltas already; only absolute ones have an offset from a start")
    moved = np.array([kind == ABSOLUTE for kind in kinds])
    return np.where(moved, chunks - reference[..., None, :], chunks)


def absolute_from_start(
    chunks: NDArray[np.floating], reference: NDArray[np.floating], kinds: Sequence[str]
) -> NDArray[np.floating]:
    """Inverse of `relative_to_start`: [..., H, D] offsets and [..., D] reference -> absolute chunks."""
    moved = np.array([kind == ABSOLUTE for kind in kinds])
    return np.where(moved, chunks + reference[..., None, :], chunks)


def masked_mean(loss: NDArray[np.floating], valid: NDArray[np.generic]) -> float:
    """sum(loss * valid) / max(1, sum(valid)); `valid` broadcasts to the shape of `loss` first."""
    weight = np.broadcast_to(valid, loss.shape).astype(np.float64)
    return float((loss * weight).sum() / max(1.0, weight.sum()))
