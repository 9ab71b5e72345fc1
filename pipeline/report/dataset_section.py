"""One dataset in the report: what it is, what it looks like, how its numbers are spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas.features import CAMERA_PREFIX
from ..facts import Facts, FeatureFact, facts_of
from . import page, svg
from .numbers import (
    evenly,
    evenly_by_task,
    histogram,
    instruction_table,
    lengths_histogram,
    oblique,
    position_triples,
)
from .pictures import Detail, contact_sheet, preview
from .targets_section import target_sections

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ...streams.dataset import Dataset

ROWS_SEEN = 400_000  # frames whose values are counted; more change no picture
TRACES = 40  # episodes drawn as curves
POINTS = 160  # of a curve
SHOWN_ROWS = 24  # of a table before the rest is folded away
DISTRIBUTED = ("action", "observation.state")


def dataset_section(
    dataset: Dataset, anchor: str, targets: Sequence[Path], state: str, detail: Detail
) -> str:
    """A whole section; `targets` are the folders that hold <stage>/<variant> of this dataset."""
    facts = facts_of(dataset)
    parts = [
        f'<section id="{page.text(anchor)}"><h2>{page.text(dataset.name)}</h2>',
        f"<p>{_code(facts.summary)}</p>",
        f"<p class=soft>{page.text(state)}</p>" if state else "",
        page.tiles(_numbers(dataset, facts)),
        *_identity(facts),
        *_dropped(facts),
    ]
    tasks = _first_tasks(dataset)
    parts += _cameras(dataset, tasks, detail)
    parts += _lengths(dataset)
    parts += _instructions(dataset)
    parts += _distributions(dataset)
    parts += _trajectories(dataset, tasks)
    parts += target_sections(dataset, targets, detail)
    return "".join(parts) + "</section>"


def _code(words: str) -> str:
    """`words` between back-quotes become code; everything is escaped."""
    pieces = page.text(words).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _numbers(dataset: Dataset, facts: Facts) -> list[tuple[str, str]]:
    seconds = facts.frames / facts.fps
    duration = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    told = [
        ("episodes", f"{facts.episodes:,}"),
        ("frames", f"{facts.frames:,}"),
        (f"at {facts.fps} frames a second", duration),
        ("instructions", f"{len(facts.tasks):,}"),
        ("cameras", str(len(facts.cameras))),
    ]
    size = ((dataset.manifest or {}).get("totals") or {}).get("bytes")
    told += [("on disk", page.size_text(size))] if size else []
    told.append(("licence", facts.licence or "not told"))
    told += [("left out", f"{len(facts.dropped):,}")] if facts.source else []
    return told


def _identity(facts: Facts) -> Iterator[str]:
    yield "<h3>What it is</h3>"
    if facts.conventions:
        yield "<h4>Conventions</h4>" + page.pairs(facts.conventions)
    else:
        yield (
            "<p class=soft>Its conventions (gripper polarity, rotation form, frame of reference) are written nowhere "
            "in it.</p>"
        )
    head = ("feature", "dimensions", "unit", "frame", "meaning")
    rows = [_feature_row(feature) for feature in facts.features]
    rows += [(name, size, "", "", "") for name, size in facts.cameras]
    rows += [(f"{f.name} (beside it)", *_feature_row(f)[1:]) for f in facts.sidecar]
    yield page.folded(f"{len(rows)} features", page.table(head, rows))
    provenance = [("source", facts.source)] if facts.source else []
    provenance += [("licence", facts.licence or "not told"), *facts.splits, *facts.conversion]
    provenance += [("citation", facts.citation)] if facts.citation else []
    yield page.folded("Provenance: splits, options, licence, citation", page.pairs(provenance))
    if facts.note:
        yield f"<p>{_code(facts.note)}</p>"
    if facts.warnings:
        rows = [(warning,) for warning in facts.warnings]
        yield page.folded(f"Noticed in the recordings: {len(rows)}", page.table(("",), rows))


def _feature_row(feature: FeatureFact) -> tuple[str, str, str, str, str]:
    return feature.name, ", ".join(feature.names), feature.unit, feature.frame, feature.description


def _dropped(facts: Facts) -> Iterator[str]:
    if not facts.source:
        return
    yield "<h3>Left out</h3>"
    if not facts.dropped:
        yield "<p>Nothing: every recording became an episode.</p>"
        return
    rows = [(d.source_id, d.reason, d.remedy) for d in facts.dropped]
    yield from _table(("recording", "reason", "what would mend it"), rows)


def _cameras(dataset: Dataset, tasks: Sequence[str], detail: Detail) -> Iterator[str]:
    if not dataset.cameras or not len(dataset):
        return
    yield "<h3>Cameras</h3>"
    shown = evenly_by_task(tasks, detail.episodes)
    for camera in dataset.cameras:
        name = camera.removeprefix(CAMERA_PREFIX)
        height, width = dataset.camera_size(camera)
        strips, problems = contact_sheet(dataset, camera, shown, detail)
        address, still, told = preview(dataset, camera, shown[len(shown) // 2], detail)
        yield f"<h4>{page.text(name)} <small>{width} x {height}</small></h4>"
        figure = ""
        if address:
            words = f"{name}, {told}"
            moving = (
                f'<picture><source srcset="{still}" media="(prefers-reduced-motion: reduce)">'
                f"{page.image(address, words)}</picture>"
            )
            figure = f"<figure>{moving}<figcaption>{page.text(told)}</figcaption></figure>"
        rows = []
        for strip in strips:
            images = "".join(
                page.image(data, f"{name}, episode {strip.episode}, frame {t}") for t, data in strip.frames
            )
            caption = f"episode {strip.episode}, {strip.length} frames: {strip.task}"
            rows.append(
                f"<figure><div class=strip>{images}</div>"
                f"<figcaption>{page.text(caption)}</figcaption></figure>"
            )
        yield f"<div class=row>{figure or '<span></span>'}<div>{''.join(rows)}</div></div>"
        for problem in problems:
            yield f"<p class=bad>{page.text(problem)}</p>"


def _lengths(dataset: Dataset) -> Iterator[str]:
    lengths = dataset.episodes.length
    if not len(lengths):
        return
    counts, labels = lengths_histogram(lengths)
    chart = svg.bar_chart(counts, labels, "episodes by their number of frames", "frames of an episode")
    middle = float(np.median(lengths))
    told = (
        f"from {lengths.min():,} to {lengths.max():,} frames, median {middle:,.0f} "
        f"({middle / dataset.fps:.1f} s)"
    )
    yield f"<h3>Episode lengths</h3><p class=soft>{told}</p><div class=middle>{chart}</div>"


def _instructions(dataset: Dataset) -> Iterator[str]:
    column = dataset.episodes.text.column("tasks")
    texts = column.to_pylist() if column is not None else []
    rows = instruction_table([each or [] for each in texts], dataset.episodes.length)
    if not rows:
        return
    yield f"<h3>Instructions</h3><p class=soft>{len(rows):,} different ones</p>"
    told = [(text, f"{episodes:,}", f"{frames:,}") for text, episodes, frames in rows]
    yield from _table(("instruction", "episodes", "frames"), told, (1, 2))
    segments = _segments(dataset)
    if segments:
        head = ("words", "windows", "frames")
        count = sum(row[1] for row in segments)
        inner = "".join(_table(head, [(t, f"{n:,}", f"{f:,}") for t, n, f in segments], (1, 2)))
        yield page.folded(f"{count:,} windows inside episodes carry words of their own", inner)


def _segments(dataset: Dataset) -> list[tuple[str, int, int]]:
    from ..tables import read_columns

    path = dataset.root / "dpipe" / "segments.parquet"
    if not path.is_file():
        return []
    table = read_columns(path, ["start", "stop", "text"]).to_pydict()
    length = np.array(table["stop"], np.int64) - np.array(table["start"], np.int64)
    return instruction_table([[text] for text in table["text"]], length)


def _distributions(dataset: Dataset) -> Iterator[str]:
    """Every dimension of action and state over the dataset, or of an even sample of its episodes."""
    columns = [name for name in DISTRIBUTED if name in dataset.vectors]
    if not columns or not len(dataset):
        return
    episodes = _sampled(dataset, ROWS_SEEN)
    values = dataset.all_columns(columns, episodes)
    seen = sum(int(dataset.episodes.length[e]) for e in episodes)
    for name in columns:
        table = values[name].reshape(seen, -1)
        names = dataset.names(name) or tuple(f"{name} {d}" for d in range(table.shape[1]))
        yield f"<h3>{'Actions' if name == 'action' else 'State'}, dimension by dimension</h3>"
        sample = "" if seen == dataset.total_frames else f" of {dataset.total_frames:,}, evenly chosen"
        yield (
            f"<p class=soft><code>{page.text(name)}</code> over {seen:,} frames{sample}; dashed lines at the 1st and "
            "99th percentile; heights by square root</p>"
        )
        cells = []
        for d in range(table.shape[1]):
            label = str(names[d]) if d < len(names) else str(d)
            told = histogram(table[:, d])
            still = "never moves" if np.count_nonzero(told.counts) == 1 else ""
            note = f"{told.left_out} values are no numbers" if told.left_out else still
            cells.append(page.cell(label, svg.histogram_chart(told, f"{name} {label}"), note))
        yield page.grid(cells, small=True)


def _trajectories(dataset: Dataset, tasks: Sequence[str]) -> Iterator[str]:
    """Where the hands go: every triple of positions in the state (or, without one, in the action)."""
    found = [
        (column, stem, dims)
        for column in reversed(DISTRIBUTED)
        if column in dataset.vectors
        for stem, dims in position_triples(dataset.names(column))
        if not _is_offset(dataset, column)
    ]
    state = [each for each in found if each[0] == "observation.state"]
    found = sorted(state or found, key=lambda each: any(word in each[1] for word in ("tip", "finger")))[:4]
    if not found or not len(dataset):
        return
    episodes = evenly_by_task(tasks, TRACES)
    groups = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
    column = found[0][0]
    values = {e: dataset.columns([column], e)[column] for e in episodes}
    yield (
        f"<h3>Trajectories</h3><p class=soft>{len(episodes)} episodes, a colour an instruction, a dot where each "
        "begins; the bar gives the scale in the column's own unit</p>"
    )
    for _, stem, dims in found:
        paths: list[tuple[int, NDArray[Any]]] = []
        for e in episodes:
            table = values[e].reshape(len(values[e]), -1)[:, dims]
            table = table[np.isfinite(table).all(axis=1)]
            if len(table):
                paths.append((groups[tasks[e]], table[evenly(len(table), POINTS)]))
        if not paths:
            continue
        label = stem or "position"
        views = [
            ("from above", "x", "y", lambda p: p[:, [0, 1]]),
            ("from the side", "x", "z", lambda p: p[:, [0, 2]]),
            ("from the front", "y", "z", lambda p: p[:, [1, 2]]),
            ("obliquely", "y and x", "z", oblique),
        ]
        cells = []
        for title, across, upward, look in views:
            seen = [(group, look(path)) for group, path in paths]
            cells.append(page.cell(f"{label}, {title}", svg.paths_chart(title, seen, across, upward)))
        yield page.grid(cells)


def _is_offset(dataset: Dataset, column: str) -> bool:
    """An action that is an offset has no place in space."""
    told = str((dataset.manifest or {}).get("conventions", {}).get("action", ""))
    return column == "action" and any(word in told.lower() for word in ("delta", "relative", "offset"))


def _sampled(dataset: Dataset, most_frames: int) -> list[int]:
    """All episodes, or so many evenly chosen ones that they hold about `most_frames`."""
    share = most_frames / max(1, dataset.total_frames)
    return evenly(len(dataset), len(dataset) if share >= 1 else max(1, int(len(dataset) * share)))


def _first_tasks(dataset: Dataset) -> list[str]:
    column = dataset.episodes.text.column("tasks")
    if column is None:
        return [""] * len(dataset)
    return [each[0] if each else "" for each in column.to_pylist()]


def _table(
    head: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = ()
) -> Iterator[str]:
    """The first rows, the next ones folded away, and beyond those their number."""
    yield page.table(head, rows[:SHOWN_ROWS], numeric)
    rest = rows[SHOWN_ROWS : 20 * SHOWN_ROWS]
    if rest:
        beyond = len(rows) - SHOWN_ROWS - len(rest)
        words = f"{len(rest):,} more" + (f" (of {len(rest) + beyond:,})" if beyond else "")
        yield page.folded(words, page.table(head, rest, numeric))
