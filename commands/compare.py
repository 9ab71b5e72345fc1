"""dpipe compare: an ablation as the papers have them, from a grid of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..schemas.errors import UsageError
from .completion import complete_dataset
from .datasets import find_datasets, targets_folder
from .options import Execution, answer, common, say
from .precompute import make_targets, missing_targets


@click.command()
@click.argument("names", nargs=-1, metavar="ABLATION... | RECIPE")
@click.option("--vary", multiple=True, help="With a RECIPE: NAME=VALUE,VALUE; repeat for a grid.")
@click.option("--seeds", default="0,1,2", show_default=True, help="One run a row for each.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of every run.  [the recipe's own]")
@click.option("--episodes", type=click.IntRange(1), default=100, show_default=True, help="Judged, a run.")
@click.option(
    "--dataset", shell_complete=complete_dataset, help="Name or folder.  [the workspace's only one]"
)
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
            rows = [row.label for row in ablation.rows]
            facts = {"ablation": ablation.name, "question": ablation.question, "rows": rows}
            answer(facts, f"{ablation.name:14s} {ablation.question}: {', '.join(rows)}", as_json)
        return
    if vary and len(names) != 1:
        raise UsageError("--vary takes one RECIPE before it: dpipe compare libra --vary bins=5,10")
    chosen = [varied(names[0], vary)] if vary else [ablation_named(name) for name in names]
    numbers = _seeds(seeds)
    how = Execution(workspace, as_json=as_json, dry_run=dry_run)
    space = how.space
    if dry_run:
        for ablation in chosen:
            runs = sorted({run_name(ablation, row, seed) for row in ablation.rows for seed in numbers})
            facts = {"ablation": ablation.name, "recipe": ablation.recipe, "runs": runs}
            text = f"{ablation.name}: {len(runs)} runs of {ablation.recipe}\n  " + "\n  ".join(runs)
            answer(facts, text, as_json)
        return
    roots = find_datasets(how, (dataset,) if dataset else ())
    if len(roots) != 1:
        raise UsageError(f"name one of {', '.join(root.name for root in roots)} with --dataset")
    root = roots[0]
    for ablation in chosen:
        settings = [row.config for row in ablation.rows]
        for stage, params in missing_targets(space, root, ablation.recipe, settings).items():
            make_targets(how, root, [stage], {stage: params})
        found = run(
            ablation,
            root,
            space.root / "runs",
            seeds=numbers,
            steps=steps,
            episodes=episodes,
            targets=targets_folder(space, root),
            say=lambda text: say(text, as_json),
        )
        folder = space.root / "compare"
        folder.mkdir(exist_ok=True)
        (folder / f"{ablation.name}.md").write_text(found.table() + "\n")
        (folder / f"{ablation.name}.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
        draw_comparison(found, folder / f"{ablation.name}.png")
        written = ", ".join(str(folder / f"{ablation.name}.{kind}") for kind in ("md", "json", "png"))
        answer(found.to_json(), f"{found.table()}\n\n  {written}", as_json)


def _seeds(words: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError:
        raise UsageError(f"--seeds {words}: expected whole numbers, for example 0,1,2") from None
