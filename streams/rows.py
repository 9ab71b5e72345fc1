"""Rows of a dataset by number, wherever they lie: what a stream reads its samples from.

    DatasetRows   straight from a LeRobot dataset: columns from Parquet, frames from video or image columns
    ShardRows     from shards (`streams/shards.py`): columns by memory map, frames as one positioned read each

A row is a frame of the whole dataset (LeRobot's `index`). Readers may be shared by threads and are pickled
without what they have open.

Legend   n rows, D dimensions, H x W pixels
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError
from .dataset import Dataset
from .health import Health

if TYPE_CHECKING:
    from ..video.decode import VideoReader

Rows = NDArray[np.int64]

# Columns of a dataset read without shards are unpacked once; up to this size in memory, beyond it in a file.
COLUMNS_IN_MEMORY = 64 * 2**20


class RowReader(Protocol):
    """What a stream asks of its source."""

    def values(self, names: Iterable[str], rows: Rows) -> dict[str, NDArray[Any]]:
        """Columns at rows [...]: each [..., D], or [...] for scalars."""
        ...

    def frames(self, camera: str, rows: Rows, out: NDArray[np.uint8], health: Health) -> None:
        """Write the frames of rows [n] into `out` [n, h, w, 3], fitted to its size."""
        ...

    def size(self, camera: str) -> tuple[int, int]:
        """(height, width) of the frames as stored."""
        ...

    def columns(self) -> tuple[str, ...]: ...

    def cameras(self) -> tuple[str, ...]: ...

    def origin(self) -> str:
        """Where frames come from, in words for a log."""
        ...


@dataclass(frozen=True)
class Fit:
    """How a stored frame becomes a model's input; part of what a stream declares.

    `size` (height, width), None: as stored. `how`: "stretch" scales each side; "pad" keeps the aspect and adds
    black, evenly on both sides; "crop" keeps the aspect and cuts, evenly on both sides.
    """

    size: tuple[int, int] | None = None
    how: str = "stretch"

    def inner(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Where the scaled frame goes: (height, width, top, left); negative top or left: cut away so much."""
        assert self.size is not None
        to_height, to_width = self.size
        if self.how == "stretch":
            return to_height, to_width, 0, 0
        scales = (to_height / height, to_width / width)
        scale = min(scales) if self.how == "pad" else max(scales)
        inner = (max(1, round(height * scale)), max(1, round(width * scale)))
        return (*inner, (to_height - inner[0]) // 2, (to_width - inner[1]) // 2)

    def apply(self, frame: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        """One frame [H, W, 3] into `out` [h, w, 3]."""
        if frame.shape == out.shape:
            out[:] = frame
            return
        from PIL import Image

        height, width, top, left = self.inner(*frame.shape[:2])
        if frame.shape[:2] != (height, width):
            # Bilinear over the whole footprint: PIL's filters widen when they shrink, so nothing is skipped.
            frame = np.asarray(
                Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
            )
        to_height, to_width = out.shape[:2]
        if top < 0 or left < 0:
            frame = frame[max(0, -top) :, max(0, -left) :][:to_height, :to_width]
            top, left = max(0, top), max(0, left)
        if frame.shape[:2] != (to_height, to_width):
            out[:] = 0
        out[top : top + frame.shape[0], left : left + frame.shape[1]] = frame


class DatasetRows:
    """Rows straight from a dataset. `keep` bytes of decoded frames stay in memory where a camera fits whole."""

    def __init__(self, dataset: Dataset, fit: Fit, keep: int = 0):
        self.dataset, self.fit, self.keep = dataset, fit, keep
        self._columns: dict[str, NDArray[Any]] = {}
        self._loaded: dict[str, NDArray[np.bool_]] = {}  # by data file
        self._lock = threading.Lock()
        self._local = threading.local()
        self._kept: dict[str, tuple[NDArray[np.uint8], NDArray[np.bool_]]] = {}
        place = dataset.episodes.data_chunk * 2**32 + dataset.episodes.data_file
        self._file_starts = np.flatnonzero(np.diff(place, prepend=-1)) if len(place) else place

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "fit": self.fit, "keep": self.keep}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)

    def columns(self) -> tuple[str, ...]:
        names = (*self.dataset.features, *self.dataset.sidecar)
        return tuple(name for name in names if name not in self.dataset.cameras)

    def cameras(self) -> tuple[str, ...]:
        return self.dataset.cameras

    def size(self, camera: str) -> tuple[int, int]:
        return self.dataset.camera_size(camera)

    def origin(self) -> str:
        if not any(self.dataset.features[camera]["dtype"] == "video" for camera in self.cameras()):
            return f"pictures in the rows of {self.dataset.root}"
        from ..video.decode import choose_backend

        name, reason = choose_backend()
        return f"videos of {self.dataset.root}, decoded by {name} ({reason})"

    def values(self, names: Iterable[str], rows: Rows) -> dict[str, NDArray[Any]]:
        starts = self.dataset.episodes.first_index[self._file_starts]
        files = np.unique(np.searchsorted(starts, rows.reshape(-1), side="right") - 1)
        wanted = list(names)
        self._load(wanted, files)
        return {name: self._columns[name][rows] for name in wanted}

    def _load(self, names: Sequence[str], files: NDArray[np.int64]) -> None:
        """Unpack columns of the data files given, once each, those of one file together."""
        if all(name in self._loaded and self._loaded[name][files].all() for name in names):
            return
        with self._lock:
            reader = self._own()
            ends = [*self._file_starts[1:].tolist(), len(self.dataset)]
            for file in files.tolist():
                missing = [name for name in names if name not in self._loaded or not self._loaded[name][file]]
                if not missing:
                    continue
                first = int(self._file_starts[file])
                start = int(self.dataset.episodes.first_index[first])
                for name, block in reader.all_columns(missing, range(first, ends[file])).items():
                    if name not in self._columns:
                        self._columns[name] = _room(
                            (self.dataset.total_frames, *block.shape[1:]), block.dtype
                        )
                        self._loaded[name] = np.zeros(len(self._file_starts), bool)
                    self._columns[name][start : start + len(block)] = block
                    self._loaded[name][file] = True

    def frames(self, camera: str, rows: Rows, out: NDArray[np.uint8], health: Health) -> None:
        kept = self._room_for(camera, out.shape[1:])
        if kept is None:
            self._decode(camera, rows, out, health)
            return
        store, have = kept
        missing = np.unique(rows[~have[rows]])
        if len(missing):
            fresh = np.empty((len(missing), *out.shape[1:]), np.uint8)
            self._decode(camera, missing, fresh, health)
            store[missing] = fresh
            have[missing] = True
        health.count(frames_cached=len(rows) - len(missing))
        out[:] = store[rows]

    def _room_for(
        self, camera: str, shape: Sequence[int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
        """Room for every frame of a camera, if all cameras together fit what may be kept."""
        frames = self.dataset.total_frames
        if frames * int(np.prod(shape)) * len(self.dataset.cameras) > self.keep:
            return None
        with self._lock:
            if camera not in self._kept:
                self._kept[camera] = np.empty((frames, *shape), np.uint8), np.zeros(frames, bool)
            return self._kept[camera]

    def _decode(self, camera: str, rows: Rows, out: NDArray[np.uint8], health: Health) -> None:
        """Frames in rising order, those of one file in one call, so that a video is decoded forwards."""
        episodes = self.dataset.episodes
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        owner = np.searchsorted(episodes.first_index, sorted_rows, side="right") - 1
        frame = sorted_rows - episodes.first_index[owner]
        with health.timing("decode"):
            if self.dataset.features[camera]["dtype"] == "video":
                self._decode_video(camera, owner, frame, order, out)
            else:
                reader = self._own()
                for e, t, position in zip(owner.tolist(), frame.tolist(), order.tolist(), strict=True):
                    self.fit.apply(reader.frames(e, camera, t, t + 1)[0], out[position])
        health.count(frames_decoded=len(rows))

    def _decode_video(
        self, camera: str, owner: Rows, frame: Rows, order: Rows, out: NDArray[np.uint8]
    ) -> None:
        reader = self._own()
        place = self.dataset.episodes.cameras[camera]
        files = place.chunk[owner] * 2**32 + place.file[owner]
        # The decoder's own scaler where it gives the wanted size at once: it works on smaller planes.
        stretched = self.fit.size if self.fit.size and self.fit.how == "stretch" else None
        resize = stretched if stretched != self.dataset.camera_size(camera) else None
        for run in np.split(np.arange(len(order)), np.flatnonzero(np.diff(files)) + 1):
            video = reader.video(int(owner[run[0]]), camera, resize)
            try:
                pictures = video.read(place.first_frame[owner[run]] + frame[run])
            except DataError as error:
                raise self._first_damaged(video, camera, owner[run], frame[run], error) from error
            for position, picture in zip(order[run].tolist(), pictures, strict=True):
                self.fit.apply(picture, out[position])

    def _first_damaged(
        self, video: VideoReader, camera: str, owner: Rows, frame: Rows, error: DataError
    ) -> DataError:
        """The error of several frames of a file, as that of the first one that fails alone, by episode."""
        first = self.dataset.episodes.cameras[camera].first_frame
        for e, t in zip(owner.tolist(), frame.tolist(), strict=True):
            try:
                video.read([int(first[e]) + t])
            except DataError as found:
                return DataError(f"episode {e}, frame {t}, {camera}: {found}")
        return error

    def _own(self) -> Dataset:
        """This thread's dataset: decoders and Parquet readers serve one caller at a time."""
        if not hasattr(self._local, "dataset"):
            self._local.dataset = self.dataset.reopened()
        return self._local.dataset


class SplitRows:
    """Shards, and the dataset for what they lack: `pictures` is whichever of the two has the frames."""

    def __init__(self, numbers: RowReader, rest: RowReader, pictures: RowReader):
        self.numbers, self.rest, self.pictures = numbers, rest, pictures

    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.numbers.columns(), *self.rest.columns())))

    def cameras(self) -> tuple[str, ...]:
        return self.pictures.cameras()

    def size(self, camera: str) -> tuple[int, int]:
        return self.pictures.size(camera)

    def origin(self) -> str:
        return self.pictures.origin()

    def values(self, names: Iterable[str], rows: Rows) -> dict[str, NDArray[Any]]:
        here = set(self.numbers.columns())
        wanted = list(names)
        found = self.numbers.values([name for name in wanted if name in here], rows)
        missing = [name for name in wanted if name not in here]
        return found | (self.rest.values(missing, rows) if missing else {})

    def frames(self, camera: str, rows: Rows, out: NDArray[np.uint8], health: Health) -> None:
        self.pictures.frames(camera, rows, out, health)


def _room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of this shape, in a file without a name where it is large: its pages are then no one's memory."""
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= COLUMNS_IN_MEMORY or dtype.hasobject:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile() as file:
        try:
            file.truncate(size)
            return np.memmap(file, dtype, "r+", shape=shape).view(np.ndarray)
        except OSError as error:
            raise DataError(
                f"no room for {size / 1e6:.0f} MB of unpacked columns in {tempfile.gettempdir()}\n"
                "  Free some, set TMPDIR, or make shards, which need none:  dpipe precompute shards"
            ) from error
