"""Exact statistics of columns that may not fit in memory.

Quantiles are order statistics with numpy's linear interpolation, over every row, found by counting: a float's
bits, with the sign turned round, sort as the float does, so a histogram of the upper 16 bits tells which
bucket a rank lies in, and another pass over that bucket's rows tells the next 16. Memory is a few histograms
a dimension, whatever the number of rows.

LeRobot up to 0.6 merges per-episode quantiles, by count or by envelope; neither is a quantile of the dataset.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
STATISTICS = ("min", "max", "mean", "std", *QUANTILES, "levels")

IN_MEMORY_BYTES = 256 * 2**20  # below this the rows are kept and sorted: one pass instead of three

Blocks = Callable[[], Iterable[NDArray[Any]]]
Statistics = dict[str, NDArray[np.float64]]


def exact_statistics(blocks: Blocks, in_memory_bytes: int = IN_MEMORY_BYTES) -> tuple[Statistics, int]:
    """Statistics [D] of all rows, by name (STATISTICS), and the number of rows they are over.

    `blocks()` yields [n, D] (or [n]) arrays and can be called again. Rows with a value that is not finite are
    left out. std is the population's; `levels` counts distinct values up to 3, so that 2 is a binary gripper.
    """
    held: list[NDArray[Any]] = []
    size = 0
    for block in _finite(blocks()):
        size += block.nbytes
        if size > in_memory_bytes:
            held = []
            break
        held.append(block)
    if size == 0:
        raise DataError("statistics of a column without one finite row\n  Run  dpipe doctor  on the dataset.")
    if held:
        rows = np.concatenate(held)
        return _sorted_statistics(rows), len(rows)
    return _counted_statistics(blocks)


def fit_statistics(data: NDArray[Any]) -> Statistics:
    """The same for rows [N, D] in memory."""
    return exact_statistics(lambda: [np.asarray(data)], in_memory_bytes=2**62)[0]


def _sorted_statistics(rows: NDArray[Any]) -> Statistics:
    result: Statistics = {name: np.empty(rows.shape[1]) for name in STATISTICS}
    for d in range(rows.shape[1]):
        values = np.sort(rows[:, d]).astype(np.float64)
        result["min"][d], result["max"][d] = values[0], values[-1]
        result["mean"][d], result["std"][d] = values.mean(), values.std()
        for name, q in QUANTILES.items():  # np.quantile would order them again
            result[name][d] = _between(values, q * (len(values) - 1))
        result["levels"][d] = min(3, 1 + int(np.count_nonzero(np.diff(values))))
    return _still_exactly(result)


def _counted_statistics(blocks: Blocks) -> tuple[Statistics, int]:
    count, levels = 0, None
    low = high = total = np.zeros(0)
    for rows in _finite(blocks()):
        if levels is None:
            levels = [set() for _ in range(rows.shape[1])]
            low, high, total = rows[0].astype(np.float64), rows[0].astype(np.float64), np.zeros(rows.shape[1])
        count += len(rows)
        low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        total += rows.sum(axis=0, dtype=np.float64)
        for d, seen in enumerate(levels):
            if len(seen) < 3:
                seen.update(np.unique(rows[:, d])[:3].tolist())
    assert levels is not None
    mean = total / count
    squares = sum(((rows - mean) ** 2).sum(axis=0) for rows in _finite(blocks()))
    wanted = {name: q * (count - 1) for name, q in QUANTILES.items()}
    ranks = sorted({int(rank) for at in wanted.values() for rank in (np.floor(at), np.ceil(at))})
    order = _order_statistics(blocks, ranks, len(mean))
    result: Statistics = {"min": low, "max": high, "mean": mean, "std": np.sqrt(np.asarray(squares) / count)}
    for name, at in wanted.items():
        result[name] = _between(order, at)
    result["levels"] = np.array([min(3, len(seen)) for seen in levels], dtype=np.float64)
    return _still_exactly(result), count


def _order_statistics(blocks: Blocks, ranks: list[int], dims: int) -> dict[int, NDArray[np.float64]]:
    """rank -> the value [D] that stands there once each column is sorted; 16 bits are settled a pass."""
    prefix = {(d, rank): 0 for d in range(dims) for rank in ranks}
    before = dict.fromkeys(prefix, 0)
    dtype = next(iter(_finite(blocks()))).dtype
    bits = dtype.itemsize * 8
    for shift in range(bits - 16, -1, -16):
        counts = {(d, prefix[d, rank]): np.zeros(65536, np.int64) for d, rank in prefix}
        for rows in _finite(blocks()):
            keys = _sortable(rows)
            for (d, head), histogram in counts.items():
                column = keys[:, d]
                inside = column if shift == bits - 16 else column[column >> (shift + 16) == head]
                histogram += np.bincount((inside >> shift) & 0xFFFF, minlength=65536)
        for (d, rank), head in list(prefix.items()):
            cumulative = np.cumsum(counts[d, head])
            digit = int(np.searchsorted(cumulative, rank - before[d, rank], side="right"))
            before[d, rank] += int(cumulative[digit - 1]) if digit else 0
            prefix[d, rank] = head << 16 | digit
    return {rank: np.array([_unsortable(prefix[d, rank], dtype) for d in range(dims)]) for rank in ranks}


def _between(order: Any, at: float) -> Any:
    """The value at rank `at` of `order`, between its neighbours: numpy's own form, which is exact at both ends."""
    below, above = order[int(np.floor(at))], order[int(np.ceil(at))]
    t = at - np.floor(at)
    return above - (above - below) * (1 - t) if t >= 0.5 else below + (above - below) * t


def _still_exactly(result: Statistics) -> Statistics:
    """A column that never moves has its value as mean and 0 as std, whatever the summation rounds to."""
    still = result["min"] == result["max"]
    result["mean"][still] = result["min"][still]
    result["std"][still] = 0.0
    return result


def _finite(blocks: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Non-empty blocks [n, D] of float32 or float64 rows that are finite."""
    for block in blocks:
        rows = np.asarray(block)
        if rows.dtype not in (np.float32, np.float64):
            rows = rows.astype(np.float64)
        rows = rows.reshape(len(rows), -1)
        sound = np.all(np.isfinite(rows), axis=1)
        rows = rows if sound.all() else rows[sound]
        if len(rows):
            yield rows


def _sortable(rows: NDArray[Any]) -> NDArray[Any]:
    """Bits that sort as their floats do: the sign bit of positives flipped, every bit of negatives."""
    # +0.0: -0.0 and 0.0 are one value
    unsigned = np.dtype(f"u{rows.dtype.itemsize}")
    bits = np.ascontiguousarray(rows + rows.dtype.type(0)).view(unsigned)
    top = unsigned.type(1 << (rows.dtype.itemsize * 8 - 1))
    return np.where(bits & top, ~bits, bits | top)


def _unsortable(key: int, dtype: np.dtype[Any]) -> float:
    width = dtype.itemsize * 8
    bits = key ^ (1 << (width - 1)) if key >> (width - 1) else ~key & (2**width - 1)
    return float(np.array([bits], f"u{dtype.itemsize}").view(dtype)[0])
