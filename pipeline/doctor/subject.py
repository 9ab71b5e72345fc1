"""A LeRobot v3.0 dataset as it lies there, sound or not: whatever can be read is, and what cannot is remembered.

`streams.dataset.open_dataset` stops at the first thing wrong; here nothing stops, so that everything wrong can
be told at once. Tables are columns: a million episodes are a few arrays.

Shapes: E episodes, N rows of one data file, D dimensions.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...schemas.claims import refuse_claims
from ...schemas.errors import DataError
from ...schemas.features import DEFAULT_FEATURES
from ..tables import DATA_PATH, VIDEO_PATH
from .checks import EXPECTED, Level, in_a_line

if TYPE_CHECKING:
    import pyarrow as pa

OWN_FOLDER = "dpipe"
MOST_JSON = 1 << 28  # bytes of a metadata file; stats.json of a large dataset is some kilobytes
CACHE_BYTES = 1 << 28  # rows kept in memory between checks
MOST_ROWS = 1 << 24  # rows of one data file that are read at once; lerobot's 100 MB files hold far fewer
TEMPLATE = re.compile(r"(?:[^{}]|\{(?:chunk_index|file_index|video_key)(?::0?\d{0,2}d)?\})*")
NUMBERS = (
    "episode_index",
    "length",
    "dataset_from_index",
    "dataset_to_index",
    "data/chunk_index",
    "data/file_index",
)
VIDEO_NUMBERS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
PICTURES = ("video", "image")
NOT_NUMBERS = (*PICTURES, "string", "language")


@dataclass(frozen=True)
class Place:
    """A file that meta/episodes names, relative to the dataset, and the episodes [n] it holds, in order.

    Names are text: a large dataset has so many that paths of pathlib's would take most of the time.
    """

    root: Path
    name: str
    episodes: NDArray[np.int64]

    @cached_property
    def path(self) -> Path:
        return self.root / self.name


@dataclass
class Block:
    """Rows of one data file. `columns` are [N, D] as stored, pictures left out."""

    subject: Subject
    path: Path
    episodes: NDArray[np.int64]  # those meta/episodes says are here
    rows: int
    names: tuple[str, ...]  # every column of the file, pictures too
    types: Mapping[str, pa.DataType]
    columns: Mapping[str, NDArray[Any]]
    troubles: tuple[tuple[str, str], ...]  # (column, what is wrong with it)

    @property
    def where(self) -> str:
        return self.subject.name_of(self.path)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each episode here [n], by meta/episodes."""
        return self.subject.lengths[self.episodes]

    @cached_property
    def agrees(self) -> bool:
        """Whether the file has as many rows as its episodes say: only then rows can be told apart by number."""
        return self.rows == int(self.lengths.sum())

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First row of each episode in this file [n]."""
        return np.cumsum(self.lengths) - self.lengths

    def owner(self, row: int) -> int:
        """The episode a row belongs to."""
        return int(self.episodes[np.searchsorted(self.starts, row, side="right") - 1])

    def frame(self, row: int) -> str:
        """A row in words: its episode and frame where they are known."""
        if not self.agrees or not len(self.episodes):
            return f"row {row}"
        at = int(np.searchsorted(self.starts, row, side="right") - 1)
        return f"episode {int(self.episodes[at])}, frame {row - int(self.starts[at])}"


@dataclass
class Subject:
    """The dataset under examination; every part is None or empty where it could not be read."""

    root: Path
    level: Level
    broken: dict[Path, str] = field(default_factory=dict)  # file -> why it cannot be read
    torn: dict[str, str] = field(default_factory=dict)  # column of meta/episodes -> why it cannot be read
    chosen: NDArray[np.int64] | None = (
        None  # episodes whose rows and pictures are looked at, in order; None: all
    )
    _blocks: OrderedDict[Path, Block] = field(default_factory=OrderedDict, repr=False)
    _video_places: dict[str, list[Place]] = field(default_factory=dict, repr=False)

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    # --- meta/ -----------------------------------------------------------------------------------------

    @cached_property
    def info(self) -> dict[str, Any] | None:
        return self.read_json(self.root / "meta" / "info.json")

    @cached_property
    def stats(self) -> dict[str, Any] | None:
        path = self.root / "meta" / "stats.json"
        return self.read_json(path) if path.is_file() else None

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        path = self.root / OWN_FOLDER / "manifest.json"
        return self.read_json(path) if path.is_file() else None

    @property
    def ours(self) -> bool:
        return (self.root / OWN_FOLDER / "manifest.json").is_file()

    @cached_property
    def fps(self) -> int:
        """0 where it is not a whole number above 0."""
        fps = (self.info or {}).get("fps")
        sound = (
            isinstance(fps, int | float)
            and not isinstance(fps, bool)
            and 0 < fps < 100_000
            and fps == int(fps)
        )
        return int(fps) if sound and fps is not None else 0

    @cached_property
    def features(self) -> dict[str, dict[str, Any]]:
        """Features whose dtype and shape make sense; the check `features` names the others."""
        declared = (self.info or {}).get("features")
        if not isinstance(declared, dict):
            return {}
        return {name: told for name, told in declared.items() if not feature_trouble(told)}

    @property
    def vectors(self) -> list[str]:
        """Numeric features of the recording, LeRobot's own numbering left out."""
        return [
            name
            for name, told in self.features.items()
            if told["dtype"] not in NOT_NUMBERS and name not in DEFAULT_FEATURES
        ]

    @property
    def cameras(self) -> list[str]:
        return [name for name, told in self.features.items() if told["dtype"] in PICTURES]

    @property
    def videos(self) -> list[str]:
        return [name for name, told in self.features.items() if told["dtype"] == "video"]

    @property
    def depth(self) -> set[str]:
        """Cameras that measure distances: one channel, or marked as lerobot marks them."""
        found = set()
        for name in self.cameras:
            told = self.features[name]
            info = told.get("info")
            marked = isinstance(info, dict) and (info.get("is_depth_map") or info.get("video.is_depth_map"))
            if marked or told["shape"][-1] == 1 or told["shape"][0] == 1:
                found.add(name)
        return found

    def dims(self, name: str) -> int:
        return int(np.prod([int(n) for n in self.features[name]["shape"]]))

    def names(self, feature: str) -> list[str] | None:
        """A vector's flat list of dimension names, or None where it has none of its length."""
        names = self.features.get(feature, {}).get("names")
        flat = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return list(names) if flat and names and len(names) == self.dims(feature) else None

    @cached_property
    def tasks_table(self) -> pa.Table | None:
        return self.read_table(self.root / "meta" / "tasks.parquet")

    @cached_property
    def tasks(self) -> list[Any]:
        """Sentences by row; [] where there is no table."""
        table = self.tasks_table
        if table is None:
            return []
        column = next((n for n in ("task", "__index_level_0__") if n in table.column_names), None)
        return table.column(column).to_pylist() if column else []

    @cached_property
    def episode_files(self) -> list[Path]:
        return sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))

    @cached_property
    def _numbers(self) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """meta/episodes' numbers by column, and the columns that cannot be used with the reason."""
        import pyarrow as pa

        wanted = [*NUMBERS, *(f"videos/{c}/{name}" for c in self.videos for name in VIDEO_NUMBERS)]
        tables: dict[str, list[NDArray[Any]]] = {name: [] for name in wanted}
        wrong: dict[str, str] = {}
        for path in self.episode_files:
            file = self.open_table(path)
            if file is None:
                return {}, {}
            stored = file.schema_arrow.names
            have = {name for name in stored if stored.count(name) == 1}
            for name in wanted:
                if name not in have:
                    many = "no column" if name not in stored else "several columns called"
                    wrong.setdefault(name, f"{self.name_of(path)} has {many} '{name}'")
            try:
                table = file.read(columns=[name for name in wanted if name in have])
            except EXPECTED as error:
                self.broken[path] = in_a_line(error)
                return {}, {}
            for name in table.column_names:
                column = table.column(name)
                kind = column.type
                number = pa.types.is_integer(kind) or (
                    name.endswith("timestamp") and pa.types.is_floating(kind)
                )
                if not number or column.null_count:
                    what = f"{column.null_count} missing values" if column.null_count else str(kind)
                    wrong.setdefault(name, f"{self.name_of(path)}: '{name}' is {what}, expected numbers")
                else:
                    tables[name].append(numbers_of(column))
        numbers = {n: np.concatenate(found) for n, found in tables.items() if found and n not in wrong}
        return numbers, wrong

    @property
    def numbers(self) -> dict[str, NDArray[Any]]:
        return self._numbers[0]

    @property
    def unusable(self) -> dict[str, str]:
        return self._numbers[1]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each episode [E], as meta/episodes says; those below 1 count as none."""
        found = self.numbers.get("length")
        return np.zeros(0, np.int64) if found is None else np.clip(found.astype(np.int64), 0, 1 << 40)

    @cached_property
    def first_index(self) -> NDArray[np.int64]:
        """Row of each episode's first frame in the dataset [E], from the lengths alone."""
        return np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def examined(self) -> NDArray[np.int64]:
        """Numbers of the episodes whose rows and pictures are looked at [n]."""
        return np.arange(len(self)) if self.chosen is None else self.chosen

    def concerns(self, place: Place) -> bool:
        """Whether a file holds any of them."""
        return self.chosen is None or bool(np.isin(place.episodes, self.chosen).any())

    def text_column(self, name: str) -> pa.ChunkedArray | None:
        """A column of meta/episodes in Arrow, or None where a file has none."""
        import pyarrow as pa

        files = [self.open_table(path) for path in self.episode_files]
        if not files or any(file is None or name not in file.schema_arrow.names for file in files):
            return None
        try:
            return pa.concat_tables([file.read(columns=[name]) for file in files if file]).column(name)
        except EXPECTED as error:
            self.torn[name] = in_a_line(error)  # what else the table holds may well be read
            return None

    @cached_property
    def episode_tasks(self) -> list[list[str]] | None:
        column = self.text_column("tasks")
        if column is None:
            return None
        entries = (() if entry is None else entry for entry in column.to_pylist())
        return [list(entry) if isinstance(entry, list | tuple) else [str(entry)] for entry in entries]

    @cached_property
    def splits(self) -> dict[str, list[tuple[int, int]]] | None:
        """Ranges [first, stop) of each split; None where info.json's cannot be read."""
        declared = (self.info or {}).get("splits")
        if not isinstance(declared, dict):
            return {"train": [(0, len(self))]} if declared is None else None
        splits: dict[str, list[tuple[int, int]]] = {}
        for name, spans in declared.items():
            ranges = [re.fullmatch(r"(\d{1,12}):(\d{1,12})", span.strip()) for span in str(spans).split(",")]
            if not all(ranges):
                return None
            splits[name] = [(int(match[1]), int(match[2])) for match in ranges if match]
        return splits

    @cached_property
    def split_of(self) -> NDArray[np.str_]:
        """The split of each episode [E], "" for none."""
        split = np.full(len(self), "", "U32")
        for name, ranges in (self.splits or {}).items():
            for first, stop in ranges:
                split[first:stop] = name
        return split

    # --- files -----------------------------------------------------------------------------------------

    def template(self, name: str) -> str:
        """`data_path` or `video_path`; the usual one where info.json's is not safe to follow."""
        usual = DATA_PATH if name == "data_path" else VIDEO_PATH
        given = (self.info or {}).get(name) or usual
        return given if template_trouble(given) is None else usual

    def places(self, numbers: str, template: str, video_key: str = "") -> list[Place]:
        """Files of one kind with their episodes, in order of their names; `numbers` prefixes the columns."""
        chunk, file = (self.numbers.get(f"{numbers}/{name}") for name in ("chunk_index", "file_index"))
        if chunk is None or file is None or len(chunk) != len(self):
            return []
        key = chunk.astype(np.int64) * (1 << 24) + file.astype(np.int64)
        order = np.argsort(key, kind="stable")
        cuts = np.flatnonzero(np.diff(key[order])) + 1
        found = []
        for group in np.split(order, cuts) if len(order) else []:
            words = {"chunk_index": int(chunk[group[0]]), "file_index": int(file[group[0]])}
            name = posixpath.normpath(template.format(**words, video_key=video_key))
            found.append(Place(self.root, name, np.sort(group)))
        return found

    @cached_property
    def data_places(self) -> list[Place]:
        return self.places("data", self.template("data_path"))

    def video_places(self, camera: str) -> list[Place]:
        if camera not in self._video_places:
            self._video_places[camera] = self.places(f"videos/{camera}", self.template("video_path"), camera)
        return self._video_places[camera]

    @cached_property
    def listed(self) -> dict[str, int]:
        """Every file below data/, meta/ and videos/ by its relative name, with its size; temporary and hidden too."""
        found: dict[str, int] = {}
        for folder in ("data", "meta", "videos"):
            _list_files(f"{self.root}/{folder}", folder, found)
        return found

    # --- rows ------------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[Block]:
        """Every data file that can be read, in order; small datasets stay in memory."""
        for place in self.data_places:
            block = self.block(place)
            if block is not None:
                yield block

    def block(self, place: Place) -> Block | None:
        if place.path in self._blocks:
            self._blocks.move_to_end(place.path)
            return self._blocks[place.path]
        if place.path in self.broken or not is_there(place.path):
            return None
        file = self.open_table(place.path)
        if file is None:
            return None
        rows = int(file.metadata.num_rows)
        expected = int(self.lengths[place.episodes].sum())
        types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
        wanted = [n for n, t in self.features.items() if n in types and t["dtype"] not in NOT_NUMBERS]
        columns: dict[str, NDArray[Any]] = {}
        troubles: list[tuple[str, str]] = []
        if rows != expected and rows > min(MOST_ROWS, expected + (1 << 16)):
            wanted = []  # a footer that promises more than its episodes: nothing is allocated for it
        try:
            table = file.read(columns=wanted)
        except EXPECTED as error:
            self.broken[place.path] = in_a_line(error)
            return None
        for name in wanted:
            try:
                columns[name] = rows_of(table.column(name), self.dims(name))
            except EXPECTED as error:
                troubles.append((name, in_a_line(error)))
        block = Block(self, place.path, place.episodes, rows, tuple(types), types, columns, tuple(troubles))
        self._blocks[place.path] = block
        self._shrink()
        return block

    def _shrink(self) -> None:
        sizes = {p: sum(c.nbytes for c in b.columns.values()) for p, b in self._blocks.items()}
        while sum(sizes.values()) > CACHE_BYTES and len(self._blocks) > 1:
            path, _ = self._blocks.popitem(last=False)
            del sizes[path]

    def column_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """One column [N, D], file after file, as often as asked."""
        for block in self.blocks():
            if name in block.columns:
                yield block.columns[name]

    def pictures(self, place: Place, camera: str, rows: range) -> list[Any]:
        """Cells of an `image` column; only the row groups that hold `rows` are read."""
        file = self.open_table(place.path)
        if file is None:
            return []
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)])
        groups = np.unique(np.searchsorted(ends, [rows.start, rows.stop - 1], side="right"))
        first, last = int(groups[0]), min(int(groups[-1]), len(ends) - 1)
        before = int(ends[first - 1]) if first else 0
        table = file.read_row_groups(list(range(first, last + 1)), columns=[camera])
        return table.column(camera).slice(rows.start - before, len(rows)).to_pylist()

    # --- reading ---------------------------------------------------------------------------------------

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """A JSON object; None, and remembered, where it is none."""
        try:
            if path.stat().st_size > MOST_JSON:
                raise DataError(f"{path.stat().st_size:,} bytes of JSON; refused")
            value = json.loads(path.read_text(encoding="utf-8"))
        except (*EXPECTED, RecursionError) as error:
            self.broken[path] = in_a_line(error)
            return None
        if not isinstance(value, dict):
            self.broken[path] = f"expected a JSON object, found {type(value).__name__}"
            return None
        return value

    def open_table(self, path: Path) -> Any | None:
        """A `pq.ParquetFile`; None, and remembered, where it cannot be opened."""
        import pyarrow.parquet as pq

        if path in self.broken:
            return None
        try:
            file = pq.ParquetFile(path)
            refuse_claims(file.metadata, path.stat().st_size, self.name_of(path))
            return file
        except EXPECTED as error:
            self.broken[path] = in_a_line(error) if path.exists() else "no such file"
            return None

    def read_table(self, path: Path) -> pa.Table | None:
        file = self.open_table(path)
        if file is None:
            return None
        try:
            if file.metadata.num_rows > MOST_ROWS:
                raise DataError(f"{file.metadata.num_rows:,} rows; refused")
            return file.read()
        except EXPECTED as error:
            self.broken[path] = in_a_line(error)
            return None


def is_there(path: Path) -> bool:
    """Whether a path leads to anything; names longer than the file system allows lead nowhere."""
    try:
        return path.exists()
    except OSError:
        return False


def _list_files(folder: str, name: str, found: dict[str, int]) -> None:
    """Names and sizes, in order; links to folders are not entered."""
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in inside:
        below = f"{name}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            _list_files(entry.path, below, found)
            continue
        try:
            found[below] = entry.stat().st_size
        except OSError:
            found[below] = -1  # a link to nothing


def feature_trouble(told: Any) -> str:
    """What is wrong with a feature's description, "" when nothing is."""
    if not isinstance(told, dict):
        return f"is {type(told).__name__}, expected dtype, shape and names"
    dtype, shape = told.get("dtype"), told.get("shape")
    if dtype not in NOT_NUMBERS:
        try:
            kind = np.dtype(dtype).kind if isinstance(dtype, str) else "?"
        except TypeError:
            kind = "?"
        if kind not in "biuf":
            return f"has dtype {dtype!r}, expected a numpy number, video, image, string or language"
    sides = isinstance(shape, list | tuple) and all(isinstance(n, int) and 0 < n < 1 << 20 for n in shape)
    if not sides or not shape or len(shape) > 5:
        return f"has shape {shape!r}, expected a list of positive numbers"
    if int(np.prod(np.asarray(shape, np.float64))) > 1 << 28:
        return f"has shape {shape!r}: more than a frame can hold"
    if dtype in PICTURES and len(shape) != 3:
        return f"has shape {shape!r}, expected height, width and channels"
    return ""


def template_trouble(template: Any) -> str | None:
    """Why a path template of info.json is not followed: it would leave the dataset, or format something else."""
    if not isinstance(template, str):
        return f"is {type(template).__name__}, expected text"
    if TEMPLATE.fullmatch(template) is None:
        return (
            f"is '{template[:80]}', expected only {{video_key}}, {{chunk_index}} and {{file_index}} in braces"
        )
    if template.startswith("/") or ".." in template.split("/") or "\\" in template or "\0" in template:
        return f"is '{template[:80]}', which leaves the dataset; refused"
    return None


def numbers_of(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of integers or floats without nulls, not through pandas."""
    import pyarrow as pa

    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def rows_of(column: pa.ChunkedArray, dims: int) -> NDArray[Any]:
    """Scalars or lists of any Arrow kind -> [N, dims]; DataError where rows differ in length or lack values."""
    import pyarrow as pa

    rows = len(column)
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if array.null_count:
        raise DataError(f"{array.null_count} of {rows} values are missing")
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    while any(test(array.type) for test in is_list):
        if (
            not pa.types.is_fixed_size_list(array.type)
            and len(np.unique(numbers_of(pa.chunked_array([array.value_lengths()])))) > 1
        ):
            raise DataError("rows of different lengths")
        array = array.flatten()
        if array.null_count:
            raise DataError(f"{array.null_count} elements are missing")
    if not (
        pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)
    ):
        raise DataError(f"is {column.type}, expected numbers")
    if len(array) != rows * dims:
        raise DataError(f"holds {len(array)} elements in {rows} rows, expected {dims} in each")
    return numbers_of(pa.chunked_array([array])).reshape(rows, dims)
