"""dpipe compare: an ablation as the papers have them, from a grid of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import DpipeError, UsageError
from .datasets import find_datasets, targets_folder
from .options import answer, common, open_space
from .precompute import make_targets

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace
    from ..trainer.compare import Ablation


@click.command()
@click.argument("names", nargs=-1, metavar="ABLATION... | RECIPE")
@click.option("--vary", multiple=True, help="With a RECIPE: NAME=VALUE,VALUE; repeat for a grid.")
@click.option("--seeds", default="0,1,2", show_default=True, help="One run a row for each.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of every run.  [the recipe's own]")
@click.option("--episodes", type=click.IntRange(1), default=100, show_default=True, help="Judged, a run.")
@click.option("--dataset", help="Name or folder.  [the workspace's only one]")
@click.option("--dry-run", is_flag=True, help="List the runs, and stop.")
@common
def compare(
    names: tuple[str, ...],
    vary: tuple[str, ...],
    seeds: str,
    steps: int | None,
    episodes: int,
    dataset: str | None,
    dry_run: bool,
    workspace: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Train and judge a grid of runs: one table and one picture, the paper's own figures beside.

    \b
    dpipe compare                          the ablations there are
    dpipe compare libra-bins --steps 500 --seeds 0,1
    dpipe compare libra --vary bins=5,10 --vary slices=1,2

    Finished runs are read, unfinished ones go on, so the same command may be repeated.
    """
    from ..trainer.compare import ABLATIONS, ablation_named, draw_comparison, run_name
    from ..trainer.compare import compare as run
    from ..trainer.compare import vary as varied

    if not names:
        for ablation in ABLATIONS.values():
            click.echo(
                f"{ablation.name:14s} {ablation.question}: {', '.join(r.label for r in ablation.rows)}"
            )
        return
    if vary and len(names) != 1:
        raise UsageError("--vary takes one RECIPE before it: dpipe compare libra --vary bins=5,10")
    chosen = [varied(names[0], vary)] if vary else [ablation_named(name) for name in names]
    numbers = _seeds(seeds)
    space = open_space(workspace)
    if dry_run:
        for ablation in chosen:
            runs = sorted({run_name(ablation, row, seed) for row in ablation.rows for seed in numbers})
            click.echo(f"{ablation.name}: {len(runs)} runs of {ablation.recipe}\n  " + "\n  ".join(runs))
        return
    roots = find_datasets(space, (dataset,) if dataset else (), as_json, None, dry_run)
    if len(roots) != 1:
        raise UsageError(f"name one of {', '.join(root.name for root in roots)} with --dataset")
    root = roots[0]
    for ablation in chosen:
        for stage, params in _missing(space, root, ablation).items():
            make_targets(space, root, [stage], {stage: params}, None, "", None, None, None, as_json)
        found = run(
            ablation,
            root,
            space.root / "runs",
            seeds=numbers,
            steps=steps,
            episodes=episodes,
            targets=targets_folder(space, root),
            say=lambda text: click.echo(text, err=True),
        )
        folder = space.root / "compare"
        folder.mkdir(exist_ok=True)
        (folder / f"{ablation.name}.md").write_text(found.table() + "\n")
        (folder / f"{ablation.name}.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
        draw_comparison(found, folder / f"{ablation.name}.png")
        written = ", ".join(str(folder / f"{ablation.name}.{kind}") for kind in ("md", "json", "png"))
        answer(found.to_json(), f"{found.table()}\n\n  {written}", as_json)


def _missing(space: Workspace, root: Path, ablation: Ablation) -> dict[str, dict[str, Any]]:
    """Stages whose targets a row asks for and the dataset has not; tokens for every number of bins at once."""
    from ..streams.targets import open_targets
    from ..trainer import open_recipe
    from ..trainer.recipe import resolve

    recipe, missing = open_recipe(ablation.recipe), dict[str, dict[str, Any]]()
    for row in ablation.rows:
        config = resolve(ablation.recipe, recipe.config, row.config)
        for request in recipe.targets(config)[0]:
            try:
                open_targets(root, [request], 1, targets_folder(space, root))
            except DpipeError:
                stage = request.partition(":")[0]
                params = missing.setdefault(stage, {})
                if stage == "tokens":
                    params["bins"] = tuple(sorted({*params.get("bins", ()), config.bins}))
    return missing


def _seeds(words: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError:
        raise UsageError(f"--seeds {words}: expected whole numbers, for example 0,1,2") from None
