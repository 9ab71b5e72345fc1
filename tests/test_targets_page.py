"""docs/targets.md does what it says: lerobot's own training script runs with its fifteen lines."""

import json
import re
import sys
import types

import numpy as np
import pytest
from conftest import REPOSITORY
from dpipe.pipeline.precompute import precompute
from tiny_dataset import CAMERA, write_tiny

EPISODES = [(0, 30), (1, 25), (2, 20)]


def example(heading: str) -> str:
    page = (REPOSITORY / "docs" / "targets.md").read_text()
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


@pytest.mark.parametrize("heading", ["lerobot", "openpi", "starVLA"])
def test_each_example_has_fifteen_lines_or_fewer(heading):
    assert len([line for line in example(heading).splitlines() if line.strip()]) <= 15


@pytest.fixture
def root(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES, camera=True, size=64)
    made = precompute(root, ["tokens", "stats"], {"tokens": {"probe": "none"}})
    grey = {name: [[[0.5]], [[0.5]], [[0.5]]] for name in ("min", "max", "mean", "std", "q01", "q99")}
    columns = {name: {**table, "count": [75]} for name, table in made[1].report["columns"].items()}
    for table in columns.values():
        table.pop("names"), table.pop("levels")
    (root / "meta/stats.json").write_text(json.dumps({**columns, CAMERA: {**grey, "count": [75]}}))
    return root


@pytest.mark.slow  # lerobot's training script
def test_lerobots_training_script_carries_the_targets(root, tmp_path, monkeypatch):
    pytest.importorskip("lerobot")
    pytest.importorskip("accelerate")
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.scripts import lerobot_train

    seen = []
    forward = ACTPolicy.forward

    def watching(self, batch, *args, **kwargs):
        seen.append({name: np.array(batch[name]) for name in WATCHED})
        return forward(self, batch, *args, **kwargs)

    monkeypatch.setattr(ACTPolicy, "forward", watching)
    monkeypatch.setattr(lerobot_train, "make_train_eval_datasets", lerobot_train.make_train_eval_datasets)
    words = {
        "dataset.repo_id": "local/set",
        "dataset.root": root,
        "output_dir": tmp_path / "out",
        "policy.type": "act",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.chunk_size": 4,
        "policy.n_action_steps": 4,
        "policy.dim_model": 32,
        "policy.dim_feedforward": 32,
        "policy.n_heads": 2,
        "policy.n_encoder_layers": 1,
        "policy.use_vae": "false",
        "policy.pretrained_backbone_weights": "null",
        "batch_size": 4,
        "steps": 2,
        "num_workers": 0,
        "wandb.enable": "false",
        "save_checkpoint": "false",
        "env_eval_freq": 0,
    }
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *(f"--{k}={v}" for k, v in words.items())])
    exec(compile(example("lerobot"), "docs/targets.md", "exec"), {"__name__": "page"})
    assert len(seen) == 2
    for batch in seen:
        assert batch["observation.tokens"].shape == (4, 4, 4)
        np.testing.assert_array_equal(batch["observation.tokens_is_pad"], batch["action_is_pad"])


WATCHED = ("observation.tokens", "observation.tokens_is_pad", "action_is_pad")


class Frames:
    """Stands in for openpi's and starVLA's readers: the calls the examples make, and nothing else."""

    def __init__(self, dataset_path):
        self.dataset_path = dataset_path
        self.places = [(e, t) for e, (_, n) in enumerate(EPISODES) for t in range(n)]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        return {"episode_index": self.places[i][0], "frame_index": self.places[i][1], "state": float(i)}

    def get_step_data(self, trajectory_id, base_index):
        return {"state.x": (trajectory_id, base_index)}

    def _pack_sample(self, data):
        return {"state": data["state.x"]}


def test_openpis_loader_gains_the_targets(root, monkeypatch):
    loader = types.ModuleType("openpi.training.data_loader")
    loader.create_torch_dataset = lambda data_config, action_horizon, model_config: Frames(root)
    _install(monkeypatch, {"openpi": None, "openpi.training": None, "openpi.training.data_loader": loader})
    names = {"ROOT": root, "TARGETS": root / "dpipe/targets"}
    exec(compile(example("openpi"), "docs/targets.md", "exec"), names)
    joined = loader.create_torch_dataset(None, 7, None)
    assert joined[32]["tokens"].shape == (7, 4) and joined[32]["state"] == 32.0


def test_starvlas_reader_gains_the_targets(root, monkeypatch):
    datasets = types.ModuleType("starVLA.dataloader.gr00t_lerobot.datasets")
    datasets.LeRobotSingleDataset = type("LeRobotSingleDataset", (Frames,), dict(Frames.__dict__))
    parents = ["starVLA", "starVLA.dataloader", "starVLA.dataloader.gr00t_lerobot"]
    _install(monkeypatch, {**dict.fromkeys(parents), "starVLA.dataloader.gr00t_lerobot.datasets": datasets})
    exec(compile(example("starVLA"), "docs/targets.md", "exec"), {})
    frames = datasets.LeRobotSingleDataset(root)
    sample = frames._pack_sample(frames.get_step_data(1, 5))
    assert sample["state"] == (1, 5) and sample["tokens"].shape == (16, 4)
    assert sample["tokens_is_pad"].tolist() == [False] * 16


def _install(monkeypatch, modules):
    """Modules by dotted name, each an attribute of its parent."""
    for name, module in modules.items():
        module = module or types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
