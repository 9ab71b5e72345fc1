"""dpipe picture: one episode at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .completion import complete_dataset
from .options import answer, common, open_space

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("--episode", type=click.IntRange(0), default=0, show_default=True, help="Its index.")
@click.option(
    "--bins", type=click.IntRange(2, 256), default=10, show_default=True, help="Coarse bins a dimension."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="PNG to write.  [DATASET-EPISODE.png in the workspace]"
)
@common
def picture(
    dataset: str, episode: int, bins: int, out: Path | None, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """One picture of one episode: its frames, its actions and the coarse bins they fall in.

    \b
    dpipe picture libero --episode 3
    """
    from ..pipeline.picture import draw_episode
    from ..streams.dataset import open_dataset

    space = open_space(workspace)
    root = space.find_dataset(dataset)
    path = out or space.root / f"{root.name}-{episode:03d}.png"
    draw_episode(open_dataset(root), episode, path, bins)
    answer({"picture": str(path)}, f"episode {episode} of {root.name}: {path}", as_json)
