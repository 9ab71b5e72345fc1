"""Two processes see what one sees: the same samples per global batch, each once, and the same losses."""

# ruff: noqa: E402 - what needs torch is imported once torch is known to be there
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dpipe.pipeline.precompute import precompute
from dpipe.schemas.errors import UsageError
from dpipe.schemas.statistics import fit_statistics
from pages import free_port
from tiny_dataset import episode_columns, write_tiny

torch = pytest.importorskip("torch")

from dpipe.streams.stream import StreamSpec, open_stream
from dpipe.trainer.__main__ import divide

EPISODES = [(seed, 17 + seed) for seed in range(6)]  # lengths that no batch divides: padding differs by rank
WORDS = ["chunk=3", "slices=2", "width=32", "heads=2", "points=2", "batch_size=16", "log_every=1", "lr=0.001"]
STEPS = 8


def make_dataset(root: Path) -> Path:
    write_tiny(root, EPISODES, camera=True)
    columns = [episode_columns(*episode) for episode in EPISODES]
    stats = {
        name: {k: v.tolist() for k, v in fit_statistics(np.concatenate([c[name] for c in columns])).items()}
        for name in ("observation.state", "action")
    }
    (root / "meta/stats.json").write_text(json.dumps(stats))
    precompute(root, ["tokens"], {"tokens": {"probe": "none"}})
    return root


def launch(root: Path, run: Path, processes: int, words: list[str]) -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "dpipe.trainer",
        "libra",
        str(root),
        str(run),
        *("--steps", str(STEPS), "--track", "none"),
        *words,
    ]
    if processes > 1:
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", str(free_port()), "-m", "dpipe.trainer", *command[3:]),
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_have_the_losses_of_one_and_end_at_the_same_weights(tmp_path):
    from safetensors.torch import load_file

    root = make_dataset(tmp_path / "set")
    alone = launch(root, tmp_path / "one", 1, WORDS)
    pair = launch(root, tmp_path / "two", 2, WORDS)
    assert [row["step"] for row in alone] == [row["step"] for row in pair] == list(range(1, STEPS + 1))
    for one, two in zip(alone, pair, strict=True):
        for name in {"loss", "accuracy", "plan", "diffusion", "waypoint"} & set(one):  # as the phase has them
            assert one[name] == pytest.approx(two[name], abs=1e-4), (name, one["step"])
    name = f"checkpoints/step-{STEPS:06d}/model.safetensors"
    weights = [load_file(tmp_path / run / name) for run in ("one", "two")]
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], atol=1e-4, rtol=1e-3)


def test_two_processes_share_out_every_global_batch_of_one_and_see_each_sample_once(tmp_path):
    root = write_tiny(tmp_path / "set", EPISODES)
    frames = sum(length for _, length in EPISODES)

    def batches(rank: int, world: int) -> np.ndarray:
        stream = open_stream(
            root, StreamSpec(cameras=()), batch_size=16 // world, seed=3, rank=rank, world=world
        )
        endless = stream.endless()
        return np.stack([next(endless)["index"] for _ in range(3 * frames // 16 + 1)])

    whole = batches(0, 1)
    shared = np.stack([batches(rank, 2) for rank in (0, 1)], axis=2)
    np.testing.assert_array_equal(shared.reshape(whole.shape), whole)
    for epoch in range(3):
        seen = whole.ravel()[epoch * frames : (epoch + 1) * frames]
        assert sorted(seen) == list(range(frames))


def test_words_are_sorted_into_the_recipes_options_and_the_loops():
    config, options = divide("libra", ["bins=20", "batch-size=32", "chunk=4"])
    assert config == {"bins": "20", "chunk": "4"} and options == {"batch_size": "32"}
    with pytest.raises(UsageError, match="'bins' is not name=value"):
        divide("libra", ["bins"])
