"""Batches from arrays in memory, with the interface of a stream: for toys, tests and small data."""

from collections.abc import Mapping
from typing import Any

import numpy as np


class MemoryBatches:
    """Rows of `columns` (arrays [n, ...] or lists of n) in shuffled epochs, each row once per epoch.

    A global batch is `batch` rows for each of `world` processes, dealt in turn as `streams` deals them.
    What is left at an epoch's end is too short for a batch and waits for the next epoch's shuffle.
    """

    def __init__(
        self, columns: Mapping[str, Any], batch: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.columns, self.batch, self.seed, self.rank, self.world = columns, batch, seed, rank, world
        self.rows = len(next(iter(columns.values())))
        if self.rows < batch * world:
            raise ValueError(f"{self.rows} rows make no batch of {batch} on {world} processes")
        self.epoch, self.position = 0, 0
        self._order = self._shuffle()

    def __iter__(self) -> "MemoryBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        if self.position + self.batch * self.world > self.rows:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffle()
        stop = self.position + self.batch * self.world
        rows = self._order[self.position + self.rank : stop : self.world]
        self.position = stop
        return {
            name: [column[i] for i in rows] if isinstance(column, list) else column[rows]
            for name, column in self.columns.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
