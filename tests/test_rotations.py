"""Rotations against scipy, and the corners where formulas break: half turns, gimbal lock, signs."""

import numpy as np
import pytest
from dpipe.schemas.rotations import (
    euler_to_matrix,
    geodesic_distance,
    invert_pose,
    is_rotation,
    make_pose,
    matrix_to_euler,
    matrix_to_quat,
    matrix_to_rot6d,
    matrix_to_rotvec,
    quat_to_matrix,
    quat_to_rotvec,
    quat_wxyz_to_xyzw,
    quat_xyzw_to_wxyz,
    rot6d_to_matrix,
    rotvec_to_matrix,
    rotvec_to_quat,
    transform_points,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

components = st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 1e-3)


@settings(max_examples=200)
@given(components)
def test_every_form_agrees_with_scipy(quat: list[float]):
    truth = Rotation.from_quat(quat)
    matrix = quat_to_matrix(np.array(quat))
    np.testing.assert_allclose(matrix, truth.as_matrix(), atol=1e-12)
    ours = matrix_to_quat(matrix)
    assert ours[3] >= 0 and abs(ours @ truth.as_quat()) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(rotvec_to_matrix(matrix_to_rotvec(matrix)), matrix, atol=1e-9)
    np.testing.assert_allclose(rot6d_to_matrix(matrix_to_rot6d(matrix)), matrix, atol=1e-9)
    np.testing.assert_allclose(euler_to_matrix(matrix_to_euler(matrix)), matrix, atol=1e-8)
    assert np.linalg.norm(quat_to_rotvec(np.array(quat) / np.linalg.norm(quat))) <= np.pi + 1e-12


@settings(max_examples=100)
@given(st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3))
def test_euler_angles_are_extrinsic_xyz(angles: list[float]):
    truth = Rotation.from_euler("xyz", angles)  # lower case: scipy's extrinsic
    np.testing.assert_allclose(euler_to_matrix(np.array(angles)), truth.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(matrix_to_euler(truth.as_matrix()), angles, atol=1e-6)


def test_gimbal_lock_still_returns_the_rotation():
    for y in (np.pi / 2, -np.pi / 2):
        matrix = euler_to_matrix(np.array([0.3, y, 0.4]))
        np.testing.assert_allclose(euler_to_matrix(matrix_to_euler(matrix)), matrix, atol=1e-8)


def test_a_quarter_turn_about_z_by_hand():
    matrix = rotvec_to_matrix(np.array([0, 0, np.pi / 2]))
    np.testing.assert_allclose(matrix, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-15)
    np.testing.assert_allclose(matrix_to_rot6d(matrix), [0, 1, 0, -1, 0, 0], atol=1e-15)
    np.testing.assert_allclose(matrix_to_quat(matrix), [0, 0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-15)


def test_angles_beyond_a_half_turn_are_the_same_rotation():
    long_way = np.array([0, 0, 1.5 * np.pi])  # robosuite writes angles up to 2 pi
    np.testing.assert_allclose(quat_to_rotvec(rotvec_to_quat(long_way)), [0, 0, -np.pi / 2], atol=1e-12)
    np.testing.assert_allclose(rotvec_to_matrix(long_way), rotvec_to_matrix([0, 0, -np.pi / 2]), atol=1e-12)


def test_half_turns_and_tiny_turns_keep_their_precision():
    for angle in (0.0, 1e-9, 1e-5, np.pi - 1e-9, np.pi):
        vector = np.array([0.6, 0.0, 0.8]) * angle
        np.testing.assert_allclose(matrix_to_rotvec(rotvec_to_matrix(vector)), vector, atol=1e-8)
        distance = geodesic_distance(np.eye(3), rotvec_to_matrix(vector))
        assert distance == pytest.approx(angle, abs=1e-12, rel=1e-6)


def test_quaternion_orders_are_said_and_inverse():
    xyzw = np.array([[0.1, 0.2, 0.3, 0.9]])
    assert quat_xyzw_to_wxyz(xyzw).tolist() == [[0.9, 0.1, 0.2, 0.3]]
    assert quat_wxyz_to_xyzw(quat_xyzw_to_wxyz(xyzw)).tolist() == xyzw.tolist()


def test_an_untidy_rot6d_becomes_a_proper_rotation():
    matrix = rot6d_to_matrix(np.array([2.0, 0, 0, 5.0, 3.0, 0]))
    np.testing.assert_allclose(matrix, np.eye(3), atol=1e-15)
    with pytest.raises(ValueError, match="parallel"):
        rot6d_to_matrix(np.array([1.0, 0, 0, 2.0, 0, 0]))
    with pytest.raises(ValueError, match="length 0"):
        quat_to_matrix(np.zeros(4))


def test_reflections_are_no_rotations():
    assert is_rotation(np.stack([np.eye(3), -np.eye(3), 2 * np.eye(3)])).tolist() == [True, False, False]
    # EgoDex's axis change to x-right, y-forward, z-up is a rotation and moves (1, 2, 3) to (1, -3, 2).
    change = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    assert is_rotation(change).item()
    assert (change @ [1, 2, 3]).tolist() == [1, -3, 2]


def test_poses_compose_with_their_inverse_to_nothing():
    rng = np.random.default_rng(0)
    quat = rng.normal(size=(5, 4))
    pose = make_pose(quat_to_matrix(quat), rng.normal(size=(5, 3)))
    np.testing.assert_allclose(pose @ invert_pose(pose), np.broadcast_to(np.eye(4), (5, 4, 4)), atol=1e-12)
    points = rng.normal(size=(5, 7, 3))
    np.testing.assert_allclose(
        transform_points(invert_pose(pose), transform_points(pose, points)), points, atol=1e-12
    )


def test_everything_is_batched_over_leading_dimensions():
    quat = np.random.default_rng(1).normal(size=(2, 3, 4))
    matrix = quat_to_matrix(quat)
    assert matrix.shape == (2, 3, 3, 3)
    for back in (matrix_to_quat, matrix_to_rotvec, matrix_to_rot6d, matrix_to_euler):
        whole = back(matrix)
        assert whole.shape[:2] == (2, 3)
        np.testing.assert_array_equal(whole[1, 2], back(matrix[1, 2]))
