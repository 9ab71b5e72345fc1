"""Which rows a sample reads: the frame it stands for, frames around it, the chunk that begins there.

A sample is one frame of one episode. Rows are counted through the dataset (LeRobot's `index`); whatever a
window asks for beyond its episode repeats the episode's first or last row and is marked `is_pad`.

Legend   B samples, F frames observed, H steps of a chunk, E episodes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import UsageError

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Samples:
    """Every sample of a set of episodes, numbered in episode order; nothing is held per sample.

    `episodes` [E] are episode numbers; `first_row` and `length` [E] say where their rows lie; `ends` [E] counts
    samples up to and with each episode. The last `tail` frames of an episode begin no sample.
    """

    episodes: Index
    first_row: Index
    length: Index
    ends: Index

    @classmethod
    def of(cls, episodes: Index, first_row: Index, length: Index, tail: int = 0) -> Samples:
        if tail < 0:
            raise UsageError(f"a stream leaves out 0 or more frames at an episode's end, not {tail}")
        ends = np.cumsum(np.maximum(length - tail, 0))
        if not len(ends) or ends[-1] == 0:
            raise UsageError(
                f"no sample in {len(length)} episodes of up to {length.max(initial=0)} frames"
                + (f" with the last {tail} of each left out" if tail else "")
            )
        return cls(episodes, first_row, length, ends)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, samples: Index) -> Places:
        """Where samples [B] lie."""
        at = np.searchsorted(self.ends, samples, side="right")
        frame = samples - np.where(at > 0, self.ends[at - 1], 0)
        return Places(self.episodes[at], frame, self.first_row[at], self.length[at])

    def place_of_rows(self, rows: Index) -> Places:
        """Samples by their row in the dataset, for a batch's `index`."""
        order = np.argsort(self.first_row, kind="stable")
        at = order[np.searchsorted(self.first_row, rows, side="right", sorter=order) - 1]
        frame = rows - self.first_row[at]
        if np.any((frame < 0) | (frame >= self.length[at])):
            raise IndexError("a row outside the episodes of this stream")
        return Places(self.episodes[at], frame, self.first_row[at], self.length[at])


@dataclass(frozen=True)
class Places:
    """B samples: episode, frame within it, first row and length of the episode; each [B]."""

    episode: Index
    frame: Index
    first_row: Index
    length: Index

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def row(self) -> Index:
        return self.first_row + self.frame

    def rows_at(self, offsets: Sequence[int] | Index) -> tuple[Index, Mask]:
        """Rows [B, F] of the frames at `offsets` from each sample's own, and whether they are padding [B, F].

        `offsets` may also be [B, F], one set per sample.
        """
        wanted = self.frame[:, None] + np.atleast_2d(np.asarray(offsets, np.int64))
        inside = np.clip(wanted, 0, self.length[:, None] - 1)
        return self.first_row[:, None] + inside, wanted != inside
