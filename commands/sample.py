"""dpipe sample: raw recordings of the tabletop simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import answer, common, open_space

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--episodes", type=click.IntRange(1), default=20, show_default=True, help="Of each source.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other recordings.")
@common
def sample(
    names: tuple[str, ...], episodes: int, seed: int, workspace: Path | None, as_json: bool, **_: Any
) -> None:
    """Write raw recordings of a small tabletop simulator into raw/.

    \b
    dpipe sample libero --episodes 50
    """
    from ..samples import write_sample

    space = open_space(workspace)
    for name in names:
        raw = space.raw(name)
        files = write_sample(name, raw, episodes=episodes, seed=seed)
        size = sum(path.stat().st_size for path in files)
        text = f"{name}: {episodes} simulated episodes in {len(files)} files, {size / 1e6:.1f} MB, in {raw}"
        answer({"source": name, "raw": str(raw), "files": len(files), "bytes": size}, text, as_json)
