"""dpipe precompute: datasets to supervision targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import DpipeError, UsageError
from . import load_command
from .completion import complete_dataset, complete_stage
from .convert import default_request, plan_request
from .datasets import find_datasets, targets_folder, unmade_sources
from .options import (
    Execution,
    OwnOptionsCommand,
    agree_to,
    answer,
    running,
    say,
    show_plan,
    show_progress,
)

if TYPE_CHECKING:
    from ..pipeline.costs import StageCost
    from ..pipeline.plan import Step
    from ..pipeline.workspace import Workspace

# Below so many frames the slowest stage takes less than an hour, and nobody need be asked: with our own small
# models, and with real ones at several seconds a frame.
PROBED_ABOVE_FRAMES, PROBED_ABOVE_NAMED = 20_000, 1_000
REAL_MODELS = ("hf:", "lerobot:")
# Stages that run a policy: the option that names it, and the recipe that trains the embedded one.
POLICIES = {
    "teacher": ("teacher", "teacher"),
    "residuals": ("anchor", "anchor"),
    "privileged": ("base", "flow"),
}


class StageCommand(OwnOptionsCommand):
    """`dpipe precompute STAGE...`: the options of the stages named are the command's own."""

    def own_options(self, args: Sequence[str]) -> Iterable[type]:
        from ..stages import STAGES, load_stage

        return [load_stage(word).Params for word in args if word in STAGES]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..stages import STAGES

        with formatter.section("Stages"):
            formatter.write_dl(list(STAGES.items()))


@click.command(cls=StageCommand)
@click.argument("stages", nargs=-1, shell_complete=complete_stage)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    shell_complete=complete_dataset,
    help="Name or folder; may be repeated.  [all of the workspace]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Targets folder, where a dataset is not ours.")
@click.option("--name", default="", help="Name of the target's variant.  [from its options]")
@click.option("--no-deps", is_flag=True, help="Do not convert what is missing.")
@running
def precompute(
    stages: tuple[str, ...],
    datasets: tuple[str, ...],
    out: Path | None,
    name: str,
    no_deps: bool,
    how: Execution,
    **given: Any,
) -> None:
    """Datasets to supervision targets. Without a stage: what each would cost here, and which recipe needs it.

    \b
    dpipe precompute
    dpipe precompute tokens
    dpipe precompute tokens stats --dataset libero
    dpipe precompute tokens --help        the options of one stage
    """
    from dataclasses import fields as fields_of

    from ..stages import load_stage

    space = how.space
    if how.where:
        raise UsageError(
            "targets are of whole datasets: a loader refuses one that lacks episodes\n"
            f'  next: dpipe select DATASET --where "{how.where}" --name PART   and precompute --dataset PART'
        )
    if not stages:
        _list_stages(space, datasets, out, how.as_json)
        return
    for stage in stages:
        load_stage(stage)
    options = {name: value for name, value in given.items() if value is not None}
    params = {
        stage: {
            n: v for n, v in options.items() if n in {f.name for f in fields_of(load_stage(stage).Params)}
        }
        for stage in stages
    }
    if how.dry_run:
        steps = plan_missing(space, datasets, stages, how.as_json)
        for root in find_datasets(how, datasets):
            steps += plan_dataset(space, root, stages, params, out, name)
        show_plan(steps, how.processes, how.price, how.as_json)
        return
    roots = find_datasets(how, datasets, convert_missing=not no_deps)
    agree_to_targets(how, dict.fromkeys(roots, params), out, name)
    for root in roots:
        make_targets(how, root, stages, params, out, name, train_missing=not no_deps)


def plan_missing(space: Workspace, named: Sequence[str], stages: Sequence[str], as_json: bool) -> list[Step]:
    """Conversions that come first, and the stages over what they make."""
    from ..pipeline.plan import plan_targets_ahead

    steps: list[Step] = []
    for word in unmade_sources(space) if not named else ():
        for conversion in plan_request(default_request(space, word), as_json):
            steps += [conversion, *plan_targets_ahead(conversion, stages)]
    return steps


def plan_dataset(
    space: Workspace,
    root: Path,
    stages: Sequence[str],
    params: Mapping[str, Mapping[str, Any]],
    out: Path | None = None,
    name: str = "",
) -> list[Step]:
    """Stages over a dataset that is there; an untrained policy stands in where none is trained yet."""
    import tempfile

    from ..pipeline.plan import plan_targets

    with tempfile.TemporaryDirectory(prefix="dpipe-stand-in-") as folder:
        chosen = {}
        for stage in stages:
            embedded = _embedded(space, root, stage)
            if stage in POLICIES and not embedded:
                embedded = _stand_in(root, stage, Path(folder))
            chosen[stage] = {**embedded, **params.get(stage, {})}
        return plan_targets(root, stages, chosen, out or targets_folder(space, root), name)


def agree_to_targets(
    how: Execution,
    wanted: Mapping[Path, Mapping[str, Mapping[str, Any]]],
    out: Path | None = None,
    name: str = "",
) -> None:
    """Ask before targets of more than 50 GB or an hour; what cannot be so large is not probed for it.

    `wanted`: for each dataset its stages, each with its options.
    """
    steps: list[Step] = []
    for root, params in wanted.items() if not how.yes else ():
        named = [str(value) for own in params.values() for value in own.values()]
        real = any(word in value for value in named for word in REAL_MODELS)
        if params and frames_of(root) > (PROBED_ABOVE_NAMED if real else PROBED_ABOVE_FRAMES):
            steps += plan_dataset(how.space, root, list(params), params, out, name)
    agree_to(steps, how.processes, how.yes)


def frames_of(root: Path) -> int:
    from ..streams.dataset import open_dataset

    return open_dataset(root).total_frames


def make_targets(
    how: Execution,
    root: Path,
    stages: Sequence[str],
    params: Mapping[str, Mapping[str, Any]],
    out: Path | None = None,
    name: str = "",
    train_missing: bool = True,
) -> None:
    """Run stages over one dataset; embedded policies they need are trained first."""
    from ..pipeline.precompute import precompute as run

    space = how.space
    if train_missing:
        _train_policies(how, root, stages, params)
    params = {stage: {**_embedded(space, root, stage), **params.get(stage, {})} for stage in stages}
    made = run(
        root,
        list(stages),
        params,
        how.processes,
        out or targets_folder(space, root),
        show_progress(how.as_json),
        name=name,
        scheduler=how.address,
        max_time_s=how.seconds_left,
    )
    for target in made:
        text = (
            f"{target.stage}: {target.variant} of {root.name}, {target.episodes} episodes, {target.frames} frames, "
            f"{target.bytes / 1e6:.2f} MB in {target.folder}; {target.computed_episodes} episodes computed now"
        )
        facts = {n: v for n, v in vars(target).items() if n != "report"} | {"folder": str(target.folder)}
        answer(facts, text, how.as_json)


def missing_targets(
    space: Workspace, root: Path, recipe: str, configs: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Stages whose targets a recipe asks for, under any of these settings, and the dataset has not.

    With the options its requests imply: tokens for every number of bins at once.
    """
    from ..streams.targets import open_targets
    from ..trainer import open_recipe
    from ..trainer.recipe import resolve

    made, missing = open_recipe(recipe), dict[str, dict[str, Any]]()
    for values in configs:
        config = resolve(recipe, made.config, values)
        for request in made.targets(config)[0]:
            try:
                open_targets(root, [request], 1, targets_folder(space, root))
            except DpipeError:  # not there or not fit: the stage makes it, or says what it lacks
                stage = request.partition(":")[0]
                params = missing.setdefault(stage, {})
                if stage == "tokens":
                    params["bins"] = tuple(sorted({*params.get("bins", ()), config.bins}))
    return missing


def _embedded(space: Workspace, root: Path, stage: str) -> dict[str, Any]:
    """The option that names the embedded policy of a stage, where the workspace has trained one."""
    if stage not in POLICIES:
        return {}
    option, recipe = POLICIES[stage]
    run = space.run(recipe, root.name)
    return {option: f"embedded:{run / 'policy'}"} if (run / "result.json").is_file() else {}


def _train_policies(
    how: Execution, root: Path, stages: Sequence[str], params: Mapping[str, Mapping[str, Any]]
) -> None:
    """Train the embedded policies that the stages run and nobody has named or trained."""
    for stage in stages:
        option, recipe = POLICIES.get(stage, ("", ""))
        if not option or params.get(stage, {}).get(option) or _embedded(how.space, root, stage):
            continue
        say(f"first: dpipe train {recipe} --dataset {root.name}", how.as_json)
        load_command("train").main([recipe, "--dataset", str(root), *how.words()], standalone_mode=False)


# --- the list -----------------------------------------------------------------------------------------------


def _list_stages(space: Workspace, named: Sequence[str], out: Path | None, as_json: bool) -> None:
    """Every stage with its cost for each dataset; the stages alone where there is no dataset yet."""
    import json
    from dataclasses import asdict

    from ..stages import STAGES

    roots = [space.find_dataset(name) for name in named] or space.datasets()
    if not roots:
        if as_json:
            click.echo(json.dumps([{"stage": stage, "summary": text} for stage, text in STAGES.items()]))
            return
        for stage, summary in STAGES.items():
            click.echo(f"{stage:12s} {summary}")
        say(f"What each costs is told once there is a dataset in {space.root / 'lerobot'}.", as_json)
        return
    for root in roots:
        costs = _costs(space, root, out or targets_folder(space, root))
        if as_json:
            click.echo(json.dumps({"dataset": root.name, "stages": [asdict(cost) for cost in costs]}))
        else:
            click.echo("\n".join(_table(space, root, costs)))


def _costs(space: Workspace, root: Path, out: Path | None) -> list[StageCost]:
    """Costs of every stage; where no policy is trained yet, one of its size with random weights stands in."""
    import tempfile

    from ..pipeline.costs import stage_costs

    with tempfile.TemporaryDirectory(prefix="dpipe-stand-in-") as folder:
        params = {
            stage: _embedded(space, root, stage) or _stand_in(root, stage, Path(folder)) for stage in POLICIES
        }
        return stage_costs(root, out, params)


def _stand_in(root: Path, stage: str, folder: Path) -> dict[str, Any]:
    """An untrained policy of the size the recipe would train: what it costs does not depend on what it knows."""
    from ..streams.dataset import open_dataset

    option, recipe = POLICIES[stage]
    try:
        from ..trainer import open_recipe
        from ..trainer.run import space_of

        made = open_recipe(recipe)
        config, space = made.config(), space_of(open_dataset(root))
        terms = {"steps": 0, "options": {"seed": 0}, "config": {}, "dataset": {"digest": ""}, "split": ""}
        made.finish(made.build(config, space, {}), folder / recipe, terms)
    except (DpipeError, ImportError):  # the stage itself then says what it lacks
        return {}
    return {option: f"embedded:{folder / recipe / 'policy'}"}


def _table(space: Workspace, root: Path, costs: Sequence[StageCost]) -> list[str]:
    from ..streams.dataset import open_dataset

    dataset = open_dataset(root)
    lines = [f"{root.name}: {len(dataset)} episodes, {dataset.total_frames:,} frames", ""]
    lines.append(f"  {'stage':<11} {'bytes':>9} {'time':>8}  {'for':<13} ")
    for cost in costs:
        size, took = (_size(cost.bytes), _duration(cost.seconds)) if not cost.needs else ("?", "?")
        lines.append(
            f"  {cost.stage:<11} {size:>9} {took:>8}  {', '.join(cost.recipes) or 'any':<13} {cost.summary}"
        )
        notes = [f"made: {', '.join(cost.made)}"] if cost.made else []
        notes += [cost.needs.splitlines()[0]] if cost.needs else []
        if cost.stage in POLICIES and not _embedded(space, root, cost.stage):
            notes.append(f"first: dpipe train {POLICIES[cost.stage][1]}")
        lines += [f"  {'':<46}{note}" for note in notes]
    return [*lines, "", "  with each stage's default options; time in one process, reports left out", ""]


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
