"""Random single bytes changed, counted: a thousand in each kind of file a user's disk holds.

    python bench/soak_bytes.py [--count 1000] [--seed 0] [--seconds S] [--kinds NAME ...]

Counts stay in bench/out/soak_bytes.json, and a run goes on where the last one of the same seed stopped, or ran out
of its seconds; kinds take turns, so that such a run has looked at all of them; runs over different kinds may go side
by side. A batch is a process of its own: one that dies counts as a crash. Exit 1 when anything crashed, hung, took a
gigabyte, or was called sound although a digest says otherwise.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import corruption
from corruption import KINDS
from measure import OUT, machine

RESULT = OUT / "soak_bytes.json"
BATCH = 250
MOST_MB = 1024


def run_batch(folder: Path, kind: str, first: int, count: int, seed: int) -> dict:
    words = [sys.executable, corruption.__file__, folder, "--kinds", kind]
    words += ["--first", first, "--count", count, "--seed", seed]
    try:
        run = subprocess.run(
            [*map(str, words)], capture_output=True, text=True, timeout=60 * count, check=False
        )
    except subprocess.TimeoutExpired:
        return {"counts": {"hang": count}, "slowest_s": 60.0 * count, "peak_mb": 0}
    if run.returncode:
        return {"counts": {f"died with {run.returncode}": count}, "slowest_s": 0.0, "peak_mb": 0}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no batch after so long")
    parser.add_argument("--kinds", nargs="*", default=[kind.name for kind in KINDS])
    given = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    until = time.monotonic() + given.seconds if given.seconds else float("inf")
    with tempfile.TemporaryDirectory(prefix="dpipe-bytes-") as folder:
        for upto in range(BATCH, given.count + BATCH, BATCH):
            for kind in (kind for kind in KINDS if kind.name in given.kinds):
                fresh = {"done": 0, "counts": {}, "slowest_s": 0.0, "peak_mb": 0}
                entry = known_kinds(given.seed).get(kind.name, fresh)
                batch = min(upto, given.count) - entry["done"]
                if batch <= 0 or time.monotonic() > until:
                    continue
                found = run_batch(Path(folder), kind.name, entry["done"], batch, given.seed)
                for name, number in found["counts"].items():
                    entry["counts"][name] = entry["counts"].get(name, 0) + number
                entry["done"] += batch
                entry["slowest_s"] = max(entry["slowest_s"], found["slowest_s"])
                entry["peak_mb"] = max(entry["peak_mb"], found["peak_mb"])
                save(kind.name, entry, given.seed)
                print(f"{kind.name}: {entry['done']}, {entry['counts']}", flush=True)
    kinds = known_kinds(given.seed)
    bad = {name: entry for name, entry in kinds.items() if faults(entry)}
    print(
        f"{len(kinds)} kinds, {sum(e['done'] for e in kinds.values())} bytes changed, {len(bad)} kinds with faults"
    )
    return 1 if bad else 0


def faults(entry: dict) -> int:
    """Changes that crashed, hung or were called sound against a digest; and too much memory."""
    wrong = sum(n for name, n in entry["counts"].items() if name not in ("found", "harmless", "unseen"))
    return wrong + (entry["peak_mb"] >= MOST_MB)


def known_kinds(seed: int) -> dict[str, dict]:
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    return known.get("kinds", {}) if known.get("seed") == seed else {}


def save(name: str, entry: dict, seed: int) -> None:
    with open(RESULT.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kinds = known_kinds(seed) | {name: entry}
        write({kind.name: kinds[kind.name] for kind in KINDS if kind.name in kinds}, seed)


def write(kinds: dict[str, dict], seed: int) -> None:
    total = {
        name: sum(entry["counts"].get(name, 0) for entry in kinds.values())
        for name in ("found", "harmless", "unseen")
    }
    counts = {
        "kinds of files": len(kinds),
        "bytes changed": sum(entry["done"] for entry in kinds.values()),
        "found, with a message": total["found"],
        "harmless: everything read is what it was": total["harmless"],
        "unseen: the format has no digest": total["unseen"],
        "crashes, hangs, or sound against a digest": sum(faults(entry) for entry in kinds.values()),
        "slowest, s": max(entry["slowest_s"] for entry in kinds.values()),
        "most memory, MB": max(entry["peak_mb"] for entry in kinds.values()),
    }
    facts = {"name": "single bytes changed", "machine": machine(), "when": time.strftime("%Y-%m-%d")}
    text = json.dumps(facts | {"seed": seed, "counts": counts, "kinds": kinds}, indent=1) + "\n"
    temporary = RESULT.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(RESULT)


if __name__ == "__main__":
    sys.exit(main())
