"""SQL over a million episodes, from the start of the process to the answer's last line.

    python bench/query.py [--episodes 1000000] [--rounds 5]

One dataset of a million episodes as a conversion writes its tables (payload plays no part: a query reads none),
and the commands a user types, each a fresh process. Goal: every one of them below 1 s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import Goal, Rounds, report

DPIPE = Path(sys.executable).parent / "dpipe"
QUERIES = {
    "count by instruction": "SELECT instruction, count(*) AS n FROM episodes GROUP BY 1 ORDER BY n DESC LIMIT 10",
    "choose by length and split": (
        "SELECT episode_index, source_id FROM episodes WHERE frames > 290 AND split = 'test' LIMIT 100"
    ),
    "hours by what the source recorded": "SELECT suite, sum(seconds) / 3600 AS hours FROM episodes GROUP BY 1",
}
GOAL_S = 1.0


def write_tables(root: Path, episodes: int) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(50, 300, episodes)
    tasks = [f"put the {i}th block into the bowl" for i in range(500)]
    number = rng.integers(0, len(tasks), episodes)
    stop = np.cumsum(frames)
    splits = pa.array(np.where(np.arange(episodes) < episodes * 0.9, "train", "test"))
    source = pa.array([f"suite_{i % 4}/task_{i % 500}_demo.hdf5/demo_{i}" for i in range(episodes)])
    suites = [json.dumps({"suite": f"suite_{i}", "kind": "teleoperation"}) for i in range(4)]
    instruction = pa.array(tasks).take(pa.array(number))
    own = {
        "episode_index": pa.array(np.arange(episodes)),
        "source_id": source,
        "split": splits,
        "variant": pa.array([""] * episodes),
        "frames": pa.array(frames),
        "instruction": instruction,
        "content": pa.array([f"{i:032x}" for i in range(episodes)]),
        "metadata": pa.array(suites).take(pa.array(np.arange(episodes) % 4)),
        "part": pa.array(stop // 16384),
    }
    (root / "dpipe").mkdir(parents=True)
    pq.write_table(pa.table(own), root / "dpipe" / "episodes.parquet")
    (root / "meta").mkdir()
    features = {"action": {"dtype": "float32", "shape": [7], "names": [f"a{i}" for i in range(7)]}}
    info = {"codebase_version": "v3.0", "fps": 20, "features": features, "total_episodes": episodes}
    info |= {"total_frames": int(stop[-1]), "splits": {"train": f"0:{episodes}"}}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "dpipe" / "manifest.json").write_text(
        json.dumps({"dpipe": 1, "name": root.name, "source": "libero"})
    )
    pq.write_table(
        pa.table({"task_index": range(len(tasks)), "task": tasks}), root / "meta" / "tasks.parquet"
    )


def asking(space: Path, sql: str) -> Callable[[], float]:
    """Milliseconds from the start of the process to its end."""

    def once() -> float:
        begin = time.perf_counter()
        words = [DPIPE, "query", sql, "--workspace", space]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) >= 3, done.stdout
        return 1000 * (time.perf_counter() - begin)

    return once


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round over 10,000 episodes")
    given = parser.parse_args()
    if given.quick:
        given.episodes, given.rounds = 10_000, 1
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder)
        write_tables(space / "lerobot" / "million", given.episodes)
        rounds = Rounds()
        contenders = {name: asking(space, sql) for name, sql in QUERIES.items()}
        for ask in contenders.values():
            ask()  # once unmeasured: the files are in memory afterwards, for all alike
        rounds.run(given.rounds, contenders)
    goals = [
        Goal(
            f"{name}, s below {GOAL_S:g}",
            1000 * GOAL_S / rounds.median(name),
            1.0,
            (1000 * GOAL_S / max(rounds.values[name]), 1000 * GOAL_S / min(rounds.values[name])),
        )
        for name in QUERIES
    ]
    return report("query", goals, rounds, "ms", {"episodes": given.episodes})


if __name__ == "__main__":
    sys.exit(main())
