"""dpipe train: targets to a policy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError
from .completion import complete_dataset, complete_recipe
from .convert import default_request
from .datasets import find_datasets, targets_folder, unmade_sources
from .options import (
    Execution,
    OwnOptionsCommand,
    answer,
    running,
    say,
    show_progress,
)
from .precompute import agree_to_targets, make_targets, missing_targets, plan_dataset, plan_missing

if TYPE_CHECKING:
    from ..pipeline.plan import Step
    from ..pipeline.workspace import Workspace
    from ..trainer.sizes import Sizes


class RecipeCommand(OwnOptionsCommand):
    """`dpipe train RECIPE`: the options of the recipe named are the command's own."""

    def own_options(self, args: Sequence[str]) -> Iterable[type]:
        from ..trainer import RECIPES

        named = [word for word in args if word in RECIPES]
        if not named or len(args) == 1:  # no option to know of: torch need not be imported yet
            return []
        from ..trainer import open_recipe
        from ..trainer.loop import Options

        return [open_recipe(named[0]).config, Options]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..trainer import RECIPES

        with formatter.section("Recipes"):
            formatter.write_dl(list(RECIPES.items()))


@click.command(cls=RecipeCommand)
@click.argument("recipe", shell_complete=complete_recipe)
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps.  [the recipe's own]")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    shell_complete=complete_dataset,
    help="Name or folder.  [the workspace's only group]",
)
@click.option(
    "--mix",
    type=click.Choice(["unified"]),
    help="Mix several embodiments through the unified vector.  [dial: where there are several]",
)
@click.option("--name", help="Name of the run.  [the dataset's, or mixed]")
@click.option(
    "--frames", type=click.Choice(["auto", "jpeg", "video", "none"]), default="auto", show_default=True
)
@click.option("--no-deps", is_flag=True, help="Do not build what is missing.")
@click.option(
    "--preset", default="", help="Named settings: paper, the publication's full size.  [none: tiny]"
)
@click.option(
    "--track", default="auto", show_default=True, help="Metrics also to: auto, tensorboard, wandb, none."
)
@running
def train(
    recipe: str,
    steps: int | None,
    datasets: tuple[str, ...],
    mix: str | None,
    name: str | None,
    frames: str,
    no_deps: bool,
    preset: str,
    track: str,
    how: Execution,
    **given: Any,
) -> None:
    """Targets to a policy; datasets and targets that are missing are made first.

    \b
    dpipe train libra
    dpipe train libra --steps 500 --dataset libero
    dpipe train libra --help              the options of one recipe
    """
    from ..pipeline.groups import group_datasets, stop_at_several
    from ..trainer import RECIPES, open_recipe
    from ..trainer.presets import preset_of

    if recipe not in RECIPES:
        open_recipe(recipe)
    space = how.space
    settings = space.settings.get("train", {}).get(recipe, {})
    named = datasets or tuple(settings.get("datasets", ()))
    if mix is not None:
        _refuse_mixing(recipe)
    if not named:
        _stop_before_work(space, recipe, how.as_json)
    try:
        roots = find_datasets(how, named, convert_missing=not no_deps)
    except UsageError as error:
        if named or not how.dry_run:
            raise
        sizes = _sizes(recipe, given, steps, preset, [])
        answer({"sizes": sizes.to_json()}, sizes.table, how.as_json)
        say(f"without data there is no plan: {str(error).splitlines()[0]}", how.as_json)
        return
    if not roots:  # --dry-run, with everything still to be converted
        planned = plan_missing(space, named, (), how.as_json)
        _show(planned, _sizes(recipe, given, steps, preset, []), how.processes, how.price, how.as_json)
        say(f"then: dpipe train {recipe}, on what is converted", how.as_json)
        return
    groups = group_datasets(roots)
    if len(groups) > 1:
        stop_at_several(groups, recipe, _mixing_problem(recipe))
    mixing = mix is not None or len(groups) > 1
    if mixing and how.where:
        raise UsageError("--where chooses episodes of one dataset: make those to mix with  dpipe select")
    if not mixing and len(roots) > 1:
        listed = ", ".join(root.name for root in roots)
        raise UsageError(f"{recipe}: name one of {listed} with --dataset, or merge them first")
    preset_settings = preset_of(recipe, preset)
    own, options = _divide(given)
    own = {**preset_settings.config, **own}
    missing = {root: missing_targets(space, root, recipe, [own]) for root in roots}
    for root in roots:
        if frames in ("auto", "jpeg") and _wants_shards(root):
            missing[root]["shards"] = {}
    run_dir = space.run(recipe, name or ("mixed" if mixing else roots[0].name))
    for root in roots:
        if missing[root]:
            say(f"first: dpipe precompute {' '.join(missing[root])} --dataset {root.name}", how.as_json)
    if how.dry_run:
        from ..pipeline.plan import plan_training

        planned = plan_missing(space, named, (), how.as_json)
        for root in roots:
            planned += plan_dataset(space, root, list(missing[root]), missing[root])
        planned.append(plan_training(recipe, roots, run_dir, steps))
        _show(planned, _sizes(recipe, given, steps, preset, roots), how.processes, how.price, how.as_json)
        return
    if not no_deps:
        agree_to_targets(how, missing)
    for root in roots if not no_deps else ():
        for stage, params in missing[root].items():
            make_targets(how, root, [stage], {stage: params})
    common: dict[str, Any] = {
        "steps": steps or preset_settings.steps or None,
        "config": own,
        "options": {**preset_settings.options, **options},
        "frames": frames,
        "say": lambda text: say(text, how.as_json),
        "preset": preset,
        "track": track.split(","),
        "max_time_s": how.seconds_left,
    }
    if mixing:
        from ..trainer.mixed import train_mixed

        folders = {root: targets_folder(space, root) for root in roots}
        weights = settings.get("weights", {})
        result = train_mixed(recipe, roots, run_dir, targets=folders, weights=weights, **common)
    else:
        from ..pipeline.query import select_episodes
        from ..trainer.run import train as run

        targets = targets_folder(space, roots[0])
        only = select_episodes(roots[0], how.where)
        result = run(recipe, roots[0], run_dir, targets=targets, only=only, **common)
    facts = {
        "run": str(result.run_dir),
        "recipe": recipe,
        "steps": result.steps,
        "metrics": dict(result.metrics),
    }
    answer(
        facts | {"checkpoint": str(result.checkpoint)},
        f"{result.message}\n  run: {result.run_dir}",
        how.as_json,
    )


def _sizes(recipe: str, given: dict[str, Any], steps: int | None, preset: str, roots: list[Path]) -> Sizes:
    """Parameters, memory and tokens of the run; for LIBERO's features where no dataset says otherwise."""
    from ..schemas.errors import DataError
    from ..streams.dataset import open_dataset
    from ..trainer.run import space_of
    from ..trainer.sizes import size_up

    features = None
    if len(roots) == 1:
        with suppress(DataError):  # no statistics yet
            features = space_of(open_dataset(roots[0]))
    return size_up(recipe, *_divide(given), steps, preset, features)


def _divide(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's own options and the loop's, of those that were given."""
    from ..trainer.loop import Options

    known = {item.name for item in fields(Options)}
    chosen = {key: value for key, value in given.items() if value is not None}
    own = {key: value for key, value in chosen.items() if key not in known}
    return own, {key: value for key, value in chosen.items() if key in known}


def _show(planned: Sequence[Step], sizes: Sizes, workers: int, price: float | None, as_json: bool) -> None:
    """Plan and sizes on stdout; DataError where the plan cannot fit the disk."""
    from ..pipeline.plan import plan_json, plan_text, require_disk

    facts = {**plan_json(planned, workers, price), "sizes": sizes.to_json()}
    answer(facts, f"{plan_text(planned, workers, price)}\n\n{sizes.table}", as_json)
    require_disk(planned)


def _mixing_problem(recipe: str) -> str:
    from ..trainer.mixed import mixing_problem

    return mixing_problem(recipe)


def _refuse_mixing(recipe: str) -> None:
    problem = _mixing_problem(recipe)
    if problem:
        raise UsageError(
            f"{recipe} cannot learn from unified vectors: {problem}\n"
            f"  next: dpipe train {recipe} --dataset NAME, or dpipe train dial --mix unified"
        )


def _stop_before_work(space: Workspace, recipe: str, as_json: bool) -> None:
    """Where several embodiments lie in a workspace, converted or not, and the recipe cannot mix them, say so now."""
    from ..pipeline.groups import group_datasets, plan_datasets, stop_at_several

    unmade = unmade_sources(space)
    # One whose conversion was stopped is among the unmade: its scan says what it will be.
    made = [root for root in space.datasets() if (root / "meta" / "info.json").is_file()]
    if len(made) + len(unmade) < 2:
        return
    problem = _mixing_problem(recipe)
    if problem:
        progress = show_progress(as_json)
        planned = [each for word in unmade for each in plan_datasets(default_request(space, word), progress)]
        stop_at_several(group_datasets(made, planned), recipe, problem)


def _wants_shards(root: Path) -> bool:
    """Whether training would decode video for every batch although shards could be written beside it."""
    from ..streams.dataset import open_dataset
    from ..streams.shards import find_shards

    dataset = open_dataset(root)
    ours = dataset.manifest is not None and os.access(root / "dpipe", os.W_OK)
    return ours and bool(dataset.cameras) and find_shards(dataset, dataset.cameras) is None
