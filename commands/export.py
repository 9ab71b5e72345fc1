"""dpipe export: how to train somebody else's policy on a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .completion import complete_dataset
from .options import common, open_space

TRAINERS = ("pi0", "pi05", "smolvla", "xvla", "groot", "openpi", "starvla")


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("--for", "trainer", required=True, type=click.Choice(TRAINERS), help="The trainer.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for its files.  [export/TRAINER/DATASET]"
)
@common
def export(
    dataset: str, trainer: str, out: Path | None, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """The exact launch line of a trainer for this dataset, the files it misses, and what does not fit.

    \b
    dpipe export libero --for pi05
    dpipe export libero --for openpi --out openpi-files
    """
    from ..pipeline.trainers import export as prepare
    from ..pipeline.trainers import export_text, write_export

    space = open_space(workspace)
    root = space.find_dataset(dataset)
    place = (out or space.root / "export" / trainer / root.resolve().name).resolve()
    made = prepare(root, trainer, place)
    written = write_export(made, place)
    if as_json:
        facts = vars(made) | {"files": [str(path) for path in written]}
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        click.echo(export_text(made, written))
