"""Windows of frames for models that look back: which frames, and the frames themselves, decoded once each.

    last   one window per frame t, its last S frames. Early on the history is short: frames 0 .. t from the left,
           the rest repeats t, and the answer is read at step t. A causal model does not see the repeats.
    full   windows of S frames that start every k-th frame, all of whose steps are answers. An episode shorter
           than S is one window, its last frame repeated.

Source for the layouts: Seer (right-padding by the last frame; read at the newest step), VITA Eq 3.
Shapes: T frames, W windows, S steps, Q queries; frame ids are local to the episode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import FrameWish

if TYPE_CHECKING:
    from . import EpisodeView

Index = NDArray[np.int64]


def last_windows(frames: int, steps: int) -> tuple[Index, Index]:
    """Frame ids [T, S] and the step [T] whose answer counts."""
    t = np.arange(frames, dtype=np.int64)[:, None]
    s = np.arange(steps, dtype=np.int64)
    return np.minimum(np.maximum(t - (steps - 1), 0) + s, t), np.minimum(t[:, 0], steps - 1)


def full_windows(frames: int, steps: int, stride: int) -> tuple[Index, Index]:
    """Frame ids [W, S], clamped to the last frame, and the start [W] of each window."""
    starts = np.arange(0, max(1, frames - steps + 1), stride, dtype=np.int64)
    return np.minimum(starts[:, None] + np.arange(steps), frames - 1), starts


def label_mask(start: Index, frames: int, steps: int, queries: int) -> NDArray[np.bool_]:
    """[W, S, Q]: whether query j of step s speaks of a frame that exists, start + s + j < T."""
    ahead = np.arange(steps)[:, None] + np.arange(queries)
    return start[:, None, None] + ahead < frames


def window_batches(
    episode: EpisodeView,
    cameras: Sequence[str],
    index: Index,
    block: int,
    names: Mapping[str, str] | None = None,
    sizes: Mapping[str, tuple[int, int] | None] | None = None,
) -> Iterator[tuple[slice, dict[str, NDArray[np.uint8]]]]:
    """Windows in order, `block` at a time: which ones, and their frames uint8 [B, S, H, W, 3] per camera.

    `index` [W, S] must not go back (neither first nor last frames of windows do). Every frame wanted is decoded once
    and kept only while a window still wants it. `names` renames cameras for the model, `sizes` are what each
    camera's frames are decoded to (`read_sizes`).
    """
    rows, places = np.unique(index, return_inverse=True)
    places = places.reshape(index.shape)
    first, last = places.min(axis=1), places.max(axis=1)
    sources = [episode.images(camera, rows, block, (sizes or {}).get(camera)) for camera in cameras]
    held: dict[str, NDArray[np.uint8]] = {}
    kept_from = done = 0
    for blocks in zip(*sources, strict=True):
        for camera, frames in zip(cameras, blocks, strict=True):
            held[camera] = np.concatenate([held[camera], frames]) if camera in held else frames
        seen = kept_from + len(held[cameras[0]])
        ready = int(np.searchsorted(last, seen, side="left"))
        while done < ready:
            chosen = slice(done, min(done + block, ready))
            yield (
                chosen,
                {(names or {}).get(c, c): frames[places[chosen] - kept_from] for c, frames in held.items()},
            )
            done = chosen.stop
        wanted_from = int(first[done]) if done < len(first) else seen
        held = {camera: frames[wanted_from - kept_from :] for camera, frames in held.items()}
        kept_from = wanted_from


def read_sizes(
    wanted: tuple[int, int] | None, cameras: Mapping[str, tuple[int, int]], names: Iterable[str]
) -> dict[str, tuple[int, int] | None]:
    """What each camera's frames are decoded to for a model that works at `wanted`: never larger than stored."""
    sizes: dict[str, tuple[int, int] | None] = dict.fromkeys(names)
    if wanted is not None:
        for name in sizes:
            stored = cameras[name]
            sizes[name] = wanted if stored != wanted and min(np.subtract(stored, wanted)) >= 0 else None
    return sizes


def frame_wishes(sizes: Mapping[str, Sequence[int] | None], block: int) -> tuple[FrameWish, ...]:
    """Every frame of these cameras, decoded to these sizes (from `read_sizes`, JSON or not)."""
    return tuple(
        FrameWish(camera, 1, block, None if size is None else (size[0], size[1]))
        for camera, size in sizes.items()
    )


def renamed(cameras: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """`THEIRS=OURS` words -> the dataset's name of each of a model's cameras -> the model's name."""
    given = dict(word.split("=", 1) for word in words)
    return {given.get(name, name): name for name in cameras}


def finite_state(state: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """[T, D] -> the same as float32 with 0 where it is no number, and which frames [T] are sound."""
    sound = np.isfinite(state).all(axis=1).astype(bool)
    return np.where(sound[:, None], state, 0.0).astype(np.float32), sound
