"""dpipe diff: in what two datasets differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .completion import complete_dataset
from .options import common, open_space


@click.command()
@click.argument("a", shell_complete=complete_dataset)
@click.argument("b", shell_complete=complete_dataset)
@common
def diff(a: str, b: str, workspace: Path | None, as_json: bool, **_: Any) -> None:
    """Conventions, counts, statistics and the first differing episode of two datasets; exit 0 same, 1 different.

    \b
    dpipe diff libero libero-again
    dpipe diff ~/datasets/mine lerobot/libero
    """
    from ..pipeline.diff import diff as compare

    space = open_space(workspace)
    found = compare(space.find_dataset(a), space.find_dataset(b))
    click.echo(json.dumps(found.to_json(), ensure_ascii=False) if as_json else found.to_text())
    if not found.same:
        sys.exit(1)
