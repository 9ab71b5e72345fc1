"""dpipe train: targets to a policy."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError
from .datasets import find_datasets, targets_folder
from .options import answer, open_space, options_of, running
from .precompute import make_targets

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace


class RecipeCommand(click.Command):
    """`dpipe train RECIPE`: the options of the recipe named are the command's own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from ..trainer import RECIPES

        named = [word for word in args if word in RECIPES]
        if named and ("--help" in args or "-h" in args or len(args) > 1):
            from ..trainer import open_recipe
            from ..trainer.loop import Options

            known = {name for parameter in self.params for name in parameter.opts}
            for options in (open_recipe(named[0]).config, Options):
                made = [o for o in options_of(options, unset=True) if not known & set(o.opts)]
                known |= {name for option in made for name in option.opts}
                self.params = [*self.params, *made]
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..trainer import RECIPES

        with formatter.section("Recipes"):
            formatter.write_dl(list(RECIPES.items()))


@click.command(cls=RecipeCommand)
@click.argument("recipe")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps.  [the recipe's own]")
@click.option("--dataset", "datasets", multiple=True, help="Name or folder.  [the workspace's only group]")
@click.option("--name", help="Name of the run.  [the dataset's]")
@click.option(
    "--frames", type=click.Choice(["auto", "jpeg", "video", "none"]), default="auto", show_default=True
)
@click.option("--no-deps", is_flag=True, help="Do not build what is missing.")
@running
def train(
    recipe: str,
    steps: int | None,
    datasets: tuple[str, ...],
    name: str | None,
    frames: str,
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
    """Targets to a policy; datasets and targets that are missing are made first.

    \b
    dpipe train libra
    dpipe train libra --steps 500 --dataset libero
    dpipe train libra --help              the options of one recipe
    """
    from ..pipeline.groups import group_datasets, one_group
    from ..trainer import RECIPES, open_recipe

    if recipe not in RECIPES:
        open_recipe(recipe)
    space = open_space(workspace)
    configured = tuple(space.settings.get("train", {}).get(recipe, {}).get("datasets", ()))
    roots = find_datasets(space, datasets or configured, as_json, None if no_deps else workers, dry_run)
    group = one_group(group_datasets(roots), recipe)
    if len(group.datasets) > 1:
        listed = ", ".join(root.name for root in group.datasets)
        raise UsageError(f"{recipe}: name one of {listed} with --dataset, or merge them first")
    root = next(iter(group.datasets))
    missing = _missing_targets(space, root, recipe, given)
    if frames in ("auto", "jpeg") and _wants_shards(root):
        missing["shards"] = {}
    run_dir = space.run(recipe, name or root.name)
    if missing:
        click.echo(f"first: dpipe precompute {' '.join(missing)} --dataset {root.name}", err=True)
    if dry_run:
        click.echo(f"train {recipe} on {root} into {run_dir}")
        return
    if missing and not no_deps:
        for stage, params in missing.items():
            make_targets(space, root, [stage], {stage: params}, None, "", workers, scheduler, None, as_json)
    from ..trainer.loop import Options
    from ..trainer.run import train as run

    known = {item.name for item in fields(Options)}
    chosen = {key: value for key, value in given.items() if value is not None}
    result = run(
        recipe,
        root,
        run_dir,
        steps=steps,
        config={key: value for key, value in chosen.items() if key not in known},
        options={key: value for key, value in chosen.items() if key in known},
        targets=targets_folder(space, root),
        frames=frames,
        say=lambda text: click.echo(text, err=True),
    )
    facts = {
        "run": str(result.run_dir),
        "recipe": recipe,
        "steps": result.steps,
        "metrics": dict(result.metrics),
    }
    answer(
        facts | {"checkpoint": str(result.checkpoint)}, f"{result.message}\n  run: {result.run_dir}", as_json
    )


def _wants_shards(root: Path) -> bool:
    """Whether training would decode video for every batch although shards could be written beside it."""
    from ..streams.dataset import open_dataset
    from ..streams.shards import find_shards

    dataset = open_dataset(root)
    ours = dataset.manifest is not None and os.access(root / "dpipe", os.W_OK)
    return ours and bool(dataset.cameras) and find_shards(dataset, dataset.cameras) is None


def _missing_targets(
    space: Workspace, root: Path, recipe: str, given: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Stages the recipe needs and the dataset has not, each with the options its request names."""
    from ..trainer import open_recipe
    from ..trainer.recipe import resolve

    made = open_recipe(recipe)
    names = {item.name for item in fields(made.config)}
    config = resolve(recipe, made.config, {k: v for k, v in given.items() if v is not None and k in names})
    requests, _ = made.targets(config)
    base = targets_folder(space, root) or root / "dpipe" / "targets"
    missing: dict[str, dict[str, Any]] = {}
    for request in requests:
        stage = request.partition(":")[0]
        if not (base / stage).is_dir() or not any((base / stage).iterdir()):
            missing[stage] = {}
    return missing
