"""A run from dataset to policy: every recipe through its own cache, refused early where something differs."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.errors import DataError, Interrupted, UsageError
from dpipe.schemas.statistics import fit_statistics
from dpipe.streams.dataset import open_dataset
from tiny_dataset import CAMERA, episode_columns, write_tiny

torch = pytest.importorskip("torch")

from dpipe.trainer import RECIPES, open_recipe
from dpipe.trainer.recipe import resolve
from dpipe.trainer.run import open_run, space_of, train

EPISODES = [(0, 24), (1, 20), (2, 22)]
SMALL = {"width": 32, "heads": 2, "points": 2}
OPTIONS = {"batch_size": 8, "log_every": 1, "checkpoint_every": 2}
STEPS = 4


def quiet(line: str) -> None: ...


def make_dataset(root: Path, gripper: float = 1.0) -> Path:
    write_tiny(root, EPISODES, camera=True)
    columns = [episode_columns(*episode) for episode in EPISODES]
    stats = {}
    for name in ("observation.state", "action"):
        found = fit_statistics(np.concatenate([column[name] for column in columns]))
        stats[name] = {key: value.tolist() for key, value in found.items()}
    (root / "meta/stats.json").write_text(json.dumps(stats))
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A dataset with every cache, made by policies trained here; runs/<recipe> beside it."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    root = make_dataset(home / "set")
    sizes = {"teacher": {"window": 2}, "anchor": {"chunk": 4}, "flow": {"chunk": 4, "future": (2, 4)}}
    for name, extra in sizes.items():
        run(home, name, home / "runs" / name, extra)
    spec = {name: f"embedded:{home / 'runs' / name / 'policy'}" for name in sizes}
    precompute(
        root,
        ["tokens", "foresight", "teacher", "residuals", "privileged"],
        {
            "tokens": {"probe": "none"},
            "foresight": {"pool": 2, "at": 4, "limit": 10.0},
            "teacher": {"teacher": spec["teacher"]},
            "residuals": {"anchor": (spec["anchor"],)},
            "privileged": {"base": spec["flow"], "draws": 2},
        },
    )
    return home


def run(home: Path, recipe: str, folder: Path, config: dict, root: Path | None = None, **more):
    known = {entry.name for entry in open_recipe(recipe).config.__dataclass_fields__.values()}
    given = {name: value for name, value in SMALL.items() if name in known} | config
    if recipe == "pfd":
        given = {"width": 32, "time_width": 16} | config
    if recipe == "anchorrefine":
        given = {"heads": 2} | config
    return train(
        recipe, root or home / "set", folder, steps=STEPS, config=given, options=OPTIONS, say=quiet, **more
    )


CONFIGS = {
    "libra": {"chunk": 3, "slices": 2},
    "vita": {"fingers": 1},
    "dial": {"horizon": 4, "execute": 2},
    "anchorrefine": {},
    "pfd": {"inputs": "v,t,obs"},
}


@pytest.mark.parametrize("recipe", CONFIGS)
def test_every_recipe_trains_on_its_cache_and_speaks_native_actions(home, recipe):
    folder = home / "runs" / recipe
    result = run(home, recipe, folder, CONFIGS[recipe])
    assert result.steps == STEPS and result.checkpoint.name == "step-000004"
    assert np.isfinite(result.metrics["loss"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    flow = ("wait_share", "decode_share", "cache_hit_share", "samples_per_second", "bytes_per_sample")
    assert {f"stream_{name}" for name in flow} <= set(rows[-1])
    opened = open_run(folder)
    policy = opened.recipe.policy(opened.model, 0)
    frames = {CAMERA: np.zeros((2, 64, 64, 3), np.uint8)}
    actions = [policy.act(frames, np.zeros((2, 4)), ["task 0"] * 2) for _ in range(5)]
    assert np.stack(actions).shape == (5, 2, 4) and np.isfinite(actions).all()
    assert set(np.unique(np.stack(actions)[..., 3])) <= {-1.0, 1.0} or recipe in ("dial", "pfd", "libra")


def test_every_recipe_is_listed_and_opens_under_its_name():
    assert {open_recipe(name).name for name in RECIPES} == set(RECIPES)
    with pytest.raises(UsageError, match="Did you mean 'libra'"):
        open_recipe("libr")


def test_a_run_records_what_it_was_made_of(home):
    told = json.loads((home / "runs/anchor/config.json").read_text())
    terms = told["terms"]
    assert terms["recipe"] == "anchor" and terms["config"]["chunk"] == 4
    assert terms["dataset"]["episodes"] == 3 and len(terms["dataset"]["digest"]) == 32
    assert set(told) >= {"terms", "commit", "contracts", "torch", "threads"}
    assert (home / "runs/anchor/policy/policy.json").is_file()


def test_the_same_call_over_a_finished_run_changes_nothing_and_another_is_refused_by_name(home):
    folder = home / "runs/anchor"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run(home, "anchor", folder, {"chunk": 4})
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"config.chunk: 4 there, 5 now(.|\n)*--name NEW"):
        run(home, "anchor", folder, {"chunk": 5})


def test_a_run_stopped_and_started_again_ends_with_the_same_weights(home, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(home, "libra", whole, CONFIGS["libra"])
    with pytest.raises(Interrupted):
        run(home, "libra", parts, CONFIGS["libra"], stop_after=3)
    assert not (parts / "result.json").is_file()
    assert run(home, "libra", parts, CONFIGS["libra"]).resumed
    weights = [
        (folder / "checkpoints/step-000004/model.safetensors").read_bytes() for folder in (whole, parts)
    ]
    assert weights[0] == weights[1]


def test_a_run_killed_in_mid_training_ends_at_the_weights_of_an_undisturbed_one(home, tmp_path):
    """SIGKILL to a process of its own, streams, targets, average and curriculum included; then the same command."""
    steps, words = 90, ["chunk=3", "slices=2", "min_steps=10", "tau=0.01", "batch_size=8", "ema=0.9"]
    words += [*(f"{name}={value}" for name, value in SMALL.items()), "log_every=1", "checkpoint_every=3"]
    command = [sys.executable, "-m", "dpipe.trainer", "libra", str(home / "set")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def launch(run_dir: Path) -> subprocess.Popen:
        given = [*command, str(run_dir), "--steps", str(steps), "--track", "none", *words]
        return subprocess.Popen(given, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = launch(killed)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints/step-000012").is_dir() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    stopped = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()][-1]
    assert 12 <= stopped < steps
    for run_dir in (killed, whole):
        assert launch(run_dir).wait() == 0
    for file in ("model.safetensors", "ema.safetensors"):
        left, right = ((d / f"checkpoints/step-{steps:06d}" / file).read_bytes() for d in (killed, whole))
        assert left == right
    logs = [(d / "metrics.jsonl").read_text().splitlines() for d in (killed, whole)]
    losses = [[(row["step"], row["loss"]) for row in map(json.loads, log)] for log in logs]
    assert losses[0] == losses[1]


def test_targets_that_are_missing_or_made_for_another_run_stop_it_before_it_starts(home, tmp_path):
    with pytest.raises(DataError, match="no target 'tokens:N=20'"):
        run(home, "libra", tmp_path / "a", {"bins": 20})
    assert not (tmp_path / "a").exists()
    root = tmp_path / "set"
    shutil.copytree(home / "set", root)
    contract = next((root / "dpipe/targets/tokens").glob("*/contract.json"))
    told = json.loads(contract.read_text())
    told["contract"]["fps"] = 99
    contract.write_text(json.dumps(told))
    with pytest.raises(DataError, match=r"fps: expected 10, found 99"):
        run(home, "libra", tmp_path / "b", CONFIGS["libra"], root=root)


def test_a_changed_anchor_is_not_refined_on_anothers_residuals(home, tmp_path):
    policy = home / "runs/anchor/policy"
    kept = (policy / "model.safetensors").read_bytes()
    other = tmp_path / "other"
    run(home, "anchor", other, {"chunk": 4, "gripper_weight": 1.0})
    try:
        (policy / "model.safetensors").write_bytes((other / "policy/model.safetensors").read_bytes())
        with pytest.raises(DataError, match="not the one the residuals were made with"):
            run(home, "anchorrefine", tmp_path / "run", {})
    finally:
        (policy / "model.safetensors").write_bytes(kept)


def test_statistics_that_a_dataset_lacks_are_computed(tmp_path):
    root = write_tiny(tmp_path / "bare", EPISODES)
    columns = [episode_columns(*episode) for episode in EPISODES]
    state = np.concatenate([column["observation.state"] for column in columns])
    for told in ({}, {"observation.state": {"mean": [0.0]}, "action": {"mean": [0.0]}}):
        (root / "meta/stats.json").write_text(json.dumps(told))
        space = space_of(open_dataset(root))
        assert np.allclose(space.state_mean, state.mean(axis=0)) and np.allclose(
            space.state_std, state.std(axis=0)
        )
        assert len(space.action.low) == 4 and space.action.low[0] < space.action.high[0]


def test_options_may_come_as_words_and_unknown_ones_are_named():
    recipe = open_recipe("flow")
    assert resolve("flow", recipe.config, {"future": "4,8", "peek": "0.25"}).future == (4, 8)
    with pytest.raises(UsageError, match="Did you mean 'chunk'"):
        resolve("flow", recipe.config, {"chunks": "3"})
    with pytest.raises(UsageError, match="'many' is not int"):
        resolve("flow", recipe.config, {"chunk": "many"})
