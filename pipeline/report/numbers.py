"""The numbers behind the report's pictures: arrays in, arrays out, nothing opened.

Legend   T frames, D dimensions, N tokens of one frame, d width of a token, G grippers, K steps of a chunk
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

MARKS = {"q01": 0.01, "q50": 0.50, "q99": 0.99}


@dataclass(frozen=True)
class Histogram:
    """`counts` [bins] of values between `low` and `high`; `marks` are quantiles by name."""

    low: float
    high: float
    counts: NDArray[np.int64]
    marks: Mapping[str, float]
    left_out: int = 0  # values that are no numbers


def histogram(values: NDArray[Any], bins: int = 40) -> Histogram:
    """Of all finite values. One value alone gets a bar of its own in the middle."""
    flat = np.asarray(values, np.float64).reshape(-1)
    sound = flat[np.isfinite(flat)]
    if not len(sound):
        return Histogram(0.0, 1.0, np.zeros(bins, np.int64), {}, len(flat))
    low, high = float(sound.min()), float(sound.max())
    marks = {name: float(np.quantile(sound, q)) for name, q in MARKS.items()}
    if low == high:
        spread = abs(low) * 0.05 or 0.5
        low, high = low - spread, high + spread
    counts, _ = np.histogram(sound, bins, (low, high))
    return Histogram(low, high, counts, marks, len(flat) - len(sound))


def lengths_histogram(lengths: NDArray[np.integer], most: int = 30) -> tuple[NDArray[np.int64], list[str]]:
    """Episodes by their number of frames: counts and labels of at most `most` bins of whole frames."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // most))
    counts = np.bincount((np.asarray(lengths) - low) // width)
    starts = low + width * np.arange(len(counts))
    return counts, [str(a) if width == 1 else f"{a} to {a + width - 1}" for a in starts.tolist()]


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` different places of 0 .. count - 1, evenly spread, the ends among them."""
    return np.unique(np.round(np.linspace(0, count - 1, min(wanted, count))).astype(int)).tolist()


def evenly_by_task(tasks: Sequence[str], wanted: int) -> list[int]:
    """Places of `wanted` episodes that show as many different instructions as there is room for."""
    first = list({task: place for place, task in reversed(list(enumerate(tasks)))}.values())
    first.sort()
    chosen = [first[i] for i in evenly(len(first), wanted)]
    rest = [place for place in evenly(len(tasks), wanted) if place not in chosen]
    return sorted([*chosen, *rest[: max(0, wanted - len(chosen))]])


_AXIS = re.compile(r"^(.*?)[_. ]?(x|y|z)$")
_TURN = re.compile(r"rot|quat|axis|angle|euler|roll|pitch|yaw|orient|omega|torque|force|vel|accel")


def position_triples(names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """Where a vector holds points in space: neighbouring dimensions x, y, z of one stem that is no rotation."""
    found = []
    for i in range(len(names) - 2):
        parts = [_AXIS.match(name.lower()) for name in names[i : i + 3]]
        if not all(parts):
            continue
        stems = {part.group(1) for part in parts if part}
        axes = "".join(part.group(2) for part in parts if part)
        if axes == "xyz" and len(stems) == 1 and not _TURN.search(next(iter(stems))):
            found.append((stems.pop(), (i, i + 1, i + 2)))
    return found


def oblique(points: NDArray[Any]) -> Float:
    """[T, 3] x, y, z -> [T, 2] right and up, seen from the side and above (azimuth 35, elevation 25 degrees)."""
    xyz = np.asarray(points, np.float64)
    azimuth, elevation = np.radians(35.0), np.radians(25.0)
    right = -np.sin(azimuth) * xyz[:, 0] + np.cos(azimuth) * xyz[:, 1]
    depth = np.cos(azimuth) * xyz[:, 0] + np.sin(azimuth) * xyz[:, 1]
    return np.stack([right, np.cos(elevation) * xyz[:, 2] - np.sin(elevation) * depth], axis=1)


def pca_colours(features: NDArray[Any]) -> NDArray[np.uint8]:
    """Features [..., d] -> colours [..., 3]: red, green and blue are the first three principal components.

    Scaled between their 2nd and 98th percentiles over everything given; signs are settled by the largest
    loading, so that the same features have the same colours. Fewer than three components leave grey channels.
    """
    shape = np.asarray(features).shape
    flat = np.asarray(features, np.float64).reshape(-1, shape[-1])
    centred = flat - flat.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(values)[::-1][:3]
    result = np.full((len(flat), 3), 128, np.uint8)
    for channel, column in enumerate(order):
        if values[column] <= 1e-12 * max(1e-300, float(values.max())):
            continue
        direction = vectors[:, column]
        direction = direction * np.sign(direction[np.argmax(np.abs(direction))])
        component = centred @ direction
        low, high = np.percentile(component, [2, 98])
        scaled = np.clip((component - low) / max(high - low, 1e-12), 0, 1)
        result[:, channel] = np.round(255 * scaled)
    return result.reshape(*shape[:-1], 3)


def change_maps(now: NDArray[Any], later: NDArray[Any]) -> Float:
    """[n, N, d] twice -> [n, N] in [0, 1]: how far each token moves, as a share of the most any of them does."""
    moved = np.linalg.norm(np.asarray(later, np.float64) - np.asarray(now, np.float64), axis=-1)
    return moved / max(float(moved.max()), 1e-12)


def errors_around_switches(
    wrong: Iterable[NDArray[np.bool_]], gripper: Iterable[NDArray[np.bool_]], reach: int = 15
) -> tuple[NDArray[np.int64], Float, NDArray[np.int64]]:
    """Per episode [T, G] -> offsets [2 reach + 1], share of wrong decisions at each, and how many there were.

    Offset 0 is the first frame at which a gripper's command has its new value; each gripper is its own series,
    and a frame near several switches counts for each. Offsets beyond an episode count for none.
    """
    offsets = np.arange(-reach, reach + 1)
    bad, seen = np.zeros(len(offsets)), np.zeros(len(offsets), np.int64)
    for mistakes, closed in zip(wrong, gripper, strict=True):
        for g in range(closed.shape[1]):
            for at in np.flatnonzero(closed[1:, g] != closed[:-1, g]) + 1:
                places = at + offsets
                inside = (places >= 0) & (places < len(closed))
                bad[inside] += mistakes[places[inside], g]
                seen[inside] += 1
    return offsets, bad / np.maximum(seen, 1), seen


def truth_of_decisions(
    logit: NDArray[Any], correction: NDArray[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(wrong, truth) of gripper decisions from an anchor's logits and what corrects them: right ones need 0."""
    wrong = np.asarray(correction) != 0
    return wrong, (np.asarray(logit) > 0) != wrong


def instruction_table(
    tasks: Sequence[Sequence[str]], lengths: NDArray[np.integer]
) -> list[tuple[str, int, int]]:
    """(instruction, episodes, frames), the most frequent first, then by text."""
    found: dict[str, list[int]] = {}
    for texts, length in zip(tasks, lengths.tolist(), strict=True):
        for text in texts:
            entry = found.setdefault(text, [0, 0])
            entry[0] += 1
            entry[1] += length
    return sorted(((text, e, f) for text, (e, f) in found.items()), key=lambda row: (-row[1], row[0]))


def metric_curves(rows: Iterable[Mapping[str, Any]], most: int = 400) -> dict[str, tuple[Float, Float]]:
    """Lines of metrics.jsonl -> {metric: (steps, values)}; long runs are thinned by averaging neighbours."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int | float):
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, []).append((float(step), float(value)))
    curves = {}
    for name, pairs in found.items():
        table = np.array(pairs)
        if len(table) > most:
            table = np.array([block.mean(axis=0) for block in np.array_split(table, most)])
        curves[name] = (table[:, 0], table[:, 1])
    return curves


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers within [low, high], about `wanted` of them."""
    if not np.isfinite([low, high]).all() or high <= low:
        return [low]
    rough = (high - low) / max(1, wanted)
    unit = 10.0 ** np.floor(np.log10(rough))
    step = min((m * unit for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = np.ceil(low / step - 1e-9)
    last = np.floor(high / step + 1e-9)
    return [float(step * i) + 0.0 for i in np.arange(first, last + 1)]  # + 0.0: no minus zero


def number(value: float) -> str:
    """A number as a reader wants it: three or four figures, no exponent where none is needed."""
    if not np.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
