"""The tabletop simulator, its cameras and its scripted expert."""

import h5py
import numpy as np
import pytest
from dpipe.samples import panda
from dpipe.samples.expert import ACTION_LIMIT, Expert
from dpipe.samples.render import (
    FRONT_EYE,
    FRONT_FOV_DEG,
    FRONT_ROTATION,
    WRIST_FOV_DEG,
    Camera,
    project,
    render,
    wrist_pose,
)
from dpipe.samples.tabletop import (
    BASE_POSITION,
    COLOURS,
    OBJECT_AREA_CENTRE,
    OBJECT_HALF_M,
    TABLE_Z,
    Tabletop,
)
from dpipe.schemas import rotations
from hypothesis import assume, given, settings
from hypothesis import strategies as st

HOLD = np.array([0, 0, 0, 0, 0, 0, -1.0])


def demonstrate(table: Tabletop, seed: int):
    """States before each action, actions, and the observation after each, of one expert episode."""
    seen = table.reset(seed)
    expert = Expert(table, seed)
    states, actions, after = [], [], []
    for _ in range(300):
        step = expert.act(seen)
        if step.finished:
            break
        states.append(table.state())
        actions.append(step.action)
        seen = table.step(step.action)
        after.append(seen)
    return states, np.array(actions), after


def replay(table: Tabletop, seed: int, start, actions) -> bool:
    table.reset(seed)
    table.set_state(start)
    for action in actions:
        table.step(action)
    return table.success


# The robot ------------------------------------------------------------------------------------------------


def test_kinematics_agree_with_real_libero_recordings_within_a_millimetre(sample_data):
    for name, base in (("libero_goal", BASE_POSITION), ("libero_object", np.array([-0.6, 0.0, 0.0]))):
        path = next((sample_data / "libero" / name).glob("*.hdf5"))
        with h5py.File(path) as file:
            obs, robot = file["data/demo_0/obs"], file["data/demo_0/robot_states"][:]
            joints, position = obs["joint_states"][:], obs["ee_pos"][:]
            rotvec = obs["ee_ori"][:]
        for t in range(0, len(joints), 7):
            hand = panda.link_frames(joints[t])[7]
            np.testing.assert_allclose(hand[:3, 3] + base, position[t], atol=1.5e-3)
            quat = panda.matrix_to_quat_xyzw(hand[:3, :3])
            np.testing.assert_allclose(quat, robot[t, 5:], atol=1.5e-3)
            np.testing.assert_allclose(panda.quat_xyzw_to_rotvec(quat), rotvec[t], atol=5e-3)


@given(st.lists(st.floats(-0.3, 0.3), min_size=7, max_size=7))
def test_joints_are_found_again_from_the_hands_pose(offset):
    hand = panda.link_frames(panda.HOME + offset)[7]
    joints = panda.solve_joints(panda.HOME, hand[:3, 3], hand[:3, :3], 40)
    np.testing.assert_allclose(panda.link_frames(joints)[7], hand, atol=1e-7)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_scalar_rotations_agree_with_the_batched_ones(values):
    rotvec = np.array(values)
    matrix = panda.rotvec_to_matrix(rotvec)
    np.testing.assert_allclose(matrix, rotations.rotvec_to_matrix(rotvec), atol=1e-12)
    quat = panda.matrix_to_quat_xyzw(matrix)
    np.testing.assert_allclose(panda.quat_xyzw_to_matrix(quat), matrix, atol=1e-12)
    assume(abs(quat[3]) < 0.999)  # robosuite's arc cosine loses its digits near no rotation at all
    assert (
        rotations.geodesic_distance(rotations.rotvec_to_matrix(panda.quat_xyzw_to_rotvec(quat)), matrix)
        < 1e-7
    )


def test_jacobian_is_the_derivative_of_the_hand_pose():
    step = 1e-6
    frames = panda.link_frames(panda.HOME)
    for joint in range(7):
        moved = panda.link_frames(panda.HOME + step * np.eye(7)[joint])[7]
        linear = (moved[:3, 3] - frames[7, :3, 3]) / step
        turning = panda.rotvec_between(frames[7, :3, :3], moved[:3, :3]) / step
        np.testing.assert_allclose(panda.jacobian(frames)[:, joint], [*linear, *turning], atol=1e-5)


def test_full_scale_command_moves_the_hand_1_4_cm_per_step_along_world_axes():
    table = Tabletop()
    for axis in range(3):
        seen = table.reset(3)
        command = HOLD.copy()
        command[axis] = 1.0
        path = [table.step(command).ee_pos for _ in range(6)]
        moved = np.diff([seen.ee_pos, *path], axis=0)
        assert 0.008 < moved[0, axis] < 0.011  # the arm has to get going
        np.testing.assert_allclose(moved[-1, axis], 0.014, atol=2e-4)
        np.testing.assert_allclose(np.delete(moved, axis, axis=1), 0.0, atol=1e-4)


def test_rotation_commands_turn_the_hand_about_world_axes_from_the_left():
    table = Tabletop()
    for axis in range(3):
        seen = table.reset(3)
        command = HOLD.copy()
        command[3 + axis] = 0.3
        for _ in range(5):
            after = table.step(command)
        turn = after.scene.hand_rot @ seen.scene.hand_rot.T
        rotvec = rotations.matrix_to_rotvec(turn)
        assert rotvec[axis] > 0.1
        np.testing.assert_allclose(np.delete(rotvec, axis), 0.0, atol=3e-3)


def test_zero_rotation_keeps_the_previous_goal_and_a_tiny_one_resets_it():
    def turn_after(rotation: float) -> float:
        table = Tabletop()
        table.reset(3)
        start = table.step(np.array([0, 0, 0, 0, 0, 0.5, -1.0])).scene.hand_rot
        for _ in range(10):
            seen = table.step(np.array([0, 0, 0, 0, 0, rotation, -1.0]))
        return float(rotations.geodesic_distance(start, seen.scene.hand_rot))

    assert turn_after(0.0) > 3 * turn_after(1e-9)


def test_gripper_integrates_the_sign_of_its_command_over_eight_steps():
    table = Tabletop()
    table.reset(0)
    opening = [float(table.step(np.array([0, 0, 0, 0, 0, 0, 0.2])).gripper_qpos[0]) for _ in range(9)]
    np.testing.assert_allclose(opening, [0.035, 0.03, 0.025, 0.02, 0.015, 0.01, 0.005, 0, 0], atol=1e-12)
    assert table.step(np.array([0, 0, 0, 0, 0, 0, 0.0])).gripper_qpos.tolist() == pytest.approx(
        [0, 0], abs=1e-12
    )
    seen = table.step(HOLD)
    np.testing.assert_allclose(seen.gripper_qpos, [0.005, -0.005], atol=1e-12)


def test_orientation_is_written_as_robosuite_writes_it():
    seen = Tabletop().reset(2)
    x, y, z, w = seen.ee_quat_xyzw
    np.testing.assert_allclose(seen.ee_rotvec, np.array([x, y, z]) * 2 * np.arccos(w) / np.sqrt(1 - w * w))
    norms = [np.linalg.norm(Tabletop().reset(seed).ee_rotvec) for seed in range(30)]
    assert min(norms) < np.pi < max(norms)  # not brought below pi
    np.testing.assert_allclose(rotations.quat_to_matrix(seen.ee_quat_xyzw), seen.scene.hand_rot, atol=1e-12)


def test_table_stops_the_fingers():
    table = Tabletop()
    table.reset(0)
    heights = [float(table.step(np.array([0, 0, -1, 0, 0, 0, -1.0])).ee_pos[2]) for _ in range(30)]
    assert heights[-1] == pytest.approx(TABLE_Z + 0.009, abs=1e-6)
    assert min(heights) > TABLE_Z + 0.0089


# Episodes -------------------------------------------------------------------------------------------------


def test_equal_seeds_and_actions_give_equal_bits():
    first, second = Tabletop(), Tabletop()
    a, b = demonstrate(first, 7), demonstrate(second, 7)
    assert np.array_equal(a[1], b[1])
    assert np.array_equal(first.state(), second.state())
    assert np.array_equal(a[2][-1].front, b[2][-1].front)
    assert np.array_equal(a[2][-1].wrist, b[2][-1].wrist)


def test_state_is_restored_to_the_bit_at_any_moment():
    table = Tabletop()
    states, actions, _ = demonstrate(table, 5)
    final = table.state()
    for start in range(0, len(actions), 9):
        table.reset(5)
        table.set_state(states[start])
        assert np.array_equal(table.state(), states[start])
        for action in actions[start:]:
            table.step(action)
        assert np.array_equal(table.state(), final)


def test_state_is_laid_out_like_mujocos():
    table = Tabletop(objects=4)
    seen = table.reset(1)
    state = table.state()
    assert state.shape == (1 + 9 + 7 * 7 + 9 + 6 * 7,)
    assert state[0] == 0.0
    np.testing.assert_array_equal(state[1:8], seen.joint_pos)
    np.testing.assert_array_equal(state[8:10], seen.gripper_qpos)
    np.testing.assert_array_equal(state[10:13], seen.scene.object_pos[0])
    assert np.linalg.norm(state[13:17]) == pytest.approx(1.0)
    table.step(HOLD)
    assert table.state()[0] == pytest.approx(0.05)


def test_state_of_another_scene_is_refused():
    with pytest.raises(ValueError, match="has 97 numbers"):
        Tabletop(objects=3).set_state(Tabletop(objects=4).state())


def test_expert_succeeds_with_smooth_commands_within_liberos_limits():
    table = Tabletop()
    lengths = []
    for seed in range(1000, 1030):
        _, actions, after = demonstrate(table, seed)
        assert table.success, seed
        assert not any(seen.scene.finger < OBJECT_HALF_M for seen in after), "the fingers shut on nothing"
        assert np.abs(actions[:, :3]).max() <= ACTION_LIMIT
        assert set(actions[:, 6]) == {-1.0, 1.0}
        assert np.count_nonzero(np.diff(actions[:, 6])) == 2  # one grasp, one release
        lengths.append(len(actions))
    assert min(lengths) >= 45 and max(lengths) <= 120


def test_demonstrations_hold_no_ops_and_succeed_without_them():
    table = Tabletop()
    for seed in range(8):
        states, actions, _ = demonstrate(table, seed)
        still = np.linalg.norm(actions[:, :6], axis=1) < 1e-4
        no_op = still & np.concatenate([[False], actions[1:, 6] == actions[:-1, 6]])
        assert no_op.sum() >= 1
        assert not actions[no_op][:, :6].any()  # exactly zero
        assert replay(table, seed, states[0], actions[~no_op])


def test_open_loop_replay_succeeds_and_its_controls_fail():
    table = Tabletop()
    outcomes = {
        "same": 0,
        "float32": 0,
        "first action lost": 0,
        "first action twice": 0,
        "gripper flipped": 0,
    }
    seeds = range(12)
    for seed in seeds:
        states, actions, _ = demonstrate(table, seed)
        flipped = actions * [1, 1, 1, 1, 1, 1, -1]
        outcomes["same"] += replay(table, seed, states[1], actions[1:])
        outcomes["float32"] += replay(table, seed, states[1], actions[1:].astype(np.float32))
        outcomes["first action lost"] += replay(table, seed, states[1], actions[2:])
        outcomes["first action twice"] += replay(table, seed, states[1], actions)
        outcomes["gripper flipped"] += replay(table, seed, states[1], flipped[1:])
    assert outcomes["same"] == outcomes["float32"] == len(seeds)
    assert outcomes["first action lost"] <= 2
    assert outcomes["first action twice"] <= 2
    assert outcomes["gripper flipped"] == 0


def test_scenes_cover_the_area_and_only_the_instruction_names_the_target():
    table = Tabletop()
    spots, targets, goals, instructions = [], set(), set(), set()
    for seed in range(150):
        scene = table.reset(seed).scene
        spots.append(scene.object_pos[:, :2] - OBJECT_AREA_CENTRE)
        assert len({body.colour for body in scene.bodies}) == 3
        gaps = scene.object_pos[:, None, :2] - scene.object_pos[None, :, :2]
        assert (np.hypot(gaps[..., 0], gaps[..., 1]) + np.eye(3) >= 0.078).all()
        body = scene.bodies[table.task.target]
        assert table.instruction.startswith(f"pick up the {body.colour} {body.shape} and place it ")
        targets.add(table.task.target)
        goals.add(table.task.container)
        instructions.add(table.instruction)
    spots = np.concatenate(spots)
    assert np.abs(spots).max() <= 0.1
    assert (spots.min(axis=0) < -0.098).all() and (spots.max(axis=0) > 0.098).all()
    assert targets == {0, 1, 2} and goals == {"tray", "plate"} and len(instructions) == 16


def test_success_means_the_named_object_in_the_named_container_and_let_go():
    table = Tabletop()
    states, actions, _ = demonstrate(table, 4)
    assert table.success
    table.reset(4)
    grasped = next(t for t in range(len(states)) if table.set_state(states[t]) and table.held is not None)
    release = int(np.flatnonzero(np.diff(actions[:, 6]) < 0)[0]) + 1
    table.set_state(states[release])
    assert table.held == table.task.target and not table.success  # above the container, still held
    n = table.objects
    placed, wrong = states[-1].copy(), states[-1].copy()
    target, other = table.task.target, (table.task.target + 1) % n
    block = lambda i: slice(10 + 7 * i, 13 + 7 * i)  # noqa: E731
    wrong[block(target)], wrong[block(other)] = placed[block(other)], placed[block(target)]
    table.set_state(wrong)
    assert not table.success
    table.set_state(placed)
    assert table.success
    assert grasped < release


def test_grasp_needs_the_objects_middle_between_the_pads():
    table = Tabletop()
    table.reset(4)
    states, _, _ = demonstrate(table, 4)
    close = np.array([0, 0, 0, 0, 0, 0, 1.0])
    open_low = next(
        state
        for state in states
        if table.set_state(state).ee_pos[2] < TABLE_Z + OBJECT_HALF_M + 0.004 and table.held is None
    )
    target = 10 + 7 * table.task.target
    for offset, holds in ((0.0, True), (0.013, True), (0.019, False)):
        state = open_low.copy()
        state[target] += offset  # world x is along the pads
        table.set_state(state)
        for _ in range(6):
            table.step(close)
        assert (table.held == table.task.target) is holds, offset


def test_shoving_does_not_bring_an_object_into_a_container():
    table = Tabletop(objects=1)
    table.reset(0)
    state = table.state()
    container = table.container_pos
    state[10:12] = container[:2] - np.array([0.0, 0.075])
    hand = table.set_state(state)
    push = container[:2] - np.array([0.0, 0.135])
    for _ in range(60):
        error = np.array([*push, TABLE_Z + 0.02]) - hand.ee_pos
        hand = table.step(np.array([*np.clip(error / 0.05, -1, 1), 0, 0, 0, 1.0]))
    for _ in range(40):
        hand = table.step(np.array([0, 0.5, 0, 0, 0, 0, 1.0]))
    assert hand.ee_pos[1] > container[1] - 0.02  # the hand went over the rim
    assert hand.scene.object_pos[0, 1] <= container[1] - 0.05 + 1e-9
    assert not table.success


# Pictures -------------------------------------------------------------------------------------------------


def test_objects_appear_where_projection_says_in_both_cameras():
    table = Tabletop(image_size=128)
    for seed in range(6):
        seen = table.reset(seed)
        scene = seen.scene
        views = [
            (seen.front, FRONT_FOV_DEG, FRONT_EYE, FRONT_ROTATION),
            (seen.wrist, WRIST_FOV_DEG, *wrist_pose(scene)),
        ]
        for image, fov, eye, rotation in views:
            pixels = project(scene.object_pos, Camera.square(128, fov), eye, rotation)
            for (column, row, _), body in zip(pixels, scene.bodies, strict=True):
                if 8 < column < 120 and 8 < row < 96:  # in sight, and not behind the wrist view's fingers
                    colour = image[int(row), int(column)].astype(float)
                    hue = colour / np.linalg.norm(colour)
                    wanted = np.array(body.rgb) / np.linalg.norm(body.rgb)
                    assert hue @ wanted > 0.99, (seed, body)


def test_every_object_and_container_is_in_the_front_picture_and_large_enough():
    table = Tabletop(image_size=64)
    for seed in range(20):
        seen = table.reset(seed)
        image = seen.front.astype(float)
        for body in seen.scene.bodies:
            hue = image / np.linalg.norm(image, axis=-1, keepdims=True)
            mask = hue @ (np.array(body.rgb) / np.linalg.norm(body.rgb)) > 0.995
            rows, columns = np.nonzero(mask)
            assert np.ptp(rows) + 1 >= 8 and np.ptp(columns) + 1 >= 7, (seed, body.colour)
        corners = np.stack([seen.scene.tray_pos, seen.scene.plate_pos])
        pixels = project(corners, Camera.square(64, FRONT_FOV_DEG), FRONT_EYE, FRONT_ROTATION)
        assert (pixels[:, :2] > 8).all() and (pixels[:, :2] < 56).all()


def test_pictures_show_the_grippers_opening_and_height():
    table = Tabletop(image_size=64)
    seen = table.reset(0)
    low = table.reset(0)
    for _ in range(4):
        low = table.step(np.array([0, 0, -1, 0, 0, 0, -1.0]))
    assert np.abs(seen.front.astype(int) - low.front).max() > 60
    shut = table.reset(0)
    for _ in range(8):
        shut = table.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert np.count_nonzero(np.abs(seen.wrist.astype(int) - shut.wrist).max(axis=-1) > 60) > 100


def test_nearer_bodies_hide_those_behind_them():
    table = Tabletop(objects=2, image_size=64)
    table.reset(0)
    state = table.state()
    state[10:13] = [-0.10, -0.06, TABLE_Z + OBJECT_HALF_M]
    towards_eye = (FRONT_EYE - state[10:13]) * 0.2
    state[17:20] = state[10:13] + towards_eye
    scene = table.set_state(state).scene
    image = render(scene, Camera.square(64, FRONT_FOV_DEG), FRONT_EYE, FRONT_ROTATION)
    column, row, _ = project(
        scene.object_pos[:1], Camera.square(64, FRONT_FOV_DEG), FRONT_EYE, FRONT_ROTATION
    )[0]
    front = np.array(COLOURS[scene.bodies[1].colour], float)
    colour = image[int(row), int(column)].astype(float)
    assert colour @ front / np.linalg.norm(colour) / np.linalg.norm(front) > 0.99


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(-1, 1), min_size=7, max_size=7))
def test_any_command_leaves_a_finite_world(seed, action):
    table = Tabletop(image_size=32)
    table.reset(seed)
    for _ in range(25):
        seen = table.step(np.array(action))
    assert np.isfinite(table.state()).all()
    assert (seen.scene.object_pos[:, 2] >= TABLE_Z + OBJECT_HALF_M - 1e-9).all()
    assert seen.front.shape == seen.wrist.shape == (32, 32, 3)
