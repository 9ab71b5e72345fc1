"""dpipe merge: one dataset of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import UsageError
from .completion import complete_dataset
from .options import answer, common, open_space, show_progress

if TYPE_CHECKING:
    from ..pipeline.rearrange import Made
    from ..pipeline.workspace import Workspace


@click.command()
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...", shell_complete=complete_dataset)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [lerobot/NAME]")
@click.option("--name", default="", help="Name of the new dataset.  [that of --out]")
@common
def merge(
    datasets: tuple[str, ...], out: Path | None, name: str, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """All episodes of several datasets that agree in conventions, features and fps; video is copied, not encoded.

    Targets made before still fit: they are bound to what an episode contains. Video files that come along whole are
    shared with their source by hard link, where the disk has such.

    \b
    dpipe merge libero libero-new --name libero-all
    dpipe merge ~/datasets/a ~/datasets/b --out ~/datasets/ab
    """
    from ..pipeline.rearrange import merge as run

    space = open_space(workspace)
    roots = [space.find_dataset(given) for given in datasets]
    show_made("merge", run(roots, place(space, out, name), name, show_progress(as_json)), as_json)


def place(space: Workspace, out: Path | None, name: str) -> Path:
    if out is None and not name:
        raise UsageError("name the new dataset with --name, or its folder with --out")
    return (out or space.dataset(name)).resolve()


def show_made(word: str, made: Made, as_json: bool) -> None:
    text = f"{word}: {made.episodes:,} episodes, {made.frames:,} frames, {made.bytes / 1e6:,.1f} MB in {made.root}"
    answer(vars(made) | {"root": str(made.root)}, text, as_json)
