"""What a stream did and what it cost: the figures a training log carries.

    wait        seconds the consumer stood waiting for a batch
    decode      seconds spent decoding, over all threads
    frames      decoded, and served from decoded ones kept in memory
    bytes       read of encoded frames
    hits        reads of remote storage served from the local cache, and not

Counters only grow; a reading is the difference from the last one. Threads share one `Health`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COUNTERS = (
    "samples",
    "batches",
    "frames_decoded",
    "frames_cached",
    "bytes_read",
    "cache_hits",
    "cache_misses",
    "wait_s",
    "decode_s",
)


class Health:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._last = dict(self._totals)
        self._since = time.perf_counter()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.count(**{f"{what}_s": time.perf_counter() - begin})

    def totals(self) -> dict[str, float]:
        with self._lock:
            return dict(self._totals)

    def read(self) -> dict[str, float]:
        """Figures since the last reading, ready for a log; shares are of the time that passed."""
        now = time.perf_counter()
        totals = self.totals()
        new = {name: totals[name] - self._last[name] for name in COUNTERS}
        passed = max(1e-9, now - self._since)
        self._last, self._since = totals, now
        decoded, cached = new["frames_decoded"], new["frames_cached"]
        reads = new["cache_hits"] + new["cache_misses"]
        return {
            "samples_per_second": new["samples"] / passed,
            "wait_share": new["wait_s"] / passed,
            "decode_share": new["decode_s"] / passed,
            "bytes_per_sample": new["bytes_read"] / max(1, new["samples"]),
            "decoded_frames_per_second": decoded / passed,
            "kept_frame_share": cached / max(1, cached + decoded),
            "cache_hit_share": new["cache_hits"] / reads if reads else 1.0,
        }
