"""dpipe precompute: datasets to supervision targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .datasets import find_datasets, targets_folder
from .options import answer, count_workers, open_space, options_of, running, show_progress

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace


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
        self.params = [*self.params, *made]
        return super().parse_args(ctx, args)

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
    **given: Any,
) -> None:
    """Datasets to supervision targets.

    \b
    dpipe precompute tokens
    dpipe precompute tokens stats --dataset libero
    dpipe precompute tokens --help        the options of one stage
    """
    from dataclasses import fields as fields_of

    from ..stages import STAGES, load_stage

    if not stages:
        for stage, summary in STAGES.items():
            click.echo(f"{stage:12s} {summary}")
        return
    for stage in stages:
        load_stage(stage)
    space = open_space(workspace)
    options = {name: value for name, value in given.items() if value is not None}
    params = {
        stage: {
            n: v for n, v in options.items() if n in {f.name for f in fields_of(load_stage(stage).Params)}
        }
        for stage in stages
    }
    roots = find_datasets(space, datasets, as_json, None if no_deps else workers, dry_run)
    if dry_run:
        for root in roots:
            click.echo(f"precompute {' '.join(stages)} of {root}")
        return
    for root in roots:
        make_targets(space, root, list(stages), params, out, name, workers, scheduler, max_time, as_json)


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
) -> None:
    from ..pipeline.precompute import precompute as run

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
