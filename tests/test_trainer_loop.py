"""The loop: one step is a function of its number, so a run may be stopped, killed, resumed or shared out."""
# ruff: noqa: E402 - what needs torch is imported once torch is known to be there

import dataclasses
import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import pytest
from dpipe.schemas.errors import Interrupted, UsageError

torch = pytest.importorskip("torch")

from accelerate.state import AcceleratorState
from dpipe.models.blocks import Block
from dpipe.trainer.draws import Draws
from dpipe.trainer.loop import (
    Options,
    Phase,
    WeightAverage,
    any_process,
    fit,
    learning_rate,
    load_checkpoint,
    parameter_groups,
    parse_rates,
    recompute_activations,
    write_atomically,
)
from dpipe.trainer.losses import masked_mean, valid_steps
from dpipe.trainer.memory import MemoryBatches
from dpipe.trainer.track import open_trackers
from pages import free_port
from safetensors.torch import load_file

OPTIONS = Options(batch_size=8, lr=1e-2, log_every=2, checkpoint_every=4, ema=0.9, accumulate=2)
PHASES = [Phase("warm", 6), Phase("main", 10)]


class Line(torch.nn.Module):
    """y = 3 x, learnt with noise on the input; the bias only in the second phase."""

    def __init__(self, drop: float = 0.1) -> None:
        super().__init__()
        self.map = torch.nn.Linear(1, 1)
        self.drop = torch.nn.Dropout(drop)
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


def run(
    folder: Path, options: Options = OPTIONS, stop_after=None, track=(), make=None, drop=0.1, max_time_s=None
):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = (make or Line)(drop)
    columns = {"x": np.linspace(-1, 1, 48, dtype=np.float32)[:, None]}

    def open_batches(phase, rank, world):
        return MemoryBatches(columns, options.batch_size // (world * options.accumulate), 3, rank, world)

    def prepare(batch, device):
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    # Accelerate keeps the precision of its first user; every run here has its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    quiet = lambda line: None  # noqa: E731
    then = {"stop_after": stop_after, "track": track, "max_time_s": max_time_s}
    metrics = fit(model, open_batches, PHASES, options, folder, prepare, quiet, **then)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_the_step_it_is_in_checkpointed(undisturbed, tmp_path, number):
    class Signalled(Line):
        def advance(self, step, metrics):
            if self.count == 4:
                os.kill(os.getpid(), number)
            return super().advance(step, metrics)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after step 5 of 16, checkpointed"):
        run(tmp_path, make=Signalled)
    assert signal.getsignal(number) == before
    run(tmp_path)
    assert_same(weights(tmp_path), weights(undisturbed))


def test_a_run_past_its_time_ends_after_the_step_it_is_in_checkpointed(tmp_path):
    with pytest.raises(Interrupted, match="after step 1 of 16, checkpointed"):
        run(tmp_path, max_time_s=0.0)


def ask_others(rank: int, port: int) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, world_size=2, rank=rank)
    assert any_process(rank == 1, 2, torch.device("cpu"))
    assert not any_process(False, 2, torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_where_one_process_is_asked_to_leave_all_are():
    torch.multiprocessing.spawn(ask_others, (free_port(),), nprocs=2)


def test_the_first_phase_leaves_frozen_parameters_alone(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=6)
    torch.manual_seed(0)
    assert torch.equal(weights(tmp_path)["map.bias"], Line().map.bias)


def test_only_the_newest_checkpoints_are_kept(undisturbed):
    names = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert names == ["latest", "step-000012", "step-000016"]


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_has_the_draws_samples_and_steps_of_the_whole(tmp_path, parts):
    """Weights, averages and logged losses agree to rounding, through both phases."""
    told = []
    for count in (1, parts):
        folder = tmp_path / str(count)
        # The dropout's mask is drawn a part at a time, so it must not take part.
        run(folder, dataclasses.replace(OPTIONS, accumulate=count, log_every=1), drop=0.0)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        told.append(([(row["loss"], row["noise"]) for row in rows], weights(folder), weights(folder, "ema")))
    np.testing.assert_allclose(told[0][0], told[1][0], rtol=2e-5, atol=1e-7)
    for whole, divided in zip(told[0][1:], told[1][1:], strict=True):
        for name in whole:
            torch.testing.assert_close(whole[name], divided[name], rtol=1e-4, atol=1e-6)


def test_the_average_of_weights_follows_its_formula():
    """decay 0.5; kept shares 2/11, 3/12, 4/13, .. until 0.5: weights 1 -> 2 -> 4 by hand."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.5)
    for value, expected in ((2.0, 1 * 2 / 11 + 2 * 9 / 11), (4.0, (20 / 11) * 3 / 12 + 4 * 9 / 12)):
        model.weight.data.fill_(value)
        average.update(model)
        assert average.weights["weight"].item() == pytest.approx(expected, rel=1e-6)
    for _ in range(20):
        average.update(model)
    before = average.weights["weight"].item()
    model.weight.data.fill_(0.0)
    average.update(model)
    assert average.weights["weight"].item() == pytest.approx(before / 2, rel=1e-6)


def stack() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(32, 2), Block(32, 2), Block(32, 2))


def test_recomputed_activations_change_no_gradient_and_are_not_kept():
    tokens, found, kept = torch.randn(2, 16, 32), [], []
    for recompute in (False, True):
        model, count = stack(), 0
        if recompute:
            recompute_activations(model)

        def keep(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens).square().mean()
            kept.append(count)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert kept[1] < kept[0] / 5
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


class Seen(Line):
    """Notes the types its map computes in, phase after phase."""

    def forward(self, batch, draws):
        loss, told = super().forward(batch, draws)
        self.types = [*getattr(self, "types", []), self.map(batch["x"]).dtype]
        return loss, told


@pytest.mark.parametrize(("precision", "type_"), [("bf16", torch.bfloat16), ("auto", torch.float32)])
def test_bf16_is_for_the_products_alone_and_auto_leaves_a_cpu_at_float32(tmp_path, precision, type_):
    if torch.cuda.is_available() and precision == "auto":
        pytest.skip("there is a GPU: auto means bf16 here")
    model, _ = run(tmp_path, dataclasses.replace(OPTIONS, precision=precision), make=Seen)
    assert set(model.types) == {type_} and len(model.types) == 2 * (6 + 10)
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    with pytest.raises(UsageError, match="unknown precision 'fp16'"):
        Options(precision="fp16")


def test_tensorboard_has_the_metrics_of_the_log_and_loses_what_a_resumed_run_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=5, track=("auto",))
    run(tmp_path, track=("tensorboard",))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in shown] == [row["step"] for row in rows]
    np.testing.assert_allclose([value for _, value in shown], [row["loss"] for row in rows], rtol=1e-6)


def test_weights_and_biases_gets_every_row_under_one_id_and_none_needs_nothing(tmp_path, monkeypatch):
    said = []

    class Run:
        log = staticmethod(lambda values, step: said.append((step, values["loss"])))
        finish = staticmethod(lambda: said.append("finish"))

    begun = {}
    spec = importlib.machinery.ModuleSpec("wandb", None)
    fake = types.SimpleNamespace(init=lambda **given: begun.update(given) or Run(), __spec__=spec)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path / "recipe" / "name", track=("wandb", "none"))
    rows = [json.loads(line) for line in (tmp_path / "recipe/name/metrics.jsonl").read_text().splitlines()]
    assert said == [*((row["step"], row["loss"]) for row in rows), "finish"]
    assert begun["id"] == "recipe-name" and begun["resume"] == "allow"
    with pytest.raises(UsageError, match=r"unknown tracker 'tensorbord'.*Did you mean 'tensorboard'"):
        open_trackers(["tensorbord"], tmp_path)


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
    groups = parameter_groups(Line(), 1e-2, 0.01, parse_rates(["map=0.5", "map.weight=0.1"]))
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (pytest.approx(1e-3), 0.01, 1),
        (pytest.approx(5e-3), 0.0, 1),
    ]
    with pytest.raises(UsageError, match=r"unknown module in --rates 'mop'.*Did you mean 'map'"):
        parameter_groups(Line(), 1e-2, 0.01, {"mop": 0.1})
    with pytest.raises(UsageError, match="expected MODULE=FACTOR"):
        parse_rates(["map"])


def test_the_rates_of_a_run_are_those_of_its_options(tmp_path):
    """A module at rate 0 stays where it was; the other learns."""
    options = dataclasses.replace(OPTIONS, rates=("map.weight=0",), weight_decay=0.0)
    model, _ = run(tmp_path, options)
    torch.manual_seed(0)
    begun = Line()
    assert torch.equal(model.map.weight, begun.map.weight)
    assert not torch.equal(model.map.bias, begun.map.bias)


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
