"""What stages over actions share: what chunk-relative actions are measured from, and the normaliser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.chunks import chunk_index, dimension_kinds, relative_to_start
from ..schemas.errors import DataError, UsageError
from ..schemas.normalisers import DEFAULT_MODE, Normaliser, fit_blocks, import_normaliser
from ..schemas.statistics import Blocks
from . import DatasetInfo, DatasetView, EpisodeView

STATE = "observation.state"


@dataclass(frozen=True)
class Reference:
    """Which state dimension each action dimension is measured from; -1 leaves it as it is (gripper)."""

    dims: tuple[int, ...]

    def kinds(self) -> tuple[str, ...]:
        return tuple("absolute" if dim >= 0 else "gripper" for dim in self.dims)


def reference_of(info: DatasetInfo, column: str) -> Reference:
    """Pair action with state by name, as their names mean the same where they agree; else by position.

    Pairing by position, where the first dimensions of both are the same quantities, is what lerobot's
    relative-action step and openpi's DeltaActions do. Gripper dimensions are never relative.
    """
    actions, states = info.names(column), info.names(STATE)
    kinds = dimension_kinds(actions, delta=False)
    wanted = [name for name, kind in zip(actions, kinds, strict=True) if kind == "absolute"]
    if all(name in states for name in wanted):
        places = [
            states.index(name) if kind == "absolute" else -1
            for name, kind in zip(actions, kinds, strict=True)
        ]
        return Reference(tuple(places))
    moves = str(info.conventions.get(column, "")) + " ".join(actions)
    if "delta" in moves or "relative" in moves:
        raise UsageError(
            f"'{column}' of {info.name} is already relative ({', '.join(actions[:3])}, ...)\n"
            "  --relative is for absolute actions; leave it out."
        )
    if len(actions) > len(states):
        raise UsageError(
            f"no state to measure '{column}' from: {len(actions)} action dimensions, {len(states)} of {STATE}"
            f"\n  found names: {', '.join(actions)} and {', '.join(states)}"
        )
    return Reference(tuple(d if kind == "absolute" else -1 for d, kind in enumerate(kinds)))


def relative_chunks(
    actions: NDArray[np.floating], states: NDArray[np.floating], reference: Reference, chunk: int
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """[T, D] actions, [T, S] states -> offsets from the chunk start's state [T, K, D], is_pad [T, K]."""
    index, is_pad = chunk_index(len(actions), chunk)
    start = np.asarray(states, dtype=np.float64)[:, [max(0, dim) for dim in reference.dims]]
    chunks = np.asarray(actions, dtype=np.float64)[index]
    return relative_to_start(chunks, start, reference.kinds()), is_pad


def column_rows(
    dataset: DatasetView, names: Sequence[str]
) -> Iterator[tuple[EpisodeView, list[NDArray[Any]]]]:
    """Every episode with the columns asked for, in order."""
    for position in range(len(dataset)):
        episode = dataset.episode(position)
        columns = episode.columns(names)
        yield episode, [columns[name] for name in names]


def fitted_blocks(dataset: DatasetView, column: str, relative: bool, chunk: int) -> Blocks:
    """The rows a normaliser is fitted on: a column's own, or every unpadded step of every chunk."""

    def absolute() -> Iterator[NDArray[Any]]:
        for stretch in dataset.stretches():
            yield stretch.columns([column])[column]

    def offsets() -> Iterator[NDArray[Any]]:
        reference = reference_of(dataset.info, column)
        for _, (actions, states) in column_rows(dataset, [column, STATE]):
            chunks, is_pad = relative_chunks(actions, states, reference, chunk)
            yield chunks[~is_pad]

    return offsets if relative else absolute


def normaliser_for(
    dataset: DatasetView,
    column: str,
    mode: str = DEFAULT_MODE,
    gripper: str = "auto",
    file: str = "",
    kind: str = "",
    key: str = "",
    relative: bool = False,
    chunk: int = 0,
) -> Normaliser:
    """The normaliser of a target: fitted exactly on every frame, or another trainer's from its file."""
    names = dataset.info.names(column)
    if file:
        normaliser = import_normaliser(
            Path(file), kind or "dpipe", "" if mode == DEFAULT_MODE else mode, column, names, key
        )
        if normaliser.dim != len(names):
            raise DataError(
                f"{file} normalises {normaliser.dim} dimensions\n"
                f"  expected: {len(names)}, those of '{column}': {', '.join(names)}"
            )
        return normaliser
    if kind or key:
        raise UsageError(
            "--normaliser-kind and --normaliser-key belong to --normaliser-file\n  Give the file."
        )
    source = f"{column} relative to the state, chunk {chunk}" if relative else column
    return fit_blocks(fitted_blocks(dataset, column, relative, chunk), mode, names, gripper, source)
