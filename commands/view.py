"""dpipe view: one episode in a viewer."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ..schemas.errors import UsageError
from .completion import complete_dataset
from .options import common, open_space


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.argument("episode", type=click.IntRange(0), default=0)
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write a .rrd file here instead of opening a window."
)
@common
def view(dataset: str, episode: int, save: Path | None, workspace: Path | None, **_: Any) -> None:
    """One episode in lerobot's viewer (rerun), where both are installed.

    \b
    dpipe view libero 3
    dpipe view libero 3 --save recordings
    """
    from ..streams.dataset import open_dataset

    space = open_space(workspace)
    root = space.find_dataset(dataset)
    opened = open_dataset(root)
    if episode >= len(opened):
        raise UsageError(f"episode {episode}: {root.name} has episodes 0 to {len(opened) - 1}")
    words = viewer_words(root, episode, save)
    missing = [
        name for name, package in (("lerobot", "lerobot"), ("rerun-sdk", "rerun")) if not find_spec(package)
    ]
    if missing:
        raise UsageError(
            f"viewing needs {' and '.join(missing)}:  pip install {' '.join(missing)}\n"
            f"  without: dpipe picture {dataset} --episode {episode}   or   dpipe report {dataset}"
        )
    sys.exit(subprocess.run([sys.executable, *words], check=False).returncode)


def viewer_words(root: Path, episode: int, save: Path | None) -> list[str]:
    """Arguments of python for lerobot's own viewer."""
    words = ["-m", "lerobot.scripts.lerobot_dataset_viz", "--repo-id", f"local/{root.resolve().name}"]
    words += ["--root", str(root.resolve()), "--episode-index", str(episode)]
    if save is not None:
        words += ["--save", "1", "--output-dir", str(save)]
    return words
