"""The stream a trainer reads: declared once, exact, resumable, the same on any number of ranks and workers.

    spec = StreamSpec(chunks={"action": 10})
    stream = open_stream(root, spec, batch_size=64, seed=0)
    for batch in stream:                                  # one epoch; the next `for` is the next epoch
        batch["observation.state"]                        # [B, D]
        batch["observation.images.image"]                 # [B, H, W, 3] uint8
        batch["action"], batch["action_is_pad"]           # [B, 10, A], [B, 10]
        batch["task"]                                     # list of B strings
        batch["index"], batch["episode_index"], batch["frame_index"], batch["position"]   # [B]

Order      position p of an epoch is dealt to rank p mod world; batch k of a rank holds its positions in turn.
           Which sample stands at p is a function of (seed, epoch, number of samples): `streams/order.py`.
Last batch of an epoch, when n is no multiple of batch_size * world
    short  every sample once: the rest is dealt in turn, so ranks differ by at most one sample, and a rank
           that gets none ends one batch early                                        (default)
    drop   the rest is left out of this epoch; all ranks make the same number of full batches
    carry  the batch goes on into the next epoch: full batches for ever, each sample once per epoch; only for
           `endless()`, whose default it is
Resume     `state_dict()` is a few numbers. Loaded on another number of ranks or another batch size, the stream
           goes on with exactly the samples that were left.

Legend   B samples, F frames observed, H steps of a chunk, D dimensions, n samples of an epoch
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError, UsageError, unknown_name
from .dataset import Dataset, open_dataset
from .health import Health
from .order import EpochOrder, MixtureOrder, Shuffle, mixing
from .remote import Cache, is_url
from .rows import DatasetRows, Fit, RowReader, SplitRows
from .shard_format import FOLDER
from .shards import ShardRows, check_source, find_shards, open_remote_shards
from .source import Batch, Source, StreamSpec, columns_read, to_torch
from .targets import open_targets
from .windows import Samples

LAST = ("short", "drop", "carry")
FRAME_SOURCES = ("auto", "jpeg", "video", "none")
KEEP_DECODED = 256 * 2**20
STATE_VERSION = 1


class SampleSource(Protocol):
    """What a stream deals out: one dataset (`Source`) or several (`streams/mixture.py`)."""

    @property
    def samples(self) -> Sized: ...

    def order(self, shuffle: Shuffle, seed: int) -> EpochOrder | MixtureOrder:
        """Sample numbers at absolute positions."""
        ...

    def read(self, samples: NDArray[np.int64], spec: StreamSpec, health: Health) -> Batch: ...

    def origin(self) -> str:
        """Where frames come from, in words for a log."""
        ...


@dataclass(frozen=True)
class Place:
    """Where an epoch stands: `done` positions were consumed when batches of this shape began, `step` since."""

    epoch: int = 0
    done: int = 0
    step: int = 0


class Stream:
    """An epoch of batches at a time; see the module text. Make one with `open_stream`.

    Not for sharing between threads. It pickles, so DataLoader workers may have copies.
    """

    def __init__(
        self,
        source: SampleSource,
        spec: StreamSpec,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        shuffle: Shuffle,
        last: str,
        threads: int,
    ):
        if batch_size < 1 or world < 1 or not 0 <= rank < world:
            raise UsageError(
                f"batch size {batch_size}, rank {rank} of {world}: expected 1 or more, rank below world"
            )
        if last not in LAST:
            raise unknown_name("rule for the last batch", last, LAST)
        self.source, self.spec = source, spec
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.shuffle, self.last, self.threads = shuffle, last, threads
        self.health = Health()
        self._place = Place()
        self.turn = 0  # batches of all workers since iteration began, up to the last one handed over
        self.order = source.order(shuffle, seed)

    # --- size and place --------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Samples of an epoch, over all ranks."""
        return len(self.source.samples)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world

    def __len__(self) -> int:
        """Batches this rank has left in the current epoch."""
        left = self.samples - self._place.done - self._place.step * self.global_batch
        full, rest = divmod(left, self.global_batch)
        uneven = {"short": rest > self.rank, "drop": False, "carry": rest > 0}[self.last]
        return full + uneven

    @property
    def epoch(self) -> int:
        return self._place.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` from its start, unless it is the current one."""
        if epoch != self._place.epoch:
            self.begin(epoch)

    def begin(self, epoch: int) -> None:
        """Begin `epoch` from its start."""
        self._place = Place(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, between batches: a few numbers, the same on every rank."""
        return self._state(self._place)

    def _state(self, place: Place) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "samples": self.samples,
            "seed": self.seed,
            "shuffle": [self.shuffle.kind, self.shuffle.block, self.shuffle.pool],
            "epoch": place.epoch,
            "done": place.done,
            "step": place.step,
            "batch_size": self.batch_size,
            "world": self.world,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, also with another batch size or number of ranks."""
        mine = self._state(self._place)
        wrong = [
            f"{name}: expected {mine[name]}, found {state.get(name)}"
            for name in ("version", "samples", "seed", "shuffle")
            if state.get(name) != mine[name]
        ]
        if wrong:
            raise DataError(
                "this state belongs to another stream:\n  "
                + "\n  ".join(wrong)
                + "\n  Open the stream with the same data, seed and shuffle, or start a new run."
            )
        place = Place(int(state["epoch"]), int(state["done"]), int(state["step"]))
        if (state["batch_size"], state["world"]) != (self.batch_size, self.world):
            done = place.done + place.step * int(state["batch_size"]) * int(state["world"])
            place = Place(place.epoch, done)
        self._place = place

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a stream whose last batch was `batch`, whichever process made it.

        With DataLoader workers the main process has only the batches; `batch["position"]` tells the rest.
        """
        first = int(batch["position"][0]) - self.rank
        epoch, done = divmod(first, self.samples)
        return self._state(self._settled(Place(epoch, done + self.global_batch)))

    def _settled(self, place: Place) -> Place:
        """A place at or beyond the epoch's end, as one in the next epoch."""
        consumed = place.done + place.step * self.global_batch
        if self.last == "carry":
            while consumed >= self.samples:
                consumed -= self.samples
                place = Place(place.epoch + 1, consumed)
            return place
        left = self.samples - consumed
        over = left <= 0 if self.last == "short" else left < self.global_batch
        return Place(place.epoch + 1) if over else place

    # --- batches ---------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch; when it is used up, the stream stands at the start of the next."""
        epoch = self._place.epoch
        if self.last == "carry":
            raise UsageError("batches that carry over have no end of an epoch: iterate over endless()")
        return self.run(lambda place: place.epoch == epoch)

    def endless(self) -> Endless:
        """Batches for ever: `next()`, `state_dict()`, `load_state_dict()`. Every batch is full (rule "carry")
        unless the stream was opened with `last="drop"`."""
        stream = self if self.last == "drop" else self._with(last="carry")
        return Endless(stream)

    def _with(self, **changes: Any) -> Stream:
        names = ("source", "spec", "batch_size", "seed", "rank", "world", "shuffle", "last", "threads")
        other = Stream(**{name: changes.get(name, getattr(self, name)) for name in names})
        other._place, other.health = self._place, self.health
        return other

    def mixing(self) -> float:
        """How well this epoch's order mixes episodes into batches: 1 is what a global shuffle gives."""
        if not isinstance(self.source, Source):
            raise UsageError("mixing is measured within one dataset")
        samples = self.source.samples
        order = self.shuffle.of_epoch(self.seed, self.epoch, self.samples)
        return mixing(order, lambda found: samples.locate(found).episode, self.global_batch)

    def describe(self) -> str:
        """One line for a log: how many samples, where frames come from and why, how they are mixed."""
        words = [f"{self.samples} samples", self.source.origin()]
        if isinstance(self.source, Source) and self.source.dataset.renaming:
            words.append(self.source.dataset.renaming)
        if self.shuffle.kind == "block" and isinstance(self.source, Source):
            words.append(f"block shuffle that mixes {self.mixing():.2f} as well as a global one")
        elif self.shuffle.kind != "global":
            words.append(f"{self.shuffle.kind} shuffle")
        return "; ".join(words)

    def map_style(self) -> MapView:
        """The same samples by number, for trainers that bring their own sampler."""
        return MapView(self.source, self.spec, self.health)

    def run(
        self, goes_on: Callable[[Place], bool], worker: int = 0, workers: int = 1, turn: int = 0
    ) -> Iterator[Batch]:
        """Batches in order while `goes_on(place)`; of several workers, this one makes every `workers`-th.

        Batches are made ahead of the consumer, a thread each; the stream's place moves when one is handed over.
        """
        ahead = self.threads + 1 if self.threads > 1 else 1
        waiting: deque[tuple[Place, int, Future[Batch | None] | None]] = deque()
        place, pool = self._settled(self._place), None

        def fill(count: int) -> None:
            """Have `count` batches of this worker under way, or the rest of them."""
            nonlocal place, turn
            while goes_on(place) and len(waiting) < count:
                if turn % workers == worker:
                    made = pool.submit(self._make, self.positions(place)) if pool else None
                    waiting.append((place, turn + 1, made))
                place = self._settled(replace(place, step=place.step + 1))
                turn += 1

        try:
            if self.threads > 1:
                pool = ThreadPoolExecutor(self.threads, thread_name_prefix="dpipe-stream")
            fill(1)  # the first alone: those after it would only keep it waiting
            while waiting:
                here, next_turn, made = waiting.popleft()
                with self.health.timing("wait"):
                    batch = made.result() if made else self._make(self.positions(here))
                self._place = self._settled(replace(here, step=here.step + 1))
                self.turn = next_turn
                fill(ahead)
                if batch is not None:
                    yield batch
            self._place = place
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def positions(self, place: Place) -> NDArray[np.int64]:
        """Absolute positions (epoch * n + p) of this rank's batch at a place, [B] or fewer at an epoch's end."""
        first = place.done + place.step * self.global_batch
        found = first + self.rank + self.world * np.arange(self.batch_size, dtype=np.int64)
        if self.last == "short":
            found = found[found < self.samples]
        return place.epoch * self.samples + found

    def _make(self, positions: NDArray[np.int64]) -> Batch | None:
        if not len(positions):
            return None
        batch = self.source.read(self.order(positions), self.spec, self.health)
        batch["position"] = positions
        self.health.count(samples=len(positions), batches=1)
        return to_torch(batch) if self.spec.torch else batch


class Endless:
    """Batches of one epoch after another, for ever."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Endless:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            if self.stream.last == "drop" and self.stream.samples < self.stream.global_batch:
                raise UsageError(
                    f"{self.stream.samples} samples do not fill one batch of {self.stream.global_batch}\n"
                    "  Choose a smaller batch, or another rule for the last one."
                )
            self._batches = self.stream.run(lambda place: True)
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches = None
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """Stop making batches ahead."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined] - it is a generator
            self._batches = None

    @property
    def health(self) -> Health:
        return self.stream.health


class MapView:
    """The samples of a stream by number: a map-style dataset, in dataset order, without batch dimension.

    `__getitems__` reads a list of samples in one go; torch's DataLoader calls it by itself.
    """

    def __init__(self, source: SampleSource, spec: StreamSpec, health: Health | None = None):
        self.source, self.spec = source, spec
        self.health = health or Health()

    def __len__(self) -> int:
        return len(self.source.samples)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        if not -len(self) <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return self.__getitems__([sample % len(self)])[0]

    def __getitems__(self, samples: list[int]) -> list[dict[str, Any]]:
        batch = self.source.read(np.asarray(samples, np.int64), self.spec, self.health)
        if self.spec.torch:
            batch = to_torch(batch)
        return [{name: value[i] for name, value in batch.items()} for i in range(len(samples))]


# --- opening ------------------------------------------------------------------------------------------------


def open_stream(
    dataset: Path | str | Dataset,
    spec: StreamSpec | None = None,
    split: str = "train",
    batch_size: int = 64,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    shuffle: str | Shuffle = "auto",
    last: str = "short",
    frames: str = "auto",
    shards: Path | str | None = None,
    episodes: Sequence[int] | NDArray[np.int64] | None = None,
    targets: Path | Sequence[Path] | None = None,
    threads: int | None = None,
    keep: int = KEEP_DECODED,
    cache: Cache | None = None,
) -> Stream:
    """Open a dataset as a stream of batches.

    `frames` says where pictures come from: "jpeg" (shards), "video" (the dataset's own), "none", or "auto":
    shards where there are complete ones of this dataset, else the videos. `shards` names a variant or a folder.
    `episodes` replaces `split` by a list. `targets` are the folders of the spec's targets, the dataset's own by
    default. `shuffle`: "global", "block" (a `Shuffle` for its sizes), "none", or "auto": block for a URL, where
    neighbours are cheap, else global; `Stream.mixing` tells how well it mixes. `threads` make batches ahead
    (default: the cores this process may use); `keep` bytes of decoded frames stay in memory where a whole small
    dataset fits in them. `dataset` may be the URL of shards, read through `cache`.
    """
    spec = spec or StreamSpec()
    source, spec = open_source(dataset, spec, split, frames, shards, episodes, targets, keep, cache)
    if shuffle == "auto":
        shuffle = "block" if is_url(dataset) else "global"
    order = shuffle if isinstance(shuffle, Shuffle) else Shuffle(shuffle)
    makers = cores() if threads is None else threads
    stream = Stream(source, spec, batch_size, seed, rank, world, order, last, makers)
    if isinstance(source.rows, ShardRows) and source.rows.remote is not None:
        source.rows.remote.health = stream.health
    return stream


def open_source(
    dataset: Path | str | Dataset,
    spec: StreamSpec,
    split: str = "train",
    frames: str = "auto",
    shards: Path | str | None = None,
    episodes: Sequence[int] | NDArray[np.int64] | None = None,
    targets: Path | Sequence[Path] | None = None,
    keep: int = KEEP_DECODED,
    cache: Cache | None = None,
) -> tuple[Source, StreamSpec]:
    """The samples of one dataset, not yet dealt out, and the spec they are read by; see `open_stream`."""
    if frames not in FRAME_SOURCES:
        raise unknown_name("source of frames", frames, FRAME_SOURCES)
    if frames == "none":
        spec = replace(spec, cameras=())
    opened, rows = _open_rows(dataset, spec, frames, shards, keep, cache)
    chosen = np.asarray(opened.episodes_in(split) if episodes is None else episodes, np.int64)
    lengths, first = opened.episodes.length[chosen], opened.episodes.first_index[chosen]
    samples = Samples.of(chosen, first, lengths, spec.tail)
    found = None
    if spec.targets:
        if spec.chunk_start:
            raise UsageError("targets are gathered from each sample's own frame: chunk_start must be 0")
        horizon = max(spec.chunks.values(), default=0)
        found = open_targets(opened, spec.targets, horizon=horizon, targets=targets)
    return Source(opened, rows, samples, spec, found), spec


def _open_rows(
    dataset: Path | str | Dataset,
    spec: StreamSpec,
    frames: str,
    shards: Path | str | None,
    keep: int,
    cache: Cache | None,
) -> tuple[Dataset, RowReader]:
    """The dataset and the reader of its rows; a folder or URL of shards alone is a dataset too."""
    fit = Fit(spec.size, spec.fit)
    if isinstance(dataset, str) and is_url(dataset):
        if cache is None:
            raise UsageError(
                f"{dataset} is read through a local folder: give one, cache=Cache(folder, limit)"
            )
        remote = open_remote_shards(dataset, cache, fit)
        return remote.dataset(), remote
    if not isinstance(dataset, Dataset) and (Path(dataset) / "index.json").is_file():
        alone = ShardRows(Path(dataset), fit)
        return alone.dataset(), alone
    opened = dataset if isinstance(dataset, Dataset) else open_dataset(Path(dataset))
    folder = None
    if shards is not None:
        named = opened.root / FOLDER / str(shards)
        folder = named if named.is_dir() else Path(shards)
    elif frames in ("auto", "jpeg"):
        folder = find_shards(opened, spec.cameras)
    if folder is None:
        if frames == "jpeg":
            raise DataError(
                f"{opened.root}: no finished shards with {', '.join(spec.cameras or opened.cameras)}\n"
                f"  looked in: {opened.root / FOLDER}\n  Make them:  dpipe precompute shards"
            )
        return opened, DatasetRows(opened, fit, keep)
    rows = ShardRows(folder, fit)
    check_source(rows, opened)
    own = DatasetRows(opened, fit, keep)
    cameras = set(opened.cameras if spec.cameras is None else spec.cameras)
    has_pictures = frames != "video" and cameras <= set(rows.cameras())
    if frames == "jpeg" and not has_pictures:
        raise unknown_name(f"camera of {folder}", min(cameras - set(rows.cameras())), rows.cameras())
    if has_pictures and set(columns_read(spec)) <= set(rows.columns()):
        return opened, rows
    return opened, SplitRows(rows, own, rows if has_pictures else own)


def cores() -> int:
    """Cores this process may use, at most 8: beyond that one process's interpreter is the limit."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)
