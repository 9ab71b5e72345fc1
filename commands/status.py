"""dpipe status: where a workspace stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import common, open_space

if TYPE_CHECKING:
    pass


@click.command()
@common
def status(workspace: Path | None, as_json: bool, **_: Any) -> None:
    """Every dataset, target and run of the workspace: complete, partial or stale, and why.

    \b
    dpipe status
    """
    from ..pipeline.status import workspace_states

    states = workspace_states(open_space(workspace))
    if as_json:
        click.echo(json.dumps([vars(s) | {"path": str(s.path)} for s in states]))
        return
    for s in states:
        click.echo(f"{s.kind:8s} {s.state:10s} {s.name}: {s.detail}")
    if not states:
        click.echo("nothing yet: dpipe convert SOURCE --to lerobot")
