"""One dataset as samples: what a sample holds is declared once, as a `StreamSpec`, and read a batch at a time.

A `Source` looks up where samples lie (`streams/windows.py`), reads each row once for all columns that want it
(`streams/rows.py`), and expresses actions as the spec asks. Which samples make a batch is the stream's affair.

Legend   B samples, F frames observed, H steps of a chunk, D dimensions, A dimensions of an action
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.chunks import dimension_kinds, pad_actions, relative_to_start
from ..schemas.errors import UsageError, unknown_name
from ..schemas.normalisers import Normaliser
from .buffers import Buffers
from .dataset import Dataset
from .health import Health
from .order import EpochOrder, Shuffle
from .rows import RowReader
from .targets import Targets
from .windows import Places, Samples

Batch = dict[str, Any]

ACTION_MODES = ("stored", "delta", "relative")


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
        for name in columns_read(spec):
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
                batch[name] = normaliser.normalise(batch[name]).astype(np.float32, order="C")
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


def columns_read(spec: StreamSpec) -> list[str]:
    reference = [spec.reference] if spec.actions != "stored" else []
    return [*spec.columns, *spec.chunks, *spec.normalise, *reference]
