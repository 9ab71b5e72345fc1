"""Random kills, counted: SIGKILL convert, precompute and shards over all sources, then run the same again.

    python bench/soak.py [--kills 40] [--seed 0] [--seconds 200]

A round starts a command with one or two workers on a small workspace, kills it and its workers at a random
moment, has lerobot open what is on disk where anything claims to be a dataset, runs the command to its end and
compares every byte with a run nobody disturbed. Rounds already counted are not repeated: the file of results is
the memory, and --seconds ends this call early.
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
SOURCES = ("libero", "calvin", "egodex", "agibot", "lerobot")
STEPS = ("convert", "precompute tokens", "precompute shards")
RESULT = OUT / "soak_kills.json"
BASE = OUT / "soak"
EPISODES = 4

# Answers on stdout: one dataset a line of stdin, so that lerobot is imported once for all rounds.
LOOKER = """
import sys
from lerobot.datasets.lerobot_dataset import LeRobotDataset
for line in sys.stdin:
    try:
        dataset = LeRobotDataset("soak/set", root=line.strip(), video_backend="pyav")
        dataset[0], dataset[len(dataset) - 1]
        print("opens", flush=True)
    except Exception as error:
        print("FAILS", type(error).__name__, str(error).splitlines()[0], flush=True)
"""


class Looker:
    """lerobot in a process of its own."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def look(self, root: Path) -> str:
        """'absent', 'unfinished', or what lerobot says."""
        if not root.exists():
            return "absent"
        if not (root / "meta" / "info.json").exists():
            return "unfinished"
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen([sys.executable, "-c", LOOKER], text=True, **pipes)
        assert self.process.stdin is not None and self.process.stdout is not None
        print(root, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


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
        return [str(DPIPE), "convert", source, "--part-frames", "100", "--allow-dropped", *common]
    return [str(DPIPE), *step.split(), "--dataset", dataset, *common]


def run(command: list[str]) -> float:
    """Seconds of a command that must succeed."""
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"soak: {' '.join(command)} failed\n{done.stderr}")
    return time.monotonic() - started


def prepare(source: str) -> Path:
    """Raw recordings: simulated ones, or for LeRobot datasets the LIBERO ones converted."""
    raw = BASE / "raw" / source
    if raw.is_dir():
        return raw
    if source == "lerobot":
        whole = reference("libero", "convert")[0]
        shutil.copytree(whole / "lerobot" / "libero", raw, ignore=shutil.ignore_patterns("dpipe"))
    else:
        run([str(DPIPE), "sample", source, "--episodes", str(EPISODES), "--workspace", str(BASE)])
    return raw


def workspace(folder: Path, source: str, converted: Path | None) -> None:
    """An empty workspace with one source's recordings, or with its converted dataset."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / source).symlink_to(prepare(source).resolve())
    if converted is not None:
        shutil.copytree(converted / "lerobot", folder / "lerobot")


def reference(source: str, step: str) -> tuple[Path, float]:
    """(workspace, seconds) of an undisturbed run with one worker, made once."""
    folder = BASE / "whole" / source / step.replace(" ", "-")
    note = folder / "seconds.txt"
    if not note.is_file():
        workspace(folder, source, None if step == "convert" else reference(source, "convert")[0])
        dataset = "" if step == "convert" else dataset_of(folder).name
        note.write_text(str(run(words(step, source, dataset, folder, 1))))
    return folder, float(note.read_text())


def dataset_of(space: Path) -> Path:
    return next(iter(sorted((space / "lerobot").iterdir())))


def one_round(
    source: str, step: str, workers: int, chance: random.Random, looker: Looker
) -> dict[str, object]:
    """Kill, look, run again, compare."""
    whole, duration = reference(source, step)
    space = BASE / "killed"
    workspace(space, source, None if step == "convert" else reference(source, "convert")[0])
    dataset = "" if step == "convert" else dataset_of(space).name
    command = words(step, source, dataset, space, workers)
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
    time.sleep(chance.uniform(0.2, 1.0) * duration)
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)  # the command and its workers: one session
    process.wait()
    roots = sorted((space / "lerobot").glob("*")) if (space / "lerobot").is_dir() else []
    state = looker.look(roots[0]) if roots else "absent"
    run(command)
    return {"killed": killed, "state": state, "identical": tree(space / "lerobot") == tree(whole / "lerobot")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after these")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    done = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    same = done.get("seed") == arguments.seed and done.get("sources") == list(SOURCES)
    rounds = done["rounds"] if same else []
    if not same:
        shutil.rmtree(BASE, ignore_errors=True)
    plan = [(source, step, workers) for workers in (1, 2) for step in STEPS for source in SOURCES]
    looker, started = Looker(), time.monotonic()
    while sum(r["killed"] for r in rounds) < arguments.kills:
        if time.monotonic() - started > arguments.seconds:
            print(f"{sum(r['killed'] for r in rounds)} of {arguments.kills} kills; run again to go on")
            break
        number = len(rounds)
        source, step, workers = plan[number % len(plan)]
        chance = random.Random(f"{arguments.seed} {number}")
        outcome = one_round(source, step, workers, chance, looker)
        rounds.append({"source": source, "step": step, "workers": workers, **outcome})
        print(f"{number + 1} {source} {step}, {workers} workers: {outcome}", flush=True)
        keep(arguments.seed, rounds)
    looker.close()
    return 0 if all(r["identical"] and not str(r["state"]).startswith("FAILS") for r in rounds) else 1


def keep(seed: int, rounds: list[dict[str, object]]) -> None:
    counts = {
        "kills": sum(bool(r["killed"]) for r in rounds),
        "finished before the kill": sum(not r["killed"] for r in rounds),
        "plainly unfinished after the kill": sum(r["state"] in ("absent", "unfinished") for r in rounds),
        "opened in lerobot after the kill": sum(r["state"] == "opens" for r in rounds),
        "neither": sum(str(r["state"]).startswith("FAILS") for r in rounds),
        "byte-identical after the rerun": sum(bool(r["identical"]) for r in rounds),
        "not identical": sum(not r["identical"] for r in rounds),
    }
    told = {"name": "soak_kills", "machine": machine(), "seed": seed, "sources": SOURCES}
    told |= {"when": time.strftime("%Y-%m-%d"), "counts": counts, "rounds": rounds}
    RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
