"""merge, split and select against `cp -r` of the same bytes.

    python bench/rearrange.py [--doublings 6] [--rounds 3]

A dataset is merged with itself until it is a gigabyte (simulated: 300 MB); then the commands' own functions run against
cp, in turns, in a process that has its libraries: the command's start is not counted, cp has none to speak of. Ours
sync every file to disk before the new dataset gets its name and cp does not: where bytes are copied the goal is held
against cp when neither waits for the disk, and when both do.

filmed       EgoDex's layout with clips of 1080p, 5 MB an episode as published. Goal: bytes of the new dataset per
             second at 0.4 of cp's or more. A merge takes whole video files over by hard link, waits for the disk with
             the little else, and is held against a cp that waits for nothing; "copied" is the same merge to a disk
             that has no links.
simulated    LIBERO of 128 px, 0.2 MB an episode. cp spends 0.1 ms on that, as long as Parquet takes to write the
             row group of an episode that gets new numbers: no goal, but the ratio and the time of an episode are told.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from convert_video import make_clip
from dpipe.pipeline.outputs import sync_tree
from dpipe.pipeline.rearrange import merge, select
from dpipe.streams.dataset import open_dataset
from dpipe.video.encode import H264
from measure import Rounds, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from raw_egodex import write_episode

DPIPE = Path(sys.executable).parent / "dpipe"


def payload(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file())


def simulated(folder: Path, doublings: int) -> Path:
    """LIBERO as the simulator records it: small pictures."""
    for words in (["sample", "libero", "--episodes", "20"], ["convert", "libero", "--workers", "0"]):
        subprocess.run([DPIPE, *words, "--workspace", folder], check=True, capture_output=True)
    return doubled(folder / "lerobot" / "libero", doublings)


def filmed(folder: Path, doublings: int) -> Path:
    """EgoDex's layout: clips of 1080p and of 10 seconds, their packets copied."""
    task = folder / "raw" / "egodex" / "part1" / "stack_cups"
    for number in range(4):
        write_episode(task / str(number), frames=300, size=(64, 48))
        if number == 0:
            make_clip(folder / "clip.mp4", H264, 1080, 1920, 300, 2.0)
        shutil.copy(folder / "clip.mp4", task / f"{number}.mp4")
    words = ["convert", "egodex", "--video", "copy", "--workers", "0", "--workspace", folder]
    subprocess.run([DPIPE, *words], check=True, capture_output=True)
    return doubled(folder / "lerobot" / "egodex", doublings)


def doubled(root: Path, times: int) -> Path:
    for i in range(times):
        root = merge([root, root], root.parent / f"double-{i}").root
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


def measure(kind: str, root: Path, out: Path, rounds: Rounds, count: int) -> dict[str, Any]:
    dataset = open_dataset(root)
    every_third = list(range(0, len(dataset), 3))
    half = len(dataset) // 2
    sides = {"a": list(range(half)), "b": list(range(half, len(dataset)))}

    def both_sides() -> None:
        for name, episodes in sides.items():
            select(root, episodes, out / name)

    def synced() -> None:
        subprocess.run(["cp", "-r", root, out], check=True)
        sync_tree(out)

    def copied() -> None:
        with patch("os.link", side_effect=OSError(errno.EXDEV, "another disk")):
            merge([root, root], out)

    def unsynced(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with ExitStack() as stack:
                for place in ("rearrange.sync_tree", "rearrange_parts.sync_path"):
                    stack.enter_context(patch(f"dpipe.pipeline.{place}"))
                work()

        return run

    def third() -> object:
        return select(root, every_third, out)

    contenders = {
        f"{kind}: cp -r": lambda: timed(out, lambda: subprocess.run(["cp", "-r", root, out], check=True)),
        f"{kind}: cp -r, synced": lambda: timed(out, synced),
        f"{kind}: merge": lambda: timed(out, lambda: merge([root, root], out)),
        f"{kind}: merge, copied": lambda: timed(out, copied),
        f"{kind}: merge, copied, not synced": lambda: timed(out, unsynced(copied)),
        f"{kind}: select every third": lambda: timed(out, third),
        f"{kind}: select every third, not synced": lambda: timed(out, unsynced(third)),
        f"{kind}: split in two": lambda: timed(out, both_sides),
    }
    rounds.run(count, contenders)
    facts: dict[str, Any] = {"episodes": len(dataset), "frames": dataset.total_frames, "bytes": payload(root)}
    each = facts["bytes"] / len(dataset) / 1e6
    for name in contenders:
        plain, durable = (
            rounds.ratio(name, name, f"{kind}: cp -r{form}", 0).value for form in ("", ", synced")
        )
        took = 1000 * each / rounds.median(name)
        facts[name] = f"{plain:.2f} of cp, {durable:.2f} of cp that syncs, {took:.2f} ms an episode"
    return facts


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--doublings", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round over small datasets")
    given = parser.parse_args()
    if given.quick:
        given.doublings, given.rounds = 1, 1
    rounds, facts = Rounds(), {}
    for kind, make in {"filmed": filmed, "simulated": simulated}.items():
        with tempfile.TemporaryDirectory() as temporary:
            root = make(Path(temporary), given.doublings)
            facts[kind] = measure(kind, root, Path(temporary) / "out", rounds, given.rounds)
    plain, durable = "filmed: cp -r", "filmed: cp -r, synced"
    goals = [
        rounds.ratio(f"{name} of cp", name, plain, 0.4) for name in ("filmed: merge", "filmed: split in two")
    ]
    for name in ("filmed: merge, copied", "filmed: select every third"):
        goals.append(rounds.ratio(f"{name} of cp, neither synced", f"{name}, not synced", plain, 0.4))
        goals.append(rounds.ratio(f"{name} of cp, both synced", name, durable, 0.4))
    return report("rearrange", goals, rounds, "MB/s", facts)


if __name__ == "__main__":
    sys.exit(main())
