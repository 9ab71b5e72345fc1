"""dpipe split: several datasets of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..schemas.errors import UsageError
from .completion import complete_dataset
from .merge import show_made
from .options import common, open_space, show_progress


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("--into", help="Names and shares, e.g. train=0.9,test=0.1.  [the dataset's own splits]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write them in.  [beside the dataset]")
@common
def split(
    dataset: str, into: str | None, out: Path | None, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """A dataset a split, named DATASET-SPLIT; video is copied, not encoded.

    With --into, an episode's side follows from what it contains: it is the same in every dataset, for ever.

    \b
    dpipe split calvin
    dpipe split libero --into train=0.9,test=0.1
    """
    from ..pipeline.rearrange import select, split_by_name, split_by_shares
    from ..streams.dataset import open_dataset

    space = open_space(workspace)
    root = space.find_dataset(dataset)
    opened = open_dataset(root)
    sides = split_by_shares(opened, _shares(into)) if into else split_by_name(opened)
    if len(sides) < 2:
        raise UsageError(
            f"{root.name} has one split, {next(iter(sides), 'none')}\n  next: give shares:  --into train=0.9,test=0.1"
        )
    empty = [name for name, episodes in sides.items() if not episodes]
    if empty:
        raise UsageError(
            f"{', '.join(empty)} would be empty: {len(opened)} episodes are too few for these shares"
        )
    targets = {name: (out or root.parent).resolve() / f"{root.resolve().name}-{name}" for name in sides}
    there = [str(path) for path in targets.values() if path.exists()]
    if there:
        raise UsageError(f"there already: {', '.join(there)}\n  next: choose another folder with --out")
    for name, episodes in sides.items():
        recipe = {"command": "split", "side": name, "into": into or "its splits"}
        made = select(
            root,
            episodes,
            targets[name],
            targets[name].name,
            recipe,
            show_progress(as_json),
            name if into else "",
        )
        show_made(f"split {name}", made, as_json)


def _shares(into: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in into.split(","):
        name, _, share = part.partition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            raise UsageError(f"--into {into}: expected NAME=SHARE,..., e.g. train=0.9,test=0.1") from None
    return found
