"""`dpipe status`: every dataset, target and run of a workspace, complete, partial or stale, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..schemas.errors import DpipeError
from ..streams.dataset import Dataset, open_dataset
from .workspace import Workspace


@dataclass(frozen=True)
class State:
    """One line of the table. `state` is complete, partial, stale or unreadable."""

    kind: str
    name: str
    state: str
    detail: str
    path: Path


def workspace_states(space: Workspace) -> list[State]:
    return [*_datasets(space), *_runs(space)]


def _datasets(space: Workspace) -> Iterator[State]:
    for root in space.datasets():
        manifest = root / "dpipe" / "manifest.json"
        if not manifest.is_file() and (root / "dpipe" / "journal").is_dir():
            done, total = _journal_counts(root)
            detail = f"{done} of {total} parts done; run the same dpipe convert again"
            yield State("dataset", root.name, "partial", detail, root)
            continue
        try:
            dataset = open_dataset(root)
        except DpipeError as error:
            yield State("dataset", root.name, "unreadable", str(error).splitlines()[0], root)
            continue
        detail = f"{len(dataset)} episodes, {dataset.total_frames} frames"
        if dataset.manifest:
            detail += f", {dataset.manifest.get('dropped', 0)} left out"
            stale = _order_ahead(root, dataset.manifest)
            if stale:
                yield State("dataset", root.name, "partial", f"{detail}; {stale}", root)
                yield from _targets(space, root, dataset)
                continue
        yield State("dataset", root.name, "complete", detail, root)
        yield from _targets(space, root, dataset)


def _journal_counts(root: Path) -> tuple[int, int]:
    journal = root / "dpipe" / "journal"
    total = sum(len(json.loads(path.read_text())["parts"]) for path in journal.glob("order-*.json"))
    return len(list((journal / "parts").glob("part-*.json"))), total


def _order_ahead(root: Path, manifest: dict[str, Any]) -> str:
    """Parts listed by a later run that has not finished."""
    done, total = _journal_counts(root)
    known = {part["part"] for part in manifest.get("parts", [])}
    waiting = total - len(known) - done
    spool = root / "dpipe" / "spool"
    if done or spool.is_dir():
        return f"a later run added episodes and has not finished ({max(waiting, 0)} parts to do)"
    return ""


def _targets(space: Workspace, root: Path, dataset: Dataset) -> Iterator[State]:
    contents: set[str] | None = None
    for base in (root / "dpipe" / "targets", space.targets(root.name)):
        for folder in sorted(base.glob("*/*")) if base.is_dir() else []:
            name = f"{root.name} {folder.parent.name} {folder.name}"
            if not (folder / "contract.json").is_file():
                yield State("target", name, "partial", "run the same dpipe precompute again", folder)
                continue
            contents = contents if contents is not None else set(dataset.contents())
            lacking = len(contents - _bound(folder))
            if lacking:
                detail = f"{lacking} episodes have no rows; run dpipe precompute {folder.parent.name}"
                yield State("target", name, "stale", detail, folder)
            else:
                yield State("target", name, "complete", f"{len(contents)} episodes", folder)


def _bound(folder: Path) -> set[str]:
    from .tables import read_columns

    index = folder / "episodes.parquet"
    return set(read_columns(index, ["content"]).column("content").to_pylist()) if index.is_file() else set()


def _runs(space: Workspace) -> Iterator[State]:
    for folder in sorted((space.root / "runs").glob("*/*")):
        if not (folder / "config.json").is_file():
            continue
        name = f"{folder.parent.name} {folder.name}"
        result = folder / "result.json"
        if result.is_file():
            told = json.loads(result.read_text())
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in told.get("metrics", {}).items())
            yield State("run", name, "complete", f"{told['steps']} steps, {numbers}", folder)
        else:
            steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
            detail = f"last checkpoint {steps[-1] if steps else 'none'}; run the same dpipe train again"
            yield State("run", name, "partial", detail, folder)
