"""The stream as torch knows datasets: for its DataLoader, Accelerate and torchdata's StatefulDataLoader.

    loader = DataLoader(IterableStream(stream), batch_size=None, num_workers=2)

The stream makes whole batches, hence `batch_size=None`. Worker w of W makes every W-th batch, and the loader
takes them in turn, so the order is that without workers. Only this module imports torch when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .source import Batch
from .stream import Stream

MAX_WORKERS = 512


class IterableStream(IterableDataset):
    """One epoch an iteration, the next one in the next; or endless. `set_epoch` begins any epoch.

    Resuming: `state_dict` of a StatefulDataLoader over this, with as many workers as before; or
    `stream.state_after(batch)`, `stream.load_state_dict` and `resume`, with any number of workers and ranks.
    """

    def __init__(self, stream: Stream, endless: bool = False):
        self.stream = stream.endless().stream if endless else stream
        self.is_endless = endless
        # Worker processes hold copies of the stream, which forget. So each notes here, in shared memory, the
        # epoch it will make next: all begin the smallest of these, whichever was slow to start or to finish.
        self._next_epoch = torch.full((MAX_WORKERS,), stream.epoch).share_memory_()
        self._resumed_turn: int | None = None
        self._has_worked = False  # whether this copy, in a worker, made batches before

    def __len__(self) -> int:
        if self.is_endless:
            raise TypeError("an endless stream has no length")
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)
        self._next_epoch[:] = epoch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        stream, number, count = self.stream, 0, 1
        turn, self._resumed_turn = self._resumed_turn, None
        if worker is not None:
            number, count = worker.id, worker.num_workers
            stream.threads = 1  # the workers are the threads
            if turn is None:
                epoch = int(self._next_epoch[:count].min())
                # A worker that stays on after a pass broken off stands somewhere of its own: all begin together.
                if self._has_worked:
                    stream.begin(epoch)
                else:
                    stream.set_epoch(epoch)
            self._has_worked = True
        epoch = stream.epoch
        yield from stream.run(lambda place: self.is_endless or place.epoch == epoch, number, count, turn or 0)
        if worker is not None:
            self._next_epoch[number] = epoch + 1
        else:
            self._next_epoch[:] = epoch + 1

    def resume(self) -> None:
        """Let loader workers begin where the stream stands, after `stream.load_state_dict`."""
        self._resumed_turn = 0
        self._next_epoch[:] = self.stream.epoch

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "turn": self.stream.turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self._next_epoch[:] = self.stream.epoch
        self._resumed_turn = int(state["turn"])
