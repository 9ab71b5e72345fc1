"""Datasets grouped by what may be mixed without a word: embodiment, action convention and fps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..schemas.errors import UsageError
from ..streams.dataset import Dataset, open_dataset


@dataclass(frozen=True)
class Group:
    """Datasets that one policy can learn from as they are."""

    embodiment: str
    action: str
    fps: int
    datasets: tuple[Path, ...]
    frames: int

    @property
    def title(self) -> str:
        return f"{self.embodiment}, action {self.action}, {self.fps} fps"


def group_datasets(roots: Sequence[Path]) -> list[Group]:
    """Groups in the order of their first dataset."""
    found: dict[tuple[str, str, int], list[Dataset]] = {}
    for root in roots:
        dataset = open_dataset(root)
        found.setdefault(_signature(dataset), []).append(dataset)
    return [
        Group(*signature, tuple(d.root for d in datasets), sum(d.total_frames for d in datasets))
        for signature, datasets in found.items()
    ]


def one_group(groups: Sequence[Group], recipe: str) -> Group:
    """The only group; UsageError listing the groups and the exact commands where there are several."""
    if len(groups) == 1:
        return groups[0]
    lines = [f"{recipe} learns one embodiment at a time; the workspace holds {len(groups)}:"]
    for group in groups:
        names = ", ".join(root.name for root in group.datasets)
        lines.append(f"    {names}: {group.title}, {group.frames:,} frames")
        lines.append(f"        dpipe train {recipe} --dataset {group.datasets[0].name}")
    lines.append(f"  or mix them through the unified vector:  dpipe train {recipe} --mix unified")
    lines.append(f"  or name them in dpipe.toml:  [train.{recipe}] datasets = [...]")
    raise UsageError("\n".join(lines))


def _signature(dataset: Dataset) -> tuple[str, str, int]:
    """What must agree: name of the embodiment, meaning and names of the action, fps."""
    manifest: dict[str, Any] = dataset.manifest or {}
    body = manifest.get("embodiment", {})
    embodiment = body.get("name") or str(dataset.info.get("robot_type") or dataset.name)
    conventions = manifest.get("conventions", {})
    action = conventions.get("action", "as recorded")
    gripper = conventions.get("gripper_action")
    if isinstance(gripper, Mapping):
        action += ", gripper " + " ".join(f"{name} {value:g}" for name, value in sorted(gripper.items()))
    dims = "x".join(str(d) for d in dataset.features.get("action", {}).get("shape", []))
    return embodiment, f"{action}, {dims} numbers", dataset.fps
