"""The tables of a LeRobot v3.0 dataset, written with pyarrow as lerobot's own recorder writes them.

Layout, column order, schema metadata and row groups follow lerobot 0.6.1 (`datasets/dataset_writer.py`,
`dataset_metadata.py`, `feature_utils.py`); where its writers differ among themselves, the recorder's form is
taken. See DECISIONS.md for what we do differently on purpose (exact quantiles, rational time stamps).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..schemas.features import DEFAULT_FEATURES, CameraFeature, Feature
from .durable import commit, temporary_name

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from ..schemas.episode import Embodiment

CHUNK_FILES = 1000  # files a folder, LeRobot's `chunks_size`
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
STATISTICS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
EPISODES_PER_FILE = 50_000
READERS, FILES_A_TASK = 4, 4  # threads that read small files, and how many each takes at a time: all are held
PLACES = ("index", "frame_index")  # another in every row of an episode
WRITE_BLOCK = 1 << 20  # bytes of a table gathered before they are written
LANGUAGE = "language_persistent"
_LANGUAGE_ROW = {
    **{name: {"dtype": "string", "_type": "Value"} for name in ("role", "content", "style")},
    "timestamp": {"dtype": "float32", "_type": "Value"},
    "camera": {"dtype": "string", "_type": "Value"},
    "tool_calls": {"feature": {"_type": "Json"}, "_type": "List"},
}


def part_place(part: Any) -> tuple[Any, Any]:
    """(chunk, file) of a part, or of an array of parts: the same for its data file and its video files."""
    return part // CHUNK_FILES, part % CHUNK_FILES


def data_file(part: int) -> str:
    chunk, file = part_place(part)
    return DATA_PATH.format(chunk_index=chunk, file_index=file)


def video_file(camera: str, part: int) -> str:
    chunk, file = part_place(part)
    return VIDEO_PATH.format(video_key=camera, chunk_index=chunk, file_index=file)


def data_schema(features: Sequence[Feature], language: bool = False) -> pa.Schema:
    """Arrow schema of a data file, with the Hugging Face feature description that `datasets` reads."""
    import pyarrow as pa

    fields, described = [], {}
    for feature in features:
        value = pa.from_numpy_dtype(np.dtype(feature.dtype))
        described_value = {"dtype": feature.dtype, "_type": "Value"}
        if feature.dim == 1:
            fields.append(pa.field(feature.name, value))
            described[feature.name] = described_value
        else:
            fields.append(pa.field(feature.name, pa.list_(value, feature.dim)))
            described[feature.name] = {"feature": described_value, "length": feature.dim, "_type": "List"}
    for name, default in DEFAULT_FEATURES.items():
        fields.append(pa.field(name, pa.from_numpy_dtype(np.dtype(default["dtype"]))))
        described[name] = {"dtype": default["dtype"], "_type": "Value"}
    if language:
        fields.append(pa.field(LANGUAGE, pa.list_(_language_row())))
        described[LANGUAGE] = {"feature": _LANGUAGE_ROW, "_type": "List"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def has_language(embodiment: Embodiment) -> bool:
    """Whether a dataset carries its segments in LeRobot's language column too; its converter's option says so."""
    return bool(embodiment.conventions.get("language_columns"))


def _language_row() -> pa.StructType:
    """One row of LeRobot's `language_persistent` column (`datasets/language.py`)."""
    import pyarrow as pa

    return pa.struct(
        [
            pa.field("role", pa.string(), nullable=False),
            pa.field("content", pa.string()),
            pa.field("style", pa.string()),
            pa.field("timestamp", pa.float32(), nullable=False),
            pa.field("camera", pa.string()),
            pa.field("tool_calls", pa.list_(pa.json_())),
        ]
    )


def language_rows(segments: Sequence[Mapping[str, Any]], frames: int, fps: int) -> list[dict[str, Any]]:
    """An episode's segments as LeRobot's persistent rows: each holds from its time stamp until the next one.

    Where windows overlap the one that began last is in force; where none covers a frame a row without content
    says so. One row a moment, because lerobot refuses two of one style as ambiguous.
    """
    active = np.full(frames, -1)
    for i in sorted(range(len(segments)), key=lambda i: (segments[i]["start"], -i)):
        active[segments[i]["start"] : segments[i]["stop"]] = i
    changes = np.flatnonzero(np.diff(active, prepend=-1)).tolist()
    return [
        {
            "role": "assistant",
            "content": segments[int(active[t])]["text"] if active[t] >= 0 else None,
            "style": "subtask",
            "timestamp": t / fps,
            "camera": None,
            "tool_calls": None,
        }
        for t in changes
    ]


def episode_table(
    schema: pa.Schema,
    features: Sequence[Feature],
    columns: Mapping[str, NDArray[Any]],
    frames: int,
    fps: int,
    numbers: Mapping[str, int],
    language: Sequence[Mapping[str, Any]] | None = None,
) -> pa.Table:
    """One episode's rows; `numbers` gives episode_index, index (of its first row) and task_index.

    `language` is repeated on every row, as lerobot has it: a few bytes a frame when compressed, many in memory.
    """
    import pyarrow as pa

    arrays = []
    for feature in features:
        values = np.ascontiguousarray(columns[feature.name], feature.dtype)
        flat = pa.array(values.reshape(-1))
        arrays.append(flat if feature.dim == 1 else pa.FixedSizeListArray.from_arrays(flat, feature.dim))
    frame_index = np.arange(frames, dtype=np.int64)
    arrays += [
        pa.array((frame_index / fps).astype(np.float32)),
        pa.array(frame_index),
        pa.array(np.full(frames, numbers["episode_index"], np.int64)),
        pa.array(frame_index + numbers["index"]),
        pa.array(np.full(frames, numbers["task_index"], np.int64)),
    ]
    if language is not None:
        arrays.append(_repeated(language, frames))
    return pa.Table.from_arrays(arrays, schema=schema)


def _repeated(rows: Sequence[Mapping[str, Any]], frames: int) -> pa.Array:
    """The language column of an episode: the same rows at every frame.

    Field by field, since pyarrow makes no nested extension types of Python objects.
    """
    import pyarrow as pa

    struct, count = _language_row(), len(rows) * frames
    again = pa.array(np.tile(np.arange(len(rows)), frames))
    fields = [
        pa.nulls(count, field.type)
        if field.name == "tool_calls"
        else pa.array([row[field.name] for row in rows], field.type).take(again)
        for field in struct
    ]
    values = pa.StructArray.from_arrays(fields, fields=list(struct))
    return pa.ListArray.from_arrays(pa.array(np.arange(frames + 1, dtype=np.int32) * len(rows)), values)


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, sync: bool = True) -> None:
    """Write tables as one row group each (LeRobot's: an episode is a row group), whole or not at all.

    Without `sync` neither: the caller writes a tree that gets its name when all of it is on disk.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path) if sync else path
    # The stubs of both know bool alone.
    coded: Any = [leaf for field in schema for leaf in _repeating(field)] or False
    filtered: Any = [field.name for field in schema if not pa.types.is_nested(field.type)] or False
    with (
        pa.output_stream(str(temporary), buffer_size=WRITE_BLOCK) as sink,  # or every page is a system call
        pq.ParquetWriter(
            sink, schema, compression="snappy", use_dictionary=coded, write_statistics=filtered
        ) as writer,
    ):
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    if sync:
        commit(temporary, path)


def _repeating(field: pa.Field, path: str = "") -> Iterator[str]:
    """Parquet's names of a column's leaves, but of floating-point ones and of a row's own place.

    Measurements rarely repeat: a dictionary of them takes as long as all else in writing a file, and makes it a
    fifth larger.
    """
    import pyarrow as pa

    path = f"{path}.{field.name}" if path else field.name
    kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
    if pa.types.is_struct(kind):
        for child in kind:
            yield from _repeating(child, path)
    elif pa.types.is_nested(kind):
        yield from _repeating(kind.value_field.with_name("element"), f"{path}.list")
    elif not pa.types.is_floating(kind) and path not in PLACES:
        yield path


def read_columns(
    path: Path | str, columns: Sequence[str] | None = None, use_threads: bool = True
) -> pa.Table:
    """A Parquet file's columns. Not `pq.read_table`, which imports pandas (1 s) for partitioned folders."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read(list(columns) if columns is not None else None, use_threads=use_threads)


def read_in_turn(
    paths: Sequence[Path] | Sequence[str], columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The same of many small files one after the other, opened ahead: most of their time is waiting for the disk."""

    def read(some: Sequence[Path | str]) -> list[pa.Table]:
        return [read_columns(path, columns, use_threads=False) for path in some]

    for tables in in_turn(read, paths, FILES_A_TASK):
        yield from tables


def in_turn[Item, Result](
    work: Callable[[Sequence[Item]], Result], items: Sequence[Item], a_task: int
) -> Iterator[Result]:
    """`work` on runs of `a_task` items in threads, a few runs ahead; results in order. A single run is done here."""
    from collections import deque
    from concurrent.futures import Future, ThreadPoolExecutor

    runs = [items[start : start + a_task] for start in range(0, len(items), a_task)]
    if len(runs) <= 1:
        yield from map(work, runs)
        return
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[Future[Result]] = deque()
        for some in runs:
            waiting.append(pool.submit(work, some))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def numbers_of(column: pa.ChunkedArray | Sequence[pa.Array]) -> NDArray[Any]:
    """A column of whole numbers without gaps as an array. Arrow's own `to_numpy` imports pandas (1 s)."""
    chunks = getattr(column, "chunks", column)
    pieces = [np.from_dlpack(chunk) for chunk in chunks if len(chunk)]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def write_tasks(path: Path, tasks: Sequence[str], sync: bool = True) -> None:
    """meta/tasks.parquet: row i is task_index i, the sentence is the pandas index (lerobot reads it by position).

    The pandas metadata is written by hand: without it lerobot returns the number 0 as the task, and pandas is
    no dependency of a conversion.
    """
    import pyarrow as pa

    string = {
        "name": "task",
        "field_name": "task",
        "pandas_type": "unicode",
        "numpy_type": "object",
        "metadata": None,
    }
    number = {
        "name": "task_index",
        "field_name": "task_index",
        "pandas_type": "int64",
        "numpy_type": "int64",
        "metadata": None,
    }
    unnamed = {
        "name": None,
        "field_name": None,
        "pandas_type": "unicode",
        "numpy_type": "object",
        "metadata": {"encoding": "UTF-8"},
    }
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [unnamed],
        "columns": [number, string],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    schema = pa.schema(
        [("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas)}
    )
    table = pa.table(
        [pa.array(range(len(tasks)), pa.int64()), pa.array(list(tasks), pa.string())], schema=schema
    )
    write_parquet(path, [table], schema, sync)


def statistics_type(camera: bool, name: str) -> pa.DataType:
    import pyarrow as pa

    if name == "count":
        return pa.list_(pa.int64())
    if camera:
        return pa.list_(pa.list_(pa.list_(pa.float64())))
    return pa.list_(pa.float64())


def info_json(
    features: Sequence[Feature],
    cameras: Sequence[tuple[CameraFeature, Mapping[str, Any]]],
    robot_type: str,
    fps: int,
    totals: Mapping[str, int],
    splits: Mapping[str, str],
    language: bool = False,
) -> dict[str, Any]:
    """meta/info.json; `cameras` come with LeRobot's `info` block of their video stream."""
    described: dict[str, Any] = {}
    for camera, stream in cameras:
        described[camera.name] = {
            "dtype": "video",
            "shape": [camera.height, camera.width, 3],
            "names": ["height", "width", "channels"],
            "info": dict(stream),
        }
    for feature in features:
        described[feature.name] = feature.to_lerobot()
    described |= DEFAULT_FEATURES
    if language:
        described[LANGUAGE] = {"dtype": "language", "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": described,
        "total_episodes": totals["episodes"],
        "total_frames": totals["frames"],
        "total_tasks": totals["tasks"],
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if cameras else None,
        "robot_type": robot_type,
        "splits": dict(splits),
    }
