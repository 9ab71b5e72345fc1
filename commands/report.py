"""dpipe report: datasets and runs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .completion import complete_dataset
from .options import answer, common, open_space, say


@click.command()
@click.argument("paths", nargs=-1, metavar="[PATH]...", shell_complete=complete_dataset)
@click.option("--out", type=click.Path(path_type=Path), help="Page to write.  [report.html in the workspace]")
@click.option("--force", is_flag=True, help="Write over a file that is no dpipe report.")
@common
def report(
    paths: tuple[str, ...], out: Path | None, force: bool, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """One self-contained HTML page: what the datasets are, how they look, how the runs went.

    PATH is a dataset or run, by name or folder; without one the page shows everything in the workspace.

    \b
    dpipe report
    dpipe report libero --out libero.html
    dpipe report runs/libra/libero
    """
    from ..pipeline.report import write_report

    made = write_report(open_space(workspace), paths, out, force)
    for problem in made.problems:
        say(f"not shown: {problem}", as_json)
    facts = vars(made) | {"path": str(made.path), "problems": list(made.problems)}
    text = f"report: {made.datasets} datasets, {made.runs} runs, {made.bytes / 1e6:.1f} MB in {made.path}"
    answer(facts, text, as_json)
