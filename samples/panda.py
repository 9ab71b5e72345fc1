"""A Franka Panda's kinematics: joint angles to hand pose and back, in plain numpy.

Conventions  hand pose in the robot's base frame: position of the grip site (between the fingertips), m, and
             orientation of the body `right_hand`; its z axis points out of the fingers, the fingers slide
             along its y axis. A hand pointing straight down is diag(1, -1, -1).
Source       Denavit-Hartenberg parameters in Craig's convention: Franka Control Interface documentation,
             "Robot and interface specifications"; hand mounted at -45 degrees and grip site 97 mm below it:
             robosuite 1.4.0, `panda_gripper.xml`. Real LIBERO recordings agree (tests/test_tabletop.py).
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

_A = (0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088)
_D = (0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0)
_COS_ALPHA = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_SIN_ALPHA = (0.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0)
FLANGE_M = 0.107
GRIP_SITE_M = 0.097  # from the hand's origin, along its z axis
FLANGE_TO_HAND = np.array(
    [[math.sqrt(0.5), math.sqrt(0.5), 0.0], [-math.sqrt(0.5), math.sqrt(0.5), 0.0], [0.0, 0.0, 1.0]]
)
# LIBERO's initial posture, which the redundant seventh degree of freedom is drawn back to.
HOME = np.array([0.0, -0.161037389, 0.0, -2.44459747, 0.0, 2.2267522, math.pi / 4])


def link_frames(joint_pos: Array) -> Array:
    """[7] rad -> [8, 4, 4]: the seven joint frames and the grip site, in the base frame."""
    frames = np.zeros((8, 4, 4))
    pose = np.eye(4)
    step = np.zeros((4, 4))
    step[3, 3] = 1.0
    for i, angle in enumerate(joint_pos.tolist()):
        c, s, ca, sa = math.cos(angle), math.sin(angle), _COS_ALPHA[i], _SIN_ALPHA[i]
        step[0] = c, -s, 0.0, _A[i]
        step[1] = s * ca, c * ca, -sa, -_D[i] * sa
        step[2] = s * sa, c * sa, ca, _D[i] * ca
        pose = pose @ step
        frames[i] = pose
    frames[7, :3, :3] = pose[:3, :3] @ FLANGE_TO_HAND
    frames[7, :3, 3] = pose[:3, 3] + pose[:3, 2] * (FLANGE_M + GRIP_SITE_M)
    frames[7, 3, 3] = 1.0
    return frames


def jacobian(frames: Array) -> Array:
    """[8, 4, 4] -> [6, 7]: hand velocity (m/s, rad/s, base frame) per joint velocity (rad/s)."""
    axis = frames[:7, :3, 2]
    arm = frames[7, :3, 3] - frames[:7, :3, 3]
    out = np.empty((6, 7))
    out[0] = axis[:, 1] * arm[:, 2] - axis[:, 2] * arm[:, 1]
    out[1] = axis[:, 2] * arm[:, 0] - axis[:, 0] * arm[:, 2]
    out[2] = axis[:, 0] * arm[:, 1] - axis[:, 1] * arm[:, 0]
    out[3:] = axis.T
    return out


def solve_joints(start: Array, position: Array, rotation: Array, iterations: int) -> Array:
    """Joint angles [7] that bring the hand to a pose, found from `start` by damped least squares.

    A fixed number of iterations, so that the same inputs give the same bits. The damping is small: it guards
    against a singular posture and costs no accuracy, because the error is measured anew each time.
    """
    joints = start
    for _ in range(iterations):
        frames = link_frames(joints)
        error = np.empty(6)
        error[:3] = position - frames[7, :3, 3]
        error[3:] = rotvec_between(frames[7, :3, :3], rotation)
        columns = jacobian(frames)
        gram = columns @ columns.T
        gram[np.diag_indices(6)] += 1e-8
        # The posture term moves only what leaves the hand where it is.
        posture = 0.05 * (HOME - joints)
        joints = joints + posture + columns.T @ np.linalg.solve(gram, error - columns @ posture)
    return joints


def rotvec_to_matrix(rotvec: Array) -> Array:
    """[3] rad -> [3, 3], by Rodrigues' formula."""
    x, y, z = rotvec.tolist()
    angle = math.sqrt(x * x + y * y + z * z)
    if angle < 1e-12:
        return np.array([[1.0, -z, y], [z, 1.0, -x], [-y, x, 1.0]])
    x, y, z = x / angle, y / angle, z / angle
    c, s = math.cos(angle), math.sin(angle)
    v = 1.0 - c
    return np.array(
        [
            [c + x * x * v, x * y * v - z * s, x * z * v + y * s],
            [x * y * v + z * s, c + y * y * v, y * z * v - x * s],
            [x * z * v - y * s, y * z * v + x * s, c + z * z * v],
        ]
    )


def rotvec_between(current: Array, goal: Array) -> Array:
    """The rotation vector [3] that turns `current` into `goal` from the left, angle below pi."""
    turn = goal @ current.T
    sine = 0.5 * np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    length = math.sqrt(float(sine @ sine))
    angle = math.atan2(length, 0.5 * (float(turn[0, 0] + turn[1, 1] + turn[2, 2]) - 1.0))
    return sine * (angle / length) if length > 1e-12 else sine


def matrix_to_quat_xyzw(matrix: Array) -> Array:
    """[3, 3] -> [4] x y z w with x >= 0: continuous for a hand that points down, as MuJoCo's is.

    Shepperd's method on the branch of a large x, which is the only one a working hand needs; the general
    branch serves everything else.
    """
    m = matrix
    trace = m[0, 0] + m[1, 1] + m[2, 2]
    fours = np.array([m[0, 0], m[1, 1], m[2, 2], trace]) * 2.0 - trace + 1.0
    fours[3] = trace + 1.0
    largest = int(np.argmax(fours))
    big = math.sqrt(max(float(fours[largest]), 0.0)) * 0.5
    rest = 0.25 / big
    if largest == 3:
        quat = np.array([m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], 0.0]) * rest
    else:
        i, j, k = largest, (largest + 1) % 3, (largest + 2) % 3
        quat = np.empty(4)
        quat[j] = (m[j, i] + m[i, j]) * rest
        quat[k] = (m[k, i] + m[i, k]) * rest
        quat[3] = (m[k, j] - m[j, k]) * rest
    quat[largest] = big
    return -quat if quat[0] < 0.0 else quat


def quat_xyzw_to_matrix(quat: Array) -> Array:
    """[4] x y z w, unit length -> [3, 3]."""
    x, y, z, w = quat.tolist()
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quat_xyzw_to_rotvec(quat: Array) -> Array:
    """[4] -> [3] by robosuite's `quat2axisangle`: angle 2 acos(w) in [0, 2 pi], never brought below pi."""
    w = min(1.0, max(-1.0, float(quat[3])))
    length = math.sqrt(1.0 - w * w)
    return quat[:3] * (2.0 * math.acos(w) / length) if length > 1e-12 else np.zeros(3)
