"""The tabletop's scripted expert: approach, descend, grasp, lift, carry, place, release, retreat.

The action is a function of what can be seen, as far as it can be, so that a policy can learn it from one
image and the robot's state: which phase it is in follows from where the hand, the fingers and the named
object are, and the hand heads for one goal pose whose height falls as it comes above its mark. Only the
slow sway of the path and the pauses (exact no-ops, as teleoperators leave them) come from the seed.
"""

import math
from dataclasses import dataclass

import numpy as np

from .panda import Array, rotvec_between, rotvec_to_matrix
from .tabletop import (
    FINGER_OPEN_M,
    INSIDE_M,
    OBJECT_HALF_M,
    POSITION_SCALE_M,
    ROTATION_SCALE_RAD,
    TABLE_Z,
    Observation,
    Tabletop,
)

ACTION_LIMIT = 0.9375  # the largest value seen in LIBERO's position actions
ROTATION_LIMIT = 0.375  # and in its rotation actions
CRUISE = 0.7  # along the table: about 1 cm per step
HOVER_M = 0.085  # grip site above the grasp while looking for the mark
CARRY_M = 0.085  # of the grip site above the grasp: the object clears its neighbours
RETREAT_M = 0.075
PLACE_M = 0.014  # an object is let go this far above the container
# The hand aims this far below the height where it closes or opens, and so passes it at speed: a policy that
# imitates a motion which only creeps up on its mark stops short of it and never acts.
THROUGH_M = 0.008
ALIGNED_M = 0.006
LEAN_RAD = 0.15
FUNNEL_M = 0.030  # the hand comes down within this distance of its mark
DOWN = np.diag([1.0, -1.0, -1.0])


@dataclass(frozen=True)
class Step:
    """What the expert wants now: the action, and the phase it belongs to."""

    action: Array  # [7]
    phase: str
    finished: bool


class Expert:
    """One demonstration. Call `act` with the newest observation until it says it has finished."""

    def __init__(self, table: Tabletop, seed: int, sway: float = 0.12) -> None:
        """`sway` is the size of the path's slow wandering, in action units."""
        rng = np.random.default_rng([seed, 0xE7])
        self._table = table
        self._rng = rng
        self._sway_size = sway
        self._sway = np.zeros(6)
        self._gain = float(rng.uniform(0.65, 0.8))
        self._height = float(rng.uniform(-0.008, 0.008))
        # How long to pause on reaching the mark, once the object is held, and once it is let go.
        pauses = rng.integers(0, 3, 3)
        pauses[int(rng.integers(3))] += 1
        self._pauses: dict[str, int] = dict(zip(("descend", "lift", "retreat"), pauses.tolist(), strict=True))
        self._phase = "approach"
        self._grip = -1.0

    def act(self, seen: Observation) -> Step:
        goal_pos, goal_rot, grip, phase = self._aim(seen)
        finished = phase == "retreat" and seen.ee_pos[2] > goal_pos[2] - 0.012
        self._phase = phase
        action = np.zeros(7)
        action[6] = grip
        if self._pauses.get(phase, 0) > 0 and grip == self._grip:
            self._pauses[phase] -= 1
            return Step(action, phase, False)
        self._grip = grip
        rotation = seen.scene.hand_rot
        action[:3] = self._gain * (goal_pos - seen.ee_pos) / POSITION_SCALE_M
        action[:2] = np.clip(action[:2], -CRUISE, CRUISE)
        action[3:6] = rotvec_between(rotation, goal_rot) / ROTATION_SCALE_RAD
        # An Ornstein-Uhlenbeck wander that dies out near the mark, so that aim is never spoilt.
        self._sway = 0.8 * self._sway + 0.6 * self._sway_size * self._rng.standard_normal(6)
        far = min(1.0, max(0.0, float(np.linalg.norm(goal_pos[:2] - seen.ee_pos[:2])) - 0.01) / 0.05)
        action[:6] += self._sway * np.array([1, 1, 0.5, 0.2, 0.2, 0.2]) * far
        action[:3] = np.clip(action[:3], -ACTION_LIMIT, ACTION_LIMIT)
        action[3:6] = np.clip(action[3:6], -ROTATION_LIMIT, ROTATION_LIMIT)
        return Step(action, phase, finished)

    def _aim(self, seen: Observation) -> tuple[Array, Array, float, str]:
        """Goal position, goal rotation, gripper command and phase, from the present pose of things."""
        table, scene = self._table, seen.scene
        target = table.task.target
        body = scene.object_pos[target]
        mark = table.container_pos
        grasp_z = TABLE_Z + OBJECT_HALF_M
        hand, finger = seen.ee_pos, float(seen.gripper_qpos[0])
        to_mark = mark[:2] - body[:2]
        inside = float(np.hypot(*to_mark)) < INSIDE_M - 0.004

        if table.success or (
            inside and self._grip < 0 and finger > OBJECT_HALF_M and self._phase != "approach"
        ):
            goal = np.array([hand[0], hand[1], grasp_z + RETREAT_M])
            if finger < FINGER_OPEN_M - 0.004:  # let go fully before leaving
                goal[2] = hand[2]
                return goal, scene.hand_rot, -1.0, "release"
            return goal, DOWN, -1.0, "retreat"

        yaw = _nearest_quarter(scene.object_rot[target])
        grasp_rot = rotvec_to_matrix(np.array([0.0, 0.0, yaw])) @ DOWN
        if table.held != target:
            away = float(np.hypot(*(body[:2] - hand[:2])))
            above = float(hand[2] - grasp_z)
            closing = finger < FINGER_OPEN_M - 1e-6 and self._grip > 0
            if (away < ALIGNED_M and abs(above) < 0.006) or (closing and away < 0.02):
                return np.array([*body[:2], grasp_z]), grasp_rot, 1.0, "grasp"
            drop = min(1.0, max(0.0, (away - ALIGNED_M) / FUNNEL_M))
            # Low and away from its mark the hand rises first, so as not to shove what stands between.
            climb = max(
                min(1.0, max(0.0, (above - 0.015) / 0.04)), 1.0 - min(1.0, max(0.0, away - 0.02) / 0.02)
            )
            goal = np.empty(3)
            goal[:2] = hand[:2] + (body[:2] - hand[:2]) * climb
            goal[2] = grasp_z - THROUGH_M + drop * (HOVER_M + THROUGH_M + self._height)
            return goal, grasp_rot, -1.0, "approach" if drop > 0.3 else "descend"

        # Held: the object, not the hand, is what must come above the container.
        offset = body[:2] - hand[:2]
        away = float(np.hypot(*to_mark))
        lifted = min(1.0, max(0.0, (float(hand[2]) - grasp_z - 0.015) / (CARRY_M - 0.035)))
        drop = min(1.0, max(0.0, (away - 2 * ALIGNED_M) / FUNNEL_M))
        if away < 0.02 and float(hand[2]) < grasp_z + PLACE_M:
            return np.array([*hand[:2], hand[2]]), scene.hand_rot, -1.0, "release"
        goal = np.empty(3)
        goal[:2] = hand[:2] + (mark[:2] - offset - hand[:2]) * (lifted if drop > 0.3 else 1.0)
        goal[2] = grasp_z - THROUGH_M + drop * (CARRY_M + THROUGH_M + self._height)
        # The hand leans into its way, as a person's would; upright again over the container.
        lean = LEAN_RAD * lifted * min(1.0, away / 0.1) / max(away, 1e-9)
        turn = rotvec_to_matrix(np.array([-to_mark[1] * lean, to_mark[0] * lean, 0.0]))
        phase = "lift" if lifted < 0.5 and drop > 0.3 else "carry" if drop > 0.3 else "place"
        return goal, turn @ DOWN, 1.0, phase


def _nearest_quarter(rotation: Array) -> float:
    """The yaw by which the hand must turn from straight to meet an object's sides, within 45 degrees."""
    yaw = math.atan2(rotation[1, 0], rotation[0, 0])
    return yaw - math.pi / 2 * round(yaw / (math.pi / 2))
