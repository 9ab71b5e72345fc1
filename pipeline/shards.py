"""The parts of a dataset written as shards by as many workers as there are.

dpipe precompute shards     frames are decoded from the dataset
dpipe convert --shards      they were encoded beside the video, from the recorded frames, and wait in spool files
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..schemas.errors import DataError
from ..stages import build_params, load_stage
from ..streams.dataset import Dataset, open_dataset
from ..streams.shard_format import ShardOptions
from ..streams.shard_writing import finish_shards, is_written, plan_shards, write_part
from .durable import exclusive, remove_temporaries, require_space
from .execute import Executor, Failure, open_executor, stop_requests
from .payload import jpeg_section
from .progress import Progress
from .spool import read_spool, spool_name

BYTES_PER_PIXEL = 0.35  # of a JPEG at quality 90, from above: 0.30 measured at 128 px, 0.17 at 256 px


def make_shards(
    dataset: Dataset,
    params: Mapping[str, Any],
    folder: Path,
    workers: int,
    events: Progress,
    name: str = "",
    scheduler: str | None = None,
    max_time_s: float | None = None,
) -> tuple[Path, list[int], int]:
    """Write what is missing below `folder`; the shards' folder, parts written now, and bytes of all parts."""
    options = ShardOptions(**asdict(build_params(load_stage("shards"), params)))
    out = folder / (name or options.variant)
    waiting = parts_waiting(dataset, out, options)
    with (
        stop_requests(max_time_s) as stop,
        open_executor(stop, workers if len(waiting) > 1 else 0, scheduler) as executor,
    ):
        fill_shards(dataset, out, options, waiting, executor, events)
    return out, waiting, sum(path.stat().st_size for path in out.glob("part-*.parquet"))


def parts_waiting(dataset: Dataset, out: Path, options: ShardOptions) -> list[int]:
    """Parts whose shards are missing, or were made of what the dataset no longer holds."""
    return [n for n in range(len(dataset.parts())) if not is_written(dataset, out, n, options)]


def fill_shards(
    dataset: Dataset,
    out: Path,
    options: ShardOptions,
    waiting: Sequence[int],
    executor: Executor,
    events: Progress,
    spool: Path | None = None,
) -> None:
    """Write the parts that wait, a task each, then the index."""
    frames, parts = dataset.episodes.length, dataset.parts()
    left = int(sum(frames[parts[number].start : parts[number].stop].sum() for number in waiting))
    with exclusive(out, "dpipe precompute shards"):
        remove_temporaries(out)
        require_space(out, left * _row_bytes(dataset, options), "dpipe precompute shards")
        events.begin(f"shards of {dataset.name}", len(waiting), "parts")
        for number in waiting:
            executor.submit(number, _write_part, dataset.root, out, number, options, spool)
        for number, result in executor.results():
            if isinstance(result, Failure):
                raise DataError(f"shards, part {number}: {result.message}") from result.error
            events.advance(1, result)
        events.end()
        finish_shards(dataset, out, options)


def _write_part(root: Path, out: Path, number: int, options: ShardOptions, spool: Path | None) -> int:
    dataset = open_dataset(root)
    if spool is None:
        return write_part(dataset, out, number, options)
    # Of an episode that was redone, the newest: files begin with the number of their part.
    files = {path.stem.partition("-")[2]: path for path in sorted(spool.glob("*.episode"))}

    def ready(episode: int, camera: str) -> list[bytes] | None:
        path = files.get(spool_name(dataset.episodes.source_id(episode)))
        section = jpeg_section(camera.removeprefix("observation.images."), options)
        found = read_spool(path) if path is not None else None
        if found is None or section not in found.blobs:
            return None  # a copied clip, or a dataset finished before: decoded, as `precompute shards` does
        jpegs = found.pieces(section, found.arrays[f"sizes/{section}"])
        return jpegs if len(jpegs) == int(dataset.episodes.length[episode]) else None

    return write_part(dataset, out, number, options, ready)


def _row_bytes(dataset: Dataset, options: ShardOptions) -> int:
    plan = plan_shards(dataset, options)
    pixels = sum(height * width for height, width in plan.cameras.values())
    return sum(column.row_bytes for column in plan.columns) + int(BYTES_PER_PIXEL * pixels)
