"""dpipe precompute: datasets to supervision targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError
from .convert import default_request, plan_request
from .datasets import find_datasets, targets_folder, unmade_sources
from .options import (
    OWN_OPTIONS,
    agree_to,
    answer,
    count_workers,
    find_scheduler,
    open_space,
    options_of,
    running,
    show_plan,
    show_progress,
)

if TYPE_CHECKING:
    from ..pipeline.costs import StageCost
    from ..pipeline.plan import Step
    from ..pipeline.workspace import Workspace

PROBED_ABOVE_FRAMES = 20_000  # below, the slowest stage takes less than an hour, and nobody need be asked
# Stages that run a policy: the option that names it, and the recipe that trains the embedded one.
POLICIES = {
    "teacher": ("teacher", "teacher"),
    "residuals": ("anchor", "anchor"),
    "privileged": ("base", "flow"),
}


class StageCommand(click.Command):
    """`dpipe precompute STAGE...`: the options of the stages named are the command's own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from ..stages import STAGES, load_stage

        named = [word for word in args if word in STAGES]
        known = {name for parameter in self.params for name in parameter.opts}
        made: list[click.Parameter] = []
        for name in named:
            for option in options_of(load_stage(name).Params, unset=True):
                if not known & set(option.opts):
                    known |= set(option.opts)
                    made.append(option)
        ctx.meta[OWN_OPTIONS] = made
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """With this call's own options, kept beside the call: the command outlives it."""
        return [*super().get_params(ctx), *ctx.meta.get(OWN_OPTIONS, [])]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..stages import STAGES

        with formatter.section("Stages"):
            formatter.write_dl(list(STAGES.items()))


@click.command(cls=StageCommand)
@click.argument("stages", nargs=-1)
@click.option(
    "--dataset", "datasets", multiple=True, help="Name or folder; may be repeated.  [all of the workspace]"
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
    workspace: Path | None,
    as_json: bool,
    debug: bool,
    workers: int | None,
    scheduler: str | None,
    where: str | None,
    max_time: float | None,
    yes: bool,
    dry_run: bool,
    price: float | None,
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

    space = open_space(workspace)
    scheduler = find_scheduler(space, scheduler)
    if where:
        raise UsageError(
            "targets are of whole datasets: a loader refuses one that lacks episodes\n"
            f'  next: dpipe select DATASET --where "{where}" --name PART   and precompute --dataset PART'
        )
    if not stages:
        _list_stages(space, datasets, out, as_json)
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
    if dry_run:
        steps = plan_missing(space, datasets, stages, as_json)
        for root in find_datasets(space, datasets, as_json, None, dry_run):
            steps += plan_dataset(space, root, stages, params, out, name)
        show_plan(steps, count_workers(workers), price, as_json)
        return
    roots = find_datasets(space, datasets, as_json, None if no_deps else workers, dry_run)
    large = [root for root in roots if frames_of(root) > PROBED_ABOVE_FRAMES] if not yes else []
    agree_to(
        [step for root in large for step in plan_dataset(space, root, stages, params, out, name)],
        count_workers(workers),
        yes,
    )
    for root in roots:
        told = out, name, workers, scheduler, max_time, as_json, not no_deps
        make_targets(space, root, list(stages), params, *told)


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


def frames_of(root: Path) -> int:
    from ..streams.dataset import open_dataset

    return open_dataset(root).total_frames


def make_targets(
    space: Workspace,
    root: Path,
    stages: list[str],
    params: dict[str, dict[str, Any]],
    out: Path | None,
    name: str,
    workers: int | None,
    scheduler: str | None,
    max_time: float | None,
    as_json: bool,
    train_missing: bool = True,
) -> None:
    """Run stages over one dataset; embedded policies they need are trained first."""
    from ..pipeline.precompute import precompute as run

    if train_missing:
        _train_policies(space, root, stages, params, workers, as_json)
    params = {stage: {**_embedded(space, root, stage), **params.get(stage, {})} for stage in stages}
    made = run(
        root,
        stages,
        params,
        count_workers(workers),
        out or targets_folder(space, root),
        show_progress(as_json),
        name=name,
        scheduler=scheduler,
        max_time_s=max_time,
    )
    for target in made:
        text = (
            f"{target.stage}: {target.variant} of {root.name}, {target.episodes} episodes, {target.frames} frames, "
            f"{target.bytes / 1e6:.2f} MB in {target.folder}; {target.computed_episodes} episodes computed now"
        )
        facts = {n: v for n, v in vars(target).items() if n != "report"} | {"folder": str(target.folder)}
        answer(facts, text, as_json)


def _embedded(space: Workspace, root: Path, stage: str) -> dict[str, Any]:
    """The option that names the embedded policy of a stage, where the workspace has trained one."""
    if stage not in POLICIES:
        return {}
    option, recipe = POLICIES[stage]
    run = space.run(recipe, root.name)
    return {option: f"embedded:{run / 'policy'}"} if (run / "result.json").is_file() else {}


def _train_policies(
    space: Workspace,
    root: Path,
    stages: Sequence[str],
    params: Mapping[str, Mapping[str, Any]],
    workers: int | None,
    as_json: bool,
) -> None:
    """Train the embedded policies that the stages run and nobody has named or trained."""
    for stage in stages:
        option, recipe = POLICIES.get(stage, ("", ""))
        if not option or params.get(stage, {}).get(option) or _embedded(space, root, stage):
            continue
        from .train import train

        click.echo(f"first: dpipe train {recipe} --dataset {root.name}", err=True)
        words = [recipe, "--workspace", str(space.root), "--dataset", str(root)]
        words += ["--workers", str(workers)] if workers is not None else []
        train.main([*words, *(["--json"] if as_json else [])], standalone_mode=False)


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
        click.echo(f"What each costs is told once there is a dataset in {space.root / 'lerobot'}.", err=True)
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
    from ..schemas.errors import DpipeError
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
