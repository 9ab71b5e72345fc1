"""Every benchmark, then bench/RESULTS.md from what they left: regenerated, not typed.

    python bench/all.py [NAME ...] [--quick]

Without names all are run, one after the other, on a machine that should have nothing else to do. A benchmark
that misses a goal does not stop the others; the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
RESULTS = HERE / "RESULTS.md"
BENCHMARKS = (
    "convert_libero",
    "convert_video",
    "convert_calvin",
    "overhead",
    "memory",
    "precompute",
    "stream",
    "scale",
    "train_wait",
    "doctor",
    "query",
    "rearrange",
)


def table() -> str:
    """RESULTS.md from the newest result of each benchmark and of the counted runs."""
    lines = [
        "# Results",
        "",
        "Made by `make bench`, `make soak` and `make fuzz` from what the scripts measured; do not edit.",
        "Each figure is a ratio against a named peer in the same run; medians, with the range over rounds.",
        "",
    ]
    for path in sorted(OUT.glob("*.json")):
        result = json.loads(path.read_text())
        if "claims" in result:
            lines += _trained(result)
        elif "goals" in result:
            lines += _benchmark(result)
        elif "counts" in result:
            lines += _counted(result)
    return "\n".join(lines) + "\n"


def _benchmark(result: dict) -> list[str]:
    lines = [f"## {result['name']}", "", f"{result['machine']}, {result['when']}. {_versions(result)}", ""]
    lines += ["| goal | reached | least | |", "|---|---|---|---|"]
    for goal in result["goals"]:
        low, high = goal["spread"]
        around = f" ({low:.2f} to {high:.2f})" if high else ""
        outcome = "met" if goal["met"] else "missed"
        lines.append(f"| {goal['name']} | {goal['value']:.2f}{around} | {goal['least']:g} | {outcome} |")
    lines += ["", f"| measured ({result['unit']}) | median | range |", "|---|---|---|"]
    for name, values in result["values"].items():
        lines.append(
            f"| {name} | {statistics.median(values):,.1f} | {min(values):,.1f} to {max(values):,.1f} |"
        )
    return [*lines, ""]


def _trained(result: dict) -> list[str]:
    """What policies reach in closed loop: a row each, mean over seeds with the range; then what follows."""
    lines = [f"## {result['name']}", "", f"{result['machine']}, {result['when']}. {_versions(result)}", ""]
    lines += [f"{result['data']}; {result['cpu_minutes']:.0f} CPU minutes in all.", ""]
    lines += [
        "| policy | success | off the expert's actions | seeds x episodes | steps | CPU minutes a run |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in result["rows"]:
        success = f"{statistics.mean(row['success']):.1%} ({_around(row['success'], '.1%')})"
        error = f"{statistics.mean(row['arm_error']):.3f} ({_around(row['arm_error'], '.3f')})"
        runs = f"{len(row['seeds'])} x {row['episodes']}"
        spent = f"{statistics.mean(row['cpu_minutes']):.1f}"
        lines.append(f"| {row['row']} | {success} | {error} | {runs} | {row['steps']} | {spent} |")
    lines += ["", "| claim | | reason |", "|---|---|---|"]
    lines += [f"| {claim['claim']} | {claim['outcome']} | {claim['reason']} |" for claim in result["claims"]]
    return [*lines, ""]


def _around(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _counted(result: dict) -> list[str]:
    lines = [f"## {result['name']}", "", f"{result['machine']}, {result['when']}, seed {result['seed']}.", ""]
    lines += ["| what | count |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in result["counts"].items()]
    return [*lines, ""]


def _versions(result: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="only these")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="only rewrite RESULTS.md")
    arguments = parser.parse_args()
    missed = []
    for name in [] if arguments.table else (arguments.names or BENCHMARKS):
        script = HERE / f"{name}.py"
        if not script.is_file():
            continue
        print(f"--- {name}", flush=True)
        if subprocess.run(
            [sys.executable, str(script), *(["--quick"] if arguments.quick else [])]
        ).returncode:
            missed.append(name)
    RESULTS.write_text(table())
    if arguments.table:
        print(f"{RESULTS}: rewritten from {OUT}")
    else:
        print(f"{RESULTS}: {len(missed)} benchmarks missed a goal {' '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
