"""Every single defect of the test suite, looked for by `dpipe doctor` and by reading everything with lerobot.

    python bench/doctor_defects.py [--no-lerobot] [--afresh]

lerobot's part is `LeRobotDataset(...)` and every item of it: a defect counts as caught when anything is raised. It
has no reader for raw recordings and never opens dpipe/, so that defects there are not counted for it.
What lerobot made of a defect is measured once and remembered, unless `--afresh`; dpipe's part is measured each time.
Writes bench/out/doctor_defects.json, and the table in docs/doctor.md between its two marks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from defects import DEFECTS, SOUND, Defect, broken, keep_sound_things_in, sound
from dpipe.pipeline.doctor import Level, examine
from measure import HERE, OUT, machine, versions
from trees import tree_digest

PAGE = HERE.parent / "docs" / "doctor.md"
LEROBOT_READS = ("dataset", "foreign", "recorded", "splits", "served")


def read_with_lerobot(root: Path) -> str:
    """What a full read raises, "" where it ends well."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    try:
        dataset = LeRobotDataset("local/defect", root=root, video_backend="pyav")
        for position in range(len(dataset)):
            dataset[position]
    except Exception as error:  # noqa: BLE001 - whatever it is, it was noticed
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def is_lerobots_concern(before: Path, after: Path) -> bool:
    """Whether anything was changed outside dpipe/ and the card, which lerobot never opens."""
    a, b = tree_digest(before), tree_digest(after)
    changed = {name for name in {*a, *b} if a.get(name) != b.get(name)}
    return any(not name.startswith(("dpipe/", "README.md")) for name in changed)


def judge(one: Defect, with_lerobot: bool, known: dict[str, str | None]) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="dpipe-defect-") as folder:
        root = broken(one, Path(folder))
        start = time.perf_counter()
        report = examine(root, one.level)
        seconds = time.perf_counter() - start
        reads = with_lerobot and one.base in LEROBOT_READS and is_lerobots_concern(sound(one.base), root)
        name = f"{one.base}: {one.name}"
        raised = (known[name] if name in known else read_with_lerobot(root)) if reads else None
    return {
        "defect": one.name,
        "base": one.base,
        "problem": one.problem,
        "level": one.level.name.lower(),
        "dpipe": one.problem in report.problems,
        "seconds": round(seconds, 3),
        "lerobot": None if raised is None else bool(raised),
        "raised": raised,
    }


KINDS = {
    "metadata, files, instructions": """info format-version features feature-names feature-role totals splits tasks
        episodes episode-range episode-tasks missing-file stray-file unreadable refused instruction""",
    "rows and their numbering": """columns row-count index episode-index frame-index timestamp task-index
        duplicate-episode split-leakage""",
    "statistics": "statistics episode-statistics",
    "values: dead, frozen, swapped, out of step": """not-finite constant stale jump action-is-state time-pairing units
        contradiction gripper-range gripper-polarity rotation""",
    "video: ranges, counts, rates": "video-size video-rate video-count video-range video-info video-damaged",
    "pictures: black, frozen, late, another's": """video-black video-frozen video-repeated video-swapped
        video-shifted""",
    "targets, shards, our own records": """manifest unfinished content own-table sidecar segments dropped card target
        target-contract target-episodes target-values shards""",
}
MARKS = ("<!-- defects -->", "<!-- /defects -->")


def kind_of(base: str, problem: str) -> str:
    if base.startswith("raw"):
        return "raw recordings of the four sources"
    return next(kind for kind, problems in KINDS.items() if problem in problems.split())


def markdown(rows: list[dict[str, object]], sound_ones: int, alarms: int) -> str:
    """One line a kind of defect: how many of it each finds."""
    lines = ["| single defects in | `dpipe doctor` | a full read with lerobot 0.6.1 |", "|---|---:|---:|"]

    def line(name: str, mine: list[dict[str, object]]) -> str:
        readable = [row for row in mine if row["lerobot"] is not None]
        caught = f"{sum(bool(row['lerobot']) for row in readable)} of {len(readable)}" if readable else "–"
        return f"| {name} | {sum(bool(row['dpipe']) for row in mine)} of {len(mine)} | {caught} |"

    for kind in [*KINDS, "raw recordings of the four sources"]:
        lines.append(line(kind, [r for r in rows if kind_of(str(r["base"]), str(r["problem"])) == kind]))
    lines.append(line("**all**", rows))
    return "\n".join(
        [*lines, "", f"False alarms on the {sound_ones} sound things they were seeded in: {alarms}."]
    )


def put_table(text: str) -> None:
    """Between the marks of docs/doctor.md."""
    page = PAGE.read_text()
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-lerobot", action="store_true")
    parser.add_argument("--afresh", action="store_true", help="read everything with lerobot again")
    given = parser.parse_args()
    with_lerobot = not given.no_lerobot
    result = OUT / "doctor_defects.json"
    old = json.loads(result.read_text()) if result.is_file() and not given.afresh else {}
    same = old.get("versions", {}).get("lerobot") == versions().get("lerobot")
    known = {
        f"{r['base']}: {r['defect']}": r["raised"] for r in old.get("rows", []) if r["raised"] is not None
    }
    known = known if same else {}
    with tempfile.TemporaryDirectory(prefix="dpipe-sound-") as folder:
        keep_sound_things_in(Path(folder))
        if with_lerobot:
            import torch

            torch.set_num_threads(1)
            os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        alarms = {name: bool(examine(sound(name), Level.FULL).problems) for name in SOUND}
        if with_lerobot:
            read = {name: read_with_lerobot(sound(name)) for name in LEROBOT_READS}
            assert not any(read.values()), f"lerobot does not read what is sound: {read}"
        rows = []
        for number, one in enumerate(DEFECTS):
            rows.append(judge(one, with_lerobot, known))
            print(f"{number + 1}/{len(DEFECTS)} {one.base}: {one.name}", file=sys.stderr, flush=True)
    OUT.mkdir(exist_ok=True)
    readable = [row for row in rows if row["lerobot"] is not None]
    facts = {
        "name": "single defects",
        "machine": machine(),
        "versions": versions(),
        "when": time.strftime("%Y-%m-%d"),
        "seed": 3,
        "counts": {
            "defects": len(rows),
            "found by dpipe doctor under their own name": sum(bool(row["dpipe"]) for row in rows),
            "defects in files that lerobot reads": len(readable),
            "of these, raised by a full read with lerobot 0.6.1": sum(
                bool(row["lerobot"]) for row in readable
            ),
            "sound datasets and raw trees": len(alarms),
            "false alarms on them": sum(alarms.values()),
        },
    }
    result.write_text(json.dumps(facts | {"false_alarms": alarms, "rows": rows}, indent=1) + "\n")
    text = markdown(rows, len(alarms), sum(alarms.values()))
    if with_lerobot:
        put_table(text)
    print(text)
    missed = [row for row in rows if not row["dpipe"]]
    return 1 if missed or any(alarms.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
