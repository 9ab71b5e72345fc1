"""An exported policy behind LeRobot's interface acts as it does in our own rollouts."""

# ruff: noqa: E402 - what needs torch and lerobot is imported once they are known to be there
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.errors import UsageError
from test_trainer_run import OPTIONS, make_dataset, quiet
from tiny_dataset import CAMERA

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from dpipe.streams.rows import Fit
from dpipe.trainer.export import export_policy
from dpipe.trainer.run import open_run, train

SMALL = {"width": 32, "heads": 2, "points": 2}
TEXT = "task 0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    root = make_dataset(home / "set")
    stages = {"tokens": {"probe": "none"}, "foresight": {"pool": 2, "at": 4, "limit": 10.0}}
    precompute(root, list(stages), stages)
    configs = {
        "libra": {"chunk": 3, "slices": 2},
        "dial": {"horizon": 4, "execute": 2},
        "anchor": {"chunk": 4},
    }
    for recipe, config in configs.items():
        options = OPTIONS | {"ema": 0.5}
        train(recipe, root, home / recipe, steps=2, config=config | SMALL, options=options, say=quiet)
    return {recipe: home / recipe for recipe in configs}


def observation(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return rng.integers(0, 256, (96, 80, 3), np.uint8), rng.normal(size=4).astype(np.float32)


def our_actions(run_dir: Path, steps: int) -> list[np.ndarray]:
    """Our own rollout: frames fitted as in training, two episodes."""
    opened = open_run(run_dir)
    policy = opened.recipe.policy(opened.model, 0)
    fit = Fit(opened.recipe.spec(opened.config, opened.space, opened.facts).size)
    actions = []
    for step in range(steps):
        if step % 5 == 0:
            policy.reset()
        frame, state = observation(step)
        fitted = np.empty((1, *fit.size, 3), np.uint8)
        fit.apply(frame, fitted[0])
        actions.append(policy.act({CAMERA: fitted}, state[None], [TEXT])[0])
    return actions


SERVED = """
import sys
import numpy as np, torch
import dpipe.trainer.modeling_dpipe
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from test_trainer_export import CAMERA, TEXT, observation

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    policy = get_policy_class("dpipe").from_pretrained(folder, strict=True)
    before, after = make_pre_post_processors(policy.config, pretrained_path=folder)
    actions = []
    for step in range(9):
        if step % 5 == 0:
            policy.reset()
        frame, state = observation(step)
        pixels = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
        batch = before({CAMERA: pixels, "observation.state": torch.from_numpy(state), "task": TEXT})
        actions.append(after(policy.select_action(batch))[0].numpy())
    np.save(folder + ".npy", np.stack(actions))
"""


def test_lerobot_serves_the_actions_of_our_own_rollouts(runs, tmp_path):
    """In a process of its own, from the folders alone, through lerobot's factory and processors."""
    folders = {recipe: export_policy(run_dir, tmp_path / recipe) for recipe, run_dir in runs.items()}
    script = tmp_path / "serve.py"
    script.write_text(SERVED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(script), *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for recipe, run_dir in runs.items():
        served = np.load(tmp_path / f"{recipe}.npy")
        np.testing.assert_allclose(served, np.stack(our_actions(run_dir, 9)), atol=1e-6, err_msg=recipe)


def test_the_folder_is_lerobots_and_remembers_the_run(runs, tmp_path):
    from lerobot.configs.policies import PreTrainedConfig

    folder = export_policy(runs["libra"], tmp_path / "policy", seed=3)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
    }
    config = PreTrainedConfig.from_pretrained(folder)
    assert config.type == "dpipe" and config.seed == 3
    assert list(config.image_features) == [CAMERA] and config.action_feature.shape == (4,)
    record = json.loads((folder / "dpipe_run.json").read_text())
    assert record["terms"]["recipe"] == "libra" and len(record["terms"]["dataset"]["digest"]) == 32
    with pytest.raises(UsageError, match="is there already"):
        export_policy(runs["libra"], tmp_path / "policy")


def test_a_chunk_is_what_would_be_executed_before_the_next_look_and_training_is_refused(runs, tmp_path):
    from dpipe.trainer.modeling_dpipe import DpipePolicy

    policy = DpipePolicy.from_pretrained(export_policy(runs["libra"], tmp_path / "policy"))
    frame, state = observation(0)
    batch = {
        CAMERA: torch.from_numpy(frame).permute(2, 0, 1)[None] / 255,
        "observation.state": torch.from_numpy(state)[None],
        "task": [TEXT],
    }
    chunk = policy.predict_action_chunk(batch)
    assert chunk.shape == (1, 3, 4)
    again = DpipePolicy.from_pretrained(tmp_path / "policy")
    steps = torch.stack([again.select_action(batch) for _ in range(3)], dim=1)
    torch.testing.assert_close(chunk, steps)
    with pytest.raises(UsageError, match="trained by  dpipe train"):
        policy(batch)
    with pytest.raises(UsageError, match="looks through"):
        policy.select_action({"observation.state": batch["observation.state"]})
