"""Examine raw recordings: what their converter would leave out, by the names the doctor has for it, and more.

A scan checks everything but pixels. What it lets through is then looked at as a dataset's episodes are: numbers
episode by episode and all together, pictures of some of them, or of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...converters import SOURCES, Converter, load_converter
from ...schemas.episode import Dropped, Episode, EpisodeRef, VideoClip
from ...schemas.errors import DataError, DpipeError, UsageError
from ...schemas.problems import NOTE, problem_of, sentences_of
from .checks import ALL, EPISODE, EXPECTED, PICTURES, SEEN, Examination, Found, Level, Report, in_a_line
from .pictures import Reader, Seen, choose_spans, watch
from .recording import ACTION, STATE, EpisodeRows, Gathered
from .structure import odd_instructions

RAW_BUDGET = 768  # frames of a camera decoded by default; those of raw recordings may be large


def find_source(raw: Path) -> str | None:
    """The source whose recordings lie in `raw`: the one its folder is named after, else the first that finds any."""
    named = [name for name in SOURCES if name == raw.name.lower()]
    for name in [*named, *(name for name in SOURCES if name not in named)]:
        try:
            converter = load_converter(name)
            if next(iter(converter.find(raw, converter.Options())), None) is not None:
                return name
        except (DpipeError, OSError, ImportError, AttributeError):
            continue
    return None


def examine_raw(raw: Path, source: str, level: Level, where: str | None = None) -> Report:
    """`--fast` opens nothing: it lists. By default recordings are scanned and some pictures decoded.

    What cannot be scanned is told whatever `where` says: of such a recording nothing is known to choose it by.
    """
    report = Report(raw, f"raw {source} recordings", level)
    examination = Examination(report)
    converter = load_converter(source)
    options = converter.Options()
    recordings = list(converter.find(raw, options))
    if not recordings:
        examination.note("layout", Found(str(raw), f"nothing like {converter.expects}"))
        return report
    report.episodes = len(recordings)
    if level == Level.FAST:
        for recording in recordings:
            for path in recording.files:
                if not path.exists() or (path.is_file() and path.stat().st_size == 0):
                    what = "an empty file" if path.exists() else "no such file"
                    examination.note("missing-file", Found(_name(path, raw), what))
        return report
    refs: list[EpisodeRef] = []
    for recording in recordings:
        for entry in scanned(converter, recording, options):
            if isinstance(entry, Dropped):
                tell_dropped(entry, examination)
            else:
                refs.append(entry)
    if where:
        from ..catalog import rows_that_meet

        refs = [refs[row] for row in rows_that_meet(refs, where)]
        if not refs:
            raise UsageError(f"--where {where}: no recording in {raw} meets it")
    for ref in refs:
        for note in ref.warnings:
            examination.note(problem_of(note), Found(ref.source_id, note, NOTE))
    report.episodes, report.frames = len(refs), sum(ref.frames for ref in refs)
    for found in odd_instructions(
        list(dict.fromkeys(ref.instruction for ref in refs if ref.instruction)), str(raw)
    ):
        examination.note("instruction", found)
    _examine_episodes(converter, refs, options, examination)
    return report


def scanned(converter: Converter, recording: Any, options: Any) -> Sequence[EpisodeRef | Dropped]:
    try:
        return converter.scan(recording, options)
    except (*EXPECTED, DpipeError) as error:
        names = tuple(path.name for path in recording.files)
        return [
            Dropped(
                recording.name,
                names,
                str(error) or type(error).__name__,
                "look at this file",
                recording.split,
            )
        ]


def tell_dropped(dropped: Dropped, examination: Examination) -> None:
    """One finding a sentence of the reason, each under its own name."""
    for sentence in sentences_of(dropped.reason):
        examination.note(problem_of(sentence), Found(dropped.source_id, " ".join(sentence.split())))


def _name(path: Path, raw: Path) -> str:
    return path.relative_to(raw).as_posix() if path.is_relative_to(raw) else path.name


def _examine_episodes(
    converter: Converter, refs: Sequence[EpisodeRef], options: Any, examination: Examination
) -> None:
    """Every episode's numbers; pictures of some, in the same reading."""
    level = examination.report.level
    by_variant: dict[str, list[EpisodeRef]] = {}
    for ref in refs:
        by_variant.setdefault(ref.variant, []).append(ref)
    for variant, members in by_variant.items():
        embodiment = converter.embodiment_of(examination.report.path, options, variant)
        names = {f.name: f.names for f in (*embodiment.features, *embodiment.sidecar)}
        gathered = Gathered(total=len(members), level=level, conventions=embodiment.conventions)
        seen = Seen()
        lengths = np.array([ref.frames for ref in members], np.int64)
        spans = dict(choose_spans(lengths, level, budget=RAW_BUDGET))
        for number, ref in enumerate(members):
            try:
                episode = converter.read(ref, options)
            except (*EXPECTED, DpipeError) as error:
                tell_dropped(Dropped(ref.source_id, (), str(error) or type(error).__name__, ""), examination)
                continue
            rows = EpisodeRows(
                where=ref.source_id,
                number=len(gathered.where),
                split=ref.split,
                text=ref.instruction,
                fps=embodiment.fps,
                columns={n: c.reshape(len(c), -1) for n, c in episode.columns.items()},
                names={n: names.get(n) for n in episode.columns},
            )
            examination.look(EPISODE, rows, ref.source_id)
            gathered.add(rows)
            if number in spans:
                _watch_episode(episode, rows, spans[number], examination, seen)
        examination.look(ALL, gathered, str(examination.report.path))
        examination.look(SEEN, seen, str(examination.report.path))


def _watch_episode(
    episode: Episode, rows: EpisodeRows, span: range, examination: Examination, seen: Seen
) -> None:
    state = rows.floats(STATE)
    state = rows.floats(ACTION) if state is None else state
    for key, camera in episode.cameras.items():
        try:
            if len(camera) != episode.frames:
                raise DataError(f"camera '{key}' has {len(camera)} frames, the episode {episode.frames}")
            read = _clip_reader(camera) if isinstance(camera, VideoClip) else camera.read
            clip = watch(read, span, rows.where, rows.number, key, rows.fps, state)
        except (*EXPECTED, DpipeError) as error:
            examination.note("video-damaged", Found(f"{rows.where}, {key}", in_a_line(error)))
            continue
        examination.look(PICTURES, clip, clip.place)
        seen.add(clip)


def _clip_reader(clip: VideoClip) -> Reader:
    from ...video.decode import open_video

    reader = open_video(clip.path, "auto", clip.offset, clip.size)

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        return reader.read(slice(clip.first_frame + start, clip.first_frame + stop))

    return read
