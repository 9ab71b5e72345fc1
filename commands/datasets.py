"""The datasets a command works on, converted first where a workspace has only recordings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..schemas.errors import UsageError
from .convert import convert
from .options import Execution, say

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace


def targets_folder(space: Workspace, root: Path) -> Path | None:
    """None where the dataset keeps its own targets, else targets/<name> of the workspace."""
    ours = (root / "dpipe" / "manifest.json").is_file() and os.access(root / "dpipe", os.W_OK)
    return None if ours else space.targets(root.name)


def find_datasets(how: Execution, named: Sequence[str], convert_missing: bool = True) -> list[Path]:
    """The datasets to work on: those named, else all; a workspace that has only raw recordings converts them.

    Of `--dry-run` the list may be empty: everything is still to be converted.
    """
    from ..converters import SOURCES

    space = how.space
    if named:
        return [space.find_dataset(name) for name in named]
    unmade = unmade_sources(space)
    plan = "; ".join(f"dpipe convert {source} --to lerobot" for source in unmade)
    if unmade and (convert_missing or how.dry_run):
        say(f"first: {plan}", how.as_json)
        for source in unmade if not how.dry_run else []:
            convert.main([source, "--allow-dropped", *how.words()], standalone_mode=False)
    roots = space.datasets()
    if unmade and not roots and not convert_missing:
        raise UsageError(f"no dataset in {space.root / 'lerobot'}, only recordings\n  next: {plan}")
    if not roots and not (how.dry_run and unmade):
        raise UsageError(
            f"no dataset in {space.root / 'lerobot'} and no recordings in {space.root / 'raw'}\n"
            f"  next: put recordings into raw/<source>/ ({', '.join(SOURCES)}), or make some:  dpipe sample libero"
        )
    return roots


def unmade_sources(space: Workspace) -> list[str]:
    """Sources whose recordings the workspace holds and no dataset of it is made from."""
    from ..converters import SOURCES

    sources = [source for source in (*SOURCES, *space.own_sources()) if space.raw(source).is_dir()]
    made = space.sources_made()
    return [source for source in sources if source not in made]
