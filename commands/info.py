"""dpipe info: what lies at a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .completion import complete_dataset
from .options import common, open_space


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_dataset)
@common
def info(paths: tuple[str, ...], workspace: Path | None, as_json: bool, **_: Any) -> None:
    """What is this? A dataset, target, shards, run, checkpoint, Zarr tree, workspace, raw recordings or one file.

    \b
    dpipe info libero
    dpipe info raw/calvin runs/libra/libero
    dpipe info demo.hdf5
    """
    from ..pipeline.info import describe

    space = open_space(workspace)
    told = []
    for given in paths:
        path = Path(given)
        if not path.exists() and space.dataset(given).is_dir():
            path = space.dataset(given)
        elif not path.exists() and (space.root / given).exists():
            path = space.root / given
        told.append(describe(path))
    if as_json:
        click.echo(json.dumps([each.to_json() for each in told], ensure_ascii=False))
    else:
        click.echo("\n".join(each.to_text() for each in told))
