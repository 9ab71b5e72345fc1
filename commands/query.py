"""dpipe query: SQL over everything in the workspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..schemas.errors import UsageError
from .completion import complete_dataset
from .options import common, open_space


@click.command()
@click.argument("sql", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    help="Form of the answer.  [table; by the ending of --out]",
)
@click.option("--out", type=click.Path(path_type=Path), help="File to write the answer to.")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    shell_complete=complete_dataset,
    help="Name or folder; may be repeated.  [all]",
)
@click.option("--schema", is_flag=True, help="Tables, columns, units and examples.")
@common
def query(
    sql: str | None,
    form: str | None,
    out: Path | None,
    datasets: tuple[str, ...],
    schema: bool,
    workspace: Path | None,
    as_json: bool,
    **_: Any,
) -> None:
    """One SELECT over episodes, segments, tasks, stats, targets, runs and more; nothing can be changed by it.

    \b
    dpipe query --schema
    dpipe query "SELECT dataset, count(*) AS episodes, sum(frames) AS frames FROM episodes GROUP BY 1"
    dpipe query "SELECT * FROM stats WHERE feature = 'action'" --out action.csv
    """
    from ..pipeline import query as asked

    if schema:
        click.echo(json.dumps(asked.schema_json()) if as_json else asked.schema_text())
        return
    if not sql:
        raise UsageError(
            'ask something:  dpipe query "SELECT * FROM datasets"\n  tables:  dpipe query --schema'
        )
    space = open_space(workspace)
    answer = asked.query(space, sql, [space.find_dataset(name) for name in datasets])
    ending = out.suffix.removeprefix(".") if out else ""
    chosen = form or ("json" if as_json else ending if ending in asked.FORMATS else "table")
    text = asked.write_answer(answer, chosen, out)
    if out is None:
        click.echo(text)
    else:
        facts = {"out": str(out), "rows": len(answer.rows), "columns": list(answer.names)}
        click.echo(json.dumps(facts) if as_json else f"{len(answer.rows):,} rows in {out}")
