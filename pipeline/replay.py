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
from ..schemas.rotations import euler_to_matrix
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
            f"no episode of {root} is in {raw / 'tabletop.json'}: replay needs a dataset made from dpipe sample\n"
            "  next: for CALVIN, whole recordings:  dpipe convert calvin --cut play --name calvin-play"
        )
    actions, reader = _actions(root)
    distances: dict[str, list[NDArray[np.float64]]] = {control: [] for control in CONTROLS}
    successes = dict.fromkeys(CONTROLS, 0)
    succeeded = 0
    world = np.asarray(notes["world_from_tabletop"], np.float64)
    progress.begin("replay", len(chosen))
    for episode in chosen:
        note = notes["episodes"][dataset.episodes.source_id(episode)]
        succeeded += bool(note["success"])
        rows = range(
            int(dataset.episodes.first_index[episode]),
            int(dataset.episodes.first_index[episode]) + int(dataset.episodes.length[episode]),
        )
        own = _native(actions[rows.start : rows.stop], dataset)
        recorded = dataset.columns(["observation.state"], episode)
        for control in CONTROLS:
            success, distance = _roll_out(note, world, dataset, control_actions(own, control), recorded)
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
    return ReplayResult(root, reader, succeeded, table)


def control_actions(actions: NDArray[np.float64], control: str) -> NDArray[np.float64]:
    """[T, A] actions, the gripper last, with one deliberate mistake."""
    if control == "pairing one frame late":  # what pairing by the raw file's rows does
        return np.concatenate([actions[1:], actions[-1:]])
    if control == "pairing one frame early":
        return np.concatenate([actions[:1], actions[:-1]])
    if control == "gripper flipped":
        flipped = actions.copy()
        flipped[:, -1] *= -1
        return flipped
    return actions


def _roll_out(
    note: Mapping[str, Any],
    world: NDArray[np.float64],
    dataset: Dataset,
    actions: NDArray[np.float64],
    recorded: Mapping[str, NDArray[Any]],
) -> tuple[bool, NDArray[np.float64]]:
    """(success, distances [T] in metres from the recorded hand positions) of one open-loop run."""
    from ..samples.motion import record
    from ..samples.tabletop import FPS, Tabletop

    motion = record(note["seed"], note["objects"], image_size=8)
    table = Tabletop(note["objects"], image_size=8)
    table.reset(note["seed"])
    seen = table.set_state(motion.states[round(note["start_s"] * FPS)])
    kind = _conventions(dataset)["action"]
    drive = DRIVES[kind](dataset, world, recorded)
    hands = _recorded_hands(kind, recorded, world)
    distance = np.empty(len(hands))
    for t, action in enumerate(actions):
        distance[t] = np.linalg.norm(seen.ee_pos - hands[t])
        seen = drive(table, action)
    return table.success, distance


def _osc_pose_delta(
    dataset: Dataset, world: NDArray[np.float64], recorded: Mapping[str, NDArray[Any]]
) -> Any:
    """LIBERO: the simulator's own controller."""
    return lambda table, action: table.step(action)


def _ee_pose_delta(dataset: Dataset, world: NDArray[np.float64], recorded: Mapping[str, NDArray[Any]]) -> Any:
    """CALVIN: each difference is added to the previous target, as its environment does, and held to exactly."""
    unit = _conventions(dataset)["action_unit"]
    start = recorded["observation.state"][0].astype(np.float64)
    target = {"position": start[:3], "euler": start[3:6]}
    back = np.linalg.inv(world)

    def drive(table: Any, action: NDArray[np.float64]) -> Any:
        target["position"] = target["position"] + unit["position_m"] * action[:3]
        target["euler"] = target["euler"] + unit["rotation_rad"] * action[3:6]
        position = back[:3, :3] @ target["position"] + back[:3, 3]
        rotation = back[:3, :3] @ euler_to_matrix(target["euler"])
        return table.follow(position, rotation, action[6], 1 / dataset.fps)

    return drive


def _joint_pos_absolute(
    dataset: Dataset, world: NDArray[np.float64], recorded: Mapping[str, NDArray[Any]]
) -> Any:
    """AgiBot: the right arm's joints, which in simulated recordings are the Panda's."""
    from ..samples.panda import link_frames
    from ..samples.tabletop import BASE_POSITION

    def drive(table: Any, action: NDArray[np.float64]) -> Any:
        hand = link_frames(action[:7])[7]
        return table.follow(hand[:3, 3] + BASE_POSITION, hand[:3, :3], action[7], 1 / dataset.fps)

    return drive


DRIVES = {
    "osc_pose_delta": _osc_pose_delta,
    "ee_pose_delta": _ee_pose_delta,
    "joint_pos_absolute": _joint_pos_absolute,
}


def _recorded_hands(
    kind: str, recorded: Mapping[str, NDArray[Any]], world: NDArray[np.float64]
) -> NDArray[np.floating[Any]]:
    """[T, 3] hand positions of the recording in the tabletop's world."""
    state = recorded["observation.state"].astype(np.float64)
    if kind == "joint_pos_absolute":
        from ..samples.panda import link_frames
        from ..samples.tabletop import BASE_POSITION

        return np.stack([link_frames(joints)[7, :3, 3] + BASE_POSITION for joints in state[:, 7:14]])
    back = np.linalg.inv(world)
    return state[:, :3] @ back[:3, :3].T + back[:3, 3]


def _conventions(dataset: Dataset) -> Mapping[str, Any]:
    return (dataset.manifest or {}).get("conventions", {})


def _native(actions: NDArray[Any], dataset: Dataset) -> NDArray[np.float64]:
    """Actions as the simulator's robot takes them: arm values, then the gripper with -1 open and +1 close."""
    conventions = _conventions(dataset)
    if conventions.get("action") not in DRIVES:
        raise DataError(
            f"{dataset.root}: replay executes {', '.join(DRIVES)}; this dataset's action is "
            f"'{conventions.get('action', 'not declared')}'"
        )
    names = list(dataset.names("action"))
    if conventions["action"] == "joint_pos_absolute":
        arm = [names.index(f"right_arm_joint_{i}") for i in range(1, 8)]
        gripper = names.index("right_gripper")
    else:
        arm, gripper = list(range(6)), 6
    meaning = conventions["gripper_action"]
    middle = (meaning["open"] + meaning["close"]) / 2
    closing = (actions[:, gripper] > middle) == (meaning["close"] > middle)
    return np.concatenate([actions[:, arm].astype(np.float64), np.where(closing, 1.0, -1.0)[:, None]], axis=1)


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
