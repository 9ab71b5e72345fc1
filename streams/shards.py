"""Shards read: a dataset's rows from the files that `streams/shard_format.py` describes, here or below a URL.

Columns are read by memory map, a frame by one positioned read; both are checked against the checksums written
with them, local columns once per process, everything else each time.

Legend  N rows, G row groups, K columns of numbers, C cameras, E episodes
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError, malformed_as, unknown_name
from .dataset import Dataset, Episodes, TextColumns
from .health import Health
from .rows import Fit, Rows
from .shard_format import FOLDER, REMAKE, Column, check_index, checksum, map_arrays, read_index, read_values

if TYPE_CHECKING:
    from .remote import Cache, RemoteFolder

OPEN_PARTS = 128  # files kept open by one reader


class _Places(NamedTuple):
    """Where rows [n] lie: the row group of each, the file of that, and the row's number within its group."""

    group: NDArray[np.int64]
    part: NDArray[np.int64]
    within: NDArray[np.int64]


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
        self._arrays = map_arrays(folder, self.index)
        with malformed_as(folder / "index.json", REMAKE):
            self._columns = {
                told["name"]: (k, Column(**told)) for k, told in enumerate(self.index["columns"])
            }
            self._cameras = {camera: c for c, camera in enumerate(self.index["cameras"])}
            self._proven = np.zeros((len(self._arrays["group_part"]), len(self._columns)), bool)
            check_index(self.index, self._columns, self._arrays)
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

    def origin(self) -> str:
        return f"JPEG shards in {self.remote.url if self.remote else self.folder}"

    def size(self, camera: str) -> tuple[int, int]:
        height, width = self.index["cameras"][camera]
        return height, width

    def values(self, names: Iterable[str], rows: Rows) -> dict[str, NDArray[Any]]:
        """Columns at rows [...]."""
        flat = np.ascontiguousarray(rows.reshape(-1))
        first = self._arrays["group_first"]
        group = np.searchsorted(first, flat, side="right") - 1
        places = _Places(group, self._arrays["group_part"][group], flat - first[group])
        names = list(names)
        for name in names:
            if name not in self._columns:
                raise unknown_name(f"column of {self.folder}", name, self._columns)
        gather = self._gathered
        if self.remote is not None:
            gather = self._fetched
            self._fetch_columns(names, sorted(set(zip(places.part.tolist(), group.tolist(), strict=True))))
        found = {name: gather(*self._columns[name], places) for name in names}
        return {name: values.reshape(*rows.shape, *values.shape[1:]) for name, values in found.items()}

    def _gathered(self, k: int, column: Column, places: _Places) -> NDArray[Any]:
        """Values out of mapped files, all rows of a file in one step: a step a row would cost as much as a JPEG."""
        if column.dtype == "bool":
            return self._fetched(k, column, places)
        group, part, within = places
        for g in np.unique(group[~self._proven[group, k]]).tolist():
            self._checked_group(self._part(int(self._arrays["group_part"][g])), g, k, column)
        size = column.row_bytes
        place = self._arrays["group_values"][group, k] + within * size
        raw = np.empty((len(group), size), np.uint8)
        for number in np.unique(part).tolist():
            opened = self._part(number)
            assert isinstance(opened, _OpenPart)
            # Every run of `size` bytes of the file, as rows that overlap: taking some copies just these.
            runs = np.ndarray((len(opened.map) - size + 1, size), np.uint8, opened.map, strides=(1, 1))
            mine = part == number
            raw[mine] = runs[place[mine]]
        values = raw.view(column.stored).astype(column.dtype, copy=False)
        return values if column.dim else values[:, 0]

    def _fetched(self, k: int, column: Column, places: _Places) -> NDArray[Any]:
        """Values as a remote file or bits demand it: runs of neighbouring rows are read in one piece."""
        group, part, within = places
        cuts = np.flatnonzero((np.diff(within) != 1) | (np.diff(group) != 0)) + 1
        starts = [0, *cuts.tolist()] if len(group) else []
        stops = [*starts[1:], len(group)]
        groups, offsets = group[starts], within[starts].tolist()
        bases = self._arrays["group_values"][groups, k].tolist()
        out = np.empty((len(group), column.dim) if column.dim else len(group), column.dtype)
        told = zip(starts, stops, groups.tolist(), part[starts].tolist(), offsets, bases, strict=True)
        for start, stop, g, number, offset, base in told:
            opened = self._part(number)
            if isinstance(opened, _RemotePart) or not self._proven[g, k]:
                data, base = self._checked_group(opened, g, k, column)
            else:
                data = opened.map
            out[start:stop] = read_values(data, base, column, offset, stop - start)
        return out

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
        with malformed_as(self.folder / "index.json", REMAKE):
            return self._dataset(index, length, first, zero)

    def _dataset(
        self,
        index: Mapping[str, Any],
        length: NDArray[np.int64],
        first: NDArray[np.int64],
        zero: NDArray[np.int64],
    ) -> Dataset:
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
