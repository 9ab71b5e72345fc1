"""The rows of data files: every column as declared, every number that is a position equal to that position.

Statistics are recomputed from the rows. Ours are exact; lerobot's are merged from episodes, so theirs are held to
what such merging can give: extremes and moments of the rows, quantiles within those of the episodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.features import DEFAULT_FEATURES
from ...schemas.problems import NOTE
from ...schemas.statistics import QUANTILES, exact_statistics
from .checks import ALL, ROWS, Findings, Found, Level, check
from .pictures import Seen
from .recording import Gathered
from .subject import NOT_NUMBERS, Block, Subject

TOLERANCE_S = 1e-4  # lerobot's default `tolerance_s`


@check("columns", ROWS, Level.SAMPLED)
def columns_are_as_declared(block: Block) -> Findings:
    """Each feature is a column of the declared type and size, and no column is undeclared."""
    subject = block.subject
    for name, told in subject.features.items():
        if told["dtype"] == "video":
            if name in block.names:
                yield Found(block.where, f"'{name}' is declared as video, yet the rows have such a column")
        elif name not in block.names:
            yield Found(block.where, f"no column '{name}'")
        elif name in block.columns and told["dtype"] not in NOT_NUMBERS:
            stored, expected = block.columns[name].dtype, np.dtype(told["dtype"])
            if expected.kind != "b" and stored.kind != expected.kind:
                yield Found(block.where, f"'{name}' is stored as {stored}, declared as {expected}")
    for name, trouble in block.troubles:
        yield Found(block.where, f"'{name}' {trouble}")
    for name in block.names:
        if name not in subject.features and name in ("language_persistent", "language_events"):
            yield Found(block.where, f"'{name}' is not declared in meta/info.json: lerobot refuses to load")


@check("row-count", ROWS, Level.SAMPLED)
def rows_are_the_episodes_frames(block: Block) -> Findings:
    if not block.agrees:
        first, last = int(block.episodes[0]), int(block.episodes[-1])
        yield Found(
            block.where,
            f"{block.rows} rows; episodes {first} to {last} have {int(block.lengths.sum())} frames by meta/episodes",
        )


@check("index", ROWS, Level.SAMPLED)
def index_is_the_position(block: Block) -> Findings:
    yield from _compare(block, "index", block.subject.first_index[block.episodes], counting=True)


@check("episode-index", ROWS, Level.SAMPLED)
def episode_index_is_the_episode(block: Block) -> Findings:
    yield from _compare(block, "episode_index", block.episodes, counting=False)


@check("frame-index", ROWS, Level.SAMPLED)
def frame_index_counts_frames(block: Block) -> Findings:
    yield from _compare(block, "frame_index", np.zeros(len(block.episodes), np.int64), counting=True)


def _compare(block: Block, column: str, base: NDArray[np.int64], counting: bool) -> Findings:
    """A column that must be base[e], or base[e] + frame."""
    found = block.columns.get(column)
    if found is None or not block.agrees:
        return
    expected = np.repeat(base, block.lengths)
    if counting:
        expected = expected + np.arange(block.rows) - np.repeat(block.starts, block.lengths)
    wrong = np.flatnonzero(found[:, 0] != expected)
    if len(wrong):
        row = int(wrong[0])
        yield Found(
            f"{block.where}, {block.frame(row)}",
            f"{column} is {found[row, 0]}, expected {expected[row]} ({len(wrong)} of {block.rows} rows differ)",
        )


@check("timestamp", ROWS, Level.SAMPLED)
def timestamps_are_frames_over_fps(block: Block) -> Findings:
    found, fps = block.columns.get("timestamp"), block.subject.fps
    if found is None or not block.agrees or not fps:
        return
    expected = (np.arange(block.rows) - np.repeat(block.starts, block.lengths)) / fps
    late = found[:, 0].astype(np.float64) - expected
    # A float32 near an hour is good to 0.2 ms only, as lerobot stores it; it rounds before it compares.
    wrong = np.flatnonzero(~(np.abs(late) <= TOLERANCE_S + np.abs(expected) * 2**-23))
    if len(wrong):
        row = int(wrong[0])
        yield Found(
            f"{block.where}, {block.frame(row)}",
            f"timestamp is {found[row, 0]:.6g} s, expected {expected[row]:.6g} s ({len(wrong)} rows differ)",
        )


@check("task-index", ROWS, Level.SAMPLED)
def task_index_is_known(block: Block) -> Findings:
    """Every frame's task exists, and is one of its episode's."""
    found, subject = block.columns.get("task_index"), block.subject
    if found is None or subject.tasks_table is None:
        return
    task = found[:, 0]
    wrong = np.flatnonzero((task < 0) | (task >= max(1, len(subject.tasks))))
    if len(wrong):
        row = int(wrong[0])
        yield Found(
            f"{block.where}, {block.frame(row)}",
            f"task_index is {task[row]}, there are {len(subject.tasks)} tasks",
        )
        return
    told = subject.episode_tasks
    if told is None or not block.agrees:
        return
    for e, start, length in zip(block.episodes, block.starts, block.lengths, strict=True):
        used = {subject.tasks[i] for i in np.unique(task[start : start + length])}
        if not used <= set(told[e]):
            yield Found(
                f"{block.where}, episode {e}",
                f"its frames say {sorted(map(repr, used - set(told[e])))[0]}, meta/episodes {told[e]}",
            )


@check("statistics", ALL, Level.SAMPLED)
def statistics_are_those_of_the_rows(gathered: Gathered) -> Findings:
    subject = gathered.subject
    if subject is None or subject.stats is None or not gathered.rows_are_whole:
        return  # statistics of rows that are not those of the dataset say nothing more
    for name in [*subject.vectors, *(n for n in DEFAULT_FEATURES if n in subject.features)]:
        own = subject.stats.get(name)
        if not isinstance(own, dict) or not any(True for _ in subject.column_blocks(name)):
            continue
        if name in gathered.doubtful:
            continue  # the column itself is wrong, and has been told
        # lerobot 0.6.1 does not renumber these when it merges datasets, and nothing is normalised with them
        severity = NOTE if name in NUMBERING and not subject.ours else ""
        for what in _statistics_differ(gathered, subject, name, own):
            yield Found("meta/stats.json", what, severity)


def _statistics_differ(gathered: Gathered, subject: Subject, name: str, own: dict[str, Any]) -> Iterator[str]:
    try:
        told = {k: np.asarray(own[k], np.float64).reshape(-1) for k in (*MOMENTS, *QUANTILES) if k in own}
    except (TypeError, ValueError):
        return  # `statistics_are_complete` has said so
    exact, rows = exact_statistics(lambda: subject.column_blocks(name))
    if any(len(values) != len(exact["min"]) for values in told.values()):
        return
    reach, size = exact["max"] - exact["min"], np.maximum(np.abs(exact["min"]), np.abs(exact["max"]))
    slack = (1e-6 if subject.ours else 2e-3) * reach + 2e-6 * size + 1e-9
    for entry in (k for k in MOMENTS if k in told):
        # lerobot takes the variance as a difference of float32 means: good to a thousandth of the values
        loose = 1e-3 * size if entry == "std" and not subject.ours else 0.0
        yield from _differs(name, entry, told[entry], exact[entry], exact[entry], slack + loose)
    envelope = gathered.quantiles.get(name)
    for entry in (q for q in QUANTILES if q in told):
        if subject.ours:
            yield from _differs(name, entry, told[entry], exact[entry], exact[entry], slack)
        elif envelope is not None:
            yield from _differs(name, entry, told[entry], *envelope[entry], 0.01 * reach + 1e-6)
    count = np.asarray(own.get("count", rows)).reshape(-1)
    if len(count) == 1 and int(count[0]) != rows:
        yield f"'{name}' count is {int(count[0])}, there are {rows} rows"


NUMBERING = ("index", "episode_index", "task_index")
MOMENTS = ("min", "max", "mean", "std")


def _differs(
    name: str,
    entry: str,
    told: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    slack: NDArray[np.float64],
) -> Iterator[str]:
    wrong = np.flatnonzero(~((told >= low - slack) & (told <= high + slack)))
    if len(wrong):
        d = int(wrong[0])
        expected = f"{low[d]:.6g}" if low[d] == high[d] else f"{low[d]:.6g} to {high[d]:.6g}"
        yield f"'{name}' {entry}[{d}] is {told[d]:.6g}, the rows give {expected}"


def levels_differ(stats: dict[str, Any], seen: Seen) -> Findings:
    """The mean colour in meta/stats.json against that of the pictures looked at, as far as these tell it."""
    for camera, glimpses in seen.glimpses.items():
        own = stats.get(camera)
        told = own.get("mean") if isinstance(own, dict) else None
        if told is None or len(glimpses) < 2:
            continue
        try:
            mean = np.asarray(told, np.float64).reshape(-1) * 255
        except (TypeError, ValueError):
            continue  # `statistics_are_complete` has said so
        each = np.stack([g.levels for g in glimpses])
        if mean.shape != each.shape[1:]:
            continue
        # Writers sample frames, too; what episodes differ by is what a sample of them may be off by.
        slack = 8 + 4 * each.std(axis=0) / np.sqrt(len(each))
        away = np.abs(each.mean(axis=0) - mean)
        if (away > slack).any():
            c = int((away - slack).argmax())
            yield Found(
                "meta/stats.json",
                f"'{camera}' mean[{c}] is {mean[c] / 255:.3f}, the pictures looked at have "
                f"{each[:, c].mean() / 255:.3f}",
            )


@check("episode-statistics", ROWS, Level.SAMPLED)
def statistics_of_episodes_are_those_of_their_rows(block: Block) -> Findings:
    """min, max and mean in meta/episodes, where the writer keeps them, against the episode's own rows."""
    subject = block.subject
    if not block.agrees:
        return
    for name, column in block.columns.items():
        if name in DEFAULT_FEATURES or column.dtype.kind not in "fiu" or not len(column):
            continue  # they follow from the table itself; wrong ones have names of their own
        values = column.astype(np.float64)
        with np.errstate(invalid="ignore"):
            own = {
                "min": np.minimum.reduceat(values, block.starts),
                "max": np.maximum.reduceat(values, block.starts),
                "mean": np.add.reduceat(values, block.starts) / block.lengths[:, None],
            }
        reach = own["max"] - own["min"]
        slack = 2e-3 * reach + 1e-4 * np.abs(own["mean"]) + 1e-6
        for entry, expected in own.items():
            told = episode_statistic(subject, name, entry, column.shape[1])
            if told is None:
                continue
            here = told[block.episodes]
            with np.errstate(invalid="ignore"):
                wrong = np.argwhere(np.abs(here - expected) > slack)
            if len(wrong):
                e, d = wrong[0]
                yield Found(
                    f"meta/episodes, episode {block.episodes[e]}",
                    f"stats/{name}/{entry}[{d}] is {here[e, d]:.6g}, its rows give {expected[e, d]:.6g}",
                )
                break


def episode_statistic(subject: Any, feature: str, entry: str, dims: int) -> NDArray[np.float64] | None:
    """[E, D] of `stats/<feature>/<entry>` in meta/episodes, or None where it is absent or of another shape."""
    cache = subject.__dict__.setdefault("_episode_statistics", {})
    key = (feature, entry)
    if key not in cache:
        from .subject import rows_of

        column = subject.text_column(f"stats/{feature}/{entry}")
        try:
            cache[key] = None if column is None else rows_of(column, dims).astype(np.float64)
        except Exception:  # noqa: BLE001 - statistics of an episode are extras; their damage shows as absence
            cache[key] = None
    return cache[key]
