"""dpipe replay: converted actions executed in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .completion import complete_dataset
from .options import answer, common, open_space, show_progress

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("--raw", type=click.Path(path_type=Path), help="Raw folder with tabletop.json.  [raw/SOURCE]")
@click.option("--limit", type=click.IntRange(1), help="Only the first N episodes.")
@common
def replay(
    dataset: str, raw: Path | None, limit: int | None, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """Execute converted actions open loop in the tabletop simulator, beside deliberate mistakes.

    \b
    dpipe replay libero
    """
    from ..pipeline.replay import replay as run
    from ..streams.dataset import open_dataset

    space = open_space(workspace)
    root = space.find_dataset(dataset)
    source = str((open_dataset(root).manifest or {}).get("source", root.name))
    result = run(root, raw or space.raw(source), limit, show_progress(as_json))
    text = (
        f"{result.to_text()}\n{root.name}: {result.rows[0].successes} of {result.rows[0].episodes} episodes succeed "
        f"from converted actions read by {result.reader}, {result.recorded_successes} as recorded"
    )
    answer(result.to_json(), text, as_json)
