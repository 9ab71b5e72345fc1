"""Random kills, counted: SIGKILL convert, precompute and shards over all sources, then run the same again.

    python bench/soak.py [--kills 40] [--seed 0]

Every round starts a command on a small simulated workspace, kills it and its workers at a random moment, checks
that what is on disk opens in lerobot or is plainly unfinished, runs the command to its end and compares every
byte with an undisturbed run. Rounds already counted are not repeated: the file of results is the memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from measure import OUT, machine

DPIPE = Path(sys.executable).parent / "dpipe"
SOURCES = ("libero", "calvin", "egodex", "agibot")
STEPS = ("convert", "precompute tokens", "precompute shards")
RESULT = OUT / "soak_kills.json"


def tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def words(step: str, source: str, dataset: str, space: Path, workers: int) -> list[str]:
    """The command of a step; conversions are cut into many small parts so that kills fall between them."""
    common = ["--workspace", str(space), "--workers", str(workers)]
    if step == "convert":
        return [str(DPIPE), "convert", source, "--part-frames", "150", "--allow-dropped", *common]
    return [str(DPIPE), *step.split(), "--dataset", dataset, *common]


def opens_or_is_unfinished(root: Path) -> str:
    """'absent', 'unfinished' or 'complete', the last as lerobot finds it; raises where it is neither."""
    if not root.exists():
        return "absent"
    if not (root / "meta" / "info.json").exists():
        return "unfinished"
    code = (
        "import sys; from lerobot.datasets.lerobot_dataset import LeRobotDataset as D; "
        "d = D('soak/set', root=sys.argv[1], video_backend='pyav'); d[0]; d[len(d) - 1]"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, capture_output=True, timeout=300)
    return "complete"


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a command and everything in its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=6)
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    base = OUT / "soak"
    done = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    rounds = done.get("rounds", []) if done.get("seed") == arguments.seed else []
    for source in SOURCES:
        if not (base / "raw" / source).is_dir():
            sample = [
                str(DPIPE),
                "sample",
                source,
                "--episodes",
                str(arguments.episodes),
                "--workspace",
                str(base),
            ]
            subprocess.run(sample, check=True, capture_output=True)
    plan = [(source, step, workers) for step in STEPS for source in SOURCES for workers in (1, 2)]
    while len(rounds) < arguments.kills:
        number = len(rounds)
        source, step, workers = plan[number % len(plan)]
        random_state = random.Random(f"{arguments.seed} {number}")
        outcome = one_round(base, source, step, workers, random_state)
        rounds.append({"source": source, "step": step, "workers": workers, **outcome})
        print(f"{number + 1}/{arguments.kills} {source} {step}, {workers} workers: {outcome}", flush=True)
        counts = {
            "kills": sum(r["killed"] for r in rounds),
            "finished before the kill": sum(not r["killed"] for r in rounds),
            "plainly unfinished after the kill": sum(r["state"] in ("absent", "unfinished") for r in rounds),
            "opened in lerobot after the kill": sum(r["state"] == "complete" for r in rounds),
            "byte-identical after the rerun": sum(r["identical"] for r in rounds),
            "not identical": sum(not r["identical"] for r in rounds),
        }
        result = {
            "name": "soak_kills",
            "machine": machine(),
            "seed": arguments.seed,
            "when": time.strftime("%Y-%m-%d"),
        }
        RESULT.write_text(json.dumps(result | {"counts": counts, "rounds": rounds}, indent=1) + "\n")
    return 0 if all(r["identical"] for r in rounds) else 1


def one_round(base: Path, source: str, step: str, workers: int, chance: random.Random) -> dict[str, object]:
    """Kill, look, run again, compare."""
    space, whole = base / "killed", base / "whole"
    for folder in (space, whole):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "raw").mkdir(parents=True)
        (folder / "raw" / source).symlink_to(base / "raw" / source)
    before = STEPS.index(step) > 0
    for folder in (space, whole):
        if before:
            subprocess.run(words("convert", source, "", folder, 0), check=True, capture_output=True)
    dataset = next((p.name for p in (whole / "lerobot").iterdir()), "") if before else ""
    start = time.monotonic()
    subprocess.run(words(step, source, dataset, whole, workers), check=True, capture_output=True)
    duration = time.monotonic() - start
    process = subprocess.Popen(
        words(step, source, dataset, space, workers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(chance.uniform(0.25, 1.0) * duration)
    killed = process.poll() is None
    kill_tree(process) if killed else None
    roots = sorted((space / "lerobot").glob("*")) if (space / "lerobot").is_dir() else []
    state = [opens_or_is_unfinished(root) for root in roots]
    subprocess.run(words(step, source, dataset, space, workers), check=True, capture_output=True)
    identical = tree(space / "lerobot") == tree(whole / "lerobot")
    return {"killed": killed, "state": state[0] if state else "absent", "identical": identical}


if __name__ == "__main__":
    sys.exit(main())
