"""Exact statistics of columns and pictures, in the form of LeRobot's `stats.json`.

LeRobot 0.6.1 estimates quantiles from per-episode histograms and merges them by count (its later versions by
envelope); both are wrong for the dataset as a whole. Ours are exact order statistics with linear interpolation,
as numpy.quantile defines them, found by counting 16-bit halves of the sorted bit patterns, so that memory does
not grow with the dataset. Pictures use 256-bin histograms of sampled frames, which are exact and add up.

Source for which frames are sampled: lerobot 0.6.1 `datasets/compute_stats.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
SAMPLED_SIDE = 64  # pictures are thinned to about this many pixels a side before they are counted


def column_statistics(column: NDArray[Any]) -> dict[str, list[float] | list[int]]:
    """Statistics of one column in memory, [T, D] or [T]: lists of D values, and `count` as [T]."""
    values = np.asarray(column, np.float64).reshape(len(column), -1)
    result: dict[str, list[float] | list[int]] = {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "count": [len(values)],
    }
    ordered = np.sort(values, axis=0)
    for name, q in QUANTILES.items():
        result[name] = _interpolate(ordered, q).tolist()
    return result


def arange_statistics(start: int, count: int) -> dict[str, list[float] | list[int]]:
    """Statistics of start, start + 1, ... start + count - 1 in closed form: a row's place needs no reading."""
    last = count - 1
    result: dict[str, list[float] | list[int]] = {
        "min": [float(start)],
        "max": [float(start + last)],
        "mean": [start + last / 2],
        "std": [float(np.sqrt((count * count - 1) / 12))],
        "count": [count],
    }
    result |= {name: [start + q * last] for name, q in QUANTILES.items()}
    return result


def constant_statistics(value: float, count: int) -> dict[str, list[float] | list[int]]:
    result: dict[str, list[float] | list[int]] = {name: [float(value)] for name in ("min", "max", "mean", *QUANTILES)}
    return {"min": result["min"], "max": result["max"], "mean": result["mean"], "std": [0.0], "count": [count]} | {
        name: result[name] for name in QUANTILES
    }


class FrameHistogram:
    """Counts of grey levels per colour over sampled frames of one camera; adds up over episodes."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)
        self.frames = 0

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Frames [n, H, W, 3]; thinned by striding, as LeRobot thins large pictures."""
        step = max(1, round(min(frames.shape[1], frames.shape[2]) / SAMPLED_SIDE))
        thin = frames[:, ::step, ::step]
        for colour in range(3):
            self.counts[colour] += np.bincount(thin[..., colour].ravel(), minlength=256)
        self.frames += len(frames)

    def statistics(self) -> dict[str, Any]:
        return histogram_statistics(self.counts, self.frames)


def histogram_statistics(counts: NDArray[np.int64], frames: int) -> dict[str, Any]:
    """[3, 256] counts -> LeRobot picture statistics: each [3, 1, 1], levels divided by 255, `count` in frames."""
    levels = np.arange(256) / 255.0
    total = counts.sum(axis=1)
    mean = counts @ levels / total
    variance = counts @ levels**2 / total - mean**2
    result: dict[str, Any] = {
        "min": [levels[np.flatnonzero(row)[0]] for row in counts],
        "max": [levels[np.flatnonzero(row)[-1]] for row in counts],
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(variance, 0)).tolist(),
    }
    cumulative = counts.cumsum(axis=1)
    for name, q in QUANTILES.items():
        position = q * (total - 1)
        low, high = np.floor(position).astype(int), np.ceil(position).astype(int)
        below = np.array([levels[np.searchsorted(cumulative[c], low[c], "right")] for c in range(3)])
        above = np.array([levels[np.searchsorted(cumulative[c], high[c], "right")] for c in range(3)])
        result[name] = (below + (position - low) * (above - below)).tolist()
    shaped: dict[str, Any] = {name: [[[float(v)]] for v in values] for name, values in result.items()}
    order = ("min", "max", "mean", "std", "count", *QUANTILES)
    shaped["count"] = [frames]
    return {name: shaped[name] for name in order}


def sampled_frames(frames: int) -> NDArray[np.int64]:
    """Which frames of an episode are counted: LeRobot's number, clip(T^0.75, 100, 10000), evenly spread."""
    wanted = min(frames, int(np.clip(frames**0.75, 100, 10_000)))
    return np.round(np.linspace(0, frames - 1, wanted)).astype(np.int64)


def dataset_statistics(
    chunks: Callable[[], Iterable[NDArray[Any]]], in_memory_rows: int = 20_000_000
) -> dict[str, list[float] | list[int]]:
    """Exact statistics of a column that may not fit in memory.

    `chunks()` yields [n, D] or [n] arrays and can be called again; three passes are made over a large column,
    one over a small one.
    """
    held: list[NDArray[Any]] = []
    rows = 0
    for chunk in chunks():
        rows += len(chunk)
        if rows > in_memory_rows:
            break
        held.append(np.asarray(chunk))
    else:
        return column_statistics(np.concatenate(held))
    held.clear()
    return _streamed_statistics(chunks)


def _streamed_statistics(chunks: Callable[[], Iterable[NDArray[Any]]]) -> dict[str, list[float] | list[int]]:
    count, total, low, high = 0, None, None, None
    tops: NDArray[np.int64] | None = None
    for values in _float32(chunks()):
        count += len(values)
        total = values.sum(axis=0, dtype=np.float64) + (0 if total is None else total)
        low = values.min(axis=0) if low is None else np.minimum(low, values.min(axis=0))
        high = values.max(axis=0) if high is None else np.maximum(high, values.max(axis=0))
        keys = _sortable(values)
        if tops is None:
            tops = np.zeros((values.shape[1], 65536), np.int64)
        for d in range(values.shape[1]):
            tops[d] += np.bincount(keys[:, d] >> 16, minlength=65536)
    assert tops is not None and total is not None and low is not None and high is not None
    mean = total / count
    ranks = sorted({int(r) for q in QUANTILES.values() for r in (np.floor(q * (count - 1)), np.ceil(q * (count - 1)))})
    # Which upper half each wanted rank lies in, then which lower half within it.
    places = [[int(np.searchsorted(np.cumsum(row), rank, "right")) for rank in ranks] for row in tops]
    lower = [{bucket: np.zeros(65536, np.int64) for bucket in set(row)} for row in places]
    squares = np.zeros(len(tops))
    for values in _float32(chunks()):
        squares += ((values.astype(np.float64) - mean) ** 2).sum(axis=0)
        keys = _sortable(values)
        for d, buckets in enumerate(lower):
            upper = keys[:, d] >> 16
            for bucket, counts in buckets.items():
                counts += np.bincount(keys[upper == bucket, d] & 0xFFFF, minlength=65536)
    order = np.empty((len(ranks), len(tops)))
    for d, row in enumerate(tops):
        before = np.concatenate([[0], np.cumsum(row)])
        for i, (rank, bucket) in enumerate(zip(ranks, places[d], strict=True)):
            low_half = int(np.searchsorted(np.cumsum(lower[d][bucket]), rank - before[bucket], "right"))
            order[i, d] = _from_sortable(np.uint32(bucket << 16 | low_half))
    result: dict[str, list[float] | list[int]] = {
        "min": low.astype(np.float64).tolist(),
        "max": high.astype(np.float64).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(squares / count).tolist(),
        "count": [count],
    }
    for name, q in QUANTILES.items():
        position = q * (count - 1)
        below, above = order[ranks.index(int(np.floor(position)))], order[ranks.index(int(np.ceil(position)))]
        result[name] = (below + (position - np.floor(position)) * (above - below)).tolist()
    return result


def _interpolate(ordered: NDArray[np.float64], q: float) -> NDArray[np.float64]:
    position = q * (len(ordered) - 1)
    below, above = ordered[int(np.floor(position))], ordered[int(np.ceil(position))]
    return below + (position - np.floor(position)) * (above - below)


def _float32(chunks: Iterable[NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
    for chunk in chunks:
        if len(chunk):
            yield np.ascontiguousarray(chunk, np.float32).reshape(len(chunk), -1)


def _sortable(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Bit patterns that sort as their floats do: flip the sign bit of positives, every bit of negatives."""
    bits = values.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _from_sortable(key: np.uint32) -> float:
    bits = np.uint32(int(key) & 0x7FFFFFFF) if int(key) >> 31 else np.uint32(~int(key) & 0xFFFFFFFF)
    return float(np.array([bits], np.uint32).view(np.float32)[0])
