"""What a dataset is, in words: the one place the card (README.md) and the report are written from.

Of a dataset of ours everything comes from its manifest; of another's, what its info.json says, and "not told"
stays untold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schemas.episode import Dropped

if TYPE_CHECKING:
    from ..streams.dataset import Dataset

NOTES = {
    "libero": (
        "To compare with the published set of 1,693 episodes and 273,465 frames (labelled 10 fps, recorded at 20): "
        "it holds the four 10-task suites, replayed without no-ops in the simulator at 256 x 256, failed replays "
        "left out, turned by 180 degrees. Regenerate with openvla-oft's script, then convert that; `--drop-noops` "
        "on raw files drops the same rows without replaying the rest."
    ),
    "egodex": (
        "EgoDex is licensed CC BY-NC-ND: no derivatives. Keep this copy to yourself; dpipe uploads nothing unasked."
    ),
    "agibot": "AgiBot World is licensed CC BY-NC-SA 4.0: what is made from it carries the same licence.",
}

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FeatureFact:
    name: str
    names: tuple[str, ...]
    unit: str
    frame: str
    description: str


@dataclass(frozen=True)
class Facts:
    """Plain text throughout: whoever writes it down escapes it for Markdown or HTML."""

    name: str
    source: str
    licence: str
    summary: str
    episodes: int
    frames: int
    fps: int
    tasks: tuple[str, ...]
    conventions: Rows
    features: tuple[FeatureFact, ...]
    cameras: Rows
    sidecar: tuple[FeatureFact, ...]
    splits: Rows
    conversion: Rows
    note: str
    warnings: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    citation: str


def facts_of_manifest(
    manifest: Mapping[str, Any], tasks: Sequence[str], dropped: Sequence[Dropped] = ()
) -> Facts:
    totals, body = manifest["totals"], manifest["embodiment"]
    summary = (
        f"{totals['episodes']:,} episodes, {totals['frames']:,} frames, {totals['tasks']} instructions, robot "
        f"`{body['robot_type']}`, {body['fps']} fps ({body['fps_origin']}). LeRobot v3.0, converted from "
        f"{manifest['source']} by dpipe; `dpipe/manifest.json` has the whole recipe."
    )
    options = {**manifest["options"], **manifest["video"], "converter version": manifest["converter_version"]}
    cameras = tuple(
        (f"observation.images.{key}", f"{height} x {width} RGB video")
        for key, (height, width) in manifest["cameras"].items()
    )
    return Facts(
        name=manifest["name"],
        source=manifest["source"],
        licence=manifest["licence"],
        summary=summary,
        episodes=totals["episodes"],
        frames=totals["frames"],
        fps=int(body["fps"]),
        tasks=tuple(tasks),
        conventions=_rows(manifest["conventions"]),
        features=_features(body["features"]),
        cameras=cameras,
        sidecar=_features(body["sidecar"]),
        splits=tuple((split, f"episodes {where}") for split, where in manifest["splits"].items()),
        conversion=_rows(options),
        note=NOTES.get(manifest["source"], ""),
        warnings=tuple(manifest["warnings"]),
        dropped=tuple(dropped),
        citation=body["citation"],
    )


def facts_of(dataset: Dataset) -> Facts:
    """Of an opened dataset, whoever wrote it."""
    if dataset.own_manifest is not None:
        return facts_of_manifest(dataset.own_manifest, dataset.tasks, read_dropped(dataset.root))
    features = tuple(
        FeatureFact(name, dataset.names(name), "", "", str(told["dtype"]))
        for name, told in dataset.features.items()
        if name in dataset.vectors
    )
    cameras = tuple(
        (camera, "{} x {} RGB {}".format(*dataset.camera_size(camera), dataset.features[camera]["dtype"]))
        for camera in dataset.cameras
    )
    summary = (
        f"{len(dataset):,} episodes, {dataset.total_frames:,} frames, {len(dataset.tasks)} instructions, robot "
        f"`{dataset.info.get('robot_type') or 'not told'}`, {dataset.fps} fps (by info.json). LeRobot "
        f"{dataset.info['codebase_version']}, not written by dpipe."
    )
    splits = tuple((name, f"episodes {a}:{b}") for name, (a, b) in dataset.splits.items())
    return Facts(
        name=dataset.name,
        source="",
        licence=_front_matter_licence(dataset.root / "README.md"),
        summary=summary,
        episodes=len(dataset),
        frames=dataset.total_frames,
        fps=dataset.fps,
        tasks=tuple(dataset.tasks),
        conventions=(),
        features=features,
        cameras=cameras,
        sidecar=(),
        splits=splits,
        conversion=(),
        note="",
        warnings=(),
        dropped=(),
        citation="",
    )


def read_dropped(root: Path) -> list[Dropped]:
    """Episodes a conversion left out, from dpipe/dropped.jsonl."""
    path = root / "dpipe" / "dropped.jsonl"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        found.append(
            Dropped(
                told["source_id"],
                tuple(told["files"]),
                told["reason"],
                told["remedy"],
                told.get("split", ""),
            )
        )
    return found


def words(name: str) -> str:
    return name.replace("_", " ")


def value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(k))} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return str(value)


def _rows(told: Mapping[str, Any]) -> Rows:
    return tuple((words(name), value_text(value)) for name, value in told.items())


def _features(told: Mapping[str, Mapping[str, Any]]) -> tuple[FeatureFact, ...]:
    return tuple(
        FeatureFact(
            name,
            tuple(map(str, each["names"])),
            each.get("unit", ""),
            each.get("frame", ""),
            each.get("description", ""),
        )
        for name, each in told.items()
    )


def _front_matter_licence(card: Path) -> str:
    """`license:` of a Hugging Face card, "" where there is none."""
    if not card.is_file():
        return ""
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:60]:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key.strip() == "license":
            return value.strip().strip("\"'")
    return ""
