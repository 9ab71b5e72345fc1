"""Examine one LeRobot v3.0 dataset: tables, then rows, then videos, then some or all of their pictures.

Where a condition chooses episodes, rows and pictures are theirs alone, and files that hold none of them stay closed.
Tables, the sample table of a video file, targets and shards are looked at whole: they are nobody's in particular.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import DataError
from .checks import (
    ALL,
    EPISODE,
    EXPECTED,
    OWN,
    PICTURES,
    ROWS,
    SEEN,
    TABLES,
    VIDEO,
    Examination,
    Found,
    Level,
    Report,
    in_a_line,
)
from .pictures import Reader, Seen, choose_spans, frames_affordable, watch
from .recording import ACTION, STATE, EpisodeRows, Gathered
from .rows import levels_differ
from .subject import Block, Place, Subject, is_there
from .videos import Stretch, VideoFile, open_video_file

# What a problem of numbering makes of the statistics of its column: nothing new.
NUMBERED = {
    "index": "index",
    "episode-index": "episode_index",
    "frame-index": "frame_index",
    "timestamp": "timestamp",
    "task-index": "task_index",
}
SUSPECTS = 3  # episodes with the fewest bytes in half a second, looked at beside those evenly spread


def examine_dataset(root: Path, level: Level, where: str | None = None) -> Report:
    from ..query import select_episodes

    report = Report(root, "LeRobot v3.0 dataset", level)
    examination = Examination(report)
    subject = Subject(root, level)
    if where:
        numbers = np.asarray(select_episodes(root, where), np.int64)
        subject.chosen = numbers[(numbers >= 0) & (numbers < len(subject))]
    examination.look(TABLES, subject, "meta")
    report.episodes, report.frames = len(subject.examined), int(subject.lengths[subject.examined].sum())
    told = set(subject.broken)
    examination.look(OWN, subject, "dpipe")
    if level == Level.FAST:
        _tell_torn(subject, examination)
        return report
    gathered = _examine_rows(subject, examination)
    examination.look(ALL, gathered, "meta")
    states = _States(subject)
    videos = _examine_videos(subject, examination, states)
    for path in set(subject.broken) - told:
        if is_there(path) and not _reported(report, subject.name_of(path)):
            examination.note("unreadable", Found(subject.name_of(path), subject.broken[path]))
    _examine_pictures(subject, examination, videos, states)
    _tell_torn(subject, examination)
    return report


def _tell_torn(subject: Subject, examination: Examination) -> None:
    for name, why in subject.torn.items():
        examination.note("unreadable", Found(f"meta/episodes, '{name}'", why))


def _reported(report: Report, where: str) -> bool:
    return any(finding.where.startswith(where) for finding in report.findings)


def _examine_rows(subject: Subject, examination: Examination) -> Gathered:
    manifest = subject.manifest or {}
    conventions = manifest.get("conventions")
    gathered = Gathered(
        total=len(subject.examined),
        level=subject.level,
        subject=subject,
        conventions=conventions if isinstance(conventions, dict) else {},
        rows_are_whole=subject.chosen is None,
    )
    for place in subject.data_places:
        if not subject.concerns(place):
            continue
        block = subject.block(place)
        if block is None:
            gathered.rows_are_whole = False
            continue
        block = chosen_rows(block)
        before = dict(examination.report.counts)
        examination.look(ROWS, block, block.where)
        changed = {
            name for (name, _), n in examination.report.counts.items() if n != before.get((name, _), 0)
        }
        gathered.doubtful |= {column for problem, column in NUMBERED.items() if problem in changed}
        gathered.doubtful |= {name for name, _ in block.troubles}
        gathered.doubtful |= {name for name in subject.vectors if name not in block.columns}
        gathered.rows_are_whole &= block.agrees
        for episode in episodes_of(block):
            examination.look(EPISODE, episode, episode.where)
            gathered.add(episode)
    return gathered


def chosen_rows(block: Block) -> Block:
    """The block with the rows of chosen episodes alone; as it is where rows and episodes disagree."""
    if block.subject.chosen is None or not block.agrees:
        return block
    kept = np.isin(block.episodes, block.subject.chosen)
    rows = np.repeat(kept, block.lengths)
    return replace(
        block,
        episodes=block.episodes[kept],
        rows=int(rows.sum()),
        columns={name: column[rows] for name, column in block.columns.items()},
    )


def episodes_of(block: Block) -> Iterator[EpisodeRows]:
    """The episodes of a data file whose rows can be told apart."""
    subject = block.subject
    vectors = [name for name in subject.vectors if name in block.columns]
    names = {name: subject.names(name) for name in vectors}
    texts = subject.episode_tasks
    for e, start, length in zip(block.episodes.tolist(), block.starts, block.lengths, strict=True):
        if not block.agrees or length == 0:
            continue
        yield EpisodeRows(
            where=f"episode {e}",
            number=e,
            split=str(subject.split_of[e]),
            text=" / ".join(map(str, texts[e])) if texts else "",
            fps=subject.fps or 1,
            columns={name: block.columns[name][start : start + length] for name in vectors},
            names=names,
        )


def _examine_videos(
    subject: Subject, examination: Examination, states: _States
) -> dict[str, list[VideoFile]]:
    opened: dict[str, list[VideoFile]] = {}
    for camera in subject.videos:
        seen: dict[bytes, Stretch] = {}
        for place in filter(subject.concerns, subject.video_places(camera)):
            video = open_video_file(subject, camera, place, seen, states.of)
            if video is not None:
                examination.look(VIDEO, video, video.where)
                opened.setdefault(camera, []).append(video)
    return opened


def _examine_pictures(
    subject: Subject, examination: Examination, videos: dict[str, list[VideoFile]], states: _States
) -> None:
    """Decode: everything, or stretches of episodes evenly spread and of those whose samples are smallest."""
    seen = Seen()
    # One set of stretches for all cameras, so that they can be compared.
    place_in = {int(e): i for i, e in enumerate(subject.examined)}
    suspects = {place_in[e]: frame for camera in videos for e, frame in _thinnest(subject, videos[camera])}
    sizes = [subject.features[camera]["shape"] for camera in subject.cameras]
    largest = max((int(np.prod(size)) // 3 for size in sizes), default=1)
    budget = frames_affordable(1, largest)
    lengths = subject.lengths[subject.examined]
    spans = [
        (int(subject.examined[i]), span)
        for i, span in choose_spans(lengths, subject.level, suspects, budget=budget)
    ]
    for camera in subject.cameras:
        for e, span, read in _readers(subject, camera, videos.get(camera, []), spans):
            where = f"episode {e}"
            try:
                clip = watch(read, span, where, e, camera, subject.fps or 1, states.of(e))
            except EXPECTED as error:
                examination.note("video-damaged", Found(f"{where}, {camera}", in_a_line(error)))
                continue
            if camera in subject.depth:
                continue  # decoded whole; what grey levels say is not said of distances
            examination.look(PICTURES, clip, clip.place)
            seen.add(clip)
    examination.look(SEEN, seen, "videos")
    for found in levels_differ(subject.stats or {}, seen) if subject.chosen is None else ():
        examination.note("statistics", found)


class _States:
    """observation.state (else action) of one episode after another, [T, D] without two-valued columns."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.place_of = np.full(len(subject), -1, np.int64)
        for number, place in enumerate(subject.data_places):
            self.place_of[place.episodes] = number

    def of(self, e: int) -> NDArray[np.float64] | None:
        if not 0 <= e < len(self.place_of) or self.place_of[e] < 0:
            return None
        block = self.subject.block(self.subject.data_places[self.place_of[e]])
        if block is None or not block.agrees:
            return None
        at = int(np.flatnonzero(block.episodes == e)[0])
        rows = slice(int(block.starts[at]), int(block.starts[at] + block.lengths[at]))
        for name in (STATE, ACTION):
            column = block.columns.get(name)
            if column is not None and column.dtype.kind in "fiu":
                values = column[rows].astype(np.float64)
                return values if np.isfinite(values).all() else None
        return None


def _thinnest(subject: Subject, videos: list[VideoFile]) -> list[tuple[int, int]]:
    """Episodes of which some half second takes the fewest bytes, and where: nothing is what black and frozen cost."""
    found: list[tuple[float, int, int]] = []
    window = max(8, (subject.fps or 1) // 2)
    for video in videos:
        table, total = video.table, len(video.table.shown)
        if not video.has_stamps:
            continue
        sums = np.concatenate([[0], np.cumsum(table.sizes[table.shown])])
        for e, first, length in zip(video.place.episodes, video.first_frames, video.lengths, strict=True):
            chosen = subject.chosen is None or bool(np.isin(e, subject.chosen))
            if chosen and length and first >= 0 and first + length <= total:
                size = min(window, int(length))
                spent = sums[first + size : first + length + 1] - sums[first : first + length - size + 1]
                at = int(spent.argmin())
                found.append((float(spent[at]) / size, int(e), at + size // 2))
    return [(e, frame) for _, e, frame in sorted(found)[:SUSPECTS]]


def _readers(
    subject: Subject, camera: str, videos: list[VideoFile], spans: list[tuple[int, range]]
) -> Iterator[tuple[int, range, Reader]]:
    """(episode, frames, how to read them) for each stretch of a camera that can be read."""
    if subject.features[camera]["dtype"] == "image":
        yield from _image_readers(subject, camera, spans)
        return
    from ...video.decode import open_video

    wanted = dict(spans)
    for video in videos:
        inside = [(i, int(e)) for i, e in enumerate(video.place.episodes) if int(e) in wanted]
        if not inside or not video.has_stamps or video.table.fps != subject.fps:
            continue  # at another rate, as has been told, times lead to other frames
        try:
            reader = open_video(video.place.path)
        except EXPECTED as error:
            reason = in_a_line(error)
            yield inside[0][1], wanted[inside[0][1]], _refusing(reason)
            continue
        with reader:
            for i, e in inside:
                first, span = int(video.first_frames[i]), wanted[e]
                if first < 0 or first + span.stop > len(reader):
                    continue  # `every_row_finds_its_frame` has said so
                yield e, span, lambda a, b, r=reader, f=first: r.read(slice(f + a, f + b))


def _refusing(reason: str) -> Reader:
    def read(start: int, stop: int) -> NDArray[np.uint8]:
        raise DataError(reason)

    return read


def _image_readers(
    subject: Subject, camera: str, spans: list[tuple[int, range]]
) -> Iterator[tuple[int, range, Reader]]:
    wanted = dict(spans)
    for place in subject.data_places:
        block = subject.block(place)
        if block is None or not block.agrees or camera not in block.names:
            continue
        for e, first in zip(place.episodes.tolist(), block.starts.tolist(), strict=True):
            if e in wanted:
                yield e, wanted[e], _image_reader(subject, place, camera, first)


def _image_reader(subject: Subject, place: Place, camera: str, first: int) -> Reader:
    from ...streams.dataset import decode_image, encoded_image

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        cells: list[Any] = subject.pictures(place, camera, range(first + start, first + stop))
        frames = []
        for t, cell in enumerate(cells, start):
            where = f"{subject.name_of(place.path)}, frame {t}"
            frames.append(decode_image(encoded_image(cell, subject.root, where), where))
        if len(frames) != stop - start:
            raise DataError(f"{len(frames)} of {stop - start} pictures")
        return np.stack(frames)

    return read
