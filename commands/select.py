"""dpipe select: a dataset of the episodes that meet a condition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .completion import complete_dataset
from .merge import place, show_made
from .options import common, open_space, show_progress


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("--where", required=True, help="SQL condition over episodes; columns: dpipe query --schema.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N of them.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [lerobot/NAME]")
@click.option("--name", default="", help="Name of the new dataset.  [that of --out]")
@common
def select(
    dataset: str,
    where: str,
    limit: int | None,
    out: Path | None,
    name: str,
    workspace: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """The episodes of a dataset that meet a condition, as a dataset of their own; video is copied, not encoded.

    \b
    dpipe select libero --where "frames > 50 AND instruction LIKE '%plate%'" --name plates
    """
    from ..pipeline.query import select_episodes
    from ..pipeline.rearrange import select as run

    space = open_space(workspace)
    root = space.find_dataset(dataset)
    target = place(space, out, name)
    chosen = (select_episodes(root, where) or [])[:limit]
    recipe = {"where": where} | ({"limit": limit} if limit else {})
    show_made("select", run(root, chosen, target, name, recipe, show_progress(as_json)), as_json)
