"""Training: what share of a step is spent waiting for data?

    python bench/train_wait.py [--rounds 3] [--steps 60] [--quick] [--folder DIR]

The tiny recipes train on the LIBERO sample (two cameras of 128 pixels, shown at 64) with the tokens and foresight
they need: `libra` and `dial` from JPEG shards, `libra` from the dataset's own videos. Waiting is the time the loop
spends in `next(batches)`, as metrics.jsonl has it; the first logged stretch, in which the stream starts, is left
out. Loader threads share the process with the step: both counts are printed, and every goal is 5 % over the share
found, so that 1 is the least.

On a GPU the same script says what its step leaves the loader; such figures carry the GPU's name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "tests"))

import torch  # noqa: E402
from dpipe.pipeline.precompute import precompute  # noqa: E402
from dpipe.streams.stream import cores  # noqa: E402
from dpipe.trainer.run import train  # noqa: E402
from measure import Goal, Rounds, report  # noqa: E402
from precompute import camera_dataset  # noqa: E402

LEAST = 0.05
CASES = {
    "libra, shards": ("libra", "jpeg"),
    "dial, shards": ("dial", "jpeg"),
    "libra, videos": ("libra", "video"),
}


def prepared(folder: Path, episodes: int) -> Path:
    """The sample with its targets and shards; made once."""
    root = camera_dataset(folder, episodes)
    if not (root / "dpipe" / "shards").is_dir():
        params = {"tokens": {"probe": "none"}, "foresight": {"pool": 2, "limit": 10.0}, "shards": {}}
        precompute(root, list(params), params)
    return root


def measure(root: Path, run: Path, recipe: str, frames: str, steps: int) -> tuple[float, float]:
    """(samples per second, share of the time spent waiting) after the first stretch."""
    shutil.rmtree(run, ignore_errors=True)
    options = {"log_every": steps // 6, "checkpoint_every": 10 * steps}
    train(recipe, root, run, steps=steps, options=options, frames=frames, say=lambda line: None)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > steps // 6]
    seconds = [1 / row["samples_per_second"] for row in rows]  # per sample, so that stretches weigh alike
    waited = sum(row["data_wait"] * spent for row, spent in zip(rows, seconds, strict=True)) / sum(seconds)
    return len(rows) / sum(seconds), waited


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="one round of a few steps, to see that it runs")
    parser.add_argument("--folder", type=Path, default=HERE / "out" / "train-data")
    given = parser.parse_args()
    rounds_, steps = (1, 12) if given.quick else (given.rounds, given.steps)
    root = prepared(given.folder, 4 if given.quick else 24)
    rounds, waits = Rounds(), {name: [] for name in CASES}

    def contender(name: str) -> float:
        recipe, frames = CASES[name]
        speed, waited = measure(root, given.folder / "run", recipe, frames, steps)
        waits[name].append(waited)
        print(f"  {name}: waited {waited:.2%}", file=sys.stderr, flush=True)
        return speed

    rounds.run(rounds_, {name: lambda name=name: contender(name) for name in CASES})
    threads = f"{cores()} cores, {torch.get_num_threads()} thread of the step, {cores()} of the loader"
    goals = []
    for name, shares in waits.items():
        each = [LEAST / max(share, 1e-4) for share in shares]
        middle = statistics.median(shares)
        goals.append(
            Goal(
                f"5 % over the wait of {name} ({middle:.1%}; {threads})",
                LEAST / max(middle, 1e-4),
                1,
                (min(each), max(each)),
            )
        )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "cores": cores(),
        "threads of the step": torch.get_num_threads(),
        "threads of the loader": cores(),
        "gpu": gpu,
    }
    return report("train_wait", goals, rounds, "samples/s", facts)


if __name__ == "__main__":
    sys.exit(main())
