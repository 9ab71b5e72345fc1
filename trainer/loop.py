"""The training loop: batches in, weights out, stoppable and resumable at any step.

    for each phase, for each step:   draw -> loss -> backward -> clip -> AdamW -> now and then a checkpoint

A step is a function of (weights, optimiser, seed, step, batch), and the stream's place is kept beside the
weights, so an interrupted run goes on as if nothing had happened: bit for bit on a CPU. Launch it with
`accelerate launch` and each process takes its share of every global batch.

Files of a run
    metrics.jsonl                              one JSON object per logged step
    checkpoints/step-000100/model.safetensors  weights; ema.safetensors beside them where an average is kept
    checkpoints/step-000100/state.pt           optimiser, stream, the recipe's own progress
    checkpoints/latest                         the name of the newest complete one
"""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.backbones import Held, hold_backbones, left_out
from ..schemas.errors import DataError, Interrupted, UsageError, unknown_name
from .draws import Draws, seed_of
from .losses import mean_over_processes
from .track import Tracker, open_trackers

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a run is optimised. The defaults fit every tiny recipe."""

    batch_size: int = 64  # of the whole run, all processes and accumulated parts together
    lr: float = 3e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.05  # of a phase's steps
    schedule: str = "cosine"  # cosine | constant
    clip: float = 1.0
    accumulate: int = 1  # parts a process's batch is computed in, one after the other
    recompute: bool = False  # activations in the backward pass, to save memory (gradient checkpointing)
    precision: str = "auto"  # auto (bf16 on a GPU, float32 on a CPU) | bf16 | float32
    rates: tuple[str, ...] = ()  # learning rates of modules, as factors: planner.encoder=0.1,refiner=0.5
    ema: float = 0.0  # decay of the weights' average; 0: none
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints kept

    def __post_init__(self) -> None:
        for name, known in {
            "schedule": ("cosine", "constant"),
            "precision": ("auto", "bf16", "float32"),
        }.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with an optimiser and a schedule of its own, and a learning rate where it differs."""

    name: str
    steps: int
    lr: float | None = None


class Objective(nn.Module):
    """What the loop asks of a recipe's model: a loss, and four moments at which most have nothing to do."""

    def forward(self, batch: Mapping[str, Any], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and metrics: detached scalars."""
        raise NotImplementedError

    def begin(self, phase: Phase) -> None:
        """Enter a phase: freeze and free parameters here."""

    def advance(self, step: int, metrics: Mapping[str, Tensor]) -> list[str]:
        """After each optimiser step, counted from 1 within the phase; returns lines worth printing."""
        return []

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        return {}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go on from what `progress` gave."""


class Batches(Protocol):
    """An endless stream of batches that can say where it stands."""

    def __next__(self) -> Mapping[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def learning_rate(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Factor of step 0 .. steps - 1: a linear rise over the first `warmup` of them, then a half cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def parse_rates(words: Sequence[str]) -> dict[str, float]:
    """`planner.encoder=0.1` -> factor by prefix, longest first: it counts, and the order given does not."""
    found: dict[str, float] = {}
    for word in words:
        prefix, _, value = word.partition("=")
        try:
            found[prefix] = float(value)
        except ValueError:
            raise UsageError(
                f"--rates '{word}'\n  expected MODULE=FACTOR, e.g. planner.encoder=0.1"
            ) from None
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay: none on vectors (norms, biases, single queries).

    `rates` scale the learning rate of whole modules by the beginning of their parameters' names.
    """
    rates = rates or {}
    names = [name for name, _ in model.named_parameters()]
    for prefix in rates:
        if not any(name.startswith(prefix) for name in names):
            known = sorted({name.split(".")[0] for name in names})
            raise unknown_name("module in --rates", prefix, known)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((value for prefix, value in rates.items() if name.startswith(prefix)), 1.0)
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": lr * rate, "rate": rate, "weight_decay": decay}
        for (rate, decay), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def fit(
    model: Any,
    open_batches: Callable[[Phase, int, int], Batches],
    phases: list[Phase],
    options: Options,
    run_dir: Path,
    prepare: Callable[[Mapping[str, Any], torch.device], Mapping[str, Any]],
    say: Say,
    accelerator: Accelerator | None = None,
    stop_after: int | None = None,
    track: Sequence[str] = (),
    max_time_s: float | None = None,
) -> dict[str, float]:
    """Train `model` (an Objective) through `phases`, resuming from the newest checkpoint; the last metrics.

    `open_batches(phase, rank, world)` gives this process's share of a phase's batches; `prepare` makes tensors
    of a batch. `stop_after` ends the run, checkpointed, after that many steps of this call, `max_time_s` after
    that many seconds. `track` names where metrics go beside metrics.jsonl (see `track.py`).

    A batch computed in parts has the draws, samples and gradient of the whole, up to one thing: a masked mean is
    taken within each part, and the parts count alike however much padding each has.
    """
    accelerator = accelerator or make_accelerator(options)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    if options.batch_size % (world * options.accumulate):
        raise DataError(
            f"a batch of {options.batch_size} does not divide into {world} processes x {options.accumulate} parts\n"
            "  Choose another --batch-size or --accumulate."
        )
    share = options.batch_size // (world * options.accumulate)
    total = sum(phase.steps for phase in phases)
    checkpoints = run_dir / "checkpoints"
    saved = load_checkpoint(checkpoints)
    first = saved.step if saved else 0
    log = None
    if accelerator.is_main_process:
        log = MetricsLog(run_dir / "metrics.jsonl", first, open_trackers(track, run_dir, first))
    model.to(device)
    if options.recompute:
        recompute_activations(model)
    rates = parse_rates(options.rates)
    average = WeightAverage(model, options.ema) if options.ema else None
    if saved:
        saved.into(model, average)
        say(f"resuming at step {first} of {total}")

    last: dict[str, float] = {}
    start = -phases[0].steps  # of the phase, in steps of the run
    with StopSignal(max_time_s) as stop:
        for number, phase in enumerate(phases):
            start += phases[max(0, number - 1)].steps
            if first >= start + phase.steps:
                continue  # finished before
            if saved and first == start:  # between two phases
                model.restore(saved.state["progress"])
            model.begin(phase)
            hold_backbones(model)
            lr = options.lr if phase.lr is None else phase.lr
            optimiser = torch.optim.AdamW(
                parameter_groups(model, lr, options.weight_decay, rates), betas=options.betas, fused=True
            )
            batches = open_batches(phase, rank, world)
            if saved and first > start:
                model.restore(saved.state["progress"])
                optimiser.load_state_dict(saved.state["optimiser"])
                batches.load_state_dict(saved.state["batches"][rank])
            module, optimiser = accelerator.prepare(model, optimiser)
            clock = Clock(options.batch_size)
            for index in range(max(0, first - start), phase.steps):
                factor = learning_rate(index, phase.steps, options.warmup, options.schedule)
                for group in optimiser.param_groups:
                    group["lr"] = lr * group["rate"] * factor
                module.train()
                metrics: dict[str, Tensor] = {}
                for part in range(options.accumulate):
                    with clock.waiting():
                        batch = prepare(next(batches), device)
                    draws = Draws.of_step(
                        options.seed, number, index, share, device, rank, world, part, options.accumulate
                    )
                    # Dropout, where a backbone has it.
                    torch.manual_seed(seed_of(options.seed, number, index, rank, part))
                    partial = part + 1 < options.accumulate
                    with accelerator.no_sync(module) if partial else nullcontext():
                        loss, found = module(batch, draws)
                        accelerator.backward(loss / options.accumulate)
                    for name, value in {"loss": loss.detach(), **found}.items():
                        metrics[name] = metrics.get(name, 0) + value / options.accumulate
                moved = [p for group in optimiser.param_groups for p in group["params"]]
                norm = accelerator.clip_grad_norm_(moved, options.clip)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                if average is not None:
                    average.update(model)
                clock.count()
                news = model.advance(index + 1, metrics)

                step = start + index + 1
                ending = index + 1 == phase.steps
                leaving = any_process(stop.asked, world, device) or (
                    stop_after is not None and step - first >= stop_after
                )
                if step % options.log_every == 0 or ending or leaving:
                    last = {name: float(mean_over_processes(value)) for name, value in metrics.items()}
                    if not math.isfinite(last["loss"]):
                        raise DataError(
                            f"the loss is {last['loss']} at step {step}\n"
                            "  Lower --lr, or look for wild values:  dpipe doctor"
                        )
                    timing = clock.read()
                    news.append(
                        f"{phase.name} {step}/{total}  loss {last['loss']:.4f}  "
                        f"{timing['samples_per_second']:.0f} samples/s  data wait {timing['data_wait']:.1%}"
                    )
                    if log is not None:
                        pace = {"lr": lr * factor, "gradient_norm": float(norm or 0.0)}
                        flow = {f"stream_{name}": value for name, value in read_health(batches).items()}
                        log.write({"step": step, "phase": phase.name, **last, **pace, **timing, **flow})
                if step % options.checkpoint_every == 0 or ending or leaving:
                    places = _gather(batches.state_dict(), world)
                    if accelerator.is_main_process:
                        state = {
                            "step": step,
                            "optimiser": optimiser.state_dict(),
                            "progress": model.progress(),
                            "batches": places,
                            "average": average.updates if average is not None else 0,
                        }
                        save_checkpoint(checkpoints, step, model, average, state, options.keep)
                    accelerator.wait_for_everyone()
                for line in news if accelerator.is_main_process else ():
                    say(line)
                if leaving and step < total:
                    raise Interrupted(
                        f"stopped after step {step} of {total}, checkpointed\n  Run the same command again."
                    )
            accelerator.unwrap_model(module, keep_fp32_wrapper=False)
            # Left marked as prepared, the model would go through the next phase without mixed precision.
            vars(model).pop("_is_accelerate_prepared", None)
            accelerator.free_memory()
    if log is not None:
        log.close()
    return last


def make_accelerator(options: Options) -> Accelerator:
    """Mixed precision keeps weights, sums and the optimiser in float32; bf16 needs no loss scaling."""
    gpu = torch.cuda.is_available()
    half = options.precision == "bf16" or (options.precision == "auto" and gpu)
    return Accelerator(cpu=not gpu, mixed_precision="bf16" if half else "no")


def recompute_activations(model: nn.Module) -> None:
    """Keep each block's input only, and run the block again in the backward pass (gradient checkpointing)."""
    for module in model.modules():
        if isinstance(module, Held):
            module.recompute()
        elif getattr(module, "recomputable", False):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _gather(place: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """Where every process's stream stands, in rank order."""
    if world == 1:
        return [place]
    places: list[Any] = [None] * world
    torch.distributed.all_gather_object(places, place)
    return places


def any_process(asked: bool, world: int, device: torch.device) -> bool:
    """Whether some process is asked to leave: all leave after the same step, or none could save."""
    if world == 1:
        return asked  # and the GPU is not waited for
    return bool(mean_over_processes(torch.tensor(float(asked), device=device)))


def read_health(batches: Batches) -> dict[str, float]:
    """What the stream did since the last reading; nothing where batches come from memory."""
    read = getattr(batches, "health", None)
    return read() if read is not None else {}


class Clock:
    """Samples per second and the share of the time spent waiting for data, since the last reading."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._begin, self._wait, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin

    def count(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        spent = max(1e-9, now - self._begin)
        values = {"samples_per_second": self._steps * self.batch / spent, "data_wait": self._wait / spent}
        self._begin, self._wait, self._steps = now, 0.0, 0
        return values


class StopSignal:
    """SIGINT, SIGTERM, SIGUSR1 (SLURM's warning) or a time limit asks the loop to checkpoint and leave.

    The same signal once more ends it at once.
    """

    def __init__(self, max_time_s: float | None = None) -> None:
        self._signalled = False
        self._ending = math.inf if max_time_s is None else time.monotonic() + max_time_s

    @property
    def asked(self) -> bool:
        return self._signalled or time.monotonic() > self._ending

    def __enter__(self) -> "StopSignal":
        self._before: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever started us handles signals
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self._signalled = True
        signal.signal(number, self._before[number])


class WeightAverage:
    """Exponential average of the weights; the decay rises to its value, so that early steps are forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: value.detach().clone() for name, value in own_state(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in own_state(model).items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - keep)
            else:
                self.weights[name].copy_(value)


# -- files ------------------------------------------------------------------------------------------------


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state a checkpoint holds: all but a pretrained backbone's frozen weights, which stay in its folder."""
    elsewhere = left_out(model)
    return {name: value for name, value in model.state_dict().items() if name not in elsewhere}


def load_own_state(model: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """The inverse; anything else that is missing or unknown is an error."""
    told = model.load_state_dict(state, strict=False)
    missing = sorted(set(told.missing_keys) - left_out(model))
    if missing or told.unexpected_keys:
        raise DataError(
            f"{where} does not fit the model its run describes\n"
            f"  missing: {', '.join(missing[:3]) or '-'}; unknown: {', '.join(told.unexpected_keys[:3]) or '-'}"
        )


class MetricsLog:
    """metrics.jsonl, cut back to the step a resumed run starts from; and the trackers beside it."""

    def __init__(self, path: Path, first: int, trackers: Sequence[Tracker] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= first:
                        kept.append(line + "\n")
                except json.JSONDecodeError:
                    break  # a line cut short by a kill: nothing after it is ours
        path.write_text("".join(kept))
        self._file, self._trackers = path.open("a"), trackers

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(values)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    step: int
    folder: Path
    state: dict[str, Any]

    def into(self, model: nn.Module, average: WeightAverage | None) -> None:
        path = self.folder / "model.safetensors"
        load_own_state(model, load_file(path), path)
        if average is not None:
            average.weights = load_file(self.folder / "ema.safetensors")
            average.updates = self.state["average"]
            device = next(model.parameters()).device
            average.weights = {name: value.to(device) for name, value in average.weights.items()}


def load_checkpoint(checkpoints: Path) -> Saved | None:
    """The newest complete checkpoint, if there is one."""
    pointer = checkpoints / "latest"
    if not pointer.is_file():
        return None
    folder = checkpoints / pointer.read_text().strip()
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return Saved(state["step"], folder, state)


def save_checkpoint(
    checkpoints: Path,
    step: int,
    model: nn.Module,
    average: WeightAverage | None,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write beside, flush to disk, rename; then move the pointer; then drop what is older than the last `keep`."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    name = f"step-{step:06d}"
    beside, folder = checkpoints / f".{name}.tmp", checkpoints / name
    for stale in (beside, folder):  # a folder the pointer does not name was never finished or is done again
        shutil.rmtree(stale, ignore_errors=True)
    beside.mkdir()
    save_file(
        {key: value.contiguous() for key, value in own_state(model).items()}, beside / "model.safetensors"
    )
    if average is not None:
        save_file(average.weights, beside / "ema.safetensors")
    torch.save(state, beside / "state.pt")
    for path in sorted(beside.iterdir()):
        _flush(path)
    beside.rename(folder)
    write_atomically(checkpoints / "latest", name + "\n")
    complete = sorted(path for path in checkpoints.iterdir() if path.name.startswith("step-"))
    for old in complete[:-keep]:
        shutil.rmtree(old)


def write_atomically(path: Path, text: str) -> None:
    """The file is the old text or the new, never a part."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    _flush(beside)
    beside.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
