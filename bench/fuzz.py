"""Bounded, seeded, structure-aware fuzzing of every reader that meets files from strangers.

    python bench/fuzz.py [--seconds 120] [--seed 0] [--targets NAME ...]

Each target changes fields of one format (tests/fuzzing.py) and reads the result with the converter, the LeRobot
reader, the shard reader or the target reader, and with the doctor. Targets share the time. Cases run in child
processes of a few hundred, so that a crash of a library, a hang or a gigabyte of memory is seen and the rest goes
on. Whatever is no message of ours is a find: its file is kept in tests/corpus/, where every test run reads it
again. Counts stay in bench/out/fuzz.json. Exit 1 when anything was found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from corruption import peak_memory
from fuzzing import CORPUS, TARGETS, changed, run_case, sound_file
from measure import OUT, machine

BATCH = 200
CASE_S = 20.0  # nothing of a few kilobytes takes this long to read
MOST_MB = 1024


def work(target_name: str, folder: Path, seed: int, first: int, count: int, until: float, note: Path) -> None:
    """A child: cases one after another; the number of each is noted before it runs."""
    target = TARGETS[target_name]
    sound = sound_file(target, folder)
    done, finds = 0, []
    for number in range(first, first + count):
        if time.time() > until:
            break
        write_note(note, number)
        found = run_case(target, folder, changed(target, sound, seed, number))
        done += 1
        if found:
            finds.append([number, found])
    print(json.dumps({"done": done, "finds": finds, "peak_mb": peak_memory() >> 20}))


def write_note(note: Path, number: int) -> None:
    temporary = note.with_suffix(".new")
    temporary.write_text(f"{number} {time.time()}")
    temporary.replace(note)


def run_batch(name: str, folder: Path, seed: int, first: int, until: float) -> dict:
    """A batch in a child; a child that dies or hangs is a find at the case it had noted."""
    note = folder / f"{name}.case"
    write_note(note, first)
    words = [sys.executable, __file__, "--work", name, folder, seed, first, BATCH, until, note]
    child = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while True:
        try:
            out, _ = child.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            number, started = note.read_text().split()
            if (
                time.time() - float(started) > CASE_S + 40
            ):  # the first one waits for imports and the sound tree
                child.kill()
                child.communicate()
                return {"done": int(number) - first + 1, "finds": [[int(number), "hang"]], "peak_mb": 0}
    if child.returncode:
        number = int(note.read_text().split()[0])
        return {
            "done": number - first + 1,
            "finds": [[number, f"died with {child.returncode}"]],
            "peak_mb": 0,
        }
    return json.loads(out)


def keep(name: str, folder: Path, seed: int, number: int, found: str) -> None:
    """The changed file, under a name that says which target reads it."""
    data = changed(TARGETS[name], sound_file(TARGETS[name], folder), seed, number)
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    print(f"FOUND {name} case {number} of seed {seed}: {found}\n  kept as {path}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    given = parser.parse_args()
    cases: dict[str, int] = {}
    finds: dict[str, list[str]] = {}
    peak = 0
    with tempfile.TemporaryDirectory(prefix="dpipe-fuzz-") as name_of_folder:
        folder = Path(name_of_folder)
        for name in given.targets:
            sound_file(TARGETS[name], folder)  # sound trees are built once, outside the time
        share = given.seconds / len(given.targets)
        for name in given.targets:
            until, first, seen = time.time() + share, 0, set()
            while time.time() < until:
                batch = run_batch(name, folder, given.seed, first, until)
                first += max(1, batch["done"])
                peak = max(peak, batch["peak_mb"])
                for number, found in batch["finds"]:
                    finds.setdefault(name, []).append(found)
                    if found not in seen and len(seen) < 5:
                        seen.add(found)
                        keep(name, folder, given.seed, number, found)
            cases[name] = first
            print(f"{name}: {first} cases, {len(finds.get(name, []))} finds", flush=True)
    total, wrong = sum(cases.values()), sum(map(len, finds.values()))
    OUT.mkdir(exist_ok=True)
    counts = {
        "targets": len(cases),
        "cases": total,
        "crashes, hangs and errors without a message": wrong,
        "most memory, MB": peak,
        "files in the corpus": len(list(CORPUS.glob("*"))) if CORPUS.is_dir() else 0,
    }
    facts = {"name": "fuzzing", "machine": machine(), "when": time.strftime("%Y-%m-%d"), "seed": given.seed}
    (OUT / "fuzz.json").write_text(
        json.dumps(facts | {"counts": counts, "cases": cases, "finds": finds}, indent=1) + "\n"
    )
    print(f"{total} cases in {len(cases)} targets, {wrong} finds, at most {peak} MB")
    return 1 if wrong or peak >= MOST_MB else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        target, where, seed, first, count, until, note = sys.argv[2:]
        work(target, Path(where), int(seed), int(first), int(count), float(until), Path(note))
    else:
        sys.exit(main())
