"""Shards written: numbers and JPEGs of a dataset as the Parquet files that `streams/shard_format.py` describes.

pyarrow writes the files and is the judge of every offset before the index is written (`_prove`). A part is done
when its receipt is there; the index is joined of the receipts, last.

Legend  N rows, G row groups, K columns of numbers, C cameras, T frames of an episode, E episodes
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.contract import canonical_json
from ..schemas.errors import DataError, unknown_name
from ..schemas.features import DEFAULT_FEATURES
from .dataset import Dataset, contents_digest
from .rows import Fit, Rows
from .shard_format import FOLDER, GROUP_ROWS, SHARDS_VERSION, Column, ShardOptions, checksum, read_values

if TYPE_CHECKING:
    import pyarrow as pa

ONE_PAGE = 2**30  # larger than any column chunk of 512 rows

# (episode, camera) -> its JPEGs at the stored size, one a frame, or None where there are none.
ReadyFrames = Callable[[int, str], "list[bytes] | None"]


@dataclass(frozen=True)
class ShardPlan:
    """What every part's file looks like, settled before any is written."""

    options: ShardOptions
    columns: tuple[Column, ...]
    cameras: Mapping[str, tuple[int, int]]  # stored (height, width)
    features: Mapping[str, Any]  # of the columns and cameras, as in info.json


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
