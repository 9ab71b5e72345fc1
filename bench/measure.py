"""What every benchmark here shares: alternating rounds, medians with spread, goals, one result line.

Timings are ratios against a named peer in the same run; absolute figures depend on the machine and are printed
only beside them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
WORKERS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Goal:
    """A ratio that must be reached: `value >= least`."""

    name: str
    value: float
    least: float
    spread: tuple[float, float] = (0.0, 0.0)

    @property
    def met(self) -> bool:
        return self.value >= self.least

    def __str__(self) -> str:
        low, high = self.spread
        around = f" ({low:.2f} to {high:.2f})" if high else ""
        return f"{self.name} {self.value:.2f}{around}, goal {self.least:g}: {'met' if self.met else 'MISSED'}"


@dataclass
class Rounds:
    """Measurements by name, taken in turns so that a slow minute of the machine hits everyone."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int, contenders: dict[str, Callable[[], float]]) -> None:
        """Each contender once a round; a contender returns its figure (higher is better, e.g. frames/s)."""
        for number in range(rounds):
            for name, measure in contenders.items():
                value = measure()
                self.values.setdefault(name, []).append(value)
                print(f"  round {number + 1} {name}: {value:,.1f}", file=sys.stderr, flush=True)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def ratio(self, goal: str, ours: str, theirs: str, least: float) -> Goal:
        """Median over rounds of the ratio within a round, with its range."""
        each = [a / b for a, b in zip(self.values[ours], self.values[theirs], strict=True)]
        return Goal(goal, statistics.median(each), least, (min(each), max(each)))


def report(
    name: str, goals: list[Goal], rounds: Rounds, unit: str, facts: dict[str, object] | None = None
) -> int:
    """Print a table and the goals on the last line, keep both under bench/out; exit code 1 if a goal is missed."""
    print(f"\n{name} on {machine()}")
    for contender, values in rounds.values.items():
        print(
            f"  {contender:40s} {statistics.median(values):12,.1f} {unit}  ({min(values):,.1f} to {max(values):,.1f})"
        )
    OUT.mkdir(exist_ok=True)
    result = {
        "name": name,
        "machine": machine(),
        "unit": unit,
        "values": rounds.values,
        "goals": [
            {"name": g.name, "value": g.value, "least": g.least, "spread": g.spread, "met": g.met}
            for g in goals
        ],
        "facts": facts or {},
        "versions": versions(),
        "when": time.strftime("%Y-%m-%d"),
    }
    (OUT / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("; ".join(map(str, goals)))
    return 0 if all(goal.met for goal in goals) else 1


def convert_seconds(source: str, raw: Path, *more: str) -> float:
    """Of one `dpipe convert` with a process a core, as its user runs it; what it made is deleted."""
    out = Path(tempfile.mkdtemp(prefix="dpipe-bench-"))
    command = [Path(sys.executable).parent / "dpipe", "convert", source, "--raw", raw, "--out", out / "set"]
    started = time.perf_counter()
    subprocess.run([*map(str, command), "--workers", str(WORKERS), *more], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def lerobot_seconds(
    fps: int, features: dict[str, Any], episodes: Iterable[Iterable[dict[str, Any]]], streaming: bool
) -> float:
    """Of lerobot's own writer with its default AV1 settings, fed frame by frame; imports are not counted."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = Path(tempfile.mkdtemp(prefix="lerobot-bench-"))
    cameras = sum(feature["dtype"] == "video" for feature in features.values())
    started = time.perf_counter()
    dataset = LeRobotDataset.create(
        "bench/set",
        fps=fps,
        features=features,
        root=root / "set",
        use_videos=True,
        streaming_encoding=streaming,
        image_writer_threads=0 if streaming else 4 * cameras,
    )
    for frames in episodes:
        for frame in frames:
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    seconds = time.perf_counter() - started
    shutil.rmtree(root)
    return seconds


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{cores} cores of {model}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("lerobot", "torch", "av", "torchcodec", "pyarrow", "zarr", "numpy", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
