"""Plans: arithmetic by hand, nothing written, what is done and why the rest is not, refusals and questions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dpipe.converters.libero import Options
from dpipe.pipeline import payload, plan
from dpipe.pipeline.convert import read_catalog
from dpipe.pipeline.plan import (
    FOOTER_BYTES,
    Step,
    plan_convert,
    plan_targets,
    plan_text,
    question,
    refuse_or_ask,
    require_disk,
)
from dpipe.pipeline.precompute import precompute
from dpipe.pipeline.progress import Progress
from dpipe.pipeline.request import ConvertRequest
from dpipe.schemas.errors import DataError, UsageError
from raw_libero import demo_arrays, write_raw, write_suite
from tiny_dataset import write_tiny
from trees import run_convert, tree_digest

DPIPE = Path(sys.executable).parent / "dpipe"


def planned(tmp_path: Path, pilot: bool = False, **changes) -> Step:
    asked = ConvertRequest("libero", tmp_path / "raw", tmp_path / "out", "set", Options(), **changes)
    return plan_convert(asked, read_catalog(asked, Progress(quiet=True)), pilot)


def step(**changes) -> Step:
    told = {"name": "convert x", "needs": "raw", "makes": "/", "episodes": 1, "frames": 1, "done_episodes": 0}
    told |= {"why": ("1 have no receipt",), "read_bytes": 1, "write_bytes": 1, "files": 1, "seconds": 1.0}
    return Step(**(told | {"cheaper": ("--resize WxH",)} | changes))


def test_bytes_follow_from_shapes_and_dtypes(tmp_path: Path):
    path = write_suite(tmp_path / "raw", demos=2, steps=10, side=32)  # 9 and 10 frames once paired
    found = planned(tmp_path)
    assert (found.episodes, found.frames, found.files) == (2, 9 + 10, 3)
    assert found.read_bytes == path.stat().st_size
    # 8 + 7 numbers of the dataset, 10 + 7 beside it, then timestamp (4 bytes) and four integers (8 each).
    row = 4 * (8 + 7 + 10 + 7) + 4 + 4 * 8
    assert found.write_bytes == 19 * row + 2 * FOOTER_BYTES + 19 * 2 * 32 * 32 // 8


def test_the_plan_tells_what_is_done_and_why_the_rest_is_not(tmp_path: Path):
    path = write_suite(tmp_path / "raw", demos=3)
    run_convert(tmp_path / "raw", tmp_path / "out")
    assert planned(tmp_path).idle and "nothing to do" in plan_text([planned(tmp_path)], 1)
    write_raw(path.with_name("new_demo.hdf5"), {0: demo_arrays(9, 7)})
    found = planned(tmp_path)
    assert (found.episodes, found.done_episodes) == (1, 3) and found.why == ("1 have no receipt",)
    import h5py

    with h5py.File(path, "a") as file:
        file["data/demo_1/obs/agentview_rgb"][0] += 1
    found = planned(tmp_path)
    assert found.episodes == 2 and "1 changed since: libero_goal" in found.why[1]


def test_a_pilot_tells_time_and_leaves_nothing(tmp_path: Path):
    write_suite(tmp_path / "raw", demos=3, steps=20)
    before = tree_digest(tmp_path)
    found = planned(tmp_path, pilot=True)
    assert found.seconds is not None and 0 < found.seconds < 60 and "by 1 episodes, 19 frames" in found.pilot
    assert tree_digest(tmp_path) == before


@pytest.mark.parametrize(("long_s", "times"), [(0.0, 1), (1e9, 2)])
def test_a_long_episode_is_tried_once_a_short_one_to_get_warm_too(tmp_path, monkeypatch, long_s, times):
    write_suite(tmp_path / "raw", demos=1, steps=20)
    tried = []
    encode = payload.encode_episode
    monkeypatch.setattr(payload, "encode_episode", lambda job: tried.append(job) or encode(job))
    monkeypatch.setattr(plan, "PILOT_S", long_s)
    assert "by 1 episodes, 19 frames" in planned(tmp_path, pilot=True).pilot
    assert len(tried) == times


def test_targets_are_planned_part_by_part(tmp_path: Path):
    root = write_tiny(tmp_path / "set", [(0, 12), (1, 9)], parts=[1, 1])
    before = tree_digest(root)
    (first,) = plan_targets(root, ["fast"], {}, None)
    assert (first.episodes, first.frames, first.why) == (2, 21, ("it does not exist yet",))
    assert tree_digest(root) == before
    precompute(root, ["fast"])
    (done,) = plan_targets(root, ["fast"], {}, None)
    assert done.idle and done.done_episodes == 2


def test_what_cannot_fit_the_disk_is_refused_with_the_numbers(tmp_path: Path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3_000_000}))
    require_disk([step(makes=str(tmp_path / "a"), write_bytes=1_000_000)] * 3)
    with pytest.raises(
        DataError, match=r"4 MB are to be written and 3 MB are free at .*\n    convert x: 1 MB"
    ):
        require_disk([step(makes=str(tmp_path / "a"), write_bytes=1_000_000)] * 4)


@pytest.mark.parametrize("large", [{"write_bytes": 51 * 10**9}, {"seconds": 2 * 3601.0}])
def test_large_or_long_work_is_asked_for_on_a_terminal_and_refused_elsewhere(large):
    steps = [step(**large)]
    assert "Cheaper: --resize WxH" in refuse_or_ask(steps, 2, yes=False, terminal=True)
    assert refuse_or_ask(steps, 2, yes=True, terminal=False) == ""
    with pytest.raises(UsageError, match=r"convert x: .*Cheaper: --resize WxH[\s\S]*--yes"):
        refuse_or_ask(steps, 2, yes=False, terminal=False)
    assert question([step(write_bytes=49 * 10**9, seconds=2 * 3599.0)], 2) == ""


def test_every_command_plans_with_its_price(tmp_path: Path):
    write_suite(tmp_path / "raw" / "libero", demos=2)
    before = tree_digest(tmp_path)

    def told(*words: str) -> dict:
        done = subprocess.run(
            [DPIPE, *words, "--workspace", tmp_path, "--json", "--price", "36", "--workers", "1"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    plan = told("convert", "libero", "--dry-run")
    assert [s["name"] for s in plan["steps"]] == ["convert libero"]
    assert plan["cost"] == pytest.approx(plan["core_seconds"] / 100) and plan["cost"] > 0
    ahead = told("plan", "precompute", "tokens")["steps"]
    assert [s["name"] for s in ahead] == ["convert libero", "precompute tokens"]
    assert ahead[1]["why"] == ["the dataset does not exist yet"]
    assert tree_digest(tmp_path) == before
    assert (
        subprocess.run([DPIPE, "convert", "libero", "--workspace", tmp_path, "--workers", "0"]).returncode
        == 0
    )
    after = tree_digest(tmp_path)
    assert told("convert", "libero", "--dry-run")["steps"][0]["episodes"] == 0
    names = [s["name"] for s in told("train", "libra", "--dry-run")["steps"]]
    assert names == ["precompute tokens", "precompute shards", "train libra"]
    assert tree_digest(tmp_path) == after
