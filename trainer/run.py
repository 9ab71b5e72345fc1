"""One training run: a dataset, a recipe and a folder become a policy.

    result = train("libra", Path("lerobot/libero"), Path("runs/libra/libero"), steps=2000)

Files of a run, beside those of `loop.py`
    config.json   recipe, config, options, space, dataset, targets' contracts, git commit: written first
    result.json   steps, last metrics, checkpoint: written last, so its presence means complete

The same call over an unfinished run goes on with it; over a finished one it changes nothing. Other options
over either are refused by name.
"""

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.backbones import checkpoint_digests
from ..models.vlm import words_of
from ..schemas.contract import digest_of, plain
from ..schemas.errors import DataError, UsageError
from ..schemas.normalisers import DEFAULT_MODE, Normaliser, make_normaliser
from ..streams.dataset import Dataset, contents_digest, open_dataset
from ..streams.statistics import statistics_of
from ..streams.stream import open_stream
from ..streams.targets import Targets, open_targets
from . import open_recipe
from .loop import (
    Options,
    Phase,
    Say,
    fit,
    load_checkpoint,
    load_own_state,
    make_accelerator,
    write_atomically,
)
from .presets import preset_of
from .recipe import Recipe, TargetFolder, resolve
from .space import IMAGE, STATE, Space, to_tensors

RESULT_VERSION = 1
TASKS_KEPT = 100  # instructions kept in config.json


@dataclass(frozen=True)
class Result:
    """What a finished run says of itself."""

    run_dir: Path
    recipe: str
    steps: int
    metrics: Mapping[str, float]
    checkpoint: Path
    resumed: bool

    @property
    def message(self) -> str:
        told = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"{self.recipe}: {self.steps} steps, {told}\n  {self.checkpoint}"


def train(
    recipe: str,
    dataset_root: Path,
    run_dir: Path,
    *,
    steps: int | None = None,
    config: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    split: str = "train",
    targets: Path | None = None,
    frames: str = "auto",
    say: Say = print,
    stop_after: int | None = None,
    preset: str = "",
    track: Sequence[str] = (),
    only: Sequence[int] | None = None,
    max_time_s: float | None = None,
) -> Result:
    """Train `recipe` on a dataset; see the module text for what lies in `run_dir` afterwards.

    `config` and `options` override the recipe's `Config` and the loop's `Options` by name (values or words), and
    both go before a `preset`'s (`presets.py`).
    `targets` is the folder of targets where it is not the dataset's own; `frames` as for `open_stream`.
    `stop_after` leaves after so many steps of this call, `max_time_s` after so many seconds, both with
    `Interrupted`. `track`: see `track.py`. `only` are the episodes to learn from, out of those of the split.
    """
    made, named = open_recipe(recipe), preset_of(recipe, preset)
    resolved = resolve(recipe, made.config, {**named.config, **(config or {})})
    chosen = resolve("train", Options, {**given(made.options), **named.options, **(options or {})})
    dataset = open_dataset(dataset_root)
    supervision = _targets(made, resolved, dataset, targets)
    folders = target_folders(supervision)
    space = space_of(dataset, folders)
    facts = made.facts(resolved, folders)
    spec = made.spec(resolved, space, facts)
    episodes = _episodes(made, resolved, dataset, split, only)

    def open_batches(phase: Phase, rank: int, world: int) -> "SupervisedBatches":
        share = chosen.batch_size // (world * chosen.accumulate)
        stream = open_stream(
            dataset,
            spec,
            split,
            share,
            seed=chosen.seed,
            rank=rank,
            world=world,
            frames=frames,
            episodes=episodes,
        )
        if rank == 0:
            say(f"stream: {stream.describe()}")
        return SupervisedBatches(
            stream.endless(),
            lambda index: made.join(resolved, supervision, index) if supervision.names else {},
        )

    whole = Made(
        recipe=made,
        config=resolved,
        options=chosen,
        steps=steps or named.steps or made.steps,
        space=space,
        facts=facts,
        start=folders,
        open_batches=open_batches,
        terms={
            "split": split,
            "dataset": dataset_digest(dataset),
            "targets": {name: contract.digest for name, contract in supervision.contracts.items()},
            **({} if only is None else {"only": digest_of(sorted(only))}),
        },
        provenance={
            "dataset_root": str(dataset.root),
            **({"renamed": dataset.stored} if dataset.stored else {}),
            "tasks": dataset.tasks[:TASKS_KEPT],  # for whoever must know what the policy was told
            "contracts": {name: contract.to_json() for name, contract in supervision.contracts.items()},
        },
    )
    return carry_out(whole, run_dir, say, stop_after, track, max_time_s)


@dataclass(frozen=True)
class Made:
    """A run before its first step: the recipe and its settings, what it learns from, what is recorded of both."""

    recipe: Recipe
    config: Any
    options: Options
    steps: int
    space: Space
    facts: Mapping[str, Any]
    start: Mapping[str, TargetFolder]
    open_batches: Callable[[Phase, int, int], "SupervisedBatches"]
    terms: Mapping[str, Any]  # of the data; those of the recipe are added
    provenance: Mapping[str, Any]


def carry_out(
    made: Made,
    run_dir: Path,
    say: Say = print,
    stop_after: int | None = None,
    track: Sequence[str] = (),
    max_time_s: float | None = None,
) -> Result:
    """Train what was made ready, or find it trained; the run's files are written here."""
    terms = {
        "recipe": made.recipe.name,
        "steps": made.steps,
        "config": dataclasses.asdict(made.config),
        "options": dataclasses.asdict(made.options),
        "space": made.space.to_json(),
        "facts": made.facts,
        **made.terms,
    }
    if backbones := checkpoint_digests(terms["config"]):
        terms["backbones"] = backbones
    accelerator = make_accelerator(made.options)
    _settle_terms(run_dir, terms, made.provenance, accelerator.is_main_process)
    done = finished(run_dir)
    if done is not None:
        return done

    torch.manual_seed(made.options.seed)
    model = made.recipe.build(made.config, made.space, made.facts)
    made.recipe.start(model, made.start)
    words = words_of(model)
    resumed = load_checkpoint(run_dir / "checkpoints") is not None
    begin = time.monotonic()
    metrics = fit(
        model,
        made.open_batches,
        made.recipe.phases(made.config, made.steps),
        made.options,
        run_dir,
        lambda batch, device: to_tensors(batch, made.space, device, words),
        say,
        accelerator,
        stop_after,
        track,
        max_time_s,
    )
    saved = load_checkpoint(run_dir / "checkpoints")
    assert saved is not None
    if accelerator.is_main_process:
        made.recipe.finish(open_run(run_dir).model, run_dir, plain(terms))
        result = {
            "dpipe": RESULT_VERSION,
            "recipe": made.recipe.name,
            "steps": made.steps,
            "metrics": metrics or _last_metrics(run_dir),
            "checkpoint": saved.folder.name,
            "seconds": round(time.monotonic() - begin, 1),
        }
        write_atomically(run_dir / "result.json", json.dumps(result, indent=1) + "\n")
    accelerator.wait_for_everyone()
    result = finished(run_dir)
    assert result is not None
    return dataclasses.replace(result, resumed=resumed)


class SupervisedBatches:
    """A stream's batches with their targets looked up by row."""

    def __init__(self, batches: Any, targets: Callable[[np.ndarray], Mapping[str, Any]]) -> None:
        self._batches, self._targets = batches, targets

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        return {**batch, **self._targets(batch["index"])}

    def health(self) -> dict[str, float]:
        """What the stream did since the last reading: see `streams/health.py`."""
        return self._batches.health.read()

    def state_dict(self) -> dict[str, Any]:
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state)


# -- what a run is made of --------------------------------------------------------------------------------


def target_folders(targets: Targets) -> dict[str, TargetFolder]:
    """By stage: the folder of each target opened (the first, where a merged dataset has several)."""
    found: dict[str, TargetFolder] = {}
    for column in targets.columns:
        folder = column.folders[0]
        path = folder.path / "prepared.json"
        facts = json.loads(path.read_text()).get("facts", {}) if path.is_file() else {}
        found[column.request.stage] = TargetFolder(folder.path, folder.contract, facts)
    return found


def space_of(dataset: Dataset, targets: Mapping[str, TargetFolder] | None = None) -> Space:
    """What a policy of this dataset sees and does; actions are scaled as its targets were, if it has any."""
    for column in (STATE, "action"):
        if column not in dataset.vectors:
            raise DataError(
                f"{dataset.root} has no column '{column}'\n  found: {', '.join(dataset.vectors)}\n"
                "  A policy needs both what the robot feels and what it is told to do."
            )
    names = dataset.names("action")
    conventions = (dataset.manifest or {}).get("conventions", {})
    gripper = conventions.get("gripper_action")
    meanings = gripper if isinstance(gripper, Mapping) else {}  # hands have none, and say so in words
    means = next((word for word, value in meanings.items() if value == 1), "")
    told = statistics_of(dataset, STATE)
    state = {name: np.asarray(told[name], np.float64).reshape(-1) for name in ("mean", "std")}
    return Space(
        cameras=tuple(name for name in dataset.cameras if name.startswith(IMAGE)),
        state_mean=tuple(state["mean"].tolist()),
        state_std=tuple(state["std"].tolist()),
        action=_action_normaliser(targets)
        or make_normaliser(DEFAULT_MODE, statistics_of(dataset, "action"), names=names),
        fps=dataset.fps,
        action_names=names,
        gripper_one_means=means,
        conventions=dict(conventions),
    )


def _action_normaliser(targets: Mapping[str, TargetFolder] | None) -> Normaliser | None:
    """The normaliser the targets were made under, held to their contract."""
    for folder in (targets or {}).values():
        if folder.contract.normaliser and "normaliser" in folder.facts:
            normaliser = Normaliser.from_json(folder.facts["normaliser"])
            folder.contract.check(str(folder.path), normaliser=normaliser.digest)
            return normaliser
    return None


def _targets(recipe: Recipe, config: Any, dataset: Dataset, folder: Path | None) -> Targets:
    """The recipe's targets, refused before anything runs where they were made for something else."""
    requests, horizon = recipe.targets(config)
    stages = {text.partition(":")[0] for text in requests}
    expect = {stage: {"fps": dataset.fps} for stage in stages}
    return open_targets(dataset, requests, horizon, folder, expect)


def _episodes(
    recipe: Recipe, config: Any, dataset: Dataset, split: str, only: Sequence[int] | None
) -> "np.ndarray | None":
    """Episode numbers of the split that the recipe trains on, of `only` where given; None: it takes them all."""
    if recipe.episodes is None and only is None:
        return None
    every = np.array(dataset.episodes_in(split), dtype=np.int64)
    wanted = np.ones(len(every), bool) if only is None else np.isin(every, np.asarray(only, np.int64))
    if recipe.episodes is not None:
        contents = dataset.contents()
        wanted &= np.array(recipe.episodes(config, [contents[e] for e in every]), dtype=bool)
    if not wanted.any():
        raise UsageError(f"no episode of {dataset.root}, split '{split}', is left to train on")
    return None if wanted.all() else every[wanted]


def dataset_digest(dataset: Dataset) -> dict[str, Any]:
    """Which data a run saw: the name, its size and a digest over the contents of its episodes."""
    digest = contents_digest(dataset.contents())
    return {"name": dataset.name, "episodes": len(dataset), "frames": dataset.total_frames, "digest": digest}


def _settle_terms(run_dir: Path, terms: Mapping[str, Any], provenance: Mapping[str, Any], main: bool) -> None:
    """Write config.json, or hold what is there to the same terms."""
    path = run_dir / "config.json"
    terms = plain(terms)
    if path.is_file():
        found = json.loads(path.read_text())["terms"]
        differs = list(_differences(found, terms))
        if differs:
            raise UsageError(
                f"{run_dir} holds a run of other terms\n  " + "\n  ".join(differs) + "\n"
                "  Give the new run a name of its own:  --name NEW"
            )
        return
    if not main:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {
        "terms": terms,
        **provenance,
        "commit": git_commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_atomically(path, json.dumps(plain(record), indent=1) + "\n")


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Every entry that differs, as `config.bins: 10 there, 20 now`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        inner = [
            _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key) for key in keys
        ]
        return [line for lines in inner for line in lines]
    return [] if found == wanted else [f"{name}: {found} there, {wanted} now"]


def given(options: Options) -> dict[str, Any]:
    return {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(options)}


def git_commit() -> str:
    """The commit this package stands at, with "+" where files differ from it; "" outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return ""


def finished(run_dir: Path) -> Result | None:
    """The result of a complete run, None where there is none."""
    path = run_dir / "result.json"
    if not path.is_file():
        return None
    told = json.loads(path.read_text())
    folder = run_dir / "checkpoints" / told["checkpoint"]
    return Result(run_dir, told["recipe"], told["steps"], told["metrics"], folder, False)


def _last_metrics(run_dir: Path) -> dict[str, float]:
    """Metrics of the last logged step, for a run killed between its last step and its result."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1]) if lines else {}
    extra = {"step", "phase", "lr", "gradient_norm", "samples_per_second", "data_wait"}
    return {name: value for name, value in row.items() if name not in extra}


# -- reading a run back -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A run opened for use."""

    recipe: Recipe
    config: Any
    space: Space
    facts: Mapping[str, Any]
    model: Any
    provenance: Mapping[str, Any]
    step: int


def open_run(run_dir: Path, device: str = "cpu", averaged: bool = True) -> Trained:
    """The newest checkpoint of a run, finished or not; the weights' average where one was kept."""
    from safetensors.torch import load_file

    path = run_dir / "config.json"
    if not path.is_file():
        raise UsageError(f"no run in {run_dir}\n  expected config.json, written by dpipe train")
    provenance = json.loads(path.read_text())
    terms = provenance["terms"]
    saved = load_checkpoint(run_dir / "checkpoints")
    if saved is None:
        raise DataError(f"{run_dir} has no checkpoint yet\n  Train it first:  dpipe train {terms['recipe']}")
    recipe = open_recipe(terms["recipe"])
    config = resolve(terms["recipe"], recipe.config, terms["config"])
    space = Space.from_json(terms["space"])
    if checkpoint_digests(terms["config"]) != terms.get("backbones", {}):
        raise DataError(
            f"a pretrained backbone of {run_dir} is no longer the one it was trained with\n"
            f"  {', '.join(terms.get('backbones', {}))}: the digest of its weights differs"
        )
    model = recipe.build(config, space, terms["facts"])
    average = saved.folder / "ema.safetensors"
    weights = average if averaged and average.is_file() else saved.folder / "model.safetensors"
    load_own_state(model, load_file(weights), weights)
    if hasattr(model, "restore"):
        model.restore(saved.state["progress"])
    return Trained(recipe, config, space, terms["facts"], model.to(device).eval(), provenance, saved.step)
