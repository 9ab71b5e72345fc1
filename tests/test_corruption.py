"""One byte changed at random, thirty times in each kind of file: found or harmless, never a crash, hang or lie."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corruption import KINDS

GROUPS = {
    "dataset": [kind.name for kind in KINDS if kind.base == "served" and "dpipe" not in kind.pattern],
    "own folder": [kind.name for kind in KINDS if kind.base == "served" and "dpipe" in kind.pattern],
    "raw": [kind.name for kind in KINDS if kind.base.startswith("raw")],
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_changed_byte_is_found_or_harmless(tmp_path: Path, group: str):
    """In a process of its own, so that a crash of a library would be seen, and its memory measured."""
    program = [
        sys.executable,
        Path(__file__).with_name("corruption.py"),
        tmp_path,
        "--count",
        "30",
        "--kinds",
    ]
    run = subprocess.run(
        [*map(str, program), *GROUPS[group]], capture_output=True, text=True, timeout=240, check=False
    )
    results = {line["kind"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert run.returncode == 0 and list(results) == GROUPS[group], run.stderr[-2000:]
    for kind in KINDS:
        if kind.name not in results:
            continue
        found = results[kind.name]
        allowed = {"found", "harmless"} | (set() if kind.digest else {"unseen"})
        assert set(found["counts"]) <= allowed, found
        assert sum(found["counts"].values()) == 30
        assert found["slowest_s"] < 30 and found["peak_mb"] < 1024, found
