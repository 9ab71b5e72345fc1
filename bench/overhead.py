"""What dpipe adds to the work proper: everything of a conversion that is not reading, decoding or encoding.

    python bench/overhead.py [--steps 20000] [--codec h264]

The LIBERO sample, repeated by link to 20,000 steps, is converted in one process with a clock around every call
that reads the raw files (every number in them is read and checked before the pictures are) or drives the encoder.
What remains of the wall time is overhead: hashes, picture statistics, spool files, muxing, tables, syncs. Start-up
is subtracted as everywhere here: every round also converts a single copy, and its time and overhead are taken from
those of all. Then the same command again as its user types it, with nothing to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert_libero import make_raw
from measure import Goal, Rounds, report


class Clock:
    """Seconds spent inside of wrapped functions; a call within another is counted once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor = 0.0  # of the same calls, in seconds of this process's own time
        self.inside = False

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*words: Any, **more: Any) -> Any:
            if self.inside:
                return function(*words, **more)
            self.inside, started, busy = True, time.perf_counter(), time.process_time()
            try:
                return function(*words, **more)
            finally:
                self.inside = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
                self.processor += time.process_time() - busy

        return timed


@contextmanager
def clocked(clock: Clock) -> Any:
    from dataclasses import replace

    from dpipe.converters import libero
    from dpipe.video.encode import Encoder

    kept = libero.CONVERTER, libero.DemoFrames.read, Encoder.write, Encoder.finish, Encoder.__init__
    scan, read = clock.around("read", libero.CONVERTER.scan), clock.around("read", libero.CONVERTER.read)
    libero.CONVERTER = replace(libero.CONVERTER, scan=scan, read=read)
    Encoder.__init__ = clock.around("encode", Encoder.__init__)
    libero.DemoFrames.read = clock.around("read", libero.DemoFrames.read)
    # Where the last of an episode's pictures is let go of, HDF5 closes its dataset.
    libero.DemoFrames.__del__ = clock.around("read", lambda frames: vars(frames).clear())
    Encoder.write, Encoder.finish = (
        clock.around("encode", Encoder.write),
        clock.around("encode", Encoder.finish),
    )
    try:
        yield
    finally:
        libero.CONVERTER, libero.DemoFrames.read, Encoder.write, Encoder.finish, Encoder.__init__ = kept
        del libero.DemoFrames.__del__


def convert(raw: Path, out: Path, codec: str) -> float:
    from dpipe.converters.libero import Options
    from dpipe.pipeline.convert import convert_all
    from dpipe.pipeline.payload import VideoOptions
    from dpipe.pipeline.progress import Progress
    from dpipe.pipeline.request import ConvertRequest

    request = ConvertRequest("libero", raw, out, out.name, Options(), video=VideoOptions(codec))
    started = time.perf_counter()
    convert_all(request, Progress(quiet=True))
    return time.perf_counter() - started


def measured(raw: Path, out: Path, codec: str) -> dict[str, float]:
    """Seconds of one conversion by what they went into, in this process."""
    clock = Clock()
    with clocked(clock):
        busy = time.process_time()
        wall = convert(raw, out, codec)
        busy = time.process_time() - busy
    return {
        **clock.seconds,
        "overhead": wall - sum(clock.seconds.values()),
        "wall": wall,
        "overhead, processor time": busy - clock.processor,
        "processor time": busy,
    }


def rerun(raw: Path, out: Path, codec: str) -> float:
    """Seconds of a command that finds everything done."""
    words = [
        Path(sys.executable).parent / "dpipe",
        "convert",
        "libero",
        "--raw",
        raw,
        "--out",
        out,
        "--codec",
        codec,
    ]
    # Compiling every module at each start, as some test environments ask for, would be a second of it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [*map(str, words), "--name", out.name, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    seconds = time.perf_counter() - started
    assert json.loads(done.stdout)["unchanged"]
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--codec", default="h264")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="4,000 steps")
    arguments = parser.parse_args()
    arguments.steps = 4_000 if arguments.quick else arguments.steps
    rounds = Rounds()

    def keep(name: str, value: float) -> None:
        rounds.values.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory(prefix="dpipe-overhead-") as folder:
        one, each = make_raw(Path(folder), 1)
        raw, frames = make_raw(Path(folder), -(-arguments.steps // each))
        convert(one, Path(folder) / "first", arguments.codec)  # imports
        for number in range(arguments.rounds):
            small = measured(one, Path(folder) / f"one-{number}", arguments.codec)
            large = measured(raw, Path(folder) / f"all-{number}", arguments.codec)
            for name, seconds in large.items():
                keep(name, seconds - small[name])
            keep("overhead that is start-up", small["overhead"])
        rerun(raw, Path(folder) / "all-0", arguments.codec)
        for _ in range(3):
            keep("rerun with nothing to do", rerun(raw, Path(folder) / "all-0", arguments.codec))
    shares = [a / b for a, b in zip(rounds.values["overhead"], rounds.values["wall"], strict=True)]
    share = statistics.median(shares)
    again = rounds.median("rerun with nothing to do")
    goals = [
        Goal(
            f"overhead {share:.1%} of the wall; 5 % over that",
            0.05 / share,
            1,
            (0.05 / max(shares), 0.05 / min(shares)),
        ),
        Goal(f"rerun with nothing to do in {again:.2f} s; 1.5 s over that", 1.5 / again, 1),
    ]
    return report("overhead", goals, rounds, "s", {"steps": frames, "codec": arguments.codec})


if __name__ == "__main__":
    sys.exit(main())
