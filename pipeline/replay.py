"""`dpipe replay`: converted actions executed open loop in the tabletop simulator, beside deliberate mistakes.

The proof that a dataset's conventions are right. Actions are read back through lerobot's own reader; each
episode's scene is restored at its first frame; success and the distance between the simulated hand and the
recorded state are measured. Controls shift the pairing by one frame and flip the gripper: a replay that they do
not harm would prove nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas.errors import DataError
from ..streams.dataset import Dataset, open_dataset
from .progress import Progress

CONTROLS = ("as converted", "pairing one frame late", "pairing one frame early", "gripper flipped")


@dataclass(frozen=True)
class ReplayRow:
    """One line of the table: how the episodes fared with their actions treated so."""

    control: str
    episodes: int
    successes: int
    state_error_mm: float  # mean distance of the hand from the recorded state, over frames and episodes
    worst_mm: float


@dataclass(frozen=True)
class ReplayResult:
    dataset: Path
    reader: str
    recorded_successes: int  # of the same episodes, as the recording's own notes say
    rows: tuple[ReplayRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "dataset": str(self.dataset),
            "reader": self.reader,
            "recorded_successes": self.recorded_successes,
            "rows": [vars(row) for row in self.rows],
        }

    def to_text(self) -> str:
        """The table as Markdown."""
        lines = ["| actions | success | mean distance from the recording | worst |", "|---|---|---|---|"]
        for row in self.rows:
            lines.append(
                f"| {row.control} | {row.successes}/{row.episodes} | {row.state_error_mm:.2f} mm "
                f"| {row.worst_mm:.1f} mm |"
            )
        return "\n".join(lines)


def replay(root: Path, raw: Path, limit: int | None, progress: Progress) -> ReplayResult:
    """Replay episodes of a dataset made from `dpipe sample`; `raw` is the folder with its tabletop.json."""
    dataset = open_dataset(root)
    notes = _notes(dataset, raw)
    chosen = [e for e in range(len(dataset)) if dataset.episodes.source_id(e) in notes["episodes"]][:limit]
    if not chosen:
        raise DataError(
            f"no episode of {root} is in {raw / 'tabletop.json'}: replay needs a dataset made from dpipe sample"
        )
    actions, reader = _actions(root)
    distances: dict[str, list[NDArray[np.float64]]] = {control: [] for control in CONTROLS}
    successes = dict.fromkeys(CONTROLS, 0)
    recorded = 0
    progress.begin("replay", len(chosen))
    for episode in chosen:
        note = notes["episodes"][dataset.episodes.source_id(episode)]
        recorded += bool(note["success"])
        rows = range(
            int(dataset.episodes.first_index[episode]),
            int(dataset.episodes.first_index[episode]) + int(dataset.episodes.length[episode]),
        )
        own = _native(actions[rows.start : rows.stop], dataset)
        seen = dataset.columns(["observation.state"], episode)["observation.state"][:, :3]
        for control in CONTROLS:
            success, distance = _roll_out(note, notes["fps"], control_actions(own, control), seen)
            successes[control] += success
            distances[control].append(distance)
        progress.advance(1, len(rows))
    progress.end()
    table = tuple(
        ReplayRow(
            control,
            len(chosen),
            successes[control],
            float(np.concatenate(distances[control]).mean() * 1e3),
            float(np.concatenate(distances[control]).max() * 1e3),
        )
        for control in CONTROLS
    )
    return ReplayResult(root, reader, recorded, table)


def control_actions(actions: NDArray[np.float64], control: str) -> NDArray[np.float64]:
    """[T, 7] actions with one deliberate mistake."""
    if control == "pairing one frame late":  # what pairing by the raw file's rows does
        return np.concatenate([actions[1:], actions[-1:]])
    if control == "pairing one frame early":
        return np.concatenate([actions[:1], actions[:-1]])
    if control == "gripper flipped":
        flipped = actions.copy()
        flipped[:, 6] *= -1
        return flipped
    return actions


def _roll_out(
    note: Mapping[str, Any], fps: int, actions: NDArray[np.float64], recorded: NDArray[Any]
) -> tuple[bool, NDArray[np.float64]]:
    """(success, distances [T] in metres from the recorded hand positions) of one open-loop run."""
    from ..samples.motion import record
    from ..samples.tabletop import FPS, Tabletop

    motion = record(note["seed"], note["objects"], image_size=8)
    table = Tabletop(note["objects"], image_size=8)
    table.reset(note["seed"])
    seen = table.set_state(motion.states[round(note["start_s"] * FPS)])
    distance = np.empty(len(recorded))
    for t, action in enumerate(actions):
        distance[t] = np.linalg.norm(seen.ee_pos - recorded[t])
        seen = table.step(action)
    return table.success, distance


def _native(actions: NDArray[Any], dataset: Dataset) -> NDArray[np.float64]:
    """Actions as the simulator takes them, by the conventions the dataset declares."""
    conventions = (dataset.manifest or {}).get("conventions", {})
    if conventions.get("action") != "osc_pose_delta":
        raise DataError(
            f"{dataset.root}: replay executes OSC pose deltas, this dataset's action is "
            f"'{conventions.get('action', 'not declared')}'"
        )
    native = actions.astype(np.float64)
    meaning = conventions["gripper_action"]
    native[:, 6] = np.where(np.isclose(native[:, 6], meaning["close"]), 1.0, -1.0)
    return native


def _actions(root: Path) -> tuple[NDArray[Any], str]:
    """Every action row, through lerobot's own reader where it is installed."""
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError:
        dataset = open_dataset(root)
        return dataset.all_columns(["action"])["action"], "dpipe (lerobot is not installed)"
    rows = LeRobotDataset(f"local/{root.name}", root=root).hf_dataset.with_format("numpy")
    return np.asarray(rows["action"][:], np.float32), "lerobot"


def _notes(dataset: Dataset, raw: Path) -> dict[str, Any]:
    path = raw / "tabletop.json"
    if not path.is_file():
        raise DataError(
            f"replay restores scenes of the tabletop simulator and finds no notes on them\n"
            f"  expected: {path}, written by dpipe sample\n"
            f"  next: name the raw folder of {dataset.root.name} with --raw"
        )
    return json.loads(path.read_text())
