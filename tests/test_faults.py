"""Leaving a run at any durable step, whatever it makes and whatever from, loses nothing (fault_runner.py)."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dpipe.converters import SOURCES
from dpipe.stages import STAGES

TESTS = Path(__file__).parent
MEMORY = Path("/dev/shm")  # where a sync costs nothing: what is lost is decided by the order of operations


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="dpipe-faults-", dir=MEMORY) as made:
        yield Path(made)


def leave_everywhere(subject: str, folder: Path) -> dict[str, int]:
    command = [sys.executable, "-W", "ignore", TESTS / "fault_runner.py", subject, folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("source", SOURCES)
def test_a_conversion_left_at_any_fsync_rename_or_unlink_is_unfinished_and_goes_on(source: str, folder: Path):
    counts = leave_everywhere(source, folder)
    assert counts["points"] > 60
    # The manifest's rename makes it a dataset: only tidying up comes after.
    assert counts["unfinished"] > counts["points"] - 10


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_left_at_any_fsync_rename_or_unlink_is_unfinished_and_goes_on(stage: str, folder: Path):
    counts = leave_everywhere(stage, folder)
    assert counts["points"] > 8 and counts["unfinished"] > counts["points"] // 2
