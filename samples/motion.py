"""One demonstration on the tabletop, as every raw format's writer takes it.

The motion is continuous: between the simulator's 20 Hz samples the joints and the fingers go straight, and the
hand is where the joints put it. Two formats of different rates therefore agree exactly wherever their frames
fall on the same moment (every 0.1 s for 20 and 30 Hz).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .expert import Expert
from .panda import Array
from .tabletop import Observation, Tabletop, Task

SETTLE_STEPS = 5  # LIBERO cuts the first five steps of every teleoperation, so no recording starts at 0 s
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


def record(seed: int, objects: int = 3, image_size: int = 128, clumsy: bool = False) -> Motion:
    """The expert's episode of a seed. A `clumsy` one lets go of the object on its way and so fails."""
    table = Tabletop(objects, image_size)
    seen = [table.reset(seed)]
    for _ in range(SETTLE_STEPS):
        seen = [table.step(HOLD_OPEN)]
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


def is_no_op(action: NDArray[np.float64], last_kept: NDArray[np.float64] | None) -> bool:
    """OpenVLA's rule: no motion, and the gripper's command as in the last action kept."""
    still = float(np.linalg.norm(action[:6])) < 1e-4
    return still and (last_kept is None or action[6] == last_kept[6])
