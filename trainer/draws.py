"""Random numbers of one training step, as a function of (seed, phase, step) alone.

Nothing random is carried from step to step, so a resumed run needs no generator state, and a step drawn on two
processes has the numbers one process would have drawn: the whole global batch is drawn everywhere (a few
kilobytes) and each process keeps its own rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """One 64-bit seed from several small numbers, unlike those of their neighbours."""
    low, high = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(high) << 32 | int(low)


@dataclass(frozen=True)
class Draws:
    """Draws for `batch` samples: rows rank, rank + world, .. of the global batch, as streams deal them.

    A batch computed in `parts` has the numbers of the whole: part p its stretch of the rows.
    """

    generator: torch.Generator
    batch: int
    device: torch.device
    rank: int = 0
    world: int = 1
    part: int = 0
    parts: int = 1

    @classmethod
    def of_step(
        cls,
        seed: int,
        phase: int,
        step: int,
        batch: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        part: int = 0,
        parts: int = 1,
    ) -> "Draws":
        generator = torch.Generator().manual_seed(seed_of(seed, phase, step))
        return cls(generator, batch, torch.device(device), rank, world, part, parts)

    def normal(self, *shape: int) -> Tensor:
        """[batch, *shape] standard normal."""
        return self._own(torch.randn(self._rows, *shape, generator=self.generator))

    def uniform(self, *shape: int) -> Tensor:
        """[batch, *shape] in [0, 1)."""
        return self._own(torch.rand(self._rows, *shape, generator=self.generator))

    def integers(self, high: int, *shape: int) -> Tensor:
        """[batch, *shape] int64 in 0 .. high - 1."""
        return self._own(torch.randint(high, (self._rows, *shape), generator=self.generator))

    @property
    def _rows(self) -> int:
        return self.batch * self.world * self.parts

    def _own(self, rows: Tensor) -> Tensor:
        mine = rows[self.part * self.batch * self.world :][: self.batch * self.world]
        return mine[self.rank :: self.world].to(self.device)
