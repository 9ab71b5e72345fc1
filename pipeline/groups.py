"""Datasets grouped by what may be mixed without a word: embodiment, action convention and fps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.episode import Embodiment
from ..schemas.errors import UsageError
from ..streams.dataset import Dataset, open_dataset

if TYPE_CHECKING:
    from .progress import Progress
    from .request import ConvertRequest


@dataclass(frozen=True)
class Group:
    """Datasets that one policy can learn from as they are."""

    embodiment: str
    action: str
    fps: int
    datasets: tuple[Path, ...]  # of those not converted yet: where they would be
    frames: int
    planned: bool = False  # whether one of them is not converted yet

    @property
    def title(self) -> str:
        return f"{self.embodiment}, action {self.action}, {self.fps} fps"


Signature = tuple[str, str, int]


def group_datasets(roots: Sequence[Path], planned: Iterable[tuple[Path, Signature, int]] = ()) -> list[Group]:
    """Groups in the order of their first dataset; `planned` are those to come (see `plan_dataset`)."""
    found: dict[Signature, list[tuple[Path, int, bool]]] = {}
    for root in roots:
        dataset = open_dataset(root)
        found.setdefault(_signature(dataset), []).append((dataset.root, dataset.total_frames, False))
    for root, signature, frames in planned:
        found.setdefault(signature, []).append((root, frames, True))
    return [
        Group(
            *signature,
            tuple(root for root, _, _ in members),
            sum(frames for _, frames, _ in members),
            any(new for _, _, new in members),
        )
        for signature, members in found.items()
    ]


def plan_datasets(request: ConvertRequest, progress: Progress) -> list[tuple[Path, Signature, int]]:
    """(root, signature, frames) of every dataset a conversion would make, from its scan alone."""
    from ..converters import load_converter
    from .convert import by_variant, read_catalog

    catalog, converter = read_catalog(request, progress), load_converter(request.source)
    return [
        (each.out, signature_of(converter.embodiment_of(each.raw, each.options, each.variant)), frames)
        for each in by_variant(request, catalog)
        if (frames := sum(ref.frames for ref in catalog.of(each.variant).refs))
    ]


def stop_at_several(groups: Sequence[Group], recipe: str, mixing_problem: str) -> None:
    """UsageError listing the groups and the exact commands, where there are several and the recipe cannot mix them.

    `mixing_problem` says why not; "" where it can.
    """
    if len(groups) < 2 or not mixing_problem:
        return
    lines = [f"{recipe} learns one embodiment at a time; the workspace holds {len(groups)}:"]
    for group in groups:
        names = ", ".join(root.name for root in group.datasets)
        still = ", not converted yet" if group.planned else ""
        lines.append(f"    {names}: {group.title}, {group.frames:,} frames{still}")
        lines += [f"        dpipe train {recipe} --dataset {root.name}" for root in group.datasets]
    lines.append(f'  or name it in dpipe.toml:  [train.{recipe}] datasets = ["{groups[0].datasets[0].name}"]')
    lines.append(f"  {recipe} --mix unified: {mixing_problem}")
    lines.append("  dial does mix them through the unified vector:  dpipe train dial")
    raise UsageError("\n".join(lines))


def signature_of(embodiment: Embodiment) -> Signature:
    """The signature of the datasets a converter makes."""
    action = next((f for f in embodiment.features if f.name == "action"), None)
    dims = str(action.dim) if action else ""
    return _signed(embodiment.name, embodiment.conventions, dims, embodiment.fps)


def _signature(dataset: Dataset) -> Signature:
    """What must agree: name of the embodiment, meaning and names of the action, fps."""
    manifest: dict[str, Any] = dataset.manifest or {}
    body = manifest.get("embodiment", {})
    name = body.get("name") or str(dataset.info.get("robot_type") or dataset.name)
    dims = "x".join(str(d) for d in dataset.features.get("action", {}).get("shape", []))
    return _signed(name, manifest.get("conventions", {}), dims, dataset.fps)


def _signed(name: str, conventions: Mapping[str, Any], dims: str, fps: int) -> Signature:
    action = str(conventions.get("action", "as recorded"))
    gripper = conventions.get("gripper_action")
    if isinstance(gripper, Mapping):
        action += ", gripper " + " ".join(f"{word} {value:g}" for word, value in sorted(gripper.items()))
    action += "".join(f", {word} {conventions[word]}" for word in ("layout", "frame") if word in conventions)
    return name, f"{action}, {dims} numbers", fps
