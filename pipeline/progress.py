"""What a run says while it runs: one live line on a terminal, plain lines elsewhere, JSON events on request.

Everything here goes to stderr; results go to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO


@dataclass
class Progress:
    """Counts of one step; `advance` may be called often, the line is redrawn seldom."""

    json_events: bool = False
    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    step: str = ""
    total: int = 0
    done: int = 0
    frames: int = 0
    bytes: int = 0
    started: float = 0.0
    drawn: float = 0.0

    def say(self, text: str, **facts: Any) -> None:
        """One line of news."""
        if self.json_events:
            self._event({"event": "message", "text": text, **facts})
        elif not self.quiet:
            self._clear()
            print(text, file=self.stream, flush=True)

    def begin(self, step: str, total: int, what: str = "episodes") -> None:
        self.step, self.total, self.done, self.frames, self.bytes = step, total, 0, 0, 0
        self.started = time.monotonic()
        self.drawn = 0.0
        self.what = what
        if self.json_events:
            self._event({"event": "begin", "step": step, "total": total, "unit": what})

    def advance(self, count: int = 1, frames: int = 0, size: int = 0) -> None:
        self.done += count
        self.frames += frames
        self.bytes += size
        now = time.monotonic()
        wait = 0.1 if self.stream.isatty() and not self.json_events else 5.0
        if now - self.drawn >= wait and now - self.started >= wait:
            self.drawn = now
            self._draw(now)

    def end(self) -> None:
        now = time.monotonic()
        if self.json_events:
            self._event({"event": "end", "step": self.step, **self._facts(now)})
        elif self.stream.isatty() and not self.quiet:
            self._clear()

    def _facts(self, now: float) -> dict[str, Any]:
        elapsed = max(now - self.started, 1e-6)
        left = elapsed / self.done * (self.total - self.done) if self.done else None
        return {
            "done": self.done,
            "total": self.total,
            "frames_per_s": round(self.frames / elapsed, 1),
            "mb_per_s": round(self.bytes / elapsed / 1e6, 2),
            "seconds": round(elapsed, 2),
            "seconds_left": None if left is None else round(left, 1),
        }

    def _draw(self, now: float) -> None:
        facts = self._facts(now)
        if self.json_events:
            self._event({"event": "progress", "step": self.step, **facts})
            return
        if self.quiet:
            return
        left = "" if facts["seconds_left"] is None else f", {facts['seconds_left']:.0f} s left"
        line = (
            f"{self.step}: {self.done}/{self.total} {self.what}, {facts['frames_per_s']:.0f} frames/s, "
            f"{facts['mb_per_s']:.1f} MB/s{left}"
        )
        if self.stream.isatty():
            self._clear()
            self.stream.write(line)
            self.stream.flush()
        else:
            print(line, file=self.stream, flush=True)

    def _clear(self) -> None:
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")

    def _event(self, event: dict[str, Any]) -> None:
        print(json.dumps(event), file=self.stream, flush=True)
