"""`dpipe precompute` as it is typed: what stages cost here, and a policy trained where a stage lacks one."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dpipe.cli import cli
from dpipe.commands import precompute as command
from dpipe.pipeline import plan
from dpipe.schemas.errors import UsageError
from dpipe.schemas.statistics import fit_statistics
from dpipe.stages import STAGES
from tiny_dataset import episode_columns, write_tiny

torch = pytest.importorskip("torch")

from dpipe.trainer import embedded, pfd

EPISODES = [(0, 24), (1, 20)]
FRAMES = 44


@pytest.fixture
def space(tmp_path) -> Path:
    """A workspace with one small dataset."""
    root = write_tiny(tmp_path / "lerobot" / "set", EPISODES, camera=True)
    columns = [episode_columns(*episode) for episode in EPISODES]
    stats = {
        name: {
            key: np.asarray(value).tolist()
            for key, value in fit_statistics(np.concatenate([c[name] for c in columns])).items()
        }
        for name in ("observation.state", "action")
    }
    (root / "meta/stats.json").write_text(json.dumps(stats))
    return tmp_path


def dpipe(space: Path, *words: str) -> str:
    return CliRunner().invoke(cli, [*words, "--workspace", str(space)], catch_exceptions=False).stdout


def test_without_a_stage_every_stage_is_listed_with_its_cost_and_its_recipe(space):
    (told,) = [json.loads(line) for line in dpipe(space, "precompute", "--json").splitlines()]
    costs = {cost["stage"]: cost for cost in told["stages"]}
    assert list(costs) == list(STAGES) and not any(cost["needs"] for cost in told["stages"])
    assert costs["foresight"]["bytes"] == FRAMES * 64 * 32 * 2
    # the embedded teacher: 3 states of 128, their mask, and 3 actions of 4 dimensions
    assert costs["teacher"]["bytes"] == FRAMES * (3 * 128 * 2 + 3 + 3 * 4 * 2)
    assert costs["teacher"]["recipes"] == ["vita"] and costs["teacher"]["seconds"] > 0
    assert costs["stats"]["bytes"] == 0 and costs["shards"]["bytes"] > FRAMES * 8 * 4
    lines = dpipe(space, "precompute").splitlines()
    assert lines[0] == f"set: 2 episodes, {FRAMES} frames"
    assert any("first: dpipe train teacher" in line for line in lines)
    assert any(line.split()[:3] == ["foresight", "180", "kB"] and " dial " in line for line in lines)
    assert not (space / "runs").exists() and not (space / "lerobot/set/dpipe/targets").exists()


def test_without_a_dataset_the_stages_are_listed_all_the_same(tmp_path):
    told = dpipe(tmp_path, "precompute")
    assert all(stage in told for stage in STAGES)


def refused(space: Path, *words: str) -> str:
    with pytest.raises(UsageError) as told:
        dpipe(space, *words)
    return str(told.value)


def test_more_than_an_hour_or_50_gb_is_refused_where_nobody_can_be_asked(space, monkeypatch):
    monkeypatch.setattr(command, "PROBED_ABOVE_FRAMES", FRAMES - 1)
    made = space / "lerobot/set/dpipe/targets"
    assert "2 episodes computed now" in dpipe(space, "precompute", "stats")  # probed, small, made unasked
    monkeypatch.setattr(plan, "ASK_BYTES", FRAMES * 64 * 32 * 2 - 1)
    told = refused(space, "precompute", "foresight")
    assert told.startswith("precompute foresight: 180 kB and about") and "Cheaper: pool tokens" in told
    assert "--yes" in told and not (made / "foresight").exists()
    told = refused(space, "train", "dial", "--steps", "1", "--frames", "video")
    assert told.startswith("precompute foresight: 180 kB") and not (made / "foresight").exists()
    assert "2 episodes computed now" in dpipe(space, "precompute", "foresight", "--yes")
    monkeypatch.setattr(plan, "ASK_S", 0.0)
    assert "Cheaper" in refused(space, "precompute", "tokens") and not (made / "tokens").exists()


def test_a_small_dataset_is_not_probed_before_it_is_worked_on_unless_a_real_model_is_named(
    space, monkeypatch
):
    probed: list[str] = []
    monkeypatch.setattr(command, "plan_dataset", lambda space, root, stages, *_: probed.extend(stages) or [])
    monkeypatch.setattr(command, "PROBED_ABOVE_NAMED", FRAMES - 1)
    dpipe(space, "precompute", "stats")
    assert probed == []
    with pytest.raises(UsageError):
        dpipe(space, "precompute", "foresight", "--tower", "hf:nowhere")
    assert probed == ["foresight"]


def test_more_workers_do_not_shorten_a_models_forward_pass():
    step = plan.Step("a", "", "", 1, 1, 0, (), 0, 0, 0, seconds=8000.0)
    assert (step.wall(4), dataclasses.replace(step, one_process=True).wall(4)) == (2000.0, 8000.0)
    assert not plan.question([step], 4)
    assert "2.2 h" in plan.question([dataclasses.replace(step, one_process=True)], 4)


@pytest.mark.slow
def test_a_policy_nobody_has_trained_is_trained_first_and_once(space, monkeypatch):
    monkeypatch.setattr(embedded, "TEACHER", dataclasses.replace(embedded.TEACHER, steps=2))
    monkeypatch.setattr(pfd, "FLOW", dataclasses.replace(pfd.FLOW, steps=2))
    with pytest.raises(UsageError, match="dpipe train teacher"):
        dpipe(space, "precompute", "teacher", "--no-deps")
    told = dpipe(space, "precompute", "teacher", "privileged", "--draws", "2")
    assert "2 episodes computed now" in told
    for recipe in ("teacher", "flow"):
        assert (space / "runs" / recipe / "set" / "result.json").is_file()
    for stage in ("teacher", "privileged"):
        (contract,) = (space / "lerobot/set/dpipe/targets" / stage).glob("*/contract.json")
        assert json.loads(contract.read_text())["contract"]["model"].startswith("embedded:")
    again = dpipe(space, "precompute", "teacher")
    assert "0 episodes computed now" in again and "steps" not in again
