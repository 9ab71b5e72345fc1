"""A small tabletop: a Panda picks the object an instruction names and puts it into a tray or onto a plate.

The data of the demo and the tests, and the judge of trained policies. Deterministic, numpy only.

Robot        LIBERO's OSC_POSE (robosuite 1.4.0) at 20 Hz: action 7 = [dx dy dz drx dry drz grip] in [-1, 1],
             0.05 m and 0.5 rad per unit, world axes, the rotation vector multiplied from the left; the goal
             is the measured pose plus the delta, of which one control step realises a part (about 1.4 cm at
             full scale). An exactly zero rotation keeps the previous goal. Gripper -1 open, +1 close, 8
             steps from shut to open.
World        LIBERO's tabletop arena: robot base at (-0.66, 0, 0.912), table at z = 0.90; x away from the
             robot, y to its left, z up.
Objects      4.8 cm wide and tall, at random poses over 20 x 20 cm, each of its own colour; which one is
             meant, and where it goes, stands in the instruction alone.
Contact      quasi-static and deliberately simple: fingers shove what they meet, close on what stands between
             them, and carry it if its middle is within 16 mm along the pads and 8 mm of their height.
State        flat like MuJoCo's, [time, qpos, qvel]: arm 7, fingers 2, then a free joint (position, quaternion
             wxyz) for every object, the tray, the plate and the controller's goal; velocities in that order.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .panda import (
    HOME,
    Array,
    jacobian,
    link_frames,
    matrix_to_quat_xyzw,
    quat_xyzw_to_matrix,
    quat_xyzw_to_rotvec,
    rotvec_between,
    rotvec_to_matrix,
    solve_joints,
)
from .render import Body, Scene, render_front, render_wrist

FPS = 20
CONTROL_SECONDS = 1.0 / FPS
BASE_POSITION = np.array([-0.66, 0.0, 0.912])
TABLE_Z = 0.90
OBJECT_AREA_CENTRE = np.array([-0.10, -0.06])  # x, y of the middle of the 20 x 20 cm
OBJECT_AREA_M = 0.20
OBJECT_HALF_M = 0.024
OBJECT_SPACING_M = 0.078  # between centres: room for an open finger next to a neighbour
CONTAINER_HALF_M = 0.05  # half side of the tray, radius of the plate
CONTAINER_X = (-0.165, -0.035)  # the tray takes one, the plate the other
CONTAINER_Y = 0.125

POSITION_SCALE_M = 0.05
ROTATION_SCALE_RAD = 0.5
REALISED = 0.28  # of the distance to the goal, once moving: 1.4 cm of 5 cm, as measured in LIBERO
RESPONSE = 0.7  # of the wanted velocity, reached within one control step
FINGER_OPEN_M = 0.04
FINGER_STEP_M = 0.005
FINGER_HALF_X_M, FINGER_HALF_Y_M = 0.009, 0.006
TIP_CLEARANCE_M = 0.009  # grip site above the fingers' lower end
GRASP_ALONG_M = 0.016
GRASP_HEIGHT_M = 0.008
SLIP_M = 0.034  # along the pads, where an object is clear of shut fingers
INSIDE_M = 0.042  # of an object's middle from the container's
GRAVITY = 9.81

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 36),
    "green": (44, 160, 62),
    "blue": (38, 86, 216),
    "yellow": (240, 200, 30),
    "purple": (136, 62, 174),
    "orange": (242, 126, 26),
}
SHAPES = ("cube", "cylinder")
CONTAINERS = ("tray", "plate")
GOALS = {"tray": "place it in the tray", "plate": "place it on the plate"}


@dataclass(frozen=True)
class Task:
    """What the instruction asks: bring object `target` to `container`."""

    bodies: tuple[Body, ...]
    target: int
    container: str

    @property
    def instruction(self) -> str:
        body = self.bodies[self.target]
        return f"pick up the {body.colour} {body.shape} and {GOALS[self.container]}"


@dataclass(frozen=True)
class Observation:
    """One moment of the table. Images are rendered when first asked for, RGB [H, W, 3], row 0 at the top."""

    time: float  # s
    joint_pos: Array  # [7] rad
    ee_pos: Array  # [3] m, world, grip site
    ee_quat_xyzw: Array  # [4] world, body right_hand
    ee_rotvec: Array  # [3] rad, the same by robosuite's quat2axisangle: near (pi, 0, 0), not canonical
    gripper_qpos: Array  # [2] m: (+w, -w), 0.04 open
    scene: Scene  # what the cameras see; tests read object poses from it
    image_size: int

    @cached_property
    def front(self) -> NDArray[np.uint8]:
        return render_front(self.scene, self.image_size)

    @cached_property
    def wrist(self) -> NDArray[np.uint8]:
        return render_wrist(self.scene, self.image_size)


class Tabletop:
    """The simulator. `objects` stand on the table (1 to 6); images are `image_size` squared."""

    def __init__(self, objects: int = 3, image_size: int = 128) -> None:
        if not 1 <= objects <= len(COLOURS):
            raise ValueError(f"objects must be 1 to {len(COLOURS)}, not {objects}")
        self.objects = objects
        self.image_size = image_size
        self.reset(0)

    def reset(self, seed: int) -> Observation:
        rng = np.random.default_rng([seed, 0x7AB1E])
        names = list(COLOURS)[: max(4, self.objects)]
        colours = rng.permutation(len(names))[: self.objects]
        bodies = tuple(
            Body(SHAPES[int(rng.integers(len(SHAPES)))], names[c], COLOURS[names[c]]) for c in colours
        )
        self.task = Task(bodies, int(rng.integers(self.objects)), CONTAINERS[int(rng.integers(2))])

        self._object_pos = np.full((self.objects, 3), TABLE_Z + OBJECT_HALF_M)
        self._object_pos[:, :2] = _scatter(rng, self.objects)
        self._object_quat = np.stack([_yaw_quat(rng.uniform(-0.5, 0.5)) for _ in bodies])
        self._fall_speed = np.zeros(self.objects)
        sides = rng.permutation(2)
        self._container_pos = np.zeros((2, 3))
        for i in range(2):
            jitter = rng.uniform([-0.01, -0.012], [0.01, 0.012])
            self._container_pos[i] = CONTAINER_X[sides[i]] + jitter[0], CONTAINER_Y + jitter[1], TABLE_Z

        start = np.array([-0.14, 0.0, TABLE_Z + 0.175]) + rng.uniform(-1, 1, 3) * [0.03, 0.04, 0.02]
        turn = rotvec_to_matrix(rng.uniform(-1, 1, 3) * [0.08, 0.08, 0.25])
        rotation = turn @ np.diag([1.0, -1.0, -1.0])
        # 40 iterations settle the redundant joint too: the posture term alone moves it after the first few.
        self._joints = solve_joints(HOME, start - BASE_POSITION, rotation, 40)
        self._joint_vel = np.zeros(7)
        self._finger = FINGER_OPEN_M
        self._finger_vel = 0.0
        self._time = 0.0
        self._frames = link_frames(self._joints)
        self._goal_pos = self._hand_pos.copy()
        self._goal_quat = matrix_to_quat_xyzw(self._hand_rot)
        return self._observe()

    def step(self, action: Array) -> Observation:
        """One control step of 50 ms; `action` [7] is clipped to [-1, 1] as robosuite does."""
        command = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        if command.shape != (7,):
            raise ValueError(f"an action has 7 numbers, not {command.shape}")
        before_pos, before_rot = self._hand_pos.copy(), self._hand_rot.copy()
        held, room = self._held(), self._finger
        self._move_arm(command)
        self._move_fingers(float(command[6]), held, CONTROL_SECONDS)
        self._touch(before_pos, before_rot, held, room)
        self._time += CONTROL_SECONDS
        return self._observe()

    def follow(self, position: Array, rotation: Array, grip: float, seconds: float) -> Observation:
        """One step of a position-controlled robot: the hand goes straight to a pose in the world.

        What datasets of absolute poses or joints command, at their own rate; `grip` as in `step`.
        """
        before_pos, before_rot = self._hand_pos.copy(), self._hand_rot.copy()
        held, room = self._held(), self._finger
        before = self._joints
        self._joints = solve_joints(self._joints, position - BASE_POSITION, rotation, 20)
        self._joint_vel = (self._joints - before) / seconds
        self._frames = link_frames(self._joints)
        self._goal_pos, self._goal_quat = self._hand_pos.copy(), matrix_to_quat_xyzw(self._hand_rot)
        self._move_fingers(grip, held, seconds)
        self._touch(before_pos, before_rot, held, room)
        self._time += seconds
        return self._observe()

    def _touch(self, before_pos: Array, before_rot: Array, held: int | None, room: float) -> None:
        """What the hand's last motion does to the objects: carry, let go, shove, grasp, fall."""
        released = held is not None and self._finger > OBJECT_HALF_M + 1e-9
        if held is not None:
            turn = self._hand_rot @ before_rot.T
            self._object_pos[held] = self._hand_pos + turn @ (self._object_pos[held] - before_pos)
            self._object_quat[held] = matrix_to_quat_xyzw(turn @ quat_xyzw_to_matrix(self._object_quat[held]))
            if released:
                held = None
        stood = self._object_pos[:, :2].copy()
        self._shove(held, room)
        if held is None:
            self._close_on_object(room)
        self._stop_at_rims(stood, held)
        self._fall(self._held())

    @property
    def instruction(self) -> str:
        return self.task.instruction

    @property
    def container_pos(self) -> Array:
        """Middle of the container the instruction names, [3] m, world."""
        return self._container_pos[CONTAINERS.index(self.task.container)]

    @property
    def success(self) -> bool:
        """The named object lies in the named container and no finger holds it."""
        if self._held() == self.task.target:
            return False
        away = self._object_pos[self.task.target] - self.container_pos
        flat = np.abs(away[:2]).max() if self.task.container == "tray" else float(np.hypot(away[0], away[1]))
        return bool(flat <= INSIDE_M and abs(away[2] - OBJECT_HALF_M) < 1e-3)

    @property
    def held(self) -> int | None:
        """The index of the object in the gripper, if any."""
        return self._held()

    def state(self) -> Array:
        """Everything that moves, flat: [time, qpos, qvel] (see the top of the file)."""
        free_pos = [*self._object_pos, *self._container_pos, self._goal_pos]
        upright = np.array([0.0, 0.0, 0.0, 1.0])
        free_quat = [*self._object_quat, upright, upright, self._goal_quat]
        qpos = [self._joints, [self._finger, -self._finger]]
        qvel = [self._joint_vel, [self._finger_vel, -self._finger_vel]]
        for i, (position, quat) in enumerate(zip(free_pos, free_quat, strict=True)):
            qpos += [position, quat[[3, 0, 1, 2]]]
            speed = self._fall_speed[i] if i < self.objects else 0.0
            qvel += [[0.0, 0.0, speed, 0.0, 0.0, 0.0]]
        return np.concatenate([[self._time], *qpos, *qvel])

    def set_state(self, state: Array) -> Observation:
        """Restore a `state()` of the same task (same seed, same number of objects)."""
        state = np.asarray(state, dtype=np.float64)
        free = self.objects + 3
        nq, nv = 9 + 7 * free, 9 + 6 * free
        if state.shape != (1 + nq + nv,):
            raise ValueError(
                f"a state of {self.objects} objects has {1 + nq + nv} numbers, not {state.shape}"
            )
        qpos, qvel = state[1 : 1 + nq], state[1 + nq :]
        self._time = float(state[0])
        self._joints = qpos[:7].copy()
        self._joint_vel = qvel[:7].copy()
        self._finger, self._finger_vel = float(qpos[7]), float(qvel[7])
        poses = qpos[9:].reshape(free, 7)
        quats = poses[:, [4, 5, 6, 3]]
        n = self.objects
        self._object_pos = poses[:n, :3].copy()
        self._object_quat = quats[:n].copy()
        self._fall_speed = qvel[9:].reshape(free, 6)[:n, 2].copy()
        self._container_pos = poses[n : n + 2, :3].copy()
        self._goal_pos, self._goal_quat = poses[n + 2, :3].copy(), quats[n + 2].copy()
        self._frames = link_frames(self._joints)
        return self._observe()

    def place_hand(self, position: Array, rotation: Array, finger: float) -> Observation:
        """Put the hand at rest at a pose in the world, fingers `finger` m from its middle; time stands still."""
        self._joints = solve_joints(self._joints, position - BASE_POSITION, rotation, 40)
        self._joint_vel = np.zeros(7)
        self._finger, self._finger_vel = finger, 0.0
        self._frames = link_frames(self._joints)
        self._goal_pos, self._goal_quat = self._hand_pos.copy(), matrix_to_quat_xyzw(self._hand_rot)
        return self._observe()

    @property
    def _hand_pos(self) -> Array:
        return self._frames[7, :3, 3] + BASE_POSITION

    @property
    def _hand_rot(self) -> Array:
        return self._frames[7, :3, :3]

    def _move_arm(self, command: Array) -> None:
        position, rotation = self._hand_pos, self._hand_rot
        self._goal_pos = position + POSITION_SCALE_M * command[:3]
        if command[3:6].any():
            goal = rotvec_to_matrix(ROTATION_SCALE_RAD * command[3:6]) @ rotation
            self._goal_quat = matrix_to_quat_xyzw(goal)
        wanted = np.empty(6)
        wanted[:3] = self._goal_pos - position
        wanted[3:] = rotvec_between(rotation, quat_xyzw_to_matrix(self._goal_quat))
        wanted *= REALISED
        moving = jacobian(self._frames) @ (self._joint_vel * CONTROL_SECONDS)
        twist = moving + RESPONSE * (wanted - moving)
        floor = TABLE_Z + TIP_CLEARANCE_M
        twist[2] = max(float(twist[2]), min(0.0, floor - float(position[2])))  # the table stops the fingers
        target = position + twist[:3] - BASE_POSITION
        joints = solve_joints(self._joints, target, rotvec_to_matrix(twist[3:]) @ rotation, 2)
        self._joint_vel = (joints - self._joints) / CONTROL_SECONDS
        self._joints = joints
        self._frames = link_frames(joints)

    def _move_fingers(self, command: float, held: int | None, seconds: float) -> None:
        """Only the command's sign counts, and it is integrated, as in robosuite's Panda gripper."""
        before = self._finger
        least = OBJECT_HALF_M if held is not None else 0.0
        travel = FINGER_STEP_M * (seconds / CONTROL_SECONDS) * float(np.sign(command))
        self._finger = min(FINGER_OPEN_M, max(least, before - travel))
        self._finger_vel = (self._finger - before) / seconds

    def _in_hand(self) -> Array:
        """Object middles in the hand's frame, [N, 3] m: along the pads, across them, out of the hand."""
        return (self._object_pos - self._hand_pos) @ self._hand_rot

    def _held(self) -> int | None:
        """A function of the poses alone, so that a restored state holds what it held."""
        if self._finger > OBJECT_HALF_M + 1e-9:
            return None
        along, across, out = np.abs(self._in_hand()).T
        slack = 1e-6  # a carried object keeps its place in the hand to rounding only
        fits = (along <= GRASP_ALONG_M + slack) & (across <= slack) & (out <= GRASP_HEIGHT_M + slack)
        return int(np.argmax(fits)) if fits.any() else None

    def _between(self, along: float, across: float, room: float) -> bool:
        """Whether an object stands between pads `room` from the middle: shut fingers hold nothing."""
        return room >= OBJECT_HALF_M - 1e-9 and abs(along) <= GRASP_ALONG_M and abs(across) < room

    def _shove(self, held: int | None, room: float) -> None:
        """Fingers push loose objects aside; then each object, the held one first, pushes what it overlaps."""
        tip_z = self._hand_pos[2] - TIP_CLEARANCE_M
        pads = self._hand_rot[:2, :2] / np.linalg.norm(self._hand_rot[:2, 1])
        for i in range(self.objects):
            if i == held or tip_z >= self._object_pos[i, 2] + OBJECT_HALF_M:
                continue
            along, across = (self._object_pos[i, :2] - self._hand_pos[:2]) @ pads
            if self._between(along, across, room):
                continue  # between the fingers: see _close_on_object
            push = np.zeros(2)
            for side in (1.0, -1.0):
                middle = side * (self._finger + FINGER_HALF_Y_M)
                nearest_along = min(FINGER_HALF_X_M, max(-FINGER_HALF_X_M, along))
                nearest_across = min(FINGER_HALF_Y_M, max(-FINGER_HALF_Y_M, across - middle)) + middle
                gap = np.array([along - nearest_along, across - nearest_across])
                distance = math.hypot(gap[0], gap[1])
                if distance < OBJECT_HALF_M:
                    if distance < 1e-9:
                        gap, distance = np.array([0.0, side]), 1.0
                        push += gap * OBJECT_HALF_M
                    else:
                        push += gap * ((OBJECT_HALF_M - distance) / distance)
            self._object_pos[i, :2] += pads @ push
        first = [held] if held is not None else []
        order = first + [i for i in range(self.objects) if i != held]
        for k, i in enumerate(order):
            for j in order[k + 1 :]:
                gap = self._object_pos[j] - self._object_pos[i]
                distance = math.hypot(gap[0], gap[1])
                if distance < 2 * OBJECT_HALF_M and abs(gap[2]) < 2 * OBJECT_HALF_M - 1e-6:
                    away = gap[:2] / distance if distance > 1e-9 else np.array([1.0, 0.0])
                    self._object_pos[j, :2] += away * (2 * OBJECT_HALF_M - distance)

    def _close_on_object(self, room: float) -> None:
        """An object between the pads stops them; centred between them and turned flat against them."""
        tip_z = self._hand_pos[2] - TIP_CLEARANCE_M
        for i, (along, across, out) in enumerate(self._in_hand()):
            below_top = tip_z < self._object_pos[i, 2] + OBJECT_HALF_M
            if not below_top or not self._between(along, across, room):
                continue
            play = max(0.0, self._finger - OBJECT_HALF_M)
            pad_axis = self._hand_rot[:, 1]
            self._object_pos[i] += pad_axis * (min(play, max(-play, across)) - across)
            if self._finger <= OBJECT_HALF_M and abs(out) > GRASP_HEIGHT_M:
                # Pinched above or below its middle, it slips out along the pads.
                slip = math.copysign(SLIP_M, along) - along
                self._object_pos[i, :2] += self._hand_rot[:2, 0] * slip
            elif self._finger <= OBJECT_HALF_M:
                self._finger = OBJECT_HALF_M
                yaw = _yaw_of(self._object_quat[i])
                turn = math.atan2(-pad_axis[0], pad_axis[1]) - yaw
                quarter = math.pi / 2  # a cube meets the pads with the nearest pair of its sides
                self._object_quat[i] = _yaw_quat(yaw + turn - quarter * round(turn / quarter))

    def _stop_at_rims(self, stood: Array, held: int | None) -> None:
        """What is shoved along the table does not climb into a container: only what is carried gets there."""
        for i in range(self.objects):
            on_table = self._object_pos[i, 2] < TABLE_Z + OBJECT_HALF_M + 0.005
            if i != held and on_table:
                for middle in self._container_pos[:, :2]:
                    was, now = np.abs(stood[i] - middle).max(), np.abs(self._object_pos[i, :2] - middle).max()
                    if was > CONTAINER_HALF_M >= now:
                        self._object_pos[i, :2] = stood[i]

    def _fall(self, held: int | None) -> None:
        """Whatever nothing holds falls to the table, or onto an object below it, and stands upright."""
        for i in range(self.objects):
            support = TABLE_Z + OBJECT_HALF_M
            position = self._object_pos[i]
            for j in range(self.objects):
                other = self._object_pos[j]
                apart = math.hypot(other[0] - position[0], other[1] - position[1])
                if j != i and apart < OBJECT_HALF_M and other[2] < position[2]:
                    support = max(support, float(other[2]) + 2 * OBJECT_HALF_M)
            if i == held:
                self._fall_speed[i] = 0.0
                continue
            self._fall_speed[i] -= GRAVITY * CONTROL_SECONDS
            position[2] += self._fall_speed[i] * CONTROL_SECONDS
            if position[2] <= support:
                position[2] = support
                self._fall_speed[i] = 0.0
                self._object_quat[i] = _yaw_quat(_yaw_of(self._object_quat[i]))

    def _observe(self) -> Observation:
        quat = matrix_to_quat_xyzw(self._hand_rot)
        scene = Scene(
            bodies=self.task.bodies,
            object_pos=self._object_pos.copy(),
            object_rot=np.stack([quat_xyzw_to_matrix(quat) for quat in self._object_quat]),
            tray_pos=self._container_pos[0].copy(),
            plate_pos=self._container_pos[1].copy(),
            hand_pos=self._hand_pos.copy(),
            hand_rot=self._hand_rot.copy(),
            finger=self._finger,
            elbow_pos=self._frames[3, :3, 3] + BASE_POSITION,
            wrist_pos=self._frames[5, :3, 3] + BASE_POSITION,
        )
        return Observation(
            time=self._time,
            joint_pos=self._joints.copy(),
            ee_pos=self._hand_pos.copy(),
            ee_quat_xyzw=quat,
            ee_rotvec=quat_xyzw_to_rotvec(quat),
            gripper_qpos=np.array([self._finger, -self._finger]),
            scene=scene,
            image_size=self.image_size,
        )


def _scatter(rng: np.random.Generator, count: int) -> Array:
    """[count, 2] m: uniform over the object area, no two nearer than the gripper needs."""
    low = OBJECT_AREA_CENTRE - OBJECT_AREA_M / 2
    while True:
        spots = low + rng.uniform(0.0, OBJECT_AREA_M, (count, 2))
        gaps = np.hypot(*(spots[:, None] - spots[None]).transpose(2, 0, 1))
        if (gaps + np.eye(count) >= OBJECT_SPACING_M).all():
            return spots


def _yaw_quat(angle: float) -> Array:
    return np.array([0.0, 0.0, math.sin(angle / 2), math.cos(angle / 2)])


def _yaw_of(quat_xyzw: Array) -> float:
    x, y, z, w = quat_xyzw.tolist()
    return math.atan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))
