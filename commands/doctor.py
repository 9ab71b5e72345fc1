"""dpipe doctor: is a dataset sound?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..schemas.errors import UsageError
from .completion import complete_dataset
from .options import common, open_space, say


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_dataset)
@click.option("--fast", is_flag=True, help="Metadata only: seconds for a million episodes.")
@click.option("--full", is_flag=True, help="Decode every frame.  [some frames of some episodes]")
@click.option(
    "--fail-on",
    type=click.Choice(["warn", "error"]),
    default="error",
    show_default=True,
    help="The least that makes the exit code 1.",
)
@click.option("--fix", is_flag=True, help="Write a copy with statistics, numbering and task table rebuilt.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of that copy.  [PATH-fixed]")
@click.option("--where", help="Only episodes that meet an SQL condition; columns: dpipe query --schema.")
@click.option("--source", help="Whose raw recordings these are.  [told from the folder]")
@common
def doctor(
    paths: tuple[str, ...],
    fast: bool,
    full: bool,
    fail_on: str,
    fix: bool,
    out: Path | None,
    where: str | None,
    source: str | None,
    workspace: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Is it sound? Any LeRobot v3.0 dataset, raw recordings, targets or shards; exit 0 sound, 1 defects.

    \b
    dpipe doctor libero
    dpipe doctor ~/datasets/pusht --full --fail-on warn
    dpipe doctor raw/egodex
    dpipe doctor libero --where "split = 'validation'" --full
    """
    from ..pipeline.doctor import Level, examine, report_text
    from ..pipeline.doctor.mend import fixed_folder, mend

    if (fast and full) or (out is not None and not fix):
        raise UsageError("--fast and --full exclude each other, and --out belongs to --fix")
    if fix and where:
        raise UsageError("--fix rebuilds a dataset whole, and --where looks at a part of it")
    space = open_space(workspace)
    level = Level.FAST if fast else Level.FULL if full else Level.SAMPLED
    reports = []
    for given in paths:
        path = space.dataset(given) if space.dataset(given).is_dir() else Path(given)
        if fix:
            done = mend(path, out or fixed_folder(path))
            say(f"{path.name}: rebuilt {', '.join(done.changed) or 'nothing'} in {done.root}", as_json)
            path = done.root
        reports.append(examine(path, level, source, where))
        if not as_json:
            click.echo(report_text(reports[-1], fail_on))
    if as_json:
        click.echo(json.dumps([report.to_json(fail_on) for report in reports], ensure_ascii=False))
    if any(report.fails(fail_on) for report in reports):
        sys.exit(1)
