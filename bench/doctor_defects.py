"""Every single defect of the test suite, looked for by `dpipe doctor` and by reading everything with lerobot.

    python bench/doctor_defects.py [--no-lerobot]

lerobot's part is `LeRobotDataset(...)` and every item of it: a defect counts as caught when anything is raised. It
has no reader for raw recordings and never opens dpipe/, so that defects there are not counted for it.
Writes bench/out/doctor_defects.json, and the table as Markdown beside it.
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
from measure import OUT, machine, versions
from trees import tree_digest

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


def judge(one: Defect, with_lerobot: bool) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="dpipe-defect-") as folder:
        root = broken(one, Path(folder))
        start = time.perf_counter()
        report = examine(root, one.level)
        seconds = time.perf_counter() - start
        reads = with_lerobot and one.base in LEROBOT_READS and is_lerobots_concern(sound(one.base), root)
        raised = read_with_lerobot(root) if reads else None
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


def markdown(rows: list[dict[str, object]], alarms: dict[str, bool]) -> str:
    """One line a problem: how many defects of it each finds."""
    lines = ["| problem | defects | `dpipe doctor` | full read with lerobot 0.6.1 |", "|---|---:|---:|---:|"]
    for problem in sorted({str(row["problem"]) for row in rows}):
        mine = [row for row in rows if row["problem"] == problem]
        readable = [row for row in mine if row["lerobot"] is not None]
        caught = f"{sum(bool(row['lerobot']) for row in readable)} of {len(readable)}" if readable else "–"
        lines.append(f"| `{problem}` | {len(mine)} | {sum(bool(row['dpipe']) for row in mine)} | {caught} |")
    readable = [row for row in rows if row["lerobot"] is not None]
    lines.append(
        f"| **all** | **{len(rows)}** | **{sum(bool(row['dpipe']) for row in rows)}** "
        f"| **{sum(bool(row['lerobot']) for row in readable)} of {len(readable)}** |"
    )
    lines.append("")
    lines.append(f"False alarms on {len(alarms)} sound datasets and raw trees: {sum(alarms.values())}.")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-lerobot", action="store_true")
    with_lerobot = not parser.parse_args().no_lerobot
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
            rows.append(judge(one, with_lerobot))
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
    (OUT / "doctor_defects.json").write_text(
        json.dumps(facts | {"false_alarms": alarms, "rows": rows}, indent=1) + "\n"
    )
    text = markdown(rows, alarms)
    (OUT / "doctor_defects.md").write_text(text)
    print(text)
    missed = [row for row in rows if not row["dpipe"]]
    return 1 if missed or any(alarms.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
