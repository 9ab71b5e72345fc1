"""The payload of datasets made from datasets (`rearrange.py`): which episodes share a part, and the part's files.

whole      a part all of whose episodes come along, in their order: its videos become hard links where the disk has
           them (as in a conversion to v2.1), its sidecar is copied as it is, its rows only where a number changes
otherwise  packets are copied inside the kernel, rows are rewritten, one row group an episode

Files know nothing of one another and may be written at once; each is on disk when its function returns.
"""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..schemas.errors import DataError
from ..streams.dataset import Dataset, column_values
from .durable import hard_link, sync_path
from .statistics import column_statistics
from .tables import data_file, numbers_of, video_file, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

    from ..video.mp4 import SampleTable

PART_FRAMES = 16_384
LEAST_WHOLE = 2_048  # frames of a part taken over as it is: smaller ones are joined, or files would grow many
ROWS_AT_A_TIME = 8_192
OPEN_TABLES = 8
HELD_BYTES = 256 * 2**20  # of columns kept from writing to their statistics; larger ones are read again

Place = Callable[[Dataset, int], Path]


@dataclass
class Plan:
    """The new dataset's episodes in order, as columns [n], and how they lie in parts."""

    datasets: Sequence[Dataset]
    owner: NDArray[np.int64]  # whose episode
    episode: NDArray[np.int64]  # its number there
    split: list[str]
    length: NDArray[np.int64]
    tasks: list[str]
    renumber: list[NDArray[np.int64]]  # by dataset: its task_index -> the new one, -1 where unused
    first_task: NDArray[np.int64]  # new number of each episode's first sentence
    part: NDArray[np.int64] = field(init=False)
    whole: frozenset[int] = field(init=False)  # parts that are parts of a source

    def __post_init__(self) -> None:
        self.start = np.cumsum(self.length) - self.length
        self.videos_read = _SampleTables()
        self.part, self.whole = _parts(self)

    @property
    def first(self) -> Dataset:
        return self.datasets[0]

    @property
    def ours(self) -> bool:
        return all(dataset.own_manifest is not None for dataset in self.datasets)

    @cached_property
    def videos(self) -> list[str]:
        return [c for c in self.first.cameras if self.first.features[c]["dtype"] == "video"]

    @cached_property
    def counted(self) -> tuple[str, ...]:
        """Columns whose values a part gives back for statistics; none where they are too many to hold."""
        row = sum(int(np.prod(self.first.features[name]["shape"])) for name in self.first.vectors)
        held = 8 * row * int(self.length.sum()) <= HELD_BYTES
        return (*self.first.vectors, "task_index") if held else ()

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """[parts + 1] row at which each part begins."""
        return np.append(np.unique(self.part, return_index=True)[1], len(self.part))

    def parts(self) -> list[tuple[int, list[int]]]:
        bounds = self.bounds.tolist()
        return [(part, list(range(a, b))) for part, (a, b) in enumerate(pairwise(bounds))]


class Written(NamedTuple):
    """What writing a part has seen of its rows."""

    values: dict[str, NDArray[Any]]  # columns of `Plan.counted`, [frames, D] or [frames]
    odd_tasks: dict[int, dict[str, Any]]  # by row of the plan: statistics of task_index where it has several


# --- which episodes share a part --------------------------------------------------------------------------------


def _parts(plan: Plan) -> tuple[NDArray[np.int64], frozenset[int]]:
    """[n] part of each episode, and those that are whole parts of a source.

    Others have PART_FRAMES frames at most, and one set of codec settings a camera.
    """
    count = len(plan.length)
    part, whole = np.zeros(count, np.int64), set[int]()
    blocks = [_whole_parts(dataset, plan.videos) for dataset in plan.datasets]
    files = [_video_files(dataset, plan.videos) for dataset in plan.datasets]
    follows = (np.diff(plan.owner) == 0) & (np.diff(plan.episode) == 1)
    ends = np.append(np.flatnonzero(~follows) + 1, count)
    known: dict[tuple[int, ...], tuple[Any, ...]] = {}
    settings: tuple[Any, ...] | None = None  # of the part that still takes episodes
    frames, number, row = 0, -1, 0
    while row < count:
        d, e = int(plan.owner[row]), int(plan.episode[row])
        taken = blocks[d].get(e, 0)
        if taken and row + taken <= ends[np.searchsorted(ends, row, side="right")]:
            number, settings = number + 1, None
            part[row : row + taken] = number
            whole.add(number)
            row += taken
            continue
        key = (d, *files[d][e].tolist())
        if key not in known:
            dataset = plan.datasets[d]
            known[key] = tuple(plan.videos_read.entry(dataset.video_path(e, c)) for c in plan.videos)
        length = int(plan.length[row])
        if settings != known[key] or frames + length > PART_FRAMES:
            number, settings, frames = number + 1, known[key], 0
        frames += length
        part[row] = number
        row += 1
    return part, frozenset(whole)


def _video_files(dataset: Dataset, videos: Sequence[str]) -> NDArray[np.int64]:
    """[E, cameras] the video file each episode lies in, as one number."""
    places = [dataset.episodes.cameras[camera] for camera in videos]
    files = [place.chunk * 2**32 + place.file for place in places]
    return np.stack(files, axis=1) if files else np.zeros((len(dataset), 0), np.int64)


def _whole_parts(dataset: Dataset, videos: Sequence[str]) -> dict[int, int]:
    """First episode -> number of episodes of each part whose files hold these episodes and no others."""
    if dataset.own_manifest is None:
        return {}
    own, files = dataset.episodes, _video_files(dataset, videos)
    members = [dict(zip(*np.unique(column, return_counts=True), strict=True)) for column in files.T]
    found: dict[int, int] = {}
    for part in dataset.parts():
        here = slice(part.start, part.stop)
        lengths = own.length[here]
        starts = np.cumsum(lengths) - lengths
        alone = all(
            (files[here, c] == files[part.start, c]).all()
            and members[c][files[part.start, c]] == len(part)
            and np.array_equal(own.cameras[camera].first_frame[here], starts)
            for c, camera in enumerate(videos)
        )
        if alone and lengths.sum() >= LEAST_WHOLE and np.array_equal(own.first_row[here], starts):
            found[part.start] = len(part)
    return found


# --- video ------------------------------------------------------------------------------------------------------


class _SampleTables:
    """Sample tables of video files; the few read last are kept, and of every one what decides about joining."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, SampleTable] = OrderedDict()
        self._entries: dict[Path, tuple[Any, ...]] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> SampleTable:
        from ..video.mp4 import common_entry, read_table

        with self._lock:
            table = self._kept.get(path)
            if table is None:
                if not path.is_file():
                    raise DataError(
                        f"no video {path}\n  next: restore the file;  dpipe doctor says what else is missing"
                    )
                table = self._kept[path] = read_table(path)
                settings = (table.codec, table.width, table.height, common_entry(table.sample_entry))
                self._entries[path] = settings
                if len(self._kept) > OPEN_TABLES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(path)
            return table

    def entry(self, path: Path) -> tuple[Any, ...]:
        if path not in self._entries:
            self.open(path)
        return self._entries[path]


def write_video(tree: Path, plan: Plan, part: int, rows: Sequence[int], camera: str) -> None:
    path = tree / video_file(camera, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    if part not in plan.whole or not _take_video(path, plan, camera, rows):
        _copy_packets(path, plan, camera, rows)
        sync_path(path)


def _take_video(path: Path, plan: Plan, camera: str, rows: Sequence[int]) -> bool:
    """Take over a source's file, which holds these episodes and nothing else; False where it does not after all."""
    dataset, episode = plan.datasets[plan.owner[rows[0]]], int(plan.episode[rows[0]])
    source = dataset.video_path(episode, camera)
    table = plan.videos_read.open(source)
    if len(table.shown) != int(plan.length[rows].sum()) or _problem(table, dataset, 0, len(table.shown)):
        return False
    if not hard_link(source, path):
        _copy(source, path)
    return True


def _copy(source: Path, path: Path) -> None:
    """A file as it is, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    sync_path(path)


def _problem(table: SampleTable, dataset: Dataset, first: int, frames: int) -> str | None:
    from ..video.mp4 import copy_problem

    return copy_problem(table, dataset.fps, first, frames)


def _copy_packets(path: Path, plan: Plan, camera: str, rows: Sequence[int]) -> None:
    from ..video.mp4 import copy_run, write_mp4

    runs, table, file = [], None, [-1, -1]
    # Neighbours in one file lie together in it: one stretch to check and one to copy, in the kernel.
    for *there, run in _neighbours(plan, rows, camera):
        dataset, episode = plan.datasets[plan.owner[run[0]]], int(plan.episode[run[0]])
        if table is None or there != file:
            table, file = plan.videos_read.open(dataset.video_path(episode, camera)), there
        first = int(dataset.episodes.cameras[camera].first_frame[episode])
        frames = int(plan.length[run].sum())
        problem = _problem(table, dataset, first, frames)
        if problem:
            raise DataError(
                f"{table.path}: frames of episode {episode} cannot be cut out ({problem})\n"
                f"  next: convert {dataset.name} first, which encodes it again:  dpipe convert lerobot"
            )
        runs.append(copy_run(table, first, frames))
    assert table is not None
    write_mp4(path, table.sample_entry, table.width, table.height, plan.first.fps, runs)


def _neighbours(plan: Plan, rows: Sequence[int], camera: str) -> Iterator[tuple[int, int, list[int]]]:
    """Runs of rows whose episodes' frames follow one another in one video file: dataset, number of the file, rows."""
    owner, episode = plan.owner[rows], plan.episode[rows]
    file, first = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for d, dataset in enumerate(plan.datasets):
        mine, own = owner == d, dataset.episodes.cameras[camera]
        file[mine] = own.chunk[episode[mine]] * 2**32 + own.file[episode[mine]]
        first[mine] = own.first_frame[episode[mine]]
    follows = (np.diff(owner) == 0) & (np.diff(file) == 0) & (np.diff(first) == plan.length[rows][:-1])
    starts = np.append(0, np.flatnonzero(~follows) + 1)
    for a, b in pairwise([*starts.tolist(), len(rows)]):
        yield int(owner[a]), int(file[a]), list(rows[a:b])


# --- rows -------------------------------------------------------------------------------------------------------


def data_schema_of(dataset: Dataset) -> pa.Schema:
    """The recorder's form: fixed-size lists, Hugging Face's description where the dataset has it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = pq.read_schema(dataset.data_path(0))
    fields = []
    for name, told in dataset.features.items():
        if told["dtype"] == "video":
            continue
        shape, there = list(told["shape"]), found.field(name).type
        plain = pa.types.is_list(there) and len(shape) == 1 and not pa.types.is_nested(there.value_type)
        if plain and told["dtype"] not in ("language", "string"):
            there = pa.list_(there.value_type, shape[0])
        fields.append(pa.field(name, there))
    described = (found.metadata or {}).get(b"huggingface")
    return pa.schema(fields, {b"huggingface": described} if described else None)


def write_rows(tree: Path, plan: Plan, part: int, rows: Sequence[int]) -> Written:
    """The part's data file, a row group an episode; copied as it is where no number in it changes."""
    path = tree / data_file(part)
    schema, files = data_schema_of(plan.first), _Files()
    seen: dict[str, list[NDArray[Any]]] = {name: [] for name in plan.counted}
    written = Written({}, {})

    def numbered() -> Iterator[pa.Table]:
        for run, table in _blocks(plan, rows, schema, files, Dataset.data_path):
            renumbered = _renumbered(plan, run, table, schema, written.odd_tasks)
            for name, values in seen.items():
                where = f"'{name}' of {plan.datasets[plan.owner[run[0]]].root}"
                values.append(column_values(renumbered.column(name), plan.first.features[name], where))
            yield from _by_episode(plan, run, renumbered)

    source = _unchanged(plan, part, rows, schema, files) if _keeps_numbers(plan, rows) else None
    if source is None:
        write_parquet(path, numbered(), schema, sync=False)
        sync_path(path)
    else:
        for _ in numbered():
            pass
        _copy(source, path)
    written.values.update({name: np.concatenate(values) for name, values in seen.items()})
    return written


def write_sidecar(tree: Path, plan: Plan, part: int, rows: Sequence[int]) -> None:
    """Columns that dpipe keeps beside the data carry no numbers: a whole part's file stays as it is."""
    path = tree / "dpipe" / "columns" / data_file(part).removeprefix("data/")
    files = _Files()
    schema = files.open(plan.first.sidecar_path(0)).file.schema_arrow.remove_metadata()
    source = _unchanged(plan, part, rows, schema, files, Dataset.sidecar_path)
    if source is not None:
        _copy(source, path)
        return
    blocks = _blocks(plan, rows, schema, files, Dataset.sidecar_path)
    tables = (table for run, block in blocks for table in _by_episode(plan, run, block))
    write_parquet(path, tables, schema, sync=False)
    sync_path(path)


def _keeps_numbers(plan: Plan, rows: Sequence[int]) -> bool:
    """Whether index, episode_index and task_index of these rows, a stretch of one dataset, are to stay."""
    d, e = int(plan.owner[rows[0]]), int(plan.episode[rows[0]])
    tasks = plan.renumber[d]
    same = tasks[tasks >= 0] == np.flatnonzero(tasks >= 0)
    return (
        rows[0] == e
        and int(plan.start[rows[0]]) == int(plan.datasets[d].episodes.first_index[e])
        and same.all()
    )


def _unchanged(
    plan: Plan,
    part: int,
    rows: Sequence[int],
    schema: pa.Schema,
    files: _Files,
    place: Place = Dataset.data_path,
) -> Path | None:
    """The file of a whole part, where it is what would be written: these columns, a row group an episode."""
    if part not in plan.whole:
        return None
    source = place(plan.datasets[plan.owner[rows[0]]], int(plan.episode[rows[0]]))
    file, ends = files.open(source)
    same = np.array_equal(ends, np.cumsum(plan.length[rows]))
    return source if same and file.schema_arrow.remove_metadata().equals(schema.remove_metadata()) else None


def _renumbered(
    plan: Plan, run: Sequence[int], table: pa.Table, schema: pa.Schema, odd_tasks: dict[int, dict[str, Any]]
) -> pa.Table:
    """Rows of the episodes `run`, which follow one another in the plan, under their new numbers."""
    import pyarrow as pa

    dataset, renumber = plan.datasets[plan.owner[run[0]]], plan.renumber[plan.owner[run[0]]]
    lengths, told = plan.length[run], table.column("task_index")
    old = np.zeros(0, np.int64) if told.null_count else numbers_of(told)
    known = len(old) == len(table) and old.min() >= 0 and old.max() < len(renumber)
    tasks = renumber[old] if known else np.full(len(table), -1)
    starts = np.cumsum(lengths) - lengths
    lowest = np.minimum.reduceat(tasks, starts)
    if lowest.min() < 0:
        episode = plan.episode[run[int(np.flatnonzero(lowest < 0)[0])]]
        raise DataError(
            f"{dataset.root}: rows of episode {episode} carry an instruction that meta/episodes does not list\n"
            "  next: dpipe doctor says what else disagrees"
        )
    for i in np.flatnonzero(lowest != np.maximum.reduceat(tasks, starts)).tolist():
        odd_tasks[run[i]] = column_statistics(tasks[starts[i] : starts[i] + lengths[i]])
    numbers = {
        "episode_index": np.repeat(np.asarray(run, np.int64), lengths),
        "index": np.arange(len(table), dtype=np.int64) + plan.start[run[0]],
        "task_index": tasks,
    }
    columns = [
        pa.array(numbers[field.name], field.type) if field.name in numbers else table.column(field.name)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _by_episode(plan: Plan, run: Sequence[int], table: pa.Table) -> Iterator[pa.Table]:
    at = 0
    for length in plan.length[run].tolist():
        yield table.slice(at, length)
        at += length


class _Opened(NamedTuple):
    file: pq.ParquetFile
    ends: NDArray[np.int64]  # [row groups] rows until the end of each


class _Files:
    """Parquet files read last; of one thread."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Opened] = OrderedDict()

    def open(self, path: Path) -> _Opened:
        import pyarrow.parquet as pq

        if path not in self._open:
            try:
                file = pq.ParquetFile(path, pre_buffer=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path} cannot be read as Parquet\n  found: {error}") from error
            metadata = file.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._open[path] = _Opened(file, np.cumsum(sizes, dtype=np.int64))
            if len(self._open) > OPEN_TABLES:
                self._open.popitem(last=False)[1].file.close()
        return self._open[path]


def _blocks(
    plan: Plan, rows: Sequence[int], schema: pa.Schema, files: _Files, place: Place
) -> Iterator[tuple[list[int], pa.Table]]:
    """(episodes, their rows) in order; what lies in one file is read in one go, some thousand rows at most."""
    import pyarrow as pa

    images = any(told["dtype"] == "image" for told in plan.first.features.values())
    for run in _in_one_file(plan, rows, 1 if images else ROWS_AT_A_TIME):
        dataset, episodes = plan.datasets[plan.owner[run[0]]], plan.episode[run]
        path = place(dataset, int(episodes[0]))
        file, ends = files.open(path)
        start = dataset.episodes.first_row[episodes]
        stop = start + plan.length[run]
        if not len(ends) or stop.max() > ends[-1]:
            raise DataError(f"{path} ends before row {stop.max()}\n  next: dpipe doctor {dataset.root}")
        first, last = (np.searchsorted(ends, at, side="right") for at in (start, stop - 1))
        groups = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        table = file.read_row_groups(groups.tolist(), columns=schema.names, use_threads=False)
        table = table.select(schema.names)
        sizes = np.diff(ends, prepend=0)
        before = np.cumsum(sizes[groups]) - sizes[groups]  # rows read before each group
        at = before[np.searchsorted(groups, first)] + start - (ends - sizes)[first]
        if (np.diff(at) == plan.length[run][:-1]).all():
            table = table.slice(int(at[0]), int(plan.length[run].sum()))
        else:
            pieces = zip(at.tolist(), plan.length[run].tolist(), strict=True)
            table = pa.concat_tables([table.slice(a, n) for a, n in pieces])
        if not table.schema.equals(schema):
            try:
                table = table.cast(schema)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"{path}: columns of other types than in {plan.first.root}\n  found: {error}"
                ) from error
        yield run, table.replace_schema_metadata(schema.metadata)


def _in_one_file(plan: Plan, rows: Sequence[int], most: int) -> Iterator[list[int]]:
    """Runs of rows whose episodes lie in one data file, of little more than `most` frames each."""
    run: list[int] = []
    frames, place = 0, (-1, -1, -1)
    for row in rows:
        d, e = int(plan.owner[row]), int(plan.episode[row])
        own = plan.datasets[d].episodes
        there = (d, int(own.data_chunk[e]), int(own.data_file[e]))
        if run and (there != place or frames >= most):
            yield run
            run, frames = [], 0
        run.append(row)
        place, frames = there, frames + int(plan.length[row])
    if run:
        yield run
