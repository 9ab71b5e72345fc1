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

Written by `streams/shard_writing.py`, read by `streams/shards.py`.

Format  Apache Parquet, "Data Pages" and "Encodings: PLAIN"
Legend  N rows, G row groups, K columns of numbers, C cameras, T frames of an episode, E episodes
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.contract import FILE_NAME, canonical_json
from ..schemas.errors import DataError, UsageError, unknown_name

SHARDS_VERSION = 1
GROUP_ROWS = 512
FOLDER = Path("dpipe") / "shards"
FRAME_KINDS = ("jpeg", "video", "none")
REMAKE = "Make the shards again:  dpipe precompute shards"
ARRAYS = {
    *("group_first", "group_part", "group_values", "group_checks", "part_first"),
    *("frame_offset", "frame_length", "frame_check", "episode_length", "episode_content"),
}


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


def checksum(data: bytes | memoryview) -> int:
    """32 bits of xxh3: they find damage, not malice, and cost 1 microsecond a frame."""
    import xxhash

    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


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
    _refuse_places(index, path)
    return index


def _refuse_places(index: Mapping[str, Any], path: Path) -> None:
    """Files are named, never placed: an index fetched from a stranger is followed into a cache that is written to."""
    parts = index.get("parts")
    for told in [index.get("index"), *(parts if isinstance(parts, list) else [])]:
        name = told.get("file") if isinstance(told, dict) else None
        if isinstance(name, str) and FILE_NAME.fullmatch(name) is None:
            raise DataError(
                f"{path} names a file outside its folder: {name[:80]!r}; refused\n"
                "  next: get the shards from someone else, or make them again"
            )


def map_arrays(folder: Path, index: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    try:
        path = folder / str(index["index"]["file"])
        places = {
            str(name): (int(told["offset"]), np.dtype(told["dtype"]), tuple(int(n) for n in told["shape"]))
            for name, told in index["index"]["arrays"].items()
        }
        ends = [offset + math.prod(shape) * dtype.itemsize for offset, dtype, shape in places.values()]
        sound = set(places) >= ARRAYS and min(offset for offset, _, _ in places.values()) >= 0
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged_index(folder, f"{type(error).__name__}: {error}") from error
    if not sound or path.parent != folder:
        raise damaged_index(folder, f"arrays {', '.join(sorted(places))} in {path.name}")
    if not path.is_file() or path.stat().st_size < max(ends):
        raise DataError(
            f"{path} is cut short or missing\n  expected: {max(ends)} bytes.  Make the shards again."
        )
    whole = np.memmap(path, np.uint8, "r").view(np.ndarray)
    return {
        name: np.frombuffer(whole, dtype, math.prod(shape), offset).reshape(shape)
        for name, (offset, dtype, shape) in places.items()
    }


def check_index(
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


def damaged_index(folder: Path, found: str) -> DataError:
    return DataError(
        f"{folder / 'index.json'} is damaged\n  found: {found}\n"
        "  Make the shards again:  dpipe precompute shards"
    )
