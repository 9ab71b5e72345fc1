"""Numbering last: from the receipts of parts to the tables and meta files of a LeRobot v3.0 dataset.

Everything is staged under `dpipe/staging`, a redo log names every move, then the moves are made with
`meta/info.json` and `dpipe/manifest.json` first taken away and last put back: at any moment the folder is the
old dataset, plainly unfinished, or the new dataset. Videos are never touched here.

Of a million episodes this takes minutes, so a request to stop is heard between any two files: before the redo log
is written nothing has happened, after it the next run makes the moves that are left.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.episode import Dropped, Embodiment
from ..schemas.errors import DataError
from ..schemas.features import DEFAULT_FEATURES, CameraFeature, Feature
from ..schemas.statistics import Blocks
from .durable import POINT, move_file, sync_folder, write_file, write_json
from .execute import StopRequest
from .payload import VideoOptions, sidecar_file, staged_data, staged_sidecar
from .progress import Progress
from .receipts import (
    COMPARED,
    COUNTS,
    NUMBERS,
    Receipts,
    load_receipts,
    read_statistics,
    receipt_schema,
    stage_statistics,
)
from .statistics import (
    arange_statistics,
    constant_statistics,
    dataset_statistics,
    histogram_statistics,
    histograms_statistics,
    weighted_statistics,
)
from .tables import (
    EPISODES_PATH,
    EPISODES_PER_FILE,
    STATISTICS,
    data_file,
    data_schema,
    has_language,
    info_json,
    part_place,
    read_in_turn,
    statistics_type,
    write_parquet,
    write_tasks,
)

if TYPE_CHECKING:
    import pyarrow as pa

STATISTICS_UP_TO = 50_000
"""Episodes beyond which per-episode statistics stay out of meta/: at 13 kB each, lerobot could not hold them."""

EPISODES_AT_A_TIME = 4_096  # rows of meta/episodes, which may be 13 kB each
ROWS_AT_A_TIME = 16_384  # episodes whose words are held as Python objects
HELD_BYTES = 128 << 20  # columns gathered for their statistics: more goes to files
BLOCK_BYTES = 4 << 20  # of a gathered column, read at a time
NUMBERED = "numbered"  # below staging: files written anew because their rows moved


@dataclass(frozen=True)
class FinishResult:
    episodes: int
    frames: int
    bytes: int
    dropped: tuple[Dropped, ...]
    unchanged: bool


def recover(root: Path, stop: StopRequest) -> None:
    """Finish the moves of a run that was killed while it made them."""
    log = root / "dpipe" / "staging" / "moves.json"
    if log.is_file():
        _apply(root, json.loads(log.read_text()), stop)


def finish(
    root: Path,
    *,
    name: str,
    source: str,
    converter_version: int,
    options: Mapping[str, Any],
    video: VideoOptions,
    embodiment: Embodiment,
    order: Sequence[str],
    homes: NDArray[np.int64],
    scan_dropped: Sequence[Dropped],
    warnings: Sequence[str],
    stop: StopRequest,
    progress: Progress,
) -> FinishResult:
    """Number the episodes of `order` and put the dataset's tables in place; a no-op when nothing changed.

    `homes` is the part each was first listed in: its place among the data files, whatever is redone later.
    """
    stop.check()
    manifest_path = root / "dpipe" / "manifest.json"
    known = load_receipts(root, COMPARED if manifest_path.is_file() else None, stop)
    state, alive, listed, dropped = _state(
        known, order, scan_dropped, name, source, converter_version, options, video
    )
    if manifest_path.is_file():
        manifest = json.loads(manifest_path.read_text())
        if manifest.get("state") == state:
            totals = manifest["totals"]
            return FinishResult(totals["episodes"], totals["frames"], totals["bytes"], tuple(dropped), True)
    if not len(alive):
        reasons = "\n".join(f"    {d.source_id}: {d.reason}" for d in dropped[:10])
        raise DataError(
            f"every episode had to be left out; there is no dataset to write\n  found:\n{reasons}"
        )

    if manifest_path.is_file():
        known = load_receipts(root, stop=stop)
    episodes = _Episodes(known, alive, homes[listed])
    staging = root / "dpipe" / "staging"
    for leftover in ("meta", "dpipe/journal", NUMBERED):
        shutil.rmtree(staging / leftover, ignore_errors=True)
    _stage_own_tables(staging, episodes, stop)
    _stage_receipts(staging, episodes, stop)
    episodes.receipts.keep([*COUNTS, "staged"])
    data, unused = _stage_data(root, episodes, embodiment, stop)
    pictures, each = _pass_statistics(root, episodes, embodiment, stop)
    statistics = _dataset_statistics(data, episodes, embodiment, staging, stop, progress) | pictures
    statistics = {key: statistics[key] for key in _in_order(episodes, embodiment)}
    tasks = episodes.tasks
    cameras = [CameraFeature(key, s["height"], s["width"]) for key, s in episodes.streams.items()]
    totals = {"episodes": len(episodes), "frames": int(episodes.frames.sum()), "tasks": len(tasks)}
    write_tasks(staging / "meta" / "tasks.parquet", tasks)
    write_json(staging / "meta" / "stats.json", statistics)
    _stage_episodes(staging, episodes, embodiment, each, stop)
    described = [
        (camera, _stream_info(episodes.streams[camera.key], video, embodiment.fps)) for camera in cameras
    ]
    info = info_json(
        embodiment.features,
        described,
        embodiment.robot_type,
        embodiment.fps,
        totals,
        episodes.splits,
        has_language(embodiment),
    )
    write_json(staging / "meta" / "info.json", info, indent=4)
    write_file(
        staging / "dpipe" / "dropped.jsonl",
        "".join(json.dumps(d.to_json(), ensure_ascii=False) + "\n" for d in dropped).encode(),
    )
    videos = (p for p in (root / "videos").rglob("*.mp4") if p.name[0] != ".")
    size = sum(p.stat().st_size for paths in (data, videos) for p in paths)
    manifest = {
        "dpipe": 1,
        "name": name,
        "source": source,
        "converter_version": converter_version,
        "options": dict(options),
        "video": video.to_json(),
        "embodiment": _embodiment_json(embodiment, episodes.variant),
        "conventions": dict(embodiment.conventions),
        "licence": embodiment.licence,
        "splits": episodes.splits,
        "totals": totals | {"bytes": size},
        "cameras": {camera.key: [camera.height, camera.width] for camera in cameras},
        "parts": episodes.part_ranges(),
        "dropped": len(dropped),
        "warnings": list(warnings),
        "state": state,
    }
    from .card import dataset_card

    write_file(staging / "README.md", dataset_card(manifest, tasks, dropped).encode())
    write_json(staging / "dpipe" / "manifest.json", manifest)
    stage_statistics(root, staging, stop)
    stop.check()
    _commit(root, staging, unused, stop)
    return FinishResult(totals["episodes"], totals["frames"], size, tuple(dropped), False)


class _Episodes:
    """The kept episodes as columns, numbered: one place for every index that is global."""

    def __init__(self, receipts: Receipts, kept: NDArray[np.int64], home: NDArray[np.int64]) -> None:
        self.receipts = receipts
        self.kept = kept  # rows of the receipts, in the order of the dataset
        self.frames = receipts.numbers("frames")[kept]
        self.stop = np.cumsum(self.frames)
        self.start = self.stop - self.frames
        self.part = receipts.numbers("part")[kept]  # where its pixels are
        self.source_id = [receipts.source_ids[row] for row in kept.tolist()]
        self.home = home  # where its rows belong
        self.first_frame = receipts.numbers("first_frame")[kept]
        self.split = _pick(receipts.texts("split"), kept)
        self.variant = receipts.texts("variant")[int(kept[0])]
        self.instruction = _pick(receipts.texts("instruction"), kept)
        self.tasks: list[str] = list(dict.fromkeys(self.instruction))
        number = {task: i for i, task in enumerate(self.tasks)}
        self.task_index = np.array([number[text] for text in self.instruction], np.int64)
        self.streams: dict[str, Any] = receipts.streams
        self.splits = _split_ranges(self.split)

    def __len__(self) -> int:
        return len(self.kept)

    def numbers(self, episode: int) -> tuple[int, int, int]:
        return episode, int(self.start[episode]), int(self.task_index[episode])

    def all_numbers(self) -> NDArray[np.int64]:
        """[episodes, 3]: episode_index, index of its first row, task_index."""
        return np.stack([np.arange(len(self)), self.start, self.task_index], axis=1)

    def homes(self) -> Iterator[tuple[int, range]]:
        """Data parts in order, each with its episodes (consecutive numbers by construction)."""
        bounds = [0, *(np.flatnonzero(np.diff(self.home)) + 1).tolist(), len(self)]
        for first, last in pairwise(bounds):
            yield int(self.home[first]), range(first, last)

    def part_ranges(self) -> list[dict[str, int]]:
        return [
            {
                "part": part,
                "first_episode": block.start,
                "episodes": len(block),
                "frames": int(self.frames[block.start : block.stop].sum()),
            }
            for part, block in self.homes()
        ]

    def texts(self, name: str, block: slice) -> pa.Array:
        """A column of words of the receipts, for a run of episodes."""
        return self.receipts.column(name, self.kept[block])


def _pick(values: list[str], rows: NDArray[np.int64]) -> list[str]:
    return [values[row] for row in rows]


def _blocks(count: int, size: int = ROWS_AT_A_TIME) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _stage_data(
    root: Path, episodes: _Episodes, embodiment: Embodiment, stop: StopRequest
) -> tuple[list[Path], list[Path]]:
    """Bring every data part to its final numbers: the files in order, wherever they are, and staged ones of no use.

    A file whose rows moved is written anew below `staging/numbered`. What it is written from stays until the moves
    are made: a run that is killed before them begins again.
    """
    import pyarrow.parquet as pq

    receipts, kept = episodes.receipts, episodes.kept
    groups = _row_groups(receipts)
    file_part, row_group = receipts.numbers("file_part")[kept], receipts.numbers("row_group")[kept]
    staged = receipts.numbers("staged")[kept]
    at = np.stack([receipts.numbers(f"at_{name}")[kept] for name in NUMBERS], axis=1)
    right = (at == episodes.all_numbers()).all(axis=1)
    schema = data_schema(embodiment.features, has_language(embodiment))
    opened: dict[Path, Any] = {}

    def rows(kind: str, episode: int) -> pa.Table:
        part = int(file_part[episode])
        if kind == "data":
            path = staged_data(root, part) if staged[episode] else root / data_file(part)
        else:
            path = staged_sidecar(root, part) if staged[episode] else root / sidecar_file(part)
        if path not in opened:
            if len(opened) > 32:
                opened.clear()
            opened[path] = pq.ParquetFile(path)
        return opened[path].read_row_group(int(row_group[episode]))

    staging = root / "dpipe" / "staging"
    files: list[Path] = []
    used: set[str] = set()
    for part, block in episodes.homes():
        stop.check()
        here = slice(block.start, block.stop)
        as_is = (
            len(block) == groups[part]
            and right[here].all()
            and (file_part[here] == part).all()
            and (row_group[here] == np.arange(len(block))).all()
        )
        if as_is:
            if staged[block.start]:
                files.append(staged_data(root, part))
                used |= {str(files[-1]), str(staged_sidecar(root, part))}
            else:
                files.append(root / data_file(part))
            continue
        files.append(staging / NUMBERED / data_file(part))
        write_parquet(files[-1], (_renumber(rows("data", e), episodes.numbers(e)) for e in block), schema)
        if embodiment.sidecar:
            side = staging / NUMBERED / sidecar_file(part)
            first = rows("sidecar", block[0])
            write_parquet(side, (rows("sidecar", e) for e in block), first.schema)
    opened.clear()
    # Staged and not used: only replacements or dropped episodes, or written anew; their rows live elsewhere now.
    payload = (path for name in ("data", "dpipe/columns") for path in (staging / name).rglob("*.parquet"))
    return files, [path for path in payload if str(path) not in used]


def _row_groups(receipts: Receipts) -> NDArray[np.int64]:
    """[parts]: row groups of each part's file, by the receipts of all that was ever written there."""
    part, group = receipts.numbers("file_part"), receipts.numbers("row_group")
    counts = np.zeros(int(max(part.max(initial=0), receipts.numbers("part").max(initial=0))) + 1, np.int64)
    np.maximum.at(counts, part[part >= 0], group[part >= 0] + 1)
    return counts


def _renumber(table: pa.Table, numbers: tuple[int, int, int]) -> pa.Table:
    import pyarrow as pa

    count = table.num_rows
    values = {
        "episode_index": np.full(count, numbers[0], np.int64),
        "index": np.arange(count, dtype=np.int64) + numbers[1],
        "task_index": np.full(count, numbers[2], np.int64),
    }
    for name, column in values.items():
        table = table.set_column(table.column_names.index(name), table.schema.field(name), pa.array(column))
    return table


def _in_order(episodes: _Episodes, embodiment: Embodiment) -> list[str]:
    """Features in the order of meta/stats.json."""
    cameras = [f"observation.images.{key}" for key in episodes.streams]
    return [*cameras, *(feature.name for feature in embodiment.features), *DEFAULT_FEATURES]


def _pass_statistics(
    root: Path, episodes: _Episodes, embodiment: Embodiment, stop: StopRequest
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """One pass over the receipts' statistics: pictures of the dataset, and columns [episodes] for meta/episodes.

    The columns are empty where there are too many episodes; nothing is then held but two counters a camera.
    """
    keys = list(episodes.streams)
    few = len(episodes) <= STATISTICS_UP_TO
    names = ["part", "row", *(f"histogram/{key}" for key in keys), *(f"counted/{key}" for key in keys)]
    vectors = [f"stats/{f.name}/{name}" for f in embodiment.features for name in STATISTICS] if few else []
    counts = {key: np.zeros((3, 256), np.int64) for key in keys}
    frames = dict.fromkeys(keys, 0)
    held: dict[str, NDArray[Any]] = {}

    def hold(name: str, episode: NDArray[np.int64], values: NDArray[Any]) -> None:
        if name not in held:
            held[name] = np.zeros((len(episodes), values.shape[1]), values.dtype)
        held[name][episode] = values

    episode_at = _episode_places(episodes)
    for table in read_statistics(root, [*names, *vectors]) if keys or few else ():
        stop.check()
        numbers = episode_at(table.column("part").to_numpy(), table.column("row").to_numpy())
        mine = np.flatnonzero(numbers >= 0)
        if not len(mine):
            continue
        for key in keys:
            values = _list_rows(table.column(f"histogram/{key}"), mine).reshape(-1, 3, 256)
            counted = table.column(f"counted/{key}").to_numpy()[mine]
            counts[key] += values.sum(axis=0)
            frames[key] += int(counted.sum())
            for name, column in histograms_statistics(values, counted).items() if few else ():
                hold(f"stats/observation.images.{key}/{name}", numbers[mine], column)
        for name in vectors:
            hold(name, numbers[mine], _list_rows(table.column(name), mine))
    pictures = {f"observation.images.{key}": histogram_statistics(counts[key], frames[key]) for key in keys}
    return pictures, held


def _list_rows(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> NDArray[Any]:
    """A column of equally long lists as an array [rows, length]; left out episodes have no list."""
    whole = column.combine_chunks()
    there = np.asarray(whole.is_valid())
    values = whole.flatten().to_numpy(zero_copy_only=False).reshape(int(there.sum()), -1)
    return values[(np.cumsum(there) - 1)[rows]]


def _lists(values: NDArray[Any], camera: bool) -> pa.Array:
    """[episodes, D] as a column of lists; a camera's three colours as LeRobot nests them, each [1, 1]."""
    import pyarrow as pa

    array: pa.Array = pa.array(values.reshape(-1))
    widths = [1, 1, values.shape[1]] if camera else [values.shape[1]]
    for width in widths:
        ends = np.arange(0, len(array) + 1, width, dtype=np.int32)
        array = pa.ListArray.from_arrays(pa.array(ends), array)
    return array


def _episode_places(episodes: _Episodes) -> Any:
    """A function from receipts' places (part, row) to episodes, -1 for those that do not count any more."""
    part, row = episodes.receipts.numbers("part"), episodes.receipts.numbers("row")
    span = int(row.max(initial=0)) + 1
    place = part[episodes.kept] * span + row[episodes.kept]
    order = np.argsort(place, kind="stable")
    ranked = place[order]

    def find(parts: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        wanted = parts * span + rows
        at = np.minimum(np.searchsorted(ranked, wanted), len(ranked) - 1)
        return np.where(ranked[at] == wanted, order[at], -1)

    return find


def _dataset_statistics(
    files: Sequence[Path],
    episodes: _Episodes,
    embodiment: Embodiment,
    scratch: Path,
    stop: StopRequest,
    progress: Progress,
) -> dict[str, Any]:
    """Statistics of the columns, exact over every row; LeRobot's own columns follow from lengths alone."""
    with _gathered(files, [f.name for f in embodiment.features], scratch, stop, progress) as columns:
        result: dict[str, Any] = {name: dataset_statistics(blocks) for name, blocks in columns.items()}
    frames = episodes.frames
    total = int(frames.sum())
    longest = int(frames.max())
    # Frame t is there once for every episode longer than t.
    longer = np.cumsum(np.bincount(frames, minlength=longest + 1)[::-1])[::-1][1:]
    steps = np.arange(longest, dtype=np.float64)
    stamps = (steps / embodiment.fps).astype(np.float32).astype(np.float64)
    tasks = np.bincount(episodes.task_index, weights=frames.astype(np.float64))
    found = {
        "timestamp": weighted_statistics(stamps, longer),
        "frame_index": weighted_statistics(steps, longer),
        "episode_index": weighted_statistics(np.arange(len(episodes), dtype=np.float64), frames),
        "index": arange_statistics(0, total),
        "task_index": weighted_statistics(np.arange(len(tasks), dtype=np.float64), tasks.astype(np.int64)),
    }
    return result | {name: found[name] for name in DEFAULT_FEATURES}


@contextmanager
def _gathered(
    files: Sequence[Path], names: Sequence[str], scratch: Path, stop: StopRequest, progress: Progress
) -> Iterator[dict[str, Blocks]]:
    """Columns of many files as blocks [n, D], to be passed over again and again.

    Opening a small file costs far more than its rows: each is opened once, and what does not fit in memory is kept
    as plain numbers in files without a name.
    """
    with ExitStack() as stack:
        size = HELD_BYTES // max(1, len(names))
        held = {
            name: stack.enter_context(SpooledTemporaryFile(max_size=size, dir=str(scratch))) for name in names
        }
        kinds: dict[str, tuple[np.dtype[Any], int]] = {}
        progress.begin("number", len(files), "files")
        for table in read_in_turn(files, names):
            stop.check()
            progress.advance(1, table.num_rows, table.nbytes)
            for name in names:
                column = table.column(name).combine_chunks()
                flat = column.flatten() if hasattr(column, "flatten") and column.type.num_fields else column
                values = np.ascontiguousarray(np.asarray(flat).reshape(len(column), -1))
                kinds.setdefault(name, (values.dtype, values.shape[1]))
                held[name].write(values.data)
        progress.end()
        yield {name: partial(_blocks_of, held[name], *kinds[name], stop) for name in kinds}


def _blocks_of(
    file: IO[bytes], dtype: np.dtype[Any], width: int, stop: StopRequest
) -> Iterator[NDArray[Any]]:
    file.seek(0)
    row = dtype.itemsize * width
    while block := file.read(max(1, BLOCK_BYTES // row) * row):
        stop.check()
        yield np.frombuffer(block, dtype).reshape(-1, width)


def _stage_episodes(
    staging: Path,
    episodes: _Episodes,
    embodiment: Embodiment,
    each: Mapping[str, NDArray[Any]],
    stop: StopRequest,
) -> None:
    """meta/episodes: one row an episode, files of at most EPISODES_PER_FILE rows, some rows at a time."""
    schema = _episodes_table(episodes, embodiment, each, 0, slice(0, 1)).schema
    for index, rows in enumerate(_blocks(len(episodes), EPISODES_PER_FILE)):
        stop.check()
        tables = (
            _episodes_table(
                episodes, embodiment, each, index, slice(rows.start + b.start, rows.start + b.stop)
            )
            for b in _blocks(rows.stop - rows.start, EPISODES_AT_A_TIME)
        )
        write_parquet(staging / EPISODES_PATH.format(chunk_index=0, file_index=index), tables, schema)


def _episodes_table(
    episodes: _Episodes, embodiment: Embodiment, each: Mapping[str, NDArray[Any]], file: int, block: slice
) -> pa.Table:
    import pyarrow as pa

    fps = embodiment.fps
    count = block.stop - block.start
    chunk, place = part_place(episodes.home[block])
    columns: dict[str, Any] = {
        "episode_index": pa.array(np.arange(block.start, block.stop)),
        "tasks": pa.array([[text] for text in episodes.instruction[block]], pa.list_(pa.string())),
        "length": pa.array(episodes.frames[block]),
        "data/chunk_index": pa.array(chunk),
        "data/file_index": pa.array(place),
        "dataset_from_index": pa.array(episodes.start[block]),
        "dataset_to_index": pa.array(episodes.stop[block]),
    }
    first, frames = episodes.first_frame[block], episodes.frames[block]
    video_chunk, video_place = part_place(episodes.part[block])
    for key in episodes.streams:
        prefix = f"videos/observation.images.{key}"
        columns[f"{prefix}/chunk_index"] = pa.array(video_chunk)
        columns[f"{prefix}/file_index"] = pa.array(video_place)
        # Frames over fps, not sums of durations: what lerobot's users see drift cannot drift.
        columns[f"{prefix}/from_timestamp"] = pa.array(first / fps)
        columns[f"{prefix}/to_timestamp"] = pa.array((first + frames) / fps)
    for name, values in each.items():
        _, feature, statistic = name.split("/")
        camera = feature.startswith("observation.images.") and statistic != "count"
        columns[name] = _lists(values[block], camera)
    if each:
        columns |= _default_statistics(episodes, fps, block)
    columns["meta/episodes/chunk_index"] = pa.array(np.zeros(count, np.int64))
    columns["meta/episodes/file_index"] = pa.array(np.full(count, file, np.int64))
    columns["split"] = pa.array(episodes.split[block], pa.string())
    columns["source_id"] = pa.array(episodes.source_id[block], pa.string())
    return pa.table(columns)


def _default_statistics(episodes: _Episodes, fps: int, block: slice) -> dict[str, pa.Array]:
    import pyarrow as pa

    result: dict[str, pa.Array] = {}
    for name in DEFAULT_FEATURES:
        each = []
        for episode in range(block.start, block.stop):
            frames = int(episodes.frames[episode])
            if name == "timestamp":
                frame = arange_statistics(0, frames)
                each.append({s: v if s == "count" else [x / fps for x in v] for s, v in frame.items()})
            elif name == "frame_index":
                each.append(arange_statistics(0, frames))
            elif name == "index":
                each.append(arange_statistics(int(episodes.start[episode]), frames))
            else:
                value = episode if name == "episode_index" else int(episodes.task_index[episode])
                each.append(constant_statistics(value, frames))
        for statistic in STATISTICS:
            values = [statistics[statistic] for statistics in each]
            result[f"stats/{name}/{statistic}"] = pa.array(values, statistics_type(False, statistic))
    return result


def _stage_own_tables(staging: Path, episodes: _Episodes, stop: StopRequest) -> None:
    """dpipe/episodes.parquet and dpipe/segments.parquet."""
    import pyarrow as pa

    def own(block: slice) -> pa.Table:
        stop.check()
        return pa.table(
            {
                "episode_index": pa.array(np.arange(block.start, block.stop)),
                "source_id": pa.array(episodes.source_id[block], pa.string()),
                "split": pa.array(episodes.split[block], pa.string()),
                "variant": pa.array([episodes.variant] * (block.stop - block.start), pa.string()),
                "frames": pa.array(episodes.frames[block]),
                "instruction": pa.array(episodes.instruction[block], pa.string()),
                "content": episodes.texts("content", block),
                "metadata": episodes.texts("metadata", block),
                "part": pa.array(episodes.home[block]),
                "video_part": pa.array(episodes.part[block]),
                "video_first_frame": pa.array(episodes.first_frame[block]),
            }
        )

    first = own(slice(0, 1))
    blocks = list(_blocks(len(episodes)))
    write_parquet(staging / "dpipe" / "episodes.parquet", map(own, blocks), first.schema)
    schema = pa.schema(
        [
            ("episode_index", pa.int64()),
            ("start", pa.int64()),
            ("stop", pa.int64()),
            ("text", pa.string()),
            ("task", pa.string()),
        ]
    )

    def segments(block: slice) -> pa.Table:
        stop.check()
        rows = [
            {"episode_index": episode, **segment}
            for episode, text in enumerate(episodes.texts("segments", block).to_pylist(), block.start)
            for segment in json.loads(text)
        ]
        return pa.Table.from_pylist(rows, schema=schema)

    write_parquet(staging / "dpipe" / "segments.parquet", map(segments, blocks), schema)


def _stage_receipts(staging: Path, episodes: _Episodes, stop: StopRequest) -> None:
    """journal/receipts.parquet: the receipt of every episode, with where its rows lie once the moves are made."""
    import pyarrow as pa

    receipts = episodes.receipts
    latest = np.sort(np.fromiter(receipts.latest.values(), np.int64))
    located = {name: np.full(len(receipts), -1, np.int64) for name in ("file_part", "row_group", *NUMBERS)}
    for part, block in episodes.homes():
        rows = episodes.kept[block.start : block.stop]
        located["file_part"][rows], located["row_group"][rows] = part, np.arange(len(block))
    for name, values in zip(NUMBERS, episodes.all_numbers().T, strict=True):
        located[name][episodes.kept] = values
    schema = receipt_schema()
    replaced = {"file_part": located["file_part"], "row_group": located["row_group"]}
    replaced |= {f"at_{name}": located[name] for name in NUMBERS}

    def facts(block: slice) -> pa.Table:
        stop.check()
        rows = latest[block]
        columns = []
        for field in schema:
            if field.name == "staged":
                columns.append(pa.array(np.zeros(len(rows), np.int8)))
            elif field.name in replaced:
                columns.append(pa.array(replaced[field.name][rows]))
            else:
                column = receipts.column(field.name, rows)
                coded = pa.types.is_dictionary(field.type)
                columns.append(column.dictionary_encode() if coded else column)
        return pa.Table.from_arrays(columns, schema=schema)

    streams = json.dumps(episodes.streams)
    write_parquet(
        staging / "dpipe" / "journal" / "receipts.parquet",
        map(facts, _blocks(len(latest))),
        schema.with_metadata({"streams": streams}),
    )


def _commit(root: Path, staging: Path, unused: Sequence[Path], stop: StopRequest) -> None:
    """Name every move in a redo log, then make them; `recover` does the same after a kill."""
    last = ("meta/info.json", "dpipe/manifest.json")
    spare = {path.relative_to(staging).as_posix() for path in unused}
    sources = [name for name in _files_below(staging) if name not in spare and name != "moves.json"]
    moves = dict(sorted((name.removeprefix(f"{NUMBERED}/"), name) for name in sources))
    moves |= {name: moves.pop(name) for name in last}
    before = {f"meta/episodes/{name}" for name in _files_below(root / "meta" / "episodes")}
    parts = [f"dpipe/journal/parts/{name}" for name in _files_below(root / "dpipe" / "journal" / "parts")]
    spared = [f"dpipe/staging/{name}" for name in spare]
    log = {"moves": moves, "remove": [*sorted(before - set(moves)), *parts, *sorted(spared)]}
    write_json(staging / "moves.json", log, indent=None)
    _apply(root, log, stop)


def _files_below(folder: Path) -> list[str]:
    """Names of files that are whole, relative to a folder; in order."""
    found = []
    for at, _, names in os.walk(folder):
        below = Path(at).relative_to(folder).as_posix() + "/"
        found += [below.removeprefix("./") + name for name in names if name[0] != "."]
    return sorted(found)


def _apply(root: Path, log: Mapping[str, Any], stop: StopRequest) -> None:
    """Make the moves; each folder is made durable once, and before the two files that make it a dataset."""
    staging = root / "dpipe" / "staging"
    *first, info, manifest = log["moves"].items()
    if (staging / info[1]).is_file():
        for name in (manifest[0], info[0]):
            POINT(f"unlink {name}")
            (root / name).unlink(missing_ok=True)
    for name in log["remove"]:
        stop.check()
        (root / name).unlink(missing_ok=True)
    folders = sorted({(root / target).parent for target in log["moves"]})
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for target, source in first:
        stop.check()
        POINT(f"rename {target}")
        if (staging / source).is_file():
            (staging / source).replace(root / target)
    for folder in folders:
        POINT(f"fsync {folder.name}")
        sync_folder(folder)
    for target, source in (info, manifest):
        if (staging / source).is_file():
            move_file(staging / source, root / target)
    shutil.rmtree(staging)


def _state(
    known: Receipts, order: Sequence[str], scanned: Sequence[Dropped], *settings: Any
) -> tuple[str, NDArray[np.int64], NDArray[np.int64], list[Dropped]]:
    """What the tables are made from: its digest (equal: nothing to do), rows of kept receipts, their places in
    `order`, and what is left out.
    """
    import xxhash

    rows = np.fromiter((known.latest.get(s, -1) for s in order), np.int64, len(order))
    listed = np.flatnonzero(rows >= 0)
    rows = rows[listed]
    bad = {row: text for row, text in enumerate(known.texts("dropped")) if text}
    late = []
    if bad:
        split, remedy = known.texts("split"), known.texts("remedy")
        late = [
            Dropped(known.source_ids[row], (), bad[row], remedy[row], split[row])
            for row in rows.tolist()
            if row in bad
        ]
        good = np.array([row not in bad for row in rows.tolist()], bool)
        rows, listed = rows[good], listed[good]
    dropped = sorted([*scanned, *late], key=lambda d: (d.split, d.source_id))
    hasher = xxhash.xxh3_128()
    digests = [text for (text,) in known.rows(["raw_digest"])]
    parts = known.numbers("part")
    for row in rows.tolist():
        hasher.update(f"{known.source_ids[row]}\n{digests[row]}\n{parts[row]}\n".encode())
    facts = [d.to_json() for d in dropped]
    plain = [s.to_json() if isinstance(s, VideoOptions) else s for s in settings]
    hasher.update(json.dumps([facts, plain], sort_keys=True, default=str).encode())
    return hasher.hexdigest(), rows, listed, dropped


def _split_ranges(splits: Sequence[str]) -> dict[str, str]:
    """{"train": "0:40", "validation": "40:50"}; a split that later runs grew lists its ranges with commas."""
    ranges: dict[str, list[list[int]]] = {}
    for episode, split in enumerate(splits):
        known = ranges.setdefault(split, [])
        if known and known[-1][1] == episode:
            known[-1][1] = episode + 1
        else:
            known.append([episode, episode + 1])
    return {split: ",".join(f"{a}:{b}" for a, b in known) for split, known in ranges.items()}


def _stream_info(stream: Mapping[str, Any], video: VideoOptions, fps: int) -> dict[str, Any]:
    """LeRobot's description of a camera's stream: the encoder's settings, or just the stream where it was copied."""
    from ..video.encode import PRESETS, copied_info

    if stream["kind"] == "encoded":
        return PRESETS[video.codec].info(stream["height"], stream["width"], fps)
    return copied_info(stream["codec"], stream["pix_fmt"], stream["height"], stream["width"], fps)


def _embodiment_json(embodiment: Embodiment, variant: str) -> dict[str, Any]:
    def described(features: Sequence[Feature]) -> dict[str, Any]:
        return {f.name: {k: v for k, v in asdict(f).items() if k != "name"} for f in features}

    return {
        "name": embodiment.name,
        "variant": variant,
        "robot_type": embodiment.robot_type,
        "fps": embodiment.fps,
        "fps_origin": embodiment.fps_origin,
        "features": described(embodiment.features),
        "sidecar": described(embodiment.sidecar),
        "citation": embodiment.citation,
    }
