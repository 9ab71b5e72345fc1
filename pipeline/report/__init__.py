"""`dpipe report`: datasets and runs as one self-contained HTML page of pictures.

    numbers           the numbers behind the pictures, pure functions     dataset_section   a dataset
    svg, pictures     charts and photographs as markup                    targets_section   what was precomputed
    page              the document itself                                 runs_section      what was trained

The page asks the network for nothing and stays below 15 MB: one that grows beyond is made again with fewer and
smaller photographs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ...schemas.errors import DpipeError, UsageError
from ...streams.dataset import open_dataset
from ..durable import write_file
from ..status import workspace_states
from ..workspace import Workspace
from . import page
from .dataset_section import dataset_section
from .pictures import DETAILS, Detail
from .runs_section import run_folders, run_section

MOST_BYTES = 14_000_000


@dataclass(frozen=True)
class ReportMade:
    path: Path
    bytes: int
    datasets: int
    runs: int
    problems: tuple[str, ...]  # datasets that could not be opened, with the reason


def write_report(space: Workspace, named: Sequence[str], out: Path | None, force: bool = False) -> ReportMade:
    """A page of the datasets and runs named (by name or folder), or of everything in the workspace.

    A page of ours is written over, anything else only with `force`.
    """
    datasets, runs = _chosen(space, named)
    if not datasets and not runs:
        raise UsageError(
            f"nothing to report in {space.root}\n  next: dpipe convert SOURCE --to lerobot, or name a dataset"
        )
    path = out or space.root / "report.html"
    if path.is_dir():
        path = path / "report.html"
    if path.exists() and not force and not is_report(path):
        raise UsageError(f"{path} is there and is no dpipe report\n  next: choose another place with --out")
    problems: list[str] = []
    data = b""
    for detail in DETAILS:
        problems.clear()
        data = _page(space, datasets, runs, detail, problems).encode()
        if len(data) <= MOST_BYTES:
            break
    write_file(path, data)
    return ReportMade(path, len(data), len(datasets), len(runs), tuple(problems))


def is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        return f'name="generator" content="{page.GENERATOR}"'.encode() in file.read(2000)


def _chosen(space: Workspace, named: Sequence[str]) -> tuple[list[Path], list[Path]]:
    if not named:
        return space.datasets(), run_folders(space.root)
    datasets, runs = [], []
    for name in named:
        folder = next(
            (p for p in (Path(name), space.root / name, space.root / "runs" / name) if p.is_dir()), None
        )
        if folder is not None and (folder / "config.json").is_file() and not (folder / "meta").is_dir():
            runs.append(folder)
        elif folder is not None and folder.name == "lerobot" and not (folder / "meta").is_dir():
            datasets += Workspace(folder.parent).datasets()
        elif folder is not None and (folder / "lerobot").is_dir():
            datasets += Workspace(folder).datasets()
            runs += run_folders(folder)
        else:
            datasets.append(space.find_dataset(name))
    return datasets, runs


def _page(
    space: Workspace, datasets: Sequence[Path], runs: Sequence[Path], detail: Detail, problems: list[str]
) -> str:
    states = {state.path: state for state in workspace_states(space)}
    links, sections = [], []
    for root in datasets:
        anchor = _anchor("dataset", root.name)
        state = states.get(root)
        told = f"{state.state}: {state.detail}" if state is not None and state.state != "complete" else ""
        links.append((anchor, root.name))
        try:
            dataset = open_dataset(root)
            bases = [root / "dpipe" / "targets", space.targets(root.name)]
            sections.append(dataset_section(dataset, anchor, bases, told, detail))
        except DpipeError as error:
            problems.append(f"{root.name}: {str(error).splitlines()[0]}")
            sections.append(
                f'<section id="{page.text(anchor)}"><h2>{page.text(root.name)}</h2>'
                f"<pre class=bad>{page.text(error)}</pre></section>"
            )
    for folder in runs:
        anchor = _anchor("run", f"{folder.parent.name}-{folder.name}")
        links.append((anchor, f"run {folder.parent.name} {folder.name}"))
        sections.append(run_section(folder, anchor))
    title = datasets[0].name if len(datasets) == 1 else space.root.name or "workspace"
    counted = [f"{len(datasets)} datasets" if len(datasets) != 1 else "1 dataset"] if datasets else []
    counted += [f"{len(runs)} runs" if len(runs) != 1 else "1 run"] if runs else []
    intro = f"<p class=soft>{' and '.join(counted)}</p>"
    foot = (
        f"Made by dpipe report on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Nothing on this page was fetched."
    )
    return page.page(title, intro, links, sections, foot)


def _anchor(kind: str, name: str) -> str:
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}"
