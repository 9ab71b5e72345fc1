"""What the compact trainer reaches in closed loop on the tabletop, with its controls: the table of bench/RESULTS.md.

    python bench/train_table.py [--seeds 0,1,2] [--episodes 800] [--only libra] [--workspace FOLDER]

Three objects at random poses, the one that is meant named by the instruction alone. Every run is one thread and
at most five minutes of CPU; each job's result is a file of bench/out/table/, so that the same command goes on
where it was stopped. Rows that are compared have the same data, seeds, steps and judge:

    libra           the recipe's defaults; the same policy with grey pictures, and with no instruction
    anchorrefine    a weak anchor; refined; the same anchor merely trained on for the refiner's steps
    vita            two stages; from scratch, for the steps of both stages together and at the better learning rate
    dial            both stages; the warm-up alone for the steps of both

A comparison is won or lost where the ranges over seeds do not overlap, open otherwise. Success decides where a
policy has any; where both are near 0 %, the error of single actions on the expert's own episodes does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import OUT, machine, versions

os.environ.setdefault("OMP_NUM_THREADS", "1")

TABLE = OUT / "table"
JUDGED, JUDGED_SECONDARY = 200, 60  # episodes a run
JUDGED_TEACHER = 4  # of the teacher only the error of its actions is asked, which has episodes of its own
CPU_LIMIT_MIN = 5.0
NEAR_ZERO = 0.05  # success below which a comparison falls back to the error of single actions
# As many as leave each run below its five minutes, and the table below ninety.
STEPS = {"anchor": 2000, "anchorrefine": 1500, "teacher": 800, "vita": 1400, "dial": 450}

Job = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where things lie. `workspace` has raw/, lerobot/ and runs/; targets that depend on a seed lie beside them."""

    workspace: Path
    episodes: int

    @property
    def dataset(self) -> Path:
        return self.workspace / "lerobot" / "libero"

    def run(self, recipe: str, name: str) -> Path:
        return self.workspace / "runs" / recipe / f"table-{name}"

    def targets(self, name: str) -> Path:
        return self.workspace / "table-targets" / name


def once(name: str, make: Callable[[], Job]) -> Job:
    """A job's result: kept in a file, with the CPU time it took."""
    path = TABLE / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    print(f"--- {name}", file=sys.stderr, flush=True)
    begin, wall = time.process_time(), time.monotonic()
    result = make()
    result |= {"cpu_s": time.process_time() - begin, "wall_s": time.monotonic() - wall}
    TABLE.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.rename(path)
    print(f"    {result['cpu_s'] / 60:.1f} CPU minutes", file=sys.stderr, flush=True)
    return result


def prepare(bench: Bench) -> None:
    """Recordings, dataset, tokens and shards, as a user makes them."""

    def dpipe(*words: str) -> None:
        program = "import sys; sys.argv[0] = 'dpipe'; from dpipe.cli import main; main()"
        subprocess.run(
            [sys.executable, "-c", program, *words, "--workspace", str(bench.workspace)], check=True
        )

    if not (bench.dataset / "dpipe" / "manifest.json").is_file():
        if not (bench.workspace / "raw" / "libero").is_dir():
            dpipe("sample", "libero", "--episodes", str(bench.episodes))
        dpipe("convert", "libero", "--to", "lerobot")
    # Without the probe of the tokens' report, which would take longer than a run.
    dpipe("precompute", "tokens", "--probe", "none", "--dataset", "libero")
    dpipe("precompute", "shards", "--short-side", "64", "--dataset", "libero")


# -- jobs -------------------------------------------------------------------------------------------------


def fit(bench: Bench, recipe: str, name: str, seed: int, targets: Path | None = None, **config: Any) -> Job:
    """One training run; `steps` and options of the loop may stand among `config`."""
    from dataclasses import fields

    from dpipe.trainer.loop import Options
    from dpipe.trainer.run import train

    steps = config.pop("steps", STEPS.get(recipe))
    known = {entry.name for entry in fields(Options)}
    options = {key: config.pop(key) for key in list(config) if key in known}

    def make() -> Job:
        result = train(
            recipe,
            bench.dataset,
            bench.run(recipe, name),
            steps=steps,
            config=config,
            options={"seed": seed, "log_every": 100, **options},
            targets=targets,
            say=lambda text: print("    " + text, file=sys.stderr, flush=True),
        )
        return {"steps": result.steps, "metrics": dict(result.metrics)}

    return once(f"{recipe}-{name}-train", make)


def judge(
    bench: Bench, recipe: str, name: str, condition: str = "full", episodes: int = JUDGED, **how: Any
) -> Job:
    from dataclasses import asdict

    from dpipe.trainer.evaluate import evaluate

    def make() -> Job:
        run = bench.run(recipe, name)
        return asdict(evaluate(run, episodes=episodes, say=lambda text: None, **how))

    return once(f"{recipe}-{name}-{condition}", make)


def targets_of(bench: Bench, stage: str, name: str, **params: Any) -> Path:
    """Targets that depend on a seed's policy, in a folder of their own."""
    from dpipe.pipeline.precompute import precompute

    folder = bench.targets(name)

    def make() -> Job:
        made = precompute(bench.dataset, [stage], {stage: params}, 0, folder)
        return {"episodes": made[0].episodes}

    once(f"{stage}-{name}", make)
    return folder


def libra(bench: Bench, seed: int) -> None:
    fit(bench, "libra", f"s{seed}", seed)
    judge(bench, "libra", f"s{seed}")
    judge(bench, "libra", f"s{seed}", "blind", blind=True)
    judge(bench, "libra", f"s{seed}", "no-language", language=False)


def anchorrefine(bench: Bench, seed: int) -> None:
    name = f"s{seed}"
    fit(bench, "anchor", name, seed, layers=1, width=64)
    policy = f"embedded:{bench.run('anchor', name) / 'policy'}"
    folder = targets_of(bench, "residuals", f"anchor-{name}", anchor=(policy,))
    fit(bench, "anchorrefine", f"refine-{name}", seed, folder, mode="refine")
    fit(bench, "anchorrefine", f"continue-{name}", seed, folder, mode="continue")
    few = JUDGED_SECONDARY
    judge(bench, "anchorrefine", f"refine-{name}", episodes=few)
    judge(bench, "anchorrefine", f"refine-{name}", "anchor-alone", few, options={"refine": False})
    judge(bench, "anchorrefine", f"continue-{name}", episodes=few)


def vita(bench: Bench, seed: int) -> None:
    name = f"s{seed}"
    fit(bench, "teacher", name, seed, window=2)
    judge(bench, "teacher", name, episodes=JUDGED_TEACHER)
    policy = f"embedded:{bench.run('teacher', name) / 'policy'}"
    folder = targets_of(bench, "teacher", f"teacher-{name}", teacher=policy)
    fit(bench, "vita", f"two-stage-{name}", seed, folder, mode="two-stage")
    fit(bench, "vita", f"scratch-{name}", seed, folder, mode="scratch", align_share=0.0, tune_lr=1e-3)
    for mode in ("two-stage", "scratch"):
        judge(bench, "vita", f"{mode}-{name}", episodes=JUDGED_SECONDARY)


def dial(bench: Bench, seed: int) -> None:
    folder = targets_of(bench, "foresight", "foresight")
    for stages in ("both", "one"):
        # Half the batch and one flow time an observation: twice the steps in the five minutes.
        fit(bench, "dial", f"{stages}-s{seed}", seed, folder, stages=stages, noise_draws=1, batch_size=32)
        judge(bench, "dial", f"{stages}-s{seed}", episodes=JUDGED_SECONDARY)


GROUPS = {"libra": libra, "anchorrefine": anchorrefine, "vita": vita, "dial": dial}

# Row of the table: what it is called, the runs and the condition it is made of.
ROWS = {
    "libra": ("libra", "", "full"),
    "libra, blind": ("libra", "", "blind"),
    "libra, no language": ("libra", "", "no-language"),
    "anchor alone": ("anchorrefine", "refine-", "anchor-alone"),
    "anchor refined": ("anchorrefine", "refine-", "full"),
    "anchor continued": ("anchorrefine", "continue-", "full"),
    "vita's teacher": ("teacher", "", "full"),
    "vita, two stages": ("vita", "two-stage-", "full"),
    "vita, from scratch": ("vita", "scratch-", "full"),
    "dial, both stages": ("dial", "both-", "full"),
    "dial, warm-up alone": ("dial", "one-", "full"),
}


# -- the table --------------------------------------------------------------------------------------------


def rows(seeds: list[int]) -> dict[str, list[Job]]:
    """What there is of each row, by seed; runs still to come are left out."""
    found: dict[str, list[Job]] = {}
    for row, (recipe, prefix, condition) in ROWS.items():
        jobs = []
        for seed in seeds:
            judged = TABLE / f"{recipe}-{prefix}s{seed}-{condition}.json"
            trained = TABLE / f"{recipe}-{prefix}s{seed}-train.json"
            if judged.is_file() and trained.is_file():
                training = json.loads(trained.read_text())
                jobs.append(json.loads(judged.read_text()) | {"train": training, "of_seed": seed})
        if jobs:
            found[row] = jobs
    return found


def claims(found: dict[str, list[Job]], expert: float) -> list[dict[str, str]]:
    told = []
    share = {row: [job["successes"] / job["episodes"] for job in jobs] for row, jobs in found.items()}

    def bound(row: str, least: float | None, most: float | None) -> None:
        if row not in share:
            return
        mean, what = statistics.mean(share[row]), f"at least {least:.0%}" if least else f"under {most:.0%}"
        met = mean >= least if least else mean < (most or 0)
        reason = f"mean {mean:.1%} over {len(share[row])} seeds ({_range(share[row])})"
        told.append({"claim": f"{row}: {what}", "outcome": "met" if met else "missed", "reason": reason})

    bound("libra", 0.8, None)
    bound("libra, blind", None, 0.3)
    bound("libra, no language", None, 0.5)
    if "libra" in found:
        most = max(job["train"]["cpu_s"] / 60 for job in found["libra"])
        met = "met" if most <= CPU_LIMIT_MIN else "missed"
        reason = f"longest run {most:.1f} CPU minutes; the expert itself succeeds in {expert:.0%}"
        told.append(
            {"claim": f"libra: at most {CPU_LIMIT_MIN:g} CPU minutes", "outcome": met, "reason": reason}
        )
    for ours, theirs in (
        ("anchor refined", "anchor alone"),
        ("anchor refined", "anchor continued"),
        ("vita, two stages", "vita, from scratch"),
        ("dial, both stages", "dial, warm-up alone"),
    ):
        if ours in found and theirs in found:
            told.append(_duel(ours, theirs, found))
    return told


def _duel(ours: str, theirs: str, found: dict[str, list[Job]]) -> dict[str, str]:
    """Won, lost or open, by success where there is any, else by the error of single actions."""
    seeds = {job["of_seed"] for job in found[ours]} & {job["of_seed"] for job in found[theirs]}

    def values(row: str, of: Callable[[Job], float]) -> list[float]:
        return [of(job) for job in found[row] if job["of_seed"] in seeds]

    def success(job: Job) -> float:
        return job["successes"] / job["episodes"]

    a, b = values(ours, success), values(theirs, success)
    measured = (
        f"success {statistics.mean(a):.1%} ({_range(a)}) against {statistics.mean(b):.1%} ({_range(b)})"
    )
    better = statistics.mean(a) - statistics.mean(b)
    apart = min(a) > max(b) or min(b) > max(a)
    if max(statistics.mean(a), statistics.mean(b)) < NEAR_ZERO:
        a, b = (values(row, lambda job: -job["arm_error"]) for row in (ours, theirs))
        measured += (
            f", too few to tell; single actions are off by {-statistics.mean(a):.3f} against "
            f"{-statistics.mean(b):.3f}"
        )
        better, apart = statistics.mean(a) - statistics.mean(b), min(a) > max(b) or min(b) > max(a)
    outcome = "open" if not apart or len(seeds) < 2 else "won" if better > 0 else "lost"
    if ours == "vita, two stages" and (teacher := found.get("vita's teacher")):
        off = statistics.mean(job["arm_error"] for job in teacher)
        measured += f"; the teacher whose states it was aligned to is itself off by {off:.3f}"
    if outcome == "open":
        measured += "; the ranges over seeds overlap" if len(seeds) > 1 else "; one seed says nothing"
    return {"claim": f"{ours} against {theirs}", "outcome": outcome, "reason": measured}


def _range(values: list[float]) -> str:
    return f"{min(values):.1%} to {max(values):.1%}"


def report(bench: Bench, seeds: list[int], expert: float) -> None:
    found = rows(seeds)
    table = [
        {
            "row": row,
            "seeds": [job["of_seed"] for job in jobs],
            "episodes": jobs[0]["episodes"],
            "success": [job["successes"] / job["episodes"] for job in jobs],
            "arm_error": [job["arm_error"] for job in jobs],
            "steps": jobs[0]["train"]["steps"],
            "cpu_minutes": [job["train"]["cpu_s"] / 60 for job in jobs],
        }
        for row, jobs in found.items()
    ]
    spent = sum(json.loads(path.read_text())["cpu_s"] for path in TABLE.glob("*.json")) / 60
    result = {
        "name": "train_table",
        "machine": machine(),
        "when": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "data": f"{bench.episodes} simulated episodes, 3 objects, 64 px",
        "cpu_minutes": spent,
        "rows": table,
        "claims": claims(found, expert),
    }
    OUT.mkdir(exist_ok=True)
    (OUT / "train_table.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in table:
        mean = statistics.mean(row["success"])
        print(f"{row['row']:22s} {mean:6.1%} ({_range(row['success'])}) over {len(row['seeds'])} seeds")
    for claim in result["claims"]:
        print(f"{claim['outcome']:7s} {claim['claim']}: {claim['reason']}")
    print(f"{spent:.0f} CPU minutes in all")


def expert_share(episodes: int = 50) -> Job:
    """How often the scripted expert itself succeeds on the judge's own seeds."""
    from dpipe.samples.motion import record
    from dpipe.trainer.evaluate import SEED

    return {"share": sum(record(SEED + i, 3, 8).success for i in range(episodes)) / episodes}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--episodes", type=int, default=800, help="recordings to learn from")
    parser.add_argument("--only", choices=GROUPS, action="append")
    parser.add_argument("--workspace", type=Path, default=TABLE / "workspace")
    parser.add_argument("--report", action="store_true", help="only put together what there is")
    arguments = parser.parse_args()
    seeds = [int(word) for word in arguments.seeds.split(",")]
    bench = Bench(arguments.workspace.resolve(), arguments.episodes)
    if not arguments.report:
        import torch

        torch.set_num_threads(1)
        prepare(bench)
    expert = once("expert", expert_share)["share"]
    if not arguments.report:
        chosen = arguments.only or list(GROUPS)
        order = [("libra", seed) for seed in seeds if "libra" in chosen]
        order += [(name, seed) for seed in seeds for name in chosen if name != "libra"]
        for name, seed in order:
            GROUPS[name](bench, seed)
            report(bench, seeds, expert)
    report(bench, seeds, expert)
    return 0


if __name__ == "__main__":
    sys.exit(main())
