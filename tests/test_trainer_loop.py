"""The loop: one step is a function of its number, so a run may be stopped, killed, resumed or shared out."""
# ruff: noqa: E402 - what needs torch is imported once torch is known to be there

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from dpipe.schemas.errors import Interrupted

torch = pytest.importorskip("torch")

from dpipe.trainer.draws import Draws
from dpipe.trainer.loop import (
    Options,
    Phase,
    fit,
    learning_rate,
    load_checkpoint,
    parameter_groups,
    write_atomically,
)
from dpipe.trainer.losses import masked_mean, valid_steps
from dpipe.trainer.memory import MemoryBatches
from safetensors.torch import load_file

OPTIONS = Options(batch_size=8, lr=1e-2, log_every=2, checkpoint_every=4, ema=0.9, accumulate=2)
PHASES = [Phase("warm", 6), Phase("main", 10)]


class Line(torch.nn.Module):
    """y = 3 x, learnt with noise on the input; the bias only in the second phase."""

    def __init__(self) -> None:
        super().__init__()
        self.map = torch.nn.Linear(1, 1)
        self.drop = torch.nn.Dropout(0.1)
        self.count = 0

    def forward(self, batch, draws):
        x = self.drop(batch["x"] + 0.01 * draws.normal(1))
        loss = ((self.map(x) - 3 * batch["x"]) ** 2).mean()
        return loss, {"noise": draws.uniform(1).mean()}

    def begin(self, phase):
        self.map.bias.requires_grad_(phase.name == "main")

    def advance(self, step, metrics):
        self.count += 1
        return []

    def progress(self):
        return {"count": self.count}

    def restore(self, progress):
        self.count = progress["count"]


def run(folder: Path, options: Options = OPTIONS, stop_after: int | None = None, say=lambda line: None):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Line()
    columns = {"x": np.linspace(-1, 1, 50, dtype=np.float32)[:, None]}

    def open_batches(phase, rank, world):
        return MemoryBatches(columns, options.batch_size // (world * options.accumulate), 3, rank, world)

    def prepare(batch, device):
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    metrics = fit(model, open_batches, PHASES, options, folder, prepare, say, stop_after=stop_after)
    return model, metrics


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder / "checkpoints")
    return load_file(saved.folder / f"{name}.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return folder


@pytest.mark.parametrize("stops", [(1,), (3, 4), (6,), (5, 9)])
def test_a_run_stopped_anywhere_and_resumed_ends_bit_for_bit_where_an_undisturbed_one_does(
    undisturbed, tmp_path, stops
):
    for stop in stops:
        with pytest.raises(Interrupted, match="Run the same command again"):
            run(tmp_path, stop_after=stop)
    model, _ = run(tmp_path)
    assert_same(weights(tmp_path), weights(undisturbed))
    assert_same(weights(tmp_path, "ema"), weights(undisturbed, "ema"))
    assert model.count == 16
    logged = [
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (tmp_path, undisturbed)
    ]
    values = [{row["step"]: (row["loss"], row["noise"], row["phase"]) for row in rows} for rows in logged]
    # A stopped run logs the step it stopped at as well; everything the undisturbed one logged is there, equal.
    assert values[1].items() <= values[0].items()


KILLED = """
import sys, time, dataclasses
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_trainer_loop as loop

class Slow(loop.Line):
    def advance(self, step, metrics):
        time.sleep(0.05)
        return super().advance(step, metrics)

loop.Line = Slow
loop.run(Path({folder!r}))
"""


def test_a_run_killed_in_mid_training_ends_with_the_same_weights(undisturbed, tmp_path):
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    pointer = tmp_path / "checkpoints" / "latest"
    while not pointer.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "checkpoints").step < 16
    run(tmp_path)
    assert_same(weights(tmp_path), weights(undisturbed))


def test_the_first_phase_leaves_frozen_parameters_alone(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=6)
    torch.manual_seed(0)
    assert torch.equal(weights(tmp_path)["map.bias"], Line().map.bias)


def test_only_the_newest_checkpoints_are_kept(undisturbed):
    names = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert names == ["latest", "step-000012", "step-000016"]


def test_accumulated_parts_add_up_to_the_whole_batch():
    """Two halves, each divided by two, have the gradient of the mean."""
    x = torch.arange(8.0)[:, None]
    weight = torch.ones(1, requires_grad=True)
    (weight * x).pow(2).mean().backward()
    whole = weight.grad.clone()
    weight.grad = None
    for half in x.chunk(2):
        ((weight * half).pow(2).mean() / 2).backward()
    torch.testing.assert_close(weight.grad, whole)


def test_each_process_draws_its_rows_of_the_global_batch():
    whole = Draws.of_step(1, 0, 7, 6)
    parts = [Draws.of_step(1, 0, 7, 3, rank=rank, world=2) for rank in (0, 1)]
    for draw in ("normal", "uniform"):
        together = getattr(whole, draw)(2)
        assert torch.equal(torch.stack([getattr(part, draw)(2) for part in parts], 1).flatten(0, 1), together)
    assert not torch.equal(Draws.of_step(1, 0, 8, 6).normal(2), Draws.of_step(1, 0, 7, 6).normal(2))


def test_the_learning_rate_rises_over_the_warm_up_and_falls_along_a_cosine():
    rates = [learning_rate(step, 100, 0.05, "cosine") for step in range(100)]
    np.testing.assert_allclose(rates[:6], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[52] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] < 1e-3
    assert learning_rate(99, 100, 0.05, "constant") == 1.0


def test_vectors_are_not_decayed_and_modules_may_have_rates_of_their_own():
    model = Line()
    model.rates = {"map.weight": 0.1}
    groups = parameter_groups(model, 1e-2, 0.01)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (pytest.approx(1e-3), 0.01, 1),
        (pytest.approx(1e-2), 0.0, 1),
    ]


def test_the_masked_mean_counts_valid_values_only():
    loss = torch.tensor([[1.0, 100.0], [3.0, 5.0]])[..., None]
    valid = valid_steps(torch.tensor([[False, True], [False, False]]))
    assert masked_mean(loss, valid).item() == 3.0
    assert masked_mean(loss, torch.zeros_like(valid)).item() == 0.0


def test_egodex_masks_16_steps_of_18_dimensions():
    """A chunk of 16 frames with 18 of 47 dimensions present weighs 16 x 18 = 288 values."""
    dims = torch.zeros(47, dtype=torch.bool)
    dims[:18] = True
    valid = valid_steps(torch.zeros(1, 16, dtype=torch.bool), dims)
    assert valid.expand(1, 16, 47).sum() == 288


def test_memory_batches_show_every_row_once_per_epoch_and_share_rows_among_processes():
    columns = {"x": np.arange(12)}
    alone = MemoryBatches(columns, 4, seed=1)
    epoch = np.concatenate([next(alone)["x"] for _ in range(3)])
    assert sorted(epoch) == list(range(12))
    pair = [MemoryBatches(columns, 2, seed=1, rank=rank, world=2) for rank in (0, 1)]
    shared = np.concatenate([np.stack([next(part)["x"] for part in pair], 1).ravel() for _ in range(3)])
    np.testing.assert_array_equal(shared, epoch)


def test_an_atomic_write_leaves_no_temporary_file(tmp_path):
    write_atomically(tmp_path / "latest", "one\n")
    write_atomically(tmp_path / "latest", "two\n")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_text() == "two\n"
