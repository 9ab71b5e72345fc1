"""The metadata of a LeRobot dataset, v3.0 or v2.x, as one structure: where each episode's rows and frames lie.

v3.0   meta/episodes/*/*.parquet and meta/tasks.parquet; rows and videos of many episodes share a file
v2.x   meta/episodes.jsonl and meta/tasks.jsonl; a Parquet file and an MP4 a camera for every episode
Own    datasets of ours also have dpipe/: conventions, sidecar columns and segments come along

A reader of its own beside `streams/dataset.py`: that one opens sound datasets for training and refuses others,
this one reads what can be read of any, so that a bad episode is left out by name and the rest is converted.
Source: huggingface/lerobot 0.6.1 `datasets/utils.py`, `scripts/convert_dataset_v21_to_v30.py`

Shapes: E episodes, T frames of one episode, D dimensions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.claims import refuse_claims
from ..schemas.episode import Segment
from ..schemas.errors import DataError
from ..schemas.features import CAMERA_PREFIX, DEFAULT_FEATURES, Feature
from .words import text_of

if TYPE_CHECKING:
    import pyarrow as pa

DATA_V30 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_V30 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_V21 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_V21 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
EPISODES_A_RECORDING = 64  # of v2.x, where a file is an episode: fewer scan tasks than files


@dataclass(frozen=True)
class Camera:
    """One camera: its feature name, its key below `observation.images.`, how it is stored, declared pixels."""

    name: str
    key: str
    kind: str  # "video" or "image"
    height: int
    width: int


@dataclass(frozen=True)
class VideoPlaces:
    """Where each episode's frames lie in v3.0: file (chunk, file) [E] and the time they begin at in it [E]."""

    chunk: NDArray[np.int64]
    file: NDArray[np.int64]
    from_timestamp: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Source:
    """An opened dataset's metadata; row e of the arrays is one line of its episode table."""

    root: Path
    version: str
    info: Mapping[str, Any]
    fps: int
    features: tuple[Feature, ...]
    cameras: tuple[Camera, ...]
    left_out: tuple[str, ...]  # features that a dataset of ours cannot carry, each with the reason
    sidecar: tuple[Feature, ...]  # of datasets of ours
    manifest: Mapping[str, Any]  # of datasets of ours, else empty
    number: NDArray[np.int64]  # [E] episode_index
    length: NDArray[np.int64]  # [E] frames, as declared
    data: NDArray[np.int64]  # [E, 2] chunk and file in v3.0
    videos: Mapping[str, VideoPlaces]  # v3.0
    tasks: Mapping[int, str]
    episode_tasks: Sequence[Sequence[str]]  # [E]
    split: Sequence[str]  # [E]
    source_id: Sequence[str]  # [E] of datasets of ours, else ""
    segments: Mapping[int, tuple[Segment, ...]]  # by episode_index, of datasets of ours
    tables: tuple[Path, ...]  # the files all this was read from

    def __len__(self) -> int:
        return len(self.number)

    @property
    def is_v3(self) -> bool:
        return self.version.startswith("v3.")

    def data_path(self, row: int) -> Path:
        if self.is_v3:
            chunk, file = self.data[row].tolist()
            return self._place(self.info.get("data_path") or DATA_V30, chunk_index=chunk, file_index=file)
        return self._place(self.info.get("data_path") or DATA_V21, **self._episode(row))

    def video_path(self, row: int, camera: str) -> Path:
        if self.is_v3:
            place = self.videos[camera]
            numbers = {"chunk_index": int(place.chunk[row]), "file_index": int(place.file[row])}
            return self._place(self.info.get("video_path") or VIDEO_V30, video_key=camera, **numbers)
        return self._place(self.info.get("video_path") or VIDEO_V21, video_key=camera, **self._episode(row))

    def sidecar_path(self, row: int) -> Path:
        """The rows of `dpipe/columns` lie as those of `data/`."""
        return self.root / "dpipe" / "columns" / self.data_path(row).relative_to(self.root / "data")

    def _episode(self, row: int) -> dict[str, int]:
        number = int(self.number[row])
        size = int(self.info.get("chunks_size") or 1000)
        return {"episode_index": number, "episode_chunk": number // size}

    def _place(self, template: str, **values: Any) -> Path:
        try:
            relative = os.path.normpath(str(template).format(**values))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self.root / 'meta/info.json'}: the path '{template}' has a field of another kind: {error}"
            ) from error
        if relative.startswith(("/", "..")):
            raise DataError(f"{self.root / 'meta/info.json'}: the path '{template}' leads out of the dataset")
        return self.root / relative

    def _groups(self) -> NDArray[np.int64]:
        """[E] number of the recording each row belongs to: a data file of v3.0, a batch of v2.x episodes."""
        if self.is_v3:
            return self.data[:, 0] * 2**32 + self.data[:, 1]
        return self.number // EPISODES_A_RECORDING

    def recordings(self) -> Iterator[tuple[str, list[int]]]:
        """(name, rows): every row in exactly one, in file order."""
        groups = self._groups()
        order = np.argsort(groups, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            group = int(groups[rows[0]])
            if self.is_v3:
                yield f"chunk-{group // 2**32:03d}/file-{group % 2**32:03d}", rows.tolist()
            else:
                yield f"episodes-{group * EPISODES_A_RECORDING:06d}", rows.tolist()

    def rows(self, recording: str) -> list[int]:
        """The rows of a recording, by its name."""
        numbers = [int(number) for number in re.findall(r"\d+", recording)]
        group = numbers[0] * 2**32 + numbers[1] if self.is_v3 else numbers[0] // EPISODES_A_RECORDING
        return np.flatnonzero(self._groups() == group).tolist()


def is_dataset(folder: Path) -> bool:
    return (folder / "meta" / "info.json").is_file()


def open_source(root: Path) -> Source:
    """The dataset's metadata, remembered in this process until one of its tables changes."""
    stamps = []
    for path in _table_files(root):
        status = path.stat()
        stamps.append((status.st_size, status.st_mtime_ns))
    return _open_source(root, tuple(stamps))


def _table_files(root: Path) -> list[Path]:
    meta = root / "meta"
    single = [meta / name for name in ("info.json", "episodes.jsonl", "tasks.jsonl", "tasks.parquet")]
    single += [root / "dpipe" / "manifest.json", root / "dpipe" / "segments.parquet"]
    return [p for p in single if p.is_file()] + sorted((meta / "episodes").glob("*/*.parquet"))


@lru_cache(maxsize=4)
def _open_source(root: Path, stamps: tuple[tuple[int, int], ...]) -> Source:
    info = _read_json(root / "meta" / "info.json")
    version = str(info.get("codebase_version", "(none)"))
    if not re.match(r"v(3|2)\.", version):
        raise DataError(
            f"{root} is a LeRobot dataset of version {version}\n  expected: v3.0, v2.1 or v2.0\n"
            "  next: bring it to v2.1 with the lerobot release of its day"
        )
    if info.get("storage_format", "parquet") != "parquet":
        raise DataError(
            f"{root} is stored as {info['storage_format']}\n  expected: Parquet and MP4 files, LeRobot's v3.0 layout"
        )
    manifest_path = root / "dpipe" / "manifest.json"
    manifest = _read_json(manifest_path) if manifest_path.is_file() else {}
    features, cameras, left_out = _sort_features(info, manifest)
    tables = tuple(_table_files(root))
    is_v3 = version.startswith("v3.")
    read = _read_episodes_v30 if is_v3 else _read_episodes_v21
    episodes = read(root, [camera.name for camera in cameras if camera.kind == "video"])
    count = len(episodes["number"])
    if not count:
        raise DataError(f"{root}: its episode table is empty\n  next: record something, or fetch it again")
    return Source(
        root=root,
        version=version,
        info=info,
        fps=_whole_fps(root, info),
        features=features,
        cameras=cameras,
        left_out=left_out,
        sidecar=_own_features(manifest, "sidecar"),
        manifest=manifest,
        tasks=_read_tasks(root),
        split=episodes.pop("split", None) or _splits(info, count),
        segments=_read_segments(root),
        tables=tables,
        **episodes,
    )


def _whole_fps(root: Path, info: Mapping[str, Any]) -> int:
    fps = info.get("fps")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or fps <= 0 or fps != int(fps):
        raise DataError(f"{root / 'meta/info.json'}: fps is {fps!r}\n  expected: a whole number above 0")
    return int(fps)


# --- features ---------------------------------------------------------------------------------------------


def _sort_features(
    info: Mapping[str, Any], manifest: Mapping[str, Any]
) -> tuple[tuple[Feature, ...], tuple[Camera, ...], tuple[str, ...]]:
    """The declared features as vectors, cameras, and what cannot be carried over."""
    vectors: list[Feature] = []
    cameras: list[Camera] = []
    left_out: list[str] = []
    known = {feature.name: feature for feature in _own_features(manifest, "features")}
    for name, told in info.get("features", {}).items():
        kind = str(told.get("dtype"))
        if name in DEFAULT_FEATURES:
            continue
        if kind in ("video", "image"):
            camera = _camera(name, kind, told)
            if isinstance(camera, str):
                left_out.append(f"{name}: {camera}")
            else:
                cameras.append(camera)
            continue
        shape = [int(n) for n in told.get("shape") or (1,)]
        dim = int(np.prod(shape))
        if kind in ("string", "language"):
            left_out.append(f"{name}: {kind} columns are not carried over")
            continue
        try:
            numeric = np.dtype(kind).kind in "fiub"
        except TypeError:
            numeric = False
        if not numeric or dim < 1:
            left_out.append(f"{name}: {kind} {shape} is no column of numbers")
            continue
        try:
            feature = Feature(name, np.dtype(kind).name, dimension_names(told.get("names"), name, dim))
        except ValueError as error:
            left_out.append(f"{name}: {error}")
            continue
        vectors.append(known.get(name, feature) if known.get(name, feature).dim == dim else feature)
    keys = [camera.key for camera in cameras]
    if len(set(keys)) != len(keys):
        raise DataError(f"two cameras share a name: {', '.join(sorted(keys))}")
    return tuple(vectors), tuple(cameras), tuple(left_out)


def _camera(name: str, kind: str, told: Mapping[str, Any]) -> Camera | str:
    """A camera, or why it is none of ours."""
    info = {**told.get("video_info", {}), **told.get("info", {})}
    if info.get("is_depth_map") or info.get("video.is_depth_map"):
        return "depth is not carried over: its 12 bits would become 8"
    key = name.removeprefix(CAMERA_PREFIX).removeprefix("observation.")
    if "/" in key or not key:
        return "the name cannot be a camera key"
    shape = [int(n) for n in told.get("shape") or ()]
    if len(shape) != 3:
        return f"shape {shape} is not that of a picture"
    names = [str(n) for n in told.get("names") or ()]
    if len(names) == 3 and "height" in names and "width" in names:
        height, width = shape[names.index("height")], shape[names.index("width")]
    elif shape[0] in (1, 3) and shape[2] not in (1, 3):
        height, width = shape[1:]
    else:
        height, width = shape[:2]
    return Camera(name, key, kind, height, width)


def dimension_names(names: Any, feature: str, dim: int) -> tuple[str, ...]:
    """Flat, distinct names, one a dimension: those declared where they are that, else numbered ones.

    Found in the wild: a list; {"motors": [...]}, which lerobot's relative actions would take for one name;
    {"x": 0, "y": 1}; nothing.
    """
    if isinstance(names, Mapping):
        values = list(names.values())
        if len(values) == 1 and isinstance(values[0], Sequence) and not isinstance(values[0], str):
            names = values[0]
        elif all(isinstance(value, int) for value in values):
            names = sorted(names, key=lambda name: names[name])
    if isinstance(names, Sequence) and not isinstance(names, str):
        flat = tuple(str(name) for name in names)
        if len(flat) == dim == len(set(flat)):
            return flat
    short = feature.removeprefix("observation.").replace(".", "_")
    return (short,) if dim == 1 else tuple(f"{short}_{i}" for i in range(dim))


def _own_features(manifest: Mapping[str, Any], kind: str) -> tuple[Feature, ...]:
    """Features as a manifest of ours describes them: units and frames included."""
    described = manifest.get("embodiment", {}).get(kind, {})
    return tuple(
        Feature(
            name,
            told["dtype"],
            tuple(told["names"]),
            told.get("unit", ""),
            told.get("frame", ""),
            told.get("description", ""),
        )
        for name, told in described.items()
    )


# --- tables -----------------------------------------------------------------------------------------------


def _read_episodes_v30(root: Path, videos: Sequence[str]) -> dict[str, Any]:
    import pyarrow as pa

    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DataError(
            f"{root}: no episodes\n  expected: meta/episodes/chunk-000/file-000.parquet\n"
            "  The recording was cut short before its tables were written; lerobot cannot read it either."
        )
    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for camera in videos:
        needed += [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    wanted = [*needed, "tasks", "split", "source_id"]
    tables = []
    for path in paths:
        file = open_parquet(path)
        have = file.schema_arrow.names
        missing = [name for name in needed if name not in have]
        if missing:
            shown = ", ".join(name for name in have if not name.startswith("stats/"))
            raise DataError(f"{path}: no column '{missing[0]}'\n  found: {shown}")
        tables.append(file.read(columns=[name for name in wanted if name in have]))
    table = pa.concat_tables(tables, promote_options="permissive")

    def numbers(name: str, kind: type = np.int64) -> NDArray[Any]:
        try:
            return np.array(table.column(name).to_pylist(), kind)
        except (TypeError, ValueError) as error:
            raise DataError(f"{paths[0].parent}: column '{name}': {first_line(error)}") from error

    def texts(name: str, absent: Any) -> list[Any]:
        if name not in table.column_names:
            return [absent] * table.num_rows
        return [absent if value is None else value for value in table.column(name).to_pylist()]

    return {
        "number": numbers("episode_index"),
        "length": numbers("length"),
        "data": np.stack([numbers("data/chunk_index"), numbers("data/file_index")], axis=1),
        "videos": {
            camera: VideoPlaces(
                numbers(f"videos/{camera}/chunk_index"),
                numbers(f"videos/{camera}/file_index"),
                numbers(f"videos/{camera}/from_timestamp", np.float64),
            )
            for camera in videos
        },
        "episode_tasks": texts("tasks", ()),
        "split": texts("split", "train") if "split" in table.column_names else None,
        "source_id": texts("source_id", ""),
    }


def _read_episodes_v21(root: Path, videos: Sequence[str]) -> dict[str, Any]:
    path = root / "meta" / "episodes.jsonl"
    lines = _read_lines(path)
    wrong = [
        line for line in lines if not all(isinstance(line.get(k), int) for k in ("episode_index", "length"))
    ]
    if wrong:
        raise DataError(f"{path}: a line without episode_index and length\n  found: {str(wrong[0])[:200]}")
    lines.sort(key=lambda line: line["episode_index"])
    count = len(lines)
    return {
        "number": np.array([line["episode_index"] for line in lines], np.int64),
        "length": np.array([line["length"] for line in lines], np.int64),
        "data": np.zeros((count, 2), np.int64),
        "videos": {},
        "episode_tasks": [line.get("tasks") or () for line in lines],
        "source_id": [""] * count,
    }


def _read_tasks(root: Path) -> dict[int, str]:
    """{task_index: sentence}; empty where the dataset has no table of them."""
    lines = root / "meta" / "tasks.jsonl"
    if lines.is_file():
        return {int(line["task_index"]): text_of(line["task"]) for line in _read_lines(lines)}
    path = root / "meta" / "tasks.parquet"
    if not path.is_file():
        return {}
    table = open_parquet(path).read()
    # The sentence is the pandas index: called `task` by lerobot, `__index_level_0__` by careless writers.
    column = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if column is None:
        raise DataError(f"{path}: no column 'task'\n  found: {', '.join(table.column_names)}")
    texts = table.column(column).to_pylist()
    indices = (
        table.column("task_index").to_pylist() if "task_index" in table.column_names else range(len(texts))
    )
    return {int(i): text_of(text) for i, text in zip(indices, texts, strict=True)}


def _read_segments(root: Path) -> dict[int, tuple[Segment, ...]]:
    path = root / "dpipe" / "segments.parquet"
    found: dict[int, list[Segment]] = {}
    if path.is_file():
        for row in open_parquet(path).read().to_pylist():
            segment = Segment(row["start"], row["stop"], row["text"], row["task"])
            found.setdefault(row["episode_index"], []).append(segment)
    return {episode: tuple(segments) for episode, segments in found.items()}


def _splits(info: Mapping[str, Any], count: int) -> list[str]:
    """[E] from ranges such as {"train": "0:40", "test": "40:50,60:70"}; rows that none names are for training."""
    result = ["train"] * count
    for name, ranges in (info.get("splits") or {}).items():
        for span in str(ranges).split(","):
            start, _, stop = span.strip().partition(":")
            if start.isdigit() and stop.isdigit():
                for row in range(int(start), min(int(stop), count)):
                    result[row] = str(name)
    return result


# --- rows -------------------------------------------------------------------------------------------------


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile that reads pages as they are needed; DataError when it is cut short or missing."""
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        file = pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20, pre_buffer=False)
        refuse_claims(file.metadata, path.stat().st_size, str(path))
        return file
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def read_rows(path: Path, rows: range, names: Sequence[str]) -> pa.Table:
    """Rows [start, stop) of a Parquet file: only the row groups they lie in are read."""
    file = open_parquet(path)
    counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    ends = np.cumsum(counts)
    first = int(np.searchsorted(ends, rows.start, side="right"))
    last = int(np.searchsorted(ends, rows.stop - 1, side="right"))
    if last >= len(ends):
        raise DataError(f"{path} has {int(ends[-1]) if len(ends) else 0} rows, {rows.stop} are needed")
    try:
        table = file.read_row_groups(list(range(first, last + 1)), columns=list(names))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
    return table.slice(rows.start - (int(ends[first - 1]) if first else 0), len(rows))


def to_matrix(column: pa.ChunkedArray, dim: int, dtype: str) -> NDArray[Any]:
    """An Arrow column of numbers or (nested) lists of them -> [T, D], or [T] where D is 1; DataError says what is off.

    Lists come as fixed_size_list (lerobot's recorder), list (its aggregate tool, pandas) or extension arrays
    (two dimensions and more).
    """
    import pyarrow as pa

    array: Any = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    rows = len(array)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while (
        pa.types.is_list(array.type)
        or pa.types.is_large_list(array.type)
        or pa.types.is_fixed_size_list(array.type)
    ):
        if array.null_count:
            raise DataError(f"{array.null_count} of its {rows} rows are empty")
        if not pa.types.is_fixed_size_list(array.type) and len(np.unique(array.value_lengths())) > 1:
            raise DataError("its rows differ in length")
        array = array.flatten()
    if array.null_count:
        raise DataError(f"{array.null_count} values are missing")
    if not (
        pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)
    ):
        raise DataError(f"it holds {array.type}, expected {dtype}")
    if len(array) != rows * dim:
        raise DataError(f"it holds {len(array) / max(rows, 1):g} values a row, meta/info.json declares {dim}")
    values = _values(array).astype(dtype, copy=False)
    return values if dim == 1 else values.reshape(rows, dim)


def _values(array: pa.Array) -> NDArray[Any]:
    """Numbers of an Arrow array without nulls, in place (`to_numpy` would import pandas first)."""
    import pyarrow as pa

    buffer = array.buffers()[1]
    if pa.types.is_boolean(array.type):
        bits = np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")
        return bits[array.offset : array.offset + len(array)].astype(bool)
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON: {error}\n  next: restore the file") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}\n  next: restore the file") from error
