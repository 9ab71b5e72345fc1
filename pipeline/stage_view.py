"""A dataset as stages see it: columns of a part at once, frames decoded ahead in a thread of their own."""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..stages import DatasetInfo, FrameWish
from ..streams.dataset import Dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREFETCHED_BLOCKS = 2
NEAR_FRAMES = 8  # pictures further apart than this are not read through


@dataclass
class DiskDataset:
    """A `DatasetView` over an opened dataset."""

    dataset: Dataset
    info: DatasetInfo = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ahead: dict[str, DecodedAhead] = field(default_factory=dict)
    _held: int = -1
    _columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    _ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        self.info = dataset_info(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def parts(self) -> list[range]:
        return self.dataset.parts()

    def part_at(self, position: int) -> int:
        """Number of the part that an episode lies in."""
        return bisect_right(self.parts, position, key=lambda part: part.start) - 1

    def episode(self, position: int) -> DiskEpisode:
        return DiskEpisode(self, range(position, position + 1))

    def stretches(self) -> Iterator[DiskEpisode]:
        return (DiskEpisode(self, part) for part in self.parts)

    def columns(self, names: Sequence[str], episodes: range) -> dict[str, NDArray[Any]]:
        """Columns of consecutive episodes, out of the part that was read last: parts are read whole."""
        at = self.part_at(episodes.start)
        part = self.parts[at]
        if episodes.stop > part.stop:
            return self.dataset.all_columns(names, episodes)
        if self._held != at:
            self._held, self._columns = at, {}
            self._ends = np.cumsum(self.dataset.episodes.length[part.start : part.stop])
        if missing := [name for name in names if name not in self._columns]:
            self._columns |= self.dataset.all_columns(missing, part)
        first = int(self._ends[episodes.start - part.start - 1]) if episodes.start > part.start else 0
        last = int(self._ends[episodes.stop - part.start - 1])
        return {name: self._columns[name][first:last] for name in names}


def dataset_info(dataset: Dataset) -> DatasetInfo:
    embodiment = (dataset.manifest or {}).get("embodiment") or {}
    conventions = (dataset.manifest or {}).get("conventions") or embodiment.get("conventions") or {}
    return DatasetInfo(
        name=dataset.name,
        fps=dataset.fps,
        episodes=len(dataset),
        frames=dataset.total_frames,
        features=dataset.features,
        cameras={camera: dataset.camera_size(camera) for camera in dataset.cameras},
        conventions=conventions,
        splits=dataset.splits,
    )


@dataclass
class DiskEpisode:
    """An `EpisodeView`: columns on demand, frames decoded ahead in a thread of their own.

    It may span several consecutive episodes for a stage that does not care where they begin.
    """

    owner: DiskDataset
    span: range

    @property
    def index(self) -> int:
        return self.span.start

    @property
    def frames(self) -> int:
        return int(self.owner.dataset.episodes.length[self.span.start : self.span.stop].sum())

    @property
    def content(self) -> str:
        return self.owner.dataset.contents()[self.index]

    @property
    def text(self) -> str:
        tasks = self.owner.dataset.episodes.tasks(self.index)
        return tasks[0] if tasks else ""

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        found = self.owner.columns(names, self.span)
        return {name: values.reshape(len(values), -1) for name, values in found.items()}

    def images(
        self, camera: str, rows: NDArray[np.int64], block: int, size: tuple[int, int] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        ahead = self.owner.ahead.get(camera)
        wanted = [(self.index, camera, rows[i : i + block], size) for i in range(0, len(rows), block)]
        if ahead is not None and ahead.serves(wanted):
            for _ in wanted:
                yield ahead.next()
            return
        own = DecodedAhead(self.owner, wanted)
        try:
            for _ in wanted:
                yield own.next()
        finally:
            own.close()


# episode, camera, rising rows of one block, (height, width) to decode to
Wanted = tuple[int, str, "NDArray[np.int64]", tuple[int, int] | None]


class DecodedAhead:
    """Blocks of frames decoded in a thread while the caller works on those before, across episodes."""

    def __init__(self, owner: DiskDataset, wanted: Sequence[Wanted]) -> None:
        self._owner, self._wanted = owner, list(wanted)
        self._given = 0
        self._ready: queue.Queue[Any] = queue.Queue(PREFETCHED_BLOCKS)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._decode_all, daemon=True)
        self._thread.start()

    def serves(self, wanted: Sequence[Wanted]) -> bool:
        """Whether these are exactly the next blocks."""
        mine = self._wanted[self._given : self._given + len(wanted)]
        return len(mine) == len(wanted) and all(
            (a[0], a[1], a[3]) == (b[0], b[1], b[3]) and np.array_equal(a[2], b[2])
            for a, b in zip(mine, wanted, strict=True)
        )

    def next(self) -> NDArray[np.uint8]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self._given += 1
        return item

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _decode_all(self) -> None:
        try:
            for wanted in self._wanted:
                if not self._put(self._decode(*wanted)):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the block was waited for
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _decode(
        self, episode: int, camera: str, rows: NDArray[np.int64], size: tuple[int, int] | None
    ) -> NDArray[np.uint8]:
        # One decoder per file is kept open by the dataset: two cameras take turns.
        with self._owner.lock:
            dataset = self._owner.dataset
            if dataset.features[camera]["dtype"] == "video":
                first = int(dataset.episodes.cameras[camera].first_frame[episode])
                return dataset.video(episode, camera, size).read(first + rows)
            cuts = np.flatnonzero(np.diff(rows) > NEAR_FRAMES) + 1
            spans = [(run, int(run[0])) for run in np.split(rows, cuts)]
            return np.concatenate(
                [dataset.frames(episode, camera, at, int(run[-1]) + 1)[run - at] for run, at in spans]
            )


def decode_ahead(
    view: DiskDataset, wishes: Sequence[FrameWish], episodes: Sequence[int]
) -> dict[str, DecodedAhead]:
    ahead = {}
    for wish in wishes:
        wanted: list[Wanted] = []
        for e in episodes:
            rows = np.arange(0, int(view.dataset.episodes.length[e]), wish.every)
            cuts = range(0, len(rows), wish.block)
            wanted += [(e, wish.camera, rows[i : i + wish.block], wish.size) for i in cuts]
        ahead[wish.camera] = DecodedAhead(view, wanted)
    return ahead
