"""Shards: a dataset again as Parquet files made for random reading, which any Parquet reader opens as they are.

    <dataset>/dpipe/shards/<variant>/
        part-00000.parquet   the rows of a part: numbers first, then one JPEG per camera
        receipts/            part-00000-<key>.npz: the part is done, and where its values lie
        index.bin            where every row group's values and every frame's bytes lie, with checksums
        index.json           last: its presence means complete

Row groups hold at most 512 frames, never of two episodes. Numbers and frames are stored plain, uncompressed, one
page per column and row group, without nulls: the last bytes of a column chunk are then its values themselves
(for frames: each behind its 4-byte length), so our index needs only their places. Columns are read by memory
map, a frame by one positioned read; both are checked against the checksums written with them.

    values of a row    group_values[group, column] + (row - group_first[group]) * bytes of a row
    frame of a row     frame_offset[row, camera], frame_length[row, camera]

Format  Apache Parquet, "Data Pages" and "Encodings: PLAIN"; written by pyarrow, whose reading is the judge of
every offset before the index is written (`_prove`).
Legend  N rows, G row groups, K columns of numbers, C cameras, T frames of an episode, E episodes
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.contract import canonical_json
from ..schemas.errors import DataError, UsageError, malformed_as, unknown_name
from ..schemas.features import DEFAULT_FEATURES
from .dataset import Dataset, Episodes, TextColumns, contents_digest
from .health import Health
from .rows import Fit, Rows

if TYPE_CHECKING:
    import pyarrow as pa

    from .remote import Cache, RemoteFolder

SHARDS_VERSION = 1
GROUP_ROWS = 512
FOLDER = Path("dpipe") / "shards"
FRAME_KINDS = ("jpeg", "video", "none")
OPEN_PARTS = 128  # files kept open by one reader
REMAKE = "Make the shards again:  dpipe precompute shards"
ARRAYS = {
    *("group_first", "group_part", "group_values", "group_checks", "part_first"),
    *("frame_offset", "frame_length", "frame_check", "episode_length", "episode_content"),
}
ONE_PAGE = 2**30  # larger than any column chunk of 512 rows

# (episode, camera) -> its JPEGs at the stored size, one a frame, or None where there are none.
ReadyFrames = Callable[[int, str], "list[bytes] | None"]


@dataclass(frozen=True)
class ShardOptions:
    """What goes into shards.

    `frames`: "jpeg"; "video" leaves them in the dataset's videos; "none" has no pictures at all. `short_side`
    shrinks larger frames, keeping their aspect. `columns`: the dataset's numeric columns by default. `targets`
    are requests as `open_targets` takes them; per-frame ones become columns.
    """

    frames: str = "jpeg"
    short_side: int = 256
    quality: int = 90
    columns: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.frames not in FRAME_KINDS:
            raise unknown_name("kind of frames", self.frames, FRAME_KINDS)
        if not 1 <= self.quality <= 100 or self.short_side < 8:
            raise UsageError(
                f"JPEG quality {self.quality}, short side {self.short_side}: expected 1-100, 8 or more"
            )

    def stored_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a camera's JPEGs, from that of its frames."""
        scale = min(1.0, self.short_side / min(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    @property
    def variant(self) -> str:
        """The folder's name: what tells shards apart."""
        name = f"jpeg{self.short_side}-q{self.quality}" if self.frames == "jpeg" else self.frames
        rest = canonical_json({"columns": self.columns, "targets": self.targets})
        more = bool(self.columns or self.targets)
        return name + (f"-{hashlib.sha256(rest.encode()).hexdigest()[:8]}" if more else "")


@dataclass(frozen=True)
class Column:
    """A column of numbers: `dtype` as read, `dim` 0 for a scalar, else values a row."""

    name: str
    dtype: str
    dim: int

    @cached_property
    def stored(self) -> np.dtype[Any]:
        """Parquet has no integers below 32 bits: smaller ones lie as int32."""
        dtype = np.dtype(self.dtype)
        small = dtype.kind in "iu" and dtype.itemsize < 4
        return np.dtype("<i4") if small else dtype.newbyteorder("<")

    @cached_property
    def is_widened(self) -> bool:
        return self.stored != np.dtype(self.dtype)

    @cached_property
    def row_bytes(self) -> int:
        return self.stored.itemsize * max(1, self.dim)


@dataclass(frozen=True)
class ShardPlan:
    """What every part's file looks like, settled before any is written."""

    options: ShardOptions
    columns: tuple[Column, ...]
    cameras: Mapping[str, tuple[int, int]]  # stored (height, width)
    features: Mapping[str, Any]  # of the columns and cameras, as in info.json


# --- writing ------------------------------------------------------------------------------------------------


def write_shards(
    dataset: Dataset,
    out: Path | None = None,
    options: ShardOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write a dataset's shards, going on where a stopped run left off; the folder.

    `progress` is told the frames of each part when it is done. To spread parts over processes, call
    `write_part` for each of `range(len(dataset.parts()))` anywhere, then `finish_shards`.
    """
    options = options or ShardOptions()
    out = out or dataset.root / FOLDER / options.variant
    for number in range(len(dataset.parts())):
        frames = write_part(dataset, out, number, options)
        if progress is not None:
            progress(frames)
    return finish_shards(dataset, out, options)


def plan_shards(dataset: Dataset, options: ShardOptions) -> ShardPlan:
    names = options.columns or dataset.vectors
    targets = _target_columns(dataset, options)
    columns = [
        *(
            Column(name, told["dtype"], 0)
            for name, told in DEFAULT_FEATURES.items()
            if name in dataset.features
        ),
    ]
    features: dict[str, Any] = {}
    for name in names:
        if name not in dataset.vectors:
            raise unknown_name(f"column of {dataset.root}", name, dataset.vectors)
        told = dataset.features[name]
        shape = tuple(int(n) for n in told["shape"])
        columns.append(
            Column(name, str(np.dtype(told["dtype"])), 0 if shape == (1,) else int(np.prod(shape)))
        )
        features[name] = told
    for name, values in targets.items():
        dim = int(np.prod(values.shape[1:])) if values.ndim > 1 else 0
        columns.append(Column(name, str(values.dtype), dim))
        features[name] = {"dtype": str(values.dtype), "shape": list(values.shape[1:]) or [1], "names": None}
    cameras = {}
    for camera in dataset.cameras if options.frames == "jpeg" else ():
        cameras[camera] = options.stored_size(*dataset.camera_size(camera))
        features[camera] = {
            "dtype": "image",
            "shape": [*cameras[camera], 3],
            "names": ["height", "width", "channels"],
        }
    return ShardPlan(options, tuple(columns), cameras, features | DEFAULT_FEATURES)


def _target_columns(
    dataset: Dataset, options: ShardOptions, rows: Rows | None = None
) -> dict[str, NDArray[Any]]:
    """Per-frame targets at rows [n] (default: the first row alone, to see their shapes)."""
    if not options.targets:
        return {}
    from .targets import open_targets

    opened = open_targets(dataset, list(options.targets))
    return opened.take(index=np.zeros(1, np.int64) if rows is None else rows)


def encode_frames(frames: NDArray[np.uint8], size: tuple[int, int], quality: int) -> list[bytes]:
    """Frames [n, H, W, 3] as JPEGs (4:2:0) of `size` (height, width).

    A conversion that holds recorded frames calls this beside its video encoder: shards then cost no decoding.
    """
    import simplejpeg

    encoded = []
    small = np.empty((*size, 3), np.uint8)
    fit = Fit(size)
    for frame in frames:
        if frame.shape[:2] != size:
            fit.apply(frame, small)
            frame = small
        pixels = np.ascontiguousarray(frame)
        encoded.append(simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420", fastdct=False))
    return encoded


class PartWriter:
    """One part's file: episodes in order, then `close`, which proves every offset and returns them."""

    def __init__(self, path: Path, plan: ShardPlan):
        import pyarrow.parquet as pq

        self.path, self.plan = path, plan
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.schema = _schema(plan)
        settings: dict[str, Any] = {
            "compression": {name: "SNAPPY" if name == "task" else "NONE" for name in self.schema.names},
            "use_dictionary": ["task"],
            "write_statistics": list(DEFAULT_FEATURES),
        }
        self._writer = pq.ParquetWriter(
            self.temporary, self.schema, data_page_size=ONE_PAGE, write_page_checksum=True, **settings
        )
        self._group_rows: list[int] = []
        self._checks: list[list[int]] = []
        self._lengths: list[NDArray[np.uint32]] = []
        self._frame_checks: list[NDArray[np.uint32]] = []

    def write(
        self, columns: Mapping[str, NDArray[Any]], task: Sequence[str], frames: Mapping[str, Sequence[bytes]]
    ) -> None:
        """Up to 512 rows of one episode: numbers [n, ...], sentences [n], JPEGs [n] by camera."""
        import pyarrow as pa

        count = len(task)
        if not 0 < count <= GROUP_ROWS:
            raise ValueError(f"a row group has 1 to {GROUP_ROWS} rows, not {count}")
        arrays, checks = [], []
        for column in self.plan.columns:
            values = np.ascontiguousarray(columns[column.name], column.stored).reshape(count, -1)
            checks.append(checksum(values.tobytes()))
            field = self.schema.field(column.name)
            exact = np.ascontiguousarray(columns[column.name], np.dtype(column.dtype)).reshape(-1)
            value_type = field.type.value_type if column.dim else field.type
            flat = pa.array(exact, type=value_type)
            if column.dim:
                flat = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
            arrays.append(flat)
        arrays.append(pa.array(list(task), pa.string()))
        lengths = np.empty((count, len(self.plan.cameras)), np.uint32)
        frame_checks = np.empty_like(lengths)
        for c, camera in enumerate(self.plan.cameras):
            data = pa.array(list(frames[camera]), pa.binary())
            arrays.append(pa.StructArray.from_arrays([data, pa.nulls(count, pa.string())], ["bytes", "path"]))
            lengths[:, c] = [len(data) for data in frames[camera]]
            frame_checks[:, c] = [checksum(data) for data in frames[camera]]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema), row_group_size=count)
        self._group_rows.append(count)
        self._checks.append(checks)
        self._lengths.append(lengths)
        self._frame_checks.append(frame_checks)

    def close(self) -> dict[str, NDArray[Any]]:
        """Finish the file durably under its name; where its values lie, proven against pyarrow's reading."""
        self._writer.close()
        places = self._places()
        _prove(self.temporary, self.plan, places)
        _commit(self.temporary, self.path)
        return places

    def abort(self) -> None:
        self._writer.close()
        self.temporary.unlink(missing_ok=True)

    def _places(self) -> dict[str, NDArray[Any]]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.temporary)
        numbers, cameras = len(self.plan.columns), len(self.plan.cameras)
        rows = np.array(self._group_rows, np.int64)
        ends = np.empty((len(rows), numbers + cameras), np.int64)
        # Parquet's leaves stand in the schema's order: numbers, the sentence, two a camera (bytes, path).
        leaves = [*range(numbers), *range(numbers + 1, numbers + 1 + 2 * cameras, 2)]
        for g in range(len(rows)):
            group = file.metadata.row_group(g)
            for k, leaf in enumerate(leaves):
                chunk = group.column(leaf)
                ends[g, k] = chunk.data_page_offset + chunk.total_compressed_size
        sizes = rows[:, None] * np.array([column.row_bytes for column in self.plan.columns], np.int64)
        # Booleans are packed, eight a byte.
        packed = [k for k, column in enumerate(self.plan.columns) if column.dtype == "bool"]
        for k in packed:
            sizes[:, k] = -(-rows * max(1, self.plan.columns[k].dim) // 8)
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros((0, cameras), np.uint32)
        offsets = np.empty(lengths.shape, np.int64)
        start = 0
        for g, count in enumerate(rows):
            here = slice(start, start + int(count))
            spans = 4 + lengths[here].astype(np.int64)
            offsets[here] = ends[g, numbers:] - spans.sum(axis=0) + np.cumsum(spans, axis=0) - spans + 4
            start += int(count)
        return {
            "group_rows": rows,
            "group_values": ends[:, :numbers] - sizes,
            "group_checks": np.array(self._checks, np.uint32).reshape(len(rows), numbers),
            "frame_offset": offsets,
            "frame_length": lengths,
            "frame_check": np.concatenate(self._frame_checks) if self._frame_checks else lengths,
        }


def checksum(data: bytes | memoryview) -> int:
    """32 bits of xxh3: they find damage, not malice, and cost 1 microsecond a frame."""
    import xxhash

    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def _schema(plan: ShardPlan) -> pa.Schema:
    """Numbers are required fields; frames are what `datasets` calls an Image, so that it decodes them.

    It takes its own description from the metadata only where the Arrow type is equal, null or not included.
    """
    import pyarrow as pa

    fields, described = [], {}
    for column in plan.columns:
        value = pa.from_numpy_dtype(np.dtype(column.dtype))
        told: dict[str, Any] = {"dtype": column.dtype, "_type": "Value"}
        if column.dim:
            value = pa.list_(pa.field("element", value, nullable=False), column.dim)
            told = {"feature": told, "length": column.dim, "_type": "List"}
        fields.append(pa.field(column.name, value, nullable=False))
        described[column.name] = told
    fields.append(pa.field("task", pa.string(), nullable=False))
    described["task"] = {"dtype": "string", "_type": "Value"}
    for camera in plan.cameras:
        fields.append(pa.field(camera, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
        described[camera] = {"_type": "Image"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def _prove(path: Path, plan: ShardPlan, places: Mapping[str, NDArray[Any]]) -> None:
    """Every value and frame at the places we computed, against what pyarrow reads from the same file."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    starts = np.concatenate([[0], np.cumsum(places["group_rows"])])
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    for g, count in enumerate(places["group_rows"].tolist()):
        table = file.read_row_group(g)
        for k, column in enumerate(plan.columns):
            theirs = table.column(column.name).combine_chunks()
            theirs = np.asarray(theirs.flatten() if column.dim else theirs)
            ours = read_values(data, int(places["group_values"][g, k]), column, 0, count).reshape(-1)
            if not np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"):
                raise AssertionError(f"{path}: '{column.name}' of row group {g} is not where it should be")
        for c, camera in enumerate(plan.cameras):
            for row, theirs in enumerate(_encoded(table.column(camera)), int(starts[g])):
                at, length = (int(places[name][row, c]) for name in ("frame_offset", "frame_length"))
                if data[at : at + length].tobytes() != theirs:
                    raise AssertionError(f"{path}: {camera} of row {row} is not where it should be")


def _encoded(column: pa.ChunkedArray) -> list[bytes]:
    return column.combine_chunks().field("bytes").to_pylist()


def read_values(data: Any, base: int, column: Column, first: int, count: int) -> NDArray[Any]:
    """Rows [first, first + count) of a column chunk whose values begin at `base`: [count, dim] or [count]."""
    width = max(1, column.dim)
    if column.dtype == "bool":
        start, stop = first * width, (first + count) * width
        packed = np.frombuffer(data, np.uint8, -(-stop // 8) - start // 8, base + start // 8)
        flat = np.unpackbits(packed, bitorder="little")[start % 8 :][: stop - start].astype(bool)
    else:
        flat = np.frombuffer(data, column.stored, count * width, base + first * column.row_bytes)
        if column.is_widened:
            flat = flat.astype(column.dtype)
    return flat.reshape(count, column.dim) if column.dim else flat


def write_part(
    dataset: Dataset, out: Path, number: int, options: ShardOptions, ready: ReadyFrames | None = None
) -> int:
    """One part's file and receipt, unless they are there already; its number of frames.

    `ready` gives an episode's JPEGs where a conversion made them; other episodes are decoded from the dataset.
    """
    plan = plan_shards(dataset, options)
    episodes = dataset.parts()[number]
    frames = int(dataset.episodes.length[episodes.start : episodes.stop].sum())
    key = _part_key(dataset, episodes, plan)
    path, receipt = _part_file(out, number), _receipt_file(out, number, key)
    if receipt.is_file() and path.is_file():
        return frames
    # A part about to change takes the name of completeness away first.
    (out / "index.json").unlink(missing_ok=True)
    names = [column.name for column in plan.columns]
    own = [name for name in names if name in dataset.features]
    writer = PartWriter(path, plan)
    try:
        for episode in episodes:
            length, first = int(dataset.episodes.length[episode]), int(dataset.episodes.first_index[episode])
            columns = dataset.columns(own, episode)
            columns |= _target_columns(dataset, options, np.arange(first, first + length))
            tasks = [dataset.tasks[i] for i in columns["task_index"].tolist()]
            made = {camera: ready(episode, camera) if ready else None for camera in plan.cameras}
            for start in range(0, length, GROUP_ROWS):
                stop = min(start + GROUP_ROWS, length)
                pictures = {}
                for camera, size in plan.cameras.items():
                    jpegs = made[camera]
                    if jpegs is None:
                        frames_here = dataset.frames(episode, camera, start, stop)
                        pictures[camera] = encode_frames(frames_here, size, options.quality)
                    else:
                        pictures[camera] = jpegs[start:stop]
                rows = {name: columns[name][start:stop] for name in names}
                writer.write(rows, tasks[start:stop], pictures)
        places = writer.close()
    except BaseException:
        writer.abort()
        raise
    for old in receipt.parent.glob(f"part-{number:05d}-*.npz"):
        old.unlink()
    places["digest"] = np.array(_file_digest(path))
    places["bytes"] = np.array(path.stat().st_size)
    receipt.parent.mkdir(parents=True, exist_ok=True)
    temporary = receipt.with_name(f".{receipt.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **places)
    _commit(temporary, receipt)
    return frames


def is_written(dataset: Dataset, out: Path, number: int, options: ShardOptions) -> bool:
    """Whether a part needs no work: file and receipt are there, made of what the dataset holds now."""
    key = _part_key(dataset, dataset.parts()[number], plan_shards(dataset, options))
    return _receipt_file(out, number, key).is_file() and _part_file(out, number).is_file()


def finish_shards(dataset: Dataset, out: Path, options: ShardOptions) -> Path:
    """Join the parts' receipts into the index; DataError lists parts that are missing."""
    plan = plan_shards(dataset, options)
    receipts, missing = [], []
    for number, episodes in enumerate(dataset.parts()):
        receipt = _receipt_file(out, number, _part_key(dataset, episodes, plan))
        receipts.append(receipt)
        if not receipt.is_file() or not _part_file(out, number).is_file():
            missing.append(number)
    if missing:
        raise DataError(
            f"{out}: parts {', '.join(map(str, missing[:8]))} of {len(receipts)} are not written\n"
            "  Run the same command again; it goes on from what is there."
        )
    for stray in sorted(out.glob("part-*.parquet"))[len(receipts) :]:
        stray.unlink()  # the dataset has shrunk
    found = [np.load(receipt) for receipt in receipts]
    numbers = len(plan.columns)
    group_rows = _joined(found, "group_rows", (), np.int64)
    part_rows = [int(each["group_rows"].sum()) for each in found]
    arrays = {
        "group_first": np.concatenate([[0], np.cumsum(group_rows)]).astype(np.int64),
        "group_part": np.repeat(
            np.arange(len(found), dtype=np.int32), [len(each["group_rows"]) for each in found]
        ),
        "group_values": _joined(found, "group_values", (numbers,), np.int64),
        "group_checks": _joined(found, "group_checks", (numbers,), np.uint32),
        "part_first": np.concatenate([[0], np.cumsum(part_rows)]).astype(np.int64),
        "frame_offset": _joined(found, "frame_offset", (len(plan.cameras),), np.int64),
        "frame_length": _joined(found, "frame_length", (len(plan.cameras),), np.uint32),
        "frame_check": _joined(found, "frame_check", (len(plan.cameras),), np.uint32),
        "episode_length": dataset.episodes.length,
        "episode_content": np.array([list(bytes.fromhex(each)) for each in dataset.contents()], np.uint8),
    }
    table = _write_arrays(out / "index.bin", arrays)
    index = {
        "shards": SHARDS_VERSION,
        "name": dataset.name,
        "source": dataset.digest(),
        "fps": dataset.fps,
        "options": asdict(options),
        "columns": [asdict(column) for column in plan.columns],
        "cameras": {camera: list(size) for camera, size in plan.cameras.items()},
        "features": plan.features,
        "tasks": dataset.tasks,
        "splits": {name: list(span) for name, span in dataset.splits.items()},
        "conventions": (dataset.manifest or {}).get("conventions", {}),
        "episodes": len(dataset),
        "frames": dataset.total_frames,
        "parts": [
            {
                "file": _part_file(out, number).name,
                "rows": part_rows[number],
                "bytes": int(each["bytes"]),
                "digest": str(each["digest"]),
            }
            for number, each in enumerate(found)
        ],
        "index": {"file": "index.bin", "digest": _file_digest(out / "index.bin"), "arrays": table},
    }
    temporary = out / f".index.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(index, indent=1) + "\n")
    _commit(temporary, out / "index.json")
    return out


def _part_file(out: Path, number: int) -> Path:
    return out / f"part-{number:05d}.parquet"


def _receipt_file(out: Path, number: int, key: str) -> Path:
    return out / "receipts" / f"part-{number:05d}-{key}.npz"


def _part_key(dataset: Dataset, episodes: range, plan: ShardPlan) -> str:
    """What a part's file depends on: the options, its episodes' contents, and the numbers they bear."""
    told = {
        "version": SHARDS_VERSION,
        "options": asdict(plan.options),
        "columns": [asdict(column) for column in plan.columns],
        "cameras": plan.cameras,
        "contents": contents_digest(dataset.contents()[episodes.start : episodes.stop]),
        "first": [episodes.start, int(dataset.episodes.first_index[episodes.start])],
        "tasks": dataset.tasks,
    }
    return hashlib.sha256(canonical_json(told).encode()).hexdigest()[:16]


def _joined(found: Sequence[Any], name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros((0, *shape), dtype), *(each[name] for each in found)]).astype(dtype)


def _write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Arrays one after another, each on a 64-byte boundary; where each lies."""
    table: dict[str, Any] = {}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        for name, array in arrays.items():
            file.write(bytes(-file.tell() % 64))
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            table[name] = {"offset": file.tell(), "dtype": little.dtype.str, "shape": list(array.shape)}
            file.write(little.tobytes())
    _commit(temporary, path)
    return table


def _file_digest(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _commit(temporary: Path, final: Path) -> None:
    """Make a finished file durable under its final name."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- reading ------------------------------------------------------------------------------------------------


class _OpenPart:
    """One shard file: a descriptor for positioned reads, a map for columns. Closed when nobody holds it."""

    def __init__(self, path: Path, size: int):
        self.path = path
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"no shard {path}\n  expected: {size} bytes.  Make the shards again.") from error
        found = os.fstat(self.file).st_size
        if found != size:
            raise DataError(
                f"{path} has {found} bytes\n  expected: {size}, by index.json.  Make the shards again, or fetch them."
            )
        self.map = mmap.mmap(self.file, 0, access=mmap.ACCESS_READ)

    def read(self, start: int, length: int) -> bytes:
        if start < 0 or start + length > len(self.map):
            return b""  # a damaged index: nothing is allocated for what it claims
        return os.pread(self.file, length, start)

    def column(self, start: int, length: int) -> tuple[Any, int]:
        """Something that holds bytes [start, start + length), and where they begin in it."""
        if start < 0 or start + length > len(self.map):
            raise DataError(
                f"{self.path}: its index names bytes {start} to {start + length} of {len(self.map)}\n  {REMAKE}"
            )
        return self.map, start

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


class _RemotePart:
    """One shard file on the network, read piece by piece."""

    def __init__(self, remote: RemoteFolder, name: str, size: int):
        self.remote, self.name, self.size = remote, name, size
        self.path = f"{remote.url}/{name}"

    def read(self, start: int, length: int) -> bytes:
        return self.remote.read(self.name, start, start + length, self.size)

    def column(self, start: int, length: int) -> tuple[Any, int]:
        return self.read(start, length), 0


class ShardRows:
    """Rows from shards; a `RowReader`. With `remote`, `folder` holds the index and the parts are fetched."""

    def __init__(self, folder: Path, fit: Fit, remote: RemoteFolder | None = None):
        self.folder, self.fit, self.remote = folder, fit, remote
        self.index = read_index(folder)
        self._arrays = _map_arrays(folder, self.index)
        with malformed_as(folder / "index.json", REMAKE):
            self._columns = {
                told["name"]: (k, Column(**told)) for k, told in enumerate(self.index["columns"])
            }
            self._cameras = {camera: c for c, camera in enumerate(self.index["cameras"])}
            self._proven = np.zeros((len(self._arrays["group_part"]), len(self._columns)), bool)
            _check_index(self.index, self._columns, self._arrays)
        self._parts: OrderedDict[int, _OpenPart | _RemotePart] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "fit": self.fit, "remote": self.remote}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)

    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def cameras(self) -> tuple[str, ...]:
        return tuple(self._cameras)

    def size(self, camera: str) -> tuple[int, int]:
        height, width = self.index["cameras"][camera]
        return height, width

    def values(self, names: Iterable[str], rows: Rows) -> dict[str, NDArray[Any]]:
        """Columns at rows [...]; runs of neighbouring rows are copied in one piece."""
        flat = np.ascontiguousarray(rows.reshape(-1))
        first = self._arrays["group_first"]
        group = np.searchsorted(first, flat, side="right") - 1
        within = flat - first[group]
        cuts = np.flatnonzero((np.diff(within) != 1) | (np.diff(group) != 0)) + 1
        starts = [0, *cuts.tolist()] if len(flat) else []
        stops = [*starts[1:], len(flat)]
        groups, offsets = group[starts].tolist(), within[starts].tolist()
        parts = self._arrays["group_part"][group[starts]].tolist()
        names = list(names)
        if self.remote is not None:
            self._fetch_columns(names, sorted(set(zip(parts, groups, strict=True))))
        result = {}
        for name in names:
            if name not in self._columns:
                raise unknown_name(f"column of {self.folder}", name, self._columns)
            k, column = self._columns[name]
            out = np.empty((len(flat), column.dim) if column.dim else len(flat), column.dtype)
            bases = self._arrays["group_values"][groups, k].tolist()
            for start, stop, g, part, offset, base in zip(
                starts, stops, groups, parts, offsets, bases, strict=True
            ):
                opened = self._part(part)
                if isinstance(opened, _RemotePart) or not self._proven[g, k]:
                    data, base = self._checked_group(opened, g, k, column)
                else:
                    data = opened.map
                out[start:stop] = read_values(data, base, column, offset, stop - start)
            result[name] = out.reshape(*rows.shape, *out.shape[1:])
        return result

    def _group_span(self, group: int, k: int, column: Column) -> tuple[int, int, int]:
        """(rows, first byte, bytes) of a column in a row group."""
        first = self._arrays["group_first"]
        count = int(first[group + 1] - first[group])
        width = count * max(1, column.dim)
        length = -(-width // 8) if column.dtype == "bool" else count * column.row_bytes
        return count, int(self._arrays["group_values"][group, k]), length

    def _fetch_columns(self, names: Sequence[str], groups: Sequence[tuple[int, int]]) -> None:
        """Fetch what a batch's columns lie in, all at once rather than one after the other."""
        assert self.remote is not None
        spans = []
        for part, group in groups:
            told = self.index["parts"][part]
            for name in names:
                _, start, length = self._group_span(group, *self._columns[name])
                spans.append((told["file"], start, start + length, told["bytes"]))
        self.remote.prepare(spans)

    def _checked_group(
        self, opened: _OpenPart | _RemotePart, group: int, k: int, column: Column
    ) -> tuple[Any, int]:
        """A column chunk whose values are those that were written, and where they begin in it.

        Local files are checked once per process, remote ones whenever they are read.
        """
        count, start, length = self._group_span(group, k, column)
        for attempt in range(2):
            data, base = opened.column(start, length)
            stored = np.ascontiguousarray(read_values(data, base, column, 0, count), column.stored)
            if checksum(stored.tobytes()) == self._arrays["group_checks"][group, k]:
                self._proven[group, k] = True
                return data, base
            if isinstance(opened, _RemotePart) and attempt == 0:
                opened.remote.forget(opened.name, start, start + length)
            else:
                break
        raise DataError(
            f"{opened.path}: '{column.name}' is damaged in {self._where(int(self._arrays['group_first'][group]))}\n"
            "  Make the shards again, or fetch the file again."
        )

    def frames(self, camera: str, rows: Rows, out: NDArray[np.uint8], health: Health) -> None:
        import simplejpeg

        c = self._cameras[camera]
        arrays = self._arrays
        offsets, lengths = arrays["frame_offset"][rows, c].tolist(), arrays["frame_length"][rows, c].tolist()
        checks = arrays["frame_check"][rows, c].tolist()
        parts = (np.searchsorted(arrays["part_first"], rows, side="right") - 1).tolist()
        decode, direct = simplejpeg.decode_jpeg, out.shape[1:3] == self.size(camera)
        smallest = {} if direct else self._smallest(camera)
        if self.remote is not None:
            told = self.index["parts"]
            spans = zip(parts, offsets, lengths, strict=True)
            self.remote.prepare((told[p]["file"], at, at + n, told[p]["bytes"]) for p, at, n in spans)
        with health.timing("decode"):
            for i, (part, offset, length, check) in enumerate(
                zip(parts, offsets, lengths, checks, strict=True)
            ):
                data = self._part(part).read(offset, length)
                if len(data) != length or checksum(data) != check:
                    data = self._read_again(part, offset, length, check, int(rows[i]), camera)
                try:
                    if direct:
                        decode(data, "RGB", buffer=out[i])
                    else:
                        self.fit.apply(decode(data, "RGB", **smallest), out[i])
                except ValueError as error:
                    raise self._damaged(part, int(rows[i]), camera, str(error)) from error
        health.count(frames_decoded=len(parts), bytes_read=sum(lengths))

    def encoded(self, camera: str, row: int) -> bytes:
        """One frame's JPEG as it lies in its shard."""
        c, arrays = self._cameras[camera], self._arrays
        part = int(np.searchsorted(arrays["part_first"], row, side="right")) - 1
        length, offset = int(arrays["frame_length"][row, c]), int(arrays["frame_offset"][row, c])
        data, check = self._part(part).read(offset, length), int(arrays["frame_check"][row, c])
        if len(data) != length or checksum(data) != check:
            return self._read_again(part, offset, length, check, row, camera)
        return data

    def _read_again(self, part: int, offset: int, length: int, check: int, row: int, camera: str) -> bytes:
        """What came spoiled over the network is fetched once more; anything else is an error."""
        opened = self._part(part)
        if isinstance(opened, _RemotePart):
            opened.remote.forget(opened.name, offset, offset + length)
            data = opened.read(offset, length)
            if len(data) == length and checksum(data) == check:
                return data
        raise self._damaged(part, row, camera, "its bytes are not those written")

    def _smallest(self, camera: str) -> dict[str, Any]:
        """Let the decoder itself shrink by a half or a quarter where what is wanted is still smaller."""
        height, width, _, _ = self.fit.inner(*self.size(camera))
        return {"min_height": height, "min_width": width}

    def _part(self, number: int) -> _OpenPart | _RemotePart:
        opened = self._parts.get(number)
        if opened is not None:
            return opened
        told = self.index["parts"][number]
        if self.remote is not None:
            opened = _RemotePart(self.remote, told["file"], told["bytes"])
        else:
            opened = _OpenPart(self.folder / told["file"], told["bytes"])
        with self._lock:
            self._parts[number] = opened
            while len(self._parts) > OPEN_PARTS:
                self._parts.popitem(last=False)
        return opened

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each episode [E]."""
        return np.asarray(self._arrays["episode_length"])

    def content(self, episode: int) -> str:
        return self._arrays["episode_content"][episode].tobytes().hex()

    def _where(self, row: int) -> str:
        ends = np.cumsum(self.lengths)
        episode = int(np.searchsorted(ends, row, side="right"))
        frame = row - int(ends[episode - 1] if episode else 0)
        return f"episode {episode}, frame {frame}"

    def _damaged(self, part: int, row: int, camera: str, why: str) -> DataError:
        return DataError(
            f"{self._part(part).path}: {self._where(row)}, {camera} is damaged: {why}\n"
            "  Make the shards again, or fetch the file again."
        )

    def dataset(self) -> Dataset:
        """The dataset as far as the index tells of it: names, episodes, splits; no files of its own."""
        length = self.lengths
        zero = np.zeros(len(length), np.int64)
        first = np.concatenate([[0], np.cumsum(length)[:-1]]).astype(np.int64) if len(length) else zero
        index = self.index
        return Dataset(
            root=self.folder,
            name=index["name"],
            info={"fps": index["fps"], "features": index["features"]},
            fps=index["fps"],
            features=index["features"],
            stats={},
            tasks=index["tasks"],
            manifest={"name": index["name"], "conventions": index["conventions"]},
            episodes=Episodes(length, first, zero, zero, first, {}, TextColumns(())),
            splits={name: (span[0], span[1]) for name, span in index["splits"].items()},
        )


def open_remote_shards(url: str, cache: Cache, fit: Fit) -> ShardRows:
    """Shards below a URL: the index is fetched now, and anew each time; parts as samples ask for them."""
    from .remote import RemoteFolder

    remote = RemoteFolder(url, cache)
    remote.whole("index.json")
    told = read_index(remote.folder)["index"]
    remote.whole(told["file"], told["digest"])
    return ShardRows(remote.folder, fit, remote)


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    if not path.is_file():
        raise DataError(
            f"no finished shards in {folder}\n  expected: {path}, which is written last\n"
            "  Make or finish them:  dpipe precompute shards"
        )
    try:
        index = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}\n  Make the shards again.") from error
    if not isinstance(index, dict) or index.get("shards") != SHARDS_VERSION:
        index = index if isinstance(index, dict) else {}
        raise DataError(
            f"{path}: shards of version {index.get('shards')}; this dpipe reads {SHARDS_VERSION}\n"
            "  Make them again:  dpipe precompute shards"
        )
    return index


def _map_arrays(folder: Path, index: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    try:
        path = folder / str(index["index"]["file"])
        places = {
            str(name): (int(told["offset"]), np.dtype(told["dtype"]), tuple(int(n) for n in told["shape"]))
            for name, told in index["index"]["arrays"].items()
        }
        ends = [offset + math.prod(shape) * dtype.itemsize for offset, dtype, shape in places.values()]
        sound = set(places) >= ARRAYS and min(offset for offset, _, _ in places.values()) >= 0
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged_index(folder, f"{type(error).__name__}: {error}") from error
    if not sound or path.parent != folder:
        raise _damaged_index(folder, f"arrays {', '.join(sorted(places))} in {path.name}")
    if not path.is_file() or path.stat().st_size < max(ends):
        raise DataError(
            f"{path} is cut short or missing\n  expected: {max(ends)} bytes.  Make the shards again."
        )
    whole = np.memmap(path, np.uint8, "r").view(np.ndarray)
    return {
        name: np.frombuffer(whole, dtype, math.prod(shape), offset).reshape(shape)
        for name, (offset, dtype, shape) in places.items()
    }


def _check_index(
    index: Mapping[str, Any], columns: Mapping[str, tuple[int, Column]], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """What every look-up relies on, once: names, sizes and shapes that fit one another."""
    for name, (_, column) in columns.items():
        if (
            not isinstance(name, str)
            or not 0 <= int(column.dim) < 1 << 24
            or np.dtype(column.dtype).kind not in "biuf"
        ):
            raise ValueError(f"column {name!r:.80}")
    for size in index["cameras"].values():
        height, width = size
        if not (0 < int(height) < 1 << 15 and 0 < int(width) < 1 << 15):
            raise ValueError(f"pictures of {size}")
    for part in index["parts"]:
        if (
            not isinstance(part["file"], str)
            or "/" in part["file"]
            or "\\" in part["file"]
            or int(part["bytes"]) < 0
        ):
            raise ValueError(f"part {part['file']!r:.80}")
    groups, first = len(arrays["group_part"]), arrays["group_first"]
    frames, parts = int(first[-1]), arrays["part_first"]
    wanted = {
        "group_first": (groups + 1,),
        "group_values": (groups, len(columns)),
        "group_checks": (groups, len(columns)),
        "part_first": (len(index["parts"]) + 1,),
        **{name: (frames, len(index["cameras"])) for name in ("frame_offset", "frame_length", "frame_check")},
        "episode_content": (len(arrays["episode_length"]), 16),
    }
    wrong = [name for name, shape in wanted.items() if arrays[name].shape != shape]
    rising = first[0] == 0 and (np.diff(first) > 0).all() and (np.diff(parts) >= 0).all()
    inside = (arrays["group_part"] >= 0).all() and (arrays["group_part"] < len(index["parts"])).all()
    if wrong or not rising or not inside or parts[-1] != frames or arrays["episode_length"].sum() != frames:
        raise ValueError(f"tables that do not fit one another ({wrong[0] if wrong else 'order'})")
    for name in ("fps", "name", "source", "features", "tasks", "splits"):
        _ = index[name]
    _ = {name: (int(span[0]), int(span[1])) for name, span in index["splits"].items()}


def _damaged_index(folder: Path, found: str) -> DataError:
    return DataError(
        f"{folder / 'index.json'} is damaged\n  found: {found}\n"
        "  Make the shards again:  dpipe precompute shards"
    )


def find_shards(dataset: Dataset, cameras: Sequence[str] | None) -> Path | None:
    """Finished shards of a dataset that hold these cameras (None: all), the largest pictures first, if any."""
    wanted = set(dataset.cameras if cameras is None else cameras)
    found: list[tuple[int, Path]] = []
    for path in sorted((dataset.root / FOLDER).glob("*/index.json")):
        sizes = read_index(path.parent)["cameras"]
        if wanted <= set(sizes):
            found.append((-max((height * width for height, width in sizes.values()), default=0), path.parent))
    return min(found)[1] if found else None


def check_source(rows: ShardRows, dataset: Dataset) -> None:
    """Refuse shards made from other episodes than the dataset's.

    Contents recorded at conversion are compared whole. Elsewhere computing them all would cost a full read, so
    it is lengths, and the contents of eight episodes spread over the dataset; `dpipe doctor` compares all.
    """
    lengths = rows.lengths
    same = len(lengths) == len(dataset) and np.array_equal(lengths, dataset.episodes.length)
    if same and dataset.contents_known:
        same = dataset.digest() == rows.index["source"]
    elif same and len(dataset):
        for episode in np.unique(np.linspace(0, len(dataset) - 1, 8).astype(np.int64)).tolist():
            same = same and dataset.content(episode) == rows.content(episode)
    if not same:
        raise DataError(
            f"the shards in {rows.folder} were made from other episodes than {dataset.root} holds now\n"
            f"  expected: {len(dataset)} episodes, {dataset.total_frames} frames; "
            f"found: {len(lengths)} episodes, {int(lengths.sum())} frames\n"
            "  Make them again:  dpipe precompute shards"
        )
