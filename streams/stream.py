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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schemas.chunks import dimension_kinds, pad_actions, relative_to_start
from ..schemas.errors import DataError, UsageError, unknown_name
from ..schemas.normalisers import Normaliser
from .buffers import Buffers
from .dataset import Dataset, open_dataset
from .health import Health
from .order import EpochOrder, MixtureOrder, Shuffle, mixing
from .remote import Cache, is_url
from .rows import DatasetRows, Fit, RowReader, SplitRows
from .shard_format import FOLDER
from .shards import ShardRows, check_source, find_shards, open_remote_shards
from .targets import Targets, open_targets
from .windows import Places, Samples

Batch = dict[str, Any]

LAST = ("short", "drop", "carry")
ACTION_MODES = ("stored", "delta", "relative")
FRAME_SOURCES = ("auto", "jpeg", "video", "none")
KEEP_DECODED = 256 * 2**20
STATE_VERSION = 1


@dataclass(frozen=True)
class StreamSpec:
    """What a sample holds. Frames are counted from the sample's own, t; negative offsets are the past.

    columns   vectors observed at t, or at t + `offsets`
    cameras   cameras observed at the same frames; None: all of them
    offsets   (0,) gives [B, D] and [B, H, W, 3]; anything else [B, F, D] and [B, F, H, W, 3] in the order given,
              with `<name>_is_pad` [B, F]
    at        offsets of single columns or cameras, where they differ
    chunks    columns gathered over steps t + chunk_start + h: horizon by name; [B, H, D], `<name>_is_pad` [B, H]
    actions   how the chunks of `action_columns` are expressed: "stored"; "delta": each step from the one before
              it, the first from `reference` at t; "relative": from `reference` at t. Grippers stay as they are.
              Both need absolute actions.
    padding   what padded steps of action chunks hold: "still", 0 in dimensions that say how far to move and the
              last value elsewhere; "repeat", the last value everywhere, as lerobot has it
    targets   requests as `open_targets` takes them ("tokens:N=10"); those that are chunked get the longest of
              the chunks' horizons
    normalise by column; applied last, gives float32
    size, fit what frames are fitted to (see `Fit`); None: as stored
    fps       count frames at this rate instead of the dataset's: step h is the recorded frame nearest to h / fps
              seconds on. Actions that say how far to move are summed over the frames between, which needs a
              whole ratio. Equal horizons in seconds for datasets of different rates.
    tail      the last frames of an episode that begin no sample
    torch     tensors instead of numpy arrays (they share memory)
    """

    columns: tuple[str, ...] = ("observation.state",)
    cameras: tuple[str, ...] | None = None
    offsets: tuple[int, ...] = (0,)
    at: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    chunks: Mapping[str, int] = field(default_factory=lambda: {"action": 10})
    chunk_start: int = 0
    actions: str = "stored"
    action_columns: tuple[str, ...] = ("action",)
    reference: str = "observation.state"
    padding: str = "still"
    targets: tuple[str, ...] = ()
    normalise: Mapping[str, Normaliser] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    fit: str = "stretch"
    fps: float | None = None
    tail: int = 0
    torch: bool = False

    def __post_init__(self) -> None:
        for name, known, value in (
            ("expression of actions", ACTION_MODES, self.actions),
            ("fit", ("stretch", "pad", "crop"), self.fit),
            ("padding", ("still", "repeat"), self.padding),
        ):
            if value not in known:
                raise unknown_name(name, value, known)
        for name, horizon in self.chunks.items():
            if horizon < 1:
                raise UsageError(f"a chunk of '{name}' has at least one step, not {horizon}")
        for name, offsets in {"offsets": self.offsets, **self.at}.items():
            if not offsets or len(set(offsets)) != len(offsets):
                raise UsageError(f"{name}: frames to observe must be given, each once; found {offsets}")
        twice = set(self.columns) & set(self.chunks)
        if twice:
            raise UsageError(f"'{min(twice)}' is both a column and a chunk: one name holds one array")

    def offsets_of(self, name: str) -> tuple[int, ...]:
        return tuple(self.at.get(name, self.offsets))


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


class Source:
    """One dataset as samples: where rows are read from, and what its names mean."""

    def __init__(
        self,
        dataset: Dataset,
        rows: RowReader,
        samples: Samples,
        spec: StreamSpec,
        targets: Targets | None = None,
    ):
        self.dataset, self.rows, self.samples, self.targets = dataset, rows, samples, targets
        self.cameras = rows.cameras() if spec.cameras is None else spec.cameras
        self.buffers = Buffers()
        self._check(spec)
        self._ratio = dataset.fps / spec.fps if spec.fps else 1.0
        self._observed, self._chunks = self._plan(spec)
        self._kinds = {name: self._action_kinds(name) for name in spec.action_columns if name in spec.chunks}
        self._check_rate(spec)

    def _check(self, spec: StreamSpec) -> None:
        columns = self.rows.columns()
        for name in _columns_read(spec):
            if name not in columns:
                raise unknown_name(f"column of {self.dataset.root}", name, columns)
        for camera in self.cameras:
            if camera not in self.rows.cameras():
                raise unknown_name(f"camera of {self.dataset.root}", camera, self.rows.cameras())
        for name in spec.at:
            if name not in (*spec.columns, *self.cameras):
                raise unknown_name("column or camera observed", name, [*spec.columns, *self.cameras])
        for name in spec.action_columns:
            if spec.actions != "stored" and name in spec.chunks and self._moves(name):
                raise UsageError(
                    f"'{name}' of {self.dataset.name} is relative as stored; {spec.actions} ones are made from "
                    "absolute actions\n  Leave the actions as stored."
                )

    def _check_rate(self, spec: StreamSpec) -> None:
        if self._ratio == 1:
            return
        if self.targets is not None:
            raise UsageError(
                f"targets of {self.dataset.name} are counted in its {self.dataset.fps} frames per second, "
                f"not {spec.fps:g}\n  Leave fps out, or join the targets yourself."
            )
        moving = [name for name, kinds in self._kinds.items() if "delta" in kinds]
        if moving and (self._ratio < 1 or self._ratio != int(self._ratio)):
            raise UsageError(
                f"'{moving[0]}' of {self.dataset.name} says how far to move in one of {self.dataset.fps} frames per "
                f"second\n  {spec.fps:g} is no whole part of that: choose one that is, or absolute actions"
            )

    def _moves(self, column: str) -> bool:
        """Whether a stored column says how far to move rather than where to."""
        conventions = (self.dataset.manifest or {}).get("conventions", {})
        told = str(conventions.get(column, "")) + " ".join(self.dataset.names(column))
        return "delta" in told or "relative" in told

    def _action_kinds(self, column: str) -> tuple[str, ...]:
        names = self.dataset.names(column)
        dim = int(np.prod(self.dataset.features[column]["shape"]))
        return dimension_kinds(names if len(names) == dim else [""] * dim, delta=self._moves(column))

    def origin(self) -> str:
        return f"frames from {self.rows.origin()}" if self.cameras else "no frames"

    def order(self, shuffle: Shuffle, seed: int) -> EpochOrder:
        return EpochOrder(shuffle, seed, len(self.samples))

    def _frames_after(self, steps: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Steps of the spec's rate as recorded frames."""
        return np.rint(np.asarray(steps) * self._ratio).astype(np.int64)

    def _plan(self, spec: StreamSpec) -> tuple[dict[Any, list[str]], dict[int, list[str]]]:
        """Names that are read at the same rows, by offsets and by horizon: one reading serves them all."""
        observed: dict[Any, list[str]] = {}
        for name in spec.columns:
            observed.setdefault(spec.offsets_of(name), []).append(name)
        if "task_index" in self.rows.columns():
            observed.setdefault((0,), []).append("task_index")
        if spec.actions != "stored" and spec.reference not in observed.get((0,), []):
            observed.setdefault((0,), []).append(spec.reference)
        chunks: dict[int, list[str]] = {}
        for name, horizon in spec.chunks.items():
            chunks.setdefault(horizon, []).append(name)
            if f"{name}_is_pad" in self.rows.columns():
                chunks[horizon].append(f"{name}_is_pad")
        return observed, chunks

    def read(self, samples: NDArray[np.int64], spec: StreamSpec, health: Health) -> Batch:
        """The samples asked for, as a batch."""
        places = self.samples.locate(samples)
        batch: Batch = {}
        rows_at: dict[Any, tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}
        now: dict[str, NDArray[Any]] = {}
        for offsets, names in self._observed.items():
            rows_at[offsets] = rows, is_pad = places.rows_at(self._frames_after(offsets))
            found = self.rows.values(names, rows)
            if offsets == (0,):
                now = {name: values[:, 0] for name, values in found.items()}
                found = now
            for name in names:
                if name in spec.columns:
                    batch[name] = found[name]
                    if offsets != (0,):
                        batch[f"{name}_is_pad"] = is_pad
        for horizon, names in self._chunks.items():
            steps = np.arange(horizon) + spec.chunk_start
            rows, is_pad = places.rows_at(self._frames_after(steps))
            found = self.rows.values(names, rows)
            for name in names:
                if name.endswith("_is_pad"):
                    continue
                values = found[name]
                if self._ratio != 1 and "delta" in self._kinds.get(name, ()):
                    batch[name], batch[f"{name}_is_pad"] = self._summed(name, places, steps)
                    continue
                is_action = name in spec.action_columns
                batch[name] = self._actions(name, values, is_pad, now, spec) if is_action else values
                invalid = found.get(f"{name}_is_pad")  # targets among the columns carry a mask of their own
                batch[f"{name}_is_pad"] = is_pad if invalid is None else is_pad | invalid
        for camera in self.cameras:
            offsets = spec.offsets_of(camera)
            if offsets not in rows_at:
                rows_at[offsets] = places.rows_at(self._frames_after(offsets))
            rows, is_pad = rows_at[offsets]
            frames = self._frames(camera, rows, is_pad, spec, health)
            if offsets == (0,):
                batch[camera] = frames[:, 0]
            else:
                batch[camera], batch[f"{camera}_is_pad"] = frames, is_pad
        if self.targets is not None:
            batch |= self.targets.take(episode=places.episode, frame=places.frame)
        for name, normaliser in spec.normalise.items():
            if name in batch:
                batch[name] = normaliser.normalise(batch[name]).astype(np.float32)
        batch["index"], batch["episode_index"], batch["frame_index"] = (
            places.row,
            places.episode,
            places.frame,
        )
        if "task_index" in now:
            batch["task"] = [self.dataset.tasks[number] for number in now["task_index"].tolist()]
        return batch

    def _actions(
        self,
        name: str,
        chunks: NDArray[Any],
        is_pad: NDArray[np.bool_],
        now: Mapping[str, NDArray[Any]],
        spec: StreamSpec,
    ) -> NDArray[Any]:
        """Chunks [B, H, A] in the expression the spec asks for; `now` holds the columns at t."""
        kinds = self._kinds[name]
        if spec.padding == "still" and "delta" in kinds and is_pad.any():
            chunks = pad_actions(chunks, is_pad, kinds)
        if spec.actions == "stored":
            return chunks
        names = self.dataset.names(name), self.dataset.names(spec.reference)
        state = now[spec.reference][:, paired_dims(*names, kinds)]
        if spec.actions == "relative":
            return relative_to_start(chunks, state, kinds).astype(chunks.dtype)
        before = np.concatenate([state[:, None], chunks[:, :-1]], axis=1)
        moved = np.array([kind == "absolute" for kind in kinds])
        return np.where(moved, chunks - before, chunks).astype(chunks.dtype)

    def _summed(
        self, name: str, places: Places, steps: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Moves of [B, H] longer steps: those of their frames together; what is no move, as it is at the last.

        A step of which a frame lies beyond the episode is padding.
        """
        ratio, kinds = int(self._ratio), self._kinds[name]
        rows, is_pad = places.rows_at((steps[:, None] * ratio + np.arange(ratio)).reshape(-1))
        values = pad_actions(self.rows.values([name], rows)[name], is_pad, kinds)
        values = values.reshape(len(places), len(steps), ratio, -1)
        moves = np.array([kind == "delta" for kind in kinds])
        summed = np.where(moves, values.sum(axis=2, dtype=values.dtype), values[:, :, -1])
        return summed, np.logical_or.reduce(is_pad.reshape(len(places), len(steps), ratio), axis=2)

    def _frames(
        self,
        camera: str,
        rows: NDArray[np.int64],
        is_pad: NDArray[np.bool_],
        spec: StreamSpec,
        health: Health,
    ) -> NDArray[np.uint8]:
        """[B, F] rows -> [B, F, H, W, 3]; a row that padding repeats is decoded once."""
        height, width = spec.size or self.rows.size(camera)
        flat = rows.reshape(-1)
        out = self.buffers.take((len(flat), height, width, 3))
        if is_pad.any():
            wanted, where = np.unique(flat, return_inverse=True)
            once = self.buffers.take((len(wanted), height, width, 3))
            self.rows.frames(camera, wanted, once, health)
            np.take(once, where, axis=0, out=out)
        else:
            self.rows.frames(camera, flat, out, health)
        return out.reshape(*rows.shape, height, width, 3)


def paired_dims(action_names: Sequence[str], state_names: Sequence[str], kinds: Sequence[str]) -> list[int]:
    """The state dimension each action dimension is measured from: of the same name, else at the same place.

    Grippers are measured from nothing; any place will do for them.
    """
    moving = [name for name, kind in zip(action_names, kinds, strict=True) if kind == "absolute"]
    if moving and all(name in state_names for name in moving):
        return [state_names.index(name) if name in state_names else 0 for name in action_names]
    if len(kinds) > len(state_names) > 0:
        raise UsageError(
            f"no state to measure actions from: {len(kinds)} action dimensions, {len(state_names)} of the state\n"
            f"  found names: {', '.join(action_names)} and {', '.join(state_names)}"
        )
    return list(range(len(kinds)))


def to_torch(batch: Batch) -> Batch:
    """Arrays to tensors, in place where their memory allows writing."""
    import torch

    return {
        name: torch.from_numpy(value if value.flags.writeable else value.copy())
        if isinstance(value, np.ndarray)
        else value
        for name, value in batch.items()
    }


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
    if has_pictures and set(_columns_read(spec)) <= set(rows.columns()):
        return opened, rows
    return opened, SplitRows(rows, own, rows if has_pictures else own)


def _columns_read(spec: StreamSpec) -> list[str]:
    reference = [spec.reference] if spec.actions != "stored" else []
    return [*spec.columns, *spec.chunks, *spec.normalise, *reference]


def cores() -> int:
    """Cores this process may use, at most 8: beyond that one process's interpreter is the limit."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)
