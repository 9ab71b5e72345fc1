"""One demonstration on the tabletop, as every raw format's writer takes it.

The motion is continuous: between the simulator's 20 Hz samples the joints and the fingers go straight, and the
hand is where the joints put it. Two formats of different rates therefore agree exactly wherever their frames
fall on the same moment (every 0.1 s for 20 and 30 Hz).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .expert import Expert
from .panda import Array, link_frames, rotvec_between, rotvec_to_matrix
from .render import Scene
from .tabletop import (
    BASE_POSITION,
    FINGER_OPEN_M,
    FPS,
    GOALS,
    OBJECT_AREA_CENTRE,
    TABLE_Z,
    Observation,
    Tabletop,
    Task,
)

FUMBLES = 0.3
SETTLE_STEPS = 5  # LIBERO cuts the first five steps of every teleoperation, so no recording starts at 0 s
SEEDS_FILE = "tabletop.json"
HOLD_OPEN = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])


@dataclass(frozen=True)
class Motion:
    """T actions between T + 1 moments: `actions[t]` leads from `states[t]`, `seen[t]` to the next."""

    seed: int
    task: Task
    success: bool
    states: Array  # [T + 1, S]
    seen: tuple[Observation, ...]  # T + 1
    actions: Array  # [T, 7]
    phases: tuple[str, ...]  # T

    @property
    def instruction(self) -> str:
        return self.task.instruction

    @property
    def segments(self) -> "tuple[Stretch, ...]":
        """The two halves of the task, sharing their border: the object is taken, then brought and left."""
        body = self.task.bodies[self.task.target]
        taken = self.phases.index("carry") if "carry" in self.phases else len(self.phases)
        return (
            Stretch(0, taken, f"pick up the {body.colour} {body.shape}", "Pick"),
            Stretch(taken, len(self.phases), GOALS[self.task.container], "Place"),
        )


@dataclass(frozen=True)
class Stretch:
    """Steps [start, stop) of a motion at the simulator's rate, with words of its own."""

    start: int
    stop: int
    text: str
    skill: str


@dataclass(frozen=True)
class Frames:
    """A motion seen at another rate: F moments from the first, `time_s` = index / fps."""

    fps: int
    joint_pos: Array  # [F, 7] rad
    ee_pos: Array  # [F, 3] m, tabletop world
    ee_rot: Array  # [F, 3, 3]
    finger: Array  # [F] m from the middle to each pad
    command: Array  # [F] the gripper command last given: -1 open, +1 close
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        return len(self.finger)

    def first(self, count: int) -> "Frames":
        """Its first `count` frames."""
        return Frames(
            self.fps,
            self.joint_pos[:count],
            self.ee_pos[:count],
            self.ee_rot[:count],
            self.finger[:count],
            self.command[:count],
            self.scenes[:count],
        )


def start(table: Tabletop, seed: int) -> Observation:
    """Bring a table to the first moment of the seed's motion: reset, then the steps that no format keeps.

    Every third motion starts low over the table with the fingers anywhere, as after a fumble: an imitator that
    has seen no such moment cannot get out of one.
    """
    seen = table.reset(seed)
    rng = np.random.default_rng([seed, 0x57A7])
    if rng.random() < FUMBLES:
        for _ in range(20):
            spot = OBJECT_AREA_CENTRE + rng.uniform(-0.10, 0.10, 2)
            gaps = np.abs(seen.scene.object_pos[:, :2] - spot)
            if ((gaps[:, 0] > 0.045) | (gaps[:, 1] > 0.085)).all():  # no finger stands in an object
                place = np.array([*spot, TABLE_Z + rng.uniform(0.015, 0.05)])
                seen = table.place_hand(place, seen.scene.hand_rot, float(rng.uniform(0.0, FINGER_OPEN_M)))
                break
        still = HOLD_OPEN * 0.0
    else:
        still = HOLD_OPEN
    for _ in range(SETTLE_STEPS):
        seen = table.step(still)
    return seen


def record(seed: int, objects: int = 3, image_size: int = 128, clumsy: bool = False) -> Motion:
    """The expert's episode of a seed. A `clumsy` one lets go of the object on its way and so fails."""
    table = Tabletop(objects, image_size)
    seen = [start(table, seed)]
    expert = Expert(table, seed)
    states, actions, phases = [table.state()], [], []
    while True:
        step = expert.act(seen[-1])
        dropped = clumsy and phases.count("carry") >= 4
        if step.finished or (dropped and phases[-6:] == ["drop"] * 6):
            break
        action = HOLD_OPEN if dropped else step.action
        seen.append(table.step(action))
        states.append(table.state())
        actions.append(action)
        phases.append("drop" if dropped else step.phase)
    return Motion(
        seed, table.task, table.success, np.array(states), tuple(seen), np.array(actions), tuple(phases)
    )


def resample(motion: Motion, fps: int) -> Frames:
    """The motion at `fps`, from its first moment to the last frame that lies within it.

    Positions in the simulator's samples are exact fractions, so that a frame which falls on a sample is that
    sample to the bit.
    """
    last = len(motion.actions)
    joints, fingers, commands, scenes = [], [], [], []
    positions, rotations = [], []
    for k in range(last * fps // FPS + 1):
        at = Fraction(k * FPS, fps)
        i = min(int(at), last)
        share = float(at - i)
        now, then = motion.seen[i], motion.seen[min(i + 1, last)]
        scene = _between(now, then, share) if share else now.scene
        joints.append(now.joint_pos + share * (then.joint_pos - now.joint_pos))
        fingers.append(scene.finger)
        given = i if share else i - 1  # the command of a step is given at its start, in force after it
        commands.append(motion.actions[given, 6] if given >= 0 else HOLD_OPEN[6])
        scenes.append(scene)
        positions.append(scene.hand_pos)
        rotations.append(scene.hand_rot)
    return Frames(
        fps,
        np.array(joints),
        np.array(positions),
        np.array(rotations),
        np.array(fingers),
        np.array(commands),
        tuple(scenes),
    )


def _between(now: Observation, then: Observation, share: float) -> Scene:
    """The scene part of the way from one sample to the next; the hand is where the joints put it."""
    a, b = now.scene, then.scene
    links = link_frames(now.joint_pos + share * (then.joint_pos - now.joint_pos))
    turned = [
        rotvec_to_matrix(share * rotvec_between(old, new)) @ old
        for old, new in zip(a.object_rot, b.object_rot, strict=True)
    ]
    return replace(
        a,
        object_pos=a.object_pos + share * (b.object_pos - a.object_pos),
        object_rot=np.array(turned),
        hand_pos=links[7, :3, 3] + BASE_POSITION,
        hand_rot=links[7, :3, :3],
        finger=a.finger + share * (b.finger - a.finger),
        elbow_pos=links[3, :3, 3] + BASE_POSITION,
        wrist_pos=links[5, :3, 3] + BASE_POSITION,
    )


def split_off(episodes: int, every: int) -> list[bool]:
    """Which of the episodes are held out: every `every`-th, and at least one of two or more; 0 for none."""
    if not every or episodes < 2:
        return [False] * episodes
    held = [i % every == every - 1 for i in range(episodes)]
    return held if any(held) else [*held[:-1], True]


def write_seeds(
    raw: Path, fps: int, world_from_tabletop: Array, episodes: Mapping[str, Mapping[str, Any]]
) -> None:
    """`tabletop.json` beside the recordings: what the simulator needs to restore each episode's scene.

    Per episode the seed, the number of objects, its frames and `start_s`, the time of its first frame in the
    motion; `world_from_tabletop` [4, 4] takes the tabletop's coordinates to the format's own.
    """
    content = {"fps": fps, "world_from_tabletop": world_from_tabletop.tolist(), "episodes": episodes}
    raw.mkdir(parents=True, exist_ok=True)
    (raw / SEEDS_FILE).write_text(json.dumps(content, indent=1) + "\n")


def seeds_by_task(
    episodes: int, seed: int, tasks: int | None = None, objects: int = 3
) -> dict[str, list[int]]:
    """Instruction -> its episodes' seeds, counted up from `seed`, instructions in the order first met.

    With `tasks`, only that many instructions, each with an equal share of the episodes.
    """
    table = Tabletop(objects, image_size=8)
    share = -(-episodes // tasks) if tasks else episodes
    chosen: dict[str, list[int]] = {}
    for candidate in _count_from(seed):
        if sum(map(len, chosen.values())) == episodes:
            break
        table.reset(candidate)
        known = table.instruction in chosen
        if tasks and (
            (not known and len(chosen) == tasks) or (known and len(chosen[table.instruction]) == share)
        ):
            continue
        chosen.setdefault(table.instruction, []).append(candidate)
    return chosen


def _count_from(seed: int) -> Iterator[int]:
    while True:
        yield seed
        seed += 1


def is_no_op(action: Array, last_kept: Array | None) -> bool:
    """OpenVLA's rule: no motion, and the gripper's command as in the last action kept."""
    still = float(np.linalg.norm(action[:6])) < 1e-4
    return still and (last_kept is None or action[6] == last_kept[6])
