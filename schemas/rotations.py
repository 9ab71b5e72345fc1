"""Rotations and rigid transforms, batched over leading dimensions.

matrix    [..., 3, 3]   columns are the rotated axes
quat      [..., 4]      unit; xyzw unless the name says wxyz; q and -q are one rotation, ours has w >= 0
rotvec    [..., 3]      axis times angle, rad; ours has angle in [0, pi], up to 2 pi is accepted
rot6d     [..., 6]      first column, then second column of the matrix (arXiv:1812.07035)
euler     [..., 3]      extrinsic x, y, z in rad: R = Rz Ry Rx (pybullet, hence CALVIN)
pose      [..., 4, 4]   homogeneous; `pose_a_b` maps points of frame b into frame a
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def _float(values: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def quat_wxyz_to_xyzw(quat: Array) -> Array:
    return np.roll(quat, -1, axis=-1)


def quat_xyzw_to_wxyz(quat: Array) -> Array:
    return np.roll(quat, 1, axis=-1)


def quat_to_matrix(quat_xyzw: Array) -> Array:
    """[..., 4] -> [..., 3, 3]. Any non-zero length is accepted: recordings round."""
    quat = _float(quat_xyzw)
    norm = np.linalg.norm(quat, axis=-1, keepdims=True)
    if not np.all(norm > 0):
        raise ValueError("a quaternion of length 0 is no rotation")
    x, y, z, w = np.moveaxis(quat / norm, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quat(matrix: Array) -> Array:
    """[..., 3, 3] -> [..., 4] xyzw with w >= 0.

    Shepperd's method: of the four equivalent forms take the one whose divisor is largest, so that no angle
    loses precision.
    """
    m = _float(matrix)
    m00, m11, m22 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    squares = np.stack(
        [1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22, 1 + m00 + m11 + m22], axis=-1
    )
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    # Row i of this table is 4 q_i q, whichever i.
    table = np.stack(
        [
            np.stack([squares[..., 0], xy, xz, wx], axis=-1),
            np.stack([xy, squares[..., 1], yz, wy], axis=-1),
            np.stack([xz, yz, squares[..., 2], wz], axis=-1),
            np.stack([wx, wy, wz, squares[..., 3]], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(squares, axis=-1)
    quat = np.take_along_axis(table, best[..., None, None], axis=-2)[..., 0, :]
    return positive_w(quat / np.linalg.norm(quat, axis=-1, keepdims=True))


def positive_w(quat_xyzw: Array) -> Array:
    """The one of q and -q with w >= 0 (at w = 0: first non-zero component positive)."""
    quat = _float(quat_xyzw)
    order = quat[..., [3, 0, 1, 2]]
    leading = np.take_along_axis(order, np.argmax(order != 0, axis=-1)[..., None], axis=-1)
    return np.where(leading < 0, -quat, quat)


def rotvec_to_quat(rotvec: Array) -> Array:
    """[..., 3] -> [..., 4] xyzw, w >= 0. Angles above pi are welcome: robosuite writes up to 2 pi."""
    vector = _float(rotvec)
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    # sin(a/2)/a = sinc(a / 2 pi) / 2, which stays exact at 0.
    quat = np.concatenate([vector * np.sinc(angle / (2 * np.pi)) / 2, np.cos(angle / 2)], axis=-1)
    return positive_w(quat)


def quat_to_rotvec(quat_xyzw: Array) -> Array:
    """[..., 4] -> [..., 3] with angle in [0, pi]."""
    quat = positive_w(quat_xyzw)
    sine = np.linalg.norm(quat[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quat[..., 3:])
    small = sine < 1e-12
    return quat[..., :3] * np.where(small, 2.0, angle / np.where(small, 1.0, sine))


def rotvec_to_matrix(rotvec: Array) -> Array:
    return quat_to_matrix(rotvec_to_quat(rotvec))


def matrix_to_rotvec(matrix: Array) -> Array:
    return quat_to_rotvec(matrix_to_quat(matrix))


def matrix_to_rot6d(matrix: Array) -> Array:
    """[..., 3, 3] -> [..., 6]: first column, then second column."""
    columns = np.swapaxes(np.asarray(matrix)[..., :2], -1, -2)
    return columns.reshape(*columns.shape[:-2], 6)


def rot6d_to_matrix(rot6d: Array) -> Array:
    """[..., 6] -> [..., 3, 3] by Gram-Schmidt, third column by cross product: always proper."""
    values = _float(rot6d)
    first, second = values[..., :3], values[..., 3:]
    x = _unit(first)
    y = _unit(second - (x * second).sum(axis=-1, keepdims=True) * x)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def _unit(vector: Array) -> Array:
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    if not np.all(length > 0):
        raise ValueError("rot6d columns are zero or parallel: no rotation")
    return vector / length


def euler_to_matrix(euler_xyz: Array) -> Array:
    """[..., 3] extrinsic x, y, z (rad) -> [..., 3, 3] = Rz Ry Rx."""
    cx, cy, cz = np.moveaxis(np.cos(_float(euler_xyz)), -1, 0)
    sx, sy, sz = np.moveaxis(np.sin(_float(euler_xyz)), -1, 0)
    rows = [
        [cy * cz, sx * sy * cz - cx * sz, cx * sy * cz + sx * sz],
        [cy * sz, sx * sy * sz + cx * cz, cx * sy * sz - sx * cz],
        [-sy, sx * cy, cx * cy],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(matrix: Array) -> Array:
    """[..., 3, 3] -> [..., 3] extrinsic x, y, z; y in [-pi/2, pi/2]. At gimbal lock z is 0."""
    m = _float(matrix)
    cos_y = np.hypot(m[..., 0, 0], m[..., 1, 0])
    locked = cos_y < 1e-9
    y = np.arctan2(-m[..., 2, 0], cos_y)
    x = np.where(locked, np.arctan2(-m[..., 1, 2], m[..., 1, 1]), np.arctan2(m[..., 2, 1], m[..., 2, 2]))
    z = np.where(locked, 0.0, np.arctan2(m[..., 1, 0], m[..., 0, 0]))
    return np.stack([x, y, z], axis=-1)


def geodesic_distance(first: Array, second: Array) -> Array:
    """Angle in rad [...] between rotation matrices [..., 3, 3]; exact near 0 and near pi alike."""
    relative = np.swapaxes(_float(first), -1, -2) @ _float(second)
    quat = matrix_to_quat(relative)
    return 2 * np.arctan2(np.linalg.norm(quat[..., :3], axis=-1), quat[..., 3])


def is_rotation(matrix: Array, tolerance: float = 1e-5) -> NDArray[np.bool_]:
    """Whether each [..., 3, 3] is orthonormal with determinant +1, within `tolerance` per entry."""
    m = _float(matrix)
    error = np.abs(np.swapaxes(m, -1, -2) @ m - np.eye(3)).max(axis=(-1, -2))
    return (error <= tolerance) & (np.linalg.det(m) > 0)


def make_pose(matrix: Array, position: Array) -> Array:
    """Rotation [..., 3, 3] and position [..., 3] -> pose [..., 4, 4]."""
    rotation, translation = _float(matrix), _float(position)
    batch = np.broadcast_shapes(rotation.shape[:-2], translation.shape[:-1])
    pose = np.zeros((*batch, 4, 4))
    pose[..., :3, :3], pose[..., :3, 3], pose[..., 3, 3] = rotation, translation, 1.0
    return pose


def invert_pose(pose_a_b: Array) -> Array:
    """pose_a_b -> pose_b_a, by transposing the rotation rather than solving."""
    pose = _float(pose_a_b)
    rotation = np.swapaxes(pose[..., :3, :3], -1, -2)
    return make_pose(rotation, -(rotation @ pose[..., :3, 3:])[..., 0])


def transform_points(pose_a_b: Array, points_b: Array) -> Array:
    """Points [..., N, 3] of frame b -> the same points in frame a, under pose [..., 4, 4]."""
    pose = _float(pose_a_b)
    return _float(points_b) @ np.swapaxes(pose[..., :3, :3], -1, -2) + pose[..., None, :3, 3]
