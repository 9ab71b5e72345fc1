"""merge, split and select against `cp -r` of the same bytes.

    python bench/rearrange.py [--doublings 6] [--rounds 3]

A simulated LIBERO dataset is merged with itself until it is a few hundred megabytes; then the commands' own
functions run against cp, in turns. Ours sync every file to disk before the new dataset gets its name; cp does not.
Goal: bytes written per second at 0.4 of cp's or more.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dpipe.pipeline.rearrange import merge, select, split_by_shares
from dpipe.streams.dataset import open_dataset
from measure import Rounds, report

DPIPE = Path(sys.executable).parent / "dpipe"


def payload(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file())


def make(folder: Path, doublings: int) -> Path:
    for words in (["sample", "libero", "--episodes", "20"], ["convert", "libero", "--workers", "0"]):
        subprocess.run([DPIPE, *words, "--workspace", folder], check=True, capture_output=True)
    root = folder / "lerobot" / "libero"
    for i in range(doublings):
        root = merge([root, root], folder / "lerobot" / f"double-{i}").root
    return root


def timed(out: Path, work: Callable[[], object]) -> float:
    """Megabytes a second of what lies in `out` afterwards."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    speed = payload(out) / seconds / 1e6
    shutil.rmtree(out)
    return speed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--doublings", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round over a small dataset")
    given = parser.parse_args()
    if given.quick:
        given.doublings, given.rounds = 1, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = make(folder, given.doublings)
        dataset = open_dataset(root)
        out = folder / "out"
        every_third = list(range(0, len(dataset), 3))
        sides = split_by_shares(dataset, {"a": 0.5, "b": 0.5})

        def both_sides() -> None:
            for name, episodes in sides.items():
                select(root, episodes, out / name)

        contenders = {
            "cp -r": lambda: timed(out, lambda: subprocess.run(["cp", "-r", root, out], check=True)),
            "merge": lambda: timed(out, lambda: merge([root, root], out)),
            "select every third": lambda: timed(out, lambda: select(root, every_third, out)),
            "split in two": lambda: timed(out, both_sides),
        }
        rounds = Rounds()
        rounds.run(given.rounds, contenders)
        goals = [rounds.ratio(f"{name} of cp", name, "cp -r", 0.4) for name in contenders if name != "cp -r"]
        facts = {"episodes": len(dataset), "frames": dataset.total_frames, "bytes": payload(root)}
        return report("rearrange", goals, rounds, "MB/s", facts)


if __name__ == "__main__":
    sys.exit(main())
