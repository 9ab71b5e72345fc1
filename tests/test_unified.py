"""The unified vector: slots, masks, projections that go back, and the numbers DIAL's layout is known by."""

import numpy as np
import pytest
from dpipe.converters import agibot, calvin, egodex, libero
from dpipe.schemas.errors import DataError, UsageError
from dpipe.schemas.rotations import matrix_to_rot6d, rot6d_to_matrix
from dpipe.schemas.unified import (
    ARKIT_TO_DIAL,
    ARKIT_TO_UNIFIED,
    CAMERA_TO_UNIFIED,
    DIM,
    NAMES,
    PROJECTIONS,
    SLOTS,
    WRIST_TO_DIAL,
    WRIST_TO_HAND,
    Unified,
    from_slots,
    hand_to_dial,
    hand_to_unified,
    points_to_dial,
    points_to_unified,
    projection,
    unified_to_hand,
    unify_action,
    unify_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

FRAMES = 4


def everything(seed: int, frames: int = FRAMES) -> Unified:
    """Unified vectors with every slot filled, rotations proper, angles inside (-pi, pi)."""
    rng = np.random.default_rng(seed)
    slots = {name: rng.uniform(-1, 1, (frames, s.stop - s.start)) for name, s in SLOTS.items()}
    for name in slots:
        if name.endswith("rot6d"):
            matrix = Rotation.random(frames, random_state=int(rng.integers(1 << 30))).as_matrix()
            slots[name] = matrix_to_rot6d(matrix)
    return from_slots(slots, frames)


def test_slots_fill_the_vector_without_gaps_or_overlap():
    covered = np.concatenate([np.arange(s.start, s.stop) for s in SLOTS.values()])
    assert covered.tolist() == list(range(DIM)) and len(set(NAMES)) == DIM
    assert NAMES[SLOTS["right_arm_joint"]] == tuple(f"right_arm_joint_{i}" for i in range(1, 8))
    assert DIM <= 128  # what DIAL pads to


def test_axis_changes_are_proper_rotations_with_the_known_values():
    turns = (
        ARKIT_TO_DIAL,
        ARKIT_TO_UNIFIED,
        CAMERA_TO_UNIFIED,
        *WRIST_TO_HAND.values(),
        *WRIST_TO_DIAL.values(),
    )
    for turn in turns:
        assert np.linalg.det(turn) == pytest.approx(1.0) and np.allclose(turn @ turn.T, np.eye(3))
    right_up_back = np.array([1.0, 2.0, 3.0])
    assert points_to_dial(right_up_back).tolist() == [1.0, -3.0, 2.0]
    assert points_to_unified(right_up_back).tolist() == [-3.0, -1.0, 2.0]  # forward, left, up
    right_down_forward = np.array([1.0, 2.0, 3.0])
    assert points_to_unified(right_down_forward, CAMERA_TO_UNIFIED).tolist() == [3.0, -1.0, -2.0]


@given(st.integers(0, 1000))
def test_hands_keep_dials_two_columns_and_stay_proper(seed: int):
    matrix = Rotation.random(random_state=seed).as_matrix()
    turned = ARKIT_TO_DIAL @ matrix
    right, left = hand_to_dial(matrix, "right"), hand_to_dial(matrix, "left")
    assert np.allclose(right[:, :2], -turned[:, :2])
    assert np.allclose(left[:, 0], turned[:, 0]) and np.allclose(left[:, 1], -turned[:, 1])
    for side, hand in (("right", right), ("left", left)):
        assert np.linalg.det(hand) == pytest.approx(1.0)
        # DIAL's own matrices: determinant -1, yet the same two columns.
        dial = np.diag([-1.0, -1, -1]) if side == "right" else np.diag([1.0, -1, 1])
        assert np.allclose((turned @ dial)[:, :2], hand[:, :2]) and np.linalg.det(dial) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("side", "towards_fingers", "out_of_back"),
    [("left", [1, 0, 0], [0, -1, 0]), ("right", [-1, 0, 0], [0, 1, 0])],
)
def test_a_hand_is_turned_as_a_gripper_would_hold(side, towards_fingers, out_of_back):
    """Apple's wrists: left x to the fingers, y out of the palm; right x from the fingers, y into the back."""
    matrix = rotations(3, 1)[0]
    hand = hand_to_unified(matrix, side)
    assert np.allclose(hand[:, 2], ARKIT_TO_UNIFIED @ matrix @ towards_fingers)
    assert np.allclose(hand[:, 0], ARKIT_TO_UNIFIED @ matrix @ out_of_back)
    assert np.allclose(unified_to_hand(hand, side), matrix)


def test_dial47_stands_in_the_order_of_the_code():
    rows = {name: i for i, name in enumerate(projection("dial47").names)}
    assert len(rows) == 47
    assert rows["right_ee_pos_x"] == 0 and rows["right_ee_rot6d_0"] == 3
    assert rows["left_ee_pos_x"] == 9 and rows["left_ee_rot6d_0"] == 12
    assert rows["right_arm_joint_1"] == 18 and rows["right_hand_joint_1"] == 25
    assert rows["left_arm_joint_1"] == 31 and rows["left_hand_joint_1"] == 38 and rows["waist_yaw"] == 44
    assert projection("dial47").names[:18] == projection("dial18").names


def test_the_other_projections_have_their_published_sizes_and_order():
    sizes = {name: p.dim for name, p in PROJECTIONS.items()}
    assert sizes == {"dial47": 47, "dial18": 18, "hrdt48": 48, "go1": 16, "libero8": 8, "calvin15": 15}
    go1 = projection("go1").names
    assert go1[0] == "left_arm_joint_1" and go1[7] == "left_gripper"
    assert go1[8] == "right_arm_joint_1" and go1[15] == "right_gripper"
    assert projection("calvin15").names == calvin.STATE.names
    assert projection("libero8").names == libero.STATE.names
    assert (
        projection("hrdt48").names[0] == "left_ee_pos_x"
        and projection("hrdt48").names[24] == "right_ee_pos_x"
    )


@pytest.mark.parametrize("name", sorted(PROJECTIONS))
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_every_projection_goes_back(name: str, seed: int):
    """On what it covers: unified -> vector -> unified -> vector."""
    whole, chosen = everything(seed), projection(name)
    vectors, mask = chosen.project(whole)
    assert mask.all() and vectors.shape == (FRAMES, chosen.dim)
    back = chosen.unproject(vectors)
    assert back.mask.sum() > 0
    assert np.allclose(back.values[:, back.mask], whole.values[:, back.mask], atol=1e-9)
    assert not back.values[:, ~back.mask].any()
    again, _ = chosen.project(back)
    assert np.allclose(again, vectors, atol=1e-9)


def test_projected_numbers_by_hand():
    rot = matrix_to_rot6d(np.diag([1.0, -1.0, -1.0]))[None]  # pointing straight down: half a turn about x
    unified = from_slots(
        {
            "right_ee_pos": np.array([[0.1, 0.2, 0.3]]),
            "right_ee_rot6d": rot,
            "right_gripper_open": np.array([[0.25]]),
            "right_gripper_command": np.array([[1.0]]),
            "right_arm_joint": np.arange(7.0)[None],
        },
        1,
    )
    libero8, _ = projection("libero8").project(unified)
    assert np.allclose(libero8, [[0.1, 0.2, 0.3, np.pi, 0, 0, 0.01, -0.01]])
    calvin15, _ = projection("calvin15").project(unified)
    assert np.allclose(calvin15, [[0.1, 0.2, 0.3, np.pi, 0, 0, 0.02, 0, 1, 2, 3, 4, 5, 6, 1.0]])
    go1, mask = projection("go1").project(unified)
    assert mask.tolist() == [False] * 8 + [True] * 8
    assert go1[0, 8:].tolist() == [0, 1, 2, 3, 4, 5, 6, 0.75]  # 0 open, 1 closed


def test_a_dimension_that_is_nan_throughout_is_one_the_embodiment_lacks():
    unified = from_slots({"waist": np.array([[np.nan, 0.5, np.nan, 0.3]])}, 1)
    assert unified.mask[SLOTS["waist"]].tolist() == [False, True, False, True]
    assert np.isfinite(unified.values).all()
    vectors, mask = projection("dial47").project(unified)
    assert mask[44:].tolist() == [False, True, False] and vectors[0, 45] == 0.5


def test_unprojecting_under_a_mask_leaves_the_rest_masked():
    chosen = projection("dial47")
    mask = np.zeros(47, bool)
    mask[:18] = True
    back = chosen.unproject(np.ones((2, 47)), mask)
    assert back.has("right_ee_pos") and not back.has("right_arm_joint") and not back.has("waist")


def test_wrong_shapes_and_unknown_names_are_refused():
    with pytest.raises(DataError, match="48 dimensions"):
        projection("hrdt48").unproject(np.zeros((3, 47)))
    with pytest.raises(UsageError, match="dial47"):
        projection("dial46")
    with pytest.raises(UsageError, match="left_ee_pos"):
        everything(0).slot("left_ee_position")


# --- from each source's columns ------------------------------------------------------------------------------


def rotations(seed: int, frames: int = FRAMES) -> np.ndarray:
    return Rotation.random(frames, random_state=seed).as_matrix()


def test_libero_columns_become_a_right_hand():
    matrix, body = rotations(1), libero.embodiment(libero.Options(), "")
    state = np.zeros((FRAMES, 8))
    state[:, :3] = np.arange(12).reshape(4, 3)
    vector = Rotation.from_matrix(matrix).as_rotvec()
    angle = np.linalg.norm(vector, axis=1, keepdims=True)
    state[:, 3:6] = vector * (1 - 2 * np.pi / angle)  # the same turn beyond pi, as robosuite writes it
    state[:, 6:] = [0.01, -0.03]
    action = np.zeros((FRAMES, 7))
    action[:, 6] = [-1, -1, 1, 1]
    pose = np.concatenate([state[:, :3] + 1, matrix_to_rot6d(matrix), np.full((4, 1), 0.3)], axis=1)
    columns = {
        "observation.state": state,
        "action": action,
        "joint_pos": np.ones((FRAMES, 7)),
        "next_ee_pose": pose,
    }
    unified = unify_state(body, columns)
    assert np.array_equal(unified.slot("right_ee_pos"), state[:, :3])
    assert np.allclose(rot6d_to_matrix(unified.slot("right_ee_rot6d")), matrix, atol=1e-9)
    assert np.allclose(unified.slot("right_gripper_open"), 0.5)
    assert unified.has("right_arm_joint") and not unified.has("left_ee_pos")
    target = unify_action(body, columns)
    assert np.array_equal(target.slot("right_ee_pos"), state[:, :3] + 1)
    # LIBERO: -1 opens. The command counts, not the width the fingers happen to have.
    assert target.slot("right_gripper_open")[:, 0].tolist() == [1, 1, 0, 0]
    back, _ = projection("libero8").project(unified)
    assert np.allclose(back[:, :3], state[:, :3]) and np.allclose(back[:, 6:], [0.02, -0.02])


def test_calvin_columns_become_a_right_hand_of_the_opposite_polarity_and_go_back_exactly():
    frames = {
        "robot_obs": np.random.default_rng(0).uniform(-0.9, 0.9, (FRAMES, 15)),
        "actions": np.random.default_rng(1).uniform(-0.9, 0.9, (FRAMES, 7)),
        "rel_actions": np.zeros((FRAMES, 7)),
        "scene_obs": np.zeros((FRAMES, 24)),
    }
    frames["robot_obs"][:, 14] = [1, 1, -1, -1]
    frames["actions"][:, 6] = [1, -1, -1, -1]
    columns = calvin.episode_columns(frames, "D")
    body = calvin.embodiment(calvin.Options(), "")
    unified, target = unify_state(body, columns), unify_action(body, columns)
    expected = Rotation.from_euler("xyz", frames["robot_obs"][:, 3:6]).as_matrix()
    assert np.allclose(rot6d_to_matrix(unified.slot("right_ee_rot6d")), expected, atol=1e-6)
    assert unified.slot("right_gripper_command")[:, 0].tolist() == [1, 1, 0, 0]
    assert target.slot("right_gripper_open")[:, 0].tolist() == [1, 0, 0, 0]
    assert np.allclose(target.slot("right_ee_pos"), frames["actions"][:, :3], atol=1e-6)
    vectors, mask = projection("calvin15").project(unified)
    assert mask.all() and np.allclose(vectors, columns["observation.state"], atol=1e-6)


def egodex_columns(
    options: egodex.Options, seed: int = 3
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    poses = {}
    for number, joint in enumerate(["camera", *egodex.JOINTS]):
        pose = np.tile(np.eye(4), (FRAMES, 1, 1))
        pose[:, :3, :3] = rotations(seed + number)
        pose[:, :3, 3] = rng.uniform(-1, 1, (FRAMES, 3))
        poses[joint] = pose
    state = egodex.state_vector(poses, options)
    return {"observation.state": state, "action": np.roll(state, -1, axis=0)}, poses


@pytest.mark.parametrize("layout", ["hands", "hrdt48", "full", "dial18"])
def test_every_egodex_layout_gives_the_same_hands(layout: str):
    options = egodex.Options(layout=layout)
    columns, poses = egodex_columns(options)
    unified = unify_state(egodex.embodiment(options, ""), columns)
    for side in ("left", "right"):
        hand = poses[f"{side}Hand"]
        x, y, z = hand[:, :3, 3].T
        assert np.allclose(unified.slot(f"{side}_ee_pos"), np.stack([-z, -x, y], axis=1))
        matrix = rot6d_to_matrix(unified.slot(f"{side}_ee_rot6d"))
        assert np.allclose(unified_to_hand(matrix, side), hand[:, :3, :3])
        if layout != "dial18":
            thumb = poses[f"{side}ThumbTip"][:, :3, 3]
            assert np.allclose(unified.slot(f"{side}_fingertips")[:, :3], points_to_unified(thumb))
            little = poses[f"{side}LittleFingerTip"][:, :3, 3]
            assert np.allclose(unified.slot(f"{side}_fingertips")[:, 12:], points_to_unified(little))
        assert not unified.has(f"{side}_gripper_open")
    vectors, mask = projection("dial47").project(unified)
    assert mask.tolist() == [True] * 18 + [False] * 29
    assert mask.sum() * 16 == 288  # DIAL's loss denominator for one EgoDex sample of 16 actions
    dial18 = egodex_columns(egodex.Options(layout="dial18"))[0]["observation.state"]
    assert np.allclose(vectors[:, :18], dial18)


def test_hrdt48_projected_back_is_what_the_file_held():
    options = egodex.Options(layout="hrdt48")
    columns, _ = egodex_columns(options)
    vectors, mask = projection("hrdt48").project(unify_state(egodex.embodiment(options, ""), columns))
    assert mask.all() and np.allclose(vectors, columns["observation.state"])


@pytest.mark.parametrize("frame", ["camera", "first-camera"])
def test_camera_frames_turn_too(frame: str):
    options = egodex.Options(frame=frame)
    columns, poses = egodex_columns(options)
    unified = unify_state(egodex.embodiment(options, ""), columns)
    camera = poses["camera"] if frame == "camera" else poses["camera"][:1]
    x, y, z = (np.linalg.inv(camera) @ poses["leftHand"])[:, :3, 3].T
    assert np.allclose(unified.slot("left_ee_pos"), np.stack([z, -x, -y], axis=1))
    assert unified.has("head_pos") and np.allclose(unified.slot("head_pos")[0], 0)


def test_the_egodex_action_is_read_from_the_action_column():
    options = egodex.Options()
    columns, _ = egodex_columns(options)
    body = egodex.embodiment(options, "")
    assert np.allclose(unify_action(body, columns).values[:-1], unify_state(body, columns).values[1:])


@pytest.mark.parametrize("variant", ["gripper", "dexhand"])
def test_agibot_columns_become_two_arms_head_and_waist(variant: str):
    body = agibot.embodiment(agibot.Options(), variant)
    rng = np.random.default_rng(5)
    columns = {f.name: rng.uniform(0.1, 0.9, (FRAMES, f.dim)) for f in (*body.features, *body.sidecar)}
    for name in ("end_pose", "next_end_pose"):
        for at in (0, 7):
            matrix = rotations(7 + at)
            columns[name][:, at + 3 : at + 7] = Rotation.from_matrix(matrix).as_quat()  # xyzw
    unified, target = unify_state(body, columns), unify_action(body, columns)
    state = columns["observation.state"]
    assert np.array_equal(unified.slot("left_arm_joint"), state[:, :7])
    assert np.array_equal(unified.slot("right_arm_joint"), state[:, 7:14])
    names = body.features[0].names
    assert np.array_equal(unified.slot("head_joint")[:, 0], state[:, names.index("head_yaw")])
    assert unified.mask[SLOTS["head_joint"]].tolist() == [True, True, False]
    assert unified.mask[SLOTS["waist"]].tolist() == [False, True, False, True]
    assert np.allclose(rot6d_to_matrix(unified.slot("right_ee_rot6d")), rotations(14), atol=1e-9)
    reach = 0.143 if variant == "gripper" else 0.0
    flange = columns["end_pose"][:, :3]
    assert np.allclose(unified.slot("left_ee_pos"), flange + reach * rotations(7)[:, :, 2])
    if variant == "gripper":
        at = names.index("left_gripper")
        assert np.allclose(unified.slot("left_gripper_open")[:, 0], 1 - state[:, at])
        assert np.allclose(target.slot("left_gripper_open")[:, 0], 1 - columns["action"][:, at])
        vectors, mask = projection("go1").project(target)
        assert mask.all()
        assert np.allclose(vectors[:, 7], columns["action"][:, at])
        assert np.allclose(vectors[:, :7], columns["action"][:, :7])
    else:
        assert unified.has("left_hand_joint") and not unified.has("left_gripper_open")


def test_a_source_without_a_map_and_a_missing_column_are_named():
    body = calvin.embodiment(calvin.Options(), "")
    with pytest.raises(DataError, match="next_ee_pose"):
        unify_action(body, {"action": np.zeros((2, 7))})
    from dataclasses import replace

    with pytest.raises(UsageError, match="aloha"):
        unify_state(replace(body, name="aloha"), {"observation.state": np.zeros((2, 15))})
