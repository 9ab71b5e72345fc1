"""`dpipe doctor --fix`: a copy of a dataset with everything rebuilt that follows from the rest, and nothing guessed.

Believed      the values of the rows and their order, the lengths in meta/episodes, the sentences
Rebuilt       index, episode_index, frame_index, timestamp; dataset_from_index and dataset_to_index; the order and
              the pandas index of meta/tasks.parquet; statistics of the dataset and of each episode; the totals

Videos are linked where the file system can, because nothing here writes them; everything else is copied, so that
the dataset itself stays as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.errors import DataError, UsageError
from ...schemas.features import DEFAULT_FEATURES
from ..durable import hard_link, temporary_name, write_json
from ..statistics import (
    FrameHistogram,
    arange_statistics,
    column_statistics,
    dataset_statistics,
    sampled_frames,
)
from ..tables import STATISTICS, write_parquet, write_tasks
from .checks import Level
from .structure import REQUIRED_STATISTICS, statistics_trouble
from .subject import NOT_NUMBERS, Block, Subject

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLED_EPISODES = 64  # whose pictures are counted for statistics that are missing


@dataclass(frozen=True)
class Mended:
    root: Path
    changed: tuple[str, ...]  # files, relative to the copy


def mend(source: Path, target: Path) -> Mended:
    """Copy the dataset at `source` to `target`, rebuilt; refuses where rows and lengths disagree."""
    if target.exists():
        raise UsageError(f"{target} exists already\n  next: name another folder with --out")
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"{target} lies inside the dataset it would copy\n  next: name another folder with --out"
        )
    subject = Subject(source, Level.SAMPLED)
    _refuse_guessing(subject)
    temporary = temporary_name(target)
    try:
        _copy(source, temporary)
        before = {path: _bytes(path) for path in _tables(temporary)}
        _rebuild(subject, temporary)
        changed = tuple(
            path.relative_to(temporary).as_posix()
            for path in _tables(temporary)
            if before.get(path) != _bytes(path)
        )
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Mended(target, changed)


def _refuse_guessing(subject: Subject) -> None:
    """What must be sound for the rest to follow from it."""
    problems = []
    if subject.info is None or not subject.fps or not subject.features:
        problems.append("meta/info.json does not tell fps and features")
    needed = {"length", "data/chunk_index", "data/file_index"}
    needed |= {f"videos/{camera}/from_timestamp" for camera in subject.videos}
    lost = sorted(needed - set(subject.numbers))
    if lost:
        problems.append(f"meta/episodes does not tell {', '.join(lost)}")
    index = subject.numbers.get("episode_index")
    if index is not None and not np.array_equal(index, np.arange(len(index))):
        problems.append(
            "meta/episodes is not in the order of its episodes: which row is whose would be a guess"
        )
    for place in subject.data_places:
        block = subject.block(place)
        if block is None:
            problems.append(f"{subject.name_of(place.path)} cannot be read")
        elif not block.agrees:
            problems.append(f"{block.where} has {block.rows} rows for {int(block.lengths.sum())} frames")
    order = [int(e) for place in subject.data_places for e in place.episodes]
    if order != list(range(len(order))):
        problems.append("data files are not in the order of their episodes")
    table = subject.tasks_table
    if table is None or not subject.tasks or "task_index" not in table.column_names:
        problems.append("meta/tasks.parquet cannot be read")
    elif sorted(table.column("task_index").to_pylist()) != list(range(len(subject.tasks))):
        problems.append("meta/tasks.parquet does not number its tasks from 0")
    if problems:
        listed = "\n  ".join(problems[:8])
        raise DataError(
            f"{subject.root} cannot be mended without guessing\n  {listed}\n  next: convert it again"
        )


def _copy(source: Path, target: Path) -> None:
    """Every file; videos as links to the same bytes where that is possible."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_symlink() and not path.resolve().is_relative_to(source.resolve()) and path.is_dir():
            continue  # a link to a folder elsewhere is no part of the dataset
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".mp4" or not hard_link(path, place):
            shutil.copy2(path, place)


def _tables(root: Path) -> list[Path]:
    meta = [root / "meta" / name for name in ("info.json", "stats.json", "tasks.parquet")]
    return [
        *meta,
        *sorted((root / "meta" / "episodes").rglob("*.parquet")),
        *sorted((root / "data").rglob("*.parquet")),
    ]


def _bytes(path: Path) -> bytes:
    """What tells whether a file was rewritten: its bytes, or for a large one its size and time."""
    if not path.is_file():
        return b""
    status = path.stat()
    return (
        path.read_bytes() if status.st_size < 1 << 26 else f"{status.st_size} {status.st_mtime_ns}".encode()
    )


def _rebuild(subject: Subject, target: Path) -> None:
    for place in subject.data_places:
        block = subject.block(place)
        assert block is not None and block.agrees, "refused before"
        _rebuild_rows(block, target / place.path.relative_to(subject.root))
    fixed = Subject(target, Level.SAMPLED)
    _rebuild_tasks(subject, target)
    _rebuild_episodes(fixed)
    info = dict(subject.info or {})
    info |= {
        "total_episodes": len(subject),
        "total_frames": int(subject.lengths.sum()),
        "total_tasks": len(subject.tasks),
    }
    write_json(target / "meta" / "info.json", info, indent=4)
    write_json(target / "meta" / "stats.json", _dataset_statistics(fixed))


def _rebuild_rows(block: Block, path: Path) -> None:
    """Numbering and time stamps of one data file; untouched where they are right already."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    subject = block.subject
    frame = np.arange(block.rows) - np.repeat(block.starts, block.lengths)
    wanted: dict[str, NDArray[Any]] = {
        "index": np.repeat(subject.first_index[block.episodes], block.lengths) + frame,
        "episode_index": np.repeat(block.episodes, block.lengths),
        "frame_index": frame,
        "timestamp": (frame / subject.fps).astype(np.float32),
    }
    wrong = {
        name: values
        for name, values in wanted.items()
        if name in block.columns and not _same(block.columns[name][:, 0], values)
    }
    if not wrong:
        return
    file = pq.ParquetFile(path)

    def groups() -> Iterator[pa.Table]:
        at = 0
        for number in range(file.metadata.num_row_groups):
            table = file.read_row_group(number)
            for name, values in wrong.items():
                column = pa.array(values[at : at + table.num_rows]).cast(table.schema.field(name).type)
                table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
            at += table.num_rows
            yield table

    write_parquet(path, groups(), file.schema_arrow)


def _same(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    return bool((np.abs(found.astype(np.float64) - wanted) <= 1e-4).all())


def _rebuild_tasks(subject: Subject, target: Path) -> None:
    table = subject.tasks_table
    assert table is not None, "refused before"
    order = table.column("task_index").to_pylist()
    metadata = (table.schema.metadata or {}).get(b"pandas", b"")
    if order == list(range(len(order))) and (b'"task"' in metadata or b"__index_level_0__" in metadata):
        return
    sentences = dict(zip(order, subject.tasks, strict=True))
    write_tasks(target / "meta" / "tasks.parquet", [str(sentences[i]) for i in range(len(order))])


def _rebuild_episodes(subject: Subject) -> None:
    """Ranges from lengths, and the statistics of each episode's rows where the table keeps any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    statistics: dict[str, list[Any]] = {}
    for block in subject.blocks():
        for start, length in zip(block.starts, block.lengths, strict=True):
            for name, column in block.columns.items():
                own = column_statistics(column[start : start + length])
                for entry in STATISTICS:
                    statistics.setdefault(f"stats/{name}/{entry}", []).append(own[entry])
    first = subject.first_index
    for path in subject.episode_files:
        table = pq.ParquetFile(path).read()
        rows = slice(*_rows_of(subject, path))
        replaced: dict[str, Any] = {
            "dataset_from_index": first[rows],
            "dataset_to_index": (first + subject.lengths)[rows],
            **{name: values[rows] for name, values in statistics.items()},
        }
        changed = False
        for name, values in replaced.items():
            if name not in table.column_names:
                continue
            field = table.schema.field(name)
            try:
                column = pa.array(values, field.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                continue  # a shape of its own: left as it is
            if not _alike(table.column(name).to_pylist(), column.to_pylist()):
                table = table.set_column(table.column_names.index(name), field, column)
                changed = True
        if changed:
            write_parquet(path, [table], table.schema)


def _alike(found: list[Any], rebuilt: list[Any]) -> bool:
    """Equal to float32, in which rows are stored."""
    try:
        return np.allclose(np.array(found, np.float64), np.array(rebuilt, np.float64), rtol=1e-6, atol=1e-6)
    except (TypeError, ValueError):
        return False


def _rows_of(subject: Subject, wanted: Path) -> tuple[int, int]:
    """Which episodes one of the meta/episodes files lists."""
    import pyarrow.parquet as pq

    at = 0
    for path in subject.episode_files:
        rows = pq.ParquetFile(path).metadata.num_rows
        if path == wanted:
            return at, at + rows
        at += rows
    raise AssertionError(f"{wanted} is no file of meta/episodes")


def _dataset_statistics(subject: Subject) -> dict[str, Any]:
    """Exact ones of every numeric column; those of cameras as they were, or counted from pictures where missing."""
    old = subject.stats or {}
    result: dict[str, Any] = {}
    for name, told in subject.features.items():
        if told["dtype"] in ("video", "image"):
            result[name] = old[name] if _is_sound(told, old.get(name)) else _camera_statistics(subject, name)
        elif told["dtype"] in NOT_NUMBERS:
            continue
        elif name == "index":
            result[name] = arange_statistics(0, int(subject.lengths.sum()))
        else:
            result[name] = dataset_statistics(lambda name=name: subject.column_blocks(name))
    for name, made in result.items():
        if _agree(old.get(name), made):
            result[name] = old[name]  # the same numbers, added in another order
    for name in old:
        if name not in result and name not in DEFAULT_FEATURES and name not in subject.features:
            result[name] = old[name]
    return result


def _is_sound(told: dict[str, Any], own: Any) -> bool:
    """Whether statistics of a camera are such as the doctor lets pass: complete, finite, of pictures from 0 to 1."""
    whole = isinstance(own, dict) and set(REQUIRED_STATISTICS) <= set(own)
    return whole and not list(statistics_trouble("", told, own))


def _agree(old: Any, made: Mapping[str, Any]) -> bool:
    """Whether statistics differ by no more than the order of a sum does."""
    try:
        return set(old) == set(made) and all(
            np.allclose(np.asarray(old[entry], np.float64), np.asarray(made[entry], np.float64), 1e-9, 1e-12)
            for entry in made
        )
    except (TypeError, ValueError):
        return False


def _camera_statistics(subject: Subject, camera: str) -> dict[str, Any]:
    from ...streams.dataset import open_dataset

    dataset = open_dataset(subject.root)
    histogram = FrameHistogram()
    for e in np.unique(
        np.linspace(0, len(dataset) - 1, min(SAMPLED_EPISODES, len(dataset))).round().astype(int)
    ):
        for t in sampled_frames(int(dataset.episodes.length[e])):
            histogram.add(dataset.frames(int(e), camera, int(t), int(t) + 1))
    return histogram.statistics()


def fixed_folder(source: Path) -> Path:
    """Where `--fix` writes unless told: beside the dataset."""
    return source.with_name(f"{source.resolve().name}-fixed")
