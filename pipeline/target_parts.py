"""One part of one target, made in a worker: its arrays under temporary names, then its receipt."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.contract import ArraySpec
from ..stages import EpisodeView, FrameWish, Prepared, Run, Stage, load_stage
from ..streams.arrays import ArrayWriter, open_array
from ..streams.dataset import Dataset, open_dataset
from .durable import temporary_name, write_json
from .stage_view import DiskDataset, DiskEpisode, decode_ahead

if TYPE_CHECKING:
    from numpy.typing import NDArray

WAITING_BLOCKS = 4
COPIED_ROWS = 1024
# Parts below this are synced once, together, before the contract; until then a rerun checks their digests.
DURABLE_BYTES = 32 * 2**20
# Work that takes microseconds a frame goes through several data parts at once: creating files is what it costs.
POINTWISE_FRAMES = 131_072


@dataclass(frozen=True)
class PartJob:
    """Everything a worker needs to make one part of one target: paths, names and small values."""

    root: Path
    folder: Path
    stage: str
    params: Any
    part: int
    key: str
    episodes: tuple[int, ...]
    contents: tuple[str, ...]
    terms: str
    """Digest over the whole dataset and what was prepared: a worker that has others open opens these."""
    copies: Mapping[str, Mapping[str, tuple[str, int, int]]]
    """content -> array -> (folder, start row, rows) in an older part of the same target."""
    level: int | None = None


def cut_parts(dataset: Dataset, pointwise: bool) -> list[range]:
    """The episodes of each target part: those of a data part, of several where the work is pointwise."""
    parts, frames = [], 0
    for part in dataset.parts():
        more = int(dataset.episodes.length[part.start : part.stop].sum())
        if pointwise and parts and frames + more <= POINTWISE_FRAMES:
            parts[-1] = range(parts[-1].start, part.stop)
            frames += more
        else:
            parts.append(part)
            frames = more
    return parts


def make_part(job: PartJob) -> dict[str, Any]:
    """Make one part: every array, then its receipt. Runs in a worker; leaves nothing half-named behind."""
    view, stage, run, specs, wishes = _opened(job)
    lengths = view.dataset.episodes.length
    durable = expected_bytes(specs, lengths[list(job.episodes)]) >= DURABLE_BYTES
    paths = {spec.name: array_path(job.folder, spec, job.part, job.key) for spec in specs}
    writers = {spec.name: ArrayWriter(paths[spec.name], spec, job.level, durable) for spec in specs}
    sink = WriterThread(writers) if durable else DirectWriter(writers)
    episodes: list[dict[str, Any]] = []
    mine = [e for e, content in zip(job.episodes, job.contents, strict=True) if content not in job.copies]
    try:
        view.ahead = decode_ahead(view, wishes, mine)
        for span in _spans(job, view if stage.pointwise(job.params) else None):
            stretch = DiskEpisode(view, span)
            contents = job.contents[span.start - job.episodes[0] : span.stop - job.episodes[0]]
            rows = {spec.name: 0 for spec in specs}
            for block in _copied(job, contents[0]) if contents[0] in job.copies else run(stretch):
                for name, values in block.items():
                    sink.put(name, values)
                    rows[name] += len(values)
            _check_rows(stage, specs, rows, stretch)
            for position, content in zip(span, contents, strict=True):
                frames = int(lengths[position])
                # Rows of a stretch belong to its episodes frame by frame, or it would not be pointwise.
                counts = {spec.axis: rows[spec.name] if len(span) == 1 else frames for spec in specs}
                episodes.append({"content": content, "frames": frames, "rows": counts})
        sink.finish()
        for spec in specs:
            if paths[spec.name].exists():  # left by a run that was killed before its receipt
                shutil.rmtree(paths[spec.name])
            writers[spec.name].close()
    except BaseException:
        with contextlib.suppress(BaseException):
            sink.finish()
        for writer in writers.values():
            writer.abort()
        raise
    finally:
        for ahead in view.ahead.values():
            ahead.close()
        view.ahead = {}
    rows = {spec.axis: writers[spec.name].rows for spec in specs}
    size = sum(spec.row_bytes * rows[spec.axis] for spec in specs)
    receipt = {
        "part": job.part,
        "key": job.key,
        "rows": rows,
        "bytes": size,
        "durable": durable,
        "digests": {name: writer.digest for name, writer in writers.items()},
        "episodes": episodes,
    }
    path = receipt_path(job)
    if durable:
        write_json(path, receipt, indent=None)
    else:
        temporary = temporary_name(path)
        temporary.write_text(json.dumps(receipt) + "\n")
        temporary.replace(path)
    return {"receipt": receipt, "computed": len(mine), "copied": len(episodes) - len(mine), "bytes": size}


def _spans(job: PartJob, view: DiskDataset | None) -> Iterator[range]:
    """Episodes to work on one by one; with a `view`, runs of new ones within one of its parts at once."""
    start, end = job.episodes[0], job.episodes[0] + len(job.episodes)
    while start < end:
        stop = start + 1
        if view is not None and job.contents[start - job.episodes[0]] not in job.copies:
            last = min(view.parts[view.part_at(start)].stop, end)
            while stop < last and job.contents[stop - job.episodes[0]] not in job.copies:
                stop += 1
        yield range(start, stop)
        start = stop


def _copied(job: PartJob, content: str) -> Iterator[dict[str, NDArray[Any]]]:
    """An episode's rows from an older part of the same target."""
    for name, (place, start, rows) in job.copies[content].items():
        old = open_array(job.folder / place)
        for first in range(start, start + rows, COPIED_ROWS):
            yield {name: np.asarray(old[first : min(first + COPIED_ROWS, start + rows)])}


def expected_bytes(specs: Sequence[ArraySpec], lengths: NDArray[np.int64]) -> int:
    """Of arrays whose rows follow from the number of frames; ragged ones are not foreseen."""
    return sum(int((-(-lengths // spec.every)).sum()) * spec.row_bytes for spec in specs if spec.every)


def _check_rows(
    stage: Stage, specs: Sequence[ArraySpec], rows: Mapping[str, int], episode: EpisodeView
) -> None:
    """Arrays of one axis have the same rows, and as many as their spec says: else frames and targets part."""
    for spec in specs:
        axis = next(rows[other.name] for other in specs if other.axis == spec.axis)
        expected = spec.rows(episode.frames) if spec.every else axis
        if rows[spec.name] != expected:
            raise AssertionError(
                f"stage {stage.name} made {rows[spec.name]} rows of {spec.name} for episode {episode.index} "
                f"of {episode.frames} frames, not {expected}"
            )


Opened = tuple[DiskDataset, Stage, Run, tuple[ArraySpec, ...], tuple[FrameWish, ...]]
_OPEN: dict[tuple[Path, str], Opened] = {}


def _opened(job: PartJob) -> Opened:
    """The dataset and the stage's model, opened once per worker and target."""
    name = (job.root, job.terms)
    if name not in _OPEN:
        _OPEN.clear()
        stage = load_stage(job.stage)
        view = DiskDataset(open_dataset(job.root))
        prepared = load_prepared(job.folder, read_json(job.folder / "prepared.json"))
        run = stage.open(job.params, view.info, prepared)
        told = (job.params, view.info, prepared)
        _OPEN[name] = (view, stage, run, stage.makes(*told), stage.wishes(*told))
    return _OPEN[name]


class DirectWriter:
    """Appends blocks where they are made: for parts so small that a thread would cost more."""

    def __init__(self, writers: Mapping[str, ArrayWriter]) -> None:
        self._writers = writers

    def put(self, name: str, rows: NDArray[Any]) -> None:
        self._writers[name].append(rows)

    def finish(self) -> None:
        pass


class WriterThread:
    """Appends blocks to arrays in a thread of its own, so that writing hides behind the next block's work."""

    def __init__(self, writers: Mapping[str, ArrayWriter]) -> None:
        self._writers = writers
        self._waiting: queue.Queue[Any] = queue.Queue(WAITING_BLOCKS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def put(self, name: str, rows: NDArray[Any]) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.put((name, rows))

    def finish(self) -> None:
        """Everything is written; raises what went wrong on the way."""
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # drain, so that whoever puts never waits for ever
            try:
                self._writers[item[0]].append(item[1])
            except BaseException as error:  # noqa: BLE001 - raised again in the stage's own thread
                self._error = error


# --- files ----------------------------------------------------------------------------------------------------


def array_path(folder: Path, spec: ArraySpec, part: int, key: str) -> Path:
    return folder / spec.name / f"part-{part:05d}-{key}"


def receipt_path(job: PartJob) -> Path:
    return job.folder / "parts" / f"part-{job.part:05d}-{job.key}.json"


def load_prepared(folder: Path, saved: Mapping[str, Any]) -> Prepared:
    arrays = {name: np.load(folder / "prepared" / f"{name}.npy") for name in saved["arrays"]}
    return Prepared(saved["facts"], arrays, saved["contract"])


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
